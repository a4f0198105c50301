"""The stages of a diagnosis that take time. Each leaves one file in the run's folder and reads it when it is there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor

from interference import attribution, expansion, measurement, products, records, tree
from interference.anatomy import Anatomy
from interference.checks.result import TRUSTED, Audit
from interference.config import RunConfig, Sampling
from interference.derivatives import objective_gradient
from interference.domain import Domain, read_jsonl
from interference.errors import InputError
from interference.inputs import Inputs, Prompts, sampled_rows
from interference.jets import SequenceJets
from interference.model import Model, check_fits
from interference.probes.ledger import sample_responses
from interference.rollouts import Rollout, end_tokens, sample

Arrays = dict[str, NDArray[np.float64]]
_PAUSE = 10.0  # seconds between two reports of progress


@dataclass
class Work:
    """A run being made: its request, its opened inputs, its folder, the model at the anchor and the updates in memory."""

    config: RunConfig
    inputs: Inputs
    folder: Path
    model: Model
    updates: dict[str, dict[str, Tensor]]
    say: Callable[[str], None]
    fallbacks: dict[str, str] = field(default_factory=dict)

    @property
    def alphas(self) -> list[float]:
        """Where the curves are evaluated; 1, the update itself, is always among them."""
        return sorted({1.0, *self.config.alphas} - {0.0})

    def points(self) -> list[tuple[str, float]]:
        """(update, alpha) in the order in which `scores` lists them."""
        return [(name, alpha) for name in self.updates for alpha in self.alphas]

    def stem(self, objective: str, domain: str) -> str:
        """A file name shared by the objectives that read the same data."""
        digest = self.inputs.fingerprints["data"][self.inputs.files[objective, domain]]
        return f"{domain}-{digest[:8]}"


def audited(work: Work) -> dict[str, Any]:
    """The record of the quick audit that this run's derivatives passed (checks.Audit.to_dict, with its summary).

    The engine must be trusted, and reverse mode where attributions are made; elsewhere a note says that it is refused.

    Raises InputError when they do not pass; nothing is kept then.
    """
    path = work.folder / "tables" / "audit.json"
    if not path.is_file():
        work.say("checking the derivatives")
        config, domains = work.config, work.inputs.data.values()
        found = expansion.quick_audit(
            work.model, work.updates, domains, engine=config.engine, pairs=config.pairs, seed=config.seed
        )
        found.raise_if_failed([config.engine])
        notes = found.notes
        if found.verdicts["reverse"] != TRUSTED:
            if config.attribution:
                _refuse_attribution(found)
            notes = (*notes, f"reverse mode {found.verdicts['reverse']}")
        records.write_json(path, found.to_dict() | {"summary": found.summary, "notes": notes})
    record: dict[str, Any] = records.read_json(path)
    return record


def _refuse_attribution(found: Audit) -> None:
    try:
        found.raise_if_failed(["reverse"])
    except InputError as error:
        raise InputError(
            got=error.got,
            expected="reverse mode that another mode confirms, of which the attribution is made",
            remedy="set `attribution: false`, which needs no reverse mode",
        ) from error


def jets(work: Work, objective: str, domain: str) -> SequenceJets:
    """Per-sequence jets of a domain's data along every update."""
    path = work.folder / "tensors" / f"jets-{work.stem(objective, domain)}.safetensors"

    def make() -> tuple[Arrays, dict[str, str]]:
        work.say(f"derivatives on {domain} ({path.stem})")
        found, fallbacks = expansion.domain_jets(
            work.model,
            work.updates,
            work.inputs.data[objective, domain],
            pairs=work.config.pairs,
            engine=work.config.engine,
            batch_tokens=work.config.batch_tokens,
        )
        return {f: getattr(found, f) for f in found.__dataclass_fields__}, {"fallbacks": json.dumps(fallbacks)}

    arrays, metadata = cached(path, make)
    for operation in json.loads(metadata["fallbacks"]):
        work.fallbacks[operation] = "no Taylor rule for this operation: nested forward mode on it alone, slower"
    return SequenceJets(**arrays)


def scores(
    work: Work, objective: str, domain: str
) -> tuple[measurement.Scores, dict[tuple[str, float], measurement.Scores]]:
    """The domain's data evaluated at the anchor, and at {(update, alpha): ...}."""
    path = work.folder / "tensors" / f"scores-{work.stem(objective, domain)}.safetensors"

    def make() -> tuple[Arrays, dict[str, str]]:
        work.say(f"evaluating the tuned models on {domain} ({path.stem})")
        points = [(work.updates[name], alpha) for name, alpha in work.points()]
        found = measurement.score(work.model, work.inputs.data[objective, domain], points)
        return {"logp": np.stack([s.logp for s in found]), "kl": np.stack([s.kl for s in found])}, {}

    arrays, _ = cached(path, make)
    anchor, *points = [measurement.Scores(s, kl) for s, kl in zip(arrays["logp"], arrays["kl"], strict=True)]
    return anchor, dict(zip(work.points(), points, strict=True))


def rollouts(work: Work, model: str, domain: str) -> Domain | None:
    """Fresh rollouts of `model` (an update's name, or "base") on a domain: given, sampled here, or None.

    All models see the same random numbers on a domain, so that their differences are less noisy than their values.
    """
    given = work.inputs.measured.get((model, domain))
    prompts = work.inputs.prompts.get(domain)
    if given is not None or prompts is None:
        return given
    path = work.folder / "rollouts" / domain / f"{model}.jsonl"
    if not path.is_file():
        work.say(f"sampling {model} on {domain}")
        settings = work.config.sampling
        moved = [] if model == "base" else [work.updates[model]]
        with work.model.at(moved, [1.0] * len(moved)):
            found = sample(
                work.model.module,
                work.inputs.tokenizer,
                prompts.ids,
                samples=settings.samples,
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                seed=int(records.digest(["measure", work.config.seed, domain])[:8], 16),
            )
        write_rows(path, sampled_rows(prompts, found))
    rows = rewarded_rows(path, prompts, work.inputs.fingerprints["verifiers"][domain])
    return Domain.from_rows(rows, tokenizer=work.inputs.tokenizer, name=domain, source=str(path))


def sampled_responses(
    model: Model,
    tokenizer: Any,
    prompts: Prompts,
    settings: Sampling,
    *,
    seed: int,
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Responses of a model to prompts as JSONL rows, not rewarded yet; what an interrupted call had sampled is in `cache`."""
    found = sample_responses(
        model, tokenizer, prompts.ids, samples=settings.samples, max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size, seed=seed, cache=cache, progress=progress,
    )  # fmt: skip
    ends = end_tokens(model.module, tokenizer)
    rollouts = [
        Rollout(i, prompts.ids[i], ids, str(tokenizer.decode(ids, skip_special_tokens=True)), ids[-1] in ends)
        for i, several in enumerate(found)
        for ids in several
    ]
    chats = [prompts.chats[r.prompt_index] for r in rollouts]
    rows = sampled_rows(prompts, rollouts)
    # A judge reads the messages themselves, not what the chat template makes of them.
    return [row | ({} if chat is None else {"prompt": chat}) for row, chat in zip(rows, chats, strict=True)]


def check_prompts(model: Model, name: str, prompts: Prompts, max_new_tokens: int) -> None:
    """Refuse prompts whose responses would not fit into the model's context."""
    longest = max(map(len, prompts.ids)) + max_new_tokens
    remedy = "set sampling.max_new_tokens lower, or shorten the prompts"
    check_fits(model, name, longest, max(map(max, prompts.ids)), remedy)


def now_and_then(say: Callable[[str], None], what: str) -> Callable[[int, int], None]:
    """Says how far a stage is, at most every few seconds."""
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > _PAUSE and done < total:
            last = time.monotonic()
            say(f"{what}: {done} of {total}")

    return report


def rewarded_rows(path: Path, prompts: Prompts, code: str) -> list[dict[str, Any]]:
    """Sampled rows of a file with rewards by the verifier whose source has the digest `code`, which the file then holds."""
    rows = read_jsonl(path)
    if rows[0].get("verifier") != code:  # not rewarded yet, or by code that changed since
        place = {name: i for i, name in enumerate(prompts.prompt_ids)}
        rewards = prompts.rewards([place[row["prompt_id"]] for row in rows], [row["response"] for row in rows])
        rows = [row | {"reward": r, "verifier": code} for row, r in zip(rows, rewards, strict=True)]
        write_rows(path, rows)
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a JSONL file, whole or not at all."""
    records.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def gradient_cosines(work: Work, objective: str) -> dict[str, dict[str, float]]:
    """Cosine of every two domains' gradients at the anchor: {domain: {domain: cosine}}; none where gradients are refused."""
    if not audited(work).get("gradient_trusted", True):
        note = "gradient_cosine was not computed: the gradients of this model do not pass their audit"
        work.inputs.notes.extend([] if note in work.inputs.notes else [note])
        return {}
    path = work.folder / "tables" / f"gradient_cosines-{objective}.json"
    if not path.is_file():
        names = [d.name for d in work.config.domains]
        work.say(f"gradients of {objective}")
        found = {n: objective_gradient(work.model, work.inputs.data[objective, n], objective) for n in names}
        cosines = {a: {b: tree.cosine(found[a], found[b]) for b in names} for a in names}
        plain = {a: {b: None if np.isnan(c) else c for b, c in row.items()} for a, row in cosines.items()}
        records.write_json(path, plain)
    table: dict[str, dict[str, float | None]] = records.read_json(path)
    return {a: {b: float("nan") if c is None else c for b, c in row.items()} for a, row in table.items()}


def unit_products(work: Work, anatomy: Anatomy, objective: str, domain: str) -> NDArray[np.float64]:
    """`products.unit_products` of one objective; the objectives that read the same data are made together."""
    stem = work.stem(objective, domain)
    path = work.folder / "tensors" / f"attribution-{stem}.safetensors"

    def make() -> tuple[Arrays, dict[str, str]]:
        work.say(f"attribution on {domain} ({path.stem})")
        shared = [o for o in work.config.objective if work.stem(o, domain) == stem]
        data = work.inputs.data[objective, domain]
        found = products.unit_products(
            work.model, anatomy, work.updates, data, shared, batch_tokens=work.config.batch_tokens
        )
        return dict(zip(shared, found, strict=True)), {}

    return cached(path, make)[0][objective]


def example_tokens(work: Work, objective: str, domain: str, chosen: dict[str, list[int]]) -> pd.DataFrame:
    """`attribute_tokens` of some sequences for every update: {update: places in the domain}."""
    path = work.folder / "tensors" / f"tokens-{objective}-{work.stem(objective, domain)}.parquet"
    if not path.is_file():
        work.say(f"tokens of examples on {domain} ({objective})")
        found = [
            attribution.attribute_tokens(
                work.model,
                {update: work.updates[update]},
                work.inputs.data[objective, domain],
                objective,
                sequences=places,
                engine=work.config.engine,
                batch_tokens=work.config.batch_tokens,
            )
            for update, places in chosen.items()
        ]
        records.write_table(path, pd.concat(found, ignore_index=True))
    return pd.read_parquet(path)


def cached(path: Path, make: Callable[[], tuple[Arrays, dict[str, str]]]) -> tuple[Arrays, dict[str, str]]:
    """Arrays and metadata of a safetensors file, which is made first where it is not there."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays, metadata = make()
        part = path.with_name(path.name + ".part")
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, part, metadata or None)
        part.replace(path)
    return read_arrays(path)


def read_arrays(path: Path) -> tuple[Arrays, dict[str, str]]:
    """Arrays and metadata of a safetensors file."""
    with safe_open(path, framework="np") as file:
        return load_file(path), file.metadata() or {}
