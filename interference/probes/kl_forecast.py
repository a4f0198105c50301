"""The jets' forecast of how far an update moves a policy, beside the divergence that is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

from interference import statistics
from interference.domain import Domain
from interference.expansion import expand
from interference.measurement import measure
from interference.model import Model
from interference.tree import NamedChanges


def kl_from_update(
    base: Model,
    updates: Mapping[str, NamedChanges],
    domains: Mapping[str, Domain],
    *,
    engine: str = "taylor",
    check: bool = True,
    batch_tokens: int = 4096,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """The jets' forecast of KL(base || base + d), 1/2 d' F d with F the Fisher matrix, beside the KL that is measured.

    Both are sums over the vocabulary at the states of the domain's sequences, which are the base's own responses if the KL
    between policies is meant, in nats per response token; the gap between them is what the second order leaves out.

    Returns:
        update, domain, forecast, forecast_stderr, measured, measured_stderr, measured_low, measured_high, gap (measured -
        forecast), gap_stderr, gap_low, gap_high, ratio (forecast / measured, NaN where nothing moved), ratio_low, ratio_high.
        Gap and ratio are paired over prompts; intervals at 90 %, NaN for a single prompt.

    Raises:
        InputError: what `expand` and `measure` raise.
    """
    forecasts = expand(
        base, updates, domains, objective="kl", pairs=False, engine=engine, check=check, batch_tokens=batch_tokens,
        seed=seed, progress=progress,
    )  # fmt: skip
    rows = []
    measured = measure(base, updates, domains, objective="kl", batch_tokens=batch_tokens, seed=seed)
    for row in measured.to_dict("records"):
        forecast = forecasts[row["domain"]].predict({row["update"]: 1.0})
        gap = row["replicates"] - forecast.replicates
        moved = np.where(row["replicates"] > 0, row["replicates"], np.nan)
        found = {
            "update": row["update"], "domain": row["domain"],
            "forecast": forecast.value, "forecast_stderr": forecast.stderr,
            "measured": row["delta"], "measured_stderr": row["stderr"],
            "gap": row["delta"] - forecast.value, "gap_stderr": float(statistics.stderr(gap)),
            "ratio": forecast.value / row["delta"] if row["delta"] > 0 else float("nan"),
        }  # fmt: skip
        for name, draws in (("measured", row["replicates"]), ("gap", gap), ("ratio", forecast.replicates / moved)):
            found[f"{name}_low"], found[f"{name}_high"] = statistics.interval(draws)
        rows.append(found)
    return pd.DataFrame(rows)
