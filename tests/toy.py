"""A small causal transformer in plain torch that stays in the dtype it is given: the oracle model of the tests.

Root-mean-square norms, grouped-query attention with rotary positions, SwiGLU, a tied head; called like a Hugging Face model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class ToyConfig:
    vocab_size: int = 23
    hidden_size: int = 16
    intermediate_size: int = 24
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    tie_word_embeddings: bool = True
    model_type: str = "toy"


@dataclass
class ToyOutput:
    logits: Tensor


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotary(x: Tensor, positions: Tensor | None = None) -> Tensor:
    half = x.shape[-1] // 2
    rate = 10000.0 ** (-torch.arange(half, dtype=x.dtype, device=x.device) / half)
    if positions is None:
        positions = torch.arange(x.shape[-2], dtype=x.dtype, device=x.device)
    angle = positions[..., None] * rate
    angle = angle if angle.dim() == 2 else angle[:, None]  # one for all heads
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class Attention(nn.Module):
    def __init__(self, c: ToyConfig) -> None:
        super().__init__()
        self.heads, self.groups = c.num_attention_heads, c.num_key_value_heads
        self.size = c.hidden_size // self.heads
        self.q = nn.Linear(c.hidden_size, c.hidden_size)
        self.k = nn.Linear(c.hidden_size, self.groups * self.size)
        self.v = nn.Linear(c.hidden_size, self.groups * self.size, bias=False)
        self.o = nn.Linear(c.hidden_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (f(x).view(B, T, -1, self.size).transpose(1, 2) for f in (self.q, self.k, self.v))
        repeat = self.heads // self.groups
        k, v = rotary(k, positions).repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        scores = rotary(q, positions) @ k.transpose(-1, -2) / self.size**0.5
        if mask is None:
            mask = torch.full((T, T), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        y = torch.softmax(scores + mask, dim=-1) @ v
        return self.o(y.transpose(1, 2).reshape(B, T, -1))


class Block(nn.Module):
    def __init__(self, c: ToyConfig) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = Norm(c.hidden_size), Attention(c), Norm(c.hidden_size)
        self.gate = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask, positions)
        y = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class ToyTransformer(nn.Module):
    """A tied causal transformer; ToyTransformer.seeded(0) is a reproducible one in float64 and eval mode."""

    def __init__(self, config: ToyConfig | None = None) -> None:
        super().__init__()
        self.config = config or ToyConfig()
        self.embed = nn.Embedding(self.config.vocab_size, self.config.hidden_size)
        self.layers = nn.ModuleList([Block(self.config) for _ in range(self.config.num_hidden_layers)])
        self.norm = Norm(self.config.hidden_size)
        self.head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        if self.config.tie_word_embeddings:
            self.head.weight = self.embed.weight

    @classmethod
    def seeded(
        cls, seed: int = 0, config: ToyConfig | None = None, dtype: torch.dtype = torch.float64
    ) -> ToyTransformer:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(config).to(dtype)
            for p in model.parameters():
                p.data = torch.randn(p.shape, dtype=dtype) * (0.3 if p.dim() > 1 else 0.2) + (p.dim() == 1)
        return model.eval().requires_grad_(False)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(
        self,
        input_ids: Tensor,
        use_cache: bool = False,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **_: object,
    ) -> ToyOutput:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, attention_mask, position_ids)
        return ToyOutput(self.head(self.norm(x)))
