"""How the benchmarks time, and the ceilings of the machine that a time is held against."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Run = Callable[[int], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, 20th and 80th percentile; `host` until the call returned to the host."""

    median: float
    low: float
    high: float
    host: float
    rounds: int


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, between two of them in proportion. Wants one value at least."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def sets_for(bytes_per_call: int, l2_bytes: int) -> int:
    """How many input sets to rotate among, so that they exceed four times the L2 cache; from 2 to 32."""
    return min(32, max(2, math.ceil(4 * l2_bytes / max(1, bytes_per_call))))


def l2_bytes(device: torch.device) -> int:
    """Size of the device's last cache as far as timing cares; one byte on a CPU, where nothing is kept cold."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class VariantError(Exception):
    """What the variant of that name raised while it was timed is its cause."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def time_variants(
    runs: dict[str, Run],
    device: torch.device,
    *,
    sets: int = 1,
    flush: bool = False,
    seconds: float = 1.0,
    settle: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time several ways of doing the same thing in one loop, so that a drift of the clocks meets all of them.

    `runs[name](i)` works on input set i. One sample is a walk over all sets, divided by their number. Each round
    takes one sample of every variant; the variant that goes first changes from round to round. `flush` reads a
    buffer of four times the L2 cache before each sample, so that inputs come from memory. `settle` is called before
    each sample, outside its time, to queue a wait for what an earlier one has left running on another stream.

    On a GPU samples lie between two events, and the device waits before the first until the host has queued the work,
    so that launches hide as in a busy stream; on a CPU they are wall-clock. About `seconds` in all after warm-up, 5 to
    200 rounds. Raises VariantError when a variant does.
    """
    names = list(runs)
    on_gpu = device.type == "cuda"
    cold = None
    if flush and on_gpu:
        cold = torch.zeros(l2_bytes(device), dtype=torch.float32, device=device)  # 4 bytes each: four times the cache
    sink = torch.zeros((), dtype=torch.float32, device=device)

    def walk(name: str) -> None:
        try:
            for i in range(sets):
                runs[name](i)
        except (Exception, SystemExit) as error:
            raise VariantError(name) from error

    # Warm-up, and the time until a call returns to the host.
    host: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(3 if on_gpu else 1):
        for name in names:
            synchronize(device)
            start = time.perf_counter()
            walk(name)
            host[name].append(time.perf_counter() - start)
    synchronize(device)
    host_time = {name: min(times) for name, times in host.items()}

    def sample(name: str) -> Callable[[], float]:
        if settle is not None:
            settle()
        if not on_gpu:
            start = time.perf_counter()
            walk(name)
            elapsed = time.perf_counter() - start
            return lambda: elapsed
        if cold is not None:
            torch.sum(cold, dim=0, out=sink)
        # At 2 GHz, above what these devices run at, the wait is never shorter than asked for.
        torch.cuda._sleep(int(2e9 * min(1.5 * host_time[name] + 2e-5, 1e-2)))
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        walk(name)
        end_event.record()
        return lambda: start_event.elapsed_time(end_event) * 1e-3

    samples: dict[str, list[float]] = {name: [] for name in names}
    rounds, done = 1, 0
    while done < rounds:
        start = time.perf_counter()
        first = done % len(names)
        pending = [(name, sample(name)) for name in names[first:] + names[:first]]
        synchronize(device)
        for name, read in pending:
            samples[name].append(read() / sets)
        if done == 0:
            rounds = min(200, max(5, math.ceil(seconds / max(1e-9, time.perf_counter() - start))))
        done += 1
    return {
        name: Timing(
            statistics.median(times), percentile(times, 0.2), percentile(times, 0.8), host_time[name] / sets, done
        )
        for name, times in samples.items()
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread: small work on shared cores waits for its threads, not for its arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches: bytes read and written a second in a copy, operations a second in a matmul,
    bytes a second from pinned host memory (None where not measured)."""

    copy: float
    matmul: float
    host_to_device: float | None = None


def measure_ceilings(device: torch.device, *, small: bool = False, host_to_device: bool = False) -> Ceilings:
    """Measure the ceilings with PyTorch's own copy and matmul, on random data.

    GPU: a copy of up to 4 GiB, an 8192^3 bf16 matmul, 1 GiB from pinned memory. `small` or a CPU (matmul in fp32): far
    smaller, which proves that the code runs and nothing about the machine.
    """
    small = small or device.type == "cpu"
    copied = 1 << 24
    if not small:
        copied = min(4 << 30, torch.cuda.mem_get_info(device)[0] // 8)
    seconds = 0.02 if small else 0.5
    copy = _copy_seconds(copied, device, seconds)
    side = 512 if small else 8192
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16  # bf16 on a CPU may be emulated
    a, b = (torch.randn(side, side, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    matmul = time_variants({"mm": lambda i: torch.mm(a, b, out=product)}, device, seconds=seconds)["mm"].median
    link = None
    if host_to_device and device.type == "cuda":
        size = 1 << 20 if small else 1 << 30
        on_host = torch.empty(size, dtype=torch.uint8, pin_memory=True, device="cpu").fill_(7)
        on_device = torch.empty(size, dtype=torch.uint8, device=device)
        runs = {"h2d": lambda i: on_device.copy_(on_host, non_blocking=True)}
        link = size / time_variants(runs, device, seconds=seconds)["h2d"].median
    return Ceilings(2 * copied / copy, 2 * side**3 / matmul, link)


def _copy_seconds(size: int, device: torch.device, seconds: float) -> float:
    source = torch.randn(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return time_variants({"copy": lambda i: target.copy_(source)}, device, seconds=seconds)["copy"].median


def roof(num_bytes: int, flops: int, ceilings: Ceilings, link_bytes: int = 0) -> tuple[str, float]:
    """Which ceiling binds, "copy", "matmul" or "link", and the seconds below which the work cannot be done.

    Where no link was measured, such as on a CPU, `link_bytes` count against the copy.
    """
    if ceilings.host_to_device is None:
        num_bytes, link_bytes = max(num_bytes, link_bytes), 0
    floors = {"copy": num_bytes / ceilings.copy, "matmul": flops / ceilings.matmul}
    if link_bytes:
        floors["link"] = link_bytes / ceilings.host_to_device
    binds = max(floors, key=floors.get)
    return binds, floors[binds]


def describe_ceilings(ceilings: Ceilings) -> str:
    link = "" if ceilings.host_to_device is None else f", host to device {ceilings.host_to_device / 1e9:.1f} GB/s"
    return f"ceilings: copy {ceilings.copy / 1e9:.0f} GB/s, matmul {ceilings.matmul / 1e12:.1f} TFLOP/s{link}"
