"""The page of a geometry run: whole, self-contained, and says what the tables say. Input is synthetic."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
from synthetic_geometry import SHAPES, make_geometry
from test_report import Page

from interference.errors import InputError
from interference.records import Run
from interference.report import geometry_tables as tables
from interference.report import geometry_words as words
from interference.report import write_report


@pytest.fixture(scope="module", params=["four", "one", "odd names", "holes"], ids=lambda name: name.replace(" ", "-"))
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(make_geometry(tmp_path_factory.mktemp("run") / "r", **SHAPES[request.param]))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run.open(make_geometry(tmp_path_factory.mktemp("run") / "r"))


def test_the_page_is_whole_and_self_contained(report: Path) -> None:
    page = Page(report.read_text())
    assert report.read_text().startswith("<!doctype html>")
    assert page.tags["script"] == page.tags["iframe"] == page.tags["link"] == page.tags["img"] == 0
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"@import|url\((?!#)", report.read_text().split("</style>")[0])
    assert {link[1:] for link in page.links} <= page.ids.keys()
    assert max(page.ids.values()) == 1
    assert all(page.labels)
    assert set(page.ids) >= {"summary", "size", "spectra", "audits", "asked", "provenance"}


def test_the_page_names_everything_without_taking_markup_from_names(report: Path) -> None:
    run, page = Run.open(report.parent), Page(report.read_text())
    for name in (*run.results["models"], "a note <i>with</i> markup"):
        assert name in page.text
    assert page.tags["b"] == page.tags["i"] == 0
    assert "None" not in page.text.replace("None.", "")
    assert not re.search(r"\bnan\b", page.text)


def test_figures_stand_beside_the_page(report: Path) -> None:
    run = Run.open(report.parent)
    names = {path.name for path in (report.parent / "figures").iterdir()}
    of = {
        "sparsity": "norms",
        "masks": "masks",
        "cosines": "cosines",
        "angles_left": "angles",
        "neurons": "neuron_overlap",
    }
    for name, table in of.items():
        there = {f"geometry_{name}.svg", f"geometry_{name}.png"} <= names
        assert there == (len(run.geometry(table)) > 0), name
    assert not list(report.parent.rglob("*.part"))


def test_drawing_again_changes_nothing(tmp_path: Path) -> None:
    report = write_report(make_geometry(tmp_path / "r", models=("math", "code"), layers=1))
    first = report.read_bytes()
    assert write_report(tmp_path / "r").read_bytes() == first


def test_a_run_of_another_command_is_refused(tmp_path: Path) -> None:
    folder = make_geometry(tmp_path / "r", models=("math",), layers=1)
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**results, "command": "geometri"}))
    with pytest.raises(InputError, match="did you mean 'geometry'"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_a_run_with_no_tables_at_all_still_has_a_page(tmp_path: Path) -> None:
    folder = make_geometry(tmp_path / "r", models=("math", "code"), layers=1)
    for path in (folder / "tables").iterdir():
        path.unlink()
    (folder / "manifest.json").write_text("{}")
    assert "found nothing" in Page(write_report(folder).read_text()).text


def test_the_summary_says_what_the_tables_say(four: Run) -> None:
    models = four.results["models"]
    masks, norms, cosines = four.geometry("masks"), four.geometry("norms"), four.geometry("cosines")
    page = Page(write_report(four.path).read_text()).text
    for line in (*words.sizes(norms), *words.masks(masks, models), *words.cosines(cosines, models)):
        assert line in page
    rows = masks[(masks["scope"] == "model") & (masks["rule"] == "relative")]
    above = rows[rows["jaccard"] > rows["high"]]
    best = above.loc[(above["jaccard"] - above["chance_stratified"]).idxmax()]
    said = " ".join(words.masks(masks, models))
    assert said.startswith(f"Of 6 pairs, {len(above)} share more changed weights than chance gives.")
    assert f"Most beyond it are {best['a']} and {best['b']}: Jaccard {best['jaccard']:.2f} where chance" in said
    whole = cosines[cosines["scope"] == "model"]
    top = whole.loc[whole["cosine"].abs().idxmax()]
    assert f"The largest cosine is that of {top['a']} and {top['b']}" in words.cosines(cosines, models)[0]
    assert "They change 12 % (math) to" in words.sizes(norms)[1] or "(math) to" in words.sizes(norms)[1]


def test_nothing_beyond_chance_is_said_plainly(four: Run) -> None:
    models = four.results["models"]
    masks = four.geometry("masks")
    plain = masks.assign(jaccard=masks["chance_stratified"])
    assert words.masks(plain, models) == ["Of 6 pairs, 0 share more changed weights than chance gives."]
    below = masks.assign(jaccard=0.0)
    assert words.masks(below, models) == ["Of 6 pairs, 0 share more changed weights than chance gives; 6 fewer."]
    none = four.geometry("cosines").assign(cosine=0.0)
    assert words.cosines(none, models) == ["No cosine of 6 pairs is beyond what unrelated directions give."]


def test_opposed_updates_are_named(four: Run) -> None:
    cosines = four.geometry("cosines").assign(cosine=0.5)
    cosines.loc[(cosines["a"] == "code") & (cosines["b"] == "qa"), "cosine"] = -0.25
    said = words.cosines(cosines, four.results["models"])
    assert said[1] == "Most opposed are code and qa with −0.250."


def test_the_modules_table_adds_up_tensors(four: Run) -> None:
    norms = four.geometry("norms")
    lengths, shares = tables.by_module(norms, four.results["models"])
    rows = norms[(norms["scope"] == "tensor") & (norms["model"] == "code") & (norms["module"] == "q")]
    assert len(rows) == 3
    column = list(lengths.head).index("code")
    length = ((rows["norm"] ** 2).sum() / (rows["base_norm"] ** 2).sum()) ** 0.5
    changed = (rows["numel"] * (1 - rows["sparsity_relative"])).sum() / rows["numel"].sum()
    found = [next(row[column] for row in table.rows if row[0] == "q") for table in (lengths, shares)]
    assert found == [tables.percent(length), tables.percent(changed)]
    assert [row[0] for row in lengths.rows] == ["embedding", "norm", "q", "k", "v", "o", "gate", "up", "down", "head"]


def test_every_table_is_rectangular_and_complete(four: Run) -> None:
    models = four.results["models"]
    made = {
        "sizes": (tables.sizes(four.geometry("norms"), models), 4),
        "masks": (tables.masks(four.geometry("masks"), models), 6 * 4),
        "consensus": (tables.consensus(four.geometry("consensus")), 5),
        "cosines": (tables.cosines(four.geometry("cosines"), models), 6),
        "subspaces": (tables.subspaces(four.geometry("subspaces"), models), 6 * 3 * 2),
        "spectra": (tables.spectra(four.geometry("spectra"), models), 4 * 3),
        "neurons": (tables.neurons(four.geometry("neuron_overlap"), models), 6 * 9),
        "audits": (tables.audits(four.geometry("audits")), 2),
    }
    for name, (table, rows) in made.items():
        assert len(table.rows) == len(table.marks) == rows, name
        assert all(len(row) == len(table.head) for row in table.rows), name


def test_grave_findings_come_first_and_are_announced(tmp_path: Path) -> None:
    folder = make_geometry(tmp_path / "r", models=("math", "code"), layers=1)
    rows = [("math", "dtype", s, f"t{k}", "what") for k, s in enumerate(["note"] * 300 + ["warning", "fatal", "fatal"])]
    found = pd.DataFrame(rows, columns=["model", "check", "severity", "tensor", "message"])
    table = tables.audits(found)
    assert [row[2] for row in table.rows[:4]] == ["fatal", "fatal", "warning", "note"]
    assert table.marks[:4] == ["fatal", "fatal", "warning", "note"]
    assert len(table.rows) == tables.MOST
    assert table.note.startswith("103 more")
    found.to_parquet(folder / "tables" / "geometry_audits.parquet", index=False)
    text = Page(write_report(folder).read_text()).text
    assert "The checks of the checkpoints have 2 fatal findings and 1 warning" in text
    assert words.audits(found[:300]) == []


def test_an_update_that_changes_nothing_has_dashes_and_no_verdict(tmp_path: Path) -> None:
    """Where a checkpoint equals its base, cosines and overlaps have no value."""
    folder = make_geometry(tmp_path / "r", models=("math", "same", "code"), layers=1)
    for name, columns in {
        "masks": ["jaccard", "chance", "chance_stratified", "low", "high", "overlap_a", "overlap_b"],
        "cosines": ["cosine", "sign_agreement", "sign_low", "sign_high", "projected_mean", "projected_std"],
        "subspaces": ["overlap", "largest_angle_deg", "smallest_angle_deg"],
        "angles": ["cosine"],
        "neuron_overlap": ["jaccard"],
    }.items():
        path = folder / "tables" / f"geometry_{name}.parquet"
        table = pd.read_parquet(path)
        table.loc[(table["a"] == "same") | (table["b"] == "same"), columns] = float("nan")
        table.to_parquet(path, index=False)
    norms = pd.read_parquet(folder / "tables" / "geometry_norms.parquet")
    norms.loc[norms["model"] == "same", ["norm", "relative_norm", "largest"]] = 0.0
    norms.loc[norms["model"] == "same", [c for c in norms if c.startswith(("sparsity", "identical"))]] = 1.0
    norms.to_parquet(folder / "tables" / "geometry_norms.parquet", index=False)
    text = Page(write_report(folder).read_text()).text
    assert not re.search(r"\bnan\b", text)
    assert "They change 0\xa0% (same) to" in text
    assert "Of 1 pair, 1 shares more changed weights than chance gives." in text


def test_subspaces_that_fill_their_side_have_no_verdict(four: Run) -> None:
    table = four.geometry("subspaces")
    whole = table["module"].isin(["q", "k", "v", "o"])
    table.loc[whole, ["overlap", "chance", "low", "high"]] = [
        1.0000002,
        1.0,
        1.0,
        1.0000001,
    ]  # k is the whole side: rounding
    shown = tables.subspaces(table, four.results["models"])
    column = list(shown.head).index("matrices above their 90\u00a0% interval")
    for row in shown.rows:
        assert (row[column] == "–") == (row[2] == "attention")
    assert not any("attention" in line for line in words.subspaces(table))


def test_the_replay_is_a_command_of_the_shell(tmp_path: Path) -> None:
    folder = make_geometry(tmp_path / "r", models=("math", "it's code"), layers=1)
    text = Page(write_report(folder).read_text()).text
    command = next(line for line in text.splitlines() if line.startswith("interference geometry"))
    expected = ["interference", "geometry", "base", "math=rl_0", "it's code=rl_1", "--output", str(folder)]
    assert shlex.split(command) == [*expected, "--seed", "0", "--subspace", "8"]


def test_no_pair_is_called_the_most_alike_where_none_is_beyond_chance(four: Run) -> None:
    overlap = four.geometry("neuron_overlap")
    said = words.neurons(overlap.assign(jaccard=overlap["chance"]), four.results["models"])
    assert said[0] == "Of the 10\xa0% of channels changed most, 0 of 6 pairs share more than chance."
    assert any("; most " in line for line in words.neurons(overlap, four.results["models"]))
