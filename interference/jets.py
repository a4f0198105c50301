"""Token jets: the value and the first two derivatives, along every update, of each response token's log-probability.

At theta + sum_k a_k d_k, for a response token y after its context, with z the logits and p = softmax(z):

    logp       log p_y                              (N,)
    d1[k]      d/da_k log p_y                       (K, N)
    d2[k, l]   d2/(da_k da_l) log p_y               (K, K, N)
    fisher     Cov_p(dz/da_k, dz/da_l)              (K, K, N)

This is the one derivative primitive of the package: every objective is a closed form of it (`objectives`). Two engines:
"taylor" carries Taylor coefficients through the model once (fast); "nested" nests torch.func.jvp over the whole model, once
per pair of updates (slow; the reference).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import jvp

from interference import domain as data
from interference.errors import InputError, nearest
from interference.model import Model
from interference.tree import NamedChanges, NamedTensors, dense

ENGINES = ("taylor", "nested")


@dataclass(frozen=True)
class TokenJets:
    """Jets of N response tokens along K updates; d2 and fisher are (K, K, N), or (K, N) diagonals when `pairs` is false."""

    logp: Tensor
    d1: Tensor
    d2: Tensor
    fisher: Tensor


@dataclass(frozen=True)
class SequenceJets:
    """Sums of token jets over each of S sequences, float64.

    tokens (S,); logp (S,); d1 (S, K); d2, fisher, d1d1 (S, K, K), where d1d1 sums the per-token products d1[k] d1[l].
    Without pairs, the entries off the diagonal are NaN: not computed.
    """

    tokens: NDArray[np.float64]
    logp: NDArray[np.float64]
    d1: NDArray[np.float64]
    d2: NDArray[np.float64]
    fisher: NDArray[np.float64]
    d1d1: NDArray[np.float64]

    def take(self, where: Sequence[int]) -> SequenceJets:
        """The same for the sequences at `where`, repetitions allowed."""
        at = np.asarray(where)
        return SequenceJets(*(getattr(self, f)[at] for f in self.__dataclass_fields__))


def token_jets(
    model: Model,
    updates: Sequence[NamedChanges],
    batch: data.Batch,
    *,
    pairs: bool = True,
    engine: str = "taylor",
) -> tuple[TokenJets, list[str]]:
    """Jets of a batch's response tokens (row-major order), and the operations that needed a slower fallback.

    `updates` carry the model's parameter names (see Model.align); a matrix's change may be LowRank factors, which the Taylor
    engine applies as they are.

    Raises InputError for an unknown engine and, in both engines, for updates or a batch that do not fit the model.
    """
    batch = batch.to(model.device)
    if engine == "taylor":
        from interference.taylor import taylor_jets

        terms, fallbacks = taylor_jets(model.module, updates, batch.input_ids, batch.targets, pairs=pairs)
        return TokenJets(terms.logp, terms.d1, terms.d2, terms.fisher), list(fallbacks)
    if engine == "nested":
        return _nested(model, _plain(model, updates, batch), batch, pairs), []
    raise InputError(got=f"engine {engine!r}", expected="a jet engine", remedy=nearest(engine, ENGINES))


def _plain(model: Model, updates: Sequence[NamedChanges], batch: data.Batch) -> list[dict[str, Tensor]]:
    """Updates as tensors of the parameters' kind, refused where the Taylor engine refuses them or the batch."""
    from interference.taylor.run import _check_batch, _checked

    changes = _checked(model.parameters, updates)
    _check_batch(model.module, batch.input_ids, batch.targets)
    every = [{name: given[k] for name, given in changes.items()} for k in range(len(updates))]
    return [{name: dense(change) for name, change in update.items() if change is not None} for update in every]


def sequence_jets(
    model: Model,
    updates: Sequence[NamedChanges],
    sequences: Sequence[data.Sequence],
    *,
    pairs: bool = True,
    engine: str = "taylor",
    batch_tokens: int = 4096,
) -> tuple[SequenceJets, list[str]]:
    """Per-sequence sums of the token jets, accumulated in float64, whatever the split into batches."""
    S, K = len(sequences), len(updates)
    sums = {"tokens": np.zeros(S), "logp": np.zeros(S), "d1": np.zeros((S, K))}
    sums |= {name: np.full((S, K, K), np.nan) for name in ("d2", "fisher", "d1d1")}
    fallbacks: dict[str, None] = {}
    for batch in data.batches(sequences, model.pad, batch_tokens):
        jets, taken = token_jets(model, updates, batch, pairs=pairs, engine=engine)
        fallbacks |= dict.fromkeys(taken)
        rows = np.asarray(batch.index)
        place = batch.targets.nonzero()[:, 0].to(jets.logp.device)

        def total(per_token: Tensor, place: Tensor = place, rows: int = len(rows)) -> NDArray[np.float64]:
            out = per_token.new_zeros((*per_token.shape[:-1], rows), dtype=torch.float64)
            out.index_add_(-1, place, per_token.double())
            return np.moveaxis(out.cpu().numpy(), -1, 0)

        sums["tokens"][rows] = batch.targets.sum(1).numpy()
        sums["logp"][rows] = total(jets.logp)
        sums["d1"][rows] = total(jets.d1)
        d1 = jets.d1.double()
        if pairs:
            quadratic = {"d2": jets.d2, "fisher": jets.fisher, "d1d1": d1[:, None] * d1[None, :]}
            for name, value in quadratic.items():
                sums[name][rows] = total(value)
        else:
            k = np.arange(K)
            for name, value in {"d2": jets.d2, "fisher": jets.fisher, "d1d1": d1 * d1}.items():
                sums[name][rows[:, None], k, k] = total(value)
    return SequenceJets(**sums), list(fallbacks)


def _nested(model: Model, updates: Sequence[NamedTensors], batch: data.Batch, pairs: bool) -> TokenJets:
    """Nested forward mode over the whole model, once per pair: slow, simple, the reference of every other route."""
    columns = batch.targets.any(0).nonzero()
    keep = batch.targets.shape[1] - int(columns[0]) + 1
    scored = batch.targets[:, -keep + 1 :] if keep > 1 else batch.targets[:, :0]
    labels = batch.input_ids[batch.targets]
    K, zero, one = len(updates), *torch.tensor([0.0, 1.0], dtype=model.dtype, device=model.device)

    def directional(k: int, l: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # noqa: E741
        def logits(s: Tensor, t: Tensor) -> Tensor:
            moved = {n: p + s * updates[k][n] if n in updates[k] else p for n, p in model.parameters.items()}
            moved = {n: p + t * updates[l][n] if n in updates[l] else p for n, p in moved.items()}
            return model.logits(moved, batch.input_ids, keep)[:, :-1][scored]

        def along_k(t: Tensor) -> tuple[Tensor, Tensor]:
            value, tangent = jvp(lambda s: logits(s, t), (zero,), (one,))[:2]
            return value, tangent

        (z, zk), (zl, zkl) = jvp(along_k, (zero,), (one,))[:2]
        return z, zk, zl, zkl

    shape = (K, K, len(labels)) if pairs else (K, len(labels))
    logp, d1 = torch.empty(0), labels.new_zeros((K, len(labels)), dtype=model.dtype)
    d2, fisher = d1.new_zeros(shape), d1.new_zeros(shape)
    for k in range(K):
        for l in range(k, K) if pairs else (k,):  # noqa: E741
            z, zk, zl, zkl = directional(k, l)
            logp, p = z.log_softmax(-1), z.softmax(-1)
            logp = logp.gather(-1, labels[:, None])[:, 0]
            mk, ml, mkl = ((p * x).sum(-1, keepdim=True) for x in (zk, zl, zkl))
            covariance = (p * (zk - mk) * (zl - ml)).sum(-1)
            second = (zkl - mkl).gather(-1, labels[:, None])[:, 0] - covariance
            d1[k] = (zk - mk).gather(-1, labels[:, None])[:, 0]
            for place in {(k, l), (l, k)} if pairs else {(k,)}:
                d2[place], fisher[place] = second, covariance
    return TokenJets(logp, d1, d2, fisher)
