"""The page's sections on routes and gradients: every shape is written, and sentences count what the tables hold."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic_routes import SHAPES, make_routes

from figures.gradients import certain
from interference.probes.routes import Routes, route_overlap
from interference.records import Run
from interference.report import behaviour_routes as routes
from interference.report import write_report


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_a_page(tmp_path: Path, shape: str) -> None:
    run = make_routes(tmp_path / "r", **SHAPES[shape])
    text = write_report(run).read_text()
    ids = set(re.findall(r' id="([^"]+)"', text))
    assert "routes" in ids
    assert ("gradients" in ids) == (shape not in ("one", "holes"))
    plain = re.sub(r"<[^>]+>", " ", text)
    assert not re.search(r"\b(nan|np\.float64)\b", plain)
    assert "<b>bold" not in text
    assert write_report(run).read_text() == text


def test_sentences_count_what_is_beyond_chance(tmp_path: Path) -> None:
    run = Run.open(make_routes(tmp_path / "r"))
    overlap = run.probe("route_overlap")
    here = overlap[(overlap["model"] == "base") & (overlap["scope"] == "model") & (overlap["top"] == 0.1)]
    channels = here[(here["kind"] == "channel") & (here["a"] != here["b"])]
    said = routes.overlap_words(overlap)
    more = int((channels["jaccard"] > channels["chance_high"]).sum())
    assert f"; {more} of 6 pairs share" in said[0]
    assert f"share {channels['jaccard'].mean():.2f} on average" in said[0]
    assert len(said) == 2
    direction = run.probe("route_direction")
    rows = direction[(direction["kind"] == "channel") & (direction["layer"] == -1) & (direction["top"] == 0.1)]
    above, below = int((rows["cosine"] > 0.2).sum()), int((rows["cosine"] < -0.1).sum())
    assert f"in {above} and below it in {below} of 6 pairs" in routes.direction_words(direction)[0]
    gradients = run.probe("gradient_agreement")
    parts = gradients[gradients["scope"] == "part"]
    sure = parts[certain(parts)]
    words = routes.gradient_words(gradients)
    assert f"Of {len(parts)} gradient cosines" in words[0]
    assert f"{(sure['cosine'] > 0).sum()} pull the same way and {(sure['cosine'] < 0).sum()} against" in words[0]
    assert sum("not beyond noise as a whole (+0.0100), yet" in sentence for sentence in words) == 6
    strongest = routes.gradient_tables(gradients)[1].rows
    assert strongest[0][6] == "against"
    assert strongest[-1][6] == "the same way"


def test_so_few_units_that_equal_sets_are_no_surprise() -> None:
    """Two layers of 4 heads, one active in each: equal sets have probability 1/16 by chance; of 12 heads 1/144."""
    for heads, tested in ((4, False), (12, True)):
        scores = np.tile(np.arange(float(heads)), 2)
        units = {"kind": "head", "layer": np.arange(2).repeat(heads), "unit": np.tile(np.arange(heads), 2)}
        table = pd.DataFrame(units | dict.fromkeys(("score", "first_half", "second_half"), scores))
        found = {n: Routes(n, "magnitude", table, 2, 9) for n in "ab"}
        overlap = route_overlap(found, [0.05, 0.08]).assign(model="base")
        (said,) = routes.overlap_words(overlap)
        assert ("1 of 1 pair shares more than chance" in said) == tested
        assert ("1 pair cannot be tested" in said) != tested
        assert ("Of the 25" if heads == 4 else "Of the 8.3") in said
        assert len(routes.overlap_tables(overlap)[0].rows) == 1  # 5 % and 8 % are both one head
