"""What an optimizer moves: all parameters, or the factors of a LoRA adapter; and the update that its movement is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from interference import domain as data
from interference import tree
from interference.errors import InputError
from interference.forecasting.training import Adapter
from interference.model import Model
from interference.shared_prompts import Rows, rows_of
from interference.tree import Change, LowRank, NamedChanges, dense


class Trainable:
    """A model's trainable tensors as leaves, away from the model, which stays as it is.

    start: an update that training starts from, zero unless given.  late: leaves without a gradient until others have moved.
    """

    def __init__(self, model: Model, start: NamedChanges | None = None):
        self.model = model
        moved = {n: p + dense(start[n]) if start and n in start else p.clone() for n, p in model.parameters.items()}
        self.leaves = {n: p.requires_grad_() for n, p in moved.items()}
        self.late: frozenset[str] = frozenset()

    def parameters(self) -> Mapping[str, Tensor]:
        """All parameters of the model at the leaves' present values; differentiable."""
        return self.leaves

    @torch.no_grad()
    def update(self) -> dict[str, Change]:
        """The present parameters less the model's own; tensors that did not move are left out."""
        moved = {n: p.detach() - self.model.parameters[n] for n, p in self.leaves.items()}
        return {n: d for n, d in moved.items() if d.any()}

    def logp(self, batch: data.Batch | Rows) -> Tensor:
        """Log-probability of every response token of a batch at the present parameters, (N,), row by row."""
        rows = rows_of(batch) if isinstance(batch, data.Batch) else batch
        options: dict[str, Any] = {"use_cache": False, **rows.inputs, **self.model.keeping(rows.keep)}
        out = functional_call(self.model.module, dict(self.parameters()), (rows.input_ids,), options)
        return rows.scored(rows.predictions(out.logits))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model itself at the present parameters, in place; undone bit by bit afterwards."""
        with torch.no_grad():
            whole = {n: p.detach() - self.model.parameters[n] for n, p in self.parameters().items()}
        with self.model.at([whole], [1.0]):
            yield


class Still(Trainable):
    """The same to be read only, at the model itself or at an update: tensors that do not move are the model's own, not copies."""

    def __init__(self, model: Model, at: NamedChanges | None = None):
        self.model, self.late = model, frozenset()
        self.leaves = {n: p + dense(at[n]) if at and n in at else p for n, p in model.parameters.items()}


class AdapterTrainable(Trainable):
    """The same for the factors of a LoRA adapter, on top of the start.

    goes_on: factors of this rank in the start are those of the adapter itself, half trained, and not another's to be merged.

    Raises InputError for a model without linear maps outside its head.
    """

    def __init__(self, model: Model, adapter: Adapter, start: NamedChanges | None = None, goes_on: bool = False):
        maps = _linear_maps(model)
        begun = _begun(start or {}, maps, adapter.rank) if goes_on else {}
        self.start = {n: dense(d).to(model.parameters[n]) for n, d in (start or {}).items() if n not in begun}
        super().__init__(model, self.start)
        self.frozen = {n: p.requires_grad_(False) for n, p in self.leaves.items()}
        self.scale, self.flipped = adapter.alpha / adapter.rank, dict[str, bool]()
        generator = torch.Generator().manual_seed(adapter.seed)
        self.leaves = {}
        for name, flipped in maps.items():
            rows, columns = self.frozen[name].shape[::-1] if flipped else self.frozen[name].shape
            bound = 1 / math.sqrt(columns)  # Kaiming's uniform distribution with a = sqrt(5), as PEFT draws it
            a = (torch.rand(adapter.rank, columns, generator=generator, dtype=model.dtype) * 2 - 1) * bound
            b = torch.zeros(rows, adapter.rank, dtype=model.dtype)
            if name in begun:
                a, b = begun[name].down.to(a, copy=True), begun[name].up.to(b) / self.scale
            self.leaves[f"{name}.a"] = a.to(model.device).requires_grad_()
            self.leaves[f"{name}.b"] = b.to(model.device).requires_grad_()
            self.flipped[name] = flipped

        self.late = frozenset(f"{n}.a" for n in maps if n not in begun)

    def parameters(self) -> Mapping[str, Tensor]:
        out = dict(self.frozen)
        for name, flipped in self.flipped.items():
            change = self.scale * (self.leaves[f"{name}.b"] @ self.leaves[f"{name}.a"])
            out[name] = out[name] + (change.t() if flipped else change)
        return out

    @torch.no_grad()
    def update(self) -> dict[str, Change]:
        out: dict[str, Change] = {n: d for n, d in self.start.items() if d.any()}
        for name, flipped in self.flipped.items():
            up, down = (self.leaves[f"{name}.{k}"].detach().clone() for k in "ba")
            if not up.any():
                continue
            factors = LowRank(self.scale * up, down)
            change = factors.t() if flipped else factors
            out[name] = tree.added(out[name], change) if name in out else change
        return out


def trainable(
    model: Model, adapter: Adapter | None, start: NamedChanges | None = None, goes_on: bool = False
) -> Trainable:
    """What training would move: every parameter, or the factors of an adapter."""
    return Trainable(model, start) if adapter is None else AdapterTrainable(model, adapter, start, goes_on)


def _begun(start: NamedChanges, maps: Mapping[str, bool], rank: int) -> dict[str, LowRank]:
    """The factors of the start, (out, r) and (r, in), on maps that the adapter trains."""
    found = {n: d.t() if maps[n] else d for n, d in start.items() if n in maps and isinstance(d, LowRank)}
    return {n: d for n, d in found.items() if d.up.shape[1] == rank}


def _linear_maps(model: Model) -> dict[str, bool]:
    """Weights of the linear maps outside the head, and whether they are stored (in, out), as GPT-2 stores them."""
    from transformers.pytorch_utils import Conv1D

    head = getattr(model.module, "get_output_embeddings", lambda: None)()
    found = {
        f"{name}.weight": isinstance(part, Conv1D)
        for name, part in model.module.named_modules()
        if isinstance(part, (nn.Linear, Conv1D)) and part is not head and f"{name}.weight" in model.parameters
    }
    if not found:
        raise InputError(
            got="a model without linear maps outside its head",
            expected="linear maps that an adapter can be put on",
            remedy="leave training.adapter out",
        )
    return found
