# SPDX-License-Identifier: Apache-2.0
"""RMSNorm, 3D rotary embedding and the write into the KV pool, in one launch.

One program handles one token of one of q, k and v: it sums the squares over all heads, reads the row a
second time from L1, normalises, turns and stores it. q goes to a new tensor, k and v to their pool rows.
k and v may have fewer heads.

Norm as in Wan's qk-norm: in fp32 over all numbers of a row, rounded to the input's dtype, then
times the weight. Rotation of interleaved pairs (2i, 2i+1) by frame, row and column, as in RoFormer,
arXiv 2104.09864, with the pairs split among three axes.
"""

from __future__ import annotations

import math
from functools import cache
from numbers import Real

import torch
import triton
import triton.language as tl

MAX_HEADS = 128  # more are tokens, of tensors with heads first
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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


@triton.jit(do_not_specialize=["first_row", "grid_height", "grid_width", "eps"])
def norm_rope_append_kernel(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, table_ptr, q_out_ptr, k_pool_ptr, v_pool_ptr,
    first_row, grid_height, grid_width, eps,
    stride_q_token, stride_k_token, stride_v_token, stride_q_out_token, stride_k_pool_row, stride_v_pool_row,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_KV_HEADS: tl.constexpr,
    PAIRS_TIME: tl.constexpr, PAIRS_HEIGHT: tl.constexpr,
    HAS_Q_WEIGHT: tl.constexpr, HAS_K_WEIGHT: tl.constexpr, HAS_ROPE: tl.constexpr, ROUND: tl.constexpr,
    DEVICE_ROW: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    tensor = tl.program_id(1)
    if DEVICE_ROW:
        first_row = tl.load(first_row)
    frame = token // (grid_height * grid_width)
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
            frame, row, col, eps, KV_HEADS, HEAD_DIM, BLOCK_KV_HEADS, PAIRS_TIME, PAIRS_HEIGHT,
            HAS_K_WEIGHT, HAS_ROPE, ROUND,
        )  # fmt: skip
    else:
        _store_row(
            v_ptr + token * stride_v_token, v_ptr, v_pool_ptr + pool_row * stride_v_pool_row, table_ptr,
            frame, row, col, eps, KV_HEADS, HEAD_DIM, BLOCK_KV_HEADS, PAIRS_TIME, PAIRS_HEIGHT,
            False, False, ROUND,
        )  # fmt: skip


@cache
def heads_per_step(heads: int, head_dim: int) -> int:
    """How many heads a program handles at once: 1024 numbers keep 128 threads at 16 bytes each."""
    return min(triton.next_power_of_2(heads), 1024 // head_dim)


def _wrong(what: str, wanted: str, *got: object) -> str:
    came = [f"{list(x.shape)} {x.dtype}, stride {x.stride()}" if isinstance(x, torch.Tensor) else repr(x) for x in got]
    if len(got) > 1:
        came = [f"{name} {x}" for name, x in zip(what.replace(" and ", ", ").split(", "), came, strict=True)]
    return f"norm_rope_append: {what} must be {wanted}, got {'; '.join(came)}"


def _check_tensors(**tensors: object) -> None:
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(_wrong(name, "a tensor", x))


def norm_rope_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    q_out: torch.Tensor,
    table: torch.Tensor | None,
    first_row: int | torch.Tensor,
    *,
    grid: tuple[int, int, int],
    pairs: tuple[int, int, int],
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    round_before_rope: bool,
) -> None:
    """Normalise and turn q and k, and write q to `q_out`, k and v to the pool rows from `first_row` on: one launch.

    x -> x / sqrt(mean(x^2) + eps) * weight over all numbers of a token's row, where a weight is given; then
    each pair (a, b) = (x[2i], x[2i + 1]) of a head -> (a cos - b sin, a sin + b cos) with cos and sin of the table's
    pair i at the token's frame, row or column, where a table is given. v is copied.

    Args:
        q: [tokens, heads * head_dim], k, v: [tokens, kv_heads * head_dim], one dtype, bf16, fp16 or fp32; dense in the
            last dimension, tokens of any stride, so that they may be slices of one projection. head_dim 64 or 128, 1 to
            128 heads, which kv_heads divide.
        k_pool, v_pool: [rows, kv_heads, head_dim], q_out: [tokens, heads, head_dim], all of q's dtype; dense in heads
            and head_dim, rows and tokens of any stride.
        table: fp32 [positions, head_dim / 2, 2], contiguous: cosine and sine of pair i's angle at each position of its
            axis, commonly position * theta ** (-j / n) for the j-th of the n pairs of that axis. It is the table of one
            chunk: its entries of the pairs that turn by frame begin at the chunk's first frame, whatever its number. It
            is read when the kernel runs, so that a captured graph serves every chunk whose entries are written there.
            None for no rotation.
        first_row: the pool row of the first token: an int, or an int64 tensor [1] on q's device, which is read when the
            kernel runs.
        grid: (frames, height, width), tokens = frames * height * width in that order. Token t reads the table's entries
            t // (height * width), t // width % height and t % width.
        pairs: how many of a head's pairs turn by frame, then by row, then by column; not used without a table.
        q_weight, k_weight: [heads * head_dim] and [kv_heads * head_dim], contiguous, q's dtype or fp32; None for no
            norm.
        eps: added to the mean square, not negative and finite.
        round_before_rope: round to q's dtype after the norm, and again after the weight where it has that dtype, as in
            Wan; otherwise all is fp32 up to the last rounding.

    Writes q_out and `tokens` rows of each pool, and nothing else; no tokens, nothing. Any alignment will do; rows on
    multiples of 16 bytes are read and written in wider pieces. Deterministic; does not allocate or synchronise. All
    tensors are on one GPU, which is the current one.

    Limits: no batch dimension, one session a call; V of K's heads and head_dim; no gradients.

    Raises ValueError or TypeError, before the launch, on shapes, dtypes and strides other than these, on rows outside
    the pools and on a grid larger than the table. Undefined, since not looked at: a first_row on the device that leads
    outside the pools, and outputs that overlap each other, themselves or an input.
    """
    _check_tensors(q=q, k=k, v=v, k_pool=k_pool, v_pool=v_pool, q_out=q_out)
    pool = k_pool.shape
    if len(pool) != 3 or pool[2] not in (64, 128) or not 1 <= pool[1] <= MAX_HEADS:
        wanted = f"[rows, kv_heads, head_dim], heads not first, of 1 to {MAX_HEADS} heads and head_dim 64 or 128"
        raise ValueError(_wrong("k_pool", wanted, k_pool))
    rows, kv_heads, head_dim = pool
    if not isinstance(grid, (tuple, list)) or [type(count) for count in grid] != [int] * 3:
        raise TypeError(_wrong("grid", "(frames, height, width) of ints", grid))
    frames, height, width = grid
    tokens = frames * height * width
    if q.dim() == 2 and q.shape[0] != tokens:
        raise ValueError(_wrong("grid", f"(frames, height, width) of q's {q.shape[0]} tokens in all", grid))
    columns = q.shape[1] if q.dim() == 2 else 0
    heads = columns // head_dim
    if q.shape != (tokens, heads * head_dim) or not 1 <= heads <= MAX_HEADS or heads % kv_heads:
        wanted = f"[{tokens}, heads * {head_dim}], up to {MAX_HEADS} heads, a multiple of the pools' {kv_heads}"
        raise ValueError(_wrong("q", wanted, q))
    if not k.shape == v.shape == (tokens, kv_heads * head_dim):
        raise ValueError(_wrong("k and v", f"[{tokens}, {kv_heads * head_dim}]", k, v))
    if v_pool.shape != pool:
        raise ValueError(_wrong("v_pool", f"[{rows}, {kv_heads}, {head_dim}]", v_pool))
    if q_out.shape != (tokens, heads, head_dim):
        raise ValueError(_wrong("q_out", f"[{tokens}, {heads}, {head_dim}]", q_out))
    if not q.dtype is k.dtype is v.dtype is q_out.dtype is k_pool.dtype is v_pool.dtype:
        dtypes = (x.dtype for x in (q, k, v, q_out, k_pool, v_pool))
        raise TypeError(_wrong("q, k, v, q_out, k_pool and v_pool", "of one dtype", *dtypes))
    if q.dtype not in DTYPES:
        raise TypeError(_wrong("q", " or ".join(map(str, DTYPES)), q))
    stride_q_token, stride_q_column = q.stride()
    stride_k_token, stride_k_column = k.stride()
    stride_v_token, stride_v_column = v.stride()
    if not stride_q_column == stride_k_column == stride_v_column == 1:
        raise ValueError(_wrong("q, k and v", "dense in their last dimension", q, k, v))
    stride_q_out_token, stride_q_out_head, stride_q_out_dim = q_out.stride()
    stride_k_pool_row, stride_k_pool_head, stride_k_pool_dim = k_pool.stride()
    stride_v_pool_row, stride_v_pool_head, stride_v_pool_dim = v_pool.stride()
    if (
        not stride_q_out_dim == stride_k_pool_dim == stride_v_pool_dim == 1
        or (heads > 1 and stride_q_out_head != head_dim)
        or (kv_heads > 1 and not stride_k_pool_head == stride_v_pool_head == head_dim)
    ):
        wanted = "dense in their last two dimensions"
        raise ValueError(_wrong("q_out, k_pool and v_pool", wanted, q_out, k_pool, v_pool))
    for name, weight, numbers in (("q_weight", q_weight, columns), ("k_weight", k_weight, kv_heads * head_dim)):
        if weight is not None and not (weight.shape == (numbers,) and weight.is_contiguous()):
            raise ValueError(_wrong(name, f"None or [{numbers}], contiguous", weight))
        if weight is not None and weight.dtype not in (q.dtype, torch.float32):
            raise TypeError(_wrong(name, f"{q.dtype} or torch.float32", weight))
    if isinstance(eps, bool) or not isinstance(eps, Real):
        raise TypeError(_wrong("eps", "a number", eps))
    if not 0 <= eps < math.inf:
        raise ValueError(_wrong("eps", "finite and not negative", eps))
    on_device = not isinstance(first_row, int)
    if on_device:
        if not (isinstance(first_row, torch.Tensor) and first_row.dtype is torch.int64 and first_row.shape == (1,)):
            raise TypeError(_wrong("first_row", "an int or torch.int64 [1]", first_row))
    elif not 0 <= first_row <= rows - tokens:
        raise ValueError(_wrong("first_row", f"from 0 to {rows - tokens}", first_row))
    if table is not None:
        shape = table.shape
        positions, half = shape[0] if shape else "positions", head_dim // 2
        if not (shape == (positions, half, 2) and table.dtype is torch.float32 and table.is_contiguous()):
            raise ValueError(_wrong("table", f"torch.float32 [{positions}, {half}, 2], contiguous", table))
        if not (0 < height <= positions and 0 < width <= positions and frames <= positions):
            raise ValueError(_wrong("grid", f"within the table's {positions} positions", grid))
        if pairs[0] + pairs[1] + pairs[2] != half or min(pairs) < 0:
            raise ValueError(_wrong("pairs", f"three counts that add up to {half}", pairs))
    norm_rope_append_kernel[(tokens, 3)](
        q, k, v, q_weight, k_weight, table, q_out, k_pool, v_pool,
        first_row, height, width, float(eps),
        stride_q_token, stride_k_token, stride_v_token, stride_q_out_token, stride_k_pool_row, stride_v_pool_row,
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim,
        BLOCK_HEADS=heads_per_step(heads, head_dim), BLOCK_KV_HEADS=heads_per_step(kv_heads, head_dim),
        PAIRS_TIME=pairs[0], PAIRS_HEIGHT=pairs[1],
        HAS_Q_WEIGHT=q_weight is not None, HAS_K_WEIGHT=k_weight is not None,
        HAS_ROPE=table is not None, ROUND=round_before_rope,
        DEVICE_ROW=on_device, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
