"""Synthetic test input: predicted changes split into parts that sum to the cell, with made-up numbers and awkward text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

DENSE = ("q", "k", "v", "o", "gate", "up", "down")
SPARSE = ("q", "k", "v", "o", "router", "experts")
CHANNELS, QUERIES, KEYS = 48, 4, 2
PROMPTS = (
    '<b>Question</b> & "quotes": what is 12 + 30?\n<script>alert(1)</script>\tAnswer:',
    "ما هو ناتج \u202e2+2\u202c؟",
    "a very long prompt, word by word, " * 60 + "and its end.",
)
RESPONSES: tuple[tuple[str, ...], ...] = (
    (
        "The",
        " answer",
        " is",
        " ",
        "4",
        "2",
        ".",
        "\n",
        "\n\n",
        "<i>so</i>",
        " & on",
        '" onclick="x',
        "</span>",
        "",
        "<eos>",
    ),
    ("الجواب", " هو", " 4", "\u202e", "\x00", "\x1b[31m", "\ufffd", "\u2028", "   ", "\t", "'", "<eos>"),
    (*(f" w{k}" for k in range(30)), "<eos>"),
)

Rows = list[dict[str, Any]]


def split(cells: Sequence[Mapping[str, Any]], layers: int, experts: int) -> dict[str, Rows]:
    """Rows of every table of parts of these cells, and the `attribution` of the results."""
    rng = np.random.default_rng(1)
    out: dict[str, Rows] = {part: [] for part in ("modules", "heads", "channels", "tokens", "attribution")}
    for cell in cells:
        key = {name: str(cell[name]) for name in ("objective", "update", "domain")}
        first = cell["predicted_first"]
        first = 0.02 if first is None else float(first)
        second = float(cell["predicted_second"]) - first
        total = (first, second)
        inside = [(layer, m) for layer in range(layers) for m in ("norm", *(SPARSE if experts else DENSE))]
        places = [(-1, "embedding"), *inside, (-1, "norm"), (-1, "head")]
        for (layer, module), parts in zip(places, _parts(rng, len(places), total), strict=True):
            out["modules"].append({**key, "layer": layer, "module": module, **parts, "parameters": 100})
        heads = [(n, "query", h) for n in range(layers) for h in range(QUERIES)]
        heads += [(n, "key_value", h) for n in range(layers) for h in range(KEYS)]
        for (layer, kind, head), parts in zip(heads, _parts(rng, len(heads), total), strict=True):
            out["heads"].append({**key, "layer": layer, "kind": kind, "head": head, **parts})
        which = range(experts) if experts else (-1,)
        channels = [(n, e, c) for n in range(layers) for e in which for c in range(CHANNELS)]
        for (layer, expert, channel), parts in zip(channels, _parts(rng, len(channels), total), strict=True):
            out["channels"].append({**key, "layer": layer, "expert": expert, "channel": channel, **parts})
        out["tokens"] += _tokens(rng, key, total)
        sums = {"first": first, "second": second, "jets_first": first, "jets_second": second}
        out["attribution"].append({**key, **sums, "disagreement": 2.5e-7})
    return out


def _parts(rng: np.random.Generator, count: int, total: tuple[float, float]) -> Rows:
    """Heavy-tailed contributions that sum to the cell's first- and second-order change."""
    rough = rng.standard_t(1.5, (count, 2)) * 0.2 * np.abs(total) / count**0.5
    rough += (np.array(total) - rough.sum(0)) / count
    return [{"first": float(a), "second": float(b)} for a, b in rough]


def _tokens(rng: np.random.Generator, key: Mapping[str, str], total: tuple[float, float]) -> Rows:
    every = [(s, k, text) for s, response in enumerate(RESPONSES) for k, text in enumerate(response)]
    parts = _parts(rng, len(every), (0.2 * total[0], 0.2 * total[1]))
    frame = pd.DataFrame(parts).assign(sequence=[s for s, _, _ in every])
    sums = frame.groupby("sequence")[["first", "second"]].sum()
    worst = 1 if key["objective"] == "nll" else -1
    rank = (worst * sums.sum(axis=1)).rank(ascending=False).astype(int)
    return [
        {
            **key,
            **{"prompt_id": f"p{s}", "sequence": 10 + s, "rank": int(rank[s]), "position": k, "token_id": 100 + k},
            **{"text": text, "prompt": PROMPTS[s], **row},
            **{"sequence_first": float(sums["first"][s]), "sequence_second": float(sums["second"][s])},
        }
        for (s, k, text), row in zip(every, parts, strict=True)
    ]


def write(folder: Path, tables: Mapping[str, Rows]) -> None:
    """Write the tables of parts into RUN/tables."""
    for part in ("modules", "heads", "channels", "tokens"):
        pd.DataFrame(tables[part]).to_parquet(folder / "tables" / f"attribution_{part}.parquet", index=False)
