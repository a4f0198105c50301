"""Spectra of updates and of the weights before and after, and masks that the base's weights define."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from interference.errors import InputError
from interference.geometry.nulls import intersection_null
from interference.geometry.subspaces import Method, Subspaces, principal_cosines, top_subspaces
from interference.tree import Change, LowRank


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values of a matrix, largest first, float64, and what follows from them.

    values: all min(m, n) of them (min(m, n, r) of factors) when exact, the leading k when randomized. rank and rank_ratio are
    NaN when randomized. error bounds the error of every value; 0.0 for a singular value decomposition.
    """

    values: Tensor
    frobenius_norm: float
    spectral_norm: float
    stable_rank: float
    rank: float
    rank_ratio: float
    method: Literal["exact", "randomized"]
    error: float


def spectrum(
    change: Change, k: int, method: Method = "svd", *, seed: int = 0, precision: torch.dtype = torch.float32
) -> Spectrum:
    """The spectrum of a matrix or its factors; `method` and `seed` as in `subspaces.top_subspaces`.

    "gram" counts as exact: its values are off by at most sqrt(min(m, n) eps) sigma_1 (the error told), far less for the large
    ones. precision: of the tolerance under which a singular value counts as zero, see `numerical_rank`.

    Raises InputError as `top_subspaces`.
    """
    if method == "randomized" and not isinstance(change, LowRank):
        found = top_subspaces(change, k, method, seed=seed)
        frobenius = float(torch.linalg.vector_norm(change, dtype=torch.float64))
        values, rank, error = found.values, float("nan"), found.error
    else:
        values = singular_values(change, method)
        frobenius = float(values.norm())
        rank = float(numerical_rank(values, change.shape, precision))
        largest = float(values.max()) if len(values) else 0.0
        gram = method == "gram" and not isinstance(change, LowRank)
        error = (min(change.shape) * torch.finfo(torch.float64).eps) ** 0.5 * largest if gram else 0.0
    spectral = float(values.max()) if len(values) else 0.0
    return Spectrum(
        values=values,
        frobenius_norm=frobenius,
        spectral_norm=spectral,
        stable_rank=stable_rank(frobenius, spectral),
        rank=rank,
        rank_ratio=rank / min(change.shape),
        method="randomized" if math.isnan(rank) else "exact",
        error=error,
    )


def singular_values(change: Change, method: Method = "svd") -> Tensor:
    """All singular values in float64, largest first; of factors (min(m, n, r) of them) without forming the matrix.

    "gram" takes the roots of the eigenvalues of the smaller A'A or AA': faster, but values under 1e-8 sigma_1 are noise.
    """
    if len(change.shape) != 2 or (method == "randomized" and not isinstance(change, LowRank)):
        raise InputError(
            got=f"a tensor of shape {tuple(change.shape)} and method {method!r}",
            expected="a matrix and an exact method, svd or gram",
            remedy="use `top_subspaces` for the leading values of a large matrix",
        )
    values: Tensor
    if isinstance(change, LowRank):
        r_up, r_down = torch.linalg.qr(change.up.double())[1], torch.linalg.qr(change.down.double().mT)[1]
        values = torch.linalg.svdvals(r_up @ r_down.mT)
    elif method == "gram":
        matrix = change.double() if change.shape[0] >= change.shape[1] else change.double().mT
        values = torch.linalg.eigvalsh(matrix.mT @ matrix).clamp(min=0).sqrt().flip(0)
    else:
        values = torch.linalg.svdvals(change.double())
    return values


def stable_rank(frobenius_norm: float, spectral_norm: float) -> float:
    """|A|_F^2 / |A|_2^2, between 1 and the rank; NaN for a zero matrix.

    >>> stable_rank(2.0, 1.0)
    4.0
    """
    return (frobenius_norm / spectral_norm) ** 2 if spectral_norm else float("nan")


def numerical_rank(values: Tensor, shape: tuple[int, ...], precision: torch.dtype = torch.float32) -> int:
    """Singular values above max(m, n) eps sigma_1, the tolerance of torch.linalg.matrix_rank for a matrix of that dtype.

    Updates are float32, as in arXiv 2505.11711, whose update rank is this over min(m, n); hence float32's eps by default.
    """
    return int((values > max(shape) * torch.finfo(precision).eps * values.max()).sum()) if len(values) else 0


def normalized_spectral_shift(before: Tensor, after: Tensor) -> float:
    """NSS = |sigma(W+) - sigma(W0)|_2 / |sigma(W0)|_2, of all singular values, largest first (arXiv 2511.08567)."""
    if before.shape != after.shape:
        raise InputError(
            got=f"{len(before)} and {len(after)} singular values",
            expected="all singular values of two matrices of one shape",
            remedy="compute both by the same method",
        )
    scale = float(before.double().norm())
    return float((after.double() - before.double()).norm()) / scale if scale else float("nan")


def rotation(before: Subspaces, after: Subspaces) -> tuple[float, float]:
    """Mean cosine of the principal angles between the leading subspaces before and after: (left, right).

    The cosines sigma_i(U0' U+) and sigma_i(V0' V+) are those of arXiv 2511.08567; 1 where nothing turned.
    """
    left, right = (principal_cosines(a, b) for a, b in ((before.left, after.left), (before.right, after.right)))
    return float(left.mean()), float(right.mean())


def principal_mask(weights: Subspaces, alpha: float, seed: int = 0) -> Tensor:
    """The round(alpha mn) largest entries of |U S V'|, the base's leading part (arXiv 2511.08567): bool (m, n)."""
    leading = (weights.left * weights.values) @ weights.right.mT
    return _extreme(leading.abs(), alpha, seed, largest=True)


def low_magnitude_mask(weight: Tensor, alpha: float, seed: int = 0) -> Tensor:
    """The round(alpha n) entries of smallest |W0| (arXiv 2511.08567): bool, of the weight's shape.

    bf16 weights have many equal magnitudes. Among those tied at the threshold the seed draws which are in, so that the mask
    has exactly that many entries and prefers no place in the matrix.
    """
    return _extreme(weight.abs(), alpha, seed, largest=False)


def _extreme(magnitude: Tensor, alpha: float, seed: int, *, largest: bool) -> Tensor:
    if not 0 <= alpha <= 1:
        raise InputError(got=f"alpha = {alpha}", expected="a share between 0 and 1", remedy="use 0.1 for a tenth")
    flat = magnitude.reshape(-1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    count = round(alpha * flat.numel())
    if not count:
        return torch.zeros_like(magnitude, dtype=torch.bool)
    threshold = torch.kthvalue(flat, flat.numel() - count + 1 if largest else count).values
    mask = flat > threshold if largest else flat < threshold
    tied = (flat == threshold).nonzero().reshape(-1)
    order = torch.randperm(len(tied), generator=torch.Generator().manual_seed(seed))
    mask[tied[order[: count - int(mask.sum())]]] = True
    return mask.reshape(magnitude.shape)


@dataclass(frozen=True)
class MaskOverlap:
    """|reference & changed| / |changed|, the share alpha expected by chance, and the 90 % interval of masks at random."""

    value: float
    chance: float
    low: float
    high: float


def mask_overlap(reference: Tensor, changed: Tensor) -> MaskOverlap:
    """Share of the changed entries that are in the reference mask (arXiv 2511.08567); NaN when nothing changed.

    Chance is the reference's density alpha; the interval is that of the hypergeometric.

    Raises InputError for masks of other shapes or that are not boolean.
    """
    if reference.shape != changed.shape or reference.dtype != torch.bool or changed.dtype != torch.bool:
        raise InputError(
            got=f"masks {reference.dtype} {tuple(reference.shape)} and {changed.dtype} {tuple(changed.shape)}",
            expected="two boolean masks of one shape",
            remedy="compare masks of one tensor",
        )
    total = int(changed.sum())
    chance = intersection_null(changed.numel(), int(reference.sum()), total).share(total)
    value = int((reference & changed).sum()) / total if total else float("nan")
    return MaskOverlap(value, *chance)
