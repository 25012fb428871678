"""A Triton kernel that reads pinned host memory over the link, for the prefetch bench."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096  # numbers one program copies: 8 KiB in bf16


@triton.jit
def read_pinned_kernel(source, target, size, BLOCK: tl.constexpr):
    # int64, since a bank passes 2**31 numbers.
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    tl.store(target + offsets, tl.load(source + offsets, mask=mask), mask=mask)


def read_pinned(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy with the device's processors instead of its copy engine; both contiguous and of one shape."""
    size = source.numel()
    read_pinned_kernel[(triton.cdiv(size, BLOCK),)](source, target, size, BLOCK=BLOCK)
