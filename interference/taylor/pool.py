"""Buffers that are used again within a run, so that a CPU does not fetch fresh pages for every intermediate result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

SMALL = 2**16  # numbers; below this the allocator reuses pages by itself


def _references(x: Tensor) -> int:
    count: int = torch._C._storage_Use_Count(x.untyped_storage()._cdata)
    return count


def _alone() -> int | None:
    """The count of references to a storage that one tensor holds; None if this torch does not tell."""
    x = torch.empty(1)
    try:
        alone = _references(x)
        view = x[:]
        return alone if _references(x) == alone + 1 and view is not None else None
    except (AttributeError, TypeError):
        return None


ALONE = _alone()


@dataclass(frozen=True)
class Pool:
    """Hands out uninitialised tensors; a buffer is free again when no other tensor refers to its storage.

    Buffers come in powers of two, so that tensors of different shapes share them; what is never touched takes no memory.
    """

    buffers: dict[tuple[int, torch.dtype], list[Tensor]] = field(default_factory=dict)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised, contiguous tensor."""
        count = math.prod(shape)
        if count < SMALL or device.type != "cpu" or ALONE is None:
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        power = (count - 1).bit_length()
        known = self.buffers.setdefault((power, dtype), [])
        free = next((b for b in known if _references(b) <= ALONE), None)
        if free is None:
            free = torch.empty(2**power, dtype=dtype)
            known.append(free)
        return free[:count].view(tuple(shape))

    def like(self, shape: Sequence[int], x: Tensor, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor of a shape, with its dimensions in memory in the order of x's where x is dense."""
        if len(shape) != x.dim() or x.is_contiguous() or 0 in x.stride():
            return self.empty(shape, dtype, x.device)
        order = sorted(range(x.dim()), key=lambda d: x.stride()[d], reverse=True)
        back = [order.index(d) for d in range(x.dim())]
        return self.empty([shape[d] for d in order], dtype, x.device).permute(back)
