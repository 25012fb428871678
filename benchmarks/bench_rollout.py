"""Whole chunks: a model with random weights, rolled out with each memory; frames per second, and where the time goes.

    python benchmarks/bench_rollout.py [--small] [--model MODEL] [--layers N] [--chunks N] [--only A,B] [--jsonl FILE]

Denoiser and memory alone: no video decoder, no text encoder.
"""

from __future__ import annotations

import gc
import math
import statistics
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import published_path
import torch
from common import append_json_line, bench_main, parse_device, picked, trace_file
from machine import clocks, environment
from model_cases import (
    CHANGED,
    DTYPES,
    MODELS,
    MODES,
    RIVALS,
    SMALL_SIZES,
    Memory,
    ModelCase,
    build,
    controls_of,
    full_window,
    make_memory,
    memory_config,
    pass_bytes,
    pass_flops,
    relative_errors,
    shape,
    weight_bytes,
    weights_of,
)
from shapes import check_room
from timing import Ceilings, describe_ceilings, measure_ceilings, one_thread, percentile, roof, synchronize
from traces import ORDER, Breakdown, breakdown, recorded

from worldkv_kernels.cli.report import Progress, note
from worldkv_kernels.cli.report import table as text_table
from worldkv_kernels.models.rollout import Rollout as ModelRollout
from worldkv_kernels.models.rollout import RolloutChunk, WorldModel

VIDEO_FRAMES = 4  # of a latent frame
BASE = "sliding_as_long"  # attends to as many tokens as a memory, which costs what it takes longer
# Two passes a chunk over two chunks, in which every mode attends to the same; random weights let rounding grow.
CHECK_SIGMAS, CHECK_CHUNKS = (1.0,), 2
ERROR_LIMITS = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 1e-4}
FP8_ERROR_LIMIT = 0.2


@dataclass(frozen=True)
class RolloutCase:
    """A model, and how many chunks each mode makes of it; one more chunk is traced."""

    of: ModelCase
    chunks: int
    modes: tuple[str, ...] = MODES

    def __str__(self) -> str:
        return f"{self.of}, {self.chunks} chunks"


CASES = [
    RolloutCase(ModelCase("lingbot_world_fast"), chunks=30),
    RolloutCase(ModelCase("matrix_game_2"), chunks=60),
    RolloutCase(ModelCase("lingbot_world_fast", variant="v2-1.3b"), chunks=60),
    RolloutCase(ModelCase("small_world"), chunks=60),
]
SMALL_MODES = ("worldkv", "worldkv_eager", "worldkv_host", "sliding_as_long", "published")
SMALL_CASES = [
    RolloutCase(ModelCase("small_world", 2, SMALL_SIZES["small_world"]), chunks=12),
    RolloutCase(ModelCase("lingbot_world_fast", 2, SMALL_SIZES["lingbot_world_fast"]), 11, SMALL_MODES),
    RolloutCase(ModelCase("matrix_game_2", 2, SMALL_SIZES["matrix_game_2"]), 11, SMALL_MODES),
]


class Rollout:
    """What one mode's rollout gave: chunks, the traced chunk, and why it ended before all were made."""

    def __init__(self) -> None:
        self.chunks: list[RolloutChunk] = []
        self.breakdown: Breakdown | None = None
        self.stopped: str | None = None


def roll_out(mode: str, model: WorldModel, memory: Memory, case: RolloutCase) -> Rollout:
    """Time `case.chunks` chunks, then trace one more. Progress on stderr."""
    done, label = Rollout(), f"{case.of}: {mode}"
    made = ModelRollout(
        model, memory, controls_of(model, case.chunks + 1), graph=False if mode == "worldkv_eager" else None
    )
    progress = Progress(label, case.chunks)
    try:
        for chunk in islice(made, case.chunks):
            done.chunks.append(replace(chunk, latents=None))
            progress.step("chunks")
        synchronize(model.device)
        with recorded(label, model.device, keep=trace_file()) as events:
            next(made)
    except (RuntimeError, torch.OutOfMemoryError) as error:  # a pool that is full, a device that is
        if not done.chunks:
            raise
        done.stopped = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:200]
        return done
    try:
        done.breakdown = breakdown(events)
    except ValueError as error:  # the times stand without it
        print(f"{label}: {error}", file=sys.stderr, flush=True)
    return done


def first_chunks(model: WorldModel, memory: Memory) -> list[torch.Tensor]:
    """Latents of the chunks that every mode must make alike."""
    made = [c.latents for c in ModelRollout(model, memory, controls_of(model, CHECK_CHUNKS), sigmas=CHECK_SIGMAS)]
    memory.reset()
    return made


def warm_up(model: WorldModel, memory: Memory, config: Any) -> None:
    """Compile and check kernels: as many chunks as it takes until one has been pruned and one retrieved."""
    if model.device.type == "cuda":
        chunks = config.sink_chunks + config.recent_chunks + config.gap_chunks + 3
        for _ in ModelRollout(model, memory, controls_of(model, chunks), sigmas=CHECK_SIGMAS):
            pass
        memory.reset()


def measure_mode(
    mode: str,
    model: WorldModel,
    case: RolloutCase,
    ceilings: Ceilings,
    wanted: list[torch.Tensor] | None,
    flops_of: Any,
) -> dict[str, Any]:
    """The figure of one mode. `wanted` is what the first chunks must be, `flops_of(tokens)` counts a pass."""
    on_gpu = model.device.type == "cuda"
    figure: dict[str, Any] = {
        "case": str(case), "variant": mode, "is_rival": mode in RIVALS,
        "shape": shape(model, full_window(memory_config(mode, model, case.chunks))),
        "status": "timed", "reason": None, "error": None,
        "error_limit": FP8_ERROR_LIMIT if mode == "worldkv_fp8" else ERROR_LIMITS[model.dtype],
        "us": None, "us_20": None, "us_80": None, "host_us": None, "rounds": None, "bytes": None, "flops": None,
        "gb_s": None, "tflop_s": None, "ceiling": None, "share": None, "rival": None, "times_rival": None,
        "base": None, "over_base": None,
        "frames_per_second": None, "stopped": None, "per_chunk": [], "breakdown": None, "bytes_by_kind": {},
    }  # fmt: skip
    memory = None
    try:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(model.device)
        if wanted is None:
            raise RuntimeError("there was no room for anything to compare with")
        memory = make_memory(mode, model, case.chunks + 1)
        figure["error"] = relative_errors(first_chunks(model, memory), wanted)
        if not figure["error"] <= figure["error_limit"]:  # NaN is wrong
            reason = f"relative error {figure['error']:.2e}, limit {figure['error_limit']:.0e}"
            finite = figure["error"] if math.isfinite(figure["error"]) else None
            figure.update(status="wrong", reason=reason, error=finite)
            return figure
        warm_up(model, memory, memory.config)
        done = roll_out(mode, model, memory, case)
    except Exception as raised:  # such as a device that is too small; the other modes may fit
        reason = f"{type(raised).__name__}: {str(raised).splitlines()[0]}"[:300]
        figure.update(status="skipped" if mode in RIVALS else "failed", reason=reason)
        return figure

    steady = steady_chunks(done.chunks)
    times = [chunk.seconds for chunk in steady]
    tokens = round(statistics.fmean(chunk.plan.num_tokens for chunk in steady))
    passes = len(model.sigmas) + 1
    flops, num_bytes = passes * flops_of(tokens), passes * pass_bytes(model, tokens)
    median = statistics.median(times)
    ceiling, floor = roof(num_bytes, flops, ceilings)
    video = VIDEO_FRAMES * model.chunk_frames
    stats = memory.stats()
    figure.update(
        us=median * 1e6, us_20=percentile(times, 0.2) * 1e6, us_80=percentile(times, 0.8) * 1e6, rounds=len(times),
        bytes=num_bytes, flops=flops, gb_s=num_bytes / median / 1e9, tflop_s=flops / median / 1e12,
        ceiling=ceiling, share=floor / median, frames_per_second=video / median, stopped=done.stopped,
        per_chunk=[
            {"chunk": c.plan.chunk, "seconds": c.seconds, "tokens": c.plan.num_tokens, "frames_per_second":
             video / c.seconds, "retrieved": list(c.plan.retrieved)} for c in done.chunks
        ],
        breakdown=done.breakdown.as_record() if done.breakdown else None,
        bytes_by_kind={
            "weights": weight_bytes(model), "cache": stats["device_bytes"], "host": stats["host_bytes"],
            "kept": stats.get("kept_bytes"), "peak": torch.cuda.max_memory_allocated(model.device) if on_gpu else None,
        },
    )  # fmt: skip
    return figure


def steady_chunks(chunks: Sequence[RolloutChunk]) -> Sequence[RolloutChunk]:
    """Those that attend to as much as any: from the first of them on; in a mode that grows, the second half."""
    most = max(chunk.plan.num_tokens for chunk in chunks)
    first = next(i for i, chunk in enumerate(chunks) if chunk.plan.num_tokens == most)
    return chunks[first if first < len(chunks) - 1 else len(chunks) // 2 :]


def yardstick(model: WorldModel, mode: str) -> list[torch.Tensor] | None:
    """First chunks for the others to agree with; None, and a line on stderr, where the device is too small for them."""
    try:
        return first_chunks(model, make_memory(mode, model, CHECK_CHUNKS))
    except torch.OutOfMemoryError as error:
        print(f"nothing is compared with {mode}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        return None
    finally:
        clear(model.device)


def clear(device: torch.device) -> None:
    """Free what a memory took: two of a large model do not fit one device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_case(case: RolloutCase, device: torch.device, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """One figure a mode as soon as it is there, the rival's and the base's first: the others' are held against them."""
    model = build(case.of, device)
    controls = controls_of(model, 1)[0]
    matmuls = pass_flops(model, controls, 0)
    attention = pass_flops(model, controls, 1) - matmuls

    # Two implementations that share no code must agree: the ops, and the published path.
    of_published = yardstick(model, "published")
    of_ops = yardstick(model, "full") if "published" in case.modes or of_published is None else None
    published = base = None
    left = dict(CHANGED)  # those up to a mode's own, whichever modes were asked for
    for mode in sorted(case.modes, key=lambda mode: (mode in CHANGED, mode not in RIVALS, mode != BASE)):
        before = clocks(device)
        for change in list(left)[: list(left).index(mode) + 1] if mode in left else ():
            getattr(model, left.pop(change))()
        wanted = of_ops if mode == "published" or of_published is None else of_published
        figure = measure_mode(mode, model, case, ceilings, wanted, lambda tokens: matmuls + attention * tokens)
        if figure["is_rival"] and figure["us"]:
            published = figure
        if published and figure["us"]:
            figure.update(rival=published["variant"], times_rival=published["us"] / figure["us"])
        if mode == BASE and figure["us"]:
            base = figure
        if base and figure["us"] and mode.startswith("worldkv") and mode not in CHANGED:
            figure.update(base=BASE, over_base=figure["us"] / base["us"] - 1)
        yield {**figure, "clocks": (before, clocks(device))}
        clear(device)


def run(
    *,
    small: bool = False,
    device: torch.device | None = None,
    seconds: float = 1.0,
    jsonl_path: str | None = None,
    cases: Sequence[RolloutCase] | None = None,
    only: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Measure the cases and return the figures, with the keys of `common.run_cases` and some more.

    `seconds` has no effect: the number of chunks says how long it takes. The modes are the variants.
    """
    torch.set_float32_matmul_precision("highest")
    device = device or parse_device(None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with one_thread():
        ceilings = measure_ceilings(device, small=small)
    record = environment(device)
    figures = []
    for case in cases or (SMALL_CASES if small else CASES):
        case = replace(case, modes=tuple(picked(variants_of(case, device), only)))
        lines = {}
        with one_thread():
            for figure in measure_case(case, device, ceilings):
                before, after = figure.pop("clocks")
                line = {"bench": "rollout", **figure, "small": small, "ceilings": asdict(ceilings)}
                line["environment"] = {**record, "clocks_before": before, "clocks_after": after}
                append_json_line(jsonl_path, line)
                lines[figure["variant"]] = line
        figures += (lines[mode] for mode in case.modes)
    note(describe_ceilings(ceilings))
    return figures


def table(figures: Sequence[dict[str, Any]]) -> str:
    """What memory costs, speed and sizes of each mode, the traced chunk by kind of work in ms, and what went wrong."""
    columns = "frames/s", "first", "last", "tokens", "GiB cache", "GiB host", "share", "x rival", "memory costs"
    speed = [("case", "mode", *columns)]
    parts = [("case", "mode", "ms", *ORDER, "idle", "launches", "host syncs")]
    reasons = []
    for f in figures:
        name = (f["case"], f["variant"] + (" (rival)" if f["is_rival"] else ""))
        if f["status"] != "timed":
            speed.append((*name, f["status"], *[""] * (len(columns) - 1)))
            reasons.append(f"{f['status']}: {f['variant']}: {f['reason']} ({f['case']})")
            continue
        chunks, sizes = f["per_chunk"], f["bytes_by_kind"]
        speed.append((
            *name, f"{f['frames_per_second']:.2f}", f"{chunks[0]['frames_per_second']:.2f}",
            f"{chunks[-1]['frames_per_second']:.2f}", str(chunks[-1]["tokens"]), f"{sizes['cache'] / 2**30:.2f}",
            f"{sizes['host'] / 2**30:.2f}", f"{100 * f['share']:.0f} % {f['ceiling']}",
            f"{f['times_rival']:.2f}" if f["times_rival"] else "-",
            f"{100 * f['over_base']:+.1f} %" if f["base"] else "-",
        ))  # fmt: skip
        if f["stopped"]:
            reasons.append(f"ended after {len(chunks)} chunks: {f['variant']}: {f['stopped']} ({f['case']})")
        if f["breakdown"]:
            b = f["breakdown"]
            counts = ("-" if b[name] is None else str(b[name]) for name in ("launches", "synchronisations"))
            times = [b["wall"], *(b["kinds"][kind] for kind in ORDER), b["idle"]]
            parts.append((*name, *(f"{1e3 * seconds:.1f}" for seconds in times), *counts))
    tables = (text_table(rows[0], rows[1:], left=2) for rows in (speed, parts))
    return "\n".join([*headlines(figures), "\n\none late chunk, traced, in ms\n".join(tables), *reasons])


def headlines(figures: Sequence[dict[str, Any]]) -> list[str]:
    """Of each case what the memory costs, where that was measured."""
    base = {f["case"]: f for f in figures if f["variant"] == BASE}
    return [
        f"{f['case']}: memory costs {100 * f['over_base']:+.1f} % of a chunk: {_seen(f)}, {_seen(base[f['case']])}"
        for f in figures
        if f["variant"] == "worldkv" and f["base"]
    ]


def _seen(figure: dict[str, Any]) -> str:
    tokens, speed = figure["per_chunk"][-1]["tokens"], figure["frames_per_second"]
    return f"{figure['variant']} {speed:.2f} frames/s with {tokens:,} tokens"


def variants_of(case: RolloutCase, device: torch.device) -> dict[str, bool]:
    """The names of a case's variants, its modes, and whether each is a rival."""
    return {mode: mode in RIVALS for mode in case.modes if device.type == "cuda" or mode not in CHANGED}


def cases_from(
    device: torch.device,
    *,
    small: bool,
    model: str | None = None,
    variant: str | None = None,
    layers: int | None = None,
    chunks: int | None = None,
) -> list[RolloutCase]:
    """The cases as asked for on a command line, None for what was left open.

    Raises ValueError on an unknown model or variant, a number below 1, weights that do not fit the device's free
    memory, or chunks that the rotary embedding cannot number.
    """
    for option, number in (("--layers", layers), ("--chunks", chunks)):
        if number is not None and number < 1:
            raise ValueError(f"{option} must be at least 1, got {number}")
    cases = SMALL_CASES if small else CASES
    if model is not None:
        known = dict.fromkeys(case.of.model for case in cases)
        if model not in known:
            raise ValueError(f"--model must be one of {', '.join(known)}, got {model!r}")
        cases = [case for case in cases if case.of.model == model]
    if variant is not None:
        if model is None:
            raise ValueError(f"--variant must go with --model, got {variant!r} alone")
        # A model's first variant is the default, which a case does not name.
        known = {case.of.variant or next(iter(MODELS[model][0])): case for case in cases}
        if variant not in known:
            raise ValueError(f"--variant must be one of {', '.join(known)} for {model}, got {variant!r}")
        cases = [known[variant]]
    changed = []
    for case in cases:
        if layers is not None:
            of = replace(case.of, layers=layers)
            check_room(f"--layers: {layers} layers of {of.name}", weights_of(of, DTYPES[device.type]), device)
            case = replace(case, of=of)
        if chunks is not None:
            most = published_path.POSITIONS // case.of.config().chunk_frames - 1  # one more is traced
            if chunks > most:
                wanted = f"at most {most}, which the published code's rotations number"
                raise ValueError(f"--chunks must be {wanted}, got {chunks}")
            case = replace(case, chunks=chunks)
        changed.append(case)
    return changed


def main(argv: Sequence[str] | None = None) -> int:
    return bench_main("rollout", argv)


if __name__ == "__main__":
    sys.exit(main())
