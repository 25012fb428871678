"""Retrieval policies against brute force: distances, ties, diversity, what a full bank gives up."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_memory import PoseOrder

from worldkv_kernels.memory.retrieval import (
    FovRetrieval,
    NearestPolicy,
    OfficialPoseRetrieval,
    PoseRetrieval,
    RetrievalPolicy,
    make_policy,
)

fuzz = settings(max_examples=100, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31)


def yaw_pose(degrees: float, position=(0.0, 0.0, 0.0)) -> np.ndarray:
    a = math.radians(degrees)
    pose = np.eye(4)
    pose[:3, :3] = [[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]]
    pose[:3, 3] = position
    return pose


def standing(degrees: float, position=(0.0, 0.0, 0.0)) -> np.ndarray:
    """A chunk of three equal poses."""
    return np.tile(yaw_pose(degrees, position), (3, 1, 1))


def random_chunks(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    chunks = []
    for _ in range(count):
        yaw, position = rng.uniform(-180, 180), rng.normal(size=3) * 3
        steps = rng.normal(size=4) * (5, 0.2, 0.2, 0.2)
        chunks.append(np.stack([yaw_pose(yaw + i * steps[0], position + i * steps[1:]) for i in range(3)]))
    return chunks


class Points(NearestPolicy):
    """Descriptions are numbers, distances their difference: the order can be worked out by hand."""

    def distances(self, views, others, current):
        return np.abs(np.array(views, dtype=float)[:, None] - np.array(others, dtype=float)[None, :])


def pick(policy, current, candidates: dict, budget: int) -> list[int]:
    return policy.select(current, list(candidates.items()), budget)


# --- the order ---


@fuzz
@given(seeds, st.integers(1, 12), st.integers(0, 14))
def test_pose_order_is_the_slow_one(seed, count, budget):
    chunks = random_chunks(np.random.default_rng(seed), count + 1)
    policy, slow = PoseRetrieval(), PoseOrder()
    views, slow_views = [policy.describe(x, None) for x in chunks], [slow.describe(x) for x in chunks]
    candidates, slow_candidates = (dict(enumerate(x[:-1])) for x in (views, slow_views))
    scales = slow.scales(slow_views[-1], slow_views[:-1])
    want = [slow.distance(slow_views[-1], view, scales) for view in slow_views[:-1]]
    got = policy.distances([views[-1]], views[:-1], views[-1])[0]
    assert np.abs(got - want).max() <= 1e-7  # rotation_angles near pi
    assert pick(policy, views[-1], candidates, budget) == slow.select(slow_views[-1], slow_candidates, budget)
    assert policy.drop(list(candidates.items())) == slow.drop(slow_candidates)


@fuzz
@given(seeds, st.integers(2, 10))
def test_pose_distances_do_not_depend_on_the_world_frame(seed, count):
    """A rotation of the world, and twice the unit of length. (Noise is relative to the origin, so no translation.)"""
    rng = np.random.default_rng(seed)
    chunks, policy = random_chunks(rng, count), PoseRetrieval()
    world = yaw_pose(rng.uniform(-180, 180))
    moved = [world @ x for x in chunks]
    for x in moved:
        x[:, :3, 3] *= 2
    a, b = ([policy.describe(x, None) for x in some] for some in (chunks, moved))
    assert np.abs(policy.distances(a, a, a[0]) - policy.distances(b, b, b[0])).max() < 1e-7


def test_pose_distance_by_hand():
    """dt = 1 and 4 units squared, dr = 90 and 30 degrees: 0.5 * 1/4 + 0.5 * 1 and 0.5 * 1 + 0.5 * 1/3."""
    policy = PoseRetrieval()
    now, a, b = (policy.describe(standing(*x), None) for x in ((0,), (90, (1, 0, 0)), (-30, (0, 0, 2))))
    assert policy.distances([now], [a, b], now)[0] == pytest.approx([0.625, 0.5 + 1 / 6], abs=1e-12)
    assert policy.distances([now], [now], now).tolist() == [[0.0]]


@pytest.mark.parametrize("policy", [PoseRetrieval(), FovRetrieval(), OfficialPoseRetrieval(), Points()])
def test_nothing_to_pick(policy):
    view = 0.0 if isinstance(policy, Points) else policy.describe(standing(0), np.full((3, 4), 10.0))
    assert policy.select(view, [], 3) == []
    assert policy.select(view, [(1, view)], 0) == []
    assert policy.drop([(4, view)]) == 4


# --- ties ---


@pytest.mark.parametrize("noise", [0.0, 1e-15, -1e-15, 3e-9, -3e-9])
@pytest.mark.parametrize("step", [1, 2, 3, 5, 7])
def test_ties_go_to_the_older_chunk_despite_noise(noise, step):
    """Out and back along a corridor of 8 steps. The share 0.5 (1/8)^2 is where rounding to 1e-6 turns."""
    policy = PoseRetrieval()
    current = policy.describe(standing(0), None)
    for positions, want in (([8, step + noise, step], [1, 2]), ([8, step, step + noise], [1, 2])):
        candidates = {i: policy.describe(standing(0, (x, 0, 0)), None) for i, x in enumerate(positions)}
        assert pick(policy, current, candidates, 2) == want
        assert policy.drop([*candidates.items(), (9, current)]) == 2


@fuzz
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(1, 12), seeds)
def test_tie_rule_by_brute_force(places, budget, seed):
    noise = np.random.default_rng(seed).uniform(-4e-7, 4e-7, size=len(places))
    candidates = {3 * i + 1: place + float(x) for (i, place), x in zip(enumerate(places), noise, strict=True)}
    want = sorted(candidates, key=lambda chunk: (round(candidates[chunk]), chunk))
    assert pick(Points(), 0.0, candidates, budget) == want[:budget]


def test_clear_differences_are_no_ties():
    assert pick(Points(), 0.0, {1: 0.00001, 2: 0.0}, 2) == [2, 1]


# --- diversity ---


def test_near_copies_do_not_take_the_whole_budget():
    """Chunks 1, 2 and 3 show nearly the same, a step away; 4 something else, a little farther."""
    candidates = {1: 1.0, 2: 1.01, 3: 1.02, 4: -1.4}
    assert pick(Points(), 0.0, candidates, 2) == [1, 2]
    assert pick(Points(diversity=0.0), 0.0, candidates, 3) == [1, 2, 3]
    assert pick(Points(diversity=0.5), 0.0, candidates, 2) == [1, 4]
    # Poses: two views 10 degrees to the right and one 14 to the left, seen from the middle.
    policy = PoseRetrieval(diversity=0.5)
    views = {i: policy.describe(standing(x), None) for i, x in {1: 10.0, 2: 10.2, 3: -14.0}.items()}
    current = policy.describe(standing(0), None)
    assert pick(policy, current, views, 2) == [1, 3]
    assert pick(PoseRetrieval(), current, views, 2) == [1, 2]


@fuzz
@given(
    st.lists(st.integers(-50, 50), min_size=1, max_size=10), st.integers(0, 12), st.sampled_from([0.0, 0.25, 0.5, 1.0])
)
def test_diversity_by_brute_force(places, budget, diversity):
    """Each pick minimises d(current, i) - diversity * min d(i, picked); the whole budget is always used."""
    candidates = dict(enumerate(places, start=5))
    got = pick(Points(diversity=diversity), 0.0, candidates, budget)
    want: list[int] = []
    while len(want) < min(budget, len(candidates)):
        left = [chunk for chunk in candidates if chunk not in want]
        score = {
            chunk: abs(candidates[chunk])
            - diversity * min((abs(candidates[chunk] - candidates[other]) for other in want), default=0)
            for chunk in left
        }
        want.append(min(left, key=lambda chunk: (score[chunk], chunk)))
    assert got == want
    assert len(set(got)) == min(budget, len(candidates))
    if diversity == 0:
        assert got == sorted(candidates, key=lambda chunk: (abs(candidates[chunk]), chunk))[:budget]


@pytest.mark.parametrize("policy", [PoseRetrieval, FovRetrieval])
@pytest.mark.parametrize("diversity", [-0.1, 1.1, math.nan])
def test_diversity_errors(policy, diversity):
    with pytest.raises(ValueError, match=f"{policy.__name__}: diversity must be from 0 to 1, got {diversity}"):
        policy(diversity=diversity)


# --- what a full bank gives up ---


def test_drop_is_the_younger_of_the_two_most_alike():
    assert Points().drop([(0, 0.0), (1, 5.0), (2, 9.0), (3, 5.5)]) == 3
    assert Points().drop([(0, 0.0), (1, 5.0), (2, 0.2), (3, 9.0)]) == 2
    assert Points().drop([(4, 1.0), (6, 1.0), (7, 1.0)]) == 6  # of equal pairs the oldest
    assert Points().drop([(0, 3.0), (1, 1.0), (2, 1.0 + 1e-9), (3, 3.0 - 1e-9)]) == 3  # equal but for noise: 0 and 3
    assert OfficialPoseRetrieval().drop([(3, None), (5, None), (9, None)]) == 3


@fuzz
@given(st.lists(st.integers(0, 60), min_size=2, max_size=9))
def test_drop_by_brute_force(places):
    chunks = list(enumerate(places, start=2))
    pairs = [(abs(x - y), a, b) for a, x in chunks for b, y in chunks if a < b]
    assert Points().drop(chunks) == min(pairs)[2]


def test_drop_of_fov_is_by_pose():
    """Views that share nothing at all are still told apart."""
    policy, wide = FovRetrieval(depth_range=(0.1, 1.0)), np.tile([50.0, 50.0, 20.0, 20.0], (3, 1))
    positions = (0.0, 100.0, 104.0, 200.0)
    candidates = [(i, policy.describe(standing(0, (x, 0, 0)), wide)) for i, x in enumerate(positions)]
    assert policy.drop(candidates) == 2


def test_drop_of_fov_prefers_one_viewpoint_to_one_view():
    """0 and 1 face each other across all that both see; 2 and 3 stand side by side and see half of each other."""
    policy = FovRetrieval(depth_range=(1.0, 10.0))
    poses = (standing(0), standing(180, (0, 0, 11.0)), standing(70, (50, 0, 0)), standing(100, (50, 0, 0)))
    candidates = [(chunk, policy.describe(x, CAMERA)) for chunk, x in enumerate(poses)]
    views = [view for _, view in candidates]
    distances = policy.distances(views, views, views[-1])
    assert distances[0, 1] < distances[2, 3] < 1
    assert policy.drop(candidates) == 3


# --- fields of view ---

CAMERA = np.tile([300.0, 300.0, 200.0, 150.0], (3, 1))  # 400 x 300 pixels: 67 degrees wide, 53 high


def overlap(a: np.ndarray, b: np.ndarray, near: float, far: float, count: int = 40000) -> float:
    """By random points: pixels uniform, depths uniform in their logarithm; the share that the other sees, both ways."""
    rng, shares = np.random.default_rng(0), []
    fx, fy, cx, cy = CAMERA[0]
    for one, other in ((a, b), (b, a)):
        z = np.exp(rng.uniform(math.log(near), math.log(far), count))
        u, v = rng.uniform(0, 2 * cx, count), rng.uniform(0, 2 * cy, count)
        world = np.stack([(u - cx) / fx * z, (v - cy) / fy * z, z, np.ones(count)]).T @ one.T
        x, y, depth, _ = (world @ np.linalg.inv(other).T).T
        seen = (depth >= near) & (depth <= far)
        with np.errstate(divide="ignore", invalid="ignore"):
            u, v = fx * x / depth + cx, fy * y / depth + cy
        shares.append((seen & (u >= 0) & (u <= 2 * cx) & (v >= 0) & (v <= 2 * cy)).mean())
    return float(np.mean(shares))


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.floats(-60, 60), st.floats(-3, 3), st.floats(-3, 3))
def test_fov_overlap_by_dense_sampling(degrees, x, z):
    a, b = standing(0), standing(degrees, (x, 0.3, z))
    want = overlap(a[0], b[0], 1.0, 20.0)
    for samples, tolerance in ((20000, 0.01), (128, 0.05)):
        policy = FovRetrieval(depth_range=(1.0, 20.0), samples=samples)
        views = [policy.describe(poses, CAMERA) for poses in (a, b)]
        distance = policy.distances(views[:1], views[1:], views[0])[0, 0]
        if distance < 1:
            assert abs(1 - distance - want) <= tolerance
            assert policy.distances(views[1:], views[:1], views[0])[0, 0] == pytest.approx(distance)
        else:
            assert want <= tolerance  # they share nothing, as far as the samples tell


def test_fov_of_a_view_and_itself_is_whole():
    policy = FovRetrieval()
    view = policy.describe(standing(33, (5, -2, 8)), CAMERA)
    assert policy.distances([view], [view], view)[0, 0] == 0


def test_fov_order():
    """More shared first; views that share nothing after all that share something, by pose among themselves."""
    policy = FovRetrieval(depth_range=(1.0, 10.0))
    yaws = {1: 180.0, 2: 40.0, 3: 120.0, 4: -10.0, 5: 25.0, 6: -100.0}
    views = {chunk: policy.describe(standing(degrees), CAMERA) for chunk, degrees in yaws.items()}
    current = policy.describe(standing(0), CAMERA)
    assert pick(policy, current, views, 6) == [4, 5, 2, 6, 3, 1]
    distances = policy.distances([current], list(views.values()), current)[0]
    assert all((distance < 1) == (abs(yaws[chunk]) < 67) for chunk, distance in zip(yaws, distances, strict=True))


def test_fov_tells_small_motions_apart():
    """Not in steps, as layers of a grid would that leave the view at once."""
    policy = FovRetrieval()
    current = policy.describe(standing(0), CAMERA)
    turned = [policy.describe(standing(degrees), CAMERA) for degrees in (16, 12, 9, 6, 3, 1)]
    assert pick(policy, current, dict(enumerate(turned)), 6) == [5, 4, 3, 2, 1, 0]
    moved = [policy.describe(standing(0, (0, 0, z)), CAMERA) for z in (1.0, 0.1, 1e-4)]
    # True distances, by 60,000 points: 0.198, 0.035, 0.000; those of 16 and 6 degrees 0.296 and 0.127.
    assert pick(policy, current, dict(enumerate([*moved, turned[0], turned[3]])), 5) == [2, 1, 4, 0, 3]
    assert policy.distances([current], moved, current)[0, 2] < 0.01


@fuzz
@given(seeds)
def test_fov_sharing_always_comes_first(seed):
    rng = np.random.default_rng(seed)
    policy = FovRetrieval(depth_range=(0.5, 8.0))
    views = [policy.describe(poses, CAMERA) for poses in random_chunks(rng, 12)]
    current, candidates = views[-1], dict(enumerate(views[:-1]))
    distances = policy.distances([current], views[:-1], current)[0]
    shared = [overlap(current[0], view[0], 0.5, 8.0, 2000) for view in views[:-1]]
    order = pick(policy, current, candidates, 11)
    assert sorted(order) == list(range(11))
    assert np.diff(distances[order]).min() >= -1e-6
    for share, distance in zip(shared, distances, strict=True):
        assert distance < 1 or share < 0.05  # what the samples miss is small
        assert distance >= 1 or share > 0 or distance > 0.99


def test_fov_looks_ahead_and_within_its_depths():
    policy = FovRetrieval(depth_range=(1.0, 10.0))
    current = policy.describe(standing(0), CAMERA)
    for pose, shares in (
        (standing(0, (0, 0, 4.0)), True),
        (standing(0, (0, 0, 9.5)), False),  # all of its near plane lies past the other's far plane
        (standing(180), False),
        (standing(180, (0, 0, 11.0)), True),  # face to face
    ):
        view = policy.describe(pose, CAMERA)
        assert (policy.distances([current], [view], current)[0, 0] < 1) == shares


def test_fov_image_size():
    """Twice the principal point by default; a wider image sees more."""
    shares = []
    for image_size, cx in ((None, 200.0), ((300, 400), 200.0), ((300, 900), 450.0)):
        policy, camera = FovRetrieval(image_size=image_size), np.tile([300.0, 300.0, cx, 150.0], (3, 1))
        a, b = (policy.describe(standing(degrees), camera) for degrees in (0, 50))
        shares.append(1 - policy.distances([a], [b], a)[0, 0])
    assert shares[0] == shares[1] < shares[2]


@pytest.mark.parametrize("depth_range", [(0.0, 1.0), (2.0, 2.0), (5.0, 1.0), (-1.0, 4.0)])
def test_fov_errors(depth_range):
    with pytest.raises(ValueError, match=r"^FovRetrieval: depth_range must be 0 < near < far < infinity, got"):
        FovRetrieval(depth_range=depth_range)


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("depth_range", (1e-300, 1e300), ValueError, "depth_range must be 0 < near < far < infinity, got"),
        ("depth_range", (1, 10**400), ValueError, "depth_range must be a number that a float can hold, got 1000"),
        ("depth_range", 5, TypeError, r"depth_range must be two numbers \(near, far\), got 5"),
        ("depth_range", ("1", 2), TypeError, r"depth_range must be two numbers \(near, far\), got \('1', 2\)"),
        ("image_size", (0, 5), ValueError, r"image_size must be a height and a width above 0, got \(0, 5\)"),
        ("image_size", (5, 10**400), ValueError, "image_size must be a number that a float can hold, got 1000"),
        ("image_size", (5, 5, 3), TypeError, r"image_size must be two numbers \(height, width\), got \(5, 5, 3\)"),
        ("samples", 0, ValueError, "samples must be from 1 to 65536, got 0"),
        ("samples", 10**400, ValueError, "samples must be from 1 to 65536, got 1000"),
        ("samples", 2.5, TypeError, "samples must be an integer, got 2.5"),
        ("samples", True, TypeError, "samples must be an integer, got True"),
        ("diversity", 10**400, ValueError, "diversity must be a number that a float can hold, got 1000"),
        ("diversity", "much", TypeError, "diversity must be a number, got 'much'"),
        ("diversity", math.nan, ValueError, "diversity must be from 0 to 1, got nan"),
    ],
)
def test_fov_arguments(argument, value, error, message):
    with pytest.raises(error, match=f"^FovRetrieval: {message}"):
        FovRetrieval(**{argument: value})


# --- the published policy, and names ---


def test_published_ties_are_stable():
    policy = OfficialPoseRetrieval()
    views = [policy.describe(standing(0), None)] * 4
    assert policy.select(views[0], list(zip((2, 3, 5, 7), views, strict=True)), 3) == [2, 3, 5]


def test_make_policy():
    assert type(make_policy("pose")) is PoseRetrieval
    assert type(make_policy("fov")) is FovRetrieval
    assert (make_policy("fov").needs_intrinsics, make_policy("pose").needs_intrinsics) == (True, False)
    own = PoseRetrieval(diversity=0.3)
    assert make_policy(own) is own
    for policy in (PoseRetrieval(), FovRetrieval(), OfficialPoseRetrieval()):
        assert isinstance(policy, RetrievalPolicy)
    for wrong in ("poses", None, 3, PoseRetrieval, object()):
        with pytest.raises(
            ValueError, match="retrieval must be 'pose', 'fov', 'action', 'content' or a RetrievalPolicy, got"
        ):
            make_policy(wrong)
