"""A causal LM as curvlinops wants it: a module that maps a mini-batch to predictions, and labels beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from interference.domain import Batch


class CompositeSiLU(TorchFunctionMode):
    """SiLU as x sigmoid(x).

    curvlinops multiplies under no_grad, where torch has no forward mode for the backward pass of its own SiLU ("Trying to use
    forward AD with aten::silu_backward that does not support it", torch 2.13).
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.silu:
            return args[0] * torch.sigmoid(args[0])
        return func(*args, **(kwargs or {}))


class ResponseLogits(nn.Module):
    """{input_ids, targets} to the logits that predict the targets, (N, V), in row-major order."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        with CompositeSiLU():
            logits: Tensor = self.module(x["input_ids"], use_cache=False, **keep(self.module, x["targets"])).logits
        row, column = x["targets"].nonzero(as_tuple=True)
        return logits[row, column - 1 - x["targets"].shape[1] + logits.shape[1]]


def keep(module: nn.Module, targets: Tensor) -> dict[str, int]:
    """The option that spares transformers' models the logits before the first response token; nothing for other models."""
    first = int(targets.any(0).nonzero()[0])
    return {"logits_to_keep": targets.shape[1] - first + 1} if hasattr(module, "generate") else {}


def data(batches: list[Batch]) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Batches as curvlinops' mini-batches; their size, for its averages, is `size`."""
    return [({"input_ids": b.input_ids, "targets": b.targets}, b.input_ids[b.targets]) for b in batches]


def size(x: dict[str, Tensor]) -> int:
    """Sequences in a mini-batch: curvlinops' batch_size_fn."""
    return len(x["input_ids"])
