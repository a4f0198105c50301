"""Mixtures and orders of trainings against each other, before any is trained: one row per plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures import style
from figures.data import quantity
from figures.pairs import nothing

SHOWN = 64
"""Rows of a figure at most: the plans that are best on average."""
_JOINTS = (" → ", " + ")
_LETTERS = 46  # of a row's label
_LIFT = 0.17  # of the two marks of a row, above and below its middle


@style.styled
def plan_ranking(ranking: pd.DataFrame, results: Mapping[str, Any], kind: str) -> Figure:
    """The change of expected reward under every plan, the one best on average on top, with 90 % intervals.

    Two marks a row: the mean over domains and the worst domain, whose name stands at the right; the plan whose worst domain does
    best is ringed. A star marks plans that rest on few effective samples.

    Args:
        ranking: `Run.forecast("plan_ranking")`.
        results: `Run.results`.
        kind: "mixture" or "order".

    Raises InputError for a run without expected rewards.
    """
    about = quantity(results, "reward")
    every = ranking[ranking["kind"] == kind]
    rows = every.head(SHOWN).reset_index(drop=True)
    if rows.empty:
        return nothing(f"no {kind}s were asked for")
    figure = style.new_figure(0.205 * len(rows) + 1.15)
    ax = figure.subplots()
    heights = np.arange(len(rows), dtype=float)
    looks = {"mean": _look("mean"), "worst": _look("worst")}
    ax.axvline(0, color=style.MUTED, linewidth=0.9, zorder=1)
    for what, lift in (("mean", -_LIFT), ("worst", _LIFT)):
        middle, low, high = (rows[f"{what}{end}"].to_numpy(float) for end in ("", "_low", "_high"))
        ends = np.array([middle - low, high - middle]).clip(min=0)
        ax.errorbar(middle, heights + lift, xerr=ends, elinewidth=0.9, zorder=3, **looks[what])
    best = int(rows["worst"].to_numpy(float).argmax())
    ring: dict[str, Any] = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "linestyle": "none"}
    ax.plot(float(rows["worst"].iloc[best]), best + _LIFT, color=style.INK, markeredgewidth=0.8, zorder=4, **ring)
    _name(ax, rows, heights)
    ax.set_xlabel(about.label)
    handles = [
        Line2D([], [], **looks["mean"]),
        Line2D([], [], **looks["worst"]),
        Line2D([], [], color=style.INK, **ring),
    ]
    labels = ["mean over domains", "worst domain (at the right)", "best worst domain"]
    if (rows["note"] != "").any():
        handles.append(Line2D([], [], linestyle="none"))
        labels.append("* few effective samples")
    figure.legend(handles, labels, loc="outside upper center", ncols=len(handles), columnspacing=1.2, handletextpad=0.5)
    if len(every) > len(rows):
        figure.supxlabel(f"the best {len(rows)} of {len(every)}", fontsize=8)
    return figure


def _look(what: str) -> dict[str, Any]:
    """Marks differ in shape and filling, so that they are told apart without colour."""
    if what == "mean":
        return {"linestyle": "none", "marker": "o", "markersize": 4.5, "color": style.FORECASTS["virtual"].color}
    return {"linestyle": "none", "marker": "D", "markersize": 4, "color": style.INK, "markerfacecolor": style.PAPER}


def _name(ax: Axes, rows: pd.DataFrame, heights: np.ndarray[Any, Any]) -> None:
    """Plans at the left, each one's worst domain at the right."""
    stars = [" *" if note else "" for note in rows["note"]]
    ax.set_yticks(heights, [short(str(plan)) + star for plan, star in zip(rows["plan"], stars, strict=True)])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    for height in heights[1::2]:
        ax.axhspan(height - 0.5, height + 0.5, color=style.FAINT, alpha=0.28, linewidth=0, zorder=0)
    right = ax.secondary_yaxis("right")
    right.set_yticks(heights, [style.shorten(str(name), 14) for name in rows["worst_domain"]])
    right.tick_params(axis="y", length=0, labelcolor=style.MUTED)
    right.spines["right"].set_visible(False)


def short(plan: str) -> str:
    """A plan's label with its domains' names shortened so that all of them can be read.

    >>> short("math → code"), len(short(" + ".join("abcd" * 8 for _ in range(3)))) <= 46
    ('math → code', True)
    """
    if len(plan) <= _LETTERS:
        return plan
    joint = next((j for j in _JOINTS if j in plan), _JOINTS[0])
    parts = plan.split(joint)
    room = max(5, (_LETTERS - len(joint) * (len(parts) - 1)) // len(parts))
    return joint.join(style.shorten(part, room) for part in parts)
