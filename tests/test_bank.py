"""The tiered bank: residency against a plain model, whole rollouts by bank, prefetch, and the edges."""

from __future__ import annotations

import math
import os
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from late_streams import LateStreams

import worldkv_kernels.memory.arena as arena_module
import worldkv_kernels.memory.slots as slots_module
import worldkv_kernels.memory.streams as streams_module
from worldkv_kernels import MemoryConfig, WorldMemory
from worldkv_kernels.actions import parse_actions
from worldkv_kernels.memory.arena import Arena, node_cpus
from worldkv_kernels.memory.bank import Bank
from worldkv_kernels.memory.pool import Pool
from worldkv_kernels.memory.retrieval import PoseRetrieval
from worldkv_kernels.memory.streams import COMPUTE, LOAD, SAVE, CopyEngine
from worldkv_kernels.memory.views import continued
from worldkv_kernels.models.rollout import rollout
from worldkv_kernels.models.tiny import TinyConfig, TinyWorldModel
from worldkv_kernels.trajectory import latent_poses, load

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

    def touch(self, chunks):
        for chunk in [chunk for chunk in chunks if chunk in self.chunks]:
            self.chunks.remove(chunk)
            self.chunks.append(chunk)

    def add(self, chunk, keep) -> bool:
        if len(self.chunks) == self.slots:
            victims = [cached for cached in self.chunks if cached not in keep]
            if not victims:
                return False
            self.chunks.remove(victims[0])
        self.chunks.append(chunk)
        return True

    def bring(self, chunks, keep):
        self.touch(chunks)
        for chunk in chunks:
            if chunk not in self.chunks:
                self.copies += self.add(chunk, keep)


steps = st.lists(st.tuples(st.sampled_from("srrrpp."), st.lists(st.integers(0, 40), max_size=4)), max_size=80)


@fuzz(150)
@given(st.integers(1, 5), st.integers(1, 8), steps)
def test_random_residency(slots, places, steps):
    """Thousands of steps: no chunk leaves the window, no slot too many, no banked chunk lost, and the policy kept."""
    pool = Pool([(3, slots)], num_layers=2, num_heads=1, head_dim=64, device=CPU, dtype=torch.float32)
    bank = Bank(pool, pool.first_rows[0], tokens=3, places=places, on_host=True, policy=Oldest())
    cache, plain, banked, next_chunk = bank._cache, PlainCache(slots), [], 0
    rows: dict[int, int] = {}  # of the window

    def check(chunk: int, row: int) -> None:
        assert row in pool.first_rows[0]
        for layer in range(2):
            assert (pool.k[layer, row : row + 3] == chunk + layer / 4).all()
            assert (pool.v[layer, row : row + 3] == -chunk - layer / 4).all()

    for what, numbers in steps:
        chosen = list(dict.fromkeys(banked[n % len(banked)] for n in numbers if banked))[:slots]
        if what == "s":
            bank.release()
            plain.window, rows = [], {}
            row = bank.row_to_fill(next_chunk, None)
            if len(banked) == places:
                given_up = next_chunk if next_chunk % 3 == 0 else banked[0]
                if given_up in banked:
                    banked.remove(given_up)
                    plain.chunks = [chunk for chunk in plain.chunks if chunk != given_up]
                assert bank.dropped[-1] == given_up and (row is None) == (given_up == next_chunk)
            if row is not None:
                plain.add(next_chunk, ())
                banked.append(next_chunk)
                for layer in range(2):
                    pool.k[layer, row : row + 3] = next_chunk + layer / 4
                    pool.v[layer, row : row + 3] = -next_chunk - layer / 4
                    bank.stored(next_chunk, layer)
            next_chunk += 1
        elif what == "r":
            bank.release()
            plain.hits += sum(chunk in plain.chunks for chunk in chosen)
            plain.bring(chosen, chosen)
            plain.window = chosen
            rows = dict(zip(chosen, bank.request(chosen), strict=True))
        elif what == "p":
            plain.bring(chosen, {*plain.window, *chosen})
            assert bank.prefetch(chosen) == [chunk for chunk in chosen if chunk in plain.chunks]
        else:
            bank.release()
            plain.window, rows = [], {}
        assert list(cache._cached) == plain.chunks and len(plain.chunks) <= slots
        assert (bank.copies_in, cache.hits) == (plain.copies, plain.hits)
        assert set(plain.window) <= set(cache._cached) and len(set(rows.values())) == len(rows)
        for chunk, row in rows.items():
            check(chunk, row)
        assert list(bank.descriptions) == banked and len(bank) == len(banked) <= places
    for chunk in banked:
        check(chunk, *bank.fetch([chunk]))


def test_more_chunks_than_slots_are_refused_and_change_nothing():
    pool = Pool([(3, 1)], num_layers=1, num_heads=1, head_dim=64, device=CPU, dtype=torch.float32)
    bank = Bank(pool, pool.first_rows[0], tokens=3, places=3, on_host=True, policy=Oldest())
    for chunk in range(2):
        bank.row_to_fill(chunk, None)
        bank.stored(chunk)
    before = list(bank._cache._cached)
    with pytest.raises(ValueError, match="Bank: request must be for at most 1 chunks, got 2"):
        bank.request([0, 1])
    assert list(bank._cache._cached) == before == [1]


def test_a_request_that_breaks_off_leaves_nothing_half_cached(monkeypatch):
    pool = Pool([(3, 2)], num_layers=2, num_heads=1, head_dim=64, device=CPU, dtype=torch.float32)
    bank = Bank(pool, pool.first_rows[0], tokens=3, places=4, on_host=True, policy=Oldest())
    for chunk in range(4):
        row = bank.row_to_fill(chunk, None)
        pool.k[:, row : row + 3] = pool.v[:, row : row + 3] = float(chunk)
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
    for chunk, row in zip((0, 1), bank.fetch([0, 1]), strict=True):
        assert (pool.v[:, row : row + 3] == chunk).all()


# --- rollouts ---

MODEL = TinyConfig(num_layers=2, num_heads=1, ffn_dim=64, grid=(2, 3), text_tokens=4)
AWAY_AND_BACK = latent_poses(load("right*300,left*300,forward*300,left*299"))  # 100 chunks


def latents(memory: WorldMemory, poses: np.ndarray = AWAY_AND_BACK[0]) -> torch.Tensor:
    made = list(rollout(TinyWorldModel(MODEL), memory, poses, AWAY_AND_BACK[1][: len(poses)], sigmas=(1.0,)))
    return torch.stack([chunk.latents for chunk in made])


def tiny(**fields) -> WorldMemory:
    return WorldMemory(MODEL.memory(**{"retrieved_chunks": 3, "bank_chunks": 40, **fields}), dtype=torch.float32)


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
    assert stats["host_bytes_out"] == a_chunk * stats["host_copies_out"] == a_chunk * 97  # but the sink and the recent
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


# --- prefetch ---


def walk(memory: WorldMemory, chunk: int, poses: np.ndarray, **options) -> tuple[int, ...]:
    """A chunk of random numbers; what was retrieved."""
    plan = memory.begin_chunk(poses, **options)
    passes(memory, chunk)
    memory.end_chunk()
    return plan.retrieved


def passes(memory: WorldMemory, chunk: int) -> None:
    generator = torch.Generator().manual_seed(chunk)
    for layer in range(MODEL.num_layers):
        memory.attend(layer, *torch.randn(3, memory.config.chunk_tokens, MODEL.dim, generator=generator))


def jumps(seed: int, chunks: int) -> list[np.ndarray]:
    """Poses of chunks all over the place, near to earlier ones or not."""
    poses = np.tile(np.eye(4), (chunks, 3, 1, 1))
    poses[:, :, :3, 3] = np.random.default_rng(seed).normal(size=(chunks, 1, 3))
    return list(poses)


@pytest.mark.parametrize("when", ["between", "during", "not"])
def test_a_caller_who_knows_the_next_pose(when):
    """Every chunk that is retrieved is then there: by a prefetch into all slots, or into spare ones."""
    slots = {"between": 3, "during": 7, "not": 3}[when]
    memory, poses = tiny(bank="host", prefetch=False, device_slots=slots), jumps(1, 40)
    for chunk in range(39):
        if when == "between":
            coming = memory.prefetch(poses[chunk])
        plan = memory.begin_chunk(poses[chunk])
        if when == "between":
            assert set(coming) == set(plan.retrieved)
        if when == "during":
            before = {c: s for c, s in memory._bank._cache._cached.items() if c in plan.retrieved}
            memory.prefetch(poses[chunk + 1])
            assert before.items() <= memory._bank._cache._cached.items()
        passes(memory, chunk)
        memory.end_chunk()
    if when == "between":
        memory.prefetch(poses[39])
    memory.begin_chunk(poses[39])
    stats = memory.stats()
    if when == "not":
        assert stats["host_misses"] > 30 and stats["prefetched"] == 0
    else:
        assert stats["host_misses"] == 0 and stats["prefetch_hits"] == stats["prefetched"] > 30


def test_prefetch_fills_the_spare_slots_and_no_more():
    memory, poses = tiny(bank="host", prefetch=False, device_slots=4), jumps(2, 30)
    for chunk in range(20):
        walk(memory, chunk, poses[chunk])
    plan = memory.begin_chunk(poses[20])
    wanted = next(p for p in poses if len(set(tiny_choice(memory, p)) - memory._bank._cache._cached.keys()) == 3)
    on_device = memory.prefetch(wanted)
    cached = set(memory._bank._cache._cached)
    assert set(plan.retrieved) < cached and len(cached) == 4
    assert len(on_device) == 1 and on_device[0] == tiny_choice(memory, wanted)[0]  # the best of three


def tiny_choice(memory: WorldMemory, poses: np.ndarray) -> list[int]:
    policy = PoseRetrieval()
    candidates = memory._candidates(20, policy.describe(jumps(2, 30)[20], None))
    chosen = policy.select(policy.describe(poses, None), candidates, 3)
    return [chunk for chunk in chosen if chunk in memory._bank]


def test_motion_that_goes_on_is_foreseen():
    """Back over a way that was gone before, each chunk one farther: the spare slots are filled in time."""
    turn, _ = latent_poses(load("right*240,left*240"))
    missed = {}
    for prefetch in (False, True):
        memory = tiny(bank="host", device_slots=5, prefetch=prefetch)
        for chunk in range(len(turn) // 3):
            walk(memory, chunk, turn[3 * chunk : 3 * chunk + 3])
        missed[prefetch] = memory.stats()
    assert missed[False]["host_misses"] > 10
    assert missed[True]["host_misses"] <= 3 and missed[True]["prefetch_hits"] > 10
    assert missed[True]["chunks_retrieved"] == missed[False]["chunks_retrieved"]


def test_a_policy_with_a_state_is_not_asked_ahead():
    class Counting(PoseRetrieval):
        stateless = False
        calls = 0

        def describe(self, poses, intrinsics):
            self.calls += 1
            return super().describe(poses, intrinsics)

    for stateless, calls in ((False, 8), (True, 8 + 7)):
        policy = Counting()
        policy.stateless = stateless
        memory = tiny(bank="host", retrieval=policy)
        for chunk, poses in enumerate(jumps(3, 8)):
            walk(memory, chunk, poses)
        assert policy.calls == calls


def test_prefetch_along_actions():
    """Between chunks and during one, what the actions lead to is what is retrieved then, and nothing is moved by it."""
    actions = parse_actions("L*60,J*60,W*24,S*24,L*48")
    memories = [tiny(bank="host", retrieval="action", device_slots=7, prefetch=prefetch) for prefetch in (True, False)]
    memory, calm = memories
    for chunk in range(16):
        rows = [actions.of_frames(3 * (chunk + ahead), 3) for ahead in range(2)]
        first = memory.prefetch(actions=rows[0])
        state = memory.integrator.state
        plans = [each.begin_chunk(actions=rows[0]) for each in memories]
        assert plans[0].retrieved == plans[1].retrieved and set(first) == set(plans[0].retrieved)
        coming = set(memory.prefetch(actions=rows[1]))
        assert memory.integrator.state == state
        for each in memories:
            passes(each, chunk)
            each.end_chunk()
        leaving = chunk - 2
        assert memory.integrator.state == calm.integrator.state
        assert set(memory.prefetch(actions=rows[1])) <= coming | {leaving}
    assert memory.stats()["host_misses"] == 0
    for wrong, error, message in (
        (dict(poses=np.eye(4)[None]), ValueError, "prefetch: poses must be None for retrieval by ActionRetrieval"),
        (dict(), ValueError, "prefetch: actions must be of 12 rows in mode 'worldkv', got None"),
    ):
        with pytest.raises(error, match=message):
            memory.prefetch(**wrong)


def test_prefetch_without_a_host_bank_does_nothing():
    sliding = tiny(mode="sliding")
    assert sliding.prefetch() == ()
    memory, poses = tiny(), jumps(4, 12)
    with pytest.raises(ValueError, match=r"prefetch: poses must be \[3, 4, 4\], got"):
        memory.prefetch(poses[0][:1])
    for chunk in range(10):
        walk(memory, chunk, poses[chunk])
    before = memory.stats()
    assert set(memory.prefetch(poses[11])) == set(memory.begin_chunk(poses[11]).retrieved)
    assert memory.stats() == before and before["host_copies_in"] == before["pinned"] == 0


def helix(times: np.ndarray) -> np.ndarray:
    """Poses of a constant screw motion, seen from somewhere."""
    poses = np.tile(np.eye(4), (len(times), 1, 1))
    cos, sin = np.cos(0.3 * times), np.sin(0.3 * times)
    poses[:, 0, 0], poses[:, 0, 2], poses[:, 2, 0], poses[:, 2, 2] = cos, sin, -sin, cos
    poses[:, :3, 3] = np.stack([2 * sin, 0.1 * times, 2 * cos], axis=1)
    world = np.eye(4)
    world[:3, :3] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    world[:3, 3] = 5, -2, 1
    return world @ poses


def test_a_screw_motion_goes_on_exactly():
    times = np.arange(9.0).reshape(3, 3)
    poses = [helix(each) for each in times]
    assert np.abs(continued(poses[0], poses[1]) - poses[2]).max() < 1e-12
    assert np.abs(continued(poses[1], poses[1]) - poses[1]).max() < 1e-12


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
    rows = [row for role, _, segment in memory._plan.segments if role == "retrieved"
            for row in range(segment.first_row, segment.first_row + segment.num_rows)]
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


def test_pruning_that_fails_leaves_the_chunk_begun(monkeypatch):
    import worldkv_kernels.memory.world_memory as module

    memory, calm, poses = tiny(bank="host", device_slots=3), tiny(), jumps(6, 12)
    for chunk in range(8):
        for each in (memory, calm):
            each.begin_chunk(poses[chunk])
            passes(each, chunk)
        before, compress, done = memory.stats(), module.compress_chunk, []

        def failing(*args, compress=compress, done=done, **options):
            done.append(compress(*args, **options))
            if len(done) == 2:
                raise KeyboardInterrupt

        if chunk >= 3:
            monkeypatch.setattr(module, "compress_chunk", failing)
            with pytest.raises(KeyboardInterrupt):
                memory.end_chunk()
            monkeypatch.setattr(module, "compress_chunk", compress)
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


# --- host memory ---

SHAPE = (2, 3, 2, 5, 1, 64)


def arena_on_gpu(monkeypatch, refusal: str | None) -> tuple[Arena, list]:
    calls: list[tuple] = []
    monkeypatch.setattr(arena_module, "page_lock", lambda *given: (calls.append(("lock", *given)), refusal)[1])
    monkeypatch.setattr(arena_module, "_page_unlock", lambda *given: calls.append(("unlock", *given[1:])))
    return Arena(SHAPE, torch.bfloat16, torch.device("cuda", 0)), calls


def test_the_arena_is_locked_by_whole_pages_and_unlocked_once(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arena, calls = arena_on_gpu(monkeypatch, None)
    ((_, address, span, device),) = calls
    assert arena.pinned and arena.rows.shape == SHAPE and arena.rows.dtype == torch.bfloat16
    assert arena.bytes == math.prod(SHAPE) * 2
    page = os.sysconf("SC_PAGE_SIZE")
    assert address == arena.rows.data_ptr() and address % page == span % page == 0
    assert arena.bytes <= span < arena.bytes + page
    storage = arena.rows.untyped_storage()
    assert storage.data_ptr() <= address and address + span <= storage.data_ptr() + storage.nbytes()
    del arena
    assert calls[1:] == [("unlock", address, device, os.getpid())]


def test_pinned_memory_refused(monkeypatch):
    with pytest.warns(RuntimeWarning, match=r"must be page-locked .* got pageable memory \(no more\)") as warned:
        arena, calls = arena_on_gpu(monkeypatch, "no more")
    assert len(warned) == 1 and not arena.pinned
    arena.rows.fill_(1)
    del arena
    assert len(calls) == 1  # nothing to unlock


def test_page_lock_says_why_not_and_never_raises():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    memory = torch.empty(4096, dtype=torch.uint8)
    assert isinstance(arena_module.page_lock(memory.data_ptr(), 4096, torch.device("cuda", 0)), str)


def test_cpus_of_a_numa_node(tmp_path):
    mine = sorted(os.sched_getaffinity(0))
    gpu, node = tmp_path / "bus/pci/devices/0000:3b:00.0", tmp_path / "devices/system/node/node1"
    assert node_cpus("0000:3b:00.0", tmp_path) == set()
    gpu.mkdir(parents=True)
    (gpu / "numa_node").write_text("-1\n")
    assert node_cpus("0000:3b:00.0", tmp_path) == set()
    (gpu / "numa_node").write_text("1\n")
    node.mkdir(parents=True)
    (node / "cpulist").write_text(f"{mine[0]},5000-5003\n")
    assert node_cpus("0000:3b:00.0", tmp_path) == {mine[0]}
    (node / "cpulist").write_text("0-4095\n")
    assert node_cpus("0000:3b:00.0", tmp_path) == set(mine)
    (node / "cpulist").write_text("\n")  # a node of memory alone
    assert node_cpus("0000:3b:00.0", tmp_path) == set()


# --- the streams ---


class Recorder:
    """Stands for torch.cuda's streams and events; `log` is what was done to which stream."""

    def __init__(self, monkeypatch) -> None:
        self.log: list[tuple] = []
        self.current = self.compute = object()
        recorder = self

        class Stream:
            def __init__(self, device):
                self.device = device

        class Event:
            def record(self, stream):
                recorder.log.append(("record", self, stream))

            def wait(self, stream):
                recorder.log.append(("wait", self, stream))

        class Current:
            def __init__(self, stream):
                self.stream = stream

            def __enter__(self):
                recorder.current = self.stream

            def __exit__(self, *error):
                recorder.current = recorder.compute

        monkeypatch.setattr(streams_module.torch.cuda, "Stream", Stream)
        monkeypatch.setattr(streams_module.torch.cuda, "Event", Event)
        monkeypatch.setattr(streams_module.torch.cuda, "stream", Current)
        monkeypatch.setattr(streams_module.torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(streams_module.torch.cuda, "is_current_stream_capturing", lambda: True)


class Rows:
    """A tensor of which the engine may ask two things."""

    def __init__(self, log: Recorder) -> None:
        self.recorder, self.used = log, []

    def record_stream(self, stream):
        self.used.append(stream)

    def copy_(self, source, non_blocking):
        self.recorder.log.append(("copy", self, source, non_blocking, self.recorder.current))


def test_the_engine_on_a_gpu(monkeypatch):
    recorder = Recorder(monkeypatch)
    rows = Rows(recorder)
    engine = CopyEngine(torch.device("cuda", 0), rows)
    load, save = rows.used  # kept from torch's allocator for both
    event = engine.event()
    engine.record(event, COMPUTE)
    engine.wait(event, LOAD)
    engine.copy([(rows, "host"), (rows, "more")], LOAD)
    engine.copy([(rows, "back")], SAVE)
    engine.record(event, SAVE)
    engine.wait(event, COMPUTE)
    assert recorder.log == [
        ("record", event, recorder.compute), ("wait", event, load), ("copy", rows, "host", True, load),
        ("copy", rows, "more", True, load), ("copy", rows, "back", True, save), ("record", event, save),
        ("wait", event, recorder.compute),
    ]  # fmt: skip
    assert load is not save and engine.capturing()


def test_the_engine_on_a_cpu():
    engine = CopyEngine(CPU)
    target = torch.zeros(3)
    event = engine.event()
    engine.record(event, COMPUTE)
    engine.wait(event, LOAD)
    engine.copy([(target, torch.ones(3))], LOAD)
    assert event is None and target.sum() == 3 and not engine.capturing()


def test_the_margin_of_host_memory(monkeypatch):
    """An arena leaves a sixteenth of what is free, and says what it would take."""
    import worldkv_kernels.memory.room as room

    config = MODEL.memory(bank="host", bank_chunks=10)
    monkeypatch.setattr(room, "free_bytes", lambda device: 16 * 2**30)
    room.check_room(config, torch.device("cuda"), 2**30, 15 * 2**30)
    with pytest.raises(ValueError, match=r"must fit the 15.0 GiB that are free on cpu, got 15.5 GiB; bank_chunks, 10,"):
        room.check_room(config, torch.device("cuda"), 2**30, int(15.5 * 2**30))
    room.check_room(config, CPU, 16 * 2**30, 0)


def test_fewer_slots_than_a_window_takes_are_refused():
    with pytest.raises(ValueError, match="device_slots must be None or at least 3 with retrieved_chunks=3, got 2"):
        tiny(device_slots=2)
    assert MemoryConfig(num_layers=1, num_heads=1, grid=(1, 1), retrieved_chunks=0, device_slots=1).host_bank_slots == 1
