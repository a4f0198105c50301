"""`interference probe` as a user runs it: results, resumption, given rollouts, and every bad input."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from test_adapters import adapted
from tiny import perturbed, qwen3, rows, save, tokenizer, write_jsonl
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from typer.testing import CliRunner

from interference.checkpoint import Checkpoint
from interference.cli import app
from interference.domain import Domain
from interference.errors import InputError
from interference.model import load
from interference.probes.log_probabilities import state_divergences
from interference.probes.trajectories import answer_extractor, read_trajectories
from interference.probing import stages
from interference.probing.config import ProbeConfig, load_config
from interference.probing.inputs import open_inputs
from interference.probing.run import probe
from interference.records import PROBES, Run
from interference.report import write_report

Request = dict[str, Any]
JUDGE = {"yes": ["w1", "w2"], "no": ["w3"], "answer": "whole"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base; two experts; a multi-task model, which moves as both do; and a "merged" one that is the base itself."""
    folder = tmp_path_factory.mktemp("probe")
    save(qwen3(0), folder / "base")
    for name, seed in (("a", 1), ("b", 2), ("mix", 3)):
        save(perturbed(seed, 0.1), folder / name)
    save(qwen3(0), folder / "same")
    for i, name in enumerate("ab"):
        write_jsonl(folder / f"{name}.jsonl", rows(i, prompts=6, responses=1, rewards=False))
    (folder / "verifier_of_probes.py").write_text(
        "def odd(prompts, completions, **columns):\n    return [float(len(c.split()) % 2) for c in completions]\n"
    )
    return folder


def request(**changes: Any) -> Request:
    return {
        "base_model": "base",
        "models": [
            {"name": "a", "model": "a", "kind": "expert"},
            {"name": "b", "model": "b", "kind": "expert"},
            {"name": "mix", "model": "mix", "kind": "multi"},
            {"name": "null", "model": "same", "kind": "merged"},
        ],
        "domains": [{"name": d, "prompts": f"{d}.jsonl", "verifier": "verifier_of_probes:odd"} for d in "ab"],
        "sampling": {"samples": 4, "max_new_tokens": 5, "batch_size": 16},
        "judge": JUDGE,
        "horizon": [0, 1],
    } | changes


def read(folder: Path, asked: Request, output: Path) -> ProbeConfig:
    file = folder / f"{output.name}.yaml"
    file.write_text(yaml.safe_dump(asked | {"output": str(output)}))
    return load_config(file)


@pytest.fixture(scope="module")
def made(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return probe(read(inputs, request(), tmp_path_factory.mktemp("runs") / "made"), search_path=[inputs])


def test_records_have_the_columns_that_are_declared(made: Path) -> None:
    run = Run.open(made)
    assert run.results["command"] == "probe"
    for name, columns in PROBES.items():
        table = run.probe(name)
        assert list(table.columns) == list(columns)
        # Nothing is located unless asked; half of a domain has one reward throughout.
        assert len(table) or name.startswith("locus") or name == "gradient_agreement", name
    assert not list(made.rglob("*.part"))
    assert not (made / "cache").exists()
    assert load_config(made / "config.yaml").output == str(made)
    with pytest.raises(InputError, match="did you mean 'gains'"):
        run.probe("gain")


def test_samples_are_rewarded_and_those_of_equal_models_are_their_own(made: Path) -> None:
    texts = {}
    for model in ("base", "a", "null"):
        found = [json.loads(line) for line in (made / "rollouts" / "a" / f"{model}.jsonl").read_text().splitlines()]
        assert len(found) == 24
        assert all(row["reward"] == len(row["response"].split()) % 2 for row in found)
        texts[model] = [row["response"] for row in found]
    assert texts["base"] != texts["null"]
    mean = Run.open(made).probe("performance").set_index(["model", "domain"]).loc[("a", "a"), "value"]
    assert mean == pytest.approx(np.mean([len(t.split()) % 2 for t in texts["a"]]))


def test_divergences_are_those_of_the_library_and_nothing_for_the_base_itself(made: Path, inputs: Path) -> None:
    kl = Run.open(made).probe("kl")
    keys = ["policy", "reference", "domain", "estimator", "per"]
    assert len(kl) == 5 * 4 * 2 * 3 * 2
    table = kl.set_index(keys)["value"]
    assert table.loc[("base", "null", "a", "exact", "token")] == pytest.approx(0, abs=1e-12)
    assert kl.loc[kl["estimator"].isin(["exact", "k3"]), "value"].min() > -1e-6
    a, mix = (load(Checkpoint.open(inputs / name), device="cpu") for name in ("a", "mix"))
    answers = Domain.from_jsonl(made / "rollouts" / "b" / "a.jsonl", tokenizer=tokenizer())
    exact = state_divergences(a, mix, answers)
    by_prompt: dict[str, list[float]] = {}
    for prompt, values in zip(answers.prompt_ids, exact, strict=True):
        by_prompt.setdefault(prompt, []).append(float(values.sum()))
    expected = np.mean([np.mean(v) for v in by_prompt.values()])
    assert table.loc[("a", "mix", "b", "exact", "sequence")] == pytest.approx(expected, rel=1e-4)
    assert expected > 0.01
    near = Run.open(made).probe("neighbors")
    assert set(zip(near["reference"], near["domain"], near["expert"], strict=True)) == {
        (r, *pair) for r in ("mix", "null") for pair in (("a", "b"), ("b", "a"))
    }
    assert near["change"].notna().all()


def test_skills_and_judges_stand_beside_their_nulls(made: Path) -> None:
    run = Run.open(made)
    gains = run.probe("gains")
    assert set(gains["role"]) == {"split", "expert", "other"}
    assert gains["null"].notna().all()
    assert not gains.loc[gains["model"] == "null", "beyond_null"].any()
    scores = run.probe("verification")
    assert set(zip(scores["model"], scores["mode"], strict=True)) == {
        (m, mode) for m in ("base", "a", "b", "mix", "null") for mode in ("outcome", "process")
    }
    known = scores[scores["metric"] == "accuracy"]
    assert known["chance"].notna().all()
    said = run.probe("verdicts").query("model == 'a' and domain == 'b' and mode == 'process'")
    agree = np.mean((said["yes"] == 1) == (said["reward"] == 1))
    row = known.query("model == 'a' and domain == 'b' and mode == 'process'").iloc[0]
    assert row["value"] == pytest.approx(agree)
    # All of a response at horizon 1: the judge of the process mode itself.
    far = run.probe("horizon").query("horizon == 1 and metric == 'auroc'").set_index(["model", "domain"])["value"]
    process = scores.query("mode == 'process' and metric == 'auroc'").set_index(["model", "domain"])["value"]
    np.testing.assert_allclose(far.sort_index(), process.sort_index(), atol=1e-12)
    changes = run.probe("verification_changes")
    assert set(changes["comparison"]) == {"model - base", "process - outcome"}
    one = changes.query("comparison == 'model - base' and model == 'a' and domain == 'b' and mode == 'process'")
    wanted = known.set_index(["model", "domain", "mode"])["value"]
    assert one.set_index("metric").loc["accuracy", "difference"] == pytest.approx(
        wanted["a", "b", "process"] - wanted["base", "b", "process"]
    )


def test_the_page_says_it(made: Path) -> None:
    text = (made / "report.html").read_text()
    ids = re.findall(r' id="([^"]+)"', text)
    assert {"summary", "performance", "neighborhoods", "skills", "verification", "horizon", "asked"} <= set(ids)
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)
    assert len(set(ids)) == len(ids)
    assert "<script" not in text
    assert not re.search(r"\b(nan|None|np\.float64)\b", re.sub(r"<[^>]+>", " ", text).replace("None.", ""))
    assert "interference probe" in text
    again = (made / "report.html").read_bytes()
    assert write_report(made).read_bytes() == again


class Counter:
    """Counts what is computed: sampled prompts, scored and judged sequences; interrupts when so many calls are done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.stop_at = math.inf
        from interference.probes import ledger, verdicts

        for module, name in (
            (stages, "token_log_probabilities"),
            (stages, "state_divergences"),
            (stages, "skills"),
            (ledger, "sample"),
            (verdicts, "log_odds"),
        ):
            monkeypatch.setattr(module, name, self.counting(name, getattr(module, name)))

    @staticmethod
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    def counting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            if len(self.calls) >= self.stop_at:
                raise KeyboardInterrupt
            if name != "log_odds" or args[1]:  # nothing is asked where all verdicts are known
                self.calls.append(name)
            return function(*args, **options)

        return counted


def test_interrupted_it_resumes_and_computes_nothing_twice(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(models=request()["models"][:3], limit=4)
    asked["sampling"] = asked["sampling"] | {"batch_size": 8}
    counter = Counter(monkeypatch)
    whole = probe(read(inputs, asked, tmp_path / "whole"), search_path=[inputs])
    every, counter.calls = sorted(counter.calls), []
    assert {name: every.count(name) for name in set(every)} == {
        "sample": 4 * 2 * 2, "token_log_probabilities": 4 * 4 * 2, "state_divergences": 4 * 3 * 2, "skills": 2,
        "log_odds": 4 * 2 * 3,
    }  # fmt: skip
    broken = read(inputs, asked, tmp_path / "broken")
    said: list[str] = []
    for stop in (3, 20, 60, 75, 90):
        counter.stop_at = stop
        with pytest.raises(KeyboardInterrupt):
            probe(broken, search_path=[inputs], say=said.append)
        assert not (tmp_path / "broken").exists()
    counter.stop_at = math.inf
    probe(broken, search_path=[inputs], say=said.append)
    assert sorted(counter.calls) == every
    assert said.count("resuming") == 5
    for name in PROBES:
        assert Run.open(whole).probe(name).equals(Run.open(tmp_path / "broken").probe(name)), name
    probe(broken, search_path=[inputs], say=said.append)
    assert said[-1] == "already finished"
    with pytest.raises(InputError, match="holds another run"):
        probe(read(inputs, asked | {"seed": 1}, tmp_path / "broken"), search_path=[inputs])


def test_rewards_follow_the_verifiers_code(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verifier that is mended after an interruption rewards everything again; what was sampled and judged is kept."""
    code = tmp_path / "verifier_that_changes.py"
    text = "def f(prompts, completions, **columns):\n    return [{} for c in completions]\n"
    asked = request(
        models=request()["models"][:1],
        domains=[{"name": "a", "prompts": "a.jsonl", "verifier": "verifier_that_changes:f"}],
        probes=["skills", "self_verification"],
    )
    config, counter = read(inputs, asked, tmp_path / "run"), Counter(monkeypatch)
    code.write_text(text.format("1.0 - len(c.split()) % 2"))
    monkeypatch.setattr("interference.report.write_report", Counter.stop)
    with pytest.raises(KeyboardInterrupt):
        probe(config, search_path=[tmp_path])
    monkeypatch.undo()
    code.write_text(text.format("float(len(c.split()) % 2)"))
    del sys.modules["verifier_that_changes"]
    counter = Counter(monkeypatch)
    found = Run.open(probe(config, search_path=[tmp_path]))
    assert counter.calls == ["skills"]
    fresh = Run.open(probe(read(inputs, asked, tmp_path / "fresh"), search_path=[tmp_path]))
    for name in PROBES:
        assert found.probe(name).equals(fresh.probe(name)), name


def given_rows(made: Path, model: str, domain: str) -> list[dict[str, Any]]:
    """Rollouts of the finished run as another server would have written them: text and rewards."""
    lines = (made / "rollouts" / domain / f"{model}.jsonl").read_text().splitlines()
    return [{k: row[k] for k in ("prompt", "prompt_id", "response", "reward", "eos")} for row in map(json.loads, lines)]


def test_from_rollouts_and_log_probabilities_alone_nothing_is_computed_with_weights(
    made: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["base", "a", "b", "mix"]
    drift = dict(zip(names, (0.0, 0.1, 0.2, 0.3), strict=True))
    for domain in "ab":
        every = []
        for model in names:
            for row in given_rows(made, model, domain):
                logps = {m: [-1.0 - abs(drift[m] - drift[model])] * 3 for m in names}
                every.append(row | {"model": model, "logps": logps})
        write_jsonl(tmp_path / f"{domain}.jsonl", every)
    monkeypatch.setattr(stages, "load", None)
    monkeypatch.setattr(stages, "sampled_responses", None)
    asked = request(
        models=[m | {"model": None} for m in request()["models"][:3]],
        domains=[{"name": d, "data": str(tmp_path / f"{d}.jsonl")} for d in "ab"],
        probes=["neighborhoods", "skills"],
    )
    run = Run.open(probe(read(inputs, asked, tmp_path / "run")))
    first = Run.open(made).probe("performance").set_index(["model", "domain"])["value"]
    again = run.probe("performance").set_index(["model", "domain"])["value"]
    assert again.to_dict() == first[again.index].to_dict()
    k1 = (
        run.probe("kl")
        .query("estimator == 'k1' and per == 'token' and domain == 'a'")
        .set_index(["policy", "reference"])
    )
    assert k1.loc[("a", "mix"), "value"] == pytest.approx(0.2)
    near = run.probe("neighbors").set_index(["domain", "expert"])
    assert bool(near.loc[("a", "b"), "neighbor"])  # b is 0.1 from mix, a itself 0.2
    assert not bool(near.loc[("b", "a"), "neighbor"])
    assert len(run.probe("verification")) == 0
    assert any("exact" in note for note in run.results["notes"])
    assert "judging itself" not in (run.path / "report.html").read_text()


def test_given_rollouts_are_judged_and_scored_like_sampled_ones(made: Path, inputs: Path, tmp_path: Path) -> None:
    """The text alone leads to the same verdicts and divergences as the token ids that were sampled."""
    files = []
    for model in ("base", "a"):
        path = write_jsonl(tmp_path / f"{model}.jsonl", given_rows(made, model, "a"))
        files.append({"model": model, "domain": "a", "data": str(path)})
    asked = request(
        models=request()["models"][:1],
        domains=[{"name": "a"}],
        rollouts=files,
        probes=["neighborhoods", "self_verification"],
    )
    run, first = Run.open(probe(read(inputs, asked, tmp_path / "run"))), Run.open(made)
    keys = ["policy", "reference", "estimator", "per"]
    known = first.probe("kl").query("domain == 'a'").set_index(keys)["value"]
    found = run.probe("kl").set_index(keys)["value"]
    assert len(found) == 2 * 3 * 2
    empty = any(not row["response"] for model in ("base", "a") for row in given_rows(made, model, "a"))
    if not empty:
        np.testing.assert_allclose(found, known[found.index], rtol=1e-4, atol=1e-6)
    keys = ["model", "mode", "metric"]
    known = first.probe("verification").query("domain == 'a'").set_index(keys)["value"]
    found = run.probe("verification").set_index(keys)["value"]
    np.testing.assert_allclose(found, known[found.index], rtol=1e-6)
    assert any("no neighbor relation" in note for note in run.results["notes"])


@pytest.mark.parametrize("shape", ["no rewards", "all correct", "one prompt"])
def test_runs_that_leave_much_unknown_have_a_page(inputs: Path, tmp_path: Path, shape: str) -> None:
    every = [
        {**row, "model": model, "reward": 1.0}
        for model in ("base", "a", "mix")
        for row in rows(0, prompts=1 if shape == "one prompt" else 4, responses=3)
    ]
    if shape == "no rewards":
        every = [{key: value for key, value in row.items() if key != "reward"} for row in every]
    write_jsonl(tmp_path / "given.jsonl", every)
    probes = ["neighborhoods"] if shape == "no rewards" else ["neighborhoods", "skills", "self_verification"]
    models = [m for m in request()["models"] if m["name"] in ("a", "mix")]
    asked = request(models=models, domains=[{"name": "a", "data": str(tmp_path / "given.jsonl")}], probes=probes)
    run = Run.open(probe(read(inputs, asked, tmp_path / "run")))
    text = re.sub(r"<[^>]+>", " ", (run.path / "report.html").read_text())
    assert not re.search(r"\bnan\b", text)
    assert len(run.probe("performance")) == (0 if shape == "no rewards" else 3)
    if shape == "all correct":
        assert "all 12 trajectories are correct" in text
    if shape == "one prompt":
        assert any("one prompt, so there are no error bars" in note for note in run.results["notes"])


def test_sampled_verdicts_and_a_template_of_ones_own(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("{prompt} {trajectory} w4")
    judge = {"modes": ["process"], "templates": {"process": str(tmp_path / "own.txt")}, "verdicts": "sampled"}
    judge |= {"samples": 3, "yes": [f"w{i}" for i in range(12)], "no": [f"w{i}" for i in range(12, 24)]}
    asked = request(
        models=request()["models"][:1], domains=request()["domains"][:1], probes=["self_verification"], judge=judge
    )
    run = Run.open(probe(read(inputs, asked, tmp_path / "run"), search_path=[inputs]))
    said = run.probe("verdicts")
    assert set(np.round(3 * said["yes"].dropna(), 6) % 1) <= {0.0, 0.5}
    assert set(run.probe("verification_changes")["comparison"]) == {"model - base"}
    assert set(run.probe("horizon")["horizon"]) == {0.0, 1.0}


def test_adapters_and_distributed_checkpoints_are_the_models_that_they_stand_for(inputs: Path, tmp_path: Path) -> None:
    base, adapter, delta = adapted(tmp_path / "peft", qwen3(0), target_modules=["q_proj", "down_proj"])
    merged = {name: tensor + delta.get(name, 0) for name, tensor in base}
    dcp.save({"model": {k: v.float() for k, v in merged.items()}}, storage_writer=FileSystemWriter(tmp_path / "dcp"))
    models = [{"name": "a", "model": str(adapter.path), "kind": "multi"}]
    models += [{"name": "b", "model": str(tmp_path / "dcp"), "kind": "multi"}]
    asked = request(base_model=str(base.path), models=models, probes=["neighborhoods"], dtype="float64")
    config = read(inputs, asked, tmp_path / "run")
    opened = open_inputs(config, [inputs])
    found = stages.Models(config, opened.base, opened.tuned, lambda _: None)
    for name in "ab":
        for key, value in found[name].parameters.items():
            torch.testing.assert_close(value, merged[key].double(), rtol=0, atol=1e-6)
    assert len({float(found[n].parameters["model.layers.0.mlp.down_proj.weight"].sum()) for n in ("base", "a")}) == 2
    assert list(found.held) == ["base", "a"]  # two at most


def test_chats_are_judged_by_their_messages(tmp_path: Path) -> None:
    words = tokenizer()
    words.chat_template = "{% for m in messages %}w5 {{ m['content'] }} {% endfor %}w6"
    for name, seed in (("base", 0), ("a", 1)):
        (qwen3(0) if name == "base" else perturbed(seed)).save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
    (tmp_path / "verifier_of_chats.py").write_text(
        "def f(prompts, completions, **columns):\n    return [float(len(c[0]['content']) % 2) for c in completions]\n"
    )
    prompts = [{"prompt_id": str(i), "messages": [{"role": "user", "content": f"w{i} w7"}]} for i in range(4)]
    write_jsonl(tmp_path / "chats.jsonl", prompts)
    asked = request(
        models=request()["models"][:1],
        domains=[{"name": "a", "prompts": "chats.jsonl", "verifier": "verifier_of_chats:f"}],
        probes=["self_verification"],
        judge=JUDGE | {"chat": True},
        horizon=[],
    )
    run = Run.open(probe(read(tmp_path, asked, tmp_path / "run"), search_path=[tmp_path]))
    found = read_trajectories(run.path / "rollouts" / "a" / "a.jsonl")
    assert [t.prompt_text for t in found[::4]] == [f"w{i} w7" for i in range(4)]
    row = json.loads((run.path / "rollouts" / "a" / "a.jsonl").read_text().splitlines()[0])
    assert words.decode(row["prompt_token_ids"]) == "w5 w0 w7 w6"
    assert run.results["templates"]["process"][0][0] == "user"
    assert len(run.probe("horizon")) == 0


def test_the_example_of_the_readme_is_a_request(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.DOTALL)
    (tmp_path / "run.yaml").write_text(next(b for b in blocks if "kind: expert" in b))
    config = load_config(tmp_path / "run.yaml")
    assert (config.experts, config.others) == (["math", "code"], ["mixed"])
    assert config.domains[1].data == str(tmp_path / "code_rollouts.jsonl")
    assert answer_extractor(config.judge.answer)(r"so \boxed{4}") == "4"


def change(**values: Any) -> Callable[[Path, Request], None]:
    return lambda folder, asked: asked.update(values)


def judging(**values: Any) -> Callable[[Path, Request], None]:
    return lambda folder, asked: asked.update(judge=JUDGE | values)


def given(spoil: Callable[[list[dict[str, Any]]], Any]) -> Callable[[Path, Request], None]:
    """All rollouts from one file, spoilt."""

    def do(folder: Path, asked: Request) -> None:
        every = [
            row | {"model": model}
            for model in ("base", "a", "b", "mix", "null")
            for row in rows(0, prompts=4, responses=3)
        ]
        asked["domains"][0] = {"name": "a", "data": "given.jsonl"}
        write_jsonl(folder / "given.jsonl", spoil(every) or every)

    return do


def one_template(folder: Path, asked: Request) -> None:
    (folder / "process.txt").write_text("{prompt} is it right?")
    asked["judge"] = JUDGE | {"templates": {"process": "process.txt"}}


def nested_key(folder: Path, asked: Request) -> None:
    asked["judge"] = JUDGE | {"mode": ["process"]}


def unknown_expert(folder: Path, asked: Request) -> None:
    asked["models"][0]["name"] = "aa"


def no_data(folder: Path, asked: Request) -> None:
    asked["domains"][0] = {"name": "a"}


def other_model(folder: Path, asked: Request) -> None:
    save(qwen3(0, intermediate_size=40), folder / "a")


def no_weights(folder: Path, asked: Request) -> None:
    del asked["models"][3]["model"]


def twice(folder: Path, asked: Request) -> None:
    given(lambda every: None)(folder, asked)
    asked["rollouts"] = [{"model": "a", "domain": "a", "data": "given.jsonl"}]


BAD: list[tuple[Callable[[Path, Request], None], str]] = [
    (change(probs=["skills"]), "did you mean 'probes'?"),
    (nested_key, "did you mean 'modes'?"),
    (change(probes=["skill"]), "probes.0: 'skill'"),
    (unknown_expert, "the expert 'aa' bears no domain's name (did you mean 'a'?)"),
    (
        change(rollouts=[{"model": "mixx", "domain": "a", "data": "a.jsonl"}]),
        "unknown model 'mixx' (did you mean 'mix'?)",
    ),
    (change(rollouts=[{"model": "mix", "domain": "c", "data": "a.jsonl"}]), "unknown domain 'c'"),
    (change(sampling={"samples": 1}), "sampling.samples: 1 for each prompt"),
    (change(sampling={"samples": 4, "max_new_tokens": 64}), "at most 64 tokens, the model's context"),
    (change(sampling={"temperature": 0.6}), "temperature 1"),
    (change(horizon=[0.5, 1.5]), "horizon.1: 1.5"),
    (change(device="tpu0"), "device 'tpu0'"),
    (no_data, "no rollouts of the base on the held-out prompts of 'a'"),
    (one_template, "without {trajectory}"),
    (judging(chat=True), "without a chat template"),
    (judging(yes=["Yes"]), "none of which is a single token"),
    (judging(verdicts="sampled", pattern="w1"), "without a group"),
    (judging(answer="regex:("), "regular expression"),
    (judging(templates={"outcome": "none.txt"}), "none.txt"),
    (judging(modes=["process"], templates={"outcome": "none.txt"}), "not among the modes"),
    (other_model, "of shape"),
    (no_weights, "model 'null' without its weights"),
    (twice, "one file for each model and domain"),
    (given(lambda every: every[-1].pop("reward") and None), "without a reward"),
    (given(lambda every: every[:24] + every[24::3]), "1 sample(s) of model 'b'"),
    (given(lambda every: every[:-3]), "answered by only one of 'base' and 'null'"),
    (given(lambda every: [row for row in every if row["model"] != "base"]), "no rollouts of the base"),
    (given(lambda every: every[0].update(model="basis")), "did you mean 'base'?"),
    (given(lambda every: [row | {"reward": 7.0} for row in every]), "rewards in [0, 1]"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_one_clear_error_and_nothing_is_written(
    inputs: Path, tmp_path: Path, spoil: Callable[[Path, Request], None], message: str
) -> None:
    folder = tmp_path / "inputs"
    shutil.copytree(inputs, folder)
    asked: Request = json.loads(json.dumps(request()))
    spoil(folder, asked)
    with pytest.raises(InputError) as caught:
        probe(read(folder, asked, tmp_path / "run"), search_path=[folder])
    assert message in str(caught.value)
    assert "Remedy: " in str(caught.value)
    assert not list(tmp_path.glob("run*"))


def test_the_command_line(made: Path, inputs: Path) -> None:
    done = CliRunner().invoke(app, ["probe", str(inputs / "made.yaml"), "--quiet"])
    assert done.exit_code == 0, done.exception
    assert done.stdout.strip() == str(made / "report.html")
