"""Shared fixtures. Tests run on one thread, so that results do not depend on the machine's load."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from tiny import perturbed, qwen3, rows, save, write_jsonl

from interference.model import Model, prepare

torch.set_num_threads(1)


@pytest.fixture
def toy() -> Model:
    """The float64 toy transformer as a Model."""
    from toy import ToyTransformer

    return prepare(ToyTransformer.seeded(0))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, rl_a/, rl_b/ tiny checkpoints, a.jsonl, b.jsonl with rewards, a_prompts.jsonl, b_prompts.jsonl."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save(qwen3(0), folder / "base")
    for i, name in enumerate("ab"):
        save(perturbed(i + 1), folder / f"rl_{name}")
        write_jsonl(folder / f"{name}.jsonl", rows(i))
        write_jsonl(folder / f"{name}_prompts.jsonl", rows(i, responses=1, rewards=False))
    (folder / "verifiers_for_tests.py").write_text(
        "def odd(prompts, completions, **columns):\n    return [float(len(c.split()) % 2) for c in completions]\n"
    )
    return folder


@pytest.fixture
def request_yaml(checkpoints: Path) -> dict[str, object]:
    """A RUN.yaml for `checkpoints` as a dictionary; relative paths, so it must be written into that folder."""
    return {
        "base_model": "base",
        "models": [{"name": n, "model": f"rl_{n}"} for n in "ab"],
        "domains": [
            {"name": n, "data": f"{n}.jsonl", "prompts": f"{n}_prompts.jsonl", "verifier": "verifiers_for_tests:odd"}
            for n in "ab"
        ],
        "objective": ["nll", "reward"],
        "sampling": {"samples": 4, "max_new_tokens": 6},
        "alphas": [0.5, 1.0],
    }


@pytest.fixture(scope="session")
def demo_run(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished diagnosis of the tiny checkpoints, made by the library itself."""
    from interference.config import RunConfig
    from interference.diagnose import diagnose

    output = tmp_path_factory.mktemp("runs") / "demo"
    here = str(checkpoints)
    config = RunConfig.model_validate(
        {
            "base_model": f"{here}/base",
            "models": [{"name": n, "model": f"{here}/rl_{n}"} for n in "ab"],
            "domains": [
                {
                    "name": n,
                    "data": f"{here}/{n}.jsonl",
                    "prompts": f"{here}/{n}_prompts.jsonl",
                    "verifier": "verifiers_for_tests:odd",
                }
                for n in "ab"
            ],
            "objective": ["nll", "reward"],
            "sampling": {"samples": 4, "max_new_tokens": 6},
            "output": str(output),
        }
    )
    return diagnose(config, search_path=[checkpoints])
