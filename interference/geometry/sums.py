"""Sums of a tensor's block over a base and N tuned models, taken while the block is in a core's cache.

Differences are taken in float32 (float64 where a model is stored so) and every sum is taken in float64 or counted exactly,
but for that behind the cosines' null (`squares`), which is float32 within a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
RULES = ("relative", "absolute", "lpt", "bf16")
"""When a weight counts as changed by d: |d| > 1e-3 max(|w0|, |w1|) (2511.08567), |d| > 1e-5 (2505.11711), not both |d| < 1e-7
and |d| < 1e-3 |w0| (2606.02398), and when w0 and w1 differ once both are rounded to bf16 (which tells checkpoints of float32
apart from what a bf16 model would see of them)."""

PAIRED = 1 << 14  # numbers of every model whose inner products are taken at once


class Plan(NamedTuple):
    """Rows of a model's masks: that of each rule, of d != 0 and of d < 0; and how many there are."""

    rules: tuple[int, ...]
    moved: int
    falls: int
    masks: int


FULL = Plan((0, 1, 2, 3), 4, 5, 6)
BF16 = Plan((0, 1, 0, 0), 0, 2, 3)
"""For tensors that are all stored in bf16: different numbers there are at least 2^-9 of the larger one apart, so that every rule
but "absolute" says the same."""


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


class _Room(NamedTuple):
    """Buffers of one block: changes (N, numbers), masks (masks, N, numbers), scratch rows, one model in float64."""

    changes: Array
    bits: Array
    scratch: Array
    wide: Tensor


class Accumulator:
    """Running sums of one tensor, (matrices, rows, columns), and the buffers that every block uses again.

    units: how units lie in it: "one", "each", "rows", "columns" (of each matrix).
    """

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
        self.base_square, self._paired = 0.0, torch.empty(N if N > 1 else 0, PAIRED, dtype=torch.float64)
        self._rooms: dict[tuple[int, Any], _Room] = {}

    def add(
        self, place: int, before: Tensor, after: Sequence[Tensor], given: Sequence[bool], dtype: torch.dtype, plan: Plan
    ) -> Array:
        """Take up rows from `place` on: (rows, columns) of the base and of each model, or of its change where `given`.

        One model after the other, so that the dozen passes over each stay in the cache. Returns the changes (N, rows, columns),
        which the next call overwrites.
        """
        base = before.to(dtype).numpy().reshape(-1)
        room = self._room(len(base), base.dtype, plan)
        self.base_square += self._squares(0, place, before.shape, base, room)
        if plan is FULL:
            np.abs(base, out=room.scratch[1])
            np.multiply(room.scratch[1], base.dtype.type(1e-3), out=room.scratch[2])
        for k, x in enumerate(after):
            value, d = x.to(dtype).numpy().reshape(-1), room.changes[k]
            if given[k]:
                d[:] = value
                value = base + d
            else:
                np.subtract(value, base, out=d)
            self.gram[k, k] += self._squares(1 + k, place, before.shape, d, room)
            self._masks(k, base, value, d, room, plan)
            mask = room.bits[0, k].reshape(before.shape)
            self.rows[k] += np.count_nonzero(mask.any(1))
            self.touched[k] |= mask.any(0)
        self._inner_products(torch.from_numpy(room.changes))
        if len(after) > 1:
            self._inner_squares(room.changes)
        self._count(room, plan)
        return room.changes.reshape(-1, *before.shape)

    def _room(self, count: int, dtype: Any, plan: Plan) -> _Room:
        if (count, dtype) not in self._rooms:
            N = len(self.same)
            wide = torch.empty(count, dtype=torch.float64)
            bits = np.empty((plan.masks, N, count), bool)
            self._rooms[count, dtype] = _Room(np.empty((N, count), dtype), bits, np.empty((4, count), dtype), wide)
        return self._rooms[count, dtype]

    def _squares(self, index: int, place: int, shape: tuple[int, ...], x: Array, room: _Room) -> float:
        """Add x's squares by unit; returns their sum. On torch, whose threads can be held to one where tensors are worked on
        side by side; numpy's cannot."""
        wide, (rows, columns) = room.wide, shape
        wide.copy_(torch.from_numpy(x))
        torch.mul(wide, wide, out=wide)
        if self.by == "columns":
            found, start = wide.view(rows, columns).sum(0).numpy(), place // self.stack[1] * columns
            self.units[index, start : start + columns] += found
            return float(found.sum())
        lines = torch.mv(wide.view(rows, columns), wide.new_ones(columns)).numpy()
        total = float(lines.sum())
        if self.by == "one":
            self.units[index, 0] += total
        else:
            self.units[index, place : place + rows] += lines
        return total

    def _masks(self, k: int, base: Array, value: Array, d: Array, room: _Room, plan: Plan) -> None:
        """Fill a model's masks; scratch holds |w0| and 1e-3 |w0| in rows 1 and 2 of FULL."""
        bits, (distance, size, small, bound), eta = room.bits[:, k], room.scratch, base.dtype.type(1e-3)
        np.abs(d, out=distance)
        self.largest[k] = np.maximum(self.largest[k], distance.max(initial=0))
        np.not_equal(d, 0, out=bits[plan.moved])
        np.greater(distance, base.dtype.type(1e-5), out=bits[1])
        if plan is FULL:
            np.abs(value, out=bound)
            np.maximum(bound, size, out=bound)
            np.multiply(bound, eta, out=bound)
            np.greater(distance, bound, out=bits[0])
            unchanged = (distance < small) & (distance < base.dtype.type(1e-7))
            np.greater(bits[plan.moved], unchanged, out=bits[2])  # moved, and not both small
            bits[3] = _rounded_apart(base, value)
        np.less(d, 0, out=bits[plan.falls])

    def _inner_products(self, d: Tensor) -> None:
        """Inner products of every pair of changes. Row by row: as one matrix product, so few and so long rows take several
        times as long in float64."""
        N = len(d)
        for start in range(0, d.shape[1] if N > 1 else 0, PAIRED):
            part = d[:, start : start + PAIRED]
            wide = self._paired[:, : part.shape[1]]
            wide.copy_(part)
            for a in range(N - 1):
                self.gram[a, a + 1 :] += torch.mv(wide[a + 1 :], wide[a]).numpy()

    def _inner_squares(self, changes: Array) -> None:
        """Inner products of the changes' squares, for a null's spread, which needs no more than float32 within a block; over the
        largest change of each model so far, so that nothing that counts is too small for it."""
        top = np.where(self.largest > 0, self.largest, 1.0)
        scaled = np.divide(changes, top[:, None], dtype=np.float32, casting="same_kind")
        np.multiply(scaled, scaled, out=scaled)
        found = torch.from_numpy(scaled)
        self.squares += torch.mm(found, found.t()).numpy() * np.outer(top**2, top**2)

    def _count(self, room: _Room, plan: Plan) -> None:
        """Exact counts, on bits: eight coordinates a byte."""
        bits, d = room.bits, room.changes
        (_, N, numel), rules, packed = bits.shape, list(plan.rules), np.packbits(bits, axis=-1)
        if packed.shape[-1] % 8 == 0:
            packed = packed.view(np.uint64)
        ones = np.bitwise_count(packed).sum(-1, dtype=np.int64)
        self.count += ones[rules]
        self.same += numel - ones[plan.moved]
        if N == 1:
            self.histogram[1] += ones[0, 0]
            return
        a, b = self.pairs
        shared = packed[:, a] & packed[:, b]
        self.both[:, a, b] += np.bitwise_count(shared).sum(-1, dtype=np.int64)[rules]
        differ = packed[plan.falls, a] ^ packed[plan.falls, b]
        self.agree[a, b] += np.bitwise_count(shared[0] & ~differ).sum(-1, dtype=np.int64)
        equal = np.packbits(np.concatenate([d[k] == d[k + 1 :] for k in range(N - 1)]), axis=-1).view(packed.dtype)
        self.copied[a, b] += np.bitwise_count(equal & shared[plan.moved]).sum(-1, dtype=np.int64)
        times = bits[0].view(np.uint8).sum(0, dtype=np.min_scalar_type(N))
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
            units=self.units[1:],
            base_units=self.units[0],
        )


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
