"""Policy neighborhoods: how far policies are apart on each domain's prompts, beside what they score there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerPatch
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Polygon, Rectangle

from figures import squares, style
from figures.pairs import models_of, nothing
from figures.policies import BASE, domains_of

ESTIMATORS = ("exact", "k3", "k1")
"""Of the divergence, the one with the least noise first."""

_SAID = {"exact": "summed over the vocabulary", "k3": "by k3", "k1": "by k1"}

_SIDE_BY_SIDE = 5
"""Most domains for which two panels fit beside each other at page width."""

Pairs = Mapping[tuple[str, str], Mapping[Any, Any]]


class _Panel(NamedTuple):
    title: str
    rows: Pairs  # {(policy, domain): row}
    value: str
    neighbors: Mapping[tuple[str, str], bool]  # {(expert, domain): certain}
    cmap: Colormap
    norm: Normalize
    divisor: float
    decimals: int | None  # None: two significant digits


def best_estimates(kl: pd.DataFrame) -> pd.DataFrame:
    """The rows of `Run.probe("kl")` by the estimator with the least noise that each cell has.

    A cell is a policy, a reference and a domain: where log-probabilities were given it has no exact divergence, others may.
    """
    rank = kl["estimator"].map({name: k for k, name in enumerate(ESTIMATORS)})
    least = rank.groupby([kl[name] for name in ("policy", "reference", "domain", "per")]).transform("min")
    return kl[rank == least]


@style.styled
def divergence_matrix(kl: pd.DataFrame, neighbors: pd.DataFrame, results: Mapping[str, Any]) -> Figure:
    """Matrices of KL(policy || reference) per token beside the policies' change of mean reward: rows policies, columns domains.

    One panel for every multi-task or merged model and for the base as the reference, and one for the change of reward from the
    base. Divergences share one logarithmic scale; hatched are those that the sampled tokens alone cannot tell from none (k1
    within its 90 % noise), and changes of reward within theirs. Each is by the estimator with the least noise that its cell has;
    a star marks those by another one than most. A corner marks an expert that is a neighbor of the domain: nearer
    to the reference on its prompts than the domain's own expert (or than eps, where one was given); hollow where noise could
    have made it. A domain's own expert is outlined.

    Args:
        kl: `Run.probe("kl")`.
        neighbors: `Run.probe("neighbors")`.
        results: `Run.results`.
    """
    models, domains = models_of(results), domains_of(results)
    tokens = kl[(kl["per"] == "token") & kl["policy"].isin(models)]
    if tokens.empty or not domains:
        return nothing("no divergences were recorded")
    panels = _panels(tokens, neighbors, models, _kinds(results))
    beside = len(domains) <= _SIDE_BY_SIDE and len(panels) > 1
    figure, axes = _frame(len(panels), len(models), len(domains), 2 if beside else 1)
    lean = max(len(style.shorten(d, 14)) for d in domains) > (8 if beside else 12)
    for k, (ax, panel) in enumerate(zip(axes, panels, strict=True)):
        _draw(ax, panel, models, domains)
        ax.set_title(panel.title, fontweight="bold", pad=6)
        _name_axes(ax, models if not beside or k % 2 == 0 else [], domains, lean)
    _bars(figure, axes, panels)
    _key(figure, panels, bool(set(models) & set(domains)))
    figure.draw_without_rendering()  # names on top and a fixed cell shape need two passes; the next draw is the second
    return figure


def _kinds(results: Mapping[str, Any]) -> dict[str, str]:
    return {str(name): str(kind) for name, kind in (results.get("kinds") or {}).items()}


def _panels(
    tokens: pd.DataFrame, neighbors: pd.DataFrame, models: Sequence[str], kinds: Mapping[str, str]
) -> list[_Panel]:
    """The first reference, the change of reward beside it, then the other references, the base last."""
    best, signed = best_estimates(tokens), tokens[tokens["estimator"] == "k1"]
    references = [m for m in models if kinds.get(m) in ("multi", "merged")] + [BASE]
    shown = best[best["reference"].isin(references)]
    starred = shown["estimator"] != _usual(shown)
    shown = shown.assign(starred=starred)
    values = shown["value"].to_numpy(float)
    power, _ = style.scale_of(values.tolist())
    norm = _log_norm(values)
    sure = {
        (str(r["reference"]), str(r["policy"]), str(r["domain"])): r["low"] > 0 or not np.isfinite(r["low"])
        for r in signed.to_dict("records")
    }
    out = []
    for reference in references:
        rows = {
            (str(r["policy"]), str(r["domain"])): {
                **r,
                "sure": sure.get((reference, str(r["policy"]), str(r["domain"])), True),
            }
            for r in shown[shown["reference"] == reference].to_dict("records")
        }
        near = neighbors[(neighbors["reference"] == reference) & neighbors["neighbor"].eq(True)]
        marks = {(str(r["expert"]), str(r["domain"])): bool(r["certain"]) for r in near.to_dict("records")}
        title = f"KL(row ‖ {style.shorten(reference, 16)})"
        out.append(_Panel(title, rows, "value", marks, style.share_colours(), norm, 10.0**power, None))
    change = _change(best)
    return [out[0], *([change] if change else []), *out[1:]]


def _usual(shown: pd.DataFrame) -> str:
    """The estimator of most cells, the one with less noise where two have as many."""
    return max(ESTIMATORS, key=lambda name: int((shown["estimator"] == name).sum()))


def _log_norm(values: Any) -> LogNorm:
    """From the smallest to the largest divergence, over at least one and at most three orders of magnitude."""
    positive = values[np.isfinite(values) & (values > 0)]
    high = float(positive.max(initial=0.0)) or 1.0
    low = max(min(float(positive.min(initial=high)), high / 10), high / 1000)
    return LogNorm(low, high, clip=True)


def _change(best: pd.DataFrame) -> _Panel | None:
    known = best[best["change"].notna()].drop_duplicates(["policy", "domain"])
    if known.empty:
        return None
    errors = known["change_stderr"].astype(float)
    limit = max(float(known["change"].abs().max()), 3 * float(errors.median()) if errors.notna().any() else 0.0) or 1.0
    power, decimals = style.scale_of(known["change"].tolist(), errors.tolist())
    rows = {
        (str(r["policy"]), str(r["domain"])): {**r, "sure": r["change_low"] > 0 or r["change_high"] < 0}
        for r in known.to_dict("records")
    }
    norm = Normalize(-limit, limit)
    return _Panel(
        "change of reward", rows, "change", {}, style.diverging("higher"), norm, 10.0**power, min(decimals, 2)
    )


def _frame(panels: int, rows: int, columns: int, across: int) -> tuple[Figure, list[Axes]]:
    room = 1.3  # inches for the names of the rows
    width = max(style.WIDTH, 0.55 * columns * across + room)
    cell = min(0.95, (width - room - 0.2) / (columns * across))
    tall = max(0.36, 0.42 * cell)
    down = -(-panels // across)
    figure = style.new_figure(down * (rows * tall + 0.8) + 1.75, width, layout="compressed")
    figure.get_layout_engine().set(h_pad=0.09)  # type: ignore[union-attr, call-arg]  # inches; a title stands above each panel
    axes = list(figure.subplots(down, across, squeeze=False).ravel())
    for ax in axes:
        ax.set(xlim=(0, columns), ylim=(rows, 0), aspect=tall / cell)
    for ax in axes[panels:]:
        ax.set_axis_off()
    return figure, axes[:panels]


def _draw(ax: Axes, panel: _Panel, models: Sequence[str], domains: Sequence[str]) -> None:
    for y, model in enumerate(models):
        for x, domain in enumerate(domains):
            row = panel.rows.get((model, domain))
            value = float(row[panel.value]) if row is not None else float("nan")
            known = bool(np.isfinite(value))
            fill = tuple(map(float, panel.cmap(panel.norm(value))[:3])) if known else to_rgb("#ededed")
            hatched = known and row is not None and not row["sure"]
            squares.square(ax, x, y, fill, hatched=hatched)
            if model == domain:
                ax.add_patch(
                    Rectangle((x + 0.03, y + 0.04), 0.94, 0.92, fill=False, edgecolor=style.INK, linewidth=1.3)
                )
            if (model, domain) in panel.neighbors:
                ax.add_patch(_corner(x, y, filled=panel.neighbors[model, domain]))
            star = "*" if known and row is not None and row.get("starred") else ""
            squares.write(ax, x, y, _words(value / panel.divisor, panel.decimals) + star, fill, hatched=hatched)
    squares.bare(ax)


def _corner(x: float, y: float, *, filled: bool, width: float = 0.2, height: float = 0.4) -> Polygon:
    points = [(x + 0.98 - width, y + 0.02), (x + 0.98, y + 0.02), (x + 0.98, y + 0.02 + height)]
    return Polygon(
        points,
        closed=True,
        facecolor=style.INK if filled else style.PAPER,
        edgecolor=style.INK,
        linewidth=0.9,
        zorder=2,
    )


def _words(value: float, decimals: int | None) -> str:
    if not np.isfinite(value):
        return "–"
    if decimals is not None:
        return style.signed(value, decimals)
    return "< 0.001" if 0 < abs(value) < 0.001 else _two_digits(value)


def _two_digits(value: float) -> str:
    rounded = float(f"{value:.1e}")  # 0.0999 has the digits of 0.10
    digits = 1 - int(np.floor(np.log10(abs(rounded)))) if rounded else 0
    return style.plain(value, max(0, digits))


def _name_axes(ax: Axes, models: Sequence[str], domains: Sequence[str], lean: bool) -> None:
    ax.set_xticks(np.arange(len(domains)) + 0.5, [style.shorten(name, 14) for name in domains])
    ax.xaxis.tick_top()
    if lean:
        for tick in ax.get_xticklabels():
            tick.set(rotation=30, ha="left", va="bottom", rotation_mode="anchor")
    ax.set_yticks(np.arange(len(models)) + 0.5, [style.shorten(name, 16) for name in models] if models else [])
    if not models:
        ax.set_yticks([])


def _bars(figure: Figure, axes: Sequence[Axes], panels: Sequence[_Panel]) -> None:
    first = panels[0]
    low, high = float(first.norm.vmin or 0.0), float(first.norm.vmax or 1.0)
    marks = {m: _two_digits(m / first.divisor) for m in np.geomspace(low, high, 4).tolist()}
    bar = style.colour_bar(figure, axes, ScalarMappable(first.norm, first.cmap), marks, False, 0.03)
    bar.ax.minorticks_off()
    unit = style.times_power(round(np.log10(first.divisor)))
    bar.set_label(f"KL, row's policy from the reference, on the column's prompts ({unit}nats per token; log scale)")
    for panel in panels:
        if panel.value == "change":
            end = float(panel.norm.vmax or 1.0)
            named = {m: style.signed(m / panel.divisor, panel.decimals or 0) for m in (-end, 0.0, end)}
            bar = style.colour_bar(figure, axes, ScalarMappable(panel.norm, panel.cmap), named, False, 0.03)
            unit = style.times_power(round(np.log10(panel.divisor)))
            bar.set_label(f"change of the mean reward from the base ({unit}reward): blue helped, orange hurt")


def _key(figure: Figure, panels: Sequence[_Panel], own: bool) -> None:
    handles: list[Any] = [squares.in_key()]
    labels = ["not beyond its own 90 % noise"]
    special: dict[Any, Any] = {}
    if own:
        handles.insert(0, Patch(facecolor="none", edgecolor=style.INK, linewidth=1.3))
        labels.insert(0, "the domain's own expert")
    certain = {sure for panel in panels for sure in panel.neighbors.values()}
    for sure, words in ((True, "neighbor of the domain, beyond noise"), (False, "neighbor, perhaps by noise")):
        if sure in certain:
            handles.append(Patch(facecolor=style.INK if sure else style.PAPER, edgecolor=style.INK))
            labels.append(words)
            special[handles[-1]] = HandlerPatch(patch_func=_corner_in_key)
    rows = [row for panel in panels if panel.value == "value" for row in panel.rows.values()]
    if any(row["starred"] for row in rows):
        usual, other = (
            " or ".join(
                _SAID[name] for name in ESTIMATORS if any((r["estimator"], r["starred"]) == (name, mark) for r in rows)
            )
            for mark in (False, True)
        )
        handles.append(Line2D([], [], linestyle="none", marker=(5, 2, 0), color=style.INK))
        labels.append(f"{other}, the others {usual}")
    figure.legend(
        handles, labels, loc="outside lower center", handler_map=special, ncols=2, handlelength=1.6, columnspacing=1.6
    )


def _corner_in_key(xdescent: float, ydescent: float, width: float, height: float, **_: object) -> Polygon:
    right, top = width - xdescent, height - ydescent
    return Polygon([(right - height, top), (right, top), (right, top - height)], closed=True)
