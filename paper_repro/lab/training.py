"""The lab's RL stages: preference pairs, and a model trained on one domain, on several or on all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from interference.rollouts import Verifier, load_verifier
from paper_repro.lab.config import LabConfig
from paper_repro.lab.data import mixed_rows, prompt_rows
from paper_repro.lab.files import load, read_rows, save, write_rows
from paper_repro.lab.pairs import preference_pairs
from paper_repro.lab.reinforce import ALGORITHMS
from paper_repro.lab.worlds import world_of

Progress = Callable[[int, int], None]
MULTI = "multi"
AND = "+"
"""Between the names of domains that are trained on together."""


def make_pairs(path: Path, config: LabConfig, domain: str, seed: int, progress: Progress) -> Mapping[str, Any]:
    """Write data/<domain>_pairs.jsonl from the base's rollouts of the domain's training prompts; the stage's record."""
    model, tokenizer = load(path / "base")
    rows, reward = prompt_rows(config, domain, heldout=False), load_verifier(world_of(config).verifier(domain))
    pairs = preference_pairs(config, model, tokenizer, rows, reward=reward, seed=seed, progress=progress)
    write_rows(_pairs_file(path, domain), pairs)
    return {"rows": len(pairs), "prompts": len({pair["prompt_id"] for pair in pairs})}


def train(path: Path, config: LabConfig, name: str, progress: Progress) -> Mapping[str, Any]:
    """Train the base by `algorithm` on a domain, on several ("math+code"), or on all ("multi"); the stage's record.

    Writes rl_<name>/, and rl_<name>_step<k>/ for those of `keep_steps` that the training reaches.
    """
    model, tokenizer = load(path / "base")
    domains, reward, steps = _task(config, name)
    if config.algorithm == "dpo":
        rows = [pair for domain in domains for pair in read_rows(_pairs_file(path, domain))]
    else:
        rows = mixed_rows(config, domains) if len(domains) > 1 else prompt_rows(config, name, heldout=False)
    kept: list[int] = []

    def keep(step: int, trained: Any) -> None:
        save(path / f"rl_{name}_step{step}", trained, tokenizer)
        kept.append(step)

    trained = ALGORITHMS[config.algorithm](
        config, model, tokenizer, rows, reward=reward, steps=steps, progress=progress, keep=keep
    )
    save(path / f"rl_{name}", trained.model, tokenizer)
    seconds = {"training_seconds": trained.seconds, "training_cpu_seconds": trained.cpu_seconds}
    return {**trained.curves, **{k: round(v, 3) for k, v in seconds.items()}, "kept_steps": kept}


def _task(config: LabConfig, name: str) -> tuple[tuple[str, ...], Verifier, int]:
    """The domains, the reward and the number of steps of a training; on several, the mean of their steps."""
    world = world_of(config)
    if name == MULTI:
        return tuple(world.domains), world.mixed_reward(), config.mixed_steps
    domains = tuple(name.split(AND))
    steps = round(sum(config.rl_steps[domain] for domain in domains) / len(domains))
    return domains, world.mixed_reward() if len(domains) > 1 else load_verifier(world.verifier(name)), steps


def _pairs_file(path: Path, domain: str) -> Path:
    return path / "data" / f"{domain}_pairs.jsonl"
