"""What a bank keeps for the policies here, against brute force: every chunk selected and every chunk dropped."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_retrieval import Plain, PlainContents

import worldkv_kernels.memory.frusta as frusta_module
import worldkv_kernels.memory.kept as kept_module
from worldkv_kernels.memory.bank import Bank
from worldkv_kernels.memory.frusta import Frusta
from worldkv_kernels.memory.kept import KeptContents, KeptDescriptions, KeptPoses, KeptViews, keep
from worldkv_kernels.memory.pairs import Pairs
from worldkv_kernels.memory.pool import Pool
from worldkv_kernels.memory.retrieval import (
    ActionRetrieval,
    ContentRetrieval,
    FovRetrieval,
    OfficialPoseRetrieval,
    PoseRetrieval,
)
from worldkv_kernels.memory.store import WholeStore

CAMERA = np.array([[300.0, 300.0, 200.0, 150.0]])
CAMERAS = (CAMERA, np.array([[500.0, 250.0, 150.0, 220.0]]))  # wide, and tall
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
    return Bank(WholeStore(pool, pool.first_rows[0], tokens=1), places=places, on_host=False, policy=policy)


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
        view = policy.describe(pose[None], CAMERAS[rng.random() < 0.2])
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
        slot, kept[chunk] = bank.slot_to_fill(chunk, view), view
        if full:
            given_up = plain.drop(kept)
            del kept[given_up]
            dropped += 1
            assert (slot is None) == (given_up == chunk)
        if slot is not None and rng.random() < 0.1:
            bank.break_off(chunk)
            del kept[chunk]
        assert list(bank._place) == list(kept) and bank.num_dropped == dropped
        free = {number: of for number, of in kept.items() if rng.random() < 0.7}
        if free:
            assert bank._kept.drop(kept.keys() - free.keys()) == plain.drop(free)
        chunk += 1
        if rng.random() < 0.03:
            bank.clear()
            kept, chunk, dropped = {}, 0, 0


sessions = dict(
    retrieval=st.sampled_from(["pose", "action", "fov"]), kind=st.sampled_from(PATHS), seed=st.integers(0, 2**31),
    capacity=st.integers(1, 12), diversity=st.sampled_from([0.0, 0.5]), unit=st.sampled_from(UNITS),
    noise=st.sampled_from([0.0, 1e-15, 1e-7, 3e-4]), first=st.integers(0, 2),
)  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(**sessions)
def test_sessions_choose_as_brute_force_does(**session):
    check_session(**session)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None, derandomize=True, database=None)
@given(**sessions)
def test_thousands_of_sessions_choose_as_brute_force_does(**session):
    check_session(**session, length=60)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**31), capacity=st.integers(1, 9), diversity=st.sampled_from([0.0, 0.5, 1.0]),
    skip=st.integers(0, 5), values=st.sampled_from([2, 4, 100]), vectors=st.integers(1, 3), first=st.integers(0, 2),
)  # fmt: skip
def test_contents_are_chosen_as_brute_force_does(seed, capacity, diversity, skip, values, vectors, first):
    """Of small integers, of which sums are exact and many are ties; chunk by chunk by the policy itself, too."""
    rng, policy = np.random.default_rng(seed), ContentRetrieval(skip_newest=skip, diversity=diversity)
    bank, plain = bank_of(policy, capacity), PlainContents(policy)
    kept: dict[int, np.ndarray] = {}
    for chunk in range(25):
        content = rng.integers(values, size=(vectors, 3)).astype(np.float32)
        current, budget = rng.integers(values, size=3).astype(np.float32), int(rng.integers(0, 5))
        on_offer = {number: of for number, of in kept.items() if number >= first}
        chosen = plain.select(current, on_offer, budget)
        assert bank.select("test", current, budget, first=first) == chosen
        assert policy.select(current, list(on_offer.items()), budget) == chosen
        if chunk >= first and rng.random() < 0.5:
            coming = bank.select("test", current, budget, first=first, coming=(chunk, content))
            assert coming == plain.select(current, {**on_offer, chunk: content}, budget)
        kept[chunk] = content
        if len(kept) > capacity:
            given_up = plain.drop(kept)
            assert policy.drop(list(kept.items())) == given_up
            del kept[given_up]
        bank.slot_to_fill(chunk, content)
        assert list(bank._place) == list(kept)
        assert all(np.array_equal(bank.description(number), of) for number, of in kept.items())
        assert bank._kept._contents(slice(None))[0].flags.c_contiguous  # products read it as it lies
        free = {number: of for number, of in kept.items() if rng.random() < 0.7}
        if free:
            assert bank._kept.drop(kept.keys() - free.keys()) == plain.drop(free)


@pytest.mark.parametrize("kind", PATHS)
def test_a_large_bank_drops_as_brute_force_does(kind, monkeypatch):
    """Of more pairs than are compared at once."""
    monkeypatch.setattr(kept_module, "_BLOCK", 1000)
    rng, policy = np.random.default_rng(1), PoseRetrieval()
    bank, plain, kept = bank_of(policy, 100), Plain(policy), {}
    for chunk, pose in enumerate(camera_path(kind, rng, 160, 1.0, 1e-4)):
        bank.slot_to_fill(chunk, pose)
        kept[chunk] = pose
        if len(kept) > 100:
            del kept[plain.drop(kept)]
            assert list(bank._place) == list(kept)


@pytest.mark.parametrize("samples", [16, 700])
@pytest.mark.parametrize("kind", PATHS)
def test_overlaps_are_those_of_brute_force_and_few_are_looked_at(kind, samples, monkeypatch):
    monkeypatch.setattr(frusta_module, "_BLOCK", 2000)
    rng, policy = np.random.default_rng(2), FovRetrieval(depth_range=(0.5, 6.0), samples=samples)
    kept, plain, looked_at = KeptViews(policy, 40), Plain(policy), []
    inside = Frusta._inside
    monkeypatch.setattr(Frusta, "_inside", lambda frusta, turns: looked_at.append(turns) or inside(frusta, turns))
    views = [policy.describe(pose[None], CAMERAS[i % 2]) for i, pose in enumerate(camera_path(kind, rng, 40, 1.0, 0.1))]
    for chunk, view in enumerate(views):
        kept.add(chunk, view)
    looked_at.clear()
    sharing = 0
    for view in views:
        seen = kept._seen(view[0], *Frusta.matrices(*view[:2]), slice(40))
        expected = [samples * (plain.seen(view[2], one) + plain.seen(one[2], view)) for one in views]
        assert seen.tolist() == np.rint(expected).tolist()
        sharing += np.count_nonzero(seen)
    assert seen[-1] == 2 * samples  # of itself
    pairs = sum(turns.shape[2] for turns in looked_at) // 2
    assert sharing <= pairs and (kind != "jump" or pairs < 40 * 40 // 4)


def test_pairs_follow_rows_that_move():
    rng, pairs, square = np.random.default_rng(3), Pairs(np.int64), np.zeros((9, 9), dtype=np.int64)
    pairs.grow(4)
    for row in range(9):
        if row == 4:
            pairs.grow(9)
        square[row, :row] = square[:row, row] = rng.integers(1000, size=row)
        pairs.put(row, square[row, :row])
    for count, row in ((9, 3), (8, 0), (7, 5), (6, 4)):  # the last row but one too
        last = count - 1
        pairs.move(last, row)
        square[row], square[:, row] = square[last], square[:, last]
        square[row, row] = 0
        for one in range(last):
            assert pairs.of(one, last, 0).tolist() == square[one, :last].tolist()
            assert np.sort(pairs.all(last)[pairs.places(one, last)]).tolist() == sorted(
                square[one, :last][np.arange(last) != one]
            )
        assert pairs.all(last).tolist() == [square[i, j] for i in range(last) for j in range(i)]


def test_a_chunk_foreseen_is_not_measured_again():
    policy = FovRetrieval(samples=16, diversity=0.5)
    kept, measured = KeptViews(policy, 9), []
    write = kept._describe
    kept._describe = lambda row, description: measured.append(row) or write(row, description)
    views = [policy.describe(pose[None], CAMERA) for pose in camera_path("walk", np.random.default_rng(0), 9, 1.0, 0.0)]
    kept.select(views[1], 3, 0, (0, views[0]))
    kept.add(0, views[0])
    assert measured == [0]
    kept.select(views[1], 3, 0, (1, views[1]))
    kept.add(1, views[2])  # another view of that chunk
    assert measured == [0, 1, 1]


def test_what_is_kept_is_bounded_by_the_bank():
    bank = bank_of(FovRetrieval(samples=4), 10)
    for chunk, pose in enumerate(camera_path("walk", np.random.default_rng(0), 300, 1.0, 0.0)):
        bank.slot_to_fill(chunk, bank._kept._policy.describe(pose[None], CAMERA))
        bank.select(
            "test", bank._kept._policy.describe(pose[None], CAMERA), 3, coming=(chunk + 1, (pose, np.ones(6), 0))
        )
    kept = bank._kept
    assert [array.shape[-1] for array in kept._arrays.values()] == [12] * 5
    assert [len(pairs.all(12)) for pairs in kept._pairs.values()] == [66] * 2
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
    policies = (PoseRetrieval(), ActionRetrieval(), FovRetrieval(), ContentRetrieval())
    for policy, kept in zip(policies, (KeptPoses, KeptPoses, KeptViews, KeptContents), strict=True):
        assert type(keep(policy, 3)) is kept
        assert type(keep(copy.deepcopy(policy), 3)) is kept
    poses = camera_path("turn", np.random.default_rng(3), 8, 1.0, 0.0)
    bank, asked = bank_of(OwnNoise(), 8), OwnNoise()
    for chunk, pose in enumerate(poses):
        bank.slot_to_fill(chunk, pose)
    assert bank.select("test", poses[-1], 8) == asked.select(poses[-1], list(enumerate(poses)), 8) == list(range(8))


def test_two_banks_share_a_policy_and_nothing_else():
    policy = PoseRetrieval()
    one, other = bank_of(policy, 4), bank_of(policy, 4)
    one.slot_to_fill(0, np.eye(4))
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
    bank.slot_to_fill(0, None)
    with pytest.raises(ValueError, match=r"end_chunk: the retrieval policy must drop one of \[0, 1\], got -1"):
        bank.slot_to_fill(1, None)
    bank.select("test", None, 1)
    assert offered == [[0]] and list(bank._place) == [0]
