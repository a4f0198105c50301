"""Virtual training: the optimizer run for the planned steps on frozen rollouts of the base. Nothing is generated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from interference import tree
from interference.domain import Domain
from interference.errors import InputError
from interference.forecasting.batches import Weighed, learnable, rollouts
from interference.forecasting.minibatch import Minibatches, Recall
from interference.forecasting.optimizer import Optimizer, strides
from interference.forecasting.trainable import Still, Trainable, trainable
from interference.forecasting.training import Training
from interference.model import Model
from interference.tree import Change, NamedChanges

LEAST_ESS = 0.3
"""Share of effective sequences below which the ratios of a minibatch are tempered, or its rollouts renewed."""
LEAST_STEPS = 2
"""Steps that renewed rollouts are made for at least."""
Resample = Callable[[Sequence[str], int], Domain]
"""(prompt ids, seed) -> rollouts, with rewards, of the model as it is at the time, on these prompts."""


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
    optimizer = Optimizer(leaves.leaves, training)
    optimizer.done = first_step
    sizes = _with_stops(training.steps, first_step, steps_taken, stops)
    updates, step = dict[int, dict[str, Change]](), first_step
    rows: list[dict[str, Any]] = []
    used, lasting = 0, len(sizes)  # steps that the present rollouts were taken for, and should be
    for done, size in enumerate(sizes, start=1):
        found = frozen.accumulate(least_ess) if used < lasting else None
        if resample is not None and (found is None or found.ess < least_ess):
            optimizer.inner.zero_grad()
            lasting = _lasting(used, len(sizes) - done + 1)
            fresh = _fresh(domain, leaves, resample, lasting * training.rollouts_per_step, _round_seed(seed, step))
            if not learnable(fresh):
                _check_saturated(fresh, max(r["reward"] for r in rows) if rows else 0.0, step)
                updates |= dict.fromkeys({s for s in stops if s > step} | {training.steps}, leaves.update())
                break
            frozen, used, found = frozen.renewed(fresh), 0, None
        found = frozen.accumulate(least_ess) if found is None else found
        used += 1
        norm = optimizer.step(size)
        if not np.isfinite(norm):
            raise _diverged(f"a gradient of norm {norm}", domain, step)
        step += size
        rows.append({"step": step, **found.shown(), "gradient_norm": norm, "rollouts": frozen.round})
        if step in stops or done == len(sizes):
            updates[step] = leaves.update()
            if not all(tree.is_finite(change) for change in updates[step].values()):
                raise _diverged("an update that is not finite", domain, step)
        if progress is not None:
            progress(done, len(sizes))
    return Virtual(updates, pd.DataFrame(rows), frozen.draws, frozen.distinct)


def _lasting(used: int, left: int) -> int:
    """Steps that new rollouts are made for: as many as the last ones were good for, or all where few more are left."""
    lasting = max(LEAST_STEPS, used)
    return left if left <= 1.5 * lasting else lasting


def _fresh(domain: Domain, leaves: Trainable, resample: Resample, responses: int, seed: int) -> Domain:
    """At least so many rollouts of the present policy; on all prompts where those asked first are rewarded alike by chance."""
    asked = prompts_of(domain, responses, seed)
    with leaves.applied():
        fresh = resample(asked, seed)
        if len(asked) < len(domain.sequences) and not learnable(fresh):
            fresh = resample(domain.prompt_ids, seed)
    return fresh


def prompts_of(domain: Domain, responses: int, seed: int) -> list[str]:
    """Prompt ids of at least so many of a domain's responses, or of all: whole prompts, drawn at random.

    >>> from interference.domain import Sequence
    >>> domain = Domain("d", tuple(Sequence((1,), (2,), p) for p in "aabbcc"))
    >>> prompts_of(domain, 3, seed=0), len(prompts_of(domain, 9, seed=0))
    (['a', 'a', 'c', 'c'], 6)
    """
    if responses >= len(domain.sequences):
        return domain.prompt_ids
    count, kept, total = Counter(domain.prompt_ids), set[str](), 0
    for prompt in np.random.default_rng(seed).permutation(list(count)):
        if total >= responses:
            break
        kept.add(str(prompt))
        total += count[str(prompt)]
    return [p for p in domain.prompt_ids if p in kept]


def steady_training(model: Model, domain: Domain, training: Training, *, steps_taken: int, **options: Any) -> Virtual:
    """`virtual_training` with its options; where it breaks, it is run again in twice as many steps, up to all of the training's.

    Steps that stand for many of the real ones can be too long where the real training is just stable.

    Raises as `virtual_training` does, DivergedError where all steps were taken.
    """
    most, attempt = training.steps - options.get("first_step", 0), 1
    while True:
        try:
            made = virtual_training(model, domain, training, steps_taken=steps_taken, **options)
        except DivergedError:
            if steps_taken >= most:
                raise
            steps_taken, attempt = min(most, 2 * steps_taken), attempt + 1
        else:
            return replace(made, path=made.path.assign(attempt=attempt))


class Frozen:
    """Rollouts that are drawn from until new ones take their place. draws, distinct: responses used so far, and available.

    sampled: the policy that they come from.  origin: where the training began, as an update of the model; the KL penalty and
    dpo compare with it.  begun: whether the leaves are another policy than the one that sampled already.
    """

    def __init__(
        self, leaves: Trainable, domain: Domain, training: Training, sampled: Trainable, seed: int, batch_tokens: int,
        origin: NamedChanges | None = None, *, begun: bool = False,
    ):  # fmt: skip
        self.leaves, self.training, self.seed, self.batch_tokens = leaves, training, seed, batch_tokens
        self.origin, self.begun = origin, begun
        source = rollouts(domain, training)
        self.reader = Minibatches(leaves, source, batch_tokens)
        self.before = Recall(Minibatches(sampled, source, batch_tokens))
        if sampled is leaves:  # which move from here on: what they say of any rollout is asked now
            self.before.logp(np.arange(len(domain.sequences)))
        self.reference: Recall | None = None  # None: the policy that sampled
        compared = training.kl_beta > 0 or training.algorithm == "dpo"
        if compared and (sampled is leaves or origin is not None):
            self.reference = Recall(Minibatches(Still(leaves.model, origin), source, batch_tokens))
        self.minibatches = source.minibatches(seed)
        self.round, self.draws, self.distinct = 0, 0, source.size

    def accumulate(self, least_ess: float) -> Weighed:
        """Put the gradient of the next minibatch on the leaves, which are taken to move after it."""
        places = next(self.minibatches)
        self.draws += len(places)
        # Until the first step the present policy is the one that sampled, and says what the others are compared with.
        before = self.before.logp(places) if self.begun else None
        reference = None if self.reference is None else self.reference.logp(places)
        self.begun = True
        return self.reader.accumulate(places, before, least_ess, reference, self.before)

    def renewed(self, domain: Domain) -> Frozen:
        """The same with new rollouts of the present policy."""
        seed, training = self.seed + 1, self.training
        new = Frozen(self.leaves, domain, training, self.leaves, seed, self.batch_tokens, self.origin)
        new.round, new.draws, new.distinct = self.round + 1, self.draws, self.distinct + new.distinct
        return new


def _check_saturated(fresh: Domain, before: float, step: int) -> None:
    """A policy all of whose responses are rewarded alike trains no further, if it does better than before; else it broke."""
    reward = float(np.mean(fresh.rewards()))
    if reward < before:
        raise DivergedError(
            got=f"a policy of domain {fresh.name!r} all of whose responses have reward {reward:g} after {step} virtual steps",
            expected="a training that gets better",
            remedy="raise effort, so that fewer optimizer steps are taken as one, or lower training.learning_rate",
        )


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
