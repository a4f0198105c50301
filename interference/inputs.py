"""Everything a RUN.yaml names, opened and checked before anything is computed or written."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interference import __version__
from interference.checkpoint import Checkpoint
from interference.config import RunConfig
from interference.domain import Domain, encode_prompt, messages, prompt_text, read_jsonl
from interference.errors import InputError
from interference.objectives import OBJECTIVES, reward_terms
from interference.records import file_digest
from interference.rollouts import Rollout, Verifier, load_verifier, score
from interference.update import Update

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompts:
    """Prompts to sample from, with what their verifier needs. chats: the prompt's messages, None where it is plain text."""

    ids: list[tuple[int, ...]]
    texts: list[str]
    chats: list[list[dict[str, str]] | None]
    prompt_ids: list[str]
    columns: dict[str, list[Any]]
    verifier: Verifier

    def rewards(self, places: Sequence[int], responses: Sequence[str]) -> list[float]:
        """Rewards of responses to the prompts at `places`, in TRL's conventions: a chat's response is a message, too."""
        prompts = [self.texts[i] if self.chats[i] is None else self.chats[i] for i in places]
        completions = [
            text if self.chats[i] is None else [{"role": "assistant", "content": text}]
            for i, text in zip(places, responses, strict=True)
        ]
        columns = {key: [values[i] for i in places] for key, values in self.columns.items()}
        return score(self.verifier, prompts, completions, columns)


@dataclass(frozen=True)
class Inputs:
    """Opened inputs of a run. data: {(objective, domain): Domain}; measured: {(model, domain): Domain} of given rollouts."""

    base: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    updates: dict[str, Update]
    data: dict[tuple[str, str], Domain]
    files: dict[tuple[str, str], str]
    prompts: dict[str, Prompts]
    measured: dict[tuple[str, str], Domain]
    fingerprints: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def open_inputs(
    config: RunConfig, search_path: Sequence[Path], progress: Callable[[str], None] = lambda _: None
) -> Inputs:
    """Open and check every input of a run. Raises InputError at the first that cannot be used; writes nothing."""
    base = Checkpoint.open(config.base_model)
    tokenizer = base.tokenizer()
    notes: list[str] = []
    data, files = _read_data(config, tokenizer, notes)
    prompts = {
        d.name: read_prompts(d.name, d.prompts, d.verifier, tokenizer, search_path, config.limit, notes)
        for d in config.domains
        if d.prompts and d.verifier
    }
    measured = {
        (m.model, m.domain): Domain.from_jsonl(m.data, tokenizer=tokenizer, name=m.domain) for m in config.measurements
    }
    for rollouts in measured.values():
        rollouts.rewards()
    _refuse_leaks(config, data, measured)
    domains = {d.name for d in config.domains}
    notes += [
        f"model {m.name!r} bears no domain's name: its cells all count as off-diagonal, its cosine baselines are undefined"
        for m in config.models
        if m.name not in domains
    ]
    updates, fingerprints = {}, {}
    for entry in config.models:
        tuned = Checkpoint.open(entry.model)
        progress(f"reading {entry.name}")
        updates[entry.name] = Update.between(base, tuned)
        notes += [f"{entry.name}: {f.severity}, {f.check}: {f.message}" for f in updates[entry.name].findings]
        fingerprints[entry.name] = tuned.fingerprint()
    verifiers = {name: source_digest(p.verifier) for name, p in prompts.items()}
    digests = {p: file_digest(Path(p)) for p in sorted({*files.values(), *_other_files(config)})}
    known = {"base": base.fingerprint(), "models": fingerprints, "data": digests, "verifiers": verifiers}
    return Inputs(base, tokenizer, updates, data, files, prompts, measured, known, notes)


def identity(config: RunConfig, inputs: Inputs) -> tuple[dict[str, Any], dict[str, Any]]:
    """What decides the result (the configuration but for where it is written, the inputs' content, the version), and what
    decides the cached stages: the same without the verifiers' code, since rewards are given again when that changes, and
    without `attribution`, which has stages of its own that no other one depends on."""
    asked = config.model_dump(exclude={"output"})
    files = {name: value for name, value in inputs.fingerprints.items() if name != "verifiers"}
    whole = {"version": __version__, "config": asked, "inputs": inputs.fingerprints}
    kept = {name: value for name, value in asked.items() if name != "attribution"}
    return whole, {"version": __version__, "config": kept, "inputs": files}


def _refuse_leaks(
    config: RunConfig, data: dict[tuple[str, str], Domain], measured: dict[tuple[str, str], Domain]
) -> None:
    """What is measured must not come from what predicts: refuse the predicting sequences, in whatever order."""
    for (model, name), rollouts in measured.items():
        fresh = sorted((s.prompt, s.response) for s in rollouts.sequences)
        for objective in config.objective:
            used = data[objective, name].sequences
            if OBJECTIVES[objective].rewards and fresh == sorted((s.prompt, s.response) for s in used):
                raise InputError(
                    got=f"measurement of {model!r} on {name!r} with the very sequences that make the prediction",
                    expected="fresh rollouts: what is measured must not come from what predicts",
                    remedy="sample the model again on held-out prompts",
                )


def source_digest(verifier: Verifier) -> str:
    """A short name of the verifier's code: the file that defines it."""
    file = inspect.getsourcefile(inspect.unwrap(verifier))
    return file_digest(Path(file)) if file else "no source"


def _read_data(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, notes: list[str]
) -> tuple[dict[tuple[str, str], Domain], dict[tuple[str, str], str]]:
    data: dict[tuple[str, str], Domain] = {}
    files: dict[tuple[str, str], str] = {}
    for entry in config.domains:
        for objective in config.objective:
            path = entry.path(objective)
            assert path is not None  # RunConfig checks it
            rows = read_jsonl(path)
            domain = Domain.from_rows(rows, tokenizer=tokenizer, name=entry.name, limit=config.limit, source=path)
            if len(domain.sequences) < len(rows):
                notes.append(
                    f"{entry.name}, {objective}: {len(domain.sequences)} of {len(rows)} rows used (limit: {config.limit} prompts)"
                )
            if OBJECTIVES[objective].rewards:
                reward_terms(domain)
            data[objective, entry.name], files[objective, entry.name] = domain, path
    return data, files


def read_prompts(
    name: str,
    path: str,
    verifier: str,
    tokenizer: PreTrainedTokenizerBase,
    search_path: Sequence[Path],
    limit: int | None,
    notes: list[str],
) -> Prompts:
    """The held-out prompts of a domain with their verifier, which is tried on an empty response.

    Raises InputError for a file or row that cannot be used, a prompt that occurs twice, and a verifier that raises.
    """
    every = read_jsonl(path)
    rows = every[:limit]
    if len(rows) < len(every):
        notes.append(f"{name}: the first {len(rows)} of {len(every)} held-out prompts used (limit: {limit})")
    encoded = [encode_prompt(row, tokenizer, f"{path}, row {i}") for i, row in enumerate(rows, start=1)]
    texts = [prompt_text(row, tokenizer, f"{path}, row {i}") for i, row in enumerate(rows, start=1)]
    columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(k for row in rows for k in row)}
    for key in ("prompt", "prompts", "completions", "messages", "prompt_token_ids", "response", "reward"):
        columns.pop(key, None)
    ids, names = [e[0] for e in encoded], [e[1] for e in encoded]
    if len(set(names)) != len(names):
        raise InputError(
            got=f"{path} with a prompt that occurs twice ({next(n for n in names if names.count(n) > 1)!r})",
            expected="every prompt once",
            remedy="remove the repetition; `samples` sets the responses per prompt",
        )
    chats = [None if isinstance(row.get("prompt"), str) else messages(row) for row in rows]
    prompts = Prompts(ids, texts, chats, names, columns, load_verifier(verifier, search_path))
    prompts.rewards([0], [""])  # a verifier that raises does so now, before anything is sampled
    return prompts


def _other_files(config: RunConfig) -> list[str]:
    return [m.data for m in config.measurements] + [d.prompts for d in config.domains if d.prompts]


def sampled_rows(prompts: Prompts, rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
    """Rollouts, not rewarded yet, as JSONL rows that Domain.from_rows reads."""
    return [
        {
            "prompt_id": prompts.prompt_ids[r.prompt_index],
            "prompt": prompts.texts[r.prompt_index],
            "response": r.response,
            "eos": r.eos,
            "prompt_token_ids": list(r.prompt_token_ids),
            "response_token_ids": list(r.response_token_ids),
        }
        for r in rollouts
    ]
