"""memory.prefetch, for a caller who knows the next pose, and motion that goes on, for one who does not."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_memory import AWAY_AND_BACK, jumps, passes, tiny, walk

from worldkv_kernels import WorldMemory
from worldkv_kernels.actions import parse_actions
from worldkv_kernels.memory.retrieval import PoseRetrieval
from worldkv_kernels.memory.views import continued
from worldkv_kernels.trajectory import latent_poses, load


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
    coming = memory._coming(20, memory._view.description)
    chosen = memory._bank.select("", PoseRetrieval().describe(poses, None), 3, first=1, coming=coming)
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


def test_motion_is_foreseen_by_what_is_in_view():
    poses, intrinsics = AWAY_AND_BACK
    host, device = (tiny(retrieval="fov", bank=bank) for bank in ("host", "device"))
    for chunk in range(60):
        rows = slice(3 * chunk, 3 * chunk + 3)
        retrieved = [walk(memory, chunk, poses[rows], intrinsics=intrinsics[rows]) for memory in (host, device)]
        assert retrieved[0] == retrieved[1]
    assert host.stats()["host_misses"] == 0 and host.stats()["prefetch_hits"] > 10


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
        on_device = memory.prefetch(jumps(3, 1)[0])
        assert policy.calls == calls + stateless and bool(on_device) == stateless


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
