"""Jets: tensors that carry their Taylor coefficients through a model's own, unchanged code.

A Jet is a tensor without storage. `__torch_function__` hands every torch call to the rule registered for it; anything that
gets below, to the dispatcher, raises, so that no operation can lose the coefficients silently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from interference.errors import InputError
from interference.taylor.basis import Basis
from interference.tree import Change, dense

Rule = Callable[..., Any]
F = TypeVar("F", bound=Rule)
RULES: dict[Any, Rule] = {}


class Jet(torch.Tensor):
    """A tensor with Taylor coefficients: `coef` is the stack (see basis), [C, *shape]; it looks like coef[0]."""

    basis: Basis
    _coef: Tensor | None
    writable = True  # whether an in-place operation can put its result into the coefficients

    @staticmethod
    def __new__(cls, basis: Basis, coef: Tensor) -> Jet:
        self: Jet = wrap(cls, basis, coef.shape[1:], coef.stride()[1:], coef, coef)
        return self

    @property
    def coef(self) -> Tensor:
        if self._coef is None:
            self._coef = self._stack()
        return self._coef

    def _stack(self) -> Tensor:
        raise NotImplementedError

    @property
    def primal(self) -> Tensor:
        return self.coef[0]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, {self.basis})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = RULES.get(func)
        if rule is None:
            rule = RULES[func] = _resolve(func)
        if not kwargs:
            return rule(*args)
        for name in ("input", "other", "tensors", "self"):  # torch's own names of what the rules take by position
            if name in kwargs:
                args, kwargs = (*args, kwargs[name]), {k: v for k, v in kwargs.items() if k != name}
        return rule(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise lost(f"{func}", "it reaches torch below the level at which coefficients are carried")


class Weight(Jet):
    """A parameter W + sum_k a_k D_k, kept apart from its updates; None is no change. Its second order is zero."""

    value: Tensor
    changes: tuple[Change | None, ...]
    head: bool  # the layer onto the vocabulary, whose product is held back
    writable = False

    @staticmethod
    def __new__(cls, basis: Basis, value: Tensor, changes: Sequence[Change | None], head: bool = False) -> Weight:
        self: Weight = wrap(cls, basis, value.shape, value.stride(), value, None)
        self.value, self.changes, self.head = value, tuple(changes), head
        return self

    def _stack(self) -> Tensor:
        return torch.stack(
            [self.value, *(torch.zeros_like(self.value) if d is None else dense(d) for d in self.changes)]
        )

    @property
    def primal(self) -> Tensor:
        return self.value

    @property
    def still(self) -> bool:
        """Whether no update changes it."""
        return all(d is None for d in self.changes)

    def mapped(self, f: Callable[[Tensor], Tensor]) -> Weight:
        """The weight under a linear function of its value."""
        return Weight(self.basis, f(self.value), [None if d is None else f(dense(d)) for d in self.changes])

    def transposed(self) -> Weight:
        """The transpose of a matrix; factors stay factors."""
        return Weight(self.basis, self.value.t(), [None if d is None else d.t() for d in self.changes])


def wrap(cls: Any, basis: Basis, shape: Sequence[int], stride: Sequence[int], like: Tensor, coef: Tensor | None) -> Any:
    """A tensor of a jet class that has a shape, a dtype and a device, but no storage."""
    self = torch.Tensor._make_wrapper_subclass(cls, shape, strides=stride, dtype=like.dtype, device=like.device)
    self.basis, self._coef = basis, coef
    return self


def rule(*names: str, where: Sequence[Any] = (torch, torch.Tensor, torch.nn.functional)) -> Callable[[F], F]:
    """Register a rule for a name wherever torch has it: function, method, functional."""

    def register(f: F) -> F:
        for name in names:
            found = [getattr(place, name) for place in where if hasattr(place, name)]
            if not found:
                raise AttributeError(f"torch has no {name}")
            for func in found:
                RULES[func if callable(func) else func.__get__] = f
        return f

    return register


def version(x: Tensor) -> int:
    """How often a tensor was written to. Inference tensors do not count, and cannot be written to here."""
    return -1 if x.is_inference() else x._version


Stamp = tuple[tuple[Tensor, int], ...]


def stamp(*tensors: Any) -> Stamp:
    """What a computation that is held back rests on, as it is now."""
    return tuple((x, version(x)) for x in tensors if isinstance(x, Tensor))


def check(stamps: Stamp) -> None:
    """Raise where something changed in place meanwhile: computed now, the result would silently see the new value."""
    if any(version(x) != seen for x, seen in stamps):
        raise lost("an in-place change", "something computed from the old value was still to come")


def lost(what: str, why: str) -> InputError:
    return InputError(
        got=f"{what} on a quantity that carries derivatives: {why}",
        expected="operations whose derivatives can be followed",
        remedy='use engine="nested" for this model, or give the operation a rule in interference.taylor',
    )


def _resolve(func: Any) -> Rule:
    """A rule for a function that has none: in-place forms of known ones, else nested forward mode."""
    from interference.taylor import fallback

    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__", "__delete__"):
        return fallback.refuse(f"attribute {func.__self__.__name__}")
    if name.endswith("_") and not name.startswith("_"):
        base = getattr(torch.Tensor, name[:-1], None)
        return fallback.in_place(name, RULES.get(base))
    return fallback.nested(func, name)
