"""Camera poses: 4 x 4 camera-to-world matrices in OpenCV coordinates, checked, averaged and compared."""

from __future__ import annotations

import math

import numpy as np
import torch

from .checks import bad_value

_RIGID_TOLERANCE = 1e-3  # of R^T R - I; poses in half precision pass, a scaled or sheared frame does not
_FARTHEST = 1e9  # in any unit of length: its square is far from overflow, also in the float32 of the published code
# Of convention_hint: steps of a clip that may have one, what counts as ahead, and shares of its length.
_LEAST_MOVING, _AHEAD, _SHARE_AHEAD, _SHARE_SIDEWAYS = 8, 0.7, 0.1, 0.97


def as_poses(op: str, poses: object, frames: int | None = None) -> np.ndarray:
    """Check rigid camera-to-world poses and return a copy of them, float64 [frames, 4, 4].

    Takes an array or a tensor of real numbers (of a tensor on a GPU the copy synchronises). Raises ValueError naming
    `op` when the shape is wrong, a number is not finite or beyond 1e9, or a pose is not a rotation and a translation,
    TypeError on what is no array of real numbers.
    """
    wanted = f"[{frames if frames is not None else 'frames'}, 4, 4]"
    array = as_real(op, "poses", f"an array {wanted}", poses)
    if array.ndim != 3 or array.shape[1:] != (4, 4) or (frames is not None and len(array) != frames) or not len(array):
        raise ValueError(f"{op}: poses must be {wanted}, got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{op}: poses must be finite, got {array[~np.isfinite(array)][0]}")
    if np.abs(array).max() > _FARTHEST:
        raise ValueError(f"{op}: poses must be of numbers up to {_FARTHEST:.0e}, got {np.abs(array).max():.3g}")
    rotations = array[:, :3, :3]
    error = np.abs(rotations.transpose(0, 2, 1) @ rotations - np.eye(3)).max(axis=(1, 2))
    turned = np.linalg.det(rotations) > 0
    last_row = np.abs(array[:, 3] - (0.0, 0.0, 0.0, 1.0)).max(axis=1)
    orthogonal, rigid = error < _RIGID_TOLERANCE, last_row < _RIGID_TOLERANCE
    rigid &= orthogonal & turned
    if not rigid.all():
        frame = int(np.flatnonzero(~rigid)[0])
        got = f"with |R^T R - I| = {error[frame]:.2g} and last row {array[frame, 3].tolist()}"
        if orthogonal[frame] and not turned[frame]:
            got = "with a reflection, of determinant -1, for a rotation"
        raise ValueError(
            f"{op}: poses must be rigid, a rotation, a translation and the row 0 0 0 1, got frame {frame} {got}"
        )
    return array


def as_float64(numbers: object) -> np.ndarray:
    """A copy of an array or tensor of any real dtype, as a float64 array on the host; TypeError on complex numbers."""
    if isinstance(numbers, torch.Tensor):
        if numbers.is_complex():
            raise TypeError(f"must be of real numbers, got {numbers.dtype}")
        return np.array(numbers.detach().cpu().double().numpy())
    array = np.asarray(numbers)
    if array.dtype.kind == "c":
        raise TypeError(f"must be of real numbers, got {array.dtype}")
    return np.array(array, dtype=np.float64)


def as_real(op: str, argument: str, wanted: str, numbers: object) -> np.ndarray:
    """as_float64; naming `op` and `argument`, raises TypeError on what is no array of real numbers, booleans too, and
    ValueError on numbers too large for it."""
    try:
        array = as_float64(numbers)
        if (numbers if isinstance(numbers, torch.Tensor) else np.asarray(numbers)).dtype in (torch.bool, np.bool_):
            raise TypeError("got booleans")
    except OverflowError as error:
        raise bad_value(op, argument, f"{wanted} of numbers that a float can hold", numbers) from error
    except (TypeError, ValueError) as error:
        got = type(numbers).__name__ + (f" of {numbers.dtype}" if hasattr(numbers, "dtype") else "")
        raise TypeError(f"{op}: {argument} must be {wanted} of real numbers, got {got}") from error
    return array


def as_intrinsics(op: str, intrinsics: object, frames: int) -> np.ndarray:
    """Check pinhole intrinsics (fx, fy, cx, cy) in pixels and return a copy of them, float64 [frames, 4]."""
    array = as_real(op, "intrinsics", f"an array [{frames}, 4] or [4]", intrinsics)
    if array.shape == (4,):
        array = np.tile(array, (frames, 1))
    if array.shape != (frames, 4):
        raise ValueError(f"{op}: intrinsics must be [{frames}, 4] or [4], got {list(array.shape)}")
    if not (np.isfinite(array).all() and (array > 0).all()):
        least = array.min(axis=0).tolist()
        raise ValueError(f"{op}: intrinsics must be positive fx, fy, cx, cy in pixels, got {least}")
    return array


def look_rotation(yaw: float, pitch: float) -> np.ndarray:
    """Camera-to-world [3, 3]: pitch up about the camera's x, then yaw to the right about the world's y, in radians."""
    sin, cos = math.sin(yaw), math.cos(yaw)
    about_y = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
    sin, cos = math.sin(pitch), math.cos(pitch)
    about_x = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    return about_y @ about_x


def rotation_angles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Angles in radians between rotations a [n, 3, 3] and b [m, 3, 3], as [n, m].

    From |A - B| = 2 sqrt(2) sin(angle / 2), which keeps its precision near zero, where acos loses half.
    """
    chord = np.linalg.norm(a[:, None] - b[None, :], axis=(2, 3)) / (2 * math.sqrt(2))
    return 2 * np.arcsin(np.clip(chord, 0.0, 1.0))


def _log(rotation: np.ndarray) -> np.ndarray:
    """Axis times angle of a rotation matrix."""
    angle = float(rotation_angles(rotation[None], np.eye(3)[None])[0, 0])
    skew = np.array([rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]])
    if angle < 1e-6:
        return skew / 2
    if angle > math.pi - 1e-4:  # the skew part vanishes; the axis is in the symmetric one
        axis = np.linalg.eigh((rotation + rotation.T) / 2)[1][:, 2]
        return axis * angle * (1.0 if axis @ skew >= 0 else -1.0)
    return skew * (angle / (2 * math.sin(angle)))


def _exp(vector: np.ndarray) -> np.ndarray:
    """The rotation matrix of an axis times an angle (Rodrigues)."""
    angle = np.linalg.norm(vector)
    if angle < 1e-12:
        return np.eye(3)
    x, y, z = vector / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


def interpolated(poses: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Poses [m, 4, 4] at frame numbers `frames` [m], which may lie between those of `poses` [n, 4, 4], from 0 to n - 1.

    In between, translations lie on the straight line and rotations on the shortest arc, both at even speed (slerp, for
    rotations). At a whole number it is that frame's pose, to the bit.
    """
    before = np.floor(frames).astype(np.int64)
    made = poses[before]
    for place in np.flatnonzero(frames != before):
        one, other, part = made[place].copy(), poses[before[place] + 1], frames[place] - before[place]
        made[place, :3, 3] += part * (other[:3, 3] - one[:3, 3])
        made[place, :3, :3] = one[:3, :3] @ _exp(part * _log(one[:3, :3].T @ other[:3, :3]))
    return made


def geodesic_mean(rotations: np.ndarray) -> np.ndarray:
    """The rotation with the least sum of squared angles to `rotations` [n, 3, 3] (Karcher's mean).

    Unlike the mean of the matrices it is a rotation: the mean of a turning chunk lies as far from itself
    as that of a standing one, at zero. Starts from the projected arithmetic mean.
    """
    u, _, vt = np.linalg.svd(rotations.mean(axis=0))
    mean = u @ np.diag([1.0, 1.0, np.linalg.det(u @ vt)]) @ vt
    for _ in range(50):
        step = np.mean([_log(mean.T @ rotation) for rotation in rotations], axis=0)
        mean = mean @ _exp(step)
        if np.linalg.norm(step) < 1e-12:
            break
    return mean


def mean_pose(poses: np.ndarray) -> np.ndarray:
    """Mean translation and geodesic mean rotation of [n, 4, 4], as [4, 4]."""
    mean = np.eye(4)
    mean[:3, 3] = poses[:, :3, 3].mean(axis=0)
    mean[:3, :3] = geodesic_mean(poses[:, :3, :3])
    return mean


def convention_hint(poses: np.ndarray) -> str | None:
    """What to look at when a clip's camera hardly ever goes where it looks, which poses of another convention often do.

    Of camera-to-world poses [n, 4, 4], judged by the share of the camera's way that goes within 45 degrees of its
    viewing direction: .99 and .30 in two videos that fly and sweep, .02 and .01 when inverted, 0 and .04 when turned
    to OpenGL's. None where it is above a tenth, as in a way there and back, where nearly all motion is to the side, or
    where fewer than 8 steps move: then nothing can be told.
    """
    steps = np.diff(poses[:, :3, 3], axis=0)
    lengths = np.linalg.norm(steps, axis=1)
    moving = lengths > 1e-3 * lengths.max(initial=0.0)
    if moving.sum() < _LEAST_MOVING:
        return None
    own = np.einsum("nij,ni->nj", poses[:-1, :3, :3], steps)[moving]  # in the camera's axes
    weights = lengths[moving] / lengths[moving].sum()
    directions = own / lengths[moving, None]
    ahead, sideways = weights @ (directions[:, 2] > _AHEAD), weights @ directions[:, 0] ** 2
    if ahead > _SHARE_AHEAD or sideways > _SHARE_SIDEWAYS:
        return None
    return (
        f"the camera hardly ever goes where it looks ({ahead:.0%} of its way). If it should: poses are camera-to-world "
        f"in OpenCV coordinates (x right, y down, z forward); world-to-camera matrices are to be inverted, "
        f"numpy.linalg.inv(poses), and OpenGL's turned, poses @ numpy.diag([1, -1, -1, 1])"
    )
