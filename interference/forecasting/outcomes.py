"""outcomes: what an estimated update would do to a domain, by second order and by evaluating the moved policy, with error bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from interference import objectives, statistics
from interference.domain import Domain
from interference.measurement import Scores, sequence_change
from interference.quadratic import QuadraticModel
from interference.statistics import Array, Z
from interference.truncation import LOW_ESS

COLUMNS = (
    *("predicted", "stderr", "low", "high", "route", "predicted_first", "predicted_second", "evaluated"),
    *("sampling_stderr", "update_stderr", "noise_term", "ess", "sequences"),
)
"""What a forecast says of a cell.

predicted: the forecast, by `route` "evaluated" or, where too few of the rollouts are effective at the moved policy, "second".
predicted_first, predicted_second: by the Taylor polynomial; evaluated: from the objective's own value at the moved policy
(importance-weighted for reward). The last two are free of the noise of the estimated update and hold that of a real training,
`noise_term` in all. stderr, low, high (90 %): of predicted, from sampling_stderr (of the sequences, over prompts) and
update_stderr (of the update's estimate and of the training's own randomness). ess: effective share of the sequences.
"""


@dataclass(frozen=True)
class Outcome:
    """Change of one domain's objective under one update. Arrays are bootstrap replicates over prompts."""

    first: float
    second: float
    evaluated: float
    replicates: dict[str, Array]
    ess: float
    sequences: int

    @property
    def route(self) -> str:
        """Which of the two the forecast is."""
        usable = np.isfinite(self.evaluated) and self.ess >= LOW_ESS
        return "evaluated" if usable else "second"


@dataclass(frozen=True)
class Noise:
    """What the noise of an update does to one domain: its curvature term 1/2 w'Hw with replicates, and the slope c.w."""

    curvature: float
    replicates: Array
    slope: float


def noise_of(spread: QuadraticModel, update: str) -> Noise:
    """From the quadratic model along the differences w of the halves."""
    both, first = spread.predict({update: 1.0}), spread.predict({update: 1.0}, 1)
    return Noise(both.second, both.replicates - first.replicates, both.first)


def outcome(objective: str, domain: Domain, along: QuadraticModel, update: str, anchor: Scores, at: Scores) -> Outcome:
    """The change along an update, from the quadratic model and from the scores at theta and at theta + d; no noise corrected."""
    both, first = along.predict({update: 1.0}), along.predict({update: 1.0}, 1)
    if objective == "reward":
        value, draws, ess = moved_reward(domain, at.logp - anchor.logp, along.seed)
    else:
        change = sequence_change(objective, domain, anchor, at, along.seed)
        value, draws, ess = change.delta, change.replicates, 1.0
    replicates = {"first": first.replicates, "second": both.replicates, "evaluated": draws}
    return Outcome(first.value, both.value, value, replicates, ess, len(domain.sequences))


def moved_reward(domain: Domain, log_ratio: Array, seed: int) -> tuple[float, Array, float]:
    """Change of expected reward, its replicates, and the effective share of the rollouts, by self-normalised importance weights.

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
    return float(total[0] / total[1] - total[2] / total[3]), draws, ess


def joined(parts: Sequence[Outcome], shares: Sequence[float]) -> Outcome:
    """The outcome on several parts of a domain together, each with its share of the prompts."""

    def mean(values: Sequence[float]) -> float:
        return float(np.dot(shares, values))

    replicates = {
        k: np.asarray(sum(s * p.replicates[k] for s, p in zip(shares, parts, strict=True))) for k in parts[0].replicates
    }
    return Outcome(
        mean([p.first for p in parts]),
        mean([p.second for p in parts]),
        mean([p.evaluated for p in parts]),
        replicates,
        mean([p.ess for p in parts]),
        sum(p.sequences for p in parts),
    )


def row(found: Outcome, noise: Noise, weight: float, update_stderr: float) -> dict[str, object]:
    """The columns of a cell; `weight` times the curvature of the noise is added to what knows of curvature."""
    second, evaluated = (v + weight * noise.curvature for v in (found.second, found.evaluated))
    predicted = second if found.route == "second" else evaluated
    draws = found.replicates[found.route] + weight * noise.replicates
    sampling = float(statistics.stderr(draws))
    stderr = float(np.hypot(sampling, update_stderr))
    values = (
        *(predicted, stderr, predicted - Z * stderr, predicted + Z * stderr, found.route, found.first, second, evaluated),
        *(sampling, update_stderr, weight * noise.curvature, found.ess, found.sequences),
    )
    return dict(zip(COLUMNS, values, strict=True))
