"""Update: tuned - base as a lazy named vector in float32, with the algebra that task vectors need."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from interference import tree
from interference.adapter import adapter_changes
from interference.checkpoint import Checkpoint
from interference.conversion import Conversion, Parameters
from interference.errors import InputError
from interference.tied import TiedHead
from interference.tree import Change, NamedChanges

_MAY_DIFFER = {  # what config.json says about the file or about generation, not about the function of the weights
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures", "attn_implementation",
    "bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "model_type",
}  # fmt: skip


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
        if base.adapter is not None:
            raise InputError(
                got=f"{base.path}, an adapter, as the base",
                expected="a model",
                remedy="give the model that the adapter was trained on",
            )
        _refuse_quantized(base)
        conversion = Conversion(base)
        before = conversion.read(base)
        if tuned.adapter is not None:
            _check_tokenizers(base, tuned)
            changes = adapter_changes(before, tuned, TiedHead.of(before, conversion.module))
            return cls._changed(before, tuned, changes, lambda name: changes[name]())
        tuned = tuned.like(base, before.names())
        after = conversion.read(tuned)
        _check_pair(before, after)
        names = before.names()
        return cls._changed(before, tuned, names, lambda name: _difference(before, after, name))

    @classmethod
    def _changed(
        cls, base: Parameters, tuned: Checkpoint, names: Iterable[str], load: Callable[[str], Change]
    ) -> Update:
        """An update of the tensors that are not zero, each made once to find them."""
        path = base.checkpoint.path
        squares: dict[str, float] = {}
        for name in names:
            change = load(name)
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
        return cls(tuple(squares), load, squares)

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


def _difference(before: Parameters, after: Parameters, name: str) -> Tensor:
    return after.tensor(name).float() - before.tensor(name).float()


def _check_pair(before: Parameters, after: Parameters) -> None:
    base, tuned = before.checkpoint, after.checkpoint
    kinds = base.config.get("model_type"), tuned.config.get("model_type")
    if kinds[0] != kinds[1]:
        raise InputError(
            got=f"a base of type {kinds[0]!r} and {tuned.path} of type {kinds[1]!r}",
            expected="checkpoints of one architecture",
            remedy="give the base that this checkpoint was trained from",
        )
    sizes = base.config.get("vocab_size"), tuned.config.get("vocab_size")
    if sizes[0] != sizes[1]:
        raise InputError(
            got=f"vocabularies of {sizes[0]} (base) and {sizes[1]} tokens ({tuned.path})",
            expected="one vocabulary",
            remedy="give the base that this checkpoint was trained from, before tokens were added or padded",
        )
    left, right = set(before.names()), set(after.names())
    if left != right:
        name = sorted(left ^ right)[0]
        raise InputError(
            got=f"tensor {name!r}, which only the {'base' if name in left else 'tuned'} checkpoint ({tuned.path}) has",
            expected="the same tensors in both",
            remedy="give the base that this checkpoint was trained from, both saved by the same library",
        )
    for name in before.names():
        if before.shape(name) != after.shape(name):
            raise InputError(
                got=f"{name} of shape {before.shape(name)} (base) and {after.shape(name)} ({tuned.path})",
                expected="one shape",
                remedy="give the base that this checkpoint was trained from",
            )
    for key in sorted(base.config.keys() & tuned.config.keys() - _MAY_DIFFER):
        if base.config[key] != tuned.config[key]:
            raise InputError(
                got=f"{key} {base.config[key]!r} (base) and {tuned.config[key]!r} ({tuned.path}) in config.json",
                expected="one configuration: weights that another architecture reads mean something else",
                remedy="give the base that this checkpoint was trained from",
            )
    _check_tokenizers(base, tuned)


def _refuse_quantized(base: Checkpoint) -> None:
    quantization = base.config.get("quantization_config")
    if quantization:
        raise InputError(
            got=f"{base.path}, whose weights are quantized ({str(quantization)[:100]})",
            expected="weights in bf16, fp16, float32 or float64",
            remedy="load the model dequantized and save it: from_pretrained(path, dtype='bfloat16'), dequantize(), "
            "save_pretrained(path)",
        )


def _check_tokenizers(base: Checkpoint, tuned: Checkpoint) -> None:
    files = [c.path / "tokenizer.json" for c in (base, tuned)]
    if not all(f.is_file() for f in files) or files[0].read_bytes() == files[1].read_bytes():
        return
    vocabularies = [c.tokenizer().get_vocab() for c in (base, tuned)]
    if vocabularies[0] != vocabularies[1]:
        odd = sorted(vocabularies[0].items() ^ vocabularies[1].items())[0]
        raise InputError(
            got=f"tokenizers that disagree, first about {odd[0]!r}, in {base.path} and {tuned.path}",
            expected="one vocabulary",
            remedy="give the base that this checkpoint was trained from",
        )
