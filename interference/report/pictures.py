"""Figures ready for the page; those of one panel per cell on one page, or one for each update where domains are many."""

from __future__ import annotations

from collections.abc import Callable

from markupsafe import Markup
from matplotlib.figure import Figure

import figures
from figures.data import order
from figures.panels import WIDEST
from interference.records import Run
from interference.report import svg

Add = Callable[[str, Figure, str], Markup]
"""Save a figure under a name, with a description for those who cannot see it; returns it ready for the page."""


class Pictures:
    """Saves each figure in RUN/figures, its name after `prefix`, and returns it ready to stand in the page."""

    def __init__(self, run: Run, prefix: str) -> None:
        self.folder, self.prefix = run.path / "figures", prefix

    def add(self, name: str, figure: Figure, description: str) -> Markup:
        full = f"{self.prefix}_{name}"
        vector, _ = figures.save(figure, self.folder, full)
        return Markup(svg.inline(vector.read_text(encoding="utf-8"), full, description))


def of_cells(
    run: Run, add: Add, name: str, draw: Callable[[str | None], Figure], what: str, where: str
) -> list[Markup]:
    """The figure of all cells, or of each update's cells, ready for the page.

    Args:
        add: what saves them.
        name: of the file; numbered where there are several.
        draw: makes the figure of one update, of all for None.
        what: describes the figure, without the stop.
        where: a sentence that says where its numbers stand in words.
    """
    updates, domains = order(run.results)
    if len(domains) <= WIDEST:
        return [add(name, draw(None), f"{what}, one panel per cell. {where}")]
    return [
        add(f"{name}_{k + 1}", draw(update), f"{what}, trained on {update}, one panel per domain. {where}")
        for k, update in enumerate(updates)
    ]
