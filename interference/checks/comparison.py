"""audit: compare every route to a model's derivatives with every other one, and judge each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from interference import derivatives, tree
from interference import domain as data
from interference.checkpoint import Checkpoint
from interference.checks import routes
from interference.checks.evidence import Evidence, gap, ratio, summed_gap, vector_gap, worst_gap
from interference.checks.probe import make_probe
from interference.checks.result import MARGIN, Audit, judge
from interference.checks.routes import Products, Terms
from interference.domain import Domain
from interference.errors import InputError, nearest
from interference.model import Model, load
from interference.tree import NamedChanges, dense

Level = Literal["full", "quick"]


LOOSEST = 0.1  # an uncertainty of the differences beyond which they confirm nothing


def audit(
    model: Model | Checkpoint,
    *,
    sequences: Domain | Sequence[data.Sequence] | None = None,
    updates: Mapping[str, NamedChanges] | None = None,
    level: Level = "full",
    engine: str = "taylor",
    pairs: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "auto",
    seed: int = 0,
) -> Audit:
    """Check a model's derivatives on a small batch of its own: is each derivative mode right for it?

    Along two directions d, e (mixtures of the updates; random ones without updates) and on a few ragged sequences (random
    ids, the padding token among them, when none are given), first and second derivatives of the sequences' log-probabilities
    by Taylor jets, nested forward mode and reverse mode (gradient, Hessian products) are compared with one another, with
    jvp and with step-swept differences; besides, symmetry d'He = e'Hd, linearity in the direction, independence of the
    batch and its padding, determinism, and that the weights stay as they were.

    level "quick" runs `engine` as it will be run (with or without `pairs`), compares it with reverse mode only and checks
    values and padding; one update alone is one direction. "full" runs every engine with pairs and without.

    Returns an Audit: `.verdicts` names each mode "trusted" or "refused: ...", `.raise_if_failed()` raises InputError.
    Tolerances (relative): 1e-5 in first and 1e-3 in second order; 1e-9 and 1e-7 where the model truly computes in float64.

    Raises InputError for a model that is refused as a whole (`load`, `prepare`), for updates of another model, and for updates
    that are all zero or not finite.
    """
    if level not in ("full", "quick"):
        raise InputError(got=f"level {level!r}", expected="a level", remedy=nearest(str(level), ("full", "quick")))
    ready = model if isinstance(model, Model) else load(model, dtype=dtype, device=device)
    aligned = [{n: dense(c) for n, c in ready.align(update).items()} for update in (updates or {}).values()]
    full = level == "full"
    probe = make_probe(
        ready,
        sequences,
        aligned,
        count=4 if full else 3,
        longest=64 if full else 40,
        directions=1 if len(aligned) == 1 and not full else 2,
        seed=seed,
    )
    found = _gather(Evidence(ready, probe, seed, pairs), level, engine)
    _excuse_rounding(found, level, engine)
    rows, verdicts = judge(found.rows)
    name = str(ready.dtype).removeprefix("torch.")
    return Audit(name, level, len(probe.sequences), probe.tokens, rows, verdicts, (*ready.notes, *found.notes))


def _gather(found: Evidence, level: Level, engine: str) -> Evidence:
    before = found.model.checksum()
    found.tolerate()
    if level == "full":
        _full(found)
    else:
        _quick(found, engine)
    same = found.model.checksum() == before
    found.add("weights", "all", "their checksum before", 0.0 if same else np.inf, 0.0)
    return found


def _excuse_rounding(found: Evidence, level: Level, engine: str) -> None:
    """Allow tenfold errors to float32 rows whose error is rounding: those that pass when the same model runs in float64.

    A wrong derivative is as wrong in float64; a badly conditioned one (a padding token whose embedding is zero, under norms)
    is not.
    """
    if found.model.dtype != torch.float32 or not any(r.marginal for r in found.rows):
        return
    try:
        twin = _gather(found.widened(), level, engine)
    except Exception:  # no room for a copy, or no float64 on this device: then nothing is excused
        return
    right = {(r.name, r.mode, r.against) for r in twin.rows if r.passed}
    for i, row in enumerate(found.rows):
        if row.marginal and (row.name, row.mode, row.against) in right:
            found.rows[i] = replace(row, tolerance=MARGIN * row.tolerance)
            found.notes.append(
                f"{row}: rounding of float32, since it passes in float64; allowed up to {MARGIN:g} times that"
            )


def _quick(found: Evidence, engine: str) -> None:
    model, probe, limit = found.model, found.probe, found.limit
    jets = _jets(found, engine, found.pairs)
    products = found.attempt("products", "reverse", lambda: routes.reverse_products(model, probe, found.seed))
    if jets is None:
        return
    if products is None:  # a mode that raises cannot confirm; another may
        other = next(m for m in ("nested", "taylor") if m != engine)
        found.notes.append(f"reverse mode raises on this model; {engine} was compared with {other}")
        slopes = found.attempt("gradient", "reverse", lambda: routes.reverse_first(model, probe, found.seed))
        if slopes is not None:  # a gradient can be right where Hessian products raise
            error = summed_gap(jets.first, slopes[1], slopes[0])
            found.add("first order", engine, "reverse", error, limit.first)
        _pairs(found, {engine: jets, other: _jets(found, other, found.pairs)})
    else:
        _pairs(found, {engine: jets}, products)
    found.add(
        "value", engine, "the model's forward pass", gap(jets.value, routes.value(model, probe.batch())), limit.first
    )
    _padding(found, engine, jets)


def _full(found: Evidence) -> None:
    model, probe, limit = found.model, found.probe, found.limit
    jets = {mode: _jets(found, mode) for mode in ("taylor", "nested")}
    products = found.attempt("products", "reverse", lambda: routes.reverse_products(model, probe, found.seed))
    _pairs(found, jets, products)
    slopes = found.attempt("first order", "nested", lambda: routes.jvp_first(model, probe))
    own = routes.value(model, probe.batch())
    for mode, terms in jets.items():
        if terms is None:
            continue
        found.add("value", mode, "the model's forward pass", gap(terms.value, own), limit.first)
        if slopes is not None and mode == "nested":
            found.add("first order", mode, "plain jvp", worst_gap(terms.first, slopes), limit.first)
    _differences(found, jets, products)
    for mode, terms in jets.items():
        if terms is not None:
            found.attempt("linearity", mode, lambda mode=mode, terms=terms: _linearity(found, mode, terms))  # type: ignore[misc]
            found.attempt("padding and batches", mode, lambda mode=mode, terms=terms: _padding(found, mode, terms))  # type: ignore[misc]
            _diagonal(found, mode, terms)
    if jets["taylor"] is not None:
        _determinism(found, jets["taylor"])
    if products is not None:
        found.attempt("gradient", "reverse", lambda: _reverse(found, products, jets))


def _jets(found: Evidence, engine: str, pairs: bool = True) -> Terms | None:
    jets = found.attempt("jets", engine, lambda: routes.forward_terms(found.model, found.probe, engine, pairs=pairs))
    if jets is not None and not (jets.first.any() and jets.known(jets.second).any()):
        found.notes.append(
            f"{engine}: derivatives along these directions are zero on these sequences, which tests little"
        )
    return jets


def _diagonal(found: Evidence, engine: str, terms: Terms) -> None:
    """Without pairs, which is other code, the engine says the same of each direction as with them."""
    alone = _jets(found, engine, pairs=False)
    if alone is not None:
        name, limit = "pairs and diagonal", found.limit
        errors = [gap(alone.value, terms.value), worst_gap(alone.first, terms.first)]
        found.add(name, engine, "all pairs: value and first order", float(np.max(errors)), limit.first)
        error = worst_gap(alone.known(alone.second), alone.known(terms.second))
        found.add(name, engine, "all pairs: second order", error, limit.second)


def _pairs(found: Evidence, jets: Mapping[str, Terms | None], products: Products | None = None) -> None:
    """The modes against one another, in both orders."""
    limit = found.limit
    known = {mode: terms for mode, terms in jets.items() if terms is not None}
    if len(known) == 2:
        (a, left), (b, right) = known.items()
        found.add("first order", a, b, worst_gap(left.first, right.first), limit.first)
        found.add("second order", a, b, worst_gap(left.known(left.second), right.known(right.second)), limit.second)
    for mode, terms in known.items():
        if products is not None:
            error = summed_gap(terms.first, products.first, products.signs)
            found.add("first order", mode, "reverse", error, limit.first)
            error = summed_gap(terms.known(terms.second), terms.known(products.second), products.signs)
            found.add("second order", mode, "reverse", error, limit.second)


def _differences(found: Evidence, jets: Mapping[str, Terms | None], products: Products | None) -> None:
    model, probe, limit = found.model, found.probe, found.limit
    for order, name, compute, least in (
        (1, "differences of values", routes.difference_first, limit.difference_first),
        (2, "differences of values", routes.difference_second, limit.difference_second),
        (2, "differences of jvp", routes.difference_of_slopes, limit.difference_first),
    ):
        check = f"{'first' if order == 1 else 'second'} order"
        swept = found.attempt(check, "nested" if "jvp" in name else "all", lambda c=compute: c(model, probe))  # type: ignore[misc]
        if swept is None:
            continue
        expected, spread = swept
        tolerance = max(least, 3 * spread)
        if "jvp" in name and not all(r.passed for r in found.rows if r.mode == "nested" and r.name == "first order"):
            continue  # differences of what is itself wrong blame nobody
        if tolerance > LOOSEST:
            found.notes.append(
                f"{check}: {name} found no step at which they are consistent ({spread:.0e}); they say nothing"
            )
            continue
        for mode, terms in jets.items():
            if terms is not None:
                got = terms.first[:, 0] if order == 1 else terms.second[:, 0, 0]
                found.add(check, mode, name, gap(got, expected), tolerance)
        if products is not None:
            total = products.first[0] if order == 1 else products.second[0, 0]
            size = float(np.linalg.norm(expected))
            found.add(check, "reverse", name, ratio(abs(products.signs @ expected - total), size), tolerance)


def _linearity(found: Evidence, engine: str, terms: Terms) -> None:
    """Along 2d: twice and four times. Along d + e: the sum, and the polar form."""
    d, e = found.probe.directions
    along = lambda v: routes.forward_terms(found.model, found.probe, engine, [v])  # noqa: E731
    twice, both = along({n: 2 * x for n, x in d.items()}), along(tree.axpy(1.0, d, e))
    first, second = terms.first, terms.second
    polar = second[:, 0, 0] + second[:, 0, 1] + second[:, 1, 0] + second[:, 1, 1]
    errors = [gap(twice.first[:, 0], 2 * first[:, 0]), gap(both.first[:, 0], first.sum(1))]
    found.add("linearity", engine, "first order along 2d and d + e", float(np.max(errors)), found.limit.first)
    errors = [gap(twice.second[:, 0, 0], 4 * second[:, 0, 0]), gap(both.second[:, 0, 0], polar)]
    found.add("linearity", engine, "second order along 2d and d + e", float(np.max(errors)), found.limit.second)


def _padding(found: Evidence, engine: str, terms: Terms) -> None:
    """Each sequence alone, and all in one right-padded batch."""
    alone = routes.forward_terms(found.model, found.probe, engine, tokens=1, pairs=terms.pairs)
    name, limit = "padding and batches", found.limit
    errors = [gap(alone.value, terms.value), worst_gap(alone.first, terms.first)]
    found.add(name, engine, "each sequence alone: value and first order", float(np.max(errors)), limit.first)
    error = worst_gap(terms.known(alone.second), terms.known(terms.second))
    found.add(name, engine, "each sequence alone: second order", error, limit.second)


def _determinism(found: Evidence, terms: Terms) -> None:
    """Bit for bit; on a GPU, where sums of threads have no order, to the tolerance of the first order."""
    again = found.attempt("determinism", "taylor", lambda: routes.forward_terms(found.model, found.probe, "taylor"))
    if again is None:
        return
    exact = all(np.array_equal(getattr(again, f), getattr(terms, f)) for f in ("value", "first", "second"))
    error = 0.0 if exact else max(worst_gap(again.first, terms.first), worst_gap(again.second, terms.second), 1e-300)
    found.add("determinism", "taylor", "a second run", error, found.exact)


def _reverse(found: Evidence, products: Products, jets: Mapping[str, Terms | None]) -> None:
    """Symmetry and linearity of Hessian products, and a gradient that is the same twice and alone."""
    model, probe, limit = found.model, found.probe, found.limit
    d, e = probe.directions
    known = [terms for terms in jets.values() if terms is not None]
    across = abs(products.second[0, 1] - products.second[1, 0])
    scale = float(np.linalg.norm(known[0].second[:, 0, 1])) if known else abs(products.second[0, 1])
    found.add("symmetry", "reverse", "d'He = e'Hd", ratio(across, scale), limit.second)

    _, f = routes.signed_sum(model, probe, found.seed)
    hd, he, both = (derivatives.hvp(f, model.parameters, v)[1] for v in (d, e, tree.axpy(1.0, d, e)))
    found.add("linearity", "reverse", "H(d + e) = Hd + He", vector_gap(both, tree.axpy(1.0, hd, he)), limit.second)

    again = derivatives.gradient(f, model.parameters)
    largest = max(float(g.abs().max()) for g in products.gradient.values())
    error = max(float((again[n] - g).abs().max()) for n, g in products.gradient.items())
    found.add("determinism", "reverse", "a second run", ratio(error, largest), found.exact)
    alone = routes.alone_gradient(model, probe, found.seed)
    error = vector_gap(alone, products.gradient)
    found.add("padding and batches", "reverse", "each sequence alone: gradient", error, limit.first)
    _loss_gradient(found, jets)


def _loss_gradient(found: Evidence, jets: Mapping[str, Terms | None]) -> None:
    """The gradient of a loss over ragged batches: of one batch, and the slope that confirmed jets say."""
    model, probe, limit = found.model, found.probe, found.limit
    domain, shortest = Domain("audit", probe.sequences), min(len(s.prompt) + len(s.response) for s in probe.sequences)
    whole, split = (
        derivatives.objective_gradient(model, domain, "nll", batch_tokens=tokens)
        for tokens in (routes.WHOLE, 2 * shortest)
    )
    name = "padding and batches"
    found.add(name, "reverse", "the loss' gradient in ragged batches", vector_gap(split, whole), limit.first)
    confirmed = {r.mode for r in found.rows if r.name == "first order" and r.against == "reverse" and r.passed}
    for mode, terms in jets.items():
        if terms is not None and mode in confirmed:
            slopes = terms.first[:, 0]
            error = abs(tree.dot(split, probe.directions[0]) * probe.tokens + slopes.sum())
            found.add(
                name,
                "reverse",
                f"the loss' slope by {mode} jets",
                ratio(error, float(np.linalg.norm(slopes))),
                limit.first,
            )
            return
