"""Jets against independent oracles on a float64 toy transformer, and objectives against an enumerated policy."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from toy import ToyConfig, ToyTransformer

from interference import derivatives, objectives, tree
from interference.checksum import checksum
from interference.domain import Batch, Domain, Sequence, batches
from interference.errors import InputError
from interference.jets import ENGINES, sequence_jets, token_jets
from interference.model import Model, prepare

K = 3


def directions(model: Model, count: int = K, scale: float = 0.3) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(7)
    return [
        {n: scale * torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in model.parameters.items()}
        for _ in range(count)
    ]


def ragged(vocabulary: int = 23, count: int = 9) -> list[Sequence]:
    """Sequences of different lengths; token 0, which is also the padding, occurs as content."""
    g = torch.Generator().manual_seed(3)
    out = []
    for i in range(count):
        p, r = (int(torch.randint(1, 6, (1,), generator=g)) for _ in range(2))
        ids = torch.randint(0, vocabulary, (p + r,), generator=g).tolist()
        ids[p - 1] = 0
        out.append(Sequence(tuple(ids[:p]), tuple(ids[p:]), f"p{i // 2}", float(i % 3 == 0)))
    return out


def one_batch(sequences: list[Sequence]) -> Batch:
    (batch,) = batches(sequences, tokens=10**6)
    return batch


def total_logp(model: Model, batch: Batch, moved: dict[str, Tensor]) -> Tensor:
    return derivatives.sequence_logp(model, moved, batch).sum()


@pytest.mark.parametrize("engine", ENGINES)
def test_jets_equal_reverse_mode_products(toy: Model, engine: str) -> None:
    batch, ds = one_batch(ragged()), directions(toy)
    jets, fallbacks = token_jets(toy, ds, batch, engine=engine)
    assert not fallbacks

    def f(p: dict[str, Tensor]) -> Tensor:
        return total_logp(toy, batch, p)

    torch.testing.assert_close(jets.logp.sum(), f(toy.parameters), rtol=1e-10, atol=0)
    for k in range(K):
        gradient, product = derivatives.hvp(f, toy.parameters, ds[k])
        assert float(jets.d1[k].sum()) == pytest.approx(tree.dot(gradient, ds[k]), rel=1e-8)
        for other in range(K):
            assert float(jets.d2[k, other].sum()) == pytest.approx(tree.dot(product, ds[other]), rel=1e-8)


@pytest.mark.parametrize("engine", ENGINES)
def test_fisher_equals_the_gauss_newton_product(toy: Model, engine: str) -> None:
    batch, ds = one_batch(ragged()), directions(toy)
    jets, _ = token_jets(toy, ds, batch, engine=engine)
    labels = batch.input_ids[batch.targets]

    def outputs(p: dict[str, Tensor]) -> Tensor:
        return toy.logits(p, batch.input_ids)[:, :-1][batch.targets[:, 1:]]

    def loss(z: Tensor) -> Tensor:
        return -z.log_softmax(-1).gather(-1, labels[:, None]).sum()

    for k, other in itertools.product(range(K), repeat=2):
        product = derivatives.ggn(outputs, loss, toy.parameters, ds[k])
        assert float(jets.fisher[k, other].sum()) == pytest.approx(tree.dot(product, ds[other]), rel=1e-8)


@pytest.mark.parametrize("engine", ENGINES)
def test_jets_equal_step_swept_differences(toy: Model, engine: str) -> None:
    """The best step of a sweep: no derivative code is shared with what is tested."""
    batch, ds = one_batch(ragged()), directions(toy, 1)
    jets, _ = token_jets(toy, ds, batch, engine=engine)

    def at(t: float) -> float:
        with toy.at(ds, [t]), torch.no_grad():
            z = toy.forward(batch.input_ids)[:, :-1][batch.targets[:, 1:]]
            return float(z.log_softmax(-1).gather(-1, batch.input_ids[batch.targets][:, None]).sum())

    steps = [10.0**-e for e in np.arange(1.5, 5, 0.25)]
    first = [abs((at(h) - at(-h)) / (2 * h) / float(jets.d1.sum()) - 1) for h in steps]
    second = [abs((at(h) - 2 * at(0) + at(-h)) / h**2 / float(jets.d2.sum()) - 1) for h in steps]
    assert min(first) < 1e-5
    assert min(second) < 1e-5


def test_the_oracle_sees_a_dropped_cross_term(toy: Model) -> None:
    """The planted bug: forgetting that the softmax curves (d2 without -fisher) must not pass."""
    batch, ds = one_batch(ragged()), directions(toy, 1)
    jets, _ = token_jets(toy, ds, batch, engine="nested")
    _, product = derivatives.hvp(lambda p: total_logp(toy, batch, p), toy.parameters, ds[0])
    wrong = float((jets.d2 + jets.fisher).sum())
    assert wrong != pytest.approx(tree.dot(product, ds[0]), rel=1e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_diagonal_alone_equals_the_diagonal_of_all_pairs(toy: Model, engine: str) -> None:
    batch, ds = one_batch(ragged()), directions(toy)
    every, _ = token_jets(toy, ds, batch, engine=engine)
    alone, _ = token_jets(toy, ds, batch, pairs=False, engine=engine)
    torch.testing.assert_close(alone.d2, torch.stack([every.d2[k, k] for k in range(K)]), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        alone.fisher, torch.stack([every.fisher[k, k] for k in range(K)]), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_ragged_batch_splits_change_nothing(toy: Model, engine: str) -> None:
    sequences, ds = ragged(), directions(toy)
    whole, _ = sequence_jets(toy, ds, sequences, engine=engine)
    for tokens in (1, 13, 30):
        split, _ = sequence_jets(toy, ds, sequences, engine=engine, batch_tokens=tokens)
        for name in whole.__dataclass_fields__:
            np.testing.assert_allclose(getattr(split, name), getattr(whole, name), rtol=1e-10, atol=1e-10)


def test_an_update_of_some_tensors_leaves_the_others_at_rest(toy: Model) -> None:
    batch = one_batch(ragged())
    full = directions(toy, 1)[0]
    part = {n: t for n, t in full.items() if "down" in n}
    padded = {n: t if n in part else torch.zeros_like(t) for n, t in full.items()}
    for engine in ENGINES:
        a, _ = token_jets(toy, [part], batch, engine=engine)
        b, _ = token_jets(toy, [padded], batch, engine=engine)
        torch.testing.assert_close(a.d2, b.d2, rtol=1e-10, atol=1e-12)


def test_unknown_engine_is_refused(toy: Model) -> None:
    with pytest.raises(InputError, match="taylor"):
        token_jets(toy, directions(toy, 1), one_batch(ragged()), engine="tailor")


def enumerated() -> tuple[Model, Domain, list[dict[str, Tensor]]]:
    """Every response of two tokens over a vocabulary of five to one prompt, with arbitrary rewards."""
    model = prepare(ToyTransformer.seeded(1, ToyConfig(vocab_size=5)))
    g = torch.Generator().manual_seed(11)
    every = [
        Sequence((2, 3), y, "only", float(torch.randn((), generator=g))) for y in itertools.product(range(5), repeat=2)
    ]
    return model, Domain("toy", tuple(every)), directions(model, 2)


@pytest.mark.parametrize("engine", ENGINES)
def test_expected_reward_equals_an_enumerated_policy(engine: str) -> None:
    """J(theta) = sum_y pi(y) r(y), differentiated by torch.func, against E_pi of the per-sequence terms."""
    model, domain, ds = enumerated()
    batch = one_batch(list(domain.sequences))
    rewards = torch.tensor([domain.sequences[i].reward for i in batch.index], dtype=torch.float64)

    def expected_reward(p: dict[str, Tensor]) -> Tensor:
        return (derivatives.sequence_logp(model, p, batch).exp() * rewards).sum()

    jets, _ = sequence_jets(model, ds, list(domain.sequences), engine=engine)
    policy = np.exp(jets.logp)
    assert policy.sum() == pytest.approx(1.0, rel=1e-12)
    terms, n = objectives.sequence_terms("reward", jets, domain), len(domain.sequences)
    # With one prompt, w (r - b) = (r - mean r) / (n - 1): under the policy that is (r - const) / (n - 1).
    slope = (n - 1) * (policy[:, None] * terms.slope).sum(0)
    curvature = (n - 1) * (policy[:, None, None] * terms.curvature).sum(0)
    for k in range(2):
        gradient, product = derivatives.hvp(expected_reward, model.parameters, ds[k])
        assert slope[k] == pytest.approx(tree.dot(gradient, ds[k]), rel=1e-8)
        for other in range(2):
            assert curvature[k, other] == pytest.approx(tree.dot(product, ds[other]), rel=1e-8)


def test_the_enumerated_policy_sees_a_missing_score_term() -> None:
    """The planted bug: E[(r-b) s2] without s1 s1' is not the Hessian of the expected reward."""
    model, domain, ds = enumerated()
    jets, _ = sequence_jets(model, ds, list(domain.sequences), engine="nested")
    policy, rewards = np.exp(jets.logp), np.asarray(domain.rewards())
    right = (policy * rewards) @ (jets.d2[:, 0, 0] + jets.d1[:, 0] ** 2)
    wrong = (policy * rewards) @ jets.d2[:, 0, 0]
    assert wrong != pytest.approx(right, rel=1e-2)


@pytest.mark.parametrize("objective", ["nll", "surrogate", "reward"])
def test_objectives_equal_the_differentiated_loss(toy: Model, objective: str) -> None:
    """The ratio of sums, for slope, Hessian, against torch.func on the scalar that the objective stands for."""
    sequences, ds = ragged(), directions(toy, 2, 0.1)
    domain, batch = Domain("d", tuple(sequences)), one_batch(sequences)
    jets, _ = sequence_jets(toy, ds, sequences, engine="nested")
    terms = objectives.sequence_terms(objective, jets, domain)
    labels = batch.input_ids[batch.targets]
    place = batch.targets.nonzero()[:, 0]
    anchor = (
        toy.logits({}, batch.input_ids)[:, :-1][batch.targets[:, 1:]].log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    )

    def loss(p: dict[str, Tensor]) -> Tensor:
        z = toy.logits(p, batch.input_ids)[:, :-1][batch.targets[:, 1:]]
        logp = z.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        if objective == "nll":
            return -logp.mean()
        _, weight, advantage = objectives.reward_terms(domain)
        c = torch.from_numpy(weight * advantage / weight.sum())[list(batch.index)]
        if objective == "surrogate":
            return (c[place] * (logp - anchor).exp()).sum()
        change = torch.zeros(len(sequences), dtype=torch.float64).index_add(0, place, logp - anchor)
        return (c * change.exp()).sum()

    gradient, product = derivatives.hvp(loss, toy.parameters, ds[0])
    denominator = terms.denominator.sum()
    for other in range(2):
        assert terms.slope[:, other].sum() / denominator == pytest.approx(tree.dot(gradient, ds[other]), rel=1e-8)
        assert terms.curvature[:, 0, other].sum() / denominator == pytest.approx(tree.dot(product, ds[other]), rel=1e-8)


def test_first_order_weights_give_the_gradient(toy: Model) -> None:
    domain, ds = Domain("d", tuple(ragged())), directions(toy, 1)
    jets, _ = sequence_jets(toy, ds, list(domain.sequences), engine="nested")
    for objective in ("nll", "reward", "surrogate"):
        terms = objectives.sequence_terms(objective, jets, domain)
        gradient = derivatives.objective_gradient(toy, domain, objective, batch_tokens=20)
        assert terms.slope.sum() / terms.denominator.sum() == pytest.approx(tree.dot(gradient, ds[0]), rel=1e-8)


def test_equal_rewards_are_refused() -> None:
    domain = Domain("flat", tuple(replace(s, reward=1.0) for s in ragged()))
    with pytest.raises(InputError, match="every reward equal to 1"):
        objectives.reward_terms(domain)


def test_weights_are_restored_and_checked(toy: Model) -> None:
    before = {n: p.clone() for n, p in toy.parameters.items()}
    with toy.untouched(), toy.at(directions(toy, 2), [1.0, -0.5]):
        assert not torch.equal(next(iter(toy.parameters.values())), next(iter(before.values())))
    for name, p in toy.parameters.items():
        assert torch.equal(p, before[name])
    with pytest.raises(RuntimeError, match="weights changed"), toy.untouched():
        next(iter(toy.parameters.values())).add_(1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_checksum_sees_order_single_bits_and_buffers(dtype: torch.dtype) -> None:
    """Sums of values and squares do not see a permutation."""
    module = ToyTransformer.seeded(0)
    module.register_buffer("scale", torch.arange(4.0))
    module.register_buffer("cache", torch.zeros(2), persistent=False)
    model = prepare(module.to(dtype))
    weight, before = model.parameters["embed.weight"], model.checksum()
    assert model.checksum() == before

    def changed(x: Tensor, value: Tensor) -> bool:
        saved = x.clone()
        x.copy_(value)
        found = model.checksum() != before
        x.copy_(saved)
        return found

    assert changed(weight, weight.flip(0))
    assert changed(weight, weight[:, torch.randperm(16, generator=torch.Generator().manual_seed(0))])
    assert changed(weight, weight.index_select(0, torch.tensor([1, 0, *range(2, 23)])))
    nudged = weight.clone()
    nudged[3, 3] = torch.nextafter(nudged[3, 3], nudged[3, 3] + 1) if dtype != torch.bfloat16 else nudged[3, 3] * 1.01
    assert changed(weight, nudged)
    assert changed(module.scale, module.scale.flip(0))
    assert not changed(module.cache, torch.ones(2))
    assert model.checksum() == before
    long = torch.arange(3 * 2**20 + 5, dtype=torch.float32)  # several blocks
    assert checksum({"w": long}) == checksum({"w": long.clone()})
    assert checksum({"w": long}) != checksum({"w": long.roll(2**20)})
    assert checksum({"w": long[::2]}) == checksum({"w": long[::2].clone()})


@pytest.mark.parametrize("engine", ENGINES)
def test_jets_of_what_does_not_fit_are_refused(toy: Model, engine: str) -> None:
    """The reference must not answer zero where the other engine refuses."""
    batch, d = one_batch(ragged()), directions(toy, 1)[0]
    weight = d["norm.weight"]
    wrong: list[tuple[list[dict[str, Tensor]], str]] = [
        ([{"norm.wieght": weight}], "did you mean 'norm.weight'"),
        ([d, {"norm.weight": weight[:-1]}], r"norm.weight' with shape \(15,\)"),
        ([], "no updates|differentiate along"),
    ]
    for updates, message in wrong:
        with pytest.raises(InputError, match=message):
            token_jets(toy, updates, batch, engine=engine)
    first = Batch(batch.input_ids, torch.ones_like(batch.targets), batch.index)
    with pytest.raises(InputError, match="target at position 0"):
        token_jets(toy, [d], first, engine=engine)
    toy.module.train()
    with pytest.raises(InputError, match="training mode"):
        token_jets(toy, [d], batch, engine=engine)
    toy.module.eval()
    narrow = token_jets(toy, [{"norm.weight": weight.float()}], batch, engine=engine)[0]
    same = token_jets(toy, [{"norm.weight": weight.float().double()}], batch, engine=engine)[0]
    assert torch.equal(narrow.d2, same.d2)


def test_a_gradient_that_moves_the_weights_is_noticed(toy: Model) -> None:
    module, right = toy.module, toy.module.forward
    memory = toy.parameters["norm.weight"].numpy()

    def forward(input_ids: Tensor, use_cache: bool = False) -> object:
        memory[:] = np.roll(memory, 1)  # behind torch's back, as a kernel of its own would
        return right(input_ids)

    domain = Domain("d", tuple(ragged()))
    derivatives.objective_gradient(toy, domain, "nll")
    module.forward = forward
    with pytest.raises(RuntimeError, match="weights changed"):
        derivatives.objective_gradient(toy, domain, "nll")
