"""Compile every Triton kernel as its launcher would launch it, for GPUs that need not be there.

    python tests/compile_kernels.py 90    prints a JSON list, one entry a kernel and case, for sm_90

--every adds kinds of attention that seldom tell more than those there are.

Launches are intercepted, so signatures, constants and configurations are those that ship. Registers, stack,
spills, shared memory and matrix instructions are read from the cubin by the tools in Triton's own package.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor
from worldkv_kernels.kernels import (
    compress_chunk,
    gather_window,
    norm_rope_append,
    participation,
    quantize_chunk,
    segment_attention,
)

from worldkv_kernels.ops.quantize_chunk import packed_bytes

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OF_PRODUCTS = {"segment_attention_kernel", "participation_kernel", "nearest_kernel"}
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8", torch.int32: "*i32",
    torch.int64: "*i64",
}  # fmt: skip


@contextmanager
def intercepted_launches():
    """Yields a list that collects (kernel, arguments by name, options) instead of launching."""
    launches = []

    def collect(self, *args, grid, warmup, **kwargs):
        named = dict(zip(self.arg_names, args, strict=False))
        options = {name: value for name, value in kwargs.items() if name not in self.arg_names}
        named.update({name: value for name, value in kwargs.items() if name in self.arg_names})
        launches.append((self, named, options))

    original = JITFunction.run
    JITFunction.run = collect
    try:
        yield launches
    finally:
        JITFunction.run = original


def compiled(kernel, arguments, options, arch):
    """Compile one launch as the runtime would: constants, None and 1 folded, divisibility by 16 noted."""
    signature, constants, attributes = {}, {}, {}
    unspecialized = {p.name for p in kernel.params if p.do_not_specialize}
    constexpr = {p.name for p in kernel.params if p.is_constexpr}
    for position, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if name in constexpr or value is None or (type(value) is int and value == 1 and name not in unspecialized):
            signature[name] = "constexpr"
            constants[(position,)] = value
            continue
        divisible = True
        if isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature[name], divisible = f"tensordesc<{TYPES[value.base.dtype][1:]}[{block}]>", False
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name], divisible = "fp32", False
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            divisible = value % 16 == 0 and name not in unspecialized
        if divisible and not kernel.params[position].do_not_specialize_on_alignment:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@cache  # several cases share a kernel
def resources(cubin, has_products):
    """Registers, stack and spill instructions of a compiled kernel, and what its products are made of.

    The machine code, which takes long to read, is left alone where there are no products and no stack to spill to.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def read(tool, *flags):
            return subprocess.run([TOOLS / tool, *flags, file.name], capture_output=True, text=True, check=True).stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+)", read("cuobjdump", "--dump-resource-usage"))
        found = {"registers": int(usage[1]), "stack_bytes": int(usage[2]), "spills": 0, "spills_in_matrix_loops": 0}
        if not has_products and not found["stack_bytes"]:
            return found
        sass = read("nvdisasm", "--print-code")
    loops = matrix_loops(sass.splitlines())
    return {
        **found,
        "spills": len(SPILL.findall(sass)),
        "spills_in_matrix_loops": sum(len(SPILL.findall(loop)) for loop in loops),
        "warpgroup_starts_in_matrix_loops": max((len(WARPGROUP_START.findall(loop)) for loop in loops), default=0),
        "exponentials_in_matrix_loops": max((len(EXPONENTIAL.findall(loop)) for loop in loops), default=0),
        "async_copies": len(re.findall(r"\bLDGSTS\b", sass)),
        "wgmma": len(re.findall(r"\bHGMMA\b", sass)),
        "mma": len(re.findall(r"\bHMMA\b", sass)),
        "bulk_copies": len(re.findall(r"\bUTMALDG\b", sass)),
        "tcgen05": len(re.findall(r"\bUTCHMMA\b", sass)),
    }


def accesses(ptx):
    """How many 16-byte and other accesses to global memory there are; an instruction each, in machine code too."""
    loads, stores = (re.findall(rf"\b{word}\.global\S*", ptx) for word in ("ld", "st"))
    wide_loads, wide_stores = (sum(x.endswith((".v4.b32", ".v2.b64")) for x in found) for found in (loads, stores))
    return {"wide_loads": wide_loads, "wide_stores": wide_stores, "narrow_stores": len(stores) - wide_stores}


SPILL = re.compile(r"\b(?:STL|LDL)\b")
EXPONENTIAL = re.compile(r"\bMUFU\.EX2\b")
WARPGROUP_START = re.compile(r"\bWARPGROUP\.ARRIVE\b")
MATRIX = re.compile(r"\b(?:HGMMA|HMMA|UTCHMMA)\b")


def matrix_loops(lines):
    """The innermost loops that issue matrix instructions: what a kernel pays for each tile."""
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"\s*(\.L_\w+):", line))}
    branches = [(i, re.search(r"BRA.*?`\((\.L_\w+)\)", line)) for i, line in enumerate(lines)]
    loops = [(labels[m[1]], i) for i, m in branches if m and labels.get(m[1], i) < i]
    loops = [(lo, hi) for lo, hi in loops if any(MATRIX.search(line) for line in lines[lo:hi])]
    inner = [a for a in loops if not any(a[0] <= b[0] and b[1] <= a[1] and a != b for b in loops)]
    return ["\n".join(lines[lo:hi]) for lo, hi in inner]


def attention_launches(every):
    """Without `every`, weights and groups are left out in kinds that are much like another with them."""
    for dtype, head_dim, shift, mass, *how in [
        (torch.bfloat16, 128, False, False), (torch.bfloat16, 128, True, False), (torch.bfloat16, 128, False, True),
        (torch.bfloat16, 128, False, True, "pointers"),
        (torch.bfloat16, 128, True, True), (torch.bfloat16, 128, True, False, "all"),
        (torch.bfloat16, 64, False, False), (torch.bfloat16, 64, True, True), (torch.float16, 128, False, False),
        (torch.float32, 128, False, False), (torch.float32, 64, True, True),
        (torch.bfloat16, 128, False, False, "weights"), (torch.bfloat16, 128, True, False, "weights"),
        (torch.bfloat16, 128, False, True, "weights"), (torch.bfloat16, 128, False, True, "weights", "pointers"),
        (torch.bfloat16, 128, True, True, "weights"), (torch.bfloat16, 64, True, True, "weights"),
        (torch.bfloat16, 128, True, True, "weights", "grouped"),
        *([
            (torch.bfloat16, 128, True, False, "weights", "all"), (torch.bfloat16, 64, False, False, "weights"),
            (torch.float16, 128, False, False, "weights"), (torch.float32, 128, False, False, "weights"),
            (torch.float32, 64, True, True, "weights"), (torch.bfloat16, 128, False, False, "grouped"),
        ] if every else []),
    ]:  # fmt: skip
        q = torch.empty(4680, 40, head_dim, dtype=dtype, device="meta")
        pool = torch.empty(50_000, 80, head_dim, dtype=dtype, device="meta")
        pool = pool[:, ::2] if "pointers" in how else pool[:, :40]  # every other head: not for the copy engine
        pool = pool[:, :8] if "grouped" in how else pool
        shapes = ((400, 2), (400 * 128, 2), (401, 4), (1,))
        tables = [torch.empty(shape, dtype=torch.int32, device="meta") for shape in shapes]
        time = head_dim // 2 - 2 * (head_dim // 6)  # pairs that turn: 22 or 12, as in Rope3D; else all
        turns = torch.empty(400, head_dim // 2 if "all" in how else time, 2, device="meta")
        weights = torch.empty(400, device="meta")
        lse = torch.empty(40, 4680, device="meta") if mass else None
        share = torch.empty(40, 9, device="meta") if mass else None
        yield (
            " ".join([f"{str(dtype)[6:]} {head_dim}{' shift' * shift}{' mass' * mass}", *how]),
            partial(
                segment_attention.segment_attention, q, pool, pool, *tables, turns, weights, q, lse, share,
                scale=0.1, has_shift=shift, has_weight="weights" in how,
            ),
        )  # fmt: skip


def participation_launches():
    for dtype, head_dim, shift, weight, *how in [
        (torch.bfloat16, 128, False, False), (torch.bfloat16, 128, True, True, "grouped"),
        (torch.float16, 64, True, False), (torch.bfloat16, 128, True, False, "all"), (torch.float32, 128, True, True),
    ]:  # fmt: skip
        q = torch.empty(4680, 40, head_dim, dtype=dtype, device="meta")
        pool = torch.empty(50_000, 8 if "grouped" in how else 40, head_dim, dtype=dtype, device="meta")
        shapes = ((400, 2), (400 * 128, 2), (401, 4), (1,))
        tables = [torch.empty(shape, dtype=torch.int32, device="meta") for shape in shapes]
        time = head_dim // 2 if "all" in how else head_dim // 2 - 2 * (head_dim // 6)
        fp32 = dict(dtype=torch.float32, device="meta")
        turns, weights = torch.empty(400, time, 2, **fp32), torch.empty(400, **fp32)
        yield (
            " ".join([f"{str(dtype)[6:]} {head_dim}{' shift' * shift}{' weights' * weight}", *how]),
            partial(
                participation.participation, q, pool, *tables, turns, weights, torch.empty(40, 4680, **fp32),
                torch.empty(40, 32_760, **fp32), scale=0.1, has_shift=shift, has_weight=weight,
            ),
        )  # fmt: skip


def gather_launches():
    for dtype, head_dim, shift in [
        (torch.bfloat16, 128, False), (torch.bfloat16, 128, True), (torch.float16, 64, True), (torch.float32, 128, True)
    ]:  # fmt: skip
        pool = torch.empty(50_000, 40, head_dim, dtype=dtype, device="meta")
        gathered = torch.empty(400 * 128, 40, head_dim, dtype=dtype, device="meta")
        shapes = ((400, 2), (400 * 128, 2), (401, 4))
        tables = [torch.empty(shape, dtype=torch.int32, device="meta") for shape in shapes]
        turns = torch.empty(400, head_dim // 2 - 2 * (head_dim // 6), 2, device="meta")
        lengths = torch.empty(2, 2, dtype=torch.int32, device="meta")
        yield (
            f"{str(dtype)[6:]} {head_dim}{' shift' * shift}",
            partial(
                gather_window.gather_window, pool, pool, *tables, turns, gathered, gathered, lengths, q_len=4680,
                has_shift=shift,
            ),
        )  # fmt: skip


def append_launches():
    for dtype, heads, kv_heads, head_dim, weight, rope in [
        (torch.bfloat16, 40, 40, 128, True, True), (torch.bfloat16, 12, 12, 128, True, True),
        (torch.float16, 16, 16, 64, False, True), (torch.float32, 40, 40, 128, True, False),
        (torch.bfloat16, 40, 8, 128, True, True),
    ]:  # fmt: skip
        q = torch.empty(4680, heads * head_dim, dtype=dtype, device="meta")
        k = torch.empty(4680, kv_heads * head_dim, dtype=dtype, device="meta")
        pool = torch.empty(9999, kv_heads, head_dim, dtype=dtype, device="meta")
        table = torch.empty(52, head_dim // 2, 2, device="meta") if rope else None
        # Both ways of saying where: on the device, as WorldMemory does, and as a number.
        first_row = torch.empty(1, dtype=torch.int64, device="meta") if weight else 4736
        yield (
            f"{str(dtype)[6:]} {heads} over {kv_heads}x{head_dim}{' norm' * weight}{' rope' * rope}",
            partial(
                norm_rope_append.norm_rope_append, q, k, k, pool, pool, q.unflatten(1, (heads, head_dim)), table,
                first_row, grid=(3, 30, 52), pairs=(22, 21, 21) if head_dim == 128 else (12, 10, 10),
                q_weight=q[0] if weight else None, k_weight=k[0] if weight else None, eps=1e-6, round_before_rope=True,
            ),
        )  # fmt: skip


def compress_launches():
    for dtype, heads, head_dim, keep, rule, merge in [
        (torch.bfloat16, 40, 128, 390, "similarity", False), (torch.float32, 40, 128, 390, "similarity", False),
        (torch.bfloat16, 40, 128, 1560, "similarity", False), (torch.bfloat16, 40, 128, 390, "nearest", True),
        (torch.bfloat16, 12, 128, 390, "nearest", False), (torch.float16, 40, 64, 390, "nearest", True),
        (torch.float32, 40, 128, 390, "nearest", True),
    ]:  # fmt: skip
        # All layers of a chunk, as WorldMemory has them.
        pool = torch.empty(40, 50_000, heads, head_dim, dtype=dtype, device="meta")
        k, out = pool[:, :4680], pool[:, 4736 : 4736 + 1560 + 2 * keep]
        index = torch.empty(out.shape[:2], dtype=torch.int32, device="meta")
        yield (
            f"{str(dtype)[6:]} {heads}x{head_dim} keep {keep} {rule}{' merge' * merge}",
            partial(
                compress_chunk.compress_chunk, k, k, out, out, index, index if merge else None, frames=3, keep=keep,
                pooled=True, anchor=0, rule=rule, merge_above=0.9, scale=head_dim**-0.5,
            ),
        )  # fmt: skip


def quantize_launches():
    for dtype, heads, head_dim in [
        (torch.bfloat16, 40, 128), (torch.bfloat16, 24, 64), (torch.float16, 12, 128), (torch.float32, 40, 128),
    ]:  # fmt: skip
        k = torch.empty(40, 50_000, heads, head_dim, dtype=dtype, device="meta")[:, :2340]
        for bits, group_tokens in ((8, 64), (4, 64), (4, 32))[: 3 if (dtype, heads) == (torch.bfloat16, 40) else 2]:
            size = packed_bytes(2340, heads, head_dim, bits, dtype)
            size = size if group_tokens == 64 else size + 2 * (74 - 37) * heads * head_dim * dtype.itemsize
            packed = torch.empty(40, 2, size, dtype=torch.uint8, device="meta")
            options = dict(bits=bits, group_tokens=group_tokens)
            case = f"{str(dtype)[6:]} {heads}x{head_dim}{f' groups of {group_tokens}' * (bits == 4)}"
            yield case, partial(quantize_chunk.quantize_chunk, k, k, packed, **options)
            yield case, partial(quantize_chunk.dequantize_chunk, packed, k, k, **options)
            if heads == 40 and group_tokens == 64:
                # Six chunks of a layer of a bank.
                slots = torch.empty(6, 2432, heads, head_dim, dtype=dtype, device="meta")[:, :2340]
                bank = torch.empty(90, 40, 2, size, dtype=torch.uint8, device="meta")[:, 7]
                chosen = torch.empty(6, 2, dtype=torch.int32, device="meta")
                restored = partial(quantize_chunk.dequantize_chunk, bank, slots, slots, **options, chosen=chosen)
                yield f"{case} by a table", restored


def main(arch: int, every: bool) -> None:
    report = []
    for module in (segment_attention, compress_chunk, participation):
        module.device_capability = lambda device: (arch // 10, arch % 10)
    for launch_list in (
        partial(attention_launches, every), participation_launches, gather_launches, append_launches,
        compress_launches, quantize_launches,
    ):  # fmt: skip
        for case, launch in launch_list():
            with intercepted_launches() as launches:
                launch()
            for kernel, arguments, options in launches:
                binary = compiled(kernel, arguments, options, arch)
                has_products = kernel.__name__ in OF_PRODUCTS and "float32" not in case  # on the matrix unit
                found = {
                    **resources(binary.asm["cubin"], has_products),
                    **accesses(binary.asm["ptx"]),
                    "shared_bytes": binary.metadata.shared,
                }
                if "BLOCK_K" in arguments:
                    threads = 32 * options["num_warps"]
                    found["scores_a_thread"] = arguments["BLOCK_Q"] * arguments["BLOCK_K"] // threads
                report.append({"kernel": kernel.__name__, "case": case, **found})
                print(f"sm_{arch} {kernel.__name__} [{case}]: {found}", file=sys.stderr, flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main(int(sys.argv[1]), "--every" in sys.argv[2:])
