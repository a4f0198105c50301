"""Sequences, mixtures and merges of trainings, predicted from the quadratic models along their updates.

    L_i(theta + sum_k a_k d_k) - L_i(theta)  ~  c_i . a + 1/2 a' A_i a

for every domain i: a sequence adds coefficients of 1 one after another, a mixture is `length` times weights that sum to one,
a merge is any point of a box.

In this model the updates are held fixed, so the order of a sequence changes the way and never the end. That later trainings
have another update where earlier ones have moved the weights, to first order d_B' = d_B - P H_B d_A with P the optimizer's
preconditioner times its length, cannot be told from the models, which know d'Hd and not the vector H d: `sequences` trains
virtually from there. The models lie along estimated updates; the noise in these is part of their curvature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import optimize

from interference import statistics
from interference.errors import InputError, nearest
from interference.forecasting.ranking import check_criterion, ranked
from interference.objectives import OBJECTIVES
from interference.quadratic import QuadraticModel, box_starts
from interference.statistics import Array

Models = Mapping[str, QuadraticModel]
Field = Callable[[Array], Array]
NO_PAIRS = "made without pairs: what updates do together is left out"


def outcome(models: Models, coefficients: Mapping[str, float], order: int | str = 2) -> pd.DataFrame:
    """The change of every domain at theta + sum_k coefficients_k d_k.

    One row per domain: domain, predicted, stderr, low, high (90 %, over prompts), replicates, note. Where a model was made
    without pairs, the terms a_k a_l A_kl of several updates are taken as zero and the note says so.

    Raises InputError for an update that the models do not know, and models of several objectives or updates.
    """
    names = _check(models)
    for name in coefficients:
        if name not in names:
            raise InputError(got=f"coefficient of {name!r}", expected="names of updates", remedy=nearest(name, names))
    return pd.DataFrame([{"domain": name, **_change(m, coefficients, order)} for name, m in models.items()])


def sequence(models: Models, order: Sequence[str], *, taylor: int | str = 2) -> pd.DataFrame:
    """The change of every domain after each stage of training on one domain after another, as rows of `outcome` with `stage`
    (from 1) and `trained` in front. The end is the same for every order (see above).

    Raises InputError for a domain that is trained on twice, whose second update would be another, and as `outcome` does.
    """
    check_order(order, _check(models))
    stages = []
    for stage, name in enumerate(order, start=1):
        found = outcome(models, dict.fromkeys(order[:stage], 1.0), taylor)
        found.insert(0, "stage", stage)
        found.insert(1, "trained", name)
        stages.append(found)
    return pd.concat(stages, ignore_index=True)


def mixture(
    models: Models, weights: Mapping[str, float], *, length: float = 1.0, taylor: int | str = 2
) -> pd.DataFrame:
    """The change of every domain under length * sum_k w_k d_k, as rows of `outcome`: training on all domains at once, w_k of
    the steps on each. Length 1 takes as many steps in all as one training took.

    Raises InputError for weights that are negative or do not sum to one, a length that is not positive, and as `outcome`.
    """
    total = sum(weights.values())
    if min(weights.values(), default=-1.0) < 0 or abs(total - 1) > 1e-6:
        raise InputError(
            got=f"mixture weights {dict(weights)} (sum {total:g})",
            expected="weights of 0 or more that sum to 1",
            remedy="divide them by their sum",
        )
    if not length > 0:
        raise InputError(got=f"length {length}", expected="a positive length", remedy="use 1 for one training's steps")
    return outcome(models, {name: length * w for name, w in weights.items()}, taylor)


def rank_mixtures(
    models: Models,
    mixtures: Iterable[Mapping[str, float]] | None = None,
    *,
    by: str = "mean",
    length: float = 1.0,
    parts: int = 4,
    taylor: int | str = 2,
) -> pd.DataFrame:
    """Mixtures, best first by the `mean` over domains or by the `worst` domain: the columns of `ranking.ranked` after one
    with the weight of every update.

    mixtures: those to compare; all with weights in multiples of 1 / parts unless given.
    """
    names = _check(models)
    chosen = list(simplex(names, parts) if mixtures is None else mixtures)
    if not chosen:
        raise InputError(got="no mixtures", expected="at least one", remedy="leave them out for a grid")
    tables = [mixture(models, weights, length=length, taylor=taylor) for weights in chosen]
    labels = pd.DataFrame([{name: float(w.get(name, 0.0)) for name in names} for w in chosen])
    return ranked(tables, labels, _objective(models), by)


def simplex(names: Sequence[str], parts: int) -> list[dict[str, float]]:
    """All weights in multiples of 1 / parts that sum to one.

    >>> simplex(["a", "b"], 2)
    [{'a': 0.0, 'b': 1.0}, {'a': 0.5, 'b': 0.5}, {'a': 1.0, 'b': 0.0}]
    """
    if parts < 1:
        raise InputError(got=f"{parts} parts", expected="1 or more", remedy="use 4 for quarters")
    out = []
    for bars in combinations(range(parts + len(names) - 1), len(names) - 1):
        ends = (-1, *bars, parts + len(names) - 1)
        out.append({n: (b - a - 1) / parts for n, a, b in zip(names, ends, ends[1:], strict=False)})
    return out


def merge(
    models: Models, *, by: str = "mean", bounds: tuple[float, float] = (0.0, 1.0), taylor: int | str = 2
) -> dict[str, float]:
    """Coefficients within `bounds` at which the models say the domains do best, on average or in the worst domain.

    `worst` maximises t under gain_i(a) >= t for every domain (sequential quadratic programming); both search from the
    middle and the corners of the box, since curvature of the wrong sign makes several optima. See what they are worth with
    `outcome`.
    """
    check_criterion(by)
    names = _check(models)
    sign = 1.0 if OBJECTIVES[_objective(models)].better == "higher" else -1.0
    slopes = sign * np.stack([m.slope for m in models.values()])
    matrices = sign * np.stack([_matrix(m, taylor) for m in models.values()])

    def gains(a: Array) -> Array:
        return np.asarray(slopes @ a + 0.5 * np.einsum("k,ikl,l->i", a, matrices, a))

    def gradients(a: Array) -> Array:
        return np.asarray(slopes + matrices @ a)

    score = np.mean if by == "mean" else np.min
    starts, box = box_starts(len(names), bounds), [bounds] * len(names)
    found = [
        _climb_mean(gains, gradients, s, box) if by == "mean" else _climb_worst(gains, gradients, s, box)
        for s in starts
    ]
    inside = [np.clip(a, *bounds) for a in (*found, *starts)]
    best = max(inside, key=lambda a: float(score(gains(a))))
    return {name: float(a) for name, a in zip(names, best, strict=True)}


def _climb_mean(gains: Field, gradients: Field, start: Array, box: list[tuple[float, float]]) -> Array:
    found = optimize.minimize(
        lambda a: (-gains(a).mean(), -gradients(a).mean(0)), start, jac=True, bounds=box, method="L-BFGS-B"
    )
    return np.asarray(found.x)


def _climb_worst(gains: Field, gradients: Field, start: Array, box: list[tuple[float, float]]) -> Array:
    """From (a, t) with t the worst gain at the start."""
    found = optimize.minimize(
        lambda x: -x[-1],
        np.append(start, gains(start).min()),
        jac=lambda x: np.append(np.zeros(len(start)), -1.0),
        bounds=[*box, (None, None)],
        constraints={
            "type": "ineq",
            "fun": lambda x: gains(x[:-1]) - x[-1],
            "jac": lambda x: np.column_stack([gradients(x[:-1]), -np.ones(len(gains(x[:-1])))]),
        },
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )
    return np.asarray(found.x[:-1])


def check_order(order: Sequence[str], names: Sequence[str]) -> None:
    """Refuse an order that is empty, repeats a domain or names one that is not there."""
    for name in order:
        if name not in names:
            raise InputError(got=f"order with {name!r}", expected="names of updates", remedy=nearest(name, names))
    if not order or len(set(order)) < len(order):
        raise InputError(
            got=f"order {list(order)}", expected="every domain at most once, and at least one", remedy="mend the order"
        )


def _change(model: QuadraticModel, coefficients: Mapping[str, float], order: int | str) -> dict[str, object]:
    used = {name: a for name, a in coefficients.items() if a} or dict.fromkeys(coefficients, 0.0)
    alone = len(used) > 1 and order not in (1, "first") and not _has_pairs(model)
    found = [model.predict({n: a}, order) for n, a in used.items()] if alone else [model.predict(used, order)]
    draws = np.sum([p.replicates for p in found], axis=0)
    low, high = statistics.interval(draws)
    return {
        "predicted": sum(p.value for p in found),
        "stderr": float(statistics.stderr(draws)),
        "low": low,
        "high": high,
        "replicates": draws,
        "note": NO_PAIRS if alone else "",
    }


def _has_pairs(model: QuadraticModel) -> bool:
    return not np.isnan(model.curvature).any()


def _matrix(model: QuadraticModel, order: int | str) -> Array:
    """The curvature of an order, without what was not computed."""
    if order in (1, "first"):
        return np.zeros_like(model.curvature)
    return np.nan_to_num(model.ggn if order == "ggn" else model.curvature)


def _objective(models: Models) -> str:
    return next(iter(models.values())).objective


def _check(models: Models) -> tuple[str, ...]:
    """The updates of the models."""
    if not models:
        raise InputError(
            got="no models", expected="one per domain", remedy="call forecast(..., quadratic=True, pairs=True)"
        )
    first = next(iter(models.values()))
    for domain, model in models.items():
        if (model.objective, model.names) != (first.objective, first.names):
            raise InputError(
                got=f"the model of {domain!r} ({model.objective} along {list(model.names)})",
                expected=f"{first.objective} along {list(first.names)}, as the first",
                remedy="give the models of one forecast",
            )
    return first.names
