"""Draw the figures of a run and fill the page."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

import figures
from figures.data import Quantity, cells_of, curves_of, order, quantity
from interference.records import Run, write_text
from interference.report import attribution, svg, tables, words
from interference.report.examples import style_sheet
from interference.report.numbers import known
from interference.report.pictures import of_cells


def write(run_dir: Path) -> Path:
    """See `interference.report.write_report`."""
    run = Run.open(run_dir)
    page = _environment().from_string(_resource("template.html")).render(_page(run))
    return write_text(run.path / "report.html", page)


def _environment() -> Environment:
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _resource(name: str) -> str:
    return files("interference.report").joinpath(name).read_text(encoding="utf-8")


def _page(run: Run) -> dict[str, Any]:
    objectives = list(run.results["objectives"])
    cells = {o: cells_of(run.results, o) for o in objectives}
    curves = _curves(run)
    updates, domains = order(run.results)
    return {
        "style": Markup(_resource("style.css") + style_sheet()),
        "updates": updates,
        "domains": domains,
        "sections": [_section(run, o, cells[o], curves) for o in objectives],
        "models_table": tables.asked_models(run.config),
        "domains_table": tables.asked_domains(run.config, cells),
        "settings": _settings(run.config),
        "provenance": _provenance(run),
        "fingerprints": _fingerprints(run.manifest.get("fingerprints") or {}),
        "fallbacks": run.manifest.get("fallbacks") or [],
        "notes": list(dict.fromkeys([*(run.results.get("notes") or []), *(run.manifest.get("notes") or [])])),
        "replay": f"interference {run.manifest.get('command', 'diagnose')} {_home(run)}/config.yaml",
    }


def _home(run: Run) -> str:
    """Where the run will be found; it is still called NAME.part while its report is drawn."""
    return str(run.path.with_name(run.path.name.removesuffix(".part")))


def _curves(run: Run) -> pd.DataFrame:
    if not (run.path / "tables" / "curves.parquet").is_file():
        return pd.DataFrame()
    return run.curves()


def _section(run: Run, objective: str, cells: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Any]:
    about = quantity(run.results, objective)
    cards: Mapping[str, Any] = (run.results.get("scorecards") or {}).get(objective) or {}
    rows = curves_of(curves, objective)
    estimated = bool(rows["kind"].astype(str).str.startswith("importance").any())
    pictures = _Pictures(run, objective)
    return {
        "objective": objective,
        "about": about,
        "happened": words.what_happened(cells, about),
        "scored": words.how_well(cards, cells),
        "tested": words.what_is_tested(objective),
        "matrix": pictures.add("matrix", figures.interference_matrix(run.results, objective), _matrix_alt(about)),
        "scatter": pictures.add(
            "scatter", figures.predicted_against_measured(run.results, objective), _scatter_alt(about)
        )
        if cells["measured"].notna().any()
        else None,
        **_scores(cards, cells, run, objective, pictures),
        "curves": _curve_pictures(run, objective, curves, pictures, about) if len(rows) else [],
        "radius": words.how_far(cells, estimated),
        "estimated": estimated,
        "parts": attribution.section(run, objective, cells, about, pictures.add),
        "ess": words.effective_samples(cells),
        "left_out": words.left_out(cells),
        "cells": [
            tables.changes(cells, about.unit),
            tables.evidence(cells),
            *([tables.left_out(cells, about.unit)] if cells["truncation"].notna().any() else []),
            tables.baselines(cells),
        ],
    }


def _scores(
    cards: Mapping[str, Any], cells: pd.DataFrame, run: Run, objective: str, pictures: _Pictures
) -> dict[str, Any]:
    """The scoreboard and its tables; none where too few cells were measured for any score."""
    parts = [("off_diagonal", "off-diagonal cells"), ("all", "all cells")]
    if not cells["own"].any() and cards.get("off_diagonal"):
        parts = parts[:1]  # the same cells twice
    scored = any(known(score.get("spearman")) for card in cards.values() for score in card.values())
    if not scored:
        return {"scoreboard": None, "score_tables": []}
    alt = _score_alt(quantity(run.results, objective))
    return {
        "scoreboard": pictures.add("scoreboard", figures.predictor_scoreboard(run.results, objective), alt),
        "score_tables": [tables.scores(cards[p], f"Scores over {name}.") for p, name in parts if cards.get(p)],
    }


class _Pictures:
    """Saves each figure beside the page and returns it ready to stand in the page."""

    def __init__(self, run: Run, objective: str) -> None:
        self.folder, self.objective = run.path / "figures", objective

    def add(self, name: str, figure: Figure, description: str) -> Markup:
        full = f"{self.objective}_{name}"
        vector, _ = figures.save(figure, self.folder, full)
        return Markup(svg.inline(vector.read_text(encoding="utf-8"), full, description))


def _curve_pictures(
    run: Run, objective: str, curves: pd.DataFrame, pictures: _Pictures, about: Quantity
) -> list[Markup]:
    what = f"Change in {about.name} along the update, observed points with the first- and second-order models over them"
    draw = lambda update: figures.change_along_update(curves, run.results, objective, update)  # noqa: E731
    return of_cells(run, pictures.add, "curves", draw, what, "The text below says where they part.")


def _matrix_alt(about: Quantity) -> str:
    return (
        f"Heatmaps of the predicted and, where known, the measured {about.label}; rows trained on, columns changed. "
        "Every number is in the table of cells below."
    )


def _scatter_alt(about: Quantity) -> str:
    return (
        f"Measured {about.label} against its first- and second-order prediction, with the line of equality. "
        "Every number is in the table of cells below."
    )


def _score_alt(about: Quantity) -> str:
    return f"Scores of every predictor of the change in {about.name}, with chance and ideal levels. The table below has them."


def _settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every scalar or short entry of the configuration but the lists of models and domains."""
    out = []
    for key, value in config.items():
        if key in ("models", "domains"):
            continue
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            simple = all(not isinstance(v, (Mapping, list)) for v in value)
            value = ", ".join(map(str, value)) if simple else f"{len(value)} entries (see config.yaml)"
        text = "none" if value is None or value == "" else str(value)
        out.append((key.replace("_", " "), text))
    return out


def _provenance(run: Run) -> list[tuple[str, str]]:
    m = run.manifest
    git = m.get("git") or {}
    sha = str(git.get("sha") or "unknown") + (" with uncommitted changes" if git.get("dirty") else "")
    took = m.get("seconds")
    rows = [
        ("package", f"{m.get('package', 'interference')} {m.get('version', '')}".strip()),
        ("git commit", sha),
        ("started", str(m.get("started") or "unknown")),
        ("finished", str(m.get("finished") or "unknown")),
        ("took", "unknown" if took is None else f"{took:g} seconds"),
        ("device", str(m.get("device") or "unknown")),
        ("dtype", str(m.get("dtype") or "unknown")),
        ("seed", str(m.get("seed"))),
        ("derivative engine", str(m.get("engine") or "unknown")),
        ("versions", ", ".join(f"{k} {v}" for k, v in (m.get("versions") or {}).items()) or "unknown"),
    ]
    return rows


def _fingerprints(found: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    out: list[tuple[str, str]] = []
    for key, value in found.items():
        name = f"{prefix}{key}"
        out += _fingerprints(value, f"{name}: ") if isinstance(value, Mapping) else [(name, str(value))]
    return out
