"""What a bank keeps of its chunks, to choose among them: their descriptions, or of the policies here arrays of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from .frusta import Frusta
from .pairs import Pairs
from .received import Received
from .retrieval import (
    TIE_RESOLUTION,
    ContentRetrieval,
    FovRetrieval,
    NearestPolicy,
    PoseRetrieval,
    RetrievalPolicy,
    Scale,
    goes_by_mass,
    ordered,
    pick_nearest,
    scale_of,
    squared_lengths,
)

_CHOOSES = ("describe", "distances", "select", "drop")
_BLOCK = 2**15  # pairs compared at once: few enough that what is made of them stays in a core's cache


class KeptDescriptions:
    """For any policy: what it remembers of each chunk, handed to it whenever it is asked; to one that goes by mass with
    what chunks have `received`."""

    def __init__(self, policy: RetrievalPolicy, received: Received | None = None) -> None:
        self._policy, self._received = policy, received if goes_by_mass(policy) else None
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
        on_offer = candidates if coming is None else [*candidates, coming]
        return self._policy.select(current, on_offer, budget, **self._mass(on_offer))

    def drop(self, exclude: Collection[int] = ()) -> Any:
        """What the policy gives up of all that are kept but those to exclude, as it gives it."""
        on_offer = [item for item in self._descriptions.items() if item[0] not in exclude]
        return self._policy.drop(on_offer, **self._mass(on_offer))

    def _mass(self, on_offer: list[tuple[int, Any]]) -> dict[str, dict[int, float]]:
        if self._received is None:
            return {}
        known = self._received.known.chunks
        return {"received": {chunk: known[chunk] for chunk, _ in on_offer if chunk in known}}


class KeptRows(ABC):
    """For policies here: arrays of a row a chunk, and numbers of each two of them, how far they are from each other.

    It chooses what the policy would: only what distances are divided by differs from call to call, so a pair is
    compared once, when the younger of the two comes, and a drop scales, adds and looks for the least. That takes the
    same time whatever was seen. Rows have no order: where a chunk goes, the last row moves. Of at most `most` chunks,
    and one more that is coming.
    """

    _pieces: Collection[str] = ()  # arrays of which a row is one piece of memory; of the others, one place of all rows

    def __init__(self, policy: NearestPolicy, most: int) -> None:
        self._policy, self._most = policy, most + 2  # one is added before one is dropped
        self._scratch = np.empty(_BLOCK)
        self.clear()

    def clear(self) -> None:
        self._count = 0
        self._ready: tuple[int, Any, int] | None = None  # chunk, description and row of what was written last
        self._arrays = {"chunks": np.empty(0, dtype=np.int64)}  # rows in the last axis
        self._pairs: dict[str, Pairs] = {}

    def add(self, chunk: int, description: Any) -> None:
        self._write(chunk, description)
        self._count += 1

    @abstractmethod
    def description(self, chunk: int) -> Any:
        """A copy of what was given of a chunk."""

    def remove(self, chunk: int) -> None:
        last, row = self._count - 1, self._row(chunk)
        if row != last:
            for array in self._arrays.values():
                array[..., row] = array[..., last]
            for pairs in self._pairs.values():
                pairs.move(last, row)
        self._count, self._ready = last, None

    def select(self, current: Any, budget: int, first: int, coming: tuple[int, Any] | None) -> list[int]:
        """Up to `budget` chunks from `first` on, or the one that is `coming`, as the policy's select picks them."""
        if coming is None:
            return self._select(current, budget, first)
        self._write(*coming)
        self._count += 1
        try:
            return self._select(current, budget, first)
        finally:
            self._count -= 1  # what is written stays: it will be added, as a rule

    def drop(self, exclude: Collection[int] = ()) -> int:
        """As NearestPolicy.drop: the younger of the two that are most alike; the youngest of all sets the scale. As if
        those to exclude were not there; one other is, at least."""
        count, chunks = self._count, self._array("chunks")
        held = np.flatnonzero(np.isin(chunks, list(exclude))) if exclude else np.empty(0, dtype=np.int64)
        rows: Any = np.delete(np.arange(count), held) if len(held) else slice(count)
        youngest = int(np.arange(count)[rows][chunks[rows].argmax()])
        scale = self._scale(youngest, rows)
        if len(chunks[rows]) == 1 or scale is None:
            return int(np.sort(chunks[rows])[:2][-1])
        measured = self._pairs[self._measured(scale)].all(count)
        places = [next(iter(self._pairs.values())).places(row, count) for row in held]
        before = [measured[of_row] for of_row in places]
        for of_row in places:
            measured[of_row] = np.inf
        try:
            return self._most_alike(scale)[1]
        finally:
            for of_row, numbers in zip(places, before, strict=True):
                measured[of_row] = numbers

    @abstractmethod
    def _scale(self, youngest: int, rows: Any) -> Any:
        """What numbers of pairs are divided by in a drop, by those of the youngest row; None where nothing tells any
        apart."""

    @abstractmethod
    def _measured(self, scale: Any) -> str:
        """Of the numbers that go into a distance, the name of one."""

    @abstractmethod
    def _unit(self, scale: Any) -> float:
        """Of the numbers that are compared, in distances."""

    @abstractmethod
    def _compared(self, scale: Any, some: slice) -> np.ndarray:
        """Of some pairs a number that is in proportion to their distance."""

    @abstractmethod
    def _describe(self, row: int, description: Any) -> None:
        """Write a row, the last, and its pairs."""

    @abstractmethod
    def _distances(self, current: Any, rows: Any) -> tuple[np.ndarray, Callable[[int], np.ndarray]]:
        """From `current` to these rows, and on its scale from the one at a place among them to all of them."""

    def _most_alike(self, scale: Any) -> tuple[int, int]:
        """As NearestPolicy.most_alike: of the pair whose distance is the least, of all within TIE_RESOLUTION of that
        the oldest. In one go over all pairs, of which those are noted that are so near the least so far."""
        starts = next(iter(self._pairs.values())).starts[: self._count + 1]
        tie = self._unit(scale) * TIE_RESOLUTION
        least, noted = np.inf, []
        for start in range(0, int(starts[-1]), _BLOCK):
            numbers = self._compared(scale, slice(start, min(start + _BLOCK, int(starts[-1]))))
            here = numbers.min()
            least = min(least, here)
            if here <= least + tie:
                hits = np.flatnonzero(numbers <= least + tie)
                noted.append((start + hits, numbers[hits]))
        hits, numbers = (np.concatenate(some) for some in zip(*noted, strict=True))
        hits = hits[numbers <= least + tie]
        chunks = self._array("chunks")
        of = np.searchsorted(starts, hits, side="right") - 1  # of row 0 there are none
        pairs = np.sort([chunks[of], chunks[hits - starts[of]]], axis=0)
        older, younger = pairs[:, np.lexsort(pairs[::-1])[0]]
        return int(older), int(younger)

    def _row(self, chunk: int) -> int:
        return int(np.flatnonzero(self._array("chunks") == chunk)[0])

    def _array(self, name: str) -> np.ndarray:
        return self._arrays[name][..., : self._count]

    def _write(self, chunk: int, description: Any) -> None:
        """Into the row after the last, unless it stands there already."""
        row = self._count
        if self._ready is not None and self._ready[::2] == (chunk, row) and self._ready[1] is description:
            return
        self._ready = None
        if row == self._arrays["chunks"].shape[-1]:
            room = min(max(8, 2 * row), self._most)
            self._arrays = {
                name: _grown(array, row, room, name in self._pieces) for name, array in self._arrays.items()
            }
            for pairs in self._pairs.values():
                pairs.grow(room)
        self._arrays["chunks"][row] = chunk
        self._describe(row, description)
        self._ready = chunk, description, row

    def _select(self, current: Any, budget: int, first: int) -> list[int]:
        chunks = self._array("chunks")
        rows: Any = slice(self._count)
        if chunks.size and chunks.min() < first:
            rows = np.flatnonzero(chunks >= first)
            chunks = chunks[rows]
        if not chunks.size or budget < 1:
            return []
        to_current, to_picked = self._distances(current, rows)
        picked = pick_nearest(to_current, to_picked, chunks, budget, self._policy.diversity)
        return [int(chunks[place]) for place in picked]

    def _of_pairs(self, name: str, rows: Any, place: int, itself: float) -> np.ndarray:
        row = place if isinstance(rows, slice) else int(rows[place])
        return self._pairs[name].of(row, self._count, itself)[rows]


class KeptPoses(KeptRows):
    """For retrieval by pose: poses side by side, and how far all are from each other, in place and in angle. 16 bytes
    of each two."""

    def __init__(self, policy: NearestPolicy, most: int) -> None:
        self._by_pose = policy if isinstance(policy, PoseRetrieval) else policy.by_pose
        super().__init__(policy, most)

    def clear(self) -> None:
        super().clear()
        self._arrays["poses"] = np.empty((4, 4, 0))
        self._pairs = {"dt": Pairs(np.float64), "dr": Pairs(np.float64)}

    def description(self, chunk: int) -> Any:
        return self._array("poses")[..., self._row(chunk)].copy()

    def _scale(self, youngest: int, rows: Any) -> Scale | None:
        dt, dr = (self._pairs[name].of(youngest, self._count, -np.inf)[rows].max() for name in ("dt", "dr"))
        scale = self._by_pose.scale(np.moveaxis(self._array("poses")[..., rows], -1, 0), dt, dr)
        return None if scale == (None, None) else scale

    def _measured(self, scale: Scale) -> str:
        return "dr" if scale.dt is None else "dt"

    def _unit(self, scale: Scale) -> float:
        return 2 * (scale.dr if scale.dt is None else scale.dt)

    def _compared(self, scale: Scale, some: slice) -> np.ndarray:
        dt, dr = (self._pairs[name].all(self._count)[some] for name in ("dt", "dr"))
        if scale.dt is None or scale.dr is None:
            return dr if scale.dt is None else dt
        numbers = np.multiply(dr, scale.dt / scale.dr, out=self._scratch[: len(dr)])
        return np.add(numbers, dt, out=numbers)

    def _describe(self, row: int, description: Any) -> None:
        self._describe_pose(row, description)

    def _describe_pose(self, row: int, pose: np.ndarray) -> None:
        self._arrays["poses"][..., row] = pose
        dt, dr = _differences(pose, self._array("poses"))
        self._pairs["dt"].put(row, dt)
        self._pairs["dr"].put(row, dr)

    def _distances(self, current: Any, rows: Any) -> tuple[np.ndarray, Callable[[int], np.ndarray]]:
        scale, to_current = self._pose_distances(current, rows)
        return to_current, lambda place: self._to_picked(scale, rows, place)

    def _pose_distances(self, pose: np.ndarray, rows: Any) -> tuple[Scale, np.ndarray]:
        others = self._array("poses")[..., rows]
        dt, dr = _differences(pose, others)
        scale = self._by_pose.scale(np.moveaxis(others, -1, 0), dt.max(), dr.max(), pose[None])
        return scale, 0.5 * scale.sum(dt, dr)

    def _to_picked(self, scale: Scale, rows: Any, place: int) -> np.ndarray:
        dt, dr = (self._of_pairs(name, rows, place, np.inf) for name in ("dt", "dr"))
        return 0.5 * scale.sum(dt, dr)


class KeptViews(KeptPoses):
    """For retrieval by field of view: cameras too. With diversity, which compares chunks with each other, how much they
    see of each other too: 2 bytes more of each two, 4 from 32768 samples on. A drop goes by pose."""

    def __init__(self, policy: FovRetrieval, most: int) -> None:
        self._frusta = Frusta(policy.scaled_points, policy.depth_range)
        super().__init__(policy, most)

    def clear(self) -> None:
        super().clear()
        self._arrays |= {"cameras": np.empty((6, 0)), "out": np.empty((3, 3, 0)), "into": np.empty((3, 3, 0))}
        if self._policy.diversity:
            self._pairs["seen"] = Pairs(np.min_scalar_type(2 * self._policy.samples))

    def description(self, chunk: int) -> Any:
        row = self._row(chunk)
        pose, camera = (self._arrays[name][..., row].copy() for name in ("poses", "cameras"))
        return pose, camera, self._policy.points(pose, camera)

    def _describe(self, row: int, description: Any) -> None:
        pose, camera, _ = description
        self._describe_pose(row, pose)
        out, into = self._frusta.matrices(pose, camera)
        for name, array in {"cameras": camera, "out": out, "into": into}.items():
            self._arrays[name][..., row] = array
        if "seen" in self._pairs:
            self._pairs["seen"].put(row, self._seen(pose, out, into, slice(self._count)))

    def _distances(self, current: Any, rows: Any) -> tuple[np.ndarray, Callable[[int], np.ndarray]]:
        pose, camera, _ = current
        scale, by_pose = self._pose_distances(pose, rows)

        def to_picked(place: int) -> np.ndarray:
            if "seen" in self._pairs:
                seen = self._of_pairs("seen", rows, place, 2 * self._policy.samples)
            else:  # diversity was set later
                one = (self._array(name)[..., rows][..., place] for name in ("poses", "out", "into"))
                seen = self._seen(*one, rows)
            return ordered(seen / self._policy.samples, self._to_picked(scale, rows, place))

        seen = self._seen(pose, *self._frusta.matrices(pose, camera), rows)
        return ordered(seen / self._policy.samples, by_pose), to_picked

    def _seen(self, pose: np.ndarray, out: np.ndarray, into: np.ndarray, rows: Any) -> np.ndarray:
        poses, outs, intos = (self._array(name)[..., rows] for name in ("poses", "out", "into"))
        return self._frusta.seen(pose[:3, 3], out, into, poses[:3, 3], outs, intos)


class KeptContents(KeptRows):
    """For retrieval by content: contents side by side, and how far chunks are from each other. 8 bytes of each two, and
    8 of each number of a content: 120 KiB a chunk of three frames where a model has 40 heads of 128."""

    _pieces = ("contents", "squares")  # products read a content as it lies

    def clear(self) -> None:
        super().clear()
        self._pairs["apart"] = Pairs(np.float64)

    def description(self, chunk: int) -> Any:
        return self._contents(self._row(chunk))[0].astype(np.float32)

    def drop(self, exclude: Collection[int] = ()) -> int:
        finite = np.isfinite(self._array("squares")).all(axis=0)
        broken = [int(chunk) for chunk in self._array("chunks")[~finite] if chunk not in exclude]
        return min(broken) if broken else super().drop(exclude)

    def _contents(self, rows: Any) -> tuple[np.ndarray, np.ndarray]:
        """Of these rows, [..., vectors, dim], and their squared lengths [..., vectors]."""
        contents, squares = (np.moveaxis(self._array(name), -1, 0)[rows] for name in ("contents", "squares"))
        return contents, squares

    def _scale(self, youngest: int, rows: Any) -> float | None:
        return scale_of(self._pairs["apart"].of(youngest, self._count, 0.0)[rows]) or None

    def _measured(self, scale: float) -> str:
        return "apart"

    def _unit(self, scale: float) -> float:
        return scale

    def _compared(self, scale: float, some: slice) -> np.ndarray:
        return self._pairs["apart"].all(self._count)[some]

    def _write(self, chunk: int, description: Any) -> None:
        if "contents" not in self._arrays:  # they are as large as the first one
            for name, shape in {"contents": description.shape, "squares": description.shape[:1]}.items():
                self._arrays[name] = np.empty((*shape, 0))
        super()._write(chunk, description)

    def _describe(self, row: int, description: Any) -> None:
        self._arrays["contents"][..., row] = description
        self._arrays["squares"][..., row] = squared_lengths(description.astype(np.float64))
        self._pairs["apart"].put(row, self._policy.apart(description, *self._contents(slice(row))))

    def _distances(self, current: Any, rows: Any) -> tuple[np.ndarray, Callable[[int], np.ndarray]]:
        to_current, scale = self._policy.ranked(current, *self._contents(rows), self._array("chunks")[rows])
        return to_current, self._policy.scaled(lambda place: self._of_pairs("apart", rows, place, 0.0), scale)


def keep(policy: RetrievalPolicy, most: int, received: Received | None = None) -> KeptDescriptions | KeptRows:
    """For a bank of at most `most` chunks. A user's own object, or a class that chooses in its own way, is asked."""
    for own, kept in ((PoseRetrieval, KeptPoses), (FovRetrieval, KeptViews), (ContentRetrieval, KeptContents)):
        as_here = isinstance(policy, own) and all(
            getattr(policy, name) == getattr(own, name).__get__(policy) for name in _CHOOSES
        )
        if as_here:
            return kept(policy, most)
    return KeptDescriptions(policy, received)


def _differences(pose: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of a pose [4, 4] from others [4, 4, n]: squared distances and angles, see retrieval.py and poses.py."""
    differences = others[:3] - pose[:3, :, None]
    squares = np.square(differences, out=differences)
    chord = np.sqrt(squares[:, :3].reshape(9, -1).sum(axis=0)) / (2 * math.sqrt(2))
    return squares[:, 3].sum(axis=0), 2 * np.arcsin(np.minimum(chord, 1.0))


def _grown(array: np.ndarray, count: int, room: int, in_pieces: bool) -> np.ndarray:
    shape = array.shape[:-1]
    grown = np.empty((room, *shape) if in_pieces else (*shape, room), dtype=array.dtype)
    grown = np.moveaxis(grown, 0, -1) if in_pieces else grown
    grown[..., :count] = array[..., :count]
    return grown
