"""Small multiples, one panel per cell: rows updates, columns domains; or one update's cells wrapped to the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures import style
from figures.data import order

WIDEST = 5
"""Most domains whose panels fit beside each other at page width."""


class Panel(NamedTuple):
    """An empty, named panel: its axes and its cell; `first` of its row, `last` of its column; its title so far."""

    ax: Axes
    update: str
    domain: str
    first: bool
    last: bool
    title: str


def page(
    results: Mapping[str, Any], update: str | None, tall: float, wide: float, extra: float, *, sharey: bool = True
) -> tuple[Figure, list[Panel]]:
    """The page with one panel per cell, a domain's own cell framed.

    Args:
        results: `Run.results`.
        update: draw the cells of this one alone, in rows of four where there are more than `WIDEST`.
        tall, wide: inches of a panel, at least; panels widen to fill the page.
        extra: inches for what stands above and below all panels.
        sharey: one scale for all panels; else each has its own.
    """
    updates, domains = order(results)
    shown = updates if update is None else [update]
    wrapped = update is not None and len(domains) > WIDEST
    columns = 4 if wrapped else len(domains)
    places = [(u, d) for u in shown for d in domains]
    rows = -(-len(places) // columns)
    figure = style.new_figure(tall * rows + extra, max(style.WIDTH, wide * columns + 0.9))
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=sharey).ravel())
    panels = []
    for k, (ax, (u, d)) in enumerate(zip(axes, places, strict=False)):
        first, named = k % columns == 0, k < columns or wrapped
        panels.append(Panel(ax, u, d, first, k + columns >= len(places), style.shorten(d, 16) if named else ""))
        if first and not wrapped:
            ax.set_ylabel(style.shorten(u, min(16, int(12 * tall))), fontsize=9)
        if u == d:
            for spine in ax.spines.values():
                spine.set(visible=True, edgecolor=style.INK, linewidth=1.2)
    for ax in axes[len(places) :]:
        ax.set_axis_off()
    return figure, panels


class Place(NamedTuple):
    """An empty panel among `wrapped` ones; `first` of its row, `last` of its column."""

    ax: Axes
    first: bool
    last: bool


def wrapped(count: int, tall: float, wide: float, extra: float) -> tuple[Figure, list[Place]]:
    """A page of `count` equal panels in rows of four, which share their axes; of three where that leaves fewer gaps.

    Args:
        count: how many panels, at least one.
        tall, wide: inches of a panel, at least; panels widen to fill the page.
        extra: inches for what stands above and below all panels.
    """
    columns = min(count, 3 if count in (3, 5, 6, 9) else 4)
    rows = -(-count // columns)
    figure = style.new_figure(tall * rows + extra, max(style.WIDTH, wide * columns + 0.9))
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel())
    for ax in axes[count:]:
        ax.set_axis_off()
    return figure, [Place(ax, k % columns == 0, k + columns >= count) for k, ax in enumerate(axes[:count])]


def heading(panels: Sequence[Panel], update: str | None) -> str:
    """What rows, columns and frames of such a page are."""
    alone = len({p.update for p in panels}) == 1
    where = f"trained on {style.shorten(panels[0].update, 24)}" if alone else "rows: trained on"
    columns = "columns" if update is None else "panels"
    own = "; framed: the domain's own update" if any(p.update == p.domain for p in panels) else ""
    return f"{where}; {columns}: changed{own}"
