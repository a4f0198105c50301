"""forecast: against trainings that are really made, by enumeration, and on a toy transformer with planted domains."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import tabular
import torch
from torch import Tensor
from toy import ToyTransformer

from interference import tree
from interference.derivatives import objective_gradient
from interference.domain import Domain, Sequence
from interference.errors import InputError
from interference.forecasting import tried
from interference.forecasting.estimation import Pilot, estimate_update
from interference.forecasting.first_order import FirstOrder
from interference.forecasting.outcomes import REACH, moved, telling, within_reach
from interference.forecasting.prediction import Forecast, forecast
from interference.forecasting.training import Training
from interference.forecasting.tried import first_prompts, present_value
from interference.measurement import score
from interference.model import Model, prepare
from interference.probes.halves import prompt_halves
from interference.tree import dense

REWARDS = {"a": lambda y: float(y[0] == 2), "b": lambda y: float(y[0] == 0) + 0.5 * (y[1] == 2)}
COPIES = 4  # prompts of the same token, so that halves of the prompts hold the same
PER_PROMPT = 9


def enumerated(name: str) -> Domain:
    rows = tabular.domain(REWARDS[name], prompts=(3,)).sequences * COPIES
    ids = [f"{name}{i // PER_PROMPT}" for i in range(len(rows))]
    return Domain(name, tuple(Sequence(s.prompt, s.response, i, s.reward) for s, i in zip(rows, ids, strict=True)))


def trained(model: Model, name: str, training: Training, steps: int, start: Tensor | None = None) -> Tensor:
    """The update of exact policy-gradient training, its steps as long as rollouts without the own one make them."""
    base = model.parameters["weight"]
    weight = (base if start is None else base + start).clone().requires_grad_()
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(tabular.value(weight, REWARDS[name], prompts=(3,)), weight)
        weight = (weight + training.learning_rate * PER_PROMPT / (PER_PROMPT - 1) * gradient).detach().requires_grad_()
    return weight.detach() - base


def measured(model: Model, update: Tensor, name: str) -> float:
    """The exact change times n / (n - 1): baselines leave out the own response, which here, unlike among random ones, is
    known to be missing from the others."""
    base = model.parameters["weight"]
    after, before = (tabular.value(w, REWARDS[name], prompts=(3,)) for w in (base + update, base))
    return float(after - before) * PER_PROMPT / (PER_PROMPT - 1)


def options(**more: Any) -> dict[str, Any]:
    return {"device": "cpu", "quadratic": False, "least_ess": 0.0} | more


@pytest.mark.parametrize("tier", ["virtual", "pilot"])
def test_forecast_is_what_training_does(tier: Any) -> None:
    """Halves that hold the same, all responses, and all steps taken: every cell is the real training's own change."""
    model, domains = tabular.model(prompts=1), {name: enumerated(name) for name in REWARDS}
    training = tabular.training(steps=10, learning_rate=1.0)
    pilots = {n: Pilot({"weight": trained(model, n, training, 2)}, 2) for n in domains} if tier == "pilot" else None
    found = forecast(model, domains, training=training, tier=tier, effort=2.0, pilots=pilots, **options())
    for update in domains:
        for domain in domains:
            expected = measured(model, trained(model, update, training, 10), domain)
            assert found.matrix().loc[update, domain] == pytest.approx(expected, abs=1e-9)
    assert abs(found.matrix().loc["a", "b"]) > 0.05
    assert (found.cells["noise_term"].abs() < 1e-9).all()
    np.testing.assert_allclose(found.cells["agreement"], 1.0)
    assert found.cells["own"].tolist() == [True, False, False, True]


def test_gradient_tier_tells_the_first_order_within_the_rewards_range() -> None:
    """What a small part of the first step does, as often as it takes; so much less as it comes near the ends of the range."""
    model, domains = tabular.model(prompts=1), {name: enumerated(name) for name in REWARDS}
    training = tabular.training(steps=1, learning_rate=3.0)
    found = forecast(model, domains, training=training, tier="gradient", **options())
    present = float(tabular.value(model.parameters["weight"], REWARDS["b"], prompts=(3,)))
    for update in domains:
        near = measured(model, 1e-6 * trained(model, update, training, 1), "b") / 1e-6
        expected, left = within_reach(near, present, 0.0, 1.5)
        assert found.matrix().loc[update, "b"] == pytest.approx(expected, abs=1e-6)
        assert 0.5 < left < 0.95, "the oracle sees no bound"
    assert set(found.cells["route"]) == {"first"}


def test_where_weights_fail_the_first_order_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that leaves fewer effective rollouts than are asked for, without samplers and quadratic models."""
    model, domains = tabular.model(prompts=1), {name: enumerated(name) for name in REWARDS}
    training = tabular.training(steps=10, learning_rate=3.0)
    monkeypatch.setattr(tried, "LOW_ESS", 0.6)
    found = forecast(model, domains, training=training, tier="virtual", effort=2.0, **options())
    failed = found.cells["ess"] < 0.6
    assert failed.any()
    assert set(found.cells["route"][failed]) == {"first"}
    for cell in found.cells[failed].itertuples():
        near = measured(model, REACH * trained(model, cell.update, training, 10), cell.domain) / REACH
        most = max(domains[cell.domain].rewards())
        assert cell.predicted == pytest.approx(within_reach(near, cell.anchor_value, 0.0, most)[0], abs=1e-9)


def test_the_oracle_catches_a_planted_error() -> None:
    """Rollouts of another policy under the base's name forecast something else."""
    model, domains = tabular.model(prompts=1), {name: enumerated(name) for name in REWARDS}
    training = tabular.training(steps=10, learning_rate=1.0)
    few = {n: Domain(n, tuple(s for s in d.sequences if s.response != (2, 2))) for n, d in domains.items()}
    found = forecast(model, few, training=training, tier="virtual", effort=2.0, **options())
    expected = measured(model, trained(model, "a", training, 10), "b")
    assert abs(found.matrix().loc["a", "b"] - expected) > 1e-2


# A toy transformer


def rollouts(seed: int, name: str = "d", odd: bool = True, prompts: int = 8) -> Domain:
    """Random responses to random prompts; the reward is a rule that a policy can learn."""
    rng = np.random.default_rng(seed)
    rows = []
    for p in range(prompts):
        prompt = tuple(int(t) for t in rng.integers(0, 23, 3))
        for k in range(4):
            y = tuple(int(t) for t in rng.integers(0, 23, 4))
            rows.append(Sequence(prompt, y, f"{name}{p}", float(k % 2) if not odd else float(y[0] % 2) + 0.1 * k))
    return Domain(name, tuple(rows))


def toy_training(**changes: Any) -> Training:
    settings: dict[str, Any] = {"learning_rate": 2e-3, "steps": 6, "prompts_per_step": 4, "generations": 4}
    return Training(**settings | changes)


def toy_forecast(domains: dict[str, Domain], **changes: Any) -> Forecast:
    model = prepare(ToyTransformer.seeded(0))
    more = {"training": toy_training(), "check": False, "device": "cpu"}
    return forecast(model, domains, **{**more, **changes})


@pytest.mark.parametrize("tier", ["gradient", "virtual"])
def test_identical_domains_have_identical_rows(tier: Any) -> None:
    data = rollouts(0)
    domains = {"a": data, "b": data, "c": rollouts(1, "c")}
    found = toy_forecast(domains, tier=tier, evaluation=domains).matrix()
    np.testing.assert_allclose(found.loc["a"], found.loc["b"], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(found["a"], found["b"], rtol=1e-6, atol=1e-12)
    assert not np.allclose(found.loc["a"], found.loc["c"], rtol=0.1)
    made = toy_forecast(domains, tier=tier)
    crossed = made.matrix()
    assert crossed.loc["a", "a"] == pytest.approx(crossed.loc["b", "b"], rel=1e-6)
    assert crossed.loc["a", "b"] == pytest.approx(crossed.loc["b", "a"], rel=1e-6)
    told = made.matrix("ess" if tier == "virtual" else "predicted")
    assert told.loc["a", "a"] != pytest.approx(told.loc["a", "b"], rel=1e-3), "tried on what made it"


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("objective", ["reward", "nll"])
def test_first_order_is_the_product_with_the_gradient(objective: str, own: bool) -> None:
    """Of an own update with the gradient of the half that it was not made from; and the error is about the bootstrap's."""
    model, data = prepare(ToyTransformer.seeded(0)), rollouts(0, prompts=64)
    generator = torch.Generator().manual_seed(0)
    points = [
        {n: 1e-4 * torch.randn(p.shape, generator=generator) for n, p in model.parameters.items()} for _ in range(2)
    ]
    mean = {n: (points[0][n] + points[1][n]) / 2 for n in points[0]}
    few = first_prompts(data, 4)
    made = FirstOrder(model, objective, data, {"d": [mean, *points]}, ["d"] if own else [], few, 0, 4096)
    halves = prompt_halves(data)
    parts = [objective_gradient(model, part, objective) for part in halves]
    if own:
        expected = 0.5 * (tree.dot(parts[0], points[1]) + tree.dot(parts[1], points[0]))
    else:
        expected = tree.dot(objective_gradient(model, data, objective), mean)
    assert made.found("d").value == pytest.approx(expected, rel=1e-4)
    assert made.term("d").value == 0.0
    tried_near = score(model, data, [({n: REACH * d for n, d in mean.items()}, 1.0)])
    near = moved(objective, telling(objective, data, silent_share=1.0), *tried_near, 0, REACH)
    assert made.present == pytest.approx(present_value(objective, data, tried_near[0]), rel=1e-6)
    if not own:
        assert near.value == pytest.approx(expected, rel=0.05)
        ratio = made.found("d").replicates.std() / near.replicates.std()
        assert 0.5 < ratio < 2


def test_columns_models_and_second_order() -> None:
    """The Taylor polynomial along the mean update, and the interval around the prediction."""
    domains = {"a": rollouts(0, "a"), "b": rollouts(1, "b")}
    found = toy_forecast(domains, training=toy_training(learning_rate=2e-4), pairs=True)
    cells = found.cells.set_index(["update", "domain"])
    for update in domains:
        for domain in domains:
            cell = cells.loc[(update, domain)]
            model = found.models[domain]
            assert cell["predicted_second"] == pytest.approx(model.predict({update: 1.0}).value)
            assert cell["low"] < cell["predicted"] < cell["high"]
            width = (
                2
                * 1.6448536
                * np.linalg.norm(cell[["sampling_stderr", "update_stderr", "method_stderr"]].astype(float))
            )
            assert cell["high"] - cell["low"] == pytest.approx(width, rel=1e-6)
            assert cell["anchor_value"] == pytest.approx(model.value)
    off = cells[~cells["own"].astype(bool)]
    np.testing.assert_allclose(off["predicted"] - off["noise_term"], off["predicted_second"], rtol=0.1, atol=2e-5)


@pytest.mark.parametrize("changes", [{"adapter": {"rank": 2, "alpha": 4}}, {"algorithm": "dpo"}, {"optimizer": "sign"}])
def test_every_kind_of_training_is_forecast(changes: dict[str, Any]) -> None:
    """And each gains on its own domain when tried on the very rollouts."""
    domains = {"a": rollouts(0, "a")}
    found = toy_forecast(domains, training=toy_training(steps=12, **changes), evaluation=domains, quadratic=False)
    assert found.cells["predicted"].iloc[0] > 0
    assert np.isfinite(found.cells["stderr"].astype(float)).all()


def test_loss_of_reference_answers() -> None:
    """nll needs sequences of its own; what rewards the answers lowers their loss."""
    data = rollouts(0, "a")
    model = prepare(ToyTransformer.seeded(0))
    made = estimate_update(model, data, toy_training(steps=20), "gradient", effort=1.0)
    assert set(made.halves.first) == set(made.halves.second)
    good = Domain("a", tuple(s for s in data.sequences if s.reward and s.reward > 1))
    with pytest.raises(InputError, match="without evaluation"):
        toy_forecast({"a": data}, objective="nll")
    found = toy_forecast({"a": data}, objective="nll", evaluation={"a": good}, quadratic=False)
    assert found.cells["predicted"].iloc[0] < 0
    assert (found.cells["ess"] == 1).all()


def test_dpo_noise_counts_pairs() -> None:
    """Half of 16 responses to 4 prompts each make 8 pairs, of the 4 x 4 x 6 that the training draws."""
    data = rollouts(0, "a", odd=False)
    made = estimate_update(prepare(ToyTransformer.seeded(0)), data, toy_training(algorithm="dpo"), effort=10.0)
    assert made.halves.noise == pytest.approx(8 / 96)


def test_what_cannot_be_forecast_is_refused() -> None:
    equal = Domain("a", tuple(Sequence(s.prompt, s.response, s.prompt_id, 1.0) for s in rollouts(0, "a").sequences))
    by_prompt = Domain(
        "a",
        tuple(Sequence(s.prompt, s.response, s.prompt_id, float(s.prompt_id[1:])) for s in rollouts(0, "a").sequences),
    )
    for data, words in ((equal, "reward"), (by_prompt, "different rewards")):
        with pytest.raises(InputError, match=words):
            toy_forecast({"a": data})
    fine = {"a": rollouts(0, "a")}
    with pytest.raises(InputError, match="pilot"):
        toy_forecast(fine, tier="pilot")
    with pytest.raises(InputError, match="objective"):
        toy_forecast(fine, objective="kl")
    with pytest.raises(InputError, match="effort"):
        toy_forecast(fine, effort=0.0)
    with pytest.raises(InputError, match="training of 'a'"):
        toy_forecast(fine, training={"b": toy_training()})
    late = {"a": Pilot({n: dense(p) for n, p in prepare(ToyTransformer.seeded(0)).parameters.items()}, 6)}
    with pytest.raises(InputError, match="after 6 of 6 steps"):
        toy_forecast(fine, tier="pilot", pilots=late)


def test_a_forecast_repeats_itself() -> None:
    domains = {"a": rollouts(0, "a"), "b": rollouts(1, "b")}
    one, two = (toy_forecast(domains, quadratic=False).cells for _ in range(2))
    pd.testing.assert_frame_equal(one, two)
