"""worldkv bench: each op beside its rivals, against this machine's own ceilings; or two result files side by side."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from .report import table, writable, write_json

# What each name runs. A bench is a script of benchmarks/ with run(small=, device=, seconds=, json_path=) -> figures.
BENCHES = {
    "attention": ("bench_segment_attention", "attention over a window scattered in its pool"),
    "append": ("bench_norm_rope_append", "norm, RoPE and the write into the pool"),
    "compress": ("bench_compress_chunk", "pruning a chunk"),
    "prefetch": ("bench_prefetch", "retrieved chunks from host memory"),
    "chunk": ("bench_chunk", "one denoising pass of a few layers over a full window"),
    "rollout": ("bench_rollout", "whole chunks of a model with each memory: frames per second, and where time goes"),
}

Figure = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choices = parser.add_subparsers(dest="what", required=True, metavar="BENCH")
    for name, summary in {"all": "all of these", **{n: summary for n, (_, summary) in BENCHES.items()}}.items():
        bench = choices.add_parser(name, help=summary)
        takes = "about two minutes" if name == "all" else "half a minute at most"
        bench.add_argument("--small", action="store_true", help=f"small cases, for a CPU; it takes {takes}")
        bench.add_argument("--json", metavar="FILE", help="append one JSON line per figure, - for stdout")
        bench.add_argument("--plot", metavar="DIR", help="draw latency and share of the ceiling; needs matplotlib")
        bench.add_argument("--device", help="such as cuda:0 or cpu (default: the GPU where there is one)")
        bench.add_argument("--seconds", type=float, default=1.0, help="timing per case, after warm-up (default: 1)")
        bench.add_argument("--trace", metavar="FILE", help="write a trace that Perfetto opens: one more call of each")
        if name == "attention":
            bench.add_argument("--core", action="store_true", help="of the full cases only those that matter most")
        if name == "rollout":
            bench.add_argument("--model", help="one of the models alone")
            bench.add_argument("--layers", type=int, help="of the model (default: all of them; 2 with --small)")
            bench.add_argument("--chunks", type=int, help="made in each mode")
            bench.add_argument("--modes", metavar="A,B", help="of the memory, such as worldkv,published (default: all)")
    compare = choices.add_parser("compare", help="two files of --json side by side")
    compare.add_argument("a", metavar="A", help="a file that --json wrote")
    compare.add_argument("b", metavar="B", help="another; ratios are B over A")
    compare.add_argument("--json", metavar="FILE", help="the comparison, - for stdout")
    compare.add_argument("--any", action="store_true", help="even if they come from different devices")


def run(args: argparse.Namespace) -> int:
    """Exit status 1 when a variant of ours is wrong or failed."""
    if args.what == "compare":
        return _compare(args)
    if not (math.isfinite(args.seconds) and args.seconds > 0):
        raise ValueError(f"--seconds must be above 0, got {args.seconds}")
    common = script("common")
    device = common.device_for(args.device, small=args.small)
    writable("--trace", args.trace)
    plots = None
    if args.plot is not None:
        plots = script("plots")
        plots.check()
        Path(args.plot).mkdir(parents=True, exist_ok=True)
    to_stdout = args.json == "-"
    path = None if to_stdout else args.json
    if args.trace is not None:  # written anew, a case at a time
        Path(args.trace).write_text('{"traceEvents": []}')
    names = list(BENCHES) if args.what == "all" else [args.what]
    options = {"core": args.core} if args.what == "attention" else {}
    if args.what == "rollout":
        asked = {name: getattr(args, name) for name in ("small", "model", "layers", "chunks", "modes")}
        options["cases"] = script(BENCHES["rollout"][0]).cases_from(**asked)
    figures: list[Figure] = []
    for number, name in enumerate(names, 1):
        print(f"bench {number}/{len(names)}: {name}", file=sys.stderr, flush=True)
        bench = script(BENCHES[name][0])
        with common.tracing(args.trace):
            measured = bench.run(small=args.small, device=device, seconds=args.seconds, json_path=path, **options)
        if to_stdout:
            print("\n".join(json.dumps(figure, allow_nan=False) for figure in measured), flush=True)
        shown = getattr(bench, "table", common.table)(measured)
        print(f"{name}\n{shown}\n", file=sys.stderr if to_stdout else sys.stdout, flush=True)
        figures += measured
    if plots is not None:
        for written in plots.draw(figures, args.plot):
            print(f"wrote {written}", file=sys.stderr)
    if args.trace is not None:
        print(f"wrote {args.trace}", file=sys.stderr)
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


def _compare(args: argparse.Namespace) -> int:
    """Print what both files have timed, and the lines that have no partner; and all of it as JSON, if asked for."""
    out = sys.stderr if args.json == "-" else sys.stdout
    a, b = _read(args.a), _read(args.b)
    devices = sorted({f["environment"]["device"] for f in (*a.values(), *b.values())})
    if len(devices) > 1 and not args.any:
        raise ValueError(f"the figures come from different devices: {', '.join(devices)}; --any compares them")
    columns = ["bench", "case", "variant", "us A", "us B", "B/A", "beyond 20/80"]
    rows, alone, untimed = [], [], 0
    result: dict[str, Any] = {"command": "bench compare", "devices": devices, "timed_in_both": [], "timed_in_one": []}
    for key in dict.fromkeys([*a, *b]):
        first, second = a.get(key), b.get(key)
        in_a, in_b = (f is not None and f["status"] == "timed" for f in (first, second))
        if in_a and in_b:
            ratio = second["us"] / first["us"]
            mark = _mark(first, second)
            rows.append([*key, f"{first['us']:.1f}", f"{second['us']:.1f}", f"{ratio:.2f}", mark])
            times = {"us_a": first["us"], "us_b": second["us"], "b_over_a": ratio, "beyond_20_80": mark or None}
            result["timed_in_both"].append({**_named(key), **times})
        elif in_a or in_b:
            file, why = "A" if in_a else "B", _why(second if in_a else first)
            alone.append(f"timed in {file} only: {', '.join(key)}: {why}")
            result["timed_in_one"].append({**_named(key), "in": file.lower(), "why": why})
        else:
            untimed += 1
    for name, path, figures in (("A", args.a, a), ("B", args.b, b)):
        commits = sorted({str(f["environment"].get("commit"))[:12] for f in figures.values()})
        print(f"{name}: {path}, commit {', '.join(commits)}", file=out)
        result[name.lower()] = {"path": path, "commits": commits}
    print(f"{', '.join(devices)}\n", file=out)
    print(table(columns, rows, left=3) if rows else "no figure was timed in both files", file=out)
    print("\n".join(["", *alone, f"timed in neither: {untimed}"] if alone or untimed else []), file=out)
    write_json(args.json, {**result, "timed_in_neither": untimed})
    return 0


def _named(key: tuple[str, str, str]) -> dict[str, str]:
    return dict(zip(("bench", "case", "variant"), key, strict=True))


def _mark(a: Figure, b: Figure) -> str:
    """What B is where the ranges from 20th to 80th percentile do not meet."""
    if b["us_20"] > a["us_80"]:
        return "slower"
    return "faster" if b["us_80"] < a["us_20"] else ""


def _why(figure: Figure | None) -> str:
    return "no such line in the other" if figure is None else f"{figure['status']} in the other: {figure['reason']}"


def _read(path: str) -> dict[tuple[str, str, str], Figure]:
    """Figures by bench, case and variant; of equal ones the last. Raises ValueError that names the line at fault."""
    figures = {}
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            figure = json.loads(line)
            if figure["bench"] == "ceilings":
                continue
            key = (figure["bench"], figure["case"], figure["variant"])
            times = [figure[name] for name in ("us_20", "us", "us_80")]
            figure["reason"], figure["environment"]["device"]
            if figure["status"] == "timed" and not all(isinstance(t, float | int) and t > 0 for t in times):
                raise ValueError("times")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}, line {number}: not a figure that --json wrote") from None
        figures[key] = figure
    if not figures:
        raise ValueError(f"{path} holds no figures")
    return figures
