"""The interference matrix: what each update does to each domain, predicted and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerPatch
from matplotlib.patches import Patch, Polygon, Rectangle

from figures import squares, style
from figures.data import Array, Quantity, grid, order, read

_SIDE_BY_SIDE = 10
"""Most columns, those of all panels together, that fit beside each other at page width with numbers of 8 points."""

_BEYOND = "beyond its radius: second order off by > 10 % before alpha 1"


Squares = np.ndarray[Any, np.dtype[np.bool_]]


class Panel(NamedTuple):
    """A heatmap: updates x domains arrays. beyond: 1 where the value is beyond its noise; flagged: 1 where a corner is black."""

    title: str
    values: Array
    stderr: Array
    beyond: Array
    flagged: Array


@style.styled
def interference_matrix(results: Mapping[str, Any], objective: str) -> Figure:
    """Heatmaps of the predicted (second order) and the measured change; rows trained on, columns changed.

    Both panels share one scale, symmetric about zero, set by the off-diagonal cells: a domain's own cell may be much
    larger and then takes the end colour. Blue is always *helped*. Each cell says its value and standard error; hatched
    cells are not beyond their 90 % noise; a domain's own cell is outlined. A predicted cell with a black corner is beyond
    its radius: somewhere before alpha 1 the second order is off by more than 10 % and more than noise. Without measured
    values the prediction stands alone. Arguments and errors are those of `figures.data.read`.
    """
    about, frame = read(results, objective)
    updates, domains = order(results)

    def panel(title: str, value: str, stderr: str, beyond: str) -> Panel:
        values, errors, sure, flags = (
            grid(frame, name, updates, domains) for name in (value, stderr, beyond, "beyond_radius")
        )
        return Panel(title, values, errors, sure, flags if value == "predicted_second" else np.zeros_like(flags))

    panels = [panel("predicted: second order (Hessian)", "predicted_second", "stderr", "certain")]
    if frame["measured"].notna().any():
        panels.append(panel("measured", "measured", "measured_stderr", "detected"))
    own = grid(frame, "own", updates, domains) == 1
    return heatmaps(panels, updates, domains, own, about, _BEYOND)


def heatmaps(
    panels: Sequence[Panel],
    updates: Sequence[str],
    domains: Sequence[str],
    own: Squares,
    about: Quantity,
    flag: str,
    hatch: str = "not beyond its own 90 % noise",
) -> Figure:
    """Heatmaps of changes on one scale; rows are what was trained on, columns what is changed.

    own: which cells are those of a domain's own update.  flag, hatch: what the key says of flagged and of hatched cells.
    """
    limit, clipped = _limit(panels, own)
    values, errors = (np.concatenate([getattr(p, f).ravel() for p in panels]) for f in ("values", "stderr"))
    power, decimals = style.scale_of(values.tolist(), errors.tolist())

    beside = len(panels) * len(domains) <= _SIDE_BY_SIDE
    names = [style.shorten(name, 14) for name in domains]
    lean = len(domains) > 1 and max(map(len, names)) > (9 if len(domains) <= 4 else 7)
    figure, axes = _frame(len(panels), len(updates), len(domains), beside, lean)
    shades = _Shades(style.diverging(about.better), Normalize(-limit, limit), 10.0**power, decimals)
    for k, (ax, one) in enumerate(zip(axes, panels, strict=True)):
        _draw(ax, one, own, shades)
        ax.set_title(one.title, fontweight="bold", pad=8)
        _name_axes(ax, updates if not beside or k == 0 else [], names, lean)
    _colorbar(figure, axes, shades, about, power, clipped)
    _key(figure, bool(own.any()), flag * bool(any((p.flagged == 1).any() for p in panels)), hatch)
    figure.draw_without_rendering()  # names on top and a fixed cell shape need two passes; the next draw is the second
    return figure


class _Shades(NamedTuple):
    cmap: Colormap
    norm: Normalize
    divisor: float
    decimals: int


def _limit(panels: Sequence[Panel], own: Squares) -> tuple[float, bool]:
    """The scale's end: the largest off-diagonal change, but never so small that noise would look like colour."""
    values = np.stack([np.abs(p.values) for p in panels])
    stderr = np.stack([p.stderr for p in panels])
    off = values[:, ~own]
    off = off[np.isfinite(off)]
    everything = values[np.isfinite(values)]
    noise = stderr[np.isfinite(stderr)]
    limit = max(
        float((off if off.size else everything).max(initial=0.0)),
        3 * float(np.median(noise)) if noise.size else 0.0,
    )
    limit = limit if limit > 0 else 1.0
    return limit, bool(everything.max(initial=0.0) > limit * (1 + 1e-9))


def _frame(panels: int, rows: int, columns: int, beside: bool, lean: bool) -> tuple[Figure, list[Axes]]:
    room = 1.2  # inches for the names of the rows
    width = style.WIDTH if beside else max(style.WIDTH, 0.68 * columns + room)
    across = columns * panels if beside else columns
    cell = min(1.1, (width - room - 0.2) / across)
    tall = max(0.72 * cell, 0.42)
    stacked = 1 if beside else panels
    figure = style.new_figure(stacked * (rows * tall + (1.05 if lean else 0.72)) + 1.0, width, layout="compressed")
    shape = (1, panels) if beside else (panels, 1)
    axes = list(figure.subplots(*shape, squeeze=False).ravel())
    for ax in axes:
        ax.set(xlim=(0, columns), ylim=(rows, 0), aspect=tall / cell)
    return figure, axes


def _draw(ax: Axes, panel: Panel, own: Squares, shades: _Shades) -> None:
    rows, columns = panel.values.shape
    for i in range(rows):
        for j in range(columns):
            value, stderr = panel.values[i, j], panel.stderr[i, j]
            known = bool(np.isfinite(value))
            fill = shades.cmap(shades.norm(value))[:3] if known else to_rgb("#ededed")
            sure = panel.beyond[i, j] == 1
            squares.square(ax, j, i, fill, hatched=known and not sure)
            if own[i, j]:
                box = Rectangle((j + 0.03, i + 0.03), 0.94, 0.94, fill=False, edgecolor=style.INK, linewidth=1.3)
                ax.add_patch(box)
            if panel.flagged[i, j] == 1 and known:
                ax.add_patch(_corner(j, i))
            text = _words(value / shades.divisor, stderr / shades.divisor, shades.decimals)
            squares.write(ax, j, i, text, fill, hatched=known and not sure)
    squares.bare(ax)


def _corner(x: float, y: float, width: float = 0.2, height: float = 0.3) -> Polygon:
    """The mark of a cell beyond its radius: its upper right corner in ink, with an edge that shows on dark cells."""
    points = [(x + 0.99 - width, y + 0.01), (x + 0.99, y + 0.01), (x + 0.99, y + 0.01 + height)]
    return Polygon(points, closed=True, facecolor=style.INK, edgecolor=style.PAPER, linewidth=0.9, zorder=2)


def _words(value: float, stderr: float, decimals: int) -> str:
    if not np.isfinite(value):
        return "–"
    error = f"\n±{stderr:.{decimals}f}" if np.isfinite(stderr) else ""
    return style.signed(value, decimals) + error


def _name_axes(ax: Axes, updates: Sequence[str], domains: Sequence[str], lean: bool) -> None:
    ax.set_xticks(np.arange(len(domains)) + 0.5, domains)
    ax.xaxis.tick_top()
    if lean:
        for tick in ax.get_xticklabels():
            tick.set(rotation=30, ha="left", va="bottom", rotation_mode="anchor")
    ax.xaxis.set_label_position("top")
    ax.set_xlabel("domain: changed", labelpad=4)
    ax.set_yticks(np.arange(len(updates)) + 0.5, [style.shorten(name, 16) for name in updates])
    if updates:
        ax.set_ylabel("update: trained on" if len(updates) > 1 else "update:\ntrained on")


def _colorbar(
    figure: Figure, axes: Sequence[Axes], shades: _Shades, about: Quantity, power: int, clipped: bool
) -> None:
    limit = float(shades.norm.vmax or 1.0)
    marks = [-limit, -limit / 2, 0.0, limit / 2, limit]
    named = {m: style.signed(m / shades.divisor, shades.decimals) for m in marks}
    bar = style.colour_bar(figure, axes, ScalarMappable(shades.norm, shades.cmap), named, clipped, 0.04)
    unit = f"{style.times_power(power)}{about.unit}"
    bar.set_label(f"change in {about.name} ({unit}); {about.better} is better: blue helped, orange hurt")


def _key(figure: Figure, own: bool, flagged: str, hatched: str) -> None:
    handles = [squares.in_key()]
    labels = [hatched]
    if own:
        handles.insert(0, Patch(facecolor="none", edgecolor=style.INK, linewidth=1.3))
        labels.insert(0, "the domain's own update")
    handles.append(Patch(alpha=0))
    labels.append("± one standard error")
    special: dict[Any, Any] = {}
    if flagged:
        handles.append(Patch(facecolor=style.INK))
        labels.append(flagged)
        special[handles[-1]] = HandlerPatch(patch_func=_corner_in_key)
    columns: dict[str, Any] = {"ncols": 2 if flagged else 3, "handlelength": 1.6, "columnspacing": 1.6}
    figure.legend(handles, labels, loc="outside lower center", handler_map=special, **columns)


def _corner_in_key(xdescent: float, ydescent: float, width: float, height: float, **_: object) -> Polygon:
    right, top = width - xdescent, height - ydescent
    return Polygon([(right - height, top), (right, top), (right, top - height)], closed=True)
