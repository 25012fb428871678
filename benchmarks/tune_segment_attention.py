"""Which launch configuration of segment_attention is fastest, by shape and by what is asked for on top.

    python benchmarks/tune_segment_attention.py [--small] [--jsonl FILE] [--device DEVICE] [--seconds S]

Every candidate is checked, then timed beside the others in one loop; the shipped one is among them. What it prints
belongs into `attention_config` of kernels/segment_attention.py, or for CUDA into `attention_tile_rows` of
worldkv_kernels/ops/cuda.py: nothing is tuned while a model runs. Candidates that need more shared memory than the GPU
has, or do not compile, are skipped with their reason. Kernels are compiled first, by as many processes as there are
cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from types import ModuleType
from typing import Any

import torch
from bench_segment_attention import CORE_CASES, AttentionCase, Inputs, our_variant
from common import Problem, Variant, arguments, check_seconds, device_for, run_cases, table
from timing import Run
from worldkv_kernels.kernels import segment_attention as kernel
from worldkv_kernels.kernels.segment_attention import AttentionConfig

from worldkv_kernels.cli.report import writable
from worldkv_kernels.ops import cuda
from worldkv_kernels.ops.all import SEGMENT_ATTENTION

# 4 warps spill with 128 queries, as compiling shows, and 256 queries fit only with 16 warps and 64 rows of keys.
CANDIDATES = [
    AttentionConfig(queries, keys, queries // 16, stages, descriptors)
    for queries, keys, stages in (
        (128, 128, 3), (128, 128, 2), (128, 64, 4), (128, 64, 3), (256, 64, 4), (256, 64, 3), (64, 128, 2), (64, 64, 4),
    )
    for descriptors in (True, False)
]  # fmt: skip
SMALL_CANDIDATES = [AttentionConfig(32, 32, 4, 1), AttentionConfig(64, 32, 4, 1, descriptors=True)]


@dataclass(frozen=True)
class TuneCase:
    """A window, and what is asked for on top of the output: "" for nothing, or one of EXTRAS."""

    window: AttentionCase
    extra: str

    def __str__(self) -> str:
        return f"{self.window}{', ' * bool(self.extra)}{self.extra}"


CASES = [TuneCase(window, extra) for window, extra in product((CORE_CASES[0], CORE_CASES[1]), ("", "rebase", "mass"))]
SMALL_WINDOW = AttentionCase(heads=1, q_len=20, chunk=20, sink=0, retrieved=1, recent=0, dtype=torch.float32)
SMALL_CASES = [TuneCase(SMALL_WINDOW, extra) for extra in ("", "rebase")]


def shipped(case: TuneCase, device: torch.device) -> AttentionConfig:
    """What the launcher takes by itself."""
    capability = kernel.device_capability(device)
    return kernel.attention_config(
        capability, case.window.dtype, case.window.head_dim, case.extra == "rebase", case.extra == "mass"
    )


def named(config: AttentionConfig) -> str:
    loads = ", descriptors" * config.descriptors
    return f"{config.block_q} x {config.block_k}, {config.num_warps} warps, {config.num_stages} stages{loads}"


def launched_with(variant: Variant, name: str, module: ModuleType, **functions: Callable[..., Any]) -> Variant:
    """The variant, while `module`, which chooses how to launch it, has other `functions`."""

    def make() -> Run:
        inner = variant.make()

        def run(i: int) -> Any:
            own = {function: getattr(module, function) for function in functions}
            vars(module).update(functions)
            try:
                return inner(i)
            finally:
                vars(module).update(own)

        run(0)  # a configuration that cannot be launched is told here
        return run

    return replace(variant, name=name, make=make, rival=True, base=None)


def configured(variant: Variant, config: AttentionConfig, name: str) -> Variant:
    """The variant in Triton, launched with `config` in place of what the launcher would take."""
    return launched_with(variant, name, kernel, attention_config=lambda *args: config)


def in_cuda(inputs: Inputs, extra: str) -> list[Variant]:
    """The kernel in CUDA by the rows of its tiles, where it runs: whether 128 or 176 are the faster ones."""
    backend = SEGMENT_ATTENTION.backends["cuda"]
    if backend.unavailable(inputs.q.device) or inputs.q.dtype == torch.float32:
        return []
    variant = our_variant(inputs, "cuda", extra)
    return [
        launched_with(variant, f"cuda, {rows} keys", cuda, attention_tile_rows=lambda *args, rows=rows: rows)
        for rows in (128, 176)
    ]


def prepare(case: TuneCase, device: torch.device, candidates: Sequence[AttentionConfig]) -> Problem:
    """The shipped configuration, then the others as its rivals: x rival is then what the best of them would gain."""
    inputs = Inputs(case.window, device)
    variant = our_variant(inputs, "triton", case.extra)
    own = shipped(case, device)
    variants = [replace(configured(variant, own, f"{named(own)} (shipped)"), rival=False)]
    whole = {"attention_config": lambda *args: own, "deal": lambda num_items, *args: kernel.Deal(num_items, 0, 1)}
    variants.append(launched_with(variant, f"{named(own)}, uncut", kernel, **whole))
    variants += [configured(variant, config, named(config)) for config in candidates if config != own]
    variants += in_cuda(inputs, case.extra)
    shape = {"heads": case.window.heads, "queries": case.window.q_len, "tokens": case.window.num_tokens}
    return Problem(str(case), variants, flush=True, shape={**shape, "extra": case.extra or "none"})


def compile_all(device: torch.device, workers: int) -> None:
    """Compile the cases' kernels into Triton's cache in processes of their own; what fails is told when it is run."""
    command = [sys.executable, __file__, "--device", str(device), "--compile"]
    running = [subprocess.Popen([*command, f"{n}/{workers}"], stderr=subprocess.DEVNULL) for n in range(workers)]
    for process in running:
        process.wait()


def compile_share(device: torch.device, share: str) -> None:
    """Launch once, on a window of a few rows, every `workers`-th of what there is to compile."""
    number, workers = (int(part) for part in share.split("/"))
    kinds = list(product({case.extra: case for case in CASES}.values(), CANDIDATES))
    for case, config in kinds[number::workers]:
        small = replace(case, window=replace(case.window, heads=1, q_len=128, chunk=128, retrieved=1))
        variant = configured(our_variant(Inputs(small.window, device), "triton", case.extra), config, "")
        try:
            variant.make()
        except Exception as error:  # such as too much shared memory; `measure` reports it
            print(f"{named(config)}: {error}", file=sys.stderr)


def run(
    *, small: bool = False, device: torch.device, seconds: float = 1.0, jsonl_path: str | None = None
) -> list[dict[str, Any]]:
    """Measure all candidates on all cases; figures as `common.run_cases` returns them."""
    candidates, cases = (SMALL_CANDIDATES, SMALL_CASES) if small else (CANDIDATES, CASES)
    if device.type == "cuda":
        compile_all(device, os.cpu_count() or 1)

    def make(case: TuneCase, device: torch.device) -> Problem:
        return prepare(case, device, candidates)

    return run_cases("tune_segment_attention", cases, make, device, small=small, seconds=seconds, jsonl_path=jsonl_path)


def winners(figures: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each case: the fastest candidate, and what it gains on the shipped one."""
    lines = []
    for case in dict.fromkeys(f["case"] for f in figures):
        timed = [f for f in figures if f["case"] == case and f["status"] == "timed"]
        own = next((f for f in timed if not f["is_rival"]), None)
        best = min(timed, key=lambda f: f["us"], default=None)
        if best is None or own is None:
            lines.append(f"{case}: the shipped configuration was not timed")
        elif best is own or best["us_80"] >= own["us_20"]:
            lines.append(f"{case}: {own['variant']} is the fastest, or none is faster beyond the spread")
        else:
            lines.append(f"{case}: {best['variant']} takes {100 * (1 - best['us'] / own['us']):.1f} % less")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 when the shipped configuration is wrong or failed, 2 on bad arguments."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="timing per case, after warm-up")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        device = device_for(args.device, small=args.small)
        check_seconds(args.seconds)
        writable("--jsonl", args.jsonl)
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("on a CPU, set TRITON_INTERPRET=1: the kernel runs in Triton's interpreter")
    except ValueError as error:
        print(f"tune_segment_attention: {error}", file=sys.stderr)
        return 2
    if args.compile:
        compile_share(device, args.compile)
        return 0
    figures = run(small=args.small, device=device, seconds=args.seconds, jsonl_path=args.jsonl)
    print(table(figures))
    print("\n".join(winners(figures)))
    return int(any(f["status"] != "timed" for f in figures if not f["is_rival"]))


if __name__ == "__main__":
    sys.exit(main())
