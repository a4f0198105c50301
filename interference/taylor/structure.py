"""Rules for shapes, indices and casts: linear functions of one jet, applied to all coefficients at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from interference.taylor.basis import Basis, constant, full
from interference.taylor.jet import RULES, Jet, Weight, lost, rule
from interference.taylor.rotary import turned


def along(x: Jet, f: Callable[[Tensor], Tensor]) -> Jet:
    """Apply a function that is linear and treats the leading dimension of a stack as a batch."""
    if isinstance(x, Weight):
        return x.mapped(lambda w: f(w[None])[0])
    return Jet(x.basis, f(x.coef))


def shift(dim: int) -> int:
    """A dimension of a jet as a dimension of its stack."""
    return dim + 1 if dim >= 0 else dim


def _sizes(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes


def _metadata(func: Any) -> Any:
    def look(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    return look


for _name in ("shape", "dtype", "device", "ndim", "is_cuda", "is_sparse", "layout", "requires_grad", "is_leaf",
              "is_meta", "is_nested", "is_quantized", "is_mps", "is_cpu", "itemsize", "grad", "grad_fn", "is_xpu"):  # fmt: skip
    RULES[getattr(torch.Tensor, _name).__get__] = _metadata(getattr(torch.Tensor, _name).__get__)
for _name in ("size", "dim", "stride", "numel", "nelement", "is_contiguous", "is_floating_point", "is_complex", "ndimension",
              "__len__", "get_device", "element_size", "storage_offset", "__hash__", "is_conj", "is_neg", "is_inference",
              "is_same_size"):  # fmt: skip
    for _place in (torch, torch.Tensor):
        if hasattr(_place, _name):
            RULES[getattr(_place, _name)] = _metadata(getattr(_place, _name))


@rule("view")
def _view(x: Jet, *sizes: Any) -> Jet:
    if len(sizes) == 1 and isinstance(sizes[0], torch.dtype):
        raise lost("view(dtype)", "it reinterprets bits")
    size = _sizes(sizes)
    return along(x, lambda c: c.view(len(c), *size))


@rule("reshape")
def _reshape(x: Jet, *sizes: Any, shape: Any = None) -> Jet:
    size = _sizes(sizes) if sizes else tuple(shape)
    return along(x, lambda c: c.reshape(len(c), *size))


@rule("view_as", "reshape_as", where=(torch.Tensor,))
def _reshape_as(x: Any, other: Tensor) -> Any:
    return x.reshape(other.shape)


@rule("transpose", "swapaxes", "swapdims")
def _transpose(x: Jet, dim0: int, dim1: int) -> Jet:
    return along(x, lambda c: c.transpose(shift(dim0), shift(dim1)))


@rule("t")
def _t(x: Jet) -> Jet:
    if isinstance(x, Weight) and x.dim() == 2:
        return x.transposed()
    return x if x.dim() < 2 else _transpose(x, 0, 1)


@rule("T", "mT", where=(torch.Tensor,))
def _mt(x: Jet) -> Jet:
    if x.dim() != 2:
        return along(x, lambda c: c.mT) if x.dim() > 2 else x
    return _transpose(x, 0, 1)


@rule("permute")
def _permute(x: Jet, *dims: Any) -> Jet:
    order = [d % x.dim() + 1 for d in _sizes(dims)]
    return along(x, lambda c: c.permute(0, *order))


@rule("movedim", "moveaxis")
def _movedim(x: Jet, source: Any, destination: Any) -> Jet:
    a, b = (tuple(map(shift, (d,) if isinstance(d, int) else d)) for d in (source, destination))
    return along(x, lambda c: c.movedim(a, b))


@rule("unsqueeze")
def _unsqueeze(x: Jet, dim: int) -> Jet:
    return along(x, lambda c: c.unsqueeze(shift(dim)))


@rule("squeeze")
def _squeeze(x: Jet, dim: Any = None) -> Jet:
    dims = range(x.dim()) if dim is None else (dim,) if isinstance(dim, int) else dim
    places = tuple(d % x.dim() + 1 for d in dims)
    return along(x, lambda c: c.squeeze(places))


@rule("flatten")
def _flatten(x: Jet, start_dim: int = 0, end_dim: int = -1) -> Jet:
    return along(x, lambda c: c.flatten(shift(start_dim), shift(end_dim)))


@rule("unflatten")
def _unflatten(x: Jet, dim: int, sizes: Any) -> Jet:
    return along(x, lambda c: c.unflatten(shift(dim), sizes))


@rule("expand", "broadcast_to")
def _expand(x: Jet, *sizes: Any) -> Jet:
    size = _sizes(sizes)

    def expanded(c: Tensor) -> Tensor:
        missing = len(size) - (c.dim() - 1)
        return c.reshape(len(c), *([1] * missing), *c.shape[1:]).expand(len(c), *size)

    return along(x, expanded)


@rule("expand_as", where=(torch.Tensor,))
def _expand_as(x: Jet, other: Tensor) -> Jet:
    return _expand(x, *other.shape)


@rule("repeat", where=(torch.Tensor,))
def _repeat(x: Jet, *sizes: Any) -> Jet:
    size = _sizes(sizes)
    return along(x, lambda c: c.reshape(len(c), *([1] * (len(size) - c.dim() + 1)), *c.shape[1:]).repeat(1, *size))


@rule("contiguous", where=(torch.Tensor,))
def _contiguous(x: Jet, memory_format: Any = None) -> Jet:
    return x if x.is_contiguous() else along(x, lambda c: c.contiguous())


@rule("clone")
def _clone(x: Jet, memory_format: Any = None) -> Jet:
    return along(x, torch.clone)


@rule("view_as_complex", where=(torch,))
def _view_as_complex(x: Jet) -> Jet:
    return along(x, torch.view_as_complex)


@rule("view_as_real", where=(torch,))
def _view_as_real(x: Jet) -> Jet:
    return along(x, torch.view_as_real)


@rule("resolve_conj", "resolve_neg", where=(torch,))
def _same(x: Jet) -> Jet:
    return x


def _pieces(x: Jet, f: Callable[[Tensor], Sequence[Tensor]]) -> tuple[Jet, ...]:
    if isinstance(x, Weight):
        count = len(f(x.value[None]))
        return tuple(x.mapped(lambda w, i=i: f(w[None])[i][0]) for i in range(count))  # type: ignore[misc]
    return tuple(Jet(x.basis, c) for c in f(x.coef))


@rule("split", "split_with_sizes")
def _split(x: Jet, split_size: Any, dim: int = 0) -> tuple[Jet, ...]:
    return _pieces(x, lambda c: torch.split(c, split_size, shift(dim)))


@rule("chunk")
def _chunk(x: Jet, chunks: int, dim: int = 0) -> tuple[Jet, ...]:
    return _pieces(x, lambda c: c.chunk(chunks, shift(dim)))


@rule("unbind")
def _unbind(x: Jet, dim: int = 0) -> tuple[Jet, ...]:
    return _pieces(x, lambda c: c.unbind(shift(dim)))


@rule("__iter__", where=(torch.Tensor,))
def _iter(x: Jet) -> Any:
    return iter(_unbind(x))


@rule("cat", "concat", "concatenate", where=(torch,))
def _cat(tensors: Sequence[Any], dim: int = 0, *, out: Any = None) -> Jet:
    if out is not None:
        raise lost("cat(out=...)", "the output cannot take them up")
    held = turned(tensors, dim)
    if held is not None:
        return held
    basis = next(x.basis for x in tensors if isinstance(x, Jet))
    low = all(isinstance(x, Jet) and len(x.coef) == basis.low for x in tensors)
    stacks = [x.coef if isinstance(x, Jet) else constant(basis, x) for x in tensors]
    stacks = stacks if low else [full(basis, s) for s in stacks]
    return Jet(basis, joined(basis, stacks, shift(dim)))


def joined(basis: Basis, stacks: Sequence[Tensor], dim: int) -> Tensor:
    """Stacks of equal dimensions, one after the other along a dimension of theirs."""
    size = list(stacks[0].shape)
    size[dim] = sum(s.shape[dim] for s in stacks)
    y = basis.pool.like(size, stacks[0], stacks[0].dtype)
    return torch.cat(list(stacks), dim, out=y)


@rule("stack", where=(torch,))
def _stack(tensors: Sequence[Any], dim: int = 0) -> Any:
    return _cat([x.unsqueeze(dim) for x in tensors], dim)


@rule("repeat_interleave")
def _repeat_interleave(x: Jet, repeats: Any, dim: int | None = None, **kwargs: Any) -> Jet:
    x = x if dim is not None else _flatten(x)
    return along(x, lambda c: c.repeat_interleave(repeats, shift(dim or 0), **kwargs))


@rule("roll")
def _roll(x: Jet, shifts: Any, dims: Any) -> Jet:
    return along(x, lambda c: c.roll(shifts, shift(dims) if isinstance(dims, int) else tuple(map(shift, dims))))


@rule("flip")
def _flip(x: Jet, *dims: Any) -> Jet:
    return along(x, lambda c: c.flip(tuple(map(shift, _sizes(dims)))))


@rule("cumsum")
def _cumsum(x: Jet, dim: int, dtype: Any = None) -> Jet:
    return along(x, lambda c: c.cumsum(shift(dim)))


@rule("tril")
def _tril(x: Jet, diagonal: int = 0) -> Jet:
    return along(x, lambda c: c.tril(diagonal))


@rule("triu")
def _triu(x: Jet, diagonal: int = 0) -> Jet:
    return along(x, lambda c: c.triu(diagonal))


@rule("pad", where=(torch.nn.functional,))
def _pad(x: Jet, pad: Any, mode: str = "constant", value: float | None = None) -> Jet:
    if mode != "constant" or value:
        raise lost(f"pad(mode={mode!r}, value={value})", "only zero padding has a rule")
    return along(x, lambda c: torch.nn.functional.pad(c, pad))
