"""Sequences of trainings against exact ones, where all responses can be enumerated and order matters."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from tabular import model, training, value
from test_forecast import PER_PROMPT, REWARDS, enumerated, measured, trained

from interference.errors import InputError
from interference.forecasting.sequences import VirtualSequence, rank_orders, virtual_sequence, virtual_sequences
from interference.forecasting.training import Adapter
from interference.forecasting.virtual import virtual_training
from interference.tree import dense

ALL: dict[str, Any] = {"effort": 2.0, "least_ess": 0.0}


def test_a_sequence_is_one_training_after_another() -> None:
    """Every stage of every order: the exact trainings' update, and what they do to each domain."""
    policy, domains = model(prompts=1), {name: enumerated(name) for name in REWARDS}
    plan = training(steps=6, learning_rate=1.0)
    found = virtual_sequences(policy, domains, plan, [("a", "b"), ("b", "a")], **ALL)
    ends = {}
    for order, made in found.items():
        update = None
        for stage, name in enumerate(order, start=1):
            update = trained(policy, name, plan, 6, update)
            now = made.stages[made.stages["stage"] == stage].set_index("domain")
            assert (now["trained"] == name).all()
            for domain in domains:
                assert now.loc[domain, "predicted"] == pytest.approx(measured(policy, update, domain), abs=1e-9)
        ends[order] = update
        torch.testing.assert_close(dense(made.update["weight"]), update, rtol=1e-7, atol=1e-9)
    assert (ends["a", "b"] - ends["b", "a"]).abs().max() > 0.05, "order matters here"


def test_the_later_update_is_bent_by_the_earlier_as_the_hessian_says() -> None:
    """d_B' = d_B + eta T H_B d_A to first order for gradient ascent: the two orders differ by eta T (H_B d_A - H_A d_B)."""
    policy, domains = model(prompts=1), {name: enumerated(name) for name in REWARDS}
    plan, base = training(steps=3, learning_rate=0.01), policy.parameters["weight"]
    found = virtual_sequences(policy, domains, plan, [("a",), ("b",), ("a", "b"), ("b", "a")], **ALL)
    first = {n: dense(found[n,].update["weight"]) for n in domains}
    scale = 3 * 0.01 * PER_PROMPT / (PER_PROMPT - 1)

    def bent(domain: str, along: torch.Tensor) -> torch.Tensor:
        return torch.autograd.functional.hvp(lambda w: value(w, REWARDS[domain], prompts=(3,)), base, along)[1]

    for order, other in ((("a", "b"), "b"), (("b", "a"), "a")):
        change = dense(found[order].update["weight"]) - first["a"] - first["b"]
        torch.testing.assert_close(change, scale * bent(other, first[order[0]]), rtol=0.05, atol=2e-7)
    assert scale * bent("b", first["a"]).abs().max() > 2e-6


def test_orders_are_ranked_by_their_exact_ends() -> None:
    policy, domains = model(prompts=1), {name: enumerated(name) for name in REWARDS}
    plan = training(steps=12, learning_rate=1.0)  # longer, and 9 / 8 of the gain would be beyond the rewards' range
    stages = {
        o: s.stages for o, s in virtual_sequences(policy, domains, plan, itertools.permutations(domains), **ALL).items()
    }
    ends = {}
    for order in stages:
        update = trained(policy, order[1], plan, 12, trained(policy, order[0], plan, 12))
        ends[order] = [measured(policy, update, d) for d in domains]
    for by, score in (("mean", np.mean), ("worst", np.min)):
        table = rank_orders(stages, by=by)
        best = max(ends, key=lambda o: score(ends[o]))
        assert table["order"].iloc[0] == best
        np.testing.assert_allclose(table[by], [score(ends[o]) for o in table["order"]], atol=1e-8)
        assert table["behind"].iloc[1] == pytest.approx(abs(score(ends["a", "b"]) - score(ends["b", "a"])), abs=1e-8)


def test_a_single_stage_is_a_virtual_training_and_the_rest_is_shared() -> None:
    """Steps, seeds and optimizer of a stage are those of a training by itself; a new stage begins its schedule anew."""
    policy, domains = model(prompts=1), {name: enumerated(name) for name in REWARDS}
    plan = training(steps=4, schedule="linear", optimizer="adamw", learning_rate=0.1)
    made = virtual_sequence(policy, domains, plan, ["b", "a"], **ALL)
    assert isinstance(made, VirtualSequence)
    alone = virtual_training(policy, domains["b"], plan, least_ess=0.0).update
    torch.testing.assert_close(dense(made.halves["b",].mean()["weight"]), dense(alone["weight"]))
    second = virtual_training(
        policy, domains["a"], plan, start={"weight": dense(alone["weight"])}, least_ess=0.0
    ).update
    torch.testing.assert_close(dense(made.update["weight"]), dense(second["weight"]))


def test_adapters_follow_one_another() -> None:
    """A second adapter is put on the first one's weights, and both are in the update."""
    from test_forecast import rollouts, toy_training
    from toy import ToyTransformer

    from interference.model import prepare

    toy = prepare(ToyTransformer.seeded(0))
    domains = {"a": rollouts(0, "a"), "b": rollouts(1, "b")}
    plan = toy_training(adapter=Adapter(rank=2, alpha=4), steps=8, learning_rate=1e-2)
    made = virtual_sequence(toy, domains, plan, ["a", "b"])
    one, both = made.halves["a",].mean(), made.update
    for name in one:
        rank = int(torch.linalg.matrix_rank(dense(both[name]), rtol=1e-9))
        assert rank > int(torch.linalg.matrix_rank(dense(one[name]), rtol=1e-9)), "nothing of the second is left"
    assert np.isfinite(made.stages["stderr"].astype(float)).all()
    assert (made.stages["low"] < made.stages["high"]).all()


def test_what_is_no_sequence_is_refused() -> None:
    policy, domains = model(prompts=1), {name: enumerated(name) for name in REWARDS}
    plan = training(steps=2)
    for order, plans, more, words in (
        (["a", "x"], plan, {}, "'x'"),
        (["a", "a"], plan, {}, "at most once"),
        ([], plan, {}, "at least one"),
        (["a", "b"], {"a": plan}, {}, "training of 'b'"),
        (["a"], plan, {"effort": 0.0}, "effort"),
    ):
        with pytest.raises(InputError, match=words):
            virtual_sequence(policy, domains, plans, order, **more)


def test_ends_on_other_prompts() -> None:
    """The last stages alone, evaluated on sequences that nothing was trained on."""
    policy, domains = model(prompts=1), {name: enumerated(name) for name in REWARDS}
    plan, order = training(steps=6, learning_rate=1.0), ("a", "b")
    whole = virtual_sequence(policy, domains, plan, order, **ALL)
    ends = virtual_sequence(policy, domains, plan, order, evaluation=domains, ends_only=True, **ALL)
    assert ends.stages["stage"].tolist() == [2, 2]
    last = whole.stages[whole.stages["stage"] == 2]
    np.testing.assert_allclose(ends.stages["predicted"], last["predicted"], atol=1e-9)
    torch.testing.assert_close(dense(ends.update["weight"]), dense(whole.update["weight"]))


def test_updates_need_not_be_kept_and_prefixes_come_in_any_order() -> None:
    """The same tables without the updates; of what was trained only what the next prefix begins with is held."""
    from test_forecast import rollouts, toy_training
    from toy import ToyTransformer

    from interference.forecasting import runner
    from interference.model import prepare

    toy, domains = prepare(ToyTransformer.seeded(0)), {n: rollouts(i, n) for i, n in enumerate("abc")}
    orders = [("b", "a"), ("a", "b", "c"), ("b", "c")]
    whole = virtual_sequences(toy, domains, toy_training(), orders)
    held = []
    original = runner.Runner.halves

    def watched(self: Any, prefix: tuple[str, ...]) -> Any:
        found = original(self, prefix)
        held.append(set(self.found))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.Runner, "halves", watched)
        lean = virtual_sequences(toy, domains, toy_training(), orders, keep_updates=False)
    for order in orders:
        np.testing.assert_array_equal(lean[order].stages["predicted"], whole[order].stages["predicted"])
        np.testing.assert_array_equal(lean[order].stages["stderr"], whole[order].stages["stderr"])
        assert (set(lean[order].halves), len(whole[order].halves)) == (set(), len(order))
    assert max(map(len, held)) == 3
