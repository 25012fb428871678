"""The pool: per layer, K and V storage in slots that start on multiples of 128 rows."""

from __future__ import annotations

import os
from typing import Any

import torch

from ..saved import Rows
from ..window import TILE_ROWS


def slot_rows(tokens: int) -> int:
    """Rows of a slot for `tokens`: rounded up to a multiple of 128."""
    return -(-tokens // TILE_ROWS) * TILE_ROWS


class Pool:
    """K and V of all layers, [num_layers, rows, heads, head_dim] each, allocated once and never again.

    Rows are cut into slots: a list of (tokens, count) gives, kind after kind, `count` slots that hold `tokens`
    each. The tail rows of a slot, between its tokens and the next multiple of 128, hold zeros.

    `shared`, (tokens, count), are slots that all layers have in common, for what only the layer at hand needs. They
    follow the rows of the last layer, so that `of_layer` of an earlier one reaches them by higher row numbers:
    `shared_rows` are those of layer 0, `rows` less for each layer after it. shared_k and shared_v
    [count, rows of a slot, heads, head_dim].
    """

    def __init__(
        self,
        slots: list[tuple[int, int]],
        *,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
        shared: tuple[int, int] = (1, 0),
    ) -> None:
        self.first_rows: list[list[int]] = []
        rows = 0
        tails = []
        for tokens, count in slots:
            size = slot_rows(tokens)
            self.first_rows.append([rows + i * size for i in range(count)])
            tails += [(first + tokens, first + size) for first in self.first_rows[-1]]
            rows += size * count
        self.rows = rows
        tokens, count = shared
        size = slot_rows(tokens)
        self.shared_rows = [num_layers * rows + i * size for i in range(count)]
        self._shape = (num_layers, rows, num_heads, head_dim)
        self._shared_shape = (count, size, num_heads, head_dim)
        all_rows = (num_layers * rows + count * size, num_heads, head_dim)
        self._k = torch.empty(all_rows, dtype=dtype, device=device)
        self._v = torch.empty(all_rows, dtype=dtype, device=device)
        self._view()
        for first, last in tails:
            self.k[:, first:last].zero_()
            self.v[:, first:last].zero_()
        self.shared_k[:, tokens:].zero_()
        self.shared_v[:, tokens:].zero_()

    def _view(self) -> None:
        own = self._shape[0] * self._shape[1]
        self.k, self.v = self._k[:own].view(self._shape), self._v[:own].view(self._shape)
        self.shared_k, self.shared_v = self._k[own:].view(self._shared_shape), self._v[own:].view(self._shared_shape)

    def __getstate__(self) -> dict[str, Any]:
        """Without views: pickled, they would be storage of their own."""
        views = ("k", "v", "shared_k", "shared_v")
        return {name: value for name, value in self.__dict__.items() if name not in views}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._view()

    def of_layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V that attention of a layer reads, [rows, heads, head_dim]: its rows, and what all share."""
        if not self.shared_rows:
            return self.k[layer], self.v[layer]
        first = layer * self.rows
        return self._k[first:], self._v[first:]

    @property
    def token_bytes(self) -> int:
        """K and V of one token, all layers."""
        num_layers, _, heads, head_dim = self._shape
        return 2 * num_layers * heads * head_dim * self._k.element_size()

    def views(self, layer: int, first_row: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer from a row on."""
        rows = slice(first_row, first_row + tokens)
        return self.k[layer, rows], self.v[layer, rows]

    def held(self, first_row: int, tokens: int) -> Rows:
        """K and V of all layers from a row on, [num_layers, 2, tokens, heads, head_dim]."""
        return Rows.of_layers(len(self.k), lambda layer: self.views(layer, first_row, tokens))

    @staticmethod
    def slot_bytes(tokens: int, num_layers: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one slot's K and V over all layers."""
        return 2 * num_layers * slot_rows(tokens) * num_heads * head_dim * dtype.itemsize

    @property
    def bytes(self) -> int:
        return self._k.nbytes + self._v.nbytes


def of_branch(x: torch.Tensor, branch: int, heads: int, *, dim: int = 1) -> torch.Tensor:
    """A branch's own `heads` of all in a dimension."""
    return x if x.shape[dim] == heads else x.narrow(dim, branch * heads, heads)


def free_bytes(device: torch.device) -> int:
    """Bytes of a device's memory that new storage can have."""
    if device.type != "cuda":
        return _free_host_bytes()
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, free to use
    return torch.cuda.mem_get_info(device)[0] + held


def _free_host_bytes() -> int:
    """What Linux calls available: free, or held for a cache that it gives up; elsewhere what is free."""
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
