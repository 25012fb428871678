"""Camera trajectories: read from a folder, or spelled as moves."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .checks import as_number, bad_value
from .poses import as_intrinsics, as_poses, interpolated, look_rotation

# What one frame of each move adds: yaw and pitch in turns of `turn_degrees`, then x (right) and z (forward) in `move`.
MOVES = {
    "right": (1, 0, 0, 0),
    "left": (-1, 0, 0, 0),
    "up": (0, 1, 0, 0),
    "down": (0, -1, 0, 0),
    "forward": (0, 0, 0, 1),
    "back": (0, 0, 0, -1),
    "strafe_right": (0, 0, 1, 0),
    "strafe_left": (0, 0, -1, 0),
}

# fx, fy, cx, cy of a spelled trajectory: a 480 x 832 image that is 79.5 degrees wide.
DEFAULT_INTRINSICS = (500.0, 500.0, 416.0, 240.0)

MOST_FRAMES = 100_000  # of spelled moves

_EXAMPLE = "moves such as right*90,left*90,forward*10"


class Trajectory(NamedTuple):
    """A camera's way, one pose a video frame, in OpenCV coordinates (x right, y down, z forward)."""

    poses: np.ndarray  # camera-to-world, float64 [n, 4, 4], any unit of length
    intrinsics: np.ndarray  # fx, fy, cx, cy in pixels, float64 [n, 4]
    name: str


def load(source: str | Path, *, turn_degrees: float = 1.0, move: float = 0.1) -> Trajectory:
    """Read a trajectory from a folder, or from a string of moves.

    A folder holds poses.npy [n, 4, 4] and intrinsics.npy [n, 4] (or [4], the same for all frames); its name
    is the trajectory's. A string holds `move*count` joined by commas; each repeat is one video frame, after
    a first frame at the identity, so that right*90 has 91 frames and ends 90 degrees to the right. right and
    left turn the camera by `turn_degrees` about the vertical of the first frame, up and down pitch it about its
    own x axis; forward, back, strafe_left and strafe_right go `move` units along its own z and x axes. Angles
    and steps are counted, not multiplied up, so a camera that turns back has exactly its old orientation.

    Raises ValueError when the string is neither a folder nor moves, a move is unknown, a count is not a positive
    integer, the counts are more than 100,000 together, a file is missing or unreadable, the poses or intrinsics are
    misshapen, not finite or not rigid, or `turn_degrees` or `move` is not finite; TypeError when that is no number.
    """
    for name, value in (("turn_degrees", turn_degrees), ("move", move)):
        if not math.isfinite(as_number("trajectory", name, value)):
            raise bad_value("trajectory", name, "finite", value)
    if os.path.isdir(source):  # Path.is_dir raises where a string of moves is too long for a name
        return _from_folder(Path(source))
    if isinstance(source, Path) or "*" not in source:
        raise ValueError(f"trajectory: must be an existing folder, or {_EXAMPLE}, got {str(source)!r}")
    return _from_moves(source, math.radians(turn_degrees), move)


def latent_poses(trajectory: Trajectory, stride: int = 4, *, chunk_frames: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Poses [f, 4, 4] and intrinsics [f, 4] of a trajectory's latent frames, frame 0 first.

    `stride` is the temporal stride of the video autoencoder: latent frame f is taken at video frame stride * f, and n
    video frames have f = ceil(n / stride) of them, of which those are left out that fill no chunk of `chunk_frames`.
    Where some are, the others are spread evenly over all of the trajectory up to video frame stride * (ceil(n / stride)
    - 1), as LingBot-World's pipelines do it (see lingbot.latent_poses): poses lie between those given, and so do
    intrinsics. Raises ValueError when an argument is not at least 1.
    """
    for name, count in (("stride", stride), ("chunk_frames", chunk_frames)):
        if count < 1:
            raise ValueError(f"latent_poses: {name} must be at least 1, got {count}")
    frames = latent_frames(len(trajectory.poses), stride, chunk_frames)
    numbers = np.arange(len(trajectory.poses))
    intrinsics = [np.interp(frames, numbers, column) for column in trajectory.intrinsics.T]
    return interpolated(trajectory.poses, frames), np.stack(intrinsics, axis=1)


def latent_frames(video_frames: int, stride: int, chunk_frames: int) -> np.ndarray:
    """The video frames, whole or not, at which the latent frames of a clip are: see latent_poses."""
    strides = (video_frames - 1) // stride
    count = strides + 1
    return np.linspace(0, strides * stride, count - count % chunk_frames)


def _from_folder(folder: Path) -> Trajectory:
    poses = as_poses(str(folder / "poses.npy"), _read(folder, "poses.npy", "[n, 4, 4]"))
    intrinsics = _read(folder, "intrinsics.npy", f"[{len(poses)}, 4]")
    intrinsics = as_intrinsics(str(folder / "intrinsics.npy"), intrinsics, len(poses))
    return Trajectory(poses, intrinsics, folder.resolve().name)


def _read(folder: Path, name: str, shape: str) -> np.ndarray:
    try:
        array = np.load(folder / name, allow_pickle=False)
    except FileNotFoundError:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "an empty folder"
        raise ValueError(f"trajectory: {folder} must hold {name} {shape}, got {found}") from None
    except Exception as error:  # of numpy, and of all that it reads with: archives, headers in Python's words, memory
        raise ValueError(f"trajectory: {folder / name} must be a numpy array {shape}, got {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise ValueError(f"trajectory: {folder / name} must hold real numbers {shape}, got {array!r:.60}")
    return array


def _from_moves(text: str, turn: float, move: float) -> Trajectory:
    steps, counts = [], []
    for part in text.split(","):
        name, _, count = (piece.strip() for piece in part.partition("*"))
        if name not in MOVES:
            raise ValueError(f"trajectory: a move must be one of {', '.join(MOVES)}, got {name!r} in {text!r}")
        if not (count.isascii() and count.isdigit() and count.strip("0")):
            raise ValueError(
                f"trajectory: a move's count must be a positive integer, as in {name}*10, got {count!r} in {text!r}"
            )
        if len(count) > len(str(MOST_FRAMES)) or sum(counts) + int(count) > MOST_FRAMES:
            raise ValueError(f"trajectory: moves must be at most {MOST_FRAMES} together, got {text!r:.60}")
        steps.append(MOVES[name])
        counts.append(int(count))
    added = np.repeat(np.array([(0, 0, 0, 0), *steps]), [1, *counts], axis=0)  # a row a frame, the first at rest
    views, of_frame = np.unique(added[:, :2].cumsum(axis=0), axis=0, return_inverse=True)  # yaws and pitches in turns
    rotations = np.stack([look_rotation(yaw * turn, pitch * turn) for yaw, pitch in views.tolist()])
    poses = np.tile(np.eye(4), (len(added), 1, 1))
    poses[:, :3, :3] = rotations[of_frame.reshape(-1)]
    right, ahead = added[:, 2:].T * move
    poses[:, :3, 3] = (poses[:, :3, 0] * right[:, None] + poses[:, :3, 2] * ahead[:, None]).cumsum(axis=0)
    return Trajectory(poses, np.tile(DEFAULT_INTRINSICS, (len(poses), 1)), text)
