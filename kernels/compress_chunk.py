"""Pruning of a chunk against its anchor frame, after WorldKV, arXiv 2605.22718, section on compression.

Four launches for all layers: the anchor's mean key; every other token's cosine similarity to it, over all
heads at once; the least similar tokens, by counting how many come before each; and the copy of what was kept.
Sums run in fp32 in a fixed order and no fp32 copy of the chunk is made: the only temporaries are, of each
layer, the mean key [heads * head_dim], the similarities and the marks [candidates].

A candidate is a token outside the anchor frame, numbered in the chunk's order. The grid's last dimension is
the layers, which share nothing: a layer gets the bits that it would get alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_HEADS = 128  # more are tokens, of tensors with heads first
MAX_LAYERS = 65535  # of the dimension of a CUDA grid that counts them
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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


def _wrong(what: str, wanted: str, *got: object) -> str:
    came = [f"{list(x.shape)} {x.dtype}, stride {x.stride()}" if isinstance(x, torch.Tensor) else str(x) for x in got]
    return f"compress_chunk: {what} must be {wanted}, got {'; '.join(came)}"


def compress_chunk(
    k: torch.Tensor,
    v: torch.Tensor,
    out_k: torch.Tensor,
    out_v: torch.Tensor,
    index: torch.Tensor,
    *,
    frames: int,
    keep: int,
    pooled: bool,
    anchor: int,
) -> None:
    """Keep a chunk's anchor frame and, of its other frames, the tokens whose keys resemble that frame least.

    The similarity of a token is <k, m> / (|k| |m| + 1e-8), m the mean of the anchor frame's keys, both over all
    heads * head_dim numbers. Each other frame keeps its `keep` least similar tokens or, `pooled`, the other frames
    together keep (frames - 1) * keep. Of equal similarities the earlier token is kept first; a NaN counts as most
    similar. Each layer is pruned on its own. Four launches for all layers, or one where all is kept.

    Args:
        k, v: [layers, tokens, heads, head_dim], one dtype, bf16, fp16 or fp32; dense in heads and head_dim, layers and
            tokens of any stride. tokens = frames * frame_tokens, in that order; 1 to 128 heads, head_dim 64 or 128. At
            most 65535 layers, and fewer than 2**31 tokens outside the anchor frames of all layers. A layer is k[None].
        out_k, out_v: [layers, kept, heads, head_dim] with kept = frame_tokens + (frames - 1) * min(keep, frame_tokens);
            dtype and strides as for k. Written whole: the anchor frame, then the kept tokens in ascending order.
        index: int32 [layers, kept], dense in its last dimension: which of the chunk's tokens each output row is.
        frames: latent frames of the chunk. anchor: which of them is kept whole, from 0.
        keep: tokens kept of each other frame, at least 1; from frame_tokens on, everything is kept.

    Sums in fp32 in a fixed order: the same input gives the same bits. Any alignment will do; rows on multiples of 16
    bytes are read and written in wider pieces. Allocates, a layer, 4 bytes a column and 8 a candidate, from torch's
    allocator; does not synchronise. All tensors are on one GPU, which is the current one.

    Limits: the first dimension is layers, not a batch; V has the heads and head_dim of K; no gradients.

    Raises ValueError or TypeError, before any launch, on shapes, dtypes and strides other than these and on numbers out
    of range. Undefined, since not looked at: outputs that overlap each other or an input.
    """
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
    columns = heads * head_dim
    frame_tokens = tokens // frames
    candidates = tokens - frame_tokens
    kept = None
    all_kept = keep >= frame_tokens or candidates == 0
    if layers * candidates >= 2**31:
        raise ValueError(
            f"compress_chunk: k must have fewer than 2**31 tokens outside the anchor frames of all layers for backend "
            f"'triton', got {layers} layers of {candidates}"
        )
    rows = frame_tokens + (frames - 1) * min(keep, frame_tokens)
    if v.shape != (layers, tokens, heads, head_dim):
        raise ValueError(_wrong("v", f"[{layers}, {tokens}, {heads}, {head_dim}]", v))
    if not out_k.shape == out_v.shape == (layers, rows, heads, head_dim):
        raise ValueError(_wrong("out_k and out_v", f"[{layers}, {rows}, {heads}, {head_dim}]", out_k, out_v))
    if index.shape != (layers, rows):
        raise ValueError(_wrong("index", f"[{layers}, {rows}]", index))
    if not k.dtype is v.dtype is out_k.dtype is out_v.dtype:
        raise TypeError(_wrong("k, v, out_k and out_v", "of one dtype", k, v, out_k, out_v))
    if k.dtype not in DTYPES:
        raise TypeError(_wrong("k", " or ".join(map(str, DTYPES)), k))
    if index.dtype is not torch.int32:
        raise TypeError(_wrong("index", "torch.int32", index))
    layer_strides, row_strides = [], []
    for x in (k, v, out_k, out_v):
        stride_layer, stride_row, stride_head, stride_dim = x.stride()
        if stride_dim != 1 or (heads > 1 and stride_head != head_dim):
            raise ValueError(_wrong("k, v, out_k and out_v", "dense in their last two dimensions", k, v, out_k, out_v))
        layer_strides.append(stride_layer)
        row_strides.append(stride_row)
    stride_index_layer, stride_index_row = index.stride()
    if stride_index_row != 1 and rows > 1:
        raise ValueError(_wrong("index", "dense in its last dimension", index))
    if not all_kept:
        mean = torch.empty((layers, columns), dtype=torch.float32, device=k.device)
        similarity = torch.empty((layers, candidates), dtype=torch.float32, device=k.device)
        kept = torch.empty((layers, candidates), dtype=torch.int32, device=k.device)
        anchor_mean_kernel[(triton.cdiv(columns, 32), layers)](
            k, mean, anchor * frame_tokens, frame_tokens, columns, layer_strides[0], row_strides[0],
            BLOCK_ROWS=256, BLOCK_COLUMNS=32, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        similarity_kernel[(triton.cdiv(candidates, 4), layers)](
            k, mean, similarity, candidates, frame_tokens, anchor, columns, layer_strides[0], row_strides[0],
            BLOCK_TOKENS=4, BLOCK_COLUMNS=1024, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        groups = 1 if pooled else frames - 1
        group_size = candidates // groups
        select_kernel[(triton.cdiv(group_size, 32), groups, layers)](
            similarity, kept, group_size, keep * (frames - 1) // groups,
            BLOCK_TOKENS=32, BLOCK_OTHERS=256, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    gather_kernel[(tokens, layers)](
        k, v, kept, out_k, out_v, index, frame_tokens, anchor, columns,
        *layer_strides, stride_index_layer, *row_strides,
        ALL_KEPT=all_kept, BLOCK_TOKENS=1024, BLOCK_COLUMNS=1024, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
