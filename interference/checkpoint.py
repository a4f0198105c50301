"""Checkpoint: the tensors of a Hugging Face model directory, read lazily, one at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from interference.errors import InputError, nearest
from interference.records import file_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class Checkpoint:
    """A directory with `config.json` and safetensors weights, single file or sharded.

    Nothing but headers is read on opening; `tensor(name)` copies one tensor out of its shard. Names are those on disk.
    Weights in pickled formats are never opened.

    Attributes
    ----------
    path : the directory.  shapes, dtypes : {name: shape}, {name: safetensors dtype such as "BF16"}.  files : {name: shard}.
    """

    path: Path
    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Open a model directory, or a hub id such as "Qwen/Qwen3-0.6B".

        Raises InputError for a missing directory, file or shard, a damaged header, a truncated file, an index that names
        tensors its shards lack, and for formats that this version does not read.
        """
        folder = _locate(path)
        shards = _shards(folder)
        files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, str] = {}
        for shard, expected in shards.items():
            try:
                with safe_open(shard, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                        part = file.get_slice(name)
                        files[name], shapes[name], dtypes[name] = (
                            shard,
                            tuple(part.get_shape()),
                            part.get_dtype(),
                        )
            except (SafetensorError, OSError) as error:
                raise _damaged(shard, error) from error
            absent = sorted(expected - files.keys())
            if absent:
                raise InputError(
                    got=f"{shard.name} without tensor {absent[0]!r}, which {_INDEX} places there",
                    expected="an index that agrees with its shards",
                    remedy=f"save or copy {folder} again",
                )
        return cls(folder, files, shapes, dtypes)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as a dictionary."""
        return _read_json(self.path / "config.json")

    def names(self) -> list[str]:
        """Tensor names on disk, in file order, without a duplicate of a tied head."""
        return [name for name in self.files if not (name == "lm_head.weight" and self.tied_duplicate)]

    @cached_property
    def tied_duplicate(self) -> bool:
        """True when config.json ties the head to the embedding and the files hold the head a second time."""
        return "lm_head.weight" in self.files and any("embed" in n or "wte" in n for n in self.files) and self._tied

    @property
    def _tied(self) -> bool:
        """Whether the head is the embedding; a config.json that does not say takes its architecture's default."""
        if "tie_word_embeddings" in self.config:
            return bool(self.config["tie_word_embeddings"])
        from transformers import AutoConfig

        return bool(getattr(AutoConfig.from_pretrained(self.path), "tie_word_embeddings", False))

    def tensor(self, name: str) -> Tensor:
        """One tensor, copied out of its shard, which is closed again so that no mapped page stays resident."""
        if name not in self.files:
            raise InputError(
                got=f"tensor name {name!r}",
                expected=f"a tensor of {self.path}",
                remedy=nearest(name, self.files),
            )
        try:
            with safe_open(self.files[name], framework="pt") as file:
                tensor: Tensor = file.get_tensor(name).clone()
        except (SafetensorError, OSError) as error:
            raise _damaged(self.files[name], error) from error
        return tensor

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.names():
            yield name, self.tensor(name)

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
                got=f"{self.path} without a tokenizer that loads ({_first_line(error)})",
                expected="tokenizer files beside the weights",
                remedy=f"save the tokenizer there: tokenizer.save_pretrained({str(self.path)!r})",
            ) from error

    def fingerprint(self) -> str:
        """A short name of the content: weights, configuration, tokenizer and chat template, hashed."""
        small = {p for p in self.path.iterdir() if p.suffix in (".json", ".txt", ".model", ".jinja") and p.is_file()}
        sha = hashlib.sha256()
        for file in sorted(small | set(self.files.values())):
            sha.update(f"{file.name} {file_digest(file)}".encode())
        return sha.hexdigest()[:16]


def _locate(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder
    text = str(path)
    hub_id = text.count("/") == 1 and not text.startswith((".", "/", "~")) and not folder.parent.is_dir()
    if not hub_id:
        raise InputError(
            got=f"{text}, which is {'a file' if folder.exists() else 'not there'}",
            expected="a model directory with config.json and safetensors files",
            remedy="check the path (relative paths are taken from the folder of RUN.yaml)",
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]))
    except Exception as error:  # the hub client raises many unrelated types
        raise InputError(
            got=f"{text!r}: no such directory, and as a hub id it could not be fetched ({_first_line(error)})",
            expected="a model directory, or the id of a model on the hub that this machine reaches",
            remedy="check the path, or download the model and give its directory",
        ) from error


def _shards(folder: Path) -> dict[Path, set[str]]:
    """The weight files of a directory, each with the names the index expects there (empty without an index)."""
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise InputError(
            got=f"{folder}, a PEFT adapter" if adapter else f"{folder} without config.json",
            expected="a full Hugging Face model directory",
            remedy="merge the adapter first: PeftModel.from_pretrained(base, adapter).merge_and_unload()"
            if adapter
            else "give the directory that save_pretrained wrote",
        )
    if (folder / _INDEX).is_file():
        index = _read_json(folder / _INDEX)
        places = index.get("weight_map")
        if not isinstance(places, dict) or not places:
            raise InputError(
                got=f"{folder / _INDEX} without a weight_map",
                expected="an index that maps tensor names to shards",
                remedy="save the model again",
            )
        shards: dict[Path, set[str]] = {}
        for name, file in places.items():
            shards.setdefault(_inside(folder, file), set()).add(name)
        for shard in shards:
            if not shard.is_file():
                raise InputError(
                    got=f"{folder} without shard {shard.name}",
                    expected=f"all {len(shards)} shards that {_INDEX} names",
                    remedy="copy or download the missing shard",
                )
        return shards
    if (folder / _WEIGHTS).is_file():
        return {folder / _WEIGHTS: set()}
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    raise InputError(
        got=f"{folder} with pickled weights ({pickled[0]})" if pickled else f"{folder} without {_WEIGHTS} or {_INDEX}",
        expected="safetensors weights (a pickle can run code, so it is never opened)",
        remedy="load the model where you trust it and save it with model.save_pretrained(path)",
    )


def _inside(folder: Path, file: str) -> Path:
    if Path(file).name != file:
        raise InputError(
            got=f"{_INDEX} that points to {file!r}",
            expected="shards in the same directory",
            remedy=f"save or copy {folder} again",
        )
    return folder / file


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            got=f"{path}, which is not readable JSON ({_first_line(error)})",
            expected="a JSON object",
            remedy="save or copy the model again",
        ) from error
    if not isinstance(value, dict):
        raise InputError(
            got=f"{path} holding {type(value).__name__}",
            expected="a JSON object",
            remedy="save the model again",
        )
    return value


def _damaged(shard: Path, error: Exception) -> InputError:
    return InputError(
        got=f"{shard}, which is truncated or damaged ({_first_line(error)})",
        expected="a whole safetensors file",
        remedy="copy or download the file again",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
