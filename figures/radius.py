"""Where the local radius ends: how far along an update the second order still says what is observed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from figures.data import cells_of, curves_of, order
from figures.style import Z90

TOLERANCE = 0.10
"""Relative error that still counts as agreement."""

LOW_ESS = 0.10
"""Share of the sequences below which an importance-weighted estimate is not trusted to judge anything."""


def local_radius(curves: pd.DataFrame, results: Mapping[str, Any], objective: str) -> pd.DataFrame:
    """How far along each update the second-order prediction holds, one row per cell.

    At a positive alpha the prediction *holds* when `|predicted - observed| <= max(0.10 |observed|, 1.645 stderr)`. The
    standard error is that of `observed - predicted`, paired over prompts (`residual_stderr` of the table); where the table
    does not have it, that of the observation. The radius is the largest alpha tried up to which it holds everywhere.
    Importance-weighted observations with an effective sample size below a tenth of the sequences judge nothing: the search
    stops there.

    Args:
        curves: `Run.curves()`.
        results: `Run.results`.
        objective: one of its objectives.

    Returns:
        Columns update, domain, own; radius (0 when it fails at the first alpha, NaN when nothing could be judged); ended
        ("left" the prediction failed at the next alpha, "ess" the next observation has too few effective samples, "tried" it
        held up to the largest alpha); judged (number of alphas compared) and resolved (how many of those observations are
        beyond their own 90 % noise: with none, agreement says little).

    Raises:
        InputError: the run has no such objective.
    """
    frame = curves_of(curves, objective)
    cells = cells_of(results, objective)
    size = dict(zip(zip(cells["update"], cells["domain"], strict=True), cells["sequences"].tolist(), strict=True))
    updates, domains = order(results)
    rows = []
    for update in updates:
        for domain in domains:
            path = frame[(frame["update"] == update) & (frame["domain"] == domain) & (frame["alpha"] > 0)]
            path = path[path["measured"].notna() & path["predicted_second"].notna()]
            if len(path):
                sequences = size.get((update, domain), np.nan)
                rows.append({"update": update, "domain": domain, "own": update == domain, **_walk(path, sequences)})
    return pd.DataFrame(rows, columns=["update", "domain", "own", "radius", "ended", "judged", "resolved"])


def too_few(ess: float, sequences: float) -> bool:
    """True when an importance-weighted estimate rests on too few effective samples; False where there is no weighting."""
    return bool(np.isfinite(ess) and np.isfinite(sequences) and ess < LOW_ESS * sequences)


def _walk(path: pd.DataFrame, sequences: float) -> dict[str, Any]:
    radius, judged, resolved = 0.0, 0, 0
    ended = "tried"
    columns = ("alpha", "measured", "measured_stderr", "residual_stderr", "predicted_second", "ess")
    for alpha, observed, stderr, paired, predicted, ess in zip(*(path[c] for c in columns), strict=True):
        if too_few(ess, sequences):
            ended = "ess"
            break
        noise = Z90 * float(np.nan_to_num(stderr))
        judged += 1
        resolved += abs(observed) > noise
        slack = Z90 * float(paired) if np.isfinite(paired) else noise
        if abs(predicted - observed) > max(TOLERANCE * abs(observed), slack):
            ended = "left"
            break
        radius = float(alpha)
    return {"radius": radius if judged else np.nan, "ended": ended, "judged": judged, "resolved": resolved}
