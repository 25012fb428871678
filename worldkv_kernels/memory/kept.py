"""What a bank keeps of its chunks, to choose among them: their descriptions, or of the policies here arrays of them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from ..poses import rotation_angles
from .retrieval import (
    TIE_RESOLUTION,
    FovRetrieval,
    NearestPolicy,
    PoseRetrieval,
    RetrievalPolicy,
    Scale,
    ordered,
    pick_nearest,
    squared_distances,
)

_CHOOSES = ("describe", "distances", "select", "drop")
_BLOCK = 2**15  # pairs compared at once: few enough that what is made of them stays in a core's cache


class KeptDescriptions:
    """For any policy: what it remembers of each chunk, handed to it whenever it is asked."""

    def __init__(self, policy: RetrievalPolicy) -> None:
        self._policy = policy
        self.clear()

    def clear(self) -> None:
        self._descriptions: dict[int, Any] = {}  # oldest first

    def add(self, chunk: int, description: Any) -> None:
        """A chunk younger than all that are kept."""
        self._descriptions[chunk] = description

    def remove(self, chunk: int) -> None:
        del self._descriptions[chunk]

    def description(self, chunk: int) -> Any:
        """What was given of a chunk, not to be written to."""
        return self._descriptions[chunk]

    def select(self, current: Any, budget: int, first: int, coming: tuple[int, Any] | None) -> Any:
        """The policy's choice among the chunks from `first` on and one that is `coming`, as it gives it."""
        candidates = [(chunk, description) for chunk, description in self._descriptions.items() if chunk >= first]
        return self._policy.select(current, candidates if coming is None else [*candidates, coming], budget)

    def drop(self, exclude: Collection[int] = ()) -> Any:
        """What the policy gives up of all that are kept but those to exclude, as it gives it."""
        return self._policy.drop([item for item in self._descriptions.items() if item[0] not in exclude])


class KeptPoses:
    """For retrieval by pose: poses side by side, and how far all are from each other, in place and in angle.

    It chooses what the policy would, to the bit: only the two maxima that distances are divided by differ from call to
    call, so a pair is compared once, when the younger of the two comes, and a drop divides, adds and looks for the
    least. That takes the same time whatever the camera did. Rows have no order: where a chunk goes, the last row moves.
    16 bytes a pair, of at most `most` chunks, and one more that is coming.
    """

    def __init__(self, policy: NearestPolicy, most: int) -> None:
        self._policy, self._most = policy, most + 2  # one is added before one is dropped
        self._by_pose = policy if isinstance(policy, PoseRetrieval) else policy.by_pose
        self.clear()

    def clear(self) -> None:
        self._count = 0
        self._chunks = np.empty(0, dtype=np.int64)
        self._poses = np.empty((0, 4, 4))
        self._dt, self._dr = np.empty((2, 0, 0))  # symmetric; infinite from a chunk to itself

    def add(self, chunk: int, description: Any) -> None:
        row = self._count
        if row == len(self._chunks):
            self._grow(min(max(8, 2 * row), self._most))
        self._chunks[row] = chunk
        self._describe(row, description)
        now, others = self._poses[row : row + 1], self._poses[:row]
        self._dt[row, :row] = self._dt[:row, row] = squared_distances(now, others)[0]
        self._dr[row, :row] = self._dr[:row, row] = rotation_angles(now[:, :3, :3], others[:, :3, :3])[0]
        self._dt[row, row] = self._dr[row, row] = np.inf
        self._count = row + 1

    def description(self, chunk: int) -> Any:
        """A copy of what was given of a chunk."""
        return self._poses[self._row(chunk)].copy()

    def remove(self, chunk: int) -> None:
        last, row = self._count - 1, self._row(chunk)
        if row != last:
            for array in self._arrays():
                array[row] = array[last]
            for pairs in (self._dt, self._dr):
                pairs[row, :last] = pairs[:last, row] = pairs[last, :last]
                pairs[row, row] = np.inf
        self._count = last

    def select(self, current: Any, budget: int, first: int, coming: tuple[int, Any] | None) -> list[int]:
        """Up to `budget` chunks from `first` on, or the one that is `coming`, as NearestPolicy.select picks them."""
        if coming is None:
            return self._select(current, budget, first)
        self.add(*coming)
        try:
            return self._select(current, budget, first)
        finally:
            self._count -= 1  # the last row

    def drop(self, exclude: Collection[int] = ()) -> int:
        """As NearestPolicy.drop: the older of the two that are most alike; the chunk added last sets the scale.
        As if those to exclude were not there; one other is, at least."""
        if exclude:
            return self._drop_of(np.flatnonzero(~np.isin(self._chunks[: self._count], list(exclude))))
        count, chunks = self._count, self._chunks[: self._count]
        if count == 1:
            return int(chunks[0])
        last = count - 1
        scale = self._by_pose.scale(self._poses[:count], self._dt[last, :last].max(), self._dr[last, :last].max())
        least = np.empty(count)  # twice the distance of each chunk from the one most like it
        step = max(1, _BLOCK // count)
        for start in range(0, count, step):
            rows = slice(start, min(start + step, count))
            least[rows] = scale.sum(self._dt[rows, :count], self._dr[rows, :count]).min(axis=1)
        least *= 0.5
        # The oldest of all chunks that are in such a pair is the older one of it.
        return int(chunks[least <= least.min() + TIE_RESOLUTION].min())

    def _row(self, chunk: int) -> int:
        return int(np.flatnonzero(self._chunks[: self._count] == chunk)[0])

    def _drop_of(self, rows: np.ndarray) -> int:
        """`drop` of the chunks at some rows, of which the youngest sets the scale."""
        chunks, last = self._chunks[rows], rows[self._chunks[rows].argmax()]
        if len(rows) == 1:
            return int(chunks[0])
        others = rows[rows != last]
        scale = self._by_pose.scale(self._poses[rows], self._dt[last, others].max(), self._dr[last, others].max())
        parts = np.array_split(rows, max(1, len(rows) ** 2 // _BLOCK))
        pairs = (np.ix_(part, rows) for part in parts)
        least = 0.5 * np.concatenate([scale.sum(self._dt[some], self._dr[some]).min(axis=1) for some in pairs])
        return int(chunks[least <= least.min() + TIE_RESOLUTION].min())

    def _arrays(self) -> tuple[np.ndarray, ...]:
        """With a row for each chunk."""
        return self._chunks, self._poses

    def _grow(self, room: int) -> None:
        count = self._count
        self._chunks, self._poses = (_grown(array, count, room) for array in self._arrays()[:2])
        pairs = np.empty((2, room, room))
        pairs[0, :count, :count], pairs[1, :count, :count] = self._dt, self._dr
        self._dt, self._dr = pairs

    def _describe(self, row: int, description: Any) -> None:
        self._poses[row] = description

    def _select(self, current: Any, budget: int, first: int) -> list[int]:
        chunks = self._chunks[: self._count]
        rows: Any = slice(self._count)
        if chunks.size and chunks.min() < first:
            rows = np.flatnonzero(chunks >= first)
            chunks = chunks[rows]
        if not chunks.size or budget < 1:
            return []
        to_current, to_picked = self._distances(current, rows)
        picked = pick_nearest(to_current, to_picked, chunks, budget, self._policy.diversity)
        return [int(chunks[place]) for place in picked]

    def _distances(self, current: Any, rows: Any) -> tuple[np.ndarray, Callable[[int], np.ndarray]]:
        """From `current` to these rows, and on its scale from the one at a place among them to all of them."""
        scale, to_current = self._pose_distances(current, rows)
        return to_current, lambda place: 0.5 * scale.sum(*self._pairs(rows, place))

    def _pose_distances(self, pose: np.ndarray, rows: Any) -> tuple[Scale, np.ndarray]:
        now, others = pose[None], self._poses[rows]
        dt = squared_distances(now, others)[0]
        dr = rotation_angles(now[:, :3, :3], others[:, :3, :3])[0]
        scale = self._by_pose.scale(others, dt.max(), dr.max(), now)
        return scale, 0.5 * scale.sum(dt, dr)

    def _pairs(self, rows: Any, place: int) -> tuple[np.ndarray, np.ndarray]:
        row = place if isinstance(rows, slice) else rows[place]
        return self._dt[row][rows], self._dr[row][rows]


class KeptViews(KeptPoses):
    """For retrieval by field of view: cameras and the points of their frusta too. A drop goes by pose."""

    def clear(self) -> None:
        super().clear()
        self._cameras = np.empty((0, 6))
        self._points = np.empty((0, self._policy.samples, 3))

    def _arrays(self) -> tuple[np.ndarray, ...]:
        return *super()._arrays(), self._cameras, self._points

    def _grow(self, room: int) -> None:
        super()._grow(room)
        self._cameras, self._points = (_grown(array, self._count, room) for array in (self._cameras, self._points))

    def _describe(self, row: int, description: Any) -> None:
        self._poses[row], self._cameras[row], self._points[row] = description

    def description(self, chunk: int) -> Any:
        row = self._row(chunk)
        return tuple(array[row].copy() for array in (self._poses, self._cameras, self._points))

    def _distances(self, current: Any, rows: Any) -> tuple[np.ndarray, Callable[[int], np.ndarray]]:
        poses, cameras, points = self._poses[rows], self._cameras[rows], self._points[rows]
        scale, by_pose = self._pose_distances(current[0], rows)

        def to_picked(place: int) -> np.ndarray:
            overlap = self._policy.overlaps((poses[place], cameras[place], points[place]), poses, cameras, points)
            return ordered(overlap, 0.5 * scale.sum(*self._pairs(rows, place)))

        return ordered(self._policy.overlaps(current, poses, cameras, points), by_pose), to_picked


def keep(policy: RetrievalPolicy, most: int) -> KeptDescriptions | KeptPoses:
    """For a bank of at most `most` chunks. A user's own object, or a class that chooses in its own way, is asked."""
    for own, kept in ((PoseRetrieval, KeptPoses), (FovRetrieval, KeptViews)):
        as_here = isinstance(policy, own) and all(
            getattr(policy, name) == getattr(own, name).__get__(policy) for name in _CHOOSES
        )
        if as_here:
            return kept(policy, most)
    return KeptDescriptions(policy)


def _grown(array: np.ndarray, count: int, room: int) -> np.ndarray:
    grown = np.empty((room, *array.shape[1:]), dtype=array.dtype)
    grown[:count] = array[:count]
    return grown
