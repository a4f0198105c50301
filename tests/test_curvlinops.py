"""Products and jets against curvlinops' Hessian and Gauss-Newton operators: the same model, the same data, float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_jets import directions, one_batch, ragged
from tiny import qwen3
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode
from toy import ToyTransformer

from benchmarks import peer
from interference import derivatives, tree
from interference.domain import Batch, Sequence, batches
from interference.jets import sequence_jets, token_jets
from interference.model import Model, prepare
from interference.tree import NamedTensors

curvlinops = pytest.importorskip("curvlinops")

RELATIVE = 1e-6
# Without pad_token_id: transformers starts that row of the embedding at zero, where an RMS norm's curvature is 1 / eps, and a
# product dominated by one such row would hide every other error.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "toy": lambda: ToyTransformer.seeded(0),
    "Qwen3": lambda: qwen3(pad_token_id=None).double(),
}
Vector = dict[str, Tensor]


class NoFloat32(TorchFunctionMode):
    """Keeps float64 in float64 where model code casts to float32 (transformers' norms and softmax), on every route alike."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to and args[0].dtype == torch.float64 and args[1:] == (torch.float32,):
            return args[0]
        if func is nn.functional.softmax and args[0].dtype == torch.float64:
            kwargs = {key: value for key, value in kwargs.items() if key != "dtype"}
        return func(*args, **kwargs)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    with NoFloat32():
        yield prepare(MODELS[request.param]())


def theirs(kind: str, model: Model, data: list[Batch], v: NamedTensors, reduction: str = "sum") -> Vector:
    """curvlinops' product of the Hessian or the GGN of the negative log-likelihood with v."""
    operator = {"Hessian": curvlinops.HessianLinearOperator, "GGN": curvlinops.GGNLinearOperator}[kind](
        peer.ResponseLogits(model.module),
        nn.CrossEntropyLoss(reduction=reduction),
        list(model.parameters.values()),
        peer.data(data),
        batch_size_fn=peer.size,
        check_deterministic=False,
    )
    return dict(zip(model.parameters, operator @ [v[n] for n in model.parameters], strict=True))


def logits(model: Model, batch: Batch) -> Callable[[NamedTensors], Tensor]:
    return lambda p: model.logits(p, batch.input_ids)[:, :-1][batch.targets[:, 1:]]


def hessian(model: Model, batch: Batch, v: NamedTensors) -> Vector:
    """Ours: the same product, through interference.derivatives."""
    return derivatives.hvp(lambda p: -derivatives.sequence_logp(model, p, batch).sum(), model.parameters, v)[1]


def gauss_newton(model: Model, batch: Batch, v: NamedTensors) -> Vector:
    labels = batch.input_ids[batch.targets]
    loss = lambda z: cross_entropy(z, labels, reduction="sum")  # noqa: E731
    return derivatives.ggn(logits(model, batch), loss, model.parameters, v)


OURS = {"Hessian": hessian, "GGN": gauss_newton}


def difference(a: NamedTensors, b: NamedTensors) -> float:
    """|a - b| / |b|, and the worst single tensor's, whichever is larger."""
    assert a.keys() == b.keys()
    return max(
        tree.norm(tree.axpy(-1.0, a, b)) / tree.norm(b),
        *(float((a[n] - b[n]).norm() / b[n].norm().clamp_min(1e-6 * tree.norm(b))) for n in b),
    )


@pytest.mark.parametrize("kind", OURS)
def test_products_agree(model: Model, kind: str) -> None:
    batch, (v,) = one_batch(ragged()), directions(model, 1)
    assert difference(OURS[kind](model, batch, v), theirs(kind, model, [batch], v)) < RELATIVE


@pytest.mark.parametrize("kind", OURS)
def test_jets_are_their_quadratic_forms(model: Model, kind: str) -> None:
    """Summed over tokens, d2 is minus the form of the Hessian of the negative log-likelihood, and fisher that of its GGN."""
    batch, ds = one_batch(ragged()), directions(model, 2)
    jets, fallbacks = token_jets(model, ds, batch)
    assert not fallbacks
    sums = (-jets.d2 if kind == "Hessian" else jets.fisher).sum(-1)
    for k, d in enumerate(ds):
        product = theirs(kind, model, [batch], d)
        for l, other in enumerate(ds):  # noqa: E741
            assert float(sums[k, l]) == pytest.approx(tree.dot(product, other), rel=RELATIVE)


PLANTED = {
    "a sign": lambda product, v: {n: -x for n, x in product.items()},
    "a factor": lambda product, v: {n: x * (1 + 1e-5) for n, x in product.items()},
    "a factor in one tensor": lambda product, v: {
        n: x * (1 + 1e-5) if n.endswith("norm.weight") else x for n, x in product.items()
    },
    "damping": lambda product, v: {n: x + 1e-4 * v[n] for n, x in product.items()},
}


@pytest.mark.parametrize("bug", PLANTED)
@pytest.mark.parametrize("kind", OURS)
def test_planted_bugs_are_seen(model: Model, kind: str, bug: str) -> None:
    batch, (v,) = one_batch(ragged()), directions(model, 1)
    wrong = PLANTED[bug](OURS[kind](model, batch, v), v)
    assert difference(wrong, theirs(kind, model, [batch], v)) > RELATIVE


def test_the_gauss_newton_part_is_not_the_hessian(model: Model) -> None:
    """The other half of the oracle's power: what drops the model's own second derivative does not pass for the Hessian."""
    batch, (v,) = one_batch(ragged()), directions(model, 1)
    assert difference(gauss_newton(model, batch, v), theirs("Hessian", model, [batch], v)) > 1e-2


def uneven(sequences: list[Sequence]) -> list[Batch]:
    """Batches of one or few sequences with different counts of response tokens."""
    out = list(batches(sequences, tokens=14))
    tokens = {int(b.targets.sum()) / len(b.index) for b in out}
    assert len(out) > 2
    assert len(tokens) > 1
    return out


def test_per_batch_means_on_ragged_splits(model: Model) -> None:
    """Averaging per-batch means changes the product; ours is a pair of sums, divided once, and so is the same for any split.

    With reduction="mean", curvlinops weights a batch by its sequences where the mean was over its tokens; with "sum" it agrees.
    """
    sequences, (v,) = ragged(), directions(model, 1)
    whole, split = one_batch(sequences), uneven(sequences)
    count = float(whole.targets.sum())
    right = {n: x / count for n, x in hessian(model, whole, v).items()}

    assert difference(right, theirs("Hessian", model, [whole], v, "mean")) < RELATIVE
    sums = {n: x / count for n, x in theirs("Hessian", model, split, v).items()}
    assert difference(right, sums) < RELATIVE
    averaged = theirs("Hessian", model, split, v, "mean")
    assert difference(right, averaged) > 0.05

    truth = tree.dot(right, v)
    for tokens in (14, 10**6):
        jets, _ = sequence_jets(model, [v], sequences, batch_tokens=tokens)
        assert -jets.d2.sum() / jets.tokens.sum() == pytest.approx(truth, rel=RELATIVE)
    assert abs(tree.dot(averaged, v) / truth - 1) > 100 * RELATIVE
