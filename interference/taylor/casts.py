"""Casts, constants made after a jet, integer results, and what is refused because it would lose the coefficients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._prims_common import get_higher_dtype

from interference.taylor.basis import constant
from interference.taylor.fallback import primal, refuse
from interference.taylor.jet import RULES, Jet, lost, rule
from interference.taylor.structure import along


def cast(x: Jet, dtype: torch.dtype | None, device: Any = None) -> Any:
    """A cast that never narrows: exact arithmetic knows none, and models' float32 islands would spoil float64.

    Integers are piecewise constant, so the cast to them is plain.
    """
    if dtype is not None and not dtype.is_floating_point:
        return x.primal.to(dtype) if not dtype.is_complex else along(x, lambda c: c.to(dtype))
    wide = get_higher_dtype(x.dtype, dtype) if dtype is not None else x.dtype
    if wide == x.dtype and (device is None or torch.device(device) == x.device):
        return x if dtype in (None, x.dtype) else along(x, torch.clone)  # torch would copy: keep the two apart
    return along(x, lambda c: c.to(dtype=wide, device=device if device is not None else c.device))


@rule("to", where=(torch.Tensor,))
def _to(x: Any, *args: Any, **kwargs: Any) -> Any:
    if args and isinstance(args[0], Tensor):
        other = args[0]
        if not isinstance(x, Jet):
            return x.to(device=other.device, dtype=other.dtype)
        return cast(x, other.dtype, other.device)
    device, dtype, *_ = torch._C._nn._parse_to(
        *args, **{k: v for k, v in kwargs.items() if k in ("dtype", "device", "non_blocking")}
    )
    return cast(x, dtype, device)


@rule("type", where=(torch.Tensor,))
def _type(x: Jet, dtype: Any = None) -> Any:
    if dtype is None:
        return x.primal.type()
    if not isinstance(dtype, torch.dtype):
        raise lost(f"type({dtype!r})", "only torch dtypes are followed")
    return cast(x, dtype)


@rule("type_as", where=(torch.Tensor,))
def _type_as(x: Any, other: Tensor) -> Any:
    return cast(x, other.dtype, other.device) if isinstance(x, Jet) else x.to(other.dtype)


@rule("float", where=(torch.Tensor,))
def _float(x: Jet, memory_format: Any = None) -> Any:
    return cast(x, torch.float32)


@rule("double", where=(torch.Tensor,))
def _double(x: Jet, memory_format: Any = None) -> Any:
    return cast(x, torch.float64)


@rule("half", "bfloat16", where=(torch.Tensor,))
def _half(x: Jet, memory_format: Any = None) -> Any:
    return cast(x, torch.bfloat16)


@rule("dropout", "alpha_dropout", "feature_alpha_dropout", where=(torch.nn.functional,))
def _dropout(x: Jet, p: float = 0.5, training: bool = True, inplace: bool = False) -> Jet:
    if training and p > 0:
        raise lost("dropout", "it is random; put the model in eval mode")
    return x


def _filled(x: Jet, value: float, size: Any, dtype: Any, device: Any) -> Any:
    made = torch.full(tuple(size), value, dtype=dtype or x.dtype, device=device or x.device)
    # a jet, so that code that accumulates into it in place is followed
    return Jet(x.basis, constant(x.basis, made)) if made.is_floating_point() else made


@rule("zeros_like", "empty_like", where=(torch,))
def _zeros_like(x: Jet, *, dtype: Any = None, device: Any = None, **_: Any) -> Any:
    return _filled(x, 0.0, x.shape, dtype, device)


@rule("ones_like", where=(torch,))
def _ones_like(x: Jet, *, dtype: Any = None, device: Any = None, **_: Any) -> Any:
    return _filled(x, 1.0, x.shape, dtype, device)


@rule("full_like", where=(torch,))
def _full_like(x: Jet, fill_value: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Any:
    return _filled(x, primal(fill_value), x.shape, dtype, device)


@rule("new_zeros", "new_empty", where=(torch.Tensor,))
def _new_zeros(x: Jet, *size: Any, dtype: Any = None, device: Any = None, **_: Any) -> Any:
    sizes = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
    return _filled(x, 0.0, sizes, dtype, device)


def _on_primal(func: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        return func(*(primal(a) for a in args), **{k: primal(v) for k, v in kwargs.items()})

    return run


# Piecewise constant: their derivatives are zero wherever they exist, and their results are plain.
PIECEWISE_CONSTANT = """
    eq ne lt le gt ge greater less isnan isinf isfinite argmax argmin argsort floor ceil round trunc sign
    logical_not logical_and logical_or __eq__ __ne__ __lt__ __le__ __gt__ __ge__ isclose allclose equal
    bucketize count_nonzero new_ones new_full new_tensor is_nonzero bool int long
"""
for _name in PIECEWISE_CONSTANT.split():
    for _place in (torch, torch.Tensor):
        if hasattr(_place, _name):
            RULES[getattr(_place, _name)] = _on_primal(getattr(_place, _name))

for _name in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__", "data_ptr",
              "untyped_storage", "storage", "detach", "detach_", "backward", "requires_grad_", "register_hook", "as_strided",
              "set_", "resize_", "share_memory_", "__deepcopy__", "__reduce_ex__", "__contains__",
              "__format__"):  # fmt: skip
    RULES[getattr(torch.Tensor, _name)] = refuse(_name)
