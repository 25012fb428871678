"""Room: how many chunks fit the memory that is free, whether all of a memory does, and what to change where not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..checks import byte_size
from .config import BANK_BITS, MemoryConfig
from .pool import free_bytes
from .sizes import MemoryBytes, memory_bytes, place_bytes

# Chunks that a bank (mode "full": the pool) of unstated size holds at most. The host's time for a chunk grows with the
# square of them where one is given up, and has been measured up to so many: some milliseconds.
BANK_LIMIT = 1000
HOST_SHARE = 15 / 16  # of the free host memory that an arena may take: page-locked, it cannot be swapped out
_LEAST_KEEP_RATIO = 1 / 16  # that is proposed
_PARTS_NAMED = 4  # of what does not fit

Fits = Callable[[MemoryBytes], bool]


def least_chunks(config: MemoryConfig) -> int:
    """How many chunks a bank (mode "full": the pool) must hold: what a window retrieves, one at least."""
    return max(1, config.retrieved_chunks) if config.has_bank else 1


def bank_places(config: MemoryConfig, device: torch.device, dtype: torch.dtype) -> int:
    """How many chunks the bank (mode "full": the pool) holds: as configured, else what fits half of what is free, at
    most BANK_LIMIT. Raises ValueError when that is less than a window retrieves."""
    if config.bank_chunks is not None or not (config.has_bank or config.mode == "full"):
        return config.bank_chunks or 1
    on_device = device.type == "cuda" and not (config.has_bank and config.bank == "host")
    free, each = free_bytes(device if on_device else torch.device("cpu")), place_bytes(config, dtype)
    least = least_chunks(config)
    fits = int(free // 2 // each)
    if fits < least:
        where = "on the device" if on_device else "on the host"
        raise ValueError(
            f"WorldMemory: bank_chunks must be at least {least} at {each / 2**20:.0f} MiB each, "
            f"got {fits} that fit half of the {free / 2**30:.1f} GiB that are free {where}"
        )
    return min(fits, max(least, BANK_LIMIT))


def check_room(config: MemoryConfig, device: torch.device, dtype: torch.dtype, places: int) -> None:
    """Raises ValueError when a memory with `places` does not fit what is free: what it takes, by part, and each change
    that alone is enough, with what it would take. An arena leaves a sixteenth of the free host memory."""
    kinds = {device.type: device, "cpu": torch.device("cpu")}
    free = {kind: free_bytes(of_kind) for kind, of_kind in kinds.items()}
    left = {**free, "cpu": int(free["cpu"] * HOST_SHARE)}

    def room(sizes: MemoryBytes) -> dict[str, int]:
        return left if sizes.host_bank else free

    def fits(sizes: MemoryBytes) -> bool:
        return all(needed <= room(sizes)[kind] for kind, needed in sizes.on(device.type).items())

    sizes = memory_bytes(config, dtype, places)
    if fits(sizes):
        return
    needed = sizes.on(device.type)
    kind = next(kind for kind in needed if needed[kind] > room(sizes)[kind])
    if has_places(config):
        config = replace(config, bank_chunks=places)
    raise ValueError(
        f"WorldMemory: storage must fit the {byte_size(room(sizes)[kind])} that are free on {kind}, got "
        f"{byte_size(needed[kind])} ({_largest_parts(sizes, kind, device.type)}); "
        f"{advice(config, dtype, fits, device_type=device.type)}"
    )


def has_places(config: MemoryConfig) -> bool:
    """Whether `bank_chunks` means anything."""
    return config.has_bank or config.mode == "full"


def most_bank_chunks(config: MemoryConfig, dtype: torch.dtype, fits: Fits) -> int | None:
    """The most `bank_chunks`, up to BANK_LIMIT, of a memory that fits; None where the least does not."""
    least = least_chunks(config)
    return _most(least, max(least, BANK_LIMIT), lambda chunks: fits(memory_bytes(config, dtype, chunks)))


def changes(
    config: MemoryConfig, dtype: torch.dtype, fits: Fits, *, device_type: str
) -> list[tuple[dict[str, Any], MemoryBytes]]:
    """The changes of a config that does not fit, each of which alone makes it fit and is the smallest of its kind.

    `config` has `bank_chunks` wherever they mean anything. Fields to change, and what the memory then takes: fewer
    bank_chunks, a bank in host memory, a smaller keep_ratio (halved and halved again, down to 1/16), fewer bank_bits,
    fewer device_slots, fewer retrieved or recent. A bank that
    holds no more than a window retrieves shrinks with it.
    """

    def of(**fields: Any) -> MemoryBytes:
        changed = replace(config, **fields)
        return memory_bytes(changed, dtype, changed.bank_chunks or 1)

    def retrieving(chunks: int) -> dict[str, int]:
        follows = config.bank_chunks == least_chunks(config)
        return {"retrieved_chunks": chunks, **({"bank_chunks": max(1, chunks)} if follows else {})}

    tried: list[dict[str, Any] | None] = []
    if has_places(config):
        chunks = _most(least_chunks(config), config.bank_chunks - 1, lambda n: fits(of(bank_chunks=n)))
        tried.append({"bank_chunks": chunks} if chunks is not None else None)
    if config.has_bank:
        if config.bank == "device" and device_type != "cpu":
            tried.append({"bank": "host"})
        ratio = config.keep_ratio / 2
        while ratio >= _LEAST_KEEP_RATIO and not fits(of(keep_ratio=ratio)):
            ratio /= 2
        tried.append({"keep_ratio": ratio} if ratio >= _LEAST_KEEP_RATIO else None)
        bits = [bits for bits in BANK_BITS if bits < config.bank_bits and fits(of(bank_bits=bits))]
        tried.append({"bank_bits": bits[0]} if bits else None)
        if config.caches_bank:
            slots = _most(least_chunks(config), config.cache_slots - 1, lambda n: fits(of(device_slots=n)))
            tried.append({"device_slots": slots} if slots is not None else None)
        chunks = _most(0, config.retrieved_chunks - 1, lambda n: fits(of(**retrieving(n))))
        tried.append(retrieving(chunks) if chunks is not None else None)
    if config.mode != "full":
        frames = _most(0, config.recent_frames - 1, lambda n: fits(of(recent_frames=n)))
        tried.append({"recent_frames": frames} if frames is not None else None)
    proposed = [(fields, of(**fields)) for fields in tried if fields is not None]
    return [(fields, sizes) for fields, sizes in proposed if fits(sizes)]


def advice(config: MemoryConfig, dtype: torch.dtype, fits: Fits, *, device_type: str) -> str:
    """What `changes` finds, in words; where it finds nothing, what the least takes that all of them together leave."""
    found = changes(config, dtype, fits, device_type=device_type)
    if found:
        return f"enough would be {' or '.join(_told(*change) for change in found)}"
    fields: dict[str, Any] = {"recent_frames": 0} if config.mode != "full" and config.recent_frames else {}
    if config.has_bank:
        fields["keep_ratio"] = min(config.keep_ratio, _LEAST_KEEP_RATIO)
        fields["retrieved_chunks"] = min(config.retrieved_chunks, 1)
    if has_places(config):
        fields["bank_chunks"] = 1
    sizes = memory_bytes(replace(config, **fields), dtype, 1)
    enough = "all of these together would be" if fits(sizes) else "nor are all of these"
    return f"no one change is enough, {enough}: {_told(fields, sizes)}"


def _told(fields: dict[str, Any], sizes: MemoryBytes) -> str:
    named = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    host = f" and {byte_size(sizes.host_bank)} of host memory" if sizes.host_bank else ""
    return f"{named} ({byte_size(sizes.device)}{host})"


def _largest_parts(sizes: MemoryBytes, kind: str, device_type: str) -> str:
    here = {
        part.replace("_", " "): size
        for part, size in sizes.parts.items()
        if kind == device_type == "cpu" or (kind == "cpu") == part.startswith("host_")
    }
    largest = sorted(here.items(), key=lambda item: -item[1])[:_PARTS_NAMED]
    return ", ".join(f"{part} {byte_size(size)}" for part, size in largest if size)


def _most(least: int, most: int, fits: Callable[[int], bool]) -> int | None:
    """The largest number from `least` to `most` that fits, where smaller ones do if it does; None where none does."""
    if most < least or not fits(least):
        return None
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least
