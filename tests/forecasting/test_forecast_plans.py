"""Plans from planted quadratic models, whose optima and error bars are known."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from interference.errors import InputError
from interference.forecasting.plans import NO_PAIRS, merge, mixture, outcome, rank_mixtures, sequence, simplex
from interference.forecasting.ranking import ranked
from interference.forecasting.sequences import rank_orders
from interference.objectives import SequenceTerms
from interference.quadratic import QuadraticModel
from interference.statistics import Z

Array = NDArray[np.float64]
NAMES = ("a", "b", "c")


def planted(
    slope: Array, curvature: Array, *, spread: float = 0.0, objective: str = "reward", pairs: bool = True, seed: int = 0
) -> QuadraticModel:
    """A model with this slope and curvature, from 40 prompts that differ by `spread` in every slope."""
    count, K = 40, len(slope)
    noise = np.random.default_rng(seed).standard_normal((count, K))
    noise = spread * (noise - noise.mean(0))
    held = curvature if pairs else np.where(np.eye(K, dtype=bool), curvature, np.nan)
    curvatures = np.repeat(held[None], count, 0)
    ones = np.ones(count)
    terms = SequenceTerms(0 * ones, slope + noise, curvatures, 0.5 * curvatures, ones)
    return QuadraticModel(objective, "d", NAMES[:K], tuple(f"p{i}" for i in range(count)), terms)


def random(seed: int, **options: object) -> dict[str, QuadraticModel]:
    rng, out = np.random.default_rng(seed), {}
    for i, name in enumerate(NAMES):
        root = rng.standard_normal((3, 3))
        curvature = -root @ root.T if seed % 2 else (root + root.T) / 2
        out[name] = planted(rng.standard_normal(3), curvature, seed=i, **options)  # type: ignore[arg-type]
    return out


def by_hand(model: QuadraticModel, a: Array) -> float:
    return float(model.slope @ a + 0.5 * a @ model.curvature @ a)


def test_outcomes_are_the_polynomial() -> None:
    models, a = random(0, spread=0.3), np.array([0.5, -1.0, 2.0])
    found = outcome(models, dict(zip(NAMES, a, strict=True))).set_index("domain")
    for name, model in models.items():
        assert found.loc[name, "predicted"] == pytest.approx(by_hand(model, a))
        # the curvature is alike in all prompts: the error is that of the mean slope along a
        slopes = model.terms.slope @ a
        assert found.loc[name, "stderr"] == pytest.approx(slopes.std(ddof=1) / 40**0.5, rel=0.15)
        assert found.loc[name, "low"] < found.loc[name, "predicted"] < found.loc[name, "high"]
    first = outcome(models, {"a": 2.0}, "first").set_index("domain")
    assert first.loc["b", "predicted"] == pytest.approx(2 * models["b"].slope[0])


def test_a_sequence_adds_up_and_its_order_changes_only_the_way() -> None:
    models = random(0)
    one, other = sequence(models, ["a", "b", "c"]), sequence(models, ["c", "a", "b"])
    assert one["stage"].tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert one["trained"].tolist() == list("aaabbbccc")
    for domain, model in models.items():
        way = one[one["domain"] == domain]["predicted"].tolist()
        expected = [by_hand(model, np.array(a, float)) for a in ([1, 0, 0], [1, 1, 0], [1, 1, 1])]
        np.testing.assert_allclose(way, expected)
        assert other[other["domain"] == domain]["predicted"].iloc[-1] == pytest.approx(way[-1])
        assert other[other["domain"] == domain]["predicted"].iloc[0] != pytest.approx(way[0])


def test_mixtures_scale_with_weights_and_length() -> None:
    models = random(0)
    found = mixture(models, {"a": 0.25, "c": 0.75}, length=2.0).set_index("domain")["predicted"]
    for name, model in models.items():
        assert found[name] == pytest.approx(by_hand(model, np.array([0.5, 0.0, 1.5])))


def test_the_grid_is_the_whole_simplex() -> None:
    found = simplex(NAMES, 4)
    assert len(found) == 15
    assert len({tuple(w.values()) for w in found}) == 15
    assert all(sum(w.values()) == pytest.approx(1) and min(w.values()) >= 0 for w in found)
    assert simplex(["a"], 3) == [{"a": 1.0}]


@pytest.mark.parametrize(("by", "objective"), itertools.product(["mean", "worst"], ["reward", "nll"]))
def test_mixtures_are_ranked_as_brute_force_ranks_them(by: str, objective: str) -> None:
    """Higher reward and lower loss are better."""
    models, sign = random(0, objective=objective, spread=0.1), 1.0 if objective == "reward" else -1.0
    table = rank_mixtures(models, by=by, parts=4)
    score = []
    for row in table.itertuples():
        gains = [sign * by_hand(m, np.array([row.a, row.b, row.c])) for m in models.values()]
        assert sign * row.mean == pytest.approx(np.mean(gains))
        assert sign * row.worst == pytest.approx(min(gains))
        assert row.worst_domain == NAMES[int(np.argmin(gains))]
        assert row.mean_low <= row.mean <= row.mean_high
        score.append(np.mean(gains) if by == "mean" else min(gains))
    assert score == sorted(score, reverse=True)
    np.testing.assert_allclose(table["behind"], score[0] - np.array(score), atol=1e-12)
    assert table["behind_stderr"].iloc[0] == 0
    assert (table["behind_stderr"].iloc[1:] > 0).all()


def test_differences_of_plans_are_paired() -> None:
    """Prompts that differ in everything alike tell plans apart without error."""
    models = {n: planted(np.array(s), np.zeros((2, 2))) for n, s in (("a", [1.0, 0.0]), ("b", [0.0, 0.5]))}
    noise = np.random.default_rng(0).standard_normal(40)
    for model in models.values():
        model.terms.slope[:] += noise[:, None]
    table = rank_mixtures(models, parts=2)
    assert (table["mean_high"] - table["mean_low"]).min() > 0.2
    assert table["behind_stderr"].max() < 1e-12
    assert table[["a", "b"]].iloc[0].tolist() == [1.0, 0.0]


def table(predicted: list[float], **columns: object) -> pd.DataFrame:
    """A plan's changes of two domains, without sampling noise."""
    return pd.DataFrame(
        {"domain": ["x", "y"], "predicted": predicted, "replicates": [np.zeros(50)] * 2, "note": "", **columns}
    )


PLANS = pd.DataFrame({"plan": ["p", "q", "r"]})
CHANGES = ([0.3, 0.1], [0.1, 0.1], [0.0, 0.1])


def test_noise_that_estimates_share_leaves_their_order_alone() -> None:
    """Half-differences that plans share cancel in differences; what they do not share does not, and unknown ones do not count."""
    spreads = ([0.04, 0.02], [0.04, 0.02], [np.nan, 0.02])
    found = ranked([table(c, update_spread=s) for c, s in zip(CHANGES, spreads, strict=True)], PLANS, "reward")
    assert found["plan"].tolist() == ["p", "q", "r"]
    assert found["behind_stderr"].tolist() == [0, 0, 0]
    np.testing.assert_allclose(found["mean_high"] - found["mean"], Z * 0.03)
    spreads = ([0.04, 0.02], [-0.04, 0.0], [np.nan, 0.02])
    tables = [table(c, update_spread=s) for c, s in zip(CHANGES, spreads, strict=True)]
    found = ranked(tables, PLANS, "reward")
    np.testing.assert_allclose(
        found["behind_stderr"], [0, 0.05, 0.05]
    )  # .03 - (-.02), the one difference that is known
    worst = ranked(tables, PLANS, "reward", "worst").iloc[0]
    assert worst["worst_high"] == pytest.approx(0.1 + Z * np.sqrt((0.02**2 + 0.04**2) / 2))


def test_where_nothing_is_known_of_the_best_estimates_count_as_unrelated() -> None:
    spreads = ([np.nan, np.nan], [0.05, 0.05], [0.05, 0.05])
    found = ranked([table(c, update_spread=s) for c, s in zip(CHANGES, spreads, strict=True)], PLANS, "reward")
    np.testing.assert_allclose(found["behind_stderr"], [0, *[0.05 * np.sqrt(2)] * 2])


def test_trainings_do_not_share_their_own_noise() -> None:
    """Against a simulation: two real trainings whose estimates share their noise s, and which have noise of their own, q s."""
    rng, s, q = np.random.default_rng(0), 0.05, 0.3
    found = ranked([table(c, update_spread=s, own_noise=q) for c in CHANGES], PLANS, "reward")
    real = rng.normal(0, q * s, (2, 200_000))
    np.testing.assert_allclose(found["behind_stderr"][1:], np.std(real[0] - real[1]), rtol=0.01)
    alone = np.hypot(rng.normal(0, s, 200_000).std(), np.std(real[0]))
    np.testing.assert_allclose(found["mean_high"] - found["mean"], Z * alone, rtol=0.01)


def test_the_methods_error_is_in_proportion_to_what_plans_do() -> None:
    tables = [table(c, method_stderr=[0.2 * abs(x) for x in c]) for c in CHANGES]
    found = ranked(tables, PLANS, "reward")
    np.testing.assert_allclose(found["mean_high"] - found["mean"], [Z * 0.1 * np.hypot(*c) for c in CHANGES])
    np.testing.assert_allclose(found["behind_stderr"], [0, 0.1 * 0.2, 0.1 * 0.3])
    by_worst = ranked(tables, PLANS, "reward", "worst")
    np.testing.assert_allclose(by_worst["worst_high"] - by_worst["worst"], [Z * 0.02, Z * 0.02, 0], atol=1e-12)
    np.testing.assert_allclose(by_worst["behind_stderr"], [0, 0, 0.02], atol=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("by", ["mean", "worst"])
def test_merges_are_no_worse_than_a_grid(by: str, seed: int) -> None:
    models = random(seed)
    score = np.mean if by == "mean" else np.min
    found = merge(models, by=by, bounds=(0.0, 1.5))
    best = score([by_hand(m, np.array(list(found.values()))) for m in models.values()])
    grid = itertools.product(np.linspace(0, 1.5, 16), repeat=3)
    tried = max(score([by_hand(m, np.array(a)) for m in models.values()]) for a in grid)
    assert best >= tried - 1e-9
    assert best <= tried + 0.3, "the grid is coarse, but not that coarse"
    assert all(0 <= a <= 1.5 for a in found.values())


def test_merges_have_their_closed_forms() -> None:
    """Mean: -A^-1 c of the summed model. Worst: two bowls alike meet half way, where neither is best."""
    models = {n: planted(np.array(s), -np.eye(2)) for n, s in (("a", [2.0, 0.0]), ("b", [0.0, 1.0]))}
    assert merge(models, bounds=(-3, 3)) == pytest.approx({"a": 1.0, "b": 0.5}, abs=1e-6)
    even = {n: planted(np.array(s), -np.eye(2)) for n, s in (("a", [2.0, 0.0]), ("b", [0.0, 2.0]))}
    assert merge(even, by="worst", bounds=(-3, 3)) == pytest.approx({"a": 1.0, "b": 1.0}, abs=1e-5)
    # gain_a = 2x - x^2/2 - y^2/2 >= gain_b = y - x^2/2 - y^2/2: b is the worst, and best at (x, y) on 2x = y or beyond
    assert merge(models, by="worst", bounds=(-3, 3)) == pytest.approx({"a": 0.4, "b": 0.8}, abs=1e-5)


def test_models_without_pairs_say_so() -> None:
    whole, alone = random(0), random(0, pairs=False)
    assert (outcome(whole, {"a": 1.0, "b": 1.0})["note"] == "").all()
    assert (outcome(alone, {"a": 1.0})["note"] == "").all()
    assert (outcome(alone, {"a": 1.0, "b": 1.0}, "first")["note"] == "").all()
    found = outcome(alone, {"a": 1.0, "b": 2.0}).set_index("domain")
    assert (found["note"] == NO_PAIRS).all()
    for name, model in whole.items():
        a = np.array([1.0, 2.0, 0.0])
        assert found.loc[name, "predicted"] == pytest.approx(model.slope @ a + 0.5 * np.diag(model.curvature) @ a**2)
    table = rank_mixtures(alone, parts=2)
    pure = table[list(NAMES)].max(axis=1) == 1
    assert (table["note"][pure] == "").all()
    assert (table["note"][~pure] == NO_PAIRS).all()
    with_diagonal = {n: planted(m.slope, np.diag(np.diag(m.curvature))) for n, m in whole.items()}
    assert merge(alone) == pytest.approx(merge(with_diagonal), abs=1e-6)


def test_orders_of_fixed_updates_differ_by_their_way_alone() -> None:
    models = random(0)
    table = rank_orders({o: sequence(models, o) for o in itertools.permutations(NAMES)})
    assert len(table) == 6
    np.testing.assert_allclose(table["behind"], 0, atol=1e-12)
    assert len(set(table["lowest"])) > 1


def test_what_is_no_plan_is_refused() -> None:
    models = random(0)
    mixed = {**models, "b": planted(np.ones(3), np.eye(3), objective="nll")}
    for call, words in (
        (lambda: outcome({}, {"a": 1.0}), "no models"),
        (lambda: outcome(mixed, {"a": 1.0}), "nll"),
        (lambda: outcome(models, {"x": 0.0}), "'x'"),
        (lambda: sequence(models, ["a", "a"]), "at most once"),
        (lambda: sequence(models, []), "at most once"),
        (lambda: sequence(models, ["a", "x"]), "'x'"),
        (lambda: mixture(models, {"a": 0.5}), "sum"),
        (lambda: mixture(models, {"a": 1.5, "b": -0.5}), "weights"),
        (lambda: mixture(models, {}), "weights"),
        (lambda: mixture(models, {"a": 1.0}, length=0.0), "length"),
        (lambda: rank_mixtures(models, by="median"), "median"),
        (lambda: rank_mixtures(models, []), "no mixtures"),
        (lambda: rank_mixtures(models, parts=0), "parts"),
        (lambda: merge(models, by="best"), "best"),
        (lambda: rank_orders({}), "no orders"),
    ):
        with pytest.raises(InputError, match=words):
            call()
