"""What the page of a geometry run shows: how large, how sparse and how alike the updates are."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import pandas as pd
from markupsafe import Markup

import figures
from figures.directions import SIDES
from figures.pairs import models_of
from interference.records import GEOMETRY, Run
from interference.report import geometry_tables as tables
from interference.report import geometry_words as words
from interference.report.numbers import NONE
from interference.report.pictures import Pictures
from interference.report.provenance import closing, home
from interference.report.tables import asked_models

_UNUSED = ("singular_values", "neurons")
"""Tables that the page does not need; they can be long."""

_OPTIONS = {name: f"--{name}" for name in ("projections", "spectra", "alpha", "seed")} | {"k": "--subspace"}
"""Options of `interference geometry`, by the setting that each gives."""


def page(run: Run) -> dict[str, Any]:
    """The values of geometry.html."""
    models = models_of(run.results)
    table = {name: run.geometry(name) for name in GEOMETRY if name not in _UNUSED}
    sections = _sections(run, table, models)
    return {
        "updates": models,
        "base": str(run.results.get("base", "")),
        "sections": sections,
        "sections_named": [(s["id"], s["short"]) for s in sections],
        "alarm": words.audits(table["audits"]),
        "found": [
            *words.sizes(table["norms"]),
            *words.masks(table["masks"], models),
            *words.cosines(table["cosines"], models),
        ],
        "asked": [asked_models({"models": _asked(run, models)})],
        "fallbacks": run.manifest.get("fallbacks"),
        **closing(run, {"base": run.results.get("base"), **(run.results.get("settings") or {})}, _replay(run, models)),
    }


def _replay(run: Run, models: list[str]) -> str:
    """The command that makes this run again."""
    settings = run.results.get("settings") or {}
    words = ["interference", "geometry", str(run.results.get("base", ""))]
    words += [f"{entry['name']}={entry['model']}" for entry in _asked(run, models)]
    words += ["--output", home(run)]
    for name, option in _OPTIONS.items():
        if settings.get(name) is not None:
            words += [option, str(settings[name])]
    return shlex.join(words)


def _asked(run: Run, models: list[str]) -> list[dict[str, str]]:
    """Name and place of every tuned model, as far as the configuration has them by name."""
    asked = run.config.get("models") or []
    entries = asked.items() if isinstance(asked, Mapping) else [(e["name"], e["model"]) for e in asked if _named(e)]
    known = {str(name): str(place) for name, place in entries}
    return [{"name": name, "model": known.get(name, NONE)} for name in models]


def _named(entry: object) -> bool:
    return isinstance(entry, Mapping) and {"name", "model"} <= entry.keys()


def _section(key: str, short: str, title: str, said: list[str], **rest: Any) -> dict[str, Any]:
    empty: dict[str, Any] = {"pictures": [], "how": "", "tables": []}
    return {"id": key, "short": short, "title": title, "said": said, **empty, **rest}


def _sections(run: Run, table: Mapping[str, pd.DataFrame], models: list[str]) -> list[dict[str, Any]]:
    """Those sections for which the run has records."""
    add = Pictures(run, "geometry").add
    makers = {
        "norms": lambda: _size(run, table, models, add),
        "masks": lambda: _masks(run, table, models, add),
        "cosines": lambda: _cosines(run, table, models, add),
        "subspaces": lambda: _subspaces(run, table, models, add),
        "spectra": lambda: _spectra(table, models),
        "neuron_overlap": lambda: _neurons(run, table, models, add),
    }
    found = [make() for name, make in makers.items() if len(table[name])]
    return [*found, _audits(table["audits"])]


def _size(run: Run, table: Mapping[str, pd.DataFrame], models: list[str], add: Any) -> dict[str, Any]:
    norms = table["norms"]
    alt = "Heatmaps of the share of weights changed, by layer and module, one panel a model. The table below sums up layers."
    return _section(
        "size",
        "how much and where",
        "How much each update changes, and where",
        [],
        pictures=[add("sparsity", figures.sparsity_by_layer(norms, run.results), alt)],
        how="A dark place: there the update changes many of the weights. How far it moves them is in the tables.",
        tables=[tables.sizes(norms, models), *tables.by_module(norms, models)],
    )


def _masks(run: Run, table: Mapping[str, pd.DataFrame], models: list[str], add: Any) -> dict[str, Any]:
    masks, consensus = table["masks"], table["consensus"]
    alt = "Heatmap of the overlap of changed weights of every pair, with the level of chance. Every number is in the table below."
    return _section(
        "masks",
        "same weights?",
        "Do the updates change the same weights?",
        words.consensus(consensus),
        pictures=[add("masks", figures.mask_overlap(masks, run.results), alt)],
        how="Compare the upper number with the one in brackets: only what an arrow marks is more, or less, than chance.",
        tables=[tables.masks(masks, models), *([tables.consensus(consensus)] if len(consensus) else [])],
    )


def _cosines(run: Run, table: Mapping[str, pd.DataFrame], models: list[str], add: Any) -> dict[str, Any]:
    alt = "Heatmap of the cosine of every pair of updates. Every number is in the table below."
    return _section(
        "cosines",
        "same direction?",
        "Do they point in the same direction?",
        [],
        pictures=[add("cosines", figures.update_cosine(table["cosines"], run.results), alt)],
        how="Teal: the two move weights alike; purple: against each other; hatched: no more than unrelated directions do.",
        tables=[tables.cosines(table["cosines"], models)],
    )


def _subspaces(run: Run, table: Mapping[str, pd.DataFrame], models: list[str], add: Any) -> dict[str, Any]:
    angles, pictures = table["angles"], list[Markup]()
    for side, name in SIDES.items():
        if (angles["side"] == side).any():
            alt = f"Cosines of principal angles by index, {name}, one panel a pair. The table below sums them up."
            pictures.append(add(f"angles_{side}", figures.angle_spectra(angles, run.results, side), alt))
    return _section(
        "subspaces",
        "same subspaces?",
        "Do they use the same subspaces?",
        words.subspaces(table["subspaces"]),
        pictures=pictures,
        how="A line above the dotted one of its colour: the two leading subspaces share more directions than random ones.",
        tables=[tables.subspaces(table["subspaces"], models)],
    )


def _spectra(table: Mapping[str, pd.DataFrame], models: list[str]) -> dict[str, Any]:
    title = "What kind of matrices the updates are"
    return _section("spectra", "spectra", title, [], tables=[tables.spectra(table["spectra"], models)])


def _neurons(run: Run, table: Mapping[str, pd.DataFrame], models: list[str], add: Any) -> dict[str, Any]:
    overlap = table["neuron_overlap"]
    alt = "Overlap of the most changed channels and heads of every pair beside chance. Every number is in the table below."
    return _section(
        "neurons",
        "same neurons?",
        "Do they change the same channels and heads most?",
        words.neurons(overlap, models),
        pictures=[add("neurons", figures.neuron_overlap(overlap, run.results), alt)],
        how="A dot to the right of its grey bar: the two updates change the same units most, more often than chance.",
        tables=[tables.neurons(overlap, models)],
    )


def _audits(audits: pd.DataFrame) -> dict[str, Any]:
    said = [] if len(audits) else ["The checks of the checkpoints found nothing."]
    return _section("audits", "audits", "Audits", said, tables=[tables.audits(audits)] if len(audits) else [])
