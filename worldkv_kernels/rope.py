"""The rotary embedding of video tokens: frame, row and column turn their own share of the pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch

from .checks import as_integer, as_number, bad_type, bad_value


class Rope3D:
    """Angles of a three-axis rotary embedding on interleaved pairs (2i, 2i + 1).

    Pair i of an axis with n pairs turns by `position * theta ** (-i / n)`, in radians; the axes follow
    each other as time, height, width. `pairs` gives the complex pairs of each axis; by default
    (c - 2 * (c // 3), c // 3, c // 3) with c = head_dim // 2, as in Wan: 22, 21 and 21 for head_dim 128.
    Positions run from 0 to `max_position - 1` on every axis. Ropes of equal arguments are equal; a copy or a pickle
    takes no table along.

    Raises ValueError when head_dim is odd or not from 6 to 1024, theta is not finite and above 1, max_position is not
    from 1 to 2**31 - 1 or the pairs do not add up to head_dim // 2; TypeError when a count is not an integer, or theta
    not a number.
    """

    def __init__(
        self,
        head_dim: int = 128,
        theta: float = 10000.0,
        max_position: int = 1024,
        pairs: tuple[int, int, int] | None = None,
    ) -> None:
        self.head_dim = as_integer("Rope3D", "head_dim", head_dim)
        self.theta = as_number("Rope3D", "theta", theta)
        self.max_position = as_integer("Rope3D", "max_position", max_position)
        if self.head_dim % 2 or not 6 <= self.head_dim <= 1024:
            raise bad_value("Rope3D", "head_dim", "even and at least 6, at most 1024", head_dim)
        if not 1 < self.theta < math.inf:
            raise bad_value("Rope3D", "theta", "finite and above 1", theta)
        if not 1 <= self.max_position < 2**31:
            raise bad_value("Rope3D", "max_position", "at least 1, at most 2**31 - 1", max_position)
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
        self._tables: dict[torch.device, torch.Tensor] = {}

    def __repr__(self) -> str:
        return f"Rope3D({self.head_dim}, theta={self.theta}, max_position={self.max_position}, pairs={self.pairs})"

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_tables": {}}

    def _key(self) -> tuple[object, ...]:
        return self.head_dim, self.theta, self.max_position, self.pairs

    def table(self, device: torch.device | str) -> torch.Tensor:
        """Cosines and sines, fp32 [max_position, head_dim / 2, 2]; computed in float64, once per device.

        Raises RuntimeError when the first call for a device is inside the capture of a CUDA graph.
        """
        device = torch.device(device)
        if device not in self._tables:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"Rope3D.table: rope must have been used on {device} before a graph is captured, got its first use "
                    f"(call rope.table('{device}'), the op or WorldMemory.warm_up before)"
                )
            angles = np.arange(self.max_position)[:, None] * self._frequencies[None, :]
            table = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
            self._tables[device] = torch.from_numpy(table).to(device)
        return self._tables[device]

    def turn(self, time_shift: int) -> np.ndarray:
        """Cosine and sine of each pair's angle for a shift in time alone, float64 [head_dim / 2, 2]."""
        angles = np.where(np.arange(self.head_dim // 2) < self.pairs[0], self._frequencies * time_shift, 0.0)
        angles = np.remainder(angles, 2 * math.pi)
        return np.stack([np.cos(angles), np.sin(angles)], axis=-1)
