"""worldkv tune: which backend of segment_attention is the fastest on this machine's GPU, for auto to take."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from ..ops import faster, tuned
from ..ops.all import SEGMENT_ATTENTION
from ..ops.segment_attention import Shape
from ..ops.tuned import Measurement
from ..window import TILE_ROWS
from . import brief
from .bench import SHAPES as SHAPE
from .bench import script
from .doctor import SHAPES
from .report import Progress, add_quiet, parse_device, table, write_json

OP = SEGMENT_ATTENTION
EXTRAS = ("", "rebase", "mass", "weights")  # what is asked for on top
SECONDS = 1.0  # of timing a shape with one of them, after warm-up: 36 of these are most of a minute


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="such as cuda:1 (default: the first GPU)")
    parser.add_argument("--shape", metavar="KEY=VALUE,...", action="append", default=[],
                        help="a window of one's own in place of those of the models, such as "
                        f"{SHAPE['segment_attention']}; may be given again")  # fmt: skip
    parser.add_argument(
        "--json", metavar="PATH", help="also write what was measured as one JSON document; - for stdout"
    )
    parser.add_argument("--forget", action="store_true", help="drop what is kept of this card, and measure nothing")
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    """Exit status 1 when a backend is wrong or fails."""
    device = parse_device(args.device)
    if device.type != "cuda":
        takes = ", or where that cannot serve ".join(OP.on_cpu).replace("reference", "the reference")
        raise ValueError(
            f"--device must be a GPU, got {device}: on a CPU auto takes {takes}, whatever the shape, since the other "
            "backends are for GPUs, so there is nothing to choose"
        )
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    card, path = torch.cuda.get_device_name(device), tuned.user_file()
    out = sys.stderr if args.json == "-" else sys.stdout
    if args.forget:
        if args.shape:
            raise ValueError("--forget must go without --shape: it drops all that is kept of the card")
        dropped = tuned.forget(card)
        _choose_anew()
        print(f"{card}: dropped {dropped} measurements from {path}", file=out)
        write_json(args.json, {"command": "tune", "device": card, "file": str(path), "dropped": dropped})
        return 0
    tuned.read()  # a damaged file is told before the work
    cases = _cases(args.shape, device)
    torch.cuda.set_device(device)
    environment = script("machine").environment(device)
    progress, found = Progress("tune", len(cases) * len(EXTRAS)), []
    for case in cases:  # each is kept as soon as it is measured
        found += _measure_case(case, device, environment, progress)
    _choose_anew()
    print(f"{card}, microseconds: median, 20th to 80th percentile\n\n{_table(found)}", file=out)
    for line in dict.fromkeys(f"{name} not timed: {why}" for f in found for name, why in f["left_out"].items()):
        print(line, file=out)
    print(f"\nkept in {path}" if any(f["us"] for f in found) else "\nnowhere were two to choose from", file=out)
    write_json(args.json, {"command": "tune", "file": str(path), "machine": environment, "shapes": found})
    return int(any(f["faults"] for f in found))


def _choose_anew() -> None:
    faster.forget()
    OP.forget()


def _cases(shapes: Sequence[str], device: torch.device) -> list[Any]:
    """Those of --shape, or `windows`. Raises ValueError on a shape that is none, of which there is nothing to choose,
    or that does not fit the GPU."""
    bench = script("bench_segment_attention")
    if not shapes:
        return windows(bench)
    cases = list(dict.fromkeys(map(bench.case_of, shapes)))
    for case in cases:
        if case.dtype == torch.float32:
            raise ValueError(
                "--shape: dtype must be bfloat16 or float16, got float32, which triton alone takes on a GPU"
            )
        script("shapes").check_room(f"--shape {case}", case.needed_bytes, device)
    return cases


def windows(bench: ModuleType) -> list[Any]:
    """A default, a short and a long window of each of doctor's models: chunks that are whole, and halved ones. The
    default ones come first, since a run may be cut short."""
    cases = [
        bench.AttentionCase(heads, q_len, chunk=q_len, sink=1, retrieved=2 * keys // q_len - 8, recent=2)
        for heads, q_len, keys in SHAPES.values()
    ]
    return cases + [
        bench.window_case(frames, q_len // 3, heads, pruned=True)
        for frames in (9, 90)
        for heads, q_len, _ in SHAPES.values()
    ]


def _measure_case(
    case: Any, device: torch.device, environment: dict[str, Any], progress: Progress
) -> list[dict[str, Any]]:
    """A window measured with each of EXTRAS, and kept; nothing where it does not fit the GPU."""
    found: list[dict[str, Any]] = []
    try:
        inputs = script("bench_segment_attention").Inputs(case, device)
        for extra in EXTRAS:
            found.append({"case": str(case), "extra": extra, **_measure(inputs, device, extra)})
            progress.step(str(case))
    except torch.cuda.OutOfMemoryError as error:
        for extra in EXTRAS[len(found) :]:
            none = {"able": [], "us": {}, "fastest": [], "left_out": {str(case): brief(error)}, "faults": []}
            found.append({"case": str(case), "extra": extra, "shape": None, **none})
            progress.step(str(case))
    inputs = None
    torch.cuda.empty_cache()
    same = {name: environment[name] for name in ("torch", "triton", "driver", "date")}
    dtype = str(case.dtype).removeprefix("torch.")
    measured = [Measurement(OP.op, f["shape"], case.num_tokens, dtype, f["us"], **same) for f in found if f["us"]]
    before = [_taken(f, device) for f in found]
    if measured:
        tuned.record(torch.cuda.get_device_name(device), measured)
        faster.forget()
    return [{**f, "before": took, "auto": _taken(f, device)} for f, took in zip(found, before, strict=True)]


def _measure(inputs: Any, device: torch.device, extra: str) -> dict[str, Any]:
    """The shape as the op sees it, which backends serve it, and where they are several, how long they take.
    `left_out` says why others were not timed, `faults` which of these ought to have been."""
    timing, variant_of = script("timing"), script("bench_segment_attention").our_variant
    case, window = inputs.case, inputs.windows[extra]
    turned_pairs = window.tables[4].shape[1] if window.has_shift else 0
    options = (turned_pairs, extra == "mass", window.has_weight, case.group_size)
    shape = Shape(case.heads, case.q_len, TILE_ROWS * window.capacity, case.head_dim, *options)
    extras, grouped = (False, extra == "mass", window.has_weight), case.group_size > 1
    kind = (case.dtype, case.head_dim, turned_pairs, *extras, grouped, True, True)
    reasons = {name: OP.passed_over(name, device, kind) for name in OP.backends if name != "reference"}
    able = [name for name, reason in reasons.items() if reason is None]
    left_out = {name: str(reason) for name, reason in reasons.items() if reason is not None}
    faults = [name for name in left_out if OP.checked.get((name, str(device), kind))]
    timings: dict[str, Any] = {}
    while len(able) > 1 and not timings:
        runs = {name: variant_of(inputs, name, extra).make() for name in able}
        try:
            with timing.one_thread():
                timings = timing.time_variants(runs, device, flush=True, seconds=SECONDS)
        except timing.VariantError as failed:
            able.remove(failed.name)
            left_out[failed.name] = brief(failed.__cause__)
            if not isinstance(failed.__cause__, torch.cuda.OutOfMemoryError):
                faults.append(failed.name)
    us = {name: {"us_20": of.low * 1e6, "us": of.median * 1e6, "us_80": of.high * 1e6} for name, of in timings.items()}
    shape = {name: int(number) for name, number in shape._asdict().items()}
    fastest = list(tuned.fastest(us))
    return {"shape": shape, "able": able, "us": us, "fastest": fastest, "left_out": left_out, "faults": faults}


def _taken(found: dict[str, Any], device: torch.device) -> str | None:
    """What auto takes of those that serve; None of a window that does not fit."""
    if found["shape"] is None:
        return None
    order = OP.order(device, Shape(**found["shape"]))
    return next(name for name in order if name in found["able"] or name == "reference")


def _table(found: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for f in found for name in f["us"]))

    def time(of: dict[str, float] | None) -> str:
        return "-" if of is None else f"{of['us']:.1f} ({of['us_20']:.1f} to {of['us_80']:.1f})"

    rows = [
        [f["case"], f["extra"] or "-", " or ".join(f["fastest"]) or "-", f["auto"] or "-", f["before"] or "-",
         *(time(f["us"].get(name)) for name in names)]
        for f in found
    ]  # fmt: skip
    return table(["window", "and", "fastest", "auto takes", "before", *names], rows, left=5)
