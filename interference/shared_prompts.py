"""Batches in which what sequences begin with alike is computed once.

Responses to one prompt repeat its tokens, and often each other's first ones. A row of a batch holds such sequences as a tree:
every token once, at the depth where it stands in its sequences, and seen by what comes after it in them alone,

    place i sees place j  iff  j is i or one of its ancestors,

which a 4-D attention mask and position ids tell the model (tree attention; Miao et al. 2024, arXiv:2305.09781). The last token
of a response is predicted but predicts nothing, so it is no place. Log-probabilities and gradients are those of plain rows, to
rounding. Models differ in what they make of a mask, so that each is tried before it is used (`shares`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from interference import domain as data
from interference.model import Model

LEAST_SAVED = 0.25
"""Share of the places that sharing must save, else rows are plain."""
MOST_SQUARES = 1.5
"""A row's width squared, as attention costs it, over those of its sequences in rows of their own."""
Indices = NDArray[np.intp]


@dataclass(frozen=True)
class Rows:
    """Rows of tokens, and which of their places predict what.

    input_ids (B, T); predicting (2, M), rows and places whose distributions are needed; use (N,), labels (N,) and owner (N,):
    scored token n is labels[n], predicted at predicting[:, use[n]], of sequence index[owner[n]]. mask (B, 1, T, T), added to
    attention's scores, and positions (B, T); without them a place sees all before it.
    """

    input_ids: Tensor
    predicting: Tensor
    use: Tensor
    labels: Tensor
    owner: Tensor
    index: tuple[int, ...]
    mask: Tensor | None = None
    positions: Tensor | None = None

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model is told besides the tokens."""
        if self.mask is None or self.positions is None:
            return {}
        return {"attention_mask": self.mask, "position_ids": self.positions}

    @property
    def keep(self) -> int:
        """How many of the last places hold all that predict."""
        return self.input_ids.shape[1] - int(self.predicting[1].min())

    def predictions(self, logits: Tensor) -> Tensor:
        """(M, V) log-probabilities, from the logits (B, keep, V) of the last places."""
        rows, places = self.predicting
        return logits[rows, places - (self.input_ids.shape[1] - logits.shape[1])].log_softmax(-1)

    def scored(self, predictions: Tensor) -> Tensor:
        """(N,) log-probabilities of the scored tokens."""
        return predictions[self.use, self.labels]

    def sums(self, per_token: Tensor) -> Tensor:
        """(len(index),) sums of (N,) over the tokens of every sequence."""
        out = torch.zeros(len(self.index), dtype=per_token.dtype, device=per_token.device)
        return out.index_add(0, self.owner, per_token)


def rows_of(batch: data.Batch) -> Rows:
    """A plain batch in this form, scored tokens in the order of its targets."""
    row, place = batch.targets.nonzero(as_tuple=True)
    order = torch.arange(len(row), device=row.device)
    return Rows(batch.input_ids, torch.stack([row, place - 1]), order, batch.input_ids[batch.targets], row, batch.index)


def batches(model: Model, sequences: Sequence[data.Sequence], tokens: int) -> Iterator[Rows]:
    """All sequences in batches of at most `tokens` places each (a longer single row is its own batch), on the model's device.

    Rows are shared where the model allows it and enough is saved.
    """
    single = [Tree((i,), _width(s), _width(s)) for i, s in enumerate(sequences)]
    shared = plan(sequences)
    saved = 1 - sum(t.width for t in shared) / max(1, sum(t.width for t in single))
    masked = False
    if shared and saved >= LEAST_SAVED:
        parts = list(_packed(shared, tokens))
        masked = shares(model, sequences, (row for part in parts for row in part))
    if not masked:
        parts = [[[t] for t in part] for part in _in_batches(single, tokens)]
    for part in parts:
        yield assemble(model, sequences, part, masked)


@dataclass(frozen=True)
class Tree:
    """Sequences that share a prompt, by their places, in the order in which they branch off. longest: of their lengths."""

    members: tuple[int, ...]
    width: int
    longest: int


def plan(sequences: Sequence[data.Sequence]) -> list[Tree]:
    """Trees of all sequences. The responses to a prompt are cut into several where one would make attention too wide."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, s in enumerate(sequences):
        groups.setdefault(s.prompt, []).append(i)
    out: list[Tree] = []
    for members in groups.values():
        members.sort(key=lambda i: sequences[i].response)  # neighbours then share the longest beginnings
        held, width, squares = list[int](), 0, 0
        for i in members:
            own = _width(sequences[i])
            new = own - _shared_length(sequences[held[-1]], sequences[i]) if held else own
            squares += own**2
            if held and (width + new) ** 2 > MOST_SQUARES * squares:
                out.append(_tree(sequences, held, width))
                held, new, width, squares = [], own, 0, own**2
            held.append(i)
            width += new
        out.append(_tree(sequences, held, width))
    return out


def assemble(
    model: Model, sequences: Sequence[data.Sequence], parts: Sequence[Sequence[Tree]], masked: bool = True
) -> Rows:
    """A batch whose rows are these trees, several in one where they fit."""
    width = max(sum(t.width for t in row) for row in parts)
    ids = np.full((len(parts), width), model.pad, dtype=np.int64)
    depth = np.zeros((len(parts), width), dtype=np.int64)
    sees = np.zeros((len(parts), width, width) if masked else (0, 0, 0), dtype=bool)
    index, predicting, labels = list[int](), list[Indices](), list[int]()
    for b, row in enumerate(parts):
        end = 0
        for tree in row:
            last, path = None, np.empty(0, dtype=np.intp)
            for i in tree.members:
                s = sequences[i]
                tokens, common = (s.prompt + s.response)[:-1], _shared_length(last, s) if last else 0
                new = np.arange(end, end + len(tokens) - common)
                end += len(new)
                path, last = np.concatenate([path[:common], new]), s
                ids[b, new] = tokens[common:]
                depth[b, new] = np.arange(common, len(tokens))
                if masked and len(new):
                    sees[b, new[0] : end, path[:common]] = True
                    sees[b, new[0] : end, new[0] : end] = np.tri(len(new), dtype=bool)
                index.append(i)
                predicting.append(b * width + path[len(s.prompt) - 1 :])
                labels += s.response
    flat, use = np.unique(np.concatenate(predicting), return_inverse=True)
    owner = np.repeat(np.arange(len(index)), [len(p) for p in predicting])
    device = model.device
    where, at, of = (torch.from_numpy(a).to(device) for a in (np.stack(np.divmod(flat, width)), use, owner))
    rows = Rows(torch.from_numpy(ids).to(device), where, at, torch.tensor(labels, device=device), of, tuple(index))
    if not masked:
        return rows
    sees[:, np.arange(width), np.arange(width)] = True  # padding sees itself: a softmax over nothing is not a number
    mask = torch.zeros(sees.shape, dtype=model.dtype, device=device)
    mask.masked_fill_(~torch.from_numpy(sees).to(device), torch.finfo(model.dtype).min)
    return replace(rows, mask=mask[:, None], positions=torch.from_numpy(depth).to(device))


@dataclass
class _Tried:
    """What a model was tried on so far: the widest row, the longest sequence, the most trees in a row; `fits` stays false once
    it failed."""

    width: int = 0
    longest: int = 0
    trees: int = 0
    fits: bool = True


_tried: WeakKeyDictionary[nn.Module, _Tried] = WeakKeyDictionary()


def shares(model: Model, sequences: Sequence[data.Sequence], rows: Iterable[Sequence[Tree]]) -> bool:
    """Whether the model gives rows of several sequences the log-probabilities that it gives plain ones, to rounding.

    A model is tried on the widest of the rows, on that of the longest sequence and on that of the most trees whenever they exceed
    those that it was tried on: position biases, windows and recurrent layers show in what lies far apart. One that fails or
    raises is never shared again.
    """
    tried = _tried.setdefault(model.module, _Tried())
    several = [row for row in rows if sum(len(t.members) for t in row) > 1]  # one alone is a plain row
    for size in (_row_width, _row_longest, len):
        row = max(several, key=size, default=[])
        known = tried.width >= _row_width(row) and tried.longest >= _row_longest(row) and tried.trees >= len(row)
        if tried.fits and not known:
            tried.fits = _agree(model, sequences, row)
            tried.width, tried.longest = max(_row_width(row), tried.width), max(_row_longest(row), tried.longest)
            tried.trees = max(len(row), tried.trees)
    return tried.fits


def _row_width(row: Sequence[Tree]) -> int:
    return sum(t.width for t in row)


def _row_longest(row: Sequence[Tree]) -> int:
    return max((t.longest for t in row), default=0)


def _agree(model: Model, sequences: Sequence[data.Sequence], row: Sequence[Tree]) -> bool:
    single = [[Tree((i,), _width(sequences[i]), 0)] for tree in row for i in tree.members]
    plain = assemble(model, sequences, single, masked=False)
    shared = assemble(model, sequences, [row])
    try:
        here, there = (r.scored(r.predictions(model.forward(r.input_ids, r.keep, **r.inputs))) for r in (shared, plain))
    except Exception:  # whatever a model's own code raises on a mask or positions that it does not know
        return False
    bound = 1e-9 if model.dtype == torch.float64 else 1e-4
    return bool(((here - there).abs() <= bound * there.abs().clamp(min=1)).all())


def _in_batches(trees: Sequence[Tree], tokens: int) -> Iterator[list[Tree]]:
    """Trees of like widths, the widest first, in batches of at most `tokens` places with their padding."""
    held: list[Tree] = []
    for tree in sorted(trees, key=lambda t: -t.width):
        if held and (len(held) + 1) * held[0].width > tokens:
            yield held
            held = []
        held.append(tree)
    if held:
        yield held


def _packed(trees: Sequence[Tree], tokens: int) -> Iterator[list[list[Tree]]]:
    """The same with narrow trees put into what the widest leaves free of the rows (first fit): padding that does work.

    Attention over a batch, rows times their squared width, is no more than over one of plain rows.
    """
    rows, free, width = list[list[Tree]](), list[int](), 0
    squares = tokens * max((t.longest for t in trees), default=0)
    for tree in sorted(trees, key=lambda t: -t.width):
        place = next((b for b, room in enumerate(free) if tree.width <= room), None)
        if place is None:
            if rows and ((len(rows) + 1) * width > tokens or (len(rows) + 1) * width**2 > squares):
                yield rows
                rows, free = [], []
            width = width if rows else tree.width
            rows, free, place = [*rows, []], [*free, width], len(rows)
        rows[place].append(tree)
        free[place] -= tree.width
    if rows:
        yield rows


def _tree(sequences: Sequence[data.Sequence], members: Sequence[int], width: int) -> Tree:
    return Tree(tuple(members), width, max(_width(sequences[i]) for i in members))


def _width(sequence: data.Sequence) -> int:
    """Places of a sequence in a row: all tokens but the last, which predicts nothing."""
    return len(sequence.prompt) + len(sequence.response) - 1


def _shared_length(before: data.Sequence, sequence: data.Sequence) -> int:
    """How many places two sequences of one prompt have in common."""
    common = 0
    for a, b in zip(before.response[:-1], sequence.response[:-1], strict=False):
        if a != b:
            break
        common += 1
    return len(sequence.prompt) + common
