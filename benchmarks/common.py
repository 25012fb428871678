"""What the benchmarks share: timing, ceilings, the machine's record, checks before figures, JSON lines and tables.

Run alone it measures the machine's ceilings, or prints the table of a results file:

    python benchmarks/common.py [--small] [--json FILE] [--device DEVICE]
    python benchmarks/common.py [--short] --table FILE
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from traces import recorded

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("case", "variant", "us", "GB/s", "TFLOP/s", "share", "x rival")

# Relative error in the 2-norm above which a variant is reported and not timed.
ERROR_LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}

Run = Callable[[int], object]

_trace_to: str | Path | None = None  # set by `tracing`


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


def time_variants(
    runs: dict[str, Run], device: torch.device, *, sets: int = 1, flush: bool = False, seconds: float = 1.0
) -> dict[str, Timing]:
    """Time several ways of doing the same thing in one loop, so that a drift of the clocks meets all of them.

    `runs[name](i)` works on input set i. One sample is a walk over all sets, divided by their number. Each round
    takes one sample of every variant; the variant that goes first changes from round to round. `flush` reads a
    buffer of four times the L2 cache before each sample, so that inputs come from memory. On a GPU samples lie
    between two events, and the device waits before the first until the host has queued the work, so that launches
    hide as in a busy stream; on a CPU they are wall-clock. About `seconds` in all after warm-up, 5 to 200 rounds.
    """
    names = list(runs)
    on_gpu = device.type == "cuda"
    cold = None
    if flush and on_gpu:
        cold = torch.zeros(l2_bytes(device), dtype=torch.float32, device=device)  # 4 bytes each: four times the cache
    sink = torch.zeros((), dtype=torch.float32, device=device)

    def walk(name: str) -> None:
        for i in range(sets):
            runs[name](i)

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
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    matmul = time_variants({"mm": lambda i: torch.mm(a, b, out=product)}, device, seconds=seconds)["mm"].median
    link = None
    if host_to_device and device.type == "cuda":
        size = 1 << 20 if small else 1 << 30
        on_host = torch.empty(size, dtype=torch.uint8, pin_memory=True).fill_(7)
        on_device = torch.empty(size, dtype=torch.uint8, device=device)
        runs = {"h2d": lambda i: on_device.copy_(on_host, non_blocking=True)}
        link = size / time_variants(runs, device, seconds=seconds)["h2d"].median
    return Ceilings(2 * copied / copy, 2 * side**3 / matmul, link)


def _copy_seconds(size: int, device: torch.device, seconds: float) -> float:
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return time_variants({"copy": lambda i: target.copy_(source)}, device, seconds=seconds)["copy"].median


def roof(num_bytes: int, flops: int, ceilings: Ceilings) -> tuple[str, float]:
    """Which ceiling binds, "copy" or "matmul", and the seconds below which the work cannot be done."""
    by_copy, by_matmul = num_bytes / ceilings.copy, flops / ceilings.matmul
    return ("copy", by_copy) if by_copy >= by_matmul else ("matmul", by_matmul)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, cwd=ROOT)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def in_checkout() -> bool:
    """Whether this file lies in the repository, and not in an installed package, where ROOT is the package."""
    return (ROOT / "worldkv_kernels").is_dir()


def source_hash() -> str:
    """Twelve hex digits over the files that a figure depends on; names the code where there is no git."""
    digest = hashlib.sha256()
    folders = ("benchmarks", "csrc", "kernels", "worldkv_kernels") if in_checkout() else (".",)
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".py", ".cu", ".cuh", ".h", ".hpp", ".cpp"} and path.is_file():
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def clocks(device: torch.device) -> dict[str, Any] | None:
    """SM and memory clock in MHz, power in W and temperature, as nvidia-smi reads them; None without it."""
    if device.type != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = ["-i", f"GPU-{uuid}"] if uuid else []
    query = "clocks.sm,clocks.mem,power.draw,temperature.gpu,driver_version"
    line = _output("nvidia-smi", *which, f"--query-gpu={query}", "--format=csv,noheader,nounits")
    if not line:
        return None
    *numbers, driver = (value.strip() for value in line.splitlines()[0].split(","))
    read: dict[str, Any] = {"driver": driver}
    for name, number in zip(("sm_mhz", "memory_mhz", "power_w", "temperature_c"), numbers, strict=True):
        try:
            read[name] = float(number)
        except ValueError:  # "[N/A]" where the card does not tell
            read[name] = None
    return read


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to place a figure. `commit` and `dirty` come from git, or from WORLDKV_COMMIT where this is
    no checkout of the repository (dirty is then null); `source` is `source_hash`."""
    try:
        triton_version = importlib.import_module("triton").__version__
    except ImportError:
        triton_version = None
    # An installed package may lie inside a repository of someone else's.
    commit = _output("git", "rev-parse", "HEAD") if in_checkout() else None
    changed = _output("git", "status", "--porcelain", "--untracked-files=no") if commit else None
    on_gpu = device.type == "cuda"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or os.environ.get("WORLDKV_COMMIT"),
        "dirty": None if changed is None else bool(changed),
        "source": source_hash(),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"cpu ({platform.machine()})",
        "driver": (clocks(device) or {}).get("driver"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class Variant:
    """One way of doing a case's work.

    `make()` builds what is needed and returns `run(i)`, which does the work on input set i; `check(run)` runs it
    on set 0 and returns the relative error. What they raise skips a rival, and fails a variant of ours. `num_bytes`
    and `flops` count what the result needs, not what an implementation moves. `base` names the variant that this
    one's time is compared with as `over_base`.
    """

    name: str
    make: Callable[[], Run]
    check: Callable[[Run], float]
    limit: float
    num_bytes: int
    flops: int = 0
    rival: bool = False
    base: str | None = None


@dataclass(frozen=True)
class Problem:
    """A case made ready: its name, its variants, and how to time them. `shape` is for plots: `tokens`, the length that
    cases differ in, and what else distinguishes them, such as `heads`."""

    case: str
    variants: list[Variant]
    sets: int = 1
    flush: bool = False
    shape: dict[str, int] = field(default_factory=dict)


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
            bytes=variant.num_bytes, flops=variant.flops, gb_s=None, tflop_s=None,
            ceiling=None, share=None, rival=None, times_rival=None, base=variant.base, over_base=None,
        )  # fmt: skip
        figures.append(figure)
        try:
            run = variant.make()
            error = variant.check(run)
            synchronize(device)
        except Exception as raised:  # a rival that cannot run, or a kernel that fails, must not end the bench
            figure.update(status="skipped" if variant.rival else "failed", reason=_first_line(raised))
            continue
        figure["error"] = error if math.isfinite(error) else None
        if not error <= variant.limit:  # NaN is wrong
            figure.update(status="wrong", reason=f"relative error {error:.2e}, limit {variant.limit:.0e}")
            continue
        runs[variant.name] = run
    timings = time_variants(runs, device, sets=problem.sets, flush=problem.flush, seconds=seconds) if runs else {}
    if _trace_to is not None:
        for name, run in runs.items():
            with recorded(f"{problem.case}: {name}", device, keep=_trace_to):
                run(0)
    strictest = min((v.limit for v in problem.variants), default=0.0)
    rivals = [v.name for v in problem.variants if v.rival and v.name in timings and v.limit <= strictest]
    best = min(rivals, key=lambda name: timings[name].median, default=None)
    for figure in figures:
        timing = timings.get(figure["variant"])
        if timing is None:
            continue
        ceiling, floor = roof(figure["bytes"], figure["flops"], ceilings)
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


def ours(op: str, device: torch.device) -> list[str]:
    """The op's backends that can run here: the kernels on a GPU, the reference on a CPU."""
    # The package's attribute of the same name is the function, hence not getattr.
    known = importlib.import_module(f"worldkv_kernels.ops.{op}").BACKENDS.backends
    if device.type == "cpu":
        return ["reference"]
    return [name for name, backend in known.items() if name != "reference" and backend.unavailable(device) is None]


def append_json_line(path: str | Path | None, record: dict[str, Any]) -> None:
    """Append one line of strict JSON; nothing for None."""
    if path is None:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]


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


def describe_ceilings(ceilings: Ceilings) -> str:
    link = "" if ceilings.host_to_device is None else f", host to device {ceilings.host_to_device / 1e9:.1f} GB/s"
    return f"ceilings: copy {ceilings.copy / 1e9:.0f} GB/s, matmul {ceilings.matmul / 1e12:.1f} TFLOP/s{link}"


def parse_device(name: str | None) -> torch.device:
    """The named device with its index, or the first GPU, or the CPU. Raises ValueError when it is not there."""
    try:
        return torch.empty(0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device must be a device of this machine, got {name!r}: {_first_line(error)}") from error


def device_for(name: str | None, *, small: bool) -> torch.device:
    """`parse_device`; raises ValueError where the full cases are asked of a CPU, too."""
    device = parse_device(name)
    if device.type == "cpu" and not small:
        raise ValueError("the full cases need a GPU; --small runs on a CPU")
    return device


def _measure_case(
    case: Any, prepare: Callable[[Any, torch.device], Problem], device: torch.device, ceilings: Ceilings, seconds: float
) -> list[dict[str, Any]]:
    try:
        problem = prepare(case, device)
    except Exception as raised:  # such as no memory left: the next case may fit
        reason = _first_line(raised)

        def refuse() -> Run:
            raise RuntimeError(f"the case could not be made ready: {reason}")

        problem = Problem(str(case), [Variant("all", refuse, lambda run: math.nan, 0.0, 0)])
    return measure(problem, device, ceilings, seconds=seconds)


@contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread: small work on shared cores waits for its threads, not for its arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_cases(
    bench: str,
    cases: Sequence[Any],
    prepare: Callable[[Any, torch.device], Problem],
    device: torch.device,
    *,
    small: bool = False,
    seconds: float = 1.0,
    json_path: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Measure every case and return the figures; each is a JSON line in `json_path` as soon as its case is done.

    A case that cannot even be made ready (no memory) is one figure with status "failed". Prints progress on stderr.
    """
    torch.set_float32_matmul_precision("highest")  # the references must not be rounded to tf32
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with one_thread():
        ceilings = measure_ceilings(device, small=small)
    record = environment(device)
    figures = []
    for number, case in enumerate(cases, 1):
        start = time.perf_counter()
        before = clocks(device)
        with one_thread():
            measured = _measure_case(case, prepare, device, ceilings, seconds)
        after = clocks(device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        for figure in measured:
            line = {"bench": bench, **figure, "ceilings": asdict(ceilings)}
            line["environment"] = {**record, "clocks_before": before, "clocks_after": after}
            append_json_line(json_path, line)
            figures.append(line)
        took = f"{time.perf_counter() - start:.1f} s"
        print(f"{bench} {number}/{len(cases)}: {measured[0]['case']}: {took}", file=sys.stderr, flush=True)
    print(describe_ceilings(ceilings), file=sys.stderr, flush=True)
    return figures


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--small", action="store_true", help="small cases, which a CPU finishes in seconds")
    parser.add_argument("--json", metavar="FILE", help="append one JSON line per figure")
    parser.add_argument("--device", help="such as cuda:0 or cpu; the first GPU by default")
    return parser


def bench_main(
    bench: str,
    description: str,
    run: Callable[..., list[dict[str, Any]]],
    argv: Sequence[str] | None,
) -> int:
    """Parse, run, print the table. Exit status 1 when a variant of ours is wrong or failed, 2 on bad arguments."""
    parser = arguments(description)
    parser.add_argument("--seconds", type=float, default=1.0, help="timing per case, after warm-up")
    args = parser.parse_args(argv)
    try:
        device = device_for(args.device, small=args.small)
    except ValueError as error:
        print(f"{bench}: {error}", file=sys.stderr)
        return 2
    figures = run(small=args.small, device=device, seconds=args.seconds, json_path=args.json)
    print(table(figures))
    return int(any(f["status"] != "timed" for f in figures if not f["is_rival"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the ceilings, or print the table of a results file."""
    parser = arguments("The machine's ceilings, or the table of a results file.")
    parser.add_argument("--table", metavar="FILE", help="print the figures of a JSON-lines file and measure nothing")
    parser.add_argument("--short", action="store_true", help="in the table, of the rivals only the fastest")
    args = parser.parse_args(argv)
    if args.table:
        lines = read_json_lines(args.table)
        print(table((line for line in lines if line["bench"] != "ceilings"), short=args.short))
        return 0
    try:
        device = parse_device(args.device)
    except ValueError as error:
        print(f"common: {error}", file=sys.stderr)
        return 2
    before = clocks(device)
    with one_thread():
        ceilings = measure_ceilings(device, small=args.small, host_to_device=True)
    record = {**environment(device), "clocks_before": before, "clocks_after": clocks(device)}
    append_json_line(args.json, {"bench": "ceilings", "ceilings": asdict(ceilings), "environment": record})
    print("\n".join(f"{key}: {value}" for key, value in record.items()))
    print(describe_ceilings(ceilings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
