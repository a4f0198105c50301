"""Locus of error: the step from which a judge holds a wrong trajectory for wrong, against the step where it went wrong.

Steps count from 1; prefix k holds steps 1..k, prefix 0 the prompt alone. Where the true step was not planted it is estimated by
prefix rollouts: continuations are sampled from every prefix, and the step is sought at which their success rate falls.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from interference import statistics
from interference.domain import encode_prompt
from interference.errors import InputError
from interference.inputs import Prompts
from interference.model import Model, check_fits
from interference.probes.ledger import sample_responses
from interference.probes.trajectories import CORRECT, STEPS, Trajectory, rewards, split_steps
from interference.probes.verdicts import Judge
from interference.rollouts import Verifier

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Locus:
    """Where a judge sees a wrong trajectory fail.

    place: of the trajectory in the list given.  steps: K.  step: the locus, None where the judge holds the whole for right.
    probability (K,): the judge's probability of "correct" after each prefix.
    """

    place: int
    prompt_id: str
    steps: int
    step: int | None
    probability: Array = field(repr=False)


def locus(probability: Array) -> int | None:
    """The earliest step k such that the judge's probability of "correct" is below one half after k and all later steps.

    Below one half is below zero in log-odds. None when it is not so after the last step; a verdict that could not be read (NaN)
    is not below.

    >>> locus(np.array([0.9, 0.4, 0.6, 0.3, 0.2])), locus(np.array([0.2, 0.7]))
    (4, None)
    """
    standing = np.flatnonzero(~(np.asarray(probability) < 0.5))
    step = int(standing[-1]) + 2 if len(standing) else 1
    return step if step <= len(probability) else None


def judge_loci(
    trajectories: Sequence[Trajectory], judge: Judge, *, separator: str = STEPS, threshold: float = CORRECT
) -> list[Locus]:
    """The locus of every wrong trajectory (reward below the threshold): the judge reads each of its prefixes.

    Raises InputError for missing rewards and when no trajectory is wrong.
    """
    wrong = [i for i, reward in enumerate(rewards(trajectories)) if reward < threshold]
    if not wrong:
        raise InputError(
            got=f"{len(trajectories)} trajectories, none of them wrong",
            expected=f"some with a reward below {threshold:g}, in which an error can be located",
            remedy="give more trajectories, or harder prompts",
        )
    steps = {i: split_steps(trajectories[i].response, separator) for i in wrong}
    prefixes = [trajectories[i].shown("".join(steps[i][:k])) for i in wrong for k in range(1, len(steps[i]) + 1)]
    found = np.array([verdict.probability for verdict in judge(prefixes)])
    ends = np.cumsum([len(steps[i]) for i in wrong])
    parts = np.split(found, ends[:-1])
    return [
        Locus(i, trajectories[i].prompt_id, len(steps[i]), locus(part), part)
        for i, part in zip(wrong, parts, strict=True)
    ]


@dataclass(frozen=True)
class Drop:
    """Where the success of continuations falls along one trajectory of K steps.

    rates (K + 1,): success rate after prefixes 0..K.
    largest_step, largest_drop, largest_stderr: the step k with the largest rates[k-1] - rates[k], and the standard error of it.
    step: the most probable change point.  posterior (K,): the probability of every step.  none: that of no fall at all.
    credible: the fewest steps that hold 90 % of the posterior of a fall.
    """

    rates: Array = field(repr=False)
    largest_step: int
    largest_drop: float
    largest_stderr: float
    step: int
    posterior: Array = field(repr=False)
    none: float
    credible: tuple[int, ...]


def success_drop(successes: Sequence[int], samples: int) -> Drop:
    """The change point of success counts after prefixes 0..K, each out of `samples`, with its uncertainty.

    Model: success probability a before step c and b < a from then on, (a, b) uniform on b < a, c uniform; "no fall" is one more
    hypothesis, with one level and the same prior weight as a step. With s, f successes and failures on either side,
        p(counts | c) = 2 B(s1 + 1, f1 + 1) B(s2 + 1, f2 + 1) P(b < a | counts).
    A success rate that falls slowly is outside this model; then `credible` is too narrow, and `rates` shows it.

    Raises InputError for fewer than two samples, counts out of range, or fewer than one step.

    >>> drop = success_drop([8, 7, 8, 1, 0], 8)
    >>> drop.step, drop.largest_step, drop.credible
    (3, 3, (3,))
    """
    counts = np.asarray(successes, dtype=float)
    if samples < 2 or len(counts) < 2 or (counts < 0).any() or (counts > samples).any():
        raise InputError(
            got=f"successes {list(successes)} out of {samples}",
            expected="at least two samples per prefix, and counts between 0 and that for every prefix from 0 on",
            remedy="sample more continuations (`samples`)",
        )
    failures = samples - counts
    s, f = np.cumsum(counts)[:-1], np.cumsum(failures)[:-1]
    s2, f2 = counts.sum() - s, failures.sum() - f
    levels = special.betaln(s + 1, f + 1) + special.betaln(s2 + 1, f2 + 1)
    with np.errstate(divide="ignore"):
        fall = levels + np.log(2) + np.log(_ordered(s, f, s2, f2))
    joint = np.r_[fall, special.betaln(counts.sum() + 1, failures.sum() + 1)]
    weights = special.softmax(joint)
    posterior = weights[:-1] / weights[:-1].sum() if weights[:-1].sum() > 0 else np.full(len(fall), 1 / len(fall))
    order = np.argsort(-posterior, kind="stable")
    enough = int(np.searchsorted(np.cumsum(posterior[order]), statistics.LEVEL - 1e-12)) + 1
    rates = counts / samples
    falls = rates[:-1] - rates[1:]
    smooth = (counts + 0.5) / (samples + 1)  # an observed rate of 0 or 1 is not known without error
    variance = smooth * (1 - smooth) / samples
    top = int(np.argmax(falls))
    return Drop(
        rates, top + 1, float(falls[top]), float(np.sqrt(variance[top] + variance[top + 1])), int(order[0]) + 1,
        weights[:-1], float(weights[-1]), tuple(sorted(int(i) + 1 for i in order[:enough])),
    )  # fmt: skip


def _ordered(s1: Array, f1: Array, s2: Array, f2: Array) -> Array:
    """P(b < a) for independent a ~ Beta(s1 + 1, f1 + 1), b ~ Beta(s2 + 1, f2 + 1): E over a's quantiles of b's distribution."""
    nodes, weights = np.polynomial.legendre.leggauss(64)
    a = special.betaincinv((s1 + 1)[:, None], (f1 + 1)[:, None], (nodes + 1) / 2)
    return np.asarray(special.betainc((s2 + 1)[:, None], (f2 + 1)[:, None], a) @ weights / 2)


def prefix_rollouts(
    model: Model,
    tokenizer: Any,
    trajectories: Sequence[Trajectory],
    verifier: Verifier,
    *,
    samples: int,
    max_new_tokens: int,
    separator: str = STEPS,
    temperature: float = 1.0,
    threshold: float = CORRECT,
    batch_size: int = 256,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Successes, out of `samples`, of continuations from prefixes 0..K of every trajectory: (K + 1) counts each.

    Prefixes 0..K-1 are continued by the model (equal prefixes share their continuations) and the whole response, prefix and
    continuation, goes to the verifier in TRL's conventions with the trajectory's columns; success is a reward of at least the
    threshold. Prefix K is the finished trajectory, whose own reward stands for all samples. The prefix is tokenised by itself,
    so a token that would reach over the end of a step is split there.

    Raises InputError for missing rewards, fewer than two samples, no room in the context, or a verifier that fails.
    """
    if samples < 2:
        raise InputError(
            got=f"samples: {samples}", expected="at least two continuations per prefix", remedy="raise `samples`"
        )
    own = rewards(trajectories)
    chats = [None if isinstance(t.prompt, str) else [dict(m) for m in t.prompt] for t in trajectories]
    rows = [{"prompt": t.prompt if chat is None else chat} for t, chat in zip(trajectories, chats, strict=True)]
    ids = [encode_prompt(row, tokenizer, f"trajectory {i}")[0] for i, row in enumerate(rows, start=1)]
    steps = [split_steps(t.response, separator) for t in trajectories]
    places = [i for i, parts in enumerate(steps) for _ in parts]
    texts = ["".join(parts[:k]) for parts in steps for k in range(len(parts))]
    prefixes = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else () for text in texts]
    starts = [ids[i] + prefix for i, prefix in zip(places, prefixes, strict=True)]
    longest, top = max(map(len, starts)) + max_new_tokens, max(max(start) for start in starts)
    check_fits(model, "prefix rollouts", longest, top, "lower `max_new_tokens`, or leave long trajectories out")
    found = sample_responses(
        model, tokenizer, starts, samples=samples, max_new_tokens=max_new_tokens, temperature=temperature,
        batch_size=batch_size, seed=seed, cache=cache, progress=progress,
    )  # fmt: skip
    # Prefix and continuation are decoded together: a continuation by itself may lose the space that it begins with.
    whole = [
        [tokenizer.decode([*p, *r], skip_special_tokens=True) for r in rs]
        for p, rs in zip(prefixes, found, strict=True)
    ]
    texts_of_prompts, names = [t.prompt_text for t in trajectories], [t.prompt_id for t in trajectories]
    prompts = Prompts(ids, texts_of_prompts, chats, names, _columns(trajectories), verifier)
    given = prompts.rewards([i for i in places for _ in range(samples)], [text for texts in whole for text in texts])
    counts = (np.array(given).reshape(-1, samples) >= threshold).sum(1)
    ends = np.cumsum([len(parts) for parts in steps])[:-1]
    return [
        [*part.tolist(), samples * int(reward >= threshold)]
        for part, reward in zip(np.split(counts, ends), own, strict=True)
    ]


def _columns(trajectories: Sequence[Trajectory]) -> dict[str, list[Any]]:
    every: list[Mapping[str, Any]] = [{"prompt_id": t.prompt_id, **t.columns} for t in trajectories]
    return {key: [row.get(key) for row in every] for key in dict.fromkeys(key for row in every for key in row)}
