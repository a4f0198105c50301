"""The optimizer's steps against torch.optim, its schedules against transformers', and its strides against single steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tabular import training
from torch import Tensor
from transformers import get_scheduler

from interference.forecasting.optimizer import Optimizer, strides


def gradients(steps: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(s, generator=generator, dtype=torch.float64) for s in ((4, 3), (5,))] for _ in range(steps)]


def leaves() -> dict[str, Tensor]:
    return {n: torch.ones(s, dtype=torch.float64, requires_grad=True) for n, s in (("a", (4, 3)), ("b", (5,)))}


def run(ours: dict[str, Tensor], settings: dict[str, Any], grads: list[list[Tensor]], stride: int = 1) -> Optimizer:
    optimizer = Optimizer(ours, training(**settings))
    for given in grads:
        for leaf, gradient in zip(ours.values(), given, strict=True):
            leaf.grad = gradient.clone()
        optimizer.step(stride)
    return optimizer


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("kind", ["adamw", "sgd", "sign"])
def test_single_steps_are_torch_s(kind: str, clip: float | None, schedule: str) -> None:
    """Under transformers' schedule with warm-up."""
    settings: dict[str, Any] = {
        "optimizer": kind, "learning_rate": 0.1, "steps": 12, "warmup_steps": 3, "schedule": schedule, "max_grad_norm": clip,
        "betas": (0.8, 0.95), "epsilon": 1e-6, "weight_decay": 0.1,
    }  # fmt: skip
    ours, theirs = leaves(), leaves()
    run(ours, settings, gradients(12))
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    inner = (
        torch.optim.AdamW(theirs.values(), **options) if kind == "adamw" else torch.optim.SGD(theirs.values(), lr=0.1)
    )
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, inner, num_warmup_steps=3, num_training_steps=12)
    for given in gradients(12):
        for leaf, gradient in zip(theirs.values(), given, strict=True):
            leaf.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_(theirs.values(), clip or float("inf"))
        if kind == "sign":
            for leaf in theirs.values():
                leaf.grad = torch.sign(leaf.grad)
        inner.step()
        scheduler.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", ["adamw", "sgd", "sign"])
@pytest.mark.parametrize("stride", [2, 5])
def test_a_stride_is_its_steps_while_the_gradient_stays(kind: str, stride: int) -> None:
    """Adam's normalised moments of a constant gradient are the gradient and its square, whatever the decay rates."""
    settings = {"optimizer": kind, "learning_rate": 0.1, "steps": 10, "schedule": "linear", "max_grad_norm": 0.5}
    fine, coarse = leaves(), leaves()
    run(fine, settings, gradients(1) * 10)
    run(coarse, settings, gradients(1) * (10 // stride), stride)
    for name in fine:
        torch.testing.assert_close(fine[name], coarse[name], rtol=1e-6, atol=1e-7)


def test_moments_decay_as_many_steps_as_a_stride_stands_for() -> None:
    """After a gradient g and then nothing: m = b1^n (1 - b1^n) g and v alike, over 1 - b^2n. Written out."""
    settings: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 1.0, "steps": 6, "betas": (0.8, 0.9)}
    one = {"a": torch.zeros(1, dtype=torch.float64, requires_grad=True)}
    run(one, settings, [[torch.full((1,), 2.0, dtype=torch.float64)], [torch.zeros(1, dtype=torch.float64)]], 3)
    b1, b2 = 0.8**3, 0.9**3
    m, v = b1 * (1 - b1) * 2 / (1 - b1**2), b2 * (1 - b2) * 4 / (1 - b2**2)
    torch.testing.assert_close(one["a"].item(), -3.0 - 3.0 * m / (v**0.5 + 1e-8))


def test_norm_is_the_one_before_clipping() -> None:
    ours = leaves()
    optimizer = Optimizer(ours, training(max_grad_norm=0.1))
    given = gradients(1)[0]
    for leaf, gradient in zip(ours.values(), given, strict=True):
        leaf.grad = gradient.clone()
    before = [leaf.detach().clone() for leaf in ours.values()]
    norm = optimizer.step()
    expected = float(torch.cat([g.reshape(-1) for g in given]).norm())
    assert norm == pytest.approx(expected, rel=1e-12)
    travelled = torch.cat(
        [(leaf.detach() - b).reshape(-1) for leaf, b in zip(ours.values(), before, strict=True)]
    ).norm()
    assert float(travelled) == pytest.approx(0.5 * 0.1, rel=1e-5)


@pytest.mark.parametrize(("steps", "coarse"), [(7, 3), (5, 5), (3, 9), (100, 7)])
def test_strides_cover_the_steps(steps: int, coarse: int) -> None:
    found = strides(steps, coarse)
    assert sum(found) == steps
    assert len(found) == min(steps, coarse)
    assert np.ptp(found) <= 1


def test_warmup_ends_before_training_does() -> None:
    with pytest.raises(ValidationError, match="warmup_steps"):
        training(steps=5, warmup_steps=5)
