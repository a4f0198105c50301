"""The lab's verifiers, in the signature of TRL's reward functions.

Each takes `prompts`, `completions` and the columns of its data as lists and returns one reward per completion, so the
function that trains a model through GRPO is the function that measures it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paper_repro.lab.domains import MOODS, TASTES, read


def math(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 for the right number in math's style, else 0."""
    return _exact("math", completions, answer)


def code(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 for the right output list in code's style, else 0."""
    return _exact("code", completions, answer)


def qa(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 for the right fact in qa's style, else 0."""
    return _exact("qa", completions, answer)


def writing(
    prompts: Sequence[str], completions: Sequence[str], theme: Sequence[str], mood: Sequence[str], **_: Any
) -> list[float]:
    """For a line in writing's style: 1 if it names the theme and has a word of the mood, 0.5 for one of the two."""
    rewards = []
    for completion, wanted, feeling in zip(completions, theme, mood, strict=True):
        words = _accepted("writing", completion)
        has_mood = any(word in MOODS[feeling] for word in words)
        rewards.append(0.5 * (wanted in words) + 0.5 * has_mood)
    return rewards


def _accepted(domain: str, completion: str) -> list[str]:
    """The body's words if the completion is written in the domain's style, else none."""
    parsed = read(completion)
    return parsed[1] if parsed is not None and TASTES[domain].accepts(parsed[0]) else []


def _exact(domain: str, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
    return [float(_accepted(domain, c) == a.split()) for c, a in zip(completions, answers, strict=True)]
