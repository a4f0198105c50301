"""`interference probe`: bad input is told before the expensive part, and nothing is dropped silently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from synthetic_probe import make_probe
from test_probe import JUDGE, read, request
from test_probe_more import WORD, Rows, asked, given_files, inputs, sees_w9, with_errors
from tiny import write_jsonl

import figures
from figures.divergences import best_estimates
from interference import records
from interference.errors import InputError
from interference.probes.trajectories import answer_extractor
from interference.probing import judging, stages
from interference.probing.inputs import open_inputs
from interference.probing.run import probe
from interference.records import Run
from interference.report import behaviour_tables, behaviour_words

__all__ = ["inputs"]  # the fixture


def planted_request(folder: Path, **changes: Any) -> dict[str, Any]:
    """Errors located in planted responses alone, of a domain without prompts."""
    path = write_jsonl(folder / "planted.jsonl", with_errors(folder, 0))
    models = [{"name": "a", "model": "a", "kind": "expert"}]
    domains = [{"name": "a", "planted": str(path)}]
    locus = {"separator": WORD, "limit": 3}
    return request(models=models, domains=domains, probes=["locus"], locus=locus, **changes)


@pytest.mark.parametrize("prompts", [False, True])
def test_planted_errors_need_no_responses(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompts: bool
) -> None:
    monkeypatch.setattr(judging, "judge_of", lambda *_: sees_w9)
    monkeypatch.setattr(stages, "sampled_responses", None)
    request_ = planted_request(inputs)
    if prompts:
        request_["domains"][0] |= {"prompts": "a.jsonl", "verifier": "verifier_of_w9:right"}
    run = Run.open(probe(read(inputs, request_, tmp_path / "run"), search_path=[inputs]))
    assert len(run.probe("locus")) == 2 * 3
    assert run.probe("performance").empty
    assert '<h2 id="locus"' in (run.path / "report.html").read_text()


def test_files_that_are_not_read_need_not_be_there(inputs: Path, tmp_path: Path) -> None:
    request_ = asked(probes=["neighborhoods"], judge=JUDGE | {"templates": {"outcome": "nofile.txt"}})
    request_["domains"][0]["planted"] = "nofile.jsonl"
    opened = open_inputs(read(inputs, request_, tmp_path / "run"), [inputs])
    assert not [path for path in opened.fingerprints["data"] if "nofile" in path]
    request_["probes"], request_["judge"] = ["locus"], JUDGE
    with pytest.raises(InputError, match="nofile"):
        open_inputs(read(inputs, request_, tmp_path / "other"), [inputs])


@pytest.mark.parametrize("first", ["base's file", "prompts"])
def test_the_limit_leaves_every_model_the_same_prompts(inputs: Path, tmp_path: Path, first: str) -> None:
    """The expert's file is in the reverse order; the prompts' file begins with the third."""
    every = with_errors(inputs, 0)
    ids = list(dict.fromkeys(row["prompt_id"] for row in every))
    files = []
    for model, held in (("base", every), ("a", every[::-1])):
        path = write_jsonl(tmp_path / f"{model}.jsonl", held)
        files.append({"model": model, "domain": "a", "data": str(path)})
    request_ = asked(probes=["neighborhoods"], rollouts=files, limit=2)
    if first == "prompts":
        held = [{"prompt_id": i, "prompt": next(r["prompt"] for r in every if r["prompt_id"] == i)} for i in ids[2:]]
        request_["domains"][0]["prompts"] = str(write_jsonl(tmp_path / "prompts.jsonl", held))
    else:
        request_["domains"] = [{"name": "a"}]
    given = open_inputs(read(inputs, request_, tmp_path / "run"), [inputs]).given
    wanted = set(ids[:2] if first == "base's file" else ids[2:4])
    for model in ("base", "a"):
        assert set(given[model, "a"].domain.prompt_ids) == wanted
        assert given[model, "a"].left_out == set(ids) - wanted


@pytest.mark.parametrize(
    ("logps", "message"),
    [
        ({"base": [-1.0, -1.0], "a": [-1.0]}, "do not fit"),
        ({"base": [-1.0], "a": ["x"]}, "a list of numbers"),
        ({"base": [-1.0], "a": [0.5]}, "finite natural logarithms"),
        ({"base": [-1.0], "a": [float("nan")]}, "finite natural logarithms"),
    ],
)
def test_log_probabilities_are_checked_when_they_are_read(
    inputs: Path, tmp_path: Path, logps: dict[str, Any], message: str
) -> None:
    every = [row | {"logps": {"base": [-1.0], "a": [-1.0]}} for row in with_errors(inputs, 0)]
    every[-1]["logps"] = logps
    path = write_jsonl(tmp_path / "given.jsonl", every)
    request_ = asked(probes=["neighborhoods"], rollouts=[{"model": "base", "domain": "a", "data": str(path)}])
    with pytest.raises(InputError, match=message):
        open_inputs(read(inputs, request_, tmp_path / "run"), [inputs])


def test_rewards_beyond_one_are_refused_after_the_first_model(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    sampled = stages.sampled_responses
    monkeypatch.setattr(stages, "sampled_responses", lambda *a, **k: calls.append(1) or sampled(*a, **k))
    (tmp_path / "verifier_of_sevens.py").write_text(
        "def f(prompts, completions, **columns):\n    return [7.0 for c in completions]\n"
    )
    request_ = asked(probes=["skills"])
    request_["domains"][0]["verifier"] = "verifier_of_sevens:f"
    with pytest.raises(InputError, match=r"rewards in \[0, 1\]"):
        probe(read(inputs, request_, tmp_path / "run"), search_path=[tmp_path])
    assert len(calls) == 1


def skills_of_a_model_called(name: str) -> dict[str, Any]:
    out = asked(probes=["skills"])
    out["models"].append({"name": name, "model": "same", "kind": "merged"})
    return out


REFUSED: list[tuple[dict[str, Any], str]] = [
    (asked(probes=["locus"], locus={"separator": "("}), "locus.separator"),
    (skills_of_a_model_called("union"), "the name 'union' is taken"),
    (skills_of_a_model_called("item"), "the name 'item' is taken"),
    (asked(judge={"chat": True, "templates": {"outcome": "o.txt", "process": "p.txt"}}), "judge.chat"),
    (asked(judge={"samples": 3}), "judge.samples"),
    (asked(judge={"max_new_tokens": 3}), "judge.max_new_tokens"),
    (asked(judge={"pattern": "(yes)"}), "judge.pattern"),
    (asked(judge={"modes": ["outcome"]}, horizon=[0.5]), "horizon"),
]


@pytest.mark.parametrize(("request_", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_settings_without_effect_and_bad_values_are_refused_when_read(
    inputs: Path, tmp_path: Path, request_: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        read(inputs, request_, tmp_path / "run")
    assert message in str(caught.value)


def test_defaults_that_are_written_out_are_no_error(inputs: Path, tmp_path: Path) -> None:
    """As in the config.yaml of a run, which can be given again."""
    request_ = asked(judge=JUDGE | {"modes": ["outcome"], "templates": {"outcome": "o.txt"}})
    del request_["horizon"]
    config = read(inputs, request_, tmp_path / "run")
    assert read(inputs, config.model_dump(), tmp_path / "run") == config
    assert read(inputs, skills_of_a_model_called("union") | {"probes": ["neighborhoods"]}, tmp_path / "run")


def test_an_extractor_that_raises_is_one_clear_error(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "extractor_of_w.py").write_text(
        "import re\n\ndef last(text):\n    return re.search(r'w(\\d)', text).group(0)\n"
    )
    extract = answer_extractor("extractor_of_w:last", [tmp_path])
    assert extract("so w7") == "w7"
    with pytest.raises(InputError, match=r"raises AttributeError .* on the response 'no'"):
        extract("no")
    # Nothing invented is shown to it when inputs are opened.
    request_ = asked(probes=["self_verification"], judge=JUDGE | {"answer": "extractor_of_w:last"})
    assert open_inputs(read(inputs, request_, tmp_path / "run"), [inputs, tmp_path]).judgment is not None


def test_killed_at_its_very_end_it_keeps_what_was_judged(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> Path:
        raise KeyboardInterrupt

    config = read(inputs, asked(probes=["self_verification"]), tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(records.Workspace, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            probe(config, search_path=[inputs])
    monkeypatch.setattr(judging, "judge_of", None)
    final = probe(config, search_path=[inputs])
    assert not (final / "cache").exists()


def test_wrong_responses_that_are_passed_over_are_counted(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 12 wrong responses 6 are to prompts that the file of prompts lacks, and for the others there is no room."""
    monkeypatch.setattr(judging, "judge_of", lambda *_: sees_w9)
    lines = (inputs / "a.jsonl").read_text().splitlines()[:3]
    (tmp_path / "three.jsonl").write_text("\n".join(lines) + "\n")
    path = write_jsonl(tmp_path / "given.jsonl", with_errors(inputs, 0))
    files = [{"model": m, "domain": "a", "data": str(path)} for m in ("base", "a")]
    request_ = asked(probes=["locus"], rollouts=files, locus={"separator": WORD, "max_new_tokens": 62})
    request_["domains"][0]["prompts"] = str(tmp_path / "three.jsonl")
    run = Run.open(probe(read(inputs, request_, tmp_path / "run"), search_path=[inputs]))
    assert run.probe("locus").empty
    (note,) = [note for note in run.results["notes"] if note.startswith("a on a: errors located in 0")]
    assert "6 whose prompt is not among the domain's `prompts`" in note
    assert "6 that the model's context leaves no room to continue" in note
    assert not any("no wrong responses" in note for note in run.results["notes"])


def test_recorded_verdicts_can_be_given_again(inputs: Path, tmp_path: Path) -> None:
    request_, _ = given_files(tmp_path)
    request_["judge"] = {}
    first = Run.open(probe(read(inputs, request_, tmp_path / "first")))
    table = first.probe("verdicts")
    assert table.groupby(["model", "mode", "prompt_id"])["index"].apply(list).map(lambda x: x == list(range(7))).all()
    for entry in request_["verdicts"]:
        mine = table[(table["model"] == entry["model"]) & (table["mode"] == entry["mode"])].sample(
            frac=1, random_state=0
        )
        rows: Rows = json.loads(mine[["prompt_id", "index", "yes"]].to_json(orient="records"))
        write_jsonl(Path(entry["data"]), rows)
    again = Run.open(probe(read(inputs, request_, tmp_path / "again")))
    pd.testing.assert_frame_equal(again.probe("verdicts"), table)
    pd.testing.assert_frame_equal(again.probe("verification"), first.probe("verification"))


def test_each_divergence_is_by_the_best_estimator_of_its_cell(tmp_path: Path) -> None:
    """One of two domains came with log-probabilities of the sampled tokens alone."""
    path = make_probe(tmp_path / "r", domains=("math", "code"), others=("mixed",))
    run = Run.open(path)
    whole = run.probe("kl")
    kl = whole[(whole["domain"] != "code") | (whole["estimator"] != "exact")]
    best = best_estimates(kl)
    cells = ["policy", "reference", "domain", "per"]
    assert len(best) == len(kl.drop_duplicates(cells)) == len(best.drop_duplicates(cells))
    assert set(best.loc[best["domain"] == "math", "estimator"]) == {"exact"}
    assert set(best.loc[best["domain"] == "code", "estimator"]) == {"k3"}
    assert best_estimates(whole).equals(whole[whole["estimator"] == "exact"])
    table = behaviour_tables.divergences(kl)
    assert len(table.rows) == len(behaviour_tables.divergences(whole).rows)
    assert {row[3] == "–" for row in table.rows if row[0] == "code"} == {True}
    assert {row[3] == "–" for row in table.rows if row[0] == "math"} == {False}
    low = kl[kl["domain"] == "math"]["value"].max()
    raised = kl.assign(value=kl["value"].where(kl["domain"] == "math", kl["value"] + low))
    assert "on code, by k3)" in behaviour_words.divergences(raised)[1]
    assert "by k3" not in behaviour_words.divergences(whole)[1]
    figure = figures.divergence_matrix(kl, run.probe("neighbors"), run.results)
    written = [text.get_text() for ax in figure.axes for text in ax.texts]
    # On the other domain: the three models from the base, and the two others from the multi-task one.
    assert sum(text.endswith("*") for text in written) == 3 + 2
    assert "by k3, the others summed over the vocabulary" in [t.get_text() for t in figure.legends[0].get_texts()]
