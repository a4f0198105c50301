"""Whether two domains pull a module the same way: gradient cosines of every module and layer beside the whole model's."""

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
from figures.pairs import nothing
from figures.policies import domains_of
from interference.records import MODULES

_NULL = "#dcdcdc"
_WHOLE = "whole model"


def certain(table: pd.DataFrame) -> pd.Series:
    """Which rows of `Run.probe("gradient_agreement")` are beyond noise: the cosine is larger than the floor, and all four
    cosines between a half of one domain and a half of the other have its sign."""
    floor = table["cosine"].astype(float).abs() > table["noise_floor"].astype(float)
    signs = (table["lowest"].astype(float) > 0) | (table["highest"].astype(float) < 0)
    mask: pd.Series = floor & signs
    return mask


@style.styled
def gradient_cosine(agreement: pd.DataFrame, results: Mapping[str, Any]) -> Figure:
    """Cosine of two domains' gradients, of the whole model and of each module in each layer: a panel a pair.

    A dot is a module of one layer, the diamond the whole model. Teal pulls the same way, purple against each other, beyond
    noise (`certain`); a hollow one is not beyond noise. The grey bar is the noise floor: 90 % of what noise alone gives that
    module, over all layers and pairs.

    Args:
        agreement: `Run.probe("gradient_agreement")`.
        results: `Run.results`.
    """
    order = {name: k for k, name in enumerate(domains_of(results))}
    pairs = sorted(
        {(str(a), str(b)) for a, b in zip(agreement["a"], agreement["b"], strict=True)},
        key=lambda p: [order.get(n, 99) for n in p],
    )
    if not pairs:
        return nothing("no gradients were compared")
    table = agreement.assign(certain=certain(agreement))
    parts = table[table["scope"] == "part"]
    found = {str(module) for module in parts["module"]}
    modules = [module for module in MODULES if module in found] + sorted(found - set(MODULES))
    places = {module: place + 1.6 for place, module in enumerate(modules)}
    figure, shown = panels.wrapped(len(pairs), tall=0.17 * len(modules) + 0.8, wide=1.6, extra=0.85)
    limit = _reach(table)
    for place, (a, b) in zip(shown, pairs, strict=True):
        here = table[(table["a"] == a) & (table["b"] == b)]
        _rows(place.ax, here[here["scope"] == "part"], places, "o")
        _rows(place.ax, here[here["scope"] == "model"], {"all": 0.0}, "D")
        _frame(place.ax, {_WHOLE: 0.0, **places}, limit)
        place.ax.set_title(_title(a, b), fontsize=8.5, pad=3)
        place.ax.tick_params(labelbottom=place.last, labelleft=place.first)
    objective = {"reward": "policy gradients", "nll": "gradients of the loss"}
    named = objective.get(str(agreement["objective"].iloc[0]), "gradients")
    figure.supxlabel(f"cosine of the two domains' {named} at the base (no unit)", fontsize=8.5)
    _key(figure)
    return figure


def _title(a: str, b: str) -> str:
    """Both names, on one line where they are short."""
    names = style.shorten(a, 18), style.shorten(b, 18)
    return " – ".join(names) if sum(map(len, names)) <= 22 else "\nand ".join(names)


def _rows(ax: Axes, rows: pd.DataFrame, places: Mapping[str, float], marker: str) -> None:
    for module, group in rows.groupby("module", sort=False, observed=True):
        y = places[str(module)]
        floor = float(group["noise_floor"].iloc[0])
        if np.isfinite(floor):
            ax.plot([-floor, floor], [y, y], color=_NULL, linewidth=7, solid_capstyle="butt", zorder=1)
        values, sure = group["cosine"].to_numpy(float), group["certain"].to_numpy(bool)
        for color, wanted in ((style.SAME, values > 0), (style.OPPOSITE, values <= 0)):
            for full, chosen in ((False, wanted & ~sure), (True, wanted & sure)):
                look: dict[str, Any] = {"color": color, "markerfacecolor": color if full else style.PAPER}
                look |= {"markersize": 4.6 if marker == "D" else 3.8, "markeredgewidth": 0.9, "linestyle": "none"}
                if chosen.any():
                    x = values[chosen]
                    ax.plot(x, np.full(len(x), y), marker=marker, zorder=3 + full, clip_on=False, **look)


def _reach(table: pd.DataFrame) -> float:
    shown = table[table["scope"].isin(["part", "model"])]
    values = np.abs(shown[["cosine", "noise_floor"]].to_numpy(float))
    largest = float(values[np.isfinite(values)].max(initial=0.0))
    return next(end for end in (0.1, 0.2, 0.5, 1.0) if largest <= end or end == 1.0)


def _frame(ax: Axes, places: Mapping[str, float], limit: float) -> None:
    ax.set(xlim=(-1.05 * limit, 1.05 * limit), ylim=(max(places.values()) + 0.6, -0.6))
    ax.set_xticks([-limit, 0.0, limit], [f"−{limit:g}", "0", f"{limit:g}"])
    ax.set_yticks(list(places.values()), list(places))
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.axvline(0.0, color=style.FAINT, linewidth=0.8, zorder=2)
    for y in places.values():
        ax.axhline(y, color="#f1f1f1", linewidth=0.6, zorder=0)


def _key(figure: Figure) -> None:
    point: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 4.5}
    handles: list[Any] = [
        Line2D([], [], color=style.SAME, **point),
        Line2D([], [], color=style.OPPOSITE, **point),
        Line2D([], [], color=style.MUTED, markerfacecolor=style.PAPER, **point),
        Patch(facecolor=_NULL),
    ]
    labels = [
        "pulled the same way",
        "pulled against each other",
        "not beyond noise",
        "noise floor (90 %)",
    ]
    figure.legend(handles, labels, loc="outside upper center", ncols=4, columnspacing=1.3, handletextpad=0.3)
