"""remainder: what the quadratic model leaves out along each update, from the objective's own value at a few alpha."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from interference import measurement, objectives, statistics, truncation
from interference.checkpoint import Checkpoint
from interference.domain import Domain
from interference.errors import InputError
from interference.expansion import Progress, align, check_domain, expand
from interference.measurement import Scores
from interference.model import Model, load
from interference.quadratic import QuadraticModel, check_models
from interference.tree import NamedChanges

Array = NDArray[np.float64]
Points = Mapping[tuple[str, float], Scores]


def remainder(
    base: Checkpoint | Model,
    updates: Mapping[str, NamedChanges],
    domains: Mapping[str, Domain],
    *,
    objective: str = "nll",
    alphas: Sequence[float] = (0.25, 0.5),
    models: Mapping[str, QuadraticModel] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "auto",
    batch_tokens: int = 16384,
    seed: int = 0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """The third-order remainder of every update on every domain, and the radius of the second-order prediction.

    Each domain's sequences are evaluated at theta + alpha d, one forward pass for each alpha and update, and
    r(alpha) = L(alpha) - L(0) - c alpha - 1/2 A alpha^2 is fitted by k3 alpha^3 + k4 alpha^4 over |alpha| <= 0.5 (see
    `truncation`). L is the domain's own-data value: exact for nll and kl; for reward, importance-weighted on the domain's
    rollouts. Give the result to `evaluate(..., remainders=...)`.

    Parameters
    ----------
    base, updates, domains, objective, dtype, device, seed : as for `expand`.
    alphas : where to evaluate. Up to 0.5 they predict; larger ones serve the radius alone, which never exceeds the largest.
    models : what `expand` returned for the same arguments; made here when not given.

    Returns
    -------
    One row per (domain, update), in the objective's unit at coefficient 1: third (k3 = c3 / 6), third_stderr (bootstrap over
    prompts), third_misfit; fourth (k4 = c4 / 24), fourth_stderr; truncation (the predicted r(1) = k3 + k4),
    truncation_stderr, truncation_misfit; remainder, remainder_stderr (r(1) as found; NaN unless 1 is among alphas); radius,
    radius_reason, radius_judged, beyond_radius (see `truncation.Reach`); replicates_truncation.

    Raises InputError for the objective "surrogate" (its value along an update is not evaluated), for alphas that are no
    numbers but zero, for models of another request, and for updates or domains that `expand` refuses.
    """
    _check(objective, alphas, domains)
    model = base if isinstance(base, Model) else load(base, dtype=dtype, device=device)
    aligned = align(model, updates)
    for domain in domains.values():
        check_domain(model, domain, objective)
    if models is not None:
        check_models(models, objective, aligned, domains)
    else:
        models = expand(model, aligned, domains, objective=objective, pairs=False, seed=seed)
    places = [(name, float(alpha)) for name in aligned for alpha in dict.fromkeys(alphas)]
    rows = []
    for name, domain in domains.items():
        points = [(aligned[update], alpha) for update, alpha in places]
        anchor, *moved = measurement.score(model, domain, points, batch_tokens)
        rows.append(along(models[name], domain, anchor, dict(zip(places, moved, strict=True)))[1])
        if progress:
            progress(name)
    return pd.concat(rows, ignore_index=True)


def _check(objective: str, alphas: Sequence[float], domains: Mapping[str, Domain]) -> None:
    objectives.kind(objective)
    if objective == "surrogate":
        raise InputError(
            got="the remainder of the objective 'surrogate'",
            expected="nll, kl or reward, whose own value is evaluated along an update",
            remedy="use objective='reward'",
        )
    if not domains:
        raise InputError(got="no domains", expected="at least one", remedy="give {name: Domain.from_jsonl(...)}")
    if not len(alphas) or not all(np.isfinite(a) and a != 0 for a in alphas):
        raise InputError(
            got=f"alphas {list(alphas)}", expected="finite numbers other than zero", remedy="use alphas=(0.25, 0.5)"
        )


def along(model: QuadraticModel, domain: Domain, anchor: Scores, at: Points) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One domain along every update: the curves (a row per update and alpha), and the table of `remainder`.

    `anchor` and `at` are the domain's sequences evaluated at theta and at {(update, alpha)}. For the surrogate the curves
    show the expected reward, not the surrogate itself, so its remainder is unknown (reason "none").
    """
    curves, rows = [], []
    for update in dict.fromkeys(name for name, _ in at):
        path = [_point(model, domain, anchor, update, alpha, at[update, alpha]) for u, alpha in at if u == update]
        known = model.objective != "surrogate"
        rows.append(_row(model, update, path if known else []))
        curves += [{k: v for k, v in point.items() if k != "replicates"} for point in path]
    return pd.DataFrame(curves), pd.DataFrame(rows)


def _point(
    model: QuadraticModel, domain: Domain, anchor: Scores, update: str, alpha: float, moved: Scores
) -> dict[str, Any]:
    """The change at one alpha beside the local models there, and the replicates of what the second order leaves."""
    rewards = objectives.kind(model.objective).rewards
    e = measurement.importance_estimate(domain, anchor, moved, model.seed) if rewards else None
    change = e or measurement.sequence_change(model.objective, domain, anchor, moved, model.seed)
    by = {order: model.predict({update: alpha}, order) for order in ("first", "second", "ggn")}
    rest = change.replicates - by["second"].replicates
    return {
        "objective": model.objective,
        "update": update,
        "domain": model.domain,
        "alpha": alpha,
        "kind": "importance-weighted estimate" if rewards else "measured",
        "measured": change.delta,
        "measured_stderr": change.stderr,
        "ess": e.ess if e else np.nan,
        "low_ess": bool(e and e.ess < truncation.LOW_ESS * e.sequences),
        "predicted_first": by["first"].value,
        "predicted_second": by["second"].value,
        "predicted_second_ggn": by["ggn"].value,
        "stderr": by["second"].stderr,
        "residual_stderr": float(statistics.stderr(rest)),
        "replicates": rest,
    }


def _row(model: QuadraticModel, update: str, path: list[dict[str, Any]]) -> dict[str, Any]:
    alphas = np.array([p["alpha"] for p in path])
    rest = np.array([p["measured"] - p["predicted_second"] for p in path])
    noise = np.array([p["residual_stderr"] for p in path])
    usable = np.array([not p["low_ess"] for p in path], dtype=bool)
    k = model.names.index(update)
    far = truncation.reach(alphas, rest, noise, float(model.slope[k]), float(model.curvature[k, k]), usable)
    draws = np.stack([p["replicates"] for p in path], axis=1) if path else np.zeros((statistics.REPLICATES, 0))
    found = truncation.fit(alphas[usable], rest[usable], draws[:, usable])
    one = np.flatnonzero((alphas == 1) & usable)
    third_stderr, fourth_stderr, stderr = found.stderr if found else np.full(3, np.nan)
    return {
        "objective": model.objective,
        "domain": model.domain,
        "update": update,
        "third": found.third if found else np.nan,
        "third_stderr": third_stderr,
        "third_misfit": found.third_misfit if found else np.nan,
        "fourth": found.fourth if found else np.nan,
        "fourth_stderr": fourth_stderr,
        "truncation": found.value if found else np.nan,
        "truncation_stderr": stderr,
        "truncation_misfit": found.misfit if found else np.nan,
        "remainder": float(rest[one[0]]) if len(one) else np.nan,
        "remainder_stderr": float(noise[one[0]]) if len(one) else np.nan,
        "radius": far.radius,
        "radius_reason": far.reason,
        "radius_judged": far.judged,
        "beyond_radius": far.beyond,
        "replicates_truncation": found.replicates[:, 2] if found else np.full(statistics.REPLICATES, np.nan),
    }
