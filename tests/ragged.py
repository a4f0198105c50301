"""Ragged rollouts, and the log-probability of every sequence by itself: the oracle of whatever puts sequences together."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from interference.domain import Domain, Sequence
from interference.model import Model


def ragged(seed: int = 0, prompts: int = 5, vocabulary: int = 20) -> Domain:
    """Long and short prompts and responses, duplicates, one-token responses, shared beginnings, and a response alone."""
    rng = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.integers(3, vocabulary, rng.integers(low, high)).tolist())

    rows = []
    for p in range(prompts):
        prompt = tokens(4, 16)
        answers = [tokens(1, 6) for _ in range(5)]
        answers += [answers[0], answers[1][:1], (*answers[2], 5), (*answers[2], 6)]
        rows += [Sequence(prompt, a, str(p), float(rng.integers(0, 3))) for a in answers]
    rows.append(Sequence(tokens(3, 5), tokens(20, 21), "alone", 1.0))
    return Domain("d", tuple(rows))


def alone(model: Model, domain: Domain) -> Tensor:
    """(S,) every sequence by itself in the module's own forward pass, differentiable."""
    out = []
    for s in domain.sequences:
        logits = model.module(torch.tensor([s.prompt + s.response])).logits[0, len(s.prompt) - 1 : -1]
        out.append(logits.log_softmax(-1)[range(len(s.response)), list(s.response)].sum())
    return torch.stack(out)
