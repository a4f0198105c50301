"""Predicted against measured: does the local theory explain what happened?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from figures import labels, style
from figures.data import read

_SECOND, _FIRST = style.PREDICTORS["second_order"], style.PREDICTORS["first_order"]
_OWN, _OTHER = "s", "o"
MOST_NAMED = 12
"""Most points that are numbered; of more, those with the largest measured change are."""


class _Window(NamedTuple):
    low: float
    high: float


class _Point(NamedTuple):
    name: str
    own: bool
    first: float
    second: float
    measured: float
    stderr: float
    measured_stderr: float


def _points(cells: pd.DataFrame) -> list[_Point]:
    short = [
        f"{style.shorten(str(u), 12)}→{style.shorten(str(d), 12)}"
        for u, d in zip(cells["update"], cells["domain"], strict=True)
    ]
    columns = ("own", "predicted_first", "predicted_second", "measured", "stderr", "measured_stderr")
    return [_Point(*row) for row in zip(short, *(cells[c].tolist() for c in columns), strict=True)]


@style.styled
def predicted_against_measured(results: Mapping[str, Any], objective: str) -> Figure:
    """Predicted change across, measured change up, with the identity line: all cells, and the off-diagonal ones.

    Filled markers are the second order (Hessian), open ones the first order, joined where both are in view; bars are
    90 % intervals (1.645 standard errors) of the second-order prediction and of the measurement. A domain's own cell is a
    square. First-order points beyond the frame are drawn as triangles on its edge. Every off-diagonal cell has a number,
    explained below the panels; of more than twelve, only those that changed most, and the figure says so. The line under
    each title is the scorecard of the second order. Arguments and errors are those of `figures.data.read`.
    """
    about, frame = read(results, objective)
    frame = frame[frame["measured"].notna() & frame["predicted_second"].notna()]
    cards = results.get("scorecards", {}).get(objective, {})
    off = frame[~frame["own"]]
    panels = [("all cells", frame, "all")]
    if 0 < len(off) < len(frame):
        panels.append(("off-diagonal cells", off, "off_diagonal"))
    elif len(off):
        panels = [("off-diagonal cells", frame, "off_diagonal")]

    columns, rows = _shape(panels[-1][1])
    figure = style.new_figure(4.45 + 0.16 * rows)
    axes = list(figure.subplots(1, len(panels), squeeze=False).ravel())
    if frame.empty:
        axes[0].text(0.5, 0.5, "nothing was measured", ha="center", va="center", transform=axes[0].transAxes)
        axes[0].set_axis_off()
        return figure
    views = []
    for ax, (title, cells, part) in zip(axes, panels, strict=True):
        window = _window(cells)
        _draw(ax, cells, window)
        words = _score_words(cards.get(part, {}).get("second_order"))
        ax.set_title(title, fontweight="bold", loc="left", pad=19)
        place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
        ax.annotate(words, (0, 1), xytext=(0, 5), fontsize=8, ha="left", va="bottom", **place)
        views.append((ax, cells))
        ax.set_xlabel(f"predicted {about.label}".replace(" (", "\n("))
    axes[0].set_ylabel(f"measured {about.label}")
    _names(figure, views[-1][1], columns)
    _key(figure, own=bool(frame["own"].any()), other=bool(len(off)))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # labels are placed by what they cover, so nothing may move any more
    _label(figure, *views[-1])
    return figure


def _window(cells: pd.DataFrame) -> _Window:
    bars = style.Z90 * cells[["stderr", "measured_stderr"]].fillna(0.0)
    ends = [
        *(cells["predicted_second"] - bars["stderr"]),
        *(cells["predicted_second"] + bars["stderr"]),
        *(cells["measured"] - bars["measured_stderr"]),
        *(cells["measured"] + bars["measured_stderr"]),
        0.0,
    ]
    low, high = min(ends), max(ends)
    reach = 0.35 * (high - low)
    first = cells["predicted_first"].dropna()
    low = min([low, *first[first >= low - reach]])
    high = max([high, *first[first <= high + reach]])
    margin = 0.09 * (high - low) or 1.0
    return _Window(low - margin, high + margin)


def _draw(ax: Axes, cells: pd.DataFrame, window: _Window) -> None:
    low, high = window
    ax.plot([low, high], [low, high], color=style.MUTED, linewidth=0.9, zorder=1)
    ax.axhline(0, color=style.FAINT, linewidth=0.7, zorder=0)
    ax.axvline(0, color=style.FAINT, linewidth=0.7, zorder=0)
    edge = 0.012 * (high - low)
    for point in _points(cells):
        marker = _OWN if point.own else _OTHER
        first, second, y = point.first, point.second, point.measured
        look: dict[str, Any] = {"linestyle": "none", "clip_on": False, "markersize": 5}
        if np.isfinite(first):
            inside = low <= first <= high
            shown = min(max(first, low + edge), high - edge)
            ax.plot([shown, second], [y, y], color=_FIRST.color, linewidth=0.6, alpha=0.55, zorder=2)
            kind = marker if inside else (">" if first > high else "<")
            ax.plot(shown, y, kind, markerfacecolor=style.PAPER, markeredgecolor=_FIRST.color, zorder=3, **look)
        ax.errorbar(
            second,
            y,
            xerr=_bar(point.stderr),
            yerr=_bar(point.measured_stderr),
            color=_SECOND.color,
            elinewidth=0.8,
            marker=marker,
            markersize=5,
            markeredgewidth=0,
            zorder=4,
        )
    ax.set(xlim=window, ylim=window, aspect="equal")
    ax.locator_params(nbins=6)


def _bar(stderr: float) -> float | None:
    return style.Z90 * stderr if np.isfinite(stderr) else None


def _score_words(card: Mapping[str, Any] | None) -> str:
    if not card:
        return "not scored"
    words = []
    for key, name in (("spearman", "Spearman"), ("slope", "slope"), ("sign_accuracy", "right sign")):
        value = card.get(key)
        words.append(f"{name} –" if value is None else f"{name} {style.plain(value, 2)}")
    return " · ".join(words)


def _key(figure: Figure, *, own: bool, other: bool) -> None:
    def dot(marker: str, color: str, *, filled: bool) -> Line2D:
        face = color if filled else style.PAPER
        return Line2D([], [], linestyle="none", marker=marker, markersize=5, color=color, markerfacecolor=face)

    main = _OTHER if other else _OWN
    handles = [dot(main, _SECOND.color, filled=True), dot(main, _FIRST.color, filled=False)]
    words = [f"{_SECOND.label}, 90 % intervals", _FIRST.label]
    if own and other:
        handles.append(dot(_OWN, style.MUTED, filled=True))
        words.append("own domain")
    handles.append(Line2D([], [], color=style.MUTED, linewidth=0.9))
    words.append("predicted = measured")
    figure.legend(handles, words, loc="outside upper center", ncols=4, columnspacing=1.4, handletextpad=0.4)


def _named(cells: pd.DataFrame) -> list[_Point]:
    """The points that get a number, highest first: all, or where there are more, those that changed most."""
    points = sorted(_points(cells), key=lambda p: -abs(p.measured))[:MOST_NAMED]
    return sorted(points, key=lambda p: (-p.measured, p.name))


def _shape(cells: pd.DataFrame) -> tuple[int, int]:
    """Columns and rows of the key, filled evenly."""
    named = _named(cells)
    widest = 0.062 * max((len(point.name) for point in named), default=0) + 0.5  # inches, at 8 points, with a gap
    rows = -(-len(named) // min(6, max(1, int(style.WIDTH / widest)))) or 1
    return -(-len(named) // rows) or 1, rows


def _names(figure: Figure, cells: pd.DataFrame, columns: int) -> None:
    """The key below the panels: which cell each number is."""
    named = _named(cells)
    words = [f"{k}  {point.name}" for k, point in enumerate(named, start=1)]
    title = "numbered from the highest down (trained on → changed)"
    if len(cells) > len(named):
        title = f"only the {len(named)} of {len(cells)} cells that changed most are {title}"
    figure.legend(
        [Patch(alpha=0)] * len(words),
        words,
        title=title,
        title_fontsize=8,
        loc="outside lower center",
        ncols=columns,
        handlelength=0,
        handletextpad=0,
        columnspacing=1.6,
        labelspacing=0.3,
    )


def _label(figure: Figure, ax: Axes, cells: pd.DataFrame) -> None:
    """Write the numbers, each joined to its second-order point by a thin line."""
    named = _named(cells)
    pixel = figure.dpi / 72
    points = [tuple(ax.transData.transform((p.second, p.measured)).tolist()) for p in named]
    sizes = [((5.8 * len(str(k)) + 0.5) * pixel, 8.0 * pixel) for k in range(1, len(named) + 1)]
    frame = labels.Box(*ax.get_window_extent().extents)
    places = labels.place(points, sizes, _obstacles(figure, ax, cells), frame, pixel)
    for k, (point, centre, at) in enumerate(zip(named, places, points, strict=True), start=1):
        gap = 5.0 * pixel / float(np.hypot(centre[0] - at[0], centre[1] - at[1]))
        near = (centre[0] + gap * (at[0] - centre[0]), centre[1] + gap * (at[1] - centre[1]))
        (x, y), end = (ax.transData.inverted().transform(place).tolist() for place in (centre, near))
        ax.plot([point.second, end[0]], [point.measured, end[1]], color=style.INK, linewidth=0.5, zorder=5)
        ax.text(x, y, str(k), ha="center", va="center_baseline", fontsize=8, zorder=6)


def _obstacles(figure: Figure, ax: Axes, cells: pd.DataFrame) -> list[labels.Box]:
    """Boxes in pixels around the markers, the interval bars and the identity line."""
    half = 3.2 * figure.dpi / 72
    to_pixels = ax.transData.transform
    boxes = []

    def add(points: Sequence[tuple[float, float]], pad: float) -> None:
        (x0, y0), (x1, y1) = to_pixels(points[0]), to_pixels(points[-1])
        boxes.append(labels.Box(min(x0, x1) - pad, min(y0, y1) - pad, max(x0, x1) + pad, max(y0, y1) + pad))

    for point in _points(cells):
        x, y = point.second, point.measured
        add([(x, y)], half)
        if np.isfinite(point.first):
            add([(point.first, y)], half)
            add([(point.first, y), (x, y)], 0.0)
        dx, dy = (_bar(s) or 0.0 for s in (point.stderr, point.measured_stderr))
        add([(x - dx, y), (x + dx, y)], 1.0)
        add([(x, y - dy), (x, y + dy)], 1.0)
    low, high = ax.get_xlim()
    steps = np.linspace(low, high, 120)
    for a, b in pairwise(steps):
        add([(a, a), (b, b)], 0.0)
    return boxes
