"""Sums of tensors -> tidy tables of norms, masks, consensus and cosines, over the model, its layers, modules and tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from interference.geometry import masks, nulls
from interference.geometry.labels import Part
from interference.geometry.projection import DIMS
from interference.geometry.sums import RULES, Array, Sums
from interference.schemas import GEOMETRY

Row = dict[str, Any]
_NAN = float("nan")


class Counted(NamedTuple):
    """A tensor's name, place and sums."""

    name: str
    part: Part
    sums: Sums


_ADDED = {f.name for f in fields(Sums)} - {"shape", "largest", "rows", "columns", "units", "base_units"}


def total(members: Sequence[Counted]) -> dict[str, Any]:
    """The sums of several tensors."""
    out: dict[str, Any] = {name: sum(getattr(c.sums, name) for c in members) for name in _ADDED}
    out["largest"] = np.max([c.sums.largest for c in members], axis=0)
    return out


def groups(counted: Sequence[Counted]) -> list[masks.Group]:
    """The whole model, every layer, every module, every tensor."""
    return masks.groupings([c.name for c in counted], [c.part.layer for c in counted], [c.part.module for c in counted])


def norms(models: Sequence[str], counted: Sequence[Counted]) -> pd.DataFrame:
    """The table `norms`: size and sparsity of every update."""
    rows: list[Row] = []
    for group in groups(counted):
        members = [counted[i] for i in group.members]
        t = total(members)
        n, base = t["numel"], float(np.sqrt(t["base_square"]))
        for k, model in enumerate(models):
            norm = float(np.sqrt(t["gram"][k, k]))
            row = {"model": model, **group.labels, "numel": n, "norm": norm, "base_norm": base}
            row |= {"relative_norm": norm / base if base else _NAN, "largest": float(t["largest"][k])}
            row |= {"identical": t["identical"][k] / n}
            row |= {f"sparsity_{rule}": 1 - t["count"][r, k] / n for r, rule in enumerate(RULES)}
            rows.append(row | _lines(members, k))
    return pd.DataFrame(rows)


def _lines(members: Sequence[Counted], k: int) -> Row:
    """Shares of rows and columns with a changed weight, for one matrix; beside what a mask without structure would have."""
    s = members[0].sums
    if len(members) > 1 or s.shape[1] == 1:
        return dict.fromkeys(("row_ratio", "column_ratio", "row_chance", "column_chance"), _NAN)
    density, (rows, columns) = s.count[0, k] / s.numel, s.shape
    return {
        "row_ratio": s.rows[k] / rows,
        "column_ratio": s.columns[k] / columns,
        "row_chance": nulls.line_chance(density, columns),
        "column_chance": nulls.line_chance(density, rows),
    }


def overlaps(models: Sequence[str], counted: Sequence[Counted]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables `masks` and `consensus`."""
    numel = np.array([c.sums.numel for c in counted])
    changed, both = (np.stack([getattr(c.sums, f) for c in counted]) for f in ("count", "both"))
    where = groups(counted)
    pairs = masks.mask_table(models, RULES, masks.Counts(numel, changed, both), where)
    histogram = np.stack([c.sums.histogram for c in counted])
    return pairs, masks.consensus_table(histogram, numel, changed[:, 0], where, RULES[0])


def cosines(models: Sequence[str], counted: Sequence[Counted], projected: Array) -> pd.DataFrame:
    """The table `cosines`. projected: cosines after projection, (seeds, N, N).

    null_std is the cosine's standard deviation when every coordinate's sign is drawn at random,
    sqrt(sum d_a^2 d_b^2) / (|d_a| |d_b|): 1 / sqrt(numel) for dense updates, larger for sparse and heavy-tailed ones.
    """
    rows: list[Row] = []
    for group in groups(counted):
        t = total([counted[i] for i in group.members])
        size = np.sqrt(np.diag(t["gram"]))
        for a, b in combinations(range(len(models)), 2):
            scale = float(size[a] * size[b])
            shared, agree = int(t["both"][0, a, b]), int(t["agree"][a, b])
            chance = nulls.sign_agreement_null(shared)
            row = {"a": models[a], "b": models[b], **group.labels}
            row |= {"cosine": float(t["gram"][a, b]) / scale if scale else _NAN}
            row |= {"null_std": float(np.sqrt(t["squares"][a, b])) / scale if scale else _NAN}
            row |= {"sign_agreement": agree / shared if shared else _NAN}
            row |= {"sign_low": chance.low, "sign_high": chance.high, "both": shared}
            rows.append(row | _projected(projected[:, a, b] if group.scope == "model" else projected[:0, a, b]))
    return pd.DataFrame(rows, columns=list(GEOMETRY["cosines"]))


def _projected(found: Array) -> Row:
    if not len(found):
        return {"projected_mean": _NAN, "projected_std": _NAN, "projections": 0, "projection_null": _NAN}
    spread = float(found.std(ddof=1)) if len(found) > 1 else _NAN
    null = float(DIMS**-0.5)
    return {
        "projected_mean": float(found.mean()),
        "projected_std": spread,
        "projections": len(found),
        "projection_null": null,
    }
