"""The small batch and the directions on which a model is audited."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from interference import domain as data
from interference import tree
from interference.domain import Domain
from interference.errors import InputError
from interference.model import Model, check_fits

RANDOM = ((3, 5), (7, 9), (2, 14), (11, 12))  # tokens of prompt and response
LONG = (
    60,
    44,
)  # of the longest one: above the 96 tokens up to which attention is one block of queries (taylor.attention)
MOST = 130  # tokens of the longest one, where sequences are given
SHARE = 1e-2  # size of a random direction, relative to each tensor


@dataclass(frozen=True)
class Probe:
    """Ragged sequences and two directions d, e under the model's parameter names."""

    sequences: tuple[data.Sequence, ...]
    directions: tuple[dict[str, Tensor], ...]

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return sum(len(s.response) for s in self.sequences)

    def batch(self) -> data.Batch:
        """All sequences in one right-padded batch, in their order."""
        width = max(len(s.prompt) + len(s.response) for s in self.sequences)
        (batch,) = data.batches(self.sequences, 0, width * len(self.sequences))
        order = sorted(range(len(batch.index)), key=batch.index.__getitem__)
        return data.Batch(batch.input_ids[order], batch.targets[order], tuple(range(len(order))))


def make_probe(
    model: Model,
    sequences: Domain | Sequence[data.Sequence] | None,
    updates: Sequence[Mapping[str, Tensor]],
    *,
    count: int,
    longest: int,
    directions: int,
    seed: int,
) -> Probe:
    """A few of the given sequences, of different lengths, cut to `longest` tokens of prompt and of response; random ones
    otherwise. The longest is cut later, since long sequences take other code. Directions mix all updates, each at the same
    norm; random ones have the same relative size in every tensor.

    Raises InputError for a direction that is zero or not finite: it would test nothing.
    """
    g = torch.Generator().manual_seed(seed)
    config = getattr(model.module, "config", None)
    context = int(getattr(config, "max_position_embeddings", None) or 1 << 30)
    longest = max(1, min(longest, context // 2))
    given = sequences.sequences if isinstance(sequences, Domain) else tuple(sequences or ())
    if given:
        check_fits(model, "given", 0, max(max(s.prompt + s.response) for s in given), "shorten them")
        chosen = _spread(given, count, longest, min(MOST, context))
    else:
        chosen = _random(model, count, longest, context, g)
    mixed = [_mixture(updates, g) for _ in range(directions)] if updates else []
    if len(updates) == 1:
        mixed = mixed[:1]
    mixed += [_random_direction(model, g) for _ in range(directions - len(mixed))]
    for direction in mixed:
        _refuse_nothing(direction)
    return Probe(chosen, tuple(mixed))


def _refuse_nothing(direction: Mapping[str, Tensor]) -> None:
    size = tree.norm(direction)
    if not 0 < size < math.inf:
        raise InputError(
            got=f"updates of norm {size:g}",
            expected="at least one update that changes a weight, and finite ones",
            remedy="compare base and tuned checkpoint; along a zero update nothing can be checked",
        )


def _spread(given: Sequence[data.Sequence], count: int, longest: int, most: int) -> tuple[data.Sequence, ...]:
    """Sequences from the shortest to the longest, cut; where all would be equally long, one of another length is added."""
    order = sorted(given, key=lambda s: (len(s.prompt) + len(s.response), s.prompt, s.response))
    places = sorted({round(i * (len(order) - 1) / max(count - 1, 1)) for i in range(count)})
    cut = [data.Sequence(order[i].prompt[-longest:], order[i].response[:longest], order[i].prompt_id) for i in places]
    cut[-1] = _cut(order[-1], longest, most)
    if len({len(s.prompt) + len(s.response) for s in cut}) == 1:
        cut = [_resized(cut[0]), *(cut[1:] or cut)]
    return tuple(cut)


def _cut(s: data.Sequence, longest: int, most: int) -> data.Sequence:
    """`most` tokens, of which at least `longest` are the response's where it has them."""
    response = s.response[: max(longest, most - len(s.prompt))]
    return data.Sequence(s.prompt[-max(1, most - len(response)) :], response, s.prompt_id)


def _resized(s: data.Sequence) -> data.Sequence:
    """A copy of another length: of half the response, or a shorter prompt, or (of two tokens) a longer one."""
    if len(s.response) > 1:
        return data.Sequence(s.prompt, s.response[: len(s.response) // 2], s.prompt_id)
    prompt = s.prompt[1:] if len(s.prompt) > 1 else s.prompt + s.response
    return data.Sequence(prompt, s.response, s.prompt_id)


def _random(model: Model, count: int, longest: int, context: int, g: torch.Generator) -> tuple[data.Sequence, ...]:
    """Random ids of the vocabulary; the padding token stands in prompts and responses as content. The last is long."""
    size, pad = vocabulary(model), pad_token(model)
    out = []
    short = [(min(prompt, longest), min(response, longest)) for prompt, response in RANDOM[-count:]]
    for i, (prompt, response) in enumerate([*short[:-1], LONG] if sum(LONG) <= context else short):
        ids = torch.randint(0, size, (prompt + response,), generator=g).tolist()
        ids[prompt - 1] = pad
        ids[prompt + response // 2] = pad
        out.append(data.Sequence(tuple(ids[:prompt]), tuple(ids[prompt:]), str(i)))
    return tuple(out)


def vocabulary(model: Model) -> int:
    """How many token ids the model knows."""
    find = getattr(model.module, "get_input_embeddings", None)
    weight = getattr(find() if find is not None else None, "weight", None)
    size = getattr(getattr(model.module, "config", None), "vocab_size", None) or weight.shape[0]  # type: ignore[union-attr]
    return int(min(size, weight.shape[0]) if isinstance(weight, Tensor) else size)


def pad_token(model: Model) -> int:
    """The configuration's padding token, or the end token, or 0."""
    config = getattr(model.module, "config", None)
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(config, name, None)
        if isinstance(value, int) and 0 <= value < vocabulary(model):
            return value
    return 0


def _mixture(updates: Sequence[Mapping[str, Tensor]], g: torch.Generator) -> dict[str, Tensor]:
    """sum_k xi_k u_k / |u_k| max_l |u_l| / sqrt(K) with xi ~ N(0, 1), so that each update is probed."""
    norms = [tree.norm(u) for u in updates]
    draws = torch.randn(len(updates), generator=g).tolist() if len(updates) > 1 else [1.0]
    out: dict[str, Tensor] = {}
    for update, norm, draw in zip(updates, norms, draws, strict=True):
        scale = draw * max(norms) / norm / len(updates) ** 0.5 if norm else 0.0
        for name in update:
            part = scale * update[name]
            out[name] = out[name] + part if name in out else part
    return out


def _random_direction(model: Model, g: torch.Generator) -> dict[str, Tensor]:
    count = sum(p.numel() for p in model.parameters.values())
    typical = tree.norm(model.parameters) / count**0.5
    out = {}
    for name, p in model.parameters.items():
        size = float(p.double().square().mean().sqrt()) or typical
        out[name] = (SHARE * size * torch.randn(p.shape, generator=g, dtype=torch.float32)).to(p)
    return out
