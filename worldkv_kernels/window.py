"""The window: which pool rows a query attends to, as tables that a kernel walks."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

from .checks import as_device, bad_type, bad_value, check_bool, describe, is_integer, is_number
from .rope import Rope3D
from .tables import Tables

TILE_ROWS = 128
_INT32_MAX = 2**31 - 1
_MAX_TILES = 2**24  # whose rows are 2**31
# A factor of 3000 either way. Within it a kernel may take weights per row of a block, relative to none: the largest,
# exp(8), leaves fp16 room, and is less than half of the distance of fp32 numbers where scores become that coarse.
MAX_LOG_WEIGHT = 8.0
_WANTED = "(first_row, num_rows, time_shift=0, log_weight=0.0)"


class Segment(NamedTuple):
    """Contiguous pool rows attended as one piece; `time_shift` in latent frames, may be negative.

    The softmax weight of each of the rows is multiplied by exp(log_weight), a natural logarithm from -8 to 8.
    """

    first_row: int
    num_rows: int
    time_shift: int = 0
    log_weight: float = 0.0


def table_shapes(capacity: int, rope: Rope3D | None, weighted: bool) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each of a window's tables, which lie on the device and, to be filled, in host memory."""
    return {
        "tiles": ((capacity, 2), torch.int32),
        "tail_rows": ((capacity * TILE_ROWS, 2), torch.int32),
        "ranges": ((capacity + 1, 4), torch.int32),
        "num_segments": ((1,), torch.int32),
        "turns": ((capacity if rope else 1, _turned_pairs(rope), 2), torch.float32),
        "weights": ((capacity if weighted else 1,), torch.float32),
    }


def _turned_pairs(rope: Rope3D | None) -> int:
    return max(1, rope.pairs[0]) if rope else 1  # a table is not empty


def tiles_of(num_rows: int) -> int:
    """How many tiles of 128 rows a segment of `num_rows` takes."""
    return -(-num_rows // TILE_ROWS)


class Window:
    """The segments that every query attends to, in order, kept on the device at fixed addresses.

    `update` rewrites the tables in place, so a captured CUDA graph sees the new window. Segments may be
    of any length from one row, in any order, and may overlap: a row that two segments name counts twice.
    `capacity` is in tiles of 128 rows and defaults to what the first segments need. Only with a `rope` may
    segments have time shifts, and only with `weighted` may they have log weights; attention then takes the path
    that turns queries, or the one that weighs segments, whatever the shifts and weights, so that a captured graph
    serves every later window.

    Raises ValueError when there is no segment, a segment is empty or starts below row 0, a row or a time shift is not
    below 2**31, a log weight is not from -8 to 8, the capacity is too small or above 2**24, a time shift comes without
    a rope or a log weight without `weighted`, or torch cannot use the device; TypeError when a number is not an
    integer, or for a log weight no number, the rope no Rope3D, or `weighted` not True or False.
    """

    def __init__(
        self,
        segments: Iterable[Segment | tuple[float, ...]],
        *,
        device: torch.device | str,
        rope: Rope3D | None = None,
        weighted: bool = False,
        capacity: int | None = None,
    ) -> None:
        if rope is not None and not isinstance(rope, Rope3D):
            raise bad_type("Window", "rope", "a Rope3D or None", rope)
        check_bool("Window", "weighted", weighted)
        checked = _checked(segments, rope, weighted)
        needed = sum(tiles_of(s.num_rows) for s in checked)
        if capacity is not None and not is_integer(capacity):
            raise bad_type("Window", "capacity", "an integer or None", capacity)
        self.capacity = needed if capacity is None else operator.index(capacity)
        if self.capacity > _MAX_TILES:
            raise bad_value("Window", "capacity", f"at most {_MAX_TILES} tiles of 128 rows", self.capacity)
        self._check_capacity(checked)
        self.device = as_device("Window", device, only=None)
        self.rope = rope
        self.has_shift = rope is not None
        self.has_weight = weighted
        self._turned_pairs = _turned_pairs(rope)
        self._tables = Tables(table_shapes(self.capacity, rope, weighted), self.device)
        self.segments: tuple[Segment, ...] = ()
        self._load(checked)

    @property
    def tables(self) -> tuple[torch.Tensor, ...]:
        """What a kernel reads, always at the same addresses; kernels/segment_attention.py says what is in each.

        tiles int32 [capacity, 2], tail_rows int32 [128 * capacity, 2], ranges int32 [capacity + 1, 4], num_segments
        int32 [1], turns fp32 [capacity, pairs, 2] of the rope's pairs that turn with time, one at least, or [1, 1, 2]
        without a rope, weights fp32 [capacity], or [1] of a window that is not weighted.
        """
        return tuple(self._tables.on_device.values())

    def update(self, segments: Iterable[Segment | tuple[float, ...]]) -> None:
        """Replace the segments. Copies asynchronously on the current stream; the old window stays on error."""
        self._load(_checked(segments, self.rope, self.has_weight))

    def _check_capacity(self, segments: tuple[Segment, ...]) -> None:
        needed = sum(tiles_of(s.num_rows) for s in segments)
        if needed > self.capacity:
            fits = f"capacity={describe(self.capacity)} tiles of 128 rows"
            raise ValueError(f"Window: segments must fit {fits}, got {needed}")

    def _load(self, segments: tuple[Segment, ...]) -> None:
        self._check_capacity(segments)
        host = self._tables.host()
        first = np.array([s.first_row for s in segments], dtype=np.int64)
        rows = np.array([s.num_rows for s in segments], dtype=np.int64)
        full, tail = rows // TILE_ROWS, rows % TILE_ROWS
        full_hi, tail_hi = np.cumsum(full), np.cumsum(tail)
        num_full, num_tail = int(full_hi[-1]), int(tail_hi[-1])
        segment = np.arange(len(segments))
        host["tiles"][:num_full, 0] = _runs(first, full, full_hi, TILE_ROWS)
        host["tiles"][:num_full, 1] = np.repeat(segment, full)
        host["tail_rows"][:num_tail, 0] = _runs(first + full * TILE_ROWS, tail, tail_hi, 1)
        host["tail_rows"][:num_tail, 1] = np.repeat(segment, tail)
        host["ranges"][0] = (0, num_full, 0, num_tail)
        host["ranges"][1 : 1 + len(segments)] = np.stack([full_hi - full, full_hi, tail_hi - tail, tail_hi], axis=1)
        host["num_segments"][0] = len(segments)
        used = {"tiles": num_full, "tail_rows": num_tail, "ranges": 1 + len(segments), "num_segments": 1}
        if self.rope is not None:
            used["turns"] = len(segments)
            for i, segment in enumerate(segments):
                host["turns"][i] = self.rope.turn(segment.time_shift)[: self._turned_pairs]
        if self.has_weight:
            used["weights"] = len(segments)
            host["weights"][: len(segments)] = np.array([s.log_weight for s in segments]) / math.log(2)
        self._tables.copy(used)
        self.segments = segments
        self.num_segments = len(segments)
        self.num_tokens = int(rows.sum())
        self.last_row = int((first + rows).max()) - 1

    def __repr__(self) -> str:
        return f"Window({self.num_segments} segments, {self.num_tokens} tokens, capacity={self.capacity} tiles)"


def _runs(first: np.ndarray, lengths: np.ndarray, ends: np.ndarray, step: int) -> np.ndarray:
    """From each of `first`, as many numbers as `lengths` says, `step` apart; `ends` is the running sum of lengths."""
    within = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    return np.repeat(first, lengths) + within * step


def _checked(
    segments: Iterable[Segment | tuple[float, ...]], rope: Rope3D | None, weighted: bool
) -> tuple[Segment, ...]:
    if not isinstance(segments, Iterable):
        raise bad_type("Window", "segments", f"a list of {_WANTED}", segments)
    checked = tuple(_checked_segment(i, given) for i, given in enumerate(segments))
    for i, segment in enumerate(checked):
        if segment.time_shift and rope is None:
            raise ValueError(f"Window: segments[{i}] has time_shift={segment.time_shift}, which needs rope=, got None")
        if segment.log_weight and not weighted:
            has = f"has log_weight={segment.log_weight}"
            raise ValueError(f"Window: segments[{i}] {has}, which needs weighted=True, got False")
    if not checked:
        raise ValueError("Window: segments must hold at least one segment, got none")
    return checked


def _checked_segment(i: int, given: Segment | tuple[float, ...]) -> Segment:
    try:
        numbers = tuple(given)
        integers, weight = numbers[:3], numbers[3] if len(numbers) > 3 else 0.0
        segment = Segment(*map(operator.index, integers), *numbers[3:])
        if any(isinstance(number, bool) for number in integers) or not is_number(weight):
            raise TypeError("a boolean is no number here")
    except TypeError as error:
        wanted = f"{_WANTED} of integers below 2**31 and a number from {-MAX_LOG_WEIGHT:g} to {MAX_LOG_WEIGHT:g}"
        raise bad_type("Window", f"segments[{i}]", wanted, given) from error
    if segment.first_row < 0 or segment.num_rows < 1 or sum(segment[:2]) > _INT32_MAX:
        raise ValueError(
            f"Window: segments[{i}] must have first_row >= 0, num_rows >= 1 and end below row 2**31, "
            f"got {describe(segment)}"
        )
    if abs(segment.time_shift) > _INT32_MAX:
        wanted = "a time_shift of less than 2**31 frames either way"
        raise ValueError(f"Window: segments[{i}] must have {wanted}, got {describe(segment)}")
    if not -MAX_LOG_WEIGHT <= weight <= MAX_LOG_WEIGHT:
        wanted = f"a log_weight from {-MAX_LOG_WEIGHT:g} to {MAX_LOG_WEIGHT:g}"
        raise ValueError(f"Window: segments[{i}] must have {wanted}, got {describe(segment)}")
    return segment._replace(log_weight=float(weight))
