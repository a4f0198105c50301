"""Where a number sits in a model: one small grid, layers down and modules across."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from figures import style
from figures.data import Array
from figures.parts import OUTSIDE
from figures.squares import Color
from interference.records import MODULES

LINE = 9.5 / 72
"""Inches that a line of 8 points takes."""


class Frame(NamedTuple):
    """Where each layer and module stands: `tops` and `heights` per layer, in units of one layer's row."""

    layers: list[int]
    modules: list[str]
    tops: list[float]
    heights: list[float]
    inches: float

    @property
    def bottom(self) -> float:
        return self.tops[-1] + self.heights[-1]


def arrange(parts: pd.DataFrame) -> Frame:
    """The grid for all layers and modules of a table; what belongs to no layer gets the lowest row, a little apart."""
    found = {str(m) for m in parts["module"].unique()}
    modules = [m for m in MODULES if m in found] + sorted(found - set(MODULES))
    layers = sorted(int(n) for n in parts["layer"].unique() if n != OUTSIDE)
    inches = min(2.1, max(0.22 * len(layers), 0.8)) if layers else 0.2
    row = inches / max(len(layers), 1)
    tops, heights = [float(k) for k in range(len(layers))], [1.0] * len(layers)
    if (parts["layer"] == OUTSIDE).any():
        layers.append(OUTSIDE)
        tops.append(len(tops) + 0.06 / row)
        heights.append(max(1.0, LINE / row))
    if not layers:
        return Frame([OUTSIDE], modules or ["other"], [0.0], [1.0], inches)
    return Frame(layers, modules, tops, heights, (tops[-1] + heights[-1]) * row)


def fill(ax: Axes, frame: Frame, layers: Iterable[int], modules: Iterable[str], colors: Iterable[Color]) -> None:
    """Colour the place of each layer and module."""
    row, column = {n: k for k, n in enumerate(frame.layers)}, {m: k for k, m in enumerate(frame.modules)}
    tiles: dict[Color, list[Array]] = {}
    for layer, module, color in zip(layers, modules, colors, strict=True):
        k, x = row[int(layer)], column[str(module)]
        y, high = frame.tops[k], frame.heights[k]
        corners = [(x, y), (x + 1, y), (x + 1, y + high), (x, y + high), (x, y)]
        tiles.setdefault(color, []).append(np.array(corners))
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    for color, found in tiles.items():  # one path per colour: hundreds of layers and modules make a small file
        path = Path(np.concatenate(found), codes * len(found))
        ax.add_patch(PathPatch(path, facecolor=color, edgecolor=style.FAINT, linewidth=0.35))


def name_axes(ax: Axes, frame: Frame, *, first: bool, last: bool) -> None:
    """Set the limits and name layers (on the `first` panel of a row) and modules (on the `last` of a column)."""
    ax.set(xlim=(0, len(frame.modules)), ylim=(frame.bottom, 0))
    ax.set_xticks(np.arange(len(frame.modules)) + 0.5, frame.modules, rotation=90)
    ax.tick_params(length=0, pad=2, labelbottom=last, labelleft=first)
    inside = [k for k, n in enumerate(frame.layers) if n != OUTSIDE]
    ticks = [(k + 0.5, str(frame.layers[k])) for k in inside if frame.layers[k] % _step(frame) == 0]
    if len(inside) < len(frame.layers):
        ticks.append((frame.tops[-1] + 0.5 * frame.heights[-1], "outside"))
    ax.set_yticks([at for at, _ in ticks], [name for _, name in ticks])


def _step(frame: Frame) -> int:
    """How many layers lie between two that are named, so that names do not touch."""
    row = frame.inches / frame.bottom
    steps: Sequence[int] = (1, 2, 4, 5, 10, 20, 50)
    return next((s for s in steps if s * row >= LINE), 100)
