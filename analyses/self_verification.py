# %% [markdown]
# # Do models know when they are wrong, how early, and where?
#
# Each model judged its own responses: from the final answer alone (outcome mode) and from the whole response (process mode), then
# from the first part of it, then step by step. A run of `interference probe` holds its scores against the verifiable reward, each
# beside chance. M2RL (arXiv 2602.12566) reports that process beats outcome before RL on math and code, the reverse on following
# instructions, and that RL sharpens a domain's own mode. This analysis reads the records and asks:
#
# 1. Can the verdicts be scored at all?
# 2. Who tells right from wrong beyond chance?
# 3. Does the reasoning help the judge, and what did training change?
# 4. From how much of the response can it tell?
# 5. Does it see the step where the response went wrong?
#
# Open it as a notebook (VS Code, or `jupytext --to notebook`), or run it as a script:
#
#     python analyses/self_verification.py [RUN_DIR] [FOLDER_FOR_FIGURES]
#
# In a notebook, set `INTERFERENCE_RUN` to read another run than `runs/m2rl-probe`. Figures are saved only when a folder is given.

# %%
from __future__ import annotations

import os
import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

import figures
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
scores, changes = run.probe("verification"), run.probe("verification_changes")
horizon, locus, agreement = run.probe("horizon"), run.probe("locus"), run.probe("locus_agreement")
print(f"run      {run.path}")
print("models   " + ", ".join(f"{name} ({kinds[name]})" for name in models))
if scores.empty and locus.empty:
    sys.exit("this run has no verdicts: ask for the probe self_verification or locus")

# %% [markdown]
# ## 1. Can they be scored?
#
# `mass` is the probability that the judge gives to its words for yes and no together. Where it is far from 1 the judge did not
# answer the question, and its log-odds say little. A `reason` says why there is no score.

# %%
for row in scores.drop_duplicates(["model", "domain", "mode"]).to_dict("records"):
    if row["mass"] < 0.5 or row["unparsable"] > 0 or row["reason"]:
        print(
            f"{row['model']} on {row['domain']} ({row['mode']}): mass {row['mass']:.2g}, unparsable {row['unparsable']:.0%}"
        )

# %% [markdown]
# ## 2. Beyond chance?
#
# Balanced accuracy and AUROC do not depend on how many responses are correct; an accuracy does, so its chance level is printed
# with it: an always-yes judge has the base rate as both. Chance is independence of the reward: a judge that knows only which
# prompts are hard is above it, except by `within_prompt_auroc`, which compares responses to one prompt.

# %%
main = scores[scores["metric"].isin(["balanced_accuracy", "auroc", "within_prompt_auroc", "accuracy"])]
print(main[["domain", "model", "mode", "metric", "value", "low", "high", "chance"]].to_string(index=False))
auroc = scores[(scores["metric"] == "within_prompt_auroc") & scores["low"].notna()]
print(
    f"\n{(auroc['low'] > auroc['chance']).sum()} of {len(auroc)} tell responses to one prompt apart beyond chance, "
    f"{0.05 * len(auroc):.1f} by chance alone"
)

# %% [markdown]
# ## 3. Outcome or process, before and after
#
# "process - outcome": does the reasoning help this judge? "model - base": what did training change? Both the judge and what it
# judges change then, since each model judges its own responses.

# %%
balanced = changes[changes["metric"] == "balanced_accuracy"] if len(changes) else changes
columns = ["comparison", "domain", "model", "mode", "before", "after", "difference", "low", "high", "excludes_zero"]
if len(balanced):
    print(balanced[columns].to_string(index=False))
if set(scores["mode"]) == {"outcome", "process"}:
    show(figures.outcome_against_process(scores, run.results), "outcome_process")

# %% [markdown]
# ## 4. How early?
#
# AUROC by the share of the response seen. At 0 the judge sees only the task: what it knows there is that the task is hard, not
# that the attempt fails.

# %%
if len(horizon):
    curve = horizon[horizon["metric"] == "auroc"]
    print(curve.pivot_table(index=["domain", "model"], columns="horizon", values="value", sort=False).to_string())
    show(figures.horizon_curve(horizon, run.results), "horizon")
else:
    print("no horizon was recorded")

# %% [markdown]
# ## 5. Where?
#
# `locus` is the step from which on the judge holds a wrong response for wrong; the true step was planted, or is the one after
# which continuations cease to succeed. `chance` is the judge's own loci given to other prompts' responses
# of as many steps, `constant` the best constant step, chosen knowing the truth.

# %%
if len(agreement):
    print(
        agreement[
            ["domain", "model", "source", "metric", "value", "low", "high", "chance", "constant", "trajectories"]
        ].to_string(index=False)
    )
    show(figures.locus_of_error(locus, run.results), "locus")
else:
    print("no errors were located: ask for the probe locus")

for model in ["base", *models]:
    mine = auroc[auroc["model"] == model]
    parts = [
        f"{mode} {(rows['low'] > rows['chance']).sum()} of {len(rows)} domains"
        for mode, rows in mine.groupby("mode", sort=False)
    ]
    exact = agreement[(agreement["model"] == model) & (agreement["metric"] == "exact")]
    if len(exact):
        parts.append(f"the very step on {(exact['above_low'] > 0).sum()} of {len(exact)}")
    print(f"{model}: beyond chance in " + (", ".join(parts) if parts else "nothing that could be scored") + ".")
