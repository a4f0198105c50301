"""Objectives as closed forms of the token jets: value, slope, Hessian and Gauss-Newton curvature, per sequence.

With s the sum of log-probabilities over a response, s1, s2, f the sums of d1, d2 and fisher, n the tokens, r the reward, b a
leave-one-out baseline and w = 1 / (responses to this prompt):

    objective  numerator   slope         curvature             Gauss-Newton          denominator
    nll        -s          -s1           -s2                   f                     n
    reward     w r         w (r-b) s1    w (r-b)(s2 + s1 s1')  w (r-b)(s1 s1' - f)   w
    surrogate  w r         w (r-b) s1    w (r-b) sum(d2 + d1 d1')   ... (d1 d1' - f) w
    kl         0           0             f                     f                     n

The objective is the ratio of the sums. `reward` is exact in expectation: for rollouts of the anchor,
J(theta + t d) = E[r exp(s(t) - s(0))]. Gauss-Newton drops the model's own second derivative, i.e. replaces d2 by -fisher.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from interference.domain import Domain
from interference.errors import InputError, nearest
from interference.jets import SequenceJets

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Kind:
    """Unit and direction of an objective, and whether it needs rewards."""

    unit: str
    better: str
    rewards: bool


OBJECTIVES = {
    "nll": Kind("nats per response token", "lower", False),
    "reward": Kind("reward per prompt", "higher", True),
    "surrogate": Kind("reward per prompt", "higher", True),
    "kl": Kind("nats per response token", "lower", False),
}


@dataclass(frozen=True)
class SequenceTerms:
    """Per-sequence numerators (S, ...) and denominators (S,); the objective is sum(numerator) / sum(denominator)."""

    value: Array
    slope: Array
    curvature: Array
    ggn: Array
    denominator: Array


def kind(objective: str) -> Kind:
    """The objective by name; InputError that names the nearest known one."""
    if objective not in OBJECTIVES:
        raise InputError(
            got=f"objective {objective!r}",
            expected="a known objective",
            remedy=nearest(objective, OBJECTIVES),
        )
    return OBJECTIVES[objective]


def sequence_terms(objective: str, jets: SequenceJets, domain: Domain) -> SequenceTerms:
    """The table above for every sequence of the domain (jets in the domain's order)."""
    kind(objective)
    if objective == "nll":
        return SequenceTerms(-jets.logp, -jets.d1, -jets.d2, jets.fisher, jets.tokens)
    if objective == "kl":
        zero = np.zeros_like(jets.logp)
        return SequenceTerms(zero, np.zeros_like(jets.d1), jets.fisher, jets.fisher, jets.tokens)
    reward, weight, advantage = reward_terms(domain)
    scale = weight * advantage
    square = jets.d1d1 if objective == "surrogate" else jets.d1[:, :, None] * jets.d1[:, None, :]
    return SequenceTerms(
        weight * reward,
        scale[:, None] * jets.d1,
        scale[:, None, None] * (jets.d2 + square),
        scale[:, None, None] * (square - jets.fisher),
        weight,
    )


def reward_terms(domain: Domain) -> tuple[Array, Array, Array]:
    """(r, w, r - b) per sequence; b is the mean reward of the prompt's other responses, which keeps E[(r-b) s1] unbiased.

    A prompt with a single response takes the mean over the other prompts.

    Raises InputError when all rewards are equal: then the expected reward has no gradient to estimate.
    """
    reward = np.asarray(domain.rewards())
    if np.ptp(reward) == 0:
        raise InputError(
            got=f"domain {domain.name!r} with every reward equal to {reward[0]:g}",
            expected="rewards that differ, since a constant reward says nothing about which response is better",
            remedy="sample more or harder prompts, check the verifier, or use objective: nll",
        )
    _, where = np.unique(domain.prompt_ids, return_inverse=True)
    count, total = np.bincount(where).astype(float), np.bincount(where, reward)
    mean = total / count
    others = (mean.sum() - mean) / max(len(mean) - 1, 1)
    n = count[where]
    baseline = np.where(n > 1, (total[where] - reward) / np.maximum(n - 1, 1), others[where])
    return reward, 1.0 / n, reward - baseline


def first_order_weights(objective: str, domain: Domain) -> Array:
    """c (S,) with grad L = sum_i c_i grad s_i at the anchor: what a reverse-mode gradient needs. Zero for kl."""
    kind(objective)
    if objective == "kl":
        return np.zeros(len(domain.sequences))
    if objective == "nll":
        return np.full(len(domain.sequences), -1.0 / sum(len(s.response) for s in domain.sequences))
    _, weight, advantage = reward_terms(domain)
    return np.asarray(weight * advantage / weight.sum())
