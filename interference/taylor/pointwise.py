"""Rules for element-wise operations: sums, products, and functions of one variable through (f, f', f'')."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from interference.taylor.activations import Triple, exp, reciprocal, univariate
from interference.taylor.basis import add, full, lift, product
from interference.taylor.jet import Jet, Weight, lost, rule
from interference.taylor.structure import along


def scaled(x: Jet, by: Any) -> Jet:
    """x times a plain number or tensor."""
    if isinstance(by, Tensor):
        if isinstance(x, Weight):
            x = Jet(x.basis, x.coef)
        return Jet(x.basis, lift(x.coef, by.dim()) * by)
    return along(x, lambda c: c * by)


def shifted(x: Jet, by: Any) -> Jet:
    """x plus a plain number or tensor: only the value moves."""
    coef = x.coef
    if isinstance(by, Tensor):
        coef = lift(coef, by.dim())
        shape = torch.broadcast_shapes(coef.shape[1:], by.shape)
        if shape != coef.shape[1:]:
            coef = coef.expand(len(coef), *shape)
    y = coef.clone()
    y[0] += by
    return Jet(x.basis, y)


def refuse_out(name: str, out: Any) -> None:
    if out is not None:
        raise lost(f"{name}(out=...)", "the output cannot take them up")


@rule("add")
def _add(a: Any, b: Any, *, alpha: Any = 1, out: Any = None) -> Jet:
    refuse_out("add", out)
    if isinstance(a, Jet) and isinstance(b, Jet):
        return Jet(a.basis, add(a.basis, a.coef, b.coef, alpha))
    if isinstance(a, Jet):
        return shifted(a, b if alpha == 1 else b * alpha)
    return shifted(b if alpha == 1 else scaled(b, alpha), a)


@rule("sub", "subtract")
def _sub(a: Any, b: Any, *, alpha: Any = 1, out: Any = None) -> Jet:
    refuse_out("sub", out)
    return _add(a, b, alpha=-alpha)


@rule("__rsub__", "rsub")
def _rsub(a: Any, b: Any) -> Jet:
    return _sub(b, a)


@rule("mul", "multiply")
def _mul(a: Any, b: Any, *, out: Any = None) -> Jet:
    refuse_out("mul", out)
    if isinstance(a, Jet) and isinstance(b, Jet):
        return Jet(a.basis, product(a.basis, a.coef, b.coef))
    return scaled(a, b) if isinstance(a, Jet) else scaled(b, a)


@rule("div", "divide", "true_divide")
def _div(a: Any, b: Any, *, rounding_mode: Any = None, out: Any = None) -> Jet:
    refuse_out("div", out)
    if rounding_mode is not None:
        raise lost(f"div(rounding_mode={rounding_mode!r})", "it is piecewise constant")
    if isinstance(b, Jet):
        return _mul(a, univariate(b, reciprocal))
    if isinstance(b, Tensor):
        if isinstance(a, Weight):
            a = Jet(a.basis, a.coef)
        return Jet(a.basis, lift(a.coef, b.dim()) / b)
    return along(a, lambda c: c / b)


@rule("__rdiv__", "__rtruediv__")
def _rdiv(a: Any, b: Any) -> Jet:
    return _div(b, a)


@rule("neg", "negative")
def _neg(x: Jet) -> Jet:
    return along(x, torch.neg)


@rule("positive")
def _positive(x: Jet) -> Jet:
    return x


@rule("addcmul")
def _addcmul(x: Any, a: Any, b: Any, *, value: Any = 1) -> Any:
    return x + value * (a * b)


@rule("where", where=(torch,))
def _where(condition: Tensor, a: Any, b: Any) -> Jet:
    basis = (a if isinstance(a, Jet) else b).basis
    parts = [full(basis, x.coef) if isinstance(x, Jet) else x for x in (a, b)]
    dims = max(x.dim() - isinstance(y, Jet) for x, y in zip(parts, (a, b), strict=True) if isinstance(x, Tensor))
    dims = max(dims, condition.dim())
    zero = torch.zeros((), dtype=basis_dtype(a, b), device=condition.device)
    values = [x[0] if isinstance(y, Jet) else x for x, y in zip(parts, (a, b), strict=True)]
    rest = [lift(x, dims)[1:] if isinstance(y, Jet) else zero for x, y in zip(parts, (a, b), strict=True)]
    first = torch.where(condition, *values)[None]
    return Jet(basis, torch.cat([first, torch.where(condition, *rest).expand(-1, *first.shape[1:])]))


def basis_dtype(*xs: Any) -> torch.dtype:
    return next(x.dtype for x in xs if isinstance(x, Jet))


@rule("masked_fill")
def _masked_fill(x: Jet, mask: Tensor, value: Any) -> Jet:
    if isinstance(value, Jet):
        return _where(mask, value, x)
    y = lift(x.coef, mask.dim()).masked_fill(mask, 0.0)
    y[0].masked_fill_(mask, value)
    return Jet(x.basis, y)


@rule("clamp", "clip")
def _clamp(x: Any, min: Any = None, max: Any = None) -> Jet:
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        raise lost("clamp with tensor bounds", "it has no rule")

    def f(v: Tensor) -> Triple:
        inside = (v >= (-math.inf if min is None else min)) & (v <= (math.inf if max is None else max))
        return v.clamp(min, max), inside.to(v.dtype), None

    return univariate(x, f)


@rule("clamp_min")
def _clamp_min(x: Jet, min: Any) -> Jet:
    return _clamp(x, min=min)


@rule("clamp_max")
def _clamp_max(x: Jet, max: Any) -> Jet:
    return _clamp(x, max=max)


@rule("square")
def _square(x: Jet) -> Jet:
    return Jet(x.basis, product(x.basis, x.coef, x.coef))


@rule("pow", "__pow__")
def _pow(x: Any, exponent: Any) -> Jet:
    if not isinstance(x, Jet):
        return _pow_base(x, exponent)
    if isinstance(exponent, Jet):
        raise lost("pow with a moving exponent", "it has no rule")
    if isinstance(exponent, Tensor) and exponent.numel() > 1:
        raise lost("pow with a tensor exponent", "it has no rule")
    n = float(exponent)
    if n == 2:
        return _square(x)

    def f(v: Tensor) -> Triple:
        return v**n, n * v ** (n - 1), n * (n - 1) * v ** (n - 2)

    return univariate(x, f)


@rule("__rpow__")
def _rpow(exponent: Any, base: Any) -> Jet:
    return _pow_base(base, exponent)


def _pow_base(base: Any, exponent: Jet) -> Jet:
    return univariate(scaled(exponent, math.log(base) if not isinstance(base, Tensor) else base.log()), exp)
