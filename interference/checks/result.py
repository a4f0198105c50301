"""What an audit found: one row per comparison, one verdict per derivative mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from interference.errors import InputError, nearest

if TYPE_CHECKING:
    import pandas as pd

MODES = ("taylor", "nested", "reverse")
ORDERS = ("first order", "second order")
TRUSTED = "trusted"

REMEDY = {
    "taylor": "a rule of the Taylor engine does not hold for this model; use engine='nested', and report it",
    "nested": "nested forward mode is wrong or missing for an operation of this model; use engine='taylor'",
    "reverse": "gradients and Hessian products of this model are not to be used",
    "all": "the model is not what was differentiated",
    "value": "the derivatives are not those of the model's own forward pass; load it with attn_implementation='eager' and "
    "without fused kernels",
    "padding and batches": "a sequence's result depends on the batch it is in; use a causal model, right padding, no mask, and "
    "sums divided once",
    "determinism": "two runs differ; disable dropout, sampling and non-deterministic kernels",
    "weights": "a computation changed the weights; find the code that writes to them in place",
}
UNCONFIRMED = "see why the other modes fail: all rows are in .to_frame(), or run `interference audit` (level='full')"
MARGIN = 10.0  # how far beyond its tolerance an error may be rounding (comparison._excuse_rounding)
ROUNDING = "; where the error is little above the tolerance it may be rounding: use dtype float64"


@dataclass(frozen=True)
class Check:
    """One comparison: the relative error reached, the tolerance, and what to do where it failed.

    mode: the derivative mode under test ("taylor", "nested", "reverse", or "all").  against: the route it was compared with.
    agreement: relative error, |difference| / |compared vector|, norms over sequences; NaN where nothing could be computed.
    reason: what was raised, where something was.
    """

    name: str
    mode: str
    against: str
    agreement: float
    tolerance: float
    remedy: str = ""
    reason: str = ""

    @property
    def passed(self) -> bool:
        return self.agreement <= self.tolerance  # false for NaN

    @property
    def marginal(self) -> bool:
        """Whether the row fails by so little that it may be rounding."""
        return not self.passed and self.agreement <= MARGIN * self.tolerance

    def concerns(self, mode: str) -> bool:
        """Whether the row says something about a mode."""
        return self.mode in (mode, "all") or self.against == mode

    def __str__(self) -> str:
        if self.reason:
            return f"{self.name} of {self.mode}: {self.reason}"
        reached = "not finite" if math.isnan(self.agreement) else f"relative error {self.agreement:.1e}"
        return f"{self.name} of {self.mode} against {self.against}: {reached}, tolerance {self.tolerance:.0e}"


@dataclass(frozen=True)
class Audit:
    """The rows of an audit and the verdict of each derivative mode: "trusted", or "refused: " and the reason.

    dtype: in which the model computes.  tokens: scored tokens of the batch.  notes: what a reader must know, such as float32
    steps inside a float64 model.
    """

    dtype: str
    level: str
    sequences: int
    tokens: int
    rows: tuple[Check, ...]
    verdicts: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every mode that was tested is trusted."""
        return all(v == TRUSTED for v in self.verdicts.values())

    def to_frame(self) -> pd.DataFrame:
        """One row per comparison: check, mode, against, agreement, tolerance, passed, reason, remedy."""
        import pandas as pd

        return pd.DataFrame(self.to_dict()["rows"])

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able record."""
        rows = [
            {
                "check": r.name,
                "mode": r.mode,
                "against": r.against,
                "agreement": r.agreement if math.isfinite(r.agreement) else None,
                "tolerance": r.tolerance,
                "passed": r.passed,
                "reason": r.reason,
                "remedy": r.remedy,
            }
            for r in self.rows
        ]
        return asdict(self) | {"rows": rows, "ok": self.ok, "gradient_trusted": self.gradient_trusted}

    @property
    def gradient_trusted(self) -> bool:
        """Whether some other mode agrees with reverse mode in first order: its gradient holds even if Hessian products do not."""
        return any(r.passed for r in self.rows if r.name == ORDERS[0] and r.against in MODES and r.concerns("reverse"))

    def raise_if_failed(self, modes: Sequence[str] | None = None) -> None:
        """Raise InputError when a mode (default: any) is refused or was not tested: which check, by how much, what to do."""
        for mode in self.verdicts if modes is None else modes:
            if mode not in self.verdicts:
                raise InputError(
                    got=f"mode {mode!r}, which this audit did not test",
                    expected=f"one of {', '.join(self.verdicts) or 'none'}",
                    remedy=nearest(mode, MODES)
                    if mode not in MODES
                    else "audit with level='full', which tests every mode",
                )
            if self.verdicts[mode] == TRUSTED:
                continue
            failed = [r for r in self.rows if not r.passed and r.concerns(mode)]
            raise InputError(
                got=f"derivatives that fail their audit: {self.verdicts[mode].removeprefix('refused: ')}",
                expected=f"{mode} derivatives that other routes confirm",
                remedy=(_worst(failed).remedy if failed else "") or UNCONFIRMED,
            )

    @property
    def summary(self) -> str:
        """One line for a record.

        >>> rows = (Check("first order", "taylor", "reverse", 3e-8, 1e-5), Check("second order", "taylor", "reverse", 2e-7, 1e-3))
        >>> Audit("float32", "quick", 3, 20, rows, {"taylor": "trusted", "reverse": "trusted"}).summary
        'derivatives checked on 3 sequences, 20 tokens: first order 3e-08, second order 2e-07 (taylor, reverse trusted)'
        """
        pairs = [(o, [r.agreement for r in self.rows if r.name == o and r.against in MODES]) for o in ORDERS]
        reached = ", ".join(f"{order} {max(found):.0e}" for order, found in pairs if found)
        trusted = ", ".join(m for m, v in self.verdicts.items() if v == TRUSTED) or "nothing"
        return f"derivatives checked on {self.sequences} sequences, {self.tokens} tokens: {reached} ({trusted} trusted)"


def judge(rows: Sequence[Check]) -> tuple[tuple[Check, ...], dict[str, str]]:
    """Verdicts from rows, and the rows with remedies: a mode is trusted when all its own checks pass and, in each order, some
    other mode agrees with it. Of two modes that disagree, the one that a third confirms is therefore not blamed.

    >>> pairs = [("taylor", "nested"), ("taylor", "reverse"), ("nested", "reverse")]
    >>> first = [Check("first order", a, b, 1e-8, 1e-5) for a, b in pairs]
    >>> second = [Check("second order", a, b, 0.4 if "nested" in (a, b) else 1e-8, 1e-3) for a, b in pairs]
    >>> {mode: verdict[:7] for mode, verdict in judge([*first, *second])[1].items()}
    {'taylor': 'trusted', 'nested': 'refused', 'reverse': 'trusted'}
    """
    tested = [m for m in MODES if any(m in (r.mode, r.against) for r in rows)]
    verdicts = {mode: _verdict(mode, rows) for mode in tested}
    return tuple(r if r.passed or r.remedy else replace(r, remedy=_remedy(r, verdicts)) for r in rows), verdicts


def _verdict(mode: str, rows: Sequence[Check]) -> str:
    own = [r for r in rows if r.mode in (mode, "all") and r.against not in MODES and not r.passed]
    if own:  # a wrong first derivative explains the rest
        return f"refused: {_worst([r for r in own if r.reason or r.name == ORDERS[0]] or own)}"
    for order in ORDERS:
        pairs = [r for r in rows if r.name == order and r.against in MODES and r.concerns(mode)]
        if not any(r.passed for r in pairs):
            return f"refused: {_worst(pairs)}" if pairs else f"refused: no other mode confirms its {order}"
    return TRUSTED


def _worst(rows: Sequence[Check]) -> Check:
    """The row to name: one that raised, else the one furthest beyond its tolerance."""
    return max(rows, key=lambda r: math.inf if math.isnan(r.agreement) else r.agreement / max(r.tolerance, 1e-300))


def _remedy(row: Check, verdicts: dict[str, str]) -> str:
    if row.name in REMEDY and not row.reason:
        return REMEDY[row.name]
    blamed = [m for m in dict.fromkeys((row.mode, row.against)) if verdicts.get(m, TRUSTED) != TRUSTED]
    text = REMEDY[blamed[0] if len(blamed) == 1 else row.mode]
    if len(blamed) > 1 and row.against in MODES:
        text = (
            f"{row.mode} or {row.against} is wrong for this model: run `interference audit` (level='full') to see which"
        )
    return text + ROUNDING
