"""The rotary embedding of video tokens: frame, row and column turn their own share of the pairs."""

from __future__ import annotations

import math

import numpy as np
import torch


class Rope3D:
    """Angles of a three-axis rotary embedding on interleaved pairs (2i, 2i + 1).

    Pair i of an axis with n pairs turns by `position * theta ** (-i / n)`, in radians; the axes follow
    each other as time, height, width. `pairs` gives the complex pairs of each axis; by default
    (c - 2 * (c // 3), c // 3, c // 3) with c = head_dim // 2, as in Wan: 22, 21 and 21 for head_dim 128.
    Positions run from 0 to `max_position - 1` on every axis.

    Raises ValueError when head_dim is odd or below 6, theta is not above 1, max_position is not positive
    or the pairs do not add up to head_dim // 2.
    """

    def __init__(
        self,
        head_dim: int = 128,
        theta: float = 10000.0,
        max_position: int = 1024,
        pairs: tuple[int, int, int] | None = None,
    ) -> None:
        if head_dim % 2 or head_dim < 6:
            raise ValueError(f"Rope3D: head_dim must be even and at least 6, got {head_dim}")
        if not theta > 1:
            raise ValueError(f"Rope3D: theta must be above 1, got {theta}")
        if max_position < 1:
            raise ValueError(f"Rope3D: max_position must be at least 1, got {max_position}")
        half = head_dim // 2
        if pairs is None:
            pairs = (half - 2 * (half // 3), half // 3, half // 3)
        if len(pairs) != 3 or sum(pairs) != half or min(pairs) < 0:
            raise ValueError(f"Rope3D: pairs must be three counts that add up to {half}, got {pairs}")
        self.head_dim = head_dim
        self.theta = float(theta)
        self.max_position = int(max_position)
        self.pairs = (int(pairs[0]), int(pairs[1]), int(pairs[2]))
        self._frequencies = np.concatenate(
            [self.theta ** (-np.arange(n, dtype=np.float64) / max(n, 1)) for n in self.pairs]
        )  # [head_dim / 2], radians per position
        self._tables: dict[torch.device, torch.Tensor] = {}

    def __repr__(self) -> str:
        return f"Rope3D({self.head_dim}, theta={self.theta}, max_position={self.max_position}, pairs={self.pairs})"

    def table(self, device: torch.device | str) -> torch.Tensor:
        """Cosines and sines, fp32 [max_position, head_dim / 2, 2]; computed in float64, once per device."""
        device = torch.device(device)
        if device not in self._tables:
            angles = np.arange(self.max_position)[:, None] * self._frequencies[None, :]
            table = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
            self._tables[device] = torch.from_numpy(table).to(device)
        return self._tables[device]

    def turn(self, time_shift: int) -> np.ndarray:
        """Cosine and sine of each pair's angle for a shift in time alone, float64 [head_dim / 2, 2]."""
        angles = np.where(np.arange(self.head_dim // 2) < self.pairs[0], self._frequencies * time_shift, 0.0)
        angles = np.remainder(angles, 2 * math.pi)
        return np.stack([np.cos(angles), np.sin(angles)], axis=-1)
