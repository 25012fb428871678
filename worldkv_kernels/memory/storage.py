"""Storage: the rows of a memory's keys and values, of whole chunks in the pool and of older ones in the bank."""

from __future__ import annotations

from typing import Any

import torch

from ..ops.compress_chunk import compress_chunk
from ..rope import NUM_POSITIONS
from ..saved import Rows
from ..window import Segment
from .bank import Bank
from .config import MemoryConfig
from .plan import Piece
from .pool import Pool
from .retrieval import RetrievalPolicy
from .room import bank_places, check_room
from .sizes import pool_slots, window_capacity
from .slots import COUNTS
from .streams import SideStream


class Storage:
    """Slots of the pool for the sink and for the chunks that are whole, one after the other in a ring; and the bank.

    All of it is allocated here, once, of the sizes that sizes.py works out. `bank` is None in a mode without one.
    `max_chunks`: how many chunks a rollout can have: in mode "full" those that the pool holds, else 2**31 frames.
    `places`: how many chunks the bank holds, in mode "full" the pool.
    `window_capacity`: tiles of 128 rows that the largest window can take.

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
        sizes = dict(num_layers=config.num_layers, num_heads=config.num_heads, head_dim=config.head_dim)
        banked = config.banked_tokens
        self.places = places = bank_places(config, device, dtype)
        check_room(config, device, dtype, places)
        self.max_chunks = places if config.mode == "full" else NUM_POSITIONS // config.chunk_frames
        self.window_capacity = window_capacity(config, places)
        self.pool = Pool(pool_slots(config, places), device=device, dtype=dtype, **sizes)
        self._sink_rows, self._ring_rows, self._bank_rows = self.pool.first_rows
        self.bank = None
        if config.has_bank:
            self.bank = Bank(
                self.pool, self._bank_rows, tokens=banked, places=places, on_host=config.bank == "host", policy=policy,
                bits=config.bank_bits, backend=backend,
            )  # fmt: skip
        # What compress_chunk says of a chunk and nobody asks for: kept here, it is not allocated in every end_chunk.
        self.index, self.count = torch.empty((2, config.num_layers, banked), dtype=torch.int32, device=device)
        of_bank = self.bank.device_tensors if self.bank is not None else ()
        self.device_bytes = self.pool.bytes + sum(tensor.nbytes for tensor in of_bank)
        self._side = SideStream(device, self.pool.k, self.pool.v, self.index, self.count, *of_bank)

    def first_row(self, chunk: int) -> int:
        """Of a chunk that is whole: in the sink, recent, or current."""
        sink = self.config.sink_chunks
        return self._sink_rows[chunk] if chunk < sink else self._ring_rows[(chunk - sink) % len(self._ring_rows)]

    def held(self, chunk: int) -> Rows:
        """K and V of a whole chunk, for who has waited for them."""
        return self.pool.held(self.first_row(chunk), self.config.chunk_tokens)

    def segments(self, pieces: list[Piece]) -> tuple[tuple[str, int, Segment], ...]:
        """The rows of a window's pieces, with their role and chunk; requests the retrieved ones of the bank."""
        retrieved = [piece.chunk for piece in pieces if piece.role == "retrieved"]
        rows = dict(zip(retrieved, self.bank.request(retrieved), strict=True)) if self.bank is not None else {}
        found = []
        for role, chunk, first_token, num_tokens, time_shift in pieces:
            if role == "retrieved":
                slot, log_weight = rows[chunk], self.config.retrieved_log_weight
            else:
                slot, log_weight = self.first_row(chunk), 0.0
            found.append((role, chunk, Segment(slot + first_token, num_tokens, time_shift, log_weight)))
        return tuple(found)

    def prune(self, chunk: int, description: Any) -> None:
        """Prune a whole chunk, all layers at once, from its slot into the bank's, unless a full bank gives it up.

        It runs beside what the caller queues until the next chunk begins, such as the decoding of this one: see `join`.
        One call launches as much as it would for one layer. A copy to the host then begins when all layers are pruned,
        not after the first: about 1 ms later, where the link takes some 36 ms for a chunk (14B, half of it kept).
        """
        with self._side.beside():
            row = self.bank.row_to_fill(chunk, description, self.config.banked_tokens)
            self.bank.release()  # before pruning is queued: copies for the next window need not wait for it
            if row is None:
                return
            try:
                self._compress(self.first_row(chunk), row)
                self.bank.stored(chunk)
            except BaseException:
                self.bank.break_off(chunk)
                raise

    def warm_up(self, first_row: int) -> None:
        """Prune the whole chunk at `first_row` into a slot of the bank, while no chunk is banked, and forget it."""
        if self.bank is not None:
            with self._side.beside():
                self._compress(first_row, self._bank_rows[0])
                self.bank.try_out(self.config.banked_tokens)
            self._side.join()

    def _compress(self, first_row: int, row: int) -> None:
        """All layers of the whole chunk that starts at `first_row` into the bank's slot at `row`."""
        config, k, v = self.config, self.pool.k, self.pool.v
        source = slice(first_row, first_row + config.chunk_tokens)
        target = slice(row, row + config.banked_tokens)
        index, count = (x.view(-1)[: len(x) * config.banked_tokens].view(len(x), -1) for x in (self.index, self.count))
        compress_chunk(
            k[:, source], v[:, source], frames=config.chunk_frames, keep_ratio=config.keep_ratio, pooled=config.pooled,
            rule=config.prune_rule, merge=config.merge_pruned, scale=config.scale,
            out_k=k[:, target], out_v=v[:, target], out_index=index,
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
