"""Figures of routes and gradients draw what their tables say, in every shape, readably. Input is synthetic."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from synthetic_routes import SHAPES, make_routes
from test_figures import overlaps, texts

import figures
from figures import style
from figures.gradients import certain
from figures.routes import kinds_of, middle_top
from interference.records import PROBES, Run


@pytest.fixture(scope="module", params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run.open(make_routes(tmp_path_factory.mktemp("run") / "r", **SHAPES[request.param]))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run.open(make_routes(tmp_path_factory.mktemp("run") / "r"))


def drawn(run: Run) -> dict[str, Figure]:
    overlap, direction = run.probe("route_overlap"), run.probe("route_direction")
    return {
        "overlap": figures.route_overlap(overlap, run.results),
        "expert": figures.route_overlap(overlap, run.results, str(run.results["models"][0])),
        "direction": figures.route_direction(direction, run.results),
        "signs": figures.route_direction(direction, run.results, "sign_agreement"),
        "gradients": figures.gradient_cosine(run.probe("gradient_agreement"), run.results),
    }


def test_every_shape_is_drawn_readably(run: Run) -> None:
    for name, figure in drawn(run).items():
        assert overlaps(figure) == [], name
        assert min(t.get_fontsize() for t in texts(figure)) >= 8


def test_odd_names_stay_text(tmp_path: Path) -> None:
    run = Run.open(make_routes(tmp_path / "r", **SHAPES["odd names"]))
    for name, figure in drawn(run).items():
        for path in figures.save(figure, tmp_path, name):
            assert path.stat().st_size > 1000
        ElementTree.parse(tmp_path / f"{name}.svg")


def marks(ax: Axes, marker: str) -> list[tuple[float, float, bool]]:
    """Place and fill of the points with a marker."""
    return [
        (float(x), float(y), line.get_markerfacecolor() not in (style.PAPER, "none"))
        for line in ax.lines
        if line.get_marker() == marker
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)  # type: ignore[arg-type]
    ]


def test_overlaps_stand_at_their_place_beside_chance_and_control(four: Run) -> None:
    table = four.probe("route_overlap")
    figure = figures.route_overlap(table, four.results)
    here = table[
        (table["model"] == "base") & (table["scope"] == "model") & (table["kind"] == "head") & (table["top"] == 0.2)
    ]
    ax = next(ax for ax in figure.axes[3:] if ax.get_subplotspec().colspan.start == 1)  # type: ignore[union-attr]
    names = [label.get_text() for label in figure.axes[3].get_yticklabels()]
    assert names[:2] == ["math – code", "math – qa"]
    across = here[here["a"] != here["b"]]
    dots = marks(ax, "o")
    assert [x for x, _, _ in dots] == pytest.approx(across["jaccard"].tolist())
    assert [y for _, y, _ in dots] == list(range(6))
    assert [full for *_, full in dots] == [
        not low <= x <= high for x, low, high in across[["jaccard", "chance_low", "chance_high"]].to_numpy()
    ]
    own = here[here["a"] == here["b"]].set_index("a")["jaccard"]
    assert sorted(x for x, y, _ in marks(ax, "^") if y == 0) == pytest.approx(sorted([own["math"], own["code"]]))
    assert [x for x, _, _ in marks(ax, "|")] == pytest.approx(across["chance"].tolist())


def test_directions_stand_beside_random_routes_and_the_whole(four: Run) -> None:
    table = four.probe("route_direction")
    ax = figures.route_direction(table, four.results).axes[0]
    rows = table[(table["layer"] == -1) & (table["top"] == 0.1)]
    assert [x for x, _, _ in marks(ax, "o")] == pytest.approx(rows.loc[rows["kind"] == "channel", "cosine"].tolist())
    assert [x for x, _, _ in marks(ax, "D")] == [0.1] * 6
    assert {bool(full) for *_, full in marks(ax, "o")} == {True, False}


def test_modules_stand_at_their_cosine_and_are_full_beyond_noise(four: Run) -> None:
    table = four.probe("gradient_agreement")
    figure = figures.gradient_cosine(table, four.results)
    ax = figure.axes[0]
    rows = table[(table["a"] == "math") & (table["b"] == "code")]
    parts = rows[rows["scope"] == "part"]
    dots = marks(ax, "o")
    assert sorted(x for x, _, _ in dots) == pytest.approx(sorted(parts["cosine"]))
    assert sum(full for *_, full in dots) == int(certain(parts).sum()) > 0
    assert [(x, y, full) for x, y, full in marks(ax, "D")] == [(pytest.approx(0.01), 0.0, False)]
    named = [label.get_text() for label in ax.get_yticklabels()]
    at = {y: named[k] for k, y in enumerate(ax.get_yticks())}
    for value, place, _ in dots:
        assert np.isclose(parts.loc[parts["module"] == at[place], "cosine"], value).any()


def test_what_is_beyond_noise() -> None:
    rows = pd.DataFrame(
        {
            "cosine": [0.3, 0.3, 0.05, -0.3, np.nan],
            "lowest": [0.1, -0.1, 0.04, -0.4, np.nan],
            "highest": [0.5, 0.7, 0.06, -0.2, np.nan],
            "noise_floor": [0.1, 0.1, 0.1, 0.1, 0.1],
        }
    )
    assert certain(rows).tolist() == [True, False, False, True, False]


def test_nothing_recorded_is_said() -> None:
    empty = {name: pd.DataFrame(columns=list(PROBES[name])) for name in PROBES}
    results = {"domains": ["a"], "models": ["a"]}
    for figure in (
        figures.route_overlap(empty["route_overlap"], results),
        figures.route_direction(empty["route_direction"], results),
        figures.gradient_cosine(empty["gradient_agreement"], results),
    ):
        assert [t.get_text()[:2] for t in texts(figure)] == ["no"]
    assert kinds_of(pd.DataFrame({"kind": ["all", "head", "channel", "odd"]})) == ["channel", "head", "odd"]
    assert middle_top(pd.DataFrame({"top": [0.3]})) == 0.3


def test_every_column_of_overlaps_has_numbers_below_it(four: Run) -> None:
    """Of few heads several shares are one set, so that channels have panels with none below them."""
    table = four.probe("route_overlap")
    of_heads = table["kind"] == "head"
    table = table.assign(share=table["share"].where(~of_heads, 0.25))
    figure = figures.route_overlap(table, four.results)
    figure.draw_without_rendering()
    panels = [ax for ax in figure.axes if ax.get_visible()]
    assert len(panels) == 4
    for ax in panels:
        assert [label.get_text() for label in ax.get_xticklabels() if label.get_visible()] == ["0", "0.5", "1"]
