"""Results by key in a JSONL file, so that an interrupted computation goes on where it stopped and a finished one is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interference.errors import InputError
from interference.model import Model
from interference.records import digest, write_text
from interference.rollouts import sample


@dataclass
class Ledger:
    """Rows {key, ...} of a JSONL file, the first row of a key being the one that counts; in memory only where path is None.

    Rows are appended as whole lines and a line counts once it is ended, so that a computation killed while writing loses that
    line alone. One process at a time may write to a file.
    """

    path: Path | None = None
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None) -> Ledger:
        """Read what is there; a last line that was never ended is removed.

        Raises InputError for a file that is no such ledger.
        """
        ledger = cls(None if path is None else Path(path))
        if ledger.path is None or not ledger.path.exists():
            return ledger
        try:
            text = ledger.path.read_text(encoding="utf-8")
            whole, ended, torn = text.rpartition("\n")
            for line in whole.split("\n") if ended else ():
                row = json.loads(line)
                ledger.rows.setdefault(row["key"], row)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(
                got=f"{path}, which is no cache of results ({type(error).__name__})",
                expected="a JSONL file as this package wrote it, or none",
                remedy="delete it or give another path",
            ) from error
        if torn:
            write_text(ledger.path, whole + ended)
        return ledger

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Keep rows whose keys are not known yet, on disk before this returns."""
        fresh = {row["key"]: row for row in rows if row["key"] not in self.rows}
        self.rows |= fresh
        if self.path is None or not fresh:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in fresh.values()))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(
                got=f"{self.path}, where nothing can be written ({error.strerror})",
                expected="a place for a cache",
                remedy="choose another path",
            ) from error


def model_digest(model: Model) -> str:
    """A short name of a model's weights and configuration."""
    config = getattr(model.module, "config", None)
    settings = {} if config is None else config.to_dict()
    kept = {k: v for k, v in settings.items() if not k.startswith("_") and k != "transformers_version"}
    return digest([type(model.module).__name__, kept, model.checksum()])


def sample_responses(
    model: Model,
    tokenizer: Any,
    prompts: Sequence[tuple[int, ...]],
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 256,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[tuple[int, ...]]]:
    """Token ids of `samples` responses to every prompt (by `rollouts.sample`); equal prompts share theirs.

    Prompts are taken in groups of about `batch_size` sequences, each with a seed of its own, and a group is kept once it is
    done: resumed or not, the same prompts and settings give the same draws.
    """
    if samples < 1:
        raise InputError(got=f"samples: {samples}", expected="a positive number", remedy="give a positive samples")
    ledger, name = Ledger.open(cache), model_digest(model)
    settings = [samples, max_new_tokens, temperature, batch_size, seed]
    keys = {prompt: digest(["responses", name, prompt, settings]) for prompt in prompts}
    order = sorted(keys, key=lambda prompt: (len(prompt), prompt))
    size = max(1, batch_size // samples)
    for start in range(0, len(order), size):
        group = order[start : start + size]
        if any(keys[prompt] not in ledger.rows for prompt in group):
            found = sample(
                model.module, tokenizer, group, samples=samples, max_new_tokens=max_new_tokens, temperature=temperature,
                batch_size=batch_size, seed=int(digest([keys[prompt] for prompt in group])[:12], 16),
            )  # fmt: skip
            responses: list[list[list[int]]] = [[] for _ in group]
            for rollout in found:
                responses[rollout.prompt_index].append(list(rollout.response_token_ids))
            ledger.add([{"key": keys[p], "responses": r} for p, r in zip(group, responses, strict=True)])
        if progress is not None:
            progress(min(start + size, len(order)), len(order))
    return [[tuple(ids) for ids in ledger.rows[keys[prompt]]["responses"]] for prompt in prompts]
