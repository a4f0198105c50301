"""Stages that predict: the forecasts of every tier, the quadratic models of the known updates, and the baselines."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from interference import Domain, expand, measurement, statistics, tree
from interference.derivatives import objective_gradient
from interference.errors import InputError
from interference.forecasting.estimation import EFFORT, METHOD_ERROR, Pilot, Tier
from interference.forecasting.outcomes import moved_reward, telling
from interference.forecasting.prediction import Forecast, forecast
from interference.forecasting.tried import first_prompts
from interference.forecasting.virtual import LEAST_ESS
from interference.geometry.subspaces import overlap, top_subspaces
from interference.quadratic import ORDERS
from paper_repro.forecast_study.samplers import sampler
from paper_repro.forecast_study.trainings import measured
from paper_repro.forecast_study.work import Work

TIERS: tuple[Tier, ...] = ("gradient", "virtual", "pilot")
EVALUATED = 4
"""Responses to each held-out prompt that updates are evaluated on."""
ASKED: dict[Tier, float] = {"gradient": 0.5, "virtual": 1.0, "pilot": 1.0}
"""Share of the held-out prompts that a tier is evaluated on."""
TRIED: dict[Tier, int] = {"gradient": 8, "virtual": 32, "pilot": 32}
"""Prompts that the noise of updates, or the gradient tier's effective share, is computed on."""
SAMPLED: tuple[Tier, ...] = ("virtual", "pilot")
"""Tiers that may sample fresh rollouts where the base's are used up; the time goes into their cost."""
OVERLAP_K = 8
"""Leading singular directions whose overlap is a baseline."""
_ORDER_NAMES = {"first": "first_order", "second": "second_order", "ggn": "second_order_ggn"}


def make_forecast(work: Work, tier: Tier, length: int) -> None:
    """A tier's forecast of training every domain for so many steps; gradient and virtual read nothing of any training."""
    method = constants(tier)

    def make() -> Mapping[str, Any]:
        found, seconds, evaluation = timed_forecast(work, tier, length)
        for name, estimated in found.estimated.items():
            work.save_update(f"{tier}_{length}_{name}", estimated.halves.mean())
        return {
            **seconds,
            "method": method,
            "cells": found.cells.to_dict(orient="records"),
            "updates": {name: _said_of(e) for name, e in found.estimated.items()},
            "sequences": {name: len(d.sequences) for name, d in evaluation.items()},
            "pilot_steps": work.setup.pilot_steps(length) if tier == "pilot" else 0,
        }

    name = f"forecast_{tier}_{length}"
    made = work.stage(name, make).get("method")  # a finished one may be of another day
    if made != method:
        raise InputError(
            got=f"a forecast made with other constants ({made}) in {work.folder / 'records' / f'{name}.json'}",
            expected=f"those of today, {method}",
            remedy="delete the forecasts and comparisons (forecast_*, compare_*) of this set-up, and run it again",
        )


def timed_forecast(work: Work, tier: Tier, length: int) -> tuple[Forecast, dict[str, float], dict[str, Domain]]:
    """A tier's forecast, its wall and processor seconds without the loading of data, and what it was evaluated on."""
    setup, domains, pilots = work.setup, work.data("forecast"), None
    evaluation = {name: evaluated_on(d, tier) for name, d in work.data("evaluation").items()}
    steps, seed = setup.pilot_steps(length), setup.training_seeds[-1]
    if tier == "pilot":
        pilots = {name: Pilot(work.changes(seed, name, steps), steps) for name in setup.domains}
    samplers = {name: sampler(work, name) for name in setup.domains} if tier in SAMPLED else None
    model, wall, cpu = work.model, time.perf_counter(), time.process_time()
    found = forecast(
        model, domains, training=setup.training(length), tier=tier, evaluation=evaluation, pilots=pilots,
        samplers=samplers, tried=TRIED[tier], quadratic=False, check=False, device="cpu",
    )  # fmt: skip
    seconds = {"forecast_wall": time.perf_counter() - wall, "forecast_cpu": time.process_time() - cpu}
    return found, seconds, evaluation


def constants(tier: Tier) -> dict[str, float]:
    """What a tier's forecasts depend on beside the code."""
    return {
        "effort": EFFORT[tier],
        "method_error": METHOD_ERROR[tier],
        "least_ess": LEAST_ESS,
        "evaluated": EVALUATED,
        "asked": ASKED[tier],
        "tried": TRIED[tier],
    }


def evaluated_on(domain: Domain, tier: Tier) -> Domain:
    """The held-out rollouts that a tier is evaluated on."""
    part = first_responses(domain, EVALUATED)
    return first_prompts(part, round(ASKED[tier] * len(set(part.prompt_ids))))


def first_responses(domain: Domain, count: int) -> Domain:
    """The first `count` responses to every prompt."""
    seen: Counter[str] = Counter()
    kept = []
    for sequence in domain.sequences:
        seen[sequence.prompt_id] += 1
        if seen[sequence.prompt_id] <= count:
            kept.append(sequence)
    return Domain(domain.name, tuple(kept))


def _said_of(estimated: Any) -> dict[str, Any]:
    """What is known of an estimated update beforehand, and how its virtual training went."""
    halves, path = estimated.halves, estimated.path
    found = {"agreement": halves.agreement(), "reliability": halves.reliability(), "noise": halves.noise}
    if len(path):
        least = {f"least_{key}": float(path[key].min()) for key in ("ess", "exponent")}
        found |= {**least, "steps_taken": len(path) // 2, "last_reward": float(path["reward"].tail(5).mean())}
    return found


def compare_updates(work: Work, training_seed: int, length: int) -> None:
    """Cosine and ratio of lengths of every forecast update to the real one."""

    def make() -> Mapping[str, Any]:
        rows = []
        for domain in work.setup.domains:
            real = work.update(training_seed, domain, length)
            for tier in TIERS:
                made = work.saved_update(f"{tier}_{length}_{domain}")
                ratio = tree.norm(made) / tree.norm(real)
                rows.append({"tier": tier, "update": domain, "cosine": tree.cosine(made, real), "length_ratio": ratio})
        return {"rows": rows}

    work.stage(f"compare_{training_seed}_{length}", make)


def gradient_cosines(work: Work) -> None:
    """Cosines of the domains' policy gradients at the base."""

    def make() -> Mapping[str, Any]:
        found = {name: objective_gradient(work.model, d, "reward") for name, d in work.data("evaluation").items()}
        return {"cosines": {a: {b: tree.cosine(found[a], found[b]) for b in found} for a in found}}

    work.stage("gradient_cosines", make)


def known_update(work: Work, training_seed: int, length: int) -> None:
    """What is predicted from the updates that training really made, and what baselines say of them."""

    def make() -> Mapping[str, Any]:
        updates = {name: work.update(training_seed, name, length) for name in work.setup.domains}
        data = work.data("evaluation")
        models = expand(work.model, updates, data, objective="reward", pairs=False, check=False)
        rows, kl = [], dict[str, dict[str, float]]()
        for domain, rollouts in data.items():
            every = telling("reward", rollouts, silent_share=1.0)
            anchor, *scores = measurement.score(work.model, rollouts, [(u, 1.0) for u in updates.values()])
            for update, at in zip(updates, scores, strict=True):
                was = measured(work, training_seed, update, domain, length)
                moved = moved_reward(every, at.logp - anchor.logp, 0)
                named = [("importance", moved.value, moved.replicates)]
                for order in ORDERS:
                    found = models[domain].predict({update: 1.0}, order)
                    named.append((_ORDER_NAMES[order], found.value, found.replicates))
                for predictor, value, replicates in named:
                    rows.append({"predictor": predictor, "update": update, "domain": domain, "predicted": value})
                    rows[-1] |= _interval(value, replicates, was.replicates) | {"ess": moved.ess}
                tokens = np.array([len(s.response) for s in rollouts.sequences])
                kl.setdefault(update, {})[domain] = float(at.kl.sum() / tokens.sum())
        return {"rows": rows, "kl": kl, **_between_updates(updates)}

    work.stage(f"known_{training_seed}_{length}", make)


def _interval(value: float, replicates: Any, measured_replicates: Any) -> dict[str, float]:
    """Ends of the prediction's interval, and the standard error of predicted - measured, whose prompts are the same."""
    half = statistics.Z * float(statistics.stderr(replicates))
    paired = float(statistics.stderr(replicates - measured_replicates))
    return {"low": value - half, "high": value + half, "error_stderr": paired}


def _between_updates(updates: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    pairs = [(a, b) for a in updates for b in updates]
    bases = {name: _leading(update) for name, update in updates.items()}
    cosines: dict[str, dict[str, float]] = {a: {} for a in updates}
    overlaps: dict[str, dict[str, float]] = {a: {} for a in updates}
    for a, b in pairs:
        cosines[a][b] = tree.cosine(updates[a], updates[b])
        shared = [n for n in bases[a] if n in bases[b]]
        found = [overlap(x, y) for n in shared for x, y in zip(bases[a][n], bases[b][n], strict=True)]
        overlaps[a][b] = float(np.nanmean(found))
    return {"norms": {a: tree.norm(u) for a, u in updates.items()}, "cosines": cosines, "overlaps": overlaps}


def _leading(update: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Leading left and right singular directions of every matrix that changed."""
    out = {}
    for name, change in update.items():
        if change.dim() == 2 and min(change.shape) > OVERLAP_K:
            found = top_subspaces(change, OVERLAP_K, "gram")
            out[name] = found.left, found.right
    return out
