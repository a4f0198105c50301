"""The stages of a probe in which models judge. Each leaves a file in the run's folder and reads it when it is there.

cache/verdicts/DOMAIN/MODE/MODEL.parquet       MODEL's verdicts on its own responses
cache/horizon/DOMAIN/MODEL-REWARDS.parquet     scores of its verdicts on their first parts
cache/locus/DOMAIN/MODEL-REWARDS.parquet       from which step on it holds wrong ones for wrong, and where they went wrong
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pandas as pd

from interference import records
from interference.probes import horizon
from interference.probes.judge import verdict_tokens
from interference.probes.locus import judge_loci, prefix_rollouts, success_drop
from interference.probes.trajectories import Trajectory, rewards, token_count, trajectories_from_rows
from interference.probes.verdicts import Judge, Verdict, judge_log_odds, judge_sampled
from interference.probing.stages import Work, responses

_NO_FALL = 0.5
"""Where it is likelier than this that success falls at no step of a response, its error has no step."""

_UNKNOWN = "whose prompt is not among the domain's `prompts`, by which they would be continued"
_NO_ROOM = "that the model's context leaves no room to continue (locus.max_new_tokens)"


def trajectories(work: Work, model: str, domain: str) -> list[Trajectory]:
    """A model's responses as a judge reads them."""
    return trajectories_from_rows(responses(work, model, domain).rows, f"rollouts of {model!r} on {domain!r}")


def judge_of(work: Work, model: str, domain: str, mode: str, what: str) -> Judge:
    """The model as a judge, with what it said before."""
    asked, judgment = work.config.judge, work.inputs.judgment
    assert judgment is not None  # opened wherever something is judged
    tokenizer, template = work.inputs.tokenizer, judgment.templates[mode]
    cache, progress = work.folder / "cache" / "ledgers" / "verdicts" / domain / f"{model}.jsonl", work.progress(what)
    if asked.verdicts == "log_odds":
        return partial(
            judge_log_odds, work.models[model], tokenizer, template, extract=judgment.extract, cache=cache,
            tokens=verdict_tokens(tokenizer, judgment.yes, judgment.no), batch_tokens=work.config.batch_tokens,
            progress=progress,
        )  # fmt: skip
    return partial(
        judge_sampled, work.models[model], tokenizer, template, samples=asked.samples, yes=judgment.yes, no=judgment.no,
        max_new_tokens=asked.max_new_tokens, verdict=asked.pattern, extract=judgment.extract, cache=cache,
        batch_size=work.config.sampling.batch_size, seed=work.config.seed, progress=progress,
    )  # fmt: skip


def verdicts(work: Work, model: str, domain: str, mode: str) -> list[Verdict]:
    """The model's verdicts on its own responses, in their order: given, or made here."""
    if (model, domain, mode) in work.inputs.verdicts:
        return work.inputs.verdicts[model, domain, mode]
    path = work.folder / "cache" / "verdicts" / domain / mode / f"{model}.parquet"
    if not path.is_file():
        what = f"{model} judges itself on {domain} ({mode})"
        work.say(what)
        found = judge_of(work, model, domain, mode, what)(trajectories(work, model, domain))
        records.write_table(path, pd.DataFrame([{f.name: getattr(v, f.name) for f in fields(Verdict)} for v in found]))
    return [Verdict(**{str(k): v for k, v in row.items()}) for row in pd.read_parquet(path).to_dict("records")]


def horizon_of(work: Work, model: str, domain: str) -> pd.DataFrame:
    """Scores of the model's verdicts on the first parts of its own responses."""
    digest, config = work.rewards_digest((model, domain)), work.config
    path = work.folder / "cache" / "horizon" / domain / f"{model}-{digest}.parquet"
    if not path.is_file():
        what = f"{model} judges the first parts of its responses on {domain}"
        work.say(what)
        found = horizon.horizon(
            trajectories(work, model, domain), judge_of(work, model, domain, "process", what), work.inputs.tokenizer,
            fractions=config.horizon, threshold=config.judge.threshold, seed=config.seed,
            model=model, domain=domain, mode="process",
        )  # fmt: skip
        records.write_table(path, found)
    return pd.read_parquet(path)


def locus_of(work: Work, model: str, domain: str) -> pd.DataFrame:
    """From which step on the model holds wrong responses for wrong, and where they went wrong, a row each.

    The responses are the domain's planted ones, whose step is known; else the model's own, where the step is sought at which
    its continuations cease to succeed. Of those a prompt gives one before any gives a second.

    Columns: model, domain, source, prompt_id, steps, locus (NaN: the judge holds the whole for right), step (NaN: success
    falls nowhere), step_low, step_high (the credible steps), no_fall (the probability of no fall).
    """
    planted = domain in work.inputs.planted
    source = "planted" if planted else "rollouts"
    path = _locus_path(work, model, domain)
    about = path.with_suffix(".json")
    if not (path.is_file() and about.is_file()):
        wrong, skipped = (work.inputs.planted[domain], {}) if planted else _wrong(work, model, domain)
        records.write_json(about, skipped)
        records.write_table(path, _loci(work, model, domain, wrong).assign(model=model, domain=domain, source=source))
    return pd.read_parquet(path)


def notes_on_locus(work: Work) -> list[str]:
    """Where no error could be located, and how many wrong responses were passed over, and why."""
    notes = []
    for model in work.config.names:
        for domain in work.domains:
            rows, path = locus_of(work, model, domain), _locus_path(work, model, domain)
            skipped: dict[str, int] = records.read_json(path.with_suffix(".json"))
            whys = "; ".join(f"{count} {why}" for why, count in skipped.items())
            if whys:
                located = len(rows)
                notes.append(
                    f"{model} on {domain}: errors located in {located} wrong responses, and others passed over: {whys}"
                )
            elif rows.empty:
                notes.append(f"no wrong responses of {model} on {domain} in which to locate an error")
    return notes


def _locus_path(work: Work, model: str, domain: str) -> Path:
    planted = domain in work.inputs.planted
    stem = "planted" if planted else f"{work.rewards_digest((model, domain))}-{_code(work, domain)}"
    return work.folder / "cache" / "locus" / domain / f"{model}-{stem}.parquet"


def _code(work: Work, domain: str) -> str:
    return str(work.inputs.fingerprints["verifiers"][domain])[:8]


def _wrong(work: Work, model: str, domain: str) -> tuple[list[Trajectory], dict[str, int]]:
    """Wrong responses of a model for which there is room to continue them, with what their verifier needs; and how many were
    passed over before there were enough, by the reason."""
    every, prompts, config = trajectories(work, model, domain), work.inputs.prompts[domain], work.config
    nth: dict[str, int] = {}
    turns = []
    for t, reward in zip(every, rewards(every), strict=True):
        if reward < config.judge.threshold:
            nth[t.prompt_id] = nth.get(t.prompt_id, 0) + 1
            turns.append((nth[t.prompt_id], t))
    place = {name: i for i, name in enumerate(prompts.prompt_ids)}
    context = getattr(getattr(work.models[model].module, "config", None), "max_position_embeddings", None)
    kept, skipped = list[Trajectory](), dict[str, int]()
    for _, t in sorted(turns, key=lambda turn: turn[0]):
        if len(kept) == config.locus.limit:
            break
        here = place.get(t.prompt_id)
        if here is None:
            skipped[_UNKNOWN] = skipped.get(_UNKNOWN, 0) + 1
            continue
        longest = len(prompts.ids[here]) + token_count(work.inputs.tokenizer, t.response) + _new_tokens(work)
        if context is None or longest <= context:
            columns = {key: values[here] for key, values in prompts.columns.items()}
            kept.append(replace(t, columns={**t.columns, **columns}))
        else:
            skipped[_NO_ROOM] = skipped.get(_NO_ROOM, 0) + 1
    return kept, skipped


def _new_tokens(work: Work) -> int:
    return work.config.locus.max_new_tokens or work.config.sampling.max_new_tokens


def _loci(work: Work, model: str, domain: str, wrong: list[Trajectory]) -> pd.DataFrame:
    columns = ["prompt_id", "steps", "locus", "step", "step_low", "step_high", "no_fall"]
    if not wrong:
        return pd.DataFrame(columns=columns)
    config = work.config
    what = f"{model} judges the prefixes of wrong responses on {domain}"
    work.say(what)
    judge = judge_of(work, model, domain, "process", what)
    found = judge_loci(wrong, judge, separator=config.locus.separator, threshold=config.judge.threshold)
    if domain in work.inputs.planted:
        truth = [(float(t.error_step or 0),) * 3 + (0.0,) for t in wrong]
    else:
        truth = [_fall(counts, config.locus.samples) for counts in _continued(work, model, domain, wrong)]
    rows = [
        (one.prompt_id, one.steps, float("nan") if one.step is None else float(one.step), *true)
        for one, true in zip(found, truth, strict=True)
    ]
    return pd.DataFrame(rows, columns=columns)


def _continued(work: Work, model: str, domain: str, wrong: list[Trajectory]) -> list[list[int]]:
    config, what = work.config, f"{model} continues prefixes of wrong responses on {domain}"
    work.say(what)
    return prefix_rollouts(
        work.models[model], work.inputs.tokenizer, wrong, work.inputs.prompts[domain].verifier,
        samples=config.locus.samples, max_new_tokens=_new_tokens(work), separator=config.locus.separator,
        threshold=config.judge.threshold, batch_size=config.sampling.batch_size,
        seed=int(records.digest(["locus", config.seed, domain, model])[:8], 16),
        cache=work.folder / "cache" / "ledgers" / "continuations" / domain / f"{model}.jsonl",
        progress=work.progress(what),
    )  # fmt: skip


def _fall(counts: list[int], samples: int) -> tuple[float, float, float, float]:
    """The most probable step of the fall, the ends of the credible ones, and the probability of no fall."""
    drop = success_drop(counts, samples)
    if drop.none > _NO_FALL:
        return float("nan"), float("nan"), float("nan"), drop.none
    return float(drop.step), float(min(drop.credible)), float(max(drop.credible)), drop.none
