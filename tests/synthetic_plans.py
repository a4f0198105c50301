"""Rankings of plans as a forecast records them, with scores that a test chooses."""

from __future__ import annotations

import pandas as pd


def ranking(
    means: list[float],
    worsts: list[float],
    *,
    kind: str = "mixture",
    noise: float = 0.02,
    names: list[str] | None = None,
) -> pd.DataFrame:
    """Plans p0, p1, ..., as given, ranked by their means."""
    rows = []
    for i, (mean, worst) in enumerate(zip(means, worsts, strict=True)):
        name, behind, worst_behind = (names or [f"p{k}" for k in range(99)])[i], max(means) - mean, max(worsts) - worst
        rows.append(
            {
                **{"kind": kind, "plan": name, "mean": mean, "mean_low": mean - 0.05, "mean_high": mean + 0.04},
                **{"worst": worst, "worst_low": worst - 0.1, "worst_high": worst + 0.08, "worst_domain": f"d{i}"},
                **{"lowest": worst, "behind": behind, "behind_stderr": noise * (behind > 0)},
                **{"worst_behind": worst_behind, "worst_behind_stderr": noise * (worst_behind > 0), "note": ""},
            }
        )
    return pd.DataFrame(rows).sort_values("behind", ignore_index=True)
