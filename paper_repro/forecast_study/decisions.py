"""How often a forecast picks what a user would have to decide: the worst-hurt domain, the pair not to mix, the order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from interference.statistics import Z, correlation
from paper_repro.forecast_study.score import MATRIX

ORDERS = (
    *("setup", "role", "training_seed", "length", "predictor", "order"),
    *("predicted", "predicted_stderr", "measured", "measured_stderr", "behind", "behind_stderr"),
)
"""Columns of a set-up's `orders.csv`.

length: optimizer steps on each domain.  predicted, measured: change of the average reward over domains, from the base to the
model after the last domain of the order.  behind: how much less was measured than for the order measured best, and the
standard error of this difference, prompts paired.
"""

MIXES = (
    *("setup", "role", "training_seed", "length", "kind", "plan", "single", "predictor", "domain"),
    *("predicted", "stderr", "ess", "measured", "measured_stderr"),
)
"""Columns of a set-up's `mixes.csv`: a row per plan, predictor and domain.

kind: "mixture" (trained on domains in equal shares) or "merge" (the base plus the sum or average of single trainings' updates).
single: a domain by itself, which is among the options of both.  predictor: "virtual" (virtual training on the mixture, or the
merge of virtual updates, tried), "virtual_averaged" (mixtures: the average of virtual updates, tried), "virtual_added" and
"gradient_added" (the tier's cells of single domains added with the plan's weights: never best for several domains by the mean).
"""
MIX_PLANS = (
    *("setup", "role", "training_seed", "length", "kind", "plan", "by"),
    *("predicted", "measured", "measured_stderr", "behind", "behind_stderr"),
)
"""Columns of a set-up's `mix_plans.csv`: a row per plan and criterion (by: "mean" over domains or the "worst" one), `virtual`'s
prediction beside what was measured; behind, behind_stderr as in `ORDERS`."""


def decisions(cells: pd.DataFrame, orders: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row per pick: kind ("worst_hurt", "pair", "order"), of (the training, or nothing), picked, best, and how good it is.

    right: the pick is what was measured to be best to know (the most hurt, the most harmful pair, the best order).
    regret: the difference of what was measured for the best and for the pick, never negative.
    chance, chance_regret: the same of a pick at random.  spread: between the best and the last of all that was measured.
    spearman: of the predicted with the measured values of all that there was to pick from.
    """
    rows: list[dict[str, Any]] = []
    keys = ["role", *MATRIX, "predictor"]
    for key, part in cells.groupby(keys, sort=False):
        about = dict(zip(keys, key, strict=True))
        names = list(dict.fromkeys(part["update"]))
        predicted, measured = (_matrix(part, column, names) for column in ("predicted", "measured"))
        if not np.isfinite(predicted).all():
            continue
        rows += [
            {**about, **pick} for pick in (*_worst_hurt(predicted, measured, names), _pair(predicted, measured, names))
        ]
    if orders is not None:
        for key, part in orders.groupby(keys, sort=False):
            values = part["predicted"].to_numpy(float), part["measured"].to_numpy(float)
            found = _pick("order", "", list(part["order"]), -values[0], -values[1])
            rows.append({**dict(zip(keys, key, strict=True)), **found})
    return pd.DataFrame(rows)


def decision_table(picks: pd.DataFrame) -> pd.DataFrame:
    """One row per (role, kind, predictor): share of right picks, mean and largest regret, chance, number of picks.

    The share is the mean over set-ups, and its standard error that of set-ups' shares. What else `decisions` says of a pick is
    averaged over picks.
    """
    rows = []
    for key, part in picks.groupby(["role", "kind", "predictor"], sort=False):
        shares = part.groupby("setup")["right"].mean()
        spread = float(shares.std(ddof=1) / np.sqrt(len(shares))) if len(shares) > 1 else float("nan")
        row = dict(zip(("role", "kind", "predictor"), key, strict=True))
        row |= {"right": float(shares.mean()), "right_stderr": spread, "chance": float(part["chance"].mean())}
        row |= {"regret": float(part["regret"].mean()), "largest_regret": float(part["regret"].max())}
        row |= {name: float(part[name].mean()) for name in ("chance_regret", "spread", "spearman")}
        rows.append(row | {"picks": len(part), "setups": len(shares)})
    return pd.DataFrame(rows)


def mix_picks(mixes: pd.DataFrame) -> pd.DataFrame:
    """Rows as of `decisions` for the pick of a mixture or merge, by the mean and by the worst domain's change.

    Their kinds are "mixture_mean", "mixture_worst", "merge_mean" and "merge_worst".
    """
    rows = []
    keys = ["role", *MATRIX, "predictor", "kind"]
    for key, part in mixes.groupby(keys, sort=False):
        about = dict(zip(keys, key, strict=True))
        plans = part.groupby("plan", sort=False)[["predicted", "measured"]]
        for by, values in (("mean", plans.mean()), ("worst", plans.min())):
            harms = [-found for found in _values(values)]
            rows.append({**about, **_pick(f"{about['kind']}_{by}", "", list(values.index), *harms)})
    return pd.DataFrame(rows)


def mix_scores(mixes: pd.DataFrame) -> pd.DataFrame:
    """How well the changes of every domain are told, one row per (role, set-up, kind, predictor), of plans with several domains.

    spearman, pearson: mean over domains of the correlation over plans.  slope: of measured on predicted, centred by domain.
    error: mean |predicted - measured|.  coverage: share within the 90 % interval of both errors, where there is one.
    """
    rows = []
    keys = ["role", "setup", "kind", "predictor"]
    for key, part in mixes[~mixes["single"].astype(bool)].groupby(keys, sort=False):
        row = dict(zip(keys, key, strict=True))
        domains = [d for _, d in part.groupby("domain", sort=False)]
        for name, measure in (("spearman", stats.spearmanr), ("pearson", stats.pearsonr)):
            row[name] = float(np.mean([correlation(measure, *_values(d)) for d in domains]))
        x, y = (part[c] - part.groupby("domain")[c].transform("mean") for c in ("predicted", "measured"))
        off = (part["predicted"] - part["measured"]).abs()
        held = off <= Z * np.hypot(part["stderr"], part["measured_stderr"])
        row |= {"slope": float((x * y).sum() / (x**2).sum()), "error": float(off.mean())}
        row["coverage"] = float(held.mean()) if part["stderr"].notna().all() else np.nan
        rows.append(row | {"least_ess": float(part["ess"].min()), "plans": int(part["plan"].nunique())})
    return pd.DataFrame(rows)


def _values(table: pd.DataFrame) -> list[Any]:
    return [table[column].to_numpy(float) for column in ("predicted", "measured")]


def _matrix(part: pd.DataFrame, column: str, names: list[str]) -> Any:
    table = part.pivot(index="update", columns="domain", values=column)  # noqa: PD010
    return table.loc[names, names].to_numpy(float)


def _worst_hurt(predicted: Any, measured: Any, names: list[str]) -> Iterator[dict[str, Any]]:
    for i, update in enumerate(names):
        others = [j for j in range(len(names)) if j != i]
        yield _pick("worst_hurt", update, [names[j] for j in others], predicted[i, others], measured[i, others])


def _pair(predicted: Any, measured: Any, names: list[str]) -> dict[str, Any]:
    pairs = list(combinations(range(len(names)), 2))
    both = [np.array([m[i, j] + m[j, i] for i, j in pairs]) for m in (predicted, measured)]
    return _pick("pair", "", [f"{names[i]}+{names[j]}" for i, j in pairs], *both)


def _pick(kind: str, of: str, names: list[str], predicted: Any, measured: Any) -> dict[str, Any]:
    """The lowest predicted against the lowest measured. Where several are predicted lowest, they count in equal parts."""
    lowest = np.flatnonzero(predicted == predicted.min())
    best = int(measured.argmin())
    return {
        "kind": kind,
        "of": of,
        "picked": names[int(lowest[0])],
        "best": names[best],
        "right": float((measured[lowest] == measured[best]).mean()),
        "regret": float((measured[lowest] - measured[best]).mean()),
        "chance": 1 / len(names),
        "chance_regret": float((measured - measured[best]).mean()),
        "spread": float(np.ptp(measured)),
        "spearman": correlation(stats.spearmanr, predicted, measured),
    }
