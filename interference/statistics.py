"""Bootstrap over prompts, and the scores of a forecast. NumPy and SciPy only.

Prompts are the sampling unit: responses to one prompt are not independent. The bootstrap is the Poisson bootstrap with a
random stream per prompt, keyed by (seed, prompt id): a prompt has the same weight in replicate b wherever it occurs, so
differences between any two quantities on the same prompts are paired without further ado.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
REPLICATES = 1000
LEVEL = 0.90
Z = float(stats.norm.ppf(0.5 + LEVEL / 2))


@lru_cache(maxsize=65536)
def _weights(prompt_id: str, seed: int, replicates: int) -> NDArray[np.uint8]:
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{prompt_id}".encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key)).poisson(1.0, replicates).astype(np.uint8)


def prompt_weights(prompt_ids: Sequence[str], seed: int = 0, replicates: int = REPLICATES) -> Array:
    """Poisson(1) weights (replicates, P); the column of a prompt depends on its id and the seed alone.

    >>> a, b = prompt_weights(["x", "y"]), prompt_weights(["y"])
    >>> bool((a[:, 1] == b[:, 0]).all())
    True
    """
    columns = [_weights(prompt_id, seed, replicates) for prompt_id in prompt_ids]
    return np.stack(columns, axis=1).astype(np.float64)


def ratio_replicates(numerator: Array, denominator: Array, prompt_ids: Sequence[str], seed: int = 0) -> Array:
    """Bootstrap replicates of sum_p numerator_p / sum_p denominator_p.

    Parameters
    ----------
    numerator (P, ...), denominator (P,) : per-prompt sums; prompt_ids : P ids, one per row.

    Returns
    -------
    (replicates, ...); with a single prompt all NaN, since one prompt says nothing about the spread between prompts.
    """
    if len(prompt_ids) < 2:
        return np.full((REPLICATES, *numerator.shape[1:]), np.nan)
    weights = prompt_weights(prompt_ids, seed)
    total = weights @ denominator
    flat = weights @ numerator.reshape(len(prompt_ids), -1)
    flat = np.where(total[:, None] > 0, flat / np.where(total > 0, total, 1.0)[:, None], np.nan)
    return flat.reshape(len(weights), *numerator.shape[1:])


def stderr(replicates: Array) -> Array:
    """Standard deviation over the replicates (axis 0), ignoring replicates that drew no prompt."""
    drawn = replicates[np.isfinite(replicates).reshape(len(replicates), -1).all(axis=1)]
    return np.std(drawn, axis=0, ddof=1) if len(drawn) > 1 else np.full(replicates.shape[1:], np.nan)


def interval(replicates: Array, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of one-dimensional replicates."""
    drawn = replicates[np.isfinite(replicates)]
    if len(drawn) < 2:
        return float("nan"), float("nan")
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def group_sums(values: Array, groups: Sequence[str]) -> tuple[list[str], Array]:
    """Sum rows of equal group; groups in order of first appearance.

    >>> group_sums(np.array([1.0, 2.0, 3.0]), ["b", "a", "b"])
    (['b', 'a'], array([4., 2.]))
    """
    order = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    out = np.zeros((len(order), *values.shape[1:]))
    np.add.at(out, [order[g] for g in groups], values)
    return list(order), out


def effective_sample_size(log_weights: Array) -> float:
    """(sum w)^2 / sum w^2 of importance weights w = exp(log_weights).

    >>> round(effective_sample_size(np.zeros(5)), 12)
    5.0
    """
    w = np.exp(log_weights - log_weights.max())
    return float(w.sum() ** 2 / (w**2).sum())


def effective_share(log_weights: Array, stands: Array) -> float:
    """Effective share of a population of importance weights, of which each of these stands for so many.

    (sum c w)^2 / (sum c w^2 sum c)

    >>> effective_share(np.log([1.0, 3.0]), np.array([2.0, 1.0])) == effective_sample_size(np.log([1.0, 1.0, 3.0])) / 3
    True
    """
    w = np.exp(log_weights - log_weights.max())
    return float((stands @ w) ** 2 / (stands @ w**2 * stands.sum()))


def leave_one_out_line(x: Array, y: Array) -> tuple[Array, Array]:
    """For each point, the least-squares line through the *other* points: its value there and its 90 % half-width.

    The fairest use of a predictor without units (a norm, a cosine): it is given a slope and an intercept that it does not
    have, from the other cells of the same experiment.
    """
    n = len(x)
    fitted, half = np.full(n, np.nan), np.full(n, np.nan)
    for i in range(n):
        xs, ys = np.delete(x, i), np.delete(y, i)
        if n < 5:
            continue
        spread = float(((xs - xs.mean()) ** 2).sum())
        slope = float(((xs - xs.mean()) * ys).sum() / spread) if spread > 0 else 0.0
        fitted[i] = ys.mean() + slope * (x[i] - xs.mean())
        freedom = n - 1 - (2 if spread > 0 else 1)
        error = ys - ys.mean() - slope * (xs - xs.mean())
        lever = 1 + 1 / (n - 1) + ((x[i] - xs.mean()) ** 2 / spread if spread > 0 else 0.0)
        half[i] = stats.t.ppf(0.5 + LEVEL / 2, freedom) * np.sqrt((error**2).sum() / freedom * lever)
    return fitted, half


def correlation(kind: Callable[..., object], x: Array, y: Array) -> float:
    """Spearman or Pearson correlation; NaN where it is not defined (under three points, or one side constant)."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(kind(x, y).statistic)  # type: ignore[attr-defined]
