"""The optimizer of a training, in steps that may each stand for several of its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from interference.forecasting.training import Training


def strides(steps: int, coarse: int) -> list[int]:
    """`steps` divided into at most `coarse` runs of nearly equal length.

    >>> strides(7, 3), strides(2, 5)
    ([3, 2, 2], [1, 1])
    """
    coarse = max(1, min(coarse, steps))
    return [steps // coarse + (i < steps % coarse) for i in range(coarse)]


class Optimizer:
    """Moves leaves as the training's optimizer would.

    A step that stands for n of its own has their summed step size, and the moments' decay rates to the power n: the direction
    is taken to stay while it lasts.
    """

    def __init__(self, leaves: Mapping[str, Tensor], training: Training):
        self.leaves, self.training = list(leaves.values()), training
        self.inner: torch.optim.Optimizer
        if training.optimizer == "adamw":
            self.inner = torch.optim.AdamW(self.leaves, eps=training.epsilon, weight_decay=training.weight_decay)
        else:
            self.inner = torch.optim.SGD(self.leaves)
        self.rates, self.done = training.rates(), 0

    def step(self, stands_for: int = 1) -> float:
        """Clip the gradients and step; the gradient's norm before clipping."""
        t = self.training
        group = self.inner.param_groups[0]
        group["lr"] = sum(self.rates[self.done : self.done + stands_for])
        if t.optimizer == "adamw":
            group["betas"] = tuple(beta**stands_for for beta in t.betas)
        norm = float(torch.nn.utils.clip_grad_norm_(self.leaves, t.max_grad_norm or float("inf")))
        if t.optimizer == "sign":
            for leaf in self.leaves:
                if leaf.grad is not None:
                    leaf.grad.sign_()
        self.inner.step()
        self.inner.zero_grad()
        self.done += stands_for
        return norm
