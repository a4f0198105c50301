"""Prompts, SFT pairs, reference answers and rollouts of the lab, as JSONL rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

from interference.errors import InputError
from interference.rollouts import load_verifier, sample, score
from paper_repro.lab.config import LabConfig
from paper_repro.lab.worlds import Task, World, world_of

Row = dict[str, Any]


def split(config: LabConfig, domain: str) -> tuple[list[Task], list[Task]]:
    """Training and held-out tasks of a domain, drawn by the seed; no prompt and no question (`World.question`) is in both.

    Raises:
        InputError: the domain has fewer prompts than the settings ask for.
    """
    world = world_of(config)
    pool = list(world.tasks(config, domain))
    wanted = config.train_prompts + config.heldout_prompts
    if wanted > len(pool):
        raise InputError(
            got=f"{wanted} prompts asked of domain {domain}",
            expected=f"at most {len(pool)}, all that it has",
            remedy="lower train_prompts or heldout_prompts",
        )
    _rng(config, domain, "split").shuffle(pool)
    if world.question is None:
        train, heldout = pool[: config.train_prompts], pool[config.train_prompts : wanted]
    else:
        train, heldout = _by_question(config, domain, pool, world.question)
    shared = {task.prompt for task in train} & {task.prompt for task in heldout}
    assert not shared, f"{domain}: prompts both trained on and held out: {sorted(shared)[:3]}"
    return train, heldout


def _by_question(
    config: LabConfig, domain: str, pool: list[Task], question: Callable[[Task], str]
) -> tuple[list[Task], list[Task]]:
    """The same where several prompts ask one question: the questions are shared out in proportion, then prompts drawn."""
    questions = list(dict.fromkeys(map(question, pool)))
    share = config.train_prompts / (config.train_prompts + config.heldout_prompts)
    trained = set(questions[: round(share * len(questions))])
    train = [task for task in pool if question(task) in trained][: config.train_prompts]
    heldout = [task for task in pool if question(task) not in trained][: config.heldout_prompts]
    if len(train) < config.train_prompts or len(heldout) < config.heldout_prompts:
        raise InputError(
            got=f"{config.train_prompts} and {config.heldout_prompts} prompts asked of domain {domain}",
            expected=f"at most {len(train)} and {len(heldout)}, of questions that are trained on and held out",
            remedy="lower train_prompts or heldout_prompts",
        )
    return train, heldout


def prompt_rows(config: LabConfig, domain: str, *, heldout: bool) -> list[Row]:
    """One row per prompt: prompt, prompt_id and the verifier's columns."""
    name, chosen = ("heldout", split(config, domain)[1]) if heldout else ("train", split(config, domain)[0])
    return [
        {"prompt": task.prompt, "prompt_id": f"{domain}-{name}-{index:04d}", **task.columns}
        for index, task in enumerate(chosen)
    ]


def mixed_rows(config: LabConfig, domains: Iterable[str] | None = None) -> list[Row]:
    """The training prompts of all domains, or of some, each with its `domain` and all columns (empty where a domain has none)."""
    rows = [
        {**row, "domain": domain}
        for domain in (world_of(config).domains if domains is None else domains)
        for row in prompt_rows(config, domain, heldout=False)
    ]
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key, "") for key in columns} for row in rows]


def sft_pairs(config: LabConfig) -> list[tuple[str, str]]:
    """(prompt, response) pairs of all domains on training prompts, in all styles and partly wrong; then a judge's."""
    world, pairs = world_of(config), list[tuple[str, str]]()
    for domain in world.domains:
        rng = _rng(config, domain, "sft")
        for task in split(config, domain)[0]:
            for _ in range(config.sft_responses):
                pairs.append((task.prompt, world.response(config, domain, task, rng)))
    return pairs + judge_pairs(config)


def judge_pairs(config: LabConfig) -> list[tuple[str, str]]:
    """(question to a judge, verdict) pairs on training prompts, so many that they are `judge_share` of all SFT pairs."""
    world, pairs = world_of(config), list[tuple[str, str]]()
    if world.judging is None:
        return pairs
    responses = config.train_prompts * config.sft_responses
    count = round(config.judge_share / (1 - config.judge_share) * responses)
    for domain in world.domains:
        rng, train = _rng(config, domain, "judge"), split(config, domain)[0]
        pairs += [world.judging.pair(config, domain, train[i % len(train)], rng) for i in range(count)]
    return pairs


def reference_rows(config: LabConfig, domain: str) -> list[Row]:
    """Held-out prompts, each with one response drawn among those its verifier accepts fully."""
    world, rng = world_of(config), _rng(config, domain, "reference")
    rows = prompt_rows(config, domain, heldout=True)
    for row, task in zip(rows, split(config, domain)[1], strict=True):
        row["response"] = world.reference(config, domain, task, rng)
    rewards = rewarded(world, domain, rows)
    assert min(rewards) == 1.0, f"{domain}: a reference response that its verifier rejects"
    return rows


def planted_rows(config: LabConfig, domain: str) -> list[Row]:
    """Held-out prompts, each with one rejected response in an accepted style and its first wrong step in `error_step`."""
    world, rng = world_of(config), _rng(config, domain, "planted")
    assert world.planted is not None
    prompts, held = prompt_rows(config, domain, heldout=True), split(config, domain)[1]
    rows = []
    for index in range(config.planted):
        response, error_step = world.planted(held[index % len(held)], rng)
        rows.append({**prompts[index % len(held)], "response": response, "error_step": error_step})
    rewards = rewarded(world, domain, rows) if rows else []
    assert not any(rewards), f"{domain}: a planted error that its verifier rewards"
    return [{**row, "reward": reward} for row, reward in zip(rows, rewards, strict=True)]


def rollout_rows(
    config: LabConfig,
    domain: str,
    model: Any,
    tokenizer: Any,
    *,
    seed: int,
    samples: int | None = None,
    heldout: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Responses of a model to the held-out (or the training) prompts, with rewards and exact token ids."""
    prompts = prompt_rows(config, domain, heldout=heldout)
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
    rewards = rewarded(world_of(config), domain, rows)
    return [{**row, "reward": reward} for row, reward in zip(rows, rewards, strict=True)]


def rewarded(world: World, domain: str, rows: list[Row]) -> list[float]:
    """The domain's verifier on rows with prompt and response."""
    columns = {key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "response")}
    verifier = load_verifier(world.verifier(domain))
    return score(verifier, [row["prompt"] for row in rows], [row["response"] for row in rows], columns)


def _rng(config: LabConfig, domain: str, purpose: str) -> random.Random:
    return random.Random(f"{config.seed} {domain} {purpose}")
