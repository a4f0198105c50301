"""Training on several domains at once, forecast by training virtually on their frozen rollouts mixed.

A mixture's update is not the weighted sum of the domains' own: an optimizer that normalises by the gradient's size, and rewards
that saturate, see the mixture. So it is run: `virtual_training` on rollouts pooled as the weights say. `plans.mixture` is the
quick way, which takes the updates as fixed and sums them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sized
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from itertools import combinations

import pandas as pd

from interference.domain import Domain, Sequence
from interference.errors import InputError, nearest
from interference.forecasting.frozen import Resample
from interference.forecasting.halves import Halves
from interference.forecasting.ranking import ranked
from interference.forecasting.runner import Outcomes, Runner, check_trainings
from interference.forecasting.training import Training
from interference.forecasting.virtual import LEAST_ESS
from interference.model import Model
from interference.probes.halves import prompt_halves

Mixture = Mapping[str, float]
MOST_COPIES = 10
"""Prompts of a pool, copies included, over those that there are."""
SHARE_OFF = 0.1
"""By how much of itself a domain's share may be off where prompts are too few for it."""


@dataclass(frozen=True, eq=False)
class VirtualMixture:
    """A training on a mixture that was run on frozen rollouts.

    weights: {domain: share of the prompts}.
    cells: one row per domain: domain, predicted (change from the base), stderr, low, high (90 %), ess, replicates (over prompts),
    update_spread (see `ranking.ranked`), note.
    halves: its update, from either half of every domain's prompts; None where it was not kept.
    """

    weights: dict[str, float]
    cells: pd.DataFrame = field(repr=False)
    halves: Halves | None = field(repr=False)


def virtual_mixtures(
    model: Model,
    domains: Mapping[str, Domain],
    training: Training | Mapping[str, Training],
    mixtures: Iterable[Mixture] | None = None,
    *,
    evaluation: Mapping[str, Domain] | None = None,
    samplers: Mapping[str, Resample] | None = None,
    evaluation_samplers: Mapping[str, Resample] | None = None,
    keep_updates: bool = True,
    effort: float | None = None,
    least_ess: float = LEAST_ESS,
    seed: int = 0,
    batch_tokens: int = 16384,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, VirtualMixture]:
    """Predict every domain's change of expected reward under training on mixtures, {`label`: outcome}.

    Every mixture is trained twice, on either half of every domain's prompts; a domain is predicted with the half that was not
    trained on, and the noise of the estimates is taken out as in `forecast`.

    Args:
        domains: {name: rollouts of `model` with rewards}.
        training: of a mixture in all, so that a domain of weight w gets w of its prompts; or {name: Training}, alike but for
            their steps, of which a mixture takes the weighted mean.
        mixtures: weights that sum to one; `equal_mixtures` unless given.
        evaluation: rollouts of the base on other prompts, to predict on instead.
        samplers: {name: what samples fresh rollouts}, which renew those of trainings (of a mixture, where all of its domains have
            one), and tell what moved policies do where importance weights fail; with `evaluation`, evaluation_samplers do that.
        keep_updates: whether `VirtualMixture.halves` holds them: two models for every mixture. Without, few are held at a time.
        effort, least_ess: see `estimation.estimate_update`.

    Raises:
        InputError: weights that are negative, do not sum to one or name an unknown domain, two mixtures alike, a training that
            is missing or unlike the others, and what `virtual_training` refuses.
    """
    chosen = [
        checked(weights, domains) for weights in (equal_mixtures(list(domains)) if mixtures is None else mixtures)
    ]
    labels = [label(weights) for weights in chosen]
    if not labels or len(set(labels)) < len(labels):
        raise InputError(got=f"mixtures {labels}", expected="one or more, all different", remedy="mend the list")
    single = dict.fromkeys(domains, training) if isinstance(training, Training) else dict(training)
    check_trainings(model, single, {n for weights in chosen for n in weights}, domains, evaluation)
    mixed = dict(zip(labels, chosen, strict=True))
    parts, distinct, pools = _pools(domains, mixed, samplers or {}, seed)
    plans = {name: planned(weights, single) for name, weights in mixed.items()}
    runner = Runner(model, parts, plans, effort, least_ess, seed, batch_tokens, progress, distinct, pools)
    outcomes = Outcomes(model, domains, evaluation, seed, batch_tokens, samplers, evaluation_samplers)
    kept: dict[str, Halves] = {}
    for name in labels:
        made = runner.halves((name,))
        outcomes.add((name,), made)
        kept |= {name: made} if keep_updates else {}
    cells = outcomes.cells()
    tables = {n: pd.DataFrame([{"domain": d, **told[n,]} for d, told in cells.items()]) for n in labels}
    return {n: VirtualMixture(weights, tables[n], kept.get(n)) for n, weights in mixed.items()}


def _pools(
    domains: Mapping[str, Domain], mixed: Mapping[str, Mixture], samplers: Mapping[str, Resample], seed: int
) -> tuple[dict[str, list[Domain]], dict[str, float], dict[str, Resample]]:
    """Of each mixture: the pools from either half of the prompts, the share of these that are no copies, and what renews them."""
    halves = {name: prompt_halves(domain, seed) for name, domain in domains.items()}
    parts, distinct, renewing = {}, {}, {}
    for name, weights in mixed.items():
        both = [{n: halves[n][h] for n in weights} for h in (0, 1)]
        parts[name] = [pooled(part, weights) for part in both]
        distinct[name] = effective_prompts(both[0], weights) / len(set(parts[name][0].prompt_ids))
        if weights.keys() <= samplers.keys():
            renewing[name] = pooled_sampler(samplers, both, weights)
    return parts, distinct, renewing


def rank_virtual_mixtures(found: Mapping[str, VirtualMixture], by: str = "mean") -> pd.DataFrame:
    """Mixtures, best first by the `mean` over domains or by the `worst` domain: mixture, and the columns of `ranking.ranked`."""
    labels = pd.DataFrame({"mixture": list(found)})
    return ranked([mixture.cells for mixture in found.values()], labels, "reward", by)


def equal_mixtures(names: Several[str]) -> list[dict[str, float]]:
    """Every choice of domains in equal shares, one alone to all at once.

    >>> equal_mixtures(["a", "b"])
    [{'a': 1.0}, {'b': 1.0}, {'a': 0.5, 'b': 0.5}]
    """
    return [
        dict.fromkeys(chosen, 1 / size) for size in range(1, len(names) + 1) for chosen in combinations(names, size)
    ]


def label(weights: Mixture) -> str:
    """Domains of equal shares by their names, others with their weights.

    >>> label({"a": 0.5, "b": 0.5}), label({"a": 0.75, "b": 0.25})
    ('a + b', '0.75 a + 0.25 b')
    """
    if len(set(weights.values())) == 1:
        return " + ".join(weights)
    return " + ".join(f"{w:g} {name}" for name, w in weights.items())


def pooled(domains: Mapping[str, Domain], weights: Mixture) -> Domain:
    """All prompts of the domains with their responses, in numbers that are to each other as the weights.

    Where a domain has fewer than its share its prompts are repeated, as training on the mixture would come back to them more
    often. Prompts bear their domain's name, and which copy they are, before their id.

    >>> from interference.domain import Sequence
    >>> two = {n: Domain(n, tuple(Sequence((1,), (2,), p) for p in ids)) for n, ids in {"a": "pqrs", "b": "pq"}.items()}
    >>> pooled(two, {"a": 0.5, "b": 0.5}).prompt_ids
    ['a: p', 'a: q', 'a: r', 'a: s', 'b: p', 'b: q', 'b (2): p', 'b (2): q']
    """
    members: dict[tuple[str, str], list[Sequence]] = {}
    for name in weights:
        for row in domains[name].sequences:
            members.setdefault((name, row.prompt_id), []).append(row)
    rows = [
        dataclasses.replace(row, prompt_id=marked)
        for marked, (name, prompt, _) in _prompts(domains, weights).items()
        for row in members[name, prompt]
    ]
    return Domain(label(weights), tuple(rows))


def _prompts(domains: Mapping[str, Domain], weights: Mixture) -> dict[str, tuple[str, str, int]]:
    """{id of a pool's prompt: (domain, prompt, which copy)}."""
    prompts = {name: list(dict.fromkeys(domains[name].prompt_ids)) for name in weights}
    out = {}
    for name, count in _counts(prompts, weights).items():
        for i in range(count):
            copy, place = divmod(i, len(prompts[name]))
            prompt = prompts[name][place]
            out[name + (f" ({copy + 1})" if copy else "") + f": {prompt}"] = name, prompt, copy
    return out


def pooled_sampler(
    samplers: Mapping[str, Resample], pools: Iterable[Mapping[str, Domain]], weights: Mixture
) -> Resample:
    """What samples fresh rollouts on prompts of pools (`pooled`), by each domain's own sampler."""
    origins = {marked: origin for domains in pools for marked, origin in _prompts(domains, weights).items()}

    def fresh(prompt_ids: Several[str], seed: int) -> Domain:
        asked: dict[tuple[str, int], dict[str, str]] = {}
        times = Counter(prompt_ids)
        for marked in times:
            name, prompt, copy = origins[marked]
            asked.setdefault((name, copy), {})[prompt] = marked
        rows = []
        for (name, copy), names in asked.items():
            found = samplers[name]([p for p, marked in names.items() for _ in range(times[marked])], seed + copy)
            rows += [dataclasses.replace(row, prompt_id=names[row.prompt_id]) for row in found.sequences]
        return Domain(label(weights), tuple(rows))

    return fresh


def _counts(prompts: Mapping[str, Sized], weights: Mixture) -> dict[str, int]:
    """How many prompts of each domain the pool holds: all of the one that has most beside its share, so many of the others as
    their shares say.

    Raises InputError where so many prompts cannot be in these shares.
    """
    most = MOST_COPIES * sum(len(prompts[name]) for name in weights)
    total = min(max(len(prompts[name]) / w for name, w in weights.items()), most)
    counts = {name: max(1, round(total * w)) for name, w in weights.items()}
    found = {name: count / sum(counts.values()) for name, count in counts.items()}
    for name, w in weights.items():
        if abs(found[name] - w) > SHARE_OFF * w:
            raise InputError(
                got=f"a mixture with {w:g} of {name!r}, of which {len(prompts[name])} prompts would make {found[name]:.2g}",
                expected=f"shares that the prompts can be mixed in, within {100 * SHARE_OFF:.0f} %",
                remedy="give more prompts, or less unequal weights",
            )
    return counts


def effective_prompts(domains: Mapping[str, Domain], weights: Mixture) -> float:
    """Different prompts that would tell as much as the pool, 1 / sum_k w_k^2 / N_k: copies tell nothing new.

    >>> from interference.domain import Sequence
    >>> two = {n: Domain(n, tuple(Sequence((1,), (2,), p) for p in ids)) for n, ids in {"a": "pqrs", "b": "pqrs"}.items()}
    >>> effective_prompts(two, {"a": 0.5, "b": 0.5}), effective_prompts(two, {"b": 1.0})
    (8.0, 4.0)
    """
    return 1 / sum(w**2 / len(set(domains[name].prompt_ids)) for name, w in weights.items())


def checked(weights: Mixture, names: Collection[str]) -> dict[str, float]:
    """The weights that are not zero.

    Raises InputError for weights that are negative, do not sum to one or name an unknown domain.
    """
    for name in weights:
        if name not in names:
            raise InputError(got=f"a mixture with {name!r}", expected="names of domains", remedy=nearest(name, names))
    total = sum(weights.values())
    if not min(weights.values(), default=-1.0) >= 0 or not abs(total - 1) <= 1e-6:
        raise InputError(
            got=f"mixture weights {dict(weights)} (sum {total:g})",
            expected="weights of 0 or more that sum to 1",
            remedy="divide them by their sum",
        )
    return {name: float(weights[name]) for name in names if weights.get(name)}


def planned(weights: Mixture, trainings: Mapping[str, Training]) -> Training:
    """The one training of a mixture, with the weighted mean of steps.

    Raises InputError for trainings that differ in more than their steps.
    """
    steps = max(1, round(sum(w * trainings[n].steps for n, w in weights.items())))
    first, *others = weights
    found = {name: trainings[name].model_copy(update={"steps": steps}) for name in weights}
    for name in others:
        keys = [k for k in Training.model_fields if getattr(found[name], k) != getattr(found[first], k)]
        if keys:
            raise InputError(
                got=f"mixture {label(weights)!r}, where the trainings of {first!r} and {name!r} differ ({', '.join(keys)})",
                expected="one training, which a mixture is: only steps may differ",
                remedy="give both the same settings, or leave the mixture out",
            )
    return found[first]
