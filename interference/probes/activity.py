"""How much every MLP channel and attention head does at a token: forward hooks on the projections that close each block.

The inputs a of a block's closing projection W (down, o) are its units' activations: one input is a channel, a head's inputs are
its output. What a unit adds to the residual stream at token t (before any norm that follows the block) is W[:, u] a_tu, so

    variant      channel                    head
    magnitude    |a_tc| |W[:, c]|_2         |W[:, h] a_th|_2
    gradient     |a_tc dS/da_tc|            |a_th . dS/da_th|

with S the negative log-likelihood of the whole response: to first order, what scaling the unit at that token changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interference import domain as data
from interference.anatomy import Anatomy
from interference.derivatives import sequence_logp
from interference.model import Model
from interference.records import MODULES

VARIANTS = ("magnitude", "gradient")
_KINDS = {"down": ("channel", "channel"), "o": ("head", "head")}  # module: label of its units, kind
_BLOCK = 1024


@dataclass(frozen=True, eq=False)
class Closer:
    """A projection that closes a block: `units` units of `size` inputs each. scale: norms of the columns (units,), or what has
    the norms of a head's columns applied to its output, (units, ., size): |scale[h] a| = |W[:, h] a|."""

    kind: str
    layer: int
    path: str
    module: nn.Module
    units: int
    size: int
    scale: Tensor

    def magnitude(self, a: Tensor) -> Tensor:
        """(N, inputs) to (N, units)."""
        if self.kind == "channel":
            return a.abs() * self.scale
        out: Tensor = torch.linalg.vector_norm(torch.einsum("nhs,hrs->nhr", self._heads(a), self.scale), dim=-1)
        return out

    def sensitivity(self, a: Tensor, slope: Tensor) -> Tensor:
        """(N, inputs) and their gradient to (N, units)."""
        product = a * slope
        return product.abs() if self.kind == "channel" else self._heads(product).sum(-1).abs()

    def _heads(self, a: Tensor) -> Tensor:
        return a.reshape(len(a), self.units, self.size)


def closers(model: Model, anatomy: Anatomy) -> tuple[list[Closer], tuple[str, ...]]:
    """The projections that close the blocks whose channels or heads the anatomy tells, and notes on those left out."""
    found, notes = [], list(anatomy.notes)
    for name, place in anatomy.places.items():
        labels = {f: values[place] for f, values in anatomy.labels.items()}
        label, kind = _KINDS.get(MODULES[labels["module"][0]], ("", ""))
        if not label or (labels[label] < 0).any():
            continue
        path, layer = name.rpartition(".")[0], int(labels["layer"][0])
        if labels["expert"][0] >= 0:
            notes.append(f"channels of the experts in {path} not scored: only the tokens routed to one run through it")
            continue
        units = int(labels[label].max()) + 1
        size = len(labels[label]) // units
        weight = model.parameters[name]
        matrix = weight.detach() if anatomy.axes[name][0] == 1 else weight.detach().t()  # (out, in)
        scale = _column_norms(matrix) if kind == "channel" else _head_factors(matrix, units)
        found.append(Closer(kind, layer, path, model.module.get_submodule(path), units, size, scale))
    return found, tuple(dict.fromkeys(notes))


def _column_norms(matrix: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=0, dtype=torch.float64)
    return norms.to(matrix.dtype)


def _head_factors(matrix: Tensor, heads: int) -> Tensor:
    """R of each head's columns W = QR: |R a| = |W a| at the cost of the head's size instead of the model's width."""
    parts = matrix.double().reshape(len(matrix), heads, -1).permute(1, 0, 2)
    factors: Tensor = torch.linalg.qr(parts, mode="r").R
    return factors.to(matrix.dtype)


def activity(
    model: Model,
    found: Sequence[Closer],
    sequences: Sequence[data.Sequence],
    weights: Tensor,
    variant: str,
    batch_tokens: int,
) -> tuple[dict[int, Tensor], tuple[str, ...]]:
    """Sums of every unit's scores over the positions that predict response tokens, weighted by sequence.

    Args:
        found: the projections to watch.
        sequences: S distinct sequences.
        weights: (S, H); a sequence's tokens count weights[s, h] each in sum h.

    Returns:
        {place in `found`: (H, units), float64}, summed batch by batch, and notes on projections left out because they do not see
        every token once.
    """
    weights = weights.to(model.device)
    size = weights.shape[1]
    sums = [torch.zeros(size, c.units, dtype=torch.float64, device=model.device) for c in found]
    broken: set[int] = set()
    for batch in data.batches(sequences, model.pad, model.fit_tokens(batch_tokens)):
        on_device = batch.to(model.device)
        meter = _Meter(found, on_device, weights[list(batch.index)], sums, [0] * len(found))
        (_forward if variant == "magnitude" else _backward)(model, meter)
        broken |= {i for i, calls in enumerate(meter.calls) if calls != 1}
    notes = [
        f"{found[i].kind}s of {found[i].path} not scored: it does not see every token once" for i in sorted(broken)
    ]
    return {i: s for i, s in enumerate(sums) if i not in broken}, tuple(notes)


class _Meter:
    """Adds the scores of one batch to `sums`; weights (B, H). calls: how often each projection saw all tokens."""

    def __init__(
        self, found: Sequence[Closer], batch: data.Batch, weights: Tensor, sums: list[Tensor], calls: list[int]
    ) -> None:
        self.found, self.batch, self.sums, self.calls = found, batch, sums, calls
        predicts = nn.functional.pad(batch.targets[:, 1:], (0, 1))  # a token is predicted one position before it stands
        self.positions = predicts.reshape(-1).nonzero()[:, 0].split(_BLOCK)
        self.weights = weights[predicts.nonzero()[:, 0]].t().split(_BLOCK, dim=1)

    def add(self, i: int, score: Callable[..., Tensor], *inputs: Tensor) -> None:
        """Add score(*inputs) at the positions that count; inputs (B, T, width) each, in this order of tokens."""
        tokens = self.batch.input_ids.numel()
        if inputs[0].numel() != tokens * self.found[i].units * self.found[i].size:
            self.calls[i] += 2
            return
        self.calls[i] += 1
        flat = [x.detach().reshape(tokens, -1) for x in inputs]
        for index, weights in zip(self.positions, self.weights, strict=True):
            self.sums[i] += weights @ score(*(x[index] for x in flat)).double()


def _forward(model: Model, meter: _Meter) -> None:
    found = meter.found
    with _hooked(found, lambda i, x: meter.add(i, found[i].magnitude, x)):
        model.forward(meter.batch.input_ids, 1)


def _backward(model: Model, meter: _Meter) -> None:
    held: list[tuple[int, Tensor]] = []

    def hold(i: int, x: Tensor) -> None:
        if not x.requires_grad:
            x.requires_grad_()
        held.append((i, x))

    with _hooked(meter.found, hold), torch.enable_grad():
        loss = -sequence_logp(model, {}, meter.batch).sum()
    slopes = torch.autograd.grad(loss, [x for _, x in held], allow_unused=True)
    for (i, x), slope in zip(held, slopes, strict=True):
        meter.add(i, meter.found[i].sensitivity, x, torch.zeros_like(x) if slope is None else slope)


@contextmanager
def _hooked(found: Sequence[Closer], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    def hook(i: int) -> Callable[[nn.Module, Any], None]:
        return lambda _, inputs: see(i, inputs[0])

    hooks = [c.module.register_forward_pre_hook(hook(i)) for i, c in enumerate(found)]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
