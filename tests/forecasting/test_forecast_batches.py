"""What a frozen rollout weighs: against autograd of the surrogates, against TRL's formulas, and in expectation."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import tabular
import torch
from scipy.stats import binom

from interference.domain import Domain, Sequence
from interference.errors import InputError
from interference.forecasting.batches import Pairs, Rollouts, group_deviations, preference_pairs, rollouts, tempered
from interference.objectives import first_order_weights
from interference.statistics import effective_sample_size

LOSSES = ["dr_grpo", "grpo", "dapo", "sequence"]


def ragged(seed: int = 0) -> tuple[Domain, torch.Tensor]:
    """Three prompts with four ragged responses each, and log-ratios to the policy that sampled them."""
    rng = np.random.default_rng(seed)
    rows = [
        Sequence((p,), tuple(rng.integers(0, 9, rng.integers(1, 6)).tolist()), str(p), float(rng.integers(0, 4)))
        for p in range(3)
        for _ in range(4)
    ]
    return Domain("d", tuple(rows)), torch.tensor(0.5 * rng.standard_normal(12), requires_grad=True)


def surrogate(domain: Domain, log_ratio: torch.Tensor, **t: Any) -> torch.Tensor:
    """The loss written out: sum_i rho_i A_i over what the loss divides by, with A_i held fixed."""
    rho, reward = log_ratio.exp(), torch.tensor(domain.rewards(), dtype=torch.float64)
    tokens = torch.tensor([float(len(s.response)) for s in domain.sequences], dtype=torch.float64)
    reward = reward - t["kl_beta"] * log_ratio.detach()
    weight, advantage = rho.detach(), torch.zeros_like(rho)
    for p in range(3):
        one = slice(4 * p, 4 * p + 4)
        share = weight[one] / weight[one].sum()
        centred = reward[one] - (share * reward[one]).sum()
        advantage[one] = (
            centred * 4 / 3 * ((t["generations"] - 1) / t["generations"] if t["algorithm"] == "grpo" else 1)
        )
        if t["scale_rewards"] == "group":
            advantage[one] /= ((share * centred**2).sum() * 4 / 3).sqrt() + 1e-4
    if t["scale_rewards"] == "batch":
        share = weight / weight.sum()
        advantage = advantage / (((share * (reward - (share * reward).sum()) ** 2).sum() * 12 / 11).sqrt() + 1e-4)
    per_token = rho * advantage
    total = {
        "dr_grpo": (per_token / (12 * t["max_response_tokens"])).sum(),
        "grpo": (per_token / tokens).mean(),
        "dapo": per_token.sum() / tokens.sum(),
        "sequence": per_token.mean(),
    }[t["loss"]]
    return -total


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
@pytest.mark.parametrize("scale", ["none", "group", "batch"])
@pytest.mark.parametrize("loss", LOSSES)
def test_coefficients_are_the_gradient_of_the_surrogate(loss: str, scale: str, algorithm: str) -> None:
    domain, log_ratio = ragged()
    settings = {"loss": loss, "scale_rewards": scale, "algorithm": algorithm, "kl_beta": 0.3, "generations": 4}
    training = tabular.training(**settings, max_response_tokens=7)
    found = Rollouts(domain, training).weigh(np.arange(12), log_ratio.detach().numpy())
    (expected,) = torch.autograd.grad(surrogate(domain, log_ratio, **settings, max_response_tokens=7), log_ratio)
    np.testing.assert_allclose(found.coefficients, expected.numpy(), rtol=1e-10)


@pytest.mark.parametrize("exponent_below_one", [False, True])
def test_direction_is_the_gradient_of_the_self_normalised_value(exponent_below_one: bool) -> None:
    """For one prompt, sum rho r / sum rho differentiated by autograd, times mean rho and the n / (n - 1) of leave-one-out."""
    domain, log_ratio = ragged(3)
    domain, log_ratio = Domain("d", domain.sequences[:4]), log_ratio.detach()[:4].requires_grad_()
    least = 0.98 if exponent_below_one else 0.0
    found = Rollouts(domain, tabular.training()).weigh(np.arange(4), log_ratio.detach().numpy(), least)
    assert (found.exponent < 1) == exponent_below_one
    rho = (found.exponent * log_ratio).exp()
    value = (rho * torch.tensor(domain.rewards())).sum() / rho.sum()
    (gradient,) = torch.autograd.grad(value, log_ratio)
    expected = -gradient / found.exponent * rho.detach().mean() * 4 / 3
    np.testing.assert_allclose(found.coefficients, expected.numpy(), rtol=1e-6)
    np.testing.assert_allclose(found.reward, value.item(), rtol=1e-6)


def test_at_the_base_it_is_the_reward_gradient_of_objectives() -> None:
    """Leave-one-out baselines both; `objectives` counts prompts, which all have four responses here."""
    domain, _ = ragged(1)
    found = Rollouts(domain, tabular.training()).weigh(np.arange(12), np.zeros(12))
    np.testing.assert_allclose(-found.coefficients, first_order_weights("reward", domain), rtol=1e-12)
    assert (found.ess, found.exponent) == (1.0, 1.0)


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_at_the_base_it_is_trl(scale: str) -> None:
    """Groups of the training's own size: (r - mean) / (torch.std + 1e-4) over the batch's tokens, as GRPOTrainer has it."""
    domain, _ = ragged(2)
    training = tabular.training(algorithm="grpo", loss="dapo", scale_rewards=scale, generations=4, prompts_per_step=3)
    reward = torch.tensor(domain.rewards(), dtype=torch.float64).view(3, 4)
    divisor = {"none": 1.0, "group": reward.std(1, keepdim=True) + 1e-4, "batch": reward.std() + 1e-4}[scale]
    advantage = ((reward - reward.mean(1, keepdim=True)) / divisor).reshape(-1)
    tokens = sum(len(s.response) for s in domain.sequences)
    found = Rollouts(domain, training).weigh(np.arange(12), np.zeros(12))
    np.testing.assert_allclose(found.coefficients, (-advantage / tokens).numpy(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("algorithm", "factor"), [("rloo", 1.0), ("grpo", 2 / 3)])
def test_unbiased_over_all_groups_that_could_be_drawn(algorithm: str, factor: float) -> None:
    """All 27 groups of three responses, each with its probability: the mean gradient is the exact one (grpo: 1 - 1/G of it)."""
    logits = torch.tensor([0.3, -0.4, 0.9], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([0.0, 1.0, 0.25], dtype=torch.float64)
    log_p = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((log_p.exp() * reward).sum(), logits, retain_graph=True)
    score = torch.stack([torch.autograd.grad(log_p[i], logits, retain_graph=True)[0] for i in range(3)])
    rows = tuple(Sequence((9,), (i,), "p", float(r)) for i, r in enumerate(reward))
    source = Rollouts(Domain("d", rows), tabular.training(algorithm=algorithm, generations=3))
    mean = torch.zeros(3, dtype=torch.float64)
    for group in itertools.product(range(3), repeat=3):
        coefficients = torch.from_numpy(source.weigh(np.array(group), np.zeros(3)).coefficients)
        mean += log_p.detach()[list(group)].sum().exp() * (coefficients @ score[list(group)])
    torch.testing.assert_close(-mean, factor * exact)


@pytest.mark.parametrize("p", [0.03, 0.1, 0.5])
def test_scaling_by_small_groups_is_grpo_s_on_average(p: float) -> None:
    """A prompt that is solved with probability p, in groups of four as TRL scales them, against what 32 rollouts of it say:
    both on average over all that may be drawn; what counts is the sum of the coefficients of the solved."""
    training = tabular.training(algorithm="grpo", scale_rewards="group", generations=4)
    found = expected = naive = 0.0
    for k in range(5):
        group = torch.tensor([1.0] * k + [0.0] * (4 - k), dtype=torch.float64)
        advantage = (group - group.mean()) / (group.std() + 1e-4)
        expected += binom.pmf(k, 4, p) * float(advantage[:k].sum()) / 4
    for solved in range(1, 32):
        rows = tuple(Sequence((9,), (i,), "p", 3.0 * (i < solved)) for i in range(32))
        weighed = Rollouts(Domain("d", rows), training).weigh(np.arange(32), np.zeros(32))
        found -= binom.pmf(solved, 32, p) * weighed.coefficients[:solved].sum()
        naive += (
            binom.pmf(solved, 32, p) * 0.75 * (solved / 32 * (1 - solved / 32)) ** 0.5
        )  # by the rollouts' own deviation
    assert found == pytest.approx(expected, rel=2e-3)  # the 1e-4 beside the deviation
    assert naive > 1.05 * expected


def test_groups_by_enumeration() -> None:
    """All pairs of five rewards, and the group that is everything."""
    rewards = [1.0, 1.0, 0.0, 0.0, 0.0]
    pairs = [np.std(pair, ddof=1) for pair in itertools.combinations(rewards, 2)]
    assert group_deviations(5, 2)[2] == pytest.approx(np.mean(pairs))
    assert group_deviations(5, 5)[2] == pytest.approx(np.std(rewards, ddof=1))


def test_dpo_is_the_gradient_of_trl_s_loss() -> None:
    domain, log_ratio = ragged()
    source = Pairs(domain, tabular.training(algorithm="dpo", dpo_beta=0.7))
    places = source.pairs[:4].reshape(-1)
    found = source.weigh(places, log_ratio.detach().numpy()[places])
    at = log_ratio[torch.from_numpy(places)]
    loss = -torch.nn.functional.logsigmoid(0.7 * (at[0::2] - at[1::2])).mean()
    (expected,) = torch.autograd.grad(loss, log_ratio)
    np.testing.assert_allclose(found.coefficients, expected.numpy()[places], rtol=1e-12)
    with np.errstate(all="raise"):  # no overflow where a pair is learned beyond doubt
        assert source.weigh(places[:2], np.array([5e3, -5e3])).coefficients.tolist() == [0.0, 0.0]


def test_dpo_and_the_penalty_compare_with_the_reference() -> None:
    domain, log_ratio = ragged()
    ratio, shift = log_ratio.detach().numpy(), np.linspace(-1, 1, 12)
    pairs = Pairs(domain, tabular.training(algorithm="dpo"))
    places = pairs.pairs[:3].reshape(-1)
    a = pairs.weigh(places, ratio[places], 0.0, shift[places]).coefficients
    np.testing.assert_allclose(a, pairs.weigh(places, shift[places]).coefficients)
    source = Rollouts(domain, tabular.training(kl_beta=0.5))
    penalised = Domain(
        "d",
        tuple(
            Sequence(s.prompt, s.response, s.prompt_id, s.reward - 0.5 * k)
            for s, k in zip(domain.sequences, shift, strict=True)
        ),
    )
    by_hand = Rollouts(penalised, tabular.training()).weigh(np.arange(12), ratio).coefficients
    np.testing.assert_allclose(source.weigh(np.arange(12), ratio, 0.0, shift).coefficients, by_hand)


def test_pairs_are_better_and_worse_and_used_once() -> None:
    domain, _ = ragged()
    reward, pairs = np.array(domain.rewards()), preference_pairs(domain)
    assert (reward[pairs[:, 0]] > reward[pairs[:, 1]]).all()
    assert len(np.unique(pairs)) == pairs.size
    assert (np.array(domain.prompt_ids)[pairs[:, 0]] == np.array(domain.prompt_ids)[pairs[:, 1]]).all()


@pytest.mark.parametrize("wanted", [1, 2, 4, 5])
def test_minibatches_visit_every_prompt_equally_and_none_twice(wanted: int) -> None:
    rows = [Sequence((p,), (i,), str(p), float(i)) for p in range(5) for i in range(2)]
    training = tabular.training(prompts_per_step=wanted, generations=2)
    batches = rollouts(Domain("d", tuple(rows)), training).minibatches(3)
    drawn = [next(batches) for _ in range(60)]
    assert all(len(np.unique(b)) == len(b) == 2 * wanted for b in drawn if wanted in (1, 5))
    assert all(len(np.unique(b)) == len(b) for b in drawn)
    seen = np.bincount(np.concatenate(drawn), minlength=10)
    assert seen.max() - seen.min() <= 1 + (wanted in (2, 4))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_tempering_holds_the_effective_sample_size(share: float) -> None:
    log_ratio = np.random.default_rng(0).normal(0, 3, 200)
    exponent = tempered(log_ratio, share)
    assert effective_sample_size(log_ratio) < share * 200
    np.testing.assert_allclose(effective_sample_size(exponent * log_ratio), share * 200, rtol=1e-3)
    assert tempered(0.01 * log_ratio, share) == 1.0


def test_nothing_to_learn_is_refused() -> None:
    rows = tuple(Sequence((p,), (i,), str(p), float(p)) for p in range(2) for i in range(2))
    with pytest.raises(InputError, match="different rewards"):
        Rollouts(Domain("d", rows), tabular.training())


def test_the_oracle_catches_a_planted_error() -> None:
    """A baseline that forgets the ratios is another gradient."""
    domain, log_ratio = ragged()
    source = Rollouts(domain, tabular.training())
    right = source.weigh(np.arange(12), log_ratio.detach().numpy()).coefficients
    wrong = source.weigh(np.arange(12), np.zeros(12)).coefficients * log_ratio.detach().exp().numpy()
    assert np.abs(right - wrong).max() > 1e-2
