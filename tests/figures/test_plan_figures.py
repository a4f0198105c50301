"""How plans are drawn, on made tables."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from synthetic_plans import ranking
from test_figures import overlaps, texts

import figures
from figures.plans import SHOWN, short

RESULTS = {"objectives": {"reward": {"unit": "reward per prompt", "better": "higher"}}}


def draw(table: pd.DataFrame, kind: str = "mixture") -> Figure:
    return figures.plan_ranking(table, RESULTS, kind)


def test_the_figure_draws_what_the_table_says() -> None:
    table = ranking([0.1, 0.3, 0.2], [0.05, -0.2, 0.0])
    ax = draw(pd.concat([table, ranking([9.0], [9.0], kind="order")])).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["p1", "p2", "p0"]
    low, high = ax.get_ylim()
    assert low > high, "best on top"
    marks = {c[0].get_marker(): c for c in ax.containers}
    for marker, what in (("o", "mean"), ("D", "worst")):
        points, _, (bars,) = marks[marker]
        np.testing.assert_allclose(points.get_xdata(), table[what])
        ends = np.array([segment[:, 0] for segment in bars.get_segments()])
        np.testing.assert_allclose(ends, table[[f"{what}_low", f"{what}_high"]])
    (ring,) = [line for line in ax.lines if line.get_marker() == "o" and line.get_markersize() == 9]
    assert ring.get_xdata()[0] == pytest.approx(0.05), "the plan whose worst domain does best"
    assert "(reward per prompt)" in ax.get_xlabel()
    assert any(list(line.get_xdata()) == [0, 0] for line in ax.lines), "zero is drawn"
    assert {"d0", "d1", "d2"} <= {t.get_text() for t in texts(ax.figure)}


LONG = ["math", "code", "question_answering", "creative-writing-long"]
SHAPES: dict[str, Any] = {
    "one": ([0.1], [0.0], ["a"]),
    "orders": (
        list(0.3 - 0.02 * np.arange(24)),
        list(-0.1 * np.arange(24)),
        [" → ".join(o) for o in permutations(LONG)],
    ),
    "many": (
        list(-0.01 * np.arange(80)),
        list(-0.01 * np.arange(80)),
        [f"0.25 math + 0.75 $x_{k}$" for k in range(80)],
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_can_be_read(shape: str, tmp_path: Path) -> None:
    means, worsts, names = SHAPES[shape]
    table = ranking(means, worsts, names=names)
    table.loc[::3, "note"] = "few effective samples"
    figure = draw(table)
    assert overlaps(figure) == []
    assert min(t.get_fontsize() for t in texts(figure)) >= 8
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert len(labels) == min(len(names), SHOWN)
    assert len(set(labels)) == len(labels)
    assert labels[0].endswith(" *")
    assert any(f"the best {SHOWN} of 80" in t.get_text() for t in texts(figure)) == (shape == "many")
    figures.save(figure, tmp_path, shape)


def test_no_plans_are_no_axes() -> None:
    assert "no orders" in " ".join(t.get_text() for t in texts(draw(ranking([0.1], [0.0]), "order")))


def test_names_are_shortened_apart() -> None:
    labels = {short(" → ".join(order)) for order in permutations(LONG)}
    assert len(labels) == 24
    assert max(map(len, labels)) <= 46
