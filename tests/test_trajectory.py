"""Trajectories: moves against rotations written out by hand, folders, and every error."""

import math

import numpy as np
import pytest

from worldkv_kernels.poses import as_poses, look_rotation
from worldkv_kernels.trajectory import MOVES, latent_poses, load


def axes(pose):
    """Right, down and forward of a camera, in world coordinates."""
    return pose[:3, 0], pose[:3, 1], pose[:3, 2]


def test_right_90_turns_the_view_to_the_right():
    poses, intrinsics, name = load("right*90")
    assert poses.shape == (91, 4, 4) and intrinsics.shape == (91, 4) and name == "right*90"
    assert np.array_equal(poses[0], np.eye(4))
    right, down, forward = axes(poses[-1])
    np.testing.assert_allclose(forward, (1, 0, 0), atol=1e-12)  # what was on the right is ahead
    np.testing.assert_allclose(down, (0, 1, 0), atol=1e-12)
    np.testing.assert_allclose(right, (0, 0, -1), atol=1e-12)
    angle = math.acos((np.trace(poses[30, :3, :3]) - 1) / 2)
    assert math.degrees(angle) == pytest.approx(30)


@pytest.mark.parametrize(
    "moves, forward, position",
    [
        ("left*90", (-1, 0, 0), (0, 0, 0)),
        ("up*90", (0, -1, 0), (0, 0, 0)),  # y points down
        ("down*90", (0, 1, 0), (0, 0, 0)),
        ("forward*10", (0, 0, 1), (0, 0, 1)),
        ("back*10", (0, 0, 1), (0, 0, -1)),
        ("strafe_right*10", (0, 0, 1), (1, 0, 0)),
        ("strafe_left*10", (0, 0, 1), (-1, 0, 0)),
        ("right*90,forward*10", (1, 0, 0), (1, 0, 0)),
        ("right*90,strafe_right*10", (1, 0, 0), (0, 0, -1)),
        ("up*90,forward*10", (0, -1, 0), (0, -1, 0)),
        ("up*30,right*90", (math.cos(math.pi / 6), -0.5, 0), (0, 0, 0)),  # yaw is about the vertical: no roll
    ],
)
def test_each_move(moves, forward, position):
    pose = load(moves).poses[-1]
    np.testing.assert_allclose(axes(pose)[2], forward, atol=1e-12)
    np.testing.assert_allclose(pose[:3, 3], position, atol=1e-12)


def test_one_frame_a_repeat_and_nothing_else():
    poses = load(" right*2 , forward*3 ").poses
    assert len(poses) == 1 + 2 + 3
    assert len(load(",".join(["right*2,left*2"] * 50)).poses) == 201  # too long for the name of a folder
    steps = np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1)
    np.testing.assert_allclose(steps, [0, 0, 0.1, 0.1, 0.1], atol=1e-15)


def test_the_way_back_has_the_very_same_orientations():
    poses = load("right*60,up*7,down*7,left*60").poses
    assert np.array_equal(poses, poses[::-1])


def test_poses_are_those_of_a_plain_loop():
    text = "right*40,forward*9,up*12,strafe_left*30,left*95,back*7,down*30,strafe_right*2,forward*50"
    yaw = pitch = 0
    position = np.zeros(3)
    want = [np.eye(4)]
    for part in text.split(","):
        name, count = part.split("*")
        for _ in range(int(count)):
            yaw, pitch = yaw + MOVES[name][0], pitch + MOVES[name][1]
            pose = np.eye(4)
            pose[:3, :3] = look_rotation(math.radians(1) * yaw, math.radians(1) * pitch)
            position = position + pose[:3, :3] @ (0.1 * MOVES[name][2], 0.0, 0.1 * MOVES[name][3])
            pose[:3, 3] = position
            want.append(pose)
    poses = load(text).poses
    assert np.array_equal(poses[:, :3, :3], np.stack(want)[:, :3, :3])
    np.testing.assert_allclose(poses, np.stack(want), atol=1e-13)


def test_step_sizes_are_parameters():
    poses = load("right*3,forward*2", turn_degrees=30, move=2.5).poses
    np.testing.assert_allclose(poses[-1][:3, 3], (5, 0, 0), atol=1e-12)


def test_every_move_gives_rigid_poses():
    as_poses("test", load(",".join(f"{move}*17" for move in MOVES)).poses)


def test_a_folder(tmp_path):
    moves = load("right*20,forward*5")
    np.save(tmp_path / "poses.npy", moves.poses.astype(np.float32))
    np.save(tmp_path / "intrinsics.npy", np.arange(1, 105, dtype=np.float32).reshape(26, 4))
    for source in (tmp_path, str(tmp_path)):
        poses, intrinsics, name = load(source)
        assert poses.dtype == intrinsics.dtype == np.float64 and name == tmp_path.name
        np.testing.assert_allclose(poses, moves.poses, atol=1e-7)
        assert intrinsics[-1].tolist() == [101, 102, 103, 104]


@pytest.mark.parametrize("stride, frames", [(4, [0, 4, 8, 12, 16]), (1, list(range(20))), (7, [0, 7, 14]), (50, [0])])
def test_latent_frame_f_is_video_frame_stride_times_f(stride, frames):
    trajectory = load("right*19")
    trajectory = trajectory._replace(intrinsics=trajectory.intrinsics + np.arange(20)[:, None])
    poses, intrinsics = latent_poses(trajectory, stride)
    assert np.array_equal(poses, trajectory.poses[frames])
    assert (intrinsics[:, 0] - 500).tolist() == frames


def test_latent_frames_of_whole_chunks_are_spread_over_the_trajectory():
    """Of 162 video frames 161 count; of their 41 latent frames 39 fill chunks, 160 / 38 video frames apart."""
    trajectory = load("right*140,forward*21")
    trajectory = trajectory._replace(intrinsics=trajectory.intrinsics + np.arange(162)[:, None])
    poses, intrinsics = latent_poses(trajectory, chunk_frames=3)
    at = np.arange(39) * 160 / 38
    assert poses.shape == (39, 4, 4)
    np.testing.assert_allclose(intrinsics, trajectory.intrinsics[:1] + at[:, None], rtol=1e-12)
    yaws = np.degrees(np.arctan2(poses[:, 0, 2], poses[:, 2, 2]))
    np.testing.assert_allclose(yaws, np.minimum(at, 140), atol=1e-9)
    ahead = np.linalg.norm(poses[:, :3, 3], axis=1)
    np.testing.assert_allclose(ahead, np.maximum(at - 140, 0) / 10, atol=1e-9)
    as_poses("test", poses)
    assert np.array_equal(poses[-1], trajectory.poses[160])


@pytest.mark.parametrize("frames, count", [(8, 0), (9, 3), (81, 21), (84, 21), (357, 90)])
def test_where_every_latent_frame_is_in_a_chunk_poses_are_every_fourth(frames, count):
    trajectory = load(f"right*{frames - 1}")
    poses, intrinsics = latent_poses(trajectory, chunk_frames=3)
    assert np.array_equal(poses, trajectory.poses[::4][:count]) and intrinsics.shape == (count, 4)


def test_latent_frames_are_one_more_than_a_quarter_of_the_moves():
    assert len(latent_poses(load("right*960"))[0]) == 241
    with pytest.raises(ValueError, match="latent_poses: stride must be at least 1, got 0"):
        latent_poses(load("right*3"), 0)
    with pytest.raises(ValueError, match="latent_poses: chunk_frames must be at least 1, got 0"):
        latent_poses(load("right*3"), chunk_frames=0)


@pytest.mark.parametrize(
    "source, message",
    [
        ("jump*3", r"a move must be one of right, left, .*, got 'jump' in 'jump\*3'"),
        ("right*3,", r"a move must be one of .*, got '' in 'right\*3,'"),
        ("right*3,left", r"count must be a positive integer, as in left\*10, got '' in"),
        ("right*0", "count must be a positive integer, .* got '0'"),
        ("right*-3", "count must be a positive integer, .* got '-3'"),
        ("right*1.5", "count must be a positive integer, .* got '1.5'"),
        ("right*2*2", r"count must be a positive integer, .* got '2\*2'"),
        ("right*00", "count must be a positive integer, .* got '00'"),
        ("right*9999999", r"moves must be at most 100000 together, got 'right\*9999999'"),
        ("right*60000,left*40001", r"moves must be at most 100000 together, got 'right\*60000,left\*40001'"),
        pytest.param("up*" + "9" * 5000, r"moves must be at most 100000 together, got 'up\*9*$", id="5000 digits"),
        ("right*²", "count must be a positive integer, .* got '²'"),  # a digit to str.isdigit, not to int
        ("right", "must be an existing folder, or moves such as .*, got 'right'"),
        ("no/such/folder", "must be an existing folder, or moves such as .*, got 'no/such/folder'"),
    ],
)
def test_bad_moves(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"trajectory: .*{message}"):
        load(source)


def bad_folders():
    eye = np.tile(np.eye(4), (5, 1, 1))
    cameras = np.ones((5, 4))
    sheared = eye.copy()
    sheared[3, 0, 1] = 0.1
    yield "no poses", None, cameras, r"must hold poses.npy \[n, 4, 4\], got intrinsics.npy"
    yield "no intrinsics", eye, None, r"must hold intrinsics.npy \[5, 4\], got poses.npy"
    yield "3 x 4", eye[:, :3], cameras, r"poses.npy: poses must be \[frames, 4, 4\], got \[5, 3, 4\]"
    yield "no frames", eye[:0], cameras, r"poses.npy: poses must be \[frames, 4, 4\], got \[0, 4, 4\]"
    yield "not rigid", sheared, cameras, "poses.npy: poses must be rigid, .* got frame 3"
    yield "nan", eye * np.nan, cameras, "poses.npy: poses must be finite, got nan"
    yield "too few cameras", eye, cameras[:4], r"intrinsics.npy: intrinsics must be \[5, 4\] or \[4\], got \[4, 4\]"
    yield "focal length 0", eye, cameras * 0, "intrinsics.npy: intrinsics must be positive"
    yield "words", np.array(["a"]), cameras, r"poses.npy must hold real numbers \[n, 4, 4\], got array\(\['a'\]"
    yield "objects", np.array([None]), cameras, r"poses.npy must be a numpy array \[n, 4, 4\], got "
    yield "no array", b"RIFF", cameras, r"poses.npy must be a numpy array \[n, 4, 4\], got "
    yield "an empty file", b"", cameras, r"poses.npy must be a numpy array \[n, 4, 4\], got "
    yield "a broken archive", b"PK\x03\x04", cameras, r"poses.npy must be a numpy array \[n, 4, 4\], got "
    for what, shape in (
        ("more than there is memory", b"(1%s,)" % (b"0" * 17)),
        ("a deep shape", b"(" * 90 + b")" * 90),
    ):
        header = b"{'descr': '<f8', 'fortran_order': False, 'shape': %s}\n" % shape
        file = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        yield what, file, cameras, r"poses.npy must be a numpy array \[n, 4, 4\], got "
    yield "an open bracket", file.replace(b")", b"("), cameras, r"poses.npy must be a numpy array \[n, 4, 4\], got "


@pytest.mark.parametrize("poses, intrinsics, message", [pytest.param(*case, id=i) for i, *case in bad_folders()])
def test_bad_folders(poses, intrinsics, message, tmp_path):
    for name, content in (("poses.npy", poses), ("intrinsics.npy", intrinsics)):
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content is not None:
            np.save(tmp_path / name, content, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("argument", ["turn_degrees", "move"])
def test_steps_are_finite_numbers(argument):
    for value, error, wanted in (
        (10**400, ValueError, "a number that a float can hold, got 1000"),
        (np.nan, ValueError, "finite, got nan"),
        ("far", TypeError, "a number, got 'far'"),
    ):
        with pytest.raises(error, match=f"^trajectory: {argument} must be {wanted}"):
            load("right*3", **{argument: value})
