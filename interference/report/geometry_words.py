"""What the records of a geometry run say, in sentences made from their numbers."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from figures.directions import kind_of, telling
from figures.neurons import KINDS, groups_of
from figures.pairs import pairs_of
from figures.style import Z90
from interference.report.geometry_tables import verdict
from interference.report.numbers import interval, known, number, percent, score


def sizes(norms: pd.DataFrame) -> list[str]:
    """How long the updates are and how few weights they change."""
    whole = norms[norms["scope"] == "model"]
    if whole.empty:
        return []
    length, changed = whole["relative_norm"].astype(float), 1 - whole["sparsity_relative"].astype(float)
    if len(whole) == 1:
        size, share = percent(length.iloc[0]), changed.iloc[0]
        return [
            f"The update is {size} of the base's norm and changes {percent(share)} of the weights by more than a "
            "thousandth of their size; the rest moves less or not at all."
        ]
    names = whole["model"].astype(str)
    few, most = int(changed.argmin()), int(changed.argmax())
    least, lowest = percent(changed.iloc[few]), names.iloc[few]
    return [
        f"The updates are {percent(length.min())} to {percent(length.max())} of the base's norm; the largest is "
        f"{names.iloc[int(length.argmax())]}.",
        f"They change {least} ({lowest}) to {percent(changed.iloc[most])} ({names.iloc[most]}) of the weights by more than a "
        "thousandth of their size; the rest moves less or not at all.",
    ]


def masks(table: pd.DataFrame, models: Sequence[str]) -> list[str]:
    """How many pairs change the same weights beyond chance, and which does so most."""
    rows = list(pairs_of(table[(table["scope"] == "model") & (table["rule"] == "relative")], models).values())
    judged = [r for r in rows if verdict(r["jaccard"], r["low"], r["high"]) in ("above", "no", "below")]
    if not judged:
        return ["Whether pairs change the same weights beyond chance was not recorded."] if rows else []
    above = [r for r in judged if r["jaccard"] > r["high"]]
    below = [r for r in judged if r["jaccard"] < r["low"]]
    less = f"; {len(below)} fewer" if below else ""
    out = [
        f"Of {_pairs(len(judged))}, {len(above)} share{'s' * (len(above) == 1)} more changed weights than chance gives{less}."
    ]
    if above:
        top = max(above, key=lambda r: float(r["jaccard"] - r["chance_stratified"]))
        out.append(
            f"Most beyond it are {top['a']} and {top['b']}: Jaccard {score(top['jaccard'])} where chance within tensors gives "
            f"{score(top['chance_stratified'])} (90 % interval {interval(top['low'], top['high']).replace('+', '')})."
        )
    return out


def cosines(table: pd.DataFrame, models: Sequence[str]) -> list[str]:
    """Which pair is most aligned, which most opposed."""
    rows = [r for r in pairs_of(table[table["scope"] == "model"], models).values() if known(r["cosine"])]
    if not rows:
        return []
    sure = [r for r in rows if abs(r["cosine"]) > Z90 * r["null_std"]]
    if not sure:
        return [f"No cosine of {_pairs(len(rows))} is beyond what unrelated directions give."]
    top, low = max(sure, key=lambda r: abs(r["cosine"])), min(sure, key=lambda r: float(r["cosine"]))
    out = [
        f"The largest cosine is that of {top['a']} and {top['b']}: {number(top['cosine'], sign=True)}, where unrelated "
        f"directions give ±{number(Z90 * top['null_std'], 2)} (90 %)."
    ]
    if low["cosine"] < 0 and low is not top:
        out.append(f"Most opposed are {low['a']} and {low['b']} with {number(low['cosine'], sign=True)}.")
    return out


def subspaces(table: pd.DataFrame) -> list[str]:
    """In how many matrices leading subspaces overlap beyond chance, by part of the model and side."""
    judged = table[telling(table)]
    if judged.empty:
        return []
    above = judged["overlap"] > judged["high"]
    out = []
    for side, name in (("left", "output"), ("right", "input")):
        here = judged["side"] == side
        if here.any():
            part = pd.Series([kind_of(str(module)) for module in judged["module"]], index=judged.index)
            shares = above[here].groupby(part[here]).mean()
            said = ", ".join(
                f"{percent(float(shares[p]))} in {p}" for p in ("attention", "MLP", "other") if p in shares
            )
            out.append(
                f"On the {name} side the leading subspaces of {percent(float(above[here].mean()))} of all pairs of matrices "
                f"overlap more than 95 in 100 random ones would ({said}); by chance it were 5 %."
            )
    return out


def neurons(table: pd.DataFrame, models: Sequence[str]) -> list[str]:
    """How many pairs change the same units most, for each kind at the middle one of its sizes of top sets."""
    whole, groups = table[table["scope"] == "model"], groups_of(table)
    out = []
    for kind in dict.fromkeys(kind for kind, _ in groups):
        tops = [top for other, top in groups if other == kind]
        top = tops[len(tops) // 2]
        rows = pairs_of(whole[(whole["kind"] == kind) & (whole["top"] == top)], models).values()
        found = [r for r in rows if verdict(r["jaccard"], r["low"], r["high"]) in ("above", "no", "below")]
        if found:
            above = sum(r["jaccard"] > r["high"] for r in found)
            best = max(found, key=lambda r: float(r["jaccard"]))
            most = f"; most {best['a']} and {best['b']}, with Jaccard {score(best['jaccard'])} (chance {score(best['chance'])})"
            out.append(
                f"Of the {percent(top)} of {KINDS.get(kind, kind)} changed most, {above} of {_pairs(len(found))} "
                f"share{'s' * (above == 1)} more than chance{most * (above > 0)}."
            )
    return out


def consensus(table: pd.DataFrame) -> list[str]:
    """How many weights all updates change, and how many none."""
    whole = table[table["scope"] == "model"].sort_values("changed_in")
    if len(whole) < 2:
        return []
    none, every = whole.iloc[0], whole.iloc[-1]
    return [
        f"All {int(every['changed_in'])} updates change {percent(every['share'])} of the weights, where independent ones would "
        f"change {percent(every['chance'])}.",
        f"By no update are {percent(none['share'])} changed (by independent ones: {percent(none['chance'])}).",
    ]


def audits(table: pd.DataFrame) -> list[str]:
    """How many grave findings there are; nothing where there are none."""
    out = []
    for severity, name in (("fatal", "fatal finding"), ("warning", "warning")):
        found = int((table["severity"] == severity).sum())
        if found:
            out.append(f"{found} {name}{'s' * (found > 1)}")
    if not out:
        return []
    return [
        f"The checks of the checkpoints have {' and '.join(out)}, listed under audits; read them before the numbers."
    ]


def _pairs(count: int) -> str:
    return f"{count} pair{'s' * (count != 1)}"
