"""Sizes: what a memory takes, part by part to the byte, worked out of its config before anything is allocated."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch

from ..rope import rope_table_shapes
from ..tables import Shapes
from ..window import table_shapes
from .arena import arena_bytes
from .config import MemoryConfig
from .layers import layer_table_shapes
from .plan import capacity, most_segments, ring_chunks
from .pool import Pool
from .store import chunk_bytes

_INT32, _INT64, _FP32 = 4, 8, 4
_LAYERS_AT_ONCE = 4  # at least, of a chunk that is pruned and packed: launches of less do not fill a GPU


@dataclass(frozen=True, kw_only=True)
class MemoryBytes:
    """Bytes that a WorldMemory allocates, by part.

    On its device: `sink`, `recent`, `gap` (chunks that are whole but unattended) and `current` chunks; `bank`, the
    banked chunks, or of a bank in host memory the slots that are a cache of it; `packed_bank`, the same of a bank in
    fewer bits, and `restored`, the rows that layers share, to which one layer of its retrieved chunks is restored and
    by which some layers of a chunk are packed; `tables` of the window, of a bank in fewer bits also a set for each
    layer; `scratch`, which is queries, what compress_chunk says of a chunk, its row, its content where retrieval is by
    content, and the mass of the window's segments in `mass_layers`; `rotations` of the chunk that is made. In host
    memory: `host_bank`, the arena with its page, and `host_tables`, which the window's and the rotations are written
    from, and to which content and mass go, both page-locked for a GPU. Not in it: the ops' own scratch during a call,
    and the poses or contents that a policy remembers.
    """

    sink: int
    recent: int
    gap: int
    current: int
    bank: int
    packed_bank: int
    restored: int
    tables: int
    scratch: int
    rotations: int
    host_bank: int
    host_tables: int

    @property
    def device(self) -> int:
        return sum(size for part, size in self.parts.items() if not part.startswith("host_"))

    @property
    def host(self) -> int:
        return self.host_bank + self.host_tables

    @property
    def parts(self) -> dict[str, int]:
        return asdict(self)

    def on(self, device_type: str) -> dict[str, int]:
        """Bytes by kind of memory, "cpu" and that of the device, where the device may be a CPU."""
        if device_type == "cpu":
            return {"cpu": self.device + self.host}
        return {device_type: self.device, "cpu": self.host}


def bank_slots(config: MemoryConfig, places: int) -> int:
    """Chunks of a bank of `places` that lie on the device."""
    if not config.has_bank:
        return 0
    return config.cache_slots if config.caches_bank else places


def pool_slots(config: MemoryConfig, places: int) -> list[tuple[int, int]]:
    """The pool's slots, (tokens, count): of the sink, of the ring of whole chunks, and of a bank in 16 bits."""
    bank = 0 if config.packs_bank else bank_slots(config, places)
    ring = ring_chunks(config, places)
    return [(config.chunk_tokens, config.sink_chunks), (config.chunk_tokens, ring), (config.banked_tokens, bank)]


def shared_slots(config: MemoryConfig) -> tuple[int, int]:
    """The pool's slots that all layers share, (tokens, count): of a bank in fewer bits, for one layer of each retrieved
    chunk, and for some layers of a chunk on its way there."""
    at_once = max(config.retrieved_chunks, min(config.num_layers, _LAYERS_AT_ONCE))
    return config.banked_tokens, at_once if config.packs_bank else 0


def chosen_shape(config: MemoryConfig) -> tuple[int, int]:
    """Of the table that says what is restored, see dequantize_chunk."""
    return config.retrieved_chunks, 2


def content_shape(config: MemoryConfig) -> tuple[int, int, int]:
    """Of what Contents takes of a chunk."""
    return config.branches, config.chunk_frames, config.num_kv_heads * config.head_dim


def mass_shape(config: MemoryConfig, places: int) -> tuple[int, int, int]:
    """Of what attention says of the window's segments, (layers, heads of all branches, segments)."""
    return len(config.mass_layers), config.query_heads, most_segments(config, places)


def window_capacity(config: MemoryConfig, places: int) -> int:
    """Of the window's tables, in tiles."""
    return capacity(config, places)


def place_bytes(config: MemoryConfig, dtype: torch.dtype) -> int:
    """What one more of `bank_chunks` takes, but for the tables."""
    if config.has_bank and (config.caches_bank or config.packs_bank):
        return _stored_bytes(config, dtype)
    return _slot_bytes(config, config.banked_tokens if config.has_bank else config.chunk_tokens, dtype)


def memory_bytes(config: MemoryConfig, dtype: torch.dtype, places: int) -> MemoryBytes:
    """Of a memory whose bank, or pool in mode "full", has room for `places` chunks; unused in other modes."""
    (_, sink), (_, ring), (_, bank) = pool_slots(config, places)
    whole = _slot_bytes(config, config.chunk_tokens, dtype)
    on_host = places * _stored_bytes(config, dtype) if config.caches_bank else 0
    rope = config.make_rope()
    tiles, turning = window_capacity(config, places), rope if config.turns_segments else None
    tables, of_layers = _table_bytes(table_shapes(tiles, turning, config.weighs_segments)), 0
    if config.packs_bank:
        of_layers = _table_bytes(layer_table_shapes(config.num_layers, tiles))
        tables += math.prod(chosen_shape(config)) * _INT32
    rotations = _table_bytes(rope_table_shapes(rope, (config.chunk_frames, *config.grid))) if rope else 0
    content = math.prod(content_shape(config)) * _FP32 if config.takes_contents else 0
    mass = host_mass = 0
    if config.takes_mass:
        layers, heads, segments = mass_shape(config, places)
        mass, host_mass = (layers * heads + 1) * segments * _FP32, segments * _FP32
    queries = config.chunk_tokens * config.query_heads * config.head_dim * dtype.itemsize
    return MemoryBytes(
        sink=sink * whole,
        recent=(ring - 1 - config.gap_chunks) * whole,
        gap=config.gap_chunks * whole,
        current=whole,
        bank=bank * _slot_bytes(config, config.banked_tokens, dtype),
        packed_bank=bank_slots(config, places) * _stored_bytes(config, dtype) if config.packs_bank else 0,
        restored=shared_slots(config)[1] * _slot_bytes(config, config.banked_tokens, dtype) // config.num_layers,
        tables=tables + of_layers,
        scratch=queries + 2 * config.num_layers * config.banked_tokens * _INT32 + _INT64 + content + mass,
        rotations=rotations,
        host_bank=arena_bytes(on_host) if on_host else 0,
        host_tables=tables + rotations + content + host_mass,
    )


def _table_bytes(shapes: Shapes) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())


def _stored_bytes(config: MemoryConfig, dtype: torch.dtype) -> int:
    """Of a banked chunk in its bits, without the tail of a slot in the pool."""
    of_layer = chunk_bytes(config.banked_tokens, config.pool_heads, config.head_dim, config.bank_bits, dtype)
    return 2 * config.num_layers * of_layer


def _slot_bytes(config: MemoryConfig, tokens: int, dtype: torch.dtype) -> int:
    return Pool.slot_bytes(tokens, config.num_layers, config.pool_heads, config.head_dim, dtype)
