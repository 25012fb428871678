"""compress_chunk against eager PyTorch: as published, with fp32 copies, topk, sort and gather, and by rule "nearest".

One layer, and all layers of a model in one call, beside a call for each. A selection is judged in float64. Copies must
be exact, and merged rows within rounding of the reference's for the same selection.

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
from common import ERROR_LIMITS, Problem, Variant, bench_main, dtype_name, ours, parse_device, run_cases, worst
from compress_nearest import MERGE_ABOVE, eager_nearest, merge_error, nearest_bytes, products_flops, video_keys
from shapes import DTYPE, HEAD_DIM, HEADS, one_of, ratio, read_shape, up_to, whole
from timing import Run, l2_bytes, sets_for

from worldkv_kernels import compress_chunk
from worldkv_kernels.ops.compress_chunk import BACKENDS
from worldkv_kernels.reference.compress_chunk import nearest_keys

# Cosines that lie closer than this to the cut may fall on either side of it: in fp32, and in sums of tensor cores,
# which cut digits off.
COSINE_MARGIN = {"similarity": 1e-6, "nearest": 1e-4}

# k, v, index and count, by layer; a count of what is not merged means nothing.
Kept = tuple[Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[torch.Tensor]]


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
    rule: str = "similarity"
    merge: bool = False

    @property
    def published(self) -> bool:
        """Whether this is the published recipe."""
        return self.rule == "similarity" and not self.merge

    @property
    def keep(self) -> int:
        """Tokens kept of each frame that is not the anchor."""
        return kept_each(self.frame_tokens, self.keep_ratio)

    @property
    def tokens(self) -> int:
        return self.frames * self.frame_tokens

    def __str__(self) -> str:
        how = "pooled" if self.pooled else "per frame"
        layers = f"{self.layers} layers of " if self.layers > 1 else ""
        size = f"{layers}{self.tokens} tokens x {self.heads} x {self.head_dim}"
        dtype = f", {dtype_name(self.dtype)}" * (self.dtype != torch.bfloat16)
        rule = f", {self.rule}" * (self.rule != "similarity") + ", merged" * self.merge
        return f"{size}, keep_ratio {self.keep_ratio:g}, {how}{dtype}{rule}"

    @property
    def needed_bytes(self) -> int:
        """What it takes on the device, about: two sets of the chunk and what is kept of it, and a layer in float64."""
        row = self.heads * self.head_dim
        products = 0 if self.published else 3 * 8 * self.tokens**2
        return self.tokens * row * (2 * 2 * 2 * self.layers * self.dtype.itemsize + 3 * 8) + products


CASES = [
    CompressCase(3, 1560, heads=40, pooled=True),
    CompressCase(3, 880, heads=12, pooled=True),
    CompressCase(3, 1560, heads=40, pooled=False),
    CompressCase(3, 880, heads=12, pooled=False),
    CompressCase(3, 1560, heads=40, pooled=True, layers=40),
    CompressCase(3, 880, heads=12, pooled=True, layers=30),
    CompressCase(3, 1560, heads=40, pooled=True, dtype=torch.float16),
    CompressCase(3, 1560, heads=80, pooled=True, head_dim=64),  # as wide
    CompressCase(3, 1560, heads=40, pooled=True, rule="nearest", merge=True),
    CompressCase(3, 880, heads=12, pooled=True, rule="nearest", merge=True),
    CompressCase(3, 1560, heads=40, pooled=True, rule="nearest"),
    CompressCase(3, 1560, heads=40, pooled=True, layers=40, rule="nearest", merge=True),
    CompressCase(3, 880, heads=12, pooled=True, layers=30, rule="nearest", merge=True),
]
SMALL_CASES = [
    CompressCase(3, 40, heads=2, pooled=True),
    CompressCase(3, 17, heads=3, pooled=False),
    CompressCase(3, 17, heads=2, pooled=True, layers=3),
    CompressCase(3, 16, heads=2, pooled=True, head_dim=64, dtype=torch.float16),
    CompressCase(3, 16, heads=2, pooled=True, rule="nearest", merge=True),
    CompressCase(4, 15, heads=2, pooled=False, layers=2, rule="nearest"),
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
    "rule": one_of({"nearest": "nearest", "similarity": "similarity"}),
    "merge": one_of({"true": True, "false": False}),
}  # fmt: skip


def case_of(shape: str) -> CompressCase:
    """The case of a --shape. Raises ValueError that names the key at fault."""
    defaults = {"frames": 3, "head_dim": 128, "keep_ratio": 0.25, "pooled": True, "layers": 1, "dtype": torch.bfloat16}
    defaults |= {"rule": "similarity", "merge": False}
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


def cosines_to_anchor(case: CompressCase, k: torch.Tensor) -> torch.Tensor:
    """Of every token of the other frames to the mean key of the first, in float64."""
    wide = k.double().flatten(1)
    center = wide[: case.frame_tokens].mean(dim=0)
    return wide[case.frame_tokens :] @ center / (wide[case.frame_tokens :].norm(dim=1) * center.norm() + 1e-8)


def selection_error(case: CompressCase, cosine: torch.Tensor, index: torch.Tensor) -> float:
    """Share of a layer's kept tokens that should not have been kept, judged by cosines of the other frames' tokens.

    Tokens within COSINE_MARGIN of the cut may be kept or not. inf where the index has a wrong length, a wrong anchor,
    or an order that is not ascending.
    """
    frame_tokens = case.frame_tokens
    anchor, chosen = index[:frame_tokens], index[frame_tokens:]
    whole = torch.equal(anchor, torch.arange(frame_tokens, dtype=torch.int64, device=index.device))
    in_range = bool(((chosen >= frame_tokens) & (chosen < case.tokens)).all())
    ascending = bool((chosen.diff() > 0).all())
    if not (whole and in_range and ascending):
        return math.inf
    kept = torch.zeros_like(cosine, dtype=torch.bool)
    kept[chosen - frame_tokens] = True
    groups = 1 if case.pooled else case.frames - 1
    cosine, kept = cosine.view(groups, -1), kept.view(groups, -1)
    in_group = case.keep * (case.frames - 1) // groups
    if not bool((kept.sum(dim=1) == in_group).all()):
        return math.inf
    cut = cosine.sort(dim=1).values[:, in_group - 1 : in_group]
    margin = COSINE_MARGIN[case.rule]
    wrong = (kept & (cosine > cut + margin)) | (~kept & (cosine < cut - margin))
    return wrong.sum().item() / index.numel()


def compression_error(case: CompressCase, k: torch.Tensor, v: torch.Tensor, result: Sequence[torch.Tensor]) -> float:
    """Of one layer: `selection_error`, inf where a row is not an exact copy; with merging that of the merged rows, inf
    where the selection has any error."""
    out_k, out_v, index, count = result[0], result[1], result[2].long(), result[3]
    nearest = None if case.published else nearest_keys(k, case.frames, anchor=0)
    cosine = nearest.similarity.flatten() if case.rule == "nearest" else cosines_to_anchor(case, k)
    error = selection_error(case, cosine, index)
    if not case.merge:
        exact = error < math.inf and torch.equal(out_k, k[index]) and torch.equal(out_v, v[index])
        return error if exact else math.inf
    return merge_error(k, v, nearest, out_k, out_v, index, count) if error == 0 else math.inf


def our_backends(case: CompressCase, device: torch.device) -> list[str]:
    kind = (case.dtype, case.head_dim, case.pooled, case.keep == case.frame_tokens, case.rule, case.merge, True)
    return [name for name in ours("compress_chunk", device) if BACKENDS.backends[name].unsupported(kind) is None]


def variants_of(case: CompressCase, device: torch.device) -> dict[str, bool]:
    """The names of a case's variants, and whether each is a rival, without making any."""
    mine = [
        name
        for backend in our_backends(case, device)
        for name in ([backend, f"{backend} in {case.layers} calls"] if case.layers > 1 else [backend])
    ]
    return {**dict.fromkeys(mine, False), **dict.fromkeys(rivals_of(case), True)}


def rivals_of(case: CompressCase) -> list[str]:
    """The published recipe, or the nearest rule in eager PyTorch; nobody merges what the published rule drops."""
    return ["published eager"] if case.published else ["eager"] if case.rule == "nearest" else []


def inputs_of(case: CompressCase, generator: torch.Generator) -> torch.Tensor:
    """Random K and V of all layers, [2, layers, tokens, heads, head_dim]; K like those of a video where that counts."""
    shape = (case.layers, case.tokens, case.heads, case.head_dim)
    values = torch.randn(shape, generator=generator, dtype=torch.float32, device=generator.device).to(case.dtype)
    if case.published:
        keys = torch.randn(shape, generator=generator, dtype=torch.float32, device=generator.device)
    else:
        keys = video_keys(*shape[:1], case.frames, case.frame_tokens, *shape[2:], generator)
    return torch.stack([keys.to(case.dtype), values])


def counted(case: CompressCase) -> tuple[int, int]:
    """Bytes and operations of a call."""
    if case.published:
        sizes = (case.frames, case.frame_tokens, case.keep_ratio, case.heads, case.head_dim, case.dtype.itemsize)
        return compress_bytes(*sizes, layers=case.layers), 0
    columns = case.heads * case.head_dim
    sizes = (case.frames, case.frame_tokens, case.keep, columns, case.dtype.itemsize, case.layers)
    return nearest_bytes(*sizes, case.merge), case.layers * products_flops(case.frames, case.frame_tokens, columns)


def prepare(case: CompressCase, device: torch.device) -> Problem:
    """K and V of all layers in every input set, with room for the result."""
    num_bytes, flops = counted(case)
    sets = sets_for(num_bytes, l2_bytes(device))
    generator = torch.Generator(device=device).manual_seed(0)
    kept = case.frame_tokens + (case.frames - 1) * case.keep
    chunks, outs, numbers = [], [], []
    for _ in range(sets):
        chunks.append(inputs_of(case, generator))
        shape = (2, case.layers, kept, case.heads, case.head_dim)
        outs.append(torch.empty(shape, dtype=case.dtype, device=device))
        numbers.append(torch.empty(shape[:3], dtype=torch.int32, device=device))  # index and count

    def check(run: Run) -> float:
        outs[0].fill_(float("nan"))
        numbers[0].fill_(-1)
        layers = zip(*chunks[0], zip(*run(0), strict=True), strict=True)
        return worst(compression_error(case, k, v, kept) for k, v, kept in layers)

    def our_run(backend: str, layers_a_call: int) -> Run:
        def run(i: int) -> Kept:
            for first in range(0, case.layers, layers_a_call):
                layers = slice(first, first + layers_a_call)
                index, count = numbers[i][:, layers]
                compress_chunk(
                    *chunks[i][:, layers], frames=case.frames, keep_ratio=case.keep_ratio, pooled=case.pooled,
                    rule=case.rule, merge=case.merge, merge_above=MERGE_ABOVE,
                    out_k=outs[i][0, layers], out_v=outs[i][1, layers], out_index=index,
                    out_count=count if case.merge else None, backend=backend,
                )  # fmt: skip
            return *outs[i], *numbers[i]

        return run

    def rival(i: int) -> Kept:
        def layer(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if case.rule == "nearest":
                return eager_nearest(k, v, case.frames, case.keep, case.pooled, case.merge)
            k, v, index = published_compress(k, v, case.frames, case.keep_ratio, case.pooled)
            return k, v, index, index

        return tuple(zip(*(layer(k, v) for k, v in zip(*chunks[i], strict=True)), strict=True))

    variants = []
    limit = ERROR_LIMITS[case.dtype] if case.merge else 0.0
    for name in our_backends(case, device):
        at_once = partial(our_run, name, case.layers)
        variants.append(Variant(name, at_once, check, limit, num_bytes, flops))
        if case.layers > 1:
            by_layer = partial(our_run, name, 1)
            variants.append(
                Variant(f"{name} in {case.layers} calls", by_layer, check, limit, num_bytes, flops, base=name)
            )
    for name in rivals_of(case):
        variants.append(Variant(name, lambda: rival, check, limit, num_bytes, flops, rival=True))
    shape = {"heads": case.heads, "tokens": case.tokens, "layers": case.layers}
    shape |= {"head_dim": case.head_dim, "dtype": dtype_name(case.dtype)}
    if case.rule != "similarity" or case.merge:  # as published where a line says nothing
        shape["rule"] = case.rule + ", merged" * case.merge
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
