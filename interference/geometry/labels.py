"""Which layer, module, attention heads and MLP channels the tensors of a checkpoint belong to, without loading a weight.

The model is laid out on torch's meta device, where it has structure but no numbers, and read by `anatomy`. Tensors that the model
keeps under other names, or all tensors where transformers does not know the model, are told by their names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from interference import anatomy
from interference.layout import CODE, FIELDS
from interference.model import Model, spellings
from interference.pairing import Base
from interference.records import MODULES

_BY_NAME = (
    (r"(^|\.)(q|k|v|o)_proj\.", None),
    (r"(^|\.)(gate|up|down)_proj\.", None),
    (r"(embed_tokens|wte|wpe|embed_positions|embed_in)\.", "embedding"),
    (r"(lm_head|embed_out)\.", "head"),
    (r"(norm|ln_\w+|layernorm)\w*\.", "norm"),
    (r"(router|mlp\.gate)\.", "router"),
)
_CHANNELS = {"gate": 0, "up": 0, "down": 1}


@dataclass(frozen=True, eq=False)
class Part:
    """A tensor's place. axes: along which its units lie; units: FIELDS, an array each; layer -1: outside of all."""

    layer: int
    module: str
    axes: tuple[int, ...]
    units: dict[str, NDArray[np.int32]]


def outline(base: Base, names: Sequence[str]) -> tuple[dict[str, Part], tuple[str, ...]]:
    """The place of every named parameter, and notes on what could not be told."""
    module = base.conversion.module
    if module is None:
        note = "transformers does not lay out this model: modules are told by tensor names, heads not at all"
        return {n: by_name(n, base.parameters.shape(n)) for n in names}, (note,)
    known = anatomy.read(Model(module, dict(module.named_parameters())), probe=False)
    prefix, parts, odd = getattr(module, "base_model_prefix", ""), {}, []
    for name in names:
        shape = base.parameters.shape(name)
        found = next((n for n in spellings(name, prefix) if n in known.places and known.shapes[n] == shape), None)
        parts[name] = by_name(name, shape) if found is None else _of_anatomy(known, found)
        odd += [name] if found is None else []
    told = (
        (f"told by their names alone, being no parameters of transformers' model: {', '.join(odd)}"[:500],)
        if odd
        else ()
    )
    return parts, (*known.notes, *told)


def _of_anatomy(known: anatomy.Anatomy, name: str) -> Part:
    place = known.places[name]
    units = {f: known.labels[f][place] for f in FIELDS}
    return Part(int(units["layer"][0]), _one_module(units["module"]), known.axes[name], units)


def _one_module(codes: NDArray[np.int32]) -> str:
    """The name of a tensor's module; one that fuses several has a name of its own."""
    kinds = {MODULES[i] for i in np.unique(codes)}
    if len(kinds) == 1:
        return kinds.pop()
    return {frozenset("qkv"): "qkv", frozenset({"gate", "up"}): "gate_up"}.get(frozenset(kinds), "other")


def by_name(name: str, shape: Sequence[int]) -> Part:
    """A tensor's place as its name tells it: the first number is the layer; channels of gate, up and down, no heads.

    >>> part = by_name("model.layers.3.mlp.experts.1.down_proj.weight", (8, 16))
    >>> part.layer, part.module, part.axes, int(part.units["expert"][0]), len(part.units["channel"])
    (3, 'down', (1,), 1, 16)
    """
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", f".{name}.")
    layer = int(numbers[0]) if numbers else -1
    module = "other"
    for pattern, kind in _BY_NAME:
        match = re.search(pattern, name)
        if match:
            module = kind or match.group(2)
            break
    expert = re.search(r"experts\.(\d+)\.", name)
    given: dict[str, Any] = {"layer": layer, "module": CODE[module], "expert": int(expert.group(1)) if expert else -1}
    axes: tuple[int, ...] = ()
    if module in _CHANNELS and len(shape) == 2:
        axes = (_CHANNELS[module],)
        given["channel"] = np.arange(shape[axes[0]])
    size = shape[axes[0]] if axes else 1
    units = {f: np.broadcast_to(np.asarray(given.get(f, -1), np.int32), size) for f in FIELDS}
    return Part(layer, module, axes, units)
