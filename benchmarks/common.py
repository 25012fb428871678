"""What the benchmarks share: cases that are checked and then timed, JSON lines, tables, and the command line.

Run alone it measures the machine's ceilings, or prints the table of a results file:

    python benchmarks/common.py [--small] [--jsonl FILE] [--device DEVICE]
    python benchmarks/common.py [--short] --table FILE
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from machine import clocks, environment
from timing import (
    Ceilings,
    Run,
    Timing,
    VariantError,
    describe_ceilings,
    measure_ceilings,
    one_thread,
    roof,
    synchronize,
    time_variants,
)
from traces import recorded

from worldkv_kernels.cli import main as command
from worldkv_kernels.cli.bench_compare import UNTIMED, read_figures
from worldkv_kernels.cli.report import note, waiting, writable

COLUMNS = ("case", "variant", "us", "GB/s", "TFLOP/s", "share", "x rival")

# Relative error in the 2-norm above which a variant is reported and not timed.
ERROR_LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}

MOST_SECONDS = 3600.0

_trace_to: str | Path | None = None  # set by `tracing`


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want|| in the 2-norm, in float64; NaN where either holds one, inf on a wrong shape."""
    if got.shape != want.shape:
        return math.inf
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm().clamp_min(1e-300)).item()


def worst(errors: Iterable[float]) -> float:
    """The largest error, where NaN is larger than any."""
    return max(errors, key=lambda error: (math.isnan(error), error))


@dataclass(frozen=True)
class Variant:
    """One way of doing a case's work.

    `make()` builds what is needed and returns `run(i)`, which does the work on input set i; `check(run)` runs it
    on set 0 and returns the relative error. What they raise skips a rival, and fails a variant of ours. `num_bytes`
    and `flops` count what the result needs, not what an implementation moves; `link_bytes` what has to come from
    host memory. `base` names the variant that this one's time is compared with as `over_base`. `yardstick`: whether a
    rival may be the one that `times_rival` is counted against; None for if it may err no more than others.
    """

    name: str
    make: Callable[[], Run]
    check: Callable[[Run], float]
    limit: float
    num_bytes: int
    flops: int = 0
    rival: bool = False
    base: str | None = None
    yardstick: bool | None = None
    link_bytes: int = 0


@dataclass(frozen=True)
class Problem:
    """A case made ready: its name, its variants, and how to time them. `shape` is for plots: `tokens`, the length that
    cases differ in, and what else distinguishes them, such as `heads`. `settle` is `time_variants`'."""

    case: str
    variants: list[Variant]
    sets: int = 1
    flush: bool = False
    shape: dict[str, int | str] = field(default_factory=dict)
    settle: Callable[[], object] | None = None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


def measure(problem: Problem, device: torch.device, ceilings: Ceilings, *, seconds: float) -> list[dict[str, Any]]:
    """Check every variant, time those that are right, and return one figure each, in the variants' order.

    `status` is "timed"; "wrong" (error above the limit, or NaN), "skipped" (a rival that cannot run) and "failed"
    (ours that cannot) carry a `reason` and no time. `rival` is the fastest rival that was timed, without those that are
    allowed a larger error than others, and `times_rival` its time over the variant's: above 1 is faster than the rival.
    """
    figures, runs = [], {}
    for variant in problem.variants:
        figure: dict[str, Any] = {"case": problem.case, "variant": variant.name, "is_rival": variant.rival}
        figure.update(
            shape=problem.shape,
            status="timed", reason=None, error=None, error_limit=variant.limit,
            us=None, us_20=None, us_80=None, host_us=None, rounds=None,
            bytes=variant.num_bytes, link_bytes=variant.link_bytes, flops=variant.flops, gb_s=None, tflop_s=None,
            ceiling=None, share=None, rival=None, times_rival=None, base=variant.base, over_base=None,
        )  # fmt: skip
        figures.append(figure)
        try:
            run = variant.make()
            error = variant.check(run)
            synchronize(device)
        except (Exception, SystemExit) as raised:  # a rival that cannot run, or a kernel that fails, ends no bench
            figure.update(status="skipped" if variant.rival else "failed", reason=_first_line(raised))
            continue
        figure["error"] = error if math.isfinite(error) else None
        if not error <= variant.limit:  # NaN is wrong
            figure.update(status="wrong", reason=f"relative error {error:.2e}, limit {variant.limit:.0e}")
            continue
        runs[variant.name] = run
    options = {"sets": problem.sets, "flush": problem.flush, "settle": problem.settle}
    timings: dict[str, Timing] = {}
    while runs and not timings:
        try:
            timings = time_variants(runs, device, **options, seconds=seconds)
        except VariantError as failed:  # the others are timed without it
            del runs[failed.name]
            (figure,) = (figure for figure in figures if figure["variant"] == failed.name)
            status = "skipped" if figure["is_rival"] else "failed"
            figure.update(status=status, reason=_first_line(failed.__cause__))
    if _trace_to is not None:
        for name, run in runs.items():
            with recorded(f"{problem.case}: {name}", device, keep=_trace_to):
                run(0)
    strictest = min((v.limit for v in problem.variants), default=0.0)
    rivals = [
        v.name
        for v in problem.variants
        if v.rival and v.name in timings and (v.limit <= strictest if v.yardstick is None else v.yardstick)
    ]
    best = min(rivals, key=lambda name: timings[name].median, default=None)
    for figure in figures:
        timing = timings.get(figure["variant"])
        if timing is None:
            continue
        ceiling, floor = roof(figure["bytes"], figure["flops"], ceilings, figure["link_bytes"])
        base = timings.get(figure["base"])
        figure.update(
            us=timing.median * 1e6, us_20=timing.low * 1e6, us_80=timing.high * 1e6, host_us=timing.host * 1e6,
            rounds=timing.rounds, gb_s=figure["bytes"] / timing.median / 1e9,
            tflop_s=figure["flops"] / timing.median / 1e12 if figure["flops"] else None,
            ceiling=ceiling, share=floor / timing.median,
            rival=best, times_rival=timings[best].median / timing.median if best else None,
            over_base=timing.median / base.median - 1 if base else None,
        )  # fmt: skip
    return figures


@contextmanager
def tracing(path: str | Path | None) -> Iterator[None]:
    """While inside, one more call of whatever `measure` has timed is traced, and added to the file."""
    global _trace_to
    before, _trace_to = _trace_to, path
    try:
        yield
    finally:
        _trace_to = before


def trace_file() -> str | Path | None:
    """Where `tracing` wants traces, None where nothing is traced."""
    return _trace_to


def ours(op: str, device: torch.device) -> list[str]:
    """The op's backends that can run here: the kernels on a GPU, and on a CPU what `auto` takes there."""
    # The package's attribute of the same name is the function, hence not getattr.
    table = importlib.import_module(f"worldkv_kernels.ops.{op}").BACKENDS
    known = table.backends
    if device.type == "cpu":
        return [name for name in table.on_cpu if known[name].unavailable(device) is None]
    return [name for name, backend in known.items() if name != "reference" and backend.unavailable(device) is None]


def picked(variants: Mapping[str, bool], wanted: Collection[str] | None) -> list[str]:
    """Of the variants, by name and whether each is a rival, those wanted: by name, by the first words of several, or
    as "ours"; all of them for None."""

    def fits(name: str, rival: bool, word: str) -> bool:
        if word == "ours":
            return not rival
        return name == word if word in variants else name.startswith(word + " ")

    return [n for n, rival in variants.items() if wanted is None or any(fits(n, rival, word) for word in wanted)]


def append_json_line(path: str | Path | None, record: dict[str, Any]) -> None:
    """Append one line of strict JSON; nothing for None."""
    if path is None:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def measured_in(path: str | Path) -> list[dict[str, Any]]:
    """The figures of a file of --jsonl or --json, but for `UNTIMED` lines. Raises ValueError where one is none."""
    figures = read_figures(path)
    for where, figure in figures:
        if not (isinstance(figure, dict) and "bench" in figure):
            raise ValueError(f"{path}, {where}: not a figure that --json or --jsonl wrote")
    return [figure for _, figure in figures if figure["bench"] not in UNTIMED]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table(figures: Iterable[dict[str, Any]], *, short: bool = False) -> str:
    """The figures as text; then why what was not timed was not, and what each variant adds to its base.

    `short` leaves out the rivals that are slower than another one in the same case, and those not timed.
    """
    rows, reasons, added = [list(COLUMNS)], {}, {}
    for f in figures:
        timed = f["status"] == "timed"
        if not timed:
            reasons.setdefault(f"{f['status']}: {f['variant']}: {f['reason']}", []).append(f["case"])
        elif f["over_base"] is not None:
            change = f"{f['variant']} {100 * f['over_base']:+.1f} %"
            added.setdefault(f"{f['case']}: on {f['base']}", []).append(change)
        if short and f["is_rival"] and f["variant"] != f["rival"]:
            continue
        share = "-" if f["share"] is None else f"{100 * f['share']:.0f} % {f['ceiling']}"
        rows.append(
            [
                f["case"],
                f["variant"] + (" (rival)" if f["is_rival"] else ""),
                _number(f["us"], 1) if timed else f["status"],
                _number(f["gb_s"], 0),
                _number(f["tflop_s"], 1),
                share,
                _number(f["times_rival"], 2),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    left = [f"{{:<{width}}}" for width in widths[:2]]
    right = [f"{{:>{width}}}" for width in widths[2:]]
    lines = ["  ".join(left + right).format(*row).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * w for w in widths))
    lines += [f"{what}: {', '.join(changes)}" for what, changes in added.items()]
    lines += [f"{reason} ({len(cases)} x, first: {cases[0]})" for reason, cases in reasons.items()]
    return "\n".join(lines)


def parse_device(name: str | None) -> torch.device:
    """The named device with its index, or the first GPU, or the CPU. Raises ValueError when it is not there, or of
    another kind."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda:N, got {name!r}")
    try:
        return torch.empty(0, dtype=torch.uint8, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device must be a device of this machine, got {name!r}: {_first_line(error)}") from error


def check_seconds(seconds: float) -> None:
    """Raise ValueError on a time that is none, or longer than anyone waits for a case."""
    if not 0 < seconds <= MOST_SECONDS:  # no NaN either
        raise ValueError(f"--seconds must be above 0 and at most {MOST_SECONDS:g}, got {seconds}")


def device_for(name: str | None, *, small: bool) -> torch.device:
    """`parse_device`; raises ValueError where the full cases are asked of a CPU, too."""
    device = parse_device(name)
    if device.type == "cpu" and not small:
        raise ValueError("the full cases need a GPU; --small runs on a CPU")
    return device


def _measure_case(
    case: Any,
    prepare: Callable[[Any, torch.device], Problem],
    device: torch.device,
    ceilings: Ceilings,
    seconds: float,
    only: Collection[str] | None,
) -> list[dict[str, Any]]:
    try:
        problem = prepare(case, device)
        names = picked({v.name: v.rival for v in problem.variants}, only)
        problem = replace(problem, variants=[v for v in problem.variants if v.name in names])
    except Exception as raised:  # such as no memory left: the next case may fit
        reason = _first_line(raised)

        def refuse() -> Run:
            raise RuntimeError(f"the case could not be made ready: {reason}")

        problem = Problem(str(case), [Variant("all", refuse, lambda run: math.nan, 0.0, 0)])
    return measure(problem, device, ceilings, seconds=seconds)


def run_cases(
    bench: str,
    cases: Sequence[Any],
    prepare: Callable[[Any, torch.device], Problem],
    device: torch.device,
    *,
    small: bool = False,
    seconds: float = 1.0,
    jsonl_path: str | Path | None = None,
    only: Collection[str] | None = None,
    host_to_device: bool = False,
) -> list[dict[str, Any]]:
    """Measure every case and return the figures; each is a JSON line in `jsonl_path` as soon as its case is done.
    `only` names variants as `picked` reads them. `host_to_device` measures the link, too.

    A case that cannot even be made ready (no memory) is one figure with status "failed". Prints progress on stderr.
    """
    torch.set_float32_matmul_precision("highest")  # the references must not be rounded to tf32
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with one_thread():
        ceilings = measure_ceilings(device, small=small, host_to_device=host_to_device)
    record = environment(device)
    figures = []
    for number, case in enumerate(cases, 1):
        start = time.perf_counter()
        label = f"{bench} {number}/{len(cases)}: {case}"
        before = clocks(device)
        with one_thread(), waiting(label):
            measured = _measure_case(case, prepare, device, ceilings, seconds, only)
        after = clocks(device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        for figure in measured:
            line = {"bench": bench, **figure, "small": small, "ceilings": asdict(ceilings)}
            line["environment"] = {**record, "clocks_before": before, "clocks_after": after}
            append_json_line(jsonl_path, line)
            figures.append(line)
        note(f"{label}: {time.perf_counter() - start:.1f} s")
    note(describe_ceilings(ceilings))
    return figures


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--small", action="store_true", help="small cases, which a CPU finishes in seconds")
    parser.add_argument("--jsonl", metavar="FILE", help="append one JSON line per figure")
    parser.add_argument("--device", help="such as cuda:0 or cpu; the first GPU by default")
    return parser


def bench_main(bench: str, argv: Sequence[str] | None) -> int:
    """`worldkv bench BENCH` with these arguments, or those of the process."""
    return command(["bench", bench, *(sys.argv[1:] if argv is None else argv)])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the ceilings, or print the table of a results file."""
    parser = arguments("The machine's ceilings, or the table of a results file.")
    parser.add_argument("--table", metavar="FILE", help="print the figures of a file and measure nothing")
    parser.add_argument("--short", action="store_true", help="in the table, of the rivals only the fastest")
    args = parser.parse_args(argv)
    try:
        if args.table:
            print(table(measured_in(args.table), short=args.short))
            return 0
        device = parse_device(args.device)
        writable("--jsonl", args.jsonl)
    except (ValueError, KeyError, OSError) as error:
        print(f"common: {error}", file=sys.stderr)
        return 2
    before = clocks(device)
    with one_thread():
        ceilings = measure_ceilings(device, small=args.small, host_to_device=True)
    record = {**environment(device), "clocks_before": before, "clocks_after": clocks(device)}
    append_json_line(args.jsonl, {"bench": "ceilings", "ceilings": asdict(ceilings), "environment": record})
    print("\n".join(f"{key}: {value}" for key, value in record.items()))
    print(describe_ceilings(ceilings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
