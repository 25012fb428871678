"""Chunk compression in plain PyTorch, a layer and frame at a time, so that no fp32 copy of the chunk is made.

Products that look for the nearest key are in float64, of one layer at a time: equal keys then get equal similarities,
whatever order a matrix product takes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Of a key's squared length, how much a query at its match meets: .7 to .8 in all layers of the small world model but
# its first, by the median over queries.
_MATCH = 0.8


class Nearest(NamedTuple):
    """Of each token outside the anchor frame, the most similar key of the frames before its own, [frames - 1,
    frame_tokens]: its similarity in fp32, and its place in the order of the output, int64, -1 for none."""

    similarity: torch.Tensor
    place: torch.Tensor


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
    """Same contract as the public op, with a dimension of layers; `keep` tokens of each pruned frame, on average
    where pooled; merges where there is a `count`."""
    frame_tokens = k.shape[1] // frames
    whole = keep >= frame_tokens or frames == 1
    order = _order(frames, frame_tokens, anchor, k.device)
    for layer in range(len(k)):
        nearest = None
        if not whole and (rule == "nearest" or count is not None):
            nearest = nearest_keys(k[layer], frames, anchor)
        if whole:
            index[layer] = order
        else:
            similarity = nearest.similarity if rule == "nearest" else similarities(k[layer], frames, anchor)
            index[layer] = _kept(similarity, order, keep, pooled)
        torch.index_select(k[layer], 0, index[layer], out=out_k[layer])
        torch.index_select(v[layer], 0, index[layer], out=out_v[layer])
        if count is not None and whole:
            count[layer] = 1
        elif count is not None:
            rows = _rows(index[layer], nearest.place, order)
            count[layer] = torch.bincount(rows[rows >= 0], minlength=count.shape[1])
            tokens = _averaged(k[layer], index[layer], order, rows, merge_above)
            _merge(k[layer], v[layer], out_k[layer], out_v[layer], count[layer], *tokens, scale)


def _order(frames: int, frame_tokens: int, anchor: int, device: torch.device) -> torch.Tensor:
    """The chunk's tokens as the output has them: the anchor frame first."""
    token = torch.arange(frames * frame_tokens, dtype=torch.int64, device=device).view(frames, frame_tokens)
    return torch.cat([token[anchor], *(token[f] for f in range(frames) if f != anchor)])


def _kept(similarity: torch.Tensor, order: torch.Tensor, keep: int, pooled: bool) -> torch.Tensor:
    """The kept tokens of one layer."""
    others, frame_tokens = similarity.shape
    groups = similarity.reshape(1, -1) if pooled else similarity
    candidates = order[frame_tokens:].reshape(groups.shape)
    # A stable sort puts equal similarities in the order of their tokens.
    least = groups.sort(dim=1, stable=True).indices[:, : keep * others // len(groups)]
    return torch.cat([order[:frame_tokens], candidates.gather(1, least).flatten().sort().values])


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


def nearest_keys(k: torch.Tensor, frames: int, anchor: int) -> Nearest:
    """The nearest key before each token outside the anchor frame, by cosine, all heads at once.

    A key whose squared length is not finite in fp32 is near to none, and is itself most similar.
    """
    by_frame = k.reshape(frames, k.shape[0] // frames, -1)
    found, earlier = [], []
    for frame in (anchor, *(f for f in range(frames) if f != anchor)):
        unit = by_frame[frame].double()
        squares = unit.square().sum(dim=1)
        comparable = squares.float().isfinite()
        unit = torch.where(comparable[:, None], unit / (squares.sqrt() + 1e-8)[:, None], torch.nan)
        if earlier:
            products = (unit @ torch.cat(earlier).T).float()
            similarity, place = products.nan_to_num_(nan=float("-inf")).max(dim=1)
            place = torch.where(similarity == float("-inf"), -1, place)
            found.append((torch.where(comparable, similarity, float("inf")), place))
        earlier.append(unit)
    return Nearest(*map(torch.stack, zip(*found, strict=True)))


def _rows(index: torch.Tensor, nearest: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The output row of each token in the order of the output: its own, or that of the token it joins; -1 for none."""
    frame_tokens = nearest.shape[1]
    rows = torch.full_like(order, -1)
    rows[_among(order, index)] = torch.arange(len(index), dtype=torch.int64, device=order.device)
    for own, near in zip(rows[frame_tokens:].view(nearest.shape), nearest, strict=True):
        joined = torch.where(near >= 0, rows[near.clamp_min(0)], -1)  # of a token before, so that its row is settled
        own.copy_(torch.where(own >= 0, own, joined))
    return rows


def _among(order: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Which of the tokens in the order of the output are kept."""
    kept = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    kept[index.long()] = True
    return kept[order]


def _averaged(
    k: torch.Tensor, index: torch.Tensor, order: torch.Tensor, rows: torch.Tensor, merge_above: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens whose keys and values are averaged, row by row, each row's own first; and how many a row has."""
    dropped = (rows >= 0) & ~_among(order, index)
    rows, tokens = rows[dropped], order[dropped]
    keys, own = (k[x].flatten(1).double() for x in (tokens, index[rows].long()))
    lengths = (keys.norm(dim=1) + 1e-8) * (own.norm(dim=1) + 1e-8)
    alike = ((keys * own).sum(dim=1) / lengths).float() >= merge_above
    rows, tokens = rows[alike], tokens[alike]
    every_row = torch.arange(len(index), dtype=torch.int64, device=k.device)
    of_row, place = torch.cat([every_row, rows]).sort(stable=True)
    return torch.cat([index.long(), tokens])[place], torch.bincount(of_row)


def _merge(
    k: torch.Tensor, v: torch.Tensor, out_k: torch.Tensor, out_v: torch.Tensor, count: torch.Tensor,
    tokens: torch.Tensor, sizes: torch.Tensor, scale: float,
) -> None:  # fmt: skip
    """Write the rows that stand for several tokens over those of the tokens that were kept."""
    rows = torch.nonzero(count > 1).flatten()
    tokens = tokens[(count > 1).repeat_interleave(sizes)]
    sizes = sizes[rows]
    if not len(rows):
        return

    def means(x: torch.Tensor) -> torch.Tensor:
        return torch.segment_reduce(x, "sum", lengths=sizes, axis=0) / sizes.view(-1, *[1] * (x.dim() - 1))

    keys = k[tokens].float()
    mean = means(keys)
    squares = means(keys.square().sum(dim=-1))[..., None]
    direction = (squares / mean.square().sum(dim=-1, keepdim=True)).sqrt().nan_to_num(nan=0.0, posinf=0.0)
    alone = (sizes == 1)[:, None, None]
    weight = (count[rows].float().log()[:, None, None] / (_MATCH * scale * squares)).clamp_max(1.0)
    out_k[rows] = (torch.where(alone, mean, mean * direction) * (1 + weight)).to(k.dtype)
    out_v[rows] = means(v[tokens].float()).to(v.dtype)
