"""Sampling from a model and scoring what was sampled."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from interference.errors import InputError
from interference.rollouts import load_verifier, sample, score

WORDS = ["<pad>", "<eos>", "a", "b", "c"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="module")
def model() -> Any:
    config = Qwen3Config(
        vocab_size=5, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Qwen3ForCausalLM(config)
    # Defaults of the kind that real checkpoints ship; none of them may reach the draws.
    network.generation_config.update(top_k=2, top_p=0.5, temperature=0.3, repetition_penalty=5.0)
    return network.train()


def exact(model: Any, prompt: list[int], length: int, temperature: float = 1.0) -> dict[tuple[int, ...], float]:
    """The probability of every response of at most `length` tokens, by enumeration, one forward pass per prefix."""
    finished: dict[tuple[int, ...], float] = {}
    alive: dict[tuple[int, ...], float] = {(): 1.0}
    for place in range(length):
        grown: dict[tuple[int, ...], float] = {}
        for (prefix, weight), token in product(alive.items(), range(5)):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *prefix]])).logits[0, -1]
            chance = weight * float((logits.double() / temperature).softmax(-1)[token])
            (finished if token == 1 or place == length - 1 else grown)[(*prefix, token)] = chance
        alive = grown
    return finished


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_frequencies_are_the_softmax(model: Any, tokenizer: Any, temperature: float) -> None:
    # Prompts of two lengths, so that one batch holds left padding.
    prompts, n = ["a b c a", "c"], 6000
    rollouts = sample(
        model, tokenizer, prompts, samples=n, max_new_tokens=2, temperature=temperature, batch_size=5000, seed=3
    )
    for index, prompt in enumerate(prompts):
        chances = exact(model, tokenizer(prompt)["input_ids"], 2, temperature)
        assert math.isclose(sum(chances.values()), 1.0, rel_tol=1e-5)
        counts = dict.fromkeys(chances, 0)
        for rollout in rollouts[index * n : (index + 1) * n]:
            counts[rollout.response_token_ids] += 1
        for response, chance in chances.items():
            assert abs(counts[response] - n * chance) <= 4.5 * math.sqrt(n * chance * (1 - chance)) + 1, response


def test_end_token_and_text(model: Any, tokenizer: Any) -> None:
    rollouts = sample(model, tokenizer, ["a b", "c"], samples=200, max_new_tokens=3, seed=0, batch_size=64)
    assert [r.prompt_index for r in rollouts] == [0] * 200 + [1] * 200
    assert {r.eos for r in rollouts} == {True, False}
    for rollout in rollouts:
        ids = rollout.response_token_ids
        assert rollout.eos == (ids[-1] == 1)
        assert 1 not in ids[:-1]
        assert rollout.eos or len(ids) == 3
        assert rollout.prompt_token_ids == tuple(tokenizer(["a b", "c"][rollout.prompt_index])["input_ids"])
        assert rollout.response == " ".join(WORDS[i] for i in ids if i > 1)


def test_deterministic_and_leaves_no_trace(model: Any, tokenizer: Any) -> None:
    defaults, training = model.generation_config, model.training
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = sample(model, tokenizer, ["a", "b c"], samples=40, max_new_tokens=4, seed=7, batch_size=16)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert sample(model, tokenizer, ["a", "b c"], samples=40, max_new_tokens=4, seed=7, batch_size=16) == first
    assert sample(model, tokenizer, ["a", "b c"], samples=40, max_new_tokens=4, seed=8, batch_size=16) != first
    assert model.generation_config is defaults
    assert model.training is training
    # Batches draw independently: one seed for all of them would repeat the same draws.
    groups = [[r.response_token_ids for r in first[start : start + 16]] for start in (0, 16)]
    assert groups[0] != groups[1]


def test_token_ids_are_used_as_they_are(model: Any, tokenizer: Any) -> None:
    by_text = sample(model, tokenizer, ["a b"], samples=9, max_new_tokens=3)
    assert sample(model, tokenizer, [[2, 3]], samples=9, max_new_tokens=3) == by_text


def test_progress_counts_sequences(model: Any, tokenizer: Any) -> None:
    seen: list[tuple[int, int]] = []
    sample(model, tokenizer, ["a"], samples=5, max_new_tokens=1, batch_size=2, progress=lambda *x: seen.append(x))
    assert seen == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [([], {}, "no prompts"), ([""], {}, "no tokens"), (["a"], {"samples": 0}, "samples: 0"),
     (["a"], {"temperature": 0.0}, "temperature"), (["a"], {"temperature": math.nan}, "temperature")],
)  # fmt: skip
def test_bad_requests(model: Any, tokenizer: Any, prompts: list[str], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sample(model, tokenizer, prompts, **{"samples": 1, "max_new_tokens": 1, **changes})


def test_score_passes_columns_and_returns_floats() -> None:
    def verifier(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[int]:
        return [int(p + c == a) for p, c, a in zip(prompts, completions, answer, strict=True)]

    assert score(verifier, ["x", "y"], ["1", "2"], {"answer": ["x1", "y1"], "other": [0, 0]}) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [([1.0], "1 rewards"), ([1.0, None], "None for completion 1"), ([math.nan, 1.0], "nan for completion 0"),
     ([1.0, "good"], "completion 1"), (0.5, "float rewards"), (None, "NoneType rewards")],
)  # fmt: skip
def test_score_refuses(answer: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        score(lambda **_: answer, ["a", "b"], ["c", "d"], {})


def test_score_refuses_short_columns() -> None:
    with pytest.raises(InputError, match="column 'answer'"):
        score(lambda **_: [0.0, 0.0], ["a", "b"], ["c", "d"], {"answer": ["x"]})


def test_load_verifier(tmp_path: Path) -> None:
    (tmp_path / "graders_here.py").write_text("def half(prompts, completions, **_): return [0.5] * len(completions)\n")
    (tmp_path / "graders_broken.py").write_text("import no_such_dependency\n")
    assert load_verifier("graders_here:half", tmp_path)(prompts=["p"], completions=["c"]) == [0.5]
    for name, message in [
        ("graders_here:halve", "did you mean 'half'"), ("graders_gone:half", "not found"), ("graders_here", "module:function"),
        ("graders_broken:half", "no_such_dependency"), ("graders_here:__name__", "a function"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            load_verifier(name, [tmp_path])
