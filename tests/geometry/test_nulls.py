"""Chance levels: closed forms, SciPy's distributions, and the rate at which the intervals cover what random draws give."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from scipy import stats

from interference.errors import InputError
from interference.geometry.nulls import (
    EXACT_VARIANCE,
    consensus_chance,
    intersection_null,
    jaccard_chance,
    jaccard_null,
    line_chance,
    sign_agreement_null,
    subspace_null,
    top_set_null,
)

REPEATS = 400


def band(rate: float) -> float:
    """Three standard deviations of the share of REPEATS draws."""
    return 3 * (rate * (1 - rate) / REPEATS) ** 0.5


def convolved(strata: list[tuple[int, int, int]]) -> np.ndarray:
    """Probabilities of 0, 1, ... of a sum of hypergeometrics, from SciPy's."""
    mass = np.ones(1)
    for n, a, b in strata:
        mass = np.convolve(mass, stats.hypergeom.pmf(np.arange(min(a, b) + 1), n, a, b))
    return mass


def test_jaccard_chance_of_planted_densities() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random(2_000_000) < 0.3, rng.random(2_000_000) < 0.05
    observed = (first & second).sum() / (first | second).sum()
    assert observed == pytest.approx(jaccard_chance(0.3, 0.05), rel=0.02)
    assert jaccard_chance(0.3, 0.05) == pytest.approx(0.015 / 0.335, abs=1e-15)
    assert jaccard_chance(1, 0.25) == 0.25
    assert np.isnan(jaccard_chance(0, 0))
    with pytest.raises(InputError, match="between 0 and 1"):
        jaccard_chance(1.5, 0.5)


@pytest.mark.parametrize(
    ("n", "a", "b"), [(50, 20, 10), (50, 45, 40), (1000, 3, 7), (4000, 1200, 900), (10**9, 40_000, 50_000)]
)
def test_one_stratum_is_the_hypergeometric(n: int, a: int, b: int) -> None:
    null, peer = intersection_null(n, a, b), stats.hypergeom(n, a, b)
    assert null.variance <= EXACT_VARIANCE
    assert null.mean == pytest.approx(peer.mean(), rel=1e-12)
    assert null.variance == pytest.approx(peer.var(), rel=1e-9)
    assert (null.low, null.high) == (peer.ppf(0.05), peer.ppf(0.95))


def test_large_variance_is_normal_and_near_the_hypergeometric() -> None:
    n, a, b = 1_000_000, 300_000, 400_000
    null, peer = intersection_null(n, a, b), stats.hypergeom(n, a, b)
    assert null.variance > EXACT_VARIANCE
    assert abs(null.low - peer.ppf(0.05)) <= 1
    assert abs(null.high - peer.ppf(0.95)) <= 1


def test_strata_are_convolved_and_fixed_ones_shift() -> None:
    strata = [(60, 30, 20), (200, 5, 190), (40, 40, 13), (10, 0, 4), (0, 0, 0), (1, 1, 1)]
    null = intersection_null(*np.array(strata).T)
    mass = convolved(strata[:-2])
    values = np.arange(len(mass)) + 1  # the last stratum always adds one
    assert null.mean == pytest.approx(mass @ values, rel=1e-12)
    assert null.variance == pytest.approx(mass @ (values - null.mean) ** 2, rel=1e-10)
    below = mass.cumsum()
    assert null.low == values[np.argmax(below >= 0.05)]
    assert null.high == values[np.argmax(below >= 0.95)]


def test_permutation_interval_covers_random_masks_at_its_rate() -> None:
    """The coverage is compared with that of the exact distribution, which is above 0.90 since counts are discrete."""
    rng = np.random.default_rng(1)
    for n, a, b in ((400, 120, 80), (30, 6, 5)):
        null = jaccard_null(n, a, b)
        inside = 0
        for _ in range(REPEATS):
            first, second = rng.permutation(n) < a, rng.permutation(n) < b
            inside += null.low <= (first & second).sum() / (first | second).sum() <= null.high
        counts = intersection_null(n, a, b)
        exact = stats.hypergeom.cdf(counts.high, n, a, b) - stats.hypergeom.cdf(counts.low - 1, n, a, b)
        assert exact >= 0.90
        assert abs(inside / REPEATS - exact) <= band(exact)


def test_large_interval_covers_at_its_rate() -> None:
    rng = np.random.default_rng(2)
    strata = np.array([(10**7, 3 * 10**6, 2 * 10**6), (10**6, 9 * 10**5, 8 * 10**5), (10**8, 10**5, 10**4)])
    null = intersection_null(*strata.T)
    drawn = sum(rng.hypergeometric(a, n - a, b, REPEATS) for n, a, b in strata.tolist())
    rate = ((null.low <= drawn) & (drawn <= null.high)).mean()
    assert abs(rate - 0.90) <= band(0.90)


def test_stratified_chance_is_right_where_densities_differ_and_the_plain_one_is_not() -> None:
    """Masks that are independent within tensors but dense in the same ones overlap more than pq/(p+q-pq) says."""
    rng = np.random.default_rng(3)
    sizes, densities = [300, 1000, 5000], [0.9, 0.1, 0.01]
    stratified = plain = 0
    expected, seen, exact = [], [], []
    for _ in range(REPEATS):
        masks = [[rng.random(n) < p for n, p in zip(sizes, densities, strict=True)] for _ in range(2)]
        a, b = ([int(part.sum()) for part in mask] for mask in masks)
        both = sum(int((x & y).sum()) for x, y in zip(*masks, strict=True))
        null, naive = jaccard_null(sizes, a, b), jaccard_null(sum(sizes), sum(a), sum(b))
        seen.append(both / (sum(a) + sum(b) - both))
        expected.append(null.mean)
        stratified += null.low <= seen[-1] <= null.high
        plain += naive.low <= seen[-1] <= naive.high
        counts, below = intersection_null(sizes, a, b), convolved(list(zip(sizes, a, b, strict=True))).cumsum()
        exact.append(below[int(counts.high)] - below[int(counts.low) - 1])
    assert abs(stratified / REPEATS - np.mean(exact)) <= band(float(np.mean(exact)))
    assert np.mean(seen) == pytest.approx(np.mean(expected), abs=4 * np.std(np.subtract(seen, expected)) / REPEATS**0.5)
    assert plain == 0
    p = np.dot(sizes, densities) / sum(sizes)
    assert jaccard_chance(p, p) < 0.1 * np.mean(seen)


def test_impossible_counts_are_refused() -> None:
    for bad in ((10, 11, 3), (10, -1, 3), ([10, 5], [1], [1])):
        with pytest.raises(InputError, match="strata"):
            intersection_null(*bad)


def test_empty_masks_have_no_jaccard_index() -> None:
    assert np.isnan(jaccard_null(10, 0, 0)).all()
    assert jaccard_null(10, 0, 3) == (0, 0, 0)


def test_top_sets() -> None:
    null = top_set_null(500, 50)
    assert null.mean == pytest.approx(0.1 / 1.9, abs=1e-15)
    peer = stats.hypergeom(500, 50, 50)
    assert null.low == peer.ppf(0.05) / (100 - peer.ppf(0.05))
    assert null.high == peer.ppf(0.95) / (100 - peer.ppf(0.95))


def test_consensus_is_the_sum_over_all_outcomes() -> None:
    p = [0.3, 0.01, 0.9, 0.5]
    expected = np.zeros(5)
    for outcome in product((0, 1), repeat=4):
        expected[sum(outcome)] += np.prod([q if x else 1 - q for q, x in zip(p, outcome, strict=True)])
    np.testing.assert_allclose(consensus_chance(p), expected, rtol=1e-12)
    np.testing.assert_allclose(consensus_chance([0.2] * 6), stats.binom.pmf(range(7), 6, 0.2), rtol=1e-12)


def test_sign_agreement_covers_at_its_rate() -> None:
    rng = np.random.default_rng(4)
    n = 1000
    null = sign_agreement_null(n)
    shares = (rng.standard_normal((REPEATS, n)) * rng.standard_normal((REPEATS, n)) > 0).mean(axis=1)
    exact = stats.binom.cdf(round(null.high * n), n, 0.5) - stats.binom.cdf(round(null.low * n) - 1, n, 0.5)
    assert 0.90 <= exact < 0.92
    assert abs(((null.low <= shares) & (shares <= null.high)).mean() - exact) <= band(exact)
    assert sign_agreement_null(10**9).high == pytest.approx(0.5 + 1.6448536 * 0.5 / 10**4.5, abs=2e-9)
    assert np.isnan(sign_agreement_null(0)).all()


def test_line_chance() -> None:
    assert line_chance(0.125, 20) == pytest.approx(float(1 - Fraction(7, 8) ** 20), rel=1e-14)
    assert line_chance(1e-14, 10) == pytest.approx(1e-13, rel=1e-9)
    assert (line_chance(1.0, 3), line_chance(0.0, 3)) == (1.0, 0.0)


def random_cosines(rng: np.random.Generator, m: int, k: int, other: int) -> np.ndarray:
    first = np.linalg.qr(rng.standard_normal((m, k)))[0]
    second = np.linalg.qr(rng.standard_normal((m, other)))[0]
    return np.linalg.svd(first.T @ second, compute_uv=False)


@pytest.mark.parametrize(("m", "k", "other"), [(60, 5, 5), (30, 4, 9), (30, 9, 4), (12, 8, 8), (8, 1, 1)])
def test_subspace_null_is_that_of_random_subspaces(m: int, k: int, other: int) -> None:
    rng = np.random.default_rng(5)
    null = subspace_null(m, k, other)
    cosines = np.stack([random_cosines(rng, m, k, other) for _ in range(REPEATS)])
    overlaps = (cosines**2).sum(axis=1) / k
    assert null.mean == other / m
    assert overlaps.mean() == pytest.approx(null.mean, abs=4 * overlaps.std() / REPEATS**0.5)
    assert 0.84 <= ((null.low <= overlaps) & (overlaps <= null.high)).mean() <= 0.96  # both ends and draws are random
    error = 5 * cosines.std(axis=0) / REPEATS**0.5
    assert (np.abs(np.median(cosines, axis=0) - null.cosines) <= error + 1e-9).all()


def test_subspace_null_of_large_spaces_and_of_the_whole() -> None:
    null = subspace_null(100_000, 4, 4)
    assert null.low < 4 / 100_000 < null.high < 3 * 4 / 100_000
    np.testing.assert_allclose(subspace_null(6, 4, 5).cosines[:3], 1, atol=1e-9)  # 4 + 5 - 6 common dimensions
    whole = subspace_null(5, 5, 5)
    np.testing.assert_allclose([whole.mean, whole.low, whole.high, *whole.cosines], 1, atol=1e-9)
    assert subspace_null(50, 3, 3) is subspace_null(50, 3, 3)
    assert subspace_null(50, 3, 3, seed=1) != subspace_null(50, 3, 3)
    with pytest.raises(InputError, match="smaller k"):
        subspace_null(5, 6, 1)
