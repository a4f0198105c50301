"""The probe "routes": what models run through on every domain, where updates meet there, and what the domains' gradients say.

routes/DOMAIN/MODEL.parquet, MODEL.json     scores of MODEL's channels and heads on its own responses; how many, and notes
cache/route_direction.parquet               the experts' updates on the base's routes
cache/gradient_agreement-REWARDS.parquet    and cache/gradients/, of which it is made
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from interference import anatomy as anatomies
from interference import records, tree
from interference.anatomy import Anatomy
from interference.errors import InputError
from interference.model import spellings
from interference.objectives import reward_terms
from interference.pairing import Base
from interference.probes.gradients import gradient_agreement
from interference.probes.halves import prompt_halves
from interference.probes.routes import Routes, active_routes, route_overlap
from interference.probes.shared_routes import update_on_routes
from interference.probing import stages
from interference.probing.stages import Work
from interference.records import PROBES
from interference.update import Update


def routed_models(work: Work) -> list[str]:
    """The base and the experts."""
    return ["base", *work.config.experts]


def route_tables(work: Work) -> dict[str, pd.DataFrame]:
    """Overlap of the domains' routes in every model, the experts' updates on them, and cosines of the domains' gradients."""
    config = work.config
    parts = []
    for model in routed_models(work):
        found = {domain: routes_of(work, model, domain) for domain in work.domains}
        parts.append(route_overlap(found, config.routes.tops).assign(model=model))
    return {
        "route_overlap": pd.concat(parts, ignore_index=True),
        "route_direction": _direction(work),
        "gradient_agreement": _gradients(work),
    }


def routes_of(work: Work, model: str, domain: str) -> Routes:
    """A model's active routes on its own responses."""
    path = work.folder / "routes" / domain / f"{model}.parquet"
    about = path.with_suffix(".json")
    if not (path.is_file() and about.is_file()):
        answers = stages.responses(work, model, domain).domain
        work.say(f"routes of {model} on {domain}")
        found = active_routes(
            work.models[model],
            answers,
            variant=work.config.routes.variant,
            anatomy=_anatomy(work),
            seed=work.config.seed,
            batch_tokens=work.config.batch_tokens,
        )
        records.write_table(path, found.scores)
        records.write_json(about, {"prompts": found.prompts, "tokens": found.tokens, "notes": list(found.notes)})
    known = records.read_json(about)
    counts = {"prompts": int(known["prompts"]), "tokens": int(known["tokens"])}
    return Routes(domain, work.config.routes.variant, pd.read_parquet(path), **counts, notes=tuple(known["notes"]))


def _anatomy(work: Work) -> Anatomy:
    """Of the base, whose layout is that of every model of the run. Read once: it asks the base's forward pass."""
    if work.anatomy is None:
        work.anatomy = anatomies.read(work.models["base"])
    return work.anatomy


def _direction(work: Work) -> pd.DataFrame:
    """The experts' updates where the base's routes of their domains meet; no rows where there are fewer than two."""
    experts = work.config.experts
    if len(experts) < 2:
        return pd.DataFrame(columns=list(PROBES["route_direction"]))

    def make() -> pd.DataFrame:
        work.say("updates on shared routes")
        updates = {name: _update(work, name) for name in experts}
        routes = {name: routes_of(work, "base", name) for name in experts}
        return update_on_routes(updates, routes, _anatomy(work), work.config.routes.tops, seed=work.config.seed)

    return _kept(work.folder / "cache" / "route_direction.parquet", make)


def _update(work: Work, expert: str) -> Update:
    """An expert minus the base under the model's parameter names, tensor by tensor: of large ones, one tensor each is held.

    Raises InputError for a changed tensor that is no parameter of the model.
    """
    model, pair = work.models["base"], Base.of(work.inputs.base).pair(work.inputs.tuned[expert])
    prefix, names = getattr(model.module, "base_model_prefix", ""), dict[str, str]()
    for name in pair.names():
        known = next((n for n in spellings(name, prefix) if n in model.parameters), None)
        if known is not None:
            names[known] = name
        elif not tree.is_zero(change := pair.change(name)):
            model.align({name: change})  # says what is wrong
    return Update(tuple(names), lambda known: model.align({names[known]: pair.change(names[known])})[known])


def _gradients(work: Work) -> pd.DataFrame:
    """Cosines of the domains' gradients at the base; no rows where fewer than two domains have one."""
    objective = work.config.routes.gradients
    usable = [d for d in work.domains if not why_no_gradient(work, d)]
    if objective is None or len(usable) < 2:
        return pd.DataFrame(columns=list(PROBES["gradient_agreement"]))

    def make() -> pd.DataFrame:
        work.say(f"gradients ({objective}) at the base")
        domains = {d: stages.responses(work, "base", d).domain for d in usable}
        found = gradient_agreement(
            work.models["base"],
            domains,
            objective=objective,
            anatomy=_anatomy(work),
            cache=work.folder / "cache" / "gradients",
            seed=work.config.seed,
            batch_tokens=work.config.batch_tokens,
        )
        return found.assign(objective=objective)

    digest = work.rewards_digest(*(("base", d) for d in work.domains))
    return _kept(work.folder / "cache" / f"gradient_agreement-{digest}.parquet", make)


def why_no_gradient(work: Work, domain: str) -> str:
    """Why a domain has no policy gradient at the base; empty where it has one."""
    if work.config.routes.gradients != "reward":
        return ""
    try:
        for half in prompt_halves(stages.responses(work, "base", domain).domain, work.config.seed):
            reward_terms(half)
    except InputError as error:
        return error.got
    return ""


def notes_on_routes(work: Work) -> list[str]:
    """What a reader of the routes must know."""
    notes = []
    for model in routed_models(work):
        for domain in work.domains:
            notes += [f"routes of {model}: {note}" for note in routes_of(work, model, domain).notes]
    notes = list(dict.fromkeys(notes))
    if len(work.config.experts) < 2:
        notes.append("no updates on shared routes: it compares the updates of two or more experts")
    asked = work.config.routes.gradients
    for domain in work.domains if asked else ():
        why = why_no_gradient(work, domain)
        if why:
            notes.append(f"{domain} is left out of the comparison of gradients: in half of its prompts, {why}")
    if asked and sum(not why_no_gradient(work, domain) for domain in work.domains) < 2:
        notes.append("no gradients compared: that takes two or more domains with a gradient")
    if asked == "nll":
        notes.append(
            "the gradients compared are of the responses' negative log-likelihood: on samples of the base itself it is zero in "
            "expectation, and what remains is noise"
        )
    return notes


def _kept(path: Path, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """A table that is made where its file is not there."""
    if not path.is_file():
        records.write_table(path, make())
    return pd.read_parquet(path)
