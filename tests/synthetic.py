"""Synthetic test input: records of the right shape with made-up numbers, for mechanical tests of figures and report only.

Nothing drawn from these is shipped, and no claim rests on them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import synthetic_parts
import yaml

ALPHAS = (0.25, 0.5, 1.0, 1.5)
INFO = {
    "nll": {"unit": "nats per response token", "better": "lower"},
    "reward": {"unit": "reward per prompt", "better": "higher"},
}
PREDICTED = {
    "third_order": "predicted_third",
    "second_order": "predicted_second",
    "second_order_ggn": "predicted_second_ggn",
    "first_order": "predicted_first",
}
SHAPES: dict[str, dict[str, Any]] = {
    "four": {"updates": ("math", "code", "qa", "writing")},
    "one": {"updates": ("math",)},
    "eight": {"updates": tuple(f"a rather long domain name, number {k}" for k in range(8)), "objectives": ("nll",)},
    "wide": {"updates": ("math",), "domains": tuple(f"domain {k}" for k in range(7)), "objectives": ("nll",)},
    "rectangle": {
        **{"updates": ("math", "code"), "domains": ("qa", "essays", "facts")},
        **{"objectives": ("nll",), "experts": 3},
    },
    "deep": {
        "updates": ("math", "code"),
        "domains": ("math", "code", "qa", "writing"),
        "objectives": ("nll",),
        "layers": 36,
    },
    "unmeasured": {"updates": ("math", "code"), "measured": False},
    "odd names": {"updates": ('<b>bold & "quoted"</b>', "$x_1$ url(#a) id='b'"), "objectives": ("reward",)},
    "holes": {"updates": ("math", "code", "qa"), "holes": True, "objectives": ("reward",)},
}


def make_run(
    folder: Path,
    updates: Sequence[str] = ("math", "code", "qa", "writing"),
    domains: Sequence[str] | None = None,
    objectives: Sequence[str] = ("nll", "reward"),
    measured: bool = True,
    holes: bool = False,
    error: float = 0.0,
    layers: int = 3,
    experts: int = 0,
) -> Path:
    """Write a run directory. `holes` nulls what may be null; `error` spoils the predictions; no `layers`: nothing is split."""
    rng = np.random.default_rng(0)
    names = tuple(domains or updates)
    pairs = [(o, u, d) for o in objectives for u in updates for d in names]
    made = [_cell(rng, *pair, measured=measured, error=error) for pair in pairs]
    cells, curves = [cell for cell, _ in made], [row for _, rows in made for row in rows]
    if holes:
        _punch(cells, curves)
    cards = {o: _cards([c for c in cells if c["objective"] == o]) for o in objectives} if measured else {}
    parts = synthetic_parts.split(cells[::2] if holes else cells, layers, experts) if layers else {}
    results = {
        "schema": 1,
        "command": "diagnose",
        "objectives": {o: INFO[o] for o in objectives},
        "updates": list(updates),
        "domains": list(names),
        "cells": cells,
        "scorecards": cards,
        "notes": ["a note <i>with</i> markup"],
        **({"attribution": parts["attribution"]} if parts else {}),
    }
    manifest = {
        "package": "interference",
        "version": "0",
        "command": "diagnose",
        "status": "finished",
        "started": None,
        "finished": None,
        "seconds": 1.5,
        "git": None,
        "versions": {"python": "3"},
        "device": "cpu",
        "dtype": "float32",
        "seed": 0,
        "engine": "taylor",
        "fingerprints": {"base": "ab12", "models": dict.fromkeys(updates, "cd34")},
        "fallbacks": [{"what": "an operation", "why": "it has no rule"}],
        "notes": [],
    }
    config = {
        "base_model": "base",
        "models": [{"name": u, "model": f"rl_{k}"} for k, u in enumerate(updates)],
        "domains": [{"name": d, "data": f"{k}.jsonl", "prompts": None, "verifier": None} for k, d in enumerate(names)],
        "objective": list(objectives),
        "seed": 0,
        "output": str(folder),
    }
    (folder / "tables").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results, allow_nan=False))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    pd.DataFrame(curves).to_parquet(folder / "tables" / "curves.parquet")
    if parts:
        synthetic_parts.write(folder, parts)
    return folder


def _cell(
    rng: np.random.Generator, objective: str, update: str, domain: str, *, measured: bool, error: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    better = 1 if INFO[objective]["better"] == "higher" else -1
    own, weighted, se = update == domain, objective == "reward", 0.01
    slope = better * 0.35 if own else float(rng.normal(0, 0.08))
    bend, cubic = float(rng.normal(0, 0.05)), float(rng.normal(0, 0.01))

    def truth(a: float) -> float:
        return slope * a + 0.5 * bend * a * a + cubic * a**3

    change = truth(1.0) + float(rng.normal(0, error))
    second = slope + 0.5 * bend
    cell: dict[str, Any] = {
        **{"objective": objective, "update": update, "domain": domain, "own": own},
        **{"prompts": 64, "sequences": 512 if weighted else 64, "before": 0.5, "after": 0.5 + change},
        **{"measured": change, "measured_stderr": se, "detectable": abs(change) > 1.645 * se},
        **{"predicted_first": slope, "predicted_second": second, "predicted_second_ggn": slope + 0.4 * bend},
        **{"stderr": se, "stderr_first": se, "stderr_ggn": se, "low": second - 0.0165, "high": second + 0.0165},
        **{"residual_stderr": se, "residual_low": change - second - 0.02, "residual_high": change - second + 0.02},
        **{"estimate": change if weighted else None, "estimate_stderr": se if weighted else None},
        **{"ess": 200.0 if weighted else None, "update_norm": 2.0, "update_cosine": 1.0 if own else 0.1},
        **{"gradient_cosine": float(np.clip(slope, -1, 1)), "kl": 0.02},
    }
    left, beyond = abs(cubic) > 0.1 * abs(change), abs(cubic) > 0.1 * abs(change)
    cell |= {
        **{
            "third": 0.9 * cubic,
            "third_stderr": 0.001,
            "third_misfit": 0.001,
            "fourth": 0.1 * cubic,
            "fourth_stderr": 0.001,
        },
        **{"truncation": cubic, "truncation_stderr": 0.001, "truncation_misfit": 0.1 * abs(cubic)},
        **{"remainder": cubic, "remainder_stderr": 0.001, "predicted_third": second + cubic},
        **{"low_total": cell["low"] - abs(cubic), "high_total": cell["high"] + abs(cubic)},
        **{"residual_low_total": cell["residual_low"] - 0.01, "residual_high_total": cell["residual_high"] + 0.01},
        **{"radius": 0.8 if left else 1.5, "radius_reason": "left" if left else "held", "radius_judged": 1.5},
        "beyond_radius": beyond,
    }
    if not measured:
        gone = (
            "after",
            "measured",
            "measured_stderr",
            "detectable",
            "residual_stderr",
            "residual_low",
            "residual_high",
            "residual_low_total",
            "residual_high_total",
        )
        cell |= dict.fromkeys(gone)
    rows = [
        {
            **{"objective": objective, "update": update, "domain": domain, "alpha": a},
            **{"measured": truth(a), "measured_stderr": se * a, "ess": 512 * np.exp(-2 * a) if weighted else np.nan},
            "low_ess": bool(weighted and np.exp(-2 * a) < 0.1),
            "kind": "importance-weighted estimate" if weighted else "measured",
            **{"predicted_first": slope * a, "predicted_second": slope * a + 0.5 * bend * a * a},
            **{"predicted_second_ggn": slope * a + 0.4 * bend * a * a, "stderr": se * a},
        }
        for a in ALPHAS
    ]
    return cell, rows


def _punch(cells: list[dict[str, Any]], curves: list[dict[str, Any]]) -> None:
    for k, cell in enumerate(cells):
        if k % 3 == 1:
            cell |= dict.fromkeys(
                ("measured", "measured_stderr", "after", "detectable", "residual_stderr", "ess", "kl")
            )
        if k % 4 == 2:
            cell |= dict.fromkeys(
                ("stderr", "low", "high", "predicted_first", "predicted_second_ggn", "gradient_cosine")
            )
    for row in curves[::5]:
        row |= {"measured": np.nan, "measured_stderr": np.nan}


def _cards(cells: list[dict[str, Any]]) -> dict[str, Any]:
    off = [c for c in cells if not c["own"]]
    return {"all": _card(cells)} | ({"off_diagonal": _card(off)} if off else {})


def _card(cells: list[dict[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    seen = [c for c in cells if c["measured"] is not None]
    for name in (*PREDICTED, "update_norm", "update_cosine", "gradient_cosine", "kl"):
        column = PREDICTED.get(name, name)
        known = [c for c in seen if c[column] is not None]
        x, y = np.array([c[column] for c in known]), np.array([c["measured"] for c in known])
        varied = len(known) > 2 and np.ptp(x) > 0
        ranks = [np.argsort(np.argsort(v)) for v in (x, y)]
        rho = float(np.corrcoef(*ranks)[0, 1]) if varied else None
        slope, intercept = (float(v) for v in np.polyfit(x, y, 1)) if varied else (None, None)
        out[name] = {
            **{"spearman": rho, "pearson": float(np.corrcoef(x, y)[0, 1]) if varied else None},
            **{
                "spearman_low": None if rho is None else rho - 0.1,
                "spearman_high": None if rho is None else min(1, rho + 0.1),
            },
            **{"sign_accuracy": float(np.mean(np.sign(x) == np.sign(y))) if varied else None},
            **{"slope": slope, "intercept": intercept, "r2": -7.5 if name == "kl" else 0.9, "coverage": 0.9},
            **{"cells": len(known), "cells_detectable": sum(bool(c["detectable"]) for c in known)},
            **{
                "coverage_truncation": 0.95 if name in ("second_order", "third_order") else None,
                "calibrated": name not in PREDICTED,
            },
        }
    return out
