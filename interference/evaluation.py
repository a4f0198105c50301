"""evaluate: predicted against measured, with the baselines a user would try."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from interference import statistics
from interference.cells import BASELINES, COLUMNS, PREDICTORS, cell_table, records
from interference.errors import InputError
from interference.objectives import OBJECTIVES
from interference.quadratic import QuadraticModel

__all__ = ["Scorecard", "cell_table", "evaluate", "number", "orientation", "records", "score_table", "scores"]

Array = NDArray[np.float64]
_HELPS = (
    "update_cosine",
    "gradient_cosine",
)  # larger means that the update is expected to help; the others, to hurt


@dataclass(frozen=True)
class Scorecard:
    """Scores of every predictor of one objective, over all cells and over off-diagonal cells.

    `table` has one row per (cells, predictor), cells being "all" or "off_diagonal":

    - spearman, pearson: rank and linear correlation of predicted and measured; spearman_low, spearman_high: 90 % interval when
      prompts are resampled;
    - sign_accuracy: share of right signs among the cells whose measured change is beyond its own 90 % noise;
    - slope, intercept: least-squares line of measured on predicted (1 and 0 when calibrated);
    - r2: 1 - sum (measured - predicted)^2 / sum (measured - mean)^2;
    - coverage: share of cells where the 90 % interval of measured - predicted (prompts resampled, paired) holds zero: sampling
      noise only;
    - coverage_truncation: the same of the interval that also holds what is predicted to be left out (`truncation.widened`);
      for the second and third order, where remainders are known.

    Baselines have no unit. They are oriented (a norm or KL is taken to hurt, a cosine to help); their r2 and coverage are those
    of a line fitted to the other cells, leaving the scored cell out (`calibrated` is then true). NaN: not defined.

    The attributes of the same names are those of the second-order prediction on off-diagonal cells, or on all cells when
    there are no others.
    """

    objective: str
    cells: pd.DataFrame
    table: pd.DataFrame

    def get(self, metric: str, predictor: str = "second_order", where: str | None = None) -> float:
        """One number of the table."""
        where = where or ("off_diagonal" if (self.table["where"] == "off_diagonal").any() else "all")
        row = self.table[(self.table["where"] == where) & (self.table["predictor"] == predictor)]
        return float(row[metric].iloc[0])

    @property
    def spearman(self) -> float:
        return self.get("spearman")

    @property
    def pearson(self) -> float:
        return self.get("pearson")

    @property
    def sign_accuracy(self) -> float:
        return self.get("sign_accuracy")

    @property
    def slope(self) -> float:
        return self.get("slope")

    @property
    def r2(self) -> float:
        return self.get("r2")

    @property
    def coverage(self) -> float:
        return self.get("coverage")

    @property
    def coverage_truncation(self) -> float:
        return self.get("coverage_truncation")

    def to_dict(self) -> dict[str, dict[str, dict[str, Any]]]:
        """{"all" | "off_diagonal": {predictor: {metric: number or None}}}."""
        out: dict[str, dict[str, dict[str, Any]]] = {}
        for row in records(self.table):
            part = out.setdefault(row.pop("where"), {})
            part[row.pop("predictor")] = {k: number(v) for k, v in row.items()}
        return out


def number(value: Any) -> Any:
    """A JSON value: NaN and infinity become None, NumPy scalars plain ones."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def evaluate(
    models: Mapping[str, QuadraticModel],
    measured: pd.DataFrame,
    baselines: pd.DataFrame | None = None,
    remainders: pd.DataFrame | None = None,
) -> Scorecard:
    """Score what `expand` predicted against what `measure` measured.

    Parameters
    ----------
    models : {domain: QuadraticModel} of one objective.
    measured : the table of `measure` for the same objective; rows without a measured change are left out.
    baselines : optional columns update_norm, update_cosine, gradient_cosine, kl by (domain, update).
    remainders : optional table of `remainder` (alphas up to 0.5 predict): adds the third order and intervals with truncation.

    Raises InputError for models of several objectives, and when no cell is both predicted and measured.
    """
    kinds = {m.objective for m in models.values()}
    if len(kinds) != 1:
        raise InputError(
            got=f"models of objectives {sorted(kinds)}",
            expected="one objective",
            remedy="evaluate each by itself",
        )
    cells = cell_table(models, measured, baselines, remainders)
    if not cells["measured"].notna().any():
        raise InputError(
            got="no cell that is both predicted and measured",
            expected="a measured table with the (domain, update) names of the models",
            remedy="call measure with the same updates and domains",
        )
    return score_table(cells, kinds.pop())


def score_table(cells: pd.DataFrame, objective: str) -> Scorecard:
    """The scorecard of a cell table, over its measured cells."""
    known = cells[cells["measured"].notna()]
    rows = []
    for where, part in (("all", known), ("off_diagonal", known[~known["own"].astype(bool)])):
        if len(part):
            ours = [p for p in COLUMNS if p in PREDICTORS or cells[COLUMNS[p]].notna().any()]
            rows += [{"where": where, "predictor": p, **scores(part, p, objective)} for p in (*ours, *BASELINES)]
    return Scorecard(objective, cells, pd.DataFrame(rows))


def scores(cells: pd.DataFrame, predictor: str, objective: str) -> dict[str, Any]:
    """All metrics of one predictor over measured cells."""
    y = cells["measured"].to_numpy(float)
    ours = predictor in COLUMNS
    column, sign = (COLUMNS[predictor], 1.0) if ours else (predictor, orientation(predictor, objective))
    x = sign * cells[column].to_numpy(float)
    detectable = cells["detectable"].to_numpy(bool)
    out: dict[str, Any] = {
        "cells": len(cells),
        "cells_detectable": int(detectable.sum()),
        "calibrated": not ours,
    }
    if not np.isfinite(x).all():
        defined = np.isfinite(x)
        if 3 <= defined.sum() < len(x):  # a baseline is scored where it exists; `cells` says on how many
            return scores(cells[defined], predictor, objective)
        nothing = (
            "spearman",
            "spearman_low",
            "spearman_high",
            "pearson",
            "sign_accuracy",
            "slope",
            "intercept",
            "r2",
            "coverage",
            "coverage_truncation",
        )
        return out | dict.fromkeys(nothing, float("nan"))
    slope, intercept = _line(x, y)
    fitted, half = (x, None) if ours else statistics.leave_one_out_line(x, y)
    spread = float(((y - y.mean()) ** 2).sum())
    covered = (
        cells[f"covered_{predictor}"].dropna().astype(bool).to_numpy()
        if ours
        else np.abs(y - fitted) <= np.asarray(half)
    )
    enough = ours or len(x) >= 5
    low, high = _rank_interval(cells, predictor, x)
    return out | {
        "spearman": statistics.correlation(stats.spearmanr, x, y),
        "spearman_low": low,
        "spearman_high": high,
        "pearson": statistics.correlation(stats.pearsonr, x, y),
        "sign_accuracy": float((np.sign(x) == np.sign(y))[detectable].mean()) if detectable.any() else float("nan"),
        "slope": slope,
        "intercept": intercept,
        "r2": 1 - float(((y - fitted) ** 2).sum()) / spread if spread > 0 and enough else float("nan"),
        "coverage": float(covered.mean()) if len(covered) and enough else float("nan"),
        "coverage_truncation": _share(cells, f"covered_truncation_{predictor}"),
    }


def _share(cells: pd.DataFrame, column: str) -> float:
    """Share of true among the known; NaN where nothing is known."""
    known = cells[column].dropna().astype(bool) if column in cells else pd.Series(dtype=bool)
    return float(known.mean()) if len(known) else float("nan")


def orientation(baseline: str, objective: str) -> float:
    """+1 or -1, so that a larger baseline predicts a larger change of the objective."""
    hurts = 1.0 if OBJECTIVES[objective].better == "lower" else -1.0
    return -hurts if baseline in _HELPS else hurts


def _line(x: Array, y: Array) -> tuple[float, float]:
    if len(x) < 2 or np.ptp(x) == 0:
        return float("nan"), float("nan")
    fit = stats.linregress(x, y)
    return float(fit.slope), float(fit.intercept)


def _rank_interval(cells: pd.DataFrame, predictor: str, x: Array) -> tuple[float, float]:
    """90 % interval of Spearman when prompts are resampled: in the measured changes and, for ours, in the predictions."""
    if len(cells) < 3:
        return float("nan"), float("nan")
    y = np.stack(list(cells["replicates_measured"]), axis=1)
    xs = (
        np.stack(list(cells[f"replicates_{predictor}"]), axis=1)
        if predictor in COLUMNS
        else np.broadcast_to(x, y.shape)
    )
    drawn = np.isfinite(y).all(axis=1) & np.isfinite(xs).all(axis=1)
    if not drawn.any() or np.ptp(x) == 0:
        return float("nan"), float("nan")
    ranks = [stats.rankdata(v[drawn], axis=1) for v in (xs, y)]
    centred = [r - r.mean(axis=1, keepdims=True) for r in ranks]
    with np.errstate(invalid="ignore"):
        rho = (centred[0] * centred[1]).sum(1) / np.sqrt((centred[0] ** 2).sum(1) * (centred[1] ** 2).sum(1))
    return statistics.interval(rho)
