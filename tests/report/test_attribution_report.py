"""The report on where predicted changes sit: sentences and tables that say what the records say, and text that stays text."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from synthetic import make_run
from synthetic_parts import PROMPTS, RESPONSES

from figures.data import cells_of, quantity
from figures.parts import cell_of, parts_of, worst
from interference.records import Run
from interference.report import attribution, tables, write_report
from interference.report.examples import (
    LEVELS,
    LONGEST_RESPONSE,
    UNDERLINED,
    examples,
    shorten,
    style_sheet,
    visible,
)

NAMES = ("math", "code")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run.open(make_run(tmp_path_factory.mktemp("run") / "r", updates=NAMES))


@pytest.fixture(scope="module")
def page(run: Run) -> str:
    return write_report(run.path).read_text(encoding="utf-8")


def parts(run: Run, part: str, objective: str) -> pd.DataFrame:
    return parts_of(run.attribution(part, objective), run.results, objective)


class Details(HTMLParser):
    """Collects the unfolded cells and, per cell, the spans of its responses."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.cells: list[dict[str, Any]] = []
        self.inside, self.where = False, ""
        self.attributes: set[str] = set()
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "details":
            self.cells.append({"open": "open" in found, "name": "", "tokens": []})
            self.inside = True
        if self.inside:
            self.attributes |= found.keys()
        self.where = tag if tag in ("summary", "span") else ""
        if self.inside and tag == "span" and "title" in found:
            self.cells[-1]["tokens"].append([found.get("class") or "", found["title"], ""])
            self.where = "token"

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "details"
        self.where = ""

    def handle_data(self, data: str) -> None:
        if self.where == "summary":
            self.cells[-1]["name"] += data.strip()
        elif self.where == "token":
            self.cells[-1]["tokens"][-1][2] += data


def test_a_run_without_parts_has_no_such_section(tmp_path: Path) -> None:
    report = write_report(make_run(tmp_path / "r", updates=("math", "code"), objectives=("nll",), layers=0))
    source = report.read_text()
    assert "Where the predicted change sits" not in source
    assert "<details" not in source
    assert not list((tmp_path / "r" / "figures").glob("*parts*"))


def test_a_run_with_modules_alone_still_reads(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", updates=("math", "code"), objectives=("nll",))
    for part in ("heads", "channels", "tokens"):
        (folder / "tables" / f"attribution_{part}.parquet").unlink()
    source = write_report(folder).read_text()
    assert "Where the predicted change sits" in source
    assert "MLP channels" not in source
    assert "Example responses" not in source
    assert (folder / "figures" / "nll_parts.svg").is_file()
    assert not (folder / "figures" / "nll_channels.svg").is_file()


def test_the_worst_cell_alone_is_unfolded(run: Run, page: str) -> None:
    cells = Details(page).cells
    assert len(cells) == 8
    for objective, there in zip(("nll", "reward"), (cells[:4], cells[4:]), strict=True):
        assert [c["name"] for c in there] == [f"{u} → {d}" for u in NAMES for d in NAMES]
        hurt = worst(
            cells_of(run.results, objective), parts(run, "modules", objective), quantity(run.results, objective)
        )
        assert hurt is not None
        assert [c["name"] for c in there if c["open"]] == [f"{hurt[0]} → {hurt[1]}"]


def test_text_stays_text(page: str) -> None:
    found = Details(page)
    assert found.attributes <= {"class", "title", "open", "dir", "tabindex", "role", "aria-label", "scope"}
    assert not re.search(r"<(script|b|i)\b", page.split("</style>")[1])
    assert html.escape(PROMPTS[0].split("\n")[0]) in page.replace("&#34;", "&quot;")
    for cell in found.cells:
        shown = [text for _, _, text in cell["tokens"]]
        assert len(shown) == sum(map(len, RESPONSES))
        assert {"<i>so</i>", "</span>", '" onclick="x', "⏎\n", "⏎\n⏎\n", "␣", "␣␣␣", "⇥", "⟨U+202E⟩", "[113]"} <= set(
            shown
        )
    hidden = {c for c in page if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")}
    assert hidden <= {"\n"}


def test_every_token_has_the_colour_of_its_harm_and_its_numbers(run: Run, page: str) -> None:
    cells = iter(Details(page).cells)
    for objective, sign in (("nll", 1), ("reward", -1)):
        tokens = run.attribution("tokens", objective)
        for update in NAMES:
            for domain in NAMES:
                cell = tokens[(tokens["update"] == update) & (tokens["domain"] == domain)]
                change = cell.sort_values(["rank", "position"])[["first", "second"]].sum(axis=1)
                end = np.quantile(change.abs(), 0.98)
                expected = [(c * sign > 0, min(LEVELS, round(LEVELS * abs(c) / end))) for c in change]
                kinds = [f"{'hurt' if harm else 'helped'}{level}" if level else "" for harm, level in expected]
                shown = next(cells)["tokens"]
                assert [kind for kind, _, _ in shown] == kinds
                assert len(set(kinds)) > 2
                signs = [about.startswith("−") for _, about, _ in shown if not about.startswith("0")]
                kept = [about[0] != "0" for _, about, _ in shown]
                assert signs == [c < 0 for c, k in zip(change, kept, strict=True) if k]


def test_harm_can_be_seen_without_colour() -> None:
    rules = dict(re.findall(r"\.(\w+) \{([^}]*)\}", style_sheet()))
    assert len(rules) == 2 * LEVELS
    for level in range(1, LEVELS + 1):
        assert ("underline solid" in rules[f"hurt{level}"]) == (level >= UNDERLINED)
        assert ("underline dotted" in rules[f"helped{level}"]) == (level >= UNDERLINED)


@pytest.mark.parametrize("objective", ["nll", "reward"])
def test_sentences_name_what_carries_the_damage(run: Run, objective: str) -> None:
    about, cells = quantity(run.results, objective), cells_of(run.results, objective)
    modules, channels = parts(run, "modules", objective), parts(run, "channels", objective)
    pair = worst(cells, modules, about)
    assert pair is not None
    text = " ".join(attribution.said(cells, modules, channels, about, pair))
    sign = 1 if objective == "nll" else -1
    raw = run.attribution("modules", objective)
    raw = raw[(raw["update"] == pair[0]) & (raw["domain"] == pair[1])]
    harm = sign * (raw["first"] + raw["second"])
    assert f"hurt most is {pair[0]} → {pair[1]}: " in text
    layers = harm.groupby(raw["layer"]).sum().clip(lower=0)
    kinds = harm.groupby(raw["module"]).sum().clip(lower=0)
    worst_layer = "outside the layers" if layers.idxmax() == -1 else f"in layer {layers.idxmax()}"
    assert f"by layer, {100 * layers.max() / layers.sum():.0f}\u00a0% sits {worst_layer}" in text
    assert f"by module, {100 * kinds.max() / kinds.sum():.0f}\u00a0% sits in {kinds.idxmax()}" in text
    mlp = run.attribution("channels", objective)
    mlp = mlp[(mlp["update"] == pair[0]) & (mlp["domain"] == pair[1])]
    falling = np.sort((sign * (mlp["first"] + mlp["second"])).clip(lower=0))[::-1]
    half = int(np.searchsorted(np.cumsum(falling), falling.sum() / 2)) + 1
    assert re.search(rf"\b{half} of {len(mlp)} MLP channels carr(y|ies) half of the damage", text)


def test_a_planted_layer_is_named_alone(run: Run) -> None:
    about, cells = quantity(run.results, "nll"), cells_of(run.results, "nll")
    table = run.attribution("modules", "nll")
    table["first"] = table["second"] = np.where(table["layer"] == 1, 0.5, 0.0)
    modules = parts_of(table, run.results, "nll")
    text = attribution.said(cells, modules, parts(run, "channels", "nll")[:0], about, ("math", "code"))
    assert "summed by layer, 100\u00a0% sits in layer 1; summed by module, " in text[1]
    assert len(text) == 2  # nothing on channels where there is no such record
    helped = parts_of(table.assign(first=-1.0, second=0.0), run.results, "nll")
    text = attribution.said(cells, helped, helped[:0], about, ("math", "code"))
    assert text[0].startswith("No off-diagonal cell that was split is predicted to get worse")
    assert text[1] == "No layer and no module does harm there."


def test_tables_show_the_most_harmful_parts(run: Run) -> None:
    for objective in ("nll", "reward"):
        cell = cell_of(parts(run, "channels", objective), "math", "code")
        table = tables.channels(cell, "units")
        top = cell[cell["harm"] > 0].sort_values("harm", ascending=False).head(tables.MOST)
        assert list(table.head[:2]) == ["layer", "channel"]
        assert [(int(r[0]), int(r[1])) for r in table.rows] == list(zip(top["layer"], top["channel"], strict=True))
        assert all(r[2].startswith("+" if objective == "nll" else "−") for r in table.rows)
        assert table.rows[-1][-1] == f"{100 * top['share'].sum():.0f}\u00a0%"
        assert all(len(r) == len(table.head) for r in table.rows)
        heads = tables.heads(cell_of(parts(run, "heads", objective), "math", "code"), "units")
        assert {r[0] for r in heads.rows} == {"query", "key-value"}
        assert all(len(r) == len(heads.head) for r in heads.rows)


def test_experts_are_named_where_there_are_any(run: Run) -> None:
    cell = cell_of(parts(run, "channels", "nll"), "math", "code")
    assert "expert" not in tables.channels(cell, "u").head
    assert list(tables.channels(cell.assign(expert=3), "u").head[:3]) == ["layer", "expert", "channel"]


def long_response(n: int) -> pd.DataFrame:
    change = np.full(n, 1e-6)
    change[-50:][:1] = 1.0
    row = {"update": "m", "domain": "a", "prompt_id": "p", "sequence": 0, "rank": 1, "prompt": "q", "text": "w"}
    frame = pd.DataFrame(
        [{**row, "token_id": 7, "position": k, "first": c, "second": 0.0} for k, c in enumerate(change)]
    )
    return frame.assign(sequence_first=change.sum(), sequence_second=0.0, change=change, harm=change)


def test_of_a_long_response_the_stretch_that_matters_is_shown(run: Run) -> None:
    about = quantity(run.results, "nll")
    found = examples(long_response(1000), about)
    assert found is not None
    one = found.shown[0]
    assert len(one.tokens) == LONGEST_RESPONSE
    assert sum(t.kind == f"hurt{LEVELS}" for t in one.tokens if "position 950" in t.about) == 1
    left = [int(s.split()[0]) for s in (one.before, one.after) if s]
    assert sum(left) == 1000 - LONGEST_RESPONSE
    short = examples(long_response(100), about)
    assert short is not None
    assert (short.shown[0].before, short.shown[0].after) == ("", "")
    assert examples(long_response(100)[:0], about) is None


def test_a_cell_where_nothing_moves_has_no_colour(run: Run) -> None:
    still = long_response(5).assign(first=0.0, change=0.0, harm=0.0)
    found = examples(still, quantity(run.results, "nll"))
    assert found is not None
    assert {t.kind for t in found.shown[0].tokens} == {""}


def test_a_token_without_text_shows_its_id(run: Run) -> None:
    for text in ("", None):
        found = examples(long_response(3).assign(text=text, prompt=None), quantity(run.results, "nll"))
        assert found is not None
        assert [t.text for t in found.shown[0].tokens] == ["[7]"] * 3
        assert found.shown[0].prompt == ""


def characters() -> Iterator[str]:
    yield from map(chr, range(0x3000))
    yield from ("\ufeff", "\ud800", "\U000e0001", "\u2066")


def test_nothing_invisible_is_left() -> None:
    shown = visible("".join(characters()))
    assert {c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} == {"\n"}
    assert visible("plain – ü 漢") == "plain – ü 漢"
    shown.encode()


def test_long_prompts_lose_their_middle() -> None:
    text = "".join(chr(0x4E00 + k) for k in range(1000))
    short = shorten(text, 100)
    assert short.startswith(text[:50])
    assert short.endswith(text[-50:])
    assert "[900 characters left out]" in short
    assert shorten(text, 1000) == text
