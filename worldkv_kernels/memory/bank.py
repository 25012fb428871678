"""The bank: chunks that left the recent frames, pruned, on the device or in host memory."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..checks import describe, is_integer
from ..saved import Rows
from .kept import keep
from .pool import Pool
from .retrieval import RetrievalPolicy
from .shelf import PackedShelf, WholeShelf
from .slots import COUNTS, SlotCache


class Bank:
    """Which banked chunk lies where, and what is given up when there is no more room.

    On the device, as it was pruned, a chunk has a slot of the pool for as long as it is banked. In host memory, or in
    fewer `bits`, it has a place on a shelf, and the pool's slots are a cache of that, see SlotCache.

    To bank a chunk: `row_to_fill`, then write its rows, then `stored`, all on the current stream, which has waited for
    the passes before. To attend to chunks: `request`, `wait_layer` or `wait`, then read their rows, then `release`.
    That waits for copies alone: a stream that reads what another has written to the bank waits for that one.
    """

    def __init__(
        self,
        pool: Pool,
        slots: list[int],
        *,
        tokens: int,
        places: int,
        on_host: bool,
        policy: RetrievalPolicy,
        bits: int = 16,
        backend: str | None = None,
    ) -> None:
        self._pool, self._slots, self._slot_tokens = pool, slots, tokens
        self._kept = keep(policy, places)
        self._cache = None
        if on_host or bits < 16:
            room = dict(tokens=tokens, num_places=places)
            packed = dict(bits=bits, on_host=on_host, backend=backend)
            shelf = WholeShelf(pool, **room) if bits == 16 else PackedShelf(pool, **room, **packed)
            self._cache = SlotCache(pool, slots, shelf, on_host=on_host, restores=bits < 16)
        self.capacity = places
        self.clear()

    def clear(self) -> None:
        """Forget everything; keeps the storage."""
        self._kept.clear()
        self._place: dict[int, int] = {}  # chunk, oldest first -> slot number on the device, or place in the arena
        self._tokens: dict[int, int] = {}  # chunk -> to how many it was pruned
        self.pinned: set[int] = set()  # chunks not to be given up, also such as will be banked
        self._free = list(range(self.capacity - 1, -1, -1))
        self.num_dropped = 0
        if self._cache is not None:
            self._cache.clear()

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, chunk: int) -> bool:
        return chunk in self._place

    @property
    def tokens(self) -> Mapping[int, int]:
        """Of each banked chunk."""
        return self._tokens

    @property
    def settled(self) -> bool:
        """Whether attention to the window needs to wait for no copy."""
        return self._cache is None or self._cache.settled

    @property
    def copies_in(self) -> int:
        return self.counts()["host_copies_in"]

    @property
    def device_tensors(self) -> tuple[torch.Tensor, ...]:
        """What it has on the device beside the pool."""
        return self._cache.shelf.device_tensors if self._cache is not None else ()

    @property
    def kept_bytes(self) -> int:
        """Of all banked chunks, where the bank keeps them."""
        return sum(map(self.bytes_of, self._tokens.values()))

    def bytes_of(self, tokens: int) -> int:
        """What the bank keeps of a chunk of so many tokens."""
        return self._cache.shelf.bytes_of(tokens) if self._cache is not None else tokens * self._pool.token_bytes

    def counts(self) -> dict[str, int]:
        """Of what a shelf takes and gives, see WorldMemory.stats; zeros where there is none."""
        return self._cache.counts() if self._cache is not None else dict.fromkeys(COUNTS, 0)

    # --- to be saved ---

    def description(self, chunk: int) -> Any:
        """Of a banked chunk, as `row_to_fill` was given it."""
        return self._kept.description(chunk)

    def held(self, chunk: int) -> Rows:
        """A banked chunk's K and V, or what they were packed to, where the bank keeps them, for who has waited."""
        if self._cache is not None:
            return self._cache.held(self._place[chunk], self._tokens[chunk])
        return self._pool.held(self._slots[self._place[chunk]], self._tokens[chunk])

    def copied(self) -> dict[str, int] | None:
        """Counts of what a shelf took and gave; None where there is none."""
        return self._cache.copied() if self._cache is not None else None

    def adopt(self, chunk: int, description: Any, tokens: int) -> Rows:
        """Bank a chunk younger than all that are there, with room for it; returns where what was `held` is to be put.

        Raises ValueError where it has more tokens than a slot, or none.
        """
        if not 1 <= tokens <= self._slot_tokens:
            raise ValueError(f"Bank: tokens must be from 1 to {self._slot_tokens}, got {tokens} of chunk {chunk}")
        self._kept.add(chunk, description)
        self._place[chunk] = self._free.pop()
        self._tokens[chunk] = tokens
        return self.held(chunk)

    def count(self, num_dropped: int, copied: Mapping[str, int] | None) -> None:
        """Go on counting from here; of a bank that had no shelf there is nothing to go on from."""
        self.num_dropped = num_dropped
        if self._cache is not None and copied is not None:
            self._cache.count(copied)

    # --- into the bank ---

    def try_out(self, tokens: int) -> None:
        """Pack and restore so many tokens of the first slot, which has been pruned into, while nothing is banked."""
        if self._cache is not None:
            self._cache.try_out(tokens)

    def row_to_fill(self, chunk: int, description: Any, tokens: int | None = None) -> int | None:
        """Where to prune a chunk to: the first pool row; None when the full bank gives up this very chunk.

        `tokens`: that it will have, at most a slot's; None for as many.

        Raises ValueError when the policy gives up a chunk that is not there, TypeError when it gives up what is no
        chunk number; the bank is then as before.
        """
        self._kept.add(chunk, description)
        if not self._free:
            try:
                given_up = self._given_up(chunk)
            except BaseException:
                self._kept.remove(chunk)
                raise
            self.num_dropped += 1
            if given_up == chunk:
                self._kept.remove(chunk)
                self.pinned.discard(chunk)
                return None
            self._forget(given_up)
        self._place[chunk] = self._free.pop()
        self._tokens[chunk] = self._slot_tokens if tokens is None else tokens
        if self._cache is None:
            return self._slots[self._place[chunk]]
        return self._cache.slot_to_fill(chunk)

    def stored(self, chunk: int) -> None:
        """The rows that `row_to_fill` gave are written, of all layers: copy them out."""
        if self._cache is not None:
            self._cache.save(chunk, self._place[chunk], self._tokens[chunk])

    def break_off(self, chunk: int) -> None:
        """Take back `row_to_fill`, where writing the rows failed; what it dropped stays dropped."""
        if self._cache is not None:
            self._cache.break_off(chunk, self._place[chunk])
        self._forget(chunk)

    def pass_over(self, chunk: int) -> None:
        """Count a chunk as dropped that is not to be banked."""
        self.num_dropped += 1
        self.pinned.discard(chunk)

    def forget(self, chunk: int) -> None:
        """Give up a banked chunk, while no window is requested."""
        self.num_dropped += 1
        self.pinned.discard(chunk)
        self._forget(chunk)

    def _given_up(self, chunk: int) -> int:
        """What the policy gives up for `chunk`, checked: none that is pinned. `chunk` itself where all others are."""
        pinned = self.pinned.intersection((*self._place, chunk)) if self.pinned else ()
        known = [one for one in (*self._place, chunk) if one not in pinned]
        if known in ([], [chunk]):
            return chunk
        given_up = self._kept.drop(pinned)
        if is_integer(given_up) and (given_up in self._place or given_up == chunk) and given_up not in pinned:
            return operator.index(given_up)
        error = ValueError if is_integer(given_up) else TypeError
        raise error(f"end_chunk: the retrieval policy must drop one of {known}, got {describe(given_up)}")

    def _forget(self, chunk: int) -> None:
        self._kept.remove(chunk)
        self._free.append(self._place.pop(chunk))
        del self._tokens[chunk]
        if self._cache is not None:
            self._cache.drop(chunk)

    # --- into the window ---

    def select(
        self, op: str, description: Any, budget: int, *, first: int = 0, coming: tuple[int, Any] | None = None
    ) -> list[int]:
        """The policy's choice of up to `budget` banked chunks from `first` on, best first, checked; errors name `op`.

        `coming`: a chunk and its description, on offer too.
        """
        selected = self._kept.select(description, budget, first, coming)
        chosen = list(selected) if isinstance(selected, Iterable) else [None]
        if not all(map(is_integer, chosen)):
            raise TypeError(f"{op}: the retrieval policy must select a list of chunk numbers, got {describe(selected)}")
        chosen = [operator.index(chunk) for chunk in chosen]
        comes = coming[0] if coming is not None else None
        on_offer = all(chunk == comes or (chunk in self._place and chunk >= first) for chunk in chosen)
        if len(chosen) > budget or len(set(chosen)) != len(chosen) or not on_offer:
            known = [chunk for chunk in (*self._place, comes) if chunk is not None and chunk >= first]
            raise ValueError(
                f"{op}: the retrieval policy must select up to {budget} different chunks of {sorted(known)}, "
                f"got {chosen}"
            )
        return chosen

    def request(self, chunks: list[int]) -> list[int]:
        """Begin to bring in these banked chunks; returns the pool rows at which they start.

        They stay where they are until `release`. Raises ValueError, before anything changes, for more
        chunks than the device has slots.
        """
        if self._cache is None:
            return [self._slots[self._place[chunk]] for chunk in chunks]
        if len(chunks) > len(self._slots):
            raise ValueError(f"Bank: request must be for at most {len(self._slots)} chunks, got {len(chunks)}")
        return self._cache.request(chunks, self._place, self._tokens)

    def prefetch(self, chunks: list[int]) -> list[int]:
        """Begin to bring in banked chunks for a window to come; returns those that are on the device or on the way."""
        return list(chunks) if self._cache is None else self._cache.prefetch(chunks, self._place, self._tokens)

    def wait_layer(self, layer: int) -> None:
        """Let the current stream wait for what `request` brings in, of one layer."""
        if self._cache is not None:
            self._cache.wait_layer(layer)

    def wait(self) -> None:
        """Let the current stream wait for what `request` brings in, of all layers."""
        if self._cache is not None:
            self._cache.wait()

    def release(self) -> None:
        """All that reads the requested rows is queued on the current stream."""
        if self._cache is not None:
            self._cache.release()

    def fetch(self, chunks: list[int]) -> list[int]:
        """`release`, `request` and `wait` in one: rows that the current stream may read at once."""
        self.release()
        rows = self.request(chunks)
        self.wait()
        return rows
