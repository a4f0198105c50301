"""Domain: prompts, responses and rewards of one RL domain, as token ids, from JSONL or from memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interference.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sequence:
    """One prompt with one response, as token ids; the response holds the end token iff the response ended there."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    prompt_id: str
    reward: float | None = None


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences. input_ids (B, T); targets (B, T) marks response tokens; index (B,) their place in the list."""

    input_ids: Tensor
    targets: Tensor
    index: tuple[int, ...]

    def to(self, device: torch.device | str) -> Batch:
        return replace(self, input_ids=self.input_ids.to(device), targets=self.targets.to(device))


@dataclass(frozen=True)
class Domain:
    """A named list of sequences.

    Rows of the same `prompt_id` are responses to one prompt; prompts, not responses, are the sampling unit everywhere.
    """

    name: str
    sequences: tuple[Sequence, ...]

    @classmethod
    def from_jsonl(
        cls,
        path: str | os.PathLike[str],
        *,
        tokenizer: PreTrainedTokenizerBase,
        name: str | None = None,
        limit: int | None = None,
    ) -> Domain:
        """Read a JSONL file of rows `prompt` (or `messages`), `response`, and optionally `reward`, `prompt_id`, `eos`.

        `eos` (default true) says that the response ended here, so that the end token belongs to it. Exact ids in
        `prompt_token_ids` and `response_token_ids` win over text. `limit` keeps the first so many prompts, with all their
        responses.

        Raises InputError, naming file and row, for a missing or empty file, broken JSON, or a row that does not fit.
        """
        rows = read_jsonl(path)
        return cls.from_rows(rows, tokenizer=tokenizer, name=name or Path(path).stem, limit=limit, source=str(path))

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Mapping[str, Any]],
        *,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        limit: int | None = None,
        source: str = "rows",
    ) -> Domain:
        """The same from dictionaries in memory."""
        sequences, prompts = [], set()
        for number, row in enumerate(rows, start=1):
            sequence = _sequence(row, tokenizer, f"{source}, row {number}")
            prompts.add(sequence.prompt_id)
            if limit is not None and len(prompts) > limit:
                prompts.discard(sequence.prompt_id)
                continue
            sequences.append(sequence)
        if not sequences:
            raise InputError(
                got=f"no sequences in {source} (domain {name!r})",
                expected="at least one row with a prompt and a response",
                remedy='write one JSON object a line, such as {"prompt": "2+2=", "response": "4"}',
            )
        return cls(name, tuple(sequences))

    @property
    def prompt_ids(self) -> list[str]:
        """The prompt id of every sequence."""
        return [s.prompt_id for s in self.sequences]

    def rewards(self) -> list[float]:
        """The reward of every sequence; InputError when one has none."""
        rewards = [s.reward for s in self.sequences if s.reward is not None]
        if len(rewards) != len(self.sequences):
            raise InputError(
                got=f"domain {self.name!r} with {len(self.sequences) - len(rewards)} rows without a reward",
                expected="a `reward` in every row for the objectives reward and surrogate",
                remedy="add rewards to the JSONL, or use objective: nll",
            )
        return rewards

    def distinct(self) -> tuple[list[Sequence], list[int]]:
        """Distinct (prompt, response) pairs, and for every sequence the place of its pair among them.

        Rollouts repeat themselves, above all short ones; what depends on the tokens alone is computed once.
        """
        places: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        where = [places.setdefault((s.prompt, s.response), len(places)) for s in self.sequences]
        first: dict[int, Sequence] = {}
        for sequence, place in zip(self.sequences, where, strict=True):
            first.setdefault(place, sequence)
        return [first[i] for i in range(len(places))], where


def batches(sequences: Iterable[Sequence], pad: int = 0, tokens: int = 4096) -> Iterator[Batch]:
    """Right-padded batches of at most `tokens` token positions each (a longer single sequence is its own batch).

    Sequences are sorted by length, so padding is little. No mask is made: causality hides right padding from the real
    tokens, and `targets` keeps it out of the sums.
    """
    rows = list(sequences)
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].prompt) + len(rows[i].response), i))
    group: list[int] = []
    for i in order:
        width = len(rows[i].prompt) + len(rows[i].response)
        if group and (len(group) + 1) * width > tokens:
            yield _pad(rows, group, pad)
            group = []
        group.append(i)
    if group:
        yield _pad(rows, group, pad)


def _pad(rows: list[Sequence], group: list[int], pad: int) -> Batch:
    width = max(len(rows[i].prompt) + len(rows[i].response) for i in group)
    input_ids = torch.full((len(group), width), pad, dtype=torch.long)
    targets = torch.zeros((len(group), width), dtype=torch.bool)
    for b, i in enumerate(group):
        p, end = len(rows[i].prompt), len(rows[i].prompt) + len(rows[i].response)
        input_ids[b, :end] = torch.tensor(rows[i].prompt + rows[i].response)
        targets[b, p:end] = True
    return Batch(input_ids, targets, tuple(group))


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Rows of a JSONL file; blank lines are skipped. InputError names the row that is no JSON object."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut inside strings at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            got=f"{path}, which cannot be read ({type(error).__name__})",
            expected="a JSONL file in UTF-8",
            remedy="check the path (relative paths are taken from the folder of RUN.yaml)",
        ) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(
                got=f"{path}, row {number}: {line[:60]!r}, which is not JSON ({error})",
                expected="one JSON object a line",
                remedy=f"mend or remove row {number}",
            ) from error
        if not isinstance(row, dict):
            raise InputError(
                got=f"{path}, row {number}: a {type(row).__name__}",
                expected="one JSON object a line",
                remedy=f"mend or remove row {number}",
            )
        rows.append(row)
    if not rows:
        raise InputError(
            got=f"{path}, which is empty",
            expected="one JSON object a line",
            remedy="write the domain's rows to it",
        )
    return rows


def messages(row: Mapping[str, Any]) -> list[dict[str, str]] | None:
    """The chat of a conversational row, in `messages` or, as TRL has it, in `prompt`; None for a row of plain text."""
    chat = row["prompt"] if isinstance(row.get("prompt"), list) else row.get("messages")
    return chat if isinstance(chat, list) else None


def prompt_text(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """The prompt of a row as text: `prompt`, or its messages through the tokenizer's chat template."""
    if isinstance(row.get("prompt"), str):
        return str(row["prompt"])
    chat = messages(row)
    if chat is None:
        raise InputError(
            got=f"{where} with keys {sorted(row)}",
            expected="`prompt` (a string) or `messages` (a list of {role, content})",
            remedy="add one of the two",
        )
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            got=f"{where} with `messages`, and a tokenizer without a chat template",
            expected="a tokenizer whose chat template turns messages into text",
            remedy="give `prompt` as text, or save the chat template with the model",
        )
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # templates raise their own types
        raise InputError(
            got=f"{where}: messages that the chat template refuses ({error})",
            expected="a list of {role, content}",
            remedy="mend the row",
        ) from error


def prompt_key(row: Mapping[str, Any], text: str) -> str:
    """`prompt_id`, or a short hash of the prompt's text, so that equal prompts are one prompt."""
    given = row.get("prompt_id")
    return str(given) if given is not None else hashlib.sha256(text.encode()).hexdigest()[:12]


def encode_prompt(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[tuple[int, ...], str]:
    """Token ids and id of a row's prompt. A chat template writes its own special tokens, so none are added to it."""
    if "prompt_token_ids" in row:
        ids = _ids(row["prompt_token_ids"], "prompt_token_ids", tokenizer, where)
        return ids, prompt_key(row, str(row.get("prompt", ids)))
    text = prompt_text(row, tokenizer, where)
    plain = isinstance(row.get("prompt"), str)
    return tuple(tokenizer(text, add_special_tokens=plain)["input_ids"]), prompt_key(row, text)


def _sequence(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> Sequence:
    prompt, prompt_id = encode_prompt(row, tokenizer, where)
    if "response_token_ids" in row:
        response = _ids(row["response_token_ids"], "response_token_ids", tokenizer, where)
    elif isinstance(row.get("response"), str):
        response = tuple(tokenizer(row["response"], add_special_tokens=False)["input_ids"])
        if row.get("eos", True):
            if tokenizer.eos_token_id is None:
                raise InputError(
                    got=f"{where}, whose response ended, and a tokenizer without an end token",
                    expected='a tokenizer with eos_token, or rows with "eos": false',
                    remedy="set the tokenizer's eos_token",
                )
            response = (*response, int(tokenizer.eos_token_id))
    else:
        raise InputError(
            got=f"{where} with keys {sorted(row)}",
            expected="`response` (a string) or `response_token_ids`",
            remedy="add the response",
        )
    if not prompt or not response:
        raise InputError(
            got=f"{where}: an empty {'response' if prompt else 'prompt'} (no tokens)",
            expected="at least one token of prompt and one of response",
            remedy="mend or remove the row (a base model without a start token cannot score an empty prompt)",
        )
    return Sequence(prompt, response, prompt_id, _reward(row, where))


def _reward(row: Mapping[str, Any], where: str) -> float | None:
    reward = row.get("reward")
    if reward is None:
        return None
    if isinstance(reward, (bool, int, float)) and abs(reward) < 1e300:  # false for NaN, true for no infinity
        return float(reward)
    raise InputError(got=f"{where}: reward {reward!r}", expected="a finite number", remedy="mend the row")


def _ids(value: object, key: str, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[int, ...]:
    size = len(tokenizer)
    if isinstance(value, list) and all(isinstance(i, int) and 0 <= i < size for i in value):
        return tuple(value)
    raise InputError(
        got=f"{where}: {key} {str(value)[:60]}",
        expected=f"a list of token ids from 0 to {size - 1}",
        remedy="give ids of the base model's tokenizer, or text",
    )
