"""What the numbers of a survey say about its checkpoints: updates that are zero or not finite, and a base that is none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from interference.geometry.sums import Sums
from interference.geometry.tables import Counted, total
from interference.pairing import FATAL, NOTE, WARNING, Finding

COPIED = 0.5  # of the coordinates that a model changes, more than another one changes to the very same value by chance


def not_finite(name: str, sums: Sums, models: Sequence[str]) -> Iterator[Finding]:
    """NaN or infinite weights in a tensor."""
    bad = [] if np.isfinite(sums.base_square) else ["the base"]
    bad += [] if bad else [m for m, square in zip(models, np.diag(sums.gram), strict=True) if not np.isfinite(square)]
    for model in bad:
        yield Finding(
            "finite",
            FATAL,
            f"NaN or infinite weights in {name} of {model}",
            "finite weights",
            "use a checkpoint from before training diverged",
            name,
        )


def of_models(models: Sequence[str], counted: Sequence[Counted]) -> Iterator[tuple[str, Finding]]:
    """(model, finding) about whole updates and about modules that stayed bit-identical."""
    whole = total(counted)
    for k, model in enumerate(models):
        if whole["identical"][k] == whole["numel"]:
            yield (
                model,
                Finding(
                    "zero update",
                    FATAL,
                    f"{model}, whose tensors are all identical to the base's",
                    "a checkpoint that training changed",
                    "check that the path is the trained model and that it was merged and saved after training",
                ),
            )
            continue
        yield from ((model, finding) for finding in _untouched(k, counted))
    others = [[b for b in range(len(models)) if b != a] for a in range(len(models))]
    for a, model in enumerate(models):
        moved = whole["numel"] - whole["identical"][a]
        if len(models) > 1 and moved and min(whole["copied"][a, b] for b in others[a]) > COPIED * moved:
            share = min(whole["copied"][a, b] for b in others[a]) / moved
            yield (
                model,
                Finding(
                    "swapped",
                    WARNING,
                    f"{model}, whose difference from the base {100 * share:.0f} % or more of every other model shares bit by bit",
                    "updates that agree bit by bit in few coordinates",
                    f"check whether {model} is the true base and the one given as base was trained",
                ),
            )


def _untouched(k: int, counted: Sequence[Counted]) -> Iterator[Finding]:
    """Modules without a single changed weight, in one note."""
    modules = dict.fromkeys(c.part.module for c in counted)
    still = [m for m in modules if all(c.sums.identical[k] == c.sums.numel for c in counted if c.part.module == m)]
    if still:
        yield Finding(
            "identical modules",
            NOTE,
            f"no weight changed in {', '.join(still)}",
            "changes wherever training was not frozen",
            "nothing to do if these were frozen, or left out by an adapter",
        )
