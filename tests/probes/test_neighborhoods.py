"""Policy neighborhoods: divergences known in closed form are covered at their rate, and equal policies show none."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny import perturbed, qwen3, write_jsonl
from toy import ToyTransformer

from interference import measurement
from interference.domain import Domain, Sequence
from interference.errors import InputError
from interference.model import Model, prepare
from interference.probes import log_probabilities as lp
from interference.probes import neighborhoods as nb
from interference.probes.kl_forecast import kl_from_update
from interference.probes.scored import (
    Trajectories,
    read_scored,
    score_trajectories,
    scored_from_rows,
)
from interference.rollouts import sample

Array = NDArray[np.float64]
VOCABULARY, END, LONGEST = 5, 0, 6


def log_softmax(z: Array) -> Array:
    return np.asarray(z - np.logaddexp.reduce(z, axis=-1, keepdims=True))


def tabular(seed: int, scale: float, like: Array | None = None) -> Array:
    """A policy over five tokens, log p(next | kind of prompt, last token): (kinds, last, next); token 0 ends a response."""
    z = scale * np.random.default_rng(seed).normal(size=(3, VOCABULARY, VOCABULARY))
    return log_softmax(z if like is None else like + z)


def closed_form(p: Array, q: Array) -> tuple[float, float]:
    """KL(p || q) of whole responses of at most LONGEST tokens, and the mean length; kinds of prompt are equally likely."""
    state = np.zeros((3, VOCABULARY))
    state[:, 1] = 1.0  # every prompt ends in token 1
    divergence = length = 0.0
    at_state = (np.exp(p) * (p - q)).sum(-1)
    for _ in range(LONGEST):
        divergence += float((state * at_state).sum()) / 3
        length += float(state.sum()) / 3
        state = np.einsum("ks,kst->kt", state, np.exp(p))
        state[:, END] = 0.0
    return divergence, length


def walk(p: Array, q: Array, prompts: int, responses: int, rng: np.random.Generator) -> Trajectories:
    """Responses of the policy p, scored under itself, a copy and q, with exact divergences."""
    ids, own, other, exact = [], [], [], []
    for i in range(prompts):
        kind = int(rng.integers(3))
        for _ in range(responses):
            last, a, b, kl = 1, [], [], []
            for _ in range(LONGEST):
                row, ref = p[kind, last], q[kind, last]
                kl.append(float((np.exp(row) * (row - ref)).sum()))
                last = int(np.searchsorted(np.exp(row).cumsum(), rng.random()).clip(max=VOCABULARY - 1))
                a.append(row[last])
                b.append(ref[last])
                if last == END:
                    break
            ids.append(str(i))
            for where, values in ((own, a), (other, b), (exact, kl)):
                where.append(np.array(values))
    logps = {"p": tuple(own), "copy": tuple(own), "q": tuple(other)}
    return Trajectories("p", "d", tuple(ids), logps, {"q": tuple(exact), "copy": tuple(0 * x for x in own)})


def test_intervals_cover_the_closed_form_at_their_rate() -> None:
    p = tabular(0, 1.0)
    q = tabular(1, 0.4, p)
    kl, length = closed_form(p, q)
    truth = {"sequence": kl, "token": kl / length}
    inside: dict[tuple[str, str], list[bool]] = {}
    values: dict[tuple[str, str], list[float]] = {}
    rng = np.random.default_rng(2)
    for _ in range(200):
        table = nb.kl_matrix([walk(p, q, 60, 4, rng)], ["q"], estimators=nb.ESTIMATORS)
        for row in table.to_dict("records"):
            key = row["estimator"], row["per"]
            inside.setdefault(key, []).append(row["low"] <= truth[row["per"]] <= row["high"])
            values.setdefault(key, []).append(row["value"])
    assert len(inside) == 8
    for key, found in inside.items():
        # Planted bug: a standard error over responses (six a prompt), not prompts, covered "exact" at 0.6 to 0.7.
        assert 0.82 <= np.mean(found) <= 0.96, (key, np.mean(found))
        spread = np.std(values[key]) / math.sqrt(200)
        assert abs(np.mean(values[key]) - truth[key[1]]) < 4 * spread + 1e-3 * truth[key[1]], key
    assert np.std(values["exact", "sequence"]) < np.std(values["k3", "sequence"]) < np.std(values["k1", "sequence"])


def test_bootstrap_agrees_with_t() -> None:
    p = tabular(0, 1.0)
    t = walk(p, tabular(1, 0.4, p), 300, 2, np.random.default_rng(3))
    one, two = (nb.kl_matrix([t], ["q"], interval=kind) for kind in ("t", "bootstrap"))
    np.testing.assert_allclose(one["value"], two["value"])
    np.testing.assert_allclose(one["stderr"], two["stderr"], rtol=0.1)


def test_same_policy_has_no_divergence() -> None:
    p = tabular(0, 1.0)
    table = nb.kl_matrix([walk(p, p, 20, 2, np.random.default_rng(4))], estimators=nb.ESTIMATORS)
    assert set(table["reference"]) == {"copy", "q"}
    assert (table[["value", "low", "high"]] == 0).all(axis=None)


def test_prompts_weigh_as_one_whatever_their_responses() -> None:
    logps = {"p": tuple(np.array([-1.0]) for _ in range(4)), "q": tuple(np.array([-x]) for x in (2.0, 2.0, 2.0, 1.0))}
    t = Trajectories("p", "d", ("a", "a", "a", "b"), logps)
    table = nb.kl_matrix([t], estimators=["k1"])
    np.testing.assert_allclose(table["value"], 0.5)
    np.testing.assert_allclose(table["stderr"], np.std([1.0, 0.0], ddof=1) / math.sqrt(2))


def test_k3_is_never_negative() -> None:
    rng = np.random.default_rng(5)
    a = -rng.exponential(size=1000)
    for b in (-rng.exponential(size=1000), a * (1 + 1e-9 * rng.normal(size=1000)), a):
        assert (nb.k3(a, b) >= 0).all()
    assert (nb.k1(a, -rng.exponential(size=1000)) < 0).any()


def test_one_prompt_has_no_interval() -> None:
    t = Trajectories("p", "d", ("a",), {"p": (np.array([-1.0]),), "q": (np.array([-2.0]),)})
    assert nb.kl_matrix([t])[["stderr", "low", "high"]].isna().all(axis=None)


def _on(domain: str, policy: str, gaps: Array) -> Trajectories:
    own = tuple(np.full(4, -5.0) for _ in gaps)
    return Trajectories(
        policy,
        domain,
        tuple(map(str, range(len(gaps)))),
        {policy: own, "multi": tuple(x - g for x, g in zip(own, gaps, strict=True))},
    )


def test_neighbors_and_their_certainty() -> None:
    """On a's prompts eps is a's own divergence; what is common to all prompts cancels in the paired difference."""
    rng = np.random.default_rng(6)
    difficulty = rng.exponential(1.0, 30)
    found = [
        _on("a", "a", difficulty),
        _on("a", "near", difficulty - 0.1 + 0.02 * rng.normal(size=30)),
        _on("a", "far", difficulty + 0.1 + 0.02 * rng.normal(size=30)),
        _on("a", "same", difficulty + 0.5 * rng.normal(size=30)),
    ]
    experts = {"a": "a", "b": "near", "c": "far", "e": "same"}
    table = nb.neighbors(found, "multi", experts=experts, estimator="k1").set_index("expert")
    assert list(table["neighbor"])[:2] == [True, False]
    assert list(table["certain"]) == [True, True, False]
    assert table.loc["near", "difference"] == pytest.approx(-0.1, abs=0.02)
    np.testing.assert_allclose(table["eps"], difficulty.mean())
    stated = nb.neighbors(found, "multi", experts=experts, eps=1e-3, estimator="k1").set_index("expert")
    assert not stated["neighbor"].any()
    assert stated.loc["near", "stderr"] > 5 * table.loc["near", "stderr"]


@pytest.mark.parametrize("repeats", [200])
def test_certainty_of_equal_divergences_is_false_at_its_rate(repeats: int) -> None:
    rng = np.random.default_rng(7)
    wrong = []
    for _ in range(repeats):
        common = rng.exponential(1.0, 30)
        found = [_on("a", name, common + 0.3 * rng.normal(size=30)) for name in ("a", "b")]
        wrong.append(nb.neighbors(found, "multi", experts={"a": "a", "b": "b"}, estimator="k1")["certain"].iloc[0])
    assert 0.04 <= np.mean(wrong) <= 0.17


def test_performance_beside_divergence() -> None:
    def rewarded(values: list[float]) -> Domain:
        return Domain("a", tuple(Sequence((1,), (2,), str(i), r) for i, r in enumerate(values)))

    matrix = nb.kl_matrix([_on("a", "e", np.array([0.1, 0.3])), _on("b", "e", np.array([0.1, 0.3]))], estimators=["k1"])
    rewards = {("base", "a"): rewarded([0, 0, 1, 0]), ("e", "a"): rewarded([1, 0, 1, 1])}
    table = nb.with_performance(matrix, rewards).set_index("domain")
    np.testing.assert_allclose(table.loc["a", "change"], 0.5)
    assert (table.loc["a", "change_low"] < 0.5).all()
    assert (table.loc["a", "change_high"] > 0.5).all()
    assert table.loc["b", "change"].isna().all()


def tiny_model(seed: int = 0) -> Model:
    return prepare(qwen3(0) if seed == 0 else perturbed(seed, 0.05))


def rollouts(model: Model, prompts: int = 8, samples: int = 2, seed: int = 0) -> Domain:
    from tiny import tokenizer

    ids = [(3 + i, 4, 5) for i in range(prompts)]
    found = sample(model.module, tokenizer(), ids, samples=samples, max_new_tokens=5, seed=seed)
    return Domain("d", tuple(Sequence(r.prompt_token_ids, r.response_token_ids, str(r.prompt_index)) for r in found))


def test_token_log_probabilities_and_divergences_by_hand() -> None:
    a, b = (prepare(ToyTransformer.seeded(s)) for s in (0, 1))
    domain = Domain(
        "d", (Sequence((1, 2), (3, 4, 5), "x"), Sequence((1, 2, 3), (7,), "y"), Sequence((1, 2), (3, 4, 5), "x"))
    )
    found, kl = lp.token_log_probabilities(a, domain, batch_tokens=5), lp.state_divergences(a, b, domain)
    for s, values, divergence in zip(domain.sequences, found, kl, strict=True):
        ids = torch.tensor([s.prompt + s.response])
        p, q = (m.module(ids).logits[0].log_softmax(-1)[len(s.prompt) - 1 : -1] for m in (a, b))
        torch.testing.assert_close(torch.tensor(values), p[range(len(s.response)), list(s.response)])
        torch.testing.assert_close(torch.tensor(divergence), (p.exp() * (p - q)).sum(-1))
    scores = measurement.score(a, domain, [])[0]
    np.testing.assert_allclose([x.sum() for x in found], scores.logp)


def test_same_model_has_exactly_no_divergence() -> None:
    one, same = tiny_model(), tiny_model()
    t = score_trajectories({"one": one, "same": same}, "one", rollouts(one))
    assert (nb.kl_matrix([t])["value"] == 0).all()


def test_estimators_agree_on_models() -> None:
    models = {"base": tiny_model(), "tuned": tiny_model(1)}
    t = score_trajectories(models, "base", rollouts(models["base"], 24, 16))
    table = nb.kl_matrix([t]).query("per == 'sequence'").set_index("estimator")
    exact = table.loc["exact"]
    assert exact["value"] > 0.01
    for name in ("k1", "k3"):
        joint = math.hypot(table.loc[name, "stderr"], exact["stderr"])
        assert abs(table.loc[name, "value"] - exact["value"]) < 4 * joint
    backward = score_trajectories(models, "tuned", rollouts(models["base"]))  # named "tuned": KL the other way round
    assert nb.kl_matrix([backward], estimators=["exact"])["value"].iloc[0] != exact["value"]


def test_cache_resumes_and_knows_its_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, domain = tiny_model(), rollouts(tiny_model())
    monkeypatch.setattr(lp, "_CHUNK", 4)
    plain = lp.token_log_probabilities(model, domain)
    first = lp.token_log_probabilities(model, domain, cache=tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) > 1
    files[0].unlink()
    kept, calls = files[1].stat().st_mtime_ns, []
    real = lp._computed
    monkeypatch.setattr(lp, "_computed", lambda *a: calls.append(1) or real(*a))
    again = lp.token_log_probabilities(model, domain, cache=tmp_path)
    assert calls == [1]
    assert files[1].stat().st_mtime_ns == kept
    for a, b, c in zip(plain, first, again, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    other = lp.token_log_probabilities(tiny_model(1), domain, cache=tmp_path)
    assert any((a != b).any() for a, b in zip(other, again, strict=True))
    lp.state_divergences(model, tiny_model(1), domain, cache=tmp_path)
    assert len(list(tmp_path.glob("kl-*.safetensors"))) == len(files)
    assert not list(tmp_path.glob("*.part"))
    files[1].write_bytes(b"\x00" * 16)
    with pytest.raises(InputError, match="damaged"):
        lp.token_log_probabilities(model, domain, cache=tmp_path)


def test_forecast_beside_the_measured_divergence(toy: Model) -> None:
    """The forecast is the quadratic part: its gap falls as the cube of the update's size."""
    g = torch.Generator().manual_seed(0)
    direction = {n: torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in toy.parameters.items()}
    sequences = tuple(Sequence((1, 2, 3 + i), (4 + i, 5, 6), str(i)) for i in range(6))
    updates = {f"{s:g}": {n: s * x for n, x in direction.items()} for s in (0.004, 0.002)}
    table = kl_from_update(toy, updates, {"d": Domain("d", sequences)}).set_index("update")
    assert table.loc["0.004", "forecast"] == pytest.approx(4 * table.loc["0.002", "forecast"])
    assert abs(table.loc["0.004", "gap"]) < 0.2 * table.loc["0.004", "measured"]
    assert table.loc["0.004", "gap"] / table.loc["0.002", "gap"] == pytest.approx(8, rel=0.2)
    assert (table["gap_low"] <= table["gap"]).all()
    assert (table["gap"] <= table["gap_high"]).all()
    ratio = table["forecast"] / table["measured"]
    assert table["ratio"].to_dict() == pytest.approx(ratio.to_dict())
    assert ((table["ratio_low"] <= ratio) & (ratio <= table["ratio_high"])).all()


def test_jsonl_of_another_server(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "response": "r", "logps": {"e": [-1.0, -0.5], "m": [-1.5, -0.5 - i]}} for i in range(3)]
    t = read_scored(write_jsonl(tmp_path / "t.jsonl", rows), policy="e", domain="d")
    table = nb.kl_matrix([t], estimators=["k1"]).query("per == 'sequence'")
    assert table["value"].iloc[0] == pytest.approx(1.5)
    assert table["prompts"].iloc[0] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logps": None}, "row 2: logps None"),
        ({"logps": {"e": [-1.0]}}, "row 2: logps of \\['e'\\]"),
        ({"logps": {"e": [-1.0], "m": [-1.0, -2.0]}}, "'m' on 'd': token values that do not fit"),
        ({"logps": {"e": [-1.0], "m": [0.5]}}, "natural logarithms"),
        ({"logps": {"e": [-1.0], "m": [float("nan")]}}, "finite"),
        ({"logps": {"e": [-1.0], "m": "x"}}, "a list of numbers"),
    ],
)
def test_bad_rows(change: dict[str, object], message: str) -> None:
    row = {"prompt": "p", "response": "r", "logps": {"e": [-1.0], "m": [-1.0]}}
    with pytest.raises(InputError, match=message):
        scored_from_rows([row, row | change], policy="e", domain="d")


def test_bad_requests() -> None:
    t = _on("a", "b", np.array([0.1, 0.2]))
    with pytest.raises(InputError, match="own divergence"):
        nb.neighbors([t], "multi", experts={"a": "a", "b": "b"})
    with pytest.raises(InputError, match="did you mean 'multi'"):
        nb.kl_matrix([t], ["multy"])
    with pytest.raises(InputError, match="'k2'"):
        nb.kl_matrix([t], estimators=["k2"])
    with pytest.raises(InputError, match="different prompts"):
        nb.neighbors([t, _on("a", "a", np.array([0.1]))], "multi", experts={"a": "a", "b": "b"})
    with pytest.raises(InputError, match="under the policy"):
        Trajectories("x", "d", t.prompt_ids, t.logps)
    with pytest.raises(InputError, match="no exact divergences"):
        nb.neighbors([t], "multi", experts={"b": "b"}, eps=0.1, estimator="exact")
    with pytest.raises(InputError, match="a positive eps"):
        nb.neighbors([t], "multi", experts={"b": "b"}, eps=0.0)
    with pytest.raises(InputError, match="one of the models"):
        score_trajectories({}, "x", Domain("d", ()))
    big = prepare(qwen3(0, vocab_size=29))
    with pytest.raises(InputError, match="27 and 29"):
        lp.state_divergences(tiny_model(), big, rollouts(tiny_model()))
