# SPDX-License-Identifier: Apache-2.0
"""Attention over segments of a paged KV pool, read where they lie.

An item is BLOCK_Q queries of one head; one program computes it. GROUP_SIZE heads in a row share one of K and V. It
walks the window's full tiles of 128 rows, which need no mask, then the rows that segments leave over, gathered from
several segments into one block, of which only the last needs a mask. Where segments are shifted in time, the same walk
goes segment by segment. Where their shares of the softmax are wanted, the sum over a segment is written as the walk
leaves its tiles, and its tail rows are added. Where segments have weights, sums are kept relative to the weight of the
tile at hand, so that a tile's weight costs no more than a few additions a row; in a block of tail rows each row adds
its segment's. The items that would leave most of the processors idle in a last round are cut by keys into parts, each a
program of its own, whose results a second kernel merges.

The window's tables (int32, on the device; `window_tables` makes them, `worldkv_kernels.Window` rewrites them in place):
    tiles         [capacity, 2]        first pool row and segment of each full tile, in segment order
    tail_rows     [128 * capacity, 2]  pool row and segment of what follows the full tiles of segments, in their order
    ranges        [capacity + 1, 4]    full tiles lo, hi and tail rows lo, hi: of the whole window, then of each segment
    num_segments  [1]
    turns         [capacity, pairs, 2] fp32: per segment and leading rotary pair, the cosine and sine of the angle by
                                       which a query is turned back for the segment's time shift; of a head's
                                       head_dim / 2 pairs those that follow stay as they are
    weights       [capacity]           fp32: per segment, the logarithm to base 2 of what the softmax weights of its
                                       rows are multiplied by, from -11.6 to 11.6
`capacity` is in tiles of 128 rows, a segment's last one counted whole. What lies past the entries in use is not read.

The online softmax is Milakov and Gimelshein's, arXiv 1805.02867, tiled as in FlashAttention-2, arXiv 2307.08691; the
merge of parts is Flash-Decoding's, and cutting only what does not fill a round is after Stream-K, arXiv 2301.03598.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from numbers import Real
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

TILE_ROWS = 128
MAX_HEADS = 128  # more are tokens, of tensors with heads first
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LN_2 = tl.constexpr(0.6931471805599453)
_LARGE = tl.constexpr(2.0**28)
MAX_LOG_WEIGHT = 8.0  # see _attend_block
_WANTED = "(first_row, num_rows, time_shift=0, log_weight=0.0)"


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


@triton.jit
def _moved(row_max, change, lag):
    """The maximum where weights are lower by `change`, and by how much it has been rounded: the next `lag`, since the
    roundings of many segments would add up. Before the first key, of which row_max is -inf, that is NaN."""
    change = lag + change
    old_max = row_max + change
    return old_max, change - (old_max - row_max)


@triton.jit
def _attend_block(
    q, k, v, valid, of_rows, change, old_max, row_max, row_sum, acc, scale_log2, scale_power,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A step of the online softmax over k, v [rows, HEAD_DIM], of which those not `valid` are left out.

    `of_rows` [rows] are weights of segments as logarithms to base 2, or None where all rows are of one; `change` is by
    how much the weight that earlier sums are relative to exceeds the one that this step's are, or None without weights,
    and old_max the maximum `_moved` by it.
    Also returns what to multiply earlier sums by, the weights [BLOCK_Q, rows], and their sum a row.

    A weight is exp2(score * scale_log2 - new_max) by a fused multiply-add, which rounds once; new_max is the largest
    product, rounded, and how far it was rounded is a factor common to a row's weights: up to _LARGE within 2**8, which
    fp16 holds. Beyond, scale_power stands for scale_log2, the next power of two, whose products are exact: the largest
    score weighs 1, and all lower ones, whose products differ by 16 or more there, below 2**-16 with either scale.

    A large number would swallow the weight of a segment, which is therefore added to differences: `change` to that of
    two maxima, of_rows to that of a product and the maximum. So equal scores weigh as their segments do at any size,
    though the maximum is of weighted products only as far as its digits go; it is of weighted ones since fp16 would
    lose what lies far below it. Beyond _LARGE numbers are 32 or more apart: |of_rows|, below 12, moves no product, and
    p is at most 2**11.6, which fp16 holds. Scores that differ there may count as up to twice as far apart, beside
    unequal weights.
    """
    scores = tl.dot(q, k.T, input_precision=PRECISION)  # [BLOCK_Q, rows]
    if MASKED:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    block_max = tl.max(scores, 1)
    scale = tl.where(tl.abs(block_max * scale_log2) < _LARGE, scale_log2, scale_power)
    block_max = block_max * scale
    if of_rows is not None:
        block_max = tl.max(tl.fma(scores, scale[:, None], of_rows[None, :]), 1)
    new_max = tl.maximum(row_max if change is None else old_max, block_max)
    log_p = tl.fma(scores, scale[:, None], -new_max[:, None])
    if of_rows is not None:
        log_p += of_rows[None, :]
    p = tl.math.exp2(log_p)
    log_rescale = row_max - new_max
    if change is not None:
        log_rescale += change
    rescale = tl.math.exp2(log_rescale)
    block_sum = tl.sum(p, 1)
    acc = acc * rescale[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return new_max, row_sum * rescale + block_sum, acc, rescale, p, block_sum


@triton.jit(do_not_specialize=["q_len", "num_blocks", "num_whole", "num_cut", "parts", "max_segments"])
def segment_attention_kernel(
    q_ptr, k_ptr, v_ptr, k_tiles, v_tiles, out_ptr, lse_ptr, piece_out_ptr, piece_max_ptr, piece_sum_ptr,
    segment_sums_ptr, mass_ptr,
    tiles_ptr, tail_rows_ptr, ranges_ptr, num_segments_ptr, turns_ptr, weights_ptr,
    q_len, scale_log2, scale_power, num_blocks, num_whole, num_cut, parts, max_segments,
    stride_q_token, stride_q_head, stride_k_row, stride_k_head, stride_v_row, stride_v_head,
    stride_out_token, stride_out_head,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_TAIL: tl.constexpr,
    HAS_SHIFT: tl.constexpr, TURNED_PAIRS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    RETURN_LSE: tl.constexpr, RETURN_MASS: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr, HOPPER: tl.constexpr, GROUP_SIZE: tl.constexpr,
):  # fmt: skip
    # Which item, and which part of its keys. Items of one KV head run side by side, so its K and V stay in L2; so do
    # the items of one part.
    program = tl.program_id(0)
    item = program
    part = 0
    parts_of_item = 1
    if program >= num_whole:
        item = num_whole + (program - num_whole) % num_cut
        part = (program - num_whole) // num_cut
        parts_of_item = parts
    head = item // num_blocks
    kv_head = head // GROUP_SIZE
    block = item % num_blocks
    in_block = tl.arange(0, BLOCK_Q)
    rows = block * BLOCK_Q + in_block
    dims = tl.arange(0, HEAD_DIM)
    cols = tl.arange(0, BLOCK_K)
    mask_q = rows[:, None] < q_len
    q_rows = q_ptr + head.to(tl.int64) * stride_q_head + rows[:, None].to(tl.int64) * stride_q_token
    q_ptrs = q_rows + dims[None, :]
    k_ptr += kv_head.to(tl.int64) * stride_k_head
    v_ptr += kv_head.to(tl.int64) * stride_v_head

    # The part's share of full tiles, and of blocks of tail rows.
    num_full = tl.load(ranges_ptr + 1)
    tail_blocks = tl.cdiv(tl.load(ranges_ptr + 3), BLOCK_TAIL)
    part_full_lo = num_full * part // parts_of_item
    part_full_hi = num_full * (part + 1) // parts_of_item
    part_tail_lo = tail_blocks * part // parts_of_item * BLOCK_TAIL
    part_tail_hi = tail_blocks * (part + 1) // parts_of_item * BLOCK_TAIL

    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, HEAD_DIM], tl.float32)
    STEPS: tl.constexpr = TILE // BLOCK_K
    WEIGHT_OF_TILE: tl.constexpr = HAS_WEIGHT and not HAS_SHIFT  # else it is that of the range
    if HAS_WEIGHT:
        kept = 0.0  # the weight that sums are relative to, as a logarithm to base 2
        lag = tl.zeros([BLOCK_Q], tl.float32)
    if RETURN_MASS:
        # A replayed graph may meet more segments than it was captured with; these have no mass.
        num_mass = tl.minimum(tl.load(num_segments_ptr), max_segments)
        segment_sums_ptr += program.to(tl.int64) * max_segments * 2 * BLOCK_Q
        for segment in range(0, num_mass):
            sum_ptrs = segment_sums_ptr + segment * 2 * BLOCK_Q + in_block
            tl.store(sum_ptrs, 0.0)
            tl.store(sum_ptrs + BLOCK_Q, float("-inf"))
        tl.debug_barrier()  # other threads may write these next
        segment_sum = tl.zeros([BLOCK_Q], tl.float32)
    if HAS_SHIFT:
        first_range = 1
        last_range = 1 + tl.load(num_segments_ptr)
    else:
        first_range = 0
        last_range = 1
    if not HAS_SHIFT:
        q = tl.load(q_ptrs, mask=mask_q, other=0.0)

    for r in range(first_range, last_range):
        full_lo = tl.maximum(tl.load(ranges_ptr + r * 4), part_full_lo)
        full_hi = tl.minimum(tl.load(ranges_ptr + r * 4 + 1), part_full_hi)
        tail_lo = tl.maximum(tl.load(ranges_ptr + r * 4 + 2), part_tail_lo)
        tail_hi = tl.minimum(tl.load(ranges_ptr + r * 4 + 3), part_tail_hi)
        if (full_lo < full_hi) | (tail_lo < tail_hi):  # no query is turned for nothing, and no register spills
            if HAS_SHIFT:
                q = _turned_query(q_ptrs, turns_ptr, r - 1, mask_q, BLOCK_Q, HEAD_DIM, TURNED_PAIRS)
            # Full tiles. A tile's row is carried a step ahead: K and V can be fetched ahead only if it is known ahead.
            tile_row = tl.load(tiles_ptr + full_lo * 2, mask=full_lo < full_hi, other=0)
            if RETURN_MASS:
                segment = tl.load(tiles_ptr + full_lo * 2 + 1, mask=full_lo < full_hi, other=0)
            if WEIGHT_OF_TILE:
                weighed = tl.load(tiles_ptr + full_lo * 2 + 1, mask=full_lo < full_hi, other=0)
            if HAS_WEIGHT and HAS_SHIFT:
                # Once a segment, as queries are turned; where there was a key before.
                weight = tl.load(weights_ptr + r - 1)
                entering = kept - weight
                kept = weight
                max_before, lag = _moved(row_max, entering, lag)
                following = tl.where(row_max > float("-inf"), tl.math.exp2((row_max - max_before) + entering), 1.0)
                row_sum = row_sum * following
                acc = acc * following[:, None]
                row_max = max_before
            step_lo = full_lo * STEPS
            step_hi = full_hi * STEPS
            # On sm_90 ptxas serialises the products of a loop with stores in it, if it may not run at all.
            if not (HOPPER and RETURN_MASS) or step_lo < step_hi:
                for step in range(step_lo, step_hi):
                    first_row = tile_row + (step % STEPS) * BLOCK_K
                    next_tile = tiles_ptr + tl.minimum(step + 1, step_hi - 1) // STEPS * 2
                    tile_row = tl.load(next_tile)
                    if k_tiles is not None:
                        k = k_tiles.load([first_row, kv_head * HEAD_DIM])
                        v = v_tiles.load([first_row, kv_head * HEAD_DIM])
                    else:
                        # A 64-bit base and 32-bit offsets within the tile, which stay in registers over the loop.
                        k_base = k_ptr + first_row.to(tl.int64) * stride_k_row
                        v_base = v_ptr + first_row.to(tl.int64) * stride_v_row
                        k = tl.load(k_base + (cols[:, None] * stride_k_row + dims[None, :]))
                        v = tl.load(v_base + (cols[:, None] * stride_v_row + dims[None, :]))
                    change = None
                    old_max = None
                    if WEIGHT_OF_TILE:
                        weight = tl.load(weights_ptr + weighed)
                        weighed = tl.load(next_tile + 1, cache_modifier=".ca")
                        change = kept - weight
                        kept = weight
                        old_max, lag = _moved(row_max, change, lag)
                    row_max, row_sum, acc, rescale, p, block_sum = _attend_block(
                        q, k, v, None, None, change, old_max, row_max, row_sum, acc, scale_log2, scale_power,
                        False, PRECISION,
                    )  # fmt: skip
                    if WEIGHT_OF_TILE:
                        lag = tl.where(row_max > old_max, 0.0, lag)
                    if RETURN_MASS:
                        # Where the walk leaves a segment, its sum so far and the maximum that it is relative to.
                        segment_sum = segment_sum * rescale + block_sum
                        next_segment = tl.load(next_tile + 1)
                        ends = (segment != next_segment) | (step == step_hi - 1)
                        if ends & (segment < num_mass):
                            sum_ptrs = segment_sums_ptr + segment * 2 * BLOCK_Q + in_block
                            if HAS_WEIGHT:
                                gain = tl.math.exp2(tl.load(weights_ptr + segment))
                                tl.store(sum_ptrs, segment_sum * gain)
                            else:
                                tl.store(sum_ptrs, segment_sum)
                            tl.store(sum_ptrs + BLOCK_Q, row_max)
                        segment_sum = tl.where(ends, 0.0, segment_sum)
                        segment = next_segment
            # Tail rows.
            for first in range(tail_lo, tail_hi, BLOCK_TAIL):
                tail = first + tl.arange(0, BLOCK_TAIL)
                valid = tail < tail_hi
                tail_row = tl.load(tail_rows_ptr + tail * 2, mask=valid, other=0).to(tl.int64)[:, None]
                k = tl.load(k_ptr + tail_row * stride_k_row + dims[None, :], mask=valid[:, None], other=0.0)
                v = tl.load(v_ptr + tail_row * stride_v_row + dims[None, :], mask=valid[:, None], other=0.0)
                change = None
                old_max = None
                of_rows = None
                if WEIGHT_OF_TILE:
                    of_row = tl.load(tail_rows_ptr + tail * 2 + 1, mask=valid, other=-1)
                    of_rows = tl.load(weights_ptr + of_row, mask=valid, other=0.0)
                    change = kept  # of the first block; 0 of others, so that there is no lag to keep
                    kept = 0.0
                    old_max = row_max + change
                row_max, row_sum, acc, rescale, p, block_sum = _attend_block(
                    q, k, v, valid, of_rows, change, old_max, row_max, row_sum, acc, scale_log2, scale_power,
                    True, PRECISION,
                )  # fmt: skip
                if RETURN_MASS:
                    if not WEIGHT_OF_TILE:
                        of_row = tl.load(tail_rows_ptr + tail * 2 + 1, mask=valid, other=-1)
                    if HAS_WEIGHT and HAS_SHIFT:
                        p = p * tl.math.exp2(kept)
                    first_segment = tl.load(tail_rows_ptr + first * 2 + 1)
                    last_segment = tl.load(tail_rows_ptr + tl.minimum(first + BLOCK_TAIL, tail_hi) * 2 - 1)
                    tl.debug_barrier()  # other threads may have written what is read next
                    for segment in range(first_segment, tl.minimum(last_segment + 1, num_mass)):
                        sum_ptrs = segment_sums_ptr + segment * 2 * BLOCK_Q + in_block
                        before = tl.load(sum_ptrs) * tl.math.exp2(tl.load(sum_ptrs + BLOCK_Q) - row_max)
                        tl.store(sum_ptrs, before + tl.sum(tl.where(of_row[None, :] == segment, p, 0.0), 1))
                        tl.store(sum_ptrs + BLOCK_Q, row_max)

            if HAS_WEIGHT and HAS_SHIFT:
                lag = tl.where(row_max > max_before, 0.0, lag)

    if HAS_WEIGHT:  # from here on relative to no weight
        row_sum = row_sum * tl.math.exp2(kept)
        acc = acc * tl.math.exp2(kept)
    # Store: this piece of an item as it is, which may have met no key, or the item, normalised.
    if program >= num_whole:
        piece_rows = (program - num_whole).to(tl.int64) * BLOCK_Q + in_block
        tl.store(piece_out_ptr + piece_rows[:, None] * HEAD_DIM + dims[None, :], acc)
        tl.store(piece_max_ptr + piece_rows, row_max)
        tl.store(piece_sum_ptr + piece_rows, row_sum)
    else:
        out = acc * (1.0 / row_sum)[:, None]
        out_rows = out_ptr + head.to(tl.int64) * stride_out_head + rows[:, None].to(tl.int64) * stride_out_token
        tl.store(out_rows + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=mask_q)
        if RETURN_LSE:
            lse = _log_sum_exp(row_max, row_sum, scale_log2, scale_power, HAS_WEIGHT)
            tl.store(lse_ptr + head.to(tl.int64) * q_len + rows, lse, mask=rows < q_len)
        if RETURN_MASS:
            # The same threads wrote these rows; the barrier makes that true of every layout.
            tl.debug_barrier()
            _store_mass(
                mass_ptr + head.to(tl.int64) * max_segments * num_blocks + block, num_blocks, segment_sums_ptr, 0,
                0, 1, row_max, row_sum, rows < q_len, tl.load(num_segments_ptr), max_segments, BLOCK_Q,
            )  # fmt: skip


@triton.jit
def _log_sum_exp(row_max, row_sum, scale_log2, scale_power, HAS_WEIGHT: tl.constexpr):
    """The natural logarithm of a row's sum, of which row_max is a logarithm to base 2, in `_attend_block`'s scale."""
    large = _LARGE
    if HAS_WEIGHT:  # half-way between the scales: weights have moved the maximum by up to 24
        large = _LARGE * (0.5 + 0.5 * (scale_power / scale_log2))
    row_max = tl.where(tl.abs(row_max) < large, row_max, row_max * (scale_log2 / scale_power))
    return (row_max + tl.math.log2(row_sum)) * _LN_2


@triton.jit
def _store_mass(
    mass_ptr, stride_mass_segment, segment_sums_ptr, first_program, stride_program, programs, row_max, row_sum, mask,
    num_segments, max_segments, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Per segment, the shares of its softmax weight summed over a block's rows; of parts in several programs, too."""
    with_mass = tl.minimum(num_segments, max_segments)
    for segment in range(0, max_segments):
        share = tl.zeros([BLOCK_Q], tl.float32)
        if segment < with_mass:
            for i in range(0, programs):
                program = first_program + i * stride_program
                sum_row = segment_sums_ptr + (program * max_segments + segment).to(tl.int64) * 2 * BLOCK_Q
                sum_ptrs = sum_row + tl.arange(0, BLOCK_Q)
                share += tl.load(sum_ptrs) * tl.math.exp2(tl.load(sum_ptrs + BLOCK_Q) - row_max)
        tl.store(mass_ptr + segment * stride_mass_segment, tl.sum(tl.where(mask, share / row_sum, 0.0), 0))


@triton.jit(do_not_specialize=["q_len", "num_blocks", "num_whole", "num_cut", "parts", "max_segments"])
def merge_pieces_kernel(
    out_ptr, lse_ptr, piece_out_ptr, piece_max_ptr, piece_sum_ptr, segment_sums_ptr, mass_ptr, num_segments_ptr,
    q_len, scale_log2, scale_power, num_blocks, num_whole, num_cut, parts, max_segments,
    stride_out_token, stride_out_head,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_DIMS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, RETURN_LSE: tl.constexpr, RETURN_MASS: tl.constexpr,
):  # fmt: skip
    """One program merges BLOCK_DIMS columns of a cut item, its pieces always in the order of their keys.

    32 bits are enough for offsets: `deal` makes fewer than _MAX_PARTS pieces a processor, of 2**14 numbers at most.
    """
    cut = tl.program_id(0)
    item = num_whole + cut
    head = item // num_blocks
    block = item % num_blocks
    in_block = tl.arange(0, BLOCK_Q)
    rows = block * BLOCK_Q + in_block
    dims = tl.program_id(1) * BLOCK_DIMS + tl.arange(0, BLOCK_DIMS)

    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    for part in range(0, parts):
        piece_rows = (part * num_cut + cut) * BLOCK_Q + in_block
        row_max = tl.maximum(row_max, tl.load(piece_max_ptr + piece_rows))
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_DIMS], tl.float32)
    for part in range(0, parts):
        piece_rows = (part * num_cut + cut) * BLOCK_Q + in_block
        weight = tl.math.exp2(tl.load(piece_max_ptr + piece_rows) - row_max)
        row_sum += weight * tl.load(piece_sum_ptr + piece_rows)
        piece_out = piece_out_ptr + (part * num_cut + cut) * (BLOCK_Q * HEAD_DIM)
        acc += weight[:, None] * tl.load(piece_out + (in_block[:, None] * HEAD_DIM + dims[None, :]))

    out_rows = out_ptr + head.to(tl.int64) * stride_out_head + rows[:, None].to(tl.int64) * stride_out_token
    out = acc * (1.0 / row_sum)[:, None]
    tl.store(out_rows + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=rows[:, None] < q_len)
    if tl.program_id(1) == 0:
        if RETURN_LSE:
            lse = _log_sum_exp(row_max, row_sum, scale_log2, scale_power, HAS_WEIGHT)
            tl.store(lse_ptr + head.to(tl.int64) * q_len + rows, lse, mask=rows < q_len)
        if RETURN_MASS:
            _store_mass(
                mass_ptr + head.to(tl.int64) * max_segments * num_blocks + block, num_blocks, segment_sums_ptr,
                item, num_cut, parts, row_max, row_sum, rows < q_len, tl.load(num_segments_ptr), max_segments, BLOCK_Q,
            )  # fmt: skip


def device_capability(device: torch.device) -> tuple[int, int]:
    """Of the GPU; Hopper's for a CPU, where the interpreter takes any configuration."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def device_processors(device: torch.device) -> int:
    """Of the GPU; an H200's for a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@dataclass(frozen=True)
class AttentionConfig:
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    descriptors: bool = False  # full tiles by the bulk copy engine instead of by pointers; from sm_90 on


def attention_config(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, has_shift: bool, has_mass: bool,
    has_weight: bool = False,
) -> AttentionConfig:  # fmt: skip
    """The launch configuration: the largest tiles and deepest pipeline that fit without spills, by compiling.

    Turning Q beside a [128, 128] accumulator takes registers that only smaller key tiles leave; what still spills
    is in tests/test_compile.py. Timed on an H100 alone: csrc/attention/NOTES.md.
    """
    if dtype == torch.float32:  # full precision has no matrix unit: FMA, small tiles
        return AttentionConfig(block_q=32, block_k=32, num_warps=16, num_stages=1)
    if capability[0] == 9:  # 224 of 227 KiB shared, or 160 where Q is turned
        if has_shift:
            return AttentionConfig(block_q=128, block_k=64, num_warps=8, num_stages=4, descriptors=True)
        return AttentionConfig(block_q=128, block_k=128, num_warps=8, num_stages=3, descriptors=True)
    if capability[0] == 10:
        if has_shift and (head_dim == 128 or has_mass):
            return AttentionConfig(block_q=128, block_k=32, num_warps=8, num_stages=4)
        return AttentionConfig(block_q=128, block_k=64, num_warps=8, num_stages=4)
    # 96 KiB shared also fits the 99 KiB of the consumer chips of compute capability 8 and 12.
    block_k = 32 if has_shift or has_mass or (has_weight and head_dim == 128) else 64
    return AttentionConfig(block_q=128, block_k=block_k, num_warps=8, num_stages=3)


class Deal(NamedTuple):
    """Which items a program computes alone, the first `num_whole`, and into how many `parts` the others are cut."""

    num_whole: int
    num_cut: int
    parts: int


# In times of an item, which takes 160 to 410 us on an H200 with the windows of the models: a piece starts a pipeline
# anew and writes 66 KB, about 3 us; merging is a launch of about 6 us. Estimates, not measured.
_PIECE_COST, _MERGE_COST = 0.01, 0.02
_MIN_PART_TILES = 8  # of a full window: a part shall be longer than its pipeline
_MAX_PARTS = 64


def deal(num_items: int, processors: int, capacity: int) -> Deal:
    """Cut the items of the last, partial round where that ends it earlier.

    One program fits a processor at a time. `capacity` is the window's, in tiles: what it holds now is known on the
    device only, and a captured graph has to serve any.
    """
    last = num_items % processors

    def duration(parts: int) -> float:
        return -(-last * parts // processors) * (1 / parts + _PIECE_COST) + _MERGE_COST

    parts = min(range(2, min(_MAX_PARTS, capacity // _MIN_PART_TILES) + 1), key=duration, default=1)
    if not last or parts == 1 or duration(parts) >= 1:
        return Deal(num_items, 0, 1)
    return Deal(num_items - last, last, parts)


def _tiles_of(pool: torch.Tensor, block_k: int) -> TensorDescriptor | None:
    """The pool for the copy engine, as [rows, heads * head_dim]; None where it does not take the pool's strides."""
    rows, heads, head_dim = pool.shape
    in_row = heads == 1 or pool.stride(1) == head_dim
    if not in_row or pool.data_ptr() % 16 or pool.stride(0) * pool.element_size() % 16:
        return None
    return TensorDescriptor(pool, [rows, heads * head_dim], [pool.stride(0), 1], [block_k, head_dim])


class _Segment(NamedTuple):
    first_row: int
    num_rows: int
    time_shift: int = 0
    log_weight: float = 0.0


def _checked_segment(i: int, given: tuple[float, ...], turning: bool) -> _Segment:
    def wrong(wanted: str) -> str:
        return f"window_tables: segments[{i}] must {wanted}, got {given!r}"

    try:
        numbers = tuple(given)
        segment = _Segment(*map(operator.index, numbers[:3]), *numbers[3:])
        if any(isinstance(number, bool) for number in numbers) or not isinstance(segment.log_weight, Real):
            raise TypeError("a boolean is no number here, nor is what is not real")
    except TypeError as error:
        limits = f"of integers below 2**31 and a number from {-MAX_LOG_WEIGHT:g} to {MAX_LOG_WEIGHT:g}"
        raise TypeError(wrong(f"be {_WANTED} {limits}")) from error
    if segment.first_row < 0 or segment.num_rows < 1 or segment.first_row + segment.num_rows >= 2**31:
        raise ValueError(wrong("have first_row >= 0, num_rows >= 1 and end below row 2**31"))
    if abs(segment.time_shift) >= 2**31:
        raise ValueError(wrong("have a time_shift of less than 2**31 frames either way"))
    if segment.time_shift and not turning:
        raise ValueError(wrong("have time_shift 0 without frequencies"))
    if not -MAX_LOG_WEIGHT <= segment.log_weight <= MAX_LOG_WEIGHT:
        raise ValueError(wrong(f"have a log weight from {-MAX_LOG_WEIGHT:g} to {MAX_LOG_WEIGHT:g}"))
    return segment._replace(log_weight=float(segment.log_weight))


def _checked_frequencies(frequencies: torch.Tensor) -> torch.Tensor:
    wanted = "window_tables: frequencies must be None or a tensor [head_dim / 2]"
    if not isinstance(frequencies, torch.Tensor):
        raise TypeError(f"{wanted}, got {frequencies!r}")
    if frequencies.dim() != 1 or frequencies.is_complex():
        raise ValueError(f"{wanted} of real numbers, got {list(frequencies.shape)} {frequencies.dtype}")
    frequencies = frequencies.double().cpu()
    if not frequencies.isfinite().all():
        raise ValueError(f"{wanted}, finite, got {frequencies.tolist()}")
    return frequencies


def window_tables(
    segments: Iterable[tuple[float, ...]],
    frequencies: torch.Tensor | None = None,
    *,
    capacity: int | None = None,
    device: torch.device | str,
) -> tuple[torch.Tensor, ...]:
    """The tables of a window of segments (first_row, num_rows, time_shift=0, log_weight=0.0), for `segment_attention`.

    Segments are contiguous pool rows, of any length from 1, in any order; rows that two segments name count twice.
    Attention sees a segment's keys as if they were `time_shift` latent frames later: pair (2i, 2i + 1) of a head turned
    further by time_shift * frequencies[i] radians. The softmax weights of a segment's rows are multiplied by
    exp(log_weight), from -8 to 8; where one is not 0, attention is called with has_weight=True.

    Args:
        frequencies: [head_dim / 2], best in float64: radians a latent frame, 0 for pairs that do not turn with time;
            those at the end may be left out. None where no segment is shifted; attention is then called with
            has_shift=False.
        capacity: of the tables, in tiles of 128 rows; what the segments need by default. A captured graph sees another
            window when its tables, made with the same capacity, are copied into those that it was captured with.

    Returns tiles, tail_rows, ranges, num_segments, turns, weights, as in the module's docstring, on `device`; built on
    the host. Raises ValueError without segments, on a segment without rows, on rows below 0, on a row or a shift that
    is not below 2**31, on a shift without frequencies, on a log weight out of its range, on frequencies of another
    shape or not finite, and on a capacity that is too small; TypeError on what is no such number, segment or tensor.
    That the rows are in the pool is the caller's to know.
    """
    if not isinstance(segments, Iterable):
        raise TypeError(f"window_tables: segments must be a list of {_WANTED}, got {segments!r}")
    segments = [_checked_segment(i, given, frequencies is not None) for i, given in enumerate(segments)]
    if not segments:
        raise ValueError("window_tables: segments must hold at least one, got none")
    if frequencies is not None:
        frequencies = _checked_frequencies(frequencies)
    tiles, tail_rows, ranges, needed = [], [], [], 0
    for i, (first_row, num_rows, *_) in enumerate(segments):
        full_lo, tail_lo, first_tail = len(tiles), len(tail_rows), first_row + num_rows // TILE_ROWS * TILE_ROWS
        tiles += [(row, i) for row in range(first_row, first_tail, TILE_ROWS)]
        tail_rows += [(row, i) for row in range(first_tail, first_row + num_rows)]
        ranges.append((full_lo, len(tiles), tail_lo, len(tail_rows)))
        needed += triton.cdiv(num_rows, TILE_ROWS)
    if capacity is not None and type(capacity) is not int:
        raise TypeError(f"window_tables: capacity must be an int or None, got {capacity!r}")
    capacity = needed if capacity is None else capacity
    if needed > capacity:
        raise ValueError(f"window_tables: segments must fit capacity={capacity} tiles of 128 rows, got {needed}")
    ranges.insert(0, (0, len(tiles), 0, len(tail_rows)))
    tables = []
    for rows, shape in ((tiles, (capacity, 2)), (tail_rows, (TILE_ROWS * capacity, 2)), (ranges, (capacity + 1, 4))):
        table = torch.zeros(shape, dtype=torch.int32, device="cpu")
        table[: len(rows)] = torch.tensor(rows, dtype=torch.int32, device="cpu").view(-1, shape[1])
        tables.append(table)
    turns = torch.zeros(1, 1, 2, dtype=torch.float32, device="cpu")
    if frequencies is not None:
        turning = frequencies.nonzero().flatten().tolist()
        frequencies = frequencies[: turning[-1] + 1 if turning else 1]
        turns = torch.zeros(capacity, len(frequencies), 2, dtype=torch.float32, device="cpu")
        shifts = torch.tensor([segment.time_shift for segment in segments], dtype=torch.int64, device="cpu")
        angles = shifts[:, None] * frequencies
        turns[: len(segments)] = torch.stack([angles.cos(), angles.sin()], dim=-1).float()
    weights = torch.zeros(capacity, dtype=torch.float32, device="cpu")
    logs = [segment.log_weight / math.log(2) for segment in segments]
    weights[: len(segments)] = torch.tensor(logs, dtype=torch.float32, device="cpu")
    tables += [torch.tensor([len(segments)], dtype=torch.int32, device="cpu"), turns, weights]
    return tuple(table.to(device) for table in tables)


def _wrong(what: str, wanted: str, *got: object) -> str:
    came = [f"{list(x.shape)} {x.dtype}, stride {x.stride()}" if isinstance(x, torch.Tensor) else repr(x) for x in got]
    if len(got) > 1:
        came = [f"{name} {x}" for name, x in zip(what.replace(" and ", ", ").split(", "), came, strict=True)]
    return f"segment_attention: {what} must be {wanted}, got {'; '.join(came)}"


def _check_tensors(**tensors: object) -> None:
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(_wrong(name, "a tensor", x))


def segment_attention(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    tiles: torch.Tensor,
    tail_rows: torch.Tensor,
    ranges: torch.Tensor,
    num_segments: torch.Tensor,
    turns: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    mass: torch.Tensor | None,
    *,
    scale: float,
    has_shift: bool,
    has_weight: bool,
) -> None:
    """Attend every query to every row of a window's segments, where they lie in the pool.

    out[i, h] = sum_j softmax_j(scale * q[i, h] . R(d_j) k[j, g] + w_j) v[j, g] over the window's rows j, where
    g = h // (heads // kv_heads) and R(d_j) turns a key by its segment's time shift: the query is turned instead, back
    from the original q for each segment, and rounded once to its dtype. w_j is the log weight of j's segment, a natural
    logarithm.

    Args:
        q, out: [q_len, heads, head_dim], bf16, fp16 or fp32, head_dim 64 or 128, at least one query and head; dense in
            head_dim, tokens and heads of any stride. `out` is written whole.
        k_pool, v_pool: [rows, kv_heads, head_dim] with q's dtype, dense in head_dim; kv_heads divide heads. Rows
            outside the window never reach a result, whatever they hold.
        tiles, tail_rows, ranges, num_segments, turns, weights: the window's tables, contiguous, as in the module's
            docstring.
        lse: fp32 [heads, q_len], contiguous: the log-sum-exp of the scaled scores plus log weights, natural log. None
            for none.
        mass: fp32 [heads, max_segments]: the share of softmax weight on each segment, averaged over the queries. None
            for none.
        scale: from 1e-25 to 1e25; commonly 1 / sqrt(head_dim).
        has_shift: whether queries are turned; `turns` is not read otherwise.
        has_weight: whether segments are weighed; `weights` is not read otherwise.

    Whether Q is turned, whether segments are weighed and how many have a mass is fixed here, also for replays of a
    captured graph: one with more segments leaves out the mass of the later ones, and with fewer gives those zero.

    q . k and softmax in fp32. From there on the size of the scores costs no digit, up to 1e38 with the scale, which no
    fp16 reaches; lse is rounded to fp32 where it is written. Deterministic for one device, one capacity and the same
    segments in the same order. Any alignment will do; the copy engine of sm_90 takes pools whose heads are dense in a
    row and whose rows start on multiples of 16 bytes, and other pools are read by pointers. Takes scratch from torch's
    allocator; does not synchronise. All tensors are on one GPU, which is the current one, of compute capability 8.0 or
    newer.

    Limits: no batch dimension, one session a call; no mask, none for causality either; at most 128 heads; V of K's
    heads and head_dim; no gradients.

    Raises ValueError or TypeError, before any launch, on shapes, dtypes, strides and scales other than these.
    Undefined, since not looked at: tables that name rows outside the pool or no row at all, pool rows 2**24 elements
    apart or more, and outputs that overlap each other, themselves or an input.
    """
    _check_tensors(
        q=q, k_pool=k_pool, v_pool=v_pool, tiles=tiles, tail_rows=tail_rows, ranges=ranges, num_segments=num_segments,
        turns=turns, weights=weights, out=out,
    )  # fmt: skip
    shape, pool = q.shape, k_pool.shape
    if len(shape) != 3 or shape[2] not in (64, 128):
        raise ValueError(_wrong("q", "[q_len, heads, head_dim] with head_dim 64 or 128, without a batch dimension", q))
    q_len, heads, head_dim = shape
    if not (q_len >= 1 and 1 <= heads <= MAX_HEADS):
        wanted = f"[q_len, heads, head_dim], heads not first, of 1 to {MAX_HEADS} heads and at least one query"
        raise ValueError(_wrong("q", wanted, q))
    if v_pool.shape[2:] not in ((), (head_dim,)):
        raise ValueError(_wrong("v_pool", f"of head_dim {head_dim}, which K and V share", v_pool))
    kv_heads = pool[1] if len(pool) == 3 else 0
    if not (pool == v_pool.shape == (*pool[:1], kv_heads, head_dim) and 1 <= kv_heads <= heads):
        rows = pool[0] if pool else "rows"
        raise ValueError(_wrong("k_pool and v_pool", f"[{rows}, 1 to {heads} heads, {head_dim}]", k_pool, v_pool))
    if heads % kv_heads:
        raise ValueError(_wrong("k_pool and v_pool", f"of heads that divide q's {heads}", k_pool, v_pool))
    if out.shape != shape:
        raise ValueError(_wrong("out", f"[{q_len}, {heads}, {head_dim}]", out))
    if not q.dtype is k_pool.dtype is v_pool.dtype is out.dtype:
        dtypes = (x.dtype for x in (q, k_pool, v_pool, out))
        raise TypeError(_wrong("q, k_pool, v_pool and out", "of one dtype", *dtypes))
    if q.dtype not in DTYPES:
        raise TypeError(_wrong("q", " or ".join(map(str, DTYPES)), q))
    if q.dtype is torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        raise TypeError(_wrong("q", "float16 or float32 in Triton's interpreter, which multiplies bf16 as integers", q))
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(_wrong("scale", "a number", scale))
    if not 1e-25 <= scale <= 1e25:
        raise ValueError(_wrong("scale", "from 1e-25 to 1e25", scale))
    stride_q_token, stride_q_head, stride_q_dim = q.stride()
    stride_k_row, stride_k_head, stride_k_dim = k_pool.stride()
    stride_v_row, stride_v_head, stride_v_dim = v_pool.stride()
    stride_out_token, stride_out_head, stride_out_dim = out.stride()
    if not stride_q_dim == stride_k_dim == stride_v_dim == stride_out_dim == 1:
        raise ValueError(_wrong("q, k_pool, v_pool and out", "dense in head_dim", q, k_pool, v_pool, out))
    shape = tiles.shape
    capacity = shape[0] if len(shape) == 2 else 0
    if not (
        shape == (capacity, 2) and tiles.is_contiguous()
        and tail_rows.shape == (TILE_ROWS * capacity, 2) and tail_rows.is_contiguous()
        and ranges.shape == (capacity + 1, 4) and ranges.is_contiguous() and num_segments.shape == (1,)
        and tiles.dtype is tail_rows.dtype is ranges.dtype is num_segments.dtype is torch.int32
    ):  # fmt: skip
        wanted = f"torch.int32 [{capacity}, 2], [{TILE_ROWS * capacity}, 2], [{capacity + 1}, 4] and [1], contiguous"
        tables = (tiles, tail_rows, ranges, num_segments)
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
    if lse is not None and not (lse.shape == (heads, q_len) and lse.dtype is torch.float32 and lse.is_contiguous()):
        raise ValueError(_wrong("lse", f"torch.float32 [{heads}, {q_len}], contiguous", lse))
    capability = device_capability(q.device)
    config = attention_config(capability, q.dtype, head_dim, has_shift, mass is not None, has_weight)
    num_blocks = triton.cdiv(q_len, config.block_q)
    num_whole, num_cut, parts = deal(num_blocks * heads, device_processors(q.device), capacity)
    pieces = num_cut * parts
    scratch = dict(dtype=torch.float32, device=q.device)
    piece_out = torch.empty((pieces, config.block_q, head_dim), **scratch)
    piece_max, piece_sum = torch.empty((2, pieces, config.block_q), **scratch)
    segment_sums = block_mass = None
    max_segments = 0
    if mass is not None:
        max_segments = mass.shape[-1] if mass.dim() == 2 else 0
        if mass.shape != (heads, max_segments) or mass.dtype is not torch.float32:
            raise ValueError(_wrong("mass", f"torch.float32 [{heads}, max_segments]", mass))
        segment_sums = torch.empty((num_whole + pieces, max_segments, 2, config.block_q), **scratch)
        block_mass = torch.empty((heads, max_segments, num_blocks), **scratch)
    k_tiles = v_tiles = None
    if config.descriptors:
        k_tiles, v_tiles = _tiles_of(k_pool, config.block_k), _tiles_of(v_pool, config.block_k)
        if k_tiles is None or v_tiles is None:
            k_tiles = v_tiles = None
            if has_weight and mass is not None:  # pointers take registers, too
                config = replace(config, block_k=64)
    scale_log2 = float(scale) * 1.4426950408889634
    scale_power = 2.0 ** math.ceil(math.log2(scale_log2))
    block_tail = config.block_k
    if not has_shift:  # smaller, which wastes less of the last block, and leaves mass and weights their registers
        of_weights = max(32, config.block_k // 2) if has_weight else min(config.block_k, 64)
        block_tail = config.block_k // 2 if mass is not None else of_weights
    segment_attention_kernel[(num_whole + pieces,)](
        q, k_pool, v_pool, k_tiles, v_tiles, out, lse, piece_out, piece_max, piece_sum, segment_sums, block_mass,
        tiles, tail_rows, ranges, num_segments, turns, weights if has_weight else None,
        q_len, scale_log2, scale_power, num_blocks, num_whole, num_cut, parts, max_segments,
        stride_q_token, stride_q_head, stride_k_row, stride_k_head, stride_v_row, stride_v_head,
        stride_out_token, stride_out_head,
        HEAD_DIM=head_dim, BLOCK_Q=config.block_q, BLOCK_K=config.block_k, BLOCK_TAIL=block_tail,
        HAS_SHIFT=has_shift, TURNED_PAIRS=turned_pairs, HAS_WEIGHT=has_weight,
        RETURN_LSE=lse is not None, RETURN_MASS=mass is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", TILE=TILE_ROWS, HOPPER=capability[0] == 9,
        GROUP_SIZE=heads // kv_heads, num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    if pieces:
        merge_pieces_kernel[(num_cut, head_dim // 32)](
            out, lse, piece_out, piece_max, piece_sum, segment_sums, block_mass, num_segments,
            q_len, scale_log2, scale_power, num_blocks, num_whole, num_cut, parts, max_segments,
            stride_out_token, stride_out_head,
            HEAD_DIM=head_dim, BLOCK_Q=config.block_q, BLOCK_DIMS=32, HAS_WEIGHT=has_weight,
            RETURN_LSE=lse is not None, RETURN_MASS=mass is not None, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    if mass is not None:
        torch.sum(block_mass, dim=2, out=mass)
        mass.div_(q_len)
