"""How the models of a probe run are told apart: each has a colour, a marker and a line, the same in every figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures import style

BASE = "base"
_EXPERTS = ("#0b62a8", "#c8540a", "#1a936f", "#a8326b", "#7a6a00", "#4f4f9a", "#2a8fa8", "#8a4b2a")
_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">")
_OTHERS = {"multi": ("#6b3fa0", "#9c7cc4", "#3c2260"), "merged": (style.INK, "#5a5a5a", "#8a8a8a")}
_OTHER_MARKERS = {"multi": ("*", "p", "H"), "merged": ("h", "8", "d")}


class Look(NamedTuple):
    """How a model is drawn; the base is hollow and dashed."""

    color: str
    marker: str
    hollow: bool

    @property
    def point(self) -> dict[str, Any]:
        """Arguments of a point without a line."""
        size = 8.5 if self.marker == "*" else 5.5
        face = style.PAPER if self.hollow else self.color
        return {
            "linestyle": "none",
            "marker": self.marker,
            "color": self.color,
            "markerfacecolor": face,
            "markersize": size,
        }


def looks(results: Mapping[str, Any]) -> dict[str, Look]:
    """The look of the base and of every model, in the order of the run: experts, multi-task and merged ones differ in kind."""
    kinds = results.get("kinds") or {}
    out = {BASE: Look(style.MUTED, "o", True)}
    count: dict[str, int] = {}
    for name in results.get("models", []):
        kind = kinds.get(name, "expert")
        k = count[kind] = count.get(kind, -1) + 1
        colors, markers = _OTHERS.get(kind, _EXPERTS), _OTHER_MARKERS.get(kind, _MARKERS)
        out[str(name)] = Look(colors[k % len(colors)], markers[k % len(markers)], False)
    return out


def domains_of(results: Mapping[str, Any]) -> list[str]:
    """Names of the domains in the order in which the run was asked for them."""
    return [str(name) for name in results.get("domains", [])]


def key(
    figure: Figure,
    known: Mapping[str, Look],
    names: Sequence[str],
    more: Sequence[tuple[Any, str]] = (),
    columns: int = 5,
) -> None:
    """A key above the figure: the models `names`, then other handles with their labels."""
    handles: list[Any] = [Line2D([], [], **known[name].point) for name in names]
    labels = [style.shorten(name, 16) for name in names]
    handles += [handle for handle, _ in more]
    labels += [label for _, label in more]
    widest = 0.064 * max(map(len, labels)) + 0.55  # inches, at 8 points, with the handle and a gap
    fitting = max(1, min(columns, len(labels), int(figure.get_figwidth() / widest)))
    place: dict[str, Any] = {"loc": "outside upper center", "columnspacing": 1.3, "handletextpad": 0.5}
    figure.legend(handles, labels, ncols=fitting, **place)
