"""Stages with the real thing: the base, its rollouts, the trainings, and what fresh rollouts measure of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from interference import records, statistics
from paper_repro.forecast_study.work import Work
from paper_repro.lab.build import build
from paper_repro.lab.data import Row, rollout_rows
from paper_repro.lab.files import load, read_rows, write_rows
from paper_repro.lab.training import make_pairs, train

Array = NDArray[np.float64]


def silent(done: int, total: int) -> None:
    """No progress."""


def make_base(work: Work) -> None:
    """The lab's data and base."""

    def make() -> Mapping[str, Any]:
        build(work.lab, work.setup.config, only=("data", "base"))
        found = records.read_json(work.lab / "stages" / "base.json")
        return {key: found[key] for key in ("loss", "parameters", "vocabulary")}

    work.stage("base", make)


def sample_base(work: Work, domain: str) -> None:
    """The base's rollouts of a domain: on training prompts for forecasts, on held-out prompts for their evaluation."""
    config, data = work.setup.config, work.lab / "data"

    def on(heldout: bool, samples: int) -> list[Row]:
        model, tokenizer = load(work.lab / "base")
        seed = work.seed(f"{'evaluation' if heldout else 'forecast'} {domain}")
        return rollout_rows(config, domain, model, tokenizer, seed=seed, samples=samples, heldout=heldout)

    def for_forecasts() -> Mapping[str, Any]:
        if config.algorithm == "dpo":
            make_pairs(work.lab, config, domain, work.seed(f"pairs {domain}"), silent)
            rows = _both_sides(read_rows(data / f"{domain}_pairs.jsonl"))
        else:
            rows = on(False, work.setup.rollouts)
        write_rows(data / f"{domain}_forecast.jsonl", rows)
        return _summary(rows)

    def for_evaluation() -> Mapping[str, Any]:
        rows = on(True, work.setup.evaluation)
        write_rows(data / f"{domain}_evaluation.jsonl", rows)
        return _summary(rows)

    work.stage(f"rollouts_forecast_{domain}", for_forecasts)
    work.stage(f"rollouts_evaluation_{domain}", for_evaluation)


def _both_sides(pairs: list[Row]) -> list[Row]:
    """Both responses of every pair as rollouts: what DPO will see is what its forecast is made from."""
    keys = ("prompt", "prompt_id", "prompt_token_ids")
    return [
        {
            **{key: pair[key] for key in keys},
            "response": pair[side],
            "response_token_ids": pair[f"{side}_token_ids"],
            "reward": pair[f"{side}_reward"],
        }
        for pair in pairs
        for side in ("chosen", "rejected")
    ]


def _summary(rows: list[Row]) -> Mapping[str, Any]:
    tokens = [len(row["response_token_ids"]) for row in rows]
    return {
        "rows": len(rows),
        "reward": float(np.mean([row["reward"] for row in rows])),
        "tokens": float(np.mean(tokens)),
    }


def train_domain(work: Work, training_seed: int, domain: str) -> None:
    """One real training, with all the checkpoints that lengths and pilots need."""

    def make() -> Mapping[str, Any]:
        folder = training_folder(work, f"seed{training_seed}", work.lab / "base")
        return train(folder, work.setup.lab(training_seed), domain, silent)

    work.stage(f"train_{training_seed}_{domain}", make)


def training_folder(work: Work, name: str, base: Path) -> Path:
    """A folder for `train`, with links to the model that it begins with and to the lab's data."""
    folder = work.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    for shared, target in (("base", base), ("data", work.lab / "data")):  # adapters name their base as ../base
        link = folder / shared
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(target, folder))
    return folder


def measure_model(work: Work, training_seed: int | None, update: str, length: int) -> None:
    """`measure` of a trained model, or of the base (None)."""
    path = work.lab / "base" if training_seed is None else work.trained(training_seed, update, length)
    measure(work, measured_name(training_seed, update, length), path)


def measure(work: Work, stage: str, path: Path) -> None:
    """`measure_loaded` of the model in a folder."""
    measure_loaded(work, stage, lambda: load(path))


def measure_loaded(work: Work, stage: str, opened: Callable[[], tuple[Any, Any]]) -> None:
    """Rewards of a model (with its tokenizer) on every domain's held-out prompts, by fresh rollouts.

    All models see the same random numbers on a domain, so that their differences are less noisy than their values.
    """

    def make() -> Mapping[str, Any]:
        model, tokenizer = opened()
        found: dict[str, Any] = {"rewards": {}, "tokens": {}}
        for domain in work.setup.domains:
            rows = rollout_rows(
                work.setup.config, domain, model, tokenizer, seed=work.seed(f"measure {domain}"),
                samples=work.setup.samples,
            )  # fmt: skip
            rewards = np.array([row["reward"] for row in rows]).reshape(-1, work.setup.samples)
            found["rewards"][domain] = rewards.tolist()
            found["tokens"][domain] = float(np.mean([len(row["response_token_ids"]) for row in rows]))
            found.setdefault("prompt_ids", {})[domain] = [row["prompt_id"] for row in rows[:: work.setup.samples]]
        return found

    work.stage(stage, make)


def measured_name(training_seed: int | None, update: str, length: int) -> str:
    return "measure_base" if training_seed is None else f"measure_{training_seed}_{length}_{update}"


@dataclass(frozen=True)
class Measured:
    """A measured change of mean reward: its value, stderr over prompts, bootstrap replicates; the base's reward."""

    delta: float
    stderr: float
    replicates: Array
    base: float


def measured(work: Work, training_seed: int, update: str, domain: str, length: int) -> Measured:
    """The change of a domain's reward under a training, prompts paired."""
    return change(work, measured_name(training_seed, update, length), domain)


def change(work: Work, stage: str, domain: str) -> Measured:
    """The change of a domain's reward from the base to the model of a `measure` stage, prompts paired."""
    before, ids = _rewards(work.folder / "records" / f"{measured_name(None, '', 0)}.json", domain)
    after, _ = _rewards(work.folder / "records" / f"{stage}.json", domain)
    difference = after.mean(1) - before.mean(1)
    replicates = statistics.ratio_replicates(difference, np.ones_like(difference), ids)
    return Measured(float(difference.mean()), float(statistics.stderr(replicates)), replicates, float(before.mean()))


@lru_cache(maxsize=512)
def _rewards(path: Path, domain: str) -> tuple[Array, tuple[str, ...]]:
    record = records.read_json(path)
    return np.array(record["rewards"][domain]), tuple(record["prompt_ids"][domain])
