"""What a caller does between chunks: leave chunks out of the bank, pin and forget them, change what a window takes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_rollouts import HEAD_DIM, MAX_CHUNKS, Rollout, configs, error, fuzz, make, same, seeds, tiny
from slow_memory import SlowMemory
from test_world_memory import TOLERANCE, copy_by

from worldkv_kernels import FovRetrieval, PoseRetrieval, WorldMemory

KINDS = ("pin", "unpin", "forget", "change", "change", "")


class ManyRatios(Rollout):
    """Keys that decide what pruning makes of them at each keep_ratio."""

    def __init__(self, config, ratios, *arguments) -> None:
        self.ratios = ratios
        super().__init__(config, *arguments)

    def _margin(self, chunk, layer, k):
        own, margins = self.config, []
        for ratio in self.ratios:
            self.config = dataclasses.replace(own, keep_ratio=ratio)
            margins.append(super()._margin(chunk, layer, k))
        self.config = own
        return min(margins)


def check_chunk(memory: WorldMemory, slow: SlowMemory, rollout: Rollout, chunk: int, bank: bool) -> None:
    """The window and what is attended in it, then the chunk's end."""
    plan = memory.begin_chunk(rollout.poses[chunk])
    slow.begin(rollout.poses[chunk])
    assert list(plan.retrieved) == slow.retrieved
    assert [(role, number) for role, number, _ in plan.segments] == [x[:2] for x in slow.window]
    rows = [len(slow.tokens(role, number, frames)) for role, number, _, frames in slow.window]
    assert [segment.num_rows for _, _, segment in plan.segments] == rows
    shifts = [first - number * memory.config.chunk_frames for _, number, first, _ in slow.window]
    assert [segment.time_shift for _, _, segment in plan.segments] == shifts
    for layer, x in enumerate(rollout.passes[chunk][-1]):
        assert error(memory.attend(layer, *x), slow.attend(layer, *x)) <= TOLERANCE
    memory.end_chunk(bank=bank)
    slow.end(bank)


def check_places(memory: WorldMemory, slow: SlowMemory, chunks: int) -> None:
    config, stats = memory.config, memory.stats()
    assert [memory.location(past) for past in range(chunks)] == [slow.where[past] for past in range(chunks)]
    assert stats["kept_bytes"] == slow.kept_rows() * 2 * 4 * config.num_layers * config.num_kv_heads * config.head_dim
    assert stats["chunks_banked"] == len(slow.banked) <= max(stats["bank_capacity"], 0)
    assert memory.pinned == tuple(sorted(slow.pinned))
    if config.mode == "worldkv":
        assert stats["chunks_dropped"] == slow.num_dropped
    else:
        assert stats["chunks_dropped"] == list(slow.where.values()).count("dropped")


def do(kind: str, memory: WorldMemory, slow: SlowMemory, ratios: list[float], data) -> None:
    """One thing that a caller may do between chunks, drawn."""
    configured = memory.configured
    here = [chunk for chunk, where in slow.where.items() if where != "dropped"]
    if kind == "change":
        fields = {
            "retrieved_chunks": data.draw(st.integers(0, configured.retrieved_chunks)),
            "keep_ratio": data.draw(st.sampled_from(ratios)),
            "recent_frames": data.draw(st.integers(0, configured.recent_frames)),
        }
        fields = {name: value for name, value in fields.items() if data.draw(st.booleans())}
        memory.change(**fields)
        slow.change(**fields)
        assert memory.config == slow.config
    elif configured.mode != "worldkv" or not here:
        return
    elif kind == "pin":
        chunk = data.draw(st.sampled_from(here))
        memory.pin(chunk)
        slow.pinned.add(chunk)
        slow.unbanked.discard(chunk)
    elif kind == "unpin" and slow.pinned:
        chunk = data.draw(st.sampled_from(sorted(slow.pinned)))
        memory.unpin(chunk)
        slow.pinned.remove(chunk)
    elif kind == "forget":
        free = [chunk for chunk in here if slow.where[chunk] != "sink"]
        if free:
            chunk = data.draw(st.sampled_from(free))
            memory.forget(chunk)
            slow.forget(chunk)


def check_against_slow(config, seed, num_chunks, data):
    ratios = [config.keep_ratio, 0.6 * config.keep_ratio, 0.3 * config.keep_ratio]
    memory, slow, rollout = make(config), SlowMemory(config), ManyRatios(config, ratios, seed, num_chunks)
    for chunk in range(num_chunks):
        check_chunk(memory, slow, rollout, chunk, bank=data.draw(st.integers(0, 4)) > 0)
        check_places(memory, slow, chunk + 1)
        for kind in data.draw(st.lists(st.sampled_from(KINDS), max_size=3)):
            do(kind, memory, slow, ratios, data)
            check_places(memory, slow, chunk + 1)


@pytest.mark.parametrize("examples", [75, pytest.param(400, marks=pytest.mark.slow)])
def test_matches_the_slow_memory(examples):
    fuzz(examples)(given(configs(), seeds, st.integers(4, MAX_CHUNKS), st.data())(check_against_slow))()


@fuzz(40)
@given(configs(mode="worldkv", any_bits=True), seeds, st.data())
def test_a_host_bank_is_the_device_bank_bitwise(config, seed, data):
    """Copies of as many tokens as a chunk was pruned to, in rows full of NaN."""
    ratios = [config.keep_ratio, 0.5 * config.keep_ratio]
    config = dataclasses.replace(config, bank_chunks=max(3, config.retrieved_chunks))
    memories = [make(dataclasses.replace(config, bank=bank)) for bank in ("device", "host")]
    pool, bank = memories[1]._storage.pool, memories[1]._bank
    packed = bank.store.tensors if config.packs_bank else ()
    for rows in (bank._cache.arena.rows, pool.shared_k, pool.shared_v, *packed):
        rows.fill_(float("nan") if rows.is_floating_point() else 255)
    rollout = Rollout(config, seed, MAX_CHUNKS)
    for chunk in range(MAX_CHUNKS):
        assert same(*(rollout.chunk(memory, chunk) for memory in memories))
        banked = [past for past in range(chunk + 1) if memories[0].location(past) == "bank"]
        kinds = data.draw(st.lists(st.sampled_from(["pin", "forget", "change"]), max_size=2, unique=True))
        fields = {
            "retrieved_chunks": data.draw(st.integers(0, config.retrieved_chunks)),
            "keep_ratio": data.draw(st.sampled_from(ratios)),
            "recent_frames": data.draw(st.integers(0, config.recent_frames)),
        }
        picked = data.draw(st.sampled_from(banked)) if banked else None
        for memory in memories:
            if "pin" in kinds and banked:
                memory.pin(picked)
            if "forget" in kinds and banked:
                memory.forget(picked)
            if "change" in kinds:
                memory.change(**fields)
        assert memories[0].stats()["kept_bytes"] == memories[1].stats()["kept_bytes"]


# --- left out of the bank ---


@pytest.mark.parametrize("bank", ["device", "host"])
def test_a_chunk_that_is_not_to_be_banked_is_recent_and_then_dropped(bank):
    config = tiny(bank=bank, bank_chunks=9)
    memory, rollout = make(config), Rollout(config, 0, 8)
    for chunk in range(8):
        plan = memory.begin_chunk(rollout.poses[chunk])
        recent = {number for role, number, _ in plan.segments if role == "recent"}
        assert recent == {past for past in (chunk - 2, chunk - 1) if past > 0}
        memory.attend(0, *rollout.passes[chunk][-1][0])
        memory.end_chunk(bank=chunk not in (0, 3))
    assert [memory.location(chunk) for chunk in range(8)] == [
        "sink", "bank", "bank", "dropped", "bank", "bank", "recent", "recent",
    ]  # fmt: skip
    stats = memory.stats()
    assert (stats["chunks_banked"], stats["chunks_dropped"]) == (4, 1)
    assert stats["host_copies_out"] == (4 if bank == "host" else 0)


def test_what_is_left_out_is_not_copied_ahead():
    config = tiny(bank="host", bank_chunks=9, retrieved_chunks=1, recent_frames=2)
    memory, rollout = make(config), Rollout(config, 0, 5)
    for chunk in range(4):
        memory.begin_chunk(rollout.poses[chunk])
        memory.attend(0, *rollout.passes[chunk][-1][0])
        if chunk == 3:
            assert memory._coming(3, None) is None  # 2 leaves, and is not banked
            assert memory.prefetch(rollout.poses[2]) == (1,)
        memory.end_chunk(bank=chunk != 2)
    assert memory.begin_chunk(rollout.poses[2]).retrieved == (1,)


def test_of_a_sink_with_a_copy_in_the_bank_the_copy_is_left_out():
    config = dataclasses.replace(tiny(bank_chunks=9), bank_sink=True)
    for bank, banked in ((True, 1), (False, 0)):
        memory, rollout = make(config), Rollout(config, 0, 1)
        memory.begin_chunk(rollout.poses[0])
        memory.attend(0, *rollout.passes[0][-1][0])
        memory.end_chunk(bank=bank)
        assert memory.location(0) == "sink" and memory.stats()["chunks_banked"] == banked


@pytest.mark.parametrize("mode", ["full", "sliding", "sink_recent"])
def test_without_a_bank_there_is_nothing_to_leave_out(mode):
    config = tiny(mode=mode, bank_chunks=9)
    memories, rollout = [make(config), make(config)], Rollout(config, 0, 6)
    for chunk in range(6):
        for memory in memories:
            memory.begin_chunk(rollout.poses[chunk])
            memory.attend(0, *rollout.passes[chunk][-1][0])
            memory.end_chunk(bank=memory is memories[0])
    assert memories[0].stats() == memories[1].stats()
    assert [memories[0].location(n) for n in range(6)] == [memories[1].location(n) for n in range(6)]
    for call in ("pin", "unpin", "forget"):
        with pytest.raises(ValueError, match=f"{call}: memory must be of mode 'worldkv', .* got '{mode}'"):
            getattr(memories[0], call)(5)
    assert memories[0].pinned == ()


# --- pinned and forgotten ---


def walk(memory: WorldMemory, rollout: Rollout, first: int, end: int) -> None:
    for chunk in range(first, end):
        rollout.chunk(memory, chunk)


class Asked:
    """A policy of a user's own that gives up the oldest of its candidates, which it writes down."""

    needs_intrinsics = False

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def describe(self, poses, intrinsics):
        return None

    def select(self, current, candidates, budget):
        return [chunk for chunk, _ in candidates][:budget]

    def drop(self, candidates):
        self.asked.append([chunk for chunk, _ in candidates])
        return candidates[0][0]


@pytest.mark.parametrize("bank", ["device", "host"])
def test_a_users_own_policy_is_not_offered_what_is_pinned(bank):
    policy = Asked()
    config = tiny(retrieval=policy, bank=bank, bank_chunks=3, sink_frames=0, recent_frames=2)
    memory, rollout = make(config), Rollout(config, 0, 12)
    walk(memory, rollout, 0, 2)
    memory.pin(0)
    memory.pin(1)  # still recent
    memory.pin(1)
    walk(memory, rollout, 2, 5)
    assert policy.asked == [[2, 3]] and memory.pinned == (0, 1)
    memory.pin(3)
    walk(memory, rollout, 5, 7)  # 4 and 5 find all places pinned
    assert policy.asked == [[2, 3]]
    assert [memory.location(n) for n in range(7)] == ["bank", "bank", "dropped", "bank", "dropped", "dropped", "recent"]
    memory.pin(6)
    walk(memory, rollout, 7, 8)  # pinned, but there is no place
    assert memory.location(6) == "dropped" and memory.pinned == (0, 1, 3)
    memory.unpin(1)
    memory.pin(7)
    walk(memory, rollout, 8, 9)
    assert policy.asked == [[2, 3], [1]] and memory.pinned == (0, 3, 7)
    assert memory.stats()["chunks_dropped"] == 5


class Stubborn(Asked):
    def drop(self, candidates):
        return 0


def test_a_policy_that_gives_up_what_is_pinned_is_refused():
    config = tiny(retrieval=Stubborn(), bank_chunks=2, sink_frames=0, recent_frames=0)
    memory, rollout = make(config), Rollout(config, 0, 4)
    walk(memory, rollout, 0, 2)
    memory.pin(0)
    with pytest.raises(ValueError, match=r"end_chunk: the retrieval policy must drop one of \[1, 2\], got 0"):
        rollout.chunk(memory, 2)
    memory.abort_chunk()
    assert memory.fork().stats() == memory.stats()  # nothing of the chunk that could not be ended is left
    memory.unpin(0)
    rollout.chunk(memory, 2)
    assert [memory.location(chunk) for chunk in range(3)] == ["dropped", "bank", "bank"]


def test_a_chunk_whose_end_is_said_again_is_banked_as_the_last_call_says():
    config = tiny(retrieval=Stubborn(), bank_chunks=2, sink_frames=0, recent_frames=2)
    memory, rollout = make(config), Rollout(config, 0, 5)
    walk(memory, rollout, 0, 3)
    memory.pin(0)
    memory.begin_chunk(rollout.poses[3])
    memory.attend(0, *rollout.passes[3][-1][0])
    with pytest.raises(ValueError, match=r"must drop one of \[1, 2\], got 0"):
        memory.end_chunk(bank=False)
    memory.unpin(0)
    memory.end_chunk()
    memory.forget(1)
    walk(memory, rollout, 4, 5)
    assert [memory.location(chunk) for chunk in range(5)] == ["dropped", "dropped", "bank", "bank", "recent"]


@pytest.mark.parametrize("policy", [PoseRetrieval(), FovRetrieval(samples=8)], ids=lambda policy: type(policy).__name__)
def test_what_is_kept_side_by_side_gives_up_what_the_policy_would(policy):
    from test_kept import CAMERA, bank_of, camera_path

    for seed in range(30):
        rng = np.random.default_rng(seed)
        poses = camera_path(str(rng.choice(["walk", "grid", "again", "stand"])), rng, 30, 1.0, 0.0)
        bank, kept = bank_of(policy, 8), {}
        for chunk, pose in enumerate(poses):
            bank.pinned = {int(one) for one in rng.choice(chunk + 1, size=min(chunk + 1, 5))}
            kept[chunk] = policy.describe(pose[None], CAMERA)
            full = len(bank) == 8
            bank.slot_to_fill(chunk, kept[chunk])
            if full:
                free = [(number, view) for number, view in kept.items() if number not in bank.pinned]
                given_up = policy.drop(free) if [number for number, _ in free] not in ([], [chunk]) else chunk
                del kept[given_up]
            assert list(bank._place) == list(kept)


def test_what_is_pinned_far_away_sets_no_scale():
    from test_kept import bank_of

    policy, poses = PoseRetrieval(), np.tile(np.eye(4), (5, 1, 1))
    poses[:, 0, 3] = [1e7, 0, 4, 5, 9]
    bank = bank_of(policy, 4)
    for chunk in range(4):
        bank.slot_to_fill(chunk, poses[chunk])
    bank.pinned = {0}
    bank.slot_to_fill(4, poses[4])
    assert list(bank._place) == [0, 1, 2, 4] and policy.drop(list(enumerate(poses))[1:]) == 3


def test_what_is_forgotten_comes_back_no_more():
    config = tiny(bank="host", bank_chunks=9, sink_frames=0, recent_frames=4)
    memory, rollout = make(config), Rollout(config, 0, 9)
    walk(memory, rollout, 0, 6)
    memory.pin(1)
    memory.forget(1)
    memory.forget(5)  # still recent
    assert memory.pinned == () and memory.location(1) == "dropped" and memory.location(5) == "recent"
    assert memory.stats()["chunks_dropped"] == 1
    walk(memory, rollout, 6, 9)
    assert 1 not in memory.begin_chunk(rollout.poses[1]).retrieved
    assert memory.location(5) == "dropped" and memory.stats()["chunks_dropped"] == 2
    assert memory.stats()["chunks_banked"] == 5


def test_the_last_word_on_a_recent_chunk_counts():
    config = tiny(bank_chunks=9, sink_frames=0, recent_frames=2)
    memory, rollout = make(config), Rollout(config, 0, 4)
    memory.begin_chunk(rollout.poses[0])
    memory.attend(0, *rollout.passes[0][-1][0])
    memory.end_chunk(bank=False)
    memory.pin(0)
    walk(memory, rollout, 1, 2)
    assert memory.location(0) == "bank" and memory.pinned == (0,)
    memory.pin(1)
    memory.forget(1)
    walk(memory, rollout, 2, 3)
    assert memory.location(1) == "dropped" and memory.pinned == (0,)
    memory.reset()
    assert memory.pinned == ()


def test_what_cannot_be_pinned_or_forgotten():
    config = tiny(bank_chunks=2)
    memory, rollout = make(config), Rollout(config, 0, 9)
    walk(memory, rollout, 0, 8)
    gone = next(chunk for chunk in range(8) if memory.location(chunk) == "dropped")
    banked = next(chunk for chunk in range(8) if memory.location(chunk) == "bank")
    for call, chunk, error_type, message in (
        ("pin", 8, ValueError, "pin: chunk must be from 0 to 7, got 8"),
        ("pin", gone, ValueError, f"pin: chunk must still be kept, got {gone}, which is dropped"),
        ("pin", 1.0, TypeError, r"pin: chunk must be an integer, got 1\.0"),
        ("unpin", 7, ValueError, r"unpin: chunk must be one of the pinned \[\], got 7"),
        ("forget", 0, ValueError, "forget: chunk must be in the bank or recent, got 0, which is sink"),
        ("forget", gone, ValueError, f"forget: chunk must be in the bank or recent, got {gone}, which is dropped"),
        ("forget", 8, ValueError, "forget: chunk must be from 0 to 7, got 8"),
    ):
        with pytest.raises(error_type, match=message):
            getattr(memory, call)(chunk)
    memory.pin(0)  # in the sink: stays anyway
    plan = memory.begin_chunk(rollout.poses[8])
    memory.pin(banked)  # at any time
    with pytest.raises(RuntimeError, match="forget: chunk 8 must be ended or aborted before, got one that is begun"):
        memory.forget(plan.retrieved[0])
    with pytest.raises(ValueError, match="forget: chunk must be from 0 to 7, got 8"):
        memory.forget(8)
    with pytest.raises(RuntimeError, match="change: chunk 8 must be ended or aborted before, got one that is begun"):
        memory.change(retrieved_chunks=0)
    with pytest.raises(TypeError, match="end_chunk: bank must be True or False, got 1"):
        memory.end_chunk(bank=1)
    assert memory.pinned == (0, banked)


# --- changed ---


@pytest.mark.parametrize(
    ("fields", "error_type", "message"),
    [
        (dict(retrieved_chunks=3), ValueError, "change: retrieved_chunks must be from 0 to the configured 2, got 3"),
        (dict(retrieved_chunks=-1), ValueError, "change: retrieved_chunks must be from 0 to the configured 2, got -1"),
        (dict(retrieved_chunks=1.0), TypeError, r"change: retrieved_chunks must be an integer, got 1\.0"),
        (dict(recent_frames=5), ValueError, "change: recent_frames must be from 0 to the configured 4, got 5"),
        (dict(keep_ratio=0.6), ValueError, r"change: keep_ratio must be above 0, up to the configured 0\.5, got 0\.6"),
        (dict(keep_ratio=0), ValueError, r"change: keep_ratio must be above 0, up to the configured 0\.5, got 0"),
        (dict(keep_ratio="all"), TypeError, "change: keep_ratio must be a number, got 'all'"),
        (dict(retrieved_chunks=1, recent_frames=9), ValueError, "change: recent_frames"),
    ],
)
def test_what_cannot_be_changed(fields, error_type, message):
    config = tiny(bank_chunks=9, keep_ratio=0.5)
    memory = make(config)
    walk(memory, Rollout(config, 0, 4), 0, 4)
    memory.change(retrieved_chunks=1, keep_ratio=0.25, recent_frames=2)
    before = memory.config, memory.stats()
    with pytest.raises(error_type, match=message):
        memory.change(**fields)
    assert (memory.config, memory.stats()) == before
    memory.change(retrieved_chunks=2, keep_ratio=0.5, recent_frames=4)
    assert memory.config == config


def test_with_fewer_recent_frames_chunks_are_banked_at_once_and_with_more_they_fill_up():
    config = tiny(bank_chunks=9, sink_frames=0, recent_frames=6, retrieved_chunks=9, keep_ratio=0.5)
    memory, rollout = make(config), Rollout(config, 0, 10)
    walk(memory, rollout, 0, 5)
    where = [memory.location(chunk) for chunk in range(5)]
    assert where == ["bank", "bank", "recent", "recent", "recent"]
    memory.change(recent_frames=1, keep_ratio=0.1)
    assert [memory.location(chunk) for chunk in range(5)] == ["bank"] * 4 + ["recent"]
    plan = memory.begin_chunk(rollout.poses[5])
    rows = [(role, number, segment.num_rows) for role, number, segment in plan.segments]
    assert rows == [
        ("retrieved", 0, 9), ("retrieved", 1, 9), ("retrieved", 2, 7), ("retrieved", 3, 7), ("recent", 4, 6),
        ("current", 5, 12),
    ]  # fmt: skip
    memory.abort_chunk()
    memory.change(recent_frames=6)
    for chunk, recent in ((5, [4]), (6, [4, 5]), (7, [4, 5, 6]), (8, [5, 6, 7])):
        plan = memory.begin_chunk(rollout.poses[chunk])
        assert [number for role, number, _ in plan.segments if role == "recent"] == recent
        memory.abort_chunk()
        rollout.chunk(memory, chunk)
        assert memory.location(3) == "bank"


@pytest.mark.parametrize(("bank", "bits"), [("device", 16), ("host", 16), ("device", 4), ("host", 8)])
def test_a_change_moves_and_allocates_nothing(bank, bits):
    from test_world_memory_steady import NewStorages, of_layers

    config = tiny(bank=bank, bank_bits=bits, bank_chunks=9, rebase_time=True, retrieved_log_weight=0.5)
    memory, rollout = make(config), Rollout(config, 1, MAX_CHUNKS)
    walk(memory, rollout, 0, 6)
    chunks = memory._attention.q, memory._attention.first_row, memory._attention.rotations.table
    kept = [*chunks, memory._storage.pool.k, memory._storage.pool.v, *memory.window.tables, *of_layers(memory)]
    addresses, window = [x.data_ptr() for x in kept], memory.window
    shapes = window.has_shift, window.has_weight, window.capacity
    with NewStorages() as seen:
        memory.change(retrieved_chunks=0, keep_ratio=0.1, recent_frames=0)
        memory.begin_chunk(rollout.poses[6])
        memory.abort_chunk()
        memory.change(retrieved_chunks=2, keep_ratio=0.25, recent_frames=4)
    assert not seen.ops, seen.ops
    walk(memory, rollout, 6, MAX_CHUNKS)
    chunks = memory._attention.q, memory._attention.first_row, memory._attention.rotations.table
    now = [*chunks, memory._storage.pool.k, memory._storage.pool.v, *memory.window.tables, *of_layers(memory)]
    assert [x.data_ptr() for x in now] == addresses and memory.window is window
    assert (window.has_shift, window.has_weight, window.capacity) == shapes


def test_reset_goes_back_to_what_was_configured():
    config = tiny(bank_chunks=9)
    memory, fresh, rollout = make(config), make(config), Rollout(config, 3, 9)
    walk(memory, rollout, 0, 6)
    memory.change(retrieved_chunks=1, keep_ratio=0.1, recent_frames=0)
    memory.pin(2)
    memory.forget(3)
    memory.reset()
    assert memory.config is config and memory.stats() == fresh.stats()
    for a, b in zip(rollout.run(memory), rollout.run(fresh), strict=True):
        assert same(a, b)
    assert memory.stats() == fresh.stats()


def test_a_change_that_a_policy_breaks_off_leaves_every_chunk_in_one_place():
    config = tiny(retrieval=Stubborn(), bank_chunks=2, sink_frames=0, recent_frames=6)
    memory, rollout = make(config), Rollout(config, 0, 8)
    walk(memory, rollout, 0, 4)
    memory.pin(0)
    with pytest.raises(ValueError, match=r"must drop one of \[1, 2\], got 0"):
        memory.change(recent_frames=0, retrieved_chunks=1)
    assert memory.config == config
    assert [memory.location(chunk) for chunk in range(4)] == ["bank", "bank", "recent", "recent"]
    memory.unpin(0)
    memory.change(recent_frames=2)
    assert [memory.location(chunk) for chunk in range(4)] == ["dropped", "bank", "bank", "recent"]
    plan = memory.begin_chunk(rollout.poses[4])
    assert [number for role, number, _ in plan.segments if role == "recent"] == [3]


@pytest.mark.parametrize("bank", ["device", "host"])
@pytest.mark.parametrize("copied", ["pickle", "deepcopy", "fork", "save"])
def test_a_copy_takes_along_what_was_changed(tmp_path, bank, copied):
    config = tiny(bank=bank, bank_chunks=4, keep_ratio=0.5)
    memory, rollout = make(config), Rollout(config, 11, 12)
    walk(memory, rollout, 0, 6)
    memory.change(keep_ratio=0.2, recent_frames=2)
    memory.pin(2)
    memory.forget(5)
    if copied == "fork":
        again = memory.fork()
    elif copied == "save":
        memory.save(tmp_path / "memory")
        again = WorldMemory.load(tmp_path / "memory", backend="reference")
    else:
        again = copy_by(memory, copied)
    fields = ("retrieved_chunks", "keep_ratio", "recent_frames")
    assert [getattr(again.config, name) for name in fields] == [2, 0.2, 2] and again.pinned == (2,)
    for chunk in range(6, 12):
        assert same(rollout.chunk(again, chunk), rollout.chunk(memory, chunk))
        assert [again.location(n) for n in range(chunk)] == [memory.location(n) for n in range(chunk)]
    new, old = again.stats(), memory.stats()
    afresh = (
        {
            "host_copies_in",
            "host_copies_saved",
            "host_misses",
            "host_bytes_in",
            "prefetched",
            "prefetch_hits",
            "prefetch_misses",
        }
        if copied in ("fork", "save")
        else set()
    )  # what is cached is not taken along
    assert {name for name in new if new[name] != old[name]} <= afresh
    again.change(keep_ratio=0.5)  # up to what was configured


def test_of_a_chunk_that_was_pruned_further_less_is_copied():
    config = tiny(bank="host", bank_chunks=9, device_slots=2, prefetch=False, sink_frames=0, recent_frames=0,
                  keep_ratio=1.0)  # fmt: skip
    memory, rollout = make(config), Rollout(config, 0, 8)
    walk(memory, rollout, 0, 2)
    row_bytes = 2 * HEAD_DIM * 4
    assert memory.stats()["host_bytes_out"] == 2 * 12 * row_bytes
    memory.change(keep_ratio=0.5)
    walk(memory, rollout, 2, 4)
    stats = memory.stats()
    assert stats["host_bytes_out"] == (2 * 12 + 2 * 9) * row_bytes
    before = stats["host_bytes_in"]
    memory._bank.fetch([0, 1])
    memory._bank.fetch([2, 3])
    assert memory.stats()["host_bytes_in"] - before == (2 * 12 + 2 * 9) * row_bytes
    memory._bank.release()
    assert torch.isfinite(memory._storage.pool.k).all()
