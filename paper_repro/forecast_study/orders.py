"""Stages with orders of sequential training: the real ones, which share what they begin with, and the forecast of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from interference import records, statistics
from interference.errors import InputError
from interference.forecasting.runner import Order
from interference.forecasting.sequences import rank_orders, virtual_sequences
from paper_repro.forecast_study import trainings
from paper_repro.forecast_study.decisions import ORDERS
from paper_repro.forecast_study.setups import Setup
from paper_repro.forecast_study.work import Work
from paper_repro.lab.training import train

PREDICTOR = "virtual"


def prefixes(setup: Setup) -> tuple[Order, ...]:
    """Everything that an order begins with, itself included, each once and after what it begins with."""
    return tuple(dict.fromkeys(order[: i + 1] for order in setup.orders for i in range(len(order))))


def check_plan(work: Work) -> None:
    """Record what orders are measured.

    Raises:
        InputError: the folder holds orders of other settings.
    """
    setup = work.setup
    plan = {"steps": setup.order_steps, "orders": [list(order) for order in setup.orders]}
    found = work.stage("orders", lambda: plan)
    changed = [key for key in plan if found[key] != plan[key]]
    if changed:
        raise InputError(
            got=f"other orders of set-up {setup.name!r} than are recorded in {work.folder / 'records'}: {', '.join(changed)}",
            expected="the same order_steps and order_limit in every session",
            remedy="restore them, or delete orders* from that folder",
        )


def train_orders(work: Work) -> None:
    """Train every prefix from the checkpoint that the one before it left; measure the models at the orders' ends."""
    check_plan(work)
    for prefix in prefixes(work.setup):
        _train_prefix(work, prefix)
    for order in work.setup.orders:
        trainings.measure(work, f"orders_measure_{_folder(order)}", _trained(work, order))


def _train_prefix(work: Work, prefix: Order) -> None:
    def make() -> Mapping[str, Any]:
        base = _trained(work, prefix[:-1]) if len(prefix) > 1 else work.lab / "base"
        folder = trainings.training_folder(work, f"orders/{_folder(prefix)}", base)
        return train(folder, work.setup.order_lab(), prefix[-1], trainings.silent)

    work.stage(f"orders_train_{_folder(prefix)}", make)


def _folder(prefix: Order) -> str:
    return "_".join(prefix)


def _trained(work: Work, prefix: Order) -> Path:
    return work.folder / "orders" / _folder(prefix) / f"rl_{prefix[-1]}"


def forecast_orders(work: Work) -> None:
    """Every order trained virtually, from the base's rollouts on training prompts, and tried on those on held-out prompts."""
    check_plan(work)

    def make() -> Mapping[str, Any]:
        setup, domains, evaluation = work.setup, work.data("forecast"), work.data("evaluation")
        model, wall, cpu = work.model, time.perf_counter(), time.process_time()
        found = virtual_sequences(
            model,
            domains,
            setup.training(setup.order_steps),
            setup.orders,
            evaluation=evaluation,
            ends_only=True,
            keep_updates=False,
        )
        ranking = rank_orders({order: made.stages for order, made in found.items()})
        seconds = {"forecast_wall": time.perf_counter() - wall, "forecast_cpu": time.process_time() - cpu}
        kept = ["domain", "predicted", "stderr", "ess", "note"]
        ends = {order: made.stages[made.stages["stage"] == len(order)] for order, made in found.items()}
        return {
            **seconds,
            "orders": {_folder(row["order"]): _average(row) for _, row in ranking.iterrows()},
            "cells": {_folder(order): end[kept].to_dict(orient="records") for order, end in ends.items()},
        }

    work.stage("orders_forecast", make)


def _average(row: pd.Series[Any]) -> dict[str, float]:
    """Change of the average reward, with the standard error whose normal 90 % interval `rank_orders` gives."""
    stderr = (row["mean_high"] - row["mean_low"]) / (2 * statistics.Z)
    return {"predicted": float(row["mean"]), "predicted_stderr": float(stderr)}


def write(work: Work) -> None:
    """`orders.csv` (columns `decisions.ORDERS`) and `order_cells.csv`, the same of every domain by itself."""
    averages = pd.DataFrame(_averages(work), columns=list(ORDERS))
    records.write_text(work.folder / "orders.csv", averages.to_csv(index=False))
    records.write_text(work.folder / "order_cells.csv", pd.DataFrame(_cells(work)).to_csv(index=False))


def _averages(work: Work) -> Iterator[dict[str, Any]]:
    setup = work.setup
    predicted = work.finished()["orders_forecast"]["orders"]
    replicates = {
        order: np.mean([m.replicates for m in _measured(work, order).values()], axis=0) for order in setup.orders
    }
    values = {order: float(np.mean([m.delta for m in _measured(work, order).values()])) for order in setup.orders}
    best = max(values, key=values.__getitem__)
    for order, value in values.items():
        yield {
            **_about(work, order), "training_seed": setup.training_seeds[0], "length": setup.order_steps,
            **predicted[_folder(order)], "measured": value,
            "measured_stderr": float(statistics.stderr(replicates[order])),
            "behind": values[best] - value,
            "behind_stderr": float(statistics.stderr(replicates[best] - replicates[order])),
        }  # fmt: skip


def _cells(work: Work) -> Iterator[dict[str, Any]]:
    predicted = work.finished()["orders_forecast"]["cells"]
    for order in work.setup.orders:
        measured = _measured(work, order)
        for row in predicted[_folder(order)]:
            was = measured[row["domain"]]
            yield {**_about(work, order), **row, "measured": was.delta, "measured_stderr": was.stderr}


def _about(work: Work, order: Order) -> dict[str, Any]:
    setup = work.setup
    return {"setup": setup.name, "role": setup.role, "predictor": PREDICTOR, "order": " > ".join(order)}


def _measured(work: Work, order: Order) -> dict[str, trainings.Measured]:
    return {d: trainings.change(work, f"orders_measure_{_folder(order)}", d) for d in work.setup.domains}


def cost(work: Work) -> dict[str, Any]:
    """The row of `tables.costs` for orders: training every prefix of them against forecasting all of them."""
    done, setup = work.finished(), work.setup
    trained = [done[f"orders_train_{_folder(p)}"] for p in prefixes(setup)]
    return plan_cost(work, "orders", setup.order_steps, done["orders_forecast"], trained)


def plan_cost(
    work: Work, tier: str, length: int, forecast: Mapping[str, Any], trained: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A row of `tables.costs`: the forecast of plans, from its record, against the trainings that it is of."""
    done, setup = work.finished(), work.setup
    row: dict[str, Any] = {"setup": setup.name, "role": setup.role, "length": length, "tier": tier}
    row["threads"] = forecast["threads"]
    for clock, recorded in (("wall", "training_seconds"), ("cpu", "training_cpu_seconds")):
        row[f"training_{clock}"] = sum(record[recorded] for record in trained)
        row[f"pilot_{clock}"] = 0.0
        row[f"forecast_{clock}"] = forecast[f"forecast_{clock}"]
        row[f"rollouts_{clock}"] = sum(
            done[f"rollouts_{kind}_{d}"][f"{clock}_seconds"]
            for d in setup.domains
            for kind in ("forecast", "evaluation")
        )
        row[f"share_{clock}"] = row[f"forecast_{clock}"] / row[f"training_{clock}"]
    return row
