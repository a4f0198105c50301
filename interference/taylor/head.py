"""The head: a linear layer onto the vocabulary, held back until the needed positions are known, then done in chunks."""

# ruff: noqa: E741 (k and l are the updates' indices everywhere)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interference.taylor.attention import NOTHING, POINTWISE, _number, unchanged
from interference.taylor.basis import Basis, full
from interference.taylor.contraction import factored, linear, move
from interference.taylor.deferred import strips
from interference.taylor.jet import RULES, Jet, Stamp, Weight, check, stamp, wrap
from interference.tree import Change, LowRank

NUMBERS = 3 * 2**20  # of logits at a time on a CPU, in a buffer that the layers have left


@dataclass(frozen=True)
class TokenTerms:
    """Terms of N response tokens along K updates, in the model's dtype.

    logp (N,); d1 (K, N) first derivatives of logp; d2 second derivatives and fisher covariances of the logits' first
    derivatives under the model's own distribution: (K, K, N), or (K, N) diagonals.
    """

    logp: Tensor
    d1: Tensor
    d2: Tensor
    fisher: Tensor


class Logits(Jet):
    """Logits not computed yet: hidden states [..., H], the head, and recorded element-wise steps (soft cap, scale)."""

    hidden: Any
    weight: Weight
    bias: Any
    steps: tuple[Any, ...]
    stamps: Stamp

    @staticmethod
    def __new__(cls, hidden: Any, weight: Weight, bias: Any, steps: tuple[Any, ...] = (), stamps: Stamp = ()) -> Logits:
        shape = torch.Size((*hidden.shape[:-1], weight.shape[0]))
        self: Logits = wrap(cls, weight.basis, shape, torch.empty(shape, device="meta").stride(), weight.value, None)
        self.hidden, self.weight, self.bias, self.steps = hidden, weight, bias, steps
        parts = (v.coef if isinstance(v, Jet) else v for v in (hidden, bias) if not isinstance(v, Weight))
        self.stamps = stamps or stamp(*parts)
        return self

    def then(self, *steps: Any) -> Logits:
        """The logits after further steps."""
        return Logits(self.hidden, self.weight, self.bias, (*self.steps, *steps), self.stamps)

    @property
    def pending(self) -> bool:
        """Whether nobody has looked at them, or changed them in place, before their positions are known."""
        return self._coef is None

    def rows(self, at: Tensor) -> Tensor:
        """Stack [C or 1, n, H] of the hidden states at flat positions."""
        check(self.stamps)
        hidden = full(self.basis, self.hidden.coef) if isinstance(self.hidden, Jet) else self.hidden[None]
        return hidden.flatten(1, -2).index_select(1, at)

    def at(self, rows: Tensor) -> Tensor:
        """Stack [C, n, V] of the logits of some rows."""
        y = linear(self.basis, rows, self.weight)
        if self.bias is not None:
            move(y, self.bias)
        for func, args, kwargs in self.steps:
            y = RULES[func](Jet(self.basis, y), *args, **kwargs).coef
        return y

    def _stack(self) -> Tensor:
        check(self.stamps)
        self.basis.fallbacks["logits of all positions at once"] += 1
        hidden = full(self.basis, self.hidden.coef) if isinstance(self.hidden, Jet) else self.hidden[None]
        return self.at(hidden.flatten(1, -2)).view(self.basis.size, *self.shape)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        x, kwargs = args[0] if args else None, kwargs or {}
        if isinstance(x, Logits) and x.pending:
            if func in NOTHING:
                same = unchanged(x.weight.value.new_empty((x.basis.size, 0)), x.basis, func, args, kwargs)
                if same is not None:
                    return x if same else x.then()
            elif func in POINTWISE and not kwargs and all(_number(a) and not isinstance(a, Jet) for a in args[1:]):
                return x.then((func, args[1:], kwargs))
        return super().__torch_function__(func, types, args, kwargs)


def terms(logits: Any, basis: Basis, positions: Tensor, labels: Tensor, token_chunk: int | None) -> TokenTerms:
    """Terms of the tokens `labels`, predicted at flat `positions`, from logits of any kind."""
    K, N = basis.updates, len(labels)
    shape = (K, K, N) if basis.pairs else (K, N)
    plain = not isinstance(logits, Jet)
    held = isinstance(logits, Logits) and logits.pending
    like = logits if plain else logits.weight.value if held else logits.coef
    out = TokenTerms(like.new_empty(N), like.new_empty((K, N)), like.new_empty(shape), like.new_empty(shape))
    if token_chunk is None:
        token_chunk = max(16, (2**28 if like.is_cuda else NUMBERS) // (basis.low * logits.shape[-1]))
    for start in range(0, N, token_chunk):
        part = slice(start, start + token_chunk)
        at, y = positions[part], labels[part]
        if plain:
            values = _constant(basis, logits.flatten(0, -2)[at], y)
        elif held and not logits.steps:
            values = _linear_terms(logits, logits.rows(at), y)
        else:
            stack = logits.at(logits.rows(at)) if held else full(basis, logits.coef).flatten(1, -2)[:, at]
            values = _terms(basis, stack, y)
        for name, value in zip(("logp", "d1", "d2", "fisher"), values, strict=True):
            getattr(out, name)[..., part] = value
    return out


Values = tuple[Tensor, Tensor, Tensor, Tensor]


def _constant(basis: Basis, z: Tensor, y: Tensor) -> Values:
    zero = z.new_zeros(())
    logp = z.log_softmax(-1).gather(-1, y[:, None])[:, 0]
    return logp, zero, zero, zero


def _low_terms(basis: Basis, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, d1, the covariances in the basis' order [seconds, n], and p, overwriting the stack z [1 + K, n, V].

    With u_k the first coefficients and c_k = u_k - E u_k: d1 = c_y, fisher_kl = E c_k c_l.
    """
    K, n = basis.updates, len(y)
    logp, d1 = z.new_empty(n), z.new_empty((K, n))
    fisher = z.new_empty((len(basis.seconds), n))
    for part in strips(basis, z):
        block, label = z[:, part], y[part, None]
        p, c = torch.softmax(block[0], -1), block[1:]
        # through the most likely token, whose probability does not underflow; the label's may
        logp[part] = (block[0].gather(-1, label) - block[0].amax(-1, keepdim=True) + p.amax(-1, keepdim=True).log())[
            :, 0
        ]
        block[0] = p
        for k in range(K):
            c[k] -= torch.linalg.vecdot(c[k], p)[:, None]
            d1[k, part] = c[k].gather(-1, label)[:, 0]
            weighted = c[k] * p
            for l in range(k + 1) if basis.pairs else (k,):
                fisher[basis.place[l, k] - basis.low, part] = torch.linalg.vecdot(weighted, c[l])
    return logp, d1, fisher, z[0]


def _linear_terms(logits: Logits, x: Tensor, y: Tensor) -> Values:
    """Terms of a purely linear head from rows x [C or 1, n, H], without the second order of the logits.

    That enters only as v_y - E v, which is linear in v: (W_y - E W) x_kl + (D_k,y - E D_k) x_l + (D_l,y - E D_l) x_k.
    """
    basis, W = logits.basis, logits.weight
    K, low, n = basis.updates, basis.low, x.shape[1]
    flat = x[: min(low, len(x))].reshape(-1, x.shape[-1])
    z = basis.pool.empty((low * n, W.shape[0]), flat.dtype, flat.device)
    torch.mm(flat, W.value.t(), out=z[: len(flat)])
    z[len(flat) :] = 0
    for k, D in enumerate(W.changes):
        if D is not None:
            z[(1 + k) * n : (2 + k) * n].addmm_(*factored(flat[:n], D))
    z = z.view(low, n, -1)
    if logits.bias is not None:
        move(z, logits.bias)
    logp, d1, fisher, p = _low_terms(basis, z, y)
    second = torch.zeros_like(fisher)
    if len(x) > 1:
        second += _centred(W.value, p, y, x[low:])
        for k, D in enumerate(W.changes):
            if D is None:
                continue
            moved = _centred(D, p, y, x[1:low])
            for l in range(K):
                i = basis.place.get((min(k, l), max(k, l)))
                if i is not None:
                    second[i - low] += moved[l]
    return _spread(basis, logp, d1, second, fisher)


def _centred(W: Change, p: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """(W_y - E W) x for each of the stacked x [m, n, H]."""
    if isinstance(W, LowRank):
        x, W = x @ W.down.t(), W.up
    g = torch.addmm(W.index_select(0, y), p, W, alpha=-1)
    return (x * g).sum(-1)


def _terms(basis: Basis, z: Tensor, y: Tensor) -> Values:
    """Terms from the full stack [C, n, V] of logits."""
    v = z[basis.low :]
    logp, d1, fisher, p = _low_terms(basis, z[: basis.low], y)
    second = v.gather(-1, y[None, :, None].expand(len(v), -1, 1))[..., 0] - (v * p).sum(-1)
    return _spread(basis, logp, d1, second, fisher)


def _spread(basis: Basis, logp: Tensor, d1: Tensor, second: Tensor, fisher: Tensor) -> Values:
    """From Taylor coefficients to derivatives, from the basis' order to (K, K, n) or (K, n)."""
    factor = second.new_tensor([2.0 if k == l else 1.0 for k, l in basis.seconds])[:, None]
    d2 = second * factor - fisher
    if not basis.pairs:
        return logp, d1, d2, fisher
    K = basis.updates
    order = [basis.place[min(k, l), max(k, l)] - basis.low for k in range(K) for l in range(K)]
    return logp, d1, d2[order].view(K, K, -1), fisher[order].view(K, K, -1)
