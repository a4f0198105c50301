"""Prompts, SFT pairs, reference answers and rollouts of the lab, as JSONL rows."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from interference.errors import InputError
from interference.rollouts import load_verifier, sample, score
from paper_repro.lab.config import LabConfig
from paper_repro.lab.domains import ANY, DOMAINS, TASTES, Task, body, tasks, write

Row = dict[str, Any]
MODULE = "paper_repro.lab.verifiers"


def split(config: LabConfig, domain: str) -> tuple[list[Task], list[Task]]:
    """Disjoint training and held-out tasks of a domain, drawn by the seed.

    Raises:
        InputError: the domain has fewer prompts than the settings ask for.
    """
    pool = tasks(domain)
    wanted = config.train_prompts + config.heldout_prompts
    if wanted > len(pool):
        raise InputError(
            got=f"{wanted} prompts asked of domain {domain}",
            expected=f"at most {len(pool)}, all that it has",
            remedy="lower train_prompts or heldout_prompts",
        )
    _rng(config, domain, "split").shuffle(pool)
    train, heldout = pool[: config.train_prompts], pool[config.train_prompts : wanted]
    shared = {task.prompt for task in train} & {task.prompt for task in heldout}
    assert not shared, f"{domain}: prompts both trained on and held out: {sorted(shared)[:3]}"
    return train, heldout


def prompt_rows(config: LabConfig, domain: str, *, heldout: bool) -> list[Row]:
    """One row per prompt: prompt, prompt_id and the verifier's columns."""
    name, chosen = ("heldout", split(config, domain)[1]) if heldout else ("train", split(config, domain)[0])
    return [
        {"prompt": task.prompt, "prompt_id": f"{domain}-{name}-{index:04d}", **task.columns}
        for index, task in enumerate(chosen)
    ]


def sft_pairs(config: LabConfig) -> list[tuple[str, str]]:
    """(prompt, response) pairs of all domains on training prompts, in all styles and partly wrong."""
    pairs = []
    for domain in DOMAINS:
        rng = _rng(config, domain, "sft")
        for task in split(config, domain)[0]:
            for _ in range(config.sft_responses):
                style = ANY.draw(rng, config.worked[domain], config.exclaim[domain])
                right = rng.random() >= config.wrong[domain]
                pairs.append((task.prompt, write(style, task.key, body(domain, task, rng, right=right))))
    return pairs


def reference_rows(config: LabConfig, domain: str) -> list[Row]:
    """Held-out prompts, each with one response drawn among those its verifier accepts fully."""
    rng = _rng(config, domain, "reference")
    rows = prompt_rows(config, domain, heldout=True)
    for row, task in zip(rows, split(config, domain)[1], strict=True):
        style = TASTES[domain].draw(rng, config.worked[domain], config.exclaim[domain])
        row["response"] = write(style, task.key, body(domain, task, rng))
    rewards = judge(domain, rows)
    assert min(rewards) == 1.0, f"{domain}: a reference response that its verifier rejects"
    return rows


def rollout_rows(
    config: LabConfig,
    domain: str,
    model: Any,
    tokenizer: Any,
    *,
    seed: int,
    samples: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Responses of a model to the held-out prompts, with rewards and exact token ids."""
    prompts = prompt_rows(config, domain, heldout=True)
    rollouts = sample(
        model, tokenizer, [row["prompt"] for row in prompts], samples=samples or config.rollouts,
        max_new_tokens=config.max_new_tokens, batch_size=512, seed=seed, progress=progress,
    )  # fmt: skip
    rows: list[Row] = [
        {
            **prompts[rollout.prompt_index],
            "response": rollout.response,
            "eos": rollout.eos,
            "prompt_token_ids": list(rollout.prompt_token_ids),
            "response_token_ids": list(rollout.response_token_ids),
        }
        for rollout in rollouts
    ]
    return [{**row, "reward": reward} for row, reward in zip(rows, judge(domain, rows), strict=True)]


def judge(domain: str, rows: list[Row]) -> list[float]:
    """The domain's verifier on rows with prompt and response."""
    columns = {key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "response")}
    verifier = load_verifier(f"{MODULE}:{domain}")
    return score(verifier, [row["prompt"] for row in rows], [row["response"] for row in rows], columns)


def _rng(config: LabConfig, domain: str, purpose: str) -> random.Random:
    return random.Random(f"{config.seed} {domain} {purpose}")
