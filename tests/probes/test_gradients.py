"""Gradient cosines: planted ones are recovered through noise, and a model's are those of plain backward passes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import qwen3
from torch import Tensor
from toy import ToyTransformer

from interference import anatomy as anatomies
from interference.domain import Domain, Sequence
from interference.errors import InputError
from interference.model import Model, prepare
from interference.probes.gradients import gradient_agreement, gradient_cosines
from interference.probes.halves import prompt_halves

Tensors = dict[str, Tensor]


def rollouts(name: str, low: int, high: int, prompts: int = 6, rewards: bool = True) -> Domain:
    rng = np.random.default_rng(low)
    out = []
    for p in range(prompts):
        prompt = tuple(rng.integers(low, high, 3).tolist())
        for r in range(2):
            response = tuple(rng.integers(low, high, 1 + (p + r) % 3).tolist())
            out.append(Sequence(prompt, response, f"{name}{p}", float(r) if rewards else None))
    return Domain(name, tuple(out))


def backward(model: Model, domain: Domain) -> Tensors:
    """The gradient of the mean negative log-likelihood per response token, sequence by sequence."""
    parameters = {n: p.detach().clone().requires_grad_() for n, p in model.parameters.items()}
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for s in domain.sequences:
        ids = torch.tensor([s.prompt + s.response])
        logp = torch.func.functional_call(model.module, parameters, (ids,)).logits[0].log_softmax(-1)
        for t, y in enumerate(s.response):
            total = total - logp[len(s.prompt) + t - 1, y]
            tokens += 1
    found = torch.autograd.grad(total / tokens, list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def cosine(a: Tensors, b: Tensors, names: list[str]) -> float:
    x, y = (torch.cat([v[n].reshape(-1) for n in names]) for v in (a, b))
    return float(torch.nn.functional.cosine_similarity(x, y, dim=0))


def test_cosines_are_those_of_plain_backward_passes() -> None:
    model = prepare(ToyTransformer.seeded(0))
    domains = {"a": rollouts("a", 3, 12), "b": rollouts("b", 10, 22)}
    table = gradient_agreement(model, domains, batch_tokens=20)
    dense = {n: [backward(model, h) for h in prompt_halves(d)] for n, d in domains.items()}
    assert set(table["scope"]) == {"model", "module", "layer", "part"}
    names = list(model.parameters)
    checked = {
        ("model", -1, "all"): names,
        ("module", -1, "gate"): [n for n in names if "gate" in n],
        ("layer", 1, "all"): [n for n in names if n.startswith("layers.1.")],
        ("part", 0, "o"): ["layers.0.attention.o.weight"],
        ("part", 1, "k"): ["layers.1.attention.k.weight", "layers.1.attention.k.bias"],
    }
    rows = table.set_index(["scope", "layer", "module"])
    for key, members in checked.items():
        row = rows.loc[key]
        across = [cosine(x, y, members) for x in dense["a"] for y in dense["b"]]
        assert row["cosine"] == pytest.approx(np.mean(across), abs=1e-6)
        assert (row["lowest"], row["highest"]) == pytest.approx((min(across), max(across)), abs=1e-6)
        splits = [cosine(*dense[n], members) for n in "ab"]
        assert (row["split_a"], row["split_b"]) == pytest.approx(splits, abs=1e-6)
        apart = [{n: x[n] - y[n] for n in members} for x, y in dense.values()]
        assert row["noise"] == pytest.approx(cosine(*apart, members), abs=1e-6)
        assert row["parameters"] == sum(model.parameters[n].numel() for n in members)
    parts = table[table.scope == "part"]
    assert parts["parameters"].sum() == sum(p.numel() for p in model.parameters.values())


def test_planted_cosines_are_recovered_from_noisy_halves() -> None:
    """Conflict in the attention, synergy in the MLP, which nearly cancel; noise as large as the signal halves what is seen."""
    model = prepare(qwen3(0, hidden_size=48, intermediate_size=128))
    anatomy = anatomies.read(model)
    planted = {"q": -0.8, "o": -0.8, "gate": 0.7, "up": 0.7, "down": 0.0}
    g = torch.Generator().manual_seed(0)
    clean: dict[str, Tensors] = {"a": {}, "b": {}}
    for name, p in model.parameters.items():
        module = name.split(".")[-2].removesuffix("_proj")
        c = planted.get(module, 0.0)
        u, v = (torch.randn(p.shape, generator=g) for _ in "ab")
        clean["a"][name], clean["b"][name] = u, c * u + (1 - c**2) ** 0.5 * v

    def noisy(vector: Tensors) -> Tensors:
        return {n: x + torch.randn(x.shape, generator=g) for n, x in vector.items()}

    table = gradient_cosines({n: (noisy(v), noisy(v)) for n, v in clean.items()}, anatomy)
    rows = table[table.scope == "module"].set_index("module")
    for module, c in planted.items():
        error = 3 / rows.loc[module, "parameters"] ** 0.5
        assert rows.loc[module, "split_a"] == pytest.approx(0.5, abs=error)
        assert rows.loc[module, "cosine"] == pytest.approx(0.5 * c, abs=error)
        assert rows.loc[module, "disattenuated"] == pytest.approx(c, abs=3 * error)
        assert abs(rows.loc[module, "noise"]) < error
    assert (rows.loc[["q", "o"], "highest"] < -0.3).all()


def test_nothing_in_common_is_nothing() -> None:
    """Halves of pure noise: no cosine beyond that of noise, and no correction of what has no signal."""
    model = prepare(qwen3(0))
    g = torch.Generator().manual_seed(1)
    vectors = [{n: torch.randn(p.shape, generator=g) for n, p in model.parameters.items()} for _ in range(4)]
    table = gradient_cosines({"a": (vectors[0], vectors[1]), "b": (vectors[2], vectors[3])}, anatomies.read(model))
    within = table["cosine"].abs() < 3 * (0.25 / table["parameters"]) ** 0.5  # the mean of four
    assert within.mean() > 0.9
    negative = (table["split_a"] <= 0) | (table["split_b"] <= 0)
    assert negative.any()
    assert table.loc[negative, "disattenuated"].isna().all()
    zero = {n: torch.zeros_like(x) for n, x in vectors[0].items()}
    nothing = gradient_cosines({"a": (zero, zero), "b": (vectors[2], vectors[3])}, anatomies.read(model))
    assert nothing[["cosine", "split_a", "noise", "disattenuated"]].isna().all(axis=None)


def test_the_cache_is_read_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepare(qwen3(0))
    domains = {"a": rollouts("a", 3, 12), "b": rollouts("b", 10, 22)}
    held = gradient_agreement(model, domains, objective="reward")
    first = gradient_agreement(model, domains, objective="reward", cache=tmp_path)
    assert len(list(tmp_path.glob("gradient-*.safetensors"))) == 4
    with monkeypatch.context() as patched:
        patched.setattr("interference.probes.gradients.objective_gradient", None)
        again = gradient_agreement(model, domains, objective="reward", cache=tmp_path)
    pd.testing.assert_frame_equal(held, first)
    pd.testing.assert_frame_equal(first, again)
    one = next(tmp_path.glob("gradient-*.safetensors"))
    one.write_bytes(one.read_bytes()[:20])
    with pytest.raises(InputError, match="damaged"):
        gradient_agreement(model, domains, objective="reward", cache=tmp_path)


def test_bad_input() -> None:
    model, a = prepare(qwen3(0)), rollouts("a", 3, 12)
    with pytest.raises(InputError, match="at least two domains"):
        gradient_agreement(model, {"a": a})
    with pytest.raises(InputError, match="'kl'"):
        gradient_agreement(model, {"a": a, "b": a}, objective="kl")
    with pytest.raises(InputError, match="without a reward"):
        gradient_agreement(model, {"a": a, "b": rollouts("b", 3, 12, rewards=False)}, objective="reward")
    with pytest.raises(InputError, match="single prompt"):
        gradient_agreement(model, {"a": a, "b": rollouts("b", 3, 12, prompts=1)})
    odd, anatomy = {"strange": torch.ones(2)}, anatomies.read(model)
    with pytest.raises(InputError, match="'strange'"):
        gradient_cosines({"a": (odd, odd), "b": (odd, odd)}, anatomy)


def test_the_noise_floor_is_of_the_same_module_in_all_layers_and_pairs() -> None:
    model = prepare(qwen3(0))
    g = torch.Generator().manual_seed(0)

    def noise() -> Tensors:
        return {n: torch.randn(p.shape, generator=g) for n, p in model.parameters.items()}

    table = gradient_cosines({name: (noise(), noise()) for name in "abcd"}, anatomies.read(model))
    parts = table[(table["scope"] == "part") & (table["module"] == "q")]
    assert len(parts) == 6 * 2
    np.testing.assert_allclose(parts["noise_floor"], np.quantile(parts["noise"].abs(), 0.9))
    assert table.groupby(["scope", "module"])["noise_floor"].nunique().max() == 1
    every = table[table["scope"] == "part"]
    assert (every["cosine"].abs() <= every["noise_floor"]).mean() > 0.9  # the mean of four is less noisy than one
