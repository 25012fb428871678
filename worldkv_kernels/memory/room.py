"""Room: how many chunks fit the memory that is free, and whether all of it does."""

from __future__ import annotations

import torch

from .config import MemoryConfig
from .pool import free_bytes

_CHUNKS_WITHOUT_ROPE = 340  # that a bank of unstated size holds at most; as many as 1024 positions number
_HOST_SHARE = 15 / 16  # of the free host memory that an arena may take: page-locked, it cannot be swapped out


def bank_places(config: MemoryConfig, device: torch.device, slot_bytes: int, most: int) -> int:
    """How many chunks the bank (mode "full": the pool) holds: as configured, else `most` or what fits half of what
    is free. Raises ValueError when that is less than a window retrieves."""
    if config.bank_chunks is not None or not (config.has_bank or config.mode == "full"):
        return config.bank_chunks or 1
    on_device = device.type == "cuda" and not (config.has_bank and config.bank == "host")
    free = free_bytes(device if on_device else torch.device("cpu"))
    fits = int(free // 2 // slot_bytes)
    least = max(1, config.retrieved_chunks) if config.has_bank else 1
    if fits < least:
        where = "on the device" if on_device else "on the host"
        raise ValueError(
            f"WorldMemory: bank_chunks must be at least {least} at {slot_bytes / 2**20:.0f} MiB each, "
            f"got {fits} that fit half of the {free / 2**30:.1f} GiB that are free {where}"
        )
    return min(fits, most if config.rope else _CHUNKS_WITHOUT_ROPE)


def check_room(config: MemoryConfig, device: torch.device, pool_bytes: int, arena_bytes: int) -> None:
    """Raises ValueError, with the numbers, when the pool and the arena do not fit what is free.

    An arena leaves a sixteenth of the free host memory.
    """
    wanted = {device.type: pool_bytes}
    wanted["cpu"] = wanted.get("cpu", 0) + arena_bytes
    for kind, needed in wanted.items():
        free = free_bytes(torch.device(kind) if kind == "cpu" else device)
        if kind == "cpu" and arena_bytes:
            free = int(free * _HOST_SHARE)
        if needed > free:
            raise ValueError(
                f"WorldMemory: storage must fit the {free / 2**30:.1f} GiB that are free on {kind}, "
                f"got {needed / 2**30:.1f} GiB; bank_chunks, {config.bank_chunks}, sets most of it"
            )
