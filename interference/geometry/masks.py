"""Tables of changed-weight masks from counts that add up over tensors: densities, overlaps, consensus, beside chance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from interference.errors import InputError
from interference.geometry.nulls import consensus_chance, intersection_null, jaccard, jaccard_chance
from interference.statistics import Array

Counted = NDArray[np.int64]
_SCOPE = ("scope", "layer", "module", "tensor")
_MEASURES = (
    *("density_a", "density_b", "jaccard", "chance", "chance_stratified", "low", "high"),
    *("overlap_a", "overlap_b", "chance_a", "chance_b"),
)


@dataclass(frozen=True)
class Group:
    """Tensors that are taken together in one row of a table, as indices into the T tensors, and how the row names them."""

    scope: Literal["model", "layer", "module", "tensor"]
    layer: int
    module: str
    tensor: str
    members: tuple[int, ...]

    @property
    def labels(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _SCOPE}


def groupings(names: Sequence[str], layers: Sequence[int], modules: Sequence[str]) -> list[Group]:
    """The model, each layer (-1: tensors outside the layers), each module over all layers, and each tensor.

    >>> [(g.scope, g.layer, g.module, g.members) for g in groupings(["x", "y"], [0, 1], ["q", "q"])][:4]
    [('model', -1, '', (0, 1)), ('layer', 0, '', (0,)), ('layer', 1, '', (1,)), ('module', -1, 'q', (0, 1))]
    """
    everywhere = range(len(names))
    out = [Group("model", -1, "", "", tuple(everywhere))]
    for layer in sorted(set(layers)):
        out.append(Group("layer", layer, "", "", tuple(i for i in everywhere if layers[i] == layer)))
    for module in dict.fromkeys(modules):
        out.append(Group("module", -1, module, "", tuple(i for i in everywhere if modules[i] == module)))
    return out + [Group("tensor", layers[i], modules[i], names[i], (i,)) for i in everywhere]


@dataclass(frozen=True, eq=False)
class Counts:
    """Counts of T tensors for R rules of what counts as changed and N models; sums over tensors are those of the whole.

    numel (T,); changed (T, R, N): entries changed in a model; both (T, R, N, N): entries changed in two of them, the diagonal
    being `changed`.

    Raises InputError for other shapes, and for counts that no masks have.
    """

    numel: Counted
    changed: Counted
    both: Counted

    def __post_init__(self) -> None:
        t, r, n = self.changed.shape if self.changed.ndim == 3 else (-1, -1, -1)
        possible = self.numel.shape == (t,) and self.both.shape == (t, r, n, n)
        if possible:
            first, second, size = (
                self.changed[..., :, None],
                self.changed[..., None, :],
                self.numel[:, None, None, None],
            )
            least, most = np.maximum(first + second - size, 0), np.minimum(first, second)
            same = np.array_equal(np.einsum("trii->tri", self.both), self.changed)
            possible = same and bool(np.all((least <= self.both) & (self.both <= most) & (most <= size)))
        if not possible:
            raise InputError(
                got=f"counts of shapes {self.numel.shape}, {self.changed.shape} and {self.both.shape} that do not fit together",
                expected="(T,), (T, R, N) and (T, R, N, N), each intersection possible for its counts and size",
                remedy="count all models over the same tensors under the same rules",
            )


def mask_table(models: Sequence[str], rules: Sequence[str], counts: Counts, groups: Sequence[Group]) -> pd.DataFrame:
    """Overlap of the changed-weight masks of each pair of models, under each rule, in each group.

    Columns: a, b, rule, scope, layer, module, tensor, numel, density_a, density_b, jaccard, then what chance gives: `chance`
    pq/(p+q-pq) from the densities in the group (arXiv 2511.08567); `chance_stratified`, the Jaccard index at the expected
    intersection when each mask is permuted within each tensor, so that tensors that all models change more are no overlap; its
    90 % permutation interval `low`, `high`. One-sided (arXiv 2505.11711): overlap_a = |A & B| / |A| beside chance_a = density_b,
    and the same for b. NaN where a mask is empty.
    """
    rows = [row for group in groups for row in _pairs(models, rules, counts, group)]
    return pd.DataFrame(rows, columns=["a", "b", "rule", *_SCOPE, "numel", *_MEASURES])


def _pairs(models: Sequence[str], rules: Sequence[str], counts: Counts, group: Group) -> Iterator[dict[str, Any]]:
    members = list(group.members)
    size = counts.numel[members]
    numel = int(size.sum())
    for r, rule in enumerate(rules):
        for i, j in combinations(range(len(models)), 2):
            first, second = counts.changed[members, r, i], counts.changed[members, r, j]
            a, b, both = int(first.sum()), int(second.sum()), int(counts.both[members, r, i, j].sum())
            p, q = (a / numel, b / numel) if numel else (0.0, 0.0)
            stratified = intersection_null(size, first, second).jaccard(a, b)
            row = {"a": models[i], "b": models[j], "rule": rule} | group.labels
            yield row | {
                "numel": numel,
                "density_a": p,
                "density_b": q,
                "jaccard": jaccard(both, a, b),
                "chance": jaccard_chance(p, q),
                "chance_stratified": stratified.mean,
                "low": stratified.low,
                "high": stratified.high,
                "overlap_a": both / a if a else float("nan"),
                "overlap_b": both / b if b else float("nan"),
                "chance_a": q,
                "chance_b": p,
            }


def consensus_table(
    histogram: Counted, numel: Counted, changed: Counted, groups: Sequence[Group], rule: str = "relative"
) -> pd.DataFrame:
    """Share of the coordinates that m = 0..N models change, beside that of independent masks of the models' densities.

    Args:
        histogram: (T, N+1), how many entries of each tensor are changed in exactly m models.
        numel, changed: (T,) and (T, N), sizes and counts of the same masks.

    Returns columns scope, layer, module, tensor, changed_in (m), share, chance (Poisson binomial of the densities in the group),
    rule; groups without entries are left out.

    Raises InputError when the histogram does not add up to the sizes and counts.
    """
    t, n = changed.shape
    fits = histogram.shape == (t, n + 1) and np.array_equal(histogram.sum(axis=1), numel)
    if not fits or not np.array_equal(histogram @ np.arange(n + 1), changed.sum(axis=1)):
        raise InputError(
            got=f"a histogram of shape {histogram.shape} for counts of shape {changed.shape}, which do not add up",
            expected="(T, N+1) entries by the number of models that change them, summing to each tensor's size",
            remedy="count the histogram over the same masks",
        )
    rows = []
    for group in groups:
        members = list(group.members)
        size = int(numel[members].sum())
        if not size:
            continue
        shares: Array = histogram[members].sum(axis=0) / size
        chances = consensus_chance((changed[members].sum(axis=0) / size).tolist())
        for m, (share, chance) in enumerate(zip(shares.tolist(), chances.tolist(), strict=True)):
            rows.append(group.labels | {"changed_in": m, "share": share, "chance": chance, "rule": rule})
    return pd.DataFrame(rows, columns=[*_SCOPE, "changed_in", "share", "chance", "rule"])
