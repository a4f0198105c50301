"""Every audit of a pair has files that trigger it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import WORDS, perturbed, qwen3, save

from interference import Checkpoint, Update
from interference.configurations import differing
from interference.errors import InputError
from interference.pairing import FATAL, NOTE, WARNING, Base, Finding, stop_at_fatal


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return save(qwen3(0), tmp_path / "base"), save(perturbed(1), tmp_path / "tuned")


def found(base: Path, tuned: Path) -> dict[str, str]:
    return {f.check: f.severity for f in findings(base, tuned)}


def findings(base: Path, tuned: Path) -> tuple[Finding, ...]:
    return Base.of(Checkpoint.open(base)).pair(Checkpoint.open(tuned)).findings


def rewrite(folder: Path, change: Any) -> None:
    """Change the tensors of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v.contiguous() for k, v in change(tensors).items()}, folder / "model.safetensors", {"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_sound_pair_has_no_findings(pair: tuple[Path, Path]) -> None:
    assert found(*pair) == {}


def test_another_family(pair: tuple[Path, Path]) -> None:
    configure(pair[1], model_type="llama")
    assert found(*pair)["family"] == FATAL


def test_a_prefix_is_read_over_and_other_names_are_not(pair: tuple[Path, Path]) -> None:
    rewrite(pair[1], lambda tensors: {f"policy.{k}": v for k, v in tensors.items()})
    assert found(*pair) == {"names": NOTE}
    rewrite(pair[1], lambda tensors: {k.replace("mlp", "ffn"): v for k, v in tensors.items()})
    assert found(*pair)["names"] == FATAL


def test_a_missing_tensor(pair: tuple[Path, Path]) -> None:
    rewrite(pair[1], lambda tensors: {k: v for k, v in tensors.items() if "layers.1.mlp.up" not in k})
    finding = findings(*pair)[0]
    assert finding.tensor == "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(InputError, match="which only the base checkpoint"):
        stop_at_fatal([finding])


def test_a_padded_vocabulary(pair: tuple[Path, Path]) -> None:
    def pad(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = "model.embed_tokens.weight"
        return tensors | {name: torch.cat([tensors[name], torch.zeros(5, tensors[name].shape[1])])}

    rewrite(pair[1], pad)
    assert found(*pair) == {"vocabulary padding": FATAL}
    configure(pair[1], vocab_size=32)
    assert found(*pair)["vocabulary"] == FATAL


def test_another_shape_and_another_configuration(pair: tuple[Path, Path]) -> None:
    configure(pair[1], rms_norm_eps=0.5)
    assert found(*pair) == {"configuration": FATAL}
    rewrite(pair[1], lambda t: t | {"model.norm.weight": torch.ones(3)})
    assert found(*pair)["shapes"] == FATAL


def test_a_configuration_that_differs_without_changing_the_function(pair: tuple[Path, Path]) -> None:
    configure(pair[1], max_position_embeddings=128, attention_dropout=0.1, initializer_range=0.1, max_window_layers=1)
    assert found(*pair) == {"configuration": WARNING}
    message = findings(*pair)[0].message
    assert all(
        key in message for key in ("max_position_embeddings 64 and 128", "attention_dropout", "max_window_layers")
    )
    configure(pair[1], hidden_act="relu")
    assert [f.severity for f in findings(*pair)] == [FATAL, WARNING]


@pytest.mark.parametrize(
    ("base", "tuned", "key"),
    [
        ({"rope_parameters": {"rope_type": "dynamic"}}, {"max_position_embeddings": 128}, "max_position_embeddings"),
        ({"use_sliding_window": True, "sliding_window": 4}, {"sliding_window": 8}, "sliding_window"),
        ({"use_sliding_window": False, "sliding_window": 4}, {"use_sliding_window": True}, "use_sliding_window"),
        ({"num_experts_per_tok": 2}, {"num_experts_per_tok": 4}, "num_experts_per_tok"),
        ({"no_such_key": 1}, {"no_such_key": 2}, "no_such_key"),
    ],
)
def test_keys_that_may_change_the_function(base: dict[str, Any], tuned: dict[str, Any], key: str) -> None:
    before = {"max_position_embeddings": 64} | base
    assert differing(before, before | tuned) == ([key], [])


def test_another_tokenizer(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    other = save(perturbed(1), tmp_path / "other", words=[*WORDS[:-1], "another"])
    assert found(pair[0], other) == {"tokenizer": FATAL}


def test_a_change_of_dtype_is_a_warning(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    half = save(perturbed(1).to(torch.bfloat16), tmp_path / "half")
    assert found(pair[0], half) == {"dtype": WARNING}


def test_a_duplicate_of_a_tied_head(pair: tuple[Path, Path]) -> None:
    rewrite(pair[1], lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    assert found(*pair) == {"tied head": NOTE}


def test_a_head_that_differs_from_its_tied_embedding(pair: tuple[Path, Path]) -> None:
    for folder in pair:
        rewrite(folder, lambda t: t | {"lm_head.weight": 2 * t["model.embed_tokens.weight"]})
    assert found(*pair) == {"tied head": WARNING}
    assert "lm_head.weight" in Update.between(*(Checkpoint.open(p) for p in pair))


def test_a_pair_the_wrong_way_round(pair: tuple[Path, Path]) -> None:
    configure(pair[1], _name_or_path=str(pair[0]))
    assert found(*pair) == {}
    assert found(pair[1], pair[0]) == {"swapped": WARNING}


def test_update_stops_at_the_same_findings(pair: tuple[Path, Path], tmp_path: Path) -> None:
    configure(pair[1], model_type="llama")
    with pytest.raises(InputError, match="checkpoints of one architecture"):
        Update.between(*(Checkpoint.open(p) for p in pair))
    shutil.copytree(pair[0], tmp_path / "same")
    with pytest.raises(InputError, match="identical"):
        Update.between(Checkpoint.open(pair[0]), Checkpoint.open(tmp_path / "same"))
