"""A set-up's tidy tables, from the records of its stages."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from interference import records
from interference.statistics import correlation
from paper_repro.forecast_study import mixes, orders
from paper_repro.forecast_study.predictions import TIERS
from paper_repro.forecast_study.trainings import measured
from paper_repro.forecast_study.work import Work, plain

TABLES = ("cells", "updates", "costs", "ceiling")


def write(work: Work) -> None:
    """`result/<table>.parquet` for every table, and `result/result.json` with all of them and what made them."""
    found = {
        "cells": pd.DataFrame(cells(work)),
        "updates": pd.DataFrame(updates(work)),
        "costs": pd.DataFrame(costs(work)),
        "ceiling": pd.DataFrame(ceiling(work)),
    }
    folder = work.folder / "result"
    for name, table in found.items():
        records.write_table(folder / f"{name}.parquet", table)
    tables = {name: plain(table.to_dict(orient="records")) for name, table in found.items()}
    made = {"setup": work.setup.settings(), "role": work.setup.role, **records.provenance()}
    records.write_json(folder / "result.json", {**plain(made), **tables})


def _about(work: Work, training_seed: int, length: int) -> dict[str, Any]:
    """What all rows of one measured matrix share."""
    setup, config = work.setup, work.setup.config
    return {
        "setup": setup.name, "role": setup.role, "world": config.world, "family": config.family,
        "hidden": config.hidden, "algorithm": config.algorithm, "lora": config.lora_rank is not None,
        "tokens": setup.tokens, "training_seed": training_seed, "length": length, "nominal": length == setup.nominal,
    }  # fmt: skip


def _matrices(work: Work) -> Iterator[tuple[int, int]]:
    for seed in work.setup.training_seeds:
        for length in work.setup.measured_lengths(seed):
            yield seed, length


def cells(work: Work) -> Iterator[dict[str, Any]]:
    """One row per measured cell and predictor.

    predicted, low, high (90 %; forecasts and known updates); measured, measured_stderr (over prompts); error_stderr, of
    predicted - measured (paired by prompts for known updates, else as if independent); ess, agreement: what warned beforehand.
    Baselines have no unit and, as yet, no orientation (`score.oriented`).
    """
    done = work.finished()
    for seed, length in _matrices(work):
        about, rows = _about(work, seed, length), _predicted(done, seed, length)
        known = done[f"known_{seed}_{length}"]
        for update in work.setup.domains:
            for domain in work.setup.domains:
                was = measured(work, seed, update, domain, length)
                shared = {"update": update, "domain": domain, "own": update == domain, "measured": was.delta}
                shared |= {"measured_stderr": was.stderr, "base_reward": was.base}
                for row in rows[update, domain]:
                    error = row.get("error_stderr")
                    error = float(np.hypot(row["stderr"], was.stderr)) if error is None else error
                    kept = {k: row[k] for k in ("kind", "predictor", "predicted", "low", "high", "ess")}
                    yield {**about, **shared, **kept, "agreement": row.get("agreement"), "error_stderr": error}
                for predictor, value in _baselines(done, known, update, domain).items():
                    yield {**about, **shared, "kind": "baseline", "predictor": predictor, "predicted": value}


def _predicted(done: dict[str, Any], seed: int, length: int) -> dict[tuple[str, str], list[dict[str, Any]]]:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for tier in TIERS:
        for row in done[f"forecast_{tier}_{length}"]["cells"]:
            found.setdefault((row["update"], row["domain"]), []).append({**row, "kind": "forecast", "predictor": tier})
    for row in done[f"known_{seed}_{length}"]["rows"]:
        found[row["update"], row["domain"]].append({**row, "kind": "known"})
    return found


def _baselines(done: dict[str, Any], known: dict[str, Any], update: str, domain: str) -> dict[str, float]:
    return {
        "update_norm": known["norms"][update],
        "update_cosine": known["cosines"][update][domain],
        "gradient_cosine": done["gradient_cosines"]["cosines"][update][domain],
        "subspace_overlap": known["overlaps"][update][domain],
        "kl": known["kl"][update][domain],
    }


def updates(work: Work) -> Iterator[dict[str, Any]]:
    """One row per forecast update and real one: cosine, ratio of lengths, and what was known of the forecast beforehand."""
    done = work.finished()
    for seed, length in _matrices(work):
        for row in done[f"compare_{seed}_{length}"]["rows"]:
            said = done[f"forecast_{row['tier']}_{length}"]["updates"][row["update"]]
            yield {**_about(work, seed, length), **row, **said}


def costs(work: Work) -> Iterator[dict[str, Any]]:
    """One row per length and tier, in seconds: the forecast of all domains, and the trainings that it forecasts.

    training_*: the mean over training seeds of the steps' own time, in proportion to the length.  pilot_*: the pilots' steps.
    rollouts_*: sampling the base's rollouts, which trainings need for themselves and forecasts once.
    Tier "orders": the trainings of all prefixes of orders, and the forecast of the orders (`orders.cost`); "mixtures" alike.
    """
    done, setup = work.finished(), work.setup
    for length in setup.lengths:
        for tier in TIERS:
            forecast = done[f"forecast_{tier}_{length}"]
            row: dict[str, Any] = {"setup": setup.name, "role": setup.role, "length": length, "tier": tier}
            row["threads"] = forecast["threads"]
            for clock, recorded in (("wall", "training_seconds"), ("cpu", "training_cpu_seconds")):
                per_step = _seconds_per_step(work, done, recorded)
                sampling = [done[f"rollouts_{kind}_{d}"] for kind in ("forecast", "evaluation") for d in setup.domains]
                row[f"training_{clock}"] = per_step * length
                row[f"pilot_{clock}"] = per_step * forecast["pilot_steps"]
                row[f"forecast_{clock}"] = forecast[f"forecast_{clock}"]
                row[f"rollouts_{clock}"] = sum(s[f"{clock}_seconds"] for s in sampling)
                row[f"share_{clock}"] = (row[f"forecast_{clock}"] + row[f"pilot_{clock}"]) / row[f"training_{clock}"]
            yield row
    if setup.order_steps:
        yield orders.cost(work)
    if setup.mixed:
        yield mixes.cost(work)


def _seconds_per_step(work: Work, done: dict[str, Any], recorded: str) -> float:
    """Of one step on every domain, over all that was trained."""
    seeds, domains = work.setup.training_seeds, work.setup.domains
    seconds = sum(done[f"train_{seed}_{domain}"][recorded] for seed in seeds for domain in domains)
    return float(seconds) / sum(work.setup.kept(seed)[-1] for seed in seeds)


def ceiling(work: Work) -> Iterator[dict[str, Any]]:
    """What the measurement itself allows, off the diagonal.

    kind "seeds": correlation of two training seeds' measured matrices. "prompts": mean correlation of a measured matrix with
    itself under resampled prompts.
    """
    off = [(u, d) for u in work.setup.domains for d in work.setup.domains if u != d]
    for length in work.setup.lengths:
        seeds = [s for s in work.setup.training_seeds if length in work.setup.measured_lengths(s)]
        found = {s: [measured(work, s, u, d, length) for u, d in off] for s in seeds}
        values = {s: np.array([m.delta for m in found[s]]) for s in seeds}
        for a, b in combinations(seeds, 2):
            yield _ceiling_row(work, length, "seeds", f"{a} {b}", [(values[a], values[b])])
        for s in seeds:
            drawn = np.stack([m.replicates for m in found[s]], axis=1)[:200]
            yield _ceiling_row(work, length, "prompts", str(s), [(values[s], draw) for draw in drawn])


def _ceiling_row(work: Work, length: int, kind: str, seeds: str, pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"setup": work.setup.name, "role": work.setup.role, "length": length}
    row |= {"nominal": length == work.setup.nominal, "kind": kind, "seeds": seeds}
    for name, measure in (("spearman", stats.spearmanr), ("pearson", stats.pearsonr)):
        row[name] = float(np.mean([correlation(measure, x, y) for x, y in pairs]))
    return row
