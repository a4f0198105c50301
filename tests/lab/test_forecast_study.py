"""The forecast study: scores of cells with known answers, decisions, and a quick set-up from end to end, resumed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

import figures
from figures.forecast_study import forecast_study_pages
from interference import Domain
from interference.domain import Sequence
from interference.errors import InputError
from interference.records import read_json
from paper_repro.forecast_study import score
from paper_repro.forecast_study.decisions import ORDERS, decision_table, decisions
from paper_repro.forecast_study.orders import check_plan, prefixes
from paper_repro.forecast_study.predictions import TIERS, first_responses
from paper_repro.forecast_study.report import THRESHOLDS, tables_of, write_results
from paper_repro.forecast_study.run import run
from paper_repro.forecast_study.setups import QUICK, SETUPS, Setup, find
from paper_repro.forecast_study.work import Work
from paper_repro.lab.config import LabConfig

pytestmark = pytest.mark.xdist_group("study")  # one worker makes the small study for all
DOMAINS = "abcd"


def cells(setups: int = 4, seed: int = 0, **predictors: float) -> pd.DataFrame:
    """Random measured matrices; each predictor's value is the measured one plus noise of this size (NaN: its negative)."""
    rng, rows = np.random.default_rng(seed), []
    for s, (u, d) in itertools.product(range(setups), itertools.product(DOMAINS, DOMAINS)):
        y = rng.normal(0, 0.1)
        for name, noise in predictors.items():
            x = -y if np.isnan(noise) else y + noise * rng.normal()
            rows.append({
                "setup": f"s{s}", "role": "heldout", "training_seed": 1, "length": 60, "nominal": True, "predictor": name,
                "update": u, "domain": d, "own": u == d, "predicted": x, "measured": y, "measured_stderr": 0.01,
                "error_stderr": 0.02, "ess": 0.9, "agreement": 0.5, "world": "lpt", "tokens": 8,
            })  # fmt: skip
    return pd.DataFrame(rows)


def test_metrics_of_one_matrix_are_scipys() -> None:
    table = cells(1, virtual=0.05)
    row = score.per_setup(table).iloc[0]
    off, own = table[~table["own"]], table[table["own"]]
    x, y = off["predicted"], off["measured"]
    assert row["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic)
    assert row["pearson"] == pytest.approx(stats.pearsonr(x, y).statistic)
    assert row["slope"] == pytest.approx(stats.linregress(x, y).slope)
    loud = abs(y) > 1.6449 * 0.01
    assert row["sign_accuracy"] == pytest.approx((np.sign(x) == np.sign(y))[loud].mean())
    assert row["coverage"] == pytest.approx((abs(x - y) <= 1.6449 * 0.02).mean())
    assert row["own_error"] == pytest.approx(abs(own["predicted"] - own["measured"]).mean())
    assert row["own_within"] == pytest.approx((abs(own["predicted"] - own["measured"]) <= 0.05).mean())


def test_pooling_ranks_within_set_ups() -> None:
    """Offsets and scales between set-ups neither help nor hurt."""
    table = cells(5, virtual=0.05)
    scale = table["setup"].map({f"s{i}": 10.0**i for i in range(5)})
    moved = table.assign(predicted=table["predicted"] * scale + scale, measured=table["measured"] * scale - scale)
    one, two = score.Pooled(table), score.Pooled(moved)
    for metric in ("spearman", "pearson"):
        assert one.value["virtual"][metric] == pytest.approx(two.value["virtual"][metric])
        each = score.per_setup(table)[metric]
        assert one.value["virtual"][metric] == pytest.approx(each.mean())  # matrices of one size


def test_perfect_and_reversed_predictors() -> None:
    pooled = score.Pooled(cells(virtual=0.0, gradient=float("nan"))).table().set_index("predictor")
    assert pooled.loc[
        "virtual", ["spearman", "pearson", "sign_accuracy", "slope", "coverage"]
    ].tolist() == pytest.approx([1] * 5)
    assert pooled.loc["gradient", ["spearman", "slope"]].tolist() == pytest.approx([-1, -1])
    assert pooled.loc["virtual", "own_error"] == 0
    assert pooled.loc["virtual", "spearman_low"] == pytest.approx(1)


def test_intervals_are_of_whole_set_ups() -> None:
    """Half of the set-ups perfect, half reversed: a bootstrap of set-ups must reach far, one of cells would not."""
    table = cells(4, virtual=0.0)
    table.loc[table["setup"].isin(["s0", "s1"]), "predicted"] *= -1
    row = score.Pooled(table).table().iloc[0]
    assert row["spearman"] == pytest.approx(0, abs=1e-9)
    assert row["spearman_low"] <= -0.5
    assert row["spearman_high"] >= 0.5
    alone = score.Pooled(table[table["setup"] == "s0"]).table().iloc[0]
    assert np.isnan(alone["spearman_low"])


def test_differences_are_paired() -> None:
    """Two predictors that are equal differ by zero in every draw, however much set-ups vary."""
    table = cells(6, virtual=0.0, kl=0.0)
    shuffled = table["setup"].isin(["s0", "s1", "s2"])
    table.loc[shuffled, "predicted"] *= -1
    row = score.Pooled(table).differences().iloc[0]
    assert (row["predictor"], row["baseline"]) == ("virtual", "kl")
    assert [row["difference"], row["low"], row["high"]] == pytest.approx([0, 0, 0])
    assert not row["beats"]
    better = score.Pooled(cells(6, virtual=0.01, kl=1.0)).differences().iloc[0]
    assert better["beats"]
    assert better["low"] > 0


def test_baselines_get_the_sign_that_suits_them() -> None:
    table = cells(3, virtual=0.1, kl=float("nan"), update_cosine=0.0)
    turned, signs = score.oriented(table)
    assert dict(zip(signs["predictor"], signs["sign"], strict=True)) == {"kl": -1, "update_cosine": 1}
    assert score.Pooled(turned).value["kl"]["spearman"] == pytest.approx(1)
    assert score.Pooled(turned).value["virtual"] == score.Pooled(table).value["virtual"]
    assert score.per_setup(turned).set_index("predictor").loc["kl", "slope"].isna().all()


def test_local_keeps_cells_with_enough_effective_sequences() -> None:
    table = cells(1, virtual=0.1).assign(ess=np.linspace(0, 1, 16))
    assert len(score.local(table)) == (np.linspace(0, 1, 16) >= 0.3).sum()


def test_decisions() -> None:
    table = cells(1, virtual=0.0, gradient=float("nan"), update_norm=0.0)
    table.loc[table["predictor"] == "update_norm", "predicted"] = 1.0  # says nothing: chance
    picks = decisions(table)
    found = decision_table(picks).set_index(["kind", "predictor"])
    assert found.loc[("worst_hurt", "virtual"), ["right", "regret"]].tolist() == [1, 0]
    assert found.loc[("pair", "virtual"), ["right", "regret"]].tolist() == [1, 0]
    assert found.loc[("worst_hurt", "gradient"), "right"] == 0
    assert found.loc[("worst_hurt", "update_norm"), "right"] == pytest.approx(1 / 3)
    assert found.loc[("pair", "update_norm"), "right"] == pytest.approx(1 / 6)
    m = table[table["predictor"] == "virtual"].pivot(index="update", columns="domain", values="measured").to_numpy()  # noqa: PD010
    both = {f"{DOMAINS[i]}+{DOMAINS[j]}": m[i, j] + m[j, i] for i, j in itertools.combinations(range(4), 2)}
    pair = picks[(picks["kind"] == "pair") & (picks["predictor"] == "gradient")].iloc[0]
    assert pair["best"] == min(both, key=both.__getitem__)
    assert pair["picked"] == max(both, key=both.__getitem__)
    assert pair["regret"] == pytest.approx(max(both.values()) - min(both.values()))


def test_orders_are_scored_where_they_were_measured() -> None:
    orders = pd.DataFrame({
        "setup": "s0", "role": "heldout", "training_seed": 1, "length": 60, "predictor": "virtual",
        "order": ["abcd", "badc", "dcba"], "predicted": [0.5, 0.6, 0.4], "measured": [0.55, 0.54, 0.3],
    })  # fmt: skip
    pick = decisions(cells(1, virtual=0.0), orders).query("kind == 'order'").iloc[0]
    assert (pick["picked"], pick["best"], pick["right"]) == ("badc", "abcd", 0)
    assert pick["regret"] == pytest.approx(0.01)
    assert pick["chance_regret"] == pytest.approx((0 + 0.01 + 0.25) / 3)
    assert pick["spread"] == pytest.approx(0.25)
    assert pick["spearman"] == pytest.approx(0.5)  # ranks 2 3 1 and 3 2 1: 1 - 6 * (1 + 1) / (3 * 8)
    row = decision_table(
        decisions(cells(1, virtual=0.0), pd.concat([orders, orders.assign(setup="s1", measured=orders["predicted"])]))
    )
    row = row.query("kind == 'order'").iloc[0]
    assert [row[k] for k in ("right", "regret", "largest_regret", "spearman")] == pytest.approx(
        [0.5, 0.005, 0.01, 0.75]
    )
    assert (row["picks"], row["setups"]) == (2, 2)


def test_a_forecast_that_is_the_same_for_all_orders_is_a_random_pick() -> None:
    orders = pd.DataFrame({
        "setup": "s0", "role": "heldout", "training_seed": 1, "length": 60, "predictor": "quadratic",
        "order": ["abcd", "badc", "dcba"], "predicted": 0.5, "measured": [0.55, 0.54, 0.3],
    })  # fmt: skip
    pick = decisions(cells(1, virtual=0.0), orders).query("kind == 'order'").iloc[0]
    assert pick["right"] == pytest.approx(pick["chance"])
    assert pick["regret"] == pytest.approx(pick["chance_regret"])
    assert np.isnan(pick["spearman"])


def test_orders_share_what_they_begin_with() -> None:
    setup = SETUPS["llama-grpo"]
    found = prefixes(setup)
    assert len(setup.orders) == 24
    assert len(found) == len(set(found)) == 4 + 12 + 24 + 24
    assert all(p[:-1] in found[:i] for i, p in enumerate(found) if len(p) > 1)
    assert set(setup.order_lab().rl_steps.values()) == {setup.order_steps} == {20}
    assert setup.order_lab().rl_seed == 1
    without = dataclasses.replace(setup, order_steps=0)
    assert without.orders == ()
    assert without.settings() == setup.settings()  # orders can be added to a folder


def test_set_ups_cover_what_the_study_must() -> None:
    held = find(role="heldout")
    assert len(find(role="development")) == 3
    assert len(held) >= 8
    assert {s.config.family for s in held} == {"qwen3", "llama", "gpt2"}
    assert {s.config.algorithm for s in held} == {"grpo", "rloo", "dpo"}
    assert {s.config.world for s in held} == {"lpt", "m2rl"}
    assert {s.config.lora_rank is None for s in held} == {True, False}
    assert {s.config.hidden for s in held} >= {64, 128}
    assert {8, 32, 128} <= {2 ** round(np.log2(s.tokens)) for s in held}
    assert any(max(s.lengths) >= 3 * s.nominal for s in held)
    seeds = [s.config.seed for s in SETUPS.values()]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("setup", [*SETUPS.values(), QUICK], ids=lambda s: s.name)
def test_every_set_up_keeps_what_is_measured(setup: Setup) -> None:
    assert setup.nominal in setup.lengths
    for seed in setup.training_seeds:
        config = setup.lab(seed)
        assert isinstance(config, LabConfig)
        assert config.rl_seed == seed
        assert {*config.keep_steps, *config.rl_steps.values()} == set(setup.kept(seed))
        assert set(setup.measured_lengths(seed)) <= set(setup.kept(seed))
    last = setup.training_seeds[-1]
    assert {setup.pilot_steps(n) for n in setup.lengths} <= set(setup.kept(last))
    assert all(setup.pilot_steps(n) < n for n in setup.lengths)
    training = setup.training(setup.nominal)
    assert training.steps == setup.nominal
    assert (training.adapter is None) == (setup.config.lora_rank is None)


def test_a_training_takes_as_many_responses_as_the_lab() -> None:
    for setup in SETUPS.values():
        pairs = setup.config.algorithm == "dpo"
        assert setup.training(10).rollouts_per_step == setup.config.rl_batch // (2 if pairs else 1)


def test_unknown_set_ups_are_refused() -> None:
    with pytest.raises(InputError, match="llama-grpo"):
        find(["lama-grpo"])
    with pytest.raises(InputError, match="development"):
        find(role="develop")


def test_first_responses() -> None:
    rows = [Sequence((1,), (i,), p, 0.0) for i, p in enumerate("aabbb")]
    assert [s.response for s in first_responses(Domain("d", tuple(rows)), 2).sequences] == [(0,), (1,), (2,), (3,)]


def test_end_to_end(study: Path) -> None:
    assert not list(study.rglob("*.part"))
    folder = study / "quick"
    table = pd.read_parquet(folder / "result" / "cells.parquet")
    matrices = 3  # the first seed at two lengths, the second at one
    assert len(table) == matrices * 16 * len(score.PREDICTORS)
    assert set(table["predictor"]) == set(score.PREDICTORS)
    assert np.isfinite(table[["predicted", "measured", "measured_stderr"]].to_numpy(float)).all()
    ours = table[table["predictor"].isin([*score.FORECASTS, *score.KNOWN])]
    assert ((ours["low"] <= ours["predicted"]) & (ours["predicted"] <= ours["high"])).all()
    known = score.per_setup(table[table["length"] == 4]).set_index("predictor")
    assert known.loc["second_order", "pearson"] > 0.8  # real updates, and cells far beyond noise even in this world
    updates = pd.read_parquet(folder / "result" / "updates.parquet")
    assert set(updates["tier"]) == set(TIERS)
    assert updates["cosine"].between(-1, 1).all()
    same_run = updates[(updates["training_seed"] == 2) & (updates["tier"] == "pilot")]["cosine"]
    assert same_run.mean() > updates[updates["tier"] == "gradient"]["cosine"].mean()
    costs = pd.read_parquet(folder / "result" / "costs.parquet")
    assert (costs[["training_cpu", "forecast_cpu"]] > 0).all(axis=None)
    assert set(costs["threads"]) == {1}
    ceiling = pd.read_parquet(folder / "result" / "ceiling.parquet")
    assert set(ceiling["kind"]) == {"seeds", "prompts"}


def test_measured_changes_are_those_of_the_recorded_rewards(study: Path) -> None:
    table = pd.read_parquet(study / "quick" / "result" / "cells.parquet")
    records = study / "quick" / "records"
    row = table[(table["training_seed"] == 2) & (table["update"] == "qa") & (table["domain"] == "math")].iloc[0]
    after, before = (read_json(records / f"{n}.json")["rewards"]["math"] for n in ("measure_2_4_qa", "measure_base"))
    assert row["measured"] == pytest.approx(np.mean(after) - np.mean(before))
    assert row["base_reward"] == pytest.approx(np.mean(before))


def test_forecasts_and_measurements_do_not_share_responses(study: Path) -> None:
    data = study / "quick" / "lab" / "data"
    ids = {
        kind: {json.loads(line)["prompt_id"] for line in (data / f"qa_{kind}.jsonl").read_text().splitlines()}
        for kind in ("forecast", "evaluation")
    }
    assert all("train" in i for i in ids["forecast"])
    assert all("heldout" in i for i in ids["evaluation"])


def test_finished_stages_are_reused_and_a_lost_one_is_made_again(study: Path) -> None:
    said: list[str] = []
    path = study / "quick" / "records" / "measure_1_4_code.json"
    before = read_json(path)["rewards"]
    path.unlink()
    run([QUICK], study, said.append)
    assert said == ["quick: measure_1_4_code"]
    assert read_json(path)["rewards"] == before


def test_orders_are_trained_one_after_another_and_forecast(study: Path) -> None:
    folder = study / "quick"
    table, each = (pd.read_csv(folder / f"{name}.csv") for name in ("orders", "order_cells"))
    assert tuple(table.columns) == ORDERS
    assert list(table["order"]) == ["math > code > qa > writing", "math > code > writing > qa"]
    assert np.isfinite(table[["predicted", "measured"]].to_numpy(float)).all()
    assert (table[["predicted_stderr", "measured_stderr"]] > 0).all(axis=None)
    assert (table["behind"].min(), set(table["length"])) == (0, {2})
    assert table["behind"].max() == pytest.approx(np.ptp(table["measured"]))
    averages = each.groupby("order")[["predicted", "measured"]].mean()
    assert averages.to_numpy() == pytest.approx(
        table.set_index("order").loc[averages.index, ["predicted", "measured"]].to_numpy()
    )
    after, before = (
        read_json(folder / "records" / f"{n}.json")["rewards"]
        for n in ("orders_measure_math_code_qa_writing", "measure_base")
    )
    changes = [np.mean(after[d]) - np.mean(before[d]) for d in QUICK.domains]
    assert table["measured"].iloc[0] == pytest.approx(np.mean(changes))
    assert (folder / "orders" / "math_code" / "base").resolve() == folder / "orders" / "math" / "rl_math"
    weights = {
        name: load_file(folder / name / "model.safetensors")["lm_head.weight"]
        for name in ("lab/base", "orders/math/rl_math", "orders/math_code/rl_code", "seed1/rl_math_step2")
    }
    base, math, code, same = weights.values()
    torch.testing.assert_close(
        math, same, rtol=0, atol=0
    )  # the first stage is the training of that seed, as far as it goes
    reach = QUICK.order_steps * QUICK.config.rl_learning_rate  # as far as Adam moves a weight in one stage
    assert (math - base).abs().max() == pytest.approx(reach, rel=0.01)
    assert (code - math).abs().max() == pytest.approx(reach, rel=0.01)
    assert (code - base).abs().max() > 1.5 * reach  # from where the first stage ended
    with pytest.raises(InputError, match="steps"):
        check_plan(Work(dataclasses.replace(QUICK, order_steps=3), folder))


def test_other_settings_are_refused(study: Path) -> None:
    with pytest.raises(InputError, match="samples"):
        run([dataclasses.replace(QUICK, samples=5)], study)


def test_a_set_up_that_cannot_go_on_is_reported_and_left(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study / "quick", tmp_path / "quick", symlinks=True)
    for path in (tmp_path / "quick" / "records").glob("forecast_*.json"):
        path.unlink()
    shutil.rmtree(tmp_path / "quick" / "result")
    data = tmp_path / "quick" / "lab" / "data" / "math_forecast.jsonl"
    data.write_text(data.read_text().replace('"reward": 1.0', '"reward": 0.0'))
    assert run([QUICK], tmp_path) == []
    assert "math" in read_json(tmp_path / "quick" / "stopped.json")["error"]
    with pytest.raises(InputError, match="no finished set-up"):
        write_results(tmp_path, tmp_path / "results", names=["quick"], role=None, command="")


def test_results_and_figures(study: Path, tmp_path: Path) -> None:
    tables = write_results(study, tmp_path, names=["quick"], role=None, command="a command")
    record = read_json(tmp_path / "study.json")
    assert record["command"] == "a command"
    assert record["seeds"] == {"quick": [1, 2]}
    for name, table in tables.items():
        assert len(pd.read_csv(tmp_path / f"{name}.csv")) == len(table)
    assert len(tables["thresholds"]) == len(THRESHOLDS)
    met = tables["thresholds"].query("where == 'orders'").iloc[0]
    assert met["value"] == tables["picks"].query("kind == 'order'")["regret"].item()
    for name, figure in forecast_study_pages(tables).items():
        assert all(path.stat().st_size > 0 for path in figures.save(figure, tmp_path, name))


def test_thresholds_are_of_held_out_cells_alone() -> None:
    held, other = cells(3, virtual=0.0), cells(3, seed=1, virtual=float("nan")).assign(role="development")
    other["setup"] += "d"
    empty = pd.DataFrame({c: [] for c in ("role", "setup", "length", "tier", "cosine", "length_ratio", "share_cpu")})
    found = {"cells": pd.concat([held, other], ignore_index=True), "updates": empty, "costs": empty, "ceiling": empty}
    table = tables_of(found)["thresholds"].set_index(["role", "predictor", "metric"])
    assert "orders" not in set(table["where"]), "none were measured"
    assert table.loc[("heldout", "virtual", "spearman"), "met"].all()
    assert not table.loc[("development", "virtual", "spearman"), "met"].any()
