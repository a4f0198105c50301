"""What a forecast says, in sentences, and what it does not know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from figures.data import Quantity
from interference.report.numbers import known, score, with_error

TIERS = {
    "gradient": "extrapolates the first step that training would take",
    "virtual": "runs the optimizer on the base's own rollouts, reweighted to where the policy has got to",
    "pilot": "goes on from the checkpoint of a short real training",
}
"""What a tier does; cheapest first."""


def who_is_hurt(cells: pd.DataFrame, about: Quantity) -> list[str]:
    """How many cells would change, and, of each domain that would be hurt, what hurts it most."""
    off = cells[~cells["own"]]
    if off.empty:
        return ["One domain alone: there is no other one to hurt."]
    sure = off[off["certain"]]
    harm = about.harm(sure["predicted"])
    worse, better = int((harm > 0).sum()), int((harm < 0).sum())
    out = [
        f"Of {len(off)} pairs of a training and another domain, {worse} are predicted to be hurt and {better} to be helped, with "
        f"a 90 % interval that excludes zero; of {len(off) - worse - better} the sign is not known."
    ]
    for title, chosen in (("Most hurt", harm[harm > 0].nlargest(1)), ("Most helped", harm[harm < 0].nsmallest(1))):
        out += [f"{title}: {_cell(sure.loc[index], about)}." for index in chosen.index]
    by_domain = [
        f"{domain} by training on {_worst(rows, about)}"
        for domain, rows in sure[harm > 0].groupby("domain", sort=False)
    ]
    if len(by_domain) > 1:
        out.append(f"What hurts each domain most: {'; '.join(by_domain)}.")
    totals = about.harm(off["predicted"]).groupby(off["update"], sort=False).mean()
    if len(totals) > 1:
        out.append(
            f"Over the other domains together, training on {totals.idxmax()} costs most and on {totals.idxmin()} least "
            f"(mean change {_mean(off, totals.idxmax())} and {_mean(off, totals.idxmin())})."
        )
    return out


def own_gains(cells: pd.DataFrame, about: Quantity) -> list[str]:
    """What every training would do for its own domain."""
    own = cells[cells["own"]]
    if own.empty:
        return []
    each = "; ".join(f"{r['update']} {_value(r)}" for r in own.to_dict("records"))
    failing = own[~own["certain"] | (about.harm(own["predicted"]) > 0)]
    out = [f"What each training does for its own domain ({about.unit}): {each}."]
    if len(failing):
        out.append(f"No sure gain on its own domain: {', '.join(map(str, failing['update']))}.")
    return out


def tiers_agree(frames: Mapping[str, pd.DataFrame], about: Quantity) -> list[str]:
    """How far the cheaper tiers say the same as the dearest one asked for."""
    names = [tier for tier in TIERS if tier in frames]
    if len(names) < 2:
        return []
    best, keys, out = names[-1], ["update", "domain"], list[str]()
    for tier in names[:-1]:
        both = frames[tier].merge(frames[best], on=keys, suffixes=("", "_best"))
        both = both[~both["own"]]
        if len(both) < 2:
            continue
        same = int(((both["predicted"] > 0) == (both["predicted_best"] > 0)).sum())
        rank = both["predicted"].corr(both["predicted_best"], method="spearman")
        out.append(
            f"The tiers {tier} and {best} agree on the sign of {same} of the {len(both)} off-diagonal cells"
            + (f" (rank correlation {score(rank)})." if known(rank) else ".")
        )
    return out


def warnings(results: Mapping[str, Any]) -> list[str]:
    """Notes that say where the forecast is weak: those that name a tier, and those on plans."""
    tiers = tuple(results["tiers"])
    heads = ("plans", *tiers, *(f"{o}, {tier}" for o in results["objectives"] for tier in tiers))
    return [note for note in results.get("notes") or [] if note.startswith(tuple(f"{head}: " for head in heads))]


def unknown(results: Mapping[str, Any]) -> list[str]:
    """What no number on the page knows of."""
    out = [
        "Nothing was trained to the end and nothing was measured: every number is a prediction. Its intervals hold the noise of "
        "the rollouts, of the estimated update and of the training's own randomness, and what forecasts of this tier are "
        "typically off by besides, which a base unlike those of the study may exceed.",
    ]
    if set(results["tiers"]) & {"gradient", "virtual"}:
        out.append(
            "Responses that the base never gave are not in its rollouts. A skill that only appears as training goes on cannot be "
            "foreseen from them; the effective share says how much of them is left where the policy ends up, and a pilot sees "
            "more."
        )
    if "gradient" in results["tiers"]:
        out.append(
            "The gradient tier knows the first step alone: interference that only builds up along the way is invisible to it, "
            "and of gains that saturate it knows only where rewards end."
        )
    if any(t["algorithm"] != "dpo" for t in results["trainings"].values()):
        out.append(
            "One optimizer step per batch of rollouts is assumed, so ratios are never clipped; rewards that change during "
            "training, curricula, and filtering of prompts are not seen."
        )
    if any(not given for given in results["given"].values()):
        out.append(
            "A training's effect on its own domain is tried on prompts that its update was not made from, other domains' on all "
            "of theirs; both are of the prompts given, not of others."
        )
    return out


def _cell(row: pd.Series, about: Quantity) -> str:
    return f"training on {row['update']} would change {row['domain']}'s {about.name} by {_value(row)} {about.unit}"


def _value(row: Any) -> str:
    return with_error(row["predicted"], row["stderr"])


def _worst(rows: pd.DataFrame, about: Quantity) -> str:
    row = rows.loc[about.harm(rows["predicted"]).nlargest(1).index].iloc[0]
    return f"{row['update']} ({_value(row)})"


def _mean(off: pd.DataFrame, update: Any) -> str:
    return with_error(float(off.loc[off["update"] == update, "predicted"].mean()), None)
