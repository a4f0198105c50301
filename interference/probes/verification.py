"""Scores of a judge against the verifiable reward, each beside its chance level, with intervals over prompts.

Label: y_i = 1 when the reward of trajectory i is at least the threshold (0.5 unless given). Verdict: v_i in [0, 1], the share
of "correct" among the judge's verdicts on it. All sums run over trajectories whose verdict could be read; the share of verdicts
that could not be is `unparsable`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from interference import statistics
from interference.errors import InputError
from interference.probes.trajectories import CORRECT
from interference.probes.verdicts import Judged

Array = NDArray[np.float64]

METRICS = (
    *("base_rate", "yes_rate", "accuracy", "balanced_accuracy", "tpr", "tnr", "auroc", "within_prompt_auroc"),
    *("brier", "calibration_gap"),
)
_RATES = ("base_rate", "yes_rate", "accuracy", "tpr", "tnr")
WITHIN = "within_prompt_auroc"
_POOLED = tuple(metric for metric in METRICS if metric != WITHIN)
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Estimate:
    """A number with its 90 % interval, its value for verdicts independent of the reward, and why it or its interval is NaN."""

    value: float
    low: float
    high: float
    stderr: float
    chance: float
    reason: str = ""
    replicates: Array = field(repr=False, default_factory=lambda: np.full(statistics.REPLICATES, np.nan))


@dataclass(frozen=True)
class JudgeScores:
    """Scores of one judge on one set of trajectories, by name (see `score`)."""

    estimates: dict[str, Estimate]
    trajectories: int
    prompts: int
    unparsable: float
    threshold: float
    seed: int

    def __getitem__(self, metric: str) -> Estimate:
        return self.estimates[metric]

    def table(self, **labels: object) -> pd.DataFrame:
        """One row per metric: the labels, metric, value, low, high, stderr, chance, reason, and the counts."""
        counts = {"trajectories": self.trajectories, "prompts": self.prompts, "unparsable": self.unparsable}
        rows = []
        for metric, found in self.estimates.items():
            numbers = {name: getattr(found, name) for name in ("value", "low", "high", "stderr", "chance", "reason")}
            rows.append({**labels, "metric": metric, **numbers, **counts})
        return pd.DataFrame(rows)


def score(judged: Judged, *, threshold: float = CORRECT, seed: int = 0) -> JudgeScores:
    """Score verdicts against rewards.

    base_rate: mean y; yes_rate: mean v; accuracy: mean of v y + (1 - v)(1 - y), agreement with the reward; tpr: mean v of the
    correct; tnr: mean 1 - v of the wrong; balanced_accuracy: (tpr + tnr) / 2; auroc: the share of pairs (correct, wrong) whose
    scores are in that order, ties counting one half; within_prompt_auroc: the same of pairs of responses to one prompt, all such
    pairs alike, for which knowing how hard a prompt is does not help; brier: mean (p - y)^2 with p the
    judge's probability; calibration_gap: mean p - mean y.

    chance is the value that a judge of the same yes-rate (for brier: of the same probabilities) has when its verdicts are
    independent of the reward. An always-yes judge thus has the base rate as accuracy *and* as its chance. A judge that ignores
    the response is at chance only if it ignores the prompt too: one that knows which prompts are hard is above it by every
    metric but within_prompt_auroc.

    Intervals: percentiles of the bootstrap over prompts; replicates that drew one class alone are left out. Where a rate is 0
    or 1 in the sample the bootstrap has no width; then the far end is the Clopper-Pearson bound for as many prompts,
    (alpha/2)^(1/P). (For auroc and balanced_accuracy there is no such bound: no width there says that all prompts agree, not
    that the value is exact.) NaN with a reason where one class is missing and where no verdict can be read; intervals are NaN
    for a single prompt.
    """
    keep = np.array([v.yes == v.yes for v in judged.verdicts])  # NaN is not itself
    unread, drawn = sum(v.unparsable for v in judged.verdicts), sum(v.samples for v in judged.verdicts)
    values = [(v.yes, v.score, v.probability) for v, k in zip(judged.verdicts, keep, strict=True) if k]
    numbers = np.array(values, dtype=float).reshape(-1, 3)
    label = (np.asarray(judged.rewards)[keep] >= threshold).astype(float)
    ids = [p for p, k in zip(judged.prompt_ids, keep, strict=True) if k]
    distinct = list(dict.fromkeys(ids))
    if not ids:
        nothing = Estimate(np.nan, np.nan, np.nan, np.nan, np.nan, "no verdict could be read")
        return JudgeScores(dict.fromkeys(METRICS, nothing), 0, 0, unread / drawn, threshold, seed)
    values_all = measures(np.ones((1, len(ids))), label, numbers)
    replicates = _replicates(label, numbers, ids, distinct, seed)
    chances = _chance(label, numbers)
    values_all[WITHIN], replicates[WITHIN], lack = _within_prompts(label, numbers[:, 1], ids, seed)
    chances[WITHIN] = 0.5 if np.isfinite(values_all[WITHIN][0]) else np.nan
    reasons = {WITHIN: lack} | _reasons(label)
    estimates = {}
    for metric in METRICS:
        value, draws = float(values_all[metric][0]), replicates[metric]
        low, high = statistics.interval(draws)
        if metric in _RATES and low == high and value in (0.0, 1.0):
            low, high = _degenerate(value, _prompts_behind(metric, label, ids))
        spread = float(statistics.stderr(draws))
        estimates[metric] = Estimate(value, low, high, spread, chances[metric], reasons.get(metric, ""), draws)
    return JudgeScores(estimates, len(ids), len(distinct), unread / drawn, threshold, seed)


def difference(before: JudgeScores, after: JudgeScores, **labels: object) -> pd.DataFrame:
    """after - before of every metric: two modes, or a model before and after RL. One row per metric.

    Columns: the labels, metric, before, after, difference, low, high, stderr, excludes_zero (the 90 % interval does), reason.
    Prompts that both sets hold are paired by their ids; prompts of one set alone vary by themselves.

    Raises InputError when the two were scored with different seeds (nothing would be paired) or thresholds.
    """
    for name in ("seed", "threshold"):
        if getattr(before, name) != getattr(after, name):
            raise InputError(
                got=f"scores of {name} {getattr(before, name)} and {getattr(after, name)}",
                expected=f"one {name}, so that the two can be compared",
                remedy=f"score both with the same {name}",
            )
    rows = []
    for metric in METRICS:
        a, b = before[metric], after[metric]
        draws = b.replicates - a.replicates
        low, high = statistics.interval(draws)
        reason = "; ".join(f"{who}: {e.reason}" for who, e in (("before", a), ("after", b)) if e.reason)
        rows.append(
            {
                **labels, "metric": metric, "before": a.value, "after": b.value, "difference": b.value - a.value,
                "low": low, "high": high, "stderr": float(statistics.stderr(draws)),
                "excludes_zero": bool(low > 0 or high < 0), "reason": reason,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def measures(weights: Array, label: Array, numbers: Array) -> dict[str, Array]:
    """Every metric but within_prompt_auroc for every row of weights (B, N).

    label (N,) is 0 or 1; numbers (N, 3): yes, score, probability.
    """
    yes, ranks, probability = numbers.T
    total, positive = weights.sum(1), weights @ label
    negative = total - positive
    mean = lambda values, of: _divide(weights @ values, of)  # noqa: E731
    tpr, tnr = mean(label * yes, positive), mean((1 - label) * (1 - yes), negative)
    return {
        "base_rate": _divide(positive, total),
        "yes_rate": mean(yes, total),
        "accuracy": mean(label * yes + (1 - label) * (1 - yes), total),
        "balanced_accuracy": (tpr + tnr) / 2,
        "tpr": tpr,
        "tnr": tnr,
        "auroc": auroc(weights, label, ranks),
        "brier": mean((probability - label) ** 2, total),
        "calibration_gap": mean(probability - label, total),
    }


def auroc(weights: Array, label: Array, ranks: Array) -> Array:
    """Weighted area under the ROC curve for every row of weights (B, N): the Mann-Whitney statistic, ties one half.

    sum over pairs (i correct, j wrong) of w_i w_j ([s_i > s_j] + [s_i = s_j] / 2), over the sum of w_i w_j; NaN where one
    class has no weight.

    >>> auroc(np.ones((1, 4)), np.array([1.0, 1, 0, 0]), np.array([2.0, 1, 1, 0])).tolist()
    [0.875]
    """
    order = np.argsort(ranks, kind="stable")
    levels = ranks[order]
    starts = np.flatnonzero(np.r_[True, levels[1:] != levels[:-1]])
    right = np.add.reduceat((weights * label)[:, order], starts, axis=1)
    wrong = np.add.reduceat((weights * (1 - label))[:, order], starts, axis=1)
    below = np.cumsum(wrong, axis=1) - wrong
    return _divide((right * (below + wrong / 2)).sum(1), right.sum(1) * wrong.sum(1))


def _within_prompts(label: Array, ranks: Array, ids: Sequence[str], seed: int) -> tuple[Array, Array, str]:
    """Ordered pairs of responses to one prompt over such pairs: the value (1,), replicates over prompts, and what is lacking."""
    ordered, pairs, behind = [], [], []
    for name in dict.fromkeys(ids):
        here = np.array([other == name for other in ids])
        right, wrong = label[here].sum(), (1 - label[here]).sum()
        if right and wrong:
            ordered.append(float(auroc(np.ones((1, int(here.sum()))), label[here], ranks[here])[0] * right * wrong))
            pairs.append(float(right * wrong))
            behind.append(name)
    if not behind:
        nothing = np.full(statistics.REPLICATES, np.nan)
        return np.full(1, np.nan), nothing, "no prompt has both correct and wrong responses"
    replicates = statistics.ratio_replicates(np.array(ordered), np.array(pairs), behind, seed)
    lack = "one prompt alone has both correct and wrong responses, so no interval" if len(behind) == 1 else ""
    return np.array([sum(ordered) / sum(pairs)]), replicates, lack


def _divide(a: Array, b: Array) -> Array:
    return np.where(b > 0, a / np.where(b > 0, b, 1.0), np.nan)


def _replicates(
    label: Array, numbers: Array, ids: Sequence[str], distinct: Sequence[str], seed: int
) -> dict[str, Array]:
    if len(distinct) < 2:
        return dict.fromkeys(_POOLED, np.full(statistics.REPLICATES, np.nan))
    place = {name: i for i, name in enumerate(distinct)}
    where = [place[name] for name in ids]
    weights = statistics.prompt_weights(distinct, seed)
    rows = max(1, _CHUNK // len(ids))
    parts = [measures(weights[i : i + rows][:, where], label, numbers) for i in range(0, len(weights), rows)]
    return {metric: np.concatenate([part[metric] for part in parts]) for metric in _POOLED}


def _chance(label: Array, numbers: Array) -> dict[str, float]:
    base, yes, p = float(label.mean()), float(numbers[:, 0].mean()), numbers[:, 2]
    both = 0 < base < 1
    known = {
        "accuracy": base * yes + (1 - base) * (1 - yes),
        "tpr": yes if base > 0 else np.nan,
        "tnr": 1 - yes if base < 1 else np.nan,
        "balanced_accuracy": 0.5 if both else np.nan,
        "auroc": 0.5 if both else np.nan,
        "brier": float((p**2).mean() - 2 * p.mean() * base + base),
    }
    return {metric: float(known.get(metric, np.nan)) for metric in METRICS}


def _reasons(label: Array) -> dict[str, str]:
    """Why metrics are NaN when a class is missing."""
    if 0 < label.mean() < 1:
        return {}
    kind, lone = ("correct", "tnr") if label.mean() == 1 else ("wrong", "tpr")
    return dict.fromkeys(("balanced_accuracy", "auroc", WITHIN, lone), f"all {len(label)} trajectories are {kind}")


def _prompts_behind(metric: str, label: Array, ids: Sequence[str]) -> int:
    classes = {"tpr": (1.0,), "tnr": (0.0,)}.get(metric, (0.0, 1.0))
    return len({name for name, y in zip(ids, label, strict=True) if y in classes})


def _degenerate(value: float, prompts: int) -> tuple[float, float]:
    reach = ((1 - statistics.LEVEL) / 2) ** (1 / prompts)
    return (reach, 1.0) if value == 1.0 else (0.0, 1 - reach)
