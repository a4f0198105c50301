"""What every weight format offers, and what the formats share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from interference.errors import InputError

DTYPES = {  # torch's types by the names that safetensors gives them
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


class Store(Protocol):
    """The tensors of one checkpoint on disk. Opening reads headers; only `tensor` and `block` read values.

    files : {name: a file that holds it}.  shapes, dtypes : {name: shape}, {name: safetensors dtype such as "BF16"}.
    paths : every file whose content decides the tensors.
    """

    @property
    def files(self) -> dict[str, Path]: ...

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    @property
    def dtypes(self) -> dict[str, str]: ...

    @property
    def paths(self) -> set[Path]: ...

    def tensor(self, name: str) -> Tensor:
        """A copy of one tensor. Raises InputError where its file is damaged."""
        ...

    def block(self, name: str, start: int, stop: int) -> Tensor:
        """A copy of rows start:stop of its first dimension, 0 <= start <= stop <= its length."""
        ...


@dataclass(frozen=True)
class Renamed:
    """Some tensors of a store under other names; keys: {name: name in the store}."""

    store: Store
    keys: Mapping[str, str]

    @property
    def files(self) -> dict[str, Path]:
        held = self.store.files  # some stores make it anew
        return {name: held[key] for name, key in self.keys.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        held = self.store.shapes  # some stores make it anew
        return {name: held[key] for name, key in self.keys.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        held = self.store.dtypes  # some stores make it anew
        return {name: held[key] for name, key in self.keys.items()}

    @property
    def paths(self) -> set[Path]:
        return self.store.paths

    def tensor(self, name: str) -> Tensor:
        return self.store.tensor(self.keys[name])

    def block(self, name: str, start: int, stop: int) -> Tensor:
        return self.store.block(self.keys[name], start, stop)


def shards(folder: Path, index: str, single: str) -> dict[Path, set[str]]:
    """The weight files of a directory, each with the names that the index expects there (empty without an index).

    A single file goes before an index, which may be left from an earlier save; transformers chooses the same.
    """
    if (folder / single).is_file() or not (folder / index).is_file():
        return {folder / single: set()}
    places = read_json(folder / index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise InputError(
            got=f"{folder / index} without a weight_map",
            expected="an index that maps tensor names to shards",
            remedy="save the model again",
        )
    out: dict[Path, set[str]] = {}
    for name, file in places.items():
        out.setdefault(inside(folder, file, index), set()).add(name)
    for shard in out:
        if not shard.is_file():
            raise InputError(
                got=f"{folder} without shard {shard.name}",
                expected=f"all {len(out)} shards that {index} names",
                remedy="copy or download the missing shard",
            )
    return out


def check_index(folder: Path, index: str, shard: Path, expected: set[str], found: Mapping[str, object]) -> None:
    """Refuse an index that places tensors in a shard which lacks them."""
    absent = sorted(expected - found.keys())
    if absent:
        raise InputError(
            got=f"{shard.name} without tensor {absent[0]!r}, which {index} places there",
            expected="an index that agrees with its shards",
            remedy=f"save or copy {folder} again",
        )


def inside(folder: Path, file: str, index: str) -> Path:
    """The path of a file that an index names; it must lie in the folder itself."""
    if not file or Path(file).name != file or "\\" in file:
        raise InputError(
            got=f"{index} that points to {file!r}",
            expected="shards in the same directory",
            remedy=f"save or copy {folder} again",
        )
    return folder / file


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            got=f"{path}, which is not readable JSON ({first_line(error)})",
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


def damaged(file: Path, error: Exception, what: str) -> InputError:
    """The error of a file that does not read; what: "safetensors" and the like."""
    return InputError(
        got=f"{file}, which is truncated or damaged ({first_line(error)})",
        expected=f"a whole {what} file",
        remedy="copy or download the file again",
    )


def first_line(error: Exception) -> str:
    """The beginning of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
