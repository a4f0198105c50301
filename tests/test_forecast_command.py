"""`interference forecast` as a user runs it: results, sampling, resumption, and every bad input."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from tiny import perturbed, qwen3, rows, save, write_jsonl
from typer.testing import CliRunner

import interference
from interference.checkpoint import Checkpoint
from interference.cli import app
from interference.domain import Domain
from interference.errors import InputError
from interference.forecast_run import plans, stages
from interference.forecast_run.config import ForecastConfig, load_config
from interference.forecast_run.run import forecast
from interference.forecast_run.storage import read_update
from interference.forecast_run.tables import beyond_radius, notes_on
from interference.forecasting.training import Training
from interference.records import FORECAST, Run
from interference.report import write_report

Request = dict[str, Any]
TRAINING = {"learning_rate": 1e-3, "steps": 6, "prompts_per_step": 2, "generations": 4}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forecast")
    save(qwen3(0), folder / "base")
    for i, name in enumerate("ab"):
        save(perturbed(i + 1, 0.003), folder / f"pilot_{name}")
        write_jsonl(folder / f"{name}.jsonl", rows(i, prompts=8, responses=4))
        write_jsonl(folder / f"{name}_answers.jsonl", rows(10 + i, prompts=5, responses=1, rewards=False))
        write_jsonl(folder / f"{name}_prompts.jsonl", rows(i, prompts=6, responses=1, rewards=False))
    (folder / "verifier_of_forecasts.py").write_text(
        "def odd(prompts, completions, **columns):\n    return [float(len(c.split()) % 2) for c in completions]\n"
    )
    return folder


def request(**changes: Any) -> Request:
    return {
        "base_model": "base",
        "domains": [{"name": d, "data": f"{d}.jsonl"} for d in "ab"],
        "training": TRAINING,
        "tier": ["gradient", "virtual", "pilot"],
        "pilots": [{"domain": d, "model": f"pilot_{d}", "steps": 1} for d in "ab"],
        "objective": ["reward", "nll"],
        "evaluation": [{"name": f"answers {d}", "data": {"nll": f"{d}_answers.jsonl"}} for d in "ab"],
        "expanded": 4,
    } | changes


SHORT: Request = {"tier": "virtual", "pilots": [], "objective": "reward", "evaluation": []}


def sampled(**changes: Any) -> Request:
    source = {d: {"name": d, "prompts": f"{d}_prompts.jsonl", "verifier": "verifier_of_forecasts:odd"} for d in "ab"}
    settings = {"samples": 6, "max_new_tokens": 5, "batch_size": 12}
    return request(domains=list(source.values()), sampling=settings, **SHORT | changes)


def read(folder: Path, asked: Request, output: Path) -> ForecastConfig:
    file = folder / f"{output.name}.yaml"
    file.write_text(yaml.safe_dump(asked | {"output": str(output)}))
    return load_config(file)


@pytest.fixture(scope="module")
def made(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forecast(read(inputs, request(), tmp_path_factory.mktemp("runs") / "made"))


def test_cells_are_those_of_the_library(made: Path, inputs: Path) -> None:
    run = Run.open(made)
    cells = run.cells()
    assert len(cells) == 3 * 2 * (2 + 2)
    base = Checkpoint.open(inputs / "base")
    domains = {d: Domain.from_jsonl(inputs / f"{d}.jsonl", tokenizer=base.tokenizer(), name=d) for d in "ab"}
    found = interference.forecast(base, domains, training=Training(**TRAINING), tried=4)
    keys = ["update", "domain"]
    mine = cells[(cells["tier"] == "virtual") & (cells["objective"] == "reward")].set_index(keys)
    expected = found.cells.set_index(keys)
    for column in ("predicted", "stderr", "low", "high", "predicted_second", "ess", "agreement"):
        np.testing.assert_allclose(
            mine.loc[expected.index, column].astype(float), expected[column], rtol=1e-5, atol=1e-8, err_msg=column
        )
    assert mine["own"].tolist() == [u == d for u, d in mine.index]
    assert set(run.results["evaluated"]["nll"]) == {"answers a", "answers b"}


def test_records_are_complete_and_the_request_is_replayable(made: Path, inputs: Path) -> None:
    run = Run.open(made)
    path = run.forecast("path")
    assert list(path.columns) == list(FORECAST["path"])
    assert set(zip(path["tier"], path["domain"], path["half"], strict=True)) == {
        (t, d, h) for t in ("virtual", "pilot") for d in "ab" for h in (1, 2)
    }
    assert (path.groupby(["tier", "domain", "half"])["step"].max() == 6).all()
    pd.testing.assert_frame_equal(
        pd.read_parquet(made / "tables" / "cells.parquet")[["update"]], run.cells()[["update"]]
    )
    for tier in ("gradient", "virtual", "pilot"):
        for half in (1, 2):
            assert read_update(made / "tensors" / "updates" / tier / "a" / f"half_{half}.safetensors")
    assert not list(made.rglob("*.part"))
    assert not (made / "cache").exists()
    again = load_config(made / "config.yaml")
    assert again == load_config(inputs / "made.yaml")
    said: list[str] = []
    assert forecast(again, say=said.append) == made
    assert said[-1] == "already finished"
    assert any("17 % of the steps" in note for note in run.results["notes"])


def test_quadratic_models_can_be_read_back(made: Path) -> None:
    run = Run.open(made)
    cells = run.cells().set_index(["objective", "tier", "update", "domain"])
    for name, model in stages.quadratic_models(run, "nll", "gradient").items():
        assert model.predict({"a": 1.0}).value == pytest.approx(
            cells.loc[("nll", "gradient", "a", name), "predicted_second"], rel=1e-9
        )


def test_the_page_says_it(made: Path) -> None:
    text = (made / "report.html").read_text()
    ids = re.findall(r' id="([^"]+)"', text)
    assert {"summary", "reward", "nll", "paths", "unknown", "asked"} <= set(ids)
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)
    assert len(set(ids)) == len(ids)
    assert "<script" not in text
    assert not re.search(r"\b(nan|None|np\.float64)\b", re.sub(r"<[^>]+>", " ", text).replace("None.", ""))
    cell = Run.open(made).cells().iloc[0]
    assert re.search(rf"interference forecast \S*{made.name}/config.yaml", text)
    assert f"{abs(cell['anchor_value']):.3g}" in text
    again = (made / "report.html").read_bytes()
    assert write_report(made).read_bytes() == again


def test_prompts_are_sampled_and_rewarded_here(inputs: Path, tmp_path: Path) -> None:
    training = TRAINING | {"adapter": {"rank": 2, "alpha": 4}}
    asked = sampled(training=training)
    asked["domains"][1]["training"] = {"steps": 3, "learning_rate": 2e-3, "adapter": None}
    config = read(inputs, asked, tmp_path / "run")
    assert (config.planned("a").steps, config.planned("b").steps, config.planned("b").adapter) == (6, 3, None)
    run = Run.open(forecast(config, search_path=[inputs]))
    found = [json.loads(line) for line in (run.path / "rollouts" / "a" / "base.jsonl").read_text().splitlines()]
    assert len(found) == 36
    assert all(row["reward"] == len(row["response"].split()) % 2 for row in found)
    assert run.results["rollouts"]["a"]["mean_reward"] == pytest.approx(np.mean([row["reward"] for row in found]))
    assert len(run.cells()) == 4
    assert run.forecast("path").groupby("domain")["step"].max().to_dict() == {"a": 6, "b": 3}
    half = read_update(run.path / "tensors" / "updates" / "virtual" / "a" / "half_1.safetensors")
    assert {type(change).__name__ for change in half.values()} == {"LowRank"}


class Counter:
    """Counts what is computed, and interrupts when so much is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.stop_at = math.inf
        from interference.probes import ledger

        for module, name in ((ledger, "sample"), (stages, "estimate_update"), (stages, "predict")):
            monkeypatch.setattr(module, name, self.counting(name, getattr(module, name)))

    def counting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            if len(self.calls) >= self.stop_at:
                raise KeyboardInterrupt
            self.calls.append(name)
            return function(*args, **options)

        return counted


def test_interrupted_it_resumes_with_the_same_result(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter, asked = Counter(monkeypatch), sampled(tier=["gradient", "virtual"])
    whole = forecast(read(inputs, asked, tmp_path / "whole"), search_path=[inputs])
    every, counter.calls = sorted(counter.calls), []
    assert {name: every.count(name) for name in set(every)} == {"sample": 6, "estimate_update": 4, "predict": 4}
    broken, said = read(inputs, asked, tmp_path / "broken"), list[str]()
    for stop in (2, 7, 9, 13):
        counter.stop_at = stop
        with pytest.raises(KeyboardInterrupt):
            forecast(broken, search_path=[inputs], say=said.append)
        assert not (tmp_path / "broken").exists()
    with pytest.raises(InputError, match="an unfinished run of another configuration"):
        forecast(read(inputs, asked | {"seed": 1}, tmp_path / "broken"), search_path=[inputs])
    counter.stop_at = math.inf
    forecast(broken, search_path=[inputs], say=said.append)
    assert sorted(counter.calls) == every
    assert said.count("resuming") == 4
    one, other = Run.open(whole), Run.open(tmp_path / "broken")
    assert one.results["cells"] == other.results["cells"]
    assert one.forecast("path").equals(other.forecast("path"))
    with pytest.raises(InputError, match="holds another run"):
        forecast(read(inputs, asked | {"seed": 1}, tmp_path / "broken"), search_path=[inputs])


@pytest.mark.parametrize("shape", ["one", "dpo", "many"])
def test_other_shapes_have_a_page(inputs: Path, tmp_path: Path, shape: str) -> None:
    """One domain; preference pairs; more domains than fit beside each other, with names that are markup."""
    names = {"one": ["a"], "dpo": ["a", "b"], "many": ["a", "b", *(f"<q>{k} & $x$" for k in range(4))]}[shape]
    domains = [{"name": n, "data": str(inputs / f"{n if n in 'ab' else 'a'}.jsonl")} for n in names]
    training = TRAINING | ({"algorithm": "dpo", "learning_rate": 1e-4} if shape == "dpo" else {"steps": 2})
    asked = request(domains=domains, **SHORT | {"training": training, "expanded": 0, "tier": ["gradient", "virtual"]})
    run = Run.open(forecast(read(inputs, asked, tmp_path / "run")))
    assert run.cells()["predicted_second"].isna().all()
    assert not run.cells()["beyond_radius"].any()
    text = (run.path / "report.html").read_text()
    assert not re.search(r"\b(nan|None)\b", re.sub(r"<[^>]+>", " ", text).replace("None.", ""))
    assert ("no other one to hurt" in text) == (shape == "one")
    assert ("pairs in order" in text) == (shape == "dpo")
    assert "<q>" not in text


def test_rewards_follow_the_verifiers_code(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verifier that is mended after an interruption rewards everything again; what was made of the rewards is made again."""
    import sys

    code = tmp_path / "verifier_that_is_mended.py"
    text = "def f(prompts, completions, **columns):\n    return [{} for c in completions]\n"
    asked = sampled()
    for entry in asked["domains"]:
        entry["verifier"] = "verifier_that_is_mended:f"
    config, counter = read(inputs, asked, tmp_path / "run"), Counter(monkeypatch)
    code.write_text(text.format("1.0 - len(c.split()) % 2"))
    counter.stop_at = 9  # 6 groups sampled, both updates estimated, one domain predicted
    with pytest.raises(KeyboardInterrupt):
        forecast(config, search_path=[tmp_path])
    code.write_text(text.format("float(len(c.split()) % 2)"))
    del sys.modules["verifier_that_is_mended"]
    counter.stop_at, counter.calls = math.inf, []
    found = Run.open(forecast(config, search_path=[tmp_path]))
    assert sorted(counter.calls) == ["estimate_update"] * 2 + ["predict"] * 2
    fresh = Run.open(forecast(read(inputs, asked, tmp_path / "fresh"), search_path=[tmp_path]))
    assert found.results["cells"] == fresh.results["cells"]


def test_weak_forecasts_are_called_weak() -> None:
    cell = {
        "objective": "reward", "tier": "virtual", "update": "a", "domain": "b", "predicted": 0.1, "noise_term": 0.0,
        "predicted_second": 0.11, "sampling_stderr": 0.01, "second_stderr": 0.01, "stderr": 0.01, "ess": 0.5,
        "agreement": 0.9, "reliability": 0.95, "noise_ess": 0.5, "route": "weighted",
    }  # fmt: skip
    path = pd.DataFrame(
        {
            "tier": "virtual",
            "domain": "a",
            "half": 1,
            "step": [1, 2],
            "exponent": [1.0, 1.0],
            "rollouts": 0,
            "attempt": 1,
        }
    )

    def notes(path: pd.DataFrame = path, shares: dict[str, float] | None = None, **changes: Any) -> str:
        frame = pd.DataFrame([cell, cell | {"domain": "c"} | changes])
        return "\n".join(notes_on(frame.assign(beyond_radius=beyond_radius(frame)), path, shares or {}))

    assert notes() == ""
    assert "run again in finer ones (a)" in notes(path.assign(attempt=[2, 2]))
    assert "effective sample size below 10 % in 1 of 2 cells (least: 2.0 % for a on c)" in notes(ess=0.02)
    assert "1 of 2 cells are beyond the radius" in notes(predicted_second=0.3)
    assert notes(predicted_second=0.3, second_stderr=0.2) == ""
    assert notes(predicted_second=0.3, noise_term=-0.15) == ""
    assert "mostly noise" in notes(update="d", agreement=0.1, reliability=0.18)
    assert "mostly noise" in notes(update="d", agreement=math.nan, reliability=math.nan)
    assert "in 50 % on a; exponents down to 0.40" in notes(path.assign(exponent=[1.0, 0.4]))
    assert "25 % of the prompts have one response" in notes(shares={"a": 0.25, "b": 0.0})


def change(**values: Any) -> Callable[[Path, Request], None]:
    return lambda folder, asked: asked.update(values)


def data(spoil: Callable[[list[Request]], Any]) -> Callable[[Path, Request], None]:
    """The rows of domain a, spoilt."""

    def do(folder: Path, asked: Request) -> None:
        every = rows(0, prompts=8, responses=4)
        write_jsonl(folder / "a.jsonl", spoil(every) or every)

    return do


def own_training(**values: Any) -> Callable[[Path, Request], None]:
    return lambda folder, asked: asked["domains"][1].update(training=values)


def spoil_domain(**values: Any) -> Callable[[Path, Request], None]:
    def do(folder: Path, asked: Request) -> None:
        asked["domains"][0] = {"name": "a", **values}

    return do


def other_pilot(folder: Path, asked: Request) -> None:
    save(qwen3(0, intermediate_size=40), folder / "pilot_a")


def pilots(*steps: tuple[str, int]) -> Callable[[Path, Request], None]:
    return change(pilots=[{"domain": d, "model": f"pilot_{d}", "steps": n} for d, n in steps])


BAD: list[tuple[Callable[[Path, Request], None], str]] = [
    (data(lambda every: every[-1].pop("reward") and None), "1 rows without a reward"),
    (data(lambda every: [row | {"reward": 1.0} for row in every]), "every reward equal to 1"),
    (data(lambda every: every[::4]), "one response to each prompt"),
    (data(lambda every: every[:4]), "a single prompt"),
    (
        data(lambda every: [row | {"reward": float(row["prompt_id"] == "0-1")} for row in every]),
        "without a prompt whose responses have different rewards",
    ),
    (data(lambda every: [row | {"response": "w1 " * 80} for row in every]), "at most 64 tokens"),
    (change(teir="virtual"), "did you mean 'tier'?"),
    (change(tier="virtul"), "tier.0: 'virtul'"),
    (change(tier=["virtual", "virtual"], pilots=[]), "tier: give one, or a list of different ones"),
    (change(training=TRAINING | {"step": 3}), "did you mean 'steps'?"),
    (change(training={"steps": 3}), "without 'training.learning_rate'"),
    (own_training(step=3), "training of 'b': unknown key 'step' (did you mean 'steps'?)"),
    (own_training(steps=0), "training of 'b': steps: Input should be greater than or equal to 1"),
    (change(pilots=[]), "domain 'a' has no checkpoint of a short training"),
    (pilots(("a", 1)), "domain 'b' has no checkpoint of a short training"),
    (pilots(("a", 1), ("b", 6)), "6 steps on 'b', where the training that is forecast has 6"),
    (pilots(("a", 1), ("c", 1)), "unknown domain 'c'"),
    (change(tier="virtual"), "pilots are read by the tier pilot"),
    (other_pilot, "of shape"),
    (change(evaluation=[]), "objective nll: it needs `evaluation`"),
    (change(evaluation=[{"name": "x", "data": "a_answers.jsonl"}]), "without a reward"),
    (change(effort=0), "effort"),
    (change(device="tpu0"), "device 'tpu0'"),
    (spoil_domain(), "give either `data`"),
    (spoil_domain(prompts="a_prompts.jsonl"), "`prompts` and `verifier` belong together"),
    (spoil_domain(data="none.jsonl"), "none.jsonl"),
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
        forecast(read(folder, asked, tmp_path / "run"), search_path=[folder])
    assert message in str(caught.value)
    assert "Remedy: " in str(caught.value)
    assert not list(tmp_path.glob("run*"))


def test_bad_samplings_are_refused(inputs: Path, tmp_path: Path) -> None:
    for settings, message in (({"samples": 1}, "several responses"), ({"max_new_tokens": 64}, "at most 64 tokens")):
        with pytest.raises(InputError, match=message):
            forecast(read(inputs, sampled() | {"sampling": settings}, tmp_path / "run"), search_path=[inputs])
    assert not list(tmp_path.glob("run*"))


def test_a_verifier_that_likes_everything_stops_before_training(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "verifier_of_all.py").write_text(
        "def f(prompts, completions, **c):\n    return [1.0 for _ in completions]\n"
    )
    asked = sampled()
    asked["domains"][1]["verifier"] = "verifier_of_all:f"
    said: list[str] = []
    with pytest.raises(InputError, match="domain 'b' with every reward equal to 1"):
        forecast(read(inputs, asked, tmp_path / "run"), search_path=[tmp_path, inputs], say=said.append)
    assert not any(line.startswith("training") for line in said)


def test_the_example_of_the_readme_is_a_request(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.DOTALL)
    (tmp_path / "run.yaml").write_text(next(b for b in blocks if "training:" in b))
    config = load_config(tmp_path / "run.yaml")
    assert [d.name for d in config.domains] == ["math", "code"]
    assert config.domains[0].prompts == str(tmp_path / "math_prompts.jsonl")
    assert config.planned("code").steps != config.training.steps


def test_the_command_line(made: Path, inputs: Path) -> None:
    done = CliRunner().invoke(app, ["forecast", str(inputs / "made.yaml"), "--quiet"])
    assert done.exit_code == 0, done.exception
    assert done.stdout.strip() == str(made / "report.html")
    shown = CliRunner().invoke(app, ["forecast", str(inputs / "made.yaml")])
    assert shown.exit_code == 0
    assert "predicted change" in shown.output


@pytest.mark.parametrize("evaluated", [False, True])
def test_rollouts_are_renewed_on_request(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluated: bool
) -> None:
    """Of trainings and of plans; sequences to evaluate on that bear a domain's name are not asked of its verifier."""
    held_out = [{"name": d, "data": f"{d}.jsonl"} for d in "ab"] if evaluated else []
    steep = TRAINING | {"learning_rate": 0.03, "steps": 6}
    asked = sampled(
        training=steep, renew=True, effort=2.0, plans={"mixtures": [{"a": 0.5, "b": 0.5}]}, evaluation=held_out
    )
    mixing, given = plans.virtual_mixtures, list[set[str]]()

    def watched(*where: Any, samplers: Any, **options: Any) -> Any:
        given.append(set(samplers))
        return mixing(*where, samplers=samplers, **options)

    monkeypatch.setattr(plans, "virtual_mixtures", watched)
    run = Run.open(forecast(read(inputs, asked, tmp_path / f"renewed_{evaluated}"), search_path=[inputs]))
    assert given == [{"a", "b"}]
    assert run.forecast("path")["rollouts"].max() > 0, "nothing is tested"
    assert len(run.forecast("plans")) == 2
    assert ("sampled" in set(run.cells()["route"])) == (not evaluated)


def test_what_stands_in_for_a_value_is_named() -> None:
    """Cells told by the second order or by fresh rollouts, noise left in, and renewed rollouts are notes, not secrets."""
    row = {"update": "a", "domain": "b", "objective": "reward", "tier": "virtual", "reliability": 0.9, "agreement": 0.8,
           "predicted": 0.1, "predicted_second": 0.1, "noise_term": 0.0, "beyond_radius": False, "stderr": 0.01,
           "ess": 0.5, "noise_ess": 0.5, "route": "weighted"}  # fmt: skip
    path = pd.DataFrame([{"tier": "virtual", "domain": "a", "exponent": 1.0, "rollouts": 0, "attempt": 1}])
    assert notes_on(pd.DataFrame([row]), path, {}) == []
    for change, said in (
        ({"route": "second"}, "second-order polynomial"),
        ({"route": "sampled"}, "fresh rollouts of the moved policy"),
        ({"noise_ess": 0.01}, "not taken out"),
    ):
        (note,) = notes_on(pd.DataFrame([row | change]), path, {})
        assert said in note
    (note,) = notes_on(pd.DataFrame([row]), path.assign(rollouts=2), {})
    assert "renewed" in note
    assert "a 2 times" in note
