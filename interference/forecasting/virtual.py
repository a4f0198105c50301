"""Virtual training: the optimizer run for the planned steps on frozen rollouts of the base. Nothing is generated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from interference import tree
from interference.domain import Domain
from interference.errors import InputError
from interference.forecasting.batches import Weighed, learnable
from interference.forecasting.frozen import Frozen, Resample, prompts_of
from interference.forecasting.optimizer import Optimizer, strides
from interference.forecasting.trainable import Still, trainable
from interference.forecasting.training import Training
from interference.model import Model
from interference.tree import Change, NamedChanges, dense

LEAST_ESS = 0.3
"""Share of effective sequences below which the ratios of a minibatch are tempered, or its rollouts renewed."""
LEAST_STEPS = 2
"""Steps that renewed rollouts are made for at least."""


class DivergedError(InputError):
    """A virtual training that broke: its policy or its update is of no use."""


@dataclass(frozen=True, eq=False)
class Virtual:
    """A training that was run on frozen rollouts.

    updates: {optimizer step: the update by then}.  path: one row per step taken: step (of the training, after it), reward
    (importance-weighted), ess, exponent (see `batches.Weighed`), gradient_norm, rollouts (how often they were renewed); attempt,
    from `steady_trainings`.
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


def virtual_training(model: Model, domain: Domain, training: Training, **options: Any) -> Virtual:
    """Train on the importance-weighted policy gradient of a domain's frozen rollouts (`batches`), as `training` says.

    options, errors: those of `virtual_trainings`, with `start` for its `starts`.
    """
    starts = [options.pop("start", None)]
    return virtual_trainings(model, [domain], training, starts=starts, **options)[0]


def virtual_trainings(
    model: Model,
    parts: Sequence[Domain],
    training: Training,
    *,
    seed: int = 0,
    steps_taken: int | None = None,
    stops: Iterable[int] = (),
    starts: Sequence[NamedChanges | None] | None = None,
    first_step: int = 0,
    least_ess: float = LEAST_ESS,
    resample: Resample | None = None,
    batch_tokens: int = 16384,
    progress: Callable[[int, int], None] | None = None,
) -> list[Virtual]:
    """Several estimates of one training, each from rollouts of its own, along a path that they share.

    Gradients are taken at the mean of the estimates, where their noise is less than at each of them: what noise does on the way,
    to gains that build on gains above all, is then nearer to what a training on many more rollouts sees.

        d_i <- d_i - optimizer_i(g_i(theta + mean d)),    g_i the gradient of a minibatch of part i

    Args:
        model: the base, which the rollouts were sampled from; it stays as it is.
        parts: rollouts with rewards, several for each prompt; no prompt is in two of them.
        steps_taken: steps that are taken to stand for the training's; all of them unless given.
        stops: steps after which the update is kept, besides the last.
        starts, first_step: go on from an update of each that a real training had reached after `first_step` steps (its adapter's
            factors, where it has some of this rank, are trained on). With 0 steps the
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
    sizes = _with_stops(training.steps, first_step, steps_taken, stops)
    together = Together(model, parts, training, starts or [None] * len(parts), first_step, seed, batch_tokens)
    kept: list[dict[int, dict[str, Change]]] = [{} for _ in parts]
    rows: list[list[dict[str, Any]]] = [[] for _ in parts]
    step, used, lasting = first_step, 0, len(sizes)  # steps that the present rollouts were taken for, and should be
    for done, size in enumerate(sizes, start=1):
        found = together.accumulate(least_ess) if used < lasting else []
        if resample is not None and min((w.ess for w in found), default=0.0) < least_ess:
            used, lasting = 0, _lasting(used, len(sizes) - done + 1)
            alike = together.renew(resample, parts, lasting * training.rollouts_per_step, _round_seed(seed, step))
            if alike is not None:
                _check_saturated(alike, max(r["reward"] for each in rows for r in each) if rows[0] else 0.0, step)
                for held, update in zip(kept, together.updates(), strict=True):
                    held |= dict.fromkeys({s for s in stops if s > step} | {training.steps}, update)
                break
            found = together.accumulate(least_ess)
        norms, used, step = together.step(size), used + 1, step + size
        for i, (weighed, norm) in enumerate(zip(found, norms, strict=True)):
            if not np.isfinite(norm):
                raise _diverged(f"a gradient of norm {norm}", parts[i], step - size)
            rounds = together.frozen[i].round
            rows[i].append({"step": step, **weighed.shown(), "gradient_norm": norm, "rollouts": rounds})
        if step in stops or done == len(sizes):
            for held, update in zip(kept, together.updates(), strict=True):
                held[step] = update
                if not all(tree.is_finite(change) for change in update.values()):
                    raise _diverged("an update that is not finite", parts[0], step)
        if progress is not None:
            progress(done, len(sizes))
    draws = [(f.draws, f.distinct) for f in together.frozen]
    return [Virtual(held, pd.DataFrame(r), *d) for held, r, d in zip(kept, rows, draws, strict=True)]


class Together:
    """Estimates of one training that move by gradients at their mean. at: the mean; own: each of them (the same where there is
    one)."""

    def __init__(
        self, model: Model, parts: Sequence[Domain], training: Training, starts: Sequence[NamedChanges | None],
        first_step: int, seed: int, batch_tokens: int,
    ):  # fmt: skip
        start, goes_on = _mean_start(starts), first_step > 0
        self.at = trainable(model, training.adapter, start, goes_on=goes_on)
        alone = len(parts) == 1
        self.own = [self.at] if alone else [trainable(model, training.adapter, s, goes_on=goes_on) for s in starts]
        self.optimizers = [Optimizer(own.leaves, training) for own in self.own]
        for optimizer in self.optimizers:
            optimizer.done = first_step
        origin = start if first_step == 0 else None
        self.frozen = [
            Frozen(self.at, part, training, Still(model), len(parts) * seed + i, batch_tokens, origin, begun=start is not None)
            for i, part in enumerate(parts)
        ]  # fmt: skip

    def accumulate(self, least_ess: float) -> list[Weighed]:
        """Put the gradient of the next minibatch of each part on its estimate's leaves, in place of what was there."""
        out = []
        for frozen, own in zip(self.frozen, self.own, strict=True):
            for leaf in self.at.leaves.values():
                leaf.grad = None
            out.append(frozen.accumulate(least_ess))
            for name, leaf in self.at.leaves.items():
                own.leaves[name].grad = leaf.grad
        return out

    @torch.no_grad()
    def step(self, stands_for: int) -> list[float]:
        """Move every estimate, and the mean with them; the norms of the gradients."""
        norms = [optimizer.step(stands_for) for optimizer in self.optimizers]
        if len(self.own) > 1:
            for name, leaf in self.at.leaves.items():
                leaf.grad = None
                leaf.copy_(torch.stack([own.leaves[name] for own in self.own]).mean(0))
        return norms

    def renew(self, resample: Resample, parts: Sequence[Domain], responses: int, seed: int) -> Domain | None:
        """New rollouts of the present policy, at least so many for each part; or those of a part that are all rewarded alike,
        on all of its prompts."""
        asked = [prompts_of(part, responses, seed) for part in parts]
        fresh = self._sampled(resample, asked, seed)
        # Few prompts may be alike by chance: then all are asked.
        if not all(map(learnable, fresh)) and any(len(a) < len(p.sequences) for a, p in zip(asked, parts, strict=True)):
            fresh = self._sampled(resample, [part.prompt_ids for part in parts], seed)
        alike = next((domain for domain in fresh if not learnable(domain)), None)
        if alike is None:
            self.frozen = [frozen.renewed(domain) for frozen, domain in zip(self.frozen, fresh, strict=True)]
        return alike

    def _sampled(self, resample: Resample, asked: Sequence[Sequence[str]], seed: int) -> list[Domain]:
        """Rollouts on each part's prompts, sampled together."""
        with self.at.applied():
            fresh = resample([prompt for part in asked for prompt in part], seed)
        members = [set(part) for part in asked]
        return [Domain(fresh.name, tuple(s for s in fresh.sequences if s.prompt_id in prompts)) for prompts in members]

    def updates(self) -> list[dict[str, Change]]:
        """The present update of every estimate."""
        return [own.update() for own in self.own]


def _mean_start(starts: Sequence[NamedChanges | None]) -> NamedChanges | None:
    """The mean of updates to start from; one that all share stays what it is, an adapter's factors."""
    first = starts[0]
    if all(start is first for start in starts):
        return first
    given = [start or {} for start in starts]
    names = dict.fromkeys(name for start in given for name in start)
    return {n: sum(dense(start[n]) for start in given if n in start) / len(given) for n in names}  # type: ignore[misc]


def _lasting(used: int, left: int) -> int:
    """Steps that new rollouts are made for: as many as the last ones were good for, or all where few more are left."""
    lasting = max(LEAST_STEPS, used)
    return left if left <= 1.5 * lasting else lasting


def steady_trainings(
    model: Model, parts: Sequence[Domain], training: Training, *, steps_taken: int, **options: Any
) -> list[Virtual]:
    """`virtual_trainings` with its options; where it breaks, it is run again in twice as many steps, up to all of the training's.

    Steps that stand for many of the real ones can be too long where the real training is just stable. One that ends far below its
    start (`fell`) is run again once.

    Raises as `virtual_trainings` does, DivergedError where all steps were taken.
    """
    most, attempt, again = training.steps - options.get("first_step", 0), 1, True
    while True:
        try:
            made = virtual_trainings(model, parts, training, steps_taken=steps_taken, **options)
        except DivergedError:
            if steps_taken >= most:
                raise
        else:
            if not (again and fell(made)) or steps_taken >= most:
                return [replace(each, path=each.path.assign(attempt=attempt)) for each in made]
            again = False
        steps_taken, attempt = min(most, 2 * steps_taken), attempt + 1


def _check_saturated(fresh: Domain, before: float, step: int) -> None:
    """A policy all of whose responses are rewarded alike trains no further, if it does better than before; else it broke."""
    reward = float(np.mean(fresh.rewards()))
    if reward < before:
        raise DivergedError(
            got=f"a policy of domain {fresh.name!r} all of whose responses have reward {reward:g} after {step} virtual steps",
            expected="a training that gets better",
            remedy="raise effort, so that fewer optimizer steps are taken as one, or lower training.learning_rate",
        )


def fell(made: Sequence[Virtual]) -> bool:
    """Whether a training ended with less than half the reward that it began with, in the mean of its estimates."""
    rewards = np.mean([each.path["reward"] for each in made], axis=0) if all(len(each.path) for each in made) else []
    quarter = max(2, len(rewards) // 4)
    return len(rewards) > quarter and float(np.mean(rewards[-quarter:])) < float(np.mean(rewards[:quarter])) / 2


def _round_seed(seed: int, step: int) -> int:
    return 1000 * seed + step


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
