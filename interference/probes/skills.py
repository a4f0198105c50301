"""Skills: which items the experts learned to solve, and whether another model learned the same.

With a_m(i) the success rate of model m on item i over n samples (arXiv 2602.12566, section "same skills"):

    gain         g_m(i) = max(a_m(i) - a_base(i), 0)
    union        u(i) = max over the single-domain experts of g_e(i)
    consistency  cos(u, g_m), for a multi-task, merged or other model m

Finite samples alone make gains, and the base's noise is on both sides of the cosine. So here the union is taken against one
random half of the base's samples and g_m against the other (the mean over `splits` such splits), and beside every number
stands what it would be if no model had learned anything (`samples.NoLearning`).

Two further numbers, both our own, are free of noise in expectation. With d_m = a_m - a_base, losses included, and d_* the
change of the expert that is best on an item by a third of the experts' samples, measured on the other two thirds:

    skill cosine    <d_*, d_m> / sqrt(<d_*, d_*> <d_m, d_m>)      retained skill    <d_*, d_m> / <d_*, d_*>

where the two factors of every product come from disjoint samples of all models, so that each product is unbiased: no
learning gives 0, a model with just the experts' skills 1, losses count against it, and neither number depends on n but for
its interval. (An item whose best expert is not recognised by a third of the samples lowers the skill cosine a little.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from interference import statistics
from interference.errors import InputError
from interference.probes.independence import beside_independent
from interference.probes.samples import ItemRewards, NoLearning, item_bootstrap, parts, success_rates

Array = NDArray[np.float64]
SPLITS = 16
NULL_DRAWS = 300


@dataclass(frozen=True)
class Skills:
    """Tidy tables.

    gains: model, role, gain (mean over items), stderr, low, high (over items), null, null_low, null_high, beyond_null, items,
        items_null (items whose gain is beyond the 95 % point of their own null, and how many would be by chance), share,
        share_null (of the union; experts only). Role "split": one half of the base's samples over the other half.
    consistency: model, consistency, low, high (over items), null, null_low, null_high, beyond_null, independent, _low, _high,
        beyond_independent (`independence.beside_independent`); skill_cosine and retained, each with _low and _high, NaN where the
        changes that they divide by are not beyond noise.
    shared: experts (how many gained an item), items, items_null.
    items: item, base (its rate), union, and each model's gain.
    """

    gains: pd.DataFrame
    consistency: pd.DataFrame
    shared: pd.DataFrame
    items: pd.DataFrame


def gain(rates: Array, base: Array) -> Array:
    """g(i) = max(a(i) - a_base(i), 0)."""
    return np.maximum(rates - base, 0.0)


def union(gains: Sequence[Array]) -> Array:
    """Element-wise maximum of the experts' gains."""
    return np.asarray(np.max(np.stack(list(gains)), axis=0))


def consistency(union_gain: Array, model_gain: Array) -> float:
    """Cosine of two gain vectors (I,); NaN where either is zero everywhere.

    >>> consistency(np.array([1.0, 0.0]), np.array([2.0, 0.0]))
    1.0
    """
    norms = float((union_gain**2).sum() * (model_gain**2).sum())
    return float((union_gain * model_gain).sum()) / norms**0.5 if norms > 0 else float("nan")


def skills(
    data: ItemRewards,
    *,
    base: str = "base",
    experts: Sequence[str],
    others: Sequence[str] = (),
    splits: int = SPLITS,
    null_draws: int = NULL_DRAWS,
    seed: int = 0,
) -> Skills:
    """Gains, their union and every other model's consistency with it, each beside its null.

    Args:
        data: rewards of all models on the same items.
        base, experts, others: names of models in `data`; `others` are compared with the experts' union.
        splits: random splits of the samples over which the split-half values are averaged.
        null_draws: data sets without any learning.

    Raises:
        InputError: unknown models, no expert, the same model twice, splits or null_draws that are not positive, and items
            with fewer than 2 samples (3 for experts).
    """
    _check(base, experts, others, splits, null_draws)
    taken = {n: data.of_model(n, least=3 if n in experts else 2) for n in (base, *experts, *others)}
    rng = np.random.default_rng(seed)
    nothing = NoLearning.of(taken[base])
    null = [_summary(nothing.draw(taken, rng), base, experts, others, min(splits, 4), rng) for _ in range(null_draws)]
    found = _summary(taken, base, experts, others, splits, rng)
    null_gains = np.stack([n.gains for n in null])
    point = np.quantile(null_gains, 0.95, axis=0)
    compared = []
    for k, name in enumerate(others):
        low, high = _cosine_interval(found.products[k], data.items, seed)
        row = {"model": name, "consistency": float(found.cosines[k]), "low": low, "high": high}
        row |= _beside(float(found.cosines[k]), np.array([n.cosines[k] for n in null]))
        row |= beside_independent(float(found.cosines[k]), found.products[k], success_rates(taken[base]), rng)
        compared.append(row | _noise_free(taken, base, experts, name, data.items, splits, seed))
    per_item = {name: found.gains[k] for k, name in enumerate([*experts, *others])}
    return Skills(
        _gain_table(found, null, experts, others, data.items, seed),
        pd.DataFrame(compared),
        _shared((found.gains > point)[: len(experts)], (null_gains > point)[:, : len(experts)]),
        pd.DataFrame(
            {"item": data.items, "base": success_rates(taken[base]), "union": union([per_item[e] for e in experts])}
            | per_item
        ),
    )


def _check(base: str, experts: Sequence[str], others: Sequence[str], splits: int, null_draws: int) -> None:
    names = [base, *experts, *others]
    if not experts or len(set(names)) != len(names):
        raise InputError(
            got="no experts" if not experts else "a model that is named twice",
            expected="one base, at least one expert, and others that are neither",
            remedy="mend `base`, `experts` and `others`",
        )
    for what, number in {"splits": splits, "null_draws": null_draws}.items():
        if number < 1:
            raise InputError(got=f"{what}: {number}", expected="a positive number", remedy=f"set {what} to 1 or more")


@dataclass(frozen=True)
class _Summary:
    """gains (M, I) against all of the base; cosines (O,) and their per-item terms (O, 3, splits, I); shares (E,); split (I,)."""

    gains: Array
    cosines: Array
    products: Array
    shares: Array
    split: Array


def _summary(
    taken: Mapping[str, Array],
    base: str,
    experts: Sequence[str],
    others: Sequence[str],
    splits: int,
    rng: np.random.Generator,
) -> _Summary:
    """What is measured, of data and of null data alike."""
    rates = {name: success_rates(x) for name, x in taken.items()}
    gains = np.stack([gain(rates[name], rates[base]) for name in (*experts, *others)])
    best = np.max([rates[e] for e in experts], axis=0)
    terms: list[Array] = []
    split = np.zeros(len(best))
    for _ in range(splits):
        one, two = parts(taken[base], 2, rng)
        split += (gain(one, two) + gain(two, one)) / (2 * splits)
        for a, b in ((one, two), (two, one)):
            u = gain(best, a)
            g = np.stack([gain(rates[name], b) for name in others]) if others else np.zeros((0, len(u)))
            terms.append(np.stack([u * g, np.broadcast_to(u * u, g.shape), g * g], axis=1))
    products = np.stack(terms, axis=2)
    sums = products.sum(-1)
    return _Summary(gains, _mean_cosine(sums), products, _shares(gains[: len(experts)]), split)


def _mean_cosine(sums: Array) -> Array:
    """Mean over splits of cosines from sums (..., 3, splits); splits without any gain are left out, NaN where all are."""
    norm = np.sqrt(sums[..., 1, :] * sums[..., 2, :])
    known = (norm > 0).sum(-1)
    cosines = sums[..., 0, :] / np.where(norm > 0, norm, 1.0)  # the numerator is 0 where the norm is
    return np.asarray(cosines.sum(-1) / np.where(known > 0, known, np.nan))


def _shares(gains: Array) -> Array:
    """The share of the union's sum that each expert holds; experts that tie on an item share it."""
    top = gains.max(0)
    holds = (gains == top) & (top > 0)
    return np.asarray((holds / np.maximum(holds.sum(0), 1) * top).sum(1) / (top.sum() or np.nan))


def _gain_table(
    found: _Summary,
    null: Sequence[_Summary],
    experts: Sequence[str],
    others: Sequence[str],
    items: Sequence[str],
    seed: int,
) -> pd.DataFrame:
    half = float(found.split.mean())
    rows: list[dict[str, object]] = [
        {"model": "base", "role": "split", "gain": half} | _beside(half, np.array([n.split.mean() for n in null]))
    ]
    null_gains = np.stack([n.gains for n in null])
    point = np.quantile(null_gains, 0.95, axis=0)
    for k, name in enumerate([*experts, *others]):
        value = float(found.gains[k].mean())
        replicates = statistics.ratio_replicates(found.gains[k], np.ones(len(items)), items, seed)
        low, high = statistics.interval(replicates)
        row: dict[str, object] = {"model": name, "role": "expert" if k < len(experts) else "other", "gain": value}
        row |= {"stderr": float(statistics.stderr(replicates)), "low": low, "high": high}
        row |= _beside(value, null_gains[:, k].mean(1))
        row |= {"items": int((found.gains[k] > point[k]).sum())}
        row |= {"items_null": float((null_gains[:, k] > point[k]).sum(1).mean())}
        if k < len(experts):
            shares = np.array([n.shares[k] for n in null])
            row |= {"share": found.shares[k], "share_null": _mean(shares)}
        rows.append(row)
    return pd.DataFrame(rows)


def _beside(value: float, null: Array) -> dict[str, float | bool]:
    low, high = statistics.interval(null)
    return {"null": _mean(null), "null_low": low, "null_high": high, "beyond_null": bool(value > high)}


def _mean(values: Array) -> float:
    """Over what is defined; NaN where nothing is."""
    seen = values[np.isfinite(values)]
    return float(seen.mean()) if len(seen) else float("nan")


def _cosine_interval(products: Array, items: Sequence[str], seed: int) -> tuple[float, float]:
    return statistics.interval(_mean_cosine(item_bootstrap(products, items, seed)))


def _shared(gained: NDArray[np.bool_], gained_null: NDArray[np.bool_]) -> pd.DataFrame:
    """Items by the number of experts that gained them, beside the mean number without learning."""
    count, null = gained.sum(0), gained_null.sum(1)
    return pd.DataFrame(
        [
            {"experts": k, "items": int((count == k).sum()), "items_null": float((null == k).sum(1).mean())}
            for k in range(len(gained) + 1)
        ]
    )


def _noise_free(
    taken: Mapping[str, Array],
    base: str,
    experts: Sequence[str],
    name: str,
    items: Sequence[str],
    splits: int,
    seed: int,
) -> dict[str, float]:
    """Skill cosine and retained skill, with intervals over items."""
    terms = _unbiased_products(taken, base, experts, name, splits, np.random.default_rng(seed))
    sums, replicates = terms.sum(1), item_bootstrap(terms, items, seed)
    low = [statistics.interval(replicates[:, k])[0] for k in range(3)]
    out = {}
    for label, over in (("retained", (1, 1)), ("skill_cosine", (1, 2))):
        known = min(low[k] for k in over) > 0
        for key, value in (("", sums[None]), ("_low", replicates), ("_high", replicates)):
            squares = np.prod(np.where(value[:, over] > 0, value[:, over], np.nan), axis=1)
            ratio = value[:, 0] / np.sqrt(squares)
            place = ("_low", "_high").index(key) if key else 0
            number = statistics.interval(ratio)[place] if key else float(ratio[0])
            out[label + key] = number if known else float("nan")
    return out


def _unbiased_products(
    taken: Mapping[str, Array],
    base: str,
    experts: Sequence[str],
    name: str,
    splits: int,
    rng: np.random.Generator,
) -> Array:
    """Per-item <d_*, d_m>, <d_*, d_*>, <d_m, d_m>, (3, I), each product of two factors without a common sample."""
    out = np.zeros((3, len(taken[base])))
    everywhere, own = np.arange(out.shape[1]), success_rates(taken[name])
    for _ in range(splits):
        b, m = parts(taken[base], 2, rng), parts(taken[name], 2, rng)
        thirds = np.stack([parts(taken[e], 3, rng) for e in experts])
        for k in range(3):
            chosen = thirds[thirds[:, k].argmax(0), :, everywhere]
            one, two = chosen[:, (k + 1) % 3] - b[0], chosen[:, (k + 2) % 3] - b[1]
            out[0] += (one * (own - b[1]) + two * (own - b[0])) / 2
            out[1] += one * two
            out[2] += (m[0] - b[0]) * (m[1] - b[1])
    return np.asarray(out / (3 * splits))
