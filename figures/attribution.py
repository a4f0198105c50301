"""In which layer and module a predicted change sits: one small heatmap per cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, FuncNorm
from matplotlib.figure import Figure

from figures import panels, places, style
from figures.data import Array, Quantity, quantity
from figures.parts import cell_of, parts_of


class _Shades(NamedTuple):
    cmap: Colormap
    norm: FuncNorm
    clipped: bool


@style.styled
def layer_module_heatmap(
    modules: pd.DataFrame, results: Mapping[str, Any], objective: str, update: str | None = None
) -> Figure:
    """Heatmaps of the predicted change (first + second order) by layer and module: rows updates, columns domains.

    Within a panel layers go down and modules across; what belongs to no layer stands in a row of its own, "outside".
    Places where a model has no parameters are left blank. Over each panel stands the sum of its parts, the cell's
    predicted change. All panels share one scale, symmetric about zero, that ends at the largest part of an off-diagonal
    cell; parts of a domain's own cell may be larger and then have the end colour. Colour grows with the square root of a
    part's size: an output head often holds ten times what any other module does, and would pale all layers on a linear
    scale. Blue is always *helped*.

    Args:
        modules: `Run.attribution("modules")`.
        results: `Run.results`.
        objective: one of its objectives.
        update: draw this update alone, its panels wrapped to the page; for runs of more than five domains.

    Raises:
        InputError: the run has no such objective.
    """
    about = quantity(results, objective)
    parts = parts_of(modules, results, objective)
    frame = places.arrange(parts)
    wide = max(1.35, places.LINE * len(frame.modules) + 0.1)
    figure, cells = panels.page(results, update, frame.inches + 0.4, wide, extra=2.1)
    shades = _shades(parts, about)
    totals = [float(cell_of(parts, p.update, p.domain)["change"].sum()) for p in cells]
    power, decimals = style.scale_of(totals)
    for panel, total in zip(cells, totals, strict=True):
        cell = cell_of(parts, panel.update, panel.domain)
        _draw(panel.ax, cell, frame, shades)
        shown = style.signed(total / 10.0**power, decimals) if len(cell) else "–"
        panel.ax.set_title(f"{panel.title}\n{shown}" if panel.title else shown, fontsize=8.5, pad=3)
        places.name_axes(panel.ax, frame, first=panel.first, last=panel.last)
        if panel.update != panel.domain:
            panel.ax.spines[["left", "bottom"]].set_visible(False)
    inside = "in each panel layers go down and modules across; over it: the sum of its parts"
    unit = f"{style.times_power(power)}{about.unit}"
    figure.suptitle(f"{panels.heading(cells, update)}\n{inside} ({unit})", fontsize=8.5)
    _colorbar(figure, [p.ax for p in cells], shades, about)
    return figure


def _shades(parts: pd.DataFrame, about: Quantity) -> _Shades:
    size = parts["change"].abs()
    off = size[parts["update"].astype(str) != parts["domain"].astype(str)]
    limit = float((off if len(off) else size).max()) if len(size) else 1.0
    limit = limit if limit > 0 else 1.0
    clipped = bool((size > limit * (1 + 1e-9)).any())
    return _Shades(style.diverging(about.better), FuncNorm((_root, _square), -limit, limit), clipped)


def _root(value: Array) -> Array:
    return np.asarray(np.sign(value) * np.sqrt(np.abs(value)))


def _square(value: Array) -> Array:
    return np.asarray(value * np.abs(value))


def _draw(ax: Axes, cell: pd.DataFrame, frame: places.Frame, shades: _Shades) -> None:
    if cell.empty:
        ax.text(0.5, 0.5, "not split", transform=ax.transAxes, ha="center", va="center", color=style.MUTED)
        return
    sums = cell.groupby(["layer", "module"], observed=True)["change"].sum().reset_index()
    colors = [shades.cmap(shades.norm(value)) for value in sums["change"]]
    places.fill(ax, frame, sums["layer"], sums["module"], colors)


def _colorbar(figure: Figure, axes: Sequence[Axes], shades: _Shades, about: Quantity) -> None:
    limit = float(shades.norm.vmax or 1.0)
    marks = [-limit, -limit / 4, 0.0, limit / 4, limit]
    power, decimals = style.scale_of([limit])
    named = {m: style.signed(m / 10.0**power, decimals) for m in marks}
    bar = style.colour_bar(figure, axes, ScalarMappable(shades.norm, shades.cmap), named, shades.clipped, 0.03)
    unit = f"{style.times_power(power)}{about.unit}"
    ends = "the largest off-diagonal part" if shades.clipped else "the largest part"
    bar.set_label(
        f"part of the change in {about.name} ({unit})\n{about.better} is better: blue helped, orange hurt; "
        f"colour grows with the square root\none scale for all panels, ending at {ends}"
    )
