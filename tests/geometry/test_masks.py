"""Tables of masks from counts, against the masks themselves."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest

from interference.errors import InputError
from interference.geometry.masks import Counts, consensus_table, groupings, mask_table

MODELS, RULES = ["x", "y", "z"], ["relative", "absolute"]
NAMES, LAYERS, FAMILIES = ["emb", "q0", "q1", "up1"], [-1, 0, 1, 1], ["embedding", "q", "q", "up"]
SIZES = [500, 200, 300, 1000]
GROUPS = groupings(NAMES, LAYERS, FAMILIES)


def random_masks(seed: int, densities: np.ndarray) -> list[np.ndarray]:
    """(R, N, n) masks of each tensor; densities (T, R, N)."""
    rng = np.random.default_rng(seed)
    return [rng.random((2, 3, n)) < p[..., None] for n, p in zip(SIZES, densities, strict=True)]


def counted(masks: list[np.ndarray]) -> Counts:
    changed = np.stack([m.sum(axis=-1) for m in masks])
    both = np.stack([np.einsum("rin,rjn->rij", m.astype(int), m.astype(int)) for m in masks])
    return Counts(np.array(SIZES), changed, both)


@pytest.fixture
def masks() -> list[np.ndarray]:
    return random_masks(0, np.random.default_rng(1).uniform(0.05, 0.6, (4, 2, 3)))


def test_rows_are_those_of_the_masks(masks: list[np.ndarray]) -> None:
    table = mask_table(MODELS, RULES, counted(masks), GROUPS)
    assert len(table) == len(GROUPS) * 2 * 3
    assert dict(Counter(table.scope)) == {"model": 6, "layer": 18, "module": 18, "tensor": 24}
    for row in table.itertuples(index=False):
        chosen = [
            m[RULES.index(row.rule)]
            for m, name, layer, module in zip(masks, NAMES, LAYERS, FAMILIES, strict=True)
            if {
                "model": True,
                "layer": layer == row.layer,
                "module": module == row.module,
                "tensor": name == row.tensor,
            }[row.scope]
        ]
        a, b = (np.concatenate([m[MODELS.index(name)] for m in chosen]) for name in (row.a, row.b))
        assert row.numel == len(a)
        np.testing.assert_allclose(
            [row.density_a, row.density_b, row.jaccard, row.overlap_a, row.overlap_b, row.chance_a, row.chance_b],
            [a.mean(), b.mean(), (a & b).sum() / (a | b).sum(), b[a].mean(), a[b].mean(), b.mean(), a.mean()],
            rtol=1e-12,
        )
        p, q = a.mean(), b.mean()
        assert row.chance == pytest.approx(p * q / (p + q - p * q), rel=1e-12)
        if row.scope == "tensor":
            assert row.chance_stratified == pytest.approx(row.chance, rel=1e-12)
            assert row.layer == LAYERS[NAMES.index(row.tensor)]
        assert row.low <= row.chance_stratified <= row.high


def test_stratified_chance_is_that_of_permutations_within_tensors() -> None:
    densities = np.repeat(np.array([0.9, 0.02, 0.5, 0.01])[:, None, None], 6, axis=1).reshape(4, 2, 3)
    masks = random_masks(2, densities)
    table = mask_table(MODELS, RULES, counted(masks), GROUPS)
    row = table[(table.scope == "model") & (table.rule == "relative") & (table.a == "x") & (table.b == "z")].iloc[0]
    rng, drawn = np.random.default_rng(3), []
    for _ in range(2000):
        a = np.concatenate([m[0, 0] for m in masks])
        b = np.concatenate([rng.permutation(m[0, 2]) for m in masks])
        drawn.append((a & b).sum() / (a | b).sum())
    assert row.chance_stratified == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / 2000**0.5 + 1e-4)
    step = 1 / 500
    assert row.low == pytest.approx(np.quantile(drawn, 0.05), abs=step)
    assert row.high == pytest.approx(np.quantile(drawn, 0.95), abs=step)
    assert row.low <= row.jaccard <= row.high
    assert row.chance < 0.6 * row.low  # the plain chance would call independent masks an overlap


def test_planted_overlap_is_above_chance_and_empty_masks_are_nan() -> None:
    masks = random_masks(4, np.full((4, 2, 3), 0.3))
    for m in masks:
        m[0, 1] = m[0, 0]  # under the first rule y changed where x did
        m[1, 2] = False  # under the second z changed nothing
    table = mask_table(MODELS, RULES, counted(masks), GROUPS).query("scope == 'model'").set_index(["rule", "a", "b"])
    same, none = table.loc[("relative", "x", "y")], table.loc[("absolute", "x", "z")]
    assert (same.jaccard, same.overlap_a, same.overlap_b) == (1, 1, 1)
    assert same.high < 0.3
    assert (none.jaccard, none.overlap_a, none.chance, none.low, none.high) == (0, 0, 0, 0, 0)
    assert np.isnan(none.overlap_b)


def test_consensus_beside_independent_masks(masks: list[np.ndarray]) -> None:
    relative = [m[0] for m in masks]
    histogram = np.stack([np.bincount(m.sum(axis=0), minlength=4) for m in relative])
    changed = np.stack([m.sum(axis=1) for m in relative])
    table = consensus_table(histogram, np.array(SIZES), changed, GROUPS)
    assert list(table.columns) == ["scope", "layer", "module", "tensor", "changed_in", "share", "chance", "rule"]
    model = table[table.scope == "model"]
    whole = np.concatenate(relative, axis=1)
    np.testing.assert_allclose(model.share, [(whole.sum(axis=0) == m).mean() for m in range(4)], rtol=1e-12)
    p, q, r = whole.mean(axis=1)
    expected = [(1 - p) * (1 - q) * (1 - r), None, None, p * q * r]
    assert model.chance.iloc[0] == pytest.approx(expected[0], rel=1e-12)
    assert model.chance.iloc[3] == pytest.approx(expected[3], rel=1e-12)
    assert (model.chance @ model.changed_in) == pytest.approx(p + q + r, rel=1e-12)
    for _, rows in table.groupby(["scope", "layer", "module", "tensor"]):
        np.testing.assert_allclose([rows.share.sum(), rows.chance.sum()], 1, rtol=1e-12)
        assert rows.changed_in.tolist() == [0, 1, 2, 3]
    with pytest.raises(InputError, match="add up"):
        consensus_table(histogram[:, ::-1], np.array(SIZES), changed, GROUPS)


def test_one_model_has_no_pairs_but_all_columns(masks: list[np.ndarray]) -> None:
    pairs, many = counted(masks), mask_table(MODELS, RULES, counted(masks), GROUPS)
    alone = mask_table(["x"], RULES, Counts(pairs.numel, pairs.changed[..., :1], pairs.both[..., :1, :1]), GROUPS)
    assert len(alone) == 0
    assert list(alone.columns) == list(many.columns)
    assert not many.isna().any(axis=None)


def test_counts_that_no_masks_have_are_refused(masks: list[np.ndarray]) -> None:
    good = counted(masks)
    for change in (
        {"numel": good.numel[:2]},
        {"numel": good.numel // 100},
        {"both": good.both + 1},
        {"both": np.where(np.eye(3, dtype=bool), good.both, 10_000)},
        {"changed": good.changed[0]},
    ):
        with pytest.raises(InputError, match="fit together"):
            dataclasses.replace(good, **change)
