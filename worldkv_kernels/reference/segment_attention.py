"""Segment attention in plain PyTorch. Reads the window's tables on the host, so on a GPU it synchronises."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_TILE_ROWS = 128
_MAX_SCORES = 1 << 24  # scores held at once, so that a long window does not need gigabytes
# Weights below exp(-70) of the largest are 0: denormals, which products come to as well, slow a CPU a hundredfold.
_LARGE = 1024.0  # scores from which on their last bits in fp32 are worth a tenth of a per mille of a weight, or more
_LOG_NOTHING, _NOTHING = -70.0, 4e-31  # exp(-70) is 3.98e-31


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
    """softmax(scale * R(-shift) q . k + log_weight) v over the window's rows, segment by segment, in fp32 at least."""
    q_len, heads, _ = q.shape
    group_size = heads // k_pool.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    rows, lengths = window_rows("segment_attention", tiles, tail_rows, ranges, num_segments, k_pool)
    of_rows = log_weights(weights, lengths, wide) if has_weight else None
    step = queries_at_once(rows)
    for head in range(heads):
        k = k_pool[rows, head // group_size].to(wide)
        v = v_pool[rows, head // group_size].to(wide)
        shares = []
        for first in range(0, q_len, step):
            query = q[first : first + step, head]
            scores, row_max = window_scores(query, k, lengths, turns if has_shift else None, scale)
            # The scale after the difference, which is exact where it matters: large scores lose no digit.
            differences = scores.sub_(row_max).to(wide).mul_(scale)
            if of_rows is not None:
                differences += of_rows
                highest_difference = differences.amax(dim=1, keepdim=True)
                differences -= highest_difference
            p = exp_(differences)
            row_sum = p.sum(dim=1, keepdim=True)
            out[first : first + step, head] = ((p @ v) / row_sum).to(out.dtype)
            if lse is not None:
                log_sum = row_sum.log() if of_rows is None else row_sum.log() + highest_difference
                lse[head, first : first + step] = (row_max * scale + log_sum).squeeze(1)
            if mass is not None:
                of_segments = torch.stack([part.sum(dim=1) for part in p.split(lengths, dim=1)], dim=1)
                shares.append((of_segments / row_sum).sum(dim=0))
        if mass is not None:
            num = min(len(lengths), mass.shape[1])
            mass[head, :num] = (torch.stack(shares).sum(dim=0) / q_len)[:num]
            mass[head, num:] = 0.0


def window_rows(
    op: str, tiles: torch.Tensor, tail_rows: torch.Tensor, ranges: torch.Tensor, num_segments: torch.Tensor,
    pool: torch.Tensor,
) -> tuple[torch.Tensor, list[int]]:  # fmt: skip
    """The pool rows of all segments, in order, on the pool's device, and how many each segment has."""
    num = check_num_segments(num_segments, ranges, op)
    tiles, tail_rows = tiles[:, 0].cpu(), tail_rows[:, 0].cpu()
    segments = []
    for full_lo, full_hi, tail_lo, tail_hi in ranges[1 : 1 + num].tolist():
        full = tiles[full_lo:full_hi, None] + torch.arange(_TILE_ROWS, dtype=torch.int64, device="cpu")
        segments.append(torch.cat([full.flatten(), tail_rows[tail_lo:tail_hi]]))
    rows = torch.cat(segments)
    check_rows(*map(int, rows.aminmax()), len(pool), op)
    return rows.to(pool.device), [len(segment) for segment in segments]


def log_weights(weights: torch.Tensor, lengths: list[int], dtype: torch.dtype) -> torch.Tensor:
    """The natural logarithm of each row's weight."""
    of_segments = weights[: len(lengths)].to(dtype) * math.log(2)
    return of_segments.repeat_interleave(torch.tensor(lengths, dtype=torch.int64, device=weights.device))


def queries_at_once(rows: torch.Tensor) -> int:
    return max(1, _MAX_SCORES // max(1, len(rows)))


def check_num_segments(num_segments: torch.Tensor, ranges: torch.Tensor, op: str = "segment_attention") -> int:
    """How many segments the tables hold."""
    num = int(num_segments)
    if not 1 <= num < len(ranges):
        raise ValueError(f"{op}: num_segments must hold 1 to {len(ranges) - 1}, got {num}")
    return num


def check_rows(lowest: int, highest: int, pool_rows: int, op: str = "segment_attention") -> None:
    if lowest < 0 or highest >= pool_rows:
        wanted = f"rows of the pool, from 0 to {pool_rows - 1}"
        raise ValueError(f"{op}: tiles and tail_rows must name {wanted}, got {lowest} to {highest}")


def window_scores(
    q: torch.Tensor, k: torch.Tensor, lengths: list[int], turns: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q . k of queries [n, head_dim] and the rows k of a window, in k's dtype, or in float64 where they are large; and
    the largest of each query [n, 1]."""
    wide = k.dtype
    queries, parts = [q.to(wide)], [k]
    if turns is not None:
        # Rounded once to the input's dtype, as every backend reads it.
        queries = [_turned(queries[0], turn).to(q.dtype).to(wide) for turn in turns[: len(lengths)].to(wide)]
        parts = k.split(lengths)
    scores = _scores(queries, parts)
    row_max = scores.amax(dim=1, keepdim=True)
    if float(row_max.abs().amax()) * scale > _LARGE:
        # Sums of fp32 end differently in different orders, and a matrix product has several: equal keys would
        # get unlike weights.
        scores = _scores([x.double() for x in queries], [x.double() for x in parts])
        row_max = scores.amax(dim=1, keepdim=True)
    return scores, row_max


def exp_(x: torch.Tensor) -> torch.Tensor:
    """exp, in place, with 0 for less than exp(-70)."""
    return torch.threshold_(x.clamp_min_(_LOG_NOTHING).exp_(), _NOTHING, 0.0)


def _scores(queries: Sequence[torch.Tensor], parts: Sequence[torch.Tensor]) -> torch.Tensor:
    products = [q @ k.T for q, k in zip(queries, parts, strict=True)]
    return products[0] if len(products) == 1 else torch.cat(products, dim=1)


def _turned(q: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    turning, staying = q.split([2 * len(turn), q.shape[-1] - 2 * len(turn)], dim=-1)
    real, imag = turning[..., 0::2], turning[..., 1::2]
    cos, sin = turn[:, 0], turn[:, 1]
    turned = torch.stack([real * cos + imag * sin, imag * cos - real * sin], dim=-1).flatten(-2)
    return torch.cat([turned, staying], dim=-1)
