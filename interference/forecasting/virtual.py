"""Virtual training: the optimizer run for the planned steps on frozen rollouts of the base. Nothing is generated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from interference import tree
from interference.domain import Domain
from interference.errors import InputError
from interference.forecasting.batches import rollouts
from interference.forecasting.minibatch import Minibatches
from interference.forecasting.optimizer import Optimizer, strides
from interference.forecasting.trainable import Trainable, trainable
from interference.forecasting.training import Training
from interference.model import Model
from interference.tree import Change, NamedTensors

LEAST_ESS = 0.3
"""Share of effective sequences below which the ratios of a minibatch are tempered."""


@dataclass(frozen=True, eq=False)
class Virtual:
    """A training that was run on frozen rollouts.

    updates: {optimizer step: the update by then}.  path: one row per step taken: step (of the training, after it), reward
    (importance-weighted), ess, exponent (see `batches.Weighed`), gradient_norm.  draws: sequences that went into it.
    """

    updates: dict[int, dict[str, Change]]
    path: pd.DataFrame = field(repr=False)
    draws: int

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
    start: NamedTensors | None = None,
    first_step: int = 0,
    least_ess: float = LEAST_ESS,
    batch_tokens: int = 16384,
    progress: Callable[[int, int], None] | None = None,
) -> Virtual:
    """Train on the importance-weighted policy gradient of a domain's frozen rollouts (`batches`), as `training` says.

    Args:
        model: the base, which the rollouts were sampled from; it stays as it is.
        domain: rollouts with rewards, several for each prompt.
        steps_taken: steps that are taken to stand for the training's; all of them unless given.
        stops: steps after which the update is kept, besides the last.
        start, first_step: go on from an update that a real training had reached after `first_step` steps. With 0 steps the
            training is a new one that begins at theta + start: rollouts are still the base's, and weighted as such, but the
            KL penalty and dpo compare with where it began.
        least_ess: ratios are tempered where fewer sequences of a minibatch than this share are effective; 0 never does.

    Raises:
        InputError: rewards that are missing or never differ, stops or a first step outside the training, and a training
            that diverged.
    """
    stops = set(stops)
    _check_steps(training.steps, first_step, steps_taken, stops)
    source = rollouts(domain, training)
    leaves = trainable(model, training.adapter, seed, start)
    reader, everything = Minibatches(leaves, source, batch_tokens), np.arange(len(domain.sequences))
    before = Minibatches(Trainable(model), source, batch_tokens).logp(everything)
    reference = reader.logp(everything) if start is not None and first_step == 0 else before
    optimizer, minibatches = Optimizer(leaves.leaves, training), source.minibatches(seed)
    optimizer.done = first_step
    sizes = _with_stops(training.steps, first_step, steps_taken, stops)
    updates, rows, draws, step = dict[int, dict[str, Change]](), [], 0, first_step
    for done, size in enumerate(sizes, start=1):
        batch = next(minibatches)
        found = reader.accumulate(batch, before[batch], least_ess, reference[batch])
        norm = optimizer.step(size)
        if not np.isfinite(norm):
            raise _diverged(f"a gradient of norm {norm}", domain, step)
        step, draws = step + size, draws + len(batch)
        rows.append({"step": step, **found.shown(), "gradient_norm": norm})
        if step in stops or done == len(sizes):
            updates[step] = leaves.update()
            if not all(tree.is_finite(change) for change in updates[step].values()):
                raise _diverged("an update that is not finite", domain, step)
        if progress is not None:
            progress(done, len(sizes))
    return Virtual(updates, pd.DataFrame(rows), draws)


def _diverged(what: str, domain: Domain, step: int) -> InputError:
    return InputError(
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
