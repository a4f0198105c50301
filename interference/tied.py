"""Embedding and head of a base model, for changes that name one of them, and the way its matrices lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from interference import tree
from interference.conversion import Parameters
from interference.errors import InputError
from interference.tree import Change


@dataclass(frozen=True)
class TiedHead:
    """Where embedding and head are in a model; head is None unless it is the embedding itself.

    conv1d : weights of transformers' Conv1D modules, which lie (in, out); None where the model is not known.
    """

    embedding: str | None
    head: str | None
    conv1d: frozenset[str] | None

    @classmethod
    def of(cls, base: Parameters, module: nn.Module | None) -> TiedHead:
        """Of a base and its model without weights."""
        names = base.names()
        embedding, head = _pair(module)
        embedding = next((n for n in names if embedding and (n == embedding or embedding.endswith(f".{n}"))), None)
        shared = base.checkpoint.tied and embedding is not None and head not in names
        flat = None
        if module is not None:
            flat = frozenset(f"{n}.weight" for n, part in module.named_modules() if type(part).__name__ == "Conv1D")
        return cls(embedding, head if shared else None, flat)

    @property
    def names(self) -> tuple[str, ...]:
        """The head's name where the files lack it."""
        return (self.head,) if self.head else ()

    def stored(self, parameter: str) -> str:
        """The parameter on disk that holds this one."""
        return self.embedding if self.embedding and parameter == self.head else parameter

    def transposed(self, parameter: str, shape: tuple[int, ...], told: bool) -> bool:
        """Whether a weight lies (in, out); where the model is not known, what the adapter's configuration told."""
        if self.conv1d is None:
            return told
        return any(name == parameter or name.endswith(f".{parameter}") for name in self.conv1d)

    def joined(
        self, changes: dict[str, Callable[[], Change]], trained_tied: bool, path: Path
    ) -> dict[str, Callable[[], Change]]:
        """The changes with those of a tied pair as one.

        While training, an adapter on one of the pair leaves the other as it was: the trained model has two weights where the
        base has one, and merging would move both (peft#2018). Such a change is no point in the base's weight space.
        """
        if self.head is None or not {self.head, self.embedding} & changes.keys():
            return changes
        embedding = changes[self.embedding]() if self.embedding in changes else None
        head = changes[self.head]() if self.head in changes else None
        moved = [c for c in (embedding, head) if c is not None and not tree.is_zero(c)]
        same = len(moved) == 2 and _equal(*moved)
        if moved and not (same or (trained_tied and head is None)):
            raise InputError(
                got=f"{path}, which changes {self.embedding} and {self.head} apart, of a base that ties them",
                expected="one change of the tied weight (ensure_weight_tying=True while training), or none",
                remedy="untie the base first, as training did in effect: model.config.tie_word_embeddings = False; "
                "model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone()); model.save_pretrained(path); "
                "then give that path as the base",
            )
        return {name: make for name, make in changes.items() if name != self.head}


def _equal(a: Change, b: Change) -> bool:
    """Whether two changes are one but for float32's rounding, |a - b|^2 <= 1e-10 |a|^2, without multiplying factors out."""
    whole, other = tree.tensor_dot(a, a), tree.tensor_dot(b, b)
    return whole - 2 * tree.tensor_dot(a, b) + other <= 1e-10 * whole


def _pair(module: nn.Module | None) -> tuple[str | None, str]:
    """Names of the embedding's and the head's weight."""
    if module is None:
        return "model.embed_tokens.weight", "lm_head.weight"
    names = {id(part): name for name, part in module.named_modules()}
    inner, outer = module.get_input_embeddings(), module.get_output_embeddings()  # type: ignore[operator]
    return (
        f"{names[id(inner)]}.weight" if id(inner) in names else None,
        f"{names[id(outer)]}.weight" if id(outer) in names else "lm_head.weight",
    )
