"""Estimated updates tried on one domain: what each does to it, by evaluating the moved policy where that can be done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from interference.domain import Domain
from interference.forecasting.frozen import Resample
from interference.forecasting.halves import Halves
from interference.forecasting.outcomes import REACH, NoiseTerm, Point, joined, moved, noise_term, telling
from interference.measurement import Scores, reward_change, score
from interference.model import Model
from interference.objectives import reward_terms
from interference.probes.halves import prompt_halves
from interference.tree import dense
from interference.truncation import LOW_ESS

SAMPLED = 2
"""Responses of a moved policy to each prompt, where it is sampled."""
Name = TypeVar("Name", bound=Hashable)


class Tried(Generic[Name]):
    """Updates tried on a domain's sequences.

    points: {update: [u, d_1, d_2]}, the mean of two estimates and each of them.  own: the updates that were made from these very
    sequences; they are tried on the half of the prompts that they were not made from.  few: the part of the domain that
    the noise of the updates is computed on.

    anchor: scores at the base of those that are evaluated (`outcomes.telling`), where they are known.  present: the objective at
    the base.
    """

    def __init__(
        self, model: Model, objective: str, domain: Domain, points: Mapping[Name, Sequence[dict[str, Tensor]]],
        own: Collection[Name], few: Domain, seed: int, batch_tokens: int, anchor: Scores | None = None,
    ):  # fmt: skip
        self.model, self.objective, self.domain, self.points = model, objective, domain, points
        self.seed, self.batch_tokens = seed, batch_tokens
        halves = [set(part.prompt_ids) for part in prompt_halves(domain, seed)] if own else []
        fewer = set(few.prompt_ids)
        parts = {p: (p in fewer, *(p in half for half in halves)) for p in domain.prompt_ids}
        self.halves, self.telling = halves, telling(objective, domain, parts)
        at = [(d, 1.0) for d in (*(p[0] for p in points.values()), *(d for u in own for d in points[u][1:]))]
        scores = score(model, self.telling.domain, at, batch_tokens, kl=False, anchor=anchor is None)
        self.anchor = scores.pop(0) if anchor is None else anchor
        self.at_mean, rest = dict(zip(points, scores, strict=False)), scores[len(points) :]
        self.at_own = {update: rest[2 * i : 2 * i + 2] for i, update in enumerate(own)}
        self.terms = self._noise_terms(few)
        self.present = present_value(objective, domain, self.anchor)

    def found(self, update: Name, sampler: Resample | None = None, instead: bool = True) -> Point:
        """What an update does.

        Where weights fail the moved policy is sampled, given a sampler; else the first order is told if something has to
        be (`instead`).
        """
        own = self.at_own.get(update)
        made = self._unseen(own) if own else self._moved(self.at_mean[update])
        if made.route != "weighted" or made.ess >= LOW_ESS:
            return made
        mean, *halves = self.points[update]
        if sampler is not None:
            return self._sampled(mean, sampler)
        if not instead:
            return made
        points = [(d, REACH) for d in (halves if own else [mean])]
        near = score(self.model, self.telling.domain, points, self.batch_tokens, kl=False, anchor=False)
        if own:
            return self._unseen(near, REACH)
        return moved(self.objective, self.telling, self.anchor, near[0], self.seed, REACH)

    def term(self, update: Name) -> NoiseTerm:
        """What the noise of an update's estimates does."""
        return self.terms[update]

    def _noise_terms(self, few: Domain) -> dict[Name, NoiseTerm]:
        """From a few prompts: a small number whose error hardly counts. Of own updates from all, which are at hand."""
        places = self._places(few.prompt_ids)
        part = self.telling.take(places)
        others = [update for update in self.points if update not in self.at_own]
        halves = [(d, 1.0) for update in others for d in self.points[update][1:]]
        scores = score(self.model, part.domain, halves, self.batch_tokens, kl=False, anchor=False) if halves else []
        start, out = self.anchor.take(places), {}
        for i, update in enumerate(others):
            three = (self.at_mean[update].take(places), scores[2 * i], scores[2 * i + 1])
            out[update] = noise_term(*(moved(self.objective, part, start, at, self.seed) for at in three))
        for update, own in self.at_own.items():
            out[update] = noise_term(*map(self._moved, (self.at_mean[update], *own)))
        return out

    def _places(self, prompts: Collection[str]) -> list[int]:
        """Of the evaluated responses to some prompts."""
        kept = set(prompts)
        return [i for i, p in enumerate(self.telling.domain.prompt_ids) if p in kept]

    def _moved(self, at: Scores) -> Point:
        return moved(self.objective, self.telling, self.anchor, at, self.seed)

    def _unseen(self, halves: Sequence[Scores], reach: float = 1.0) -> Point:
        """The change at either estimate on the half of the prompts that it was not made from."""
        found, counts = [], [len(prompts) for prompts in self.halves]
        for prompts, at in zip(self.halves, reversed(halves), strict=True):
            places = self._places(prompts)
            part = self.telling.take(places)
            found.append(moved(self.objective, part, self.anchor.take(places), at.take(places), self.seed, reach))
        return joined(found, [c / sum(counts) for c in counts])

    def _sampled(self, update: dict[str, Tensor], sampler: Resample) -> Point:
        """The change of expected reward from fresh rollouts of the moved policy, `SAMPLED` to each of the same prompts."""
        count = Counter(self.domain.prompt_ids)
        with self.model.at([update], [1.0]):
            fresh = sampler([p for p in count for _ in range(min(SAMPLED, count[p]))], self.seed)
        change = reward_change(self.domain, fresh, self.seed)
        return Point(change.delta, change.replicates, 1.0, "sampled")


def points_of(model: Model, halves: Halves) -> list[dict[str, Tensor]]:
    """u, d_1 and d_2 under the model's parameter names."""
    updates = (halves.mean(), halves.first, halves.second)
    return [{name: dense(change) for name, change in model.align(u).items()} for u in updates]


def first_prompts(domain: Domain, count: int) -> Domain:
    """The first so many prompts, and as many more as it takes for rewards to differ, where they do at all."""
    prompts, rewarded = list(dict.fromkeys(domain.prompt_ids)), all(s.reward is not None for s in domain.sequences)
    while True:
        kept = set(prompts[:count])
        part = Domain(domain.name, tuple(s for s in domain.sequences if s.prompt_id in kept))
        if count >= len(prompts) or not rewarded or len({s.reward for s in part.sequences}) > 1:
            return part
        count *= 2


def present_value(objective: str, domain: Domain, anchor: Scores | None) -> float:
    """The objective at the base; reward needs no scores."""
    if anchor is not None and objective == "nll":
        return float(-anchor.logp.sum() / sum(len(s.response) for s in domain.sequences))
    reward, weight, _ = reward_terms(domain)
    return float((reward * weight).sum() / weight.sum())
