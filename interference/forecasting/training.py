"""How the training would go that is forecast: algorithm, optimizer, length. Names and defaults are TRL's where it has them."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from interference.config import Strict

Algorithm = Literal["grpo", "rloo", "dpo"]


class Adapter(Strict):
    """LoRA: W + alpha / rank * B A on every linear map outside the head, A drawn as PEFT draws it, B zero at the start.

    seed: of A. Both estimates of an update share it: their difference is then the noise of their data, not of A.
    """

    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    seed: int = 0


class Training(Strict):
    """An RL run that has not been made.

    algorithm: "grpo" or "rloo" (one optimizer step per batch of rollouts, so that ratios are never clipped), or "dpo" on pairs
        of the base's own rollouts.
    optimizer: "adamw" (decoupled weight decay), "sgd" or "sign" (sign of each minibatch's gradient).
    learning_rate, steps, schedule, warmup_steps: the step size after warm-up, the number of optimizer steps, and whether the
        step size stays, falls linearly or as a cosine.
    prompts_per_step, generations: prompts of a batch and responses to each. For dpo a step takes
        `prompts_per_step * generations` pairs.
    scale_rewards: what advantages are divided by: nothing, the standard deviation of a prompt's rewards, or of the batch's.
    loss: how a response's tokens are weighed: "dr_grpo" (all alike, a constant in front), "grpo" (mean over each response),
        "dapo" (mean over the batch's tokens), "sequence" (their sum).
    max_response_tokens: the constant of "dr_grpo", which matters only to the clipping of gradients.
    kl_beta: weight of the KL penalty to the base, taken into the reward.  dpo_beta: dpo's beta.
    """

    algorithm: Algorithm = "grpo"
    optimizer: Literal["adamw", "sgd", "sign"] = "adamw"
    learning_rate: float = Field(gt=0)
    steps: int = Field(ge=1)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    epsilon: float = Field(1e-8, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float | None = Field(1.0, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    prompts_per_step: int = Field(8, ge=1)
    generations: int = Field(8, ge=2)
    scale_rewards: Literal["none", "group", "batch"] = "group"
    loss: Literal["dr_grpo", "grpo", "dapo", "sequence"] = "dapo"
    max_response_tokens: int = Field(256, ge=1)
    kl_beta: float = Field(0.0, ge=0)
    dpo_beta: float = Field(0.1, gt=0)
    adapter: Adapter | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        if self.warmup_steps >= self.steps and self.warmup_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps}: fewer than the {self.steps} steps are expected")
        return self

    @property
    def rollouts_per_step(self) -> int:
        """Responses (dpo: pairs) that one step takes."""
        return self.prompts_per_step * self.generations

    def rates(self) -> list[float]:
        """The step size of every optimizer step.

        >>> Training(learning_rate=1.0, steps=4, schedule="linear").rates()
        [1.0, 0.75, 0.5, 0.25]
        """
        return [self.learning_rate * self._share(step) for step in range(self.steps)]

    def _share(self, step: int) -> float:
        if step < self.warmup_steps:
            return step / self.warmup_steps
        done = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[self.schedule]
