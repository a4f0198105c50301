"""The interference that is forecast: the matrix of predicted changes, and the paths of the virtual trainings behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures import style
from figures.data import Quantity, cells_of, grid, quantity
from figures.matrix import Panel, heatmaps

_BEYOND = "second order off by more than half of the change"
_ACROSS = 4  # panels beside each other


def foretold(results: Mapping[str, Any], objective: str, tier: str) -> tuple[Quantity, pd.DataFrame]:
    """An objective, and its cells by one tier, in the order of the request, as `figures.data.cells_of` makes them;
    `certain` are those that the record calls sure: the 90 % interval excludes zero, and enough of the responses are effective.

    Raises InputError for an objective that the run does not have.
    """
    about, names = quantity(results, objective), results.get("evaluated", {}).get(objective)
    cells = [c for c in results["cells"] if c["tier"] == tier]
    frame = cells_of({**results, "cells": cells, "domains": names or results["domains"]}, objective)
    for column in (
        "predicted",
        "sampling_stderr",
        "update_stderr",
        "method_stderr",
        "noise_term",
        "agreement",
        "reliability",
    ):
        frame[column] = pd.to_numeric(frame[column], errors="coerce").astype(float)
    frame["certain"] = frame["sure"].map(lambda known: known is True or known == 1).astype(bool)
    return about, frame


@style.styled
def forecast_matrix(results: Mapping[str, Any], objective: str) -> Figure:
    """Heatmaps of the predicted change, one for each tier; rows would be trained on, columns change.

    All share one scale, symmetric about zero, set by the off-diagonal cells: a domain's own cell may be much larger and then
    takes the end colour. Blue is always *helped*. Each cell says its value and standard error; hatched cells have a 90 %
    interval that holds zero, or too few effective responses for one; a domain's own cell is outlined; a black corner marks a
    change that the second order misses.

    Raises InputError for an objective that the run does not have.
    """
    about, updates = quantity(results, objective), list(results["updates"])
    domains, panels = list(results["evaluated"][objective]), []
    own = np.zeros((len(updates), len(domains)), dtype=bool)
    for tier in results["tiers"]:
        _, frame = foretold(results, objective, tier)
        values = {
            k: grid(frame, k, updates, domains) for k in ("predicted", "stderr", "certain", "beyond_radius", "own")
        }
        panels.append(Panel(str(tier), *(values[k] for k in list(values)[:4])))
        own = values["own"] == 1
    return heatmaps(
        panels, updates, domains, own, about, _BEYOND, "90 % interval holds zero, or too few effective responses"
    )


@style.styled
def forecast_paths(path: pd.DataFrame, results: Mapping[str, Any], tier: str) -> Figure:
    """The path of every virtual training: expected reward above, effective share of the responses below, against the step.

    One line for each half of the prompts. Dots are steps whose importance ratios were tempered.

    Args:
        path: `Run.forecast("path")`.
        results: `Run.results`.
        tier: "virtual" or "pilot".
    """
    rows = path[path["tier"] == tier]
    names = [name for name in results["updates"] if (rows["domain"] == name).any()]
    columns = min(len(names), _ACROSS)
    bands = -(-len(names) // columns)
    figure = style.new_figure(2.6 * bands + 0.55)
    axes = figure.subplots(2 * bands, columns, squeeze=False, sharex="col" if bands == 1 else False)
    for k, name in enumerate(names):
        high, low = axes[2 * (k // columns)][k % columns], axes[2 * (k // columns) + 1][k % columns]
        high.set_title(style.shorten(name, 18))
        for half, line in ((1, "-"), (2, "--")):
            mine = rows[(rows["domain"] == name) & (rows["half"] == half)].sort_values("step")
            for ax, column in ((high, "reward"), (low, "ess")):
                ax.plot(mine["step"], mine[column], color=_ink(half), linestyle=line, linewidth=1.2)
                tempered = mine[column].where(mine["exponent"] < 1)
                ax.plot(mine["step"], tempered, color=style.HURT, linestyle="none", marker="o", markersize=3.4)
        low.axhline(results["settings"]["least_ess"], color=style.MUTED, linewidth=0.8, linestyle=":")
        low.set_ylim(0, 1.05)
        high.locator_params(nbins=4)
        low.locator_params(axis="x", nbins=4, integer=True)
        high.tick_params(labelbottom=bands > 1)
        if k % columns == 0:
            pairs = results["trainings"][name]["algorithm"] == "dpo"
            high.set_ylabel("pairs in order" if pairs else "expected reward")
            low.set_ylabel("effective\nshare")
    for k in range(len(names), bands * columns):
        axes[2 * (k // columns)][k % columns].set_axis_off()
        axes[2 * (k // columns) + 1][k % columns].set_axis_off()
    figure.supxlabel("optimizer step of the training that is forecast", fontsize=8.5)
    figure.align_ylabels(list(axes[:, 0]))
    handles = [
        Line2D([], [], color=_ink(1), linestyle="-", linewidth=1.2),
        Line2D([], [], color=_ink(2), linestyle="--", linewidth=1.2),
        Line2D([], [], color=style.MUTED, linestyle=":", linewidth=0.8),
    ]
    labels = ["one half of the prompts", "the other half", "tempered below this"]
    if (rows["exponent"] < 1).any():
        handles.append(Line2D([], [], color=style.HURT, linestyle="none", marker="o", markersize=3.4))
        labels.append("tempered step")
    figure.legend(handles, labels, loc="outside upper center", ncols=len(handles), columnspacing=1.4)
    return figure


def _ink(half: int) -> str:
    return style.INK if half == 1 else style.PREDICTORS["second_order"].color


@style.styled
def forecast_against_measured(cells: pd.DataFrame) -> Figure:
    """What was forecast before training against what training did, a panel for each objective and tier.

    Error bars are 90 %; hollow points are domains' own cells; on the dashed line the forecast is right.

    Args:
        cells: rows of `Run.cells()` of a forecast with the columns `measured` and `measured_stderr`.
    """
    groups = list(cells.groupby(["objective", "tier"], sort=False))
    figure = style.new_figure(3.6, 3.4 * len(groups))
    axes = figure.subplots(1, len(groups), squeeze=False)
    for ax, ((objective, tier), part) in zip(np.ravel(axes), groups, strict=True):
        x, y = part["predicted"].to_numpy(float), part["measured"].to_numpy(float)
        xe, ye = (style.Z90 * part[c].to_numpy(float) for c in ("stderr", "measured_stderr"))
        low, high = float(np.nanmin([x - xe, y - ye])), float(np.nanmax([x + xe, y + ye]))
        ends = [low - 0.05 * (high - low), high + 0.05 * (high - low)]
        ax.plot(ends, ends, color="0.6", linewidth=0.9, linestyle="--", zorder=1)
        own = part["own"].astype(bool).to_numpy()
        for kind, filled in ((~own, True), (own, False)):
            ax.errorbar(
                x[kind], y[kind], xerr=xe[kind], yerr=ye[kind], fmt="o", markersize=5, color=style.predictor(str(tier)).color,
                markerfacecolor=None if filled else "white", elinewidth=0.8, zorder=2,
            )  # fmt: skip
        ax.set(xlim=ends, ylim=ends, xlabel=f"forecast change in {objective}", title=style.predictor(str(tier)).label)
        ax.set_aspect("equal")
    np.ravel(axes)[0].set_ylabel("measured change")
    return figure
