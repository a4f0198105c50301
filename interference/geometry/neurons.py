"""Overlap of the most-changed units (MLP channels, attention heads) between models, beside that of random sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from interference.errors import InputError
from interference.geometry.nulls import jaccard, jaccard_null
from interference.statistics import Array

TOPS = (0.05, 0.10, 0.20)


def top_set(change: Array, top: float) -> NDArray[np.bool_]:
    """The round(top U) units that changed most, as a mask (U,); at least one.

    A unit that did not change is never among them, so the set is smaller when fewer changed. Equal changes at the threshold:
    the earlier unit is in.

    >>> top_set(np.array([3.0, 0.0, 1.0, 2.0]), 0.5).tolist()
    [True, False, False, True]
    """
    count = max(1, round(top * len(change)))
    chosen = np.zeros(len(change), dtype=bool)
    chosen[np.argsort(-change, kind="stable")[:count]] = True
    return chosen & (change > 0)


def neuron_overlap(
    models: Sequence[str],
    changes: Array,
    kinds: Sequence[str] | NDArray[Any],
    layers: Sequence[int] | NDArray[Any],
    tops: Sequence[float] = TOPS,
) -> pd.DataFrame:
    """Jaccard index of the most-changed units of each pair of models, among all units of a kind and within each layer.

    Args:
        models: N names.
        changes: (N, U), the size of each unit's change, the root of the sum of squares over its coordinates.
        kinds, layers: (U,) labels of the units; kinds are never mixed.
        tops: shares q of the units that count as most changed.

    Returns columns a, b, kind, top (q), scope ("model", "layer"), layer (-1 for the model), count (units in the scope), jaccard,
    chance, low, high. Chance is the Jaccard index of random sets of the same sizes, q/(2-q) with q as rounded to whole units,
    and its 90 % interval from the hypergeometric; NaN where neither model changed any. Random sets of the whole model take no
    account of layers: where all models change the same layers most, that alone is an overlap, which the layers' rows do not see.

    Raises InputError for other shapes, and for changes that are negative or not finite.
    """
    changes, kinds, layers = np.asarray(changes, dtype=np.float64), np.asarray(kinds), np.asarray(layers)
    fits = changes.shape == (len(models), len(kinds)) and kinds.shape == layers.shape
    if not fits or not np.all(np.isfinite(changes) & (changes >= 0)) or not all(0 < q <= 1 for q in tops):
        raise InputError(
            got=f"changes of shape {changes.shape}, {len(kinds)} kinds, {len(layers)} layers, tops {list(tops)}",
            expected=f"finite changes of at least 0, ({len(models)}, units), labels of each unit, and tops in (0, 1]",
            remedy="hand in the root of the summed squares of each unit, one row per model",
        )
    rows = []
    for labels, members in _scopes(kinds, layers):
        for top in tops:
            sets = np.stack([top_set(change[members], top) for change in changes])
            sizes = sets.sum(axis=1).tolist()
            for i, j in combinations(range(len(models)), 2):
                null = jaccard_null(len(members), sizes[i], sizes[j])
                found = jaccard(int((sets[i] & sets[j]).sum()), sizes[i], sizes[j])
                pair = {"a": models[i], "b": models[j], "top": top, "count": len(members), "jaccard": found}
                rows.append(pair | labels | {"chance": null.mean, "low": null.low, "high": null.high})
    columns = ["a", "b", "kind", "top", "scope", "layer", "count", "jaccard", "chance", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def _scopes(kinds: NDArray[Any], layers: NDArray[Any]) -> Iterator[tuple[dict[str, Any], NDArray[np.intp]]]:
    """The whole of each kind, then its layers: labels of the rows, and the units."""
    for kind in dict.fromkeys(kinds.tolist()):
        here = np.flatnonzero(kinds == kind)
        yield {"kind": kind, "scope": "model", "layer": -1}, here
        for layer in np.unique(layers[here]).tolist():
            yield {"kind": kind, "scope": "layer", "layer": layer}, here[layers[here] == layer]
