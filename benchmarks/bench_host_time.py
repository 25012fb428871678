"""Host time of a memory's bookkeeping, begin_chunk and end_chunk, against how much is banked. On a CPU, one thread.

    python benchmarks/bench_host_time.py [--jsonl FILE] [--only A,B] [--chunks 10,100,340,1000] [--bank host]
    python benchmarks/bench_host_time.py --table FILE

A chunk is one token of one layer, so that next to nothing but bookkeeping is timed: what the window is, what comes back
from the bank, what a full bank gives up. The camera walks as a player does, or stands still. A line is for one memory
at one size: a bank that fills and holds so many chunks, or one that is full with them. Every memory goes through its
session in a process of its own, whose resident memory is read when the memory is made and when the session ends. What
both calls take of the processor is told beside the time by the clock: a busy machine blurs it less. All of it takes
some five minutes.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from common import append_json_line, measured_in
from machine import environment
from timing import one_thread, percentile

from worldkv_kernels import MemoryConfig, WorldMemory
from worldkv_kernels.actions import ActionIntegrator, Actions, ActionScales
from worldkv_kernels.cli.report import note, table
from worldkv_kernels.memory.retrieval import (
    ActionRetrieval,
    ContentRetrieval,
    FovRetrieval,
    NearestPolicy,
    PoseRetrieval,
)

BENCH = "host_time"
TIMED = 20  # chunks, whose median is taken
_RECENT, _SINK, _WARM_UP = 2, 1, 8
_SCALES = ActionScales(yaw=40.0, walk=0.25)  # a look turns 4 degrees a row, a step goes 0.25 units
_CAMERA = np.array([300.0, 300.0, 200.0, 150.0])
_CONTENT = (3, 40 * 128)
_RETRIEVALS = ("pose", "action", "fov", "content")


class Session(NamedTuple):
    """One memory, and the chunks after which it is timed. `full`: whether its bank has room for `sizes[0]` chunks
    alone and is timed when more have come."""

    retrieval: str
    diversity: float
    stands: bool
    bank: str
    full: bool
    sizes: tuple[int, ...]

    @property
    def variant(self) -> str:
        of_diversity = f", diversity {self.diversity:g}" if self.diversity else ""
        return self.retrieval + of_diversity + (", standing still" if self.stands else "")


class Times(NamedTuple):
    """Of a session at one size, in seconds a chunk, `processor` what begin and end took of it; `rss` in bytes since the
    memory was made."""

    size: int
    begin: list[float]
    end: list[float]
    processor: list[float]
    rss: int


def walk(stands: bool) -> Iterator[Actions]:
    """The actions of each chunk of a walk: runs of a few chunks in which a player walks, looks aside, or both."""
    rng, held = np.random.default_rng(0), np.zeros(6)
    for chunk in itertools.count():
        if not rng.integers(5) and not stands:
            held = np.zeros(6)
            held[1] = 0.1 * rng.integers(-1, 2)
            held[2] = rng.random() < 0.7
        rows = np.tile(held, (4 if chunk else 1, 1))
        yield Actions(rows[:, :2], rows[:, 2:])


def cameras_of(retrieval: str, stands: bool) -> Iterator[dict[str, Any]]:
    """What begin_chunk is given of each chunk of a walk; by content what end_chunk is, as of a model with 40 heads of
    128: of one that stands the same each time, else of one that strays."""
    if retrieval == "content":
        rng, content = np.random.default_rng(0), np.zeros(_CONTENT, np.float32)
        for _ in itertools.count():
            if not stands:
                content = content + rng.standard_normal(_CONTENT, dtype=np.float32)
            yield dict(content=content)
    integrator = ActionIntegrator(_SCALES)
    for actions in walk(stands):
        if retrieval == "action":
            yield dict(actions=actions)
        else:
            poses = integrator.advance(*actions)
            yield dict(poses=poses, intrinsics=_CAMERA) if retrieval == "fov" else dict(poses=poses)


def policy_of(retrieval: str, diversity: float) -> NearestPolicy:
    if retrieval == "action":
        return ActionRetrieval(ActionIntegrator(_SCALES), diversity=diversity)
    policies = {"pose": PoseRetrieval, "fov": FovRetrieval, "content": ContentRetrieval}
    return policies[retrieval](diversity=diversity)


def memory_of(session: Session) -> WorldMemory:
    """With a bank of `sizes[0]` chunks if it is to be full, else of more than are timed."""
    policy = policy_of(session.retrieval, session.diversity)
    config = MemoryConfig(
        num_layers=1, num_heads=1, head_dim=64, grid=(1, 1), chunk_frames=1, sink_frames=_SINK, recent_frames=_RECENT,
        keep_ratio=1.0, bank=session.bank, bank_chunks=session.sizes[0] if session.full else 1024, retrieval=policy,
    )  # fmt: skip
    return WorldMemory(config, dtype=torch.float32)


def go_through(session: Session) -> list[Times]:
    """The session, timed at each size over the last chunks before it, or, of a full bank, the first ones after."""
    before = _SINK + _RECENT + (TIMED if session.full else 0)
    cameras = list(itertools.islice(cameras_of(session.retrieval, session.stands), max(session.sizes) + before))
    seconds: list[tuple[float, float, float]] = []
    found = []
    with one_thread():
        memory = memory_of(session)
        for camera in cameras[:_WARM_UP]:  # what is loaded and allocated at first use is not of the session
            run_chunk(memory, camera)
        memory.reset()
        first_rss = resident_bytes()
        sizes = {size + before: size for size in session.sizes}
        for chunk, camera in enumerate(cameras, start=1):
            seconds.append(run_chunk(memory, camera))
            if chunk in sizes:
                assert memory.stats()["chunks_banked"] == sizes[chunk]
                times = map(list, zip(*seconds[-TIMED:], strict=True))
                found.append(Times(sizes[chunk], *times, resident_bytes() - first_rss))
    return found


def run_chunk(memory: WorldMemory, camera: dict[str, Any]) -> tuple[float, float, float]:
    """A chunk of zeros; seconds of begin_chunk and of end_chunk by the clock, and of the processor in both."""
    of_end = {name: given for name, given in camera.items() if name == "content"}
    camera = {name: given for name, given in camera.items() if name not in of_end}
    x = torch.zeros((1, 64), dtype=torch.float32, device="cpu")
    before, started = time.thread_time(), time.perf_counter()
    memory.begin_chunk(**camera)
    begun, of_begin = time.perf_counter(), time.thread_time()
    memory.attend(0, x, x, x)
    of_attend, attended = time.thread_time(), time.perf_counter()
    memory.end_chunk(**of_end)
    ended = time.perf_counter()
    return begun - started, ended - attended, of_begin - before + time.thread_time() - of_attend


def resident_bytes() -> int:
    """Of this process, now; where /proc does not tell, at its highest."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def line_of(session: Session, times: Times) -> dict[str, Any]:
    """What is written of a memory at one size."""
    figures: dict[str, float] = {}
    of_both = [begin + end for begin, end in zip(times.begin, times.end, strict=True)]
    of_parts = dict(begin=times.begin, end=times.end, both=of_both, processor=times.processor)
    for name, seconds in of_parts.items():
        figures[f"{name}_us"] = 1e6 * statistics.median(seconds)
        figures[f"{name}_us_20"] = 1e6 * percentile(seconds, 0.2)
        figures[f"{name}_us_80"] = 1e6 * percentile(seconds, 0.8)
    return {
        "bench": BENCH, "case": f"{'a full bank' if session.full else 'a bank that fills'}, {times.size} chunks",
        "variant": session.variant, "bank": session.bank, "full": session.full, "chunks": times.size,
        "rounds": len(times.begin), **{name: round(us, 1) for name, us in figures.items()}, "rss_bytes": times.rss,
    }  # fmt: skip


def sessions(sizes: Iterable[int], bank: str) -> Iterator[Session]:
    """All of them, for banks that hold so many chunks."""
    ordered = tuple(sorted(sizes))
    for retrieval in _RETRIEVALS:
        for diversity, stands in ((0.0, False), (0.5, False), (0.0, True)):
            yield Session(retrieval, diversity, stands, bank, False, ordered)
            for size in ordered:
                yield Session(retrieval, diversity, stands, bank, True, (size,))


def report(lines: Iterable[dict[str, Any]]) -> str:
    """The lines of a file as a table for each case, times in ms."""
    of_cases: dict[str, list[list[str]]] = {}
    for line in lines:
        ms = [f"{line[f'{name}_us'] / 1e3:.2f}" for name in ("begin", "end", "both")]
        highest = f"{line['both_us_80'] / 1e3:.2f}"
        processor = f"{line['processor_us'] / 1e3:.2f}" if "processor_us" in line else "-"
        row = [line["variant"], *ms, highest, processor, f"{line['rss_bytes'] / 2**20:.1f}"]
        of_cases.setdefault(f"{line['case']}, bank={line['bank']!r}", []).append(row)
    columns = ["retrieval", "begin, ms", "end, ms", "both, ms", "80 %", "of the processor", "RSS, MiB"]
    return "\n\n".join(f"{case}\n{table(columns, rows)}" for case, rows in of_cases.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--jsonl", metavar="FILE", help="append a line for each memory and size")
    add("--table", metavar="FILE", help="print the tables of a file and measure nothing")
    add("--only", metavar="A,B", help="of pose, action, fov and content (default: all)")
    add("--chunks", default="10,100,340,1000", metavar="N,M", help="how many are banked (default: %(default)s)")
    add("--bank", choices=("host", "device"), default="host", help="host also prefetches (default: %(default)s)")
    args = parser.parse_args()
    if args.table:
        print(report(measured_in(args.table)))
        return 0
    sizes = args.chunks.split(",")
    if not all(size.isdigit() and TIMED // 2 <= int(size) <= 1000 for size in sizes):
        parser.error(f"argument --chunks: must be numbers from {TIMED // 2} to 1000, got {args.chunks}")
    only = args.only.split(",") if args.only else list(_RETRIEVALS)
    if not set(only) <= set(_RETRIEVALS):
        parser.error(f"argument --only: must be of pose, action, fov and content, got {args.only}")
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # of the processes to come
        os.environ[name] = "1"
    record = environment(torch.device("cpu"))
    lines = []
    # A process for each, since what a session frees stays with its process.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for session in sessions(map(int, sizes), args.bank):
            if session.retrieval not in only:
                continue
            for times in pool.submit(go_through, session).result():
                line = line_of(session, times)
                note(f"{line['variant']}: {line['case']}: {line['both_us'] / 1e3:.2f} ms")
                append_json_line(args.jsonl, {**line, "environment": record})
                lines.append(line)
    print(report(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
