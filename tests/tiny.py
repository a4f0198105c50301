"""Tiny Hugging Face checkpoints and domains, made in milliseconds, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

WORDS = [f"w{i}" for i in range(24)]

# Settings of small random models of any architecture, by the names of transformers' configurations.
SIZES: dict[str, Any] = {
    "vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OLD = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
MOE = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}


def tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: <pad> 0, <eos> 1, <unk> 2, then the words."""
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def qwen3(seed: int = 0, **changes: Any) -> Qwen3ForCausalLM:
    """A random Qwen3 of about 5,000 parameters with weights large enough for visible curvature."""
    settings: dict[str, Any] = {
        "vocab_size": 27,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**settings | changes, attn_implementation="eager")).eval()


def save(model: torch.nn.Module, path: Path, words: list[str] = WORDS, **options: Any) -> Path:
    model.save_pretrained(path, **options)  # type: ignore[operator]
    tokenizer(words).save_pretrained(path)
    return path


def perturbed(seed: int, scale: float = 0.02, base_seed: int = 0, **changes: Any) -> Qwen3ForCausalLM:
    """The base with every weight moved a little: a stand-in for a tuned checkpoint."""
    model = qwen3(base_seed, **changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return model


def rows(seed: int, prompts: int = 12, responses: int = 3, rewards: bool = True) -> list[dict[str, Any]]:
    """Ragged random prompts and responses."""
    g = torch.Generator().manual_seed(seed)

    def words(low: int, high: int) -> str:
        count = int(torch.randint(low, high, (1,), generator=g))
        return " ".join(WORDS[int(i)] for i in torch.randint(0, len(WORDS), (count,), generator=g))

    out = []
    for p in range(prompts):
        prompt = words(2, 7)
        for _ in range(responses):
            row: dict[str, Any] = {"prompt_id": f"{seed}-{p}", "prompt": prompt, "response": words(1, 6)}
            if rewards:
                row["reward"] = float(torch.rand(1, generator=g) < 0.4)
            out.append(row)
    return out


def write_jsonl(path: Path, items: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in items), encoding="utf-8")
    return path
