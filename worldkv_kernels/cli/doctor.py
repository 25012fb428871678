"""worldkv doctor: what this machine has, and which backend each op would use, and why."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from typing import Any

import torch

from ..ops import cuda, proven, tuned
from ..ops.all import OPS, SEGMENT_ATTENTION
from ..ops.backends import OpBackends
from ..ops.segment_attention import Shape
from ..rope import Rope3D
from .report import Progress, add_quiet, machine, parse_device, table, write_json

# Heads, queries of a chunk, and keys of a window, all with head_dim 128: what segment_attention is mostly asked for.
SHAPES = {
    "LingBot-World-Fast, 480 x 832": (40, 4680, 32_760),
    "LingBot-World-Fast, 16:9": (40, 4524, 31_668),
    "Matrix-Game-2.0": (12, 2640, 27_720),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="such as cuda or cpu (default: the GPU where there is one)")
    parser.add_argument(
        "--check", action="store_true", help="compare every backend that can run here with the reference"
    )
    parser.add_argument(
        "--prove",
        action="store_true",
        help="compare the CUDA kernels with the reference, and let auto take those that agree, on this machine",
    )
    parser.add_argument("--json", metavar="PATH", help="also write the findings as one JSON document; - for stdout")
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    """Exit status 1 when a backend disagrees with the reference."""
    device = parse_device(args.device)
    out = sys.stderr if args.json == "-" else sys.stdout
    where = {**machine(device), "cuda_extension": ", ".join(cuda.architectures()) or cuda.missing()}
    if device.type == "cuda":
        where["architecture"] = proven.architecture(device)
        where["driver_cuda"] = torch.version.cuda
    for name, value in where.items():
        print(f"{name.replace('_', ' '):16} {value or 'not installed'}", file=out)

    findings = []
    for op, name in _backends():
        prove = args.prove and name == "cuda"
        checked, disagreement = _check(op, device, name) if args.check or prove else (0, None)
        if prove and checked and not disagreement:  # at once: what comes later may fail
            for proof in sorted({op.proof(kind) for kind in op.kinds if op.backends[name].unsupported(kind) is None}):
                path = proven.record(proof, device)
            print(f"{op.op}: the CUDA kernel is proven on this machine, noted in {path}", file=out)
        findings.append(_finding(op, device, name, checked, disagreement))
    if args.prove and not any(f["checked"] for f in findings if f["backend"] == "cuda"):
        print("no CUDA kernel can run here, so there is nothing to prove", file=out)
    columns = ["op", "backend", "auto", "here"]
    rows = [[f["op"], f["backend"], "takes it" if f["auto"] else "-", f["why"]] for f in findings]
    print(f"\n{table(columns, rows, left=4)}", file=out)
    shapes = _shapes(device)
    rows = [
        [f["model"], f["keys"], f["extra"] or "-", f["backend"], f["evidence"], f["why"] or "-", f["how"]]
        for f in shapes
    ]
    columns = ["segment_attention of", "heads x queries x keys", "and", "by", "evidence", "passed over", "how"]
    print(f"\n{table(columns, rows, left=7)}", file=out)
    unused = _unused(device)
    for reason, count in unused.items():
        print(f"\nof worldkv tune, {count} measurements of this card do not count: {reason}", file=out)
    disagree = [f for f in findings if f["disagreement"]]
    write_json(
        args.json, {"command": "doctor", "machine": where, "backends": findings, "shapes": shapes, "unused": unused}
    )
    return 1 if disagree else 0


def _backends() -> list[tuple[OpBackends, str]]:
    return [(op, name) for op in OPS for name in op.backends]


def _check(op: OpBackends, device: torch.device, name: str) -> tuple[int, str | None]:
    """On how many kinds of problem a backend was compared with the reference, and where they disagree."""
    backend = op.backends[name]
    if name == "reference" or backend.unavailable(device):
        return 0, None
    kinds = [kind for kind in op.kinds if backend.why_not(device, kind) is None]
    progress = Progress(f"{op.op} {name}", len(kinds))
    for checked, kind in enumerate(kinds, 1):
        disagreement = op.disagreement(name, device, kind)
        progress.step()
        if disagreement:
            return checked, disagreement
    return len(kinds), None


def _finding(op: OpBackends, device: torch.device, name: str, checked: int, disagreement: str | None) -> dict[str, Any]:
    """What is to be said of one backend of one op."""
    kind = op.kinds[0]
    unavailable = op.backends[name].unavailable(device)
    chosen = op.run(name) is op.choose("auto", device, kind) if not unavailable else False
    passed_over = op.passed_over(name, device, kind)
    if disagreement:
        why = disagreement
    elif chosen:
        why = "serves"
    else:
        why = passed_over or _slower(op, device, name) or "a better one serves"
    if checked and not disagreement:
        why += f"; agrees with the reference on {checked} kinds of problem"
    return {
        "op": op.op, "backend": name, "auto": chosen, "available": unavailable is None, "why": why,
        "checked": checked, "disagreement": disagreement,
    }  # fmt: skip


def _slower(op: OpBackends, device: torch.device, name: str, shape: Shape | None = None) -> str | None:
    return op.slower(device, shape) if name == "cuda" else None


def _unused(device: torch.device) -> dict[str, int]:
    """How many of this card's measurements are kept and say nothing of this installation, by the reason."""
    kept = tuned.read().get(torch.cuda.get_device_name(device), []) if device.type == "cuda" else []
    return dict(Counter(reason for reason in map(tuned.unusable, kept) if reason is not None))


def _shapes(device: torch.device) -> list[dict[str, Any]]:
    """All of `_shape`; on a GPU each kernel is compiled and checked, if this process has not yet."""
    wanted = [(model, extra) for model in SHAPES for extra in ("", "rebase", "mass", "weights")]
    progress, found = Progress("segment_attention, shapes", len(wanted)), []
    for model, extra in wanted:
        found.append(_shape(device, model, extra))
        progress.step()
    return found


def _shape(device: torch.device, model: str, extra: str) -> dict[str, Any]:
    """Which backend attends over a model's window in bf16, on whose evidence, why none that could before it, and how
    it is launched."""
    heads, q_len, keys = SHAPES[model]
    has_shift, has_mass, has_weight = (extra == name for name in ("rebase", "mass", "weights"))
    turned_pairs = Rope3D(128).pairs[0] if has_shift else 0
    kind = (torch.bfloat16, 128, turned_pairs, False, has_mass, has_weight, False, True, True)
    shape = Shape(heads, q_len, keys, 128, turned_pairs, has_mass, has_weight, 1)
    op = SEGMENT_ATTENTION
    backend = op.name("auto", device, kind, shape)
    reasons = {
        name: op.passed_over(name, device, kind) or _slower(op, device, name, shape)
        for name, other in op.backends.items()
        if name != backend and other.why_not(device, kind) is None
    }
    return {
        "model": model, "keys": f"{heads} x {q_len} x {keys}", "extra": extra, "backend": backend,
        "evidence": op.evidence(backend, device, shape),
        "why": "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason),
        "how": _launch(backend, device, shape),
    }  # fmt: skip


def _launch(backend: str, device: torch.device, shape: Shape) -> str:
    """How a backend launches segment_attention of a shape in bf16."""
    if backend in ("reference", "sdpa"):
        return "-"
    from ..kernels import segment_attention as kernel

    processors, block_q = kernel.device_processors(device), 128
    if backend == "cuda":
        tile_rows = cuda.attention_tile_rows(shape.head_dim, shape.turned_pairs, shape.has_weight)
        how = f"{tile_rows} keys, {processors} blocks that stay"
    else:
        config = kernel.attention_config(
            kernel.device_capability(device), torch.bfloat16, shape.head_dim, shape.turned_pairs > 0, shape.has_mass,
            shape.has_weight,
        )  # fmt: skip
        block_q = config.block_q
        how = (
            f"{config.block_k} keys by {'tensor descriptors' if config.descriptors else 'pointers'}, "
            f"{config.num_warps} warps, {config.num_stages} stages"
        )
    items = shape.heads * -(-shape.q_len // block_q)
    whole, cut, parts = kernel.deal(items, processors, shape.keys // kernel.TILE_ROWS)
    how = f"tiles of {block_q} queries x {how}; {whole} of {items} items whole"
    return how + f", {cut} in {parts} parts each" * (cut > 0)
