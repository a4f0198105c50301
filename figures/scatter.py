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
from matplotlib.transforms import Bbox

from figures import style
from figures.data import cells_of, quantity

_SECOND, _FIRST = style.PREDICTORS["second_order"], style.PREDICTORS["first_order"]
_OWN, _OTHER = "s", "o"


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
    square. First-order points beyond the frame are drawn as triangles on its edge. Labels say "trained on → changed" and
    are left out where they would cover something. The line under each title is the scorecard of the second order.

    Args:
        results: `Run.results`.
        objective: one of its objectives.

    Raises:
        InputError: the run has no such objective.
    """
    about = quantity(results, objective)
    frame = cells_of(results, objective)
    frame = frame[frame["measured"].notna() & frame["predicted_second"].notna()]
    cards = results.get("scorecards", {}).get(objective, {})
    off = frame[~frame["own"]]
    panels = [("all cells", frame, "all")]
    if 0 < len(off) < len(frame):
        panels.append(("off-diagonal cells", off, "off_diagonal"))
    elif len(off):
        panels = [("off-diagonal cells", frame, "off_diagonal")]

    figure = style.new_figure(4.3)
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
    axes[0].set_ylabel(f"measured {about.label}")
    figure.supxlabel(f"predicted {about.label}", fontsize=8.5)
    _key(figure, own=bool(frame["own"].any()), other=bool(len(off)))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # labels are placed by what they cover, so nothing may move any more
    for ax, cells in views[-1:]:
        _label(figure, ax, cells)
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
    labels = [f"{_SECOND.label}, 90 % intervals", _FIRST.label]
    if own and other:
        handles.append(dot(_OWN, style.MUTED, filled=True))
        labels.append("own domain")
    handles.append(Line2D([], [], color=style.MUTED, linewidth=0.9))
    labels.append("predicted = measured")
    figure.legend(handles, labels, loc="outside upper center", ncols=4, columnspacing=1.4, handletextpad=0.4)


def _label(figure: Figure, ax: Axes, cells: pd.DataFrame) -> None:
    """Name the points, largest change first, each at the nearest free place; a point without one stays unnamed."""
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    taken = _obstacles(figure, ax, cells)
    frame = ax.get_window_extent(renderer)
    low, high = ax.get_xlim()
    points = _points(cells)
    dots = [
        (p.name, *ax.transData.transform((min(max(x, low), high), p.measured)))
        for p in points
        for x in (p.second, p.first)
        if np.isfinite(x)
    ]
    for point in sorted(points, key=lambda p: -abs(p.measured)):
        at = (point.second, point.measured)
        text = ax.annotate(
            point.name, at, xytext=(0, 0), textcoords="offset points", fontsize=8, color=style.INK, zorder=5
        )
        for place in _places():
            text.set(position=place[:2], ha=place[2], va=place[3])
            box = text.get_window_extent(renderer).padded(1.0)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken) and _own(box, point.name, dots):
                taken.append(box)
                break
        else:
            text.remove()


def _own(box: Bbox, name: str, dots: Sequence[tuple[str, float, float]]) -> bool:
    """Is the label clearly nearer to its own markers than to any other? If not, it would name the wrong point."""

    def distance(x: float, y: float) -> float:
        return float(np.hypot(max(box.x0 - x, 0.0, x - box.x1), max(box.y0 - y, 0.0, y - box.y1)))

    mine = min(distance(x, y) for owner, x, y in dots if owner == name)
    return mine < 0.7 * min((distance(x, y) for owner, x, y in dots if owner != name), default=np.inf)


def _places() -> list[tuple[float, float, str, str]]:
    """Offsets in points with the alignment that goes with them, nearest first."""
    out: list[tuple[float, float, str, str]] = []
    for d in (4.0, 8.0, 12.0):
        out += [(d, d / 2, "left", "bottom"), (-d, d / 2, "right", "bottom"), (d, -d / 2, "left", "top")]
        out += [(-d, -d / 2, "right", "top"), (0, d + 2, "center", "bottom"), (0, -d - 2, "center", "top")]
        out += [(d + 2, 0, "left", "center"), (-d - 2, 0, "right", "center")]
        out += [(d, d + 1, "right", "bottom"), (-d, -d - 1, "left", "top")]
    return out


def _obstacles(figure: Figure, ax: Axes, cells: pd.DataFrame) -> list[Bbox]:
    """Boxes in pixels around the markers, the interval bars and the identity line."""
    half = 3.2 * figure.dpi / 72
    to_pixels = ax.transData.transform
    boxes = []

    def add(points: Sequence[tuple[float, float]], pad: float) -> None:
        (x0, y0), (x1, y1) = to_pixels(points[0]), to_pixels(points[-1])
        boxes.append(Bbox([[min(x0, x1) - pad, min(y0, y1) - pad], [max(x0, x1) + pad, max(y0, y1) + pad]]))

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
