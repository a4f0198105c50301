"""What the records say, in sentences: who hurts whom, how well it was predicted, how far the prediction reaches.

Every sentence is made from numbers of the record, and says so as plainly when a prediction did badly or when nothing was
measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from figures.data import Quantity
from figures.style import predictor
from interference.report.numbers import count, known, number, score, with_error

_FAR_BELOW = 0.75
"""Coverage of 90 % intervals below which the remaining error is clearly more than sampling noise."""

_OURS = ("third_order", "second_order", "second_order_ggn", "first_order")


def what_happened(cells: pd.DataFrame, about: Quantity) -> list[str]:
    """Which update helps and which hurts which domain most, as measured; as predicted where nothing was measured."""
    off = cells[~cells["own"]]
    measured = off[off["measured"].notna()]
    if cells["measured"].notna().sum() == 0:
        strongest = off if len(off) else cells
        return [
            f"Nothing was measured for {about.name}, so what follows is a prediction only.",
            *_extremes(strongest[strongest["certain"]], about, "predicted_second", "stderr"),
        ]
    what = "off-diagonal cell"
    if measured.empty:
        measured, what = cells[cells["measured"].notna()], "cell"
    sure = measured[measured["detected"]]
    worse = int((about.harm(sure["measured"]) > 0).sum())
    out = [_tally(len(measured), worse, len(sure) - worse, what)]
    missing = len(cells) - int(cells["measured"].notna().sum())
    if missing:
        out.append(f"{missing} of {len(cells)} cells were not measured.")
    return out + _extremes(sure, about, "measured", "measured_stderr")


def _tally(total: int, worse: int, better: int, what: str) -> str:
    of = f"Of the {total} measured {what}s" if total > 1 else f"Of one measured {what}"
    if worse + better == 0:
        return f"{of}, none changed by more than its own 90 % noise."
    unclear = total - worse - better
    rest = f"; in {unclear} no change can be told from noise" if unclear else ""
    return f"{of}, {worse} got worse and {better} got better by more than their own 90 % noise{rest}."


def _extremes(cells: pd.DataFrame, about: Quantity, column: str, error: str) -> list[str]:
    out = []
    harm = about.harm(cells[column])
    for title, chosen in (("Most hurt", harm[harm > 0].nlargest(1)), ("Most helped", harm[harm < 0].nsmallest(1))):
        for index in chosen.index:
            row = cells.loc[index]
            verb = "changes" if column == "measured" else "is predicted to change"
            predicted = with_error(row["predicted_second"], row["stderr"])
            also = f" (predicted {predicted})" if column == "measured" else ""
            out.append(
                f"{title}: training on {row['update']} {verb} {row['domain']}'s {about.name} by "
                f"{with_error(row[column], row[error])} {about.unit}{also}."
            )
    if not out and column != "measured":
        out.append("No predicted change is beyond its own 90 % noise.")
    return out


def how_well(cards: Mapping[str, Any], cells: pd.DataFrame) -> list[str]:
    """How well the second order predicted what was measured, beside the first order and the best baseline."""
    part, where = ("off_diagonal", "off-diagonal cells") if cards.get("off_diagonal") else ("all", "cells")
    card: Mapping[str, Mapping[str, Any]] = cards.get(part) or {}
    second = card.get("second_order", {})
    if not known(second.get("spearman")):
        if cells["measured"].notna().any():
            return ["Too few cells were measured to score the prediction."]
        return []
    detectable = second.get("cells_detectable")
    between = ""
    if known(second.get("spearman_low")) and known(second.get("spearman_high")):
        between = f" (90 % interval {score(second['spearman_low'])} to {score(second['spearman_high'])})"
    sign = ""
    if known(second.get("sign_accuracy")) and known(detectable):
        right = round(second["sign_accuracy"] * detectable)
        sign = f" It has the right sign in {right} of the {count(detectable)} whose measured change is beyond noise."
    judged = cells if part == "all" else cells[~cells["own"]]
    out = [
        _verdict(second) + _remaining_error(second, judged, where),
        f"The second order (Hessian) ranks the {count(second.get('cells'))} {where} with Spearman "
        f"{score(second['spearman'])}{between}; {_slope(second.get('slope'))}.{sign}",
    ]
    if known(second.get("coverage")):
        covered = round(second["coverage"] * second["cells"])
        why = ": it accounts for the choice of prompts, not for what a quadratic model leaves out"
        rest = why if second["coverage"] < _FAR_BELOW else ""
        out.append(
            f"The paired 90 % interval of measured minus predicted holds zero in {covered} of {count(second['cells'])} "
            f"cells{rest}."
        )
    if known(second.get("coverage_truncation")):
        covered = round(second["coverage_truncation"] * second["cells"])
        out.append(
            f"With what the second order is predicted to leave out added to it, from alpha up to 0.5 alone, the interval holds "
            f"zero in {covered} of {count(second['cells'])}."
        )
    out += _rivals(card, second)
    if known(second.get("cells")) and second["cells"] < 6:
        out.append(f"{count(second['cells'])} cells are few: these scores are weak evidence.")
    return out


def _slope(slope: Any) -> str:
    if not known(slope):
        return "its calibration slope is not defined"
    text = f"its calibration slope is {score(slope)} (1 is perfect"
    if slope <= 0:
        return text + "; at zero or below, size carries no information)"
    if slope > 1.1:
        return text + "; changes turn out larger than predicted)"
    if slope < 0.9:
        return text + "; changes turn out smaller than predicted)"
    return text + ")"


def _verdict(card: Mapping[str, Any]) -> str:
    rank, slope, sign = card["spearman"], card.get("slope"), card.get("sign_accuracy")
    calibrated = known(slope) and 0.8 <= slope <= 1.25
    signs = not known(sign) or sign >= 0.9
    if rank >= 0.9 and calibrated and signs:
        return "The local theory explains what was measured, in order, size and sign."
    if rank >= 0.6:
        lacks = [
            what
            for what, fails in (
                ("the order is only partly right", rank < 0.9),
                ("the sizes are off", not calibrated),
                ("some signs are wrong", not signs),
            )
            if fails
        ]
        return f"The local theory explains part of what was measured: {', '.join(lacks)}."
    return "The local theory does not explain what was measured; do not act on these predictions."


def _remaining_error(card: Mapping[str, Any], cells: pd.DataFrame, where: str) -> str:
    """What a verdict must not be said without: how large the error is where sampling noise does not explain it."""
    if not known(card.get("coverage")) or card["coverage"] >= _FAR_BELOW:
        return ""
    rows = cells[cells["measured"].notna() & cells["predicted_second"].notna() & (cells["measured"] != 0)]
    if rows.empty:
        return ""
    share = 100 * float(((rows["measured"] - rows["predicted_second"]) / rows["measured"]).abs().median())
    missed = count((1 - card["coverage"]) * card["cells"])
    return (
        f" But sampling noise alone does not explain what is left in {missed} of {count(card['cells'])} {where}: the median "
        f"error is {number(share, 2)} % of the measured change."
    )


def what_is_tested(objective: str) -> str:
    """Which data stand on either side of the comparison, and so what it can and cannot show."""
    if objective in ("nll", "kl"):
        return (
            "Prediction and measurement use the same sequences here, so the comparison tests the local theory (what the "
            "Taylor series leaves out), not whether the prediction generalises to other data."
        )
    return (
        "The prediction uses rollouts of the base model that were given; the measured change is one of mean rewards on fresh "
        "rollouts, sampled for the measurement, so the sampling noise of both enters the comparison."
    )


def _rivals(card: Mapping[str, Mapping[str, Any]], second: Mapping[str, Any]) -> list[str]:
    out = []
    third = card.get("third_order", {})
    if known(third.get("spearman")):
        out.append(
            f"Extrapolated to third order it reaches Spearman {score(third['spearman'])} and slope {score(third.get('slope'))}."
        )
    first = card.get("first_order", {})
    if known(first.get("spearman")):
        out.append(
            f"The first order alone reaches Spearman {score(first['spearman'])} and slope {score(first.get('slope'))}."
        )
    baselines = {n: c["spearman"] for n, c in card.items() if n not in _OURS and known(c.get("spearman"))}
    if baselines:
        best = max(baselines, key=lambda n: baselines[n])
        beats = baselines[best] > second["spearman"]
        note = ", which ranks better than the second order" if beats else ""
        out.append(f"The best baseline is {predictor(best).label} with Spearman {score(baselines[best])}{note}.")
    return out


def how_far(cells: pd.DataFrame, estimated: bool) -> list[str]:
    """Where the radius ends, cell by cell, and which cells are beyond theirs."""
    if (cells["radius_reason"] == "none").all():
        return ["No radius was recorded, so how far the second order holds is unknown."]
    what = "importance-weighted estimate" if estimated else "measured change"
    out = []
    held = cells[cells["radius_reason"] == "held"]
    largest = f" ({held['radius'].max():g})" if len(held) else ""
    if len(held) == len(cells):
        out.append(
            f"In every cell the radius is beyond the largest alpha tried{largest}: the second order stays within 10 % of "
            f"the {what} throughout."
        )
    else:
        out.append(
            f"The second order stays within 10 % of the {what} up to the largest alpha tried{largest} in {len(held)} of "
            f"{len(cells)} cells."
        )
    left = cells[cells["radius_reason"] == "left"].sort_values("radius")
    if len(left):
        ends = [f"{c['update']} → {c['domain']} {_where_left(c)}" for c in left.to_dict("records")]
        out.append(f"It leaves by more than 10 % and more than noise at alpha: {_listed(ends)}.")
        if (left["radius_judged"] < left["radius"]).any():
            out.append(
                "Between two alphas: sampling noise hides where it leaves after the first, and it has left at the second."
            )
    beyond = cells[cells["beyond_radius"]]
    if len(beyond):
        out.append(f"The radius ends before alpha 1, so the update itself lies beyond it: {_names(beyond)}.")
    for reason, why in (("ess", "the effective sample size falls below 10 %"), ("noise", "sampling noise hides it")):
        rows = cells[cells["radius_reason"] == reason]
        for judged in sorted(set(rows["radius_judged"])):
            group = rows[rows["radius_judged"] == judged]
            start = f"beyond alpha {judged:.2g}" if judged > 0 else "at any alpha"
            out.append(f"It cannot be judged {start}, because {why}: {_names(group)}.")
    return out


def left_out(cells: pd.DataFrame) -> list[str]:
    """How large the predicted truncation is, and how near it came."""
    rows = cells[cells["truncation"].notna()]
    if rows.empty:
        return []
    share = 100 * float((rows["truncation"] / rows["predicted_second"]).abs().median())
    out = [
        "What the second order leaves out is predicted from the objective's own value at alpha up to 0.5: in the median cell "
        f"{number(share, 2)} % of the predicted change."
    ]
    both = rows[rows["measured"].notna()]
    if len(both):
        second, third = ((both["measured"] - both[c]).abs() for c in ("predicted_second", "predicted_third"))
        out.append(
            f"Adding it brings the prediction nearer to the measured change in {int((third < second).sum())} of {len(both)}."
        )
    return out


def _where_left(cell: Mapping[Any, Any]) -> str:
    """The radius; from where to where it lies, if noise hides the way there."""
    if known(cell["radius_judged"]) and cell["radius_judged"] < cell["radius"]:
        return f"between {cell['radius_judged']:.2f} and {cell['radius']:.2f}"
    return f"{cell['radius']:.2f}"


def _names(rows: pd.DataFrame, most: int = 12) -> str:
    return _listed([f"{u} → {d}" for u, d in zip(rows["update"], rows["domain"], strict=True)], most)


def _listed(names: Sequence[str], most: int = 12) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def effective_samples(cells: pd.DataFrame) -> list[str]:
    """The range of the effective sample sizes at alpha 1; nothing for an objective without importance weights."""
    rows = cells[cells["ess"].notna() & cells["sequences"].notna()]
    if rows.empty:
        return []
    share = rows["ess"] / rows["sequences"]
    least, most = rows.iloc[int(share.argmin())], rows.iloc[int(share.argmax())]
    few = int((share < 0.1).sum())
    out = [
        "Effective sample size of the base model's rollouts at alpha 1: from "
        f"{count(least['ess'])} of {count(least['sequences'])} ({least['update']} → {least['domain']}) to "
        f"{count(most['ess'])} of {count(most['sequences'])} ({most['update']} → {most['domain']})."
    ]
    if few:
        out.append(
            f"In {few} of {len(rows)} cells it is below 10 %: there the estimate and the second order are unreliable."
        )
    return out
