"""pytorch_model.bin, single file or sharded: a pickle, read only by torch's restricted unpickler and memory-mapped."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from interference.errors import InputError
from interference.formats.store import DTYPES, check_index, damaged, first_line, shards

WEIGHTS = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class Pickled:
    """Tensors of files that torch.save wrote, opened by torch.load(weights_only=True, mmap=True) and no other way.

    That reader builds tensors and plain containers and refuses any other object before it is called.
    """

    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    @classmethod
    def open(cls, folder: Path, single: str = WEIGHTS, index: str = INDEX) -> Pickled:
        """Read the names and shapes.

        Raises InputError for a missing or damaged shard, a pickle that asks for code, and anything but {name: tensor}.
        """
        store = cls({}, {}, {})
        for shard, expected in shards(folder, index, single).items():
            found = _load(shard)
            for name, tensor in found.items():
                store.files[name] = shard
                store.shapes[name] = tuple(tensor.shape)
                store.dtypes[name] = DTYPES.get(tensor.dtype, str(tensor.dtype))
            check_index(folder, index, shard, expected, found)
        return store

    @property
    def paths(self) -> set[Path]:
        return set(self.files.values())

    def tensor(self, name: str) -> Tensor:
        return _copy(_load(self.files[name])[name])

    def block(self, name: str, start: int, stop: int) -> Tensor:
        return _copy(_load(self.files[name])[name][start:stop])


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _load(file: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise unsafe(file, error) from error
    except Exception as error:  # a damaged pickle raises almost anything
        if "mmap can only be used" in str(error):
            raise InputError(
                got=f"{file} in torch's format from before 1.6, which cannot be read lazily",
                expected="a zip file, as torch.save writes it since",
                remedy="rewrite it: f = 'pytorch_model.bin'; torch.save(torch.load(f, weights_only=True), f)",
            ) from error
        raise damaged(file, error, "torch.save") from error
    plain = isinstance(found, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) and not value.is_meta and value.layout == torch.strided
        for name, value in found.items()
    )
    if not plain or not found:
        raise InputError(
            got=f"{file}, which holds more than named tensors ({type(found).__name__})",
            expected="a state dict: {name: tensor}",
            remedy="save the model's state_dict() alone, best with model.save_pretrained(path)",
        )
    return dict(found)


def unsafe(file: Path, error: Exception) -> InputError:
    """The error of a pickle that names an object which is no tensor; nothing of it was executed."""
    reason = next(
        (line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), first_line(error)
    )
    return InputError(
        got=f"{file}, a pickle that is damaged or asks for code to be run ({reason.strip()[:160]})",
        expected="tensors only: nothing else in a pickle is opened",
        remedy="do not load this file; save the model from its source with model.save_pretrained(path) (safetensors)",
    )
