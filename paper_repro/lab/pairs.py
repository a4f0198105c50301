"""Preference pairs from a model's own rollouts, for DPO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from interference.errors import InputError
from interference.rollouts import Rollout, Verifier, sample, score
from paper_repro.lab.config import LabConfig
from paper_repro.lab.data import Row


def preference_pairs(
    config: LabConfig,
    model: Any,
    tokenizer: Any,
    rows: list[Row],
    *,
    reward: Verifier,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """`pair_rollouts` responses to every prompt in `rows`, and of each prompt the best with the worst, and so on inwards.

    Sorted by reward, the i-th from the top is chosen over the i-th from the bottom as long as its reward is higher; so no
    response is in two pairs, and prompts whose responses all have one reward are left out.

    Returns:
        rows with the prompt's columns, `chosen` and `rejected` (text), their `*_token_ids` as sampled, their `*_reward`.

    Raises:
        InputError: no prompt has responses of two rewards.
    """
    rollouts = sample(
        model, tokenizer, [row["prompt"] for row in rows], samples=config.pair_rollouts,
        max_new_tokens=config.max_new_tokens, batch_size=512, seed=seed, progress=progress,
    )  # fmt: skip
    asked = [rows[rollout.prompt_index] for rollout in rollouts]
    columns = {key: [row[key] for row in asked] for key in rows[0] if key != "prompt"}
    rewards = score(reward, [row["prompt"] for row in asked], [r.response for r in rollouts], columns)
    groups: dict[int, list[tuple[float, Rollout]]] = {}
    for value, rollout in zip(rewards, rollouts, strict=True):
        groups.setdefault(rollout.prompt_index, []).append((value, rollout))
    pairs = [_pair(rows[index], *pair) for index, group in sorted(groups.items()) for pair in _inwards(group)]
    if not pairs:
        raise InputError(
            got=f"{len(rollouts)} rollouts without two different rewards for any prompt",
            expected="responses of which one is better than another",
            remedy="raise pair_rollouts, or make the base middling at this domain",
        )
    return pairs


def _inwards(group: list[tuple[float, Rollout]]) -> list[tuple[tuple[float, Rollout], tuple[float, Rollout]]]:
    order = sorted(group, key=lambda scored: scored[0])  # stable: equal rewards keep the order of sampling
    half = len(order) // 2
    return [(best, worst) for worst, best in zip(order[:half], order[::-1][:half], strict=True) if best[0] > worst[0]]


def _pair(row: Row, chosen: tuple[float, Rollout], rejected: tuple[float, Rollout]) -> Row:
    sides = {"chosen": chosen, "rejected": rejected}
    return {
        **row,
        **{name: rollout.response for name, (_, rollout) in sides.items()},
        "prompt_token_ids": list(chosen[1].prompt_token_ids),
        **{f"{name}_token_ids": list(rollout.response_token_ids) for name, (_, rollout) in sides.items()},
        **{f"{name}_reward": value for name, (value, _) in sides.items()},
    }
