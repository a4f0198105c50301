"""What a second-order prediction leaves out along an update, and how far it holds. NumPy and SciPy only.

With L(t) an objective's value at theta + t d, the remainder is

    r(t) = L(t) - L(0) - c t - 1/2 A t^2 = k3 t^3 + k4 t^4 + ...        k3 = c3 / 6,  k4 = c4 / 24

and r(t) / t^3 is a polynomial that starts at k3. Two things are made of it. `fit` *predicts* r(1) from small t alone, because
what is scored at t = 1 must not enter its own prediction. `reach` *diagnoses*, from every t, where the prediction ceases to
hold. docs/math.md has the reasons.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from interference import statistics
from interference.statistics import Z

Array = NDArray[np.float64]

WINDOW = 0.5
"""Largest |t| whose evaluation may enter the prediction of r(1)."""

TOLERANCE = 0.10
"""Relative error at which the second-order prediction ceases to hold."""

LOW_ESS = 0.10
"""Share of the sequences below which an importance-weighted value judges nothing."""

REASONS = ("left", "held", "noise", "ess", "none")
_STEPS = 3000


@dataclass(frozen=True)
class Truncation:
    """Estimates of k3, k4 and r(1) = k3 + k4 (in the objective's unit, at t = 1), with bootstrap replicates (B, 3).

    `misfit` is what the choice of the order may cost: |k4|, the size of the last order that was fitted, for r(1); for k3, by
    how much it changes when k4 is left out of the fit. With one point k4 is NaN, r(1) = k3, and both are |k3|.
    """

    third: float
    fourth: float
    value: float
    third_misfit: float
    misfit: float
    replicates: Array = field(repr=False)

    @property
    def stderr(self) -> Array:
        """Standard errors of (third, fourth, value) over prompts."""
        return np.array([float(statistics.stderr(column)) for column in self.replicates.T])


def fit(alphas: Array, remainder: Array, replicates: Array) -> Truncation | None:
    """Weighted least squares of r(t) / t^3 on 1 and t (on 1 alone for a single point), over 0 < |t| <= WINDOW.

    Parameters
    ----------
    alphas (n,); remainder (n,), r at them; replicates (B, n), its bootstrap replicates. Points beyond WINDOW are not looked at.

    Returns None where no point is within. The weights are 1 / variance of r(t) / t^3 over the replicates.

    >>> t = np.array([0.25, 0.5, 1.0])
    >>> found = fit(t, 2 * t**3 - t**4, np.zeros((10, 3)))
    >>> round(found.third, 9), round(found.fourth, 9), round(found.value, 9)
    (2.0, -1.0, 1.0)
    """
    near = (np.abs(alphas) <= WINDOW) & (alphas != 0) & np.isfinite(remainder)
    if not near.any():
        return None
    t, scale = alphas[near], alphas[near] ** 3
    y, draws = remainder[near] / scale, replicates[:, near] / scale
    spread = np.nan_to_num(statistics.stderr(draws))
    largest = float(spread.max())
    weight = 1 / np.maximum(spread, 1e-3 * largest) if largest > 0 else np.ones_like(t)
    low = _solver(t, weight, 1)
    if len(np.unique(t)) < 2:
        third, drawn = float((low @ y)[0]), draws @ low[0]
        none = np.full_like(drawn, np.nan)
        return Truncation(third, np.nan, third, abs(third), abs(third), np.stack([drawn, none, drawn], axis=1))
    solver = _solver(t, weight, 2)
    (third, fourth), both = (solver @ y).tolist(), draws @ solver.T
    misfit = abs(third - float((low @ y)[0]))
    columns = np.stack([both[:, 0], both[:, 1], both.sum(1)], axis=1)
    return Truncation(third, fourth, third + fourth, misfit, abs(fourth), columns)


def _solver(t: Array, weight: Array, terms: int) -> Array:
    """The matrix (terms, n) that takes r(t) / t^3 to the weighted least-squares coefficients of 1, t, ..."""
    design = np.vander(t, terms, increasing=True)
    return np.asarray(np.linalg.pinv(weight[:, None] * design) * weight)


def widened(centre: Array, remainder: Array, misfit: float, *, second: bool = True) -> tuple[float, float]:
    """A 90 % interval that holds sampling noise and truncation, from paired bootstrap replicates.

    centre (B,): a second-order prediction (or measured minus predicted, with `remainder` negated); remainder (B,): the
    predicted r(1). In each replicate the change may lie in centre + remainder +- misfit, and with `second` anywhere between
    that and the centre itself; the interval goes from the 5 % quantile of the lower ends to the 95 % quantile of the upper.

    >>> widened(np.zeros(100), np.full(100, 2.0), 0.5)
    (0.0, 2.5)
    >>> widened(np.zeros(100), np.full(100, 2.0), 0.5, second=False)
    (1.5, 2.5)
    """
    low, high = centre + remainder - misfit, centre + remainder + misfit
    if second:
        low, high = np.minimum(low, centre), np.maximum(high, centre)
    return statistics.interval(low)[0], statistics.interval(high)[1]


class Reach(NamedTuple):
    """How far a second-order prediction holds along an update.

    radius: the smallest t > 0 at which it is seen not to hold; the largest t tried where it holds throughout (a lower bound,
    reason "held"); NaN where it cannot be judged (reasons "noise", "ess", "none"). reason: one of REASONS. judged: the t up to
    which noise and effective samples allow a judgement; where it is below a radius that was "left", noise hides where between
    the two the prediction ceases to hold. beyond: is t = 1 beyond the radius? True where it was left below 1, also when the
    error is small again at 1; None when that cannot be judged.
    """

    radius: float
    reason: str
    judged: float
    beyond: bool | None


def reach(
    alphas: Array,
    remainder: Array,
    stderr: Array,
    slope: float,
    curvature: float,
    usable: NDArray[np.bool_] | None = None,
    tolerance: float = TOLERANCE,
) -> Reach:
    """Where |r(t)| first exceeds both `tolerance` times the change and its own 90 % noise, for 0 < t <= the largest alpha.

    The change is that of the objective, c t + 1/2 A t^2 + r(t), and counts with the largest size that it has had up to t: where
    it passes through zero on its way, the relative error is unbounded however good the prediction is. Between the evaluated
    points r(t) / t^3 is interpolated (monotone cubic; below the first, the line through the first two), and so is the noise.

    Parameters
    ----------
    alphas (n,); remainder, stderr (n,): r there and its standard error, paired over prompts. slope c, curvature A.
    usable (n,): false where there are too few effective samples; nothing is judged from the first such alpha on.

    >>> t = np.array([0.25, 0.5, 1.0, 2.0])
    >>> found = reach(t, 0.4 * t**3, 0 * t, 1.0, 0.0)  # 0.4 t^2 / (1 + 0.4 t^2) = 0.1 at t = 0.527
    >>> round(found.radius, 3), found.reason, found.beyond
    (0.527, 'left', True)
    """
    ahead = np.flatnonzero((alphas > 0) & np.isfinite(remainder))
    ahead = ahead[np.argsort(alphas[ahead])]
    starved = np.zeros(0, int) if usable is None else np.flatnonzero(~usable[ahead])
    kept = ahead[: starved[0]] if len(starved) else ahead
    if not len(kept):
        return Reach(np.nan, "ess" if len(ahead) else "none", 0.0, None)
    t, r = alphas[kept], remainder[kept]
    grid = np.linspace(0, t[-1], _STEPS + 1)[1:]
    error = np.abs(_between(t, r / t**3, grid) * grid**3)
    noise = Z * np.interp(grid, t, np.nan_to_num(stderr[kept], nan=np.inf) / t**3) * grid**3
    change = np.abs(slope * grid + 0.5 * curvature * grid**2 + _between(t, r / t**3, grid) * grid**3)
    allowed = tolerance * np.maximum.accumulate(change)
    excess = error - np.maximum(allowed, noise)
    unsure = (np.maximum(error, noise) > allowed) & (excess <= 0)
    judged = float(t[-1]) if not unsure.any() else float(grid[np.argmax(unsure)] - grid[0])
    left = _crossing(grid, excess) if (excess > 0).any() else np.inf
    beyond = True if left < 1 else False if judged >= 1 else None
    if np.isfinite(left):
        return Reach(left, "left", judged, beyond)
    if unsure.any():
        return Reach(np.nan, "noise", judged, beyond)
    return Reach(np.nan, "ess", judged, beyond) if len(starved) else Reach(float(t[-1]), "held", judged, beyond)


def _between(t: Array, y: Array, grid: Array) -> Array:
    if len(t) == 1:
        return np.full_like(grid, y[0])
    out = np.asarray(PchipInterpolator(t, y)(grid))
    line = y[0] + (y[1] - y[0]) / (t[1] - t[0]) * (grid - t[0])
    return np.where(grid < t[0], line, out)


def _crossing(grid: Array, excess: Array) -> float:
    """The first zero of `excess`, linear between the two points of the grid that enclose it."""
    i = int(np.argmax(excess > 0))
    if i == 0:
        return float(grid[0])
    below, above = -excess[i - 1], excess[i]
    return float(grid[i - 1] + (grid[i] - grid[i - 1]) * below / (below + above))
