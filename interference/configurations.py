"""Configurations: which differences between two config.json leave the function of the weights as it is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

IGNORED = {  # what config.json says about the file or about generation; also what is compared elsewhere
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures", "attn_implementation",
    "bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "model_type",
}  # fmt: skip
_HARMLESS = {  # training, initialization, what is returned beside the logits, and how the same product is split up
    "initializer_range", "initializer_factor", "pretraining_tp", "gradient_checkpointing", "chunk_size_feed_forward",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "router_aux_loss_coef",
    "router_z_loss_coef", "aux_loss_alpha", "label2id", "id2label", "problem_type", "finetuning_task",
    "task_specific_params", "tokenizer_class", "auto_map", "unsloth_version", "unsloth_fixed", "_commit_hash",
    "_attn_implementation", "_attn_implementation_autoset",
}  # fmt: skip
_DROPOUT = re.compile(r"(^|_)(\w?pdrop|dropout)(_|$)")  # acts in training alone
_WINDOW = {"sliding_window", "max_window_layers", "use_sliding_window"}
_PLAIN_ROPE = {"default", "linear", "llama3", "mrope"}  # frequencies that do not depend on the longest sequence


def differing(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Keys that both have with different values: (those that may change the function, those that cannot).

    A key that is not known here may change it.

    >>> differing({"rope_theta": 1e4, "attention_dropout": 0.0}, {"rope_theta": 1e6, "attention_dropout": 0.1})
    (['rope_theta'], ['attention_dropout'])
    """
    keys = sorted(key for key in base.keys() & tuned.keys() - IGNORED if base[key] != tuned[key])
    harmless = [key for key in keys if _harmless(key, base, tuned)]
    return [key for key in keys if key not in harmless], harmless


def _harmless(key: str, base: Mapping[str, Any], tuned: Mapping[str, Any]) -> bool:
    if key == "max_position_embeddings":  # learned positions differ in shape, which is found first
        return all(_PLAIN_ROPE.issuperset(_rope_kinds(config)) for config in (base, tuned))
    if key in _WINDOW:
        return not (_windowed(base) or _windowed(tuned))
    return key in _HARMLESS or _DROPOUT.search(key) is not None


def _windowed(config: Mapping[str, Any]) -> bool:
    """Whether attention may be limited to a window; one that is not told may be the architecture's default."""
    return config.get("use_sliding_window") is not False and config.get("sliding_window", "default") is not None


def _rope_kinds(value: object, key: str = "") -> Iterator[str]:
    """Every kind of rotary embedding that a configuration names, those of single layer types included."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _rope_kinds(inner, f"{key}.{name}")
    elif key.startswith((".rope_", ".text_config.rope_")) and key.endswith((".rope_type", ".type")):
        yield str(value)
