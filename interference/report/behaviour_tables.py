"""The tables of a probe run's page: rows of ready-made text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from figures.divergences import best_estimates
from interference.report.numbers import NONE, count, interval, known, number, percent, score, with_error
from interference.report.tables import Table


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
        for r in by_domain(frame)
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
    best = best_estimates(frame)
    wide = {e: tokens[tokens["estimator"] == e].set_index(keys) for e in estimators}
    whole = best[best["per"] == "sequence"].set_index(keys)
    rows = []
    for r in by_domain(best[best["per"] == "token"]):
        key = tuple(r[k] for k in keys)
        row = [str(part) for part in key]
        of = {e: wide[e].loc[key] for e in estimators if key in wide[e].index}
        row += [with_error(of[e]["value"], of[e]["stderr"], sign=False) if e in of else NONE for e in estimators]
        row += [plain(r["low"], r["high"]), number(whole.loc[key, "value"])]
        changed = r["policy"] != "base"
        rows.append([*row, number(r["change"], sign=True) if changed else NONE])
    names = {"exact": "KL, exact at each state", "k3": "k3", "k1": "k1"}
    head = ["prompts of", "policy", "reference", *(names[e] for e in estimators)]
    head += ["90\u00a0% interval of the first known", "per response", "policy's change of reward"]
    note = (
        "In nats per token unless said otherwise, of the policy's own responses, ± one standard error over prompts. Equal "
        "policies have 0; k1 and k3 estimate the same from the sampled tokens alone, k1 with either sign, k3 never below 0."
        + " A dash stands where log-probabilities were given: what is summed over the vocabulary is not known there."
        * any(NONE in row[3 : 3 + len(estimators)] for row in rows)
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
        for r in by_domain(frame)
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
        "KL of the base from the model on the base's own responses, in nats per token, summed over the vocabulary. The forecast "
        "is half of d'Fd, with the update d and the Fisher matrix F: the second order, from the base and the update alone."
    )
    return table("Divergence from the base, forecast from the update.", head, 2, rows, note)


def gains(frame: pd.DataFrame) -> Table:
    """Gains beside what no learning would show."""
    rows = []
    for r in by_domain(frame):
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
            *(
                score(r["independent"]),
                plain(r["independent_low"], r["independent_high"]),
                _yes(r["beyond_independent"]),
            ),
            *(score(r["skill_cosine"]), plain(r["skill_cosine_low"], r["skill_cosine_high"])),
            *(score(r["retained"]), plain(r["retained_low"], r["retained_high"])),
        ]
        for r in by_domain(frame)
    ]
    head = ["domain", "model", "consistency", "90\u00a0% interval", "without learning", "90\u00a0% interval of it"]
    head += [
        "beyond it",
        "other items",
        "90\u00a0% interval of it",
        "beyond it",
        "skill cosine",
        "90\u00a0% interval",
        "retained",
        "90\u00a0% interval",
    ]
    note = (
        "Consistency: cosine of the union of the experts' gains with the model's. Other items: the model's gains permuted over "
        "items of like base rate, as if it had learned independently of the experts. Skill cosine and retained skill are free of "
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


def beyond(row: Any) -> str:
    """On which side of chance the interval of a score lies."""
    if not (known(row["low"]) and known(row["high"]) and known(row["chance"])):
        return NONE
    return "above" if row["low"] > row["chance"] else "below" if row["high"] < row["chance"] else "no"


def _yes(value: object) -> str:
    return NONE if value is None or value != value else "yes" if value else "no"


def by_domain(frame: pd.DataFrame) -> list[dict[Any, Any]]:
    """Rows in the order of first appearance of their domains, else as they are."""
    place = {name: k for k, name in enumerate(dict.fromkeys(frame["domain"]))}
    return sorted(frame.to_dict("records"), key=lambda row: place[row["domain"]])
