"""Every trap of docs/numerics.md, twice: with its remedy the number is an independent oracle's, without it is not.

Traps of files on disk (tied heads, half precision, damaged shards) are in test_checkpoint.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from test_jets import directions, one_batch, ragged
from tiny import qwen3
from torch import Tensor, nn
from toy import ToyConfig, ToyOutput, ToyTransformer
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from interference import derivatives, jets, kernels, tree
from interference import model as model_module
from interference.checks.differences import swept
from interference.domain import Batch, Domain, Sequence
from interference.errors import InputError
from interference.model import Model, load, prepare

Function = torch.autograd.Function


def gpt2(dtype: torch.dtype = torch.float64) -> Model:
    torch.manual_seed(0)
    sizes = {"vocab_size": 23, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.3}
    return prepare(GPT2LMHeadModel(GPT2Config(**sizes, attn_implementation="eager")).to(dtype))


def total(model: Model, batch: Batch) -> derivatives.Scalar:
    return lambda p: derivatives.sequence_logp(model, p, batch).sum()


def by_differences(model: Model, batch: Batch, d: dict[str, Tensor], order: int) -> float:
    """No derivative code: the model's own forward pass at moved weights."""

    def at(t: float) -> np.ndarray:
        with model.at([d], [t]):
            logp = model.forward(batch.input_ids)[:, :-1].double().log_softmax(-1)
            picked = logp.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
            return np.array([float((picked * batch.targets[:, 1:]).sum())])

    return float(swept(at, order, 0.5)[0][0])


def second(model: Model, batch: Batch, d: dict[str, Tensor], engine: str = "nested") -> float:
    return float(jets.token_jets(model, [d], batch, engine=engine)[0].d2.sum())


def reverse_second(model: Model, batch: Batch, d: dict[str, Tensor]) -> float:
    return tree.dot(derivatives.hvp(total(model, batch), model.parameters, d)[1], d)


def without_layer_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    for func in (torch.layer_norm, nn.functional.layer_norm):
        monkeypatch.delitem(kernels.INSTEAD, func)


def test_native_layer_norm_is_wrong_under_nested_forward_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = gpt2(), one_batch(ragged())
    d = directions(model, 1, 0.1)[0]
    expected = by_differences(model, batch, d, 2)
    assert second(model, batch, d) == pytest.approx(expected, rel=1e-5)
    without_layer_norm(monkeypatch)
    assert second(model, batch, d) != pytest.approx(expected, rel=1e-3)


class Cube(Function):
    """x^3 with a hand-written derivative, as a fused kernel has it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * tangent


class OldCube(Function):
    """The same in the older style, without setup_context."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


bound_early = Cube.apply
APPLICATIONS: list[Callable[[Tensor], Tensor]] = [lambda x: Cube.apply(x), bound_early, lambda x: OldCube.apply(x)]


class WithFunction(nn.Module):
    """The toy transformer behind a custom Function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = ToyTransformer.seeded(0)
        self.config, self.function = self.inner.config, function

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> ToyOutput:
        return ToyOutput(self.function(self.inner(input_ids).logits / 3))


def test_a_custom_function_has_no_second_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.tensor(3.0, dtype=torch.float64)
    nested = torch.func.jvp(lambda t: torch.func.jvp(Cube.apply, (t,), (x * 0 + 1,))[1], (x,), (x * 0 + 1,))[1]
    assert float(nested) == 0  # 6 x = 18, silently lost
    eager = prepare(WithFunction(lambda z: z**3))
    fused = prepare(WithFunction(bound_early))
    batch, d = one_batch(ragged()), directions(eager, 1)[0]
    expected = by_differences(eager, batch, d, 2)
    assert second(eager, batch, d) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(InputError, match=r"Cube, a custom autograd\.Function"):
        second(fused, batch, d)
    monkeypatch.setattr(kernels, "refuse_custom_functions", nullcontext)
    assert second(fused, batch, d) != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("function", APPLICATIONS, ids=["plain", "bound early", "old style"])
def test_custom_functions_are_refused_by_every_route(function: Callable[[Tensor], Tensor]) -> None:
    model, batch = prepare(WithFunction(function)), one_batch(ragged())
    d = directions(model, 1)[0]
    f = total(model, batch)
    routes: list[Callable[[], object]] = [
        lambda: second(model, batch, d, "taylor"),
        lambda: second(model, batch, d, "nested"),
        lambda: derivatives.gradient(f, model.parameters),
        lambda: derivatives.jvp(f, model.parameters, d),
        lambda: derivatives.vjp(f, model.parameters, torch.ones((), dtype=torch.float64)),
        lambda: derivatives.hvp(f, model.parameters, d),
        lambda: derivatives.gradient(lambda p: function(p["x"]).sum(), {"x": torch.ones(2)}),
        lambda: derivatives.ggn(lambda p: function(p["x"]), torch.sum, {"x": torch.ones(2)}, {"x": torch.ones(2)}),
    ]
    for route in routes:
        with pytest.raises(InputError, match="Cube, a custom"):
            route()
    model.forward(batch.input_ids)  # evaluation may use any kernel


def test_the_refusal_is_taken_back_whatever_happens() -> None:
    x = torch.ones(2, requires_grad=True)
    with kernels.refuse_custom_functions():
        with pytest.raises(InputError), kernels.refuse_custom_functions():
            Cube.apply(x)
        with pytest.raises(InputError):  # the outer one still holds
            Cube.apply(x)
    with pytest.raises(ZeroDivisionError), kernels.refuse_custom_functions():
        raise ZeroDivisionError
    assert torch.equal(torch.autograd.grad(Cube.apply(x).sum(), x)[0], torch.full((2,), 3.0))
    assert float(torch.func.grad(Cube.apply)(torch.tensor(2.0))) == 12
    assert "apply" not in vars(torch.autograd.function._SingleLevelFunction)


def test_the_refusal_is_of_this_thread_only() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with kernels.refuse_custom_functions(), ThreadPoolExecutor(1) as pool:
        assert float(pool.submit(lambda: Cube.apply(torch.tensor(2.0))).result()) == 8


def test_padding_idx_drops_a_gradient() -> None:
    module = ToyTransformer.seeded(0, ToyConfig(tie_word_embeddings=False))
    module.embed.padding_idx = 0
    model, batch = prepare(module), one_batch(ragged())
    assert "padding_idx of embed" in model.notes[0]
    d = directions(model, 1)[0]
    expected = by_differences(model, batch, d, 1)
    f = total(model, batch)
    assert tree.dot(derivatives.gradient(f, model.parameters), d) == pytest.approx(expected, rel=1e-7)
    module.embed.padding_idx = 0
    assert tree.dot(derivatives.gradient(f, model.parameters), d) != pytest.approx(expected, rel=1e-3)
    assert float(derivatives.jvp(f, model.parameters, d)[1]) == pytest.approx(expected, rel=1e-7)


def left_pad(rows: list[Sequence], group: list[int], pad: int) -> Batch:
    width = max(len(rows[i].prompt) + len(rows[i].response) for i in group)
    input_ids, targets = torch.full((len(group), width), pad), torch.zeros((len(group), width), dtype=torch.bool)
    for b, i in enumerate(group):
        input_ids[b, width - len(rows[i].prompt) - len(rows[i].response) :] = torch.tensor(
            rows[i].prompt + rows[i].response
        )
        targets[b, width - len(rows[i].response) :] = True
    return Batch(input_ids, targets, tuple(group))


def test_left_padding_is_seen(toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    d = directions(toy, 1)
    alone, right = (jets.sequence_jets(toy, d, ragged(), batch_tokens=n)[0].d2 for n in (1, 10**6))
    np.testing.assert_allclose(right, alone, rtol=1e-9)
    monkeypatch.setattr("interference.domain._pad", left_pad)
    left = jets.sequence_jets(toy, d, ragged(), batch_tokens=10**6)[0].d2
    assert np.abs(left / alone - 1).max() > 1e-2


def test_fused_attention_has_no_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    eager, fused = gpt2(), gpt2()
    fused.module.set_attn_implementation("sdpa")
    fused = prepare(fused.module)
    assert "math kernel" in fused.notes[-1]
    batch, d = one_batch(ragged()), directions(eager, 1, 0.1)[0]
    expected = by_differences(eager, batch, d, 2)
    for route in (second, reverse_second, lambda *a: second(*a, engine="taylor")):
        assert route(fused, batch, d) == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(kernels, "sdpa_kernel", nullcontext)
    for route in (second, reverse_second):
        with pytest.raises((NotImplementedError, RuntimeError), match="flash"):
            route(fused, batch, d)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_other_attention_is_refused(attention: str) -> None:
    model = qwen3(0)
    model.config._attn_implementation = attention
    with pytest.raises(InputError, match=f"attn_implementation '{attention}'.*eager"):
        prepare(model)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nested_forward_mode_without_grad_mode(toy: Model, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, d = one_batch(ragged()), directions(toy, 1)[0]
    expected = reverse_second(toy, batch, d)
    with mode():
        assert second(toy, batch, d) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(torch, "enable_grad", nullcontext)
    monkeypatch.setattr(torch, "inference_mode", lambda on: nullcontext())
    with torch.no_grad(), pytest.raises(NotImplementedError, match="silu_backward"):
        second(toy, batch, d)


def test_float32_islands_spoil_small_steps() -> None:
    """A float64 Qwen3 computes norms and softmax in float32: a fixed small step fails, a swept one does not."""
    model, batch = prepare(qwen3(0, tie_word_embeddings=False).double()), one_batch(ragged())
    batch.input_ids[batch.input_ids == 0] = 3
    d = directions(model, 1, 0.05)[0]
    expected = reverse_second(model, batch, d)
    assert by_differences(model, batch, d, 2) == pytest.approx(expected, rel=2e-3)

    def at(t: float) -> float:
        with model.at([d], [t]):
            logp = model.forward(batch.input_ids)[:, :-1].log_softmax(-1)
            return float((logp.gather(-1, batch.input_ids[:, 1:, None])[..., 0] * batch.targets[:, 1:]).sum())

    h = 1e-4
    assert (at(h) - 2 * at(0.0) + at(-h)) / h**2 != pytest.approx(expected, rel=0.05)


def per_batch_means(model: Model, domain: Domain, objective: str, *, batch_tokens: int = 4096) -> dict[str, Tensor]:
    """What must not be done: a mean per batch, and the mean of the means."""
    from interference.domain import batches

    parts = [
        derivatives.gradient(
            lambda p, b=b: -derivatives.sequence_logp(model, p, b).sum() / b.targets.sum(), model.parameters
        )
        for b in batches(domain.sequences, 0, batch_tokens)
    ]
    return {n: sum(p[n] for p in parts) / len(parts) for n in parts[0]}  # type: ignore[misc]


def test_means_of_ragged_batches_are_not_the_mean(toy: Model) -> None:
    domain, d = Domain("d", tuple(ragged())), directions(toy, 1)[0]
    batch = one_batch(ragged())
    expected = -by_differences(toy, batch, d, 1) / int(batch.targets.sum())
    for tokens in (1, 13, 10**6):
        found = derivatives.objective_gradient(toy, domain, "nll", batch_tokens=tokens)
        assert tree.dot(found, d) == pytest.approx(expected, rel=1e-7)
    assert tree.dot(per_batch_means(toy, domain, "nll", batch_tokens=10**6), d) == pytest.approx(expected, rel=1e-7)
    assert tree.dot(per_batch_means(toy, domain, "nll", batch_tokens=13), d) != pytest.approx(expected, rel=1e-2)


def test_tied_weights_go_once(toy: Model) -> None:
    assert "embed.weight" in toy.parameters
    assert "head.weight" not in toy.parameters
    batch, d = one_batch(ragged()), directions(toy, 1)[0]
    expected = by_differences(toy, batch, d, 1)
    assert float(derivatives.jvp(total(toy, batch), toy.parameters, d)[1]) == pytest.approx(expected, rel=1e-7)
    both = Model(toy.module, dict(toy.module.named_parameters(remove_duplicate=False)))
    with pytest.raises(ValueError, match="tied"):
        derivatives.jvp(total(both, batch), both.parameters, {**d, "head.weight": d["embed.weight"]})
    # Untied by hand, the head would stay where it is: another derivative.
    alone = ToyTransformer.seeded(0, ToyConfig(tie_word_embeddings=False))
    alone.load_state_dict(toy.module.state_dict())
    model = prepare(alone)
    moved = float(derivatives.jvp(total(model, batch), model.parameters, d)[1])
    assert moved != pytest.approx(expected, rel=1e-2)


def test_weights_changed_in_a_run_are_noticed(toy: Model) -> None:
    """Without the checksum, the second result is of other weights and nobody knows."""
    batch, d = one_batch(ragged()), directions(toy, 1)[0]
    before = second(toy, batch, d)

    @contextmanager
    def careless() -> Iterator[None]:
        toy.parameters["norm.weight"].mul_(1.1)
        yield

    with pytest.raises(RuntimeError, match="weights changed"), toy.untouched(), careless():
        pass
    assert second(toy, batch, d) != pytest.approx(before, rel=1e-3)


def test_float32_sums_drown_small_products() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1 << 20, generator=g) for _ in range(2))
    b -= a * float(a.double() @ b.double()) / float(a.double() @ a.double())  # nearly orthogonal
    expected = float(np.dot(a.numpy().astype(np.longdouble), b.numpy().astype(np.longdouble)))
    assert tree.dot({"w": a}, {"w": b}) == pytest.approx(expected, rel=1e-6)
    assert float(a @ b) != pytest.approx(expected, rel=1e-3)


def test_half_precision_is_noise(checkpoints: Any) -> None:
    from interference import Checkpoint

    wide = prepare(ToyTransformer.seeded(0))
    batch, d = one_batch(ragged()), directions(wide, 1)[0]
    expected = by_differences(wide, batch, d, 1)
    for dtype, close in ((torch.float32, True), (torch.bfloat16, False)):
        model = prepare(ToyTransformer.seeded(0).to(dtype))
        slope = derivatives.jvp(total(model, batch), model.parameters, {n: x.to(dtype) for n, x in d.items()})[1]
        assert (float(slope) == pytest.approx(expected, rel=1e-3)) == close
    with pytest.raises(InputError, match="bfloat16"):
        load(Checkpoint.open(checkpoints / "base"), dtype=torch.bfloat16)


def test_grouped_products_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native kernel has neither forward mode nor float64."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=23, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8, initializer_range=0.3, pad_token_id=None,
        attn_implementation="eager",
    )  # fmt: skip
    model, batch = prepare(Qwen3MoeForCausalLM(config).double()), one_batch(ragged())
    d = directions(model, 1, 1e-3)[0]
    routes = [lambda: second(model, batch, d), lambda: reverse_second(model, batch, d)]
    taylor = second(model, batch, d, "taylor")
    assert [r() for r in routes] == pytest.approx([taylor] * 2, rel=1e-4)
    slope = float(derivatives.jvp(total(model, batch), model.parameters, d)[1])
    assert by_differences(model, batch, d, 1) == pytest.approx(slope, rel=1e-3)
    monkeypatch.setattr(kernels, "INSTEAD", {})
    monkeypatch.setattr(model_module, "GROUPED", {})
    for route in routes:
        with pytest.raises((NotImplementedError, RuntimeError)):
            route()
    with pytest.raises(RuntimeError, match="Double"):
        model.forward(batch.input_ids)


@pytest.mark.parametrize("how", ["wrapped", "in place", "a part", "a method", "a class", "an attribute"])
def test_compiled_modules_are_refused(how: str) -> None:
    model: Any = ToyTransformer.seeded(0)
    if how == "wrapped":
        model = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    elif how == "a part":
        model.layers[0] = torch.compile(model.layers[0], backend="eager")
    elif how == "a class":
        kind = type("Fast", (type(model.norm),), {"forward": torch.compile(type(model.norm).forward, backend="eager")})
        model.norm.__class__ = kind
    elif how == "an attribute":
        model.layers[1].activation = torch.compile(torch.nn.functional.silu, backend="eager")
    else:
        model.layers[1].forward = torch.compile(model.layers[1].forward, backend="eager")
    with pytest.raises(InputError, match="compiled module"):
        prepare(model)


def test_functions_kept_from_the_compiler_are_no_compiled_ones() -> None:
    """torch.compiler.disable leaves nearly the same marks."""
    model: Any = ToyTransformer.seeded(0)
    model.layers[0].activation = torch.compiler.disable(torch.nn.functional.silu)
    assert prepare(model).module is model


def test_gradient_checkpointing_is_switched_off() -> None:
    """Its hook on the embedding raises under torch.func, also in evaluation mode."""
    plain, module = prepare(qwen3(0)), qwen3(0)
    module.gradient_checkpointing_enable()
    unprepared = Model(module.eval(), dict(module.named_parameters()))
    batch, d = one_batch(ragged()), directions(plain, 1, 0.05)[0]
    with pytest.raises(RuntimeError, match="requires_grad_"):
        second(unprepared, batch, d)
    model = prepare(module.train())
    assert "gradient checkpointing switched off" in model.notes
    for route in (second, reverse_second):
        assert route(model, batch, d) == pytest.approx(route(plain, batch, d), rel=1e-6)


def test_logits_only_where_tokens_are_scored(toy: Model) -> None:
    """The vocabulary-sized part is done in chunks, which change nothing, and never for all positions."""
    from interference.taylor import taylor_jets

    batch, ds = one_batch(ragged()), directions(toy, 2)
    chunked, fallbacks = taylor_jets(toy.module, ds, batch.input_ids, batch.targets, token_chunk=2)
    whole, _ = taylor_jets(toy.module, ds, batch.input_ids, batch.targets, token_chunk=10**6)
    torch.testing.assert_close(chunked.d2, whole.d2, rtol=1e-10, atol=1e-12)
    assert not fallbacks
    f = total(toy, batch)
    assert float(chunked.d1[0].sum()) == pytest.approx(
        tree.dot(derivatives.gradient(f, toy.parameters), ds[0]), rel=1e-9
    )
