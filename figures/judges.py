"""How well models judge their own responses: the answer alone against the whole, and by how much of the response they see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from figures import panels, style
from figures.pairs import models_of, nothing
from figures.policies import BASE, Look, domains_of, key, looks

SCORES = {"balanced_accuracy": "balanced accuracy", "auroc": "AUROC", "within_prompt_auroc": "AUROC within prompts"}
"""Scores that the figures can show; chance is 0.5 for all, whatever the share of correct responses."""

CHANCE = 0.5


@style.styled
def outcome_against_process(
    verification: pd.DataFrame, results: Mapping[str, Any], metric: str = "balanced_accuracy"
) -> Figure:
    """Each judge's score from the final answer alone (across) against that from the whole response (up), a panel a domain.

    The hollow point is the base before RL, the others are models after it, joined to it by thin lines; bars are 90 % intervals
    over prompts. Dashed lines are chance. Above the diagonal the reasoning helps the judge. A model whose responses are all
    correct, or all wrong, cannot be scored and has no point.

    Args:
        verification: `Run.probe("verification")`.
        results: `Run.results`.
        metric: one of `SCORES`.
    """
    rows = verification[verification["metric"] == metric]
    found = {(str(r["model"]), str(r["domain"]), str(r["mode"])): r for r in rows.to_dict("records")}
    known = looks(results)
    domains = [d for d in domains_of(results) if any((m, d, "process") in found for m in known)]
    if not domains or not any(mode == "outcome" for _, _, mode in found):
        return nothing("outcome and process mode were not both judged")
    figure, places = panels.wrapped(len(domains), tall=1.75, wide=1.6, extra=1.1)
    low, high = _range(rows)
    for place, domain in zip(places, domains, strict=True):
        ax = place.ax
        ax.set_title(style.shorten(domain, 18))
        ax.plot([low, high], [low, high], color=style.FAINT, linewidth=0.9, zorder=0)
        for line in (ax.axhline, ax.axvline):
            line(CHANCE, color=style.MUTED, linewidth=0.8, linestyle="--", zorder=1)
        ends = {m: _both(found, m, domain) for m in known}
        start = ends[BASE]
        for name, look in known.items():
            end = ends[name]
            if end is None:
                continue
            if start is not None and name != BASE:
                ax.plot(
                    [start[0][0], end[0][0]],
                    [start[1][0], end[1][0]],
                    color=look.color,
                    linewidth=0.6,
                    alpha=0.6,
                    zorder=2,
                )
            _point(ax, end, look)
        ax.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        ax.locator_params(nbins=4)
        if not any(end is not None for end in ends.values()):
            ax.text(0.5, 0.5, "cannot be scored", transform=ax.transAxes, ha="center", va="center", color=style.MUTED)
    figure.supxlabel(f"outcome mode: {SCORES[metric]} from the final answer alone", fontsize=8.5)
    figure.supylabel(f"process mode: {SCORES[metric]}\nfrom the whole response", fontsize=8.5, multialignment="center")
    names = [m for m in known if any(_both(found, m, d) for d in domains)]
    key(figure, known, names, [(Line2D([], [], color=style.MUTED, linestyle="--", linewidth=0.8), "chance")], columns=6)
    return figure


Estimate = tuple[float, float, float]


def _both(found: Mapping[tuple[str, str, str], Any], model: str, domain: str) -> tuple[Estimate, Estimate] | None:
    """Value, low and high in outcome and in process mode; None where one has no value."""
    several = [found.get((model, domain, mode)) for mode in ("outcome", "process")]
    known = [tuple(float(r[name]) for name in ("value", "low", "high")) for r in several if r is not None]
    if len(known) < 2 or not np.isfinite([k[0] for k in known]).all():
        return None
    return known[0], known[1]  # type: ignore[return-value]


def _range(rows: pd.DataFrame) -> tuple[float, float]:
    values = rows[["value", "low", "high"]].to_numpy(float)
    values = values[np.isfinite(values)]
    low = min(0.4, float(values.min(initial=0.4)))
    high = max(0.6, float(values.max(initial=0.6)))
    pad = 0.04 * (high - low)
    return low - pad, high + pad


def _point(ax: Axes, end: tuple[Estimate, Estimate], look: Look) -> None:
    (x, *across), (y, *up) = end
    bars: dict[str, Any] = {
        name: [[value - ends[0]], [ends[1] - value]]
        for name, value, ends in (("xerr", x, across), ("yerr", y, up))
        if np.isfinite(ends).all()
    }
    ax.errorbar(x, y, elinewidth=0.7, zorder=3, **bars, **look.point)


@style.styled
def horizon_curve(horizon: pd.DataFrame, results: Mapping[str, Any], metric: str = "auroc") -> Figure:
    """A judge's score by the share of the response that it sees: rows tuned models, columns domains, the base in every panel.

    The dashed grey line is the base on its own responses, the other the model on its own, with 90 % bands over prompts; the
    dashed level is chance. A filled point lies above chance beyond noise, a triangle below. A domain's own expert is framed.

    Args:
        horizon: `Run.probe("horizon")`.
        results: `Run.results`.
        metric: one of `SCORES`.
    """
    rows = horizon[horizon["metric"] == metric]
    curves = {
        (str(m), str(d)): part.sort_values("horizon") for (m, d), part in rows.groupby(["model", "domain"], sort=False)
    }
    domains = [d for d in domains_of(results) if any(d == name for _, name in curves)]
    models = [m for m in models_of(results) if any(m == name for name, _ in curves)]
    if not domains:
        return nothing("no horizon was recorded")
    shown, known = models or [BASE], looks(results)
    tall = 1.0 if len(shown) > 2 else 1.6
    figure = style.new_figure(tall * len(shown) + 1.2, max(style.WIDTH, 1.3 * len(domains) + 0.9))
    axes = figure.subplots(len(shown), len(domains), squeeze=False, sharex=True, sharey=True)
    unit = str(rows["unit"].iloc[0])
    for i, model in enumerate(shown):
        for j, domain in enumerate(domains):
            ax = axes[i, j]
            ax.axhline(CHANCE, color=style.MUTED, linewidth=0.8, linestyle=":", zorder=0)
            for name in dict.fromkeys((BASE, model)):
                if (name, domain) in curves:
                    _curve(ax, curves[name, domain], known[name])
            if model == domain:
                for spine in ax.spines.values():
                    spine.set(visible=True, edgecolor=style.INK, linewidth=1.2)
            if i == 0:
                ax.set_title(style.shorten(domain, 16))
        axes[i, 0].set_ylabel(style.shorten(model, min(16, int(14 * tall))), fontsize=8.5)
    axes[0, 0].set_ylim(*_range(rows))
    axes[0, 0].locator_params(axis="y", nbins=4)
    if unit == "fraction":
        axes[0, 0].set_xticks([0, 0.5, 1], ["0", "½", "1"])
    words = (
        "share of the response that the judge sees"
        if unit == "fraction"
        else "tokens of the response that the judge sees"
    )
    figure.supxlabel(words, fontsize=8.5)
    figure.supylabel(f"{SCORES[metric]} (rows: the judge)", fontsize=8.5)
    _horizon_key(figure, known, bool(set(models) & set(domains)))
    return figure


def _curve(ax: Axes, rows: pd.DataFrame, look: Look) -> None:
    x, value, low, high = (rows[name].to_numpy(float) for name in ("horizon", "value", "low", "high"))
    banded = np.isfinite(low) & np.isfinite(high)
    ax.fill_between(x, low, high, where=banded, color=look.color, alpha=0.16, linewidth=0, zorder=1)
    line = "--" if look.hollow else "-"
    ax.plot(x, value, color=look.color, linestyle=line, linewidth=1.3, zorder=2)
    above, below = low > CHANCE, high < CHANCE
    for part, face, marker in (
        (above, look.color, "o"),
        (~above & ~below, style.PAPER, "o"),
        (below, style.PAPER, "v"),
    ):
        ax.plot(
            x[part],
            value[part],
            linestyle="none",
            marker=marker,
            markersize=3.6,
            color=look.color,
            markerfacecolor=face,
            zorder=3,
        )


def _horizon_key(figure: Figure, known: Mapping[str, Look], framed: bool) -> None:
    dot: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 4, "color": style.INK}
    handles: list[Any] = [
        Line2D([], [], color=known[BASE].color, linestyle="--", linewidth=1.3),
        Line2D([], [], color=style.INK, linewidth=1.3),
        Patch(facecolor=style.INK, alpha=0.16),
        Line2D([], [], color=style.MUTED, linestyle=":", linewidth=0.8),
        Line2D([], [], **dot),
        Line2D([], [], markerfacecolor=style.PAPER, **dot),
        Line2D([], [], markerfacecolor=style.PAPER, **dot | {"marker": "v"}),
    ]
    labels = [
        "base (before RL)",
        "the row's model (after)",
        "90 % band",
        "chance",
        "above chance",
        "not beyond noise",
        "below chance",
    ]
    if framed:
        handles.append(Patch(facecolor="none", edgecolor=style.INK, linewidth=1.2))
        labels.append("the domain's own expert")
    figure.legend(handles, labels, loc="outside upper center", ncols=4, columnspacing=1.3, handletextpad=0.5)
