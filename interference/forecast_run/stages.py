"""The stages of a forecast that take time. Each leaves files in the run's folder and reads them when they are there.

    rollouts/DOMAIN/base.jsonl                    sampled responses with rewards
    tensors/updates/TIER/DOMAIN/half_K.safetensors  the update estimated from half K of the prompts
    tensors/updates/TIER/DOMAIN/path.parquet      what happened along it; written last
    tensors/quadratic/OBJECTIVE/TIER/NAME.safetensors  the quadratic model of the evaluated sequences NAME along the updates
    cache/cells/OBJECTIVE/TIER/NAME.parquet       their cells; written last
    cache/ledgers/                                what a stage has sampled when it is interrupted

What was made of rewards is made again where they changed (a verifier that was mended). A finished run does not keep cache/: it
is all in its tables.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from interference import records
from interference.domain import Domain
from interference.forecast_run.config import ForecastConfig
from interference.forecast_run.fresh import sampler
from interference.forecast_run.inputs import Inputs, check_rollouts
from interference.forecast_run.storage import read_halves, write_half
from interference.forecasting.estimation import METHOD_ERROR, Estimated, Tier, estimate_update
from interference.forecasting.frozen import Resample
from interference.forecasting.halves import Halves
from interference.forecasting.prediction import predict
from interference.forecasting.virtual import LEAST_ESS
from interference.model import Model
from interference.objectives import SequenceTerms
from interference.quadratic import QuadraticModel
from interference.stages import cached, now_and_then, read_arrays, rewarded_rows, sampled_responses, write_rows

TRIED = 64
"""Prompts that the noise of the updates is tried on where no quadratic models are made."""
_TERMS = ("value", "slope", "curvature", "ggn", "denominator")


@dataclass
class Work:
    """A forecast being made: its request, its opened inputs, its folder and the base."""

    config: ForecastConfig
    inputs: Inputs
    folder: Path
    model: Model
    say: Callable[[str], None]
    known: dict[str, Domain] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def domains(self) -> list[str]:
        return [d.name for d in self.config.domains]

    def evaluated(self, objective: str) -> dict[str, Domain]:
        """What an objective is forecast on: given sequences, or else the domains' own rollouts."""
        given = {name: d for (o, name), d in self.inputs.evaluation.items() if o == objective}
        return given or {name: responses(self, name) for name in self.domains}

    def digest(self, *names: str) -> str:
        """A short name of the rollouts of some domains with their rewards."""
        for name in names:
            if name not in self.digests:
                rows = [[s.prompt_id, s.response, s.reward] for s in responses(self, name).sequences]
                self.digests[name] = records.digest(rows)
        return records.digest([self.digests[name] for name in names])


def responses(work: Work, name: str) -> Domain:
    """Rollouts of the base on a domain with rewards: given, or sampled here and rewarded by the verifier.

    Raises InputError where the verifier's rewards leave nothing to learn.
    """
    if name in work.inputs.given:
        return work.inputs.given[name]
    if name not in work.known:
        work.known[name] = _sampled(work, name)
    return work.known[name]


def _sampled(work: Work, name: str) -> Domain:
    path, prompts, config = work.folder / "rollouts" / name / "base.jsonl", work.inputs.prompts[name], work.config
    if not path.is_file():
        what = f"sampling the base on {name}"
        work.say(what)
        rows = sampled_responses(
            work.model,
            work.inputs.tokenizer,
            prompts,
            config.sampling,
            seed=int(records.digest(["forecast", config.seed, name])[:8], 16),
            cache=work.folder / "cache" / "ledgers" / f"{name}.jsonl",
            progress=now_and_then(work.say, what),
        )
        write_rows(path, rows)
    rows = rewarded_rows(path, prompts, work.inputs.fingerprints["verifiers"][name])
    domain = Domain.from_rows(rows, tokenizer=work.inputs.tokenizer, name=name, source=str(path))
    check_rollouts(domain, config.planned(name), config.seed)
    return domain


def estimate(work: Work, tier: Tier, name: str) -> Estimated:
    """The update that training on a domain would give, estimated from each half of its prompts."""
    folder, config = work.folder / "tensors" / "updates" / tier / name, work.config
    halves, path, made_of = (
        [folder / f"half_{k}.safetensors" for k in (1, 2)],
        folder / "path.parquet",
        work.digest(name),
    )
    known = read_halves(halves, made_of) if path.is_file() else None
    if known is None:
        path.unlink(missing_ok=True)
        what = f"training on {name} ({tier})"
        work.say(what)
        found = estimate_update(
            work.model,
            responses(work, name),
            config.planned(name),
            tier,
            pilot=work.inputs.pilots.get(name) if tier == "pilot" else None,
            effort=config.effort.get(tier),
            least_ess=LEAST_ESS,
            resample=samplers(work).get(name),
            seed=config.seed,
            batch_tokens=config.batch_tokens,
            progress=now_and_then(work.say, what),
        )
        about = {"made_of": made_of, "noise": repr(found.halves.noise)}
        for file, change in zip(halves, (found.halves.first, found.halves.second), strict=True):
            write_half(file, change, about)
        table = found.path if len(found.path.columns) else pd.DataFrame(columns=list(records.FORECAST["path"][3:]))
        records.write_table(path, table)
        known = read_halves(halves, made_of)
        assert known is not None
    return Estimated(known, pd.read_parquet(path))


def samplers(work: Work) -> dict[str, Resample]:
    """{domain: what samples fresh rollouts}, where the request allows it and the domain has a verifier."""
    if not work.config.renew:
        return {}
    model, tokenizer, settings = work.model, work.inputs.tokenizer, work.config.sampling
    return {n: sampler(model, tokenizer, n, p, settings) for n, p in work.inputs.prompts.items()}


def cells(work: Work, objective: str, tier: str, name: str, halves: dict[str, Halves]) -> pd.DataFrame:
    """The cells of all updates of a tier on one of the evaluated sequences."""
    path = work.folder / "cache" / "cells" / objective / tier / f"{name}.parquet"
    made_of, config, data = work.digest(*work.domains), work.config, work.evaluated(objective)
    if path.is_file():
        known = pd.read_parquet(path)
        if (known["made_of"] == made_of).all():
            return known.drop(columns="made_of")
    work.say(f"predicting {name} ({objective}, {tier})")
    found, models = predict(
        work.model,
        halves,
        {name: data[name]},
        objective,
        crossed=not config.evaluated(objective),
        first_order=tier == "gradient",
        method_error=METHOD_ERROR[tier],
        samplers=samplers(work) if objective == "reward" and not config.evaluated(objective) else None,
        tried=config.expanded or TRIED,
        quadratic=config.expanded > 0,
        pairs=config.pairs,
        seed=config.seed,
        batch_tokens=config.batch_tokens,
        check=name == next(iter(data)),  # the derivatives are those of one model: once is enough
    )
    errors = {u: models[name].predict({u: 1.0}).stderr if models else np.nan for u in halves}
    found = found.assign(second_stderr=found["update"].map(errors))
    if models:
        write_quadratic(_quadratic(work.folder, objective, tier, name), models[name])
    records.write_table(path, found.assign(made_of=made_of))
    return found


def _quadratic(folder: Path, objective: str, tier: str, name: str) -> Path:
    return folder / "tensors" / "quadratic" / objective / tier / f"{name}.safetensors"


def write_quadratic(path: Path, model: QuadraticModel) -> None:
    """Keep a quadratic model: its terms, and what they are of."""
    about: dict[str, Any] = {f: getattr(model, f) for f in ("objective", "domain", "names", "prompt_ids", "seed")}
    path.unlink(missing_ok=True)
    cached(path, lambda: ({t: getattr(model.terms, t) for t in _TERMS}, {"about": json.dumps(about)}))


def quadratic_models(run: records.Run, objective: str, tier: str) -> dict[str, QuadraticModel]:
    """The quadratic models of a finished forecast, {name of the evaluated sequences: model along the trainings' updates}.

    They tell of sequences, mixtures and merges of the trainings: `models["math"].predict({"code": 0.5, "math": 0.5})` (with
    `pairs: true` in the request). Empty where `expanded` was 0.
    """
    out = {}
    for name in run.results["evaluated"][objective]:
        path = _quadratic(run.path, objective, tier, name)
        if path.is_file():
            arrays, metadata = read_arrays(path)
            about = json.loads(metadata["about"])
            places = {key: tuple(about[key]) for key in ("names", "prompt_ids")}
            terms = SequenceTerms(**{t: arrays[t] for t in _TERMS})
            out[name] = QuadraticModel(**about | places, terms=terms)
    return out
