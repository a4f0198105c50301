"""Two estimates of one training that share a path: where gradients are taken, what is renewed, where they begin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import tabular
import torch
from test_forecast_virtual import COUNTS, ROLLOUTS, reward, sampled
from torch import Tensor

from interference.domain import Domain, Sequence
from interference.forecasting.virtual import Virtual, fell, steady_trainings, virtual_training, virtual_trainings
from interference.tree import dense


def other(response: tuple[int, ...]) -> float:
    return float(response[1] == 0)


def weight(update: Any) -> Tensor:
    return dense(update["weight"])


def two_parts() -> list[Domain]:
    """The same responses on different prompts, with different rewards."""
    return [tabular.domain(reward, COUNTS, name="a"), tabular.domain(other, COUNTS, name="b")]


def shared_path(start: list[Tensor], rate: float, steps: int, at_own: bool = False) -> list[Tensor]:
    """d_i <- d_i + rate * grad J_i at the mean (or, `at_own`, where each is), written out."""
    begin = tabular.model(COUNTS).parameters["weight"].detach()
    own = [s.clone() for s in start]
    for _ in range(steps):
        moves = []
        for d, kind in zip(own, (reward, other), strict=True):
            at = (begin + (d if at_own else sum(own) / 2)).requires_grad_()
            (gradient,) = torch.autograd.grad(tabular.value(at, kind), at)
            moves.append(rate * gradient * ROLLOUTS / (ROLLOUTS - 1))
        own = [d + move for d, move in zip(own, moves, strict=True)]
    return own


@pytest.mark.parametrize("begun", [False, True])
def test_gradients_are_taken_at_the_mean(begun: bool) -> None:
    model, steps = tabular.model(COUNTS), 12
    generator = torch.Generator().manual_seed(0)
    starts = [begun * torch.randn(COUNTS.shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    given: Any = [{"weight": s} for s in starts] if begun else None
    made = virtual_trainings(model, two_parts(), tabular.training(steps=steps), starts=given, least_ess=0.0)
    expected = shared_path(starts, 0.5, steps)
    for one, want in zip(made, expected, strict=True):
        torch.testing.assert_close(weight(one.update), want)
    apart = shared_path(starts, 0.5, steps, at_own=True)
    assert all((a - b).abs().max() > 0.02 for a, b in zip(apart, expected, strict=True)), (
        "the oracle sees no difference"
    )


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_equal_parts_make_one_training(kind: str) -> None:
    model, data = tabular.model(COUNTS), tabular.domain(reward, COUNTS)
    training = tabular.training(optimizer=kind, learning_rate=0.1, steps=9)
    alone = virtual_training(model, data, training, stops=[4])
    for one in virtual_trainings(model, [data, data], training, stops=[4]):
        assert one.updates.keys() == alone.updates.keys() == {4, 9}
        for step, update in alone.updates.items():
            torch.testing.assert_close(weight(one.updates[step]), weight(update))
        np.testing.assert_allclose(one.path["reward"], alone.path["reward"])


def test_both_are_renewed_together_each_with_its_own_prompts() -> None:
    model = tabular.model(COUNTS)
    training = tabular.training(steps=12, learning_rate=3.0, prompts_per_step=1, generations=40)
    parts = [sampled(model, [f"{side}{i}" for i in range(8)], h, 40) for h, side in enumerate("ab")]
    asked = []

    def resample(prompt_ids: Any, seed: int) -> Domain:
        asked.append({p[0] for p in prompt_ids})
        return sampled(model, prompt_ids, seed, 40)

    made = virtual_trainings(model, parts, training, least_ess=0.9, resample=resample)
    rounds = [one.path["rollouts"].tolist() for one in made]
    assert rounds[0] == rounds[1]
    assert 1 < rounds[0][-1] <= len(asked)  # perhaps all of them again, where few were alike
    assert asked == [{"a", "b"}] * len(asked)
    assert not torch.equal(weight(made[0].update), weight(made[1].update))


@pytest.mark.parametrize("lasting", [False, True])
def test_a_training_that_ends_far_below_its_start_is_run_again_once(lasting: bool) -> None:
    """In finer steps; what it then comes to stands, since a reward that is low by chance is no error."""
    model, calls = tabular.model(COUNTS), list[int]()
    training = tabular.training(steps=16, learning_rate=3.0, prompts_per_step=1, generations=40)

    def worse(prompt_ids: Any, seed: int) -> Domain:
        calls.append(len(prompt_ids))
        found, share = sampled(model, prompt_ids, seed, 40), 0.05 if lasting or len(calls) < 4 else 1.0
        rows = [Sequence(s.prompt, s.response, s.prompt_id, share * (s.reward or 0.0)) for s in found.sequences]
        return Domain("d", tuple(rows))

    data = sampled(model, [f"p{i}" for i in range(8)], 0, 40)
    (made,) = steady_trainings(model, [data], training, steps_taken=6, least_ess=0.9, resample=worse)
    assert made.path["attempt"].tolist() == [2] * 12
    assert fell([made]) == lasting


def test_no_step_and_no_fall_are_no_break() -> None:
    path = pd.DataFrame({"reward": [0.5, 0.5, 0.4, 0.5, 0.3, 0.3, 0.3, 0.3]})
    low = path.assign(reward=[0.5, 0.5, 0.4, 0.5, 0.3, 0.3, 0.1, 0.1])
    falls = [fell([Virtual({}, p, 0, 0)]) for p in (path, low, path.iloc[:2], path.iloc[:0])]
    assert falls == [False, True, False, False]
    assert not fell([Virtual({}, low, 0, 0), Virtual({}, path + 0.5, 0, 0)]), "the mean of the estimates counts"
