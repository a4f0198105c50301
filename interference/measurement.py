"""measure: what actually happens at theta + sum_k a_k d_k. Never uses a derivative."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from interference import domain as data
from interference import objectives, statistics
from interference.checkpoint import Checkpoint
from interference.domain import Domain
from interference.errors import InputError
from interference.expansion import Progress, align, check_domain
from interference.model import Model, load
from interference.shared_prompts import Rows, batches, rows_of
from interference.tree import NamedChanges, NamedTensors

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Change:
    """A measured change: before, after, delta = after - before, its stderr, and the bootstrap replicates of delta."""

    before: float
    after: float
    delta: float
    stderr: float
    replicates: Array = field(repr=False)


@dataclass(frozen=True)
class Scores:
    """What evaluating a model on sequences gives, per sequence: summed log-probability, and summed KL from the anchor (not a
    number where `score` was told to leave it out)."""

    logp: Array
    kl: Array

    def take(self, places: Sequence[int]) -> Scores:
        """Those of some sequences."""
        return Scores(self.logp[list(places)], self.kl[list(places)])


def measure(
    base: Checkpoint | Model,
    updates: Mapping[str, NamedChanges],
    domains: Mapping[str, Domain],
    *,
    objective: str = "nll",
    rollouts: Mapping[tuple[str, str], Domain] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "auto",
    batch_tokens: int = 16384,
    seed: int = 0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Measure the change of every domain's objective under every update: a tidy table with the columns domain, update,
    before, after, delta, stderr, and `replicates` (bootstrap over prompts, paired with those of `expand` at the same seed).

    nll and kl are evaluated on the domain's own sequences at theta + d. reward and surrogate are the mean reward of
    `rollouts`: {(update, domain): Domain} with rewards, sampled from theta + d, and {("base", domain): Domain} sampled from
    theta afresh; the sequences that made a prediction never measure it.

    Raises InputError when rollouts are missing for the objectives reward and surrogate.
    """
    rows = []
    if objectives.kind(objective).rewards:
        for name in domains:
            before = _rollouts(rollouts, "base", name)
            rows += [row(name, u, reward_change(before, _rollouts(rollouts, u, name), seed)) for u in updates]
        return pd.DataFrame(rows)
    model = base if isinstance(base, Model) else load(base, dtype=dtype, device=device)
    aligned = align(model, updates)
    for name, domain in domains.items():
        check_domain(model, domain, objective)
        points = [(tensors, 1.0) for tensors in aligned.values()]
        anchor, *moved = score(model, domain, points, batch_tokens)
        rows += [
            row(name, update, sequence_change(objective, domain, anchor, scores, seed))
            for update, scores in zip(aligned, moved, strict=True)
        ]
        if progress:
            progress(name)
    return pd.DataFrame(rows)


def row(domain: str, update: str, change: Change) -> dict[str, object]:
    """A row of the measured table."""
    return {
        "domain": domain,
        "update": update,
        **{f: getattr(change, f) for f in change.__dataclass_fields__},
    }


def _rollouts(rollouts: Mapping[tuple[str, str], Domain] | None, model: str, domain: str) -> Domain:
    found = (rollouts or {}).get((model, domain))
    if found is None:
        raise InputError(
            got=f"no fresh rollouts of {model!r} on domain {domain!r}",
            expected="rollouts of the base and of every tuned model, to measure expected reward",
            remedy="give `measurements` (JSONL with rewards), or `prompts` and a `verifier` for the domain to sample them here",
        )
    return found


def score(
    model: Model,
    domain: Domain,
    points: Sequence[tuple[NamedTensors, float]],
    batch_tokens: int = 16384,
    *,
    kl: bool = True,
    anchor: bool = True,
) -> list[Scores]:
    """Evaluate the domain's sequences at theta and at theta + alpha d for every point (d, alpha), in this order.

    Batches are the outer loop, so that the anchor's distributions, which the KL needs whole, are held for one batch only.
    kl: whether it is computed; else it is not a number.  anchor: whether the first is at theta; the KL needs it.
    """
    distinct, where = domain.distinct()
    shape = (anchor + len(points), len(distinct))
    logp, divergence = np.zeros(shape), np.full(shape, 0.0 if kl else np.nan)
    for rows in batches(model, distinct, model.fit_tokens(batch_tokens)):
        index, here = list(rows.index), log_probabilities(model, rows) if anchor or kl else None
        if here is not None and anchor:
            logp[0, index] = _sums(rows, rows.scored(here))
        for i, (update, alpha) in enumerate(points, start=int(anchor)):
            with model.at([update], [alpha]):
                moved = log_probabilities(model, rows)
            logp[i, index] = _sums(rows, rows.scored(moved))
            if kl and here is not None:
                divergence[i, index] = _sums(rows, (here.exp() * (here - moved)).sum(-1)[rows.use])
    return [Scores(a[where], b[where]) for a, b in zip(logp, divergence, strict=True)]


@torch.no_grad()
def log_probabilities(model: Model, batch: data.Batch | Rows) -> Tensor:
    """Log-probabilities over the vocabulary at the positions that predict response tokens, (M, V).

    Those of a plain batch are in the order of its targets.
    """
    rows = rows_of(batch) if isinstance(batch, data.Batch) else batch
    return rows.predictions(model.forward(rows.input_ids, rows.keep, **rows.inputs))


def _sums(rows: Rows, per_token: Tensor) -> Array:
    return np.asarray(rows.sums(per_token.double()).cpu().numpy())


def sequence_change(objective: str, domain: Domain, before: Scores, after: Scores, seed: int = 0) -> Change:
    """Measured change of nll or kl on the domain's own sequences, with error bars over prompts."""
    tokens = np.array([float(len(s.response)) for s in domain.sequences])
    pair = (-before.logp, -after.logp) if objective == "nll" else (before.kl, after.kl)
    ids, sums = statistics.group_sums(np.stack([*pair, tokens], axis=1), domain.prompt_ids)
    difference = statistics.ratio_replicates(sums[:, 1] - sums[:, 0], sums[:, 2], ids, seed)
    total = sums.sum(0)
    first, last = float(total[0] / total[2]), float(total[1] / total[2])
    return Change(first, last, last - first, float(statistics.stderr(difference)), difference)


def reward_change(before: Domain, after: Domain, seed: int = 0) -> Change:
    """Measured change of mean reward between two sets of fresh rollouts; a prompt counts once, whatever its responses.

    Prompts that both sets share are paired in the bootstrap by their ids.
    """
    means = []
    for rollouts in (before, after):
        reward = np.asarray(rollouts.rewards())
        ids, sums = statistics.group_sums(np.stack([reward, np.ones_like(reward)], axis=1), rollouts.prompt_ids)
        mean = sums[:, 0] / sums[:, 1]
        means.append((float(mean.mean()), statistics.ratio_replicates(mean, np.ones_like(mean), ids, seed)))
    difference = means[1][1] - means[0][1]
    return Change(means[0][0], means[1][0], means[1][0] - means[0][0], float(statistics.stderr(difference)), difference)


@dataclass(frozen=True)
class Estimate:
    """Importance-weighted change of expected reward on the anchor's own rollouts: an estimate, not a measurement.

    delta; stderr over prompts; ess: effective sample size of the weights, out of `sequences`; bootstrap replicates of delta.
    """

    delta: float
    stderr: float
    ess: float
    sequences: int
    replicates: Array = field(repr=False)


def importance_estimate(domain: Domain, before: Scores, after: Scores, seed: int = 0) -> Estimate:
    """E[(r - b) (w - 1)] with w = exp(s_after - s_before), b the leave-one-out baseline."""
    _, weight, advantage = objectives.reward_terms(domain)
    log_w = after.logp - before.logp
    ids, sums = statistics.group_sums(
        np.stack([weight * advantage * np.expm1(log_w), weight], axis=1), domain.prompt_ids
    )
    replicates = statistics.ratio_replicates(sums[:, 0], sums[:, 1], ids, seed)
    total = sums.sum(0)
    ess = statistics.effective_sample_size(log_w)
    return Estimate(float(total[0] / total[1]), float(statistics.stderr(replicates)), ess, len(log_w), replicates)
