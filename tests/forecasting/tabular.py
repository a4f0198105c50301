"""A policy that can be enumerated: the next token's logits depend on the last token alone, and are the weights themselves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from interference.domain import Domain, Sequence
from interference.forecasting.training import Training
from interference.model import Model, prepare

TOKENS = 3
Reward = Callable[[tuple[int, ...]], float]


class Table(nn.Module):
    """weight (contexts, TOKENS): logits after a token. Tokens from TOKENS on are prompts and never generated."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.weight[input_ids])


def model(counts: Tensor | None = None, prompts: int = 2) -> Model:
    """A policy whose probabilities are `counts` / sum, (TOKENS + prompts, TOKENS); uniform unless given."""
    start = torch.ones(TOKENS + prompts, TOKENS) if counts is None else counts
    return prepare(Table(start.double().log()))


def everything(length: int = 2) -> list[tuple[int, ...]]:
    """All responses."""
    return list(itertools.product(range(TOKENS), repeat=length))


def domain(
    reward: Reward, counts: Tensor | None = None, prompts: Iterable[int] = (3, 4), length: int = 2, name: str = "d"
) -> Domain:
    """Every response to every prompt, as often as `counts` say: rollouts without sampling noise."""
    rows = []
    for prompt in prompts:
        for response in everything(length):
            times = 1
            for before, after in zip((prompt, *response), response, strict=False):
                times *= 1 if counts is None else int(counts[before, after])
            rows += [Sequence((prompt,), response, f"{name}-{prompt}", reward(response))] * times
    return Domain(name, tuple(rows))


def log_probability(weight: Tensor, prompt: int, response: tuple[int, ...]) -> Tensor:
    """log pi(response | prompt), differentiable in the weights."""
    table = weight.log_softmax(-1)
    return torch.stack([table[a, b] for a, b in zip((prompt, *response), response, strict=False)]).sum()


def value(weight: Tensor, reward: Reward, prompts: Iterable[int] = (3, 4), length: int = 2) -> Tensor:
    """The expected reward, by enumeration."""
    found = [log_probability(weight, p, y).exp() * reward(y) for p in prompts for y in everything(length)]
    return torch.stack(found).sum() / len(list(prompts))


def training(**changes: Any) -> Training:
    """Plain policy gradient on everything at once: nothing scaled, nothing clipped."""
    settings: dict[str, Any] = {
        "algorithm": "rloo", "optimizer": "sgd", "learning_rate": 0.5, "steps": 8, "scale_rewards": "none",
        "loss": "sequence", "max_grad_norm": None, "prompts_per_step": 100, "generations": 100,
    }  # fmt: skip
    return Training(**settings | changes)
