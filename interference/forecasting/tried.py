"""Estimated updates tried on one domain: what each does to it, by evaluating the moved policy where that can be done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from interference.domain import Domain
from interference.forecasting.outcomes import REACH, NoiseTerm, Point, joined, moved, noise_term
from interference.forecasting.virtual import Resample
from interference.measurement import Scores, reward_change, score
from interference.model import Model
from interference.objectives import reward_terms
from interference.probes.halves import prompt_halves
from interference.truncation import LOW_ESS


class Tried:
    """Updates tried on a domain's sequences.

    points: {update: [u, d_1, d_2]}, the mean of two estimates and each of them.  own: the update that was made from these very
    sequences, if one was; it is tried on the half of the prompts that it was not made from.  few: the part of the domain that
    the noise of the updates is computed on.  reach: the share of the updates at which they are tried.

    present: the objective at the base.
    """

    def __init__(
        self, model: Model, objective: str, domain: Domain, points: Mapping[str, Sequence[dict[str, Tensor]]],
        own: str | None, few: Domain, reach: float, seed: int, batch_tokens: int,
    ):  # fmt: skip
        self.model, self.objective, self.domain, self.points, self.own = model, objective, domain, points, own
        self.reach, self.seed, self.batch_tokens = reach, seed, batch_tokens
        halves = points[own][1:] if own else []
        at = [(d, reach) for d in (*(p[0] for p in points.values()), *halves)]
        self.anchor, *scores = score(model, domain, at, batch_tokens)
        self.at_mean = dict(zip(points, scores, strict=False))
        self.at_own = scores[len(points) :]
        self.terms = self._noise_terms(few)
        self.present = _value(objective, domain, self.anchor)

    def found(self, update: str, sampler: Resample | None, instead: bool) -> Point:
        """What an update does.

        Where weights fail the moved policy is sampled, given a sampler; else the first order is told if something has to
        be (`instead`).
        """
        made = self._unseen(self.at_own, self.reach) if update == self.own else self._moved(self.at_mean[update])
        if made.route != "weighted" or made.ess >= LOW_ESS:
            return made
        mean, *halves = self.points[update]
        if sampler is not None:
            return self._sampled(mean, sampler)
        if not instead:
            return made
        points = [(d, REACH) for d in (halves if update == self.own else [mean])]
        near = score(self.model, self.domain, points, self.batch_tokens)[1:]
        if update == self.own:
            return self._unseen(near, REACH)
        return moved(self.objective, self.domain, self.anchor, near[0], self.seed, REACH)

    def term(self, update: str) -> NoiseTerm:
        """What the noise of an update's estimates does."""
        return self.terms[update]

    def _noise_terms(self, few: Domain) -> dict[str, NoiseTerm]:
        """From a few prompts: a small number whose error hardly counts. Of the own update from all, which are at hand."""
        kept = set(few.prompt_ids)
        places = [i for i, p in enumerate(self.domain.prompt_ids) if p in kept]
        halves = [(d, self.reach) for p in self.points.values() for d in p[1:]]
        scores = score(self.model, few, halves, self.batch_tokens)[1:]
        start, out = self.anchor.take(places), {}
        for i, (update, mean) in enumerate(self.at_mean.items()):
            three = (mean.take(places), scores[2 * i], scores[2 * i + 1])
            out[update] = noise_term(*(moved(self.objective, few, start, at, self.seed, self.reach) for at in three))
        if self.own:
            out[self.own] = noise_term(*map(self._moved, (self.at_mean[self.own], *self.at_own)))
        return out

    def _moved(self, at: Scores) -> Point:
        return moved(self.objective, self.domain, self.anchor, at, self.seed, self.reach)

    def _unseen(self, halves: Sequence[Scores], reach: float) -> Point:
        """The change at either estimate on the half of the prompts that it was not made from."""
        members = [set(part.prompt_ids) for part in prompt_halves(self.domain, self.seed)]
        found, counts = [], [len(m) for m in members]
        for prompts, at in zip(members, reversed(halves), strict=True):
            places = [i for i, p in enumerate(self.domain.prompt_ids) if p in prompts]
            part = Domain(self.domain.name, tuple(self.domain.sequences[i] for i in places))
            found.append(moved(self.objective, part, self.anchor.take(places), at.take(places), self.seed, reach))
        return joined(found, [c / sum(counts) for c in counts])

    def _sampled(self, update: dict[str, Tensor], sampler: Resample) -> Point:
        """The change of expected reward from fresh rollouts of the moved policy, on the same prompts."""
        with self.model.at([update], [1.0]):
            fresh = sampler(self.domain.prompt_ids, self.seed)
        change = reward_change(self.domain, fresh, self.seed)
        return Point(change.delta, change.replicates, 1.0, "sampled")


def first_prompts(domain: Domain, count: int) -> Domain:
    """The first so many prompts, and as many more as it takes for rewards to differ, where they do at all."""
    prompts, rewarded = list(dict.fromkeys(domain.prompt_ids)), all(s.reward is not None for s in domain.sequences)
    while True:
        kept = set(prompts[:count])
        part = Domain(domain.name, tuple(s for s in domain.sequences if s.prompt_id in kept))
        if count >= len(prompts) or not rewarded or len({s.reward for s in part.sequences}) > 1:
            return part
        count *= 2


def _value(objective: str, domain: Domain, anchor: Scores) -> float:
    """The objective at the base."""
    if objective == "nll":
        return float(-anchor.logp.sum() / sum(len(s.response) for s in domain.sequences))
    reward, weight, _ = reward_terms(domain)
    return float((reward * weight).sum() / weight.sum())
