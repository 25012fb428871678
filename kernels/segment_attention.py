"""Attention over segments of a paged KV pool, read where they lie.

One program computes BLOCK_Q queries of one head. It walks the window's flat table of 128-row tiles:
first every full tile, which needs no mask, then the tail tiles, which do. Where a segment is shifted
in time, or its share of the softmax is wanted, the same walk goes segment by segment.

The window's tables (int32, on the device, see `worldkv_kernels.memory.window.Window`):
    tiles   [capacity, 2]      first pool row and number of valid rows (1..128) of each tile,
                               all full tiles first, then the tails, each in segment order
    ranges  [capacity + 1, 4]  full tiles lo, hi and tail tiles lo, hi; row 0 spans the whole window,
                               row 1 + s the segment s
    counts  [4]                number of segments, tiles, tokens, 0
    turns   [capacity, head_dim / 2, 2] fp32: per segment and rotary pair, the cosine and sine of the
                               angle by which a query is turned back for the segment's time shift

The online softmax is Milakov and Gimelshein's, arXiv 1805.02867, tiled as in FlashAttention-2,
arXiv 2307.08691.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

TILE_ROWS = 128


@triton.jit
def _turned_query(q_ptrs, turns_ptr, segment, mask_q, BLOCK_Q: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The original query tile times R(-shift), pair by pair."""
    PAIRS: tl.constexpr = HEAD_DIM // 2
    factors = turns_ptr + (segment * PAIRS + tl.arange(0, PAIRS)) * 2
    cos = tl.load(factors)[None, :]
    sin = tl.load(factors + 1)[None, :]
    q = tl.load(q_ptrs, mask=mask_q, other=0.0)
    real, imag = tl.split(q.reshape(BLOCK_Q, PAIRS, 2))
    real = real.to(tl.float32)
    imag = imag.to(tl.float32)
    turned_real = (real * cos + imag * sin).to(q.dtype)
    turned_imag = (imag * cos - real * sin).to(q.dtype)
    return tl.join(turned_real, turned_imag).reshape(BLOCK_Q, HEAD_DIM)


@triton.jit
def _attend_tile(
    q, row_max, row_sum, segment_sum, acc,
    k_ptr, v_ptr, tiles_ptr, step, last_step, tile_row,
    stride_k_row, stride_v_row, softmax_scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr, PER_SEGMENT_SUM: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = TILE // BLOCK_K
    tile = step // STEPS
    offset = (step % STEPS) * BLOCK_K
    first_row = tile_row.to(tl.int64) + offset
    # Carried to the next step: K and V can be fetched ahead only if their address is known ahead.
    next_tile_row = tl.load(tiles_ptr + tl.minimum(step + 1, last_step) // STEPS * 2)
    cols = tl.arange(0, BLOCK_K)
    dims = tl.arange(0, HEAD_DIM)
    # A 64-bit base and 32-bit offsets within the tile, which stay in registers over the loop.
    k_ptrs = (k_ptr + first_row * stride_k_row) + (cols[None, :] * stride_k_row + dims[:, None])
    v_ptrs = (v_ptr + first_row * stride_v_row) + (cols[:, None] * stride_v_row + dims[None, :])
    if MASKED:
        valid = tl.load(tiles_ptr + tile * 2 + 1) - offset
        k = tl.load(k_ptrs, mask=cols[None, :] < valid, other=0.0)  # [HEAD_DIM, BLOCK_K]
        v = tl.load(v_ptrs, mask=cols[:, None] < valid, other=0.0)  # [BLOCK_K, HEAD_DIM]
    else:
        k = tl.load(k_ptrs)
        v = tl.load(v_ptrs)

    scores = tl.dot(q, k, input_precision=PRECISION)  # [BLOCK_Q, BLOCK_K]
    if MASKED:
        scores = tl.where(cols[None, :] < valid, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * softmax_scale_log2)
    p = tl.math.exp2(scores * softmax_scale_log2 - new_max[:, None])
    rescale = tl.math.exp2(row_max - new_max)
    tile_sum = tl.sum(p, 1)
    row_sum = row_sum * rescale + tile_sum
    if PER_SEGMENT_SUM:
        segment_sum = segment_sum * rescale + tile_sum
    acc = acc * rescale[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return new_max, row_sum, segment_sum, acc, next_tile_row


@triton.jit(do_not_specialize=["q_len", "max_segments"])  # one compilation for every number of either
def segment_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, segment_lse_ptr, mass_ptr,
    tiles_ptr, ranges_ptr, counts_ptr, turns_ptr,
    q_len, softmax_scale_log2, max_segments,
    stride_q_token, stride_q_head, stride_k_row, stride_k_head, stride_v_row, stride_v_head,
    stride_out_token, stride_out_head,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_SHIFT: tl.constexpr, RETURN_LSE: tl.constexpr, RETURN_MASS: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # Where this program works. Blocks of one head run side by side, so its K and V stay in L2.
    block = tl.program_id(0)
    head = tl.program_id(1)
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    dims = tl.arange(0, HEAD_DIM)
    mask_q = rows[:, None] < q_len
    q_rows = q_ptr + head.to(tl.int64) * stride_q_head + rows[:, None].to(tl.int64) * stride_q_token
    q_ptrs = q_rows + dims[None, :]
    k_ptr += head.to(tl.int64) * stride_k_head
    v_ptr += head.to(tl.int64) * stride_v_head

    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, HEAD_DIM], tl.float32)
    STEPS: tl.constexpr = TILE // BLOCK_K
    if HAS_SHIFT or RETURN_MASS:
        first_range = 1
        last_range = 1 + tl.load(counts_ptr)
    else:
        first_range = 0
        last_range = 1
    if not HAS_SHIFT:
        q = tl.load(q_ptrs, mask=mask_q, other=0.0)

    # Walk the tiles, full ones first.
    for r in range(first_range, last_range):
        full_lo = tl.load(ranges_ptr + r * 4)
        full_hi = tl.load(ranges_ptr + r * 4 + 1)
        tail_lo = tl.load(ranges_ptr + r * 4 + 2)
        tail_hi = tl.load(ranges_ptr + r * 4 + 3)
        if HAS_SHIFT:
            q = _turned_query(q_ptrs, turns_ptr, r - 1, mask_q, BLOCK_Q, HEAD_DIM)
        segment_sum = tl.zeros([BLOCK_Q], tl.float32)
        tile_row = tl.load(tiles_ptr + full_lo * 2, mask=full_lo < full_hi, other=0)
        for step in range(full_lo * STEPS, full_hi * STEPS):
            row_max, row_sum, segment_sum, acc, tile_row = _attend_tile(
                q, row_max, row_sum, segment_sum, acc, k_ptr, v_ptr, tiles_ptr, step, full_hi * STEPS - 1, tile_row,
                stride_k_row, stride_v_row, softmax_scale_log2,
                HEAD_DIM, BLOCK_K, False, RETURN_MASS, PRECISION, TILE,
            )  # fmt: skip
        tile_row = tl.load(tiles_ptr + tail_lo * 2, mask=tail_lo < tail_hi, other=0)
        for step in range(tail_lo * STEPS, tail_hi * STEPS):
            row_max, row_sum, segment_sum, acc, tile_row = _attend_tile(
                q, row_max, row_sum, segment_sum, acc, k_ptr, v_ptr, tiles_ptr, step, tail_hi * STEPS - 1, tile_row,
                stride_k_row, stride_v_row, softmax_scale_log2,
                HEAD_DIM, BLOCK_K, True, RETURN_MASS, PRECISION, TILE,
            )  # fmt: skip
        if RETURN_MASS:
            segment_row = segment_lse_ptr + (head * max_segments + r - 1).to(tl.int64) * q_len
            if r - 1 < max_segments:  # a replayed graph may meet more segments than it was captured with
                tl.store(segment_row + rows, row_max + tl.math.log2(segment_sum), mask=rows < q_len)

    # Normalise and store.
    out = acc * (1.0 / row_sum)[:, None]
    out_rows = out_ptr + head.to(tl.int64) * stride_out_head + rows[:, None].to(tl.int64) * stride_out_token
    tl.store(out_rows + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=mask_q)
    lse = row_max + tl.math.log2(row_sum)
    if RETURN_LSE:
        LN_2: tl.constexpr = 0.6931471805599453
        tl.store(lse_ptr + head.to(tl.int64) * q_len + rows, lse * LN_2, mask=rows < q_len)
    if RETURN_MASS:
        # The same threads wrote these rows; the barrier makes that true of every layout.
        tl.debug_barrier()
        mass_rows = mass_ptr + head.to(tl.int64) * max_segments * tl.num_programs(0) + block
        with_mass = tl.minimum(last_range - first_range, max_segments)
        for segment in range(0, with_mass):
            segment_row = segment_lse_ptr + (head * max_segments + segment).to(tl.int64) * q_len
            share = tl.math.exp2(tl.load(segment_row + rows, mask=rows < q_len, other=float("-inf")) - lse)
            tl.store(mass_rows + segment * tl.num_programs(0), tl.sum(tl.where(rows < q_len, share, 0.0), 0))
        for segment in range(with_mass, max_segments):
            tl.store(mass_rows + segment * tl.num_programs(0), 0.0)


def device_capability(device: torch.device) -> tuple[int, int]:
    """Of the GPU; Hopper's for a CPU, where the interpreter takes any configuration."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@dataclass(frozen=True)
class AttentionConfig:
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


def attention_config(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, has_shift: bool, has_mass: bool
) -> AttentionConfig:
    """The launch configuration: the largest tiles and deepest pipeline that fit without spills, by compiling.

    Turning Q beside a [128, 128] accumulator takes registers that only smaller key tiles leave; what still spills
    is in tests/test_compile.py. No GPU has measured any of these yet.
    """
    if dtype == torch.float32:  # full precision has no matrix unit: FMA, small tiles
        return AttentionConfig(block_q=32, block_k=16 if capability[0] == 10 else 32, num_warps=8, num_stages=1)
    if capability[0] == 9:  # 224 of 227 KiB shared, or 160 where Q is turned
        if has_shift:
            return AttentionConfig(block_q=128, block_k=64, num_warps=8, num_stages=4)
        return AttentionConfig(block_q=128, block_k=128, num_warps=8, num_stages=3)
    if capability[0] == 10:
        if head_dim == 128 and (has_shift or has_mass):
            return AttentionConfig(block_q=128, block_k=32, num_warps=8, num_stages=4)
        return AttentionConfig(block_q=128, block_k=64, num_warps=8, num_stages=4)
    # 96 KiB shared also fits the 99 KiB of the consumer chips of compute capability 8 and 12.
    return AttentionConfig(block_q=128, block_k=32 if has_shift else 64, num_warps=8, num_stages=3)


def segment_attention(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    tiles: torch.Tensor,
    ranges: torch.Tensor,
    counts: torch.Tensor,
    turns: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    mass: torch.Tensor | None,
    *,
    scale: float,
    has_shift: bool,
) -> None:
    """Launch the kernel. Shapes as in the module's docstring; `mass` is [heads, num_segments].

    Whether Q is turned and how many segments have a mass is fixed here, also for the replays of a captured graph:
    a replay with more segments leaves out the mass of the later ones, and with fewer gives those zero.
    """
    q_len, heads, head_dim = q.shape
    config = attention_config(device_capability(q.device), q.dtype, head_dim, has_shift, mass is not None)
    num_blocks = triton.cdiv(q_len, config.block_q)
    segment_lse = block_mass = None
    max_segments = 0
    if mass is not None:
        max_segments = mass.shape[1]
        segment_lse = torch.empty((heads, max_segments, q_len), dtype=torch.float32, device=q.device)
        block_mass = torch.empty((heads, max_segments, num_blocks), dtype=torch.float32, device=q.device)
    segment_attention_kernel[(num_blocks, heads)](
        q, k_pool, v_pool, out, lse, segment_lse, block_mass,
        tiles, ranges, counts, turns,
        q_len, scale * 1.4426950408889634, max_segments,
        q.stride(0), q.stride(1), k_pool.stride(0), k_pool.stride(1), v_pool.stride(0), v_pool.stride(1),
        out.stride(0), out.stride(1),
        HEAD_DIM=head_dim, BLOCK_Q=config.block_q, BLOCK_K=config.block_k,
        HAS_SHIFT=has_shift, RETURN_LSE=lse is not None, RETURN_MASS=mass is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", TILE=TILE_ROWS,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    if mass is not None:
        torch.sum(block_mass, dim=2, out=mass)
        mass.div_(q_len)
