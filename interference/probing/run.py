"""probe: sample, score, judge, record. Every stage leaves a file, so an interrupted run goes on where it stopped."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from interference import expansion, records
from interference.model import pick_device
from interference.probing import judging, tables
from interference.probing.config import ProbeConfig
from interference.probing.inputs import Inputs, identity, open_inputs, weights_needed
from interference.probing.routing import notes_on_routes
from interference.probing.stages import Models, Work
from interference.stages import check_prompts

MASS = 0.5
"""A judge that gives less than this to yes and no together has not understood the question: a note says so."""


def probe(
    config: ProbeConfig,
    *,
    search_path: Sequence[Path] = (),
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Do what a probe's RUN.yaml asks: write the run directory `config.output` with its report, and return it.

    Verifiers and answer extractors are looked up on Python's path and in `search_path` (the command line: RUN.yaml's folder
    and the working directory). A finished run of the same configuration and inputs is returned as it is; an interrupted one is
    resumed.

    Raises InputError for unusable input, before anything is written; and, when they are met, for a verifier that fails and for
    questions that are longer than the judge's context.
    """
    here = time.time()
    inputs = open_inputs(config, search_path, say)
    space = records.Workspace(Path(config.output), *identity(config, inputs), overwrite)
    if space.finished():
        shutil.rmtree(space.final / "cache", ignore_errors=True)  # an interruption can have left it
        say("already finished")
        return space.final
    device = str(pick_device(config.device))
    work = Work(config, inputs, space.path, Models(config, inputs.base, inputs.tuned, say), say)
    if weights_needed(config, inputs):
        _check_room(work)
    say("resuming" if space.begin() else "starting")
    found = tables.all_tables(work)
    for name, table in found.items():
        records.write_table(space.path / "tables" / f"probe_{name}.parquet", table)
    notes = [*inputs.notes, *_notes(config, found)]
    if "locus" in config.probes:
        notes += judging.notes_on_locus(work)
    if "routes" in config.probes:
        notes += notes_on_routes(work)
    records.write_text(space.path / "config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False))
    records.write_json(space.path / "results.json", _results(config, inputs, notes))
    space.describe(
        {
            **records.provenance(),
            **records.timing(space.started, time.time() - here),
            "command": "probe",
            "device": device,
            "dtype": config.dtype,
            "seed": config.seed,
            "fingerprints": inputs.fingerprints,
            "notes": notes,
        }
    )
    say("drawing the report")
    from interference.report import write_report  # matplotlib is not loaded before it is needed

    write_report(space.path)
    final = space.finish()
    shutil.rmtree(final / "cache", ignore_errors=True)  # only now: unfinished, the run would lose what it holds
    return final


def _check_room(work: Work) -> None:
    """Refuse prompts, and responses that are given, for which the base's context or vocabulary has no room."""
    base = work.models["base"]
    for name, prompts in work.inputs.prompts.items():
        if name in work.config.answered:
            check_prompts(base, name, prompts, work.config.sampling.max_new_tokens)
    for found in work.inputs.given.values():
        expansion.check_domain(base, found.domain, "nll")


def _results(config: ProbeConfig, inputs: Inputs, notes: list[str]) -> dict[str, Any]:
    templates = {} if inputs.judgment is None else inputs.judgment.templates
    settings = config.model_dump(mode="json", exclude={"output", "base_model", "models", "domains", "rollouts"})
    return {
        "schema": records.SCHEMA,
        "command": "probe",
        "base": config.base_model,
        "models": config.names[1:],
        "kinds": config.kinds,
        "domains": [d.name for d in config.domains],
        "probes": list(config.probes),
        "settings": settings,
        "templates": {mode: template.text for mode, template in templates.items()},
        "notes": notes,
        "cells": [],
    }


def _notes(config: ProbeConfig, found: Mapping[str, pd.DataFrame]) -> list[str]:
    """What a reader of the numbers must know."""
    notes = []
    if "neighborhoods" in config.probes and not len(found["neighbors"]):
        notes.append("no neighbor relation: it compares two or more experts with a multi-task or merged model")
    if "kl" in found and config.neighborhoods.exact:
        exact = (
            found["kl"]["estimator"]
            .eq("exact")
            .groupby([found["kl"]["policy"], found["kl"]["domain"]], sort=False)
            .any()
        )
        why = "the log-probabilities were given, of sampled tokens alone"
        if not exact.any():
            notes.append(f"no exact divergences: {why}")
        else:
            notes += [f"no exact divergences of {p} on {d}, k3 in their place: {why}" for p, d in exact.index[~exact]]
    if "kl_forecast" in found:
        seen = found["kl_forecast"]
        several = seen[seen["reason"].fillna("") != ""].drop_duplicates("reference").to_dict("records")
        notes += [f"no forecast of the divergence of {row['reference']}: {row['reason']}" for row in several]
    if "skills" in config.probes and not config.others:
        notes.append("no consistency of skills: it compares a multi-task or merged model with the experts")
    for name, columns in (("kl", ["policy", "domain"]), ("verification", ["model", "domain"])):
        if name in found:
            few = found[name][found[name]["prompts"] == 1].drop_duplicates(columns)
            notes += [
                f"{a} on {b} has one prompt, so there are no error bars ({name})" for a, b in few[columns].to_numpy()
            ]
    if any(v.mode == "process" for v in config.verdicts) and config.horizon:
        notes.append("no horizon where verdicts in process mode were given: it needs the judge at hand")
    if "verification" in found:
        seen = found["verification"].drop_duplicates(["model", "domain", "mode"])
        for row in seen[seen["mass"] < MASS].to_dict("records"):
            notes.append(
                f"{row['model']} on {row['domain']} ({row['mode']}) gives yes and no together a probability of "
                f"{row['mass']:.2g}: it does not keep to the judge's format, and its log-odds say little"
            )
        for row in seen[seen["unparsable"] > 0].to_dict("records"):
            share = f"{100 * row['unparsable']:.0f} %"
            notes.append(
                f"{row['model']} on {row['domain']} ({row['mode']}): {share} of its verdicts could not be read"
            )
    return notes
