"""How the report writes numbers: a true minus, digits from the error bar, a dash where there is none."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, TypeGuard

NONE = "–"


def known(value: Any) -> TypeGuard[float]:
    """Is this a finite number, Python's or numpy's?"""
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _decimals(size: float, digits: int) -> int:
    if size == 0:
        return digits
    return min(12, max(0, digits - 1 - math.floor(math.log10(abs(size)))))


def _fixed(value: float, decimals: int, *, sign: bool) -> str:
    text = f"{value:{'+' if sign else ''}.{decimals}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def number(value: Any, digits: int = 3, *, sign: bool = False) -> str:
    """A number with so many significant digits.

    >>> number(0.12345), number(-1234.5), number(None), number(2e-7, sign=True)
    ('0.123', '−1234', '–', '+2.0e−07')
    """
    if not known(value):
        return NONE
    value = float(value)
    if value != 0 and not 1e-5 <= abs(value) < 1e7:
        return f"{value:{'+' if sign else ''}.{max(1, digits - 2)}e}".replace("-", "−")
    return _fixed(value, _decimals(value, digits), sign=sign)


def with_error(value: Any, stderr: Any, *, sign: bool = True) -> str:
    """A value and its standard error, both to the second digit of the error, kept on one line.

    >>> with_error(0.12345, 0.0123), with_error(-2.0, None), with_error(None, 0.1)
    ('+0.123\\xa0±\\xa00.012', '−2.00', '–')
    """
    if not known(value):
        return NONE
    if not known(stderr) or stderr <= 0 or abs(value) >= 1e7 or stderr < 1e-9:
        return number(value, sign=sign)
    decimals = _decimals(float(stderr), 2)
    return f"{_fixed(float(value), decimals, sign=sign)}\u00a0±\u00a0{_fixed(float(stderr), decimals, sign=False)}"


def interval(low: Any, high: Any) -> str:
    """An interval, to the second digit of its width.

    >>> interval(-0.01, 0.03), interval(None, 1.0)
    ('−0.010 to +0.030', '–')
    """
    if not known(low) or not known(high):
        return NONE
    decimals = _decimals(float(high) - float(low), 2) if high > low else 3
    return f"{_fixed(float(low), decimals, sign=True)} to {_fixed(float(high), decimals, sign=True)}"


def score(value: Any) -> str:
    """A score to two decimals.

    >>> score(0.956), score(-12.3), score(None)
    ('0.96', '−12.30', '–')
    """
    return _fixed(float(value), 2, sign=False) if known(value) else NONE


def percent(share: Any) -> str:
    """A share in per cent: whole from 10 % on, else two digits.

    >>> percent(0.4567), percent(0.01234), percent(None)
    ('46\\xa0%', '1.2\\xa0%', '–')
    """
    if not known(share):
        return NONE
    return f"{100 * share:.0f}\u00a0%" if abs(share) >= 0.0995 else f"{100 * share:.2g}\u00a0%"


def count(value: Any) -> str:
    """A whole number.

    >>> count(12345.0), count(None)
    ('12345', '–')
    """
    return str(round(float(value))) if known(value) else NONE


def luck(tests: int, two_sided: bool = False) -> str:
    """How many of so many 90 % intervals miss on one side by chance alone.

    >>> luck(40)
    ' (by chance alone about 2.0)'
    """
    return f" (by chance alone about {number(0.05 * tests, 2)}{' each' * two_sided})"
