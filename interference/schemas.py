"""Names of the tables that a run may hold, their columns, and the modules that they name."""

from __future__ import annotations

ATTRIBUTION = {
    "modules": ("layer", "module", "first", "second", "parameters"),
    "heads": ("layer", "kind", "head", "first", "second"),
    "channels": ("layer", "expert", "channel", "first", "second"),
    "tokens": (
        *("prompt_id", "sequence", "rank", "position", "token_id", "text", "prompt"),
        *("first", "second", "sequence_first", "sequence_second"),
    ),
}
"""Columns of the tables that split a predicted change into parts, after objective, update and domain."""

MODULES = (
    *("embedding", "embedding + head", "norm", "q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down"),
    *("router", "experts", "head", "other"),
)
"""Modules of `attribution("modules")` in the order of display, which is that of the computation. "embedding + head" is one
matrix that serves as both (tied); its parts hold what either use contributes."""

_PLACE = ("scope", "layer", "module", "tensor")
_MATRIX = ("tensor", "layer", "module")

GEOMETRY = {
    "norms": (
        *("model", *_PLACE, "numel", "norm", "base_norm", "relative_norm", "largest", "identical"),
        *("sparsity_relative", "sparsity_absolute", "sparsity_lpt", "sparsity_bf16"),
        *("row_ratio", "column_ratio", "row_chance", "column_chance"),
    ),
    "masks": (
        *("a", "b", "rule", *_PLACE, "numel", "density_a", "density_b", "jaccard", "chance", "chance_stratified"),
        *("low", "high", "overlap_a", "overlap_b", "chance_a", "chance_b"),
    ),
    "consensus": (*_PLACE, "changed_in", "share", "chance", "rule"),
    "cosines": (
        *("a", "b", *_PLACE, "cosine", "null_std", "sign_agreement", "sign_low", "sign_high", "both"),
        *("projected_mean", "projected_std", "projections", "projection_null"),
    ),
    "subspaces": (
        *("a", "b", *_MATRIX, "side", "k", "overlap", "chance", "low", "high"),
        *("largest_angle_deg", "smallest_angle_deg"),
    ),
    "angles": ("a", "b", *_MATRIX, "side", "index", "cosine", "chance_cosine"),
    "spectra": (
        *(
            "model",
            *_MATRIX,
            "rows",
            "columns",
            "spectral_norm",
            "stable_rank",
            "rank",
            "rank_ratio",
            "method",
            "error",
        ),
        *(
            "seed_overlap",
            "nss",
            "rotation_left",
            "rotation_right",
            "principal_overlap",
            "principal_low",
            "principal_high",
        ),
        *("low_magnitude_overlap", "low_magnitude_low", "low_magnitude_high", "alpha", "k"),
    ),
    "singular_values": ("model", "tensor", "index", "value"),
    "neurons": ("kind", "layer", "expert", "unit", "model", "change", "relative"),
    "neuron_overlap": (
        *("a", "b", "kind", "top", "scope", "layer", "count"),
        *("jaccard", "chance", "low", "high"),
    ),
    "audits": ("model", "check", "severity", "tensor", "message"),
}
"""Columns of the tables of a run of `interference geometry`. `a` stands before `b` in the order of the run's models."""

_BOUNDS = ("stderr", "low", "high")
_NULL = ("null", "null_low", "null_high", "beyond_null")
_JUDGED = ("metric", "value", *_BOUNDS, "chance", "reason", "trajectories", "prompts", "unparsable")

PROBES = {
    "performance": (
        "model",
        "domain",
        "value",
        *_BOUNDS,
        "change",
        "change_low",
        "change_high",
        "prompts",
        "sequences",
    ),
    "kl": (
        *("policy", "reference", "domain", "estimator", "per", "value", *_BOUNDS, "prompts", "sequences"),
        *("change", "change_stderr", "change_low", "change_high"),
    ),
    "kl_forecast": (
        *("policy", "reference", "domain", "forecast", "stderr", "measured", "low", "high"),
        *("ratio", "ratio_low", "ratio_high", "reason"),
    ),
    "neighbors": (
        *("reference", "domain", "expert", "kl", "eps", "difference", *_BOUNDS, "neighbor", "certain", "prompts"),
        *("change", "change_low", "change_high"),
    ),
    "route_overlap": (
        *("model", "a", "b", "kind", "top", "scope", "layer", "count", "active_a", "active_b", "share"),
        *("jaccard", "chance", "chance_low", "chance_high"),
    ),
    "route_direction": (
        *("a", "b", "kind", "top", "layer", "units", "share", "count"),
        *("cosine", "cosine_chance", "cosine_chance_low", "cosine_chance_high", "cosine_whole"),
        *("sign_agreement", "sign_chance", "sign_chance_low", "sign_chance_high", "sign_whole"),
    ),
    "gradient_agreement": (
        *("objective", "a", "b", "scope", "layer", "module", "parameters", "cosine", "lowest", "highest"),
        *("split_a", "split_b", "noise", "noise_floor", "disattenuated"),
    ),
    "gains": (*("domain", "model", "role", "gain", *_BOUNDS, *_NULL, "items", "items_null", "share", "share_null"),),
    "consistency": (
        *("domain", "model", "consistency", "low", "high", *_NULL),
        *("independent", "independent_low", "independent_high", "beyond_independent"),
        *("skill_cosine", "skill_cosine_low", "skill_cosine_high", "retained", "retained_low", "retained_high"),
    ),
    "shared": ("domain", "experts", "items", "items_null"),
    "items": ("domain", "item", "model", "rate", "gain"),
    "verification": ("model", "domain", "mode", *_JUDGED, "mass"),
    "verification_changes": (
        *("comparison", "model", "domain", "mode", "metric", "before", "after", "difference", *_BOUNDS),
        *("excludes_zero", "reason"),
    ),
    "verdicts": ("model", "domain", "mode", "prompt_id", "index", "reward", "yes", "score", "probability", "log_mass"),
    "horizon": (
        *("model", "domain", "mode", "unit", "horizon", "mean_tokens", "complete", *_JUDGED),
        *("to_longest", "to_longest_low", "to_longest_high", "from_prompt", "from_prompt_low", "from_prompt_high"),
    ),
    "locus": (
        *("model", "domain", "source", "prompt_id", "steps", "locus", "step", "step_low", "step_high", "no_fall"),
    ),
    "locus_agreement": (
        *("model", "domain", "source", "metric", "value", "low", "high", "chance"),
        *("above_chance", "above_low", "above_high", "constant", "trajectories"),
    ),
}
"""Columns of the tables of a run of `interference probe`. Models are "base" and those of the request; intervals are at 90 %.
In "route_overlap" a and b are domains, a == b the halves of one; in "route_direction" they are experts, by their domains.
In "verification_changes" the comparison is "model - base" (each on its own responses) or "process - outcome" (mode: "both")."""

FORECAST = {
    "path": ("tier", "domain", "half", "step", "reward", "ess", "exponent", "gradient_norm", "rollouts", "attempt"),
    "plans": ("kind", "plan", "stage", "trained", "domain", "predicted", "stderr", "low", "high", "ess", "note"),
    "plan_ranking": (
        *("kind", "plan", "mean", "mean_low", "mean_high", "worst", "worst_low", "worst_high", "worst_domain"),
        *("lowest", "behind", "behind_stderr", "worst_behind", "worst_behind_stderr", "note"),
    ),
}
"""Columns of the tables of a run of `interference forecast`, beside its cells. A plan's kind is "mixture" or "order"; stages
count from 1, and a mixture has one. Plans are ranked by the mean over domains at the end, best first; `lowest` is the worst
change of any domain at any stage, and worst_behind how far a plan's worst domain is behind that of the plan best by it."""
