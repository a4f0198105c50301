"""The model's verdicts on trajectories, and their scores: planted judges, a tiny Qwen3 against direct forward passes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import qwen3, tokenizer, write_jsonl

from interference.errors import InputError
from interference.model import Model, prepare
from interference.probes.judge import JudgeTemplate, default_template, read_template, verdict_tokens
from interference.probes.ledger import Ledger
from interference.probes.trajectories import (
    Trajectory,
    answer_extractor,
    read_trajectories,
    split_steps,
    trajectories_from_rows,
)
from interference.probes.verdicts import (
    Judged,
    Verdict,
    judge_log_odds,
    judge_sampled,
    judged,
    read_judged,
    verdict_reader,
)
from interference.probes.verification import METRICS, JudgeScores, auroc, difference, score
from interference.rollouts import sample

WORDS = ["Yes", "No", "yes", *(f"w{i}" for i in range(21))]
TEMPLATE = JudgeTemplate("process", "{prompt} w1 {trajectory} w2")


@pytest.fixture
def judge_model() -> Model:
    return prepare(qwen3(3))


def trajectories(seed: int = 0, prompts: int = 8, each: int = 3) -> list[Trajectory]:
    g = np.random.default_rng(seed)
    out = []
    for p in range(prompts):
        prompt = " ".join(g.choice(WORDS[3:], g.integers(1, 5)))
        for _ in range(each):
            response = " ".join(g.choice(WORDS[3:], g.integers(1, 9)))
            out.append(Trajectory(prompt, response, f"p{p}", float(g.random() < 0.5)))
    return out


class Calls:
    """Counts a module's forward passes, and can interrupt one of them."""

    def __init__(self, module: torch.nn.Module, stop_at: int | None = None) -> None:
        self.count, self.stop_at = 0, stop_at
        self.handle = module.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.count += 1
        if self.count == self.stop_at:
            raise KeyboardInterrupt


# Templates, answers, tokens


def test_modes_show_what_they_should() -> None:
    t = Trajectory("What is 6 * 7?", "6 * 7\n= 42\n\\boxed{42}", "p")
    seen = {mode: default_template(mode).fill(t.prompt_text, "42", t.response) for mode in ("outcome", "process")}  # type: ignore[arg-type]
    assert "6 * 7\n= 42" in seen["process"]
    assert "= 42" not in seen["outcome"]
    assert "42" in seen["outcome"]
    assert all(t.prompt_text in text for text in seen.values())


def test_what_is_filled_in_is_not_searched() -> None:
    template = JudgeTemplate("process", r"\frac{1}{2} {prompt} | {trajectory}")
    assert template.fill("{trajectory}", "", "{prompt} {x}") == r"\frac{1}{2} {trajectory} | {prompt} {x}"


@pytest.mark.parametrize(
    ("mode", "text", "match"),
    [
        ("process", "{prompt} {answer}", r"without \{trajectory\}"),
        ("outcome", "{prompt} {answr}", r"holds \{prompt\}, \{answr\}"),
        ("outcome", "{answer}", r"without \{prompt\}"),
        ("outcome", "{prompt} {answer} {trajectory}", "reasoning"),
        ("both", "{prompt}", "mode 'both'"),
        ("process", (("user", "{prompt}"),), r"without \{trajectory\}"),
    ],
)
def test_a_template_that_does_not_fit(mode: Any, text: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        JudgeTemplate(mode, text)


def test_chat_template_needed_and_used() -> None:
    words, template = tokenizer(WORDS), default_template("process", chat=True)
    with pytest.raises(InputError, match="without a chat template"):
        template.encode(words, trajectories())
    words.chat_template = "{% for m in messages %}w5 {{ m['content'] }} {% endfor %}w6"
    chat = JudgeTemplate("process", (("system", "w7"), ("user", "{prompt} {trajectory}")))
    t = Trajectory("w8", "w9 w10", "p")
    assert words.decode(chat.encode(words, [t])[0]) == "w5 w7 w5 w8 w9 w10 w6"


def test_template_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("{prompt} {trajectory}\n")
    (tmp_path / "a.json").write_text(json.dumps([{"role": "user", "content": "{prompt} {answer}"}]))
    (tmp_path / "b.json").write_text("{}}")
    assert read_template(tmp_path / "a.txt", "process").text == "{prompt} {trajectory}"
    assert read_template(tmp_path / "a.json", "outcome").text == (("user", "{prompt} {answer}"),)
    for name, mode in (("a.txt", "outcome"), ("b.json", "process"), ("none.txt", "process")):
        with pytest.raises(InputError, match=name):
            read_template(tmp_path / name, mode)  # type: ignore[arg-type]


def test_final_answers(tmp_path: Path) -> None:
    (tmp_path / "answers_for_tests.py").write_text(
        "def last(r):\n    return r.split()[-1]\ndef bad(r):\n    return 3\n"
    )
    response = "so 3\nhence \\boxed{4}, no, \\boxed{5}\n\n"
    cut = {
        how: answer_extractor(how, tmp_path)(response)
        for how in ("last_line", "whole", r"regex:\\boxed\{(\d+)\}", r"regex:zzz", "answers_for_tests:last")
    }
    assert list(cut.values()) == ["hence \\boxed{4}, no, \\boxed{5}", response, "5", "", "\\boxed{5}"]
    for how in ("last line", "regex:(", "answers_for_tests:lost"):
        with pytest.raises(InputError):
            answer_extractor(how, tmp_path)
    with pytest.raises(InputError, match="returns a int"):
        answer_extractor("answers_for_tests:bad", tmp_path)("x")


def test_verdict_tokens() -> None:
    words = tokenizer(WORDS)
    found = verdict_tokens(words)
    assert set(found.yes) == {words.convert_tokens_to_ids("Yes"), words.convert_tokens_to_ids("yes")}
    assert found.no == (words.convert_tokens_to_ids("No"),)
    with pytest.raises(InputError, match="none of which is a single token"):
        verdict_tokens(words, no=("nope", "w1 w2"))
    with pytest.raises(InputError, match="among both"):
        verdict_tokens(words, yes=("w1", "w2"), no=("w2",))


def test_reading_trajectories(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "b\nc", "reward": True, "error_step": 2, "answer": "c"}]
    (found,) = read_trajectories(write_jsonl(tmp_path / "t.jsonl", rows))
    assert (found.reward, found.error_step, found.columns) == (1.0, 2, {"answer": "c"})
    for bad in ({"prompt": "a"}, {**rows[0], "reward": float("nan")}, {**rows[0], "error_step": 0}, {"response": "x"}):
        with pytest.raises(InputError, match="row 1"):
            trajectories_from_rows([bad])


@pytest.mark.parametrize("text", ["", "a", "a\nb", "\n\na\n\n\nb\n", "\n", "a\n \n b"])
def test_steps_join_to_the_response(text: str) -> None:
    steps = split_steps(text)
    assert "".join(steps) == text
    assert all(s.strip() for s in steps) or not text.strip()


# Log-odds


def test_log_odds_are_those_of_a_direct_forward_pass(judge_model: Model) -> None:
    words, items = tokenizer(WORDS), trajectories()
    found = judge_log_odds(judge_model, words, TEMPLATE, items, batch_tokens=40)
    yes, no = [words.convert_tokens_to_ids(w) for w in ("Yes", "yes")], words.convert_tokens_to_ids("No")
    for t, verdict in zip(items, found, strict=True):
        ids = words(f"{t.prompt} w1 {t.response} w2")["input_ids"]
        with torch.no_grad():
            p = judge_model.module(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
        odds = math.log(p[yes].sum() / p[no])
        assert math.isclose(verdict.score, odds, abs_tol=1e-4)
        assert math.isclose(verdict.log_mass, math.log(p[yes].sum() + p[no]), abs_tol=1e-4)
        assert verdict.yes == (odds > 0)
        assert math.isclose(verdict.probability, float(p[yes].sum() / (p[yes].sum() + p[no])), abs_tol=1e-5)


def test_outcome_mode_does_not_see_the_reasoning(judge_model: Model) -> None:
    words, template = tokenizer(WORDS), JudgeTemplate("outcome", "{prompt} w1 {answer} w2")
    a, b, c = (Trajectory("w3", text, "p") for text in ("w4\nw9", "w5 w6\nw9", "w4\nw8"))
    found = [v.score for v in judge_log_odds(judge_model, words, template, [a, b, c])]
    assert found[0] == found[1] != found[2]
    whole = judge_log_odds(judge_model, words, template, [a], extract=answer_extractor("whole"))
    assert whole[0].score != found[0]


def test_second_call_computes_nothing(judge_model: Model, tmp_path: Path) -> None:
    words, items = tokenizer(WORDS), trajectories()
    ask = partial(judge_log_odds, judge_model, words, cache=tmp_path / "cache" / "v.jsonl", batch_tokens=40)
    calls = Calls(judge_model.module)
    first, made = ask(TEMPLATE, items), calls.count
    assert made > 2
    assert ask(TEMPLATE, items) == first
    assert ask(TEMPLATE, items[::-1]) == first[::-1]
    assert calls.count == made
    # Another template, another model: asked again.
    ask(JudgeTemplate("process", "{prompt} w1 {trajectory} w3"), items)
    assert calls.count == 2 * made
    with torch.no_grad():
        judge_model.module.model.norm.weight.mul_(1.5)  # type: ignore[union-attr]
    assert ask(TEMPLATE, items)[0].score != first[0].score
    assert calls.count == 3 * made


def test_an_interrupted_run_resumes(judge_model: Model, tmp_path: Path) -> None:
    words, items, path = tokenizer(WORDS), trajectories(), tmp_path / "v.jsonl"
    ask = partial(judge_log_odds, judge_model, words, TEMPLATE, items, batch_tokens=40)
    calls = Calls(judge_model.module)
    expected, made = ask(), calls.count
    calls.handle.remove()
    stop = Calls(judge_model.module, stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        ask(cache=path)
    stop.handle.remove()
    kept = len(path.read_text().splitlines())
    assert 0 < kept < len(items)
    with path.open("a") as file:
        file.write('{"key": "half a li')  # killed while writing
    calls = Calls(judge_model.module)
    progress: list[tuple[int, int]] = []
    found = ask(cache=path, progress=lambda done, total: progress.append((done, total)))
    assert calls.count < made
    assert progress[0][0] > kept
    assert progress[-1][0] == progress[-1][1]
    np.testing.assert_allclose([v.score for v in found], [v.score for v in expected], atol=1e-5)
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_file_that_is_no_cache(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a"}])
    with pytest.raises(InputError, match="no cache"):
        Ledger.open(path)


def test_questions_longer_than_the_context(judge_model: Model) -> None:
    with pytest.raises(InputError, match="judge's questions in process mode"):
        judge_log_odds(judge_model, tokenizer(WORDS), TEMPLATE, [Trajectory("w3", "w4 " * 80, "p")])
    with pytest.raises(InputError, match="no trajectories"):
        judge_log_odds(judge_model, tokenizer(WORDS), TEMPLATE, [])


# Sampled verdicts


def test_sampled_verdicts_follow_the_token_probabilities(judge_model: Model, tmp_path: Path) -> None:
    words, items, n = tokenizer(WORDS), trajectories(prompts=3, each=1), 3000
    ask = partial(
        judge_sampled,
        judge_model,
        words,
        TEMPLATE,
        items,
        samples=n,
        max_new_tokens=1,
        batch_size=n,
        cache=tmp_path / "s.jsonl",
    )
    calls = Calls(judge_model.module)
    found = ask()
    for verdict, exact in zip(found, judge_log_odds(judge_model, words, TEMPLATE, items), strict=True):
        mass, read = math.exp(exact.log_mass), n - verdict.unparsable
        assert abs(read - n * mass) <= 4 * math.sqrt(n * mass * (1 - mass)) + 1
        assert abs(verdict.yes - exact.probability) <= 4 * math.sqrt(0.25 / max(read, 1))
        assert verdict.samples == n
    made = calls.count
    assert ask() == found
    flipped = ask(verdict=r"(?i)\b(w9)\b")  # reads no verdict at all
    assert all(math.isnan(v.yes) and v.unparsable == n for v in flipped)
    assert calls.count == made
    swapped = ask(yes=("No",), no=("Yes",))
    assert [v.yes for v in swapped] == pytest.approx([1 - v.yes for v in found])
    assert calls.count == made
    for bad in ({"verdict": "yes|no"}, {"verdict": "("}, {"yes": ("no",)}, {"no": ()}):
        with pytest.raises(InputError):
            ask(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "pattern", "expected"),
    [
        ("No, wait. Yes!", None, True),
        ("YES\nno", None, False),
        ("nobody says yesterday", None, None),
        ("yes. Verdict: no. Said yes", r"Verdict: (\w+)", False),
        ("Verdict: perhaps", r"Verdict: (\w+)", None),
        ("Verdict: yes", r"Verdict: (\w+)|(x)", True),
        ("x", r"Verdict: (\w+)|(x)", None),
    ],
)
def test_reading_a_sampled_verdict(text: str, pattern: str | None, expected: bool | None) -> None:
    assert verdict_reader(("Yes",), ("no",), pattern)(text) is expected


def test_several_sampled_verdicts_are_one_share() -> None:
    assert Verdict.from_samples([True, False, None, True]) == Verdict(2 / 3, 2 / 3, 2 / 3, 4, 1)
    assert math.isnan(Verdict.from_samples([None]).yes)


# Scores


def planted(seed: int, prompts: int = 60, each: int = 4, d: float = 1.2, tau: float = 0.6, tag: str = "") -> Judged:
    """Log-odds N(+-d/2, 1) by class, prompts with base rates of their own and a shift of the judge's score of spread tau."""
    g = np.random.default_rng(seed)
    ids = np.repeat(np.arange(prompts), each)
    y = g.random(prompts * each) < g.beta(2, 2, prompts)[ids]
    s = np.where(y, d / 2, -d / 2) + tau * g.standard_normal(prompts)[ids] + g.standard_normal(len(y))
    return Judged(
        tuple(f"{tag}{i}" for i in ids), tuple(y.astype(float)), tuple(Verdict.from_log_odds(float(x)) for x in s)
    )


def truth(d: float = 1.2, tau: float = 0.6) -> dict[str, float]:
    rate = float(stats.norm.cdf(d / 2 / math.sqrt(1 + tau**2)))
    area = float(stats.norm.cdf(d / math.sqrt(2 * (1 + tau**2))))
    return {
        "base_rate": 0.5,
        "yes_rate": 0.5,
        "accuracy": rate,
        "balanced_accuracy": rate,
        "tpr": rate,
        "tnr": rate,
        "auroc": area,
    }


@pytest.fixture(scope="module")
def repeats() -> list[JudgeScores]:
    return [score(planted(seed), seed=seed) for seed in range(240)]


@pytest.mark.parametrize("metric", list(truth()))
def test_intervals_cover_at_their_rate(repeats: list[JudgeScores], metric: str) -> None:
    known = truth()[metric]
    values = np.array([r[metric].value for r in repeats])
    assert abs(values.mean() - known) < 4 * values.std() / math.sqrt(len(values)) + 2e-3
    coverage = np.mean([r[metric].low <= known <= r[metric].high for r in repeats])
    assert 0.84 <= coverage <= 0.96
    assert 0.85 < np.mean([r[metric].stderr for r in repeats]) / values.std() < 1.15


def test_auroc_is_the_brute_force_pair_count() -> None:
    g = np.random.default_rng(0)
    for _ in range(20):
        n = int(g.integers(4, 30))
        label, ranks, w = (
            (g.random(n) < 0.5).astype(float),
            g.integers(0, 5, n).astype(float),
            g.integers(0, 4, n).astype(float),
        )
        label[:2] = 0, 1
        w[:2] = 1
        up = down = 0.0
        for i in range(n):
            for j in range(n):
                if label[i] == 1 and label[j] == 0:
                    down += w[i] * w[j]
                    up += w[i] * w[j] * ((ranks[i] > ranks[j]) + 0.5 * (ranks[i] == ranks[j]))
        assert math.isclose(float(auroc(w[None], label, ranks)[0]), up / down, rel_tol=1e-12)
        plain = auroc(np.ones((1, n)), label, ranks)[0]
        u = stats.mannwhitneyu(ranks[label == 1], ranks[label == 0]).statistic
        assert math.isclose(float(plain), u / (label.sum() * (1 - label).sum()), rel_tol=1e-12)


def test_metrics_by_hand() -> None:
    rewards = (1.0, 1.0, 0.5, 0.0, 0.49, 0.0)  # three correct at the threshold of one half
    odds = (2.0, -1.0, 0.5, -3.0, 1.0, -0.5)
    found = score(Judged(tuple("abcdef"), rewards, tuple(Verdict.from_log_odds(x) for x in odds)))
    p = 1 / (1 + np.exp(-np.array(odds)))
    y = np.array([1, 1, 1, 0, 0, 0])
    expected = {
        "base_rate": 1 / 2, "yes_rate": 1 / 2, "accuracy": 4 / 6, "balanced_accuracy": 2 / 3, "tpr": 2 / 3, "tnr": 2 / 3,
        "auroc": 6 / 9, "brier": ((p - y) ** 2).mean(), "calibration_gap": p.mean() - 0.5,
        "within_prompt_auroc": math.nan,
    }  # fmt: skip
    assert {m: found[m].value for m in METRICS} == pytest.approx(expected, nan_ok=True)
    assert found["within_prompt_auroc"].reason == "no prompt has both correct and wrong responses"
    # Pairs of one prompt: (2, -3) in order, and (0.5, 1), (0.5, -0.5) of which one is.
    paired = score(Judged(("a", "b", "c", "a", "c", "c"), rewards, tuple(Verdict.from_log_odds(x) for x in odds)))
    assert paired["within_prompt_auroc"].value == pytest.approx(2 / 3)
    assert paired["within_prompt_auroc"].chance == 0.5
    assert score(Judged(tuple("abcdef"), rewards, tuple(Verdict.from_log_odds(x) for x in odds)), threshold=1.0)[
        "base_rate"
    ].value == pytest.approx(1 / 3)
    assert list(found.table(model="m")["metric"]) == list(METRICS)


def test_chance_is_what_shuffled_verdicts_score() -> None:
    g, base = np.random.default_rng(0), planted(1, prompts=200)
    found, sums = score(base), dict.fromkeys(METRICS, 0.0)
    for _ in range(30):
        order = g.permutation(len(base.verdicts))
        shuffled = score(Judged(base.prompt_ids, base.rewards, tuple(base.verdicts[i] for i in order)))
        for m in METRICS:
            sums[m] += shuffled[m].value / 30
    for m in ("accuracy", "balanced_accuracy", "tpr", "tnr", "auroc", "brier"):
        assert abs(found[m].chance - sums[m]) < 0.012, m


def test_a_judge_of_the_prompt_alone_is_above_chance_but_within_prompts() -> None:
    """It knows how hard a prompt is and does not look at the response; a judge that does is above chance within prompts too."""
    g = np.random.default_rng(5)
    easy = g.random(100).repeat(8)
    ids, rewards = tuple(f"p{i // 8}" for i in range(800)), tuple((g.random(800) < easy).astype(float))
    prompt = score(Judged(ids, rewards, tuple(Verdict.from_log_odds(x) for x in easy)))
    assert prompt["auroc"].low > 0.7
    within = prompt["within_prompt_auroc"]
    assert (within.value, within.low, within.high, within.chance) == (0.5, 0.5, 0.5, 0.5)
    noisy = score(
        Judged(ids, rewards, tuple(Verdict.from_log_odds(x) for x in np.array(rewards) + g.standard_normal(800)))
    )
    assert noisy["within_prompt_auroc"].low > 0.6
    assert noisy["within_prompt_auroc"].value == pytest.approx(stats.norm.cdf(1 / 2**0.5), abs=0.05)


def test_always_yes_scores_the_base_rate() -> None:
    base = planted(2)
    found = score(Judged(base.prompt_ids, base.rewards, (Verdict.from_log_odds(3.0),) * len(base.rewards)))
    assert found["accuracy"].value == found["base_rate"].value == found["accuracy"].chance
    assert (found["balanced_accuracy"].value, found["auroc"].value) == (0.5, 0.5)
    assert (found["tpr"].value, found["tnr"].value) == (1.0, 0.0)
    # Sixty prompts that agree do not make a rate known exactly: Clopper and Pearson.
    assert found["tpr"].high == 1.0
    behind = len({p for p, r in zip(base.prompt_ids, base.rewards, strict=True) if r == 1})
    assert found["tpr"].low == pytest.approx(float(stats.beta.ppf(0.05, behind, 1)))
    assert found["yes_rate"].low == pytest.approx(0.05 ** (1 / 60))
    assert (found["tnr"].low, found["tnr"].high > 0.03) == (0.0, True)


@pytest.mark.parametrize(("reward", "lone", "word"), [(1.0, "tnr", "correct"), (0.0, "tpr", "wrong")])
def test_one_class_is_nan_with_a_reason(reward: float, lone: str, word: str) -> None:
    base = planted(3)
    found = score(Judged(base.prompt_ids, (reward,) * len(base.rewards), base.verdicts))
    for metric in ("auroc", "balanced_accuracy", lone):
        assert math.isnan(found[metric].value)
        assert word in found[metric].reason
    assert math.isfinite(found["accuracy"].value)
    table = difference(found, score(base))
    assert f"before: all 240 trajectories are {word}" in set(table["reason"])


def test_unparsable_verdicts_are_counted_and_left_out() -> None:
    verdicts = (
        Verdict.from_samples([True, None]),
        Verdict.from_samples([False, False]),
        Verdict.from_samples([None, None]),
    )
    found = score(Judged(("a", "b", "c"), (1.0, 0.0, 0.0), verdicts))
    assert (found.unparsable, found.trajectories, found["accuracy"].value) == (0.5, 2, 1.0)
    nothing = score(Judged(("a",), (1.0,), verdicts[2:]))
    assert nothing["accuracy"].reason == "no verdict could be read"
    assert math.isnan(difference(nothing, found)["difference"].iloc[0])


def test_missing_rewards_and_ragged_lists() -> None:
    with pytest.raises(InputError, match="1 of 1 trajectories without a reward"):
        judged([Trajectory("a", "b", "p")], lambda ts: [])
    with pytest.raises(InputError, match="2 prompt ids"):
        Judged(("a", "b"), (1.0,), (Verdict.from_log_odds(0.0),))


# Differences


def test_no_difference_between_two_samples_of_one_judge() -> None:
    covered = []
    for seed in range(200):
        pair = [score(planted(2 * seed + i, prompts=50), seed=seed) for i in (0, 1)]
        covered.append(~difference(*pair).set_index("metric")["excludes_zero"])
    rate = np.mean(covered, axis=0)
    assert ((rate >= 0.84) & (rate <= 0.97)).all(), rate


def test_a_better_judge_is_seen_and_pairing_narrows() -> None:
    a = planted(5)
    better = tuple(
        Verdict.from_log_odds(v.score + (1.0 if r else -1.0)) for v, r in zip(a.verdicts, a.rewards, strict=True)
    )
    table = difference(score(a), score(Judged(a.prompt_ids, a.rewards, better)), domain="math").set_index("metric")
    assert table.loc["auroc", "low"] > 0
    assert table.loc["base_rate", "difference"] == 0 == table.loc["base_rate", "stderr"]
    other = Judged(tuple(f"other {p}" for p in a.prompt_ids), a.rewards, better)
    unpaired = difference(score(a), score(other)).set_index("metric")
    assert unpaired.loc["base_rate", "stderr"] > 0
    with pytest.raises(InputError, match="seed 0 and 1"):
        difference(score(a), score(a, seed=1))


def test_two_samples_of_one_model_judged_by_itself(judge_model: Model) -> None:
    words, prompts = tokenizer(WORDS), [f"w{i} w{i + 1}" for i in range(12)]
    scores = []
    for seed in (0, 1):
        drawn = sample(judge_model.module, words, prompts, samples=6, max_new_tokens=5, seed=seed)
        items = [
            Trajectory(prompts[r.prompt_index], r.response, f"p{r.prompt_index}", float(len(r.response.split()) % 2))
            for r in drawn
        ]
        scores.append(score(judged(items, partial(judge_log_odds, judge_model, words, TEMPLATE))))
    table = difference(*scores)
    assert (table["difference"].abs() <= 3.5 * table["stderr"]).all()
    assert table["stderr"].max() < 0.25  # so that the bound above says something


def test_verdicts_from_jsonl(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt_id": 1, "reward": 1, "log_odds": 0.5},
        {"prompt_id": "b", "reward": 0.0, "verdict": "No"},
        {"prompt_id": "b", "reward": 0.0, "verdicts": [True, False, None, "yes"]},
        {"prompt_id": "c", "reward": True, "verdict": None},
    ]
    found = read_judged(write_jsonl(tmp_path / "v.jsonl", rows))
    assert found.prompt_ids == ("1", "b", "b", "c")
    assert [v.yes for v in found.verdicts[:3]] == pytest.approx([1.0, 0.0, 2 / 3])
    assert found.verdicts[3].unparsable == 1
    bad: Iterator[dict[str, Any]] = iter(
        [
            {"prompt_id": "a", "reward": 1.0},
            {"prompt_id": "a", "reward": 1.0, "verdict": "maybe"},
            {"prompt_id": "a", "reward": 1.0, "log_odds": None},
            {"prompt_id": "a", "verdict": True},
            {"reward": 1.0, "verdict": True},
        ]
    )
    for row in bad:
        with pytest.raises(InputError, match="row 1"):
            read_judged(write_jsonl(tmp_path / "bad.jsonl", [row]))
