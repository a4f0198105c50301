"""The noise of estimated updates: on a quadratic objective with known signal, curvature and noise, over many repeats."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray

from interference import tree
from interference.forecasting.halves import Halves, means, noise_ratio
from interference.forecasting.outcomes import Point, cell, noise_term
from interference.forecasting.prediction import _with_errors
from interference.tree import LowRank

Array = NDArray[np.float64]
SIZE, REPEATS = 12, 400


class Planted:
    """L(d) = g'd + 1/2 d'Hd, an update s, and estimates s + e with e of covariance S."""

    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(seed)
        root = self.rng.standard_normal((SIZE, SIZE))
        self.H, self.g = -root @ root.T / SIZE, self.rng.standard_normal(SIZE)
        self.s = 0.5 * self.rng.standard_normal(SIZE)
        self.root = 0.6 * self.rng.standard_normal((SIZE, SIZE)) / SIZE**0.5
        self.harm = float(np.trace(self.H @ self.root @ self.root.T)) / 2

    def change(self, d: Array) -> float:
        return float(self.g @ d + 0.5 * d @ self.H @ d)

    def drawn(self, ratio: float = 1.0) -> Array:
        return np.asarray(self.s + ratio**0.5 * self.root @ self.rng.standard_normal(SIZE))

    def real(self, noise: float) -> float:
        """What real trainings do on average."""
        return self.change(self.s) + noise * self.harm


def point(value: float) -> Point:
    return Point(value, np.full(2, value), 1.0)


def halves(first: Array, second: Array, noise: float) -> Halves:
    return Halves({"w": torch.from_numpy(first)}, {"w": torch.from_numpy(second)}, noise)


def forecasts(planted: Planted, noise: float, unseen: bool) -> Array:
    """(repeats, 2): corrected, and at the mean (or at either estimate, untouched) as it is."""
    out = []
    for _ in range(REPEATS):
        h = halves(planted.drawn(), planted.drawn(), noise)
        mean, first, second = (point(planted.change(np.asarray(d["w"]))) for d in (h.mean(), h.first, h.second))
        tried = point((first.value + second.value) / 2) if unseen else mean
        made = cell(tried, noise_term(mean, first, second), noise, unseen)
        out.append((float(made["predicted"]), tried.value))
    return np.array(out)


@pytest.mark.parametrize("unseen", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.2, 1.0])
def test_corrected_forecast_is_unbiased_and_the_plain_one_is_not(noise: float, unseen: bool) -> None:
    planted = Planted()
    found = forecasts(planted, noise, unseen)
    error = found - planted.real(noise)
    stderr = error.std(0, ddof=1) / REPEATS**0.5
    assert abs(error[:, 0].mean()) < 3 * stderr[0]
    bias = planted.harm * ((1.0 if unseen else 0.5) - noise)  # of L(d_1), L(u) against the real training's
    assert abs(error[:, 1].mean() - bias) < 3 * stderr[1]
    if abs(bias) > 0.5 * abs(planted.harm) - 1e-9:
        assert abs(error[:, 1].mean()) > 5 * stderr[1], "the oracle sees no bias to correct"


def test_product_of_the_halves_is_free_of_noise() -> None:
    """u'Hu - w'Hw is d_1'Hd_2, as the docstring has it, and unbiased for s'Hs."""
    planted, found = Planted(1), []
    for _ in range(REPEATS):
        h = halves(planted.drawn(), planted.drawn(), 1.0)
        u, w = (np.asarray(d["w"]) for d in (h.mean(), h.difference()))
        first, second = np.asarray(h.first["w"]), np.asarray(h.second["w"])
        found.append(u @ planted.H @ u - w @ planted.H @ w)
        assert found[-1] == pytest.approx(first @ planted.H @ second)
    assert abs(np.mean(found) - planted.s @ planted.H @ planted.s) < 3 * np.std(found) / REPEATS**0.5


@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_intervals_cover_real_trainings_at_about_their_rate(noise: float) -> None:
    """Updates of eight trainings on one domain, each estimated twice and really made once; sequences without noise."""
    planted, hits = Planted(2), []
    for _ in range(60):
        rows = []
        for k in range(8):
            h = halves(planted.drawn(), planted.drawn(), noise)
            three = [point(planted.change(np.asarray(d["w"]))) for d in (h.mean(), h.first, h.second)]
            made = cell(three[0], noise_term(*three), noise)
            rows.append({"domain": "d", "update": str(k), "own": False, **made})
        cells = _with_errors(pd.DataFrame(rows), {str(k): noise for k in range(8)})
        real = np.array([planted.change(planted.drawn(noise)) for _ in range(8)])
        hits.append(((cells["low"] <= real) & (real <= cells["high"])).mean())
    assert 0.83 < np.mean(hits) < 0.96


def test_reliability_is_the_cosine_to_the_signal_squared() -> None:
    """Isotropic noise in many dimensions, where cosines hardly vary."""
    rng = np.random.default_rng(0)
    s = rng.standard_normal(40_000)
    h = halves(s + 1.5 * rng.standard_normal(40_000), s + 1.5 * rng.standard_normal(40_000), 1.0)
    cosine = tree.cosine(h.mean(), {"w": torch.from_numpy(s)})
    assert h.agreement() == pytest.approx(1 / (1 + 1.5**2), abs=0.02)
    assert h.reliability() == pytest.approx(cosine**2, abs=0.02)


def test_mean_and_difference_of_tensors_that_one_half_lacks() -> None:
    """And of factors, which stay factors."""
    a, b = LowRank(torch.ones(8, 1), torch.ones(1, 9)), LowRank(2 * torch.ones(8, 1), torch.ones(1, 9))
    h = Halves({"m": a, "only": torch.ones(2)}, {"m": b, "other": torch.ones(3)}, 1.0)
    mean, difference = h.mean(), h.difference()
    assert isinstance(mean["m"], LowRank)
    torch.testing.assert_close(tree.dense(mean["m"]), torch.full((8, 9), 1.5))
    torch.testing.assert_close(tree.dense(difference["m"]), torch.full((8, 9), -0.5))
    torch.testing.assert_close(tree.dense(mean["only"]), torch.full((2,), 0.5))
    torch.testing.assert_close(tree.dense(difference["other"]), torch.full((3,), -0.5))
    assert set(means({"x": h})["x"]) == {"m", "only", "other"}


def test_noise_ratio_counts_what_is_new() -> None:
    assert noise_ratio(draws=100, distinct=1000, real=400) == 0.25
    assert noise_ratio(draws=5000, distinct=1000, real=4000) == 0.25
    assert noise_ratio(draws=5000, distinct=5000, real=400) == 1.0
