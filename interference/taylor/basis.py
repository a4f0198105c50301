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
from typing import Any

import torch
from torch import Tensor

from interference.taylor.pool import Pool

# A quantity's orders: value [1, ...], first [K, ...], second [...]; None where it has none.
Parts = tuple[Any, Any, Any]


@dataclass(frozen=True)
class Basis:
    """Which coefficients are carried for K updates: all pairs k <= l, or the diagonal only.

    `fallbacks` counts the operations of a run that had no rule, `checked` names those compared with differences; `pool` holds
    its large buffers.

    >>> Basis(2, pairs=True).seconds
    ((0, 0), (0, 1), (1, 1))
    """

    updates: int
    pairs: bool
    seconds: tuple[tuple[int, int], ...] = field(init=False)
    place: dict[tuple[int, int], int] = field(init=False, repr=False, compare=False)
    low: int = field(init=False, repr=False)
    size: int = field(init=False, repr=False)
    split: list[int] = field(init=False, repr=False, compare=False)
    diagonal: bool = field(init=False, repr=False)
    fallbacks: Counter[str] = field(default_factory=Counter, repr=False, compare=False)
    checked: set[str] = field(default_factory=set, repr=False, compare=False)
    pool: Pool = field(default_factory=Pool, repr=False, compare=False)

    def __post_init__(self) -> None:
        K = self.updates
        seconds = tuple((k, l) for k in range(K) for l in (range(k, K) if self.pairs else (k,)))
        known = {
            "seconds": seconds,
            "place": {kl: 1 + K + i for i, kl in enumerate(seconds)},
            "low": 1 + K,  # coefficients of order zero and one
            "size": 1 + K + len(seconds),
            "split": [1, K, len(seconds)],
            "diagonal": len(seconds) == K,  # no second order but x_kk: all orders are of one length, K
        }
        for name, value in known.items():
            object.__setattr__(self, name, value)

    def parts(self, x: Tensor) -> Parts:
        """Views of a stack's orders."""
        count = x.shape[0]
        if count == self.size:
            return torch.split_with_sizes(x, self.split)  # type: ignore[return-value]
        if count == self.low:
            return (*torch.split_with_sizes(x, self.split[:2]), None)  # type: ignore[return-value]
        return x, None, None

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


def product(basis: Basis, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Stack of the element-wise product of two stacks, with broadcasting; into `out`, a full stack, where given."""
    if a.dim() != b.dim():
        dims = max(a.dim(), b.dim()) - 1
        a, b = lift(a, dims), lift(b, dims)
    if len(a) < len(b):
        a, b = b, a
    if out is None:
        shape = a.shape[1:] if a.shape[1:] == b.shape[1:] else torch.broadcast_shapes(a.shape[1:], b.shape[1:])
        out = basis.pool.like((basis.size, *shape), a, torch.result_type(a, b))
    multiply(basis, basis.parts(a), basis.parts(b), basis.parts(out))
    return out


def multiply(basis: Basis, a: Parts, b: Parts, y: Parts) -> None:
    """Write the product of two quantities, given by their orders (b has no more than a), into a full one."""
    (a0, a1, a2), (b0, b1, b2), (y0, y1, y2) = a, b, y
    torch.mul(a0, b0, out=y0)
    if a1 is None:  # two constants
        y1.zero_()
        y2.zero_()
        return
    torch.mul(a1, b0, out=y1)
    if a2 is None:
        y2.zero_()
    else:
        torch.mul(a2, b0, out=y2)
    if b1 is not None:
        y1.addcmul_(a0, b1)
        _cross(basis, y2, a1, b1)
    if b2 is not None:
        y2.addcmul_(a0, b2)


def _cross(basis: Basis, y2: Tensor, a1: Tensor, b1: Tensor) -> None:
    """Add the products of first-order coefficients to a second order."""
    if basis.diagonal:
        y2.addcmul_(a1, b1)
        return
    K = basis.updates
    for k in range(K):
        at = basis.place[k, k] - basis.low
        y2[at : at + K - k].addcmul_(a1[k], b1[k:])
        if k + 1 < K:
            y2[at + 1 : at + K - k].addcmul_(b1[k], a1[k + 1 :])


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


def compose(basis: Basis, x: Tensor, f: Tensor, f1: Tensor, f2: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Stack of f(x) from the function's value and derivatives at x_0; f2 = None is a piecewise linear function.

    y_k = f' x_k,   y_kk = f' x_kk + f'' x_k^2 / 2,   y_kl = f' x_kl + f'' x_k x_l.
    """
    y = basis.pool.like((basis.size, *x.shape[1:]), x, f.dtype) if out is None else out
    _, x1, x2 = basis.parts(x)
    y0, y1, y2 = basis.parts(y)
    y0.copy_(f)
    if x1 is None:
        y[1:] = 0
        return y
    torch.mul(x1, f1, out=y1)
    if x2 is None:
        y2.zero_()
    else:
        torch.mul(x2, f1, out=y2)
    if f2 is None:
        return y
    bent = x1 * f2
    if basis.diagonal:
        y2.addcmul_(bent, x1, value=0.5)
        return y
    K = basis.updates
    for k in range(K):
        at = basis.place[k, k] - basis.low
        y2[at].addcmul_(bent[k], x1[k], value=0.5)
        if k + 1 < K:
            y2[at + 1 : at + K - k].addcmul_(bent[k], x1[k + 1 :])
    return y
