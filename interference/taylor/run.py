"""Run a causal LM on jets: parameters swapped for weights that carry their updates, and restored whatever happens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from interference.errors import InputError, nearest
from interference.kernels import refuse_custom_functions
from interference.taylor import attention, casts, contraction, indexing, norms, pointwise, reduction, structure
from interference.taylor.basis import Basis
from interference.taylor.head import TokenTerms, terms
from interference.taylor.jet import Weight
from interference.tree import Change, NamedChanges

TOKENS, TOKENS_CUDA = 256, 16384  # at least, in one forward pass
NUMBERS = 3 * 2**18  # in a stack of hidden states on a CPU, where that allows more tokens

_RULES = (
    attention,
    casts,
    contraction,
    indexing,
    norms,
    pointwise,
    reduction,
    structure,
)  # importing them registers their rules


def taylor_jets(
    model: nn.Module,
    updates: Sequence[NamedChanges],
    input_ids: Tensor,
    targets: Tensor,
    *,
    pairs: bool = True,
    token_chunk: int | None = None,
) -> tuple[TokenTerms, dict[str, int]]:
    """Log-probabilities of response tokens and their first two derivatives along K updates, by one forward pass.

    The model's own code runs once per group of rows, under no_grad, on tensors that carry Taylor coefficients to second order.

    model: a causal LM in eval mode, called as model(input_ids=..., use_cache=False) and returning `.logits`; float32 or
    float64; its parameters are the point of expansion. updates: for each, {parameter name: tensor of its shape, or LowRank
    factors, which cost next to nothing}; absent is unchanged, tied weights go by the name in named_parameters().
    input_ids (B, T): right padded. targets (B, T) bool: the tokens to score, from the position before. pairs: all second
    derivatives, or the diagonal. token_chunk: tokens at a time in the head.

    Returns the terms of the tokens in row-major order, and how often each operation without a rule went through nested
    forward mode (slower). InputError for input that does not fit, or an operation whose derivatives cannot be followed.
    """
    parameters = dict(model.named_parameters())
    basis = Basis(len(updates), pairs)
    changes = _checked(parameters, updates)
    _check_batch(model, input_ids, targets)
    with torch.inference_mode(False), torch.no_grad():
        head = _head(model)
        weights = {
            id(p): Weight(basis, p.detach(), changes.get(n, [None] * len(updates)), p is head)
            for n, p in parameters.items()
            if n in changes or p is head
        }
        parts = []
        with refuse_custom_functions(), _swapped(model, weights):
            for ids, scored in _pieces(input_ids, targets, NUMBERS // (basis.size * _width(model))):
                logits = model(input_ids=ids, use_cache=False).logits
                row, column = scored.nonzero(as_tuple=True)
                parts.append(terms(logits, basis, row * ids.shape[1] + column - 1, ids[scored], token_chunk))
                del logits
    result = TokenTerms(*(torch.cat([getattr(p, f) for p in parts], -1) for f in ("logp", "d1", "d2", "fisher")))
    return result, dict(basis.fallbacks)


def _width(model: nn.Module) -> int:
    """The size of the hidden states, where the configuration tells."""
    return int(getattr(getattr(model, "config", None), "hidden_size", None) or 512)


def _pieces(input_ids: Tensor, targets: Tensor, fit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batch in groups of rows that fit a CPU's cache, each cut off behind its last target, which causality allows."""
    tokens = TOKENS_CUDA if input_ids.is_cuda else max(TOKENS, fit)
    rows = max(1, tokens // input_ids.shape[1])
    for start in range(0, len(input_ids), rows):
        part = slice(start, start + rows)
        used = targets[part].any(0).nonzero()
        length = int(used[-1]) + 1 if len(used) else 2
        yield input_ids[part, :length], targets[part, :length]


def _checked(parameters: Mapping[str, Tensor], updates: Sequence[NamedChanges]) -> dict[str, list[Change | None]]:
    """For each parameter that some update changes, its K changes."""
    if not updates:
        raise InputError(got="no updates", expected="at least one", remedy="give updates to differentiate along")
    dtypes = {p.dtype for p in parameters.values()}
    if not dtypes <= {torch.float32, torch.float64} or len(dtypes) > 1:
        raise InputError(
            got=f"parameters of {', '.join(map(str, sorted(dtypes, key=str)))}",
            expected="float32 throughout, or float64",
            remedy="model.float(): second derivatives drown in lower precision",
        )
    for update in updates:
        for name, change in update.items():
            if name not in parameters:
                raise InputError(
                    got=f"an update of {name!r}", expected="a parameter's name", remedy=nearest(name, parameters)
                )
            if change.shape != parameters[name].shape:
                raise InputError(
                    got=f"an update of {name!r} with shape {tuple(change.shape)}",
                    expected=f"shape {tuple(parameters[name].shape)}",
                    remedy="give the difference of two checkpoints of this model",
                )
    return {
        name: [u[name].to(device=p.device, dtype=p.dtype) if name in u else None for u in updates]
        for name, p in parameters.items()
        if any(name in u for u in updates)
    }


def _check_batch(model: nn.Module, input_ids: Tensor, targets: Tensor) -> None:
    if model.training:
        raise InputError(got="a model in training mode", expected="eval mode", remedy="model.eval()")
    if input_ids.dim() != 2 or targets.shape != input_ids.shape or targets.dtype != torch.bool:
        raise InputError(
            got=f"input_ids {tuple(input_ids.shape)}, targets {tuple(targets.shape)} of {targets.dtype}",
            expected="input_ids (B, T) and bool targets (B, T)",
            remedy="mark the response tokens in a tensor like input_ids",
        )
    if bool(targets[:, 0].any()):
        raise InputError(
            got="a target at position 0",
            expected="targets after the first token",
            remedy="nothing predicts the first token",
        )


@contextmanager
def _swapped(model: nn.Module, weights: Mapping[int, Weight]) -> Iterator[None]:
    """Let the modules see weights in place of the parameters, by identity, so that tied ones stay one."""
    saved: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in model.modules():
            for name, p in module._parameters.items():
                if id(p) in weights:
                    saved.append((module._parameters, name, p))
        for place, name, p in saved:
            place[name] = weights[id(p)]
        yield
    finally:
        for place, name, p in saved:
            place[name] = p


def _head(model: nn.Module) -> Tensor | None:
    """The parameter that maps onto the vocabulary, if it can be told."""
    find = getattr(model, "get_output_embeddings", None)
    module = find() if find is not None else None
    if module is not None:
        weight = getattr(module, "weight", None)
        return weight if isinstance(weight, Tensor) and weight.dim() == 2 else None
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    candidates = [p for p in model.parameters() if p.dim() == 2 and p.shape[0] == size]
    return candidates[-1] if candidates else None
