"""Figures from records alone: one function per figure, one style module, no torch.

    from figures import interference_matrix, save
    from interference.records import Run

    run = Run.open("runs/demo")
    save(interference_matrix(run.results, "reward"), "out", "reward_matrix")

Every function takes the records of a run and an objective and returns a matplotlib Figure at page width. For a run of
`interference geometry` each takes one of its tables instead of an objective:

    save(mask_overlap(run.geometry("masks"), run.results), "out", "masks")

and so for a run of `interference probe`:

    save(skill_consistency(run.probe("consistency"), run.results), "out", "consistency")

A run of `interference forecast` has `forecast_matrix(run.results, "reward")`, and, where plans were asked for,
`plan_ranking(run.forecast("plan_ranking"), run.results, "mixture")`.
"""

from figures.attribution import layer_module_heatmap
from figures.concentration import channel_concentration
from figures.curves import change_along_update
from figures.directions import angle_spectra, update_cosine
from figures.divergences import divergence_matrix
from figures.forecast import kl_forecast_against_measured
from figures.forecast_study import forecast_by_length, forecast_by_setup, forecast_scoreboard
from figures.foretold import forecast_against_measured, forecast_matrix, forecast_paths
from figures.gradients import gradient_cosine
from figures.judges import horizon_curve, outcome_against_process
from figures.locus import locus_of_error
from figures.masks import mask_overlap, sparsity_by_layer
from figures.matrix import interference_matrix
from figures.neurons import neuron_overlap
from figures.plans import plan_ranking
from figures.routes import route_direction, route_overlap
from figures.scatter import predicted_against_measured
from figures.scoreboard import predictor_scoreboard
from figures.skills import skill_consistency
from figures.study_plans import forecast_mixtures, forecast_orders
from figures.style import save

__all__ = [
    "angle_spectra",
    "change_along_update",
    "channel_concentration",
    "divergence_matrix",
    "forecast_against_measured",
    "forecast_by_length",
    "forecast_by_setup",
    "forecast_matrix",
    "forecast_mixtures",
    "forecast_orders",
    "forecast_paths",
    "forecast_scoreboard",
    "gradient_cosine",
    "horizon_curve",
    "interference_matrix",
    "kl_forecast_against_measured",
    "layer_module_heatmap",
    "locus_of_error",
    "mask_overlap",
    "neuron_overlap",
    "outcome_against_process",
    "plan_ranking",
    "predicted_against_measured",
    "predictor_scoreboard",
    "route_direction",
    "route_overlap",
    "save",
    "skill_consistency",
    "sparsity_by_layer",
    "update_cosine",
]
