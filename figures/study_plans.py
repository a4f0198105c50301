"""The study of forecasts: what was predicted and measured of plans, which are orders, mixtures and merges of trainings."""

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


@style.styled
def forecast_orders(table: pd.DataFrame) -> Figure:
    """Change of the average reward after training in every order; see `_plans`.

    Args:
        table: the study's `orders` of one predictor.
    """
    plans = table.assign(plan=table["order"].str.replace(" > ", " \u2192 "))
    titles = {
        n: f"{int(part['length'].iloc[0])} steps on each domain" for n, part in plans.groupby("setup", sort=False)
    }
    return _plans(plans, titles, "change of the average reward over domains, by order of training")


@style.styled
def forecast_mixtures(table: pd.DataFrame, kind: str) -> Figure:
    """Change of the average reward after training on every mixture (kind "mixture"), or at every merge ("merge"); see `_plans`.

    Crosses: the cells of single trainings added with the plan's weights.

    Args:
        table: the study's `mixes`.
    """
    chosen = table[table["kind"] == kind].assign(square=table["measured_stderr"] ** 2)
    means = (
        chosen.groupby(["setup", "plan", "predictor"], sort=False)
        .agg(
            predicted=("predicted", "mean"),
            measured=("measured", "mean"),
            square=("square", "mean"),
            n=("square", "size"),
        )
        .reset_index()
    )
    means = means.assign(measured_stderr=np.sqrt(means["square"] / means["n"]), predicted_stderr=0.0)
    added = means[means["predictor"] == "virtual_added"].set_index(["setup", "plan"])["predicted"]
    plans = means[means["predictor"] == "virtual"]
    plans = plans.assign(added=[added[s, p] for s, p in zip(plans["setup"], plans["plan"], strict=True)])
    lengths = chosen.groupby("setup", sort=False)["length"].first()
    what = {"mixture": "training on several domains at once", "merge": "merge of single trainings"}[kind]
    titles = {n: f"{steps} steps" + " each" * (kind == "merge") for n, steps in lengths.items()}
    return _plans(plans, titles, f"change of the average reward over domains, by {what}")


def _plans(table: pd.DataFrame, titles: Mapping[Any, str], title: str) -> Figure:
    """One row of panels per set-up, with 90 % intervals (of mixtures and merges, of what was measured).

    Left: predicted across, measured up. Right: the same by plan, the one measured best on top. The one predicted best is ringed.
    """
    names = list(dict.fromkeys(table["setup"]))
    if not names:
        return nothing("nothing of the kind was measured")
    look = style.predictor("virtual")
    tall = [max(2.4, 0.17 * int((table["setup"] == name).sum())) for name in names]
    figure = style.new_figure(sum(tall) + 0.5 * len(names) + 0.5)
    axes = figure.subplots(len(names), 2, squeeze=False, height_ratios=tall)
    for (across, listed), name in zip(axes, names, strict=True):
        part = table[table["setup"] == name].sort_values("measured", kind="stable", ignore_index=True)
        picked = int(part["predicted"].to_numpy(float).argmax())
        _plans_scatter(across, part, picked, look)
        _plans_list(listed, part, picked, look)
        across.set_title(f"{style.shorten(name, 24)}, {titles[name]}", fontsize=8.5)
    figure.suptitle(title, fontsize=9)
    dot: dict[str, Any] = {"linestyle": "none", "markersize": 5}
    keys = {
        "measured": Line2D([], [], marker="o", color=style.INK, **dot),
        look.label: Line2D([], [], marker=look.marker, color=look.color, **dot),
    }
    if "added" in table:
        keys["pairs' cells added"] = Line2D([], [], marker="x", color=style.MUTED, **dot)
    keys["predicted best"] = Line2D(
        [], [], marker="o", color=style.INK, markerfacecolor="none", linestyle="none", markersize=10
    )
    keys["predicted = measured"] = Line2D([], [], color=style.MUTED, linewidth=0.9)
    figure.legend(list(keys.values()), list(keys), loc="outside lower center", ncols=len(keys))
    return figure


def _ring(ax: Axes, x: float, y: float) -> None:
    ax.plot(x, y, marker="o", color=style.INK, markerfacecolor="none", linestyle="none", markersize=10, zorder=4)


def _plans_scatter(ax: Axes, part: pd.DataFrame, picked: int, look: style.Predictor) -> None:
    x, y = part["predicted"].to_numpy(float), part["measured"].to_numpy(float)
    across, up = (style.Z90 * part[f"{name}_stderr"].to_numpy(float) for name in ("predicted", "measured"))
    ax.axline((float(y.mean()), float(y.mean())), slope=1, color=style.MUTED, linewidth=0.9, zorder=1)
    if "added" in part:
        ax.plot(part["added"], y, marker="x", markersize=4, linestyle="none", color=style.MUTED, zorder=2)
    ax.errorbar(
        x, y, xerr=across, yerr=up, linestyle="none", marker=look.marker, markersize=4.5, color=look.color, ecolor=style.MUTED,
        elinewidth=0.5, zorder=3,
    )  # fmt: skip
    _ring(ax, x[picked], y[picked])
    reach = max(float(np.nanmax(across)), float(np.nanmax(up)))
    every = np.concatenate([x, y, part["added"].to_numpy(float) if "added" in part else x])
    limits = every.min() - 1.1 * reach, every.max() + 1.1 * reach
    ax.set(xlabel="predicted", ylabel="measured", aspect="equal", anchor="N", xlim=limits, ylim=limits)


def _plans_list(ax: Axes, part: pd.DataFrame, picked: int, look: style.Predictor) -> None:
    rows = np.arange(len(part))
    for name, marker, color, lift in (
        ("measured", "o", style.INK, 0.14),
        ("predicted", look.marker, look.color, -0.14),
    ):
        ax.errorbar(
            part[name].to_numpy(float), rows + lift, xerr=style.Z90 * part[f"{name}_stderr"].to_numpy(float), linestyle="none",
            marker=marker, markersize=4, color=color, elinewidth=0.6,
        )  # fmt: skip
    if "added" in part:
        ax.plot(part["added"], rows - 0.14, marker="x", markersize=4, linestyle="none", color=style.MUTED, zorder=1)
    _ring(ax, float(part["predicted"].iloc[picked]), picked - 0.14)
    ax.set_yticks(rows, [style.shorten(str(plan), 44) for plan in part["plan"]])
    ax.set(xlabel="change of average reward", ylim=(-0.7, len(part) - 0.3))
