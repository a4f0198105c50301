"""Leading subspaces against NumPy's float64 decomposition, angles against planted ones and SciPy's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor

from interference.errors import InputError
from interference.geometry.subspaces import Method, overlap, principal_angles, principal_cosines, top_subspaces
from interference.tree import LowRank


def basis(m: int, k: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(m, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn)[0]


def planted(values: list[float], m: int, n: int) -> Tensor:
    """A matrix (m, n) with these singular values."""
    return basis(m, len(values), 1) @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis(n, len(values), 2).T


def projector(u: Tensor) -> Tensor:
    return u @ u.T


ANGLES = [1e-7, 1e-3, 5.0, 44.0, 46.0, 89.9]


def turned(angles: list[float], m: int = 40) -> tuple[Tensor, Tensor]:
    """Two bases of R^m with these principal angles in degrees, their columns mixed."""
    k = len(angles)
    q = basis(m, 2 * k)
    radians = torch.deg2rad(torch.tensor(angles, dtype=torch.float64))
    second = q[:, :k] * radians.cos() + q[:, k:] * radians.sin()
    return q[:, :k] @ basis(k, k, 3), second @ basis(k, k, 4)


def test_planted_angles_small_ones_too() -> None:
    first, second = turned(ANGLES)
    expected = torch.tensor(ANGLES, dtype=torch.float64)
    torch.testing.assert_close(principal_angles(first, second), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(principal_cosines(first, second), torch.deg2rad(expected).cos(), rtol=0, atol=1e-12)
    assert overlap(first, second) == pytest.approx(float(torch.deg2rad(expected).cos().square().mean()), abs=1e-12)
    naive = torch.rad2deg(principal_cosines(first, second).arccos())
    assert abs(float(naive[0]) - 1e-7) > 1e-8  # the reason for the sines


@pytest.mark.parametrize(("k", "other"), [(4, 4), (3, 6), (6, 3), (1, 1)])
def test_angles_are_scipys(k: int, other: int) -> None:
    first, second = basis(15, k, 5), basis(15, other, 6)
    peer = np.rad2deg(linalg.subspace_angles(first.numpy(), second.numpy()))[::-1]
    np.testing.assert_allclose(principal_angles(first, second).numpy(), peer, rtol=1e-12)
    cosines = principal_cosines(first, second)
    assert overlap(first, second) == pytest.approx(float(cosines.square().sum()) / k, abs=1e-12)
    assert bool((cosines.diff() <= 0).all())


def test_contained_and_orthogonal_spaces() -> None:
    q = basis(12, 6)
    assert overlap(q[:, :2], q[:, :4]) == pytest.approx(1, abs=1e-12)
    assert overlap(q[:, :4], q[:, :2]) == pytest.approx(0.5, abs=1e-12)
    assert overlap(q[:, :3], q[:, 3:]) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(
        principal_angles(q[:, :2], q[:, :4]), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(principal_angles(q[:, :3], q[:, 3:]), torch.full((3,), 90.0, dtype=torch.float64))


@pytest.mark.parametrize("method", ["svd", "gram", "randomized"])
@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_subspaces_are_those_of_the_dense_decomposition(method: Method, shape: tuple[int, int]) -> None:
    values = [5.0, 3.0, 2.0, 1.0] + [0.5 * 0.3**i for i in range(20)]
    matrix = planted(values, *shape)
    left, sigma, right = np.linalg.svd(matrix.numpy(), full_matrices=False)
    found = top_subspaces(matrix, 4, method)
    atol = 1e-12 if method == "svd" else 1e-10
    np.testing.assert_allclose(found.values, sigma[:4], rtol=0, atol=atol)
    np.testing.assert_allclose(projector(found.left), left[:, :4] @ left[:, :4].T, rtol=0, atol=atol)
    np.testing.assert_allclose(projector(found.right), right[:4].T @ right[:4], rtol=0, atol=atol)
    np.testing.assert_allclose(found.left.T @ matrix @ found.right, np.diag(sigma[:4]), rtol=0, atol=atol)
    for u in (found.left, found.right):
        torch.testing.assert_close(u.T @ u, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)
    assert found.left.shape == (shape[0], 4)
    assert found.right.shape == (shape[1], 4)
    if method == "svd":
        assert (found.error, found.error_ratio) == (0, 0)
    else:
        assert found.error > 0
        assert found.error_ratio == pytest.approx(found.error / 0.5, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_randomized_error_bounds_the_values_and_is_not_empty(dtype: torch.dtype) -> None:
    """A flat tail is the hard case. No basis of k + 10 columns misses less than sigma_{k+11}, so the bound must be above it."""
    noise = torch.randn(120, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = planted([60.0, 55.0, 50.0], 120, 200) + noise
    sigma = torch.linalg.svdvals(matrix)
    for seed in range(5):
        found = top_subspaces(matrix, 3, "randomized", seed=seed, dtype=dtype)
        assert float((found.values - sigma[:3]).abs().max()) <= found.error
        assert float(sigma[13]) <= found.error <= 2 * 200**0.5 * float(sigma[3])
        assert found.error_ratio == pytest.approx(found.error / float(sigma[3]), rel=0.1)
        torch.testing.assert_close(found.values, sigma[:3], rtol=1e-3, atol=0)
    again = top_subspaces(matrix, 3, "randomized", seed=4, dtype=dtype)
    assert torch.equal(again.left, found.left)


def test_randomized_misses_nothing_of_a_low_rank_matrix() -> None:
    matrix = planted([3.0, 2.0, 1.0], 80, 60)
    found = top_subspaces(matrix, 5, "randomized")
    assert found.error < 1e-12
    assert len(found.values) == 3  # two more directions would be arbitrary


@pytest.mark.parametrize("rank", [2, 6, 40])
def test_factors_are_decomposed_without_forming_the_matrix(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    change = LowRank(
        torch.randn(30, rank, generator=generator, dtype=torch.float64),
        torch.randn(rank, 20, generator=generator).double(),
    )
    dense = top_subspaces(change.dense(), 4)

    def refuse(self: LowRank) -> Tensor:
        raise AssertionError("formed the matrix")

    monkeypatch.setattr(LowRank, "dense", refuse)
    found = top_subspaces(change, 4)
    assert len(found.values) == len(dense.values) == min(rank, 4)
    torch.testing.assert_close(found.values, dense.values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(projector(found.left), projector(dense.left), rtol=0, atol=1e-12)
    torch.testing.assert_close(projector(found.right), projector(dense.right), rtol=0, atol=1e-12)
    torch.testing.assert_close(top_subspaces(change.t(), 4).values, dense.values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["svd", "gram", "randomized"])
def test_directions_that_rounding_makes_up_are_left_out(method: Method) -> None:
    found = top_subspaces(planted([1.0, 0.1], 12, 9), 5, method)
    assert found.left.shape == (12, 2)
    nothing = top_subspaces(torch.zeros(12, 9), 5, method)
    assert nothing.left.shape == (12, 0)
    assert nothing.right.shape == (9, 0)
    assert np.isnan(overlap(nothing.left, found.left))
    assert principal_angles(nothing.left, found.left).shape == (0,)


@pytest.mark.parametrize(
    "call",
    [
        lambda: top_subspaces(torch.zeros(3, 4, 5), 1),
        lambda: top_subspaces(torch.zeros(3, 4), 4),
        lambda: top_subspaces(torch.zeros(3, 4), 0),
        lambda: top_subspaces(torch.zeros(3, 4), 1, "lanczos"),  # type: ignore[arg-type]
        lambda: principal_cosines(torch.ones(3, 2), torch.eye(3)[:, :2]),
        lambda: principal_angles(torch.eye(4)[:, :2], torch.eye(3)[:, :2]),
        lambda: overlap(2 * torch.eye(3), torch.eye(3)),
    ],
)
def test_bad_input(call: Callable[[], object]) -> None:
    with pytest.raises(InputError):
        call()
