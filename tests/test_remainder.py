"""The remainder of a float64 toy transformer against high-order differences and dense scans, and what `evaluate` makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from interference import Checkpoint, Domain, Update, evaluate, expand, measure
from interference.domain import Sequence
from interference.errors import InputError
from interference.measurement import score
from interference.model import Model
from interference.remainder import remainder

OBJECTIVES = ("nll", "reward", "kl")
PROMPTS = 24


def domain(alike: bool = False) -> Domain:
    """`alike`: every prompt the same, so that there is no sampling noise."""
    g = np.random.default_rng(0)
    ids = g.integers(0, 23, (2 * PROMPTS, 8)).tolist()
    made = [Sequence(tuple(r[:3]), tuple(r[3:]), f"p{i // 2}", float(g.random())) for i, r in enumerate(ids)]
    if alike:
        made = [replace(made[i % 2], prompt_id=s.prompt_id) for i, s in enumerate(made)]
    return Domain("d", tuple(made))


def update(model: Model, size: float, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: size * torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in model.parameters.items()}


def along(model: Model, data: Domain, step: dict[str, Tensor], objective: str, alphas: Any) -> np.ndarray[Any, Any]:
    """L(alpha) - L(0) from sequence scores, by the definitions and not by the library's estimators."""
    anchor, *moved = score(model, data, [(step, float(a)) for a in alphas])
    tokens = sum(len(s.response) for s in data.sequences)
    if objective == "nll":
        return np.array([(anchor.logp - m.logp).sum() / tokens for m in moved])
    if objective == "kl":
        return np.array([m.kl.sum() / tokens for m in moved])
    reward = np.asarray(data.rewards())
    other = reward.reshape(-1, 2)[:, ::-1].ravel()  # two responses a prompt: the baseline is the other one's reward
    return np.array([((reward - other) * np.expm1(m.logp - anchor.logp)).mean() for m in moved])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_third_derivative_against_high_order_differences(toy: Model, objective: str) -> None:
    data, step, h = domain(), update(toy, 0.003), 0.05
    table = remainder(toy, {"u": step}, {"d": data}, objective=objective, alphas=(0.05, 0.1))
    value = along(toy, data, step, objective, [h * k for k in (1, 2, 3, -1, -2, -3)])
    odd = (value[:3] - value[3:]) / 2
    oracle = float((-13 * odd[0] + 8 * odd[1] - odd[2]) / (4 * h**3))  # central differences, error of order h^4
    row = table.iloc[0]
    assert row["third"] == pytest.approx(oracle / 6, rel=3e-3)
    assert row["third"] != pytest.approx(oracle, rel=0.5)  # planted: without the 1/6
    assert abs(row["third"] - oracle / 6) <= row["third_misfit"]
    assert (row["radius_reason"], row["beyond_radius"]) in {("held", None), ("noise", None)}
    assert np.isnan(row["remainder"])


@pytest.mark.parametrize(("objective", "size"), [("nll", 0.03), ("nll", 0.02), ("kl", 0.015), ("kl", 0.01)])
def test_radius_against_a_dense_scan(toy: Model, objective: str, size: float) -> None:
    data, step = domain(alike=True), update(toy, size)
    model = expand(toy, {"u": step}, {"d": data}, objective=objective)["d"]
    alphas = (0.25, 0.5, 0.75, 1.0, 1.5)
    row = remainder(toy, {"u": step}, {"d": data}, objective=objective, alphas=alphas, models={"d": model}).iloc[0]
    t = np.linspace(0, 1.5, 201)[1:]
    change = along(toy, data, step, objective, t)
    out = np.abs(change - model.slope[0] * t - 0.5 * model.curvature[0, 0] * t**2) > 0.1 * np.maximum.accumulate(
        np.abs(change)
    )
    assert out.any()
    assert row["radius_reason"] == "left"
    assert row["radius"] == pytest.approx(t[np.argmax(out)], rel=0.02)
    at_one = along(toy, data, step, objective, [1.0])[0]
    assert row["remainder"] == pytest.approx(at_one - model.slope[0] - 0.5 * model.curvature[0, 0])
    assert row["beyond_radius"] == (row["radius"] < 1)


def test_only_small_alphas_predict(toy: Model) -> None:
    data, step = domain(), update(toy, 0.03)
    model = expand(toy, {"u": step}, {"d": data})
    few, all_ = (
        remainder(toy, {"u": step}, {"d": data}, alphas=alphas, models=model).iloc[0]
        for alphas in ((0.25, 0.5), (0.25, 0.5, 0.75, 1.0))
    )
    for column in ("third", "fourth", "truncation", "truncation_misfit", "truncation_stderr"):
        assert few[column] == all_[column]
    np.testing.assert_array_equal(few["replicates_truncation"], all_["replicates_truncation"])


def test_evaluate_scores_the_third_order_and_the_interval_with_truncation(toy: Model) -> None:
    data = {"d": domain()}
    updates = {f"u{k}": update(toy, 0.002 * (1 + k / 4), k) for k in range(6)}
    models, measured = expand(toy, updates, data, pairs=False), measure(toy, updates, data)
    plain = evaluate(models, measured)
    assert "third_order" not in set(plain.table["predictor"])
    assert np.isnan(plain.coverage_truncation)
    card = evaluate(models, measured, remainders=remainder(toy, updates, data, models=models))
    assert card.coverage == plain.coverage  # its meaning is what it was
    assert card.coverage_truncation >= max(card.coverage, 0.9)
    c = card.cells
    np.testing.assert_allclose(c["predicted_third"], c["predicted_second"] + c["third"] + c["fourth"])
    second, third = ((c["measured"] - c[f"predicted_{o}"]).abs() for o in ("second", "third"))
    assert third.sum() < 0.2 * second.sum()
    for kind in ("", "residual_"):
        assert (c[f"{kind}low_total"] <= c[f"{kind}low"] + 1e-15).all()
        assert (c[f"{kind}high_total"] >= c[f"{kind}high"] - 1e-15).all()
    assert card.get("r2", "third_order") > card.get("r2")


def test_unusable_requests_are_refused(toy: Model) -> None:
    step, data = {"u": update(toy, 0.01)}, {"d": domain()}
    with pytest.raises(InputError, match="surrogate"):
        remainder(toy, step, data, objective="surrogate")
    for alphas in ((), (0.0,), (float("nan"),)):
        with pytest.raises(InputError, match="alphas"):
            remainder(toy, step, data, alphas=alphas)
    far = remainder(toy, step, data, alphas=(1.0,)).iloc[0]
    assert np.isnan(far["truncation"])  # nothing small was evaluated, so nothing is predicted
    assert np.isfinite(far["remainder"])


def test_models_of_another_request_are_refused(toy: Model) -> None:
    """With models given, the objective, the updates and the domains must be theirs: nothing is silently ignored."""
    step, data = {"u": update(toy, 0.01)}, {"d": domain()}
    models = {o: expand(toy, step, data, objective=o, pairs=False) for o in ("kl", "surrogate", "nll")}
    with pytest.raises(InputError, match="objective 'kl'; expected objective 'nll'"):
        remainder(toy, step, data, models=models["kl"])
    with pytest.raises(InputError, match="'surrogate'"):
        remainder(toy, step, data, models=models["surrogate"])
    with pytest.raises(InputError, match="along 'u'; expected the updates 'v'"):
        remainder(toy, {"v": step["u"]}, data, models=models["nll"])
    for given in ({}, {"e": models["nll"]["d"]}):
        with pytest.raises(InputError, match="one for domain 'd'"):
            remainder(toy, step, data, models=given)
    with pytest.raises(InputError, match="no domains"):
        remainder(toy, step, {})
    wild = Domain("d", tuple(replace(s, response=(99,)) for s in data["d"].sequences))
    with pytest.raises(InputError, match="99"):
        remainder(toy, step, {"d": wild}, models=models["nll"])


def test_from_checkpoints_as_the_readme_calls_it(checkpoints: Path) -> None:
    base = Checkpoint.open(checkpoints / "base")
    updates = {n: Update.between(base, Checkpoint.open(checkpoints / f"rl_{n}")) for n in "ab"}
    domains = {n: Domain.from_jsonl(checkpoints / f"{n}.jsonl", tokenizer=base.tokenizer()) for n in "ab"}
    table = remainder(base, updates, domains)
    assert table[["domain", "update"]].to_numpy().tolist() == [["a", "a"], ["a", "b"], ["b", "a"], ["b", "b"]]
    numbers = ["third", "third_stderr", "third_misfit", "fourth", "truncation", "truncation_misfit"]
    assert np.isfinite(table[numbers].to_numpy(float)).all()
