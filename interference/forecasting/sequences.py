"""Sequences of trainings, each trained virtually from where the one before it ended.

A training on B after one on A starts at theta + d_A, and its update is not d_B: to first order d_B - P H_B d_A. Here it is
found by running it: `virtual_training` from theta + d_A, on B's rollouts of the base weighted by pi / pi_base, with the
optimizer, its step sizes and the reference of its KL penalty (or dpo) begun anew, as a new run would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from interference import statistics
from interference.domain import Domain
from interference.errors import InputError
from interference.expansion import check_domain
from interference.forecasting.batches import rollouts
from interference.forecasting.estimation import EFFORT, METHOD_ERROR
from interference.forecasting.halves import Halves, noise_ratio
from interference.forecasting.outcomes import noise_weight, within_range
from interference.forecasting.plans import check_order
from interference.forecasting.ranking import ranked
from interference.forecasting.training import Training
from interference.forecasting.tried import Tried, first_prompts, points_of
from interference.forecasting.virtual import LEAST_ESS, virtual_training
from interference.model import Model
from interference.probes.halves import prompt_halves
from interference.statistics import Z
from interference.tree import Change, dense
from interference.truncation import LOW_ESS

Order = tuple[str, ...]
TRIED = 64
"""Prompts that the noise of the estimates is computed on."""


@dataclass(frozen=True, eq=False)
class VirtualSequence:
    """A sequence of trainings that was run on frozen rollouts.

    halves: {(domains trained on so far): the update by then, from either half of the prompts}.
    stages: one row per stage and domain: stage (from 1), trained, domain, predicted (change from the base), stderr, low, high
    (90 %), ess (effective share of the sequences), replicates (over prompts), update_spread (see `ranking.ranked`), note.
    """

    order: Order
    halves: dict[Order, Halves]
    stages: pd.DataFrame = field(repr=False)

    @property
    def update(self) -> dict[str, Change]:
        """The update at the end: the mean of both halves'."""
        return self.halves[self.order].mean()


def virtual_sequence(
    model: Model,
    domains: Mapping[str, Domain],
    training: Training | Mapping[str, Training],
    order: Sequence[str],
    **options: Any,
) -> VirtualSequence:
    """Train on one domain after another and predict every domain's expected reward after each stage.

    `options` are those of `virtual_sequences`, of which this is the case of a single order.
    """
    return virtual_sequences(model, domains, training, [order], **options)[tuple(order)]


def virtual_sequences(
    model: Model,
    domains: Mapping[str, Domain],
    training: Training | Mapping[str, Training],
    orders: Iterable[Sequence[str]],
    *,
    evaluation: Mapping[str, Domain] | None = None,
    ends_only: bool = False,
    effort: float | None = None,
    least_ess: float = LEAST_ESS,
    seed: int = 0,
    batch_tokens: int = 16384,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[Order, VirtualSequence]:
    """The same for many orders; what they begin with alike is trained once.

    Every sequence is run twice, on either half of every domain's prompts; the change of a domain is predicted with the half
    that was not trained on, and the noise of the estimates is taken out as in `forecast`.

    Args:
        domains: {name: rollouts of `model` with rewards}; those in no order are predicted, too.
        training: for all domains or {name: Training}.
        evaluation: rollouts of the base on other prompts, to predict on instead.
        ends_only: predict what the last stage of every order leaves, and no stage before it.
        effort, least_ess: see `estimation.estimate_update`.

    Raises:
        InputError: an order that is empty, repeats a domain or names an unknown one, a training that is missing, and what
            `virtual_training` refuses.
    """
    chosen = [tuple(order) for order in orders]
    for order in chosen:
        check_order(order, list(domains))
    plans = dict.fromkeys(domains, training) if isinstance(training, Training) else dict(training)
    for name in sorted({n for order in chosen for n in order} - plans.keys()):
        raise InputError(got=f"no training of {name!r}", expected="one for every domain trained on", remedy="add it")
    for domain in (*domains.values(), *(evaluation or {}).values()):
        check_domain(model, domain, "reward")
    share = EFFORT["virtual"] if effort is None else effort
    if not share > 0:
        raise InputError(got=f"effort {effort}", expected="a positive share", remedy="leave it out for the default")
    runner = _Runner(model, domains, plans, share, least_ess, seed, batch_tokens, progress)
    prefixes = list(dict.fromkeys(order[: i + 1] for order in chosen for i in range(len(order))))
    halves = {prefix: runner.halves(prefix) for prefix in prefixes}
    progress("predicting")
    wanted = {p: h for p, h in halves.items() if not ends_only or p in chosen}
    points = {p: points_of(model, h) for p, h in wanted.items()}
    own, cells = [] if evaluation else list(points), dict[str, dict[Order, dict[str, Any]]]()
    for name, domain in (evaluation or domains).items():
        few = first_prompts(domain, TRIED)
        cells[name] = _cells(Tried(model, "reward", domain, points, own, few, seed, batch_tokens), wanted)
    out = {}
    for order in chosen:
        stages = [p for p in (order[: i + 1] for i in range(len(order))) if p in wanted]
        rows = [
            {"stage": len(p), "trained": p[-1], "domain": name, **found[p]}
            for p in stages
            for name, found in cells.items()
        ]
        out[order] = VirtualSequence(order, {p: halves[p] for p in stages}, pd.DataFrame(rows))
    return out


def rank_orders(stages: Mapping[Order, pd.DataFrame], *, objective: str = "reward", by: str = "mean") -> pd.DataFrame:
    """Orders, best end first: order, the columns of `ranking.ranked` for the last stage, and lowest, the worst change of any
    domain at any stage.

    stages: {order: VirtualSequence.stages}; or those of `plans.sequence`, whose ends are the same for all orders of the same
    domains, so that only `lowest` tells them apart.

    Raises InputError for no orders.
    """
    if not stages:
        raise InputError(got="no orders", expected="at least one", remedy="give {order: its stages}")
    ends = [t[t["stage"] == t["stage"].max()].reset_index(drop=True) for t in stages.values()]
    low = [
        t["predicted"].min() if objective in ("reward", "surrogate") else t["predicted"].max() for t in stages.values()
    ]
    labels = pd.DataFrame({"order": list(stages), "lowest": low})
    return ranked(ends, labels, objective, by)


class _Runner:
    """Trains every prefix once, from either half of the prompts."""

    def __init__(
        self, model: Model, domains: Mapping[str, Domain], plans: Mapping[str, Training], effort: float,
        least_ess: float, seed: int, batch_tokens: int, progress: Callable[[str], None],
    ):  # fmt: skip
        self.model, self.plans, self.effort, self.seed, self.progress = model, plans, effort, seed, progress
        self.parts = {name: prompt_halves(domain, seed) for name, domain in domains.items()}
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
    for told in out.values():
        method = METHOD_ERROR["virtual"] * abs(told["predicted"])
        noise = abs(told["update_spread"]) if np.isnan(pooled) else pooled
        error = float(np.linalg.norm([statistics.stderr(told["replicates"]), noise, method]))
        told |= {"stderr": error, "low": told["predicted"] - Z * error, "high": told["predicted"] + Z * error}
        told["note"] = "few effective samples" if told["ess"] < LOW_ESS else ""
    return out
