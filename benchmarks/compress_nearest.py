"""For the bench of compress_chunk by rule "nearest" and with merging: keys, counts, a rival in eager PyTorch, a check.

The first frame is the anchor.
"""

from __future__ import annotations

import math

import torch
from common import relative_error, worst

from worldkv_kernels.reference import compress_chunk as reference

MERGE_ABOVE = 0.95
# Of a key and the one before it, at an even place of the frame and at an odd one: after 10 frames the first are still
# above MERGE_ABOVE, and the others are at no time.
COSINES = 0.995, 0.6


def video_keys(
    layers: int, frames: int, frame_tokens: int, heads: int, head_dim: int, generator: torch.Generator
) -> torch.Tensor:
    """Random keys of which every token is like the one at its place in the frame before, half of them very like it.

    [layers, tokens, heads, head_dim] in fp32, of unit variance. What is dropped first are the very like ones, which
    reach the anchor from frame to frame.
    """
    shape, like = (layers, frame_tokens, heads, head_dim), dict(dtype=torch.float32, device=generator.device)
    frame = torch.randn(shape, generator=generator, **like)
    cosine = torch.tensor(COSINES, **like).repeat((frame_tokens + 1) // 2)[:frame_tokens, None, None]
    keys = [frame]
    for _ in range(1, frames):
        noise = torch.randn(shape, generator=generator, **like)
        frame = cosine * frame + (1 - cosine.square()).sqrt() * noise
        keys.append(frame)
    return torch.cat(keys, dim=1)


def averaged_tokens(frames: int, frame_tokens: int, keep: int) -> int:
    """How many tokens of `video_keys` are dropped and averaged into others, for up to 10 frames."""
    return (frames - 1) * min(frame_tokens - keep, (frame_tokens + 1) // 2)


def products_flops(frames: int, frame_tokens: int, columns: int) -> int:
    """Of each token with each of the frames before its own, of a layer."""
    return 2 * (frames * (frames - 1) // 2 * frame_tokens**2) * columns


def nearest_bytes(
    frames: int, frame_tokens: int, keep: int, columns: int, itemsize: int, layers: int, merge: bool
) -> int:
    """Of all layers: K read once, the kept and the averaged V read once, the kept K and V written, an int32 index and
    with `merge` a count. Temporaries, and what has to be read again, are not counted."""
    kept = frame_tokens + (frames - 1) * keep
    averaged = averaged_tokens(frames, frame_tokens, keep) if merge else 0
    rows = frames * frame_tokens + 3 * kept + averaged
    return layers * (rows * columns * itemsize + 4 * kept * (1 + merge))


def _products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b.T in fp32, on the tensor cores of a GPU where a and b are of 16 bits."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        return torch.mm(a, b.T, out_dtype=torch.float32)
    return a.float() @ b.float().T


def eager_nearest(
    k: torch.Tensor, v: torch.Tensor, frames: int, keep: int, pooled: bool, merge: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rule and the merge of one layer in eager PyTorch, without host reads: k, v, index and count."""
    keys, frame_tokens = k.flatten(1), k.shape[0] // frames
    inverse = 1 / (keys.float().norm(dim=1) + 1e-8)
    found = []
    for first in range(frame_tokens, len(keys), frame_tokens):
        own = slice(first, first + frame_tokens)
        found.append((_products(keys[own], keys[:first]) * inverse[own, None] * inverse[:first]).max(dim=1))
    similarity, near = torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])
    integers = dict(dtype=torch.int64, device=k.device)
    if pooled:
        chosen = similarity.topk(keep * (frames - 1), largest=False).indices.sort().values
    else:
        lowest = similarity.view(frames - 1, -1).topk(keep, dim=1, largest=False).indices.sort(dim=1).values
        chosen = (lowest + torch.arange(frames - 1, **integers)[:, None] * frame_tokens).flatten()
    index = torch.cat([torch.arange(frame_tokens, **integers), chosen + frame_tokens])
    count = torch.ones(len(index), **integers)
    if not merge:
        return k[index], v[index], index, count
    rows = torch.full((len(keys),), -1, **integers)
    rows[index] = torch.arange(len(index), **integers)
    kept = rows >= 0
    for first in range(frame_tokens, len(keys), frame_tokens):
        own = rows[first : first + frame_tokens]
        own.copy_(torch.where(own >= 0, own, rows[near[first - frame_tokens : first]]))
    count = torch.zeros(len(index), **integers).index_add_(0, rows, torch.ones_like(rows))
    root = index[rows]
    cosine = (keys.float() * keys[root].float()).sum(dim=1) * inverse * inverse[root]
    averaged = (kept | (cosine >= MERGE_ABOVE)).float()

    def mean(x: torch.Tensor) -> torch.Tensor:
        """Over each row's averaged tokens, of fp32 x [tokens, ...]."""
        weight = averaged.view(-1, *[1] * (x.dim() - 1))
        total = torch.zeros(len(index), *x.shape[1:], dtype=torch.float32, device=x.device)
        members = torch.zeros(len(index), *weight.shape[1:], dtype=torch.float32, device=x.device)
        return total.index_add_(0, rows, x * weight) / members.index_add_(0, rows, weight)

    mean_k, square = mean(k.float()), mean(k.float().square().sum(dim=-1, keepdim=True))
    stretch = 1 + (count.float().log()[:, None, None] / (0.8 * k.shape[2] ** -0.5 * square)).clamp_max(1)
    merged_k = mean_k / mean_k.norm(dim=-1, keepdim=True) * square.sqrt() * stretch
    alone = (count == 1)[:, None, None]
    return torch.where(alone, k[index], merged_k.to(k.dtype)), mean(v.float()).to(v.dtype), index, count


def merge_error(
    k: torch.Tensor, v: torch.Tensor, nearest: reference.Nearest, out_k: torch.Tensor, out_v: torch.Tensor,
    index: torch.Tensor, count: torch.Tensor,
) -> float:  # fmt: skip
    """Relative error of the merged K and V of a layer, given its kept tokens. inf where a count is wrong."""
    order = torch.arange(len(k), dtype=torch.int64, device=k.device)
    rows = reference._rows(index, nearest.place, order)
    want_count = torch.bincount(rows[rows >= 0], minlength=len(index))
    if not torch.equal(count.long(), want_count):
        return math.inf
    want_k, want_v = k[index], v[index]
    averaged = reference._averaged(k, index, order, rows, MERGE_ABOVE)
    reference._merge(k, v, want_k, want_v, want_count, *averaged, k.shape[2] ** -0.5)
    return worst([relative_error(out_k, want_k), relative_error(out_v, want_v)])
