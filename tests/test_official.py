"""MemoryConfig.official() against the published algorithm, and the default against its faults.

The published algorithm is written out here from its description, in float64 and without the package.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from worldkv_kernels import MemoryConfig, WorldMemory
from worldkv_kernels.memory import room
from worldkv_kernels.memory.retrieval import OfficialPoseRetrieval, PoseRetrieval

NUM_CHUNKS, FRAMES = 30, 3
SMALL = dict(num_layers=1, num_heads=1, grid=(2, 2), head_dim=64)
# float32 in the published formula, where acos has a finite slope (the camera turns): some 1e-6 of the maximum.
NEAR_TIE = 1e-5


def yaw_pose(degrees: float, position=(0.0, 0.0, 0.0)) -> np.ndarray:
    a = math.radians(degrees)
    pose = np.eye(4)
    pose[:3, :3] = [[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]]
    pose[:3, 3] = position
    return pose


def turn_and_return(kind: str) -> np.ndarray:
    """90 latent frames, 4 degrees of yaw each, out and back: [30, 3, 4, 4]."""
    yaw = [4.0 * min(frame, 89 - frame) for frame in range(NUM_CHUNKS * FRAMES)]
    position = {
        "on the spot": lambda frame: (0.0, 0.0, 0.0),
        "there and back": lambda frame: (0.0, 0.0, 0.05 * min(frame, 89 - frame)),
        # nothing repeats, so that no two distances are equal
        "wandering": lambda frame: (0.031 * frame**1.1, 0.2 * math.sin(0.7 * frame), 0.05 * min(frame, 89 - frame)),
    }[kind]
    poses = [yaw_pose(degrees, position(frame)) for frame, degrees in enumerate(yaw)]
    return np.stack(poses).reshape(NUM_CHUNKS, FRAMES, 4, 4)


def published_distances(poses: np.ndarray, chunk: int, candidates: range) -> dict[int, float]:
    """Section 1 of the facts: means of translations and of matrices, acos, each over its maximum, half and half."""
    means = {c: (poses[c, :, :3, 3].mean(axis=0), poses[c, :, :3, :3].mean(axis=0)) for c in [*candidates, chunk]}
    dt, dr = {}, {}
    for c in candidates:
        dt[c] = float(np.sum((means[c][0] - means[chunk][0]) ** 2))
        cosine = (np.trace(means[c][1].T @ means[chunk][1]) - 1) / 2
        dr[c] = math.acos(max(-1.0, min(1.0, cosine)))
    for term in (dt, dr):
        largest = max(term.values())
        if largest > 0:
            for c in term:
                term[c] /= largest
    return {c: 0.5 * dt[c] + 0.5 * dr[c] for c in candidates}


def play(config: MemoryConfig, poses: np.ndarray):
    """The plans of all chunks, and the memory after the last; yields (memory, plan) with the chunk begun."""
    memory = WorldMemory(config, dtype=torch.float32, backend="reference")
    x = torch.randn(config.chunk_tokens, config.num_heads * config.head_dim, generator=torch.Generator().manual_seed(0))
    for chunk_poses in poses:
        plan = memory.begin_chunk(chunk_poses)
        yield memory, plan
        memory.attend(0, x, x, x)
        memory.end_chunk()


def official(**fields) -> MemoryConfig:
    return MemoryConfig.official(**{**SMALL, "bank_chunks": NUM_CHUNKS, **fields})


def default(**fields) -> MemoryConfig:
    return MemoryConfig(**{**SMALL, "bank_chunks": NUM_CHUNKS, **fields})


@pytest.mark.parametrize(("recent_frames", "retrieved_frames"), [(6, 18), (6, 6), (3, 18), (9, 9)])
@pytest.mark.parametrize("kind", ["on the spot", "there and back", "wandering"])
def test_retrieves_what_the_published_code_does(kind, recent_frames, retrieved_frames):
    poses = turn_and_return(kind)
    config = official(recent_frames=recent_frames, retrieved_frames=retrieved_frames)
    clear = 0
    for _, plan in play(config, poses):
        chunk = plan.chunk
        candidates = range(1, max(1, chunk - max(1, recent_frames // 3)))
        budget = min(retrieved_frames // 3, len(candidates))
        assert len(plan.retrieved) == budget
        if not candidates:
            continue
        distances = published_distances(poses, chunk, candidates)
        ordered = sorted(distances, key=lambda c: (distances[c], c))
        if np.diff(sorted(distances.values())).min(initial=1.0) > NEAR_TIE:
            clear += 1
            assert list(plan.retrieved) == ordered[:budget]
        # Among near ties the published code has no order: nearest first up to those, and none too far.
        got = [distances[c] for c in plan.retrieved]
        assert len(set(plan.retrieved)) == budget
        assert np.diff(got).min(initial=0.0) >= -NEAR_TIE
        assert got[-1] <= distances[ordered[budget - 1]] + NEAR_TIE
        assert all(c in plan.retrieved for c in candidates if distances[c] < distances[ordered[budget - 1]] - NEAR_TIE)
    if kind == "wandering":
        assert clear >= 24


@pytest.mark.parametrize("recent_frames", [3, 6, 9])
def test_window_and_its_hole(recent_frames):
    """Sink, retrieved nearest first, recent with the current chunk; the chunk before the recent ones is nowhere."""
    recent = recent_frames // 3  # with the current chunk
    for memory, plan in play(official(recent_frames=recent_frames, keep_ratio=0.5), turn_and_return("wandering")):
        chunk = plan.chunk
        attended = [(role, number) for role, number, _ in plan.segments]
        if chunk <= recent + 1:  # nothing is a candidate: the whole past is attended
            assert [number for _, number in attended] == list(range(chunk + 1))
            assert plan.retrieved == ()
            continue
        hole = chunk - recent
        assert attended == [
            ("sink", 0),
            *(("retrieved", number) for number in plan.retrieved),
            *(("recent", number) for number in range(hole + 1, chunk)),
            ("current", chunk),
        ]
        assert hole not in [number for _, number in attended]
        assert memory.location(hole) == "unattended"
        assert plan.num_tokens == 12 * (1 + recent) + 8 * len(plan.retrieved)
    if recent_frames == 6:
        assert hole == 27  # c - 2


def test_the_hole_is_open_at_every_step_from_chunk_4():
    holes = []
    for _, plan in play(official(), turn_and_return("on the spot")):
        attended = {number for _, number, _ in plan.segments}
        if plan.chunk >= 2 and plan.chunk - 2 not in attended:
            holes.append(plan.chunk)
    assert holes == list(range(4, NUM_CHUNKS))


def test_nothing_to_retrieve_leaves_sink_and_recent():
    """With no frames to retrieve, the published window is the sink and the recent frames, and no more."""
    for _, plan in play(official(retrieved_frames=0), turn_and_return("on the spot")):
        window = sorted({0, *range(max(0, plan.chunk - 1), plan.chunk + 1)})
        assert [number for _, number, _ in plan.segments] == window


def test_without_correction_no_key_is_turned():
    for _, plan in play(official(), turn_and_return("wandering")):
        assert all(segment.time_shift == 0 for _, _, segment in plan.segments)


def test_rope_correction():
    """Chunk j of m retrieved gets the frame recent_start - (m - j) * 3, nearest first; the sink and recent stay."""
    turned = 0
    for _, plan in play(official(rope_correction=True), turn_and_return("wandering")):
        recent_start = (plan.chunk + 1) * 3 - 6
        m = len(plan.retrieved)
        shifts = {number: segment.time_shift for _, number, segment in plan.segments}
        for j, chunk in enumerate(plan.retrieved):
            assert chunk * 3 + shifts[chunk] == recent_start - (m - j) * 3
            turned += shifts[chunk] != 0
        assert all(shifts[number] == 0 for role, number, _ in plan.segments if role != "retrieved")
    assert turned > 100


def test_official_banks_the_sink():
    for memory, _ in play(official(keep_ratio=0.5), turn_and_return("on the spot")):  # noqa: B007
        pass
    assert memory.location(0) == "sink"
    assert 0 in memory._bank
    stats = memory.stats()
    assert stats["chunks_banked"] == 28  # 0 to 27; 28 is the hole, 29 recent
    assert stats["kept_bytes"] == (3 * 12 + 28 * 8) * 64 * 4 * 2
    assert all(0 not in plan.retrieved for _, plan in play(official(), turn_and_return("on the spot")))


def test_published_values():
    config = official()
    assert (config.chunk_frames, config.sink_frames, config.retrieved_chunks) == (3, 3, 6)
    assert config.recent_frames == 3  # past frames: the published 6 include the current chunk
    assert (config.keep_ratio, config.pooled, config.order) == (0.5, True, "nearest_first")
    assert (config.prune_rule, config.merge_pruned) == ("similarity", False)
    assert isinstance(config.retrieval, OfficialPoseRetrieval)


def test_what_is_not_given_follows():
    config = official(chunk_frames=4)
    assert (config.sink_frames, config.recent_frames, config.retrieved_chunks) == (4, 4, 6)
    assert official(bank_chunks=5).retrieved_chunks == 5
    assert official(chunk_frames=4, bank_chunks=2, clip_frames=19 + 1).recent_frames == 4


@pytest.mark.parametrize("clip_frames", [3, 18, 20, 21, 22, 23])
def test_short_clips_are_refused(clip_frames):
    """Where the published code lets a chunk not attend to itself."""
    with pytest.raises(ValueError) as caught:
        official(clip_frames=clip_frames)
    message = str(caught.value)
    assert message.startswith("MemoryConfig.official: recent_frames") and "at least chunk_frames=3" in message
    assert f"got {clip_frames - 21} " in message


@pytest.mark.parametrize(("clip_frames", "recent"), [(24, 0), (27, 3), (30, 3), (3000, 3), (None, 3)])
def test_clip_shrinks_the_recent_frames(clip_frames, recent):
    assert official(clip_frames=clip_frames).recent_frames == recent


def test_shrunk_to_the_current_chunk_the_hole_is_the_chunk_before():
    for _, plan in play(official(clip_frames=24), turn_and_return("wandering")[:8]):
        attended = {number for _, number, _ in plan.segments}
        assert plan.chunk == 0 or (plan.chunk - 1 in attended) == (plan.chunk <= 2)
        assert set(plan.retrieved) <= set(range(1, plan.chunk - 1))


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        (dict(clip_frames=25), "official: recent_frames must be a multiple of chunk_frames=3, got 4"),
        (dict(retrieved_frames=7), "official: retrieved_frames must be a multiple of chunk_frames=3, got 7"),
        (dict(recent_frames=7), "official: recent_frames must be a multiple of chunk_frames=3, got 7"),
        (dict(recent_frames=0), "official: recent_frames, the current chunk included, must be at least"),
        (dict(sink_frames=2), "official: sink_frames must be a multiple of chunk_frames=3, got 2"),
        (dict(chunk_frames=4, recent_frames=6), "official: recent_frames must be a multiple of chunk_frames=4, got 6"),
        (dict(bank_chunks=5, retrieved_frames=18), "bank_chunks must be None or at least 6, since retrieved_chunks=6"),
        (dict(bank_chunks=0), "bank_chunks must be None or at least 1, got 0"),
    ],
)
def test_official_errors(fields, wanted):
    with pytest.raises(ValueError, match="MemoryConfig") as caught:
        official(**fields)
    assert wanted in str(caught.value)


# --- the default has none of the faults ---


def test_default_is_free_of_fault_1_no_chunk_falls_between():
    """Every past chunk is attended or on offer to retrieval, at every step."""
    for kind in ("on the spot", "wandering"):
        for memory, plan in play(default(), turn_and_return(kind)):
            attended = {number for _, number, _ in plan.segments}
            for past in range(plan.chunk):
                assert memory.location(past) in ("sink", "recent", "bank")
                assert past in attended or memory.location(past) == "bank"
            assert plan.chunk < 2 or plan.chunk - 2 in attended  # the published hole
        everything = default(retrieved_chunks=NUM_CHUNKS)
        for _, plan in play(everything, turn_and_return(kind)):
            assert sorted(number for _, number, _ in plan.segments) == list(range(plan.chunk + 1))


@pytest.mark.parametrize("fields", [{}, dict(recent_frames=0), dict(recent_frames=0, sink_frames=0)])
def test_default_is_free_of_fault_2_a_chunk_attends_to_itself(fields):
    for _, plan in play(default(**fields), turn_and_return("on the spot")):
        assert plan.segments[-1][:2] == ("current", plan.chunk)
        assert plan.segments[-1][2].num_rows == 12


def turning(degrees_a_frame: float, start: float = 0.0) -> np.ndarray:
    """Three frames around `start`."""
    return np.stack([yaw_pose(start + (frame - 1) * degrees_a_frame) for frame in range(3)])


def test_default_is_free_of_fault_3_identical_turning_chunks_are_at_distance_0():
    policy, far = PoseRetrieval(), turning(0, start=90)
    a, b, c = (policy.describe(poses, None) for poses in (turning(8), turning(8), far))
    assert policy.distances([a], [b, c], a)[0, 0] <= 1e-12
    # The published means are not rotations: the same chunk is 9.2 degrees from itself.
    _, mean = OfficialPoseRetrieval().describe(turning(8), None)
    assert math.degrees(math.acos((np.trace(mean.T @ mean) - 1) / 2)) == pytest.approx(9.2, abs=0.05)


def test_default_is_free_of_fault_3_a_static_chunk_is_not_favoured():
    """A turning view is made: its twin (chunk 1) is as near as a static chunk (2) with the same mean, and older."""
    chunks = {1: turning(8), 2: turning(0), 3: turning(0, start=90)}
    for policy, nearest in ((PoseRetrieval(), 1), (OfficialPoseRetrieval(), 2)):
        candidates = [(chunk, policy.describe(poses, None)) for chunk, poses in chunks.items()]
        assert policy.select(policy.describe(turning(8), None), candidates, 1) == [nearest]


def noisy(poses: np.ndarray, size: float, seed: int) -> np.ndarray:
    """With translations off by `size`, and in float32 as models hold them."""
    poses = poses.copy()
    poses[:, :3, 3] += np.random.default_rng(seed).normal(size=(len(poses), 3)) * size
    return poses.astype(np.float32).astype(np.float64)


def test_default_is_free_of_fault_4_noise_in_translation_is_not_blown_up():
    """A camera that only turns, 3 units from the origin: the order is that of the angles alone."""
    policy = PoseRetrieval()
    for seed in range(20):
        chunks = {chunk: noisy(turning(2, start=10.0 * chunk), 0.0, 0) for chunk in range(8)}
        for chunk, poses in chunks.items():
            poses[:, :3, 3] += 3.0
            chunks[chunk] = noisy(poses, 3e-7, seed * 10 + chunk)
        candidates = [(chunk, policy.describe(poses, None)) for chunk, poses in chunks.items() if chunk != 3]
        assert policy.select(policy.describe(chunks[3], None), candidates, 7) == [2, 4, 1, 5, 0, 6, 7]


def test_default_is_free_of_fault_4_noise_in_rotation_is_not_blown_up():
    """A camera that only moves: the order is that of the distances alone."""
    policy = PoseRetrieval()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        chunks = {}
        for chunk in range(8):
            poses = np.stack([yaw_pose(30 + rng.normal() * 1e-5, (float(chunk), 0, 0)) for _ in range(3)])
            chunks[chunk] = policy.describe(poses.astype(np.float32).astype(np.float64), None)
        candidates = [(chunk, view) for chunk, view in chunks.items() if chunk != 3]
        # Positions are exact here, so 2 and 4, 1 and 5, 0 and 6 are ties, and the older goes first.
        assert policy.select(chunks[3], candidates, 7) == [2, 4, 1, 5, 0, 6, 7]


def test_default_is_free_of_fault_4_all_candidates_in_one_place():
    """Identical but for noise: all tie, the oldest go first. The published code orders them by the noise."""
    picks = {policy: set() for policy in (PoseRetrieval, OfficialPoseRetrieval)}
    for seed in range(20):
        for policy, seen in picks.items():
            chunks = [policy().describe(noisy(turning(0), 1e-8, seed * 10 + chunk), None) for chunk in range(9)]
            seen.add(tuple(policy().select(chunks[8], list(enumerate(chunks[:8])), 3)))
    assert picks[PoseRetrieval] == {(0, 1, 2)}
    assert len(picks[OfficialPoseRetrieval]) > 10


def test_default_is_free_of_fault_5_ties_go_to_the_older_chunk():
    standing = np.tile(np.eye(4), (NUM_CHUNKS, FRAMES, 1, 1))
    for _, plan in play(default(), standing):
        assert list(plan.retrieved) == list(range(1, min(7, max(1, plan.chunk - 2))))
    # Round and round, 5 chunks a lap, with float noise from composing the pose step by step.
    step, pose, laps = yaw_pose(360 / 15, (0.3, 0.0, 0.1)), yaw_pose(11.0), []
    for _ in range(NUM_CHUNKS * FRAMES):
        laps.append(pose)
        pose = pose @ step
    laps = np.stack(laps).reshape(NUM_CHUNKS, FRAMES, 4, 4)
    for _, plan in play(default(retrieved_chunks=2, order="nearest_first"), laps):
        same = [past for past in range(1, max(1, plan.chunk - 2)) if past % 5 == plan.chunk % 5]
        assert list(plan.retrieved[: len(same)]) == same[: len(plan.retrieved)]


def test_default_is_free_of_fault_6_frames_follow_each_other():
    """rebase_time with order="time": ascending, without a gap, from the sink to the current chunk."""
    for _, plan in play(default(rebase_time=True, order="time"), turn_and_return("wandering")):
        frames = [number * 3 + segment.time_shift for _, number, segment in plan.segments]
        assert frames == list(range(frames[0], plan.start_frame + 1, 3))
        assert frames[-1] == plan.start_frame
        numbers = [number for _, number, _ in plan.segments]
        assert numbers == sorted(numbers)


def test_default_is_free_of_fault_6_the_nearest_view_can_have_the_nearest_slot():
    poses, config = turn_and_return("wandering"), default(rebase_time=True, order="nearest_last")
    policy = PoseRetrieval()
    views = [policy.describe(chunk, None) for chunk in poses]
    for _, plan in play(config, poses):
        if not plan.retrieved:
            continue
        current = views[plan.chunk]
        candidates = [views[chunk] for chunk in range(1, plan.chunk - 2)]
        distances = policy.distances([current], candidates, current)[0]
        frames = {number: number * 3 + segment.time_shift for _, number, segment in plan.segments}
        by_slot = sorted(plan.retrieved, key=lambda chunk: -frames[chunk])  # the latest virtual frame first
        assert np.diff([distances[chunk - 1] for chunk in by_slot]).min(initial=0) >= -1e-6
        assert frames[by_slot[0]] == plan.start_frame - 6 - 3


def test_default_is_free_of_fault_7_the_sink_is_not_banked_and_the_bank_is_bounded():
    for memory, plan in play(default(bank_chunks=8), turn_and_return("wandering")):
        assert 0 not in memory._bank
        assert memory.stats()["chunks_banked"] <= 8
        assert plan.chunk == 0 or memory.location(0) == "sink"
    assert memory.stats()["chunks_dropped"] == 30 - 1 - 2 - 8  # past chunks, sink, recent, banked
    unbounded = WorldMemory(dataclasses.replace(default(), bank_chunks=None), dtype=torch.float32)
    assert unbounded.stats()["bank_capacity"] == room.BANK_LIMIT
