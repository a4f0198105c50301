"""Tables on judges say what their records say."""

from __future__ import annotations

import numpy as np
import pandas as pd

from interference.report.judging_tables import loci
from interference.report.numbers import count, known


def test_responses_with_a_known_step_are_counted() -> None:
    """Two of three steps are known; the count comes from numpy, whose integers are no Python ints."""
    frame = pd.DataFrame({"domain": "math", "model": "base", "source": "rollouts", "steps": [2, 3, 4]})
    frame = frame.assign(step=[1.0, np.nan, 2.0], step_low=[1.0, np.nan, 1.0], step_high=[1.0, np.nan, 3.0])
    (row,) = loci(frame).rows
    assert row == ["math", "base", "rollouts", "3", "3.00", "2", "2.00"]


def test_numbers_of_numpy_are_numbers() -> None:
    assert count(np.int64(7)) == "7"
    assert not any(map(known, (np.bool_(True), True, np.float32("nan"), None, "1")))
