"""Everything that a probe's RUN.yaml names, opened and checked before anything is computed or written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interference import __version__
from interference.checkpoint import Checkpoint
from interference.domain import Domain, encode_prompt, read_jsonl
from interference.errors import InputError, nearest
from interference.inputs import Prompts, read_prompts, source_digest
from interference.pairing import Base, stop_at_fatal
from interference.probes.samples import ItemRewards
from interference.probes.scored import Trajectories, scored_from_rows
from interference.probes.trajectories import Trajectory
from interference.probes.verdicts import Verdict
from interference.probing.config import LEAST, ProbeConfig
from interference.probing.judgment import (
    Judgment,
    Place,
    extractor_digest,
    judges,
    open_judgment,
    read_planted,
    read_verdicts,
)
from interference.records import file_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Key = tuple[str, str]


@dataclass(frozen=True)
class Responses:
    """What one model answered to one domain's prompts: the JSONL rows, and the same as token ids, in the same order.
    left_out: ids of prompts beyond the limit, whose responses are not used."""

    rows: list[dict[str, Any]]
    domain: Domain
    left_out: frozenset[str] = frozenset()

    @property
    def rewarded(self) -> bool:
        """Whether every response has a reward."""
        return all(s.reward is not None for s in self.domain.sequences)


@dataclass(frozen=True)
class Inputs:
    """Opened inputs of a probe. tuned: checkpoints of the models that have one; given: {(model, domain): responses made
    elsewhere}; scored: those of them that came with log-probabilities under all models; judgment: None where nothing is
    judged here; verdicts: those made elsewhere; planted: {domain: wrong responses with the step of their error}."""

    base: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    tuned: dict[str, Checkpoint]
    prompts: dict[str, Prompts]
    given: dict[Key, Responses]
    scored: frozenset[Key]
    judgment: Judgment | None
    verdicts: dict[Place, list[Verdict]]
    planted: dict[str, list[Trajectory]]
    fingerprints: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def items(self, model: str, domain: str) -> set[str]:
        """Ids of the prompts that a model answers."""
        given = self.given.get((model, domain))
        return set(self.prompts[domain].prompt_ids if given is None else given.domain.prompt_ids)


def open_inputs(
    config: ProbeConfig, search_path: Sequence[Path], progress: Callable[[str], None] = lambda _: None
) -> Inputs:
    """Open and check every input of a probe. Raises InputError at the first that cannot be used; writes nothing."""
    base = Checkpoint.open(config.base_model)
    tokenizer, notes = base.tokenizer(), list[str]()
    judgment = open_judgment(config.judge, tokenizer, search_path) if judges(config) else None
    prompts = {
        d.name: read_prompts(d.name, d.prompts, d.verifier, tokenizer, search_path, config.limit, notes)
        for d in config.domains
        if d.prompts and d.verifier
    }
    given, files = _read_given(config, tokenizer, prompts, notes)
    verdicts = read_verdicts(
        config, {key: r.rows for key, r in given.items()}, {key: r.left_out for key, r in given.items()}
    )
    planted = read_planted(config)
    scored = frozenset(key for key, found in given.items() if _scored(found, config.names, key, notes))
    tuned = {m.name: Checkpoint.open(m.model) for m in config.models if m.model is not None}
    known = Base.of(base)
    for name, checkpoint in tuned.items():
        progress(f"checking {name}")
        findings = known.pair(checkpoint).findings
        stop_at_fatal(findings)
        notes += [f"{name}: {f.severity}, {f.check}: {f.message}" for f in findings]
    files |= {d.prompts for d in config.domains if d.prompts} | {v.data for v in config.verdicts}
    files |= {d.planted for d in config.domains if d.planted and d.name in planted}
    files |= set(config.judge.templates.values()) if judgment is not None else set()
    fingerprints = {
        "base": base.fingerprint(),
        "models": {name: c.fingerprint() for name, c in tuned.items()},
        "data": {p: file_digest(Path(p)) for p in sorted(files)},
        "extractor": extractor_digest(config, search_path),
        "verifiers": {name: source_digest(p.verifier) for name, p in prompts.items()},
    }
    inputs = Inputs(base, tokenizer, tuned, prompts, given, scored, judgment, verdicts, planted, fingerprints, notes)
    _check_complete(config, inputs)
    _check_rewards(config, inputs)
    if "routes" in config.probes:
        _check_routes(config, inputs)
    return inputs


def identity(config: ProbeConfig, inputs: Inputs) -> tuple[dict[str, Any], dict[str, Any]]:
    """What decides the result (the configuration but for where it is written, the inputs' content, the version), and what
    decides the cached stages: the same without the verifiers' code, since rewards are given again when that changes."""
    asked = config.model_dump(exclude={"output"})
    files = {name: value for name, value in inputs.fingerprints.items() if name != "verifiers"}
    whole = {"version": __version__, "command": "probe", "config": asked}
    return whole | {"inputs": inputs.fingerprints}, whole | {"inputs": files}


def weights_needed(config: ProbeConfig, inputs: Inputs) -> list[str]:
    """Models whose weights something is computed with; none where given rollouts and log-probabilities hold everything."""
    pairs = [(m, d) for m in config.names for d in config.answered]
    if "neighborhoods" in config.probes and any(key not in inputs.scored for key in pairs):
        return config.names
    needed = {*judges(config)} | {m for m, d in pairs if (m, d) not in inputs.given}
    if config.forecast_models:
        needed |= {"base", *config.forecast_models}
    if "routes" in config.probes:
        needed |= {"base", *config.experts}
    return [m for m in config.names if m in needed]


def given_scores(found: Responses, names: Sequence[str], key: Key) -> Trajectories:
    """Responses that came with log-probabilities under all models. Raises InputError for what can be none."""
    kept = [row | {"logps": {name: row["logps"][name] for name in names}} for row in found.rows]
    return scored_from_rows(kept, policy=key[0], domain=key[1], source=f"rollouts of {key[0]!r} on {key[1]!r}")


def _read_given(
    config: ProbeConfig, tokenizer: Any, prompts: Mapping[str, Prompts], notes: list[str]
) -> tuple[dict[Key, Responses], set[str]]:
    """Rollouts made elsewhere, by model and domain, and the files that held them."""
    rows: dict[Key, list[dict[str, Any]]] = {}
    source: dict[Key, str] = {}
    for entry in config.rollouts:
        rows[entry.model, entry.domain] = _identified(entry.data, tokenizer)
        source[entry.model, entry.domain] = entry.data
    for domain in config.domains:
        for name, found in _by_model(domain.data, tokenizer, config.names).items() if domain.data else ():
            if (name, domain.name) in rows:
                raise InputError(
                    got=f"rollouts of {name!r} on {domain.name!r} in {domain.data} and in {source[name, domain.name]}",
                    expected="one file for each model and domain",
                    remedy="remove one of the two",
                )
            rows[name, domain.name], source[name, domain.name] = found, str(domain.data)
    used_prompts = {d.name: _kept(config, d.name, rows, prompts.get(d.name)) for d in config.domains}
    given = {}
    for (model, name), every in rows.items():
        kept = used_prompts[name]
        used = [row for row in every if row["prompt_id"] in kept]
        if len(used) < len(every):
            notes.append(f"{model} on {name}: {len(used)} of {len(every)} rows used (limit: {config.limit} prompts)")
        if every and not used:
            raise InputError(
                got=f"{source[model, name]} without any of the {len(kept)} prompts of {name!r} within the limit",
                expected="responses of every model to the same prompts (prompt_id)",
                remedy="sample those prompts, or raise `limit`",
            )
        domain_of = Domain.from_rows(used, tokenizer=tokenizer, name=name, source=source[model, name])
        given[model, name] = Responses(used, domain_of, frozenset(row["prompt_id"] for row in every) - kept)
    return given, set(source.values())


def _kept(
    config: ProbeConfig, domain: str, rows: Mapping[Key, Sequence[Mapping[str, Any]]], prompts: Prompts | None
) -> set[str]:
    """Ids of a domain's prompts within the limit, the same for all models, whatever the order of their files: the first of the
    domain's `prompts`, then of the base's file, then of the others."""
    given = [rows[name, domain] for name in config.names if (name, domain) in rows]
    order = dict.fromkeys(row["prompt_id"] for every in given for row in every)
    if prompts is not None:
        sampled = len(given) < len(config.names)
        order = dict.fromkeys([*(i for i in prompts.prompt_ids if sampled or i in order), *order])
    return set(list(order)[: config.limit])


def _by_model(path: str, tokenizer: Any, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Rows of a file by the model that they name, the base where they name none."""
    out: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(_identified(path, tokenizer), start=1):
        name = str(row.get("model", "base"))
        if name not in names:
            raise InputError(
                got=f"{path}, row {number}: model {name!r}",
                expected="'base' or the name of one of the models",
                remedy=nearest(name, names),
            )
        out.setdefault(name, []).append(row)
    return out


def _identified(path: str, tokenizer: Any) -> list[dict[str, Any]]:
    """Rows of a file, each with its prompt's id, so that all probes mean the same prompt by it."""
    rows = read_jsonl(path)
    ids = [encode_prompt(row, tokenizer, f"{path}, row {number}")[1] for number, row in enumerate(rows, start=1)]
    return [row | {"prompt_id": i} for row, i in zip(rows, ids, strict=True)]


def _scored(found: Responses, names: Sequence[str], key: Key, notes: list[str]) -> bool:
    """Whether rollouts came with log-probabilities under all models, which are checked; a note where under some only."""
    here = [row["logps"] for row in found.rows if isinstance(row.get("logps"), dict)]
    complete = len(here) == len(found.rows) and all(set(names) <= set(logps) for logps in here)
    if complete:
        given_scores(found, names, key)
    if here and not complete:
        lacking = sorted(set(names) - set(here[0]))
        notes.append(
            f"{key[0]} on {key[1]}: the log-probabilities given lack "
            + (", ".join(lacking) if lacking else "some rows")
            + "; all were computed here"
        )
    return complete


def _check_complete(config: ProbeConfig, inputs: Inputs) -> None:
    """Every model's rollouts on every domain are given or can be sampled, and weights are at hand where they are needed."""
    for domain in config.answered:
        for name in config.names:
            if (name, domain) not in inputs.given and domain not in inputs.prompts:
                who = "the base" if name == "base" else repr(name)
                raise InputError(
                    got=f"no rollouts of {who} on the held-out prompts of {domain!r}",
                    expected="rollouts of the base and of every model on every domain",
                    remedy="give them in `rollouts`, or `prompts` and a `verifier` for the domain to sample them here",
                )
    for name in weights_needed(config, inputs):
        if name != "base" and name not in inputs.tuned:
            raise InputError(
                got=f"model {name!r} without its weights (`model`), with which something must be computed",
                expected="weights, or rollouts with `logps` under all models on every domain, no judging here and, of an expert, "
                "no routes",
                remedy="give its `model`, or what is missing of these, or name the other `probes`",
            )


def _check_rewards(config: ProbeConfig, inputs: Inputs) -> None:
    """Rewards where probes need them; for skills in [0, 1], the same items of all models, and samples enough of each."""
    for (model, domain), found in inputs.given.items():
        lacking = sum(s.reward is None for s in found.domain.sequences)
        located = "locus" in config.probes and domain not in inputs.planted
        if lacking and (located or {"skills", "self_verification"} & set(config.probes)):
            raise InputError(
                got=f"rollouts of {model!r} on {domain!r} with {lacking} of {len(found.rows)} rows without a reward",
                expected="a `reward` in every row, of which skills, the scores of a judge and the locus of error are made",
                remedy="add rewards to the JSONL, or ask for the probe neighborhoods alone",
            )
        if "skills" in config.probes:
            ItemRewards.of({model: found.domain}).of_model(model, LEAST[config.kinds[model]])
    if not {"skills", "neighborhoods"} & set(config.probes):
        return
    for entry in config.domains:
        wanted = inputs.items("base", entry.name)
        for model in config.names:
            odd = sorted(wanted ^ inputs.items(model, entry.name))
            if odd:
                raise InputError(
                    got=f"prompt {odd[0]!r} (of {len(odd)}) of {entry.name!r} answered by only one of 'base' and {model!r}",
                    expected="every model sampled on the same prompts (prompt_id)",
                    remedy="sample the missing prompts, or keep those that all models share",
                )


def _check_routes(config: ProbeConfig, inputs: Inputs) -> None:
    """Two prompts or more of everything that is split in halves, and rewards where gradients need them."""
    for domain in config.domains:
        for model in ("base", *config.experts):
            if len(inputs.items(model, domain.name)) < 2:
                raise InputError(
                    got=f"a single prompt of {domain.name!r} for {model!r}",
                    expected="two prompts or more, since routes of half of them are compared with those of the other half",
                    remedy="add prompts, or leave the probe routes out (`probes`)",
                )
        found = inputs.given.get(("base", domain.name))
        if config.routes.gradients == "reward" and found is not None and not found.rewarded:
            raise InputError(
                got=f"rollouts of the base on {domain.name!r} with rows without a reward",
                expected="a `reward` in every row, of which the probe routes makes the policy gradient",
                remedy="add rewards to the JSONL, or set routes.gradients to nll (the gradient of the responses' negative "
                "log-likelihood) or null (none)",
            )
