"""audit: compare every route to a model's derivatives with every other one, and judge each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from interference import derivatives, tree
from interference import domain as data
from interference.checkpoint import Checkpoint
from interference.checks import routes
from interference.checks.probe import Probe, make_probe
from interference.checks.result import Audit, Check, judge
from interference.checks.routes import Products, Terms
from interference.domain import Domain
from interference.errors import InputError, nearest
from interference.model import Model, load

Array = NDArray[np.float64]
Level = Literal["full", "quick"]
T = TypeVar("T")


@dataclass(frozen=True)
class Tolerances:
    """Relative errors allowed: between derivative modes, and against differences, which are less exact themselves."""

    first: float
    second: float
    difference_first: float
    difference_second: float


# Differences of a function computed in float32 leave this much at their best step (docs/numerics.md).
NARROW = Tolerances(1e-5, 1e-3, 1e-3, 2e-2)
WIDE = Tolerances(1e-9, 1e-7, 1e-7, 1e-5)
LOOSEST = 0.1  # an uncertainty of the differences beyond which they confirm nothing


def audit(
    model: Model | Checkpoint,
    *,
    sequences: Domain | Sequence[data.Sequence] | None = None,
    updates: Mapping[str, Mapping[str, Tensor]] | None = None,
    level: Level = "full",
    engine: str = "taylor",
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

    level "quick" compares `engine` with reverse mode only, along one direction, and checks values and padding.

    Returns an Audit: `.verdicts` names each mode "trusted" or "refused: ...", `.raise_if_failed()` raises InputError.
    Tolerances (relative): 1e-5 in first and 1e-3 in second order; 1e-9 and 1e-7 where the model truly computes in float64.

    Raises InputError for a model that is refused as a whole (`load`, `prepare`), and for updates of another model.
    """
    if level not in ("full", "quick"):
        raise InputError(got=f"level {level!r}", expected="a level", remedy=nearest(str(level), ("full", "quick")))
    ready = model if isinstance(model, Model) else load(model, dtype=dtype, device=device)
    aligned = [ready.align(update) for update in (updates or {}).values()]
    full = level == "full"
    probe = make_probe(
        ready,
        sequences,
        aligned,
        count=4 if full else 3,
        longest=64 if full else 40,
        directions=2 if full else 1,
        seed=seed,
    )
    found = _Evidence(ready, probe, seed)
    before = ready.checksum()
    found.tolerate()
    if full:
        _full(found)
    else:
        _quick(found, engine)
    found.add("weights", "all", "their checksum before", 0.0 if ready.checksum() == before else np.inf, 0.0)
    rows, verdicts = judge(found.rows)
    name = str(ready.dtype).removeprefix("torch.")
    return Audit(name, level, len(probe.sequences), probe.tokens, rows, verdicts, (*ready.notes, *found.notes))


@dataclass
class _Evidence:
    """What is known so far of one model on one probe."""

    model: Model
    probe: Probe
    seed: int
    rows: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    limit: Tolerances = NARROW

    def tolerate(self) -> None:
        """Choose tolerances: the strict ones for a float64 model in which no step is taken in float32, as measured."""
        if self.model.dtype != torch.float64:
            return
        wide = self.attempt("precision", "all", lambda: routes.resolves_float64(self.model, self.probe))
        self.limit = WIDE if wide else NARROW
        if not wide:
            self.notes.append("a float64 model with steps in float32 inside: tolerances are those of float32")

    def add(self, name: str, mode: str, against: str, agreement: float, tolerance: float) -> None:
        self.rows.append(Check(name, mode, against, agreement, tolerance))

    def attempt(self, name: str, mode: str, compute: Callable[[], T]) -> T | None:
        """The result, or None and a failed row with the reason when the route raises."""
        try:
            return compute()
        except Exception as error:  # whatever a model's code raises is the finding
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            self.rows.append(Check(name, mode, "no error", float("nan"), self.limit.first, reason))
            return None


def _quick(found: _Evidence, engine: str) -> None:
    model, probe, limit = found.model, found.probe, found.limit
    jets = found.attempt("jets", engine, lambda: routes.forward_terms(model, probe, engine))
    products = found.attempt("products", "reverse", lambda: routes.reverse_products(model, probe, found.seed))
    if jets is None:
        return
    if products is None:  # a mode that raises cannot confirm; another may
        other = next(m for m in ("nested", "taylor") if m != engine)
        found.notes.append(f"reverse mode raises on this model; {engine} was compared with {other}")
        _pairs(found, {engine: jets, other: _jets(found, other)})
    else:
        _pairs(found, {engine: jets}, products)
    found.add(
        "value", engine, "the model's forward pass", gap(jets.value, routes.value(model, probe.batch())), _near(limit)
    )
    _padding(found, engine, jets)


def _full(found: _Evidence) -> None:
    model, probe, limit = found.model, found.probe, found.limit
    jets = {mode: _jets(found, mode) for mode in ("taylor", "nested")}
    products = found.attempt("products", "reverse", lambda: routes.reverse_products(model, probe, found.seed))
    _pairs(found, jets, products)
    slopes = found.attempt("first order", "nested", lambda: routes.jvp_first(model, probe))
    own = routes.value(model, probe.batch())
    for mode, terms in jets.items():
        if terms is None:
            continue
        found.add("value", mode, "the model's forward pass", gap(terms.value, own), _near(limit))
        if slopes is not None:
            found.add("first order", mode, "jvp", _columns(terms.first, slopes), limit.first)
    _differences(found, jets, products)
    for mode, terms in jets.items():
        if terms is not None:
            found.attempt("linearity", mode, lambda mode=mode, terms=terms: _linearity(found, mode, terms))  # type: ignore[misc]
            found.attempt("padding and batches", mode, lambda mode=mode, terms=terms: _padding(found, mode, terms))  # type: ignore[misc]
    if jets["taylor"] is not None:
        _determinism(found, jets["taylor"])
    if products is not None:
        _reverse(found, products, jets["taylor"] or jets["nested"])


def _jets(found: _Evidence, engine: str) -> Terms | None:
    return found.attempt("jets", engine, lambda: routes.forward_terms(found.model, found.probe, engine))


def _pairs(found: _Evidence, jets: Mapping[str, Terms | None], products: Products | None = None) -> None:
    """The modes against one another, in both orders."""
    limit = found.limit
    known = {mode: terms for mode, terms in jets.items() if terms is not None}
    if len(known) == 2:
        (a, left), (b, right) = known.items()
        found.add("first order", a, b, _columns(left.first, right.first), limit.first)
        found.add("second order", a, b, _columns(left.second, right.second), limit.second)
    for mode, terms in known.items():
        if products is not None:
            found.add("first order", mode, "reverse", _summed(terms.first, products.first, products.signs), limit.first)
            found.add(
                "second order", mode, "reverse", _summed(terms.second, products.second, products.signs), limit.second
            )


def _differences(found: _Evidence, jets: Mapping[str, Terms | None], products: Products | None) -> None:
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


def _linearity(found: _Evidence, engine: str, terms: Terms) -> None:
    """Along 2d: twice and four times. Along d + e: the sum, and the polar form."""
    d, e = found.probe.directions
    along = lambda v: routes.forward_terms(found.model, found.probe, engine, [v])  # noqa: E731
    twice, both = along({n: 2 * x for n, x in d.items()}), along(tree.axpy(1.0, d, e))
    first, second = terms.first, terms.second
    polar = second[:, 0, 0] + second[:, 0, 1] + second[:, 1, 0] + second[:, 1, 1]
    errors = [gap(twice.first[:, 0], 2 * first[:, 0]), gap(both.first[:, 0], first.sum(1))]
    found.add("linearity", engine, "first order along 2d and d + e", max(errors), found.limit.first)
    errors = [gap(twice.second[:, 0, 0], 4 * second[:, 0, 0]), gap(both.second[:, 0, 0], polar)]
    found.add("linearity", engine, "second order along 2d and d + e", max(errors), found.limit.second)


def _padding(found: _Evidence, engine: str, terms: Terms) -> None:
    """Each sequence alone, and all in one right-padded batch."""
    alone = routes.forward_terms(found.model, found.probe, engine, tokens=1)
    name, limit = "padding and batches", found.limit
    errors = [gap(alone.value, terms.value), _columns(alone.first, terms.first)]
    found.add(name, engine, "each sequence alone: value and first order", max(errors), _near(limit))
    error = _columns(alone.second, terms.second)
    found.add(name, engine, "each sequence alone: second order", error, limit.second)


def _determinism(found: _Evidence, terms: Terms) -> None:
    """Bit for bit; on a GPU, where sums of threads have no order, to the tolerance of the first order."""
    again = found.attempt("determinism", "taylor", lambda: routes.forward_terms(found.model, found.probe, "taylor"))
    if again is None:
        return
    exact = all(np.array_equal(getattr(again, f), getattr(terms, f)) for f in ("value", "first", "second"))
    error = 0.0 if exact else max(_columns(again.first, terms.first), _columns(again.second, terms.second), 1e-300)
    found.add("determinism", "taylor", "a second run", error, _exact(found))


def _reverse(found: _Evidence, products: Products, terms: Terms | None) -> None:
    """Symmetry and linearity of Hessian products, and what gradients must not depend on."""
    model, probe, limit = found.model, found.probe, found.limit
    d, e = probe.directions
    across = abs(products.second[0, 1] - products.second[1, 0])
    scale = abs(products.second[0, 1]) if terms is None else float(np.linalg.norm(terms.second[:, 0, 1]))
    found.add("symmetry", "reverse", "d'He = e'Hd", ratio(across, scale), limit.second)

    _, f = routes.signed_sum(model, probe, found.seed)
    hd, he, both = (derivatives.hvp(f, model.parameters, v)[1] for v in (d, e, tree.axpy(1.0, d, e)))
    apart = tree.axpy(1.0, hd, he)
    found.add("linearity", "reverse", "H(d + e) = Hd + He", _vectors(both, apart), limit.second)

    alone = routes.alone_gradient(model, probe, found.seed)
    found.add(
        "padding and batches",
        "reverse",
        "each sequence alone: gradient",
        _vectors(alone, products.gradient),
        _near(limit),
    )
    domain = Domain("audit", probe.sequences)
    whole, split = (
        derivatives.objective_gradient(model, domain, "nll", batch_tokens=tokens)
        for tokens in (routes.WHOLE, 2 * min(len(s.prompt) + len(s.response) for s in probe.sequences[:2]))
    )
    found.add(
        "padding and batches", "reverse", "the loss' gradient in ragged batches", _vectors(split, whole), _near(limit)
    )
    if terms is not None:
        total, size = terms.first[:, 0], probe.tokens
        error = abs(tree.dot(split, d) + total.sum() / size) * size
        found.add(
            "padding and batches",
            "reverse",
            "the loss' slope by jets",
            ratio(error, float(np.linalg.norm(total))),
            limit.first,
        )
    again = derivatives.gradient(f, model.parameters)
    error = max((float((again[n] - g).abs().max()) for n, g in products.gradient.items()), default=0.0)
    error = ratio(error, max(float(g.abs().max()) for g in products.gradient.values()))
    found.add("determinism", "reverse", "a second run", error, _exact(found))


def _exact(found: _Evidence) -> float:
    return 0.0 if found.model.device.type == "cpu" else found.limit.first


def _near(limit: Tolerances) -> float:
    """For two computations of one thing, whose sums may be taken in another order."""
    return limit.first


def ratio(error: float, size: float) -> float:
    """error / size; zero only for no error at all, however small the size."""
    return float(error / size) if size else (0.0 if error == 0 else float("inf"))


def gap(got: Array, expected: Array) -> float:
    """|got - expected| / |expected| over sequences, so that no sum that is near zero by accident is the scale."""
    return ratio(float(np.linalg.norm(got - expected)), float(np.linalg.norm(expected)))


def _columns(got: Array, expected: Array) -> float:
    """The worst gap over directions (or pairs of them); sequences come first."""
    S = len(got)
    pairs = zip(got.reshape(S, -1).T, expected.reshape(S, -1).T, strict=True)
    errors = [gap(a, b) for a, b in pairs]
    return float(np.max(errors))


def _summed(terms: Array, products: Array, signs: Array) -> float:
    """The worst error of products against signed sums of per-sequence terms, relative to the terms' norm."""
    flat = terms.reshape(len(terms), -1)
    errors = abs(signs @ flat - products.reshape(-1)), np.linalg.norm(flat, axis=0)
    return float(np.max([ratio(float(a), float(b)) for a, b in zip(*errors, strict=True)]))


def _vectors(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    return ratio(tree.norm(tree.axpy(-1.0, expected, got)), tree.norm(expected))
