"""Whether a GPU does what segment attention takes for granted of sm_90a: a small kernel a fact, which writes bits.

    python benchmarks/conformance.py [--compile] [--json PATH] [--jsonl FILE]

The kernels are in conformance/, and so are the bits expected: those of tests/cuda_on_host, on which segment attention
is proven (tests/conformance_expected.py writes them). A fact that does not hold is said in words, with the first places
where the bits differ. Exit status 0 when all hold, and where there is no GPU of this kind; 1 when one does not; 2 when
the kernels could not be compiled.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import append_json_line
from machine import environment, in_checkout

from worldkv_kernels.cli.report import writable, write_json

SOURCES = Path(__file__).resolve().parent / "conformance"
EXPECTED = SOURCES / "expected.npz"
START_SECONDS = 20.0  # a process until its first kernel: the driver may have to wake up
FACT_SECONDS = 5.0
MOST_HANGS = 3  # then the others are left out: it takes seconds to get rid of each


def _word(word: int) -> str:
    return f"0x{word:08x}"


def _element(word: int) -> str:
    """Two columns of a pool, as conformance/boxes.cuh marks them."""
    marks = {0: "zeros", 0xEEEEEEEE: "nothing copied", 0xBADBAD00: "memory outside of the tensor"}
    if word in marks or not word >> 31:
        return marks.get(word, _word(word))
    column = 2 * (word & 0xFF)
    return f"row {word >> 16 & 0x7FFF} head {word >> 8 & 0xFF} columns {column}-{column + 1}"


def _number(word: int) -> str:
    number = np.uint32(word).view(np.float32)
    return f"{number:.0f}" if np.isfinite(number) else _word(word)


def _bits(word: int) -> str:
    number = np.uint32(word).view(np.float32)
    return f"0b{int(number):b}" if 0 <= number < 1 << 20 and number % 1 == 0 else _number(word)


@dataclass(frozen=True)
class Fact:
    """`says`: what does not hold where the bits are others. `shows`: a word for a reader. `registers`: of each of
    `threads`, where the words are those, once or several times."""

    says: str
    shows: Callable[[int], str] = _word
    registers: int = 0
    threads: int = 128

    def place(self, index: int) -> str:
        if not self.registers:
            return f"word {index}"
        thread, register = divmod(index, self.registers)
        again = f", time {1 + thread // self.threads}" if thread >= self.threads else ""
        return f"thread {thread % self.threads}, d[{register}]{again}"


def _scores(rows: int, head_dim: int, groups: int) -> Fact:
    return Fact(
        f"wgmma m64n{rows}k16 takes slab s (bit s of a sum) of 16 columns of rows of k in the 128-byte swizzle 32 "
        f"bytes after the last one, columns from 64 on behind all rows; head_dim {head_dim}, {64 * groups} queries",
        _bits, rows // 2, 128 * groups,
    )  # fmt: skip


def _values(rows: int, head_dim: int) -> Fact:
    return Fact(
        f"wgmma m64n{head_dim}k16 with a transposed b takes slab s (bit s of a sum) of 16 rows 2048 bytes after the "
        f"last slab, and columns from 64 on {128 * rows} bytes (the leading dimension's offset) behind the others",
        _bits, head_dim // 2,
    )  # fmt: skip


# What rests on others comes behind them.
FACTS = {
    "numbers": Fact(
        "cvt.rn packs its second operand into the low half and rounds to nearest even; ex2.approx.ftz is 1 at 0, 0 at "
        "-inf and far below, inf at inf"
    ),
    "box_of_a_tile": Fact(
        "a box of 128 rows x 64 columns lands in rows of 128 bytes, bits 4-6 of each address xor bits 7-9", _element
    ),
    "boxes_of_8_rows": Fact("a box of 8 rows lands as those rows of a tile do, and nowhere else", _element),
    "boxes_of_a_row": Fact(
        "a box of one row at a multiple of 128 bytes is swizzled by the bits of its address, as that row of a tile is",
        _element,
    ),
    "boxes_past_the_end": Fact("rows past the tensor's last become zeros, and their bytes count", _element),
    "boxes_before_the_start": Fact(
        "rows, heads and columns before the first and behind the last become zeros, and their bytes count", _element
    ),
    "pool_of_heads_apart": Fact("heads may lie further apart than rows", _element),
    "pool_of_padded_rows": Fact("rows and heads may lie apart by any multiple of 16 bytes", _element),
    "phases": Fact(
        "a barrier that has seen no phase lets parity 1 pass; a phase ends when both its arrivals and its bytes are "
        "there, in either order, and its bytes can then be read"
    ),
    "ring": Fact("two stages, filled by the copy engine and given back by eight warps, hold one tile after the other"),
    "handoff_by_lane": Fact(
        "what the lanes of a warp have read before __syncwarp() may be overwritten once one of them has arrived"
    ),
    "handoff_by_lanes": Fact("what lanes have read may be overwritten once each has arrived"),
    "turns": Fact("two warp groups take turns by named barriers, at which the other one arrives, and it comes first"),
    "registers": Fact("a warp group that gives registers lets two others have 240 a thread, all of them usable"),
    "accumulate": Fact(
        "wgmma sees ordinary stores after fence.proxy.async; it adds to d, or, not accumulating, ignores what d held, "
        "NaN too",
        _number, 32,
    ),
    "accumulators": Fact(
        "d[v] of thread t is row 16 (t / 32) + t % 32 / 4 + 8 (v / 2 % 2), column 8 (v / 4) + 2 (t % 4) + v % 2 (here "
        "as 256 row + column)",
        _number, 88,
    ),
    "scores_64": _scores(64, 128, 2),
    "scores_128": _scores(128, 128, 2),
    "scores_176": _scores(176, 128, 1),
    "scores_narrow": _scores(64, 64, 1),
    "fp16": Fact("wgmma of fp16 adds up as that of bf16 does", _number, 88),
    "turned_scores": Fact(
        "a[i] in registers holds the rows of d[2 i] and columns 8 (i / 2) + 2 (t % 4), the lower one in the low half",
        _number, 64,
    ),
    "partly_turned_scores": Fact(
        "products of one sum may take a from registers and then from shared memory without a fence between them",
        _number, 64,
    ),
    "values_64": _values(64, 128),
    "values_128": _values(128, 128),
    "values_176": _values(176, 128),
    "values_narrow": _values(176, 64),
    "chain": Fact(
        "accumulators packed in pairs are the a of the next product; wait_group 1 lets the older of two groups be read",
        _number, 32,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """`status`: "ok", "wrong" where bits differ, else "failed", "hung" or "left out"; `reason` is None for ok."""

    fact: str
    status: str
    reason: str | None = None
    words: int = 0
    differing: int = 0


def find_nvcc() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def compile_for_gpu(folder: Path) -> Path:
    """The library. Raises RuntimeError with what nvcc says, or why there is nothing to compile."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc was not found")
    if not in_checkout():
        raise RuntimeError("the sources are not part of an installed package: this wants a checkout")
    library = folder / "conformance.so"
    command = [nvcc, "-shared", "-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-cudart=static"]
    command += ["-Xcompiler=-fPIC", f"-I{SOURCES.parents[1] / 'csrc'}", str(SOURCES / "conformance.cu")]
    done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed: {done.stderr.strip()}")
    return library


def expected_words() -> dict[str, np.ndarray]:
    """By fact. In the file the words lie by their bytes, all lowest ones first, which makes it half as long."""
    with np.load(EXPECTED) as file:
        return {name: np.ascontiguousarray(file[name].T).view("<u4").ravel() for name in file.files}


def write_expected(words: dict[str, np.ndarray]) -> None:
    of_bytes = {name: w.astype("<u4").view(np.uint8).reshape(-1, 4).T.copy("C") for name, w in words.items()}
    np.savez_compressed(EXPECTED, **of_bytes)


def run_apart(
    library: Path, facts: Sequence[str], *, seconds: float = FACT_SECONDS, start: float = START_SECONDS
) -> Iterator[tuple[str, np.ndarray | Outcome]]:
    """The words of each fact, or why there are none: all in one process, and after one that fails in a new one."""
    left, hangs = list(facts), 0
    with tempfile.TemporaryDirectory() as folder:
        while left and hangs < MOST_HANGS:
            command = [sys.executable, str(SOURCES.parent / "conformance_run.py"), str(library), folder, *left]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            lines: queue.SimpleQueue[str] = queue.SimpleQueue()
            threading.Thread(target=_forward, args=(process.stdout, lines), daemon=True).start()
            limit, alive = start + seconds, True
            while left and alive:
                try:
                    name, _, wrong = lines.get(timeout=limit).partition("\t")
                except queue.Empty:
                    hangs, alive = hangs + 1, False
                    outcome: np.ndarray | Outcome = Outcome(left[0], "hung", f"not done after {limit:g} s")
                else:
                    alive = name != "" and not wrong
                    if alive:
                        outcome = np.frombuffer(Path(folder, name).read_bytes(), "<u4")
                    else:
                        outcome = Outcome(left[0], "failed", wrong or f"the process ended with status {process.wait()}")
                yield left.pop(0), outcome
                limit = seconds
            process.kill()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:  # in the driver, with a kernel that goes on
                hangs = MOST_HANGS
    yield from ((name, Outcome(name, "left out", f"{hangs} have hung")) for name in left)


def _forward(stream: Any, lines: queue.SimpleQueue[str]) -> None:
    for line in stream:
        lines.put(line.rstrip("\n"))
    lines.put("")  # the process is done


def judge(name: str, got: np.ndarray | Outcome, want: np.ndarray) -> Outcome:
    """Of what `run_apart` gives. Shows the first three places where bits differ."""
    if isinstance(got, Outcome):
        return got
    if got.shape != want.shape:
        return Outcome(name, "failed", f"{got.size} words in place of {want.size}", got.size, want.size)
    differing = np.flatnonzero(got != want)
    if not differing.size:
        return Outcome(name, "ok", words=want.size)
    fact = FACTS[name]
    shown = [(fact.place(i), fact.shows(int(got[i])), fact.shows(int(want[i]))) for i in map(int, differing[:3])]
    places = "; ".join(f"{place}: {one} in place of {other}" for place, one, other in shown)
    reason = f"{differing.size} of {want.size} words differ: {places}"
    return Outcome(name, "wrong", reason, want.size, differing.size)


def why_not() -> str | None:
    """Why the kernels cannot run here; None when they can."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    major, minor = torch.cuda.get_device_capability(0)
    return None if (major, minor) == (9, 0) else f"these are facts of sm_90, and the GPU is of sm_{major}{minor}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="compile the kernels and run none")
    parser.add_argument("--json", metavar="PATH", help="all outcomes as one JSON document, - for stdout")
    parser.add_argument("--jsonl", metavar="FILE", help="append one JSON line per fact")
    args = parser.parse_args(argv)
    out = sys.stderr if args.json == "-" else sys.stdout
    try:
        writable("--jsonl", args.jsonl)
        writable("--json", None if args.json == "-" else args.json)
    except (ValueError, OSError) as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 2
    reason = None if args.compile else why_not()
    if reason:
        print(f"conformance: skipped: {reason}", file=out)
        return 0
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            library = compile_for_gpu(Path(folder))
        except RuntimeError as error:
            print(f"conformance: {error}", file=sys.stderr)
            return 2
        print(f"conformance: compiled in {time.perf_counter() - start:.1f} s", file=out, flush=True)
        if args.compile:
            return 0
        return report(library, args, out)


def report(library: Path, args: argparse.Namespace, out: Any) -> int:
    want, figures = expected_words(), []
    record = environment(torch.device("cuda", 0))
    for name, got in run_apart(library, list(FACTS)):
        outcome = judge(name, got, want[name])
        line = f"ok      {name}"
        if outcome.status != "ok":
            line = f"FAILED  {name}: {outcome.reason}. Not shown to hold here: {FACTS[name].says}."
        print(line, file=out, flush=True)
        figure = {
            "bench": "conformance", "case": name, "variant": "sm_90a", "status": outcome.status,
            "reason": outcome.reason, "fact": FACTS[name].says, "words": outcome.words,
            "differing": outcome.differing, "environment": record,
        }  # fmt: skip
        append_json_line(args.jsonl, figure)
        figures.append(figure)
    write_json(args.json, {"command": "conformance", "figures": figures})
    held = sum(figure["status"] == "ok" for figure in figures)
    print(f"conformance: {held} of {len(figures)} facts hold", file=out)
    return int(held < len(figures))


if __name__ == "__main__":
    sys.exit(main())
