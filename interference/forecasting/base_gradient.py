"""The gradient tier: the first step that training would take, preconditioned as its optimizer would, times its length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from interference.domain import Domain
from interference.forecasting.batches import rollouts
from interference.forecasting.minibatch import Minibatches
from interference.forecasting.trainable import trainable
from interference.forecasting.training import Training
from interference.model import Model
from interference.tree import Change


@dataclass(frozen=True, eq=False)
class Extrapolated:
    """The update of a training whose gradients stay what they are at the base. draws: sequences used, out of `distinct`."""

    update: dict[str, Change]
    draws: int
    distinct: int


def gradient_update(
    model: Model,
    domain: Domain,
    training: Training,
    *,
    seed: int = 0,
    minibatches: int | None = None,
    batch_tokens: int = 16384,
    progress: Callable[[int, int], None] | None = None,
) -> Extrapolated:
    """d = -(sum of the step sizes) * p(g), from the gradients g_1..g_M of minibatches of the training's size at the base.

    With their mean g and mean square v, p is g / (sqrt(v) + epsilon) for adamw, which normalises by the noise of a minibatch,
    g for sgd (each g_m clipped), and the mean of sign(g_m) for sign.

    Args:
        minibatches: M; as many as the rollouts fill unless given.

    Raises InputError as `virtual_training` does.
    """
    source = rollouts(domain, training)
    leaves = trainable(model, training.adapter)
    reader = Minibatches(leaves, source, batch_tokens)
    size = max(1, round(source.size / training.rollouts_per_step))
    wanted = max(1, min(minibatches or size, training.steps))
    first = [torch.zeros_like(x) for x in leaves.leaves.values()]
    second = [torch.zeros_like(x) for x in leaves.leaves.values()]
    draws, batches = 0, source.minibatches(seed)
    for done in range(wanted):
        places = next(batches)
        reader.accumulate(places, None)
        torch.nn.utils.clip_grad_norm_(leaves.leaves.values(), training.max_grad_norm or float("inf"))
        for leaf, mean, square in zip(leaves.leaves.values(), first, second, strict=True):
            if leaf.grad is None:
                continue
            mean += leaf.grad.sign() / wanted if training.optimizer == "sign" else leaf.grad / wanted
            square += leaf.grad.square() / wanted
            leaf.grad = None
        draws += len(places)
        if progress is not None:
            progress(done + 1, wanted)
    total = sum(training.rates())
    with torch.no_grad():
        for leaf, mean, square in zip(leaves.leaves.values(), first, second, strict=True):
            if training.optimizer == "adamw":
                leaf -= total * (mean / (square.sqrt() + training.epsilon) + training.weight_decay * leaf)
            else:
                leaf -= total * mean
    return Extrapolated(leaves.update(), draws, source.size)
