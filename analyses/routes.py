# %% [markdown]
# # Do domains share routes, and does the update point the same way there?
#
# Updates of two domains can change different weights and still meet: both domains may run through the same channels and heads.
# A run of `interference probe` with the probe `routes` holds, for every model, which units it uses most while it writes its own
# responses to a domain's prompts (its active routes; the score is our stand-in, the paper's is not known), the experts' updates
# on the routes that two domains share, and the gradients of the domains at the base. This analysis asks:
#
# 1. Do domains share routes, more than chance, and as much as one domain with itself?
# 2. Does training change that?
# 3. Do the experts' updates point the same way there?
# 4. Do the domains pull the weights the same way, as a whole and module by module?
# 5. What do these numbers say about interference?
#
# Open it as a notebook (VS Code, or `jupytext --to notebook`), or run it as a script:
#
#     python analyses/routes.py [RUN_DIR] [FOLDER_FOR_FIGURES]
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
from figures.gradients import certain
from figures.pairs import beyond
from figures.policies import domains_of
from figures.routes import KINDS, kinds_of, middle_top
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
overlaps, directions, gradients = (run.probe(n) for n in ("route_overlap", "route_direction", "gradient_agreement"))
print(f"run      {run.path}")
print(f"base     {run.results['base']}")
print(f"domains  {', '.join(domains_of(run.results))}")
for note in run.results["notes"]:
    print(f"note     {note}")

# %% [markdown]
# ## 1. Do domains share routes?
#
# The Jaccard index of the top q of each layer's units of two domains in the base; `share` is q in whole units. Two things to
# hold it against: `chance` with `chance_low` to `chance_high`, what random sets of these sizes give (q / (2 - q)); and the two
# halves of one domain's prompts, the most that sampling leaves. Two domains that ran through wholly different units would be at
# chance, two that are one domain would be among the halves.


# %%
def outside(table: pd.DataFrame, column: str, low: str, high: str) -> list[bool]:
    """Which rows lie outside their interval of chance."""
    return [beyond(*map(float, row)) for row in table[[column, low, high]].to_numpy()]


base = overlaps[(overlaps["model"] == "base") & (overlaps["scope"] == "model")]
if len(base):
    across, own = base[base["a"] != base["b"]].copy(), base[base["a"] == base["b"]]
    across["beyond"] = outside(across, "jaccard", "chance_low", "chance_high")
    columns = ["kind", "share", "a", "b", "count", "jaccard", "chance", "chance_low", "chance_high", "beyond"]
    print(across[columns].to_string(index=False) if len(across) else "one domain, no pairs")
    print("\nhalves of one domain")
    print(own[["kind", "share", "a", "jaccard", "chance"]].to_string(index=False))
    show(figures.route_overlap(overlaps, run.results), "route_overlap")
else:
    print("no routes were recorded: ask for the probe `routes`")

# %% [markdown]
# The rows above take all layers together. Of one layer by itself there is less to go by, and with few heads even equal sets are
# not rare by chance; below, the mean over layers and pairs, and the share of them beyond chance.

# %%
layers = overlaps[
    (overlaps["model"] == "base") & (overlaps["scope"] == "layer") & (overlaps["a"] != overlaps["b"])
].copy()
if len(layers):
    layers["beyond"] = outside(layers, "jaccard", "chance_low", "chance_high")
    within = layers.groupby(["kind", "top"], sort=False)[["jaccard", "chance", "beyond"]].mean()
    print(within.reset_index().to_string(index=False))

# %% [markdown]
# ## 2. Does training change that?
#
# The same in every expert on its own responses. If experts had drifted to routes of their own, domains would share fewer in them.

# %%
whole = overlaps[(overlaps["scope"] == "model") & (overlaps["a"] != overlaps["b"])]
if len(whole):
    top = middle_top(whole)
    by_model = whole[whole["top"] == top].groupby(["kind", "model"], sort=False)[["jaccard", "chance"]].mean()
    print(f"mean over pairs, top {top:g}")
    print(by_model.reset_index().to_string(index=False))

# %% [markdown]
# ## 3. Do the updates point the same way on shared routes?
#
# The cosine of two experts' updates on the weights of the units that both domains use, beside that of as many units drawn at
# random from the same layers (`cosine_chance`, `cosine_chance_low` to `cosine_chance_high`) and of the whole updates. The sign
# says whether the two move what both use together or apart; only outside of the interval is it more than on any routes.

# %%
shared = directions[directions["layer"] == -1].copy()
if len(shared):
    shared["beyond"] = outside(shared, "cosine", "cosine_chance_low", "cosine_chance_high")
    columns = [
        "kind",
        "top",
        "a",
        "b",
        "count",
        "cosine",
        "cosine_chance",
        "cosine_chance_low",
        "cosine_chance_high",
        "beyond",
    ]
    print(shared.loc[shared["kind"] != "all", [*columns, "sign_agreement"]].to_string(index=False))
    print("\nwhole updates")
    print(
        shared[shared["kind"] == "all"]
        .drop_duplicates(["a", "b"])[["a", "b", "cosine", "sign_agreement"]]
        .to_string(index=False)
    )
    show(figures.route_direction(directions, run.results), "route_direction")
else:
    print("fewer than two experts, no updates to compare")

# %% [markdown]
# ## 4. Do the domains pull the weights the same way?
#
# Cosines of two domains' gradients at the base. The claim to hold this against: the whole model's cosine is near zero while
# single modules strongly agree or conflict, and cancel. `noise_floor` is what noise alone gives 90 % of the time; `split_a` and
# `split_b`, cosines of one domain's own halves, say how much of a gradient is signal at all.

# %%
if len(gradients):
    table = gradients.assign(certain=certain(gradients))
    columns = ["a", "b", "cosine", "noise_floor", "certain", "split_a", "split_b", "disattenuated"]
    print(f"objective {gradients['objective'].iloc[0]}, whole model")
    print(table.loc[table["scope"] == "model", columns].to_string(index=False))
    parts = table[table["scope"] == "part"]
    counted = pd.DataFrame(
        {
            "same way": parts["certain"] & (parts["cosine"] > 0),
            "against": parts["certain"] & (parts["cosine"] < 0),
            "within noise": ~parts["certain"],
        }
    )
    print("\nmodules of single layers, how many")
    print(counted.groupby([parts["a"], parts["b"]], sort=False).sum().reset_index().to_string(index=False))
    show(figures.gradient_cosine(gradients, run.results), "gradient_cosine")
else:
    print("no gradients were compared")

# %% [markdown]
# ## 5. What does each number say about interference?
#
# - **Shared routes** say where two domains can meet. They are no harm by themselves: two domains of one language share much.
# - **Direction on shared routes** says whether the updates would undo each other there. If it is what random routes give, the
#   shared routes are nothing special: what the updates have in common, they have everywhere.
# - **Gradient cosines** say what a first small step of one domain does to the other. A whole-model cosine near zero can hide
#   modules that conflict and modules that agree.
#
# None of these is the change of a domain's loss or reward: `interference diagnose` measures and forecasts that. Compare, and let
# the measured sign say what is conflict.

# %%
for r in shared[shared["top"] == middle_top(shared)].to_dict("records") if len(shared) else []:
    if r["kind"] == "all":
        continue
    found = overlaps[(overlaps["model"] == "base") & (overlaps["scope"] == "model") & (overlaps["kind"] == r["kind"])]
    found = found[
        (found["top"] == r["top"]) & (found["a"].isin([r["a"], r["b"]])) & (found["b"].isin([r["a"], r["b"]]))
    ]
    pair = found[found["a"] != found["b"]]["jaccard"]
    said = f"{r['a']}, {r['b']}: top {r['top']:g} of {KINDS.get(r['kind'], r['kind'])}"
    said += f" overlap {pair.iloc[0]:.2f}" if len(pair) else ""
    way = "beyond" if r["beyond"] else "within"
    if pd.notna(r["cosine"]):
        side = "the same way" if r["cosine"] > 0 else "against each other"
        said += f", updates point {side} there ({r['cosine']:+.2f}), {way} what random routes give ({r['cosine_chance']:+.2f})"
    print(said + ".")
print(f"kinds of units compared: {', '.join(kinds_of(shared)) if len(shared) else 'none'}")
