"""Where two domains use the same routes: do their updates move them the same way? Beside random routes and the whole.

A channel's coordinates are its rows of gate and up and its column of down; a head's are its rows of q, its columns of o, and the
rows of k and v that serve it (once, where several active heads share them). An expert's channels are counted like others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from interference import statistics, tree
from interference.anatomy import Anatomy
from interference.errors import InputError
from interference.probes.experts import KIND as EXPERT
from interference.probes.routes import Routes, active, layers_of, same_units
from interference.statistics import Array
from interference.tree import NamedChanges

DRAWS = 500
_COLUMNS = [
    *("a", "b", "kind", "top", "layer", "units", "share", "count"),
    *("cosine", "cosine_chance", "cosine_chance_low", "cosine_chance_high", "cosine_whole"),
    *("sign_agreement", "sign_chance", "sign_chance_low", "sign_chance_high", "sign_whole"),
]


def update_on_routes(
    updates: Mapping[str, NamedChanges],
    routes: Mapping[str, Routes],
    anatomy: Anatomy,
    top: float | Sequence[float] = 0.1,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> pd.DataFrame:
    """Cosine and sign agreement of each pair of domains' updates on the units that are active for both.

    Args:
        updates: {domain: its update}, under the model's parameter names (`Model.align`).
        routes: {domain: its routes}; active are the top share of each layer's units of a kind.
        anatomy: of the model.
        top: the share q of active units, or several, each with its own rows.
        draws: random sets of units, of the same number in each layer, for the null.

    Returns:
        a, b, kind ("channel", "head", "expert channel"; "all": the whole updates, which have no null), top, layer (-1: all
        layers), units, share (active, mean of the two domains: q in whole units of each layer), count (active for both), cosine,
        sign_agreement (share of the coordinates that both change whose signs agree); of each, `_chance`, `_chance_low`,
        `_chance_high`: mean and central 90 % over random sets, `_whole`: on all units of the row's layers. NaN where nothing is
        shared or changed.

    Raises:
        InputError: fewer than two updates, one without routes or without tensors of this model, routes of another model, and a
            top outside of (0, 1].
    """
    tops = [float(top)] if isinstance(top, (int, float)) else list(top)
    _check(updates, routes, anatomy, tops, draws)
    units = same_units({name: routes[name] for name in updates})
    totals = _totals(updates, anatomy)
    parts = [_rows(totals, updates, routes, units, anatomy, top, draws, seed) for top in tops]
    return pd.DataFrame([row for part in parts for row in part], columns=_COLUMNS)


def _rows(
    totals: Array,
    names: Iterable[str],
    routes: Mapping[str, Routes],
    units: pd.DataFrame,
    anatomy: Anatomy,
    top: float,
    draws: int,
    seed: int,
) -> list[dict[str, Any]]:
    """The rows of one top share, from the sums of `_totals`."""
    on = {name: active(routes[name].scores, top) for name in names}
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for (a, b), values in zip(combinations(on, 2), totals, strict=True):
        for kind in dict.fromkeys(units["kind"]):
            layers = []
            for layer, where in layers_of(units, kind):
                section = _Section.of(anatomy, values, kind, layer, len(where))
                layers.append((layer, section.compare(on[a][where], on[b][where], draws, rng)))
            whole = _Comparison(*(sum(getattr(c, f) for _, c in layers) for f in _Comparison.__annotations__))
            for layer, comparison in [(-1, whole), *layers]:
                rows.append({"a": a, "b": b, "kind": kind, "top": top, "layer": layer, **comparison.row()})
        cosine, sign = _measures(values.sum(-1))
        row = {"a": a, "b": b, "kind": "all", "top": top, "layer": -1, "units": anatomy.units, "count": anatomy.units}
        rows.append({**row, "cosine": cosine, "cosine_whole": cosine, "sign_agreement": sign, "sign_whole": sign})
    return rows


def _check(
    updates: Mapping[str, NamedChanges],
    routes: Mapping[str, Routes],
    anatomy: Anatomy,
    tops: Sequence[float],
    draws: int,
) -> None:
    missing = [name for name in updates if name not in routes]
    if len(updates) < 2 or missing or not tops or not all(0 < top <= 1 for top in tops) or draws < 2:
        raise InputError(
            got=f"updates {list(updates)}, routes of {list(routes)}, tops {tops}, {draws} draws",
            expected="at least two updates, each named as a domain with routes, a top in (0, 1], and two draws or more",
            remedy="name each update as its domain",
        )
    for update, tensors in updates.items():
        strange = [n for n in tensors if n not in anatomy.places or tensors[n].shape != anatomy.shapes[n]]
        if strange or not len(tensors):
            raise InputError(
                got=f"update {update!r} " + (f"with {strange[0]!r}" if strange else "without tensors"),
                expected="tensors of the model's parameters, by their names and of their shapes",
                remedy="use model.align(update)",
            )


def _totals(updates: Mapping[str, NamedChanges], anatomy: Anatomy) -> Array:
    """(pairs, 5, anatomy units): a b, a a, b b, coordinates where signs agree, and that both change. Streamed by tensor."""
    names = list(updates)
    pairs = list(combinations(range(len(names)), 2))
    out = np.zeros((len(pairs), 5, anatomy.units))

    def sums(name: str, values: torch.Tensor) -> Array:
        return np.asarray(anatomy.sums(name, values).cpu().numpy())

    for name, place in anatomy.places.items():
        held = {i: tree.dense(updates[n][name]).detach().double() for i, n in enumerate(names) if name in updates[n]}
        squares = {i: sums(name, x * x) for i, x in held.items()}
        for p, pair in enumerate(pairs):
            for row, i in enumerate(pair, start=1):
                out[p, row, place] = squares.get(i, 0.0)
            if all(i in held for i in pair):
                product = held[pair[0]] * held[pair[1]]
                signs = held[pair[0]].sign() * held[pair[1]].sign()  # of factors: a product may underflow
                for row, values in ((0, product), (3, signs > 0), (4, signs != 0)):
                    out[p, row, place] = sums(name, values)
    return out


def _measures(sums: Array) -> tuple[Any, Any]:
    """Cosine and sign agreement from the five sums (5, ...)."""
    dot, aa, bb, agree, both = sums
    with np.errstate(invalid="ignore", divide="ignore"):
        return dot / (np.sqrt(aa) * np.sqrt(bb)), agree / both


@dataclass(frozen=True, eq=False)
class _Comparison:
    """Sums over the shared units, over all, and over random sets (5, draws). Those of several layers add up.

    either: how many are active in the one domain plus how many in the other.
    """

    units: Any
    either: Any
    count: Any
    shared: Any
    whole: Any
    random: Any

    def row(self) -> dict[str, Any]:
        out: dict[str, Any] = {"units": self.units, "share": self.either / (2 * self.units), "count": self.count}
        measures = [_measures(x) for x in (self.shared, self.whole, self.random)]
        for name, short, (value, whole, draws) in zip(
            ("cosine", "sign_agreement"), ("cosine", "sign"), zip(*measures, strict=True), strict=True
        ):
            finite = draws[np.isfinite(draws)]
            low, high = statistics.interval(draws)
            chance = float(finite.mean()) if len(finite) else float("nan")
            out |= {
                name: float(value),
                f"{short}_chance": chance,
                f"{short}_chance_low": low,
                f"{short}_chance_high": high,
            }
            out[f"{short}_whole"] = float(whole)
        return out


@dataclass(frozen=True, eq=False)
class _Section:
    """One layer's units of a kind: their own sums (5, units), and those of the groups (5, G) that consecutive ones share."""

    own: Array
    groups: Array

    @classmethod
    def of(cls, anatomy: Anatomy, values: Array, kind: str, layer: int, units: int) -> _Section:
        labels = anatomy.labels
        here = (labels["layer"] == layer) & ((labels["expert"] >= 0) == (kind == EXPERT))
        groups = np.zeros((5, 0))
        if kind == "channel":
            own = cls._by(values, labels["channel"], here)
        elif kind == EXPERT:
            each = int(labels["channel"][here].max(initial=-1)) + 1
            place = np.where(labels["channel"] >= 0, labels["expert"] * each + labels["channel"], -1)
            own = cls._by(values, place, here)
        else:
            own = cls._by(values, labels["head"], here & (labels["kind"] == 0))
            groups = cls._by(values, labels["head"], here & (labels["kind"] == 1))
        if own.shape[1] != units or (groups.shape[1] and units % groups.shape[1]):
            raise InputError(
                got=f"routes with {units} {kind}s in layer {layer}, where the anatomy has {own.shape[1]}",
                expected="routes and anatomy of one model",
                remedy="read the anatomy of the model that the routes were measured on",
            )
        return cls(own, groups)

    @staticmethod
    def _by(values: Array, label: NDArray[np.int32], here: NDArray[np.bool_]) -> Array:
        where = np.flatnonzero(here & (label >= 0))
        return np.stack([np.bincount(label[where], v[where]) for v in values])

    def sums(self, chosen: NDArray[np.bool_]) -> Array:
        """(5, ...) over chosen units (..., units)."""
        out = chosen.astype(np.float64) @ self.own.T
        if self.groups.shape[1]:
            served = chosen.reshape(*chosen.shape[:-1], self.groups.shape[1], -1).any(-1)
            out = out + served.astype(np.float64) @ self.groups.T
        return np.moveaxis(out, -1, 0)

    def compare(self, a: NDArray[np.bool_], b: NDArray[np.bool_], draws: int, rng: np.random.Generator) -> _Comparison:
        shared, either = a & b, int(a.sum() + b.sum())
        units, count = len(shared), int(shared.sum())
        random = np.zeros((draws, units), dtype=bool)
        if count:
            places = rng.random((draws, units)).argpartition(count - 1, axis=1)[:, :count]
            np.put_along_axis(random, places, True, axis=1)
        return _Comparison(
            units, either, count, self.sums(shared), self.sums(np.ones(units, dtype=bool)), self.sums(random)
        )
