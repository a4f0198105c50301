"""How few MLP channels carry how much of the predicted damage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from figures import panels, style
from figures.data import Array, quantity
from figures.parts import Concentration, cell_of, concentration, parts_of

_POINTS = 80
"""Points of a line, evenly spread over the logarithm of the share of channels."""

_HURT, _HELPED = style.HURT, "#dfb08f"


@style.styled
def channel_concentration(
    channels: pd.DataFrame, results: Mapping[str, Any], objective: str, update: str | None = None
) -> Figure:
    """Share of the damage that the most harmful MLP channels carry, against their share of all channels (log scale).

    The damage is the sum of all harmful contributions (first + second order) of channels in a cell, without those that
    help. The square marks the fewest channels that carry half of it, the circle the share of the top 1 %; the title says
    both. A pale line: there the channels help on the whole, and the damage is what little works against it. Dotted: what
    it would be if every channel did the same harm. Rows are updates, columns domains.

    Args:
        channels: `Run.attribution("channels")`.
        results: `Run.results`.
        objective: one of its objectives.
        update: draw this update alone, its panels wrapped to the page; for runs of more than five domains.

    Raises:
        InputError: the run has no such objective.
    """
    about = quantity(results, objective)
    here = channels if update is None else channels.loc[channels["update"] == update]
    parts = parts_of(here, results, objective)
    figure, places = panels.page(results, update, tall=1.55, wide=1.35, extra=1.3)
    least = 1.0
    for panel in places:
        harm = cell_of(parts, panel.update, panel.domain)["harm"].to_numpy(float)
        found = concentration(harm)
        words = _draw(panel.ax, found, float(harm.sum()) if harm.size else None)
        least = min(least, 1.0 / found.parts) if found else least
        panel.ax.set_title(f"{panel.title}\n{words}" if panel.title else words, fontsize=8, pad=3)
        panel.ax.tick_params(labelbottom=panel.last, labelleft=panel.first, pad=1.5)
    _name_axes(places[0].ax, least)
    figure.supxlabel("share of all MLP channels, most harmful first (%, log scale)", fontsize=8.5)
    figure.supylabel(f"share of the damage to {about.name} (%)", fontsize=8.5)
    _key(figure, panels.heading(places, update))
    return figure


def _draw(ax: Axes, found: Concentration | None, net: float | None) -> str:
    """Draw one cell whose channels do `net` harm, None where they were not split; returns what its title says."""
    if found is None:
        why = "not split" if net is None else "no harmful\nchannel"
        ax.text(0.5, 0.5, why, transform=ax.transAxes, ha="center", va="center", color=style.MUTED)
        return "\n"
    n = found.parts
    shown = np.unique(np.round(np.geomspace(1, n, _POINTS)).astype(int))
    color = _HURT if net is not None and net > 0 else _HELPED
    even: Array = np.geomspace(1 / n, 1, _POINTS)
    ax.plot(even, even, linestyle=":", color=style.MUTED, linewidth=1.0, zorder=1)
    ax.plot(shown / n, found.cumulative[shown - 1], color=color, linewidth=1.4, zorder=2, clip_on=False)
    look: dict[str, Any] = {"color": style.INK, "linestyle": "none", "zorder": 3, "clip_on": False}
    ax.plot(found.half / n, found.cumulative[found.half - 1], marker="s", markersize=4.2, **look)
    ax.plot(found.top / n, found.top_share, marker="o", markersize=4.6, markerfacecolor=style.PAPER, **look)
    return f"half in {found.half} of {n}\ntop 1 % ({found.top}): {style.percent(found.top_share)}"


def _name_axes(ax: Axes, least: float) -> None:
    """The shared axes of all panels."""
    ax.set(xscale="log", xlim=(min(least, 0.1), 1.0), ylim=(0.0, 1.0))
    ax.xaxis.set_major_locator(LogLocator(numticks=4))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g}"))
    ax.set_yticks([0.0, 0.5, 1.0], ["0", "50", "100"])


def _key(figure: Figure, title: str) -> None:
    point: dict[str, Any] = {"linestyle": "none", "color": style.INK, "markersize": 4.6}
    handles = [
        Line2D([], [], color=_HURT, linewidth=1.4),
        Line2D([], [], color=_HELPED, linewidth=1.4),
        Line2D([], [], marker="s", **point),
        Line2D([], [], marker="o", markerfacecolor=style.PAPER, **point),
        Line2D([], [], color=style.MUTED, linestyle=":", linewidth=1.0),
    ]
    labels = ["channels hurt on the whole", "channels help on the whole"]
    labels += ["fewest that carry half", "top 1 % of channels", "all channels alike"]
    place: dict[str, Any] = {"loc": "outside upper center", "columnspacing": 1.4, "handletextpad": 0.5}
    figure.legend(handles, labels, title=title, title_fontsize=8.5, ncols=3, **place)
