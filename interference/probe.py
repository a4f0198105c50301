"""Probe: does a model's forward pass use a block's outputs as a layout says? Two short passes through the model's own code.

A projection's outputs that a layout gives to one head (or channel) are shifted by a hook; then the inputs of the closing
projection (o, or down) may change at that head (that channel) only, and must change there. A query head is one head of o's
inputs; a key-value head serves the query heads of its group.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from interference.layout import Block
from interference.model import Model

_TOKENS = 6
_TRIES = 4


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
            last = int(of_unit[mine].max())  # the last ones: 0 fits too many layouts
            kind = 0 if block.what == "channels" else int(labels["kind"][mine][0])
            for unit in range(last, max(-1, last - _TRIES), -1):
                moved = _closing_inputs(model, block, role, np.flatnonzero(mine & (of_unit == unit)))
                if moved is None or moved.shape != still.shape:
                    return "the forward pass does not run through it"
                changed = (moved != still).reshape(-1, still.shape[-1]).any(0).cpu().numpy()
                if changed.any():  # else it is a dead one (a ReLU's, say), which tells nothing
                    break
            else:
                return f"moving any of the last {_TRIES} in the forward pass moves nothing"
            expected = np.zeros(len(changed), bool)
            expected[block.touched(kind, unit)] = True
            if (changed & ~expected).any():
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
