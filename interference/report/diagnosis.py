"""What the page of a diagnosis shows: who changes whom, how well it was predicted, where it sits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from markupsafe import Markup

import figures
from figures.data import Quantity, cells_of, curves_of, order, quantity
from interference.records import Run
from interference.report import attribution, tables, words
from interference.report.numbers import known
from interference.report.pictures import Pictures, of_cells
from interference.report.provenance import closing, home


def page(run: Run) -> dict[str, Any]:
    """The values of diagnose.html."""
    objectives = list(run.results["objectives"])
    cells = {o: cells_of(run.results, o) for o in objectives}
    curves = _curves(run)
    updates, domains = order(run.results)
    return {
        "updates": updates,
        "domains": domains,
        "sections": [_section(run, o, cells[o], curves) for o in objectives],
        "sections_named": [(o, quantity(run.results, o).name) for o in objectives],
        "asked": [tables.asked_models(run.config), tables.asked_domains(run.config, cells)],
        "fallbacks": run.manifest.get("fallbacks") or [],
        **closing(
            run,
            {key: value for key, value in run.config.items() if key not in ("models", "domains")},
            f"interference {run.manifest.get('command', 'diagnose')} {home(run)}/config.yaml",
        ),
    }


def _curves(run: Run) -> pd.DataFrame:
    if not (run.path / "tables" / "curves.parquet").is_file():
        return pd.DataFrame()
    return run.curves()


def _section(run: Run, objective: str, cells: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Any]:
    about = quantity(run.results, objective)
    cards: Mapping[str, Any] = (run.results.get("scorecards") or {}).get(objective) or {}
    rows = curves_of(curves, objective)
    estimated = bool(rows["kind"].astype(str).str.startswith("importance").any())
    pictures = Pictures(run, objective)
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
    cards: Mapping[str, Any], cells: pd.DataFrame, run: Run, objective: str, pictures: Pictures
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


def _curve_pictures(
    run: Run, objective: str, curves: pd.DataFrame, pictures: Pictures, about: Quantity
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
