"""expand, measure and evaluate as a user calls them, on tiny Hugging Face checkpoints and on closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import rows, tokenizer

from interference import Checkpoint, Domain, QuadraticModel, Update, audit, evaluate, expand, measure
from interference.attribution import attribute
from interference.errors import InputError
from interference.measurement import importance_estimate, score
from interference.model import load
from interference.objectives import SequenceTerms
from interference.remainder import remainder
from interference.statistics import (
    effective_sample_size,
    interval,
    leave_one_out_line,
    prompt_weights,
    ratio_replicates,
    stderr,
)
from interference.tree import LowRank


def opened(folder: Path) -> tuple[Checkpoint, dict[str, Update], dict[str, Domain]]:
    base = Checkpoint.open(folder / "base")
    updates = {n: Update.between(base, Checkpoint.open(folder / f"rl_{n}")) for n in "ab"}
    domains = {n: Domain.from_jsonl(folder / f"{n}.jsonl", tokenizer=base.tokenizer()) for n in "ab"}
    return base, updates, domains


@pytest.mark.parametrize("objective", ["nll", "kl"])
def test_the_prediction_is_the_limit_of_what_is_measured(checkpoints: Path, objective: str) -> None:
    """Along t d the second-order error must fall with t^3, the first-order error with t^2 (float64)."""
    base, updates, domains = opened(checkpoints)
    model = load(base, dtype=torch.float64, device="cpu")
    models = expand(model, updates, domains, objective=objective)
    errors: dict[str, list[float]] = {"first": [], "second": []}
    for t in (0.04, 0.02):
        scaled = {"a": t * updates["a"]}
        actual = measure(model, scaled, domains, objective=objective).set_index("domain").loc["b", "delta"]
        for order, found in errors.items():
            found.append(abs(models["b"].predict({"a": t}, order).value - actual))
    assert errors["second"][0] / errors["second"][1] == pytest.approx(8, rel=0.35)
    assert errors["first"][0] / errors["first"][1] == pytest.approx(4, rel=0.35)


def test_both_engines_give_one_model(checkpoints: Path) -> None:
    base, updates, domains = opened(checkpoints)
    fast, slow = (expand(base, updates, domains, objective="reward", engine=e)["a"] for e in ("taylor", "nested"))
    np.testing.assert_allclose(fast.slope, slow.slope, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(fast.curvature, slow.curvature, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(fast.ggn, slow.ggn, rtol=1e-3, atol=1e-5)


def test_an_update_by_its_factors_is_their_product(checkpoints: Path) -> None:
    """Through everything that takes updates: expansion with its check, measurement, audit, remainder, attribution."""
    base, _, domains = opened(checkpoints)
    model = load(base, dtype=torch.float64, device="cpu")
    g = torch.Generator().manual_seed(0)
    factors = {
        n: LowRank(
            *(0.05 * torch.randn(s, generator=g, dtype=torch.float64) for s in ((p.shape[0], 2), (2, p.shape[1])))
        )
        for n, p in model.parameters.items()
        if p.dim() == 2 and "layers" in n
    }
    updates = {"lora": factors, "dense": {n: c.dense() for n, c in factors.items()}}
    found = expand(model, updates, domains, objective="reward")["a"]
    np.testing.assert_allclose(found.slope[0], found.slope[1], rtol=1e-9)
    np.testing.assert_allclose(found.curvature, found.curvature[0, 0], rtol=1e-9)
    measured = measure(model, updates, domains, objective="nll").set_index(["domain", "update"])["delta"]
    assert measured["a", "lora"] == pytest.approx(measured["a", "dense"], rel=1e-12)
    assert audit(model, updates=updates, level="quick").ok
    left = remainder(model, updates, domains).set_index(["domain", "update"])["third"]
    assert left["a", "lora"] == pytest.approx(left["a", "dense"], rel=1e-6)
    parts = attribute(model, updates, {"a": domains["a"]}).modules.groupby("update")["second"].sum()
    assert parts["lora"] == pytest.approx(parts["dense"], rel=1e-12)


def test_the_importance_weighted_estimate_follows_the_expansion(checkpoints: Path) -> None:
    """Same sequences, two routes: exp(s(t) - s(0)) evaluated, and its second-order expansion."""
    base, updates, domains = opened(checkpoints)
    model = load(base, dtype=torch.float64, device="cpu")
    predicted = expand(model, updates, domains, objective="reward")["b"]
    t = 1e-2
    anchor, moved = score(model, domains["b"], [(model.align(updates["a"]), t)])
    estimate = importance_estimate(domains["b"], anchor, moved)
    assert estimate.delta == pytest.approx(predicted.predict({"a": t}).value, rel=2e-3)
    assert estimate.ess <= estimate.sequences


def test_mixtures_need_pairs(checkpoints: Path) -> None:
    base, updates, domains = opened(checkpoints)
    both = expand(base, updates, domains)["a"]
    alone = expand(base, updates, domains, pairs=False)["a"]
    assert alone.predict({"b": 0.7}).value == pytest.approx(both.predict({"b": 0.7}).value, rel=1e-5)
    with pytest.raises(InputError, match="pairs"):
        alone.predict({"a": 1.0, "b": 1.0})
    mixed = both.predict({"a": 0.5, "b": 0.5}).value
    apart = both.predict({"a": 0.5}).value + both.predict({"b": 0.5}).value
    assert mixed == pytest.approx(apart + 0.25 * both.curvature[0, 1], rel=1e-6)


def quadratic(slope: list[float], curvature: list[list[float]], objective: str = "nll") -> QuadraticModel:
    """A model with known coefficients: two prompts of one sequence each."""
    c, a = np.array(slope), np.array(curvature)
    terms = SequenceTerms(
        np.ones(2), np.stack([c, c]), np.stack([a, a]), np.stack([abs(a), abs(a)]), np.ones(2)
    )  # fmt: skip
    return QuadraticModel(objective, "d", ("x", "y"), ("p", "q"), terms)


def test_minimise_finds_the_closed_form_and_the_boundary() -> None:
    bowl = quadratic([-1.0, -0.5], [[2.0, 0.5], [0.5, 1.0]])
    best = bowl.minimise(bounds=(-5, 5))
    expected = np.linalg.solve(bowl.curvature, -bowl.slope)
    assert [best["x"], best["y"]] == pytest.approx(list(expected), abs=1e-6)
    saddle = quadratic([0.1, 0.0], [[-2.0, 0.0], [0.0, 1.0]])
    assert saddle.minimise(bounds=(0.0, 1.0))["x"] == pytest.approx(1.0)
    hill = quadratic([1.0, 0.0], [[-2.0, 0.0], [0.0, -1.0]], "reward")
    assert hill.minimise(bounds=(0.0, 1.0)) == pytest.approx({"x": 0.5, "y": 0.0}, abs=1e-6)


def test_predict_refuses_unknown_names_and_orders() -> None:
    model = quadratic([1.0, 0.0], [[1.0, 0.0], [0.0, 1.0]])
    assert model.predict({"x": 2.0}).value == pytest.approx(2 + 2)
    assert model.predict({"x": 2.0}, order=1).value == pytest.approx(2.0)
    with pytest.raises(InputError, match=r"known: x, y"):
        model.predict({"z": 1.0})
    with pytest.raises(InputError, match="order 3"):
        model.predict({"x": 1.0}, order=3)


def test_measuring_reward_needs_fresh_rollouts(checkpoints: Path) -> None:
    _, updates, domains = opened(checkpoints)
    with pytest.raises(InputError, match="fresh rollouts of 'base'"):
        measure(Checkpoint.open(checkpoints / "base"), updates, domains, objective="reward")
    tok = tokenizer()
    made = {
        (model, d): Domain.from_rows(rows(i), tokenizer=tok, name=d)
        for i, d in enumerate("ab")
        for model in ("base", "a", "b")
    }
    base = Checkpoint.open(checkpoints / "base")
    table = measure(base, updates, domains, objective="reward", rollouts=made)
    assert (table["delta"] == 0).all()
    assert list(table.columns[:6]) == ["domain", "update", "before", "after", "delta", "stderr"]


def test_sequences_beyond_the_context_or_vocabulary_are_refused(checkpoints: Path) -> None:
    base, updates, _ = opened(checkpoints)
    long = Domain.from_rows(
        [{"prompt_token_ids": [3] * 60, "response_token_ids": [4] * 10}], tokenizer=tokenizer(), name="a"
    )
    with pytest.raises(InputError, match="70 tokens"):
        expand(base, updates, {"a": long})


def cells(
    predicted: np.ndarray, measured: np.ndarray, noise: float = 0.01
) -> tuple[dict[str, QuadraticModel], pd.DataFrame]:
    """Two domains x K updates with given predicted and measured changes."""
    names = tuple(f"u{k}" for k in range(predicted.shape[1]))
    g = np.random.default_rng(0)
    models, table = {}, []
    for d, (p, m) in enumerate(zip(predicted, measured, strict=True)):
        slope = p[None, :] + noise * g.standard_normal((50, len(p)))
        slope += p - slope.mean(0)
        square = np.zeros((50, len(p), len(p)))
        terms = SequenceTerms(np.zeros(50), slope, square, square, np.ones(50))
        ids = tuple(f"{d}-{i}" for i in range(50))
        models[f"d{d}"] = QuadraticModel("nll", f"d{d}", names, ids, terms)
        for k, name in enumerate(names):
            rest = noise * g.standard_normal(50)
            values = m[k] + rest - rest.mean()
            draws = ratio_replicates(values, np.ones(50), ids)
            table.append(
                {
                    "domain": f"d{d}",
                    "update": name,
                    "before": 0.0,
                    "after": m[k],
                    "delta": m[k],
                    "stderr": float(stderr(draws)),
                    "replicates": draws,
                }
            )  # fmt: skip
    return models, pd.DataFrame(table)


def test_scorecard_against_numpy() -> None:
    g = np.random.default_rng(1)
    predicted = g.standard_normal((2, 6))
    measured = 0.5 * predicted + 0.1
    models, table = cells(predicted, measured)
    baselines = table[["domain", "update"]].assign(
        update_norm=1.0, update_cosine=g.standard_normal(12), gradient_cosine=-measured.ravel(), kl=np.nan
    )
    card = evaluate(models, table, baselines)
    assert card.spearman == pytest.approx(1.0)
    assert card.slope == pytest.approx(0.5, rel=1e-6)
    assert card.get("intercept") == pytest.approx(0.1, rel=1e-6)
    spread = ((measured - measured.mean()) ** 2).sum()
    assert card.r2 == pytest.approx(1 - ((measured - predicted) ** 2).sum() / spread, rel=1e-6)
    agree = np.sign(measured) == np.sign(predicted)
    assert card.sign_accuracy == pytest.approx(agree.mean())
    assert card.coverage < 0.5  # the intervals are far narrower than the error of the slope
    assert card.get("spearman", "gradient_cosine") == pytest.approx(1.0)  # a cosine that helps lowers the loss
    assert card.get("r2", "gradient_cosine") == pytest.approx(1.0)
    assert np.isnan(card.get("spearman", "update_norm"))
    assert np.isnan(card.get("spearman", "kl"))
    recorded = card.to_dict()["off_diagonal"]["second_order"]
    assert recorded["slope"] == pytest.approx(0.5)
    assert "where" not in recorded


def test_evaluate_refuses_what_does_not_match() -> None:
    models, table = cells(np.ones((1, 3)), np.ones((1, 3)))
    with pytest.raises(InputError, match="no cell"):
        evaluate(models, table.assign(domain="elsewhere"))


def test_intervals_cover_at_their_rate() -> None:
    """Simulated prompts: the 90 % bootstrap interval of a ratio holds the truth in 85-95 % of 400 repetitions."""
    g = np.random.default_rng(2)
    hits = 0
    for repeat in range(400):
        tokens = g.integers(1, 6, 60).astype(float)
        sums = tokens * 0.3 + g.standard_normal(60) * np.sqrt(tokens)
        low, high = interval(ratio_replicates(sums, tokens, [f"{repeat}/{i}" for i in range(60)]))
        hits += low <= 0.3 <= high
    assert 0.85 <= hits / 400 <= 0.95


def test_paired_differences_are_less_noisy_than_unpaired_ones() -> None:
    g = np.random.default_rng(3)
    shared = g.standard_normal(80)
    x, y = shared + 0.05 * g.standard_normal(80), shared + 0.05 * g.standard_normal(80)
    ids = [f"p{i}" for i in range(80)]
    paired = stderr(ratio_replicates(x, np.ones(80), ids) - ratio_replicates(y, np.ones(80), ids))
    apart = stderr(
        ratio_replicates(x, np.ones(80), ids) - ratio_replicates(y, np.ones(80), [f"q{i}" for i in range(80)])
    )
    assert float(paired) < 0.2 * float(apart)
    assert float(paired) == pytest.approx(float(np.std(x - y) / np.sqrt(80)), rel=0.15)


def test_one_prompt_has_no_error_bar() -> None:
    assert np.isnan(ratio_replicates(np.ones(1), np.ones(1), ["only"])).all()
    assert prompt_weights(["a", "b"]).mean() == pytest.approx(1.0, abs=0.1)


def test_leave_one_out_line_is_given_nothing_of_the_point() -> None:
    x = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    y = 2 * x + 1
    y[5] = 100.0
    fitted, half = leave_one_out_line(x, y)
    assert fitted[5] == pytest.approx(11.0)
    assert half[5] == pytest.approx(0.0, abs=1e-9)


def test_effective_sample_size_limits() -> None:
    assert effective_sample_size(np.array([0.0, -1e3, -1e3])) == pytest.approx(1.0)
    assert effective_sample_size(np.zeros(7) + 800.0) == pytest.approx(7.0)
