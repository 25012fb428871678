"""Norm, rotary embedding and append in plain PyTorch."""

from __future__ import annotations

import torch


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
    """Same contract as the public op, into `q_out` and the pools' rows."""
    tokens = q.shape[0]
    rows = torch.arange(tokens, dtype=torch.int64, device=q.device) + first_row
    factors = None
    if table is not None:
        factors = _factors(table, grid, pairs)
    of_k = torch.Size([tokens, *k_pool.shape[1:]])
    q_out.copy_(_norm_rope(q, q_weight, factors, q_out.shape, eps, round_before_rope))
    k_pool.index_copy_(0, rows, _norm_rope(k, k_weight, factors, of_k, eps, round_before_rope))
    v_pool.index_copy_(0, rows, v.reshape(of_k))


def _factors(table: torch.Tensor, grid: tuple[int, int, int], pairs: tuple[int, int, int]) -> torch.Tensor:
    """Cosine and sine of every token's pairs, [tokens, 1, head_dim / 2, 2]."""
    frames, height, width = grid
    token = torch.arange(frames * height * width, dtype=torch.int64, device=table.device)
    frame = token // (height * width)
    row = token // width % height
    col = token % width
    of_time, of_height, of_width = torch.split(table, pairs, dim=1)
    return torch.cat([of_time[frame], of_height[row], of_width[col]], dim=1).unsqueeze(1)


def _norm_rope(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    factors: torch.Tensor | None,
    shape: torch.Size,
    eps: float,
    round_before_rope: bool,
) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x
    if weight is not None:
        y = x.to(wide)
        y = y * (1.0 / (y.square().mean(dim=1, keepdim=True) + eps).sqrt())
        if round_before_rope:
            y = y.to(x.dtype)
            y = y * weight  # rounds again when the weight has x's dtype, as in the models
        else:
            y = y * weight.to(wide)
    y = y.reshape(shape)
    if factors is not None:
        real, imag = y.to(wide)[..., 0::2], y.to(wide)[..., 1::2]
        cos, sin = factors[..., 0], factors[..., 1]
        y = torch.stack([real * cos - imag * sin, real * sin + imag * cos], dim=-1).flatten(-2)
    return y.to(x.dtype)
