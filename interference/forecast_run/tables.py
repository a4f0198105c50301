"""The tables of a forecast, and what a reader of them must know."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from interference.forecast_run import stages
from interference.forecast_run.stages import Work
from interference.forecasting.virtual import LEAST_ESS
from interference.records import FORECAST
from interference.statistics import Z
from interference.truncation import LOW_ESS

RELIABLE = 0.5
"""An estimated update of lower reliability is mostly noise."""
FAR = 0.5
"""A cell is beyond its radius where the second order is off by more than this share of the change, and by more than noise."""


def all_tables(work: Work) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cells of every objective and tier, and the paths of all virtual trainings."""
    cells, paths = [], []
    for tier in work.config.tier:
        estimated = {name: stages.estimate(work, tier, name) for name in work.domains}
        paths += [e.path.assign(tier=tier, domain=name) for name, e in estimated.items() if len(e.path)]
        halves = {name: e.halves for name, e in estimated.items()}
        for objective in work.config.objective:
            for name in work.evaluated(objective):
                found = stages.cells(work, objective, tier, name, halves)
                cells.append(found.assign(objective=objective, tier=tier))
    table = pd.concat(cells, ignore_index=True)
    table["beyond_radius"] = beyond_radius(table)
    table["sure"] = ((table["low"] > 0) | (table["high"] < 0)) & (table["ess"] >= LOW_ESS)
    first = ["objective", "tier", "update", "domain"]
    table = table[[*first, *(c for c in table.columns if c not in first)]]
    columns = list(FORECAST["path"])
    path = pd.concat(paths, ignore_index=True).reindex(columns=columns) if paths else pd.DataFrame(columns=columns)
    return table, path


def beyond_radius(cells: pd.DataFrame) -> pd.Series:
    """Whether the second order is off from the change at the estimated update itself, `predicted - noise_term`, by more than
    `FAR` of it and by more than the 90 % noise of both. False without a second order, and where the first order is told."""
    whole = cells["predicted"] - cells["noise_term"]
    off = (cells["predicted_second"] - whole).abs()
    noise = Z * np.hypot(cells["sampling_stderr"], cells["second_stderr"])
    return (off > FAR * whole.abs()) & (off > noise) & (cells["route"] != "first")


def notes_on(cells: pd.DataFrame, path: pd.DataFrame, shares: Mapping[str, float]) -> list[str]:
    """Where a forecast is weak, by objective and tier, and by training.

    shares: {domain: share of its prompts with a single response}, which training cannot use.
    """
    notes = [
        f"{name}: {100 * share:.0f} % of the prompts have one response, from which training learns nothing"
        for name, share in shares.items()
        if share > 0
    ]
    weak = cells[~(cells["reliability"] >= RELIABLE)].drop_duplicates(["tier", "update"])
    for tier, rows in weak.groupby("tier", sort=False):
        each = ", ".join(f"{r['update']} {r['agreement']:.2f}" for r in rows.to_dict("records"))
        notes.append(
            f"{tier}: the updates estimated from two halves of the prompts hardly agree (cosine: {each}), so what is forecast of "
            "these trainings is mostly noise; more prompts, more responses to each or more effort help"
        )
    tempered = path[path["exponent"] < 1]
    for tier, rows in tempered.groupby("tier", sort=False):
        steps = path[path["tier"] == tier].groupby("domain").size()
        each = ", ".join(
            f"{100 * len(r) / steps[name]:.0f} % on {name}" for name, r in rows.groupby("domain", sort=False)
        )
        notes.append(
            f"{tier}: ratios were tempered where fewer than {100 * LEAST_ESS:.0f} % of a step's responses were effective "
            f"(in {each}; exponents down to {rows['exponent'].min():.2f}); there the path leaves the policy gradient, and "
            "fresh rollouts on the way (`renew: true`, or the tier pilot) help"
        )
    for tier, rows in path[path["rollouts"] > 0].groupby("tier", sort=False):
        each = ", ".join(f"{n} {int(r['rollouts'].max())} times" for n, r in rows.groupby("domain", sort=False))
        notes.append(f"{tier}: rollouts were renewed on the way, by sampling the virtually trained policy ({each})")
    for tier, rows in path[path["attempt"] > 1].groupby("tier", sort=False):
        each = ", ".join(rows["domain"].unique())
        notes.append(
            f"{tier}: virtual training broke, or fell far below its start, in steps that stood for many, and was run again in "
            f"finer ones ({each})"
        )
    for (objective, by), rows in cells.groupby(["objective", "tier"], sort=False):
        notes += _notes_on_cells(f"{objective}, {by}", rows)
    return notes


def _notes_on_cells(where: str, rows: pd.DataFrame) -> list[str]:
    notes = []
    instead = {
        "second": "told by the second-order polynomial, since the importance weights fail at the moved policy",
        "sampled": "told by fresh rollouts of the moved policy, since the importance weights fail there",
        "first": "told to first order, since the importance weights fail at the moved policy",
    }
    if (rows["route"] == "first").all():  # the gradient tier
        del instead["first"]
    for route, why in instead.items():
        told = rows[rows["route"] == route]
        if len(told):
            each = ", ".join(f"{r['update']} on {r['domain']}" for r in told.to_dict("records"))
            notes.append(f"{where}: {len(told)} of {len(rows)} cells are {why} ({each})")
    bare = rows[(rows["noise_ess"] < LOW_ESS) & ~rows["route"].isin(("first", "second"))]
    if len(bare):
        notes.append(
            f"{where}: in {len(bare)} of {len(rows)} cells the noise of the estimated update is not taken out, since too few "
            "responses are effective at either half's estimate"
        )
    few = rows[rows["ess"] < LOW_ESS]
    if len(few):
        least = few.nsmallest(1, "ess").iloc[0]
        notes.append(
            f"{where}: effective sample size below {100 * LOW_ESS:.0f} % in {len(few)} of {len(rows)} cells (least: "
            f"{100 * least['ess']:.1f} % for {least['update']} on {least['domain']}); there the update moves the policy far from "
            "its rollouts, and neither the forecast nor its interval is to be trusted"
        )
    far = rows[rows["beyond_radius"]]
    if len(far):
        off = (far["predicted_second"] - far["predicted"] + far["noise_term"]).abs()
        most = far.assign(off=off).nlargest(1, "off").iloc[0]
        notes.append(
            f"{where}: {len(far)} of {len(rows)} cells are beyond the radius of the second order (most: {most['update']} on "
            f"{most['domain']}, second order {most['predicted_second']:+.3g}, evaluated {most['predicted']:+.3g}); sequences, "
            "mixtures and merges from the quadratic models do not hold there"
        )
    blind = rows[rows["stderr"].isna()]["domain"].unique()
    notes += [f"{where}: {name} has one prompt, so there are no error bars" for name in blind]
    return notes
