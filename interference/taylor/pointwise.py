"""Rules for element-wise operations: sums, products, and functions of one variable through (f, f', f'')."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from interference.taylor.activations import Activation, Triple, exp, reciprocal, univariate
from interference.taylor.basis import add, constant, full, lift, product
from interference.taylor.jet import Jet, Weight, lost, rule
from interference.taylor.norms import after, joined, moment, onward, spread
from interference.taylor.rotary import Turned


def scaled(x: Jet, by: Any) -> Jet:
    """x times a plain number or tensor."""
    return _by(x, by, torch.mul)


def _by(x: Jet, by: Any, op: Callable[..., Tensor]) -> Jet:
    if isinstance(x, Weight) and not isinstance(by, Tensor):
        return x.mapped(lambda w: op(w, by))
    coef = lift(x.coef, by.dim()) if isinstance(by, Tensor) else x.coef
    shape = torch.broadcast_shapes(coef.shape, by.shape) if isinstance(by, Tensor) else coef.shape
    return Jet(x.basis, op(coef, by, out=x.basis.pool.like(shape, coef, torch.result_type(coef, by))))


def shifted(x: Jet, by: Any) -> Jet:
    """x plus a plain number or tensor: only the value moves."""
    coef = x.coef
    if isinstance(by, Tensor):
        coef = lift(coef, by.dim())
        shape = torch.broadcast_shapes(coef.shape[1:], by.shape)
        coef = coef.expand(len(coef), *shape)
    y = x.basis.pool.like(coef.shape, coef, torch.result_type(coef, by))
    torch.add(coef[0], by, out=y[0])
    y[1:] = coef[1:]
    return Jet(x.basis, y)


def refuse_out(name: str, out: Any) -> None:
    if out is not None:
        raise lost(f"{name}(out=...)", "the output cannot take them up")


@rule("add")
def _add(a: Any, b: Any, *, alpha: Any = 1, out: Any = None) -> Jet:
    refuse_out("add", out)
    if isinstance(a, Jet) and isinstance(b, Jet):
        for x, y in ((a, b), (b, a)) if alpha == 1 else ():
            done = x.plus(y) if isinstance(x, Turned) else None
            if done is not None:
                return done
        return Jet(a.basis, add(a.basis, a.coef, b.coef, alpha))
    if after(a, "mean") and alpha == 1 and isinstance(b, int | float):
        return onward(a, "mean", a.eps + b)
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
        done = _together(a, b)
        return Jet(a.basis, product(a.basis, a.coef, b.coef)) if done is None else done
    x, by = (a, b) if isinstance(a, Jet) else (b, a)
    held = x.times(by) if isinstance(x, Turned) else spread(x, by)
    return scaled(x, by) if held is None else held


def _together(a: Jet, b: Jet) -> Jet | None:
    """The product with a quantity that was held back for it."""
    if a is b:
        return _square(a)
    norm = joined(a, b)
    if norm is not None:
        return norm
    for x, other in ((a, b), (b, a)):
        done = x.times(other) if isinstance(x, Activation) else None
        if done is not None:
            return done
    return None


@rule("div", "divide", "true_divide")
def _div(a: Any, b: Any, *, rounding_mode: Any = None, out: Any = None) -> Jet:
    refuse_out("div", out)
    if rounding_mode is not None:
        raise lost(f"div(rounding_mode={rounding_mode!r})", "it is piecewise constant")
    if isinstance(b, Jet):
        return _mul(a, univariate(b, reciprocal))
    return _by(a, b, torch.div)


@rule("__rdiv__", "__rtruediv__")
def _rdiv(a: Any, b: Any) -> Jet:
    return _div(b, a)


@rule("positive")
def _positive(x: Jet) -> Jet:
    return x


@rule("addcmul")
def _addcmul(x: Any, a: Any, b: Any, *, value: Any = 1) -> Any:
    return x + value * (a * b)


@rule("where", where=(torch, torch.Tensor))
def _where(condition: Any, a: Any = None, b: Any = None) -> Any:
    if isinstance(condition, Jet):  # x.where(condition, y)
        condition, a = a, condition
    if condition.dtype != torch.bool:
        raise lost("where", "its condition must be boolean")
    basis = next(x.basis for x in (a, b) if isinstance(x, Jet))
    like = next(x for x in (a, b) if isinstance(x, Jet))
    stacks = [full(basis, x.coef) if isinstance(x, Jet) else constant(basis, _plain(x, like)) for x in (a, b)]
    dims = max(condition.dim(), *(s.dim() - 1 for s in stacks))
    first, second = (lift(s, dims) for s in stacks)
    return Jet(basis, torch.where(condition, first, second))


def _plain(x: Any, like: Jet) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(x, dtype=like.dtype, device=like.device)


@rule("masked_fill")
def _masked_fill(x: Jet, mask: Tensor, value: Any) -> Any:
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
    return Jet(x.basis, product(x.basis, x.coef, x.coef)) if isinstance(x, Weight) else moment(x, "square")


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
    if n == -0.5 and after(x, "mean"):
        return onward(x, "inverse", x.eps)

    def f(v: Tensor) -> Triple:
        return v**n, n * v ** (n - 1), n * (n - 1) * v ** (n - 2)

    return univariate(x, f)


@rule("__rpow__")
def _rpow(exponent: Any, base: Any) -> Jet:
    return _pow_base(base, exponent)


def _pow_base(base: Any, exponent: Jet) -> Jet:
    return univariate(scaled(exponent, math.log(base) if not isinstance(base, Tensor) else base.log()), exp)
