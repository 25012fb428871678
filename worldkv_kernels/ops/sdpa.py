"""segment_attention by gathering the window's K and V, and PyTorch's own attention over them.

Keys are turned in the gathered copy, not the query for each segment: PyTorch then runs once, not once a shift with a
merge after it, and turning a copy costs a few per cent of that. A turned key is rounded once to its dtype, as the
turned query is in the other backends. Log weights are an additive mask.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ..reference.segment_attention import check_num_segments, check_rows
from ..reference.segment_attention import segment_attention as reference
from ..window import TILE_ROWS
from .backends import exact

# Scores, with the scale, whose last bits in fp32 are worth 6e-5 of a weight. PyTorch multiplies by the scale before it
# takes differences, so what is larger is left to the reference.
_LARGE = 512.0
_BY_HEADS = 2048  # rows from which on attention gains more by heads that are dense than gathering them so costs
_WITHIN = np.arange(TILE_ROWS, dtype=np.int32)


def unavailable(device: torch.device) -> str | None:
    """Why PyTorch's attention cannot serve on `device`; None when it can."""
    if device.type != "cpu":
        return "it is for CPUs"
    if not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        return f"torch {torch.__version__} has no flash attention for CPUs"
    return None


def unsupported(kind: tuple) -> str | None:
    """Why it cannot serve a kind of segment_attention; None when it can."""
    if kind[4]:
        return "PyTorch's attention gives no softmax weight on each segment; the other backends do"
    return None


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
    mass: None,
    *,
    scale: float,
    has_shift: bool,
    has_weight: bool,
) -> None:
    """On a CPU. PyTorch's log-sum-exp, which it always computes, is as large as a query's largest score, or up to
    log(rows) larger: it says where scores are too large for PyTorch's order of operations, or have overflowed."""
    num = check_num_segments(num_segments, ranges)
    _, num_full, _, num_tail = ranges[0].tolist()
    full, tail = tiles.numpy()[:num_full], tail_rows.numpy()[:num_tail]
    # Full tiles first: fewer steps than segment by segment, and the order is the same wherever segments lie.
    rows = np.concatenate([(full[:, :1] + _WITHIN).ravel(), tail[:, 0]])
    check_rows(int(rows.min()), int(rows.max()), len(k_pool))
    if num == 1 and not has_shift and (rows[1:] - rows[:-1] == 1).all():
        k, v = (pool[rows[0] : rows[0] + len(rows)].transpose(0, 1) for pool in (k_pool, v_pool))
    else:
        index = torch.from_numpy(rows)
        k, v = _gathered(k_pool, index), _gathered(v_pool, index)
    mask = None
    if has_shift or has_weight:
        segments = torch.from_numpy(np.concatenate([full[:, 1].repeat(TILE_ROWS), tail[:, 1]]))
        if has_shift:
            _turn(k, turns.index_select(0, segments))
        if has_weight:
            mask = (weights.index_select(0, segments) * math.log(2)).expand(1, 1, len(q), len(rows))
    found, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask, scale=scale
    )
    if not float(log_sum.abs().amax()) <= _LARGE:  # NaN is not, either
        tables = (tiles, tail_rows, ranges, num_segments, turns, weights)
        options = dict(scale=scale, has_shift=has_shift, has_weight=has_weight)
        exact(reference)(q, k_pool, v_pool, *tables, out, lse, None, **options)
        return
    out.copy_(found[0].transpose(0, 1))
    if lse is not None:
        lse.copy_(log_sum[0])


def _gathered(pool: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[heads, rows, head_dim], a copy."""
    if len(rows) < _BY_HEADS:
        return pool.index_select(0, rows).transpose(0, 1)
    heads, head_dim = pool.shape[1:]
    gathered = torch.empty((heads, len(rows), head_dim), dtype=pool.dtype, device=pool.device)
    for head in range(heads):
        torch.index_select(pool[:, head], 0, rows, out=gathered[head])
    return gathered


def _turn(k: torch.Tensor, turns: torch.Tensor) -> None:
    """Turn keys [heads, rows, head_dim] in place, by the cosines and sines [rows, pairs, 2] of their rows."""
    turning = k[..., : 2 * turns.shape[1]]
    pairs = torch.view_as_complex(turning.float().unflatten(-1, (-1, 2)))
    pairs *= torch.view_as_complex(turns)
    if k.dtype != torch.float32:  # fp32 was turned where it lies
        turning.copy_(torch.view_as_real(pairs).flatten(-2))
