"""What the page of a probe run shows: what models solve, how far they are apart, how well they judge themselves."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

import figures
from interference.records import PROBES, Run
from interference.report import behaviour_routes as routes
from interference.report import behaviour_tables as tables
from interference.report import behaviour_words as words
from interference.report import judging_tables
from interference.report.numbers import NONE
from interference.report.pictures import Pictures
from interference.report.provenance import closing, home
from interference.report.tables import Table

_UNUSED = ("verdicts", "items")
"""Tables that the page does not need; they can be long."""

Frames = Mapping[str, pd.DataFrame]


def page(run: Run) -> dict[str, Any]:
    """The values of probe.html."""
    table = {name: run.probe(name) for name in PROBES if name not in _UNUSED}
    sections = [make(run, table) for name, make in _SECTIONS.items() if len(table[name])]
    return {
        "updates": list(run.results["models"]),
        "base": str(run.results.get("base", "")),
        "domains": list(run.results["domains"]),
        "sections": sections,
        "sections_named": [(s["id"], s["short"]) for s in sections],
        "found": [s["short_said"] for s in sections if s["short_said"]],
        "asked": _asked(run),
        "fallbacks": None,
        **closing(
            run,
            {"base": run.results.get("base"), "probes": run.results.get("probes"), **_flat(run.results["settings"])},
            shlex.join(["interference", "probe", f"{home(run)}/config.yaml"]),
        ),
    }


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of settings under names of their own, so that each has a line."""
    out: dict[str, Any] = {}
    for key, value in settings.items():
        nested = isinstance(value, Mapping)
        out |= {f"{key}: {name}": inner for name, inner in value.items()} if nested else {key: value}
    return out


def _asked(run: Run) -> list[Table]:
    """Models and domains of the request."""
    models = [[str(m["name"]), str(m.get("kind")), str(m.get("model") or NONE)] for m in run.config.get("models") or []]
    domains = [
        [str(d["name"]), *(str(d.get(key) or NONE) for key in ("prompts", "verifier", "data"))]
        for d in run.config.get("domains") or []
    ]
    return [
        tables.table("Models: what was probed.", ["model", "kind", "checkpoint"], 1, models),
        tables.table("Domains.", ["domain", "prompts", "verifier", "rollouts given"], 1, domains),
        tables.table("Judge templates.", ["mode", "text"], 1, _templates(run.results.get("templates") or {})),
    ]


def _templates(templates: Mapping[str, Any]) -> list[list[str]]:
    """Mode and text of every template; of a chat, the role before every message."""
    return [
        [mode, text if isinstance(text, str) else " / ".join(f"{role}: {content}" for role, content in text)]
        for mode, text in templates.items()
    ]


def _section(key: str, short: str, title: str, asked: str, *said: list[str], **rest: Any) -> dict[str, Any]:
    """A section; of each list of sentences the first also stands in the summary. `pictures`, with `how` to read them, come
    before its tables."""
    empty: dict[str, Any] = {"pictures": [], "how": "", "tables": []}
    words = {
        "said": [s for several in said for s in several],
        "short_said": [several[0] for several in said if several],
    }
    return {"id": key, "short": short, "title": title, "asked": asked, **words, **empty, **rest}


def _picture(run: Run, name: str, figure: Figure, description: str) -> Markup:
    """A figure of the run, saved and ready for the page; every number in it stands in a table below."""
    return Pictures(run, "probe").add(name, figure, f"{description} Every number is in the tables below.")


def _performance(run: Run, table: Frames) -> dict[str, Any]:
    return _section(
        "performance",
        "reward",
        "What do they score?",
        "The mean reward of every model on every domain's prompts, and its change from the base's.",
        words.performance(table["performance"]),
        tables=[tables.performance(table["performance"])],
    )


def _neighborhoods(run: Run, table: Frames) -> dict[str, Any]:
    kl, near, forecast = table["kl"], table["neighbors"], table["kl_forecast"]
    alt = "Heatmaps of the divergence of every tuned policy from each multi-task or merged model and from the base, by domain, "
    pictures = [
        _picture(
            run, "divergences", figures.divergence_matrix(kl, near, run.results), alt + "beside the change of reward."
        )
    ]
    foretold = forecast["forecast"].notna().any()
    if foretold:
        alt = "Scatter of the forecast divergence of every tuned model from the base against the measured one."
        drawn = figures.kl_forecast_against_measured(forecast, run.results)
        pictures.append(_picture(run, "kl_forecast", drawn, alt))
    return _section(
        "neighborhoods",
        "how far apart?",
        "How far are the policies from one another?",
        "The Kullback-Leibler divergence of one policy from another at the states that the first one's own responses visit, "
        "and whether an expert is as near to a multi-task or merged model, on another domain's prompts, as that domain's own.",
        words.divergences(kl),
        words.neighbors(near),
        words.kl_forecast(forecast),
        pictures=pictures,
        how="If neighbors help, marked cells are blue in the panel of the reward; marks are by k3, paired over prompts, "
        + "so that near ties may differ from the cells' own numbers. "
        + "In the scatter, a point on the line: the update's second order says how far the policy moves."
        * bool(foretold),
        tables=[tables.divergences(kl), tables.neighbors(near), tables.kl_forecast(forecast)],
    )


def _routes(run: Run, table: Frames) -> dict[str, Any]:
    overlap, direction, add = table["route_overlap"], table["route_direction"], Pictures(run, "probe").add
    described = (
        "Overlap of the active routes of every pair of domains beside chance. Every number is in the table below."
    )
    pictures = [add("route_overlap", figures.route_overlap(overlap, run.results), described)]
    how = "A dot right of its grey bar: the two domains use the same routes more often than chance; among the triangles: as much "
    how += "as one domain does with itself."
    if len(direction):
        described = (
            "Cosine of the updates of every pair of experts on shared routes. Every number is in the table below."
        )
        pictures.append(add("route_direction", figures.route_direction(direction, run.results), described))
        how = f"Above: {how[0].lower()}{how[1:]} Below: right of zero the two updates move what both domains use the same way, "
        how += "left of it against each other; only outside of the grey bar is it more than they do on any routes."
    return _section(
        "routes",
        "shared routes?",
        "Do the domains use the same routes, and do the updates point the same way there?",
        "A route is the set of MLP channels and attention heads that a model uses most while it writes its own responses to a "
        "domain's prompts; the score is our own stand-in for an active route, since the paper's is not known.",
        routes.overlap_words(overlap),
        routes.direction_words(direction),
        pictures=pictures,
        how=how,
        tables=[*routes.overlap_tables(overlap), routes.direction_table(direction)],
    )


def _gradients(run: Run, table: Frames) -> dict[str, Any]:
    frame = table["gradient_agreement"]
    of = {"reward": "policy gradient (of the expected reward)", "nll": "gradient of the negative log-likelihood"}
    alt = "Gradient cosines of every pair of domains by module. The tables below hold those over all layers, and the strongest."
    return _section(
        "gradients",
        "pulled the same way?",
        "Do the domains pull the weights the same way?",
        f"The {of[str(frame['objective'].iloc[0])]} of each domain at the base, on the base's own responses: its cosine with "
        "another domain's, of the whole model and module by module, beside what sampling noise alone gives.",
        routes.gradient_words(frame),
        pictures=[Pictures(run, "probe").add("gradients", figures.gradient_cosine(frame, run.results), alt)],
        how="Teal: the two domains want a module changed the same way; purple: against each other; hollow: no more than noise. A "
        "cosine says what a small step would do, not which domain is harmed: that is what interference diagnose forecasts.",
        tables=routes.gradient_tables(frame),
    )


def _skills(run: Run, table: Frames) -> dict[str, Any]:
    pictures = []
    if len(table["consistency"]):
        alt = "Consistency of every multi-task and merged model with the experts' union, beside the level without learning."
        pictures = [_picture(run, "skills", figures.skill_consistency(table["consistency"], run.results), alt)]
    return _section(
        "skills",
        "same skills?",
        "Which skills did the experts gain, and do the others have the same?",
        "Success rates item by item: the gain over the base, the union of the experts' gains, and how consistent the other "
        "models' gains are with it, each beside what models that learned nothing would show.",
        words.gains(table["gains"]),
        words.consistency(table["consistency"]),
        pictures=pictures,
        how="A filled point to the right of its grey bar: gains that share items beyond noise; whether these are the experts' "
        "rather than any of like base rate, the table says beside “other items”.",
        tables=[
            tables.gains(table["gains"]),
            tables.consistency(table["consistency"]),
            tables.shared(table["shared"]),
        ],
    )


def _verification(run: Run, table: Frames) -> dict[str, Any]:
    scores, changes = table["verification"], table["verification_changes"]
    pictures = []
    if set(scores["mode"]) == {"outcome", "process"}:
        alt = "Balanced accuracy of every judge from the whole response against that from the final answer, a panel a domain."
        pictures = [_picture(run, "verification", figures.outcome_against_process(scores, run.results), alt)]
    return _section(
        "verification",
        "judging itself",
        "How well does each model judge its own responses?",
        "In outcome mode the judge sees the final answer alone, in process mode the whole response; its verdicts are scored "
        "against the reward. Chance is a judge whose verdicts are independent of the reward. One that knows which prompts are "
        "hard is above it without looking at the response, but for the AUROC within prompts.",
        words.verification(scores),
        words.changes(changes),
        pictures=pictures,
        how="Above the diagonal, the reasoning helps the judge; away from the hollow point, training changed it.",
        tables=[judging_tables.verification(scores), judging_tables.rates(scores), judging_tables.changes(changes)],
    )


def _horizon(run: Run, table: Frames) -> dict[str, Any]:
    return _section(
        "horizon",
        "how early?",
        "From how much of the response can it tell?",
        "The same judge, shown the first part of each response only.",
        words.horizon(table["horizon"]),
        pictures=[
            _picture(
                run,
                "horizon",
                figures.horizon_curve(table["horizon"], run.results),
                "AUROC of every judge by the share of the response seen, beside the base's, a panel a model and domain.",
            )
        ],
        how="Where a line rises above its own left end, where only the prompt is seen, the response begins to tell the judge "
        "something.",
        tables=[judging_tables.horizon(table["horizon"])],
    )


def _locus(run: Run, table: Frames) -> dict[str, Any]:
    found, agreement = table["locus"], table["locus_agreement"]
    alt = "Bubbles of the step from which a judge holds a response for wrong, by the step where it went wrong."
    return _section(
        "locus",
        "where is the error?",
        "Does the judge see where a response went wrong?",
        "Of wrong responses: the step from which on the judge, shown one step more at a time, keeps holding it for wrong, "
        "against the step where it went wrong: a planted one, or the one after which the model's continuations cease to succeed.",
        words.locus(agreement),
        pictures=[_picture(run, "locus", figures.locus_of_error(found, run.results), alt)] if len(agreement) else [],
        how="Filled bubbles lie on the line: there the judge sees the error at its step; above the line late, below it too "
        "early. Over each panel: how the true step is known, and of how many wrong responses.",
        tables=[judging_tables.locus(agreement), judging_tables.loci(found)],
    )


_SECTIONS: Mapping[str, Callable[[Run, Frames], dict[str, Any]]] = {
    "performance": _performance,
    "kl": _neighborhoods,
    "route_overlap": _routes,
    "gradient_agreement": _gradients,
    "gains": _skills,
    "verification": _verification,
    "horizon": _horizon,
    "locus": _locus,
}
"""What makes each section, by the table without whose rows it is left out."""
