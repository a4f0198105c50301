"""What estimated updates would do to a domain, by evaluating the moved policy on its sequences, with error bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from interference import objectives, statistics
from interference.domain import Domain
from interference.measurement import Scores, sequence_change
from interference.statistics import Array
from interference.truncation import LOW_ESS

COLUMNS = (
    *("predicted", "stderr", "low", "high", "sampling_stderr", "update_stderr"),
    *("noise_term", "noise_ess", "ess", "route"),
    *("agreement", "reliability", "predicted_first", "predicted_second", "anchor_value", "sequences"),
)
"""What a forecast says of a cell, after domain, update and own.

predicted: the objective's own value at the moved policy (importance-weighted for reward) less its present one, free of the
noise of the estimated update and with that of a real training, `noise_term` in all; never beyond the range of the rewards.
stderr, low, high (90 %): of predicted, from sampling_stderr (of the sequences, over prompts) and update_stderr (of the
update's estimate, and of the training's own randomness).  route, ess: how the moved policy was evaluated (`Point`), and the
effective share of the sequences; noise_ess: the same of the noise term.  agreement, reliability: of the two estimates of the
update (`Halves`).  predicted_first, predicted_second: the Taylor polynomial along their mean, not corrected.
"""


@dataclass(frozen=True)
class Point:
    """Change of an objective at theta + d from its value at theta, with bootstrap replicates; ess: effective share of the
    sequences, 1 where they are not weighted; route: "weighted" (by importance), "evaluated" (on given
    sequences), "sampled", or "second" (the second-order polynomial)."""

    value: float
    replicates: Array
    ess: float
    route: str = "weighted"


def moved(objective: str, domain: Domain, anchor: Scores, at: Scores, seed: int) -> Point:
    """The change from the scores of a domain's sequences at theta and at theta + d."""
    if objective == "reward":
        return moved_reward(domain, at.logp - anchor.logp, seed)
    change = sequence_change(objective, domain, anchor, at, seed)
    return Point(change.delta, change.replicates, 1.0, "evaluated")


def joined(parts: Sequence[Point], shares: Sequence[float]) -> Point:
    """The change on several parts of a domain together, each with its share of the prompts."""
    value = sum(s * p.value for s, p in zip(shares, parts, strict=True))
    replicates = np.asarray(sum(s * p.replicates for s, p in zip(shares, parts, strict=True)))
    return Point(float(value), replicates, min(p.ess for p in parts), parts[0].route)


def moved_reward(domain: Domain, log_ratio: Array, seed: int) -> Point:
    """Change of expected reward by self-normalised importance weights.

    sum v rho (r - b) / sum v rho - sum v (r - b) / sum v, with v = 1 / (responses to the prompt) and b the leave-one-out
    baseline: never larger than the rewards' range, whatever the ratios.
    """
    _, weight, advantage = objectives.reward_terms(domain)
    ratio = np.exp(log_ratio - log_ratio.max())
    columns = np.stack([weight * ratio * advantage, weight * ratio, weight * advantage, weight], axis=1)
    ids, sums = statistics.group_sums(columns, domain.prompt_ids)
    draws = statistics.ratio_replicates(sums[:, 0], sums[:, 1], ids, seed)
    draws = draws - statistics.ratio_replicates(sums[:, 2], sums[:, 3], ids, seed)
    total = sums.sum(0)
    ess = statistics.effective_sample_size(log_ratio) / len(log_ratio)
    return Point(float(total[0] / total[1] - total[2] / total[3]), draws, ess)


@dataclass(frozen=True)
class NoiseTerm:
    """n = (L(d_1) + L(d_2)) / 2 - L(u), which is 1/2 w'Hw to second order (see `Halves`), with replicates; slope: half the
    difference of L between the two estimates."""

    value: float
    replicates: Array
    slope: float
    ess: float


def noise_term(mean: Point, first: Point, second: Point) -> NoiseTerm:
    """From the changes at the mean u of two estimates and at either of them, on the same sequences."""
    value = (first.value + second.value) / 2 - mean.value
    draws = (first.replicates + second.replicates) / 2 - mean.replicates
    return NoiseTerm(value, draws, (first.value - second.value) / 2, min(first.ess, second.ess))


def cell(
    mean: Point, term: NoiseTerm, noise: float, *, unseen: Point | None = None, second: Point | None = None
) -> dict[str, float | str]:
    """A forecast from the change at the mean u of two estimates.

    L(u) - n is what the update itself does, and L(u) + (2 noise - 1) n adds the harm of a real training's noise. Where the
    estimates are tried on the half that they were not made from (`unseen`, the mean of both), L(unseen) - 2 (1 - noise) n is
    the same. Where the weights of any of it fail, the second-order polynomial along u is told instead, if it is at hand.
    """
    base, weight = (mean, 2 * noise - 1) if unseen is None else (unseen, -2 * (1 - noise))
    if second is not None and min(base.ess, term.ess) < LOW_ESS and base.route == "weighted":
        base, weight = second, 0.0
    elif term.ess < LOW_ESS:  # the difference of three values that are noise themselves
        weight = 0.0
    return {
        "predicted": base.value + weight * term.value,
        "sampling_stderr": float(statistics.stderr(base.replicates + weight * term.replicates)),
        "spread": term.slope,
        "noise_term": weight * term.value,
        "ess": (mean if unseen is None else unseen).ess,
        "noise_ess": term.ess,
        "route": base.route,
    }
