"""What an audit has found so far, and the relative errors in which it is said."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from interference import tree
from interference.checks import routes
from interference.checks.probe import Probe
from interference.checks.result import Check
from interference.errors import InputError
from interference.model import Model

Array = NDArray[np.float64]
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


@dataclass
class Evidence:
    """What is known so far of one model on one probe."""

    model: Model
    probe: Probe
    seed: int
    pairs: bool = True
    rows: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    limit: Tolerances = field(default_factory=lambda: NARROW)
    strict: bool = True

    def tolerate(self) -> None:
        """Choose tolerances: the strict ones for a float64 model in which no step is taken in float32, as measured."""
        if self.model.dtype != torch.float64 or not self.strict:
            return
        try:
            wide = routes.resolves_float64(self.model, self.probe)
        except Exception:  # what raises is found, and said, by the checks of the modes
            return
        self.limit = WIDE if wide else NARROW
        if not wide:
            self.notes.append("a float64 model with steps in float32 inside: tolerances are those of float32")

    def widened(self) -> Evidence:
        """Nothing found yet, of a copy of the model in float64 on the same probe, under the tolerances of float32."""
        module = copy.deepcopy(self.model.module).double()
        directions = tuple({n: x.double() for n, x in d.items()} for d in self.probe.directions)
        model = Model(module, dict(module.named_parameters()))
        return Evidence(model, Probe(self.probe.sequences, directions), self.seed, self.pairs, strict=False)

    def add(self, name: str, mode: str, against: str, agreement: float, tolerance: float) -> None:
        self.rows.append(Check(name, mode, against, agreement, tolerance))

    def attempt(self, name: str, mode: str, compute: Callable[[], T]) -> T | None:
        """The result, or None and a failed row with the reason when the route raises."""
        try:
            return compute()
        except Exception as error:  # whatever a model's code raises is the finding
            given = error.got if isinstance(error, InputError) else str(error) or type(error).__name__
            remedy = error.remedy if isinstance(error, InputError) else ""
            reason = " ".join(given.split())[:300]
            self.rows.append(Check(name, mode, "no error", float("nan"), self.limit.first, remedy, reason))
            return None

    @property
    def exact(self) -> float:
        """The tolerance of a second run: none, but on a GPU, where sums over threads have no order."""
        return 0.0 if self.model.device.type == "cpu" else self.limit.first


def ratio(error: float, size: float) -> float:
    """error / size; zero only for no error at all, however small the size."""
    return float(error / size) if size else (0.0 if error == 0 else float("inf"))


def gap(got: Array, expected: Array) -> float:
    """|got - expected| / |expected| over sequences, so that no sum that is near zero by accident is the scale."""
    return ratio(float(np.linalg.norm(got - expected)), float(np.linalg.norm(expected)))


def worst_gap(got: Array, expected: Array) -> float:
    """The worst gap over directions (or pairs of them); sequences come first."""
    S = len(got)
    pairs = zip(got.reshape(S, -1).T, expected.reshape(S, -1).T, strict=True)
    errors = [gap(a, b) for a, b in pairs]
    return float(float(np.max(errors)))


def summed_gap(terms: Array, products: Array, signs: Array) -> float:
    """The worst error of products against signed sums of per-sequence terms, relative to the terms' norm."""
    flat = terms.reshape(len(terms), -1)
    errors = abs(signs @ flat - products.reshape(-1)), np.linalg.norm(flat, axis=0)
    return float(np.max([ratio(float(a), float(b)) for a, b in zip(*errors, strict=True)]))


def vector_gap(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    return ratio(tree.norm(tree.axpy(-1.0, expected, got)), tree.norm(expected))
