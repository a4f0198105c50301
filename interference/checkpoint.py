"""Checkpoint: the tensors of a model or adapter directory, read lazily, one at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interference.errors import InputError, nearest
from interference.formats import Pickled, Renamed, Safetensors, Store, find_store, first_line, fitted, read_json
from interference.records import digest, file_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_ADAPTER = "adapter_config.json"
# What is fetched from the hub; the second only where there are no safetensors, beside which it would be fetched in vain.
_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
_OTHER_WEIGHTS = ("pytorch_model*.bin", "adapter_model*.bin", "*.distcp", "*.metadata")
_HEAD = "lm_head.weight"
_BLOCK = 1 << 24  # numbers of a tensor that are compared at once


@dataclass(frozen=True)
class Checkpoint:
    """The weights in a directory: a Hugging Face model, a torch distributed checkpoint, or a PEFT adapter.

    Read are safetensors and `pytorch_model.bin`, single file or sharded; torch distributed checkpoints (a folder with
    `.metadata` and `*.distcp`); and adapters, whose tensors are the factors (`adapter` tells, `Update.between` makes the
    update). Nothing but headers is read on opening; `tensor(name)` copies one tensor out of its file. Names are those on
    disk, for distributed checkpoints without their trainer's prefix.

    Nothing in a file is executed: pickles are read by torch's restricted reader (weights_only) or as plain records, and
    what needs more is refused with the command that converts it.

    Attributes
    ----------
    path : the directory.  store : its files (`formats`).  home : the directory of config.json, None where there is none.
    """

    path: Path
    store: Store
    home: Path | None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Open a directory, or a hub id such as "Qwen/Qwen3-0.6B".

        Raises InputError for a missing directory, file or shard, a damaged header, a truncated file, an index that names
        tensors its shards lack, a pickle that asks for code, and for formats that are not read.
        """
        folder = _locate(path)
        adapter = (folder / _ADAPTER).is_file()
        if adapter and any(folder.glob("model*.safetensors")):
            raise InputError(
                got=f"{folder}, which holds both a model and an adapter",
                expected="one of them",
                remedy=f"give each a folder of its own: move {_ADAPTER} and adapter_model.* elsewhere",
            )
        return cls(folder, find_store(folder, adapter), None if adapter else _home(folder))

    @property
    def files(self) -> dict[str, Path]:
        """{name: a file that holds it}."""
        return self.store.files

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape}."""
        return self.store.shapes

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """{name: safetensors dtype such as "BF16"}."""
        return self.store.dtypes

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as a dictionary."""
        if self.home is None:
            raise InputError(
                got=f"{self.path} without config.json",
                expected="a model's configuration beside its weights or in a folder above",
                remedy="copy the base model's config.json there"
                if self.adapter is None
                else "give the base model here; an adapter is an update of it",
            )
        return read_json(self.home / "config.json")

    @cached_property
    def adapter(self) -> dict[str, Any] | None:
        """adapter_config.json of a PEFT adapter; None for a model."""
        return read_json(self.path / _ADAPTER) if (self.path / _ADAPTER).is_file() else None

    @property
    def hugging_face(self) -> bool:
        """Whether transformers itself loads this directory as a model."""
        return isinstance(self.store, (Safetensors, Pickled)) and self.adapter is None

    def names(self) -> list[str]:
        """Tensor names on disk, in file order, without a duplicate of a tied head."""
        return [name for name in self.shapes if not (name == _HEAD and self.tied_duplicate)]

    @cached_property
    def tied(self) -> bool:
        """Whether the head is the embedding: config.json ties them, and the files hold no head that differs from it."""
        return self._declared_tied and not self.untied_head

    @cached_property
    def tied_duplicate(self) -> bool:
        """True when config.json ties the head to the embedding and the files hold the same values a second time."""
        return self._twice and self._same_head

    @cached_property
    def untied_head(self) -> bool:
        """True when config.json ties the head to the embedding and the files hold a head of other values.

        transformers then takes both as they are and does not tie them (`PreTrainedModel.tie_weights`).
        """
        return self._twice and not self._same_head

    @cached_property
    def _twice(self) -> bool:
        return _HEAD in self.shapes and bool(self._embeddings) and self._declared_tied

    @cached_property
    def _embeddings(self) -> list[str]:
        return [n for n in self.shapes if n != _HEAD and ("embed" in n or "wte" in n)]

    @cached_property
    def _same_head(self) -> bool:
        """Whether the stored head equals an embedding, compared by blocks of rows."""
        shape = self.shapes[_HEAD]
        alike = [n for n in self._embeddings if len(shape) == 2 and self.shapes[n] == shape]
        return any(self._equal(_HEAD, n, shape[0], max(1, _BLOCK // max(1, shape[1]))) for n in alike)

    def _equal(self, one: str, other: str, rows: int, step: int) -> bool:
        for start in range(0, rows, step):
            a, b = (self.block(n, start, min(start + step, rows)) for n in (one, other))
            kind = torch.promote_types(a.dtype, b.dtype)
            if not torch.equal(a.to(kind), b.to(kind)):
                return False
        return True

    @cached_property
    def _declared_tied(self) -> bool:
        """What config.json says of the head; one that does not say takes its architecture's default."""
        if self.home is None:
            return False
        if "tie_word_embeddings" in self.config:
            return bool(self.config["tie_word_embeddings"])
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.home, trust_remote_code=False)
        return bool(getattr(config, "tie_word_embeddings", False))

    def tensor(self, name: str) -> Tensor:
        """One tensor, copied out of its file, which is closed again so that no mapped page stays resident."""
        self._known(name)
        return self.store.tensor(name)

    def block(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start:stop of a tensor's first dimension, without the rest in memory (formats that allow it).

        Raises InputError for a name that is not there and for rows outside the tensor.
        """
        self._known(name)
        rows = self.shapes[name][:1]
        if not rows or not 0 <= start <= stop <= rows[0]:
            raise InputError(
                got=f"rows {start}:{stop} of {name!r} of shape {self.shapes[name]}",
                expected="0 <= start <= stop <= the length of its first dimension",
                remedy="ask for rows that are there",
            )
        return self.store.block(name, start, stop)

    def _known(self, name: str) -> None:
        if name not in self.shapes:
            raise InputError(
                got=f"tensor name {name!r}",
                expected=f"a tensor of {self.path}",
                remedy=nearest(name, self.shapes),
            )

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.names():
            yield name, self.tensor(name)

    def like(self, base: Checkpoint, *names: Iterable[str]) -> Checkpoint:
        """The same weights as a checkpoint of `base`: under its names (or those of `names`) where one prefix makes the
        difference, and with its configuration where this one has none."""
        home = self.home or base.home
        for known in (set(base.names()), *map(set, names)):
            keys = fitted(self.shapes, known)
            if keys is not None:
                store = self.store if all(k == v for k, v in keys.items()) else Renamed(self.store, keys)
                return replace(self, store=store, home=home)
        return replace(self, home=home)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer saved beside the weights."""
        from transformers import AutoTokenizer

        if not any((self.path / name).is_file() for name in _TOKENIZERS):
            raise InputError(
                got=f"{self.path} without tokenizer files",
                expected="the tokenizer beside the weights",
                remedy=f"save it there: tokenizer.save_pretrained({str(self.path)!r})",
            )
        try:
            return AutoTokenizer.from_pretrained(self.path)
        except (OSError, ValueError) as error:
            raise InputError(
                got=f"{self.path} without a tokenizer that loads ({first_line(error)})",
                expected="tokenizer files beside the weights",
                remedy=f"save the tokenizer there: tokenizer.save_pretrained({str(self.path)!r})",
            ) from error

    def fingerprint(self) -> str:
        """A short name of the content: weights, configuration, tokenizer and chat template, hashed."""
        sha = hashlib.sha256()
        for file in self._decisive():
            sha.update(f"{file.name} {file_digest(file)}".encode())
        return sha.hexdigest()[:16]

    def stamp(self) -> str:
        """A short name of its files by name, size and time of change: quick, where `fingerprint` reads everything."""
        stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in self._decisive()]
        return digest([str(self.path.resolve()), stats])

    def _decisive(self) -> list[Path]:
        """The files whose content decides what the model computes: weights, configurations, tokenizer, chat template."""
        small = {p for p in self.path.iterdir() if p.suffix in (".json", ".txt", ".model", ".jinja") and p.is_file()}
        above = {self.home / "config.json"} if self.home is not None and self.home != self.path else set()
        return sorted(small | above | self.store.paths)


def _locate(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    if _is_directory(folder):
        return folder
    text = str(path)
    hub_id = text.count("/") == 1 and not text.startswith((".", "/", "~")) and not folder.parent.is_dir()
    if not hub_id:
        raise InputError(
            got=f"{text}, which is {'a file' if folder.exists() else 'not there'}",
            expected="a directory with a model, an adapter or a torch distributed checkpoint",
            remedy="check the path (relative paths are taken from the folder of RUN.yaml)",
        )
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(text, allow_patterns=list(_FILES)))
        if any(folder.glob("*.safetensors")):
            return folder
        return Path(snapshot_download(text, allow_patterns=[*_FILES, *_OTHER_WEIGHTS]))
    except Exception as error:  # the hub client raises many unrelated types
        raise InputError(
            got=f"{text!r}: no such directory, and as a hub id it could not be fetched ({first_line(error)})",
            expected="a model directory, or the id of a model on the hub that this machine reaches",
            remedy="check the path, or download the model and give its directory",
        ) from error


def _is_directory(folder: Path) -> bool:
    try:
        return folder.is_dir()
    except (OSError, ValueError):  # a name that no file system takes
        return False


def _home(folder: Path) -> Path | None:
    """Where config.json is: in the folder, or (for distributed checkpoints) up to three folders above."""
    if (folder / "config.json").is_file():
        return folder
    above = (place for place in folder.resolve().parents[:3] if (place / "config.json").is_file())
    return next((place for place in above if "model_type" in read_json(place / "config.json")), None)
