"""Analyses run top to bottom as scripts on a real run, and write only where they are told to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic import SHAPES, make_run
from synthetic_geometry import SHAPES as GEOMETRIES
from synthetic_geometry import make_geometry
from synthetic_plans import ranking
from synthetic_probe import SHAPES as PROBED
from synthetic_probe import make_probe
from synthetic_routes import SHAPES as ROUTED
from synthetic_routes import make_routes

from interference.records import write_table

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "analyses" / "predicted_vs_measured.py"
WEIGHTS = ROOT / "analyses" / "weight_shift.py"
BEHAVIOUR = {
    "neighborhoods": ("KL(row || base)", {"divergences", "kl_forecast"}),
    "skills": ("retaining", {"skills"}),
    "self_verification": ("by chance alone", {"outcome_process", "horizon", "locus"}),
}
"""What walk-throughs of a probe run print and draw."""
PROBES = [ROOT / "analyses" / f"{name}.py" for name in BEHAVIOUR]
ROUTES = ROOT / "analyses" / "routes.py"


def execute(*arguments: Path, script: Path = SCRIPT, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def snapshot(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_it_answers_on_a_real_run(demo_run: Path, tmp_path: Path) -> None:
    before = snapshot(demo_run)
    done = execute(demo_run, tmp_path / "figures")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for heading in ("measured change in loss", "measured change in expected reward", "the second order repairs"):
        assert heading in done.stdout
    assert done.stdout.splitlines()[-1].startswith("reward: ")
    assert snapshot(demo_run) == before
    assert (tmp_path / "figures" / "reward_curves.svg").is_file()


def test_the_environment_names_the_run(demo_run: Path) -> None:
    done = execute(INTERFERENCE_RUN=str(demo_run))
    assert done.returncode == 0, done.stderr
    assert str(demo_run) in done.stdout
    assert "figure:" not in done.stdout


@pytest.mark.parametrize("shape", ["one", "rectangle", "unmeasured", "holes"])
def test_odd_records_are_read(tmp_path: Path, shape: str) -> None:
    done = execute(make_run(tmp_path / "r", **SHAPES[shape]))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_curves_are_drawn_where_no_radius_was_recorded(tmp_path: Path) -> None:
    """The surrogate has curves but no radius: its own value along the update is not evaluated."""
    run = make_run(tmp_path / "r", updates=("math",), objectives=("nll",), layers=0)
    results = json.loads((run / "results.json").read_text())
    for cell in results["cells"]:
        cell |= {"radius": None, "radius_reason": "none", "beyond_radius": None}
    (run / "results.json").write_text(json.dumps(results))
    done = execute(run, tmp_path / "figures")
    assert done.returncode == 0, done.stderr
    assert "no radius was recorded" in done.stdout
    assert (tmp_path / "figures" / "nll_curves.svg").is_file()


@pytest.mark.parametrize("shape", ["four", "one", "odd names", "holes"])
def test_the_weights_are_read(tmp_path: Path, shape: str) -> None:
    run = make_geometry(tmp_path / "r", **GEOMETRIES[shape])
    before = snapshot(run)
    done = execute(run, tmp_path / "figures", script=WEIGHTS)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "share of weights that did not change" in done.stdout
    assert snapshot(run) == before
    if shape == "four":
        names = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
        assert names == {"sparsity", "masks", "cosines", "angles_left", "angles_right", "neurons"}
        last = done.stdout.splitlines()[-1]
        assert last.startswith("qa, writing: no more common weights than chance")


@pytest.mark.parametrize("shape", ["four", "one", "odd names", "holes"])
@pytest.mark.parametrize("script", PROBES, ids=lambda path: path.stem)
def test_behaviour_is_read(tmp_path: Path, script: Path, shape: str) -> None:
    run = make_probe(tmp_path / "r", **PROBED[shape])
    before = snapshot(run)
    done = execute(run, tmp_path / "figures", script=script)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert snapshot(run) == before
    if shape == "four":
        said, drawn = BEHAVIOUR[script.stem]
        assert said in done.stdout
        assert {path.stem for path in (tmp_path / "figures").glob("*.svg")} == drawn


@pytest.mark.parametrize("script", PROBES, ids=lambda path: path.stem)
def test_a_run_without_the_probe_is_told_so(tmp_path: Path, script: Path) -> None:
    run = make_probe(tmp_path / "r", domains=("math",), others=())
    for table in (run / "tables").glob("*.parquet"):
        table.unlink()
    done = execute(run, script=script)
    assert done.returncode == 1
    assert "ask for the probe" in done.stderr


@pytest.mark.parametrize("script", [*PROBES, ROUTES, SCRIPT], ids=lambda path: path.stem)
def test_a_run_that_is_not_there_is_one_clear_message(tmp_path: Path, script: Path) -> None:
    done = execute(tmp_path / "none", script=script)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "which has no config.yaml" in done.stderr
    assert ("`make demo`" if script == SCRIPT else "`make lab-study`") in done.stderr


@pytest.mark.parametrize("shape", ["four", "one", "experts", "holes"])
def test_the_routes_are_read(tmp_path: Path, shape: str) -> None:
    run = make_routes(tmp_path / "r", **ROUTED[shape])
    before = snapshot(run)
    done = execute(run, tmp_path / "figures", script=ROUTES)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "halves of one domain" in done.stdout
    assert snapshot(run) == before
    if shape == "four":
        names = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
        assert names == {"route_overlap", "route_direction", "gradient_cosine"}
        last = done.stdout.splitlines()[-2]
        assert last.startswith("qa, writing: top 0.1 of attention heads overlap")


@pytest.mark.parametrize("script", [SCRIPT, WEIGHTS, ROUTES, *PROBES], ids=lambda path: path.stem)
def test_cells_open_as_a_notebook(script: Path) -> None:
    source = script.read_text()
    assert source.startswith("# %% [markdown]\n")
    assert source.count("\n# %%\n") >= 5


def test_a_forecast_beside_what_was_measured(tmp_path: Path) -> None:
    """A forecast that says what was measured is right; one with the signs turned is not."""
    truth = make_run(tmp_path / "truth", **SHAPES["four"])
    results = json.loads((truth / "results.json").read_text())
    for name, sign, spearman in (("right", 1.0, 1.0), ("wrong", -1.0, -1.0)):
        cells = [
            {"objective": c["objective"], "tier": "virtual", "update": c["update"], "domain": c["domain"], "own": c["own"],
             "predicted": sign * c["measured"], "stderr": 0.01}
            for c in results["cells"]
        ]  # fmt: skip
        folder = shutil.copytree(truth, tmp_path / name)
        (folder / "results.json").write_text(json.dumps({**results, "command": "forecast", "cells": cells}))
        write_table(folder / "tables" / "forecast_plan_ranking.parquet", ranking([0.3, 0.29, 0.1], [0.0, -0.1, -0.2]))
        done = execute(folder, truth, tmp_path / "figures", script=ROOT / "analyses" / "forecast.py")
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        row = next(line for line in done.stdout.splitlines() if line.startswith("reward virtual"))
        assert float(row.split()[3]) == spearman
    assert "not to be told from the best: p1\n" in done.stdout
    for name in ("forecast_against_measured", "plans_mixture"):
        assert (tmp_path / "figures" / f"{name}.png").is_file()
