"""A quick lab from end to end: layout, reuse, resumption, refusal."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from interference.errors import InputError
from interference.forecast_run.config import load_config
from paper_repro.lab.__main__ import app
from paper_repro.lab.build import build
from paper_repro.lab.config import LabConfig, quick
from paper_repro.lab.data import sft_pairs
from paper_repro.lab.domains import DOMAINS, vocabulary
from paper_repro.lab.model import FAMILIES, make_model, make_tokenizer

TINY = quick(
    hidden=16, heads=2, train_prompts=24, heldout_prompts=12, sft_steps=12, sft_responses=4, rollouts=4,
    rl_batch=8, rl_generations=4, rl_steps=dict.fromkeys(DOMAINS, 2),
)  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lab") / "world"
    build(out, TINY)
    return out


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_layout(lab: Path) -> None:
    assert not list(lab.rglob("*.part"))
    for domain in DOMAINS:
        heldout, reference, rollouts = (
            rows(lab / "data" / f"{domain}_{kind}.jsonl") for kind in ("heldout", "reference", "rollouts")
        )
        ids = [row["prompt_id"] for row in heldout]
        assert len(set(ids)) == TINY.heldout_prompts
        assert [row["prompt_id"] for row in reference] == ids
        assert [row["prompt_id"] for row in rollouts] == [i for i in ids for _ in range(TINY.rollouts)]
        assert {"reward", "prompt_token_ids", "response_token_ids", "eos", "response"} <= rollouts[0].keys()
        assert {row["prompt"] for row in rows(lab / "data" / f"{domain}_train.jsonl")}.isdisjoint(
            row["prompt"] for row in heldout
        )


def test_checkpoints_load_and_differ(lab: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(lab / "base").state_dict()
    tokenizer = AutoTokenizer.from_pretrained(lab / "base")
    assert tokenizer("answer 7 .")["input_ids"] == make_tokenizer(vocabulary())("answer 7 .")["input_ids"]
    for domain in DOMAINS:
        tuned = AutoModelForCausalLM.from_pretrained(lab / f"rl_{domain}").state_dict()
        assert tuned.keys() == base.keys()
        assert all(tensor.dtype == torch.float32 for tensor in tuned.values())
        assert AutoTokenizer.from_pretrained(lab / f"rl_{domain}").get_vocab() == tokenizer.get_vocab()


def test_run_file_points_at_files_that_exist(lab: Path) -> None:
    run = yaml.safe_load((lab / "diagnose.yaml").read_text())
    assert [entry["name"] for entry in run["models"]] == list(DOMAINS)
    paths = [run["base_model"], *(entry["model"] for entry in run["models"])]
    for domain in run["domains"]:
        paths += [*domain["data"].values(), domain["prompts"]]
    assert all((lab / path).exists() for path in paths)


def test_the_forecast_is_of_the_trainings_of_the_lab(lab: Path) -> None:
    asked = load_config(lab / "forecast.yaml")
    assert {d.name: asked.planned(d.name).steps for d in asked.domains} == TINY.rl_steps
    assert all(Path(d.data or "").is_file() for d in asked.domains)
    training = asked.planned("math")
    assert training.rollouts_per_step == TINY.rl_batch
    assert training.learning_rate == TINY.rl_learning_rate


def test_finished_stages_are_reused_and_a_lost_one_is_made_again_alike(lab: Path) -> None:
    weights = lab / "base" / "model.safetensors"
    before = {path: path.stat().st_mtime_ns for path in lab.rglob("*") if path.is_file()}
    again = build(lab, TINY)
    assert again.spent < 2.0
    assert {path: path.stat().st_mtime_ns for path in lab.rglob("*") if path.is_file()} == before

    rollouts, content = lab / "data" / "qa_rollouts.jsonl", weights.read_bytes()
    text = rollouts.read_text()
    for stage in ("base", "rollouts_qa"):
        (lab / "stages" / f"{stage}.json").unlink()  # as an interruption just before the record would leave it
    (lab / "base.part").mkdir()
    torch.manual_seed(123)  # the global state must not matter
    build(lab, TINY)
    assert weights.read_bytes() == content
    assert rollouts.read_text() == text
    assert not (lab / "base.part").exists()


def test_other_settings_are_refused(lab: Path) -> None:
    with pytest.raises(InputError, match="seed 1"):
        build(lab, TINY.model_copy(update={"seed": 1}))


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not a lab"):
        build(tmp_path, TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_command_line_refuses_with_exit_code_2(lab: Path) -> None:
    result = CliRunner().invoke(app, ["build", "--out", str(lab), "--seed", "5"])
    assert result.exit_code == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    model = make_model(family, 20, hidden=16, layers=1, heads=2, seed=0)
    assert model.config.model_type == family
    assert model(input_ids=torch.tensor([[3, 4, 5]])).logits.shape == (1, 3, 20)
    other = make_model(family, 20, hidden=16, layers=1, heads=2, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_unknown_family_and_unknown_setting() -> None:
    with pytest.raises(InputError, match="llama"):
        make_model("lama", 20, hidden=16, layers=1, heads=2, seed=0)
    with pytest.raises(ValueError, match="sft_step"):
        LabConfig.model_validate({"sft_step": 3})


BEFORE = {
    "code_heldout": "c9fe7a1012e34609",
    "code_reference": "973fb916359f3b1c",
    "code_train": "97ff2e02747e40b9",
    "math_heldout": "4623f668d8503e33",
    "math_reference": "75c7e73899c0d228",
    "math_train": "571f694ac144a1a0",
    "qa_heldout": "f2ca156974c93d47",
    "qa_reference": "6291c276f921aa5d",
    "qa_train": "dda13b2cbcbb55e5",
    "writing_heldout": "527874c8444beb28",
    "writing_reference": "f364600bf3b9ec2a",
    "writing_train": "756c4011c65af565",
}
"""SHA-256 of the data of TINY before there was a second world."""


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def test_the_first_world_is_what_it_was_before_there_was_a_second(lab: Path) -> None:
    assert {name: digest((lab / "data" / f"{name}.jsonl").read_bytes()) for name in BEFORE} == BEFORE
    assert digest(json.dumps(sft_pairs(TINY)).encode()) == "46cb1ff87ee96606"  # of these the base's weights are made
    assert yaml.safe_load((lab / "diagnose.yaml").read_text())["output"] == "../demo"
    assert not (lab / "probe.yaml").exists()


def test_a_lab_from_before_there_was_a_second_world_goes_on(lab: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(lab, old)
    since = ("version", "world", "steps", "judge_share", "planted", "multi", "multi_steps")
    settings = {key: value for key, value in json.loads((old / "lab.json").read_text()).items() if key not in since}
    (old / "lab.json").write_text(json.dumps({"world": 1, **settings}))
    before = (old / "lab.json").read_text()
    assert build(old, TINY).spent < 2.0
    assert (old / "lab.json").read_text() == before
    with pytest.raises(InputError, match=r"world m2rl \(there lpt\)"):
        build(old, LabConfig(world="m2rl"))
    (old / "lab.json").write_text(json.dumps({"world": 2, **settings}))
    with pytest.raises(InputError, match=r"version 1 \(there 2\)"):
        build(old, TINY)
