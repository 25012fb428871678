"""RMSNorm, 3D rotary embedding and the write into the KV pool, in one launch.

One program handles one token of one of q, k and v: it sums the squares over all heads, reads the row a
second time from L1, normalises, turns and stores it. q goes to a new tensor, k and v to their pool rows.

Norm as in Wan's qk-norm: in fp32 over all heads*head_dim numbers, rounded to the input's dtype, then
times the weight. Rotation of interleaved pairs (2i, 2i+1) by frame, row and column, as in RoFormer,
arXiv 2104.09864, with the pairs split among three axes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _store_row(
    x_ptr, weight_ptr, out_ptr, table_ptr, frame, row, col, eps,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    PAIRS_TIME: tl.constexpr, PAIRS_HEIGHT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_ROPE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    PAIRS: tl.constexpr = HEAD_DIM // 2
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    heads = tl.arange(0, BLOCK_HEADS)[:, None]
    dims = tl.arange(0, HEAD_DIM)[None, :]

    if HAS_WEIGHT:
        squares = tl.zeros([BLOCK_HEADS, HEAD_DIM], tl.float32)
        for first_head in tl.static_range(0, HEADS, BLOCK_HEADS):
            mask = first_head + heads < HEADS
            x = tl.load(x_ptr + (first_head + heads) * HEAD_DIM + dims, mask=mask, other=0.0).to(tl.float32)
            squares += x * x
        mean_square = tl.sum(tl.sum(squares, 1), 0) / (HEADS * HEAD_DIM)
        # A division keeps the last bit of 1 / sqrt, which rsqrt's approximation loses.
        rstd = 1.0 / tl.sqrt_rn(mean_square + eps)

    if HAS_ROPE:
        pairs = tl.arange(0, PAIRS)
        position = tl.where(pairs < PAIRS_TIME, frame, tl.where(pairs < PAIRS_TIME + PAIRS_HEIGHT, row, col))
        factors = table_ptr + (position * PAIRS + pairs) * 2
        cos = tl.load(factors)[None, :]
        sin = tl.load(factors + 1)[None, :]

    for first_head in tl.static_range(0, HEADS, BLOCK_HEADS):
        offsets = (first_head + heads) * HEAD_DIM + dims
        mask = first_head + heads < HEADS
        y = tl.load(x_ptr + offsets, mask=mask, other=0.0)
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0)
            y = y.to(tl.float32) * rstd
            if ROUND:
                y = y.to(DTYPE).to(tl.float32)
            y = y * weight.to(tl.float32)
            if ROUND and weight_ptr.dtype.element_ty == DTYPE:
                y = y.to(DTYPE)
        if HAS_ROPE:
            real, imag = tl.split(y.to(tl.float32).reshape(BLOCK_HEADS, PAIRS, 2))
            y = tl.join(real * cos - imag * sin, real * sin + imag * cos).reshape(BLOCK_HEADS, HEAD_DIM)
        tl.store(out_ptr + offsets, y.to(DTYPE), mask=mask)


@triton.jit(do_not_specialize=["first_row", "start_frame", "grid_height", "grid_width", "eps"])
def norm_rope_append_kernel(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, table_ptr, q_out_ptr, k_pool_ptr, v_pool_ptr,
    first_row, start_frame, grid_height, grid_width, eps,
    stride_q_token, stride_k_token, stride_v_token, stride_q_out_token, stride_k_pool_row, stride_v_pool_row,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    PAIRS_TIME: tl.constexpr, PAIRS_HEIGHT: tl.constexpr,
    HAS_Q_WEIGHT: tl.constexpr, HAS_K_WEIGHT: tl.constexpr, HAS_ROPE: tl.constexpr, ROUND: tl.constexpr,
    DEVICE_POSITION: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    tensor = tl.program_id(1)
    if DEVICE_POSITION:
        first_row = tl.load(first_row)
        start_frame = tl.load(start_frame).to(tl.int32)
    frame = start_frame + token // (grid_height * grid_width)
    row = (token // grid_width) % grid_height
    col = token % grid_width
    pool_row = first_row.to(tl.int64) + token
    token = token.to(tl.int64)
    if tensor == 0:
        _store_row(
            q_ptr + token * stride_q_token, q_weight_ptr, q_out_ptr + token * stride_q_out_token, table_ptr,
            frame, row, col, eps, HEADS, HEAD_DIM, BLOCK_HEADS, PAIRS_TIME, PAIRS_HEIGHT,
            HAS_Q_WEIGHT, HAS_ROPE, ROUND,
        )  # fmt: skip
    elif tensor == 1:
        _store_row(
            k_ptr + token * stride_k_token, k_weight_ptr, k_pool_ptr + pool_row * stride_k_pool_row, table_ptr,
            frame, row, col, eps, HEADS, HEAD_DIM, BLOCK_HEADS, PAIRS_TIME, PAIRS_HEIGHT,
            HAS_K_WEIGHT, HAS_ROPE, ROUND,
        )  # fmt: skip
    else:
        _store_row(
            v_ptr + token * stride_v_token, v_ptr, v_pool_ptr + pool_row * stride_v_pool_row, table_ptr,
            frame, row, col, eps, HEADS, HEAD_DIM, BLOCK_HEADS, PAIRS_TIME, PAIRS_HEIGHT,
            False, False, ROUND,
        )  # fmt: skip


def heads_per_step(heads: int, head_dim: int) -> int:
    """How many heads a program handles at once: 1024 numbers keep 128 threads at 16 bytes each."""
    return min(triton.next_power_of_2(heads), 1024 // head_dim)


def norm_rope_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    q_out: torch.Tensor,
    table: torch.Tensor | None,
    first_row: int | torch.Tensor,
    start_frame: int | torch.Tensor,
    *,
    grid: tuple[int, int, int],
    pairs: tuple[int, int, int],
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    round_before_rope: bool,
) -> None:
    """Launch the kernel. q, k, v are [tokens, heads * head_dim]; `table` is [positions, head_dim / 2, 2]."""
    tokens = q.shape[0]
    _, heads, head_dim = k_pool.shape
    norm_rope_append_kernel[(tokens, 3)](
        q, k, v, q_weight, k_weight, table, q_out, k_pool, v_pool,
        first_row, start_frame, grid[1], grid[2], eps,
        q.stride(0), k.stride(0), v.stride(0), q_out.stride(0), k_pool.stride(0), v_pool.stride(0),
        HEADS=heads, HEAD_DIM=head_dim, BLOCK_HEADS=heads_per_step(heads, head_dim),
        PAIRS_TIME=pairs[0], PAIRS_HEIGHT=pairs[1],
        HAS_Q_WEIGHT=q_weight is not None, HAS_K_WEIGHT=k_weight is not None,
        HAS_ROPE=table is not None, ROUND=round_before_rope,
        DEVICE_POSITION=isinstance(first_row, torch.Tensor), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
