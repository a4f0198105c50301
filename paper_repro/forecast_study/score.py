"""Scores of predictors over set-ups: sums within each matrix, pooled, with bootstrap intervals over set-ups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from interference.statistics import LEVEL, Z

Array = NDArray[np.float64]
FORECASTS = ("gradient", "virtual", "pilot")
KNOWN = ("second_order", "second_order_ggn", "importance", "first_order")
BASELINES = ("first_order", "gradient_cosine", "update_cosine", "update_norm", "subspace_overlap", "kl")
PREDICTORS = (*FORECASTS, *KNOWN, *BASELINES[1:])
UNITLESS = BASELINES[1:]
MATRIX = ["setup", "training_seed", "length"]
METRICS = ("spearman", "pearson", "sign_accuracy", "slope", "coverage", "own_error", "own_within")
OWN_TOLERANCE = 0.05
DRAWS = 2000

_SUMS = (
    *("cells", "rank_xx", "rank_yy", "rank_xy", "unit_xx", "unit_yy", "unit_xy", "raw_xx", "raw_yy", "raw_xy"),
    *("sign_cells", "sign_right", "covered_cells", "covered", "own_cells", "own_error", "own_within"),
)


def matrix_sums(matrix: pd.DataFrame) -> dict[str, float]:
    """What one measured matrix adds to a predictor's scores; everything pooled is made of sums of these.

    matrix: the cells of one predictor, with own, predicted, measured, measured_stderr, error_stderr.
    """
    out = dict.fromkeys(_SUMS, 0.0)
    matrix = matrix[np.isfinite(matrix["predicted"]) & np.isfinite(matrix["measured"])]
    off, own = matrix[~matrix["own"].astype(bool)], matrix[matrix["own"].astype(bool)]
    x, y = off["predicted"].to_numpy(float), off["measured"].to_numpy(float)
    out["cells"] = len(off)
    if len(off) > 2:
        unit = [_standardised(v) for v in (x, y)]
        ranks = [(stats.rankdata(v) - (len(v) + 1) / 2) / len(v) for v in (x, y)]
        for name, (a, b) in {"rank": ranks, "unit": unit, "raw": (x - x.mean(), y - y.mean())}.items():
            out |= {f"{name}_xx": float(a @ a), f"{name}_yy": float(b @ b), f"{name}_xy": float(a @ b)}
    loud = np.abs(y) > Z * off["measured_stderr"].to_numpy(float)
    out["sign_cells"], out["sign_right"] = loud.sum(), (np.sign(x) == np.sign(y))[loud].sum()
    error = off["error_stderr"].to_numpy(float)
    known = np.isfinite(error)
    out["covered_cells"], out["covered"] = known.sum(), (np.abs(x - y) <= Z * error)[known].sum()
    wrong = np.abs(own["predicted"].to_numpy(float) - own["measured"].to_numpy(float))
    out |= {"own_cells": len(own), "own_error": wrong.sum(), "own_within": (wrong <= OWN_TOLERANCE).sum()}
    return {name: float(value) for name, value in out.items()}


def _standardised(values: Array) -> Array:
    spread = values.std()
    return (values - values.mean()) / spread if spread > 0 else np.zeros_like(values)


def sums(cells: pd.DataFrame, by: Sequence[str] = ("setup",)) -> pd.DataFrame:
    """`matrix_sums` of every predictor, added up over the matrices of each group in `by`; one row per (*by, predictor)."""
    keys = list(dict.fromkeys([*by, *MATRIX]))
    rows = [
        {**dict(zip([*keys, "predictor"], key, strict=True)), **matrix_sums(part)}
        for key, part in cells.groupby([*keys, "predictor"], sort=False)
    ]
    return pd.DataFrame(rows).groupby([*by, "predictor"], sort=False)[list(_SUMS)].sum().reset_index()


def metrics(total: Mapping[str, Array]) -> dict[str, Array]:
    """{metric: value} of sums, elementwise; NaN where nothing defines it."""

    def share(part: str, whole: str) -> Array:
        return _ratio(total[part], total[whole])

    def correlation(name: str) -> Array:
        return _ratio(total[f"{name}_xy"], np.sqrt(total[f"{name}_xx"] * total[f"{name}_yy"]))

    return {
        "spearman": correlation("rank"),
        "pearson": correlation("unit"),
        "sign_accuracy": share("sign_right", "sign_cells"),
        "slope": share("raw_xy", "raw_xx"),
        "coverage": share("covered", "covered_cells"),
        "own_error": share("own_error", "own_cells"),
        "own_within": share("own_within", "own_cells"),
    }


def _ratio(a: Array, b: Array) -> Array:
    a, b = np.asarray(a, float), np.asarray(b, float)
    return np.where(b > 0, a / np.where(b > 0, b, 1.0), np.nan)


def per_setup(cells: pd.DataFrame, by: Sequence[str] = ("setup",)) -> pd.DataFrame:
    """Every metric of every predictor in each group; one row per (*by, predictor)."""
    found = sums(cells, by)
    table = found[[*by, "predictor"]].assign(cells=found["cells"].astype(int), **_scores(found))
    return _without_units(table)


def _scores(found: pd.DataFrame) -> dict[str, Array]:
    return metrics({name: found[name].to_numpy(float) for name in _SUMS})


def _without_units(table: pd.DataFrame) -> pd.DataFrame:
    """Without the metrics that compare magnitudes, for predictors that have no unit of reward."""
    blank = [c for c in table.columns if c.startswith(("slope", "coverage", "own_"))]
    table.loc[table["predictor"].isin(UNITLESS), blank] = np.nan
    return table


class Pooled:
    """Scores pooled over set-ups, and in bootstrap draws of set-ups.

    The same draws serve every predictor, so that their differences are paired.
    """

    def __init__(self, cells: pd.DataFrame, draws: int = DRAWS, seed: int = 0):
        found = sums(cells)
        self.setups = list(dict.fromkeys(found["setup"]))
        self.predictors = [p for p in PREDICTORS if p in set(found["predictor"])]
        count = len(self.setups)
        weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
        self.value: dict[str, dict[str, float]] = {}
        self.drawn: dict[str, dict[str, Array]] = {}
        for predictor in self.predictors:
            part = found[found["predictor"] == predictor].set_index("setup").reindex(self.setups).fillna(0.0)
            each = {name: part[name].to_numpy(float) for name in _SUMS}
            self.value[predictor] = {k: float(v) for k, v in metrics({n: v.sum() for n, v in each.items()}).items()}
            self.drawn[predictor] = metrics({name: weights @ values for name, values in each.items()})

    def interval(self, replicates: Array) -> tuple[float, float]:
        """90 %, by percentiles; none for one set-up."""
        found = replicates[np.isfinite(replicates)]
        if len(self.setups) < 2 or not len(found):
            return float("nan"), float("nan")
        low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)

    def table(self) -> pd.DataFrame:
        """One row per predictor: every metric with its interval over set-ups."""
        rows = []
        for predictor in self.predictors:
            row: dict[str, object] = {"predictor": predictor, "setups": len(self.setups)}
            for metric in METRICS:
                low, high = self.interval(self.drawn[predictor][metric])
                row |= {metric: self.value[predictor][metric], f"{metric}_low": low, f"{metric}_high": high}
            rows.append(row)
        return _without_units(pd.DataFrame(rows))

    def differences(self, metric: str = "spearman") -> pd.DataFrame:
        """One row per (tier or known second order, baseline): how much better it is, with an interval over set-ups."""
        rows = []
        for ours in (*FORECASTS, "second_order"):
            for baseline in BASELINES:
                if ours not in self.predictors or baseline not in self.predictors:
                    continue
                value = self.value[ours][metric] - self.value[baseline][metric]
                low, high = self.interval(self.drawn[ours][metric] - self.drawn[baseline][metric])
                beats = bool(low > 0)
                row = {"predictor": ours, "baseline": baseline, "metric": metric, "difference": value}
                rows.append({**row, "low": low, "high": high, "beats": beats})
        return pd.DataFrame(rows)


def local(cells: pd.DataFrame, least: float = 0.3) -> pd.DataFrame:
    """The cells inside the local radius: an effective share of sequences of at least `least` (the own cells, too)."""
    return cells[cells["ess"].fillna(1.0) >= least]


def oriented(cells: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The cells with the sign of every baseline without a unit turned to what suits it best, and the signs by role.

    A baseline gets the sign of its pooled Spearman at nominal lengths over the very set-ups that it is scored on: in its favour.
    """
    rows = []
    factor = pd.Series(1.0, index=cells.index)
    for role, part in cells[cells["nominal"].astype(bool)].groupby("role", sort=False):
        pooled = Pooled(part, draws=1)
        for predictor in (p for p in UNITLESS if p in pooled.predictors):
            sign = -1.0 if pooled.value[predictor]["spearman"] < 0 else 1.0
            factor[(cells["role"] == role) & (cells["predictor"] == predictor)] = sign
            rows.append({"role": role, "predictor": predictor, "sign": sign})
    turned = cells.assign(predicted=cells["predicted"] * factor)
    return turned, pd.DataFrame(rows, columns=["role", "predictor", "sign"])


def by_role(cells: pd.DataFrame, score: Callable[[pd.DataFrame], pd.DataFrame]) -> pd.DataFrame:
    """A table of each role's cells by itself, one under the other."""
    parts = [score(part).assign(role=role) for role, part in cells.groupby("role", sort=False)]
    table = pd.concat(parts, ignore_index=True)
    return table[["role", *(c for c in table.columns if c != "role")]]
