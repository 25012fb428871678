"""The shelf: where banked chunks lie that are not in slots of the pool, and the way from a slot and back to one.

As they are in the pool, in host memory; or in fewer bits, in host memory or on the device. SlotCache says when.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple, Protocol

import torch

from ..ops.all import backend_of
from ..ops.quantize_chunk import dequantize_chunk, packed_bytes, quantize_chunk
from ..saved import Rows
from .arena import Arena
from .pool import Pool
from .streams import COMPUTE, LOAD, SAVE, CopyEngine


class Move(NamedTuple):
    """One chunk's way: between the pool rows from `first_row` on and its place."""

    first_row: int
    place: int
    tokens: int


class Shelf(Protocol):
    """`rows` [places, num_layers, ...]: all places. `device_tensors`: what else copies and kernels here read and write
    on the device. `steps`: the layers that `bring` brings together, in order. `has_staging`: whether `pack` writes what
    `put` has to have read before it packs another."""

    rows: torch.Tensor
    pinned: bool
    device_tensors: tuple[torch.Tensor, ...]
    steps: Sequence[range]
    has_staging: bool

    def bytes_of(self, tokens: int) -> int:
        """What a chunk of so many tokens takes of its place."""

    def pack(self, engine: CopyEngine, move: Move) -> None:
        """On COMPUTE: make a chunk that has been pruned into its slot what it will be when it is brought back."""

    def put(self, engine: CopyEngine, move: Move) -> None:
        """On SAVE: what has been packed into its place."""

    def bring(self, engine: CopyEngine, layers: range, moves: Sequence[Move]) -> None:
        """On LOAD: some layers of chunks from their places into slots."""

    def held(self, place: int, tokens: int) -> Rows:
        """All of a chunk where it lies."""


class WholeShelf:
    """In host memory, [places, num_layers, 2, tokens, heads, head_dim], dtype of the pool. `tokens`: the most."""

    has_staging = False
    device_tensors: tuple[torch.Tensor, ...] = ()

    def __init__(self, pool: Pool, *, tokens: int, num_places: int) -> None:
        num_layers, _, heads, head_dim = pool.k.shape
        self._arena = Arena((num_places, num_layers, 2, tokens, heads, head_dim), pool.k.dtype, pool.k.device)
        self._pool, self._token_bytes = pool, self._arena.bytes // (num_places * tokens)  # K and V of all layers
        self.rows, self.pinned = self._arena.rows, self._arena.pinned
        self.steps = [range(layer, layer + 1) for layer in range(num_layers)]

    def bytes_of(self, tokens: int) -> int:
        return tokens * self._token_bytes

    def pack(self, engine: CopyEngine, move: Move) -> None:
        pass

    def put(self, engine: CopyEngine, move: Move) -> None:
        pairs = []
        for layer in range(len(self.steps)):
            pairs += zip(self._at(move, layer), self._pool.views(layer, move.first_row, move.tokens), strict=True)
        engine.copy(pairs, SAVE)

    def bring(self, engine: CopyEngine, layers: range, moves: Sequence[Move]) -> None:
        """Two copies a chunk and layer, as K and V are one piece here but two tensors on the device."""
        pairs = []
        for layer in layers:
            for move in moves:
                pairs += zip(self._pool.views(layer, move.first_row, move.tokens), self._at(move, layer), strict=True)
        engine.copy(pairs, LOAD)

    def held(self, place: int, tokens: int) -> Rows:
        """[num_layers, 2, tokens, heads, head_dim]."""
        move = Move(0, place, tokens)
        return Rows(
            [piece for layer in range(len(self.steps)) for piece in self._at(move, layer)], (len(self.steps), 2)
        )

    def _at(self, move: Move, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer in its place."""
        k, v = self.rows[move.place, layer, :, : move.tokens]
        return k, v


class PackedShelf:
    """As quantize_chunk packs them: of a layer [2, packed_bytes], at the start of its bytes in `rows`, uint8 [places,
    num_layers, bytes of a chunk of the most tokens].

    A chunk's slot gets what its bits say as soon as it is packed, so that it does not matter whether it stays there or
    is brought back. In host memory, a chunk is packed into a staging place on the device, and brought back through
    another, the first layer alone and the others by as many as that holds; on the device it is packed and restored
    where it lies, all layers at once. What is not finite goes on as NaN: as it does whole, and without a look that
    would find it when its chunk leaves the recent ones, too late for whoever made it.
    """

    def __init__(
        self, pool: Pool, *, tokens: int, num_places: int, bits: int, on_host: bool, backend: str | None
    ) -> None:
        num_layers, _, *self._heads = pool.k.shape
        self._pool, self._bits, self._backend = pool, bits, backend_of("quantize_chunk", backend)
        device, each = pool.k.device, shelf_bytes(tokens, *self._heads, bits, pool.k.dtype)
        shape = (num_places, num_layers, each)
        self.has_staging, self.pinned = on_host, False
        self.device_tensors: tuple[torch.Tensor, ...] = ()
        self.steps = [range(num_layers)]
        if on_host:
            self._arena = Arena(shape, torch.uint8, device)
            self.rows, self.pinned = self._arena.rows, self._arena.pinned
            self._outgoing = torch.empty((num_layers, each), dtype=torch.uint8, device=device)
            self._incoming = torch.empty((staged_layers(num_layers), each), dtype=torch.uint8, device=device)
            self.device_tensors = (self._outgoing, self._incoming)
            ends = range(1, num_layers + len(self._incoming), len(self._incoming))
            self.steps = [range(max(0, end - len(self._incoming)), min(end, num_layers)) for end in ends]
        else:
            self.rows = torch.empty(shape, dtype=torch.uint8, device=device)
            self.device_tensors = (self.rows,)

    def bytes_of(self, tokens: int) -> int:
        return self.rows.shape[1] * shelf_bytes(tokens, *self._heads, self._bits, self._pool.k.dtype)

    def pack(self, engine: CopyEngine, move: Move) -> None:
        rows = slice(move.first_row, move.first_row + move.tokens)
        k, v = self._pool.k[:, rows], self._pool.v[:, rows]
        packed = self._packed(self._outgoing if self.has_staging else self.rows[move.place], move.tokens)

        def work() -> None:
            quantize_chunk(k, v, bits=self._bits, out=packed, check_finite=False, backend=self._backend)
            self._restore(packed, k, v)

        engine.launch(work, COMPUTE)

    def put(self, engine: CopyEngine, move: Move) -> None:
        if self.has_staging:
            outgoing, place = (self._packed(x, move.tokens) for x in (self._outgoing, self.rows[move.place]))
            engine.copy(list(zip(place, outgoing, strict=True)), SAVE)

    def bring(self, engine: CopyEngine, layers: range, moves: Sequence[Move]) -> None:
        inside = slice(layers.start, layers.stop)
        for move in moves:
            packed = self._packed(self.rows[move.place, inside], move.tokens)
            if self.has_staging:
                incoming = self._packed(self._incoming[: len(layers)], move.tokens)  # of one chunk after the other
                engine.copy(list(zip(incoming, packed, strict=True)), LOAD)
                packed = incoming
            rows = slice(move.first_row, move.first_row + move.tokens)
            engine.launch(partial(self._restore, packed, self._pool.k[inside, rows], self._pool.v[inside, rows]), LOAD)

    def held(self, place: int, tokens: int) -> Rows:
        """[num_layers, 2, packed_bytes]."""
        return Rows(list(self._packed(self.rows[place], tokens)), (self.rows.shape[1],))

    def _packed(self, layers: torch.Tensor, tokens: int) -> torch.Tensor:
        """The start of each layer's bytes, [layers, 2, packed_bytes], of a chunk of so many tokens."""
        each = shelf_bytes(tokens, *self._heads, self._bits, self._pool.k.dtype)
        return layers[:, :each].unflatten(1, (2, -1))

    def _restore(self, packed: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        dequantize_chunk(packed, bits=self._bits, out_k=k, out_v=v, backend=self._backend)


def staged_layers(num_layers: int) -> int:
    """How many are brought to the device before they are restored in one launch."""
    return min(num_layers, 4)


@lru_cache(maxsize=256)
def shelf_bytes(tokens: int, num_heads: int, head_dim: int, bits: int, dtype: torch.dtype) -> int:
    """What K and V of one layer of a chunk take on a shelf."""
    if bits == 16:
        return 2 * tokens * num_heads * head_dim * dtype.itemsize
    return 2 * packed_bytes(tokens, num_heads, head_dim, bits, dtype)
