"""`interference geometry`: open checkpoints, survey their geometry, record, report. Resumable tensor by tensor."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from interference import __version__, records
from interference.checkpoint import Checkpoint
from interference.errors import InputError
from interference.geometry.settings import Settings
from interference.geometry.survey import Survey


def weight_shift(
    base: str,
    tuned: Mapping[str, str],
    output: Path,
    *,
    settings: Settings | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Survey the weight-space geometry of tuned models against their base; write the run directory with its report.

    base, {name: tuned}: model directories, adapters, distributed checkpoints or hub ids. A finished run of the same request and
    files is returned as it is; an interrupted one is resumed.

    Raises InputError for unusable input, before anything is written; and, when they are met, for weights that are not finite
    and a model that does not differ from the base.
    """
    here, settings = time.time(), settings or Settings()
    opened = Checkpoint.open(base)
    models = {name: Checkpoint.open(path) for name, path in tuned.items()}
    survey = Survey.of(opened, models, settings)
    asked: dict[str, Any] = {"base_model": base, "models": [{"name": n, "model": p} for n, p in tuned.items()]}
    asked |= {"geometry": settings.model_dump(mode="json")}
    files = {"base": opened.stamp(), "models": {n: c.stamp() for n, c in models.items()}}
    identity = {"version": __version__, "config": asked, "inputs": files}
    space = records.Workspace(output, identity, identity, overwrite)
    if space.finished():
        say("already finished")
        return space.final
    resumed = space.begin()
    say("resuming" if resumed else "starting")
    for name, table in _tables(survey, space.path, resumed, say).items():
        records.write_table(space.path / "tables" / f"geometry_{name}.parquet", table)
    records.write_text(space.path / "config.yaml", yaml.safe_dump({**asked, "output": str(output)}, sort_keys=False))
    notes = list(survey.notes)
    results = {"schema": records.SCHEMA, "command": "geometry", "base": base, "models": list(tuned), "cells": []}
    results |= {"settings": asked["geometry"], "notes": notes}
    records.write_json(space.path / "results.json", results)
    space.describe(
        {
            **records.provenance(),
            **records.timing(space.started, time.time() - here),
            "command": "geometry",
            "device": "cpu",
            "dtype": "as stored; differences in float32, sums in float64",
            "seed": settings.seed,
            "fingerprints": files,
            "fallbacks": [],
            "notes": notes,
        }
    )
    say("drawing the report")
    from interference.report import write_report  # matplotlib is not loaded before it is needed

    write_report(space.path)
    return space.finish()


def _tables(survey: Survey, folder: Path, resumed: bool, say: Callable[[str], None]) -> dict[str, pd.DataFrame]:
    """The survey's tables; one that its audit stops leaves nothing behind."""
    try:
        return survey.tables(folder, say)
    except InputError:
        if not resumed:
            shutil.rmtree(folder)
        raise


def named(paths: Sequence[str]) -> dict[str, str]:
    """Models given as NAME=PATH, or as a path that lends its last folder's name; a path may hold "=" itself.

    >>> named(["code=runs/7", "runs/math"])
    {'code': 'runs/7', 'math': 'runs/math'}
    >>> named(["runs/lr=1e-5"])
    {'lr=1e-5': 'runs/lr=1e-5'}
    """
    out: dict[str, str] = {}
    for text in paths:
        name, mark, path = text.partition("=")
        if not mark or "/" in name or Path(text).exists():
            name, path = Path(text).resolve().name, text
        if not name or not path or name in out:
            raise InputError(
                got=f"tuned model {text!r}" + (f", the second one called {name!r}" if name in out else ""),
                expected="NAME=PATH or a path, each with a name of its own",
                remedy="give names: math=runs/a/step-80 code=runs/b/step-80",
            )
        out[name] = path
    return out
