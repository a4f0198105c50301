"""What happens on the way of a virtual training: rollouts that are renewed, trainings that break, prompts of many responses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import tabular
import torch
from test_forecast_virtual import COUNTS, reward, sampled

from interference.domain import Domain, Sequence
from interference.errors import InputError
from interference.forecasting import virtual
from interference.forecasting.batches import Rollouts
from interference.forecasting.frozen import LEAST_STEPS, prompts_of
from interference.forecasting.sequences import virtual_sequence
from interference.forecasting.virtual import DivergedError, Virtual, fell, steady_training, virtual_training


def test_only_so_many_rollouts_are_renewed_as_are_used() -> None:
    """One prompt a minibatch: rollouts that were good for five steps are followed by five prompts, or by all that are left."""
    model, names = tabular.model(COUNTS), [f"p{i}" for i in range(8)]
    training = tabular.training(steps=12, learning_rate=1.5, prompts_per_step=1, generations=40)
    asked = []

    def resample(prompt_ids: Any, seed: int) -> Domain:
        asked.append(len(set(prompt_ids)))
        return sampled(model, prompt_ids, seed, 40)

    found = virtual_training(model, sampled(model, names, 0, 40), training, least_ess=0.95, resample=resample)
    renewed_at = [int(s) - 1 for s in found.path["step"][found.path["rollouts"].diff() > 0]]
    assert len(asked) == len(renewed_at) > 2
    for asked_for, done, before, last in zip(asked, renewed_at, [0, *renewed_at], [0, *asked], strict=False):
        used, left = done - before, 12 - done
        wanted = max(LEAST_STEPS, 2 * used if used == last else used)
        assert asked_for == (left if left <= 1.5 * wanted else wanted)
    assert 2 <= min(asked[:-1]) < 8


def test_used_rollouts_are_renewed_before_they_repeat() -> None:
    """However effective they still are; what lasted is followed by twice as many, the last steps are taken with those before."""
    model, names = tabular.model(COUNTS), [f"p{i}" for i in range(8)]
    training = tabular.training(steps=13, learning_rate=1e-6, prompts_per_step=1, generations=40)
    asked = []

    def resample(prompt_ids: Any, seed: int) -> Domain:
        asked.append(len(set(prompt_ids)))
        return sampled(model, prompt_ids, seed, 40)

    start = {
        n: 3.0 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) for n, p in model.parameters.items()
    }
    given: dict[str, Any] = {"least_ess": 0.9, "resample": resample, "start": start}
    found = virtual_training(model, sampled(model, names, 0, 40), training, **given)
    assert asked == [2, 4, 7], "the first ones were good for no step, the others for all that they were made for"
    assert found.path["rollouts"].tolist() == [1] * 2 + [2] * 4 + [3] * 7


def test_prompts_are_drawn_whole_and_by_the_seed() -> None:
    domain = Domain("d", tuple(Sequence((1,), (2,), p) for p in "aaabbbcccddd"))
    drawn = [prompts_of(domain, 5, seed) for seed in range(20)]
    assert all(len(d) == 6 and len(set(d)) == 2 for d in drawn)
    assert len({tuple(d) for d in drawn}) > 3
    assert prompts_of(domain, 12, 0) == domain.prompt_ids


def test_few_renewed_prompts_that_are_alike_do_not_end_the_training() -> None:
    """Their rewards do not differ by chance: all prompts are asked again before the training counts as over."""
    model, names = tabular.model(COUNTS), [f"p{i}" for i in range(8)]
    training = tabular.training(steps=12, learning_rate=5.0, prompts_per_step=1, generations=40)
    asked = []

    def resample(prompt_ids: Any, seed: int) -> Domain:
        asked.append(len(set(prompt_ids)))
        found = sampled(model, prompt_ids, seed, 40)
        if asked[-1] == 8:
            return found
        return Domain("d", tuple(Sequence(s.prompt, s.response, s.prompt_id, 0.0) for s in found.sequences))

    found = virtual_training(model, sampled(model, names, 0, 40), training, least_ess=0.9, resample=resample)
    assert min(asked) < 8, "nothing is tested"
    assert found.path["step"].iloc[-1] == 12
    assert all(asked[i + 1] == 8 for i, n in enumerate(asked) if n < 8)


def test_what_breaks_is_run_again_in_finer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, original = tabular.model(COUNTS), tabular.domain(reward, COUNTS), virtual.virtual_training
    tried: list[int] = []

    def breaking(*given: Any, steps_taken: int, **options: Any) -> Any:
        tried.append(steps_taken)
        if steps_taken < 8:
            raise DivergedError(got="a gradient of norm inf", expected="a training that stays finite", remedy="wait")
        return original(*given, steps_taken=steps_taken, **options)

    monkeypatch.setattr(virtual, "virtual_training", breaking)
    found = steady_training(model, data, tabular.training(steps=10), steps_taken=3)
    assert tried == [3, 6, 10]
    assert set(found.path["attempt"]) == {3}
    assert len(found.path) == 10
    tried.clear()
    with pytest.raises(DivergedError):
        steady_training(model, data, tabular.training(steps=10), steps_taken=3, first_step=4)
    assert tried == [3, 6], "there are six steps left, and no finer ones"


@pytest.mark.parametrize("lasting", [False, True])
def test_what_ends_far_below_its_start_is_run_again_once(lasting: bool) -> None:
    """In finer steps; what it then comes to stands, since a reward that is low by chance is no error."""
    model, calls = tabular.model(COUNTS), list[int]()
    training = tabular.training(steps=16, learning_rate=3.0, prompts_per_step=1, generations=40)

    def worse(prompt_ids: Any, seed: int) -> Domain:
        calls.append(len(prompt_ids))
        found, share = sampled(model, prompt_ids, seed, 40), 0.05 if lasting or len(calls) < 4 else 1.0
        return Domain(
            "d", tuple(Sequence(s.prompt, s.response, s.prompt_id, share * given(s)) for s in found.sequences)
        )

    data = sampled(model, [f"p{i}" for i in range(8)], 0, 40)
    made = steady_training(model, data, training, steps_taken=6, least_ess=0.9, resample=worse)
    assert made.path["attempt"].tolist() == [2] * 12
    assert fell(made, 0.0) == lasting


def given(sequence: Sequence) -> float:
    assert sequence.reward is not None
    return sequence.reward


def test_what_fell_stands_where_finer_steps_break(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = tabular.model(COUNTS), tabular.domain(reward, COUNTS)
    low = Virtual({8: {}}, pd.DataFrame({"reward": [0.8] * 4 + [0.1] * 4}), 1, 1)

    def breaking(*given: Any, steps_taken: int, **options: Any) -> Any:
        if steps_taken < 8:
            return low
        raise DivergedError(got="a gradient of norm inf", expected="a training that stays finite", remedy="wait")

    monkeypatch.setattr(virtual, "virtual_training", breaking)
    found = steady_training(model, data, tabular.training(steps=8), steps_taken=4).path
    assert found["reward"].tolist()[-1] == 0.1
    assert set(found["attempt"]) == {2}, "that it was run again, to no avail, shows"


def test_pairs_in_the_right_order_are_counted_from_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """dpo's path has a share for a reward, whatever the rewards are: with these no share is half the way up from the least."""
    model, data = tabular.model(COUNTS), tabular.domain(lambda y: 5.0 + reward(y), COUNTS)
    better = Virtual({8: {}}, pd.DataFrame({"reward": [0.4] * 4 + [0.9] * 4}), 1, 1)
    monkeypatch.setattr(virtual, "virtual_training", lambda *given, **options: better)
    found = steady_training(model, data, tabular.training(steps=8, algorithm="dpo"), steps_taken=4)
    assert set(found.path["attempt"]) == {1}


def test_falls_are_counted_from_the_least_reward() -> None:
    path = pd.DataFrame({"reward": [0.5, 0.5, 0.4, 0.5, 0.3, 0.3, 0.3, 0.3]})
    low = path.assign(reward=[0.5, 0.5, 0.4, 0.5, 0.3, 0.3, 0.1, 0.1])
    falls = [fell(Virtual({}, p, 0, 0), 0.0) for p in (path, low, path.iloc[:2], path.iloc[:0])]
    assert falls == [False, True, False, False]
    penalties = path.assign(reward=[-1.0, -1.0, -0.9, -0.8, -0.7, -0.6, -0.6, -0.6])
    assert not fell(Virtual({}, penalties, 0, 0), -2.0), "it got better"
    assert fell(Virtual({}, penalties.iloc[::-1], 0, 0), -1.0)


def test_plans_say_what_was_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, original = tabular.model(COUNTS), tabular.domain(reward, COUNTS), virtual.virtual_training

    def breaking(*given: Any, steps_taken: int, **options: Any) -> Any:
        if steps_taken < 4:
            raise DivergedError(got="a gradient of norm inf", expected="a training that stays finite", remedy="wait")
        return original(*given, steps_taken=steps_taken, **options)

    said: list[str] = []
    virtual_sequence(model, {"a": data}, tabular.training(steps=8), ["a"], effort=1.0, progress=said.append)
    assert not any("again" in line for line in said)
    monkeypatch.setattr(virtual, "virtual_training", breaking)
    virtual_sequence(model, {"a": data}, tabular.training(steps=8), ["a"], effort=0.5, progress=said.append)
    assert sum("a: it broke" in line and "run again in finer ones" in line for line in said) == 2, "either half"


def test_what_breaks_in_all_of_its_steps_is_refused_and_other_errors_are_not_tried_again() -> None:
    model, data = tabular.model(COUNTS), tabular.domain(lambda y: 1e3 * reward(y), COUNTS)
    with pytest.raises(DivergedError, match="learning_rate"):
        steady_training(model, data, tabular.training(learning_rate=1e308, steps=4), steps_taken=1)
    with pytest.raises(InputError, match="first_step") as caught:
        steady_training(model, data, tabular.training(steps=4), steps_taken=1, first_step=-1)
    assert not isinstance(caught.value, DivergedError)


@pytest.mark.parametrize("loss", ["sequence", "grpo", "dr_grpo", "dapo"])
def test_prompts_weigh_alike_whatever_their_responses(loss: str) -> None:
    """The same responses listed three times for one of two prompts change nothing but what leaving the own one out does."""
    rng, lengths, rewards = np.random.default_rng(0), (1, 3, 2, 4), (0.0, 1.0, 1.0, 0.0)
    each = [(tuple(rng.integers(0, 3, n)), r) for n, r in zip(lengths, rewards, strict=True)]
    first, second = ([Sequence((1,), y, p, r) for y, r in each] for p in "ab")
    training = tabular.training(loss=loss, max_response_tokens=4, algorithm="grpo", generations=4)
    both = [Rollouts(Domain("d", (*first * copies, *second)), training) for copies in (1, 3)]
    once, thrice = (r.weigh(np.arange(len(r.reward)), np.zeros(len(r.reward))).coefficients for r in both)
    np.testing.assert_allclose(thrice[12:], once[4:])
    np.testing.assert_allclose(thrice[:12].reshape(3, 4).sum(0) / (12 / 11), once[:4] / (4 / 3))
    assert (np.abs(once) > 0).all()
