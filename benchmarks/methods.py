"""The methods that are compared, each with the way to read its numbers.

All of them score the same response tokens, and none computes logits where no response token is predicted (but for the forward
pass that says so). Numbers are named by quantity and updates, such as "d2 0 3": per token (N,), or their sum (), where the
method has nothing finer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks import peer
from benchmarks.models import UPDATES, Case
from interference import derivatives
from interference.jets import TokenJets, token_jets
from interference.model import prepare
from interference.tree import NamedChanges, NamedTensors, dense, dot

LAST = UPDATES - 1
Numbers = dict[str, Tensor]


@dataclass(frozen=True)
class Method:
    """`run` is timed; `read` turns its result into numbers; `updates` it differentiates along; `family` groups rows."""

    name: str
    family: str
    updates: int
    run: Callable[[], Any]
    read: Callable[[Any], Numbers]


def methods(case: Case, lora: NamedChanges) -> list[Method]:
    """Every method that can run here; curvlinops only where it is installed."""
    return [*forwards(case), *reverse(case), *peers(case), *jets(case, lora)]


def forwards(case: Case) -> list[Method]:
    """Log-probabilities without derivatives; the fastest of these is the unit."""
    model, batch = case.model, case.batch

    def whole() -> Tensor:
        z = model.forward(batch.input_ids)[:, case.start - 1 : -1].flatten(0, 1)
        return -cross_entropy(z, case.labels, reduction="none")

    @torch.no_grad()
    def chunked(chunk: int = 256) -> Tensor:
        module: Any = model.module
        hidden = module.model(batch.input_ids, use_cache=False).last_hidden_state[:, case.start - 1 : -1].flatten(0, 1)
        pieces = zip(hidden.split(chunk), case.labels.split(chunk), strict=True)
        return torch.cat([-cross_entropy(h @ module.lm_head.weight.T, y, reduction="none") for h, y in pieces])

    def fused() -> Tensor:
        with attention(model.module, "sdpa"):
            return chunked()

    read = lambda logp: {"logp": logp}  # noqa: E731
    return [
        Method("forward, all logits", "forward", 0, whole, read),
        Method("forward, head in chunks", "forward", 0, chunked, read),
        Method("forward, head in chunks, SDPA", "forward", 0, fused, read),
    ]


@contextmanager
def attention(module: Any, implementation: str) -> Any:
    """The module with another attention kernel for a while."""
    module.set_attn_implementation(implementation)
    try:
        yield
    finally:
        module.set_attn_implementation("eager")


def total(case: Case) -> Callable[[NamedTensors], Tensor]:
    """Sum of the response's log-probabilities as a function of the parameters."""
    keep = case.batch.input_ids.shape[1] - case.start + 1

    def of(parameters: NamedTensors) -> Tensor:
        z = case.model.logits(parameters, case.batch.input_ids, keep)[:, :-1].flatten(0, 1)
        return -cross_entropy(z, case.labels, reduction="sum")

    return of


def reverse(case: Case) -> list[Method]:
    """One direction, sums over tokens: gradient, jvp, and the Hessian-vector product in its two classical forms."""
    f, theta, d = total(case), case.model.parameters, case.updates[0]

    def leaves() -> dict[str, Tensor]:
        return {n: p.detach().requires_grad_() for n, p in theta.items()}

    def gradient() -> dict[str, Tensor]:
        p = leaves()
        return dict(zip(p, torch.autograd.grad(f(p), list(p.values())), strict=True))

    def double_backward() -> dict[str, Tensor]:
        p = leaves()
        grads = torch.autograd.grad(f(p), list(p.values()), create_graph=True)
        along = torch.stack([(g * d[n]).sum() for n, g in zip(p, grads, strict=True)]).sum()
        return dict(zip(p, torch.autograd.grad(along, list(p.values())), strict=True))

    return [
        Method("gradient", "gradient", 1, gradient, lambda g: {"d1 0": scalar(dot(g, d))}),
        Method("jvp", "jvp", 1, lambda: derivatives.jvp(f, theta, d), lambda r: {"d1 0": r[1]}),
        Method(
            "HVP, forward over reverse",
            "hvp",
            1,
            lambda: derivatives.hvp(f, theta, d),
            lambda r: products(case, r[1]) | {"d1 0": scalar(dot(r[0], d))},
        ),
        Method("HVP, double backward", "hvp", 1, double_backward, lambda h: products(case, h)),
    ]


def products(case: Case, hd: NamedTensors, sign: float = 1.0) -> Numbers:
    """The numbers of a Hessian-vector product along update 0."""
    return {f"d2 0 {k}": scalar(sign * dot(hd, case.updates[k])) for k in (0, LAST)}


def scalar(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def peers(case: Case) -> list[Method]:
    """curvlinops' Hessian as an operator on a list of tensors, the form that spares it copies; sums, one batch."""
    try:
        from curvlinops import HessianLinearOperator
    except ImportError:
        return []
    d = case.updates[0]
    operator = HessianLinearOperator(
        peer.ResponseLogits(case.model.module),
        nn.CrossEntropyLoss(reduction="sum"),
        list(case.model.parameters.values()),
        peer.data([case.batch]),
        batch_size_fn=peer.size,
        check_deterministic=False,
    )

    def read(h: list[Tensor]) -> Numbers:
        return products(case, dict(zip(case.model.parameters, h, strict=True)), sign=-1.0)

    return [Method("HVP, curvlinops", "hvp", 1, lambda: operator @ [d[n] for n in case.model.parameters], read)]


def jets(case: Case, lora: NamedChanges) -> list[Method]:
    """Every token's logp, d1, d2 and fisher: nested forward mode, and the Taylor engine for one update and for four."""
    model, batch, updates = case.model, case.batch, case.updates

    def jet(chosen: Sequence[Any], pairs: bool = False, engine: str = "taylor") -> Callable[[], TokenJets]:
        return lambda: token_jets(model, chosen, batch, pairs=pairs, engine=engine)[0]

    out = [
        Method("jets, nested jvp, K = 1", "nested", 1, jet(updates[:1], engine="nested"), entries),
        Method("jets, taylor, K = 1", "taylor", 1, jet(updates[:1]), entries),
        Method("jets, taylor, K = 4 diagonal", "taylor", UPDATES, jet(updates), entries),
        Method("jets, taylor, K = 4 pairs", "taylor", UPDATES, jet(updates, pairs=True), entries),
    ]
    return [*out, Method("jets, taylor, K = 1 as LoRA factors", "taylor", 1, jet([lora]), factored)]


def factored(jets: TokenJets) -> Numbers:
    """The numbers of the update that is given by factors, under its own names."""
    return {k.replace("0", "lora"): v for k, v in entries(jets).items()}


def entries(jets: TokenJets, names: Sequence[int] | None = None) -> Numbers:
    """Numbers of the first and the last update, and of their pair; `names` are the updates' own indices."""
    K = len(jets.d1)
    names = names or range(K)
    ends = sorted({0, K - 1})
    out = {"logp": jets.logp} | {f"d1 {names[k]}": jets.d1[k] for k in ends}
    for quantity, x in (("d2", jets.d2), ("fisher", jets.fisher)):
        diagonal = x.dim() == 2
        out |= {f"{quantity} {names[k]} {names[k]}": x[k] if diagonal else x[k, k] for k in ends}
        if K > 1 and not diagonal:
            out[f"{quantity} {names[0]} {names[K - 1]}"] = x[0, K - 1]
    return out


def reference(case: Case, lora: NamedChanges) -> Numbers:
    """Nested forward mode in float64 along the first and the last update and the pair of them (and the factored one)."""
    module = copy.deepcopy(case.model.module).double()
    model = replace(prepare(module), notes=())

    def jet(chosen: Sequence[NamedTensors]) -> TokenJets:
        wide = [{n: v.double() for n, v in u.items()} for u in chosen]
        return token_jets(model, wide, case.batch, engine="nested")[0]

    product = {name: dense(change) for name, change in lora.items()}
    return entries(jet([case.updates[0], case.updates[LAST]]), (0, LAST)) | factored(jet([product]))


def errors(numbers: Numbers, reference: Numbers) -> dict[str, float | None]:
    """By quantity, the largest difference from the reference over the largest of the reference's values; None: not finite.

    A number that a method gives only as a sum is compared with the sum.
    """
    worst: dict[str, list[float]] = {}
    for name, value in numbers.items():
        truth, value = reference[name].double(), value.double()
        truth = truth.sum() if value.dim() == 0 else truth
        worst.setdefault(name.split()[0], []).append(float((value - truth).abs().max() / truth.abs().max()))
    return {quantity: max(x) if all(map(math.isfinite, x)) else None for quantity, x in worst.items()}
