"""The lab's worlds: the domains of one, what is asked and answered in them, and who rewards it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from interference.probes.judge import JudgeTemplate
from interference.rollouts import Verifier, load_verifier
from paper_repro.lab import domains, judging, m2rl
from paper_repro.lab.config import LabConfig


class Task(Protocol):
    """A prompt and, in `columns`, what its verifier needs."""

    @property
    def prompt(self) -> str: ...
    @property
    def columns(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class Judging:
    """A world's judge format: {mode: template}, the words of its verdicts, how the final answer is cut out, what ends a step
    (a regular expression), and a maker of SFT pairs (question, verdict) about a domain's task."""

    templates: Mapping[str, JudgeTemplate]
    yes: str
    no: str
    answer: str
    separator: str
    pair: Callable[[LabConfig, str, Any, random.Random], tuple[str, str]]


@dataclass(frozen=True)
class World:
    """Domains that are trained and measured together.

    verifiers: the module with one reward function per domain, of the domain's name.
    tasks: all tasks of a domain, in a fixed order, no prompt twice.
    response: one as the base is taught to write: in any style, partly wrong.
    reference: one that the domain's verifier accepts fully.
    vocabulary: every word of prompts, responses and questions to a judge.
    longest: tokens of the longest sequence.
    judging: the judge format that the base learns; None where it learns none.
    question: what a task asks, where several prompts ask the same; no question is both trained on and held out.
    planted: a rejected response in an accepted style, and its first wrong step (1 is the first); for domains in `reasoning`.
    """

    name: str
    domains: Sequence[str]
    verifiers: str
    tasks: Callable[[LabConfig, str], Sequence[Task]]
    response: Callable[[LabConfig, str, Any, random.Random], str]
    reference: Callable[[LabConfig, str, Any, random.Random], str]
    vocabulary: Callable[[LabConfig], list[str]]
    longest: Callable[[LabConfig], int]
    judging: Judging | None = None
    reasoning: Sequence[str] = ()
    planted: Callable[[Any, random.Random], tuple[str, int]] | None = None
    question: Callable[[Any], str] | None = None

    def verifier(self, domain: str) -> str:
        """The domain's verifier as "module:function"."""
        return f"{self.verifiers}:{domain}"

    def mixed_reward(self) -> Verifier:
        """A reward function for rows of all domains, each rewarded by the verifier that its column `domain` names."""
        verifiers = {domain: load_verifier(self.verifier(domain)) for domain in self.domains}

        def mixed(
            prompts: Sequence[str], completions: Sequence[str], domain: Sequence[str], **columns: Any
        ) -> list[float]:
            # What is no column of the data (TRL's own extras) is handed on as it is.
            lists = {k: v for k, v in columns.items() if isinstance(v, (list, tuple)) and len(v) == len(domain)}
            rewards = [0.0] * len(completions)
            for name in dict.fromkeys(domain):
                places = [i for i, found in enumerate(domain) if found == name]
                picked = {key: [values[i] for i in places] for key, values in lists.items()}
                asked, said = [prompts[i] for i in places], [completions[i] for i in places]
                for place, reward in zip(places, verifiers[name](asked, said, **picked), strict=True):
                    rewards[place] = reward
            return rewards

        return mixed


def _lpt_response(config: LabConfig, domain: str, task: domains.Task, rng: random.Random) -> str:
    style = domains.ANY.draw(rng, config.worked[domain], config.exclaim[domain])
    right = rng.random() >= config.wrong[domain]
    return domains.write(style, task.key, domains.body(domain, task, rng, right=right))


def _lpt_reference(config: LabConfig, domain: str, task: domains.Task, rng: random.Random) -> str:
    style = domains.TASTES[domain].draw(rng, config.worked[domain], config.exclaim[domain])
    return domains.write(style, task.key, domains.body(domain, task, rng))


def _m2rl_response(config: LabConfig, domain: str, task: m2rl.Task, rng: random.Random) -> str:
    written = m2rl.wrong(task, rng) if rng.random() < config.wrong[domain] else m2rl.right(task, rng)
    return written.text(m2rl.ANY.draw(rng))


def _m2rl_reference(config: LabConfig, domain: str, task: m2rl.Task, rng: random.Random) -> str:
    return m2rl.right(task, rng).text(m2rl.TASTES[domain].draw(rng))


def _m2rl_planted(task: m2rl.Task, rng: random.Random) -> tuple[str, int]:
    written = m2rl.wrong(task, rng)
    return written.text(m2rl.TASTES[task.domain].draw(rng)), written.error_step or 1


WORLDS: Mapping[str, World] = {
    "lpt": World(
        name="lpt",
        domains=domains.DOMAINS,
        verifiers="paper_repro.lab.verifiers",
        tasks=lambda config, domain: domains.tasks(domain),
        response=_lpt_response,
        reference=_lpt_reference,
        vocabulary=lambda config: domains.vocabulary(),
        longest=lambda config: 0,  # far below the least number of positions that a model is given
    ),
    "m2rl": World(
        name="m2rl",
        domains=m2rl.DOMAINS,
        verifiers="paper_repro.lab.verifiers_m2rl",
        tasks=m2rl.tasks,
        response=_m2rl_response,
        reference=_m2rl_reference,
        vocabulary=lambda config: sorted({*m2rl.vocabulary(config), *judging.WORDS}),
        longest=lambda config: m2rl.longest_prompt(config) + config.max_new_tokens + 8,
        judging=Judging(
            judging.TEMPLATES, judging.YES, judging.NO, m2rl.FINAL_ANSWER, m2rl.SEPARATOR,
            lambda config, domain, task, rng: judging.question(task, rng),
        ),
        reasoning=m2rl.REASONING,
        planted=_m2rl_planted,
        question=m2rl.question,
    ),
}  # fmt: skip


def world_of(config: LabConfig) -> World:
    """The world that the settings name."""
    return WORLDS[config.world]
