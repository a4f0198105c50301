"""Products of a domain's gradient and Hessians with the updates, contracted with the updates unit by unit.

For an update d, an objective L and every unit u of the model's anatomy (a row, a column, a tensor):

    first[u]  = sum over the coordinates of u of  g d            g = grad L
    second[u] = 1/2 sum over the coordinates of u of  d (H d)    H = the Hessian of L's estimate (docs/math.md, Objectives)

One gradient per domain and one Hessian-vector product per update, reverse over forward: the logits z and their derivative z'
along d are differentiated back once, with the cotangents (H_z z', grad_z) of the objective's head, which have closed forms.
With p = softmax(z) at a response token y of sequence i, c_i the objective's first-order weights, m' = E_p z',
l' = z'[y] - m', s'_i the sum of l' over the sequence and N the response tokens of the domain:

    objective  grad_z         H_z z'
    nll        c (e_y - p)    -c p (z' - m')
    reward     c (e_y - p)    -c p (z' - m') + c (e_y - p) s'_i
    surrogate  c (e_y - p)    -c p (z' - m') + c (e_y - p) l'
    kl         0              p (z' - m') / N

Nothing of a parameter's size is kept in float64: products are summed in float64 as they are made, batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, func

from interference import domain as data
from interference.anatomy import Anatomy
from interference.domain import Domain
from interference.errors import InputError
from interference.model import Model
from interference.objectives import first_order_weights, kind
from interference.tree import NamedTensors

Array = NDArray[np.float64]


def sequence_weights(objective: str, domain: Domain) -> Array:
    """c (S,): what a sequence's terms are multiplied with; for kl, 1 / N."""
    if objective == "kl":
        return np.full(len(domain.sequences), 1.0 / sum(len(s.response) for s in domain.sequences))
    return first_order_weights(objective, domain)


def unit_products(
    model: Model,
    anatomy: Anatomy,
    updates: Mapping[str, NamedTensors],
    domain: Domain,
    objectives: Sequence[str],
    *,
    batch_tokens: int = 4096,
) -> Array:
    """(objectives, updates, 2, units): first and second of the table above, float64.

    The objectives read the same sequences and share the passes through the model. `updates` carry the model's parameter names.

    Raises InputError for an unknown objective, and for an operation that torch cannot differentiate twice.
    """
    for objective in objectives:
        kind(objective)
    distinct, where = domain.distinct()
    weights = torch.zeros(len(objectives), len(distinct), dtype=torch.float64)
    for o, objective in enumerate(objectives):
        weights[o].index_add_(0, torch.tensor(where), torch.from_numpy(sequence_weights(objective, domain)))
    used = torch.nonzero(weights.any(0))[:, 0]  # no advantage, no contribution: prompts whose rewards are all equal
    weights, distinct = weights[:, used], [distinct[i] for i in used.tolist()]
    shape = (len(objectives), len(updates), 2, anatomy.units)
    out = torch.zeros(shape, dtype=torch.float64, device=model.device)
    with model.untouched(), _refusal():
        for batch in data.batches(distinct, model.pad, model.fit_tokens(batch_tokens)):
            c = weights[:, list(batch.index)].to(model.device)
            _add_batch(out, model, anatomy, list(updates.values()), batch.to(model.device), objectives, c)
    return np.asarray(out.cpu().numpy())


@contextmanager
def _refusal() -> Iterator[None]:
    """Say what to do where torch cannot differentiate an operation of the model both ways."""
    try:
        yield
    except NotImplementedError as error:
        raise InputError(
            got=f"a model without Hessian-vector products ({str(error).splitlines()[0][:160]})",
            expected="operations that torch differentiates forwards and backwards",
            remedy='load experts with experts_implementation="eager"; nothing but the split depends on it',
        ) from error


@dataclass(frozen=True)
class _Head:
    """The output end of a batch: labels (N,), the sequence of each response token (N,), p (N, V)."""

    labels: Tensor
    place: Tensor
    p: Tensor

    def score(self, c: Tensor) -> Tensor:
        """c (e_y - p) for per-token c (N,)."""
        out = -c[:, None] * self.p
        return out.scatter_add_(1, self.labels[:, None], c[:, None])

    def curved(self, objective: str, c: Tensor, dz: Tensor) -> Tensor:
        """H_z z' of the table above for per-token c (N,)."""
        mean = (self.p * dz).sum(1, keepdim=True)
        spread = c[:, None] * self.p * (dz - mean)
        if objective == "kl":
            return spread
        if objective == "nll":
            return -spread
        along = (dz.gather(1, self.labels[:, None]) - mean)[:, 0]
        if objective == "reward":
            rows = int(self.place.max()) + 1
            sums = torch.zeros(rows, dtype=torch.float64, device=c.device).index_add_(0, self.place, along.double())
            along = sums[self.place].to(c.dtype)
        return self.score(c * along) - spread


def _add_batch(
    out: Tensor,
    model: Model,
    anatomy: Anatomy,
    updates: Sequence[NamedTensors],
    batch: data.Batch,
    objectives: Sequence[str],
    weights: Tensor,
) -> None:
    scored, place = _scored_logits(model, batch), batch.targets.nonzero()[:, 0]
    c = weights[:, place].to(model.dtype)
    z, pull = func.vjp(scored, {name: model.parameters[name] for update in updates for name in update})[:2]
    head = _Head(batch.input_ids[batch.targets], place, z.detach().softmax(1))
    for members in _same_gradient(objectives, weights):
        gradient = pull(head.score(c[members[0]]))[0]
        for k, update in enumerate(updates):
            out[members, k, 0] += _contract(anatomy, gradient, update)
    sloped = [o for o, name in enumerate(objectives) if name != "kl"]
    flat = [o for o, name in enumerate(objectives) if name == "kl"]
    if not flat:
        del pull  # its graph is as large as a gradient's
    for k, update in enumerate(updates):
        dz, pull_both = _derivative(scored, model, update, bool(sloped))
        for o in sloped:
            cotangents = head.curved(objectives[o], c[o], dz), head.score(c[o])
            out[o, k, 1] += 0.5 * _contract(anatomy, pull_both(cotangents), update)
        del pull_both
        for o in flat:  # no gradient at the head, so H is J' H_z J: one pass back through the logits themselves
            product = pull(head.curved("kl", c[o], dz))[0]
            out[o, k, 1] += 0.5 * _contract(anatomy, product, update)


def _same_gradient(objectives: Sequence[str], weights: Tensor) -> list[list[int]]:
    """Places of objectives whose gradients are one (reward and surrogate on the same data); kl has none."""
    groups: list[list[int]] = []
    for o, name in enumerate(objectives):
        mates = next((g for g in groups if torch.equal(weights[g[0]], weights[o])), None)
        if name != "kl" and mates is None:
            groups.append([o])
        elif name != "kl" and mates is not None:
            mates.append(o)
    return groups


def _contract(anatomy: Anatomy, vector: NamedTensors, update: NamedTensors) -> Tensor:
    """Sums of vector * update over every unit, (U,) in float64; zero where the update does not move."""
    some = next(iter(update.values()))
    out = torch.zeros(anatomy.units, dtype=torch.float64, device=some.device)
    for name, direction in update.items():
        out[anatomy.places[name]] = anatomy.sums(name, vector[name] * direction)
    return out


def _scored_logits(model: Model, batch: data.Batch) -> Callable[[NamedTensors], Tensor]:
    """Logits that predict the batch's response tokens, (N, V), as a function of the parameters that are named."""
    keep = batch.targets.shape[1] - int(batch.targets.any(0).nonzero()[0]) + 1
    scored = batch.targets[:, 1 - keep :]
    return lambda parameters: model.logits(parameters, batch.input_ids, keep)[:, :-1][scored]


def _derivative(
    scored: Callable[[NamedTensors], Tensor], model: Model, update: NamedTensors, back: bool
) -> tuple[Tensor, Callable[[tuple[Tensor, Tensor]], NamedTensors]]:
    """z' along the update, and what pulls cotangents of (z, z') back to the parameters that it moves, where asked for."""
    here = {name: model.parameters[name] for name in update}

    def both(parameters: NamedTensors) -> tuple[Tensor, Tensor]:
        value, tangent = func.jvp(scored, (parameters,), (dict(update),))[:2]
        return value, tangent

    if not back:
        return both(here)[1], lambda _: {}
    (_, dz), pull = func.vjp(both, here)[:2]
    return dz.detach(), lambda cotangents: pull(cotangents)[0]
