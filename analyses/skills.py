# %% [markdown]
# # Do multi-task and merged models have the experts' skills?
#
# M2RL (arXiv 2602.12566) asks which items a model solves more often than the base, takes the union of the experts' gains and
# measures by a cosine how consistent another model's gains are with it. Finite samples alone make gains and a cosine well above
# zero, so a run of `interference probe` holds, beside each, what models that learned nothing would show. This analysis asks:
#
# 1. How much gain does sampling noise alone make?
# 2. What did each model gain beyond it?
# 3. Do the experts gain the same items?
# 4. Are the other models' gains those of the experts?
# 5. How much of the experts' skills do they retain?
#
# Open it as a notebook (VS Code, or `jupytext --to notebook`), or run it as a script:
#
#     python analyses/skills.py [RUN_DIR] [FOLDER_FOR_FIGURES]
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
gains, consistency, shared = run.probe("gains"), run.probe("consistency"), run.probe("shared")
print(f"run      {run.path}")
print("models   " + ", ".join(f"{name} ({kinds[name]})" for name in models))
if gains.empty:
    sys.exit("this run has no gains: ask for the probe skills")

# %% [markdown]
# ## 1. What does noise alone make?
#
# The base's own samples, split in halves, "gain" on themselves. A gain that is no larger than this is none.

# %%
split = gains[gains["role"] == "split"]
print(split[["domain", "gain", "null", "null_low", "null_high"]].to_string(index=False))

# %% [markdown]
# ## 2. Gains beyond it
#
# `null` is the mean gain of models with the base's own success rates and as many samples; `items` counts the items whose gain is
# beyond the 95 % point of their own null, `items_null` how many would be by chance.

# %%
learned = gains[gains["role"] != "split"]
columns = ["domain", "model", "gain", "low", "high", "null", "null_high", "beyond_null", "items", "items_null"]
print(learned[columns].to_string(index=False))

# %% [markdown]
# ## 3. Do the experts gain the same items?
#
# How many items no expert, one, two ... gained, beside the numbers that noise alone gives.

# %%
print(shared.to_string(index=False))

# %% [markdown]
# ## 4. Are the other models' gains the experts'?
#
# `consistency` is the cosine of the model's gains with the union; it means something only beyond `null_high`, and that the items
# are the experts' only beyond `independent_high`, that of the model's gains permuted over items of like base rate.

# %%
if len(consistency):
    columns = ["domain", "model", "consistency", "low", "high", "null", "null_high", "independent", "independent_high"]
    columns += ["beyond_null", "beyond_independent"]
    print(consistency[columns].to_string(index=False))
    show(figures.skill_consistency(consistency, run.results), "skills")
else:
    print("there is no multi-task or merged model to compare")

# %% [markdown]
# ## 5. How much do they retain?
#
# Two numbers that noise does not raise: the skill cosine, and the retained skill <experts, model> / <experts, experts>, with
# losses counted. NaN where the changes that they divide by are not beyond noise.

# %%
if len(consistency):
    columns = [
        "domain",
        "model",
        "skill_cosine",
        "skill_cosine_low",
        "skill_cosine_high",
        "retained",
        "retained_low",
        "retained_high",
    ]
    print(consistency[columns].to_string(index=False))
for model, rows in consistency.groupby("model", sort=False):
    sure, kept = int(rows["beyond_independent"].eq(True).sum()), rows["retained"].mean()
    text = f"{model} ({kinds[model]}): the experts' items beyond independent learning on {sure} of {len(rows)} domains"
    print(text + ("." if pd.isna(kept) else f", retaining {kept:.2f} of their skills on average where that is known."))
