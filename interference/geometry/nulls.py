"""What chance alone would give, for every measure of geometry: expected values and central 90 % intervals.

An interval is equal-tailed: from the smallest value whose distribution function reaches 0.05 to the smallest that reaches 0.95.
A discrete statistic lies in it with probability at least 0.90, and more where single values are likely.

Every null takes coordinates as exchangeable and independent. Real updates are neither, so "outside the interval" says that
the overlap is not that of masks (signs, subspaces) thrown at random; it does not say why.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from interference.errors import InputError
from interference.statistics import LEVEL, Array, Z

EXACT_VARIANCE = 1e4
"""Up to this variance an intersection's distribution is computed exactly, above it by the normal with continuity correction,
whose quantiles are then off by less than half a count beside a standard deviation of a hundred."""
DRAWS = 1000
_TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


class Chance(NamedTuple):
    """Value expected by chance, and the ends of its central 90 % interval."""

    mean: float
    low: float
    high: float


class Intersection(NamedTuple):
    """Size of the intersection of two random masks: mean, variance and central 90 % interval."""

    mean: float
    variance: float
    low: float
    high: float

    def jaccard(self, first: float, second: float) -> Chance:
        """Of masks with `first` and `second` entries: the Jaccard index at the mean and at the ends, in which it is monotone."""
        ends = [jaccard(x, first, second) for x in (self.mean, self.low, self.high)]
        return Chance(*ends)

    def share(self, total: float) -> Chance:
        """As a share of one mask with `total` entries; NaN for an empty one."""
        return Chance(*(x / total if total else float("nan") for x in (self.mean, self.low, self.high)))


class SubspaceChance(NamedTuple):
    """Overlap of random subspaces: mean, central 90 % interval, and the median of each principal cosine, largest first."""

    mean: float
    low: float
    high: float
    cosines: tuple[float, ...]


def jaccard(both: float, first: float, second: float) -> float:
    """|A & B| / |A | B| from the three counts; NaN for two empty sets.

    >>> jaccard(1, 2, 3)
    0.25
    """
    union = first + second - both
    return both / union if union else float("nan")


def jaccard_chance(p: float, q: float) -> float:
    """pq / (p + q - pq), the Jaccard index of large independent masks of densities p and q (arXiv 2511.08567).

    >>> round(jaccard_chance(0.3, 0.3), 3)
    0.176
    """
    _check_shares([p, q])
    return jaccard(p * q, p, q)


def intersection_null(size: ArrayLike, first: ArrayLike, second: ArrayLike) -> Intersection:
    """Intersection of two masks with fixed counts within each stratum, placed at random there (a permutation null).

    The intersection is a sum of independent hypergeometrics, one per stratum of `size` n with `first` a and `second` b entries:
    mean sum ab/n, variance sum ab(n-a)(n-b)/(n^2(n-1)). The interval comes from the exact distribution (hypergeometric, and the
    convolution of several) where the variance is at most EXACT_VARIANCE, else from the normal with continuity correction.

    Args: size, first, second: (strata,) counts, or one number each for a single stratum.

    Raises InputError for counts that are negative or larger than their stratum.

    >>> intersection_null(10, 5, 4)[:2]
    (2.0, 0.6666666666666666)
    """
    n, a, b = (np.atleast_1d(np.asarray(x, dtype=np.float64)) for x in (size, first, second))
    if not (n.shape == a.shape == b.shape) or not np.all((a >= 0) & (b >= 0) & (a <= n) & (b <= n)):
        raise InputError(
            got=f"strata of sizes {_few(n)} with counts {_few(a)} and {_few(b)}",
            expected="for each stratum two counts between 0 and its size",
            remedy="count both masks over the same tensors",
        )
    n, a, b = (x[n > 0] for x in (n, a, b))
    means = a * b / n
    variances = means * (n - a) * (n - b) / (n * np.maximum(n - 1, 1))
    mean, variance = float(means.sum()), float(variances.sum())
    random = variances > 0
    if variance <= EXACT_VARIANCE:
        fixed = float(means[~random].sum())
        low, high = (fixed + x for x in _exact_quantiles(n[random], a[random], b[random]))
    else:
        spread = Z * variance**0.5
        low, high = (float(np.ceil(mean + x - 0.5)) for x in (-spread, spread))
    return Intersection(mean, variance, round(low), round(high))


def _exact_quantiles(n: Array, a: Array, b: Array) -> tuple[float, float]:
    start, mass = 0.0, np.ones(1)
    for stratum in zip(n.tolist(), a.tolist(), b.tolist(), strict=True):
        smallest, own = _hypergeometric(*stratum)
        mass = np.convolve(mass, own)
        kept = np.flatnonzero(mass > 1e-18)
        start += smallest + kept[0]
        mass = mass[kept[0] : kept[-1] + 1]
    below = np.cumsum(mass / mass.sum())
    # The smallest value whose distribution function reaches the level; the slack is for the rounding of the sum.
    low, high = (int(np.argmax(below >= level - 1e-12)) for level in _TAILS)
    return start + low, start + high


def _hypergeometric(n: float, a: float, b: float) -> tuple[float, Array]:
    """The smallest value of a window of at least ten standard deviations around the mean, and the probabilities from there.

    By the ratio of neighbours, p(x+1)/p(x) = (a-x)(b-x) / ((x+1)(n-a-b+x+1)), which loses no digits however large n is.
    """
    mean = a * b / n
    reach = 10 * (mean * (n - a) * (n - b) / (n * max(n - 1, 1))) ** 0.5 + 30
    low, high = max(0.0, a + b - n, np.floor(mean - reach)), min(a, b, np.ceil(mean + reach))
    x = np.arange(low, high)
    steps = np.log((a - x) * (b - x)) - np.log((x + 1) * (n - a - b + x + 1))
    logs = np.concatenate([[0.0], np.cumsum(steps)])
    mass = np.exp(logs - logs.max())
    return float(low), mass / mass.sum()


def jaccard_null(size: ArrayLike, first: ArrayLike, second: ArrayLike) -> Chance:
    """Jaccard index of two masks with fixed counts within each stratum, placed at random there; see `intersection_null`.

    `mean` is the index at the mean intersection, which for one stratum is `jaccard_chance` of the densities.
    """
    return intersection_null(size, first, second).jaccard(float(np.sum(first)), float(np.sum(second)))


def top_set_null(units: int, count: int) -> Chance:
    """Jaccard index of two random sets of `count` among `units`: q/(2-q) with q = count/units, and its interval.

    >>> round(top_set_null(1000, 100).mean, 3)
    0.053
    """
    return jaccard_null(units, count, count)


def consensus_chance(densities: Sequence[float]) -> Array:
    """Probabilities (N+1,) that 0..N of N independent masks with these densities hold a coordinate (Poisson binomial).

    >>> consensus_chance([0.5, 0.5]).tolist()
    [0.25, 0.5, 0.25]
    """
    _check_shares(densities)
    mass = np.ones(1)
    for p in densities:
        mass = np.convolve(mass, [1 - p, p])
    return mass


def sign_agreement_null(count: int) -> Chance:
    """Share of `count` coordinates whose signs agree when each is a fair coin: 1/2 with the binomial interval."""
    if count <= 0:
        return Chance(float("nan"), float("nan"), float("nan"))
    low, high = (float(x) / count for x in stats.binom.ppf(_TAILS, count, 0.5))
    return Chance(0.5, low, high)


def line_chance(density: float, length: int) -> float:
    """Probability 1 - (1-p)^c that a row (column) of c entries has a changed one, for a random mask of density p.

    >>> line_chance(0.5, 2)
    0.75
    """
    _check_shares([density])
    return 1.0 if density >= 1 else float(-np.expm1(length * np.log1p(-density)))


@lru_cache(maxsize=4096)
def subspace_null(m: int, k: int, other: int, draws: int = DRAWS, seed: int = 0) -> SubspaceChance:
    """Overlap |U'V|_F^2 / k of random k- and `other`-dimensional subspaces of R^m: mean other/m, the rest by simulation.

    The squared singular values of U'V are distributed as the eigenvalues of (W1+W2)^-1 W1 with Wishart matrices W1 and W2 of
    the smaller dimension and larger, m - larger degrees of freedom (the Jacobi ensemble), so that a draw costs nothing that
    grows with m. Seeded by the arguments and kept, so equal arguments give equal numbers.

    Raises InputError unless 1 <= k, other <= m.

    >>> subspace_null(100, 10, 10).mean
    0.1
    """
    if not (1 <= k <= m and 1 <= other <= m):
        raise InputError(
            got=f"subspaces of {k} and {other} dimensions in a space of {m}",
            expected="between one dimension and all of the space",
            remedy="choose a smaller k",
        )
    small, large = sorted((k, other))
    rng = np.random.default_rng([seed, m, small, large])
    inside, outside = _wishart_factors(rng, draws, small, large), _wishart_factors(rng, draws, small, m - large)
    total = inside @ inside.transpose(0, 2, 1) + outside @ outside.transpose(0, 2, 1)
    cosines = np.linalg.svd(np.linalg.solve(np.linalg.cholesky(total), inside), compute_uv=False).clip(0.0, 1.0)
    low, high = np.quantile((cosines**2).sum(axis=1) / k, _TAILS)
    return SubspaceChance(other / m, float(low), float(high), tuple(np.median(cosines, axis=0).tolist()))


def _wishart_factors(rng: np.random.Generator, draws: int, k: int, freedom: int) -> Array:
    """Factors F (draws, k, .) of Wishart matrices FF': Bartlett's triangle, or the Gaussians themselves when they are fewer."""
    if freedom < k:
        return rng.standard_normal((draws, k, freedom))
    lower = np.tril(rng.standard_normal((draws, k, k)), -1)
    index = np.arange(k)
    lower[:, index, index] = np.sqrt(rng.chisquare(freedom - index, (draws, k)))
    return lower


def _few(values: Array) -> str:
    return f"{values.reshape(-1)[:4].tolist()}" + (f" ... ({values.size})" if values.size > 4 else "")


def _check_shares(shares: Sequence[float]) -> None:
    if not all(0 <= p <= 1 for p in shares):
        raise InputError(
            got=f"densities {list(shares)}", expected="shares between 0 and 1", remedy="divide counts by the size"
        )
