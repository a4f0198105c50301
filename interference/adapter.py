"""A PEFT LoRA adapter as changes of its base's parameters, made from the factors and never from a merged model.

With factors A (r, in) and B (out, r) and scale s = alpha / r (rank-stabilised: alpha / sqrt(r)) a matrix W (out, in) changes by

    LoRA:  s B A              DoRA:  m * (W + s B A) / |W + s B A|_row - W

where m (out) is the learned magnitude and |.|_row the norm of each output's row. Source: peft (tuners/lora: layer.py,
variants.py), Hu et al. 2021 (LoRA), Kalajdzievski 2023 (rsLoRA), Liu et al. 2024 (DoRA).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from interference import tree
from interference.checkpoint import Checkpoint
from interference.conversion import Parameters
from interference.errors import InputError
from interference.tied import TiedHead
from interference.tree import Change, LowRank

_MERGE = (
    "merge it: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(path), and give that path"
)
_UNLIKE_LORA = (  # settings that make an adapter something else than a fixed change of the weights
    "layer_replication", "target_parameters", "trainable_token_indices", "use_qalora", "use_bdlora",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
_INITS = (True, False, None, "true", "gaussian", "eva", "mica")  # the others change the base's weights when they begin
_KEY = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.default)?(\.(?P<leaf>weight|bias))?$"
)
Term = Callable[[], Change]


@dataclass
class _Module:
    """An adapted module: its factors' names in the file, and its parameter in the base."""

    name: str
    parameter: str
    keys: dict[str, str] = field(default_factory=dict)


def adapter_changes(base: Parameters, adapter: Checkpoint, tied: TiedHead) -> dict[str, Term]:
    """{parameter: a function that makes its change, in float32}, for every parameter that the adapter names.

    tied : the base's embedding and head.

    Raises InputError for adapters other than LoRA, options that are no fixed change of the weights, factors that are missing,
    that do not fit the base or that are not finite, and for a tied head that is changed apart from its embedding.
    """
    settings = adapter.adapter or {}
    _check_settings(settings, adapter)
    modules, whole = _sort(base, adapter, tied)
    terms: dict[str, list[Term]] = {}
    for module in modules.values():
        for parameter, term in _terms(base, adapter, module, settings, whole, tied):
            terms.setdefault(parameter, []).append(term)
    for parameter, key in whole.items():
        terms.setdefault(parameter, []).append(_difference(base, adapter, parameter, key, tied))
    changes = {parameter: _sum(parts) for parameter, parts in terms.items()}
    return tied.joined(changes, bool(settings.get("ensure_weight_tying")), adapter.path)


def _sum(parts: list[Term]) -> Term:
    def make() -> Change:
        """The parts' sum, without those that are zero, so that factors stay factors beside an unchanged copy."""
        made = [part() for part in parts]
        change = made[0]
        for other in made[1:]:
            change = other if tree.is_zero(change) else change if tree.is_zero(other) else tree.added(change, other)
        return change

    return make


def _check_settings(settings: dict[str, Any], adapter: Checkpoint) -> None:
    kind = str(settings.get("peft_type", "")).upper()
    if kind != "LORA":
        raise InputError(got=f"{adapter.path}, a PEFT adapter of type {kind!r}", expected="LoRA", remedy=_MERGE)
    for option in _UNLIKE_LORA:
        if settings.get(option):
            raise InputError(
                got=f"{adapter.path}, an adapter with {option} {settings[option]!r}",
                expected="LoRA or DoRA on matrices and embeddings",
                remedy=_MERGE,
            )
    start = settings.get("init_lora_weights")
    if (start.lower() if isinstance(start, str) else start) not in _INITS:
        raise InputError(
            got=f"{adapter.path}, begun with init_lora_weights {start!r}, which changes the base's own weights",
            expected="factors whose product is the whole change",
            remedy="save it again with path_initial_model_for_weight_conversion, or " + _MERGE,
        )


def _sort(base: Parameters, adapter: Checkpoint, tied: TiedHead) -> tuple[dict[str, _Module], dict[str, str]]:
    """The adapted modules, and {parameter: name in the file} of tensors that are saved whole."""
    modules: dict[str, _Module] = {}
    whole: dict[str, str] = {}
    for key in adapter.names():
        name = key.removeprefix("base_model.model.")
        match = _KEY.match(name)
        if match is None:
            plain = re.sub(r"\.(base_layer|modules_to_save(\.default)?|original_module)(?=\.)", "", name)
            if "lora_" in plain or ".original_module." in name:
                raise _stray(adapter, key)
            whole[_parameter(base, adapter, plain, key, tied)] = key
            continue
        module, part = match["module"], match["part"] + (".bias" if match["leaf"] == "bias" else "")
        if module not in modules:
            modules[module] = _Module(module, _parameter(base, adapter, f"{module}.weight", key, tied))
        modules[module].keys[part] = key
    return modules, whole


def _parameter(base: Parameters, adapter: Checkpoint, name: str, key: str, tied: TiedHead) -> str:
    """The base's name of a parameter, which may have or lack the base model's prefix on disk."""
    names = {*base.names(), *tied.names}
    prefixes = {known.split(".")[0] for known in names}
    spellings = (name, name.partition(".")[2], *(f"{prefix}.{name}" for prefix in sorted(prefixes)))
    found = next((s for s in spellings if s in names), None)
    if found is None:
        raise InputError(
            got=f"{adapter.path} with {key!r}, for which {base.checkpoint.path} has no parameter {name!r}",
            expected="an adapter of this base",
            remedy="give the base that it was trained on" + ("" if ".experts." not in name else f", or {_MERGE}"),
        )
    return found


def _terms(
    base: Parameters,
    adapter: Checkpoint,
    module: _Module,
    settings: dict[str, Any],
    whole: dict[str, str],
    tied: TiedHead,
) -> list[tuple[str, Term]]:
    """What one adapted module changes: its weight, and with lora_bias its bias."""
    embedded = "lora_embedding_A" in module.keys
    up, down = ("lora_embedding_B", "lora_embedding_A") if embedded else ("lora_B", "lora_A")
    if up not in module.keys or down not in module.keys:
        raise InputError(
            got=f"{adapter.path} with only one of {up} and {down} for {module.name}",
            expected="both factors",
            remedy="save the adapter again",
        )
    if ("lora_magnitude_vector" in module.keys) != bool(settings.get("use_dora")):
        raise InputError(
            got=f"{adapter.path} whose use_dora is {settings.get('use_dora')!r} and whose {module.name} has "
            + ("magnitudes" if "lora_magnitude_vector" in module.keys else "no magnitudes"),
            expected="lora_magnitude_vector with DoRA, and none without",
            remedy="save the adapter again",
        )
    scale, rank = _scale(settings, module.name, adapter)
    shape = base.shape(tied.stored(module.parameter))
    transposed = embedded or tied.transposed(module.parameter, shape, bool(settings.get("fan_in_fan_out")))
    B, A = adapter.shapes[module.keys[up]], adapter.shapes[module.keys[down]]
    product = (B[0], A[-1]) if len(A) == len(B) == 2 else ()
    if product != (shape[::-1] if transposed else shape) or not A[0] == B[1] == rank:
        raise InputError(
            got=f"{adapter.path} with factors of shapes {B} and {A} for {module.parameter} of shape {shape}",
            expected=f"factors of rank {rank} (r and rank_pattern) whose product has the shape of the weight",
            remedy="give the base that the adapter was trained on; for convolutions, " + _MERGE,
        )

    def factors() -> LowRank:
        change = LowRank(scale * adapter.tensor(module.keys[up]).float(), adapter.tensor(module.keys[down]).float())
        return change.t() if transposed else change

    def rescaled() -> Tensor:
        source = adapter.tensor(whole[module.parameter]) if module.parameter in whole else None
        W = base.tensor(tied.stored(module.parameter)) if source is None else source
        m = adapter.tensor(module.keys["lora_magnitude_vector"]).double().reshape(-1)
        return _dora(W.double(), factors().to(torch.float64).dense(), m, transposed, module.name, adapter)

    out: list[tuple[str, Term]] = []
    out.append((module.parameter, rescaled if "lora_magnitude_vector" in module.keys else factors))
    if "lora_B.bias" in module.keys:
        key = module.keys["lora_B.bias"]
        place = _parameter(base, adapter, f"{module.name}.bias", key, tied)
        out.append((place, lambda: scale * adapter.tensor(key).float()))
    return out


def _dora(W: Tensor, change: Tensor, m: Tensor, transposed: bool, name: str, adapter: Checkpoint) -> Tensor:
    """m * (W + change) / |W + change|_row - W, in float64 because it is a small difference of large numbers."""
    axis = 0 if transposed else 1
    moved = W + change
    if m.numel() != moved.shape[1 - axis]:
        raise InputError(
            got=f"{adapter.path} with {m.numel()} magnitudes for {name}",
            expected=f"{moved.shape[1 - axis]}, one for each output",
            remedy="give the base that the adapter was trained on",
        )
    factor: Tensor = m / torch.linalg.norm(moved, dim=axis)
    return (factor.unsqueeze(axis) * moved - W).float()


def _scale(settings: dict[str, Any], module: str, adapter: Checkpoint) -> tuple[float, int]:
    """(scale, rank) of a module: r and lora_alpha, or what the first pattern that ends its name says."""
    try:
        rank = int(_by_pattern(settings.get("rank_pattern") or {}, module, settings["r"]))
        alpha = float(_by_pattern(settings.get("alpha_pattern") or {}, module, settings["lora_alpha"]))
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, re.error) as error:
        raise InputError(
            got=f"{adapter.path}/adapter_config.json whose r, lora_alpha or patterns are not usable ({error!r})",
            expected="r and lora_alpha as PEFT writes them",
            remedy="save the adapter again",
        ) from error
    return scale, rank


def _by_pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _difference(base: Parameters, adapter: Checkpoint, parameter: str, key: str, tied: TiedHead) -> Term:
    """saved - base of a tensor that the adapter holds whole (modules_to_save, biases, saved embeddings)."""
    stored = tied.stored(parameter)
    if adapter.shapes[key] != base.shape(stored):
        raise InputError(
            got=f"{adapter.path} with {key!r} of shape {adapter.shapes[key]}",
            expected=f"shape {base.shape(stored)}, as {parameter} has in the base",
            remedy="give the base that it was trained on, before tokens were added",
        )
    return lambda: adapter.tensor(key).float() - base.tensor(stored).float()


def _stray(adapter: Checkpoint, key: str) -> InputError:
    return InputError(got=f"{adapter.path} with {key!r}", expected="LoRA or DoRA factors", remedy=_MERGE)
