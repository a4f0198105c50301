"""Channels of experts: scores are those of a dense mixture written out by hand, and what cannot be known is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_routes import entering, mean_over_prompts, rollouts
from tiny import MOE, SIZES
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from interference import anatomy as anatomies
from interference.domain import Domain, Sequence
from interference.model import Model, prepare
from interference.probes import experts as experts_module
from interference.probes.experts import KIND, Experts, Routed
from interference.probes.routes import HALVES, active_routes, route_overlap
from interference.probes.shared_routes import update_on_routes

Array = NDArray[np.float64]
LAYOUTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**SIZES, **MOE},
    "mixtral": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        **SIZES,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention"] * 2,
    },
}


def mixture(name: str, implementation: str = "eager") -> Model:
    config = AutoConfig.for_model(name, **LAYOUTS[name])
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, dtype=torch.float64))
    module.set_experts_implementation(implementation)
    return prepare(module)


def experts(model: Model, layer: int) -> Any:
    return model.module.get_submodule(f"model.layers.{layer}.mlp.experts")


def dense_gates(model: Model, layer: int, hidden: Tensor) -> Tensor:
    """Gates (T, experts), zero where a token is not sent: the two largest of the router's probabilities, made to sum to one
    (Mixtral, gpt-oss) or not (Qwen3-MoE without norm_topk_prob)."""
    block = model.module.get_submodule(f"model.layers.{layer}.mlp")
    router = block.gate if hasattr(block, "gate") else block.router
    logits = hidden @ router.weight.detach().t()
    if getattr(router, "bias", None) is not None:
        logits = logits + router.bias.detach()
    probabilities = logits.float().softmax(-1).double()
    kept = torch.where(probabilities >= probabilities.topk(2, dim=-1).values[:, -1:], probabilities, 0.0)
    whole = getattr(router, "norm_topk_prob", True)
    return kept / kept.sum(-1, keepdim=True) if whole else kept


def dense_channels(model: Model, layer: int, hidden: Tensor) -> Tensor:
    """a (T, experts, size) of every expert at every token, sent there or not."""
    own = experts(model, layer)
    if type(own).__name__ == "GptOssExperts":
        opened = torch.einsum("td,edf->tef", hidden, own.gate_up_proj) + own.gate_up_proj_bias
        gate, up = opened[..., ::2].clamp(max=7.0), opened[..., 1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    opened = torch.einsum("td,efd->tef", hidden, own.gate_up_proj)
    gate, up = opened.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def down(model: Model, layer: int) -> Tensor:
    """(experts, width, size)."""
    own = experts(model, layer)
    weight: Tensor = own.down_proj.detach()
    return weight.transpose(1, 2) if type(own).__name__ == "GptOssExperts" else weight


def scores_by_hand(model: Model, domain: Domain, layer: int) -> Array:
    """(experts * size,): every expert at every token, most of them times a gate of zero."""
    block = model.module.get_submodule(f"model.layers.{layer}.mlp")
    found = {}
    for i, s in enumerate(domain.sequences):
        hidden = entering(block, model, s)
        gates = dense_gates(model, layer, hidden)
        assert ((gates > 0).sum(-1) == 2).all()
        norms = down(model, layer).norm(dim=1)
        found[i] = (gates[..., None] * dense_channels(model, layer, hidden).abs() * norms).flatten(1).numpy()
    return mean_over_prompts(domain, found)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_scores_are_those_of_a_dense_mixture(name: str, implementation: str) -> None:
    model, domain = mixture(name, implementation), rollouts("a", 3, 23, prompts=5)
    found = active_routes(model, domain, batch_tokens=40)
    assert not [note for note in found.notes if "experts" in note]
    for layer in (0, 1):
        rows = found.scores[(found.scores["kind"] == KIND) & (found.scores["layer"] == layer)]
        expected = scores_by_hand(model, domain, layer)
        assert rows["unit"].tolist() == list(range(len(expected)))
        # The router rounds its probabilities to float32.
        np.testing.assert_allclose(rows["score"], expected, rtol=1e-5, atol=1e-9)


def test_the_oracle_sees_a_score_without_its_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    model, domain = mixture("qwen3_moe"), rollouts("a", 3, 23, prompts=5)
    plain = Routed.at
    monkeypatch.setattr(
        Routed,
        "at",
        lambda seen, i: Routed(
            *(getattr(plain(seen, i), n) for n in ("hidden", "index")), torch.ones_like(seen.gates[i])
        ),
    )
    scores = active_routes(model, domain).scores
    found = scores[(scores["kind"] == KIND) & (scores["layer"] == 0)]["score"]
    expected = scores_by_hand(model, domain, 0)
    assert float((found / expected).median()) > 1.5


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_gradient_scores_are_the_slopes_of_scaled_channels(name: str) -> None:
    """|a dS/da| is the slope of S as a channel is scaled at a token, through a mixture written out by hand."""
    model = mixture(name)
    domain = Domain("a", (Sequence((3, 4), (5, 6, 7), "x"), Sequence((8,), (9, 10), "y")))
    found = active_routes(model, domain, variant="gradient", batch_tokens=1)
    assert not found.notes
    slopes: dict[int, dict[int, Array]] = {0: {}, 1: {}}
    for i, s in enumerate(domain.sequences):
        ids = torch.tensor([s.prompt + s.response])
        scales = []
        for layer in (0, 1):
            own = experts(model, layer)
            scales.append(
                torch.ones(ids.shape[1], len(own.down_proj), down(model, layer).shape[2], dtype=torch.float64)
            )
            scales[-1].requires_grad_()
            own.forward = by_hand(model, layer, scales[-1])
        logp = model.module(ids).logits.log_softmax(-1)[0]
        first = len(s.prompt) - 1
        total = -sum(logp[first + t, y] for t, y in enumerate(s.response))
        for layer, slope in enumerate(torch.autograd.grad(total, scales)):
            slopes[layer][i] = slope.abs().flatten(1)[first : first + len(s.response)].numpy()
            del experts(model, layer).forward
    for layer in (0, 1):
        rows = found.scores[(found.scores["kind"] == KIND) & (found.scores["layer"] == layer)]
        np.testing.assert_allclose(rows["score"], mean_over_prompts(domain, slopes[layer]), rtol=1e-4, atol=1e-9)
        assert rows["score"].max() > 1e-3


def by_hand(model: Model, layer: int, scale: Tensor) -> Callable[..., Tensor]:
    """Experts as one dense sum, with every channel scaled at every token."""

    def forward(hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        every = torch.zeros(len(hidden), scale.shape[1], dtype=torch.float64).scatter(1, index, gates.double())
        a = dense_channels(model, layer, hidden) * scale
        given = torch.einsum("tec,edc->ted", a, down(model, layer))
        bias = getattr(experts(model, layer), "down_proj_bias", None)
        return torch.einsum("te,ted->td", every, given if bias is None else given + bias)

    return forward


def test_updates_are_compared_on_the_channels_of_experts() -> None:
    """Two updates that agree on the shared channels alone, against masks of the anatomy."""
    model = mixture("qwen3_moe")
    anatomy = anatomies.read(model)
    routes = {n: active_routes(model, rollouts(n, *t), anatomy=anatomy) for n, t in (("a", (3, 13)), ("b", (8, 18)))}
    g = torch.Generator().manual_seed(0)
    a = {n: torch.randn(p.shape, generator=g, dtype=torch.float64) for n, p in model.parameters.items()}
    b = {n: torch.randn(p.shape, generator=g, dtype=torch.float64) for n, p in model.parameters.items()}
    shared: dict[int, list[int]] = {}
    for layer in (0, 1):
        tops = []
        for r in routes.values():
            rows = r.scores[(r.scores["kind"] == KIND) & (r.scores["layer"] == layer)]
            tops.append(set(rows.nlargest(10, "score")["unit"]))
        shared[layer] = sorted(tops[0] & tops[1])
        assert shared[layer]
        for unit in shared[layer]:
            for name, mask in anatomy.masks(layer=layer, expert=unit // 12, channel=unit % 12).items():
                b[name] = torch.where(mask, a[name], b[name])
    table = (
        update_on_routes({"a": a, "b": b}, routes, anatomy, top=10 / 48, draws=100)
        .query("kind == @KIND")
        .set_index("layer")
    )
    for layer in (0, 1):
        row = table.loc[layer]
        assert (row["units"], row["count"]) == (48, len(shared[layer]))
        assert row["cosine"] == pytest.approx(1.0)
        assert row["sign_agreement"] == 1.0
        assert row["cosine_chance_high"] < 0.9
    assert table.loc[-1, "count"] == sum(map(len, shared.values()))


def test_two_samples_of_a_domain_run_through_the_same_channels() -> None:
    model = mixture("mixtral")
    routes = {f"a{i}": active_routes(model, rollouts("a", 3, 9, prompts=60, seed=i)) for i in (0, 1)}
    rows = route_overlap(routes, tops=[0.1]).query("kind == @KIND and scope == 'model'")
    assert (rows["jaccard"] > rows["chance_high"]).all()


def test_experts_that_compute_otherwise_are_left_out_and_named() -> None:
    model = mixture("qwen3_moe")
    experts(model, 1).act_fn = nn.Tanh()
    experts(model, 1).forward = lambda h, index, gates, other=None: h  # another interface
    found = active_routes(model, rollouts("a", 3, 23))
    assert set(found.scores.loc[found.scores["kind"] == KIND, "layer"]) == {0}
    assert any("layers.1.mlp.experts" in note and "not known" in note for note in found.notes)
    del experts(model, 1).forward
    own = experts(model, 1)
    own._apply_gate = lambda opened: opened.chunk(2, dim=-1)[1]  # the module's eager pass spells its gate out itself
    found = active_routes(model, rollouts("a", 3, 23))
    assert any("not made of such channels" in note for note in found.notes)
    assert HALVES[0] in found.scores


def test_experts_one_by_one_are_not_scored() -> None:
    found = experts_module.experts_of(nn.Linear(2, 2), "experts.0.down_proj", 0, 2)
    assert not isinstance(found, Experts)
    assert "a module of its own" in found
