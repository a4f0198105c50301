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
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from figures import panels, style
from figures.data import Array, Quantity, quantity
from figures.parts import OUTSIDE, cell_of, parts_of
from interference.records import MODULES

_LINE = 9.5 / 72
"""Inches that a line of 8 points takes."""


class _Frame(NamedTuple):
    """Where each layer and module stands: `tops` and `heights` per layer, in units of one layer's row."""

    layers: list[int]
    modules: list[str]
    tops: list[float]
    heights: list[float]
    inches: float

    @property
    def bottom(self) -> float:
        return self.tops[-1] + self.heights[-1]


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
    frame = _arrange(parts)
    wide = max(1.35, _LINE * len(frame.modules) + 0.1)
    figure, places = panels.page(results, update, frame.inches + 0.4, wide, extra=2.1)
    shades = _shades(parts, about)
    totals = [float(cell_of(parts, p.update, p.domain)["change"].sum()) for p in places]
    power, decimals = style.scale_of(totals)
    for panel, total in zip(places, totals, strict=True):
        cell = cell_of(parts, panel.update, panel.domain)
        _draw(panel.ax, cell, frame, shades)
        shown = style.signed(total / 10.0**power, decimals) if len(cell) else "–"
        panel.ax.set_title(f"{panel.title}\n{shown}" if panel.title else shown, fontsize=8.5, pad=3)
        _name_axes(panel, frame)
        if panel.update != panel.domain:
            panel.ax.spines[["left", "bottom"]].set_visible(False)
    inside = "in each panel layers go down and modules across; over it: the sum of its parts"
    unit = f"{style.times_power(power)}{about.unit}"
    figure.suptitle(f"{panels.heading(places, update)}\n{inside} ({unit})", fontsize=8.5)
    _colorbar(figure, [p.ax for p in places], shades, about)
    return figure


def _arrange(parts: pd.DataFrame) -> _Frame:
    found = {str(m) for m in parts["module"].unique()}
    modules = [m for m in MODULES if m in found] + sorted(found - set(MODULES))
    layers = sorted(int(n) for n in parts["layer"].unique() if n != OUTSIDE)
    inches = min(2.1, max(0.22 * len(layers), 0.8)) if layers else 0.2
    row = inches / max(len(layers), 1)
    tops, heights = [float(k) for k in range(len(layers))], [1.0] * len(layers)
    if (parts["layer"] == OUTSIDE).any():
        layers.append(OUTSIDE)
        tops.append(len(tops) + 0.06 / row)
        heights.append(max(1.0, _LINE / row))
    if not layers:
        return _Frame([OUTSIDE], modules or ["other"], [0.0], [1.0], inches)
    return _Frame(layers, modules, tops, heights, (tops[-1] + heights[-1]) * row)


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


def _draw(ax: Axes, cell: pd.DataFrame, frame: _Frame, shades: _Shades) -> None:
    ax.set(xlim=(0, len(frame.modules)), ylim=(frame.bottom, 0))
    ax.tick_params(length=0, pad=2)
    if cell.empty:
        ax.text(0.5, 0.5, "not split", transform=ax.transAxes, ha="center", va="center", color=style.MUTED)
        return
    sums = cell.groupby(["layer", "module"], observed=True)["change"].sum().reset_index()
    row, column = {n: k for k, n in enumerate(frame.layers)}, {m: k for k, m in enumerate(frame.modules)}
    tiles: dict[tuple[float, ...], list[Array]] = {}
    for layer, module, value in zip(sums["layer"], sums["module"], sums["change"], strict=True):
        k, x = row[int(layer)], column[str(module)]
        y, high = frame.tops[k], frame.heights[k]
        corners = [(x, y), (x + 1, y), (x + 1, y + high), (x, y + high), (x, y)]
        tiles.setdefault(shades.cmap(shades.norm(value)), []).append(np.array(corners))
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    for color, squares in tiles.items():  # one path per colour: hundreds of layers and modules make a small file
        path = Path(np.concatenate(squares), codes * len(squares))
        ax.add_patch(PathPatch(path, facecolor=color, edgecolor=style.FAINT, linewidth=0.35))


def _name_axes(panel: panels.Panel, frame: _Frame) -> None:
    ax = panel.ax
    ax.set_xticks(np.arange(len(frame.modules)) + 0.5, frame.modules, rotation=90)
    ax.tick_params(labelbottom=panel.last, labelleft=panel.first)
    inside = [k for k, n in enumerate(frame.layers) if n != OUTSIDE]
    row = frame.inches / frame.bottom
    step = next((s for s in (1, 2, 4, 5, 10, 20, 50) if s * row >= _LINE), 100)
    ticks = [(k + 0.5, str(frame.layers[k])) for k in inside if frame.layers[k] % step == 0]
    if len(inside) < len(frame.layers):
        ticks.append((frame.tops[-1] + 0.5 * frame.heights[-1], "outside"))
    ax.set_yticks([at for at, _ in ticks], [name for _, name in ticks])


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
