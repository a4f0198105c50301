"""diagnose: predict, measure, score, record. Every stage leaves a file, so an interrupted run goes on where it stopped."""

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

from interference import (
    evaluation,
    expansion,
    explanation,
    measurement,
    objectives,
    records,
    remainder,
    stages,
    statistics,
    truncation,
)
from interference.config import RunConfig
from interference.domain import Domain
from interference.errors import InputError
from interference.inputs import identity, open_inputs
from interference.model import load
from interference.quadratic import QuadraticModel
from interference.stages import Work
from interference.statistics import Z

_HIDDEN = ("replicates_", "covered_")


def diagnose(
    config: RunConfig,
    *,
    search_path: Sequence[Path] = (),
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Do what a RUN.yaml asks: write the run directory `config.output` with its report, and return it.

    Verifier modules are looked up on Python's path and in `search_path` (the command line: RUN.yaml's folder and the
    working directory).

    A finished run of the same configuration and inputs is returned as it is; an interrupted one is resumed.

    Raises InputError for unusable input, before anything is written.
    """
    here = time.time()
    inputs = open_inputs(config, search_path, say)
    space = records.Workspace(Path(config.output), *identity(config, inputs), overwrite)
    if space.finished():
        say("already finished")
        return space.final
    model = load(inputs.base, dtype=getattr(torch, config.dtype), device=config.device)
    for (objective, _), domain in inputs.data.items():
        expansion.check_domain(model, domain, objective)
    for name, prompts in inputs.prompts.items():
        stages.check_prompts(model, name, prompts, config.sampling.max_new_tokens)
    work = Work(config, inputs, space.path, model, expansion.align(model, inputs.updates), say)
    resumed = space.begin()
    say("resuming" if resumed else "starting")
    checked = _audited(work, resumed)
    results, curves = _results(work)
    records.write_text(space.path / "config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False))
    records.write_table(space.path / "tables" / "cells.parquet", pd.DataFrame(results["cells"]))
    records.write_table(space.path / "tables" / "curves.parquet", curves)
    records.write_json(space.path / "results.json", results)
    space.describe(_manifest(work, space.started, time.time() - here, results["notes"], checked))
    say("drawing the report")
    from interference.report import write_report  # matplotlib is not loaded before it is needed

    write_report(space.path)
    return space.finish()


def _audited(work: Work, resumed: bool) -> dict[str, Any]:
    """The record of derivatives that passed their audit; a run that fails it leaves nothing behind."""
    try:
        return stages.audited(work)
    except InputError:
        if not resumed:
            shutil.rmtree(work.folder)
        raise


def _results(work: Work) -> tuple[dict[str, Any], pd.DataFrame]:
    cells, curves, scorecards, notes = [], [], {}, work.inputs.notes
    expanded: dict[str, dict[str, QuadraticModel]] = {}
    for objective in work.config.objective:
        models = {
            d.name: expansion.quadratic_model(
                objective,
                stages.jets(work, objective, d.name),
                work.inputs.data[objective, d.name],
                tuple(work.updates),
                work.config.seed,
            )
            for d in work.config.domains
        }
        expanded[objective] = models
        measured = _measured(work, objective)
        curve, remainders = _along(work, objective, models)
        curves.append(curve)
        table = evaluation.cell_table(models, measured, _baselines(work, objective), remainders)
        table = table.merge(_estimates(work, objective), on=["domain", "update"], how="left")
        if table["measured"].notna().any():
            scorecards[objective] = evaluation.score_table(table, objective).to_dict()
        notes += _notes(objective, table, models)
        hidden = [c for c in table.columns if c.startswith(_HIDDEN)]
        cells += [
            {k: evaluation.number(v) for k, v in row.items()} for row in evaluation.records(table.drop(columns=hidden))
        ]
    described = {
        o: {"unit": objectives.kind(o).unit, "better": objectives.kind(o).better} for o in work.config.objective
    }
    results = {
        "schema": records.SCHEMA,
        "command": "diagnose",
        "objectives": described,
        "updates": list(work.updates),
        "domains": [d.name for d in work.config.domains],
        "cells": cells,
        "scorecards": scorecards,
        "notes": notes,
    }
    results |= explanation.explain(work, expanded)
    return results, pd.concat(curves, ignore_index=True)


def _measured(work: Work, objective: str) -> pd.DataFrame:
    """What `measure` returns, from the stages' files; no rows where nothing could be measured."""
    rows: list[dict[str, object]] = []
    for entry in work.config.domains:
        domain = entry.name
        if objectives.kind(objective).rewards:
            found = {m: stages.rollouts(work, m, domain) for m in ("base", *work.updates)}
            before = found.pop("base")
            _note_prompts(work, domain, before, found)
            changes = {
                update: measurement.reward_change(before, after, work.config.seed)
                for update, after in found.items()
                if before is not None and after is not None
            }
        else:
            data = work.inputs.data[objective, domain]
            anchor, at = stages.scores(work, objective, domain)
            changes = {
                update: measurement.sequence_change(objective, data, anchor, at[update, 1.0], work.config.seed)
                for update in work.updates
            }
        rows += [measurement.row(domain, update, change) for update, change in changes.items()]
    return pd.DataFrame(rows, columns=["domain", "update", *measurement.Change.__dataclass_fields__])


def _note_prompts(work: Work, domain: str, before: Domain | None, after: dict[str, Domain | None]) -> None:
    """Say where base and tuned model were measured on different prompts: that difference is then part of the change."""
    for update, rollouts in after.items():
        if before is not None and rollouts is not None and set(before.prompt_ids) != set(rollouts.prompt_ids):
            shared = len(set(before.prompt_ids) & set(rollouts.prompt_ids))
            work.inputs.notes.append(
                f"{update} on {domain}: reward was measured on other prompts than the base ({shared} shared by prompt_id)"
            )


def _baselines(work: Work, objective: str) -> pd.DataFrame:
    """What a user would try first, per (update, domain). An update's own domain is the one of the same name."""
    cosines = {} if objective == "kl" else stages.gradient_cosines(work, objective)  # the gradient of KL is zero
    rows = []
    for entry in work.config.domains:
        domain = entry.name
        data = work.inputs.data[objective, domain]
        anchor, at = stages.scores(work, objective, domain)
        for name, update in work.inputs.updates.items():
            own = work.inputs.updates.get(domain)
            kl = measurement.sequence_change("kl", data, anchor, at[name, 1.0], work.config.seed)
            rows.append(
                {
                    "domain": domain,
                    "update": name,
                    "update_norm": update.norm(),
                    "update_cosine": float("nan") if own is None else update.cosine(own),
                    "gradient_cosine": cosines.get(name, {}).get(domain, float("nan")),
                    "kl": float("nan") if objective == "kl" else kl.delta,  # there it is what is measured
                }
            )
    return pd.DataFrame(rows)


def _estimates(work: Work, objective: str) -> pd.DataFrame:
    """Importance-weighted change on the anchor's own rollouts, with its effective sample size (reward, surrogate)."""
    columns = ["domain", "update", "estimate", "estimate_stderr", "ess"]
    if not objectives.kind(objective).rewards:
        return pd.DataFrame(columns=columns).astype({"estimate": float, "estimate_stderr": float, "ess": float})
    rows = []
    for entry in work.config.domains:
        data = work.inputs.data[objective, entry.name]
        anchor, at = stages.scores(work, objective, entry.name)
        for update in work.updates:
            e = measurement.importance_estimate(data, anchor, at[update, 1.0], work.config.seed)
            rows.append((entry.name, update, e.delta, e.stderr, e.ess))
    return pd.DataFrame(rows, columns=columns)


def _along(work: Work, objective: str, models: dict[str, QuadraticModel]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The change along every update at several alpha, beside the quadratic model there, and what that model leaves out."""
    found = [
        remainder.along(model, work.inputs.data[objective, domain], *stages.scores(work, objective, domain))
        for domain, model in models.items()
    ]
    curves, remainders = zip(*found, strict=True)
    return pd.concat(curves, ignore_index=True), pd.concat(remainders, ignore_index=True)


def _notes(objective: str, table: pd.DataFrame, models: dict[str, QuadraticModel]) -> list[str]:
    """What a reader of the numbers must know: nothing measured, few effective samples, a second order that is noise."""
    notes = [f"{objective}: {d} has one prompt, so there are no error bars" for d, m in models.items() if m.prompts < 2]
    if objective == "surrogate":
        notes.append(
            "surrogate: the token-level surrogate is predicted; measured and estimated is the expected reward itself"
        )
    elif table["truncation"].isna().all():
        notes.append(
            f"{objective}: nothing was evaluated at a usable alpha up to {truncation.WINDOW:g}, so what the second order leaves "
            "out is not predicted and the intervals hold sampling noise only; add 0.25 and 0.5 to `alphas`"
        )
    for row in evaluation.records(table):
        cell = f"{objective}: {row['update']} on {row['domain']}"
        if not np.isfinite(row["measured"]):
            notes.append(f"{cell} was not measured: no fresh rollouts were given and none could be sampled")
        if np.isfinite(row["ess"]) and row["ess"] < truncation.LOW_ESS * row["sequences"]:
            notes.append(
                f"{cell}: effective sample size {row['ess']:.0f} of {row['sequences']}; the update moves the policy far from "
                "its rollouts, so the importance-weighted estimate and the second order are unreliable"
            )
        both = models[row["domain"]].predict({row["update"]: 1.0})
        noise = float(statistics.stderr(row["replicates_second_order"] - row["replicates_first_order"]))
        if noise > abs(both.second) and Z * noise > 0.5 * abs(both.first):
            more = "rollouts" if objectives.kind(objective).rewards else "sequences"
            term = f"{both.second:+.2g} is within its own noise ({noise:.2g})"
            notes.append(f"{cell}: the second-order term {term}; more {more} help")
    return notes


def _manifest(work: Work, started: float, seconds: float, notes: list[str], checked: dict[str, Any]) -> dict[str, Any]:
    return {
        **records.provenance(),
        "command": "diagnose",
        **records.timing(started, seconds),
        "device": str(work.model.device),
        "dtype": work.config.dtype,
        "seed": work.config.seed,
        "engine": work.config.engine,
        "fingerprints": work.inputs.fingerprints,
        "fallbacks": [{"what": what, "why": why} for what, why in work.fallbacks.items()],
        "audit": checked["rows"],
        "notes": [*checked["notes"], checked["summary"], *notes],
    }
