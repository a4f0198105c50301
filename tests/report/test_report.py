"""The report: one page that holds everything, says what the records say, and survives odd records."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic import SHAPES, make_run

from figures.data import cells_of, quantity
from interference.errors import InputError
from interference.records import Run
from interference.report import attribution, tables, words, write_report

ROOT = Path(__file__).parents[2]
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Collects what the tests ask about, and fails on tags that do not close."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.labels: list[str] = []
        self.scopes: list[str | None] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags[tag] += 1
        if "id" in found:
            self.ids[found["id"] or ""] += 1
        self.links += [v or "" for k, v in attrs if k in ("href", "src", "xlink:href", "srcset", "data", "action")]
        self.links += [f"#{ref}" for _, v in attrs for ref in re.findall(r"url\(#([^)]+)\)", v or "")]
        if tag == "svg":
            self.labels.append(found.get("aria-label") or "")
        if tag == "th":
            self.scopes.append(found.get("scope"))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module", params=[s for s in SHAPES if s != "eight"], ids=lambda name: name.replace(" ", "-"))
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(make_run(tmp_path_factory.mktemp("run") / "r", **SHAPES[request.param]))


def test_the_page_is_whole_and_self_contained(report: Path) -> None:
    page = Page(report.read_text())
    assert page.tags["script"] == page.tags["iframe"] == page.tags["link"] == page.tags["img"] == 0
    assert page.links
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"@import|url\((?!#)", report.read_text().split("</style>")[0])
    assert {link[1:] for link in page.links} <= page.ids.keys()
    assert max(page.ids.values()) == 1
    assert page.labels
    assert all(page.labels)
    assert all(scope in ("col", "row") for scope in page.scopes)


def test_the_page_names_everything_without_taking_markup_from_names(report: Path) -> None:
    run, page = Run.open(report.parent), Page(report.read_text())
    for name in (*run.results["updates"], *run.results["domains"], "an operation", "a note <i>with</i> markup"):
        assert name in page.text
    assert page.tags["b"] == page.tags["i"] == 0
    assert "None" not in page.text.replace("None.", "")
    assert not re.search(r"\bnan\b", page.text)


def test_figures_stand_beside_the_page_whole(report: Path) -> None:
    names = {path.name for path in (report.parent / "figures").iterdir()}
    for objective in Run.open(report.parent).results["objectives"]:
        assert {f"{objective}_matrix.svg", f"{objective}_matrix.png"} <= names
    assert {name.rsplit(".", 1)[1] for name in names} == {"svg", "png"}
    assert not list(report.parent.rglob("*.part"))


def test_drawing_again_changes_nothing(tmp_path: Path) -> None:
    report = write_report(make_run(tmp_path / "r", updates=("math", "code"), objectives=("nll",)))
    first, records = report.read_bytes(), (tmp_path / "r" / "results.json").read_bytes()
    assert write_report(tmp_path / "r").read_bytes() == first
    assert (tmp_path / "r" / "results.json").read_bytes() == records


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="finished run"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_curves_or_provenance_still_reads(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", objectives=("nll",))
    (folder / "tables" / "curves.parquet").unlink()
    (folder / "manifest.json").write_text("{}")
    results = json.loads((folder / "results.json").read_text())
    assert (
        "The second order stays within 10 %" in Page(write_report(folder).read_text()).text
    )  # the cells hold the radius
    for cell in results["cells"]:
        for key in [k for k in cell if "radius" in k or k.endswith("_total") or k.startswith(("third", "truncation"))]:
            del cell[key]
    (folder / "results.json").write_text(json.dumps(results))
    assert "how far the second order holds is unknown" in Page(write_report(folder).read_text()).text


def summary(run: Run, objective: str) -> str:
    cells, about = cells_of(run.results, objective), quantity(run.results, objective)
    cards = run.results["scorecards"].get(objective, {})
    return " ".join([*words.what_happened(cells, about), *words.how_well(cards, cells)])


@pytest.mark.parametrize("objective", ["nll", "reward"])
def test_the_summary_names_the_worst_and_the_best(tmp_path: Path, objective: str) -> None:
    run = Run.open(make_run(tmp_path / "r"))
    cells = cells_of(run.results, objective)
    off = cells[~cells["own"] & cells["detected"]]
    up, down = off.loc[off["measured"].idxmax()], off.loc[off["measured"].idxmin()]
    hurt, helped = (up, down) if objective == "nll" else (down, up)
    said = summary(run, objective)
    assert f"Most hurt: training on {hurt['update']} changes {hurt['domain']}'s" in said
    assert f"Most helped: training on {helped['update']} changes {helped['domain']}'s" in said
    card = run.results["scorecards"][objective]["off_diagonal"]["second_order"]
    assert f"Spearman {card['spearman']:.2f}" in said
    assert f"slope is {card['slope']:.2f}" in said
    assert "explains what was measured, in order, size and sign" in said


def test_the_summary_is_honest_when_the_prediction_is_bad(tmp_path: Path) -> None:
    run = Run.open(make_run(tmp_path / "r", error=1.0))
    said = summary(run, "nll")
    assert run.results["scorecards"]["nll"]["off_diagonal"]["second_order"]["spearman"] < 0.6
    assert "does not explain what was measured" in said


def test_a_better_baseline_is_admitted() -> None:
    card = {
        "second_order": {
            **{"spearman": 0.7, "slope": 1.0, "sign_accuracy": 1.0, "coverage": 0.5},
            **{"cells": 12, "cells_detectable": 9},
        },
        "kl": {"spearman": 0.8},
        "update_norm": {"spearman": None},
    }
    cells = cells_of({"objectives": {"nll": {}}, "cells": []}, "nll")
    said = " ".join(words.how_well({"off_diagonal": card}, cells))
    assert "KL(base, tuned) with Spearman 0.80, which ranks better than the second order" in said
    assert "right sign in 9 of the 9" in said
    assert "holds zero in 6 of 12 cells: it accounts for the choice of prompts, not for what a quadratic" in said
    assert said.startswith("The local theory explains part of what was measured: the order is only partly right.")


def test_a_strong_verdict_is_qualified_where_noise_does_not_explain_the_error(tmp_path: Path) -> None:
    run = Run.open(make_run(tmp_path / "r"))
    cells, cards = cells_of(run.results, "nll"), run.results["scorecards"]["nll"]
    cells["measured"] = np.where(cells["own"], 5.0, 1.25) * cells["predicted_second"]
    strong = {"spearman": 1.0, "slope": 1.1, "sign_accuracy": 1.0}
    cards["off_diagonal"]["second_order"] |= {**strong, "coverage": 0.25}
    verdict = words.how_well(cards, cells)[0]
    assert verdict.startswith("The local theory explains what was measured, in order, size and sign. But ")
    assert "in 9 of 12 off-diagonal cells: the median error is 20 % of the measured change." in verdict
    cards["off_diagonal"]["second_order"]["coverage"] = 0.85
    assert words.how_well(cards, cells)[0].endswith("size and sign.")


def test_the_page_says_what_the_comparison_tests(tmp_path: Path) -> None:
    for objective, same in (("nll", True), ("reward", False)):
        page = Page(write_report(make_run(tmp_path / objective, objectives=(objective,))).read_text())
        assert ("use the same sequences here" in page.text) == same
        assert ("on fresh rollouts, sampled for the measurement" in page.text) != same


def test_coverage_of_a_baseline_is_not_shown_as_ours(tmp_path: Path) -> None:
    card = Run.open(make_run(tmp_path / "r")).results["scorecards"]["nll"]["all"]
    table = tables.scores(card, "")
    shown = {row[0]: row[[h.startswith("coverage") for h in table.head].index(True)] for row in table.rows}
    assert shown["first order"] == "0.90"
    assert {shown[name] for name in ("KL(base, tuned)", "update norm")} == {"–\xa0*"}
    assert " * A baseline has no such interval." in table.note
    assert "sampling noise only" in table.note
    ours = tables.scores({"second_order": card["second_order"]}, "")
    assert "baseline" not in ours.note


def test_both_values_at_the_base_are_shown_where_they_differ(tmp_path: Path) -> None:
    run = Run.open(make_run(tmp_path / "r"))
    for objective in ("nll", "reward"):
        cells = cells_of(run.results, objective)
        assert list(tables.evidence(cells).head[2:4]) == ["before", "after"]
        same = tables.evidence(cells.assign(anchor_value=cells["before"]))
        assert ("before, prediction's data" in same.head) == (objective == "reward")
        table = tables.evidence(cells.assign(anchor_value=0.4375))
        assert list(table.head[2:5]) == ["before, prediction's data", "before, measured", "after"]
        assert {tuple(row[2:4]) for row in table.rows} == {("0.4375", "0.5000")}
        assert all(len(row) == len(table.head) for row in table.rows)


def test_nothing_measured_is_said(tmp_path: Path) -> None:
    report = write_report(make_run(tmp_path / "r", updates=("math", "code"), measured=False))
    text = Page(report.read_text()).text
    assert "Nothing was measured" in text
    assert "Scoreboard" not in text


def test_the_agreement_of_parts_and_totals_in_words(tmp_path: Path) -> None:
    run = Run.open(make_run(tmp_path / "r", updates=("math", "code"), objectives=("nll",)))
    rows = run.results["attribution"]
    plain = attribution.agreement(run, "nll")
    assert plain.endswith("differ by more than 2.5e−07 of |first| + |second| order.")
    rows[1] |= {"disagreement": None, "rounding": True}  # null: the total is zero
    found = attribution.agreement(run, "nll")
    assert found.startswith(plain)
    assert found.endswith(f"(1e-5 of their sizes): {rows[1]['update']} → {rows[1]['domain']}.")
    for row in rows:
        row["rounding"] = True
    assert attribution.agreement(run, "nll").startswith("Where the sequences' terms nearly cancel")


def test_the_radius_in_words() -> None:
    def cell(domain: str, radius: float | None, reason: str, judged: float = 2.0, beyond: bool | None = False) -> Any:
        out = {"objective": "nll", "update": "m", "domain": domain, "radius": radius, "radius_reason": reason}
        return {**out, "radius_judged": judged, "beyond_radius": beyond}

    def said(*cells: Any) -> list[str]:
        return words.how_far(cells_of({"objectives": {"nll": {}}, "cells": list(cells)}, "nll"), estimated=True)

    held = cell("a", 2.0, "held")
    assert said(held)[0].startswith("In every cell the radius is beyond the largest alpha tried (2)")
    lines = said(
        held, cell("b", 1.25, "left"), cell("c", 0.5, "left", beyond=True), cell("d", None, "ess", 0.0, None),
        cell("e", None, "noise", 0.71, None),
    )  # fmt: skip
    assert "up to the largest alpha tried (2) in 1 of 5 cells" in lines[0]
    assert lines[1] == "It leaves by more than 10 % and more than noise at alpha: m → c 0.50, m → b 1.25."
    assert lines[2] == "The radius ends before alpha 1, so the update itself lies beyond it: m → c."
    assert lines[3] == "It cannot be judged at any alpha, because the effective sample size falls below 10 %: m → d."
    assert lines[4] == "It cannot be judged beyond alpha 0.71, because sampling noise hides it: m → e."
    hidden = said(held, cell("f", 0.9, "left", 0.4, True))
    assert hidden[1].endswith("at alpha: m → f between 0.40 and 0.90.")
    assert hidden[2].startswith("Between two alphas: sampling noise hides")
    assert said(cell("a", None, "none"))[0].startswith("No radius was recorded")


def test_the_table_of_what_is_left_out(tmp_path: Path) -> None:
    cells = cells_of(Run.open(make_run(tmp_path / "r")).results, "nll")
    table = tables.left_out(cells, "nats")
    assert all(len(row) == len(table.head) for row in table.rows)
    shown = dict(zip(zip(cells["update"], cells["domain"], strict=True), table.rows, strict=True))
    for _, c in cells.iterrows():
        radius, beyond = shown[c["update"], c["domain"]][-2:]
        assert (radius, beyond) == (("0.800", "yes") if c["beyond_radius"] else ("> 1.50", "no"))
    hidden = cells.assign(radius=0.9, radius_reason="left", radius_judged=0.4, beyond_radius=True)
    assert {tuple(row[-2:]) for row in tables.left_out(hidden, "nats").rows} == {("0.400 to 0.900", "yes")}


def test_a_real_run_has_a_whole_report(demo_run: Path) -> None:
    page = Page((demo_run / "report.html").read_text())
    assert set(page.ids) >= {"nll", "reward", "asked", "provenance"}
    assert ".part" not in page.text


def test_importing_the_report_does_not_load_matplotlib() -> None:
    code = "import sys, interference.report; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
