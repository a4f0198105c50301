"""Rules for sums, means, norms, softmax and the like: along dimensions of one jet."""

# ruff: noqa: E741 (k and l are the updates' indices everywhere)
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from interference.taylor.basis import Basis, add, full, product
from interference.taylor.fallback import primal
from interference.taylor.jet import Jet, lost, rule
from interference.taylor.norms import after, onward
from interference.taylor.structure import along, shift


def _dims(x: Jet, dim: Any) -> tuple[int, ...]:
    if dim is None or dim == () or dim == []:
        return tuple(range(1, x.dim() + 1))
    return tuple(map(shift, (dim,) if isinstance(dim, int) else dim))


@rule("sum")
def _sum(x: Jet, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Jet:
    return along(x, lambda c: c.sum(_dims(x, dim), keepdim))


@rule("mean")
def _mean(x: Jet, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Jet:
    if keepdim and dim in (-1, [-1], (-1,)) and after(x, "square"):
        return onward(x, "mean", 0.0)
    return along(x, lambda c: c.mean(_dims(x, dim), keepdim))


@rule("var")
def _var(x: Jet, dim: Any = None, *, correction: Any = None, unbiased: Any = None, keepdim: bool = False) -> Jet:
    dims = _dims(x, dim)
    centred = x.coef - x.coef.mean(dims, keepdim=True)
    count = math.prod(x.coef.shape[d] for d in dims)
    free = 1 if correction is None and unbiased in (None, True) else (correction or 0)
    return Jet(x.basis, product(x.basis, centred, centred).sum(dims, keepdim) / (count - free))


def softmax_(basis: Basis, x: Tensor, dim: int) -> Tensor:
    """Softmax of a full stack, in place, along a dimension counted from the end.

    With u_k and v_kl the first and second coefficients and E the mean under p_0 = softmax(x_0), and c_k = u_k - E u_k:
    p_k = p_0 c_k,   p_kk = p_0 (w - E w) with w = v_kk + c_k^2 / 2,   p_kl likewise with w = v_kl + c_k c_l.
    Everything is centred, so nothing cancels.
    """
    low, K = basis.low, basis.updates
    p = torch.softmax(x[0], dim)
    x[0] = p
    c = x[1:low]
    c -= (c * p).sum(dim, keepdim=True)
    w = x[low:]
    if basis.pairs:
        for k in range(K):
            at = basis.place[k, k] - low
            w[at].addcmul_(c[k], c[k], value=0.5)
            if k + 1 < K:
                w[at + 1 : at + K - k].addcmul_(c[k], c[k + 1 :])
    else:
        w.addcmul_(c, c, value=0.5)
    w -= (w * p).sum(dim, keepdim=True)
    x[1:] *= p
    return x


@rule("softmax")
def _softmax(x: Jet, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Jet:
    if dim is None:
        raise lost("softmax without a dimension", "it is ambiguous")
    stack = full(x.basis, x.coef)
    stack = stack.clone() if stack is x.coef else stack
    return Jet(x.basis, softmax_(x.basis, stack, dim if dim < 0 else dim - x.dim()))


@rule("log_softmax")
def _log_softmax(x: Jet, dim: int = -1, _stacklevel: int = 3, dtype: Any = None) -> Jet:
    norm = _logsumexp(x, dim, True)
    return Jet(x.basis, add(x.basis, x.coef, norm.coef, -1.0))


@rule("logsumexp")
def _logsumexp(x: Jet, dim: Any, keepdim: bool = False) -> Jet:
    if not isinstance(dim, int):
        raise lost("logsumexp over several dimensions", "it has no rule")
    dim = dim if dim < 0 else dim - x.dim()
    basis, coef = x.basis, full(x.basis, x.coef)
    p = torch.softmax(coef[0], dim)
    mean = (coef[1:] * p).sum(dim, keepdim=True)
    y = torch.cat([torch.logsumexp(coef[0], dim, keepdim=True)[None], mean])
    c = coef[1 : basis.low] - mean[: basis.updates]
    for i, (k, l) in enumerate(basis.seconds):
        y[basis.low + i] += (0.5 if k == l else 1.0) * (p * c[k] * c[l]).sum(dim, keepdim=True)
    return Jet(basis, y if keepdim else y.squeeze(dim))


@rule("topk")
def _topk(x: Jet, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    _, index = torch.topk(x.primal, k, dim, largest, sorted)
    return torch.return_types.topk((x.gather(dim, index), index))


@rule("sort")
def _sort(x: Jet, dim: int = -1, descending: bool = False, stable: bool = False) -> Any:
    index = torch.argsort(x.primal, dim=dim, descending=descending, stable=stable)
    return torch.return_types.sort((x.gather(dim, index), index))


@rule("maximum", "fmax")
def _maximum(a: Any, b: Any) -> Any:
    return torch.where(primal(a) >= primal(b), a, b)


@rule("minimum", "fmin")
def _minimum(a: Any, b: Any) -> Any:
    return torch.where(primal(a) <= primal(b), a, b)


def _extreme(name: str) -> Any:
    def run(x: Any, dim: Any = None, keepdim: bool = False) -> Any:
        if isinstance(dim, Tensor):
            return _maximum(x, dim) if name == "max" else _minimum(x, dim)
        find = torch.argmax if name.endswith("max") else torch.argmin
        if dim is None:
            return x.reshape(-1)[find(x.primal)]
        if not isinstance(dim, int):
            raise lost(name, "no rule for these arguments")
        index = find(x.primal, dim, keepdim=True)
        values = x.gather(dim, index)
        if not keepdim:
            values, index = values.squeeze(dim), index.squeeze(dim)
        if name.startswith("a"):
            return values
        return getattr(torch.return_types, name)((values, index))

    return run


for _name in ("amax", "amin", "max", "min"):
    rule(_name)(_extreme(_name))
