"""worldkv bench: each op beside its rivals, against this machine's own ceilings; or two result files side by side."""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.util
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .bench_compare import compare
from .report import add_quiet, different_files, note, writable, write_json

# Each is a script of benchmarks/, bench_<name>, with CASES, SMALL_CASES, variants_of(case, device) -> {name: whether a
# rival}, and run(small=, device=, seconds=, jsonl_path=, cases=, only=) -> figures.
BENCHES = {
    "segment_attention": "attention over a window scattered in its pool",
    "norm_rope_append": "norm, RoPE and the write into the pool",
    "compress_chunk": "pruning a chunk",
    "quantize_chunk": "a chunk in 8 or 4 bits, and back",
    "participation": "what each key of a window received",
    "prefetch": "retrieved chunks from host memory",
    "chunk": "one denoising pass of a few layers over a full window",
    "rollout": "whole chunks of a model with each memory: frames per second, and where time goes",
}
SHAPES = {
    "segment_attention": "heads=24,kv_heads=8,q=3600,head_dim=64,window=3600x1+1800x6,dtype=float16",
    "norm_rope_append": "heads=24,head_dim=64,grid=3x30x52,dtype=float16",
    "compress_chunk": "frames=3,frame_tokens=1560,heads=24,head_dim=64,keep_ratio=0.25,layers=30,dtype=float16",
    "quantize_chunk": "tokens=1800,heads=24,head_dim=64,bits=4,op=dequantize,layers=30,dtype=float16",
    "participation": "heads=24,kv_heads=8,q=3600,head_dim=64,window=3600x1+1800x6,dtype=float16",
}
CSV_COLUMNS = (
    "bench", "case", "variant", "is_rival", "status", "reason", "error", "us", "us_20", "us_80", "host_us", "rounds",
    "bytes", "flops", "gb_s", "tflop_s", "ceiling", "share", "rival", "times_rival", "base", "over_base",
    "frames_per_second", "device", "commit",
)  # fmt: skip

Figure = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choices = parser.add_subparsers(dest="what", required=True, metavar="BENCH")
    for name, summary in {"all": "all of these", **BENCHES}.items():
        bench = choices.add_parser(name, help=summary)
        takes = "about a minute" if name == "all" else "half a minute at most"
        bench.add_argument("--small", action="store_true", help=f"small cases, for a CPU; it takes {takes}")
        bench.add_argument("--case", metavar="REGEX", help="of the cases those whose name, as printed, it is found in")
        bench.add_argument("--only", metavar="A,B", help="of the variants those so named, as printed, or by the first "
                           'words of several, such as sdpa; "ours" are all that are no rivals')  # fmt: skip
        bench.add_argument("--json", metavar="PATH", help="all figures as one JSON document, - for stdout")
        bench.add_argument("--jsonl", metavar="FILE", help="append a JSON line per figure as soon as its case is done")
        bench.add_argument("--csv", metavar="FILE", help="the figures as a table of comma-separated values")
        bench.add_argument("--plot", metavar="DIR", help="draw latency and share of the ceiling; needs matplotlib")
        bench.add_argument("--device", help="such as cuda:0 or cpu (default: the GPU where there is one)")
        bench.add_argument("--seconds", type=float, default=1.0, help="timing per case, after warm-up (default: 1)")
        bench.add_argument("--trace", metavar="FILE", help="write a trace that Perfetto opens: one more call of each")
        add_quiet(bench)
        if name in SHAPES:
            bench.add_argument("--shape", metavar="KEY=VALUE,...", action="append", default=[],
                               help=f"a case of one's own in place of the others, such as {SHAPES[name]}; may be given "
                               "again")  # fmt: skip
        else:  # refused with the names of those that take it
            bench.add_argument("--shape", action="append", help=argparse.SUPPRESS)
        if name == "segment_attention":
            bench.add_argument("--core", action="store_true", help="of the full cases only those that matter most")
            bench.add_argument("--rival", metavar="MODULE:FUNCTION", action="append", default=[],
                               help="a rival of one's own, see benchmarks/README.md; may be given again")  # fmt: skip
        if name == "rollout":
            bench.add_argument("--model", help="one of the models alone")
            bench.add_argument("--variant", help="of the model, such as v2-1.3b")
            bench.add_argument("--layers", type=int, help="of the model (default: all of them; 2 with --small)")
            bench.add_argument("--chunks", type=int, help="made in each mode")
    compared = choices.add_parser("compare", help="two files of --json or --jsonl side by side")
    compared.add_argument("a", metavar="A", help="a file that --json or --jsonl wrote")
    compared.add_argument("b", metavar="B", help="another; ratios are B over A")
    compared.add_argument("--json", metavar="PATH", help="the comparison as one JSON document, - for stdout")
    compared.add_argument("--any", action="store_true", help="even if they come from different devices")


def run(args: argparse.Namespace) -> int:
    """Exit status 1 when a variant of ours is wrong or failed."""
    if args.what == "compare":
        return compare(args)
    if args.shape and args.what not in SHAPES:
        raise ValueError(f"--shape must go with one of {', '.join(SHAPES)}, got bench {args.what}")
    common = script("common")
    common.check_seconds(args.seconds)
    device = common.device_for(args.device, small=args.small or bool(args.shape))
    planned = _planned(args, device)
    _check_files(args)
    plots = None
    if args.plot is not None:
        plots = script("plots")
        plots.check()
        _make_folder(args.plot)
    if args.trace is not None:  # written anew, a case at a time
        Path(args.trace).write_text('{"traceEvents": []}')
    out = sys.stderr if args.json == "-" else sys.stdout
    figures: list[Figure] = []
    for number, (name, bench, options) in enumerate(planned, 1):
        note(f"bench {number}/{len(planned)}: {name}")
        with common.tracing(args.trace):
            measured = bench.run(
                small=args.small, device=device, seconds=args.seconds, jsonl_path=args.jsonl, **options
            )
        shown = getattr(bench, "table", common.table)(measured)
        if device.type == "cpu":
            shown += "\ntimed on a CPU: these times say nothing of a GPU"
        print(f"{name}\n{shown}\n", file=out, flush=True)
        figures += measured
    _write(args, figures)
    if plots is not None:
        for written in plots.draw(figures, args.plot):
            note(f"wrote {written}")
    return int(any(f["status"] != "timed" for f in figures if not f["is_rival"]))


def script(name: str) -> ModuleType:
    """A script of benchmarks/ as it runs by itself: the scripts import each other by their bare names.

    Raises ImportError where the benchmarks are not installed, or where another module has that name.
    """
    package = importlib.util.find_spec("worldkv_kernels.benchmarks")
    if package is None or package.origin is None:
        raise ImportError("the benchmarks are not installed; install worldkv_kernels again")
    folder = Path(package.origin).parent
    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
    if Path(module.__file__ or "").resolve().parent != folder.resolve():
        raise ImportError(f"the benchmarks need the module name {name!r}, which {module.__file__} has taken")
    return module


def _planned(args: argparse.Namespace, device: torch.device) -> list[tuple[str, ModuleType, dict[str, Any]]]:
    """Of each bench that has anything to do, its name, its script and the options of its run.

    Raises ValueError that lists what there is when --case or a name of --only fits nothing.
    """
    picked = script("common").picked
    only = None
    if args.only is not None:  # a rival of one's own was asked for by name
        only = [*(word.strip() for word in args.only.split(",")), *(getattr(args, "rival", None) or ())]
    try:
        pattern = re.compile(args.case or "")
    except re.error as error:
        raise ValueError(f"--case must be a regular expression, got {args.case!r}: {error}") from error
    planned, cases_seen = [], []
    variants_seen: dict[str, bool] = {}
    for name in BENCHES if args.what == "all" else [args.what]:
        bench = script(f"bench_{name}")
        options = _options(args, name, bench, device)
        own = {"own": options["own"]} if "own" in options else {}
        cases = options.pop("cases")
        cases_seen += cases
        cases = [case for case in cases if pattern.search(str(case))]
        variants = [bench.variants_of(case, device, **own) for case in cases]
        for of_case in variants:
            variants_seen |= of_case
        cases = [case for case, of_case in zip(cases, variants, strict=True) if picked(of_case, only)]
        if cases:
            planned.append((name, bench, {**options, "cases": cases, "only": only}))
    if args.case is not None and not variants_seen:
        raise ValueError(f"--case must be found in one of: {_some(cases_seen)}; got {args.case!r}")
    for word in only or ():
        if not picked(variants_seen, [word]):
            raise ValueError(f"--only must be of ours, {', '.join(variants_seen)}; got {word!r}")
    return planned


def _options(args: argparse.Namespace, name: str, bench: ModuleType, device: torch.device) -> dict[str, Any]:
    """What is asked of one bench alone, its cases among it."""
    cases = bench.SMALL_CASES if args.small else bench.CASES
    options: dict[str, Any] = {}
    if getattr(args, "core", False) and not args.small:
        cases = bench.CORE_CASES
    if args.shape:
        if args.small or getattr(args, "core", False):
            raise ValueError("--shape must go without --small and --core, whose cases it takes the place of")
        cases = list(dict.fromkeys(bench.case_of(shape) for shape in args.shape))
        for case in cases:
            script("shapes").check_room(f"--shape {case}", case.needed_bytes, device)
    if getattr(args, "rival", None):
        options["own"] = {text: script("attention_rivals").own_rival(text) for text in args.rival}
    if args.what == "rollout":
        asked = {key: getattr(args, key) for key in ("small", "model", "variant", "layers", "chunks")}
        cases = bench.cases_from(device, **asked)
    return {**options, "cases": cases}


def _some(cases: Sequence[Any]) -> str:
    names = [f'"{case}"' for case in cases[:8]]
    return ", ".join(names) + f" and {len(cases) - 8} more" * (len(cases) > 8)


def _check_files(args: argparse.Namespace) -> None:
    """Raises ValueError where a file cannot be written, or two arguments name the same."""
    paths = {argument: getattr(args, argument) for argument in ("json", "jsonl", "csv", "trace")}
    for argument, path in paths.items():
        if path is None or (argument == "json" and path == "-"):
            continue
        if path == "-":
            raise ValueError(f"--{argument} must be a file, got '-', which --json alone writes to")
        writable(f"--{argument}", path)
    different_files(**paths)


def _make_folder(path: str) -> None:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(f"--plot must be a folder that can be written, got {path!r}: {error.strerror}") from error


def _write(args: argparse.Namespace, figures: Sequence[Figure]) -> None:
    """The files that are written whole."""
    if args.csv is not None:
        with open(args.csv, "w", newline="") as file:
            rows = csv.DictWriter(file, CSV_COLUMNS, extrasaction="ignore")
            rows.writeheader()
            rows.writerows({**figure, **figure["environment"]} for figure in figures)
        note(f"wrote {args.csv}")
    if args.trace is not None:
        note(f"wrote {args.trace}")
    write_json(args.json, {"command": f"bench {args.what}", "figures": list(figures)})
