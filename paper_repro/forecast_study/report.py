"""The study's committed tables, from the tables of all finished set-ups."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from interference import records
from interference.errors import InputError
from interference.evaluation import number
from paper_repro.forecast_study import score
from paper_repro.forecast_study.decisions import (
    MIX_PLANS,
    MIXES,
    ORDERS,
    decision_table,
    decisions,
    mix_picks,
    mix_scores,
)
from paper_repro.forecast_study.setups import find

SET_UP_TABLES = ("cells", "updates", "costs", "ceiling")
ADDED = {"orders": ORDERS, "mixes": MIXES, "mix_plans": MIX_PLANS}
"""Tables of the set-ups that have them, and their columns."""
THRESHOLDS: tuple[tuple[str, str, float, float, str], ...] = (
    ("second_order", "spearman", 0.97, 1.0, "nominal"),
    ("second_order", "slope", 0.9, 1.1, "local"),
    ("second_order", "coverage", 0.85, 0.95, "nominal"),
    *((tier, metric, low, high, "nominal") for tier, least in (("virtual", 0.93), ("pilot", 0.95)) for metric, low, high in (
        ("spearman", least, 1.0), ("pearson", 0.97, 1.0), ("sign_accuracy", 0.95, 1.0), ("slope", 0.85, 1.15),
    )),
    ("gradient", "spearman", 0.90, 1.0, "nominal"),
    *((tier, "own_error", 0.0, score.OWN_TOLERANCE, "nominal") for tier in score.FORECASTS),
    ("gradient", "share_cpu", 0.0, 0.05, "cost"),
    ("virtual", "share_cpu", 0.0, 0.25, "cost"),
    ("virtual", "regret", 0.0, 0.01, "orders"),
)  # fmt: skip
"""(predictor, metric, least, most, where): what the study must show on held-out set-ups (protocol.md)."""


def collect(out: Path, names: Sequence[str] | None, role: str | None) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
    """The tables of finished set-ups, one under the other (those of `ADDED` where there are any), and {unfinished: why}.

    Raises:
        InputError: none of the set-ups asked for is finished.
    """
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in (*SET_UP_TABLES, *ADDED)}
    unfinished = {}
    for setup in find(list(names) if names else None, role):
        folder = out / setup.name
        if not (folder / "result" / "result.json").is_file():
            stopped = folder / "stopped.json"
            unfinished[setup.name] = str(records.read_json(stopped)["error"]) if stopped.is_file() else "not finished"
            continue
        for name in SET_UP_TABLES:
            parts[name].append(pd.read_parquet(folder / "result" / f"{name}.parquet"))
        for name, columns in ADDED.items():
            if (folder / f"{name}.csv").is_file():
                parts[name].append(pd.read_csv(folder / f"{name}.csv")[list(columns)])
    if not parts["cells"]:
        raise InputError(
            got=f"no finished set-up in {out} ({', '.join(unfinished)})",
            expected="at least one",
            remedy="run `python -m paper_repro.forecast_study run` first; it goes on where it stopped",
        )
    tables = {name: pd.concat(found, ignore_index=True) for name, found in parts.items() if found}
    return tables, unfinished


def tables_of(found: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Every table of the study, from those of its set-ups."""
    cells, orientations = score.oriented(found["cells"])
    nominal = cells[cells["nominal"].astype(bool)]
    inside = score.local(nominal)
    picks = decisions(nominal, found.get("orders"))
    added = {name: found[name] for name in ADDED if name in found}
    if "mixes" in found:
        picks = pd.concat([picks, mix_picks(found["mixes"])], ignore_index=True)
        added["mix_scores"] = mix_scores(found["mixes"])
    tables = {
        "scoreboard": score.by_role(nominal, lambda part: score.Pooled(part).table()),
        "scoreboard_local": score.by_role(inside, lambda part: score.Pooled(part).table()),
        "differences": score.by_role(nominal, lambda part: score.Pooled(part).differences()),
        "setups": score.per_setup(nominal, ("role", "setup")),
        "by_length": _with_warnings(score.per_setup(cells, ("role", "setup", "length")), cells, found["updates"]),
        "by_tokens": _by_tokens(nominal, found["updates"]),
        "decisions": decision_table(picks),
        "picks": picks,
        **{name: found[name] for name in ("updates", "costs", "ceiling")},
        **added,
        "orientations": orientations,
        "cells": cells,
    }
    tables["thresholds"] = thresholds(tables)
    return tables


def _with_warnings(table: pd.DataFrame, cells: pd.DataFrame, updates: pd.DataFrame) -> pd.DataFrame:
    """Beside each matrix's scores: effective share of sequences, agreement of the halves, and cosine to the real update."""
    keys = ["role", "setup", "length", "predictor"]
    warned = cells.groupby(keys, sort=False).agg(
        ess_median=("ess", "median"), ess_least=("ess", "min"), agreement_least=("agreement", "min")
    )
    made = updates.rename(columns={"tier": "predictor"}).groupby(keys, sort=False)
    real = made.agg(cosine=("cosine", "mean"), length_ratio=("length_ratio", "mean"))
    return table.merge(warned.reset_index(), on=keys, how="left").merge(real.reset_index(), on=keys, how="left")


def _by_tokens(nominal: pd.DataFrame, updates: pd.DataFrame) -> pd.DataFrame:
    """The set-ups at their nominal lengths, ordered by the tokens of their longest responses."""
    tokens = nominal.drop_duplicates("setup").set_index("setup")["tokens"]
    table = _with_warnings(score.per_setup(nominal, ("role", "setup", "length")), nominal, updates)
    table.insert(0, "tokens", table["setup"].map(tokens))
    return table.sort_values(["tokens", "setup"], kind="stable", ignore_index=True)


def thresholds(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """What must be shown, beside what was found: one row per role and threshold, `met` by the point estimate."""
    rows = []
    for role in tables["scoreboard"]["role"].unique():
        for predictor, metric, least, most, where in THRESHOLDS:
            value, low, high = _found(tables, str(role), predictor, metric, where)
            if where == "orders" and np.isnan(value):
                continue  # this role has none that were measured
            row = {"role": role, "predictor": predictor, "metric": metric, "where": where, "least": least, "most": most}
            rows.append({**row, "value": value, "low": low, "high": high, "met": bool(least <= value <= most)})
    return pd.DataFrame(rows)


def _found(
    tables: dict[str, pd.DataFrame], role: str, predictor: str, metric: str, where: str
) -> tuple[float, float, float]:
    if where == "cost":
        costs = tables["costs"]
        shares = costs.loc[(costs["role"] == role) & (costs["tier"] == predictor), metric]
        return float(shares.median()), float(shares.min()), float(shares.max())
    if where == "orders":
        picks = tables["picks"]
        found = picks.loc[
            (picks["role"] == role) & (picks["predictor"] == predictor) & (picks["kind"] == "order"), metric
        ]
        return float(found.mean()), float(found.min()), float(found.max())
    table = tables["scoreboard_local" if where == "local" else "scoreboard"]
    row = table[(table["role"] == role) & (table["predictor"] == predictor)]
    if row.empty:
        return float("nan"), float("nan"), float("nan")
    value, low, high = (float(row[f"{metric}{end}"].iloc[0]) for end in ("", "_low", "_high"))
    return value, low, high


def write_results(
    out: Path, results: Path, *, names: Sequence[str] | None, role: str | None, command: str
) -> dict[str, pd.DataFrame]:
    """Write every table as CSV into `results`, and `study.json`: the scores, what made them, and what is not finished.

    Raises InputError as `collect` does.
    """
    found, unfinished = collect(out, names, role)
    tables = tables_of(found)
    for name, table in tables.items():
        floats = table.select_dtypes("number").columns
        rounded = table.assign(**{c: [_rounded(v) for v in table[c]] for c in floats})
        records.write_text(results / f"{name}.csv", rounded.to_csv(index=False))
    short = ("scoreboard", "differences", "thresholds", "decisions")
    records.write_json(
        results / "study.json",
        {
            "command": command,
            "provenance": records.provenance(),
            "setups": {row["setup"]: row["role"] for row in _records(tables["setups"])},
            "made_by": _commits(out, list(tables["setups"]["setup"].unique())),
            "unfinished": unfinished,
            "seeds": _seeds(tables["cells"]),
            **{name: _records(tables[name]) for name in short},
        },
    )
    return tables


def _rounded(value: float) -> float:
    """To five digits: a table is to be read, and compared with `git diff`."""
    return float(f"{value:.5g}") if np.isfinite(value) else value


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): number(v) for k, v in row.items()} for row in table.to_dict(orient="records")]


def _commits(out: Path, setups: Sequence[str]) -> dict[str, list[str]]:
    """{set-up: the commits that its stages were made with, "+" where files had changed since}."""
    found = {}
    for name in setups:
        made = [records.read_json(path)["git"] for path in sorted((out / name / "records").glob("*.json"))]
        found[name] = sorted({git["sha"][:12] + "+" * git["dirty"] for git in made if git})
    return found


def _seeds(cells: pd.DataFrame) -> dict[str, list[int]]:
    return {str(name): sorted(map(int, part["training_seed"].unique())) for name, part in cells.groupby("setup")}
