"""The bank: chunks that left the recent frames, pruned, on the device or in host memory."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from ..checks import describe, is_integer
from ..saved import Rows
from .kept import keep
from .received import Received
from .retrieval import RetrievalPolicy
from .slots import COUNTS, SlotCache
from .store import Store, held


class Bank:
    """Which banked chunk lies where, and what is given up when there is no more room.

    On the device a chunk has a slot of the store for as long as it is banked. In host memory it has a place in an
    arena, and the slots are a cache of that, see SlotCache.

    To bank a chunk: `slot_to_fill`, then write what is in it, then `stored`, all on the current stream, which has
    waited for the passes before. To attend to chunks: `request`, `wait_layer` or `wait`, then read their slots, then
    `release`. That waits for copies alone: a stream that reads what another has written to the bank waits for that one.
    """

    def __init__(
        self, store: Store, *, places: int, on_host: bool, policy: RetrievalPolicy, received: Received | None = None
    ) -> None:
        self.store = store
        self._kept = keep(policy, places, received)
        self._cache = SlotCache(store, places=places, device=store.tensors[0].device) if on_host else None
        self.capacity = places
        self.clear()

    def clear(self) -> None:
        """Forget everything; keeps the storage."""
        self._kept.clear()
        self._place: dict[int, int] = {}  # chunk, oldest first -> slot, or place in the arena
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
    def kept_bytes(self) -> int:
        """Of all banked chunks."""
        return sum(map(self.store.bytes_of, self._tokens.values()))

    def counts(self) -> dict[str, int]:
        """Of copies between host and device, see WorldMemory.stats; zeros of a bank on the device."""
        return self._cache.counts() if self._cache is not None else dict.fromkeys(COUNTS, 0)

    # --- to be saved ---

    def description(self, chunk: int) -> Any:
        """Of a banked chunk, as `slot_to_fill` was given it."""
        return self._kept.description(chunk)

    def held(self, chunk: int) -> Rows:
        """A banked chunk's K and V, or what they were packed to, for who has waited."""
        place, tokens = self._place[chunk], self._tokens[chunk]
        return held(self.store, place, tokens) if self._cache is None else self._cache.held(place, tokens)

    def copied(self) -> dict[str, int] | None:
        """Counts of copies between host and device; None where there are none."""
        return self._cache.copied() if self._cache is not None else None

    def adopt(self, chunk: int, description: Any, tokens: int) -> Rows:
        """Bank a chunk younger than all that are there, with room for it; returns where what was `held` is to be put.

        Raises ValueError where it has more tokens than a slot, or none.
        """
        if not 1 <= tokens <= self.store.tokens:
            raise ValueError(f"Bank: tokens must be from 1 to {self.store.tokens}, got {tokens} of chunk {chunk}")
        self._kept.add(chunk, description)
        self._place[chunk] = self._free.pop()
        self._tokens[chunk] = tokens
        return self.held(chunk)

    def count(self, num_dropped: int, copied: Mapping[str, int] | None) -> None:
        """Go on counting from here; of a bank that made no copies there is nothing to go on from."""
        self.num_dropped = num_dropped
        if self._cache is not None and copied is not None:
            self._cache.count(copied)

    # --- into the bank ---

    def slot_to_fill(self, chunk: int, description: Any, tokens: int | None = None) -> int | None:
        """Where to prune a chunk to: a slot; None when the full bank gives up this very chunk.

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
        self._tokens[chunk] = self.store.tokens if tokens is None else tokens
        return self._place[chunk] if self._cache is None else self._cache.slot_to_fill(chunk)

    def stored(self, chunk: int) -> None:
        """The slot that `slot_to_fill` gave is written, all layers: copy it out."""
        if self._cache is not None:
            self._cache.save(chunk, self._place[chunk], self._tokens[chunk])

    def break_off(self, chunk: int) -> None:
        """Take back `slot_to_fill`, where writing the slot failed; what it dropped stays dropped."""
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
        """Begin to bring in these banked chunks; returns their slots.

        They stay where they are until `release`. Raises ValueError, before anything changes, for more
        chunks than the device has slots.
        """
        if self._cache is None:
            return [self._place[chunk] for chunk in chunks]
        if len(chunks) > self.store.num_slots:
            raise ValueError(f"Bank: request must be for at most {self.store.num_slots} chunks, got {len(chunks)}")
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
        """All that reads the requested slots is queued on the current stream."""
        if self._cache is not None:
            self._cache.release()

    def fetch(self, chunks: list[int]) -> list[int]:
        """`release`, `request` and `wait` in one: slots that the current stream may read at once."""
        self.release()
        slots = self.request(chunks)
        self.wait()
        return slots
