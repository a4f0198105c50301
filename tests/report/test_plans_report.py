"""What the report says of plans, on made tables."""

from __future__ import annotations

import numpy as np
import pandas as pd
from synthetic_plans import ranking

from interference.records import FORECAST
from interference.report.plans import _table, best_plans, within_noise


def test_the_best_are_named_with_their_intervals() -> None:
    mean, worst = best_plans(ranking([0.3, 0.1, 0.0], [-0.2, 0.05, -0.1]))
    assert mean.startswith("Best on average over the domains: p0 (+0.300, 90\u00a0% interval +0.250 to +0.340)")
    assert mean.endswith("the runner-up, p1, is behind by 0.200\u00a0±\u00a00.020, more than noise.")
    assert worst.startswith(
        "Best for the domain that does worst: p1 (+0.0500 for d1, 90\u00a0% interval −0.05 to +0.13)"
    )
    assert "the runner-up, p2, is behind by 0.150" in worst


def test_a_tie_is_called_one() -> None:
    """The bound is 1.645 standard errors of the difference: 0.0329 here."""
    for gap, tied in ((0.032, True), (0.034, False)):
        mean, _ = best_plans(ranking([0.3, 0.3 - gap, 0.0], [0.0, -1.0, -2.0]))
        assert ("within noise" in mean) == tied
        assert within_noise(gap, 0.02) == tied
    assert "which is within noise (and 1 more of 4)" in best_plans(ranking([0.3, 0.29, 0.28, 0], [0, -1, -2, -3]))[0]
    assert "as is every other one of the 3" in best_plans(ranking([0.3, 0.3, 0.28], [0, -1, -2]))[0]
    assert best_plans(ranking([0.3, 0.3], [0, -1], noise=0.01))[0].count("runner-up") == 1


def test_noise_that_differs_between_plans() -> None:
    """The second is surely behind, the third, which is noisier, is not."""
    table = ranking([0.3, 0.2, 0.1], [0.0, -1.0, -2.0])
    table.loc[2, "behind_stderr"] = 0.5
    assert "though 1 further behind cannot be told from it" in best_plans(table)[0]


def test_one_plan_has_no_runner_up_and_unknown_noise_is_no_verdict() -> None:
    assert "runner-up" not in " ".join(best_plans(ranking([0.3], [0.1])))
    words = best_plans(ranking([0.3, 0.2], [0.1, 0.0], noise=np.nan).assign(behind_stderr=np.nan))
    assert "of which the noise is not known" in words[0]
    assert "within" not in words[0]


def test_the_best_says_that_it_rests_on_few_samples() -> None:
    table = ranking([0.3, 0.2], [0.1, 0.2])
    table.loc[0, "note"] = "few effective samples"
    mean, worst = best_plans(table)
    assert "rests on few effective samples" in mean
    assert "few" not in worst


def cells(table: pd.DataFrame, stages: int = 1) -> pd.DataFrame:
    rows = [
        {
            **{"kind": table["kind"].iloc[0], "plan": plan, "stage": s, "trained": "x", "domain": domain},
            **{"predicted": s + 0.1 * i, "stderr": 0.01, "low": 0.0, "high": 0.0, "ess": 0.5 / s, "note": ""},
        }
        for plan in table["plan"]
        for s in range(1, stages + 1)
        for i, domain in enumerate("xy")
    ]
    return pd.DataFrame(rows)[list(FORECAST["plans"])]


def test_the_table_has_every_plan_and_what_it_ends_with() -> None:
    rows = ranking([0.1, 0.3], [0.0, 0.2])
    for stages, columns in ((1, 8 + 0), (2, 8 + 1)):
        table = _table(rows, cells(rows, stages), "reward per prompt")
        assert [row[0] for row in table.rows] == ["p1", "p0"]
        assert {len(row) for row in table.rows} == {len(table.head)} == {columns + 1}
        place = table.head.index("change of y")
        assert table.rows[0][place] == f"+{stages}.100\u00a0±\u00a00.010", "the last stage"
        assert ("lowest on the way" in table.head) == (stages > 1)
        assert table.rows[0][table.head.index("behind the best on average")] == "–"
        assert table.rows[0][table.head.index("least effective share")] == f"{50 // stages}\u00a0%"
