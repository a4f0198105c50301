"""`interference probe`: locus of error, verdicts made elsewhere, and the forecast of divergences, as a user runs them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from test_probe import read, request
from tiny import perturbed, qwen3, rows, save, write_jsonl

from interference.errors import InputError
from interference.probes.given import match
from interference.probes.trajectories import Trajectory
from interference.probes.verdicts import Verdict
from interference.probing import judging, stages
from interference.probing.config import load_config
from interference.probing.run import probe
from interference.records import Run

Rows = list[dict[str, Any]]
WORD = r"\s+"
"""Every word is a step: the tests' tokenizer knows no line breaks."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an expert, a model that is the base itself, and a verifier to which the word w9 is the error."""
    folder = tmp_path_factory.mktemp("probe")
    save(qwen3(0), folder / "base")
    save(perturbed(1, 0.004), folder / "a")
    save(qwen3(0), folder / "same")
    write_jsonl(folder / "a.jsonl", rows(0, prompts=6, responses=1, rewards=False))
    (folder / "verifier_of_w9.py").write_text(
        "def right(prompts, completions, **columns):\n    return [float('w9' not in c.split()) for c in completions]\n"
    )
    return folder


def asked(**changes: Any) -> dict[str, Any]:
    return request(
        models=[{"name": "a", "model": "a", "kind": "expert"}],
        domains=[{"name": "a", "prompts": "a.jsonl", "verifier": "verifier_of_w9:right"}],
        **changes,
    )


def sees_w9(trajectories: Sequence[Trajectory]) -> list[Verdict]:
    """A judge whose log-odds of "correct" fall where w9 stands."""
    return [Verdict.from_log_odds(-2.0 if "w9" in t.response.split() else 1.0) for t in trajectories]


def with_errors(folder: Path, seed: int, responses: int = 3) -> Rows:
    """Responses of six words to the prompts of a.jsonl; the wrong ones, two of three, hold w9 at a random step."""
    g = np.random.default_rng(seed)
    out = []
    for row in map(json.loads, (folder / "a.jsonl").read_text().splitlines()):
        for k in range(responses):
            words = [f"w{i}" for i in g.integers(0, 9, 6)]
            step = int(g.integers(1, 7)) if k % 3 else None
            if step is not None:
                words[step - 1] = "w9"
            known = {"reward": float(step is None)} | ({} if step is None else {"error_step": step})
            out.append({"prompt": row["prompt"], "prompt_id": row["prompt_id"], "response": " ".join(words), **known})
    return out


# Locus of error


def test_planted_errors_are_found_where_they_are(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "judge_of", lambda *_: sees_w9)
    planted = write_jsonl(tmp_path / "planted.jsonl", with_errors(inputs, 0))
    request_ = asked(probes=["locus"], locus={"separator": WORD, "limit": 10})
    request_["domains"][0]["planted"] = str(planted)
    run = Run.open(probe(read(inputs, request_, tmp_path / "run"), search_path=[inputs]))
    found = run.probe("locus")
    truth = [row["error_step"] for row in with_errors(inputs, 0) if row["reward"] == 0]
    for model in ("base", "a"):
        mine = found[found["model"] == model]
        assert mine["step"].tolist() == truth[:10]
        assert mine["locus"].tolist() == truth[:10]
        assert set(mine["source"]) == {"planted"}
        assert set(mine["steps"]) == {6}
    table = run.probe("locus_agreement").query("model == 'a'").set_index("metric")
    assert table.loc["exact", "value"] == table.loc["located", "value"] == 1
    prompts = [row["prompt_id"] for row in with_errors(inputs, 0) if row["reward"] == 0][:10]
    others = [
        np.mean([truth[j] == truth[i] for j in range(10) if prompts[j] != prompts[i]]) for i in range(10)
    ]  # the judge finds every error, so its loci are the true steps
    assert table.loc["exact", "chance"] == pytest.approx(np.mean(others))
    assert table.loc["difference", "value"] == 0
    text = (run.path / "report.html").read_text()
    assert '<h2 id="locus"' in text
    assert (run.path / "figures" / "probe_locus.svg").is_file()


def test_steps_that_were_not_planted_are_found_by_rollouts(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Continuations fail from w9 on, whatever follows, and mostly succeed before it."""
    monkeypatch.setattr(judging, "judge_of", lambda *_: sees_w9)
    files = []
    for seed, model in enumerate(("base", "a")):
        path = write_jsonl(tmp_path / f"{model}.jsonl", with_errors(inputs, seed))
        files.append({"model": model, "domain": "a", "data": str(path)})
    locus = {"separator": WORD, "limit": 8, "samples": 24, "max_new_tokens": 2}
    run = Run.open(
        probe(
            read(inputs, asked(rollouts=files, probes=["locus"], locus=locus), tmp_path / "run"), search_path=[inputs]
        )
    )
    found = run.probe("locus")
    for seed, model in enumerate(("base", "a")):
        truth = {(r["prompt_id"], r["error_step"]) for r in with_errors(inputs, seed) if r["reward"] == 0}
        mine = found[(found["model"] == model) & found["step"].notna()]
        assert set(mine["source"]) == {"rollouts"}
        assert len(mine) >= 7
        right = [(p, int(s)) in truth for p, s in zip(mine["prompt_id"], mine["step"], strict=True)]
        assert np.mean(right) > 0.8
        assert (mine["step_low"] <= mine["step"]).all()
        # One response of every prompt comes before a second one of any.
        assert mine["prompt_id"].nunique() == 6
    exact = run.probe("locus_agreement").query("metric == 'exact'")["value"]
    assert (exact > 0.8).all()


def test_a_model_is_the_judge_of_its_prefixes(inputs: Path, tmp_path: Path) -> None:
    planted = write_jsonl(tmp_path / "planted.jsonl", with_errors(inputs, 3))
    request_ = asked(probes=["locus"], locus={"separator": WORD, "limit": 3})
    request_["domains"][0]["planted"] = str(planted)
    config = read(inputs, request_, tmp_path / "run")
    run = Run.open(probe(config, search_path=[inputs]))
    first = next(row for row in with_errors(inputs, 3) if row["reward"] == 0)
    words = first["response"].split()
    prefixes = [Trajectory(first["prompt"], " ".join(words[: k + 1]) + " " * (k < 5), "p") for k in range(6)]
    opened = stages.Work(config, judging_inputs(config, inputs), tmp_path / "again", None, lambda _: None)  # type: ignore[arg-type]
    opened.models = stages.Models(config, opened.inputs.base, opened.inputs.tuned, lambda _: None)
    probabilities = [v.probability for v in judging.judge_of(opened, "a", "a", "process", "")(prefixes)]
    standing = [k for k, p in enumerate(probabilities) if p >= 0.5]
    expected = (standing[-1] + 2 if standing[-1] < 5 else math.nan) if standing else 1
    seen = run.probe("locus").query("model == 'a'")["locus"].iloc[0]
    assert seen == expected or (math.isnan(seen) and math.isnan(expected))


def judging_inputs(config: Any, folder: Path) -> Any:
    from interference.probing.inputs import open_inputs

    return open_inputs(config, [folder])


# Verdicts made elsewhere


def given_files(folder: Path, by: str = "index") -> tuple[dict[str, Any], Rows]:
    """A request for responses and verdicts of another server: it says yes to 3 of 4 right and 1 of 3 wrong responses."""
    responses, files, verdicts = [], [], []
    for model in ("base", "a"):
        every = [
            {"prompt_id": f"p{i}", "prompt": f"w{i} w1", "response": f"w{j} w{i}", "reward": float(j < 4)}
            for i in range(5)
            for j in range(7)
        ]
        said = [
            {"prompt_id": row["prompt_id"], "yes": k % 7 in (0, 1, 2, 4)}
            | ({"index": k % 7} if by == "index" else {"response": row["response"]})
            for k, row in enumerate(every)
        ]
        path = write_jsonl(folder / f"responses_{model}.jsonl", every)
        files.append({"model": model, "domain": "a", "data": str(path)})
        for mode in ("outcome", "process"):
            path = write_jsonl(folder / f"verdicts_{model}_{mode}.jsonl", said[::-1])
            verdicts.append({"model": model, "domain": "a", "mode": mode, "data": str(path)})
        responses += every
    changes = {"rollouts": files, "verdicts": verdicts, "probes": ["self_verification"]}
    out = request(models=[{"name": "a", "kind": "expert"}], domains=[{"name": "a"}], **changes)
    return out, responses


@pytest.mark.parametrize("by", ["index", "response"])
def test_verdicts_of_another_server_need_no_model(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    monkeypatch.setattr(stages, "load", None)
    request_, _ = given_files(tmp_path, by)
    request_["judge"] = {}  # its words are no words of this tokenizer, and need not be
    run = Run.open(probe(read(inputs, request_, tmp_path / "run")))
    table = run.probe("verification").set_index(["model", "mode", "metric"])["value"]
    for model in ("base", "a"):
        for mode in ("outcome", "process"):
            assert table[model, mode, "tpr"] == pytest.approx(3 / 4)
            assert table[model, mode, "tnr"] == pytest.approx(2 / 3)
    assert run.probe("horizon").empty
    assert any("no horizon" in note for note in run.results["notes"])
    said = run.probe("verdicts").query("model == 'a' and mode == 'process'")
    assert said["yes"].tolist() == [1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0] * 5


def test_equal_responses_share_a_verdict_or_have_one_each() -> None:
    responses = [{"prompt_id": "p", "response": r} for r in ("x", "y", "x")]
    one = match(
        [{"prompt_id": "p", "response": "x", "log_odds": 2.0}, {"prompt_id": "p", "response": "y", "yes": None}],
        responses,
    )
    assert [v.score for v in one][::2] == [2.0, 2.0]
    assert math.isnan(one[1].yes)
    assert one[1].unparsable == 1
    each = [{"prompt_id": "p", "response": r, "probability": p} for r, p in (("x", 0.1), ("x", 0.9), ("y", 0.5))]
    assert [v.probability for v in match(each, responses)] == [0.1, 0.5, 0.9]
    assert [v.yes for v in match(each, responses)] == [0.0, 0.0, 1.0]
    assert match([*each, {"prompt_id": "q", "index": 0, "yes": True}], responses, left_out={"q"})


def spoilt(change: Callable[[Rows], Any]) -> Callable[[Path, dict[str, Any]], None]:
    def do(folder: Path, request_: dict[str, Any]) -> None:
        path = folder / "verdicts_a_process.jsonl"
        every = [json.loads(line) for line in path.read_text().splitlines()]
        write_jsonl(path, change(every) or every)

    return do


def planted(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path, dict[str, Any]], None]:
    def do(folder: Path, request_: dict[str, Any]) -> None:
        row = change({"prompt": "w1", "prompt_id": "p", "response": "w1 w9", "reward": 0.0, "error_step": 2})
        request_["probes"] = ["locus"]
        request_["verdicts"] = []
        request_["locus"] = {"separator": WORD}
        request_["models"][0]["model"] = "a"
        request_["domains"][0]["planted"] = str(write_jsonl(folder / "planted.jsonl", [row]))

    return do


def set_to(**values: Any) -> Callable[[Path, dict[str, Any]], None]:
    return lambda folder, request_: request_.update(values)


BAD: list[tuple[Callable[[Path, dict[str, Any]], None], str]] = [
    (
        spoilt(lambda every: every[0].update(prompt_id="nowhere")),
        "prompt_id 'nowhere', of which there are no responses",
    ),
    (spoilt(lambda every: every[0].pop("index") and None), "`response` (its text) or `index`"),
    (spoilt(lambda every: every[0].update(index=7)), "a whole number from 0 to 6"),
    (spoilt(lambda every: every[0].update(index=5)), "a second verdict"),
    (spoilt(lambda every: every[1:]), "no verdict on 1 of 35 responses"),
    (spoilt(lambda every: every[0].update(log_odds=1.0)), "log_odds and yes"),
    (spoilt(lambda every: every[0].pop("yes") and None), "add the judge's verdict"),
    (spoilt(lambda every: every[0].update(yes="maybe")), "verdict 'maybe'"),
    (spoilt(lambda every: [{**r, "probability": 1.5, "yes": 0} for r in every]), "probability and yes"),
    (spoilt(lambda every: [{"prompt_id": "p0", "index": 0, "probability": 1.5}]), "a number from 0 to 1"),
    (spoilt(lambda every: [{"prompt_id": "p0", "response": "other", "yes": True}]), "response 'other'"),
    (set_to(rollouts=[]), "without the responses that were judged"),
    (set_to(probes=["skills"]), "verdicts are read by the probe self_verification"),
    (set_to(judge={"modes": ["outcome"]}), "mode 'process' is not among judge.modes"),
    (lambda _, r: r["verdicts"][2].update(model="b"), "unknown model 'b'"),
    (lambda _, r: r["verdicts"].append(r["verdicts"][0]), "one file for each model and domain"),
    (lambda _, r: r["verdicts"].pop(), "model 'a' without its weights"),
    (planted(lambda row: row | {"error_step": 3}), "error_step 3 of a response to 'p' with 2 steps"),
    (planted(lambda row: {k: v for k, v in row.items() if k != "error_step"}), "error_step None"),
    (planted(lambda row: row | {"reward": 1.0}), "none of them wrong"),
    (planted(lambda row: {k: v for k, v in row.items() if k != "reward"}), "without a reward"),
    (set_to(probes=["locus"], verdicts=[]), "no `planted` responses, nor `prompts`"),
    (set_to(probes=["locus"], verdicts=[], judge={"modes": ["outcome"]}), "judge.modes must hold 'process'"),
    (set_to(locus={"sample": 2}), "did you mean 'samples'?"),
    (set_to(judge={"yes": [True]}), "quote the words"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_one_clear_error(
    inputs: Path, tmp_path: Path, spoil: Callable[[Path, dict[str, Any]], None], message: str
) -> None:
    request_, _ = given_files(tmp_path)
    spoil(tmp_path, request_)
    with pytest.raises(InputError) as caught:
        probe(read(inputs, request_, tmp_path / "run"))
    assert message in str(caught.value)
    assert not list(tmp_path.glob("run*"))


def test_yes_and_no_need_no_quotes_as_keys(inputs: Path, tmp_path: Path) -> None:
    """YAML reads them as true and false."""
    text = yaml.safe_dump(asked(output="out", judge={"answer": "whole"}))
    file = tmp_path / "probe.yaml"
    file.write_text(text.replace("  answer: whole\n", "  answer: whole\n  yes: [w1]\n  no: [w3]\n"))
    judge = load_config(file).judge
    assert (judge.yes, judge.no) == (["w1"], ["w3"])


# The forecast of divergences


def test_the_forecast_stands_beside_the_measured_divergence(inputs: Path, tmp_path: Path) -> None:
    # Given responses, without the <pad> that random models sample: its embedding is zero, where a norm's derivatives explode.
    files = []
    for seed, model in enumerate(("base", "a", "null")):
        path = write_jsonl(tmp_path / f"{model}.jsonl", with_errors(inputs, seed))
        files.append({"model": model, "domain": "a", "data": str(path)})
    request_ = asked(probes=["neighborhoods"], rollouts=files)
    request_["models"].append({"name": "null", "model": "same", "kind": "merged"})
    run = Run.open(probe(read(inputs, request_, tmp_path / "run"), search_path=[inputs]))
    table = run.probe("kl_forecast").set_index("reference")
    kl = run.probe("kl").query("policy == 'base' and reference == 'a' and estimator == 'exact' and per == 'token'")
    row = table.loc["a"]
    # Measured along two ways: moved in place and summed by sequence, or with both models in memory.
    assert row["measured"] == pytest.approx(kl["value"].iloc[0], rel=1e-3)
    assert 0.9 < row["ratio"] < 1.1
    assert row["ratio"] == pytest.approx(row["forecast"] / row["measured"])
    assert row["low"] < row["measured"] < row["high"]
    assert pd.isna(table.loc["null", "forecast"])
    assert "identical" in table.loc["null", "reason"]
    assert any("no forecast of the divergence of null" in note for note in run.results["notes"])
    assert (run.path / "figures" / "probe_kl_forecast.svg").is_file()
    off = asked(probes=["neighborhoods"], neighborhoods={"forecast": False, "exact": False})
    without = Run.open(probe(read(inputs, off, tmp_path / "off"), search_path=[inputs]))
    assert without.probe("kl_forecast").empty
    assert not (without.path / "figures" / "probe_kl_forecast.svg").exists()
