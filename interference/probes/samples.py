"""Rewards of several models on the same items, their random split into parts, and what they would be without any learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from interference import statistics
from interference.domain import Domain
from interference.errors import InputError, nearest

Array = NDArray[np.float64]
_LEVELS = 33  # more distinct rewards than this are put on a grid before they are simulated


@dataclass(frozen=True)
class ItemRewards:
    """rewards[model] (I, n): n samples of each of I items, in [0, 1]; NaN where an item has fewer samples than another."""

    items: tuple[str, ...]
    rewards: dict[str, Array]

    @classmethod
    def of(cls, models: Mapping[str, Domain | ArrayLike], items: Sequence[str] | None = None) -> ItemRewards:
        """From rewarded rollouts (an item is a prompt, by its prompt_id) or from arrays (items, samples), one per model.

        Args:
            models: all Domains, or all arrays, of the same items.
            items: names of the arrays' rows; "0", "1", ... unless given. Domains name their own.

        Raises:
            InputError: no model, models with other items than the first, rewards outside [0, 1] or missing.
        """
        if not models:
            raise InputError(
                got="no models", expected="rewards of a base model and others", remedy="give {name: rollouts}"
            )
        tables = {name: _rows(name, value, items) for name, value in models.items()}
        first, order = next((name, tuple(rows)) for name, rows in tables.items())
        for name, rows in tables.items():
            odd = sorted(set(order) ^ set(rows))
            if odd:
                raise InputError(
                    got=f"item {odd[0]!r} (of {len(odd)}) in only one of the models {first!r} and {name!r}",
                    expected="every model sampled on the same items",
                    remedy="sample the missing items, or keep the items (prompt_id) that all models share",
                )
        return cls(order, {name: _padded(name, [rows[item] for item in order]) for name, rows in tables.items()})

    def of_model(self, name: str, least: int) -> Array:
        """A model's rewards; InputError for an unknown model and for an item with fewer than `least` samples."""
        if name not in self.rewards:
            raise InputError(got=f"model {name!r}", expected="a model with rewards", remedy=nearest(name, self.rewards))
        count = np.isfinite(self.rewards[name]).sum(1)
        if count.min() < least:
            item = self.items[int(count.argmin())]
            raise InputError(
                got=f"{count.min()} sample(s) of model {name!r} on item {item!r}",
                expected=f"at least {least} samples of every item, to tell skill from sampling noise",
                remedy="sample every prompt more often",
            )
        return self.rewards[name]


def _rows(name: str, value: Domain | ArrayLike, items: Sequence[str] | None) -> dict[str, list[float]]:
    if isinstance(value, Domain):
        grouped: dict[str, list[float]] = {}
        for item, reward in zip(value.prompt_ids, value.rewards(), strict=True):
            grouped.setdefault(item, []).append(reward)
        return grouped
    try:
        array = np.asarray(value, dtype=np.float64)
    except (ValueError, TypeError):  # rows of different length, or no numbers
        array = np.zeros(0)
    if array.ndim != 2 or array.size == 0:
        raise InputError(
            got=f"rewards of {name!r} that are no rectangle of numbers (shape {np.shape(array)})",
            expected="an array (items, samples)",
            remedy="give one row per item; pad with NaN where an item has fewer samples",
        )
    names = [str(i) for i in range(len(array))] if items is None else [str(i) for i in items]
    if len(names) != len(array) or len(set(names)) != len(names):
        raise InputError(
            got=f"{len(set(names))} distinct item names for {len(array)} rows of {name!r}",
            expected="one name per row",
            remedy="mend `items`",
        )
    return {item: [float(x) for x in row if not np.isnan(x)] for item, row in zip(names, array, strict=True)}


def _padded(name: str, rows: list[list[float]]) -> Array:
    out = np.full((len(rows), max(1, *map(len, rows))), np.nan)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    low, high = (np.nanmin(out), np.nanmax(out)) if np.isfinite(out).any() else (0.0, 0.0)
    if low < 0 or high > 1:
        raise InputError(
            got=f"rewards of {name!r} from {low:g} to {high:g}",
            expected="rewards in [0, 1], whose mean is a success rate",
            remedy="rescale the rewards, or give the share of checks passed",
        )
    return out


def success_rates(rewards: Array) -> Array:
    """a(i): mean reward of each item over its samples, (I,)."""
    seen = np.isfinite(rewards)
    return np.asarray(np.where(seen, rewards, 0.0).sum(-1) / seen.sum(-1))


def parts(rewards: Array, count: int, rng: np.random.Generator) -> Array:
    """Success rates in `count` random disjoint parts of each item's samples, (count, I); sizes differ by at most one.

    Parts of one sample are independent: noise in one says nothing about noise in another.
    """
    keys = np.where(np.isfinite(rewards), rng.random(rewards.shape), 2.0)
    shuffled = np.take_along_axis(rewards, keys.argsort(1), 1)
    return np.stack([success_rates(shuffled[:, k::count]) for k in range(count)])


@dataclass(frozen=True)
class NoLearning:
    """The parametric null: models that all have the base's success rates, known only as well as the base's samples tell.

    An item's distribution over reward levels is drawn from its posterior under a Dirichlet prior whose mean is the pooled
    rewards, weights (I, V) = counts + strength * mean; binary rewards give Beta posteriors. strength is set by moments: with
    between and within the variances of items' rates and of rewards within an item, strength = within / between. Draws have
    the spread of the true rates, where the observed rates have more and posterior means less.
    """

    levels: Array
    weights: Array

    @classmethod
    def of(cls, rewards: Array) -> NoLearning:
        """From the base's rewards (I, n)."""
        seen = np.isfinite(rewards)
        values = np.unique(rewards[seen])
        snapped = rewards
        if len(values) > _LEVELS:
            values = np.linspace(0, 1, _LEVELS)
            snapped = np.round(rewards * (_LEVELS - 1)) / (_LEVELS - 1)
        counts = np.stack([np.isclose(snapped, v).sum(1) for v in values], axis=1).astype(float)
        n = seen.sum(1)
        squares = np.nansum((rewards - success_rates(rewards)[:, None]) ** 2)
        within = squares / max(float((n - 1).sum()), 1.0)
        between = (np.var(success_rates(rewards), ddof=1) if len(n) > 1 else 0.0) - within * np.mean(1 / n)
        strength = float(np.clip(within / max(between, 1e-9), 1e-6, 1e3))
        return cls(values, counts + strength * counts.sum(0) / counts.sum())

    def draw(self, shapes: Mapping[str, Array], rng: np.random.Generator) -> dict[str, Array]:
        """One fresh data set: rewards of every model at one draw of the base's rates, with NaN where `shapes` has NaN."""
        gamma = rng.standard_gamma(np.maximum(self.weights, 1e-12))
        bounds = np.cumsum(gamma / np.maximum(gamma.sum(1, keepdims=True), 1e-300), axis=1)[:, :-1]
        out = {}
        for name, like in shapes.items():
            drawn = self.levels[(rng.random(like.shape)[:, :, None] > bounds[:, None, :]).sum(2)]
            out[name] = np.where(np.isfinite(like), drawn, np.nan)
        return out


def item_bootstrap(per_item: Array, items: Sequence[str], seed: int) -> Array:
    """Bootstrap replicates over items of the sums of per-item terms: (..., I) -> (replicates, ...)."""
    weights = statistics.prompt_weights(list(items), seed)
    return np.moveaxis(np.asarray(per_item @ weights.T), -1, 0)
