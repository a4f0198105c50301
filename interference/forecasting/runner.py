"""Virtual trainings one after another, each prefix of several orders once, and what the updates that they end with do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from interference import statistics
from interference.domain import Domain
from interference.errors import InputError
from interference.expansion import check_domain
from interference.forecasting.batches import rollouts
from interference.forecasting.estimation import EFFORT, METHOD_ERROR
from interference.forecasting.frozen import Resample
from interference.forecasting.halves import Halves, noise_ratio
from interference.forecasting.outcomes import noise_weight, within_range
from interference.forecasting.training import Training
from interference.forecasting.tried import Tried, first_prompts, points_of
from interference.forecasting.virtual import steady_training
from interference.measurement import Scores
from interference.model import Model
from interference.statistics import Z
from interference.tree import Change, dense
from interference.truncation import LOW_ESS

Order = tuple[str, ...]
TRIED = 64
"""Prompts that the noise of the estimates is computed on."""


def check_trainings(
    model: Model, plans: Mapping[str, Training], trained: Collection[str], domains: Mapping[str, Domain],
    evaluation: Mapping[str, Domain] | None,
) -> None:  # fmt: skip
    """Refuse trainings that are missing, and domains whose expected reward cannot be told."""
    for name in sorted(set(trained) - plans.keys()):
        raise InputError(got=f"no training of {name!r}", expected="one for every domain trained on", remedy="add it")
    for domain in (*domains.values(), *(evaluation or {}).values()):
        check_domain(model, domain, "reward")


def depth_first(orders: Iterable[Order]) -> list[Order]:
    """All prefixes of some orders, each once and before what begins with it, and what begins alike together.

    >>> depth_first([("b", "a"), ("a", "c"), ("a", "b")])
    [('a',), ('a', 'b'), ('a', 'c'), ('b',), ('b', 'a')]
    """
    return sorted({order[: i + 1] for order in orders for i in range(len(order))})


class Runner:
    """Trains every prefix once, from either half of the prompts, if prefixes come in the order of `depth_first`.

    parts: {name: both halves of what can be trained on}; plans: {name: how}; distinct: {name: share of its responses that are no
    copies}, 1 unless given; samplers: {name: what renews its rollouts}, see `virtual_training`.
    """

    def __init__(
        self, model: Model, parts: Mapping[str, Sequence[Domain]], plans: Mapping[str, Training], effort: float | None,
        least_ess: float, seed: int, batch_tokens: int, progress: Callable[[str], None],
        distinct: Mapping[str, float] | None = None, samplers: Mapping[str, Resample] | None = None,
    ):  # fmt: skip
        self.effort = EFFORT["virtual"] if effort is None else effort
        if not self.effort > 0:
            raise InputError(got=f"effort {effort}", expected="a positive share", remedy="leave it out for the default")
        self.model, self.plans, self.seed, self.progress = model, plans, seed, progress
        self.parts, self.distinct, self.samplers = parts, distinct or {}, samplers or {}
        self.options: dict[str, Any] = {"least_ess": least_ess, "batch_tokens": batch_tokens}
        self.found: dict[Order, Halves] = {}

    def halves(self, prefix: Order) -> Halves:
        """The updates after a prefix. Their noise counts as the mean of the stages' ratios. Only what it begins with is kept."""
        self.found = {p: h for p, h in self.found.items() if p == prefix[: len(p)]}
        if prefix not in self.found:
            earlier = self.halves(prefix[:-1]) if len(prefix) > 1 else None
            self.progress("training on " + ", then ".join(prefix))
            starts = (None, None) if earlier is None else (earlier.first, earlier.second)
            ends, ratios = [], []
            for half, start in enumerate(starts):
                update, ratio = self._stage(prefix[-1], half, start)
                ends.append(update)
                ratios.append(ratio)
            noise, before = float(np.mean(ratios)), len(prefix) - 1
            noise = noise if earlier is None else (before * earlier.noise + noise) / len(prefix)
            self.found[prefix] = Halves(ends[0], ends[1], noise)
        return self.found[prefix]

    def _stage(self, name: str, half: int, start: Mapping[str, Change] | None) -> tuple[dict[str, Change], float]:
        part, plan = self.parts[name][half], self.plans[name]
        where = None if start is None else {n: dense(c) for n, c in start.items()}
        made = steady_training(
            self.model, part, plan, seed=2 * self.seed + half, start=where,
            steps_taken=max(2, round(plan.steps * self.effort / 2)), resample=self.samplers.get(name), **self.options,
        )  # fmt: skip
        if made.path["attempt"].max() > 1:
            self.progress(f"{name}: it broke, or fell, in steps that stood for many, and was run again in finer ones")
        draws = made.draws // (2 if plan.algorithm == "dpo" else 1)
        first = rollouts(part, plan).size  # those beyond were sampled on the way, and are no copies
        distinct = round(self.distinct.get(name, 1.0) * first) + made.distinct - first
        return made.update, noise_ratio(draws, distinct, plan.steps * plan.rollouts_per_step)


class Outcomes:
    """What updates do to every domain, told one update after another, so that none need be kept.

    domains: what the updates were made from.  evaluation: rollouts on other prompts to try them on instead.  samplers: what tells
    moved policies where importance weights fail, on the domains; on evaluation, evaluation_samplers do.
    """

    def __init__(
        self, model: Model, domains: Mapping[str, Domain], evaluation: Mapping[str, Domain] | None, seed: int, batch_tokens: int,
        samplers: Mapping[str, Resample] | None = None, evaluation_samplers: Mapping[str, Resample] | None = None,
    ):  # fmt: skip
        self.model, self.seed, self.batch_tokens, self.crossed = model, seed, batch_tokens, evaluation is None
        self.data = domains if evaluation is None else evaluation
        self.samplers = (samplers if evaluation is None else evaluation_samplers) or {}
        self.anchors: dict[str, Scores] = {}
        self.found: dict[str, dict[Order, dict[str, Any]]] = {name: {} for name in self.data}

    def add(self, prefix: Order, halves: Halves) -> None:
        """Try an update on every domain."""
        points, own = {prefix: points_of(self.model, halves)}, [prefix] if self.crossed else []
        for name, domain in self.data.items():
            few = first_prompts(domain, TRIED)
            tried = Tried(
                self.model, "reward", domain, points, own, few, self.seed, self.batch_tokens, self.anchors.get(name)
            )
            self.anchors[name] = tried.anchor
            self.found[name][prefix] = _told(tried, prefix, halves.noise, self.samplers.get(name))

    def cells(self) -> dict[str, dict[Order, dict[str, Any]]]:
        """{domain: {prefix: what its update does}}: predicted, stderr, low, high, ess, note, and what `ranking.ranked` needs."""
        return {name: _with_errors(found) for name, found in self.found.items()}


def _told(tried: Tried[Order], prefix: Order, noise: float, sampler: Resample | None) -> dict[str, Any]:
    """What an update does to a domain, without errors; update_spread is not a number where too few responses tell it."""
    found, term = tried.found(prefix, sampler), tried.term(prefix)
    weight = noise_weight(found, term, noise, prefix in tried.at_own)
    value, draws = found.value + weight * term.value, found.replicates + weight * term.replicates
    made: dict[str, Any] = {"anchor_value": tried.present, "route": found.route, "predicted": value}
    made |= {"sampling_stderr": 1.0, "spread": term.slope}
    made |= within_range(made, tried.domain)
    own_noise = float(np.sqrt(2 * noise))
    return {
        "predicted": made["predicted"],
        "replicates": made["predicted"] + made["sampling_stderr"] * (draws - value),
        "ess": found.ess,
        "note": "few effective samples" if found.ess < LOW_ESS else "",
        "update_spread": made["spread"] if term.ess >= LOW_ESS else np.nan,
        "any_spread": made["spread"],
        "own_noise": own_noise,
    }


def _with_errors(found: Mapping[Order, dict[str, Any]]) -> dict[Order, dict[str, Any]]:
    """Standard errors and intervals. The update's is the root mean square over all that are known, else the cell's own; the
    method's is a share of each predicted change."""
    known = np.array([told["update_spread"] * np.hypot(1, told["own_noise"]) for told in found.values()])
    known = known[np.isfinite(known)]
    out = {}
    for prefix, told in found.items():
        alone = {k: v for k, v in told.items() if k != "any_spread"}
        if not len(known):
            alone["update_spread"] = told["any_spread"]
        update = (
            float(np.sqrt(np.mean(known**2)))
            if len(known)
            else abs(told["any_spread"]) * np.hypot(1, told["own_noise"])
        )
        method = METHOD_ERROR["virtual"] * abs(told["predicted"])
        error = float(np.linalg.norm([statistics.stderr(told["replicates"]), update, method]))
        ends = {"low": told["predicted"] - Z * error, "high": told["predicted"] + Z * error}
        out[prefix] = {**alone, "stderr": error, "method_stderr": method, **ends}
    return out
