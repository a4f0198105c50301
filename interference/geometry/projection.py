"""Streaming orthogonal random projection of updates to a few hundred dimensions, for the projected cosine of arXiv 2602.12566.

All that is known of it is "orthogonal random projection to 256 dimensions"; this structured one is our own choice. A vector is
cut into blocks x_j of 256 entries (the last filled with zeros) and

    y = sum_j E_j H D_j x_j,

H the orthonormal Hadamard matrix, D_j and E_j diagonal matrices of random signs. Each block is rotated, so the rows of the whole
projection are exactly orthogonal and of equal norm; the signs make inner products unbiased: E<y, y'> = <x, x'>. The cosine of
projections has a standard deviation near 1/sqrt(256) = 0.0625 about the true one when that is near zero, and less when the
vectors live in few blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg
from torch import Tensor

from interference.errors import InputError
from interference.statistics import Array

DIMS = 256
_PIECE = 1 << 16  # entries at a time: what the caches hold, and what is summed in float32 before float64 takes over
_SIGNS = torch.from_numpy(1.0 - 2.0 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)).float()


class Projection:
    """Projections of N updates under S seeds, accumulated tensor by tensor: `add` each, then `cosines`.

    The signs depend on the seed, the tensor's name and the place in the tensor alone, so neither the order of tensors nor how
    they are cut into calls matters, but for rounding.

    Args:
        seeds: one projection each.
        dims: dimensions of the projection, a power of two from 128.

    Raises InputError for other dimensions.

    >>> projection = Projection(seeds=[0, 1])
    >>> projection.add("w", 0, torch.tensor([[1.0, 2.0], [2.0, 4.0]]))
    >>> projection.cosines().round(6)[:, 0, 1].tolist()
    [1.0, 1.0]
    """

    def __init__(self, seeds: Sequence[int], dims: int = DIMS) -> None:
        if dims < 128 or dims & (dims - 1):
            raise InputError(got=f"{dims} dimensions", expected="a power of two, at least 128", remedy="use 256")
        self.seeds, self.dims = tuple(seeds), dims
        self.sums: Tensor | None = None
        """(S, N, dims) float64, once something was added."""
        # The Hadamard matrix is the Kronecker product of two smaller ones, applied to blocks as matrices (rows, columns).
        columns = 1 << (dims.bit_length() // 2)
        self._sides = _hadamard(dims // columns), _hadamard(columns)

    def add(self, name: str, offset: int, values: Tensor | NDArray[np.float32]) -> None:
        """Add entries `offset` .. offset + n of a tensor for all models, values (N, n).

        Every call but a tensor's last must hand in a multiple of `dims` entries.

        Raises InputError for an offset that is not such a multiple, and for another number of models than before.
        """
        x = torch.as_tensor(values).to("cpu", torch.float32)
        known = x.shape[0] if self.sums is None else self.sums.shape[1]
        if x.dim() != 2 or x.shape[0] != known or offset % self.dims:
            raise InputError(
                got=f"values of shape {tuple(x.shape)} at offset {offset} of {name}",
                expected=f"({known}, n) values at a multiple of {self.dims}",
                remedy=f"cut tensors into pieces of a multiple of {self.dims} entries, all models together",
            )
        if self.sums is None:
            self.sums = torch.zeros(len(self.seeds), known, self.dims, dtype=torch.float64)
        keys = [_key(seed, name) for seed in self.seeds]
        step = max(_PIECE // self.dims, 1) * self.dims
        for start in range(0, x.shape[1], step):
            piece = x[:, start : start + step]
            padding = -piece.shape[1] % self.dims
            blocks = (torch.nn.functional.pad(piece, (0, padding)) if padding else piece).reshape(known, -1, self.dims)
            first = (offset + start) // self.dims
            for sums, key in zip(self.sums, keys, strict=True):
                before, after = _signs(key, first, blocks.shape[1], self.dims)
                sums += self._rotate(blocks * before).mul_(after).sum(1)

    def _rotate(self, blocks: Tensor) -> Tensor:
        """H x for each block of (N, blocks, dims)."""
        left, right = self._sides
        half = blocks.view(-1, len(right)) @ right
        return (left @ half.view(-1, len(left), len(right))).view(blocks.shape)

    def cosines(self) -> Array:
        """Cosines (S, N, N) of the projected updates; NaN for an update that is zero.

        Raises InputError when nothing was added.
        """
        if self.sums is None:
            raise InputError(got="no values", expected="updates to project", remedy="call `add` for each tensor first")
        y: Array = self.sums.numpy()
        inner = y @ y.transpose(0, 2, 1)
        norms = np.sqrt(np.einsum("sii->si", inner))
        scale = norms[:, :, None] * norms[:, None, :]
        return np.where(scale > 0, inner / np.where(scale > 0, scale, 1.0), np.nan)


def _hadamard(side: int) -> Tensor:
    return torch.from_numpy(linalg.hadamard(side) / side**0.5).float()


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little")


def _signs(key: int, first: int, blocks: int, dims: int) -> tuple[Tensor, Tensor]:
    """Signs D and E, (blocks, dims) each, of the blocks from `first`: bits of a counter-based generator, 256 to each count."""
    per_block = 2 * dims // 256
    words = np.random.Philox(key=key, counter=first * per_block).random_raw(4 * per_block * blocks)
    bits = torch.from_numpy(words.astype("<u8", copy=False).view(np.uint8))
    signs = _SIGNS.index_select(0, bits.int()).reshape(blocks, 2, dims)
    return signs[:, 0], signs[:, 1]
