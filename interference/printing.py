"""What the command line prints of a finished run: tables and notes to the terminal, the report's path to standard output."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd

    from interference.checks import Audit

console = Console(stderr=True)


def plain(text: str) -> str:
    """Text whose brackets are not markup."""
    return escape(text)


def print_audit(found: Audit) -> None:
    """Every comparison of an audit, and its verdicts."""
    table = Table(title=f"{found.sequences} sequences, {found.tokens} scored tokens, {found.dtype}")
    for column in ("check", "mode", "against", "agreement", "tolerance", ""):
        table.add_column(column, justify="right" if column in ("agreement", "tolerance") else "left")
    for row in found.rows:
        reached = row.reason or f"{row.agreement:.1e}"
        mark = "[green]ok[/]" if row.passed else "[bold red]failed[/]"
        table.add_row(row.name, row.mode, plain(row.against), plain(reached), f"{row.tolerance:.0e}", mark)
    out = Console()
    out.print(table)
    for mode, verdict in found.verdicts.items():
        out.print(f"{mode}: {plain(verdict)}", soft_wrap=True, highlight=False)
    for note in found.notes:
        out.print(f"note: {plain(note)}", soft_wrap=True, highlight=False)


def print_notes(folder: Path, quiet: bool) -> None:
    """The notes of a run, and the path of its report."""
    from interference.records import Run

    for note in Run.open(folder).results["notes"] if not quiet else ():
        console.print(f"note: {plain(note)}", soft_wrap=True, highlight=False)
    Console().print(str(folder / "report.html"), soft_wrap=True, highlight=False)


def print_forecast(folder: Path) -> None:
    """The matrix of predicted changes, one table for each objective and tier."""
    from interference.records import Run

    run = Run.open(folder)
    for (objective, tier), cells in run.cells().groupby(["objective", "tier"], sort=False):
        unit = run.results["objectives"][objective]["unit"]
        console.print(
            plain(f"{objective} ({unit}), {tier}: predicted change, * where its sign is sure"), highlight=False
        )
        table = Table()
        domains = list(dict.fromkeys(cells["domain"]))
        for column in ("trained on", *domains):
            table.add_column(plain(column), justify="left" if column == "trained on" else "right")
        for update, rows in cells.groupby("update", sort=False):
            shown = {r["domain"]: f"{r['predicted']:+.3f}{'*' if r['sure'] else ' '}" for r in rows.to_dict("records")}
            table.add_row(plain(str(update)), *(shown[d] for d in domains))
        console.print(table)
    for kind, plans in run.forecast("plan_ranking").groupby("kind", sort=False):
        _print_plans(f"{kind}s", plans)


def _print_plans(what: str, ranking: pd.DataFrame) -> None:
    """The plans that are best on average."""
    best = ranking.head(_BEST)
    of = f" ({len(best)} best of {len(ranking)})" if len(best) < len(ranking) else ""
    console.print(
        f"{what}, best on average first{of}: change of the expected reward with 90 % intervals", highlight=False
    )
    table = Table()
    for column in ("plan", "mean over domains", "worst domain", "which"):
        table.add_column(column, justify="left" if column in ("plan", "which") else "right")
    for r in best.to_dict("records"):
        scores = (f"{r[k]:+.3f} ({r[f'{k}_low']:+.3f} to {r[f'{k}_high']:+.3f})" for k in ("mean", "worst"))
        table.add_row(plain(str(r["plan"])), *scores, plain(str(r["worst_domain"])))
    console.print(table)


_BEST = 6  # plans printed of a kind
_METRICS = ("spearman", "pearson", "sign_accuracy", "slope", "r2", "coverage", "coverage_truncation")


def print_scores(folder: Path, quiet: bool) -> None:
    """The scorecards of a diagnosis, its notes and the path of its report."""
    from interference.records import Run

    results = Run.open(folder).results
    if not quiet:
        for objective, card in results["scorecards"].items():
            part = card.get("off_diagonal") or card["all"]
            table = Table(
                title=f"{objective}: predicted against measured, {'off-diagonal' if 'off_diagonal' in card else 'all'} cells"
            )
            columns = dict(zip(_METRICS, ("rank", "linear", "sign", "slope", "R2", "cover", "+trunc."), strict=True))
            for column in ("predictor", *columns.values()):
                table.add_column(column, justify="left" if column == "predictor" else "right", no_wrap=True)
            for predictor, scores in part.items():
                table.add_row(predictor, *("–" if scores.get(m) is None else f"{scores[m]:.3f}" for m in columns))
            console.print(table)
    print_notes(folder, quiet)
