# %% [markdown]
# # Was the forecast right?
#
# `interference forecast` predicts, from the base alone, how training on every domain would change every domain.
# `interference diagnose` measures what training did. This analysis puts a run of the one beside a run of the other and asks:
#
# 1. What was forecast?
# 2. Does it get order, sign and size right, and do its intervals hold what was measured?
# 3. Would the decisions have been right: whom each training hurts most, which two should not be mixed?
# 4. Which mixtures and orders were forecast to be best, where the request asked?
#
# Open it as a notebook, or run it as a script (figures are saved only when a folder is given):
#
#     python analyses/forecast.py [FORECAST_RUN] [DIAGNOSE_RUN] [FOLDER_FOR_FIGURES]

# %%
from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

import figures
from figures.runs import open_run
from figures.style import Z90

NOTEBOOK = "ipykernel" in sys.modules
GIVEN = [] if NOTEBOOK else sys.argv[1:]
FORECAST = Path(GIVEN[0] if GIVEN else os.environ.get("INTERFERENCE_FORECAST", "runs/demo-forecast"))
MEASURED = Path(GIVEN[1] if len(GIVEN) > 1 else os.environ.get("INTERFERENCE_RUN", "runs/demo"))
FOLDER = Path(GIVEN[2]) if len(GIVEN) > 2 else None

pd.options.display.width = 120


def show(figure: Figure, name: str) -> None:
    """Save the figure when a folder was given; display it in a notebook."""
    if FOLDER is not None:
        print("figure:", figures.save(figure, FOLDER, name)[0])
    if NOTEBOOK:
        from IPython.display import display

        display(figure)


forecast, truth = open_run(FORECAST, "make demo"), open_run(MEASURED, "make demo")
keys = ["objective", "update", "domain"]
cells = forecast.cells().merge(truth.cells()[[*keys, "measured", "measured_stderr"]], on=keys)
cells = cells[cells["measured"].notna()]
print(f"forecast  {forecast.path}")
print(f"measured  {truth.path}: {len(cells[keys].drop_duplicates())} cells in common")

# %% [markdown]
# ## 1. Forecast and measured
#
# Rows would be trained on, columns change.

# %%
for (objective, tier), part in cells.groupby(["objective", "tier"], sort=False):
    print(f"\n{objective}, {tier}: forecast (measured)")
    text = part["predicted"].map("{:+.3f}".format) + part["measured"].map(" ({:+.3f})".format)
    table = part.assign(text=text).set_index(["update", "domain"])["text"].unstack("domain")  # noqa: PD010
    print(table.reindex(index=forecast.results["updates"]).to_string())
if len(cells):
    show(figures.forecast_against_measured(cells), "forecast_against_measured")

# %% [markdown]
# ## 2. Order, sign and size
#
# Off-diagonal cells. Signs count where the measured change is beyond its own 90 % noise; the slope is of measured on forecast;
# coverage is how often the difference lies within the 90 % interval of both errors. Own cells: mean error, in reward or nats.


# %%
def scores(part: pd.DataFrame) -> dict[str, float]:
    """How one tier's forecasts of one objective did."""
    off = part[~part["own"].astype(bool)]
    x, y = off["predicted"].to_numpy(float), off["measured"].to_numpy(float)
    error = np.hypot(off["stderr"], off["measured_stderr"])
    beyond = (off["measured"].abs() > Z90 * off["measured_stderr"]).to_numpy()
    enough = len(off) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0
    own = part[part["own"].astype(bool)]
    return {
        "cells": len(off),
        "spearman": float(stats.spearmanr(x, y).statistic) if enough else np.nan,
        "pearson": float(stats.pearsonr(x, y).statistic) if enough else np.nan,
        "sign": float((np.sign(x) == np.sign(y))[beyond].mean()) if beyond.any() else np.nan,
        "slope": float(stats.linregress(x, y).slope) if enough else np.nan,
        "coverage": float((np.abs(y - x) <= Z90 * error).mean()) if len(off) else np.nan,
        "own_error": float((own["predicted"] - own["measured"]).abs().mean()),
    }


rows = {(o, t): scores(part) for (o, t), part in cells.groupby(["objective", "tier"], sort=False)}
card = pd.DataFrame.from_dict(rows, orient="index")
print(card.round(3).to_string())

# %% [markdown]
# ## 3. Decisions
#
# Chance is 1 in 3 for the domain hurt most and 1 in 6 for the pair, with four domains.


# %%
def matrix(part: pd.DataFrame, column: str) -> pd.DataFrame:
    """Change for the better (higher is better), off the diagonal; a row per update."""
    better = forecast.results["objectives"][part["objective"].iloc[0]]["better"]
    sign = 1.0 if better == "higher" else -1.0
    table = (sign * part.set_index(["update", "domain"])[column]).unstack("domain")  # noqa: PD010
    return table.mask(np.equal.outer(table.index.to_numpy(), table.columns.to_numpy()))


def worst_pair(table: pd.DataFrame) -> tuple[str, str]:
    """The two domains whose trainings do each other the most harm together."""
    names = [n for n in table.index if n in table.columns]
    return min(itertools.combinations(names, 2), key=lambda p: table.loc[p[0], p[1]] + table.loc[p[1], p[0]])


for (objective, tier), part in cells.groupby(["objective", "tier"], sort=False):
    said, found = matrix(part, "predicted"), matrix(part, "measured")
    if len(said) < 3:
        continue
    right = int((said.idxmin(axis=1) == found.idxmin(axis=1)).sum())
    pair, real = worst_pair(said), worst_pair(found)
    print(f"{objective}, {tier}: the domain hurt most is right for {right} of {len(said)} trainings; ", end="")
    print(f"not to be mixed: {' and '.join(pair)}" + ("" if pair == real else f" (measured: {' and '.join(real)})"))

# %% [markdown]
# ## 4. Which to mix, in which order
#
# Only where the request asked for `plans`. A plan is behind the best beyond noise where its distance is more than 1.645 standard
# errors; the others cannot be told from it. To see whether the pick was right, train the first few.

# %%
for kind, plans in forecast.forecast("plan_ranking").groupby("kind", sort=False):
    close = plans[plans["behind"] <= Z90 * plans["behind_stderr"]]["plan"].tolist()
    print(f"\n{kind}s, best on average first; not to be told from the best: {', '.join(close[1:]) or 'none'}")
    columns = ["plan", "mean", "mean_low", "mean_high", "worst", "worst_domain", "behind", "behind_stderr"]
    print(plans[columns].round(4).to_string(index=False))
    show(figures.plan_ranking(plans, forecast.results, str(kind)), f"plans_{kind}")
