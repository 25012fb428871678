"""Poses: what is accepted, the geodesic mean, angles near zero and pi."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_memory import as_quaternion, quaternion_angle, rotation_mean

from worldkv_kernels.cli.rollout_models import DEFAULT_TRAJECTORY
from worldkv_kernels.memory.retrieval import OfficialPoseRetrieval, PoseRetrieval
from worldkv_kernels.poses import (
    _exp,
    _log,
    as_intrinsics,
    as_poses,
    convention_hint,
    geodesic_mean,
    interpolated,
    mean_pose,
    rotation_angles,
)
from worldkv_kernels.trajectory import load

fuzz = settings(max_examples=100, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31)


def turn(axis, angle: float) -> np.ndarray:
    """Rodrigues, in float64."""
    x, y, z = np.asarray(axis, dtype=float) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


def random_rotation(rng, most: float = math.pi) -> np.ndarray:
    return turn(rng.normal(size=3), rng.uniform(0, most))


def sum_of_squares(mean: np.ndarray, rotations: np.ndarray) -> float:
    """Of angles, by quaternions."""
    return sum(quaternion_angle(as_quaternion(mean), as_quaternion(rotation)) ** 2 for rotation in rotations)


def is_rotation(matrix: np.ndarray) -> bool:
    return np.abs(matrix.T @ matrix - np.eye(3)).max() < 1e-12 and np.linalg.det(matrix) > 0


@fuzz
@given(seeds, st.integers(1, 8), st.floats(0, 1.4))
def test_geodesic_mean_minimises_the_squared_angles(seed, count, spread):
    """Within a ball of radius below pi / 2 the minimum is one: no step improves, and another method agrees."""
    rng = np.random.default_rng(seed)
    centre = random_rotation(rng)
    rotations = np.stack([centre @ random_rotation(rng, spread) for _ in range(count)])
    mean = geodesic_mean(rotations)
    assert is_rotation(mean)
    least = sum_of_squares(mean, rotations)
    for axis in np.vstack([np.eye(3), -np.eye(3)]):
        for step in (1e-3, 1e-1):
            assert sum_of_squares(mean @ turn(axis, step), rotations) > least
    assert quaternion_angle(as_quaternion(mean), rotation_mean(list(rotations))) < 1e-7


@fuzz
@given(seeds, st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=6))
def test_geodesic_mean_of_a_turn_is_the_mean_angle(seed, angles):
    axis = np.random.default_rng(seed).normal(size=3)
    mean = geodesic_mean(np.stack([turn(axis, angle) for angle in angles]))
    assert np.abs(mean - turn(axis, np.mean(angles))).max() < 1e-12


@fuzz
@given(seeds, st.integers(1, 6))
def test_geodesic_mean_is_invariant(seed, count):
    """Under a rotation of the world and one of the camera, and under order."""
    rng = np.random.default_rng(seed)
    rotations = np.stack([random_rotation(rng, 1.4) for _ in range(count)])
    a, b = random_rotation(rng), random_rotation(rng)
    mean = geodesic_mean(rotations)
    assert np.abs(geodesic_mean(a @ rotations @ b) - a @ mean @ b).max() < 1e-10
    assert np.abs(geodesic_mean(rotations[::-1]) - mean).max() < 1e-10


@pytest.mark.parametrize("gap", [1e-1, 1e-3, 1e-5, 1e-6])
def test_geodesic_mean_of_two_views_nearly_opposite(gap):
    """The two are pi - gap apart; their mean is half way."""
    for axis in ([1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 2, -3]):
        for base in (np.eye(3), turn([3, -1, 1], math.pi), turn([0, 1, 0], math.pi - 1e-9)):
            mean = geodesic_mean(np.stack([base, base @ turn(axis, math.pi - gap)]))
            assert is_rotation(mean)
            assert np.abs(mean - base @ turn(axis, (math.pi - gap) / 2)).max() < 1e-9


@pytest.mark.parametrize("gap", [1e-1, 1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("axis", [[1, 0, 0], [0, -1, 0], [-1, 2, 2], [3, -1, -2]])
def test_geodesic_mean_with_one_view_nearly_opposite(axis, gap):
    """Two views here and one pi - gap away: a third of the way, which needs the angle and axis of a half turn."""
    for base in (np.eye(3), turn([3, -1, 1], 2.0)):
        mean = geodesic_mean(np.stack([base, base, base @ turn(axis, math.pi - gap)]))
        assert is_rotation(mean)
        assert np.abs(mean - base @ turn(axis, (math.pi - gap) / 3)).max() < 1e-7


@pytest.mark.parametrize("axis", [[1, 0, 0], [0, -1, 0], [-1, 2, 2], [3, -1, -2]])
def test_geodesic_mean_with_one_view_opposite(axis):
    """At pi exactly the way round is open, not its length: a third of it either way."""
    base = turn([3, -1, 1], 2.0)
    rotations = np.stack([base, base, base @ turn(axis, math.pi)])
    angles = rotation_angles(geodesic_mean(rotations)[None], rotations)[0]
    assert np.abs(angles - np.array([1, 1, 2]) * math.pi / 3).max() < 1e-7


def test_geodesic_mean_where_the_mean_matrix_is_a_reflection():
    """Half turns about three axes: the mean of the matrices is -1/3, which projects to no rotation by itself."""
    rotations = np.stack([turn(axis, math.pi) for axis in np.eye(3)])
    mean = geodesic_mean(rotations)
    assert is_rotation(mean)
    assert sum_of_squares(mean, rotations) <= 2 * math.pi**2 + 1e-9  # what any one of the three reaches


@pytest.mark.parametrize("axis", [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [-1, 2, 2]])
def test_geodesic_mean_of_opposite_views_is_a_rotation_between(axis):
    """There are two answers at pi exactly; either is a quarter turn from both."""
    rotations = np.stack([np.eye(3), turn(axis, math.pi)])
    mean = geodesic_mean(rotations)
    assert is_rotation(mean)
    assert np.abs(rotation_angles(mean[None], rotations) - math.pi / 2).max() < 1e-6


@pytest.mark.parametrize("angle", [0, 1e-12, 1e-7, 1e-5, 1, 3, *(math.pi - gap for gap in (1e-3, 1e-5, 1e-9, 0))])
@pytest.mark.parametrize("axis", [[1, 0, 0], [0, -1, 0], [-1, 2, 2], [3, -1, -2]])
def test_log_and_exp_undo_each_other(axis, angle):
    rotation = turn(axis, angle)
    assert np.abs(_exp(_log(rotation)) - rotation).max() < 1e-7
    assert np.linalg.norm(_log(rotation)) == pytest.approx(angle, abs=1e-7)


def test_geodesic_mean_of_one_is_itself_at_any_angle():
    for angle in (0, 1e-9, 1.0, math.pi - 1e-5, math.pi - 1e-9, math.pi):
        rotation = turn([1, -2, 0.5], angle)
        assert np.abs(geodesic_mean(rotation[None]) - rotation).max() < 1e-9


def test_mean_pose():
    poses = np.tile(np.eye(4), (3, 1, 1))
    for frame, pose in enumerate(poses):
        pose[:3, :3], pose[:3, 3] = turn([0, 1, 0], 0.1 * frame), (frame, 2 * frame, 5)
    mean = mean_pose(poses)
    assert np.abs(mean[:3, :3] - turn([0, 1, 0], 0.1)).max() < 1e-12
    assert mean[:, 3].tolist() == [1, 2, 5, 1]
    assert mean[3].tolist() == [0, 0, 0, 1]


@fuzz
@given(seeds, st.floats(-12, math.log10(3)))
def test_rotation_angles_keep_their_precision_near_zero(seed, exponent):
    """Relative to the angle, down to the rounding of the matrices (where acos is lost below 1e-8)."""
    rng = np.random.default_rng(seed)
    angle, base = 10.0**exponent, random_rotation(rng)
    got = rotation_angles(base[None], (base @ turn(rng.normal(size=3), angle))[None])[0, 0]
    assert abs(got - angle) <= 1e-9 * angle + 1e-15


@fuzz
@given(seeds, st.floats(-12, -1))
def test_rotation_angles_near_pi(seed, exponent):
    """There the arcsine's slope halves the digits: 1e-8 stays, and nothing is above pi or not a number."""
    rng = np.random.default_rng(seed)
    gap, base = 10.0**exponent, random_rotation(rng)
    got = rotation_angles(base[None], (base @ turn(rng.normal(size=3), math.pi - gap))[None])[0, 0]
    assert abs(got - (math.pi - gap)) <= 1e-7
    assert got <= math.pi


def test_rotation_angles_are_a_table():
    rng = np.random.default_rng(0)
    a, b = (np.stack([random_rotation(rng) for _ in range(count)]) for count in (3, 4))
    got = rotation_angles(a, b)
    assert got.shape == (3, 4)
    for i in range(3):
        for j in range(4):
            assert got[i, j] == pytest.approx(quaternion_angle(as_quaternion(a[i]), as_quaternion(b[j])), abs=1e-9)


def good(frames: int = 3) -> np.ndarray:
    rng = np.random.default_rng(1)
    poses = np.tile(np.eye(4), (frames, 1, 1))
    for pose in poses:
        pose[:3, :3], pose[:3, 3] = random_rotation(rng), rng.normal(size=3) * 10
    return poses


@pytest.mark.parametrize("kind", ["array", "float32", "list", "tensor", "half", "grad", "strided"])
def test_poses_of_any_kind(kind):
    poses = good()
    given_poses = {
        "array": lambda: poses,
        "float32": lambda: poses.astype(np.float32),
        "list": poses.tolist,
        "tensor": lambda: torch.from_numpy(poses).float(),
        "half": lambda: torch.from_numpy(poses).half(),
        "grad": lambda: torch.from_numpy(poses).requires_grad_(),
        "strided": lambda: np.repeat(poses, 2, axis=0)[::2],
    }[kind]()
    got = as_poses("op", given_poses, 3)
    assert got.dtype == np.float64 and got.shape == (3, 4, 4)
    assert np.abs(got - poses).max() <= (1e-2 if kind == "half" else 1e-5)


@fuzz
@given(seeds)
def test_half_precision_rotations_pass(seed):
    rotation = random_rotation(np.random.default_rng(seed))
    poses = np.eye(4)[None].copy()
    poses[0, :3, :3] = rotation.astype(np.float16)
    as_poses("op", poses)


def broken(**entries) -> np.ndarray:
    poses = good()
    for name, value in entries.items():
        frame, row, column = (int(digit) for digit in name[1:])
        poses[frame, row, column] = value
    return poses


def scaled(factor: float) -> np.ndarray:
    poses = good()
    poses[2, :3, :3] *= factor
    return poses


@pytest.mark.parametrize(
    ("poses", "error_type", "wanted"),
    [
        (good(2), ValueError, "must be [3, 4, 4], got [2, 4, 4]"),
        (good()[:, :3], ValueError, "must be [3, 4, 4], got [3, 3, 4]"),
        (good()[0], ValueError, "must be [3, 4, 4], got [4, 4]"),
        (torch.zeros(3, 16), ValueError, "must be [3, 4, 4], got [3, 16]"),
        (None, ValueError, "must be [3, 4, 4], got []"),
        (7.0, ValueError, "must be [3, 4, 4], got []"),
        ("abc", TypeError, "must be an array [3, 4, 4] of real numbers, got str"),
        ([[1, 2], [3]], TypeError, "must be an array [3, 4, 4] of real numbers, got list"),
        (broken(_012=math.nan), ValueError, "must be finite, got nan"),
        (broken(_103=math.inf), ValueError, "must be finite, got inf"),
        (broken(_103=-1e200), ValueError, "must be of numbers up to 1e+09, got 1e+200"),
        (broken(_111=1e200), ValueError, "must be of numbers up to 1e+09, got 1e+200"),
        (good() + 0j, TypeError, "must be an array [3, 4, 4] of real numbers, got ndarray of complex128"),
        ((good() + 0j).tolist(), TypeError, "of real numbers, got list"),
        (torch.from_numpy(good() + 0j), TypeError, "of real numbers, got Tensor of torch.complex128"),
        (np.tile(np.eye(4, dtype=bool), (3, 1, 1)), TypeError, "of real numbers, got ndarray of bool"),
        (torch.eye(4).bool().expand(3, 4, 4), TypeError, "of real numbers, got Tensor of torch.bool"),
        (scaled(1.001), ValueError, "must be rigid, a rotation, a translation and the row 0 0 0 1, got frame 2"),
        (scaled(-1.0), ValueError, "got frame 2 with a reflection, of determinant -1, for a rotation"),
        (scaled(0.0), ValueError, "got frame 2"),
        (broken(_132=0.01), ValueError, "got frame 1"),
        (broken(_033=0.0), ValueError, "and last row [0.0, 0.0, 0.0, 0.0]"),
        (good().transpose(0, 2, 1), ValueError, "got frame 0"),  # the translation in the last row
    ],
)
def test_poses_errors(poses, error_type, wanted):
    with pytest.raises(error_type) as caught:
        as_poses("begin_chunk", poses, 3)
    assert str(caught.value).startswith("begin_chunk: poses must be")
    assert wanted in str(caught.value)


@pytest.mark.filterwarnings("error")
def test_poses_up_to_the_bound():
    poses = good()
    poses[:, :3, 3] = 1e9
    for policy in (PoseRetrieval(), OfficialPoseRetrieval()):
        far, near = (policy.describe(as_poses("op", each), None) for each in (poses, good()))
        assert policy.select(near, [(0, far), (1, near)], 1) == [1]


@pytest.mark.parametrize("check", [as_poses, lambda op, numbers: as_intrinsics(op, numbers, 4)])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_what_is_checked_is_a_copy(check, kind):
    given_numbers = np.eye(4)[None] if check is as_poses else np.ones((4, 4))
    got = check("op", kind(given_numbers))
    want = got.copy()
    given_numbers += 5
    assert np.array_equal(got, want)


def test_poses_of_any_number():
    assert as_poses("op", good(5)).shape == (5, 4, 4)
    with pytest.raises(ValueError, match=r"op: poses must be \[frames, 4, 4\], got \[0, 4, 4\]"):
        as_poses("op", np.zeros((0, 4, 4)))


def test_intrinsics():
    one = [400.0, 410.0, 320.0, 240.0]
    for intrinsics in (one, np.tile(one, (3, 1)), torch.tensor(one, dtype=torch.bfloat16), torch.tensor([one] * 3)):
        got = as_intrinsics("op", intrinsics, 3)
        assert got.dtype == np.float64 and got.shape == (3, 4)
        assert np.abs(got - one).max() <= 2  # bf16
    trained = torch.tensor(one, requires_grad=True)
    assert as_intrinsics("op", trained, 3).shape == (3, 4)


@pytest.mark.parametrize(
    ("intrinsics", "error_type", "wanted"),
    [
        (np.ones((2, 4)), ValueError, "must be [3, 4] or [4], got [2, 4]"),
        (np.ones(3), ValueError, "must be [3, 4] or [4], got [3]"),
        ([1.0, -1.0, 1.0, 1.0], ValueError, "must be positive fx, fy, cx, cy in pixels, got [1.0, -1.0, 1.0, 1.0]"),
        ([1.0, math.inf, 1.0, 1.0], ValueError, "must be positive"),
        ([1.0, 1.0, math.nan, 1.0], ValueError, "must be positive"),
        ([True] * 4, TypeError, "must be an array [3, 4] or [4] of real numbers, got list"),
        (np.full(4, 1j), TypeError, "must be an array [3, 4] or [4] of real numbers, got ndarray of complex128"),
        ("wide", TypeError, "must be an array [3, 4] or [4] of real numbers, got str"),
        ([[1.0], [2.0, 3.0]], TypeError, "must be an array [3, 4] or [4] of real numbers, got list"),
    ],
)
def test_intrinsics_errors(intrinsics, error_type, wanted):
    with pytest.raises(error_type) as caught:
        as_intrinsics("begin_chunk", intrinsics, 3)
    assert str(caught.value).startswith("begin_chunk: intrinsics must be")
    assert wanted in str(caught.value)


@fuzz
@given(seeds)
def test_interpolated_poses_lie_on_the_way_at_even_speed(seed):
    rng = np.random.default_rng(seed)
    poses = np.tile(np.eye(4), (4, 1, 1))
    poses[:, :3, :3] = [random_rotation(rng, math.pi * 0.49) for _ in poses]
    poses[:, :3, 3] = rng.normal(size=(4, 3))
    part = rng.uniform()
    got = interpolated(poses, np.array([2 + part, 3.0, 0.0]))
    as_poses("test", got)
    assert np.array_equal(got[1:], poses[[3, 0]])
    np.testing.assert_allclose(got[0, :3, 3], (1 - part) * poses[2, :3, 3] + part * poses[3, :3, 3], atol=1e-12)
    whole, done, left = (
        rotation_angles(one[None, :3, :3], other[None, :3, :3]).item()
        for one, other in ((poses[2], poses[3]), (poses[2], got[0]), (got[0], poses[3]))
    )
    assert done == pytest.approx(part * whole, abs=1e-7) and left == pytest.approx((1 - part) * whole, abs=1e-7)


GL = np.diag([1.0, -1.0, -1.0, 1.0])
WALKS = ("forward*30", "right*45,forward*40,left*90,forward*40", "forward*30,right*90,forward*30,up*20,forward*20")


@pytest.mark.parametrize("moves", WALKS)
def test_a_hint_where_no_motion_goes_where_the_camera_looks(moves):
    poses = load(moves).poses
    assert convention_hint(poses) is None
    assert "OpenGL" in convention_hint(poses @ GL)
    if moves != WALKS[1]:  # of which some goes ahead inverted, too
        assert "inverted" in convention_hint(np.linalg.inv(poses))


@pytest.mark.parametrize(
    "moves",
    ["right*90", "strafe_left*30", "right*40,strafe_right*40", "back*4", "forward*40,back*40", DEFAULT_TRAJECTORY],
)
def test_no_hint_on_a_camera_that_turns_strafes_comes_back_or_hardly_moves(moves):
    assert convention_hint(load(moves).poses) is None


@pytest.mark.parametrize("clip", ["jungle_flight", "stonehenge_sweep"])
def test_the_hint_on_clips_of_real_videos(clip):
    file = Path(__file__).parents[2] / "shared" / "data" / "trajectories" / clip / "poses.npy"
    if not file.exists():
        pytest.skip("the clips of LingBot-World's examples are not here")
    poses = as_poses("clip", np.load(file))
    assert convention_hint(poses) is None
    assert convention_hint(np.linalg.inv(poses)) and convention_hint(poses @ GL)
