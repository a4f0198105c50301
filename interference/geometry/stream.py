"""One pass over a tensor of the base and of N tuned models: every sum that the measures need, block by block.

Only sums leave this module, so models far larger than memory cost no more than a block of each. Differences are taken in
float32 (float64 where a model is stored so) and every sum is taken in float64 or counted exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from interference.geometry.projection import DIMS, Projection

Array = NDArray[Any]
Rows = Callable[[int, int], Tensor]
RULES = ("relative", "absolute", "lpt", "bf16")
"""When a weight counts as changed by d: |d| > 1e-3 max(|w0|, |w1|) (2511.08567), |d| > 1e-5 (2505.11711), not both |d| < 1e-7
and |d| < 1e-3 |w0| (2606.02398), and when w0 and w1 differ once both are rounded to bf16 (which tells checkpoints of float32
apart from what a bf16 model would see of them)."""

READ = 1 << 23  # numbers of a tensor read at once
INNER = 1 << 15  # numbers worked on at once: few enough that a dozen passes stay in a core's own cache


@dataclass(frozen=True)
class Source:
    """A tuned model's side of a tensor: `read` gives rows of its values, or of its change where it is known by that."""

    read: Rows
    change: bool = False


@dataclass
class Sums:
    """What one tensor adds up to. N tuned models; R rules; rows and columns of the tensor as a matrix.

    numel; base_square: |w0|^2; gram (N, N): <d_a, d_b>; squares (N, N): <d_a^2, d_b^2>; largest (N,): max |d|; identical (N,):
    coordinates with d = 0; count (R, N): changed; both (R, N, N): changed in both; agree (N, N): changed in both (rule
    relative) with one sign; copied (N, N): changed in both to the very same value; histogram (N+1,): coordinates that m models
    change (relative); rows, columns (N,): rows and columns with a change (relative); units (N, U), base_units (U,): squares by
    unit.
    """

    numel: int
    shape: tuple[int, int]
    base_square: float
    gram: Array
    squares: Array
    largest: Array
    identical: Array
    count: Array
    both: Array
    agree: Array
    copied: Array
    histogram: Array
    rows: Array
    columns: Array
    units: Array
    base_units: Array


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
) -> Sums:
    """Add up one tensor.

    shape: of the tensor. base, tuned: give rows start:stop of its first dimension. axes: those along which units lie, as
    `Anatomy.axes` has them; () is one unit. projection: takes up the changes as well.
    """
    by = _units_of(shape, axes)
    matrices, rows, columns = matrix_shape(shape) if by != "each" else (1, int(np.prod(shape, dtype=int)), 1)
    work = _Work(len(tuned), (matrices, rows, columns), by)
    first, size = (shape[0] if shape else 1), int(np.prod(shape[1:], dtype=int))
    step = DIMS // math.gcd(size, DIMS)  # the projection takes whole blocks of its own
    each = max(1, READ // max(1, size) // step) * step
    for start in range(0, first, each):
        stop = min(start + each, first)
        pieces = [x.reshape(-1, columns) for x in (base(start, stop), *(source.read(start, stop) for source in tuned))]
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in pieces) else torch.float32
        coarse = all(x.dtype == torch.bfloat16 for x in pieces) and not any(source.change for source in tuned)
        moves = [np.empty(pieces[0].shape, np.float32) for _ in tuned] if projection is not None else []
        offset = start * size // columns
        for low, high in _cuts(offset, offset + len(pieces[0]), rows, max(1, INNER // columns)):
            block, *others = (x[low - offset : high - offset].to(dtype).numpy() for x in pieces)
            pairs = list(zip(others, tuned, strict=True))
            changes = [x if source.change else np.subtract(x, block) for x, source in pairs]
            values = [np.add(block, x) if source.change else x for x, source in pairs]
            work.add(low, block, values, changes, rounds=not coarse)
            for move, d in zip(moves, changes, strict=False):
                move[low - offset : high - offset] = d
        if projection is not None:
            projection.add(name, start * size, np.stack([m.reshape(-1) for m in moves]))
    return work.sums()


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


class _Work:
    """Running sums of one tensor."""

    def __init__(self, models: int, stack: tuple[int, int, int], units: str) -> None:
        matrices, rows, columns = stack
        self.stack, self.by, N = stack, units, models
        size = {"one": 1, "columns": matrices * columns}.get(units, matrices * rows)
        self.units, self.base_units = np.zeros((N, size)), np.zeros(size)
        self.base_square, self.gram, self.squares = 0.0, np.zeros((N, N)), np.zeros((N, N))
        self.largest, self.same = np.zeros(N), np.zeros(N, np.int64)
        self.count, self.both = np.zeros((len(RULES), N), np.int64), np.zeros((len(RULES), N, N), np.int64)
        self.agree, self.copied = np.zeros((N, N), np.int64), np.zeros((N, N), np.int64)
        self.histogram, self.rows = np.zeros(N + 1, np.int64), np.zeros(N, np.int64)
        self.touched = np.zeros((N, columns), bool)

    def add(self, place: int, before: Array, after: list[Array], changes: list[Array], rounds: bool) -> None:
        """Take up rows from `place` on; arrays (rows, columns). rounds: values are not bf16 already."""
        size = np.abs(before)
        wide = np.stack(changes, dtype=np.float64).reshape(len(changes), -1)
        self.gram += wide @ wide.T
        own = before.astype(np.float64).reshape(1, -1)
        self.base_square += float((own @ own.T)[0, 0])
        wide *= wide
        self.squares += wide @ wide.T
        own *= own
        self._by_units(place, before.shape, self.units, wide)
        self._by_units(place, before.shape, self.base_units[None], own)
        masks = []
        for k, (value, d) in enumerate(zip(after, changes, strict=True)):
            distance = np.abs(d)
            self.largest[k] = np.maximum(self.largest[k], distance.max(initial=0))
            moved = distance != 0
            mask = [*changed(size, value, distance), _rounded_apart(before, value) if rounds else moved]
            self.rows[k] += int(np.count_nonzero(mask[0].any(1)))
            self.touched[k] |= mask[0].any(0)
            masks.append([*mask, moved, d < 0])
        self._count(masks, changes)

    def _count(self, masks: list[list[Array]], changes: list[Array]) -> None:
        """Exact counts, on bits: eight coordinates a byte."""
        packed = [[np.packbits(m) for m in of_model] for of_model in masks]
        numel = changes[0].size
        for k, mine in enumerate(packed):
            self.same[k] += numel - _ones(mine[-2])
            for r in range(len(RULES)):
                self.count[r, k] += _ones(mine[r])
            for j in range(k):
                other = packed[j]
                for r in range(len(RULES)):
                    self.both[r, j, k] += _ones(mine[r] & other[r])
                shared = mine[0] & other[0]
                self.agree[j, k] += _ones(shared & ~(mine[-1] ^ other[-1]))
                equal = np.packbits(changes[j] == changes[k])
                self.copied[j, k] += _ones(equal & mine[-2] & other[-2])
        times = np.zeros(changes[0].shape, np.uint8)
        for of_model in masks:
            times += of_model[0]
        for m in range(len(self.histogram)):
            self.histogram[m] += np.count_nonzero(times == m)

    def _by_units(self, place: int, shape: tuple[int, ...], into: Array, squares: Array) -> None:
        """Add squares (models, numbers) of rows from `place` on to their units."""
        squares = squares.reshape(-1, *shape)
        if self.by == "one":
            into[:, 0] += squares.sum((1, 2))
        elif self.by == "columns":
            matrix, columns = place // self.stack[1], self.stack[2]
            into[:, matrix * columns : (matrix + 1) * columns] += squares.sum(1)
        else:
            into[:, place : place + shape[0]] += squares.sum(2)

    def sums(self) -> Sums:
        matrices, rows, columns = self.stack
        for k in range(len(self.same)):
            for table, own in ((self.agree, self.count[0, k]), (self.copied, matrices * rows * columns - self.same[k])):
                table[k, k] = own
            self.both[:, k, k] = self.count[:, k]
        for table in (self.agree, self.copied, *self.both):
            table[:] = np.maximum(table, table.T)
        return Sums(
            numel=matrices * rows * columns,
            shape=(matrices * rows, columns),
            base_square=self.base_square,
            gram=self.gram,
            squares=self.squares,
            largest=self.largest,
            identical=self.same,
            count=self.count,
            both=self.both,
            agree=self.agree,
            copied=self.copied,
            histogram=self.histogram,
            rows=self.rows,
            columns=self.touched.sum(1),
            units=self.units,
            base_units=self.base_units,
        )


def changed(size: Array, after: Array, distance: Array) -> list[Array]:
    """Masks of the coordinates that count as changed, by each of RULES but the last; from |w0|, w1 and |d|."""
    small = size * size.dtype.type(1e-3)
    relative = np.abs(after)
    np.maximum(relative, size, out=relative)
    relative *= relative.dtype.type(1e-3)
    unchanged = (distance < 1e-7) & (distance < small)
    return [distance > relative, distance > 1e-5, ~(unchanged | (distance == 0))]


def _rounded_apart(before: Array, after: Array) -> Array:
    """Where two arrays differ once rounded to bf16."""
    bits = [torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy() for x in (before, after)]
    return np.not_equal(*bits)


def _ones(packed: Array) -> int:
    return int(np.bitwise_count(packed).sum(dtype=np.int64))
