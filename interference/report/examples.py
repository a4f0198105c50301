"""Example responses whose tokens are coloured by their part of the predicted change.

Texts are the user's: they are only ever handed to the template as text, which escapes them; here, what a reader could not
see (line ends, control characters, directional overrides) becomes visible.
"""

from __future__ import annotations

import unicodedata
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.colors import to_hex

from figures import style
from figures.data import Quantity
from interference.report.numbers import number

LEVELS = 4
"""Steps of colour on either side of zero."""

UNDERLINED = 2
"""First step that is underlined, so that it can be seen without colour."""

LONGEST_PROMPT = 600
LONGEST_RESPONSE = 300
_QUANTILE = 0.98


class Shade(NamedTuple):
    """A patch of the legend: its class in the style sheet and the value in its middle."""

    kind: str
    text: str


class Token(NamedTuple):
    """`kind`: its class in the style sheet ("" near zero); `text`: visible text; `about`: its numbers, a tooltip."""

    kind: str
    text: str
    about: str


class Example(NamedTuple):
    """One response. `before` and `after` say what was left out on either side ("" where nothing was)."""

    heading: str
    prompt: str
    tokens: list[Token]
    before: str
    after: str


class Examples(NamedTuple):
    """The responses of one cell on one scale; `unit` of the legend's numbers; `threshold` from which tokens are underlined."""

    shades: list[Shade]
    unit: str
    threshold: str
    shown: list[Example]


class _Scale(NamedTuple):
    end: float
    power: int
    decimals: int
    about: Quantity

    def text(self, value: float) -> str:
        return style.signed(value / 10.0**self.power, self.decimals)

    def kind(self, change: float) -> str:
        level = min(LEVELS, round(LEVELS * abs(change) / self.end)) if self.end > 0 else 0
        return "" if level == 0 else ("hurt" if self.about.harm(change) > 0 else "helped") + str(level)


def examples(cell: pd.DataFrame, about: Quantity) -> Examples | None:
    """The example responses of one cell, worst hurt first; None where there are none.

    The colours end at the 98th percentile of the sizes of the tokens' parts in this cell, so that a single token does not
    pale all others; a part beyond it has the end colour.

    Args:
        cell: rows of `figures.parts.parts_of` the tokens.
        about: the objective.
    """
    if cell.empty:
        return None
    cell = cell.fillna({"text": "", "prompt": ""})
    end = float(np.quantile(cell["change"].abs(), _QUANTILE))
    end = end if end > 0 else float(cell["change"].abs().max())
    power, decimals = style.scale_of([end])
    scale = _Scale(end, power, decimals, about)
    groups = [group.sort_values("position") for _, group in cell.groupby(["rank", "sequence"], sort=True)]
    values = [end * k / LEVELS for k in range(-LEVELS, LEVELS + 1)]
    threshold = number(end * (UNDERLINED - 0.5) / LEVELS / 10.0**power)
    return Examples(
        [Shade(scale.kind(v), scale.text(v)) for v in values],
        f"{style.times_power(power)}{about.unit}",
        threshold,
        [_example(group, scale, len(groups)) for group in groups],
    )


def _example(rows: pd.DataFrame, scale: _Scale, of: int) -> Example:
    row = rows.iloc[0]
    first, second = float(row["sequence_first"]), float(row["sequence_second"])
    heading = (
        f"{row['rank']} of {of}: prompt {visible(str(row['prompt_id']))}. This response adds {scale.text(first + second)} "
        f"(first order {scale.text(first)}, second order {scale.text(second)})"
    )
    start, stop = _window(rows["change"].to_numpy(float))
    tokens = [_token(r, scale) for r in rows.iloc[start:stop].to_dict("records")]
    before, after = (_left_out(part, scale) for part in (rows.iloc[:start], rows.iloc[stop:]))
    return Example(heading, visible(shorten(str(row["prompt"]))), tokens, before, after)


def _token(row: dict[Any, Any], scale: _Scale) -> Token:
    text = visible(str(row["text"])) or f"[{row['token_id']}]"
    if row["text"] and not str(row["text"]).strip(" "):
        text = "␣" * len(row["text"])
    parts = f"first order {scale.text(row['first'])}, second order {scale.text(row['second'])}"
    about = f"{scale.text(row['change'])} = {parts}; token {row['token_id']} at position {row['position']}"
    return Token(scale.kind(row["change"]), text, about)


def _window(change: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[int, int]:
    """The stretch of at most `LONGEST_RESPONSE` tokens that holds most of what moves."""
    if len(change) <= LONGEST_RESPONSE:
        return 0, len(change)
    sums = np.concatenate([[0.0], np.cumsum(np.abs(change))])
    start = int(np.argmax(sums[LONGEST_RESPONSE:] - sums[:-LONGEST_RESPONSE]))
    return start, start + LONGEST_RESPONSE


def _left_out(rows: pd.DataFrame, scale: _Scale) -> str:
    if rows.empty:
        return ""
    return f"{len(rows)} token{'s' * (len(rows) > 1)} left out, together {scale.text(rows['change'].sum())}"


def shorten(text: str, limit: int = LONGEST_PROMPT) -> str:
    """A text of about `limit` characters; the middle goes, and how much of it is said.

    >>> shorten("abcdefghij", 4)
    'ab … [6 characters left out] … ij'
    """
    if len(text) <= limit:
        return text
    head, tail = limit - limit // 2, limit // 2
    return f"{text[:head]} … [{len(text) - limit} characters left out] … {text[len(text) - tail :]}"


def visible(text: str) -> str:
    """The text with its line ends, tabs, control and formatting characters shown by visible ones; line ends stay beside theirs.

    >>> visible("a\\n\\tb\\x00\\u202ec")
    'a⏎\\n⇥b⟨U+0000⟩⟨U+202E⟩c'
    """
    return "".join(_seen(c) for c in text)


def _seen(character: str) -> str:
    if character == "\n":
        return "⏎\n"
    if character == "\t":
        return "⇥"
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return f"⟨U+{ord(character):04X}⟩"
    return character


def style_sheet() -> str:
    """Rules for the classes hurt1 ... hurt4 and helped1 ... helped4, from the colours of the figures."""
    shades, rules = style.diverging("higher"), []
    for side, turn in (("hurt", -0.5), ("helped", 0.5)):
        for level in range(1, LEVELS + 1):
            color = to_hex(shades(0.5 + turn * level / LEVELS))
            ink = style.PAPER if level == LEVELS else style.INK
            line = (
                f" text-decoration: underline {'solid' if side == 'hurt' else 'dotted'};" if level >= UNDERLINED else ""
            )
            rules.append(f".{side}{level} {{ background: {color}; color: {ink};{line} }}")
    return "\n".join(rules) + "\n"
