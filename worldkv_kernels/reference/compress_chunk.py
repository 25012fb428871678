"""Chunk compression in plain PyTorch, a layer and frame at a time, so that no fp32 copy of the chunk is made."""

from __future__ import annotations

import torch


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
    """Same contract as the public op, with a dimension of layers; `keep` tokens of each pruned frame, on average
    where pooled."""
    for layer in range(len(k)):
        index[layer] = _kept(k[layer], frames, keep, pooled, anchor)
        torch.index_select(k[layer], 0, index[layer], out=out_k[layer])
        torch.index_select(v[layer], 0, index[layer], out=out_v[layer])


def _kept(k: torch.Tensor, frames: int, keep: int, pooled: bool, anchor: int) -> torch.Tensor:
    """The kept tokens of one layer."""
    frame_tokens = k.shape[0] // frames
    token = torch.arange(k.shape[0], dtype=torch.int64, device=k.device).view(frames, frame_tokens)
    others = [f for f in range(frames) if f != anchor]
    if keep >= frame_tokens or not others:
        return torch.cat([token[anchor], *(token[f] for f in others)])
    similarity = similarities(k, frames, anchor)  # [frames - 1, frame_tokens]
    groups = similarity.reshape(1, -1) if pooled else similarity
    candidates = token[others].reshape(groups.shape)
    # A stable sort puts equal similarities in the order of their tokens.
    order = groups.sort(dim=1, stable=True).indices[:, : keep * len(others) // len(groups)]
    chosen = candidates.gather(1, order).flatten().sort().values
    return torch.cat([token[anchor], chosen])


def similarities(k: torch.Tensor, frames: int, anchor: int) -> torch.Tensor:
    """Cosine similarity of each token outside the anchor frame to the anchor's mean key, all heads at once."""
    wide = torch.promote_types(k.dtype, torch.float32)
    by_frame = k.reshape(frames, k.shape[0] // frames, -1)
    mean = by_frame[anchor].to(wide).mean(dim=0)
    rows = []
    for frame in range(frames):
        if frame != anchor:
            keys = by_frame[frame].to(wide)
            rows.append(keys @ mean / (keys.norm(dim=1) * mean.norm() + 1e-8))
    return torch.stack(rows).nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
