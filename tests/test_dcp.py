"""torch distributed checkpoints: against torch's own reader, under trainers' names, damaged and malicious."""

from __future__ import annotations

import io
import os
import pickle
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny import MOE, SIZES, perturbed, qwen3, rows, save, tokenizer
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from interference import Checkpoint, Domain, Update, expand, measure
from interference.errors import InputError
from interference.model import load


def write(folder: Path, state: dict[str, Any], **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=FileSystemWriter(folder, **options), no_dist=True)
    return folder


def write_sharded(folder: Path, tensors: dict[str, Tensor], ranks: int = 3) -> Path:
    """As that many ranks would write it: rows split unevenly, matrices of even width also by columns."""
    folder.mkdir(parents=True)
    files = [io.BytesIO() for _ in range(ranks)]
    listed: dict[str, Any] = {"step": BytesStorageMetadata()}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for name, tensor in tensors.items():
        chunks = []
        for rank, rows_ in enumerate(torch.arange(len(tensor)).tensor_split(ranks)):
            low, high = (int(rows_[0]), int(rows_[-1]) + 1) if len(rows_) else (0, 0)
            for left, right in _columns(tensor):
                part = tensor[low:high, left:right] if tensor.dim() == 2 else tensor[low:high]
                offsets = torch.Size((low, left, *[0] * tensor.dim())[: tensor.dim()])
                if part.numel() == 0:
                    continue
                start = files[rank].tell()
                torch.save(part.clone(), files[rank])
                chunks.append(ChunkStorageMetadata(offsets, part.shape))
                where = _StorageInfo(f"__{rank}_0.distcp", start, files[rank].tell() - start)
                storage[MetadataIndex(name, offsets)] = where
        listed[name] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.shape, chunks)
    for rank, file in enumerate(files):
        (folder / f"__{rank}_0.distcp").write_bytes(file.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(listed, storage_data=storage)))
    return folder


def _columns(tensor: Tensor) -> list[tuple[int, int]]:
    if tensor.dim() != 2:
        return [(0, tensor.shape[-1])]
    half = tensor.shape[1] // 2
    return [(0, half), (half, tensor.shape[1])]


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["one file", "two files", "safetensors", "sharded", "bf16"])
def test_reads_what_torch_wrote(tmp_path: Path, kind: str) -> None:
    tensors = weights(qwen3(0)) | {"scale": torch.tensor(2.5)}
    if kind == "bf16":
        tensors = {n: t.to(torch.bfloat16) for n, t in tensors.items()}
    if kind == "sharded":
        tensors.pop("scale")
        folder = write_sharded(tmp_path / "dcp", tensors)
        theirs = {n: torch.zeros_like(t) for n, t in tensors.items()}
        dcp.load(theirs, checkpoint_id=folder, no_dist=True)  # torch's own reader takes what this test wrote
        for name, tensor in tensors.items():
            torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=0)
    else:
        form = SerializationFormat.SAFETENSORS if kind == "safetensors" else SerializationFormat.TORCH_SAVE
        folder = write(
            tmp_path / "dcp", tensors, serialization_format=form, thread_count=2 if kind == "two files" else 1
        )
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.shapes[name] == tuple(tensor.shape)
        torch.testing.assert_close(checkpoint.tensor(name), tensor, rtol=0, atol=0)
        if tensor.dim():
            torch.testing.assert_close(checkpoint.block(name, 1, 4), tensor[1:4], rtol=0, atol=0)
    assert set(checkpoint.dtypes.values()) == {"BF16" if kind == "bf16" else "F32"}
    assert len(checkpoint.fingerprint()) == 16


@pytest.mark.parametrize(
    "rename",
    [
        lambda n: n,
        lambda n: f"model.{n}",
        lambda n: f"module.{n}",
        lambda n: f"policy.model.{n}",
        lambda n: f"model.module._orig_mod.{n}",
        lambda n: n.removeprefix("model."),
    ],
)
def test_trainers_names_meet_the_base(tmp_path: Path, rename: Callable[[str], str]) -> None:
    base, model = Checkpoint.open(save(qwen3(0), tmp_path / "base")), perturbed(1)
    state: dict[str, Any] = {rename(n): t for n, t in weights(model).items()}
    state |= {f"optimizer.state.{n}.exp_avg": torch.ones(3) for n in state}
    state |= {"optim.param_groups.0.lr": 0.1, "lr_scheduler.last_epoch": 7}
    update = Update.between(base, Checkpoint.open(write(tmp_path / "dcp", state)))
    save(model, tmp_path / "tuned")
    plain = Update.between(base, Checkpoint.open(tmp_path / "tuned"))
    assert set(update) == set(plain)
    assert (update - plain).norm() == 0


def test_a_saved_tied_head_counts_once(tmp_path: Path) -> None:
    base, model = Checkpoint.open(save(qwen3(0), tmp_path / "base")), perturbed(1)
    state = {f"model.{n}": t.detach().clone() for n, t in model.state_dict().items()}
    assert "model.lm_head.weight" in state
    tuned = Checkpoint.open(write(tmp_path / "dcp", state))
    assert {"lm_head.weight", "model.norm.weight"} <= set(tuned.names())
    assert set(Update.between(base, tuned)) == {n for n, _ in model.named_parameters()}


def test_the_configuration_is_in_the_folder_above_or_the_base(tmp_path: Path) -> None:
    base = Checkpoint.open(save(qwen3(0), tmp_path / "base"))
    folder = write(tmp_path / "step_3" / "policy" / "weights" / "model", {"model": weights(perturbed(1))})
    tuned = Checkpoint.open(folder.parent)  # NeMo-RL's folder
    with pytest.raises(InputError, match=r"without config\.json"):
        _ = tuned.config
    assert len(Update.between(base, tuned)) == len(base.names())
    config = (tmp_path / "base" / "config.json").read_text()
    (tmp_path / "step_3" / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.01'))
    with pytest.raises(InputError, match="rms_norm_eps"):
        Update.between(base, Checkpoint.open(folder.parent))
    (tmp_path / "step_3" / "config.json").write_text("{}")  # some other program's
    assert len(Update.between(base, Checkpoint.open(folder.parent))) == len(base.names())


def test_expand_and_measure_take_a_distributed_checkpoint(tmp_path: Path) -> None:
    base, tuned = Checkpoint.open(save(qwen3(0), tmp_path / "base")), perturbed(1)
    save(tuned, tmp_path / "hf")
    write_sharded(tmp_path / "dcp", {f"model.{n}": t for n, t in weights(tuned).items()})
    updates = {k: Update.between(base, Checkpoint.open(tmp_path / k)) for k in ("hf", "dcp")}
    domain = Domain.from_rows(rows(0, 4, 2), tokenizer=tokenizer(), name="d")
    model = load(base, device="cpu")
    found = expand(model, updates, {"d": domain}, pairs=False)["d"]
    assert found.predict({"dcp": 1.0}).value == pytest.approx(found.predict({"hf": 1.0}).value, rel=1e-6)
    table = measure(model, updates, {"d": domain}).set_index("update")
    assert table.delta["dcp"] == pytest.approx(table.delta["hf"], rel=1e-9)


def test_fused_experts_of_a_distributed_checkpoint(tmp_path: Path) -> None:
    """FSDP writes the model's own parameters; on disk the base has experts one by one."""

    def model(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES | MOE)).eval()

    base = Checkpoint.open(save(model(0), tmp_path / "base"))
    assert any(".experts.3." in n for n in base.names())
    write_sharded(tmp_path / "dcp", {f"model.{n}": t for n, t in weights(model(1)).items()})
    update = Update.between(base, Checkpoint.open(tmp_path / "dcp"))
    before, after = weights(model(0)), weights(model(1))
    assert set(update) == {n for n in before if not torch.equal(before[n], after[n])}
    for name in update:
        torch.testing.assert_close(update[name], after[name] - before[name], rtol=0, atol=0)


def test_a_distributed_checkpoint_can_be_the_base(tmp_path: Path) -> None:
    folder = save(qwen3(0), tmp_path / "hf")
    write_sharded(tmp_path / "dcp", {f"model.{n}": t for n, t in weights(qwen3(0)).items()})
    with pytest.raises(InputError, match=r"without config\.json"):
        load(Checkpoint.open(tmp_path / "dcp"), device="cpu")
    (tmp_path / "dcp" / "config.json").write_text((folder / "config.json").read_text())
    ours, theirs = (load(Checkpoint.open(p), device="cpu").parameters for p in (tmp_path / "dcp", folder))
    assert set(ours) == set(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)


def _train(rank: int, port: int, folder: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model, mesh = perturbed(1), init_device_mesh("cpu", (2,))
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    model(torch.arange(8)[None]).logits.sum().backward()
    optimizer.step()
    weights_, moments = get_state_dict(model, optimizer)
    state = {"model": weights_, "optim": moments, "step": 3, "rng": torch.get_rng_state()}
    dcp.save(state, checkpoint_id=folder)
    dist.destroy_process_group()


def test_reads_what_two_fsdp_processes_wrote(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_train, (port, tmp_path / "dcp"), nprocs=2)
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == 2
    checkpoint = Checkpoint.open(tmp_path / "dcp")
    expected = dict(perturbed(1).state_dict())
    assert set(checkpoint.names()) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(checkpoint.tensor(name), tensor, rtol=0, atol=0)


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_nothing_in_the_metadata_is_executed(tmp_path: Path) -> None:
    folder = write(tmp_path / "dcp", weights(qwen3(0)))
    mark = tmp_path / "executed"
    whole = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301 (written by this test)
    whole.planner_data = {"x": _Bomb(mark)}
    for held in (_Bomb(mark), whole):
        (folder / ".metadata").write_bytes(pickle.dumps(held))
        with pytest.raises(InputError, match="asks for code"):
            Checkpoint.open(folder)
        assert not mark.exists()
    pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301 (the bomb itself works)
    assert mark.exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cbuiltins\neval\n.",
        b"cos\nsystem\n.",
        b"ctorch\nload\n.",
        b"ctorch.serialization\nload\n.",
        b"ctorch.distributed.checkpoint.metadata\nos\n.",
        b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93.",
        b"\x80\x04\x8c\x05torch\x8c\x11serialization.load\x93.",
        b"Pid\n.",
    ],
)
def test_metadata_that_names_anything_else_is_refused(tmp_path: Path, opcodes: bytes) -> None:
    folder = write(tmp_path / "dcp", weights(qwen3(0)))
    (folder / ".metadata").write_bytes(opcodes)
    with pytest.raises(InputError, match="asks for code"):
        Checkpoint.open(folder)


def test_a_pickle_cannot_change_what_it_names(tmp_path: Path) -> None:
    """BUILD may set attributes of a class; records are made anew for every file."""
    folder = write(tmp_path / "dcp", weights(qwen3(0)))
    good = (folder / ".metadata").read_bytes()
    build = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N(S'__setstate__'\nNdtb."
    (folder / ".metadata").write_bytes(build)
    with pytest.raises(InputError):
        Checkpoint.open(folder)
    (folder / ".metadata").write_bytes(good)
    assert Checkpoint.open(folder).names()


def test_nothing_in_a_payload_is_executed(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "dcp", weights(qwen3(0)), ranks=1)
    mark = tmp_path / "executed"
    held = io.BytesIO()
    torch.save(_Bomb(mark), held)
    whole = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301 (written by this test)
    index = next(i for i in whole.storage_data if i.fqn == "model.norm.weight")
    file = folder / "__0_0.distcp"
    whole.storage_data[index] = _StorageInfo(file.name, file.stat().st_size, len(held.getvalue()))
    file.write_bytes(file.read_bytes() + held.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(whole))
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(InputError, match="asks for code"):
        checkpoint.tensor("model.norm.weight")
    assert not mark.exists()


def _change(folder: Path, change: Callable[[Metadata], None]) -> None:
    whole = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301 (written by this test)
    change(whole)
    (folder / ".metadata").write_bytes(pickle.dumps(whole))


def _norm(whole: Metadata) -> _StorageInfo:
    return next(v for k, v in whole.storage_data.items() if k.fqn == "model.norm.weight")


def _missing(folder: Path) -> None:
    (folder / "__1_0.distcp").unlink()


def _short(folder: Path) -> None:
    file = folder / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-50])


def _cut_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:-40])


def _gap(folder: Path) -> None:
    _change(folder, lambda m: m.state_dict_metadata["model.norm.weight"].chunks.pop())  # type: ignore[union-attr]


def _overlap(folder: Path) -> None:
    def twice(whole: Metadata) -> None:
        chunks = whole.state_dict_metadata["model.norm.weight"].chunks  # type: ignore[union-attr]
        chunks.append(chunks[0])

    _change(folder, twice)


def _outside(folder: Path) -> None:
    def far(whole: Metadata) -> None:
        _norm(whole).relative_path = "../../etc/passwd"

    _change(folder, far)


def _negative(folder: Path) -> None:
    def before(whole: Metadata) -> None:
        _norm(whole).offset = -3

    _change(folder, before)


def _compressed(folder: Path) -> None:
    def zipped(whole: Metadata) -> None:
        _norm(whole).transform_descriptors = ["zstd"]

    _change(folder, zipped)


def _optimizer_only(folder: Path) -> None:
    def renamed(whole: Metadata) -> None:
        whole.state_dict_metadata = {f"optimizer.{k}": v for k, v in whole.state_dict_metadata.items() if k == "step"}

    _change(folder, renamed)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_missing, "without __1_0.distcp"),
        (_short, "truncated"),
        (_cut_metadata, "damaged"),
        (_gap, "leave gaps"),
        (_overlap, "overlap"),
        (_outside, r"points to '\.\./\.\./etc"),
        (_negative, "damaged"),
        (_compressed, "compressed"),
        (_optimizer_only, "without model tensors"),
    ],
)
def test_damaged_distributed_checkpoints_give_one_clear_error(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = write_sharded(tmp_path / "dcp", weights(qwen3(0)))
    damage(folder)
    with pytest.raises(InputError, match=message):
        Checkpoint.open(folder)


def test_a_payload_that_is_not_what_the_metadata_says(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "dcp", weights(qwen3(0)))

    def other(whole: Metadata) -> None:
        found = [v for k, v in whole.storage_data.items() if k.fqn == "model.embed_tokens.weight"]
        norm = _norm(whole)
        norm.relative_path, norm.offset, norm.length = found[0].relative_path, found[0].offset, found[0].length

    _change(folder, other)
    with pytest.raises(InputError, match=r"not what \.metadata says"):
        Checkpoint.open(folder).tensor("model.norm.weight")
    (folder / "__0_0.distcp").write_bytes(b"\0" * (folder / "__0_0.distcp").stat().st_size)
    with pytest.raises(InputError, match="truncated or damaged"):
        Checkpoint.open(folder).tensor("model.embed_tokens.weight")


def test_megatron_checkpoints_are_refused_with_their_converters(tmp_path: Path) -> None:
    folder = write(tmp_path / "iter_1", {"decoder.layers.mlp.linear_fc1.weight": torch.ones(2, 2)})
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    with pytest.raises(InputError, match=r"Megatron.*convert_torch_dist_to_hf\.py"):
        Checkpoint.open(folder)
