"""Active routes: wired channels and heads are found exactly, scores are those of plain passes, and chance is at its rate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from tiny import MOE, OLD, SIZES, qwen3
from torch import Tensor, nn
from toy import ToyTransformer
from transformers import AutoConfig, AutoModelForCausalLM

from interference import anatomy as anatomies
from interference.anatomy import Anatomy
from interference.domain import Domain, Sequence
from interference.errors import InputError
from interference.model import Model, prepare
from interference.probes.halves import prompt_halves
from interference.probes.routes import HALVES, Routes, active_routes, route_overlap

Array = NDArray[np.float64]
CHANNELS = {"a": [{1, 5, 9}, {0, 30, 31}], "b": [{9, 20, 31}, {2, 3, 4}]}  # by layer; channel 9 of layer 0 is shared
HEADS = {"a": [0, 1], "b": [1, 0]}
TOKENS = {"a": (3, 13), "b": (13, 23)}


def rollouts(name: str, low: int, high: int, prompts: int = 12, responses: int = 3, seed: int = 0) -> Domain:
    """Ragged sequences of tokens from low to high - 1, one of them twice."""
    rng = np.random.default_rng(seed)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(rng.integers(low, high, rng.integers(1, most)).tolist())

    out = []
    for p in range(prompts):
        prompt = tokens(6)
        out += [Sequence(prompt, tokens(7), f"{name}{p}") for _ in range(responses + p % 2)]
    return Domain(name, (*out, out[-2]))


def wired() -> Model:
    """A's tokens lie along the first dimension of the stream and B's along the second, and channels and heads read one of them;
    all write where nobody reads."""
    module = qwen3(0, num_key_value_heads=2).double()
    g = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    with torch.no_grad():
        embedding = module.model.embed_tokens.weight
        embedding.zero_()
        for dimension, name in enumerate("ab"):
            embedding[slice(*TOKENS[name]), dimension] = 2.0
        embedding[:, 2:6] = 0.5 * random(27, 4)
        for i, layer in enumerate(module.model.layers):
            mlp, attention = layer.mlp, layer.self_attn
            for rows in (mlp.gate_proj.weight, mlp.up_proj.weight):
                rows.zero_()
                rows[:, 2:6] = 0.02 * random(32, 4)
                for dimension, name in enumerate("ab"):
                    for c in CHANNELS[name][i]:
                        rows[c, 2:6] = 0.0
                        rows[c, dimension] = 3.0
            attention.v_proj.weight.zero_()
            for dimension, name in enumerate("ab"):
                h = HEADS[name][i]
                attention.v_proj.weight[8 * h : 8 * h + 8, dimension] = random(8)
            for out in (mlp.down_proj.weight, attention.o_proj.weight):
                out[:8] = 0.0
    return prepare(module)


def anatomy() -> Anatomy:
    """Of the wired model: its architecture with other weights, since channels wired to see nothing do not answer the probe."""
    return anatomies.read(prepare(qwen3(0, num_key_value_heads=2)))


def top(routes: Routes, kind: str, layer: int, count: int) -> set[int]:
    scores = routes.scores[(routes.scores.kind == kind) & (routes.scores.layer == layer)]
    return set(scores.nlargest(count, "score")["unit"])


def test_wired_channels_and_heads_are_the_top_ones() -> None:
    model = wired()
    routes = {n: active_routes(model, rollouts(n, *TOKENS[n]), anatomy=anatomy()) for n in "ab"}
    for name, found in routes.items():
        other = "ab".replace(name, "")
        for layer in (0, 1):
            assert top(found, "channel", layer, 3) == CHANNELS[name][layer]
            heads = found.scores[(found.scores.kind == "head") & (found.scores.layer == layer)].set_index("unit")
            assert heads.loc[HEADS[name][layer], "score"] > 0.1
            assert heads.loc[HEADS[other][layer], "score"] < 1e-12
    table = route_overlap(routes, tops=[0.1])
    layers = table[(table.kind == "channel") & (table.scope == "layer")].set_index(["a", "b", "layer"])
    assert layers.loc[("a", "b", 0), "jaccard"] == 1 / 5
    assert layers.loc[("a", "b", 1), "jaccard"] == 0
    np.testing.assert_allclose(layers["chance"], (3 / 32) / (2 - 3 / 32))
    own = table[table.a == table.b]
    assert (own[own.scope == "layer"]["jaccard"] == 1).all()
    heads = table[(table.kind == "head") & (table.scope == "layer") & (table.a != table.b)]
    assert (heads["jaccard"] == 0).all()


@pytest.mark.parametrize("name", ["a", "b"])
def test_gradients_find_the_wired_channels(name: str) -> None:
    model = wired()
    found = active_routes(model, rollouts(name, *TOKENS[name]), variant="gradient", anatomy=anatomy())
    for layer in (0, 1):
        assert top(found, "channel", layer, 3) == CHANNELS[name][layer]


def architecture(name: str) -> tuple[Model, str, str, bool]:
    """A float64 model, the closing projections below its layers, and whether their weights are (in, out)."""
    if name == "toy":
        return prepare(ToyTransformer.seeded(0)), "down", "attention.o", False
    if name == "qwen3":
        return prepare(qwen3(0).double()), "mlp.down_proj", "self_attn.o_proj", False
    config = AutoConfig.for_model("gpt2", **{**SIZES, **OLD})
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
    return prepare(module), "mlp.c_proj", "attn.c_proj", True


def blocks(model: Model) -> nn.ModuleList:
    return next(m for m in model.module.modules() if isinstance(m, nn.ModuleList))


def entering(module: nn.Module, model: Model, s: Sequence) -> Tensor:
    """A module's inputs at the positions that predict the response, (T, width), from a pass over this sequence alone."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, x: seen.append(x[0].clone()))
    model.forward(torch.tensor([s.prompt + s.response]))
    hook.remove()
    first = len(s.prompt) - 1
    return seen[0][0, first : first + len(s.response)]


def mean_over_prompts(domain: Domain, per_token: dict[int, Array]) -> Array:
    """The mean over prompts of the mean over all of a prompt's response tokens; per_token by place of the sequence."""
    means = []
    for prompt in dict.fromkeys(domain.prompt_ids):
        mine = [per_token[i] for i, s in enumerate(domain.sequences) if s.prompt_id == prompt]
        means.append(np.concatenate(mine).mean(0))
    return np.asarray(np.mean(means, axis=0))


@pytest.mark.parametrize("name", ["toy", "qwen3", "gpt2"])
def test_scores_are_those_of_plain_passes(name: str) -> None:
    model, down, o, transposed = architecture(name)
    domain = rollouts("a", 3, 23)
    routes = active_routes(model, domain, batch_tokens=40)
    assert not routes.notes
    assert (routes.prompts, routes.tokens) == (12, sum(len(s.response) for s in domain.sequences))
    for layer in (0, 1):
        for kind, path in (("channel", down), ("head", o)):
            module = blocks(model)[layer].get_submodule(path)
            weight = module.weight.detach()
            weight = weight.t() if transposed else weight
            expected = {}
            for i, s in enumerate(domain.sequences):
                a = entering(module, model, s)
                units = range(a.shape[1]) if kind == "channel" else range(model.module.config.num_attention_heads)
                size = a.shape[1] // len(units)
                parts = [(weight[:, u * size : (u + 1) * size] @ a[:, u * size : (u + 1) * size].t()) for u in units]
                expected[i] = torch.stack([p.norm(dim=0) for p in parts], dim=1).numpy()
            found = routes.scores[(routes.scores.kind == kind) & (routes.scores.layer == layer)]
            assert found["unit"].tolist() == list(units)
            np.testing.assert_allclose(found["score"], mean_over_prompts(domain, expected), rtol=1e-6, atol=1e-12)
    counts = [len(set(h.prompt_ids)) for h in prompt_halves(domain, 0)]
    whole = routes.scores[HALVES].to_numpy() @ np.array(counts) / 12
    np.testing.assert_allclose(routes.scores["score"], whole, rtol=1e-12)


def test_halves_are_the_scores_of_half_of_the_prompts() -> None:
    model, domain = prepare(qwen3(0).double()), rollouts("a", 3, 23, prompts=7)
    whole = active_routes(model, domain, seed=3)
    halves = prompt_halves(domain, 3)
    assert [len(set(h.prompt_ids)) for h in halves] == [4, 3]
    assert not set(halves[0].prompt_ids) & set(halves[1].prompt_ids)
    for column, half in zip(HALVES, halves, strict=True):
        np.testing.assert_allclose(whole.scores[column], active_routes(model, half).scores["score"], rtol=1e-9)


@pytest.mark.parametrize("name", ["toy", "gpt2"])  # Qwen3's norms round to float32, whatever the model's dtype
def test_gradient_scores_against_finite_differences(name: str) -> None:
    """|a dS/da| is the slope of the summed log-likelihood as a unit is scaled at one token."""
    model, down, o, transposed = architecture(name)
    domain = Domain("a", (Sequence((3, 4), (5, 6, 7), "x"), Sequence((8,), (9, 10), "y")))
    routes = active_routes(model, domain, variant="gradient", seed=0)
    halves = prompt_halves(domain, 0)
    for kind, path, layer, units in (("channel", down, 0, [0, 7]), ("channel", down, 1, [3]), ("head", o, 0, [0, 1])):
        module = blocks(model)[layer].get_submodule(path)
        scores = routes.scores[(routes.scores.kind == kind) & (routes.scores.layer == layer)]
        for unit in units:
            size = 1 if kind == "channel" else module.weight.shape[0 if transposed else 1] // len(scores)
            for column, half in zip(HALVES, halves, strict=True):
                (s,) = half.sequences
                place = slice(unit * size, (unit + 1) * size)
                slopes = [slope(model, module, place, s, len(s.prompt) - 1 + t) for t in range(len(s.response))]
                expected = np.abs(slopes).mean()
                assert scores[column].iloc[unit] == pytest.approx(expected, rel=1e-6, abs=1e-9)


def slope(model: Model, module: nn.Module, place: slice, s: Sequence, position: int, step: float = 1e-4) -> float:
    values = []
    for sign in (1.0, -1.0):

        def scaled(_: Any, x: tuple[Tensor], sign: float = sign) -> tuple[Tensor]:
            y = x[0].clone()
            y[:, position, place] *= 1 + sign * step
            return (y,)

        hook = module.register_forward_pre_hook(scaled)
        logp = model.forward(torch.tensor([s.prompt + s.response])).log_softmax(-1)[0]
        hook.remove()
        values.append(sum(float(logp[len(s.prompt) - 1 + t, y]) for t, y in enumerate(s.response)))
    return (values[0] - values[1]) / (2 * step)


def test_the_gradient_leaves_the_model_as_it_was() -> None:
    model = prepare(qwen3(0))
    before = model.checksum()
    first = active_routes(model, rollouts("a", 3, 23), variant="gradient")
    second = active_routes(model, rollouts("a", 3, 23), variant="gradient")
    assert model.checksum() == before
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters.values())
    assert not any(m._forward_pre_hooks for m in model.module.modules())
    pd.testing.assert_frame_equal(first.scores, second.scores)


def test_two_samples_of_a_domain_share_their_routes() -> None:
    model = prepare(qwen3(0, intermediate_size=64))
    routes = {f"a{i}": active_routes(model, rollouts("a", 3, 9, prompts=400, seed=i)) for i in (0, 1)}
    table = route_overlap(routes, tops=[0.1, 0.2])
    model_rows = table[(table.scope == "model") & (table.kind == "channel")]
    assert (model_rows["jaccard"] > 0.8).all()
    assert (model_rows["jaccard"] > model_rows["chance_high"]).all()


def planted(scores: Array, halves: Array, layers: int) -> Routes:
    """Routes of made-up channel scores (U,), halves (U, 2)."""
    width = len(scores) // layers
    units = {"kind": "channel", "layer": np.arange(layers).repeat(width), "unit": np.tile(np.arange(width), layers)}
    return Routes(
        "x", "magnitude", pd.DataFrame(units | {"score": scores} | dict(zip(HALVES, halves.T, strict=True))), 2, 9
    )


def test_random_scores_overlap_as_chance_says_at_its_rate() -> None:
    layers, width = 400, 200
    rng = np.random.default_rng(0)
    routes = {n: planted(rng.random(layers * width), rng.random((layers * width, 2)), layers) for n in "ab"}
    table = route_overlap(routes, tops=[0.1])
    for pair in ("aa", "ab", "bb"):
        rows = table[(table.a == pair[0]) & (table.b == pair[1]) & (table.scope == "layer")]
        assert len(rows) == layers
        inside = ((rows.chance_low <= rows.jaccard) & (rows.jaccard <= rows.chance_high)).mean()
        assert 0.88 <= inside <= 0.99  # at least 0.90, and more by discreteness
        np.testing.assert_allclose(rows["chance"], 0.1 / 1.9)


def test_layers_that_all_domains_use_most_are_no_overlap_of_the_model() -> None:
    """Sets are formed within layers: independent scores, but of one layer far above the others, stay within chance."""
    layers, width, inside = 10, 40, []
    rng = np.random.default_rng(1)
    scale = np.r_[100.0, np.ones(layers - 1)].repeat(width)
    for _ in range(200):
        halves = np.ones((layers * width, 2))
        routes = {n: planted(scale * rng.random(layers * width), halves, layers) for n in "ab"}
        row = route_overlap(routes, tops=[0.1]).query("scope == 'model' and a != b").iloc[0]
        assert (row["active_a"], row["active_b"], row["share"]) == (40, 40, 0.1)
        inside.append(row["chance_low"] <= row["jaccard"] <= row["chance_high"])
    assert 0.88 <= np.mean(inside) <= 0.99
    # The interval is that of a sum of hypergeometrics: against draws.
    both = rng.hypergeometric(4, 36, 4, (20000, layers)).sum(1)
    ends = [x / (80 - x) for x in np.quantile(both, [0.05, 0.95])]
    assert [row["chance_low"], row["chance_high"]] == pytest.approx(ends)


def test_a_share_of_few_heads_is_whole_heads() -> None:
    scores = np.tile(np.arange(12.0), 2)
    table = route_overlap({n: planted(scores, np.stack([scores] * 2, 1), 2) for n in "ab"}, tops=[0.05, 0.1, 0.25])
    rows = table[(table["scope"] == "model") & (table["a"] != table["b"])]
    assert rows["share"].tolist() == pytest.approx([1 / 12, 1 / 12, 0.25])
    assert rows["active_a"].tolist() == [2, 2, 6]


def test_what_cannot_be_scored_is_said() -> None:
    config = AutoConfig.for_model("qwen3_moe", **{**SIZES, **MOE})
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    module.set_experts_implementation("eager")
    for layer in module.model.layers:
        layer.mlp.experts.has_gate = False  # says that it has no gate, and has no `up_proj` either
    routes = active_routes(prepare(module), rollouts("a", 3, 23))
    assert set(routes.scores["kind"]) == {"head"}
    assert any("experts" in note for note in routes.notes)


def test_a_projection_that_runs_twice_is_left_out() -> None:
    class Twice(ToyTransformer):
        def forward(self, input_ids: Tensor, use_cache: bool = False, **options: object) -> Any:
            self.layers[0].down(torch.zeros(1, 24, dtype=torch.float64))
            return super().forward(input_ids, use_cache, **options)

    torch.manual_seed(0)
    model = prepare(Twice().double())
    for variant in ("magnitude", "gradient"):
        routes = active_routes(model, rollouts("a", 3, 23), variant=variant, anatomy=anatomies.read(model, probe=False))
        assert set(routes.scores[routes.scores.kind == "channel"]["layer"]) == {1}
        assert any("layers.0.down" in note and "once" in note for note in routes.notes)


def test_bad_input() -> None:
    model = prepare(qwen3(0))
    with pytest.raises(InputError, match="did you mean 'gradient'"):
        active_routes(model, rollouts("a", 3, 9), variant="gradients")
    with pytest.raises(InputError, match="single prompt"):
        active_routes(model, rollouts("a", 3, 9, prompts=1))
    with pytest.raises(InputError, match="vocabulary"):
        active_routes(model, rollouts("a", 3, 90))
    with pytest.raises(InputError, match="no routes"):
        route_overlap({})
    one = active_routes(model, rollouts("a", 3, 9))
    with pytest.raises(InputError, match="one model and variant"):
        route_overlap({"a": one, "b": active_routes(model, rollouts("b", 3, 9), variant="gradient")})
    with pytest.raises(InputError, match="one model and variant"):
        route_overlap({"a": one, "b": active_routes(prepare(ToyTransformer.seeded(0)), rollouts("b", 3, 9))})
    with pytest.raises(InputError, match="tops"):
        route_overlap({"a": one}, tops=[2.0])
