"""What a request says about judging, opened and checked: templates, verdicts made elsewhere, responses with planted errors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interference.domain import read_jsonl
from interference.errors import InputError
from interference.inputs import source_digest
from interference.probes.given import match
from interference.probes.judge import NO, YES, JudgeTemplate, default_template, read_template, verdict_tokens
from interference.probes.trajectories import (
    Extractor,
    Trajectory,
    answer_extractor,
    read_trajectories,
    rewards,
    split_steps,
)
from interference.probes.verdicts import Verdict, verdict_reader
from interference.probing.config import Judging, ProbeConfig
from interference.rollouts import load_verifier

Place = tuple[str, str, str]
"""Model, domain, mode."""


@dataclass(frozen=True)
class Judgment:
    """How responses are judged: {mode: template}, what cuts out the final answer, and the spellings of a verdict."""

    templates: dict[str, JudgeTemplate]
    extract: Extractor
    yes: tuple[str, ...]
    no: tuple[str, ...]


def judges(config: ProbeConfig) -> list[str]:
    """Models that judge something here: all but those whose verdicts are given for every domain and mode."""
    if "locus" in config.probes:
        return config.names
    if "self_verification" not in config.probes:
        return []
    given = {(v.model, v.domain, v.mode) for v in config.verdicts}
    wanted = [(d.name, mode) for d in config.domains for mode in config.judge.modes]
    return [name for name in config.names if any((name, *place) not in given for place in wanted)]


def open_judgment(asked: Judging, tokenizer: Any, search_path: Sequence[Path]) -> Judgment:
    """The judge's templates, tried on a trajectory, and the words of its verdicts, looked up in the vocabulary."""
    templates: dict[str, JudgeTemplate] = {
        mode: read_template(asked.templates[mode], mode)
        if mode in asked.templates
        else default_template(mode, chat=asked.chat)
        for mode in asked.modes
    }
    extract = answer_extractor(asked.answer, search_path)
    for template in templates.values():
        # The answer is not cut out of the trial, since a function of the user's may rely on what real responses hold.
        template.encode(tokenizer, [Trajectory("a prompt", "a response", "tried")], answer_extractor("whole"))
    sampled = asked.verdicts == "sampled"
    yes = tuple(asked.yes or (("yes",) if sampled else YES))
    no = tuple(asked.no or (("no",) if sampled else NO))
    if sampled:
        verdict_reader(yes, no, asked.pattern)
    else:
        verdict_tokens(tokenizer, yes, no)
    return Judgment(templates, extract, yes, no)


def extractor_digest(config: ProbeConfig, search_path: Sequence[Path]) -> str:
    """A short name of the code that cuts out final answers, where it is the user's own."""
    how = config.judge.answer
    own = bool(judges(config)) and how not in ("last_line", "whole") and not how.startswith("regex:")
    return source_digest(load_verifier(how, search_path)) if own else how


def read_verdicts(
    config: ProbeConfig,
    responses: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]],
    left_out: Mapping[tuple[str, str], Collection[str]],
) -> dict[Place, list[Verdict]]:
    """Verdicts made elsewhere, one for each given response of their model and domain.

    Raises InputError where these responses are not given, and where verdicts and responses do not match.
    """
    found: dict[Place, list[Verdict]] = {}
    for entry in config.verdicts:
        key = entry.model, entry.domain
        if key not in responses:
            raise InputError(
                got=f"verdicts of {entry.model!r} on {entry.domain!r} ({entry.data}) without the responses that were judged",
                expected="given rollouts of that model on that domain, which these verdicts are about",
                remedy="name them in `rollouts`: those that an earlier probe sampled are in its rollouts/DOMAIN/MODEL.jsonl",
            )
        rows = read_jsonl(entry.data)
        found[(*key, entry.mode)] = match(rows, responses[key], entry.data, left_out=left_out.get(key, ()))
    return found


def read_planted(config: ProbeConfig) -> dict[str, list[Trajectory]]:
    """Wrong responses with a planted error, by domain; at most `locus.limit` of each.

    Raises InputError for a file without any, without rewards, and for a wrong response whose `error_step` is missing or is no
    step of it.
    """
    found = {}
    for domain in config.domains:
        if not domain.planted or "locus" not in config.probes:
            continue
        every = read_trajectories(domain.planted)
        wrong = [t for t, r in zip(every, rewards(every), strict=True) if r < config.judge.threshold]
        if not wrong:
            raise InputError(
                got=f"{domain.planted} with {len(every)} rows, none of them wrong",
                expected=f"responses with a reward below {config.judge.threshold:g} and the step of their error",
                remedy="plant errors, or leave `planted` out",
            )
        for t in wrong:
            steps = len(split_steps(t.response, config.locus.separator))
            if t.error_step is None or t.error_step > steps:
                raise InputError(
                    got=f"{domain.planted}: error_step {t.error_step} of a response to {t.prompt_id!r} with {steps} steps",
                    expected="in every row with a wrong response the step of its error, from 1 to the number of its steps",
                    remedy="add it, or say by `locus.separator` what ends a step",
                )
        found[domain.name] = wrong[: config.locus.limit]
    return found
