"""`interference diagnose` and `report` as a user runs them: results, resumption, and every bad input."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny import perturbed, qwen3, rows, save, write_jsonl
from typer.testing import CliRunner

from interference.cli import app
from interference.config import load_config
from interference.diagnose import diagnose
from interference.errors import InputError
from interference.inputs import Prompts
from interference.records import Run, Workspace

METRICS = {"spearman", "pearson", "sign_accuracy", "slope", "r2", "coverage", "coverage_truncation"}
PREDICTORS = {
    "third_order", "second_order", "second_order_ggn", "first_order", "update_norm", "update_cosine", "gradient_cosine", "kl",
}  # fmt: skip


def write(folder: Path, request: dict[str, Any], name: str = "run.yaml") -> Path:
    file = folder / name
    file.write_text(yaml.safe_dump(request))
    return file


def test_records_hold_what_the_readme_promises(demo_run: Path) -> None:
    run = Run.open(demo_run)
    for objective in ("nll", "reward"):
        for where in ("all", "off_diagonal"):
            card = run.results["scorecards"][objective][where]
            assert set(card) == PREDICTORS
            assert all(set(row) >= METRICS for row in card.values())
    cells = run.cells()
    assert len(cells) == 8
    wanted = [
        "predicted_first",
        "predicted_second",
        "predicted_second_ggn",
        "stderr",
        "measured",
        "measured_stderr",
        "low",
        "high",
    ]
    assert np.isfinite(cells[wanted].to_numpy(float)).all()
    assert cells["own"].sum() == 4
    wanted = ["third", "third_stderr", "truncation", "truncation_misfit", "predicted_third", "low_total", "high_total"]
    assert np.isfinite(cells[wanted].to_numpy(float)).all()
    assert (cells["low_total"] <= cells["low"]).all()
    assert (cells["high_total"] >= cells["high"]).all()
    assert cells["radius"].notna().eq(cells["radius_reason"].isin(["left", "held"])).all()
    assert set(run.curves()["alpha"]) == {0.25, 0.5, 0.75, 1.0, 1.5}
    assert run.manifest["status"] == "finished"
    assert run.manifest["engine"] == "taylor"
    assert (demo_run / "report.html").stat().st_size > 10_000
    again = load_config(demo_run / "config.yaml")
    assert again.output == str(demo_run)
    assert not list(demo_run.rglob("*.part"))


def test_cells_agree_with_the_library_calls(demo_run: Path, checkpoints: Path) -> None:
    from interference import Checkpoint, Domain, Update, expand, measure

    base = Checkpoint.open(checkpoints / "base")
    updates = {n: Update.between(base, Checkpoint.open(checkpoints / f"rl_{n}")) for n in "ab"}
    domains = {n: Domain.from_jsonl(checkpoints / f"{n}.jsonl", tokenizer=base.tokenizer()) for n in "ab"}
    cells = Run.open(demo_run).cells().set_index(["objective", "update", "domain"])
    for objective in ("nll", "reward"):
        models = expand(base, updates, domains, objective=objective)
        for u in "ab":
            predicted = models["a"].predict({u: 1.0})
            assert cells.loc[(objective, u, "a"), "predicted_second"] == pytest.approx(
                predicted.value, rel=1e-4, abs=1e-7
            )
            assert cells.loc[(objective, u, "a"), "stderr"] == pytest.approx(predicted.stderr, rel=1e-4)
    measured = measure(base, updates, domains).set_index(["update", "domain"])
    for u, d in (("a", "b"), ("b", "a")):
        assert cells.loc[("nll", u, d), "measured"] == pytest.approx(measured.loc[(u, d), "delta"], rel=1e-6)


def test_without_a_small_alpha_nothing_is_predicted_to_be_left_out_and_it_is_said(
    checkpoints: Path, request_yaml: dict[str, Any], tmp_path: Path
) -> None:
    request = request_yaml | {"output": str(tmp_path / "r"), "objective": "nll", "alphas": [0.75, 1.0]}
    run = Run.open(diagnose(load_config(write(checkpoints, request)), search_path=[checkpoints]))
    assert run.cells()[["truncation", "predicted_third", "low_total"]].isna().all(axis=None)
    assert "third_order" not in run.results["scorecards"]["nll"]["all"]
    assert any("add 0.25 and 0.5 to `alphas`" in note for note in run.results["notes"])


def test_the_same_request_is_reused_and_another_one_refused(
    checkpoints: Path, request_yaml: dict[str, Any], tmp_path: Path
) -> None:
    request_yaml |= {"output": str(tmp_path / "run"), "objective": "nll"}
    file = write(checkpoints, request_yaml)
    said: list[str] = []
    folder = diagnose(load_config(file), search_path=[checkpoints], say=said.append)
    stamp = (folder / "results.json").stat().st_mtime_ns
    diagnose(load_config(file), search_path=[checkpoints], say=said.append)
    assert said[-1] == "already finished"
    assert (folder / "results.json").stat().st_mtime_ns == stamp
    other = write(checkpoints, request_yaml | {"seed": 1})
    with pytest.raises(InputError, match="holds another run"):
        diagnose(load_config(other), search_path=[checkpoints])
    diagnose(load_config(other), search_path=[checkpoints], overwrite=True)
    assert Run.open(folder).manifest["seed"] == 1


def test_killed_at_any_moment_it_resumes_to_the_same_result(
    checkpoints: Path, request_yaml: dict[str, Any], tmp_path: Path
) -> None:
    whole = write(checkpoints, request_yaml | {"output": str(tmp_path / "whole")}, "whole.yaml")
    broken = write(checkpoints, request_yaml | {"output": str(tmp_path / "broken")}, "broken.yaml")
    command = [sys.executable, "-m", "interference.cli", "diagnose"]
    diagnose(load_config(whole), search_path=[checkpoints])
    part = tmp_path / "broken.part"
    kills = 0
    for wanted in (1, 4, 7):  # kill when so many stages have left their files
        process = subprocess.Popen([*command, str(broken)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and len([p for p in part.rglob("*") if p.is_file()]) <= wanted:
            time.sleep(0.005)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills == 3
    assert part.is_dir()
    assert not (tmp_path / "broken").exists()
    done = subprocess.run([*command, str(broken)], capture_output=True, text=True, check=True)
    assert "resuming" in done.stderr
    assert done.stdout.strip() == str(tmp_path / "broken" / "report.html")
    assert not part.exists()
    texts = [(tmp_path / n / "results.json").read_text() for n in ("whole", "broken")]
    assert texts[0] == texts[1]


def test_rewards_follow_the_verifiers_code(checkpoints: Path, request_yaml: dict[str, Any], tmp_path: Path) -> None:
    """A verifier that is mended after an interruption rewards everything again; the sampling is kept."""
    code = tmp_path / "verifiers_that_change.py"
    text = "def f(prompts, completions, **columns):\n    return [{} * (len(c.split()) % 2) for c in completions]\n"
    code.write_text(text.format("1.0"))
    domains = [d | {"verifier": "verifiers_that_change:f"} for d in request_yaml["domains"]]
    request = request_yaml | {"domains": domains, "objective": "reward", "output": str(tmp_path / "run")}
    file = write(checkpoints, request)
    command = [sys.executable, "-m", "interference.cli", "diagnose", str(file)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = tmp_path / "run.part" / "rollouts" / "a" / "a.jsonl"
    while process.poll() is None and not first.is_file():
        time.sleep(0.005)
    process.kill()
    process.wait()
    sampled = [json.loads(line)["response"] for line in first.read_text().splitlines()]
    code.write_text(text.format("2.0"))
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    rewarded = [json.loads(line) for line in (tmp_path / "run" / "rollouts" / "a" / "a.jsonl").read_text().splitlines()]
    assert [row["response"] for row in rewarded] == sampled
    assert {row["reward"] for row in rewarded} == {0.0, 2.0}
    base = [json.loads(line)["reward"] for line in (tmp_path / "run" / "rollouts" / "a" / "base.jsonl").open()]
    cells = Run.open(tmp_path / "run").cells().query("domain == 'a'")
    assert cells["before"].tolist() == pytest.approx([sum(base) / len(base)] * 2)
    code.write_text(text.format("3.0"))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "holds another run" in done.stderr


def test_chats_reach_the_verifier_as_trl_passes_them(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def verifier(prompts: list[Any], completions: list[Any], **columns: list[Any]) -> list[float]:
        seen.update(prompts=prompts, completions=completions, columns=columns)
        return [float(c[0]["content"] == a) for c, a in zip(completions, columns["answer"], strict=True)]

    chat = [{"role": "user", "content": "w1"}]
    prompts = Prompts([(3,)], ["w1"], [chat], ["p"], {"answer": ["w2"]}, verifier)
    assert prompts.rewards([0, 0], ["w2", "w3"]) == [1.0, 0.0]
    assert seen["prompts"] == [chat, chat]
    assert seen["completions"][1] == [{"role": "assistant", "content": "w3"}]


def test_replacing_a_run_touches_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "run.old").mkdir()
    (tmp_path / "run.old" / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        space = Workspace(tmp_path / "run", {"a": overwrite}, {"a": overwrite}, overwrite)
        assert not space.finished()
        assert not space.begin()
        space.describe({})
        space.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.old"]
    assert (tmp_path / "run.old" / "notes.txt").read_text() == "mine"


def test_an_unfinished_run_of_other_inputs_is_not_resumed(
    tmp_path: Path, request_yaml: dict[str, Any], checkpoints: Path
) -> None:
    part = tmp_path / "run.part"
    part.mkdir()
    (part / "stages.json").write_text('{"digest": "another"}')
    file = write(checkpoints, request_yaml | {"output": str(tmp_path / "run"), "objective": "nll"})
    with pytest.raises(InputError, match="unfinished run of another configuration"):
        diagnose(load_config(file), search_path=[checkpoints])


def test_given_measurements_replace_sampling_and_predictors_may_not_measure(
    checkpoints: Path, request_yaml: dict[str, Any], tmp_path: Path
) -> None:
    for model in ("base", "a", "b"):
        for i, d in enumerate("ab"):
            write_jsonl(tmp_path / f"{model}-{d}.jsonl", rows(i, responses=4 if model == "base" else 5))
    measurements = [
        {"model": m, "domain": d, "data": str(tmp_path / f"{m}-{d}.jsonl")} for m in ("base", "a", "b") for d in "ab"
    ]
    domains = [{"name": n, "data": f"{n}.jsonl"} for n in "ab"]
    request = request_yaml | {
        "domains": domains,
        "measurements": measurements,
        "objective": "reward",
        "output": str(tmp_path / "r"),
    }
    folder = diagnose(load_config(write(checkpoints, request)), search_path=[checkpoints])
    assert Run.open(folder).cells()["measured"].notna().all()
    write_jsonl(tmp_path / "cheat.jsonl", rows(0)[::-1])
    cheat = [{"model": "base", "domain": "a", "data": str(tmp_path / "cheat.jsonl")}]
    file = write(checkpoints, request | {"measurements": cheat, "output": str(tmp_path / "s")})
    with pytest.raises(InputError, match="must not come from what predicts"):
        diagnose(load_config(file), search_path=[checkpoints])


def test_without_rollouts_reward_is_predicted_and_not_called_measured(
    checkpoints: Path, request_yaml: dict[str, Any], tmp_path: Path
) -> None:
    request = request_yaml | {
        "domains": [{"name": "a", "data": "a.jsonl"}],
        "objective": "reward",
        "output": str(tmp_path / "r"),
    }
    run = Run.open(diagnose(load_config(write(checkpoints, request)), search_path=[checkpoints]))
    assert run.cells()["measured"].isna().all()
    assert np.isfinite(run.cells()[["predicted_second", "estimate", "ess"]].to_numpy(float)).all()
    assert run.results["scorecards"] == {}
    assert any("was not measured" in note for note in run.results["notes"])


def change(**values: Any) -> Callable[[Path, dict[str, Any]], None]:
    return lambda folder, request: request.update(values)


def remove_shard(folder: Path, request: dict[str, Any]) -> None:
    save(perturbed(1), folder / "sharded", max_shard_size="4KB")
    sorted((folder / "sharded").glob("model-*.safetensors"))[0].unlink()
    request["models"][0]["model"] = "sharded"


def truncate(folder: Path, request: dict[str, Any]) -> None:
    file = folder / "rl_a" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def shapes(folder: Path, request: dict[str, Any]) -> None:
    shutil.rmtree(folder / "rl_a")
    save(qwen3(0, intermediate_size=40), folder / "rl_a")


def vocabulary(folder: Path, request: dict[str, Any]) -> None:
    shutil.rmtree(folder / "rl_a")
    save(qwen3(0, vocab_size=40), folder / "rl_a")


def identical(folder: Path, request: dict[str, Any]) -> None:
    request["models"][0]["model"] = "base"


def nan(folder: Path, request: dict[str, Any]) -> None:
    model = perturbed(1)
    model.model.norm.weight.data[3] = float("nan")
    save(model, folder / "rl_a")


def empty(folder: Path, request: dict[str, Any]) -> None:
    (folder / "a.jsonl").write_text("")


def broken_row(folder: Path, request: dict[str, Any]) -> None:
    lines = (folder / "a.jsonl").read_text().splitlines()
    lines[4] = lines[4][:-5]
    (folder / "a.jsonl").write_text("\n".join(lines))


def flat(folder: Path, request: dict[str, Any]) -> None:
    write_jsonl(folder / "a.jsonl", [r | {"reward": 0.0} for r in rows(0)])


def no_rewards(folder: Path, request: dict[str, Any]) -> None:
    write_jsonl(folder / "a.jsonl", rows(0, rewards=False))


def bad_verifier(folder: Path, request: dict[str, Any]) -> None:
    request["domains"][0]["verifier"] = "verifiers_for_tests:even"


def raising_verifier(folder: Path, request: dict[str, Any]) -> None:
    (folder / "verifiers_that_raise.py").write_text(
        "def f(prompts, completions, **columns):\n    raise KeyError('boom')\n"
    )
    request["domains"][0]["verifier"] = "verifiers_that_raise:f"


def broken_verifier(folder: Path, request: dict[str, Any]) -> None:
    (folder / "verifiers_with_a_typo.py").write_text("def f(:\n")
    request["domains"][0]["verifier"] = "verifiers_with_a_typo:f"


def output_in_a_file(folder: Path, request: dict[str, Any]) -> None:
    request["output"] = str(folder / "a.jsonl" / "run")


def twice(folder: Path, request: dict[str, Any]) -> None:
    request["measurements"] = [{"model": "base", "domain": "a", "data": "a.jsonl"}] * 2


def nested_key(folder: Path, request: dict[str, Any]) -> None:
    request["domains"][0]["verifer"] = request["domains"][0].pop("verifier")


BAD: list[tuple[Callable[[Path, dict[str, Any]], None], str]] = [
    (change(base_model="no/such/model"), "no/such/model"),
    (truncate, "truncated or damaged"),
    (remove_shard, "without shard"),
    (shapes, "of shape"),
    (vocabulary, "vocabularies of 27 (base) and 40"),
    (empty, "a.jsonl, which is empty"),
    (broken_row, "row 5"),
    (change(objectve="nll"), "did you mean 'objective'?"),
    (nested_key, "did you mean 'verifier'?"),
    (flat, "every reward equal to 0"),
    (no_rewards, "without a reward"),
    (identical, "all identical"),
    (nan, "NaN or infinite weights in model.norm.weight"),
    (bad_verifier, "even"),
    (change(objective="rewards"), "rewards"),
    (change(device="tpu0"), "device 'tpu0'"),
    (change(limit=0), "limit"),
    (change(domains=[]), "domains"),
    (change(sampling={"temperature": 0.7}), "temperature 1"),
    (change(sampling={"max_new_tokens": 64}), "at most 64 tokens, the model's context"),
    (change(alphas=[float("nan")]), "alphas"),
    (raising_verifier, "raises KeyError"),
    (broken_verifier, "raises SyntaxError"),
    (output_in_a_file, "nothing can be written"),
    (twice, "one file for each model and domain"),
    (change(models=[{"name": "a" * 300, "model": "rl_a"}]), "80 characters"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_one_clear_error_and_nothing_is_written(
    checkpoints: Path, request_yaml: dict[str, Any], tmp_path: Path, spoil: Callable[..., None], message: str
) -> None:
    folder = tmp_path / "inputs"
    shutil.copytree(checkpoints, folder)
    request: dict[str, Any] = json.loads(json.dumps(request_yaml)) | {"output": str(tmp_path / "run")}
    spoil(folder, request)
    with pytest.raises(InputError) as caught:
        diagnose(load_config(write(folder, request)), search_path=[folder])
    assert message in str(caught.value)
    assert "Remedy: " in str(caught.value)
    assert not list(tmp_path.glob("run*"))


def test_the_command_line_exits_with_code_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "interference.cli", "diagnose", str(tmp_path / "missing.yaml")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "missing.yaml" in done.stderr
    assert "Traceback" not in done.stderr


def test_report_is_drawn_again_from_records(demo_run: Path) -> None:
    (demo_run / "report.html").unlink()
    done = CliRunner().invoke(app, ["report", str(demo_run)])
    assert done.exit_code == 0
    assert done.stdout.strip() == str(demo_run / "report.html")
    assert (demo_run / "report.html").is_file()


def test_report_of_something_else_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert isinstance(done.exception, InputError)
    assert "finished run" in str(done.exception)
