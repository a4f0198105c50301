"""The scoreboard: how well each predictor did, beside what chance and perfection would give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerLine2D
from matplotlib.lines import Line2D

from figures import style
from figures.data import quantity


class Metric(NamedTuple):
    """A panel of a scoreboard: what is drawn, its axis, and the levels of chance and perfection."""

    key: str
    title: str
    low: float
    high: float
    ticks: tuple[float, ...]
    chance: float | None
    ideal: float
    ideal_style: str = "-"


_METRICS = (
    Metric("spearman", "Spearman", -1, 1, (-1, 0, 1), 0.0, 1.0),
    Metric("pearson", "Pearson", -1, 1, (-1, 0, 1), 0.0, 1.0),
    Metric("sign_accuracy", "right sign", 0, 1, (0, 0.5, 1), 0.5, 1.0),
    Metric("slope", "slope", 0, 2, (0, 1, 2), None, 1.0),
    Metric("r2", "R²", -1, 1, (-1, 0, 1), 0.0, 1.0),
    Metric("coverage", "coverage\n(sampling)", 0, 1, (0, 0.5, 0.9), None, 0.9),
    Metric("coverage_truncation", "coverage\n(truncation)", 0, 1, (0, 0.5, 0.9), None, 0.9),
)
_CAP = 12.0
"""Points; taller than any marker, so that a narrow interval still shows."""

_OURS_ONLY = ("slope", "coverage", "coverage_truncation")


@style.styled
def predictor_scoreboard(results: Mapping[str, Any], objective: str, cells: str = "off_diagonal") -> Figure:
    """One row per predictor, one panel per metric, with the level of chance (dotted) and the ideal (solid line).

    Filled markers are this package's predictors, open diamonds the baselines. Where the record has Spearman's 90 %
    bootstrap interval, two caps taller than the marker are its ends. An arrow at the edge is a value beyond it. Coverage
    is that of intervals of sampling noise, and where the record has it of intervals that hold both sampling noise and the
    predicted truncation. Baselines have no unit of change and no such interval, so neither slope nor
    coverage is drawn for them; their R2 is that of a line fitted to the other cells (leave one out).

    `cells` is "off_diagonal" (where there are such scores) or "all"; for the rest see `figures.data.read`.
    """
    quantity(results, objective)
    cards = results.get("scorecards", {}).get(objective, {})
    card: Mapping[str, Mapping[str, Any]] = cards.get(cells) or cards.get("all") or {}
    names = [n for n in style.PREDICTORS if n in card] + [n for n in card if n not in style.PREDICTORS]
    if not names:
        figure = style.new_figure(1.0)
        figure.text(0.5, 0.5, "nothing was measured, so nothing is scored", ha="center", va="center")
        return figure
    metrics = [
        m for m in _METRICS if m.key != "coverage_truncation" or any(card[n].get(m.key) is not None for n in names)
    ]
    return board({name: card[name] for name in names}, metrics, unitless_blank=_OURS_ONLY)


def board(
    card: Mapping[str, Mapping[str, Any]], metrics: Sequence[Metric], *, unitless_blank: Sequence[str] = ()
) -> Figure:
    """Rows of predictors, panels of metrics, without the page's style; those in `unitless_blank` are not drawn of baselines.

    card: {predictor: {metric: value or None, metric_low, metric_high: ends of its interval}}, in the order of the rows.
    """
    names = list(card)
    figure = style.new_figure(0.29 * len(names) + 1.4)
    axes = figure.subplots(1, len(metrics), sharey=True)
    ours = sum(style.predictor(n).ours for n in names)
    for ax, metric in zip(axes, metrics, strict=True):
        _frame(ax, metric, len(names))
        if 0 < ours < len(names):
            ax.axhline(ours - 0.5, color=style.FAINT, linewidth=0.7)
        for place, name in enumerate(names):
            if metric.key not in unitless_blank or style.predictor(name).ours:
                _point(ax, metric, place, name, card[name])
    axes[0].set_yticks(range(len(names)), [style.predictor(n).label for n in names])
    bars = any(_interval(card[name], m) is not None for name in names for m in metrics)
    _key(figure, baselines=ours < len(names), bars=bars)
    return figure


def _frame(ax: Axes, metric: Metric, rows: int) -> None:
    pad = 0.12 * (metric.high - metric.low)
    ax.set(xlim=(metric.low - pad, metric.high + pad), ylim=(rows - 0.5, -0.5))
    ax.set_title(metric.title)
    ax.set_xticks(metric.ticks, [f"{t:g}".replace("-", "−") for t in metric.ticks])
    ax.tick_params(axis="y", length=0)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    ax.axvline(metric.ideal, color=style.MUTED, linewidth=0.9, zorder=1)
    if metric.chance is not None:
        ax.axvline(metric.chance, color=style.MUTED, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    for row in range(rows):
        ax.axhline(row, color="#efefef", linewidth=0.6, zorder=0)


def _point(ax: Axes, metric: Metric, place: int, name: str, card: Mapping[str, Any]) -> None:
    value = card.get(metric.key)
    if value is None:
        ax.text(0.5 * (metric.low + metric.high), place, "–", ha="center", va="center", color=style.MUTED)
        return
    look = style.predictor(name)
    face = look.color if look.ours else style.PAPER
    ends = _interval(card, metric)
    if ends is not None:
        caps: dict[str, Any] = {"marker": "|", "markersize": _CAP, "markeredgewidth": 1.1, "clip_on": False}
        ax.plot(ends, [place, place], color=look.color, linewidth=1.3, solid_capstyle="butt", zorder=2, **caps)
    shown = min(max(float(value), metric.low), metric.high)
    marker = look.marker if shown == value else ("<" if shown > value else ">")
    ax.plot(shown, place, marker, color=look.color, markerfacecolor=face, markersize=5.5, zorder=3, clip_on=False)


def _interval(card: Mapping[str, Any], metric: Metric) -> tuple[float, float] | None:
    """Ends of the metric's interval, within the axis; None where the record has none."""
    low, high = card.get(f"{metric.key}_low"), card.get(f"{metric.key}_high")
    if low is None or high is None:
        return None
    return min(max(float(low), metric.low), metric.high), min(max(float(high), metric.low), metric.high)


def _key(figure: Figure, *, baselines: bool, bars: bool) -> None:
    def mark(marker: str, *, filled: bool) -> Line2D:
        face = style.INK if filled else style.PAPER
        color = style.INK if filled else style.MUTED
        return Line2D([], [], linestyle="none", marker=marker, color=color, markerfacecolor=face, markersize=5.5)

    handles, labels = [mark("o", filled=True)], ["predictions in the objective's unit"]
    if baselines:
        handles.append(mark("D", filled=False))
        labels.append("baselines")
    ends: dict[Any, Any] = {}
    if bars:
        handles.append(Line2D([], [], color=style.INK, linewidth=1.3, marker="|", markersize=_CAP))
        labels.append("90 % interval")
        ends[handles[-1]] = HandlerLine2D(numpoints=2)
    handles += [
        Line2D([], [], color=style.MUTED, linewidth=0.9, linestyle=(0, (1, 2))),
        Line2D([], [], color=style.MUTED, linewidth=0.9),
        mark(">", filled=False),
    ]
    labels += ["chance", "ideal", "beyond the axis"]
    look: dict[str, Any] = {"columnspacing": 1.3, "handletextpad": 0.5, "handler_map": ends}
    figure.legend(handles, labels, loc="outside lower center", ncols=3 if bars else 5, **look)
