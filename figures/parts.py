"""A predicted change split into parts: in which layer, module, channel or head it sits, and how concentrated its harm is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from figures.data import Array, Quantity, order, quantity

OUTSIDE = -1
"""The layer of what belongs to none: embedding, last norm, head."""


def parts_of(table: pd.DataFrame, results: Mapping[str, Any], objective: str) -> pd.DataFrame:
    """The parts of one objective's predicted changes, with three columns more.

    `change` is first + second order at coefficient 1; `harm` is the change with the sign of harm (positive where it makes
    the objective worse, see `Quantity.harm`); `share` is a part's share of the damage in its cell: its harm over the sum
    of all harmful parts of its kind in that cell, 0 for parts that help (of heads, query heads and key-value heads are two
    kinds). Rows whose change is not a finite number are left out.

    Args:
        table: `Run.attribution(...)`.
        results: `Run.results`.
        objective: one of its objectives.

    Raises:
        InputError: the run has no such objective.
    """
    about = quantity(results, objective)
    frame = table.loc[table["objective"] == objective].copy()
    frame["change"] = frame["first"].astype(float) + frame["second"].astype(float)
    frame = frame.loc[np.isfinite(frame["change"])].copy()
    frame["harm"] = about.harm(frame["change"])
    frame["share"] = frame["harm"].clip(lower=0.0)
    same = [name for name in ("update", "domain", "kind") if name in frame]
    total = frame.groupby(same, observed=True)["share"].transform("sum")
    frame["share"] = (frame["share"] / total.where(total > 0)).fillna(0.0)
    numbered: pd.DataFrame = frame.reset_index(drop=True)
    return numbered


def cell_of(frame: pd.DataFrame, update: str, domain: str) -> pd.DataFrame:
    """The rows of one cell."""
    here: pd.Series = (frame["update"] == update) & (frame["domain"] == domain)
    return frame.loc[here]


def together(cell: pd.DataFrame, by: str) -> pd.DataFrame:
    """The parts of one cell summed over all that have the same `by`, with shares of the damage among these sums.

    What helps and what hurts within one group cancels before a share is taken, so shares of layers are not sums of the
    shares of their modules.

    >>> cell = pd.DataFrame({"layer": [0, 0, 1], "change": [3.0, -1.0, 2.0], "harm": [3.0, -1.0, 2.0]})
    >>> together(cell, "layer")["share"].tolist()
    [0.5, 0.5]
    """
    sums = cell.groupby(by, sort=True, observed=True)[["change", "harm"]].sum().reset_index()
    harmful = sums["harm"].clip(lower=0.0)
    sums["share"] = harmful / (harmful.sum() or 1.0)
    return sums


class Concentration(NamedTuple):
    """How many of the parts carry how much of the harm of a cell.

    `parts`: how many there are; `half`: the fewest that carry half of the harm; `top`: 1 % of the parts, at least one;
    `top_share`: the share that these carry; `cumulative` (parts,): share carried by the k + 1 most harmful.
    """

    parts: int
    half: int
    top: int
    top_share: float
    cumulative: Array


def concentration(harm: Array) -> Concentration | None:
    """How concentrated harm is; None where no part is harmful.

    >>> found = concentration(np.array([1.0, 5.0, -7.0, 2.0]))
    >>> found.parts, found.half, found.top, found.top_share
    (4, 1, 1, 0.625)
    """
    falling = np.sort(np.clip(np.asarray(harm, float), 0.0, None))[::-1]
    total = float(falling.sum())
    if not total > 0:
        return None
    cumulative = np.cumsum(falling) / total
    half = int(np.argmax(cumulative >= 0.5 * (1 - 1e-12))) + 1
    top = max(1, round(0.01 * len(falling)))
    return Concentration(len(falling), half, top, float(cumulative[top - 1]), cumulative)


def worst(cells: pd.DataFrame, modules: pd.DataFrame, about: Quantity) -> tuple[str, str] | None:
    """The off-diagonal cell that is predicted to be hurt most; where there is none, of all cells that were split.

    Args:
        cells: `figures.data.cells_of`.
        modules: `parts_of` the modules.
        about: the objective.
    """
    split = set(zip(modules["update"].astype(str), modules["domain"].astype(str), strict=True))
    kept = cells[[pair in split for pair in zip(cells["update"], cells["domain"], strict=True)]]
    kept = kept[kept["predicted_second"].notna()]
    kept = kept[~kept["own"]] if (~kept["own"]).any() else kept
    if kept.empty:
        return None
    row = kept.iloc[int(about.harm(kept["predicted_second"]).argmax())]
    return str(row["update"]), str(row["domain"])


def split_cells(modules: pd.DataFrame, results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The cells that were split, in the record's order."""
    there = set(zip(modules["update"].astype(str), modules["domain"].astype(str), strict=True))
    updates, domains = order(results)
    return [(u, d) for u in updates for d in domains if (u, d) in there]
