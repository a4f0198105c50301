"""Gradients of minibatches of frozen rollouts, put on the leaves that training moves."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from interference import domain as data
from interference.forecasting.batches import Places, Rollouts, Weighed
from interference.forecasting.trainable import Trainable
from interference.statistics import Array


class Minibatches:
    """Reads minibatches of `source` at the present values of `leaves`. Equal sequences are computed once."""

    def __init__(self, leaves: Trainable, source: Rollouts, batch_tokens: int):
        self.leaves, self.source, self.batch_tokens = leaves, source, batch_tokens
        distinct, where = source.domain.distinct()
        self.distinct, self.where = distinct, np.asarray(where)

    @torch.no_grad()
    def logp(self, places: Places) -> Array:
        """Log-probability of the responses at these places, at the present parameters."""
        used, back = np.unique(self.where[places], return_inverse=True)
        out = np.zeros(len(used))
        for part in self._parts(used):
            out[list(part.index)] = self._sums(part).double().cpu().numpy()
        return out[back]

    def accumulate(
        self, places: Places, before: Array | None, least_ess: float = 0.0, reference: Array | None = None
    ) -> Weighed:
        """Add a minibatch's gradient to the leaves' own.

        before: log-probabilities under the policy that sampled it; None where that is the present one.
        reference: those under the policy that the KL penalty and dpo compare with, unless it is the one that sampled.
        """
        used, back = np.unique(self.where[places], return_inverse=True)
        parts = list(self._parts(used))
        held = [self._sums(parts[0])] if len(parts) == 1 else []
        if before is None:
            now = before = np.zeros(len(places))
        elif held:
            now = held[0].detach().double().cpu().numpy()[np.argsort(parts[0].index)][back]
        else:
            now = self.logp(places)
        weighed = self.source.weigh(places, now - before, least_ess, None if reference is None else now - reference)
        coefficients = np.zeros(len(used))
        np.add.at(coefficients, back, weighed.coefficients)
        for part in parts:
            logp = held[0] if held else self._sums(part)
            (torch.from_numpy(coefficients[list(part.index)]).to(logp) * logp).sum().backward()
        return weighed

    def _parts(self, used: Places) -> list[data.Batch]:
        model = self.leaves.model
        chosen = [self.distinct[i] for i in used]
        return [b.to(model.device) for b in data.batches(chosen, model.pad, model.fit_tokens(self.batch_tokens))]

    def _sums(self, batch: data.Batch) -> Tensor:
        logp = self.leaves.logp(batch)
        out = torch.zeros(len(batch.index), dtype=logp.dtype, device=logp.device)
        return out.index_add(0, batch.targets.nonzero()[:, 0], logp)
