"""Traces of torch.profiler: recorded with named ranges, joined into one file that Perfetto opens, and added up by kind.

A kernel belongs to the operations and ranges that were open where the host launched it; the outermost of them that a
rule names decides its kind. The kernels of a CUDA graph are launched as one and told by their own names. On a CPU it is
the operations' own time that is added up.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from worldkv_kernels import ranges

Event = dict[str, Any]

# What a range or operation counts as, by the start of its name.
KINDS = {
    "worldkv.segment_attention": "attention",
    "worldkv::segment_attention": "attention",
    "aten::scaled_dot_product": "attention",
    "aten::_scaled_dot_product": "attention",
    "worldkv.norm_rope": "norm and rope",
    "worldkv::norm_rope": "norm and rope",
    "worldkv.compress_chunk": "compression",
    "worldkv::compress_chunk": "compression",
    "worldkv.bank_copy": "copies",
    "worldkv.gather": "copies",
    "aten::linear": "matmuls",
    "aten::addmm": "matmuls",
    "aten::mm": "matmuls",
    "aten::bmm": "matmuls",
    "aten::matmul": "matmuls",
    "aten::conv": "matmuls",
}
# What a kernel of a graph counts as, by a part of its name; the first that fits.
KERNELS = {
    "segment_attention": "attention",
    "merge_parts": "attention",
    "merge_pieces": "attention",
    "sdpa": "attention",
    "flash": "attention",
    "fmha": "attention",
    "norm_rope_append": "norm and rope",
    "nvjet": "matmuls",
    "gemm": "matmuls",
    "gemv": "matmuls",
    "cutlass": "matmuls",
    "splitK": "matmuls",
}
OTHER = "elementwise"
ORDER = ("attention", "matmuls", "norm and rope", "compression", "copies", OTHER)
_REGION = "worldkv.traced "
_WAIT = "worldkv.wait"  # the bench's own waiting, which is no host synchronisation of the work
_SYNCHRONISES = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize",
                 "cuCtxSynchronize", "cuEventSynchronize", "cudaMemcpy", "cudaMemcpy2D")  # fmt: skip


@dataclass(frozen=True)
class Breakdown:
    """Where the time of a traced region went, in seconds.

    `kinds` adds up kernels and copies (on a CPU operations), so that what overlaps counts twice; `idle` is the time in
    which nothing ran. `launches` of kernels and graphs, `synchronisations` of the host with the device: None on a CPU.
    `copied` is bytes by direction, such as "HtoD".
    """

    wall: float
    kinds: dict[str, float]
    idle: float
    launches: int | None
    synchronisations: int | None
    copied: dict[str, int]

    def as_record(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def recorded(label: str, device: torch.device, keep: str | Path | None = None) -> Iterator[list[Event]]:
    """Trace what happens inside, ranges on, up to when the device is done; the list has the events afterwards.

    With `keep`, the events are also added to that file, which is made when it is not there.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    events: list[Event] = []
    before = ranges.enable()
    try:
        with profile(activities=activities) as profiler, record_function(_REGION + label):
            yield events
            if on_gpu:
                with ranges.phase("wait"):
                    torch.cuda.synchronize(device)
    finally:
        ranges.enable(before)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(written))
        trace = json.loads(written.read_text())
    events += trace["traceEvents"]
    if keep is not None:
        _add(trace, Path(keep))


def _add(trace: dict[str, Any], path: Path) -> None:
    """Join a trace with those in `path`: traces of one process share their base of time."""
    if path.exists():
        already = json.loads(path.read_text())
        already["traceEvents"] += trace["traceEvents"]
        trace = already
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(trace))


def kind_of(owners: Iterable[str]) -> str | None:
    """What the outermost of `owners`, outermost first, that has a kind counts as."""
    for name in owners:
        for start, kind in KINDS.items():
            if name.startswith(start):
                return kind
    return None


def kind_of_kernel(name: str) -> str | None:
    """What a kernel that a graph launched counts as."""
    return next((kind for part, kind in KERNELS.items() if part in name), None)


def breakdown(events: Iterable[Event]) -> Breakdown:
    """Add up one region that `recorded` traced.

    Raises ValueError when there is none or more than one, or when the device ran something in its time but no launch
    of it was traced, so that nothing can be told apart.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    regions = [e for e in complete if e.get("cat") == "user_annotation" and e["name"].startswith(_REGION)]
    if len(regions) != 1:
        raise ValueError(f"breakdown: events must hold one traced region, got {len(regions)}")
    region = regions[0]
    thread = (region["pid"], region["tid"])
    of_thread = [e for e in complete if (e["pid"], e["tid"]) == thread]
    spans = [e for e in of_thread if e.get("cat") in ("cpu_op", "user_annotation")]
    calls = [e for e in of_thread if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    inside = _owners(spans, calls, region)
    on_device = [e for e in complete if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if on_device or calls:
        return _of_device(region, inside, on_device)
    return _of_cpu(region, spans)


def _owners(spans: list[Event], calls: list[Event], region: Event) -> list[tuple[Event, list[str]]]:
    """Of each call inside the region the names of the spans around it, outermost first."""
    found = []
    for event, stack in _nested(spans, calls):
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and any(e is region for e in stack):
            found.append((event, [e["name"] for e in stack]))
    return found


def _nested(spans: list[Event], points: list[Event]) -> Iterator[tuple[Event, list[Event]]]:
    """Spans and points in order of time, each with the spans around it, outermost first; of equals, points last."""
    ordered = sorted(
        [(e["ts"], 0, -e["dur"], e) for e in spans] + [(e["ts"], 1, 0, e) for e in points], key=lambda row: row[:3]
    )
    stack: list[Event] = []
    for ts, is_point, _, event in ordered:
        while stack and stack[-1]["ts"] + stack[-1]["dur"] <= ts:
            stack.pop()
        yield event, list(stack)
        if not is_point:
            stack.append(event)


def _of_device(region: Event, inside: list[tuple[Event, list[str]]], on_device: list[Event]) -> Breakdown:
    owners = {call["args"].get("correlation"): names for call, names in inside}
    of_graphs = {call["args"].get("correlation") for call, _ in inside if "GraphLaunch" in call["name"]}
    kinds, copied, ran = dict.fromkeys(ORDER, 0.0), {}, []
    for event in on_device:
        correlation = event["args"].get("correlation")
        names = owners.get(correlation)
        if names is None:  # launched outside the region
            continue
        kind = kind_of_kernel(event["name"]) if correlation in of_graphs else kind_of(names)
        if event["cat"] == "gpu_memcpy":
            kind = kind or "copies"
            direction = next((word for word in event["name"].split() if "to" in word), "other")
            copied[direction] = copied.get(direction, 0) + int(event["args"].get("bytes", 0))
        kinds[kind or OTHER] += event["dur"] * 1e-6
        ran.append((event["ts"], event["ts"] + event["dur"]))
    waits = [(call, names) for call, names in inside if call["name"] in _SYNCHRONISES and _WAIT not in names]
    launches = [call for call, _ in inside if "Launch" in call["name"] and "Host" not in call["name"]]
    within = [e for e in on_device if region["ts"] <= e["ts"] <= region["ts"] + region["dur"]]
    if within and not ran:
        raise ValueError(f"breakdown: events must hold the launches of {len(within)} kernels and copies, got none")
    idle = region["dur"] - _covered(ran, region["ts"], region["ts"] + region["dur"])
    return Breakdown(region["dur"] * 1e-6, kinds, idle * 1e-6, len(launches), len(waits), copied)


def _of_cpu(region: Event, spans: list[Event]) -> Breakdown:
    kinds = dict.fromkeys(ORDER, 0.0)
    operations = [e for e in spans if e["cat"] == "cpu_op"]
    own = {id(e): e["dur"] for e in operations}
    names: dict[int, list[str]] = {}
    for event, stack in _nested(spans, []):
        if event["cat"] != "cpu_op" or not any(e is region for e in stack):
            continue
        names[id(event)] = [*(e["name"] for e in stack), event["name"]]
        parent = next((e for e in reversed(stack) if e["cat"] == "cpu_op"), None)
        if parent is not None:
            own[id(parent)] -= event["dur"]
    for event in operations:
        if id(event) in names:
            kinds[kind_of(names[id(event)]) or OTHER] += own[id(event)] * 1e-6
    return Breakdown(region["dur"] * 1e-6, kinds, max(0.0, region["dur"] * 1e-6 - sum(kinds.values())), None, None, {})


def _covered(intervals: list[tuple[float, float]], low: float, high: float) -> float:
    """How much of [low, high] the intervals cover."""
    covered, end = 0.0, low
    for first, last in sorted(intervals):
        first, last = max(first, end), min(last, high)
        if last > first:
            covered += last - first
            end = last
    return covered
