"""Active routes and gradients on a probe run's page: sentences and tables made from their numbers."""

from __future__ import annotations

from typing import Any

import pandas as pd

from figures.gradients import certain
from figures.routes import KINDS, distinct_tops, kinds_of, middle_top
from interference.report.behaviour_tables import plain, table
from interference.report.geometry_tables import verdict
from interference.report.numbers import NONE, count, interval, known, number, percent, score
from interference.report.numbers import luck as _luck
from interference.report.tables import Table

_FEW = "too few to test"
_MOST = 6
"""Modules of a layer that the page names, of those that pull most together and most against each other."""


def overlap_words(frame: pd.DataFrame) -> list[str]:
    """How much of their routes two domains share in the base, beside chance and beside one domain's own halves."""
    base = _whole(frame, "base")
    out = []
    for kind in kinds_of(base):
        here = base[base["kind"] == kind]
        across, own = here[here["a"] != here["b"]], here[here["a"] == here["b"]]
        rows = [r for r in across.to_dict("records") if _overlap(r) != NONE]
        if not rows:
            continue
        said = (
            f"Of the {percent(across['share'].mean())} of {KINDS.get(kind, kind)} in each layer that the base uses most, two "
            f"domains share {score(across['jaccard'].mean())} on average (Jaccard), random sets "
            f"{score(across['chance'].mean())}, the two halves of one domain {score(own['jaccard'].mean())}"
        )
        tested = [r for r in rows if _overlap(r) != _FEW]
        more = sum(_overlap(r) == "above" for r in tested)
        if tested:
            said += f"; {more} of {_pairs(len(tested))} share{'s' * (more == 1)} more than chance{_luck(len(tested))}"
        if len(tested) < len(rows):
            said += f"; {_pairs(len(rows) - len(tested))} cannot be tested: among so few units even equal sets are no rare chance"
        out.append(said + ".")
    return out


def direction_words(frame: pd.DataFrame) -> list[str]:
    """On how many shared routes two updates agree or disagree more than on random ones."""
    here = frame[(frame["layer"] == -1) & (frame["top"] == middle_top(frame))] if len(frame) else frame
    out = []
    for kind in kinds_of(here):
        rows = [r for r in here[here["kind"] == kind].to_dict("records") if _found(r) != NONE]
        if not rows:
            continue
        above, below = (sum(_found(r) == side for r in rows) for side in ("above", "below"))
        said = f"Where two domains use the same {KINDS.get(kind, kind)}, the cosine of their experts' updates is above that of "
        said += f"random ones in {above} and below it in {below} of {_pairs(len(rows))}{_luck(len(rows), True)}"
        far = max(rows, key=lambda r: abs(float(r["cosine"])))
        said += f"; the largest is {number(far['cosine'], sign=True)} ({far['a']} and {far['b']}; random routes "
        out.append(said + f"{interval(far['cosine_chance_low'], far['cosine_chance_high'])}).")
    return out


def gradient_words(frame: pd.DataFrame) -> list[str]:
    """Whole-model cosines beside those of single modules, and pairs near zero as a whole whose modules pull both ways."""
    if frame.empty:
        return []
    table = frame.assign(certain=certain(frame))
    parts, wholes = table[table["scope"] == "part"], table[table["scope"] == "model"]
    sure = parts[parts["certain"]]
    together, against = int((sure["cosine"] > 0).sum()), int((sure["cosine"] < 0).sum())
    out = [
        f"Of {len(parts)} gradient cosines of a module in a layer (over {_pairs(len(wholes))} of domains), {together} pull the "
        f"same way and {against} against each other beyond the noise floor; the whole model's run from "
        f"{number(wholes['cosine'].min(), sign=True)} to {number(wholes['cosine'].max(), sign=True)}."
    ]
    for r in wholes[~wholes["certain"]].to_dict("records"):
        mine = sure[(sure["a"] == r["a"]) & (sure["b"] == r["b"])]["cosine"]
        up, down = int((mine > 0).sum()), int((mine < 0).sum())
        said = f"{r['a']} and {r['b']} are not beyond noise as a whole ({number(r['cosine'], sign=True)})"
        if up and down:
            said += (
                f", yet {up} of their modules pull the same way (up to {number(mine.max(), sign=True)}) and {down} against each "
                f"other (down to {number(mine.min(), sign=True)})"
            )
        out.append(said + ".")
    return out


def overlap_tables(frame: pd.DataFrame) -> list[Table]:
    """Overlap of every pair in the base at every share; of every model, means at the middle share."""
    base = frame[(frame["model"] == "base") & (frame["scope"] == "model")]
    own = {(r["kind"], r["top"], r["a"]): r["jaccard"] for r in base[base["a"] == base["b"]].to_dict("records")}
    rows = []
    for kind in kinds_of(base):
        for r in (
            base[(base["kind"] == kind) & (base["a"] != base["b"])].sort_values("top", kind="stable").to_dict("records")
        ):
            if r["top"] not in distinct_tops(base[base["kind"] == kind]):
                continue  # the same sets as with a smaller share
            row = [_kind(kind), _active(r), str(r["a"]), str(r["b"]), count(r["count"]), score(r["jaccard"])]
            row += [score(r["chance"]), plain(r["chance_low"], r["chance_high"]), _overlap(r)]
            rows.append([*row, *(score(own.get((kind, r["top"], r[end]))) for end in "ab")])
    head = ["kind", "share active", "a", "b", "how many there are", "Jaccard", "chance", "90\u00a0% interval of it"]
    head += ["beyond chance", "halves of a", "halves of b"]
    note = (
        "Active: the share of each layer's units, in whole units and at least one; shares that give the same sets are left out. "
        "Chance: random sets with as many units in each layer, q/(2−q) for a share q; too few to test where even equal sets "
        "would lie within its interval. Halves: the same domain on the other half of its prompts, "
        "the most that two domains can be expected to share. Overlaps layer by layer are in tables/probe_route_overlap.parquet, "
        "all scores in routes/."
    )
    return [
        table("Overlap of the base's active routes on its own responses.", head, 4, rows, note),
        table(*_models(frame)),
    ]


def _models(frame: pd.DataFrame) -> tuple[str, list[str], int, list[list[str]]]:
    """Means over pairs in every model, at the middle share."""
    rows = []
    for model in frame["model"].unique():
        whole = _whole(frame, str(model))
        for kind in kinds_of(whole):
            here = whole[whole["kind"] == kind]
            across, own = here[here["a"] != here["b"]], here[here["a"] == here["b"]]
            means = [across["jaccard"].mean(), across["chance"].mean(), own["jaccard"].mean()]
            rows.append([str(model), _kind(kind), percent(here["share"].mean()), *map(score, means)])
    caption = "The same in every model on its own responses, mean over pairs of domains."
    return caption, ["model", "kind", "share active", "Jaccard", "chance", "halves of one domain"], 2, rows


def direction_table(frame: pd.DataFrame) -> Table:
    """Updates of every pair of experts on the routes that the base uses on both domains, all layers together."""
    here = frame[(frame["layer"] == -1) & (frame["top"] == middle_top(frame))] if len(frame) else frame
    rows = []
    for kind in [*kinds_of(here), "all"]:
        mine = here[here["kind"] == kind]
        for r in mine.to_dict("records"):
            every = kind == "all"
            row = [
                "whole update" if every else _kind(kind),
                NONE if every else percent(r["share"]),
                str(r["a"]),
                str(r["b"]),
            ]
            row += [NONE if every else f"{count(r['count'])} of {count(r['units'])}", number(r["cosine"], sign=True)]
            row += [
                number(r["cosine_chance"], sign=True),
                interval(r["cosine_chance_low"], r["cosine_chance_high"]),
                _found(r),
            ]
            row += [
                percent(r["sign_agreement"]),
                percent(r["sign_chance"]),
                _percents(r["sign_chance_low"], r["sign_chance_high"]),
            ]
            rows.append(row)
    head = ["kind", "share active", "a", "b", "active for both", "cosine", "random routes", "90\u00a0% interval of it"]
    head += ["beyond it", "moved the same way", "random routes", "90\u00a0% interval of it"]
    note = (
        "Active: the share of each layer's units, in whole units; other shares, and single layers, are in "
        "tables/probe_route_direction.parquet. "
        "Random routes: as many units of each layer, drawn at random, so that what the whole updates share is in them. Moved the "
        "same way: share of the weights that both change. A dash where no unit is active for both."
    )
    return table("The experts' updates where two domains use the same routes of the base.", head, 4, rows, note)


def gradient_tables(frame: pd.DataFrame) -> list[Table]:
    """Cosines of the whole model and of modules over all layers; the strongest of single modules in single layers."""
    if frame.empty:
        return []
    every = frame.assign(certain=certain(frame))
    rows = [_gradient_row(r) for r in every[every["scope"].isin(["model", "module"])].to_dict("records")]
    head = ["a", "b", "module", "cosine", "of halves", "noise floor", "beyond noise", "halves of a", "halves of b"]
    head += ["without noise"]
    note = (
        "Cosine: mean over the four pairs of a half of a's prompts with a half of b's, which lie between “of halves”. Noise "
        "floor: 90 % of the cosines that noise alone gives there (differences between halves). Beyond noise: the cosine is, and "
        "all four have its sign. Halves of a: cosine of a's own two halves, the most that noise leaves. Without noise: the "
        "cosine over the root of the product of these two, an estimate."
    )
    sure = every[(every["scope"] == "part") & every["certain"]].sort_values("cosine", kind="stable")
    shown = list(dict.fromkeys([*sure.index[:_MOST], *sure.index[-_MOST:]]))
    most = [_gradient_row(r, layer=True) for r in sure.loc[shown].to_dict("records")]
    return [
        table("Gradient cosines of two domains at the base, over all layers.", head, 3, rows, note),
        table("Single modules that pull most against each other, and most the same way.", head, 3, most),
    ]


def _gradient_row(r: dict[Any, Any], layer: bool = False) -> list[str]:
    module = "whole model" if r["scope"] == "model" else str(r["module"])
    if layer and r["layer"] >= 0:
        module += f", layer {count(r['layer'])}"
    side = ("the same way" if r["cosine"] > 0 else "against") if r["certain"] else "no"
    row = [str(r["a"]), str(r["b"]), module, number(r["cosine"], sign=True), interval(r["lowest"], r["highest"])]
    return [*row, number(r["noise_floor"]), side, *(score(r[k]) for k in ("split_a", "split_b", "disattenuated"))]


def _whole(frame: pd.DataFrame, model: str) -> pd.DataFrame:
    """Rows of one model over all layers at the middle share."""
    here = frame[(frame["model"] == model) & (frame["scope"] == "model")]
    return here[here["top"] == middle_top(here)] if len(here) else here


def _found(r: Any) -> str:
    return verdict(r["cosine"], r["cosine_chance_low"], r["cosine_chance_high"])


def _overlap(r: Any) -> str:
    """On which side of chance an overlap lies; `_FEW` where no overlap of such sets could lie above it."""
    most = min(r["active_a"], r["active_b"]) / max(r["active_a"], r["active_b"], 1)
    found = verdict(r["jaccard"], r["chance_low"], r["chance_high"])
    return _FEW if found == "no" and r["chance_high"] >= most else found


def _active(r: Any) -> str:
    few, many = sorted((r["active_a"], r["active_b"]))
    return f"{percent(r['share'])} ({count(few)}{f' and {count(many)}' * (few != many)})"


def _percents(low: Any, high: Any) -> str:
    return f"{percent(low)} to {percent(high)}" if known(low) and known(high) else NONE


def _kind(kind: str) -> str:
    """A kind in a column; `KINDS` has it in a sentence."""
    return {"channel": "channels", "expert channel": "expert channels", "head": "heads"}.get(kind, kind)


def _pairs(number_of: int) -> str:
    return f"{number_of} pair" + "s" * (number_of != 1)
