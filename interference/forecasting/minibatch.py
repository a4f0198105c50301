"""Gradients of minibatches of frozen rollouts, put on the leaves that training moves."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from interference import shared_prompts
from interference.forecasting.batches import Places, Rollouts, Weighed
from interference.forecasting.trainable import Trainable
from interference.shared_prompts import Rows
from interference.statistics import Array


class Minibatches:
    """Reads minibatches of `source` at the present values of `leaves`. Equal sequences are computed once."""

    def __init__(self, leaves: Trainable, source: Rollouts, batch_tokens: int):
        self.leaves, self.source, self.batch_tokens = leaves, source, batch_tokens
        distinct, where = source.domain.distinct()
        self.distinct, self.where = distinct, np.asarray(where)

    def logp(self, places: Places) -> Array:
        """Log-probability of the responses at these places, at the present parameters."""
        used, back = np.unique(self.where[places], return_inverse=True)
        return self._read(used)[back]

    def accumulate(
        self,
        places: Places,
        before: Array | None,
        least_ess: float = 0.0,
        reference: Array | None = None,
        recall: Recall | None = None,
    ) -> Weighed:
        """Add a minibatch's gradient to the leaves' own. Sequences that teach nothing (`Rollouts.teaches`) are not computed.

        before: log-probabilities under the policy that sampled it; None where that is the present one.
        reference: those under the policy that the KL penalty and dpo compare with, unless it is the one that sampled.
        recall: is told the present log-probabilities; only where `before` is None.
        """
        teaches = self.source.teaches[places]
        used, back = np.unique(self.where[places[teaches]], return_inverse=True)
        parts = list(self._parts(used))
        held = [self._sums(parts[0])] if len(parts) == 1 else []
        moved = np.zeros(len(places))
        apart = None if reference is None else np.zeros(len(places))
        if before is not None or reference is not None:
            now = (_in_order(parts[0], held[0]) if held else self._read(used))[back]
            if before is not None:
                moved[teaches] = now - before[teaches]
            if apart is not None and reference is not None:
                apart[teaches] = now - reference[teaches]
        weighed = self.source.weigh(places, moved, least_ess, apart)
        coefficients = np.zeros(len(used))
        np.add.at(coefficients, back, weighed.coefficients[teaches])
        for part in parts:
            logp = held[0] if held else self._sums(part)
            (torch.from_numpy(coefficients[list(part.index)]).to(logp) * logp).sum().backward()
            if recall is not None and before is None:
                recall.values[used[list(part.index)]] = logp.detach().double().cpu().numpy()
        if not parts:  # a gradient of zero, which an optimizer with moments moves on, and not the lack of one
            for leaf in self.leaves.leaves.values():
                leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        return weighed

    @torch.no_grad()
    def _read(self, used: Places) -> Array:
        """Log-probabilities of distinct sequences."""
        out = np.zeros(len(used))
        for part in self._parts(used):
            out[list(part.index)] = self._sums(part).double().cpu().numpy()
        return out

    def _parts(self, used: Places) -> Iterator[Rows]:
        model = self.leaves.model
        chosen = [self.distinct[i] for i in used]
        return shared_prompts.batches(model, chosen, model.fit_tokens(self.batch_tokens)) if chosen else iter(())

    def _sums(self, rows: Rows) -> Tensor:
        return rows.sums(self.leaves.logp(rows))


class Recall:
    """Log-probabilities under a policy that stays as it is, of each distinct sequence once and when it is first asked for."""

    def __init__(self, reader: Minibatches):
        self.reader, self.values = reader, np.full(len(reader.distinct), np.nan)

    def logp(self, places: Places) -> Array:
        """(S,) of the responses at these places; not a number for those that teach nothing."""
        where, source = self.reader.where, self.reader.source
        wanted = places[source.teaches[places]]
        missing = wanted[np.isnan(self.values[where[wanted]])]
        if len(missing):
            self.values[where[missing]] = self.reader.logp(missing)
        return np.asarray(self.values[where[places]])


def _in_order(rows: Rows, sums: Tensor) -> Array:
    """Sums of a batch in the order of the list that it was made from."""
    return np.asarray(sums.detach().double().cpu().numpy()[np.argsort(rows.index)])
