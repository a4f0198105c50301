"""Whether two updates change the same MLP channels and attention heads most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from figures import style
from figures.pairs import Pair, Row, beyond, models_of, nothing, pairs_of

KINDS = {"channel": "channels", "head": "heads", "key_value head": "key-value heads"}
"""Kinds of units, in the order of display, and what they are called."""

_BESIDE = 4
"""Most panels in one row; of more, each kind has a row of its own."""

_NULL = "#d0d0d0"


def groups_of(overlaps: pd.DataFrame) -> list[tuple[str, float]]:
    """The kinds of units and the sizes of the top sets that were compared over the whole model, in the order of display."""
    rows = overlaps[overlaps["scope"] == "model"]
    kinds = [kind for kind in KINDS if (rows["kind"] == kind).any()]
    kinds += [str(kind) for kind in rows["kind"].unique() if kind not in KINDS]
    return [(kind, float(top)) for kind in kinds for top in sorted(rows.loc[rows["kind"] == kind, "top"].unique())]


@style.styled
def neuron_overlap(overlaps: pd.DataFrame, results: Mapping[str, Any]) -> Figure:
    """Jaccard overlap of the MLP channels, and of the attention heads, that two updates change most: a row a pair.

    One panel for each kind and each size of the top set. The grey bar is the 90 % interval of random top sets of the same
    size, with a tick at what is expected by chance; a filled dot lies beyond it, a hollow one within.

    Args:
        overlaps: `Run.geometry("neuron_overlap")`.
        results: `Run.results`.
    """
    models = models_of(results)
    rows = overlaps[overlaps["scope"] == "model"]
    groups = groups_of(overlaps)
    found = {group: pairs_of(rows[(rows["kind"] == group[0]) & (rows["top"] == group[1])], models) for group in groups}
    pairs = sorted({pair for group in found.values() for pair in group})
    if not pairs:
        return nothing("no overlaps of channels or heads were recorded")
    limit = _end(rows)
    tops = sorted({top for _, top in groups})
    kinds = list(dict.fromkeys(kind for kind, _ in groups))
    shape = (1, len(groups)) if len(groups) <= _BESIDE else (len(kinds), len(tops))
    places = groups if len(groups) <= _BESIDE else [(kind, top) for kind in kinds for top in tops]
    figure = style.new_figure((0.25 * len(pairs) + 0.6) * shape[0] + 1.0)
    axes = figure.subplots(*shape, sharex=True, sharey=True, squeeze=False)
    for ax, group in zip(axes.ravel(), places, strict=True):
        _frame(ax, len(pairs), limit)
        if group not in found:
            ax.set_axis_off()
            continue
        for place, pair in enumerate(pairs):
            _point(ax, place, found[group].get(pair))
        ax.set_title(f"{KINDS.get(group[0], group[0])}\ntop {style.percent(group[1])}", fontsize=8.5)
    axes[0, 0].set_yticks(range(len(pairs)), [_name(pair, models) for pair in pairs])
    figure.supxlabel("Jaccard overlap |both| / |either| of the top sets (share)", fontsize=8.5)
    _key(figure)
    return figure


def _name(pair: Pair, models: Sequence[str]) -> str:
    return " – ".join(style.shorten(models[k], 12) for k in pair)


def _end(rows: pd.DataFrame) -> float:
    values = rows[["jaccard", "high", "chance"]].to_numpy(float)
    largest = float(values[np.isfinite(values)].max(initial=0.0))
    return next(end for end in (0.1, 0.2, 0.5, 1.0) if largest <= end or end == 1.0)


def _frame(ax: Axes, rows: int, limit: float) -> None:
    ax.set(xlim=(-0.05 * limit, 1.05 * limit), ylim=(rows - 0.5, -0.5))
    ax.set_xticks([0.0, limit / 2, limit], [f"{x:g}" for x in (0.0, limit / 2, limit)])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    for row in range(rows):
        ax.axhline(row, color="#efefef", linewidth=0.6, zorder=0)


def _point(ax: Axes, place: int, row: Row | None) -> None:
    if row is None or not np.isfinite(float(row["jaccard"])):
        ax.text(0.5, place, "–", transform=ax.get_yaxis_transform(), ha="center", va="center", color=style.MUTED)
        return
    value, chance, low, high = (float(row[name]) for name in ("jaccard", "chance", "low", "high"))
    if np.isfinite([low, high]).all():
        ax.plot([low, high], [place, place], color=_NULL, linewidth=6, solid_capstyle="butt", zorder=1)
    if np.isfinite(chance):
        ax.plot(chance, place, marker="|", color=style.MUTED, markersize=8, markeredgewidth=1.2, zorder=2)
    face = style.SAME if beyond(value, low, high) else style.PAPER
    look: dict[str, Any] = {"color": style.SAME, "markerfacecolor": face, "markersize": 5.5, "clip_on": False}
    ax.plot(value, place, "o", zorder=3, **look)


def _key(figure: Figure) -> None:
    point: dict[str, Any] = {"linestyle": "none", "marker": "o", "color": style.SAME, "markersize": 5.5}
    tick: dict[str, Any] = {"linestyle": "none", "marker": "|", "color": style.MUTED, "markersize": 8}
    handles = [
        Line2D([], [], **point),
        Line2D([], [], markerfacecolor=style.PAPER, **point),
        Line2D([], [], markeredgewidth=1.2, **tick),
        Patch(facecolor=_NULL),
    ]
    labels = ["beyond chance", "not beyond chance", "chance", "90 % interval of random top sets"]
    figure.legend(handles, labels, loc="outside upper center", ncols=4, columnspacing=1.3, handletextpad=0.5)
