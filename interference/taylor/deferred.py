"""Quantities held back until it is known what follows, so that several steps are done together in a cache-sized block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from interference.taylor.basis import Basis
from interference.taylor.jet import Jet, Stamp, check, stamp, wrap

BLOCK = 2**17  # numbers in one block of a stack: a few such blocks fit a core's own cache
BLOCK_CUDA = 2**26


class Deferred(Jet):
    """A function of one jet, not computed yet. Looking at its coefficients computes it by the general rules."""

    source: Jet
    stamps: Stamp

    @staticmethod
    def __new__(cls, source: Jet, shape: Any = None) -> Any:
        shape = source.shape if shape is None else torch.Size(shape)
        strides = source.stride() if shape == source.shape else torch.empty(shape, device="meta").stride()
        self = wrap(cls, source.basis, shape, strides, source.coef, None)
        self.source, self.stamps = source, stamp(source.coef)
        return self

    @property
    def pending(self) -> bool:
        """Whether it can still be computed together with what follows."""
        return self._coef is None

    def _stack(self) -> Tensor:
        return self.compute(self.taken())

    def taken(self) -> Tensor:
        """The stack of the source, as it was when this was asked for."""
        check(self.stamps)
        return self.source.coef

    def compute(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def rows(x: Tensor) -> Tensor | None:
    """A stack [C, ..., w] seen as [C, n, w] without a copy, or None."""
    if x.dim() < 2 or not x.numel():
        return None
    try:
        return x.view(len(x), -1, x.shape[-1])
    except RuntimeError:
        return None


def strips(basis: Basis, like: Tensor) -> Iterator[slice]:
    """Cut the rows of [C, n, w] into blocks."""
    n, width = like.shape[1:]
    step = max(1, (BLOCK_CUDA if like.is_cuda else BLOCK) // (basis.size * width))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def blockwise(basis: Basis, f: Callable[..., Tensor], *stacks: Tensor) -> Tensor | None:
    """f(*stacks, out) of stacks of one shape, a block of rows at a time; None if they cannot be cut so.

    f writes the full stack that it returns into `out`, or into a new one where that is None.
    """
    x = stacks[0]
    if basis.size * x[0].numel() <= BLOCK:
        return f(*stacks, None)
    views = [v for s in stacks if (v := rows(s)) is not None]
    if len(views) < len(stacks):
        return None
    y = basis.pool.empty((basis.size, *x.shape[1:]), x.dtype, x.device)
    out = y.view(basis.size, -1, x.shape[-1])
    for part in strips(basis, out):
        f(*(v[:, part] for v in views), out[:, part])
    return y
