"""A Hugging Face causal LM as a pure function of its named parameters, under the numerics contract (docs/numerics.md)."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from interference.checkpoint import Checkpoint
from interference.errors import InputError
from interference.tree import NamedTensors


@dataclass(frozen=True)
class Model:
    """An HF module whose derivatives can be trusted, and its parameters by name (tied weights once).

    Made by `load` or `prepare`, which hold the contract: evaluation mode, eager attention, no gradient stored, padding_idx
    neutralised (reverse mode would drop that row's gradient), right padding without a mask.
    """

    module: nn.Module
    parameters: dict[str, Tensor]
    notes: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.parameters.values())).dtype

    @property
    def pad(self) -> int:
        """A token id for padding: any valid id does, since padding is never seen by a scored token."""
        return 0

    def logits(self, parameters: NamedTensors, input_ids: Tensor, keep: int = 0) -> Tensor:
        """Logits (B, keep, V) of the last `keep` positions (0: all) at the given parameters; pure and differentiable.

        Parameters that are not named keep the model's own values.
        """
        options: dict[str, Any] = {"use_cache": False} | ({"logits_to_keep": keep} if keep and self._keeps else {})
        with CompositeLayerNorm():
            out = functional_call(self.module, dict(parameters), (input_ids,), options)
        logits: Tensor = out.logits
        return logits[:, -keep:] if keep else logits

    @torch.no_grad()
    def forward(self, input_ids: Tensor, keep: int = 0) -> Tensor:
        """Logits of the last `keep` positions (0: all) by the module's own forward pass: no derivative, no rewriting."""
        options = {"logits_to_keep": keep} if keep and self._keeps else {}
        logits: Tensor = self.module(input_ids, use_cache=False, **options).logits
        return logits[:, -keep:] if keep else logits

    @property
    def _keeps(self) -> bool:
        return "logits_to_keep" in inspect.signature(self.module.forward).parameters

    def fit_tokens(self, tokens: int) -> int:
        """At most `tokens`, and no more than lets one batch's logits fit in a GiB of float32."""
        vocabulary = getattr(getattr(self.module, "config", None), "vocab_size", 1)
        return max(1, min(tokens, (1 << 28) // vocabulary))

    def checksum(self) -> str:
        """A short name of the weights' content, to prove that a computation left them alone."""
        sha = hashlib.sha256()
        for name, p in self.parameters.items():
            sha.update(f"{name} {float(p.double().sum())!r} {float(p.double().square().sum())!r}".encode())
        return sha.hexdigest()[:16]

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Raise RuntimeError when the weights differ afterwards."""
        before = self.checksum()
        yield
        if self.checksum() != before:
            raise RuntimeError("the model's weights changed during a computation that must not change them")

    @contextmanager
    def at(self, updates: Sequence[NamedTensors], alphas: Sequence[float]) -> Iterator[None]:
        """The module at theta + sum_k alphas[k] updates[k], in place; theta is restored bit by bit afterwards."""
        changed = {name for u, a in zip(updates, alphas, strict=True) if a for name in u}
        saved = {name: self.parameters[name].clone() for name in changed}
        try:
            with torch.no_grad():
                for update, alpha in zip(updates, alphas, strict=True):
                    for name in update if alpha else ():
                        p = self.parameters[name]
                        p.add_(update[name].to(p), alpha=alpha)
            yield
        finally:
            with torch.no_grad():
                for name, value in saved.items():
                    self.parameters[name].copy_(value)

    def align(self, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An update's tensors under this model's parameter names, on its device and in its dtype.

        Names on disk may have or lack the base model's prefix ("transformer.h.0..." or "h.0...").

        Raises InputError for a changed tensor that is no parameter of the model.
        """
        prefix = getattr(self.module, "base_model_prefix", "")
        out: dict[str, Tensor] = {}
        for name in update:
            known = next((n for n in _spellings(name, prefix) if n in self.parameters), None)
            if known is None:
                raise InputError(
                    got=f"changed tensor {name!r}, which is no parameter of {type(self.module).__name__}",
                    expected="updates of parameters (tied weights under one name)",
                    remedy="save base and tuned with the same transformers version",
                )
            value = update[name]
            if value.shape != self.parameters[known].shape:
                raise InputError(
                    got=f"{name!r} of shape {tuple(value.shape)}",
                    expected=f"shape {tuple(self.parameters[known].shape)}, as in the model",
                    remedy="give updates of this model",
                )
            out[known] = value.to(device=self.device, dtype=self.dtype)
        return out


def _spellings(name: str, prefix: str) -> tuple[str, str, str]:
    return name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")


def load(checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "auto") -> Model:
    """Load a checkpoint's model under the contract.

    dtype: float32 (default) or float64; lower precision loses the second order and is refused.
    device: "auto" takes a GPU when there is one.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in (torch.float32, torch.float64):
        raise InputError(
            got=f"dtype {dtype}",
            expected="float32 or float64",
            remedy="weights may be stored in bf16; compute in float32",
        )
    try:
        module = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=dtype, attn_implementation="eager")
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(
            got=f"{checkpoint.path}, which transformers does not load as a causal LM ({str(error)[:200]})",
            expected="a causal language model of transformers",
            remedy="check config.json (model_type, architectures) and the transformers version",
        ) from error
    return prepare(module.to(pick_device(device)))


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The device by name; "auto" is the GPU when there is one, else the CPU. InputError when it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            got=f"device {str(device)!r} ({str(error).splitlines()[0][:100]})",
            expected="a device of this machine",
            remedy="use device: auto",
        ) from error
    return torch.device(device)


def prepare(module: nn.Module) -> Model:
    """Put a module under the contract, in place: eval mode, frozen, padding_idx neutralised; refuse what is not safe."""
    module.eval().requires_grad_(False)
    notes = []
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            part.padding_idx = None
            notes.append(f"padding_idx of {name} ignored: reverse mode would drop that token's gradient")
    config = getattr(module, "config", None)
    attention = getattr(config, "_attn_implementation", "eager")
    if attention not in (None, "eager"):
        raise InputError(
            got=f"attn_implementation {attention!r}",
            expected="'eager': fused attention has no second derivative",
            remedy="load the model with attn_implementation='eager'",
        )
    return Model(module, dict(module.named_parameters()), tuple(notes))


class CompositeLayerNorm(TorchFunctionMode):
    """Layer norm by elementary operations: the native one is silently wrong under nested forward mode."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is nn.functional.layer_norm:
            return _layer_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(axes, keepdim=True)
    out = centred * torch.rsqrt((centred * centred).mean(axes, keepdim=True) + eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias
