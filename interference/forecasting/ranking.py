"""Plans against each other: by the mean over domains and by the worst of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from interference import statistics
from interference.errors import InputError, nearest
from interference.objectives import kind
from interference.statistics import Array, Z

CRITERIA = ("mean", "worst")
SCORES = (
    "mean",
    "mean_low",
    "mean_high",
    "worst",
    "worst_low",
    "worst_high",
    "worst_domain",
    "behind",
    "behind_stderr",
)
"""What `ranked` says of a plan: the mean and the worst change over the domains with 90 % intervals, in the objective's unit; the
domain that is worst; and by how much the plan is behind the best (never negative), with the error of this difference, which is
smaller than the difference of two errors, since all plans are tried on the same prompts."""


def check_criterion(by: str) -> None:
    """Refuse what is neither "mean" nor "worst"."""
    if by not in CRITERIA:
        raise InputError(got=f"by {by!r}", expected="'mean' or 'worst'", remedy=nearest(by, CRITERIA))


def ranked(tables: Sequence[pd.DataFrame], labels: pd.DataFrame, objective: str, by: str = "mean") -> pd.DataFrame:
    """Plans best first: their labels (one row per table), `SCORES`, and the notes of their tables.

    tables: for every plan the change of every domain, with columns domain, predicted, replicates, note, and, where its update
    is an estimate, update_spread, the standard error that this adds (signed alike over domains, as one update moves all).
    The worst domain's interval takes the worst of every replicate, so that it leans to the bad side of many equal domains.
    """
    check_criterion(by)
    sign = 1.0 if kind(objective).better == "higher" else -1.0
    gains = [sign * t["predicted"].to_numpy(float) for t in tables]
    draws = [sign * np.stack(list(t["replicates"])) for t in tables]
    spreads = _spreads(tables, sign)
    scores = {"mean": [g.mean() for g in gains], "worst": [g.min() for g in gains]}
    replicates = {"mean": [d.mean(0) for d in draws], "worst": [d.min(0) for d in draws]}
    best = int(np.argmax(scores[by]))
    rows = []
    for i, (gain, table) in enumerate(zip(gains, tables, strict=True)):
        row: dict[str, object] = {}
        for what in CRITERIA:
            ends = [sign * x for x in _interval(scores[what][i], replicates[what][i], spreads[what])]
            row |= {what: sign * scores[what][i], f"{what}_low": min(ends), f"{what}_high": max(ends)}
        row["worst_domain"] = table["domain"].iloc[int(gain.argmin())]
        row["behind"] = scores[by][best] - scores[by][i]
        row["behind_stderr"] = float(statistics.stderr(replicates[by][best] - replicates[by][i]))
        rows.append(row | {"note": "; ".join(dict.fromkeys(n for n in table["note"] if n))})
    out = pd.concat([labels.reset_index(drop=True), pd.DataFrame(rows)], axis=1)
    return out.sort_values("behind", kind="stable", ignore_index=True)


def _interval(value: float, draws: Array, spread: float) -> tuple[float, float]:
    """Percentiles, or a normal interval where the update's own error comes in, too."""
    if not spread:
        return statistics.interval(draws)
    width = Z * float(np.hypot(statistics.stderr(draws), spread))
    return value - width, value + width


def _spreads(tables: Sequence[pd.DataFrame], sign: float) -> dict[str, float]:
    """Standard error from the updates' estimates of a plan's mean and worst: root mean squares over plans, since one plan's two
    estimates are a single draw of it."""
    if "update_spread" not in tables[0]:
        return dict.fromkeys(CRITERIA, 0.0)
    found = [t["update_spread"].to_numpy(float) for t in tables]
    worst = [s[int((sign * t["predicted"].to_numpy(float)).argmin())] for s, t in zip(found, tables, strict=True)]
    return {
        "mean": float(np.sqrt(np.mean([s.mean() ** 2 for s in found]))),
        "worst": float(np.sqrt(np.mean(np.square(worst)))),
    }
