"""Everything that a forecast's RUN.yaml names, opened and checked before anything is computed or written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interference import __version__
from interference.checkpoint import Checkpoint
from interference.domain import Domain, read_jsonl
from interference.errors import InputError
from interference.expansion import check_domain
from interference.forecast_run.config import ForecastConfig
from interference.forecasting.batches import rollouts
from interference.forecasting.estimation import Pilot
from interference.forecasting.trainable import trainable
from interference.forecasting.training import Training
from interference.inputs import Prompts, read_prompts, source_digest
from interference.model import Model
from interference.objectives import OBJECTIVES, reward_terms
from interference.probes.halves import prompt_halves
from interference.records import file_digest
from interference.stages import check_prompts
from interference.update import Update

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_OF_PILOT = 0.1
"""Share of the training's steps from which on a pilot is no longer a short one: a note says so."""


@dataclass(frozen=True)
class Inputs:
    """Opened inputs of a forecast. given: {domain: its rollouts, made elsewhere}; prompts: {domain: what to sample them on};
    evaluation: {(objective, name): sequences}; pilots: {domain: its pilot}."""

    base: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    given: dict[str, Domain]
    prompts: dict[str, Prompts]
    evaluation: dict[tuple[str, str], Domain]
    pilots: dict[str, Pilot]
    fingerprints: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def open_inputs(
    config: ForecastConfig, search_path: Sequence[Path], progress: Callable[[str], None] = lambda _: None
) -> Inputs:
    """Open and check every input of a forecast. Raises InputError at the first that cannot be used; writes nothing."""
    base = Checkpoint.open(config.base_model)
    tokenizer, notes, files = base.tokenizer(), list[str](), set[str]()
    given: dict[str, Domain] = {}
    prompts: dict[str, Prompts] = {}
    for entry in config.domains:
        if entry.data:
            given[entry.name] = _read(entry.name, entry.data, config.limit, tokenizer, notes)
            check_rollouts(given[entry.name], config.planned(entry.name), config.seed)
            files.add(entry.data)
        elif entry.prompts and entry.verifier:
            found = read_prompts(entry.name, entry.prompts, entry.verifier, tokenizer, search_path, config.limit, notes)
            prompts[entry.name] = found
            _check_count(entry.name, len(found.ids))
            files.add(entry.prompts)
    evaluation: dict[tuple[str, str], Domain] = {}
    for objective in config.objective:
        for name, path in config.evaluated(objective).items():
            found_there = _read(name, path, config.limit, tokenizer, notes)
            if OBJECTIVES[objective].rewards:
                reward_terms(found_there)
            evaluation[objective, name] = found_there
            files.add(path)
    domains = {d.name for d in config.domains}
    notes += [
        f"evaluation {e.name!r} bears no domain's name: no training counts as its own"
        for e in config.evaluation
        if e.name not in domains
    ]
    pilots, marks = {}, {}
    for pilot in config.pilots:
        progress(f"reading the pilot of {pilot.domain}")
        tuned = Checkpoint.open(pilot.model)
        update = Update.between(base, tuned)
        notes += [f"pilot of {pilot.domain}: {f.severity}, {f.check}: {f.message}" for f in update.findings]
        share = pilot.steps / config.planned(pilot.domain).steps
        if share > MOST_OF_PILOT:
            notes.append(f"the pilot of {pilot.domain} took {100 * share:.0f} % of the steps of the training forecast")
        pilots[pilot.domain], marks[pilot.domain] = Pilot(update, pilot.steps), tuned.fingerprint()
    fingerprints = {
        "base": base.fingerprint(),
        "pilots": marks,
        "data": {path: file_digest(Path(path)) for path in sorted(files)},
        "verifiers": {name: source_digest(p.verifier) for name, p in prompts.items()},
    }
    return Inputs(base, tokenizer, given, prompts, evaluation, pilots, fingerprints, list(dict.fromkeys(notes)))


def identity(config: ForecastConfig, inputs: Inputs) -> tuple[dict[str, Any], dict[str, Any]]:
    """What decides the result (the configuration but for where it is written, the inputs' content, the version), and what
    decides the cached stages: the same without the verifiers' code, since rewards are given again when that changes."""
    asked = config.model_dump(exclude={"output"} | ({"plans"} if config.plans is None else set()))
    files = {name: value for name, value in inputs.fingerprints.items() if name != "verifiers"}
    whole = {"version": __version__, "command": "forecast", "config": asked}
    return whole | {"inputs": inputs.fingerprints}, whole | {"inputs": files}


def check_fitting(config: ForecastConfig, inputs: Inputs, model: Model) -> None:
    """Refuse sequences and prompts for which the model has no room, pilots and adapters that do not fit it."""
    for name, prompts in inputs.prompts.items():
        check_prompts(model, name, prompts, config.sampling.max_new_tokens)
    for domain in inputs.given.values():
        check_domain(model, domain, "reward")
    for (objective, _), domain in inputs.evaluation.items():
        check_domain(model, domain, objective)
    for pilot in inputs.pilots.values():
        model.align(pilot.update)
    for entry in config.domains:
        planned = config.planned(entry.name)
        if planned.adapter is not None:
            trainable(model, planned.adapter)


def check_rollouts(domain: Domain, training: Training, seed: int) -> None:
    """Refuse rollouts of which no update can be estimated: without rewards, with one response to each prompt, or without
    prompts whose responses differ in reward in either half of the prompts."""
    reward_terms(domain)
    halves = prompt_halves(domain, seed)
    if len(set(domain.prompt_ids)) == len(domain.prompt_ids):
        raise InputError(
            got=f"domain {domain.name!r} with one response to each prompt",
            expected="several responses to each prompt, since training compares them",
            remedy="sample more responses per prompt; rows of one prompt bear the same prompt or `prompt_id`",
        )
    for part in halves:
        rollouts(part, training)


def _check_count(name: str, prompts: int) -> None:
    if prompts < 2:
        raise InputError(
            got=f"a single prompt of domain {name!r}",
            expected="two prompts or more, since half of them is compared with the other half",
            remedy="add prompts",
        )


def _read(name: str, path: str, limit: int | None, tokenizer: PreTrainedTokenizerBase, notes: list[str]) -> Domain:
    rows = read_jsonl(path)
    domain = Domain.from_rows(rows, tokenizer=tokenizer, name=name, limit=limit, source=path)
    if len(domain.sequences) < len(rows):
        notes.append(f"{name}: {len(domain.sequences)} of {len(rows)} rows of {path} used (limit: {limit} prompts)")
    return domain
