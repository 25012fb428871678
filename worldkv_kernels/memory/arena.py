"""The arena: one piece of host memory for all that a bank holds, page-locked for a GPU."""

from __future__ import annotations

import math
import mmap
import os
import threading
import warnings
import weakref
from contextlib import suppress
from pathlib import Path

import torch


class Arena:
    """`rows`, a tensor [places, num_layers, ...], allocated once.

    For a GPU the memory is page-locked, so that copies run beside compute, and comes from the NUMA node that the GPU
    hangs on where Linux names it. It is registered with CUDA in place: torch's pinned allocator would
    round a size up to a power of two. Where page-locking is refused, the memory stays pageable, with one RuntimeWarning
    and `pinned` False: everything works, but a copy may hold up the host. On a CPU nothing is locked.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        size, page = math.prod(shape) * dtype.itemsize, mmap.PAGESIZE
        memory = torch.empty(arena_bytes(size), dtype=torch.uint8, device="cpu")
        span = len(memory) - page
        first = -memory.data_ptr() % page
        self.rows = memory[first : first + size].view(dtype).view(shape)
        self.pinned = False
        if device.type == "cuda" and size:
            self._pin(memory, memory.data_ptr() + first, span, device)

    @property
    def bytes(self) -> int:
        return self.rows.numel() * self.rows.element_size()

    def _pin(self, memory: torch.Tensor, address: int, span: int, device: torch.device) -> None:
        refusal = page_lock(address, span, device)
        if refusal is None:
            self.pinned = True
            weakref.finalize(self, _page_unlock, memory, address, device, os.getpid()).atexit = False
        else:
            warnings.warn(
                f"WorldMemory: {span / 2**30:.1f} GiB of host memory for the bank must be page-locked for copies "
                f"to run beside compute, got pageable memory ({refusal}): copies are slower and hold up the host",
                RuntimeWarning,
                stacklevel=2,
            )


def arena_bytes(size: int) -> int:
    """What an arena of so many bytes allocates: whole pages, which no other memory shares, and one to start on one."""
    page = mmap.PAGESIZE
    return (-(-size // page) + 1) * page


def page_lock(address: int, span: int, device: torch.device) -> str | None:
    """Register host memory with CUDA; returns why not, or None when it is done.

    From a thread of its own, bound to the GPU's NUMA node: pages are placed where the thread that first touches them
    runs, and a refusal's error code stays in that thread.
    """
    refusal: list[str] = ["the thread died"]

    def register() -> None:
        try:
            with suppress(OSError, AttributeError):  # on another node copies are slower, no more
                cpus = _cpus_near(device)
                if cpus:
                    os.sched_setaffinity(0, cpus)  # of this thread
            with torch.cuda.device(device):
                code = int(torch.cuda.cudart().cudaHostRegister(address, span, 0))
            refusal[:] = [f"cudaHostRegister: error {code}"] if code else []
        except Exception as error:  # whatever it is, pageable memory serves
            refusal[:] = [f"{type(error).__name__}: {error}"]

    thread = threading.Thread(target=register, name="worldkv-page-lock")
    thread.start()
    thread.join()
    return refusal[0] if refusal else None


def _page_unlock(memory: torch.Tensor, address: int, device: torch.device, process: int) -> None:
    """Unregister before `memory` is freed, after the copies out of it; a fork's child registered nothing."""
    if os.getpid() == process:
        torch.cuda.synchronize(device)
        torch.cuda.cudart().cudaHostUnregister(address)


def _cpus_near(device: torch.device) -> set[int]:
    gpu = torch.cuda.get_device_properties(device)
    return node_cpus(f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0")


def node_cpus(pci_id: str, sysfs: Path = Path("/sys")) -> set[int]:
    """CPUs of the NUMA node of a PCI device that this process may use; none where Linux does not say."""
    try:
        node = int((sysfs / f"bus/pci/devices/{pci_id}/numa_node").read_text())
        listed = (sysfs / f"devices/system/node/node{node}/cpulist").read_text()  # such as 0-7,16-23
    except (OSError, ValueError):  # no such file, or node -1: unknown
        return set()
    cpus: set[int] = set()
    for piece in filter(None, listed.strip().split(",")):  # nothing, of a node that is memory alone
        first, _, last = piece.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus & os.sched_getaffinity(0)
