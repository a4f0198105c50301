"""SFT from scratch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from paper_repro.lab.config import LabConfig
from paper_repro.lab.data import sft_pairs

Progress = Callable[[int, int], None]


def sft(config: LabConfig, model: Any, tokenizer: Any, progress: Progress | None = None) -> float:
    """Train the model in place on the lab's SFT pairs; the last steps' mean loss in nats per response token."""
    encoded = [
        (tokenizer(prompt)["input_ids"], [*tokenizer(response)["input_ids"], tokenizer.eos_token_id])
        for prompt, response in sft_pairs(config)
    ]
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.sft_learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.sft_learning_rate, total_steps=config.sft_steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    order: list[int] = []
    losses: list[float] = []
    for step in range(config.sft_steps):
        if len(order) < config.sft_batch:
            order = torch.randperm(len(encoded), generator=generator).tolist()
        batch, order = order[: config.sft_batch], order[config.sft_batch :]
        ids, labels = _pad([encoded[i] for i in batch], tokenizer.pad_token_id)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        if config.sft_mean == "sequence":
            loss = _mean_over_sequences(logits, labels[:, 1:])
        else:
            loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if progress is not None:
            progress(step + 1, config.sft_steps)
    model.eval()
    tail = losses[-20:]
    return sum(tail) / len(tail)


def _pad(batch: list[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids, and labels that are -100 on prompts and padding. Causality hides the padding from the rest."""
    width = max(len(prompt) + len(response) for prompt, response in batch)
    ids = torch.full((len(batch), width), pad)
    labels = torch.full((len(batch), width), -100)
    for row, (prompt, response) in enumerate(batch):
        start, stop = len(prompt), len(prompt) + len(response)
        ids[row, :stop] = torch.tensor(prompt + response)
        labels[row, start:stop] = torch.tensor(response)
    return ids, labels


def _mean_over_sequences(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over sequences of each one's mean loss per response token."""
    losses = cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return (losses.sum(1) / (labels != -100).sum(1)).mean()
