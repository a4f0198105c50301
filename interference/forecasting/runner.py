"""Virtual trainings one after another, each prefix of several orders once, and what the updates that they end with do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from interference import statistics
from interference.domain import Domain
from interference.errors import InputError
from interference.expansion import check_domain
from interference.forecasting.batches import rollouts
from interference.forecasting.estimation import EFFORT, METHOD_ERROR
from interference.forecasting.halves import Halves, noise_ratio
from interference.forecasting.outcomes import noise_weight, within_range
from interference.forecasting.training import Training
from interference.forecasting.tried import Tried, first_prompts, points_of
from interference.forecasting.virtual import virtual_training
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


class Runner:
    """Trains every prefix once, from either half of the prompts.

    parts: {name: both halves of what can be trained on}; plans: {name: how}.
    """

    def __init__(
        self, model: Model, parts: Mapping[str, Sequence[Domain]], plans: Mapping[str, Training], effort: float | None,
        least_ess: float, seed: int, batch_tokens: int, progress: Callable[[str], None],
    ):  # fmt: skip
        self.effort = EFFORT["virtual"] if effort is None else effort
        if not self.effort > 0:
            raise InputError(got=f"effort {effort}", expected="a positive share", remedy="leave it out for the default")
        self.model, self.plans, self.seed, self.progress = model, plans, seed, progress
        self.parts = parts
        self.options: dict[str, Any] = {"least_ess": least_ess, "batch_tokens": batch_tokens}
        self.found: dict[Order, Halves] = {}

    def halves(self, prefix: Order) -> Halves:
        """The updates after a prefix. Their noise counts as the mean of the stages' ratios."""
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
        made = virtual_training(
            self.model, part, plan, seed=2 * self.seed + half, start=where,
            steps_taken=max(2, round(plan.steps * self.effort / 2)), **self.options,
        )  # fmt: skip
        draws = made.draws // (2 if plan.algorithm == "dpo" else 1)
        return made.update, noise_ratio(draws, rollouts(part, plan).size, plan.steps * plan.rollouts_per_step)


def changes(
    model: Model, halves: Mapping[Order, Halves], data: Mapping[str, Domain], seed: int, batch_tokens: int,
    *, crossed: bool,
) -> dict[str, dict[Order, dict[str, Any]]]:  # fmt: skip
    """{domain: {prefix: what its update does}}: predicted, stderr, low, high, ess, note, and what `ranking.ranked` needs.

    crossed: the updates were made from these very rollouts.
    """
    points = {p: points_of(model, h) for p, h in halves.items()}
    own, out = list(points) if crossed else [], dict[str, dict[Order, dict[str, Any]]]()
    for name, domain in data.items():
        few = first_prompts(domain, TRIED)
        out[name] = _cells(Tried(model, "reward", domain, points, own, few, seed, batch_tokens), halves)
    return out


def _cells(tried: Tried[Order], halves: Mapping[Order, Halves]) -> dict[Order, dict[str, Any]]:
    """What every prefix does to one domain. The method's own error is a share of each predicted change."""
    out: dict[Order, dict[str, Any]] = {}
    healthy = []
    for prefix, half in halves.items():
        found, term = tried.found(prefix), tried.term(prefix)
        weight = noise_weight(found, term, half.noise, prefix in tried.at_own)
        value, draws = found.value + weight * term.value, found.replicates + weight * term.replicates
        made: dict[str, Any] = {"anchor_value": tried.present, "route": found.route, "predicted": value}
        made |= {"sampling_stderr": 1.0, "spread": term.slope}
        made |= within_range(made, tried.domain)
        spread = made["spread"] * np.sqrt(1 + 2 * half.noise)
        healthy += [spread**2] if term.ess >= LOW_ESS else []
        out[prefix] = {
            "predicted": made["predicted"],
            "replicates": made["predicted"] + made["sampling_stderr"] * (draws - value),
            "update_spread": spread,
            "ess": found.ess,
        }
    pooled = float(np.sqrt(np.mean(healthy))) if healthy else np.nan
    for prefix, told in out.items():
        method = METHOD_ERROR["virtual"] * abs(told["predicted"])
        noise = abs(told["update_spread"]) if np.isnan(pooled) else pooled
        error = float(np.linalg.norm([statistics.stderr(told["replicates"]), noise, method]))
        told |= {
            "method_stderr": method,
            "stderr": error,
            "low": told["predicted"] - Z * error,
            "high": told["predicted"] + Z * error,
        }
        if tried.term(prefix).ess < LOW_ESS and healthy:
            told["update_spread"] = np.nan
        told["note"] = "few effective samples" if told["ess"] < LOW_ESS else ""
    return out
