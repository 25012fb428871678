"""Numbers of pairs of rows that come and go, each pair once, side by side."""

from __future__ import annotations

import numpy as np


class Pairs:
    """A number for each two of the rows 0, 1, ..., whichever of the two is named first.

    Those of row i with the rows before it lie at i (i - 1) / 2 and after: all of them are one piece, half as long as a
    square would be.
    """

    def __init__(self, dtype: np.dtype | type) -> None:
        self._numbers = np.empty(0, dtype)
        self.starts = first_pairs(0)

    def grow(self, room: int) -> None:
        numbers = np.empty(room * (room - 1) // 2, self._numbers.dtype)
        numbers[: len(self._numbers)] = self._numbers
        self._numbers, self.starts = numbers, first_pairs(room)

    def put(self, row: int, numbers: np.ndarray) -> None:
        """Of a row with all before it, [row]."""
        start = self.starts[row]
        self._numbers[start : start + row] = numbers

    def move(self, last: int, row: int) -> None:
        """What the last row has with the others becomes what `row`, one before it, has with them."""
        of_last = self.before(last)
        self.put(row, of_last[:row])
        self._numbers[self.starts[row + 1 : last] + row] = of_last[row + 1 :]

    def before(self, row: int) -> np.ndarray:
        """Of a row with all before it, [row]; a view."""
        start = self.starts[row]
        return self._numbers[start : start + row]

    def of(self, row: int, count: int, itself: float) -> np.ndarray:
        """Of a row with each of the first `count`, [count], `itself` standing where it comes itself."""
        found = np.empty(count, self._numbers.dtype)
        found[:row], found[row] = self.before(row), itself
        found[row + 1 :] = self._numbers[self.starts[row + 1 : count] + row]
        return found

    def all(self, count: int) -> np.ndarray:
        """Of the first `count` rows, one row after the other; a view."""
        return self._numbers[: self.starts[count]]

    def places(self, row: int, count: int) -> np.ndarray:
        """Where in `all` those of a row are, [count - 1]."""
        return np.concatenate([np.arange(row) + self.starts[row], self.starts[row + 1 : count] + row])


def first_pairs(room: int) -> np.ndarray:
    """Where each row's pairs start, and the end, [room + 1]."""
    rows = np.arange(room + 1)
    return rows * (rows - 1) // 2
