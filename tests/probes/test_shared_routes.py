"""Updates on shared routes: against masks of the anatomy, with planted agreement, and within chance at its rate."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from tiny import qwen3
from torch import Tensor

from interference import anatomy as anatomies
from interference.anatomy import Anatomy
from interference.errors import InputError
from interference.model import Model, prepare
from interference.probes.routes import Routes
from interference.probes.shared_routes import update_on_routes
from interference.tree import LowRank
from interference.update import Update

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def model() -> Model:
    return prepare(qwen3(0, num_attention_heads=4, num_key_value_heads=2))


@pytest.fixture(scope="module")
def anatomy(model: Model) -> Anatomy:
    return anatomies.read(model)


def noise(model: Model, seed: int) -> Tensors:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=g) for n, p in model.parameters.items()}


def routes(active: dict[tuple[str, int], set[int]], rng: np.random.Generator | None = None) -> Routes:
    """Scores of a model of two layers, 32 channels and 4 heads; the active units' are largest. With rng they are random."""
    parts = []
    for kind, units in (("channel", 32), ("head", 4)):
        for layer in (0, 1):
            on = np.isin(np.arange(units), list(active.get((kind, layer), ())))
            score = 1.0 + on if rng is None else rng.random(units)
            parts.append(pd.DataFrame({"kind": kind, "layer": layer, "unit": np.arange(units), "score": score}))
    table = pd.concat(parts, ignore_index=True)
    return Routes("x", "magnitude", table.assign(first_half=table["score"], second_half=table["score"]), 2, 9)


def flat(update: Tensors, chosen: dict[str, Tensor]) -> NDArray[np.float64]:
    return torch.cat([update[n][mask] for n, mask in chosen.items()]).double().numpy()


def either(masks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for one in masks:
        for name, mask in one.items():
            out[name] = out[name] | mask if name in out else mask.clone()
    return out


def coordinates(anatomy: Anatomy, kind: str, layer: int, units: set[int]) -> dict[str, Tensor]:
    if kind == "channel":
        return either([anatomy.masks(layer=layer, channel=c) for c in units])
    queries = [anatomy.masks(layer=layer, kind="query", head=h) for h in units]
    return either([*queries, *[anatomy.masks(layer=layer, kind="key_value", head=h // 2) for h in units]])


def test_restricted_cosines_are_those_of_masked_updates(model: Model, anatomy: Anatomy) -> None:
    a, b = noise(model, 1), noise(model, 2)
    b["model.layers.0.mlp.up_proj.weight"][:, ::2] = 0.0
    del b["model.layers.1.self_attn.k_proj.weight"]
    active = {
        "a": {("channel", 0): {0, 5, 6, 9, 30, 31, 2, 3}, ("channel", 1): set(range(8)), ("head", 0): {0, 1}},
        "b": {("channel", 0): {5, 6, 7, 8, 11, 12, 31, 13}, ("channel", 1): set(range(8, 16)), ("head", 0): {0, 3}},
    }
    for name, heads in (("a", {2, 3}), ("b", {2, 3})):
        active[name]["head", 1] = heads
    found = {n: routes(active[n]) for n in "ab"}
    rows = {}
    for kind, top in (("channel", 0.25), ("head", 0.5)):
        table = update_on_routes({"a": a, "b": b}, found, anatomy, top, draws=50)
        rows[kind] = table[table.kind == kind].set_index("layer")
        whole = table[table.kind == "all"].iloc[0]
    b["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(16, 16)
    expected = {
        ("channel", 0): {5, 6, 31},
        ("channel", 1): set(),
        ("head", 0): {0},
        ("head", 1): {2, 3},  # one group, counted once
    }
    for (kind, layer), units in expected.items():
        row = rows[kind].loc[layer]
        assert row["count"] == len(units)
        if not units:
            assert row[["cosine", "cosine_chance_low", "sign_agreement", "cosine_chance"]].isna().all()
            continue
        check(row, a, b, coordinates(anatomy, kind, layer, units), "")
        check(row, a, b, coordinates(anatomy, kind, layer, set(range(row["units"]))), "_whole")
    for kind in ("channel", "head"):
        parts = [
            coordinates(anatomy, kind, layer, units) for (k, layer), units in expected.items() if k == kind and units
        ]
        check(rows[kind].loc[-1], a, b, either(parts), "")
        assert rows[kind].loc[-1, "count"] == sum(len(u) for (k, _), u in expected.items() if k == kind)
    assert whole["cosine"] == pytest.approx(Update.from_tensors(a).cosine(Update.from_tensors(b)), rel=1e-6)


def check(row: pd.Series, a: Tensors, b: Tensors, chosen: dict[str, Tensor], suffix: str) -> None:
    x, y = flat(a, chosen), flat(b, chosen)
    assert row[f"cosine{suffix}"] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-6)
    both = (x != 0) & (y != 0)
    sign = "sign_agreement" if not suffix else f"sign{suffix}"
    assert row[sign] == pytest.approx((np.sign(x) == np.sign(y))[both].mean(), rel=1e-9)


def test_planted_agreement_on_shared_routes_is_beyond_chance(model: Model, anatomy: Anatomy) -> None:
    """The same on what is active for both, independent elsewhere: small as a whole, one on the shared routes."""
    active = {("channel", 0): {3, 9, 27}, ("channel", 1): {0, 1, 2}, ("head", 0): {1}, ("head", 1): {2}}
    shared = either([coordinates(anatomy, *place, units) for place, units in active.items()])
    a, b = noise(model, 1), noise(model, 2)
    for name, mask in shared.items():
        b[name] = torch.where(mask, 0.5 * a[name], b[name])
    found = {n: routes(active) for n in "ab"}
    for kind, top in (("channel", 3 / 32), ("head", 1 / 4)):
        table = update_on_routes({"a": a, "b": b}, found, anatomy, top)
        for row in table[table.kind == kind].itertuples():
            assert row.cosine == pytest.approx(1.0)
            assert row.sign_agreement == 1.0
            assert row.cosine_whole < 0.6
            if row.layer == -1 and kind == "channel":
                assert row.cosine > row.cosine_chance_high
                assert row.sign_agreement > row.sign_chance_high
                assert row.cosine_chance_low < row.cosine_chance < row.cosine_chance_high


def test_random_routes_lie_within_chance_at_its_rate(model: Model, anatomy: Anatomy) -> None:
    a, b = noise(model, 3), noise(model, 4)
    b = {n: x + 0.3 * a[n] for n, x in b.items()}
    inside = []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        found = {n: routes({}, rng) for n in "ab"}
        table = update_on_routes({"a": a, "b": b}, found, anatomy, 0.5, draws=100, seed=1000 + seed)
        row = table[(table.kind == "channel") & (table.layer == -1)].iloc[0]
        inside.append(row.cosine_chance_low <= row.cosine <= row.cosine_chance_high)
    assert abs(np.mean(inside) - 0.9) < 3 * (0.9 * 0.1 / 150) ** 0.5


def test_factors_and_lazy_updates_are_what_their_matrices_are(model: Model, anatomy: Anatomy) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    g = torch.Generator().manual_seed(5)
    factors = LowRank(torch.randn(32, 2, generator=g), torch.randn(2, 16, generator=g))
    found = {n: routes({("channel", 0): {1, 2, 3}}) for n in "ab"}
    other = noise(model, 6)
    tables = [
        update_on_routes({"a": u, "b": other}, found, anatomy, 0.1, draws=20)
        for u in ({name: factors}, Update.from_tensors({name: factors.dense()}))
    ]
    pd.testing.assert_frame_equal(*tables)


def test_bad_input(model: Model, anatomy: Anatomy) -> None:
    a, found = noise(model, 1), {n: routes({}) for n in "ab"}
    for updates, given, top in (({"a": a}, found, 0.1), ({"a": a, "c": a}, found, 0.1), ({"a": a, "b": a}, found, 0.0)):
        with pytest.raises(InputError, match="at least two updates"):
            update_on_routes(updates, given, anatomy, top)
    for wrong in ({"strange": torch.ones(2)}, {"model.norm.weight": torch.ones(3)}, {}):
        with pytest.raises(InputError, match="model's parameters"):
            update_on_routes({"a": a, "b": wrong}, found, anatomy)
    narrow = anatomies.read(prepare(qwen3(0, intermediate_size=24)))
    b = noise(prepare(qwen3(0, intermediate_size=24)), 1)
    with pytest.raises(InputError, match="routes and anatomy of one model"):
        update_on_routes({"a": b, "b": b}, found, narrow)
