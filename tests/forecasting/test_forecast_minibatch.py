"""Gradients of minibatches of ragged rollouts against those of single sequences; what teaches nothing is not computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tabular
import torch
from ragged import alone, ragged
from torch import Tensor, nn

from interference.domain import Domain, Sequence
from interference.forecasting.batches import Rollouts, rollouts
from interference.forecasting.minibatch import Minibatches, Recall
from interference.forecasting.trainable import Trainable
from interference.model import Model


def dense(model: Model, source: Rollouts, places: Any, before: Tensor, coefficients: Any) -> list[Tensor]:
    """Gradient of a minibatch from single sequences, all of them computed."""
    parameters = {n: p.clone().requires_grad_() for n, p in model.parameters.items()}

    class Bound(nn.Module):
        def forward(self, ids: Tensor) -> Any:
            return torch.func.functional_call(model.module, parameters, (ids,))

    now = alone(Model(Bound(), parameters), Domain("d", tuple(source.domain.sequences[i] for i in places)))
    weights = torch.from_numpy(coefficients((now.detach() - before).numpy()))
    return list(torch.autograd.grad(weights @ now, list(parameters.values())))


@pytest.mark.parametrize("kind", ["grpo", "dpo", "penalty"])
@pytest.mark.parametrize("tokens", [16384, 60])
def test_minibatches_have_the_gradient_of_single_sequences(toy: Model, kind: str, tokens: int) -> None:
    """Away from the policy that sampled; one prompt's rewards are all alike."""
    alike = [Sequence((7, 7, 8, 8), (3, 4, i), "alike", 1.0) for i in range(4)]
    domain = Domain("d", (*ragged(4, prompts=3).sequences[:-1], *alike))
    changes = {"grpo": {"algorithm": "grpo"}, "dpo": {"algorithm": "dpo"}, "penalty": {"kl_beta": 0.3}}[kind]
    source = rollouts(domain, tabular.training(**changes))
    places = next(source.minibatches(0))
    leaves, moved = Trainable(toy), torch.Generator().manual_seed(0)
    reader = Minibatches(leaves, source, tokens)
    before = alone(toy, Domain("d", tuple(domain.sequences[i] for i in places)))
    with torch.no_grad():
        for leaf in leaves.leaves.values():
            leaf += 0.03 * torch.randn(leaf.shape, generator=moved, dtype=leaf.dtype)
    at = Model(toy.module, {n: p.detach() for n, p in leaves.leaves.items()})
    reader.accumulate(places, before.numpy())
    got = [leaf.grad for leaf in leaves.leaves.values()]
    wanted = dense(at, source, places, before, lambda ratio: source.weigh(places, ratio).coefficients)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)
    assert source.teaches[-4:].any() == (kind == "penalty")


def test_weights_of_what_teaches_do_not_depend_on_the_rest() -> None:
    """A prompt whose rewards are alike adds to what is averaged over, and no ratio of its own."""
    rows = [Sequence((9,), (i, i), "p", float(i)) for i in range(3)]
    more = [Sequence((8,), (i, i), "q", 1.0) for i in range(3)]
    ratio, strange = np.array([0.3, -0.2, 1.5]), np.array([5.0, -3.0, 1.0])
    few = Rollouts(Domain("d", tuple(rows)), tabular.training())
    both = Rollouts(Domain("d", (*rows, *more)), tabular.training())
    a = few.weigh(np.arange(3), ratio, 0.9)
    b = both.weigh(np.arange(6), np.concatenate([ratio, strange]), 0.9)
    np.testing.assert_allclose(b.coefficients, [*(a.coefficients / 2), 0, 0, 0], rtol=1e-12)
    assert (b.ess, b.exponent) == (a.ess, a.exponent)
    rho = np.exp(a.exponent * ratio)
    assert b.reward == pytest.approx((a.reward * rho.sum() + 3) / (rho.sum() + 3))
    only = both.weigh(np.arange(3, 6), strange)
    assert (only.ess, only.exponent, only.reward, only.coefficients.any()) == (1.0, 1.0, 1.0, False)


def test_a_minibatch_that_teaches_nothing_has_a_gradient_of_zero() -> None:
    model = tabular.model()
    rows = [Sequence((3 + p,), (i, i), str(p), float(i * p)) for p in range(2) for i in range(3)]
    source = rollouts(Domain("d", tuple(rows)), tabular.training())
    leaves = Trainable(model)
    reader = Minibatches(leaves, source, 100)
    reader.accumulate(np.arange(3), None)
    assert not leaves.leaves["weight"].grad.any()  # type: ignore[union-attr]
    reader.accumulate(np.arange(3, 6), None)
    kept = leaves.leaves["weight"].grad.clone()  # type: ignore[union-attr]
    assert kept.any()
    reader.accumulate(np.arange(3), np.zeros(3))
    torch.testing.assert_close(leaves.leaves["weight"].grad, kept)


def test_what_was_sampled_is_scored_once(toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = ragged(5, prompts=3)
    source = Rollouts(domain, tabular.training())
    reader = Minibatches(Trainable(toy), source, 16384)
    recall, asked, read = Recall(reader), list[int](), reader.logp

    def counted(places: Any) -> Any:
        asked.append(len(places))
        return read(places)

    monkeypatch.setattr(reader, "logp", counted)
    first, everything = np.arange(9), np.arange(len(domain.sequences))
    expected = alone(toy, domain).numpy()
    assert source.teaches[first].all()
    reader.accumulate(first, None, recall=recall)
    np.testing.assert_allclose(recall.logp(first), expected[:9], rtol=1e-10)
    assert asked == [], "the gradient's own forward pass told them"
    found = recall.logp(everything)
    assert asked == [source.teaches[9:].sum()]
    np.testing.assert_allclose(found[source.teaches], expected[source.teaches], rtol=1e-10)
    assert np.isnan(found[~source.teaches]).all()
    recall.logp(everything)
    assert len(asked) == 1
