"""The lab's settings."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class LabConfig(BaseModel):
    """Everything that decides what the lab builds; equal settings build equal worlds on one machine.

    Sizes are counts of prompts (`*_prompts`), of sequences (`*_batch`) or of optimizer steps (`*_steps`). `wrong` is
    each domain's share of wrong answers in the SFT data, which keeps the base middling; `worked` and `exclaim` are the
    shares of the two style choices there (see `paper_repro.lab.domains`).

    The RL stages are `paper_repro.lab.reinforce`'s. `training_seed` decides them alone: their sampling, the order of their
    data, a LoRA adapter's first factors; None is `seed`. `rl_iterations` are the optimizer steps taken on each batch of
    rollouts; from the second on, importance weights leave 1 and are clipped. `lora_rank` None trains all weights, `lora_alpha`
    None is twice the rank. `keep_steps` are steps after which a stage also saves what it has (a domain trained for fewer
    leaves them out). DPO's pairs come from `pair_rollouts` responses per training prompt, `dpo_beta` is its inverse temperature.
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
    algorithm: Literal["grpo", "rloo", "dpo"] = "grpo"
    rl_iterations: int = Field(1, gt=0)
    dpo_beta: float = Field(0.1, gt=0)
    pair_rollouts: int = Field(16, gt=1)
    lora_rank: int | None = Field(None, gt=0)
    lora_alpha: int | None = Field(None, gt=0)
    training_seed: int | None = None
    keep_steps: tuple[int, ...] = ()

    @property
    def rl_seed(self) -> int:
        """The seed of the RL stages."""
        return self.seed if self.training_seed is None else self.training_seed

    @model_validator(mode="after")
    def _reached(self) -> LabConfig:
        longest = max(self.rl_steps.values(), default=0)
        outside = [step for step in self.keep_steps if not 1 <= step <= longest]
        if outside:
            raise ValueError(f"keep_steps {outside}: give steps from 1 to {longest}, the longest of rl_steps")
        return self


def quick(seed: int = 0, **changes: Any) -> LabConfig:
    """Settings for a world that is built in seconds and only has the right shape; interference is not promised."""
    small: dict[str, Any] = {
        "hidden": 64, "layers": 1, "train_prompts": 120, "heldout_prompts": 48, "sft_steps": 300, "sft_batch": 32,
        "sft_learning_rate": 5e-3, "wrong": dict.fromkeys(("math", "code", "qa", "writing"), 0.1),
        "rl_steps": dict.fromkeys(("math", "code", "qa", "writing"), 3), "rl_batch": 32, "rl_generations": 8,
        "rollouts": 8, "fresh_rollouts": 8,
    }  # fmt: skip
    return LabConfig(seed=seed, **{**small, **changes})
