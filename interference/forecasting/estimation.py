"""The updates of trainings that have not been made, by tier."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from interference.domain import Domain
from interference.errors import InputError
from interference.forecasting.base_gradient import Extrapolated, gradient_update
from interference.forecasting.frozen import Resample
from interference.forecasting.halves import Halves, noise_ratio
from interference.forecasting.training import Training
from interference.forecasting.virtual import LEAST_ESS, Virtual, steady_training
from interference.model import Model
from interference.probes.halves import prompt_halves
from interference.tree import Change, NamedChanges

Tier = Literal["gradient", "virtual", "pilot"]
EFFORT: dict[str, float] = {"gradient": 0.1, "virtual": 0.5, "pilot": 0.5}
"""Responses whose gradients a tier computes, as a share of those that the training would generate, unless told otherwise."""

METHOD_ERROR: dict[str, float] = {"gradient": 0.5, "virtual": 0.2, "pilot": 0.15}
"""Standard error of a tier beyond sampling and noise, as a share of what training typically does to a domain. Chosen so that 90 %
intervals held that share of the off-diagonal cells of the forecast study's development set-ups (.89, .92, .90)."""


@dataclass(frozen=True)
class Pilot:
    """A checkpoint of a short real training: its update, and the optimizer steps that it took."""

    update: NamedChanges
    steps: int


@dataclass(frozen=True, eq=False)
class Estimated:
    """The estimated update of one domain's training. path: what happened along it, one row per step taken and half."""

    halves: Halves
    path: pd.DataFrame


def estimate_update(
    model: Model,
    domain: Domain,
    training: Training,
    tier: Tier = "virtual",
    *,
    pilot: Pilot | None = None,
    effort: float | None = None,
    least_ess: float = LEAST_ESS,
    resample: Resample | None = None,
    seed: int = 0,
    batch_tokens: int = 16384,
    progress: Callable[[int, int], None] | None = None,
) -> Estimated:
    """The update that training on a domain would give, estimated from each half of its prompts.

    Args:
        domain: rollouts of `model` with rewards.
        tier: "gradient", "virtual", or "pilot": a virtual training that goes on from a pilot's checkpoint.
        effort: responses whose gradients are computed, as a share of those that the training would generate.
        least_ess, resample: see `virtual_training`.

    Raises:
        InputError: rewards that are missing or do not differ in either half, a pilot that is missing or longer than the
            training, too long sequences, a training that diverges however small its steps.
    """
    _check_pilot(domain.name, training, tier, pilot)
    effort = EFFORT[tier] if effort is None else effort
    if not effort > 0:
        raise InputError(got=f"effort {effort}", expected="a positive share", remedy="leave it out for the default")
    options: dict[str, Any] = {"batch_tokens": batch_tokens, "progress": progress}
    found: list[dict[str, Change]] = []
    paths: list[pd.DataFrame] = []
    draws, distinct = 0, 0
    for half, part in enumerate(prompt_halves(domain, seed)):
        made: Virtual | Extrapolated
        if tier == "gradient":
            wanted = max(1, math.ceil(training.steps * effort / 2))
            made, path = (
                gradient_update(model, part, training, minibatches=wanted, **options, seed=_seed(seed, half)),
                None,
            )
        else:
            start, left = model.align(pilot.update) if pilot else None, training.steps - (pilot.steps if pilot else 0)
            made = steady_training(
                model, part, training, seed=_seed(seed, half), steps_taken=max(2, round(left * effort / 2)),
                start=start, first_step=pilot.steps if pilot else 0, least_ess=least_ess, resample=resample,
                **options,
            )  # fmt: skip
            path = made.path
        found.append(made.update)
        paths += [] if path is None else [path.assign(half=half + 1)]
        draws, distinct = draws + made.draws, distinct + made.distinct
    draws //= 2 if training.algorithm == "dpo" else 1  # pairs, as `distinct` and `real` count them
    real = training.steps * training.rollouts_per_step
    noise = noise_ratio(draws // 2, distinct // 2, real)
    return Estimated(
        Halves(found[0], found[1], noise), pd.concat(paths, ignore_index=True) if paths else pd.DataFrame()
    )


def _seed(seed: int, half: int) -> int:
    return 2 * seed + half


def _check_pilot(name: str, training: Training, tier: str, pilot: Pilot | None) -> None:
    if tier not in EFFORT:
        raise InputError(got=f"tier {tier!r}", expected="gradient, virtual or pilot", remedy="use tier: virtual")
    if (tier == "pilot") != (pilot is not None):
        raise InputError(
            got=f"tier {tier!r} {'without' if pilot is None else 'with'} a pilot of domain {name!r}",
            expected="a checkpoint of a short training on every domain for tier 'pilot', and none for the others",
            remedy="give {domain: Pilot(update, steps)}, or use tier: virtual",
        )
    if pilot is not None and not 0 < pilot.steps < training.steps:
        raise InputError(
            got=f"a pilot of domain {name!r} after {pilot.steps} of {training.steps} steps",
            expected="a checkpoint from before the end",
            remedy="give the number of steps that it was trained for; a finished training needs `interference diagnose`",
        )
