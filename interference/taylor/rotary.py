"""Rotary positions, x cos + (-x2, x1) sin, without storing the turned halves.

Models write them in elementary operations. A negated jet, its concatenation with another, and that times a plain tensor are held
back until they are added to something; used in any other way, they are computed as they stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from interference.taylor.basis import lift
from interference.taylor.deferred import Deferred
from interference.taylor.jet import Jet, Weight, check, rule, stamp


class Negative(Deferred):
    """-x."""

    def compute(self, x: Tensor) -> Tensor:
        return -x


class Turned(Deferred):
    """(-source, other), one behind the other along the last dimension, times a plain tensor if there is one."""

    other: Jet
    by: Tensor | None

    def compute(self, x: Tensor) -> Tensor:
        y = torch.cat([-x, self.other.coef], -1)
        return y if self.by is None else lift(y, self.by.dim()) * self.by

    def times(self, by: Any) -> Turned | None:
        """The same times a plain tensor; None if it cannot be held back."""
        if not self.pending or self.by is not None or not isinstance(by, Tensor) or by.dim() > self.dim():
            return None
        if by.shape[-1] != self.shape[-1] or torch.broadcast_shapes(by.shape, self.shape) != self.shape:
            return None
        return _turned(self.source, self.other, by)

    def plus(self, x: Jet) -> Jet | None:
        """The sum with another jet of the same shape, in one pass; None if it cannot be done so."""
        if not self.pending or self.by is None or x.shape != self.shape or len(x.coef) != len(self.other.coef):
            return None
        check(self.stamps)
        coef, half = x.coef, self.source.shape[-1]
        y = self.basis.pool.like(coef.shape, coef, coef.dtype)
        torch.addcmul(coef[..., :half], self.source.coef, self.by[..., :half], value=-1, out=y[..., :half])
        torch.addcmul(coef[..., half:], self.other.coef, self.by[..., half:], out=y[..., half:])
        return Jet(self.basis, y)


def _turned(source: Jet, other: Jet, by: Tensor | None = None) -> Turned:
    made: Turned = Turned(source, (*source.shape[:-1], source.shape[-1] + other.shape[-1]))
    made.other, made.by = other, by
    made.stamps = stamp(source.coef, other.coef, by)
    return made


def turned(pieces: Sequence[Any], dim: int) -> Turned | None:
    """A concatenation held back; None if it is not of that form."""
    if (
        len(pieces) != 2
        or not isinstance(pieces[0], Negative)
        or not pieces[0].pending
        or not isinstance(pieces[1], Jet)
    ):
        return None
    first, other = pieces
    same = first.shape[:-1] == other.shape[:-1] and len(first.source.coef) == len(other.coef)
    if dim not in (-1, first.dim() - 1) or not same or isinstance(other, Weight):
        return None
    check(first.stamps)
    return _turned(first.source, other)


@rule("neg", "negative")
def _neg(x: Jet) -> Jet:
    negative: Jet = x.mapped(torch.neg) if isinstance(x, Weight) else Negative(x)
    return negative
