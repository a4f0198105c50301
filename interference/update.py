"""Update: tuned - base as a lazy named vector in float32, with the algebra that task vectors need."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from interference import tree
from interference.checkpoint import Checkpoint
from interference.errors import InputError
from interference.pairing import Base, Finding, Pair, stop_at_fatal
from interference.tree import Change, NamedChanges


@dataclass(frozen=True, eq=False)
class Update(Mapping[str, Change]):
    """A vector in weight space, tensor by tensor, computed when asked for.

    A mapping {name: change}: `update[name]` is freshly made, float32 when it comes from checkpoints, and LowRank factors
    where it comes from a LoRA adapter; `update.dense(name)` is always a tensor. Absent names are zero. Supports `a + b`,
    `a - b`, `2 * a`, `a.restrict(...)`, `a.dot(b)`, `a.norm()`, `a.cosine(b)`; factors stay factors where that is possible.
    Nothing is held but what the loaders close over.

    >>> u = Update.from_tensors({"w": torch.tensor([3.0, 4.0])})
    >>> (2 * u).norm(), u.dot(u + u), (u - u).norm()
    (10.0, 50.0, 0.0)
    """

    names: tuple[str, ...]
    load: Callable[[str], Change]
    squares: dict[str, float] = field(default_factory=dict, compare=False)  # |tensor|^2, where known
    findings: tuple[Finding, ...] = ()  # warnings and notes of the pair's audit, where it comes from checkpoints

    @classmethod
    def between(cls, base: Checkpoint, tuned: Checkpoint) -> Update:
        """tuned - base, in float32 from the stored values; `names` are the parameters that changed.

        tuned : a model like the base, in any format that Checkpoint opens, or an adapter of the base, whose update is made from
        its factors. Where a model stores its parameters otherwise than it uses them (experts one by one), names and tensors
        are those of the model. Reads both checkpoints once, tensor by tensor, to find what changed and to refuse what cannot
        be compared.

        Raises InputError for another architecture, other shapes or vocabularies, missing or additional tensors, NaN or
        infinite weights, adapters that are no change of the weights, and when nothing changed at all.
        """
        pair = Base.of(base).pair(tuned)
        stop_at_fatal(pair.findings)
        return cls._changed(pair, tuned)

    @classmethod
    def _changed(cls, pair: Pair, tuned: Checkpoint) -> Update:
        """An update of the tensors that are not zero, each made once to find them."""
        base, path = pair.before, pair.before.checkpoint.path
        squares: dict[str, float] = {}
        for name in pair.names():
            change = pair.change(name)
            if not tree.is_finite(change):
                theirs = name not in base.names() or tree.is_finite(base.tensor(name))
                raise InputError(
                    got=f"NaN or infinite weights in {name} of {tuned.path if theirs else path}",
                    expected="finite weights",
                    remedy="use a checkpoint from before training diverged",
                )
            if not tree.is_zero(change):
                squares[name] = tree.tensor_dot(change, change)
        if not squares:
            raise InputError(
                got=f"{tuned.path}, whose tensors are all identical to those of {path}",
                expected="a checkpoint that training changed",
                remedy="check that the path is the trained model and that it was merged and saved after training",
            )
        return cls(tuple(squares), pair.change, squares, pair.findings)

    @classmethod
    def from_tensors(cls, tensors: NamedChanges) -> Update:
        """An update held in memory."""
        held = dict(tensors)
        return cls(tuple(held), lambda name: held[name])

    def __getitem__(self, name: str) -> Change:
        if name not in self.names:
            raise KeyError(name)
        return self.load(name)

    def dense(self, name: str) -> Tensor:
        """One tensor, factors multiplied out."""
        return tree.dense(self[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __add__(self, other: Update) -> Update:
        names = tuple(dict.fromkeys((*self.names, *other.names)))

        def load(name: str) -> Change:
            if name in self and name in other:
                return tree.added(self.load(name), other.load(name))
            return self.load(name) if name in self else other.load(name)

        return Update(names, load)

    def __mul__(self, scale: float) -> Update:
        squares = {name: scale**2 * square for name, square in self.squares.items()}
        return Update(self.names, lambda name: tree.scaled(self.load(name), scale), squares)

    __rmul__ = __mul__

    def __neg__(self) -> Update:
        return -1.0 * self

    def __sub__(self, other: Update) -> Update:
        return self + (-1.0 * other)

    def restrict(self, where: str | Mapping[str, Tensor]) -> Update:
        """The update on some coordinates only, zero elsewhere.

        `where` is a regular expression searched in tensor names, or a mapping {name: boolean mask of the tensor's shape}.

        >>> u = Update.from_tensors({"a.w": torch.ones(2), "b.w": torch.ones(3)})
        >>> round(u.restrict("^b").norm(), 6), u.restrict({"a.w": torch.tensor([True, False])}).norm()
        (1.732051, 1.0)
        """
        if isinstance(where, str):
            pattern = re.compile(where)
            kept = tuple(name for name in self.names if pattern.search(name))
            if not kept:
                raise InputError(
                    got=f"pattern {where!r}",
                    expected="a pattern found in the name of a changed tensor",
                    remedy=f"names look like {self.names[0]!r}",
                )
            return Update(kept, self.load, {n: s for n, s in self.squares.items() if n in kept})
        masks = dict(where)
        kept = tuple(name for name in self.names if name in masks)
        return Update(kept, lambda name: torch.where(masks[name], tree.dense(self.load(name)), 0.0))

    def dot(self, other: Update) -> float:
        """<self, other>, streamed tensor by tensor, accumulated in float64; factors are not multiplied out."""
        return sum(tree.tensor_dot(self.load(name), other.load(name)) for name in self.names if name in other)

    def norm(self) -> float:
        """|self|."""
        missing = [name for name in self.names if name not in self.squares]
        for name in missing:
            change = self.load(name)
            self.squares[name] = tree.tensor_dot(change, change)
        return math.sqrt(sum(self.squares[name] for name in self.names))

    def cosine(self, other: Update) -> float:
        """<self, other> / (|self| |other|); NaN when one of them is zero."""
        scale = self.norm() * other.norm()
        return self.dot(other) / scale if scale else float("nan")
