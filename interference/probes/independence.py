"""Consistency of gains that were made on other items: a model that learned as much, independently of the experts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from interference import statistics

Array = NDArray[np.float64]
DRAWS = 500
LEAST = 5
"""Neighbouring base rates are taken together until they have so many items."""


def like_items(rates: Array, least: int = LEAST) -> list[NDArray[np.intp]]:
    """Places of the items of like base rate: equal rates stay together, with at least so many items in each group.

    >>> [group.tolist() for group in like_items(np.array([0.5, 0.0, 0.0, 1.0, 0.5]), 2)]
    [[1, 2], [0, 4, 3]]
    """
    groups: list[list[int]] = [[]]
    for rate in np.unique(rates):
        if len(groups[-1]) >= least:
            groups.append([])
        groups[-1] += np.flatnonzero(rates == rate).tolist()
    if len(groups) > 1 and len(groups[-1]) < least:
        groups[-2:] = [groups[-2] + groups[-1]]
    return [np.array(group, dtype=np.intp) for group in groups]


def beside_independent(
    cosine: float, products: Array, rates: Array, rng: np.random.Generator, draws: int = DRAWS
) -> dict[str, float | bool]:
    """A model's consistency beside that of its own gains permuted over items of like base rate.

    products (3, splits, I): u g, u u and g g per split and item, with u the union's and g the model's gain.

    Returns independent (mean over permutations), independent_low, independent_high (90 %), beyond_independent. What base rates
    do not hold, such as how easily an item is learned by anyone, is not in this null.
    """
    u, g = np.sqrt(products[1]), np.sqrt(products[2])
    norm = np.sqrt(products[1].sum(-1) * products[2].sum(-1))
    known = norm > 0
    found = np.full(draws, np.nan)
    groups = like_items(rates)
    order = np.arange(u.shape[1])
    for k in range(draws if known.any() else 0):
        for group in groups:
            order[group] = rng.permutation(group)
        found[k] = ((u * g[:, order]).sum(-1)[known] / norm[known]).mean()
    low, high = statistics.interval(found)
    mean = float(found.mean())
    return {
        "independent": mean, "independent_low": low, "independent_high": high, "beyond_independent": bool(cosine > high)
    }  # fmt: skip
