"""A quick lab of world "m2rl": layout, the models made of models, and its requests as the commands read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from interference.config import load_config as load_diagnose
from interference.probes.judge import read_template
from interference.probes.trajectories import read_trajectories
from interference.probing.config import load_config
from interference.probing.inputs import open_inputs
from interference.rollouts import Verifier
from paper_repro.lab import reinforce
from paper_repro.lab.__main__ import app
from paper_repro.lab.build import build
from paper_repro.lab.config import LabConfig, quick
from paper_repro.lab.judging import TEMPLATES
from paper_repro.lab.m2rl import DOMAINS, REASONING

TINY = quick(
    world="m2rl", hidden=16, heads=2, train_prompts=24, heldout_prompts=12, sft_steps=12, sft_responses=4, rollouts=4,
    rl_batch=8, rl_generations=4, rl_steps=dict.fromkeys(DOMAINS, 2), rl_learning_rate=1e-3, planted=8,
)  # fmt: skip


def grpo_rewarding_any(*args: Any, reward: Verifier, **settings: Any) -> reinforce.Trained:
    """GRPO on another reward, since a model of this size is never right and would not move; the true one is called too."""

    def parity(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        assert set(reward(prompts=prompts, completions=completions, **columns)) <= {0.0, 0.5, 1.0}
        return [float(len(completion.split()) % 2) for completion in completions]

    return reinforce.grpo(*args, reward=parity, **settings)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lab") / "world"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(reinforce.ALGORITHMS, "grpo", grpo_rewarding_any)
        build(out, TINY)
    return out


def weights(lab: Path, name: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(lab / name).state_dict()
    return found


def test_layout(lab: Path) -> None:
    assert not list(lab.rglob("*.part"))
    for domain in DOMAINS:
        planted = lab / "data" / f"{domain}_planted.jsonl"
        assert planted.exists() == (domain in REASONING)
        if domain in REASONING:
            found = read_trajectories(planted)
            assert len(found) == TINY.planted
            assert all(t.reward == 0.0 and t.error_step for t in found)
    for mode in ("outcome", "process"):
        assert read_template(lab / "data" / f"judge_{mode}.txt", mode) == TEMPLATES[mode]  # type: ignore[arg-type]


def test_merged_models_are_the_base_with_the_mean_and_the_sum_of_the_updates(lab: Path) -> None:
    base, experts = weights(lab, "base"), [weights(lab, f"rl_{domain}") for domain in DOMAINS]
    for how, scale in (("average", 0.25), ("sum", 1.0)):
        merged = weights(lab, f"merged_{how}")
        assert merged.keys() == base.keys()
        for name, tensor in merged.items():
            updates = torch.stack([expert[name].double() - base[name].double() for expert in experts])
            expected = base[name].double() + scale * updates.sum(0)
            torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)
    moved = [sum(float((m[k] - base[k]).norm()) for k in base) for m in (*experts, weights(lab, "rl_multi"))]
    assert min(moved) > 1e-3


def test_every_model_has_the_tokenizer_and_room_for_the_longest_sequence(lab: Path) -> None:
    vocabulary = AutoTokenizer.from_pretrained(lab / "base").get_vocab()
    for name in ("rl_math", "rl_multi", "merged_average", "merged_sum"):
        assert AutoTokenizer.from_pretrained(lab / name).get_vocab() == vocabulary
        assert AutoModelForCausalLM.from_pretrained(lab / name).config.max_position_embeddings == 64


def test_the_requests_are_ones_that_the_commands_accept(lab: Path) -> None:
    request = load_config(lab / "probe.yaml")
    assert request.kinds == {
        "base": "base", **dict.fromkeys(DOMAINS, "expert"), "multi": "multi", "merged_average": "merged",
        "merged_sum": "merged",
    }  # fmt: skip
    opened = open_inputs(request, [])
    assert opened.judgment is not None
    for template in opened.judgment.templates.values():
        asked = template.encode(opened.tokenizer, read_trajectories(lab / "data" / "math_planted.jsonl"))
        assert all(opened.tokenizer.unk_token_id not in ids for ids in asked)
    assert [domain.name for domain in load_diagnose(lab / "diagnose.yaml").domains] == list(DOMAINS)


def test_mixed_training_saw_rewards(lab: Path) -> None:
    record = json.loads((lab / "stages" / "rl_multi.json").read_text())
    assert len(record["training_rewards"]) == TINY.mixed_steps == 6
    assert TINY.model_copy(update={"multi_steps": 7}).mixed_steps == 7


def test_settings_suit_the_world_unless_they_are_given() -> None:
    assert LabConfig().model_dump().items() >= {"world": "lpt", "multi": False, "max_new_tokens": 12}.items()
    long = LabConfig(world="m2rl", steps=21)
    assert (long.multi, list(long.wrong), long.max_new_tokens) == (True, list(DOMAINS), 135)
    assert LabConfig(world="m2rl", max_new_tokens=50, multi=False).max_new_tokens == 50
    with pytest.raises(ValueError, match="m3rl"):
        LabConfig.model_validate({"world": "m3rl"})


def test_command_line_names_the_world(lab: Path, tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["build", "--out", str(lab), "--world", "lpt", "--quick"]).exit_code == 2
    assert CliRunner().invoke(app, ["build", "--out", str(tmp_path / "x"), "--world", "m3rl"]).exit_code == 2
    assert not (tmp_path / "x").exists()
