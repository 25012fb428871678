"""Retrieval policies: which banked chunks come back into the window, and which a full bank gives up.

A policy describes a chunk once, when it is made, and later selects among the descriptions; where it goes by content,
the memory does (contents.py). All of this runs on the host, on a few hundred small records; nothing here touches the
device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from ..actions import ActionIntegrator
from ..checks import as_integer, as_number, bad_type, bad_value, is_number
from ..poses import mean_pose, rotation_angles

# Scores within this of the best are as good as the best, so that float noise between views that are the same
# (standing still, a closed loop) is a tie, and ties go to the older chunk. Not by rounding the scores: noise
# would still split equal ones that lie where the rounding turns, such as 1/128.
TIE_RESOLUTION = 1e-6

_BLOCK_POINTS = 2**14  # seen at once: few enough that what is made of them stays in a core's cache
_MOST_SAMPLES = 2**16  # of a view; the overlap is then right within .001


@runtime_checkable
class RetrievalPolicy(Protocol):
    """What WorldMemory asks of a policy. `candidates` are (chunk number, description), oldest first.

    A policy that has an attribute `stateless`, True, says that a call changes no later one: it is then also asked about
    views that may come next, to prefetch what they would retrieve. One without it is asked once a chunk, by
    begin_chunk, and WorldMemory.prefetch does nothing.

    One that has an attribute `by_content`, True, is not asked to describe: its descriptions are contents, fp32 arrays
    [vectors, dim], and `current` is one vector [dim]. See WorldMemory.begin_chunk and ContentRetrieval. It has to have
    `describe` all the same.

    One that has an attribute `by_mass`, True, is also given `received`, by keyword, in `select` and `drop`: of the
    candidates what WorldMemory.received says. One that was in no window but its own is not in it yet. It needs
    `MemoryConfig.mass_layers`.
    """

    needs_intrinsics: bool

    def describe(self, poses: np.ndarray, intrinsics: np.ndarray | None) -> Any:
        """What to remember of a chunk: from poses [frames, 4, 4] and intrinsics [frames, 4], float64."""

    def select(self, current: Any, candidates: Sequence[tuple[int, Any]], budget: int) -> list[int]:
        """Up to `budget` chunk numbers, best first; equal scores go to the older chunk."""

    def drop(self, candidates: Sequence[tuple[int, Any]]) -> int:
        """The chunk that a full bank gives up; the newest candidate is the one being stored. Pinned chunks are none,
        so that it may be another."""


class NearestPolicy:
    """Selects by a distance between descriptions, with optional diversity.

    Chunks are picked one by one; each pick minimises d(current, i) - diversity * min d(i, picked). With
    diversity 0 that is the plain order of distance. Towards 1, a chunk close to one already picked
    needs to be that much closer to the current view, so near-copies do not take the whole budget.

    `received`, which a subclass that goes by mass is given, is not looked at.

    A full bank gives up the younger chunk of the two that are most alike: along a way of even steps every other one
    goes, where the older of two would be the oldest of all, again and again.
    """

    needs_intrinsics = False
    stateless = True

    def __init__(self, *, diversity: float = 0.0) -> None:
        self.diversity = as_number(type(self).__name__, "diversity", diversity)
        if not 0.0 <= self.diversity <= 1.0:
            raise bad_value(type(self).__name__, "diversity", "from 0 to 1", diversity)

    def distances(self, views: Sequence[Any], others: Sequence[Any], current: Any) -> np.ndarray:
        """Distances [views, others] between descriptions, on the scale that `current` against `others` sets."""
        raise NotImplementedError

    def select(
        self, current: Any, candidates: Sequence[tuple[int, Any]], budget: int, *, received: object = None
    ) -> list[int]:
        if not candidates or budget < 1:
            return []
        views = [description for _, description in candidates]
        picked = pick_nearest(
            self.distances([current], views, current)[0],
            lambda place: self.distances([views[place]], views, current)[0],
            np.arange(len(views)),
            budget,
            self.diversity,
        )
        return [candidates[place][0] for place in picked]

    def drop(self, candidates: Sequence[tuple[int, Any]], *, received: object = None) -> int:
        return candidates[0][0] if len(candidates) == 1 else self.most_alike(candidates)[1]

    def most_alike(self, candidates: Sequence[tuple[int, Any]]) -> tuple[int, int]:
        """The older and the younger of the two, on the scale that the youngest sets; of equal pairs the oldest."""
        views = [description for _, description in candidates]
        pairs = np.triu_indices(len(candidates), k=1)  # the oldest first
        closest = _first_of_least(self.distances(views, views, views[-1])[pairs])
        older, younger = (candidates[int(places[closest])][0] for places in pairs)
        return older, younger


def pick_nearest(
    to_current: np.ndarray, to_others: Callable[[int], np.ndarray], ages: np.ndarray, budget: int, diversity: float
) -> list[int]:
    """Places of up to `budget` candidates, as NearestPolicy picks them, from their distances to the current view.

    `to_others` gives those of the candidate at a place to all; `ages` are least for the oldest.
    """
    to_picked = np.full(len(to_current), np.inf)
    free = np.ones(len(to_current), dtype=bool)
    picked: list[int] = []
    while free.any() and len(picked) < budget:
        bonus = diversity * to_picked if picked and diversity else 0.0
        score = np.where(free, to_current - bonus, np.inf)
        ties = np.flatnonzero(score <= score.min() + TIE_RESOLUTION)
        best = int(ties[ages[ties].argmin()])
        picked.append(best)
        free[best] = False
        if diversity:
            to_picked = np.minimum(to_picked, to_others(best))
    return picked


def _first_of_least(scores: np.ndarray) -> int:
    """Index of the first score that is the least, or within TIE_RESOLUTION of it."""
    return int(np.flatnonzero(scores <= scores.min() + TIE_RESOLUTION)[0])


class Scale(NamedTuple):
    """What differences in place and in angle are divided by; None where that would be noise, and the term is zero."""

    dt: float | None
    dr: float | None

    def sum(self, dt: np.ndarray, dr: np.ndarray) -> np.ndarray:
        """Twice the distance by pose."""
        total = np.zeros_like(dt) if self.dt is None else dt / self.dt
        if self.dr is not None:
            total += dr / self.dr
        return total


class PoseRetrieval(NearestPolicy):
    """Nearest camera pose: 0.5 dt / max dt + 0.5 dr / max dr on chunk means.

    dt is the squared distance of the mean translations, dr the angle between the geodesic mean rotations,
    each divided by its maximum over the candidates (WorldKV, arXiv 2605.22718). A maximum at the level
    of float noise (a camera that only turns, or only moves) divides nothing: that term is zero.
    """

    # Relative to the largest coordinate, and in radians: a hundred times float32's resolution. Poses are often given
    # relative to the first one; a camera that only turns then has coordinates that are all noise, hence the floor,
    # in units of length.
    TRANSLATION_NOISE = 1e-5
    TRANSLATION_FLOOR = 1e-6
    ROTATION_NOISE = 1e-4

    def describe(self, poses: np.ndarray, intrinsics: np.ndarray | None) -> np.ndarray:
        return mean_pose(poses)

    def distances(self, views: Sequence[np.ndarray], others: Sequence[np.ndarray], current: np.ndarray) -> np.ndarray:
        a, b, now = np.stack(views), np.stack(others), current[None]
        angles_now = rotation_angles(now[:, :3, :3], b[:, :3, :3])
        scale = self.scale(b, squared_distances(now, b).max(), angles_now.max(), a, now)
        return 0.5 * scale.sum(squared_distances(a, b), rotation_angles(a[:, :3, :3], b[:, :3, :3]))

    def scale(self, poses: np.ndarray, largest_dt: float, largest_dr: float, *others: np.ndarray) -> Scale:
        """Of these largest differences, where all poses in question [n, 4, 4] set what is noise."""
        extent = max(np.abs(some[:, :3, 3]).max() for some in (poses, *others))
        noise = max(self.TRANSLATION_NOISE * extent, self.TRANSLATION_FLOOR) ** 2
        return Scale(
            largest_dt if largest_dt > noise else None, largest_dr if largest_dr > self.ROTATION_NOISE else None
        )


class ActionRetrieval(PoseRetrieval):
    """Nearest camera pose, of poses that the memory integrates from the player's actions.

    `integrator` says how far each action goes, in which layout; None for ActionIntegrator(), Matrix-Game's "universal"
    with guessed scales. It is a pattern: each WorldMemory integrates on a fresh one of its own.
    """

    def __init__(self, integrator: ActionIntegrator | None = None, *, diversity: float = 0.0) -> None:
        super().__init__(diversity=diversity)
        self.integrator = ActionIntegrator() if integrator is None else integrator


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Between the positions of poses a [n, 4, 4] and b [m, 4, 4], as [n, m]."""
    return np.square(a[:, None, :3, 3] - b[None, :, :3, 3]).sum(axis=2)


def _pair(argument: str, names: str, given: object) -> tuple[float, float]:
    """Two numbers. Raises TypeError naming FovRetrieval's argument on what is none."""
    if not (isinstance(given, Sequence) and len(given) == 2 and all(map(is_number, given))):
        raise bad_type("FovRetrieval", argument, f"two numbers {names}", given)
    first, second = (as_number("FovRetrieval", argument, number) for number in given)
    return first, second


class FovRetrieval(NearestPolicy):
    """Largest overlap of the fields of view.

    Points, even over the image and over log(depth), fill each camera's frustum. The overlap of two cameras is the
    share of the one's points that the other sees, averaged both ways, and the distance is 1 - overlap. Views that
    share nothing are ordered by pose, after all that share something. The points are quasirandom (the R sequence,
    M. Roberts 2018): on a grid, whole layers of points leave the view at once, and unlike overlaps come out equal.

    `depth_range` (near, far) is in the poses' units. `image_size` (height, width) in pixels defaults to
    twice the principal point. `samples`: points of a view; with 128 the overlap is right within 0.05.

    A full bank goes by pose: of two views that show the same from two sides, both stay.
    """

    needs_intrinsics = True

    def __init__(
        self,
        *,
        depth_range: tuple[float, float] = (1.0, 50.0),
        image_size: tuple[int, int] | None = None,
        diversity: float = 0.0,
        samples: int = 128,
    ) -> None:
        super().__init__(diversity=diversity)
        near, far = _pair("depth_range", "(near, far)", depth_range)
        if not (0 < near < far and far / near < math.inf):
            raise bad_value("FovRetrieval", "depth_range", "0 < near < far < infinity", depth_range)
        self.depth_range = (near, far)
        self.image_size = None if image_size is None else _pair("image_size", "(height, width)", image_size)
        if self.image_size is not None and not all(0 < size < math.inf for size in self.image_size):
            raise bad_value("FovRetrieval", "image_size", "a height and a width above 0", image_size)
        samples = as_integer("FovRetrieval", "samples", samples)
        if not 1 <= samples <= _MOST_SAMPLES:
            raise bad_value("FovRetrieval", "samples", f"from 1 to {_MOST_SAMPLES}", samples)
        root = 1.2207440846057596  # of x^4 = x + 1
        steps = np.arange(1, samples + 1) * root ** -np.arange(3.0, 0.0, -1.0)[:, None]
        self._v, self._u, depth = (0.5 + steps) % 1.0  # each [samples], from 0 to 1
        self._z = near * (far / near) ** depth
        self.samples = samples
        self.by_pose = PoseRetrieval()

    def describe(self, poses: np.ndarray, intrinsics: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean pose [4, 4], mean intrinsics with the image size [6], frustum points in the world [n, 3]."""
        assert intrinsics is not None
        pose = mean_pose(poses)
        fx, fy, cx, cy = intrinsics.mean(axis=0)
        camera = np.array([fx, fy, cx, cy, *(self.image_size or (2 * cy, 2 * cx))])
        return pose, camera, self.points(pose, camera)

    def points(self, pose: np.ndarray, camera: np.ndarray) -> np.ndarray:
        """What fills the frustum of a mean pose and camera, in the world, [samples, 3]."""
        fx, fy, cx, cy, height, width = camera
        points = np.stack(
            [(self._u * width - cx) / fx * self._z, (self._v * height - cy) / fy * self._z, self._z], axis=-1
        )
        return points @ pose[:3, :3].T + pose[:3, 3]

    @property
    def scaled_points(self) -> np.ndarray:
        """The same for all views: (u z, v z, z), where u and v go from 0 to 1 over the image, [3, samples]."""
        return np.stack([self._u * self._z, self._v * self._z, self._z])

    def distances(self, views: Sequence[Any], others: Sequence[Any], current: Any) -> np.ndarray:
        poses, cameras, points = (np.stack(arrays) for arrays in zip(*others, strict=True))
        overlap = np.stack([self.overlaps(view, poses, cameras, points) for view in views])
        by_pose = self.by_pose.distances([view[0] for view in views], list(poses), current[0])
        return ordered(overlap, by_pose)

    def overlaps(self, view: Any, poses: np.ndarray, cameras: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Twice the overlap of a description with each of others, [n]: the shares that either sees of the other."""
        pose, camera, own = view
        overlap = np.empty(len(poses))
        step = max(1, _BLOCK_POINTS // self.samples)
        for start in range(0, len(poses), step):
            rows = slice(start, start + step)
            overlap[rows] = self._share_seen(points[rows], pose, camera)
            overlap[rows] += self._share_seen(own, poses[rows], cameras[rows])
        return overlap

    def drop(self, candidates: Sequence[tuple[int, Any]], *, received: object = None) -> int:
        return self.by_pose.drop([(chunk, description[0]) for chunk, description in candidates])

    def _share_seen(self, points: np.ndarray, pose: np.ndarray, camera: np.ndarray) -> np.ndarray:
        """Of points [n, samples, 3] or [samples, 3] the share seen by a pose [4, 4] and camera [6], or by each of n."""
        fx, fy, cx, cy, height, width = np.moveaxis(camera, -1, 0)[..., None]
        local = (points - pose[..., None, :3, 3]) @ pose[..., :3, :3]
        z = local[..., 2]
        near, far = self.depth_range
        ahead = (z >= near * (1 - 1e-6)) & (z <= far * (1 + 1e-6))
        depth = np.where(ahead, z, 1.0)
        u = local[..., 0] / depth * fx + cx
        v = local[..., 1] / depth * fy + cy
        return (ahead & (u >= 0) & (u <= width) & (v >= 0) & (v <= height)).mean(axis=-1)


def ordered(overlap: np.ndarray, by_pose: np.ndarray) -> np.ndarray:
    """Distances by overlap, given twice; by pose for views that share nothing, behind all that share something."""
    return np.where(overlap > 0, 1.0 - overlap / 2, 1.0 + by_pose)


class ContentRetrieval(NearestPolicy):
    """Chunks that look like the last frame made: for models without a camera, or one that is not known.

    A chunk's content is one vector for each of its frames, the mean of their keys in layer 0, unless the caller gives
    others (WorldMemory.begin_chunk, end_chunk). A chunk is as far away as the nearest of its vectors is from that of
    the last frame made, in squared distance. Of the `skip_newest` newest banked chunks, which show what the recent
    frames show, one is chosen only where no other is left.

    What no look back can tell is where the coming chunk goes. On smooth ways one chunk more than by pose makes up for
    most of that; after a cut, or a jump to elsewhere, what comes back is what was seen before the jump. docs/content.md
    has what was measured.

    A full bank gives up what is not finite, else the younger of the two chunks that are most alike: for each vector of
    either, the nearest of the other, on the mean. So does `diversity` tell near-copies. `distances` are divided by the
    largest from the current. All in fp64: keys may have far more in common than what tells them apart.

    After LongLive-RAG (arXiv 2606.02553), which ranks evicted frames by content, too.
    """

    by_content = True

    def __init__(self, *, skip_newest: int = 4, diversity: float = 0.0) -> None:
        super().__init__(diversity=diversity)
        self.skip_newest = as_integer(type(self).__name__, "skip_newest", skip_newest)
        if self.skip_newest < 0:
            raise bad_value(type(self).__name__, "skip_newest", "at least 0", skip_newest)

    def describe(self, poses: np.ndarray, intrinsics: np.ndarray | None) -> Any:
        """Not asked: descriptions are contents."""
        raise NotImplementedError

    def distances(self, views: Sequence[Any], others: Sequence[Any], current: Any) -> np.ndarray:
        contents = np.stack(others).astype(np.float64)
        squares = squared_lengths(contents)
        apart = np.stack([self.apart(view, contents, squares) for view in views])
        return apart / (scale_of(self.apart(current, contents, squares)) or 1.0)

    def select(
        self, current: Any, candidates: Sequence[tuple[int, Any]], budget: int, *, received: object = None
    ) -> list[int]:
        if not candidates or budget < 1:
            return []
        chunks = np.array([chunk for chunk, _ in candidates])
        contents = np.stack([of for _, of in candidates]).astype(np.float64)
        squares = squared_lengths(contents)
        to_current, scale = self.ranked(current, contents, squares, chunks)
        to_picked = self.scaled(lambda place: self.apart(contents[place], contents, squares), scale)
        picked = pick_nearest(to_current, to_picked, chunks, budget, self.diversity)
        return [int(chunks[place]) for place in picked]

    def drop(self, candidates: Sequence[tuple[int, Any]], *, received: object = None) -> int:
        broken = [chunk for chunk, content in candidates if not np.isfinite(content).all()]
        return min(broken) if broken else super().drop(candidates)

    def ranked(
        self, current: np.ndarray, contents: np.ndarray, squares: np.ndarray, chunks: np.ndarray
    ) -> tuple[np.ndarray, float]:
        """From a vector [dim] to contents [n, vectors, dim] of these squared lengths [n, vectors] and chunks, [n]: from
        0 to 1, for the newest ones from 4, and for what is not finite from 8 on; and what it was divided by."""
        to_current = _squared_differences(current[None], contents, squares).min(axis=(1, 2))
        newest = np.zeros(len(chunks), dtype=bool)
        if 0 < self.skip_newest < len(chunks):
            newest = chunks >= np.sort(chunks)[-self.skip_newest]
        scale = scale_of(to_current[~newest]) or 1.0
        to_current = np.minimum(to_current / scale, 1.0) + 4.0 * newest
        return np.where(np.isfinite(to_current), to_current, 8.0), scale

    @staticmethod
    def scaled(apart: Callable[[int], np.ndarray], scale: float) -> Callable[[int], np.ndarray]:
        """How far chunks are from one at a place, for pick_nearest: at most as far as any is from the current view."""
        return lambda place: np.minimum(apart(place) / scale, 1.0)

    @staticmethod
    def apart(content: np.ndarray, contents: np.ndarray, squares: np.ndarray) -> np.ndarray:
        """From a content [vectors, dim] to others, as of `ranked`, [n]; infinity for what is not finite."""
        differences = _squared_differences(content, contents, squares)
        both = differences.min(axis=1).mean(axis=1) + differences.min(axis=2).mean(axis=1)
        return np.where(np.isfinite(both), 0.5 * both, np.inf)


def squared_lengths(contents: np.ndarray) -> np.ndarray:
    """Of vectors [..., dim]."""
    return np.einsum("...d,...d->...", contents, contents)


def _squared_differences(content: np.ndarray, contents: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Of vectors [m, dim] and [n, vectors, dim], [n, vectors, m]. A product for each of n: a chunk's numbers then rest
    on nothing but it, to the last bit."""
    content = content.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.maximum(squares[..., None] + squared_lengths(content) - 2 * (contents @ content.T), 0.0)


def scale_of(distances: np.ndarray) -> float:
    """The largest of those that are finite; 0 where there is none, or nothing but zeros."""
    return float(distances[np.isfinite(distances)].max(initial=0.0))


class OfficialPoseRetrieval:
    """What the published code computes, faults included; for MemoryConfig.official().

    Rotation matrices are averaged and not projected back, the angle is an acos in float32, and both terms
    are divided by their maximum over the candidates however small. Ties, undefined there, go to the older.
    """

    needs_intrinsics = False
    stateless = True

    def describe(self, poses: np.ndarray, intrinsics: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        poses = poses.astype(np.float32)
        return poses[:, :3, 3].mean(axis=0), poses[:, :3, :3].mean(axis=0)

    def select(self, current: Any, candidates: Sequence[tuple[int, Any]], budget: int) -> list[int]:
        if not candidates:
            return []
        positions = np.stack([description[0] for _, description in candidates])
        rotations = np.stack([description[1] for _, description in candidates])
        dt = np.square(positions - current[0]).sum(axis=1)
        trace = (rotations * current[1]).sum(axis=(1, 2))  # of R_i^T R_c
        dr = np.arccos(np.clip((trace - np.float32(1)) / np.float32(2), -1, 1))
        dt = dt / dt.max() if dt.max() > 0 else dt
        dr = dr / dr.max() if dr.max() > 0 else dr
        order = np.argsort(np.float32(0.5) * dt + np.float32(0.5) * dr, kind="stable")
        return [candidates[i][0] for i in order[:budget]]

    def drop(self, candidates: Sequence[tuple[int, Any]]) -> int:
        return candidates[0][0]


def make_policy(retrieval: str | RetrievalPolicy) -> RetrievalPolicy:
    """The policy of a name, or the object itself. Raises ValueError on anything else."""
    if retrieval == "pose":
        return PoseRetrieval()
    if retrieval == "fov":
        return FovRetrieval()
    if retrieval == "action":
        return ActionRetrieval()
    if retrieval == "content":
        return ContentRetrieval()
    if not isinstance(retrieval, (str, type)) and isinstance(retrieval, RetrievalPolicy):
        return retrieval
    raise ValueError(
        f"MemoryConfig: retrieval must be 'pose', 'fov', 'action', 'content' or a RetrievalPolicy, got {retrieval!r}"
    )


def goes_by_content(policy: RetrievalPolicy) -> bool:
    return getattr(policy, "by_content", False)


def goes_by_mass(policy: RetrievalPolicy) -> bool:
    return getattr(policy, "by_mass", False)
