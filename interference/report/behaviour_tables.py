"""The tables of a probe run's page: rows of ready-made text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from interference.report.numbers import NONE, count, interval, known, number, percent, score, with_error
from interference.report.tables import Table

MAIN = ("balanced_accuracy", "auroc", "accuracy")
"""Scores of a judge that the page shows first; the others are rates of which they are made."""

_RATES = ("base_rate", "yes_rate", "tpr", "tnr", "brier", "calibration_gap")


def table(caption: str, head: Sequence[str], names: int, rows: Sequence[Sequence[str]], note: str = "") -> Table:
    """A table without marked rows."""
    return Table(caption, head, names, rows, [""] * len(rows), note)


def plain(low: Any, high: Any) -> str:
    """An interval of a number that has no sign to speak of."""
    return interval(low, high).replace("+", "")


def performance(frame: pd.DataFrame) -> Table:
    """Mean rewards and their change."""
    rows = [
        [
            *(str(r["domain"]), str(r["model"]), with_error(r["value"], r["stderr"], sign=False)),
            *(number(r["change"], sign=True), interval(r["change_low"], r["change_high"])),
            *(count(r["prompts"]), count(r["sequences"])),
        ]
        for r in _by_domain(frame)
    ]
    head = [
        "domain",
        "model",
        "mean reward",
        "change from the base",
        "90\u00a0% interval of it",
        "prompts",
        "responses",
    ]
    return table("Mean reward, ± one standard error (bootstrap over prompts, paired for the change).", head, 2, rows)


def divergences(frame: pd.DataFrame) -> Table:
    """The KL matrix per token by every estimator, beside the policy's change of reward."""
    keys = ["domain", "policy", "reference"]
    tokens = frame[frame["per"] == "token"]
    estimators = [e for e in ("exact", "k3", "k1") if (tokens["estimator"] == e).any()]
    best = frame[frame["estimator"] == estimators[0]]
    wide = {e: tokens[tokens["estimator"] == e].set_index(keys) for e in estimators}
    whole = best[best["per"] == "sequence"].set_index(keys)
    rows = []
    for r in _by_domain(best[best["per"] == "token"]):
        key = tuple(r[k] for k in keys)
        row = [str(part) for part in key]
        row += [with_error(wide[e].loc[key, "value"], wide[e].loc[key, "stderr"], sign=False) for e in estimators]
        row += [plain(r["low"], r["high"]), number(whole.loc[key, "value"])]
        changed = r["policy"] != "base"
        rows.append([*row, number(r["change"], sign=True) if changed else NONE])
    names = {"exact": "KL, exact at each state", "k3": "k3", "k1": "k1"}
    head = ["prompts of", "policy", "reference", *(names[e] for e in estimators)]
    head += ["90\u00a0% interval of the first", "per response", "policy's change of reward"]
    note = (
        "In nats per token unless said otherwise, of the policy's own responses, ± one standard error over prompts. Equal "
        "policies have 0; k1 and k3 estimate the same from the sampled tokens alone, k1 with either sign, k3 never below 0."
    )
    return table("Divergence of every policy from every other model.", head, 3, rows, note)


def neighbors(frame: pd.DataFrame) -> Table:
    """The neighbor relation."""
    rows = [
        [
            *(str(r["reference"]), str(r["domain"]), str(r["expert"]), number(r["kl"]), number(r["eps"])),
            *(interval(r["low"], r["high"]), "yes" if r["neighbor"] else "no", "yes" if r["certain"] else "no"),
            *(number(r["change"], sign=True), interval(r["change_low"], r["change_high"])),
        ]
        for r in frame.to_dict("records")
    ]
    head = ["reference", "prompts of", "expert of", "KL", "eps", "KL − eps, 90\u00a0% interval", "neighbor"]
    head += ["beyond noise", "expert's change of reward there", "90\u00a0% interval of it"]
    note = (
        "An expert is a neighbor of a domain when, on its prompts, it is nearer than eps to the reference (k3, nats per "
        "token); eps is the divergence of the domain's own expert unless one was given."
    )
    return table("Whose experts are neighbors.", head, 3, rows, note)


def kl_forecast(frame: pd.DataFrame) -> Table:
    """The jets' forecast of the divergence from the base beside the measured one."""
    rows = [
        [
            *(str(r["domain"]), str(r["reference"]), with_error(r["forecast"], r["stderr"], sign=False)),
            *(
                number(r["measured"]),
                plain(r["low"], r["high"]),
                score(r["ratio"]),
                plain(r["ratio_low"], r["ratio_high"]),
            ),
        ]
        for r in _by_domain(frame)
        if known(r["forecast"])
    ]
    head = [
        "prompts of",
        "model",
        "forecast",
        "measured",
        "90\u00a0% interval",
        "forecast / measured",
        "90\u00a0% interval of it",
    ]
    note = (
        "KL of the base from the model on the base's own responses, in nats per token, summed over the vocabulary. The forecast is "
        "half of d'Fd, with the update d and the Fisher matrix F: the second order, from the base and the update alone."
    )
    return table("Divergence from the base, forecast from the update.", head, 2, rows, note)


def gains(frame: pd.DataFrame) -> Table:
    """Gains beside what no learning would show."""
    rows = []
    for r in _by_domain(frame):
        name = "base, split in halves" if r["role"] == "split" else str(r["model"])
        row = [str(r["domain"]), name, number(r["gain"]), plain(r["low"], r["high"]), number(r["null"])]
        row += [plain(r["null_low"], r["null_high"]), _yes(r["beyond_null"])]
        row += [count(r["items"]), number(r["items_null"], 2), percent(r["share"]), percent(r["share_null"])]
        rows.append(row)
    head = ["domain", "model", "mean gain", "90\u00a0% interval", "without learning", "90\u00a0% interval of it"]
    head += ["beyond it", "items gained", "by chance", "share of the union", "without learning"]
    note = (
        "Gain: success rate above the base's, item by item, nothing where below. Finite samples alone make gains; “without "
        "learning” is what models with the base's own success rates show with as many samples."
    )
    return table("Gains over the base.", head, 2, rows, note)


def consistency(frame: pd.DataFrame) -> Table:
    """Consistency with the union of the experts' gains."""
    rows = [
        [
            *(str(r["domain"]), str(r["model"]), score(r["consistency"]), plain(r["low"], r["high"])),
            *(score(r["null"]), plain(r["null_low"], r["null_high"]), _yes(r["beyond_null"])),
            *(score(r["skill_cosine"]), plain(r["skill_cosine_low"], r["skill_cosine_high"])),
            *(score(r["retained"]), plain(r["retained_low"], r["retained_high"])),
        ]
        for r in _by_domain(frame)
    ]
    head = ["domain", "model", "consistency", "90\u00a0% interval", "without learning", "90\u00a0% interval of it"]
    head += ["beyond it", "skill cosine", "90\u00a0% interval", "retained", "90\u00a0% interval"]
    note = (
        "Consistency: cosine of the union of the experts' gains with the model's. Skill cosine and retained skill are free of "
        "noise in expectation: 0 without learning, 1 with just the experts' skills, losses counted against it; a dash where "
        "the changes that they divide by are not beyond noise."
    )
    return table("Do the other models have the experts' skills?", head, 2, rows, note)


def shared(frame: pd.DataFrame) -> Table:
    """How many experts gained an item."""
    rows = [
        [str(r["domain"]), count(r["experts"]), count(r["items"]), number(r["items_null"], 2)]
        for r in frame.to_dict("records")
    ]
    head = ["domain", "gained by so many experts", "items", "by chance"]
    return table("Items by how many experts gained them.", head, 1, rows)


def verification(frame: pd.DataFrame) -> Table:
    """Main scores of every judge beside chance."""
    rows = []
    for r in _by_domain(frame[frame["metric"].isin(MAIN)]):
        row = [str(r["domain"]), str(r["model"]), str(r["mode"]), _metric(r["metric"]), score(r["value"])]
        row += [plain(r["low"], r["high"]), score(r["chance"]), beyond(r), count(r["trajectories"]), percent(r["mass"])]
        rows.append([*row, str(r["reason"] or "") or NONE])
    head = ["domain", "model", "mode", "score", "value", "90\u00a0% interval", "chance", "beyond it", "responses"]
    head += ["probability of yes and no", "why there is none"]
    note = "Probability of yes and no: what the judge gives to these two words together; near 100 % where it keeps to the format."
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
        for r in _by_domain(frame[frame["metric"].isin(MAIN[:2])])
    ]
    head = ["domain", "comparison", "model", "mode", "score", "first", "second", "difference"]
    head += ["90\u00a0% interval", "beyond noise"]
    note = "Prompts are paired. Each model judges its own responses, so that both the judge and what is judged change."
    return table("Before and after training, and mode against mode.", head, 5, rows, note)


def horizon(frame: pd.DataFrame) -> Table:
    """AUROC by how much of the response is seen."""
    rows = []
    for r in _by_domain(frame[frame["metric"] == "auroc"]):
        row = [str(r["domain"]), str(r["model"]), percent(r["horizon"]), number(r["mean_tokens"]), score(r["value"])]
        row += [plain(r["low"], r["high"]), beyond(r), number(r["to_longest"], sign=True)]
        rows.append([*row, interval(r["to_longest_low"], r["to_longest_high"])])
    head = ["domain", "model", "seen", "tokens", "AUROC", "90\u00a0% interval", "beyond chance (0.5)"]
    head += ["still to gain", "90\u00a0% interval of it"]
    return table("AUROC of the judge by how much of the response it sees (process mode).", head, 3, rows)


def locus(frame: pd.DataFrame) -> Table:
    """How well loci agree with the true steps, beside steps drawn at random."""
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
            ),
            count(r["trajectories"]),
        ]
        for r in _by_domain(frame)
    ]
    head = ["domain", "model", "true step", "what", "value", "90\u00a0% interval", "step at random"]
    head += ["90\u00a0% interval of the difference", "responses"]
    note = (
        "True step: planted, or estimated by rollouts from prefixes. Shares are of all wrong responses whose step is known, a "
        "response without a locus being a miss; distances are of those with a locus."
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


def beyond(row: Any) -> str:
    """On which side of chance the interval of a score lies."""
    if not (known(row["low"]) and known(row["high"]) and known(row["chance"])):
        return NONE
    return "above" if row["low"] > row["chance"] else "below" if row["high"] < row["chance"] else "no"


def _metric(name: str) -> str:
    return {"auroc": "AUROC", "tpr": "TPR", "tnr": "TNR", "brier": "Brier score"}.get(name, str(name).replace("_", " "))


def _yes(value: object) -> str:
    return NONE if value is None or value != value else "yes" if value else "no"


def _by_domain(frame: pd.DataFrame) -> list[dict[Any, Any]]:
    """Rows in the order of first appearance of their domains, else as they are."""
    place = {name: k for k, name in enumerate(dict.fromkeys(frame["domain"]))}
    return sorted(frame.to_dict("records"), key=lambda row: place[row["domain"]])
