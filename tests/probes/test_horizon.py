"""Verification horizon and locus of error: planted error steps, exact posteriors, a toy generator, a tiny Qwen3."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import qwen3, tokenizer
from torch import nn

from interference.errors import InputError
from interference.model import Model, prepare
from interference.probes.horizon import horizon, reach
from interference.probes.judge import JudgeTemplate, VerdictTokens
from interference.probes.locus import judge_loci, locus, prefix_rollouts, success_drop
from interference.probes.locus_agreement import locus_scores
from interference.probes.trajectories import Trajectory, first_tokens
from interference.probes.verdicts import Verdict, judge_log_odds

LETTERS = [*"abcdefgh", "error", "good", "bad"]


def planted(seed: int = 0, prompts: int = 40, each: int = 2, steps: int = 6) -> list[Trajectory]:
    """Responses of `steps` lines of two words; the wrong ones hold the word "error" in a step drawn uniformly."""
    g = np.random.default_rng(seed)
    out = []
    for i in range(prompts * each):
        lines = [" ".join(g.choice(LETTERS[:8], 2)) for _ in range(steps)]
        step = int(g.integers(1, steps + 1)) if g.random() < 0.5 else None
        if step is not None:
            lines[step - 1] = lines[step - 1].split()[0] + " error"
        out.append(Trajectory("a b", "\n".join(lines), f"p{i // each}", float(step is None), step))
    return out


def finds_errors(trajectories: Sequence[Trajectory]) -> list[Verdict]:
    """A judge whose log-odds of "correct" fall where the error stands."""
    return [Verdict.from_log_odds(-2.0 if "error" in t.response else 1.0) for t in trajectories]


# Horizon


def test_scores_rise_as_the_errors_come_into_view() -> None:
    items = planted()
    table = horizon(items, finds_errors, tokenizer(LETTERS), domain="math")
    wrong = np.array([t.error_step for t in items if t.error_step is not None])
    for fraction in (0.0, 0.25, 0.5, 0.75, 1.0):
        rows = table[table["horizon"] == fraction].set_index("metric")
        seen = float((2 * wrong <= math.ceil(fraction * 12)).mean())  # the error is the second of its step's two tokens
        assert rows.loc["tnr", "value"] == pytest.approx(seen)
        assert rows.loc["tpr", "value"] == 1.0
        assert rows.loc["auroc", "value"] == pytest.approx((1 + seen) / 2)
        assert rows.loc["tnr", "to_longest"] == pytest.approx(1 - seen)
        assert rows.loc["tnr", "mean_tokens"] == math.ceil(fraction * 12)
        assert rows.loc["tnr", "complete"] == (fraction == 1.0)
        assert set(rows["domain"]) == {"math"}
    assert reach(table) == 0.25
    assert reach(table, "base_rate") is None
    with pytest.raises(InputError, match="one curve"):
        reach(table, "accuracyy")


def test_horizon_in_tokens_sees_short_responses_whole() -> None:
    items = [
        Trajectory("a", text, name, reward)
        for text, name, reward in (("a error", "p", 0.0), ("a b", "q", 1.0), ("a b c error", "r", 0.0))
    ]
    table = horizon(items, finds_errors, tokenizer(LETTERS), tokens=[1, 2, 4])
    rows = table[table["metric"] == "tnr"]
    assert rows["value"].tolist() == [0.0, 0.5, 1.0]
    assert rows["complete"].tolist() == pytest.approx([0.0, 2 / 3, 1.0])
    assert rows["mean_tokens"].tolist() == pytest.approx([1.0, 2.0, 8 / 3])
    assert set(rows["unit"]) == {"tokens"}


def test_a_judge_that_learns_nothing_has_no_horizon() -> None:
    g = np.random.default_rng(0)
    table = horizon(
        planted(prompts=60),
        lambda ts: [Verdict.from_log_odds(x) for x in g.standard_normal(len(ts))],
        tokenizer(LETTERS),
    )
    assert reach(table) is None
    gaps = table[(table["metric"] == "auroc") & (table["horizon"] < 1)]
    assert ((gaps["to_longest_low"] < 0) & (gaps["to_longest_high"] > 0)).all()


def test_a_judge_of_the_prompt_alone_has_no_horizon() -> None:
    """It is above chance at every horizon, and nowhere above what it says from the prompt."""
    items = planted(prompts=60)
    g = np.random.default_rng(1)
    hard = {f"p{k}": g.random() < 0.5 for k in range(60)}
    items = [
        Trajectory(t.prompt, t.response, t.prompt_id, float(g.random() < (0.1 if hard[t.prompt_id] else 0.9)))
        for t in items
    ]
    table = horizon(
        items, lambda ts: [Verdict.from_log_odds(-1.0 if hard[t.prompt_id] else 1.0) for t in ts], tokenizer(LETTERS)
    )
    curve = table[table["metric"] == "auroc"]
    assert (curve["low"] > 0.6).all()
    assert reach(table) is None
    assert (table.loc[table["metric"] == "within_prompt_auroc", "value"] == 0.5).all()
    without = table[table["horizon"] > 0]
    assert reach(without) == 0.25  # nothing to compare with but chance


@pytest.mark.parametrize("options", [{"fractions": [1.5]}, {"fractions": []}, {"tokens": [-1]}, {"tokens": [0.5]}])
def test_horizons_out_of_range(options: Any) -> None:
    with pytest.raises(InputError, match="horizons"):
        horizon(planted(prompts=2), finds_errors, tokenizer(LETTERS), **options)


def test_first_tokens_are_cut_out_of_the_text() -> None:
    words, text = tokenizer(LETTERS), " a  b\n\nc d "
    assert first_tokens(words, text, [0, 1, 3, 4, 9]) == ["", " a", " a  b\n\nc", text, text]
    slow = lambda text, **_: words(text)  # noqa: E731
    stub = SimpleNamespace(is_fast=False, decode=words.decode)
    kind = type("Slow", (), {"__call__": lambda self, text, **_: slow(text), "is_fast": False, "decode": stub.decode})
    assert first_tokens(kind(), text, [2, 4]) == ["a b", text]


# Locus


@pytest.mark.parametrize(
    ("probability", "expected"),
    [
        ([0.9, 0.8, 0.1, 0.2], 3),
        ([0.1, 0.2], 1),
        ([0.9, 0.1, 0.6, 0.1], 4),  # it must stay below
        ([0.1, 0.9], None),
        ([0.5, 0.5], None),
        ([0.9, float("nan"), 0.1], 3),
    ],
)
def test_locus_is_where_it_stays_below_one_half(probability: list[float], expected: int | None) -> None:
    assert locus(np.array(probability)) == expected


def test_planted_errors_are_found_exactly() -> None:
    items = planted()
    found = judge_loci(items, finds_errors)
    assert [f.place for f in found] == [i for i, t in enumerate(items) if t.reward == 0]
    assert [f.step for f in found] == [items[f.place].error_step for f in found]
    table = locus_scores(
        [f.step for f in found], [items[f.place].error_step or 0 for f in found], [f.steps for f in found],
        [f.prompt_id for f in found],
    ).set_index("metric")  # fmt: skip
    assert table.loc["exact", "value"] == table.loc["within_1", "value"] == table.loc["located", "value"] == 1
    assert table.loc["distance", "value"] == 0
    assert table.loc["exact", "chance"] == pytest.approx(1 / 6, abs=0.1)
    assert table.loc["exact", "above_low"] > 0.5


def test_loci_of_a_model_are_those_of_its_prefixes() -> None:
    model, words = prepare(qwen3(2)), tokenizer()
    template, tokens = JudgeTemplate("process", "{prompt} w1 {trajectory} w2"), VerdictTokens((5,), (6,))
    item = Trajectory("w3 w4", "w5 w6\nw7\nw8 w9 w10", "p", 0.0)
    (found,) = judge_loci([item], partial(judge_log_odds, model, words, template, tokens=tokens))
    for k, seen in enumerate(["w5 w6", "w5 w6 w7", "w5 w6 w7 w8 w9 w10"]):
        with torch.no_grad():
            logits = model.module(torch.tensor([words(f"w3 w4 w1 {seen} w2")["input_ids"]])).logits[0, -1]
        assert found.probability[k] == pytest.approx(float(torch.sigmoid(logits[5] - logits[6])), abs=1e-5)


def test_no_wrong_trajectories() -> None:
    with pytest.raises(InputError, match="none of them wrong"):
        judge_loci([Trajectory("a", "b", "p", 1.0)], finds_errors)


def test_locus_scores_by_hand() -> None:
    table = locus_scores([1, 3, None], [2, 3, 1], [3, 3, 3], ["a", "b", "c"]).set_index("metric")
    assert table["value"].to_dict() == pytest.approx(
        {"located": 2 / 3, "exact": 1 / 3, "within_1": 2 / 3, "distance": 0.5, "difference": -0.5}
    )
    # Others' loci: a gets 3 or none (truth 2), b 1 or none (truth 3), c 1 or 3 (truth 1).
    chance = table["chance"].to_dict()
    assert chance["exact"] == pytest.approx((0 + 0 + 1 / 2) / 3)
    assert chance["within_1"] == pytest.approx((1 / 2 + 0 + 1 / 2) / 3)
    assert chance["distance"] == pytest.approx((1 / 2 + 2 / 2 + (0 + 2) / 2) / (1 / 2 + 1 / 2 + 1))
    assert math.isnan(chance["located"])
    assert math.isnan(chance["difference"])
    assert table["constant"].to_dict() == pytest.approx(
        {"located": math.nan, "exact": 1 / 3, "within_1": 1.0, "distance": 2 / 3, "difference": math.nan}, nan_ok=True
    )
    for bad in (([1], [3], [2], ["a"]), ([0], [1], [2], ["a"]), ([1], [1], [2], [])):
        with pytest.raises(InputError):
            locus_scores(*bad)
    missing = locus_scores([None], [1], [2], ["a"]).set_index("metric")
    assert math.isnan(missing.loc["distance", "value"])


@pytest.mark.parametrize("lengths", ["equal", "unlike"])
@pytest.mark.parametrize("says", ["first", "last"])
def test_a_constant_judge_is_not_above_chance(says: str, lengths: str) -> None:
    """Errors lie early; a judge that always says step 1 is far above a step drawn uniformly, and no more than its own loci."""
    g = np.random.default_rng(3)
    steps = np.full(60, 6) if lengths == "equal" else np.arange(2, 62)  # no two of one length: by relative place
    truth = 1 + g.binomial(1, 0.3, 60)
    found = np.ones(60, dtype=int) if says == "first" else steps
    ids = [f"p{i // 2}" for i in range(60)]
    table = locus_scores(found.tolist(), truth.tolist(), steps.tolist(), ids).set_index("metric")
    scored = table.loc[["exact", "within_1", "distance"]]
    np.testing.assert_allclose(scored["above_chance"], 0, atol=1e-12)
    np.testing.assert_allclose(scored[["above_low", "above_high"]], 0, atol=1e-12)
    if says == "first":
        assert table.loc["exact", "low"] > 0.5 > 1 / 6
        assert table.loc["exact", "constant"] == table.loc["exact", "value"]


def test_random_steps_are_at_chance_at_the_interval_rate() -> None:
    held = []
    for seed in range(200):
        g = np.random.default_rng(seed)
        steps = g.integers(2, 9, 120)
        truth, found = g.integers(1, steps + 1), g.integers(1, steps + 1)
        ids = [f"p{i // 2}" for i in range(120)]
        table = locus_scores(found.tolist(), truth.tolist(), steps.tolist(), ids, seed).set_index("metric").iloc[1:4]
        held.append((table["above_low"] <= 0) & (table["above_high"] >= 0))
    rate = np.mean(held, axis=0)
    assert ((rate >= 0.84) & (rate <= 0.96)).all(), rate


# Where the success of continuations falls


def test_posterior_is_the_integral_over_both_levels() -> None:
    counts, n = [5, 6, 4, 2, 1, 2], 6
    found = success_drop(counts, n)
    x = (np.arange(1500) + 0.5) / 1500
    a, b = x[:, None], x[None, :]
    weights = []
    for step in range(1, 6):
        before, after = sum(counts[:step]), sum(counts[step:])
        f1, f2 = step * n - before, (6 - step) * n - after
        likelihood = (a**before * (1 - a) ** f1) * (b**after * (1 - b) ** f2)
        weights.append(float((2 * likelihood * ((b < a) + 0.5 * (b == a))).mean()))
    weights.append(float((x ** sum(counts) * (1 - x) ** (6 * n - sum(counts))).mean()))
    expected = np.array(weights) / sum(weights)
    np.testing.assert_allclose([*found.posterior, found.none], expected, rtol=2e-3)
    assert found.step == int(expected[:-1].argmax()) + 1
    assert sum(found.posterior[k - 1] for k in found.credible) >= 0.9 * found.posterior.sum() - 1e-9


def test_credible_sets_hold_the_step_at_their_rate() -> None:
    g, n, held, sizes = np.random.default_rng(0), 8, [], []
    for _ in range(400):
        steps = int(g.integers(2, 9))
        step, (b, a) = int(g.integers(1, steps + 1)), sorted(g.random(2))
        counts = g.binomial(n, [a] * step + [b] * (steps + 1 - step))
        found = success_drop(counts.tolist(), n)
        held.append(step in found.credible)
        sizes.append(len(found.credible) / steps)
    assert 0.87 <= np.mean(held) <= 0.99  # sets of whole steps hold a little more than 90 %
    assert np.mean(sizes) < 0.8


def test_no_fall_is_recognised_and_largest_drop_has_its_error() -> None:
    flat = success_drop([5, 4, 5, 5, 4], 8)
    assert flat.none > max(flat.posterior)
    fall = success_drop([32, 31, 32, 2, 0], 32)
    assert fall.none < 1e-6
    assert (fall.step, fall.largest_step, fall.credible) == (3, 3, (3,))
    assert fall.largest_drop == pytest.approx(30 / 32)
    assert 0.02 < fall.largest_stderr < 0.08
    rising = success_drop([0, 0, 8, 8], 8)
    assert rising.none > 0.75
    for counts, n in (([1, 0], 1), ([3], 8), ([9, 0], 8)):
        with pytest.raises(InputError):
            success_drop(counts, n)


class Generator(nn.Module):
    """A toy "model": continues with "good" with probability 0.9, or 0.1 once "error" stands in what it is given."""

    def __init__(self, words: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.error, self.good, self.bad = words.convert_tokens_to_ids(["error", "good", "bad"])
        self.generation_config: Any = None
        self.device = torch.device("cpu")
        self.calls, self.stop_at = 0, -1

    def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        lost = (input_ids == self.error).any(1)
        said = torch.rand(len(input_ids)) < torch.where(lost, 0.1, 0.9)
        ends = torch.ones(len(input_ids), 1, dtype=torch.long)
        return torch.cat([input_ids, torch.where(said, self.good, self.bad)[:, None], ends], 1)


def ends_well(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    assert len(columns["prompt_id"]) == len(prompts) == len(completions)
    return [float(c.endswith("good")) for c in completions]


def toy() -> tuple[Generator, Model, Any]:
    words = tokenizer(LETTERS)
    module = Generator(words)
    return module, Model(module, {"weight": module.weight}), words


def test_the_step_where_success_falls_is_recovered() -> None:
    _, model, words = toy()
    items = [t for t in planted(3, prompts=15, steps=5) if t.error_step]
    counts = prefix_rollouts(model, words, items, ends_well, samples=16, max_new_tokens=3)
    assert [len(c) for c in counts] == [6] * len(items)
    drops = [success_drop(c, 16) for c in counts]
    right = [d.step == t.error_step for d, t in zip(drops, items, strict=True)]
    assert np.mean(right) >= 0.9
    assert np.mean([t.error_step in d.credible for d, t in zip(drops, items, strict=True)]) >= 0.9
    intact = sum(sum(c[: t.error_step]) for c, t in zip(counts, items, strict=True))  # type: ignore[misc]
    total = sum(16 * (t.error_step or 0) for t in items)
    assert abs(intact / total - 0.9) < 0.05
    assert all(c[-1] == 0 for c in counts)  # the trajectory itself, which failed


def test_prefix_rollouts_are_cached_and_resume(tmp_path: Path) -> None:
    items = planted(4, prompts=6, each=1, steps=3)
    module, model, words = toy()
    ask = partial(prefix_rollouts, tokenizer=words, trajectories=items, samples=4, max_new_tokens=3, batch_size=8)
    expected, made = ask(model, verifier=ends_well), module.calls
    assert made > 3
    module.calls, module.stop_at = 0, 3
    with pytest.raises(KeyboardInterrupt):
        ask(model, verifier=ends_well, cache=tmp_path / "r.jsonl")
    assert ask(model, verifier=ends_well, cache=tmp_path / "r.jsonl") == expected
    assert module.calls == 3 + made - 2
    opposite = ask(model, verifier=lambda **k: [1.0 - r for r in ends_well(**k)], cache=tmp_path / "r.jsonl")
    assert [[4 - n for n in c[:-1]] for c in opposite] == [c[:-1] for c in expected]
    assert module.calls == 3 + made - 2  # another verifier samples nothing anew
    with pytest.raises(InputError, match="two continuations"):
        ask(model, verifier=ends_well, samples=1)


def test_prefix_rollouts_of_a_model_have_its_probabilities() -> None:
    model, words, n = prepare(qwen3(1)), tokenizer(), 2500
    item = Trajectory("w3 w4", "w5 w6\nw7", "p", 1.0, columns={"wanted": "w9"})

    def wanted(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        seen.update(prompts)
        return [float(c.split()[-1:] == [w]) for c, w in zip(completions, columns["wanted"], strict=True)]

    seen: set[str] = set()
    (counts,) = prefix_rollouts(model, words, [item], wanted, samples=n, max_new_tokens=1, batch_size=n)
    for count, prefix in zip(counts, ("w3 w4", "w3 w4 w5 w6"), strict=False):
        with torch.no_grad():
            logits = model.module(torch.tensor([words(prefix)["input_ids"]])).logits[0, -1]
        p = float(logits.double().softmax(-1)[words.convert_tokens_to_ids("w9")])
        assert p > 0.001
        assert abs(count - n * p) <= 4 * math.sqrt(n * p) + 1
    assert counts[2] == n
    assert seen == {"w3 w4"}


def test_chat_trajectories_reach_the_verifier_as_messages() -> None:
    _, model, words = toy()
    words.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    item = Trajectory(({"role": "user", "content": "a b"},), "c\nd", "p", 0.0)
    seen: list[Any] = []

    def look(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(completions)

    assert prefix_rollouts(model, words, [item], look, samples=2, max_new_tokens=2) == [[0, 0, 0]]
    assert seen[0][0] == [{"role": "user", "content": "a b"}]
    assert seen[-1][1][0]["content"].split()[0] == "c"
