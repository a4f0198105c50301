"""The lab's settings."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

WorldName = Literal["lpt", "m2rl"]
# What other settings a world has unless they are given.
OF_WORLD: dict[str, dict[str, Any]] = {
    "lpt": {},
    "m2rl": {
        "layers": 4,
        "train_prompts": 900,
        "heldout_prompts": 256,
        "wrong": {"math": 0.3, "coding": 0.3, "science": 0.3, "instruction": 0.4},
        "worked": {},
        "exclaim": {},
        "sft_steps": 1500,
        "sft_batch": 64,
        "sft_learning_rate": 1.5e-3,
        "sft_responses": 12,
        "sft_mean": "sequence",
        "rl_steps": {"math": 60, "coding": 45, "science": 45, "instruction": 45},
        "rl_learning_rate": 6e-5,
        "multi": True,
        "multi_steps": 180,
        "judge_share": 0.45,
    },
}


class LabConfig(BaseModel):
    """Everything that decides what the lab builds; equal settings build equal worlds on one machine.

    Sizes are counts of prompts (`*_prompts`), of sequences (`*_batch`) or of optimizer steps (`*_steps`). `wrong` is
    each domain's share of wrong answers in the SFT data, which keeps the base middling. `sft_mean`: over what SFT's loss is
    a mean; over sequences, short answers (a verdict) weigh as much as long ones. Unless given, settings have the
    values that suit the world.

    World "lpt" alone: `worked` and `exclaim` are the shares of the two style choices (see `paper_repro.lab.domains`).
    World "m2rl" alone (see `paper_repro.lab.m2rl`): `steps` is the mean number of reasoning steps of math and coding, each
    of about six tokens; `judge_share` the share of the SFT pairs that are questions to a judge; `planted` the number of
    responses with a planted error per domain. `multi`: also train one model on all domains (for `multi_steps`; twice the
    mean of `rl_steps` unless given), and merge the single-domain ones.

    The RL stages are `paper_repro.lab.reinforce`'s. `training_seed` decides them alone: their sampling, the order of their
    data, a LoRA adapter's first factors; None is `seed`. `rl_iterations` are the optimizer steps taken on each batch of
    rollouts; from the second on, importance weights leave 1 and are clipped. `lora_rank` None trains all weights, `lora_alpha`
    None is twice the rank. `keep_steps` are steps after which a stage also saves what it has (a domain trained for fewer
    leaves them out). DPO's pairs come from `pair_rollouts` responses per training prompt, `dpo_beta` is its inverse
    temperature, `dpo_sft` the weight of the chosen responses' mean loss per token beside it (RPO, Pang et al. 2024).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    world: WorldName = "lpt"
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
    steps: float = Field(2.5, ge=1)
    judge_share: float = Field(0.0, ge=0, lt=1)
    planted: int = Field(100, ge=0)
    sft_steps: int = Field(450, gt=0)
    sft_batch: int = Field(128, gt=0)
    sft_learning_rate: float = 2e-3
    sft_responses: int = Field(16, gt=0)
    sft_mean: Literal["token", "sequence"] = "token"
    rl_steps: dict[str, int] = {"math": 60, "code": 45, "qa": 70, "writing": 75}
    rl_batch: int = Field(128, gt=0)
    rl_generations: int = Field(16, gt=1)
    rl_learning_rate: float = 3e-5
    multi: bool = False
    multi_steps: int | None = Field(None, gt=0)
    rollouts: int = Field(8, gt=0)
    fresh_rollouts: int = Field(16, gt=0)
    max_new_tokens: int = Field(12, gt=0)
    algorithm: Literal["grpo", "rloo", "dpo"] = "grpo"
    rl_iterations: int = Field(1, gt=0)
    dpo_beta: float = Field(0.1, gt=0)
    dpo_sft: float = Field(0.0, ge=0)
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
        longest = max([*self.rl_steps.values(), *([self.mixed_steps] if self.multi else [])])
        outside = [step for step in self.keep_steps if not 1 <= step <= longest]
        if outside:
            raise ValueError(f"keep_steps {outside}: give steps from 1 to {longest}, the longest training")
        return self

    @model_validator(mode="before")
    @classmethod
    def _of_world(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        world, steps = given.get("world", "lpt"), given.get("steps", cls.model_fields["steps"].default)
        suited = dict(OF_WORLD.get(world, {})) if isinstance(world, str) else {}
        if world == "m2rl" and isinstance(steps, (int, float)):
            # Opening, six tokens a step, an answer of five, the end; two to spare for what a model adds.
            suited["max_new_tokens"] = 9 + 6 * math.ceil(steps)
        return suited | given

    @property
    def mixed_steps(self) -> int:
        """Optimizer steps of the model that is trained on all domains."""
        return self.multi_steps or max(1, round(2 * sum(self.rl_steps.values()) / len(self.rl_steps)))


def quick(seed: int = 0, world: WorldName = "lpt", **changes: Any) -> LabConfig:
    """Settings for a world that is built in seconds and only has the right shape; interference is not promised."""
    of_world = LabConfig(world=world)
    small: dict[str, Any] = {
        "hidden": 64, "layers": 1, "train_prompts": 120, "heldout_prompts": 48, "sft_steps": 300, "sft_batch": 32,
        "sft_learning_rate": 5e-3, "wrong": dict.fromkeys(of_world.wrong, 0.1),
        "rl_steps": dict.fromkeys(of_world.rl_steps, 3), "rl_batch": 32, "rl_generations": 8,
        "rollouts": 8, "fresh_rollouts": 8, "multi_steps": 6 if world == "m2rl" else None,
    }  # fmt: skip
    return LabConfig(seed=seed, world=world, **{**small, **changes})
