"""compress_chunk against the published recipe in eager PyTorch: fp32 copies, topk, sort, gather.

One layer, and all layers of a model in one call, beside a call for each. A selection is judged in float64, and the
copies must be exact.

    python benchmarks/bench_compress_chunk.py [--small] [--jsonl FILE] [--device DEVICE]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import Problem, Variant, bench_main, dtype_name, ours, parse_device, run_cases, worst
from shapes import DTYPE, HEAD_DIM, HEADS, one_of, ratio, read_shape, up_to, whole
from timing import Run, l2_bytes, sets_for

from worldkv_kernels import compress_chunk

# Cosines that lie closer than this to the cut may fall on either side of it in fp32.
COSINE_MARGIN = 1e-6

Kept = tuple[Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[torch.Tensor]]  # k, v and index, by layer


@dataclass(frozen=True)
class CompressCase:
    """A chunk of `frames` frames whose first is the anchor."""

    frames: int
    frame_tokens: int
    heads: int
    pooled: bool
    layers: int = 1
    keep_ratio: float = 0.25
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def tokens(self) -> int:
        return self.frames * self.frame_tokens

    def __str__(self) -> str:
        how = "pooled" if self.pooled else "per frame"
        layers = f"{self.layers} layers of " if self.layers > 1 else ""
        size = f"{layers}{self.tokens} tokens x {self.heads} x {self.head_dim}"
        dtype = f", {dtype_name(self.dtype)}" * (self.dtype != torch.bfloat16)
        return f"{size}, keep_ratio {self.keep_ratio:g}, {how}{dtype}"

    @property
    def needed_bytes(self) -> int:
        """What it takes on the device, about: two sets of the chunk and what is kept of it, and a layer in float64."""
        row = self.heads * self.head_dim
        return self.tokens * row * (2 * 2 * 2 * self.layers * self.dtype.itemsize + 3 * 8)


CASES = [
    CompressCase(3, 1560, heads=40, pooled=True),
    CompressCase(3, 880, heads=12, pooled=True),
    CompressCase(3, 1560, heads=40, pooled=False),
    CompressCase(3, 880, heads=12, pooled=False),
    CompressCase(3, 1560, heads=40, pooled=True, layers=40),
    CompressCase(3, 880, heads=12, pooled=True, layers=30),
    CompressCase(3, 1560, heads=40, pooled=True, dtype=torch.float16),
    CompressCase(3, 1560, heads=80, pooled=True, head_dim=64),  # as wide
]
SMALL_CASES = [
    CompressCase(3, 40, heads=2, pooled=True),
    CompressCase(3, 17, heads=3, pooled=False),
    CompressCase(3, 17, heads=2, pooled=True, layers=3),
    CompressCase(3, 16, heads=2, pooled=True, head_dim=64, dtype=torch.float16),
]


def several_frames(text: str) -> int:
    frames = whole(text)
    if frames < 2:
        raise ValueError("at least 2, of which the first is the anchor")
    return frames


# Of --shape.
KEYS = {
    "frames": several_frames, "frame_tokens": whole, "heads": HEADS, "head_dim": HEAD_DIM, "keep_ratio": ratio,
    "pooled": one_of({"true": True, "false": False}), "layers": up_to(65535), "dtype": DTYPE,
}  # fmt: skip


def case_of(shape: str) -> CompressCase:
    """The case of a --shape. Raises ValueError that names the key at fault."""
    defaults = {"frames": 3, "head_dim": 128, "keep_ratio": 0.25, "pooled": True, "layers": 1, "dtype": torch.bfloat16}
    return CompressCase(**read_shape(shape, KEYS, defaults))


def kept_each(frame_tokens: int, keep_ratio: float) -> int:
    """Tokens kept of a frame that is not the anchor."""
    return min(frame_tokens, max(1, math.ceil(keep_ratio * frame_tokens)))


def compress_bytes(
    frames: int, frame_tokens: int, keep_ratio: float, heads: int, head_dim: int, itemsize: int, layers: int = 1
) -> int:
    """Of all layers: K read once, the kept V read once, the kept K and V written, and an int32 index. A keep that takes
    whole frames still reads all of K. Temporaries (a mean key, a number a token) are not counted."""
    tokens = frames * frame_tokens
    kept = frame_tokens + (frames - 1) * kept_each(frame_tokens, keep_ratio)
    return layers * ((tokens + 3 * kept) * heads * head_dim * itemsize + 4 * kept)


def published_compress(
    k: torch.Tensor, v: torch.Tensor, frames: int, keep_ratio: float, pooled: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The recipe as published: the chunk in fp32, cosines to the mean of frame 0 over all heads, topk of the lowest."""
    wide = k.float().unflatten(0, (frames, -1))  # [frames, frame_tokens, heads, head_dim]
    frame_tokens = wide.shape[1]
    keep = kept_each(frame_tokens, keep_ratio)
    center = wide[0].mean(dim=0)
    others = wide[1:]
    dots = (others * center).sum(dim=(-2, -1))
    norms = others.square().sum(dim=(-2, -1)).sqrt() * center.square().sum().sqrt()
    cosine = dots / (norms + 1e-8)
    if pooled:
        chosen = cosine.flatten().topk(keep * (frames - 1), largest=False).indices.sort().values
    else:
        lowest = cosine.topk(keep, dim=1, largest=False).indices.sort(dim=1).values
        chosen = (
            lowest + torch.arange(frames - 1, dtype=torch.int64, device=k.device)[:, None] * frame_tokens
        ).flatten()
    index = torch.cat([torch.arange(frame_tokens, dtype=torch.int64, device=k.device), chosen + frame_tokens])
    v_wide = v.float()
    return wide.flatten(0, 1)[index].to(k.dtype), v_wide[index].to(v.dtype), index


def selection_error(
    case: CompressCase, k: torch.Tensor, v: torch.Tensor, result: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> float:
    """Share of a layer's kept tokens that should not have been kept, judged in float64.

    Tokens within COSINE_MARGIN of the cut may be kept or not. inf where the index has a wrong length, a wrong anchor,
    an order that is not ascending, or a row of k or v is not an exact copy.
    """
    out_k, out_v, index = result[0], result[1], result[2].long()
    frame_tokens = case.frame_tokens
    keep = kept_each(frame_tokens, case.keep_ratio)
    anchor, chosen = index[:frame_tokens], index[frame_tokens:]
    in_range = bool(((chosen >= frame_tokens) & (chosen < case.tokens)).all())
    ascending = bool((chosen.diff() > 0).all())
    if not (
        in_range and ascending and torch.equal(anchor, torch.arange(frame_tokens, dtype=torch.int64, device=k.device))
    ):
        return math.inf
    if not (torch.equal(out_k, k[index]) and torch.equal(out_v, v[index])):
        return math.inf
    wide = k.double().flatten(1)
    center = wide[:frame_tokens].mean(dim=0)
    cosine = wide[frame_tokens:] @ center / (wide[frame_tokens:].norm(dim=1) * center.norm() + 1e-8)
    kept = torch.zeros_like(cosine, dtype=torch.bool)
    kept[chosen - frame_tokens] = True
    groups = 1 if case.pooled else case.frames - 1
    cosine, kept = cosine.view(groups, -1), kept.view(groups, -1)
    in_group = keep * (case.frames - 1) // groups
    if not bool((kept.sum(dim=1) == in_group).all()):
        return math.inf
    cut = cosine.sort(dim=1).values[:, in_group - 1 : in_group]
    wrong = (kept & (cosine > cut + COSINE_MARGIN)) | (~kept & (cosine < cut - COSINE_MARGIN))
    return wrong.sum().item() / index.numel()


def variants_of(case: CompressCase, device: torch.device) -> dict[str, bool]:
    """The names of a case's variants, and whether each is a rival, without making any."""
    mine = [
        name
        for backend in ours("compress_chunk", device)
        for name in ([backend, f"{backend} in {case.layers} calls"] if case.layers > 1 else [backend])
    ]
    return {**dict.fromkeys(mine, False), "published eager": True}


def prepare(case: CompressCase, device: torch.device) -> Problem:
    """Random K and V of all layers in every input set, with room for the result."""
    counted = (case.frames, case.frame_tokens, case.keep_ratio, case.heads, case.head_dim, case.dtype.itemsize)
    num_bytes = compress_bytes(*counted, layers=case.layers)
    sets = sets_for(num_bytes, l2_bytes(device))
    generator = torch.Generator(device=device).manual_seed(0)
    kept = case.frame_tokens + (case.frames - 1) * kept_each(case.frame_tokens, case.keep_ratio)
    chunks, outs, indexes = [], [], []
    for _ in range(sets):
        shape = (2, case.layers, case.tokens, case.heads, case.head_dim)
        chunks.append(torch.randn(shape, generator=generator, dtype=torch.float32, device=device).to(case.dtype))
        outs.append(torch.empty((2, case.layers, kept, *shape[3:]), dtype=case.dtype, device=device))
        indexes.append(torch.empty((case.layers, kept), dtype=torch.int32, device=device))

    def check(run: Run) -> float:
        outs[0].fill_(float("nan"))
        indexes[0].fill_(-1)
        layers = zip(*chunks[0], zip(*run(0), strict=True), strict=True)
        return worst(selection_error(case, k, v, kept) for k, v, kept in layers)

    def our_run(backend: str, layers_a_call: int) -> Run:
        def run(i: int) -> Kept:
            for first in range(0, case.layers, layers_a_call):
                layers = slice(first, first + layers_a_call)
                compress_chunk(
                    *chunks[i][:, layers], frames=case.frames, keep_ratio=case.keep_ratio, pooled=case.pooled,
                    out_k=outs[i][0, layers], out_v=outs[i][1, layers], out_index=indexes[i][layers], backend=backend,
                )  # fmt: skip
            return *outs[i], indexes[i]

        return run

    def published(i: int) -> Kept:
        layers = zip(*chunks[i], strict=True)
        kept = [published_compress(k, v, case.frames, case.keep_ratio, case.pooled) for k, v in layers]
        return tuple(zip(*kept, strict=True))

    variants = []
    for name in ours("compress_chunk", device):
        at_once = partial(our_run, name, case.layers)
        variants.append(Variant(name, at_once, check, 0.0, num_bytes))
        if case.layers > 1:
            by_layer = partial(our_run, name, 1)
            variants.append(Variant(f"{name} in {case.layers} calls", by_layer, check, 0.0, num_bytes, base=name))
    variants.append(Variant("published eager", lambda: published, check, 0.0, num_bytes, rival=True))
    shape = {"heads": case.heads, "tokens": case.tokens, "layers": case.layers}
    shape |= {"head_dim": case.head_dim, "dtype": dtype_name(case.dtype)}
    return Problem(str(case), variants, sets=sets, shape=shape)


def run(
    *,
    small: bool = False,
    device: torch.device | None = None,
    seconds: float = 1.0,
    jsonl_path: str | None = None,
    cases: Sequence[CompressCase] | None = None,
    only: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Measure the cases and return the figures, as `common.run_cases` does."""
    return run_cases(
        "compress_chunk", cases or (SMALL_CASES if small else CASES), prepare, device or parse_device(None),
        small=small, seconds=seconds, jsonl_path=jsonl_path, only=only,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return bench_main("compress_chunk", argv)


if __name__ == "__main__":
    sys.exit(main())
