"""The order of a host bank's copies: whole rollouts over streams that run late, and every wait left out once.

The ops are stand-ins that write and check rows of known numbers on a queued compute stream, or, to pack and restore
them, the ops themselves queued there: a row that is read before it is there, or overwritten before it is read, is seen
wherever the streams' events allow it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress

import numpy as np
import pytest
import torch
from late_streams import Broken, LateStreams

import worldkv_kernels.memory.attention as attention_module
import worldkv_kernels.memory.sizes as sizes_module
import worldkv_kernels.memory.slots as slots_module
import worldkv_kernels.memory.storage as storage_module
from worldkv_kernels import MemoryConfig, Rope3D, WorldMemory, dequantize_chunk, quantize_chunk
from worldkv_kernels.memory.bank import Bank
from worldkv_kernels.memory.pool import Pool
from worldkv_kernels.memory.store import PackedStore, WholeStore

LAYERS, CHUNK = 3, 2  # a chunk of two frames of one token


class Scattered:
    """A policy that selects chunks at random, as the pose says, and drops them at random."""

    needs_intrinsics = False
    stateless = True

    def describe(self, poses, intrinsics):
        return round(float(poses[0, 0, 3]))

    def select(self, current, candidates, budget):
        order = sorted(candidates, key=lambda candidate: (candidate[0] * 7919 + current * 104729) % 1009)
        return [chunk for chunk, _ in order[: min(budget, current % (budget + 2))]]

    def drop(self, candidates):
        return candidates[candidates[-1][0] * 31 % len(candidates)][0]


def pose_of(place: int) -> np.ndarray:
    poses = np.tile(np.eye(4), (CHUNK, 1, 1))
    poses[:, 0, 3] = place
    return poses


class Play:
    """A rollout of stand-in ops over late streams; `wrong` lists what was read and was not there."""

    def __init__(self, monkeypatch, seed: int, skips: tuple = (), breaks: float = 0.1, **fields) -> None:
        self.streams = LateStreams(seed, queues_compute=True)
        self.random = self.streams.random
        monkeypatch.setattr(slots_module, "CopyEngine", lambda device, *tensors: self.streams)
        monkeypatch.setattr(sizes_module, "_LAYERS_AT_ONCE", 2)
        for op in ("norm_rope_append", "segment_attention"):
            monkeypatch.setattr(attention_module, op, getattr(self, op))
        for op in ("compress_chunk", "quantize_chunk", "dequantize_chunk"):
            monkeypatch.setattr(storage_module, op, getattr(self, op))
        slots, places = self.random.choice([2, 3, 4, 6]), self.random.choice([2, 3, 5, 12])
        config = dict(
            num_layers=LAYERS, num_heads=1, head_dim=64, grid=(1, 1), chunk_frames=CHUNK, sink_frames=0,
            recent_frames=self.random.choice([0, CHUNK]), retrieved_chunks=2, keep_ratio=1.0, bank="host",
            bank_chunks=places, device_slots=slots, retrieval=Scattered(), rope=Rope3D(64),
            prefetch=self.random.random() < 0.5,
        )  # fmt: skip
        self.memory = WorldMemory(MemoryConfig(**{**config, **fields}), dtype=torch.float32)
        self.cache = self.memory._bank._cache
        if self.cache is not None:
            self.streams.name_events(self.cache)
        self.streams.skips = set(skips)
        self.streams.broken_loads = breaks / 10
        self.ops_of_pruning = 1 if self.memory.config.bank_bits == 16 else 4  # packed, two layers and one
        self.wrong: list[tuple] = []
        self.marks: dict[int, int] = {}  # chunk -> what its last pass wrote
        self.next_mark = 0
        self.break_share = breaks
        self.breaks: int | None = None  # after how many ops pruning breaks off

    def number(self, mark: int, layer: int, kind: int) -> int:
        return (mark * LAYERS + layer) * 2 + kind + 1

    # --- the ops ---

    def norm_rope_append(self, q, k, v, k_pool, v_pool, first_row, **options):
        rows = slice(int(first_row), int(first_row) + CHUNK)
        numbers = float(k[0, 0]), float(v[0, 0])

        def write():
            k_pool[rows], v_pool[rows] = numbers

        self.streams.call(write)
        return q

    def segment_attention(self, q, k_pool, v_pool, window, **options):
        layer, expected, segments = self.layer, [], self.plan.segments
        _, tail_rows, ranges, *_ = window.tables
        of_segments = ranges[1 : 1 + len(segments)].tolist()
        for (role, chunk, segment), (*no_tiles, first, end) in zip(segments, of_segments, strict=True):
            assert no_tiles == [0, 0] and end - first == segment.num_rows
            mark = self.next_mark if role == "current" else self.marks[chunk]
            expected.append((role, chunk, tail_rows[first:end, 0].clone(), mark))

        def check():
            for role, chunk, rows, mark in expected:
                for kind, pool in enumerate((k_pool, v_pool)):
                    if not (pool[rows] == self.number(mark, layer, kind)).all():
                        self.wrong.append((role, chunk, layer, kind))

        self.streams.call(check)
        return q

    def dequantize_chunk(self, packed, *, chosen, **options):
        chosen = chosen.clone()  # which on a GPU the compute stream rewrites
        assert [tokens for _, tokens in chosen.tolist() if tokens] == [CHUNK] * len(self.plan.retrieved)
        self.streams.call(lambda: dequantize_chunk(packed, chosen=chosen, **options))

    def compress_chunk(self, k, v, *, out_k, out_v, **options):
        def prune(layers: int) -> None:
            out_k[:layers].copy_(k[:layers])
            out_v[:layers].copy_(v[:layers])

        self.to_bank(prune, len(k))

    def quantize_chunk(self, k, v, *, out, **options):
        def pack(layers: int) -> None:
            if layers:
                quantize_chunk(k[:layers], v[:layers], out=out[:layers], **options)

        self.to_bank(pack, len(k))

    def to_bank(self, work: Callable[[int], None], layers: int) -> None:
        """An op of pruning over so many layers, or over some of them where it breaks off."""
        done = self.random.randrange(layers + 1) if self.breaks == 0 else layers
        self.streams.call(lambda: work(done))
        if self.breaks == 0:
            raise Broken
        if self.breaks is not None:
            self.breaks -= 1

    # --- a rollout ---

    def run_pass(self, layers: int = LAYERS) -> None:
        self.next_mark += 1
        with self.streams.second_stream() if self.random.random() < 0.3 else nullcontext():
            for self.layer in range(layers):
                numbers = (float(self.number(self.next_mark, self.layer, kind)) for kind in (0, 1))
                k, v = (torch.full((CHUNK, 64), number) for number in numbers)
                self.memory.attend(self.layer, k, k, v)

    def maybe_prefetch(self, poses: np.ndarray) -> None:
        if self.random.random() < 0.3:
            poses = poses if self.random.random() < 0.5 else pose_of(self.random.randrange(50))
            with suppress(Broken):
                self.memory.prefetch(poses)

    def maybe_change(self) -> None:
        """What a caller may do between chunks."""
        memory, banked = self.memory, list(self.memory._bank._place)
        if banked and self.random.random() < 0.2:
            memory.forget(self.random.choice(banked))
        elif banked and self.random.random() < 0.1 and not memory.pinned:
            memory.pin(self.random.choice(banked))
        elif memory.pinned and self.random.random() < 0.5:
            memory.unpin(memory.pinned[0])
        if self.random.random() < 0.1:
            memory.change(
                retrieved_chunks=self.random.randint(0, 2),
                recent_frames=self.random.randint(0, memory.configured.recent_frames),
            )

    def begin(self, poses: np.ndarray) -> None:
        while True:
            with suppress(Broken):
                self.plan = self.memory.begin_chunk(poses)
                return

    def chunk(self, chunk: int) -> None:
        poses, following = pose_of(self.random.randrange(50)), pose_of(self.random.randrange(50))
        self.maybe_change()
        while self.random.random() < 0.3:
            self.begin(pose_of(self.random.randrange(50)))
            self.run_pass(self.random.randrange(LAYERS + 1))
            self.maybe_prefetch(following)
            self.memory.abort_chunk()
        self.maybe_prefetch(poses)
        self.begin(poses)
        self.check_residency()
        for _ in range(self.random.randint(1, 2)):
            if self.random.random() < 0.1:
                self.memory.wait()
            self.run_pass()
            self.maybe_prefetch(following)
            self.check_residency()
        if self.random.random() < self.break_share:
            self.breaks = self.random.randrange(self.ops_of_pruning)
        self.end()
        self.breaks = None
        self.marks[chunk] = self.next_mark

    def end(self) -> None:
        try:
            self.memory.end_chunk()
        except Broken:
            self.breaks = None
            if self.random.random() < 0.5:
                self.memory.end_chunk()
            else:
                self.memory.abort_chunk()
                self.begin(pose_of(self.random.randrange(50)))
                self.run_pass()
                self.memory.end_chunk()

    def check_residency(self) -> None:
        bank = self.memory._bank
        places = list(bank._place.values())
        assert sorted(places + bank._free) == list(range(bank.capacity))
        assert list(bank._kept._descriptions) == list(bank._place)
        if self.cache is not None:
            taken = list(self.cache._cached.values())
            assert set(self.plan.retrieved) <= set(self.cache._cached) <= set(bank._place)
            assert sorted(taken + self.cache._free) == list(range(self.memory.config.cache_slots))

    def banked(self, chunk: int, layer: int) -> list[torch.Tensor]:
        """K and V of a layer of what is in the bank."""
        k_and_v, bits = self.memory._bank.held(chunk).pieces[2 * layer : 2 * layer + 2], self.memory.config.bank_bits
        if bits == 16:
            return k_and_v
        sizes = dict(bits=bits, tokens=CHUNK, heads=1, head_dim=64, dtype=torch.float32)
        return list(dequantize_chunk(torch.stack(k_and_v), **sizes))

    def run(self, num_chunks: int) -> list[tuple]:
        """What was wrong, after so many chunks and a look at all that is banked."""
        first = 0
        for chunk in range(num_chunks):
            if self.random.random() < 0.03:
                first = chunk
                self.memory.reset()
            self.chunk(chunk - first)
        self.streams.drain()
        for chunk in self.memory._bank._place:
            for layer in range(LAYERS):
                for kind, rows in enumerate(self.banked(chunk, layer)):
                    if not (rows == self.number(self.marks[chunk], layer, kind)).all():
                        self.wrong.append(("banked", chunk, layer, kind))
        return self.wrong


@pytest.mark.parametrize("seed", range(24))
def test_no_row_is_read_early_or_overwritten_early(monkeypatch, seed):
    play = Play(monkeypatch, seed, breaks=0.7 if seed % 2 else 0.1)
    assert not play.run(40)
    assert play.streams.copies > 40 * LAYERS


@pytest.mark.parametrize("bank", ["host", "device"])
@pytest.mark.parametrize("seed", range(12))
def test_nor_is_any_in_4_bits(monkeypatch, seed, bank):
    """Which give a number back exactly that all tokens of a channel have."""
    play = Play(monkeypatch, seed, breaks=0.7 if seed % 2 else 0.1, bank=bank, bank_bits=4)
    assert not play.run(40)
    assert bool(play.streams.copies) == (bank == "host")


WAITS = [
    ("_load", "_released"),
    ("_load", "_saved"),
    ("wait_layer", "_loaded"),
    ("wait", "_loaded"),
    ("slot_to_fill", "_loaded"),
    ("slot_to_fill", "_saved"),
    ("save", "_pruned"),
]


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("wait", WAITS, ids=lambda wait: "-".join(wait))
def test_each_wait_is_needed(monkeypatch, wait, bits):
    """Left out, it is seen: so the tests above would see it missing."""
    for seed in range(200):
        play = Play(monkeypatch, seed, skips=(wait,), bank_bits=bits)
        wrong = play.run(40)
        if wrong:
            assert play.streams.skipped
            return
    raise AssertionError(f"no rollout needed {wait}")


class Small:
    """A host bank of two layers over streams that do nothing before they are drained, or waited for."""

    def __init__(self, monkeypatch, seed: int, slots: int, skips: tuple = (), bits: int = 16) -> None:
        self.streams = LateStreams(seed, queues_compute=True)
        monkeypatch.setattr(slots_module, "CopyEngine", lambda device, *tensors: self.streams)
        sizes = dict(num_layers=2, num_heads=1, head_dim=64, device=torch.device("cpu"), dtype=torch.float32)
        if bits == 16:
            pool = Pool([(1, slots)], **sizes)
            self.store = WholeStore(pool, pool.first_rows[0], tokens=1)
        else:
            self.store = PackedStore(slots, tokens=1, bits=bits, **sizes)
        self.bank = Bank(self.store, places=4, on_host=True, policy=Scattered())
        self.streams.name_events(self.bank._cache)
        self.streams.skips = set(skips)
        self.streams.laziness = 1.0

    def rows(self, slot: int) -> list[torch.Tensor]:
        """K and V of each layer in a slot, of numbers or of bytes."""
        return [x for layer in range(2) for x in self.store.views(slot, layer, 1)]

    def prune(self, chunk: int, slot: int) -> None:
        self.streams.call(lambda: [x.fill_(chunk) for x in self.rows(slot)])

    def store_chunk(self, chunk: int) -> None:
        self.prune(chunk, self.bank.slot_to_fill(chunk, None))
        self.bank.stored(chunk)

    def read(self, chunk: int, slot: int, right: list[bool]) -> None:
        """A pass, which notes whether the slot has the chunk."""
        self.streams.call(lambda: right.append(all((x == chunk).all() for x in self.rows(slot))))

    def seen(self, chunk: int) -> bool:
        """Whether a chunk that is asked for now is what a pass will see."""
        (slot,), right = self.bank.request([chunk]), []
        self.bank.wait()
        self.read(chunk, slot, right)
        self.bank.release()
        self.streams.drain()
        return right == [True]


def evicted_before_it_is_out(small: Small) -> bool:
    """Between two windows a chunk is pruned over one whose copy out is late, which then is asked for at once."""
    small.store_chunk(0)
    small.store_chunk(1)
    small.bank.request([0])
    small.bank.release()
    small.store_chunk(2)  # over 1, the least recently used
    return small.seen(1)  # over 0


def pruning_broken_off(small: Small) -> bool:
    """A slot is pruned into, in vain, and then loaded into."""
    small.store_chunk(0)
    small.store_chunk(1)
    small.streams.drain()
    small.prune(2, small.bank.slot_to_fill(2, None))  # over 0
    small.bank.break_off(2)
    return small.seen(0)


def loading_broken_off(small: Small) -> bool:
    """A slot is loaded into, in vain, and then pruned into."""
    small.store_chunk(0)
    small.store_chunk(1)
    small.store_chunk(2)
    small.streams.drain()
    copy, calls = small.streams.copy, []

    def breaking(pairs, stream):
        calls.append(stream)
        if len(calls) == 2:
            raise Broken
        copy(pairs, stream)

    small.streams.copy = breaking
    with pytest.raises(Broken):
        small.bank.request([0])  # over 1
    small.streams.copy = copy
    small.store_chunk(3)
    return small.seen(3)


CORNERS = [
    (evicted_before_it_is_out, ("_load", "_written")),
    (pruning_broken_off, ("break_off", "_pruned")),
    (loading_broken_off, ("slot_to_fill", "_loaded")),
]


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize(("corner", "wait"), CORNERS)
def test_corners(monkeypatch, corner, wait, bits):
    """Right in any order that the events allow, and seen where the wait is left out."""
    assert all(corner(Small(monkeypatch, seed, 2, bits=bits)) for seed in range(20))
    assert not all(corner(Small(monkeypatch, seed, 2, skips=(wait,), bits=bits)) for seed in range(20))


@pytest.mark.parametrize("bits", [16, 4])
def test_fetched_rows_may_be_read_at_once(monkeypatch, bits):
    """With one slot, and passes that come late: each fetch waits for those before it, and they for it."""
    for seed in range(20):
        small, right = Small(monkeypatch, seed, 1, bits=bits), []
        small.store_chunk(0)
        small.store_chunk(1)
        for chunk in (0, 1, 0, 1):
            (slot,) = small.bank.fetch([chunk])
            small.read(chunk, slot, right)
        small.streams.drain()
        assert all(right) and len(right) == 4
