"""Operations without a rule: nested forward mode of that operation alone, in-place forms, and refusals."""

# ruff: noqa: E741 (k and l are the updates' indices everywhere)
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp
from torch.utils._pytree import tree_flatten, tree_unflatten

from interference.taylor.basis import Basis, full
from interference.taylor.jet import Jet, Rule, lost

# Nested forward mode of these is known to be wrong or impossible (docs/numerics.md); they need rules.
WRONG = frozenset({
    "layer_norm", "native_layer_norm", "group_norm", "native_group_norm", "batch_norm", "instance_norm",
    "rms_norm", "_fused_rms_norm", "scaled_dot_product_attention", "grouped_mm", "_grouped_mm", "apply",
    "dropout", "checkpoint",
})  # fmt: skip


def refuse(what: str) -> Rule:
    """A rule that raises."""

    def raising(*args: Any, **kwargs: Any) -> Any:
        raise lost(what, "its result would lose them")

    return raising


def in_place(name: str, base: Rule | None) -> Rule:
    """The in-place form of a function that has a rule: its result is written into the jet, whose views follow."""
    if base is None:
        return refuse(f"in-place {name}")

    def writing(x: Any, *args: Any, **kwargs: Any) -> Any:
        if not (isinstance(x, Jet) and x.writable):
            raise lost(f"in-place {name}", f"a {type(x).__name__} cannot take them up")
        overwrite(x, base(x, *args, **kwargs), name)
        return x

    return writing


def overwrite(x: Jet, value: Any, name: str) -> None:
    """Write a result into a jet in place."""
    new = value.coef if isinstance(value, Jet) else value
    if not isinstance(value, Jet):
        x.coef.zero_()
        x.coef[0] = new
    elif len(new) > len(x.coef) or new.shape[1:] != x.coef.shape[1:]:
        raise lost(f"in-place {name}", "the result does not fit into the tensor written to")
    else:
        x.coef[: len(new)].copy_(new)
        x.coef[len(new) :] = 0


def nested(func: Any, name: str) -> Rule:
    """Nested forward mode of one operation; once per run, its second order is checked against differences."""
    if name in WRONG:
        return refuse(f"{name} (no rule, and its nested forward mode is not to be trusted)")

    def run(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("out") is not None:
            raise lost(f"{name}(out=...)", "the output cannot take them up")
        flat, spec = tree_flatten((args, kwargs))
        places = [i for i, a in enumerate(flat) if isinstance(a, Jet)]
        basis = flat[places[0]].basis
        stacks = [full(basis, flat[i].coef) for i in places]

        def f(*inputs: Tensor) -> tuple[Tensor, ...]:
            filled = list(flat)
            for i, x in zip(places, inputs, strict=True):
                filled[i] = x
            a, k = tree_unflatten(filled, spec)
            out, outer[0] = tree_flatten(func(*a, **k))
            outs = [o for o in out if isinstance(o, Tensor) and o.is_floating_point()]
            rest[:] = [None if isinstance(o, Tensor) and o.is_floating_point() else o for o in out]
            if not outs:
                raise lost(name, "it has no rule, and no floating point result")
            return tuple(outs)

        outer: list[Any] = [None]
        rest: list[Any] = []
        try:
            columns = _coefficients(f, stacks, basis)
            off = 0.0 if name in basis.checked else _disagreement(f, stacks, basis)
        except (RuntimeError, NotImplementedError) as error:
            raise lost(name, f"no rule, and nested forward mode failed ({str(error).splitlines()[0][:120]})") from error
        if not off < 1e-3:
            raise lost(name, f"no rule, and its nested forward mode is off by {off:.1e} from differences")
        basis.fallbacks[name] += 1
        if any(bool(s[1 : basis.low].any()) for s in stacks):  # else nothing moved, and nothing was checked
            basis.checked.add(name)
        jets = iter(Jet(basis, torch.stack(parts)) for parts in zip(*columns, strict=True))
        plain = iter([o.detach() if isinstance(o, Tensor) else o for o in rest])
        leaves = [next(jets) if o is None else o for o in plain]
        return tree_unflatten(leaves, outer[0])

    return run


def _coefficients(f: Callable[..., tuple[Tensor, ...]], stacks: list[Tensor], basis: Any) -> list[tuple[Tensor, ...]]:
    """Taylor coefficients of f, in the basis' order: for each, one tensor per output."""
    x0 = [s[0].detach() for s in stacks]
    zero = torch.zeros((), dtype=x0[0].dtype, device=x0[0].device)
    one = torch.ones_like(zero)
    with torch.enable_grad():
        value = f(*x0)
        firsts: list[tuple[Tensor, ...]] = []
        for k in range(basis.updates):
            firsts.append(jvp(f, tuple(x0), tuple(s[1 + k] for s in stacks))[1])
        seconds = []
        for k, l in basis.seconds:
            half = 2.0 if k == l else 1.0

            def path(s: Tensor, t: Tensor, k: int = k, l: int = l, half: float = half) -> tuple[Tensor, ...]:
                at = basis.place[k, l]
                return f(*(
                    x + s * c[1 + k] + t * c[1 + l] + (half * s * t) * c[at] for x, c in zip(x0, stacks, strict=True)
                ))  # fmt: skip

            def inner(t: Tensor, path: Any = path) -> Any:
                return jvp(lambda s: path(s, t), (zero,), (one,))[1]

            mixed = jvp(inner, (zero,), (one,))[1]
            seconds.append(tuple(m / half for m in mixed))
    return [tuple(t.detach() for t in column) for column in (value, *firsts, *seconds)]


def _disagreement(f: Callable[..., tuple[Tensor, ...]], stacks: list[Tensor], basis: Basis) -> float:
    """How far nested forward mode is from differences of plain forward mode, along a mixture of the updates, in float64.

    Some operations of torch are silently wrong when nested.
    """
    mixture = torch.linspace(1.0, 0.5, basis.updates, dtype=torch.float64)
    x0 = [s[0].detach().double() for s in stacks]
    x1 = [torch.tensordot(mixture.to(s.device), s[1 : basis.low].double(), 1) for s in stacks]
    size = max(float(x.abs().max()) for x in x1)
    if size == 0:
        return 0.0
    step = 1e-4 / size

    def first(t: Tensor) -> tuple[Tensor, ...]:
        tangents: tuple[Tensor, ...] = jvp(f, tuple(x + t * d for x, d in zip(x0, x1, strict=True)), tuple(x1))[1]
        return tangents

    with torch.enable_grad():
        at = torch.zeros((), dtype=torch.float64, device=x0[0].device)
        nested_second = jvp(first, (at,), (torch.ones_like(at),))[1]
        ahead, behind = first(at + step), first(at - step)
    worst = 0.0
    for a, b, second in zip(ahead, behind, nested_second, strict=True):
        scale = float(second.abs().max()) + 1e-5 * float(a.abs().max()) / step
        worst = max(worst, float((second - (a - b) / (2 * step)).abs().max()) / scale if scale else 0.0)
    return worst


def primal(x: Any) -> Any:
    """The plain value of a jet; other things as they are."""
    return x.primal if isinstance(x, Jet) else x
