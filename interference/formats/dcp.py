"""torch distributed checkpoints: a folder with `.metadata` and `*.distcp`, read without a process group."""

from __future__ import annotations

import io
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from interference.errors import InputError
from interference.formats.dcp_metadata import Entry, Piece, read_metadata
from interference.formats.pickled import unsafe
from interference.formats.store import DTYPES, damaged

METADATA = ".metadata"
_OPTIMIZER = re.compile(r"(^|\.)(optim|optimizers?|optimizer_states?|optim_states?|lr_schedulers?|exp_avg(_sq)?)(\.|$)")


@dataclass(frozen=True)
class Distributed:
    """Tensors of a torch distributed checkpoint, put together from the pieces that its ranks wrote.

    Names are those in the file but for optimizer states, which are left out. A piece is read by
    torch.load(weights_only=True), or as safetensors where the checkpoint was written so.
    """

    folder: Path
    entries: dict[str, Entry]

    @classmethod
    def open(cls, folder: Path) -> Distributed:
        """Read the metadata; raises InputError where it is damaged or names missing or truncated files."""
        entries = {n: e for n, e in read_metadata(folder / METADATA).items() if not _OPTIMIZER.search(n)}
        if not entries:
            raise InputError(
                got=f"{folder} without model tensors",
                expected="a torch distributed checkpoint of a model",
                remedy="give the folder of the policy's weights, not the optimizer's",
            )
        lengths: dict[str, int] = {}
        for piece in (piece for entry in entries.values() for piece in entry.pieces):
            if piece.file not in lengths:
                lengths[piece.file] = _length(folder, piece.file)
            if piece.start + piece.length > lengths[piece.file]:
                raise InputError(
                    got=f"{folder / piece.file} of {lengths[piece.file]} bytes, which is truncated",
                    expected=f"at least {piece.start + piece.length} bytes, as {METADATA} says",
                    remedy="copy or download the file again",
                )
        return cls(folder, entries)

    @property
    def files(self) -> dict[str, Path]:
        return {n: self.folder / (e.pieces[0].file if e.pieces else METADATA) for n, e in self.entries.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {n: e.shape for n, e in self.entries.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        return {n: DTYPES.get(e.dtype, str(e.dtype)) for n, e in self.entries.items()}

    @property
    def paths(self) -> set[Path]:
        return {self.folder / METADATA} | {self.folder / p.file for e in self.entries.values() for p in e.pieces}

    def tensor(self, name: str) -> Tensor:
        entry = self.entries[name]
        if not entry.shape:
            return self._read(name, entry, entry.pieces[0])
        return self.block(name, 0, entry.shape[0])

    def block(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start:stop; only the pieces that hold some of them are read."""
        entry = self.entries[name]
        out = torch.empty((stop - start, *entry.shape[1:]), dtype=entry.dtype)
        for piece in entry.pieces:
            low, high = max(start, piece.offsets[0]), min(stop, piece.offsets[0] + piece.sizes[0])
            if low < high and all(piece.sizes):
                rest = tuple(slice(o, o + s) for o, s in zip(piece.offsets[1:], piece.sizes[1:], strict=True))
                rows = slice(low - piece.offsets[0], high - piece.offsets[0])
                out[(slice(low - start, high - start), *rest)] = self._read(name, entry, piece)[rows]
        return out

    def _read(self, name: str, entry: Entry, piece: Piece) -> Tensor:
        path = self.folder / piece.file
        try:
            with path.open("rb") as file:
                file.seek(piece.start)
                held = file.read(piece.length)
            if held[:2] == b"PK":
                tensor = torch.load(io.BytesIO(held), map_location="cpu", weights_only=True)
            else:  # written with SerializationFormat.SAFETENSORS: one whole file a rank
                with safe_open(path, framework="pt") as whole:
                    tensor = whole.get_tensor(name).clone()
        except pickle.UnpicklingError as error:
            raise unsafe(path, error) from error
        except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
            raise damaged(path, error, "torch distributed") from error
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != piece.sizes or tensor.dtype != entry.dtype:
            raise InputError(
                got=f"{path} whose piece of {name!r} is not what {METADATA} says",
                expected=f"a {entry.dtype} tensor of shape {piece.sizes}",
                remedy="copy the whole checkpoint again",
            )
        return tensor.detach()


def _length(folder: Path, file: str) -> int:
    if Path(file).name != file:
        raise InputError(
            got=f"{folder / METADATA} that points to {file!r}",
            expected="files in the same directory",
            remedy="copy the whole checkpoint again",
        )
    if not (folder / file).is_file():
        raise InputError(
            got=f"{folder} without {file}",
            expected=f"every file that {METADATA} names (one or more a rank)",
            remedy="copy the missing file from the machine that wrote it",
        )
    return (folder / file).stat().st_size
