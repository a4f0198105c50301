"""Weight files of every kind: read lazily, converted as transformers does, refused where they are damaged or unsafe."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import MOE, SIZES, perturbed, qwen3, rows, save, tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from interference import Checkpoint, Domain, Update, expand, measure
from interference.errors import InputError
from interference.model import load


def as_bin(folder: Path, files: int = 1) -> Path:
    """A saved model's weights again as pytorch_model.bin, in one file or several with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if files == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    names = [f"pytorch_model-{i + 1:05d}-of-{files:05d}.bin" for i in range(files)]
    places = {name: names[i % files] for i, name in enumerate(tensors)}
    for file in names:
        torch.save({n: tensors[n] for n, f in places.items() if f == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.parametrize("files", [1, 3])
def test_a_bin_is_read_as_its_safetensors(tmp_path: Path, files: int) -> None:
    plain = Checkpoint.open(save(perturbed(1).to(torch.bfloat16), tmp_path / "plain"))
    pickled = Checkpoint.open(as_bin(save(perturbed(1).to(torch.bfloat16), tmp_path / "bin"), files))
    assert set(pickled.names()) == set(plain.names())
    assert pickled.shapes == plain.shapes
    assert pickled.dtypes == plain.dtypes
    for name in plain.names():
        torch.testing.assert_close(pickled.tensor(name), plain.tensor(name), rtol=0, atol=0)
    assert len(set(pickled.files.values())) == files
    base = Checkpoint.open(save(qwen3(0).to(torch.bfloat16), tmp_path / "base"))
    assert (Update.between(base, pickled) - Update.between(base, plain)).norm() == 0


def test_a_tensor_of_a_bin_holds_only_itself(tmp_path: Path) -> None:
    """A saved view drags its whole storage along; a copy must not."""
    folder = save(qwen3(0), tmp_path / "bin")
    (folder / "model.safetensors").unlink()
    torch.save({"w": torch.arange(100.0).reshape(10, 10).t()[2:4]}, folder / "pytorch_model.bin")
    checkpoint = Checkpoint.open(folder)
    tensor = checkpoint.tensor("w")
    assert tensor.is_contiguous()
    assert tensor.untyped_storage().nbytes() == 20 * 4
    torch.testing.assert_close(checkpoint.block("w", 1, 2), torch.arange(100.0).reshape(10, 10).t()[3:4])


def test_a_bin_base_loads_expands_and_measures(tmp_path: Path) -> None:
    base = Checkpoint.open(as_bin(save(qwen3(0), tmp_path / "base")))
    plain = Checkpoint.open(save(perturbed(1), tmp_path / "plain"))
    tuned = Checkpoint.open(as_bin(save(perturbed(1), tmp_path / "tuned"), 2))
    model = load(base, device="cpu")
    torch.testing.assert_close(model.parameters["model.norm.weight"], base.tensor("model.norm.weight"))
    updates = {"bin": Update.between(base, tuned), "safetensors": Update.between(base, plain)}
    domain = Domain.from_rows(rows(0, 4, 2), tokenizer=tokenizer(), name="d")
    found = expand(model, updates, {"d": domain}, pairs=False)["d"]
    assert found.predict({"bin": 1.0}).value == pytest.approx(found.predict({"safetensors": 1.0}).value, rel=1e-6)
    table = measure(model, updates, {"d": domain}).set_index("update")
    assert table.delta["bin"] == pytest.approx(table.delta["safetensors"], rel=1e-9)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_blocks_are_rows(tmp_path: Path, kind: str) -> None:
    folder = save(qwen3(0), tmp_path / "model")
    checkpoint = Checkpoint.open(as_bin(folder) if kind == "bin" else folder)
    for name in checkpoint.names():
        whole = checkpoint.tensor(name)
        for start, stop in ((0, len(whole)), (1, 4), (3, 3), (len(whole) - 1, len(whole))):
            block = checkpoint.block(name, start, stop)
            torch.testing.assert_close(block, whole[start:stop], rtol=0, atol=0)
            assert block.untyped_storage().nbytes() == block.nbytes
    for start, stop in ((-1, 2), (2, 1), (0, 10**6)):
        with pytest.raises(InputError, match="rows"):
            checkpoint.block("model.norm.weight", start, stop)
    with pytest.raises(InputError, match=r"did you mean 'model\.norm\.weight'"):
        checkpoint.block("model.norm.weights", 0, 1)


def moe(kind: str, seed: int) -> nn.Module:
    experts = {"num_local_experts": 12} if kind == "mixtral" else {"num_experts": 12}  # 10 comes after 9
    sizes = SIZES | MOE | experts
    config = (Qwen3MoeConfig if kind == "qwen3_moe" else MixtralConfig)(**sizes, tie_word_embeddings=False)
    torch.manual_seed(seed)
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


def state(folder: Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_experts_come_under_the_models_parameters(tmp_path: Path, kind: str) -> None:
    for name, seed in (("base", 0), ("tuned", 1)):
        save(moe(kind, seed), tmp_path / name)
    base, tuned = Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "tuned")
    assert any(".experts.0." in n for n in base.names())  # on disk one by one
    update = Update.between(base, tuned)
    before, after = state(tmp_path / "base"), state(tmp_path / "tuned")
    assert set(update) == set(before)
    assert any(t.dim() == 3 for t in before.values())  # in the model fused
    for name in before:
        torch.testing.assert_close(update[name], after[name] - before[name], rtol=0, atol=0)
    expected = sum(float(((after[n] - before[n]).double() ** 2).sum()) for n in before)
    assert update.norm() ** 2 == pytest.approx(expected, rel=1e-9)
    model = load(base, device="cpu")
    assert set(model.align(update)) == set(model.parameters)


def test_one_changed_expert_is_one_changed_parameter(tmp_path: Path) -> None:
    folder = save(moe("qwen3_moe", 0), tmp_path / "base")
    tensors = load_file(save(moe("qwen3_moe", 0), tmp_path / "tuned") / "model.safetensors")
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"] += 1
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    update = Update.between(Checkpoint.open(folder), Checkpoint.open(tmp_path / "tuned"))
    assert tuple(update) == ("model.layers.1.mlp.experts.gate_up_proj",)
    change = update.dense("model.layers.1.mlp.experts.gate_up_proj")
    expected = torch.zeros(12, 24, 16)
    expected[2, 12:] = 1
    torch.testing.assert_close(change, expected)


def test_experts_fused_on_disk_meet_a_base_that_has_them_one_by_one(tmp_path: Path) -> None:
    """What FSDP trainers write: the model's parameters as they are."""
    base = Checkpoint.open(save(moe("qwen3_moe", 0), tmp_path / "base"))
    tuned = moe("qwen3_moe", 1)
    save(tuned, tmp_path / "tuned")
    (tmp_path / "tuned" / "model.safetensors").unlink()
    torch.save({n: p.detach() for n, p in tuned.named_parameters()}, tmp_path / "tuned" / "pytorch_model.bin")
    update = Update.between(base, Checkpoint.open(tmp_path / "tuned"))
    before = state(tmp_path / "base")
    for name, p in tuned.named_parameters():
        torch.testing.assert_close(update[name], p.detach() - before[name], rtol=0, atol=0)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    base = Checkpoint.open(save(moe("qwen3_moe", 0), tmp_path / "base"))
    tensors = load_file(save(moe("qwen3_moe", 1), tmp_path / "tuned") / "model.safetensors")
    tensors.pop("model.layers.1.mlp.experts.2.up_proj.weight")
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"do not make model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        Update.between(base, Checkpoint.open(tmp_path / "tuned"))


def test_quantized_bases_are_refused(tmp_path: Path) -> None:
    folder = save(qwen3(0), tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(InputError, match="quantized"):
        Update.between(Checkpoint.open(folder), Checkpoint.open(save(perturbed(1), tmp_path / "tuned")))


def _header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the header of a safetensors file, the tensors' bytes left as they are."""
    file = folder / "model.safetensors"
    held = file.read_bytes()
    (length,) = struct.unpack("<Q", held[:8])
    header = json.loads(held[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + held[8 + length :])


def _entry(header: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = header["model.norm.weight"]
    return found


def _truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _dtype(folder: Path) -> None:
    _header(folder, lambda h: _entry(h).update(dtype="F16"))


def _unknown_dtype(folder: Path) -> None:
    _header(folder, lambda h: _entry(h).update(dtype="X99"))


def _overlapping(folder: Path) -> None:
    _header(folder, lambda h: _entry(h).update(data_offsets=h["model.embed_tokens.weight"]["data_offsets"]))


def _out_of_range(folder: Path) -> None:
    _header(folder, lambda h: _entry(h).update(data_offsets=[10**9, 10**9 + 64]))


def _huge_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:])


def _empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _loop(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "model.safetensors")


def _dangling(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "nowhere")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncated, "truncated or damaged"),
        (_dtype, "truncated or damaged"),
        (_unknown_dtype, "truncated or damaged"),
        (_overlapping, "truncated or damaged"),
        (_out_of_range, "truncated or damaged"),
        (_huge_header, "truncated or damaged"),
        (_empty, "truncated or damaged"),
        (_loop, "leads nowhere or to itself"),
        (_dangling, "leads nowhere or to itself"),
    ],
)
def test_damaged_safetensors(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = save(qwen3(0), tmp_path / "model")
    damage(folder)
    with pytest.raises(InputError, match=message):
        Checkpoint.open(folder)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"x": "nowhere.safetensors"}, "without shard nowhere"),
        ({"no.such.tensor": None}, "without tensor 'no.such.tensor'"),
        ({"x": "../model.safetensors"}, "points to"),
        ({"x": "/etc/passwd"}, "points to"),
        ({"x": 3}, "without a weight_map"),
        ({"x": ""}, "points to"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, kind: str, places: dict[str, Any], message: str) -> None:
    folder = save(qwen3(0), tmp_path / "model", max_shard_size="4KB" if kind == "safetensors" else "5GB")
    if kind == "bin":
        as_bin(folder, 2)
    file = next(folder.glob("*.index.json"))
    index = json.loads(file.read_text())
    some = next(iter(index["weight_map"].values()))
    index["weight_map"] |= {name: some if place is None else place for name, place in places.items()}
    file.write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        Checkpoint.open(folder)


def test_a_directory_that_leads_to_itself(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match="loop"):
        Checkpoint.open(tmp_path / "loop")


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "adapter_model.bin"])
def test_nothing_in_a_bin_is_executed(tmp_path: Path, file: str, zipped: bool) -> None:
    folder = save(qwen3(0), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    if file.startswith("adapter"):
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    mark = tmp_path / "executed"
    torch.save({"w": _Bomb(mark)}, folder / file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"asks for code|before 1\.6"):
        Checkpoint.open(folder)
    assert not mark.exists()
    torch.load(folder / file, weights_only=False)  # the bomb itself works
    assert mark.exists()


def _cut(folder: Path) -> None:
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-200])


def _zeros(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\0" * 999)


def _old(folder: Path) -> None:
    torch.save({"w": torch.ones(3)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def _nested(folder: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(3)}, "step": 3}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "truncated or damaged"),
        (_zeros, "damaged"),
        (_old, r"before 1\.6.*torch\.save"),
        (_nested, "more than named tensors"),
    ],
)
def test_damaged_bins(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = as_bin(save(qwen3(0), tmp_path / "model"))
    damage(folder)
    with pytest.raises(InputError, match=message):
        Checkpoint.open(folder)


def test_the_old_format_is_read_once_the_remedy_was_run(tmp_path: Path) -> None:
    folder = as_bin(save(qwen3(0), tmp_path / "model"))
    _old(folder)
    f = str(folder / "pytorch_model.bin")
    torch.save(torch.load(f, weights_only=True), f)
    assert Checkpoint.open(folder).names() == ["w"]


def test_pickled_trainers_are_refused_with_the_command_that_converts_them(tmp_path: Path) -> None:
    actor = tmp_path / "global_step_7" / "actor"
    actor.mkdir(parents=True)
    (actor / "model_world_size_2_rank_0.pt").write_bytes(b"x")
    (actor / "huggingface").mkdir()
    (actor / "huggingface" / "config.json").write_text("{}")
    merge = r"python -m verl\.model_merger merge --backend fsdp --local_dir \S*/actor --target_dir \S+"
    for given in (actor, actor.parent):
        with pytest.raises(InputError, match=merge):
            Checkpoint.open(given)
    (actor / "huggingface" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match=r"give .*actor/huggingface"):
        Checkpoint.open(actor)
    deep = tmp_path / "deepspeed" / "global_step5"
    deep.mkdir(parents=True)
    (deep / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"x")
    for given in (deep, deep.parent):
        with pytest.raises(InputError, match=r"cd \S*deepspeed && python zero_to_fp32\.py \. OUT --safe_serialization"):
            Checkpoint.open(given)
    loose = tmp_path / "loose"
    loose.mkdir()
    (loose / "policy.pth").write_bytes(b"x")
    with pytest.raises(InputError, match=r"policy\.pth.*never opened.*save_pretrained"):
        Checkpoint.open(loose)


def test_the_tuned_models_names_may_bear_a_wrappers_prefix(tmp_path: Path) -> None:
    base = Checkpoint.open(save(qwen3(0), tmp_path / "base"))
    tuned = save(perturbed(1), tmp_path / "tuned")
    plain = Update.between(base, Checkpoint.open(tuned))
    wrapped = save(perturbed(1), tmp_path / "wrapped")
    tensors = {f"module.{n}": t for n, t in load_file(tuned / "model.safetensors").items()}
    save_file(tensors, wrapped / "model.safetensors", {"format": "pt"})
    update = Update.between(base, Checkpoint.open(wrapped))
    assert set(update) == set(plain)
    assert (update - plain).norm() == 0
