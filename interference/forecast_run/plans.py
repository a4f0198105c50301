"""Mixtures and orders of the trainings, run virtually on the base's rollouts and ranked: what `plans` asks for.

    cache/plans/mixture.parquet, order.parquet                  every domain's change under every plan
    cache/plans/mixture_ranking.parquet, order_ranking.parquet  the plans against each other; written last

A kind of plans is one stage: its trainings share what they begin with alike, and pool their noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd

from interference import records
from interference.domain import Domain
from interference.forecast_run.asked_plans import THEN
from interference.forecast_run.stages import Work, responses, samplers
from interference.forecasting.mixtures import rank_virtual_mixtures, virtual_mixtures
from interference.forecasting.sequences import rank_orders, virtual_sequences
from interference.forecasting.training import Training
from interference.forecasting.virtual import LEAST_ESS
from interference.truncation import LOW_ESS

Tables = tuple[pd.DataFrame, pd.DataFrame]


def plan_tables(work: Work) -> Tables:
    """The tables `plans` and `plan_ranking` (`records.FORECAST`) of everything asked for; without rows for nothing."""
    found = []
    if work.config.mixtures:
        found.append(_kept(work, "mixture", _mixtures))
    if work.config.orders:
        found.append(_kept(work, "order", _orders))
    plans, ranking = (
        pd.concat([tables[k] for tables in found], ignore_index=True)
        if found
        else pd.DataFrame(columns=list(records.FORECAST[name]))
        for k, name in enumerate(("plans", "plan_ranking"))
    )
    return plans, ranking


def notes_on_plans(ranking: pd.DataFrame) -> list[str]:
    """Which plans end where few of the responses are effective."""
    out = []
    for kind, rows in ranking.groupby("kind", sort=False):
        weak = rows.loc[rows["note"] != "", "plan"]
        if len(weak):
            named = "; ".join(weak[:8]) + f"; and {len(weak) - 8} more" * (len(weak) > 8)
            out.append(
                f"plans: {len(weak)} of {len(rows)} {kind}s end where fewer than {100 * LOW_ESS:.0f} % of a domain's "
                f"responses are effective, and what is said of them there is not to be trusted ({named})"
            )
    return out


def _kept(work: Work, kind: str, make: Callable[[Work], Tables]) -> Tables:
    """The tables of a kind of plans, made where they are not there or were made of other rewards."""
    folder, made_of = work.folder / "cache" / "plans", work.digest(*work.domains)
    paths = folder / f"{kind}.parquet", folder / f"{kind}_ranking.parquet"
    if paths[1].is_file():
        known = [pd.read_parquet(path) for path in paths]
        if all((table["made_of"] == made_of).all() for table in known):
            return known[0].drop(columns="made_of"), known[1].drop(columns="made_of")
        paths[1].unlink()
    made = make(work)
    for path, table, name in zip(paths, made, ("plans", "plan_ranking"), strict=True):
        table.insert(0, "kind", kind)
        records.write_table(path, table[list(records.FORECAST[name])].assign(made_of=made_of))
    return _kept(work, kind, make)


def _mixtures(work: Work) -> Tables:
    asked = work.config.mixtures
    found = virtual_mixtures(
        work.model, _domains(work), _trainings(work), asked, **_options(work, "mixtures", len(asked))
    )
    cells = pd.concat([m.cells.assign(plan=name, stage=1, trained=name) for name, m in found.items()])
    mean, worst = (rank_virtual_mixtures(found, by).rename(columns={"mixture": "plan"}) for by in ("mean", "worst"))
    return cells, _together(mean.assign(lowest=mean["worst"]), worst)


def _orders(work: Work) -> Tables:
    asked = work.config.orders
    count = len({order[: i + 1] for order in asked for i in range(len(order))})
    found = virtual_sequences(work.model, _domains(work), _trainings(work), asked, **_options(work, "orders", count))
    stages = {order: s.stages for order, s in found.items()}
    cells = pd.concat([table.assign(plan=THEN.join(order)) for order, table in stages.items()])
    mean, worst = (_labelled(rank_orders(stages, by=by)) for by in ("mean", "worst"))
    return cells, _together(mean, worst)


def _labelled(ranking: pd.DataFrame) -> pd.DataFrame:
    return ranking.assign(plan=ranking["order"].map(THEN.join)).drop(columns="order")


def _together(by_mean: pd.DataFrame, by_worst: pd.DataFrame) -> pd.DataFrame:
    """The ranking by the mean, with how far each plan is behind the best by the worst domain."""
    behind = by_worst[["plan", "behind", "behind_stderr"]]
    names = {"behind": "worst_behind", "behind_stderr": "worst_behind_stderr"}
    return by_mean.merge(behind.rename(columns=names), on="plan", how="left", validate="one_to_one")


def _domains(work: Work) -> dict[str, Domain]:
    return {name: responses(work, name) for name in work.domains}


def _trainings(work: Work) -> dict[str, Training]:
    return {name: work.config.planned(name) for name in work.domains}


def _options(work: Work, what: str, trainings: int) -> dict[str, Any]:
    """How plans are computed: as the cells of the tier virtual, on the same sequences."""
    config, done = work.config, 0

    def progress(text: str) -> None:
        nonlocal done
        training = text.startswith("training")
        done += training
        work.say(f"{what}: {text}" + f" ({done} of {trainings})" * training)

    return {
        "evaluation": work.evaluated("reward") if config.evaluated("reward") else None,
        "samplers": samplers(work),
        "effort": config.effort.get("virtual"),
        "keep_updates": False,
        "least_ess": LEAST_ESS,
        "seed": config.seed,
        "batch_tokens": config.batch_tokens,
        "progress": progress,
    }
