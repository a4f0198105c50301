"""A model's verdicts on trajectories: yes/no token log-odds, sampled verdicts, or verdicts read from JSONL. Cached, resumable."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from interference import domain as data
from interference.errors import InputError
from interference.model import Model, check_fits
from interference.probes.judge import JudgeTemplate, VerdictTokens, verdict_tokens
from interference.probes.ledger import Ledger, model_digest, sample_responses
from interference.probes.trajectories import Extractor, Trajectory, pattern, rewards
from interference.records import digest


@dataclass(frozen=True)
class Verdict:
    """What a judge says about one trajectory.

    yes: the share of its verdicts that say "correct": 1 or 0 for log-odds (above zero or not), k/n for n sampled verdicts, NaN
    where none can be read.  score: what ranks trajectories, the log-odds of "correct" or the share of yes.  probability: that
    of "correct", the logistic function of the log-odds or the share of yes.  samples, unparsable: verdicts drawn, and how many
    of them could not be read.  log_mass: log of the probability that the judge gives to yes and no together (near zero when
    the format of the question is understood), NaN where not known.
    """

    yes: float
    score: float
    probability: float
    samples: int = 1
    unparsable: int = 0
    log_mass: float = math.nan

    @classmethod
    def from_log_odds(cls, log_odds: float, log_mass: float = math.nan) -> Verdict:
        """The verdict of log p(yes) - log p(no)."""
        small = math.exp(-abs(log_odds))  # never overflows
        return cls(float(log_odds > 0), log_odds, (1.0 if log_odds > 0 else small) / (1 + small), log_mass=log_mass)

    @classmethod
    def from_probability(cls, probability: float) -> Verdict:
        """The verdict of the probability that the judge gives to "correct"."""
        return cls(float(probability > 0.5), probability, probability)

    @classmethod
    def from_samples(cls, verdicts: Sequence[bool | None]) -> Verdict:
        """The verdict of several draws, None for one that could not be read."""
        read = [verdict for verdict in verdicts if verdict is not None]
        share = sum(read) / len(read) if read else math.nan
        return cls(share, share, share, len(verdicts), len(verdicts) - len(read))


Judge = Callable[[Sequence[Trajectory]], list[Verdict]]
"""Verdicts on trajectories, one each: `functools.partial(judge_log_odds, model, tokenizer, template)`, or any function."""


@dataclass(frozen=True)
class Judged:
    """Verdicts beside verifiable rewards, one entry per trajectory."""

    prompt_ids: tuple[str, ...]
    rewards: tuple[float, ...]
    verdicts: tuple[Verdict, ...]

    def __post_init__(self) -> None:
        sizes = {"prompt ids": len(self.prompt_ids), "rewards": len(self.rewards), "verdicts": len(self.verdicts)}
        if len(set(sizes.values())) != 1 or not self.verdicts:
            raise InputError(
                got=", ".join(f"{count} {name}" for name, count in sizes.items()),
                expected="one of each for every trajectory, and at least one",
                remedy="give lists of one length",
            )


def judged(trajectories: Sequence[Trajectory], judge: Judge) -> Judged:
    """The verdicts of a judge beside the rewards; InputError where rewards are missing."""
    known = rewards(trajectories)
    return Judged(tuple(t.prompt_id for t in trajectories), tuple(known), tuple(judge(trajectories)))


def judge_log_odds(
    model: Model,
    tokenizer: Any,
    template: JudgeTemplate,
    trajectories: Sequence[Trajectory],
    *,
    extract: Extractor | None = None,
    tokens: VerdictTokens | None = None,
    cache: str | os.PathLike[str] | None = None,
    batch_tokens: int = 16384,
    progress: Callable[[int, int], None] | None = None,
) -> list[Verdict]:
    """Verdicts by log p(any yes-token) - log p(any no-token) as the next token after the question; no sampling.

    Equal questions are asked once. With a `cache` (JSONL) every batch is kept as soon as it is done, by the digests of model,
    question (its token ids, which template and trajectory decide) and verdict tokens; what is there is not computed again.

    Raises InputError for templates and tokens that do not fit the tokenizer (see `judge`), and for questions longer than the
    model's context.
    """
    tokens = tokens or verdict_tokens(tokenizer)
    questions = template.encode(tokenizer, trajectories, extract)
    _check_room(model, template, questions, 0)
    ledger, name = Ledger.open(cache), model_digest(model)
    keys = [digest(["log_odds", name, ids, tokens.yes, tokens.no]) for ids in questions]
    first = {key: place for place, key in reversed(list(enumerate(keys)))}
    pending = [place for key, place in first.items() if key not in ledger.rows]
    done = len(first) - len(pending)
    for batch in log_odds(model, [questions[place] for place in pending], tokens, batch_tokens):
        ledger.add(
            [
                {
                    "key": keys[pending[i]], "model": name, "template": template.digest,
                    "trajectory": trajectories[pending[i]].digest, "log_odds": odds, "log_mass": mass,
                }
                for i, odds, mass in batch
            ]
        )  # fmt: skip
        done += len(batch)
        if progress is not None:
            progress(done, len(first))
    return [Verdict.from_log_odds(ledger.rows[key]["log_odds"], ledger.rows[key]["log_mass"]) for key in keys]


@torch.no_grad()
def log_odds(
    model: Model, questions: Sequence[tuple[int, ...]], tokens: VerdictTokens, batch_tokens: int = 16384
) -> Iterator[list[tuple[int, float, float]]]:
    """(place, log-odds of yes against no, log of their joint probability) of the next token, batch by batch, shortest first."""
    rows = [data.Sequence(ids, (), "") for ids in questions]
    yes, no = (torch.tensor(side, device=model.device) for side in (tokens.yes, tokens.no))
    for batch in data.batches(rows, model.pad, model.fit_tokens(batch_tokens)):
        ends = torch.tensor([len(questions[i]) for i in batch.index], device=model.device)
        width = batch.input_ids.shape[1]
        keep = width - int(ends.min()) + 1
        logits = model.forward(batch.input_ids.to(model.device), keep)
        last = logits[torch.arange(len(ends), device=model.device), ends - 1 - (width - keep)]
        log_p = last.double().log_softmax(-1)
        said_yes, said_no = log_p[:, yes].logsumexp(-1), log_p[:, no].logsumexp(-1)
        odds, mass = (said_yes - said_no).tolist(), torch.logaddexp(said_yes, said_no).tolist()
        if not all(math.isfinite(x) for x in (*odds, *mass)):
            raise InputError(
                got="log-odds that are not finite",
                expected="finite logits at the yes- and no-tokens",
                remedy="check the model's weights, and that no logit is masked",
            )
        yield list(zip(batch.index, odds, mass, strict=True))


def judge_sampled(
    model: Model,
    tokenizer: Any,
    template: JudgeTemplate,
    trajectories: Sequence[Trajectory],
    *,
    samples: int = 1,
    max_new_tokens: int = 16,
    yes: Sequence[str] = ("yes",),
    no: Sequence[str] = ("no",),
    verdict: str | None = None,
    temperature: float = 1.0,
    extract: Extractor | None = None,
    batch_size: int = 256,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Verdict]:
    """Verdicts sampled from the judge and read as the last word in them that says yes or no, in upper or lower case.

    yes, no: the words.  verdict: a regular expression to find the word with instead, in the first group of its last match.
    A response without a match, or with another word in the group, is unparsable: it counts neither as yes nor as no, and is
    counted. What the judge wrote is cached, not how it was read, so another reading samples nothing anew.

    Raises InputError as `judge_log_odds` does, for a pattern without a group, and for words that are missing or on both sides.
    """
    reader = verdict_reader(yes, no, verdict)
    questions = template.encode(tokenizer, trajectories, extract)
    _check_room(model, template, questions, max_new_tokens)
    found = sample_responses(
        model, tokenizer, questions, samples=samples, max_new_tokens=max_new_tokens, temperature=temperature,
        batch_size=batch_size, seed=seed, cache=cache, progress=progress,
    )  # fmt: skip

    return [
        Verdict.from_samples([reader(tokenizer.decode(ids, skip_special_tokens=True)) for ids in responses])
        for responses in found
    ]


def verdict_reader(yes: Sequence[str], no: Sequence[str], verdict: str | None) -> Callable[[str], bool | None]:
    """The function that reads a sampled verdict: true, false, or None where it cannot be read."""
    meaning = {word.strip().casefold(): truth for words, truth in ((no, False), (yes, True)) for word in words}
    if len(meaning) != len({*yes}) + len({*no}) or "" in meaning or not yes or not no:
        raise InputError(
            got=f"yes-words {list(yes)} and no-words {list(no)}",
            expected="different words for yes and for no, upper and lower case being the same",
            remedy="mend the words",
        )
    words = "|".join(re.escape(word) for word in sorted(meaning, key=len, reverse=True))
    compiled = pattern(rf"(?i)(?<!\w)({words})(?!\w)" if verdict is None else verdict, "verdict")
    if compiled.groups < 1:
        raise InputError(
            got=f"verdict pattern {verdict!r} without a group",
            expected="a group that holds the word for yes or no",
            remedy=r"write it as in Verdict:\s*(yes|no)",
        )

    def read(text: str) -> bool | None:
        said = [match.group(1) for match in compiled.finditer(text)]
        return meaning.get((said[-1] or "").strip().casefold()) if said else None

    return read


_VERDICT = ("log_odds", "probability", "yes", "verdict", "verdicts")


def read_judged(path: str | os.PathLike[str]) -> Judged:
    """Verdicts made elsewhere: JSONL rows {prompt_id, reward, and what `given_verdict` reads}.

    Raises InputError, naming file and row, for a row that does not fit.
    """
    rows = data.read_jsonl(path)
    verdicts = [given_verdict(row, f"{path}, row {number}") for number, row in enumerate(rows, start=1)]
    known = []
    for number, row in enumerate(rows, start=1):
        reward = row.get("reward")
        if row.get("prompt_id") is None or not isinstance(reward, (bool, int, float)) or not math.isfinite(reward):
            raise InputError(
                got=f"{path}, row {number}: prompt_id {row.get('prompt_id')!r}, reward {reward!r}",
                expected="a `prompt_id`, and as `reward` a finite number",
                remedy="add them: the judge is scored against the reward, with error bars over prompts",
            )
        known.append(float(reward))
    return Judged(tuple(str(row["prompt_id"]) for row in rows), tuple(known), tuple(verdicts))


def given_verdict(row: Mapping[str, Any], where: str) -> Verdict:
    """The verdict of a row made elsewhere, which holds one of

        log_odds     log p(yes) - log p(no), a finite number
        probability  that of "correct", from 0 to 1
        yes          a verdict, or a probability that is neither 0 nor 1; `verdict` is another name for it
        verdicts     a list of sampled verdicts

    A verdict is true or false, 1 or 0, "yes" or "no", or null where it could not be read.

    Raises InputError for a row with none of them, with more than one, or with one that does not fit.
    """
    held = [key for key in _VERDICT if key in row]
    if len(held) != 1:
        raise InputError(
            got=f"{where} with " + (" and ".join(held) if held else f"keys {sorted(row)}"),
            expected="one of " + ", ".join(f"`{key}`" for key in _VERDICT),
            remedy="remove all but one of them" if held else "add the judge's verdict",
        )
    (key,) = held
    value = row[key]
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    if key == "log_odds" and plain and math.isfinite(value):
        return Verdict.from_log_odds(float(value))
    if plain and 0 <= value <= 1 and (key == "probability" or (key != "verdicts" and 0 < value < 1)):
        return Verdict.from_probability(float(value))
    several = value if key == "verdicts" else [value]
    if key in ("log_odds", "probability") or not isinstance(several, list) or not several:
        raise InputError(
            got=f"{where}: {key} {value!r}",
            expected={"log_odds": "a finite number", "probability": "a number from 0 to 1"}.get(
                key, "a list of verdicts"
            ),
            remedy="mend the row",
        )
    read = [_truth(verdict) for verdict in several]
    odd = [v for v, truth in zip(several, read, strict=True) if truth is None and v is not None]
    if odd:
        raise InputError(
            got=f"{where}: verdict {odd[0]!r}", expected="true, false, 'yes', 'no' or null", remedy="mend the row"
        )
    return Verdict.from_samples(read)


def _truth(verdict: object) -> bool | None:
    if isinstance(verdict, str):
        return {"yes": True, "no": False}.get(verdict.strip().lower())
    return bool(verdict) if isinstance(verdict, (bool, int, float)) and verdict in (0, 1) else None


def _check_room(model: Model, template: JudgeTemplate, questions: Sequence[tuple[int, ...]], more: int) -> None:
    if not questions:
        raise InputError(got="no trajectories", expected="at least one to judge", remedy="give trajectories")
    check_fits(
        model,
        f"the judge's questions in {template.mode} mode",
        max(map(len, questions)) + more,
        max(max(ids) for ids in questions),
        "shorten the template, or judge shorter trajectories",
    )
