"""What the records of a probe run say, in sentences made from their numbers."""

from __future__ import annotations

import pandas as pd

from figures.divergences import best_estimates
from interference.report.behaviour_tables import beyond, plain
from interference.report.numbers import interval, known, number, score
from interference.report.numbers import luck as _luck


def performance(frame: pd.DataFrame) -> list[str]:
    """How many changes of reward are beyond noise, and the largest each way."""
    rows = [r for r in frame[frame["model"] != "base"].to_dict("records") if known(r["change_low"])]
    if not rows:
        return ["Changes of reward have no error bars here."] if len(frame) else []
    up = [r for r in rows if r["change_low"] > 0]
    down = [r for r in rows if r["change_high"] < 0]
    luck = _luck(len(rows), True)
    out = [f"Of {_count(len(rows), 'change')} of reward, {len(up)} are up and {len(down)} down beyond noise{luck}."]
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
    best = best_estimates(tokens)
    by = {"exact": ", exact", "k3": ", by k3", "k1": ", by k1"} if len(set(best["estimator"])) > 1 else {}
    out = []
    if signed:
        sure = sum(r["low"] > 0 for r in signed)
        out.append(
            f"Of {_count(len(signed), 'divergence')} (policy, reference, domain), {sure} are beyond what equal policies show by "
            f"the sampled tokens alone, by k1{_luck(len(signed))}."
        )
    if len(best):
        ordered = best.sort_values("value").to_dict("records")
        low, high = ordered[0], ordered[-1]
        out.append(
            f"They run from {number(low['value'])} nats per token ({low['policy']} from {low['reference']} on {low['domain']}"
            f"{by.get(low['estimator'], '')}) to {number(high['value'])} ({high['policy']} from {high['reference']} on "
            f"{high['domain']}{by.get(high['estimator'], '')})."
        )
    return out


def neighbors(frame: pd.DataFrame) -> list[str]:
    """How many pairs are neighbors, how many surely so, and whether neighbors help (one text)."""
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
    return _one(out)


def kl_forecast(frame: pd.DataFrame) -> list[str]:
    """How near the forecast of the divergence from the base comes to the measured one (one text)."""
    rows = [r for r in frame.to_dict("records") if known(r["ratio"])]
    if not rows:
        return []
    ratios = sorted(float(r["ratio"]) for r in rows)
    close = sum(0.9 <= ratio <= 1.1 for ratio in ratios)
    said = f"The divergence from the base that second order in the update forecasts is {score(ratios[len(ratios) // 2])} of "
    said += (
        f"the measured one at the median, {score(ratios[0])} to {score(ratios[-1])} over {_count(len(rows), 'pair')}"
    )
    return [f"{said} (model, domain); for {close} within 10 %."]


def gains(frame: pd.DataFrame) -> list[str]:
    """How many models gain beyond what no learning would show; what the base alone shows."""
    rows = frame[frame["role"] != "split"].to_dict("records")
    if not rows:
        return []
    sure = [r for r in rows if r["beyond_null"]]
    many = f"Of {_count(len(rows), 'gain')} (model, domain), {len(sure)}"
    out = [f"{many} are beyond what sampling noise alone makes{_luck(len(rows))}."]
    if sure:
        r = max(sure, key=lambda row: float(row["gain"] - row["null"]))
        out.append(
            f"Most beyond it is {r['model']} on {r['domain']}: {number(r['gain'])} where no learning shows {number(r['null'])} "
            f"(90 % interval {plain(r['null_low'], r['null_high'])})."
        )
    return out


def consistency(frame: pd.DataFrame) -> list[str]:
    """On how many domains every other model shares the experts' skills beyond its null, and how much of them it retains."""
    out = []
    for model, rows in frame.groupby("model", sort=False):
        seen = [r for r in rows.to_dict("records") if known(r["consistency"])]
        if not seen:
            out.append(f"{model} gained nothing, so nothing can be consistent with the experts.")
            continue
        sure, same = (
            sum(r[name] is True or r[name] == 1 for r in seen) for name in ("beyond_null", "beyond_independent")
        )
        each = ", ".join(
            f"{r['domain']} {score(r['consistency'])} against {score(r['independent'])} and {score(r['null'])}"
            for r in seen
        )
        said = f"{model} gains the experts' items more than learning others of like base rate would on {same} of "
        said += f"{_count(len(seen), 'domain')}, and more than no learning gives on {sure}"
        said += f" (consistency, beside these two: {each})"
        kept = [
            f"{score(r['retained'])} ({plain(r['retained_low'], r['retained_high'])}) on {r['domain']}"
            for r in seen
            if known(r["retained"])
        ]
        out.append(said + (f"; it retains of their skills {', '.join(kept)}." if kept else "."))
    return _one(out)


def verification(frame: pd.DataFrame) -> list[str]:
    """How many judges tell right from wrong, in each mode (one text)."""
    out: list[str] = []
    for mode, rows in frame[frame["metric"] == "auroc"].groupby("mode", sort=False):
        judged = [r for r in rows.to_dict("records") if beyond(r) in ("above", "no", "below")]
        if not judged:
            out.append(f"In {mode} mode no judge could be scored: {_reasons(rows)}.")
            continue
        above = [r for r in judged if beyond(r) == "above"]
        said = f"In {mode} mode, {len(above)} of {_count(len(judged), 'judge')} (model, domain) are beyond verdicts independent "
        said += f"of the reward, for which it may do to know which prompts are hard{_luck(len(judged))}"
        if above:
            r = max(above, key=lambda row: float(row["value"]))
            said += f"; best is {r['model']} on {r['domain']} with an AUROC of {score(r['value'])} ({plain(r['low'], r['high'])})"
        out.append(f"{said}. {_within_prompts(frame[frame['mode'] == mode])}")
    return _one(out)


def _within_prompts(frame: pd.DataFrame) -> str:
    """How many judges tell responses to one prompt apart."""
    rows = frame[frame["metric"] == "within_prompt_auroc"]
    judged = [r for r in rows.to_dict("records") if beyond(r) in ("above", "no", "below")]
    if not judged:
        return f"Within prompts none could be scored: {_reasons(rows)}."
    above = sum(beyond(r) == "above" for r in judged)
    return (
        f"Of two responses to one prompt, {above} of {_count(len(judged), 'judge')} tell the right from the wrong one beyond "
        f"chance{_luck(len(judged))}."
    )


def changes(frame: pd.DataFrame) -> list[str]:
    """How many differences of the balanced accuracy are beyond noise, training and modes apart (one text)."""
    out: list[str] = []
    for comparison, rows in frame[frame["metric"] == "balanced_accuracy"].groupby("comparison", sort=False):
        seen = rows[rows["low"].notna()]
        if seen.empty:
            continue
        up, down = int((seen["low"] > 0).sum()), int((seen["high"] < 0).sum())
        out.append(
            f"Balanced accuracy, {str(comparison).replace(' - ', ' minus ')}: of {_count(len(seen), 'difference')}, {up} are "
            f"above and {down} below zero beyond noise{_luck(len(seen), True)}."
        )
    return _one(out)


def horizon(frame: pd.DataFrame) -> list[str]:
    """How many judges are above chance, and above their own value from the prompt alone, and from which share on."""
    out, curves, zero = list[str](), 0, float(frame["horizon"].min()) == 0
    beside = " and above what it is from the prompt alone" * zero
    for (model, domain), rows in frame[frame["metric"] == "auroc"].groupby(["model", "domain"], sort=False):
        curves += 1
        reached = None
        for r in rows.sort_values("horizon", ascending=False).to_dict("records"):
            if beyond(r) != "above" or (zero and not r["from_prompt_low"] > 0):
                break
            reached = r["horizon"]
        if reached is not None:
            out.append(f"{model} on {domain} is above chance{beside} from {100 * reached:.0f} % of the response on.")
    longest = 100 * float(frame["horizon"].max())
    said = f"With {longest:.0f} % of the response seen, {len(out)} of {_count(curves, 'judge')} tell right from wrong"
    return [f"{said} beyond chance{' and beyond what they say from the prompt alone' * zero}{_luck(curves)}.", *out]


def locus(frame: pd.DataFrame) -> list[str]:
    """How many judges find the step of the error more often than chance (one text for each kind of truth)."""
    out: list[str] = []
    for source, rows in frame[frame["metric"] == "exact"].groupby("source", sort=False):
        judged = [r for r in rows.to_dict("records") if known(r["above_low"])]
        if not judged:
            continue
        above = [r for r in judged if r["above_low"] > 0]
        kind = "planted" if source == "planted" else "estimated by rollouts from prefixes"
        said = f"Where the step is {kind}, {len(above)} of {_count(len(judged), 'judge')} (model, domain) find it more often "
        said += f"than their loci of other responses would{_luck(len(judged))}"
        if above:
            r = max(above, key=lambda row: float(row["value"]))
            said += (
                f"; most often {r['model']} on {r['domain']}, {score(r['value'])} where chance is {score(r['chance'])} "
                f"and the best constant step has {score(r['constant'])}"
            )
        out.append(said + ".")
    return _one(out)


def _one(sentences: list[str]) -> list[str]:
    return [" ".join(sentences)] if sentences else []


def _reasons(rows: pd.DataFrame) -> str:
    return "; ".join(dict.fromkeys(str(r) for r in rows["reason"] if r)) or "there are no error bars"


def _count(number_of: int, noun: str) -> str:
    return f"{number_of} {noun}" + "s" * (number_of != 1)
