"""Parts of predicted changes: shares and concentration against closed forms, and figures that draw what the tables say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from synthetic import SHAPES, make_run

import figures
from figures import parts, style
from figures.data import cells_of, order, quantity
from interference.errors import InputError
from interference.records import Run


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run.open(make_run(tmp_path_factory.mktemp("run") / "r", updates=("math", "code", "qa")))


def panels(run: Run, figure: Figure) -> dict[tuple[str, str], Any]:
    updates, domains = order(run.results)
    return dict(zip([(u, d) for u in updates for d in domains], figure.axes, strict=False))


def squares(ax: Any) -> dict[tuple[int, float], tuple[float, ...]]:
    """Colour of every square by its column and the middle of its row."""
    out = {}
    for patch in (p for p in ax.patches if isinstance(p, PathPatch)):
        for corners in patch.get_path().vertices.reshape(-1, 5, 2):
            out[int(corners[0, 0]), float(corners[:4, 1].mean())] = patch.get_facecolor()[:3]
    return out


def title(ax: Any) -> str:
    return str(ax.get_title()).split("\n")[-1]


def test_every_panel_says_the_sum_of_its_parts(three: Run) -> None:
    table = three.attribution("modules")
    for objective in ("nll", "reward"):
        figure = figures.layer_module_heatmap(table, three.results, objective)
        cells = cells_of(three.results, objective).set_index(["update", "domain"])
        rows = (
            table[table["objective"] == objective].groupby(["update", "domain"])[["first", "second"]].sum().sum(axis=1)
        )
        for pair, ax in panels(three, figure).items():
            assert title(ax) == style.signed(rows[pair], 3) == style.signed(cells["predicted_second"][pair], 3)


@pytest.mark.parametrize("objective", ["nll", "reward"])
def test_blue_means_helped_in_every_square(three: Run, objective: str) -> None:
    table = three.attribution("modules", objective)
    figure = figures.layer_module_heatmap(table, three.results, objective)
    better = 1 if three.results["objectives"][objective]["better"] == "higher" else -1
    corner = figure.axes[6]  # lowest of the first column: the panel that names both axes
    columns = [t.get_text() for t in corner.get_xticklabels()]
    names = {t.get_text(): at for t, at in zip(corner.get_yticklabels(), corner.get_yticks(), strict=True)}
    assert columns == ["embedding", "norm", "q", "k", "v", "o", "gate", "up", "down", "head"]
    assert max(names, key=lambda name: names[name]) == "outside"
    for (update, domain), ax in panels(three, figure).items():
        cell = table[(table["update"] == update) & (table["domain"] == domain)]
        shown = squares(ax)
        assert len(shown) == len(cell) == 3 + 3 * 8  # blank where a layer has no embedding or head
        for row in cell.to_dict("records"):
            at = names["outside" if row["layer"] == parts.OUTSIDE else str(row["layer"])]
            middle = next(y for x, y in shown if x == columns.index(row["module"]) and abs(y - at) < 0.1)
            red, _, blue = shown[columns.index(row["module"]), middle]
            change = row["first"] + row["second"]
            if abs(change) > 2e-3:
                assert (blue > red) == (better * change > 0), row


def test_a_tied_embedding_is_named_as_both_and_stays_on_the_page(three: Run) -> None:
    table = (
        three.attribution("modules").query("module != 'head'").replace({"module": {"embedding": "embedding + head"}})
    )
    figure = figures.layer_module_heatmap(table, three.results, "nll")
    figure.draw_without_rendering()
    labels = figure.axes[6].get_xticklabels()
    assert [t.get_text() for t in labels][:2] == ["embedding + head", "norm"]
    below = max(ax.get_window_extent().y1 for ax in figure.axes[9:])  # the bar below all panels
    assert labels[0].get_window_extent().y0 > below
    assert figure.axes[6].get_window_extent().height > 0.6 * figure.dpi  # the name does not eat the panel


def test_the_scale_is_that_of_off_diagonal_parts_and_the_label_says_so(three: Run) -> None:
    table = three.attribution("modules", "reward")
    change = (table["first"] + table["second"]).abs()
    off = change[table["update"] != table["domain"]].max()
    assert change.max() > off
    bar = figures.layer_module_heatmap(table, three.results, "reward").axes[-1]
    assert bar.get_xticks()[[0, 1, -1]] == pytest.approx([-off, -off / 4, off])
    label = bar.get_xlabel()
    assert "ending at the largest off-diagonal part" in label
    assert "reward per prompt" in label
    assert "square root" in label
    # halfway from zero to the end stands a quarter of the end
    assert bar.transData.transform([off / 4, 0])[0] == pytest.approx(
        np.mean([bar.transData.transform([x, 0])[0] for x in (0, off)]), rel=1e-3
    )


def test_one_update_alone_keeps_the_scale_of_the_run(tmp_path: Path) -> None:
    run = Run.open(make_run(tmp_path / "r", updates=tuple("ab"), domains=tuple("abcdef"), objectives=("nll",)))
    table = run.attribution("modules")
    ends = {
        float(figures.layer_module_heatmap(table, run.results, "nll", u).axes[-1].get_xticks()[-1]) for u in ("a", "b")
    }
    assert len(ends) == 1


def test_many_layers_are_named_sparsely_and_outside_stays_readable(tmp_path: Path) -> None:
    run = Run.open(make_run(tmp_path / "r", **SHAPES["deep"]))
    figure = figures.layer_module_heatmap(run.attribution("modules"), run.results, "nll")
    figure.draw_without_rendering()
    ax = figure.axes[0]
    names = [t.get_text() for t in ax.get_yticklabels()]
    assert names[:2] == ["0", "4"]
    assert names[-1] == "outside"
    heights = [t.get_window_extent().y0 for t in ax.get_yticklabels()]
    assert min(np.diff(heights[::-1])) > 8 * figure.dpi / 72
    assert len(squares(ax)) == 36 * 8 + 3


def frame(changes: dict[str, list[float]], objective: str = "nll") -> pd.DataFrame:
    rows = [(objective, "m", d, c, 0.0) for d, values in changes.items() for c in values]
    return pd.DataFrame(rows, columns=["objective", "update", "domain", "first", "second"])


BOTH = {"objectives": {"nll": {"better": "lower"}, "reward": {"better": "higher"}}, "cells": []}


def test_harm_turns_with_the_objective_and_shares_are_of_the_harmful_sum() -> None:
    loss = parts.parts_of(frame({"a": [3.0, -4.0, 1.0], "b": [-1.0, np.nan]}), BOTH, "nll")
    assert loss["harm"].tolist() == [3.0, -4.0, 1.0, -1.0]
    assert loss["share"].tolist() == [0.75, 0.0, 0.25, 0.0]
    reward = parts.parts_of(frame({"a": [3.0, -4.0, 1.0]}, "reward"), BOTH, "reward")
    assert reward["harm"].tolist() == [-3.0, 4.0, -1.0]
    assert reward["share"].tolist() == [0.0, 1.0, 0.0]
    heads = frame({"a": [3.0, 1.0, 5.0]}).assign(kind=["query", "query", "key_value"])
    assert parts.parts_of(heads, BOTH, "nll")["share"].tolist() == [0.75, 0.25, 1.0]


def test_what_cancels_in_a_layer_is_no_damage_of_the_layer() -> None:
    cell = parts.parts_of(frame({"a": [3.0, -3.0, 1.0]}), BOTH, "nll").assign(layer=[0, 0, 1])
    assert parts.together(cell, "layer")["share"].tolist() == [0.0, 1.0]


def test_concentration_in_closed_form() -> None:
    planted = np.r_[np.full(990, -1e-3), np.full(10, 2.0)]
    found = parts.concentration(planted)
    assert found is not None
    assert (found.parts, found.half, found.top, found.top_share) == (1000, 5, 10, 1.0)
    even = parts.concentration(np.ones(200))
    assert even is not None
    assert (even.half, even.top, even.top_share) == (100, 2, pytest.approx(0.01))
    steep = parts.concentration(0.5 ** np.arange(1, 40))
    assert steep is not None
    assert steep.half == 1
    assert parts.concentration(-planted[:5] * 0) is None
    assert parts.concentration(-np.ones(3)) is None


@pytest.mark.parametrize("objective", ["nll", "reward"])
def test_the_curve_shows_how_concentrated_the_damage_is(three: Run, objective: str) -> None:
    channels = three.attribution("channels", objective)
    figure = figures.channel_concentration(channels, three.results, objective)
    better = 1 if three.results["objectives"][objective]["better"] == "higher" else -1
    for (update, domain), ax in panels(three, figure).items():
        cell = channels[(channels["update"] == update) & (channels["domain"] == domain)]
        harm = np.sort(np.clip(-better * (cell["first"] + cell["second"]), 0, None))[::-1]
        half = int(np.searchsorted(np.cumsum(harm), 0.5 * harm.sum())) + 1
        assert ax.get_title().split("\n")[-2] == f"half in {half} of {len(cell)}"
        dot = next(line for line in ax.lines if line.get_marker() == "s")
        assert dot.get_xdata()[0] == pytest.approx(half / len(cell))
        assert dot.get_ydata()[0] == pytest.approx(harm[:half].sum() / harm.sum())
        curve = next(line for line in ax.lines if len(line.get_xdata()) > 1 and line.get_linestyle() == "-")
        assert curve.get_ydata()[0] == pytest.approx(harm[0] / harm.sum())
        assert curve.get_ydata()[-1] == pytest.approx(1.0)
        assert (curve.get_color() == style.HURT) == (-better * (cell["first"] + cell["second"]).sum() > 0)


def test_cells_that_were_not_split_and_those_without_harm_say_so(three: Run) -> None:
    some = three.attribution("modules").query("domain != 'qa'")
    drawn = panels(three, figures.layer_module_heatmap(some, three.results, "nll"))
    assert {pair for pair, ax in drawn.items() if any(t.get_text() == "not split" for t in ax.texts)} == {
        pair for pair in drawn if pair[1] == "qa"
    }
    channels = three.attribution("channels").query("domain != 'qa'").assign(second=0.0)
    channels["first"] = np.where(channels["domain"] == "math", -1.0, 1.0)
    said = {
        pair: [t.get_text() for t in ax.texts]
        for pair, ax in panels(three, figures.channel_concentration(channels, three.results, "nll")).items()
    }
    assert said["code", "math"] == ["no harmful\nchannel"]
    assert said["math", "qa"] == ["not split"]
    assert said["math", "code"] == []


def test_the_worst_cell_is_the_most_hurt_off_diagonal_one(three: Run) -> None:
    for objective in ("nll", "reward"):
        cells, about = cells_of(three.results, objective), quantity(three.results, objective)
        table = parts.parts_of(three.attribution("modules"), three.results, objective)
        off = cells[cells["update"] != cells["domain"]].set_index(["update", "domain"])["predicted_second"]
        expected = off.idxmax() if objective == "nll" else off.idxmin()
        assert parts.worst(cells, table, about) == expected
        rest = table[(table["update"] != expected[0]) | (table["domain"] != expected[1])]
        assert parts.worst(cells, rest, about) not in (expected, None)  # only cells that were split
        assert parts.worst(cells, table[:0], about) is None


def test_tables_that_are_not_there_are_empty_and_unknown_ones_an_error(three: Run, tmp_path: Path) -> None:
    bare = Run.open(make_run(tmp_path / "r", layers=0))
    assert "attribution" not in bare.results
    for part in ("modules", "heads", "channels", "tokens"):
        assert bare.attribution(part).empty
        assert list(bare.attribution(part).columns) == list(three.attribution(part).columns)
        assert set(three.attribution(part, "reward")["objective"]) == {"reward"}
    with pytest.raises(InputError, match="did you mean 'channels'"):
        bare.attribution("chanels")
    with pytest.raises(InputError, match="did you mean 'reward'"):
        figures.layer_module_heatmap(three.attribution("modules"), three.results, "rewards")
    with pytest.raises(InputError, match="did you mean 'reward'"):
        figures.channel_concentration(three.attribution("channels"), three.results, "rewards")
    figures.layer_module_heatmap(bare.attribution("modules"), bare.results, "nll").draw_without_rendering()
