"""Device slots as a cache of the chunks on a shelf, filled and written back beside compute."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping

from ..ranges import ranged
from ..saved import Rows
from ..tracing import untraced
from .pool import Pool
from .shelf import Move, Shelf
from .streams import COMPUTE, LOAD, SAVE, CopyEngine

COUNTS = (
    "host_copies_in", "host_copies_out", "host_copies_saved", "host_misses", "host_bytes_in", "host_bytes_out",
    "prefetched", "prefetch_hits", "prefetch_misses", "restored", "host_bytes", "pinned",
)  # fmt: skip
COUNTED = (
    "hits", "misses", "copies_out", "prefetched", "prefetch_hits", "prefetch_misses", "bytes_in", "bytes_out",
    "restored",
)  # fmt: skip


class SlotCache:
    """Which banked chunks lie in slots, and the order of what brings them there and away: copies, packing, restoring.

    Policy: a chunk takes a free slot, else that of the least recently used chunk that the present window does not
    use. A chunk is pruned straight into a slot and copied out from there, so it starts out cached. One that is asked
    for while it is cached costs no copy, be it still on its way.

    Copies in go step by step, layer by layer between host and device, over all chunks asked for at once, since a pass
    needs layer 0 of all of them first. What each waits for:

    - a load into a slot: the passes that read the slot (`release`), the copy out of it, and the copy out that
      fills the place;
    - pruning into a slot: the loads into it and the copy out of it; its stream has waited for the passes;
    - packing, where it goes through a staging place: the copy out of that;
    - a copy out of a slot: the pruning into it, and packing, after which it needs the slot no more;
    - attention to a layer: the loads of that layer's rows, no other; its stream has waited for all pruning.

    A copy out need not wait for loads from the place that it overwrites. Their chunk was dropped: what attended to it
    came before the pruning, and a load that nothing attended to fills a slot whose next owner waits for it.

    `rows` are the slots' first pool rows. Chunks are numbers; `places` say where on the shelf each lies, `tokens` how
    many of a slot's, and of a place's, it takes: no more are copied. `restores`: whether the shelf is in fewer bits.
    """

    def __init__(self, pool: Pool, rows: list[int], shelf: Shelf, *, on_host: bool, restores: bool) -> None:
        self.shelf, self._on_host, self._restores = shelf, on_host, restores
        self._rows = rows
        self._engine = CopyEngine(pool.k.device, pool.k, pool.v, *shelf.device_tensors)
        event = self._engine.event
        self._released = event()  # passes over windows before this one
        self._pruned = event()  # what was pruned last
        self._unstaged = event()  # what was put on the shelf last
        self._loaded = [[event() for _ in pool.k] for _ in rows]  # into slots
        self._saved = [event() for _ in rows]  # out of slots
        self._written = [event() for _ in shelf.rows]  # into places
        self._in_use = True  # before the first window too: memory may come from what passes still read
        self.clear()

    def clear(self) -> None:
        """Forget what is cached, and the counts. Copies under way go on; what comes later waits for them."""
        self._cached: dict[int, int] = {}  # chunk -> slot, least recently used first
        self._free = list(range(len(self._rows) - 1, -1, -1))
        self._unused: set[int] = set()  # prefetched and not asked for yet
        self.count(dict.fromkeys(COUNTED, 0))
        self.release()

    def count(self, counts: Mapping[str, int]) -> None:
        """Go on counting from here, see `copied`; what was copied to and from a host, only where this one does that."""
        if not self._on_host:
            counts = {**counts, **dict.fromkeys(("hits", "misses", "copies_out", "bytes_in", "bytes_out"), 0)}
        self.hits, self.misses, self.copies_out = (counts[name] for name in COUNTED[:3])
        self.prefetched, self.prefetch_hits, self.prefetch_misses = (counts[name] for name in COUNTED[3:6])
        self.bytes_in, self.bytes_out, self.restored = (counts[name] for name in COUNTED[6:])

    def __contains__(self, chunk: int) -> bool:
        return chunk in self._cached

    # --- into the window ---

    @ranged("bank_copy_in")
    def request(self, chunks: list[int], places: Mapping[int, int], tokens: Mapping[int, int]) -> list[int]:
        """Make `chunks` the present window; returns their pool rows, which `wait_layer` or `wait` make good."""
        hits = self._touch(chunks)
        used = self._unused.intersection(hits)
        self._load([chunk for chunk in chunks if chunk not in self._cached], places, tokens, keep=chunks)
        if self._on_host:
            self.hits += len(hits)
            self.misses += len(chunks) - len(hits)
        self.prefetch_hits += len(used)
        self._unused -= used
        self._in_use = True
        self._window = [self._cached[chunk] for chunk in chunks]
        self._in_window = frozenset(chunks)
        self._waited: set[int] = set()  # layers
        self.settled = not chunks
        return [self._rows[slot] for slot in self._window]

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
        """A slot's first row, for the current stream to prune `chunk` into. Takes one of the window if need be."""
        slot = self._take(keep=())
        self._cached[chunk] = slot
        engine = self._engine
        engine.wait(self._loaded[slot][-1], COMPUTE)
        engine.wait(self._saved[slot], COMPUTE)
        return self._rows[slot]

    @ranged("bank_copy_out")
    def save(self, chunk: int, place: int, tokens: int) -> None:
        """Copy out a chunk that the current stream has pruned."""
        self._save(self._cached[chunk], place, tokens)
        if self._on_host:
            self.copies_out += 1
            self.bytes_out += self.shelf.bytes_of(tokens)

    def try_out(self, tokens: int) -> None:
        """Pack what the current stream has pruned into the first slot, and restore it, while nothing is banked."""
        if not self._restores:
            return
        self._save(0, 0, tokens)
        self._engine.wait(self._written[0], LOAD)
        for layers in self.shelf.steps:
            self.shelf.bring(self._engine, layers, [Move(self._rows[0], 0, tokens)])
        self._engine.record(self._loaded[0][-1], LOAD)

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
            self.misses + self.prefetched if self._on_host else 0, self.copies_out, self.hits, self.misses,
            self.bytes_in, self.bytes_out, self.prefetched, self.prefetch_hits, self.prefetch_misses, self.restored,
            self.shelf.rows.nbytes if self._on_host else 0, int(self.shelf.pinned),
        )  # fmt: skip
        return dict(zip(COUNTS, counts, strict=True))

    def copied(self) -> dict[str, int]:
        """The counts, of which a chunk that was prefetched and not asked for yet was prefetched in vain."""
        counts = {name: getattr(self, name) for name in COUNTED}
        return {**counts, "prefetch_misses": counts["prefetch_misses"] + len(self._unused)}

    def held(self, place: int, tokens: int) -> Rows:
        """All of a chunk on the shelf, for who has waited for it."""
        return self.shelf.held(place, tokens)

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
        engine, slots, moves = self._engine, [], []
        engine.wait(self._released, LOAD)
        try:
            for chunk in chunks:
                slot, place = self._take(keep), places[chunk]
                self._cached[chunk] = slot
                slots.append(slot)
                moves.append(Move(self._rows[slot], place, tokens[chunk]))
                engine.wait(self._saved[slot], LOAD)
                engine.wait(self._written[place], LOAD)
            for layers in self.shelf.steps:
                self.shelf.bring(engine, layers, moves)
                for slot, layer in itertools.product(slots, layers):
                    engine.record(self._loaded[slot][layer], LOAD)
        except BaseException:
            for chunk in chunks:  # none that is half there may count as cached
                self.drop(chunk)
            for slot in slots:
                engine.record(self._loaded[slot][-1], LOAD)
            raise
        if self._on_host:
            self.bytes_in += sum(self.shelf.bytes_of(move.tokens) for move in moves)
        self.restored += len(moves) if self._restores else 0

    def _save(self, slot: int, place: int, tokens: int) -> None:
        engine, move = self._engine, Move(self._rows[slot], place, tokens)
        if self.shelf.has_staging:
            engine.wait(self._unstaged, COMPUTE)
        self.shelf.pack(engine, move)
        engine.record(self._pruned, COMPUTE)
        engine.wait(self._pruned, SAVE)
        self.shelf.put(engine, move)
        if self.shelf.has_staging:
            engine.record(self._unstaged, SAVE)
        engine.record(self._saved[slot], COMPUTE if self._restores else SAVE)  # what is put was read from the slot
        engine.record(self._written[place], SAVE)

    def _refuse_capture(self, op: str) -> None:
        if self._engine.capturing():
            raise RuntimeError(
                f"{op}: the window's rows must be waited for (WorldMemory.wait) before a graph is captured, "
                f"got a call inside a capture with {len(self._window)} chunks on their way"
            )
