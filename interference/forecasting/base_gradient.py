"""The gradient tier: the first step that training would take, preconditioned as its optimizer would, times its length."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from interference.domain import Domain
from interference.forecasting.batches import rollouts
from interference.forecasting.minibatch import Minibatches
from interference.forecasting.trainable import trainable
from interference.forecasting.training import Training
from interference.model import Model
from interference.tree import Change

NEAR = 0.01
"""Share of the way at which the gradients of a LoRA adapter's A are taken, which are zero where B is."""


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
    g for sgd (each g_m clipped), and the mean of sign(g_m) for sign. Half of the minibatches of a LoRA adapter are read a little
    along the way of its B, since its A has no gradient before.

    Args:
        minibatches: M; as many as the rollouts fill unless given.

    Raises InputError as `virtual_training` does.
    """
    source = rollouts(domain, training)
    leaves = trainable(model, training.adapter)
    reader = Minibatches(leaves, source, batch_tokens)
    size = max(1, round(source.size / training.rollouts_per_step))
    wanted = max(1, min(minibatches or size, training.steps))
    named, total = leaves.leaves, sum(training.rates())
    start = {n: leaf.detach().clone() for n, leaf in named.items()}
    mean, square = ({n: torch.zeros_like(leaf) for n, leaf in named.items()} for _ in range(2))
    taken = dict.fromkeys(named, 0)
    draws, batches = 0, source.minibatches(seed)
    turn = math.ceil(wanted / 2) if leaves.late else -1
    wanted = max(wanted, turn + 1)
    for done in range(wanted):
        if done == turn:
            _move(named, start, mean, square, taken, leaves.late, NEAR * total, training)
        places = next(batches)
        reader.accumulate(places, None)
        torch.nn.utils.clip_grad_norm_(named.values(), training.max_grad_norm or float("inf"))
        for name, leaf in named.items():
            gradient, leaf.grad = leaf.grad, None
            if gradient is None or (name in leaves.late and done < turn):
                continue
            mean[name] += gradient.sign() if training.optimizer == "sign" else gradient
            square[name] += gradient.square()
            taken[name] += 1
        draws += len(places)
        if progress is not None:
            progress(done + 1, wanted)
    _move(named, start, mean, square, taken, leaves.late, total, training)
    return Extrapolated(leaves.update(), draws, source.size)


@torch.no_grad()
def _move(
    leaves: Mapping[str, Tensor], start: Mapping[str, Tensor], mean: Mapping[str, Tensor], square: Mapping[str, Tensor],
    taken: Mapping[str, int], late: frozenset[str], length: float, training: Training,
) -> None:  # fmt: skip
    """Put the leaves at start - length * p(g), from sums over so many minibatches; where there were none they stay."""
    for name, leaf in leaves.items():
        if not taken[name]:
            continue
        p = mean[name] / taken[name]
        if (
            name in late and training.optimizer == "sgd"
        ):  # in proportion to how far the others are: half the way on average
            p = p * (0.5 / NEAR)
        if training.optimizer == "adamw":
            p = p / ((square[name] / taken[name]).sqrt() + training.epsilon) + training.weight_decay * start[name]
        leaf.copy_(start[name] - length * p)
