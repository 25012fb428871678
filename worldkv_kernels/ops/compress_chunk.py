"""torch.ops.worldkv.compress_chunk: key similarity, selection and compaction of a chunk, of one layer or of all."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from ..checks import (
    HEAD_DIMS,
    as_number,
    bad_type,
    bad_value,
    check_apart,
    check_backend,
    check_bool,
    check_heads,
    check_int64,
    check_integer,
    check_layout,
    check_number,
    check_scale,
    check_tensor,
)
from ..reference.compress_chunk import compress_chunk as reference
from . import cuda
from .backends import (
    NAMESPACE,
    Backend,
    OpBackends,
    dtype_tolerance,
    exact,
    on_current_device,
    register,
    triton_unavailable,
)

_OP = "compress_chunk"
RULES = ("nearest", "similarity")
_MAX_LAYERS = 65535  # of the dimension of a CUDA grid that counts them


class CompressedChunk(NamedTuple):
    """What was kept of a chunk: k, v [kept, heads, head_dim], index [kept] int32 into its tokens, and count [kept]
    int32, how many tokens each stands for, None where nothing was merged.

    All with a first dimension of layers where the chunk had one.
    """

    k: torch.Tensor
    v: torch.Tensor
    index: torch.Tensor
    count: torch.Tensor | None


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
    rule: Literal["nearest", "similarity"] = "nearest",
    merge: bool = True,
    merge_above: float = 0.95,
    scale: float | None = None,
    out_k: torch.Tensor | None = None,
    out_v: torch.Tensor | None = None,
    out_index: torch.Tensor | None = None,
    out_count: torch.Tensor | None = None,
    backend: str | None = None,
) -> CompressedChunk:
    """Keep a chunk's anchor frame and, of the others, the tokens whose keys are least alike to others; merge the rest.

    Of one layer, or of all layers of a model in as many launches as of one: each is pruned on its own, with the bits
    that it would get alone.

    The anchor frame is kept whole. With keep = max(1, ceil(keep_ratio * frame_tokens)), each other frame keeps its
    `keep` least similar tokens, or, pooled, the other frames together keep their (frames - 1) * keep. Where keep
    reaches the frame's size, everything is kept. "Earlier" below is in the order of the output: the anchor frame, then
    the other frames by time. How similar a token is, all heads * head_dim numbers of a key together:

    - `rule` "nearest": x_t . x_u to the most similar token u of the frames before its own, x = k / (|k| + 1e-8). It
      says what the chunk holds twice; of equal ones u is the earlier.
    - "similarity", as published in WorldKV, arXiv 2605.22718: <k, m> / (|k| |m| + 1e-8), m the mean of the anchor
      frame's keys.

    Equal similarities keep the earlier token. A NaN, or for "nearest" a key whose squared length is not finite in fp32,
    counts as most similar, and nothing is near to it.

    With `merge`, a dropped token joins the token u of "nearest", under either rule, or where that was dropped what it
    joined; a token without such a u joins none. A row that n tokens have come to stand for, itself one of them, becomes
    v = mean of v_i and, of each head, k = (1 + min(1, log(n) / (.8 scale r^2))) m r / |m|, where m is the mean of the
    k_i and r^2 that of the |k_i|^2. The means are over the row's own token and those that joined it with a cosine of
    `merge_above` or more to it: others are counted but not averaged in, which would blur it. Why that length: a softmax
    gives n equal keys n times the weight of one, log(n) more in the score. A query at its match has the score
    scale q . k = .8 scale r^2 (measured, .7 to .8), which a key longer by that part of it, log(n) / (.8 scale r^2),
    raises by log(n). And the mean of unlike keys is shorter than they are, so it gets their length first. The part is
    at most 1, so that a key near zero does no harm. After ToMe's proportional attention, arXiv 2210.09461, without a
    bias that attention would have to read. docs/small_world.md has what was measured of rule, merging and limit.

    Args:
        k, v: [frames * frame_tokens, heads, head_dim] or [layers, frames * frame_tokens, heads, head_dim], bf16, fp16
            or fp32, dense in heads and head_dim, tokens and layers (up to 65535) of any stride, such as
            `pool.k[:, rows]`; 1 to 128 heads, head_dim 64 or 128. Keys as they are stored, that is after RoPE.
        frames: latent frames of the chunk.
        keep_ratio: above 0, at most 1. 0.25 keeps half of a chunk of three frames.
        pooled: one budget for all other frames, instead of one each.
        anchor: which frame is kept whole, from 0.
        rule: which tokens go.
        merge: whether those that stay take up those that go.
        merge_above: the least cosine at which keys and values are averaged; finite. Above 1 none are, only counted.
        scale: of the softmax that will read the keys; 1 / sqrt(head_dim) for None. Without `merge` it does nothing.
        out_k, out_v: where to write, [kept, heads, head_dim] like k, with layers where k has them. Rows and layers may
            lie apart, one stride nested in the other, but must not overlap each other, k or v.
        out_index, out_count: int32 [kept] or [layers, kept], contiguous, apart from all others. Outputs are allocated
            when None; out_count takes `merge`.
        backend: "reference", "triton", "cuda", or None for the automatic choice.

    Limits: a dimension before the tokens is layers, not a batch; V has the heads and head_dim of K; no gradients.

    Returns CompressedChunk(k, v, index, count): the anchor frame first, then the kept tokens in ascending order. A row
    that stands for its own token alone is a copy, bit for bit. count is None without `merge`; else it sums up to all
    tokens but those that joined none.
    Similarities and means in fp32, sums in a fixed order: the same input gives the same bits. Makes no copy of the
    chunk and does not synchronise; but the reference multiplies in float64 for "nearest" and for merging, a layer at a
    time, and synchronises on a GPU. Merged keys of fp16 may pass its range, where keys are longer than 32,000.
    Raises ValueError or TypeError on a wrong shape, dtype, device or stride, on an input that wants a gradient, on
    frames that do not divide the tokens, on a ratio, an anchor, a rule, a limit or a scale out of range, on overlapping
    outputs, and on a backend that is unknown or unavailable. torch.ops.worldkv.compress_chunk, which merges where it is
    given a count, raises the same.

    Overlap is judged from addresses and strides, a layer of a tensor counted as all from its first byte to its last.
    That is exact where the rows of a layer lie one after another, as in a pool, however the layers of different tensors
    interleave. It also refuses outputs in the gaps between an input's rows.
    """
    if not isinstance(k, torch.Tensor):
        raise bad_type(_OP, "k", "a tensor [tokens, heads, head_dim]", k)
    check_heads(_OP, "k", k, _layout(k))
    *layers, tokens, heads, head_dim = k.shape
    check_layout(_OP, "v", v, (*layers, tokens, heads, head_dim), like=k)
    check_integer(_OP, "frames", frames)
    keep_ratio = as_number(_OP, "keep_ratio", keep_ratio)
    check_int64(_OP, "anchor", anchor)
    check_bool(_OP, "pooled", pooled)
    if not isinstance(rule, str):
        raise bad_type(_OP, "rule", f"one of {', '.join(RULES)}", rule)
    check_bool(_OP, "merge", merge)
    merge_above = as_number(_OP, "merge_above", merge_above)
    if scale is None:
        scale = 1.0 / math.sqrt(head_dim)
    else:
        check_number(_OP, "scale", scale)
    check_backend(_OP, backend)
    _check_frames(tokens, frames)
    if not 0 < keep_ratio <= 1:
        raise bad_value(_OP, "keep_ratio", "above 0 and at most 1", keep_ratio)
    frame_tokens = tokens // frames
    kept = (*layers, kept_tokens(frames, frame_tokens, keep_ratio))
    for name, out in (("out_k", out_k), ("out_v", out_v)):
        if out is not None:
            check_layout(_OP, name, out, (*kept, heads, head_dim), like=k)
    if out_k is None:
        out_k = torch.empty((*kept, heads, head_dim), dtype=k.dtype, device=k.device)
    if out_v is None:
        out_v = torch.empty((*kept, heads, head_dim), dtype=k.dtype, device=k.device)
    if out_index is None:
        out_index = torch.empty(kept, dtype=torch.int32, device=k.device)
    else:
        check_layout(_OP, "out_index", out_index, kept, like=k)
    if out_count is not None:
        if not merge:
            raise bad_value(_OP, "out_count", "None without merge", out_count)
        check_layout(_OP, "out_count", out_count, kept, like=k)
    elif merge:
        out_count = torch.empty(kept, dtype=torch.int32, device=k.device)
    NAMESPACE.compress_chunk(
        k, v, out_k, out_v, out_index, out_count, frames, kept_per_frame(frame_tokens, keep_ratio), pooled, anchor,
        rule, merge_above, float(scale), backend or "auto",
    )  # fmt: skip
    return CompressedChunk(out_k, out_v, out_index, out_count)


def _layout(k: torch.Tensor) -> str:
    if k.dim() not in (3, 4):
        raise bad_value(_OP, "k", "[tokens, heads, head_dim] or [layers, tokens, heads, head_dim]", k)
    return "[tokens, heads, head_dim]" if k.dim() == 3 else "[layers, tokens, heads, head_dim]"


def _check_frames(tokens: int, frames: int) -> None:
    if frames < 1 or tokens < frames or tokens % frames:
        raise bad_value(_OP, "frames", f"a divisor of the {tokens} tokens", frames)


def _check(
    k: torch.Tensor, v: torch.Tensor, out_k: torch.Tensor, out_v: torch.Tensor, index: torch.Tensor,
    count: torch.Tensor | None, frames: int, keep: int, anchor: int, rule: str, merge_above: float, scale: float,
) -> None:  # fmt: skip
    """What every call needs, also one of torch.ops.worldkv, but for what overlaps."""
    check_heads(_OP, "k", k, _layout(k))
    *layers, tokens, heads, head_dim = k.shape
    check_tensor(_OP, "k", k, (*layers, tokens, heads, head_dim), inner=2)
    if layers and not 1 <= layers[0] <= _MAX_LAYERS:
        raise bad_value(_OP, "k", f"of 1 to {_MAX_LAYERS} layers", k)
    check_tensor(_OP, "v", v, (*layers, tokens, heads, head_dim), like=k, inner=2)
    _check_frames(tokens, frames)
    if not 0 <= anchor < frames:
        raise bad_value(_OP, "anchor", f"a frame from 0 to {frames - 1}", anchor)
    if keep < 1:
        raise bad_value(_OP, "keep", "at least 1", keep)
    frame_tokens = tokens // frames
    kept = (*layers, frame_tokens + (frames - 1) * min(keep, frame_tokens))
    check_tensor(_OP, "out_k", out_k, (*kept, heads, head_dim), like=k, inner=2)
    check_tensor(_OP, "out_v", out_v, (*kept, heads, head_dim), like=k, inner=2)
    check_tensor(_OP, "out_index", index, kept, like=k, dtypes=(torch.int32,), inner=len(kept))
    if count is not None:
        check_tensor(_OP, "out_count", count, kept, like=k, dtypes=(torch.int32,), inner=len(kept))
    if rule not in RULES:
        raise bad_value(_OP, "rule", f"one of {', '.join(RULES)}", rule)
    if not math.isfinite(merge_above):
        raise bad_value(_OP, "merge_above", "finite", merge_above)
    check_scale(_OP, "scale", scale)


def _run(
    k: torch.Tensor, v: torch.Tensor, out_k: torch.Tensor, out_v: torch.Tensor, index: torch.Tensor,
    count: torch.Tensor | None, frames: int, keep: int, pooled: bool, anchor: int, rule: str, merge_above: float,
    scale: float, backend: str,
) -> None:  # fmt: skip
    _check(k, v, out_k, out_v, index, count, frames, keep, anchor, rule, merge_above, scale)
    if k.dim() == 3:
        k, v, out_k, out_v, index = (x.unsqueeze(0) for x in (k, v, out_k, out_v, index))
        count = None if count is None else count.unsqueeze(0)
    outputs = {"out_k": out_k, "out_v": out_v, "out_index": index}
    if count is not None:
        outputs["out_count"] = count
    check_apart(_OP, outputs, {"k": k, "v": v})
    per_vector = 16 // k.element_size()
    rows = (k, v, out_k, out_v)
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) % per_vector == x.stride(1) % per_vector == 0 for x in rows)
    kind = (k.dtype, k.shape[3], pooled, keep * frames >= k.shape[1], rule, count is not None, aligned)
    run = BACKENDS.choose(backend, k.device, kind)
    options = dict(frames=frames, keep=keep, pooled=pooled, anchor=anchor)
    with on_current_device(k.device):
        run(k, v, out_k, out_v, index, count, rule=rule, merge_above=merge_above, scale=scale, **options)


def _load_triton() -> Callable[..., None]:
    from ..kernels.compress_chunk import compress_chunk as launch

    return launch


def _triton_unsupported(kind: tuple) -> str | None:
    dtype, *_, rule, merge, _ = kind
    if dtype == torch.bfloat16 and (rule == "nearest" or merge) and os.environ.get("TRITON_INTERPRET") == "1":
        return "triton's interpreter multiplies bf16 matrices as integers"
    return None


def _small_case(device: torch.device, kind: tuple) -> Callable[[Callable[..., None]], dict[str, torch.Tensor]]:
    """Two layers of three frames of 40 tokens whose similarities are far apart, so that rounding moves no token."""
    dtype, head_dim, pooled, whole, rule, merge, _ = kind
    generator = torch.Generator().manual_seed(0)
    fp32 = dict(dtype=torch.float32, device="cpu")
    if rule == "similarity" and not merge:
        base, noise = torch.randn(2, 1, 2, head_dim, generator=generator, **fp32)
        integers = dict(generator=generator, dtype=torch.int64, device="cpu")
        order = torch.stack([torch.randperm(120, **integers) for _ in range(2)])
        share = torch.linspace(-1, 1, 120, **fp32)[order].view(2, 120, 1, 1)
        share[:, 40:80] = 1.0  # the anchor frame
        k = base * share + noise * (1 - share.abs())
    else:  # most have a token like them in an earlier frame, with a cosine of about .7; others are like none
        like = torch.randint(30, (2, 120), generator=generator, dtype=torch.int64, device="cpu")
        k = torch.randn(30, 2, head_dim, generator=generator, **fp32)[like]
        k = k + 0.6 * torch.randn(k.shape, generator=generator, **fp32)
    v = torch.randn(2, 120, 2, head_dim, generator=generator, **fp32).to(device, dtype)
    k = k.to(device, dtype)
    keep = 40 if whole else 11

    def call(run: Callable[..., None]) -> dict[str, torch.Tensor]:
        kept = 40 + 2 * keep
        out_k, out_v = torch.full((2, 2, kept, 2, head_dim), float("nan"), dtype=dtype, device=device)
        index = torch.full((2, kept), -1, dtype=torch.int32, device=device)
        count = torch.full((2, kept), -1, dtype=torch.int32, device=device) if merge else None
        run(
            k, v, out_k, out_v, index, count, frames=3, keep=keep, pooled=pooled, anchor=1, rule=rule,
            merge_above=0.5, scale=head_dim**-0.5,
        )  # fmt: skip
        outputs = {"index": index, "k": out_k, "v": out_v}
        return {**outputs, "count": count} if merge else outputs

    return call


BACKENDS = OpBackends(
    op=_OP,
    backends={
        "cuda": Backend(lambda: cuda.compress_chunk, cuda.unavailable, cuda.compress_unsupported),
        "triton": Backend(_load_triton, triton_unavailable, _triton_unsupported),
        "reference": Backend(lambda: exact(reference)),
    },
    small_case=_small_case,
    tolerance=lambda kind: dtype_tolerance(kind[0]) if kind[5] else 0.0,  # what is not merged is copied
    kinds=tuple(
        (dtype, head_dim, pooled, whole, rule, merge, True)
        for dtype in (torch.bfloat16, torch.float16)
        for head_dim in HEAD_DIMS
        for rule, merge in (("similarity", False), ("nearest", True))
        for pooled, whole in ((True, False), (False, False), (True, True))
    ),
)

register(
    "compress_chunk(Tensor k, Tensor v, Tensor(a!) out_k, Tensor(b!) out_v, Tensor(c!) index, Tensor(d!)? count, "
    "SymInt frames, SymInt keep, bool pooled, int anchor, str rule, float merge_above, float scale, str backend) -> ()",
    _run,
)
