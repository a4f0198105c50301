"""GRPO, RLOO and DPO through TRL, on all weights or on a LoRA adapter.

All share Adam (betas .9 and .99) at a constant learning rate without weight decay, gradients cut to norm 1, and no KL term
beside the one that DPO's loss is made of. With one optimizer step per batch (`rl_iterations` 1) the two that sample are
on-policy: every importance weight is 1 and no clipping acts. With G responses per prompt, rewards r and sequence
log-probabilities log p(y), a step then ascends

    GRPO (Dr. GRPO):  sum_i (r_i - mean r) log p(y_i) / (batch * max_new_tokens)
    RLOO:             mean_i (r_i - mean_{j != i} r_j) log p(y_i)
    DPO:              mean   log sigmoid(beta * [log p(y+) / p_base(y+) - log p(y-) / p_base(y-)])

so the first two have one direction and differ by a factor, G / (G - 1) * max_new_tokens, which Adam takes out: what is left
between them is that RLOO's larger norm is cut at most steps. With more iterations they part: GRPO weighs and clips tokens,
RLOO whole responses.
Sources: Shao et al. 2024, Liu et al. 2025 (Dr. GRPO); Ahmadian et al. 2024; Rafailov et al. 2023; Hu et al. 2021.
"""

from __future__ import annotations

import copy
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from interference.rollouts import Verifier
from paper_repro.lab.config import LabConfig
from paper_repro.lab.data import Row

Progress = Callable[[int, int], None]
Keep = Callable[[int, Any], None]  # (steps done, model), at the steps of `keep_steps`
_CURVES = {  # what TRL logs at every step -> its name in a stage's record
    "reward": "training_rewards",
    "loss": "training_losses",
    "rewards/accuracies": "training_accuracies",
    "grad_norm": "gradient_norms",
}


@dataclass(frozen=True)
class Trained:
    """A finished training.

    model : what was given, trained in place, or with `lora_rank` the PeftModel around it.
    curves : one number per step: `training_rewards` (mean reward of the step's rollouts) or, for DPO, `training_accuracies`
    (share of pairs whose margin has the right sign), and `training_losses`, `gradient_norms` (before they are cut to 1).
    seconds, cpu_seconds : wall and processor time of the steps alone, without what `keep` took.
    """

    model: Any
    curves: Mapping[str, list[float]]
    seconds: float
    cpu_seconds: float


def grpo(
    config: LabConfig,
    model: Any,
    tokenizer: Any,
    rows: list[Row],
    *,
    reward: Verifier,
    steps: int,
    progress: Progress | None = None,
    keep: Keep | None = None,
) -> Trained:
    """Train for `steps` with TRL's GRPOTrainer on the prompts in `rows`, advantages not scaled."""

    def make(shared: dict[str, Any]) -> Any:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        arguments = GRPOConfig(**shared, **_sampling(config), scale_rewards="none", loss_type="dr_grpo")
        return GRPOTrainer(
            model=model, reward_funcs=reward, args=arguments, train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer, peft_config=_lora(config),
        )  # fmt: skip

    return _fit(make, config, steps, progress, keep)


def rloo(
    config: LabConfig,
    model: Any,
    tokenizer: Any,
    rows: list[Row],
    *,
    reward: Verifier,
    steps: int,
    progress: Progress | None = None,
    keep: Keep | None = None,
) -> Trained:
    """Train for `steps` with TRL's RLOOTrainer on the prompts in `rows`, advantages not scaled."""

    def make(shared: dict[str, Any]) -> Any:
        from datasets import Dataset
        from trl import RLOOConfig, RLOOTrainer

        arguments = RLOOConfig(**shared, **_sampling(config), normalize_advantages=False)
        return RLOOTrainer(
            model=model, reward_funcs=reward, args=arguments, train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer, peft_config=_lora(config),
        )  # fmt: skip

    return _fit(make, config, steps, progress, keep)


def dpo(
    config: LabConfig,
    model: Any,
    tokenizer: Any,
    rows: list[Row],
    *,
    reward: Verifier,
    steps: int,
    progress: Progress | None = None,
    keep: Keep | None = None,
) -> Trained:
    """Train for `steps` with TRL's DPOTrainer on the pairs in `rows` (`pairs.preference_pairs`), `rl_batch` / 2 a step.

    Offline: `reward` was asked when the pairs were made, and is not asked again. The model as given is the reference.
    """

    def make(shared: dict[str, Any]) -> Any:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        class Exact(DPOTrainer):
            """Takes the pairs' sampled token ids as they are, where TRL would tokenize text and end every response."""

            def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
                return dataset

        arguments = DPOConfig(
            **shared, per_device_train_batch_size=max(1, config.rl_batch // 2), beta=config.dpo_beta, max_length=None,
            loss_type=["sigmoid", "sft"] if config.dpo_sft else ["sigmoid"],
            loss_weights=[1.0, config.dpo_sft] if config.dpo_sft else None,
        )  # fmt: skip
        data = [{f"{part}_ids": row[f"{part}_token_ids"] for part in ("prompt", "chosen", "rejected")} for row in rows]
        return Exact(  # an adapter's reference is the model with the adapter switched off
            model=model, ref_model=None if config.lora_rank else copy.deepcopy(model), args=arguments,
            train_dataset=Dataset.from_list(data), processing_class=tokenizer, peft_config=_lora(config),
        )  # fmt: skip

    return _fit(make, config, steps, progress, keep)


ALGORITHMS: dict[str, Callable[..., Trained]] = {"grpo": grpo, "rloo": rloo, "dpo": dpo}


def _fit(
    make: Callable[[dict[str, Any]], Any],
    config: LabConfig,
    steps: int,
    progress: Progress | None,
    keep: Keep | None,
) -> Trained:
    """Make the trainer from the arguments that all algorithms share, and run it."""
    with _quiet(), tempfile.TemporaryDirectory(prefix="lab-rl-") as folder:
        shared: dict[str, Any] = {
            "output_dir": folder, "seed": config.rl_seed, "max_steps": steps, "learning_rate": config.rl_learning_rate,
            "lr_scheduler_type": "constant", "adam_beta2": 0.99, "weight_decay": 0.0, "max_grad_norm": 1.0,
            "bf16": False, "fp16": False, "gradient_checkpointing": False, "use_cpu": True,
            "dataloader_pin_memory": False, "save_strategy": "no", "report_to": "none", "logging_steps": 1,
            "disable_tqdm": True, "log_level": "error",
        }  # fmt: skip
        trainer = make(shared)
        spent: list[tuple[float, float]] = []
        trainer.add_callback(_watcher(config.keep_steps, progress, keep, spent))
        _mute_console(trainer)
        started = time.perf_counter(), time.process_time()
        trainer.train()
        seconds = time.perf_counter() - started[0] - sum(wall for wall, _ in spent)
        cpu_seconds = time.process_time() - started[1] - sum(cpu for _, cpu in spent)
        history = trainer.state.log_history
    trainer.model.eval()
    curves = {name: [float(entry[key]) for entry in history if key in entry] for key, name in _CURVES.items()}
    return Trained(trainer.model, {name: curve for name, curve in curves.items() if curve}, seconds, cpu_seconds)


def _sampling(config: LabConfig) -> dict[str, Any]:
    """Arguments of the algorithms that sample: responses from the full softmax at temperature 1, no KL term."""
    return {
        "per_device_train_batch_size": config.rl_batch, "num_generations": config.rl_generations,
        "max_completion_length": config.max_new_tokens, "num_iterations": config.rl_iterations, "beta": 0.0,
        "temperature": 1.0, "top_p": 1.0, "top_k": 0,
    }  # fmt: skip


def _lora(config: LabConfig) -> Any:
    """PEFT's settings for an adapter on every linear layer but the head; None for training of all weights."""
    if config.lora_rank is None:
        return None
    from peft import LoraConfig

    alpha = config.lora_alpha if config.lora_alpha is not None else 2 * config.lora_rank
    return LoraConfig(
        r=config.lora_rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def _watcher(
    keep_steps: tuple[int, ...], progress: Progress | None, keep: Keep | None, spent: list[tuple[float, float]]
) -> Any:
    """A callback that reports every step and hands the model to `keep`; the seconds (wall, cpu) of that go to `spent`."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
            if progress is not None:
                progress(state.global_step, state.max_steps)
            if keep is not None and state.global_step in keep_steps:
                started = time.perf_counter(), time.process_time()
                keep(state.global_step, model)
                spent.append((time.perf_counter() - started[0], time.process_time() - started[1]))

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
