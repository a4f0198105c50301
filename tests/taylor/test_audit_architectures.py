"""The audit on small random models of every architecture that must hold, eager and through SDPA's math kernel."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_taylor_architectures import build

from interference import Checkpoint, audit
from interference.checks import Audit
from interference.checks.probe import make_probe, pad_token
from interference.model import load, prepare

NAMES = [
    "qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt2", "gpt_neox", "opt", "qwen3_moe",
    "gpt_oss",
]  # fmt: skip
NO_SDPA = {"gemma2", "gpt_oss"}  # soft-capped scores and sinks: transformers has no SDPA for them
MODES = ("taylor", "nested", "reverse")
Recorder = Callable[[str, object], None]


def check(found: Audit, record: Recorder, first: float = 1e-5, second: float = 1e-3) -> None:
    """The bounds; what was reached goes to `pytest --junitxml`, from which docs/numerics.md has its table."""
    assert found.verdicts == dict.fromkeys(found.verdicts, "trusted"), found.to_frame().query("not passed")
    pairs = [r for r in found.rows if r.against in MODES]
    assert {r.name for r in pairs} == {"first order", "second order"}
    reached = {name: max(r.agreement for r in pairs if r.name == name) for name in ("first order", "second order")}
    for name, worst in reached.items():
        record(name, f"{worst:.0e}")
    assert reached["first order"] < first
    assert reached["second order"] < second


@pytest.mark.parametrize("name", NAMES)
def test_eager(name: str, record_property: Recorder) -> None:
    model = prepare(build(name, dtype=torch.float32))
    pad = pad_token(model)
    probe = make_probe(model, None, [], count=4, longest=64, directions=1, seed=0)
    assert all(pad in s.prompt and pad in s.response for s in probe.sequences)
    check(audit(model), record_property)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in NO_SDPA])
def test_sdpa(name: str, record_property: Recorder) -> None:
    model = prepare(build(name, "sdpa", torch.float32))
    assert any("math kernel" in note for note in model.notes)
    check(audit(model, level="quick"), record_property)
    check(audit(model, level="quick", engine="nested"), record_property)


@pytest.mark.parametrize("name", sorted(NO_SDPA))
def test_attention_without_sdpa_is_refused_by_transformers(name: str) -> None:
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        build(name, "sdpa", torch.float32)


@pytest.mark.parametrize(
    ("name", "asked", "attention"),
    [("qwen3", "", "sdpa"), ("gpt2", "", "sdpa"), ("gemma2", "", "eager"), ("qwen3", "flex_attention", "eager")],
)
def test_fast_attention_is_what_the_model_has(name: str, asked: str, attention: str, tmp_path: Path) -> None:
    build(name, dtype=torch.float32).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"_attn_implementation": asked} if asked else settings))
    config: Any = load(Checkpoint.open(tmp_path), device="cpu", attention="fast").module.config
    assert config._attn_implementation == attention


def test_true_float64(record_property: Recorder) -> None:
    """Where no step is taken in float32, measured and not assumed, the tolerances are the strict ones."""
    found = audit(prepare(build("gpt2")))
    assert found.rows[0].tolerance == 1e-9
    check(found, record_property, 1e-9, 1e-7)
