"""What memories are worth, on the small world model: the studies of world_studies.py, a JSON line for each memory.

    python benchmarks/bench_world.py --jsonl study.jsonl [--study modes] [--worlds 32] [--processes 2]
    python benchmarks/bench_world.py --table study.jsonl

Every memory goes on the same journeys through the same worlds with the same noise, so differences are paired: a line
has the mean PSNR over the views seen again, its standard error over worlds, and the same of the difference to the
study's first memory. All of it takes some 50 minutes on two cores; speed is not what is measured here.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import append_json_line, measured_in
from machine import environment
from world_packing import add_outliers, packing
from world_studies import STUDIES, Memory, RandomRetrieval, Study, pruning

from worldkv_kernels import MemoryConfig, WorldMemory
from worldkv_kernels.cli.photographs import PHOTOGRAPHS, load
from worldkv_kernels.cli.report import note, table
from worldkv_kernels.journeys import fidelity, travel, truth
from worldkv_kernels.memory.store import chunk_bytes
from worldkv_kernels.models.small_world import WEIGHTS, SmallWorld
from worldkv_kernels.worlds import draw_worlds, photograph_world

BENCH = "world"
# Seed of the worlds: in the low 32 bits, which are all that a CPU's generator takes, no training's, and not the one of
# `worldkv world`.
_UNSEEN = 3 * 2**30
_CHUNK = 3


class Seen(NamedTuple):
    """Of one memory in one world."""

    psnr: float
    ssim: float
    tokens: float
    kept_bytes: int
    banked_share: float | None = None  # of a whole chunk's bytes in 16 bits, what a banked one takes


@cache
def _model(weights: str, numbers: str, outliers: bool) -> SmallWorld:
    torch.set_num_threads(1)
    dtype = torch.float32 if numbers == "fp32" else torch.bfloat16
    model = SmallWorld.from_pretrained(weights, device="cpu", dtype=dtype)
    if numbers == "fp8":
        model.to_fp8()
    if outliers:
        add_outliers(model)
    return model


@cache
def _world(photograph: bool, number: int) -> torch.Tensor:
    if photograph:
        name = list(PHOTOGRAPHS)[number]
        return photograph_world(load(argparse.Namespace(image=None, photo=name))[1])
    return draw_worlds(number + 1, torch.Generator().manual_seed(_UNSEEN))[number]


def visit(weights: str, study: Study, memory: Memory, number: int) -> Seen:
    """One memory in one world of a study."""
    model = _model(weights, memory.numbers, memory.outliers)
    world, journey = _world(study.photographs, number), study.journey(number)
    chunks = len(journey.poses) // _CHUNK
    options = dict(memory.options)
    if isinstance(options.get("retrieval"), RandomRetrieval):
        options["retrieval"] = RandomRetrieval(number)  # each world its own draw
    config = model.config.memory(**{"bank_chunks": chunks, **options})
    with pruning(memory.prune, seed=number), packing(memory.packing):
        of_memory = WorldMemory(config, device="cpu", dtype=model.dtype)
        trip = travel(model, of_memory, world, journey, seed=number, sigmas=memory.sigmas)
    again = list(journey.seen_again())
    want = truth(world, journey)
    if study.against == "the first visit":
        want = trip.frames.flip(0)
        again = [frame for frame in again if frame >= len(want) // 2]  # on the way out others were seen a turn before
    of_again = fidelity(trip, want, again)
    share = None if memory.packing else banked_share(config, model.dtype)
    return Seen(float(np.mean(of_again.psnr)), of_again.ssim, of_again.tokens, trip.stats["kept_bytes"], share)


def banked_share(config: MemoryConfig, dtype: torch.dtype) -> float | None:
    """Bytes of a banked chunk over those of a whole one as it is made; None where there is no bank."""
    if not config.has_bank:
        return None
    heads = config.num_heads, config.head_dim
    whole = chunk_bytes(config.chunk_tokens, *heads, 16, dtype)
    return chunk_bytes(config.banked_tokens, *heads, config.bank_bits, dtype) / whole


def line_of(study: Study, memory: Memory, seen: list[Seen], base: list[Seen]) -> dict[str, Any]:
    """What is written of a memory in a study: means over worlds, with standard errors."""
    of_worlds, of_base = (np.array([of.psnr for of in by_world]) for by_world in (seen, base))

    def error(numbers: np.ndarray) -> float:
        return float(numbers.std(ddof=1) / np.sqrt(len(numbers)))

    against = None
    if seen is not base:
        gained = of_worlds - of_base
        against = {"memory": study.memories[0].name, "db": float(gained.mean()), "standard_error": error(gained)}
    return {
        "bench": BENCH, "case": study.name, "variant": memory.name, "asks": study.asks, "worlds": len(seen),
        "options": {name: value if isinstance(value, int | float | str) else type(value).__name__
                    for name, value in memory.options.items()},
        "prune": memory.prune, "sigmas": memory.sigmas, "numbers": memory.numbers, "against": study.against,
        "packing": memory.packing, "outliers": memory.outliers,
        "psnr_db": float(of_worlds.mean()), "standard_error": error(of_worlds), "difference": against,
        "ssim": float(np.mean([of.ssim for of in seen])), "tokens_attended": float(np.mean([of.tokens for of in seen])),
        "kept_bytes": max(of.kept_bytes for of in seen), "banked_share": seen[0].banked_share,
        "psnr_db_per_world": of_worlds.round(3).tolist(),
    }  # fmt: skip


def report(lines: Iterable[dict[str, Any]]) -> str:
    """The lines of a file as tables, one for each study."""
    of_studies: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        of_studies.setdefault(f"{line['case']}: {line['asks']} ({line['worlds']} worlds)", []).append(line)
    tables = []
    for study, of_study in of_studies.items():
        rows = [
            [
                line["variant"], f"{line['psnr_db']:.2f}", f"{line['standard_error']:.2f}",
                "" if line["difference"] is None
                else f"{line['difference']['db']:+.2f} +- {line['difference']['standard_error']:.2f}",
                f"{line['ssim']:.3f}", f"{line['tokens_attended']:,.0f}", f"{line['kept_bytes'] / 2**20:.1f}",
                f"{line['banked_share']:.3f}" if line.get("banked_share") else "",
            ]
            for line in of_study
        ]  # fmt: skip
        columns = ["memory", "PSNR, dB", "+-", "to the first", "SSIM", "tokens", "MiB", "banked"]
        tables.append(f"{study}\n{table(columns, rows)}")
    return "\n\n".join(tables)


@contextmanager
def workers(processes: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """A map whose calls run in so many processes, or for 1 in this one."""
    if processes == 1:
        yield map
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool.map


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--jsonl", metavar="FILE", help="append a line for each memory")
    add("--table", metavar="FILE", help="print the tables of a file and measure nothing")
    add("--study", action="append", choices=[study.name for study in STUDIES], help="one of them; may be given again")
    add("--worlds", type=int, help="at most so many, at least 2 (default: 32, the longest journeys 16)")
    add("--weights", default=str(WEIGHTS), metavar="FOLDER", help="of another training")
    add("--processes", type=int, default=2, help="1 for none but this one (default: %(default)s)")
    args = parser.parse_args()
    if args.table:
        print(report(measured_in(args.table)))
        return 0
    if args.worlds is not None and args.worlds < 2:
        parser.error(f"argument --worlds: must be at least 2, got {args.worlds}")
    if args.processes < 1:
        parser.error(f"argument --processes: must be at least 1, got {args.processes}")
    record = environment(torch.device("cpu"))
    lines = []
    with workers(args.processes) as each:
        for study in (study for study in STUDIES if args.study is None or study.name in args.study):
            base: list[Seen] = []
            worlds = range(study.first_world, study.first_world + min(study.worlds, args.worlds or study.worlds))
            for memory in study.memories:
                started = time.perf_counter()
                seen = list(each(partial(visit, args.weights, study, memory), worlds))
                base = base or seen
                line = line_of(study, memory, seen, base)
                note(f"{study.name}: {memory.name}: {line['psnr_db']:.2f} dB, {time.perf_counter() - started:.0f} s")
                append_json_line(args.jsonl, {**line, "weights": Path(args.weights).name, "environment": record})
                lines.append(line)
    print(report(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
