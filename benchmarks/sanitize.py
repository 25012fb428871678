"""Run every kernel once on small inputs that end where their memory ends, under a memory checker.

    python benchmarks/sanitize.py                                     once, to compile the kernels and fill their cache
    compute-sanitizer --tool memcheck python benchmarks/sanitize.py   what it is for

Pools and chunks are exactly as long as their last row, so that a load past a tail leaves its allocation; PyTorch's
caching allocator, which would round allocations up and hide that, is off. Results are compared with the reference
on the CPU. On a CPU this runs in Triton's interpreter: TRITON_INTERPRET=1 ... --device cpu.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # before torch allocates

import torch
from common import ERROR_LIMITS, parse_device, relative_error, worst

from worldkv_kernels import (
    Rope3D,
    RopeTable,
    Segment,
    Window,
    compress_chunk,
    dequantize_chunk,
    norm_rope_append,
    participation,
    quantize_chunk,
    segment_attention,
)
from worldkv_kernels.ops.backends import OpBackends

Outputs = Sequence[torch.Tensor]
Case = Callable[[torch.device, str], Outputs]


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """On the CPU, the same in every call, so that reference and kernel see the same inputs."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)


def attention_case(
    head_dim: int, dtype: torch.dtype, *, shift: bool = False, extras: bool = False, capacity: int | None = None,
    pairs: tuple[int, int, int] | None = None, weighted: bool = False,
) -> Case:  # fmt: skip
    """70 queries over a tail of one row, full tiles, and a tail that ends the pool; unused rows are NaN.

    A capacity of 16 tiles or more lets the kernel cut the keys into parts.
    """

    def case(device: torch.device, backend: str) -> Outputs:
        segments = [Segment(300, 41 + 128, 5 * shift), Segment(3, 1, -2 * shift), Segment(128, 128)]
        if weighted:
            segments = [s._replace(log_weight=w) for s, w in zip(segments, (0.7, 5.0, -1.5), strict=True)]
        k, v = random(469, 3, head_dim, dtype=dtype), random(469, 3, head_dim, dtype=dtype).flip(0)
        unused = torch.ones(469, dtype=torch.bool, device="cpu")
        for first, count, *_ in segments:
            unused[first : first + count] = False
        k[unused], v[unused] = float("nan"), float("nan")
        rope = Rope3D(head_dim, pairs=pairs) if shift else None
        window = Window(segments, device=device, rope=rope, weighted=weighted, capacity=capacity)
        result = segment_attention(
            random(70, 3, head_dim, dtype=dtype).to(device), k.to(device), v.to(device), window,
            return_lse=extras, return_mass=extras, backend=backend,
        )  # fmt: skip
        return result if isinstance(result, tuple) else (result,)

    return case


def participation_case(
    head_dim: int, dtype: torch.dtype, *, shift: bool = False, weighted: bool = False, room: int = 0
) -> Case:
    """70 queries of four heads over two, and the window of `attention_case`; out ends with the last token, or `room`
    tokens behind it."""

    def case(device: torch.device, backend: str) -> Outputs:
        segments = [Segment(300, 41 + 128, 5 * shift), Segment(3, 1, -2 * shift), Segment(128, 128)]
        if weighted:
            segments = [s._replace(log_weight=w) for s, w in zip(segments, (0.7, 5.0, -1.5), strict=True)]
        k = random(469, 2, head_dim, dtype=dtype)
        unused = torch.ones(469, dtype=torch.bool, device="cpu")
        for first, count, *_ in segments:
            unused[first : first + count] = False
        k[unused] = float("nan")
        window = Window(segments, device=device, rope=Rope3D(head_dim) if shift else None, weighted=weighted)
        lse = 5.5 + 0.1 * random(4, 70, dtype=torch.float32)
        out = torch.full((4, window.num_tokens + room), float("nan"), dtype=torch.float32, device=device)
        q = random(70, 4, head_dim, dtype=dtype)
        return (participation(q.to(device), k.to(device), window, lse.to(device), out=out, backend=backend),)

    return case


def append_case(heads: int, dtype: torch.dtype, *, weights: bool, on_device: bool) -> Case:
    """30 tokens, slices of one fused projection, into the last rows of the pools."""

    def case(device: torch.device, backend: str) -> Outputs:
        columns = heads * 128
        q, k, v = random(30, 3 * columns, dtype=dtype).to(device).split(columns, dim=1)
        pools = [torch.zeros(41, heads, 128, dtype=q.dtype, device=device) for _ in range(2)]
        weight = random(columns, dtype=dtype).to(device) if weights else None
        where = dict(first_row=11, rope=Rope3D(128), start_frame=7)
        if on_device:
            rope = RopeTable(where["rope"], (2, 3, 5), device=device, start_frame=7)
            where = dict(first_row=torch.tensor([11], dtype=torch.int64, device=device), rope=rope)
        out = norm_rope_append(
            q, k, v, *pools, **where, grid=(2, 3, 5), q_weight=weight, k_weight=weight, backend=backend
        )  # fmt: skip
        return out, *pools

    return case


def compress_case(
    heads: int, dtype: torch.dtype, *, pooled: bool, anchor: int, keep_ratio: float, rule: str = "similarity",
    merge_above: float | None = None,
) -> Case:  # fmt: skip
    """Three frames of 37 tokens, of which for the nearest the same keys, with noise, are in each; merged where there is
    a limit."""

    def case(device: torch.device, backend: str) -> Outputs:
        k, v = (random(111, heads, 64, dtype=dtype) for _ in range(2))
        merge = merge_above is not None
        if rule == "nearest" or merge:
            k = (random(37, heads, 64).float().repeat(3, 1, 1) + 0.4 * k.float()).to(dtype)
        result = compress_chunk(
            k.to(device), v.to(device), frames=3, keep_ratio=keep_ratio, pooled=pooled, anchor=anchor, rule=rule,
            merge=merge, merge_above=merge_above or 0.0, backend=backend,
        )  # fmt: skip
        return result if merge else result[:3]

    return case


def compress_layers_case(
    heads: int, dtype: torch.dtype, *, pooled: bool, keep_ratio: float, rule: str = "similarity", merge: bool = False
) -> Case:
    """The last 111 of 120 rows of each of three layers, into the last rows of others; NaN before them."""

    def case(device: torch.device, backend: str) -> Outputs:
        k, v = random(3, 120, heads, 64, dtype=dtype), random(3, 120, heads, 64, dtype=dtype).flip(1)
        k[:, :9], v[:, :9] = float("nan"), float("nan")
        k, v = (x.to(device) for x in (k, v))
        kept = 37 + 2 * min(37, math.ceil(keep_ratio * 37))
        outs = [torch.zeros(3, 5 + kept, heads, 64, dtype=dtype, device=device) for _ in range(2)]
        result = compress_chunk(
            k[:, 9:], v[:, 9:], frames=3, keep_ratio=keep_ratio, pooled=pooled, anchor=1, rule=rule, merge=merge,
            merge_above=0.1, out_k=outs[0][:, 5:], out_v=outs[1][:, 5:], backend=backend,
        )  # fmt: skip
        return (*outs, result.index, result.count) if merge else (*outs, result.index)

    return case


def quantize_case(heads: int, head_dim: int, dtype: torch.dtype, bits: int) -> Case:
    """The last 71 of 80 rows of each of three layers, packed, and restored into the last rows of others; and, by a
    table, from the last place, from the one before, which has 5 tokens, and from the first."""

    def case(device: torch.device, backend: str) -> Outputs:
        k, v = random(3, 80, heads, head_dim, dtype=dtype), random(3, 80, heads, head_dim, dtype=dtype).flip(1)
        k[:, :9], v[:, :9] = float("nan"), float("nan")
        packed = quantize_chunk(k[:, 9:].to(device), v[:, 9:].to(device), bits=bits, backend=backend)
        outs = [torch.zeros(3, 80, heads, head_dim, dtype=dtype, device=device) for _ in range(2)]
        dequantize_chunk(packed, bits=bits, out_k=outs[0][:, 9:], out_v=outs[1][:, 9:], backend=backend)
        few = quantize_chunk(k[0, 9:14].to(device), v[0, 9:14].to(device), bits=bits, backend=backend)
        bank = packed.clone()
        bank[1, :, : few.shape[1]] = few
        chosen = torch.tensor([(2, 71), (1, 5), (0, 0), (0, 71)], dtype=torch.int32, device=device)
        slots = [torch.zeros(4, 80, heads, head_dim, dtype=dtype, device=device) for _ in range(2)]
        by_table = dict(out_k=slots[0][:, 9:], out_v=slots[1][:, 9:], chosen=chosen)
        dequantize_chunk(bank, bits=bits, **by_table, backend=backend)
        return *outs, *slots, packed

    return case


def cases(device: torch.device) -> dict[str, dict[str, Case]]:
    """Cases by op and name; together they reach every kernel and every compile-time branch of a launch."""
    half = torch.bfloat16 if device.type == "cuda" else torch.float16  # the interpreter multiplies no bf16 matrices
    return {
        "segment_attention": {
            "128 half": attention_case(128, half),
            "128 half shift mass lse": attention_case(128, half, shift=True, extras=True),
            "64 fp16 mass lse": attention_case(64, torch.float16, extras=True),
            "128 fp32 shift": attention_case(128, torch.float32, shift=True),
            "128 half shift of all pairs": attention_case(128, half, shift=True, pairs=(64, 0, 0)),
            "128 half, cut": attention_case(128, half, capacity=32),
            "128 fp16 mass lse, cut": attention_case(128, torch.float16, extras=True, capacity=32),
            "128 half weights": attention_case(128, half, weighted=True),
            "64 half weights shift": attention_case(64, half, weighted=True, shift=True),
            "128 half weights mass lse, cut": attention_case(128, half, weighted=True, extras=True, capacity=32),
            "64 half weights shift mass lse, cut": attention_case(
                64, half, weighted=True, shift=True, extras=True, capacity=32
            ),
            "64 half shift mass lse, cut": attention_case(64, half, shift=True, extras=True, capacity=32),
        },
        "participation": {
            "128 half": participation_case(128, half),
            "128 half shift": participation_case(128, half, shift=True),
            "64 half shift weights, room": participation_case(64, half, shift=True, weighted=True, room=300),
            "64 fp16 weights": participation_case(64, torch.float16, weighted=True),
            "128 fp32 shift": participation_case(128, torch.float32, shift=True),
        },
        "norm_rope_append": {
            "weights": append_case(3, half, weights=True, on_device=False),
            "no weights, positions on the device": append_case(9, half, weights=False, on_device=True),
        },
        "compress_chunk": {
            "pooled": compress_case(3, torch.bfloat16, pooled=True, anchor=0, keep_ratio=0.25),
            "per frame, anchor in the middle": compress_case(5, torch.bfloat16, pooled=False, anchor=1, keep_ratio=0.3),
            "all kept": compress_case(2, torch.bfloat16, pooled=True, anchor=2, keep_ratio=1.0),
            "fp16": compress_case(1, torch.float16, pooled=True, anchor=0, keep_ratio=0.25),
            "fp32": compress_case(3, torch.float32, pooled=False, anchor=2, keep_ratio=0.25),
            "layers": compress_layers_case(3, torch.bfloat16, pooled=True, keep_ratio=0.25),
            "layers, per frame": compress_layers_case(2, torch.float32, pooled=False, keep_ratio=0.3),
            "layers, all kept": compress_layers_case(2, torch.bfloat16, pooled=True, keep_ratio=1.0),
            "nearest": compress_case(3, half, pooled=True, anchor=0, keep_ratio=0.25, rule="nearest"),
            "nearest, merged": compress_case(
                5, half, pooled=False, anchor=1, keep_ratio=0.3, rule="nearest", merge_above=0.9
            ),
            "fp32, merged": compress_case(3, torch.float32, pooled=True, anchor=2, keep_ratio=0.25, merge_above=0.8),
            "all kept, merged": compress_case(2, half, pooled=True, anchor=2, keep_ratio=1.0, merge_above=0.9),
            "layers, nearest, merged": compress_layers_case(
                3, half, pooled=True, keep_ratio=0.25, rule="nearest", merge=True
            ),
        },
        "quantize_chunk": {
            f"{bits} bits, {name}": quantize_case(*sizes, bits)
            for bits in (8, 4)
            for name, sizes in (
                ("bf16", (3, 128, torch.bfloat16)),
                ("fp16", (1, 64, torch.float16)),
                ("fp32", (2, 64, torch.float32)),
            )
        },
    }


# What a backend does not take: (op, backend, case).
NOT_TAKEN = {
    ("segment_attention", "cuda", "128 fp32 shift"),
    *(
        ("segment_attention", "sdpa", case)
        for case in (
            "128 fp32 shift",
            "128 half shift mass lse",
            "64 fp16 mass lse",
            "128 fp16 mass lse, cut",
            "128 half weights",
            "64 half weights shift",
            "128 half weights mass lse, cut",
            "64 half weights shift mass lse, cut",
            "64 half shift mass lse, cut",
        )
    ),
    *(
        ("compress_chunk", "cuda", case)
        for case in ("nearest", "nearest, merged", "fp32, merged", "all kept, merged", "layers, nearest, merged")
    ),
}


def kernels(device: torch.device) -> Iterator[tuple[str, str]]:
    """Each op with each of its backends that is no reference and runs on `device`."""
    for op in cases(device):
        known: OpBackends = sys.modules[f"worldkv_kernels.ops.{op}"].BACKENDS
        for name, backend in known.backends.items():
            if name != "reference" and backend.unavailable(device) is None:
                yield op, name


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 when every kernel ran and agrees with the reference, 1 when not, 2 when there is none to run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="such as cuda:0 or cpu; the first GPU by default")
    device = parse_device(parser.parse_args(argv).device)
    found = list(kernels(device))
    if not found:
        print(f"sanitize: no kernel can run on {device}; on a CPU set TRITON_INTERPRET=1", file=sys.stderr)
        return 2
    if device.type == "cuda":
        torch.cuda.set_device(device)
    wrong = 0
    for op, backend in found:
        for name, case in cases(device)[op].items():
            if (op, backend, name) in NOT_TAKEN:
                continue
            got: Any = [x.cpu() for x in case(device, backend)]
            want = case(torch.device("cpu"), "reference")
            error = worst(relative_error(g, w) for g, w in zip(got, want, strict=True))
            exact = op == "quantize_chunk" or (op == "compress_chunk" and not name.endswith("merged"))
            right = error <= (0.0 if exact else ERROR_LIMITS[got[0].dtype])
            right &= all(torch.equal(g, w) for g, w in zip(got, want, strict=True) if not g.is_floating_point())
            wrong += not right
            print(f"{op} {backend}, {name}: error {error:.1e}{'' if right else ' WRONG'}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
