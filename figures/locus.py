"""Where a judge sees a wrong response fail, against the step where it went wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures import style
from figures.pairs import nothing
from figures.policies import Look, domains_of, looks

_LARGEST = 11.0
"""Diameter in points of the largest bubble."""


@style.styled
def locus_of_error(locus: pd.DataFrame, results: Mapping[str, Any]) -> Figure:
    """Bubbles of the judge's locus (up) by the true step (across): rows judges, columns domains.

    The area is the share of the panel's responses. On the line the judge sees the error where it is; above it, late; the top row
    holds responses that it takes for right to the end. Filled bubbles are on the line. Below each title: how the true step is
    known, planted or estimated by rollouts from prefixes, and the number of responses.

    Args:
        locus: `Run.probe("locus")`.
        results: `Run.results`.
    """
    rows = locus[pd.to_numeric(locus["step"], errors="coerce").notna()]
    known = looks(results)
    judges = [m for m in known if (rows["model"] == m).any()]
    domains = [d for d in domains_of(results) if (rows["domain"] == d).any()]
    if not judges or not domains:
        return nothing("no error was located")
    most = {d: int(rows.loc[rows["domain"] == d, "steps"].max()) for d in domains}
    figure = style.new_figure(
        (1.35 if len(judges) <= 4 else 1.15) * len(judges) + 1.0, max(style.WIDTH, 1.3 * len(domains) + 0.9)
    )
    axes = figure.subplots(len(judges), len(domains), squeeze=False, sharex="col", sharey="col")
    for i, model in enumerate(judges):
        for j, domain in enumerate(domains):
            part = rows[(rows["model"] == model) & (rows["domain"] == domain)]
            ax = axes[i, j]
            _frame(ax, most[domain])
            _bubbles(ax, part, most[domain], known[model])
            about = f"{part['source'].iloc[0]}, n = {len(part)}" if len(part) else "none wrong"
            ax.set_title((style.shorten(domain, 14) + "\n" if i == 0 else "") + about, fontsize=8)
        axes[i, 0].set_ylabel(style.shorten(model, 16), fontsize=8.5)
    figure.supxlabel("step where the response went wrong", fontsize=8.5)
    figure.supylabel("step from which the judge holds it for wrong", fontsize=8.5)
    _key(figure)
    return figure


def _frame(ax: Axes, steps: int) -> None:
    ax.plot([0.5, steps + 0.5], [0.5, steps + 0.5], color=style.MUTED, linewidth=0.8, zorder=0)
    ax.axhline(steps + 0.75, color=style.FAINT, linewidth=0.7, zorder=0)
    ax.set(xlim=(0.3, steps + 0.7), ylim=(0.3, steps + 1.9))
    every = max(1, -(-steps // 5))
    ticks = list(range(1, steps + 1, every))
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.set_yticks([*ticks, steps + 1.3], [*(str(t) for t in ticks), "never"])


def _bubbles(ax: Axes, part: pd.DataFrame, steps: int, look: Look) -> None:
    if part.empty:
        return
    never = steps + 1.3
    pairs = part.assign(height=pd.to_numeric(part["locus"], errors="coerce").fillna(never).astype(float))
    counts = pairs.groupby(["step", "height"], sort=True).size().reset_index(name="count")
    for step, height, count in counts.to_numpy(float).tolist():
        size = _LARGEST * float(np.sqrt(count / len(part)))
        face = look.color if step == height else style.PAPER
        ax.plot(step, height, "o", markersize=max(size, 1.6), color=look.color, markerfacecolor=face, zorder=2)


def _key(figure: Figure) -> None:
    dot: dict[str, Any] = {"linestyle": "none", "marker": "o", "color": style.INK}
    handles = [
        Line2D([], [], markersize=5, **dot), Line2D([], [], markersize=5, markerfacecolor=style.PAPER, **dot),
        Line2D([], [], markersize=_LARGEST * 0.5**0.5, markerfacecolor=style.PAPER, **dot),
        Line2D([], [], markersize=_LARGEST * 0.1**0.5, markerfacecolor=style.PAPER, **dot),
        Line2D([], [], color=style.MUTED, linewidth=0.8),
    ]  # fmt: skip
    labels = ["seen at its step", "elsewhere", "50 % of the responses", "10 %", "the two agree"]
    figure.legend(handles, labels, loc="outside upper center", ncols=5, columnspacing=1.3, handletextpad=0.5)
