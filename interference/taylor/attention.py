"""Attention, held back until it can be done in blocks of heads and queries.

A model's own eager attention is a product of queries and keys, some element-wise steps (scale, soft cap, mask), a softmax, and a
product with the values. `Scores` records those steps instead of storing C matrices of T x S; the last product then runs
them block by block. Any other use of the scores computes them in full, so nothing depends on the model's code looking so.
"""

# ruff: noqa: E741 (k and l are the updates' indices everywhere)
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interference.taylor.basis import Basis, full
from interference.taylor.jet import RULES, Jet, lost, rule, wrap
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
    weights: bool  # after the softmax

    @staticmethod
    def __new__(cls, query: Jet, key: Jet, steps: tuple[Step, ...] = (), weights: bool = False) -> Scores:
        shape = torch.Size((*query.shape[:3], key.shape[3]))
        like = query.coef
        self: Scores = wrap(cls, query.basis, shape, torch.empty(shape, device="meta").stride(), like, None)
        self.query, self.key, self.steps, self.weights = query, key, steps, weights
        return self

    def _stack(self) -> Tensor:
        everything = Block(*(slice(0, n) for n in self.shape))
        return _block(self, everything, *_operands(self))

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
    if func in NOTHING:
        with torch.no_grad():
            probe = Jet(x.basis, x.query.coef[:, :0, :0, :0, :1])
            same = RULES[func](probe, *args[1:], **kwargs)
            return x if same is probe else None
    if x.weights or any(isinstance(a, Jet) for i, a in enumerate(args) if i != me):
        return None
    if func in SOFTMAX:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        return Scores(x.query, x.key, x.steps, True) if dim in (-1, 3) else None
    if func not in POINTWISE or any(isinstance(v, Jet) for v in kwargs.values()):
        return None
    for a in args:
        if isinstance(a, Tensor) and (a.dim() > 4 or torch.broadcast_shapes(a.shape, x.shape) != x.shape):
            return None
    if func in SCALES and me == 1 and func in _functions("div", "divide", "true_divide"):
        return None
    return Scores(x.query, x.key, (*x.steps, Step(func, args, kwargs, me)), False)


def _number(x: Any) -> bool:
    return not isinstance(x, Tensor) or x.dim() == 0


def _operands(x: Scores) -> tuple[Tensor, Tensor, tuple[Step, ...]]:
    """Full stacks of queries and keys [C, B, H, T or S, D] with a leading scale taken into the queries, and the rest."""
    query, key, steps = full(x.basis, x.query.coef), full(x.basis, x.key.coef).mT, x.steps
    if steps and steps[0].func in SCALES and not steps[0].kwargs and _number(steps[0].args[1 - steps[0].me]):
        by = steps[0].args[1 - steps[0].me]
        query = query * by if "mul" in steps[0].func.__name__ else query / by
        steps = steps[1:]
    return query, key, steps


def _block(x: Scores, at: Block, query: Tensor, key: Tensor, steps: tuple[Step, ...]) -> Tensor:
    """The stack of one block of scores [C, b, h, t, s], after all its steps."""
    basis = x.basis
    q = query[:, at.b, at.h, at.t].flatten(1, 2)
    k = key[:, at.b, at.h, at.s].flatten(1, 2)
    out = basis.pool.empty((basis.size, q.shape[1], q.shape[2], k.shape[2]), q.dtype, q.device)
    for i in range(basis.size):
        terms = list(basis.terms(i))
        left = q[i] if i == 0 else torch.cat([q[a] for a, _ in terms], -1)
        right = k[i] if i == 0 else torch.cat([k[b] for _, b in terms], -1)
        torch.bmm(left, right.mT, out=out[i])
    stack = out.view(basis.size, *query[0, at.b, at.h, at.t].shape[:3], -1)
    for step in steps:
        stack = _apply(basis, stack, step, at)
    return softmax_(basis, stack, -1) if x.weights else stack


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
    v = full(basis, value.coef).permute(1, 2, 3, 0, 4)  # B H S C D
    # laid out for the transposition that follows
    y = basis.pool.empty((basis.size, B, T, H, D), query.dtype, query.device).transpose(2, 3)
    for at in _blocks(x, _limits(steps, T, S)):
        p = _block(x, at, query, key, steps).flatten(1, 2)
        y[:, at.b, at.h, at.t] = _mix(basis, p, v[at.b, at.h, at.s].flatten(0, 1)).view(y[:, at.b, at.h, at.t].shape)
    return Jet(basis, y)


def _mix(basis: Basis, p: Tensor, v: Tensor) -> Tensor:
    """Stack [C, N, t, D] of p v, for p [C, N, t, s] and v [N, s, C, D]: each p_i meets all its partners in one product."""
    C, low = basis.size, basis.low
    N, t = p.shape[1:3]
    y = torch.bmm(p[0], v.flatten(2)).view(N, t, C, -1).permute(2, 0, 1, 3).contiguous()
    for k in range(basis.updates):
        if not basis.pairs:
            both = torch.bmm(p[1 + k], v[:, :, [0, 1 + k]].flatten(2)).view(N, t, 2, -1)
            y[1 + k] += both[:, :, 0]
            y[basis.place[k, k]] += both[:, :, 1]
            continue
        partners = torch.bmm(p[1 + k], v[:, :, :low].flatten(2)).view(N, t, low, -1)
        y[1 + k] += partners[:, :, 0]
        for l in range(basis.updates):
            y[basis.place[min(k, l), max(k, l)]] += partners[:, :, 1 + l]
    first = v[:, :, 0]
    for i in range(low, C):
        y[i] += torch.bmm(p[i], first)
    return y


def _limits(steps: tuple[Step, ...], T: int, S: int) -> list[int]:
    """For each query, how many keys can matter: those after it that an additive mask removes need no work."""
    for step in steps:
        mask = step.args[1 - step.me] if step.func in MOVES and len(step.args) == 2 else None
        if isinstance(mask, Tensor) and mask.shape[-2:] == (T, S):
            allowed = (mask > torch.finfo(mask.dtype).min / 2).reshape(-1, T, S).any(0)
            limit = S - allowed.int().flip(-1).argmax(-1)
            return [int(n) for n in limit.tolist()] if bool(allowed.any(-1).all()) else [S] * T
    return [S] * T


def _blocks(x: Scores, limits: list[int]) -> Iterator[Block]:
    """Cut into blocks of queries, then of whole sequences or of one sequence's heads."""
    B, H, T, _ = x.shape
    room = (BLOCK_CUDA if x.is_cuda else BLOCK) // x.basis.size
    step = T if T <= 1.5 * QUERIES else QUERIES
    for t in range(0, T, step):
        keys = max(limits[t : t + step])
        heads = max(1, room // (min(step, T - t) * keys))
        per = max(1, heads // H)
        wide = math.ceil(H / math.ceil(H / min(heads, H)))
        for b in range(0, B, per):
            for h in range(0, H, wide):
                yield Block(
                    slice(b, min(b + per, B)), slice(h, min(h + wide, H)), slice(t, min(t + step, T)), slice(0, keys)
                )


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
