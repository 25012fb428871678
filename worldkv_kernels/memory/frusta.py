"""How many points of each other's frustum two cameras see, of one camera and many others at once."""

from __future__ import annotations

import numpy as np

_BLOCK = 2**15  # numbers of a step: few enough that they stay in a core's cache
_ROUNDING = 1e-9  # far more than what rounding moves a point by, relative to the largest term of its coordinates


class Frusta:
    """Points are the same for all cameras: `points` [3, samples] are (u z, v z, z), with u and v from 0 to 1 across the
    image and down, and the depth z from near to far.

    A camera is two matrices [3, 3], see `matrices`, and a position. In the coordinates that `into` leads to, a camera
    sees what has |a| <= z, |b| <= z and a depth in its range, as FovRetrieval does it. So a point of one camera is in
    another's by one product with [3, 4], and the products of many cameras are one.

    Most cameras far apart see nothing of each other. All points lie between the eight corners of a frustum: where those
    lie beyond one side of the other's, by more than rounding, so do all points of both, and none is looked at.
    """

    def __init__(self, points: np.ndarray, depth_range: tuple[float, float]) -> None:
        near, far = depth_range
        self._near, self._far = near * (1 - 1e-6), far * (1 + 1e-6)  # as FovRetrieval has it
        self._points = np.vstack([points, np.ones(points.shape[1])]).T.copy()  # [samples, 4]
        corners = [(u * z, v * z, z, 1.0) for z in depth_range for u in (0.0, 1.0) for v in (0.0, 1.0)]
        self._corners = np.array(corners)  # [8, 4]

    @staticmethod
    def matrices(pose: np.ndarray, camera: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of a pose [4, 4] and a camera (fx, fy, cx, cy, height, width): `out` from a camera's (u z, v z, z) to the
        world's axes, `into` from there to (a, b, z); both without the position."""
        fx, fy, cx, cy, height, width = camera
        out = np.array([[width / fx, 0, -cx / fx], [0, height / fy, -cy / fy], [0, 0, 1]])
        into = np.array([[2 * fx / width, 0, 2 * cx / width - 1], [0, 2 * fy / height, 2 * cy / height - 1], [0, 0, 1]])
        rotation = pose[:3, :3]
        return rotation @ out, into @ rotation.T

    def seen(
        self, place: np.ndarray, out: np.ndarray, into: np.ndarray,
        places: np.ndarray, outs: np.ndarray, intos: np.ndarray,
    ) -> np.ndarray:  # fmt: skip
        """How many of its points each of n others sees, and it of theirs, in sum [n].

        `place` [3], `out` and `into` [3, 3] of the one; [3, n] and [3, 3, n] of the others.
        """
        away = places - place[:, None]
        there, here = np.empty((2, 4, 3, away.shape[1]))
        np.matmul(into, outs.transpose(1, 0, 2), out=there[:3])  # their points into its coordinates
        np.matmul(into, away, out=there[3])
        here[:3] = np.matmul(out.T, intos).transpose(1, 0, 2)  # its points into each of theirs
        np.negative((intos * away).sum(axis=1), out=here[3])
        apart = self._apart(there) | self._apart(here)
        counts = np.zeros(away.shape[1], dtype=np.int64)
        near = np.flatnonzero(~apart)
        if len(near) and len(near) == len(apart):
            return self._inside(there) + self._inside(here)
        if len(near):
            counts[near] = self._inside(there[:, :, near]) + self._inside(here[:, :, near])
        return counts

    def _apart(self, turns: np.ndarray) -> np.ndarray:
        """Where turns [4, 3, n] take all corners beyond one side of the frustum, [n]."""
        a, b, z = (self._corners @ turns.reshape(4, -1)).reshape(8, 3, -1).transpose(1, 0, 2)
        least = _ROUNDING * (np.abs(turns[:3]).max(axis=(0, 1)) * self._far + np.abs(turns[3]).max(axis=0))
        beyond = ((a - z).min(axis=0), -(a + z).max(axis=0), (b - z).min(axis=0), -(b + z).max(axis=0))
        in_depth = (z.min(axis=0) - self._far, self._near - z.max(axis=0))
        return np.max((*beyond, *in_depth), axis=0) > least

    def _inside(self, turns: np.ndarray) -> np.ndarray:
        """How many points turns [4, 3, n] take into the frustum, [n]."""
        num = turns.shape[2]
        flat = np.ascontiguousarray(turns).reshape(4, 3 * num)
        counts = np.zeros(num, dtype=np.int64)
        step = max(1, min(255, _BLOCK // (3 * num)))  # points, whose sum one byte holds
        room, inside, test = np.empty((step, 3 * num)), *np.empty((2, step, num), dtype=bool)
        for start in range(0, len(self._points), step):
            points = self._points[start : start + step]
            found = np.matmul(points, flat, out=room[: len(points)]).reshape(-1, 3, num)
            sides, z = np.abs(found[:, :2], out=found[:, :2]), found[:, 2]
            ok, other = inside[: len(points)], test[: len(points)]
            np.less_equal(np.maximum(sides[:, 0], sides[:, 1], out=sides[:, 0]), z, out=ok)
            ok &= np.greater_equal(z, self._near, out=other)
            ok &= np.less_equal(z, self._far, out=other)
            counts += np.add.reduce(ok.view(np.uint8), axis=0, dtype=np.uint8)
        return counts
