"""safetensors, single file or sharded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from interference.formats.store import check_index, damaged, shards

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Safetensors:
    """Tensors of safetensors files. The format holds no code; the library checks headers, offsets and lengths."""

    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    @classmethod
    def open(cls, folder: Path, single: str = WEIGHTS, index: str = INDEX) -> Safetensors:
        """Read the headers. Raises InputError for a missing or damaged shard and an index that disagrees with its shards."""
        store = cls({}, {}, {})
        for shard, expected in shards(folder, index, single).items():
            try:
                with safe_open(shard, framework="pt") as file:
                    found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
                    for name, part in found.items():
                        store.files[name] = shard
                        store.shapes[name] = tuple(part.get_shape())
                        store.dtypes[name] = part.get_dtype()
            except (SafetensorError, OSError) as error:
                raise damaged(shard, error, "safetensors") from error
            check_index(folder, index, shard, expected, found)
        return store

    @property
    def paths(self) -> set[Path]:
        return set(self.files.values())

    def tensor(self, name: str) -> Tensor:
        """One tensor, copied out of its shard, which is closed again so that no mapped page stays resident."""
        try:
            with safe_open(self.files[name], framework="pt") as file:
                tensor: Tensor = file.get_tensor(name).clone()
        except (SafetensorError, OSError) as error:
            raise damaged(self.files[name], error, "safetensors") from error
        return tensor

    def block(self, name: str, start: int, stop: int) -> Tensor:
        try:
            with safe_open(self.files[name], framework="pt") as file:
                rows: Tensor = file.get_slice(name)[start:stop].clone()
        except (SafetensorError, OSError) as error:
            raise damaged(self.files[name], error, "safetensors") from error
        return rows
