"""The algebra of truncated Taylor coefficients that every rule follows from.

Along theta + sum_k a_k d_k a quantity is carried to second order as

    x(a) = x_0 + sum_k x_k a_k + sum_{k<=l} x_kl a_k a_l + O(a^3)

with Taylor coefficients, not derivatives: d2x/da_k da_l is x_kl for k < l and 2 x_kk for k = l. The product of two such
polynomials is then a plain convolution, without factors. Coefficients lie in one tensor along its first dimension, a stack:
x_0; x_1 .. x_K; then the second order, (0,0) (1,1) .. in diagonal mode, (0,0) (0,1) .. (0,K-1) (1,1) .. with pairs. A stack
that ends after the first order has a second order of zeros.
"""

# ruff: noqa: E741 (k and l are the updates' indices everywhere)
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from interference.taylor.pool import Pool


@dataclass(frozen=True)
class Basis:
    """Which coefficients are carried for K updates: all pairs k <= l, or the diagonal only.

    `fallbacks` counts the operations of a run that had no rule; `pool` holds its large buffers.

    >>> Basis(2, pairs=True).seconds
    ((0, 0), (0, 1), (1, 1))
    """

    updates: int
    pairs: bool
    seconds: tuple[tuple[int, int], ...] = field(init=False)
    place: dict[tuple[int, int], int] = field(init=False, repr=False, compare=False)
    fallbacks: Counter[str] = field(default_factory=Counter, repr=False, compare=False)
    pool: Pool = field(default_factory=Pool, repr=False, compare=False)

    def __post_init__(self) -> None:
        K = self.updates
        seconds = tuple((k, l) for k in range(K) for l in (range(k, K) if self.pairs else (k,)))
        object.__setattr__(self, "seconds", seconds)
        object.__setattr__(self, "place", {kl: 1 + K + i for i, kl in enumerate(seconds)})

    @property
    def low(self) -> int:
        """Coefficients of order zero and one."""
        return 1 + self.updates

    @property
    def size(self) -> int:
        return self.low + len(self.seconds)

    def terms(self, i: int) -> Iterator[tuple[int, int]]:
        """The pairs (a, b) of coefficients whose products add up to coefficient i of a product."""
        if i == 0:
            yield 0, 0
            return
        yield i, 0
        yield 0, i
        if i >= self.low:
            k, l = self.seconds[i - self.low]
            yield 1 + k, 1 + l
            if k != l:
                yield 1 + l, 1 + k


def constant(basis: Basis, x: Tensor) -> Tensor:
    """The full stack of a quantity that does not change."""
    return full(basis, x[None])


def full(basis: Basis, x: Tensor) -> Tensor:
    """The stack with its second order spelled out."""
    if len(x) == basis.size:
        return x
    y = basis.pool.empty((basis.size, *x.shape[1:]), x.dtype, x.device)
    y[: len(x)] = x
    y[len(x) :] = 0
    return y


def lift(x: Tensor, dims: int) -> Tensor:
    """The stack with its tensors viewed in `dims` dimensions, for broadcasting."""
    missing = dims + 1 - x.dim()
    return x if missing <= 0 else x.reshape(len(x), *([1] * missing), *x.shape[1:])


def _cross(basis: Basis, y: Tensor, a: Tensor, b: Tensor) -> None:
    """Add the products of first-order coefficients to the second order of y."""
    K, low = basis.updates, basis.low
    if not basis.pairs:
        y[low:].addcmul_(a[1:low], b[1:low])
        return
    for k in range(K):
        at = basis.place[k, k]
        y[at : at + K - k].addcmul_(a[1 + k], b[1 + k : low])
        if k + 1 < K:
            y[at + 1 : at + K - k].addcmul_(b[1 + k], a[2 + k : low])


def product(basis: Basis, a: Tensor, b: Tensor) -> Tensor:
    """Stack of the element-wise product of two stacks, with broadcasting."""
    dims = max(a.dim(), b.dim()) - 1
    a, b = lift(a, dims), lift(b, dims)
    if len(a) < len(b):
        a, b = b, a
    shape = torch.broadcast_shapes(a.shape[1:], b.shape[1:])
    y = basis.pool.like((basis.size, *shape), a, torch.result_type(a, b))
    torch.mul(a, b[0], out=y[: len(a)])
    y[len(a) :] = 0
    y[1 : len(b)].addcmul_(a[0], b[1:])
    _cross(basis, y, a, b)
    return y


def add(basis: Basis, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """Stack of a + alpha b."""
    dims = max(a.dim(), b.dim()) - 1
    a, b = lift(a, dims), lift(b, dims)
    if len(a) != len(b):
        a, b = full(basis, a), full(basis, b)
    shape = torch.broadcast_shapes(a.shape, b.shape)
    return torch.add(a, b, alpha=alpha, out=basis.pool.like(shape, a, torch.result_type(a, b)))


def bilinear(basis: Basis, a: Tensor, b: Tensor, op: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Stack of op(a, b) for any operation that is linear in each argument."""
    parts: list[Tensor] = []
    for i in range(basis.size):
        terms = [op(a[j], b[m]) for j, m in basis.terms(i) if j < len(a) and m < len(b)]
        parts.append(sum(terms[1:], terms[0]) if terms else torch.zeros_like(parts[0]))
    return torch.stack(parts)


def compose(basis: Basis, x: Tensor, f: Tensor, f1: Tensor, f2: Tensor | None) -> Tensor:
    """Stack of f(x) from the function's value and derivatives at x_0; f2 = None is a piecewise linear function.

    y_k = f' x_k,   y_kk = f' x_kk + f'' x_k^2 / 2,   y_kl = f' x_kl + f'' x_k x_l.
    """
    K, low = basis.updates, basis.low
    y = basis.pool.like((basis.size, *x.shape[1:]), x, f.dtype)
    y[0] = f
    torch.mul(x[1:], f1, out=y[1 : len(x)])
    y[len(x) :] = 0
    if f2 is None:
        return y
    if not basis.pairs:
        y[low:].addcmul_(x[1:low] * x[1:low], f2, value=0.5)
        return y
    for k in range(K):
        at, bent = basis.place[k, k], x[1 + k] * f2
        y[at].addcmul_(bent, x[1 + k], value=0.5)
        if k + 1 < K:
            y[at + 1 : at + K - k].addcmul_(bent, x[2 + k : low])
    return y
