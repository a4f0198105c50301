"""The key `plans` of a forecast's RUN.yaml: which mixtures and orders of the trainings to run virtually."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any, Literal

from pydantic import field_validator, model_validator

from interference.config import Strict
from interference.errors import nearest
from interference.forecasting.mixtures import checked, equal_mixtures, label, planned
from interference.forecasting.plans import check_order
from interference.forecasting.training import Training

MOST_MIXED, MOST_ORDERED = 6, 4
"""Domains up to which all equal mixtures (63 trainings), and all orders (64 trainings), are computed for the asking."""
THEN = " → "
"""Stands between the domains of an order's label."""
Mixtures = list[dict[str, float]]
Orders = list[tuple[str, ...]]


class Plans(Strict):
    """mixtures: "equal", every choice of domains in equal shares, or weights that sum to one, {domain: weight} each.
    orders: "all", every order of all domains, or lists of domains. What is absent is not computed."""

    mixtures: Literal["equal"] | list[dict[str, float]] | None = None
    orders: Literal["all"] | list[list[str]] | None = None

    @field_validator("mixtures", mode="before")
    @classmethod
    def _mixtures(cls, value: Any) -> Any:
        _check_word(value, "equal", "a list of {domain: weight}", Mapping)
        for weights in value if isinstance(value, list) else ():
            for name, weight in weights.items():
                if not isinstance(name, str) or isinstance(weight, bool) or not isinstance(weight, (int, float)):
                    raise ValueError(f"numbers for names of domains, as in {{math: 0.5, code: 0.5}}; got {weights}")
        return value

    @field_validator("orders", mode="before")
    @classmethod
    def _orders(cls, value: Any) -> Any:
        _check_word(value, "all", "a list of lists of domains, as in [[math, code], [code, math]]", list)
        if isinstance(value, list) and not all(isinstance(name, str) for order in value for name in order):
            raise ValueError("names of domains in every order")
        return value

    @model_validator(mode="after")
    def _something(self) -> Plans:
        if self.mixtures is None and self.orders is None:
            raise ValueError("`mixtures: equal`, `orders: all`, or both; leave `plans` out for neither")
        return self


def mixtures_of(asked: Plans | None, names: Sequence[str]) -> Mixtures:
    """The mixtures asked for, without weights of 0, domains in the order of `names`.

    Raises ValueError for unknown domains, weights that are negative or do not sum to one, repeats, and "equal" for too many
    domains.
    """
    if asked is None or asked.mixtures is None:
        return []
    if asked.mixtures == "equal":
        if len(names) > MOST_MIXED:
            raise ValueError(
                f"plans: `mixtures: equal` of {len(names)} domains are {2 ** len(names) - 1} trainings; list those that matter, "
                "as in mixtures: [{math: 0.5, code: 0.5}]"
            )
        return equal_mixtures(names)
    out = [checked(weights, names) for weights in asked.mixtures]
    _check_different([label(weights) for weights in out], "mixture")
    return out


def orders_of(asked: Plans | None, names: Sequence[str]) -> Orders:
    """The orders asked for.

    Raises ValueError for unknown domains, empty orders, repeats, and "all" for too many domains.
    """
    if asked is None or asked.orders is None:
        return []
    if asked.orders == "all":
        if len(names) > MOST_ORDERED:
            raise ValueError(
                f"plans: `orders: all` of {len(names)} domains are {prefixes(len(names))} trainings, one for everything that "
                "orders begin with; list those that matter, as in orders: [[math, code], [code, math]]"
            )
        return list(permutations(names))
    for order in asked.orders:
        check_order(order, names)
    out = [tuple(order) for order in asked.orders]
    _check_different([THEN.join(order) for order in out], "order")
    return out


def prefixes(domains: int) -> int:
    """Trainings that all orders of so many domains take, each beginning once: the sum over k of n! / (n - k)!.

    >>> prefixes(2), prefixes(4), prefixes(5)
    (4, 64, 325)
    """
    return sum(math.perm(domains, k) for k in range(1, domains + 1))


def check_alike(mixtures: Mixtures, trainings: Mapping[str, Training]) -> None:
    """ValueError where domains that are mixed would be trained differently in anything but their steps."""
    for weights in mixtures:
        planned(weights, trainings)


def _check_word(value: Any, word: str, otherwise: str, kind: type) -> None:
    """Refuse what is neither the word nor a list of a kind."""
    if isinstance(value, str) and value != word:
        raise ValueError(f"`{word}` or {otherwise} ({nearest(value, [word])})")
    if value is None or isinstance(value, str):
        return
    if not isinstance(value, list) or not value or not all(isinstance(entry, kind) for entry in value):
        raise ValueError(f"`{word}` or {otherwise}")


def _check_different(labels: Sequence[str], what: str) -> None:
    for name in labels:
        if labels.count(name) > 1:
            raise ValueError(f"plans: {what} {name!r} occurs twice")
