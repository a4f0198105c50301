"""What the lab's stages read and write: rows as JSONL, and models with their tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from interference.records import read_json, write_text
from paper_repro.lab.data import Row


def write_rows(path: Path, rows: list[Row]) -> None:
    """One row per line."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[Row]:
    """What `write_rows` wrote."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def save(path: Path, model: Any, tokenizer: Any) -> None:
    """Write a model and its tokenizer to the folder `path`, whole or not at all; of a PeftModel the adapter alone.

    An adapter's base is the folder `base` beside `path`, named relatively, so that a lab can be moved.
    """
    part = path.with_name(path.name + ".part")
    for left in (part, path):  # from an interruption before the stage's record
        if left.exists():
            shutil.rmtree(left)
    adapters = getattr(model, "peft_config", None)
    if adapters is None:
        model.save_pretrained(part)
    else:
        adapters["default"].base_model_name_or_path = "../base"
        model.save_pretrained(part, save_embedding_layers=False)  # the default would look for that base on the hub
    tokenizer.save_pretrained(part)
    part.rename(path)


def load(path: Path) -> tuple[Any, Any]:
    """A model in float32, and its tokenizer; of an adapter's folder its base with the adapter merged into it."""
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    if not (path / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True), tokenizer
    from peft import PeftModel

    base, _ = load(path / str(read_json(path / "adapter_config.json")["base_model_name_or_path"]))
    return PeftModel.from_pretrained(base, path).merge_and_unload(), tokenizer
