"""Figures of a probe run draw what its tables say, in every shape, readably. Input is synthetic."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from synthetic_probe import SHAPES, change_of, make_probe, score_of
from test_figures import overlaps, texts

import figures
from figures import style
from figures.policies import looks
from interference.records import Run
from interference.report import behaviour_words, write_report
from interference.report.behaviour_tables import plain


@pytest.fixture(scope="module", params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run.open(make_probe(tmp_path_factory.mktemp("run") / "r", **SHAPES[request.param]))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run.open(make_probe(tmp_path_factory.mktemp("run") / "r"))


def drawn(run: Run) -> dict[str, Figure]:
    return {
        "divergences": figures.divergence_matrix(run.probe("kl"), run.probe("neighbors"), run.results),
        "kl_forecast": figures.kl_forecast_against_measured(run.probe("kl_forecast"), run.results),
        "skills": figures.skill_consistency(run.probe("consistency"), run.results),
        "verification": figures.outcome_against_process(run.probe("verification"), run.results),
        "horizon": figures.horizon_curve(run.probe("horizon"), run.results),
        "locus": figures.locus_of_error(run.probe("locus"), run.results),
    }


def test_every_shape_is_drawn_readably(run: Run) -> None:
    for name, figure in drawn(run).items():
        assert overlaps(figure) == [], name
        assert min(t.get_fontsize() for t in texts(figure)) >= 8, name


@pytest.mark.parametrize("shape", ["odd names", "holes"])
def test_odd_records_have_a_page(shape: str, tmp_path: Path) -> None:
    run = Run.open(make_probe(tmp_path / "r", **SHAPES[shape]))
    text = write_report(run.path).read_text()
    assert '<h2 id="locus"' in text
    assert "<b>bold" not in text
    made = {path.stem for path in (run.path / "figures").glob("*.svg")}
    assert {"probe_divergences", "probe_kl_forecast", "probe_skills", "probe_verification", "probe_locus"} <= made
    assert ("probe_horizon" in made) == (shape != "holes")


def test_odd_names_stay_text(tmp_path: Path) -> None:
    run = Run.open(make_probe(tmp_path / "r", **SHAPES["odd names"]))
    for name, figure in drawn(run).items():
        for path in figures.save(figure, tmp_path, name):
            assert path.stat().st_size > 1000
        ElementTree.parse(tmp_path / f"{name}.svg")


def test_nothing_recorded_is_said() -> None:
    results = {"models": ["a"], "kinds": {"a": "expert"}, "domains": ["a"]}
    empty = Run(Path("nowhere"), {}, {}, results)
    for name, figure in drawn(empty).items():
        assert len(texts(figure)) == 1, name


def test_divergences_beside_the_change_of_reward(four: Run) -> None:
    kl, near = four.probe("kl"), four.probe("neighbors")
    figure = figures.divergence_matrix(kl, near, four.results)
    titled = {ax.get_title(): ax for ax in figure.axes}
    panels = {"KL(row ‖ mixed)", "change of reward", "KL(row ‖ merged)", "KL(row ‖ base)"}
    assert panels <= set(titled)
    first, beside = titled["KL(row ‖ mixed)"].get_position(), titled["change of reward"].get_position()
    assert first.y0 == pytest.approx(beside.y0, abs=1e-6)
    assert first.x1 < beside.x0
    for reference in ("mixed", "merged", "base"):
        ax = titled[f"KL(row ‖ {reference})"]
        corners = [p for p in ax.patches if isinstance(p, Polygon)]
        rows = near[(near["reference"] == reference) & near["neighbor"].eq(True)]
        assert len(corners) == len(rows)
        filled = [c for c in corners if to_rgb(c.get_facecolor()) == to_rgb(style.INK)]
        assert len(filled) == int(rows["certain"].sum())
    said = {t.get_text() for t in titled["change of reward"].texts}
    assert style.signed(change_of("math", "math"), 2) in said
    # Hatched are exactly the divergences that k1 cannot tell from none: those of the policy qa.
    hatched = [p for p in titled["KL(row ‖ base)"].patches if p.get_hatch()]
    assert len(hatched) == 4


def test_skills_are_filled_where_they_are_beyond_their_null(four: Run) -> None:
    table = four.probe("consistency")
    left = figures.skill_consistency(table, four.results).axes[0]
    markers = {look.marker for name, look in looks(four.results).items() if name in ("mixed", "merged")}
    points = [line for line in left.lines if line.get_marker() in markers]
    assert len(points) == len(table)
    filled = [p for p in points if p.get_markerfacecolor() != style.PAPER]
    assert len(filled) == int(table["beyond_null"].sum()) > 0
    assert len(filled) < len(points)
    xs = sorted(float(np.asarray(p.get_xdata())[0]) for p in points)
    np.testing.assert_allclose(xs, np.sort(table["consistency"].astype(float)))


def test_outcome_stands_across_and_process_up(four: Run) -> None:
    figure = figures.outcome_against_process(four.probe("verification"), four.results)
    (ax,) = [ax for ax in figure.axes if ax.get_title() == "math"]
    look = looks(four.results)["math"]
    (point,) = [line for line in ax.lines if line.get_marker() == look.marker]
    assert tuple(np.ravel(point.get_xydata())) == pytest.approx(
        (score_of("math", "math", "outcome"), score_of("math", "math", "process"))
    )
    dashed = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert {float(np.ravel(line.get_ydata())[0]) for line in dashed} >= {0.5}
    one = four.probe("verification").query("mode == 'process'")
    assert "not both judged" in texts(figures.outcome_against_process(one, four.results))[0].get_text()


def test_horizons_start_at_chance_and_the_base_is_in_every_panel(four: Run) -> None:
    figure = figures.horizon_curve(four.probe("horizon"), four.results)
    known = looks(four.results)
    panels = [ax for ax in figure.axes if ax.lines]
    assert len(panels) == 6 * 4
    own = panels[0]  # math on math
    curves = {
        line.get_color(): line
        for line in own.lines
        if len(np.ravel(line.get_xdata())) == 3 and line.get_marker() == "None"
    }
    np.testing.assert_allclose(np.ravel(curves[known["math"].color].get_ydata()), [0.5, 0.7, 0.9])
    np.testing.assert_allclose(np.ravel(curves[known["base"].color].get_ydata()), 0.5)
    assert len(own.collections) == 2  # two bands


def test_bubbles_on_the_line_are_filled(four: Run) -> None:
    table = four.probe("locus")
    figure = figures.locus_of_error(table, four.results)
    rows = table[(table["model"] == "base") & (table["domain"] == "math") & table["step"].notna()]
    ax = figure.axes[0]
    bubbles = [line for line in ax.lines if line.get_marker() == "o"]
    area = {tuple(np.ravel(b.get_xydata()).tolist()): float(b.get_markersize()) ** 2 for b in bubbles}
    counts = rows.assign(height=rows["locus"].astype(float).fillna(6.3)).groupby(["step", "height"]).size()
    assert set(area) == {(float(s), float(h)) for s, h in counts.index}
    top = counts.idxmax()
    for place, count in counts.items():
        assert area[place] / area[top] == pytest.approx(count / counts[top], rel=0.05)
    for bubble in bubbles:
        x, y = np.ravel(bubble.get_xydata())
        assert (bubble.get_markerfacecolor() == style.PAPER) == (x != y)


def test_the_forecast_is_drawn_where_it_is_known(four: Run) -> None:
    table = four.probe("kl_forecast")
    table.loc[0, ["forecast", "measured"]] = np.nan
    ax = figures.kl_forecast_against_measured(table, four.results).axes[0]
    assert ax.get_xscale() == ax.get_yscale() == "log"
    markers = {look.marker for look in looks(four.results).values()} - {"o"}
    points = [line for line in ax.lines if line.get_marker() in markers]
    xy = sorted(tuple(np.ravel(p.get_xydata())) for p in points)
    known = pd.DataFrame(table[["forecast", "measured"]]).astype(float).dropna()
    np.testing.assert_allclose(xy, sorted(known.itertuples(index=False, name=None)))


def test_below_chance_has_a_mark_of_its_own(four: Run) -> None:
    table = four.probe("horizon")
    below = (table["model"] == "base") & (table["horizon"] == 1)
    table.loc[below, ["value", "low", "high"]] = [0.4, 0.35, 0.45]
    figure = figures.horizon_curve(table, four.results)
    marks = [line for line in figure.axes[0].lines if line.get_marker() == "v" and len(np.ravel(line.get_xdata()))]
    assert [tuple(np.ravel(m.get_xydata())) for m in marks] == [(1.0, 0.4)]
    assert "below chance" in {t.get_text() for t in texts(figure)}


def test_retained_skill_is_worded_with_its_interval(four: Run) -> None:
    row = four.probe("consistency").iloc[0]
    (said,) = behaviour_words.consistency(four.probe("consistency"))
    assert f"{row['retained']:.2f} ({plain(row['retained_low'], row['retained_high'])}) on {row['domain']}" in said
