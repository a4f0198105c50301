"""What the benchmark runs on: random Qwen3 models, a batch, and random updates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from interference.domain import Batch
from interference.model import Model, prepare
from interference.tree import LowRank, NamedChanges

UPDATES = 4


@dataclass(frozen=True)
class Size:
    """A model's and a batch's shape; tokens from `start` on are the response."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    head_dim: int
    vocabulary: int
    sequences: int
    tokens: int
    start: int


SIZES = {
    "tiny": Size(1, 32, 64, 2, 16, 64, 2, 16, 8),  # for the smoke test: its times say nothing
    "small": Size(4, 128, 384, 4, 32, 512, 256, 24, 12),
    "medium": Size(7, 512, 1408, 8, 64, 8192, 4, 256, 64),
    "large": Size(11, 1024, 3072, 16, 64, 16384, 4, 256, 64),
    "0.6b": Size(20, 1536, 4608, 16, 96, 32768, 4, 256, 64),
    "1.5b": Size(28, 2048, 6144, 16, 128, 32768, 4, 256, 64),
}


@dataclass(frozen=True)
class Case:
    """A model, its batch (every response of one length) and its updates."""

    model: Model
    batch: Batch
    updates: list[dict[str, Tensor]]

    @property
    def labels(self) -> Tensor:
        return self.batch.input_ids[self.batch.targets]

    @property
    def start(self) -> int:
        return int(self.batch.targets[0].nonzero()[0])


def make(size: Size, device: torch.device, seed: int = 0) -> Case:
    """A random float32 Qwen3 with a tied head, random tokens, and dense random updates that change every parameter."""
    config = Qwen3Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads // 2,
        head_dim=size.head_dim,
        max_position_embeddings=size.tokens,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    torch.manual_seed(seed)
    model = prepare(Qwen3ForCausalLM(config).to(device))
    updates = [{n: 1e-2 * torch.randn_like(p) for n, p in model.parameters.items()} for _ in range(UPDATES)]
    targets = torch.zeros(size.sequences, size.tokens, dtype=torch.bool)
    targets[:, size.start :] = True
    ids = torch.randint(0, size.vocabulary, (size.sequences, size.tokens))
    return Case(model, Batch(ids, targets, tuple(range(size.sequences))).to(device), updates)


def lora_update(model: Model, rank: int) -> NamedChanges:
    """An update of every matrix in the layers as factors of `rank`, of about the dense ones' size."""
    g = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(model.device)

    return {
        name: LowRank(up=1e-2 / rank**0.5 * random(p.shape[0], rank), down=random(rank, p.shape[1]))
        for name, p in model.parameters.items()
        if ".layers." in name and p.dim() == 2
    }
