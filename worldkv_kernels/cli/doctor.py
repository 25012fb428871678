"""worldkv doctor: what this machine has, and which backend each op would use, and why."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from ..ops import cuda, proven
from ..ops.backends import OpBackends
from ..ops.compress_chunk import BACKENDS as COMPRESS_CHUNK
from ..ops.norm_rope_append import BACKENDS as NORM_ROPE_APPEND
from ..ops.segment_attention import BACKENDS as SEGMENT_ATTENTION
from .report import Progress, machine, parse_device, table, write_json

OPS = (SEGMENT_ATTENTION, NORM_ROPE_APPEND, COMPRESS_CHUNK)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="such as cuda or cpu (default: the GPU where there is one)")
    parser.add_argument(
        "--check", action="store_true", help="compare every backend that can run here with the reference"
    )
    parser.add_argument(
        "--prove", action="store_true", help="--check, and let auto take the CUDA kernels that agree, on this machine"
    )
    parser.add_argument("--json", help="where the findings go as JSON, - for stdout")


def run(args: argparse.Namespace) -> int:
    """Exit status 1 when a backend disagrees with the reference."""
    device = parse_device(args.device)
    out = sys.stderr if args.json == "-" else sys.stdout
    where = {**machine(device), "cuda_extension": ", ".join(cuda.architectures()) or "not built"}
    if device.type == "cuda":
        where["architecture"] = proven.architecture(device)
        where["driver_cuda"] = torch.version.cuda
    for name, value in where.items():
        print(f"{name.replace('_', ' '):16} {value}", file=out)

    findings = [_finding(op, device, name, args.check or args.prove) for op in OPS for name in op.backends]
    columns = ["op", "backend", "auto", "here"]
    rows = [[f["op"], f["backend"], "takes it" if f["auto"] else "-", f["why"]] for f in findings]
    print(f"\n{table(columns, rows, left=4)}", file=out)
    disagree = [f for f in findings if f["disagreement"]]
    if args.prove:
        for finding in findings:
            if finding["backend"] == "cuda" and finding["checked"] and not finding["disagreement"]:
                path = proven.record(finding["op"], device)
                print(f"{finding['op']}: the CUDA kernel is proven on this machine, noted in {path}", file=out)
    write_json(args.json, {"command": "doctor", "machine": where, "backends": findings})
    return 1 if disagree else 0


def _finding(op: OpBackends, device: torch.device, name: str, check: bool) -> dict[str, Any]:
    """What is to be said of one backend of one op."""
    kind = op.kinds[0]
    unavailable = op.backends[name].unavailable(device)
    checked, disagreement = 0, None
    if check and name != "reference" and not unavailable:
        kinds = [one for one in op.kinds if op.backends[name].unsupported(one) is None]
        progress = Progress(f"{op.op} {name}", len(kinds))
        for one in kinds:
            disagreement = disagreement or op.disagreement(name, device, one)
            checked += 1
            progress.step()
    chosen = op.run(name) is op.choose("auto", device, kind) if not unavailable else False
    passed_over = op.passed_over(name, device, kind)
    if disagreement:
        why = disagreement
    elif chosen:
        why = "serves"
    else:
        why = passed_over or "a better one serves"
    if checked and not disagreement:
        why += f"; agrees with the reference on {checked} kinds of problem"
    return {
        "op": op.op, "backend": name, "auto": chosen, "available": unavailable is None, "why": why,
        "checked": checked, "disagreement": disagreement,
    }  # fmt: skip
