"""Verification horizon: a judge's scores as a function of how much of the trajectory it sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from interference.errors import InputError
from interference.probes.trajectories import CORRECT, Trajectory, first_tokens, rewards, token_count
from interference.probes.verdicts import Judge, Judged
from interference.probes.verification import difference, score

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)


def horizon(
    trajectories: Sequence[Trajectory],
    judge: Judge,
    tokenizer: Any,
    *,
    fractions: Sequence[float] = FRACTIONS,
    tokens: Sequence[int] = (),
    threshold: float = CORRECT,
    seed: int = 0,
    **labels: object,
) -> pd.DataFrame:
    """Score the judge on the first part of every trajectory against the reward of the whole.

    At fraction f a judge sees the first ceil(f T) of a response's T tokens; at a token count c, the first min(c, T): a
    response that is no longer than c is seen whole, and `complete` is the share of those. The chance level of a horizon is in
    `chance`; horizon 0, where only the prompt is seen, is the level of a judge that knows the task but not the attempt.

    Args:
        fractions: in [0, 1].  tokens: counts; when given, `fractions` are not used.

    Returns:
        One row per (horizon, metric): the labels, unit ("fraction" or "tokens"), horizon, mean_tokens, complete, the columns of
        `JudgeScores.table`; to_longest, to_longest_low, to_longest_high: the value at the longest horizon minus the value here,
        prompts paired; from_prompt and its ends: the value here minus that at horizon 0, NaN where 0 is none of the horizons.

    Raises InputError for missing rewards, no horizons, or horizons out of range.
    """
    unit, places = _horizons(fractions, tokens)
    known, ids = rewards(trajectories), tuple(t.prompt_id for t in trajectories)
    totals = [token_count(tokenizer, t.response) for t in trajectories]
    wanted = [[math.ceil(p * n - 1e-9) if unit == "fraction" else min(int(p), n) for p in places] for n in totals]
    shown = [first_tokens(tokenizer, t.response, counts) for t, counts in zip(trajectories, wanted, strict=True)]
    verdicts = judge(
        [t.shown(texts[i]) for i in range(len(places)) for t, texts in zip(trajectories, shown, strict=True)]
    )
    size = len(trajectories)
    found = [
        score(Judged(ids, tuple(known), tuple(verdicts[i * size : (i + 1) * size])), threshold=threshold, seed=seed)
        for i in range(len(places))
    ]
    parts = []
    for i, place in enumerate(places):
        seen = [counts[i] for counts in wanted]
        whole = sum(count == total for count, total in zip(seen, totals, strict=True)) / size
        here = {"unit": unit, "horizon": place, "mean_tokens": sum(seen) / size, "complete": whole}
        gap = difference(found[i], found[-1])
        table = found[i].table(**labels, **here)
        for column, source in (("to_longest", "difference"), ("to_longest_low", "low"), ("to_longest_high", "high")):
            table[column] = gap[source].to_numpy()
        gained = difference(found[0], found[i]) if places[0] == 0 else None
        for column, source in (("from_prompt", "difference"), ("from_prompt_low", "low"), ("from_prompt_high", "high")):
            table[column] = np.nan if gained is None else gained[source].to_numpy()
        parts.append(table)
    return pd.concat(parts, ignore_index=True)


def reach(table: pd.DataFrame, metric: str = "auroc") -> float | None:
    """The shortest horizon from which on the metric is above chance and above the judge's own value at horizon 0, beyond noise.

    None if there is none. A judge that knows only how hard a prompt is, is above chance without any of the response, so chance
    alone decides only where horizon 0 is not in the table.

    Raises InputError when the table has no such metric, or more than one curve of it.
    """
    rows = table[table["metric"] == metric].sort_values("horizon")
    if rows.empty or rows["horizon"].duplicated().any():
        raise InputError(
            got=f"{len(rows)} rows of {metric!r}" + (", horizons occurring twice" if len(rows) else ""),
            expected="one curve of that metric",
            remedy="give the rows of one judge, mode and domain of a table of `horizon`",
        )
    found = None
    better = rows["low"] > rows["chance"]
    if rows["horizon"].iloc[0] == 0:
        better &= rows["from_prompt_low"] > 0
    for place, above in reversed(list(zip(rows["horizon"], better, strict=True))):
        if not above:
            break
        found = float(place)
    return found


def _horizons(fractions: Sequence[float], tokens: Sequence[int]) -> tuple[str, list[float]]:
    unit, given = ("tokens", tokens) if len(tokens) else ("fraction", fractions)
    places = sorted({float(place) for place in given})
    top = math.inf if unit == "tokens" else 1.0
    odd = [place for place in places if not 0 <= place <= top or (unit == "tokens" and place != int(place))]
    if not places or odd:
        raise InputError(
            got=f"horizons {list(given)}",
            expected="whole numbers of tokens" if unit == "tokens" else "fractions from 0 to 1",
            remedy="mend the list of horizons",
        )
    return unit, places
