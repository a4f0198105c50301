"""Rules for indices: reading and writing at plain positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from interference.taylor.basis import constant, full, lift
from interference.taylor.fallback import overwrite
from interference.taylor.jet import Jet, lost, rule
from interference.taylor.structure import along, shift


@rule("__getitem__", where=(torch.Tensor,))
def _getitem(x: Any, index: Any) -> Any:
    if not isinstance(x, Jet):
        raise lost("an index", "a position must be a plain integer tensor")
    index = index if isinstance(index, tuple) else (index,)
    if any(isinstance(i, Jet) for i in index):
        raise lost("an index", "a position must be a plain integer tensor")
    return along(x, lambda c: c[(slice(None), *index)])


@rule("__setitem__", where=(torch.Tensor,))
def _setitem(x: Any, index: Any, value: Any) -> None:
    if not (isinstance(x, Jet) and x.writable):
        raise lost("item assignment", f"a {type(x).__name__} cannot take them up")
    index = index if isinstance(index, tuple) else (index,)
    at = (slice(None), *index)
    if isinstance(value, Jet):
        new = full(x.basis, value.coef)
        x.coef[at] = lift(new, x.coef[at].dim() - 1)
    else:
        x.coef[at] = 0
        x.coef[(0, *index)] = value


@rule("copy_", where=(torch.Tensor,))
def _copy(x: Any, value: Any, non_blocking: bool = False) -> Any:
    if not (isinstance(x, Jet) and x.writable):
        raise lost("copy_", f"a {type(x).__name__} cannot take them up")
    overwrite(x, value, "copy_")
    return x


def _linear_in_dim(name: str, first: Callable[..., Any]) -> None:
    """Register a linear function whose second argument is a dimension."""

    def run(x: Any, dim: int, *args: Any, **kwargs: Any) -> Jet:
        if not isinstance(x, Jet) or any(isinstance(a, Jet) for a in args):
            return added(x, dim, *args, **kwargs)
        return along(x, lambda c: first(c, shift(dim), *args, **kwargs))

    def added(x: Any, dim: int, index: Tensor, source: Any, **kwargs: Any) -> Jet:
        """index_add, scatter_add: linear in both the base and the source."""
        if name not in ("index_add", "scatter_add"):
            raise lost(name, "no rule for these arguments")
        basis = (x if isinstance(x, Jet) else source).basis
        a = full(basis, x.coef) if isinstance(x, Jet) else constant(basis, x)
        b = full(basis, source.coef) if isinstance(source, Jet) else constant(basis, source)
        if name == "scatter_add":
            index = index.expand(basis.size, *index.shape)
        return Jet(basis, first(a, shift(dim), index, b, **kwargs))

    rule(name)(run)


for _name in ("index_select", "narrow", "select", "index_add"):
    _linear_in_dim(_name, getattr(torch, _name))


@rule("gather")
def _gather(x: Jet, dim: int, index: Tensor) -> Jet:
    return along(x, lambda c: c.gather(shift(dim), index.expand(len(c), *index.shape)))


@rule("scatter")
def _scatter(x: Any, dim: int, index: Tensor, src: Any = None, *, value: Any = None) -> Jet:
    given = value if src is None else src
    basis = next(v.basis for v in (x, given) if isinstance(v, Jet))
    base = full(basis, x.coef) if isinstance(x, Jet) else constant(basis, x)
    if not isinstance(given, Tensor):
        given = torch.full(index.shape, given, dtype=base.dtype, device=base.device)
    new = full(basis, given.coef) if isinstance(given, Jet) else constant(basis, given)
    return Jet(basis, base.scatter(shift(dim), index.expand(len(base), *index.shape), new))
