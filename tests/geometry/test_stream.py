"""The sums of one pass over a tensor against dense references, whatever its shape, dtype and cut."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from interference.geometry import stream
from interference.geometry.projection import Projection
from interference.geometry.stream import Source, tensor_sums
from interference.geometry.sums import RULES, Sums

N = 3
CASES = [
    ((40, 60), (0,)), ((40, 60), (1,)), ((77,), (0,)), ((77,), ()), ((5, 30, 11), (0, 1)), ((5, 30, 11), (0, 2)),
    ((5, 30), (0, 1)), ((300, 100), ()),
]  # fmt: skip


def weights(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """A base and N tuned tensors; a third of the weights moved."""
    g = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(shape, generator=g, dtype=torch.float64)
    moves = [
        (torch.rand(shape, generator=g) < 0.3) * 1e-3 * torch.randn(shape, generator=g, dtype=torch.float64)
        for _ in range(N)
    ]
    base.view(-1)[:4] = torch.tensor([0.0, -0.0, 1e-40, 0.0])  # zeros of both signs and a subnormal
    tuned = [base + m for m in moves]
    tuned[0].view(-1)[:4] = torch.tensor([-0.0, 0.0, 2e-40, 1e-38])
    return [base.to(dtype), *(t.to(dtype) for t in tuned)]


def summed(found: list[Tensor], axes: tuple[int, ...], projection: Projection | None = None) -> Sums:
    sources = [Source(lambda a, b, w=w: w[a:b]) for w in found[1:]]  # type: ignore[misc]
    return tensor_sums("w", found[0].shape, lambda a, b: found[0][a:b], sources, axes, projection)


@pytest.fixture(params=[(1 << 23, 1 << 17), (5000, 700)], ids=["whole", "cut"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "READ", request.param[0])
    monkeypatch.setattr(stream, "INNER", request.param[1])


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "axes"), CASES, ids=str)
def test_sums_are_those_of_dense_tensors(shape: tuple[int, ...], axes: tuple[int, ...], dtype: torch.dtype) -> None:
    found = weights(shape, dtype)
    s = summed(found, axes)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    base, *tuned = (w.to(wide).numpy().reshape(-1) for w in found)
    changes = [t - base for t in tuned]
    d = np.stack(changes).astype(np.float64)
    np.testing.assert_allclose(s.gram, d @ d.T, rtol=1e-12, atol=1e-12 * np.abs(d @ d.T).max())
    apart = ~np.eye(N, dtype=bool)
    np.testing.assert_allclose(s.squares[apart], (d**2 @ (d**2).T)[apart], rtol=1e-5)
    np.testing.assert_allclose(s.base_square, (base.astype(float) ** 2).sum(), rtol=1e-12)
    np.testing.assert_array_equal(s.largest, np.abs(d).max(1))
    np.testing.assert_array_equal(s.identical, (d == 0).sum(1))
    masks = np.array([dense_masks(base, t, c) for t, c in zip(tuned, changes, strict=True)]).swapaxes(0, 1)
    np.testing.assert_array_equal(s.count, masks.sum(2))
    np.testing.assert_array_equal(s.both, np.einsum("ran,rbn->rab", masks.astype(int), masks.astype(int)))
    np.testing.assert_array_equal(s.histogram, np.bincount(masks[0].sum(0), minlength=N + 1))
    for a, b in product(range(N), range(N)):
        shared = masks[0, a] & masks[0, b]
        assert s.agree[a, b] == (shared & ((d[a] < 0) == (d[b] < 0))).sum()
        assert s.copied[a, b] == ((d[a] != 0) & (d[b] != 0) & (d[a] == d[b])).sum()
    others = tuple(i for i in range(len(shape)) if i not in axes)
    for k in range(N):
        square = (d[k] ** 2).reshape(shape)
        expected = square.sum() if not axes else square.sum(others) if others else square
        np.testing.assert_allclose(s.units[k], np.reshape(expected, -1), rtol=1e-12)
    if len(shape) == 2 and len(axes) < 2:
        grid = masks[0].reshape(N, *shape)
        np.testing.assert_array_equal(s.rows, grid.any(2).sum(1))
        np.testing.assert_array_equal(s.columns, grid.any(1).sum(1))


def dense_masks(base: np.ndarray, tuned: np.ndarray, change: np.ndarray) -> list[np.ndarray]:
    """The three rules as they are written in the papers, and the one of ours."""
    d, eta = np.abs(change), base.dtype.type(1e-3)
    unchanged = ((d < 1e-7) & (d < eta * np.abs(base))) | (d == 0)
    apart = torch.from_numpy(base).bfloat16() != torch.from_numpy(tuned).bfloat16()
    return [d > eta * np.maximum(np.abs(tuned), np.abs(base)), d > 1e-5, ~unchanged, apart.numpy()]


def test_in_bf16_the_relative_rule_is_bitwise_inequality() -> None:
    """2511.08567: the spacing of bf16 is between 2^-8 and 2^-7 of a weight, above eta = 1e-3."""
    s = summed(weights((200, 50), torch.bfloat16), ())
    np.testing.assert_array_equal(s.count[RULES.index("relative")], s.numel - s.identical)


def test_a_change_given_as_such_counts_like_the_tuned_tensor() -> None:
    base, *tuned = weights((40, 60), torch.float64)
    plain = summed([base, *tuned], (0,))
    changes = [Source(lambda a, b, t=t: (t - base)[a:b], change=True) for t in tuned]  # type: ignore[misc]
    given = tensor_sums("w", base.shape, lambda a, b: base[a:b], changes, (0,))
    for name in ("gram", "squares", "units", "largest", "identical", "count", "both", "agree", "copied", "histogram"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(given, name), err_msg=name)


@pytest.mark.usefixtures("cut")
def test_the_projection_does_not_depend_on_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    found = weights((300, 100), torch.float32)
    one, two = Projection([0, 1]), Projection([0, 1])
    summed(found, (), one)
    d = torch.stack([(w - found[0]).reshape(-1) for w in found[1:]])
    two.add("w", 0, d)
    np.testing.assert_allclose(one.cosines(), two.cosines(), atol=1e-6)


def test_units_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(ValueError, match="units along axes"):
        summed(weights((3, 4, 5), torch.float32), (1,))
