"""WorldMemory against the slow model, over random rollouts, and its promises one by one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from slow_memory import OfficialOrder, PoseOrder, SlowMemory, pruned, qk_norm, turned
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import worldkv_kernels.memory.pool as pool_module
import worldkv_kernels.memory.world_memory as world_memory_module
from worldkv_kernels import MemoryConfig, Rope3D, WorldMemory, compress_chunk, segment_attention
from worldkv_kernels.memory.retrieval import PoseRetrieval

HEAD_DIM = 64
# fp32 against float64: rounding of 6e-8 in the norm, the rotary table, the turned query and 64-term products, on
# logits of a few units, which the softmax passes on. The largest seen over these rollouts is 8e-7.
TOLERANCE = 5e-6
# Similarities are computed in fp32 (error some 1e-7); keys are drawn so that the cut is wider than this.
SIMILARITY_GAP = 1e-5


def fuzz(examples: int):
    return settings(
        max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
    )


# --- random rollouts ---


def rotation(yaw: float, pitch: float) -> np.ndarray:
    """Camera-to-world, degrees; OpenCV axes (x right, y down, z ahead)."""
    a, b = math.radians(yaw), math.radians(pitch)
    about_y = np.array([[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]])
    about_x = np.array([[1, 0, 0], [0, math.cos(b), -math.sin(b)], [0, math.sin(b), math.cos(b)]])
    return about_y @ about_x


def camera_walk(rng: np.random.Generator, num_chunks: int, frames: int, only: str = "") -> list[np.ndarray]:
    """Poses [frames, 4, 4] of each chunk: stands, turns, strides, strays, or repeats an earlier chunk.

    Turns and strides come in round numbers, so that distances are either equal but for float64's rounding or
    clearly apart; a common rigid motion makes sure of the rounding.
    """
    yaw, pitch, position = 0.0, 0.0, np.zeros(3)
    chunks: list[np.ndarray] = []
    for number in range(num_chunks):
        what = only or rng.choice(["stand", "turn", "nod", "stride", "stray", "repeat", "return"])
        if what in ("repeat", "return") and number:
            earlier = chunks[rng.integers(number)]
            chunks.append(earlier if what == "repeat" else earlier[::-1])
            continue
        step = float(rng.choice([-15, -5, 5, 15]))
        poses = np.tile(np.eye(4), (frames, 1, 1))
        for pose in poses:
            yaw += step * (what in ("turn", "stray"))
            pitch += step * (what == "nod") if abs(pitch + step) < 60 else 0
            if what == "stride":
                position = position + rotation(yaw, pitch)[:, 2]
            elif what == "stray":
                position = position + rng.normal(size=3)
            pose[:3, :3], pose[:3, 3] = rotation(yaw, pitch), position
        chunks.append(poses)
    world = np.eye(4)
    world[:3, :3], world[:3, 3] = rotation(*rng.uniform(-80, 80, size=2)), rng.normal(size=3)
    return [world @ poses for poses in chunks]


class Rollout:
    """What a model feeds its memory: poses, and per chunk, pass and layer the projections q, k and v."""

    def __init__(self, config: MemoryConfig, seed: int, num_chunks: int, walk: str = "") -> None:
        rng = np.random.default_rng(seed)
        self.random = torch.Generator().manual_seed(seed)
        self.config = config
        self.poses = camera_walk(rng, num_chunks, config.chunk_frames, walk)
        columns = config.num_heads * config.head_dim
        self.weights = [(None, None)] * config.num_layers
        if rng.random() < 0.7:
            self.weights = [
                tuple(1 + 0.2 * torch.randn(columns, generator=self.random) for _ in "qk")
                for _ in range(config.num_layers)
            ]
        self.passes = [
            [self._layers(chunk) for _ in range(rng.integers(1, 3))] for chunk in range(num_chunks)
        ]

    def _layers(self, chunk: int) -> list[tuple[torch.Tensor, ...]]:
        shape = (self.config.chunk_tokens, self.config.num_heads * self.config.head_dim)
        layers = []
        for layer in range(self.config.num_layers):
            q, k, v = (torch.randn(shape, generator=self.random) for _ in range(3))
            while self._gap(chunk, layer, k) < SIMILARITY_GAP:
                k = torch.randn(shape, generator=self.random)
            layers.append((q, k, v, *self.weights[layer]))
        return layers

    def _gap(self, chunk: int, layer: int, k: torch.Tensor) -> float:
        """Between the similarities of the last token kept and the first one pruned."""
        config, slow = self.config, SlowMemory(self.config)
        keys = qk_norm(k.double(), self.weights[layer][1], config.eps).view(len(k), config.num_heads, config.head_dim)
        if slow.frequencies is not None:
            keys = turned(
                keys, (config.chunk_frames, *config.grid), chunk * config.chunk_frames, slow.frequencies
            )
        return pruned(keys, config.chunk_frames, config.keep_ratio, config.pooled)[1]

    def chunk(self, memory: WorldMemory, chunk: int) -> list[torch.Tensor]:
        """One chunk through the memory: the outputs of every pass and layer."""
        memory.begin_chunk(self.poses[chunk])
        outputs = [memory.attend(layer, *x) for layers in self.passes[chunk] for layer, x in enumerate(layers)]
        memory.end_chunk()
        return outputs

    def run(self, memory: WorldMemory) -> Iterator[list[torch.Tensor]]:
        for chunk in range(len(self.poses)):
            yield self.chunk(memory, chunk)


def make(config: MemoryConfig) -> WorldMemory:
    return WorldMemory(config, dtype=torch.float32, backend="reference")


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


MAX_CHUNKS = 14
# Few positions, or the unbounded bank takes room for a thousand chunks.
ROPES = [
    Rope3D(HEAD_DIM, max_position=64),
    Rope3D(HEAD_DIM, max_position=64, pairs=(12, 12, 8), theta=500.0),
    Rope3D(HEAD_DIM, max_position=64, pairs=(32, 0, 0)),
]


@st.composite
def configs(draw, **fixed) -> MemoryConfig:
    frames = draw(st.integers(1, 4))
    mode = fixed.get("mode") or draw(st.sampled_from(["worldkv"] * 5 + ["full", "sliding", "sink_recent"]))
    retrieved = draw(st.integers(0, 4))
    rope = draw(st.sampled_from([*ROPES, ROPES[0], None]))
    bounds = [None] * (rope is not None) + [max(1, retrieved) + draw(st.integers(0, 3))]
    if mode == "full":
        bounds = [MAX_CHUNKS]
    elif rope is None:
        bounds.append(MAX_CHUNKS)
    drawn = dict(
        num_layers=draw(st.integers(1, 2)),
        num_heads=draw(st.integers(1, 3)),
        head_dim=HEAD_DIM,
        grid=(draw(st.integers(2, 4)), draw(st.integers(3, 5))),
        chunk_frames=frames,
        sink_frames=frames * draw(st.integers(0, 2)),
        recent_frames=frames * draw(st.integers(0, 3)),
        retrieved_chunks=retrieved,
        keep_ratio=draw(st.sampled_from([0.1, 0.25, 0.5, 0.7, 1.0]) | st.floats(0.1, 1)),
        pooled=draw(st.booleans()),
        mode=mode,
        rope=rope,
        rebase_time=rope is not None and draw(st.booleans()),
        order=draw(st.sampled_from(["time", "nearest_last", "nearest_first"])),
        bank=draw(st.sampled_from(["device", "host"])),
        bank_chunks=draw(st.sampled_from(bounds)),
        scale=draw(st.sampled_from([None, None, 0.2])),
        eps=draw(st.sampled_from([1e-6, 1e-2])),
    )
    return MemoryConfig(**{**drawn, **fixed})


@st.composite
def official_configs(draw) -> MemoryConfig:
    retrieved = draw(st.integers(0, 3))
    config = MemoryConfig.official(
        num_layers=1,
        num_heads=draw(st.integers(1, 2)),
        grid=(2, 3),
        head_dim=HEAD_DIM,
        retrieved_frames=3 * retrieved,
        recent_frames=draw(st.sampled_from([3, 6, 9])),
        keep_ratio=draw(st.sampled_from([0.25, 0.5, 1.0])),
        pooled=draw(st.booleans()),
        rope_correction=draw(st.booleans()),
        bank=draw(st.sampled_from(["device", "host"])),
        bank_chunks=draw(st.sampled_from([None, retrieved + 2])),
    )
    return dataclasses.replace(config, rope=ROPES[0])


seeds = st.integers(0, 2**31)


def check_against_slow(
    config: MemoryConfig, seed: int, num_chunks: int, order: object = None, walk: str = ""
) -> None:
    """Play a rollout to the memory and to the slow model; everything visible must agree, chunk by chunk."""
    memory, slow, rollout = make(config), SlowMemory(config, order), Rollout(config, seed, num_chunks, walk)
    token_bytes = 2 * 4 * config.num_layers * config.num_heads * config.head_dim  # K and V, fp32
    attended = retrieved = 0
    for chunk in range(num_chunks):
        plan = memory.begin_chunk(rollout.poses[chunk])
        slow.begin(rollout.poses[chunk])
        assert (plan.chunk, plan.start_frame) == (chunk, chunk * config.chunk_frames)
        assert list(plan.retrieved) == slow.retrieved
        assert [(role, number) for role, number, _ in plan.segments] == [x[:2] for x in slow.window]
        shifts = [first - number * config.chunk_frames for _, number, first in slow.window]
        assert [segment.time_shift for _, _, segment in plan.segments] == shifts
        assert plan.num_tokens == slow.num_tokens == memory.window.num_tokens
        for layers in rollout.passes[chunk]:
            for layer, x in enumerate(layers):
                assert error(memory.attend(layer, *x), slow.attend(layer, *x)) <= TOLERANCE
        memory.end_chunk()
        slow.end()
        attended, retrieved = attended + plan.num_tokens, retrieved + len(plan.retrieved)
        assert [memory.location(past) for past in range(chunk + 1)] == [slow.where[past] for past in range(chunk + 1)]
        stats = memory.stats()
        assert stats["kept_bytes"] == slow.kept_rows() * token_bytes
        counted = [stats[name] for name in ("chunks", "tokens_attended", "chunks_retrieved")]
        assert counted == [chunk + 1, attended, retrieved]
        assert stats["chunks_banked"] == len(slow.banked)
        if config.mode == "worldkv":
            assert stats["chunks_dropped"] == slow.num_dropped
            assert config.bank_chunks is None or stats["chunks_banked"] <= config.bank_chunks
        else:
            assert stats["chunks_dropped"] == list(slow.where.values()).count("dropped")


@fuzz(220)
@given(configs(), seeds, st.integers(1, MAX_CHUNKS))
def test_matches_the_slow_memory(config, seed, num_chunks):
    check_against_slow(config, seed, num_chunks)


class ClearOfficialOrder(OfficialOrder):
    """Gives up on walks where two distances are too close for the published code's float32 to tell."""

    def distances(self, current, candidates):
        distances = super().distances(current, candidates)
        assume(np.diff(sorted(distances.values())).min(initial=1.0) > 1e-4)
        return distances


@fuzz(40)
@given(official_configs(), seeds, st.integers(6, MAX_CHUNKS))
def test_official_matches_the_slow_memory(config, seed, num_chunks):
    check_against_slow(config, seed, num_chunks, ClearOfficialOrder(), walk="stray")


# --- promises ---


def tiny(**fields) -> MemoryConfig:
    """One layer, one head, 2 x 3 tokens a frame, chunks of 2; sink 1, recent 2, retrieved 2."""
    small = dict(
        num_layers=1, num_heads=1, head_dim=HEAD_DIM, grid=(2, 3), chunk_frames=2, sink_frames=2, recent_frames=4,
        retrieved_chunks=2, rope=ROPES[0],
    )  # fmt: skip
    return MemoryConfig(**{**small, **fields})


@fuzz(40)
@given(configs(mode="worldkv", bank_chunks=MAX_CHUNKS, retrieved_chunks=MAX_CHUNKS, num_layers=1), seeds)
def test_every_past_chunk_is_in_exactly_one_place(config, seed):
    """With room for all, each past chunk is sink, recent or banked, and is attended exactly once."""
    memory, rollout = make(config), Rollout(config, seed, MAX_CHUNKS)
    for chunk in range(MAX_CHUNKS):
        plan = memory.begin_chunk(rollout.poses[chunk])
        assert sorted(number for _, number, _ in plan.segments) == list(range(chunk + 1))
        roles = {number: role for role, number, _ in plan.segments}
        for past in range(chunk):
            assert memory.location(past) == {"retrieved": "bank"}.get(roles[past], roles[past])
            assert (memory.location(past) == "bank") == (past in memory._bank)
        memory.attend(0, *rollout.passes[chunk][-1][0])
        memory.end_chunk()
    assert memory.stats()["chunks_dropped"] == 0


@fuzz(40)
@given(configs(mode="worldkv"), seeds, st.data())
def test_bounded_bank_drops_what_the_policy_says(config, seed, data):
    """Never more than bank_chunks, each drop counted, one chunk at a time, the newest never without reason."""
    bound = max(1, config.retrieved_chunks) + data.draw(st.integers(0, 2))
    config = dataclasses.replace(config, bank_chunks=bound, num_layers=1)
    memory, rollout, order = make(config), Rollout(config, seed, MAX_CHUNKS), PoseOrder()
    banked: dict[int, object] = {}
    for chunk in range(MAX_CHUNKS):
        plan = memory.begin_chunk(rollout.poses[chunk])
        assert set(plan.retrieved) <= set(banked)
        memory.attend(0, *rollout.passes[chunk][-1][0])
        memory.end_chunk()
        stored = chunk - config.recent_frames // config.chunk_frames
        if stored >= config.sink_frames // config.chunk_frames:
            banked[stored] = order.describe(rollout.poses[stored])
            if len(banked) > bound:
                del banked[order.drop(banked)]
        assert sorted(banked) == [past for past in range(chunk + 1) if memory.location(past) == "bank"]
        stats = memory.stats()
        assert stats["chunks_banked"] == len(banked) <= stats["bank_capacity"] == bound
        assert stats["chunks_dropped"] == sum(memory.location(past) == "dropped" for past in range(chunk + 1))


OF_COPIES = {
    "host_copies_in", "host_copies_out", "host_copies_saved", "host_misses", "host_bytes_in", "host_bytes_out",
    "prefetched", "prefetch_hits", "prefetch_misses",
}  # fmt: skip


@fuzz(30)
@given(configs(mode="worldkv"), seeds)
def test_host_bank_is_the_device_bank_bitwise(config, seed):
    device, host = (make(dataclasses.replace(config, bank=bank)) for bank in ("device", "host"))
    rollout = Rollout(config, seed, MAX_CHUNKS)
    for a, b in zip(rollout.run(device), rollout.run(host), strict=True):
        assert same(a, b)
    a, b = device.stats(), host.stats()
    assert {name for name in a if a[name] != b[name]} <= {"device_bytes", *OF_COPIES, "host_bytes"}
    assert b["host_misses"] + b["host_copies_saved"] == b["chunks_retrieved"]
    assert b["host_copies_in"] == b["host_misses"] + b["prefetched"]
    assert b["host_bytes"] > 0 == a["host_bytes"]


def test_host_bank_keeps_the_device_small():
    """Device room for the retrieved chunks and two more, or as given, however large the bank."""
    sizes = {make(tiny(bank="host", bank_chunks=places)).stats()["device_bytes"] for places in (2, 20)}
    assert len(sizes) == 1
    empty = make(tiny(bank="host", bank_chunks=20, keep_ratio=0.5)).stats()
    assert empty["host_bytes"] == 20 * 2 * (6 + 3) * HEAD_DIM * 4  # from the start, not when the first chunk comes
    assert empty["bank_capacity"] == 20
    bytes_of = {slots: make(tiny(bank="host", device_slots=slots)).stats()["device_bytes"] for slots in (None, 2, 4, 5)}
    slot = 2 * 128 * HEAD_DIM * 4
    assert bytes_of[None] == bytes_of[4] == bytes_of[2] + 2 * slot == bytes_of[5] - slot


def test_a_chunk_that_is_retrieved_again_costs_no_copy():
    config = tiny(bank="host", sink_frames=0, recent_frames=0, retrieved_chunks=2)
    memory, rollout = make(config), Rollout(config, 0, 6)
    rollout.poses = [rollout.poses[0]] * 6  # all alike: chunks 0 and 1 every time
    for _ in rollout.run(memory):
        pass
    stats = memory.stats()
    assert (stats["host_copies_in"], stats["host_copies_saved"]) == (0, 1 + 2 * 4)  # pruned into the slots they have
    assert (stats["host_copies_out"], stats["prefetched"]) == (6, 0)


@fuzz(40)
@given(configs(), seeds, st.integers(2, MAX_CHUNKS), st.data())
def test_abort_restores(config, seed, num_chunks, data):
    """A chunk begun, attended with other data at other poses and aborted leaves no trace in what follows."""
    calm, shaken = make(config), make(config)
    rollout, other = Rollout(config, seed, num_chunks), Rollout(config, seed + 1, num_chunks)
    for chunk in range(num_chunks):
        for _ in range(data.draw(st.integers(0, 2))):
            before = shaken.stats()
            shaken.begin_chunk(other.poses[chunk])
            for layer, x in enumerate(other.passes[chunk][0][: data.draw(st.integers(0, config.num_layers))]):
                shaken.attend(layer, *x)
            shaken.abort_chunk()
            after = shaken.stats()
            kept = before.keys() - OF_COPIES  # copies made are made
            assert {name: before[name] for name in kept} == {name: after[name] for name in kept}
        assert calm.begin_chunk(rollout.poses[chunk])[:3] == shaken.begin_chunk(rollout.poses[chunk])[:3]
        calm.abort_chunk()
        shaken.abort_chunk()
        assert same(rollout.chunk(calm, chunk), rollout.chunk(shaken, chunk))
    shaken.abort_chunk()  # does nothing when none is begun


@fuzz(40)
@given(configs(), seeds, st.integers(1, MAX_CHUNKS), st.booleans())
def test_reset_restarts_bitwise(config, seed, num_chunks, begun):
    memory, fresh = make(config), make(config)
    first, second = Rollout(config, seed, num_chunks), Rollout(config, seed + 1, num_chunks)
    for _ in first.run(memory):
        pass
    if begun and num_chunks < MAX_CHUNKS:
        memory.begin_chunk(first.poses[0])
    memory.reset()
    assert memory.stats() == fresh.stats()
    for a, b in zip(second.run(memory), second.run(fresh), strict=True):
        assert same(a, b)
    assert memory.stats() == fresh.stats()


@fuzz(30)
@given(configs(), seeds, st.integers(2, MAX_CHUNKS))
def test_the_last_pass_wins(config, seed, num_chunks):
    """Passes before the last leave nothing behind, and within a chunk each sees its own rows only."""
    memory, once = make(config), make(config)
    rollout, other = Rollout(config, seed, num_chunks), Rollout(config, seed + 1, num_chunks)
    for chunk in range(num_chunks):
        last = rollout.passes[chunk] = rollout.passes[chunk][-1:]
        expected = rollout.chunk(once, chunk)
        memory.begin_chunk(rollout.poses[chunk])
        for layers in (*other.passes[chunk], *last):
            outputs = [memory.attend(layer, *x) for layer, x in enumerate(layers)]
        memory.end_chunk()
        assert same(outputs, expected)


def unused_rows(memory: WorldMemory) -> torch.Tensor:
    """Of each pool row, whether it is a slot's tail, from the config alone."""
    config, pool = memory.config, memory._pool
    tail = torch.zeros(pool.rows, dtype=torch.bool)
    whole = config.chunk_frames * config.grid[0] * config.grid[1]
    banked = SlowMemory(config).banked_rows()
    for tokens, first_rows in zip((whole, whole, banked), pool.first_rows, strict=True):
        for first in first_rows:
            assert first % 128 == 0
            tail[first + tokens : first + (tokens + 127) // 128 * 128] = True
    return tail


@fuzz(50)
@given(configs(), seeds, st.integers(1, MAX_CHUNKS))
def test_poisoned_storage_is_never_read(config, seed, num_chunks):
    memory, clean = make(config), make(config)
    tail = unused_rows(memory)
    for pool in (memory._pool.k, memory._pool.v):
        assert (pool[:, tail] == 0).all()
        pool[:, ~tail] = math.nan
    if memory._bank is not None and memory._bank._cache is not None:
        memory._bank._cache.arena.rows.fill_(math.nan)
    memory._q.fill_(math.nan)
    rollout = Rollout(config, seed, num_chunks)
    for poisoned, expected in zip(rollout.run(memory), rollout.run(clean), strict=True):
        assert all(torch.isfinite(x).all() for x in poisoned)
        assert same(poisoned, expected)
    for pool in (memory._pool.k, memory._pool.v):
        assert (pool[:, tail] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_fp32(dtype):
    """With nothing pruned, so that rounding moves no token. Measured: 2.6e-3 in bf16, 3.5e-4 in fp16."""
    config = tiny(keep_ratio=1.0, rebase_time=True)
    memory, exact = WorldMemory(config, dtype=dtype, backend="reference"), make(config)
    rollout = Rollout(config, 3, 10)
    for chunk in range(10):
        rollout.passes[chunk] = [[[x.to(dtype) for x in layer[:3]] for layer in rollout.passes[chunk][0]]]
        got = rollout.chunk(memory, chunk)
        rollout.passes[chunk] = [[[x.float() for x in layer] for layer in rollout.passes[chunk][0]]]
        for a, b in zip(got, rollout.chunk(exact, chunk), strict=True):
            assert a.dtype == dtype
            assert error(a, b.double()) <= (6e-3 if dtype == torch.bfloat16 else 8e-4)


def test_equal_similarities_keep_the_earlier_token():
    """Without a rope, all tokens of the later frame are one key: exact ties, and keep 1 of 6 keeps the first."""
    config = tiny(rope=None, bank_chunks=8, keep_ratio=0.1, sink_frames=0, recent_frames=0)
    memory, slow = make(config), SlowMemory(config)
    random = torch.Generator().manual_seed(0)
    pose = np.tile(np.eye(4), (2, 1, 1))
    for _ in range(4):
        q, k, v = (torch.randn(12, HEAD_DIM, generator=random) for _ in range(3))
        k[6:] = k[6]
        memory.begin_chunk(pose)
        slow.begin(pose)
        assert error(memory.attend(0, q, k, v), slow.attend(0, q, k, v)) <= TOLERANCE
        memory.end_chunk()
        slow.end()
        assert slow.past[0].kept == [[0, 1, 2, 3, 4, 5, 6]]


class Newest:
    """A policy of a user's own: the newest chunks, gives up the newest too; checks what it is given."""

    needs_intrinsics = False

    def __init__(self) -> None:
        self.described: list[np.ndarray] = []

    def describe(self, poses, intrinsics):
        assert poses.dtype == np.float64 and intrinsics is None
        self.described.append(poses)
        return len(self.described) - 1

    def select(self, current, candidates, budget):
        assert [chunk for chunk, _ in candidates] == sorted(chunk for chunk, _ in candidates)
        assert [description for _, description in candidates] == [chunk for chunk, _ in candidates]
        assert current == len(self.described) - 1
        return [chunk for chunk, _ in reversed(candidates)][:budget]

    def drop(self, candidates):
        assert len(candidates) == 4  # a bank of 3 and the one that is to be stored, which is the newest
        assert candidates[-1][0] == max(chunk for chunk, _ in candidates)
        return candidates[-1][0]


@pytest.mark.parametrize("bank", ["device", "host"])
@pytest.mark.parametrize("order", ["time", "nearest_last", "nearest_first"])
def test_policy_object(bank, order):
    policy = Newest()
    config = tiny(retrieval=policy, bank=bank, bank_chunks=3, order=order)
    memory, rollout = make(config), Rollout(config, 0, MAX_CHUNKS)
    for chunk in range(MAX_CHUNKS):
        rollout.chunk(memory, chunk)
        assert np.array_equal(policy.described[chunk], rollout.poses[chunk])
    plan = memory.begin_chunk(rollout.poses[0])
    assert [memory.location(chunk) for chunk in range(MAX_CHUNKS)] == (
        ["sink"] + ["bank"] * 3 + ["dropped"] * (MAX_CHUNKS - 6) + ["recent"] * 2
    )
    assert plan.retrieved == {"time": (2, 3), "nearest_last": (2, 3), "nearest_first": (3, 2)}[order]
    assert memory.stats()["chunks_dropped"] == MAX_CHUNKS - 6


def test_attention_mass_of_the_window():
    """The window and the pools serve the ops themselves, and the segments stand in the plan's order."""
    config = tiny()
    memory, rollout = make(config), Rollout(config, 5, 9)
    for chunk in range(8):
        rollout.chunk(memory, chunk)
    plan = memory.begin_chunk(rollout.poses[8])
    assert memory.window.segments == tuple(segment for _, _, segment in plan.segments)
    q, k, v = rollout.passes[8][0][0][:3]
    out = memory.attend(0, q, k, v)
    k_pool, v_pool = memory.pools(0)
    again, mass = segment_attention(memory._q, k_pool, v_pool, memory.window, return_mass=True, backend="reference")
    assert torch.equal(out, again)
    assert mass.shape == (1, len(plan.segments))
    assert torch.allclose(mass.sum(dim=1), torch.ones(1))


# --- steady state ---


class NewStorages(TorchDispatchMode):
    """Records every op with an output whose storage is not that of one of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        made = {x.untyped_storage().data_ptr() for x in tree_leaves(result) if isinstance(x, torch.Tensor)}
        if made - given:
            self.ops.append(str(func))
        return result


def test_the_recorder_sees_allocations():
    x = torch.zeros(3)
    with NewStorages() as seen:
        x.add_(1)
        x[:1].copy_(x[1:2].view(1))
    assert not seen.ops
    with NewStorages() as seen:
        x + 1
        torch.empty(2)
        x[torch.tensor([0, 1])]
    assert len(seen.ops) >= 3


@pytest.mark.parametrize(
    "fields",
    [
        dict(bank_chunks=20),
        dict(bank="host", bank_chunks=20),
        dict(bank="host", bank_chunks=300, rebase_time=True, order="nearest_last"),
        dict(mode="full", bank_chunks=200),
        dict(mode="sliding"),
        dict(mode="sink_recent", rebase_time=True),
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_200_chunks_allocate_nothing_and_move_no_table(fields):
    config = tiny(num_layers=2, grid=(1, 3), rope=Rope3D(HEAD_DIM, max_position=400), **fields)
    memory, rollout = make(config), Rollout(config, 1, MAX_CHUNKS)
    out = torch.empty_like(memory._q)
    kept = [memory._q, memory._index, memory._position, memory._pool.k, memory._pool.v]
    kept += memory.window.tables
    kept += [x for layer in range(2) for x in memory.pools(layer)]
    addresses, window = [x.data_ptr() for x in kept], memory.window
    for chunk in range(200):
        with NewStorages() as seen:
            memory.begin_chunk(rollout.poses[chunk % MAX_CHUNKS])
            for layers in rollout.passes[chunk % MAX_CHUNKS]:
                for layer, x in enumerate(layers):
                    assert memory.attend(layer, *x, out=out) is out
            memory.end_chunk()
        assert chunk == 0 or not seen.ops, seen.ops  # the first may make the rope's table
    now = [memory._q, memory._index, memory._position, memory._pool.k, memory._pool.v]
    now += memory.window.tables
    now += [x for layer in range(2) for x in memory.pools(layer)]
    assert [x.data_ptr() for x in now] == addresses
    assert memory.window is window


@pytest.mark.parametrize("bank", ["device", "host"])
def test_a_chunk_is_pruned_in_one_call_for_all_layers(monkeypatch, bank):
    config, calls = tiny(bank=bank), []
    monkeypatch.setattr(
        world_memory_module, "compress_chunk",
        lambda k, v, **options: calls.append(list(k.shape)) or compress_chunk(k, v, **options),
    )  # fmt: skip
    memory, rollout = make(config), Rollout(config, 1, MAX_CHUNKS)
    for chunk in range(MAX_CHUNKS):
        rollout.chunk(memory, chunk)
    banked = MAX_CHUNKS - config.sink_chunks - config.recent_chunks
    assert calls == banked * [[config.num_layers, config.chunk_tokens, config.num_heads, HEAD_DIM]]


def test_no_work_grows_with_the_past():
    """What a chunk attends to is bounded in every mode but "full"."""
    for mode, tokens in (("worldkv", 12 + 2 * 8 + 24 + 12), ("sliding", 24 + 12), ("sink_recent", 12 + 24 + 12)):
        config = tiny(mode=mode, keep_ratio=0.25)
        memory, rollout = make(config), Rollout(config, 1, MAX_CHUNKS)
        for chunk in range(MAX_CHUNKS):
            rollout.chunk(memory, chunk)
        assert memory.begin_chunk(rollout.poses[0]).num_tokens == tokens


# --- errors ---


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("num_layers", 0, "at least 1"),
        ("num_heads", 0, "at least 1"),
        ("num_heads", 65, "at most 64"),
        ("chunk_frames", 0, "at least 1"),
        ("head_dim", 96, "64 or 128"),
        ("grid", (0, 3), "at least 1 token"),
        ("grid", (2, 3, 4), "(height, width)"),
        ("grid", (2.5, 3), "(height, width)"),
        ("grid", 5, "(height, width)"),
        ("sink_frames", 3, "a multiple of chunk_frames=2"),
        ("sink_frames", -2, "a multiple of chunk_frames=2"),
        ("recent_frames", 5, "a multiple of chunk_frames=2"),
        ("retrieved_chunks", -1, "at least 0"),
        ("unattended_chunks", -1, "at least 0"),
        ("keep_ratio", 0.0, "above 0 and at most 1"),
        ("keep_ratio", 1.1, "above 0 and at most 1"),
        ("keep_ratio", math.nan, "above 0 and at most 1"),
        ("eps", -1e-6, "not negative"),
        ("eps", math.nan, "finite"),
        ("scale", 0.0, "positive"),
        ("scale", math.inf, "finite"),
        ("mode", "rolling", "worldkv, full, sliding, sink_recent"),
        ("order", "random", "time, nearest_last, nearest_first"),
        ("bank", "disk", "'device' or 'host'"),
        ("bank_chunks", 1, "at least 2"),
        ("bank_chunks", 0, "at least 2"),
        ("device_slots", 1, "at least 2 with retrieved_chunks=2"),
        ("device_slots", 0, "at least 2"),
        ("rope", "llama", "a Rope3D, 'wan' or None"),
        ("rope", Rope3D(128), "for head_dim 64"),
        ("retrieval", "nearest", "'pose', 'fov', 'action' or a RetrievalPolicy"),
        ("retrieval", None, "'pose', 'fov', 'action' or a RetrievalPolicy"),
        ("retrieval", PoseRetrieval, "a RetrievalPolicy"),  # the class, not an object of it
    ],
)
def test_config_errors(field, value, wanted):
    with pytest.raises(ValueError) as caught:
        tiny(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"MemoryConfig: {field} must be") and wanted in message
    assert message.endswith(f"got {value!r}")


@pytest.mark.parametrize(
    "field",
    [
        "num_layers", "num_heads", "head_dim", "chunk_frames", "sink_frames", "recent_frames", "retrieved_chunks",
        "bank_chunks", "device_slots",
    ],
)  # fmt: skip
def test_config_counts_are_integers(field):
    for value in (4.0, "4"):
        with pytest.raises(TypeError, match=f"MemoryConfig: {field} must be an integer, got {value!r}"):
            tiny(**{field: value})


def test_config_rebase_needs_a_rope():
    with pytest.raises(ValueError, match="MemoryConfig: rebase_time must be False where there is no rope, got True"):
        tiny(rope=None, bank_chunks=4, rebase_time=True)


def test_config_is_frozen_and_by_keyword():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny().num_layers = 2
    with pytest.raises(TypeError):
        MemoryConfig(1, 1, (2, 3))


def test_memory_dtype_error():
    with pytest.raises(TypeError, match=r"WorldMemory: dtype must be .*float32, got torch\.float64"):
        WorldMemory(tiny(), dtype=torch.float64)


@pytest.mark.parametrize("bank", ["device", "host"])
def test_storage_that_does_not_fit(monkeypatch, bank):
    # fp32, one layer, one head: a slot is 128 rows of 64 numbers, K and V: 64 KiB; a sink slot and three ring slots.
    monkeypatch.setattr(pool_module, "_free_host_bytes", lambda: 64 * 1024 * 3)
    with pytest.raises(ValueError, match=r"WorldMemory: bank_chunks must be at least 2 .* got 1 that fit half of the"):
        make(tiny(bank=bank))
    with pytest.raises(ValueError, match=r"WorldMemory: storage must fit the 0.0 GiB .* free on cpu, got 0.0 GiB"):
        make(tiny(bank=bank, bank_chunks=2))
    with pytest.raises(ValueError, match=r"WorldMemory: storage must fit .* bank_chunks, 100000, sets most of it"):
        make(tiny(bank=bank, bank_chunks=100000))
    with pytest.raises(ValueError, match=r"WorldMemory: storage must fit"):
        make(tiny(mode="full", bank_chunks=10))
    monkeypatch.setattr(pool_module, "_free_host_bytes", lambda: 2 * 64 * 1024 * 5)
    assert make(tiny(sink_frames=0, bank=bank)).stats()["bank_capacity"] == 5
    assert make(tiny(sink_frames=0, mode="full")).stats()["device_bytes"] == 5 * 64 * 1024


def test_real_free_memory_is_found():
    assert pool_module._free_host_bytes() > 2**20


def bad_poses(what: str) -> object:
    poses = np.tile(np.eye(4), (2, 1, 1))
    if what == "missing":
        return None
    if what == "frames":
        return poses[:1]
    if what == "flat":
        return poses[0]
    if what == "nan":
        poses[1, 0, 3] = math.nan
    if what == "scaled":
        poses[1, :3, :3] *= 1.01
    if what == "mirrored":
        poses[1, 0, 0] = -1
    if what == "row":
        poses[0, 3, 0] = 0.5
    return "a string" if what == "string" else torch.from_numpy(poses)


def errors_of_begin() -> list:
    wanted = "begin_chunk: poses must be "
    return [
        ("missing", ValueError, [wanted + "[2, 4, 4] in mode 'worldkv'", "got None"]),
        ("frames", ValueError, [wanted + "[2, 4, 4]", "got [1, 4, 4]"]),
        ("flat", ValueError, [wanted + "[2, 4, 4]", "got [4, 4]"]),
        ("nan", ValueError, [wanted + "finite", "got nan"]),
        ("scaled", ValueError, [wanted + "rigid", "got frame 1"]),
        ("mirrored", ValueError, [wanted + "rigid", "got frame 1"]),
        ("row", ValueError, [wanted + "rigid", "got frame 0", "0.5"]),
        ("string", TypeError, [wanted + "an array [2, 4, 4]", "got str"]),
    ]


def raises(error_type, parts, call, *args, **kwargs) -> None:
    with pytest.raises(error_type) as caught:
        call(*args, **kwargs)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def state(memory: WorldMemory, chunk: int) -> tuple:
    return memory.stats(), [memory.location(past) for past in range(chunk)], memory.window.segments


def test_every_error_leaves_the_memory_as_before():
    """One rollout with every error provoked on the way equals one without, bitwise."""
    config = tiny(num_layers=2)
    memory, calm, rollout = make(config), make(config), Rollout(config, 7, 10)
    raises(RuntimeError, ["attend: a chunk must be begun", "got"], memory.attend, 0, *rollout.passes[0][0][0])
    raises(RuntimeError, ["end_chunk: a chunk must be begun", "got"], memory.end_chunk)
    raises(ValueError, ["location: chunk must be from 0", "got 0"], memory.location, 0)
    for chunk in range(10):
        layers = rollout.passes[chunk] = rollout.passes[chunk][:1]
        expected = rollout.chunk(calm, chunk)
        before = state(memory, chunk)
        for what, error_type, parts in errors_of_begin():
            raises(error_type, parts, memory.begin_chunk, bad_poses(what))
            assert state(memory, chunk) == before
        raises(ValueError, ["location: chunk must be", f"got {chunk}"], memory.location, chunk)
        raises(ValueError, ["location: chunk must be", "got -1"], memory.location, -1)
        memory.begin_chunk(rollout.poses[chunk])
        before = state(memory, chunk)
        raises(
            RuntimeError, [f"begin_chunk: chunk {chunk} must be ended", "got a second begin_chunk"],
            memory.begin_chunk, rollout.poses[chunk],
        )  # fmt: skip
        q, k, v = layers[0][0][:3]
        ones, short = torch.ones(HEAD_DIM), torch.ones(HEAD_DIM - 1)
        for layer in (-1, 2):
            raises(ValueError, ["attend: layer must be from 0 to 1", f"got {layer}"], memory.attend, layer, q, k, v)
        raises(ValueError, ["norm_rope_append: q must be", "got [64]"], memory.attend, 0, q[0], k, v)
        raises(ValueError, ["norm_rope_append: k must be", "got [11, 64]"], memory.attend, 0, q, k[1:], v)
        raises(TypeError, ["norm_rope_append: v must be", "torch.float64"], memory.attend, 0, q, k, v.double())
        raises(TypeError, ["norm_rope_append: q must be", "got None"], memory.attend, 0, None, k, v)
        raises(ValueError, ["norm_rope_append: q_weight must be", "[63]"], memory.attend, 0, q, k, v, short)
        raises(ValueError, ["norm_rope_append: k_weight must be", "[63]"], memory.attend, 0, q, k, v, ones, short)
        raises(
            ValueError, ["segment_attention: out must be", "got [12, 1, 32]"],
            memory.attend, 0, q, k, v, out=torch.empty(12, 1, 32),
        )  # fmt: skip
        got = [memory.attend(0, *layers[0][0])]
        raises(RuntimeError, [f"end_chunk: chunk {chunk} must attend every layer", "layers [1]"], memory.end_chunk)
        assert state(memory, chunk) == before
        got.append(memory.attend(1, *layers[0][1]))
        memory.end_chunk()
        raises(RuntimeError, ["end_chunk: a chunk must be begun"], memory.end_chunk)
        raises(RuntimeError, ["attend: a chunk must be begun"], memory.attend, 0, q, k, v)
        assert same(got, expected)
        assert memory.stats() == calm.stats()


def test_too_few_or_too_many_tokens():
    memory = make(tiny())
    memory.begin_chunk(bad_poses("none"))
    x = torch.zeros(11, HEAD_DIM)
    raises(ValueError, ["attend: q must have the chunk's 12 tokens", "got 11"], memory.attend, 0, x, x, x)


def test_poses_are_checked_in_every_mode_and_needed_in_one():
    for mode in ("full", "sliding", "sink_recent"):
        memory = make(tiny(mode=mode, bank_chunks=4))
        raises(ValueError, ["begin_chunk: poses must be rigid"], memory.begin_chunk, bad_poses("scaled"))
        assert memory.begin_chunk().chunk == 0


def test_fov_needs_intrinsics():
    memory = make(tiny(retrieval="fov"))
    poses = bad_poses("none")
    for intrinsics, error_type, parts in [
        (None, ValueError, ["[2, 4]", "got None"]),
        (np.ones((3, 4)), ValueError, ["[2, 4] or [4]", "got [3, 4]"]),
        ([1.0, 1.0, 0.0, 1.0], ValueError, ["positive fx, fy, cx, cy", "0.0"]),
        ([1.0, math.nan, 1.0, 1.0], ValueError, ["positive", "nan"]),
        ("wide", TypeError, ["an array [2, 4] or [4]", "got str"]),
    ]:
        parts = ["begin_chunk: intrinsics must be", *parts]
        raises(error_type, parts, memory.begin_chunk, poses, intrinsics=intrinsics)
        assert memory.stats()["chunks"] == 0
    for dtype in (torch.float32, torch.bfloat16):
        assert memory.begin_chunk(poses, intrinsics=torch.tensor([10.0, 10, 5, 5], dtype=dtype)).chunk == 0
        memory.abort_chunk()


@pytest.mark.parametrize("mode", ["worldkv", "sliding"])
def test_rope_positions_run_out(mode):
    config = tiny(mode=mode, rope=Rope3D(HEAD_DIM, max_position=9))  # four chunks of 2, one position left over
    memory, rollout = make(config), Rollout(config, 0, 4)
    for _ in rollout.run(memory):
        pass
    before = state(memory, 4)
    raises(RuntimeError, ["begin_chunk: chunk must be below 4", "got chunk 4"], memory.begin_chunk, rollout.poses[0])
    assert state(memory, 4) == before
    memory.reset()
    assert memory.begin_chunk(rollout.poses[0]).chunk == 0


def test_full_ends_with_its_pool():
    config = tiny(mode="full", bank_chunks=3)
    memory, rollout = make(config), Rollout(config, 0, 3)
    for _ in rollout.run(memory):
        pass
    raises(RuntimeError, ["begin_chunk: chunk must be below 3", "mode 'full'", "got chunk 3"], memory.begin_chunk)
    assert [memory.location(chunk) for chunk in range(3)] == ["recent"] * 3


@pytest.mark.parametrize("choice", [[1, 1], [9], [1, 2, 3], [0]])
def test_a_policy_that_selects_what_is_not_on_offer(choice):
    class Wrong(Newest):
        def select(self, current, candidates, budget):
            return choice if len(candidates) == 3 else []

    config = tiny(retrieval=Wrong())
    memory, rollout = make(config), Rollout(config, 0, 7)
    for chunk in range(6):
        rollout.chunk(memory, chunk)
    before = state(memory, 6)
    parts = ["begin_chunk: the retrieval policy must select up to 2", "[1, 2, 3]", f"got {choice}"]
    raises(ValueError, parts, memory.begin_chunk, rollout.poses[6])
    assert state(memory, 6) == before


def test_unknown_backend():
    memory = WorldMemory(tiny(), dtype=torch.float32, backend="metal")
    memory.begin_chunk(bad_poses("none"))
    x = torch.zeros(12, HEAD_DIM)
    raises(ValueError, ["norm_rope_append: backend must be", "metal"], memory.attend, 0, x, x, x)


def test_a_policy_that_drops_what_is_not_there():
    """An error that names the choice; the chunk stays begun and nothing has changed, so it may be tried again."""

    class Wrong(PoseRetrieval):
        def drop(self, candidates):
            return 77 if self.wrong else candidates[0][0]

    policy = Wrong()
    config = tiny(retrieval=policy, sink_frames=0, recent_frames=0, retrieved_chunks=1, bank_chunks=1)
    memory, rollout = make(config), Rollout(config, 0, 2)
    rollout.chunk(memory, 0)
    memory.begin_chunk(rollout.poses[1])
    memory.attend(0, *rollout.passes[1][0][0])
    before, policy.wrong = state(memory, 1), True
    for _ in range(2):
        raises(ValueError, ["end_chunk: the retrieval policy must drop one of [0, 1]", "got 77"], memory.end_chunk)
        assert state(memory, 1) == before
    policy.wrong = False
    memory.end_chunk()
    assert (memory.location(0), memory.location(1)) == ("dropped", "bank")


@pytest.mark.parametrize("bank", ["device", "host"])
def test_attend_traces_through_torch_compile_and_a_new_window_compiles_nothing(bank):
    config = tiny(num_layers=2, bank=bank, device_slots=2)
    eager, compiled, rollout = make(config), make(config), Rollout(config, 3, 8)

    def layers(memory, x, weight):
        for layer in range(2):
            x = x + memory.attend(layer, x * 2, x, x, weight, weight).flatten(1)
        return x

    torch._dynamo.reset()
    traced = torch.compile(layers, fullgraph=True, backend="aot_eager")
    weight = torch.ones(HEAD_DIM)
    graphs = []
    for chunk in range(8):
        for memory in (eager, compiled):
            memory.begin_chunk(rollout.poses[chunk])
            memory.wait()
        x = rollout.passes[chunk][0][0][0]
        assert torch.equal(layers(eager, x, weight), traced(compiled, x, weight))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        for memory in (eager, compiled):
            memory.end_chunk()
    assert graphs[2] == graphs[-1]


@pytest.mark.parametrize("made_in", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("used_in", [torch.no_grad, torch.inference_mode])
def test_no_grad_and_inference_mode_mix(made_in, used_in):
    config = tiny()
    rollout, calm = Rollout(config, 1, 6), make(config)
    weight = torch.nn.Parameter(torch.ones(HEAD_DIM))
    with made_in():
        memory = make(config)
    for chunk in range(6):
        q, k, v = rollout.passes[chunk][0][0][:3]
        with used_in():
            memory.begin_chunk(rollout.poses[chunk])
            got = memory.attend(0, q, k, v, weight, weight)
            memory.end_chunk()
        calm.begin_chunk(rollout.poses[chunk])
        assert torch.equal(got, calm.attend(0, q, k, v, weight.detach(), weight.detach()))
        calm.end_chunk()
