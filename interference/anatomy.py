"""Anatomy: where every coordinate of a model's parameters belongs: layer, module, attention head, MLP channel.

A parameter's *units* are the finest parts that it is split into: the rows of q, k, v, gate and up, the columns of o and down,
and one unit for anything else. Every coordinate belongs to exactly one unit and every unit to exactly one module, so sums over
units always make up the whole. Heads and channels are only told where the layout is known from the structure (sizes that fit
each other, layouts of known classes) and a probe of the model's own forward pass agrees (`probe`); where they are not, the
units keep their module and `notes` says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from interference.errors import InputError
from interference.model import Model
from interference.probe import Block, Projection, disagreement

MODULES = (
    "embedding", "norm", "q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "router", "experts", "head", "other",
)  # fmt: skip
KINDS = ("query", "key_value")
_CODE = {name: i for i, name in enumerate(MODULES)}
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
_ROUTERS = {"router", "gate", "shared_expert_gate"}
# How classes that fuse q, k and v, or gate and up, in one matrix lay out its outputs. Others stay unsplit.
_FUSED = {
    "GPT2Attention": "concatenated",
    "Phi3Attention": "concatenated",
    "GPTNeoXAttention": "interleaved",
    "BloomAttention": "interleaved",
    "Phi3MLP": "concatenated",
    "GlmMLP": "concatenated",
    "Glm4MLP": "concatenated",
}

Labels = dict[str, NDArray[np.int32]]
FIELDS = ("layer", "module", "kind", "head", "expert", "channel")


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The units of a model's parameters, U in all, one parameter after the other.

    labels: FIELDS, (U,) each; `module` and `kind` index MODULES and KINDS; -1 where there is none. places: a parameter's units.
    notes: what could not be told.
    """

    labels: Labels
    places: dict[str, slice]
    axes: dict[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()

    @property
    def units(self) -> int:
        return len(self.labels["module"])

    def sums(self, name: str, values: Tensor) -> Tensor:
        """Sums of a tensor of the parameter's shape over the coordinates of each of its units, in float64."""
        others = [a for a in range(values.dim()) if a not in self.axes[name]]
        reduced = values.sum(others, dtype=torch.float64) if others else values.double()
        return reduced.reshape(-1)


@dataclass
class _Draft:
    """Labels of the parameters told so far."""

    model: Model
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
                self.add(name, layer, module=_CODE[module])

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


def read(model: Model) -> Anatomy:
    """The anatomy of a model, from its modules' structure.

    Raises InputError for a model without parameters.
    """
    if not model.parameters:
        raise InputError(got="a model without parameters", expected="a language model", remedy="load a checkpoint")
    draft = _Draft(model)
    for name in model.parameters:
        draft.add(name, _layer(model.module, name), module=_CODE[_kind(model.module, name)])
    for path, module in model.module.named_modules():
        if any(getattr(module, n, None) is not None for n in ("gate_up_proj", "down_proj")) and _is_fused_experts(module):
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
    return Anatomy(labels, places, {name: axes for name, (axes, _) in draft.found.items()}, tuple(draft.notes))


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
    """embedding, head, norm, router or other: what a parameter is outside of attention and MLP."""
    path = name.rpartition(".")[0]
    owner = root.get_submodule(path)
    ends = {}
    for which in ("input", "output"):
        get = getattr(root, f"get_{which}_embeddings", None)
        ends[which] = get() if get is not None else None
    if isinstance(owner, nn.Embedding) or owner is ends["input"]:
        return "embedding"
    if owner is ends["output"]:
        tied = getattr(ends["input"], "weight", None) is getattr(owner, "weight", None)
        return "embedding" if tied and name.endswith(".weight") else "head"
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
    parts = _attention_parts(draft.model, module, roles)
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
        draft.split(roles["o"], layer, "in", module=_CODE["o"], kind=0, head=heads)


def _source(module: nn.Module, projection: Projection) -> nn.Module:
    """What hands a projection's outputs on: itself, or a norm over all its heads at once, which mixes their scales."""
    role = projection.path.rpartition(".")[2].removesuffix("_proj")
    norm = getattr(module, f"{role}_norm", None)
    whole = norm is not None and getattr(norm, "weight", torch.empty(0)).numel() == projection.size("out")
    return norm if whole and norm is not None else projection.module


def _attention_parts(model: Model, module: nn.Module, roles: dict[str, Projection]) -> dict[str, Labels] | None:
    """Labels of the outputs of q, k and v, where sizes fit; None where they do not."""
    config = getattr(model.module, "config", None)
    heads = getattr(config, "num_attention_heads", 0) or 0
    if "o" not in roles or not heads or not all(p.linear for p in roles.values()):
        return None
    if roles["o"].size("in") % heads:
        return None
    size, fused = roles["o"].size("in") // heads, "qkv" in roles
    outputs = {r: p.size("out") for r, p in roles.items()}
    if not fused:
        if not {"q", "k", "v"} <= roles.keys() or outputs["q"] != heads * size or outputs["k"] != outputs["v"]:
            return None
        rest = outputs["k"]
    else:
        rest = (outputs["qkv"] - heads * size) // 2
    groups = rest // size if rest > 0 and rest % size == 0 else 0
    if not groups or heads % groups:
        return None
    each = {
        "q": _labels("q", kind=0, head=np.arange(heads * size) // size),
        "k": _labels("k", kind=1, head=np.arange(rest) // size),
        "v": _labels("v", kind=1, head=np.arange(rest) // size),
    }
    if not fused:
        return each
    layout = _FUSED.get(type(module).__name__)
    if layout is None or outputs["qkv"] != (heads + 2 * groups) * size or (layout == "interleaved" and groups != heads):
        return None
    return {"qkv": _interleave(each, size) if layout == "interleaved" else _join(each)}


def _labels(module: str, **others: NDArray[Any]) -> Labels:
    size = max(np.size(v) for v in others.values())
    return {
        f: np.broadcast_to(np.asarray(v, np.int32), size)
        for f, v in {"module": np.array(_CODE[module]), **others}.items()
    }


def _join(parts: dict[str, Labels]) -> Labels:
    """One part after the other."""
    return {f: np.concatenate([p[f] for p in parts.values()]) for f in next(iter(parts.values()))}


def _interleave(parts: dict[str, Labels], size: int) -> Labels:
    """`size` rows of each part in turn."""
    return {
        f: np.stack([p[f].reshape(-1, size) for p in parts.values()], axis=1).reshape(-1)
        for f in next(iter(parts.values()))
    }


def _mlp(draft: _Draft, path: str, module: nn.Module, roles: dict[str, Projection]) -> None:
    layer, expert = _layer(draft.model.module, path + "."), _expert(draft.model.module, path)
    for role, projection in roles.items():
        draft.module(projection.path, layer, role)
    parts = _mlp_parts(module, roles)
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
        draft.split(roles["down"], layer, "in", module=_CODE["down"], expert=expert, channel=channels)


def _mlp_parts(module: nn.Module, roles: dict[str, Projection]) -> dict[str, Labels] | None:
    if not all(p.linear for p in roles.values()):
        return None
    width = roles["down"].size("in")
    each = {r: _labels(r, channel=np.arange(width)) for r in ("gate", "up")}
    if "gate_up" not in roles:
        fits = all(roles[r].size("out") == width for r in each if r in roles)
        return {r: each[r] for r in each if r in roles} if fits else None
    layout = _FUSED.get(type(module).__name__)
    if layout != "concatenated" or roles["gate_up"].size("out") != 2 * width:
        return None
    return {"gate_up": _join(each)}


def _agrees(draft: _Draft, block: Block) -> bool:
    """Whether the model's own forward pass agrees with a block's layout; asked once for each class of blocks."""
    kind = type(block.module)
    if kind not in draft.trusted:
        draft.trusted[kind] = disagreement(draft.model, block)
    if draft.trusted[kind]:
        draft.notes[f"{block.what} not told apart in {kind.__name__}: {draft.trusted[kind]}"] = None
    return not draft.trusted[kind]


def _is_fused_experts(module: nn.Module) -> bool:
    return isinstance(getattr(module, "down_proj", None), nn.Parameter) and module.down_proj.dim() == 3


def _experts(draft: _Draft, path: str, module: nn.Module) -> None:
    """Experts in one three-dimensional tensor each; transformers' classes say how they are laid out."""
    layer = _layer(draft.model.module, path + ".")
    draft.module(path, layer, "experts")
    transposed, joined = getattr(module, "is_transposed", None), getattr(module, "is_concatenated", None)
    if transposed is None or joined is None or not draft.claim("channels", layer, 0, path):
        draft.notes[f"channels not told apart in {type(module).__name__}: its layout is not known"] = None
        return
    experts, width = module.down_proj.shape[0], module.down_proj.shape[1 if transposed else 2]
    each = {r: _labels(r, channel=np.arange(width)) for r in ("gate", "up")}
    outputs = {
        "gate_up_proj": _join(each) if joined else _interleave(each, 1),
        "gate_proj": each["gate"],
        "up_proj": each["up"],
    }
    axis = 2 if transposed else 1
    for name, labels in outputs.items():
        for leaf, axes in ((name, (0, axis)), (f"{name}_bias", (0, 1))):
            if getattr(module, leaf, None) is not None:
                draft.add(f"{path}.{leaf}", layer, axes, **_repeat(labels, experts))
    down = _repeat(_labels("down", channel=np.arange(width)), experts)
    draft.add(f"{path}.down_proj", layer, (0, 3 - axis), **down)
    draft.add(f"{path}.down_proj_bias", layer, module=_CODE["down"])


def _repeat(labels: Labels, experts: int) -> Labels:
    """The same labels for every expert, numbered."""
    size = len(labels["module"])
    return {f: np.tile(v, experts) for f, v in labels.items()} | {
        "expert": np.repeat(np.arange(experts, dtype=np.int32), size)
    }
