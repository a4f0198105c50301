"""The records that say where predicted changes come from: tables/attribution_*.parquet, and `attribution` of results.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from interference import anatomy as anatomies
from interference import attribution, evaluation, records, stages
from interference.domain import Domain
from interference.errors import InputError
from interference.quadratic import QuadraticModel
from interference.stages import Work

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def explain(work: Work, models: Mapping[str, Mapping[str, QuadraticModel]]) -> dict[str, Any]:
    """The tables of {objective: {domain: model}}, and what results.json says of them: `attribution`, or nothing.

    Nothing where the request does not ask for it. Where it fails (a model without Hessian-vector products, parts that do not
    sum to what the jets say) there are no tables either, never wrong ones: the first note says why, and the run goes on, since
    nothing else depends on the split.
    """
    if work.config.attribution:
        try:
            return {"attribution": write(work, models)}
        except InputError as error:
            note = f"attribution left out: {error}"
            work.say(note)
            work.inputs.notes.insert(0, note)
    for what in records.ATTRIBUTION:  # of an interrupted run that got further, or was asked for them
        (work.folder / "tables" / f"attribution_{what}.parquet").unlink(missing_ok=True)
    return {}


def write(work: Work, models: Mapping[str, Mapping[str, QuadraticModel]]) -> list[dict[str, Any]]:
    """Write attribution_modules, _heads, _channels and _tokens for {objective: {domain: model}}; return the checked cells.

    Raises InputError as `attribution.attribute` does; then no table was written.
    """
    anatomy = anatomies.read(work.model)
    counts = attribution.changed(anatomy, work.updates)
    parts, tokens = [], []
    for objective, domains in models.items():
        for name, model in domains.items():
            products = stages.unit_products(work, anatomy, objective, name)
            parts.append(attribution.split(anatomy, products, counts, model, name))
            tokens.append(_examples(work, objective, name, model))
    whole = attribution.join(parts)
    tables = {what: getattr(whole, what) for what in ("modules", "heads", "channels")}
    for what, table in (tables | {"tokens": pd.concat(tokens, ignore_index=True)}).items():
        records.write_table(work.folder / "tables" / f"attribution_{what}.parquet", table)
    work.inputs.notes.extend(f"attribution: {note}" for note in whole.notes)
    return [{k: evaluation.number(v) for k, v in row.items()} for row in evaluation.records(whole.cells)]


def _examples(work: Work, objective: str, name: str, model: QuadraticModel) -> pd.DataFrame:
    """Tokens of the sequences that every update hurts most, and of the one that it helps most."""
    domain = work.inputs.data[objective, name]
    chosen = {update: attribution.examples(model, update, domain) for update in model.names}
    table = stages.example_tokens(work, objective, name, chosen)
    ranks = {(update, place): rank for update, places in chosen.items() for rank, place in enumerate(places, start=1)}
    at = [ranks[key] for key in zip(table["update"], table["sequence"], strict=True)]
    return _worded(table.assign(domain=name, rank=at), domain, work.inputs.tokenizer)


def _worded(table: pd.DataFrame, domain: Domain, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """The table in the record's order of columns, with every token and every prompt as text."""

    def decode(ids: tuple[int, ...]) -> str:
        return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    text = {i: decode((i,)) for i in table["token_id"].unique().tolist()}
    prompt = {i: decode(domain.sequences[i].prompt) for i in table["sequence"].unique().tolist()}
    table = table.assign(text=table["token_id"].map(text), prompt=table["sequence"].map(prompt))
    columns = [
        "objective", "update", "domain", "prompt_id", "sequence", "rank", "position", "token_id", "text", "prompt",
        "first", "second", "sequence_first", "sequence_second",
    ]  # fmt: skip
    return table[columns].sort_values(["update", "rank", "position"], kind="stable", ignore_index=True)
