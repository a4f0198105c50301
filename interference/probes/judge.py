"""Judge templates: what a model is asked about a trajectory, and the tokens that say yes or no.

Outcome mode shows the final answer alone, process mode the full reasoning (M2RL, arXiv 2602.12566, whose own templates are
not published; these are stand-ins to be edited).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from interference.domain import encode_prompt
from interference.errors import InputError, nearest
from interference.probes.trajectories import Extractor, Trajectory, answer_extractor
from interference.records import digest

Mode = Literal["outcome", "process"]
Chat = tuple[tuple[str, str], ...]

YES = ("Yes", " Yes", "yes", " yes", "YES", " YES")
NO = ("No", " No", "no", " no", "NO", " NO")

_OWN = {"outcome": "answer", "process": "trajectory"}
_PLACEHOLDER = re.compile(r"\{(prompt|answer|trajectory)\}")
_TEXT = {
    "outcome": "Question:\n{prompt}\n\nProposed final answer:\n{answer}\n\n"
    "Is the proposed final answer correct? Answer with Yes or No.\nVerdict:",
    "process": "Question:\n{prompt}\n\nProposed solution:\n{trajectory}\n\n"
    "Is the final answer of the proposed solution correct? Answer with Yes or No.\nVerdict:",
}


@dataclass(frozen=True)
class JudgeTemplate:
    """What the judge is asked: text, or the (role, content) messages of a chat, with placeholders.

    Both modes need {prompt}. Outcome mode needs {answer}, the final answer, and may not hold {trajectory}; process mode needs
    {trajectory}, the response, and may hold {answer}. Any other braces stay as they are, and what is filled in is not
    searched for placeholders.

    Raises InputError when a placeholder is missing or does not belong.

    >>> JudgeTemplate("outcome", "{prompt} {answer} ?").fill("2 + 2", "4", "2 + 2 is \\\\boxed{4}")
    '2 + 2 4 ?'
    """

    mode: Mode
    text: str | Chat

    def __post_init__(self) -> None:
        if self.mode not in _OWN:
            raise InputError(
                got=f"judge mode {self.mode!r}", expected="a mode of judging", remedy=nearest(self.mode, _OWN)
            )
        whole = self.text if isinstance(self.text, str) else "\n".join(content for _, content in self.text)
        for name in ("prompt", _OWN[self.mode]):
            if "{" + name + "}" not in whole:
                written = re.findall(r"\{(\w+)\}", whole)
                raise InputError(
                    got=f"a judge template for {self.mode} mode without {{{name}}}",
                    expected=f"the placeholders {{prompt}} and {{{_OWN[self.mode]}}}",
                    remedy="add it" + (f" (it holds {{{'}, {'.join(written)}}})" if written else ""),
                )
        if self.mode == "outcome" and "{trajectory}" in whole:
            raise InputError(
                got="a judge template for outcome mode with {trajectory}",
                expected="the final answer alone: the reasoning is what process mode shows",
                remedy="remove {trajectory}, or use the template in process mode",
            )

    @property
    def digest(self) -> str:
        """A short name of mode and text."""
        return digest([self.mode, self.text])

    def fill(self, prompt: str, answer: str, trajectory: str) -> str | list[dict[str, str]]:
        """The question about one trajectory, as text or as messages."""
        values = {"prompt": prompt, "answer": answer, "trajectory": trajectory}

        def filled(text: str) -> str:
            return _PLACEHOLDER.sub(lambda match: values[match.group(1)], text)

        if isinstance(self.text, str):
            return filled(self.text)
        return [{"role": role, "content": filled(content)} for role, content in self.text]

    def encode(
        self, tokenizer: Any, trajectories: Sequence[Trajectory], extract: Extractor | None = None
    ) -> list[tuple[int, ...]]:
        """Token ids of the question about every trajectory; a chat goes through the tokenizer's chat template.

        extract: cuts the final answer out of a response; the last line that is not blank unless given.

        Raises InputError for a chat where the tokenizer has no chat template, or where that template refuses the messages.
        """
        if not isinstance(self.text, str) and not getattr(tokenizer, "chat_template", None):
            raise InputError(
                got=f"a judge template of messages ({self.mode} mode), and a tokenizer without a chat template",
                expected="a tokenizer whose chat template turns messages into text",
                remedy="write the judge template as plain text, or save the chat template with the model",
            )
        cut, where = extract or answer_extractor(), f"the judge template ({self.mode} mode)"
        uses_answer = "{answer}" in str(self.text)
        questions = [self.fill(t.prompt_text, cut(t.response) if uses_answer else "", t.response) for t in trajectories]
        return [encode_prompt({"prompt": question}, tokenizer, where)[0] for question in questions]


def default_template(mode: Mode, *, chat: bool = False) -> JudgeTemplate:
    """The template used unless another is given, as plain text or as one message of a user."""
    text = _TEXT.get(mode, "")
    return JudgeTemplate(mode, (("user", text),) if chat else text)


def read_template(path: str | os.PathLike[str], mode: Mode) -> JudgeTemplate:
    """A template from a file: JSON (a list of {role, content}) where the name ends in .json, else plain text, of which the
    line break that ends the file is no part.

    Raises InputError for a file that cannot be read or does not fit.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        if Path(path).suffix != ".json":
            return JudgeTemplate(mode, text.removesuffix("\n"))
        chat = tuple((m["role"], m["content"]) for m in json.loads(text))
    except InputError as error:
        raise InputError(got=f"{path}, {error.got}", expected=error.expected, remedy=error.remedy) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            got=f"{path}, which is no judge template ({type(error).__name__})",
            expected="a text in UTF-8, or a .json file with a list of {role, content}",
            remedy="check the path and the file",
        ) from error
    if not all(isinstance(part, str) for message in chat for part in message):
        raise InputError(
            got=f"{path} with messages that are not text", expected="a list of {role, content}", remedy="mend it"
        )
    return JudgeTemplate(mode, chat)


@dataclass(frozen=True)
class VerdictTokens:
    """The single tokens that say yes and those that say no."""

    yes: tuple[int, ...]
    no: tuple[int, ...]


def verdict_tokens(tokenizer: Any, yes: Sequence[str] = YES, no: Sequence[str] = NO) -> VerdictTokens:
    """Ids of those spellings that are one known token each; the others are left out.

    Raises InputError when no spelling of a side is one token, or when a token is on both sides.
    """
    found = {}
    for side, spellings in (("yes", yes), ("no", no)):
        encoded = [tuple(tokenizer(spelling, add_special_tokens=False)["input_ids"]) for spelling in spellings]
        single = dict.fromkeys(ids[0] for ids in encoded if len(ids) == 1 and ids[0] != tokenizer.unk_token_id)
        if not single:
            raise InputError(
                got=f"{side}-words {list(spellings)}, none of which is a single token of this tokenizer",
                expected=f"at least one word for {side} that is one token",
                remedy=f"give spellings of {side} that the tokenizer knows, or use sampled verdicts",
            )
        found[side] = tuple(single)
    both = set(found["yes"]) & set(found["no"])
    if both:
        raise InputError(
            got=f"token {min(both)} among both the yes-words and the no-words",
            expected="words that differ in their token",
            remedy="give other spellings",
        )
    return VerdictTokens(found["yes"], found["no"])
