"""Derivatives of scalar functions of named parameters, through torch.func: gradient, jvp, vjp, hvp, ggn.

They keep torch.func's order of arguments and results: the function first, then the point, then the direction. Reverse mode
gives what the forward-mode jets cannot, one whole vector per product, and is the independent oracle of the jets.

All of them raise InputError when the function applies a custom autograd.Function (interference.kernels).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, func

from interference import domain as data
from interference.domain import Domain
from interference.kernels import refuse_custom_functions
from interference.model import Model
from interference.objectives import first_order_weights
from interference.tree import NamedTensors

Scalar = Callable[[NamedTensors], Tensor]


def gradient(f: Scalar, parameters: NamedTensors) -> dict[str, Tensor]:
    """grad f at `parameters`, a vector with their names.

    >>> gradient(lambda p: (p["w"] ** 2).sum(), {"w": torch.tensor([1.0, 3.0])})
    {'w': tensor([2., 6.])}
    """
    with refuse_custom_functions():
        out: dict[str, Tensor] = func.grad(f)(dict(parameters))
    return out


def jvp(
    f: Callable[[NamedTensors], Tensor], parameters: NamedTensors, direction: NamedTensors
) -> tuple[Tensor, Tensor]:
    """(f, J v): the value and the derivative along `direction`; names that `direction` lacks do not move."""
    moving = {name: parameters[name] for name in direction}
    with refuse_custom_functions():
        value, tangent = func.jvp(lambda p: f({**parameters, **p}), (moving,), (dict(direction),))[:2]
    return value, tangent


def vjp(
    f: Callable[[NamedTensors], Tensor], parameters: NamedTensors, cotangent: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """(f, u' J): the value and the vector-Jacobian product with `cotangent`, of f's shape."""
    with refuse_custom_functions():
        value, pull = func.vjp(f, dict(parameters))[:2]
        return value, pull(cotangent)[0]


def hvp(f: Scalar, parameters: NamedTensors, direction: NamedTensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(grad f, H v), forward over reverse.

    >>> hvp(lambda p: (p["w"] ** 3).sum(), {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, 0.0])})[1]
    {'w': tensor([6., 0.])}
    """
    full = {n: direction[n] if n in direction else torch.zeros_like(p) for n, p in parameters.items()}
    with refuse_custom_functions():
        grads, products = func.jvp(func.grad(f), (dict(parameters),), (full,))[:2]
    return grads, products


def ggn(
    outputs: Callable[[NamedTensors], Tensor],
    loss: Callable[[Tensor], Tensor],
    parameters: NamedTensors,
    direction: NamedTensors,
) -> dict[str, Tensor]:
    """G v = J' (d2 loss / dz2) J v for f = loss(outputs(parameters)): the Gauss-Newton part of the Hessian."""
    z, jz = jvp(outputs, parameters, direction)
    with refuse_custom_functions():
        _, curved = func.jvp(func.grad(loss), (z,), (jz,))[:2]
    return vjp(outputs, parameters, curved)[1]


def sequence_logp(model: Model, parameters: NamedTensors, batch: data.Batch) -> Tensor:
    """Sum of the response tokens' log-probabilities of each sequence of a batch, (B,); differentiable."""
    z = model.logits(parameters, batch.input_ids)[:, :-1]
    labels, scored = batch.input_ids[:, 1:], batch.targets[:, 1:]
    logp = z.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    return torch.where(scored, logp, torch.zeros((), dtype=logp.dtype, device=logp.device)).sum(1)


def objective_gradient(model: Model, domain: Domain, objective: str, *, batch_tokens: int = 4096) -> dict[str, Tensor]:
    """Gradient of a domain's objective at the model, accumulated over batches, under the model's parameter names.

    All objectives share one form, sum_i c_i grad s_i with s_i the sequence's log-probability (objectives.first_order_weights).
    """
    weights = first_order_weights(objective, domain)
    distinct, where = domain.distinct()
    merged = torch.zeros(len(distinct), dtype=torch.float64)
    merged.index_add_(0, torch.tensor(where), torch.from_numpy(weights))
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.parameters.items()}
    with model.untouched():
        for batch in data.batches(distinct, model.pad, batch_tokens):
            c = merged[list(batch.index)].to(device=model.device, dtype=model.dtype)
            on_device = batch.to(model.device)

            def weighted(p: NamedTensors, c: Tensor = c, batch: data.Batch = on_device) -> Tensor:
                return (c * sequence_logp(model, p, batch)).sum()

            for name, part in gradient(weighted, model.parameters).items():
                total[name] += part
    return total
