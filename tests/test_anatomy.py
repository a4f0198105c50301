"""Where parameters belong: heads and channels against the model's own forward pass, per architecture, and planted bugs."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from tiny import MOE, OLD, SIZES
from torch import Tensor, nn
from toy import ToyTransformer
from transformers import AutoConfig, AutoModelForCausalLM

from interference import anatomy as anatomies
from interference.anatomy import Anatomy
from interference.errors import InputError
from interference.layout import KINDS
from interference.model import Model, prepare
from interference.records import MODULES

# What the layers' attention and MLP are called: paths below a layer.
LAYOUTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "llama": ({}, "self_attn.o_proj", "mlp.down_proj"),
    "qwen3": ({"head_dim": 8, "tie_word_embeddings": True}, "self_attn.o_proj", "mlp.down_proj"),
    "gpt2": (OLD, "attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ({}, "attention.dense", "mlp.dense_4h_to_h"),
    "phi3": ({}, "self_attn.o_proj", "mlp.down_proj"),
    "opt": ({"ffn_dim": 24, "word_embed_proj_dim": 16}, "self_attn.out_proj", "fc2"),
    "gemma2": ({"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}, "self_attn.o_proj", "mlp.down_proj"),
    "olmo2": ({}, "self_attn.o_proj", "mlp.down_proj"),
    "qwen3_moe": (MOE, "self_attn.o_proj", ""),
    "gpt_oss": ({**MOE, "num_local_experts": 4, "sliding_window": 4}, "self_attn.o_proj", ""),
}


def build(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Model:
    config = AutoConfig.for_model(name, **{**SIZES, **LAYOUTS.get(name, ({},))[0], **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for p in module.parameters():
            p.data = torch.randn_like(p) * 0.25 + (p.dim() == 1) * 0.7
    if name in ("qwen3_moe", "gpt_oss", "llama4_text"):
        module.set_experts_implementation("eager")  # the grouped kernel has no forward derivative
    return prepare(module.to(dtype))


def layers(model: Model) -> nn.ModuleList:
    return next(m for m in model.module.modules() if isinstance(m, nn.ModuleList))


def entering(model: Model, module: nn.Module, moved: dict[str, Tensor]) -> Tensor:
    """What enters a module at layer 0 when the parameters are moved."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, x: seen.append(x[0].clone()))
    ids = torch.tensor([[5, 9, 3, 20, 7, 11]])
    with model.at([moved], [1.0]):
        model.forward(ids)
    hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


def noise(model: Model, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {n: torch.randn(model.parameters[n].shape, generator=g).to(model.dtype) * m for n, m in masks.items()}


def changed_inputs(model: Model, module: nn.Module, masks: dict[str, Tensor]) -> set[int]:
    """Columns of a module's input that an update of the masked coordinates moves by more than rounding."""
    still = entering(model, module, {})
    difference = (entering(model, module, noise(model, masks)) - still).abs().amax(0)
    return set(torch.nonzero(difference > 1e-5 * still.abs().max())[:, 0].tolist())


def check_heads(model: Model, anatomy: Anatomy, closer: nn.Module, coupled: bool = False) -> None:
    """An update of one head's rows of q, of k or of v moves what that head hands to o, and nothing else."""
    queries = int(anatomy.labels["head"][anatomy.labels["kind"] == 0].max()) + 1
    groups = int(anatomy.labels["head"][anatomy.labels["kind"] == 1].max()) + 1
    width = entering(model, closer, {}).shape[-1]
    size = width // queries
    for kind, module, count in (("query", "q", queries), ("key_value", "k", groups), ("key_value", "v", groups)):
        if coupled and module != "v":
            continue  # a norm over all heads scales them together
        span = width // count
        for head in range(count):
            masks = anatomy.masks(layer=0, kind=kind, head=head, module=module)
            assert masks, (kind, module, head)
            assert changed_inputs(model, closer, masks) == set(range(head * span, (head + 1) * span))
    assert (queries * size, queries % groups) == (width, 0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_heads_are_what_the_forward_pass_says(name: str) -> None:
    model = build(name)
    anatomy = anatomies.read(model)
    assert not anatomy.notes
    closer = layers(model)[0].get_submodule(LAYOUTS[name][1])
    check_heads(model, anatomy, closer, coupled=name == "olmo2")
    transposed = name == "gpt2"
    for head in range(4):
        masks = anatomy.masks(layer=0, kind="query", head=head, module="o")
        (mask,) = masks.values()
        columns = torch.nonzero(mask.any(1) if transposed else mask.any(0))[:, 0].tolist()
        span = closer.weight.shape[0 if transposed else 1] // 4
        assert columns == list(range(head * span, (head + 1) * span))
        assert mask.sum() == span * 16


@pytest.mark.parametrize("name", [n for n, (_, _, down) in LAYOUTS.items() if down])
def test_channels_are_what_the_forward_pass_says(name: str) -> None:
    """An update of one channel's rows of gate, of up, moves that input of down and nothing else."""
    model = build(name)
    anatomy = anatomies.read(model)
    closer = layers(model)[0].get_submodule(LAYOUTS[name][2])
    width = entering(model, closer, {}).shape[-1]
    modules = {MODULES[i] for i in np.unique(anatomy.labels["module"])} & {"gate", "up"}
    assert "up" in modules
    for module in modules:
        for channel in (0, 1, width // 2, width - 1):
            masks = anatomy.masks(layer=0, channel=channel, module=module)
            assert masks
            assert changed_inputs(model, closer, masks) <= {channel}
    (down,) = anatomy.masks(layer=0, channel=3, module="down").values()
    assert down.sum() == 16
    assert torch.nonzero(down.any(1) if name == "gpt2" else down.any(0))[:, 0].tolist() == [3]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_channels_of_experts_cancel_as_wholes(name: str) -> None:
    """With a channel's column of down at zero, its rows of gate and up have no effect; another channel's still have.

    Zeroing must be exact for the expert and the channel, so a wrong axis, interleaving or order of experts is seen.
    """
    model = build(name)
    anatomy = anatomies.read(model)
    ids = torch.tensor([[5, 9, 3, 20, 7, 11]])
    for expert, channel in ((0, 0), (1, 5), (3, 11)):
        own = {"layer": 0, "expert": expert, "channel": channel}
        down = anatomy.masks(module="down", **own)
        silent = {n: -model.parameters[n] * m for n, m in down.items()}
        with model.at([silent], [1.0]):
            still = model.forward(ids)
            for module in ("gate", "up"):
                with model.at([noise(model, anatomy.masks(module=module, **own))], [1.0]):
                    torch.testing.assert_close(model.forward(ids), still, rtol=0, atol=1e-5)
                other = anatomy.masks(module=module, layer=0, channel=channel + (1 if channel < 11 else -1))
                with model.at([noise(model, other)], [1.0]):
                    assert (model.forward(ids) - still).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_gate_and_up_of_experts_are_told_apart(name: str) -> None:
    """Scaling up's rows (and biases) of a channel scales what it hands to down linearly; gate's does not."""
    model = build(name)
    anatomy = anatomies.read(model)
    experts = layers(model)[0].mlp.experts
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
    route = torch.zeros(8, 1, dtype=torch.long), torch.ones(8, 1)
    linear = {}
    for module in ("gate", "up"):
        masks = anatomy.masks(layer=0, expert=0, channel=4, module=module)
        step = {n: model.parameters[n] * m * 0.1 for n, m in masks.items()}
        values = []
        for alpha in (0.0, 1.0, 2.0):
            with model.at([step], [alpha]), torch.no_grad():
                values.append(experts(x, *route).double())
        curved = (values[2] - 2 * values[1] + values[0]).norm() / (values[1] - values[0]).norm()
        linear[module] = float(curved) < 1e-4
    assert linear == {"up": True, "gate": False}


def test_every_coordinate_has_one_module_of_the_right_name() -> None:
    anatomy = anatomies.read(build("llama"))
    expected = {
        "embed_tokens": "embedding", "lm_head": "head", "norm": "norm", "q_proj": "q", "k_proj": "k", "v_proj": "v",
        "o_proj": "o", "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "input_layernorm": "norm",
        "post_attention_layernorm": "norm",
    }  # fmt: skip
    for name, place in anatomy.places.items():
        (module,) = {MODULES[i] for i in anatomy.labels["module"][place]}
        assert module == expected[name.split(".")[-2]]
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        assert set(anatomy.labels["layer"][place].tolist()) == {layer}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3", {"embedding + head", "norm", "q", "k", "v", "o", "gate", "up", "down"}),
        ("gpt2", {"embedding", "embedding + head", "norm", "q", "k", "v", "o", "up", "down"}),
        ("phi3", {"embedding", "norm", "q", "k", "v", "o", "gate", "up", "down", "head"}),
        ("qwen3_moe", {"embedding", "norm", "q", "k", "v", "o", "gate", "up", "down", "router", "head"}),
        ("gpt_oss", {"embedding", "norm", "q", "k", "v", "o", "gate", "up", "down", "router", "head", "other"}),
    ],
)
def test_modules_of_fused_and_tied_models(name: str, expected: set[str]) -> None:
    anatomy = anatomies.read(build(name))
    assert {MODULES[i] for i in anatomy.labels["module"]} == expected
    assert {KINDS[i] for i in anatomy.labels["kind"] if i >= 0} == set(KINDS)


def test_what_cannot_be_told_is_said_and_not_guessed() -> None:
    for name, what in (("falcon", "heads"), ("diffllama", "heads"), ("llama4_text", "channels")):
        changes = {"multi_query": True} if name == "falcon" else {}
        if name == "llama4_text":
            changes = {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 24}
        anatomy = anatomies.read(build(name, **changes))
        assert any(what in note for note in anatomy.notes), name
        if what == "heads":
            assert (anatomy.labels["head"] == -1).all()
        else:
            assert (anatomy.labels["expert"] == -1).all()
    with pytest.raises(InputError, match="without parameters"):
        anatomies.read(Model(nn.ReLU(), {}))


def test_the_toy_has_heads_and_channels(toy: Model) -> None:
    anatomy = anatomies.read(toy)
    assert not anatomy.notes
    check_heads(toy, anatomy, toy.module.layers[0].attention.o)


def test_the_probe_sees_a_layout_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: query_key_value of GPT-NeoX read as q | k | v. Heads are then not told, whatever the sizes say."""
    from interference import layout

    monkeypatch.setitem(layout.FUSED, "GPTNeoXAttention", "concatenated")
    anatomy = anatomies.read(build("gpt_neox"))
    assert (anatomy.labels["head"] == -1).all()
    assert any("moves others" in note for note in anatomy.notes)


def test_the_oracle_sees_a_layout_that_is_wrong() -> None:
    """The planted bug: heads counted within the head dimension instead of across it."""
    model = build("llama")
    anatomy = anatomies.read(model)
    labels = dict(anatomy.labels)
    rows = (labels["kind"] == 0) & (labels["module"] == MODULES.index("q"))
    wrong = labels["head"].copy()
    for place in anatomy.places.values():
        if rows[place].all() and place.stop > place.start:
            wrong[place] = np.arange(place.stop - place.start) % 4
    labels["head"] = wrong
    planted = dataclasses.replace(anatomy, labels=labels)
    with pytest.raises(AssertionError):
        check_heads(model, planted, layers(model)[0].self_attn.o_proj)


def test_masks_refuse_unknown_labels() -> None:
    anatomy = anatomies.read(prepare(ToyTransformer.seeded(0)))
    with pytest.raises(InputError, match="did you mean 'down'"):
        anatomy.masks(module="donw")
    with pytest.raises(InputError, match="did you mean 'layer'"):
        anatomy.masks(layers=1)
    for wrong in ({"layer": 99}, {"layer": "1"}, {"layer": True}, {"head": 4}, {"expert": 0}, {"module": "router"}):
        with pytest.raises(InputError, match="a label of this model's anatomy"):
            anatomy.masks(**wrong)
    assert not anatomy.masks(kind="query", module="down")  # both exist, never together


def test_a_dead_channel_does_not_hide_the_others() -> None:
    """A unit whose outputs reach nothing tells nothing about the layout; the one before it does."""
    config = AutoConfig.for_model("llama", **SIZES)
    torch.manual_seed(0)
    model = prepare(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    whole = anatomies.read(model)
    with torch.no_grad():
        for layer in model.module.model.layers:
            for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
                part.weight[-1] = 0  # silu(gate) is zero while up alone moves, and the other way round
    dead = anatomies.read(model)
    assert dead.notes == whole.notes
    np.testing.assert_array_equal(dead.labels["channel"], whole.labels["channel"])
