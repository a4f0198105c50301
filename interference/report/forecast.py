"""What the page of a forecast shows: who would be hurt by which training, how sure that is, and what it cannot know."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import pandas as pd

import figures
from figures.foretold import foretold
from interference.records import Run
from interference.report import forecast_words as words
from interference.report import plans
from interference.report.numbers import NONE, count, interval, number, percent, score, with_error
from interference.report.pictures import Pictures
from interference.report.provenance import closing, home
from interference.report.tables import Table


def page(run: Run) -> dict[str, Any]:
    """The values of forecast.html."""
    results, path = run.results, run.forecast("path")
    sections = [_objective(run, objective) for objective in results["objectives"]]
    named = [(s["id"], s["short"]) for s in sections]
    planned = plans.section(run)
    named += [("plans", "mixtures and orders")] if planned else []
    return {
        "updates": list(results["updates"]),
        "base": str(results.get("base", "")),
        "domains": list(results["domains"]),
        "tier": words.TIERS[best_tier(results)],
        "sections": sections,
        "plans": planned,
        "paths": _paths(run, path),
        "unknown": words.unknown(results),
        "warnings": words.warnings(results),
        "sections_named": [*named, *([("paths", "paths")] if len(path) else []), ("unknown", "what it cannot know")],
        "asked": [_trainings(results), _domains(run)],
        "fallbacks": None,
        **closing(
            run,
            {"base": results.get("base"), "tiers": results["tiers"], **results["settings"]},
            shlex.join(["interference", "forecast", f"{home(run)}/config.yaml"]),
        ),
    }


def best_tier(results: Mapping[str, Any]) -> str:
    """The dearest of the tiers asked for, which knows most."""
    return next(tier for tier in reversed(words.TIERS) if tier in results["tiers"])


def _objective(run: Run, objective: str) -> dict[str, Any]:
    results, main = run.results, best_tier(run.results)
    about, cells = foretold(results, objective, main)
    frames = {tier: foretold(results, objective, tier)[1] for tier in results["tiers"]}
    alt = f"Heatmaps of the predicted change in {about.name}, one for each tier. Every number is in the table of cells."
    return {
        "id": objective,
        "short": about.name,
        "about": about,
        "own_rollouts": not results["given"][objective],
        "happened": words.who_is_hurt(cells, about),
        "own": words.own_gains(cells, about),
        "tiers": words.tiers_agree(frames, about),
        "matrix": Pictures(run, objective).add("forecast", figures.forecast_matrix(results, objective), alt),
        "meant": [f"{tier} {words.TIERS[tier]}" for tier in results["tiers"]],
        "tables": [_cells(frame, tier, about.unit, tier == results["tiers"][-1]) for tier, frame in frames.items()],
    }


def _cells(cells: pd.DataFrame, tier: str, unit: str, explained: bool) -> Table:
    """Every cell with its interval, and what it rests on; with a note on the columns where `explained`."""
    head = [
        "trained on",
        "changed",
        "before",
        "predicted change",
        "90\u00a0% interval",
        "± of sampling, update, method",
    ]
    head += ["second order", "first order", "effective share", "halves agree", "sign is sure"]
    rows = [
        [
            *(str(c["update"]), str(c["domain"]), number(c["anchor_value"]), with_error(c["predicted"], c["stderr"])),
            interval(c["low"], c["high"]),
            ", ".join(number(c[f"{kind}_stderr"], 1) for kind in ("sampling", "update", "method")),
            *(number(c["predicted_second"], sign=True), number(c["predicted_first"], sign=True)),
            *(percent(c["ess"]), score(c["agreement"]), "yes" if c["certain"] else "no"),
        ]
        for c in cells.to_dict("records")
    ]
    note = (
        "Predicted: the objective's own value at the base plus the estimated update, less its present one, corrected for the "
        "noise of the estimate (tier gradient: the first order alone). ± is one standard error: of the sequences (sampling), of "
        "the update's estimate and the training's own randomness (the update), and of this way of forecasting (the method). "
        "Second and first order: the local expansion along the same update, not corrected. Effective share: how much of the "
        "responses still counts after reweighting them to the moved policy. Halves agree: the cosine of the updates estimated "
        "from two halves of the prompts. The sign is sure where the interval excludes zero and the effective share is at least "
        "10 %."
    )
    marks = ["own" if own else "" for own in cells["own"]]
    return Table(f"Every cell, tier {tier}, in {unit}.", head, 2, rows, marks, note if explained else "")


def _paths(run: Run, path: pd.DataFrame) -> list[dict[str, Any]]:
    """The paths of the virtual trainings, one picture for each tier that has them."""
    out = []
    for tier in run.results["tiers"]:
        rows = path[path["tier"] == tier]
        if len(rows):
            alt = "Expected reward and effective share of the responses along every virtual training, by half of the prompts."
            picture = Pictures(run, "forecast").add(
                f"path_{tier}", figures.forecast_paths(path, run.results, tier), alt
            )
            out.append({"picture": picture, "table": _path_ends(rows, run.results["updates"], tier)})
    return out


def _path_ends(rows: pd.DataFrame, updates: list[str], tier: str) -> Table:
    """Where every path ends."""
    body = []
    for name in updates:
        for half, mine in rows[rows["domain"] == name].sort_values("step").groupby("half"):
            first, last = mine.iloc[0], mine.iloc[-1]
            tempered = float((mine["exponent"] < 1).mean())
            body.append(
                [
                    *(str(name), count(half), count(int(last["step"])), count(len(mine)), number(first["reward"])),
                    *(number(last["reward"]), percent(mine["ess"].min()), percent(tempered)),
                ]
            )
    head = [
        "trained on",
        "half",
        "steps",
        "taken",
        "reward at first",
        "reward at last",
        "least effective share",
        "tempered",
    ]
    note = "Rewards are of minibatches, so they are noisy. Steps taken stand for all steps of the training."
    return Table(f"Where the paths end, tier {tier}.", head, 2, body, [""] * len(body), note)


def _trainings(results: Mapping[str, Any]) -> Table:
    """How every training would go, as far as the algorithm looks at it."""
    keys = ("algorithm", "optimizer", "learning_rate", "steps", "schedule", "prompts_per_step", "generations")
    rows = []
    for name, t in results["trainings"].items():
        rest = {k: v for k, v in t.items() if k not in keys and v is not None}
        rows.append([name, *(str(t[k]) for k in keys), ", ".join(f"{k} {_plain(v)}" for k, v in rest.items())])
    head = ["trained on", *(k.replace("_", " ") for k in keys), "and"]
    return Table("Trainings: what is forecast.", head, 1, rows, [""] * len(rows))


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{k} {v}" for k, v in value.items()) + ")"
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


def _domains(run: Run) -> Table:
    """Where the rollouts come from, and how many they are."""
    rows = []
    for entry in run.config.get("domains") or []:
        known = run.results["rollouts"][entry["name"]]
        source = entry.get("data") or f"{entry.get('prompts')}, sampled here, rewarded by {entry.get('verifier')}"
        rows.append(
            [
                *(str(entry["name"]), str(source or NONE), count(known["prompts"]), count(known["responses"])),
                *(number(known["mean_reward"]), number(known["mean_tokens"])),
            ]
        )
    head = ["domain", "rollouts of the base", "prompts", "responses", "mean reward", "mean tokens"]
    return Table("Domains: what the forecast was made from.", head, 1, rows, [""] * len(rows))
