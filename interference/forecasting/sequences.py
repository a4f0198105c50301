"""Sequences of trainings, each trained virtually from where the one before it ended.

A training on B after one on A starts at theta + d_A, and its update is not d_B: to first order d_B - P H_B d_A. Here it is
found by running it: `virtual_training` from theta + d_A, on B's rollouts of the base weighted by pi / pi_base, with the
optimizer, its step sizes and the reference of its KL penalty (or dpo) begun anew, as a new run would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from interference.domain import Domain
from interference.errors import InputError
from interference.forecasting.frozen import Resample
from interference.forecasting.halves import Halves
from interference.forecasting.plans import check_order
from interference.forecasting.ranking import ranked
from interference.forecasting.runner import Order, Outcomes, Runner, check_trainings, depth_first
from interference.forecasting.training import Training
from interference.forecasting.virtual import LEAST_ESS
from interference.model import Model
from interference.probes.halves import prompt_halves
from interference.tree import Change


@dataclass(frozen=True, eq=False)
class VirtualSequence:
    """A sequence of trainings that was run on frozen rollouts.

    halves: {(domains trained on so far): the update by then, from either half of the prompts}; empty where they were not kept.
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
    samplers: Mapping[str, Resample] | None = None,
    evaluation_samplers: Mapping[str, Resample] | None = None,
    ends_only: bool = False,
    keep_updates: bool = True,
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
        samplers: {name: what samples fresh rollouts}, which renew those of trainings, and tell what moved policies do where
            importance weights fail; with `evaluation`, evaluation_samplers do that.
        ends_only: predict what the last stage of every order leaves, and no stage before it.
        keep_updates: whether `VirtualSequence.halves` holds them: two models for every prefix. Without, few are held at a time.
        effort, least_ess: see `estimation.estimate_update`.

    Raises:
        InputError: an order that is empty, repeats a domain or names an unknown one, a training that is missing, and what
            `virtual_training` refuses.
    """
    chosen = [tuple(order) for order in orders]
    for order in chosen:
        check_order(order, list(domains))
    plans = dict.fromkeys(domains, training) if isinstance(training, Training) else dict(training)
    check_trainings(model, plans, {n for order in chosen for n in order}, domains, evaluation)
    parts = {name: prompt_halves(domain, seed) for name, domain in domains.items()}
    runner = Runner(model, parts, plans, effort, least_ess, seed, batch_tokens, progress, samplers=samplers)
    outcomes = Outcomes(model, domains, evaluation, seed, batch_tokens, samplers, evaluation_samplers)
    kept: dict[Order, Halves] = {}
    for prefix in depth_first(chosen):
        made = runner.halves(prefix)
        if not ends_only or prefix in chosen:
            outcomes.add(prefix, made)
            kept |= {prefix: made} if keep_updates else {}
    cells, out = outcomes.cells(), {}
    for order in chosen:
        stages = [order] if ends_only else [order[: i + 1] for i in range(len(order))]
        rows = [
            {"stage": len(p), "trained": p[-1], "domain": name, **found[p]}
            for p in stages
            for name, found in cells.items()
        ]
        out[order] = VirtualSequence(order, {p: kept[p] for p in stages if p in kept}, pd.DataFrame(rows))
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
