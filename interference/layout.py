"""Layouts: which output of a linear map belongs to which module, attention head or MLP channel.

A layout is only given where the sizes fit each other, or where it is known for a class that fuses several maps in one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from interference.records import MODULES

KINDS = ("query", "key_value")
CODE = {name: i for i, name in enumerate(MODULES)}
Labels = dict[str, NDArray[np.int32]]
FIELDS = ("layer", "module", "kind", "head", "expert", "channel")
# How classes that fuse q, k and v, or gate and up, in one matrix lay out its outputs. Others stay unsplit.
FUSED = {
    "GPT2Attention": "concatenated",
    "Phi3Attention": "concatenated",
    "GPTNeoXAttention": "interleaved",
    "BloomAttention": "interleaved",
    "Phi3MLP": "concatenated",
    "GlmMLP": "concatenated",
    "Glm4MLP": "concatenated",
}


@dataclass(frozen=True)
class Projection:
    """A module that maps its last dimension linearly, by path; `linear` says whether its weight can be split."""

    path: str
    module: nn.Module

    @property
    def linear(self) -> bool:
        return isinstance(self.module, nn.Linear) or self._transposed

    @property
    def _transposed(self) -> bool:
        return type(self.module).__name__ == "Conv1D"  # of transformers: weight (in, out)

    def axis(self, side: str) -> int:
        """The weight's axis of the outputs ("out") or inputs ("in")."""
        return int((side == "in") != self._transposed)

    def size(self, side: str) -> int:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return int(weight.shape[self.axis(side)])


@dataclass(frozen=True)
class Block:
    """An attention or an MLP: what hands on the outputs of the projections that open it, the projection that closes
    it, and the labels of those outputs."""

    what: str
    module: nn.Module
    sources: dict[str, nn.Module]
    closer: Projection
    labels: dict[str, dict[str, NDArray[np.int32]]]

    @property
    def size(self) -> int:
        """Inputs of the closing projection per unit: a head's dimension, or 1."""
        if self.what == "channels":
            return 1
        return self.closer.size("in") // self.queries

    @property
    def queries(self) -> int:
        return 1 + max(int(v["head"][v["kind"] == 0].max(initial=-1)) for v in self.labels.values())

    @property
    def groups(self) -> int:
        return 1 + max(int(v["head"][v["kind"] == 1].max(initial=-1)) for v in self.labels.values())

    def touched(self, kind: int, unit: int) -> NDArray[np.intp]:
        """Inputs of the closing projection that a unit may reach."""
        if self.what == "channels":
            return np.array([unit])
        share = self.queries // self.groups if kind == 1 else 1
        width = share * self.size
        return np.arange(unit * width, (unit + 1) * width)


def attention_outputs(module: nn.Module, roles: dict[str, Projection], heads: int) -> dict[str, Labels] | None:
    """Labels of the outputs of q, k and v, or of the map that fuses them, by role; None where the sizes do not fit."""
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
        "q": labels_of("q", kind=0, head=np.arange(heads * size) // size),
        "k": labels_of("k", kind=1, head=np.arange(rest) // size),
        "v": labels_of("v", kind=1, head=np.arange(rest) // size),
    }
    if not fused:
        return each
    layout = FUSED.get(type(module).__name__)
    if layout is None or outputs["qkv"] != (heads + 2 * groups) * size or (layout == "interleaved" and groups != heads):
        return None
    return {"qkv": interleave(each, size) if layout == "interleaved" else join(each)}


def labels_of(module: str, **others: int | NDArray[Any]) -> Labels:
    size = max(np.size(v) for v in others.values())
    return {
        f: np.broadcast_to(np.asarray(v, np.int32), size)
        for f, v in {"module": np.array(CODE[module]), **others}.items()
    }


def join(parts: dict[str, Labels]) -> Labels:
    """One part after the other."""
    return {f: np.concatenate([p[f] for p in parts.values()]) for f in next(iter(parts.values()))}


def interleave(parts: dict[str, Labels], size: int) -> Labels:
    """`size` rows of each part in turn."""
    return {
        f: np.stack([p[f].reshape(-1, size) for p in parts.values()], axis=1).reshape(-1)
        for f in next(iter(parts.values()))
    }


def mlp_outputs(module: nn.Module, roles: dict[str, Projection]) -> dict[str, Labels] | None:
    """Labels of the outputs of gate and up, or of the map that fuses them, by role; None where the sizes do not fit."""
    if not all(p.linear for p in roles.values()):
        return None
    width = roles["down"].size("in")
    each = {r: labels_of(r, channel=np.arange(width)) for r in ("gate", "up")}
    if "gate_up" not in roles:
        fits = all(roles[r].size("out") == width for r in each if r in roles)
        return {r: each[r] for r in each if r in roles} if fits else None
    layout = FUSED.get(type(module).__name__)
    if layout != "concatenated" or roles["gate_up"].size("out") != 2 * width:
        return None
    return {"gate_up": join(each)}


def repeat(labels: Labels, experts: int) -> Labels:
    """The same labels for every expert, numbered."""
    size = len(labels["module"])
    return {f: np.tile(v, experts) for f, v in labels.items()} | {
        "expert": np.repeat(np.arange(experts, dtype=np.int32), size)
    }
