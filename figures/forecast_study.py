"""The study of forecasts: predicted against measured by set-up, the scoreboard, quality against training length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures import style
from figures.pairs import nothing
from figures.panels import wrapped
from figures.scoreboard import Metric, board
from figures.study_plans import forecast_mixtures, forecast_orders

FORECASTS = ("virtual", "pilot", "gradient")
SHOWN = (*FORECASTS, "second_order", "importance", "first_order", "gradient_cosine", "update_cosine", "update_norm",
         "subspace_overlap", "kl")  # fmt: skip
_UNITLESS = ("slope", "coverage", "own_error")
_METRICS = (
    Metric("spearman", "Spearman", -0.5, 1, (0, 0.5, 1), 0.0, 1.0),
    Metric("pearson", "Pearson", -0.5, 1, (0, 0.5, 1), 0.0, 1.0),
    Metric("sign_accuracy", "right sign", 0, 1, (0, 0.5, 1), 0.5, 1.0),
    Metric("slope", "slope", 0, 2, (0, 1, 2), None, 1.0),
    Metric("coverage", "coverage", 0, 1, (0, 0.5, 0.9), None, 0.9),
    Metric("own_error", "own-domain\nerror (reward)", 0, 0.2, (0, 0.1, 0.2), None, 0.0),
)
_LENGTHS = (("spearman", "Spearman", 1.0), ("slope", "slope", 1.0), ("own_error", "own-domain error (reward)", 0.0),
            ("ess_median", "median effective share", None))  # fmt: skip


def forecast_study_pages(tables: Mapping[str, pd.DataFrame]) -> dict[str, Figure]:
    """Every figure of the study, by the name of its file; one set per role.

    Args:
        tables: what `paper_repro.forecast_study.report.write_results` returns, or its CSV files read back.
    """
    found: dict[str, Figure] = {}
    cells, board_table, lengths = tables["cells"], tables["scoreboard"], tables["by_length"]
    for role in dict.fromkeys(cells["role"]):
        mine = cells[(cells["role"] == role) & cells["nominal"].astype(bool)]
        for predictor in (*FORECASTS, "second_order"):
            found[f"{role}_{predictor}"] = forecast_by_setup(mine, predictor)
        found[f"{role}_scoreboard"] = forecast_scoreboard(board_table[board_table["role"] == role])
        own = lengths[lengths["role"] == role]
        if len(own[["setup", "length"]].drop_duplicates()) > len(own["setup"].unique()):
            found[f"{role}_lengths"] = forecast_by_length(own)
        if "orders" in tables and (ordered := tables["orders"]["role"] == role).any():
            found[f"{role}_orders"] = forecast_orders(tables["orders"][ordered])
        if "mixes" in tables and (mixed := tables["mixes"]["role"] == role).any():
            found |= {
                f"{role}_{kind}s": forecast_mixtures(tables["mixes"][mixed], kind) for kind in ("mixture", "merge")
            }
    return found


@style.styled
def forecast_by_setup(cells: pd.DataFrame, predictor: str) -> Figure:
    """Predicted change across, measured change up, one panel per set-up, all on one scale, with the identity line.

    Bars are 90 % intervals. Filled: other domains; open squares: the domain that was trained. All training seeds are drawn.

    Args:
        cells: the study's cells at one length each.
        predictor: such as "virtual".
    """
    rows = cells[cells["predictor"] == predictor]
    rows = rows[np.isfinite(rows["predicted"]) & np.isfinite(rows["measured"])]
    if rows.empty:
        return nothing(f"no cell was predicted by {style.predictor(predictor).label}")
    names = list(dict.fromkeys(rows["setup"]))
    figure, places = wrapped(len(names), 1.75, 1.6, 1.0)
    ends = rows[["predicted", "measured"]].to_numpy(float)
    margin = 0.06 * float(np.ptp(ends)) + 1e-3
    limits = float(ends.min()) - margin, float(ends.max()) + margin
    look = style.predictor(predictor)
    for place, name in zip(places, names, strict=True):
        part = rows[rows["setup"] == name]
        _cells(place.ax, part, look)
        place.ax.set(xlim=limits, ylim=limits, aspect="equal")
        place.ax.set_title(style.shorten(name, 24), fontsize=8.5)
        if place.last:
            place.ax.tick_params(labelbottom=True)
            place.ax.set_xlabel("predicted")
        if place.first:
            place.ax.set_ylabel("measured")
    figure.suptitle(f"change of reward; predicted by {look.label}", fontsize=9)
    figure.legend(*_scatter_key(look.color), loc="outside lower center", ncols=3)
    return figure


def _cells(ax: Axes, part: pd.DataFrame, look: style.Predictor) -> None:
    ax.axline((0, 0), slope=1, color=style.MUTED, linewidth=0.9, zorder=1)
    for line in (ax.axhline, ax.axvline):
        line(0, color=style.FAINT, linewidth=0.6, zorder=0)
    for own in (False, True):
        some = part[part["own"].astype(bool) == own]
        x, y = some["predicted"].to_numpy(float), some["measured"].to_numpy(float)
        across = np.nan_to_num(np.stack([x - some["low"].to_numpy(float), some["high"].to_numpy(float) - x]))
        up = style.Z90 * some["measured_stderr"].to_numpy(float)
        ax.errorbar(
            x, y, xerr=np.maximum(across, 0.0), yerr=up, linestyle="none", marker="s" if own else "o", markersize=4,
            color=look.color, markerfacecolor=style.PAPER if own else look.color, elinewidth=0.6, markeredgewidth=0.8,
            zorder=3,
        )  # fmt: skip


def _scatter_key(color: str) -> tuple[list[Line2D], list[str]]:
    dot: dict[str, Any] = {"linestyle": "none", "color": color, "markersize": 5}
    handles = [
        Line2D([], [], marker="o", **dot),
        Line2D([], [], marker="s", markerfacecolor=style.PAPER, **dot),
        Line2D([], [], color=style.MUTED, linewidth=0.9),
    ]
    return handles, ["another domain", "the trained domain", "predicted = measured"]


@style.styled
def forecast_scoreboard(table: pd.DataFrame) -> Figure:
    """One row per predictor, one panel per metric, with 90 % intervals over set-ups; see `figures.predictor_scoreboard`.

    Args:
        table: the study's scoreboard of one role.
    """
    known = {str(row["predictor"]): row for row in table.to_dict("records")}
    names = [n for n in SHOWN if n in known and style.predictor(n).ours]
    names += [n for n in SHOWN if n in known and not style.predictor(n).ours]
    if not names:
        return nothing("nothing was scored")
    card = {name: {str(k): _number(v) for k, v in known[name].items()} for name in names}
    return board(card, _METRICS, unitless_blank=_UNITLESS)


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value


@style.styled
def forecast_by_length(table: pd.DataFrame, predictors: Sequence[str] = (*FORECASTS, "second_order")) -> Figure:
    """Quality against optimizer steps (logarithmic): one line per set-up that was measured at several lengths.

    Columns are predictors, rows Spearman, slope, error on the trained domain and the median effective share of sequences.

    Args:
        table: the study's `by_length` of one role.
    """
    several = table.groupby("setup")["length"].nunique()
    names = [name for name in dict.fromkeys(table["setup"]) if several[name] > 1]
    if not names:
        return nothing("no set-up was measured at several lengths")
    figure = style.new_figure(1.25 * len(_LENGTHS) + 1.0)
    axes = figure.subplots(len(_LENGTHS), len(predictors), sharex=True, sharey="row", squeeze=False)
    shades = style.share_colours()(np.linspace(0.95, 0.35, len(names)))
    marks = "osD^vPX*<>ph"
    for column, predictor in enumerate(predictors):
        axes[0, column].set_title(style.predictor(predictor).label, fontsize=8.5)
        for row, (metric, label, ideal) in enumerate(_LENGTHS):
            ax = axes[row, column]
            if ideal is not None:
                ax.axhline(ideal, color=style.MUTED, linewidth=0.9, zorder=1)
            for i, name in enumerate(names):
                part = table[(table["setup"] == name) & (table["predictor"] == predictor)].sort_values("length")
                ax.plot(part["length"], part[metric], marker=marks[i % len(marks)], markersize=4, color=shades[i])
            if ax is axes[-1, column]:
                ax.set_xlabel("optimizer steps")
            if column == 0:
                ax.set_ylabel(label.replace(" (", "\n(").replace("median ", "median\n"))
            ax.set_xscale("log")
    ticks = sorted(set(table.loc[table["setup"].isin(names), "length"]))
    for ax in axes[-1]:
        ax.set_xticks(ticks, [str(t) for t in ticks], rotation=60 if len(ticks) > 4 else 0)
        ax.minorticks_off()
    lines = [Line2D([], [], color=shades[i], marker=marks[i % len(marks)], markersize=4) for i in range(len(names))]
    figure.legend(lines, names, loc="outside lower center", ncols=min(3, len(names)))
    return figure
