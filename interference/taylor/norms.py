"""Layer norm and RMS norm, in one pass over cache-sized blocks.

Models write RMS norm as x * rsqrt(mean(x^2) + eps) * w in elementary operations. Each of these steps is held back as a `Moment`
of x until the last one is there; used in any other way, it is computed as it stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from interference.taylor.activations import rsqrt, univariate
from interference.taylor.basis import Basis, compose, full, multiply, product
from interference.taylor.deferred import Deferred, strips
from interference.taylor.jet import Jet, rule

STEPS = ("square", "mean", "inverse", "normal")  # x^2; its mean + eps; that to the power -1/2; times x


@dataclass(frozen=True)
class Norm:
    """What is done to each row: centring, scale w and shift b (stacks of vectors)."""

    eps: float
    centred: bool = False
    weight: Tensor | None = None
    bias: Tensor | None = None

    def of(self, basis: Basis, x: Tensor) -> Tensor:
        """Stack of (x - m) / sqrt(mean (x - m)^2 + eps) * w + b, with m the row's mean or 0."""
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        flat = x.flatten(1, -2)  # [C, n, w]
        inverse = compose(basis, *_inverse(basis, flat, self.eps))[..., None]
        y = basis.pool.empty((basis.size, *x.shape[1:]), x.dtype, x.device)
        out = y.view(basis.size, -1, x.shape[-1])
        weight = None if self.weight is None else basis.parts(self.weight[:, None])
        bias = None if self.bias is None else full(basis, self.bias)[:, None]
        scratch: Tensor | None = None
        for part in strips(basis, out):
            goal, rows = out[:, part], basis.parts(flat[:, part])
            if weight is None:
                multiply(basis, rows, basis.parts(inverse[:, part]), basis.parts(goal))
            else:
                if scratch is None or scratch.shape != goal.shape:
                    scratch = torch.empty_like(goal)
                unit = basis.parts(scratch)
                multiply(basis, rows, basis.parts(inverse[:, part]), unit)
                multiply(basis, unit, weight, basis.parts(goal))
            if bias is not None:
                goal += bias
        return y


def _inverse(basis: Basis, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The mean squares + eps of the rows of x [C, n, w], and (f, f', f'') of the power -1/2 there."""
    x1 = basis.parts(x)[1]
    square = x.new_zeros((basis.size, x.shape[1]))
    torch.linalg.vecdot(x[:1], x, out=square[: len(x)])
    square[1:] *= 2
    if x1 is not None:
        for k in range(basis.updates):
            at = basis.place[k, k]
            square[at] += torch.linalg.vecdot(x1[k], x1[k])
            if not basis.diagonal and k + 1 < basis.updates:
                square[at + 1 : at + basis.updates - k] += 2 * torch.linalg.vecdot(x1[k], x1[k + 1 :])
    square /= x.shape[-1]
    square[0] += eps
    return square, *rsqrt(square[0])


class Moment(Deferred):
    """A step of an RMS norm of `source` over its last dimension."""

    step: str
    eps: float

    def compute(self, x: Tensor) -> Tensor:
        basis = self.basis
        if self.step == "normal":
            return Norm(self.eps).of(basis, x)
        y = product(basis, x, x)
        if self.step == "square":
            return y
        y = y.mean(-1, keepdim=True)
        y[0] += self.eps
        return y if self.step == "mean" else compose(basis, y, *rsqrt(y[0]))


def moment(source: Jet, step: str, eps: float = 0.0) -> Moment:
    """A step not computed yet."""
    shape = source.shape if step in ("square", "normal") else (*source.shape[:-1], 1)
    made: Moment = Moment(source, shape)
    made.step, made.eps = step, eps
    return made


def onward(x: Moment, step: str, eps: float) -> Moment:
    """The step after x, still of the source as it was when the first step was taken."""
    made = moment(x.source, step, eps)
    made.stamps = x.stamps
    return made


def after(x: Any, step: str) -> TypeGuard[Moment]:
    """Whether x is that step, still held back."""
    return isinstance(x, Moment) and x.pending and x.step == step


def joined(a: Jet, b: Jet) -> Jet | None:
    """The product of two jets where it is the next step of an RMS norm: x times its inverse, or that times a vector."""
    for x, y in ((a, b), (b, a)):
        if after(x, "inverse") and x.source is y:
            return onward(x, "normal", x.eps)
        if after(x, "normal") and y.dim() == 1:
            return Jet(x.basis, Norm(x.eps, weight=y.coef).of(x.basis, x.taken()))
    return None


def spread(x: Jet, by: Any) -> Jet | None:
    """A finished norm times a plain vector; None if it is not that."""
    if not after(x, "normal") or not isinstance(by, Tensor) or by.dim() != 1:
        return None
    return Jet(x.basis, Norm(x.eps, weight=by[None]).of(x.basis, x.taken()))


def _vector(x: Any) -> Tensor | None:
    return None if x is None else x.coef if isinstance(x, Jet) else x[None]


def _rows(x: Jet, normalized_shape: Any, norm: Norm) -> Jet:
    if len(normalized_shape) == 1:
        return Jet(x.basis, norm.of(x.basis, x.coef))
    k = len(normalized_shape)
    flat = [None if v is None else v.flatten(1) for v in (norm.weight, norm.bias)]
    y = Norm(norm.eps, norm.centred, *flat).of(x.basis, x.coef.flatten(-k))
    return Jet(x.basis, y.view(x.basis.size, *x.shape))


@rule("layer_norm", where=(torch.nn.functional,))
def _layer_norm(x: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    if not isinstance(x, Jet):
        y = torch.nn.functional.layer_norm(x, normalized_shape, eps=eps)
        return y * weight if bias is None else y * weight + bias if weight is not None else y + bias
    return _rows(x, normalized_shape, Norm(eps, True, _vector(weight), _vector(bias)))


@rule("rms_norm", where=(torch.nn.functional,))
def _rms_norm(x: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    if not isinstance(x, Jet):
        return torch.nn.functional.rms_norm(x, normalized_shape, eps=eps) * weight
    return _rows(x, normalized_shape, Norm(eps, False, _vector(weight)))


@rule("rsqrt")
def _rsqrt(x: Jet) -> Jet:
    if after(x, "mean"):
        return onward(x, "inverse", x.eps)
    return univariate(x, rsqrt)
