"""Named-tensor algebra: a mapping {parameter name: tensor} as a vector, with float64 accumulation.

Every reduction multiplies and adds in float64 block by block, because a float32 sum over 1e9 products loses the small
inner products that interference is made of.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from interference.errors import InputError

NamedTensors = Mapping[str, Tensor]
_BLOCK = 1 << 22


def dot(a: NamedTensors, b: NamedTensors) -> float:
    """Inner product <a, b> over the names that both have; a name that one lacks is zero there.

    >>> import torch
    >>> a = {"w": torch.ones(2, 2), "b": torch.ones(3)}
    >>> dot(a, {"w": 2 * torch.ones(2, 2)})
    8.0
    """
    return sum(tensor_dot(a[name], b[name]) for name in a if name in b)


def tensor_dot(a: Tensor, b: Tensor) -> float:
    """Inner product of two tensors of one shape, accumulated in float64."""
    if a.shape != b.shape:
        raise InputError(
            got=f"tensors of shapes {tuple(a.shape)} and {tuple(b.shape)}",
            expected="one shape",
            remedy="compare updates of one model",
        )
    total = 0.0
    for x, y in zip(a.reshape(-1).split(_BLOCK), b.reshape(-1).split(_BLOCK), strict=True):
        total += float(x.double() @ y.double())
    return total


def norm(a: NamedTensors) -> float:
    """Euclidean norm |a|.

    >>> import torch
    >>> norm({"w": torch.tensor([3.0, 4.0])})
    5.0
    """
    return float(dot(a, a) ** 0.5)


def cosine(a: NamedTensors, b: NamedTensors) -> float:
    """<a, b> / (|a| |b|), NaN when one of them is zero."""
    scale = norm(a) * norm(b)
    return dot(a, b) / scale if scale else float("nan")


def axpy(alpha: float, x: NamedTensors, y: NamedTensors) -> dict[str, Tensor]:
    """alpha x + y on the union of the names.

    >>> import torch
    >>> axpy(2.0, {"w": torch.ones(1)}, {"w": torch.ones(1), "b": torch.ones(1)})
    {'w': tensor([3.]), 'b': tensor([1.])}
    """
    out = {name: y[name] + alpha * x[name] if name in x else y[name] for name in y}
    out.update({name: alpha * x[name] for name in x if name not in y})
    return out
