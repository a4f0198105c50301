"""QuadraticModel: one objective of one domain, to second order, on the span of the updates.

L(theta + sum_k a_k d_k)  ~  L + c . a + 1/2 a' A a,    c[k] = grad L . d_k,    A[k, l] = d_k' H d_l
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import optimize

from interference import statistics
from interference.domain import Domain
from interference.errors import InputError, nearest
from interference.objectives import OBJECTIVES, SequenceTerms

Array = NDArray[np.float64]
ORDERS = ("first", "second", "ggn")


def _order(order: int | str) -> str:
    """ "first", "second" or "ggn"; InputError for anything else."""
    name = {1: "first", 2: "second"}.get(order, str(order)) if isinstance(order, int) else order
    if name not in ORDERS:
        raise InputError(got=f"order {order!r}", expected="1, 2 or 'ggn'", remedy="use order=2 for the Hessian")
    return name


@dataclass(frozen=True)
class Prediction:
    """A predicted change. value: at the order asked for; first, second: its first- and second-order parts
    (value = first + second); stderr and interval (90 %) by bootstrap over prompts; replicates behind them."""

    value: float
    first: float
    second: float
    stderr: float
    interval: tuple[float, float]
    replicates: Array = field(repr=False)


@dataclass(frozen=True, eq=False)
class QuadraticModel:
    """Fields of the model, and the per-sequence terms that its error bars come from.

    value; slope (K,); curvature (K, K), the Hessian's; ggn (K, K), the Gauss-Newton part: in the objective's unit, at unit
    coefficients of the updates `names`. prompt_ids: one per sequence. Entries off the diagonal are NaN when the expansion was
    made without pairs.
    """

    objective: str
    domain: str
    names: tuple[str, ...]
    prompt_ids: tuple[str, ...]
    terms: SequenceTerms
    seed: int = 0

    @cached_property
    def _prompts(self) -> tuple[list[str], Array, Array]:
        """Per-prompt sums: ids, numerators (P, 1 + K + 2 K K), denominators (P,)."""
        t, S = self.terms, len(self.prompt_ids)
        flat = [
            t.value[:, None],
            t.slope,
            t.curvature.reshape(S, -1),
            t.ggn.reshape(S, -1),
            t.denominator[:, None],
        ]
        ids, sums = statistics.group_sums(np.concatenate(flat, axis=1), self.prompt_ids)
        return ids, sums[:, :-1], sums[:, -1]

    def _unpack(self, flat: Array) -> tuple[Array, Array, Array, Array]:
        K, lead = len(self.names), flat.shape[:-1]
        square = (*lead, K, K)
        hessian, ggn = flat[..., 1 + K : 1 + K + K * K], flat[..., 1 + K + K * K :]
        return flat[..., 0], flat[..., 1 : 1 + K], hessian.reshape(square), ggn.reshape(square)

    @cached_property
    def _estimate(self) -> tuple[Array, Array, Array, Array]:
        _, numerator, denominator = self._prompts
        return self._unpack(numerator.sum(0) / denominator.sum())

    @cached_property
    def _replicates(self) -> tuple[Array, Array, Array, Array]:
        ids, numerator, denominator = self._prompts
        return self._unpack(statistics.ratio_replicates(numerator, denominator, ids, self.seed))

    @property
    def unit(self) -> str:
        return OBJECTIVES[self.objective].unit

    @property
    def prompts(self) -> int:
        """Number of distinct prompts."""
        return len(self._prompts[0])

    @property
    def value(self) -> float:
        return float(self._estimate[0])

    @property
    def slope(self) -> Array:
        return self._estimate[1]

    @property
    def curvature(self) -> Array:
        return self._estimate[2]

    @property
    def ggn(self) -> Array:
        return self._estimate[3]

    def predict(self, alpha: Mapping[str, float], order: int | str = 2) -> Prediction:
        """The change L(theta + sum_k alpha_k d_k) - L(theta); updates that are not named have coefficient 0.

        order: 1 or "first"; 2 or "second" (the Hessian); "ggn" (second order with the Gauss-Newton curvature).

        Raises InputError for an unknown update or order, and for several updates at once without pairs.
        """
        name = _order(order)
        a = self._coefficients(alpha)
        parts = [self._parts(a, name, source) for source in (self._estimate, self._replicates)]
        (first, second), (first_r, second_r) = parts
        replicates = np.asarray(first_r + second_r)
        return Prediction(
            float(first + second),
            float(first),
            float(second),
            float(statistics.stderr(replicates)),
            statistics.interval(replicates),
            replicates,
        )

    def _parts(self, a: Array, order: str, source: tuple[Array, ...]) -> tuple[Array, Array]:
        _, slope, hessian, ggn = source
        first = slope @ a
        if order == "first":
            return first, np.zeros_like(first)
        used = np.flatnonzero(a)
        matrix = (hessian if order == "second" else ggn)[..., used[:, None], used]
        if np.isnan(self.curvature[used[:, None], used]).any():
            raise InputError(
                got=f"coefficients of {len(used)} updates on an expansion without pairs",
                expected="one update at a time",
                remedy="call expand(..., pairs=True)",
            )
        return first, 0.5 * np.einsum("k,...kl,l->...", a[used], matrix, a[used])

    def _coefficients(self, alpha: Mapping[str, float]) -> Array:
        for name in alpha:
            if name not in self.names:
                raise InputError(
                    got=f"update {name!r}",
                    expected="an update of this expansion",
                    remedy=nearest(name, self.names),
                )
        return np.array([float(alpha.get(name, 0.0)) for name in self.names])

    def minimise(self, bounds: tuple[float, float] = (0.0, 1.0), order: int | str = 2) -> dict[str, float]:
        """The coefficients within `bounds` at which the model says the domain does best.

        That is the least loss, or the highest reward for an objective that is better when higher. The box keeps the answer
        where the expansion means something; a curvature of the wrong sign has its optimum on the boundary, so the search
        starts from every corner that few updates allow, and from the middle.
        """
        sign = 1.0 if OBJECTIVES[self.objective].better == "lower" else -1.0
        matrix = {"first": np.zeros_like(self.ggn), "second": self.curvature, "ggn": self.ggn}[_order(order)]
        if np.isnan(matrix).any():
            raise InputError(
                got="an expansion without pairs", expected="all pairs", remedy="call expand(..., pairs=True)"
            )
        best = min(
            (
                optimize.minimize(
                    lambda a: (
                        sign * (self.slope @ a + 0.5 * a @ matrix @ a),
                        sign * (self.slope + matrix @ a),
                    ),
                    start,
                    jac=True,
                    bounds=[bounds] * len(self.names),
                    method="L-BFGS-B",
                )
                for start in box_starts(len(self.names), bounds)
            ),
            key=lambda found: found.fun,
        )
        return {name: float(a) for name, a in zip(self.names, best.x, strict=True)}

    def to_frame(self) -> pd.DataFrame:
        """One row per update at coefficient 1.

        objective, domain, update; anchor_value (the objective on the data behind the model); predicted_first,
        predicted_second, predicted_second_ggn, with stderr_first, stderr, stderr_ggn; low and high, the 90 % interval of
        predicted_second.
        """
        rows = []
        for name in self.names:
            first, second, ggn = (self.predict({name: 1.0}, order) for order in ORDERS)
            rows.append(
                {
                    "objective": self.objective,
                    "domain": self.domain,
                    "update": name,
                    "anchor_value": self.value,
                    "predicted_first": first.value,
                    "predicted_second": second.value,
                    "predicted_second_ggn": ggn.value,
                    "stderr_first": first.stderr,
                    "stderr": second.stderr,
                    "stderr_ggn": ggn.stderr,
                    "low": second.interval[0],
                    "high": second.interval[1],
                }
            )
        return pd.DataFrame(rows)


def box_starts(count: int, bounds: tuple[float, float]) -> Array:
    """(N, count) points to search a box from: its middle, and every corner of its first six sides.

    >>> box_starts(1, (0.0, 1.0)).tolist()
    [[0.5], [0.0], [1.0]]
    """
    middle, used = sum(bounds) / 2, min(count, 6)
    corners = np.array(np.meshgrid(*[list(bounds)] * used)).reshape(used, -1).T
    corners = np.pad(corners, ((0, 0), (0, count - used)), constant_values=middle)
    return np.concatenate([np.full((1, count), middle), corners])


def check_models(
    models: Mapping[str, QuadraticModel],
    objective: str,
    updates: Mapping[str, object],
    domains: Mapping[str, Domain],
) -> None:
    """Refuse quadratic models that were not made for this objective, these updates in this order, and these domains' data."""
    missing = [name for name in domains if name not in models]
    if missing:
        raise _other(f"models for {_listed(models)}", f"one for domain {missing[0]!r}")
    for name, domain in domains.items():
        model = models[name]
        if model.objective != objective:
            raise _other(f"the model of {name!r} with objective {model.objective!r}", f"objective {objective!r}")
        if model.names != tuple(updates):
            raise _other(f"the model of {name!r} along {_listed(model.names)}", f"the updates {_listed(updates)}")
        if model.prompt_ids != tuple(domain.prompt_ids):
            raise _other(
                f"the model of {name!r} made on other sequences", f"the {len(domain.prompt_ids)} of this domain"
            )


def _other(got: str, expected: str) -> InputError:
    remedy = "give what `expand` returned for the same updates, domains and objective, or leave `models` out"
    return InputError(got=got, expected=expected, remedy=remedy)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "nothing"
