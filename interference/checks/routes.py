"""The routes to a model's first and second derivatives along two directions, on one small batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from interference import derivatives, jets, tree
from interference.checks.differences import swept
from interference.checks.probe import Probe
from interference.domain import Batch
from interference.model import Model
from interference.tree import NamedTensors

Array = NDArray[np.float64]
WHOLE = 1 << 30  # tokens in a batch: everything together


@dataclass(frozen=True)
class Terms:
    """Per sequence: log-probability (S,), first (S, K) and second (S, K, K) derivatives; without `pairs` the second ones
    are known on the diagonal only."""

    value: Array
    first: Array
    second: Array
    pairs: bool = True

    def known(self, second: Array) -> Array:
        """The entries (..., n) of second derivatives (..., K, K) that these terms have."""
        return second.reshape(*second.shape[:-2], -1) if self.pairs else np.diagonal(second, axis1=-2, axis2=-1)


@dataclass(frozen=True)
class Products:
    """Of f = sum_i signs_i logp_i: first[k] = grad f . d_k, second[k, l] = d_k' H d_l, and the gradient itself."""

    signs: Array
    first: Array
    second: Array
    gradient: dict[str, Tensor]


def forward_terms(
    model: Model,
    probe: Probe,
    engine: str,
    directions: Sequence[NamedTensors] | None = None,
    tokens: int = WHOLE,
    pairs: bool = True,
) -> Terms:
    """By the jets of an engine, for all pairs of directions or each alone; tokens = 1 takes each sequence alone."""
    along = list(probe.directions if directions is None else directions)
    found, _ = jets.sequence_jets(model, along, probe.sequences, pairs=pairs, engine=engine, batch_tokens=tokens)
    return Terms(found.logp, found.d1, found.d2, pairs)


def reverse_products(model: Model, probe: Probe, seed: int) -> Products:
    """By a gradient and forward-over-reverse Hessian products."""
    signs, f = signed_sum(model, probe, seed)
    K = len(probe.directions)
    first, second = np.zeros(K), np.zeros((K, K))
    gradient = derivatives.gradient(f, model.parameters)
    for l, direction in enumerate(probe.directions):  # noqa: E741
        product = derivatives.hvp(f, model.parameters, direction)[1]
        first[l] = tree.dot(gradient, direction)
        for k, other in enumerate(probe.directions):
            second[k, l] = tree.dot(product, other)
    return Products(signs, first, second, gradient)


def reverse_first(model: Model, probe: Probe, seed: int) -> tuple[Array, Array]:
    """The signs, and Products.first by the gradient alone."""
    signs, f = signed_sum(model, probe, seed)
    gradient = derivatives.gradient(f, model.parameters)
    return signs, np.array([tree.dot(gradient, direction) for direction in probe.directions])


def signed_sum(model: Model, probe: Probe, seed: int) -> tuple[Array, derivatives.Scalar]:
    """Random signs and f = sum_i signs_i logp_i, in which no two sequences' errors cancel by construction."""
    g = torch.Generator().manual_seed(seed + 1)
    signs = torch.randint(0, 2, (len(probe.sequences),), generator=g).double() * 2 - 1
    batch = probe.batch().to(model.device)

    def f(p: NamedTensors) -> Tensor:
        logp = derivatives.sequence_logp(model, p, batch)
        return (signs.to(logp) * logp).sum()

    return signs.numpy(), f


def alone_gradient(model: Model, probe: Probe, seed: int) -> dict[str, Tensor]:
    """The gradient of the signed sum with every sequence in a batch of its own."""
    signs, _ = signed_sum(model, probe, seed)
    total: dict[str, Tensor] = {}
    for sequence, sign in zip(probe.sequences, signs, strict=True):
        single = Probe((sequence,), probe.directions).batch().to(model.device)

        def f(p: NamedTensors, single: Batch = single) -> Tensor:
            return derivatives.sequence_logp(model, p, single).sum()

        total = tree.axpy(float(sign), derivatives.gradient(f, model.parameters), total)
    return total


def jvp_first(model: Model, probe: Probe) -> Array:
    """(S, K) by plain forward mode."""
    batch = probe.batch().to(model.device)
    columns = [_slope(model, batch, d) for d in probe.directions]
    return np.stack(columns, 1)


def _slope(model: Model, batch: Batch, direction: NamedTensors) -> Array:
    tangent = derivatives.jvp(lambda p: derivatives.sequence_logp(model, p, batch), model.parameters, direction)[1]
    out: Array = tangent.double().cpu().numpy()
    return out


def value(model: Model, batch: Batch) -> Array:
    """Log-probability of each sequence by the model's own forward pass, (S,)."""
    batch = batch.to(model.device)
    logp = model.forward(batch.input_ids)[:, :-1].double().log_softmax(-1)
    picked = logp.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    out: Array = (picked * batch.targets[:, 1:]).sum(1).cpu().numpy()
    return out


def difference_first(model: Model, probe: Probe) -> tuple[Array, float]:
    """First derivatives along d from values alone, and their own uncertainty."""
    return swept(lambda t: _at(model, probe, t), 1, _step(model, probe))


def difference_second(model: Model, probe: Probe) -> tuple[Array, float]:
    """Second derivatives along d from values alone, and their own uncertainty."""
    return swept(lambda t: _at(model, probe, t), 2, _step(model, probe))


def difference_of_slopes(model: Model, probe: Probe) -> tuple[Array, float]:
    """Second derivatives along d from differences of jvp, which are less noisy than second differences."""
    batch, d = probe.batch().to(model.device), probe.directions[0]

    def slope(t: float) -> Array:
        with model.at([d], [t]):
            return _slope(model, batch, d)

    return swept(slope, 1, _step(model, probe) / 4, steps=8)


def _at(model: Model, probe: Probe, t: float) -> Array:
    with model.at([probe.directions[0]], [t]):
        return value(model, probe.batch())


def _step(model: Model, probe: Probe) -> float:
    """Where the sweep starts: a tenth of the size of the weights that move."""
    d = probe.directions[0]
    return 0.1 * tree.norm({n: model.parameters[n] for n in d}) / (tree.norm(d) or 1.0)


def resolves_float64(model: Model, probe: Probe) -> bool:
    """Whether a float64 model's values follow a change of 1e-9 of themselves: steps in float32 inside it do not."""
    slope = _slope(model, probe.batch().to(model.device), probe.directions[0])
    size = float(np.linalg.norm(value(model, probe.batch())))
    step = 1e-9 * size / (float(np.linalg.norm(slope)) or 1.0)
    moved = (_at(model, probe, step) - _at(model, probe, -step)) / (2 * step)
    return float(np.linalg.norm(moved - slope)) < 1e-2 * float(np.linalg.norm(slope))
