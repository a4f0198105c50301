"""cells: one row per (update, domain), what was predicted, measured and left out, with error bars."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from interference import statistics, truncation
from interference.quadratic import QuadraticModel

Array = NDArray[np.float64]
PREDICTORS = {  # name: order of QuadraticModel.predict, column of the cell table
    "second_order": ("second", "predicted_second"),
    "second_order_ggn": ("ggn", "predicted_second_ggn"),
    "first_order": ("first", "predicted_first"),
}
THIRD = "third_order"
"""The second order plus the remainder predicted from small alpha; scored where `remainders` were given."""

COLUMNS = {name: column for name, (_, column) in PREDICTORS.items()} | {THIRD: "predicted_third"}
TRUNCATED = ("second_order", THIRD)
"""Predictors with an interval that holds truncation as well as sampling noise."""

REMAINDER = (
    *("third", "third_stderr", "third_misfit", "fourth", "fourth_stderr"),
    *("truncation", "truncation_stderr", "truncation_misfit", "remainder", "remainder_stderr"),
    *("radius", "radius_reason", "radius_judged", "beyond_radius"),
)
"""Columns of `remainder` that the cells carry on."""

BASELINES = ("update_norm", "update_cosine", "gradient_cosine", "kl")


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table's rows as dictionaries with string keys."""
    return [{str(k): v for k, v in row.items()} for row in table.to_dict("records")]


def cell_table(
    models: Mapping[str, QuadraticModel],
    measured: pd.DataFrame | None,
    baselines: pd.DataFrame | None = None,
    remainders: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """One row per (update, domain): predicted, measured, residual, remainder and baselines, with error bars.

    low, high, residual_low, residual_high are intervals of sampling noise; with the suffix _total they hold what the second
    order leaves out, too, as predicted from small alpha. The columns `replicates_*` hold bootstrap replicates (paired over
    prompts), for scores that need them.
    """
    rows = []
    for domain, model in models.items():
        for update in model.names:
            row = _predicted(model, domain, update)
            row |= _truncated(row, remainders)
            if measured is not None:
                found = measured[(measured["domain"] == domain) & (measured["update"] == update)]
                if len(found):
                    row |= _residual(row, records(found)[0])
            rows.append(row)
    cells = pd.DataFrame(rows)
    for column in (
        "after",
        "measured",
        "measured_stderr",
        "residual_stderr",
        "residual_low",
        "residual_high",
        "residual_low_total",
        "residual_high_total",
    ):
        if column not in cells:
            cells[column] = np.nan
    if "detectable" not in cells:
        cells["detectable"] = None
    if baselines is None:
        return cells.assign(**dict.fromkeys(BASELINES, np.nan))
    return cells.merge(baselines[["domain", "update", *BASELINES]], on=["domain", "update"], how="left")


def _predicted(model: QuadraticModel, domain: str, update: str) -> dict[str, Any]:
    replicates = {p: model.predict({update: 1.0}, order).replicates for p, (order, _) in PREDICTORS.items()}
    return {
        **records(model.to_frame().query("update == @update"))[0],
        "own": update == domain,
        "prompts": model.prompts,
        "sequences": len(model.prompt_ids),
        "before": model.value,
        **{f"replicates_{predictor}": draws for predictor, draws in replicates.items()},
    }


def _truncated(row: dict[str, Any], remainders: pd.DataFrame | None) -> dict[str, Any]:
    """What a remainder adds to a cell; NaN where it is not known."""
    out: dict[str, Any] = dict.fromkeys(("predicted_third", "low_total", "high_total"), np.nan)
    known = remainders if remainders is not None else pd.DataFrame(columns=["domain", "update"])
    found = records(known[(known["domain"] == row["domain"]) & (known["update"] == row["update"])])
    if not found:
        return {**dict.fromkeys(REMAINDER, np.nan), "radius_reason": "none", "beyond_radius": None, **out}
    rest = {c: found[0][c] for c in REMAINDER} | {"replicates_truncation": found[0]["replicates_truncation"]}
    if np.isfinite(rest["truncation"]):
        second, draws = row["replicates_second_order"], np.asarray(rest["replicates_truncation"])
        low, high = truncation.widened(second, draws, rest["truncation_misfit"])
        out = {"predicted_third": row["predicted_second"] + rest["truncation"], "low_total": low, "high_total": high}
        rest[f"replicates_{THIRD}"] = second + draws
    return rest | out


def _residual(row: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What measuring adds to a cell. Each predictor's residual interval is centred by its own paired replicates."""
    out = {
        "before": found["before"],
        "after": found["after"],
        "measured": found["delta"],
        "measured_stderr": found["stderr"],
        "detectable": bool(abs(found["delta"]) > statistics.Z * found["stderr"]),
        "replicates_measured": found["replicates"],
    }
    for predictor in PREDICTORS:
        difference = np.asarray(found["replicates"]) - row[f"replicates_{predictor}"]
        low, high = statistics.interval(difference)
        out[f"covered_{predictor}"] = _holds_zero(low, high)
        if predictor == "second_order":
            out |= {
                "residual_stderr": float(statistics.stderr(difference)),
                "residual_low": low,
                "residual_high": high,
            }
    if f"replicates_{THIRD}" in row:
        out |= _truncated_residual(row, np.asarray(found["replicates"]))
    return out


def _truncated_residual(row: dict[str, Any], measured: Array) -> dict[str, Any]:
    """The intervals of measured - predicted that hold truncation, of the second and the third order."""
    residual, draws = measured - row["replicates_second_order"], np.asarray(row["replicates_truncation"])
    bounds = {p: truncation.widened(residual, -draws, row["truncation_misfit"], second=p != THIRD) for p in TRUNCATED}
    out: dict[str, Any] = {f"covered_truncation_{p}": _holds_zero(*ends) for p, ends in bounds.items()}
    out[f"covered_{THIRD}"] = _holds_zero(*statistics.interval(residual - draws))
    out["residual_low_total"], out["residual_high_total"] = bounds["second_order"]
    return out


def _holds_zero(low: float, high: float) -> bool | None:
    return bool(low <= 0 <= high) if np.isfinite(low) else None
