"""Checkpoints and updates: reading, algebra, and every file that must be refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tiny import WORDS, perturbed, qwen3, save
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3ForCausalLM

from interference import Checkpoint, Update, tree
from interference.errors import InputError
from interference.model import load


def test_reads_what_transformers_wrote(tmp_path: Path) -> None:
    model = qwen3(0)
    for shard in ("50GB", "4KB"):
        folder = save(model, tmp_path / shard, max_shard_size=shard)
        checkpoint = Checkpoint.open(folder)
        assert len(set(checkpoint.files.values())) == (1 if shard == "50GB" else 2) or shard == "4KB"
        for name, p in model.named_parameters():
            torch.testing.assert_close(checkpoint.tensor(name), p.detach(), rtol=0, atol=0)
        assert set(checkpoint.names()) == {n for n, _ in model.named_parameters()}
    assert len(list((tmp_path / "4KB").glob("*.safetensors"))) > 1
    assert Checkpoint.open(tmp_path / "50GB").fingerprint() != Checkpoint.open(tmp_path / "4KB").fingerprint()


def test_a_duplicate_of_a_tied_head_is_read_once(tmp_path: Path) -> None:
    folder = save(qwen3(0), tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.tied_duplicate
    assert "lm_head.weight" not in checkpoint.names()
    save(perturbed(1), tmp_path / "tuned")
    assert "lm_head.weight" not in Update.between(checkpoint, Checkpoint.open(tmp_path / "tuned"))


def test_a_head_that_differs_from_the_embedding_is_a_tensor_of_its_own(tmp_path: Path) -> None:
    folder = save(qwen3(0), tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1.0
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.untied_head
    assert not checkpoint.tied
    assert not checkpoint.tied_duplicate
    assert "lm_head.weight" in checkpoint.names()
    torch.testing.assert_close(load(checkpoint, device="cpu").module.lm_head.weight.detach(), head, rtol=0, atol=0)


def test_a_config_that_does_not_say_takes_the_default_of_its_architecture(tmp_path: Path) -> None:
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=27, n_positions=32)
    folder = save(GPT2LMHeadModel(config), tmp_path / "gpt2")
    tensors = load_file(folder / "model.safetensors")
    embedding = next(t for n, t in tensors.items() if n.endswith("wte.weight"))
    save_file(tensors | {"lm_head.weight": embedding.clone()}, folder / "model.safetensors", {"format": "pt"})
    told = json.loads((folder / "config.json").read_text())
    told.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(told))
    assert "lm_head.weight" not in Checkpoint.open(folder).names()


def test_the_fingerprint_holds_what_turns_text_into_ids(tmp_path: Path) -> None:
    folder = save(qwen3(0), tmp_path / "base")
    before = Checkpoint.open(folder).fingerprint()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert Checkpoint.open(folder).fingerprint() != before


def test_the_stamp_holds_configurations_beside_and_above_the_weights(tmp_path: Path) -> None:
    folder = save(qwen3(0), tmp_path / "base")
    before = Checkpoint.open(folder).stamp()
    assert Checkpoint.open(folder).stamp() == before
    (folder / "adapter_of_another_kind.json").write_text('{"lora_alpha": 8}')
    beside = Checkpoint.open(folder).stamp()
    assert beside != before
    (tmp_path / "config.json").write_text("{}")
    opened = replace(Checkpoint.open(folder), home=tmp_path)  # as a distributed checkpoint finds its configuration
    above = opened.stamp()
    (tmp_path / "config.json").write_text('{"rope_theta": 7}')
    assert opened.stamp() != above


def test_a_checkpoint_without_tokenizer_says_so(tmp_path: Path) -> None:
    qwen3(0).save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match="without tokenizer files"):
        Checkpoint.open(tmp_path / "bare").tokenizer()


def test_update_is_the_difference_and_its_algebra_holds(tmp_path: Path) -> None:
    base, one, two = (
        Checkpoint.open(save(m, tmp_path / n)) for n, m in (("b", qwen3(0)), ("1", perturbed(1)), ("2", perturbed(2)))
    )
    u, v = Update.between(base, one), Update.between(base, two)
    dense = {n: one.tensor(n) - base.tensor(n) for n in base.names()}
    for name in u:
        torch.testing.assert_close(u[name], dense[name], rtol=0, atol=0)
    assert u.norm() == pytest.approx(tree.norm(dense), rel=1e-12)
    both = 2 * u - v
    assert both.norm() ** 2 == pytest.approx(4 * u.norm() ** 2 - 4 * u.dot(v) + v.norm() ** 2, rel=1e-5)
    part = u.restrict(r"layers\.1\.")
    rest = u.restrict(r"^(?!.*layers\.1\.)")
    assert part.norm() ** 2 + rest.norm() ** 2 == pytest.approx(u.norm() ** 2, rel=1e-12)
    mask = {n: u[n] > 0 for n in u}
    assert u.restrict(mask).dot(u) == pytest.approx(sum(float((t[t > 0].double() ** 2).sum()) for t in dense.values()))
    assert u.cosine(u) == pytest.approx(1.0)
    with pytest.raises(InputError, match="pattern"):
        u.restrict("no such layer")


def test_bf16_checkpoints_are_subtracted_in_float32(tmp_path: Path) -> None:
    base = Checkpoint.open(save(qwen3(0).to(torch.bfloat16), tmp_path / "b"))
    tuned = Checkpoint.open(save(perturbed(1).to(torch.bfloat16), tmp_path / "t"))
    u = Update.between(base, tuned)
    name = next(iter(u))
    assert u[name].dtype == torch.float32
    torch.testing.assert_close(u[name], tuned.tensor(name).float() - base.tensor(name).float(), rtol=0, atol=0)


def test_names_with_and_without_the_prefix_meet_the_model(tmp_path: Path) -> None:
    model = load(Checkpoint.open(save(qwen3(0), tmp_path / "b")), device="cpu")
    short = {"layers.0.mlp.up_proj.weight": torch.ones(32, 16)}
    assert set(model.align(short)) == {"model.layers.0.mlp.up_proj.weight"}
    with pytest.raises(InputError, match="no parameter"):
        model.align({"elsewhere.weight": torch.ones(1)})
    with pytest.raises(InputError, match="shape"):
        model.align({"layers.0.mlp.up_proj.weight": torch.ones(1)})


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


def _drop_shard(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def _lying_index(folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["no.such.tensor"] = sorted(set(index["weight_map"].values()))[0]
    file.write_text(json.dumps(index))


def _escape(folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["x"] = "../secret.safetensors"
    file.write_text(json.dumps(index))


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.pt")


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "shards", "message"),
    [
        (_truncate, False, "truncated or damaged"),
        (_header, False, "truncated or damaged"),
        (_pickle, False, "never opened"),
        (_no_config, False, "without config.json"),
        (_broken_config, False, "not readable JSON"),
        (_drop_shard, True, "without shard model-0000"),
        (_lying_index, True, "no.such.tensor"),
        (_escape, True, "secret"),
    ],
)
def test_damaged_checkpoints_give_one_clear_error(
    tmp_path: Path, damage: Callable[[Path], None], shards: bool, message: str
) -> None:
    folder = save(qwen3(0), tmp_path / "model", max_shard_size="4KB" if shards else "5GB")
    damage(folder)
    with pytest.raises(InputError, match=message):
        _ = Checkpoint.open(folder).config


@pytest.mark.parametrize("pickled", [False, True])
def test_a_single_file_goes_before_an_index_as_in_transformers(tmp_path: Path, pickled: bool) -> None:
    folder = save(qwen3(0), tmp_path / "model", max_shard_size="4KB")
    newer = perturbed(1).state_dict()
    newer.pop("lm_head.weight")
    if pickled:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        (folder / "model.safetensors.index.json").unlink()
        index["weight_map"] = dict.fromkeys(index["weight_map"], "pytorch_model-1.bin")
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        torch.save({n: 0 * t for n, t in newer.items()}, folder / "pytorch_model-1.bin")
        for shard in folder.glob("*.safetensors"):
            shard.unlink()
        torch.save(newer, folder / "pytorch_model.bin")
    else:
        save_file(newer, folder / "model.safetensors", {"format": "pt"})
    theirs = Qwen3ForCausalLM.from_pretrained(folder).state_dict()
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint.names()) == set(newer)
    for name in newer:
        torch.testing.assert_close(theirs[name], newer[name], rtol=0, atol=0)
        torch.testing.assert_close(checkpoint.tensor(name), theirs[name], rtol=0, atol=0)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        Checkpoint.open(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["safetensors", "bin", "adapter"])
def test_a_hub_id_fetches_what_is_read_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    remote, cache = save(qwen3(0), tmp_path / "remote"), tmp_path / "cache"
    weights = load_file(remote / "model.safetensors")
    torch.save(weights, remote / "pytorch_model.bin")
    (remote / "optimizer.bin").write_bytes(b"large")
    if kind != "safetensors":
        (remote / "model.safetensors").unlink()
    if kind == "adapter":
        (remote / "pytorch_model.bin").rename(remote / "adapter_model.bin")
        (remote / "config.json").rename(remote / "adapter_config.json")

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        assert hub_id == "someone/model"
        cache.mkdir(exist_ok=True)
        for name in filter_repo_objects([p.name for p in remote.iterdir()], allow_patterns=allow_patterns):
            shutil.copy(remote / name, cache / name)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert set(Checkpoint.open("someone/model").shapes) == set(weights)
    assert not (cache / "optimizer.bin").exists()
    assert (cache / "pytorch_model.bin").exists() == (kind == "bin")


def _nan(folder: Path) -> None:
    model = perturbed(1)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    save(model, folder)


def _shapes(folder: Path) -> None:
    save(qwen3(0, intermediate_size=40), folder)


def _vocabulary(folder: Path) -> None:
    save(qwen3(0, vocab_size=30), folder, [*WORDS, "x", "y", "z"])


def _tokens(folder: Path) -> None:
    save(perturbed(1), folder, [*WORDS[:-1], "other"])


def _same(folder: Path) -> None:
    save(qwen3(0), folder)


def _other_function(folder: Path) -> None:
    save(perturbed(1, rms_norm_eps=1e-2), folder)


def _family(folder: Path) -> None:
    save(perturbed(1), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))


def _missing_tensor(folder: Path) -> None:
    save(perturbed(1), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_nan, r"NaN or infinite weights in model.layers.1.mlp.up_proj"),
        (_shapes, r"down_proj.weight of shape \(16, 32\) .base. and \(16, 40\)"),
        (_other_function, "rms_norm_eps"),
        (_vocabulary, "vocabularies of 27 .base. and 30"),
        (_tokens, "tokenizers that disagree"),
        (_same, "all identical"),
        (_family, "'qwen3' and .* 'llama'"),
        (_missing_tensor, "model.norm.weight"),
    ],
)
def test_pairs_that_cannot_be_compared(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    base = Checkpoint.open(save(qwen3(0), tmp_path / "base"))
    make(tmp_path / "tuned")
    with pytest.raises(InputError, match=message):
        Update.between(base, Checkpoint.open(tmp_path / "tuned"))
    shutil.rmtree(tmp_path / "tuned")
