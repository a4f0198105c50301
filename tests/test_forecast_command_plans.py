"""`plans` of `interference forecast`: what is refused, computed and taken from an earlier run, and what the page says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from test_forecast_command import TRAINING, Request, read
from tiny import qwen3, rows, save, write_jsonl
from typer.testing import CliRunner

from interference.checkpoint import Checkpoint
from interference.cli import app
from interference.domain import Domain
from interference.forecast_run import plans
from interference.forecast_run.config import load_config
from interference.forecast_run.run import forecast
from interference.forecasting.mixtures import rank_virtual_mixtures, virtual_mixtures
from interference.forecasting.sequences import rank_orders, virtual_sequences
from interference.forecasting.training import Training
from interference.model import load
from interference.records import FORECAST, Run

QUICK = TRAINING | {"steps": 2}
MIXED = {"a": 0.75, "b": 0.25}
ORDERS = [["a", "b", "c"], ["a", "c"], ["c"]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plans")
    save(qwen3(0), folder / "base")
    for i, name in enumerate("abc"):
        write_jsonl(folder / f"{name}.jsonl", rows(i, prompts=8, responses=4))
        write_jsonl(folder / f"{name}_held_out.jsonl", rows(10 + i, prompts=6, responses=3))
        write_jsonl(folder / f"{name}_prompts.jsonl", rows(i, prompts=6, responses=1, rewards=False))
    return folder


def request(names: str = "abc", **changes: Any) -> Request:
    return {
        "base_model": "base",
        "domains": [{"name": d, "data": f"{d}.jsonl"} for d in names],
        "training": QUICK,
        "expanded": 0,
        "plans": {"mixtures": "equal", "orders": "all"},
    } | changes


def domains(inputs: Path, kind: str = "", names: str = "abc") -> dict[str, Domain]:
    words = Checkpoint.open(inputs / "base").tokenizer()
    return {d: Domain.from_jsonl(inputs / f"{d}{kind}.jsonl", tokenizer=words, name=d) for d in names}


@pytest.fixture(scope="module")
def made(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Weights and orders of its own, on held-out sequences, with another effort and seed than the defaults."""
    asked = request(
        plans={"mixtures": [MIXED, {"c": 1.0, "b": 0.0}, {"b": 0.5, "a": 0.5}], "orders": ORDERS},
        evaluation=[{"name": f"held-out {d}", "data": f"{d}_held_out.jsonl"} for d in "ab"],
        effort={"virtual": 2.0}, seed=3, tier="gradient", training=TRAINING,
    )  # fmt: skip
    asked["domains"][2]["training"] = {"steps": 4}
    return Run.open(forecast(read(inputs, asked, tmp_path_factory.mktemp("runs") / "made")))


def close(found: pd.DataFrame, expected: pd.DataFrame, columns: list[str]) -> None:
    np.testing.assert_allclose(found[columns].astype(float), expected[columns].astype(float), rtol=1e-6, atol=1e-9)


CELLS = ["predicted", "stderr", "low", "high", "ess"]
SCORES = ["mean", "mean_low", "mean_high", "worst", "worst_low", "worst_high", "behind", "behind_stderr"]


def given(inputs: Path) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the library is given for the same plans."""
    model = load(Checkpoint.open(inputs / "base"), dtype=torch.float32, device="cpu", attention="fast")
    trainings = {d: Training(**TRAINING | ({"steps": 4} if d == "c" else {})) for d in "abc"}
    held_out = {f"held-out {d}": domain for d, domain in domains(inputs, "_held_out", "ab").items()}
    return (model, domains(inputs), trainings), {"evaluation": held_out, "effort": 2.0, "seed": 3}


def test_mixtures_are_those_of_the_library(made: Run, inputs: Path) -> None:
    where, options = given(inputs)
    found = virtual_mixtures(*where, [MIXED, {"c": 1.0}, {"a": 0.5, "b": 0.5}], **options)
    table, ranking = made.forecast("plans"), made.forecast("plan_ranking")
    table, ranking = table[table["kind"] == "mixture"], ranking[ranking["kind"] == "mixture"]
    assert table["plan"].unique().tolist() == list(found) == ["0.75 a + 0.25 b", "c", "a + b"]
    assert set(table["stage"]) == {1}
    for name, mixture in found.items():
        mine = table[table["plan"] == name]
        assert mine["domain"].tolist() == mixture.cells["domain"].tolist() == ["held-out a", "held-out b"]
        close(mine, mixture.cells, CELLS)
    by_mean, by_worst = (rank_virtual_mixtures(found, by) for by in ("mean", "worst"))
    assert ranking["plan"].tolist() == by_mean["mixture"].tolist()
    assert ranking["worst_domain"].tolist() == by_mean["worst_domain"].tolist()
    close(ranking, by_mean, SCORES)
    again = ranking.set_index("plan").loc[by_worst["mixture"]]
    close(again, by_worst.assign(worst_behind=by_worst["behind"]), ["worst_behind"])
    close(again, by_worst.assign(worst_behind_stderr=by_worst["behind_stderr"]), ["worst_behind_stderr"])
    assert (ranking["lowest"] == ranking["worst"]).all()


def test_orders_are_those_of_the_library(made: Run, inputs: Path) -> None:
    where, options = given(inputs)
    found = virtual_sequences(*where, ORDERS, **options)
    table, ranking = made.forecast("plans"), made.forecast("plan_ranking")
    table, ranking = table[table["kind"] == "order"], ranking[ranking["kind"] == "order"]
    assert table["plan"].unique().tolist() == ["a → b → c", "a → c", "c"]
    for order, sequence in found.items():
        mine = table[table["plan"] == " → ".join(order)]
        keys = ["stage", "trained", "domain"]
        assert mine[keys].to_numpy().tolist() == sequence.stages[keys].to_numpy().tolist()
        close(mine, sequence.stages, CELLS)
    expected = rank_orders({order: s.stages for order, s in found.items()})
    assert ranking["plan"].tolist() == [" → ".join(order) for order in expected["order"]]
    close(ranking, expected, [*SCORES, "lowest"])


def test_the_records_are_complete_and_replayable(made: Run) -> None:
    for name in ("plans", "plan_ranking"):
        assert list(made.forecast(name).columns) == list(FORECAST[name])
    assert not (made.path / "cache").exists()
    assert made.results["settings"]["effort"]["virtual"] == 2.0
    again = load_config(made.path / "config.yaml")
    said: list[str] = []
    assert forecast(again, say=said.append) == made.path
    assert said[-1] == "already finished"


def test_the_page_has_a_section_where_plans_were_asked_for(made: Run, inputs: Path, tmp_path: Path) -> None:
    text = (made.path / "report.html").read_text()
    ids = re.findall(r' id="([^"]+)"', text)
    assert "plans" in ids
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)
    part = text[text.index('id="plans"') : text.index('id="unknown"')]
    assert "Nothing was trained" in part
    for plan in made.forecast("plan_ranking")["plan"]:
        assert f">{plan}</th>" in part
    assert not re.search(r"\b(nan|None)\b", re.sub(r"<[^>]+>", " ", part))
    assert {"plans_mixture.svg", "plans_order.svg"} <= {p.name for p in (made.path / "figures").iterdir()}
    without = Run.open(forecast(read(inputs, request(plans=None), tmp_path / "without")))
    assert "Which to mix" not in (without.path / "report.html").read_text()
    assert without.forecast("plans").empty
    assert without.forecast("plan_ranking").columns.tolist() == list(FORECAST["plan_ranking"])
    assert not (without.path / "tables" / "forecast_plans.parquet").exists()


def test_the_terminal_has_the_best(made: Run) -> None:
    done = CliRunner().invoke(app, ["forecast", str(made.path / "config.yaml")])
    assert done.exit_code == 0, done.exception
    assert "mixtures, best on average first" in done.output
    assert "a → b → c" in done.output


class Counter:
    """Counts the stages of plans and their trainings, and interrupts before one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.stop = list[str](), ""
        for name in ("virtual_mixtures", "virtual_sequences"):
            monkeypatch.setattr(plans, name, self.counting(name, getattr(plans, name)))

    def counting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            if name == self.stop:
                raise KeyboardInterrupt
            self.calls.append(name)
            return function(*args, **options)

        return counted


def test_interrupted_it_resumes_with_the_same_tables(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import interference.report

    counter, said = Counter(monkeypatch), list[str]()
    asked = request("ab")
    whole = Run.open(forecast(read(inputs, asked, tmp_path / "whole"), say=said.append))
    assert counter.calls == ["virtual_mixtures", "virtual_sequences"]
    assert "mixtures: training on a + b (3 of 3)" in said
    assert "orders: training on b, then a (4 of 4)" in said
    config = read(inputs, asked, tmp_path / "broken")
    counter.calls, counter.stop = [], "virtual_sequences"
    with pytest.raises(KeyboardInterrupt):
        forecast(config)
    counter.stop = ""
    with monkeypatch.context() as patch:
        patch.setattr(interference.report, "write_report", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            forecast(config)
    assert counter.calls == ["virtual_mixtures", "virtual_sequences"], "the second run took the mixtures from the first"
    broken = Run.open(forecast(config))
    assert len(counter.calls) == 2, "the third run computed nothing"
    for name in ("plans", "plan_ranking"):
        assert len(whole.forecast(name))
        pd.testing.assert_frame_equal(whole.forecast(name), broken.forecast(name))


def test_plans_follow_the_rewards(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verifier mended after an interruption: plans made of the old rewards are made again."""
    import sys

    counter, code = Counter(monkeypatch), tmp_path / "verifier_of_plans.py"
    text = "def f(prompts, completions, **columns):\n    return [{} for c in completions]\n"
    asked = request(
        sampling={"samples": 6, "max_new_tokens": 5},
        domains=[{"name": d, "prompts": f"{d}_prompts.jsonl", "verifier": "verifier_of_plans:f"} for d in "ab"],
    )
    config = read(inputs, asked, tmp_path / "run")
    code.write_text(text.format("1.0 - len(c.split()) % 2"))
    counter.stop = "virtual_sequences"
    with pytest.raises(KeyboardInterrupt):
        forecast(config, search_path=[tmp_path])
    old = pd.read_parquet(tmp_path / "run.part" / "cache" / "plans" / "mixture.parquet")
    code.write_text(text.format("float(len(c.split()) % 2)"))
    del sys.modules["verifier_of_plans"]
    counter.stop = ""
    found = Run.open(forecast(config, search_path=[tmp_path])).forecast("plans")
    assert counter.calls == ["virtual_mixtures", "virtual_mixtures", "virtual_sequences"]
    assert (found[found["kind"] == "mixture"]["predicted"].to_numpy() != old["predicted"].to_numpy()).all()


def test_what_rests_on_few_samples_is_a_note() -> None:
    table = pd.DataFrame(
        {"kind": ["mixture", "order", "order"], "plan": ["a", "a → b", "b → a"], "note": ["", "few", ""]}
    )
    (note,) = plans.notes_on_plans(table)
    assert note.startswith("plans: 1 of 2 orders end where fewer than 10 %")
    assert note.endswith("(a → b)")
    assert plans.notes_on_plans(table.iloc[:1]) == []
