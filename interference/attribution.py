"""attribute: which layers, modules, heads, channels and tokens the predicted change of every domain comes from.

The predicted change of a domain under an update, first + second order at coefficient 1, is a sum over coordinates,
sum g d + 1/2 sum d (H d), and through the jets a sum over response tokens. Both sums are split here; the parts of each split
make up the whole (docs/math.md, Attribution).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from interference import anatomy as anatomies
from interference import domain as data
from interference import expansion
from interference.anatomy import Anatomy
from interference.checkpoint import Checkpoint
from interference.domain import Domain
from interference.errors import InputError
from interference.expansion import Progress
from interference.jets import token_jets
from interference.layout import KINDS
from interference.model import Model, load
from interference.objectives import kind
from interference.products import sequence_weights, unit_products
from interference.quadratic import QuadraticModel, check_models
from interference.records import MODULES
from interference.tree import NamedChanges, NamedTensors

Array = NDArray[np.float64]
TOLERANCE = 1e-3
_ROUNDING = 1e-5


@dataclass(frozen=True, eq=False)
class Attribution:
    """Parts of predicted changes, in the objective's unit, one row per (objective, update, domain) and part.

    `first` and `second` are a part's contributions at coefficient 1; the predicted change is their sum.

    cells: first, second (sums of the parts), jets_first, jets_second (the same by the jets), disagreement (the larger of the
    two differences over |jets_first| + |jets_second|; infinite where these are zero and the sums are not), rounding (is it
    beyond 1e-3, but within the rounding of the sequences' terms, which nearly cancel?).
    modules: layer (-1 outside of layers), module, first, second, parameters (how many coordinates the update changes).
    heads: layer, kind ("query": rows of q, columns of o; "key_value": rows of k and v), head, first, second.
    channels: layer, expert (-1: none), channel (its rows of gate and up, its column of down), first, second.
    notes: what could not be told apart.
    """

    cells: pd.DataFrame
    modules: pd.DataFrame
    heads: pd.DataFrame
    channels: pd.DataFrame
    notes: tuple[str, ...] = ()


def attribute(
    base: Checkpoint | Model,
    updates: Mapping[str, NamedChanges],
    domains: Mapping[str, Domain],
    *,
    objective: str = "nll",
    models: Mapping[str, QuadraticModel] | None = None,
    engine: str = "taylor",
    dtype: torch.dtype = torch.float32,
    device: str = "auto",
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> Attribution:
    """Split the predicted change of every domain under every update over layers, modules, heads and channels.

    One gradient per domain and one Hessian-vector product per (update, domain) (`products`), about 10 forward passes each.
    models : what `expand` returned for the same base, updates, domains and objective; made here where it is not given. Every
    cell's sum of parts is held against it.  engine : of the jets that they are held against.

    Raises InputError as `expand` does, for updates without tensors, no domains, models of another request, and when sums of
    parts differ from the jets by more than 1e-3 of the change.
    """
    kind(objective)
    if not domains:
        raise InputError(got="no domains", expected="at least one", remedy="give {name: Domain.from_jsonl(...)}")
    model = base if isinstance(base, Model) else load(base, dtype=dtype, device=device)
    aligned = expansion.align(model, updates)
    for domain in domains.values():
        expansion.check_domain(model, domain, objective)
    if models is not None:
        check_models(models, objective, aligned, domains)
    else:
        models = expansion.expand(
            model,
            updates,
            domains,
            objective=objective,
            pairs=False,
            engine=engine,
            batch_tokens=batch_tokens,
            progress=progress,
        )
    anatomy = anatomies.read(model)
    counts = changed(anatomy, aligned)
    parts = []
    for name, domain in domains.items():
        products = unit_products(model, anatomy, aligned, domain, [objective], batch_tokens=batch_tokens)[0]
        parts.append(split(anatomy, products, counts, models[name], name))
        if progress:
            progress(name)
    return join(parts)


def changed(anatomy: Anatomy, updates: Mapping[str, NamedTensors]) -> NDArray[np.int64]:
    """How many coordinates of every unit an update changes, (updates, units)."""
    out = np.zeros((len(updates), anatomy.units), dtype=np.int64)
    for k, update in enumerate(updates.values()):
        for name, direction in update.items():
            out[k, anatomy.places[name]] = anatomy.sums(name, direction != 0).cpu().numpy()
    return out


def split(
    anatomy: Anatomy, products: Array, counts: NDArray[np.int64], model: QuadraticModel, domain: str
) -> Attribution:
    """The tables of one objective on one domain from `unit_products` (updates, 2, units), held against the quadratic model.

    Raises InputError for parts that do not sum to what the jets say: such numbers are not reported.
    """
    cells = pd.DataFrame(
        [check(model, domain, name, *products[k].sum(-1).tolist()) for k, name in enumerate(model.names)]
    )
    tables = {}
    for what, fields in (
        ("modules", ("layer", "module")),
        ("heads", ("layer", "kind", "head")),
        ("channels", ("layer", "expert", "channel")),
    ):
        keys, where, group = _groups(anatomy, fields)
        rows = []
        for k, name in enumerate(model.names):
            sums = [np.bincount(group, products[k, order, where], len(keys)) for order in (0, 1)]
            table = keys.assign(first=sums[0], second=sums[1])
            if what == "modules":
                table["parameters"] = np.bincount(group, counts[k, where], len(keys)).astype(np.int64)
            rows.append(_named(table, model.objective, name, domain))
        tables[what] = pd.concat(rows, ignore_index=True)
    return Attribution(cells, tables["modules"], tables["heads"], tables["channels"], anatomy.notes)


def _groups(anatomy: Anatomy, fields: Sequence[str]) -> tuple[pd.DataFrame, NDArray[np.intp], NDArray[np.intp]]:
    """Distinct values of some labels in order, the units that have the last one, and the group of each of these units."""
    where = np.flatnonzero(anatomy.labels[fields[-1]] >= 0)
    code = np.zeros(len(where), dtype=np.int64)
    for f in fields:
        labels = anatomy.labels[f][where].astype(np.int64) + 1
        code = code * (labels.max(initial=0) + 1) + labels
    _, first, group = np.unique(code, return_index=True, return_inverse=True)
    keys = pd.DataFrame({f: anatomy.labels[f][where[first]].astype(np.int64) for f in fields})
    for f, names in (("module", MODULES), ("kind", KINDS)):
        if f in fields:
            keys[f] = np.array(names, dtype=object)[keys[f].to_numpy()]
    return keys, where, group


def _named(table: pd.DataFrame, objective: str, update: str, domain: str) -> pd.DataFrame:
    names = pd.DataFrame({"objective": objective, "update": update, "domain": domain}, index=table.index)
    return pd.concat([names, table], axis=1)


def join(parts: Sequence[Attribution]) -> Attribution:
    """The rows of several attributions in one."""
    cells, modules, heads, channels = (
        pd.concat([getattr(p, f) for p in parts], ignore_index=True) for f in ("cells", "modules", "heads", "channels")
    )
    return Attribution(cells, modules, heads, channels, tuple(dict.fromkeys(n for p in parts for n in p.notes)))


def check(model: QuadraticModel, domain: str, update: str, first: float, second: float) -> dict[str, str | float]:
    """A row of `cells`; InputError where the sums of parts are not what the jets say.

    The allowance is TOLERANCE of |first| + |second|, or the rounding of the per-sequence terms where these nearly cancel
    (`rounding` is then true).
    """
    jets = model.predict({update: 1.0})
    difference = max(abs(first - jets.first), abs(second - jets.second))
    scale = abs(jets.first) + abs(jets.second)
    sizes = sum(float(np.abs(terms).sum()) for terms in sequence_changes(model, update))
    if not difference <= max(TOLERANCE * scale, _ROUNDING * sizes):
        raise InputError(
            got=f"parts of {update} on {domain} ({model.objective}) that sum to {first:.6g} and {second:.6g} where the jets "
            f"give {jets.first:.6g} and {jets.second:.6g}",
            expected=f"agreement to {TOLERANCE:g} of the change: reverse mode is wrong for this model, or the jets are",
            remedy="use dtype float64 to see whether it is rounding; nothing but the split depends on it",
        )
    return {
        "objective": model.objective,
        "update": update,
        "domain": domain,
        "first": first,
        "second": second,
        "jets_first": jets.first,
        "jets_second": jets.second,
        "disagreement": difference / scale if scale else (float("inf") if difference else 0.0),
        "rounding": difference > TOLERANCE * scale,
    }


def sequence_changes(model: QuadraticModel, update: str) -> tuple[Array, Array]:
    """Contributions of every sequence to the first and second order of the change at coefficient 1, (S,) each."""
    k, terms = model.names.index(update), model.terms
    whole = terms.denominator.sum()
    return terms.slope[:, k] / whole, 0.5 * terms.curvature[:, k, k] / whole


def attribute_tokens(
    base: Model,
    updates: Mapping[str, NamedChanges],
    domain: Domain,
    objective: str = "nll",
    *,
    sequences: Sequence[int] | None = None,
    engine: str = "taylor",
    batch_tokens: int = 4096,
) -> pd.DataFrame:
    """Contributions of single response tokens to the predicted change of a domain; over all sequences they sum to the whole.

    With d1, d2, fisher the token jets, s1 the sum of d1 over the sequence, c_i = first_order_weights and N the response tokens:

        nll        first = -d1 / N     second = -d2 / (2 N)
        reward     first = c_i d1      second = c_i (d2 + s1 d1) / 2
        surrogate  first = c_i d1      second = c_i (d2 + d1^2) / 2
        kl         first = 0           second = fisher / (2 N)

    sequences: places in the domain (default: all). A table: objective, update, domain, prompt_id, sequence (the place), position
    in the response, token_id, first, second, sequence_first, sequence_second (sums over the sequence's tokens).
    """
    kind(objective)
    expansion.check_domain(base, domain, objective)
    chosen = list(range(len(domain.sequences))) if sequences is None else [int(i) for i in sequences]
    odd = [i for i in chosen if not 0 <= i < len(domain.sequences)]
    if odd or not chosen:
        raise InputError(
            got=f"sequence {odd[0]}" if odd else "no sequences",
            expected=f"places from 0 to {len(domain.sequences) - 1}",
            remedy="give places in domain.sequences",
        )
    aligned, weights = expansion.align(base, updates), sequence_weights(objective, domain)
    picked, tables = [domain.sequences[i] for i in chosen], []
    with base.untouched():
        for batch in data.batches(picked, base.pad, batch_tokens):
            jets, _ = token_jets(base, list(aligned.values()), batch, pairs=False, engine=engine)
            d1, d2, fisher = (x.double().cpu().numpy() for x in (jets.d1, jets.d2, jets.fisher))
            row, column = batch.targets.numpy().nonzero()
            place = np.array([chosen[i] for i in batch.index])[row]
            keys = pd.DataFrame(
                {
                    "prompt_id": [domain.sequences[i].prompt_id for i in place],
                    "sequence": place,
                    "position": column - np.array([len(domain.sequences[i].prompt) for i in place]),
                    "token_id": batch.input_ids[batch.targets].numpy(),
                }
            )
            for k, name in enumerate(aligned):
                first, second = _token_terms(objective, weights[place], d1[k], d2[k], fisher[k], row)
                sums = [np.bincount(row, x)[row] for x in (first, second)]
                table = keys.assign(first=first, second=second, sequence_first=sums[0], sequence_second=sums[1])
                tables.append(_named(table, objective, name, domain.name))
    whole = pd.concat(tables, ignore_index=True)
    order = {name: k for k, name in enumerate(aligned)}
    by = pd.DataFrame({"k": whole["update"].map(order), "s": whole["sequence"], "p": whole["position"]})
    return whole.loc[by.sort_values(["k", "s", "p"]).index].reset_index(drop=True)


def _token_terms(
    objective: str, c: Array, d1: Array, d2: Array, fisher: Array, row: NDArray[np.intp]
) -> tuple[Array, Array]:
    if objective == "kl":
        return np.zeros_like(d1), 0.5 * c * fisher
    if objective == "nll":
        return c * d1, 0.5 * c * d2
    other = d1 if objective == "surrogate" else np.bincount(row, d1)[row]
    return c * d1, 0.5 * c * (d2 + other * d1)


def examples(model: QuadraticModel, update: str, domain: Domain, hurt: int = 3, helped: int = 1) -> list[int]:
    """Places of the distinct sequences that the update hurts most and, last, helps most: worst first, none twice."""
    sign = 1.0 if kind(model.objective).better == "lower" else -1.0
    damage = sign * np.sum(sequence_changes(model, update), axis=0)
    _, where = domain.distinct()
    first_of = dict(reversed([(place, i) for i, place in enumerate(where)]))
    ordered = sorted(first_of.values(), key=lambda i: (-damage[i], i))
    return ordered if len(ordered) <= hurt + helped else [*ordered[:hurt], *ordered[len(ordered) - helped :]]
