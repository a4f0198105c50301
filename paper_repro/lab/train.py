"""SFT from scratch, and GRPO through TRL."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from interference.rollouts import Verifier
from paper_repro.lab.config import LabConfig
from paper_repro.lab.data import Row, sft_pairs

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


def grpo(
    config: LabConfig,
    model: Any,
    tokenizer: Any,
    rows: list[Row],
    *,
    reward: Verifier,
    steps: int,
    progress: Progress | None = None,
) -> list[float]:
    """Train the model in place with TRL's GRPOTrainer for `steps` on the prompts in `rows`; mean training reward per step.

    No KL term, advantages not scaled, rollouts from the full softmax at temperature 1, constant learning rate.
    """
    with _quiet(), tempfile.TemporaryDirectory(prefix="lab-grpo-") as folder:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        arguments = GRPOConfig(
            output_dir=folder, seed=config.seed, max_steps=steps,
            per_device_train_batch_size=config.rl_batch, num_generations=config.rl_generations,
            max_completion_length=config.max_new_tokens, learning_rate=config.rl_learning_rate,
            lr_scheduler_type="constant", adam_beta2=0.99, weight_decay=0.0, max_grad_norm=1.0, beta=0.0,
            temperature=1.0, top_p=1.0, top_k=0, scale_rewards="none", loss_type="dr_grpo", bf16=False, fp16=False,
            gradient_checkpointing=False, use_cpu=True, dataloader_pin_memory=False, save_strategy="no",
            report_to="none", logging_steps=1, disable_tqdm=True, log_level="error",
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=model, reward_funcs=reward, args=arguments,
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            callbacks=[_watcher(progress)] if progress is not None else None,
        )  # fmt: skip
        _mute_console(trainer)
        trainer.train()
        rewards = [float(entry["reward"]) for entry in trainer.state.log_history if "reward" in entry]
    model.eval()
    return rewards


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


def _watcher(progress: Progress) -> Any:
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress(state.global_step, state.max_steps)

    return Watcher()


def _mute_console(trainer: Any) -> None:
    """With its progress bar off, the Trainer prints every log entry; the lab draws its own progress."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep TRL and transformers from calling home and from chatting; restore what was set."""
    switches = {
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_DISABLED": "true",
        "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in switches}
    loggers = [logging.getLogger(name) for name in ("transformers", "trl", "accelerate", "datasets")]
    levels = [logger.level for logger in loggers]
    os.environ.update(switches)
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
