"""Estimators against oracles that share no code with them: small tables worked by hand, plain loops, the checkpoints' own files.

The expected numbers follow the definitions in docs/math.md. Nothing here takes a weight or a baseline from the library.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tiny import tokenizer
from transformers import Qwen3ForCausalLM

from interference import evaluation, objectives
from interference.domain import Domain, Sequence
from interference.expansion import quadratic_model
from interference.jets import SequenceJets
from interference.measurement import Scores, importance_estimate, reward_change, sequence_change
from interference.objectives import SequenceTerms
from interference.quadratic import QuadraticModel
from interference.records import Run

# Six responses to three prompts (three, one and two responses), ragged: prompt, reward, and by hand w and r - b.
#   p: rewards 1, 0, 0.5 -> b = 0.25, 0.75, 0.5        q: rewards 0.2, 1 -> b = 1, 0.2
#   s: one response, so b is the mean of the other prompts' means: (0.5 + 0.6) / 2
RESPONSES = [("p", 1.0), ("s", 0.25), ("p", 0.0), ("q", 0.2), ("p", 0.5), ("q", 1.0)]
WEIGHT = [1 / 3, 1.0, 1 / 3, 1 / 2, 1 / 3, 1 / 2]
ADVANTAGE = [0.75, -0.30, -0.75, -0.80, 0.0, 0.80]
PROMPTS = 3
# One row per token: its response, logp, d1 (x, y), d2 (xx, xy, yy), fisher (xx, xy, yy).
TOKENS = [
    (0, -1.0, 0.5, -0.2, -0.6, 0.3, 0.4, 0.7, 0.1, 0.2),
    (0, -0.4, -0.3, 0.8, 0.2, -0.1, -0.9, 0.3, -0.2, 0.6),
    (1, -2.0, 0.9, 0.4, -0.5, 0.2, 0.1, 1.1, 0.3, 0.5),
    (2, -0.7, -0.6, 0.1, -0.3, 0.0, 0.2, 0.4, 0.0, 0.1),
    (2, -1.5, 0.2, 0.7, 0.1, -0.4, -0.2, 0.9, 0.5, 0.8),
    (2, -0.2, 0.4, -0.5, -0.2, 0.6, 0.3, 0.1, -0.1, 0.2),
    (3, -0.9, -0.8, 0.3, 0.7, 0.1, -0.5, 0.6, 0.2, 0.3),
    (4, -1.1, 0.1, -0.9, -0.4, 0.2, 0.6, 0.5, -0.3, 1.0),
    (4, -0.6, 0.7, 0.6, -0.8, -0.3, 0.1, 0.2, 0.1, 0.4),
    (5, -1.3, -0.2, 0.5, 0.3, -0.7, -0.1, 0.8, 0.4, 0.9),
]
LENGTHS = [sum(t[0] == i for t in TOKENS) for i in range(len(RESPONSES))]
AT = {(0, 0): 0, (0, 1): 1, (1, 0): 1, (1, 1): 2}  # place of an entry among xx, xy, yy


def domain(
    rewards: list[float] | None = None, ids: list[str] | None = None, lengths: list[int] | None = None
) -> Domain:
    rewards, ids = rewards or [r for _, r in RESPONSES], ids or [p for p, _ in RESPONSES]
    lengths = lengths or (LENGTHS if len(ids) == len(LENGTHS) else [1] * len(ids))
    made = [Sequence((3, 4), (5,) * n, i, r) for r, i, n in zip(rewards, ids, lengths, strict=True)]
    return Domain("d", tuple(made))


def jets() -> SequenceJets:
    """The table summed over each response."""
    mine, table = np.eye(len(RESPONSES))[[t[0] for t in TOKENS]].T, np.array(TOKENS)
    x, y = table[:, 2], table[:, 3]
    squares = (table[:, [4, 5, 5, 6]], table[:, [7, 8, 8, 9]], np.stack([x * x, x * y, y * x, y * y], axis=1))
    d2, fisher, d1d1 = ((mine @ columns).reshape(-1, 2, 2) for columns in squares)
    return SequenceJets(np.array(LENGTHS, float), mine @ table[:, 1], mine @ table[:, 2:4], d2, fisher, d1d1)


def expected(objective: str) -> tuple[float, list[float], list[list[float]], list[list[float]]]:
    """The objective's row of docs/math.md by plain loops over the token table."""
    value, slope, curvature, ggn = 0.0, [0.0, 0.0], [[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]
    n = len(TOKENS)
    for i, (_, reward) in enumerate(RESPONSES):
        mine = [t for t in TOKENS if t[0] == i]
        s1, scale = [sum(t[2 + k] for t in mine) for k in (0, 1)], WEIGHT[i] * ADVANTAGE[i] / PROMPTS
        value += {"nll": -sum(t[1] for t in mine) / n, "kl": 0.0}.get(objective, WEIGHT[i] * reward / PROMPTS)
        for k in (0, 1):
            slope[k] += {"nll": -s1[k] / n, "kl": 0.0}.get(objective, scale * s1[k])
            for m in (0, 1):
                d2, fisher = (sum(t[c + AT[k, m]] for t in mine) for c in (4, 7))
                outer = s1[k] * s1[m] if objective == "reward" else sum(t[2 + k] * t[2 + m] for t in mine)
                whole, gauss = scale * (d2 + outer), scale * (outer - fisher)
                curvature[k][m] += {"nll": -d2 / n, "kl": fisher / n}.get(objective, whole)
                ggn[k][m] += {"nll": fisher / n, "kl": fisher / n}.get(objective, gauss)
    return value, slope, curvature, ggn


@pytest.mark.parametrize("objective", ["nll", "reward", "surrogate", "kl"])
def test_every_row_of_the_objectives_table(objective: str) -> None:
    model = quadratic_model(objective, jets(), domain(), ("x", "y"))
    value, slope, curvature, ggn = expected(objective)
    assert model.value == pytest.approx(value, abs=1e-12)
    np.testing.assert_allclose(model.slope, slope, atol=1e-12)
    np.testing.assert_allclose(model.curvature, curvature, atol=1e-12)
    np.testing.assert_allclose(model.ggn, ggn, atol=1e-12)
    x, y = 0.5, -2.0
    first = slope[0] * x + slope[1] * y
    for order, a in (("first", [[0, 0], [0, 0]]), ("second", curvature), ("ggn", ggn)):
        second = 0.5 * (a[0][0] * x * x + 2 * a[0][1] * x * y + a[1][1] * y * y)
        assert model.predict({"x": x, "y": y}, order).value == pytest.approx(first + second, abs=1e-12)


def test_some_entries_worked_on_paper() -> None:
    """Guards the loops above: numbers that a reader can redo in a minute."""
    nll, reward = (quadratic_model(o, jets(), domain(), ("x", "y")) for o in ("nll", "reward"))
    assert nll.value == pytest.approx(0.97)  # 9.7 nats over 10 tokens
    assert nll.slope[0] == pytest.approx(-0.09)
    assert nll.ggn[0, 0] == pytest.approx(0.56)
    assert reward.value == pytest.approx(0.45)  # (0.5 + 0.25 + 0.6) / 3, not 2.95 / 6
    # x: s1 = 0.2, 0.9, 0.0, -0.8, 0.8, -0.2 -> (0.25 * 0.2 - 0.3 * 0.9 - 0.4 * -0.8 + 0.4 * -0.2) / 3
    assert reward.slope[0] == pytest.approx(0.02 / 3)
    # s1^2 - fisher = -0.96, -0.29, -1.4, 0.04, ., -0.76
    assert reward.ggn[0, 0] == pytest.approx((0.25 * -0.96 - 0.3 * -0.29 - 0.25 * -1.4 - 0.4 * 0.04 + 0.4 * -0.76) / 3)


def test_weights_and_leave_one_out_baselines() -> None:
    reward, weight, advantage = objectives.reward_terms(domain())
    np.testing.assert_allclose(reward, [1, 0.25, 0, 0.2, 0.5, 1])
    np.testing.assert_allclose(weight, WEIGHT)
    np.testing.assert_allclose(advantage, ADVANTAGE, atol=1e-12)
    _, weight, advantage = objectives.reward_terms(domain([1.0, 0.0, 0.5], ["a", "b", "c"]))
    np.testing.assert_allclose(weight, [1, 1, 1])
    np.testing.assert_allclose(advantage, [0.75, -0.75, 0.0])
    np.testing.assert_allclose(objectives.reward_terms(domain([3.0, 1.0], ["a", "a"]))[2], [2, -2])


def test_first_order_weights_by_hand() -> None:
    np.testing.assert_allclose(objectives.first_order_weights("nll", domain()), [-0.1] * 6)
    for objective in ("reward", "surrogate"):
        found = objectives.first_order_weights(objective, domain())
        np.testing.assert_allclose(found, [0.25 / 3, -0.1, -0.25 / 3, -0.4 / 3, 0.0, 0.4 / 3], atol=1e-12)
    assert not objectives.first_order_weights("kl", domain()).any()


def test_measured_reward_by_hand() -> None:
    """Each prompt counts once: means 1/3 and 1 before (not 2/4), 1 and 0.5 after."""
    before = domain([1.0, 0.0, 0.0, 1.0], ["a", "a", "a", "b"])
    after = domain([0.5, 1.0, 0.5, 1.0], ["b", "a", "b", "a"])
    change = reward_change(before, after)
    assert change.before == pytest.approx(2 / 3)
    assert change.after == pytest.approx(3 / 4)
    assert change.delta == pytest.approx(1 / 12)
    assert reward_change(after, before).delta == pytest.approx(-1 / 12)


def test_measured_reward_is_paired_by_prompt_id() -> None:
    """120 prompts, 1 to 3 responses each, listed in another order after: the error is that of the paired differences."""
    g, n = np.random.default_rng(5), 120
    level = g.standard_normal(n)
    gain = 0.4 + 0.2 * g.standard_normal(n)

    def rollouts(mean: Any, prefix: str, order: Any) -> Domain:
        ids = [f"{prefix}{i}" for i in order for _ in range(1 + i % 3)]
        shift = [j - (i % 3) / 2 for i in order for j in range(1 + i % 3)]  # sums to zero over a prompt's responses
        return domain([float(mean[int(p[1:])]) + s for p, s in zip(ids, shift, strict=True)], ids)

    first = rollouts(level, "p", range(n))
    paired = reward_change(first, rollouts(level + gain, "p", g.permutation(n)))
    assert paired.delta == pytest.approx(gain.mean())
    assert paired.stderr == pytest.approx(gain.std(ddof=1) / math.sqrt(n), rel=0.15)
    others = reward_change(first, rollouts(level + gain, "q", range(n)))
    alone = math.sqrt((level.var(ddof=1) + (level + gain).var(ddof=1)) / n)
    assert others.delta == pytest.approx(gain.mean())
    assert others.stderr == pytest.approx(alone, rel=0.15)


def test_sequence_change_by_hand() -> None:
    before = Scores(np.array([-1.0, -2.0, -3.0, -1.0, -2.0, -1.0]), np.zeros(6))
    after = Scores(np.array([-2.0, -2.0, -4.0, -1.5, -1.0, -3.0]), np.array([0.1, 0.4, 0.3, 0.2, 0.5, 0.7]))
    nll, kl = (sequence_change(o, domain(), before, after) for o in ("nll", "kl"))
    assert (nll.before, nll.after, nll.delta) == pytest.approx((1.0, 1.35, 0.35))  # 10 and 13.5 nats over 10 tokens
    assert (kl.before, kl.after, kl.delta) == pytest.approx((0.0, 0.22, 0.22))


@pytest.mark.parametrize("objective", ["nll", "kl"])
def test_sequence_change_has_the_error_of_a_ratio(objective: str) -> None:
    """se^2 = sum over prompts of (change - ratio * tokens)^2 / (all tokens)^2, three responses to each of 100 prompts."""
    g, n = np.random.default_rng(6), 100
    tokens = g.integers(1, 6, 3 * n)
    per_prompt = np.repeat(g.standard_normal(n), 3)
    change = tokens * (0.3 + 0.2 * per_prompt)
    logp = np.asarray(-3.0 * tokens, np.float64)
    data = domain([0.0] * (3 * n), [f"p{i // 3}" for i in range(3 * n)], [int(t) for t in tokens])
    found = sequence_change(objective, data, Scores(logp, 0 * change), Scores(logp - change, change))
    ratio = change.sum() / tokens.sum()
    assert found.delta == pytest.approx(ratio)
    rest = (change - ratio * tokens).reshape(n, 3).sum(1)
    assert found.stderr == pytest.approx(math.sqrt((rest**2).sum()) / tokens.sum(), rel=0.15)


def test_importance_estimate_is_the_direct_sum() -> None:
    step = [0.5, -0.2, 0.1, 1.0, -0.6, 0.3]
    anchor = np.array([-3.0, -2.5, -2.0, -1.5, -1.2, -1.0])
    found = importance_estimate(domain(), Scores(anchor, np.zeros(6)), Scores(anchor + step, np.zeros(6)))
    ratio = [math.exp(s) for s in step]
    direct = sum(w * a * (r - 1) for w, a, r in zip(WEIGHT, ADVANTAGE, ratio, strict=True)) / PROMPTS
    assert found.delta == pytest.approx(direct)
    assert found.ess == pytest.approx(sum(ratio) ** 2 / sum(r * r for r in ratio))
    assert found.sequences == 6


# Two domains x three updates: (domain, update): predicted, measured, its stderr, half-width of its replicates.
CELLS = {
    ("a", "a"): (-0.50, -0.40, 0.10, 0.20),  # detectable, right sign, covered
    ("a", "b"): (0.20, 0.30, 0.10, 0.10),  # detectable, right sign, not covered (0.9 * 0.1 < 0.1)
    ("a", "c"): (0.10, -0.10, 0.10, 0.30),  # within noise, wrong sign, covered
    ("b", "a"): (-0.30, 0.25, 0.10, 0.20),  # detectable, wrong sign, not covered
    ("b", "b"): (0.40, 0.16, 0.10, 0.30),  # within noise (0.16 < 1.645 * 0.1), covered
    ("b", "c"): (0.60, 0.70, 0.10, 0.20),  # detectable, right sign, covered
}


def card(objective: str) -> evaluation.Scorecard:
    n, models = 40, {}
    for d in "ab":
        slope = np.tile([CELLS[d, u][0] for u in "abc"], (n, 1))  # equal at every prompt: no error of its own
        terms = SequenceTerms(np.zeros(n), slope, np.zeros((n, 3, 3)), np.zeros((n, 3, 3)), np.ones(n))
        models[d] = QuadraticModel(objective, d, ("a", "b", "c"), tuple(f"{i}" for i in range(n)), terms)
    rows = [(d, u, 1.0, 1.0 + m, m, se, np.linspace(m - w, m + w, 1000)) for (d, u), (_, m, se, w) in CELLS.items()]
    measured = pd.DataFrame(rows, columns=["domain", "update", "before", "after", "delta", "stderr", "replicates"])
    baselines: dict[str, Any] = {"update_norm": [3, 5, 4, 3, 5, 4], "update_cosine": [1, 0.2, 0.5, 0.2, 1, 0.4]}
    baselines |= {"gradient_cosine": [0.3, -0.1, 0.2, 0.0, 0.5, -0.4], "kl": [1.0, 4.0, 2.0, 3.0, 2.5, 6.0]}
    extra = measured[["domain", "update"]].assign(**baselines)
    return evaluation.evaluate(models, measured.sample(frac=1, random_state=0), extra)


def test_cells_and_scores_by_hand() -> None:
    found = card("nll")
    cells = found.cells.set_index(["domain", "update"])
    assert {at for at, own in cells["own"].items() if own} == {("a", "a"), ("b", "b")}
    for at, (predicted, measured, _, _) in CELLS.items():
        assert cells.loc[at, "predicted_second"] == pytest.approx(predicted)
        assert cells.loc[at, "measured"] == measured
    assert {at for at, seen in cells["detectable"].items() if not seen} == {("a", "c"), ("b", "b")}
    assert found.get("sign_accuracy", where="all") == pytest.approx(3 / 4)  # of all six cells it would be 4 / 6
    assert found.get("sign_accuracy") == pytest.approx(2 / 3)
    assert found.get("coverage", where="all") == pytest.approx(4 / 6)
    assert found.get("coverage") == pytest.approx(2 / 4)
    assert (found.get("cells", where="all"), found.get("cells"), found.get("cells_detectable")) == (6, 4, 3)


@pytest.mark.parametrize(("objective", "hurts"), [("nll", 1.0), ("reward", -1.0)])
def test_norm_and_kl_hurt_and_cosines_help(objective: str, hurts: float) -> None:
    """Hurting is a rise of the nll and a fall of the reward."""
    found = card(objective)
    measured = np.array([m for _, m, _, _ in CELLS.values()])
    table = found.cells.set_index(["domain", "update"]).loc[list(CELLS)]
    for name, sign in (("update_norm", 1), ("kl", 1), ("update_cosine", -1), ("gradient_cosine", -1)):
        assert evaluation.orientation(name, objective) == sign * hurts
        plain = np.corrcoef(table[name].to_numpy(float), measured)[0, 1]
        assert found.get("pearson", name, "all") == pytest.approx(sign * hurts * plain)
    ours = np.corrcoef([predicted for predicted, _, _, _ in CELLS.values()], measured)[0, 1]
    assert found.get("pearson", where="all") == pytest.approx(ours)


def test_baselines_of_a_run_from_the_checkpoint_files(demo_run: Path, checkpoints: Path) -> None:
    weights = {m: load_file(checkpoints / m / "model.safetensors") for m in ("base", "rl_a", "rl_b")}
    flat = {m: np.concatenate([w[k].double().numpy().ravel() for k in sorted(w)]) for m, w in weights.items()}
    moved = {u: flat[f"rl_{u}"] - flat["base"] for u in "ab"}
    norm = {u: float(np.sqrt((moved[u] ** 2).sum())) for u in "ab"}
    assert abs(norm["a"] - norm["b"]) > 1e-3 * norm["a"]  # so that a swap shows
    cosine = float(moved["a"] @ moved["b"]) / (norm["a"] * norm["b"])
    models = {m: Qwen3ForCausalLM.from_pretrained(checkpoints / m).double() for m in weights}

    def kl(u: str, d: str) -> float:
        total, tokens = 0.0, 0
        for row in map(json.loads, (checkpoints / f"{d}.jsonl").read_text().splitlines()):
            prompt, response = (tokenizer()(row[k])["input_ids"] for k in ("prompt", "response"))
            ids, n = torch.tensor([[*prompt, *response, 1]]), len(response) + 1  # the end token was generated too
            with torch.no_grad():
                old, new = (models[m](ids).logits[0, -n - 1 : -1].log_softmax(-1) for m in ("base", f"rl_{u}"))
            total, tokens = total + float((old.exp() * (old - new)).sum()), tokens + n
        return total / tokens

    cells = Run.open(demo_run).cells().set_index(["update", "domain"])
    for u, d in set(cells.index):
        of_both_objectives = cells.loc[(u, d)]
        assert list(of_both_objectives["update_norm"]) == pytest.approx([norm[u]] * 2, rel=1e-5)
        assert list(of_both_objectives["update_cosine"]) == pytest.approx([1.0 if u == d else cosine] * 2, rel=1e-4)
        assert list(of_both_objectives["kl"]) == pytest.approx([kl(u, d)] * 2, rel=1e-3)


def test_measured_reward_of_a_run_from_its_rollouts(demo_run: Path) -> None:
    """Tuned minus base, of each prompt's mean reward, from the files of rollouts."""

    def mean(model: str, name: str) -> float:
        rows = pd.read_json(demo_run / "rollouts" / name / f"{model}.jsonl", lines=True, dtype={"prompt_id": str})
        return float(np.mean([part.mean() for _, part in rows.groupby("prompt_id")["reward"]]))

    cells = Run.open(demo_run).cells()
    cells = cells[cells["objective"] == "reward"]
    assert cells["measured"].abs().max() > 0
    for _, cell in cells.iterrows():
        before, after = mean("base", cell["domain"]), mean(cell["update"], cell["domain"])
        assert (cell["before"], cell["after"]) == pytest.approx((before, after))
        assert cell["measured"] == pytest.approx(after - before, abs=1e-12)
