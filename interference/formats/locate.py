"""Which format a directory holds; those that cannot be read safely are refused with the command that converts them."""

from __future__ import annotations

from pathlib import Path

from interference.errors import InputError
from interference.formats import pickled, tensors
from interference.formats.dcp import METADATA, Distributed
from interference.formats.names import unwrapped
from interference.formats.pickled import Pickled
from interference.formats.store import Renamed, Store, read_json
from interference.formats.tensors import Safetensors

_ADAPTER = "adapter_model"
_INNER = ("", "model", "pytorch_model_fsdp_0")  # where NeMo-RL and accelerate put a checkpoint's .metadata


def find_store(folder: Path, adapter: bool = False) -> Store:
    """The weights of a directory (adapter: those of a PEFT adapter).

    Raises InputError for damaged files, for a directory without weights, and for pickled formats, with the command that
    converts them.
    """
    if adapter:
        return _adapter_store(folder)
    if (folder / tensors.WEIGHTS).is_file() or (folder / tensors.INDEX).is_file():
        _need_config(folder)
        return Safetensors.open(folder)
    if (folder / pickled.WEIGHTS).is_file() or (folder / pickled.INDEX).is_file():
        _need_config(folder)
        return Pickled.open(folder)
    for inner in _INNER:
        if (folder / inner / METADATA).is_file():
            _refuse_megatron(folder / inner)
            store = Distributed.open(folder / inner)
            return Renamed(store, unwrapped(store.entries))
    raise _refusal(folder)


def _adapter_store(folder: Path) -> Store:
    if (folder / f"{_ADAPTER}.safetensors").is_file():
        return Safetensors.open(folder, f"{_ADAPTER}.safetensors", f"{_ADAPTER}.safetensors.index.json")
    if (folder / f"{_ADAPTER}.bin").is_file():
        return Pickled.open(folder, f"{_ADAPTER}.bin", f"{_ADAPTER}.bin.index.json")
    raise InputError(
        got=f"{folder}, a PEFT adapter without {_ADAPTER}.safetensors",
        expected="the adapter's weights beside adapter_config.json",
        remedy="give the directory that the adapter's save_pretrained wrote",
    )


def _need_config(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise InputError(
            got=f"{folder} without config.json",
            expected="a full Hugging Face model directory",
            remedy="give the directory that save_pretrained wrote",
        )


def _refuse_megatron(folder: Path) -> None:
    about = folder / "metadata.json"
    if (folder / "common.pt").is_file() or (about.is_file() and "sharded_backend" in read_json(about)):
        raise InputError(
            got=f"{folder}, a Megatron checkpoint (torch_dist), whose tensors are Megatron's and not the model's",
            expected="weights under Hugging Face names",
            remedy="export it with its trainer's converter (slime: tools/convert_torch_dist_to_hf.py; "
            "NeMo-RL: examples/converters/convert_megatron_to_hf.py; verl: python -m verl.model_merger merge --backend megatron)",
        )


def _refusal(folder: Path) -> InputError:
    """The error of a directory that holds no weights that are read here, with what to do instead."""
    known = _verl(folder) or _deepspeed(folder)
    if known:
        return known
    inner = _weights_below(folder)
    loose = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if loose:
        return InputError(
            got=f"{folder} with pickled weights ({loose[0]})",
            expected="safetensors weights, pytorch_model.bin or a torch distributed checkpoint (other pickles can run code "
            "and are never opened)",
            remedy=inner or "load the model where you trust it and save it with model.save_pretrained(path)",
        )
    broken = [n for n in (tensors.WEIGHTS, tensors.INDEX, pickled.WEIGHTS, METADATA) if (folder / n).is_symlink()]
    if broken:
        return InputError(
            got=f"{folder / broken[0]}, a link that leads nowhere or to itself",
            expected="a weight file",
            remedy="copy the file itself (cp -L), or download the model again",
        )
    missing = f"{tensors.WEIGHTS} or {tensors.INDEX}" if (folder / "config.json").is_file() else "config.json"
    return InputError(
        got=f"{folder} without {missing}",
        expected="a full Hugging Face model directory, a PEFT adapter or a torch distributed checkpoint",
        remedy=inner or "give the directory that save_pretrained wrote",
    )


def _verl(folder: Path) -> InputError | None:
    actor = next((f for f in (folder, folder / "actor") if any(f.glob("model_world_size_*_rank_*.pt"))), None)
    if actor is None:
        return None
    command = f"python -m verl.model_merger merge --backend fsdp --local_dir {actor} --target_dir {actor.parent}/merged"
    return InputError(
        got=f"{actor}, pickled shards of verl (model_world_size_*_rank_*.pt)",
        expected="weights in a format that runs no code",
        remedy=_weights_below(actor) or f"convert it: {command}",
    )


def _deepspeed(folder: Path) -> InputError | None:
    states = [*folder.glob("*_states.pt"), *folder.glob("global_step*/*_states.pt")]
    if not states:
        return None
    top = folder.parent if states[0].parent == folder else folder
    return InputError(
        got=f"{folder}, pickled states of DeepSpeed ({states[0].name})",
        expected="weights in a format that runs no code",
        remedy=_weights_below(folder)
        or f"convert it: cd {top} && python zero_to_fp32.py . OUT --safe_serialization, then copy config.json and the "
        "tokenizer into OUT",
    )


def _weights_below(folder: Path) -> str | None:
    """Advice to give the folder below this one that has weights which are read here."""
    wanted = (tensors.WEIGHTS, tensors.INDEX, "adapter_config.json", pickled.WEIGHTS, pickled.INDEX, METADATA)
    for pattern in ("*", "*/*"):
        for place in sorted(p for p in folder.glob(pattern) if p.is_dir()):
            if any((place / name).is_file() for name in wanted):
                return f"give {place}, which has them" if (place / wanted[0]).is_file() else f"give {place}"
    return None
