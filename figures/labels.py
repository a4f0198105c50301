"""Where to write labels beside points so that each has a free place, joined to its point by a leader line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

XY = tuple[float, float]

_FIRST_ANGLE = 135.0  # away from the line of equality, where points crowd
_ANGLES = [_FIRST_ANGLE + turn for k in range(12) for turn in (15.0 * k, 15.0 * k - 180.0)]
_DISTANCES = (11.0, 14.0, 18.0, 23.0, 29.0, 36.0, 44.0, 54.0, 66.0)


class Box(NamedTuple):
    """A rectangle; any unit, the same for everything that is placed together."""

    x0: float
    y0: float
    x1: float
    y1: float

    def overlaps(self, other: Box) -> bool:
        """Do the two share an area?"""
        return self.x0 < other.x1 and other.x0 < self.x1 and self.y0 < other.y1 and other.y0 < self.y1

    def within(self, other: Box) -> bool:
        """Does it lie in the other one?"""
        return other.x0 <= self.x0 and self.x1 <= other.x1 and other.y0 <= self.y0 and self.y1 <= other.y1


def around(x: float, y: float, width: float, height: float) -> Box:
    """The box of a size about a centre.

    >>> around(1.0, 1.0, 2.0, 2.0)
    Box(x0=0.0, y0=0.0, x1=2.0, y1=2.0)
    """
    return Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def place(
    points: Sequence[XY], sizes: Sequence[XY], obstacles: Sequence[Box], frame: Box, unit: float = 1.0
) -> list[XY]:
    """Centres of one label per point: the nearest place that is free, or the one that covers least where none is.

    Args:
        points: what the labels name; a leader line will join each to its label.
        sizes: width and height of each label.
        obstacles: boxes that no label may cover (markers, bars, lines).
        frame: labels stay in it.
        unit: size of a point (1/72 inch) in the unit of the rest.

    >>> place([(0.0, 0.0)], [(6.0, 8.0)], [], around(0.0, 0.0, 100.0, 100.0))[0][0] < 0
    True
    """
    taken = list(obstacles)
    leaders: list[tuple[XY, XY]] = []
    out: list[XY] = []
    for k, (point, size) in enumerate(zip(points, sizes, strict=True)):
        others = [p for j, p in enumerate(points) if j != k]
        best, least = point, math.inf
        for distance in _DISTANCES:
            for angle in _ANGLES:
                turn = math.radians(angle)
                centre = (
                    point[0] + unit * distance * math.cos(turn),
                    point[1] + unit * distance * math.sin(turn),
                )
                box = around(*centre, *size)
                if not box.within(frame):
                    continue
                hits = sum(box.overlaps(other) for other in taken)
                hits += sum(_reach(point, centre, *size, line) for line in leaders)
                hits += sum(_apart(other, point, centre) < 4.0 * unit for other in others)
                hits += sum(_crosses(label, point, centre) for label in taken[len(obstacles) :])
                if hits < least:
                    best, least = centre, hits
            if least == 0:
                break
        out.append(best)
        taken.append(around(*best, *size))
        leaders.append((point, best))
    return out


def _reach(start: XY, end: XY, width: float, height: float, line: tuple[XY, XY]) -> bool:
    """Would an earlier leader line cross this one, or run through this label?"""
    return _meet(start, end, *line) or _crosses(around(*end, width, height), *line)


def _apart(point: XY, start: XY, end: XY) -> float:
    """Distance of a point from a segment."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = ((point[0] - start[0]) * dx + (point[1] - start[1]) * dy) / (dx * dx + dy * dy or 1.0)
    along = min(max(along, 0.0), 1.0)
    return math.hypot(point[0] - start[0] - along * dx, point[1] - start[1] - along * dy)


def _crosses(box: Box, start: XY, end: XY) -> bool:
    """Does a segment run through a box? Both diagonals stand for it."""
    return _meet((box.x0, box.y0), (box.x1, box.y1), start, end) or _meet(
        (box.x0, box.y1), (box.x1, box.y0), start, end
    )


def _meet(a: XY, b: XY, c: XY, d: XY) -> bool:
    def side(p: XY, q: XY, r: XY) -> float:
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    return side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0
