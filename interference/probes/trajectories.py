"""Trajectories that a judge reads, and how they are cut: into steps, to their first tokens, to their final answer."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from interference.domain import messages, prompt_key, read_jsonl
from interference.errors import InputError
from interference.records import digest
from interference.rollouts import load_verifier

Extractor = Callable[[str], str]
CORRECT = 0.5
"""A trajectory counts as correct when its reward is at least this, unless another threshold is given."""
STEPS = r"\n+"
"""What ends a step of a response, unless another regular expression is given: one line break or more."""

_KNOWN = ("prompt", "messages", "prompt_id", "response", "reward", "error_step", "eos")
_TOKENS = ("prompt_token_ids", "response_token_ids", "logps")


@dataclass(frozen=True)
class Trajectory:
    """One response to one prompt, as text.

    prompt: plain text, or the messages of a chat.  prompt_id: trajectories of one id answer one prompt, the sampling unit.
    reward: the verifiable reward, if known.  error_step: the step (1 is the first) where an error was planted, if one was.
    columns: the row's other entries, handed to a verifier.
    """

    prompt: str | tuple[Mapping[str, str], ...]
    response: str
    prompt_id: str
    reward: float | None = None
    error_step: int | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt_text(self) -> str:
        """The prompt as a judge reads it: the text, or the contents of the messages with blank lines between them."""
        return self.prompt if isinstance(self.prompt, str) else "\n\n".join(m["content"] for m in self.prompt)

    @property
    def digest(self) -> str:
        """A short name of prompt and response."""
        return digest([self.prompt, self.response])

    def shown(self, response: str) -> Trajectory:
        """The same trajectory, with its reward, of which only `response` is shown."""
        return replace(self, response=response)


def read_trajectories(path: str | os.PathLike[str]) -> list[Trajectory]:
    """Read rows {prompt or messages, response, prompt_id?, reward?, error_step?, ...} of a JSONL file.

    Raises InputError, naming file and row, for a file that cannot be read or a row that does not fit.
    """
    return trajectories_from_rows(read_jsonl(path), str(path))


def trajectories_from_rows(rows: Sequence[Mapping[str, Any]], source: str = "rows") -> list[Trajectory]:
    """The same from dictionaries in memory."""
    return [_trajectory(row, f"{source}, row {number}") for number, row in enumerate(rows, start=1)]


def _trajectory(row: Mapping[str, Any], where: str) -> Trajectory:
    chat, response = messages(row), row.get("response")
    plain = isinstance(row.get("prompt"), str)
    if not isinstance(response, str) or not (plain or chat):
        raise InputError(
            got=f"{where} with keys {sorted(row)}",
            expected="`response` (a string) and `prompt` (a string) or `messages` (a list of {role, content})",
            remedy="add what is missing",
        )
    if not plain and any(not isinstance(m, dict) or not isinstance(m.get("content"), str) for m in chat or ()):
        raise InputError(
            got=f"{where}: messages {str(chat)[:60]}", expected="a list of {role, content}", remedy="mend the row"
        )
    prompt = str(row["prompt"]) if plain else tuple(chat or ())
    reward, step = row.get("reward"), row.get("error_step")
    if reward is not None and not (isinstance(reward, (bool, int, float)) and math.isfinite(reward)):
        raise InputError(got=f"{where}: reward {reward!r}", expected="a finite number", remedy="mend the row")
    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 1):
        raise InputError(got=f"{where}: error_step {step!r}", expected="a step, counted from 1", remedy="mend the row")
    columns = {key: value for key, value in row.items() if key not in (*_KNOWN, *_TOKENS)}
    key = prompt_key(row, prompt if isinstance(prompt, str) else str(prompt))
    return Trajectory(prompt, response, key, None if reward is None else float(reward), step, columns)


def rewards(trajectories: Sequence[Trajectory]) -> list[float]:
    """The reward of every trajectory; InputError when one has none, or there are no trajectories."""
    known = [t.reward for t in trajectories if t.reward is not None]
    if len(known) != len(trajectories) or not known:
        lacking = len(trajectories) - len(known)
        raise InputError(
            got=f"{lacking} of {len(trajectories)} trajectories without a reward" if lacking else "no trajectories",
            expected="trajectories with a verifiable reward, against which the judge is scored",
            remedy="add `reward` to every row, or score the responses with the domain's verifier",
        )
    return known


def split_steps(response: str, separator: str = STEPS) -> tuple[str, ...]:
    """The steps of a response, each with what ends it, so that joined they are the response; blank ones join the next.

    Raises InputError for a separator that is no regular expression.

    >>> split_steps("a = 2\\n\\nb = 3\\nso 5")
    ('a = 2\\n\\n', 'b = 3\\n', 'so 5')
    """
    steps, start = [], 0
    for match in pattern(separator, "separator").finditer(response):
        if match.end() > match.start() and response[start : match.start()].strip():
            steps.append(response[start : match.end()])
            start = match.end()
    rest = response[start:]
    if rest.strip() or not steps:
        return (*steps, rest)
    return (*steps[:-1], steps[-1] + rest)


def first_tokens(tokenizer: Any, text: str, counts: Sequence[int]) -> list[str]:
    """The text's first so many tokens, for every count: cut out of the text itself where the tokenizer knows the places."""
    if getattr(tokenizer, "is_fast", False):
        ends = [
            end for _, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        ]
        return [text if n >= len(ends) else text[: max(ends[:n], default=0)] for n in counts]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [text if n >= len(ids) else str(tokenizer.decode(ids[:n])) for n in counts]


def token_count(tokenizer: Any, text: str) -> int:
    """Tokens of a text, without special tokens."""
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def answer_extractor(how: str = "last_line", search_path: str | Path | Sequence[str | Path] = ()) -> Extractor:
    r"""The function that cuts the final answer out of a response.

    how: "last_line" (default: the last line that is not blank), "whole" (the response as it is), "regex:PATTERN" (the last
    match; its first group that took part where the pattern has groups; empty where nothing matches), or "module:function".

    Raises InputError for anything else, an invalid pattern, or (when called) a function that raises or returns no text.

    >>> answer_extractor(r"regex:####\s*(\S+)")("6 * 7\n#### 42")
    '42'
    """
    if how == "last_line":
        return lambda response: next((line.strip() for line in reversed(response.splitlines()) if line.strip()), "")
    if how == "whole":
        return lambda response: response
    if how.startswith("regex:"):
        compiled = pattern(how.removeprefix("regex:"), "final answer")
        return lambda response: _last_match(compiled, response)
    if not re.fullmatch(r"[\w.]+:\w+", how):
        raise InputError(
            got=f"final answer by {how!r}",
            expected="'last_line', 'whole', 'regex:PATTERN' or 'module:function'",
            remedy=r"write a pattern as in regex:\\boxed\{(.*)\}",
        )
    function = load_verifier(how, search_path)  # the same way of naming a user's function

    def extract(response: str) -> str:
        try:
            answer: Any = function(response)
        except Exception as error:  # the user's code can raise anything
            raise InputError(
                got=f"{how}, which raises {type(error).__name__} ({error}) on the response {response[-60:]!r}",
                expected="the final answer as text, of every response",
                remedy="return an empty text where there is no answer, then run the same command again: what was done is kept",
            ) from error
        if not isinstance(answer, str):
            raise InputError(
                got=f"{how} that returns a {type(answer).__name__}",
                expected="the final answer as text",
                remedy="return a str",
            )
        return answer

    return extract


def pattern(text: str, what: str) -> re.Pattern[str]:
    """A compiled regular expression; InputError when it is none."""
    try:
        return re.compile(text)
    except re.error as error:
        raise InputError(
            got=f"{what}: {text!r} ({error})", expected="a regular expression of Python's re", remedy="mend the pattern"
        ) from error


def _last_match(compiled: re.Pattern[str], response: str) -> str:
    matches = list(compiled.finditer(response))
    if not matches:
        return ""
    return next((group for group in matches[-1].groups() if group is not None), matches[-1].group(0))
