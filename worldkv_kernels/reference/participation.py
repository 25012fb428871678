"""Participation in plain PyTorch. Reads the window's tables on the host, so on a GPU it synchronises."""

from __future__ import annotations

import torch

from .segment_attention import exp_, log_weights, queries_at_once, window_rows, window_scores


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
    """The mean over queries of exp(scale * R(-shift) q . k + log_weight - lse), for each of the window's rows."""
    q_len, heads, _ = q.shape
    group_size = heads // k_pool.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    rows, lengths = window_rows("participation", tiles, tail_rows, ranges, num_segments, k_pool)
    of_rows = log_weights(weights, lengths, wide) if has_weight else None
    step = queries_at_once(rows)
    tokens = min(len(rows), out.shape[1])
    for head in range(heads):
        k = k_pool[rows, head // group_size].to(wide)
        sums = torch.zeros(len(rows), dtype=wide, device=q.device)
        for first in range(0, q_len, step):
            query = q[first : first + step, head]
            scores, _ = window_scores(query, k, lengths, turns if has_shift else None, scale)
            differences = scores.mul_(scale).sub_(lse[head, first : first + step, None]).to(wide)
            if of_rows is not None:
                differences += of_rows
            sums += exp_(differences).sum(dim=0)
        out[head, :tokens] = sums[:tokens] / q_len
    out[:, tokens:] = 0
