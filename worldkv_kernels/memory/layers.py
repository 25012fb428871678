"""A window's tables for each layer, over pools whose layers have rows in common."""

from __future__ import annotations

from typing import Any

import torch

from ..tables import Shapes
from ..window import TILE_ROWS, Window
from .pool import Pool


def layer_table_shapes(num_layers: int, capacity: int) -> Shapes:
    """Of what LayerWindows takes. An even number of tiles: each layer's then start on a multiple of 16 bytes."""
    shapes = {
        "tiles": (num_layers, capacity + capacity % 2, 2),
        "tail_rows": (num_layers, TILE_ROWS * capacity, 2),
        "steps": (num_layers, 1),
        "shared": (TILE_ROWS * capacity,),
    }
    return {name: (shape, torch.int32) for name, shape in shapes.items()}


class LayerWindow(Window):
    """The base of `windows` as one layer sees it through Pool.of_layer. What it is not itself is the base's."""

    def __init__(self, windows: LayerWindows, layer: int) -> None:
        self._windows, self._layer = windows, layer

    @property
    def tables(self) -> tuple[torch.Tensor, ...]:
        windows, layer = self._windows, self._layer
        return windows.tiles[layer], windows.tail_rows[layer], *windows.base.tables[2:]

    @property
    def last_row(self) -> int:
        return self._windows.last_rows[self._layer]

    def __getattr__(self, name: str) -> Any:
        if name == "_windows":  # not there yet, in a copy
            raise AttributeError(name)
        return getattr(self._windows.base, name)


class LayerWindows:
    """`base` is layer 0's. A row of it that layers share has another number in each: they are written anew, on the
    device, after each update of `base`, at fixed addresses. `of_layer`: the windows of all layers."""

    @torch.inference_mode(False)  # rewritten outside of it, too
    def __init__(self, base: Window, pool: Pool) -> None:
        num_layers = len(pool.k)
        self.base, self._layer_rows, self._first_shared = base, pool.rows, pool.shared_rows[0]
        shapes = layer_table_shapes(num_layers, base.capacity)
        tables = {name: torch.zeros(shape, dtype=of, device=base.device) for name, (shape, of) in shapes.items()}
        self._tiles, self.tail_rows, self._steps, self._shared = tables.values()
        self._steps += torch.arange(num_layers, dtype=torch.int32, device=base.device)[:, None] * pool.rows
        self.of_layer = [LayerWindow(self, layer) for layer in range(num_layers)]
        self.update()

    @property
    def tiles(self) -> torch.Tensor:
        """[num_layers, capacity, 2]."""
        return self._tiles[:, : self.base.capacity]

    def update(self) -> None:
        """After `base` was updated, on its stream."""
        for own, moved in zip(self.base.tables[:2], (self.tiles, self.tail_rows), strict=True):
            # 1 for a row that layers share.
            shared = torch.ge(own[:, 0], self._first_shared, out=self._shared[: len(own)])
            moved.copy_(own)
            moved[..., 0].addcmul_(self._steps, shared, value=-1)
        last = self.base.last_row
        step = self._layer_rows if last >= self._first_shared else 0
        self.last_rows = [last - layer * step for layer in range(len(self.of_layer))]  # not worked out in a traced pass
