"""Whether domains share active routes, and whether the updates point the same way there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from figures import style
from figures.pairs import Row, beyond, nothing
from figures.policies import domains_of

KINDS = {"channel": "MLP channels", "expert channel": "expert channels", "head": "attention heads"}
"""Kinds of units, in the order of display, and what they are called."""

_NULL, _CONTROL = "#d0d0d0", style.OPPOSITE
_SIZE = 5.5
_Key = tuple[str, str]


def kinds_of(table: pd.DataFrame) -> list[str]:
    """The kinds of units that a table of routes has, in the order of display; not the whole update ("all")."""
    found = [str(kind) for kind in table["kind"].unique() if kind != "all"]
    return [kind for kind in KINDS if kind in found] + [kind for kind in found if kind not in KINDS]


def middle_top(table: pd.DataFrame) -> float:
    """Of the shares that counted as active, the middle one, which stands for all where one is shown.

    >>> middle_top(pd.DataFrame({"top": [0.05, 0.2, 0.1, 0.2]}))
    0.1
    """
    tops = sorted({float(top) for top in table["top"]})
    return tops[len(tops) // 2]


def distinct_tops(rows: pd.DataFrame) -> dict[float, float]:
    """Of one kind's overlaps: each share asked for and the share of the units that it made active, without doubles.

    A layer has whole units, and at least one is active: of 12 heads, 5 % and 10 % are both one.

    >>> distinct_tops(pd.DataFrame({"top": [0.05, 0.1, 0.25], "share": [1 / 12, 1 / 12, 0.25]}))
    {0.05: 0.08333333333333333, 0.25: 0.25}
    """
    realised = {float(top): float(rows.loc[rows["top"] == top, "share"].mean()) for top in sorted(set(rows["top"]))}
    return {t: s for k, (t, s) in enumerate(realised.items()) if s not in list(realised.values())[:k]}


@style.styled
def route_overlap(overlaps: pd.DataFrame, results: Mapping[str, Any], model: str = "base") -> Figure:
    """Jaccard overlap of the channels and heads that two domains use most in one model: a row a pair, a column a share.

    Active is the share of each layer's units in the title, in whole units; a share that gives the same sets as a smaller one
    has no panel. The grey bar is the 90 % interval of random sets of the same sizes, with a tick at what is expected by chance;
    a filled dot lies beyond it. Triangles are the control: the overlap of the two halves of each of the pair's own domains,
    which is what the same domain on other prompts gives. A dot among the triangles: the two domains use the same routes.

    Args:
        overlaps: `Run.probe("route_overlap")`.
        results: `Run.results`.
        model: whose routes.
    """
    rows = overlaps[(overlaps["model"] == model) & (overlaps["scope"] == "model")]
    names = [name for name in domains_of(results) if (rows["a"] == name).any() or (rows["b"] == name).any()]
    pairs = list(combinations(names, 2)) or [(name, name) for name in names]
    if not pairs:
        return nothing(f"no routes of {style.shorten(model)} were recorded")
    kinds = kinds_of(rows)
    tops = {kind: distinct_tops(rows[rows["kind"] == kind]) for kind in kinds}
    figure, axes = _grid(len(kinds), max(map(len, tops.values())), pairs)
    for row, (kind, ax_row) in enumerate(zip(kinds, axes, strict=True)):
        for ax in ax_row[len(tops[kind]) :]:
            ax.set_visible(False)
        if len(tops[kind]) > max((len(tops[below]) for below in kinds[row + 1 :]), default=0):
            for ax in ax_row:  # some have no panel below that would bear the numbers
                ax.tick_params(labelbottom=True)
        for (top, realised), ax in zip(tops[kind].items(), ax_row, strict=False):
            found = _by_pair(rows[(rows["kind"] == kind) & (rows["top"] == top)])
            _frame(ax, len(pairs), (0.0, 1.0))
            for place, (a, b) in enumerate(pairs):
                for name in dict.fromkeys((a, b)):
                    _control(ax, place, found.get((name, name)))
                if a != b:
                    _point(ax, place, found.get((a, b)), "jaccard", "chance", "chance_low", "chance_high")
            ax.set_title(f"{KINDS.get(kind, kind)}, top {style.percent(realised)}", fontsize=8.5)
    figure.supxlabel("Jaccard overlap |both| / |either| of the active sets (share)", fontsize=8.5)
    control = Line2D([], [], linestyle="none", marker="^", color=_CONTROL, markerfacecolor="none", markersize=_SIZE)
    _key(figure, "90 % interval of random sets", [(control, "control: halves of one domain")])
    return figure


@style.styled
def route_direction(directions: pd.DataFrame, results: Mapping[str, Any], measure: str = "cosine") -> Figure:
    """Cosine (or sign agreement) of two experts' updates on the routes that both domains use: a row a pair, a panel a kind.

    The middle share of active units is shown. The grey bar holds 90 % of random sets of as many units in each layer, with a
    tick at their mean; a filled dot lies beyond it. The diamond is the same number over the whole updates.

    Args:
        directions: `Run.probe("route_direction")`.
        results: `Run.results`.
        measure: "cosine" or "sign_agreement".
    """
    short = "cosine" if measure == "cosine" else "sign"
    rows = directions[directions["layer"] == -1]
    found = {(str(r["a"]), str(r["b"])) for r in rows.to_dict("records")}
    pairs = [pair for pair in combinations(domains_of(results), 2) if pair in found or pair[::-1] in found]
    if not pairs:
        return nothing("no updates were compared on shared routes")
    top = middle_top(rows)
    rows, kinds = rows[rows["top"] == top], kinds_of(rows)
    whole = _by_pair(rows[rows["kind"] == "all"])
    columns = [measure, f"{short}_chance_low", f"{short}_chance_high"]
    limit = _reach(rows[columns].to_numpy(float)) if measure == "cosine" else 1.0
    figure, axes = _grid(1, len(kinds), pairs)
    for kind, ax in zip(kinds, axes[0], strict=True):
        here = _by_pair(rows[rows["kind"] == kind])
        _frame(ax, len(pairs), (-limit, limit) if measure == "cosine" else (0.0, 1.0))
        ax.axvline(0.0 if measure == "cosine" else 0.5, color=style.FAINT, linewidth=0.8, zorder=0)
        for place, pair in enumerate(pairs):
            names = [f"{short}_{end}" for end in ("chance", "chance_low", "chance_high")]
            _point(ax, place, here.get(pair, here.get(pair[::-1])), measure, *names)
            _whole(ax, place, whole.get(pair, whole.get(pair[::-1])), measure)
        share = float(rows.loc[rows["kind"] == kind, "share"].mean())
        ax.set_title(f"{KINDS.get(kind, kind)}, top {style.percent(share)}", fontsize=8.5)
    what = {"cosine": "cosine of the two updates (no unit)", "sign_agreement": "share of weights moved the same way"}
    figure.supxlabel(f"{what[measure]} on the routes that both domains use", fontsize=8.5)
    diamond = Line2D([], [], linestyle="none", marker="D", color=style.INK, markerfacecolor="none", markersize=4.5)
    _key(figure, "90 % of random sets", [(diamond, "whole updates")])
    return figure


def _by_pair(rows: pd.DataFrame) -> dict[_Key, Row]:
    return {(str(row["a"]), str(row["b"])): {str(k): v for k, v in row.items()} for row in rows.to_dict("records")}


def _reach(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    largest = float(np.abs(values[np.isfinite(values)]).max(initial=0.0))
    return next(end for end in (0.1, 0.2, 0.5, 1.0) if largest <= 0.95 * end or end == 1.0)


def _grid(rows: int, columns: int, pairs: Sequence[_Key]) -> tuple[Figure, Any]:
    """Panels that share their axes, with the pairs' names at the left."""
    figure = style.new_figure((0.22 * len(pairs) + 0.4) * rows + 1.0)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for ax_row in axes:
        names = [
            style.shorten(a, 12) if a == b else f"{style.shorten(a, 12)} – {style.shorten(b, 12)}" for a, b in pairs
        ]
        ax_row[0].set_yticks(range(len(pairs)), names)
    return figure, axes


def _frame(ax: Axes, rows: int, ends: tuple[float, float]) -> None:
    margin = 0.04 * (ends[1] - ends[0])
    ax.set(xlim=(ends[0] - margin, ends[1] + margin), ylim=(rows - 0.5, -0.5))
    ticks = [ends[0], (ends[0] + ends[1]) / 2, ends[1]]
    ax.set_xticks(ticks, [f"{x:g}".replace("-", "−") for x in ticks])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    for row in range(rows):
        ax.axhline(row, color="#efefef", linewidth=0.6, zorder=0)


def _point(ax: Axes, place: int, row: Row | None, value: str, chance: str, low: str, high: str) -> None:
    """A dot beside its null; a dash at the right edge where there is none."""
    if row is None or not np.isfinite(float(row[value])):
        ax.text(1.0, place, "–", transform=ax.get_yaxis_transform(), ha="right", va="center", color=style.MUTED)
        return
    found, expected, start, end = (float(row[name]) for name in (value, chance, low, high))
    if np.isfinite([start, end]).all():
        ax.plot([start, end], [place, place], color=_NULL, linewidth=6, solid_capstyle="butt", zorder=1)
    if np.isfinite(expected):
        ax.plot(expected, place, marker="|", color=style.MUTED, markersize=8, markeredgewidth=1.2, zorder=2)
    face = style.SAME if beyond(found, start, end) else style.PAPER
    look: dict[str, Any] = {"color": style.SAME, "markerfacecolor": face, "markersize": _SIZE, "clip_on": False}
    ax.plot(found, place, "o", zorder=4, **look)


def _control(ax: Axes, place: int, row: Row | None) -> None:
    if row is not None and np.isfinite(float(row["jaccard"])):
        look: dict[str, Any] = {"color": _CONTROL, "markerfacecolor": "none", "markersize": _SIZE, "clip_on": False}
        ax.plot(float(row["jaccard"]), place, "^", zorder=3, **look)


def _whole(ax: Axes, place: int, row: Row | None, value: str) -> None:
    if row is not None and np.isfinite(float(row[value])):
        look: dict[str, Any] = {"color": style.INK, "markerfacecolor": "none", "markersize": 4.5, "clip_on": False}
        ax.plot(float(row[value]), place, "D", zorder=3, **look)


def _key(figure: Figure, null: str, more: Sequence[tuple[Line2D, str]]) -> None:
    point: dict[str, Any] = {"linestyle": "none", "marker": "o", "color": style.SAME, "markersize": _SIZE}
    tick: dict[str, Any] = {"linestyle": "none", "marker": "|", "color": style.MUTED, "markersize": 8}
    handles: list[Any] = [
        Line2D([], [], **point),
        Line2D([], [], markerfacecolor=style.PAPER, **point),
        *(handle for handle, _ in more),
        Line2D([], [], markeredgewidth=1.2, **tick),
        Patch(facecolor=_NULL),
    ]
    labels = ["beyond chance", "not beyond chance", *(label for _, label in more), "chance", null]
    figure.legend(handles, labels, loc="outside upper center", ncols=3, columnspacing=1.3, handletextpad=0.5)
