"""The page's sections on routes and gradients: every shape is written, and sentences count what the tables hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from synthetic_routes import SHAPES, make_routes

from figures.gradients import certain
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
    more = int((channels["jaccard"] > channels["high"]).sum())
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
