"""The one look of every figure: sizes, fonts, colours, number formats, saving.

Two meanings carry all colour. In matrices blue says *helped* and orange says *hurt*, whatever the objective's own sign.
In line and point plots a predictor keeps its colour, line style and marker everywhere. Both read without colour: matrices
carry signed numbers, predictors differ by marker and line style. What is neither good nor bad, such as the share of weights
that changed, has other colours: teal for much or for the same direction, purple for the opposite direction.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

WIDTH = 7.0
"""Inches; the text width of a page, at which every font is at least 8 points."""

Z90 = 1.6448536269514722
"""Half width of a central 90 % normal interval in standard errors."""

INK, MUTED, FAINT, PAPER = "#222222", "#6b6b6b", "#d4d4d4", "#ffffff"
HELPED, HURT = "#1f5c99", "#b0500f"
SAME, OPPOSITE = "#0f6b5f", "#6b3fa0"

_RC: dict[Any, Any] = {
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans", "Helvetica Neue", "Arial"],  # the first one comes with matplotlib
    "font.size": 8.5,
    "axes.titlesize": 9.0,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.4,
    "hatch.linewidth": 0.5,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "savefig.dpi": 200,
    "text.parse_math": False,  # names are the user's: a dollar sign is a dollar sign
    "axes.unicode_minus": True,
    "svg.fonttype": "none",  # text stays text: selectable, searchable, small
    "svg.hashsalt": "interference",  # the same record gives the same bytes
}


LineStyle = Literal["-", "--", ":", "-."]


class Predictor(NamedTuple):
    """How one predictor is called and drawn; `ours` is False for the baselines a user would try."""

    label: str
    color: str
    line: LineStyle
    marker: str
    ours: bool


PREDICTORS: dict[str, Predictor] = {
    "third_order": Predictor("third order (alpha ≤ 0.5)", "#6b3fa0", "-.", "v", True),
    "second_order": Predictor("second order (Hessian)", "#0b62a8", "-", "o", True),
    "second_order_ggn": Predictor("second order (GGN)", "#1a936f", "--", "s", True),
    "first_order": Predictor("first order", "#c8540a", ":", "^", True),
    "gradient_cosine": Predictor("gradient cosine", MUTED, "-", "D", False),
    "update_cosine": Predictor("update cosine", MUTED, "-", "D", False),
    "update_norm": Predictor("update norm", MUTED, "-", "D", False),
    "kl": Predictor("KL(base, tuned)", MUTED, "-", "D", False),
}

FORECASTS: dict[str, Predictor] = {
    "virtual": Predictor("forecast: virtual", "#a3195b", "-", "P", True),
    "pilot": Predictor("forecast: pilot", "#7a5c00", "--", "X", True),
    "gradient": Predictor("forecast: gradient", "#0a7380", ":", "p", True),
    "importance": Predictor("importance weights", "#444444", "-.", "h", True),
}
"""Tiers of forecasts, which know no trained model, and the known update's effect by importance weights."""


def predictor(name: str) -> Predictor:
    """The look of a predictor; one that is not known here is drawn as a baseline under its own name."""
    known = PREDICTORS | FORECASTS
    return known.get(name, Predictor(name.replace("_", " "), MUTED, "-", "D", False))


_F = TypeVar("_F", bound=Callable[..., Figure])


def styled(draw: _F) -> _F:
    """Run a drawing function under the style without touching the caller's settings."""

    @functools.wraps(draw)
    def wrapped(*args: object, **kwargs: object) -> Figure:
        with mpl.rc_context(_RC):
            return draw(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


def new_figure(
    height: float, width: float = WIDTH, *, layout: Literal["constrained", "compressed"] = "constrained"
) -> Figure:
    """An empty figure in inches that arranges itself; it belongs to no window and to no pyplot state."""
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def diverging(better: str) -> LinearSegmentedColormap:
    """Orange to white to blue with blue for *helped*: positive if `better` is "higher", negative if "lower".

    >>> diverging("higher")(1.0) == diverging("lower")(0.0)
    True
    """
    colors = [HURT, "#e39a55", "#f7d9b8", "#f8f8f6", "#c3dcf0", "#6aa7d6", HELPED]
    return LinearSegmentedColormap.from_list("hurt-helped", colors if better == "higher" else colors[::-1], N=121)


def share_colours() -> LinearSegmentedColormap:
    """White to dark teal, for shares and overlaps."""
    return LinearSegmentedColormap.from_list("share", ["#f8f8f6", "#c5e3dc", "#6db6a8", SAME, "#073f37"], N=121)


def direction_colours() -> LinearSegmentedColormap:
    """Purple to white to teal: opposite to same direction."""
    colors = [OPPOSITE, "#a98bcb", "#ddd0ec", "#f8f8f6", "#c5e3dc", "#6db6a8", SAME]
    return LinearSegmentedColormap.from_list("direction", colors, N=121)


def colour_bar(
    figure: Figure, axes: Sequence[Axes], shades: ScalarMappable, marks: dict[float, str], clipped: bool, pad: float
) -> Colorbar:
    """A horizontal bar under the axes, with labels at `marks`; pointed ends where colours are `clipped`."""
    bar = figure.colorbar(
        shades,
        ax=list(axes),
        orientation="horizontal",
        extend="both" if clipped else "neither",
        fraction=0.05,
        aspect=38,
        shrink=0.72,
        pad=pad,
    )
    bar.solids.set_rasterized(False)  # type: ignore[union-attr]  # vector, as everything else
    bar.solids.set_edgecolor("face")  # type: ignore[union-attr]  # no hairlines between the steps in vector output
    bar.outline.set_visible(False)
    bar.set_ticks(list(marks), labels=list(marks.values()))
    return bar


def signed(value: float, decimals: int) -> str:
    """A number with its sign and a true minus; zero after rounding has no sign.

    >>> signed(0.1234, 2), signed(-0.5, 1), signed(-0.0001, 2)
    ('+0.12', '−0.5', '0.00')
    """
    text = f"{value:+.{decimals}f}"
    if float(text) == 0:
        return text[1:]
    return text.replace("-", "−")


def plain(value: float, decimals: int) -> str:
    """A number with a true minus and no plus.

    >>> plain(-0.25, 2), plain(1.0, 1)
    ('−0.25', '1.0')
    """
    return f"{value:.{decimals}f}".replace("-", "−")


def percent(share: float) -> str:
    """A share in per cent to two digits, whole from 10 % on.

    >>> percent(0.456), percent(0.0123), percent(float("nan"))
    ('46 %', '1.2 %', '–')
    """
    if not math.isfinite(share):
        return "–"
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.2g} %"


def shorten(name: str, limit: int = 16) -> str:
    """A name of at most `limit` characters; the middle goes, because the ends tell names apart.

    >>> shorten("instruction-following-v2", 12)
    'instru…ng-v2'
    """
    name = " ".join(name.split())
    if len(name) <= limit:
        return name
    head = limit // 2
    return name[:head] + "…" + name[len(name) - (limit - head - 1) :]


def scale_of(values: Sequence[float], errors: Sequence[float] = ()) -> tuple[int, int]:
    """Power of ten to divide by and decimals to print: three digits of the largest value,
    and one more where an error would read as zero.

    >>> scale_of([0.123, -0.01]), scale_of([12.0]), scale_of([3e-6])
    ((0, 3), (0, 1), (-6, 2))
    >>> scale_of([0.123], errors=[0.0004, 0.0002])
    (0, 4)
    """
    largest = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    if largest == 0:
        return 0, 3
    digits = math.floor(math.log10(largest))
    power = 3 * math.floor(digits / 3) if digits < -2 or digits > 3 else 0
    decimals = min(3, max(0, 2 - (digits - power)))
    smallest = min((e for e in errors if math.isfinite(e) and e > 0), default=math.inf)
    if smallest / 10.0**power < 0.5 * 10.0**-decimals:
        decimals += 1
    return power, decimals


def times_power(power: int) -> str:
    """How a label says that its numbers are in units of 10**power.

    >>> times_power(-6), times_power(0)
    ('10⁻⁶ ', '')
    """
    return "" if power == 0 else "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")) + " "


def save(figure: Figure, folder: str | os.PathLike[str], name: str) -> tuple[Path, Path]:
    """Write `folder/name.svg` and `folder/name.png`, each whole or not at all; returns both paths.

    The svg carries no date, so the same figure is the same file.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    paths = (target / f"{name}.svg", target / f"{name}.png")
    with mpl.rc_context(_RC):
        engine = figure.get_layout_engine()
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # arranged once, not once per file
        for path in paths:
            part = path.with_name(path.name + ".part")
            kind = path.suffix[1:]
            figure.savefig(part, format=kind, metadata={"Date": None} if kind == "svg" else None)
            part.replace(path)
        figure.set_layout_engine(engine)
    return paths
