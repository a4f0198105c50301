"""forecast: how training on every domain would change every domain, before any of it is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from interference.checkpoint import Checkpoint
from interference.domain import Domain
from interference.errors import InputError, nearest
from interference.expansion import check_domain, expand
from interference.forecasting.estimation import METHOD_ERROR, Estimated, Pilot, Tier, estimate_update
from interference.forecasting.first_order import FirstOrder
from interference.forecasting.frozen import Resample
from interference.forecasting.halves import Halves
from interference.forecasting.outcomes import COLUMNS, Point, cell, within_range
from interference.forecasting.training import Training
from interference.forecasting.tried import Tried, first_prompts, points_of
from interference.forecasting.virtual import LEAST_ESS
from interference.model import Model, load
from interference.quadratic import QuadraticModel
from interference.statistics import Z
from interference.truncation import LOW_ESS

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
        return self.cells.set_index(["update", "domain"])[column].unstack("domain").loc[names[0], names[1]]  # noqa: PD010


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
    samplers: Mapping[str, Resample] | None = None,
    tried: int = 64,
    quadratic: bool = True,
    pairs: bool = False,
    device: str = "auto",
    batch_tokens: int = 16384,
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
    effort, least_ess : see `estimate_update`.  samplers : {name: what samples fresh rollouts of the model as it
        is at the time}: rollouts that are used up are then renewed, and moved policies sampled where importance weights fail.
    tried : prompts of each domain that the noise of the updates and the quadratic models are computed on.
    batch_tokens : of a batch of gradients and evaluations; derivatives, which hold more at once, take a quarter.
    quadratic : whether these are made.  pairs : along several updates at once, too.

    Raises InputError for what `estimate_update` and `expand` refuse.
    """
    plans = _checked(domains, training, objective, evaluation, pilots or {})
    model = base if isinstance(base, Model) else load(base, device=device, attention="fast")
    estimated = {}
    for name, domain in domains.items():
        progress(f"training on {name} ({tier})")
        estimated[name] = estimate_update(
            model, domain, plans[name], tier, pilot=(pilots or {}).get(name), effort=effort, least_ess=least_ess,
            resample=(samplers or {}).get(name), seed=seed, batch_tokens=batch_tokens,
        )  # fmt: skip
    cells, models = predict(
        model,
        {name: e.halves for name, e in estimated.items()},
        evaluation or domains,
        objective,
        crossed=evaluation is None,
        first_order=tier == "gradient",
        method_error=METHOD_ERROR[tier],
        samplers=samplers if objective == "reward" else None,
        tried=tried,
        quadratic=quadratic,
        pairs=pairs,
        seed=seed,
        batch_tokens=batch_tokens,
        check=check,
        progress=progress,
    )
    return Forecast(objective, tier, cells, models, estimated)


def _checked(
    domains: Mapping[str, Domain], training: Training | Mapping[str, Training], objective: str,
    evaluation: Mapping[str, Domain] | None, pilots: Mapping[str, Pilot],
) -> dict[str, Training]:  # fmt: skip
    """The training of every domain; InputError for a request that cannot be forecast."""
    if objective not in ("reward", "nll"):
        raise InputError(got=f"objective {objective!r}", expected="'reward' or 'nll'", remedy="choose one of them")
    if objective == "nll" and evaluation is None:
        raise InputError(
            got="objective 'nll' without evaluation",
            expected="sequences whose likelihood matters, such as reference answers",
            remedy="give evaluation={name: Domain}",
        )
    if not domains:
        raise InputError(got="no domains", expected="at least one", remedy="give {name: Domain}, rollouts with rewards")
    for name in pilots.keys() - domains.keys():
        raise InputError(got=f"a pilot of {name!r}", expected="pilots of the domains", remedy=nearest(name, domains))
    plans = dict.fromkeys(domains, training) if isinstance(training, Training) else dict(training)
    for name in domains.keys() - plans.keys():
        raise InputError(got=f"no training of {name!r}", expected="one for every domain", remedy=nearest(name, plans))
    return plans


def predict(
    model: Model,
    halves: Mapping[str, Halves],
    data: Mapping[str, Domain],
    objective: str,
    *,
    crossed: bool,
    first_order: bool = False,
    method_error: float = 0.0,
    samplers: Mapping[str, Resample] | None = None,
    tried: int = 64,
    quadratic: bool = True,
    pairs: bool = False,
    seed: int = 0,
    batch_tokens: int = 16384,
    check: bool = True,
    progress: Progress = lambda _: None,
) -> tuple[pd.DataFrame, dict[str, QuadraticModel]]:
    """Cells and quadratic models of estimated updates on data.

    crossed: the updates were made from these very rollouts.  first_order: tell the first order alone, without trying an update.
    samplers: see `forecast`.  tried: prompts that the noise of the updates and the quadratic models are computed on.
    quadratic: whether those are made.  method_error: see `estimation.METHOD_ERROR`.
    """
    for domain in data.values():
        check_domain(model, domain, objective)
    points = {name: points_of(model, h) for name, h in halves.items()}
    means = {name: p[0] for name, p in points.items()}
    agreement = {n: {"agreement": h.agreement(), "reliability": h.reliability()} for n, h in halves.items()}
    few = {name: first_prompts(domain, tried) for name, domain in data.items()}
    options: dict[str, Any] = {"pairs": pairs, "batch_tokens": max(1, batch_tokens // 4), "seed": seed, "check": check}
    models = expand(model, means, few, objective=objective, **options) if quadratic else {}
    rows = []
    for name, domain in data.items():
        progress(f"predicting {name}")
        own = {name} & points.keys() if crossed else set()
        given: tuple[Any, ...] = (model, objective, domain, points, own, few[name], seed, batch_tokens)
        tried_on = FirstOrder(*given) if first_order else Tried(*given)
        for update, half in halves.items():
            if isinstance(tried_on, Tried):
                found = tried_on.found(update, (samplers or {}).get(name), instead=not models)
            else:
                found = tried_on.found(update)
            second = _second(models[name], update, found.ess) if models else None
            made: dict[str, Any] = {
                **cell(found, tried_on.term(update), half.noise, update in own, second),
                **agreement[update],
            }
            if models:
                made |= {f"predicted_{o}": models[name].predict({update: 1.0}, o).value for o in ("first", "second")}
            made |= {"anchor_value": tried_on.present, "sequences": len(domain.sequences)}
            made |= within_range(made, domain) if objective == "reward" else {}
            rows.append({"domain": name, "update": update, "own": update == name, **made})
    return _with_errors(pd.DataFrame(rows), {n: h.noise for n, h in halves.items()}, method_error), models


def _with_errors(cells: pd.DataFrame, noise: Mapping[str, float], method_error: float = 0.0) -> pd.DataFrame:
    """Standard errors and intervals.

    The two estimates of an update differ by one draw of the noise, which says little of its size in one cell; the root mean
    square over the updates of a domain says more. Cells where it is told by few effective responses do not count there, nor
    does the own cell, which moves farther. The method's own error is a share of what training does to a domain: of the root mean
    square of its predicted changes, or of the own one.
    """
    shared = cells.assign(spread=cells["spread"].where((cells["noise_ess"] >= LOW_ESS) & ~cells["own"]))
    pooled = shared.groupby("domain")["spread"].transform(lambda s: float(np.sqrt((s**2).mean())))
    spread = pooled.fillna(cells["spread"].abs()).where(~cells["own"], np.fmax(pooled, cells["spread"].abs()))
    update = spread * np.sqrt(1 + 2 * cells["update"].map(noise))
    sizes = cells["predicted"].where(~cells["own"]).groupby(cells["domain"])
    typical = sizes.transform(lambda s: float(np.sqrt((s**2).mean())))
    method = method_error * typical.where(~cells["own"], cells["predicted"].abs()).fillna(0.0)
    stderr = np.sqrt(cells["sampling_stderr"] ** 2 + update**2 + method**2)
    bounds = {"low": cells["predicted"] - Z * stderr, "high": cells["predicted"] + Z * stderr}
    return cells.assign(update_stderr=update, method_stderr=method, stderr=stderr, **bounds).reindex(
        columns=["domain", "update", "own", *COLUMNS]
    )


def _second(model: QuadraticModel, update: str, ess: float) -> Point:
    """The second-order prediction as a point."""
    found = model.predict({update: 1.0})
    return Point(found.value, found.replicates, ess, "second")
