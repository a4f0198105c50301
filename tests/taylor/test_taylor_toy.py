"""Jets of a truly float64 transformer against four oracles, each with a planted bug that it must catch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from taylor_oracles import Update, batch, directions, moved, nested, relative, token_logp, worst
from torch import Tensor
from torch.func import grad
from torch.func import jvp as forward
from toy import ToyConfig, ToyTransformer

from interference.errors import InputError
from interference.taylor import TokenTerms, basis, taylor_jets

K = 3


@pytest.fixture(scope="module")
def toy() -> ToyTransformer:
    return ToyTransformer.seeded(0)


@pytest.fixture(scope="module")
def updates(toy: ToyTransformer) -> list[Update]:
    """Three updates, of which one leaves out some parameters and another is much smaller."""
    a, b, c = directions(toy, K)
    return [
        a,
        {n: x for n, x in b.items() if "gate" not in n and "embed" not in n},
        {n: 1e-3 * x for n, x in c.items()},
    ]


def nested_error(toy: ToyTransformer, updates: list[Update]) -> float:
    ids, targets = batch(23)
    got, fallbacks = taylor_jets(toy, updates, ids, targets)
    assert not fallbacks
    expected = nested(toy, updates, ids, targets)
    sizes = torch.tensor([1.0, 1.0, 1e3], dtype=torch.float64)[:, None]
    scaled = [
        TokenTerms(t.logp, t.d1 * sizes, t.d2 * sizes * sizes[:, None], t.fisher * sizes * sizes[:, None])
        for t in (got, expected)
    ]
    return worst(*scaled)


def reverse_error(toy: ToyTransformer, updates: list[Update]) -> float:
    """Sums over tokens against a gradient and forward-over-reverse Hessian products."""
    ids, targets = batch(23)
    got, _ = taylor_jets(toy, updates, ids, targets)
    full = [{n: u.get(n, torch.zeros_like(p)) for n, p in toy.named_parameters()} for u in updates]

    def total(p: dict[str, Tensor]) -> Tensor:
        return token_logp(toy, p, ids, targets).sum()

    point = {n: p.detach() for n, p in toy.named_parameters()}
    gradient = grad(total)(point)

    def dot(a: Update, b: Update) -> Tensor:
        return torch.stack([(a[n] * b[n]).sum() for n in point]).sum()

    products = [forward(grad(total), (point,), (u,))[1] for u in full]
    d1 = torch.stack([dot(gradient, u) for u in full])
    d2 = torch.stack([torch.stack([dot(h, u) for u in full]) for h in products])
    size = d2.diagonal().abs().sqrt()
    return max(relative(got.d1.sum(-1), d1), float(((got.d2.sum(-1) - d2) / (size[:, None] * size)).abs().max()))


def difference_error(toy: ToyTransformer, updates: list[Update]) -> float:
    """Central differences of logp along the first two updates and their sum, at the best of several steps."""
    ids, targets = batch(23)
    got, _ = taylor_jets(toy, updates, ids, targets)

    def logp(*alphas: float) -> Tensor:
        return token_logp(toy, moved(toy, updates[: len(alphas)], alphas), ids, targets)

    errors = []
    for h in (1e-2, 1e-3, 3e-4, 1e-4):
        first = (logp(h) - logp(-h)) / (2 * h)
        second = (logp(h) - 2 * logp(0.0) + logp(-h)) / h**2
        mixed = (logp(h, h) - logp(h, -h) - logp(-h, h) + logp(-h, -h)) / (4 * h * h)
        pairs = ((got.d1[0], first), (got.d2[0, 0], second), (got.d2[0, 1], mixed))
        errors.append([relative(a, b) for a, b in pairs])
    return max(min(column) for column in zip(*errors, strict=True))


def diagonal_error(toy: ToyTransformer, updates: list[Update]) -> float:
    """Diagonal mode and one update at a time against all pairs."""
    ids, targets = batch(23)
    got, _ = taylor_jets(toy, updates, ids, targets)
    diagonal, _ = taylor_jets(toy, updates, ids, targets, pairs=False)
    errors = []
    for k, update in enumerate(updates):
        alone, _ = taylor_jets(toy, [update], ids, targets, token_chunk=2)
        for one in (diagonal.d1[k], alone.d1[0]):
            errors.append(relative(one, got.d1[k]))
        for name in ("d2", "fisher"):
            errors.append(relative(getattr(diagonal, name)[k], getattr(got, name)[k, k]))
            errors.append(relative(getattr(alone, name)[0, 0], getattr(got, name)[k, k]))
    return max(errors)


ORACLES = {nested_error: 1e-10, reverse_error: 1e-10, difference_error: 1e-5, diagonal_error: 1e-10}


@pytest.mark.parametrize("oracle", ORACLES)
def test_agrees_with(oracle: Callable[..., float], toy: ToyTransformer, updates: list[Update]) -> None:
    assert oracle(toy, updates) < ORACLES[oracle]


@pytest.mark.parametrize("oracle", ORACLES)
def test_oracle_catches_a_dropped_cross_term(
    oracle: Callable[..., float], toy: ToyTransformer, updates: list[Update], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products whose second order lacks x_k y_l: small, and wrong only in d2. One mode only, for the mode oracle."""
    right = basis._cross

    def wrong(which: basis.Basis, y: Tensor, a: Tensor, b: Tensor) -> None:
        if oracle is diagonal_error and not which.pairs:
            right(which, y, a, b)

    monkeypatch.setattr(basis, "_cross", wrong)
    assert oracle(toy, updates) > 100 * ORACLES[oracle]


def test_untied_head_and_untouched_head(toy: ToyTransformer) -> None:
    model = ToyTransformer.seeded(3, ToyConfig(tie_word_embeddings=False))
    ids, targets = batch(23)
    for names in (
        ["head.weight"],
        ["embed.weight"],
        ["layers.1.down.weight"],
        ["norm.weight", "layers.0.attention.q.bias"],
    ):
        ups = [{n: u[n] for n in names} for u in directions(model, 2)]
        got, _ = taylor_jets(model, ups, ids, targets)
        expected = nested(model, ups, ids, targets)
        for name in ("d1", "fisher"):
            assert relative(getattr(got, name), getattr(expected, name)) < 1e-10
        torch.testing.assert_close(got.d2, expected.d2, rtol=1e-10, atol=1e-13)


def test_an_update_of_nothing_is_zero(toy: ToyTransformer) -> None:
    ids, targets = batch(23)
    got, _ = taylor_jets(toy, [{}], ids, targets)
    assert torch.equal(got.d1, torch.zeros_like(got.d1))
    assert torch.equal(got.d2, torch.zeros_like(got.d2))
    torch.testing.assert_close(got.logp, token_logp(toy, dict(toy.named_parameters()), ids, targets))


def test_float32_is_close_to_float64(toy: ToyTransformer, updates: list[Update]) -> None:
    ids, targets = batch(23)
    narrow = ToyTransformer.seeded(0, dtype=torch.float64).float()
    got, _ = taylor_jets(narrow, [updates[0]], ids, targets)
    assert got.d2.dtype == torch.float32
    expected, _ = taylor_jets(toy, [updates[0]], ids, targets)
    wide = TokenTerms(*(getattr(got, f).double() for f in ("logp", "d1", "d2", "fisher")))
    assert worst(wide, expected) < 2e-5


def test_no_pads_no_order_no_chunks_matter(toy: ToyTransformer, updates: list[Update]) -> None:
    ids, targets = batch(23)
    got, _ = taylor_jets(toy, updates[:1], ids, targets)
    padded = torch.cat([ids, torch.full((3, 70), 5)], 1), torch.cat([targets, torch.zeros(3, 70, dtype=torch.bool)], 1)
    again, _ = taylor_jets(toy, updates[:1], *padded, token_chunk=1)
    assert worst(again, got) < 1e-12


def test_rows_may_go_in_groups(toy: ToyTransformer, updates: list[Update], monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of one row, of which one has nothing to score and all are cut off behind their last target."""
    from interference.taylor import run

    ids, targets = batch(23)
    targets[1], targets[2, 5:] = False, False
    got, _ = taylor_jets(toy, updates, ids, targets)
    monkeypatch.setattr(run, "TOKENS", 9)
    again, _ = taylor_jets(toy, updates, ids, targets)
    assert worst(again, got) < 1e-12


def test_long_sequences_are_attended_in_blocks(
    toy: ToyTransformer, updates: list[Update], monkeypatch: pytest.MonkeyPatch
) -> None:
    from interference.taylor import attention

    monkeypatch.setattr(attention, "BLOCK", 2000)
    monkeypatch.setattr(attention, "QUERIES", 4)
    assert nested_error(toy, updates) < 1e-10


def test_parameters_come_back_on_success_and_on_error(toy: ToyTransformer, updates: list[Update]) -> None:
    ids, targets = batch(23)
    before = {n: (id(p), p.clone()) for n, p in toy.named_parameters()}
    taylor_jets(toy, updates, ids, targets)

    def fail(*_: object) -> None:
        raise KeyError("in the middle")

    hook = toy.layers[1].register_forward_hook(fail)
    with pytest.raises(KeyError):
        taylor_jets(toy, updates, ids, targets)
    hook.remove()
    assert toy.head.weight is toy.embed.weight
    for n, p in toy.named_parameters():
        assert id(p) == before[n][0]
        assert torch.equal(p, before[n][1])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m, u, i, t: (m, [], i, t), "no updates"),
        (lambda m, u, i, t: (m, [{"embed.wight": u["embed.weight"]}], i, t), "embed.weight"),
        (lambda m, u, i, t: (m, [{"norm.weight": u["embed.weight"]}], i, t), "shape"),
        (lambda m, u, i, t: (m, [u], i, t.long()), "bool"),
        (lambda m, u, i, t: (m, [u], i, torch.ones_like(t)), "position 0"),
        (lambda m, u, i, t: (ToyTransformer.seeded(0).bfloat16(), [u], i, t), "bfloat16"),
        (lambda m, u, i, t: (ToyTransformer.seeded(0).train(), [u], i, t), "training"),
    ],
)
def test_input_that_does_not_fit(change: Callable[..., tuple], says: str, toy: ToyTransformer) -> None:  # type: ignore[type-arg]
    ids, targets = batch(23)
    with pytest.raises(InputError, match=says):
        taylor_jets(*change(toy, directions(toy, 1)[0], ids, targets))
