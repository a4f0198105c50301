"""The projection: orthogonal rows, a dense reference, no dependence on the cut, unbiased cosines of structured updates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from interference.errors import InputError
from interference.geometry.projection import Projection


def matrix(seeds: list[int], name: str, offset: int, n: int, dims: int = 256) -> Tensor:
    """The projections as matrices (S, dims, n), by projecting the unit vectors."""
    projection = Projection(seeds, dims)
    projection.add(name, offset, torch.eye(n))
    assert projection.sums is not None
    return projection.sums.mT


@pytest.mark.parametrize("dims", [128, 256, 512])
def test_rows_are_orthogonal_and_of_equal_norm(dims: int) -> None:
    p = matrix([0, 7], "w", 0, 3 * dims, dims)
    for each in p:
        torch.testing.assert_close(each @ each.T, 3 * torch.eye(dims, dtype=torch.float64), rtol=0, atol=1e-5)


def test_blocks_are_rotated_hadamard_matrices_of_random_signs() -> None:
    p = matrix([0], "w", 0, 512)[0]
    torch.testing.assert_close(p.abs(), torch.full_like(p, 1 / 16), rtol=0, atol=1e-7)
    signs = (p * 16).round()
    assert abs(float(signs.mean())) < 4 / 512  # 512 + 512 independent signs, spread over the products
    assert not torch.equal(signs[:, :256], signs[:, 256:])


def test_signs_depend_on_seed_name_and_block() -> None:
    p = matrix([0, 1], "w", 0, 512)
    assert not torch.equal(p[0], p[1])
    assert not torch.equal(p, matrix([0, 1], "v", 0, 512))
    torch.testing.assert_close(matrix([0, 1], "w", 256, 256), p[:, :, 256:])
    torch.testing.assert_close(matrix([1], "w", 0, 512)[0], p[1])


def test_agrees_with_the_dense_product_in_float64() -> None:
    values = torch.randn(3, 700, generator=torch.Generator().manual_seed(0))
    projection = Projection([3])
    projection.add("w", 0, values.numpy())
    assert projection.sums is not None
    dense = values.double() @ matrix([3], "w", 0, 700)[0].T
    torch.testing.assert_close(projection.sums[0], dense, rtol=0, atol=2e-5)
    y = dense.numpy()
    norms = np.linalg.norm(y, axis=1)
    np.testing.assert_allclose(projection.cosines()[0], y @ y.T / np.outer(norms, norms), atol=1e-6)


def test_the_cut_and_the_order_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    w, v = torch.randn(2, 200_000, generator=generator), torch.randn(2, 300, generator=generator)
    whole, cut = Projection([0, 5]), Projection([0, 5])
    whole.add("w", 0, w)
    whole.add("v", 0, v)
    cut.add("v", 0, v)
    for start, end in ((65_536, 150_016), (0, 65_536), (150_016, 200_000)):
        cut.add("w", start, w[:, start:end])
    assert whole.sums is not None
    assert cut.sums is not None
    torch.testing.assert_close(whole.sums, cut.sums, rtol=0, atol=1e-3)  # norms are near 450
    assert float(whole.sums.norm()) > 100


def cosines(first: Tensor, second: Tensor, seeds: int = 300) -> np.ndarray:
    projection = Projection(range(seeds))
    projection.add("w", 0, torch.stack([first.reshape(-1), second.reshape(-1)]))
    return projection.cosines()[:, 0, 1]


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def structured() -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of updates (64, 512), of known cosine."""
    zero = torch.zeros(64, 512)
    columns, rows, same_column = (
        (zero.clone(), zero.clone()),
        (zero.clone(), zero.clone()),
        (zero.clone(), zero.clone()),
    )
    columns[0][:, 3], columns[1][:, 4] = vectors(64), vectors(64, seed=1)
    rows[0][10], rows[1][11] = vectors(512), vectors(512, seed=1)
    same_column[0][:, 7], same_column[1][:, 7] = vectors(64), vectors(64, seed=1)
    left, right = vectors(64, 4), vectors(512, 4, seed=1)
    low_rank = left[:, :2] @ right[:, :2].T, left[:, 1:3] @ right[:, 1:3].T
    constant = torch.ones(64, 512), torch.ones(64, 512) * torch.tensor([1.0, -1.0]).repeat(256)
    sparse = zero.clone(), zero.clone()
    sparse[0][::16, ::256], sparse[1][::16, 1::256] = 1.0, 1.0
    dense = vectors(64, 512)
    planted = dense, 0.5 * dense + 0.75**0.5 * vectors(64, 512, seed=1)
    return {
        "columns": columns, "rows": rows, "same column": same_column, "low rank": low_rank, "constant": constant,
        "sparse": sparse, "planted": planted, "independent": (vectors(64, 512), vectors(64, 512, seed=1)),
    }  # fmt: skip


@pytest.mark.parametrize("kind", structured())
def test_cosines_are_unbiased_and_spread_by_a_sixteenth(kind: str) -> None:
    first, second = structured()[kind]
    true = float(torch.nn.functional.cosine_similarity(first.double().reshape(-1), second.double().reshape(-1), dim=0))
    found = cosines(first, second)
    spread = found.std()
    expected = (1 - true**2) / 16  # of a sample correlation of 256 pairs
    assert abs(found.mean() - true) <= 4 * expected / len(found) ** 0.5 + abs(true) / 256
    assert spread <= 1.25 * expected
    if kind != "rows":  # two blocks each, other ones: only few cross terms, and still 1/16
        assert spread >= 0.8 * expected * (1 - 1 / 64) ** 0.5
    if kind == "planted":
        assert abs(true) > 0.4


def test_zero_updates_and_wrong_calls() -> None:
    projection = Projection([0])
    with pytest.raises(InputError, match="no values"):
        projection.cosines()
    projection.add("w", 0, torch.stack([torch.zeros(300), torch.ones(300)]))
    found = projection.cosines()[0]
    assert np.isnan(found[0]).all()
    assert found[1, 1] == pytest.approx(1, abs=1e-12)
    with pytest.raises(InputError, match="multiple of 256"):
        projection.add("w", 300, torch.ones(2, 10))
    with pytest.raises(InputError, match=r"\(2, n\)"):
        projection.add("w", 512, torch.ones(3, 10))
    with pytest.raises(InputError, match="power of two"):
        Projection([0], dims=100)
