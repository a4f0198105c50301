"""Synthetic test input: the records of a probe run about routes with made-up numbers, for mechanical tests of figures, report
and analysis only. Nothing drawn from these is shipped, and no claim rests on them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from interference.probes.routes import Routes, route_overlap
from interference.records import PROBES

MODULES = ("embedding", "norm", "q", "k", "v", "o", "gate", "up", "down", "head")
SHAPES: dict[str, dict[str, Any]] = {
    "four": {},
    "one": {"domains": ("math",)},
    "two": {"domains": ("math", "code")},
    "six": {"domains": tuple(f"a rather long domain name, number {k}" for k in range(6))},
    "deep": {"domains": ("math", "code", "qa"), "layers": 36},
    "experts": {"domains": ("math", "code", "qa"), "kinds": {"channel": 40, "expert channel": 160, "head": 8}},
    "odd names": {"domains": ('<b>bold & "quoted"</b>', "$x_1$ url(#a) id='b'", "ordinary")},
    "holes": {"domains": ("math", "code", "qa"), "holes": True},
}

Rows = list[dict[str, Any]]


def make_routes(
    folder: Path,
    domains: Sequence[str] = ("math", "code", "qa", "writing"),
    layers: int = 3,
    kinds: dict[str, int] | None = None,
    holes: bool = False,
) -> Path:
    """Write a run directory; `holes` leaves out the gradients and what is shared by a pair."""
    rng = np.random.default_rng(0)
    kinds = kinds or {"channel": 40, "head": 8}
    tables = {
        "route_overlap": _overlaps(rng, domains, layers, kinds),
        "route_direction": _directions(rng, domains, layers, kinds, holes),
        "gradient_agreement": pd.DataFrame() if holes else _gradients(rng, domains, layers),
    }
    (folder / "tables").mkdir(parents=True)
    for name, table in tables.items():
        table.reindex(columns=list(PROBES[name])).to_parquet(folder / "tables" / f"probe_{name}.parquet", index=False)
    _records(folder, domains)
    return folder


def _overlaps(rng: Any, domains: Sequence[str], layers: int, kinds: dict[str, int]) -> pd.DataFrame:
    """Of scores that all domains share in part: half of each is their own, and 1 % the noise of a half of the prompts."""
    units = [(kind, layer) for layer in range(layers) for kind, many in kinds.items() for _ in range(many)]
    labels = pd.DataFrame(units, columns=["kind", "layer"]).assign(unit=range(len(units)))
    parts = []
    for model in ("base", *domains):
        common = rng.random(len(units))
        scores = np.stack([common + rng.random(len(units)) for _ in domains])
        routes = {}
        for name, score in zip(domains, scores, strict=True):
            halves = {half: score + 0.01 * rng.random(len(units)) for half in ("first_half", "second_half")}
            routes[name] = Routes(name, "magnitude", labels.assign(score=score, **halves), 2, 9)
        parts.append(route_overlap(routes).assign(model=model))
    return pd.concat(parts, ignore_index=True)


def _directions(rng: Any, domains: Sequence[str], layers: int, kinds: dict[str, int], holes: bool) -> pd.DataFrame:
    rows: Rows = []
    for place, (a, b) in enumerate(combinations(domains, 2)):
        for top in (0.05, 0.1, 0.2):
            for kind, many in kinds.items():
                for layer in range(-1, layers):
                    row = {
                        "a": a,
                        "b": b,
                        "kind": kind,
                        "top": top,
                        "layer": layer,
                        "units": many,
                        "share": top,
                        "count": 3,
                    }
                    value = rng.uniform(-0.4, 0.4)
                    row |= {
                        "cosine": value,
                        "cosine_chance": 0.05,
                        "cosine_chance_low": -0.1,
                        "cosine_chance_high": 0.2,
                        "cosine_whole": 0.1,
                    }
                    row |= {
                        "sign_agreement": 0.5 + value / 3,
                        "sign_chance": 0.5,
                        "sign_chance_low": 0.45,
                        "sign_chance_high": 0.55,
                    }
                    if holes and place == 0:
                        row |= {
                            "count": 0,
                            "cosine": np.nan,
                            "sign_agreement": np.nan,
                            "cosine_chance_low": np.nan,
                            "cosine_chance_high": np.nan,
                        }
                    rows.append(row | {"sign_whole": 0.5})
            rows.append({"a": a, "b": b, "kind": "all", "top": top, "layer": -1, "cosine": 0.1, "sign_agreement": 0.52})
    return pd.DataFrame(rows, columns=list(PROBES["route_direction"]))


def _gradients(rng: Any, domains: Sequence[str], layers: int) -> pd.DataFrame:
    places = [("model", -1, "all"), *(("module", -1, m) for m in MODULES)]
    places += [("part", n, m) for n in range(layers) for m in MODULES[1:-1]]
    places += [("part", -1, m) for m in ("embedding", "head")]
    rows: Rows = []
    for a, b in combinations(domains, 2):
        for scope, layer, module in places:
            value = 0.01 if scope == "model" else rng.uniform(-0.6, 0.6)
            row = {
                "objective": "reward",
                "a": a,
                "b": b,
                "scope": scope,
                "layer": layer,
                "module": module,
                "parameters": 9,
            }
            row |= {"cosine": value, "lowest": value - 0.05, "highest": value + 0.05, "split_a": 0.9, "split_b": 0.8}
            rows.append(row | {"noise": 0.05, "noise_floor": 0.1, "disattenuated": value / 0.72**0.5})
    return pd.DataFrame(rows, columns=list(PROBES["gradient_agreement"]))


def _records(folder: Path, domains: Sequence[str]) -> None:
    settings = {"seed": 0, "routes": {"variant": "magnitude", "tops": [0.05, 0.1, 0.2], "gradients": "reward"}}
    results = {"schema": 1, "command": "probe", "base": "base", "models": list(domains), "domains": list(domains)}
    results |= {"kinds": dict.fromkeys(domains, "expert"), "probes": ["routes"], "settings": settings, "templates": {}}
    results |= {"notes": ["a note <i>with</i> markup"], "cells": []}
    manifest = {
        **{"package": "interference", "version": "0", "command": "probe", "status": "finished", "seconds": 1.5},
        **{"git": None, "versions": {"python": "3"}, "device": "cpu", "dtype": "float32", "seed": 0},
        **{"fingerprints": {"base": "ab12", "models": dict.fromkeys(domains, "cd34")}, "notes": []},
    }
    models = [{"name": name, "model": f"rl_{k}", "kind": "expert"} for k, name in enumerate(domains)]
    config = {"base_model": "base", "models": models, "domains": [{"name": n, "data": "x.jsonl"} for n in domains]}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"output": str(folder)}))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "results.json").write_text(json.dumps(results))
