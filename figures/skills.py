"""Whether multi-task and merged models have the experts' skills, beside what sampling noise alone would show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from figures import style
from figures.pairs import nothing
from figures.policies import domains_of, key, looks

_NULL = "#d0d0d0"


@style.styled
def skill_consistency(consistency: pd.DataFrame, results: Mapping[str, Any]) -> Figure:
    """Consistency of every multi-task and merged model with the union of the experts' gains: a row a domain and model.

    Left, the cosine of the gains with its 90 % interval, beside the grey 90 % interval of models that learned nothing, with a
    tick at its mean: filled points lie beyond it. Right, the skill cosine, which noise does not raise: 0 without learning, 1 with
    just the experts' skills; nothing where the changes that it divides by are not beyond noise.

    Args:
        consistency: `Run.probe("consistency")`.
        results: `Run.results`.
    """
    known, domains = looks(results), domains_of(results)
    names = [name for name in known if (consistency["model"] == name).any()]
    found = {(str(r["domain"]), str(r["model"])): r for r in consistency.to_dict("records")}
    rows = [(d, m) for d in domains for m in names if (d, m) in found]
    if not rows:
        return nothing("no consistency of skills was recorded")
    figure = style.new_figure(0.26 * len(rows) + 0.12 * len(domains) + 1.25)
    left, right = figure.subplots(1, 2, sharey=True)
    place, y, last = {}, 0.0, rows[0][0]
    for domain, model in rows:
        y += 0.5 * (domain != last)
        place[domain, model], last = y, domain
        y += 1
    for ax in (left, right):
        _frame(ax, list(place.values()))
    for pair, height in place.items():
        _cosine(left, height, found[pair], known[pair[1]].color, known[pair[1]].point)
        _skill(right, height, found[pair], known[pair[1]].color, known[pair[1]].point)
    left.set_title("consistency with the experts' union", fontsize=8.5)
    left.set(xlim=(-0.03, 1.03), xlabel="cosine of the gains")
    right.set_title("skill cosine, free of noise in expectation", fontsize=8.5)
    right.set(xlabel="skill cosine (0: no learning, 1: the experts' skills)")
    for x in (0.0, 1.0):
        right.axvline(x, color=style.FAINT, linewidth=0.9, zorder=0)
    middle = {d: np.mean([h for (domain, _), h in place.items() if domain == d]) for d, _ in rows}
    left.set_yticks(list(middle.values()), [style.shorten(d, 18) for d in middle])
    tick: dict[str, Any] = {
        "linestyle": "none",
        "marker": "|",
        "color": style.MUTED,
        "markersize": 8,
        "markeredgewidth": 1.2,
    }
    hollow = Line2D([], [], linestyle="none", marker="o", color=style.INK, markerfacecolor=style.PAPER, markersize=5.5)
    more = [
        (Line2D([], [], **tick), "mean without learning"), (Patch(facecolor=_NULL), "90 % interval without learning"),
        (hollow, "hollow: not beyond the interval"),
    ]  # fmt: skip
    key(figure, known, names, more)
    return figure


def _frame(ax: Axes, heights: list[float]) -> None:
    ax.set_ylim(max(heights) + 0.6, min(heights) - 0.6)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    for height in heights:
        ax.axhline(height, color="#efefef", linewidth=0.6, zorder=0)


def _cosine(ax: Axes, height: float, row: Mapping[Any, Any], color: str, point: dict[str, Any]) -> None:
    value, low, high = (float(row[name]) for name in ("consistency", "low", "high"))
    if np.isfinite([row["null_low"], row["null_high"]]).all():
        ax.plot(
            [row["null_low"], row["null_high"]], [height] * 2, color=_NULL, linewidth=7, solid_capstyle="butt", zorder=1
        )
        ax.plot(row["null"], height, marker="|", color=style.MUTED, markersize=9, markeredgewidth=1.2, zorder=2)
    if not np.isfinite(value):
        ax.text(0.5, height, "no gain", ha="center", va="center", color=style.MUTED, fontsize=8)
        return
    _point(
        ax, height, value, low, high, color, point if row["beyond_null"] else point | {"markerfacecolor": style.PAPER}
    )


def _skill(ax: Axes, height: float, row: Mapping[Any, Any], color: str, point: dict[str, Any]) -> None:
    value, low, high = (float(row[name]) for name in ("skill_cosine", "skill_cosine_low", "skill_cosine_high"))
    if not np.isfinite(value):
        ax.text(0.5, height, "within noise", ha="center", va="center", color=style.MUTED, fontsize=8)
        return
    _point(ax, height, value, low, high, color, point)


def _point(ax: Axes, height: float, value: float, low: float, high: float, color: str, point: dict[str, Any]) -> None:
    if np.isfinite([low, high]).all():
        ax.plot([low, high], [height] * 2, color=color, linewidth=0.9, zorder=3)
    ax.plot(value, height, zorder=4, **point)
