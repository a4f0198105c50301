"""The stages of a probe that take time, but for judging. Each leaves a file in the run's folder and reads it when it is there.

    rollouts/DOMAIN/MODEL.jsonl                                  sampled responses with rewards
    tensors/log_probabilities/DOMAIN/POLICY/MODEL.safetensors    of POLICY's responses under MODEL
    tensors/divergences/DOMAIN/POLICY/MODEL.safetensors          KL(POLICY || MODEL) at every state of them
    routes/DOMAIN/MODEL.parquet                                  see `routing`
    cache/forecast/MODEL.parquet                                 KL(base || MODEL), forecast and measured
    cache/skills/DOMAIN-REWARDS/*.parquet                        and what `judging` leaves there
    cache/ledgers/                                               what a stage has done when it is interrupted

REWARDS is a digest of the rewards, so that what was made of others is made again. A finished run does not keep cache/: it is all
in its tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from interference import records
from interference.anatomy import Anatomy
from interference.checkpoint import Checkpoint
from interference.domain import Domain
from interference.errors import InputError
from interference.expansion import align
from interference.model import Model, load
from interference.probes.kl_forecast import kl_from_update
from interference.probes.log_probabilities import PerToken, state_divergences, token_log_probabilities
from interference.probes.samples import ItemRewards
from interference.probes.scored import Trajectories
from interference.probes.skills import Skills, skills
from interference.probing.config import ProbeConfig
from interference.probing.inputs import Inputs, Key, Responses, given_scores
from interference.stages import (
    Arrays,
    cached,
    check_prompts,
    now_and_then,
    rewarded_rows,
    sampled_responses,
    write_rows,
)
from interference.update import Update

Say = Callable[[str], None]
_HELD = 2  # models in memory at once: a policy and its reference
_JET_TOKENS = 4096  # of a batch of derivatives, which hold several tensors where a forward pass holds one


@dataclass
class Models:
    """The run's models by name, loaded when asked for, the two last used kept in memory."""

    config: ProbeConfig
    base: Checkpoint
    tuned: dict[str, Checkpoint]
    say: Say
    held: dict[str, Model] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Model:
        model = self.held.pop(name, None)
        if model is None:
            while len(self.held) >= _HELD:
                self.held.pop(next(iter(self.held)))
            self.say(f"loading {name}")
            model = self._load(name)
        self.held[name] = model
        return model

    def _load(self, name: str) -> Model:
        ready = partial(load, dtype=getattr(torch, self.config.dtype), device=self.config.device)
        if name == "base":
            return ready(self.base)
        tuned = self.tuned[name]
        if tuned.adapter is None:
            return ready(tuned if tuned.hugging_face else tuned.like(self.base))
        model = ready(self.base)
        with torch.no_grad():
            for key, change in align(model, {name: Update.between(self.base, tuned)})[name].items():
                model.parameters[key].add_(change)
        return model


@dataclass
class Work:
    """A probe being made: its request, its opened inputs, its folder and its models."""

    config: ProbeConfig
    inputs: Inputs
    folder: Path
    models: Models
    say: Say
    known: dict[Key, Responses] = field(default_factory=dict)
    anatomy: Anatomy | None = None

    @property
    def domains(self) -> list[str]:
        return [d.name for d in self.config.domains]

    def progress(self, what: str) -> Callable[[int, int], None]:
        """Says how far a stage is, at most every few seconds."""
        return now_and_then(self.say, what)

    def rewards_digest(self, *keys: Key) -> str:
        """A short name of the rewards of some models on some domains."""
        return records.digest([[s.reward for s in responses(self, *key).domain.sequences] for key in keys])[:8]


def responses(work: Work, model: str, domain: str) -> Responses:
    """What a model answered to a domain's prompts: given, or sampled here and rewarded by the verifier.

    Every model and domain has a seed of its own: the probes' nulls take samples of different models to be independent.
    """
    key = model, domain
    if key not in work.known:
        work.known[key] = work.inputs.given[key] if key in work.inputs.given else _sampled(work, model, domain)
    return work.known[key]


def _sampled(work: Work, model: str, domain: str) -> Responses:
    path = work.folder / "rollouts" / domain / f"{model}.jsonl"
    prompts, settings = work.inputs.prompts[domain], work.config.sampling
    if not path.is_file():
        what, tokenizer = f"sampling {model} on {domain}", work.inputs.tokenizer
        work.say(what)
        policy = work.models[model]
        check_prompts(policy, domain, prompts, settings.max_new_tokens)
        ledger = work.folder / "cache" / "ledgers" / "samples" / domain / f"{model}.jsonl"
        seed = int(records.digest(["probe", work.config.seed, domain, model])[:8], 16)
        rows = sampled_responses(
            policy, tokenizer, prompts, settings, seed=seed, cache=ledger, progress=work.progress(what)
        )
        write_rows(path, rows)
    rows = rewarded_rows(path, prompts, work.inputs.fingerprints["verifiers"][domain])
    found_domain = Domain.from_rows(rows, tokenizer=work.inputs.tokenizer, name=domain, source=str(path))
    return Responses(rows, found_domain)


def item_rewards(work: Work, domain: str) -> ItemRewards:
    """Rewards of all models on a domain's items."""
    return ItemRewards.of({m: responses(work, m, domain).domain for m in work.config.names})


def skills_of(work: Work, domain: str) -> Skills:
    """Gains of the experts on a domain's items, and what the other models share of them."""
    config = work.config
    stem = f"{domain}-{work.rewards_digest(*((m, domain) for m in config.names))}"
    paths = {f.name: work.folder / "cache" / "skills" / stem / f"{f.name}.parquet" for f in fields(Skills)}
    if not all(path.is_file() for path in paths.values()):
        work.say(f"skills on {domain}")
        found = skills(item_rewards(work, domain), experts=config.experts, others=config.others, seed=config.seed)
        for name, path in paths.items():
            records.write_table(path, getattr(found, name))
    return Skills(**{name: pd.read_parquet(path) for name, path in paths.items()})


def scored(work: Work, policy: str, domain: str) -> Trajectories:
    """A policy's responses on a domain with log-probabilities under all models, given or computed here."""
    key = policy, domain
    if key in work.inputs.scored:
        return given_scores(work.inputs.given[key], work.config.names, key)
    answers = responses(work, policy, domain).domain
    logps = {m: log_probabilities(work, m, policy, domain) for m in work.config.names}
    exact = work.config.neighborhoods.exact
    others = [m for m in work.config.names if m != policy] if exact else []
    divergences = {m: divergence(work, policy, m, domain) for m in others}
    return Trajectories(policy, domain, tuple(answers.prompt_ids), logps, divergences)


def log_probabilities(work: Work, model: str, policy: str, domain: str) -> PerToken:
    """Of every token of a policy's responses, under a model."""

    def make() -> PerToken:
        answers = responses(work, policy, domain).domain
        return token_log_probabilities(work.models[model], answers, batch_tokens=work.config.batch_tokens)

    place = work.folder / "tensors" / "log_probabilities" / domain / policy / f"{model}.safetensors"
    return _per_token(work, place, f"log-probabilities of {policy} on {domain} under {model}", make)


def divergence(work: Work, policy: str, reference: str, domain: str) -> PerToken:
    """KL(policy || reference) at every state of the policy's responses."""

    def make() -> PerToken:
        answers = responses(work, policy, domain).domain
        pair = work.models[policy], work.models[reference]
        return state_divergences(*pair, answers, batch_tokens=work.config.batch_tokens)

    place = work.folder / "tensors" / "divergences" / domain / policy / f"{reference}.safetensors"
    return _per_token(work, place, f"divergence of {policy} from {reference} on {domain}", make)


def _per_token(work: Work, place: Path, what: str, make: Callable[[], PerToken]) -> PerToken:
    def arrays() -> tuple[Arrays, dict[str, str]]:
        work.say(what)
        found = make()
        return {"values": np.concatenate(found), "ends": np.cumsum([len(x) for x in found]).astype(float)}, {}

    found, _ = cached(place, arrays)
    return tuple(np.split(found["values"], found["ends"][:-1].astype(int)))


def forecast(work: Work, model: str) -> pd.DataFrame:
    """`kl_from_update` of a tuned model on the base's own responses to every domain, with the `reason` where there is none."""
    path = work.folder / "cache" / "forecast" / f"{model}.parquet"
    if not path.is_file():
        work.say(f"forecast of the divergence of {model} from the base")
        answers = {name: responses(work, "base", name).domain for name in work.domains}
        try:
            update = Update.between(work.inputs.base, work.inputs.tuned[model])
            tokens, seed = min(work.config.batch_tokens, _JET_TOKENS), work.config.seed
            found = kl_from_update(work.models["base"], {model: update}, answers, batch_tokens=tokens, seed=seed)
            found["reason"] = ""
        except InputError as error:  # an update that is zero, or derivatives that do not pass their audit
            found = pd.DataFrame({"update": model, "domain": work.domains, "reason": error.got})
        records.write_table(path, found)
    return pd.read_parquet(path)
