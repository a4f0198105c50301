"""One pass over a tensor of the base and of N tuned models: every sum that the measures need, block by block.

Only sums leave this module, so models far larger than memory cost no more than a block of each. Differences are taken in
float32 (float64 where a model is stored so) and every sum is taken in float64 or counted exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
INNER = 1 << 17  # numbers worked on at once: enough to make the calls cheap, few enough for a core's cache


class _Plan(NamedTuple):
    """Rows of a model's masks: that of each rule, of d != 0 and of d < 0; and how many there are."""

    rules: tuple[int, ...]
    moved: int
    falls: int
    masks: int


_FULL = _Plan((0, 1, 2, 3), 4, 5, 6)
_BF16 = _Plan((0, 1, 0, 0), 0, 2, 3)
"""For tensors that are all stored in bf16: different numbers there are at least 2^-9 of the larger one apart, so that every rule
but "absolute" says the same."""


@dataclass(frozen=True)
class Source:
    """A tuned model's side of a tensor: `read` gives rows of its values, or of its change where it is known by that."""

    read: Rows
    change: bool = False


@dataclass
class Sums:
    """What one tensor adds up to. N tuned models; R rules; rows and columns of the tensor as a matrix.

    numel; base_square: |w0|^2; gram (N, N): <d_a, d_b>; squares (N, N): <d_a^2, d_b^2>, a != b (in the models'
    own precision within a block); largest (N,): max |d|;
    identical (N,): coordinates with d = 0; count (R, N): changed; both (R, N, N): changed in both; agree (N, N): changed in
    both (rule relative) with one sign; copied (N, N): changed in both to the very same value; histogram (N+1,): coordinates
    that m models change (relative); rows, columns (N,): rows and columns with a change (relative); units (N, U),
    base_units (U,): squares by unit.
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
    numbers: int = READ,
) -> Sums:
    """Add up one tensor.

    shape: of the tensor. base, tuned: give rows start:stop of its first dimension. axes: those along which units lie, as
    `Anatomy.axes` has them; () is one unit. projection: takes up the changes as well. numbers: of a tensor, read at once.
    """
    by = _units_of(shape, axes)
    matrices, rows, columns = matrix_shape(shape) if by != "each" else (1, int(np.prod(shape, dtype=int)), 1)
    work = _Work(len(tuned), (matrices, rows, columns), by)
    first, size = (shape[0] if shape else 1), int(np.prod(shape[1:], dtype=int))
    inner = 2 * INNER // (1 + len(tuned))  # what all models together take of the cache
    step = DIMS // math.gcd(size, DIMS)  # the projection takes whole blocks of its own
    each = max(1, numbers // max(1, size) // step) * step
    for start in range(0, first, each):
        stop = min(start + each, first)
        pieces = [x.reshape(-1, columns) for x in (base(start, stop), *(source.read(start, stop) for source in tuned))]
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in pieces) else torch.float32
        coarse = all(x.dtype == torch.bfloat16 for x in pieces) and not any(source.change for source in tuned)
        plan = _BF16 if coarse else _FULL
        moves = np.empty((len(tuned), *pieces[0].shape) if projection is not None else 0, np.float32)
        offset = start * size // columns
        for low, high in _cuts(offset, offset + len(pieces[0]), rows, max(1, inner // columns)):
            block, *others = (x[low - offset : high - offset].to(dtype).numpy() for x in pieces)
            pairs = list(zip(others, tuned, strict=True))
            changes = np.stack([x if source.change else x - block for x, source in pairs])
            values = [block + x if source.change else x for x, source in pairs]
            work.add(low, block, values, changes, plan)
            if projection is not None:
                moves[:, low - offset : high - offset] = changes
        if projection is not None:
            projection.add(name, start * size, moves.reshape(len(tuned), -1))
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
    """Running sums of one tensor, and the buffers that every block uses again."""

    def __init__(self, models: int, stack: tuple[int, int, int], units: str) -> None:
        matrices, rows, columns = stack
        self.stack, self.by, N = stack, units, models
        size = {"one": 1, "columns": matrices * columns}.get(units, matrices * rows)
        self.units = np.zeros((N + 1, size))  # the base's first
        self.gram, self.squares = np.zeros((N, N)), np.zeros((N, N))
        self.largest, self.same = np.zeros(N), np.zeros(N, np.int64)
        self.count, self.both = np.zeros((len(RULES), N), np.int64), np.zeros((len(RULES), N, N), np.int64)
        self.agree, self.copied = np.zeros((N, N), np.int64), np.zeros((N, N), np.int64)
        self.histogram, self.rows = np.zeros(N + 1, np.int64), np.zeros(N, np.int64)
        self.touched, self.pairs = np.zeros((N, columns), bool), np.triu_indices(N, 1)
        self._buffers: dict[tuple[int, Any], tuple[Array, Array, Array]] = {}

    def add(self, place: int, before: Array, after: list[Array], changes: Array, plan: _Plan) -> None:
        """Take up rows from `place` on; before and after (rows, columns), changes (N, rows, columns)."""
        d = changes.reshape(len(changes), -1)
        wide, bits, room = self._room(d.shape[1], d.dtype, plan)
        wide[0] = before.reshape(-1)
        wide[1:] = d
        distance = np.abs(d, out=room[3:])
        np.maximum(self.largest, distance.max(1, initial=0), out=self.largest)
        np.not_equal(d, 0, out=bits[plan.moved])
        np.greater(distance, d.dtype.type(1e-5), out=bits[1])
        if plan is _FULL:
            _masks(room, before.reshape(-1), after, bits)
        np.less(d, 0, out=bits[plan.falls])
        mask = bits[0].reshape(changes.shape)
        self.rows += np.count_nonzero(mask.any(2), axis=1)
        self.touched |= mask.any(1)
        self._inner_products(place, before.shape, torch.from_numpy(wide))
        self._count(bits, d, plan)

    def _room(self, count: int, dtype: Any, plan: _Plan) -> tuple[Array, Array, Array]:
        """Buffers: the base and the changes in float64; masks (masks, N, numbers); three rows of scratch and |d|."""
        if (count, dtype) not in self._buffers:
            N = len(self.same)
            wide, bits = np.empty((N + 1, count)), np.empty((plan.masks, N, count), bool)
            self._buffers[count, dtype] = wide, bits, np.empty((N + 3, count), dtype)
        return self._buffers[count, dtype]

    def _inner_products(self, place: int, shape: tuple[int, ...], wide: Tensor) -> None:
        """Inner products and squares by unit; `wide` (1 + N, numbers) in float64, the base's values first.

        Row by row: as one matrix product, so few and so long rows take several times as long. On torch, whose threads
        can be held to one where tensors are worked on side by side; numpy's cannot.
        """
        N, (rows, columns) = len(wide) - 1, shape
        for a in range(N):
            self.gram[a, a:] += torch.mv(wide[1 + a :], wide[1 + a]).numpy()
        torch.mul(wide, wide, out=wide)
        for a in range(N - 1):
            self.squares[a, a + 1 :] += torch.mv(wide[2 + a :], wide[1 + a]).numpy()
        if self.by == "columns":
            found, start = wide.view(-1, *shape).sum(1), place // self.stack[1] * columns
            self.units[:, start : start + columns] += found.numpy()
        else:
            lines = torch.mv(wide.view(-1, columns), wide.new_ones(columns)).view(-1, rows).numpy()
            if self.by == "one":
                self.units[:, 0] += lines.sum(1)
            else:
                self.units[:, place : place + rows] += lines

    def _count(self, bits: Array, d: Array, plan: _Plan) -> None:
        """Exact counts, on bits: eight coordinates a byte."""
        _, N, numel = bits.shape
        rules, packed = list(plan.rules), np.packbits(bits, axis=-1)
        if packed.shape[-1] % 8 == 0:
            packed = packed.view(np.uint64)
        ones = np.bitwise_count(packed).sum(-1, dtype=np.int64)
        self.count += ones[rules]
        self.same += numel - ones[plan.moved]
        if N > 1:
            a, b = self.pairs
            shared = packed[:, a] & packed[:, b]
            self.both[:, a, b] += np.bitwise_count(shared).sum(-1, dtype=np.int64)[rules]
            differ = packed[plan.falls, a] ^ packed[plan.falls, b]
            self.agree[a, b] += np.bitwise_count(shared[0] & ~differ).sum(-1, dtype=np.int64)
            equal = np.concatenate([d[k] == d[k + 1 :] for k in range(N - 1)])
            equal = np.packbits(equal, axis=-1).view(packed.dtype)
            self.copied[a, b] += np.bitwise_count(equal & shared[plan.moved]).sum(-1, dtype=np.int64)
        times = bits[0].view(np.uint8).sum(0, dtype=np.min_scalar_type(N)) if N > 1 else bits[0, 0].view(np.uint8)
        for m in range(1, N + 1):
            self.histogram[m] += np.count_nonzero(times == m)

    def sums(self) -> Sums:
        matrices, rows, columns = self.stack
        self.histogram[0] = matrices * rows * columns - self.histogram[1:].sum()
        for k in range(len(self.same)):
            for table, own in ((self.agree, self.count[0, k]), (self.copied, matrices * rows * columns - self.same[k])):
                table[k, k] = own
            self.both[:, k, k] = self.count[:, k]
        for table in (self.agree, self.copied, *self.both, self.gram, self.squares):
            upper = np.triu(table, 1)
            table[:] = upper + upper.T + np.diag(table.diagonal())
        return Sums(
            numel=matrices * rows * columns,
            shape=(matrices * rows, columns),
            base_square=float(self.units[0].sum()),
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
            units=self.units[1:],
            base_units=self.units[0],
        )


def _masks(room: Array, base: Array, after: list[Array], bits: Array) -> None:
    """Fill the masks of _FULL's rules but "absolute"; `room` has three rows of scratch before |d|."""
    (size, small, bound), distance, eta = room[:3], room[3:], room.dtype.type(1e-3)
    np.abs(base, out=size)
    np.multiply(size, eta, out=small)
    for k, value in enumerate(after):
        np.abs(value.reshape(-1), out=bound)
        np.maximum(bound, size, out=bound)
        np.multiply(bound, eta, out=bound)
        np.greater(distance[k], bound, out=bits[0, k])
        bits[3, k] = _rounded_apart(base, value.reshape(-1))
    unchanged = (distance < small) & (distance < eta.dtype.type(1e-7))
    np.greater(bits[_FULL.moved], unchanged, out=bits[2])  # moved, and not both small


def changed(base: Array, after: Array) -> Array:
    """The mask of the rule "relative" for a whole array."""
    bound = np.maximum(np.abs(base), np.abs(after))
    mask: Array = np.abs(after - base) > bound * bound.dtype.type(1e-3)
    return mask


def _rounded_apart(before: Array, after: Array) -> Array:
    """Where two arrays differ once rounded to bf16."""
    rounded = [torch.from_numpy(x).to(torch.bfloat16).float().numpy() for x in (before, after)]
    apart: Array = np.not_equal(*rounded)
    return apart
