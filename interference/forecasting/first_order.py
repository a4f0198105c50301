"""The first order of estimated updates on one domain, by products with its gradient: no update is tried."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from interference import statistics, tree
from interference.domain import Domain
from interference.forecasting.outcomes import REACH, NoiseTerm, Point
from interference.forecasting.trainable import Trainable
from interference.forecasting.tried import present_value
from interference.measurement import Scores, score
from interference.model import Model
from interference.objectives import first_order_weights
from interference.probes.halves import prompt_halves
from interference.shared_prompts import batches
from interference.statistics import Array

FOLDS = 8
"""Parts of the prompts whose gradients are kept apart, for the error of the products."""


class FirstOrder:
    """g'd of updates d on a domain, from one gradient of the domain: the cost hardly depends on the number of updates.

    Arguments and methods as of `tried.Tried`. few: the part that the effective share of sequences is extrapolated on.
    """

    def __init__(
        self, model: Model, objective: str, domain: Domain, points: Mapping[str, Sequence[dict[str, Tensor]]],
        own: Collection[str], few: Domain, seed: int, batch_tokens: int,
    ):  # fmt: skip
        self.model, self.objective, self.domain, self.points, self.own = model, objective, domain, points, own
        self.seed, self.batch_tokens = seed, batch_tokens
        self.half, self.size, self.products = self._products()
        self.ess = self._ess(few)
        self.present = present_value(objective, domain, self._anchor())

    def found(self, update: str) -> Point:
        """The mean over both estimates; of an own update, each on the half that it was not made from."""
        both = self.products[update]
        values = np.where(self.half == 0, both[1], both[0]) if update in self.own else both.mean(0)
        labels = [f"{self.domain.name} {fold}" for fold in range(len(values))]
        draws = statistics.ratio_replicates(values, self.size, labels, self.seed)
        return Point(float(values.sum()), draws, self.ess[update], "first")

    def term(self, update: str) -> NoiseTerm:
        """No curvature, no harm; half of what the two estimates differ by."""
        first, second = self.products[update].sum(1)
        return NoiseTerm(0.0, np.zeros(statistics.REPLICATES), float(first - second) / 2, 1.0)

    def _products(self) -> tuple[NDArray[np.intp], Array, dict[str, Array]]:
        """Of each fold of the prompts: its half, its share of what the objective averages over; {update: (2, folds) products}."""
        halves, sizes = [], []
        estimates = [d for point in self.points.values() for d in point[1:]]
        found = []
        for half, size, gradient in self._gradients():
            halves.append(half)
            sizes.append(size)
            found.append(tree.dots(gradient, estimates))
        products = np.reshape(found, (len(found), len(self.points), 2)).transpose(1, 2, 0)
        return np.asarray(halves), np.asarray(sizes) / sum(sizes), dict(zip(self.points, products, strict=True))

    def _gradients(self) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
        """The half, the size, and the part of the domain's gradient that each fold makes."""
        weights = dict(
            zip(map(id, self.domain.sequences), first_order_weights(self.objective, self.domain), strict=True)
        )
        leaves = Trainable(self.model)
        parts = prompt_halves(self.domain, self.seed) if self.own else (self.domain,)
        for half, part in enumerate(parts):
            prompts = list(dict.fromkeys(part.prompt_ids))
            for fold in np.array_split(np.arange(len(prompts)), min(FOLDS // len(parts), len(prompts))):
                kept = {prompts[i] for i in fold}
                rows = [s for s in part.sequences if s.prompt_id in kept and weights[id(s)]]  # perhaps none
                for batch in batches(self.model, rows, self.model.fit_tokens(self.batch_tokens)):
                    c = torch.tensor([weights[id(rows[i])] for i in batch.index])
                    logp = batch.sums(leaves.logp(batch))
                    (c.to(logp) * logp).sum().backward()
                yield half, self._size(part, kept), {n: p.grad for n, p in leaves.leaves.items() if p.grad is not None}
                for leaf in leaves.leaves.values():
                    leaf.grad = None

    def _size(self, part: Domain, kept: set[str]) -> int:
        """What the objective is a mean over: prompts, or tokens for nll."""
        if self.objective == "reward":
            return len(kept)
        return sum(len(s.response) for s in part.sequences if s.prompt_id in kept)

    def _anchor(self) -> Scores | None:
        return (
            None if self.objective == "reward" else score(self.model, self.domain, [], self.batch_tokens, kl=False)[0]
        )

    def _ess(self, few: Domain) -> dict[str, float]:
        """Effective share of the sequences at each mean update, extrapolated."""
        if self.objective != "reward":
            return dict.fromkeys(self.points, 1.0)
        near = [(mean, REACH) for mean, *_ in self.points.values()]
        anchor, *scores = score(self.model, few, near, self.batch_tokens, kl=False)
        ratios = [(at.logp - anchor.logp) / REACH for at in scores]
        return {u: statistics.effective_sample_size(r) / len(r) for u, r in zip(self.points, ratios, strict=True)}
