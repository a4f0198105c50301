"""Virtual training against exact policy-gradient training, where all responses can be enumerated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tabular
import torch
from torch import Tensor
from toy import ToyTransformer

from interference.domain import Domain, Sequence
from interference.errors import InputError
from interference.forecasting.base_gradient import NEAR, gradient_update
from interference.forecasting.batches import preference_pairs, rollouts
from interference.forecasting.minibatch import Minibatches
from interference.forecasting.trainable import AdapterTrainable, Trainable, trainable
from interference.forecasting.virtual import virtual_training
from interference.model import prepare
from interference.objectives import first_order_weights
from interference.tree import dense

COUNTS = torch.tensor([[1, 1, 2], [2, 1, 1], [1, 2, 1], [1, 2, 1], [2, 1, 1]])  # probabilities of a quarter and a half
ROLLOUTS = 16  # of each prompt: every response as often as its probability says


def reward(response: tuple[int, ...]) -> float:
    return float(response[0] == 2) + 0.5 * (response[1] == response[0])


def exact(loss: Callable[[Tensor], Tensor], training: Any, start: Tensor) -> Tensor:
    """The training's optimizer of torch on the gradient of a loss that is written out."""
    weight = start.clone().requires_grad_()
    rate = training.learning_rate
    kinds: dict[str, Any] = {
        "sgd": torch.optim.SGD([weight], rate),
        "adamw": torch.optim.AdamW([weight], rate, eps=1e-8),
    }
    optimizer = kinds[training.optimizer]
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for _ in range(training.steps):
        optimizer.zero_grad()
        loss(weight).backward()
        optimizer.step()
    return weight.detach() - start


def policy_loss(weight: Tensor) -> Tensor:
    """-J, times the n / (n - 1) that the finite number of rollouts puts on every step."""
    return -tabular.value(weight, reward) * ROLLOUTS / (ROLLOUTS - 1)


def divergence(weight: Tensor, reference: Tensor) -> Tensor:
    """KL(pi || reference), a mean over the prompts."""
    total = torch.zeros((), dtype=torch.float64)
    for prompt in (3, 4):
        for y in tabular.everything():
            here, there = (tabular.log_probability(w, prompt, y) for w in (weight, reference))
            total = total + here.exp() * (here - there) / 2
    return total


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_it_is_policy_gradient_training(kind: str) -> None:
    model, data = tabular.model(COUNTS), tabular.domain(reward, COUNTS)
    training = tabular.training(optimizer=kind, learning_rate=0.5 if kind == "sgd" else 0.1, steps=25)
    found = virtual_training(model, data, training, least_ess=0.0)
    expected = exact(policy_loss, training, model.parameters["weight"])
    torch.testing.assert_close(dense(found.update["weight"]), expected, rtol=1e-7, atol=1e-9)
    assert expected.abs().max() > 0.5, "far from the base, where ratios matter"
    at = tabular.value(model.parameters["weight"] + expected, reward)
    assert abs(found.path["reward"].iloc[-1] - at) < 0.05
    assert found.draws == 25 * 2 * ROLLOUTS
    assert found.path["ess"].is_monotonic_decreasing


def test_with_a_penalty_it_descends_the_divergence_too() -> None:
    model, data = tabular.model(COUNTS), tabular.domain(reward, COUNTS)
    training, base = tabular.training(kl_beta=0.4, steps=20), model.parameters["weight"]
    scale = ROLLOUTS / (ROLLOUTS - 1)
    expected = exact(lambda w: policy_loss(w) + 0.4 * scale * divergence(w, base), training, base)
    found = virtual_training(model, data, training, least_ess=0.0)
    torch.testing.assert_close(dense(found.update["weight"]), expected, rtol=1e-7, atol=1e-9)


def test_a_new_training_begins_at_its_start() -> None:
    """Rollouts are still weighted against the base that made them; the penalty is the divergence from the start."""
    model, data = tabular.model(COUNTS), tabular.domain(reward, COUNTS)
    training, base = tabular.training(kl_beta=0.4), model.parameters["weight"]
    start = 0.7 * torch.randn(base.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = ROLLOUTS / (ROLLOUTS - 1)

    def loss(weight: Tensor) -> Tensor:
        return policy_loss(weight) + 0.4 * scale * divergence(weight, base + start)

    # self-normalised ratios leave a trace: away from the base sum rho is still n here, since every response is there
    expected = start + exact(loss, training, base + start)
    found = virtual_training(model, data, training, start={"weight": start}, least_ess=0.0)
    torch.testing.assert_close(dense(found.update["weight"]), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("begun", [False, True])
def test_dpo_is_dpo(begun: bool) -> None:
    """All pairs at once, against autograd of -log sigmoid; a training that begins elsewhere has its reference there."""
    model, data = tabular.model(COUNTS), tabular.domain(reward, COUNTS)
    training, base = tabular.training(algorithm="dpo", dpo_beta=0.5, learning_rate=2.0), model.parameters["weight"]
    start = torch.full_like(base, 0.0)
    if begun:
        start = torch.randn(base.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows, pairs = data.sequences, preference_pairs(data)

    def loss(weight: Tensor) -> Tensor:
        def moved(i: int) -> Tensor:
            prompt, y = rows[i].prompt[0], rows[i].response
            return tabular.log_probability(weight, prompt, y) - tabular.log_probability(base + start, prompt, y)

        margins = torch.stack([moved(int(c)) - moved(int(r)) for c, r in pairs])
        return -torch.nn.functional.logsigmoid(0.5 * margins).mean()

    expected = start + exact(loss, training, base + start)
    found = virtual_training(model, data, training, start={"weight": start} if begun else None)
    torch.testing.assert_close(dense(found.update["weight"]), expected, rtol=1e-7, atol=1e-9)


def test_resumed_is_continued() -> None:
    model, data = tabular.model(COUNTS), tabular.domain(reward, COUNTS)
    training = tabular.training(schedule="linear", kl_beta=0.2)
    whole = virtual_training(model, data, training, stops=[3, 5])
    assert list(whole.updates) == [3, 5, 8]
    held = {n: dense(c) for n, c in whole.updates[3].items()}
    rest = virtual_training(model, data, training, start=held, first_step=3)
    assert rest.path["step"].tolist() == [4, 5, 6, 7, 8]
    torch.testing.assert_close(dense(rest.update["weight"]), dense(whole.update["weight"]), rtol=1e-9, atol=1e-12)


def test_few_steps_stand_for_all_and_stops_are_met() -> None:
    model, data = tabular.model(COUNTS), tabular.domain(reward, COUNTS)
    training = tabular.training(steps=100, learning_rate=0.01)
    fine = virtual_training(model, data, training)
    coarse = virtual_training(model, data, training, steps_taken=10, stops=[33])
    assert 33 in coarse.path["step"].tolist()
    assert coarse.path["step"].iloc[-1] == 100
    assert len(coarse.path) <= 11
    torch.testing.assert_close(dense(coarse.update["weight"]), dense(fine.update["weight"]), rtol=0.1, atol=5e-3)


def test_tempering_holds_the_effective_share() -> None:
    """Far from the base the ratios are raised to a power below one, and the rewards' part of the path says so."""
    model, data = tabular.model(COUNTS), tabular.domain(reward, COUNTS)
    start = {"weight": torch.tensor([[0.0, 0.0, 9.0]], dtype=torch.float64).repeat(5, 1)}
    path = virtual_training(model, data, tabular.training(), start=start, least_ess=0.5).path
    assert path["ess"].iloc[0] < 0.5
    assert 0 < path["exponent"].iloc[0] < 1
    free = virtual_training(model, data, tabular.training(), start=start, least_ess=0.0).path
    assert (free["exponent"] == 1).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"first_step": 8}, "first_step"),
        ({"first_step": -1}, "first_step"),
        ({"steps_taken": 0}, "steps_taken"),
        ({"stops": [9]}, "stop after step 9"),
        ({"stops": [2], "first_step": 2}, "stop after step 2"),
    ],
)
def test_steps_outside_the_training_are_refused(options: dict[str, Any], words: str) -> None:
    model, data = tabular.model(COUNTS), tabular.domain(reward, COUNTS)
    with pytest.raises(InputError, match=words):
        virtual_training(model, data, tabular.training(), **options)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_diverged_training_is_refused(steps: int) -> None:
    """Also where only the last step leaves what is finite."""
    model, data = tabular.model(COUNTS), tabular.domain(lambda y: 1e3 * reward(y), COUNTS)
    with pytest.raises(InputError, match="learning_rate"):
        virtual_training(model, data, tabular.training(learning_rate=1e308, steps=steps))


# The gradient tier


def base_gradient(data: Domain, weight: Tensor) -> Tensor:
    """d J by `objectives`' weights and autograd."""
    at = weight.clone().requires_grad_()
    logp = torch.stack([tabular.log_probability(at, s.prompt[0], s.response) for s in data.sequences])
    (torch.from_numpy(first_order_weights("reward", data)) * logp).sum().backward()
    assert at.grad is not None
    return at.grad


@pytest.mark.parametrize("kind", ["sgd", "adamw", "sign"])
def test_gradient_tier_is_its_closed_form(kind: str) -> None:
    """One minibatch of everything: g for sgd, sign(g) for sign and for Adam, whose v is then g^2; times the rates' sum."""
    model, data = tabular.model(COUNTS), tabular.domain(reward, COUNTS)
    training = tabular.training(optimizer=kind, schedule="linear", weight_decay=0.1 if kind == "adamw" else 0.0)
    g, weight = base_gradient(data, model.parameters["weight"]), model.parameters["weight"]
    step = {"sgd": g, "sign": g.sign(), "adamw": g / (g.abs() + 1e-8) - 0.1 * weight}[kind]
    found = dense(gradient_update(model, data, training).update["weight"])
    torch.testing.assert_close(found, sum(training.rates()) * step, rtol=1e-6, atol=1e-9)


def test_gradient_tier_normalises_by_minibatches() -> None:
    """Two minibatches, one prompt each: Adam divides the mean by the root mean square, sign averages signs, sgd clips each."""
    model, data = tabular.model(COUNTS), tabular.domain(reward, COUNTS)
    parts = [Domain("d", tuple(s for s in data.sequences if s.prompt[0] == p)) for p in (3, 4)]
    g = [base_gradient(p, model.parameters["weight"]) for p in parts]
    small = {"prompts_per_step": 1, "generations": ROLLOUTS, "learning_rate": 1.0, "steps": 10}
    adam = gradient_update(model, data, tabular.training(optimizer="adamw", **small)).update["weight"]
    mean, square = (g[0] + g[1]) / 2, (g[0] ** 2 + g[1] ** 2) / 2
    torch.testing.assert_close(dense(adam), 10 * mean / (square.sqrt() + 1e-8), rtol=1e-6, atol=1e-9)
    sign = gradient_update(model, data, tabular.training(optimizer="sign", **small)).update["weight"]
    torch.testing.assert_close(dense(sign), 10 * (g[0].sign() + g[1].sign()) / 2)
    clipped = gradient_update(model, data, tabular.training(max_grad_norm=0.01, **small)).update["weight"]
    expected = 10 * sum(0.01 * x / (x.norm() + 1e-6) for x in g) / 2
    torch.testing.assert_close(dense(clipped), expected, rtol=1e-6, atol=1e-9)


def test_gradient_tier_of_dpo_is_its_gradient_at_the_base() -> None:
    """beta / 2 times the mean difference of the scores of chosen and rejected."""
    model, data = tabular.model(COUNTS), tabular.domain(reward, COUNTS)
    weight = model.parameters["weight"].clone().requires_grad_()
    rows = data.sequences
    logp = torch.stack([tabular.log_probability(weight, s.prompt[0], s.response) for s in rows])
    pairs = torch.from_numpy(preference_pairs(data))
    (logp[pairs[:, 0]] - logp[pairs[:, 1]]).mean().backward()
    training = tabular.training(algorithm="dpo", dpo_beta=0.6, learning_rate=1.0, steps=1)
    found = gradient_update(model, data, training).update["weight"]
    assert weight.grad is not None
    torch.testing.assert_close(dense(found), 0.3 * weight.grad, rtol=1e-9, atol=1e-12)


def test_gradient_tier_of_an_adapter_moves_both_factors() -> None:
    """By the chain rule from gradients of the whole matrices, at the base and a little along the way of B."""
    rng, rows = np.random.default_rng(0), []
    for i in range(32):
        response = tuple(int(t) for t in rng.integers(0, 23, 4))
        rows.append(Sequence((i // 4, 5), response, f"p{i // 4}", float(response[0] % 2)))
    model, data = prepare(ToyTransformer.seeded(0)), Domain("d", tuple(rows))
    training = tabular.training(steps=4, adapter={"rank": 2, "alpha": 6})
    lora, total = trainable(model, training.adapter), sum(training.rates())
    assert isinstance(lora, AdapterTrainable)
    factors = {n: lora.leaves[f"{n}.a"].detach() for n in lora.flipped}

    def whole(start: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves, source = Trainable(model, start), rollouts(data, training)
        Minibatches(leaves, source, 4096).accumulate(np.arange(len(data.sequences)), None)
        return {n: leaf.grad for n, leaf in leaves.leaves.items() if leaf.grad is not None}

    first = whole({})
    b = {n: 3 * first[n] @ a.t() for n, a in factors.items()}
    then = whole({n: 3 * -NEAR * total * b[n] @ a for n, a in factors.items()})
    found = gradient_update(model, data, training).update
    assert set(found) == set(factors)
    for name, a in factors.items():
        up = -total * (b[name] + 3 * then[name] @ a.t()) / 2
        down = a + total * total / 2 * 3 * b[name].t() @ then[name]  # B is half its length on average
        torch.testing.assert_close(dense(found[name]), 3 * up @ down, rtol=1e-6, atol=1e-9)
        assert not torch.allclose(down, a, rtol=1e-4), "the oracle sees no movement of A"


def test_first_step_of_virtual_training_is_the_gradient_tier() -> None:
    model, data = tabular.model(COUNTS), tabular.domain(reward, COUNTS)
    for kind in ("sgd", "adamw", "sign"):
        training = tabular.training(optimizer=kind, steps=1)
        both = virtual_training(model, data, training).update, gradient_update(model, data, training).update
        torch.testing.assert_close(dense(both[0]["weight"]), dense(both[1]["weight"]), rtol=1e-6, atol=1e-9)


def test_equal_sequences_and_batches_of_any_size_give_the_same_gradient() -> None:
    model, data = tabular.model(COUNTS), tabular.domain(reward, COUNTS)
    whole, pieces = (virtual_training(model, data, tabular.training(), batch_tokens=n) for n in (100_000, 7))
    torch.testing.assert_close(dense(whole.update["weight"]), dense(pieces.update["weight"]), rtol=1e-9, atol=1e-12)


def test_the_oracle_catches_a_planted_error() -> None:
    """Rollouts that are not the base's (every response once, from a policy that is not uniform) train to somewhere else."""
    model = tabular.model(COUNTS)
    training = tabular.training(steps=25)
    found = virtual_training(model, tabular.domain(reward), training, least_ess=0.0)
    expected = exact(policy_loss, training, model.parameters["weight"])
    assert (dense(found.update["weight"]) - expected).abs().max() > 0.05
    assert np.isfinite(found.path["gradient_norm"]).all()
    assert Sequence((3,), (0, 0), "d-3", reward((0, 0))) in tabular.domain(reward).sequences


def sampled(model: Any, prompt_ids: Any, seed: int, count: int = 1000) -> Domain:
    """Rollouts of one token of the model as it is."""
    probability = model.parameters["weight"].detach().softmax(-1).numpy()
    rng, rows = np.random.default_rng(seed), []
    for name in dict.fromkeys(prompt_ids):
        for y in rng.choice(tabular.TOKENS, count, p=probability[3]):
            rows.append(Sequence((3,), (int(y),), name, float(y == 2)))
    return Domain("d", tuple(rows))


def test_renewed_rollouts_keep_the_penalty_s_reference() -> None:
    """With a KL penalty the optimum is pi_base exp(r / beta) / Z, however often the rollouts are renewed on the way."""
    model = tabular.model(COUNTS)
    training = tabular.training(kl_beta=0.5, steps=80, learning_rate=2.0, generations=10_000)

    def resample(prompt_ids: Any, seed: int) -> Domain:
        return sampled(model, prompt_ids, seed)

    found = virtual_training(model, sampled(model, ["p", "q"], 0), training, least_ess=0.9, resample=resample)
    assert found.path["rollouts"].iloc[-1] > 1, "never renewed: nothing is tested"
    weight = model.parameters["weight"][3]
    optimum = (weight + torch.tensor([0.0, 0.0, 1.0]) / 0.5).softmax(-1)
    torch.testing.assert_close((weight + dense(found.update["weight"])[3]).softmax(-1), optimum, rtol=0.0, atol=0.02)
