"""compress_chunk by plain loops in float64, written from its definition alone: nothing of the package is imported.

Tokens are counted by their place in the order of the output: the anchor frame first, then the others by time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

MATCH = 0.8  # of a key's squared length, what a query is taken to meet there


class Plain(NamedTuple):
    """What a chunk of one layer becomes."""

    index: list[int]  # the kept tokens
    count: list[int]  # how many tokens each row stands for
    averaged: list[list[int]]  # the tokens that each row averages, its own first
    k: torch.Tensor  # [kept, heads, head_dim] float64
    v: torch.Tensor
    shrunk: torch.Tensor  # [kept, heads], how many times longer the averaged keys are than their mean, NaN for no mean
    margin: float  # the least difference that decided anything; 0 where there was a tie


def compressed(
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    frames: int,
    keep_ratio: float,
    pooled: bool = True,
    anchor: int = 0,
    rule: str = "nearest",
    merge: bool = True,
    merge_above: float = 0.95,
    scale: float | None = None,
) -> Plain:
    """Of k, v [frames * frame_tokens, heads, head_dim]."""
    frame_tokens = len(k) // frames
    tokens = range(len(k))
    order = [t for t in tokens if t // frame_tokens == anchor] + [t for t in tokens if t // frame_tokens != anchor]
    k, v = k.double().cpu()[order], v.double().cpu()[order]
    nearest, similarity, margins = nearest_tokens(k.flatten(1), frame_tokens)
    if rule == "similarity":
        similarity = published_similarities(k.flatten(1), frame_tokens)
    kept, margin = selected(similarity, frames, frame_tokens, keep_ratio, pooled)
    joined: dict[int, list[int]] = {place: [] for place in kept}
    if merge:
        roots: dict[int, int | None] = {}
        for place in tokens:
            near = nearest[place]
            roots[place] = place if place in joined else None if near is None else roots[near]
            if place not in joined and near is not None:
                margin = min(margin, margins[place])
            if place not in joined and roots[place] is not None:
                joined[roots[place]].append(place)
    averaged = []
    for place in kept:
        cosines = [cosine(k[other].flatten(), k[place].flatten()) for other in joined[place]]
        margin = min([margin, *(abs(c - merge_above) for c in cosines)])
        averaged.append([place, *(other for other, c in zip(joined[place], cosines, strict=True) if c >= merge_above)])
    counts = [1 + len(joined[place]) for place in kept]
    scale = scale if scale is not None else 1 / math.sqrt(k.shape[2])
    rows = [merged(k, v, members, n, scale) for members, n in zip(averaged, counts, strict=True)]
    return Plain(
        [order[place] for place in kept], counts, [[order[place] for place in members] for members in averaged],
        *(torch.stack(x) for x in zip(*rows, strict=True)), margin,
    )  # fmt: skip


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Products first, so that those of whole numbers are exact and equal cosines of equal lengths equal."""
    return ((a * b).sum() / ((a.norm() + 1e-8) * (b.norm() + 1e-8))).item()


def nearest_tokens(k: torch.Tensor, frame_tokens: int) -> tuple[list[int | None], list[float], list[float]]:
    """Of each place: the nearest before its frame, its similarity, and by how much no other is as near."""
    squares = k.square().sum(dim=1)
    comparable = squares.float().isfinite().tolist()
    lengths = squares.sqrt() + 1e-8
    nearest, similarity, margins = [], [], []
    for place in range(len(k)):
        cosines = ((k[place] * k).sum(dim=1) / (lengths[place] * lengths)).tolist()
        near, best, second = None, -math.inf, -math.inf
        for other in range(place // frame_tokens * frame_tokens):
            if comparable[place] and comparable[other]:
                if cosines[other] > best:
                    near, best, second = other, cosines[other], best
                else:
                    second = max(second, cosines[other])
        nearest.append(near)
        similarity.append(best if comparable[place] else math.inf)
        margins.append(best - second if near is not None else math.inf)
    return nearest, similarity, margins


def published_similarities(k: torch.Tensor, frame_tokens: int) -> list[float]:
    """Of each place to the mean key of the anchor frame."""
    mean = k[:frame_tokens].mean(dim=0)
    found = (k * mean).sum(dim=1) / (k.norm(dim=1) * mean.norm() + 1e-8)
    return found.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf).tolist()


def selected(
    similarity: list[float], frames: int, frame_tokens: int, keep_ratio: float, pooled: bool
) -> tuple[list[int], float]:
    """The places that are kept, and the gap between the last one kept and the first one dropped."""
    keep = max(1, math.ceil(keep_ratio * frame_tokens))
    if keep >= frame_tokens or frames == 1:
        return list(range(frames * frame_tokens)), math.inf
    groups, budget = [list(range(f * frame_tokens, (f + 1) * frame_tokens)) for f in range(1, frames)], keep
    if pooled:
        groups, budget = [[place for group in groups for place in group]], keep * (frames - 1)
    kept, margin = list(range(frame_tokens)), math.inf
    for group in groups:
        ranked = sorted(group, key=lambda place: (similarity[place], place))
        kept += ranked[:budget]
        last, first = similarity[ranked[budget - 1]], similarity[ranked[budget]]
        margin = min(margin, 0.0 if last == first else first - last)
    return sorted(kept), margin


def merged(
    k: torch.Tensor, v: torch.Tensor, members: list[int], n: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A row of n tokens that averages `members`: K and V [heads, head_dim], and of each head Plain.shrunk."""
    key, shrunk = torch.zeros_like(k[0]), torch.full(k.shape[1:2], math.nan, dtype=torch.float64)
    if n == 1:
        return k[members[0]], v[members[0]], torch.ones_like(shrunk)
    for head in range(k.shape[1]):
        of_head = [k[member, head] for member in members]
        mean = sum(of_head) / len(members)
        square = sum(key.square().sum() for key in of_head).item() / len(members)
        if mean.norm() > 0:
            shrunk[head] = math.sqrt(square) / mean.norm()
            key[head] = mean * shrunk[head] * (1 + min(1.0, math.log(n) / (MATCH * scale * square)))
    return key, sum(v[member] for member in members) / len(members), shrunk
