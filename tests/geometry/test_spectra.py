"""Spectra against torch's rank and closed forms; masks of the base against sorting; their chance against random masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from interference.errors import InputError
from interference.geometry.spectra import (
    low_magnitude_mask,
    mask_overlap,
    normalized_spectral_shift,
    numerical_rank,
    principal_mask,
    rotation,
    singular_values,
    spectrum,
    stable_rank,
)
from interference.geometry.subspaces import top_subspaces
from interference.tree import LowRank

REPEATS = 400


def basis(m: int, k: int, seed: int) -> Tensor:
    drawn = torch.randn(m, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn)[0]


def planted(values: list[float], m: int, n: int) -> Tensor:
    return basis(m, len(values), 1) @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis(n, len(values), 2).T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_is_torchs(dtype: torch.dtype) -> None:
    tolerance = 50 * torch.finfo(dtype).eps
    for values in ([1.0, 0.5, 1.3 * tolerance, 0.8 * tolerance], [2.0] * 7, [1.0], [4.0, 10 * tolerance, 1e-30]):
        matrix = planted(values, 50, 30).to(dtype)
        found = spectrum(matrix, 3, precision=dtype)
        assert found.rank == int(torch.linalg.matrix_rank(matrix)), values
        assert found.rank_ratio == found.rank / 30
    assert numerical_rank(torch.zeros(3), (3, 3)) == 0


@pytest.mark.parametrize("method", ["svd", "gram"])
def test_exact_spectrum(method: str) -> None:
    values = [4.0, 2.0, 1.0, 0.5]
    found = spectrum(planted(values, 4, 9), 2, method)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.values, values, rtol=1e-12)
    assert found.frobenius_norm == pytest.approx(21.25**0.5, rel=1e-12)
    assert found.spectral_norm == pytest.approx(4, rel=1e-12)
    assert found.stable_rank == pytest.approx(21.25 / 16, rel=1e-12)
    assert (found.rank, found.rank_ratio, found.method) == (4, 1.0, "exact")
    assert found.error == 0 if method == "svd" else 0 < found.error < 1e-6


def test_gram_values_are_within_the_error_told() -> None:
    matrix = planted([1.0, 1e-3, 1e-9, 1e-12], 40, 30)
    found = spectrum(matrix, 1, "gram")
    assert float((found.values - torch.linalg.svdvals(matrix)).abs().max()) <= found.error < 1e-6


def test_randomized_spectrum() -> None:
    matrix = planted([4.0, 2.0] + [0.01] * 30, 60, 40)
    found = spectrum(matrix, 2, "randomized")
    assert found.method == "randomized"
    assert np.isnan([found.rank, found.rank_ratio]).all()
    np.testing.assert_allclose(found.values, [4, 2], atol=found.error)
    assert found.stable_rank == pytest.approx((20 + 30e-4) / 16, rel=1e-4)
    assert 0.01 * 0.99 < found.error < 1


def test_spectrum_of_factors_is_that_of_the_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    change = LowRank(torch.randn(20, 3, generator=generator).double(), torch.randn(3, 15, generator=generator).double())
    for method in ("svd", "gram", "randomized"):
        found, dense = spectrum(change, 2, method), spectrum(change.dense(), 2)  # type: ignore[arg-type]
        torch.testing.assert_close(found.values, dense.values[:3], rtol=1e-12, atol=1e-12)
        assert found.stable_rank == pytest.approx(dense.stable_rank, rel=1e-12)
        assert (found.rank, found.rank_ratio, found.error, found.method) == (3, 0.2, 0, "exact")


def test_stable_rank_of_identity_and_nothing() -> None:
    assert spectrum(torch.eye(7), 1).stable_rank == pytest.approx(7, rel=1e-12)
    nothing = spectrum(torch.zeros(4, 3), 1)
    assert np.isnan(nothing.stable_rank)
    assert (nothing.rank, nothing.spectral_norm) == (0, 0)
    assert np.isnan(stable_rank(0.0, 0.0))


def test_spectral_shift_closed_forms() -> None:
    weight = planted([3.0, 2.0, 1.0], 10, 8)
    values = singular_values(weight)
    assert normalized_spectral_shift(values, singular_values(1.1 * weight)) == pytest.approx(0.1, rel=1e-12)
    turned = basis(10, 10, 5) @ weight @ basis(8, 8, 6)
    assert normalized_spectral_shift(values, singular_values(turned)) < 1e-12  # a rotation leaves the spectrum
    moved = planted([3.0, 2.0, 4.0], 10, 8)  # the values are compared in order of size: (4, 3, 2) with (3, 2, 1)
    assert normalized_spectral_shift(values, singular_values(moved)) == pytest.approx((3 / 14) ** 0.5, rel=1e-12)
    with pytest.raises(InputError, match="one shape"):
        normalized_spectral_shift(values, values[:2])


def test_rotation_of_planted_angles() -> None:
    q, v = basis(20, 6, 1), basis(12, 3, 2)
    sigma = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    angles = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    after = q[:, :3] * angles.cos() + q[:, 3:] * angles.sin()
    left, right = rotation(top_subspaces(q[:, :3] @ sigma @ v.T, 3), top_subspaces(after @ sigma @ v.T, 3))
    assert left == pytest.approx(float(angles.cos().mean()), abs=1e-12)
    assert right == pytest.approx(1, abs=1e-12)


def test_principal_mask_is_the_largest_of_the_truncation() -> None:
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, v = np.linalg.svd(weight.numpy(), full_matrices=False)
    leading = np.abs(u[:, :4] * s[:4] @ v[:4])
    mask = principal_mask(top_subspaces(weight, 4), 0.1)
    assert mask.shape == (30, 20)
    assert int(mask.sum()) == 60
    assert set(np.flatnonzero(mask)) == set(np.argsort(leading.reshape(-1))[-60:])


def test_low_magnitude_mask_is_the_smallest_and_draws_among_ties() -> None:
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    mask = low_magnitude_mask(weight, 0.2)
    assert set(np.flatnonzero(mask)) == set(np.argsort(weight.abs().numpy().reshape(-1))[:120])
    tied = torch.tensor([[0.0, 1.0, -1.0, 1.0, 1.0, 2.0]], dtype=torch.bfloat16).repeat(100, 1)
    mask = low_magnitude_mask(tied, 0.5)  # 300 of 600: the 100 zeros and 200 of the 400 ones
    assert int(mask.sum()) == 300
    assert bool(mask[:, 0].all())
    assert not bool(mask[:, 5].any())
    assert 60 < int(mask[:50, 1:5].sum()) < 140  # by index it would be 200
    assert not torch.equal(mask, low_magnitude_mask(tied, 0.5, seed=1))
    assert (int(low_magnitude_mask(tied, 0.0).sum()), int(low_magnitude_mask(tied, 1.0).sum())) == (0, 600)
    with pytest.raises(InputError, match="alpha"):
        low_magnitude_mask(weight, 10)


def test_mask_overlap_beside_chance() -> None:
    reference, changed = torch.zeros(10, 10, dtype=torch.bool), torch.zeros(10, 10, dtype=torch.bool)
    reference[:2], changed[1:5, :5] = True, True
    found = mask_overlap(reference, changed)
    peer = stats.hypergeom(100, 20, 20)
    assert (found.value, found.chance) == (5 / 20, 0.2)
    assert (found.low, found.high) == (peer.ppf(0.05) / 20, peer.ppf(0.95) / 20)
    assert np.isnan(mask_overlap(reference, torch.zeros_like(changed)).value)
    with pytest.raises(InputError, match="boolean"):
        mask_overlap(reference, changed.float())


def test_mask_overlap_interval_covers_random_changes_at_its_rate() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = low_magnitude_mask(torch.randn(40, 50, generator=generator), 0.1)
    inside, exact = 0, []
    for _ in range(REPEATS):
        changed = torch.rand(40, 50, generator=generator) < 0.3
        found, total = mask_overlap(reference, changed), int(changed.sum())
        inside += found.low <= found.value <= found.high
        law = stats.hypergeom(2000, 200, total)
        exact.append(law.cdf(round(found.high * total)) - law.cdf(round(found.low * total) - 1))
    rate = float(np.mean(exact))
    assert 0.90 <= rate < 0.94
    assert abs(inside / REPEATS - rate) <= 3 * (rate * (1 - rate) / REPEATS) ** 0.5
