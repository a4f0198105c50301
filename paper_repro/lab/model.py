"""A word-level tokenizer and small causal language models, through transformers' own classes."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from interference.errors import InputError, nearest

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
FAMILIES = ("qwen3", "llama", "gpt2")


def make_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word; `<pad>` is 0, `<eos>` 1, `<unk>` 2."""
    vocabulary = {word: index for index, word in enumerate([PAD, EOS, UNK, *words])}
    core = Tokenizer(WordLevel(vocabulary, unk_token=UNK))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, unk_token=UNK, padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_model(
    family: str, vocabulary: int, *, hidden: int, layers: int, heads: int, seed: int, positions: int = 64
) -> Any:
    """A randomly initialised model of an architecture family (`qwen3`, `llama` or `gpt2`), float32.

    positions: the longest sequence that it takes.

    Raises:
        InputError: the family is unknown.
    """
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "vocab_size": vocabulary}
    gated = {
        "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 2), "head_dim": hidden // heads,
        "max_position_embeddings": positions, "tie_word_embeddings": False,
    }  # fmt: skip
    if family == "qwen3":
        config: Any = Qwen3Config(**gated, **ids)
    elif family == "llama":
        config = LlamaConfig(**gated, **ids)
    elif family == "gpt2":
        dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = GPT2Config(n_embd=hidden, n_layer=layers, n_head=heads, n_positions=positions, **dropouts, **ids)
    else:
        raise InputError(got=f"family: {family}", expected="an architecture family", remedy=nearest(family, FAMILIES))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0, eos_token_id=1)
    return model
