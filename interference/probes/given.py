"""Verdicts that another server made, put beside the responses that they are about."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from interference.errors import InputError
from interference.probes.verdicts import Verdict, given_verdict


def match(
    rows: Sequence[Mapping[str, Any]],
    responses: Sequence[Mapping[str, Any]],
    source: str = "verdicts",
    *,
    left_out: Collection[str] = (),
) -> list[Verdict]:
    """One verdict for every response, in the order of the responses.

    A row is {prompt_id, response or index, and what `given_verdict` reads}: it names its response by the text, or by its place
    among the responses of its prompt, counted from 0. Where several responses of a prompt have the same text, one row may
    stand for all of them, or there is one row each, in their order.

    Args:
        rows: the verdicts.
        responses: rows {prompt_id, response, ...}.
        source: what errors call the verdicts.
        left_out: ids of prompts that are not used; their verdicts are passed over.

    Raises:
        InputError: a row about no response, two rows about one, and responses without a verdict.
    """
    places: dict[str, list[int]] = {}
    for place, response in enumerate(responses):
        places.setdefault(str(response["prompt_id"]), []).append(place)
    found: dict[int, Verdict] = {}
    by_text: dict[tuple[str, str], list[Verdict]] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{source}, row {number}"
        verdict, prompt = given_verdict(row, where), str(row.get("prompt_id"))
        if row.get("prompt_id") is not None and prompt in left_out:
            continue
        if prompt not in places:
            raise InputError(
                got=f"{where}: prompt_id {row.get('prompt_id')!r}, of which there are no responses",
                expected="the prompt_id of one of the responses that were judged",
                remedy="write the prompt_id of the rollouts into every row",
            )
        if ("index" in row) == ("response" in row):
            raise InputError(
                got=f"{where} with keys {sorted(row)}",
                expected="`response` (its text) or `index` (its place among the responses of its prompt, from 0)",
                remedy="say in every row which response was judged, in one way",
            )
        if "response" in row:
            by_text.setdefault((prompt, _text(row["response"], places[prompt], responses, where)), []).append(verdict)
            continue
        place = _place(row["index"], places[prompt], where)
        if place in found:
            raise InputError(got=f"{where}: a second verdict", expected="one for each response", remedy="remove one")
        found[place] = verdict
    _spread(by_text, places, responses, found, source)
    _check_all(found, responses, source)
    return [found[place] for place in range(len(responses))]


def _text(text: object, places: Sequence[int], responses: Sequence[Mapping[str, Any]], where: str) -> str:
    if not any(responses[place]["response"] == text for place in places):
        raise InputError(
            got=f"{where}: response {str(text)[:60]!r}, which its prompt does not have",
            expected="the very text of one of the responses to that prompt",
            remedy="copy the response unchanged from the rollouts, or give its `index`",
        )
    return str(text)


def _place(index: object, places: Sequence[int], where: str) -> int:
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(places):
        raise InputError(
            got=f"{where}: index {index!r}",
            expected=f"a whole number from 0 to {len(places) - 1}: its prompt has {len(places)} responses",
            remedy="count the responses of each prompt from 0, in the order of the rollouts",
        )
    return places[index]


def _spread(
    by_text: Mapping[tuple[str, str], Sequence[Verdict]],
    places: Mapping[str, Sequence[int]],
    responses: Sequence[Mapping[str, Any]],
    found: dict[int, Verdict],
    source: str,
) -> None:
    """Verdicts that name their response by its text: one for all equal responses of a prompt, or one each."""
    for (prompt, text), verdicts in by_text.items():
        equal = [place for place in places[prompt] if responses[place]["response"] == text]
        if len(verdicts) not in (1, len(equal)) or any(place in found for place in equal):
            raise InputError(
                got=f"{source}: {len(verdicts)} verdicts on {text[:60]!r}, which answers {prompt!r} {len(equal)} times",
                expected="one verdict for all equal responses of a prompt, or one for each",
                remedy="remove those that are too many, or name each response by its `index`",
            )
        found |= dict(zip(equal, verdicts if len(verdicts) > 1 else [verdicts[0]] * len(equal), strict=True))


def _check_all(found: Mapping[int, Verdict], responses: Sequence[Mapping[str, Any]], source: str) -> None:
    lacking = [place for place in range(len(responses)) if place not in found]
    if lacking:
        first = responses[lacking[0]]
        raise InputError(
            got=f"{source}: no verdict on {len(lacking)} of {len(responses)} responses, the first to {first['prompt_id']!r}: "
            f"{str(first['response'])[:60]!r}",
            expected="a verdict on every response",
            remedy="judge the missing ones too, or leave these verdicts out so that all are judged here",
        )
