"""The report's tables: rows of ready-made text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from figures.style import predictor, scale_of, signed, times_power
from interference.report.numbers import NONE, count, interval, known, number, percent, score, with_error


class Table(NamedTuple):
    """`head`: column titles; `names`: how many leading columns name the row; `rows`: cells as text;
    `marks`: row classes; `note`: a footnote.
    """

    caption: str
    head: Sequence[str]
    names: int
    rows: Sequence[Sequence[str]]
    marks: Sequence[str]
    note: str = ""


def changes(cells: pd.DataFrame, unit: str) -> Table:
    """Measured and predicted change of every cell, with standard errors."""
    head = ["trained on", "changed", "measured", "second order (Hessian)", "second order (GGN)", "first order"]
    head += ["measured − second order", "beyond noise"]
    rows = []
    for c in cells.to_dict("records"):
        rows.append(
            [
                str(c["update"]),
                str(c["domain"]),
                with_error(c["measured"], c["measured_stderr"]),
                with_error(c["predicted_second"], c["stderr"]),
                with_error(c["predicted_second_ggn"], c["stderr_ggn"]),
                with_error(c["predicted_first"], c["stderr_first"]),
                with_error(c["measured"] - c["predicted_second"], c["residual_stderr"]),
                ("yes" if c["detected"] else "no") if known(c["measured"]) else NONE,
            ]
        )
    caption = (
        f"Change of every cell in {unit}, ± one standard error (bootstrap over prompts, paired for the difference)."
    )
    return Table(caption, head, 2, rows, _own(cells))


def evidence(cells: pd.DataFrame) -> Table:
    """What each cell rests on: values, intervals, data, effective samples."""
    weighted = bool(cells["ess"].notna().any() or cells["estimate"].notna().any())
    own_data = bool(cells["anchor_value"].notna().any()) and (weighted or not _same(cells))
    head = ["trained on", "changed", *(["before, prediction's data"] if own_data else [])]
    head += ["before, measured" if own_data else "before", "after", "second order, 90\u00a0% interval"]
    head += ["measured − second order, 90\u00a0% interval", "prompts", "sequences"]
    head += ["importance-weighted estimate", "effective sample"] if weighted else []
    rows = []
    for c in cells.to_dict("records"):
        row = [str(c["update"]), str(c["domain"]), *([number(c["anchor_value"], 4)] if own_data else [])]
        row += [number(c["before"], 4), number(c["after"], 4)]
        row += [interval(c["low"], c["high"]), interval(c["residual_low"], c["residual_high"])]
        row += [count(c["prompts"]), count(c["sequences"])]
        if weighted:
            share = f" ({100 * c['ess'] / c['sequences']:.0f} %)" if known(c["ess"]) and c["sequences"] else ""
            row += [with_error(c["estimate"], c["estimate_stderr"]), count(c["ess"]) + share]
        rows.append(row)
    note = "Intervals hold the sampling noise of prompts only, not what the local model leaves out."
    if own_data:
        note += (
            " The prediction was made on data of its own; the measured change is taken from the measured value before, "
            "never from the value on the prediction's data."
        )
    return Table("What each cell rests on.", head, 2, rows, _own(cells), note)


def left_out(cells: pd.DataFrame, unit: str) -> Table:
    """What the second order leaves out of every cell: predicted from small alpha, found at alpha 1, and the radius."""
    head = ["trained on", "changed", "third order", "fourth order", "left out: predicted", "± by its order"]
    head += ["left out: found at alpha 1", "second order, 90\u00a0% interval with it"]
    head += ["measured − second order, 90\u00a0% interval with it", "radius", "beyond it"]
    rows = []
    for c in cells.to_dict("records"):
        rows.append(
            [
                str(c["update"]),
                str(c["domain"]),
                with_error(c["third"], c["third_stderr"]),
                with_error(c["fourth"], c["fourth_stderr"]),
                with_error(c["truncation"], c["truncation_stderr"]),
                number(c["truncation_misfit"], 2),
                with_error(c["remainder"], c["remainder_stderr"]),
                interval(c["low_total"], c["high_total"]),
                interval(c["residual_low_total"], c["residual_high_total"]),
                _radius(c),
                ("yes" if c["beyond_radius"] else "no") if _judged(c) else NONE,
            ]
        )
    note = (
        "Third and fourth order are contributions at alpha 1, fitted to the objective's own value at alpha up to 0.5; left out "
        "is their sum, uncertain by the size of the fourth (of the third where there is no fourth). The intervals reach from the "
        "second order to the far end of that and hold sampling noise, too. The radius is the smallest alpha at which the second "
        "order is off by more than 10 % of the change and by more than its noise; of two alphas, noise hides where it leaves "
        "after the first, and at the second it has left. A cell is beyond its radius where that ends before alpha 1."
    )
    return Table(f"What the second order leaves out, in {unit}.", head, 2, rows, _own(cells), note)


def _judged(cell: Mapping[Any, Any]) -> bool:
    return bool(cell["beyond_radius"] or (known(cell["radius_judged"]) and cell["radius_judged"] >= 1))


def _radius(cell: Mapping[Any, Any]) -> str:
    """The radius, "> 1.5" where it is beyond the largest alpha tried, between what noise leaves open, or why it is not known."""
    if cell["radius_reason"] == "left" and known(cell["radius_judged"]) and cell["radius_judged"] < cell["radius"]:
        return f"{number(cell['radius_judged'])} to {number(cell['radius'])}"
    if cell["radius_reason"] in ("left", "held"):
        return f"{'> ' * (cell['radius_reason'] == 'held')}{number(cell['radius'])}"
    return {"noise": "hidden by noise", "ess": "too few effective samples"}.get(cell["radius_reason"], NONE)


def _same(cells: pd.DataFrame) -> bool:
    """Were predictions and measurements made on the same data, as far as the value at the base says?"""
    both = cells[cells["anchor_value"].notna() & cells["before"].notna()]
    return bool(((both["anchor_value"] - both["before"]).abs() <= 1e-6 * both["before"].abs()).all())


def baselines(cells: pd.DataFrame) -> Table:
    """What the baseline predictors saw in each cell."""
    keys = ("update_norm", "update_cosine", "gradient_cosine", "kl")
    rows = [[str(c["update"]), str(c["domain"]), *(number(c[key]) for key in keys)] for c in cells.to_dict("records")]
    head = ["trained on", "changed", *(predictor(key).label for key in keys)]
    return Table("What the baselines saw.", head, 2, rows, _own(cells))


def _own(cells: pd.DataFrame) -> list[str]:
    return ["own" if own else "" for own in cells["own"]]


def scores(card: Mapping[str, Mapping[str, Any]], caption: str) -> Table:
    """One row per predictor."""
    head = [
        "predictor",
        "Spearman",
        "90\u00a0% interval",
        "Pearson",
        "right sign",
        "slope",
        "intercept",
        "R²",
        "coverage (sampling noise only)",
    ]
    total = any(known(c.get("coverage_truncation")) for c in card.values())
    head += [*(["coverage (with truncation)"] if total else []), "cells", "beyond noise"]
    order = [
        "third_order",
        "second_order",
        "second_order_ggn",
        "first_order",
        "gradient_cosine",
        "update_cosine",
        "update_norm",
        "kl",
    ]
    names = [n for n in order if n in card] + [n for n in card if n not in order]
    rows, marks = [], []
    for name in names:
        c = card[name]
        both = known(c.get("spearman_low")) and known(c.get("spearman_high"))
        rows.append(
            [
                predictor(name).label,
                score(c.get("spearman")),
                f"{score(c['spearman_low'])} to {score(c['spearman_high'])}" if both else NONE,
                score(c.get("pearson")),
                score(c.get("sign_accuracy")),
                score(c.get("slope")) if predictor(name).ours else number(c.get("slope")),
                number(c.get("intercept"), 2, sign=True),
                score(c.get("r2")),
                score(c.get("coverage")) if predictor(name).ours else f"{NONE} *",
                *([score(c.get("coverage_truncation"))] if total else []),
                count(c.get("cells")),
                count(c.get("cells_detectable")),
            ]
        )
        marks.append("" if predictor(name).ours else "baseline")
    note = (
        "Coverage: share of cells where the 90 % interval of measured minus predicted, paired over prompts, holds zero; it "
        "holds sampling noise only, not what the local model leaves out."
    )
    if total:
        note += " With truncation, the interval also holds what is left out, as predicted from alpha up to 0.5 alone."
    if "baseline" in marks:
        note += (
            " * A baseline has no such interval. Its R² is that of a line fitted to the other cells (leave one out); the "
            "prediction interval of that line is another thing, so it does not stand in this column."
        )
    return Table(caption, head, 1, rows, marks, note)


MOST = 8
"""Rows of a table of the most harmful channels or, of each kind, heads."""


def channels(cell: pd.DataFrame, unit: str) -> Table:
    """The channels that carry most of the damage in one cell; rows of `figures.parts.parts_of` the channels."""
    top = cell[cell["harm"] > 0].nlargest(MOST, "harm")
    names = ["layer", *(["expert"] if (cell["expert"] >= 0).any() else []), "channel"]
    parts = _parts(top)
    rows = [
        [*(str(row[name]) for name in names), *part, percent(row["share"]), percent(so_far)]
        for row, part, so_far in zip(top.to_dict("records"), parts.rows, top["share"].cumsum(), strict=True)
    ]
    caption = (
        f"MLP channels that carry most of the damage, of {len(cell)}: their parts of the predicted change in "
        f"{parts.power}{unit}. A channel is its rows of gate and up and its column of down."
    )
    return Table(caption, [*names, *_PARTS, "shares so far"], len(names), rows, [""] * len(rows))


def heads(cell: pd.DataFrame, unit: str) -> Table:
    """The same for attention heads, most harmful first among the query heads and among the key-value heads."""
    harmful = cell[cell["harm"] > 0]
    kinds = ("query", "key_value")
    top = pd.concat([harmful[harmful["kind"] == kind].nlargest(MOST // 2, "harm") for kind in kinds])
    parts = _parts(top)
    rows = [
        [row["kind"].replace("_", "-"), str(row["layer"]), str(row["head"]), *part, percent(row["share"])]
        for row, part in zip(top.to_dict("records"), parts.rows, strict=True)
    ]
    caption = (
        f"Attention heads that carry most of the damage: their parts of the predicted change in {parts.power}{unit}. A query "
        "head is its rows of q and its columns of o, a key-value head its rows of k and v."
    )
    return Table(caption, ["kind", "layer", "head", *_PARTS], 3, rows, [""] * len(rows))


_PARTS = ("part of the change", "first order", "second order", "share of the damage")


class _Parts(NamedTuple):
    power: str
    rows: list[list[str]]


def _parts(top: pd.DataFrame) -> _Parts:
    """Change, first and second order of some parts in one power of ten, with equal decimals."""
    values = top[["change", "first", "second"]].astype(float)
    power, decimals = scale_of(values.to_numpy().ravel().tolist())
    rows = [[signed(v / 10.0**power, decimals) for v in row] for row in values.to_numpy().tolist()]
    return _Parts(times_power(power), rows)


def asked_domains(config: Mapping[str, Any], cells: Mapping[str, pd.DataFrame]) -> Table:
    """The domains of the run: where their data come from and how much there was."""
    rows = []
    for entry in config.get("domains") or []:
        name = str(entry.get("name"))
        data = entry.get("data")
        source = "; ".join(f"{k}: {v}" for k, v in data.items()) if isinstance(data, Mapping) else str(data or NONE)
        fresh = entry.get("prompts")
        measured = f"{fresh}, scored by {entry.get('verifier')}" if fresh else NONE
        sizes = []
        for objective, frame in cells.items():
            rows_here = frame[frame["domain"] == name]
            if len(rows_here):
                first = rows_here.iloc[0]
                sizes.append(f"{objective}: {count(first['prompts'])} prompts, {count(first['sequences'])} sequences")
        rows.append([name, source, measured, "; ".join(sizes) or NONE])
    head = ["domain", "data", "fresh rollouts sampled on", "size"]
    return Table("Domains: what is changed.", head, 1, rows, [""] * len(rows))


def asked_models(config: Mapping[str, Any]) -> Table:
    """The tuned checkpoints of the run."""
    rows = [[str(m.get("name")), str(m.get("model"))] for m in config.get("models") or []]
    return Table("Updates: what was trained.", ["update", "tuned checkpoint"], 1, rows, [""] * len(rows))
