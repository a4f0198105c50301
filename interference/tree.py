"""Named-tensor algebra: a mapping {parameter name: tensor} as a vector, with float64 accumulation.

Every reduction multiplies and adds in float64 block by block, because a float32 sum over 1e9 products loses the small
inner products that interference is made of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interference.errors import InputError

NamedTensors = Mapping[str, Tensor]
_BLOCK = 1 << 22


@dataclass(frozen=True, eq=False)
class LowRank:
    """The change of a matrix (out, in) as the product up @ down of factors (out, r) and (r, in), with any scale in `up`.

    The Taylor engine applies it by its factors, which makes an update's products almost free.

    >>> import torch
    >>> change = LowRank(up=torch.ones(3, 1), down=torch.ones(1, 2))
    >>> tuple(change.shape), float(change.dense().sum())
    ((3, 2), 6.0)
    """

    up: Tensor
    down: Tensor

    def __post_init__(self) -> None:
        if self.up.dim() != 2 or self.down.dim() != 2 or self.up.shape[1] != self.down.shape[0]:
            raise InputError(
                got=f"factors of shapes {tuple(self.up.shape)} and {tuple(self.down.shape)}",
                expected="(out, r) and (r, in)",
                remedy="give LoRA's B as `up` and A as `down`",
            )

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.up.shape[0], self.down.shape[1]))

    def dense(self) -> Tensor:
        """The matrix itself."""
        return self.up @ self.down

    def to(self, *args: Any, **kwargs: Any) -> LowRank:
        """Both factors through Tensor.to."""
        return LowRank(self.up.to(*args, **kwargs), self.down.to(*args, **kwargs))

    def t(self) -> LowRank:
        """The transpose, as factors."""
        return LowRank(self.down.t(), self.up.t())

    def rows(self, index: Tensor) -> Tensor:
        """Some rows of the matrix."""
        return self.up.index_select(0, index) @ self.down


Change = Tensor | LowRank
NamedChanges = Mapping[str, Change]


def dense(change: Change) -> Tensor:
    """A change as a plain tensor."""
    return change.dense() if isinstance(change, LowRank) else change


def scaled(change: Change, scale: float) -> Change:
    """scale * change; factors stay factors."""
    return LowRank(scale * change.up, change.down) if isinstance(change, LowRank) else scale * change


def added(a: Change, b: Change) -> Change:
    """a + b. Factors stay factors, of the summed rank, while that takes less room than the matrix.

    >>> import torch
    >>> one = LowRank(up=torch.ones(4, 1), down=torch.ones(1, 5))
    >>> both = added(one, one)
    >>> type(both).__name__, float(dense(both)[0, 0])
    ('LowRank', 2.0)
    """
    if isinstance(a, LowRank) and isinstance(b, LowRank) and a.shape == b.shape:
        rank, (rows, columns) = a.up.shape[1] + b.up.shape[1], a.shape
        if rank * (rows + columns) < rows * columns:
            return LowRank(torch.cat([a.up, b.up], dim=1), torch.cat([a.down, b.down], dim=0))
    _check_shapes(a, b)
    return dense(a) + dense(b)


def is_zero(change: Change) -> bool:
    """Whether a change is zero everywhere, seen from its factors."""
    parts = (change.up, change.down) if isinstance(change, LowRank) else (change,)
    return not all(bool(part.any()) for part in parts)


def is_finite(change: Change) -> bool:
    """Whether every entry is finite, seen from the factors."""
    parts = (change.up, change.down) if isinstance(change, LowRank) else (change,)
    return all(bool(torch.isfinite(part).all()) for part in parts)


def dot(a: NamedChanges, b: NamedChanges) -> float:
    """Inner product <a, b> over the names that both have; a name that one lacks is zero there.

    >>> import torch
    >>> a = {"w": torch.ones(2, 2), "b": torch.ones(3)}
    >>> dot(a, {"w": 2 * torch.ones(2, 2)})
    8.0
    """
    return dots(a, [b])[0]


def dots(a: NamedChanges, others: Sequence[NamedChanges]) -> list[float]:
    """<a, b> for every b; every block of a becomes float64 once."""
    found = [0.0] * len(others)
    for name, change in a.items():
        shared = [k for k, b in enumerate(others) if name in b]
        if isinstance(change, LowRank) or any(isinstance(others[k][name], LowRank) for k in shared):
            for k in shared:
                found[k] += tensor_dot(change, others[k][name])
            continue
        for k in shared:
            _check_shapes(change, others[k][name])
        rows = [_blocks(dense(others[k][name]).reshape(-1)) for k in shared]
        for block, *parts in zip(_blocks(change.reshape(-1)), *rows, strict=True):
            wide = block.double()
            for k, part in zip(shared, parts, strict=True):
                found[k] += float(wide @ part.double())
    return found


def tensor_dot(a: Change, b: Change) -> float:
    """Inner product of two tensors of one shape, accumulated in float64; factors are not multiplied out.

    For factors <U V, X Y> = <U'X, V Y'>, of the size of the ranks, and <U V, D> = <U, D V'>, block of rows by block.
    """
    _check_shapes(a, b)
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        left, right = a.up.double().t() @ b.up.double(), a.down.double() @ b.down.double().t()
        return float((left * right).sum())
    if isinstance(b, LowRank):
        a, b = b, a
    if isinstance(a, LowRank):
        rows, down = max(1, _BLOCK // max(1, a.shape[1])), a.down.double().t()
        pairs = zip(a.up.split(rows), dense(b).split(rows), strict=True)
        return sum(float((up.double() * (part.double() @ down)).sum()) for up, part in pairs)
    return dots({"": a}, [{"": b}])[0]


def _blocks(flat: Tensor) -> tuple[Tensor, ...]:
    return flat.split(_BLOCK) if len(flat) > _BLOCK else (flat,)


def _check_shapes(a: Change, b: Change) -> None:
    if a.shape != b.shape:
        raise InputError(
            got=f"tensors of shapes {tuple(a.shape)} and {tuple(b.shape)}",
            expected="one shape",
            remedy="compare updates of one model",
        )


def norm(a: NamedChanges) -> float:
    """Euclidean norm |a|.

    >>> import torch
    >>> norm({"w": torch.tensor([3.0, 4.0])})
    5.0
    """
    return float(dot(a, a) ** 0.5)


def cosine(a: NamedChanges, b: NamedChanges) -> float:
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
