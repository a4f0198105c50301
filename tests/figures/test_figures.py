"""Figures draw what the records say, in every shape, readably. Input is synthetic; what is tested is the drawing."""

from __future__ import annotations

import copy
import doctest
import importlib
import pkgutil
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from matplotlib.text import Text
from synthetic import SHAPES, make_run

import figures
from figures import labels, style
from figures.data import cells_of
from interference.errors import InputError
from interference.records import Run


@pytest.fixture(scope="module", params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run.open(make_run(tmp_path_factory.mktemp("run") / "r", **SHAPES[request.param]))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run.open(make_run(tmp_path_factory.mktemp("run") / "r"))


def drawn(run: Run, objective: str) -> dict[str, Figure]:
    wide = run.results["updates"][0] if len(run.results["domains"]) > 5 else None
    return {
        "matrix": figures.interference_matrix(run.results, objective),
        "scatter": figures.predicted_against_measured(run.results, objective),
        "scoreboard": figures.predictor_scoreboard(run.results, objective),
        "curves": figures.change_along_update(run.curves(), run.results, objective, wide),
        "parts": figures.layer_module_heatmap(run.attribution("modules"), run.results, objective, wide),
        "channels": figures.channel_concentration(run.attribution("channels"), run.results, objective, wide),
    }


def texts(figure: Figure) -> list[Text]:
    return [t for t in figure.findobj(Text) if isinstance(t, Text) and t.get_visible() and t.get_text().strip()]


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts that cover each other by more than a pixel, and texts that leave the page (as ("out", text))."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    shown = [t for t in texts(figure) if t.get_rotation() in (0, 90)]
    ticks = {id(label) for ax in figure.axes for axis in (ax.xaxis, ax.yaxis) for label in out_of_view(ax, axis)}
    boxes = [(t.get_text(), t.get_window_extent(renderer).padded(-1)) for t in shown if id(t) not in ticks]
    page = figure.bbox
    found = [(a, b) for (a, x), (b, y) in combinations(boxes, 2) if x.overlaps(y)]
    return found + [("out", a) for a, x in boxes if x.x0 < -2 or x.y0 < -2 or x.x1 > page.x1 + 2 or x.y1 > page.y1 + 2]


def out_of_view(ax: Any, axis: Any) -> list[Text]:
    """Labels of ticks beyond the limits (matplotlib keeps them but does not draw them), and all of hidden axes."""
    low, high = sorted(axis.get_view_interval())
    slack = 1e-9 * (high - low)
    hidden = not ax.axison or not axis.get_visible()
    ticks = axis.get_major_ticks() + axis.get_minor_ticks()
    gone = [t for t in ticks if hidden or not low - slack <= t.get_loc() <= high + slack]
    return [label for t in gone for label in (t.label1, t.label2)]


def test_every_shape_is_drawn_readably(run: Run, tmp_path: Path) -> None:
    for objective in run.results["objectives"]:
        for name, figure in drawn(run, objective).items():
            assert overlaps(figure) == [], (objective, name)
            assert min(t.get_fontsize() for t in texts(figure)) >= 8
            for path in figures.save(figure, tmp_path, name):
                assert path.stat().st_size > 1000
            ElementTree.parse(tmp_path / f"{name}.svg")
    assert not list(tmp_path.glob("*.part"))


def test_the_overlap_test_can_fail() -> None:
    figure = style.new_figure(2)
    figure.text(0.5, 0.5, "one")
    figure.text(0.5, 0.5, "two")
    figure.text(0.99, 0.1, "beyond the page")
    assert overlaps(figure) == [("one", "two"), ("out", "beyond the page")]


def test_the_same_record_gives_the_same_file_and_leaves_settings_alone(tmp_path: Path) -> None:
    run = Run.open(make_run(tmp_path / "r", **SHAPES["one"]))
    before = dict(mpl.rcParams)
    for k in (1, 2):
        for name, figure in drawn(run, "reward").items():
            figures.save(figure, tmp_path / str(k), name)
    assert dict(mpl.rcParams) == before
    for path in (tmp_path / "1").glob("*.svg"):
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes(), path.name


def faces(figure: Figure, panel: int = 0) -> dict[tuple[float, float], tuple[float, ...]]:
    patches = [p for p in figure.axes[panel].patches if isinstance(p, Rectangle) and p.get_fill()]
    return {(p.get_x(), p.get_y()): p.get_facecolor()[:3] for p in patches}  # type: ignore[misc]


@pytest.mark.parametrize("objective", ["nll", "reward"])
def test_blue_means_helped(four: Run, objective: str) -> None:
    better = 1 if four.results["objectives"][objective]["better"] == "higher" else -1
    shown = faces(figures.interference_matrix(four.results, objective), panel=1)
    cells = cells_of(four.results, objective)
    for k, change in enumerate(cells["measured"]):
        red, _, blue = shown[(k % 4, k // 4)]
        if abs(change) > 0.02:
            assert (blue > red) == (better * change > 0), cells.iloc[k]


def test_the_matrix_says_what_the_record_says(four: Run) -> None:
    figure = figures.interference_matrix(four.results, "reward")
    cells = cells_of(four.results, "reward")
    for ax, value, error, sure in (
        (figure.axes[0], "predicted_second", "stderr", "certain"),
        (figure.axes[1], "measured", "measured_stderr", "detected"),
    ):
        at = {t.get_position(): t.get_text() for t in ax.texts}
        written = [at[column + 0.5, row + 0.5] for row in range(4) for column in range(4)]
        expected = [f"{v:+.3f}\n±{s:.3f}".replace("-", "−") for v, s in zip(cells[value], cells[error], strict=True)]
        assert written == expected
        patches = [p for p in ax.patches if isinstance(p, Rectangle)]
        assert sum(p.get_hatch() is not None for p in patches) == int((~cells[sure]).sum()) > 0
        assert sum(not p.get_fill() and p.get_hatch() is None for p in patches) == 4  # outlined: own cells


def test_cells_beyond_their_radius_have_a_corner(four: Run) -> None:
    for objective in four.results["objectives"]:
        figure = figures.interference_matrix(four.results, objective)
        cells = cells_of(four.results, objective)
        flagged = [(k % 4, k // 4) for k, beyond in enumerate(cells["beyond_radius"]) if beyond]
        corners = [p.get_xy()[1] for p in figure.axes[0].patches if isinstance(p, Polygon)]
        assert [(int(x), int(y)) for x, y in corners] == flagged
        assert 0 < len(flagged) < 16
        assert not [p for p in figure.axes[1].patches if isinstance(p, Polygon)]  # what was measured has no radius
        assert any(t.get_text().startswith("beyond its radius") for t in texts(figure))
    plain = copy.deepcopy(four.results)
    for cell in plain["cells"]:
        cell["beyond_radius"] = None  # cannot be judged
    figure = figures.interference_matrix(plain, "nll")
    assert not any(isinstance(p, Polygon) for p in figure.axes[0].patches)
    assert not any(t.get_text().startswith("beyond its radius") for t in texts(figure))


def test_the_curves_mark_the_radius_of_the_record(four: Run) -> None:
    figure = figures.change_along_update(four.curves(), four.results, "nll")
    cells = cells_of(four.results, "nll")
    for ax, (_, cell) in zip(figure.axes, cells.iterrows(), strict=True):
        at = [float(line.get_xdata()[0]) for line in vertical(ax)]  # type: ignore[index]
        assert at == ([cell["radius"]] if cell["radius_reason"] == "left" else [])


def test_own_cells_do_not_set_the_scale(four: Run) -> None:
    figure = figures.interference_matrix(four.results, "reward")
    cells = cells_of(four.results, "reward")
    off = cells[~cells["own"]][["measured", "predicted_second"]].abs().to_numpy().max()
    assert cells["measured"].abs().max() > off
    bar = figure.axes[-1]
    assert bar.get_xticks()[-1] == pytest.approx(off)


def test_the_scatter_puts_predicted_across_and_measured_up(four: Run) -> None:
    figure = figures.predicted_against_measured(four.results, "nll")
    cells = cells_of(four.results, "nll")
    ax = figure.axes[0]
    filled = [
        (float(line.get_xdata()[0]), float(line.get_ydata()[0]))  # type: ignore[index]
        for line in ax.lines
        if len(np.atleast_1d(line.get_xdata())) == 1 and line.get_color() == style.PREDICTORS["second_order"].color
    ]
    assert np.allclose(sorted(filled), sorted(zip(cells["predicted_second"], cells["measured"], strict=True)))
    assert ax.get_xlim() == ax.get_ylim()
    card = four.results["scorecards"]["nll"]["off_diagonal"]["second_order"]
    assert any(f"Spearman {card['spearman']:.2f}" in t.get_text() for t in texts(figure))


def test_every_number_in_the_scatter_leads_to_the_cell_that_its_key_names(four: Run) -> None:
    figure = figures.predicted_against_measured(four.results, "nll")
    cells = cells_of(four.results, "nll")
    off = cells[~cells["own"]].sort_values("measured", ascending=False)
    keys = [t.get_text() for t in figure.legends[0].get_texts()]
    assert keys == [f"{k}  {u}→{d}" for k, (u, d) in enumerate(zip(off["update"], off["domain"], strict=True), start=1)]
    ax = figure.axes[-1]
    numbers = [t for t in ax.texts if t.get_text().isdigit()]
    leaders = [line for line in ax.lines if line.get_color() == style.INK]
    assert [t.get_text() for t in numbers] == [str(k) for k in range(1, 13)]
    starts = [(line.get_xdata()[0], line.get_ydata()[0]) for line in leaders]  # type: ignore[index]
    assert np.allclose(starts, list(zip(off["predicted_second"], off["measured"], strict=True)))
    low, high = ax.get_xlim()
    for line, text in zip(leaders, numbers, strict=True):
        ends = np.array([line.get_xdata()[1], line.get_ydata()[1]])  # type: ignore[index]
        assert np.abs(ends - text.get_position()).max() < 0.04 * (high - low)


def test_a_scatter_that_cannot_name_all_says_so(tmp_path: Path) -> None:
    run = Run.open(make_run(tmp_path / "r", updates=tuple("abcde"), objectives=("nll",)))
    figure = figures.predicted_against_measured(run.results, "nll")
    cells = cells_of(run.results, "nll")
    clearest = cells[~cells["own"]].set_index(["update", "domain"])["measured"].abs().nlargest(12).index
    named = {t.get_text().split("  ")[1] for t in figure.legends[0].get_texts()}
    assert named == {f"{u}→{d}" for u, d in clearest}
    assert figure.legends[0].get_title().get_text().startswith("only the 12 of 20 cells that changed most are numbered")


def test_labels_find_free_places() -> None:
    frame = labels.around(0, 0, 200, 200)
    rng = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in rng.normal(0, 6, (12, 2))]
    obstacles = [labels.around(x, y, 6, 6) for x, y in points]
    sizes = [(8.0, 8.0)] * 12
    boxes = [labels.around(*c, 8, 8) for c in labels.place(points, sizes, obstacles, frame)]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert not any(box.overlaps(other) for box in boxes for other in obstacles)
    assert all(box.within(frame) for box in boxes)
    crowded = labels.place(points, sizes, [frame], frame)  # nothing is free, yet all are placed
    assert len(crowded) == 12


def test_the_shift_of_the_fresh_measurement_is_said(four: Run) -> None:
    figure = figures.change_along_update(four.curves(), four.results, "reward")
    diamonds = [line for line in figure.axes[0].lines if line.get_marker() == "D"]
    assert 1 < diamonds[0].get_xdata()[0] < 1.1  # type: ignore[index]
    assert "measured, fresh rollouts at alpha 1 (drawn to its right)" in [t.get_text() for t in texts(figure)]


def test_the_scoreboard_draws_chance_and_ideal(four: Run) -> None:
    figure = figures.predictor_scoreboard(four.results, "nll")
    panels = {ax.get_title(): ax for ax in figure.axes}
    levels = {title: {float(line.get_xdata()[0]) for line in vertical(ax)} for title, ax in panels.items()}  # type: ignore[index]
    assert levels == {
        **{"Spearman": {0.0, 1.0}, "Pearson": {0.0, 1.0}, "right sign": {0.5, 1.0}},
        **{"slope": {1.0}, "R²": {0.0, 1.0}, "coverage\n(sampling)": {0.9}, "coverage\n(truncation)": {0.9}},
    }
    drawn_slopes = [line for line in panels["slope"].lines if line.get_marker() not in ("None", None, "")]
    assert len(drawn_slopes) == 4  # baselines have no unit
    assert "<" in [line.get_marker() for line in panels["R²"].lines]  # R2 of -7.5 is beyond the axis
    covered = [line for line in panels["coverage\n(sampling)"].lines if line.get_marker() not in ("None", None, "")]
    assert len(covered) == 4  # a baseline's is another thing


def test_a_narrow_rank_interval_stands_out_from_its_marker(four: Run) -> None:
    results = copy.deepcopy(four.results)
    card = results["scorecards"]["nll"]["off_diagonal"]
    for name, scores in card.items():
        rank = scores["spearman"] if name in ("second_order", "first_order") else None
        ends = (None, None) if rank is None else (rank - 0.001, rank + 0.001)
        scores |= dict(zip(("spearman_low", "spearman_high"), ends, strict=True))
    figure = figures.predictor_scoreboard(results, "nll")
    drawn_in = [ax.get_title() for ax in figure.axes for line in ax.lines if line.get_marker() == "|"]
    assert drawn_in == ["Spearman"] * 2
    lines = figure.axes[0].lines
    caps = [line.get_markersize() for line in lines if line.get_marker() == "|"]
    assert min(caps) > 1.5 * max(line.get_markersize() for line in lines if line.get_marker() in "os^D")
    assert "90 % interval" in [t.get_text() for t in texts(figure)]
    for scores in card.values():
        scores |= {"spearman_low": None, "spearman_high": None}
    assert "90 % interval" not in [t.get_text() for t in texts(figures.predictor_scoreboard(results, "nll"))]


def vertical(ax: Any) -> list[Any]:
    return [line for line in ax.lines if len(set(line.get_xdata())) == 1 and len(line.get_xdata()) == 2]


def test_predictors_differ_without_colour() -> None:
    ours = [p for p in style.PREDICTORS.values() if p.ours]
    assert len({p.line for p in ours}) == len({p.marker for p in ours}) == len(ours)


def test_an_unknown_objective_is_one_clear_error(four: Run) -> None:
    for draw in (figures.interference_matrix, figures.predicted_against_measured, figures.predictor_scoreboard):
        with pytest.raises(InputError, match="did you mean 'reward'"):
            draw(four.results, "rewards")
    with pytest.raises(InputError):
        figures.change_along_update(four.curves(), four.results, "kl")


@pytest.mark.parametrize("module", [m.name for m in pkgutil.iter_modules(figures.__path__, "figures.")])
def test_examples_in_docstrings(module: str) -> None:
    assert doctest.testmod(importlib.import_module(module)).failed == 0
