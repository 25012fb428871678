"""The bank: chunks that left the recent frames, pruned, on the device or in host memory."""

from __future__ import annotations

from typing import Any

import torch

from ..ranges import ranged
from .pool import Pool
from .retrieval import RetrievalPolicy


class Bank:
    """Which banked chunk lies where, and what is given up when there is no more room.

    On the device, a chunk has a slot of the pool for as long as it is banked. In host memory it has a place in
    one arena [places, num_layers, 2, tokens, heads, head_dim], and the pool's slots are a cache: a chunk
    that is retrieved again while it is still there costs no copy. The last pool slot then serves to
    prune into, on the way to the host.
    """

    def __init__(
        self,
        pool: Pool,
        slots: list[int],
        *,
        tokens: int,
        places: int,
        on_host: bool,
        policy: RetrievalPolicy,
    ) -> None:
        self._pool = pool
        self._tokens = tokens
        self._policy = policy
        self._arena: torch.Tensor | None = None
        if on_host:
            num_layers, _, heads, head_dim = pool.k.shape
            self._arena = torch.empty(
                (places, num_layers, 2, tokens, heads, head_dim), dtype=pool.k.dtype, pin_memory=pool.k.is_cuda
            )
        self._slots = slots
        self._places = places
        self.capacity = places
        self.clear()

    def clear(self) -> None:
        """Forget everything; keeps the storage."""
        self.descriptions: dict[int, Any] = {}  # chunk -> what the policy remembers, oldest first
        self._place: dict[int, int] = {}  # chunk -> slot number on the device, or place in the arena
        self._free = list(range(self._places - 1, -1, -1))
        self._cached: dict[int, int] = {}  # host bank: chunk -> slot number, least recently used first
        self._free_slots = list(range(len(self._slots) - 2, -1, -1)) if self._arena is not None else []
        self.dropped: list[int] = []
        self.copies_in = 0
        self.hits = 0

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, chunk: int) -> bool:
        return chunk in self._place

    @property
    def host_bytes(self) -> int:
        return self._arena.numel() * self._arena.element_size() if self._arena is not None else 0

    def row_to_fill(self, chunk: int, description: Any) -> int | None:
        """Make room for a chunk and return the pool row to prune it into; None when the policy gives it up itself.

        Call `stored` when the rows are written.
        """
        if not self._free:
            given_up = self._policy.drop([*self.descriptions.items(), (chunk, description)])
            if given_up != chunk and given_up not in self._place:
                known = [*self._place, chunk]
                raise ValueError(f"end_chunk: the retrieval policy must drop one of {known}, got {given_up!r}")
            self.dropped.append(given_up)
            if given_up == chunk:
                return None
            del self.descriptions[given_up]
            self._free.append(self._place.pop(given_up))
            if given_up in self._cached:
                self._free_slots.append(self._cached.pop(given_up))
        self.descriptions[chunk] = description
        self._place[chunk] = self._free.pop()
        return self._slots[-1] if self._arena is not None else self._slots[self._place[chunk]]

    def stored(self, chunk: int) -> None:
        """The rows that `row_to_fill` gave are written: a host bank copies them out."""
        if self._arena is not None:
            self._copy_out(chunk)

    @ranged("bank_copy_out")
    def _copy_out(self, chunk: int) -> None:
        rows = slice(self._slots[-1], self._slots[-1] + self._tokens)
        for layer, place in enumerate(self._arena[self._place[chunk]]):
            place[0].copy_(self._pool.k[layer, rows], non_blocking=True)
            place[1].copy_(self._pool.v[layer, rows], non_blocking=True)

    def fetch(self, chunks: list[int]) -> list[int]:
        """The pool rows at which these banked chunks start, after copying in those that are not on the device."""
        if self._arena is None:
            return [self._slots[self._place[chunk]] for chunk in chunks]
        for chunk in chunks:  # first of all, so that none of them is evicted for another
            if chunk in self._cached:
                self._cached[chunk] = self._cached.pop(chunk)
                self.hits += 1
        for chunk in chunks:
            if chunk not in self._cached:
                if not self._free_slots:
                    self._free_slots.append(self._cached.pop(next(iter(self._cached))))
                self._cached[chunk] = self._free_slots.pop()
                self._copy_in(chunk)
        return [self._slots[self._cached[chunk]] for chunk in chunks]

    @ranged("bank_copy_in")
    def _copy_in(self, chunk: int) -> None:
        first = self._slots[self._cached[chunk]]
        rows = slice(first, first + self._tokens)
        for layer, place in enumerate(self._arena[self._place[chunk]]):
            self._pool.k[layer, rows].copy_(place[0], non_blocking=True)
            self._pool.v[layer, rows].copy_(place[1], non_blocking=True)
        self.copies_in += 1
