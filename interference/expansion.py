"""expand: the quadratic model of every domain's objective on the span of the updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from interference import objectives
from interference.checkpoint import Checkpoint
from interference.checks import Audit, audit
from interference.domain import Domain
from interference.errors import InputError
from interference.jets import SequenceJets, sequence_jets
from interference.model import Model, check_fits, load
from interference.quadratic import QuadraticModel
from interference.tree import Change, NamedChanges, dense

Progress = Callable[[str], None]


def expand(
    base: Checkpoint | Model,
    updates: Mapping[str, NamedChanges],
    domains: Mapping[str, Domain],
    *,
    objective: str = "nll",
    pairs: bool = True,
    engine: str = "taylor",
    dtype: torch.dtype = torch.float32,
    device: str = "auto",
    batch_tokens: int = 4096,
    seed: int = 0,
    check: bool = True,
    progress: Progress | None = None,
) -> dict[str, QuadraticModel]:
    """Predict how every update changes every domain, from the base model and the domains' sequences.

    For each domain, L(theta + sum_k a_k d_k) ~ L + c . a + 1/2 a' A a, with c and A exact derivatives of the objective's
    estimate on the domain's sequences (`objectives`), and per-sequence terms for the error bars.

    Parameters
    ----------
    base : the anchor theta, a Checkpoint or a Model.
    updates : {name: Update or other mapping of tensors}, the directions d_k. A matrix's change may be tree.LowRank factors:
        its products are then almost free.
    domains : {name: Domain}.  objective : "nll", "reward", "surrogate" or "kl".
    pairs : all pairs (k, l) of updates, or only k = l, which costs less but predicts one update at a time.
    engine : "taylor", or "nested", the slow reference.  seed : of the bootstrap over prompts.
    check : compare the derivatives with another route on a small batch first (`quick_audit`), and refuse to go on where they
        disagree.

    Raises InputError for derivatives that fail this check (which, by how much, what to do), updates of another model, ids
    outside the vocabulary, sequences longer than the model's context, and rewards that are missing or all equal where
    rewards are needed.
    """
    objectives.kind(objective)
    model = base if isinstance(base, Model) else load(base, dtype=dtype, device=device)
    aligned = _named(model, updates)
    for domain in domains.values():
        check_domain(model, domain, objective)
    if check:
        quick_audit(model, aligned, domains.values(), engine=engine, pairs=pairs, seed=seed).raise_if_failed([engine])
    out = {}
    for name, domain in domains.items():
        jets, _ = domain_jets(model, aligned, domain, pairs=pairs, engine=engine, batch_tokens=batch_tokens)
        out[name] = quadratic_model(objective, jets, domain, tuple(aligned), seed, name)
        if progress:
            progress(name)
    return out


def quick_audit(
    model: Model,
    updates: Mapping[str, NamedChanges],
    domains: Iterable[Domain],
    *,
    engine: str = "taylor",
    pairs: bool = True,
    seed: int = 0,
) -> Audit:
    """The cheap part of the audit, on sequences of all domains along two mixtures of all updates (one update: along it)."""
    sequences = [s for domain in domains for s in domain.sequences]
    return audit(model, sequences=sequences, updates=updates, level="quick", engine=engine, pairs=pairs, seed=seed)


def align(model: Model, updates: Mapping[str, NamedChanges]) -> dict[str, dict[str, Tensor]]:
    """Every update under the model's parameter names, factors multiplied out.

    Raises InputError for no updates, one without tensors, and one of another model.
    """
    return {name: {n: dense(c) for n, c in u.items()} for name, u in _named(model, updates).items()}


def _named(model: Model, updates: Mapping[str, NamedChanges]) -> dict[str, dict[str, Change]]:
    if not updates:
        raise InputError(got="no updates", expected="at least one", remedy="give {name: Update.between(base, tuned)}")
    named = {name: model.align(update) for name, update in updates.items()}
    for name, update in named.items():
        if not update:
            raise InputError(
                got=f"update {name!r} without tensors",
                expected="a direction of at least one parameter",
                remedy="give Update.between(base, tuned), or leave this update out",
            )
    return named


def domain_jets(
    model: Model,
    updates: Mapping[str, NamedChanges],
    domain: Domain,
    *,
    pairs: bool = True,
    engine: str = "taylor",
    batch_tokens: int = 4096,
) -> tuple[SequenceJets, list[str]]:
    """Jets of every sequence of a domain (equal sequences are computed once), and the fallbacks taken."""
    distinct, where = domain.distinct()
    with model.untouched():
        jets, fallbacks = sequence_jets(
            model, list(updates.values()), distinct, pairs=pairs, engine=engine, batch_tokens=batch_tokens
        )
    return jets.take(where), fallbacks


def quadratic_model(
    objective: str,
    jets: SequenceJets,
    domain: Domain,
    names: tuple[str, ...],
    seed: int = 0,
    name: str | None = None,
) -> QuadraticModel:
    """The quadratic model of an objective from a domain's jets."""
    terms = objectives.sequence_terms(objective, jets, domain)
    return QuadraticModel(objective, name or domain.name, names, tuple(domain.prompt_ids), terms, seed)


def check_domain(model: Model, domain: Domain, objective: str) -> None:
    """Refuse sequences that the model cannot score, and rewards that the objective cannot use."""
    longest = max(len(s.prompt) + len(s.response) for s in domain.sequences)
    top = max(max(s.prompt + s.response) for s in domain.sequences)
    check_fits(model, domain.name, longest, top, "shorten or drop the longest rows")
    if objectives.kind(objective).rewards:
        objectives.reward_terms(domain)
