# %% [markdown]
# # Are neighboring policies good for each other?
#
# M2RL (arXiv 2602.12566) says that an expert helps another domain when its policy is a *neighbor* there: on that domain's prompts
# it is no farther from the multi-task (or merged) policy than the domain's own expert. A run of `interference probe` holds the
# divergences, who is a neighbor, and what every policy scores. This analysis reads those records and asks:
#
# 1. Is the divergence more than sampling noise?
# 2. How far are the policies from one another?
# 3. Who is a neighbor of whom?
# 4. Do neighbors score better than the others, and better than the size of the divergence explains?
# 5. Could the divergence from the base have been forecast from the update alone?
#
# Open it as a notebook (VS Code, or `jupytext --to notebook`), or run it as a script:
#
#     python analyses/neighborhoods.py [RUN_DIR] [FOLDER_FOR_FIGURES]
#
# In a notebook, set `INTERFERENCE_RUN` to read another run than `runs/m2rl-probe`. Figures are saved only when a folder is given.

# %%
from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import figures
from figures.divergences import best_estimates
from figures.pairs import models_of
from figures.runs import open_run

NOTEBOOK = "ipykernel" in sys.modules
GIVEN = [] if NOTEBOOK else sys.argv[1:]
RUN_DIR = Path(GIVEN[0] if GIVEN else os.environ.get("INTERFERENCE_RUN", "runs/m2rl-probe"))
FOLDER = Path(GIVEN[1]) if len(GIVEN) > 1 else None

pd.options.display.width = 140
pd.options.display.max_columns = 20
pd.options.display.float_format = lambda value: f"{value:.3g}"


def show(figure: Figure, name: str) -> None:
    """Save the figure when a folder was given; display it in a notebook."""
    if FOLDER is not None:
        print("figure:", figures.save(figure, FOLDER, name)[0])
    if NOTEBOOK:
        from IPython.display import display

        display(figure)


run = open_run(RUN_DIR, "make lab-study")
models, kinds = models_of(run.results), run.results["kinds"]
kl, near, forecast = run.probe("kl"), run.probe("neighbors"), run.probe("kl_forecast")
print(f"run      {run.path}")
print(f"base     {run.results['base']}")
print("models   " + ", ".join(f"{name} ({kinds[name]})" for name in models))
if kl.empty:
    sys.exit("this run has no divergences: ask for the probe neighborhoods")

# %% [markdown]
# ## 1. More than noise?
#
# Of all estimators only k1 is of either sign, so only k1 can show that there is *no* divergence: equal policies lie above its
# noise in one of twenty cells.

# %%
tokens = kl[kl["per"] == "token"]
signed = tokens[(tokens["estimator"] == "k1") & tokens["low"].notna()]
print(
    f"{(signed['low'] > 0).sum()} of {len(signed)} divergences are beyond noise by k1, {0.05 * len(signed):.1f} by chance"
)

# %% [markdown]
# ## 2. How far apart?
#
# Rows are policies, columns the domains whose prompts they answer: KL(row || reference) in nats per token, by the estimator with
# the least noise that each cell has: none is exact where log-probabilities were given.

# %%
best = best_estimates(tokens)
for reference in [m for m in models if kinds[m] != "expert"] + ["base"]:
    rows = best[best["reference"] == reference]
    table = rows.pivot_table(index="policy", columns="domain", values="value", sort=False)
    print(f"\nKL(row || {reference}), {' or '.join(rows['estimator'].unique())}, nats per token")
    print(table.to_string())
show(figures.divergence_matrix(kl, near, run.results), "divergences")

# %% [markdown]
# ## 3. Who is a neighbor?
#
# `difference` is the expert's divergence from the reference minus that of the domain's own expert, paired over prompts. Only
# where its interval excludes 0 (`certain`) would another sample of responses say the same.

# %%
if len(near):
    print(
        near[
            ["reference", "domain", "expert", "kl", "eps", "difference", "low", "high", "neighbor", "certain"]
        ].to_string(index=False)
    )
else:
    print("no neighbor relation: it compares two or more experts with a multi-task or merged model")

# %% [markdown]
# ## 4. Do neighbors help?
#
# M2RL's claim has two halves: neighbors do better than the others, and being a neighbor says more than the size of the
# divergence. The first is a difference of means; the second compares two rank correlations with the change of reward. Cells that
# share an expert or a domain are not independent, so with few domains neither settles the question.


# %%
def rank_correlation(x: pd.Series, y: pd.Series) -> float:
    """Spearman's, NaN for fewer than three pairs or where one side is constant."""
    if len(x) < 3 or x.nunique() < 2 or y.nunique() < 2:
        return float("nan")
    return float(np.corrcoef(x.rank(), y.rank())[0, 1])


said = []
for reference, rows in near.groupby("reference", sort=False):
    seen = rows[rows["change"].notna()]
    mark = seen["neighbor"].astype(bool)
    means = [seen.loc[part, "change"].mean() for part in (mark, ~mark)]
    relation = rank_correlation(mark.astype(float), seen["change"])
    size = rank_correlation(-seen["kl"].astype(float), seen["change"])
    print(
        f"\nbeside {reference}: mean change of reward of neighbors {means[0]:+.3g}, of others {means[1]:+.3g} ({len(seen)} pairs)"
    )
    print(f"rank correlation with the change: of being a neighbor {relation:+.2f}, of a small divergence {size:+.2f}")
    told = (
        "cannot be compared with the others"
        if np.isnan(means).any()
        else f"gain {means[0] - means[1]:+.2g} more than the others"
    )
    said.append(f"beside {reference}, neighbors {told} ({len(seen)} pairs that share experts and domains)")

# %% [markdown]
# ## 5. Could it have been forecast?
#
# With the update d and the Fisher matrix F of the base, KL(base || tuned) = 1/2 d'Fd up to third order: known before anything is
# sampled from the tuned model. `ratio` is forecast over measured.

# %%
seen = forecast[forecast["ratio"].notna()] if len(forecast) else forecast
if len(seen):
    print(
        seen[
            ["reference", "domain", "forecast", "measured", "low", "high", "ratio", "ratio_low", "ratio_high"]
        ].to_string(index=False)
    )
    show(figures.kl_forecast_against_measured(forecast, run.results), "kl_forecast")
    said.append(f"the forecast is {seen['ratio'].median():.2f} of the measured divergence at the median")
else:
    print("nothing was forecast: no weights at hand, or neighborhoods.forecast is off")
print("\n" + ("; ".join(said) + "." if said else "no neighbor relation and no forecast."))
