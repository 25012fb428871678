"""The rotary embedding of video tokens: frame, row and column turn their own share of the pairs."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from .checks import as_device, as_integer, as_number, bad_type, bad_value, is_integer
from .tables import Tables
from .tracing import untraced

# Up to here an angle in float64 is off by 2**-23 at most, about the rounding of its cosine and sine to
# fp32, and 2**31 frames are 17 years of video at 4 latent frames a second.
NUM_POSITIONS = 2**31
_KEPT_TABLES = 8  # of single chunks: more than a loop over layers and passes needs at once


class Rope3D:
    """Angles of a three-axis rotary embedding on interleaved pairs (2i, 2i + 1).

    Pair i of an axis with n pairs turns by `position * theta ** (-i / n)`, in radians; the axes follow
    each other as time, height, width. `pairs` gives the complex pairs of each axis; by default
    (c - 2 * (c // 3), c // 3, c // 3) with c = head_dim // 2, as in Wan: 22, 21 and 21 for head_dim 128.
    Positions are integers from 0 on, below 2**31. Ropes of equal arguments are equal; a copy or a pickle takes no
    tensors along.

    Raises ValueError when head_dim is odd or not from 6 to 1024, theta is not finite and above 1 or the pairs do not
    add up to head_dim // 2; TypeError when a count is not an integer, or theta not a number.
    """

    def __init__(
        self,
        head_dim: int = 128,
        theta: float = 10000.0,
        pairs: tuple[int, int, int] | None = None,
    ) -> None:
        self.head_dim = as_integer("Rope3D", "head_dim", head_dim)
        self.theta = as_number("Rope3D", "theta", theta)
        if self.head_dim % 2 or not 6 <= self.head_dim <= 1024:
            raise bad_value("Rope3D", "head_dim", "even and at least 6, at most 1024", head_dim)
        if not 1 < self.theta < math.inf:
            raise bad_value("Rope3D", "theta", "finite and above 1", theta)
        half = self.head_dim // 2
        if pairs is None:
            pairs = (half - 2 * (half // 3), half // 3, half // 3)
        if not isinstance(pairs, Iterable):
            raise bad_type("Rope3D", "pairs", f"three counts that add up to {half}", pairs)
        self.pairs = tuple(as_integer("Rope3D", f"pairs[{i}]", count) for i, count in enumerate(pairs))
        if len(self.pairs) != 3 or sum(self.pairs) != half or min(self.pairs) < 0:
            raise bad_value("Rope3D", "pairs", f"three counts that add up to {half}", pairs)
        self._frequencies = np.concatenate(
            [self.theta ** (-np.arange(n, dtype=np.float64) / max(n, 1)) for n in self.pairs]
        )  # [head_dim / 2], radians per position
        self._tables: dict[tuple[object, ...], torch.Tensor] = {}
        self._captured: set[tuple[object, ...]] = set()  # of these, what a CUDA graph reads

    def __repr__(self) -> str:
        return f"Rope3D({self.head_dim}, theta={self.theta}, pairs={self.pairs})"

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_tables": {}, "_captured": set()}

    def _key(self) -> tuple[object, ...]:
        return self.head_dim, self.theta, self.pairs

    def table(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """Cosine and sine of every pair at each of the positions, fp32 [positions, head_dim / 2, 2], out of float64.

        Raises TypeError on positions that are no integers, ValueError on one that is not from 0 to 2**31 - 1.
        """
        wanted = f"integers from 0 to {NUM_POSITIONS - 1}"
        given = np.asarray(positions)
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            raise bad_type("Rope3D.table", "positions", wanted, positions)
        if given.size and not 0 <= given.min() <= given.max() < NUM_POSITIONS:
            raise bad_value("Rope3D.table", "positions", wanted, positions)
        return _turns(given, self._frequencies)

    def chunk_table(self, grid: tuple[int, int, int], start_frame: int) -> np.ndarray:
        """What norm_rope_append reads for a chunk, fp32 [max(grid), head_dim / 2, 2]; RopeTable says what is in it.

        Raises ValueError on a frame that is not from 0 to 2**31 - 1.
        """
        frames = grid[0]
        start_frame = checked_start("Rope3D.chunk_table", start_frame, frames)
        table = self.table(range(max(grid)))
        self._write_time(table[:frames], start_frame)
        return table

    def chunk_table_on(self, device: torch.device, grid: tuple[int, int, int], start_frame: int) -> torch.Tensor:
        """`chunk_table` on a device, of which the last few are kept, and for good those that a CUDA graph reads.

        Waits for the device where it is new. Raises RuntimeError where it is new inside the capture of a graph.
        """
        key = device, grid, start_frame
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        table = self._tables.get(key)
        if table is None:
            table = self._make_table(device, grid, start_frame, capturing)
        if capturing:
            self._captured.add(key)
        elif device.type == "cuda" and not torch.compiler.is_compiling():
            table.record_stream(torch.cuda.current_stream(device))  # which may still read it when it is given up
        return table

    def turn(self, time_shift: int) -> np.ndarray:
        """Cosine and sine of each pair's angle for a shift in time alone, float64 [head_dim / 2, 2]."""
        angles = np.where(np.arange(self.head_dim // 2) < self.pairs[0], self._frequencies * time_shift, 0.0)
        angles = np.remainder(angles, 2 * math.pi)
        return np.stack([np.cos(angles), np.sin(angles)], axis=-1)

    @untraced  # numpy's numbers are not for the compiler to make
    def _make_table(
        self, device: torch.device, grid: tuple[int, int, int], start_frame: int, capturing: bool
    ) -> torch.Tensor:
        if capturing:
            raise RuntimeError(
                f"norm_rope_append: rope must be a RopeTable inside the capture of a graph, or have been used before "
                f"with this grid and start_frame, got the first use of {self} with {grid}, {start_frame}"
            )
        passing = [old for old in list(self._tables) if old not in self._captured]
        for old in passing[: 1 - _KEPT_TABLES]:
            self._tables.pop(old, None)
        table = torch.from_numpy(self.chunk_table(grid, start_frame)).to(device)
        self._tables[device, grid, start_frame] = table
        return table

    def _write_time(self, rows: np.ndarray, start_frame: int) -> None:
        """The pairs that turn with time of frames from `start_frame` on, into rows [frames, head_dim / 2, 2]."""
        time = self.pairs[0]
        rows[:, :time] = _turns(np.arange(start_frame, start_frame + len(rows)), self._frequencies[:time])


class RopeTable:
    """The rotations of one chunk, on a device at a fixed address: `move` makes them those of another chunk.

    norm_rope_append takes it in place of a Rope3D, and a captured CUDA graph of it then serves every chunk. `table`,
    fp32 [max(grid), head_dim / 2, 2], holds cosine and sine: of the angle at frame start_frame + n in entry [n, pair]
    of a pair that turns with time, at row n or column n of one that turns with height or width. Each is the rounding of
    the float64 one, at whatever frame.

    `grid` is (frames, height, width) of the chunk in tokens. On a CPU it can be copied and pickled.

    Raises ValueError when torch cannot use the device, a count of the grid is below 1 or a frame is not from 0 to
    2**31 - 1; TypeError on what is no Rope3D, or no integers.
    """

    def __init__(
        self, rope: Rope3D, grid: tuple[int, int, int], *, device: torch.device | str, start_frame: int = 0
    ) -> None:
        if not isinstance(rope, Rope3D):
            raise bad_type("RopeTable", "rope", "a Rope3D", rope)
        wanted = "(frames, height, width) of integers"
        if not (isinstance(grid, (tuple, list)) and len(grid) == 3 and all(map(is_integer, grid))):
            raise bad_type("RopeTable", "grid", wanted, grid)
        if not 1 <= min(grid) <= max(grid) < NUM_POSITIONS:
            raise bad_value("RopeTable", "grid", f"{wanted} from 1 to {NUM_POSITIONS - 1}", grid)
        start_frame = checked_start("RopeTable", start_frame, grid[0])
        self.rope = rope
        self.grid = tuple(map(operator.index, grid))
        self.device = as_device("RopeTable", device, only=None)
        self._tables = Tables(rope_table_shapes(rope, self.grid), self.device)
        self._tables.host()["rows"][:] = rope.chunk_table(self.grid, start_frame)
        self._tables.copy({"rows": max(self.grid)})
        self.start_frame = start_frame

    @property
    def table(self) -> torch.Tensor:
        """What a kernel reads, always at the same address."""
        return self._tables.on_device["rows"]

    def move(self, start_frame: int) -> None:
        """Make it that of the chunk whose first frame is `start_frame`. Copies asynchronously on the current stream."""
        frames = self.grid[0]
        start_frame = checked_start("RopeTable.move", start_frame, frames)
        self.rope._write_time(self._tables.host()["rows"][:frames], start_frame)
        self._tables.copy({"rows": frames})  # whole rows: one piece, which needs no room on the device to be unpacked
        self.start_frame = start_frame

    def __repr__(self) -> str:
        return f"RopeTable({self.rope}, {self.grid}, device='{self.device}', start_frame={self.start_frame})"


def rope_table_shapes(rope: Rope3D, grid: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of a RopeTable's table, which lies on the device and, to be rewritten, in host memory."""
    return {"rows": ((max(grid), rope.head_dim // 2, 2), torch.float32)}


def _turns(positions: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Cosines and sines, fp32 [positions, frequencies, 2]."""
    angles = positions[:, None] * frequencies[None, :]
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


def checked_start(op: str, start_frame: object, frames: int) -> int:
    """The first of so many frames. Raises as norm_rope_append says, naming `op`."""
    if not is_integer(start_frame):
        raise bad_type(op, "start_frame", "an integer", start_frame)
    if not 0 <= start_frame <= NUM_POSITIONS - frames:
        raise bad_value(op, "start_frame", f"from 0 to {NUM_POSITIONS - frames}", start_frame)
    return operator.index(start_frame)
