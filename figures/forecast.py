"""The divergence that the jets forecast from an update, against the one that is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures import style
from figures.pairs import models_of, nothing
from figures.policies import key, looks


@style.styled
def kl_forecast_against_measured(forecast: pd.DataFrame, results: Mapping[str, Any]) -> Figure:
    """Forecast KL(base || tuned) across, measured up, on logarithmic axes with the identity line: one point a model and domain.

    The forecast is 1/2 d'Fd, of second order in the update d; bars are 90 % intervals over prompts. Above the line the true
    divergence is larger than what the second order says. A domain's own expert is ringed.

    Args:
        forecast: `Run.probe("kl_forecast")`.
        results: `Run.results`.
    """
    numbers = forecast[["forecast", "measured"]].apply(pd.to_numeric, errors="coerce")
    rows = forecast[(numbers["forecast"] > 0) & (numbers["measured"] > 0)]
    if rows.empty:
        return nothing("no divergence was forecast")
    known = looks(results)
    figure = style.new_figure(4.3)
    ax = figure.subplots()
    ends: list[float] = []
    for r in rows.to_dict("records"):
        x, y = float(r["forecast"]), float(r["measured"])
        look = known[str(r["reference"])]
        across = _bar(x, x - style.Z90 * float(r["stderr"]), x + style.Z90 * float(r["stderr"]))
        up = _bar(y, float(r["low"]), float(r["high"]))
        ax.errorbar(x, y, yerr=up, xerr=across, elinewidth=0.8, markeredgewidth=0.8, zorder=3, **look.point)
        if r["reference"] == r["domain"]:
            ax.plot(
                x,
                y,
                "o",
                markersize=11,
                markerfacecolor="none",
                markeredgecolor=style.INK,
                markeredgewidth=0.8,
                zorder=4,
            )
        ends += [x, y, *(v for v in (float(r["low"]), float(r["high"])) if v > 0)]
    low, high = min(ends) / 1.5, max(ends) * 1.5
    ax.plot([low, high], [low, high], color=style.MUTED, linewidth=0.9, zorder=1)
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    ax.minorticks_off()
    ticks = _ticks(low, high)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xlabel("forecast from the update, 1/2 d'Fd (nats per token)")
    ax.set_ylabel("measured KL(base ‖ model) (nats per token)")
    names = [name for name in models_of(results) if (rows["reference"] == name).any()]
    more = [(Line2D([], [], color=style.MUTED, linewidth=0.9), "forecast = measured")]
    if (rows["reference"] == rows["domain"]).any():
        ring = Line2D([], [], linestyle="none", marker="o", markersize=9, markerfacecolor="none", color=style.INK)
        more.append((ring, "on its own domain"))
    key(figure, known, names, more)
    return figure


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between the ends of a logarithmic axis: powers of ten, and 2 and 5 times them where there is room."""
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for steps in ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,)):
        found = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if len(found) <= 8:
            break
    return found


def _bar(value: float, low: float, high: float) -> list[list[float]] | None:
    """Lengths of a bar down and up; it ends above 0, where a logarithmic axis does."""
    if not np.isfinite([low, high]).all():
        return None
    return [[value - max(min(low, value), 0.02 * value)], [max(high, value) - value]]
