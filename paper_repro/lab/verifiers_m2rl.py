"""Verifiers of world "m2rl", in the signature of TRL's reward functions (see `paper_repro.lab.verifiers`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paper_repro.lab.m2rl import TASTES, constraints_met, read


def math(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 for the right number in math's style, else 0."""
    return _exact("math", completions, answer)


def coding(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 for the right list in coding's style, else 0."""
    return _exact("coding", completions, answer)


def science(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 for the right fact in science's style, else 0."""
    return _exact("science", completions, answer)


def instruction(
    prompts: Sequence[str],
    completions: Sequence[str],
    words: Sequence[str],
    include: Sequence[str],
    last: Sequence[str],
    **_: Any,
) -> list[float]:
    """For a line in instruction's style: 1 if it obeys all three constraints, 0.5 for two of them, else 0."""
    grades = (0.0, 0.0, 0.5, 1.0)
    lines = (_accepted("instruction", completion) for completion in completions)
    return [
        grades[constraints_met(line, *asked)] if line else 0.0
        for line, *asked in zip(lines, words, include, last, strict=True)
    ]


def _accepted(domain: str, completion: str) -> list[str]:
    """The answer's words if the completion is written in the domain's style, else none."""
    parsed = read(completion)
    return parsed[1] if parsed is not None and TASTES[domain].accepts(parsed[0]) else []


def _exact(domain: str, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
    return [float(_accepted(domain, c) == a.split()) for c, a in zip(completions, answers, strict=True)]
