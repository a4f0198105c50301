"""Synthetic test input: the records of a geometry run with made-up numbers, for mechanical tests of figures and report only.

Nothing drawn from these is shipped, and no claim rests on them.
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

from interference.records import GEOMETRY

MODULES = {
    "q": (64, 48),
    "k": (32, 48),
    "v": (32, 48),
    "o": (48, 64),
    "gate": (96, 48),
    "up": (96, 48),
    "down": (48, 96),
}
OUTSIDE = {"embedding": (200, 48), "head": (200, 48)}
RULES = ("relative", "absolute", "lpt", "bf16")
SHAPES: dict[str, dict[str, Any]] = {
    "four": {},
    "one": {"models": ("math",)},
    "two": {"models": ("math", "code")},
    "eight": {"models": tuple(f"a rather long domain name, number {k}" for k in range(8))},
    "deep": {"models": ("math", "code", "qa"), "layers": 36},
    "odd names": {"models": ('<b>bold & "quoted"</b>', "$x_1$ url(#a) id='b'", "ordinary")},
    "holes": {"models": ("math", "code", "qa"), "holes": True},
}

Rows = list[dict[str, Any]]
Place = dict[str, Any]


def make_geometry(
    folder: Path, models: Sequence[str] = ("math", "code", "qa", "writing"), layers: int = 3, holes: bool = False
) -> Path:
    """Write a run directory; `holes` leaves out whole tables and nulls what may be null."""
    rng = np.random.default_rng(0)
    tables: dict[str, Rows] = {name: [] for name in GEOMETRY}
    tensors = _tensors(layers)
    pairs = list(combinations(models, 2))
    for k, model in enumerate(models):
        _of_model(rng, tables, model, tensors, density=0.1 + 0.08 * k)
    for k, pair in enumerate(pairs):
        _of_pair(rng, tables, *pair, tensors, shared=k % 3 != 2)
    _consensus(tables, len(models), tensors)
    tables["audits"] = [
        _audit(models[0], "frozen", "warning", tensors[0]["tensor"], "unchanged <i>though</i> it was to be trained"),
        _audit(models[-1], "dtype", "note", "", "stored in bfloat16"),
    ]
    (folder / "tables").mkdir(parents=True)
    for name, rows in tables.items():
        if rows and not (holes and name in ("neuron_overlap", "angles", "audits")):
            frame = pd.DataFrame(rows, columns=list(GEOMETRY[name]))
            if holes and name in ("masks", "cosines", "subspaces"):
                gone = (
                    ["low", "high", "chance_stratified"] if name != "cosines" else ["projected_mean", "projected_std"]
                )
                frame[[c for c in gone if c in frame]] = np.nan
            frame.to_parquet(folder / "tables" / f"geometry_{name}.parquet", index=False)
    _records(folder, models)
    return folder


def _records(folder: Path, models: Sequence[str]) -> None:
    settings = {"seed": 0, "top": [0.01, 0.1, 0.2], "k": 8, "permutations": 200}
    results = {"schema": 1, "command": "geometry", "base": "base", "models": list(models), "settings": settings}
    results |= {"notes": ["a note <i>with</i> markup"], "cells": []}
    manifest = {
        **{"package": "interference", "version": "0", "command": "geometry", "status": "finished", "seconds": 1.5},
        **{"git": None, "versions": {"python": "3"}, "device": "cpu", "dtype": "float32", "seed": 0},
        **{"fingerprints": {"base": "ab12", "models": dict.fromkeys(models, "cd34")}, "notes": []},
    }
    entries = [{"name": name, "model": f"rl_{k}"} for k, name in enumerate(models)]
    config = {"base_model": "base", "models": entries, "seed": 0, "output": str(folder)}
    (folder / "results.json").write_text(json.dumps(results, allow_nan=False))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def _tensors(layers: int) -> list[Place]:
    out = [_tensor(-1, module, f"{module}.weight", shape) for module, shape in OUTSIDE.items()]
    for layer in range(layers):
        out.append(_tensor(layer, "norm", f"layers.{layer}.norm.weight", (48,)))
        out += [_tensor(layer, m, f"layers.{layer}.{m}.weight", shape) for m, shape in MODULES.items()]
    return out


def _tensor(layer: int, module: str, tensor: str, shape: tuple[int, ...]) -> Place:
    return {
        "scope": "tensor",
        "layer": layer,
        "module": module,
        "tensor": tensor,
        "numel": int(np.prod(shape)),
        "shape": shape,
    }


def _whole(tensors: list[Place]) -> Place:
    return {"scope": "model", "layer": -1, "module": "", "tensor": "", "numel": sum(t["numel"] for t in tensors)}


def _matrix(tensor: Place) -> Place:
    return {name: tensor[name] for name in ("tensor", "layer", "module")}


def _of_model(
    rng: np.random.Generator, tables: dict[str, Rows], model: str, tensors: list[Place], density: float
) -> None:
    rows = []
    for t in tensors:
        changed = float(np.clip(density * rng.uniform(0.3, 2.0), 0.0, 0.9)) if t["module"] != "norm" else 0.0
        norm = (changed * t["numel"]) ** 0.5 * 1e-3
        rows.append(
            {"model": model, **t, **_norms(norm, t["numel"] ** 0.5 * 0.02, 1.0 - changed, matrix=len(t["shape"]) > 1)}
        )
        if len(t["shape"]) > 1:
            _spectra(rng, tables, model, t)
    n = np.array([t["numel"] for t in tensors], float)
    same = float(n @ [r["sparsity_relative"] for r in rows] / n.sum())
    norm, base = (float(np.sqrt(sum(r[c] ** 2 for r in rows))) for c in ("norm", "base_norm"))
    tables["norms"] += [{"model": model, **_whole(tensors), **_norms(norm, base, same, matrix=False)}, *rows]
    for layer in sorted({t["layer"] for t in tensors if t["layer"] >= 0}):
        for kind, units in (("channel", 20), ("head", 4)):
            for unit in range(units):
                change = float(rng.gamma(1.0))
                place = {"kind": kind, "layer": layer, "expert": -1, "unit": unit, "model": model}
                tables["neurons"].append({**place, "change": change, "relative": change / 100})


def _norms(norm: float, base: float, same: float, *, matrix: bool) -> Place:
    ratios = {"row_ratio": 0.6, "column_ratio": 0.7, "row_chance": 0.95, "column_chance": 0.96}
    return {
        **{"norm": norm, "base_norm": base, "relative_norm": norm / base, "largest": 0.01, "identical": 0.9 * same},
        **{
            "sparsity_relative": same,
            "sparsity_absolute": 1 - 0.7 * (1 - same),
            "sparsity_lpt": 1 - 1.05 * (1 - same),
            "sparsity_bf16": same,
        },
        **(ratios if matrix else dict.fromkeys(ratios, np.nan)),
    }


def _spectra(rng: np.random.Generator, tables: dict[str, Rows], model: str, t: Place) -> None:
    rows, columns = t["shape"]
    values = np.sort(rng.gamma(1.0, size=min(rows, columns)))[::-1]
    row = {"rows": rows, "columns": columns, "spectral_norm": float(values[0]), "rank": len(values), "rank_ratio": 1.0}
    row |= {"stable_rank": float((values**2).sum() / values[0] ** 2), "method": "exact", "error": 0.0, "nss": 1e-3}
    row |= {"rotation_left": 0.999, "rotation_right": 0.998, "principal_overlap": 0.05, "low_magnitude_overlap": 0.2}
    tables["spectra"].append({"model": model, **_matrix(t), **row, "alpha": 0.1, "k": 8})
    tables["singular_values"] += [
        {"model": model, "tensor": t["tensor"], "index": k + 1, "value": float(v)} for k, v in enumerate(values[:8])
    ]


def _of_pair(
    rng: np.random.Generator, tables: dict[str, Rows], a: str, b: str, tensors: list[Place], *, shared: bool
) -> None:
    pair, whole = {"a": a, "b": b}, _whole(tensors)
    share = {r["model"]: 1 - r["sparsity_relative"] for r in tables["norms"] if r["scope"] == "model"}
    for place in [whole, *tensors]:
        for rule, factor in zip(RULES, (1.0, 0.7, 1.05, 1.0), strict=True):
            p, q = factor * share[a], factor * share[b]
            chance = p * q / (p + q - p * q)
            found = min(0.9, chance * (float(rng.uniform(1.3, 2.5)) if shared else 1.001))
            both = found * (p + q) / (1 + found)
            row = {"rule": rule, "density_a": p, "density_b": q, "jaccard": found, "chance": chance}
            row |= {"chance_stratified": 1.05 * chance, "low": 0.99 * chance, "high": 1.11 * chance}
            row |= {"overlap_a": both / p, "overlap_b": both / q, "chance_a": q, "chance_b": p}
            tables["masks"].append({**pair, **place, **row})
        _cosine(rng, tables, pair, place, shared=shared)
    for t in tensors:
        if len(t["shape"]) > 1:
            _subspaces(rng, tables, pair, t, shared=shared)
    for kind, count in (("channel", 60), ("head", 12), ("key_value head", 6)):
        for top in (0.01, 0.1, 0.2):
            chance, found = top / (2 - top), float(rng.uniform(0.2, 0.5)) if shared else top
            ends = {"chance": chance, "low": 0.0, "high": 2.5 * chance}
            place = {"kind": kind, "top": top, "scope": "model", "layer": -1, "count": count}
            tables["neuron_overlap"].append({**pair, **place, "jaccard": found, **ends})


def _cosine(rng: np.random.Generator, tables: dict[str, Rows], pair: Place, place: Place, *, shared: bool) -> None:
    null = place["numel"] ** -0.5
    cosine = float(rng.normal(0.1, 0.15)) if shared else 0.2 * null
    row = {"cosine": cosine, "null_std": null, "sign_agreement": 0.5 + cosine / 3, "both": 1000}
    row |= {"sign_low": 0.47, "sign_high": 0.53}
    row |= dict.fromkeys(("projected_mean", "projected_std", "projections", "projection_null"), np.nan)
    if place["scope"] == "model":
        row |= {"projected_mean": cosine + 0.01, "projected_std": 0.06, "projections": 5, "projection_null": 1 / 16}
    tables["cosines"].append({**pair, **place, **row})


def _subspaces(rng: np.random.Generator, tables: dict[str, Rows], pair: Place, t: Place, *, shared: bool) -> None:
    k = 8
    for side, m in zip(("left", "right"), t["shape"], strict=True):
        chance = np.sqrt(min(1.0, 3 * k / m)) * (1 - np.arange(k) / k)
        cosines = np.sort(np.clip(chance + (rng.uniform(0, 0.4, k) if shared else 0.0), 0, 1))[::-1]
        place = {**pair, **_matrix(t), "side": side}
        overlap = float((cosines**2).mean())
        angles = np.degrees(np.arccos(cosines))
        null = {"chance": k / m, "low": 0.9 * k / m, "high": 1.1 * k / m}
        ends = {"largest_angle_deg": float(angles.max()), "smallest_angle_deg": float(angles.min())}
        tables["subspaces"].append({**place, "k": k, "overlap": overlap, **null, **ends})
        tables["angles"] += [
            {**place, "index": n + 1, "cosine": float(c), "chance_cosine": float(r)}
            for n, (c, r) in enumerate(zip(cosines, chance, strict=True))
        ]


def _consensus(tables: dict[str, Rows], models: int, tensors: list[Place]) -> None:
    shares = np.array([0.5**m for m in range(models + 1)])
    for m, share in enumerate(shares / shares.sum()):
        row = {"changed_in": m, "share": float(share), "chance": 1 / (models + 1), "rule": "relative"}
        tables["consensus"].append({**_whole(tensors), **row})


def _audit(model: str, check: str, severity: str, tensor: str, message: str) -> dict[str, Any]:
    return {"model": model, "check": check, "severity": severity, "tensor": tensor, "message": message}
