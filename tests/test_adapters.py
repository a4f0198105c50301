"""PEFT adapters as updates: every kind of LoRA against PEFT's own merge, and what must be refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import perturbed, qwen3, rows, save, tokenizer, write_jsonl
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from transformers import GPT2Config, GPT2LMHeadModel

from interference import Checkpoint, Domain, Update, expand, measure, tree
from interference.attribution import attribute
from interference.config import RunConfig
from interference.diagnose import diagnose
from interference.errors import InputError
from interference.model import load
from interference.records import Run
from interference.tree import LowRank

ATTENTION = ["q_proj", "v_proj", "o_proj"]


def gpt2(**changes: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 27, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, **changes)).eval()


def adapted(folder: Path, model: nn.Module, **settings: Any) -> tuple[Checkpoint, Checkpoint, dict[str, Tensor]]:
    """A base, an adapter of it with random factors, and PEFT's merged model minus the base, all in float64."""
    model = model.double()
    for p in model.parameters():
        p.data = p.data.float().double()
    save(model, folder / "base")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    peft = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 5} | settings), autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in peft.parameters():
            if p.requires_grad:
                p.add_((0.1 * torch.randn(p.shape, generator=generator)).double())
    peft.save_pretrained(folder / "adapter")
    after = peft.merge_and_unload().state_dict()
    delta = {n: after[n] - t for n, t in before.items()}
    changed = {n: d for n, d in delta.items() if bool(d.any())}
    return Checkpoint.open(folder / "base"), Checkpoint.open(folder / "adapter"), changed


BIASED = {"attention_bias": True}
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "plain": (qwen3, {"target_modules": [*ATTENTION, "down_proj"]}),
    "a regular expression": (qwen3, {"target_modules": r".*layers\.1\..*(up|gate)_proj"}),
    "rank-stabilised": (qwen3, {"target_modules": ATTENTION, "use_rslora": True}),
    "patterns": (
        qwen3,
        {
            "target_modules": ATTENTION,
            "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 5, "v_proj": 2},
            "alpha_pattern": {"v_proj": 7, r"^model\.layers\.1\.self_attn\.o_proj": 11},
        },
    ),
    "rank-stabilised patterns": (
        qwen3,
        {
            "target_modules": ATTENTION,
            "use_rslora": True,
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"q_proj": 9},
        },
    ),
    "DoRA": (qwen3, {"target_modules": [*ATTENTION, "up_proj"], "use_dora": True}),
    "embedding": (lambda: qwen3(tie_word_embeddings=False), {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding DoRA": (
        lambda: qwen3(tie_word_embeddings=False),
        {"target_modules": ["embed_tokens"], "use_dora": True},
    ),
    "head": (lambda: qwen3(tie_word_embeddings=False), {"target_modules": ["lm_head", "q_proj"]}),
    "saved head": (
        lambda: qwen3(tie_word_embeddings=False),
        {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]},
    ),
    "lora_bias": (lambda: qwen3(**BIASED), {"target_modules": ATTENTION, "lora_bias": True}),
    "trained biases": (lambda: qwen3(**BIASED), {"target_modules": ATTENTION, "bias": "all"}),
    "biases of adapted layers": (lambda: qwen3(**BIASED), {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "Conv1D told": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "Conv1D and Linear": (
        lambda: gpt2(tie_word_embeddings=False),
        {"target_modules": ["c_proj", "lm_head"], "fan_in_fan_out": True},
    ),
    "Conv1D DoRA": (gpt2, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_update_is_what_peft_merges(tmp_path: Path, case: str) -> None:
    make, settings = CASES[case]
    base, adapter, delta = adapted(tmp_path, make(), **settings)
    update = Update.between(base, adapter)
    assert {n: tuple(update[n].shape) for n in update} == {n: tuple(d.shape) for n, d in delta.items()}
    for name, expected in delta.items():
        torch.testing.assert_close(update.dense(name).double(), expected, rtol=1e-6, atol=1e-6)
    plain = not settings.get("use_dora")
    assert plain == any(isinstance(update[n], LowRank) for n in update)
    assert update.norm() ** 2 == pytest.approx(tree.dot(delta, delta), rel=1e-5)


def test_factors_survive_the_algebra(tmp_path: Path) -> None:
    base, adapter, delta = adapted(tmp_path / "a", qwen3(), target_modules=ATTENTION, r=2)
    u = Update.between(base, adapter)
    v = Update.from_tensors(
        {n: torch.randn(d.shape, generator=torch.Generator().manual_seed(2)) for n, d in delta.items()}
    )
    q = "model.layers.0.self_attn.q_proj.weight"
    both = 2 * u - 0.5 * u
    assert isinstance(both[q], LowRank)
    torch.testing.assert_close(both.dense(q), 1.5 * delta[q].float(), rtol=1e-5, atol=1e-6)
    assert isinstance((u + v)[q], Tensor)
    torch.testing.assert_close((u + v).dense(q), delta[q].float() + v[q], rtol=1e-5, atol=1e-6)
    expected = sum(float((delta[n] * v.dense(n)).sum()) for n in delta)
    assert u.dot(v) == pytest.approx(expected, rel=1e-5)
    assert v.dot(u) == pytest.approx(expected, rel=1e-5)
    assert u.dot(u) == pytest.approx(u.norm() ** 2, rel=1e-12)
    assert u.cosine(both) == pytest.approx(1.0)
    mask = {q: delta[q] > 0}
    assert u.restrict(mask).norm() ** 2 == pytest.approx(float((delta[q].clamp(min=0) ** 2).sum()), rel=1e-5)
    assert u.restrict("q_proj").names == tuple(n for n in u.names if "q_proj" in n)
    stacked = u
    for _ in range(4):  # of rank 10 in matrices of 16: factors would take more room than the matrix
        stacked = stacked + u
    assert isinstance(stacked[q], Tensor)
    torch.testing.assert_close(stacked.dense(q), 5 * delta[q].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "DoRA", "Conv1D"])
def test_expand_and_measure_take_an_adapter_as_its_merged_model(tmp_path: Path, kind: str) -> None:
    make, settings = CASES[kind]
    base, adapter, delta = adapted(tmp_path, make(), **settings)
    delta.pop("lm_head.weight", None)
    merged = {n: d.float() for n, d in delta.items()}
    domain = Domain.from_rows(rows(0, 4, 2), tokenizer=tokenizer(), name="d")
    model = load(base, device="cpu")
    updates = {"adapter": Update.between(base, adapter), "merged": Update.from_tensors(merged)}
    found = expand(model, updates, {"d": domain}, pairs=False)["d"]
    one, two = (found.predict({name: 1.0}) for name in updates)
    assert one.first == pytest.approx(two.first, rel=1e-5, abs=1e-6)
    assert one.second == pytest.approx(two.second, rel=1e-5, abs=1e-6)
    cells = attribute(model, updates, {"d": domain}).cells.set_index("update")
    for order in ("first", "second"):
        assert cells.loc["adapter", order] == pytest.approx(cells.loc["merged", order], rel=1e-4, abs=1e-6)
    table = measure(model, updates, {"d": domain}).set_index("update")
    assert table.delta["adapter"] == pytest.approx(table.delta["merged"], rel=1e-5, abs=1e-6)
    assert abs(table.delta["adapter"]) > 1e-4


def test_the_pickled_adapter_gives_the_same_update(tmp_path: Path) -> None:
    base, adapter, _ = adapted(tmp_path, qwen3(), target_modules=ATTENTION)
    update = Update.between(base, adapter)
    shutil.copytree(tmp_path / "adapter", tmp_path / "pickled")
    file = tmp_path / "pickled" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    again = Update.between(base, Checkpoint.open(tmp_path / "pickled"))
    assert set(again) == set(update)
    for name in update:
        torch.testing.assert_close(again.dense(name), update.dense(name), rtol=0, atol=0)


def test_an_adapter_names_its_content(tmp_path: Path) -> None:
    base, adapter, _ = adapted(tmp_path, qwen3(), target_modules=ATTENTION)
    before = adapter.fingerprint()
    assert adapter.adapter is not None
    assert base.adapter is None
    _settings(tmp_path, lora_alpha=6)
    assert Checkpoint.open(tmp_path / "adapter").fingerprint() != before


def _settings(folder: Path, **changes: Any) -> None:
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def _first(tensors: dict[str, Tensor], part: str) -> str:
    return next(n for n in tensors if part in n)


def _misfit(tensors: dict[str, Tensor]) -> None:
    tensors[_first(tensors, "lora_B")] = torch.ones(7, 3)


def _one_factor(tensors: dict[str, Tensor]) -> None:
    tensors.pop(_first(tensors, "lora_B"))


def _elsewhere(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.ones(3, 16)


def _untrained(tensors: dict[str, Tensor]) -> None:
    tensors.update({n: torch.zeros_like(t) for n, t in tensors.items() if "lora_B" in n})


def _infinite(tensors: dict[str, Tensor]) -> None:
    tensors[_first(tensors, "lora_A")][0, 0] = float("inf")


def _unknown(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_diag"] = torch.ones(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_misfit, r"factors of shapes \(7, 3\) and \(3, 16\)"),
        (_one_factor, "only one of lora_B and lora_A"),
        (_elsewhere, "no parameter 'model.layers.9.self_attn.q_proj.weight'"),
        (_untrained, "all identical"),
        (_infinite, "NaN or infinite"),
        (_unknown, "lora_diag.*merge_and_unload"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str) -> None:
    base, _, _ = adapted(tmp_path, qwen3(), target_modules=ATTENTION)
    _tensors(tmp_path, change)
    with pytest.raises(InputError, match=message):
        Update.between(base, Checkpoint.open(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "type 'LOHA'.*merge_and_unload"),
        ({"layer_replication": [[0, 1]]}, "layer_replication.*merge_and_unload"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "pissa.*path_initial_model"),
        ({"use_dora": True}, "no magnitudes"),
        ({"r": 4}, "rank 4"),
        ({"r": None}, "not usable"),
        ({"rank_pattern": {"(": 2}}, "not usable"),
    ],
)
def test_adapters_that_are_no_plain_change(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    base, _, _ = adapted(tmp_path, qwen3(), target_modules=ATTENTION)
    _settings(tmp_path, **settings)
    with pytest.raises(InputError, match=message):
        Update.between(base, Checkpoint.open(tmp_path / "adapter"))


def test_a_pair_that_was_trained_tied_is_one_change(tmp_path: Path) -> None:
    """Against the adapted model itself: PEFT's merge adds the change to the shared weight twice."""
    settings = {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "ensure_weight_tying": True}
    base, adapter, merged = adapted(tmp_path, qwen3(), **settings)
    update = Update.between(base, adapter)
    embedding = "model.embed_tokens.weight"
    torch.testing.assert_close(2 * update.dense(embedding), merged[embedding].float(), rtol=1e-5, atol=1e-6)
    ids = torch.arange(20)[None]
    plain = qwen3().double()
    plain.load_state_dict({n: t.double() for n, t in load_file(tmp_path / "base" / "model.safetensors").items()}, False)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter", autocast_adapter_dtype=False)(ids).logits
    model = load(base, dtype=torch.float64, device="cpu")
    with model.at([{n: tree.dense(c) for n, c in model.align(update).items()}], [1.0]):
        torch.testing.assert_close(model.forward(ids), theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
        {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]},
    ],
)
def test_one_of_a_tied_pair_is_no_update_of_the_base(tmp_path: Path, settings: dict[str, Any]) -> None:
    """PEFT leaves the other one as it was while training (peft#2018): the trained model has two weights, the base one."""
    base, adapter, _ = adapted(tmp_path, qwen3(), **settings)
    with pytest.raises(InputError, match=r"apart.*untie the base first"):
        Update.between(base, adapter)


def test_the_remedy_for_a_tied_pair_works(tmp_path: Path) -> None:
    model = qwen3()
    _, adapter, _ = adapted(tmp_path, model, target_modules=["lm_head", "q_proj"])
    untied = qwen3()
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.clone())
    save(untied, tmp_path / "untied")
    update = Update.between(Checkpoint.open(tmp_path / "untied"), adapter)
    assert "lm_head.weight" in update
    assert "model.embed_tokens.weight" not in update


def test_places_where_an_adapter_is_no_model(tmp_path: Path) -> None:
    base, adapter, _ = adapted(tmp_path, qwen3(), target_modules=ATTENTION)
    with pytest.raises(InputError, match="as the base"):
        Update.between(adapter, base)
    with pytest.raises(InputError, match="an adapter"):
        load(adapter)
    with pytest.raises(InputError, match="an adapter is an update"):
        _ = adapter.config
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "adapter" / "model.safetensors")
    with pytest.raises(InputError, match="both a model and an adapter"):
        Checkpoint.open(tmp_path / "adapter")


def test_diagnose_takes_what_trainers_leave(tmp_path: Path) -> None:
    """An adapter and a distributed checkpoint beside the same models as Hugging Face directories: one result each."""
    base = save(qwen3(0), tmp_path / "base")
    _, _, delta = adapted(tmp_path / "peft", qwen3(0), target_modules=ATTENTION)
    merged, tuned = qwen3(0), perturbed(1)
    with torch.no_grad():
        for name, p in merged.named_parameters():
            p.add_(delta.get(name, torch.zeros(())).float())
    save(merged, tmp_path / "merged")
    save(tuned, tmp_path / "tuned")
    state = {"model": {n: p.detach() for n, p in tuned.named_parameters()}}
    dcp.save(state, storage_writer=FileSystemWriter(tmp_path / "dcp"), no_dist=True)
    write_jsonl(tmp_path / "d.jsonl", rows(0, 4, 2))
    places = {"adapter": "peft/adapter", "merged": "merged", "distributed": "dcp", "directory": "tuned"}
    config = RunConfig.model_validate(
        {
            "base_model": str(base),
            "models": [{"name": n, "model": str(tmp_path / p)} for n, p in places.items()],
            "domains": [{"name": "d", "data": str(tmp_path / "d.jsonl")}],
            "objective": "nll",
            "output": str(tmp_path / "run"),
        }
    )
    run = Run.open(diagnose(config, search_path=[tmp_path]))
    cells = run.cells().set_index("update")
    for one, other in (("adapter", "merged"), ("distributed", "directory")):
        for column in ("predicted_first", "predicted_second", "stderr", "measured", "update_norm"):
            assert cells.loc[one, column] == pytest.approx(cells.loc[other, column], rel=1e-4, abs=1e-6), column
    assert len(set(run.manifest["fingerprints"]["models"].values())) == 4
