"""Where the predicted change sits: layers, modules, channels, heads and tokens, in pictures, sentences and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
from markupsafe import Markup

import figures
from figures.data import Quantity
from figures.parts import OUTSIDE, cell_of, concentration, parts_of, split_cells, together, worst
from interference.records import ATTRIBUTION, Run
from interference.report import tables
from interference.report.examples import Examples, examples
from interference.report.numbers import known, number, percent
from interference.report.pictures import Add, of_cells

_ENOUGH, _LEAST, _MOST = 0.5, 3, 5
"""Parts are named until they carry this share, but no fewer and no more than so many."""


class Detail(NamedTuple):
    """What stands behind one cell's name: unfolded where `open`."""

    name: str
    change: str
    open: bool
    tables: list[tables.Table]
    examples: Examples | None


def section(run: Run, objective: str, cells: pd.DataFrame, about: Quantity, add: Add) -> dict[str, Any] | None:
    """What the page says on where one objective's predicted changes sit; None where the run has no such record."""
    split = {name: run.attribution(name, objective) for name in ATTRIBUTION}
    parts = {name: parts_of(table, run.results, objective) for name, table in split.items()}
    modules = parts["modules"]
    if modules.empty:
        return None
    hurt = worst(cells, modules, about)
    return {
        "said": said(cells, modules, parts["channels"], about, hurt) if hurt else [],
        "agreement": agreement(run, objective),
        "heatmaps": _pictures(run, objective, about, "modules", split["modules"], add),
        "concentration": _pictures(run, objective, about, "channels", split["channels"], add)
        if len(parts["channels"])
        else [],
        "cells": [_detail(pair, parts, about, open_=pair == hurt) for pair in split_cells(modules, run.results)],
    }


def _pictures(run: Run, objective: str, about: Quantity, part: str, table: pd.DataFrame, add: Add) -> list[Markup]:
    draw, name, what = {
        "modules": (
            figures.layer_module_heatmap,
            "parts",
            f"Heatmaps of the parts of the predicted {about.label} by layer and module",
        ),
        "channels": (
            figures.channel_concentration,
            "channels",
            f"Share of the damage to {about.name} that the most harmful MLP channels carry",
        ),
    }[part]
    one = lambda update: draw(table, run.results, objective, update)  # noqa: E731
    return of_cells(run, add, name, one, what, "Text and tables below name the largest.")


def said(
    cells: pd.DataFrame, modules: pd.DataFrame, channels: pd.DataFrame, about: Quantity, pair: tuple[str, str]
) -> list[str]:
    """Which layers, modules and how many channels carry the damage in one cell, in sentences.

    Args:
        cells: `figures.data.cells_of`.
        modules, channels: `figures.parts.parts_of` the modules and of the channels, the latter perhaps empty.
        about: the objective.
        pair: update and domain of the cell, as a rule the worst hurt one (`figures.parts.worst`).
    """
    update, domain = pair
    cell = cell_of(modules, update, domain)
    first, second = float(cell["first"].sum()), float(cell["second"].sum())
    off = bool((~cells["own"]).any())
    where = "off-diagonal cell" if off and update != domain else "cell"
    if about.harm(first + second) > 0:
        rank = f"The {where} that is predicted to be hurt most"
    else:
        rank = f"No {where} that was split is predicted to get worse; the one that gains least"
    out = [
        f"{rank} is {update} → {domain}: {number(first + second, sign=True)} {about.unit}, of which "
        f"{number(first, sign=True)} by the first order and {number(second, sign=True)} by the second."
    ]
    layers, kinds = together(cell, "layer"), together(cell, "module")
    if not (layers["share"].any() and kinds["share"].any()):
        return [*out, "No layer and no module does harm there."]
    layers["place"] = ["outside the layers" if n == OUTSIDE else f"in layer {n}" for n in layers["layer"]]
    kinds["place"] = [f"in {module}" for module in kinds["module"]]
    single = cell.iloc[int(cell["harm"].argmax())]
    at = "outside the layers" if single["layer"] == OUTSIDE else f"layer {single['layer']}"
    out.append(
        f"Of the damage there, summed by layer, {_leading(layers)}; summed by module, {_leading(kinds)}. The single most "
        f"harmful part is {single['module']} ({at}), with {percent(single['share'])} of the damage of all parts."
    )
    found = concentration(cell_of(channels, update, domain)["harm"].to_numpy(float))
    if found is not None:
        one = found.half == 1
        out.append(
            f"{found.half} of {found.parts} MLP channels carr{'ies' if one else 'y'} half of the damage that channels do; "
            f"the top 1 % ({found.top}) carr{'ies' if found.top == 1 else 'y'} {percent(found.top_share)}."
        )
    return out


def _leading(sums: pd.DataFrame) -> str:
    """The most harmful of some sums with their shares: `_LEAST` to `_MOST`, as many as carry half of the damage."""
    falling = sums[sums["harm"] > 0].sort_values("harm", ascending=False, kind="stable")
    enough = int((falling["share"].cumsum() < _ENOUGH).sum()) + 1
    named = falling.head(max(_LEAST, min(enough, _MOST)))
    return _listed([f"{percent(s)} sits {p}" for s, p in zip(named["share"], named["place"], strict=True)])


def _listed(words: Sequence[str]) -> str:
    words = [words[0], *(w.replace(" sits ", " ") for w in words[1:])]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def agreement(run: Run, objective: str) -> str:
    """How well the parts, from reverse mode, sum to the totals, from the jets; empty where the record does not say."""
    rows = [row for row in run.results.get("attribution") or [] if row.get("objective") == objective]
    plain = [row for row in rows if not row.get("rounding")]
    found = [float(row["disagreement"]) for row in plain if known(row.get("disagreement"))]
    out = []
    if found:
        out.append(
            "Parts are computed by one gradient and one Hessian-vector product, the cells' totals by the jets: in no cell do "
            f"the two differ by more than {number(max(found), 2)} of |first| + |second| order."
        )
    near = [f"{row['update']} → {row['domain']}" for row in rows if row.get("rounding")]
    if near:
        out.append(
            "Where the sequences' terms nearly cancel, parts and totals differ by more than 1e-3 of that, but by no more than "
            f"the terms' rounding (1e-5 of their sizes): {', '.join(near)}."
        )
    return " ".join(out)


def _detail(pair: tuple[str, str], parts: dict[str, pd.DataFrame], about: Quantity, *, open_: bool) -> Detail:
    change = float(cell_of(parts["modules"], *pair)["change"].sum())
    channels, heads, tokens = (cell_of(parts[name], *pair) for name in ("channels", "heads", "tokens"))
    found = []
    if len(channels):
        found.append(tables.channels(channels, about.unit))
    if len(heads):
        found.append(tables.heads(heads, about.unit))
    return Detail(
        f"{pair[0]} → {pair[1]}",
        f"{number(change, sign=True)} {about.unit}" + (", hurt most" if open_ and about.harm(change) > 0 else ""),
        open_,
        [table for table in found if table.rows],
        examples(tokens, about),
    )
