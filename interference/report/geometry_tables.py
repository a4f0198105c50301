"""The tables of a geometry run's page: rows of ready-made text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from figures.directions import SIDES, kind_of, telling
from figures.masks import changed_by_place
from figures.neurons import KINDS, groups_of
from figures.pairs import RULES, pairs_of
from interference.records import MODULES
from interference.report.numbers import NONE, count, interval, known, number, percent, score, with_error
from interference.report.tables import Table

MOST = 200
"""Rows of a table of audits; a model with a fault often has it in every tensor."""

_PARTS = ("attention", "MLP", "other")
_SEVERITIES = ("fatal", "warning", "note")


def sizes(norms: pd.DataFrame, models: Sequence[str]) -> Table:
    """How long every update is and how many weights it changes."""
    whole = norms[norms["scope"] == "model"].set_index("model")
    rows = []
    for name in (m for m in models if m in whole.index):
        r = whole.loc[name]
        row = [name, number(r["norm"]), percent(r["relative_norm"]), number(r["largest"]), percent(1 - r["identical"])]
        rows.append([*row, *(percent(1 - r[f"sparsity_{rule}"]) for rule in RULES)])
    head = ["update", "norm", "of the base's norm", "largest change of a weight", "not bit-identical"]
    head += [f"changed: {rule}" for rule in RULES]
    note = "A weight counts as changed by " + "; ".join(f"“{name}” where {rule}" for name, rule in RULES.items()) + "."
    return _table("Size of every update and share of weights that it changes.", head, 1, rows, note)


def by_module(norms: pd.DataFrame, models: Sequence[str]) -> list[Table]:
    """Relative norm, and share of weights changed, of every kind of module, over all layers."""
    tensors = norms.loc[norms["scope"] == "tensor", ["model", "module", "norm", "base_norm"]].copy()
    for name in ("norm", "base_norm"):
        tensors[name] = tensors[name].astype(float) ** 2
    places = changed_by_place(norms)
    places["changed"] *= places["numel"]
    caption = "of every module, over all layers"
    return [
        _ratios(
            tensors, "norm", "base_norm", models, f"Norm of the change {caption}, as a share of the base's norm.", 0.5
        ),
        _ratios(places, "changed", "numel", models, f"Share of the weights {caption}, that changed (rule “relative”)."),
    ]


def _ratios(
    rows: pd.DataFrame, above: str, below: str, models: Sequence[str], caption: str, power: float = 1.0
) -> Table:
    """A row a module, a column a model: (sum of `above` / sum of `below`) ** power."""
    sums = rows.groupby(["module", "model"], observed=True)[[above, below]].sum()
    ratio = (sums[above] / sums[below].where(sums[below] > 0)) ** power
    found = {(str(module), str(model)): float(value) for (module, model), value in zip(sums.index, ratio, strict=True)}
    modules, names = {module for module, _ in found}, {model for _, model in found}
    shown = [m for m in models if m in names]
    order = [m for m in MODULES if m in modules] + sorted(modules - set(MODULES))
    body = [[module, *(percent(found.get((module, name))) for name in shown)] for module in order]
    return _table(caption, ["module", *shown], 1, body)


def masks(table: pd.DataFrame, models: Sequence[str]) -> Table:
    """Overlap of changed weights of every pair under every rule."""
    whole = table[table["scope"] == "model"]
    rows = []
    for rule in RULES:
        for r in pairs_of(whole[whole["rule"] == rule], models).values():
            row = [rule, str(r["a"]), str(r["b"]), percent(r["density_a"]), percent(r["density_b"])]
            row += [score(r["jaccard"]), score(r["chance"]), score(r["chance_stratified"])]
            row += [interval(r["low"], r["high"]).replace("+", ""), verdict(r["jaccard"], r["low"], r["high"])]
            row += [f"{percent(r['overlap_a'])} ({percent(r['chance_a'])})"]
            rows.append([*row, f"{percent(r['overlap_b'])} ({percent(r['chance_b'])})"])
    head = ["rule", "a", "b", "a changes", "b changes", "Jaccard", "chance", "chance within tensors"]
    head += ["90\u00a0% interval of it", "beyond chance", "of a's also b's (chance)", "of b's also a's (chance)"]
    note = (
        "Chance: independent masks of these densities, pq / (p + q − pq); within tensors: every tensor's masks shuffled, "
        "which keeps where each update changes much. The interval and the verdict are those of the latter."
    )
    return _table("Overlap of the weights that two updates change, by rule.", head, 3, rows, note)


def consensus(table: pd.DataFrame) -> Table:
    """How many of the updates change a weight."""
    whole = table[table["scope"] == "model"].sort_values("changed_in")
    rows = [[count(r["changed_in"]), percent(r["share"]), percent(r["chance"])] for r in whole.to_dict("records")]
    head = ["changed by so many updates", "share of weights", "if they were independent"]
    return _table("How many updates change a weight (rule “relative”).", head, 1, rows)


def cosines(table: pd.DataFrame, models: Sequence[str]) -> Table:
    """Direction of every pair over all weights."""
    rows = []
    for r in pairs_of(table[table["scope"] == "model"], models).values():
        row = [str(r["a"]), str(r["b"]), number(r["cosine"], sign=True), number(r["null_std"], 2)]
        row += [with_error(r["projected_mean"], r["projected_std"]), count(r["both"]), percent(r["sign_agreement"])]
        ends = [percent(r[name]) for name in ("sign_low", "sign_high")]
        rows.append([*row, NONE if NONE in ends else " to ".join(ends)])
    head = ["a", "b", "cosine", "sd of unrelated directions", "projected, ± sd over seeds", "weights changed in both"]
    head += ["of these with equal sign", "90\u00a0% interval of it"]
    return _table("Directions of two updates.", head, 2, rows)


def subspaces(table: pd.DataFrame, models: Sequence[str]) -> Table:
    """Overlap of leading subspaces of every pair, summed up over the matrices of attention, of the MLPs and of the rest."""
    frame = table.assign(part=[kind_of(str(module)) for module in table["module"]])
    frame["above"] = (frame["overlap"] > frame["high"]).astype(float).where(telling(frame))
    order = list(pairs_of(frame.drop_duplicates(["a", "b"]), models).values())
    groups = dict(list(frame.groupby(["a", "b", "part", "side"], observed=True)))
    rows = []
    for pair in order:
        for part in _PARTS:
            for side in SIDES:
                here = groups.get((pair["a"], pair["b"], part, side))
                if here is not None:
                    rows.append([str(pair["a"]), str(pair["b"]), part, side, *_of_matrices(here)])
    head = ["a", "b", "part", "side", "matrices", "k", "overlap", "chance", "matrices above their 90\u00a0% interval"]
    head += ["smallest angle", "largest angle"]
    note = (
        "Overlap is |Ua'Ub|² / k of the k leading singular vectors, 1 for the same subspace; overlap and chance are means over "
        "matrices, angles medians in degrees. Left is the output side of a matrix, right its input side. "
        "A dash: k is the whole side there, and every two subspaces are the same."
    )
    return _table("Overlap of the leading subspaces of two updates.", head, 4, rows, note)


def _of_matrices(rows: pd.DataFrame) -> list[str]:
    least, most = int(rows["k"].min()), int(rows["k"].max())
    means = [score(float(rows[name].astype(float).mean())) for name in ("overlap", "chance")]
    angles = [float(rows[f"{name}_angle_deg"].astype(float).median()) for name in ("smallest", "largest")]
    above = percent(float(rows["above"].mean()))
    sizes = str(least) if least == most else f"{least} to {most}"
    return [count(len(rows)), sizes, *means, above, *(f"{a:.0f}°" if known(a) else NONE for a in angles)]


def spectra(table: pd.DataFrame, models: Sequence[str]) -> Table:
    """Rank of every update and what it does to the base's spectrum, means over matrices."""
    frame = table.assign(part=[kind_of(str(module)) for module in table["module"]])
    columns = ("stable_rank", "rank_ratio", "nss", "rotation_left", "rotation_right")
    overlaps = ("principal_overlap", "low_magnitude_overlap", "alpha")
    rows = []
    for name in models:
        for part in _PARTS:
            here = frame[(frame["model"] == name) & (frame["part"] == part)]
            if len(here):
                means = {c: float(here[c].astype(float).mean()) for c in (*columns, *overlaps)}
                row = [name, part, count(len(here)), *(number(means[c]) for c in columns)]
                rows.append([*row, *(percent(means[c]) for c in overlaps)])
    head = ["update", "part", "matrices", "stable rank", "rank / full rank", "spectral drift", "left rotation"]
    head += ["right rotation", "changes on principal weights", "on small weights", "either by chance"]
    note = (
        "Spectral drift: change of the base's singular values over their norm. Rotation: mean cosine of the principal angles "
        "between the base's leading subspace before and after; 1 is none. Principal weights are the share alpha of the base's "
        "weights that are largest in its rank-k part, small weights the share alpha that are smallest; changes placed at random "
        "would put a share alpha on either."
    )
    drawn = table[table["method"] == "randomized"]
    if len(drawn):
        worst, least = float(drawn["error"].astype(float).max()), float(drawn["seed_overlap"].astype(float).min())
        note += (
            f" {len(drawn)} of {len(table)} are from randomized sketches: values off by at most {number(worst, 2)}, their "
            f"rank and drift are not known, and the subspaces of two seeds overlap by {number(least, 2)} or more; where that is "
            "below 0.5 the spectrum is too flat for a sketch, and no pair is compared."
        )
    return _table("Ranks and spectra, means over matrices.", head, 2, rows, note)


def neurons(table: pd.DataFrame, models: Sequence[str]) -> Table:
    """Overlap of the most changed channels and heads of every pair."""
    whole = table[table["scope"] == "model"]
    rows = []
    for kind, top in groups_of(table):
        here = whole[(whole["kind"] == kind) & (whole["top"] == top)]
        for r in pairs_of(here, models).values():
            row = [
                KINDS.get(kind, kind),
                percent(top),
                str(r["a"]),
                str(r["b"]),
                count(r["count"]),
                score(r["jaccard"]),
            ]
            row += [score(r["chance"]), interval(r["low"], r["high"]).replace("+", "")]
            rows.append([*row, verdict(r["jaccard"], r["low"], r["high"])])
    head = [
        "kind",
        "top",
        "a",
        "b",
        "how many there are",
        "Jaccard",
        "chance",
        "90\u00a0% interval of it",
        "beyond chance",
    ]
    return _table("Overlap of the units that two updates change most.", head, 4, rows)


def audits(table: pd.DataFrame) -> Table:
    """What the checks of the checkpoints found, gravest first."""
    rank = {name: k for k, name in enumerate(_SEVERITIES)}
    order = np.argsort([rank.get(str(s), len(rank)) for s in table["severity"]], kind="stable")
    shown = table.iloc[order[:MOST]].to_dict("records")
    rows = [
        [str(r["model"]), str(r["check"]), str(r["severity"]), str(r["tensor"]) or NONE, str(r["message"])]
        for r in shown
    ]
    marks = [str(r["severity"]) if r["severity"] in _SEVERITIES else "" for r in shown]
    left = len(table) - len(rows)
    note = f"{left} more are in tables/geometry_audits.parquet." if left else ""
    return Table(
        "What the checks of the checkpoints found, gravest first.",
        ["update", "check", "severity", "tensor", "what"],
        5,
        rows,
        marks,
        note,
    )


def verdict(value: float, low: float, high: float) -> str:
    """On which side of an interval of chance a value lies.

    >>> verdict(0.3, 0.1, 0.2), verdict(0.15, 0.1, 0.2), verdict(0.05, 0.1, 0.2), verdict(0.3, float("nan"), 0.2)
    ('above', 'no', 'below', '–')
    """
    if not (known(value) and known(low) and known(high)):
        return NONE
    return "above" if value > high else "below" if value < low else "no"


def _table(caption: str, head: Sequence[str], names: int, rows: Sequence[Sequence[str]], note: str = "") -> Table:
    return Table(caption, head, names, rows, [""] * len(rows), note)
