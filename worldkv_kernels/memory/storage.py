"""Storage: the rows of a memory's keys and values, of whole chunks in the pool and of older ones in the bank."""

from __future__ import annotations

from typing import Any

import torch

from ..ops.all import backend_of
from ..ops.compress_chunk import compress_chunk
from ..ops.quantize_chunk import dequantize_chunk, quantize_chunk
from ..rope import NUM_POSITIONS
from ..saved import Rows
from ..tables import Tables
from ..window import Segment
from .bank import Bank
from .config import MemoryConfig
from .plan import Piece
from .pool import Pool, of_branch
from .received import Received
from .retrieval import RetrievalPolicy
from .room import bank_places, check_room
from .sizes import bank_slots, chosen_shape, mass_shape, pool_slots, shared_slots, window_capacity
from .slots import COUNTS
from .store import PackedStore, WholeStore
from .streams import SideStream


class Storage:
    """Slots of the pool for the sink and for the chunks that are whole, one after the other in a ring; and the bank.

    All of it is allocated here, once, of the sizes that sizes.py works out. `bank` is None in a mode without one.
    `max_chunks`: how many chunks a rollout can have: in mode "full" those that the pool holds, else 2**31 frames.
    `places`: how many chunks the bank holds, in mode "full" the pool. `received`: None where no layer is asked.
    `window_capacity`: tiles of 128 rows that the largest window can take.

    A bank in 16 bits has its slots in the pool, where attention reads them. In fewer bits it has them in a PackedStore,
    and `restore` brings the retrieved chunks of the layer at hand, in every pass, to rows that all layers share. Pruned
    chunks come by the same rows. What is not finite is packed as NaN, as it is attended in 16 bits: a look would find
    it when its chunk leaves the recent ones, too late for whoever made it.

    Raises ValueError when it does not fit the memory that is free, with the numbers.
    """

    def __init__(
        self,
        config: MemoryConfig,
        policy: RetrievalPolicy,
        *,
        device: torch.device,
        dtype: torch.dtype,
        backend: str | None,
    ) -> None:
        self.config, self._backend = config, backend  # the config may change as far as WorldMemory.change allows
        sizes = dict(num_layers=config.num_layers, num_heads=config.pool_heads, head_dim=config.head_dim)
        banked = config.banked_tokens
        self.places = places = bank_places(config, device, dtype)
        check_room(config, device, dtype, places)
        self.max_chunks = places if config.mode == "full" else NUM_POSITIONS // config.chunk_frames
        self.window_capacity = window_capacity(config, places)
        self.pool = Pool(pool_slots(config, places), shared=shared_slots(config), device=device, dtype=dtype, **sizes)
        self._sink_rows, self._ring_rows, bank_rows = self.pool.first_rows
        self._whole = self._packed = self._chosen = self.bank = None
        self.received = Received(config, mass_shape(config, places), device) if config.takes_mass else None
        if config.packs_bank:
            self._packing_backend = backend_of("quantize_chunk", backend)
            self._packed = PackedStore(
                bank_slots(config, places), tokens=banked, bits=config.bank_bits, dtype=dtype, device=device, **sizes
            )
            if config.retrieved_chunks:
                self._chosen = Tables({"chosen": (chosen_shape(config), torch.int32)}, device)
        elif config.has_bank:
            self._whole = WholeStore(self.pool, bank_rows, tokens=banked)
        store = self._packed or self._whole
        if store is not None:
            self.bank = Bank(store, places=places, on_host=config.bank == "host", policy=policy, received=self.received)
        # What compress_chunk says of a chunk and nobody asks for: kept here, it is not allocated in every end_chunk.
        self.index, self.count = torch.empty((2, config.num_layers, banked), dtype=torch.int32, device=device)
        packed = self._packed.tensors if self._packed is not None else ()
        self.device_bytes = self.pool.bytes + sum(tensor.nbytes for tensor in packed)
        self._side = SideStream(device, self.pool.k, self.pool.v, self.index, self.count, *packed)

    def first_row(self, chunk: int) -> int:
        """Of a chunk that is whole: in the sink, recent, or current."""
        sink = self.config.sink_chunks
        return self._sink_rows[chunk] if chunk < sink else self._ring_rows[(chunk - sink) % len(self._ring_rows)]

    def held(self, chunk: int) -> Rows:
        """K and V of a whole chunk, for who has waited for them."""
        return self.pool.held(self.first_row(chunk), self.config.chunk_tokens)

    def segments(self, pieces: list[Piece]) -> tuple[tuple[str, int, Segment], ...]:
        """The rows of a window's pieces, with their role and chunk, as layer 0 sees them; requests the retrieved ones
        of the bank, and says which are to be restored."""
        retrieved = [piece.chunk for piece in pieces if piece.role == "retrieved"]
        rows = dict(zip(retrieved, self._bank_rows(retrieved), strict=True)) if self.bank is not None else {}
        found = []
        for role, chunk, first_token, num_tokens, time_shift in pieces:
            if role == "retrieved":
                slot, log_weight = rows[chunk], self.config.retrieved_log_weight
            else:
                slot, log_weight = self.first_row(chunk), 0.0
            found.append((role, chunk, Segment(slot + first_token, num_tokens, time_shift, log_weight)))
        return tuple(found)

    def _bank_rows(self, chunks: list[int]) -> list[int]:
        """Request banked chunks, which `bank.wait_layer` and `restore` then bring; returns where attention finds
        each."""
        slots = self.bank.request(chunks)
        if self._whole is not None:
            return [self._whole.first_rows[slot] for slot in slots]
        if self._chosen is None:
            return []
        chosen = self._chosen.host()["chosen"]
        chosen[:] = 0
        for i, (chunk, slot) in enumerate(zip(chunks, slots, strict=True)):
            chosen[i] = slot, self.bank.tokens[chunk]
        self._chosen.copy({"chosen": len(chosen)})
        return self.pool.shared_rows[: len(chunks)]

    def restore(self, layer: int) -> None:
        """Of a bank in fewer bits, let the current stream bring the retrieved chunks of a layer to where it attends to
        them. One launch, also for none of them, so that a captured graph serves every window."""
        if self._chosen is not None:
            chosen, tokens = self._chosen.on_device["chosen"], self._packed.tokens
            k, v = (x[: len(chosen), :tokens] for x in (self.pool.shared_k, self.pool.shared_v))
            dequantize_chunk(
                self._packed.packed[:, layer], bits=self.config.bank_bits, chosen=chosen, out_k=k, out_v=v,
                backend=self._packing_backend,
            )  # fmt: skip

    def prune(self, chunk: int, description: Any) -> None:
        """Prune a whole chunk from its slot into the bank's, unless a full bank gives it up.

        It runs beside what the caller queues until the next chunk begins, such as the decoding of this one: see `join`.
        All layers at once, or of a bank in fewer bits as many as share rows: one call launches as much as it would for
        one layer. A copy to the host begins when all are pruned, not after the first: about 1 ms later in 16 bits,
        where the link takes some 36 ms for a chunk (14B, half of it kept).
        """
        try:
            with self._side.beside():
                slot = self.bank.slot_to_fill(chunk, description, self.config.banked_tokens)
                self.bank.release()  # before pruning is queued: copies for the next window need not wait for it
                if slot is None:
                    return
                try:
                    self._fill(slot, self.first_row(chunk))
                    self.bank.stored(chunk)
                except BaseException:
                    self.bank.break_off(chunk)
                    raise
        except BaseException:
            self._side.join()  # the chunk is still begun, and a pass would write the shared rows
            raise

    def warm_up(self, first_row: int) -> None:
        """Prune the whole chunk at `first_row` into a slot of the bank, while no chunk is banked, and forget it."""
        if self.bank is not None:
            with self._side.beside():
                self._fill(0, first_row)
            self._side.join()

    def _fill(self, slot: int, first_row: int) -> None:
        """A slot of the bank with the whole chunk that starts at `first_row`, pruned."""
        num_layers, tokens, pool = self.config.num_layers, self.config.banked_tokens, self.pool
        if self._whole is not None:
            row = self._whole.first_rows[slot]
            target = slice(row, row + tokens)
            self._compress(range(num_layers), first_row, pool.k[:, target], pool.v[:, target])
            return
        at_once = len(pool.shared_rows)
        for first in range(0, num_layers, at_once):
            layers = range(first, min(first + at_once, num_layers))
            k, v = (x[: len(layers), :tokens] for x in (pool.shared_k, pool.shared_v))
            self._compress(layers, first_row, k, v)
            quantize_chunk(
                k, v, bits=self.config.bank_bits, out=self._packed.of_slot(slot, layers, tokens), check_finite=False,
                backend=self._packing_backend,
            )  # fmt: skip

    def _compress(self, layers: range, first_row: int, out_k: torch.Tensor, out_v: torch.Tensor) -> None:
        """Some layers of the whole chunk that starts at `first_row`, [layers, banked tokens, heads, head_dim], each
        branch by itself."""
        config, inside = self.config, slice(layers.start, layers.stop)
        source, banked = slice(first_row, first_row + config.chunk_tokens), config.banked_tokens
        index, count = (x.view(-1)[: len(x) * banked].view(len(x), -1)[inside] for x in (self.index, self.count))
        for branch in range(config.branches):
            k, v, branch_k, branch_v = (
                of_branch(x, branch, config.num_kv_heads, dim=2)
                for x in (self.pool.k[inside, source], self.pool.v[inside, source], out_k, out_v)
            )
            compress_chunk(
                k, v, frames=config.chunk_frames,
                keep_ratio=config.keep_ratio, pooled=config.pooled,
                rule=config.prune_rule, merge=config.merge_pruned, scale=config.scale,
                out_k=branch_k, out_v=branch_v, out_index=index,
                out_count=count if config.merge_pruned else None, backend=self._backend,
            )  # fmt: skip

    def join(self) -> None:
        """Let the current stream wait for pruning: before it reads what was pruned, or writes where that lay."""
        self._side.join()

    def stats(self, next_chunk: int, first_whole: int) -> dict[str, int]:
        """Of the bank, and bytes, before `next_chunk`; see WorldMemory.stats, and plan.leaving for `first_whole`.

        kept_bytes are of what holds the past, a chunk that the window cuts with all of its frames and a banked one in
        its bits, without room that is free, a slot's tail, or the slots that are a cache.
        """
        bank, has_bank = self.bank, self.bank is not None  # an empty bank is falsy
        whole = next_chunk - (first_whole - self.config.sink_chunks)
        banked = len(bank) if has_bank else 0  # with the sink's copy where bank_sink keeps one
        kept_bytes = whole * self.config.chunk_tokens * self.pool.token_bytes + (bank.kept_bytes if has_bank else 0)
        return {
            "chunks_banked": banked,
            "bank_capacity": bank.capacity if has_bank else 0,
            "chunks_dropped": bank.num_dropped if has_bank else next_chunk - whole,
            "device_bytes": self.device_bytes,
            "kept_bytes": kept_bytes,
            **(bank.counts() if has_bank else dict.fromkeys(COUNTS, 0)),
        }
