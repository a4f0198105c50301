"""`interference geometry` from checkpoints to a run directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import perturbed, qwen3, save
from typer.testing import CliRunner

from interference.cli import app
from interference.errors import InputError
from interference.geometry.settings import Settings
from interference.records import Run
from interference.weight_shift import named, weight_shift


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """base/, full/ and adapter/, a LoRA made by peft."""
    save(qwen3(0), tmp_path / "base")
    save(perturbed(1), tmp_path / "full")
    peft = get_peft_model(qwen3(0), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_B" in name:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    peft.save_pretrained(tmp_path / "adapter")
    return tmp_path


def lora_norm(folder: Path) -> float:
    """The norm of the adapter's update, from peft's own merge."""
    from peft import PeftModel

    before = qwen3(0).state_dict()
    after = PeftModel.from_pretrained(qwen3(0), str(folder)).merge_and_unload().state_dict()
    return float(sum(((after[n].double() - before[n].double()) ** 2).sum() for n in before) ** 0.5)


def total(run: Path, model: str) -> float:
    """The norm of a model's whole update, from the run's table of norms."""
    found = Run.open(run).geometry("norms")
    row = found[(found["model"] == model) & (found["kind"] == "all")]
    return float(row["update_norm"].iloc[0])


def test_names_and_paths_with_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert named(["code=runs/7"]) == {"code": "runs/7"}
    assert named(["runs/lr=1e-5/last"]) == {"last": "runs/lr=1e-5/last"}
    monkeypatch.chdir(tmp_path)
    assert named(["lr=3"]) == {"lr": "3"}
    (tmp_path / "lr=3").mkdir()
    assert named(["lr=3", "b=lr=3"]) == {"lr=3": "lr=3", "b": "lr=3"}
    with pytest.raises(InputError, match="NAME=PATH"):
        named(["=runs"])


def test_a_refused_survey_leaves_nothing_behind(models: Path) -> None:
    with pytest.raises(InputError):
        weight_shift(str(models / "base"), {"same": str(models / "base")}, models / "out")
    assert not (models / "out.part").exists()
    assert not (models / "out").exists()
