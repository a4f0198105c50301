"""Independent routes to the terms that taylor_jets computes, for any causal LM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.overrides import TorchFunctionMode

from interference.taylor import TokenTerms

Update = dict[str, Tensor]


def batch(vocabulary: int, rows: int = 3, length: int = 9, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Token ids and scored positions; id 0, which configurations use as padding, occurs as content."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (rows, length), generator=g)
    ids[0, 2] = ids[1, 4] = 0
    targets = torch.rand(rows, length, generator=g) > 0.4
    targets[:, 0], targets[0, 2] = False, True
    return ids, targets


def directions(model: nn.Module, K: int, scale: float = 0.1, seed: int = 2) -> list[Update]:
    g = torch.Generator().manual_seed(seed)
    return [
        {
            n: scale * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)
            for n, p in model.named_parameters()
        }
        for _ in range(K)
    ]


def moved(model: nn.Module, updates: Sequence[Update], alphas: Sequence[Any]) -> dict[str, Tensor]:
    out = dict(model.named_parameters())
    for update, alpha in zip(updates, alphas, strict=True):
        out = {n: p + alpha * update[n] if n in update else p for n, p in out.items()}
    return out


def logits(model: nn.Module, parameters: dict[str, Tensor], ids: Tensor, targets: Tensor) -> Tensor:
    out = functional_call(model, parameters, (), {"input_ids": ids, "use_cache": False})
    chosen: Tensor = out.logits[:, :-1][targets[:, 1:]]
    return chosen


def token_logp(model: nn.Module, parameters: dict[str, Tensor], ids: Tensor, targets: Tensor) -> Tensor:
    return logits(model, parameters, ids, targets).log_softmax(-1).gather(-1, ids[targets][:, None])[:, 0]


def nested(model: nn.Module, updates: Sequence[Update], ids: Tensor, targets: Tensor) -> TokenTerms:
    """All pairs by nested forward mode over the whole model."""
    K, y = len(updates), ids[targets][:, None]
    zero = torch.zeros((), dtype=next(model.parameters()).dtype)
    one = torch.ones_like(zero)
    d1: list[Tensor] = [zero] * K
    d2, fisher = ([[zero] * K for _ in range(K)] for _ in range(2))
    logp = zero
    for k in range(K):
        for m in range(k, K):

            def along(t: Tensor, k: int = k, m: int = m) -> Any:
                pair = [updates[k], updates[m]]
                return jvp(lambda s: logits(model, moved(model, pair, (s, t)), ids, targets), (zero,), (one,))

            (z, zk), (zm, zkm) = jvp(along, (zero,), (one,))
            p = z.softmax(-1)
            ck, cm, ckm = (x - (p * x).sum(-1, keepdim=True) for x in (zk, zm, zkm))
            logp, d1[k] = z.log_softmax(-1).gather(-1, y)[:, 0], ck.gather(-1, y)[:, 0]
            fisher[k][m] = fisher[m][k] = (p * ck * cm).sum(-1)
            d2[k][m] = d2[m][k] = ckm.gather(-1, y)[:, 0] - fisher[k][m]
    d2_, fisher_ = (torch.stack([torch.stack(row) for row in table]) for table in (d2, fisher))
    return TokenTerms(logp, torch.stack(d1), d2_, fisher_)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def worst(got: TokenTerms, expected: TokenTerms) -> float:
    """The largest relative error of d1, d2 and fisher, each against its own largest entry; logp too."""
    return max(relative(getattr(got, f), getattr(expected, f)) for f in ("logp", "d1", "d2", "fisher"))


class TrueFloat64(TorchFunctionMode):
    """Make a float64 model really compute in float64, and differentiable in nested forward mode.

    Drops the casts to float32 inside norms and softmax, and spells out layer norm and grouped products, whose nested forward
    mode is wrong or missing. It changes the function that model code computes in the same way for every route.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        wide = bool(args) and isinstance(args[0], Tensor) and args[0].dtype == torch.float64
        if (
            wide
            and func in (Tensor.float, Tensor.to)
            and torch.float32 in (*args[1:], kwargs.get("dtype"), _default(func))
        ):
            return args[0]
        if wide and func in (F.softmax, torch.softmax, Tensor.softmax):
            kwargs.pop("dtype", None)
        if func is F.layer_norm:
            return _layer_norm(*args, **kwargs)
        if func in (F.grouped_mm, torch._grouped_mm):
            ends = kwargs["offs"].tolist()
            return torch.cat(
                [args[0][a:b] @ args[1][e] for e, (a, b) in enumerate(zip([0, *ends], ends, strict=False))]
            )
        return func(*args, **kwargs)


def _default(func: Callable[..., Any]) -> Any:
    return torch.float32 if func is Tensor.float else None


def _layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    y = centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias
