"""Estimated updates as safetensors: a tensor under its name, a low-rank one as its two factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from interference.forecasting.halves import Halves
from interference.tree import Change, LowRank, NamedChanges

_UP, _DOWN, _DENSE = "up:", "down:", "dense:"


def write_half(path: Path, update: NamedChanges, about: Mapping[str, str]) -> None:
    """Write an update, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name in update:
        change = update[name]
        if isinstance(change, LowRank):
            tensors |= {_UP + name: change.up, _DOWN + name: change.down}
        else:
            tensors[_DENSE + name] = change
    part = path.with_name(path.name + ".part")
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, part, dict(about))
    part.replace(path)


def read_update(path: Path) -> dict[str, Change]:
    """An update that `write_half` wrote."""
    tensors = load_file(path)
    out: dict[str, Change] = {}
    for key in sorted(tensors):
        kind, name = key.split(":", 1)
        if kind + ":" == _DENSE:
            out[name] = tensors[key]
        elif kind + ":" == _UP:
            out[name] = LowRank(tensors[key], tensors[_DOWN + name])
    return out


def read_halves(paths: Sequence[Path], made_of: str) -> Halves | None:
    """Two estimates of an update; None where one is missing, or was made of something else."""
    noise = 0.0
    for path in paths:
        if not path.is_file():
            return None
        with safe_open(path, framework="np") as file:
            about = file.metadata() or {}
        if about.get("made_of") != made_of:
            return None
        noise = float(about["noise"])
    first, second = (read_update(path) for path in paths)
    return Halves(first, second, noise)
