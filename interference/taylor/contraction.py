"""Rules for matrix products: linear layers stacked into few calls, embeddings, and general bilinear operations."""

# ruff: noqa: E741 (k and l are the updates' indices everywhere)
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interference.taylor.basis import Basis, bilinear, full
from interference.taylor.jet import Jet, Weight, lost, rule
from interference.tree import Change, LowRank, dense


def linear(basis: Basis, x: Tensor, weight: Weight) -> Tensor:
    """Stack of x W^T for a stack x [C, ..., in] (or [1, ..., in]: a constant) and a weight W [out, in].

    All coefficients with W in one product; then the lower ones, shifted up, with each update:
    y_i = x_i W^T,   y_k += x_0 D_k^T,   y_kl += x_k D_l^T + x_l D_k^T  (k < l),   y_kk += x_k D_k^T.
    """
    n = x.shape[1:-1].numel()
    rows = x.reshape(-1, x.shape[-1])
    y = basis.pool.empty((basis.size * n, weight.shape[0]), rows.dtype, rows.device)
    if len(x) == basis.size:
        torch.mm(rows, weight.value.t(), out=y)
    else:
        torch.mm(rows, weight.value.t(), out=y[: len(rows)])
        y[len(rows) :] = 0
    add_changes(basis, y, rows, weight.changes, n)
    return y.view(basis.size, *x.shape[1:-1], weight.shape[0])


def add_changes(basis: Basis, y: Tensor, rows: Tensor, changes: tuple[Change | None, ...], n: int) -> None:
    """Add the updates' products to the rows of y; `n` rows to a coefficient."""
    if n == 0:  # an expert that no token chose
        return
    low, given = basis.low, len(rows) // n
    for k, change in enumerate(changes):
        if change is None:
            continue
        x, D = factored(rows[: n * low], change)
        if basis.updates == 1:
            y[n : n * (1 + min(given, 2))].addmm_(x, D)
            continue
        y[n * (1 + k) : n * (2 + k)].addmm_(x[:n], D)
        if given < low:
            continue
        if not basis.pairs:
            at = basis.place[k, k]
            y[n * at : n * (at + 1)].addmm_(x[n * (1 + k) : n * (2 + k)], D)
            continue
        at, more = basis.place[k, k], basis.updates - k  # l >= k is contiguous on both sides
        y[n * at : n * (at + more)].addmm_(x[n * (1 + k) :], D)
        for l in range(k):
            at = basis.place[l, k]
            y[n * at : n * (at + 1)].addmm_(x[n * (1 + l) : n * (2 + l)], D)


def factored(rows: Tensor, change: Change) -> tuple[Tensor, Tensor]:
    """Two factors of rows D^T, the second small where D is given by factors."""
    if isinstance(change, LowRank):
        return rows @ change.down.t(), change.up.t()
    return rows, change.t()


@rule("linear", where=(torch.nn.functional,))
def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(weight, Weight) and weight.head:
        from interference.taylor.head import Logits

        if isinstance(x, Jet) or isinstance(bias, Jet) or not weight.still:
            return Logits(x, weight, bias)
        weight = weight.value
    if not isinstance(weight, Jet):
        if isinstance(x, Jet):
            basis, y = x.basis, torch.nn.functional.linear(x.coef, weight)
        else:
            y0 = torch.nn.functional.linear(x, weight)
            return y0 if bias is None else y0 + bias
    elif isinstance(weight, Weight) and weight.dim() == 2:
        basis = weight.basis
        y = linear(basis, full(basis, x.coef) if isinstance(x, Jet) else x[None], weight)
    else:
        return torch.matmul(x, weight.mT) if bias is None else torch.matmul(x, weight.mT) + bias
    if bias is not None:  # y is ours alone
        move(y, bias)
    return Jet(basis, y)


def move(y: Tensor, bias: Any) -> None:
    """Add a bias to a stack in place."""
    if isinstance(bias, Weight):
        y[0] += bias.value
        for k, change in enumerate(bias.changes):
            if change is not None:
                y[1 + k] += dense(change)
    elif isinstance(bias, Jet):
        y[: len(bias.coef)] += bias.coef.reshape(len(bias.coef), *([1] * (y.dim() - bias.coef.dim())), *bias.shape)
    else:
        y[0] += bias


@rule("addmm")
def _addmm(bias: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    if beta == alpha == 1 and bias.dim() == 1:
        return _linear(mat1, mat2.t(), bias)
    return torch.matmul(mat1, mat2) * alpha + bias * beta


@rule("baddbmm")
def _baddbmm(bias: Any, batch1: Any, batch2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    product = torch.matmul(batch1, batch2) * alpha
    return product if beta == 0 else product + bias * beta


@rule("grouped_mm", "_grouped_mm", where=(torch, torch.nn.functional))
def _grouped_mm(x: Any, weight: Any, *, offs: Tensor, bias: Any = None, out_dtype: Any = None) -> Any:
    """Experts: rows up to offs[e] meet weight[e]."""
    if bias is not None or not isinstance(weight, Weight) or weight.dim() != 3 or x.dim() != 2:
        raise lost("grouped_mm of these arguments", "it has no rule")
    basis, stack = weight.basis, full(weight.basis, x.coef) if isinstance(x, Jet) else x[None]
    y = stack.new_zeros((basis.size, x.shape[0], weight.shape[2]))
    start = 0
    for e, end in enumerate(offs.tolist()):
        if end > start:
            y[:, start:end] = linear(basis, stack[:, start:end], _expert(weight, e))
        start = end
    return Jet(basis, y)


def _expert(weight: Weight, e: int) -> Weight:
    return weight.mapped(lambda w: w[e].t())


@rule("matmul", "__matmul__", "mm", "bmm", "mv", "dot")
def _matmul(a: Any, b: Any, *, out: Any = None) -> Any:
    from interference.taylor.attention import Scores, attend

    if out is not None:
        raise lost("matmul(out=...)", "the output cannot take them up")
    if isinstance(b, Weight) and b.dim() == 2 and a.dim() > 1:
        return _linear(a, b.t())
    if not isinstance(b, Jet):
        return Jet(a.basis, torch.matmul(a.coef, b)) if a.dim() >= b.dim() and a.dim() > 1 else _general(a, b)
    if not isinstance(a, Jet):
        return Jet(b.basis, torch.matmul(a, b.coef)) if b.dim() >= a.dim() > 1 else _general(a, b)
    if isinstance(a, Scores):
        done = attend(a, b)
        if done is not None:
            return done
    if a.dim() == b.dim() == 4 and a.shape[:2] == b.shape[:2]:
        return Scores(a, b)
    return _general(a, b)


def _general(a: Any, b: Any) -> Jet:
    basis = (a if isinstance(a, Jet) else b).basis
    x, y = (v.coef if isinstance(v, Jet) else v[None] for v in (a, b))
    return Jet(basis, bilinear(basis, x, y, torch.matmul))


@rule("__rmatmul__", where=(torch.Tensor,))
def _rmatmul(b: Any, a: Any) -> Any:
    return _matmul(a, b)


@rule("einsum", where=(torch,))
def _einsum(equation: Any, *operands: Any) -> Jet:
    inputs = operands[0] if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    if not isinstance(equation, str) or len(inputs) > 2:
        raise lost("einsum of three operands or in sublist form", "only one or two have a rule")
    basis = next(x.basis for x in inputs if isinstance(x, Jet))
    stacks = [x.coef if isinstance(x, Jet) else x[None] for x in inputs]
    if len(stacks) == 1:
        return Jet(basis, torch.stack([torch.einsum(equation, c) for c in stacks[0]]))
    return Jet(basis, bilinear(basis, stacks[0], stacks[1], lambda a, b: torch.einsum(equation, a, b)))


@rule("outer")
def _outer(a: Any, b: Any) -> Any:
    return a.unsqueeze(-1) * b


@rule("embedding", where=(torch.nn.functional,))
def _embedding(
    ids: Tensor,
    weight: Any,
    padding_idx: Any = None,
    max_norm: Any = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if max_norm is not None:
        raise lost("embedding(max_norm=...)", "it changes the weights in place")
    if isinstance(weight, Weight) and weight.still:
        return torch.nn.functional.embedding(ids, weight.value)
    weight = weight if isinstance(weight, Weight) else Weight(weight.basis, weight.coef[0], weight.coef[1:])
    basis = weight.basis
    y = weight.value.new_zeros((basis.size, *ids.shape, weight.shape[1]))
    torch.index_select(weight.value, 0, ids.reshape(-1), out=y[0].view(-1, weight.shape[1]))
    for k, change in enumerate(weight.changes):
        if isinstance(change, LowRank):
            y[1 + k].view(-1, weight.shape[1]).copy_(change.rows(ids.reshape(-1)))
        elif change is not None:
            torch.index_select(change, 0, ids.reshape(-1), out=y[1 + k].view(-1, weight.shape[1]))
    return Jet(basis, y)
