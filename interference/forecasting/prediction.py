"""forecast: how training on every domain would change every domain, before any of it is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from torch import Tensor

from interference.checkpoint import Checkpoint
from interference.domain import Domain
from interference.errors import InputError
from interference.expansion import check_domain, domain_jets, quadratic_model, quick_audit
from interference.forecasting.estimation import Estimated, Pilot, Tier, estimate_update
from interference.forecasting.halves import Halves
from interference.forecasting.outcomes import Outcome, noise_of, outcome, joined, row
from interference.forecasting.training import Training
from interference.forecasting.virtual import LEAST_ESS
from interference.measurement import score
from interference.model import Model, load
from interference.probes.halves import prompt_halves
from interference.quadratic import QuadraticModel
from interference.tree import NamedChanges, dense

Progress = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Forecast:
    """What training would do.

    cells: one row per (domain, update), the update being the training on the domain of its name; see `outcomes.COLUMNS`.
    models: {domain: QuadraticModel} along the mean updates, for sequences, mixtures and merges (`plans`).
    estimated: {name: the updates behind them}.
    """

    objective: str
    tier: str
    cells: pd.DataFrame
    models: dict[str, QuadraticModel] = field(repr=False)
    estimated: dict[str, Estimated] = field(repr=False)

    def matrix(self, column: str = "predicted") -> pd.DataFrame:
        """One column of the cells as a matrix: a row per update, a column per domain."""
        names = list(dict.fromkeys(self.cells["update"])), list(dict.fromkeys(self.cells["domain"]))
        return self.cells.pivot(index="update", columns="domain", values=column).loc[names[0], names[1]]


def forecast(
    base: Checkpoint | Model,
    domains: Mapping[str, Domain],
    *,
    training: Training | Mapping[str, Training],
    tier: Tier = "virtual",
    evaluation: Mapping[str, Domain] | None = None,
    objective: str = "reward",
    pilots: Mapping[str, Pilot] | None = None,
    effort: float | None = None,
    least_ess: float = LEAST_ESS,
    pairs: bool = False,
    device: str = "auto",
    batch_tokens: int = 4096,
    seed: int = 0,
    check: bool = True,
    progress: Progress = lambda _: None,
) -> Forecast:
    """Predict the change of every domain's objective under training on every domain, without training on any.

    Parameters
    ----------
    base : the model that training would start from.
    domains : {name: Domain}, rollouts of the base with rewards, several responses to each prompt.
    training : how the training would go, for all domains or {name: Training}.
    tier : "gradient" (the base's preconditioned policy gradient), "virtual" (the optimizer run on the frozen rollouts) or
        "pilot" (going on from `pilots`, checkpoints of short real trainings).
    evaluation : {name: Domain}, sequences that the objective is predicted on; the domains themselves unless given, and then
        an update is tried on its own domain with the half of the prompts that it was not made from.
    objective : "reward" or "nll" (which needs `evaluation`, such as reference answers).
    effort, least_ess : see `estimate_update`.  pairs : make the quadratic models along several updates at once.

    Raises InputError for what `estimate_update` and `expand` refuse.
    """
    if objective not in ("reward", "nll"):
        raise InputError(got=f"objective {objective!r}", expected="'reward' or 'nll'", remedy="choose one of them")
    model = base if isinstance(base, Model) else load(base, device=device)
    plans = {name: training[name] if isinstance(training, Mapping) else training for name in domains}
    estimated = {}
    for name, domain in domains.items():
        progress(f"training on {name} ({tier})")
        estimated[name] = estimate_update(
            model, domain, plans[name], tier, pilot=(pilots or {}).get(name), effort=effort, least_ess=least_ess, seed=seed
        )
    cells, models = predict(
        model,
        {name: e.halves for name, e in estimated.items()},
        evaluation or domains,
        objective,
        crossed=evaluation is None,
        pairs=pairs,
        seed=seed,
        batch_tokens=batch_tokens,
        check=check,
        progress=progress,
    )
    return Forecast(objective, tier, cells, models, estimated)


def predict(
    model: Model,
    halves: Mapping[str, Halves],
    data: Mapping[str, Domain],
    objective: str,
    *,
    crossed: bool,
    pairs: bool = False,
    seed: int = 0,
    batch_tokens: int = 4096,
    check: bool = True,
    progress: Progress = lambda _: None,
) -> tuple[pd.DataFrame, dict[str, QuadraticModel]]:
    """Cells and quadratic models of estimated updates on data; crossed: the updates were made from these very rollouts."""
    for domain in data.values():
        check_domain(model, domain, objective)
    means = {n: _dense(model, h.mean()) for n, h in halves.items()}
    if check:
        quick_audit(model, means, data.values(), pairs=pairs, seed=seed).raise_if_failed(["taylor"])
    ask = Asked(model, objective, seed, batch_tokens)
    rows, models = [], {}
    for name, domain in data.items():
        progress(f"predicting {name}")
        found, models[name] = ask.outcomes(domain, means, pairs)
        spread = {n: _dense(model, h.difference()) for n, h in halves.items()}
        noises = {u: noise_of(ask.expand(domain, {u: w}), u) for u, w in spread.items()}
        weights = {u: 2 * h.noise - 1 for u, h in halves.items()}
        if crossed and name in halves:
            found[name], weights[name] = ask.crossed(domain, halves[name]), -2 * (1 - halves[name].noise)
        slope = float(np.mean([n.slope**2 for n in noises.values()])) ** 0.5
        for u, h in halves.items():
            error = slope * (1 + 2 * h.noise) ** 0.5
            rows.append({"domain": name, "update": u, "own": name == u, **row(found[u], noises[u], weights[u], error)})
    return pd.DataFrame(rows), models


@dataclass(frozen=True)
class Asked:
    """How outcomes are computed."""

    model: Model
    objective: str
    seed: int
    batch_tokens: int

    def expand(self, domain: Domain, updates: dict[str, dict[str, Tensor]], pairs: bool = False) -> QuadraticModel:
        """The quadratic model of a domain's objective along updates."""
        jets, _ = domain_jets(self.model, updates, domain, pairs=pairs, batch_tokens=self.batch_tokens)
        return quadratic_model(self.objective, jets, domain, tuple(updates), self.seed)

    def outcomes(
        self, domain: Domain, updates: dict[str, dict[str, Tensor]], pairs: bool = False
    ) -> tuple[dict[str, Outcome], QuadraticModel]:
        """The outcome of every update, and the quadratic model behind them."""
        along = self.expand(domain, updates, pairs)
        anchor, *moved = score(self.model, domain, [(u, 1.0) for u in updates.values()])
        return {
            u: outcome(self.objective, domain, along, u, anchor, at) for u, at in zip(updates, moved, strict=True)
        }, along

    def crossed(self, domain: Domain, halves: Halves) -> Outcome:
        """The outcome of an update on the rollouts that it was made from: each estimate on the half that it has not seen."""
        parts = prompt_halves(domain, self.seed)
        unseen = zip(parts, (halves.second, halves.first), strict=True)
        found = [self.outcomes(part, {"own": _dense(self.model, update)})[0]["own"] for part, update in unseen]
        counts = [len(set(part.prompt_ids)) for part in parts]
        return joined(found, [c / sum(counts) for c in counts])


def _dense(model: Model, update: NamedChanges) -> dict[str, Tensor]:
    return {name: dense(change) for name, change in model.align(update).items()}
