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
smaller than the two errors together, since all plans are tried on the same prompts."""


def check_criterion(by: str) -> None:
    """Refuse what is neither "mean" nor "worst"."""
    if by not in CRITERIA:
        raise InputError(got=f"by {by!r}", expected="'mean' or 'worst'", remedy=nearest(by, CRITERIA))


def ranked(tables: Sequence[pd.DataFrame], labels: pd.DataFrame, objective: str, by: str = "mean") -> pd.DataFrame:
    """Plans best first: their labels (one row per table), `SCORES`, and the notes of their tables.

    tables: for every plan the change of every domain, with columns domain, predicted, replicates, note, and where its update
    is an estimate
      update_spread, half the difference of what its two estimates do (signed, as one update moves all domains; not a number where
        it is not known). Its root mean square over plans is the error that this adds, since one plan's two estimates are a
        single draw of it; of differences between plans, that of the differences, since plans share the halves of the prompts;
      own_noise, a real training's own noise over that of the estimate, as standard deviations: no two trainings share it;
      method_stderr, the method's own error, as if independent between domains, and alike for all plans in proportion to what
        they do.
    The worst domain's interval takes the worst of every replicate, so that it leans to the bad side of many equal domains.
    """
    check_criterion(by)
    sign = 1.0 if kind(objective).better == "higher" else -1.0
    gains = [sign * t["predicted"].to_numpy(float) for t in tables]
    draws = [sign * np.stack(list(t["replicates"])) for t in tables]
    worst = [int(g.argmin()) for g in gains]
    spreads, own, method = (_values(tables, c, worst) for c in ("update_spread", "own_noise", "method_stderr"))
    shifts = [np.sign(t["predicted"].to_numpy(float)) * _column(t, "method_stderr") for t in tables]
    noises = {what: _root_mean_square(spreads[what] * np.hypot(1, own[what])) for what in CRITERIA}
    scores = {"mean": [g.mean() for g in gains], "worst": [g.min() for g in gains]}
    replicates = {"mean": [d.mean(0) for d in draws], "worst": [d.min(0) for d in draws]}
    best = int(np.argmax(scores[by]))
    apart = _apart(spreads[by], own[by], best)
    rows = []
    for i, table in enumerate(tables):
        row: dict[str, object] = {}
        for what in CRITERIA:
            error = float(np.hypot(noises[what], method[what][i]))
            ends = [sign * x for x in _interval(scores[what][i], replicates[what][i], error)]
            row |= {what: sign * scores[what][i], f"{what}_low": min(ends), f"{what}_high": max(ends)}
        row["worst_domain"] = table["domain"].iloc[worst[i]]
        row["behind"] = scores[by][best] - scores[by][i]
        noise = float(statistics.stderr(replicates[by][best] - replicates[by][i]))
        off = shifts[i] - shifts[best]
        at_worst = shifts[i][worst[i]] - shifts[best][worst[best]]
        shift = float(np.linalg.norm(off) / len(off)) if by == "mean" else float(at_worst)
        row["behind_stderr"] = float(np.hypot(np.hypot(noise, apart), shift)) if i != best else 0.0
        rows.append(row | {"note": "; ".join(dict.fromkeys(n for n in table["note"] if n))})
    out = pd.concat([labels.reset_index(drop=True), pd.DataFrame(rows)], axis=1)
    return out.sort_values("behind", kind="stable", ignore_index=True)


def _interval(value: float, draws: Array, error: float) -> tuple[float, float]:
    """Percentiles, or a normal interval where the update's and the method's own error come in, too."""
    if not error:
        return statistics.interval(draws)
    width = Z * float(np.hypot(statistics.stderr(draws), error))
    return value - width, value + width


def _column(table: pd.DataFrame, name: str) -> Array:
    """Zeros where a table has no such column."""
    found = table[name] if name in table else 0.0 * table["predicted"]
    return np.asarray(found.to_numpy(float))


def _values(tables: Sequence[pd.DataFrame], name: str, worst: Sequence[int]) -> dict[str, Array]:
    """A column by plan, for the mean over domains and for the worst one."""
    found = [_column(t, name) for t in tables]
    independent = name == "method_stderr"  # between domains; one update moves all of them
    means = [float(np.linalg.norm(m) / len(m)) if independent else float(m.mean()) for m in found]
    return {"mean": np.array(means), "worst": np.array([m[i] for m, i in zip(found, worst, strict=True)])}


def _apart(spreads: Array, own: Array, best: int) -> float:
    """What the estimates, and the trainings' own noise, add to the error of differences to the best."""
    differences = np.delete(spreads - spreads[best], best)
    if not np.isfinite(differences).any():  # nothing is known of the best: as if estimates shared nothing
        differences = np.sqrt(2.0) * spreads
    return float(np.hypot(_root_mean_square(differences), np.sqrt(2.0) * _root_mean_square(spreads * own)))


def _root_mean_square(values: Array) -> float:
    """Of those that are known."""
    known = values[np.isfinite(values)]
    return float(np.sqrt(np.mean(known**2))) if len(known) else 0.0
