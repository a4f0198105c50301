"""Leaves against the model itself and, for adapters, against PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import qwen3
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from interference import tree
from interference.domain import Batch
from interference.errors import InputError
from interference.forecasting.trainable import AdapterTrainable, Trainable, trainable
from interference.forecasting.training import Adapter
from interference.model import Model, prepare

LORA = Adapter(rank=3, alpha=12)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 27}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3, attn_implementation="eager")).eval()


def batch() -> Batch:
    ids = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 0, 0]])
    targets = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]]).bool()
    return Batch(ids, targets, (0, 1))


def scores(module: Any, b: Batch) -> Tensor:
    """Response tokens' log-probabilities by the module's own forward pass."""
    logp = module(b.input_ids).logits[:, :-1].log_softmax(-1)
    return logp.gather(-1, b.input_ids[:, 1:, None])[..., 0][b.targets[:, 1:]]


def with_peft(make: Any, leaves: AdapterTrainable) -> Any:
    """A PEFT model of the same base with the same factors."""
    config = LoraConfig(r=3, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(make(), config)
    found = dict(wrapped.named_parameters())
    for name in leaves.flipped:
        for ours, theirs in (("a", "lora_A"), ("b", "lora_B")):
            place = f"base_model.model.{name.removesuffix('.weight')}.{theirs}.default.weight"
            found.pop(place).data = leaves.leaves[f"{name}.{ours}"].detach().clone()
    assert not [n for n in found if "lora" in n], "PEFT adapts a matrix that we leave alone"
    return wrapped.eval()


def moved(model: Model, start: dict[str, Tensor] | None = None) -> AdapterTrainable:
    leaves = AdapterTrainable(model, LORA, start)
    with torch.no_grad():
        for name, leaf in leaves.leaves.items():
            if name.endswith(".b"):
                leaf.copy_(0.1 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(len(name))))
    return leaves


@pytest.mark.parametrize("make", [qwen3, gpt2])
def test_adapter_is_peft_s(make: Any) -> None:
    """The same factors give the same scores, the same gradients of the factors, and the same merged weights."""
    leaves = moved(prepare(make()))
    wrapped, b = with_peft(make, leaves), batch()
    ours, theirs = leaves.logp(b), scores(wrapped, b)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours.sum().backward()
    theirs.sum().backward()
    gradients = dict(wrapped.named_parameters())
    for name in leaves.flipped:
        for ours_, theirs_ in (("a", "lora_A"), ("b", "lora_B")):
            place = f"base_model.model.{name.removesuffix('.weight')}.{theirs_}.default.weight"
            torch.testing.assert_close(
                leaves.leaves[f"{name}.{ours_}"].grad, gradients[place].grad, rtol=1e-4, atol=1e-5
            )
    merged, base = dict(wrapped.merge_and_unload().named_parameters()), dict(make().named_parameters())
    update = leaves.update()
    assert set(update) == set(leaves.flipped)
    for name, change in update.items():
        assert isinstance(change, tree.LowRank)
        torch.testing.assert_close(change.dense(), merged[name].detach() - base[name].detach(), rtol=1e-4, atol=1e-6)


def test_factors_are_drawn_as_peft_draws_them() -> None:
    """A uniform within 1 / sqrt(in), B zero, so that training starts at the base."""
    wrapped = get_peft_model(qwen3(), LoraConfig(r=200, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    theirs = next(p for n, p in wrapped.named_parameters() if "lora_A" in n)
    leaves = AdapterTrainable(prepare(qwen3()), Adapter(rank=200, alpha=8))
    ours = leaves.leaves["model.layers.0.self_attn.q_proj.weight.a"]
    assert ours.abs().max() <= 1 / 16**0.5
    torch.testing.assert_close(ours.std(), theirs.std(), rtol=0.05, atol=0.0)
    assert leaves.update() == {}


def test_scores_are_the_module_s_own_and_the_model_stays() -> None:
    model = prepare(qwen3())
    leaves, b = Trainable(model), batch()
    with model.untouched():
        torch.testing.assert_close(leaves.logp(b), scores(qwen3(), b).detach(), rtol=1e-6, atol=1e-6)
        with torch.no_grad():
            leaves.leaves["model.norm.weight"].add_(0.5)
        with leaves.applied():
            at = scores(model.module, b)
        torch.testing.assert_close(leaves.logp(b), at)
    assert set(leaves.update()) == {"model.norm.weight"}


@pytest.mark.parametrize("adapter", [None, LORA])
def test_update_holds_where_training_started(adapter: Adapter | None) -> None:
    """theta + update is where the leaves are, whatever the start was."""
    model = prepare(qwen3())
    generator = torch.Generator().manual_seed(1)
    start = {n: 0.05 * torch.randn(p.shape, generator=generator) for n, p in model.parameters.items() if "mlp" in n}
    leaves = moved(model, start) if adapter else trainable(model, None, start)
    update = leaves.update()
    for name, value in leaves.parameters().items():
        change = tree.dense(update[name]) if name in update else 0.0
        torch.testing.assert_close(model.parameters[name] + change, value.detach(), rtol=1e-5, atol=1e-6)
    assert set(start) <= set(update)


def test_a_pilot_s_adapter_goes_on_with_its_own_factors() -> None:
    """Where the pilot's factors are known they are the leaves; what is no factor of this rank is merged."""
    model = prepare(gpt2())
    pilot = moved(model)
    with torch.no_grad():
        for name, leaf in pilot.leaves.items():
            leaf += 0.1 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(len(name)))
    begun = pilot.update()
    other = next(n for n in model.parameters if "ln_f" in n)
    begun[other] = torch.full_like(model.parameters[other], 0.5)
    on = AdapterTrainable(model, LORA, begun, goes_on=True)
    for name, leaf in on.leaves.items():
        torch.testing.assert_close(leaf, pilot.leaves[name])
    torch.testing.assert_close(on.parameters()[other], model.parameters[other] + 0.5)
    assert {n for n, c in on.update().items() if isinstance(c, tree.LowRank)} == set(pilot.flipped)
    anew = AdapterTrainable(model, LORA, begun)
    assert not any(leaf.any() for name, leaf in anew.leaves.items() if name.endswith(".b"))


def test_a_model_without_linear_maps_has_no_adapter() -> None:
    import tabular

    with pytest.raises(InputError, match="linear maps"):
        AdapterTrainable(tabular.model(), LORA)


def test_the_oracle_catches_a_planted_error() -> None:
    """alpha instead of alpha / rank is not PEFT's adapter."""
    leaves = moved(prepare(qwen3()))
    theirs = scores(with_peft(qwen3, leaves), batch())
    leaves.scale = LORA.alpha
    assert (leaves.logp(batch()) - theirs).abs().max() > 1e-2
