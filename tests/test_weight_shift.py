"""`interference geometry` from checkpoints to a run directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
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


def norm(models: Path, name: str) -> float:
    """The norm of a model's update, an adapter's from peft's own merge."""
    adapter = name == "adapter"
    after = PeftModel.from_pretrained(qwen3(0), str(models / name)).merge_and_unload() if adapter else perturbed(1)
    before, moved = dict(qwen3(0).named_parameters()), dict(after.named_parameters())
    return float(sum(((moved[n].detach().double() - p.detach().double()) ** 2).sum() for n, p in before.items()) ** 0.5)


def recorded(run: Path, name: str) -> float:
    """The norm of a model's whole update, as the run has it."""
    found = Run.open(run).geometry("norms")
    return float(found[(found["model"] == name) & (found["scope"] == "model")]["norm"].iloc[0])


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


@pytest.mark.parametrize("names", [("adapter",), ("full", "adapter")])
def test_from_checkpoints_to_a_report(models: Path, names: tuple[str, ...]) -> None:
    tuned = [f"{name}={models / name}" for name in names]
    arguments = ["geometry", str(models / "base"), *tuned, "-o", str(models / "out"), "-k", "2"]
    done = CliRunner().invoke(app, [*arguments, "--quiet"], catch_exceptions=False)
    assert done.exit_code == 0
    assert done.output.split()[-1] == str(models / "out" / "report.html")
    for name in names:
        assert recorded(models / "out", name) == pytest.approx(norm(models, name), rel=1e-5)
    written = (models / "out" / "report.html").stat().st_mtime_ns
    again = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert again.exit_code == 0
    assert (models / "out" / "report.html").stat().st_mtime_ns == written
    assert Run.open(models / "out").results["models"] == list(names)


def test_a_changed_adapter_configuration_is_noticed(models: Path) -> None:
    settings = Settings(projections=0, spectra="none", k=2)
    asked = str(models / "base"), {"full": str(models / "full"), "adapter": str(models / "adapter")}, models / "out"
    before = recorded(weight_shift(*asked, settings=settings), "adapter")
    file = models / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 12}))
    with pytest.raises(InputError, match="another run"):
        weight_shift(*asked, settings=settings)
    after = recorded(weight_shift(*asked, settings=settings, overwrite=True), "adapter")
    assert after == pytest.approx(3 * before, rel=1e-5)
