"""Anatomy: where every coordinate of a model's parameters belongs: layer, module, attention head, MLP channel.

A parameter's *units* are the finest parts that it is split into: the rows of q, k, v, gate and up, the columns of o and down,
and one unit for anything else. Every coordinate belongs to exactly one unit and every unit to exactly one module, so sums over
units always make up the whole. Heads and channels are only told where the layout is known from the structure (sizes that fit
each other, layouts of known classes) and a probe of the model's own forward pass agrees (`probe`); where they are not, the
units keep their module and `notes` says so. Channels of fused experts (all of a layer in one tensor) are not probed: their layout
is what transformers' class says of itself (`is_transposed`, `is_concatenated`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from interference.errors import InputError, nearest
from interference.layout import (
    CODE,
    FIELDS,
    KINDS,
    Block,
    Labels,
    Projection,
    attention_outputs,
    interleave,
    join,
    labels_of,
    mlp_outputs,
    repeat,
)
from interference.model import Model
from interference.probe import disagreement
from interference.records import MODULES

_ATTENTION = {
    "q": {"q", "q_proj", "query"},
    "k": {"k", "k_proj", "key"},
    "v": {"v", "v_proj", "value"},
    "o": {"o", "o_proj", "out_proj", "dense", "c_proj"},
    "qkv": {"qkv", "qkv_proj", "query_key_value", "c_attn", "Wqkv"},
}
_MLP = {
    "gate": {"gate", "gate_proj"},
    "up": {"up", "up_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h"},
    "gate_up": {"gate_up_proj"},
    "down": {"down", "down_proj", "fc2", "fc_out", "c_proj", "dense_4h_to_h"},
}
_NAMES: dict[str, tuple[Any, ...]] = {"module": MODULES, "kind": KINDS}
_ROUTERS = {"router", "gate", "shared_expert_gate"}


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The units of a model's parameters, U in all, one parameter after the other.

    labels: FIELDS, (U,) each; `module` and `kind` index MODULES and KINDS; -1 where there is none. places: a parameter's units.
    notes: what could not be told.
    """

    labels: Labels
    places: dict[str, slice]
    axes: dict[str, tuple[int, ...]]
    shapes: dict[str, torch.Size]
    notes: tuple[str, ...] = ()

    @property
    def units(self) -> int:
        return len(self.labels["module"])

    def sums(self, name: str, values: Tensor) -> Tensor:
        """Sums of a tensor of the parameter's shape over the coordinates of each of its units, in float64."""
        others = [a for a in range(values.dim()) if a not in self.axes[name]]
        reduced = values.sum(others, dtype=torch.float64) if others else values.double()
        return reduced.reshape(-1)

    def _values(self, name: str) -> list[Any]:
        """The values of one label that occur, by name where they have names."""
        found = np.unique(self.labels[name]).tolist()
        return [_NAMES[name][i] for i in found if i >= 0] if name in _NAMES else found

    def masks(self, **wanted: int | str) -> dict[str, Tensor]:
        """Boolean masks of the coordinates with these labels, {parameter: mask}; what `Update.restrict` takes.

        `anatomy.masks(layer=3, module="down")`, `anatomy.masks(kind="query", head=2)`. Parameters without any are left out, so
        labels that exist but never together (a head of an MLP's module) give an empty dictionary.

        Raises InputError for a label that is not one of FIELDS, and for a value that no unit of this model has.
        """
        keep = np.ones(self.units, dtype=bool)
        for name, value in wanted.items():
            known: Sequence[Any] = FIELDS if name not in FIELDS else self._values(name)
            if name not in FIELDS or isinstance(value, bool) or value not in known:
                remedy = nearest(str(value if name in FIELDS else name), map(str, known))
                raise InputError(got=f"{name}={value!r}", expected="a label of this model's anatomy", remedy=remedy)
            keep &= self.labels[name] == (_NAMES[name].index(value) if name in _NAMES else value)
        out = {}
        for name, place in self.places.items():
            if keep[place].any():
                shape = self.shapes[name]
                ones = [shape[a] if a in self.axes[name] else 1 for a in range(len(shape))]
                out[name] = torch.from_numpy(keep[place].copy()).reshape(ones).expand(shape)
        return out


@dataclass
class _Draft:
    """Labels of the parameters told so far."""

    model: Model
    probe: bool = True
    found: dict[str, tuple[tuple[int, ...], Labels]] = field(default_factory=dict)
    taken: set[tuple[str, int, int]] = field(default_factory=set)
    notes: dict[str, None] = field(default_factory=dict)
    trusted: dict[type, str] = field(default_factory=dict)

    def add(self, name: str, layer: int, axes: tuple[int, ...] = (), **labels: Any) -> None:
        if name in self.model.parameters:
            size = int(np.prod([self.model.parameters[name].shape[a] for a in axes], dtype=int))
            given = {"layer": layer, **labels}
            self.found[name] = (
                axes,
                {f: np.broadcast_to(np.asarray(given.get(f, -1), np.int32), size) for f in FIELDS},
            )

    def module(self, path: str, layer: int, module: str) -> None:
        """Everything below `path` belongs to one module."""
        for name in self.model.parameters:
            if name.startswith(f"{path}."):
                self.add(name, layer, module=CODE[module])

    def split(self, projection: Projection, layer: int, side: str, **labels: Any) -> None:
        """A linear map's outputs (rows and bias) or inputs (columns) as units."""
        self.add(f"{projection.path}.weight", layer, (projection.axis(side),), **labels)
        if side == "out":
            self.add(f"{projection.path}.bias", layer, (0,), **labels)

    def claim(self, what: str, layer: int, expert: int, path: str) -> bool:
        """False for a second block of one kind in a layer: its heads or channels would be counted with the first one's."""
        if (what, layer, expert) in self.taken:
            self.notes[f"{what} of {path} not told: its layer has another such block"] = None
            return False
        self.taken.add((what, layer, expert))
        return True


def read(model: Model, *, probe: bool = True) -> Anatomy:
    """The anatomy of a model, from its modules' structure; without `probe`, no forward pass is asked whether it agrees (a
    model on torch's meta device can run none).

    Raises InputError for a model without parameters.
    """
    if not model.parameters:
        raise InputError(got="a model without parameters", expected="a language model", remedy="load a checkpoint")
    draft = _Draft(model, probe)
    for name in model.parameters:
        draft.add(name, _layer(model.module, name), module=CODE[_kind(model.module, name)])
    for path, module in model.module.named_modules():
        if any(getattr(module, n, None) is not None for n in ("gate_up_proj", "down_proj")) and _is_fused_experts(
            module
        ):
            _experts(draft, path, module)
            continue
        children = dict(module.named_children())
        attention = _roles(path, children, _ATTENTION)
        if {"q", "qkv"} & attention.keys():
            _attention(draft, path, module, attention)
            continue
        if "experts" in children:
            for name in _ROUTERS & children.keys():
                draft.module(f"{path}.{name}", _layer(model.module, path + "."), "router")
            continue
        mlp = _roles(path, children, _MLP)
        if "down" in mlp and {"up", "gate_up"} & mlp.keys():
            _mlp(draft, path, module, mlp)
    return _assemble(draft)


def _assemble(draft: _Draft) -> Anatomy:
    places, start = {}, 0
    for name, (_, labels) in draft.found.items():
        size = len(labels["module"])
        places[name] = slice(start, start + size)
        start += size
    labels = {f: np.concatenate([part[f] for _, part in draft.found.values()]) for f in FIELDS}
    axes = {name: axes for name, (axes, _) in draft.found.items()}
    shapes = {name: draft.model.parameters[name].shape for name in axes}
    return Anatomy(labels, places, axes, shapes, tuple(draft.notes))


def _layer(root: nn.Module, name: str) -> int:
    """The place in the outermost list of modules on the way to a parameter; -1 outside of all."""
    here: Any = root
    for part in name.split(".")[:-1]:
        if isinstance(here, nn.ModuleList):
            return int(part)
        here = getattr(here, part)
    return -1


def _expert(root: nn.Module, path: str) -> int:
    """The place in a list called `experts`; -1 outside of all."""
    parts = path.split(".")
    for i, part in enumerate(parts[:-1]):
        if part == "experts" and parts[i + 1].isdigit():
            return int(parts[i + 1])
    return -1


def _kind(root: nn.Module, name: str) -> str:
    """What a parameter is outside of attention and MLP: embedding, head, both in one, norm, router or other."""
    path = name.rpartition(".")[0]
    owner = root.get_submodule(path)
    ends = {}
    for which in ("input", "output"):
        get = getattr(root, f"get_{which}_embeddings", None)
        ends[which] = get() if get is not None else None
    weights = [getattr(end, "weight", None) for end in ends.values()]
    tied = weights[0] is not None and weights[0] is weights[1]
    if tied and name.endswith(".weight") and any(owner is end for end in ends.values()):
        return "embedding + head"
    if isinstance(owner, nn.Embedding) or owner is ends["input"]:
        return "embedding"
    if owner is ends["output"]:
        return "head"
    if "norm" in type(owner).__name__.lower() or "norm" in path.rpartition(".")[2].lower():
        return "norm"
    return "router" if "router" in type(owner).__name__.lower() else "other"


def _roles(path: str, children: dict[str, nn.Module], names: dict[str, set[str]]) -> dict[str, Projection]:
    prefix = f"{path}." if path else ""
    return {
        role: Projection(prefix + child, module)
        for role, known in names.items()
        for child, module in children.items()
        if child in known
    }


def _attention(draft: _Draft, path: str, module: nn.Module, roles: dict[str, Projection]) -> None:
    layer = _layer(draft.model.module, path + ".")
    for role, projection in roles.items():
        draft.module(projection.path, layer, role)
    config = getattr(draft.model.module, "config", None)
    parts = attention_outputs(module, roles, getattr(config, "num_attention_heads", 0) or 0)
    if parts is None:
        draft.notes[f"heads not told apart in {type(module).__name__}: its layout is not known"] = None
        return
    for role, labels in parts.items():
        draft.split(roles[role], layer, "out", module=labels["module"])
    block = Block("heads", module, {r: _source(module, roles[r]) for r in parts}, roles["o"], parts)
    if _agrees(draft, block) and draft.claim("heads", layer, -1, path):
        for role, labels in parts.items():
            draft.split(roles[role], layer, "out", **labels)
        size = block.size
        heads = np.arange(roles["o"].size("in")) // size
        draft.split(roles["o"], layer, "in", module=CODE["o"], kind=0, head=heads)


def _source(module: nn.Module, projection: Projection) -> nn.Module:
    """What hands a projection's outputs on: itself, or a norm over all its heads at once, which mixes their scales."""
    role = projection.path.rpartition(".")[2].removesuffix("_proj")
    norm = getattr(module, f"{role}_norm", None)
    weight = dict(norm.named_parameters()).get("weight") if isinstance(norm, nn.Module) else None
    whole = weight is not None and weight.numel() == projection.size("out")
    return norm if isinstance(norm, nn.Module) and whole else projection.module


def _mlp(draft: _Draft, path: str, module: nn.Module, roles: dict[str, Projection]) -> None:
    layer, expert = _layer(draft.model.module, path + "."), _expert(draft.model.module, path)
    for role, projection in roles.items():
        draft.module(projection.path, layer, role)
    parts = mlp_outputs(module, roles)
    if parts is None:
        draft.notes[f"channels not told apart in {type(module).__name__}: its layout is not known"] = None
        return
    for role, labels in parts.items():
        draft.split(roles[role], layer, "out", module=labels["module"])
    block = Block("channels", module, {r: roles[r].module for r in parts}, roles["down"], parts)
    if _agrees(draft, block) and draft.claim("channels", layer, expert, path):
        for role, labels in parts.items():
            draft.split(roles[role], layer, "out", expert=expert, **labels)
        channels = np.arange(roles["down"].size("in"))
        draft.split(roles["down"], layer, "in", module=CODE["down"], expert=expert, channel=channels)


def _agrees(draft: _Draft, block: Block) -> bool:
    """Whether the model's own forward pass agrees with a block's layout; asked once for each class of blocks."""
    kind = type(block.module)
    if kind not in draft.trusted:
        draft.trusted[kind] = disagreement(draft.model, block) if draft.probe else ""
    if draft.trusted[kind]:
        draft.notes[f"{block.what} not told apart in {kind.__name__}: {draft.trusted[kind]}"] = None
    return not draft.trusted[kind]


def _is_fused_experts(module: nn.Module) -> bool:
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.dim() == 3


def _experts(draft: _Draft, path: str, module: nn.Module) -> None:
    """Experts in one three-dimensional tensor each; transformers' classes say how they are laid out."""
    layer = _layer(draft.model.module, path + ".")
    draft.module(path, layer, "experts")
    transposed, joined = getattr(module, "is_transposed", None), getattr(module, "is_concatenated", None)
    if transposed is None or joined is None or not draft.claim("channels", layer, 0, path):
        draft.notes[f"channels not told apart in {type(module).__name__}: its layout is not known"] = None
        return
    shape = draft.model.parameters[f"{path}.down_proj"].shape
    experts, width = shape[0], shape[1 if transposed else 2]
    each = {r: labels_of(r, channel=np.arange(width)) for r in ("gate", "up")}
    outputs = {
        "gate_up_proj": join(each) if joined else interleave(each, 1),
        "gate_proj": each["gate"],
        "up_proj": each["up"],
    }
    axis = 2 if transposed else 1
    for name, labels in outputs.items():
        for leaf, axes in ((name, (0, axis)), (f"{name}_bias", (0, 1))):
            if getattr(module, leaf, None) is not None:
                draft.add(f"{path}.{leaf}", layer, axes, **repeat(labels, experts))
    down = repeat(labels_of("down", channel=np.arange(width)), experts)
    draft.add(f"{path}.down_proj", layer, (0, 3 - axis), **down)
    draft.add(f"{path}.down_proj_bias", layer, module=CODE["down"])
