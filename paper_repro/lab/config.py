"""The lab's settings."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class LabConfig(BaseModel):
    """Everything that decides what the lab builds; equal settings build equal worlds on one machine.

    Sizes are counts of prompts (`*_prompts`), of sequences (`*_batch`) or of optimizer steps (`*_steps`). `wrong` is
    each domain's share of wrong answers in the SFT data, which keeps the base middling; `worked` and `exclaim` are the
    shares of the two style choices there (see `paper_repro.lab.domains`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = 0
    family: str = "qwen3"
    hidden: int = 96
    layers: int = 3
    heads: int = 4
    train_prompts: int = Field(500, gt=0)
    heldout_prompts: int = Field(400, gt=0)
    wrong: dict[str, float] = {"math": 0.3, "code": 0.2, "qa": 0.3, "writing": 0.35}
    worked: dict[str, float] = {"math": 0.5, "code": 0.5, "qa": 0.5, "writing": 0.5}
    exclaim: dict[str, float] = {"math": 0.5, "code": 0.5, "qa": 0.5, "writing": 0.5}
    sft_steps: int = Field(450, gt=0)
    sft_batch: int = Field(128, gt=0)
    sft_learning_rate: float = 2e-3
    sft_responses: int = Field(16, gt=0)
    rl_steps: dict[str, int] = {"math": 60, "code": 45, "qa": 70, "writing": 75}
    rl_batch: int = Field(128, gt=0)
    rl_generations: int = Field(16, gt=1)
    rl_learning_rate: float = 3e-5
    rollouts: int = Field(8, gt=0)
    fresh_rollouts: int = Field(16, gt=0)
    max_new_tokens: int = Field(12, gt=0)


def quick(seed: int = 0, **changes: Any) -> LabConfig:
    """Settings for a world that is built in seconds and only has the right shape; interference is not promised."""
    small: dict[str, Any] = {
        "hidden": 64, "layers": 1, "train_prompts": 120, "heldout_prompts": 48, "sft_steps": 300, "sft_batch": 32,
        "sft_learning_rate": 5e-3, "wrong": dict.fromkeys(("math", "code", "qa", "writing"), 0.1),
        "rl_steps": dict.fromkeys(("math", "code", "qa", "writing"), 3), "rl_batch": 32, "rl_generations": 8,
        "rollouts": 8, "fresh_rollouts": 8,
    }  # fmt: skip
    return LabConfig(seed=seed, **{**small, **changes})
