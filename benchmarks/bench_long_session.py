"""A long session of a memory's bookkeeping on a CPU: whether its time a chunk and its memory stay as they are.

    python benchmarks/bench_long_session.py [--jsonl FILE] [--chunks N] [--bank-chunks N] [--only pose,fov] [--rope]
    python benchmarks/bench_long_session.py --table FILE

A camera walks for 100,000 chunks of one token of one layer, as in bench_host_time.py, whose bank is full after a few
hundred. There is a line for each tenth of the session: the time of a chunk, by the clock and of the processor alone,
which a busy machine blurs less; the process's memory; and how many blocks of it Python has given out, which no page and
no cache of an allocator blurs (a line itself is some fifteen). Each session has a process of its own, and each of
retrieval by pose and by field of view, with diversity, a bank on the device and one in host memory. All of it takes
some twenty minutes.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
from bench_host_time import cameras_of, policy_of, resident_bytes, run_chunk
from common import append_json_line, measured_in
from machine import environment
from timing import one_thread, percentile

from worldkv_kernels import MemoryConfig, WorldMemory
from worldkv_kernels.cli.report import note, table

BENCH = "long_session"
PARTS = 10


class Session(NamedTuple):
    retrieval: str
    bank: str
    chunks: int
    bank_chunks: int
    rope: str | None = None


class Part(NamedTuple):
    """A tenth of a session, or what one has: seconds of each chunk, and what there is when it ends."""

    end: int  # chunk
    seconds: list[float]
    cpu_seconds: list[float]
    rss: int  # bytes
    blocks: int  # of memory that Python has given out
    stats: dict[str, int]


def memory_of(session: Session) -> WorldMemory:
    config = MemoryConfig(
        num_layers=1, num_heads=1, head_dim=64, grid=(1, 1), chunk_frames=1, sink_frames=1, recent_frames=2,
        keep_ratio=1.0, bank=session.bank, bank_chunks=session.bank_chunks, rope=session.rope,
        retrieval=policy_of(session.retrieval, 0.5),
    )  # fmt: skip
    return WorldMemory(config, dtype=torch.float32)


def go_through(session: Session) -> Iterator[Part]:
    """The session, a part at a time."""
    each = session.chunks // PARTS
    with one_thread():
        memory, cameras = memory_of(session), cameras_of(session.retrieval, stands=False)
        for end in range(each, PARTS * each + 1, each):
            seconds, cpu_seconds = [], []
            for camera in itertools.islice(cameras, each):
                started, cpu_started = time.perf_counter(), time.thread_time()
                run_chunk(memory, camera)
                seconds.append(time.perf_counter() - started)
                cpu_seconds.append(time.thread_time() - cpu_started)
            gc.collect()
            blocks = sys.getallocatedblocks() - 2 * each  # without the times
            yield Part(end, seconds, cpu_seconds, resident_bytes(), blocks, memory.stats())


def lines_of(session: Session, jsonl: str | None = None, record: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """What is written of a session, to a file as soon as it is known."""
    case = f"{session.chunks} chunks, a bank of {session.bank_chunks}"
    lines = []
    for part in go_through(session):
        stats = part.stats
        assert stats["chunks"] == part.end and stats["chunks_banked"] <= session.bank_chunks
        assert stats["chunks_banked"] + stats["chunks_dropped"] + 3 == part.end  # a sink, and two recent ones
        ms, cpu_ms = ([1e3 * of_chunk for of_chunk in some] for some in (part.seconds, part.cpu_seconds))
        lines.append({
            "bench": BENCH, "case": case, "variant": session.retrieval, "bank": session.bank, "rope": session.rope,
            "chunks": part.end, "rounds": len(ms), "ms": round(statistics.median(ms), 4),
            "ms_20": round(percentile(ms, 0.2), 4), "ms_80": round(percentile(ms, 0.8), 4),
            "cpu_ms": round(statistics.median(cpu_ms), 4), "cpu_ms_80": round(percentile(cpu_ms, 0.8), 4),
            "rss_mib": round(part.rss / 2**20, 3), "python_blocks": part.blocks,
            **{name: stats[name] for name in ("chunks_banked", "chunks_dropped", "chunks_retrieved")},
        })  # fmt: skip
        append_json_line(jsonl, {**lines[-1], "environment": record})
        of_processor = f"{lines[-1]['cpu_ms']:.2f} ms a chunk of the processor"
        note(f"{session.retrieval}, bank={session.bank!r}: {part.end} chunks: {of_processor}")
    return lines


def report(lines: Iterable[dict[str, Any]]) -> str:
    """The lines of a file as a table for each session."""
    of_sessions: dict[str, list[list[str]]] = {}
    for line in lines:
        row = [str(line["chunks"]), *(f"{line[name]:.2f}" for name in ("ms", "ms_80", "cpu_ms", "cpu_ms_80"))]
        row += [f"{line['rss_mib']:.1f}", str(line["python_blocks"])]
        name = f"{line['case']}, {line['variant']}, bank={line['bank']!r}, rope={line['rope']!r}"
        of_sessions.setdefault(name, []).append(row)
    columns = ["chunks", "ms a chunk", "80 %", "of the processor", "80 %", "RSS, MiB", "blocks"]
    return "\n\n".join(f"{session}\n{table(columns, rows)}" for session, rows in of_sessions.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--jsonl", metavar="FILE", help="append a line for each tenth of a session")
    add("--table", metavar="FILE", help="print the tables of a file and measure nothing")
    add("--only", metavar="A,B", default="pose,fov", help="of pose, action and fov (default: %(default)s)")
    add("--bank", metavar="A,B", default="device,host", help="of device and host (default: %(default)s)")
    add("--chunks", type=int, default=100_000, metavar="N", help="of a session (default: %(default)s)")
    add("--bank-chunks", type=int, default=300, metavar="N", help="that a bank holds (default: %(default)s)")
    add("--rope", action="store_true", help="turn keys and queries in time and place")
    args = parser.parse_args()
    if args.table:
        print(report(measured_in(args.table)))
        return 0
    only, banks = args.only.split(","), args.bank.split(",")
    for name, given, known in (("only", only, {"pose", "action", "fov"}), ("bank", banks, {"device", "host"})):
        if not set(given) <= known:
            parser.error(f"argument --{name}: must be of {', '.join(sorted(known))}, got {','.join(given)}")
    for name, least in (("chunks", PARTS), ("bank_chunks", 6)):  # a window retrieves six
        if getattr(args, name) < least:
            parser.error(f"argument --{name.replace('_', '-')}: must be at least {least}, got {getattr(args, name)}")
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # of the processes to come
        os.environ[name] = "1"
    record = environment(torch.device("cpu"))
    measured = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for retrieval, bank in itertools.product(only, banks):
            session = Session(retrieval, bank, args.chunks, args.bank_chunks, "wan" if args.rope else None)
            measured += pool.submit(lines_of, session, args.jsonl, record).result()
    print(report(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
