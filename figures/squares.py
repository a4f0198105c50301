"""Squares of a heatmap with numbers in them; hatched where the number is not beyond noise or chance."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from figures import style

Color = tuple[float, ...]

_HATCH, _LINES = "/////", "#b9b9b9"


def square(ax: Axes, x: float, y: float, fill: Color, *, hatched: bool = False) -> None:
    """Draw the unit square whose upper left corner is (x, y)."""
    ax.add_patch(Rectangle((x, y), 1, 1, facecolor=fill, edgecolor=style.PAPER, linewidth=1.2))
    if hatched:
        ax.add_patch(Rectangle((x, y), 1, 1, fill=False, hatch=_HATCH, edgecolor=_LINES, linewidth=0))


def write(ax: Axes, x: float, y: float, text: str, fill: Color, *, hatched: bool = False) -> None:
    """Write `text` into the square at (x, y).

    On hatching it stands on a patch of the square's own colour, so that no line crosses it.
    """
    back = {"facecolor": fill, "edgecolor": "none", "pad": 1.2} if hatched else None
    middle = (x + 0.5, y + 0.5)
    ax.text(*middle, text, color=ink_on(fill), bbox=back, ha="center", va="center", linespacing=1.25, fontsize=8)


def bare(ax: Axes) -> None:
    """Take away ticks and frame, which squares do not need."""
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


def in_key() -> Patch:
    """What a hatched square looks like in a key."""
    return Patch(facecolor="#f3f3f3", edgecolor=_LINES, hatch=_HATCH, linewidth=0)


def ink_on(fill: Color) -> str:
    """Dark or light ink, whichever reads on `fill`.

    >>> ink_on((1.0, 1.0, 1.0)) == style.INK, ink_on((0.0, 0.0, 0.4)) == style.PAPER
    (True, True)
    """
    red, green, blue = fill[:3]
    return style.PAPER if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else style.INK
