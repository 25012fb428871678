"""What a bank keeps for the policies here, against brute force: every chunk selected and every chunk dropped."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_retrieval import Plain

from worldkv_kernels.memory.bank import Bank
from worldkv_kernels.memory.kept import KeptDescriptions, KeptPoses, KeptViews, keep
from worldkv_kernels.memory.pool import Pool
from worldkv_kernels.memory.retrieval import ActionRetrieval, FovRetrieval, OfficialPoseRetrieval, PoseRetrieval

CAMERA = np.array([[300.0, 300.0, 200.0, 150.0]])
PATHS = ("walk", "stand", "loop", "turn", "move", "again", "jump", "grid")
UNITS = (1e-8, 1e-3, 1.0, 1e6, 1e8)


def camera_path(kind: str, rng: np.random.Generator, length: int, unit: float, noise: float) -> np.ndarray:
    """Poses [length, 4, 4]."""
    if kind == "again":
        return camera_path("jump", rng, 4, unit, 0.0)[rng.integers(0, 4, size=length)]
    yaws, places = np.zeros(length), np.zeros((length, 3))
    if kind in ("walk", "turn", "jump"):
        yaws = np.cumsum(rng.choice([-0.3, 0.0, 0.3], size=length)) if kind != "jump" else rng.uniform(-3, 3, length)
    if kind in ("walk", "move"):
        places = np.cumsum(rng.choice([-1.0, 0.0, 1.0], size=(length, 3)), axis=0)
    elif kind == "jump":
        places = rng.normal(size=(length, 3)) * 5
    elif kind == "loop":
        yaws = np.arange(length) * (2 * math.pi / 8)
        places = np.stack([np.sin(yaws), 0 * yaws, np.cos(yaws)], axis=1) * 3
    elif kind == "grid":
        yaws, places = rng.integers(0, 4, length) * (math.pi / 2), rng.integers(0, 3, (length, 3)) * 1.0
    yaws = yaws + rng.normal(size=length) * noise
    poses = np.tile(np.eye(4), (length, 1, 1))
    poses[:, 0, 0] = poses[:, 2, 2] = np.cos(yaws)
    poses[:, 0, 2], poses[:, 2, 0] = np.sin(yaws), -np.sin(yaws)
    poses[:, :3, 3] = (places + rng.normal(size=(length, 3)) * noise) * unit
    return poses


def bank_of(policy, places: int) -> Bank:
    pool = Pool([(1, places)], num_layers=1, num_heads=1, head_dim=64, device=torch.device("cpu"), dtype=torch.float32)
    return Bank(pool, pool.first_rows[0], tokens=1, places=places, on_host=False, policy=policy)


def policy_of(retrieval: str, diversity: float, unit: float = 1.0):
    if retrieval == "fov":
        return FovRetrieval(depth_range=(unit, 10 * unit), diversity=diversity, samples=16)
    return {"pose": PoseRetrieval, "action": ActionRetrieval}[retrieval](diversity=diversity)


def check_session(retrieval, kind, seed, capacity, diversity, unit, noise, first=0, length=40) -> None:
    """A session on one bank: chunks come, some are broken off or seen only as coming, some begin the bank anew."""
    rng, policy = np.random.default_rng(seed), policy_of(retrieval, diversity, unit)
    bank, plain = bank_of(policy, capacity), Plain(policy)
    kept: dict[int, object] = {}
    chunk = dropped = 0
    for pose in camera_path(kind, rng, length, unit, noise):
        view = policy.describe(pose[None], CAMERA)
        on_offer = {number: of for number, of in kept.items() if number >= first}
        budget = int(rng.integers(0, 7))
        assert bank.select("test", view, budget, first=first) == plain.select(view, on_offer, budget)
        if chunk >= first and rng.random() < 0.5:
            coming = policy.describe(camera_path("jump", rng, 1, unit, 0.0), CAMERA) if rng.random() < 0.5 else view
            chosen = bank.select("test", view, budget, first=first, coming=(chunk, coming))
            assert chosen == plain.select(view, {**on_offer, chunk: coming}, budget)
        if rng.random() < 0.1:
            continue  # aborted
        full = len(kept) == capacity
        row, kept[chunk] = bank.row_to_fill(chunk, view), view
        if full:
            given_up = plain.drop(kept)
            del kept[given_up]
            dropped += 1
            assert (row is None) == (given_up == chunk)
        if row is not None and rng.random() < 0.1:
            bank.break_off(chunk)
            del kept[chunk]
        assert list(bank._place) == list(kept) and bank.num_dropped == dropped
        chunk += 1
        if rng.random() < 0.03:
            bank.clear()
            kept, chunk, dropped = {}, 0, 0


sessions = dict(
    retrieval=st.sampled_from(["pose", "action", "fov"]), kind=st.sampled_from(PATHS), seed=st.integers(0, 2**31),
    capacity=st.integers(1, 12), diversity=st.sampled_from([0.0, 0.5]), unit=st.sampled_from(UNITS),
    noise=st.sampled_from([0.0, 1e-15, 1e-7, 3e-4]), first=st.integers(0, 2),
)  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(**sessions)
def test_sessions_choose_as_brute_force_does(**session):
    check_session(**session)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None, derandomize=True, database=None)
@given(**sessions)
def test_thousands_of_sessions_choose_as_brute_force_does(**session):
    check_session(**session, length=60)


@pytest.mark.parametrize("kind", PATHS)
def test_a_large_bank_drops_as_brute_force_does(kind):
    """Of more chunks than are compared at once."""
    rng, policy = np.random.default_rng(1), PoseRetrieval()
    bank, plain, kept = bank_of(policy, 200), Plain(policy), {}
    for chunk, pose in enumerate(camera_path(kind, rng, 260, 1.0, 1e-4)):
        bank.row_to_fill(chunk, pose)
        kept[chunk] = pose
        if len(kept) > 200:
            del kept[plain.drop(kept)]
            assert list(bank._place) == list(kept)


def test_what_is_kept_is_bounded_by_the_bank():
    bank = bank_of(FovRetrieval(samples=4), 10)
    for chunk, pose in enumerate(camera_path("walk", np.random.default_rng(0), 300, 1.0, 0.0)):
        bank.row_to_fill(chunk, bank._kept._policy.describe(pose[None], CAMERA))
        bank.select(
            "test", bank._kept._policy.describe(pose[None], CAMERA), 3, coming=(chunk + 1, (pose, np.ones(6), 0))
        )
    kept = bank._kept
    assert [len(array) for array in (*kept._arrays(), kept._dt, kept._dr)] == [12] * 6
    assert bank.num_dropped == 290
    assert all(not isinstance(value, list) or len(value) <= 10 for value in vars(bank).values())


def test_who_chooses_in_a_way_of_its_own_is_asked():
    class OwnDrop(PoseRetrieval):
        def drop(self, candidates):
            return candidates[0][0]

    class OwnDistances(FovRetrieval):
        def distances(self, views, others, current):
            return np.zeros((len(views), len(others)))

    class OwnNoise(PoseRetrieval):
        ROTATION_NOISE = 10.0

    patched = PoseRetrieval()
    patched.select = lambda current, candidates, budget: []
    for policy in (OwnDrop(), OwnDistances(), OfficialPoseRetrieval(), patched):
        assert type(keep(policy, 3)) is KeptDescriptions
    for policy, kept in ((PoseRetrieval(), KeptPoses), (ActionRetrieval(), KeptPoses), (FovRetrieval(), KeptViews)):
        assert type(keep(policy, 3)) is kept
        assert type(keep(copy.deepcopy(policy), 3)) is kept
    poses = camera_path("turn", np.random.default_rng(3), 8, 1.0, 0.0)
    bank, asked = bank_of(OwnNoise(), 8), OwnNoise()
    for chunk, pose in enumerate(poses):
        bank.row_to_fill(chunk, pose)
    assert bank.select("test", poses[-1], 8) == asked.select(poses[-1], list(enumerate(poses)), 8) == list(range(8))


def test_two_banks_share_a_policy_and_nothing_else():
    policy = PoseRetrieval()
    one, other = bank_of(policy, 4), bank_of(policy, 4)
    one.row_to_fill(0, np.eye(4))
    assert other.select("test", np.eye(4), 3) == [] and one.select("test", np.eye(4), 3) == [0]


def test_a_refused_drop_leaves_what_is_kept():
    offered = []

    class Refused(OfficialPoseRetrieval):
        def select(self, current, candidates, budget):
            offered.append([chunk for chunk, _ in candidates])
            return []

        def drop(self, candidates):
            return -1

    bank = bank_of(Refused(), 1)
    bank.row_to_fill(0, None)
    with pytest.raises(ValueError, match=r"end_chunk: the retrieval policy must drop one of \[0, 1\], got -1"):
        bank.row_to_fill(1, None)
    bank.select("test", None, 1)
    assert offered == [[0]] and list(bank._place) == [0]
