"""The tables of a probe run's page about judges: rows of ready-made text."""

from __future__ import annotations

from typing import Any

import pandas as pd

from interference.report.behaviour_tables import beyond, by_domain, plain, table
from interference.report.numbers import NONE, count, interval, number, percent, score
from interference.report.tables import Table

MAIN = ("balanced_accuracy", "auroc", "within_prompt_auroc", "accuracy")
"""Scores of a judge that the page shows first; the others are rates of which they are made."""

_RATES = ("base_rate", "yes_rate", "tpr", "tnr", "brier", "calibration_gap")


def verification(frame: pd.DataFrame) -> Table:
    """Main scores of every judge beside chance."""
    rows = []
    for r in by_domain(frame[frame["metric"].isin(MAIN)]):
        row = [str(r["domain"]), str(r["model"]), str(r["mode"]), _metric(r["metric"]), score(r["value"])]
        row += [plain(r["low"], r["high"]), score(r["chance"]), beyond(r), count(r["trajectories"]), percent(r["mass"])]
        rows.append([*row, str(r["reason"] or "") or NONE])
    head = ["domain", "model", "mode", "score", "value", "90\u00a0% interval", "chance", "beyond it", "responses"]
    head += ["probability of yes and no", "why there is none"]
    note = (
        "Probability of yes and no: what the judge gives to these two words together; near 100 % where it keeps to the format. "
        "Chance: verdicts independent of the reward; knowing how hard a prompt is suffices to be above it, but for the AUROC "
        "within prompts, of pairs of responses to one prompt."
    )
    return table("How well every model judges its own responses.", head, 4, rows, note)


def rates(frame: pd.DataFrame) -> Table:
    """The rates behind the scores."""
    keys = ["domain", "model", "mode"]
    rows = []
    for key, group in frame.groupby(keys, sort=False):
        values = group.set_index("metric")["value"]
        rows.append([*map(str, key), *(score(values.get(m)) for m in _RATES), percent(group["unparsable"].iloc[0])])
    rows.sort(key=lambda row: row[0])
    head = [*keys, *map(_metric, _RATES), "verdicts not readable"]
    note = (
        "Base rate: share of correct responses. An always-yes judge has it as its accuracy. Calibration gap: mean probability "
        "of “correct” minus the base rate."
    )
    return table("Rates behind the scores.", head, 3, rows, note)


def changes(frame: pd.DataFrame) -> Table:
    """Differences of the main scores: model against base, process against outcome."""
    rows = [
        [
            *(str(r["domain"]), str(r["comparison"]), str(r["model"]), str(r["mode"]), _metric(r["metric"])),
            *(score(r["before"]), score(r["after"]), number(r["difference"], sign=True)),
            *(interval(r["low"], r["high"]), "yes" if r["excludes_zero"] else "no"),
        ]
        for r in by_domain(frame[frame["metric"].isin(MAIN[:3])])
    ]
    head = ["domain", "comparison", "model", "mode", "score", "first", "second", "difference"]
    head += ["90\u00a0% interval", "beyond noise"]
    note = "Prompts are paired. Each model judges its own responses, so that both the judge and what is judged change."
    return table("Before and after training, and mode against mode.", head, 5, rows, note)


def horizon(frame: pd.DataFrame) -> Table:
    """AUROC by how much of the response is seen."""
    rows = []
    for r in by_domain(frame[frame["metric"] == "auroc"]):
        row = [str(r["domain"]), str(r["model"]), percent(r["horizon"]), number(r["mean_tokens"]), score(r["value"])]
        row += [plain(r["low"], r["high"]), beyond(r), interval(r["from_prompt_low"], r["from_prompt_high"])]
        row += [number(r["to_longest"], sign=True)]
        rows.append([*row, interval(r["to_longest_low"], r["to_longest_high"])])
    head = ["domain", "model", "seen", "tokens", "AUROC", "90\u00a0% interval", "beyond chance (0.5)"]
    head += ["90\u00a0% interval of what it is above the prompt alone", "still to gain", "90\u00a0% interval of it"]
    return table("AUROC of the judge by how much of the response it sees (process mode).", head, 3, rows)


def locus(frame: pd.DataFrame) -> Table:
    """How well loci agree with the true steps, beside chance and the best constant step."""
    names = {"located": "a locus at all", "exact": "the very step", "within_1": "at most one step off"}
    names |= {"distance": "mean distance (steps)", "difference": "mean locus minus step (steps)"}
    rows = [
        [
            *(str(r["domain"]), str(r["model"]), str(r["source"]), names.get(r["metric"], str(r["metric"]))),
            *(
                _signed(r, "value"),
                _signed_interval(r),
                _signed(r, "chance"),
                interval(r["above_low"], r["above_high"]),
                score(r["constant"]),
            ),
            count(r["trajectories"]),
        ]
        for r in by_domain(frame)
    ]
    head = ["domain", "model", "true step", "what", "value", "90\u00a0% interval", "chance"]
    head += ["90\u00a0% interval of the difference", "best constant step", "responses"]
    note = (
        "True step: planted, or estimated by rollouts from prefixes. Shares are of all wrong responses whose step is known, a "
        "response without a locus being a miss; distances are of those with a locus. Chance: the judge's loci of other prompts' "
        "responses of as many steps, so that saying one step always is no more than chance. Best constant step: chosen knowing "
        "the true steps."
    )
    return table("Does the judge's locus agree with the step of the error?", head, 4, rows, note)


def loci(frame: pd.DataFrame) -> Table:
    """How many wrong responses were looked at, and how well their steps are known."""
    rows = []
    for (domain, model, source), part in frame.groupby(["domain", "model", "source"], sort=False):
        width = (part["step_high"] - part["step_low"] + 1).astype(float)
        row = [str(domain), str(model), str(source), count(len(part)), number(part["steps"].astype(float).mean())]
        rows.append([*row, count(part["step"].notna().sum()), number(width.mean())])
    rows.sort(key=lambda row: list(dict.fromkeys(frame["domain"])).index(row[0]))
    head = [
        "domain",
        "model",
        "true step",
        "wrong responses",
        "steps of one",
        "with a known step",
        "steps that it may be",
    ]
    note = (
        "Steps that it may be: mean number of steps in which 90 % of the posterior lies; 1 where the error was planted."
    )
    return table("Wrong responses looked at.", head, 3, rows, note)


def _signed(row: Any, name: str) -> str:
    return number(row[name], 2, sign=True) if row["metric"] == "difference" else score(row[name])


def _signed_interval(row: Any) -> str:
    return (interval if row["metric"] == "difference" else plain)(row["low"], row["high"])


def _metric(name: str) -> str:
    names = {"auroc": "AUROC", "within_prompt_auroc": "AUROC within prompts", "tpr": "TPR", "tnr": "TNR"}
    return {**names, "brier": "Brier score"}.get(name, str(name).replace("_", " "))
