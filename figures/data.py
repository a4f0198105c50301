"""What every figure reads: the cells of one objective, in the record's order, as numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from figures.style import Z90
from interference.errors import InputError, nearest

Array = np.ndarray[Any, np.dtype[np.float64]]
_V = TypeVar("_V", float, Array, pd.Series)

_QUANTITIES = {
    "nll": "loss",
    "reward": "expected reward",
    "surrogate": "policy-gradient surrogate",
    "kl": "KL from the base",
}

_NUMBERS = (
    *("before", "after", "measured", "measured_stderr", "predicted_first", "predicted_second", "predicted_second_ggn"),
    *("stderr", "stderr_first", "stderr_ggn", "low", "high", "residual_stderr", "residual_low", "residual_high"),
    *("anchor_value", "estimate", "estimate_stderr", "ess", "prompts", "sequences"),
    *("update_norm", "update_cosine", "gradient_cosine", "kl"),
    *("third", "third_stderr", "third_misfit", "fourth", "fourth_stderr", "predicted_third"),
    *("truncation", "truncation_stderr", "truncation_misfit", "remainder", "remainder_stderr"),
    *("low_total", "high_total", "residual_low_total", "residual_high_total", "radius", "radius_judged"),
)


@dataclass(frozen=True)
class Quantity:
    """What an objective measures: its plain name, unit, and whether "higher" or "lower" is better."""

    objective: str
    name: str
    unit: str
    better: str

    @property
    def label(self) -> str:
        """The change of this quantity, with its unit, for an axis."""
        return f"change in {self.name} ({self.unit})"

    def harm(self, change: _V) -> _V:
        """A change with the sign of harm: positive where it makes this quantity worse.

        >>> Quantity("nll", "loss", "", "lower").harm(0.5), Quantity("reward", "reward", "", "higher").harm(0.5)
        (0.5, -0.5)
        """
        return change if self.better == "lower" else -change


def quantity(results: Mapping[str, Any], objective: str) -> Quantity:
    """Look up an objective of a record; InputError when the record does not have it."""
    known = results.get("objectives", {})
    if objective not in known:
        raise InputError(
            got=f"objective {objective!r}",
            expected="an objective of this run",
            remedy=nearest(objective, known),
        )
    info = known[objective]
    name = _QUANTITIES.get(objective, objective)
    return Quantity(objective, name, str(info.get("unit", "")), str(info.get("better", "higher")))


def read(results: Mapping[str, Any], objective: str) -> tuple[Quantity, pd.DataFrame]:
    """What a figure of one objective starts from: the quantity and its cells (see `quantity` and `cells_of`).

    Args:
        results: `Run.results`.
        objective: one of its objectives.

    Raises:
        InputError: the run has no such objective.
    """
    return quantity(results, objective), cells_of(results, objective)


def order(results: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Names of updates and of domains, in the order in which the run was asked for them."""
    cells = results.get("cells", [])
    updates = results.get("updates") or list(dict.fromkeys(cell["update"] for cell in cells))
    domains = results.get("domains") or list(dict.fromkeys(cell["domain"] for cell in cells))
    return [str(name) for name in updates], [str(name) for name in domains]


def cells_of(results: Mapping[str, Any], objective: str) -> pd.DataFrame:
    """The cells of one objective as a frame whose numeric columns all exist and are floats (NaN for null).

    Rows go by update, then by domain, in the order in which the run was asked for them. Adds `detected`: the measured
    change is beyond its own 90 % noise; `certain`: so is the second-order prediction. `beyond_radius` is true where the
    record says so, false where it says no or cannot tell; `radius_reason` is "none" where nothing is recorded.
    """
    quantity(results, objective)
    frame = pd.DataFrame([cell for cell in results["cells"] if cell["objective"] == objective])
    if frame.empty:
        frame = pd.DataFrame(columns=["objective", "update", "domain", "own"])
    for column in _NUMBERS:
        present = frame[column] if column in frame else pd.Series(np.nan, index=frame.index)
        frame[column] = pd.to_numeric(present, errors="coerce").astype(float)
    if "own" not in frame:
        frame["own"] = frame["update"] == frame["domain"]
    frame["own"] = frame["own"].astype(bool)
    reason = frame["radius_reason"] if "radius_reason" in frame else pd.Series(None, index=frame.index, dtype=object)
    frame["radius_reason"] = reason.where(reason.notna(), "none").astype(str)
    beyond = frame["beyond_radius"] if "beyond_radius" in frame else pd.Series(False, index=frame.index)
    frame["beyond_radius"] = beyond.map(lambda known: known is True or known == 1).astype(bool)
    noise = Z90 * frame["measured_stderr"]
    frame["detected"] = frame["measured"].abs() > noise
    if "detectable" in frame:
        known = frame["detectable"].notna()
        frame.loc[known, "detected"] = frame.loc[known, "detectable"].astype(bool)
    inside = (frame["low"] <= 0) & (frame["high"] >= 0)
    guess = frame["predicted_second"].abs() <= Z90 * frame["stderr"]
    frame["certain"] = ~(guess.where(frame["low"].isna() | frame["high"].isna(), inside).astype(bool))
    updates, domains = order(results)
    place = {pair: k for k, pair in enumerate((u, d) for u in updates for d in domains)}
    rank = [place.get(pair, len(place)) for pair in zip(frame["update"], frame["domain"], strict=True)]
    return frame.iloc[np.argsort(rank, kind="stable")].reset_index(drop=True)


def curves_of(curves: pd.DataFrame, objective: str) -> pd.DataFrame:
    """The rows of one objective in the table of curves, numeric, ordered along alpha."""
    columns = ["alpha", "measured", "measured_stderr", "residual_stderr", "ess", "stderr"]
    columns += ["predicted_first", "predicted_second", "predicted_second_ggn"]
    if curves.empty:
        return pd.DataFrame(columns=["update", "domain", "kind", "low_ess", *columns])
    frame = curves.loc[curves["objective"] == objective].copy()
    for column in columns:
        present = frame[column] if column in frame else pd.Series(np.nan, index=frame.index)
        frame[column] = pd.to_numeric(present, errors="coerce").astype(float)
    if "kind" not in frame:
        frame["kind"] = "measured"
    frame["low_ess"] = frame["low_ess"].eq(True) if "low_ess" in frame else False
    return frame.sort_values("alpha", kind="stable").reset_index(drop=True)


def grid(frame: pd.DataFrame, column: str, updates: Sequence[str], domains: Sequence[str]) -> Array:
    """One column of the cells as an updates x domains array; NaN where there is no such cell."""
    out = np.full((len(updates), len(domains)), np.nan)
    rows = {name: k for k, name in enumerate(updates)}
    columns = {name: k for k, name in enumerate(domains)}
    for update, domain, value in zip(frame["update"], frame["domain"], frame[column], strict=True):
        if update in rows and domain in columns:
            out[rows[update], columns[domain]] = float(value)
    return out
