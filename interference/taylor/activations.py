"""Functions of one variable: each gives its value and two derivatives at x_0, and `compose` does the rest."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from interference.taylor.basis import compose, product
from interference.taylor.deferred import Deferred, blockwise
from interference.taylor.jet import Jet, rule

Triple = tuple[Tensor, Tensor, Tensor | None]


class Activation(Deferred):
    """f(x) for a function of one variable, held back: most models multiply it by a gate next."""

    f: Callable[[Tensor], Triple]

    def compute(self, x: Tensor) -> Tensor:
        done = blockwise(self.basis, self.along, x)
        return self.along(x) if done is None else done

    def along(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return compose(self.basis, x, *self.f(x[0]), out)

    def times(self, gate: Jet) -> Jet | None:
        """The product with another jet of the same shape, in blocks; None if it cannot be cut so."""
        if not self.pending or gate is self or gate.shape != self.shape:
            return None
        basis = self.basis
        y = blockwise(basis, lambda x, g, out: product(basis, self.along(x), g, out), self.taken(), gate.coef)
        return None if y is None else Jet(basis, y)


def univariate(x: Jet, f: Callable[[Tensor], Triple]) -> Jet:
    """A function of one variable, from its value and two derivatives; only x_0 enters those."""
    made: Activation = Activation(x)
    made.f = f
    return made


def _register(*names: str) -> Callable[[Callable[[Tensor], Triple]], Callable[[Tensor], Triple]]:
    def register(f: Callable[[Tensor], Triple]) -> Callable[[Tensor], Triple]:
        rule(*names, where=(torch, torch.Tensor, torch.nn.functional, torch.special))(
            lambda x, inplace=False: _once(x, f, inplace)
        )
        return f

    return register


def _once(x: Jet, f: Callable[[Tensor], Triple], inplace: bool) -> Jet:
    y = univariate(x, f)
    if inplace:
        x.coef.copy_(y.coef)
        return x
    return y


@_register("reciprocal")
def reciprocal(x: Tensor) -> Triple:
    r = x.reciprocal()
    return r, -r * r, 2 * r * r * r


def rsqrt(x: Tensor) -> Triple:
    r = x.rsqrt()
    cube = r * r * r
    return r, -0.5 * cube, 0.75 * cube * r * r


@_register("sqrt")
def sqrt(x: Tensor) -> Triple:
    s = x.sqrt()
    return s, 0.5 / s, -0.25 / (s * x)


@_register("exp")
def exp(x: Tensor) -> Triple:
    e = x.exp()
    return e, e, e


@_register("log")
def log(x: Tensor) -> Triple:
    r = x.reciprocal()
    return x.log(), r, -r * r


@_register("tanh")
def tanh(x: Tensor) -> Triple:
    t = x.tanh()
    d = 1 - t * t
    return t, d, -2 * t * d


@_register("sigmoid", "expit")
def sigmoid(x: Tensor) -> Triple:
    s = x.sigmoid()
    d = s * (1 - s)
    return s, d, d * (1 - 2 * s)


@_register("silu")
def silu(x: Tensor) -> Triple:
    s = x.sigmoid()
    f = x * s
    f1 = (s + f).addcmul_(f, s, value=-1)
    t = (f1 + f1).sub_(f)
    return f, f1, torch.addcmul(t, s, t, value=-1)  # f1 = s + f (1 - s),  f2 = (1 - s) (2 f1 - f)


@_register("softplus")
def softplus(x: Tensor) -> Triple:
    s = x.sigmoid()
    return torch.nn.functional.softplus(x, threshold=1e6), s, s * (1 - s)


@_register("logsigmoid")
def logsigmoid(x: Tensor) -> Triple:
    s = x.sigmoid()
    return torch.nn.functional.logsigmoid(x), 1 - s, -s * (1 - s)


@_register("sin")
def sin(x: Tensor) -> Triple:
    s = x.sin()
    return s, x.cos(), -s


@_register("cos")
def cos(x: Tensor) -> Triple:
    c = x.cos()
    return c, -x.sin(), -c


@_register("erf")
def erf(x: Tensor) -> Triple:
    d = (2 / math.sqrt(math.pi)) * torch.exp(-x * x)
    return x.erf(), d, -2 * x * d


@_register("relu")
def relu(x: Tensor) -> Triple:
    return x.relu(), (x > 0).to(x.dtype), None


@_register("abs")
def absolute(x: Tensor) -> Triple:
    return x.abs(), x.sign(), None


@_register("relu6")
def relu6(x: Tensor) -> Triple:
    return x.clamp(0, 6), ((x > 0) & (x < 6)).to(x.dtype), None


def gelu_erf(x: Tensor) -> Triple:
    cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    pdf = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return x * cdf, cdf + x * pdf, pdf * (2 - x * x)


def gelu_tanh(x: Tensor) -> Triple:
    c, a = math.sqrt(2 / math.pi), 0.044715
    square = x * x
    t = torch.tanh(c * x * (1 + a * square))
    t1 = 1 - t * t
    u1, u2 = c * (1 + 3 * a * square), 6 * a * c * x
    value = 0.5 * x * (1 + t)
    first = 0.5 * (1 + t) + 0.5 * x * t1 * u1
    return value, first, t1 * u1 + 0.5 * x * t1 * (u2 - 2 * t * u1 * u1)


@rule("gelu", where=(torch.nn.functional,))
def _gelu(x: Jet, approximate: str = "none") -> Jet:
    return univariate(x, gelu_tanh if approximate == "tanh" else gelu_erf)


@rule("leaky_relu", where=(torch.nn.functional,))
def _leaky_relu(x: Jet, negative_slope: float = 0.01, inplace: bool = False) -> Jet:
    def f(v: Tensor) -> Triple:
        return (
            torch.nn.functional.leaky_relu(v, negative_slope),
            torch.where(v > 0, torch.ones_like(v), negative_slope),
            None,
        )

    return _once(x, f, inplace)
