"""Minibatches of frozen rollouts, and what each of their tokens weighs in the loss that training would descend.

Every algorithm's gradient has one form, sum_it c_it grad log pi(y_it), with coefficients c that depend on the rewards and on
the present log-probabilities. For rollouts of the base and a policy that has moved from it, the policy gradient is

    E_base[ rho (r - b) grad log pi ],    rho = pi(y) / pi_base(y),

self-normalised within each prompt: b is the rho-weighted mean reward of the prompt's responses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import hypergeom

from interference.domain import Domain
from interference.errors import InputError
from interference.forecasting.training import Training
from interference.statistics import Array, effective_sample_size

Places = NDArray[np.intp]


@dataclass(frozen=True)
class Weighed:
    """What a minibatch says at the present policy.

    coefficients (S,): the loss's gradient is sum_i coefficients_i sum_t grad log pi(y_it).
    reward: importance-weighted mean reward (dpo: share of pairs in the right order).  ess: effective share of the sequences.
    exponent: to which the ratios were raised so that enough effective sequences remain; 1 where they did by themselves.
    Sequences that teach nothing (`Rollouts.teaches`) are not computed: their coefficient is zero, the mean over the minibatch
    counts them, the mean reward gives them a ratio of 1, and ess and exponent are those of the sequences that teach.
    """

    coefficients: Array
    reward: float
    ess: float
    exponent: float

    def shown(self) -> dict[str, float]:
        """What a path records of it."""
        return {"reward": self.reward, "ess": self.ess, "exponent": self.exponent}


class Rollouts:
    """Frozen rollouts of one domain in minibatches.

    Attributes: sequences; reward (S,); prompt (S,), the number of each one's prompt; tokens (S,); teaches (S,), whether a
    coefficient can be other than zero: not where all rewards of a prompt are equal, with no KL penalty and rewards that are
    not scaled by those of the whole batch.

    Raises InputError where no prompt has responses with different rewards: then there is nothing to learn.
    """

    def __init__(self, domain: Domain, training: Training):
        self.domain, self.training = domain, training
        self.reward = np.asarray(domain.rewards())
        self.prompt = np.unique(domain.prompt_ids, return_inverse=True)[1]
        self.tokens = np.array([float(len(s.response)) for s in domain.sequences])
        members = [np.flatnonzero(self.prompt == p) for p in range(self.prompt.max() + 1)]
        self.members = [m for m in members if len(m) > 1]
        self.better = np.full(len(self.reward), np.nan)
        for m in self.members:  # where a prompt's rewards take two values: whether each is the better one
            if len(np.unique(self.reward[m])) == 2:
                self.better[m] = self.reward[m] == self.reward[m].max()
        self.teaches = np.full(len(self.reward), training.kl_beta > 0 or training.scale_rewards == "batch")
        for m in self.members:
            self.teaches[m] |= np.ptp(self.reward[m]) > 0
        if not learnable(domain):
            raise InputError(
                got=f"domain {domain.name!r} without a prompt whose responses have different rewards",
                expected="several responses to each prompt, some better than others: the policy gradient compares them",
                remedy="sample more responses per prompt, or prompts of middling difficulty",
            )

    @property
    def size(self) -> int:
        """Sequences that minibatches draw from."""
        return sum(map(len, self.members))

    def minibatches(self, seed: int) -> Iterator[Places]:
        """Places of the sequences of one minibatch after another, whole prompts at a time, without end."""
        rng, wanted = np.random.default_rng(seed), self.training.rollouts_per_step
        batch: list[Places] = []
        while True:
            order = rng.permutation(len(self.members))
            held = np.array([any(m is b for b in batch) for m in self.members])
            # What is left of the last round comes last in this one, so that no batch holds a prompt twice.
            for p in order[np.argsort(held[order], kind="stable")]:
                batch.append(self.members[p])
                if sum(map(len, batch)) >= wanted:
                    yield np.concatenate(batch)
                    batch = []
            if (batch and sum(map(len, batch)) >= wanted / 2) or len(batch) == len(self.members):
                yield np.concatenate(batch)
                batch = []

    def weigh(
        self, places: Places, log_ratio: Array, least_ess: float = 0.0, from_reference: Array | None = None
    ) -> Weighed:
        """Coefficients of a minibatch whose sequences have these log-ratios to the policy that sampled them.

        from_reference: log-ratios to the reference of the KL penalty and of dpo, where that is another policy.
        """
        penalty = log_ratio if from_reference is None else from_reference
        t, reward = self.training, self.reward[places] - self.training.kl_beta * penalty
        teaches = self.teaches[places]
        exponent = tempered(log_ratio[teaches], least_ess) if teaches.any() else 1.0
        ratio = np.where(teaches, np.exp(exponent * log_ratio), 1.0)
        _, where, count = np.unique(self.prompt[places], return_inverse=True, return_counts=True)
        total = np.bincount(where, ratio)
        baseline = np.bincount(where, ratio * reward) / total
        advantage = (reward - baseline[where]) * (count / (count - 1.0))[where]
        if t.algorithm == "grpo":  # its baseline is the mean of all responses, the own one included
            advantage = advantage * (1 - 1 / t.generations)
        if t.scale_rewards == "group":
            variance = np.bincount(where, ratio * (reward - baseline[where]) ** 2) / total
            spread = np.sqrt(variance * count / (count - 1.0))
            share = np.bincount(where, ratio * self.better[places]) / total
            advantage = advantage * (self._small_groups(share, count) / (spread + 1e-4))[where]
        elif t.scale_rewards == "batch":
            mean, n = (ratio * reward).sum() / ratio.sum(), len(places)
            variance = (ratio * (reward - mean) ** 2).sum() / ratio.sum()
            advantage = advantage / (np.sqrt(variance * n / (n - 1.0)) + 1e-4)
        ess = effective_sample_size(log_ratio[teaches]) / teaches.sum() if teaches.any() else 1.0
        mean_reward = float((ratio * self.reward[places]).sum() / ratio.sum())
        coefficients = np.where(teaches, -ratio * advantage * self._token_weights(places), 0.0)
        return Weighed(coefficients, mean_reward, ess, exponent)

    def _small_groups(self, share: Array, count: Places) -> Array:
        """What dividing by the deviation of a group of `generations` does on average, over what it does in one of `count`.

        Groups of few responses to a prompt that is rarely solved are often alike and then teach nothing. Unbiased at the base
        for prompts with two rewards, `share` the better one's; 1 for others and for groups no larger than the training's.
        """
        out, size = np.ones(len(share)), self.training.generations
        for i in np.flatnonzero((share > 0) & (share < 1) & (count > size)):
            expected = group_deviations(int(count[i]), size)
            own = np.sqrt(share[i] * (1 - share[i]) * count[i] / (count[i] - 1))
            out[i] = np.interp(share[i] * count[i], np.arange(count[i] + 1), expected) / own
        return out

    def _token_weights(self, places: Places) -> Array:
        """Of every sequence's tokens. Prompts count alike, whatever their responses, of which training draws as many for each."""
        _, where, count = np.unique(self.prompt[places], return_inverse=True, return_counts=True)
        share, tokens = 1 / (len(count) * count[where]), self.tokens[places]
        return np.asarray(
            {
                "dr_grpo": share / self.training.max_response_tokens,
                "grpo": share / tokens,
                "dapo": share / (share * tokens).sum(),
                "sequence": share,
            }[self.training.loss]
        )


class Pairs(Rollouts):
    """Pairs of a better and a worse response to one prompt, for dpo: chosen at even places of a minibatch, rejected at odd ones.

    A prompt's best response is paired with its worst, the second best with the second worst, and so on while they differ.
    """

    def __init__(self, domain: Domain, training: Training):
        super().__init__(domain, training)
        self.pairs = preference_pairs(domain)

    @property
    def size(self) -> int:
        return len(self.pairs)

    def minibatches(self, seed: int) -> Iterator[Places]:
        rng, wanted = np.random.default_rng(seed), self.training.rollouts_per_step
        while True:
            order = rng.permutation(len(self.pairs))
            for start in range(0, max(1, len(order) - wanted + 1), wanted):
                yield self.pairs[order[start : start + wanted]].reshape(-1)

    def weigh(
        self, places: Places, log_ratio: Array, least_ess: float = 0.0, from_reference: Array | None = None
    ) -> Weighed:
        beta, moved = self.training.dpo_beta, log_ratio if from_reference is None else from_reference
        margin = beta * (moved[0::2] - moved[1::2])
        pull = beta * expit(-margin) / len(margin)
        coefficients = np.stack([-pull, pull], axis=1).reshape(-1)
        return Weighed(coefficients, float((margin > 0).mean()), 1.0, 1.0)


def preference_pairs(domain: Domain) -> NDArray[np.intp]:
    """(P, 2) places of chosen and rejected responses: best with worst, second best with second worst, while they differ.

    >>> from interference.domain import Sequence
    >>> rows = [Sequence((1,), (i,), "p", r) for i, r in enumerate([0.0, 1.0, 0.5, 0.5])]
    >>> preference_pairs(Domain("d", tuple(rows))).tolist()
    [[1, 0]]
    """
    reward, prompt = np.asarray(domain.rewards()), np.unique(domain.prompt_ids, return_inverse=True)[1]
    out = []
    for p in range(prompt.max() + 1):
        members = np.flatnonzero(prompt == p)
        order = members[np.argsort(-reward[members], kind="stable")]
        for better, worse in zip(order, order[::-1], strict=True):
            if reward[better] <= reward[worse]:
                break
            out.append((better, worse))
    return np.array(out, dtype=np.intp).reshape(-1, 2)


def learnable(domain: Domain) -> bool:
    """Whether some prompt has responses with different rewards."""
    reward, prompt = np.asarray(domain.rewards()), np.unique(domain.prompt_ids, return_inverse=True)[1]
    return any(np.ptp(reward[prompt == p]) > 0 for p in range(prompt.max() + 1))


@cache
def group_deviations(count: int, size: int) -> Array:
    """(count + 1,) the mean sample deviation of `size` rewards drawn from `count` without repetition, of which 0, 1, ... are 1
    and the others 0.

    >>> group_deviations(4, 2).round(3).tolist()
    [0.0, 0.354, 0.471, 0.354, 0.0]
    """
    k, solved = np.arange(size + 1), np.arange(count + 1)
    deviation = np.sqrt(k * (size - k) / (size * (size - 1.0)))
    return np.asarray(hypergeom.pmf(k, count, solved[:, None], size) @ deviation)


def rollouts(domain: Domain, training: Training) -> Rollouts:
    """The rollouts as the algorithm uses them."""
    return Pairs(domain, training) if training.algorithm == "dpo" else Rollouts(domain, training)


def tempered(log_ratio: Array, least_ess: float) -> float:
    """The largest exponent in (0, 1] at which at least the share `least_ess` of the sequences is effective, by bisection.

    >>> tempered(np.zeros(4), 0.9), round(tempered(np.array([0.0, 0.0, 0.0, 9.0]), 0.5), 2) < 0.3
    (1.0, True)
    """
    if effective_sample_size(log_ratio) >= least_ess * len(log_ratio):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        enough = effective_sample_size(middle * log_ratio) >= least_ess * len(log_ratio)
        low, high = (middle, high) if enough else (low, middle)
    return low
