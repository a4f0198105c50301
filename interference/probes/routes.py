"""Active routes: the MLP channels and attention heads that a domain's own rollouts use most, and how far domains share them.

How arXiv 2606.02398 computes active routes is not known; the scores here are our stand-in. A unit's score is the mean over
prompts, each weighing as one, of its mean `activity` at the positions that predict response tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from interference import anatomy as anatomies
from interference import domain as data
from interference.anatomy import Anatomy
from interference.domain import Domain
from interference.errors import InputError, nearest
from interference.expansion import check_domain
from interference.geometry.neurons import TOPS, top_set
from interference.geometry.nulls import jaccard, jaccard_null
from interference.model import Model
from interference.probes.activity import VARIANTS, activity, closers
from interference.probes.halves import prompt_halves

UNIT = ["kind", "layer", "unit"]
HALVES = ["first_half", "second_half"]
OVERLAP = [
    *("a", "b", "kind", "top", "scope", "layer", "count", "active_a", "active_b", "share"),
    *("jaccard", "chance", "chance_low", "chance_high"),
]


@dataclass(frozen=True, eq=False)
class Routes:
    """Scores of a model's units on a domain: one row per unit.

    scores: kind ("channel", "head", "expert channel"), layer, unit, score, first_half, second_half (the same on two random halves
    of the prompts, whose difference is sampling noise). Channel c of expert e is unit e (channels of an expert) + c. variant: see
    `activity`. prompts, tokens: how many were used. notes: what was left out.
    """

    domain: str
    variant: str
    scores: pd.DataFrame
    prompts: int
    tokens: int
    notes: tuple[str, ...] = ()


def active_routes(
    model: Model,
    domain: Domain,
    *,
    variant: str = "magnitude",
    anatomy: Anatomy | None = None,
    seed: int = 0,
    batch_tokens: int = 4096,
) -> Routes:
    """Scores of every MLP channel and attention head on a domain's responses, in one pass over them.

    Args:
        model: the policy; its anatomy is read here unless given.
        domain: rollouts of that policy.
        variant: "magnitude" (what a unit adds to the residual stream) or "gradient" (times what the response's negative
            log-likelihood makes of it; one backward pass more).
        seed: of the two halves of the prompts.

    Raises:
        InputError: an unknown variant, sequences that the model has no room for, a single prompt, and a model none of whose
            channels and heads are known.
    """
    if variant not in VARIANTS:
        raise InputError(got=f"variant {variant!r}", expected="a known variant", remedy=nearest(variant, VARIANTS))
    check_domain(model, domain, "nll")
    halves = prompt_halves(domain, seed)
    found, notes = closers(model, anatomies.read(model) if anatomy is None else anatomy)
    distinct, weights = _weights(domain, halves)
    sums, more = activity(model, found, distinct, weights, variant, batch_tokens) if found else ({}, ())
    notes = (*notes, *more)
    if not sums:
        raise InputError(
            got="a model none of whose MLP channels and attention heads can be scored: " + "; ".join(notes),
            expected="blocks closed by one linear map, such as down_proj and o_proj",
            remedy="add its layout to interference.layout",
        )
    parts = []
    for i, both in sums.items():
        values = both.cpu().numpy()
        units = {"kind": found[i].kind, "layer": found[i].layer, "unit": np.arange(found[i].units)}
        parts.append(pd.DataFrame(units | dict(zip(HALVES, values, strict=True))))
    scores = pd.concat(parts).sort_values(UNIT, kind="stable", ignore_index=True)
    counts = [len(set(h.prompt_ids)) for h in halves]
    scores.insert(len(UNIT), "score", scores[HALVES].to_numpy() @ (np.array(counts) / sum(counts)))
    tokens = sum(len(s.response) for s in domain.sequences)
    return Routes(domain.name, variant, scores, sum(counts), tokens, notes)


def _weights(domain: Domain, halves: Sequence[Domain]) -> tuple[list[data.Sequence], torch.Tensor]:
    """Distinct sequences, and what each of their tokens counts in the mean over the prompts of either half."""
    distinct, where = domain.distinct()
    tokens: dict[str, int] = {}
    for s in domain.sequences:
        tokens[s.prompt_id] = tokens.get(s.prompt_id, 0) + len(s.response)
    members = [set(h.prompt_ids) for h in halves]
    out = torch.zeros(len(distinct), len(halves), dtype=torch.float64)
    for s, place in zip(domain.sequences, where, strict=True):
        h = int(s.prompt_id in members[1])
        out[place, h] += 1.0 / (tokens[s.prompt_id] * len(members[h]))
    return distinct, out


def route_overlap(routes: Mapping[str, Routes], tops: Sequence[float] = TOPS) -> pd.DataFrame:
    """Jaccard index of the most active units of each pair of domains, beside that of random sets and of a domain with itself.

    Args:
        routes: {domain: its routes}, of one model and variant.
        tops: shares q of the units that count as active.

    Returns:
        a, b, kind, top (q), scope ("model", "layer"), layer (-1 for the model), count (units), active_a, active_b (units in the
        sets), share (their mean over count: q rounded to whole units of a layer, at least one), jaccard, chance, chance_low,
        chance_high. Sets are formed within each layer, as `update_on_routes` forms them; those of the model are their union over
        layers. Chance is the Jaccard index of random sets with as many units in each layer at the mean size of their
        intersection (for one layer q / (2 - q)), and its 90 % interval from the sum of the layers' hypergeometrics. Rows with
        a == b compare the halves of a domain's prompts: what the same domain on other data gives, and a little less, since
        halves are noisier than the whole.

    Raises:
        InputError: no routes, routes of different models or variants, and a top outside of (0, 1].
    """
    units = same_units(routes)
    if not tops or not all(0 < top <= 1 for top in tops):
        raise InputError(got=f"tops {list(tops)}", expected="shares in (0, 1]", remedy="mend `tops`")
    rows: list[dict[str, Any]] = []
    for top in tops:
        sets = {name: active(r.scores, top) for name, r in routes.items()}
        pairs = [(a, b, sets[a], sets[b]) for a, b in combinations(routes, 2)]
        pairs += [(n, n, active(r.scores, top, HALVES[0]), active(r.scores, top, HALVES[1])) for n, r in routes.items()]
        for a, b, first, second in pairs:
            rows += [{"a": a, "b": b, "top": top, **row} for row in _overlaps(units, first, second)]
    return pd.DataFrame(rows, columns=OVERLAP)


def active(scores: pd.DataFrame, top: float, column: str = "score") -> NDArray[np.bool_]:
    """The top share of each layer's units of a kind, as a mask over the rows."""
    out = np.zeros(len(scores), dtype=bool)
    values = scores[column].to_numpy()
    for where in scores.groupby(["kind", "layer"]).indices.values():
        out[where] = top_set(values[where], top)
    return out


def layers_of(units: pd.DataFrame, kind: str) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Each layer that has units of a kind, and their rows."""
    here = np.flatnonzero(units["kind"] == kind)
    layers = units["layer"].to_numpy()[here]
    for layer in np.unique(layers).tolist():
        yield layer, here[layers == layer]


def _overlaps(units: pd.DataFrame, first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Iterator[dict[str, Any]]:
    """Of two masks, the rows of each kind: the whole model, then its layers."""
    for kind in dict.fromkeys(units["kind"]):
        layers, where = zip(*layers_of(units, kind), strict=True)
        counts = np.array([[len(w), first[w].sum(), second[w].sum(), (first & second)[w].sum()] for w in where])
        for scope, layer, part in (
            ("model", -1, counts),
            *(("layer", n, c[None]) for n, c in zip(layers, counts, strict=True)),
        ):
            size, a, b, both = part.sum(0).tolist()
            null = jaccard_null(*part[:, :3].T)
            yield {
                "kind": kind, "scope": scope, "layer": layer, "count": size, "active_a": a, "active_b": b,
                "share": (a + b) / (2 * size), "jaccard": jaccard(both, a, b),
                "chance": null.mean, "chance_low": null.low, "chance_high": null.high,
            }  # fmt: skip


def same_units(routes: Mapping[str, Routes]) -> pd.DataFrame:
    """The units that all routes score, in their order; InputError where they do not score the same."""
    first = next(iter(routes.values()), None)
    if first is None:
        raise InputError(got="no routes", expected="at least one domain's", remedy="call active_routes for each domain")
    units = first.scores[UNIT]
    for name, r in routes.items():
        if r.variant != first.variant or not r.scores[UNIT].equals(units):
            raise InputError(
                got=f"routes of {name!r} ({r.variant}, {len(r.scores)} units) beside {first.variant}, {len(units)} units",
                expected="routes of one model and variant",
                remedy="score all domains with the same model, variant and layers",
            )
    return units
