# SPDX-License-Identifier: Apache-2.0
"""Pruning of a chunk, by its anchor frame or by the nearest earlier token, with or without a merge of what is dropped.

By the anchor, after WorldKV, arXiv 2605.22718, section on compression, four launches for all layers: the anchor's mean
key; every other token's cosine similarity to it, over all heads at once; the least similar tokens, by counting how many
come before each; and the copy of what was kept.

By the nearest, in place of the first two: the norms; the products of all tokens with those of earlier frames, of which
only the largest of a row and a tile leaves the processor; and the largest over the tiles, a cosine and its place.

A merge follows each dropped token from place to place until it comes to one that is kept, looks whether the two are
alike, links those that are averaged, and then writes each kept row from its list, of which each token is read once.

Sums run in fp32 in a fixed order and no fp32 copy of the chunk is made. A candidate is a token outside the anchor
frame, numbered in the chunk's order; a position counts the anchor frame's tokens first and then the candidates. Layers
are a dimension of every grid and share nothing: a layer gets the bits that it would get alone.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from numbers import Real

import torch
import triton
import triton.language as tl

MAX_HEADS = 128  # more are tokens, of tensors with heads first
MAX_LAYERS = 65535  # of the dimension of a CUDA grid that counts them
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RULES = ("similarity", "nearest")
# Of a key's squared length, how much a query at its match meets: .7 to .8 in all layers of the small world model but
# its first, by the median over queries.
_MATCH = tl.constexpr(0.8)


@triton.jit(do_not_specialize=["first_token", "frame_tokens"])
def anchor_mean_kernel(
    k_ptr, mean_ptr, first_token, frame_tokens, columns, stride_k_layer, stride_k_row,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(1).to(tl.int64)
    k_ptr += layer * stride_k_layer
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    rows = tl.arange(0, BLOCK_ROWS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for first in range(0, frame_tokens, BLOCK_ROWS):
        row = first + rows[:, None]
        offsets = (first_token + row).to(tl.int64) * stride_k_row + column[None, :]
        mask = (row < frame_tokens) & (column[None, :] < columns)
        total += tl.load(k_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(mean_ptr + layer * columns + column, tl.sum(total, 0) / frame_tokens, mask=column < columns)


@triton.jit(do_not_specialize=["candidates", "frame_tokens", "anchor"])
def similarity_kernel(
    k_ptr, mean_ptr, similarity_ptr, candidates, frame_tokens, anchor, columns, stride_k_layer, stride_k_row,
    BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(1).to(tl.int64)
    mean_ptr += layer * columns
    candidate = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    # Frames at or after the anchor lie one frame further on.
    token = tl.where(candidate >= anchor * frame_tokens, candidate + frame_tokens, candidate)
    k_rows = k_ptr + layer * stride_k_layer + token[:, None].to(tl.int64) * stride_k_row
    dots = tl.zeros([BLOCK_TOKENS, BLOCK_COLUMNS], tl.float32)
    squares = tl.zeros([BLOCK_TOKENS, BLOCK_COLUMNS], tl.float32)
    mean_squares = tl.zeros([BLOCK_COLUMNS], tl.float32)
    for first in range(0, columns, BLOCK_COLUMNS):
        column = first + tl.arange(0, BLOCK_COLUMNS)
        mean = tl.load(mean_ptr + column, mask=column < columns, other=0.0)
        mask = (candidate[:, None] < candidates) & (column[None, :] < columns)
        k = tl.load(k_rows + column[None, :], mask=mask, other=0.0).to(tl.float32)
        dots += k * mean[None, :]
        squares += k * k
        mean_squares += mean * mean
    norms = tl.sqrt_rn(tl.sum(squares, 1)) * tl.sqrt_rn(tl.sum(mean_squares, 0))
    similarity = tl.sum(dots, 1) / (norms + 1e-8)
    similarity = tl.where(similarity == similarity, similarity, float("inf"))  # NaN goes first
    tl.store(similarity_ptr + layer * candidates + candidate, similarity, mask=candidate < candidates)


@triton.jit
def _token(position, frame_tokens, anchor):
    """The chunk's token at a position of the order, in which the anchor frame comes first, then the others by time."""
    token = tl.where(position < (anchor + 1) * frame_tokens, position - frame_tokens, position)
    return tl.where(position < frame_tokens, anchor * frame_tokens + position, token)


@triton.jit(do_not_specialize=["tokens", "frame_tokens", "anchor"])
def norms_kernel(
    k_ptr, inverse_ptr, tokens, frame_tokens, anchor, columns, stride_k_layer, stride_k_row,
    BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """1 / (|k| + 1e-8) of every position; NaN, which no comparison takes, where |k| is not finite."""
    layer = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    token = _token(position, frame_tokens, anchor).to(tl.int64)
    k_rows = k_ptr + layer * stride_k_layer + token[:, None] * stride_k_row
    squares = tl.zeros([BLOCK_TOKENS, BLOCK_COLUMNS], tl.float32)
    for first in range(0, columns, BLOCK_COLUMNS):
        column = first + tl.arange(0, BLOCK_COLUMNS)
        mask = (position[:, None] < tokens) & (column[None, :] < columns)
        k = tl.load(k_rows + column[None, :], mask=mask, other=0.0).to(tl.float32)
        squares += k * k
    norm = tl.sqrt_rn(tl.sum(squares, 1))
    inverse = tl.where(norm < float("inf"), 1.0 / (norm + 1e-8), float("nan"))
    tl.store(inverse_ptr + layer * tokens + position, inverse, mask=position < tokens)


@triton.jit(do_not_specialize=["candidates", "frame_tokens", "anchor"])
def nearest_kernel(
    k_ptr, inverse_ptr, best_ptr, place_ptr, candidates, frame_tokens, anchor, columns, stride_k_layer, stride_k_row,
    BLOCK_CANDIDATES: tl.constexpr, BLOCK_EARLIER: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a tile of candidates and one of positions: each candidate's best product with a position of an earlier frame.

    A product is <k, k_earlier> / |k_earlier|; the candidate's own norm changes no order. -inf where there is none.
    The tiles of a layer that run side by side cover about as many candidates as positions, so its keys stay in L2.
    """
    layer = tl.program_id(2).to(tl.int64)
    first_earlier = tl.program_id(0) * BLOCK_EARLIER
    candidate = tl.program_id(1) * BLOCK_CANDIDATES + tl.arange(0, BLOCK_CANDIDATES)
    # Rows past the end are read as the last: no load has a mask, and columns are a multiple of any block of 64 or less.
    last = tl.minimum((tl.program_id(1) + 1) * BLOCK_CANDIDATES, candidates) - 1
    own = tl.minimum(candidate, last)
    end = (own // frame_tokens + 1) * frame_tokens  # of the earlier frames: where the candidate's own begins
    if first_earlier < (last // frame_tokens + 1) * frame_tokens:
        earlier = first_earlier + tl.arange(0, BLOCK_EARLIER)
        token = _token(own + frame_tokens, frame_tokens, anchor).to(tl.int64)
        earlier_token = _token(tl.minimum(earlier, candidates - 1), frame_tokens, anchor).to(tl.int64)
        column = tl.arange(0, BLOCK_COLUMNS)
        k_ptr += layer * stride_k_layer
        k_ptrs = k_ptr + token[:, None] * stride_k_row + column[None, :]
        earlier_ptrs = k_ptr + earlier_token[:, None] * stride_k_row + column[None, :]
        products = tl.zeros([BLOCK_CANDIDATES, BLOCK_EARLIER], tl.float32)
        for _ in range(0, columns, BLOCK_COLUMNS):
            k = tl.load(k_ptrs)
            k_earlier = tl.load(earlier_ptrs)
            products = tl.dot(k, k_earlier.T, products, input_precision=PRECISION)
            k_ptrs += BLOCK_COLUMNS
            earlier_ptrs += BLOCK_COLUMNS

        tokens = candidates + frame_tokens
        inverse = tl.load(inverse_ptr + layer * tokens + earlier, mask=earlier < candidates, other=0.0)
        products = products * inverse[None, :]
        counts = (earlier[None, :] < end[:, None]) & (products == products)
        products = tl.where(counts, products, float("-inf"))
        best = tl.max(products, 1)
        place = tl.min(tl.where(products == best[:, None], earlier[None, :], 2147483647), 1)
        block = (layer * tl.num_programs(0) + tl.program_id(0)) * candidates
        tl.store(best_ptr + block + candidate, best, mask=candidate < candidates)
        tl.store(place_ptr + block + candidate, place, mask=candidate < candidates)


@triton.jit(do_not_specialize=["candidates", "frame_tokens", "blocks"])
def reduce_kernel(
    inverse_ptr, best_ptr, place_ptr, similarity_ptr, near_ptr, candidates, frame_tokens, blocks,
    BLOCK_CANDIDATES: tl.constexpr, BLOCK_EARLIER: tl.constexpr,
):  # fmt: skip
    """The best over all blocks of positions, the first of equals: its cosine, and where it is, -1 for nowhere."""
    layer = tl.program_id(1).to(tl.int64)
    candidate = tl.program_id(0) * BLOCK_CANDIDATES + tl.arange(0, BLOCK_CANDIDATES)
    mask = candidate < candidates
    end = (candidate // frame_tokens + 1) * frame_tokens
    best = tl.full([BLOCK_CANDIDATES], float("-inf"), tl.float32)
    near = tl.full([BLOCK_CANDIDATES], -1, tl.int32)
    for block in range(0, blocks):
        written = mask & (block * BLOCK_EARLIER < end)  # tiles without an earlier pair have written nothing
        offsets = (layer * blocks + block) * candidates + candidate
        product = tl.load(best_ptr + offsets, mask=written, other=float("-inf"))
        place = tl.load(place_ptr + offsets, mask=written, other=-1)
        near = tl.where(product > best, place, near)
        best = tl.maximum(product, best)
    inverse = tl.load(inverse_ptr + layer * (candidates + frame_tokens) + frame_tokens + candidate, mask=mask)
    comparable = inverse == inverse
    similarity = tl.where(comparable, best * inverse, float("inf"))
    tl.store(similarity_ptr + layer * candidates + candidate, similarity, mask=mask)
    tl.store(near_ptr + layer * candidates + candidate, tl.where(comparable, near, -1), mask=mask)


@triton.jit(do_not_specialize=["group_size", "group_kept"])
def select_kernel(
    similarity_ptr, kept_ptr, group_size, group_kept, BLOCK_TOKENS: tl.constexpr, BLOCK_OTHERS: tl.constexpr,
):  # fmt: skip
    """Mark a candidate when fewer than `group_kept` of its group are less similar, or equal and earlier."""
    # In 32 bits, which the launcher sees to: with 64, the loop over a group takes a quarter more registers.
    group = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * group_size
    index = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    own = tl.load(similarity_ptr + group + index, mask=index < group_size, other=float("inf"))
    before = tl.zeros([BLOCK_TOKENS], tl.int32)
    for first in range(0, group_size, BLOCK_OTHERS):
        other = first + tl.arange(0, BLOCK_OTHERS)
        mask = other < group_size
        similarity = tl.load(similarity_ptr + group + other, mask=mask, other=float("inf"))
        equal_earlier = (similarity[None, :] == own[:, None]) & (other[None, :] < index[:, None])
        comes_before = ((similarity[None, :] < own[:, None]) | equal_earlier) & mask[None, :]
        before += tl.sum(comes_before.to(tl.int32), 1)
    tl.store(kept_ptr + group + index, (before < group_kept).to(tl.int32), mask=index < group_size)


@triton.jit(do_not_specialize=["frame_tokens", "anchor", "stride_index_layer"])
def gather_kernel(
    k_ptr, v_ptr, kept_ptr, out_k_ptr, out_v_ptr, index_ptr, frame_tokens, anchor, columns,
    stride_k_layer, stride_v_layer, stride_out_k_layer, stride_out_v_layer, stride_index_layer,
    stride_k_row, stride_v_row, stride_out_k_row, stride_out_v_row,
    ALL_KEPT: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    first_anchor = anchor * frame_tokens
    # The output row: the anchor frame first, then the kept candidates in order.
    if (token >= first_anchor) & (token < first_anchor + frame_tokens):
        row = token - first_anchor
        kept = 1
    else:
        candidate = token
        if token >= first_anchor:
            candidate = token - frame_tokens
        if ALL_KEPT:
            row = frame_tokens + candidate
            kept = 1
        else:
            row = frame_tokens
            marks = kept_ptr + layer * (tl.num_programs(0) - frame_tokens)
            kept = tl.load(marks + candidate)
            before = candidate * kept  # nothing to count for a token that is not kept
            for first in range(0, before, BLOCK_TOKENS):
                other = first + tl.arange(0, BLOCK_TOKENS)
                row += tl.sum(tl.load(marks + other, mask=other < before, other=0), 0)
    if kept != 0:
        tl.store(index_ptr + layer * stride_index_layer + row, token)
        k_row = k_ptr + layer * stride_k_layer + token.to(tl.int64) * stride_k_row
        v_row = v_ptr + layer * stride_v_layer + token.to(tl.int64) * stride_v_row
        out_k_row = out_k_ptr + layer * stride_out_k_layer + row.to(tl.int64) * stride_out_k_row
        out_v_row = out_v_ptr + layer * stride_out_v_layer + row.to(tl.int64) * stride_out_v_row
        for first in range(0, columns, BLOCK_COLUMNS):
            column = first + tl.arange(0, BLOCK_COLUMNS)
            mask = column < columns
            k = tl.load(k_row + column, mask=mask)
            v = tl.load(v_row + column, mask=mask)
            tl.store(out_k_row + column, k, mask=mask)
            tl.store(out_v_row + column, v, mask=mask)


@triton.jit(do_not_specialize=["candidates", "frame_tokens", "anchor", "frames", "stride_index_layer"])
def root_kernel(
    kept_ptr, near_ptr, row_ptr, root_ptr, index_ptr, candidates, frame_tokens, anchor, frames, stride_index_layer,
    BLOCK_CANDIDATES: tl.constexpr,
):  # fmt: skip
    """The output row of a kept candidate, and the position of the kept token that a dropped one joins; -1 for none."""
    layer = tl.program_id(1).to(tl.int64)
    kept_ptr += layer * candidates
    near_ptr += layer * candidates
    block = tl.arange(0, BLOCK_CANDIDATES)
    first_candidate = tl.program_id(0) * BLOCK_CANDIDATES
    before = tl.zeros([BLOCK_CANDIDATES], tl.int32)
    for first in range(0, first_candidate, BLOCK_CANDIDATES):
        before += tl.load(kept_ptr + first + block)
    candidate = first_candidate + block
    mask = candidate < candidates
    kept = tl.load(kept_ptr + candidate, mask=mask, other=0)
    row = frame_tokens + tl.sum(before, 0) + tl.cumsum(kept, 0) - kept
    # Each step goes to an earlier frame, and the anchor frame is kept.
    root = tl.load(near_ptr + candidate, mask=mask & (kept == 0), other=-1)
    for _ in range(2, frames):
        found = tl.load(kept_ptr + root - frame_tokens, mask=root >= frame_tokens, other=1)
        root = tl.load(near_ptr + root - frame_tokens, mask=found == 0, other=root)
    token = _token(candidate + frame_tokens, frame_tokens, anchor)
    tl.store(index_ptr + layer * stride_index_layer + row, token, mask=kept != 0)
    tl.store(row_ptr + layer * candidates + candidate, tl.where(kept != 0, row, -1), mask=mask)
    tl.store(root_ptr + layer * candidates + candidate, root, mask=mask)


@triton.jit(do_not_specialize=["frame_tokens", "anchor"])
def alike_kernel(
    k_ptr, inverse_ptr, cosine_ptr, near_ptr, root_ptr, alike_ptr, frame_tokens, anchor, columns, merge_above,
    stride_k_layer, stride_k_row, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of a candidate, where it joins one that it is like enough to be averaged with, that one's position; else -1."""
    candidate = tl.program_id(0)
    candidates = tl.num_programs(0)
    layer = tl.program_id(1).to(tl.int64)
    place = layer * candidates + candidate
    root = tl.load(root_ptr + place)
    alike = -1
    if root >= 0:
        cosine = tl.load(cosine_ptr + place)
        if root != tl.load(near_ptr + place):  # by way of others: only this is not known yet
            position = candidate + frame_tokens
            k_ptr += layer * stride_k_layer
            inverse_ptr += layer * (candidates + frame_tokens)
            k_row = k_ptr + _token(position, frame_tokens, anchor).to(tl.int64) * stride_k_row
            root_row = k_ptr + _token(root, frame_tokens, anchor).to(tl.int64) * stride_k_row
            products = tl.zeros([BLOCK_COLUMNS], tl.float32)
            for first in range(0, columns, BLOCK_COLUMNS):
                column = first + tl.arange(0, BLOCK_COLUMNS)
                k = tl.load(k_row + column, mask=column < columns, other=0.0)
                root_k = tl.load(root_row + column, mask=column < columns, other=0.0)
                products += k.to(tl.float32) * root_k.to(tl.float32)
            cosine = tl.sum(products, 0) * tl.load(inverse_ptr + root) * tl.load(inverse_ptr + position)
        if cosine >= merge_above:
            alike = root
    tl.store(alike_ptr + place, alike)


@triton.jit(do_not_specialize=["candidates", "frame_tokens", "stride_count_layer"])
def link_kernel(
    row_ptr, root_ptr, alike_ptr, next_ptr, count_ptr, candidates, frame_tokens, stride_count_layer,
    BLOCK_TOKENS: tl.constexpr, BLOCK_OTHERS: tl.constexpr,
):  # fmt: skip
    """How many a kept position stands for, and for each position the next one to be averaged with it; -1 for none."""
    layer = tl.program_id(1).to(tl.int64)
    row_ptr += layer * candidates
    root_ptr += layer * candidates
    alike_ptr += layer * candidates
    tokens = candidates + frame_tokens
    first_position = tl.program_id(0) * BLOCK_TOKENS
    position = first_position + tl.arange(0, BLOCK_TOKENS)
    mask = (position >= frame_tokens) & (position < tokens)
    row = tl.load(row_ptr + position - frame_tokens, mask=mask, other=-1)
    row = tl.where(position < frame_tokens, position, row)
    own = tl.load(alike_ptr + position - frame_tokens, mask=mask & (row < 0), other=-1)
    own = tl.where(row < 0, tl.where(own < 0, -2, own), position)  # -2: averaged with none, which are -1
    following = tl.full([BLOCK_TOKENS], 2147483647, tl.int32)
    count = tl.full([BLOCK_TOKENS], 1, tl.int32)
    for first in range(tl.maximum(first_position - frame_tokens, 0), candidates, BLOCK_OTHERS):
        other = first + tl.arange(0, BLOCK_OTHERS)
        root = tl.load(root_ptr + other, mask=other < candidates, other=-1)
        alike = tl.load(alike_ptr + other, mask=other < candidates, other=-1)
        count += tl.sum((root[None, :] == position[:, None]).to(tl.int32), 1)
        other_position = other + frame_tokens
        joins = (alike[None, :] == own[:, None]) & (other_position[None, :] > position[:, None])
        following = tl.minimum(following, tl.min(tl.where(joins, other_position[None, :], 2147483647), 1))
    following = tl.where(following == 2147483647, -1, following)
    tl.store(next_ptr + layer * tokens + position, following, mask=position < tokens)
    tl.store(count_ptr + layer * stride_count_layer + row, count, mask=(position < tokens) & (row >= 0))


@triton.jit(do_not_specialize=["frame_tokens", "anchor", "blocks", "stride_index_layer", "stride_count_layer"])
def merge_kernel(
    k_ptr, v_ptr, next_ptr, out_k_ptr, out_v_ptr, index_ptr, count_ptr, tokens, frame_tokens, anchor, heads, blocks,
    scale, stride_k_layer, stride_v_layer, stride_out_k_layer, stride_out_v_layer,
    stride_index_layer, stride_count_layer, stride_k_row, stride_v_row, stride_out_k_row, stride_out_v_row,
    HEAD_DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    """BLOCK_HEADS heads of an output row: the kept token, and in order those that are averaged with it."""
    row = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    layer = tl.program_id(1).to(tl.int64)
    index_ptr += layer * stride_index_layer
    next_ptr += layer * tokens
    position = row
    token = anchor * frame_tokens + row
    if row >= frame_tokens:
        token = tl.load(index_ptr + row)
        position = token
        if token < anchor * frame_tokens:
            position = token + frame_tokens
    elif block == 0:
        tl.store(index_ptr + row, token)
    count = tl.load(count_ptr + layer * stride_count_layer + row)
    head = block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    mask = (head < heads)[:, None]
    in_row = head[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]  # [BLOCK_HEADS, HEAD_DIM]
    k_ptr += layer * stride_k_layer
    v_ptr += layer * stride_v_layer
    own_k = tl.load(k_ptr + token.to(tl.int64) * stride_k_row + in_row, mask=mask, other=0.0)
    own_v = tl.load(v_ptr + token.to(tl.int64) * stride_v_row + in_row, mask=mask, other=0.0)
    out_k = out_k_ptr + layer * stride_out_k_layer + row.to(tl.int64) * stride_out_k_row + in_row
    out_v = out_v_ptr + layer * stride_out_v_layer + row.to(tl.int64) * stride_out_v_row + in_row

    if count == 1:
        tl.store(out_k, own_k, mask=mask)
        tl.store(out_v, own_v, mask=mask)
    else:
        k = own_k.to(tl.float32)
        v = own_v.to(tl.float32)
        square = tl.sum(k * k, 1)  # [BLOCK_HEADS]
        averaged = 1
        member = tl.load(next_ptr + position)
        while member >= 0:
            following = tl.load(next_ptr + member)
            member_token = _token(member, frame_tokens, anchor).to(tl.int64)
            member_k = tl.load(k_ptr + member_token * stride_k_row + in_row, mask=mask, other=0.0).to(tl.float32)
            member_v = tl.load(v_ptr + member_token * stride_v_row + in_row, mask=mask, other=0.0).to(tl.float32)
            k += member_k
            v += member_v
            square += tl.sum(member_k * member_k, 1)
            averaged += 1
            member = following

        # A query at the match shall score log(count) more: by longer keys, twice as long at most.
        square = square / averaged
        stretch = 1.0 + tl.minimum(1.0, tl.log(count.to(tl.float32)) / (_MATCH * scale * square))
        if averaged == 1:
            tl.store(out_k, (k * stretch[:, None]).to(own_k.dtype), mask=mask)
            tl.store(out_v, own_v, mask=mask)
        else:
            k = k / averaged
            length = tl.sqrt_rn(tl.sum(k * k, 1))
            factor = tl.where(length > 0.0, tl.sqrt_rn(square) / length * stretch, 0.0)
            tl.store(out_k, (k * factor[:, None]).to(own_k.dtype), mask=mask)
            tl.store(out_v, tl.div_rn(v, averaged.to(tl.float32)).to(own_v.dtype), mask=mask)


def device_capability(device: torch.device) -> tuple[int, int]:
    """Of the GPU; Hopper's for a CPU, where the interpreter takes any configuration."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@dataclass(frozen=True)
class NearestConfig:
    block_candidates: int
    block_earlier: int
    block_columns: int
    num_warps: int
    num_stages: int


def nearest_config(capability: tuple[int, int], dtype: torch.dtype) -> NearestConfig:
    """The launch configuration of nearest_kernel: the largest tiles and deepest pipeline that fit without spills, by
    compiling. Not timed. Columns come in blocks of 64 at most, of which any row is a multiple.
    """
    if dtype == torch.float32:  # full precision has no matrix unit: FMA, small tiles
        return NearestConfig(64, 64, 32, num_warps=8, num_stages=1)
    if capability[0] == 9:  # 192 of 227 KiB shared; half the registers hold products
        return NearestConfig(128, 256, 64, num_warps=8, num_stages=4)
    if capability[0] == 10:  # 192 KiB as well; a tile twice as large spills where its maxima are taken
        return NearestConfig(128, 128, 64, num_warps=8, num_stages=6)
    # 96 KiB shared, of two steps in flight, also fits the 99 KiB of the consumer chips of compute capability 8 and 12.
    return NearestConfig(128, 256, 64, num_warps=8, num_stages=3)


def _wrong(what: str, wanted: str, *got: object) -> str:
    came = [f"{list(x.shape)} {x.dtype}, stride {x.stride()}" if isinstance(x, torch.Tensor) else repr(x) for x in got]
    if len(got) > 1:
        came = [f"{name} {x}" for name, x in zip(what.replace(" and ", ", ").split(", "), came, strict=True)]
    return f"compress_chunk: {what} must be {wanted}, got {'; '.join(came)}"


def _check_tensors(**tensors: object) -> None:
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(_wrong(name, "a tensor", x))


def _check(
    k: torch.Tensor, v: torch.Tensor, out_k: torch.Tensor, out_v: torch.Tensor, index: torch.Tensor,
    count: torch.Tensor | None, frames: int, keep: int, anchor: int, rule: str, merge_above: float, scale: float,
) -> None:  # fmt: skip
    _check_tensors(k=k, v=v, out_k=out_k, out_v=out_v, index=index)
    for name, value in (("frames", frames), ("keep", keep), ("anchor", anchor)):
        if type(value) is not int:
            raise TypeError(_wrong(name, "an int", value))
    for name, value in (("merge_above", merge_above), ("scale", scale)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(_wrong(name, "a number", value))
    if k.dim() != 4 or k.shape[3] not in (64, 128) or not 1 <= k.shape[2] <= MAX_HEADS:
        sizes = f"of 1 to {MAX_HEADS} heads and head_dim 64 or 128"
        raise ValueError(_wrong("k", f"[layers, tokens, heads, head_dim], heads not first, {sizes}", k))
    layers, tokens, heads, head_dim = k.shape
    if not 1 <= layers <= MAX_LAYERS:
        raise ValueError(_wrong("k", f"of 1 to {MAX_LAYERS} layers", k))
    if frames < 1 or tokens < frames or tokens % frames:
        raise ValueError(_wrong("frames", f"a divisor of the {tokens} tokens", frames))
    if not 0 <= anchor < frames:
        raise ValueError(_wrong("anchor", f"from 0 to {frames - 1}", anchor))
    if keep < 1:
        raise ValueError(_wrong("keep", "at least 1", keep))
    if rule not in RULES:
        raise ValueError(_wrong("rule", " or ".join(map(repr, RULES)), rule))
    if not math.isfinite(merge_above):
        raise ValueError(_wrong("merge_above", "finite", merge_above))
    if not 1e-25 <= scale <= 1e25:
        raise ValueError(_wrong("scale", "from 1e-25 to 1e25", scale))
    frame_tokens = tokens // frames
    if layers * (tokens - frame_tokens) >= 2**31:
        raise ValueError(
            f"compress_chunk: k must have fewer than 2**31 tokens outside the anchor frames of all layers for backend "
            f"'triton', got {layers} layers of {tokens - frame_tokens}"
        )
    rows = frame_tokens + (frames - 1) * min(keep, frame_tokens)
    if v.shape != (layers, tokens, heads, head_dim):
        raise ValueError(_wrong("v", f"[{layers}, {tokens}, {heads}, {head_dim}]", v))
    if not out_k.shape == out_v.shape == (layers, rows, heads, head_dim):
        raise ValueError(_wrong("out_k and out_v", f"[{layers}, {rows}, {heads}, {head_dim}]", out_k, out_v))
    for name, numbers in (("index", index), ("count", count)):
        if numbers is not None and numbers.shape != (layers, rows):
            raise ValueError(_wrong(name, f"[{layers}, {rows}]", numbers))
    if not k.dtype is v.dtype is out_k.dtype is out_v.dtype:
        raise TypeError(_wrong("k, v, out_k and out_v", "of one dtype", *(x.dtype for x in (k, v, out_k, out_v))))
    if k.dtype not in DTYPES:
        raise TypeError(_wrong("k", " or ".join(map(str, DTYPES)), k))
    if any(x.stride(3) != 1 or (heads > 1 and x.stride(2) != head_dim) for x in (k, v, out_k, out_v)):
        raise ValueError(_wrong("k, v, out_k and out_v", "dense in their last two dimensions", k, v, out_k, out_v))
    for name, numbers in (("index", index), ("count", count)):
        if numbers is not None and numbers.dtype is not torch.int32:
            raise TypeError(_wrong(name, "torch.int32", numbers))
        if numbers is not None and numbers.stride(1) != 1 and rows > 1:
            raise ValueError(_wrong(name, "dense in its last dimension", numbers))


def _similarity_to_anchor(k: torch.Tensor, frame_tokens: int, anchor: int) -> torch.Tensor:
    """Of every candidate, [layers, candidates]."""
    layers, tokens, heads, head_dim = k.shape
    candidates, columns = tokens - frame_tokens, heads * head_dim
    mean = torch.empty((layers, columns), dtype=torch.float32, device=k.device)
    similarity = torch.empty((layers, candidates), dtype=torch.float32, device=k.device)
    anchor_mean_kernel[(triton.cdiv(columns, 32), layers)](
        k, mean, anchor * frame_tokens, frame_tokens, columns, k.stride(0), k.stride(1),
        BLOCK_ROWS=256, BLOCK_COLUMNS=32, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    similarity_kernel[(triton.cdiv(candidates, 4), layers)](
        k, mean, similarity, candidates, frame_tokens, anchor, columns, k.stride(0), k.stride(1),
        BLOCK_TOKENS=4, BLOCK_COLUMNS=1024, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return similarity


def _nearest(k: torch.Tensor, frame_tokens: int, anchor: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of every candidate, its nearest position of an earlier frame: its cosine, and where; and 1 / |k| by position."""
    layers, tokens, heads, head_dim = k.shape
    candidates, columns = tokens - frame_tokens, heads * head_dim
    config = nearest_config(device_capability(k.device), k.dtype)
    # Positions of the last frame are nobody's earlier ones: as many of the others as there are candidates.
    blocks = triton.cdiv(candidates, config.block_earlier)
    inverse = torch.empty((layers, tokens), dtype=torch.float32, device=k.device)
    best = torch.empty((layers, blocks, candidates), dtype=torch.float32, device=k.device)
    place = torch.empty((layers, blocks, candidates), dtype=torch.int32, device=k.device)
    similarity = torch.empty((layers, candidates), dtype=torch.float32, device=k.device)
    near = torch.empty((layers, candidates), dtype=torch.int32, device=k.device)
    norms_kernel[(triton.cdiv(tokens, 4), layers)](
        k, inverse, tokens, frame_tokens, anchor, columns, k.stride(0), k.stride(1),
        BLOCK_TOKENS=4, BLOCK_COLUMNS=1024, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    nearest_kernel[(blocks, triton.cdiv(candidates, config.block_candidates), layers)](
        k, inverse, best, place, candidates, frame_tokens, anchor, columns, k.stride(0), k.stride(1),
        BLOCK_CANDIDATES=config.block_candidates, BLOCK_EARLIER=config.block_earlier,
        BLOCK_COLUMNS=config.block_columns, PRECISION="ieee" if k.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    reduce_kernel[(triton.cdiv(candidates, 256), layers)](
        inverse, best, place, similarity, near, candidates, frame_tokens, blocks,
        BLOCK_CANDIDATES=256, BLOCK_EARLIER=config.block_earlier, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return similarity, near, inverse


def _merge(
    k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor, cosine: torch.Tensor, near: torch.Tensor,
    inverse: torch.Tensor, out_k: torch.Tensor, out_v: torch.Tensor, index: torch.Tensor, count: torch.Tensor,
    *, frames: int, anchor: int, merge_above: float, scale: float,
) -> None:  # fmt: skip
    layers, tokens, heads, head_dim = k.shape
    frame_tokens, candidates = tokens // frames, tokens - tokens // frames
    row, root, alike = torch.empty((3, layers, candidates), dtype=torch.int32, device=k.device)
    following = torch.empty((layers, tokens), dtype=torch.int32, device=k.device)
    root_kernel[(triton.cdiv(candidates, 1024), layers)](
        kept, near, row, root, index, candidates, frame_tokens, anchor, frames, index.stride(0),
        BLOCK_CANDIDATES=1024, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    alike_kernel[(candidates, layers)](
        k, inverse, cosine, near, root, alike, frame_tokens, anchor, heads * head_dim, float(merge_above),
        k.stride(0), k.stride(1), BLOCK_COLUMNS=1024, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    link_kernel[(triton.cdiv(tokens, 32), layers)](
        row, root, alike, following, count, candidates, frame_tokens, count.stride(0),
        BLOCK_TOKENS=32, BLOCK_OTHERS=256, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    # 16 numbers of K and of V a thread, in 16 bytes each where they are of 16 bits; any number of heads fits.
    block_heads = min(triton.next_power_of_2(heads), 2048 // head_dim)
    blocks = triton.cdiv(heads, block_heads)
    merge_kernel[(out_k.shape[1] * blocks, layers)](
        k, v, following, out_k, out_v, index, count, tokens, frame_tokens, anchor, heads, blocks, float(scale),
        *(x.stride(0) for x in (k, v, out_k, out_v, index, count)), *(x.stride(1) for x in (k, v, out_k, out_v)),
        HEAD_DIM=head_dim, BLOCK_HEADS=block_heads, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def compress_chunk(
    k: torch.Tensor,
    v: torch.Tensor,
    out_k: torch.Tensor,
    out_v: torch.Tensor,
    index: torch.Tensor,
    count: torch.Tensor | None,
    *,
    frames: int,
    keep: int,
    pooled: bool,
    anchor: int,
    rule: str,
    merge_above: float,
    scale: float,
) -> None:
    """Keep a chunk's anchor frame and, of its other frames, the tokens whose keys resemble earlier frames least.

    The similarity of a token by `rule`:
    - "similarity": <k, m> / (|k| |m| + 1e-8), m the mean of the anchor frame's keys;
    - "nearest": the largest <x, x_u> of the tokens u of earlier frames, x = k / (|k| + 1e-8), where the anchor frame
      comes before all others. A token whose |k| is not finite in fp32 is most similar, and nobody's nearest; a token
      with nothing to compare it with is least similar.
    Both over all heads * head_dim numbers. Each other frame keeps its `keep` least similar tokens or, `pooled`, the
    other frames together keep (frames - 1) * keep. Of equal similarities the earlier token is kept first; a NaN counts
    as most similar. Each layer is pruned on its own.

    With `count`, what is dropped is merged: a dropped token joins its nearest one, of equals the earliest, or what that
    has joined itself, until it is one that is kept. Of a kept token, with n that counts it and all that joined it:
        v = the mean of v over A;   k, of each head, = m / |m| sqrt(q) (1 + min(1, log(n) / (.8 scale q)))
    where A is the token and those that joined it with <x, x_kept> >= merge_above, m the mean of k over A and q that of
    |k|^2. Averaging shortens keys, so they get their length back. A query at the match scores about .8 scale q, so that
    part of it more is log(n) more, the weight of n keys. Where n is 1, rows are copied bit for bit; where A is the
    token alone, v is. k is zero where m is.

    Args:
        k, v: [layers, tokens, heads, head_dim], one dtype, bf16, fp16 or fp32; dense in heads and head_dim, layers and
            tokens of any stride. tokens = frames * frame_tokens, in that order; 1 to 128 heads, head_dim 64 or 128. At
            most 65535 layers, and fewer than 2**31 tokens outside the anchor frames of all layers. A layer is k[None].
        out_k, out_v: [layers, kept, heads, head_dim] with kept = frame_tokens + (frames - 1) * min(keep, frame_tokens);
            dtype and strides as for k. Written whole: the anchor frame, then the kept tokens in ascending order.
        index: int32 [layers, kept], dense in its last dimension: which of the chunk's tokens each output row is.
        count: None, or as index: n.
        frames: latent frames of the chunk. anchor: which of them is kept whole, from 0.
        keep: tokens kept of each other frame, at least 1; from frame_tokens on, everything is kept.
        merge_above: finite. scale: of the softmax that will read the keys, from 1e-25 to 1e25; commonly
            1 / sqrt(head_dim). Neither matters without `count`.

    Sums in fp32 in a fixed order: the same input gives the same bits. Any alignment will do; rows on multiples of 16
    bytes are read and written in wider pieces. Allocates from torch's allocator, a layer, at most 4 bytes a column, 28
    a candidate and 8 a token, and for the nearest 8 a candidate and block of 128 others (64 in fp32); does not
    synchronise. All tensors are on one GPU, which is the current one, of compute capability 8.0 or newer.

    Limits: the first dimension is layers, not a batch; V has the heads and head_dim of K; no gradients.

    Raises ValueError or TypeError, before any launch, on shapes, dtypes and strides other than these and on numbers out
    of range; also, with "nearest" or `count`, on bf16 in Triton's interpreter. Undefined, since not looked at: outputs
    that overlap each other, themselves or an input.
    """
    _check(k, v, out_k, out_v, index, count, frames, keep, anchor, rule, merge_above, scale)
    layers, tokens, heads, head_dim = k.shape
    frame_tokens = tokens // frames
    candidates = tokens - frame_tokens
    all_kept = keep >= frame_tokens or candidates == 0
    kept = None
    if not all_kept:
        if rule == "nearest" or count is not None:
            if k.dtype is torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
                wanted = "float16 or float32 in Triton's interpreter, which multiplies bf16 as integers"
                raise TypeError(_wrong("k", wanted, k))
            cosine, near, inverse = _nearest(k, frame_tokens, anchor)
            similarity = cosine
        if rule == "similarity":
            similarity = _similarity_to_anchor(k, frame_tokens, anchor)
        kept = torch.empty((layers, candidates), dtype=torch.int32, device=k.device)
        groups = 1 if pooled else frames - 1
        group_size = candidates // groups
        select_kernel[(triton.cdiv(group_size, 32), groups, layers)](
            similarity, kept, group_size, keep * (frames - 1) // groups,
            BLOCK_TOKENS=32, BLOCK_OTHERS=256, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        if count is not None:
            _merge(
                k, v, kept, cosine, near, inverse, out_k, out_v, index, count, frames=frames, anchor=anchor,
                merge_above=merge_above, scale=scale,
            )  # fmt: skip
            return
    gather_kernel[(tokens, layers)](
        k, v, kept, out_k, out_v, index, frame_tokens, anchor, heads * head_dim,
        *(x.stride(0) for x in (k, v, out_k, out_v, index)), *(x.stride(1) for x in (k, v, out_k, out_v)),
        ALL_KEPT=all_kept, BLOCK_TOKENS=1024, BLOCK_COLUMNS=1024, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    if count is not None:
        count.fill_(1)
