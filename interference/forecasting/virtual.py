"""Virtual training: the optimizer run for the planned steps on frozen rollouts of the base. Nothing is generated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from interference import tree
from interference.domain import Domain
from interference.errors import InputError
from interference.forecasting.frozen import Frozen, Resample, Supply
from interference.forecasting.optimizer import Optimizer, strides
from interference.forecasting.trainable import Still, trainable
from interference.forecasting.training import Training
from interference.model import Model
from interference.tree import Change, NamedChanges

LEAST_ESS = 0.3
"""Share of effective sequences below which the ratios of a minibatch are tempered, or its rollouts renewed."""


class DivergedError(InputError):
    """A virtual training that broke: its policy or its update is of no use."""


@dataclass(frozen=True, eq=False)
class Virtual:
    """A training that was run on frozen rollouts.

    updates: {optimizer step: the update by then}.  path: one row per step taken: step (of the training, after it), reward
    (importance-weighted), ess, exponent (see `batches.Weighed`), gradient_norm, rollouts (how often they were renewed); attempt,
    from `steady_training`.
    draws: sequences that went into it, out of `distinct`.
    """

    updates: dict[int, dict[str, Change]]
    path: pd.DataFrame = field(repr=False)
    draws: int
    distinct: int

    @property
    def update(self) -> dict[str, Change]:
        """The update at the end."""
        return self.updates[max(self.updates)]


def virtual_training(
    model: Model,
    domain: Domain,
    training: Training,
    *,
    seed: int = 0,
    steps_taken: int | None = None,
    stops: Iterable[int] = (),
    start: NamedChanges | None = None,
    first_step: int = 0,
    least_ess: float = LEAST_ESS,
    resample: Resample | None = None,
    batch_tokens: int = 16384,
    progress: Callable[[int, int], None] | None = None,
) -> Virtual:
    """Train on the importance-weighted policy gradient of a domain's frozen rollouts (`batches`), as `training` says.

    Args:
        model: the base, which the rollouts were sampled from; it stays as it is.
        domain: rollouts with rewards, several for each prompt.
        steps_taken: steps that are taken to stand for the training's; all of them unless given.
        stops: steps after which the update is kept, besides the last.
        start, first_step: go on from an update that a real training had reached after `first_step` steps (its adapter's factors,
            where it has some of this rank, are trained on). With 0 steps the
            training is a new one that begins at theta + start: rollouts are still the base's, and weighted as such, but the
            KL penalty and dpo compare with where it began.
        least_ess: ratios are tempered where fewer sequences of a minibatch than this share are effective; 0 never does.
        resample: makes new rollouts where that happens, instead of tempering: for as many steps as those before them lasted, and
            again after these.

    Raises:
        InputError: rewards that are missing or never differ, stops or a first step outside the training.
        DivergedError: a training that broke.
    """
    stops = set(stops)
    _check_steps(training.steps, first_step, steps_taken, stops)
    leaves = trainable(model, training.adapter, start, goes_on=first_step > 0)
    origin = start if first_step == 0 else None
    frozen = Frozen(leaves, domain, training, Still(model), seed, batch_tokens, origin, begun=start is not None)
    supply = Supply(frozen, domain, least_ess, resample, seed)
    optimizer = Optimizer(leaves.leaves, training)
    optimizer.done = first_step
    sizes = _with_stops(training.steps, first_step, steps_taken, stops)
    updates, step = dict[int, dict[str, Change]](), first_step
    rows: list[dict[str, Any]] = []
    for done, size in enumerate(sizes, start=1):
        found = supply.accumulate(len(sizes) - done + 1, step)
        if found is None:
            _check_saturated(supply.alike, max(r["reward"] for r in rows) if rows else 0.0, step)
            updates |= dict.fromkeys({s for s in stops if s > step} | {training.steps}, leaves.update())
            break
        norm = optimizer.step(size)
        if not np.isfinite(norm):
            raise _diverged(f"a gradient of norm {norm}", domain, step)
        step += size
        rows.append({"step": step, **found.shown(), "gradient_norm": norm, "rollouts": supply.frozen.round})
        if step in stops or done == len(sizes):
            updates[step] = leaves.update()
            if not all(tree.is_finite(change) for change in updates[step].values()):
                raise _diverged("an update that is not finite", domain, step)
        if progress is not None:
            progress(done, len(sizes))
    return Virtual(updates, pd.DataFrame(rows), supply.frozen.draws, supply.frozen.distinct)


def steady_training(model: Model, domain: Domain, training: Training, *, steps_taken: int, **options: Any) -> Virtual:
    """`virtual_training` with its options; where it breaks, it is run again in twice as many steps, up to all of the training's.

    Steps that stand for many of the real ones can be too long where the real training is just stable. One that ends far below its
    start (`fell`) is run again once; what that comes to stands, unless it breaks. The path's `attempt` counts the runs.

    Raises as `virtual_training` does, DivergedError where all steps were taken.
    """
    most, attempt, fallen = training.steps - options.get("first_step", 0), 1, None
    least = 0.0 if training.algorithm == "dpo" else min(domain.rewards())  # of what a path calls its reward
    while True:
        try:
            made = virtual_training(model, domain, training, steps_taken=steps_taken, **options)
        except DivergedError:
            if steps_taken >= most:
                if fallen is None:
                    raise
                return replace(fallen, path=fallen.path.assign(attempt=attempt))
        else:
            if fallen is not None or steps_taken >= most or not fell(made, least):
                return replace(made, path=made.path.assign(attempt=attempt))
            fallen = made
        steps_taken, attempt = min(most, 2 * steps_taken), attempt + 1


def fell(made: Virtual, least: float) -> bool:
    """Whether a training ended with less than half of the reward, above the least there is, that it began with."""
    rewards = made.path["reward"].to_numpy() - least if len(made.path) else np.empty(0)
    quarter = max(2, len(rewards) // 4)
    return len(rewards) > quarter and float(rewards[-quarter:].mean()) < float(rewards[:quarter].mean()) / 2


def _check_saturated(fresh: Domain, before: float, step: int) -> None:
    """A policy all of whose responses are rewarded alike trains no further, if it does better than before; else it broke."""
    reward = float(np.mean(fresh.rewards()))
    if reward < before:
        raise DivergedError(
            got=f"a policy of domain {fresh.name!r} all of whose responses have reward {reward:g} after {step} virtual steps",
            expected="a training that gets better",
            remedy="raise effort, so that fewer optimizer steps are taken as one, or lower training.learning_rate",
        )


def _diverged(what: str, domain: Domain, step: int) -> DivergedError:
    return DivergedError(
        got=f"{what} on domain {domain.name!r} after {step} steps of virtual training",
        expected="a training that stays finite",
        remedy="lower training.learning_rate",
    )


def _check_steps(steps: int, first: int, taken: int | None, stops: set[int]) -> None:
    if not 0 <= first < steps:
        raise InputError(
            got=f"first_step {first} of {steps}", expected=f"0 to {steps - 1}", remedy="give steps done so far"
        )
    if taken is not None and taken < 1:
        raise InputError(got=f"steps_taken {taken}", expected="1 or more", remedy="leave it out to take all")
    outside = sorted(s for s in stops if not first < s <= steps)
    if outside:
        raise InputError(
            got=f"a stop after step {outside[0]}",
            expected=f"stops after steps {first + 1} to {steps}",
            remedy="give optimizer steps of this training",
        )


def _with_stops(steps: int, first: int, taken: int | None, stops: set[int]) -> list[int]:
    """Sizes of the steps from `first` to `steps`, with an end at every stop."""
    ends = sorted({s for s in stops if first < s < steps} | {steps})
    share = 1.0 if taken is None else min(1.0, taken / max(1, steps - first))
    out: list[int] = []
    for start, end in zip([first, *ends], ends, strict=False):
        out += strides(end - start, round(share * (end - start)))
    return out
