"""What several tests of the lab look at."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the quick set-up of the forecast study, finished."""
    from paper_repro.forecast_study.run import run
    from paper_repro.forecast_study.setups import QUICK

    out = tmp_path_factory.mktemp("study")
    assert run([QUICK], out) == ["quick"]
    return out
