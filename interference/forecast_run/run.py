"""forecast: sample, estimate, predict, record. Every stage leaves files, so an interrupted run goes on where it stopped."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml

from interference import objectives, records
from interference.evaluation import number
from interference.forecast_run import stages, tables
from interference.forecast_run.config import ForecastConfig
from interference.forecast_run.inputs import check_fitting, identity, open_inputs
from interference.forecast_run.plans import notes_on_plans, plan_tables
from interference.forecast_run.stages import Work
from interference.forecasting.estimation import EFFORT, Tier
from interference.forecasting.virtual import LEAST_ESS
from interference.model import load


def forecast(
    config: ForecastConfig,
    *,
    search_path: Sequence[Path] = (),
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Do what a forecast's RUN.yaml asks: write the run directory `config.output` with its report, and return it.

    Verifiers are looked up on Python's path and in `search_path` (the command line: RUN.yaml's folder and the working
    directory). A finished run of the same configuration and inputs is returned as it is; an interrupted one is resumed.

    Raises InputError for unusable input, before anything is written; and, when they are met, for a verifier that fails, sampled
    responses whose rewards leave nothing to learn, and a training that diverges.
    """
    here = time.time()
    inputs = open_inputs(config, search_path, say)
    space = records.Workspace(Path(config.output), *identity(config, inputs), overwrite)
    if space.finished():
        say("already finished")
        return space.final
    say("loading the base")
    model = load(inputs.base, dtype=getattr(torch, config.dtype), device=config.device, attention="fast")
    check_fitting(config, inputs, model)
    work = Work(config, inputs, space.path, model, say)
    say("resuming" if space.begin() else "starting")
    for name in work.domains:  # all of them first: what a verifier spoils shows before anything is trained
        stages.responses(work, name)
    cells, path = tables.all_tables(work)
    plans, ranking = plan_tables(work)
    shares = {name: _single(work, name) for name in work.domains}
    notes = [*inputs.notes, *tables.notes_on(cells, path, shares), *notes_on_plans(ranking)]
    records.write_table(space.path / "tables" / "cells.parquet", cells)
    records.write_table(space.path / "tables" / "forecast_path.parquet", path)
    if len(ranking):
        records.write_table(space.path / "tables" / "forecast_plans.parquet", plans)
        records.write_table(space.path / "tables" / "forecast_plan_ranking.parquet", ranking)
    records.write_text(space.path / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    records.write_json(space.path / "results.json", _results(work, cells, notes))
    space.describe(
        {
            **records.provenance(),
            **records.timing(space.started, time.time() - here),
            "command": "forecast",
            "device": str(model.device),
            "dtype": config.dtype,
            "seed": config.seed,
            "fingerprints": inputs.fingerprints,
            "notes": [*model.notes, *notes],
        }
    )
    say("drawing the report")
    from interference.report import write_report  # matplotlib is not loaded before it is needed

    write_report(space.path)
    shutil.rmtree(space.path / "cache", ignore_errors=True)
    return space.finish()


def _single(work: Work, name: str) -> float:
    """Share of a domain's prompts that have a single response."""
    _, counts = np.unique(stages.responses(work, name).prompt_ids, return_counts=True)
    return float((counts == 1).mean())


def _tiers(config: ForecastConfig) -> list[Tier]:
    """The tiers that are computed: those asked for, and the one that plans are run by."""
    also: list[Tier] = ["virtual"] if config.plans else []
    return list(dict.fromkeys([*config.tier, *also]))


def _results(work: Work, cells: pd.DataFrame, notes: list[str]) -> dict[str, Any]:
    config = work.config
    described = {o: objectives.kind(o) for o in config.objective}
    return {
        "schema": records.SCHEMA,
        "command": "forecast",
        "base": config.base_model,
        "objectives": {o: {"unit": k.unit, "better": k.better} for o, k in described.items()},
        "tiers": list(config.tier),
        "updates": work.domains,
        "domains": list(dict.fromkeys(name for o in config.objective for name in work.evaluated(o))),
        "evaluated": {o: list(work.evaluated(o)) for o in config.objective},
        "given": {o: bool(config.evaluated(o)) for o in config.objective},
        "trainings": {name: config.planned(name).model_dump(mode="json") for name in work.domains},
        "settings": {
            "effort": {tier: config.effort.get(tier, EFFORT[tier]) for tier in _tiers(config)},
            "least_ess": LEAST_ESS,
            **config.model_dump(mode="json", include={"expanded", "pairs", "seed", "limit", "batch_tokens"}),
        },
        "rollouts": {name: _rollouts(work, name) for name in work.domains},
        "cells": [{key: number(value) for key, value in row.items()} for row in cells.to_dict("records")],
        "notes": notes,
    }


def _rollouts(work: Work, name: str) -> dict[str, Any]:
    """What the forecast of a training was made from."""
    domain = stages.responses(work, name)
    tokens = [len(s.response) for s in domain.sequences]
    return {
        "prompts": len(set(domain.prompt_ids)),
        "responses": len(domain.sequences),
        "mean_reward": float(np.mean(domain.rewards())),
        "mean_tokens": float(np.mean(tokens)),
        "sampled_here": name in work.inputs.prompts,
    }
