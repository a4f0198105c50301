"""Attention, held back until it can be done in blocks of heads and queries.

A model's own eager attention is a product of queries and keys, some element-wise steps (scale, soft cap, mask), a softmax, and a
product with the values. `Scores` records those steps instead of storing C matrices of T x S; the last product then runs
them block by block. Any other use of the scores computes them in full, so nothing depends on the model's code looking so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interference.taylor.basis import Basis, full
from interference.taylor.jet import RULES, Jet, Stamp, check, lost, rule, stamp, wrap
from interference.taylor.reduction import softmax_

BLOCK = 2**19  # numbers in a block of scores: small enough for a CPU's cache
BLOCK_CUDA = 2**26
QUERIES = 64


@dataclass(frozen=True)
class Step:
    """One recorded element-wise call; `me` is the place of the scores among its arguments."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    me: int


@dataclass(frozen=True)
class Block:
    """Which sequences, heads, queries and keys."""

    b: slice
    h: slice
    t: slice
    s: slice

    def of(self, x: Any) -> Any:
        """The part of a plain operand, broadcast against (B, H, T, S), that this block needs."""
        if not isinstance(x, Tensor) or x.dim() == 0:
            return x
        ranges = (self.b, self.h, self.t, self.s)[4 - x.dim() :]
        return x[tuple(slice(None) if n == 1 else r for n, r in zip(x.shape, ranges, strict=True))]


class Scores(Jet):
    """The product of queries [B, H, T, D] and transposed keys [B, H, D, S], with recorded steps; not computed yet."""

    query: Jet
    key: Jet
    steps: tuple[Step, ...]
    stamps: Stamp
    weights: bool  # after the softmax

    @staticmethod
    def __new__(
        cls, query: Jet, key: Jet, steps: tuple[Step, ...] = (), weights: bool = False, stamps: Stamp = ()
    ) -> Scores:
        shape = torch.Size((*query.shape[:3], key.shape[3]))
        like = query.coef
        self: Scores = wrap(cls, query.basis, shape, torch.empty(shape, device="meta").stride(), like, None)
        self.query, self.key, self.steps, self.weights = query, key, steps, weights
        self.stamps = stamps or stamp(query.coef, key.coef)
        return self

    def then(self, step: Step | None, weights: bool = False) -> Scores:
        """The scores after one more step."""
        more = () if step is None else (step,)
        operands = stamp(*step.args, *step.kwargs.values()) if step else ()
        return Scores(self.query, self.key, (*self.steps, *more), weights, (*self.stamps, *operands))

    def _stack(self) -> Tensor:
        query, key, steps = _operands(self)
        everything = Block(*(slice(0, n) for n in self.shape))
        return _block(self, everything, query.flatten(1, 2), key.flatten(1, 2), steps)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        me = next((i for i, a in enumerate(args) if isinstance(a, Scores)), None)
        if me is not None:
            done = _record(args[me], func, args, kwargs or {}, me)
            if done is not None:
                return done
        return super().__torch_function__(func, types, args, kwargs)


def _functions(*names: str) -> frozenset[Any]:
    places = (torch, torch.Tensor, torch.nn.functional)
    return frozenset(getattr(p, n) for p in places for n in names if hasattr(p, n))


SCALES = _functions("mul", "multiply", "div", "divide", "true_divide")
MOVES = _functions("add", "sub", "subtract")
POINTWISE = SCALES | MOVES | _functions("tanh", "masked_fill", "where", "neg")
SOFTMAX = _functions("softmax")
NOTHING = _functions("to", "float", "type", "type_as", "contiguous", "dropout")


def _record(x: Scores, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], me: int) -> Any:
    """The scores after one more recorded step; None if the step cannot be recorded."""
    if x._coef is not None:  # looked at already, and perhaps changed in place since
        return None
    if func in NOTHING:
        same = unchanged(x.query.coef[:, :0, :0, :0, :1], x.basis, func, args, kwargs)
        return None if same is None else x if same else x.then(None, x.weights)
    if x.weights or any(isinstance(a, Jet) for i, a in enumerate(args) if i != me):
        return None
    if func in SOFTMAX:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        return x.then(None, True) if dim in (-1, 3) else None
    if func not in POINTWISE or any(isinstance(v, Jet) for v in kwargs.values()):
        return None
    for a in args:
        if isinstance(a, Tensor) and (a.dim() > 4 or torch.broadcast_shapes(a.shape, x.shape) != x.shape):
            return None
    if func in SCALES and me == 1 and func in _functions("div", "divide", "true_divide"):
        return None
    return x.then(Step(func, tuple(None if i == me else a for i, a in enumerate(args)), kwargs, me))


def unchanged(like: Tensor, basis: Basis, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool | None:
    """Whether a cast or the like returns its argument itself (True) or a copy of it (False); None if it does more."""
    probe = Jet(basis, like)
    done = RULES[func](probe, *args[1:], **kwargs)
    if done is probe:
        return True
    return False if isinstance(done, Jet) and done.dtype == probe.dtype and done.device == probe.device else None


def _number(x: Any) -> bool:
    return not isinstance(x, Tensor) or x.dim() == 0


def _operands(x: Scores) -> tuple[Tensor, Tensor, tuple[Step, ...]]:
    """Full stacks of queries and keys [C, B, H, T or S, D] with a leading scale taken into the queries, and the rest."""
    check(x.stamps)
    query, key, steps = full(x.basis, x.query.coef), full(x.basis, x.key.coef).mT, x.steps
    if steps and steps[0].func in SCALES and not steps[0].kwargs and _number(steps[0].args[1 - steps[0].me]):
        by = steps[0].args[1 - steps[0].me]
        query = query * by if "mul" in steps[0].func.__name__ else query / by
        steps = steps[1:]
    return query, key, steps


def _block(x: Scores, at: Block, query: Tensor, key: Tensor, steps: tuple[Step, ...]) -> Tensor:
    """The stack of one block of scores [C, b, h, t, s], after all its steps; from stacks [C, n, t or s, D]."""
    basis = x.basis
    shape = (basis.size, query.shape[1], query.shape[2], key.shape[2])
    stack = products(basis, query, key.mT, basis.pool.empty(shape, query.dtype, query.device))
    stack = stack.view(basis.size, at.b.stop - at.b.start, at.h.stop - at.h.start, *shape[2:])
    for step in steps:
        stack = _apply(basis, stack, step, at)
    return softmax_(basis, stack, -1) if x.weights else stack


def products(basis: Basis, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Stack of batched matrix products of the stacks [C, n, ...], into `out`."""
    for i in range(basis.size):
        for done, (j, m) in enumerate(basis.terms(i)):
            out[i].baddbmm_(a[j], b[m], beta=1 if done else 0)
    return out


def _apply(basis: Basis, stack: Tensor, step: Step, at: Block) -> Tensor:
    """One recorded step on a block that is ours to overwrite."""
    args = [a if i == step.me else at.of(a) for i, a in enumerate(step.args)]
    if not step.kwargs and len(args) == 2:
        other = args[1 - step.me]
        if step.func in SCALES:
            return stack.mul_(other) if "mul" in step.func.__name__ else stack.div_(other)
        if step.func in MOVES and (step.me == 0 or "add" in step.func.__name__):
            stack[0].add_(other) if "add" in step.func.__name__ else stack[0].sub_(other)
            return stack
    args[step.me] = Jet(basis, stack)
    kwargs = {k: at.of(v) for k, v in step.kwargs.items()}
    result: Tensor = RULES[step.func](*args, **kwargs).coef
    return result


def attend(x: Scores, value: Jet) -> Jet | None:
    """Stack of softmax(scores) V in blocks; None if this is not that product."""
    if not x.weights or x._coef is not None or value.dim() != 4 or value.shape[:2] != x.shape[:2]:
        return None
    basis, (B, H, T, S), D = x.basis, x.shape, value.shape[3]
    query, key, steps = _operands(x)
    v, limits = full(basis, value.coef), _limits(steps, T, S)
    # laid out for the transposition that follows
    y = basis.pool.empty((basis.size, B, T, H, D), query.dtype, query.device).transpose(2, 3)
    queries = T if T <= 1.5 * QUERIES else QUERIES
    for b, h in _groups(x, queries):
        q, k, w = (z[:, b, h].flatten(1, 2) for z in (query, key, v))  # [C, n, T or S, D]
        for start in range(0, T, queries):
            t = slice(start, min(start + queries, T))
            s = slice(0, max(limits[t]))
            p = _block(x, Block(b, h, t, s), q[:, :, t], k[:, :, s], steps).flatten(1, 2)
            part = basis.pool.empty((*p.shape[:3], D), p.dtype, p.device)
            products(basis, p, w[:, :, s], part)
            y[:, b, h, t] = part.view(y[:, b, h, t].shape)
    return Jet(basis, y)


def _limits(steps: tuple[Step, ...], T: int, S: int) -> list[int]:
    """For each query, how many keys can matter: those after it that an additive mask removes need no work."""
    for step in steps[-1:]:  # what follows a mask could bring the removed keys back
        mask = step.args[1 - step.me] if step.func in MOVES and len(step.args) == 2 else None
        if isinstance(mask, Tensor) and mask.shape[-2:] == (T, S):
            allowed = (mask > torch.finfo(mask.dtype).min / 2).reshape(-1, T, S).any(0)
            limit = S - allowed.int().flip(-1).argmax(-1)
            return [int(n) for n in limit.tolist()] if bool(allowed.any(-1).all()) else [S] * T
    return [S] * T


def _groups(x: Scores, queries: int) -> Iterator[tuple[slice, slice]]:
    """Groups of whole sequences, or of one sequence's heads, whose scores for a block of queries fit the cache."""
    B, H, _, S = x.shape
    heads = max(1, (BLOCK_CUDA if x.is_cuda else BLOCK) // (x.basis.size * queries * S))
    per = max(1, heads // H)
    wide = math.ceil(H / math.ceil(H / min(heads, H)))
    for b in range(0, B, per):
        for h in range(0, H, wide):
            yield slice(b, min(b + per, B)), slice(h, min(h + wide, H))


@rule("scaled_dot_product_attention", where=(torch.nn.functional,))
def _sdpa(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """The fused kernel's meaning, by the composite route."""
    if dropout_p:
        raise lost("attention dropout", "it is random; put the model in eval mode")
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    T, S = query.shape[-2], key.shape[-2]
    scores = torch.matmul(query, key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device).masked_fill(
                ~attn_mask, -math.inf
            )
        scores = scores + attn_mask
    return torch.matmul(torch.softmax(scores, -1), value)
