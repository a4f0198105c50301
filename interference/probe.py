"""Probe: does a model's forward pass use a block's outputs as a layout says? Two short passes through the model's own code.

A projection's outputs that a layout gives to one head (or channel) are shifted by a hook; then the inputs of the closing
projection (o, or down) may change at that head (that channel) only, and must change there. A query head is one head of o's
inputs; a key-value head serves the query heads of its group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from interference.model import Model

_TOKENS = 6


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


@torch.no_grad()
def disagreement(model: Model, block: Block) -> str:
    """Why a block's layout is not the forward pass's; empty when it is."""
    still = _closing_inputs(model, block, None, None)
    if still is None:
        return "the forward pass does not run through it"
    for role, labels in block.labels.items():
        for module in np.unique(labels["module"]):
            mine = labels["module"] == module
            of_unit = labels["channel"] if block.what == "channels" else labels["head"]
            unit = int(of_unit[mine].max())  # the last one: 0 fits too many layouts
            kind = 0 if block.what == "channels" else int(labels["kind"][mine][0])
            moved = _closing_inputs(model, block, role, np.flatnonzero(mine & (of_unit == unit)))
            if moved is None or moved.shape != still.shape:
                return "the forward pass does not run through it"
            changed = (moved != still).reshape(-1, still.shape[-1]).any(0).cpu().numpy()
            expected = np.zeros(len(changed), bool)
            expected[block.touched(kind, unit)] = True
            if not changed.any() or (changed & ~expected).any():
                return "moving one of them in the forward pass moves others"
    return ""


def _closing_inputs(model: Model, block: Block, role: str | None, outputs: NDArray[np.intp] | None) -> Tensor | None:
    """What reaches the closing projection, with some outputs of an opening projection shifted."""
    seen: list[Tensor] = []

    def shift(_: nn.Module, __: Any, y: Tensor) -> Tensor:
        index = torch.as_tensor(outputs, device=y.device)
        ramp = torch.linspace(0.5, 1.5, y.shape[-2] if y.dim() > 1 else 1, dtype=y.dtype, device=y.device)
        return y.index_add(-1, index, ramp[:, None].expand(*y.shape[:-1], len(index)))

    hooks = [block.closer.module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))]
    if role is not None:
        hooks.append(block.sources[role].register_forward_hook(shift))
    vocabulary = getattr(getattr(model.module, "config", None), "vocab_size", _TOKENS)
    ids = torch.arange(_TOKENS, device=model.device)[None] % vocabulary
    try:
        model.forward(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return seen[0] if seen else None
