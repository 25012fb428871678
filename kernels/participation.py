# SPDX-License-Identifier: Apache-2.0
"""The share of softmax weight that each key of a window over a paged KV pool received, averaged over the queries.

One program takes BLOCK_K keys of one head, which it reads once, and walks all queries, BLOCK_Q at a time: the products
q . k, a weight exp2(score - lse) for each, and sums of weights that stay in the thread that made them until the walk
ends; then they are put together, always in one order. Where segments are shifted in time, queries are turned back for
the keys' segment on the way; a block of tail rows of several segments is walked once for each.

The work is half of the products of attention and all of its exponentials. For 128 keys and 128 queries of head_dim 128
an H100 takes 1024 cycles of a processor for either, by its peak rates; the products of head_dim 64 take half. A program
waits for one and then the other, so its tiles are small enough for several programs on a processor.

The tables (int32, on the device) are those of segment_attention.py: tiles [capacity, 2], tail_rows [128 * capacity, 2],
ranges [capacity + 1, 4], num_segments [1], and fp32 turns [capacity, pairs, 2] and weights [capacity].
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from numbers import Real

import torch
import triton
import triton.language as tl

TILE_ROWS = 128
MAX_HEADS = 128  # more are tokens, of tensors with heads first
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _turned_query(
    q_ptrs, turns_ptr, segment, mask_q, BLOCK_Q: tl.constexpr, HEAD_DIM: tl.constexpr, TURNED_PAIRS: tl.constexpr
):
    """The original query tile times R(-shift), pair by pair."""
    PAIRS: tl.constexpr = HEAD_DIM // 2
    pairs = tl.arange(0, PAIRS)
    factors = turns_ptr + (segment * TURNED_PAIRS + pairs) * 2
    cos = tl.load(factors, mask=pairs < TURNED_PAIRS, other=1.0)[None, :]
    sin = tl.load(factors + 1, mask=pairs < TURNED_PAIRS, other=0.0)[None, :]
    q = tl.load(q_ptrs, mask=mask_q, other=0.0)
    real, imag = tl.split(q.reshape(BLOCK_Q, PAIRS, 2))
    real = real.to(tl.float32)
    imag = imag.to(tl.float32)
    turned_real = (real * cos + imag * sin).to(q.dtype)
    turned_imag = (imag * cos - real * sin).to(q.dtype)
    return tl.join(turned_real, turned_imag).reshape(BLOCK_Q, HEAD_DIM)


@triton.jit(do_not_specialize=["q_len", "num_tokens", "stride_out_head"])
def participation_kernel(
    q_ptr, k_ptr, lse_ptr, out_ptr, tiles_ptr, tail_rows_ptr, ranges_ptr, turns_ptr, weights_ptr,
    q_len, num_tokens, scale_log2, stride_q_token, stride_q_head, stride_k_row, stride_k_head, stride_out_head,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, FOLD: tl.constexpr,
    HAS_SHIFT: tl.constexpr, TURNED_PAIRS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr, GROUP_SIZE: tl.constexpr,
):  # fmt: skip
    # Programs of one head run side by side, so its queries stay in L2.
    block = tl.program_id(0)
    head = tl.program_id(1)
    cols = tl.arange(0, BLOCK_K)
    dims = tl.arange(0, HEAD_DIM)
    out_ptr += head.to(tl.int64) * stride_out_head
    num_full = tl.load(ranges_ptr + 1)
    num_tail = tl.load(ranges_ptr + 3)

    # What the window does not hold.
    of_block = block * BLOCK_K + cols
    behind = (of_block >= num_full * TILE + num_tail) & (of_block < num_tokens)
    tl.store(out_ptr + of_block, tl.zeros([BLOCK_K], tl.float32), mask=behind)

    # Which keys: part of a full tile, or tail rows, of several segments. A token follows all rows of earlier segments.
    STEPS: tl.constexpr = TILE // BLOCK_K
    first_tail = (block - num_full * STEPS) * BLOCK_K
    if first_tail >= num_tail:
        return
    if first_tail < 0:
        in_tile = block % STEPS * BLOCK_K + cols
        tile_ptr = tiles_ptr + block // STEPS * 2
        valid = cols >= 0
        pool_rows = tl.load(tile_ptr) + in_tile
        first_segment = tl.load(tile_ptr + 1)
        last_segment = first_segment
        segments = first_segment + tl.zeros([BLOCK_K], tl.int32)
        tokens = block // STEPS * TILE + tl.load(ranges_ptr + (first_segment + 1) * 4 + 2) + in_tile
    else:
        tail = first_tail + cols
        valid = tail < num_tail
        pool_rows = tl.load(tail_rows_ptr + tail * 2, mask=valid, other=0)
        segments = tl.load(tail_rows_ptr + tail * 2 + 1, mask=valid, other=-1)
        first_segment = tl.load(tail_rows_ptr + first_tail * 2 + 1)
        last_segment = tl.load(tail_rows_ptr + tl.minimum(first_tail + BLOCK_K, num_tail) * 2 - 1)
        tokens = tl.load(ranges_ptr + (segments + 1) * 4 + 1, mask=valid, other=0) * TILE + tail
    k_ptr += (head // GROUP_SIZE).to(tl.int64) * stride_k_head
    k_ptrs = k_ptr + pool_rows.to(tl.int64)[:, None] * stride_k_row + dims[None, :]
    k = tl.load(k_ptrs, mask=valid[:, None], other=0.0)  # [BLOCK_K, HEAD_DIM]

    q_ptr += head.to(tl.int64) * stride_q_head
    lse_ptr += head.to(tl.int64) * q_len
    in_block = tl.arange(0, BLOCK_Q)
    sums = tl.zeros([BLOCK_K], tl.float32)
    if not HAS_SHIFT:  # one walk does for all segments
        last_segment = first_segment
    for segment in range(first_segment, last_segment + 1):
        # Up to sm_90 a thread has rows i and i + 8 of each 16 of the products: sums of pairs take half the registers.
        acc = tl.zeros([BLOCK_Q // (8 * FOLD), 8, BLOCK_K], tl.float32)
        for first in range(0, q_len, BLOCK_Q):
            rows = first + in_block
            mask_q = rows < q_len
            q_ptrs = q_ptr + rows[:, None].to(tl.int64) * stride_q_token + dims[None, :]
            if HAS_SHIFT:
                q = _turned_query(q_ptrs, turns_ptr, segment, mask_q[:, None], BLOCK_Q, HEAD_DIM, TURNED_PAIRS)
            else:
                q = tl.load(q_ptrs, mask=mask_q[:, None], other=0.0)
            scores = tl.dot(q, k.T, input_precision=PRECISION)  # [BLOCK_Q, BLOCK_K]
            lse = tl.load(lse_ptr + rows, mask=mask_q, other=float("inf")) * _LOG2_E
            p = tl.math.exp2(tl.fma(scores, scale_log2, -lse[:, None]))  # 0 of what is no query
            acc += tl.sum(p.reshape(BLOCK_Q // (8 * FOLD), FOLD, 8, BLOCK_K), 1)
        of_segment = tl.sum(tl.sum(acc, 0), 0)
        if HAS_SHIFT:
            of_segment = tl.where(segments == segment, of_segment, 0.0)
        sums += of_segment
    if HAS_WEIGHT:
        sums *= tl.math.exp2(tl.load(weights_ptr + segments, mask=valid, other=0.0))
    tl.store(out_ptr + tokens, sums / q_len, mask=valid & (tokens < num_tokens))


@dataclass(frozen=True)
class ParticipationConfig:
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    fold: int  # rows of the products that one thread has, 8 apart


def participation_config(capability: tuple[int, int], dtype: torch.dtype, has_shift: bool) -> ParticipationConfig:
    """The launch configuration: tiles and stages of which several programs fit a processor (three where no query is
    turned, and of 128 threads two where they are) without spills, by compiling for sm_80, 90, 100 and 120. Not timed.
    """
    if dtype == torch.float32:  # full precision has no matrix unit: FMA, small tiles
        return ParticipationConfig(block_q=32, block_k=32, num_warps=8, num_stages=1, fold=1)
    if capability[0] == 10:  # whose threads have a row each
        return ParticipationConfig(block_q=64, block_k=128, num_warps=8 if has_shift else 4, num_stages=2, fold=1)
    return ParticipationConfig(block_q=64, block_k=128, num_warps=4, num_stages=2, fold=2)


def device_capability(device: torch.device) -> tuple[int, int]:
    """Of the GPU; Hopper's for a CPU, where the interpreter takes any configuration."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _wrong(what: str, wanted: str, *got: object) -> str:
    came = [f"{list(x.shape)} {x.dtype}, stride {x.stride()}" if isinstance(x, torch.Tensor) else repr(x) for x in got]
    if len(got) > 1:
        came = [f"{name} {x}" for name, x in zip(what.replace(" and ", ", ").split(", "), came, strict=True)]
    return f"participation: {what} must be {wanted}, got {'; '.join(came)}"


def _check_tensors(**tensors: object) -> None:
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(_wrong(name, "a tensor", x))


def participation(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    tiles: torch.Tensor,
    tail_rows: torch.Tensor,
    ranges: torch.Tensor,
    num_segments: torch.Tensor,
    turns: torch.Tensor,
    weights: torch.Tensor,
    lse: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    has_shift: bool,
    has_weight: bool,
) -> None:
    """The share of softmax weight that each row of a window's segments received from each head of q.

    out[h, j] = mean_i exp(scale * q[i, h] . R(d_j) k[j, g] + w_j - lse[h, i]) for the window's rows j, segment by
    segment, where g = h // (heads // kv_heads) and R(d_j) turns a key by its segment's time shift: the query is turned
    instead, back from the original q for each segment, and rounded once to its dtype. w_j is the log weight of j's
    segment, a natural logarithm.

    Args:
        q: [q_len, heads, head_dim], bf16, fp16 or fp32, head_dim 64 or 128, at least one query and head; dense in
            head_dim, tokens and heads of any stride.
        k_pool: [rows, kv_heads, head_dim] with q's dtype, dense in head_dim; kv_heads divide heads. Rows outside the
            window never reach a result, whatever they hold.
        tiles, tail_rows, ranges, num_segments, turns, weights: the window's tables, contiguous, as in the module's
            docstring. Of num_segments nothing is read: the ranges say how many rows there are.
        lse: fp32 [heads, q_len], contiguous: what the weights are shares of, the log-sum-exp, natural log, of the
            scaled scores plus log weights of all keys that the queries attend to.
        out: fp32 [heads, tokens], dense in tokens, written whole: rows of the window past its end are left out, and
            what is past those of the window is 0.
        scale: from 1e-25 to 1e25; commonly 1 / sqrt(head_dim).
        has_shift: whether queries are turned; `turns` is not read otherwise.
        has_weight: whether segments are weighed; `weights` is not read otherwise.

    Whether Q is turned and segments are weighed, and the size of out, is fixed here, also for replays of a captured
    graph. q . k and weights in fp32, sums too. lse rounds to fp32, so that weights of scores near s in size are off by
    up to about 3e-7 * s of themselves. Deterministic; allocates nothing and does not synchronise. All tensors are on
    one GPU, which is the current one, of compute capability 8.0 or newer.

    Raises ValueError or TypeError, before the launch, on shapes, dtypes, strides and scales other than these.
    Undefined, since not looked at: tables that name rows outside the pool or no row at all, and an out that overlaps
    itself or an input.
    """
    _check_tensors(
        q=q, k_pool=k_pool, tiles=tiles, tail_rows=tail_rows, ranges=ranges, num_segments=num_segments, turns=turns,
        weights=weights, lse=lse, out=out,
    )  # fmt: skip
    if len(q.shape) != 3 or q.shape[2] not in (64, 128):
        raise ValueError(_wrong("q", "[q_len, heads, head_dim] with head_dim 64 or 128, without a batch dimension", q))
    q_len, heads, head_dim = q.shape
    if not (q_len >= 1 and 1 <= heads <= MAX_HEADS):
        wanted = f"[q_len, heads, head_dim], heads not first, of 1 to {MAX_HEADS} heads and at least one query"
        raise ValueError(_wrong("q", wanted, q))
    kv_heads = k_pool.shape[1] if k_pool.dim() == 3 else 0
    if k_pool.shape[1:] != (kv_heads, head_dim) or not 1 <= kv_heads <= heads or heads % kv_heads:
        wanted = f"[rows, kv_heads, {head_dim}] with kv_heads a divisor of q's {heads} heads"
        raise ValueError(_wrong("k_pool", wanted, k_pool))
    if q.dtype not in DTYPES:
        raise TypeError(_wrong("q", " or ".join(map(str, DTYPES)), q))
    if k_pool.dtype is not q.dtype:
        raise TypeError(_wrong("q and k_pool", "of one dtype", q.dtype, k_pool.dtype))
    if q.dtype is torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        raise TypeError(_wrong("q", "float16 or float32 in Triton's interpreter, which multiplies bf16 as integers", q))
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(_wrong("scale", "a number", scale))
    if not 1e-25 <= scale <= 1e25:
        raise ValueError(_wrong("scale", "from 1e-25 to 1e25", scale))
    if not q.stride(2) == k_pool.stride(2) == 1:
        raise ValueError(_wrong("q and k_pool", "dense in head_dim", q, k_pool))
    capacity = tiles.shape[0] if tiles.dim() == 2 else 0
    tables = (tiles, tail_rows, ranges, num_segments)
    shapes = ((capacity, 2), (TILE_ROWS * capacity, 2), (capacity + 1, 4), (1,))
    if not all(
        x.shape == shape and x.dtype is torch.int32 and x.is_contiguous()
        for x, shape in zip(tables, shapes, strict=True)
    ):  # fmt: skip
        wanted = f"torch.int32 [{capacity}, 2], [{TILE_ROWS * capacity}, 2], [{capacity + 1}, 4] and [1], contiguous"
        raise ValueError(_wrong("tiles, tail_rows, ranges and num_segments", wanted, *tables))
    turned_pairs = turns.shape[1] if has_shift and turns.dim() == 3 else 0
    if has_shift and not (
        turns.shape == (capacity, turned_pairs, 2) and 1 <= turned_pairs <= head_dim // 2
        and turns.dtype is torch.float32 and turns.is_contiguous()
    ):  # fmt: skip
        wanted = f"torch.float32 [{capacity}, 1 to {head_dim // 2} pairs, 2], contiguous"
        raise ValueError(_wrong("turns", wanted, turns))
    fits = weights.shape == (capacity,) and weights.dtype is torch.float32 and weights.is_contiguous()
    if has_weight and not fits:
        raise ValueError(_wrong("weights", f"torch.float32 [{capacity}], contiguous", weights))
    if lse.shape != (heads, q_len) or lse.dtype is not torch.float32 or not lse.is_contiguous():
        raise ValueError(_wrong("lse", f"torch.float32 [{heads}, {q_len}], contiguous", lse))
    tokens = out.shape[1] if out.dim() == 2 else 0
    dense = tokens == 1 or (tokens > 1 and out.stride(1) == 1)
    if out.shape != (heads, tokens) or not dense or out.dtype is not torch.float32:
        raise ValueError(_wrong("out", f"torch.float32 [{heads}, tokens], dense in its tokens, at least one", out))
    config = participation_config(device_capability(q.device), q.dtype, has_shift)
    blocks = triton.cdiv(max(TILE_ROWS * capacity, tokens), config.block_k)
    participation_kernel[(blocks, heads)](
        q, k_pool, lse, out, tiles, tail_rows, ranges, turns, weights if has_weight else None,
        q_len, tokens, float(scale) * 1.4426950408889634,
        q.stride(0), q.stride(1), k_pool.stride(0), k_pool.stride(1), out.stride(0),
        HEAD_DIM=head_dim, BLOCK_Q=config.block_q, BLOCK_K=config.block_k, FOLD=config.fold,
        HAS_SHIFT=has_shift, TURNED_PAIRS=turned_pairs, HAS_WEIGHT=has_weight,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", TILE=TILE_ROWS, GROUP_SIZE=heads // kv_heads,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
