"""Frozen rollouts that a virtual training draws minibatches from, until new ones take their place."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from interference.domain import Domain
from interference.forecasting.batches import Weighed, learnable, rollouts
from interference.forecasting.minibatch import Minibatches, Recall
from interference.forecasting.trainable import Still, Trainable
from interference.forecasting.training import Training
from interference.tree import NamedChanges

LEAST_STEPS = 2
"""Steps that renewed rollouts are made for at least."""
Resample = Callable[[Sequence[str], int], Domain]
"""(prompt ids, seed) -> rollouts, with rewards, of the model as it is at the time: one for every id, which may repeat."""


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


class Supply:
    """Minibatches for a training, from frozen rollouts that are renewed where too few are effective, or where all were used.

    New ones are made for as many steps as the last were good for (`lasting`). alike: those that ended the training, since nothing
    tells them apart.
    """

    def __init__(self, frozen: Frozen, domain: Domain, least_ess: float, resample: Resample | None, seed: int):
        self.frozen, self.domain, self.least_ess, self.resample, self.seed = frozen, domain, least_ess, resample, seed
        self.used, self.alike = 0, domain
        self.lasting: float = math.inf

    def accumulate(self, left: int, step: int) -> Weighed | None:
        """`Frozen.accumulate` with `left` steps to be taken, this one among them; None where new rollouts are rewarded alike."""
        found = self.frozen.accumulate(self.least_ess) if self.used < self.lasting else None
        if self.resample is not None and (found is None or found.ess < self.least_ess):
            self.lasting = steps = lasting(self.used, left, still_good=found is None)
            fresh = self._fresh(self.resample, steps * self.frozen.training.rollouts_per_step, step)
            if not learnable(fresh):
                self.alike = fresh
                return None
            for leaf in self.frozen.leaves.leaves.values():
                leaf.grad = None
            self.frozen, self.used = self.frozen.renewed(fresh), 0
            found = self.frozen.accumulate(self.least_ess)
        self.used += 1
        return found

    def _fresh(self, resample: Resample, responses: int, step: int) -> Domain:
        """At least so many rollouts of the present policy; on all prompts where those asked first are alike by chance."""
        seed, every = 1000 * self.seed + step, self.domain.prompt_ids
        asked = prompts_of(self.domain, responses, seed)
        with self.frozen.leaves.applied():
            fresh = resample(asked, seed)
            if len(asked) < len(every) and not learnable(fresh):
                fresh = resample(every, seed)
        return fresh


def lasting(used: int, left: int, *, still_good: bool) -> int:
    """Steps that new rollouts are made for: as many as the last ones were good for, twice as many where they still are, or all
    where few more are left.

    >>> lasting(3, 8, still_good=False), lasting(3, 8, still_good=True), lasting(3, 20, still_good=True)
    (3, 8, 6)
    """
    wanted = max(LEAST_STEPS, 2 * used if still_good else used)
    return left if left <= 1.5 * wanted else wanted


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
