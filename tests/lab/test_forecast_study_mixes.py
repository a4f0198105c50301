"""Mixtures and merges in the forecast study: what is trained, what is told of it, and how that is scored."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from interference.forecasting.halves import Halves
from interference.records import read_json
from interference.tree import LowRank, dense
from paper_repro.forecast_study import mixes
from paper_repro.forecast_study.decisions import MIX_PLANS, MIXES, mix_picks, mix_scores
from paper_repro.forecast_study.setups import QUICK, SETUPS

pytestmark = pytest.mark.xdist_group("study")  # one worker makes the small study for all
DOMAINS = ("math", "code", "qa")


def test_what_is_mixed_and_merged() -> None:
    setup = SETUPS["llama-grpo"]
    found = mixes.mixtures(setup)
    assert len(found) == 15
    assert found["math+qa"] == {"math": 0.5, "qa": 0.5}
    merged = mixes.merges(setup)
    assert len(merged) == 22
    assert merged["sum math+qa"] == {"math": 1.0, "qa": 1.0}
    assert merged["average math+code+qa+writing"] == dict.fromkeys(setup.domains, 0.25)
    assert set(setup.mixture_lab().rl_steps.values()) == {60}
    assert dataclasses.replace(setup, mixed=False).settings() == setup.settings()  # they can be added to a folder


def table(predicted: np.ndarray, measured: np.ndarray, kind: str = "mixture", setup: str = "s") -> pd.DataFrame:
    """(plans, domains) values as rows of `mixes.csv`; the first plan is a single domain."""
    rows = [
        {
            "setup": setup, "role": "heldout", "training_seed": 1, "length": 60, "kind": kind, "plan": f"p{i}", "single": i == 0,
            "predictor": "virtual", "domain": DOMAINS[j], "predicted": predicted[i, j], "stderr": 0.01, "ess": 0.5,
            "measured": measured[i, j], "measured_stderr": 0.0,
        }
        for i in range(len(predicted))
        for j in range(3)
    ]  # fmt: skip
    return pd.DataFrame(rows)[list(MIXES)]


def test_picks_are_by_the_mean_and_by_the_worst_domain() -> None:
    measured = np.array([[0.3, 0.0, 0.0], [0.1, 0.05, 0.06], [-0.2, 0.3, 0.3]])
    predicted = np.array([[0.1, 0.1, 0.1], [0.1, 0.1, 0.0], [-0.1, 0.3, 0.4]])
    picks = mix_picks(table(predicted, measured)).set_index("kind")
    mean, worst = picks.loc["mixture_mean"], picks.loc["mixture_worst"]
    assert (mean["picked"], mean["best"], mean["right"]) == ("p2", "p2", 1)
    assert mean["regret"] == pytest.approx(0)
    assert mean["chance_regret"] == pytest.approx(0.4 / 3 - measured.mean(1).mean())
    assert (worst["picked"], worst["best"]) == ("p0", "p1")
    assert worst["regret"] == pytest.approx(0.05)
    assert worst["spearman"] == pytest.approx(stats.spearmanr([0.1, 0, -0.1], [0, 0.05, -0.2])[0])


def test_scores_are_of_plans_of_several_domains() -> None:
    rng = np.random.default_rng(0)
    measured = rng.normal(0, 0.1, (12, 3))
    predicted = measured / 2 + np.array([0.5, -0.5, 0.0])  # each domain off by its own constant
    predicted[0] = 9.0  # the single domain does not count
    (row,) = mix_scores(table(predicted, measured)).to_dict("records")
    assert (row["spearman"], row["pearson"], row["plans"]) == (pytest.approx(1), pytest.approx(1), 11)
    assert row["slope"] == pytest.approx(2)
    assert row["error"] == pytest.approx(np.abs(predicted - measured)[1:].mean())
    assert row["coverage"] == pytest.approx((np.abs(predicted - measured)[1:] <= 0.01645).mean())
    without = mix_scores(table(predicted, measured).assign(stderr=np.nan))
    assert without["coverage"].isna().all()


def test_a_merge_is_the_weighted_sum_of_both_estimates() -> None:
    up, down = torch.randn(3, 1), torch.randn(1, 4)
    one = Halves({"w": torch.ones(3, 4), "b": torch.ones(2)}, {"w": torch.zeros(3, 4)}, 0.2)
    other = Halves({"w": LowRank(up, down)}, {"w": LowRank(2 * up, down), "b": torch.ones(2)}, 0.6)
    found = mixes.merge({"a": one, "b": other, "c": one}, {"a": 0.5, "b": 2.0})
    torch.testing.assert_close(dense(found.first["w"]), 0.5 + 2 * up @ down)
    torch.testing.assert_close(dense(found.second["w"]), 4 * up @ down)
    torch.testing.assert_close(dense(found.first["b"]), torch.full((2,), 0.5))
    torch.testing.assert_close(dense(found.second["b"]), torch.full((2,), 2.0))
    assert found.noise == pytest.approx(0.4)


def test_mixes_are_made_measured_and_forecast(study: Path) -> None:
    """The whole of a small study: the files it leaves, the merge's weights, and what was measured of it."""
    folder = study / "quick"
    found = pd.read_csv(folder / "mixes.csv")
    assert tuple(found.columns) == MIXES
    assert len(found) == (15 * 4 + 26 * 3) * 4  # merges have no averages of their own
    assert np.isfinite(found[["predicted", "measured", "measured_stderr"]].to_numpy(float)).all()
    assert (found["stderr"].notna() == found["predictor"].isin(["virtual", "virtual_averaged"])).all()
    keys = ["kind", "plan", "domain"]
    told = found.set_index([*keys, "predictor"])["predicted"]
    record = read_json(folder / "records" / "mixes_forecast.json")
    alone = {(n, c["domain"]): c["predicted"] for n in QUICK.domains for c in record["mixture"][n]}
    added = alone["math", "code"] + alone["qa", "code"]
    assert told["merge", "sum math+qa", "code", "virtual_added"] == pytest.approx(added)
    averaged = told["merge", "average math+qa", "code", "virtual"]
    assert told["mixture", "math+qa", "code", "virtual_averaged"] == averaged
    after, before = (
        read_json(folder / "records" / f"{n}.json")["rewards"]["code"]
        for n in ("mixes_measure_math+qa", "measure_base")
    )
    measured = found.set_index([*keys, "predictor"])["measured"]
    assert measured["mixture", "math+qa", "code", "virtual"] == pytest.approx(np.mean(after) - np.mean(before))
    plans = pd.read_csv(folder / "mix_plans.csv")
    assert tuple(plans.columns) == MIX_PLANS
    best = plans[plans["behind"] == 0]
    assert len(best) >= 4
    assert (best["behind_stderr"] == 0).any()
    mean = plans.set_index(["kind", "plan", "by"])["measured"]["mixture", "math+qa", "mean"]
    assert mean == pytest.approx(measured["mixture", "math+qa"].xs("virtual", level="predictor").mean())
    base, both, math, qa = (
        load_file(folder / where / "model.safetensors")["lm_head.weight"]
        for where in ("lab/base", "mixtures/rl_math+qa", "seed1/rl_math", "seed1/rl_qa")
    )
    reach = QUICK.nominal * QUICK.config.rl_learning_rate
    assert 0.5 * reach < (both - base).abs().max() <= 1.05 * reach
    a, b, c = ((x - base).flatten() for x in (both, math, qa))
    nearer = [torch.nn.functional.cosine_similarity(a, b + c, dim=0)]
    assert nearer[0] > max(torch.nn.functional.cosine_similarity(a, x, dim=0) for x in (b, c)), "it learns of both"
