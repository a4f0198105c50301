"""Do two domains pull a module the same way? Cosines of their gradients at the anchor, beside what half of the prompts says.

A gradient from few prompts is mostly noise, and noise lowers every cosine: with r the cosine of the gradients of two halves of
one domain's prompts, a cosine between halves of two domains is on average sqrt(r_a r_b) times that of the noise-free gradients.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from interference import anatomy as anatomies
from interference import records
from interference.anatomy import Anatomy
from interference.derivatives import objective_gradient
from interference.domain import Domain
from interference.errors import InputError
from interference.expansion import check_domain
from interference.model import Model
from interference.probes.halves import prompt_halves
from interference.records import MODULES
from interference.statistics import Array
from interference.tree import NamedTensors
from interference.update import Update

_COLUMNS = [
    *("a", "b", "scope", "layer", "module", "parameters"),
    *("cosine", "lowest", "highest", "split_a", "split_b", "noise", "noise_floor", "disattenuated"),
]
_FLOOR = 0.9  # share of the noise cosines below the floor
Halves = tuple[NamedTensors, NamedTensors]


def gradient_agreement(
    model: Model,
    domains: Mapping[str, Domain],
    *,
    objective: str = "nll",
    anatomy: Anatomy | None = None,
    cache: str | os.PathLike[str] | None = None,
    seed: int = 0,
    batch_tokens: int = 4096,
) -> pd.DataFrame:
    """`gradient_cosines` of the domains' objective at the model, from the gradients of two halves of each domain's prompts.

    Args:
        cache: a folder; gradients are then kept there (float32 safetensors, named by the digest of weights, objective and
            sequences) and read tensor by tensor, so that memory holds one gradient, and an interrupted call goes on. Without,
            two gradients per domain are held in memory.
        seed: of the halves.

    Raises:
        InputError: fewer than two domains, a single prompt, sequences without room, objective kl (whose gradient at the anchor is
            zero) or an unknown one, missing or constant rewards (in either half) where it needs them, a damaged cache file.
    """
    if objective == "kl":
        raise InputError(got="objective 'kl'", expected="one with a gradient at the anchor", remedy="use nll or reward")
    found: dict[str, Halves] = {}
    for name, domain in domains.items():
        check_domain(model, domain, objective)
        parts = prompt_halves(domain, seed)
        first, second = (_gradient(model, part, objective, cache, batch_tokens) for part in parts)
        found[name] = (first, second)
    return gradient_cosines(found, anatomies.read(model) if anatomy is None else anatomy)


def gradient_cosines(gradients: Mapping[str, Halves], anatomy: Anatomy) -> pd.DataFrame:
    """Cosines between domains' gradients by module and layer, from the gradients of two halves of each domain's prompts.

    Returns:
        One row per pair and scope ("model", "module": over all layers, "layer": over all modules, "part": a module of a layer):
        a, b, scope, layer (-1 outside of layers and where there are several), module ("all" where there are several),
        parameters; cosine: mean over the four pairs of a half of a with a half of b; lowest, highest of the four; split_a,
        split_b: cosine of the two halves of one domain, the most that noise leaves; noise: cosine of the differences between
        halves, from which what the halves share is gone: one draw of what noise alone gives; noise_floor: 90 % of the sizes of
        `noise` in the rows of the same scope and module, over all layers and pairs (of the whole model, over pairs; a little
        strict, since a mean over four pairs of halves is less noisy than one difference); disattenuated: cosine / sqrt(split_a
        split_b), our estimate of the noise-free cosine (Spearman's correction; beyond 1 by noise), NaN where a split is not
        positive. NaN where a gradient is zero.

    Raises:
        InputError: fewer than two domains, and tensors that are no parameters of the model.
    """
    names = list(gradients)
    vectors = [g for pair in gradients.values() for g in pair]
    strange = [n for g in vectors for n in g if n not in anatomy.places]
    if len(names) < 2 or strange:
        raise InputError(
            got=f"gradients of {len(names)} domains" + (f" with {strange[0]!r}" if strange else ""),
            expected="at least two domains, and tensors of the model's parameters",
            remedy="give the halves' gradients of every domain, from one model",
        )
    keys, group = _parts(anatomy)
    inner, sizes = _inner_products(vectors, anatomy, group, len(keys))
    rows: list[dict[str, Any]] = []
    for i, j in combinations(range(len(names)), 2):
        for label, members in _scopes(keys):
            products = inner[:, :, members].sum(-1)
            both = [2 * i, 2 * i + 1, 2 * j, 2 * j + 1]
            pair = {"a": names[i], "b": names[j], **label, "parameters": int(sizes[members].sum())}
            rows.append(pair | _compare(products[np.ix_(both, both)]))
    table = pd.DataFrame(rows, columns=_COLUMNS)
    groups = table["noise"].abs().groupby([table["scope"], table["module"]], sort=False)
    return table.assign(noise_floor=groups.transform(lambda sizes: sizes.quantile(_FLOOR)))


def _parts(anatomy: Anatomy) -> tuple[list[tuple[int, str]], NDArray[np.intp]]:
    """(layer, module) of every part, and the part of every unit."""
    labels = np.stack([anatomy.labels["layer"], anatomy.labels["module"]], axis=1)
    found, group = np.unique(labels, axis=0, return_inverse=True)
    return [(int(layer), MODULES[module]) for layer, module in found], group.reshape(-1)


def _inner_products(
    vectors: list[NamedTensors], anatomy: Anatomy, group: NDArray[np.intp], parts: int
) -> tuple[Array, NDArray[np.int64]]:
    """<v_i, v_j> on every part, (V, V, parts), streamed tensor by tensor; and the coordinates of every part."""
    out, sizes = np.zeros((len(vectors), len(vectors), parts)), np.zeros(parts, dtype=np.int64)
    for name, place in anatomy.places.items():
        held = {i: v[name].detach().double() for i, v in enumerate(vectors) if name in v}
        each = anatomy.shapes[name].numel() // (place.stop - place.start)
        sizes += each * np.bincount(group[place], minlength=parts)
        for i, x in held.items():
            for j, y in held.items():
                if i <= j:
                    sums = anatomy.sums(name, x * y).cpu().numpy()
                    out[i, j] += np.bincount(group[place], sums, parts)
                    out[j, i] = out[i, j]
    return out, sizes


def _scopes(keys: list[tuple[int, str]]) -> list[tuple[dict[str, Any], list[int]]]:
    everything = list(range(len(keys)))
    out: list[tuple[dict[str, Any], list[int]]] = [({"scope": "model", "layer": -1, "module": "all"}, everything)]
    for module in [m for m in MODULES if any(m == other for _, other in keys)]:
        members = [i for i in everything if keys[i][1] == module]
        out.append(({"scope": "module", "layer": -1, "module": module}, members))
    for layer in sorted({layer for layer, _ in keys if layer >= 0}):
        members = [i for i in everything if keys[i][0] == layer]
        out.append(({"scope": "layer", "layer": layer, "module": "all"}, members))
    return out + [({"scope": "part", "layer": layer, "module": m}, [i]) for i, (layer, m) in enumerate(keys)]


def _compare(products: Array) -> dict[str, float]:
    """From the inner products (4, 4) of a's two halves and b's two halves."""
    norms = np.sqrt(np.maximum(products.diagonal(), 0.0))
    difference_a, difference_b = np.array([1.0, -1.0, 0.0, 0.0]), np.array([0.0, 0.0, 1.0, -1.0])
    spread = [float(d @ products @ d) for d in (difference_a, difference_b)]
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = products / np.outer(norms, norms)
        noise = np.float64(difference_a @ products @ difference_b) / np.sqrt(np.maximum(spread, 0.0)).prod()
    across, a, b = cosines[:2, 2:], float(cosines[0, 1]), float(cosines[2, 3])
    mean = float(across.mean())
    return {
        "cosine": mean,
        "lowest": float(across.min()),
        "highest": float(across.max()),
        "split_a": a,
        "split_b": b,
        "noise": float(noise),
        "disattenuated": mean / (a * b) ** 0.5 if a > 0 and b > 0 else float("nan"),
    }


def _gradient(
    model: Model, domain: Domain, objective: str, cache: str | os.PathLike[str] | None, batch_tokens: int
) -> NamedTensors:
    """A domain's gradient in float32, held, or lazily read from the cache."""
    if cache is None:
        return _computed(model, domain, objective, batch_tokens)
    sequences = [[s.prompt, s.response, s.prompt_id, s.reward] for s in domain.sequences]
    key = records.digest([model.checksum(), str(model.dtype), objective, sequences])
    path = Path(cache) / f"gradient-{key}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        save_file({n: x.cpu() for n, x in _computed(model, domain, objective, batch_tokens).items()}, part)
        part.replace(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = tuple(file.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(
            got=f"{path}, which is damaged",
            expected="a cache file as this package wrote it",
            remedy="delete that file and run again",
        ) from error

    def load(name: str) -> torch.Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    return Update(names, load)  # type: ignore[return-value]


def _computed(model: Model, domain: Domain, objective: str, batch_tokens: int) -> dict[str, torch.Tensor]:
    found = objective_gradient(model, domain, objective, batch_tokens=batch_tokens)
    return {name: value.float() for name, value in found.items()}
