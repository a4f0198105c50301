"""Stages with mixtures and merges of domains: real ones measured, and what is forecast of them before any training.

A mixture is one training on the prompts of several domains in equal shares, as long as the training on one. A merge is the base
plus the sum, or the average, of what trainings on single domains changed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interference import records, statistics, tree
from interference.forecasting.halves import Halves
from interference.forecasting.mixtures import equal_mixtures, virtual_mixtures
from interference.forecasting.runner import Outcomes
from interference.tree import Change, NamedChanges
from paper_repro.forecast_study import trainings
from paper_repro.forecast_study.decisions import MIX_PLANS, MIXES
from paper_repro.forecast_study.orders import plan_cost
from paper_repro.forecast_study.samplers import sampler
from paper_repro.forecast_study.setups import Setup
from paper_repro.forecast_study.work import Work
from paper_repro.lab.files import load
from paper_repro.lab.training import AND, train

SCALES = ("average", "sum")
Plans = dict[str, dict[str, float]]


def mixtures(setup: Setup) -> Plans:
    """{name: share of each domain}: every choice of domains in equal shares, single ones included."""
    return {AND.join(weights): weights for weights in equal_mixtures(setup.domains)}


def merges(setup: Setup) -> Plans:
    """{name: coefficient of each domain's update}: averages and sums of two domains and more."""
    several = [w for w in mixtures(setup).values() if len(w) > 1]
    return {
        f"{scale} {AND.join(weights)}": dict.fromkeys(weights, 1.0 if scale == "sum" else 1 / len(weights))
        for weights in several
        for scale in SCALES
    }


def measure_mixes(work: Work) -> None:
    """Train and measure the mixtures, and measure the merges, all of the first training seed at the nominal length."""
    for name, weights in mixtures(work.setup).items():
        if len(weights) > 1:
            _train(work, name)
            trainings.measure(work, f"mixes_measure_{name}", work.folder / "mixtures" / f"rl_{name}")
    for name, coefficients in merges(work.setup).items():
        _measure_merge(work, name, coefficients)


def _train(work: Work, name: str) -> None:
    def make() -> Mapping[str, Any]:
        folder = trainings.training_folder(work, "mixtures", work.lab / "base")
        return train(folder, work.setup.mixture_lab(), name, trainings.silent)

    work.stage(f"mixes_train_{name}", make)


def _measure_merge(work: Work, name: str, coefficients: Mapping[str, float]) -> None:
    def merged() -> tuple[Any, Any]:
        model, tokenizer = load(work.lab / "base")
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for domain, coefficient in coefficients.items():
                for key, change in _update(work, domain).items():
                    parameters[key] += coefficient * change
        return model, tokenizer

    trainings.measure_loaded(work, f"mixes_measure_{_stage(name)}", merged)


def _update(work: Work, domain: str) -> dict[str, Tensor]:
    return work.update(work.setup.training_seeds[0], domain, work.setup.nominal)


def _stage(name: str) -> str:
    return name.replace(" ", "_")


def forecast_mixes(work: Work) -> None:
    """Every mixture trained virtually, from the base's rollouts on training prompts, and every merge of the single ones' updates;
    both tried on the base's rollouts on held-out prompts."""

    def make() -> Mapping[str, Any]:
        setup, domains, evaluation = work.setup, work.data("forecast"), work.data("evaluation")
        model, wall, cpu = work.model, time.perf_counter(), time.process_time()
        plans = mixtures(setup)
        samplers = {domain: sampler(work, domain) for domain in setup.domains}
        found = virtual_mixtures(
            model, domains, setup.training(setup.nominal), plans.values(), evaluation=evaluation, samplers=samplers,
            evaluation_samplers=samplers,
        )  # fmt: skip
        made = dict(zip(plans, found.values(), strict=True))
        seconds = {"forecast_wall": time.perf_counter() - wall, "forecast_cpu": time.process_time() - cpu}
        parts = {domain: halves for domain in setup.domains if (halves := made[domain].halves) is not None}
        outcomes = Outcomes(model, domains, evaluation, 0, 16384, evaluation_samplers=samplers)
        for name, coefficients in merges(setup).items():
            outcomes.add((name,), merge(parts, coefficients))
        told = outcomes.cells()
        kept = ["domain", "predicted", "stderr", "ess", "note"]
        return {
            **seconds,
            "mixture": {name: one.cells[kept].to_dict(orient="records") for name, one in made.items()},
            "merge": {
                name: [{"domain": d, **{k: told[d][name,][k] for k in kept[1:]}} for d in told]
                for name in merges(setup)
            },
        }

    work.stage("mixes_forecast", make)


def merge(parts: Mapping[str, Halves], coefficients: Mapping[str, float]) -> Halves:
    """sum_k c_k d_k of updates that are known by two estimates each; their noise counts as the mean of the parts' ratios."""
    chosen = {name: parts[name] for name in coefficients}
    first, second = (
        _sum([getattr(h, side) for h in chosen.values()], list(coefficients.values())) for side in ("first", "second")
    )
    return Halves(first, second, float(np.mean([h.noise for h in chosen.values()])))


def _sum(updates: Sequence[NamedChanges], coefficients: Sequence[float]) -> dict[str, Change]:
    out: dict[str, Change] = {}
    for update, c in zip(updates, coefficients, strict=True):
        for name in update:
            part = tree.scaled(update[name], c)
            out[name] = tree.added(out[name], part) if name in out else part
    return out


def write(work: Work) -> None:
    """`mixes.csv` and `mix_plans.csv`, with the columns `decisions.MIXES` and `decisions.MIX_PLANS`."""
    for name, rows, columns in (("mixes", _rows(work), MIXES), ("mix_plans", _plans(work), MIX_PLANS)):
        table = pd.DataFrame(rows, columns=list(columns))
        records.write_text(work.folder / f"{name}.csv", table.to_csv(index=False))


def _options(setup: Setup) -> dict[str, Plans]:
    """What there is to choose from, by kind: {name: weight of each domain}."""
    singles = {name: {name: 1.0} for name in setup.domains}
    return {"mixture": mixtures(setup), "merge": singles | merges(setup)}


def _about(work: Work) -> dict[str, Any]:
    setup = work.setup
    shared: dict[str, Any] = {"setup": setup.name, "role": setup.role}
    return shared | {"training_seed": setup.training_seeds[0], "length": setup.nominal}


def _rows(work: Work) -> Iterator[dict[str, Any]]:
    done, setup = work.finished(), work.setup
    told = {kind: done["mixes_forecast"][kind] for kind in ("mixture", "merge")}
    alone = [{**cell, "update": name} for name in setup.domains for cell in told["mixture"][name]]
    added = {"virtual": _cells(alone), "gradient": _cells(done[f"forecast_gradient_{setup.nominal}"]["cells"])}
    for kind, plans in _options(setup).items():
        for name, weights in plans.items():
            row = {**_about(work), "kind": kind, "plan": name, "single": len(weights) == 1}
            predicted = {"virtual": told[kind].get(name, told["mixture"].get(name))}
            if kind == "mixture":
                predicted["virtual_averaged"] = told["merge"].get(f"{SCALES[0]} {name}", predicted["virtual"])
            for domain in setup.domains:
                was = _measured(work, name, domain)
                each = {**row, "domain": domain, "measured": was.delta, "measured_stderr": was.stderr}
                for predictor, cells in predicted.items():
                    yield {**each, "predictor": predictor, **next(c for c in cells if c["domain"] == domain)}
                for tier, found in added.items():
                    total = sum(w * found[k, domain] for k, w in weights.items())
                    yield {**each, "predictor": f"{tier}_added", "predicted": total}


def _plans(work: Work) -> Iterator[dict[str, Any]]:
    """Every plan's mean and worst domain, and how far it is behind the one measured best, prompts paired."""
    predicted = {
        (row["kind"], row["plan"], row["domain"]): row["predicted"]
        for row in _rows(work)
        if row["predictor"] == "virtual"
    }
    for kind, plans in _options(work.setup).items():
        found = {name: {d: _measured(work, name, d) for d in work.setup.domains} for name in plans}
        for by, score in (("mean", np.mean), ("worst", np.min)):
            values = {name: float(score([m.delta for m in each.values()])) for name, each in found.items()}
            draws = {name: score([m.replicates for m in each.values()], axis=0) for name, each in found.items()}
            best = max(values, key=values.__getitem__)
            for name, value in values.items():
                yield {
                    **_about(work), "kind": kind, "plan": name, "by": by,
                    "predicted": float(score([predicted[kind, name, d] for d in work.setup.domains])),
                    "measured": value, "measured_stderr": float(statistics.stderr(draws[name])),
                    "behind": values[best] - value, "behind_stderr": float(statistics.stderr(draws[best] - draws[name])),
                }  # fmt: skip


def _cells(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    return {(row["update"], row["domain"]): float(row["predicted"]) for row in rows}


def _measured(work: Work, plan: str, domain: str) -> trainings.Measured:
    if plan in work.setup.domains:
        return trainings.measured(work, work.setup.training_seeds[0], plan, domain, work.setup.nominal)
    return trainings.change(work, f"mixes_measure_{_stage(plan)}", domain)


def cost(work: Work) -> dict[str, Any]:
    """The row of `tables.costs` for mixtures: training those of several domains against forecasting all of them."""
    done, setup = work.finished(), work.setup
    trained = [done[f"mixes_train_{name}"] for name, weights in mixtures(setup).items() if len(weights) > 1]
    return plan_cost(work, "mixtures", setup.nominal, done["mixes_forecast"], trained)
