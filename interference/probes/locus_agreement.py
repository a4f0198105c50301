"""How well a judge's loci agree with the true steps, beside its loci of other trajectories and the best constant step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from interference import statistics
from interference.errors import InputError

Array = NDArray[np.float64]


def locus_scores(
    found: Sequence[int | None], truth: Sequence[int], steps: Sequence[int], prompt_ids: Sequence[str], seed: int = 0
) -> pd.DataFrame:
    """How well loci agree with the true steps, beside chance: the judge's own loci, given to other prompts' trajectories.

    located: share of trajectories with a locus; exact: locus = truth; within_1: at most one step away (both count a missing
    locus as a miss); distance: mean |locus - truth| over located trajectories; difference: the same of locus - truth, above 0
    where the judge sees the error late.

    chance: the mean over all pairs of a trajectory with the locus of another prompt's of equally many steps; where no other
    prompt has as many, of any other prompt, at the same relative place (first to first, last to last). It is what a permutation
    of the loci gives on average, so a judge that ignores the response, such as one that always says step 1, is not above it.
    located and difference have none: a permutation leaves them as they are.
    constant: the value of the best constant step (clipped to the steps there are), chosen on these very truths.

    Returns:
        One row per metric: value, low, high, chance, above_chance (value - chance), above_low, above_high, constant,
        trajectories. Intervals: 90 %, bootstrap over prompts; the chance is computed anew in each replicate.

    Raises InputError for lists of different lengths, empty lists, and steps that a trajectory does not have.
    """
    _check(found, truth, steps, prompt_ids)
    locus, true, size = (np.array([np.nan if x is None else float(x) for x in xs]) for xs in (found, truth, steps))
    ids = list(dict.fromkeys(prompt_ids))
    place = np.array([ids.index(name) for name in prompt_ids])
    donors, moved = _moved(locus, size, place)
    own = np.ones((1, len(true)))
    draws = (
        statistics.prompt_weights(ids, seed)[:, place]
        if len(ids) > 1
        else np.full((statistics.REPLICATES, len(true)), np.nan)
    )
    best = _constants(true, size)
    rows = []
    for metric in ("located", "exact", "within_1", "distance", "difference"):
        of = np.isfinite(locus).astype(float) if metric in ("distance", "difference") else np.ones(len(true))
        hits, spread = _measure(metric, locus, true), _measure(metric, moved, true[:, None])
        offered = np.isfinite(moved).astype(float) if metric in ("distance", "difference") else np.ones(moved.shape)
        value, values = (_divide(w @ hits, w @ of) for w in (own, draws))
        chance, chances = (_chance(w, donors, spread, offered) for w in (own, draws))
        if metric in ("located", "difference"):  # a permutation changes neither the number of loci nor their mean
            chance, chances = chance * np.nan, chances * np.nan
        (low, high), (above_low, above_high) = statistics.interval(values), statistics.interval(values - chances)
        rows.append(
            {
                "metric": metric, "value": float(value[0]), "low": low, "high": high, "chance": float(chance[0]),
                "above_chance": float(value[0] - chance[0]), "above_low": above_low, "above_high": above_high,
                "constant": best.get(metric, float("nan")), "trajectories": int(of.sum()),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _check(found: Sequence[int | None], truth: Sequence[int], steps: Sequence[int], prompt_ids: Sequence[str]) -> None:
    sizes = {len(found), len(truth), len(steps), len(prompt_ids)}
    if len(sizes) != 1 or not truth:
        raise InputError(
            got=f"{len(found)} loci, {len(truth)} true steps, {len(steps)} lengths, {len(prompt_ids)} prompt ids",
            expected="one of each for every wrong trajectory, and at least one",
            remedy="give lists of one length",
        )
    for step, count in [
        *((f, k) for f, k in zip(found, steps, strict=True) if f is not None),
        *zip(truth, steps, strict=True),
    ]:
        if not 1 <= step <= count:
            raise InputError(
                got=f"step {step} of a trajectory with {count} steps",
                expected="a step from 1 to the number of steps",
                remedy="use the same `separator` for the steps of loci and truth",
            )


def _moved(locus: Array, size: Array, place: NDArray[np.int64]) -> tuple[Array, Array]:
    """(N, N): whether j's locus may be given to i (0 or 1), and the step that it then is in i; NaN where j has none."""
    other = place[:, None] != place[None, :]
    alike = other & (size[:, None] == size[None, :])
    lonely = ~alike.any(axis=1)
    relative = (locus - 1) / np.maximum(size - 1, 1)
    scaled = 1 + np.floor(relative[None, :] * (size[:, None] - 1) + 0.5)
    return np.where(lonely[:, None], other, alike).astype(float), np.where(lonely[:, None], scaled, locus[None, :])


def _measure(metric: str, locus: Array, true: Array) -> Array:
    """Of loci, NaN where there is none, which counts 0."""
    late = locus - true
    with np.errstate(invalid="ignore"):
        values = {
            "located": np.isfinite(late), "exact": late == 0, "within_1": np.abs(late) <= 1, "distance": np.abs(late),
            "difference": late,
        }[metric]  # fmt: skip
    return np.asarray(np.nan_to_num(np.asarray(values, dtype=float)))


def _chance(weights: Array, donors: Array, spread: Array, offered: Array) -> Array:
    """For every row of weights (B, N): mean over trajectories of the mean over donors; both weigh as often as they are drawn.

    A trajectory none of whose donors was drawn takes all of them.
    """
    drawn = weights @ donors.T
    top, below = (
        np.where(
            drawn > 0,
            (weights @ (donors * x).T) / np.where(drawn > 0, drawn, 1.0),
            _divide((donors * x).sum(1), donors.sum(1)),
        )
        for x in (spread, offered)
    )
    return _divide((weights * top).sum(1), (weights * below).sum(1))


def _constants(true: Array, size: Array) -> dict[str, float]:
    steps = np.minimum(np.arange(1, size.max() + 1)[:, None], size[None, :])
    means = {m: _measure(m, steps, true[None, :]).mean(1) for m in ("exact", "within_1", "distance")}
    return {m: float(values.min() if m == "distance" else values.max()) for m, values in means.items()}


def _divide(a: Array, b: Array) -> Array:
    return np.where(b > 0, a / np.where(b > 0, b, 1.0), np.nan)
