"""What estimated updates would do to a domain, by evaluating the moved policy on its sequences, with error bars."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from interference import objectives, statistics
from interference.domain import Domain
from interference.measurement import Scores, sequence_change
from interference.statistics import Array
from interference.truncation import LOW_ESS

COLUMNS = (
    *("predicted", "stderr", "low", "high", "sampling_stderr", "update_stderr", "method_stderr"),
    *("noise_term", "noise_ess", "ess", "route"),
    *("agreement", "reliability", "predicted_first", "predicted_second", "anchor_value", "sequences"),
)
"""What a forecast says of a cell, after domain, update and own.

predicted: the objective's own value at the moved policy (importance-weighted for reward) less its present one, free of the
noise of the estimated update and with that of a real training, `noise_term` in all; never beyond the range of the rewards.
The gradient tier tells the first order, and so do others, from a tenth of the way (`REACH`), where weights fail and nothing
better is at hand; it falls off as the range of the rewards is approached (`within_reach`).
stderr, low, high (90 %): of predicted, from sampling_stderr (of the sequences, over prompts), update_stderr (of the
update's estimate, and of the training's own randomness, but for how a LoRA adapter's A is drawn) and method_stderr (of the way
of forecasting: `METHOD_ERROR`).
route, ess: how the moved policy was evaluated (`Point`), and the effective share of the sequences; noise_ess: the same of the
noise term.  agreement, reliability: of the two estimates of the update (`Halves`).  predicted_first, predicted_second: the
Taylor polynomial along their mean, not corrected.
"""


SILENT_SHARE = 0.25
"""Share of the prompts whose responses are all rewarded alike that moved policies are evaluated on (`telling`)."""
LEAST_SILENT = 8
"""So many of them at least, where there are as many."""
REACH = 0.1
"""Share of an update at which its first order is taken: far enough for float32, near enough for curvature not to matter."""


@dataclass(frozen=True)
class Point:
    """Change of an objective at theta + d from its value at theta, with bootstrap replicates; ess: effective share of the
    sequences, 1 where they are not weighted; route: "weighted" (by importance), "evaluated" (on given
    sequences), "sampled", "second" (the second-order polynomial), or "first" (extrapolated from close by)."""

    value: float
    replicates: Array
    ess: float
    route: str = "weighted"


@dataclass(frozen=True, eq=False)
class Telling:
    """Sequences that say what a moved policy does to a domain, (S,) of them.

    stands: how many of the domain's sequences each stands for.  weight, advantage: of the reward (`objectives.reward_terms`), of
    the whole domain; None for nll.
    """

    domain: Domain
    stands: Array
    weight: Array | None = None
    advantage: Array | None = None

    def take(self, places: Iterable[int]) -> Telling:
        """Some of them."""
        at = list(places)
        part = Domain(self.domain.name, tuple(self.domain.sequences[i] for i in at))
        weight, advantage = (None if x is None else x[at] for x in (self.weight, self.advantage))
        return Telling(part, self.stands[at], weight, advantage)


def telling(
    objective: str, domain: Domain, parts: Mapping[str, Hashable] | None = None, silent_share: float = SILENT_SHARE
) -> Telling:
    """The sequences of a domain that moved policies are evaluated on.

    Responses to a prompt that are all rewarded alike have no advantage: they say nothing but how much weight there is in all,
    for which a share of these prompts, each with several others' weight, is enough. parts: {prompt: which part of the domain
    it is in}, for parts that will be evaluated by themselves; the share is taken of each.
    """
    rows = domain.sequences
    if objective != "reward":
        return Telling(domain, np.ones(len(rows)))
    reward, weight, advantage = objectives.reward_terms(domain)
    members: dict[str, list[int]] = {}
    for i, prompt in enumerate(domain.prompt_ids):
        members.setdefault(prompt, []).append(i)
    silent: dict[Hashable, list[list[int]]] = {}
    for prompt, at in members.items():
        if len(at) > 1 and np.ptp(reward[at]) == 0:
            silent.setdefault((parts or {}).get(prompt), []).append(at)
    stands = np.ones(len(rows))
    for alike in silent.values():
        count = min(len(alike), max(LEAST_SILENT, round(silent_share * len(alike))))
        stands[np.concatenate(alike)] = 0.0
        for place in np.linspace(0, len(alike), count, endpoint=False).astype(int):
            stands[alike[place]] = len(alike) / count
    return Telling(domain, stands, weight, advantage).take(np.flatnonzero(stands))


def moved(objective: str, of: Telling, anchor: Scores, at: Scores, seed: int, reach: float = 1.0) -> Point:
    """The change from the scores of a domain's sequences at theta and at theta + d.

    reach: `at` is at theta + reach d, and the change is extrapolated from there: the first order, whatever d's length.
    """
    if objective == "reward":
        near = moved_reward(of, at.logp - anchor.logp, seed)
    else:
        change = sequence_change(objective, of.domain, anchor, at, seed)
        near = Point(change.delta, change.replicates, 1.0, "evaluated")
    if reach == 1.0:
        return near
    far = statistics.effective_share((at.logp - anchor.logp) / reach, of.stands)
    ess = far if objective == "reward" else 1.0
    return Point(near.value / reach, near.replicates / reach, ess, "first")


def joined(parts: Sequence[Point], shares: Sequence[float]) -> Point:
    """The change on several parts of a domain together, each with its share of the prompts."""
    value = sum(s * p.value for s, p in zip(shares, parts, strict=True))
    replicates = np.asarray(sum(s * p.replicates for s, p in zip(shares, parts, strict=True)))
    return Point(float(value), replicates, min(p.ess for p in parts), parts[0].route)


def moved_reward(of: Telling, log_ratio: Array, seed: int) -> Point:
    """Change of expected reward by self-normalised importance weights.

    sum v rho (r - b) / sum v rho - sum v (r - b) / sum v, with v = 1 / (responses to the prompt), times how many sequences one
    stands for, and b the leave-one-out baseline: never larger than the rewards' range, whatever the ratios.
    """
    if of.weight is None or of.advantage is None:
        raise ValueError("sequences without advantages")
    weight, advantage = of.weight * of.stands, of.advantage
    ratio = np.exp(log_ratio - log_ratio.max())
    columns = np.stack([weight * ratio * advantage, weight * ratio, weight * advantage, weight], axis=1)
    ids, sums = statistics.group_sums(columns, of.domain.prompt_ids)
    draws = statistics.ratio_replicates(sums[:, 0], sums[:, 1], ids, seed)
    draws = draws - statistics.ratio_replicates(sums[:, 2], sums[:, 3], ids, seed)
    total = sums.sum(0)
    ess = statistics.effective_share(log_ratio, of.stands)
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
    ess = 1.0 if mean.route == "first" else min(first.ess, second.ess)
    return NoiseTerm(value, draws, (first.value - second.value) / 2, ess)


def noise_weight(found: Point, term: NoiseTerm, noise: float, unseen: bool) -> float:
    """How often the noise term is added to what was found of an update (see `cell`)."""
    if (
        found.route in ("first", "second") or term.ess < LOW_ESS
    ):  # then it is the difference of three values that are noise
        return 0.0
    return -2 * (1 - noise) if unseen and found.route != "sampled" else 2 * noise - 1


def cell(
    found: Point, term: NoiseTerm, noise: float, unseen: bool = False, second: Point | None = None
) -> dict[str, float | str]:
    """A forecast from what was found of an update: the change at the mean u of two estimates, or (`unseen`) the mean change at
    either of them, on the half that it was not made from.

    L(u) - n is what the update itself does, and L(u) + (2 noise - 1) n adds the harm of a real training's noise;
    L(unseen) - 2 (1 - noise) n is the same. Where the weights of any of it fail, the second-order polynomial along u is told
    instead, if it is at hand. A first order has no such harm in it.
    """
    ess = found.ess
    if second is not None and min(found.ess, term.ess) < LOW_ESS and found.route == "weighted":
        found = second
    weight = noise_weight(found, term, noise, unseen)
    return {
        "predicted": found.value + weight * term.value,
        "sampling_stderr": float(statistics.stderr(found.replicates + weight * term.replicates)),
        "spread": term.slope,
        "noise_term": weight * term.value,
        "ess": ess,
        "noise_ess": term.ess,
        "route": found.route,
    }


def within_range(row: Mapping[str, Any], domain: Domain) -> dict[str, float]:
    """A cell of reward kept within the rewards' range: an extrapolation gradually, with its errors; others where it ends."""
    least, most, present = min(domain.rewards()), max(domain.rewards()), row["anchor_value"]
    if row["route"] != "first":
        return {"predicted": float(np.clip(row["predicted"] + present, least, most)) - present}
    predicted, left = within_reach(row["predicted"], present, least, most)
    return {"predicted": predicted, **{k: row[k] * left for k in ("sampling_stderr", "spread")}}


def within_reach(change: float, present: float, least: float, most: float) -> tuple[float, float]:
    """An extrapolated change of reward, bounded by the room that is left, and the slope by which it is flattened there.

    room (1 - exp(-|change| / room)): what is gained falls in proportion to what can still be gained.

    >>> [round(x, 3) for x in within_reach(0.3, present=0.6, least=0.0, most=1.0)]
    [0.211, 0.472]
    """
    room = most - present if change > 0 else present - least
    if room <= 0:
        return 0.0, 0.0
    left = float(np.exp(-abs(change) / room))
    return float(np.copysign(room * (1 - left), change)), left
