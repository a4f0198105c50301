"""The `.metadata` of a torch distributed checkpoint: a pickle, read as plain records and never executed."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from interference.errors import InputError
from interference.formats.store import damaged

_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"


@dataclass(frozen=True)
class Piece:
    """A rectangular part of a tensor: where it lies in the tensor, and where on disk."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Entry:
    """A tensor of the checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


class _Record:
    """Stands in for every class of a `.metadata`: keeps what the pickle says of an instance and runs nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state


_KINDS = (
    "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
    "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING", "_StorageInfo", "_StoragePrefix",
)  # fmt: skip


class _Reader(pickle.Unpickler):
    """Knows the classes that torch writes into a `.metadata`, as records; refuses every other name before it is looked up.

    The records' classes are made anew for every file, because a pickle may set attributes of what it names.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._kinds = {name: type(name, (_Record,), {}) for name in (*_KINDS, "other")}

    def find_class(self, module: str, name: str) -> Any:
        if module in (_METADATA, _FILESYSTEM) and name in _KINDS:
            return self._kinds[name]
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("torch.serialization", "_get_layout"):
            return self._kinds["other"]
        if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "WindowsPath", "Path"):
            return self._kinds["other"]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint's metadata")


def _field(record: Any, name: str) -> Any:
    """A field of a record, None where it is not set."""
    return record.state.get(name)


def read_metadata(path: Path) -> dict[str, Entry]:
    """The tensors that a `.metadata` lists; whatever is no tensor is left out.

    Raises InputError for a pickle that names anything but torch's metadata classes, and for one that does not fit together.
    Source: torch/distributed/checkpoint/metadata.py and filesystem.py, version 1.0.0 of the format.
    """
    try:
        whole = _Reader(io.BytesIO(path.read_bytes())).load()
    except pickle.UnpicklingError as error:
        raise InputError(
            got=f"{path}, which is damaged or asks for code to be run ({error})",
            expected="the metadata of a torch distributed checkpoint; nothing else in a pickle is opened",
            remedy="do not load this folder; save the model from its source with model.save_pretrained(path)",
        ) from error
    except Exception as error:  # a damaged pickle raises almost anything
        raise damaged(path, error, "torch distributed .metadata") from error
    try:
        listed = _field(whole, "state_dict_metadata").items()
        stored = _field(whole, "storage_data").items()
        places = {(_field(key, "fqn"), tuple(_field(key, "offset") or ())): value for key, value in stored}
        tensors = {name: item for name, item in listed if type(item).__name__ == "TensorStorageMetadata"}
        return {name: _entry(name, item, places, path) for name, item in tensors.items()}
    except InputError:
        raise
    except (AttributeError, TypeError, LookupError, ValueError, RuntimeError, OverflowError) as error:
        raise damaged(path, error, "torch distributed .metadata") from error


def _entry(name: str, item: Any, places: dict[Any, Any], path: Path) -> Entry:
    shape, dtype = _integers(_field(item, "size")), _field(item, "properties").state[0]
    if not isinstance(name, str) or not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name!r} of dtype {dtype!r}")
    pieces = []
    for chunk in _field(item, "chunks"):
        offsets, sizes = _integers(_field(chunk, "offsets")), _integers(_field(chunk, "sizes"))
        place = places.get((name, offsets)) or places[name, ()]
        if _field(place, "transform_descriptors"):
            raise InputError(
                got=f"{path.parent} whose tensor {name!r} is stored compressed",
                expected="a torch distributed checkpoint without stream transforms",
                remedy="save it without extensions, or export it with model.save_pretrained(path)",
            )
        start, length = _integers((_field(place, "offset"), _field(place, "length")))
        pieces.append(Piece(offsets, sizes, str(_field(place, "relative_path")), start, length))
    _check_cover(name, shape, pieces, path)
    return Entry(shape, dtype, tuple(pieces))


def _integers(values: Any) -> tuple[int, ...]:
    out = tuple(values)
    if not all(type(v) is int and v >= 0 for v in out):
        raise ValueError(f"sizes {out}")
    return out


def _check_cover(name: str, shape: tuple[int, ...], pieces: list[Piece], path: Path) -> None:
    """The pieces must lie inside the tensor, must not overlap, and must fill it."""
    if not shape:
        fits = len(pieces) == 1 and not pieces[0].sizes
    else:
        low = torch.tensor([p.offsets for p in pieces], dtype=torch.float64).reshape(len(pieces), len(shape))
        size = torch.tensor([p.sizes for p in pieces], dtype=torch.float64).reshape(len(pieces), len(shape))
        low, size = low[(size > 0).all(1)], size[(size > 0).all(1)]  # ranks without a share write empty pieces
        high = low + size
        shared = ((low[:, None] < high[None]) & (low[None] < high[:, None])).all(-1).sum()
        volume = size.prod(1).sum() == torch.tensor(shape, dtype=torch.float64).prod()
        fits = bool((high <= torch.tensor(shape)).all()) and int(shared) == len(low) and bool(volume)
    if not fits:
        raise InputError(
            got=f"{path} whose pieces of tensor {name!r} overlap or leave gaps",
            expected=f"pieces that fill its shape {shape}",
            remedy="copy the checkpoint again, with the files of all ranks",
        )
