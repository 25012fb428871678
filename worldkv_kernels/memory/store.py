"""Stores: the slots on the device that banked chunks lie in, as they are or in fewer bits."""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import torch

from ..ops.quantize_chunk import packed_bytes
from ..saved import Rows
from .pool import Pool


class Store(Protocol):
    """Slots of up to `tokens` each. `tensors`: what they lie in. `place_shape` [num_layers, 2, ...] and `dtype` of a
    place in host memory that holds what a slot does."""

    num_slots: int
    tokens: int
    place_shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]: ...

    def bytes_of(self, tokens: int) -> int:
        """What a chunk of so many tokens takes of a slot."""

    def extent(self, tokens: int) -> int:
        """How far along dimension 2 of a place a chunk of so many tokens goes."""

    def views(self, slot: int, layer: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer of such a chunk in a slot, [extent, ...]."""


class WholeStore:
    """Slots of the pool, from its rows `first_rows` on: attention reads a chunk where it lies."""

    def __init__(self, pool: Pool, first_rows: list[int], *, tokens: int) -> None:
        num_layers, _, heads, head_dim = pool.k.shape
        self._pool, self.first_rows = pool, first_rows
        self.num_slots, self.tokens = len(first_rows), tokens
        self.place_shape, self.dtype = (num_layers, 2, tokens, heads, head_dim), pool.k.dtype

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self._pool.k, self._pool.v

    def bytes_of(self, tokens: int) -> int:
        return tokens * self._pool.token_bytes

    def extent(self, tokens: int) -> int:
        return tokens

    def views(self, slot: int, layer: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._pool.views(layer, self.first_rows[slot], tokens)


class PackedStore:
    """`packed`, uint8 [slots, num_layers, 2, bytes]: K and V as quantize_chunk packs them, a chunk of fewer tokens than
    a slot is for at the start of the bytes of each."""

    dtype = torch.uint8

    def __init__(
        self, num_slots: int, *, num_layers: int, tokens: int, num_heads: int, head_dim: int, bits: int,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        self._of_chunk = (num_heads, head_dim, bits, dtype)
        self.num_slots, self.tokens = num_slots, tokens
        self.place_shape = (num_layers, 2, self.extent(tokens))
        self.packed = torch.empty((num_slots, *self.place_shape), dtype=torch.uint8, device=device)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.packed,)

    def bytes_of(self, tokens: int) -> int:
        return 2 * self.place_shape[0] * self.extent(tokens)

    def extent(self, tokens: int) -> int:
        return chunk_bytes(tokens, *self._of_chunk)

    def views(self, slot: int, layer: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = self.packed[slot, layer, :, : self.extent(tokens)]
        return k, v

    def of_slot(self, slot: int, layers: range, tokens: int) -> torch.Tensor:
        """[layers, 2, bytes of so many tokens]."""
        return self.packed[slot, layers.start : layers.stop, :, : self.extent(tokens)]


def held(store: Store, slot: int, tokens: int) -> Rows:
    """All of a chunk in a slot, [num_layers, 2, ...]."""
    return Rows.of_layers(store.place_shape[0], lambda layer: store.views(slot, layer, tokens))


@lru_cache(maxsize=256)
def chunk_bytes(tokens: int, num_heads: int, head_dim: int, bits: int, dtype: torch.dtype) -> int:
    """What K, or V, of one layer of a banked chunk takes."""
    if bits == 16:
        return tokens * num_heads * head_dim * dtype.itemsize
    return packed_bytes(tokens, num_heads, head_dim, bits, dtype)
