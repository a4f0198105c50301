"""Leading singular subspaces of a matrix update, exact or randomized, and the angles between subspaces.

Halko, Martinsson and Tropp 2011 ("Finding structure with randomness") is the randomized method and its error estimate.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from interference.errors import InputError
from interference.tree import Change, LowRank

Method = Literal["svd", "gram", "randomized"]
OVERSAMPLING = 10
POWER_ITERATIONS = 2
PROBES, FACTOR = 20, 2  # the error estimate is too small with probability FACTOR ** -PROBES


class Subspaces(NamedTuple):
    """Leading singular triplets: left (m, k), values (k,), right (n, k), in float64, with orthonormal columns.

    error: bound on the error of every value; 0.0 when exact, see `top_subspaces`. error_ratio: the same over sigma_{k+1} (as
    far as the method saw it), NaN where that is not known or zero.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    error: float
    error_ratio: float


def top_subspaces(
    change: Change, k: int, method: Method = "svd", *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Subspaces:
    """The k leading left and right singular subspaces of a matrix (m, n).

    Fewer than k columns come back when the matrix has fewer singular values above the rounding errors of the method: the
    further directions would be arbitrary. A zero matrix has none.

    Args:
        change: a matrix, or its factors, which are decomposed exactly through their QR without forming the matrix.
        method: "svd", float64, exact to rounding. "gram", from the eigenvectors of the smaller A'A or AA' in float64, several
            times faster: values are off by at most min(m, n) eps sigma_1^2 / sigma_k (the error told), so those under about 1e-6
            sigma_1 are lost, and the angle of the subspaces is off by about eps sigma_1^2 / (sigma_k^2 - sigma_{k+1}^2).
            "randomized" (Halko 2011, algorithms 4.4 and 5.1; oversampling 10, two power iterations): a basis Q of k + 10
            columns; the error is 2 sqrt(2/pi) max_i |(A - QQ'A) w_i| over twenty Gaussian probes w_i, at least
            |A - QQ'A|_2 with probability 1 - 1e-6 (lemma 4.1, eq. 4.3), and hence a bound on the error of every value. It
            is nearer to the Frobenius norm of what is missed, so for a flat spectrum the values are far better than it says.
        seed: of the randomized method.
        dtype: in which the randomized method multiplies by the matrix.

    Raises InputError for something that is not a matrix, an unknown method, or k outside 1 .. min(m, n).
    """
    _check(change, k, method)
    if isinstance(change, LowRank):
        return _cut(*_factors_svd(change), k, torch.float64)
    if method == "randomized":
        return _randomized(change.to(dtype), k, seed)
    return decompose(change, k, method)[1]


def decompose(change: Change, k: int, method: Method = "svd", *, seed: int = 0) -> tuple[Tensor, Subspaces]:
    """All singular values that the method tells from rounding, and the k leading triplets; arguments as `top_subspaces`."""
    _check(change, k, method)
    if isinstance(change, LowRank) or method == "svd":
        wide = _factors_svd(change) if isinstance(change, LowRank) else _svd(change.double())
        whole = _cut(*wide, min(change.shape), torch.float64)
        return whole.values, _cut(*wide, k, torch.float64)
    if method == "randomized":
        found = _randomized(change.float() if change.dtype != torch.float64 else change, k, seed)
        return found.values, found
    return _gram(change.double(), k)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right.mT


def _check(change: Change, k: int, method: str) -> None:
    shape = tuple(change.shape)
    if len(shape) != 2 or not 1 <= k <= min(shape) or method not in Method.__args__:  # type: ignore[attr-defined]
        raise InputError(
            got=f"k = {k} by method {method!r} for a tensor of shape {shape}",
            expected="a matrix, 1 <= k <= its smaller side, and svd, gram or randomized",
            remedy="hand in one matrix at a time (a slice of fused experts) and a k that fits it",
        )


def _factors_svd(change: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of up @ down = Q_u (R_u R_d') Q_d', of min(m, n, r) terms."""
    q_up, r_up = torch.linalg.qr(change.up.double())
    q_down, r_down = torch.linalg.qr(change.down.double().mT)
    left, values, right = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    return q_up @ left, values, q_down @ right.mT


def _cut(left: Tensor, values: Tensor, right: Tensor, k: int, dtype: torch.dtype) -> Subspaces:
    """The first k triplets whose values are above max(m, n) eps sigma_1; no error is known of them."""
    tolerance = max(len(left), len(right)) * torch.finfo(dtype).eps
    kept = min(k, _above(values, tolerance))
    ratio = 0.0 if kept < len(values) and float(values[kept]) > 0 else float("nan")
    left, values, right = (x.double().clone() for x in (left[:, :kept], values[:kept], right[:, :kept]))
    return Subspaces(left, values, right, 0.0, ratio)


def _above(values: Tensor, tolerance: float) -> int:
    return int((values > tolerance * values.max()).sum()) if len(values) else 0


def _gram(matrix: Tensor, k: int) -> tuple[Tensor, Subspaces]:
    if matrix.shape[0] < matrix.shape[1]:
        known, turned = _gram(matrix.mT, k)
        return known, turned._replace(left=turned.right, right=turned.left)
    eps = torch.finfo(torch.float64).eps
    squares, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    values = squares.flip(0).clamp(min=0).sqrt()
    known = values[: _above(values, (max(matrix.shape) * eps) ** 0.5)].clone()
    kept = min(k, len(known))
    right, following = vectors.flip(1)[:, :kept].clone(), known[kept : kept + 1]
    if not kept:
        return known, Subspaces(matrix.new_zeros(len(matrix), 0), known, right, 0.0, float("nan"))
    # A V / sigma loses orthogonality where sigma is small; its QR factor does not, up to signs, which are A V's own.
    left, triangle = torch.linalg.qr(matrix @ right)
    left = left * torch.where(triangle.diagonal() < 0, -1.0, 1.0)
    error = min(matrix.shape) * eps * float(known[0] ** 2 / known[kept - 1])
    return known, Subspaces(left, known[:kept], right, error, _ratio(error, following))


def _randomized(matrix: Tensor, k: int, seed: int) -> Subspaces:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    columns = min(k + OVERSAMPLING, *matrix.shape)

    def gaussian(width: int) -> Tensor:
        drawn = torch.randn(matrix.shape[1], width, generator=generator, dtype=torch.float64)
        return drawn.to(matrix.device, matrix.dtype)

    basis = torch.linalg.qr(matrix @ gaussian(columns))[0]
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis)[0])[0]
    small = basis.mT @ matrix
    left, values, right = torch.linalg.svd(small.double(), full_matrices=False)
    image = matrix @ gaussian(PROBES)
    missed = image - basis @ (basis.mT @ image)
    error = float(FACTOR * (2 / torch.pi) ** 0.5 * missed.double().norm(dim=0).max())
    found = _cut(basis.double() @ left, values, right.mT, k, matrix.dtype)
    kept = len(found.values)
    return found._replace(error=error, error_ratio=_ratio(error, values[kept : kept + 1]))


def _ratio(error: float, following: Tensor) -> float:
    return error / float(following) if len(following) and float(following) > 0 else float("nan")


def principal_cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosines of the principal angles between the column spaces of orthonormal (m, k) and (m, k'), largest first.

    Near 1 a cosine says little of its angle (1e-8 radians off gives 1 - 5e-17); `principal_angles` is accurate there.

    Raises InputError for other lengths or columns that are not orthonormal.
    """
    _check_bases(first, second)
    values: Tensor = torch.linalg.svdvals(first.double().mT @ second.double())
    return values.clamp(max=1.0)


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Principal angles in degrees, smallest first; small ones from their sines, large ones from their cosines.

    The sines are the singular values of (I - U1 U1') U2 (Knyazev and Argentati 2002; as in `scipy.linalg.subspace_angles`).

    Raises InputError as `principal_cosines`.
    """
    if first.shape[-1] < second.shape[-1]:
        first, second = second, first
    cosines = principal_cosines(first, second)
    u, v = first.double(), second.double()
    sines = torch.linalg.svdvals(v - u @ (u.mT @ v)).clamp(max=1.0).flip(0)
    return torch.rad2deg(torch.where(cosines**2 > 0.5, sines.arcsin(), cosines.arccos()))


def overlap(first: Tensor, second: Tensor) -> float:
    """|U1' U2|_F^2 / k, k the columns of U1: 1 when the second space holds the first, k'/m for random ones; NaN for k = 0."""
    _check_bases(first, second)
    k = first.shape[1]
    return float((first.double().mT @ second.double()).square().sum()) / k if k else float("nan")


def _check_bases(*bases: Tensor) -> None:
    fits = all(b.dim() == 2 and len(b) == len(bases[0]) for b in bases)
    if not fits or not all(_orthonormal(b.double()) for b in bases):
        raise InputError(
            got=f"bases of shapes {[tuple(b.shape) for b in bases]}",
            expected="two matrices of equally many rows with orthonormal columns",
            remedy="take them from `top_subspaces`, or from torch.linalg.qr",
        )


def _orthonormal(basis: Tensor) -> bool:
    """To float32's rounding."""
    return float((basis.mT @ basis - torch.eye(basis.shape[1]).to(basis)).norm()) < 1e-4
