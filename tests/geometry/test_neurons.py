"""Most-changed units: sets by hand, planted overlaps, and the coverage of the interval for random changes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from interference.errors import InputError
from interference.geometry.neurons import neuron_overlap, top_set


def test_rows_by_hand() -> None:
    """Two layers of four channels and two heads each; the top half."""
    changes = np.array([[9, 8, 1, 2, 5, 4, 3, 0.5, 1, 2, 3, 4], [9, 1, 8, 2, 0.5, 3, 4, 5, 4, 3, 2, 1]], dtype=float)
    kinds, layers = ["channel"] * 8 + ["head"] * 4, [0] * 4 + [1] * 4 + [0, 0, 1, 1]
    table = neuron_overlap(["x", "y"], changes, kinds, layers, tops=[0.5])
    assert list(table.columns) == [*"ab", "kind", "top", "scope", "layer", "count", "jaccard", "chance", "low", "high"]
    assert table[["a", "b"]].drop_duplicates().to_numpy().tolist() == [["x", "y"]]
    found = {(r.kind, r.scope, r.layer): (r.count, r.jaccard) for r in table.itertuples(index=False)}
    assert found == {
        ("channel", "model", -1): (8, 1 / 7),  # {0, 1, 4, 5} and {0, 2, 7, 6}
        ("channel", "layer", 0): (4, 1 / 3),
        ("channel", "layer", 1): (4, 0.0),
        ("head", "model", -1): (4, 0.0),
        ("head", "layer", 0): (2, 0.0),
        ("head", "layer", 1): (2, 0.0),
    }
    np.testing.assert_allclose(table["chance"], 1 / 3, rtol=1e-12)


def test_planted_overlap_and_chance() -> None:
    rng = np.random.default_rng(0)
    changes = rng.random((3, 1000))
    changes[:2, :60] += 10  # sixty common of the top hundred
    changes[0, 100:140] += 5
    changes[1, 200:240] += 5
    table = neuron_overlap(["a", "b", "c"], changes, ["channel"] * 1000, [0] * 1000, tops=[0.1])
    row = table[(table.a == "a") & (table.b == "b") & (table.scope == "model")].iloc[0]
    assert row.jaccard == 60 / 140
    assert row.chance == pytest.approx(0.1 / 1.9, abs=1e-12)
    peer = stats.hypergeom(1000, 100, 100)
    assert (row.low, row.high) == tuple(x / (200 - x) for x in peer.ppf([0.05, 0.95]))
    assert row.jaccard > row.high
    assert list(zip(table.a, table.b, strict=True))[:3] == [("a", "b"), ("a", "c"), ("b", "c")]


def test_interval_covers_random_changes_at_its_rate() -> None:
    repeats, units, top = 400, 200, 0.1
    changes = np.random.default_rng(1).random((2, repeats * units))
    table = neuron_overlap("ab", changes, ["channel"] * changes.shape[1], np.arange(repeats).repeat(units), tops=[top])
    layers = table[table.scope == "layer"]
    assert len(layers) == repeats
    law = stats.hypergeom(units, 20, 20)
    exact = law.cdf(law.ppf(0.95)) - law.cdf(law.ppf(0.05) - 1)
    assert exact >= 0.90
    rate = ((layers.low <= layers.jaccard) & (layers.jaccard <= layers.high)).mean()
    assert abs(rate - exact) <= 3 * (exact * (1 - exact) / repeats) ** 0.5


def test_units_that_did_not_change_are_never_on_top() -> None:
    assert top_set(np.array([0.0, 0.0, 2.0, 0.0]), 0.75).tolist() == [False, False, True, False]
    assert top_set(np.array([1.0, 2.0, 3.0]), 0.01).tolist() == [False, False, True]
    changes = np.zeros((3, 10))
    changes[0, 9], changes[1, 9], changes[1, 3] = 1.0, 1.0, 2.0
    table = neuron_overlap("abc", changes, ["head"] * 10, [0] * 10, tops=[0.5])
    model = table[table.scope == "model"].set_index(["a", "b"])
    assert model.loc[("a", "b"), "jaccard"] == 0.5
    assert model.loc[("a", "b"), "chance"] == pytest.approx(0.2 / 2.8)  # sets of one and two of ten
    assert model.loc[("a", "c"), "jaccard"] == 0
    nothing = neuron_overlap("ab", np.zeros((2, 4)), ["head"] * 4, [0] * 4)
    assert nothing[["jaccard", "chance", "low", "high"]].isna().all(axis=None)


@pytest.mark.parametrize(
    ("changes", "layers", "tops"),
    [
        (np.ones((2, 3)), [0] * 4, [0.1]),
        (np.ones((3, 4)), [0] * 4, [0.1]),
        (-np.ones((2, 4)), [0] * 4, [0.1]),
        (np.full((2, 4), np.nan), [0] * 4, [0.1]),
        (np.ones((2, 4)), [0] * 4, [10]),
        (np.ones((2, 4)), [0] * 3, [0.1]),
    ],
)
def test_bad_input(changes: np.ndarray, layers: list[int], tops: list[float]) -> None:
    with pytest.raises(InputError):
        neuron_overlap(["a", "b"], changes, ["head"] * 4, layers, tops)
