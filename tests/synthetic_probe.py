"""Synthetic test input: the records of a probe run with made-up numbers, for mechanical tests of figures and report only.

Nothing drawn from these is shipped, and no claim rests on them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from interference.records import PROBES

SHAPES: dict[str, dict[str, Any]] = {
    "four": {},
    "one": {"domains": ("math",), "others": ()},
    "two": {"domains": ("math", "code"), "others": ("mixed",)},
    "eight": {
        "domains": tuple(f"a rather long domain name, number {k}" for k in range(8)),
        "others": ("mixed", "merged"),
    },
    "odd names": {"domains": ('<b>bold & "quoted"</b>', "$x_1$ url(#a) id='b'"), "others": ("a_$b$ <i>mix</i>",)},
    "holes": {"domains": ("math", "code", "qa"), "holes": True},
}

Rows = list[dict[str, Any]]
METRICS = (
    "base_rate",
    "yes_rate",
    "accuracy",
    "balanced_accuracy",
    "tpr",
    "tnr",
    "auroc",
    "within_prompt_auroc",
    "brier",
    "calibration_gap",
)


def make_probe(
    folder: Path,
    domains: Sequence[str] = ("math", "code", "qa", "writing"),
    others: Sequence[str] = ("mixed", "merged"),
    holes: bool = False,
) -> Path:
    """Write a run directory with an expert for each domain; `holes` leaves out what may be missing and nulls what may be null."""
    rng = np.random.default_rng(0)
    models = [*domains, *others]
    tables: dict[str, Rows] = {name: [] for name in PROBES}
    for domain in domains:
        for model in ["base", *models]:
            _performance(rng, tables["performance"], model, domain)
            _kl(rng, tables["kl"], model, ["base", *models], domain)
            _judged(rng, tables, model, domain, holes=holes)
            _locus(rng, tables, model, domain, none=holes and model == "base")
        for model in models:
            _forecast(
                rng,
                tables["kl_forecast"],
                model,
                domain,
                reason="its weights are the base's" * (holes and model == "code"),
            )
        _skills(rng, tables, domain, domains, others, holes=holes)
        for reference in others:
            tables["neighbors"] += [_neighbor(rng, reference, domain, e) for e in domains if e != domain]
    (folder / "tables").mkdir(parents=True)
    for name, rows in tables.items():
        if rows and not (holes and name in ("horizon", "verification_changes")):
            frame = pd.DataFrame(rows)
            assert set(frame.columns) <= set(PROBES[name]), (name, set(frame.columns) - set(PROBES[name]))
            frame = frame.reindex(columns=list(PROBES[name]))
            if holes and name == "kl":
                frame = frame[frame["estimator"] != "exact"].assign(
                    change=np.nan, change_low=np.nan, change_high=np.nan
                )
            frame.to_parquet(folder / "tables" / f"probe_{name}.parquet", index=False)
    _records(folder, domains, others)
    return folder


def _records(folder: Path, domains: Sequence[str], others: Sequence[str]) -> None:
    kinds = {
        "base": "base",
        **dict.fromkeys(domains, "expert"),
        **{m: ("multi", "merged")[k % 2] for k, m in enumerate(others)},
    }
    models = list(kinds)[1:]
    results = {
        "schema": 1, "command": "probe", "base": "base", "models": models, "kinds": kinds, "domains": list(domains),
        "probes": ["neighborhoods", "skills", "self_verification", "locus"], "notes": ["a note <i>with</i> markup"],
        "settings": {"seed": 0, "judge": {"modes": ["outcome", "process"]}},
        "templates": {"outcome": "{prompt} {answer}", "process": [["user", "{prompt} {trajectory}"]]}, "cells": [],
    }  # fmt: skip
    manifest = {
        "package": "interference", "version": "0", "command": "probe", "status": "finished", "seconds": 1.5, "git": None,
        "versions": {"python": "3"}, "device": "cpu", "dtype": "float32", "seed": 0, "notes": [],
        "fingerprints": {"base": "ab12", "models": dict.fromkeys(models, "cd34")},
    }  # fmt: skip
    config = {
        "base_model": "base", "models": [{"name": m, "model": f"rl_{k}", "kind": kinds[m]} for k, m in enumerate(models)],
        "domains": [{"name": d, "prompts": "p.jsonl", "verifier": "v:f"} for d in domains], "output": str(folder),
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results, allow_nan=False))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def _around(value: float, half: float, prefix: str = "") -> dict[str, float]:
    return {f"{prefix}low": value - half, f"{prefix}high": value + half}


def change_of(model: str, domain: str) -> float:
    """What a model gains on a domain in these records."""
    return 0.0 if model == "base" else 0.3 if model == domain else -0.05 if len(model) % 2 else 0.1


def _performance(rng: np.random.Generator, rows: Rows, model: str, domain: str) -> None:
    value = 0.4 + change_of(model, domain)
    row = {
        "model": model,
        "domain": domain,
        "value": value,
        "stderr": 0.02,
        **_around(value, 0.03),
        "prompts": 50,
        "sequences": 400,
    }
    if model != "base":
        row |= {"change": change_of(model, domain), **_around(change_of(model, domain), 0.04, "change_")}
    rows.append(row)


def _kl(rng: np.random.Generator, rows: Rows, policy: str, names: Sequence[str], domain: str) -> None:
    for reference in names:
        if reference == policy:
            continue
        value = 0.0004 if policy == "qa" else float(rng.uniform(0.005, 0.3))
        for estimator in ("k1", "k3", "exact"):
            error = value if policy == "qa" and estimator == "k1" else 0.1 * value
            for per, scale in (("token", 1.0), ("sequence", 12.0)):
                row = {"policy": policy, "reference": reference, "domain": domain, "estimator": estimator, "per": per}
                row |= {"value": scale * value, "stderr": scale * error, "prompts": 50, "sequences": 400}
                row |= _around(scale * value, 1.6 * scale * error)
                if policy != "base":
                    change = change_of(policy, domain)
                    row |= {"change": change, "change_stderr": 0.02, **_around(change, 0.03, "change_")}
                rows.append(row)


def _forecast(rng: np.random.Generator, rows: Rows, model: str, domain: str, reason: str) -> None:
    row: dict[str, Any] = {"policy": "base", "reference": model, "domain": domain, "reason": reason}
    if not reason:
        measured = 0.2 if model == domain else 0.01
        ratio = float(rng.uniform(0.7, 1.1))
        row |= {"forecast": ratio * measured, "stderr": 0.05 * measured, "measured": measured, "ratio": ratio}
        row |= _around(measured, 0.08 * measured) | _around(ratio, 0.03, "ratio_")
    rows.append(row)


def _neighbor(rng: np.random.Generator, reference: str, domain: str, expert: str) -> dict[str, Any]:
    difference = float(rng.uniform(-0.1, 0.1))
    change = change_of(expert, domain)
    return {
        "reference": reference, "domain": domain, "expert": expert, "kl": 0.2 + difference, "eps": 0.2, "difference": difference,
        "stderr": 0.02, **_around(difference, 0.03), "neighbor": difference < 0, "certain": abs(difference) > 0.03,
        "prompts": 50, "change": change, **_around(change, 0.03, "change_"),
    }  # fmt: skip


def _skills(
    rng: np.random.Generator,
    tables: dict[str, Rows],
    domain: str,
    experts: Sequence[str],
    others: Sequence[str],
    holes: bool,
) -> None:
    null = {"null": 0.05, "null_low": 0.04, "null_high": 0.06}
    tables["gains"].append(
        {"domain": domain, "model": "base", "role": "split", "gain": 0.05, **null, "beyond_null": False}
    )
    for model in (*experts, *others):
        gain = max(change_of(model, domain), 0.0) + 0.05
        row = {
            "domain": domain,
            "model": model,
            "role": "expert" if model in experts else "other",
            "gain": gain,
            "stderr": 0.01,
        }
        row |= {**_around(gain, 0.02), **null, "beyond_null": gain > 0.06, "items": 12, "items_null": 2.5}
        tables["gains"].append(row | ({"share": 0.3, "share_null": 0.25} if model in experts else {}))
        tables["items"] += [
            {"domain": domain, "item": f"p{k}", "model": model, "rate": 0.5, "gain": gain} for k in range(3)
        ]
    for k, model in enumerate(others):
        value = float("nan") if holes and k == 0 else float(rng.uniform(0.3, 0.95))
        row = {
            "domain": domain,
            "model": model,
            "consistency": value,
            **_around(value, 0.08),
            "beyond_null": value > 0.5,
        }
        row |= {"null": 0.4, "null_low": 0.3, "null_high": 0.5}
        row |= {"independent": 0.6, "independent_low": 0.5, "independent_high": 0.7, "beyond_independent": value > 0.7}
        if not (holes and k == 1):
            row |= {"skill_cosine": value, "retained": 0.8 * value}
            row |= _around(value, 0.1, "skill_cosine_") | _around(0.8 * value, 0.1, "retained_")
        tables["consistency"].append(row)
    tables["shared"] += [
        {"domain": domain, "experts": k, "items": 10 - k, "items_null": 5.5} for k in range(len(experts) + 1)
    ]


def score_of(model: str, domain: str, mode: str) -> float:
    """A judge's balanced accuracy in these records: the base judges by chance, an expert its own domain's reasoning best."""
    return 0.5 if model == "base" else (0.9 if model == domain else 0.7) - 0.15 * (mode == "outcome")


def _judged(rng: np.random.Generator, tables: dict[str, Rows], model: str, domain: str, holes: bool) -> None:
    counts = {"trajectories": 400, "prompts": 50, "unparsable": 0.0}
    silent = holes and domain == "qa"
    for mode in ("outcome", "process"):
        for metric in METRICS:
            value = float("nan") if silent else score_of(model, domain, mode)
            row = {
                "model": model,
                "domain": domain,
                "mode": mode,
                "metric": metric,
                "value": value,
                "stderr": 0.02,
                "chance": 0.5,
            }
            row |= _around(value, 0.04) | counts | {"reason": "all 400 trajectories are correct" * silent, "mass": 0.9}
            tables["verification"].append(row)
    change = {
        "model": model,
        "domain": domain,
        "metric": "balanced_accuracy",
        "before": 0.5,
        "after": 0.6,
        "difference": 0.1,
    }
    change |= {"stderr": 0.02, **_around(0.1, 0.03), "excludes_zero": True, "reason": ""}
    tables["verification_changes"].append({"comparison": "process - outcome", "mode": "both", **change})
    if model != "base":
        tables["verification_changes"].append({"comparison": "model - base", "mode": "process", **change})
    for share in (0.0, 0.5, 1.0):
        value = 0.5 + share * (score_of(model, domain, "process") - 0.5)
        row = {
            "model": model,
            "domain": domain,
            "mode": "process",
            "unit": "fraction",
            "horizon": share,
            "metric": "auroc",
        }
        row |= {
            "value": value,
            "stderr": 0.02,
            **_around(value, 0.04),
            "chance": 0.5,
            "mean_tokens": 20 * share,
            "complete": share,
        }
        row |= {"reason": "", **counts, "to_longest": 0.1, **_around(0.1, 0.02, "to_longest_")}
        row |= {"from_prompt": value - 0.5, **_around(value - 0.5, 0.03 * share, "from_prompt_")}
        tables["horizon"].append(row)


def _locus(rng: np.random.Generator, tables: dict[str, Rows], model: str, domain: str, none: bool) -> None:
    if none:
        return
    source = "planted" if domain == "math" else "rollouts"
    for k in range(30):
        truth = int(rng.integers(1, 6))
        seen = float("nan") if k % 7 == 0 else float(truth if k % 3 else min(truth + 1, 5))
        known = source == "planted" or k % 5
        row = {"model": model, "domain": domain, "source": source, "prompt_id": f"p{k}", "steps": 5, "locus": seen}
        ends = {"step": truth, "step_low": truth, "step_high": truth, "no_fall": 0.0} if known else {"no_fall": 0.8}
        tables["locus"].append(row | ends)
    for metric in ("located", "exact", "within_1", "distance", "difference"):
        row = {"model": model, "domain": domain, "source": source, "metric": metric, "value": 0.6, **_around(0.6, 0.1)}
        row |= {
            "chance": float("nan") if metric == "located" else 0.2,
            "above_chance": 0.4,
            "above_low": 0.3,
            "above_high": 0.5,
        }
        tables["locus_agreement"].append(row | {"constant": 0.25, "trajectories": 30})
