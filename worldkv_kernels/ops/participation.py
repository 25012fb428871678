"""torch.ops.worldkv.participation: the share of softmax weight that each key of a window received."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..checks import (
    bad_type,
    bad_value,
    check_apart,
    check_backend,
    check_heads,
    check_layout,
    check_scale,
    check_tensor,
)
from ..reference.participation import participation as reference
from ..reference.segment_attention import segment_attention as reference_attention
from ..rope import Rope3D
from ..window import Segment, Window
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
from .segment_attention import TURNED_PAIRS, check_query_and_keys, check_tables, check_window, triton_unsupported

_OP = "participation"


def participation(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    window: Window,
    lse: torch.Tensor,
    *,
    scale: float | None = None,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """The share of softmax weight that each token of a window received, averaged over the queries.

    out[h, j] = mean_i exp(scale * q[i, h] . R(d_j) k[j, g] + w_j - lse[h, i]) for the window's tokens j, segment by
    segment in the window's order, where g = h // (heads // kv_heads), and R(d_j) and w_j turn and weigh a segment's
    keys as in `segment_attention`. So it says what a model attends to, and what may be pruned for having no use: the
    participation of Deep Forcing, arXiv 2512.05081, and the accumulated attention of H2O, arXiv 2306.14048.

    Args:
        q: [q_len, heads, head_dim], bf16, fp16 or fp32, 1 to 128 heads, head_dim 64 or 128, dense in head_dim.
        k_pool: [rows, kv_heads, head_dim], dtype and device of q, dense in head_dim; kv_heads divide heads. Rows
            outside the window are never read into the result, whatever they hold. The window's rows and q must be
            finite.
        window: the segments whose tokens are asked about, on q's device; rows named twice have a share each time.
        lse: fp32 [heads, q_len], contiguous, as `segment_attention` of these queries returns it. Shares are of what it
            was taken over: of the same window each row of out sums to 1; with the lse of a whole window, a Window of
            some of its segments gets their shares of the whole, for the work of these segments alone.
        scale: from 1e-25 to 1e25; 1 / sqrt(head_dim) by default, as the lse was taken with.
        out: where to write, fp32 [heads, tokens], dense in tokens, apart from q, k_pool and lse, with room for the
            window's tokens; what is more becomes 0. Allocated when None, [heads, window.num_tokens].
        backend: "reference", "triton", or None for the automatic choice. There is no CUDA kernel.

    Limits: no batch dimension, one session a call; no mask; no gradients.

    Returns out. q . k, weights and sums in fp32. A weight is the exponential of a difference from the lse, which rounds
    to fp32: of scores near s in size it is off by up to about 3e-7 * s of itself, 3e-4 at 1000, and past 1e6 shares say
    nothing and may be infinite. Queries that are turned are rounded as in `segment_attention`, but for its "sdpa",
    which rounds turned keys: of such an lse rows sum to 1 up to that rounding. Deterministic. Does not synchronise, but
    for the reference on a GPU, and takes no scratch there. Works in a CUDA graph; `window.update` then changes what a
    replay reads, while out keeps the size that it was captured with: later tokens are left out, and what is past the
    window's is 0.

    Raises ValueError or TypeError on a wrong type, shape, dtype, device or stride, on an input that wants a gradient,
    on a window that reaches past the pool, on a scale out of range, on an out without room or that overlaps an input
    or itself, and on a backend that is unknown or unavailable. torch.ops.worldkv.participation, which takes the
    window's tables, raises the same, but takes any size of out; the reference also on tables that name rows outside the
    pool.
    """
    if not isinstance(window, Window):
        raise bad_type(_OP, "window", "a worldkv_kernels.Window", window)
    check_layout(_OP, "q", q, ("q_len", "heads", "head_dim"))
    check_layout(_OP, "k_pool", k_pool, ("rows", "kv_heads", "head_dim"), like=q)
    check_heads(_OP, "q", q, "[q_len, heads, head_dim]")
    q_len, heads, head_dim = q.shape
    check_window(_OP, window, q, k_pool)
    check_layout(_OP, "lse", lse, (heads, q_len), like=q)
    if scale is None:
        scale = 1.0 / math.sqrt(head_dim)
    else:
        check_scale(_OP, "scale", scale)
    check_backend(_OP, backend)
    if out is None:
        out = torch.empty((heads, window.num_tokens), dtype=torch.float32, device=q.device)
    else:
        check_layout(_OP, "out", out, (heads, "tokens"), like=q)
        if out.shape[1] < window.num_tokens:
            raise bad_value(_OP, "out", f"[{heads}, tokens] of the window's {window.num_tokens} tokens at least", out)
    NAMESPACE.participation(
        q, k_pool, *window.tables, lse, out, scale, window.has_shift, window.has_weight, backend or "auto"
    )
    return out


def _run(
    q: torch.Tensor, k_pool: torch.Tensor,
    tiles: torch.Tensor, tail_rows: torch.Tensor, ranges: torch.Tensor, num_segments: torch.Tensor,
    turns: torch.Tensor, weights: torch.Tensor, lse: torch.Tensor, out: torch.Tensor,
    scale: float, has_shift: bool, has_weight: bool, backend: str,
) -> None:  # fmt: skip
    tables = (tiles, tail_rows, ranges, num_segments, turns, weights)
    check_query_and_keys(_OP, q, k_pool)
    check_tables(_OP, q, tables, has_shift, has_weight)
    q_len, heads, head_dim = q.shape
    check_tensor(_OP, "lse", lse, (heads, q_len), like=q, dtypes=(torch.float32,), inner=2)
    check_tensor(_OP, "out", out, (heads, "tokens"), like=q, dtypes=(torch.float32,))
    if out.shape[1] < 1:
        raise bad_value(_OP, "out", f"[{heads}, tokens >= 1]", out)
    check_scale(_OP, "scale", scale)
    check_apart(_OP, {"out": out}, {"q": q, "k_pool": k_pool, "lse": lse})
    per_vector = 16 // q.element_size()
    aligned = all(
        x.data_ptr() % 16 == 0 and x.stride(0) % per_vector == x.stride(1) % per_vector == 0 for x in (q, k_pool)
    )
    turned_pairs = turns.shape[1] if has_shift else 0
    kind = (q.dtype, head_dim, turned_pairs, has_weight, heads > k_pool.shape[1], aligned)
    run = BACKENDS.choose(backend, q.device, kind)
    with on_current_device(q.device):
        run(q, k_pool, *tables, lse, out, scale=scale, has_shift=has_shift, has_weight=has_weight)


def _load_triton() -> Callable[..., None]:
    from ..kernels.participation import participation as launch

    return launch


def _small_case(device: torch.device, kind: tuple) -> Callable[[Callable[..., None]], dict[str, torch.Tensor]]:
    """200 queries, 2 heads, where grouped 4 over 2, three segments with tails of which two share a block; unused rows
    are NaN, and out has room for more than the window's tokens."""
    dtype, head_dim, turned_pairs, has_weight, grouped, aligned = kind
    has_shift, heads = turned_pairs > 0, 4 if grouped else 2
    generator = torch.Generator().manual_seed(0)
    fp32 = dict(generator=generator, dtype=torch.float32, device="cpu")
    q, k = torch.randn(200, heads, head_dim, **fp32).to(dtype), torch.randn(600, 2, head_dim, **fp32).to(dtype)
    segments = [Segment(300, 150, 7 * has_shift), Segment(0, 1, -3 * has_shift), Segment(20, 270)]
    if has_weight:
        segments = [s._replace(log_weight=w) for s, w in zip(segments, (0.7, 5.0, -1.5), strict=True)]
    k[1:20], k[290:300], k[450:] = float("nan"), float("nan"), float("nan")
    rope = Rope3D(head_dim, pairs=(turned_pairs, head_dim // 2 - turned_pairs, 0)) if has_shift else None
    options = dict(scale=head_dim**-0.5, has_shift=has_shift, has_weight=has_weight)
    window = Window(segments, device="cpu", rope=rope, weighted=has_weight)
    lse = torch.empty((heads, 200), dtype=torch.float32, device="cpu")
    exact(reference_attention)(q, k, k, *window.tables, torch.empty_like(q), lse, None, **options)
    q, k, lse, *tables = (x.to(device) for x in (q, k, lse, *window.tables))
    if not aligned:
        q, k = (torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (q, k))

    def call(run: Callable[..., None]) -> dict[str, torch.Tensor]:
        out = torch.full((heads, window.num_tokens + 9), float("nan"), dtype=torch.float32, device=device)
        run(q, k, *tables, lse, out, **options)
        return {"out": out}

    return call


BACKENDS = OpBackends(
    op=_OP,
    backends={
        "triton": Backend(_load_triton, triton_unavailable, triton_unsupported),
        "reference": Backend(lambda: exact(reference)),
    },
    small_case=_small_case,
    tolerance=lambda kind: dtype_tolerance(kind[0]),
    kinds=tuple(
        (dtype, head_dim, turned_pairs, has_weight, has_weight, True)
        for dtype in (torch.bfloat16, torch.float16)
        for head_dim, turned_pairs in TURNED_PAIRS
        for has_weight in (False, True)
    ),
)

register(
    "participation(Tensor q, Tensor k_pool, Tensor tiles, Tensor tail_rows, Tensor ranges, Tensor num_segments, "
    "Tensor turns, Tensor weights, Tensor lse, Tensor(a!) out, float scale, bool has_shift, bool has_weight, "
    "str backend) -> ()",
    _run,
)
