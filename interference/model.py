"""A Hugging Face causal LM as a pure function of its named parameters, under the numerics contract (docs/numerics.md)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from interference.checkpoint import Checkpoint
from interference.checksum import checksum, saved_buffers
from interference.conversion import Conversion
from interference.errors import InputError
from interference.kernels import GROUPED, Composite, differentiable
from interference.tree import Change, NamedChanges, NamedTensors


@dataclass(frozen=True)
class Model:
    """An HF module whose derivatives can be trusted, and its parameters by name (tied weights once).

    Made by `load` or `prepare`, which hold the contract: evaluation mode, eager attention or SDPA's math kernel, nothing
    compiled, no gradient stored, padding_idx neutralised (reverse mode would drop that row's gradient), right padding
    without a mask (values and plain gradients may have one, see `shared_prompts`).
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
        options: dict[str, Any] = {"use_cache": False, **self.keeping(keep)}
        with differentiable():
            out = functional_call(self.module, dict(parameters), (input_ids,), options)
        logits: Tensor = out.logits
        return logits[:, -keep:] if keep else logits

    @torch.no_grad()
    def forward(self, input_ids: Tensor, keep: int = 0, **inputs: Tensor) -> Tensor:
        """Logits of the last `keep` positions (0: all) by the module's own forward pass: no derivative, no rewriting.

        inputs: what else the module is called with, such as the masks of `shared_prompts`.

        (In float64 the grouped products of experts are spelled out, since torch has no such kernel.)
        """
        options: dict[str, Any] = {"use_cache": False, **inputs, **self.keeping(keep)}
        with Composite(GROUPED) if self.dtype == torch.float64 else nullcontext():
            logits: Tensor = self.module(input_ids, **options).logits
        return logits[:, -keep:] if keep else logits

    def keeping(self, keep: int) -> dict[str, int]:
        """How the module is told to compute the last `keep` logits only (0: all), where it can."""
        known = keep and "logits_to_keep" in inspect.signature(self.module.forward).parameters
        return {"logits_to_keep": keep} if known else {}

    def fit_tokens(self, tokens: int) -> int:
        """At most `tokens`, and no more than lets one batch's logits fit in a GiB of float32."""
        vocabulary = getattr(getattr(self.module, "config", None), "vocab_size", 1)
        return max(1, min(tokens, (1 << 28) // vocabulary))

    def checksum(self) -> str:
        """A short name of the bits of the weights and saved buffers, to prove that a computation left them alone."""
        return checksum({**self.parameters, **saved_buffers(self.module)})

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

    def align(self, update: NamedChanges) -> dict[str, Change]:
        """An update's tensors under this model's parameter names, on its device and in its dtype.

        Names on disk may have or lack the base model's prefix ("transformer.h.0..." or "h.0...").

        Raises InputError for a changed tensor that is no parameter of the model.
        """
        prefix = getattr(self.module, "base_model_prefix", "")
        out: dict[str, Change] = {}
        for name in update:
            known = next((n for n in spellings(name, prefix) if n in self.parameters), None)
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


def spellings(name: str, prefix: str) -> tuple[str, str, str]:
    return name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")


def load(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "auto",
    attention: Literal["eager", "sdpa", "fast"] = "eager",
) -> Model:
    """Load a checkpoint's model under the contract.

    dtype: float32 (default) or float64; lower precision loses the second order and is refused.
    device: "auto" takes a GPU when there is one.  attention: "eager"; "sdpa", held to its math kernel in derivatives; or "fast":
    "sdpa" where transformers has it for the model, for what mostly samples, evaluates and takes plain gradients.

    Raises InputError for another dtype, a model that transformers does not load as a causal LM, and a checkpoint that
    lacks weights of it (such as the head).
    """
    from transformers import AutoModelForCausalLM

    if dtype not in (torch.float32, torch.float64):
        raise InputError(
            got=f"dtype {dtype}",
            expected="float32 or float64",
            remedy="weights may be stored in bf16; compute in float32",
        )
    # transformers reads its own formats; of the others it takes the tensors.
    kind: Any = AutoModelForCausalLM
    place: Path | None = checkpoint.path
    tensors: dict[str, Any] = {"trust_remote_code": False}
    if not checkpoint.hugging_face:
        _ = checkpoint.config  # refuses adapters, and weights without a configuration
        skeleton = Conversion(checkpoint).module
        kind, place = type(skeleton), None
        tensors = {"state_dict": dict(checkpoint), "config": getattr(skeleton, "config", None)}
    tensors |= {"dtype": dtype, "attn_implementation": None if attention == "fast" else attention}
    try:
        module, found = kind.from_pretrained(place, output_loading_info=True, **tensors)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise InputError(
            got=f"{checkpoint.path}, which transformers does not load as a causal LM ({str(error)[:200]})",
            expected="a causal language model of transformers",
            remedy="check config.json (model_type, architectures) and the transformers version",
        ) from error
    if attention == "fast" and getattr(module.config, "_attn_implementation", None) not in ("eager", "sdpa"):
        module.set_attn_implementation("eager")  # what the checkpoint's own configuration asks for has no derivatives
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise InputError(
            got=f"{checkpoint.path} without {missing[0]} (and {len(missing) - 1} more), which would be made up at random",
            expected=f"all weights of {type(module).__name__}, its head included",
            remedy="save the whole causal LM, not only its base model",
        )
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
    """Put a module under the contract, in place: eval mode, frozen, padding_idx neutralised; refuse what is not safe.

    Raises InputError for compiled modules and for attention other than "eager" and "sdpa".
    """
    _refuse_compiled(module)
    attention = _attention(module)
    module.eval().requires_grad_(False)
    notes = []
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            part.padding_idx = None
            notes.append(f"padding_idx of {name} ignored: reverse mode would drop that token's gradient")
    if _stop_checkpointing(module):
        notes.append("gradient checkpointing switched off")
    if "sdpa" in attention:
        notes.append(
            "attention: SDPA, by its math kernel while differentiating (its fused kernels have no derivatives)"
        )
    return Model(module, dict(module.named_parameters()), tuple(notes))


def _attention(module: nn.Module) -> set[str]:
    """The attention implementations of a module and its parts."""
    configs = (getattr(part, "config", None) for part in module.modules())
    found = {getattr(c, "_attn_implementation", None) or "eager" for c in configs}
    odd = sorted(str(f) for f in found if f not in ("eager", "sdpa"))
    if odd:
        raise InputError(
            got=f"attn_implementation {odd[0]!r}",
            expected="'eager', or 'sdpa': other fused attention has no second derivative",
            remedy="load the model with attn_implementation='eager'",
        )
    return found


def _stop_checkpointing(module: nn.Module) -> bool:
    """Undo gradient_checkpointing_enable, whose hook on the embedding raises under torch.func; whether there was any."""
    parts = [part for part in module.modules() if getattr(part, "gradient_checkpointing", False)]
    for part in parts:
        part.gradient_checkpointing = False  # type: ignore[assignment]
    undo = getattr(module, "disable_input_require_grads", None)
    if undo is not None:
        undo()
    return bool(parts)


def _refuse_compiled(module: nn.Module) -> None:
    """torch.compile drops forward-mode tangents and custom derivatives without an error."""
    for name, part in module.named_modules():
        place = name or "the model itself"
        held = [f"{place}: {key}" for key, value in vars(part).items() if _compiled(value)]
        if type(part).__name__ == "OptimizedModule" or part._compiled_call_impl is not None:
            held = [place]
        elif _compiled(type(part).forward):
            held = [f"{place}: forward of {type(part).__name__}"]
        if held:
            raise InputError(
                got=f"a compiled module ({held[0]})",
                expected="eager code: torch.compile drops derivatives without an error",
                remedy="give the model as it was before torch.compile (model._orig_mod), or load it again",
            )


def _compiled(value: object) -> bool:
    """Whether a function or module was made by torch.compile (torch.compiler.disable leaves the same mark, and one more)."""
    if type(value).__name__ == "OptimizedModule":
        return True
    marked = callable(value) and hasattr(value, "_torchdynamo_orig_callable")
    return marked and not getattr(value, "_torchdynamo_disable", False)


def check_fits(model: Model, name: str, longest: int, top: int, remedy: str) -> None:
    """Refuse sequences of `longest` tokens or the token id `top` where the model has no room for them."""
    config = getattr(model.module, "config", None)
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and longest > context:
        raise InputError(
            got=f"domain {name!r} with sequences of up to {longest} tokens",
            expected=f"at most {context} tokens, the model's context",
            remedy=remedy,
        )
    size = getattr(config, "vocab_size", None)
    if size is not None and top >= size:
        raise InputError(
            got=f"domain {name!r} with token id {top}",
            expected=f"ids below the model's vocabulary size {size}",
            remedy="use the base model's own tokenizer",
        )
