"""Which weights the updates change: how many in each layer and module, and whether two updates change the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from figures import panels, places, squares, style
from figures.pairs import RULES, Cell, Pair, Row, beyond, models_of, nothing, pairs_of, triangle
from interference.errors import InputError, nearest


def changed_by_place(norms: pd.DataFrame, rule: str = "relative") -> pd.DataFrame:
    """Columns model, layer, module, numel, changed: the share of weights that an update changes there, over its tensors.

    Args:
        norms: `Run.geometry("norms")`.
        rule: "relative", "absolute", "lpt" or "bf16" (see `figures.pairs.RULES`).

    Raises:
        InputError: another rule.
    """
    if rule not in RULES:
        raise InputError(got=f"rule {rule!r}", expected="a rule of what counts as changed", remedy=nearest(rule, RULES))
    tensors = norms.loc[norms["scope"] == "tensor", ["model", "layer", "module", "numel", f"sparsity_{rule}"]].copy()
    tensors["numel"] = tensors["numel"].astype(float)
    tensors["changed"] = tensors["numel"] * (1.0 - tensors.pop(f"sparsity_{rule}").astype(float))
    sums = tensors.groupby(["model", "layer", "module"], observed=True, sort=False)[["numel", "changed"]].sum()
    sums["changed"] /= sums["numel"].where(sums["numel"] > 0)
    return sums.reset_index()


@style.styled
def sparsity_by_layer(norms: pd.DataFrame, results: Mapping[str, Any], rule: str = "relative") -> Figure:
    """Share of weights that each update changes, by layer and module: one panel a model, on one scale.

    Layers go down and modules across; what belongs to no layer stands in a row of its own, "outside"; places without
    weights are blank. Over each panel stands the share of all weights that changed.

    Args:
        norms: `Run.geometry("norms")`.
        results: `Run.results`.
        rule: "relative", "absolute", "lpt" or "bf16" (see `figures.pairs.RULES`).

    Raises:
        InputError: another rule.
    """
    parts = changed_by_place(norms, rule)
    models = [name for name in models_of(results) if (parts["model"] == name).any()]
    if not models:
        return nothing("no norms were recorded")
    frame = places.arrange(parts)
    wide = max(1.35, places.LINE * len(frame.modules) + 0.1)
    figure, shown = panels.wrapped(len(models), frame.inches + 0.5, wide, extra=1.7)
    cmap, norm = style.share_colours(), Normalize(0.0, _end(parts["changed"]))
    for place, name in zip(shown, models, strict=True):
        part = parts[(parts["model"] == name) & parts["changed"].notna()]
        colors = [cmap(norm(value)) for value in part["changed"]]
        places.fill(place.ax, frame, part["layer"], part["module"], colors)
        total = float(np.average(part["changed"], weights=part["numel"])) if len(part) else float("nan")
        place.ax.set_title(f"{style.shorten(name, 18)}\n{style.percent(total)} changed", fontsize=8.5, pad=3)
        places.name_axes(place.ax, frame, first=place.first, last=place.last)
        place.ax.spines[["left", "bottom"]].set_visible(False)
    figure.suptitle("in each panel layers go down and modules across; over it: share of all weights", fontsize=8.5)
    label = f"weights changed (% of the weights of a layer's module); rule “{rule}”:\n{RULES[rule]}"
    _share_bar(figure, [p.ax for p in shown], cmap, norm, label)
    return figure


@style.styled
def mask_overlap(masks: pd.DataFrame, results: Mapping[str, Any], rule: str = "relative") -> Figure:
    """Jaccard overlap of the weights that two updates change, for every pair, beside what chance gives.

    In brackets the overlap expected when each update's changes are shuffled within every tensor, which keeps how many it
    changes where. An arrow up or down: the overlap is above or below the 90 % interval of that; hatched: within it, so
    that it says nothing on the pair. The diagonal has the share of all weights that an update changes.

    Args:
        masks: `Run.geometry("masks")`.
        results: `Run.results`.
        rule: "relative", "absolute", "lpt" or "bf16" (see `figures.pairs.RULES`).

    Raises:
        InputError: another rule.
    """
    if rule not in RULES:
        raise InputError(got=f"rule {rule!r}", expected="a rule of what counts as changed", remedy=nearest(rule, RULES))
    models = models_of(results)
    rows = pairs_of(masks[(masks["scope"] == "model") & (masks["rule"] == rule)], models)
    if not rows:
        return nothing("no overlaps of changed weights were recorded")
    own = _densities(rows)
    cmap, norm = style.share_colours(), Normalize(0.0, _end([row["jaccard"] for row in rows.values()]))

    def cell(pair: Pair) -> Cell | None:
        row = rows.get(pair)
        return None if row is None else _cell(row)

    def diagonal(k: int) -> str:
        return f"changes\n{style.percent(own.get(k, float('nan')))}"

    figure, ax = triangle(models, cell, cmap, norm, diagonal)
    label = f"Jaccard overlap |both| / |either| of the changed weights (share); rule “{rule}”:\n{RULES[rule]}"
    _jaccard_bar(figure, ax, cmap, norm, label)
    handles = [Patch(alpha=0), Patch(alpha=0), squares.in_key()]
    labels = ["(…): by chance, within tensors", "▲ ▼ above, below its 90 % interval", "within it"]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, handlelength=1.6, columnspacing=1.2)
    return figure


def _cell(row: Row) -> Cell:
    value, chance = float(row["jaccard"]), float(row["chance_stratified"])
    sure = beyond(value, float(row["low"]), float(row["high"]))
    arrow = ("" if not sure else " ▲" if value > row["high"] else " ▼") if np.isfinite(value) else ""
    return Cell(
        value, f"{style.plain(value, 2)}{arrow}\n({style.plain(chance, 2) if np.isfinite(chance) else '–'})", sure
    )


def _densities(rows: Mapping[Pair, Row]) -> dict[int, float]:
    """Share of weights that each model changes."""
    out: dict[int, float] = {}
    for (a, b), row in rows.items():
        out[a], out[b] = float(row["density_a"]), float(row["density_b"])
    return out


def _end(values: Sequence[float] | pd.Series) -> float:
    """Where a scale of shares ends: at the largest, but never so low that next to nothing looks like much."""
    known = np.asarray(values, float)
    return min(1.0, max(0.05, float(known[np.isfinite(known)].max(initial=0.0))))


def _share_bar(figure: Figure, axes: Sequence[Axes], cmap: Colormap, norm: Normalize, label: str) -> None:
    end = float(norm.vmax or 1.0)
    decimals = 0 if end > 0.2 else 1
    marks = {k * end / 4: style.plain(25 * k * end, decimals) for k in range(5)}
    style.colour_bar(figure, axes, ScalarMappable(norm, cmap), marks, False, 0.03).set_label(label)


def _jaccard_bar(figure: Figure, ax: Axes, cmap: Colormap, norm: Normalize, label: str) -> None:
    end = float(norm.vmax or 1.0)
    marks = {k * end / 4: style.plain(k * end / 4, 2 if end > 0.1 else 3) for k in range(5)}
    style.colour_bar(figure, [ax], ScalarMappable(norm, cmap), marks, False, 0.04).set_label(label)
