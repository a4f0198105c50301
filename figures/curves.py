"""Change along each update, with the local models drawn over it: where does the radius end?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from figures import panels, style
from figures.data import Array, Quantity, curves_of, order, read

_LINES = {
    "first_order": "predicted_first",
    "second_order_ggn": "predicted_second_ggn",
    "second_order": "predicted_second",
}
_BEYOND, _PALE = "#ececec", "#a8a8a8"


class _Cell(NamedTuple):
    path: pd.DataFrame
    fresh: tuple[float, float] | None  # change measured from fresh rollouts at alpha 1, and its standard error
    radius: float  # where the second order ceases to hold; NaN where it holds throughout or that is not known


@style.styled
def change_along_update(
    curves: pd.DataFrame, results: Mapping[str, Any], objective: str, update: str | None = None
) -> Figure:
    """Small multiples of the change at theta + alpha d: rows updates, columns domains; each panel has its own scale.

    Lines are the local models: first order dotted, second order with the GGN dashed, with the Hessian solid. Points with
    90 % bars are observations: measured for a loss; for a reward, importance-weighted estimates on the base model's own
    rollouts, pale where the effective sample size is below a tenth of the sequences. The diamond is the change measured
    from fresh rollouts at alpha 1, drawn a little to its right so that both can be read. A vertical line is the radius of
    the second order, as recorded in the cells: the first alpha at which it is off by more than 10 %; grey is beyond it.

    Args:
        curves: `Run.curves()`.
        results: `Run.results`.
        objective: one of its objectives.
        update: draw this update alone, its panels wrapped to the page; for runs of more than five domains.

    Raises:
        InputError: the run has no such objective.
    """
    about, cells = read(results, objective)
    frame = curves_of(curves, objective)
    estimated = bool(frame["kind"].astype(str).str.startswith("importance").any())
    tall = 1.4 if len(order(results)[1]) > 3 else 2.1
    figure, places = panels.page(results, update, tall, wide=1.35, extra=1.15, sharey=False)
    for panel in places:
        panel.ax.set_title(panel.title)
        _draw(panel.ax, _cell(frame, cells, panel.update, panel.domain, estimated), estimated)
    _name_axes(figure, about, tall * sum(p.first for p in places))
    shown = [p.update for p in places]
    left = bool(((cells["radius_reason"] == "left") & cells["update"].isin(shown)).any())
    title = panels.heading(places, update)
    _key(figure, title, estimated, fresh=estimated and bool(cells["measured"].notna().any()), left=left)
    return figure


def _name_axes(figure: Figure, about: Quantity, high: float) -> None:
    figure.supxlabel("alpha: share of the update that is applied (1 is the tuned checkpoint)", fontsize=8.5)
    label = about.label if high > 2.8 else about.label.replace(" (", "\n(")
    figure.supylabel(label, fontsize=8.5, multialignment="center")


def _cell(frame: pd.DataFrame, cells: pd.DataFrame, update: str, domain: str, estimated: bool) -> _Cell:
    path = frame[(frame["update"] == update) & (frame["domain"] == domain)]
    cell = cells[(cells["update"] == update) & (cells["domain"] == domain)]
    fresh = None
    if estimated and len(cell) and cell["measured"].notna().all():
        fresh = (float(cell["measured"].iloc[0]), float(cell["measured_stderr"].iloc[0]))
    left = bool(len(cell)) and str(cell["radius_reason"].iloc[0]) == "left"
    return _Cell(path, fresh, float(cell["radius"].iloc[0]) if left else np.nan)


def _draw(ax: Axes, cell: _Cell, estimated: bool) -> None:
    path = cell.path
    ax.axhline(0, color=style.FAINT, linewidth=0.7, zorder=0)
    ax.tick_params(pad=1.5)
    ax.locator_params(nbins=4)
    if path.empty:
        ax.text(0.5, 0.5, "no curve", transform=ax.transAxes, ha="center", va="center", color=style.MUTED)
        return
    alpha = path["alpha"].to_numpy(float)
    start, stop = min(0.0, float(alpha.min())), max(0.0, float(alpha.max()))
    dense = np.linspace(start, stop, 61)
    for name, column in _LINES.items():
        look = style.PREDICTORS[name]
        x, y = _through(alpha, path[column].to_numpy(float), dense)
        ax.plot(x, y, color=look.color, linestyle=look.line, linewidth=1.3, zorder=3 if name == "second_order" else 2)
    _points(ax, cell, estimated)
    pad = 0.06 * (stop - start)
    ax.set_xlim(start - pad, stop + pad)
    ax.set_ylim(_limits(cell))
    if np.isfinite(cell.radius):
        ax.axvspan(cell.radius, stop + pad, color=_BEYOND, linewidth=0, zorder=-1)
        ax.axvline(cell.radius, color=style.MUTED, linewidth=0.8, zorder=0)


def _points(ax: Axes, cell: _Cell, estimated: bool) -> None:
    seen = cell.path[(cell.path["alpha"] != 0) & cell.path["measured"].notna()]
    faded = seen["low_ess"].to_numpy(bool)
    for group, color in ((seen[faded], _PALE), (seen[~faded], style.INK)):
        look: dict[str, Any] = {"marker": "o", "markersize": 3.6, "markeredgewidth": 0.9, "elinewidth": 0.8}
        face = style.PAPER if estimated else color
        bars = style.Z90 * group["measured_stderr"].fillna(0.0)
        ax.errorbar(
            group["alpha"],
            group["measured"],
            bars,
            linestyle="none",
            color=color,
            markerfacecolor=face,
            zorder=4,
            **look,
        )
    if cell.fresh is not None:
        value, stderr = cell.fresh
        ax.errorbar(
            1.0 + 0.035 * np.ptp(np.r_[0.0, cell.path["alpha"]]),  # beside the estimate at alpha 1, not on it
            value,
            yerr=style.Z90 * stderr if np.isfinite(stderr) else None,
            color=style.INK,
            marker="D",
            markersize=4.4,
            elinewidth=0.8,
            zorder=5,
        )


def _through(alpha: Array, value: Array, dense: Array) -> tuple[Array, Array]:
    """A smooth line when the points are those of c a + d a^2 (as a local model's are); else the points themselves."""
    known = np.isfinite(value)
    alpha, value = alpha[known], value[known]
    if len(alpha) < 2:
        return alpha, value
    design = np.stack([alpha, alpha**2], axis=1)
    fit = np.linalg.lstsq(design, value, rcond=None)[0]
    if np.abs(design @ fit - value).max() <= 1e-5 * np.abs(value).max(initial=1e-30):
        return dense, fit[0] * dense + fit[1] * dense**2
    return np.r_[0.0, alpha], np.r_[0.0, value]


def _limits(cell: _Cell) -> tuple[float, float]:
    """Room for observations with their bars and for the second order; other lines may leave the panel."""
    path = cell.path
    bars = style.Z90 * path["measured_stderr"].fillna(0.0)
    ends: list[float] = [0.0, *path["predicted_second"], *(path["measured"] - bars), *(path["measured"] + bars)]
    if cell.fresh is not None:
        bar = style.Z90 * float(np.nan_to_num(cell.fresh[1]))
        ends += [cell.fresh[0] - bar, cell.fresh[0] + bar]
    known = [float(e) for e in ends if np.isfinite(e)]
    low, high = min(known), max(known)
    span = (high - low) or 1.0
    others = [float(v) for c in _LINES.values() for v in path[c] if np.isfinite(v)]
    low = max(min([low, *others]), low - 0.3 * span)
    high = min(max([high, *others]), high + 0.3 * span)
    return low - 0.07 * span, high + 0.07 * span


def _key(figure: Figure, title: str, estimated: bool, *, fresh: bool, left: bool) -> None:
    handles: list[Any] = []
    labels: list[str] = []
    for name in reversed(_LINES):
        look = style.PREDICTORS[name]
        handles.append(Line2D([], [], color=look.color, linestyle=look.line, linewidth=1.3))
        labels.append(look.label)
    if left:
        handles.append(Patch(facecolor=_BEYOND, edgecolor=style.MUTED, linewidth=0.8))
        labels.append("beyond the radius: the first error > 10 %")
    dot: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 4}
    if estimated:
        handles.append(Line2D([], [], color=style.INK, markerfacecolor=style.PAPER, **dot))
        handles.append(Line2D([], [], color=_PALE, markerfacecolor=style.PAPER, **dot))
        labels += ["importance-weighted estimate, base rollouts", "the same, effective sample below 10 %"]
    else:
        handles.append(Line2D([], [], color=style.INK, **dot))
        labels.append("measured, 90 % interval")
    if fresh:
        handles.append(Line2D([], [], linestyle="none", marker="D", color=style.INK, markersize=4.4))
        labels.append("measured, fresh rollouts at alpha 1 (drawn to its right)")
    place: dict[str, Any] = {"loc": "outside upper center", "columnspacing": 1.4, "handletextpad": 0.5}
    figure.legend(handles, labels, title=title, title_fontsize=8.5, ncols=2 if estimated else 3, **place)
