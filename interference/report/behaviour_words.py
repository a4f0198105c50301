"""What the records of a probe run say, in sentences made from their numbers."""

from __future__ import annotations

import pandas as pd

from interference.report.behaviour_tables import beyond, plain
from interference.report.numbers import interval, known, number, score


def performance(frame: pd.DataFrame) -> list[str]:
    """How many changes of reward are beyond noise, and the largest each way."""
    rows = [r for r in frame[frame["model"] != "base"].to_dict("records") if known(r["change_low"])]
    if not rows:
        return ["Changes of reward have no error bars here."] if len(frame) else []
    up = [r for r in rows if r["change_low"] > 0]
    down = [r for r in rows if r["change_high"] < 0]
    out = [f"Of {_count(len(rows), 'change')} of reward, {len(up)} are up and {len(down)} down beyond noise."]
    for several, most, word in ((up, max, "gain"), (down, min, "loss")):
        if several:
            r = most(several, key=lambda row: float(row["change"]))
            out.append(
                f"The largest {word} is {r['model']} on {r['domain']}: {number(r['change'], sign=True)} "
                f"(90 % interval {interval(r['change_low'], r['change_high'])})."
            )
    return out


def divergences(frame: pd.DataFrame) -> list[str]:
    """How many divergences are beyond noise, and the largest and smallest."""
    tokens = frame[frame["per"] == "token"]
    signed = [r for r in tokens[tokens["estimator"] == "k1"].to_dict("records") if known(r["low"])]
    best = tokens[tokens["estimator"] == ("exact" if (tokens["estimator"] == "exact").any() else "k3")]
    out = []
    if signed:
        sure = sum(r["low"] > 0 for r in signed)
        out.append(
            f"Of {_count(len(signed), 'divergence')} (policy, reference, domain), {sure} are beyond what equal policies show by "
            "the sampled tokens alone (k1, whose expectation is then 0)."
        )
    if len(best):
        ordered = best.sort_values("value").to_dict("records")
        low, high = ordered[0], ordered[-1]
        out.append(
            f"They run from {number(low['value'])} nats per token ({low['policy']} from {low['reference']} on {low['domain']}) "
            f"to {number(high['value'])} ({high['policy']} from {high['reference']} on {high['domain']})."
        )
    return out


def neighbors(frame: pd.DataFrame) -> list[str]:
    """How many pairs are neighbors, how many surely so, and whether neighbors help."""
    if frame.empty:
        return []
    out = []
    for reference, rows in frame.groupby("reference", sort=False):
        near, far = rows[rows["neighbor"].astype(bool)], rows[~rows["neighbor"].astype(bool)]
        said = f"Beside {reference}, {len(near)} of {_count(len(rows), 'pair')} (domain, other expert) are neighbors"
        sure = int(near["certain"].astype(bool).sum())
        said += f", {sure} of them beyond noise." if len(near) else "."
        means = [float(part["change"].astype(float).mean()) for part in (near, far)]
        if all(known(m) for m in means):
            said += (
                f" Neighbors change the reward there by {number(means[0], sign=True)} on average, the others by "
                f"{number(means[1], sign=True)}; {_count(len(rows), 'pair')} cannot settle whether that is more than chance."
            )
        out.append(said)
    return out


def gains(frame: pd.DataFrame) -> list[str]:
    """How many models gain beyond what no learning would show; what the base alone shows."""
    rows = frame[frame["role"] != "split"].to_dict("records")
    if not rows:
        return []
    sure = [r for r in rows if r["beyond_null"]]
    out = [f"Of {_count(len(rows), 'gain')} (model, domain), {len(sure)} are beyond what sampling noise alone makes."]
    if sure:
        r = max(sure, key=lambda row: float(row["gain"] - row["null"]))
        out.append(
            f"Most beyond it is {r['model']} on {r['domain']}: {number(r['gain'])} where no learning shows {number(r['null'])} "
            f"(90 % interval {plain(r['null_low'], r['null_high'])})."
        )
    return out


def consistency(frame: pd.DataFrame) -> list[str]:
    """Every other model's consistency, beside its null, in one sentence each."""
    out = []
    for r in frame.to_dict("records"):
        if not known(r["consistency"]):
            out.append(f"{r['model']} on {r['domain']}: no gain, so no consistency with the experts.")
            continue
        said = f"{r['model']} on {r['domain']}: consistency {score(r['consistency'])} where no learning gives {score(r['null'])}"
        said += f" (90 % interval {plain(r['null_low'], r['null_high'])})"
        said += ", beyond it" if r["beyond_null"] else ", not beyond it"
        if known(r["retained"]):
            said += f"; it retains {score(r['retained'])} of the experts' skills ({plain(r['retained_low'], r['retained_high'])})"
        out.append(said + ".")
    return out


def verification(frame: pd.DataFrame) -> list[str]:
    """How many judges tell right from wrong, in each mode."""
    out = []
    for mode, rows in frame[frame["metric"] == "auroc"].groupby("mode", sort=False):
        judged = [r for r in rows.to_dict("records") if beyond(r) in ("above", "no", "below")]
        if not judged:
            out.append(f"In {mode} mode no judge could be scored: {_reasons(rows)}.")
            continue
        above = [r for r in judged if beyond(r) == "above"]
        said = f"In {mode} mode, {len(above)} of {_count(len(judged), 'judge')} (model, domain) tell right from wrong beyond"
        said += " chance"
        if above:
            r = max(above, key=lambda row: float(row["value"]))
            said += f"; best is {r['model']} on {r['domain']} with an AUROC of {score(r['value'])} ({plain(r['low'], r['high'])})"
        out.append(said + ".")
    return out


def changes(frame: pd.DataFrame) -> list[str]:
    """How many differences of the balanced accuracy are beyond noise, training and modes apart."""
    out = []
    for comparison, rows in frame[frame["metric"] == "balanced_accuracy"].groupby("comparison", sort=False):
        seen = rows[rows["low"].notna()]
        if seen.empty:
            continue
        up, down = int((seen["low"] > 0).sum()), int((seen["high"] < 0).sum())
        out.append(
            f"Balanced accuracy, {str(comparison).replace(' - ', ' minus ')}: of {_count(len(seen), 'difference')}, {up} are "
            f"above and {down} below zero beyond noise."
        )
    return out


def horizon(frame: pd.DataFrame) -> list[str]:
    """From which share of the response each judge is above chance."""
    out = []
    for (model, domain), rows in frame[frame["metric"] == "auroc"].groupby(["model", "domain"], sort=False):
        ordered = rows.sort_values("horizon", ascending=False).to_dict("records")
        reached = None
        for r in ordered:
            if beyond(r) != "above":
                break
            reached = r["horizon"]
        if reached is not None:
            out.append(f"{model} on {domain} tells right from wrong from {100 * reached:.0f} % of the response on.")
    curves = len(frame[["model", "domain"]].drop_duplicates())
    return out or [f"None of {_count(curves, 'judge')} tells right from wrong beyond chance with the whole response."]


def _reasons(rows: pd.DataFrame) -> str:
    return "; ".join(dict.fromkeys(str(r) for r in rows["reason"] if r)) or "there are no error bars"


def _count(number_of: int, noun: str) -> str:
    return f"{number_of} {noun}" + "s" * (number_of != 1)
