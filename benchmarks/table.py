"""The benchmark's record as a table on the terminal; needs no torch, so that an old record can be shown again."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 190  # a table that is cut says nothing; a terminal can scroll or wrap
RATIOS = ("forwards", "times_faster_than_hvp")
QUANTITIES = ("logp", "d1", "d2", "fisher")


def show(record: dict[str, Any], console: Console | None = None) -> None:
    """Print the record: by state seconds, forwards and how much faster than the fastest HVP, each by wall / by CPU time; peak
    extra memory; errors against the reference.
    """
    settings, unit = record["settings"], record["fastest"].get("forward, wall_s")
    states = settings["states"]
    table = Table(
        title=f"{settings['size']}: {settings['parameters'] / 1e6:.1f}M parameters, {settings['device']}, "
        f"{settings['threads']} thread(s)" + (f"; unit: {unit['method']}, {unit['state']}" if unit else "")
    )
    table.add_column("method", no_wrap=True)
    for state in states:
        for head in ("s", "forwards", "HVP / it"):
            table.add_column(f"{state} {head}", justify="right", no_wrap=True)
    table.add_column("peak MiB", justify="right")
    for quantity in QUANTITIES:
        table.add_column(f"err {quantity}", justify="right")
    for row in record["methods"]:
        cells = [row["method"]]
        for state in states:
            t = row[state]
            cells.append(f"{t['wall_s']:.3f}")
            cells += [" / ".join(_number(t[f"{ratio}_{clock}"]) for clock in ("wall", "cpu")) for ratio in RATIOS]
        peak = row["peak_extra_bytes"]
        cells.append("not measured" if peak is None else f"{peak / 2**20:.0f}")
        cells += [_error(row["relative_error"], q) for q in QUANTITIES]
        table.add_row(*cells)
    (console or Console(width=max(WIDTH, Console().width))).print(table)


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.2f}"


def _error(errors: dict[str, float | None], quantity: str) -> str:
    if quantity not in errors:
        return ""
    error = errors[quantity]
    return "not finite" if error is None else f"{error:.0e}"
