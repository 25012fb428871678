"""Device slots as a cache of the chunks that a bank has in host memory, filled and written back beside compute."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from ..ranges import ranged
from ..saved import Rows
from ..tracing import untraced
from .arena import Arena
from .store import Store
from .streams import COMPUTE, LOAD, SAVE, CopyEngine

COUNTS = (
    "host_copies_in", "host_copies_out", "host_copies_saved", "host_misses", "host_bytes_in", "host_bytes_out",
    "prefetched", "prefetch_hits", "prefetch_misses", "host_bytes", "pinned",
)  # fmt: skip
COUNTED = (
    "hits", "misses", "copies_out", "prefetched", "prefetch_hits", "prefetch_misses", "bytes_in", "bytes_out",
)  # fmt: skip


class SlotCache:
    """Which banked chunks lie in slots of a store, and the order of the copies between these and their places.

    Policy: a chunk takes a free slot, else that of the least recently used chunk that the present window does not
    use. A chunk is pruned straight into a slot and copied out from there, so it starts out cached. One that is asked
    for while it is cached costs no copy, be it still on its way.

    Copies in go layer by layer, over all chunks asked for at once, since a pass needs layer 0 of all of them first.
    What each waits for:

    - a copy into a slot: the passes that read the slot (`release`), the copy out of it, and the copy out that
      fills the place;
    - pruning into a slot: the copies into it and out of it; its stream has waited for the passes;
    - a copy out of a slot: the pruning into it;
    - attention to a layer: the copies of that layer's rows, no other; its stream has waited for all pruning.

    A copy out need not wait for copies in from the place that it overwrites. Their chunk was dropped: what attended to
    it came before the pruning, and a copy that nothing attended to fills a slot whose next owner waits for it.

    Chunks are numbers; `places` say where in host memory each lies, `tokens` how many of a slot's, and of a place's, it
    takes: no more are copied.
    """

    def __init__(self, store: Store, *, places: int, device: torch.device) -> None:
        self._store, self._num_layers = store, store.place_shape[0]
        self.arena = Arena((places, *store.place_shape), store.dtype, device)
        self._engine = CopyEngine(device, *store.tensors)
        event = self._engine.event
        self._released = event()  # passes over windows before this one
        self._pruned = event()  # what was pruned last
        self._loaded = [[event() for _ in range(self._num_layers)] for _ in range(store.num_slots)]  # into slots
        self._saved = [event() for _ in range(store.num_slots)]  # out of slots
        self._written = [event() for _ in range(places)]  # into places
        self._in_use = True  # before the first window too: memory may come from what passes still read
        self.clear()

    def clear(self) -> None:
        """Forget what is cached, and the counts. Copies under way go on; what comes later waits for them."""
        self._cached: dict[int, int] = {}  # chunk -> slot, least recently used first
        self._free = list(range(self._store.num_slots - 1, -1, -1))
        self._unused: set[int] = set()  # prefetched and not asked for yet
        self.count(dict.fromkeys(COUNTED, 0))
        self.release()

    def count(self, counts: Mapping[str, int]) -> None:
        """Go on counting from here, see `copied`."""
        self.hits, self.misses, self.copies_out = (counts[name] for name in COUNTED[:3])
        self.prefetched, self.prefetch_hits, self.prefetch_misses = (counts[name] for name in COUNTED[3:6])
        self.bytes_in, self.bytes_out = (counts[name] for name in COUNTED[6:])

    def __contains__(self, chunk: int) -> bool:
        return chunk in self._cached

    # --- into the window ---

    @ranged("bank_copy_in")
    def request(self, chunks: list[int], places: Mapping[int, int], tokens: Mapping[int, int]) -> list[int]:
        """Make `chunks` the present window; returns their slots, which `wait_layer` or `wait` make good."""
        hits = self._touch(chunks)
        used = self._unused.intersection(hits)
        self._load([chunk for chunk in chunks if chunk not in self._cached], places, tokens, keep=chunks)
        self.hits += len(hits)
        self.misses += len(chunks) - len(hits)
        self.prefetch_hits += len(used)
        self._unused -= used
        self._in_use = True
        self._window = [self._cached[chunk] for chunk in chunks]
        self._in_window = frozenset(chunks)
        self._waited: set[int] = set()  # layers
        self.settled = not chunks
        return list(self._window)

    @ranged("bank_prefetch")
    def prefetch(self, chunks: list[int], places: Mapping[int, int], tokens: Mapping[int, int]) -> list[int]:
        """Bring in what slots outside the window take, first chunks first; returns which are cached now."""
        keep = self._in_window.union(chunks)
        self._touch(chunks)
        room = len(self._free) + sum(chunk not in keep for chunk in self._cached)
        missing = [chunk for chunk in chunks if chunk not in self._cached][:room]
        self._load(missing, places, tokens, keep=keep)
        self._unused.update(missing)
        self.prefetched += len(missing)
        return [chunk for chunk in chunks if chunk in self._cached]

    @untraced  # what it does differs from pass to pass
    def wait_layer(self, layer: int) -> None:
        """Let the current stream wait for the window's rows of one layer, once a window.

        Once will do for several streams: what comes later writes the rows of this pass again, and so comes after it.
        Raises RuntimeError where the stream is being captured: a graph cannot wait for copies outside of it.
        """
        if self.settled or layer in self._waited:
            return
        self._refuse_capture("attend")
        for slot in self._window:
            self._engine.wait(self._loaded[slot][layer], COMPUTE)
        self._waited.add(layer)

    def wait(self) -> None:
        """Let the current stream wait for the window's rows of all layers; `wait_layer` then does nothing."""
        if not self.settled:
            self._refuse_capture("wait")
            for slot in self._window:
                self._engine.wait(self._loaded[slot][-1], COMPUTE)  # layers come in order
            self.settled = True

    def release(self) -> None:
        """The window is over: what the current stream has queued so far is all that reads it. Again: does nothing."""
        if self._in_use:
            self._engine.record(self._released, COMPUTE)
        self._in_use = False
        self._window: list[int] = []
        self._in_window: frozenset[int] = frozenset()
        self.settled = True

    # --- into the bank ---

    def slot_to_fill(self, chunk: int) -> int:
        """A slot for the current stream to prune `chunk` into. Takes one of the window if need be."""
        slot = self._take(keep=())
        self._cached[chunk] = slot
        engine = self._engine
        engine.wait(self._loaded[slot][-1], COMPUTE)
        engine.wait(self._saved[slot], COMPUTE)
        return slot

    @ranged("bank_copy_out")
    def save(self, chunk: int, place: int, tokens: int) -> None:
        """Copy out a chunk that the current stream has pruned."""
        engine, slot = self._engine, self._cached[chunk]
        engine.record(self._pruned, COMPUTE)
        engine.wait(self._pruned, SAVE)
        pairs = []
        for layer in range(self._num_layers):
            pairs += zip(self._at(place, layer, tokens), self._store.views(slot, layer, tokens), strict=True)
        engine.copy(pairs, SAVE)
        engine.record(self._saved[slot], SAVE)
        engine.record(self._written[place], SAVE)
        self.copies_out += 1
        self.bytes_out += self._store.bytes_of(tokens)

    def break_off(self, chunk: int, place: int) -> None:
        """Forget a chunk that is not all pruned and saved; what is on its way goes on."""
        engine = self._engine
        engine.record(self._pruned, COMPUTE)
        engine.wait(self._pruned, SAVE)
        engine.record(self._saved[self._cached[chunk]], SAVE)
        engine.record(self._written[place], SAVE)
        self.drop(chunk)

    def drop(self, chunk: int) -> None:
        """Forget a chunk, if it is cached."""
        if chunk in self._cached:
            self._free.append(self._evict(chunk))

    def counts(self) -> dict[str, int]:
        """See WorldMemory.stats."""
        counts = (
            self.misses + self.prefetched, self.copies_out, self.hits, self.misses, self.bytes_in, self.bytes_out,
            self.prefetched, self.prefetch_hits, self.prefetch_misses, self.arena.bytes, int(self.arena.pinned),
        )  # fmt: skip
        return dict(zip(COUNTS, counts, strict=True))

    def copied(self) -> dict[str, int]:
        """The counts, of which a chunk that was prefetched and not asked for yet was prefetched in vain."""
        counts = {name: getattr(self, name) for name in COUNTED}
        return {**counts, "prefetch_misses": counts["prefetch_misses"] + len(self._unused)}

    def held(self, place: int, tokens: int) -> Rows:
        """All of a chunk in host memory, [num_layers, 2, ...], for who has waited for it."""
        return Rows.of_layers(self._num_layers, lambda layer: self._at(place, layer, tokens))

    # --- parts of the above ---

    def _touch(self, chunks: list[int]) -> list[int]:
        """Make those that are cached the most recently used; returns them."""
        cached = [chunk for chunk in chunks if chunk in self._cached]
        for chunk in cached:
            self._cached[chunk] = self._cached.pop(chunk)
        return cached

    def _take(self, keep: Collection[int]) -> int:
        """A slot that is free, or that of the least recently used chunk not to be kept."""
        if self._free:
            return self._free.pop()
        return self._evict(next(cached for cached in self._cached if cached not in keep))

    def _evict(self, chunk: int) -> int:
        if chunk in self._unused:
            self._unused.remove(chunk)
            self.prefetch_misses += 1
        return self._cached.pop(chunk)

    def _load(
        self, chunks: list[int], places: Mapping[int, int], tokens: Mapping[int, int], keep: Collection[int]
    ) -> None:
        if not chunks:
            return
        engine, slots = self._engine, []
        engine.wait(self._released, LOAD)
        try:
            for chunk in chunks:
                slot = self._take(keep)
                self._cached[chunk] = slot
                slots.append(slot)
                engine.wait(self._saved[slot], LOAD)
                engine.wait(self._written[places[chunk]], LOAD)
            for layer in range(self._num_layers):
                pairs = []
                for chunk, slot in zip(chunks, slots, strict=True):
                    sides = self._store.views(slot, layer, tokens[chunk]), self._at(places[chunk], layer, tokens[chunk])
                    pairs += zip(*sides, strict=True)
                engine.copy(pairs, LOAD)
                for slot in slots:
                    engine.record(self._loaded[slot][layer], LOAD)
        except BaseException:
            for chunk in chunks:  # none that is half there may count as cached
                self.drop(chunk)
            for slot in slots:
                engine.record(self._loaded[slot][-1], LOAD)
            raise
        self.bytes_in += sum(self._store.bytes_of(tokens[chunk]) for chunk in chunks)

    def _at(self, place: int, layer: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer in a place. They are one piece there but two tensors on the device."""
        k, v = self.arena.rows[place, layer, :, : self._store.extent(tokens)]
        return k, v

    def _refuse_capture(self, op: str) -> None:
        if self._engine.capturing():
            raise RuntimeError(
                f"{op}: the window's rows must be waited for (WorldMemory.wait) before a graph is captured, "
                f"got a call inside a capture with {len(self._window)} chunks on their way"
            )
