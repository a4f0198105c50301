"""Jets of unchanged Hugging Face models, small and random, against nested forward mode in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from taylor_oracles import TrueFloat64, batch, directions, nested, relative, token_logp, worst
from tiny import MOE, OLD, SIZES
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from interference.errors import InputError
from interference.taylor import TokenTerms, taylor_jets

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 8, "tie_word_embeddings": True}, "qwen2": {}, "llama": {}, "mistral": {"sliding_window": 4},
    "gpt2": OLD, "gemma2": {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}, "phi3": {}, "olmo2": {},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4}, "gpt_neox": {}, "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "qwen3_moe": MOE, "mixtral": {"num_local_experts": 4},
    "gpt_oss": {**MOE, "num_local_experts": 4, "sliding_window": 4}, "gptj": {**OLD, "rotary_dim": 4},
    "granite": {"logits_scaling": 2.0, "residual_multiplier": 0.5}, "smollm3": {}, "cohere2": {"sliding_window": 4},
    "falcon": {"multi_query": True}, "olmo": {}, "phi": {}, "starcoder2": {}, "glm4": {"head_dim": 8},
    "llama4_text": {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 24}, "mamba": {},
}  # fmt: skip
FALLBACKS = {"mamba": {"conv1d"}}


def build(name: str, attention: str = "eager", dtype: torch.dtype = torch.float64) -> nn.Module:
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    config = AutoConfig.for_model(name, **{**SIZES, **ARCHITECTURES[name]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double()
        for p in model.parameters():
            p.data = torch.randn_like(p) * 0.25 + (p.dim() == 1) * 0.7
    return model.to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float64(name: str) -> None:
    model, (ids, targets) = build(name), batch(37)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
    updates = directions(model, 2)
    with TrueFloat64():
        got, fallbacks = taylor_jets(model, updates, ids, targets)
        expected = nested(model, updates, ids, targets)
    assert worst(got, expected) < 1e-11
    assert set(fallbacks) == FALLBACKS.get(name, set())


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma2", "olmo2", "gpt_oss"])
def test_float32(name: str) -> None:
    ids, targets = batch(37)
    wide, narrow = build(name), build(name, dtype=torch.float32)
    updates = directions(wide, 2)
    expected, _ = taylor_jets(wide, updates, ids, targets)
    got, _ = taylor_jets(narrow, [{n: x.float() for n, x in u.items()} for u in updates], ids, targets)
    assert worst(TokenTerms(got.logp.double(), got.d1.double(), got.d2.double(), got.fisher.double()), expected) < 5e-5


@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2", "mistral"])
def test_fused_attention_by_the_composite_route(name: str) -> None:
    ids, targets = batch(37)
    fused, eager = build(name, "sdpa"), build(name)
    updates = directions(eager, 2)
    got, fallbacks = taylor_jets(fused, updates, ids, targets)
    with TrueFloat64():
        expected, _ = taylor_jets(eager, updates, ids, targets)
    assert worst(got, expected) < 1e-6  # rotary tables are float32 outside the mode
    assert not fallbacks


def test_values_are_the_models_own() -> None:
    model, (ids, targets) = build("qwen3", dtype=torch.float32), batch(37)
    got, _ = taylor_jets(model, directions(model, 1), ids, targets)
    expected = token_logp(model, dict(model.named_parameters()), ids, targets)
    assert relative(got.logp, expected) < 2e-6


def test_custom_functions_are_refused() -> None:
    """Bloom's GELU is an autograd Function, which nested forward mode gets wrong without an error."""
    ARCHITECTURES.setdefault("bloom", {"n_head": 4, "n_layer": 2})
    model, (ids, targets) = build("bloom"), batch(37)
    with pytest.raises(InputError, match=r"GeLUFunction, a custom autograd\.Function"):
        taylor_jets(model, directions(model, 1), ids, targets)
