"""Attention: what a pass over the layers does, append the current chunk and attend to its window."""

from __future__ import annotations

import torch

from ..checks import as_integer, bad_type, debug, readable
from ..ops.norm_rope_append import norm_rope_append
from ..ops.segment_attention import segment_attention
from ..rope import RopeTable
from ..window import Segment, Window
from .config import MemoryConfig
from .contents import Contents
from .layers import LayerWindows
from .pool import of_branch
from .storage import Storage


class Attention:
    """The tables of the window, the row and rotations of the current chunk, and its queries, all at fixed addresses.

    `contents`, where retrieval is by those of keys, takes them on the way, as `storage.received` does the mass.
    """

    def __init__(
        self, config: MemoryConfig, storage: Storage, contents: Contents | None, *, device: torch.device,
        dtype: torch.dtype, backend: str | None,
    ) -> None:  # fmt: skip
        self._config, self._storage, self._contents = config, storage, contents
        self._device, self._dtype, self._backend = device, dtype, backend
        rope = config.make_rope()
        self.rotations = None
        if rope is not None:
            self.rotations = RopeTable(rope, (config.chunk_frames, *config.grid), device=device)
        self.window = Window(
            [Segment(0, 1)],
            device=device,
            rope=rope if config.turns_segments else None,
            weighted=config.weighs_segments,
            capacity=storage.window_capacity,
        )
        self.layer_windows = LayerWindows(self.window, storage.pool) if config.packs_bank else None
        self.first_row = torch.zeros(1, dtype=torch.int64, device=device)
        queries = config.chunk_tokens, config.query_heads, config.head_dim
        self.q = torch.empty(queries, dtype=dtype, device=device)

    def move(self, chunk: int, segments: list[Segment]) -> None:
        """To a chunk, which is to see these."""
        self._see(self._storage.first_row(chunk), segments)
        if self.rotations is not None:
            self.rotations.move(chunk * self._config.chunk_frames)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, *,
        branch: int | None, out: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        """As WorldMemory.attend, in a chunk that is begun, and raises as it does."""
        self._check(layer, q, k, v, branch)
        bank = self._storage.bank
        if bank is not None and not bank.settled:
            bank.wait_layer(layer)
        return self._attend(layer, q, k, v, q_weight, k_weight, branch, out)

    def check_branch(self, op: str, branch: object) -> None:
        """Raise ValueError or TypeError naming `op` on what is no branch of the config's."""
        if type(branch) is not int:
            branch = as_integer(op, "branch", branch)
        if not 0 <= branch < self._config.branches:
            wanted = f"None or from 0 to {self._config.branches - 1}, of the config's branches"
            raise ValueError(f"{op}: branch must be {wanted}, got {branch}")

    def warm_up(self, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None) -> None:
        """Run each op of a pass once as the chunks will, over rows that no chunk has yet, which it leaves zero."""
        config, pool = self._config, self._storage.pool
        tokens, of = config.chunk_tokens, dict(dtype=self._dtype, device=self._device)
        q, k = (
            torch.zeros((config.branches, tokens, heads * config.head_dim), **of)
            for heads in (config.num_heads, config.num_kv_heads)
        )
        first_row = self._storage.first_row(0)
        self._see(first_row, [Segment(first_row, tokens)])
        for layer in sorted({0, *config.mass_layers[:1]}):
            self._attend(layer, q[0], k[0], k[0], q_weight, k_weight, 0, None)
            if config.branches > 1:
                self._attend(layer, q, k, k, q_weight, k_weight, None, None)
        for rows in (pool.k, pool.v):
            rows[:, first_row : first_row + tokens].zero_()  # those of the other layers are not made yet
        self._storage.warm_up(first_row)

    # --- parts of the above ---

    def _see(self, first_row: int, segments: list[Segment]) -> None:
        """The current chunk is at that row, and sees these."""
        self.window.update(segments)
        if self.layer_windows is not None:
            self.layer_windows.update()
        self.first_row.fill_(first_row)  # by launch argument: no copy to wait for

    def _check(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, branch: int | None) -> None:
        config = self._config
        at_once = config.branches > 1 and branch is None
        if at_once:
            _check_batch(config.branches, q=q, k=k, v=v)
        elif branch is not None:
            self.check_branch("attend", branch)
        if isinstance(q, torch.Tensor):
            tokens, columns = config.chunk_tokens, config.num_heads * config.head_dim
            if q.dim() == 3 and not at_once:
                of = "one branch" if config.branches > 1 else "the one branch that the config has"
                raise ValueError(f"attend: q must be [{tokens}, {columns}], of {of}, got {list(q.shape)}")
            layout_fits = q.dim() == 2 + at_once
            if layout_fits and q.shape[-2] != tokens:
                raise ValueError(f"attend: q must have the chunk's {tokens} tokens, got {q.shape[-2]}")
            if layout_fits and q.shape[-1] != columns:
                wanted = f"[{'branches, ' * at_once}{tokens}, {columns}], num_heads * head_dim"
                raise ValueError(f"attend: q must be {wanted}, got {list(q.shape)}")
            if q.dtype != self._dtype:
                raise TypeError(f"attend: q must be of the memory's dtype {self._dtype}, got {q.dtype}")
            if q.device != self._device:
                raise ValueError(f"attend: q must be on the memory's device {self._device}, got {q.device}")
        if debug():
            _check_finite(layer, q=q, k=k, v=v)

    def _attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, branch: int | None, out: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        storage, config = self._storage, self._config
        k_pool, v_pool, window = storage.pool.k[layer], storage.pool.v[layer], self.window
        if self.layer_windows is not None:
            storage.restore(layer)
            (k_pool, v_pool), window = storage.pool.of_layer(layer), self.layer_windows.of_layer[layer]
        mass = storage.received.out(layer) if storage.received is not None else None
        at_once = config.branches > 1 and branch is None
        if at_once:
            for own in range(config.branches):
                self._append(layer, own, q[own], k[own], v[own], q_weight, k_weight)
            turned = self.q
        else:
            branch = branch or 0
            turned = self._append(layer, branch, q, k, v, q_weight, k_weight)
            k_pool, v_pool = (of_branch(x, branch, config.num_kv_heads) for x in (k_pool, v_pool))
            mass = None if mass is None else of_branch(mass, branch, config.num_heads, dim=0)
        options = dict(scale=config.scale, out=out, backend=self._backend)
        if mass is None:
            attended = segment_attention(turned, k_pool, v_pool, window, **options)
        else:
            attended, _ = segment_attention(turned, k_pool, v_pool, window, return_mass=True, out_mass=mass, **options)
        return attended.unflatten(1, (config.branches, config.num_heads)).transpose(0, 1) if at_once else attended

    def _append(
        self, layer: int, branch: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        """Write a branch's keys and values to the current chunk's rows; its queries, normed and turned."""
        pool, config = self._storage.pool, self._config
        own_k, own_v = (of_branch(x[layer], branch, config.num_kv_heads) for x in (pool.k, pool.v))
        turned = norm_rope_append(
            q, k, v, own_k, own_v, self.first_row,
            rope=self.rotations, grid=(config.chunk_frames, *config.grid),
            q_weight=q_weight, k_weight=k_weight, eps=config.eps, round_before_rope=config.round_before_rope,
            out=of_branch(self.q, branch, config.num_heads), backend=self._backend,
        )  # fmt: skip
        if layer == 0 and self._contents is not None:
            self._contents.take(k, branch)
        return turned


def _check_batch(branches: int, **given: object) -> None:
    for name, x in given.items():
        if not isinstance(x, torch.Tensor):
            raise bad_type("attend", name, f"a tensor [{branches}, tokens, columns], of {branches} branches", x)
        if x.dim() != 3 or len(x) != branches:
            wanted = f"[{branches}, tokens, columns], of {branches} branches, or of one with branch given"
            raise ValueError(f"attend: {name} must be {wanted}, got {list(x.shape)}")


def _check_finite(layer: int, **given: object) -> None:
    for name, x in given.items():
        if isinstance(x, torch.Tensor) and readable(x) and not torch.isfinite(x).all():
            raise ValueError(f"attend: {name} must be finite, got NaN or infinity in layer {layer}")
