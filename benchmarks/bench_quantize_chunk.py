"""quantize_chunk and dequantize_chunk against the same in eager PyTorch, of all layers of a model in a call; and of
chunks of one layer that a table chooses.

The floor is what is read and written, at the rate of a copy. Every number that comes back has to be within half a step
of the one that was packed, for the rival as for ours.

    python benchmarks/bench_quantize_chunk.py [--small] [--jsonl FILE] [--device DEVICE]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import Problem, Variant, bench_main, dtype_name, ours, parse_device, run_cases, worst
from shapes import DTYPE, HEAD_DIM, HEADS, one_of, read_shape, up_to, whole
from timing import Run, l2_bytes, sets_for

from worldkv_kernels import dequantize_chunk, quantize_chunk
from worldkv_kernels.ops.quantize_chunk import GROUP_TOKENS, packed_bytes

TILE_ROWS = 128  # of which the slots are multiples that chosen chunks are restored into
SPARE = 2  # places of a bank before those that a table names
DIGITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}  # of a significand

Packed = Sequence[torch.Tensor]


@dataclass(frozen=True)
class QuantizeCase:
    """A chunk of so many layers and tokens, which are packed, or restored; with `chunks`, so many chunks of one layer,
    which are restored by a table into slots."""

    tokens: int
    heads: int
    bits: int
    op: str = "quantize"
    layers: int = 1
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    chunks: int = 0

    def __str__(self) -> str:
        layers = f"{self.layers} layers of " if self.layers > 1 else ""
        if self.chunks:
            layers = f"{self.chunks} chunks of one layer, by a table, of "
        dtype = f", {dtype_name(self.dtype)}" * (self.dtype != torch.bfloat16)
        return f"{self.op}, {self.bits} bits, {layers}{self.tokens} tokens x {self.heads} x {self.head_dim}{dtype}"

    @property
    def sizes(self) -> dict[str, Any]:
        """Of the op."""
        return {"tokens": self.tokens, "heads": self.heads, "head_dim": self.head_dim, "dtype": self.dtype}

    @property
    def packed_bytes(self) -> int:
        """Of K or V of a layer."""
        return packed_bytes(self.tokens, self.heads, self.head_dim, self.bits, self.dtype)

    @property
    def num_bytes(self) -> int:
        """K and V of all layers or chunks once, and what is packed of them once."""
        chunk = self.tokens * self.heads * self.head_dim * self.dtype.itemsize
        return 2 * (self.chunks or self.layers) * (chunk + self.packed_bytes)

    @property
    def needed_bytes(self) -> int:
        """What it takes on the device, about: two sets, K and V restored, and what the rival makes in fp32."""
        chunk = self.layers * self.tokens * self.heads * self.head_dim
        return 2 * self.num_bytes + 2 * chunk * self.dtype.itemsize + 4 * 4 * chunk


CASES = [
    *(QuantizeCase(2340, 40, bits, op, layers=40) for bits in (8, 4) for op in ("quantize", "dequantize")),
    *(QuantizeCase(1320, 12, bits, op, layers=30) for bits in (8, 4) for op in ("quantize", "dequantize")),
    *(QuantizeCase(2340, 40, 4, op) for op in ("quantize", "dequantize")),
    *(QuantizeCase(2340, 24, 8, op, 30, 64, torch.float16) for op in ("quantize", "dequantize")),
    *(QuantizeCase(2340, 40, bits, "dequantize", chunks=6) for bits in (8, 4)),
    *(QuantizeCase(1320, 12, bits, "dequantize", chunks=6) for bits in (8, 4)),
]
SMALL_CASES = [
    *(QuantizeCase(70, 2, bits, op, layers=2) for bits in (8, 4) for op in ("quantize", "dequantize")),
    QuantizeCase(9, 3, 4, head_dim=64, dtype=torch.float16),
    *(QuantizeCase(70, 2, bits, "dequantize", chunks=3) for bits in (8, 4)),
]

# Of --shape.
KEYS = {
    "tokens": whole, "heads": HEADS, "head_dim": HEAD_DIM, "bits": one_of({"8": 8, "4": 4}),
    "op": one_of({"quantize": "quantize", "dequantize": "dequantize"}), "layers": up_to(65535), "dtype": DTYPE,
}  # fmt: skip


def case_of(shape: str) -> QuantizeCase:
    """The case of a --shape. Raises ValueError that names the key at fault."""
    defaults = {"head_dim": 128, "op": "quantize", "layers": 1, "dtype": torch.bfloat16}
    return QuantizeCase(**read_shape(shape, KEYS, defaults))


def eager_eight(x: torch.Tensor) -> Packed:
    """Codes and scales of [layers, tokens, heads, head_dim]."""
    wide = x.float()
    scale = (wide.abs().amax(dim=-1, keepdim=True) / 127).to(x.dtype)
    return (wide / scale.float()).round_().clamp_(-127, 127).to(torch.int8), scale


def eager_four(x: torch.Tensor) -> Packed:
    """Codes, scales and minima of the whole groups, then of what is left; codes of two channels in a byte."""
    tokens = x.shape[1] // GROUP_TOKENS * GROUP_TOKENS
    parts = []
    for part, size in ((x[:, :tokens], GROUP_TOKENS), (x[:, tokens:], x.shape[1] - tokens)):
        if part.shape[1]:
            wide = part.unflatten(1, (-1, size)).float()
            low, high = wide.aminmax(dim=2, keepdim=True)
            scale = ((high - low) / 15).to(x.dtype)
            codes = ((wide - low) / scale.float()).round_().clamp_(0, 15).to(torch.uint8)
            parts += [codes[..., 0::2] | codes[..., 1::2] << 4, scale, low.to(x.dtype)]
    return tuple(parts)


def eager_restored(packed: Packed, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """[layers, tokens, heads, head_dim] of what the two above give."""
    if bits == 8:
        codes, scale = packed
        return (codes.float() * scale.float()).to(dtype)
    restored = []
    for pairs, scale, low in zip(packed[0::3], packed[1::3], packed[2::3], strict=True):
        codes = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2)
        restored.append((codes.float() * scale.float() + low.float()).to(dtype).flatten(1, 2))
    return torch.cat(restored, dim=1)


def step_error(case: QuantizeCase, x: torch.Tensor, restored: torch.Tensor) -> float:
    """Of a layer, 0 where every number is within half a step, as wide as a rounded scale may make it, and the rounding
    of the result; else by how many times that the worst is off; NaN where a number is none."""
    x, restored = x.double(), restored.double()
    if case.bits == 8:
        step = x.abs().amax(dim=-1, keepdim=True) / 127
    else:
        groups = [part.amax(dim=0) - part.amin(dim=0) for part in x.split(GROUP_TOKENS)]
        group = torch.arange(len(x), dtype=torch.int64, device=x.device) // GROUP_TOKENS
        step = torch.stack(groups)[group] / 15
    rounding = 2.0 ** -DIGITS[case.dtype]
    limit = step / 2 * (1 + 2 * rounding + 2.0**-16) + (rounding + 2.0**-24) * restored.abs()
    off = ((restored - x).abs() / limit.clamp_min(1e-300)).amax().item()
    return 0.0 if off <= 1 else off


def variants_of(case: QuantizeCase, device: torch.device) -> dict[str, bool]:
    """The names of a case's variants, and whether each is a rival, without making any."""
    return {**dict.fromkeys(ours("quantize_chunk", device), False), "eager": True}


def prepare(case: QuantizeCase, device: torch.device) -> Problem:
    """K and V of all layers in every input set, packed or with room for it, and for the rival in tensors of its own.

    Of chosen chunks the first is in the second place that the table names, and so on, the last in the first.
    """
    sets = sets_for(case.num_bytes, l2_bytes(device))
    generator = torch.Generator(device=device).manual_seed(0)
    count = case.chunks or case.layers
    shape = (2, count, case.tokens, case.heads, case.head_dim)
    first, rows, chosen, order = 0, case.tokens, None, None
    if case.chunks:
        first, rows = SPARE, -(-case.tokens // TILE_ROWS) * TILE_ROWS
        order = torch.arange(1, count + 1, dtype=torch.int64, device=device) % count
        chosen = torch.stack([order + first, torch.full_like(order, case.tokens)], dim=1).int()
    chunks, packed, outs = [], [], []
    for _ in range(sets):
        random = torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
        chunks.append(random.to(case.dtype))
        packed.append(torch.full((first + count, 2, case.packed_bytes), 255, dtype=torch.uint8, device=device))
        if case.op == "dequantize":
            in_places = chunks[-1] if order is None else chunks[-1].roll(1, 1)
            quantize_chunk(*in_places, bits=case.bits, out=packed[-1][first:])
            outs.append(torch.empty((2, count, rows, *shape[3:]), dtype=case.dtype, device=device)[:, :, : case.tokens])
    eager = eager_eight if case.bits == 8 else eager_four

    def check(restore: Callable[[Any], Iterable[torch.Tensor]], run: Run) -> float:
        if case.op == "quantize":
            packed[0].fill_(255)
        else:
            outs[0].fill_(math.nan)
        restored = restore(run(0))
        return worst(
            step_error(case, *layer)
            for x, got in zip(chunks[0], restored, strict=True)
            for layer in zip(x, got, strict=True)
        )

    def our_run(backend: str) -> Run:
        if case.op == "quantize":
            return lambda i: quantize_chunk(*chunks[i], bits=case.bits, out=packed[i], backend=backend)
        return lambda i: dequantize_chunk(
            packed[i], bits=case.bits, out_k=outs[i][0], out_v=outs[i][1], chosen=chosen, backend=backend
        )

    def our_restored(result: torch.Tensor) -> Iterable[torch.Tensor]:
        return dequantize_chunk(result, bits=case.bits, **case.sizes, backend="reference")

    def rival() -> Run:
        if case.op == "quantize":
            return lambda i: [eager(x) for x in chunks[i]]
        if order is None:
            made = [[eager(x) for x in chunk] for chunk in chunks]
            return lambda i: [eager_restored(x, case.bits, case.dtype) for x in made[i]]
        made = [[eager(x.roll(1, 0)) for x in chunk] for chunk in chunks]
        return lambda i: [eager_restored([part[order] for part in x], case.bits, case.dtype) for x in made[i]]

    def rival_restored(result: Sequence[Packed]) -> Iterable[torch.Tensor]:
        return [eager_restored(x, case.bits, case.dtype) for x in result]

    back = case.op == "dequantize"
    variants = [
        Variant(name, partial(our_run, name), partial(check, list if back else our_restored), 0.0, case.num_bytes)
        for name in ours("quantize_chunk", device)
    ]
    checked = partial(check, list if back else rival_restored)
    variants.append(Variant("eager", rival, checked, 0.0, case.num_bytes, rival=True))
    shape = {"heads": case.heads, "tokens": case.tokens, "layers": case.layers, "bits": case.bits}
    shape |= {"head_dim": case.head_dim, "dtype": dtype_name(case.dtype)}
    if case.chunks:
        shape["chunks"] = case.chunks
    return Problem(str(case), variants, sets=sets, shape=shape)


def run(
    *,
    small: bool = False,
    device: torch.device | None = None,
    seconds: float = 1.0,
    jsonl_path: str | None = None,
    cases: Sequence[QuantizeCase] | None = None,
    only: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Measure the cases and return the figures, as `common.run_cases` does."""
    return run_cases(
        "quantize_chunk", cases or (SMALL_CASES if small else CASES), prepare, device or parse_device(None),
        small=small, seconds=seconds, jsonl_path=jsonl_path, only=only,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return bench_main("quantize_chunk", argv)


if __name__ == "__main__":
    sys.exit(main())
