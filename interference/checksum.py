"""A short name of many tensors' bits, fast enough to be taken around every computation that must leave the weights alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

_BLOCK = 1 << 20
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Sixteen hexadecimal digits that change with every bit, place, shape and name.

    >>> a = torch.tensor([1.0, 2.0])
    >>> checksum({"w": a}) == checksum({"w": a.clone()}), checksum({"w": a}) == checksum({"w": a.flip(0)})
    (True, False)
    """
    sha = hashlib.sha256()
    for name, x in tensors.items():
        sha.update(f"{name} {tuple(x.shape)} {_bit_sum(x)}".encode())
    return sha.hexdigest()[:16]


def saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """A module's buffers that are saved with it; others, such as rotary frequencies, are caches that it may rebuild."""
    return {
        f"{prefix}.{name}": x
        for prefix, part in module.named_modules()
        for name, x in part._buffers.items()
        if x is not None and name not in part._non_persistent_buffers_set
    }


def _bit_sum(x: Tensor) -> int:
    """The sum of a tensor's words times odd pseudo-random weights of their positions, modulo 2^64.

    Exact in any order of summation, so that threads and devices do not matter; it changes with every word and with their order.
    """
    words = x.detach().contiguous().reshape(-1)
    words = (
        words.view(_WORDS[words.element_size()]) if not words.is_complex() else torch.view_as_real(words).reshape(-1)
    )
    total, weights = 0, _weights(min(_BLOCK, len(words)), x.device)
    for block in words.split(_BLOCK):
        part = int((block.long() * weights[: len(block)]).sum())
        total = (total * 6364136223846793005 + part) % (1 << 64)
    return total


def _weights(count: int, device: torch.device) -> Tensor:
    """Odd 64-bit numbers without a pattern: torch's products and sums of int64 wrap around, as they must here."""
    x = torch.arange(1, count + 1, device=device) * -7046029254386353131
    x = (x ^ (x >> 30)) * -4658895280553007687
    return (x ^ (x >> 27)) | 1
