"""What is held back must come out as if it had not been: norms, gates, low-rank factors; and in-place changes in between."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from taylor_oracles import TrueFloat64, Update, batch, directions, nested, relative, worst
from test_taylor_architectures import build
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from interference.errors import InputError
from interference.taylor import deferred, taylor_jets
from interference.taylor.basis import Basis
from interference.taylor.jet import Jet
from interference.tree import LowRank, NamedChanges

SHAPE = (2, 5, 6)


def stack(basis: Basis, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(basis.size, *shape, generator=g, dtype=torch.float64)


def on_series(basis: Basis, f: Callable[..., Tensor], *stacks: Tensor) -> Tensor:
    """Coefficients of f by differences of the polynomials themselves, in float64: an oracle that knows no rule."""
    h = 2e-4

    def at(a: list[float]) -> Tensor:
        moved = []
        for s in stacks:
            x = s[0].clone()
            for k, ak in enumerate(a):
                x = x + ak * s[1 + k]
            for i, (k, m) in enumerate(basis.seconds):
                x = x + a[k] * a[m] * s[basis.low + i]
            moved.append(x)
        return f(*moved)

    def unit(*places: int, signs: tuple[int, ...] = (1, 1)) -> list[float]:
        a = [0.0] * basis.updates
        for place, sign in zip(places, signs, strict=False):
            a[place] += sign * h
        return a

    parts = [at([0.0] * basis.updates)]
    parts += [(at(unit(k)) - at(unit(k, signs=(-1,)))) / (2 * h) for k in range(basis.updates)]
    for k, m in basis.seconds:
        if k == m:
            parts.append((at(unit(k)) - 2 * parts[0] + at(unit(k, signs=(-1,)))) / (2 * h * h))
        else:
            corners = [(1, 1), (1, -1), (-1, 1), (-1, -1)]
            values = [at(unit(k, m, signs=s)) for s in corners]
            parts.append((values[0] - values[1] - values[2] + values[3]) / (4 * h * h))
    return torch.stack(parts)


def rms(x: Tensor, w: Tensor, one: float = 0.0) -> Tensor:
    return (one + w) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


COS, SIN = (f(torch.arange(30, dtype=torch.float64).view(5, 6)) for f in (torch.cos, torch.sin))


def half_turn(x: Tensor) -> Tensor:
    return torch.cat((-x[..., 3:], x[..., :3]), dim=-1)


CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "rms norm": (rms, [SHAPE, SHAPE[-1:]]),
    "rms norm with 1 + w": (lambda x, w: rms(x, w, 1.0), [SHAPE, SHAPE[-1:]]),
    "rms norm, power": (lambda x: x * torch.pow((x * x).mean(-1, keepdim=True) + 1e-6, -0.5), [SHAPE]),
    "square elsewhere": (lambda x: x.pow(2).sum(-1) + x.square().mean(-1), [SHAPE]),
    "inverse times another": (
        lambda x, y: y * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
        [SHAPE, SHAPE],
    ),
    "layer norm": (lambda x, w, b: F.layer_norm(x, SHAPE[-1:], w, b, 1e-6), [SHAPE, SHAPE[-1:], SHAPE[-1:]]),
    "layer norm over two": (lambda x: F.layer_norm(x, SHAPE[-2:], eps=1e-6), [SHAPE]),
    "layer norm of a transpose": (lambda x: F.layer_norm(x.transpose(1, 2), SHAPE[1:2]), [SHAPE]),
    "gate": (lambda x, y: F.silu(x) * y, [SHAPE, SHAPE]),
    "gate of halves": (lambda x: F.gelu(x[..., :3]) * x[..., 3:], [SHAPE]),
    "gate of a transpose": (lambda x, y: F.silu(x.transpose(0, 1)) * y.transpose(0, 1), [SHAPE, SHAPE]),
    "gate by itself": (lambda x: (lambda a: a * a)(torch.tanh(x)), [SHAPE]),
    "gate with broadcasting": (lambda x, y: F.silu(x) * y, [SHAPE, SHAPE[-1:]]),
    "rotary": (lambda x: x * COS + half_turn(x) * SIN, [SHAPE]),
    "rotary, other order": (lambda x: half_turn(x) * SIN + x * COS, [SHAPE]),
    "half turn elsewhere": (lambda x: half_turn(x).square() + half_turn(half_turn(x)) * SIN, [SHAPE]),
    "half turn, gated": (lambda x, y: half_turn(x) * SIN * y - y, [SHAPE, SHAPE]),
    "negative": (lambda x: (-x) * (-x) - (-x), [SHAPE]),
    "in place after": (lambda x, y: F.silu(x).mul_(y).add_(1.0), [SHAPE, SHAPE]),
}


@pytest.mark.parametrize("block", [16, 2**17], ids=["many blocks", "one block"])
@pytest.mark.parametrize(("updates", "pairs"), [(1, True), (3, False), (3, True)])
@pytest.mark.parametrize("name", CASES)
def test_together(name: str, updates: int, pairs: bool, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred, "BLOCK", block)
    f, shapes = CASES[name]
    basis = Basis(updates, pairs)
    stacks = [stack(basis, shape, seed) for seed, shape in enumerate(shapes)]
    with torch.no_grad():
        got = f(*(Jet(basis, s.clone()) for s in stacks))
    assert isinstance(got, Jet)
    torch.testing.assert_close(got.coef, on_series(basis, f, *stacks), rtol=2e-5, atol=2e-5)
    assert not basis.fallbacks


def _square_then(x: Tensor) -> Tensor:
    held = x.pow(2)
    x.mul_(3.0)
    return held.mean(-1, keepdim=True)


def _inverse_then(x: Tensor) -> Tensor:
    inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    x += 1.0
    return x * inverse


def _query_then(x: Tensor) -> Tensor:
    q, k = x[None] + 0.0, x[None] * 2
    scores = q @ k.transpose(-1, -2)
    q *= 2.0
    return torch.softmax(scores, -1) @ k


def _mask_then(x: Tensor) -> Tensor:
    mask = torch.zeros(SHAPE[1], SHAPE[1], dtype=torch.float64)
    q = x[None]
    scores = q @ q.transpose(-1, -2) + mask
    mask += torch.eye(SHAPE[1])
    return torch.softmax(scores, -1) @ q


def _half_turn_then(x: Tensor) -> Tensor:
    held = half_turn(x) * SIN
    x.mul_(2.0)
    return x + held


def _activation_then(x: Tensor) -> Tensor:
    held = F.silu(x)
    x.add_(1.0)
    return held + 0.0


@pytest.mark.parametrize(
    "late", [_square_then, _inverse_then, _query_then, _mask_then, _half_turn_then, _activation_then]
)
def test_an_in_place_change_before_a_held_back_result_is_refused(late: Callable[[Tensor], Tensor]) -> None:
    """Computed late, the result would silently see the changed value."""
    basis = Basis(1, True)
    with torch.no_grad(), pytest.raises(InputError, match="in-place"):
        assert late(Jet(basis, stack(basis))).coef is None  # type: ignore[attr-defined]


def _relu_of_scores(x: Tensor) -> Tensor:
    q = x[None] + 0.0
    scores = q @ q.transpose(-1, -2)
    F.relu(scores, inplace=True)
    return torch.softmax(scores, -1) @ q


def _slice_of_scores(x: Tensor) -> Tensor:
    q = x[None] + 0.0
    scores = q @ q.transpose(-1, -2)
    scores[..., :2].mul_(2.0)
    return torch.softmax(scores, -1) @ q


def _cast_and_change(x: Tensor) -> Tensor:
    y = x.to(torch.float32)
    y += 1.0
    return x * y


def _mask_and_cap(x: Tensor) -> Tensor:
    """The cap brings keys back that the mask removed: they must not be skipped (long enough for blocks of queries)."""
    q = x.repeat(1, 40, 1)[None]
    mask = torch.full((200, 200), -1e9, dtype=torch.float64).triu(1)
    return torch.softmax(torch.tanh(q @ q.transpose(-1, -2) + mask), -1) @ q


@pytest.mark.parametrize("f", [_relu_of_scores, _slice_of_scores, _cast_and_change, _mask_and_cap])
def test_in_place_changes_and_masks_mean_what_they_mean_to_torch(f: Callable[[Tensor], Tensor]) -> None:
    basis = Basis(1, True)
    s = 0.3 * stack(basis)
    with torch.no_grad():
        got = f(Jet(basis, s.clone()))
    truth = on_series(basis, f, s) if f is not _cast_and_change else on_series(basis, lambda x: x * (x + 1.0), s)
    torch.testing.assert_close(got.coef, truth, rtol=1e-4, atol=1e-4)  # type: ignore[attr-defined]


class Capped(nn.Module):
    """A causal LM whose last step is in place."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.get_output_embeddings()  # type: ignore[operator, no-any-return]

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> object:
        out = self.inner(input_ids=input_ids, use_cache=use_cache)
        out.logits[..., 20:].sub_(3.0)
        return out


def test_logits_changed_in_place() -> None:
    model, (ids, targets) = Capped(build("qwen3")).eval(), batch(37)
    updates = directions(model, 2)
    with TrueFloat64():
        got, _ = taylor_jets(model, updates, ids, targets)
        expected = nested(model, updates, ids, targets)
    assert worst(got, expected) < 1e-11


def test_inference_mode() -> None:
    model, (ids, targets) = build("qwen3"), batch(37)
    updates = directions(model, 1)
    expected, _ = taylor_jets(model, updates, ids, targets)
    with torch.inference_mode():
        got, _ = taylor_jets(model, updates, ids, targets)
    torch.testing.assert_close(got.d2, expected.d2)


FACTORED = ["qwen3", "gpt2", "phi3", "opt", "qwen3_moe", "gemma2"]


def factors(model: nn.Module, rank: int = 3, everywhere: bool = False) -> tuple[NamedChanges, Update]:
    """A low-rank update of matrices and dense changes elsewhere, and the same as plain tensors."""
    g = torch.Generator().manual_seed(4)
    mixed: dict[str, Tensor | LowRank] = {}
    for name, p in model.named_parameters():
        if p.dim() == 2:
            up, down = (
                torch.randn(n, generator=g, dtype=torch.float64) * 0.2 for n in ((p.shape[0], rank), (rank, p.shape[1]))
            )
            mixed[name] = LowRank(up, down)
        elif everywhere:
            mixed[name] = torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.1
    return mixed, {n: c.dense() if isinstance(c, LowRank) else c for n, c in mixed.items()}


@pytest.mark.parametrize("name", FACTORED)
@pytest.mark.parametrize("pairs", [True, False])
def test_factors_are_their_product(name: str, pairs: bool) -> None:
    model, (ids, targets) = build(name), batch(37)
    mixed, plain = factors(model, everywhere=True)
    only, product = factors(model, rank=2)
    other = directions(model, 1)[0]
    got, _ = taylor_jets(model, [mixed, other, only], ids, targets, pairs=pairs)
    expected, _ = taylor_jets(model, [plain, other, product], ids, targets, pairs=pairs)
    for field in ("logp", "d1", "d2", "fisher"):
        assert relative(getattr(got, field), getattr(expected, field)) < 1e-12


def test_a_single_factored_update() -> None:
    model, (ids, targets) = build("qwen3"), batch(37)
    mixed, plain = factors(model)
    got, _ = taylor_jets(model, [mixed], ids, targets)
    expected, _ = taylor_jets(model, [plain], ids, targets)
    assert relative(got.d2, expected.d2) < 1e-12
    flipped = next(n for n, c in mixed.items() if isinstance(c, LowRank) and "mlp" in n)
    wrong, _ = taylor_jets(model, [{**mixed, flipped: -plain[flipped]}], ids, targets)
    assert relative(wrong.d2, expected.d2) > 1e-3


def test_factors_that_do_not_fit() -> None:
    model, (ids, targets) = build("qwen3"), batch(37)
    with pytest.raises(InputError, match="factors of shapes"):
        LowRank(torch.ones(4, 2), torch.ones(3, 4))
    name = next(n for n, p in model.named_parameters() if p.dim() == 2)
    with pytest.raises(InputError, match="shape"):
        taylor_jets(model, [{name: LowRank(torch.ones(4, 2), torch.ones(2, 4))}], ids, targets)
