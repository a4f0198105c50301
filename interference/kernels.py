"""What stands in for a model's kernels while it is differentiated: those whose derivatives are wrong are refused or replaced.

Nothing here changes what a model computes, only by which operations (docs/numerics.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import function as _function
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from interference.errors import InputError


@contextmanager
def differentiable() -> Iterator[None]:
    """What a model's own code needs to be right under torch.func: layer norm and grouped products by elementary
    operations, scaled dot product attention by its math kernel, custom autograd Functions refused, and grad mode on, without
    which torch takes operations that forward mode lacks."""
    with (
        refuse_custom_functions(),
        Composite(),
        sdpa_kernel(SDPBackend.MATH),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        yield


@contextmanager
def refuse_custom_functions() -> Iterator[None]:
    """Raise InputError when code of this thread applies a `torch.autograd.Function`.

    Its forward is code whose derivative somebody wrote by hand, to first order only: nested forward mode returns a second
    derivative of zero, and Taylor coefficients would follow a forward that the backward need not agree with. Fused kernels
    (Liger, hub kernels) are such Functions. Contexts may be nested; the last one out restores torch.

    >>> class Double(torch.autograd.Function):
    ...     @staticmethod
    ...     def forward(ctx, x):
    ...         return 2 * x
    >>> with refuse_custom_functions():
    ...     Double.apply(torch.ones(1))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    interference.errors.InputError: got a model that applies ...Double, a custom autograd.Function; ...
    """
    _enter()
    try:
        yield
    except RuntimeError as error:  # torch.func's own refusal, which comes before ours can
        if "autograd.Function with functorch" not in str(error):
            raise
        raise _refusal(_culprit(error)) from error
    finally:
        _leave()


_here = threading.local()
_lock = threading.Lock()
_users = 0
_torch: Any = _function  # its private names are what is patched
_call = _torch.custom_function_call


def _enter() -> None:
    """Patch torch where every application ends up, also one bound early (`apply = MyFunction.apply`)."""
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            _torch._SingleLevelFunction.apply = classmethod(_apply)
            _torch.custom_function_call = _call_under_transform
    _here.depth = getattr(_here, "depth", 0) + 1


def _leave() -> None:
    global _users
    _here.depth -= 1
    with _lock:
        _users -= 1
        if _users == 0:
            del _torch._SingleLevelFunction.apply
            _torch.custom_function_call = _call


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    if getattr(_here, "depth", 0):
        raise _refusal(cls)
    return super(_torch._SingleLevelFunction, cls).apply(*args, **kwargs)


def _call_under_transform(cls: Any, *args: Any, **kwargs: Any) -> Any:
    if getattr(_here, "depth", 0):
        raise _refusal(cls)
    return _call(cls, *args, **kwargs)


def _culprit(error: BaseException) -> Any:
    """The Function whose application raised."""
    trace, found = error.__traceback__, None
    while trace is not None:
        found = trace.tb_frame.f_locals.get("cls", found)
        trace = trace.tb_next
    return found


def _refusal(cls: Any) -> InputError:
    name = f"{getattr(cls, '__module__', '?')}.{getattr(cls, '__qualname__', cls)}"
    return InputError(
        got=f"a model that applies {name}, a custom autograd.Function",
        expected="operations that torch differentiates twice: a hand-written derivative is silently lost in second order",
        remedy="disable fused kernels (Liger: apply no patch; hub kernels: use_kernels=False), or use the eager code",
    )


class Composite(TorchFunctionMode):
    """Calls of some torch functions by others, {function: stand-in}: by default layer norm and grouped products.

    The native layer norm is silently wrong under nested forward mode; the native grouped product (mixtures of experts) has
    neither forward mode nor float64.
    """

    def __init__(self, instead: Mapping[Any, Callable[..., Any]] | None = None) -> None:
        super().__init__()
        self.instead = INSTEAD if instead is None else instead

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.instead.get(func, func)(*args, **(kwargs or {}))


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """torch.nn.functional.layer_norm: (x - mean) / sqrt(var + eps) w + b over the last axes."""
    axes = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(axes, keepdim=True)
    out = centred * torch.rsqrt((centred * centred).mean(axes, keepdim=True) + eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def grouped_product(
    input: Tensor, mat2: Tensor, *, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    """torch.nn.functional.grouped_mm of rows (N, in) and weights (E, in, out): rows up to offs[e] meet weight e.

    Rows behind the last offset are zero.
    """
    if offs is None or bias is not None or out_dtype is not None or input.dim() != 2 or mat2.dim() != 3:
        _refuse_product()
    ends = offs.tolist()
    parts = [input[a:b] @ mat2[e] for e, (a, b) in enumerate(zip([0, *ends[:-1]], ends, strict=True))]
    rest = len(input) - ends[-1]
    return torch.cat([*parts, input.new_zeros(rest, mat2.shape[2])] if rest else parts)


def _refuse_product() -> NoReturn:
    raise InputError(
        got="a grouped matrix product of other than rows (N, in) and weights (E, in, out)",
        expected="experts as transformers computes them",
        remedy='load the model with experts_implementation="eager"',
    )


def _found(name: str, *places: Any) -> list[Any]:
    return [getattr(place, name) for place in places if hasattr(place, name)]


GROUPED = dict.fromkeys(
    [*_found("grouped_mm", torch, nn.functional), *_found("_grouped_mm", torch)],
    grouped_product,
)
INSTEAD: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_found("layer_norm", torch, nn.functional), layer_norm),
    **GROUPED,
}
