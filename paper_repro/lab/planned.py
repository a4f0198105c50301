"""A lab's RL stages in the words of `interference.forecasting`: what a forecast of them is told."""

from __future__ import annotations

from interference.forecasting.training import Adapter, Training
from paper_repro.lab.config import LabConfig


def planned(config: LabConfig, steps: int) -> Training:
    """The training of so many steps by the lab's algorithm (`paper_repro.lab.reinforce`)."""
    pairs = config.rl_batch // 2 if config.algorithm == "dpo" else config.rl_batch
    adapter = None
    if config.lora_rank is not None:
        alpha = config.lora_alpha if config.lora_alpha is not None else 2 * config.lora_rank
        adapter = Adapter(rank=config.lora_rank, alpha=alpha)
    return Training(
        algorithm=config.algorithm, learning_rate=config.rl_learning_rate, steps=steps, betas=(0.9, 0.99),
        prompts_per_step=max(1, pairs // config.rl_generations), generations=config.rl_generations,
        scale_rewards="none", loss="sequence" if config.algorithm == "rloo" else "dr_grpo",
        max_response_tokens=config.max_new_tokens, dpo_beta=config.dpo_beta, adapter=adapter,
    )  # fmt: skip
