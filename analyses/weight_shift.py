# %% [markdown]
# # Where do the updates sit, and do they meet?
#
# A run of `interference geometry` holds what can be read from the weights alone: for every update (a tuned checkpoint minus the
# base) its size, the weights that it changes and its spectrum, and for every pair of updates what they share, beside what
# chance gives. This analysis reads those records and asks:
#
# 1. How big is each update, and where does it sit?
# 2. How sparse is it, under three rules of what counts as changed?
# 3. Do the domains change the same weights?
# 4. Do they move them in the same direction?
# 5. Do they use the same subspaces?
# 6. Do they change the same neurons most?
# 7. What do these numbers say about interference?
#
# Open it as a notebook (VS Code, or `jupytext --to notebook`), or run it as a script:
#
#     python analyses/weight_shift.py [RUN_DIR] [FOLDER_FOR_FIGURES]
#
# In a notebook, set `INTERFERENCE_RUN` to read another run than `runs/demo-geometry`. Figures are saved only when a folder is
# given.

# %%
from __future__ import annotations

import os
import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

import figures
from figures.directions import SIDES, kind_of, telling
from figures.masks import changed_by_place
from figures.pairs import RULES, beyond, models_of
from figures.runs import open_run
from figures.style import Z90

NOTEBOOK = "ipykernel" in sys.modules
GIVEN = [] if NOTEBOOK else sys.argv[1:]
RUN_DIR = Path(GIVEN[0] if GIVEN else os.environ.get("INTERFERENCE_RUN", "runs/demo-geometry"))
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


run = open_run(RUN_DIR, "make demo")
models = models_of(run.results)
norms, masks, cosines = run.geometry("norms"), run.geometry("masks"), run.geometry("cosines")
subspaces, overlap = run.geometry("subspaces"), run.geometry("neuron_overlap")
print(f"run      {run.path}")
print(f"base     {run.results['base']}")
print(f"updates  {', '.join(models)}")
for finding in run.geometry("audits").query("severity != 'note'").to_dict("records"):
    print(f"{finding['severity']}: {finding['model']} {finding['tensor']} {finding['message']}")

# %% [markdown]
# ## 1. How big, and where?
#
# `relative_norm` is the update's norm over the base's, `largest` the largest change of one weight, `identical` the share of
# weights with the very same bits. Below, each module's share of the update's squared norm: it says where the update is, while
# the share of weights changed says how widely it is spread there.

# %%
whole = norms[norms["scope"] == "model"].set_index("model")
print(whole[["norm", "relative_norm", "largest", "identical"]].to_string())

tensors = norms[norms["scope"] == "tensor"]
energy = tensors.assign(squared=tensors["norm"] ** 2).pivot_table(
    index="module", columns="model", values="squared", aggfunc="sum", observed=True
)
print("\nshare of the squared norm of each update, by module")
print((energy / energy.sum()).reindex(columns=models).to_string())

# %% [markdown]
# ## 2. How sparse, by which rule?
#
# Each rule draws the line elsewhere. "relative" is what a bfloat16 checkpoint can tell apart; "absolute" calls any change above
# 0.00001 one, however large the weight; "lpt" asks for both to be small before it calls a weight unchanged. A sparsity without
# its rule is not a number that can be compared.

# %%
sparsity = whole[[f"sparsity_{rule}" for rule in RULES]]
print("share of weights that did not change")
print(sparsity.to_string())
for name, rule in RULES.items():
    print(f"  {name}: changed where {rule}")
changed = changed_by_place(norms)
widest = changed.sort_values("changed", ascending=False).groupby("model", sort=False).head(3)
print("\nwhere each update changes most of the weights (rule relative)")
print(widest.sort_values("model", kind="stable")[["model", "layer", "module", "changed"]].to_string(index=False))
show(figures.sparsity_by_layer(norms, run.results), "sparsity")

# %% [markdown]
# ## 3. Do the domains change the same weights?
#
# Two masks that know nothing of each other overlap by chance, the more the denser they are. `chance_stratified` shuffles each
# update's changes within every tensor: if both merely prefer the same tensors, it is as high as the overlap. Only what lies
# beyond `low` to `high`, its 90 % interval, says that they prefer the same weights.


# %%
def outside(table: pd.DataFrame, column: str) -> list[bool]:
    """Which rows lie outside their interval of chance."""
    return [beyond(*map(float, row)) for row in table[[column, "low", "high"]].to_numpy()]


pairs = masks[(masks["scope"] == "model") & (masks["rule"] == "relative")].copy()
pairs["beyond"] = outside(pairs, "jaccard")
if len(pairs):
    columns = ["a", "b", "density_a", "density_b", "jaccard", "chance", "chance_stratified", "low", "high", "beyond"]
    print(pairs[columns].to_string(index=False))
    show(figures.mask_overlap(masks, run.results), "masks")
else:
    print("one update, no pairs")

consensus = run.geometry("consensus").query("scope == 'model'")
if len(consensus):
    print("\nshare of weights changed by so many updates, and if they were independent")
    print(consensus[["changed_in", "share", "chance"]].to_string(index=False))

# %% [markdown]
# ## 4. In the same direction?
#
# `null_std` is the standard deviation of the cosine if the two had nothing to do with each other. For dense updates of n weights
# it is about 1 / sqrt(n): in a large model almost any cosine is beyond it, so its size matters, not its significance.
# `sign_agreement` looks only at weights that both change.

# %%
directions = cosines[cosines["scope"] == "model"].copy()
directions["beyond"] = directions["cosine"].abs() > Z90 * directions["null_std"]
if len(directions):
    columns = ["a", "b", "cosine", "null_std", "beyond", "projected_mean", "projected_std", "sign_agreement", "both"]
    print(directions[columns].to_string(index=False))
    show(figures.update_cosine(cosines, run.results), "cosines")
else:
    print("one update, no pairs")

# %% [markdown]
# ## 5. In the same subspaces?
#
# Two updates can have cosine zero and yet write to the same directions of the residual stream: then one can disturb what the
# other built. `overlap` is |Ua'Ub|² / k, with chance k / m for random subspaces of m dimensions. Left is the output side of a
# matrix, right its input side.

# %%
if len(subspaces):
    table = subspaces.assign(
        part=[kind_of(str(module)) for module in subspaces["module"]],
        beyond=pd.Series(outside(subspaces, "overlap"), index=subspaces.index).astype(float).where(telling(subspaces)),
    )
    summary = table.groupby(["a", "b", "part", "side"], sort=False, observed=True).agg(
        matrices=("tensor", "size"), overlap=("overlap", "mean"), chance=("chance", "mean"), beyond=("beyond", "mean")
    )
    print("mean overlap over matrices; share of them beyond their 90 % interval, NaN where k is the whole side")
    print(summary.reset_index().to_string(index=False))
    angles = run.geometry("angles")
    for side in SIDES:
        if (angles["side"] == side).any():
            show(figures.angle_spectra(angles, run.results, side), f"angles_{side}")
else:
    print("no subspaces were compared")

spectra = run.geometry("spectra")
if len(spectra):
    shown = [
        "stable_rank",
        "rank_ratio",
        "nss",
        "rotation_left",
        "rotation_right",
        "principal_overlap",
        "low_magnitude_overlap",
    ]
    print("\nmeans over matrices; both overlaps would be alpha by chance")
    print(spectra.groupby("model", sort=False)[[*shown, "alpha"]].mean().to_string())

# %% [markdown]
# ## 6. The same neurons?
#
# The channels (rows of gate and up, columns of down) and heads that an update changes most: do two updates choose the same?
# Chance is q / (2 - q) for two random sets of a share q.

# %%
units = overlap[overlap["scope"] == "model"].copy()
if len(units):
    units["beyond"] = outside(units, "jaccard")
    print(
        units[["kind", "top", "a", "b", "count", "jaccard", "chance", "low", "high", "beyond"]].to_string(index=False)
    )
    show(figures.neuron_overlap(overlap, run.results), "neurons")
else:
    print("no channels or heads were compared")

# %% [markdown]
# ## 7. What does each number say about interference?
#
# - **Same weights** (masks): where masks meet only by chance, merging the updates leaves most weights to one of them. Meeting is
#   not yet harm: two updates may want the same change.
# - **Same direction** (cosine, signs): a negative cosine says that one update undoes part of the other; a positive one, that
#   they share some of what they learned. Near zero says only that, on the whole, they are at right angles: a weight can be
#   small in the sum and large in its effect.
# - **Same subspaces**: where leading subspaces overlap and the cosine does not follow, both write to the same directions with
#   other coefficients; this is where interference can hide from the cosine.
# - **Same neurons**: says where to look for it.
#
# None of these knows the loss. `interference diagnose` does, and its first and second order say what an update changes; compare.

# %%
for pair in pairs.to_dict("records"):
    a, b = pair["a"], pair["b"]
    cosine = directions[(directions["a"] == a) & (directions["b"] == b)]["cosine"]
    place = subspaces[(subspaces["a"] == a) & (subspaces["b"] == b)]
    share = "more" if pair["jaccard"] > pair["high"] else "fewer" if pair["jaccard"] < pair["low"] else "no more"
    more = share if pd.notna(pair["high"]) else "perhaps more"
    said = (
        f"{a}, {b}: {more} common weights than chance ({pair['jaccard']:.2f} against {pair['chance_stratified']:.2f})"
    )
    if len(cosine):
        said += f", cosine {cosine.iloc[0]:+.3f}"
    if len(place):
        said += f", subspaces {place['overlap'].mean():.2f} against {place['chance'].mean():.2f}"
    print(said + ".")
