"""How much every MLP channel and attention head does at a token: forward hooks on the projections that close each block.

The inputs a of a block's closing projection W (down, o) are its units' activations: one input is a channel, a head's inputs are
its output. What a unit adds to the residual stream at token t (before any norm that follows the block) is W[:, u] a_tu, so

    variant      channel                    head
    magnitude    |a_tc| |W[:, c]|_2         |W[:, h] a_th|_2
    gradient     |a_tc dS/da_tc|            |a_th . dS/da_th|

with S the negative log-likelihood of the whole response: to first order, what scaling the unit at that token changes. Channels of
a mixture's experts are in `experts`.
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
from interference.probes.experts import Experts, Routed, experts_of
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


Watched = Closer | Experts


def closers(model: Model, anatomy: Anatomy) -> tuple[list[Watched], tuple[str, ...]]:
    """What closes the blocks whose channels or heads the anatomy tells, and notes on those left out."""
    found: list[Watched] = []
    notes = list(anatomy.notes)
    for name, place in anatomy.places.items():
        labels = {f: values[place] for f, values in anatomy.labels.items()}
        label, kind = _KINDS.get(MODULES[labels["module"][0]], ("", ""))
        if not label or (labels[label] < 0).any():
            continue
        path, layer = name.rpartition(".")[0], int(labels["layer"][0])
        if labels["expert"][0] >= 0:
            # All experts of a layer are one module's parameters, so `name` is the parameter and `path` the module.
            experts = experts_of(model.module.get_submodule(path), path, layer, len(labels[label]))
            if isinstance(experts, Experts):
                found.append(experts)
            else:
                notes.append(f"channels of the experts in {path} not scored: {experts}")
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
    found: Sequence[Watched],
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
        self, found: Sequence[Watched], batch: data.Batch, weights: Tensor, sums: list[Tensor], calls: list[int]
    ) -> None:
        self.found, self.batch, self.sums, self.calls = found, batch, sums, calls
        predicts = nn.functional.pad(batch.targets[:, 1:], (0, 1))  # a token is predicted one position before it stands
        self.positions = predicts.reshape(-1).nonzero()[:, 0].split(_BLOCK)
        self.weights = weights[predicts.nonzero()[:, 0]].t().split(_BLOCK, dim=1)

    def add(self, i: int, seen: Tensor | Routed, slope: Tensor | None = None) -> None:
        """Add the scores at the positions that count, from what a place sees, (B, T, width), and for the variant gradient the
        slope of S along it; of experts, what they are given at the B T tokens and the slope along their output."""
        watched, tokens = self.found[i], self.batch.input_ids.numel()
        if isinstance(watched, Experts):
            assert isinstance(seen, Routed)
            whole = len(seen.hidden) == tokens
        else:
            assert isinstance(seen, Tensor)
            whole = seen.numel() == tokens * watched.units * watched.size
        self.calls[i] += 1 if whole else 2
        if not whole:
            return
        flat = None if slope is None else slope.detach().reshape(tokens, -1)
        for index, weights in zip(self.positions, self.weights, strict=True):
            self.sums[i] += _scores(watched, seen, index, weights, None if flat is None else flat[index])


def _scores(watched: Watched, seen: Tensor | Routed, index: Tensor, weights: Tensor, slope: Tensor | None) -> Tensor:
    """Scores at some tokens summed with weights (H, N): (H, units)."""
    if isinstance(watched, Experts):
        assert isinstance(seen, Routed)
        return watched.sums(seen.at(index), weights, slope)
    assert isinstance(seen, Tensor)
    a = seen.detach().reshape(-1, watched.units * watched.size)[index]
    return weights @ (watched.magnitude(a) if slope is None else watched.sensitivity(a, slope)).double()


def _forward(model: Model, meter: _Meter) -> None:
    with _hooked(meter.found, lambda i, seen, _: meter.add(i, seen)):
        model.forward(meter.batch.input_ids, 1)


def _backward(model: Model, meter: _Meter) -> None:
    held: list[tuple[int, Tensor | Routed, Tensor]] = []

    def hold(i: int, seen: Tensor | Routed, along: Tensor) -> None:
        if not along.requires_grad:
            along.requires_grad_()
        held.append((i, seen, along))

    with _hooked(meter.found, hold), torch.enable_grad():
        loss = -sequence_logp(model, {}, meter.batch).sum()
    slopes = torch.autograd.grad(loss, [along for *_, along in held], allow_unused=True)
    for (i, seen, along), slope in zip(held, slopes, strict=True):
        meter.add(i, seen, torch.zeros_like(along) if slope is None else slope)


@contextmanager
def _hooked(found: Sequence[Watched], see: Callable[[int, Any, Tensor], None]) -> Iterator[None]:
    """While open, `see` is told of every call of a place: its number, what it sees, and the tensor that S's slope is along."""

    def before(i: int) -> Callable[[nn.Module, Any], None]:
        return lambda _, inputs: see(i, inputs[0], inputs[0])

    def after(i: int) -> Callable[[nn.Module, Any, Any, Tensor], Tensor]:
        def hook(module: nn.Module, inputs: Any, named: Any, output: Tensor) -> Tensor:
            see(i, Routed.of(module, inputs, named), output)
            return output.clone()  # a caller may add to the output in place, which no leaf of a gradient bears

        return hook

    hooks = [
        c.module.register_forward_hook(after(i), with_kwargs=True)
        if isinstance(c, Experts)
        else c.module.register_forward_pre_hook(before(i))
        for i, c in enumerate(found)
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
