"""Received: how much attention past chunks were given, which is known of what was in the window alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .config import MemoryConfig
from .plan import ChunkPlan

ROLES = ("sink", "retrieved", "recent", "current")
_KEPT = 0.8  # of a running mean, when a window is added


class Shares(NamedTuple):
    """Of a window, or running means of several: what past chunks received, in even shares, and what each role did."""

    chunks: dict[int, float]
    roles: dict[str, float]


class Received:
    """The mass of the window's segments in the last pass of each chunk, over queries, heads, branches and
    `config.mass_layers`.

    Attention of these layers writes it to a fixed place, in captured graphs too; what lies there when a chunk ends is
    copied to the host, and read when the next one has ended. The passes of that one are queued by then, so that the
    device does not stand still: a window's shares are known a chunk late. Of a window whose mass is not finite nothing
    is known.

    `known`: running means over the windows that a chunk was in, but for the one in which it was made. A window of a
    thousand tokens of which a chunk has a hundred, and 20 % of the attention, gives it 2 even shares.
    """

    @torch.inference_mode(False)  # what is made in inference mode could not be rewritten outside of it
    def __init__(self, config: MemoryConfig, shape: tuple[int, int, int], device: torch.device) -> None:
        """`shape`: (layers, heads of all branches, segments of the largest window)."""
        self._place = {layer: place for place, layer in enumerate(config.mass_layers)}
        self._on_device = torch.zeros(shape, dtype=torch.float32, device=device)
        self._mean = torch.zeros(shape[2], dtype=torch.float32, device=device)
        on_gpu = device.type == "cuda"
        self._on_host = torch.zeros(shape[2], dtype=torch.float32, pin_memory=on_gpu, device="cpu")
        self._copied = torch.cuda.Event() if on_gpu else None
        self.clear()

    def clear(self) -> None:
        self.known = Shares({}, {})
        self._window: ChunkPlan | None = None  # of the chunk ended last, while its mass is on the way
        self._last: Shares | None = None  # of it, where that is read already

    def out(self, layer: int) -> torch.Tensor | None:
        """Where the mass of a layer goes, [heads of all branches, segments]; None of a layer that is not asked."""
        place = self._place.get(layer)
        return None if place is None else self._on_device[place]

    def end(self, plan: ChunkPlan, kept: Callable[[int], bool]) -> None:
        """The chunk of that plan is history: what was written last is its own. Chunks that are not `kept` are gone."""
        last = self.last()
        if last is not None:
            for known, of_window in zip(self.known, last, strict=True):
                for name, share in of_window.items():
                    before = known.get(name, share)
                    known[name] = before + (1.0 - _KEPT) * (share - before)
        for chunk in [chunk for chunk in self.known.chunks if not kept(chunk)]:
            del self.known.chunks[chunk]
        torch.mean(self._on_device, dim=(0, 1), out=self._mean)
        self._on_host.copy_(self._mean, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._on_device.device))
        self._window, self._last = plan, None

    def last(self) -> Shares | None:
        """Of the chunk ended last; waits for its passes on the host. None before the first."""
        if self._window is not None:
            if self._copied is not None:
                self._copied.synchronize()
            self._last, self._window = shares(self._window, self._on_host.tolist()), None
        return self._last

    def restore(self, known: Shares, last: Shares | None) -> None:
        self.known, self._window, self._last = known, None, last


def shares(plan: ChunkPlan, mass: list[float]) -> Shares:
    """Of a window whose segments received so much."""
    tokens: dict[int, int] = {}
    received: dict[int, float] = {}
    roles = dict.fromkeys(ROLES, 0.0)
    if not all(map(math.isfinite, mass)):
        return Shares({}, {})
    for (role, chunk, segment), share in zip(plan.segments, mass, strict=False):
        roles[role] += share
        tokens[chunk] = tokens.get(chunk, 0) + segment.num_rows
        received[chunk] = received.get(chunk, 0.0) + share
    del received[plan.chunk]
    return Shares({chunk: of / (tokens[chunk] / plan.num_tokens) for chunk, of in received.items()}, roles)


def shares_of(op: str, tree: Any, next_chunk: int) -> Shares:
    """Of a saved memory of so many chunks. Raises ValueError naming `op`, or what is MALFORMED, where they are none."""
    chunks, roles = tree["chunks"], tree["roles"]
    numbers = [*chunks.values(), *roles.values()]
    fine = all(type(number) is float and 0.0 <= number < float("inf") for number in numbers)
    known = all(type(chunk) is int and 0 <= chunk < next_chunk for chunk in chunks)
    if not (fine and known and list(roles) in ([], list(ROLES))):
        raise ValueError(f"{op}: received must be of past chunks and of {', '.join(ROLES)}, got {tree!r:.200}")
    return Shares(dict(chunks), dict(roles))
