"""The benchmark's record as a table on the terminal; needs no torch, so that an old record can be shown again."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

RATIOS = ("forwards", "times_faster_than_hvp")
QUANTITIES = ("logp", "d1", "d2", "fisher")


def show(record: dict[str, Any], console: Console | None = None) -> None:
    """Print the record: seconds and forwards in each state, peak extra memory, and errors against the reference."""
    settings, unit = record["settings"], record["fastest"].get("forward, wall_s")
    states = settings["states"]
    table = Table(
        title=f"{settings['size']}: {settings['parameters'] / 1e6:.1f}M parameters, {settings['device']}, "
        f"{settings['threads']} thread(s)"
        + (f"; unit {unit['wall_s']:.3f} s, {unit['method']}, {unit['state']}" if unit else "")
    )
    table.add_column("method")
    for state in states:
        for head in ("s", "forwards", "by CPU", "HVP is", "by CPU"):
            table.add_column(f"{state} {head}", justify="right")
    table.add_column("peak MiB", justify="right")
    for quantity in QUANTITIES:
        table.add_column(f"err {quantity}", justify="right")
    for row in record["methods"]:
        cells = [row["method"]]
        for state in states:
            t = row[state]
            cells.append(f"{t['wall_s']:.3f}")
            cells += [_number(t[f"{ratio}_{clock}"]) for ratio in RATIOS for clock in ("wall", "cpu")]
        peak = row["peak_extra_bytes"]
        cells.append("not measured" if peak is None else f"{peak / 2**20:.0f}")
        cells += [f"{row['relative_error'][q]:.0e}" if q in row["relative_error"] else "" for q in QUANTITIES]
        table.add_row(*cells)
    (console or Console(width=None if Console().is_terminal else 200)).print(table)


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.2f}"
