"""In which directions the updates point: the cosine of each pair, and the angles between their leading subspaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from figures import panels, squares, style
from figures.pairs import Cell, Pair, Row, models_of, nothing, pairs_of, triangle
from interference.errors import InputError, nearest

SIDES = {"left": "output side (left singular vectors)", "right": "input side (right singular vectors)"}
"""The two sides of a matrix, in words."""

_KINDS = {
    **dict.fromkeys(("q", "k", "v", "qkv", "o"), "attention"),
    **dict.fromkeys(("gate", "up", "gate_up", "down", "router", "experts"), "MLP"),
}


_NULL = "#e2e2e2"


class _Look(NamedTuple):
    color: str
    line: style.LineStyle
    marker: str


_LOOKS = {
    "attention": _Look(style.SAME, "-", "o"),
    "MLP": _Look(style.OPPOSITE, "--", "s"),
    "other": _Look("#8a6d00", "-.", "^"),
}


def kind_of(module: str) -> str:
    """The part of a model that a module is in: "attention", "MLP" or "other"."""
    return _KINDS.get(module, "other")


def telling(subspaces: pd.DataFrame) -> pd.Series:
    """Which rows of `Run.geometry("subspaces")` can tell anything: not those whose subspace is the whole side of the matrix.

    There every two subspaces are the same, the overlap is 1 by construction, and an interval of chance holds rounding only.
    """
    known = subspaces[["overlap", "low", "high"]].notna().all(axis=1)
    mask: pd.Series = known & (subspaces["chance"].astype(float) < 1 - 1e-9)
    return mask


@style.styled
def update_cosine(cosines: pd.DataFrame, results: Mapping[str, Any]) -> Figure:
    """Cosine between two updates, over all weights, for every pair; below it the same from random projections.

    Hatched: the cosine lies within the 90 % interval of two unrelated directions, ± 1.645 `null_std`. The
    second line is the mean and the standard deviation over seeds of the cosine after a random projection; a star: the mean
    is further from zero than one projection of unrelated directions would put it in 90 % of cases.

    Args:
        cosines: `Run.geometry("cosines")`.
        results: `Run.results`.
    """
    models = models_of(results)
    rows = pairs_of(cosines[cosines["scope"] == "model"], models)
    if not rows:
        return nothing("no cosines were recorded")
    values = np.array([float(row["cosine"]) for row in rows.values()])
    limit = min(1.0, max(0.1, float(np.abs(values[np.isfinite(values)]).max(initial=0.0))))
    cmap, norm = style.direction_colours(), Normalize(-limit, limit)

    def cell(pair: Pair) -> Cell | None:
        row = rows.get(pair)
        return None if row is None else _cosine_cell(row)

    figure, ax = triangle(models, cell, cmap, norm, tall=0.5, extra=1.6)
    marks = {m: style.signed(m, 2) for m in (-limit, -limit / 2, 0.0, limit / 2, limit)}
    bar = style.colour_bar(figure, [ax], ScalarMappable(norm, cmap), marks, False, 0.04)
    bar.set_label("cosine between updates (no unit): teal same, purple opposite direction")
    handles, labels = [squares.in_key()], ["not beyond unrelated directions (90 %)"]
    if any(np.isfinite(float(row["projected_mean"])) for row in rows.values()):
        handles.append(Patch(alpha=0))
        labels.append("below: projected, mean ± sd over seeds; * beyond its null")
    figure.legend(handles, labels, loc="outside lower center", ncols=2, handlelength=1.6, columnspacing=1.2)
    return figure


def _cosine_cell(row: Row) -> Cell:
    value, mean, spread = (float(row[name]) for name in ("cosine", "projected_mean", "projected_std"))
    sure = abs(value) > style.Z90 * float(row["null_std"])
    text = style.signed(value, 3)
    if np.isfinite(mean):
        star = "*" if abs(mean) > style.Z90 * float(row["projection_null"]) else ""
        text += f"\n{style.signed(mean, 2)}{star}" + (f"\n±{style.plain(spread, 2)}" if np.isfinite(spread) else "")
    return Cell(value, text, bool(sure))


@style.styled
def angle_spectra(angles: pd.DataFrame, results: Mapping[str, Any], side: str = "left") -> Figure:
    """Cosines of the principal angles between the leading subspaces of two updates, one panel a pair.

    The k-th point of a line is the median, over the matrices of a part of the model, of the k-th largest cosine: 1 is a
    direction that both subspaces hold. Dotted, in the same colour: what random subspaces of the same sizes give (the median
    of each matrix's null, and of these over matrices). Grey: from the least to the largest of these among all matrices.
    A matrix whose subspace is its whole side is left out: there all angles are zero by construction.

    Args:
        angles: `Run.geometry("angles")`.
        results: `Run.results`.
        side: "left" (output side) or "right" (input side).

    Raises:
        InputError: another side.
    """
    if side not in SIDES:
        raise InputError(got=f"side {side!r}", expected="a side of the matrices", remedy=nearest(side, SIDES))
    models = models_of(results)
    here = angles.loc[angles["side"] == side].copy()
    least = here.groupby(["a", "b", "tensor"], observed=True)["chance_cosine"].transform("min").astype(float)
    here = here.loc[~(least > 1 - 1e-6)].copy()
    here["part"] = [kind_of(str(module)) for module in here["module"]]
    pairs = list(pairs_of(here.drop_duplicates(["a", "b"]), models))
    if not pairs:
        return nothing("no angles were recorded on this side that could tell anything")
    figure, shown = panels.wrapped(len(pairs), tall=1.45, wide=1.35, extra=1.0)
    for place, (i, j) in zip(shown, pairs, strict=True):
        _spectra(place.ax, here[(here["a"] == models[i]) & (here["b"] == models[j])])
        place.ax.set_title(f"{style.shorten(models[i], 18)}\nand {style.shorten(models[j], 18)}", fontsize=8.5, pad=3)
        place.ax.tick_params(labelbottom=place.last, labelleft=place.first)
    last = int(here["index"].max())
    shown[0].ax.set(ylim=(0.0, 1.0), xlim=(min(0.5, 1 - 0.03 * last), last + max(0.5, 0.03 * last)))
    shown[0].ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    shown[0].ax.set_yticks([0.0, 0.5, 1.0], ["0", "0.5", "1"])
    figure.supxlabel("index of the principal angle", fontsize=8.5)
    figure.supylabel("cosine of the angle", fontsize=8.5)
    _key(figure, [part for part in _LOOKS if (here["part"] == part).any()], SIDES[side])
    return figure


def _spectra(ax: Axes, rows: pd.DataFrame) -> None:
    null = rows.groupby("index")["chance_cosine"].agg(["min", "max"]).dropna()
    if len(null):
        edges = (null["min"].to_numpy(float), null["max"].to_numpy(float))
        ax.fill_between(null.index.to_numpy(float), *edges, color=_NULL, linewidth=0, zorder=1)
    for part, look in _LOOKS.items():
        found = rows[rows["part"] == part].groupby("index")[["cosine", "chance_cosine"]].median()
        if len(found):
            shape: dict[str, Any] = {"linestyle": look.line, "marker": look.marker, "markersize": 3.6}
            shape["markevery"] = max(1, len(found) // 6)
            index, value = found.index.to_numpy(float), found["cosine"].to_numpy(float)
            ax.plot(index, value, color=look.color, zorder=3, clip_on=False, **shape)
            chance = found["chance_cosine"].to_numpy(float)
            ax.plot(index, chance, color=look.color, linestyle=":", linewidth=1.0, zorder=2)


def _key(figure: Figure, parts: list[str], title: str) -> None:
    handles: list[Any] = []
    for part in parts:
        look = _LOOKS[part]
        handles.append(Line2D([], [], color=look.color, linestyle=look.line, marker=look.marker, markersize=3.6))
    handles += [Line2D([], [], color=style.MUTED, linestyle=":", linewidth=1.0), Patch(facecolor=_NULL)]
    labels = [*parts, "random subspaces: of its part", "of all matrices"]
    place: dict[str, Any] = {"loc": "outside upper center", "ncols": len(labels), "columnspacing": 1.4}
    figure.legend(handles, labels, title=f"{title}; medians over matrices", title_fontsize=8.5, **place)
