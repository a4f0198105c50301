"""Single operations: every rule against nested forward mode in float64, fallbacks, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.func import jvp

from interference.errors import InputError
from interference.taylor import run  # noqa: F401 (registers the rules)
from interference.taylor.basis import Basis
from interference.taylor.jet import Jet

MASK = torch.tensor([[True, False, True, False]] * 3)
INDEX = torch.tensor([[0, 2, 1, 1], [2, 0, 1, 0], [1, 1, 2, 2]])
PLAIN = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)


def inplace(x: Tensor, y: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    z += x
    z[1:, ::2] = y[1:, ::2]
    z[0].mul_(2)
    z.index_add_(0, torch.tensor([0, 0, 2]), y)
    return z


# functions of two jets of shape (3, 4) with positive entries
CASES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "arithmetic": lambda x, y: (x + 2 * y - 1) * (3 - x) / (y * y + 1) - x / 2 + 1 / y + PLAIN * x - (-y),
    "broadcast": lambda x, y: x[:, :1] * y + x[0] - y[..., None, :] + torch.ones(3, 1, 1, dtype=x.dtype) * x,
    "powers": lambda x, y: x**3 + y.pow(2) * torch.sqrt(x) + torch.rsqrt(y) + 2**x + x**0.5 + x.square(),
    "functions": lambda x, y: x.exp() + y.log() + torch.tanh(x) * y.sigmoid() + torch.sin(x) + y.cos() + torch.erf(x),
    "silu": lambda x, y: F.silu(x - 1) * y,
    "gelu": lambda x, y: F.gelu(x - 1) + F.gelu(y - 1, approximate="tanh"),
    "softplus": lambda x, y: F.softplus(x) + F.logsigmoid(y),
    "relu": lambda x, y: F.relu(x - 1) * torch.relu(y - 1) + F.leaky_relu(x - 1.2) + (x - 1).abs() + x.clamp(0.5, 1.2) * y,
    "where": lambda x, y: torch.where(MASK, x * x, y) + x.masked_fill(MASK, 0.3) + torch.where(MASK, x, 1.0),
    "maximum": lambda x, y: torch.maximum(x, y) * torch.minimum(x, PLAIN) + torch.max(x, dim=-1, keepdim=True).values * y,
    "matmul": lambda x, y: x @ y.T + torch.mm(x, y.t()) + x.matmul(PLAIN.T) + PLAIN @ y.T + (x * x) @ (y * y).mT,
    "batched": lambda x, y: torch.einsum("ij,kj->ik", x * x, y) + torch.bmm(x[None], y.T[None])[0],
    "vectors": lambda x, y: x @ y[0] + x[:, 0],
    "scores": lambda x, y: (x.view(1, 1, 3, 4) @ y.view(1, 1, 3, 4).transpose(2, 3) * 0.5 + PLAIN[:, :3]).tanh(),
    "attention": lambda x, y: torch.softmax(x.view(1, 1, 3, 4) @ y.view(1, 1, 3, 4).mT / 2, -1) @ (x * y).view(1, 1, 3, 4),
    "sdpa": lambda x, y: F.scaled_dot_product_attention(*(v.view(1, 2, 3, 2) for v in (x, y, x * y)), is_causal=True),
    "softmax": lambda x, y: torch.softmax(x * x, -1) * F.softmax(y, dim=0) + F.log_softmax(x * y, dim=-1),
    "logsumexp": lambda x, y: torch.logsumexp(x * y, -1) + torch.logsumexp(x * x, 0, keepdim=True)[0, :3],
    "layer_norm": lambda x, y: F.layer_norm(x * x, (4,), y[0], y[1], 1e-5) + F.layer_norm(x, (4,)),
    "rms_norm": lambda x, y: F.rms_norm(x * x, (4,), y[0], 1e-6) + F.rms_norm(y, (4,)),
    "reductions": lambda x, y: (x * y).sum(-1) + (x * x).mean(1) + x.sum() + (x * y).var(-1) + y.mean((0, 1)),
    "shapes": lambda x, y: torch.cat([x.T.reshape(3, 4), y.flatten().view(3, 4)], dim=1).unsqueeze(0).permute(2, 0, 1)
    .squeeze(1).expand(2, 8, 3).transpose(0, 1) * y[0, 0],
    "pieces": lambda x, y: torch.stack([*x.split([1, 3], dim=1)[1].chunk(3, dim=-1), y.unbind(1)[0][:, None]]).movedim(0, 1),
    "indices": lambda x, y: x.gather(1, INDEX) * y[[0, 2, 1]] + y.index_select(1, torch.tensor([3, 2, 1, 0])) + x[..., 1:2],
    "repeats": lambda x, y: x.repeat(2, 1) * y.repeat_interleave(2, dim=0) + (y.roll(1, 0).flip(1) + x.cumsum(1)).repeat(2, 1),
    "triangle": lambda x, y: x.tril() + F.pad(y, (1, 0))[:, :4].triu(),
    "topk": lambda x, y: torch.topk(x * y, 2, dim=-1).values * x.sort(-1).values[:, :2],
    "scatter": lambda x, y: torch.zeros_like(x).scatter(0, INDEX, y) + x.scatter(1, INDEX[:, :1], 0.5),
    "in place": inplace,
    "fallback": lambda x, y: torch.atan2(x, y) + torch.special.xlogy(x, y) + F.conv1d(x[None], y[None, :, :2]).sum(),
}  # fmt: skip
FALLBACKS = {"fallback": {"atan2", "special_xlogy", "conv1d"}}


def stacks(basis: Basis) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    out = [torch.randn(basis.size, 3, 4, generator=g, dtype=torch.float64) * 0.4 for _ in range(2)]
    for s in out:
        s[0] = s[0].abs() + 0.6
    return out


def coefficients(f: Callable[..., Any], basis: Basis, inputs: list[Tensor]) -> Tensor:
    """Taylor coefficients of f by nested forward mode."""
    zero = torch.zeros((), dtype=torch.float64)
    one = torch.ones_like(zero)
    out = [f(*(s[0] for s in inputs))]
    out += [jvp(f, tuple(s[0] for s in inputs), tuple(s[1 + k] for s in inputs))[1] for k in range(basis.updates)]
    for (k, m), at in basis.place.items():
        half = 2.0 if k == m else 1.0

        def path(s: Tensor, t: Tensor, k: int = k, m: int = m, at: int = at, half: float = half) -> Any:
            return f(*(c[0] + s * c[1 + k] + t * c[1 + m] + half * s * t * c[at] for c in inputs))

        def first(t: Tensor, path: Any = path) -> Any:
            return jvp(lambda s: path(s, t), (zero,), (one,))[1]

        out.append(jvp(first, (zero,), (one,))[1] / half)
    return torch.stack(out)


@pytest.fixture
def composite(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle needs a layer norm and an attention whose nested forward mode is right."""

    def norm(x: Tensor, shape: Any, w: Any = 1.0, b: Any = 0.0, eps: float = 1e-5) -> Tensor:
        c = x - x.mean(-1, keepdim=True)
        return c * torch.rsqrt((c * c).mean(-1, keepdim=True) + eps) * w + b

    def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        mask = torch.full((3, 3), float("-inf"), dtype=q.dtype).triu(1)
        return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5 + mask, -1) @ v

    monkeypatch.setattr(F, "layer_norm", norm)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)


def zeros_like_of(f: Callable[..., Any]) -> Callable[..., Any]:
    """In-place code under functorch needs a base that already carries tangents."""

    def run_(x: Tensor, y: Tensor) -> Any:
        original = torch.zeros_like
        torch.zeros_like = lambda v: v * 0  # type: ignore[assignment]
        try:
            return f(x, y)
        finally:
            torch.zeros_like = original

    return run_


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("basis", [(1, True), (2, True), (3, False)], ids=["one", "pairs", "diagonal"])
def test_rule(
    name: str, basis: tuple[int, bool], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    b = Basis(*basis)
    inputs = stacks(b)
    with torch.no_grad():
        got = CASES[name](*(Jet(b, s.clone()) for s in inputs))
    assert isinstance(got, Jet)
    request.getfixturevalue("composite")
    expected = coefficients(zeros_like_of(CASES[name]), b, inputs)
    assert got.shape == expected.shape[1:]
    coef = got.coef
    torch.testing.assert_close(coef, expected[: len(coef)], rtol=1e-10, atol=1e-12)
    assert len(coef) == b.size or not expected[len(coef) :].any()
    assert set(b.fallbacks) == FALLBACKS.get(name, set())


def jet() -> Jet:
    b = Basis(1, pairs=True)
    return Jet(b, stacks(b)[0])


def below(x: Jet) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return x * x


REFUSED: dict[str, Callable[[Jet], Any]] = {
    "item": lambda x: x[0, 0].item(),
    "bool": lambda x: bool(x[0, 0]),
    "float": lambda x: float(x[0, 0]),
    "data": lambda x: x.data,
    "detach": lambda x: x.detach(),
    "numpy": lambda x: x.numpy(),
    "tolist": lambda x: x.tolist(),
    "out": lambda x: torch.add(x, x, out=torch.empty(3, 4, dtype=torch.float64)),
    "into a plain tensor": lambda x: torch.zeros(3, 4, dtype=torch.float64).add_(x),
    "item assignment": lambda x: torch.zeros(3, 4, dtype=torch.float64).__setitem__(0, x[0]),
    "unknown in place": lambda x: x.atan2_(x),
    "dropout": lambda x: F.dropout(x, 0.5, training=True),
    "native layer norm below": lambda x: torch.native_layer_norm(x, (4,), None, None, 1e-5),
    "group norm": lambda x: F.group_norm(x, 2),
    "dispatcher": below,
    "rounding division": lambda x: torch.div(x, x, rounding_mode="floor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    with pytest.raises(InputError), torch.no_grad():
        REFUSED[name](jet())


def test_a_fallback_that_is_wrong_when_nested_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native layer norm taken off the list of known offenders is caught by the check against differences."""
    from interference.taylor import fallback

    monkeypatch.setattr(fallback, "WRONG", frozenset())
    rule = fallback.nested(torch.nn.functional.layer_norm, "layer_norm")
    with pytest.raises(InputError, match="differences"):
        rule(jet(), (4,))


def test_a_fallback_is_checked_along_every_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update that does not reach the operation must not pass the check for the others."""
    from interference.taylor import fallback

    monkeypatch.setattr(fallback, "WRONG", frozenset())
    rule = fallback.nested(torch.nn.functional.layer_norm, "layer_norm")
    basis = Basis(2, True)
    still = torch.randn(basis.size, 3, 4, dtype=torch.float64)
    still[1:] = 0
    moving = still.clone()
    moving[2] = torch.randn(3, 4, dtype=torch.float64)
    with torch.no_grad():
        rule(Jet(basis, still), (4,))  # nothing moves: nothing is said about the operation
        with pytest.raises(InputError, match="differences"):
            rule(Jet(basis, moving), (4,))


def test_piecewise_constants_are_plain() -> None:
    x = jet()
    for plain in (x > 1, x.argmax(-1), x.to(torch.int64), torch.isnan(x), x.round(), torch.topk(x, 2).indices):
        assert not isinstance(plain, Jet)


def test_casts_never_narrow() -> None:
    x = jet()
    narrow = x.to(torch.float32)
    assert narrow.dtype == torch.float64
    assert narrow is not x  # torch would copy
    torch.testing.assert_close(narrow.coef, x.coef)
    assert x.to(torch.float64) is x
    assert x.float().dtype == torch.float64
    assert Jet(x.basis, x.coef.float()).double().dtype == torch.float64


def test_views_share_memory_and_buffers_are_used_again() -> None:
    from interference.taylor.pool import Pool

    pool = Pool()
    shape, device = (512, 1024), torch.device("cpu")
    a = pool.empty(shape, torch.float32, device)
    view = a[3:, :5]
    del a
    b = pool.empty(shape, torch.float32, device)
    assert b.data_ptr() != view.data_ptr() - 3 * 1024 * 4
    address = b.data_ptr()
    del b
    assert pool.empty(shape, torch.float32, device).data_ptr() == address
