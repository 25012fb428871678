"""Chunks in 8 and 4 bits in plain PyTorch, K or V of one layer at a time, of which it makes copies in fp32."""

from __future__ import annotations

import torch

_BITS_OF = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def quantize_chunk(k: torch.Tensor, v: torch.Tensor, packed: torch.Tensor, *, bits: int, group_tokens: int) -> None:
    """Same contract as the public op, with a dimension of layers; groups of `group_tokens` in 4 bits.

    Input that is not finite, or in 4 bits too far apart, is packed so that it comes back as NaN.
    """
    for layer in range(len(k)):
        for x, row in ((k[layer], packed[layer, 0]), (v[layer], packed[layer, 1])):
            first = 0
            for part in _packed_8(x) if bits == 8 else _packed_4(x, group_tokens):
                part = part.contiguous().view(torch.uint8).flatten()
                row[first : first + len(part)] = part
                first += len(part)
            row[first:] = 0


def dequantize_chunk(
    packed: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    bits: int,
    group_tokens: int,
    chosen: torch.Tensor | None = None,
) -> None:
    """Same contract as the public op, with a dimension of layers; groups of `group_tokens` in 4 bits.

    Raises ValueError, before anything is written, where `chosen` names what there is not. Reads it on the host.
    """
    places, tokens = len(packed), k.shape[1]
    rows = [(layer, tokens) for layer in range(len(k))] if chosen is None else chosen.tolist()
    for i, (place, n) in enumerate(rows):
        if not (0 <= place < places and 0 <= n <= tokens):
            wanted = f"of places from 0 to {places - 1} and of 0 to {tokens} tokens"
            raise ValueError(f"dequantize_chunk: chosen must be {wanted}, got place {place}, {n} tokens in row {i}")
    for i, (place, n) in enumerate(rows):
        for x, row in ((k[i, :n], packed[place, 0]), (v[i, :n], packed[place, 1])):
            if n == 0:
                continue
            if bits == 8:
                _restore_8(row, x)
            else:
                _restore_4(row, x, group_tokens)


def _packed_8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [tokens, heads, head_dim] and scales [tokens, heads]."""
    largest = x.abs().amax(dim=2).float()
    scale = _scale(_divided(largest, 127.0), 127, torch.zeros_like(largest), x.dtype)
    return _codes(x.float(), scale[..., None], -127, 127).to(torch.int8), scale


def _packed_4(x: torch.Tensor, group_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bytes of two codes [tokens, heads, head_dim / 2], scales and minima [groups, heads, head_dim]."""
    tokens, heads, head_dim = x.shape
    groups = -(-tokens // group_tokens)
    # The last token again, to the end of the last group, changes no minimum and no maximum.
    token = torch.arange(groups * group_tokens, dtype=torch.int64, device=x.device).clamp_max(tokens - 1)
    values = x[token].float().view(groups, group_tokens, heads, head_dim)
    # Plus zero, since of zeros of both signs a minimum may be either.
    low, high = values.amin(dim=1) + 0.0, values.amax(dim=1) + 0.0
    step = _divided(high - low, 15.0)
    low = torch.where(step.isfinite(), low, 0.0)
    scale = _scale(step, 15, low, x.dtype)
    codes = _codes(values - low[:, None], scale[:, None], 0, 15).to(torch.uint8).flatten(0, 1)[:tokens]
    return codes[..., 0::2] | codes[..., 1::2] << 4, scale, low.to(x.dtype)


def _divided(x: torch.Tensor, by: float) -> torch.Tensor:
    """Rounded once: by a number, a GPU would multiply with its inverse."""
    return x / torch.full((), by, dtype=x.dtype, device=x.device)


def _scale(step: torch.Tensor, top: int, low: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The smallest number of the dtype from `step` on, or the one below where code `top` would pass the dtype's range.

    Infinite where the step is not finite.
    """
    scale = step.to(dtype)
    bits = scale.view(_BITS_OF[dtype]) + (scale.float() < step).to(_BITS_OF[dtype])
    over = bits.view(dtype).float() * top + low > torch.finfo(dtype).max
    scale = (bits - over.to(bits.dtype)).view(dtype)
    return torch.where(step.isfinite(), scale, float("inf"))


def _codes(x: torch.Tensor, scale: torch.Tensor, least: int, most: int) -> torch.Tensor:
    scale = scale.float()
    usable = (scale > 0) & scale.isfinite()
    return torch.where(usable, (x / scale).round().clamp(least, most), 0.0)


def _restore_8(row: torch.Tensor, out: torch.Tensor) -> None:
    tokens, heads, head_dim = out.shape
    codes = row[: out.numel()].view(torch.int8).view(tokens, heads, head_dim)
    scale = _numbers(row, out.numel(), tokens * heads, out.dtype).view(tokens, heads, 1)
    out.copy_(codes.float() * scale)


def _restore_4(row: torch.Tensor, out: torch.Tensor, group_tokens: int) -> None:
    tokens, heads, head_dim = out.shape
    groups = -(-tokens // group_tokens)
    first, size = out.numel() // 2, groups * heads * head_dim
    pairs = row[:first].view(tokens, heads, head_dim // 2)
    codes = torch.stack([pairs & 15, pairs >> 4], dim=-1).view(tokens, heads, head_dim)
    group = torch.arange(tokens, dtype=torch.int64, device=out.device) // group_tokens
    scale = _numbers(row, first, size, out.dtype).view(groups, heads, head_dim)[group]
    low = _numbers(row, first + size * out.element_size(), size, out.dtype).view(groups, heads, head_dim)[group]
    out.copy_(codes.float() * scale + low)


def _numbers(row: torch.Tensor, first: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """fp32 of the numbers of that dtype that begin at a byte; of a copy, since a view would want a storage aligned."""
    return row[first : first + count * dtype.itemsize].clone().view(dtype).float()
