# SPDX-License-Identifier: Apache-2.0
"""A window's K and V, gathered from the pool into two dense tensors, for attention kernels that read dense ones.

One program copies BLOCK_ROWS rows of one head: those of the full tiles first, then those that segments leave over, as
the window's tables name them. A key is turned on the way where its segment is shifted in time. How many rows there are
only the device knows: it is written beside them, as the cumulative lengths that variable-length attention takes. Rows
behind the last are zeroed up to the end of their tile and of the next, since kernels load whole tiles, and a weight of
zero does not undo a NaN.

The tables (int32, on the device) are those of segment_attention.py: tiles [capacity, 2], tail_rows [128 * capacity, 2],
ranges [capacity + 1, 4], of which the first row is the whole window's, and turns fp32 [capacity, pairs, 2].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE_ROWS = 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _turned_keys(
    k_ptrs, turns_ptr, segments, mask, BLOCK_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, TURNED_PAIRS: tl.constexpr
):
    """Keys times R(shift), pair by pair, rounded once."""
    PAIRS: tl.constexpr = HEAD_DIM // 2
    pairs = tl.arange(0, PAIRS)[None, :]
    factors = turns_ptr + (segments[:, None] * TURNED_PAIRS + pairs) * 2
    turning = mask & (pairs < TURNED_PAIRS)
    cos = tl.load(factors, mask=turning, other=1.0)
    sin = tl.load(factors + 1, mask=turning, other=0.0)
    k = tl.load(k_ptrs, mask=mask, other=0.0)
    real, imag = tl.split(k.reshape(BLOCK_ROWS, PAIRS, 2))
    real = real.to(tl.float32)
    imag = imag.to(tl.float32)
    turned_real = (real * cos - imag * sin).to(k.dtype)
    turned_imag = (imag * cos + real * sin).to(k.dtype)
    return tl.join(turned_real, turned_imag).reshape(BLOCK_ROWS, HEAD_DIM)


@triton.jit
def gather_window_kernel(
    k_ptr, v_ptr, tiles_ptr, tail_rows_ptr, ranges_ptr, turns_ptr, k_out_ptr, v_out_ptr, lengths_ptr,
    q_len, stride_k_row, stride_k_head, stride_v_row, stride_v_head, stride_out_row,
    HEAD_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, HAS_SHIFT: tl.constexpr, TURNED_PAIRS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    head = tl.program_id(1)
    num_full_rows = tl.load(ranges_ptr + 1) * TILE
    num_rows = num_full_rows + tl.load(ranges_ptr + 3)
    if (block == 0) & (head == 0):
        tl.store(lengths_ptr, 0)
        tl.store(lengths_ptr + 1, q_len)
        tl.store(lengths_ptr + 2, 0)
        tl.store(lengths_ptr + 3, num_rows)
    end = (tl.cdiv(num_rows, TILE) + 1) * TILE  # the grid ends with the tensors
    if block * BLOCK_ROWS >= end:
        return

    # Which row of the pool each one is, and of which segment.
    rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_full = rows < num_full_rows
    is_tail = (rows >= num_full_rows) & (rows < num_rows)
    tile_ptrs = tiles_ptr + rows // TILE * 2
    tail_ptrs = tail_rows_ptr + (rows - num_full_rows) * 2
    from_tile = tl.load(tile_ptrs, mask=is_full, other=0) + rows % TILE
    pool_rows = tl.where(is_full, from_tile, tl.load(tail_ptrs, mask=is_tail, other=0)).to(tl.int64)

    dims = tl.arange(0, HEAD_DIM)[None, :]
    mask = (rows < num_rows)[:, None]
    k_ptrs = k_ptr + pool_rows[:, None] * stride_k_row + head.to(tl.int64) * stride_k_head + dims
    v_ptrs = v_ptr + pool_rows[:, None] * stride_v_row + head.to(tl.int64) * stride_v_head + dims
    if HAS_SHIFT:
        of_tail = tl.load(tail_ptrs + 1, mask=is_tail, other=0)
        segments = tl.where(is_full, tl.load(tile_ptrs + 1, mask=is_full, other=0), of_tail)
        k = _turned_keys(k_ptrs, turns_ptr, segments, mask, BLOCK_ROWS, HEAD_DIM, TURNED_PAIRS)
    else:
        k = tl.load(k_ptrs, mask=mask, other=0.0)
    v = tl.load(v_ptrs, mask=mask, other=0.0)
    out = rows.to(tl.int64)[:, None] * stride_out_row + head * HEAD_DIM + dims
    mask_out = (rows < end)[:, None]
    tl.store(k_out_ptr + out, k, mask=mask_out)
    tl.store(v_out_ptr + out, v, mask=mask_out)


def gather_window(
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    tiles: torch.Tensor,
    tail_rows: torch.Tensor,
    ranges: torch.Tensor,
    turns: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    *,
    q_len: int,
    has_shift: bool,
) -> None:
    """Gather the rows of a window's segments: full tiles of 128 in segment order, then what segments leave over.

    Args:
        k_pool, v_pool: [rows, heads, head_dim], bf16, fp16 or fp32, head_dim 64 or 128, dense in head_dim. Rows outside
            the window never reach the result.
        tiles, tail_rows, ranges, turns: the window's tables, contiguous, as in the module's docstring.
        k, v: where to write, [128 * capacity, heads, head_dim] with the pools' dtype, contiguous. Of n rows of the
            window the first n are written, and zeros up to the end of the n-th one's tile and of the next; the rest
            is left as it is.
        lengths: int32 [2, 2], contiguous, written: (0, q_len) and (0, n).
        has_shift: whether keys are turned, each by its segment's shift, and rounded once; `turns` is not read
            otherwise.

    Deterministic; allocates nothing and does not synchronise, so a captured graph gathers another window when its
    tables are rewritten in place. All tensors are on one GPU, which is the current one. Raises ValueError or TypeError,
    before the launch, on shapes, dtypes and strides other than these. Undefined, since not looked at: tables that name
    rows outside the pool, and outputs that overlap each other or an input.
    """
    _check_tensors(
        k_pool=k_pool, v_pool=v_pool, tiles=tiles, tail_rows=tail_rows, ranges=ranges, turns=turns, k=k, v=v,
        lengths=lengths,
    )  # fmt: skip
    shape = k_pool.shape
    if len(shape) != 3 or shape[2] not in (64, 128) or v_pool.shape != shape:
        raise ValueError(_wrong("k_pool and v_pool", "[rows, heads, head_dim] with head_dim 64 or 128", k_pool, v_pool))
    if k_pool.dtype not in DTYPES or not k_pool.dtype is v_pool.dtype is k.dtype is v.dtype:
        wanted = f"of one dtype of {', '.join(map(str, DTYPES))}"
        raise TypeError(_wrong("k_pool, v_pool, k and v", wanted, *(x.dtype for x in (k_pool, v_pool, k, v))))
    if not k_pool.stride(2) == v_pool.stride(2) == 1:
        raise ValueError(_wrong("k_pool and v_pool", "dense in head_dim", k_pool, v_pool))
    _, heads, head_dim = shape
    capacity = tiles.shape[0]
    if not all(x.dtype is torch.int32 and x.is_contiguous() for x in (tiles, tail_rows, ranges, lengths)) or not (
        tiles.shape == (capacity, 2) and tail_rows.shape == (TILE_ROWS * capacity, 2)
        and ranges.shape == (capacity + 1, 4) and lengths.shape == (2, 2)
    ):  # fmt: skip
        wanted = "torch.int32 [capacity, 2], [128 * capacity, 2], [capacity + 1, 4] and [2, 2], contiguous"
        raise ValueError(_wrong("tiles, tail_rows, ranges and lengths", wanted, tiles, tail_rows, ranges, lengths))
    if not k.shape == v.shape == (TILE_ROWS * capacity, heads, head_dim) or not (
        k.is_contiguous() and v.is_contiguous()
    ):
        raise ValueError(_wrong("k and v", f"[{TILE_ROWS * capacity}, {heads}, {head_dim}], contiguous", k, v))
    turned_pairs = turns.shape[1] if has_shift and turns.dim() == 3 else 0
    if has_shift and not (
        turns.shape == (capacity, turned_pairs, 2) and 1 <= turned_pairs <= head_dim // 2
        and turns.dtype is torch.float32 and turns.is_contiguous()
    ):  # fmt: skip
        wanted = f"torch.float32 [{capacity}, 1 to {head_dim // 2} pairs, 2], contiguous"
        raise ValueError(_wrong("turns", wanted, turns))
    block_rows = 32 if has_shift or k_pool.dtype is torch.float32 else 64  # at most 100 registers or so
    gather_window_kernel[(TILE_ROWS * capacity // block_rows, heads)](
        k_pool, v_pool, tiles, tail_rows, ranges, turns, k, v, lengths, q_len,
        k_pool.stride(0), k_pool.stride(1), v_pool.stride(0), v_pool.stride(1), heads * head_dim,
        HEAD_DIM=head_dim, BLOCK_ROWS=block_rows, HAS_SHIFT=has_shift, TURNED_PAIRS=turned_pairs, TILE=TILE_ROWS,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def _wrong(what: str, wanted: str, *got: object) -> str:
    came = [f"{list(x.shape)} {x.dtype}, stride {x.stride()}" if isinstance(x, torch.Tensor) else repr(x) for x in got]
    if len(got) > 1:
        came = [f"{name} {x}" for name, x in zip(what.replace(" and ", ", ").split(", "), came, strict=True)]
    return f"gather_window: {what} must be {wanted}, got {'; '.join(came)}"


def _check_tensors(**tensors: object) -> None:
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(_wrong(name, "a tensor", x))
