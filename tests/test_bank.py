"""The tiered bank: residency against a plain model, whole rollouts by bank, and the edges."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from late_streams import LateStreams
from tiny_memory import MODEL, jumps, latents, passes, tiny, walk

import worldkv_kernels.memory.slots as slots_module
import worldkv_kernels.memory.storage as storage_module
from worldkv_kernels import MemoryConfig, WorldMemory
from worldkv_kernels.memory.bank import Bank
from worldkv_kernels.memory.pool import Pool
from worldkv_kernels.memory.store import PackedStore, Store, WholeStore
from worldkv_kernels.memory.streams import COMPUTE

CPU = torch.device("cpu")


def fuzz(examples: int):
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


# --- residency ---


class Oldest:
    """Gives up the oldest chunk, or, every third time, the newest."""

    needs_intrinsics = False

    def describe(self, poses, intrinsics):
        return None

    def select(self, current, candidates, budget):
        return []

    def drop(self, candidates):
        return candidates[-1 if candidates[-1][0] % 3 == 0 else 0][0]


class PlainCache:
    """The stated policy, spelled out: a list of chunks, least recently used first, of at most `slots`."""

    def __init__(self, slots: int) -> None:
        self.slots, self.chunks, self.window = slots, [], []
        self.copies, self.hits = 0, 0
        self.unused, self.prefetch_hits, self.prefetch_misses = set(), 0, 0

    def touch(self, chunks):
        for chunk in [chunk for chunk in chunks if chunk in self.chunks]:
            self.chunks.remove(chunk)
            self.chunks.append(chunk)

    def add(self, chunk, keep) -> bool:
        if len(self.chunks) == self.slots:
            victims = [cached for cached in self.chunks if cached not in keep]
            if not victims:
                return False
            self.remove(victims[0])
        self.chunks.append(chunk)
        return True

    def remove(self, chunk):
        self.chunks.remove(chunk)
        self.prefetch_misses += chunk in self.unused
        self.unused.discard(chunk)

    def request(self, chunks):
        self.hits += sum(chunk in self.chunks for chunk in chunks)
        self.prefetch_hits += len(self.unused.intersection(chunks))
        self.unused.difference_update(chunks)
        self.bring(chunks, chunks)
        self.window = chunks

    def prefetch(self, chunks):
        missing = set(chunks) - set(self.chunks)
        self.bring(chunks, {*self.window, *chunks})
        self.unused |= missing.intersection(self.chunks)

    def bring(self, chunks, keep):
        self.touch(chunks)
        for chunk in chunks:
            if chunk not in self.chunks:
                self.copies += self.add(chunk, keep)


step = st.tuples(st.sampled_from("sssrrrppp."), st.lists(st.integers(0, 40), min_size=1, max_size=4))
steps = st.lists(step, min_size=30, max_size=90)


def store_of(slots: int, layers: int, bits: int = 16) -> Store:
    """Slots of three tokens."""
    sizes = dict(num_layers=layers, num_heads=1, head_dim=64, device=CPU, dtype=torch.float32)
    if bits < 16:
        return PackedStore(slots, tokens=3, bits=bits, **sizes)
    pool = Pool([(3, slots)], **sizes)
    return WholeStore(pool, pool.first_rows[0], tokens=3)


def of_chunk(store: Store, slot: int, chunk: int) -> list[tuple[torch.Tensor, int]]:
    """K and V of each layer in a slot, and the number that stands for the chunk's there, which fits a byte."""
    rows = [x for layer in range(store.place_shape[0]) for x in store.views(slot, layer, 3)]
    return [(x, (4 * chunk + i) % 251) for i, x in enumerate(rows)]


def fill(store: Store, slot: int, chunk: int) -> None:
    for x, number in of_chunk(store, slot, chunk):
        x.fill_(number)


def holds(store: Store, slot: int, chunk: int) -> bool:
    return all((x == number).all() for x, number in of_chunk(store, slot, chunk))


@fuzz(150)
@given(st.integers(1, 5), st.integers(1, 8), st.sampled_from([16, 4]), steps)
def test_random_residency(slots, places, bits, steps):
    """Thousands of steps: no chunk leaves the window, no slot too many, no banked chunk lost, and the policy kept."""
    store = store_of(slots, 2, bits)
    bank = Bank(store, places=places, on_host=True, policy=Oldest())
    cache, plain, banked, next_chunk, dropped = bank._cache, PlainCache(slots), [], 0, 0
    taken: dict[int, int] = {}  # slots of the window

    for what, numbers in steps:
        chosen = list(dict.fromkeys(banked[n % len(banked)] for n in numbers if banked))[:slots]
        if what == "s":
            bank.release()
            plain.window, taken = [], {}
            slot = bank.slot_to_fill(next_chunk, None)
            if len(banked) == places:
                given_up = next_chunk if next_chunk % 3 == 0 else banked[0]
                if given_up in banked:
                    banked.remove(given_up)
                    if given_up in plain.chunks:
                        plain.remove(given_up)
                dropped += 1
                assert bank.num_dropped == dropped and given_up not in bank
                assert (slot is None) == (given_up == next_chunk)
            if slot is not None:
                plain.add(next_chunk, ())
                banked.append(next_chunk)
                fill(store, slot, next_chunk)
                bank.stored(next_chunk)
            next_chunk += 1
        elif what == "r":
            bank.release()
            plain.request(chosen)
            taken = dict(zip(chosen, bank.request(chosen), strict=True))
        elif what == "p":
            plain.prefetch(chosen)
            assert bank.prefetch(chosen) == [chunk for chunk in chosen if chunk in plain.chunks]
        else:
            bank.release()
            plain.window, taken = [], {}
        assert list(cache._cached) == plain.chunks and len(plain.chunks) <= slots
        assert (bank.copies_in, cache.hits) == (plain.copies, plain.hits)
        assert (cache.prefetch_hits, cache.prefetch_misses) == (plain.prefetch_hits, plain.prefetch_misses)
        assert set(plain.window) <= set(cache._cached) and len(set(taken.values())) == len(taken)
        assert all(holds(store, slot, chunk) for chunk, slot in taken.items())
        assert list(bank._place) == banked and len(bank) == len(banked) <= places
    assert all(holds(store, *bank.fetch([chunk]), chunk) for chunk in banked)


def test_more_chunks_than_slots_are_refused_and_change_nothing():
    bank = Bank(store_of(1, 1), places=3, on_host=True, policy=Oldest())
    for chunk in range(2):
        bank.slot_to_fill(chunk, None)
        bank.stored(chunk)
    before = list(bank._cache._cached)
    with pytest.raises(ValueError, match="Bank: request must be for at most 1 chunks, got 2"):
        bank.request([0, 1])
    assert list(bank._cache._cached) == before == [1]


def test_a_request_that_breaks_off_leaves_nothing_half_cached(monkeypatch):
    store = store_of(2, 2)
    bank = Bank(store, places=4, on_host=True, policy=Oldest())
    for chunk in range(4):
        fill(store, bank.slot_to_fill(chunk, None), chunk)
        bank.stored(chunk)
    copy, calls = bank._cache._engine.copy, []

    def broken(pairs, stream):
        calls.append(stream)
        if len(calls) == 2:
            raise KeyboardInterrupt
        copy(pairs, stream)

    monkeypatch.setattr(bank._cache._engine, "copy", broken)
    with pytest.raises(KeyboardInterrupt):
        bank.request([0, 1])
    assert not bank._cache._cached and len(bank._cache._free) == 2
    assert all(holds(store, slot, chunk) for chunk, slot in enumerate(bank.fetch([0, 1])))


# --- rollouts ---


@pytest.fixture(scope="module")
def on_device() -> torch.Tensor:
    return latents(tiny())


@pytest.mark.parametrize("fields", [{}, dict(device_slots=3), dict(device_slots=7), dict(prefetch=False)], ids=str)
def test_a_hundred_chunks_do_not_depend_on_the_bank(on_device, fields):
    memory = tiny(bank="host", **fields)
    assert len(on_device) == 100 and torch.equal(latents(memory), on_device)
    stats = memory.stats()
    assert stats["host_copies_in"] == stats["host_misses"] + stats["prefetched"] > 0
    assert stats["host_misses"] + stats["host_copies_saved"] == stats["chunks_retrieved"]
    a_chunk = stats["host_bytes"] // 40
    assert stats["host_bytes_in"] == a_chunk * stats["host_copies_in"]
    assert stats["host_bytes_out"] == a_chunk * stats["host_copies_out"]
    # All but the sink and the recent ones, and those that the full bank gave up as they came.
    assert 0 < 97 - stats["host_copies_out"] < stats["chunks_dropped"]
    assert stats["pinned"] == 0
    assert (stats["prefetched"] > 0) == memory.config.prefetch or memory.config.device_slots == 3  # which has no spare
    assert stats["prefetch_hits"] + stats["prefetch_misses"] <= stats["prefetched"]


@pytest.mark.parametrize("seed", range(3))
def test_a_hundred_chunks_do_not_depend_on_when_copies_are_made(monkeypatch, on_device, seed):
    streams = LateStreams(seed, queues_compute=False)
    monkeypatch.setattr(slots_module, "CopyEngine", lambda device, *tensors: streams)
    memory = tiny(bank="host", device_slots=3 + seed)
    memory._bank._cache.arena.rows.fill_(math.nan)
    assert torch.equal(latents(memory), on_device)
    assert streams.copies > 100 * 2 * MODEL.num_layers


# --- the edges ---


def late_memory(monkeypatch) -> tuple[WorldMemory, LateStreams, list[np.ndarray]]:
    """A memory whose next window has chunks on their way, which come only when they are waited for."""
    streams = LateStreams(0, queues_compute=False)
    streams.laziness = 1.0
    monkeypatch.setattr(slots_module, "CopyEngine", lambda device, *tensors: streams)
    memory, poses = tiny(bank="host", device_slots=3, prefetch=False), jumps(5, 20)
    for chunk in range(10):
        walk(memory, chunk, poses[chunk])
    misses = memory.stats()["host_misses"]
    memory.begin_chunk(poses[1])
    assert memory.stats()["host_misses"] > misses
    return memory, streams, poses


def test_a_capture_that_would_wait_for_copies_is_refused(monkeypatch):
    memory, streams, _ = late_memory(monkeypatch)
    streams.in_capture = True
    with pytest.raises(RuntimeError, match=r"attend: the window's rows must be waited for .* got .* 3 chunks"):
        passes(memory, 0)
    with pytest.raises(RuntimeError, match=r"wait: the window's rows must be waited for"):
        memory.wait()
    streams.in_capture = False
    memory.wait()
    streams.in_capture = True
    passes(memory, 0)
    streams.in_capture = False
    memory.end_chunk()


def test_wait_brings_all_rows(monkeypatch):
    memory, streams, _ = late_memory(monkeypatch)
    rows = [
        row
        for role, _, segment in memory._plan.segments
        if role == "retrieved"
        for row in range(segment.first_row, segment.first_row + segment.num_rows)
    ]
    monkeypatch.setattr(streams, "_run_some", lambda: None)
    memory.wait()
    monkeypatch.setattr(streams, "wait", None)  # none is waited for any more
    for layer in range(MODEL.num_layers):
        assert all(torch.isfinite(pool[rows]).all() for pool in memory.pools(layer))
    passes(memory, 0)


def test_a_layer_waits_for_its_own_rows_alone(monkeypatch):
    memory, streams, _ = late_memory(monkeypatch)
    waited: list[object] = []
    monkeypatch.setattr(streams, "wait", lambda event, stream: waited.append((event, stream)))
    q, k, v = torch.zeros(3, memory.config.chunk_tokens, MODEL.dim)
    loaded, window = memory._bank._cache._loaded, memory._bank._cache._window
    for layer in range(MODEL.num_layers):
        waited.clear()
        memory.attend(layer, q, k, v)
        assert waited == [(loaded[slot][layer], COMPUTE) for slot in window]
        memory.attend(layer, q, k, v)
        assert len(waited) == len(window) == 3


@pytest.mark.parametrize(("op", "bits"), [("compress_chunk", 16), ("quantize_chunk", 4)])
def test_pruning_that_fails_leaves_the_chunk_begun(monkeypatch, op, bits):
    memory, calm = tiny(bank="host", device_slots=3, bank_bits=bits), tiny(bank_bits=bits)
    poses = jumps(6, 12)
    for chunk in range(8):
        for each in (memory, calm):
            each.begin_chunk(poses[chunk])
            passes(each, chunk)
        before, of_pruning = memory.stats(), getattr(storage_module, op)

        def failing(*args, of_pruning=of_pruning, **options):
            of_pruning(*args, **options)
            raise KeyboardInterrupt

        if chunk >= 3:
            monkeypatch.setattr(storage_module, op, failing)
            with pytest.raises(KeyboardInterrupt):
                memory.end_chunk()
            monkeypatch.setattr(storage_module, op, of_pruning)
            after = memory.stats()
            assert {name for name in before if before[name] != after[name]} <= {"prefetch_misses"}
            if chunk % 2:
                memory.abort_chunk()
                memory.begin_chunk(poses[chunk])
                passes(memory, chunk)
        for each in (memory, calm):
            each.end_chunk()
        assert memory.stats()["kept_bytes"] == calm.stats()["kept_bytes"]
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, memory.config.chunk_tokens, MODEL.dim, generator=generator)
    for pose in poses[:8]:
        plans = [each.begin_chunk(pose) for each in (memory, calm)]
        assert plans[0].retrieved == plans[1].retrieved
        for layer in range(MODEL.num_layers):
            assert torch.equal(memory.attend(layer, q, k, v), calm.attend(layer, q, k, v))
        memory.abort_chunk()
        calm.abort_chunk()


def test_a_forked_child_is_told(monkeypatch):
    memory = tiny(bank="host")
    memory.begin_chunk(np.tile(np.eye(4), (3, 1, 1)))
    memory._process = os.getpid()  # as on a GPU
    passes(memory, 0)
    monkeypatch.setattr(os, "getpid", lambda: memory._process + 1)
    x = torch.zeros(memory.config.chunk_tokens, MODEL.dim)
    for call, arguments in (
        ("attend", (0, x, x, x)), ("end_chunk", ()), ("abort_chunk", ()), ("wait", ()), ("reset", ()), ("prefetch", ()),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=rf"{call}: a memory on a GPU must be used in the process that made it"):
            getattr(memory, call)(*arguments)


def test_fewer_slots_than_a_window_takes_are_refused():
    with pytest.raises(ValueError, match="device_slots must be None or at least 3 with retrieved_chunks=3, got 2"):
        tiny(device_slots=2)
    assert MemoryConfig(num_layers=1, num_heads=1, grid=(1, 1), retrieved_chunks=0, device_slots=1).cache_slots == 1
