"""Figures of a geometry run draw what its tables say, in every shape, readably. Input is synthetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from synthetic_geometry import SHAPES, make_geometry
from test_figures import overlaps, texts

import figures
from figures import style
from figures.directions import SIDES, telling
from figures.masks import changed_by_place
from figures.pairs import RULES, models_of, pairs_of
from interference.errors import InputError
from interference.records import GEOMETRY, Run


@pytest.fixture(scope="module", params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run.open(make_geometry(tmp_path_factory.mktemp("run") / "r", **SHAPES[request.param]))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run.open(make_geometry(tmp_path_factory.mktemp("run") / "r"))


def drawn(run: Run) -> dict[str, Figure]:
    return {
        "sparsity": figures.sparsity_by_layer(run.geometry("norms"), run.results),
        "masks": figures.mask_overlap(run.geometry("masks"), run.results),
        "cosines": figures.update_cosine(run.geometry("cosines"), run.results),
        "angles": figures.angle_spectra(run.geometry("angles"), run.results, "left"),
        "neurons": figures.neuron_overlap(run.geometry("neuron_overlap"), run.results),
    }


def test_every_shape_is_drawn_readably(run: Run) -> None:
    for name, figure in drawn(run).items():
        assert overlaps(figure) == [], name
        assert min(t.get_fontsize() for t in texts(figure)) >= 8


def test_odd_names_stay_text(tmp_path: Path) -> None:
    run = Run.open(make_geometry(tmp_path / "r", **SHAPES["odd names"], layers=1))
    for name, figure in drawn(run).items():
        for path in figures.save(figure, tmp_path, name):
            assert path.stat().st_size > 1000
        ElementTree.parse(tmp_path / f"{name}.svg")


def test_the_same_record_gives_the_same_file(tmp_path: Path) -> None:
    run = Run.open(make_geometry(tmp_path / "r", models=("math", "code"), layers=1))
    for k in (1, 2):
        for name, figure in drawn(run).items():
            figures.save(figure, tmp_path / str(k), name)
    for path in (tmp_path / "1").glob("*.svg"):
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes(), path.name


def test_a_table_is_read_or_empty_or_refused(four: Run) -> None:
    for name, columns in GEOMETRY.items():
        assert tuple(four.geometry(name).columns) == columns
    with pytest.raises(InputError, match="did you mean 'cosines'"):
        four.geometry("cosine")


def test_a_run_without_a_table_has_an_empty_one(tmp_path: Path) -> None:
    run = Run.open(make_geometry(tmp_path / "r", holes=True))
    assert run.geometry("angles").empty
    assert tuple(run.geometry("angles").columns) == GEOMETRY["angles"]


@pytest.mark.parametrize("rule", RULES)
def test_a_panel_says_the_share_of_all_weights(four: Run, rule: str) -> None:
    norms = four.geometry("norms")
    figure = figures.sparsity_by_layer(norms, four.results, rule)
    tensors = norms[norms["scope"] == "tensor"]
    for ax, name in zip(figure.axes, models_of(four.results), strict=False):
        rows = tensors[tensors["model"] == name]
        share = 1 - (rows["numel"] * rows[f"sparsity_{rule}"]).sum() / rows["numel"].sum()
        assert ax.get_title() == f"{name}\n{style.percent(share)} changed"
    whole = norms[(norms["scope"] == "model") & (norms["model"] == "math")]
    first = tensors[tensors["model"] == "math"]
    if rule == "relative":  # the record's own whole agrees with the sum that the figure takes
        assert whole["sparsity_relative"].item() == pytest.approx(
            np.average(first["sparsity_relative"], weights=first["numel"])
        )


def test_darker_means_more_weights_changed(four: Run) -> None:
    figure = figures.sparsity_by_layer(four.geometry("norms"), four.results)
    shares = changed_by_place(four.geometry("norms"))
    columns = [t.get_text() for t in figure.axes[0].get_xticklabels()]
    assert columns == ["embedding", "norm", "q", "k", "v", "o", "gate", "up", "down", "head"]
    for ax, name in zip(figure.axes, models_of(four.results), strict=False):
        light = {}
        for patch in (p for p in ax.patches if isinstance(p, PathPatch)):
            for corners in patch.get_path().vertices.reshape(-1, 5, 2):
                light[int(corners[0, 0]), int(corners[0, 1])] = sum(patch.get_facecolor()[:3])
        rows = shares[(shares["model"] == name) & (shares["layer"] >= 0)]
        at = [light[columns.index(m), layer] for layer, m in zip(rows["layer"], rows["module"], strict=True)]
        order = np.argsort(rows["changed"].to_numpy())
        assert (np.diff(np.array(at)[order]) <= 1e-9).all()


def test_tensors_of_one_place_are_weighed_by_their_size() -> None:
    rows = [
        ("a", "tensor", 0, "experts", 300, 0.9),
        ("a", "tensor", 0, "experts", 100, 0.5),
        ("a", "model", -1, "", 400, 0.8),
    ]
    frame = pd.DataFrame(rows, columns=["model", "scope", "layer", "module", "numel", "sparsity_lpt"])
    found = changed_by_place(frame, "lpt")
    assert found["changed"].tolist() == pytest.approx([(30 + 50) / 400])
    with pytest.raises(InputError, match="known: relative, absolute, lpt"):
        changed_by_place(frame, "bits")


def squares(figure: Figure) -> dict[tuple[float, float], str]:
    return {(x - 0.5, y - 0.5): t.get_text() for t in figure.axes[0].texts for x, y in [t.get_position()]}


def hatched(figure: Figure) -> set[tuple[float, float]]:
    patches = [p for p in figure.axes[0].patches if isinstance(p, Rectangle) and p.get_hatch()]
    return {(p.get_x(), p.get_y()) for p in patches}


def test_the_overlaps_say_what_the_record_says(four: Run) -> None:
    masks = four.geometry("masks")
    figure = figures.mask_overlap(masks, four.results)
    written, marked = squares(figure), hatched(figure)
    rows = masks[(masks["scope"] == "model") & (masks["rule"] == "relative")]
    models = models_of(four.results)
    for row in rows.to_dict("records"):
        at = (models.index(row["a"]), models.index(row["b"]))
        inside = row["low"] <= row["jaccard"] <= row["high"]
        arrow = "" if inside else " ▲" if row["jaccard"] > row["high"] else " ▼"
        assert written[at] == f"{row['jaccard']:.2f}{arrow}\n({row['chance_stratified']:.2f})"
        assert (at in marked) == inside
        assert written[at[0], at[0]] == f"changes\n{style.percent(row['density_a'])}"
    assert 0 < len(marked) < 6
    assert len(written) == 6 + 4


def test_an_overlap_below_chance_points_down(four: Run) -> None:
    masks = four.geometry("masks").assign(jaccard=0.01)
    figure = figures.mask_overlap(masks, four.results)
    assert all("▼" in text for (x, y), text in squares(figure).items() if x != y)
    assert not hatched(figure)


def test_without_an_interval_nothing_is_called_beyond_chance(four: Run) -> None:
    masks = four.geometry("masks").assign(low=np.nan)
    figure = figures.mask_overlap(masks, four.results)
    assert len(hatched(figure)) == 6
    assert not any("▲" in text or "▼" in text for text in squares(figure).values())


def test_the_cosines_say_what_the_record_says(four: Run) -> None:
    cosines = four.geometry("cosines")
    figure = figures.update_cosine(cosines, four.results)
    written, marked = squares(figure), hatched(figure)
    models = models_of(four.results)
    rows = cosines[cosines["scope"] == "model"].to_dict("records")
    faces = {(p.get_x(), p.get_y()): p.get_facecolor() for p in figure.axes[0].patches if p.get_fill()}  # type: ignore[attr-defined]
    for row in rows:
        at = (models.index(row["a"]), models.index(row["b"]) - 1)
        star = "*" if abs(row["projected_mean"]) > style.Z90 / 16 else ""
        mean = style.signed(row["projected_mean"], 2)
        assert written[at] == f"{style.signed(row['cosine'], 3)}\n{mean}{star}\n±{row['projected_std']:.2f}"
        assert (at in marked) == (
            abs(row["cosine"]) <= style.Z90 / np.sqrt(row["numel"] if "numel" in row else row["null_std"] ** -2)
        )
        if abs(row["cosine"]) > 0.05:
            red, green, _ = faces[at][:3]
            assert (green > red) == (row["cosine"] > 0)  # teal or purple
    assert 0 < len(marked) < len(rows)


@pytest.mark.parametrize("side", SIDES)
def test_the_spectra_draw_medians_and_the_band_of_chance(four: Run, side: str) -> None:
    angles = four.geometry("angles")
    figure = figures.angle_spectra(angles, four.results, side)
    rows = angles[(angles["side"] == side) & (angles["a"] == "math") & (angles["b"] == "code")]
    ax = figure.axes[0]
    assert ax.get_title() == "math\nand code"
    lines = [found for found in ax.lines if to_rgb(found.get_color()) == to_rgb(style.SAME)]
    for line, column in zip(lines, ("cosine", "chance_cosine"), strict=True):
        expected = rows[rows["module"].isin(["q", "k", "v", "o"])].groupby("index")[column].median()
        np.testing.assert_allclose(np.asarray(line.get_ydata(), float), expected.to_numpy())
    band: Any = next(c for c in ax.collections if isinstance(c, PolyCollection))
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((rows["chance_cosine"].min(), rows["chance_cosine"].max()))
    with pytest.raises(InputError, match="known: left, right"):
        figures.angle_spectra(angles, four.results, "top")


def test_dots_stand_beside_chance_and_are_filled_beyond_it(four: Run) -> None:
    overlap = four.geometry("neuron_overlap")
    figure = figures.neuron_overlap(overlap, four.results)
    groups = [(kind, top) for kind in ("channel", "head", "key_value head") for top in (0.01, 0.1, 0.2)]
    names = ("channels", "heads", "key-value heads")  # no kind of the table is left out
    assert [ax.get_title() for ax in figure.axes] == [f"{name}\ntop {top} %" for name in names for top in (1, 10, 20)]
    states = set()
    for ax, (kind, top) in zip(figure.axes, groups, strict=True):
        rows = pairs_of(overlap[(overlap["kind"] == kind) & (overlap["top"] == top)], models_of(four.results))
        dots = [line for line in ax.lines if line.get_marker() == "o"]
        for dot, row in zip(dots, rows.values(), strict=True):
            assert float(np.asarray(dot.get_xdata()).item()) == row["jaccard"]
            filled = to_rgb(dot.get_markerfacecolor()) != to_rgb(style.PAPER)
            assert filled == (row["jaccard"] > row["high"] or row["jaccard"] < row["low"])
            states.add(filled)
        ticks = [float(np.asarray(line.get_xdata()).item()) for line in ax.lines if line.get_marker() == "|"]
        assert ticks == pytest.approx([top / (2 - top)] * 6)
    assert states == {True, False}


def test_one_update_has_no_pairs_and_says_so(tmp_path: Path) -> None:
    run = Run.open(make_geometry(tmp_path / "r", models=("math",)))
    for name, figure in drawn(run).items():
        said = " ".join(t.get_text() for t in texts(figure))
        assert ("recorded" in said) == (name != "sparsity")


def test_a_kind_that_is_not_known_is_drawn_under_its_own_name(four: Run) -> None:
    overlap = four.geometry("neuron_overlap").replace({"kind": {"head": "expert"}})
    titles = [ax.get_title().split("\n")[0] for ax in figures.neuron_overlap(overlap, four.results).axes]
    assert list(dict.fromkeys(titles)) == ["channels", "key-value heads", "expert"]
    few = figures.neuron_overlap(overlap[overlap["top"] == 0.1], four.results)
    assert len(few.axes) == 3


def test_a_subspace_that_is_the_whole_side_tells_nothing() -> None:
    rows = pd.DataFrame(
        {"overlap": [1.0, 0.9, 1.0], "chance": [1.0, 0.5, 0.5], "low": 0.4, "high": [0.9999999, 0.6, np.nan]}
    )
    assert telling(rows).tolist() == [False, True, False]


def test_a_matrix_whose_subspace_is_its_whole_side_is_not_in_the_medians(four: Run) -> None:
    angles = four.geometry("angles")
    whole = angles[angles["module"] == "q"].assign(module="k", tensor="whole", cosine=1.0, chance_cosine=1.0)
    both = [figures.angle_spectra(t, four.results) for t in (angles, pd.concat([angles, whole], ignore_index=True))]
    lines = [[np.asarray(line.get_ydata(), float) for ax in figure.axes for line in ax.lines] for figure in both]
    for without, with_whole in zip(*lines, strict=True):
        np.testing.assert_array_equal(without, with_whole)
    said = " ".join(t.get_text() for t in texts(figures.angle_spectra(whole, four.results)))
    assert "could tell anything" in said
