"""An update estimated twice, from two halves of the prompts: what both agree on is signal, what they differ by is noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from interference import tree
from interference.tree import Change, NamedChanges


@dataclass(frozen=True, eq=False)
class Halves:
    """Two independent estimates d_1 = s + e_1 and d_2 = s + e_2 of one update s, with noise e.

    mean u = (d_1 + d_2) / 2, difference w = (d_1 - d_2) / 2. Since E[u'Hu] = s'Hs + tr(H S) / 2 and E[w'Hw] = tr(H S) / 2
    for noise of covariance S, u'Hu - w'Hw = d_1'H d_2 is free of the noise, which curvature would turn into harm that is
    not there. A real training has noise of its own, of covariance `noise` S, whose harm is there: `noise` w'Hw more.

    noise: the ratio of the two, from the numbers of responses that went into them.
    """

    first: NamedChanges
    second: NamedChanges
    noise: float

    def mean(self) -> dict[str, Change]:
        """u."""
        return self._combined(0.5)

    def difference(self) -> dict[str, Change]:
        """w."""
        return self._combined(-0.5)

    def agreement(self) -> float:
        """Cosine of the two estimates; 1 without noise, near 0 where it is all noise."""
        return tree.cosine(self.first, self.second)

    def reliability(self) -> float:
        """What the cosine of the mean to a third estimate of unlimited data would be, squared: 2 c / (1 + c) (Spearman-Brown).

        >>> import torch
        >>> round(Halves({"w": torch.ones(2)}, {"w": torch.tensor([1.0, 0.0])}, 1.0).reliability(), 3)
        0.828
        """
        c = max(0.0, self.agreement())
        return 2 * c / (1 + c)

    def _combined(self, sign: float) -> dict[str, Change]:
        out: dict[str, Change] = {}
        for name in dict.fromkeys((*self.first, *self.second)):
            parts = []
            if name in self.first:
                parts.append(tree.scaled(self.first[name], 0.5))
            if name in self.second:
                parts.append(tree.scaled(self.second[name], sign))
            out[name] = parts[0] if len(parts) == 1 else tree.added(*parts)
        return out


def noise_ratio(draws: int, distinct: int, real: int) -> float:
    """Variance of a real training's noise over that of an estimate from a half.

    The estimate drew `draws` responses out of `distinct`; drawing again what was drawn before says nothing new. The training
    draws `real` fresh ones.

    >>> noise_ratio(draws=4000, distinct=1600, real=8000)
    0.2
    """
    return min(1.0, min(draws, distinct) / real)


def means(halves: Mapping[str, Halves]) -> dict[str, dict[str, Change]]:
    """{name: u}."""
    return {name: h.mean() for name, h in halves.items()}
