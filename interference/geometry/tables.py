"""Sums of tensors -> tidy tables of norms, masks, consensus and cosines, over the model, its layers, modules and tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from interference.geometry import masks, nulls
from interference.geometry.labels import Part
from interference.geometry.stream import RULES, Array, Sums

Row = dict[str, Any]
_NAN = float("nan")


class Counted(NamedTuple):
    """A tensor's name, place and sums."""

    name: str
    part: Part
    sums: Sums


class Group(NamedTuple):
    """What a row is about, and the tensors in it."""

    about: Row
    members: list[Counted]


def groups(counted: Sequence[Counted]) -> Iterator[Group]:
    """The whole model, every layer, every module, every tensor."""
    blank = {"layer": -1, "module": "", "tensor": ""}
    yield Group({"scope": "model", **blank}, list(counted))
    for layer in sorted({c.part.layer for c in counted} - {-1}):
        yield Group({"scope": "layer", **blank, "layer": layer}, [c for c in counted if c.part.layer == layer])
    for module in dict.fromkeys(c.part.module for c in counted):
        yield Group({"scope": "module", **blank, "module": module}, [c for c in counted if c.part.module == module])
    for c in counted:
        about = {"scope": "tensor", "layer": c.part.layer, "module": c.part.module, "tensor": c.name}
        yield Group(about, [c])


_ADDED = {
    f.name for f in fields(Sums) if f.name not in ("shape", "largest", "rows", "columns", "units", "base_units")
}


def total(members: Sequence[Counted]) -> dict[str, Any]:
    """The sums of several tensors."""
    out: dict[str, Any] = {name: sum(getattr(c.sums, name) for c in members) for name in _ADDED}
    out["largest"] = np.max([c.sums.largest for c in members], axis=0)
    return out


def norms(models: Sequence[str], counted: Sequence[Counted]) -> pd.DataFrame:
    """Size and sparsity of every update; see `Run.geometry("norms")`."""
    rows: list[Row] = []
    for about, members in groups(counted):
        t = total(members)
        n, base = t["numel"], float(np.sqrt(t["base_square"]))
        for k, model in enumerate(models):
            norm = float(np.sqrt(t["gram"][k, k]))
            row = {"model": model, **about, "numel": n, "norm": norm, "base_norm": base}
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
    pairs: list[Row] = []
    shares: list[Row] = []
    for about, members in groups(counted):
        numel = np.array([c.sums.numel for c in members])
        count, both = (np.stack([getattr(c.sums, f) for c in members]) for f in ("count", "both"))
        for r, rule in enumerate(RULES):
            for a, b in _pairs(len(models)):
                found = masks.pair(numel, count[:, r, a], count[:, r, b], both[:, r, a, b])
                pairs.append({"a": models[a], "b": models[b], "rule": rule, **about, **found})
        histogram = total(members)["histogram"]
        densities = count[:, 0].sum(0) / numel.sum()
        chance = nulls.consensus_chance(densities)
        for m, number in enumerate(histogram):
            share = {"changed_in": m, "share": number / numel.sum(), "chance": float(chance[m]), "rule": RULES[0]}
            shares.append({**about, **share})
    return pd.DataFrame(pairs), pd.DataFrame(shares)


def cosines(models: Sequence[str], counted: Sequence[Counted], projected: Array) -> pd.DataFrame:
    """The table `cosines`. projected: cosines after projection, (seeds, N, N).

    null_std is the cosine's standard deviation when every coordinate's sign is drawn at random,
    sqrt(sum d_a^2 d_b^2) / (|d_a| |d_b|): 1 / sqrt(numel) for dense updates, larger for sparse and heavy-tailed ones.
    """
    rows: list[Row] = []
    for about, members in groups(counted):
        t = total(members)
        size = np.sqrt(np.diag(t["gram"]))
        for a, b in _pairs(len(models)):
            scale = float(size[a] * size[b])
            shared, agree = int(t["both"][0, a, b]), int(t["agree"][a, b])
            low, high = nulls.sign_interval(shared)
            row = {"a": models[a], "b": models[b], **about}
            row |= {"cosine": float(t["gram"][a, b]) / scale if scale else _NAN}
            row |= {"null_std": float(np.sqrt(t["squares"][a, b])) / scale if scale else _NAN}
            row |= {"sign_agreement": agree / shared if shared else _NAN, "sign_low": low, "sign_high": high}
            row |= {"both": shared, **_projected(about, projected[:, a, b])}
            rows.append(row)
    return pd.DataFrame(rows)


def _projected(about: Row, found: Array) -> Row:
    if about["scope"] != "model" or not len(found):
        return {"projected_mean": _NAN, "projected_std": _NAN, "projections": 0, "projection_null": _NAN}
    spread = float(found.std(ddof=1)) if len(found) > 1 else _NAN
    return {"projected_mean": float(found.mean()), "projected_std": spread, "projections": len(found), "projection_null": 1 / 16}


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(a, b) for a in range(count) for b in range(a + 1, count)]
