"""Singular subspaces and spectra of every matrix of a survey, one tensor in memory at a time, resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interference.geometry import spectra, subspaces
from interference.geometry.labels import Part
from interference.geometry.nulls import subspace_null
from interference.geometry.settings import Settings
from interference.geometry.subspaces import Method, Subspaces
from interference.geometry.sums import changed
from interference.records import GEOMETRY, digest, read_json, write_json
from interference.tree import Change, LowRank

Row = dict[str, Any]
Rows = dict[str, list[Row]]
TABLES = ("spectra", "singular_values", "subspaces", "angles")
IDENTIFIED = 0.5  # overlap of two seeds' subspaces, below which the randomized method did not find them
Moved = Callable[[], Tensor | LowRank]
KEPT = 256  # singular values in the table, at most


def survey(
    parts: Mapping[str, Part],
    shapes: Mapping[str, Sequence[int]],
    read: Callable[[str], tuple[Tensor, dict[str, Moved]]],
    settings: Settings,
    folder: Path,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, pd.DataFrame]:
    """The spectral tables.

    read: gives a tensor of the base and {model: a function that reads the tuned one, or makes its factors}. Vectors are left
    out; a stack of matrices (the experts of a layer in one tensor) is taken matrix by matrix, as "NAME[i]".
    """
    found: Rows = {t: [] for t in TABLES}
    wanted = [n for n in parts if len(shapes[n]) > 1 and min(shapes[n][-2:]) > 1] if settings.spectra != "none" else []
    for i, name in enumerate(wanted):
        path = folder / "tensors" / f"spectra-{i:05d}.json"
        if not path.is_file():
            say(f"{100 * i // len(wanted):3d} %  spectra of {name}")
            write_json(path, _without_nan(_tensor(name, *read(name), settings)))
        for table, rows in read_json(path).items():
            found[table] += [{"layer": parts[name].layer, "module": parts[name].module, **row} for row in rows]
    return {
        t: pd.DataFrame(rows, columns=list(GEOMETRY[t])).fillna(np.nan).infer_objects() for t, rows in found.items()
    }


def _without_nan(rows: Rows) -> Rows:
    return {t: [{k: None if v != v else v for k, v in row.items()} for row in of] for t, of in rows.items()}


def _tensor(name: str, base: Tensor, tuned: Mapping[str, Moved], settings: Settings) -> Rows:
    out: Rows = {t: [] for t in TABLES}
    matrices = base.reshape(-1, *base.shape[-2:])
    for i, before in enumerate(matrices):
        label = name if base.dim() == 2 else f"{name}[{i}]"
        after = {model: _slice(moved, matrices.shape, i) for model, moved in tuned.items()}
        for table, row in _matrix(label, before, after, settings):
            out[table].append({"tensor": label, **row})
    return out


def _slice(moved: Moved, shape: torch.Size, i: int) -> Moved:
    def read() -> Tensor | LowRank:
        found = moved()
        return found if isinstance(found, LowRank) else found.reshape(shape)[i]

    return read


def method_of(shape: Sequence[int], settings: Settings) -> Method:
    """How a matrix of this shape is decomposed: by what was asked, or by its smaller side."""
    if settings.spectra != "auto":
        return settings.spectra  # type: ignore[return-value]  # "none" does not come here
    smaller = min(shape)
    return "svd" if smaller <= settings.svd_up_to else "gram" if smaller <= settings.gram_up_to else "randomized"


def _matrix(label: str, base: Tensor, tuned: Mapping[str, Moved], settings: Settings) -> Iterator[tuple[str, Row]]:
    """Rows of one matrix, (table, row); one tuned model in memory at a time."""
    method, k = method_of(base.shape, settings), min(settings.k, *base.shape)
    before = base if base.dtype == torch.float64 else base.float()
    whole = subspaces.decompose(before, k, method, seed=settings.seed)
    principal = spectra.principal_mask(whole[1], settings.alpha, settings.seed)
    low = spectra.low_magnitude_mask(before, settings.alpha, settings.seed)
    updates: dict[str, Subspaces] = {}
    for model, moved in tuned.items():
        change, after = _moved(before, moved())
        # A sketch of its own for each model: with a common one, flat spectra would seem to share directions.
        seed = int(digest([settings.seed, model, label])[:8], 16)
        values, own = subspaces.decompose(change, k, method, seed=seed)
        exact = method != "randomized" or isinstance(change, LowRank)
        shared = 1.0 if exact else _between_seeds(change, own, k, seed)
        if not shared < IDENTIFIED:
            updates[model] = own
        row = {"model": model, "rows": base.shape[0], "columns": base.shape[1], "seed_overlap": shared}
        row |= {"method": method if not isinstance(change, LowRank) else "factors", "error": own.error}
        row |= _spectrum(change, values, exact) | _against(before, whole, after, method, k, settings.seed)
        mask = torch.from_numpy(changed(before.to(after.dtype).numpy(), after.numpy()))
        for which, reference in (("principal", principal), ("low_magnitude", low)):
            found = spectra.mask_overlap(reference, mask)
            row |= {f"{which}_overlap": found.value, f"{which}_low": found.low, f"{which}_high": found.high}
        yield "spectra", row | {"alpha": settings.alpha, "k": k}
        for index, value in enumerate(values[:KEPT].tolist(), start=1):
            yield "singular_values", {"model": model, "index": index, "value": value}
    for a, b in combinations(updates, 2):
        yield from _pair(a, b, updates[a], updates[b], base.shape)


def _moved(before: Tensor, found: Tensor | LowRank) -> tuple[Change, Tensor]:
    """The change of a matrix and what became of it, in the wider precision of the two; an adapter's change by its factors."""
    if isinstance(found, LowRank):
        return found, before + found.dense().to(before.dtype)
    wide = torch.promote_types(before.dtype, found.dtype)
    after = found.to(wide)
    return after - before.to(wide), after


def _spectrum(change: Change, values: Tensor, exact: bool) -> Row:
    size = (
        float(values.norm())
        if isinstance(change, LowRank)
        else float(torch.linalg.vector_norm(change, dtype=torch.float64))
    )
    largest = float(values[0]) if len(values) else 0.0
    shape = (int(change.shape[0]), int(change.shape[1]))
    rank = float(spectra.numerical_rank(values, shape)) if exact else float("nan")
    return {
        "spectral_norm": largest,
        "stable_rank": spectra.stable_rank(size, largest),
        "rank": rank,
        "rank_ratio": rank / min(shape),
    }


def _between_seeds(change: Change, own: Subspaces, k: int, seed: int) -> float:
    """Overlap of the leading left subspace with that of another seed: far below 1 where the spectrum is too flat for the
    randomized method to find it, of which its error bound says nothing."""
    again = subspaces.decompose(change, k, "randomized", seed=seed + 1)[1]
    return subspaces.overlap(own.left, again.left) if own.left.shape[1] else float("nan")


def _against(before: Tensor, whole: tuple[Tensor, Subspaces], after: Tensor, method: Method, k: int, seed: int) -> Row:
    """Against the base's weights: rotation and, where all singular values are known, spectral drift."""
    values, leading = subspaces.decompose(after, k, method, seed=seed)
    left, right = spectra.rotation(whole[1], leading)
    drift = float("nan")
    if method != "randomized" and len(whole[0]):
        count = max(len(whole[0]), len(values))
        drift = spectra.normalized_spectral_shift(
            *(torch.nn.functional.pad(x, (0, count - len(x))) for x in (whole[0], values))
        )
    return {"nss": drift, "rotation_left": left, "rotation_right": right}


def _pair(a: str, b: str, first: Subspaces, second: Subspaces, shape: Sequence[int]) -> Iterator[tuple[str, Row]]:
    for side, m in zip(("left", "right"), shape, strict=True):
        u, v = getattr(first, side), getattr(second, side)
        k, other = u.shape[1], v.shape[1]
        if not k or not other:
            continue
        about = {"a": a, "b": b, "side": side}
        chance, angles = subspace_null(m, k, other), subspaces.principal_angles(u, v)
        row = about | {"k": k, "overlap": subspaces.overlap(u, v), "chance": chance.mean}
        row |= {"low": chance.low, "high": chance.high}
        yield "subspaces", row | {"smallest_angle_deg": float(angles[0]), "largest_angle_deg": float(angles[-1])}
        cosines = subspaces.principal_cosines(u, v)
        for i, (cosine, usual) in enumerate(zip(cosines.tolist(), chance.cosines, strict=True), start=1):
            yield "angles", about | {"index": i, "cosine": cosine, "chance_cosine": usual}
