"""Channels of a mixture's experts, of which a token runs through those alone that its router picks.

What channel c of expert e adds to the residual stream at a token t that the router sends there is g_te W_e[:, c] a_tec, with g
the router's gate, W_e the expert's down projection and a its input; at other tokens it adds nothing. Its scores are those of a
channel (`activity`) with this addend: g |a| |W_e[:, c]| and |a dS/da|, the latter by the slope of S along the experts' output.

transformers holds all experts of a layer in one module, whose forward pass does not show a. So a is computed again from what the
module is given, which is only trusted where the output made from it is the module's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interference.kernels import GROUPED, Composite

KIND = "expert channel"
_INPUTS = (
    3  # hidden states, picked experts, gates: the order of transformers' interface of experts, whatever their names
)
_TRIED = 16  # tokens on which a module's own output is compared with what is computed here
_TOLERANCE = 1e-3  # of the output's norm; another activation or gate errs by far more, rounding by far less


@dataclass(frozen=True, eq=False)
class Routed:
    """What the experts of a layer are given at N tokens: hidden (N, width), index (N, k) of the experts that the router picks
    and gates (N, k)."""

    hidden: Tensor
    index: Tensor
    gates: Tensor

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Routed:
        """From the arguments of a call."""
        given = inspect.signature(module.forward).bind(*args, **named)
        hidden, index, gates = (x.detach() for x in given.arguments.values())
        return cls(hidden.reshape(-1, hidden.shape[-1]), index.reshape(-1, index.shape[-1]), gates.reshape(index.shape))

    def at(self, places: Tensor) -> Routed:
        return Routed(self.hidden[places], self.index[places], self.gates[places])


@dataclass(frozen=True, eq=False)
class Experts:
    """The experts of a layer: `units` channels, expert by expert, `size` of each. norms: of the down columns, (experts, size)."""

    layer: int
    path: str
    module: nn.Module
    units: int
    size: int
    norms: Tensor
    kind: str = KIND

    def sums(self, seen: Routed, weights: Tensor, slope: Tensor | None) -> Tensor:
        """Scores summed over tokens with weights (H, N): (H, units), float64. slope (N, width) of S along the output: then the
        gradient's scores."""
        out = torch.zeros(len(weights), self.units, dtype=torch.float64, device=weights.device)
        for e, tokens, gates, a in self._routed(seen):
            if slope is None:
                score = gates.abs() * a.abs() * self.norms[e]
            else:
                score = (a * gates * (slope[tokens] @ self._down(e))).abs()
            out[:, e * self.size : (e + 1) * self.size] += weights[:, tokens] @ score.double()
        return out

    def output(self, seen: Routed) -> Tensor:
        """What the module gives, from the channels that are computed here."""
        out = torch.zeros_like(seen.hidden)
        for e, tokens, gates, a in self._routed(seen):
            given = nn.functional.linear(a, self._down(e), self._part("down_proj_bias", e))
            out.index_add_(0, tokens, gates * given)
        return out

    def _routed(self, seen: Routed) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Of every expert that is picked: its tokens (n,), their gates (n, 1) and its channels (n, size) at them."""
        for e in range(len(self.norms)):
            tokens, place = (seen.index == e).nonzero(as_tuple=True)
            if len(tokens):
                yield (
                    e,
                    tokens,
                    seen.gates[tokens, place, None].to(seen.hidden.dtype),
                    self._channels(e, seen.hidden[tokens]),
                )

    def _channels(self, e: int, hidden: Tensor) -> Tensor:
        gated = bool(getattr(self.module, "has_gate", True))
        name = "gate_up_proj" if gated else "up_proj"
        weight, bias = self._part(name, e), self._part(f"{name}_bias", e)
        assert weight is not None  # `why_unknown` looked
        opened = nn.functional.linear(hidden, weight.t() if self._transposed else weight, bias)
        combine: Any = self.module._apply_gate if gated else self.module.act_fn
        out: Tensor = combine(opened)
        return out

    def _down(self, e: int) -> Tensor:
        weight = self._part("down_proj", e)
        assert weight is not None
        return weight.t() if self._transposed else weight

    def _part(self, name: str, e: int) -> Tensor | None:
        tensor = getattr(self.module, name, None)
        return tensor[e].detach() if isinstance(tensor, Tensor) else None

    @property
    def _transposed(self) -> bool:
        return bool(getattr(self.module, "is_transposed", False))


def experts_of(module: nn.Module, path: str, layer: int, units: int) -> Experts | str:
    """The experts of a module that holds all of a layer's, or why their channels are not known."""
    down = getattr(module, "down_proj", None)
    if not isinstance(down, Tensor) or down.dim() != 3:
        return "each expert is a module of its own, which sees only the tokens routed to it"
    why = _why_unknown(module)
    if why:
        return why
    norms = torch.linalg.vector_norm(
        down.detach(), dim=2 if getattr(module, "is_transposed", False) else 1, dtype=torch.float64
    )
    found = Experts(layer, path, module, units, units // len(down), norms.to(down.dtype))
    return found if _agrees(found, down) else "what the module computes is not made of such channels"


def _why_unknown(module: nn.Module) -> str:
    gated = bool(getattr(module, "has_gate", True))
    opening = getattr(module, "gate_up_proj" if gated else "up_proj", None)
    known = isinstance(opening, Tensor) and callable(getattr(module, "_apply_gate" if gated else "act_fn", None))
    if not known or len(inspect.signature(module.forward).parameters) != _INPUTS:
        return f"how {type(module).__name__} computes is not known"
    return ""


@torch.no_grad()
def _agrees(experts: Experts, down: Tensor) -> bool:
    """Whether the module's output at random tokens, each sent to two experts, is the one made of the channels."""
    count, width = down.shape[0], experts._down(0).shape[0]
    g = torch.Generator().manual_seed(0)
    index = torch.rand(_TRIED, count, generator=g).argsort(dim=1)[:, : min(2, count)]
    gates = torch.rand(index.shape, generator=g)
    hidden = torch.randn(_TRIED, width, generator=g)
    seen = Routed(hidden.to(down), index.to(down.device), gates.to(down))
    spelled: AbstractContextManager[Any] = Composite(GROUPED) if down.dtype == torch.float64 else nullcontext()
    with spelled:
        own: Tensor = experts.module(seen.hidden, seen.index, seen.gates)
    apart = torch.linalg.vector_norm(own - experts.output(seen))
    return bool(apart <= _TOLERANCE * torch.linalg.vector_norm(own))
