"""What every figure of pairs of updates starts from: their order, their rows, and the lower triangle of a heatmap."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize, to_rgb
from matplotlib.figure import Figure

from figures import squares, style

RULES = {
    "relative": "|change| > 0.001 · max(|before|, |after|)",
    "absolute": "|change| > 0.00001",
    "lpt": "|change| ≥ 0.0000001 or ≥ 0.001 · |before|",
    "bf16": "before and after differ when rounded to bf16",
}
"""When a weight counts as changed, in words: the rules of 2511.08567, of 2505.11711 and of LPT."""

Pair = tuple[int, int]
Row = Mapping[str, Any]


def models_of(results: Mapping[str, Any]) -> list[str]:
    """Names of the tuned models in the order in which the run was asked for them."""
    return [str(name) for name in results.get("models", [])]


def pairs_of(table: pd.DataFrame, models: Sequence[str]) -> dict[Pair, dict[str, Any]]:
    """The row of each pair of models, by their places (lower first), in order; the table has one row a pair."""
    place = {name: k for k, name in enumerate(models)}
    rows: dict[Pair, dict[str, Any]] = {}
    for row in table.to_dict("records"):
        a, b = str(row["a"]), str(row["b"])
        if a in place and b in place:
            rows[place[a], place[b]] = {str(key): value for key, value in row.items()}
    return {pair: rows[pair] for pair in combinations(range(len(models)), 2) if pair in rows}


def beyond(value: float, low: float, high: float) -> bool:
    """Is a value outside its interval of chance? False where one of them is not known.

    >>> beyond(0.3, 0.1, 0.2), beyond(0.15, 0.1, 0.2), beyond(0.3, float("nan"), 0.2)
    (True, False, False)
    """
    return bool(np.isfinite([value, low, high]).all() and not low <= value <= high)


class Cell(NamedTuple):
    """What a square says: `value` gives its colour; hatched unless `sure`."""

    value: float
    text: str
    sure: bool


def triangle(
    models: Sequence[str],
    cell: Callable[[Pair], Cell | None],
    cmap: Colormap,
    norm: Normalize,
    diagonal: Callable[[int], str] | None = None,
    *,
    tall: float = 0.46,
    extra: float = 1.5,
) -> tuple[Figure, Axes]:
    """The lower triangle of all pairs: rows the later, columns the earlier model.

    Args:
        models: their names, two or more.
        cell: the square of a pair, None where there is none.
        cmap, norm: colours of the values.
        diagonal: what a model's own square says; without it there is none.
        tall: least height of a square in inches.
        extra: inches for what stands below.
    """
    rows = list(range(len(models))) if diagonal else list(range(1, len(models)))
    columns = list(range(len(models))) if diagonal else list(range(len(models) - 1))
    width = max(style.WIDTH, 0.82 * len(columns) + 1.4)
    wide = min(1.1, (width - 1.4) / len(columns))
    high = max(tall, 0.45 * wide)
    figure = style.new_figure(high * len(rows) + extra, width, layout="compressed")
    ax = figure.subplots()
    ax.set(xlim=(0, len(columns)), ylim=(len(rows), 0), aspect=high / wide)
    for y, j in enumerate(rows):
        for x, i in enumerate(columns):
            if i < j:
                _draw(ax, x, y, cell((i, j)), cmap, norm)
            elif i == j and diagonal:
                _write_own(ax, x, y, diagonal(i))
    squares.bare(ax)
    names = [style.shorten(name, 16) for name in models]
    ax.set_yticks([y + 0.5 for y in range(len(rows))], [names[j] for j in rows])
    ax.set_xticks([x + 0.5 for x in range(len(columns))], [names[i] for i in columns])
    if max(len(names[i]) for i in columns) > (12 if wide > 1 else 8):
        for tick in ax.get_xticklabels():
            tick.set(rotation=30, ha="right", va="top", rotation_mode="anchor")
    return figure, ax


def _draw(ax: Axes, x: int, y: int, cell: Cell | None, cmap: Colormap, norm: Normalize) -> None:
    if cell is None or not np.isfinite(cell.value):
        blank = to_rgb("#ededed")
        squares.square(ax, x, y, blank)
        squares.write(ax, x, y, "–", blank)
        return
    fill = tuple(float(c) for c in cmap(norm(cell.value))[:3])
    squares.square(ax, x, y, fill, hatched=not cell.sure)
    squares.write(ax, x, y, cell.text, fill, hatched=not cell.sure)


def _write_own(ax: Axes, x: int, y: int, text: str) -> None:
    pale = to_rgb("#f1f1ef")
    squares.square(ax, x, y, pale)
    squares.write(ax, x, y, text, pale)


def nothing(why: str) -> Figure:
    """An empty figure that says why there is nothing to draw."""
    figure = style.new_figure(1.0)
    figure.text(0.5, 0.5, why, ha="center", va="center")
    return figure
