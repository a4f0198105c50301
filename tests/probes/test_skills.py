"""Skills: planted skills are recovered, and models that learned nothing show nothing beyond their null."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from interference import statistics
from interference.domain import Domain, Sequence
from interference.errors import InputError
from interference.probes import samples, skills
from interference.probes.samples import ItemRewards, NoLearning

Array = NDArray[np.float64]


def draw(rates: Array, n: int, rng: np.random.Generator) -> Array:
    return (rng.random((len(rates), n)) < rates[:, None]).astype(float)


def planted(
    rng: np.random.Generator, items: int, gains: dict[str, dict[str, float]], groups: dict[str, int]
) -> dict[str, Array]:
    """Success rates: base rates of a Beta law, and every model's gain on each group of items (groups lie side by side)."""
    base = 0.5 * rng.beta(1, 2, items)
    rates = {"base": base}
    starts = dict(zip(groups, np.cumsum([0, *groups.values()]).tolist(), strict=False))
    for model, gained in gains.items():
        rates[model] = base.copy()
        for group, gain in gained.items():
            where = slice(starts[group], starts[group] + groups[group])
            rates[model][where] = np.clip(base[where] + gain, 0, 1)
    return rates


def sampled(rates: dict[str, Array], n: int, rng: np.random.Generator) -> ItemRewards:
    return ItemRewards.of({name: draw(p, n, rng) for name, p in rates.items()})


def test_definitions_by_hand() -> None:
    base, a, b, m = (np.array(x) for x in ([0.5, 0.0, 0.2], [0.9, 0.0, 0.1], [0.5, 0.3, 0.2], [0.7, 0.0, 0.6]))
    gains = [skills.gain(x, base) for x in (a, b)]
    np.testing.assert_allclose(gains[0], [0.4, 0, 0])
    u = skills.union(gains)
    np.testing.assert_allclose(u, [0.4, 0.3, 0.0])
    expected = 0.4 * 0.2 / (0.5 * np.hypot(0.2, 0.4))
    assert skills.consistency(u, skills.gain(m, base)) == pytest.approx(expected)
    assert np.isnan(skills.consistency(u, np.zeros(3)))


def test_domains_and_ragged_samples() -> None:
    rows = [("x", 1.0), ("y", 0.0), ("x", 0.0), ("y", 0.5), ("x", 0.5)]
    domain = Domain("d", tuple(Sequence((1,), (2,), item, reward) for item, reward in rows))
    data = ItemRewards.of({"base": domain, "e": Domain("d", domain.sequences[::-1])})
    assert data.items == ("x", "y")
    np.testing.assert_allclose(samples.success_rates(data.rewards["base"]), [0.5, 0.25])
    np.testing.assert_allclose(samples.success_rates(data.rewards["e"]), [0.5, 0.25])


def test_parts_are_disjoint_and_whole() -> None:
    rewards = np.array([[0.1, 0.2, 0.4, 0.8, np.nan], [0.3, 0.5, 0.7, np.nan, np.nan]])
    halves = samples.parts(rewards, 2, np.random.default_rng(0))
    assert (2 * halves[:, 0]).sum() == pytest.approx(1.5)
    assert (np.array([2, 1]) * halves[:, 1]).sum() == pytest.approx(1.5)
    others = {tuple(samples.parts(rewards, 2, np.random.default_rng(s))[0]) for s in range(20)}
    assert len(others) > 3


@pytest.mark.parametrize("levels", [(0.0, 1.0), (0.0, 0.5, 1.0)])
def test_null_draws_have_the_spread_of_the_true_rates(levels: tuple[float, ...]) -> None:
    """Beta-binomial oracle: fresh rates vary like the true ones, not like the observed (more) or their shrunk means (less)."""
    rng = np.random.default_rng(1)
    weights = rng.dirichlet([1.0] * len(levels), size=2000)
    values = np.array(levels)
    observed = np.stack([rng.choice(values, 6, p=w) for w in weights])
    null = NoLearning.of(observed)
    shape = np.zeros((2000, 400))
    fresh = samples.success_rates(null.draw({"m": shape}, rng)["m"])
    true = weights @ values
    assert fresh.var() == pytest.approx(true.var(), rel=0.1)
    assert samples.success_rates(observed).var() > 1.3 * true.var()
    assert np.corrcoef(fresh, true)[0, 1] > 0.6


def test_planted_disjoint_and_shared_skills_are_recovered() -> None:
    """Experts a and b: skills of their own and one in common; others have all, half, something else, or nothing."""
    rng = np.random.default_rng(2)
    groups = {"a": 30, "b": 30, "both": 20, "new": 20}
    gains = {
        "a": {"a": 0.5, "both": 0.5},
        "b": {"b": 0.5, "both": 0.5},
        "merged": {"a": 0.5, "b": 0.5, "both": 0.5},
        "half": {"a": 0.5},
        "elsewhere": {"new": 0.5},
        "nothing": {},
    }
    data = sampled(planted(rng, 250, gains, groups), 24, rng)
    found = skills.skills(data, experts=["a", "b"], others=["merged", "half", "elsewhere", "nothing"], null_draws=60)
    table = found.consistency.set_index("model")
    for model, cosine, retained in [("merged", 1.0, 1.0), ("half", np.sqrt(30 / 80), 30 / 80), ("elsewhere", 0, 0)]:
        row = table.loc[model]
        assert row["skill_cosine"] == pytest.approx(cosine, abs=0.1)
        assert row["retained"] == pytest.approx(retained, abs=0.1)
        assert row["retained_low"] <= retained + 0.02
        assert row["retained_high"] >= retained - 0.02
    assert table.loc["nothing", "retained_low"] < 0 < table.loc["nothing", "retained_high"]
    assert np.isnan(table.loc["nothing", "skill_cosine"])
    assert table.loc["merged", "beyond_null"]
    assert not table.loc["nothing", "beyond_null"]
    shared = found.shared.set_index("experts")
    assert 17 <= shared.loc[2, "items"] <= 30  # the 20 in common, and a few of the 60 others by chance
    assert shared.loc[2, "items_null"] < 4
    by_model = found.gains.set_index("model")
    assert by_model.loc[["a", "b"], "beyond_null"].all()
    assert by_model.loc["a", "share"] + by_model.loc["b", "share"] == pytest.approx(1.0)
    assert not by_model.loc["base", "beyond_null"]
    union = found.items["union"].to_numpy()
    np.testing.assert_allclose(union, found.items[["a", "b"]].to_numpy().max(1))


def test_learning_other_items_is_beyond_no_learning_and_not_beyond_independent() -> None:
    """One model learned the expert's items, the other as many drawn independently of them, of the same base rates."""
    outcomes = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        base = rng.beta(1, 2, 150) * 0.5
        learned = {name: base + 0.5 * (rng.random(150) < 0.3) for name in ("e", "independent")}
        data = {n: draw(r, 12, rng) for n, r in {"base": base, **learned, "same": learned["e"]}.items()}
        found = skills.skills(
            ItemRewards.of(data), experts=["e"], others=["independent", "same"], splits=4, null_draws=20, seed=seed
        )
        table = found.consistency.set_index("model")
        outcomes.append(table[["beyond_null", "beyond_independent"]].astype(bool).to_numpy().ravel())
        row = table.loc["same"]
        assert row["independent_low"] < row["independent"] < row["independent_high"]
    other_null, other, same_null, same = np.mean(outcomes, axis=0)
    assert min(same_null, same) > 0.9
    assert other_null > 0.3  # learned something, on other items
    assert other <= 0.2  # 0.05 expected; 0.2 is more than three standard errors above


def test_losses_count_against_the_skill_cosine() -> None:
    rng = np.random.default_rng(3)
    rates = planted(rng, 200, {"a": {"a": 0.5}, "m": {"a": 0.5, "lost": -1.0}}, {"a": 40, "lost": 60})
    change = rates["m"] - rates["base"]
    gained = rates["a"] - rates["base"]
    truth = change @ gained / np.sqrt((change**2).sum() * (gained**2).sum())
    row = skills.skills(sampled(rates, 32, rng), experts=["a"], others=["m"], null_draws=5).consistency.iloc[0]
    assert truth < 0.95
    assert row["skill_cosine"] == pytest.approx(truth, abs=0.06)
    assert row["skill_cosine_low"] < truth < row["skill_cosine_high"]


def test_no_learning_stays_within_the_null_at_its_rate() -> None:
    """200 sets of the same model sampled again: consistency, gains and the split half lie in their 90 % intervals."""
    rng = np.random.default_rng(4)
    inside: list[list[bool]] = []
    cosines: list[float] = []
    for repeat in range(200):
        base = rng.beta(1, 2, 40)
        data = {name: draw(base, n, rng) for name, n in {"base": 8, "a": 6, "b": 6, "m": 8}.items()}
        found = skills.skills(
            ItemRewards.of(data), experts=["a", "b"], others=["m"], splits=2, null_draws=60, seed=repeat
        )
        row, gains = found.consistency.iloc[0], found.gains
        within = (gains["null_low"] <= gains["gain"]) & (gains["gain"] <= gains["null_high"])
        inside.append([row["null_low"] <= row["consistency"] <= row["null_high"], *within])
        cosines.append(row["skill_cosine"])
    rates = np.mean(inside, axis=0)
    # 60 draws leave the interval's ends uncertain (0.87 expected); three standard errors of 200 repeats are 0.07.
    assert (rates > 0.80).all(), rates
    assert (rates < 0.97).all(), rates
    assert np.isnan(cosines).mean() > 0.9  # no change to take the cosine of


def test_null_of_graded_rewards_covers_at_its_rate() -> None:
    rng = np.random.default_rng(5)
    inside, unlike = [], []
    for _ in range(200):
        rates = rng.beta(1, 2, 40)
        base, again = (sum(draw(rates, n, rng) for _ in range(3)) / 3 for n in (8, 6))
        null = NoLearning.of(base)
        gains = [gain_of(null.draw({"base": base, "m": again}, rng)) for _ in range(100)]
        low, high = statistics.interval(np.array(gains))
        inside.append(low <= gain_of({"base": base, "m": again}) <= high)
        binary = {"base": draw(rates, 8, rng), "m": draw(rates, 6, rng)}
        unlike.append(low <= gain_of(binary) <= high)
    assert 0.82 <= np.mean(inside) <= 0.96
    assert np.mean(unlike) < 0.2  # the planted bug: a binomial null for graded rewards has too much noise


def gain_of(rewards: dict[str, Array]) -> float:
    rates = {name: samples.success_rates(x) for name, x in rewards.items()}
    return float(skills.gain(rates["m"], rates["base"]).mean())


def test_shared_noise_would_have_shown_a_skill() -> None:
    """The planted bug: both sides against the same samples of the base are more alike than the null allows."""
    rng = np.random.default_rng(5)
    base = np.full(400, 0.4)
    halves, shared = [], []
    for _ in range(20):
        b, e, m = (draw(base, 8, rng) for _ in range(3))
        u, g = (skills.gain(x.mean(1), b.mean(1)) for x in (e, m))
        shared.append(skills.consistency(u, g))
        found = skills.skills(ItemRewards.of({"base": b, "e": e, "m": m}), experts=["e"], others=["m"], null_draws=2)
        halves.append(found.consistency.loc[0, "consistency"])
    assert np.mean(shared) > np.mean(halves) + 0.05


def test_intervals_of_the_retained_skill_cover_the_truth() -> None:
    """200 sets with fresh items and samples; the truth is that of the items' law: 1/2 and, for the cosine, sqrt(1/2)."""
    rng = np.random.default_rng(6)
    inside, cosines, values = [], [], []
    for repeat in range(200):
        kind = rng.random(120)
        base = 0.5 * rng.beta(1, 2, 120)
        expert, model = base + 0.5 * (kind < 0.4), base + 0.5 * (kind < 0.2)
        data = ItemRewards.of(
            {"base": draw(base, 12, rng), "e": draw(expert, 12, rng), "m": draw(model, 12, rng)},
            items=[f"{repeat}/{i}" for i in range(120)],
        )
        row = skills._noise_free(data.rewards, "base", ["e"], "m", data.items, 2, repeat)
        inside.append(row["retained_low"] <= 0.5 <= row["retained_high"])
        cosines.append(row["skill_cosine_low"] <= np.sqrt(0.5) <= row["skill_cosine_high"])
        values.append((row["retained"], row["skill_cosine"]))
    assert 0.83 <= np.mean(inside) <= 0.97
    assert 0.83 <= np.mean(cosines) <= 0.97
    np.testing.assert_allclose(np.mean(values, axis=0), [0.5, np.sqrt(0.5)], atol=0.02)
    assert statistics.LEVEL == 0.9


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"base": [[1.0, 0.0]], "e": [[1.0, 2.0, 0.0]]}, "rewards in \\[0, 1\\]"),
        ({"base": [[1.0]], "e": [[1.0, 1.0, 0.0]]}, "1 sample\\(s\\) of model 'base' on item '0'"),
        ({"base": [[1.0, 0.0]], "e": [[1.0, 1.0]]}, "at least 3 samples"),
        ({"base": [[1.0, 0.0]], "e": [[1.0, 1.0, 1.0]] * 2}, "item '1'"),
        ({"base": [[1.0, 0.0]]}, "model 'e'"),
        ({"base": [1.0, 0.0]}, "an array \\(items, samples\\)"),
        ({}, "no models"),
        ({"base": [[1.0], [0.0, 1.0]]}, "an array \\(items, samples\\)"),
    ],
)
def test_bad_rewards(models: dict[str, list[list[float]]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        skills.skills(ItemRewards.of(models), experts=["e"])


def test_bad_requests() -> None:
    data = ItemRewards.of({"base": np.eye(3), "e": np.eye(3)})
    with pytest.raises(InputError, match="no experts"):
        skills.skills(data, experts=[])
    with pytest.raises(InputError, match="named twice"):
        skills.skills(data, experts=["e"], others=["e"])
    with pytest.raises(InputError, match="null_draws: 0"):
        skills.skills(data, experts=["e"], null_draws=0)
    unrewarded = Domain("d", (Sequence((1,), (2,), "x"),))
    with pytest.raises(InputError, match="without a reward"):
        ItemRewards.of({"base": unrewarded})
