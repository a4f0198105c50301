"""Shared rows against plain ones and against each sequence by itself, in float64; and models that do not fit are found out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ragged import alone, ragged
from tiny import OLD, SIZES, qwen3
from torch import Tensor, nn
from toy import ToyTransformer
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig

from interference import measurement, shared_prompts
from interference.domain import Domain, Sequence
from interference.domain import batches as plain_batches
from interference.forecasting.trainable import Trainable, trainable
from interference.forecasting.training import Adapter
from interference.model import Model, prepare


def shared_rows(model: Model, domain: Domain, tokens: int = 10_000) -> list[shared_prompts.Rows]:
    found = list(shared_prompts.batches(model, domain.sequences, tokens))
    assert all(r.mask is not None for r in found), "rows are shared"
    return found


def logp(leaves: Trainable, found: list[shared_prompts.Rows], size: int) -> Tensor:
    out = torch.zeros(size, dtype=torch.float64)
    for rows in found:
        out = out.index_put((torch.tensor(rows.index),), rows.sums(leaves.logp(rows)).double())
    return out


@pytest.mark.parametrize("tokens", [10_000, 70, 1])
@pytest.mark.parametrize("adapter", [None, Adapter(rank=2, alpha=4)])
def test_log_probabilities_and_gradients_are_those_of_single_sequences(
    toy: Model, adapter: Adapter | None, tokens: int
) -> None:
    domain = ragged()
    leaves = trainable(toy, adapter)
    with torch.no_grad():
        for i, (name, leaf) in enumerate(leaves.leaves.items()):
            if name.endswith(".b"):
                leaf += 0.1 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(i), dtype=leaf.dtype)
    found = shared_rows(toy, domain, tokens)
    assert sorted(i for r in found for i in r.index) == list(range(len(domain.sequences)))
    ours = logp(leaves, found, len(domain.sequences))
    weights = torch.randn(len(ours), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = torch.autograd.grad(weights @ ours, list(leaves.leaves.values()))
    parameters = dict(leaves.parameters())

    class Bound(nn.Module):
        def forward(self, ids: Tensor) -> Any:
            return torch.func.functional_call(toy.module, parameters, (ids,))

    theirs = alone(Model(Bound(), parameters), domain)
    wanted = torch.autograd.grad(weights @ theirs, list(leaves.leaves.values()))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_the_places_are_what_is_distinct() -> None:
    """Six places of two sequences of five tokens that part after four; the last token of each is predicted only."""
    model = prepare(ToyTransformer.seeded(0))
    domain = Domain("d", (Sequence((3, 4), (5, 6, 7, 9), "p"), Sequence((3, 4), (5, 6, 8, 9), "p")))
    (rows,) = shared_rows(model, domain)
    assert rows.input_ids.tolist() == [[3, 4, 5, 6, 7, 8]]
    assert rows.positions is not None
    assert rows.mask is not None
    assert rows.positions.tolist() == [[0, 1, 2, 3, 4, 4]]
    assert (rows.mask[0, 0] == 0).int().tolist()[-2:] == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 1]]
    assert rows.predicting.tolist() == [[0] * 5, [1, 2, 3, 4, 5]]


def test_rows_are_cut_where_attention_would_grow() -> None:
    rng = np.random.default_rng(0)
    rows = [Sequence((1, 2, 3, 4), tuple(rng.integers(0, 9, 40).tolist()), "p") for _ in range(20)]
    trees = shared_prompts.plan(rows)
    assert sorted(i for t in trees for i in t.members) == list(range(20))
    assert len(trees) > 10, "long responses share little"
    assert all(t.width**2 <= shared_prompts.MOST_SQUARES * len(t.members) * 43**2 for t in trees)
    short = [Sequence(tuple(range(10)), (i,) * 6, "p") for i in range(30)]
    # k responses of 5 places after a prompt of 10: (10 + 5 k)^2 <= 1.5 k 15^2 up to k = 9
    assert [(len(t.members), t.width, t.longest) for t in shared_prompts.plan(short)] == [(9, 55, 15)] * 3 + [
        (3, 25, 15)
    ]


def test_a_cut_group_and_packed_rows_score_alike(toy: Model) -> None:
    prompt = tuple(range(3, 11))
    rows = [Sequence(prompt, (3 + i % 9, 4 + i // 9, 5, 6, 7), "p") for i in range(60)]
    domain = Domain("d", (*rows, *ragged(3).sequences))
    found = shared_rows(toy, domain)
    assert len(shared_prompts.plan(rows)) > 1
    assert sum(len(r.input_ids) for r in found) < len(shared_prompts.plan(domain.sequences)), "rows hold several trees"
    ours = logp(Trainable(toy), found, len(domain.sequences))
    torch.testing.assert_close(ours.detach(), alone(toy, domain), rtol=1e-10, atol=1e-10)


def test_where_little_is_saved_rows_are_plain(toy: Model) -> None:
    rows = [Sequence((i,), (5, 6, 7, i), str(i)) for i in range(8)]
    found = list(shared_prompts.batches(toy, rows, 20))
    assert all(r.mask is None and r.input_ids.numel() <= 20 for r in found)
    domain = Domain("d", tuple(rows))
    torch.testing.assert_close(logp(Trainable(toy), found, 8).detach(), alone(toy, domain), rtol=1e-10, atol=1e-10)


def test_scores_are_those_of_plain_batches(toy: Model) -> None:
    domain, g = ragged(1), torch.Generator().manual_seed(0)
    update = {n: 0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in toy.parameters.items()}
    found = measurement.score(toy, domain, [(update, 1.0)])
    assert shared_rows(toy, Domain("d", tuple(domain.distinct()[0])))
    wanted = np.zeros((4, len(domain.sequences)))
    for batch in plain_batches(domain.sequences, 0):
        first = measurement.log_probabilities(toy, batch)
        with toy.at([update], [1.0]):
            second = measurement.log_probabilities(toy, batch)
        labels, row = batch.input_ids[batch.targets][:, None], batch.targets.nonzero()[:, 0].numpy()
        per_token = [x.gather(1, labels)[:, 0] for x in (first, second)] + [(first.exp() * (first - second)).sum(1)]
        for kind, values in zip((0, 1, 3), per_token, strict=True):
            np.add.at(wanted[kind], np.array(batch.index)[row], values.numpy())
    ours = np.stack([found[0].logp, found[1].logp, found[0].kl, found[1].kl])
    np.testing.assert_allclose(ours, wanted, rtol=1e-10, atol=1e-10)
    assert wanted[3].min() > 1e-3
    without = measurement.score(toy, domain, [(update, 1.0)], kl=False)
    np.testing.assert_array_equal(without[1].logp, found[1].logp)
    assert np.isnan(without[1].kl).all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_models_of_transformers_share(kind: str, attention: str) -> None:
    torch.manual_seed(0)
    if kind == "qwen3":
        module: Any = qwen3(0)
        module.set_attn_implementation(attention)
    else:
        sizes = SIZES | {"initializer_range": 0.3}
        config = LlamaConfig(**sizes) if kind == "llama" else GPT2Config(**sizes | OLD)
        module = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model, domain = prepare(module), ragged(2)
    ours = logp(Trainable(model), shared_rows(model, domain), len(domain.sequences)).detach()
    torch.testing.assert_close(ours, alone(model, domain).detach().double(), rtol=1e-5, atol=1e-4)


def rows_of_trees(sequences: list[Sequence] | tuple[Sequence, ...]) -> list[list[shared_prompts.Tree]]:
    return [[tree] for tree in shared_prompts.plan(sequences)]


# Architectures whose attention biases, windows or recurrent layers make nothing of a mask or of positions.
DEAF: dict[str, dict[str, Any]] = {
    "mpt": {"d_model": 16, "n_heads": 4, "n_layers": 2, "vocab_size": 37, "max_seq_len": 64},
    "gpt_neo": {
        "vocab_size": 37, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "window_size": 8,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64,
    },
    "lfm2": {**SIZES, "layer_types": ["conv", "full_attention"]},
}  # fmt: skip


@pytest.mark.parametrize("kind", [*DEAF, "qwen3"])
def test_one_long_response_alone_does_not_hide_the_others(kind: str) -> None:
    """The longest responses are rows of their own, equal to plain ones; the model is judged by rows that are shared."""
    torch.manual_seed(0)
    options = DEAF.get(kind, {**SIZES, "head_dim": 4})
    module = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options), attn_implementation="eager")
    with torch.no_grad():
        for p in module.float().parameters():
            p.add_(0.3 * torch.randn_like(p) * (p.dim() > 1))
    rng, rows = np.random.default_rng(0), list[Sequence]()
    for i in range(34):
        length, prompt = (45, i) if i >= 32 else (3, i // 8)
        response = tuple(int(x) for x in rng.integers(3, 36, length))
        rows.append(Sequence(tuple((5 * prompt + k) % 33 + 3 for k in range(12)), response, f"p{prompt}", float(i % 2)))
    model, domain = prepare(module), Domain("d", tuple(rows))
    found = measurement.score(model, domain, [], kl=False)[0].logp
    np.testing.assert_allclose(found, alone(model, domain), rtol=1e-4, atol=1e-3)
    used = shared_prompts.batches(model, domain.sequences, 10_000)
    assert any(r.mask is not None for r in used) == (kind == "qwen3")


class Deaf(ToyTransformer):
    """A model that takes masks or positions and makes nothing of them."""

    ignored = ""

    def forward(self, input_ids: Tensor, use_cache: bool = False, **inputs: Any) -> Any:
        if self.ignored == "raises" and inputs:
            raise ValueError("no masks, please")
        return super().forward(input_ids, use_cache, **{k: v for k, v in inputs.items() if k != self.ignored})


@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids", "raises"])
def test_a_model_that_does_not_fit_is_never_shared(ignored: str) -> None:
    torch.manual_seed(0)
    module = Deaf.seeded(0)
    module.ignored = ignored
    model, domain = prepare(module), ragged()
    found = list(shared_prompts.batches(model, domain.sequences, 10_000))
    assert all(r.mask is None for r in found)
    ours = logp(Trainable(model), found, len(domain.sequences)).detach()
    torch.testing.assert_close(ours, alone(model, domain), rtol=1e-10, atol=1e-10)
    module.ignored = ""
    assert not shared_prompts.shares(model, domain.sequences, rows_of_trees(domain.sequences)), "for good"


class Windowed(ToyTransformer):
    """A window that the model makes itself, and which a given mask takes the place of: nothing shows in short sequences."""

    def forward(self, input_ids: Tensor, use_cache: bool = False, attention_mask: Any = None, **inputs: Any) -> Any:
        if attention_mask is None:
            size = input_ids.shape[1]
            near = torch.ones(size, size).tril() - torch.ones(size, size).tril(-12)
            attention_mask = torch.where(near > 0, 0.0, -1e9).double()
        return super().forward(input_ids, use_cache, attention_mask=attention_mask, **inputs)


def test_longer_sequences_are_tried_anew() -> None:
    model = prepare(Windowed.seeded(0))
    short = [Sequence((3, 4, 5, 6, 7), (8, 9, i), "p") for i in range(9)]
    long = [Sequence(tuple(range(3, 20)), (8, 9, i), "q") for i in range(9)]
    assert shared_prompts.shares(model, short, rows_of_trees(short))
    assert not shared_prompts.shares(model, long, rows_of_trees(long))
    assert not shared_prompts.shares(model, short, rows_of_trees(short))
