"""One error type for everything that a user can put right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Input that this package cannot work with: what was got, what was expected, the remedy.

    The command line prints it without a traceback and exits with code 2.

    >>> print(InputError(got="limit: -3", expected="a positive number of sequences", remedy="set limit to 1 or more"))
    got limit: -3; expected a positive number of sequences. Remedy: set limit to 1 or more.
    """

    def __init__(self, *, got: str, expected: str, remedy: str) -> None:
        self.got, self.expected, self.remedy = got, expected, remedy
        super().__init__(f"got {got}; expected {expected}. Remedy: {remedy}.")

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.got, self.expected, self.remedy)


def _rebuild(got: str, expected: str, remedy: str) -> InputError:
    return InputError(got=got, expected=expected, remedy=remedy)


def nearest(word: str, known: Iterable[str]) -> str:
    """A phrase that names the known word nearest to `word`, or lists what is known.

    >>> nearest("modles", ["base_model", "models"])
    "did you mean 'models'?"
    >>> nearest("zzz", ["nll", "reward"])
    'known: nll, reward'
    """
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else "known: " + ", ".join(names)
