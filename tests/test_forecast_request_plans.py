"""`plans` in the request of `interference forecast`: what it means, and what is refused before anything is opened."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from test_forecast_command import Request, read
from test_forecast_command_plans import request

from interference.errors import InputError
from interference.forecast_run.asked_plans import Plans, mixtures_of, orders_of
from interference.forecast_run.config import ForecastConfig


def test_plans_are_put_in_order() -> None:
    asked = Plans(mixtures=[{"b": 0.5, "c": 0, "a": 0.5}], orders=[["b", "a"], ["b"]])
    assert mixtures_of(asked, "abc") == [{"a": 0.5, "b": 0.5}]
    assert orders_of(asked, "abc") == [("b", "a"), ("b",)]
    every = Plans(mixtures="equal", orders="all")
    assert (len(mixtures_of(every, "abcdef")), len(orders_of(every, "abcd"))) == (63, 24)
    assert mixtures_of(None, "ab") == orders_of(None, "ab") == []


SEVEN = {"domains": [{"name": d, "data": "a.jsonl"} for d in "abcdefg"]}
FIVE = {"domains": SEVEN["domains"][:5]}


def own(**values: Any) -> Request:
    return {"domains": [{"name": d, "data": "a.jsonl", "training": values if d == "b" else {}} for d in "ab"]}


BAD: list[tuple[Any, Request, str]] = [
    ({}, {}, "`mixtures: equal`, `orders: all`, or both"),
    ({"mixture": "equal"}, {}, "did you mean 'mixtures'?"),
    ({"mixtures": "eqaul"}, {}, "did you mean 'equal'?"),
    ({"orders": "al"}, {}, "did you mean 'all'?"),
    ({"mixtures": {"a": 1.0}}, {}, "`equal` or a list of {domain: weight}"),
    ({"mixtures": []}, {}, "`equal` or a list of {domain: weight}"),
    ({"mixtures": [["a", "b"]]}, {}, "`equal` or a list of {domain: weight}"),
    ({"mixtures": [{"a": "half", "b": 0.5}]}, {}, "numbers for names of domains"),
    ({"mixtures": [{"a": 0.5, "d": 0.5}]}, {}, "a mixture with 'd' in"),
    ({"mixtures": [{"a": 0.5, "b": 0.4}]}, {}, "(sum 0.9)"),
    ({"mixtures": [{"a": 1.5, "b": -0.5}]}, {}, "weights of 0 or more that sum to 1"),
    ({"mixtures": [{"a": math.nan, "b": 0.5}]}, {}, "weights of 0 or more that sum to 1"),
    ({"mixtures": [{}]}, {}, "weights of 0 or more that sum to 1"),
    ({"mixtures": [{"a": 0.5, "b": 0.5}, {"b": 0.5, "a": 0.5, "c": 0}]}, {}, "mixture 'a + b' occurs twice"),
    ({"mixtures": "equal"}, SEVEN, "of 7 domains are 127 trainings"),
    ({"orders": ["a", "b"]}, {}, "as in [[math, code], [code, math]]"),
    ({"orders": [[1, 2]]}, {}, "names of domains in every order"),
    ({"orders": [["a", "d"]]}, {}, "order with 'd' in"),
    ({"orders": [["a", "b", "a"]]}, {}, "every domain at most once"),
    ({"orders": [[]]}, {}, "and at least one"),
    ({"orders": [["a", "b"], ["a", "b"]]}, {}, "order 'a → b' occurs twice"),
    ({"orders": "all"}, FIVE, "of 5 domains are 325 trainings"),
    ({"mixtures": "equal"}, own(learning_rate=1e-4), "trainings of 'a' and 'b' differ (learning_rate)"),
    (
        {"mixtures": "equal"},
        {"objective": "nll", "evaluation": [{"name": "a", "data": "a.jsonl"}]},
        "plans compare expected rewards",
    ),
]


@pytest.mark.parametrize(("asked", "changes", "message"), BAD, ids=[m for *_, m in BAD])
def test_bad_plans_are_refused_when_the_request_is_read(
    tmp_path: Path, asked: Any, changes: Request, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, request(plans=asked, **changes), tmp_path / "run")
    assert message in str(caught.value)
    assert "Remedy: " in str(caught.value)


def test_what_plans_may_do(tmp_path: Path) -> None:
    """Trainings that differ may follow each other, or be mixed where they differ in their steps alone; lists have no limit."""
    fine: list[tuple[Request, Request]] = [
        ({"orders": "all"}, own(learning_rate=1e-4)),
        ({"mixtures": "equal"}, own(steps=5)),
        ({"mixtures": [{"a": 1.0}, {"b": 1.0}]}, own(learning_rate=1e-4)),
        ({"mixtures": [{"a": 0.5, "g": 0.5}], "orders": [list("gfedcba")]}, SEVEN),
    ]
    for asked, changes in fine:
        config = read(tmp_path, request(plans=asked, **changes), tmp_path / "run")
        assert isinstance(config, ForecastConfig)
        assert config.mixtures or config.orders
