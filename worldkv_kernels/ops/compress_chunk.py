"""torch.ops.worldkv.compress_chunk: key similarity, selection and compaction of a chunk."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..reference.compress_chunk import compress_chunk as reference
from . import cuda
from .backends import Backend, OpBackends, on_current_device, register, triton_unavailable
from .checks import HEAD_DIMS, bad_value, check_tensor

_OP = "compress_chunk"


class CompressedChunk(NamedTuple):
    """What was kept of a chunk: k, v [kept, heads, head_dim] and index [kept] int32 into its tokens."""

    k: torch.Tensor
    v: torch.Tensor
    index: torch.Tensor


def kept_per_frame(frame_tokens: int, keep_ratio: float) -> int:
    """Tokens kept of a pruned frame: max(1, ceil(keep_ratio * frame_tokens)), at most the frame."""
    return min(frame_tokens, max(1, math.ceil(keep_ratio * frame_tokens)))


def kept_tokens(frames: int, frame_tokens: int, keep_ratio: float) -> int:
    """Tokens kept of a chunk: the whole anchor frame and `kept_per_frame` of each other frame."""
    return frame_tokens + (frames - 1) * kept_per_frame(frame_tokens, keep_ratio)


def compress_chunk(
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    frames: int,
    keep_ratio: float,
    pooled: bool = True,
    anchor: int = 0,
    out_k: torch.Tensor | None = None,
    out_v: torch.Tensor | None = None,
    out_index: torch.Tensor | None = None,
    backend: str | None = None,
) -> CompressedChunk:
    """Keep a chunk's anchor frame and, of the others, the tokens whose keys resemble that frame least.

    The similarity of a token is <k, m> / (|k| |m| + 1e-8), m the mean of the anchor frame's keys, both
    taken over all heads * head_dim numbers. With keep = max(1, ceil(keep_ratio * frame_tokens)), each
    other frame keeps its `keep` least similar tokens, or, pooled, the other frames together keep their
    (frames - 1) * keep. Equal similarities keep the earlier token; a NaN counts as most similar.
    Where keep reaches the frame's size, everything is kept. After WorldKV, arXiv 2605.22718.

    Args:
        k, v: [frames * frame_tokens, heads, head_dim], bf16, fp16 or fp32, dense in heads and head_dim,
            head_dim 64 or 128. Keys as they are stored, that is after RoPE.
        frames: latent frames of the chunk.
        keep_ratio: above 0, at most 1. 0.25 keeps half of a chunk of three frames.
        pooled: one budget for all other frames, instead of one each.
        anchor: which frame is kept whole, from 0.
        out_k, out_v: where to write, [kept, heads, head_dim] like k, not overlapping k or v; out_index
            int32 [kept], contiguous. Allocated when None.
        backend: "reference", "triton", "cuda", or None for the automatic choice.

    Returns CompressedChunk(k, v, index): the anchor frame first, then the kept tokens in ascending order.
    Similarities in fp32, sums in a fixed order: the same input gives the same bits. Makes no copy of the chunk
    and does not synchronise. Raises ValueError or TypeError on a wrong shape, dtype, device or stride, on an
    input that wants a gradient, on frames that do not divide the tokens, on a ratio or an anchor out of range,
    on overlapping outputs, and on a backend that is unknown or unavailable.
    """
    check_tensor(_OP, "k", k, ("tokens", "heads", "head_dim"), inner=2)
    tokens, heads, head_dim = k.shape
    if head_dim not in HEAD_DIMS or heads < 1:
        raise bad_value(_OP, "k", "of at least one head with head_dim 64 or 128", k)
    check_tensor(_OP, "v", v, (tokens, heads, head_dim), like=k, inner=2)
    if frames < 1 or tokens < frames or tokens % frames:
        raise bad_value(_OP, "frames", f"a divisor of the {tokens} tokens", frames)
    if not 0 < keep_ratio <= 1:
        raise bad_value(_OP, "keep_ratio", "above 0 and at most 1", keep_ratio)
    if not 0 <= anchor < frames:
        raise bad_value(_OP, "anchor", f"a frame from 0 to {frames - 1}", anchor)
    frame_tokens = tokens // frames
    kept = kept_tokens(frames, frame_tokens, keep_ratio)
    if out_k is None:
        out_k = torch.empty((kept, heads, head_dim), dtype=k.dtype, device=k.device)
    if out_v is None:
        out_v = torch.empty((kept, heads, head_dim), dtype=k.dtype, device=k.device)
    if out_index is None:
        out_index = torch.empty(kept, dtype=torch.int32, device=k.device)
    check_tensor(_OP, "out_k", out_k, (kept, heads, head_dim), like=k, inner=2)
    check_tensor(_OP, "out_v", out_v, (kept, heads, head_dim), like=k, inner=2)
    check_tensor(_OP, "out_index", out_index, (kept,), like=k, dtypes=(torch.int32,))
    torch.ops.worldkv.compress_chunk(
        k, v, out_k, out_v, out_index, frames, kept_per_frame(frame_tokens, keep_ratio), pooled, anchor,
        backend or "auto",
    )  # fmt: skip
    return CompressedChunk(out_k, out_v, out_index)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First and past-the-last byte that a tensor with positive strides touches."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _run(
    k: torch.Tensor, v: torch.Tensor, out_k: torch.Tensor, out_v: torch.Tensor, index: torch.Tensor,
    frames: int, keep: int, pooled: bool, anchor: int, backend: str,
) -> None:  # fmt: skip
    spans = {"out_k": _span(out_k), "out_v": _span(out_v), "k": _span(k), "v": _span(v)}
    for name in ("out_k", "out_v"):
        for other, span in spans.items():
            if other != name and max(spans[name][0], span[0]) < min(spans[name][1], span[1]):
                raise ValueError(f"{_OP}: {name} must not overlap {other}, got bytes {spans[name]} and {span}")
    per_vector = 16 // k.element_size()
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) % per_vector == 0 for x in (k, v, out_k, out_v))
    kind = (k.dtype, k.shape[2], pooled, keep * frames >= k.shape[0], aligned)
    run = BACKENDS.choose(backend, k.device, kind)
    with on_current_device(k.device):
        run(k, v, out_k, out_v, index, frames=frames, keep=keep, pooled=pooled, anchor=anchor)


def _load_triton() -> Callable[..., None]:
    from ..kernels.compress_chunk import compress_chunk as launch

    return launch


def _small_case(device: torch.device, kind: tuple) -> Callable[[Callable[..., None]], torch.Tensor]:
    """Three frames of 40 tokens whose similarities are far apart, so that rounding moves no token."""
    dtype, head_dim, pooled, whole, _ = kind
    generator = torch.Generator().manual_seed(0)
    base, noise = torch.randn(2, 1, 2, head_dim, generator=generator)
    share = torch.linspace(-1, 1, 120)[torch.randperm(120, generator=generator)].view(-1, 1, 1)
    share[40:80] = 1.0  # the anchor frame
    k = (base * share + noise * (1 - share.abs())).to(device, dtype)
    v = torch.randn(120, 2, head_dim, generator=generator).to(device, dtype)
    keep = 40 if whole else 11

    def call(run: Callable[..., None]) -> torch.Tensor:
        kept = 40 + 2 * keep
        out_k, out_v = torch.full((2, kept, 2, head_dim), float("nan"), dtype=dtype, device=device)
        index = torch.full((kept,), -1, dtype=torch.int32, device=device)
        run(k, v, out_k, out_v, index, frames=3, keep=keep, pooled=pooled, anchor=1)
        return torch.cat([x.float().flatten() for x in (index, out_k, out_v)])

    return call


BACKENDS = OpBackends(
    op=_OP,
    backends={
        "cuda": Backend(lambda: cuda.compress_chunk, cuda.unavailable, cuda.compress_unsupported),
        "triton": Backend(_load_triton, triton_unavailable),
        "reference": Backend(lambda: reference),
    },
    small_case=_small_case,
    tolerance=lambda kind: 0.0,
    kinds=tuple(
        (dtype, head_dim, pooled, whole, True)
        for dtype in (torch.bfloat16, torch.float16)
        for head_dim in HEAD_DIMS
        for pooled, whole in ((True, False), (False, False), (True, True))
    ),
)

register(
    "compress_chunk(Tensor k, Tensor v, Tensor(a!) out_k, Tensor(b!) out_v, Tensor(c!) index, "
    "SymInt frames, SymInt keep, bool pooled, int anchor, str backend) -> ()",
    _run,
)
