"""One pass over a tensor of the base and of N tuned models, block by block; only sums leave it, so that models far larger than
memory cost no more than a block of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from interference.geometry.projection import DIMS, Projection
from interference.geometry.sums import BF16, FULL, Accumulator, Sums

Rows = Callable[[int, int], Tensor]
READ = 1 << 23  # numbers of a tensor read at once
INNER = 1 << 17  # numbers worked on at once: enough to make the calls cheap, few enough for a core's cache


@dataclass(frozen=True)
class Source:
    """A tuned model's side of a tensor: `read` gives rows of its values, or of its change where it is known by that."""

    read: Rows
    change: bool = False


def matrix_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """A tensor as a stack of matrices, (matrices, rows, columns): (a, b, c) is a of b x c, a vector one row per number."""
    if len(shape) < 2:
        return 1, int(np.prod(shape, dtype=int)), 1
    return int(np.prod(shape[:-2], dtype=int)), int(shape[-2]), int(shape[-1])


def tensor_sums(
    name: str,
    shape: Sequence[int],
    base: Rows,
    tuned: Sequence[Source],
    axes: Sequence[int] = (),
    projection: Projection | None = None,
    numbers: int = READ,
) -> Sums:
    """Add up one tensor.

    shape: of the tensor. base, tuned: give rows start:stop of its first dimension. axes: those along which units lie, as
    `Anatomy.axes` has them; () is one unit. projection: takes up the changes as well. numbers: of a tensor, read at once.
    """
    by = _units_of(shape, axes)
    matrices, rows, columns = matrix_shape(shape) if by != "each" else (1, int(np.prod(shape, dtype=int)), 1)
    found = Accumulator(len(tuned), (matrices, rows, columns), by)
    first, size = (shape[0] if shape else 1), int(np.prod(shape[1:], dtype=int))
    step = DIMS // math.gcd(size, DIMS)  # the projection takes whole blocks of its own
    each, given = max(1, numbers // max(1, size) // step) * step, [source.change for source in tuned]
    for start in range(0, first, each):
        stop = min(start + each, first)
        pieces = [x.reshape(-1, columns) for x in (base(start, stop), *(source.read(start, stop) for source in tuned))]
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in pieces) else torch.float32
        plan = BF16 if all(x.dtype == torch.bfloat16 for x in pieces) and not any(given) else FULL
        moves = np.empty((len(tuned), *pieces[0].shape) if projection is not None else 0, np.float32)
        offset = start * size // columns
        for low, high in _cuts(offset, offset + len(pieces[0]), rows, max(1, INNER // columns)):
            before, *after = (x[low - offset : high - offset] for x in pieces)
            changes = found.add(low, before, after, given, dtype, plan)
            if projection is not None:
                moves[:, low - offset : high - offset] = changes
        if projection is not None:
            projection.add(name, start * size, moves.reshape(len(tuned), -1))
    return found.sums()


def _cuts(start: int, stop: int, rows: int, each: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most `each` rows that do not cross from one matrix of a stack to the next."""
    while start < stop:
        end = min(start + each, stop, (start // rows + 1) * rows)
        yield start, end
        start = end


def _units_of(shape: Sequence[int], axes: Sequence[int]) -> str:
    """How units lie in a stack of matrices: one in all, each number one, its rows, or each matrix's columns."""
    last = len(shape) - 1
    if not axes:
        return "one"
    if len(axes) == len(shape):
        return "each"
    if tuple(axes) == tuple(range(last)):
        return "rows"
    if tuple(axes) == (*range(last - 1), last):
        return "columns"
    raise ValueError(f"units along axes {tuple(axes)} of {tuple(shape)}")
