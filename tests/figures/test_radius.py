"""The local radius against closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from figures import local_radius

RESULTS: dict[str, Any] = {
    "objectives": {"reward": {"unit": "reward per prompt", "better": "higher"}},
    "updates": ["a"],
    "domains": ["b"],
    "cells": [{"objective": "reward", "update": "a", "domain": "b", "own": False, "sequences": 100}],
}
ALPHA = np.array([-1.0, 0.25, 0.5, 1.0, 2.0])


def curve(cubic: float = 0.0, stderr: float = 0.0, ess: float = np.nan, slope: float = 1.0) -> pd.DataFrame:
    """Observed `slope a + cubic a^3`, predicted `slope a`: the relative error is cubic a^2 / (slope + cubic a^2)."""
    return pd.DataFrame(
        {
            "objective": "reward",
            "update": "a",
            "domain": "b",
            "alpha": ALPHA,
            "measured": slope * ALPHA + cubic * ALPHA**3,
            "measured_stderr": stderr,
            "ess": ess,
            "predicted_second": slope * ALPHA,
        }
    )


def walk(table: pd.DataFrame) -> tuple[float, str, int, int]:
    row = local_radius(table, RESULTS, "reward").iloc[0]
    return float(row["radius"]), str(row["ended"]), int(row["judged"]), int(row["resolved"])


@pytest.mark.parametrize(
    ("cubic", "radius"),
    # the error passes 10 % where cubic a^2 = 1/9
    [(0.0, 2.0), (1 / 9 / 4 - 1e-6, 2.0), (1 / 9 / 4 + 1e-6, 1.0), (0.2, 0.5), (0.5, 0.25), (50.0, 0.0)],
)
def test_it_ends_where_the_error_passes_a_tenth(cubic: float, radius: float) -> None:
    found, ended, *_ = walk(curve(cubic))
    assert found == radius
    assert ended == ("tried" if radius == 2.0 else "left")


def test_noise_excuses_a_difference() -> None:
    assert walk(curve(0.2))[0] == 0.5
    assert walk(curve(0.2, stderr=0.2 / 1.6))[0] == 1.0  # 0.2 off at alpha 1, noise 1.645 * 0.125 = 0.206


def test_tolerance_and_noise_do_not_add_up() -> None:
    # at alpha 1 the prediction is 0.15 off an observation of 1.15, beyond a tenth (0.115) and beyond the noise (0.1)
    assert walk(curve(0.15, stderr=0.1 / 1.645))[:2] == (0.5, "left")


def test_the_paired_error_is_the_slack_where_the_table_has_it() -> None:
    table = curve(0.2, stderr=1.0)  # by the observation's own noise everything would hold
    assert walk(table)[:2] == (2.0, "tried")
    table["residual_stderr"] = 0.0
    assert walk(table)[:2] == (0.5, "left")
    table["residual_stderr"] = 0.2 / 1.6  # 0.2 off at alpha 1, slack 1.645 * 0.125 = 0.206; 1.6 off at alpha 2
    assert walk(table)[:2] == (1.0, "left")
    table["residual_stderr"] = np.nan
    assert walk(table)[:2] == (2.0, "tried")
    noisy = curve(0.0, stderr=0.0)
    noisy["residual_stderr"] = 10.0
    assert walk(noisy)[3] == 4  # resolved is about the observation's own noise


def test_it_does_not_start_again_after_it_ended() -> None:
    table = curve()
    table.loc[table["alpha"] == 0.5, "measured"] = 5.0
    assert walk(table)[:2] == (0.25, "left")


def test_agreement_within_noise_alone_is_reported_as_such() -> None:
    assert walk(curve(stderr=10.0)) == (2.0, "tried", 4, 0)


def test_few_effective_samples_judge_nothing() -> None:
    table = curve(cubic=50.0)
    table["ess"] = np.where(table["alpha"] > 0.5, 5.0, 50.0)
    table.loc[table["alpha"] <= 0.5, "measured"] = table["predicted_second"]
    assert walk(table) == (0.5, "ess", 2, 2)
    assert np.isnan(walk(curve(ess=5.0))[0])
