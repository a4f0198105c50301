"""Mixtures against exact training on the weighted objectives, where all responses can be enumerated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tabular
import torch
from tabular import model, training
from test_forecast import PER_PROMPT, REWARDS, enumerated, measured, rollouts, toy_training
from torch import Tensor
from toy import ToyTransformer

from interference.domain import Domain, Sequence
from interference.errors import InputError
from interference.forecasting import mixtures, tried
from interference.forecasting.mixtures import (
    effective_prompts,
    equal_mixtures,
    pooled,
    rank_virtual_mixtures,
    virtual_mixtures,
)
from interference.forecasting.sequences import virtual_sequence
from interference.forecasting.training import Training
from interference.model import Model, prepare
from interference.tree import dense

ALL: dict[str, Any] = {"effort": 2.0, "least_ess": 0.0}
HALF = {"a": 0.5, "b": 0.5}
MIXED = {"a": 2 / 3, "b": 1 / 3}


def mixed(policy: Model, weights: dict[str, float], plan: Training) -> Tensor:
    """The update of exact policy-gradient training on sum_k w_k L_k."""
    base = policy.parameters["weight"]
    weight = base.clone().requires_grad_()
    for _ in range(plan.steps):
        total = sum(w * tabular.value(weight, REWARDS[n], prompts=(3,)) for n, w in weights.items())
        (gradient,) = torch.autograd.grad(total, weight)
        step = plan.learning_rate * PER_PROMPT / (PER_PROMPT - 1) * gradient
        weight = (weight + step).detach().requires_grad_()
    return weight.detach() - base


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 0.5, "b": 0.5}, MIXED])
@pytest.mark.parametrize("apart", [False, True])
def test_a_mixture_is_training_on_the_weighted_objectives(weights: dict[str, float], apart: bool) -> None:
    policy, domains = model(prompts=1), {name: enumerated(name) for name in REWARDS}
    plan = training(steps=8, learning_rate=1.0)
    evaluation = domains if apart else None
    (found,) = virtual_mixtures(policy, domains, plan, [weights], evaluation=evaluation, **ALL).values()
    update = mixed(policy, weights, plan)
    torch.testing.assert_close(dense(found.halves.mean()["weight"]), update, rtol=1e-7, atol=1e-9)
    cells = found.cells.set_index("domain")
    for domain in domains:
        assert cells.loc[domain, "predicted"] == pytest.approx(measured(policy, update, domain), abs=1e-9)


def test_the_oracle_tells_weights_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: rollouts pooled in equal shares whatever the weights."""
    policy, domains = model(prompts=1), {name: enumerated(name) for name in REWARDS}
    plan, right = training(steps=8, learning_rate=1.0), mixtures.pooled
    monkeypatch.setattr(mixtures, "pooled", lambda d, w: right(d, dict.fromkeys(w, 1 / len(w))))
    (found,) = virtual_mixtures(policy, domains, plan, [MIXED], **ALL).values()
    assert (dense(found.halves.mean()["weight"]) - mixed(policy, MIXED, plan)).abs().max() > 1e-2


def test_mixtures_are_ranked_by_what_exact_training_gives() -> None:
    policy, domains = model(prompts=1), {name: enumerated(name) for name in REWARDS}
    plan = training(steps=8, learning_rate=1.0)
    found = virtual_mixtures(policy, domains, plan, **ALL)
    assert list(found) == ["a", "b", "a + b"]
    for by, score in (("mean", np.mean), ("worst", np.min)):
        ends = {
            name: score([measured(policy, mixed(policy, m.weights, plan), d) for d in domains])
            for name, m in found.items()
        }
        table = rank_virtual_mixtures(found, by)
        assert table["mixture"].tolist() == sorted(ends, key=ends.__getitem__, reverse=True)
        np.testing.assert_allclose(table[by], [ends[name] for name in table["mixture"]], atol=1e-8)


def test_a_domain_alone_is_a_sequence_of_one() -> None:
    """On a transformer with its noise: same halves, same steps, same cells."""
    toy, domains = prepare(ToyTransformer.seeded(0)), {"a": rollouts(0, "a"), "b": rollouts(1, "b")}
    found = virtual_mixtures(toy, domains, toy_training(), [{"a": 1.0, "b": 0.0}])["a"]
    alone = virtual_sequence(toy, domains, toy_training(), ["a"])
    torch.testing.assert_close(
        {n: dense(d) for n, d in found.halves.mean().items()}, {n: dense(d) for n, d in alone.update.items()}
    )
    columns = ["predicted", "stderr", "low", "high", "ess"]
    np.testing.assert_allclose(found.cells[columns].astype(float), alone.stages[columns].astype(float))


def test_trainings_that_differ_in_steps_alone_are_mixed_by_weight() -> None:
    toy, domains = prepare(ToyTransformer.seeded(0)), {"a": rollouts(0, "a"), "b": rollouts(1, "b")}
    given = {"a": toy_training(steps=4), "b": toy_training(steps=8)}
    (found,) = virtual_mixtures(toy, domains, given, [{"a": 0.5, "b": 0.5}]).values()
    (known,) = virtual_mixtures(toy, domains, toy_training(steps=6), [{"a": 0.5, "b": 0.5}]).values()
    np.testing.assert_array_equal(found.cells["predicted"], known.cells["predicted"])


@pytest.mark.parametrize("weights", [{"a": 0.5, "b": 0.5}, MIXED])
def test_more_responses_to_a_prompt_are_no_larger_share(weights: dict[str, float]) -> None:
    """Training draws as many for every prompt, whatever the base's rollouts hold."""
    policy, domains = model(prompts=1), {name: enumerated(name) for name in REWARDS}
    plan = training(steps=1, learning_rate=1.0)
    domains["b"] = Domain("b", tuple(s for s in domains["b"].sequences for _ in range(4)))
    # The coefficients leave the own response out: n / (n - 1) of 36 responses, where there were 9.
    (found,) = virtual_mixtures(policy, domains, plan, [weights], **ALL).values()
    assert found.halves is not None
    alone = {n: gradient(policy, n) for n in REWARDS}
    expected = weights["a"] * 9 / 8 * alone["a"] + weights["b"] * 36 / 35 * alone["b"]
    torch.testing.assert_close(dense(found.halves.mean()["weight"]), expected, rtol=1e-7, atol=1e-9)


def gradient(policy: Model, name: str) -> Tensor:
    weight = policy.parameters["weight"].clone().requires_grad_()
    (found,) = torch.autograd.grad(tabular.value(weight, REWARDS[name], prompts=(3,)), weight)
    return found


@pytest.mark.parametrize("counts", [(8, 8), (4, 12), (12, 3)])
@pytest.mark.parametrize("share", [0.5, 0.75])
def test_pools_hold_prompts_as_the_weights_say(counts: tuple[int, int], share: float) -> None:
    domains = {n: rollouts(i, n, prompts=c) for i, (n, c) in enumerate(zip("ab", counts, strict=True))}
    weights = {"a": share, "b": 1 - share}
    pool = pooled(domains, weights)
    prompts = list(dict.fromkeys(pool.prompt_ids))
    of_a, of_b = (sum(p[0] == n for p in prompts) for n in "ab")
    assert abs(of_a * (1 - share) - of_b * share) <= 0.5, "the nearest whole prompts"
    assert len(pool.sequences) == 4 * len(prompts)
    held = {(s.prompt_id[0], s.prompt, s.response, s.reward) for s in pool.sequences}
    assert held == {(n, s.prompt, s.response, s.reward) for n, d in domains.items() for s in d.sequences}, (
        "none is left out"
    )
    assert effective_prompts(domains, weights) == pytest.approx(
        1 / (share**2 / counts[0] + (1 - share) ** 2 / counts[1])
    )


def test_shares_that_prompts_cannot_be_mixed_in_are_refused() -> None:
    domains = {"a": rollouts(0, "a", prompts=4), "b": rollouts(1, "b", prompts=4)}
    with pytest.raises(InputError, match="of which 4 prompts"):
        pooled(domains, {"a": 0.999, "b": 0.001})
    assert len(set(pooled(domains, {"a": 0.95, "b": 0.05}).prompt_ids)) == 80


def test_equal_names_of_prompts_stay_apart() -> None:
    """Both domains call their prompts alike: rewards are still compared within each."""
    one = rollouts(0, "a")
    pool = pooled({"a": one, "b": Domain("b", one.sequences)}, {"a": 0.5, "b": 0.5})
    assert len(set(pool.prompt_ids)) == 2 * len(set(one.prompt_ids))


def test_what_is_no_mixture_is_refused() -> None:
    policy, domains = model(prompts=1), {name: enumerated(name) for name in REWARDS}
    plan, half = training(steps=2), {"a": 0.5, "b": 0.5}
    other = {"a": plan, "b": training(steps=2, learning_rate=2.0)}
    for given, plans, words in (
        ([{"a": 0.5, "c": 0.5}], plan, "'c'"),
        ([{"a": 0.5}], plan, "sum 0.5"),
        ([{"a": 1.5, "b": -0.5}], plan, "0 or more"),
        ([{"a": float("nan"), "b": 0.5}], plan, "sum to 1"),
        ([{}], plan, "sum to 1"),
        ([], plan, "one or more"),
        ([half, half], plan, "all different"),
        ([half], {"a": plan}, "training of 'b'"),
        ([half], other, "only steps may differ"),
    ):
        with pytest.raises(InputError, match=words):
            virtual_mixtures(policy, domains, plans, given)
    assert len(equal_mixtures(["a", "b", "c", "d"])) == 15


def test_a_pool_s_prompts_are_asked_of_their_own_samplers() -> None:
    """Copies apart, each prompt as often as named, and ids that look like copies are not taken for them."""
    rows = {"a": ("p", "p (2)", "q"), "b": ("p", "b: p", "c", "d", "e", "f")}
    domains = {n: Domain(n, tuple(Sequence((1,), (2,), p, 0.0) for p in prompts)) for n, prompts in rows.items()}
    asked: dict[str, list[tuple[list[str], int]]] = {"a": [], "b": []}

    def sampler(name: str) -> Any:
        def fresh(prompt_ids: Any, seed: int) -> Domain:
            asked[name].append((list(prompt_ids), seed))
            return Domain(name, tuple(Sequence((1,), (3,), p, 1.0) for p in reversed(prompt_ids)))

        return fresh

    pool, half = pooled(domains, HALF), mixtures.pooled_sampler({n: sampler(n) for n in rows}, [domains], HALF)
    wanted = [p for p in pool.prompt_ids for _ in range(2)]
    found = half(wanted, 7)
    assert sorted(found.prompt_ids) == sorted(wanted)
    assert {p for p in wanted if p[0] == "a"} == {f"a{c}: {p}" for c in ("", " (2)") for p in rows["a"]}
    assert [seed for _, seed in asked["a"]] == [7, 8]
    assert asked["b"] == [([p for p in rows["b"] for _ in range(2)], 7)]


def test_mixtures_renew_their_rollouts_where_all_domains_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """And moved policies are sampled where weights fail, on evaluation prompts by the samplers that are given for these alone."""
    policy, domains = model(prompts=1), {name: enumerated(name) for name in REWARDS}
    plan, asked = training(steps=12, learning_rate=3.0), list[str]()

    def sampler(name: str) -> Any:
        def fresh(prompt_ids: Any, seed: int) -> Domain:
            asked.append(name)
            draws = torch.Generator().manual_seed(seed)
            rows = []
            for prompt in prompt_ids:
                table, response, before = policy.parameters["weight"].softmax(-1), list[int](), 3
                for _ in range(2):
                    before = int(torch.multinomial(table[before], 1, generator=draws))
                    response.append(before)
                rows.append(Sequence((3,), tuple(response), prompt, REWARDS[name](tuple(response))))
            return Domain(name, tuple(rows))

        return fresh

    options: dict[str, Any] = ALL | {"least_ess": 0.95}
    for given, both in (({"a": sampler("a")}, False), ({n: sampler(n) for n in REWARDS}, True)):
        asked.clear()
        virtual_mixtures(policy, domains, plan, [HALF], samplers=given, evaluation=domains, **options)
        assert (set(asked) == {"a", "b"}) == both
        assert both or not asked
    monkeypatch.setattr(tried, "LOW_ESS", 0.9)
    for given, evaluation, of_evaluation, wanted in (
        ({"a": sampler("a")}, None, None, {"a"}),
        ({"a": sampler("a")}, domains, None, set[str]()),
        ({}, domains, {"b": sampler("b")}, {"b"}),
    ):
        asked.clear()
        virtual_mixtures(
            policy,
            domains,
            plan,
            [HALF],
            samplers=given,
            evaluation=evaluation,
            evaluation_samplers=of_evaluation,
            **ALL,
        )
        assert set(asked) == wanted
