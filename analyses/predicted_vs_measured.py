# %% [markdown]
# # Does the local theory explain what was measured?
#
# A run of `interference diagnose` holds, for every update (a checkpoint minus the base) and every domain, what a quadratic
# model at the base predicts and what was measured. This analysis reads those records and asks:
#
# 1. Which updates hurt or help which domains?
# 2. Does the prediction get order, sign and size right?
# 3. Where does the first order fail, and does the second repair it? Does the GGN do as well as the Hessian?
# 4. Would a simple baseline have done as well?
# 5. How far along an update does the local model hold?
#
# Open it as a notebook (VS Code, or `jupytext --to notebook`), or run it as a script:
#
#     python analyses/predicted_vs_measured.py [RUN_DIR] [FOLDER_FOR_FIGURES]
#
# In a notebook, set `INTERFERENCE_RUN` to read another run than `runs/demo`. Figures are saved only when a folder is given.

# %%
from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import figures
from figures.data import cells_of, order, quantity
from figures.runs import open_run
from figures.style import Z90, predictor

NOTEBOOK = "ipykernel" in sys.modules
GIVEN = [] if NOTEBOOK else sys.argv[1:]
RUN_DIR = Path(GIVEN[0] if GIVEN else os.environ.get("INTERFERENCE_RUN", "runs/demo"))
FOLDER = Path(GIVEN[1]) if len(GIVEN) > 1 else None

pd.options.display.width = 120
pd.options.display.float_format = lambda value: f"{value:.3g}"


def show(figure: Figure, name: str) -> None:
    """Save the figure when a folder was given; display it in a notebook."""
    if FOLDER is not None:
        print("figure:", figures.save(figure, FOLDER, name)[0])
    if NOTEBOOK:
        from IPython.display import display

        display(figure)


run = open_run(RUN_DIR, "make demo")
updates, domains = order(run.results)
objectives = list(run.results["objectives"])
curves = run.curves()
print(f"run       {run.path}")
print(f"updates   {', '.join(updates)}")
print(f"domains   {', '.join(domains)}")
print(f"objective {', '.join(objectives)}")

# %% [markdown]
# ## 1. Who hurts whom?
#
# Rows were trained on, columns changed. A star marks a change beyond its own 90 % noise.

# %%
for objective in objectives:
    about = quantity(run.results, objective)
    cells = cells_of(run.results, objective)
    observed = "measured" if cells["measured"].notna().any() else "predicted_second"
    beyond = cells["detected"] if observed == "measured" else cells["certain"]
    text = cells[observed].map("{:+.3f}".format) + beyond.map({True: "*", False: " "})
    table = cells.assign(text=text).pivot_table(index="update", columns="domain", values="text", aggfunc="first")
    print(f"\n{observed.replace('_', ' ')} {about.label}; {about.better} is better")
    print(table.reindex(index=updates, columns=domains).to_string())
    show(figures.interference_matrix(run.results, objective), f"{objective}_matrix")

# %% [markdown]
# ## 2. Order, sign and size
#
# Spearman asks for the order, sign accuracy for the direction (only where a change was beyond noise), the slope for the size
# (measured on predicted; 1 is calibrated), coverage for how often sampling noise alone explains what is left
# (`coverage_truncation`: sampling noise and what is predicted, from alpha up to 0.5, to be left out).
# Off-diagonal cells only: a domain's own update is the easy case.

# %%
COLUMNS = ["spearman", "spearman_low", "spearman_high", "pearson", "sign_accuracy", "slope", "r2", "coverage"]
COLUMNS += ["coverage_truncation", "cells"]


def scorecard(objective: str, where: str = "off_diagonal") -> pd.DataFrame:
    """The record's scores as a table, one row per predictor; empty where nothing was measured."""
    cards = run.results["scorecards"].get(objective, {})
    card = cards.get(where) or cards.get("all") or {}
    rows = {predictor(name).label: {c: scores.get(c) for c in COLUMNS} for name, scores in card.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=COLUMNS).astype(float)


LOCAL = [predictor(name).label for name in ("second_order", "second_order_ggn", "first_order", "third_order")]
for objective in objectives:
    card = scorecard(objective)
    if card.empty:
        print(f"\n{objective}: nothing was measured, so nothing can be scored")
        continue
    print(f"\n{objective}, off-diagonal cells")
    print(card.loc[[label for label in LOCAL if label in card.index]].to_string())
    show(figures.predicted_against_measured(run.results, objective), f"{objective}_scatter")

# %% [markdown]
# ## 3. What does the second order add?
#
# Error of each prediction in units of the measurement's standard error: below about 1.6 the two agree within noise. A *repair*
# is a cell whose first order is beyond noise and whose second order is not; a *flip* is a wrong sign put right.


# %%
def errors(objective: str) -> pd.DataFrame:
    """Absolute error of the three local predictions in standard errors of the measurement, off-diagonal cells first."""
    cells = cells_of(run.results, objective)
    cells = cells[cells["measured"].notna() & (cells["measured_stderr"] > 0)]
    out = cells[["update", "domain", "own", "measured", "detected"]].copy()
    for name, column in (
        ("first", "predicted_first"),
        ("hessian", "predicted_second"),
        ("ggn", "predicted_second_ggn"),
    ):
        out[name] = (cells[column] - cells["measured"]).abs() / cells["measured_stderr"]
        out[f"{name}_sign"] = np.sign(cells[column]) == np.sign(cells["measured"])
    return out.sort_values(["own", "first"], ascending=[True, False])


for objective in objectives:
    table = errors(objective)
    if table.empty:
        continue
    off = table[~table["own"]] if (~table["own"]).any() else table
    repaired = off[(off["first"] > Z90) & (off["hessian"] <= Z90)]
    spoilt = off[(off["first"] <= Z90) & (off["hessian"] > Z90)]
    flipped = off[off["detected"] & ~off["first_sign"] & off["hessian_sign"]]
    print(f"\n{objective}: error in standard errors of the measurement, worst first order first")
    print(table[["update", "domain", "measured", "first", "hessian", "ggn"]].head(8).to_string(index=False))
    print(f"median error: first {off['first'].median():.2f}, Hessian {off['hessian'].median():.2f}, ", end="")
    print(f"GGN {off['ggn'].median():.2f} standard errors ({len(off)} cells)")
    print(f"the second order repairs {len(repaired)}, spoils {len(spoilt)}, puts {len(flipped)} signs right")

# %% [markdown]
# ## 4. Would a baseline have done as well?
#
# Baselines rank without a unit, so their slope means nothing. They have no interval of sampling noise, so their coverage (of a
# fitted line's prediction interval) is another thing than ours and left out; R2 comes from a line fitted to the other cells.

# %%
for objective in objectives:
    card = scorecard(objective)
    if card.empty:
        continue
    baselines = card.drop(index=[label for label in LOCAL if label in card.index]).drop(
        columns=["slope", "coverage", "coverage_truncation"]
    )
    print(f"\n{objective}, off-diagonal cells")
    print(baselines.to_string())
    show(figures.predictor_scoreboard(run.results, objective), f"{objective}_scoreboard")

# %% [markdown]
# ## 5. How far does the local model reach?
#
# The radius is the smallest alpha at which the second order is off by more than 10 % of the change and by more than noise
# ("left"); "held" is a lower bound, the largest alpha tried. For a reward the observation is an importance-weighted estimate on
# the base's own rollouts; where its effective sample size falls below a tenth, it judges nothing ("ess").

# %%
for objective in objectives:
    radii = cells_of(run.results, objective)
    show(figures.change_along_update(curves, run.results, objective), f"{objective}_curves")
    if (radii["radius_reason"] == "none").all():
        print(f"\n{objective}: no radius was recorded")
        continue
    print(
        f"\n{objective}: the radius, shortest first, and the share that is left out at alpha 1 as predicted and as found"
    )
    radii["predicted_share"] = radii["truncation"] / radii["predicted_second"]
    radii["found_share"] = radii["remainder"] / radii["predicted_second"]
    columns = ["update", "domain", "radius", "radius_reason", "beyond_radius", "predicted_share", "found_share"]
    print(radii.sort_values("radius")[columns].to_string(index=False))

# %% [markdown]
# ## Answer

# %%
for objective in objectives:
    card = scorecard(objective)
    if card.empty or card.loc[LOCAL[0]].isna()["spearman"]:
        print(f"{objective}: too little was measured to say.")
        continue
    second, first = card.loc[LOCAL[0]], card.loc[LOCAL[2]]
    rest = card.drop(index=[label for label in LOCAL if label in card.index])["spearman"].dropna()
    best = f"; best baseline {rest.idxmax()} {rest.max():.2f}" if len(rest) else ""
    print(
        f"{objective}: Spearman second order {second['spearman']:.2f}, first order {first['spearman']:.2f}{best}. "
        f"Slope {second['slope']:.2f} against {first['slope']:.2f} for the first order; sign {second['sign_accuracy']:.2f}."
    )
