"""The benchmark runs and records what it says; how fast anything is, is nothing a test asserts."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import jets, memory
from benchmarks.methods import Method, errors, methods, reference
from benchmarks.models import SIZES, lora_update, make
from interference.records import read_json

CPU = torch.device("cpu")
CONTROLLED = memory.states(CPU) == memory.STATES
glibc = pytest.mark.skipif(not CONTROLLED, reason="the states of memory are set through glibc")
MIB = 1 << 20
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    out = tmp_path_factory.mktemp("bench") / "jets.json"
    assert jets.main(["--size", "tiny", "--rounds", "1", "--out", str(out)]) == out
    loaded: dict[str, object] = read_json(out)
    return loaded


def test_the_record_has_every_method_and_key(record: dict) -> None:
    rows, settings = record["methods"], record["settings"]
    assert {"settings", "fastest", "methods", "git", "versions", "host", "peer"} <= record.keys()
    assert {"size", "shape", "parameters", "threads", "rounds", "states", "allocator", "command"} <= settings.keys()
    assert {row["family"] for row in rows} == {"forward", "gradient", "jvp", "hvp", "nested", "taylor"}
    names = [row["method"] for row in rows]
    assert ("HVP, curvlinops" in names) == bool(importlib.util.find_spec("curvlinops"))
    for row in rows:
        assert {"method", "updates", "peak_extra_bytes", "peak_over_forward", "peak_over_hvp"} <= row.keys()
        for timing in (row[state] for state in settings["states"]):
            assert len(timing["rounds_wall_s"]) == 1
            assert timing["wall_s"] == min(timing["rounds_wall_s"])
            assert {"cpu_s", "page_faults", "forwards_wall", "times_faster_than_hvp_cpu"} <= timing.keys()
    units = [r[s]["forwards_wall"] for r in rows for s in settings["states"] if r["family"] == "forward"]
    assert min(units) == 1.0


def test_every_method_is_right(record: dict) -> None:
    """On random float32 data: a wrong method cannot be fast unseen."""
    for row in record["methods"]:
        assert row["relative_error"], row["method"]
        assert max(row["relative_error"].values()) < 1e-3, row
    expected = {"taylor": {"logp", "d1", "d2", "fisher"}, "forward": {"logp"}, "gradient": {"d1"}, "jvp": {"d1"}}
    for row in record["methods"]:
        if row["family"] in expected:
            assert row["relative_error"].keys() == expected[row["family"]]
        if row["family"] == "hvp":
            assert "d2" in row["relative_error"]


def test_errors_see_a_wrong_number() -> None:
    truth = {"d2 0 0": torch.tensor([1.0, -4.0]), "d1 0": torch.tensor([1.0, 2.0])}
    assert errors({"d2 0 0": torch.tensor([1.5, -4.0])}, truth) == {"d2": 0.125}
    assert errors({"d2 0 0": torch.tensor(-3.3), "d1 0": torch.tensor(3.0)}, truth) == pytest.approx(
        {"d2": 0.1, "d1": 0.0}
    )
    assert errors({"d2 0 0": torch.tensor([1.0, float("nan")]), "d1 0": torch.tensor(3.0)}, truth)["d2"] is None


def test_a_wrong_sign_is_seen() -> None:
    """The Hessian of the loss is minus that of the log-probability; the row of curvlinops has to turn it."""
    case = make(SIZES["tiny"], CPU)
    row = next(m for m in methods(case, lora_update(case.model, 2)) if m.name == "HVP, double backward")
    numbers = row.read(row.run())
    assert errors({n: -x for n, x in numbers.items()}, numbers)["d2"] == pytest.approx(2.0)


def test_a_factored_update_has_its_own_reference() -> None:
    case = make(SIZES["tiny"], CPU)
    lora = lora_update(case.model, 2)
    row = next(m for m in methods(case, lora) if "LoRA" in m.name)
    found = errors(row.read(row.run()), reference(case, lora))
    assert found.keys() == {"logp", "d1", "d2", "fisher"}
    assert max(x for x in found.values() if x is not None) < 1e-4
    other = errors(row.read(row.run()), reference(case, {n: -c.dense() for n, c in lora.items()}))
    assert other["d1"] == pytest.approx(2.0, rel=1e-3)


def test_rounds_are_interleaved_and_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    chosen = [Method(n, "forward", 0, lambda n=n: calls.append(n), lambda r: {}) for n in "abc"]
    monkeypatch.setattr(memory, "enter", lambda state, device: None)
    timed = jets.time_rounds(chosen, "warm", 2, CPU)
    assert calls == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]  # one untimed round, two timed ones
    assert all(len(t["rounds_wall_s"]) == 2 for t in timed.values())


@glibc
@pytest.mark.parametrize("state", memory.STATES)
def test_only_fresh_memory_costs_page_faults(state: str) -> None:
    memory.enter(state, CPU)
    try:
        torch.ones(256 * MIB // 4)  # pages to find, with room for what glibc puts between two blocks
        work = lambda: torch.ones(64 * MIB // 4).sum()  # noqa: E731
        memory.sample(work, state, CPU)
        faults = memory.sample(work, state, CPU).page_faults
    finally:
        memory.enter("fresh", CPU)
    assert faults is not None
    assert (faults < 16) == (state == "warm")  # 64 MiB are 16384 pages, or 32 huge ones


@glibc
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
def test_the_peak_is_what_was_allocated() -> None:
    memory.enter("fresh", CPU)

    def work() -> torch.Tensor:
        return (torch.ones(96 * MIB // 4)[: MIB // 4] * 2).clone()  # 96 MiB at the peak, 1 MiB left

    peak, result = memory.peak_extra(work, CPU)
    assert result.shape == (MIB // 4,)
    assert peak is not None
    assert 96 * MIB <= peak < 112 * MIB


@glibc
def test_kept_memory_would_hide_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why peaks are measured after emptying: without it a call finds an earlier one's pages and seems to need none."""
    memory.enter("warm", CPU)
    monkeypatch.setattr(memory, "empty", lambda device: None)
    try:
        torch.ones(256 * MIB // 4)
        work = lambda: torch.ones(96 * MIB // 4).sum()  # noqa: E731
        hidden, _ = memory.peak_extra(work, CPU)
    finally:
        memory.enter("fresh", CPU)
    assert hidden is None or hidden < 16 * MIB


def test_where_the_peak_cannot_be_read_no_number_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "no" / "clear_refs")
    assert memory.peak_extra(lambda: 7, CPU) == (None, 7)


def test_the_geometry_benchmark_measures_every_side(tmp_path: Path) -> None:
    out = tmp_path / "geometry.json"
    command = ["-m", "benchmarks.geometry", "--size", "tiny", "--models", "2", "--rounds", "1", "--threads", "1"]
    command += ["--only", "read", "--only", "all", "--folder", str(tmp_path), "--out", str(out)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert set(found["sides"]) == {"read", "all"}
    assert all(side["wall_s"] > 0 and side["peak_mib"] > side["imports_mib"] / 2 for side in found["sides"].values())
    assert len(list((tmp_path / "tiny" / "base").glob("*.safetensors"))) == 1
