"""The report's section on plans: which domains to mix and in which order to train on them, before any of it is trained."""

from __future__ import annotations

from typing import Any

import pandas as pd

import figures
from figures.data import quantity
from figures.plans import SHOWN
from figures.style import Z90
from interference.records import Run
from interference.report.numbers import NONE, interval, known, number, percent, with_error
from interference.report.pictures import Pictures
from interference.report.tables import Table

KINDS = {"mixture": "mixtures", "order": "orders"}


def section(run: Run) -> dict[str, Any] | None:
    """The values of the section; None where no plans were asked for."""
    ranking, plans = run.forecast("plan_ranking"), run.forecast("plans")
    if ranking.empty:
        return None
    unit = quantity(run.results, "reward").unit
    parts, short = [], []
    for kind in KINDS:
        rows = ranking[ranking["kind"] == kind].reset_index(drop=True)
        if rows.empty:
            continue
        short.append(f"best on average is the {kind} {rows['plan'].iloc[0]}{_doubt(rows)}")
        alt = (
            f"Dot plot of all {KINDS[kind]}, best on average on top: the change of expected reward, mean over domains and worst "
            "domain, with 90 % intervals. Every number is in the table."
        )
        picture = Pictures(run, "plans").add(kind, figures.plan_ranking(ranking, run.results, kind), alt)
        parts.append(
            {
                "title": KINDS[kind].capitalize(),
                "words": best_plans(rows),
                "picture": picture,
                "cut": len(rows) > SHOWN,
                "table": _table(rows, plans[plans["kind"] == kind], unit),
            }
        )
    return {"parts": parts, "short": "; ".join(short), "renew": bool(run.config.get("renew"))}


def _doubt(rows: pd.DataFrame) -> str:
    """Why the one that is forecast best may not be."""
    close = sum(within_noise(r["behind"], r["behind_stderr"]) for r in rows.iloc[1:].to_dict("records"))
    if rows["note"].iloc[0]:
        return " (which rests on few effective samples)"
    return f" (not to be told from {close} other{'s' * (close > 1)})" if close else ""


def best_plans(rows: pd.DataFrame) -> list[str]:
    """Which plan is best on average and which for the domain that does worst, and whether the next one is worse beyond noise.

    rows: those of one kind in the table `plan_ranking`.
    """
    out = []
    for by, behind, what in (
        ("mean", "behind", "Best on average over the domains"),
        ("worst", "worst_behind", "Best for the domain that does worst"),
    ):
        ordered = rows.sort_values(behind, kind="stable", ignore_index=True)
        best = ordered.iloc[0]
        where = f" for {best['worst_domain']}" if by == "worst" else ""
        weak = "; it rests on few effective samples" if best["note"] else ""
        out.append(
            f"{what}: {best['plan']} ({number(best[by], sign=True)}{where}, 90\u00a0% interval "
            f"{interval(best[f'{by}_low'], best[f'{by}_high'])}{weak}){_runner_up(ordered, behind)}."
        )
    return out


def _runner_up(ordered: pd.DataFrame, behind: str) -> str:
    """How far the second is behind the first, and how many cannot be told from it."""
    others = ordered.iloc[1:]
    if others.empty:
        return ""
    second = others.iloc[0]
    told = f"; the runner-up, {second['plan']}, is behind by {with_error(second[behind], second[_error(behind)], sign=False)}"
    if not known(second[_error(behind)]):
        return told + ", of which the noise is not known"
    close = [within_noise(row[behind], row[_error(behind)]) for row in others.to_dict("records")]
    if not any(close):
        return told + ", more than noise"
    if all(close) and len(close) > 1:
        return told + f", which is within noise, as is every other one of the {len(ordered)}"
    if not close[0]:
        return told + f", more than noise, though {sum(close)} further behind cannot be told from it"
    more = sum(close) - 1
    return told + ", which is within noise" + (f" (and {more} more of {len(ordered)})" if more else "")


def within_noise(behind: float, stderr: float) -> bool:
    """Whether a plan cannot be told from the best: the 90 % interval of how far it is behind holds zero.

    >>> within_noise(0.01, 0.02), within_noise(0.04, 0.02), within_noise(0.0, 0.0)
    (True, False, True)
    """
    return behind <= Z90 * stderr


def _error(behind: str) -> str:
    return f"{behind}_stderr"


def _table(rows: pd.DataFrame, plans: pd.DataFrame, unit: str) -> Table:
    """Every plan: its scores, and what it ends with on every domain."""
    ends = plans[plans["stage"] == plans.groupby("plan")["stage"].transform("max")]
    cells = {(r["plan"], r["domain"]): r for r in ends.to_dict("records")}
    domains = list(dict.fromkeys(ends["domain"]))
    least = ends.groupby("plan")["ess"].min()
    ordered = bool((plans["stage"] > 1).any())
    body = []
    for r in rows.to_dict("records"):
        each = [cells[r["plan"], domain] for domain in domains]
        body.append(
            [
                str(r["plan"]),
                f"{number(r['mean'], sign=True)} ({interval(r['mean_low'], r['mean_high'])})",
                f"{number(r['worst'], sign=True)} ({interval(r['worst_low'], r['worst_high'])})",
                str(r["worst_domain"]),
                *([number(r["lowest"], sign=True)] if ordered else []),
                with_error(r["behind"], r["behind_stderr"], sign=False) if r["behind"] else NONE,
                *(with_error(cell["predicted"], cell["stderr"]) for cell in each),
                percent(least[r["plan"]]),
                str(r["note"]) or NONE,
            ]
        )
    head = ["plan", "mean over domains (90\u00a0% interval)", "worst domain (90\u00a0% interval)", "which"]
    head += [*(["lowest on the way"] if ordered else []), "behind the best on average"]
    head += [*(f"change of {domain}" for domain in domains), "least effective share", "note"]
    note = (
        "± is one standard error. Behind: with the noise of the prompts, on which all plans are tried alike, and of the updates' "
        "estimates; the intervals hold the method's own error, too. The best of many noisy forecasts does a little worse, on "
        "average, than is forecast of it. Least effective share: of the responses, over the "
        "domains at the end."
    )
    if ordered:
        note += " Lowest on the way: the worst change of any domain after any stage; tables/forecast_plans.parquet has them all."
    return Table(f"Plans, best on average first, in {unit}.", head, 1, body, [""] * len(body), note)
