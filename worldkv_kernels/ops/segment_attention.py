"""torch.ops.worldkv.segment_attention: attention over segments of a KV pool, read where they lie."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Literal, NamedTuple, overload

import torch

from ..checks import (
    bad_type,
    bad_value,
    check_apart,
    check_backend,
    check_bool,
    check_heads,
    check_layout,
    check_scale,
    check_tensor,
)
from ..reference.segment_attention import segment_attention as reference
from ..rope import Rope3D
from ..window import TILE_ROWS, Segment, Window
from . import cuda, sdpa
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

_OP = "segment_attention"


class Shape(NamedTuple):
    """What decides which backend is the fastest. `keys` fill the window's capacity: how many it holds now only the
    device knows."""

    heads: int
    q_len: int
    keys: int
    head_dim: int
    turned_pairs: int
    has_mass: bool
    has_weight: bool
    group_size: int  # heads of q that share one of the pools


@overload
def segment_attention(
    q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, window: Window, *, scale: float | None = None,
    return_lse: Literal[False] = False, return_mass: Literal[False] = False,
    out: torch.Tensor | None = None, out_mass: torch.Tensor | None = None, backend: str | None = None,
) -> torch.Tensor: ...  # fmt: skip
@overload
def segment_attention(
    q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, window: Window, *, scale: float | None = None,
    return_lse: Literal[True], return_mass: Literal[False] = False,
    out: torch.Tensor | None = None, out_mass: torch.Tensor | None = None, backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
@overload
def segment_attention(
    q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, window: Window, *, scale: float | None = None,
    return_lse: Literal[False] = False, return_mass: Literal[True],
    out: torch.Tensor | None = None, out_mass: torch.Tensor | None = None, backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
@overload
def segment_attention(
    q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, window: Window, *, scale: float | None = None,
    return_lse: Literal[True], return_mass: Literal[True],
    out: torch.Tensor | None = None, out_mass: torch.Tensor | None = None, backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...  # fmt: skip
@overload
def segment_attention(
    q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, window: Window, *, scale: float | None = None,
    return_lse: bool = False, return_mass: bool = False,
    out: torch.Tensor | None = None, out_mass: torch.Tensor | None = None, backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]: ...  # fmt: skip
def segment_attention(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    window: Window,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    return_mass: bool = False,
    out: torch.Tensor | None = None,
    out_mass: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Attend every query to every token of a window over a KV pool, where it lies, or gathered for PyTorch's.

    out[i, h] = sum_j softmax_j(scale * q[i, h] . R(d_j) k[j, g] + w_j) v[j, g] over the window's tokens j, where
    g = h // (heads // kv_heads), R(d_j) turns a key by its segment's time shift (the query is turned instead, back from
    the original q for each segment, and rounded once to its dtype; in "sdpa" a copy of the key), and w_j is its
    segment's log_weight.

    Args:
        q: [q_len, heads, head_dim], bf16, fp16 or fp32, 1 to 128 heads, head_dim 64 or 128, dense in head_dim.
        k_pool, v_pool: [rows, kv_heads, head_dim], dtype and device of q, dense in head_dim; kv_heads divide heads, and
            head g serves the heads / kv_heads heads of q from g * heads / kv_heads on. Rows outside the window are
            never read into the result, whatever they hold. The window's rows and q must be finite: an infinite number
            in them may give NaN, also where its weight would be 0.
        window: the segments, on q's device. Order changes rounding only; rows named twice count twice.
        scale: from 1e-25 to 1e25; 1 / sqrt(head_dim) by default.
        return_lse: also return the log-sum-exp of the scaled scores and log weights, natural log, fp32 [heads, q_len].
        return_mass: also return the share of softmax weight on each segment, averaged over the queries,
            fp32 [heads, num_segments]; each row sums to 1.
        out: where to write, [q_len, heads, head_dim] like q, apart from q and the pools; allocated when None.
        out_mass: where to write the mass, fp32 [heads, n] on q's device, apart from the rest: of the first n segments,
            and zeros where the window has fewer. None to allocate it. Only with return_mass.
        backend: "reference", "triton", "sdpa" (the window gathered, and PyTorch's own attention over it; without
            mass, and on a GPU without log weights, bf16 and fp16), "cuda" (bf16 and fp16 on Hopper, where tokens, rows
            and heads of q and the pools start on multiples of 16 bytes and those of out on multiples of 4), or None for
            the automatic choice.

    Limits: no batch dimension, one session a call; no mask, none for causality either; V of K's heads and head_dim; no
    gradients.

    Returns out, or a tuple (out, lse), (out, mass) or (out, lse, mass). q . k and softmax in fp32; from q . k on their
    size costs no digit, up to 1e38 with the scale, which no fp16 reaches: sdpa on a CPU, whose scores lose digits from
    64 on in fp32, 512 in 16 bits, leaves them to the reference, and has then run in vain; on a GPU it is as exact as
    PyTorch's kernel. Deterministic: on one device and in a window of one capacity, the same segments in the same order
    give the same bits wherever their rows lie. Does not synchronise, except for the reference on a GPU, and sdpa in its
    first call there. On a GPU it takes scratch from torch's caching allocator, at most about 0.5 MiB a processor, and
    for the mass 8 bytes a query, head and segment (16 in CUDA), in a last round that is cut once a part; sdpa takes K
    and V of the window's capacity. Works in a CUDA graph, sdpa after a call outside one; `window.update` then changes
    what a replay reads, while mass keeps the number of segments that it was captured with, as out_mass does.

    Raises ValueError or TypeError on a wrong type, shape, dtype, device or stride, on an input that wants a gradient,
    on a window that reaches past the pool, on a scale out of range, on an output that overlaps an input or itself
    (from addresses and strides), and on a backend that is unknown or unavailable. torch.ops.worldkv.segment_attention,
    which takes the window's tables, raises the same; the reference, and sdpa on a CPU, also on tables that name rows
    outside the pool.
    """
    if not isinstance(window, Window):
        raise bad_type(_OP, "window", "a worldkv_kernels.Window", window)
    check_layout(_OP, "q", q, ("q_len", "heads", "head_dim"))
    check_layout(_OP, "k_pool", k_pool, ("rows", "kv_heads", "head_dim"), like=q)
    check_layout(_OP, "v_pool", v_pool, ("rows", "kv_heads", "head_dim"), like=q)
    check_heads(_OP, "q", q, "[q_len, heads, head_dim]")
    q_len, heads, head_dim = q.shape
    check_window(_OP, window, q, k_pool)
    if scale is None:
        scale = 1.0 / math.sqrt(head_dim)
    else:
        check_scale(_OP, "scale", scale)
    check_bool(_OP, "return_lse", return_lse)
    check_bool(_OP, "return_mass", return_mass)
    check_backend(_OP, backend)
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    else:
        check_layout(_OP, "out", out, (q_len, heads, head_dim), like=q)
    if out_mass is not None:
        if not return_mass:
            raise bad_value(_OP, "out_mass", "None without return_mass", out_mass)
        check_layout(_OP, "out_mass", out_mass, (heads, "segments"), like=q)
        check_tensor(_OP, "out_mass", out_mass, (heads, "segments"), like=q, dtypes=(torch.float32,), inner=0)
    lse = torch.empty((heads, q_len), dtype=torch.float32, device=q.device) if return_lse else None
    mass = out_mass
    if return_mass and mass is None:
        mass = torch.empty((heads, window.num_segments), dtype=torch.float32, device=q.device)
    NAMESPACE.segment_attention(
        q, k_pool, v_pool, *window.tables, out, lse, mass, scale, window.has_shift, window.has_weight,
        backend or "auto",
    )  # fmt: skip
    if lse is None and mass is None:
        return out
    return (out, *(extra for extra in (lse, mass) if extra is not None))


def _run(
    q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor,
    tiles: torch.Tensor, tail_rows: torch.Tensor, ranges: torch.Tensor, num_segments: torch.Tensor,
    turns: torch.Tensor, weights: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor | None, mass: torch.Tensor | None,
    scale: float, has_shift: bool, has_weight: bool, backend: str,
) -> None:  # fmt: skip
    tables = (tiles, tail_rows, ranges, num_segments, turns, weights)
    given = (q, k_pool, v_pool, *tables, out, lse, mass)
    layouts = [x if x is None else (x.shape, x.stride(), x.data_ptr() % 16, x.dtype, x.device) for x in given]
    grads = [x is not None and x.requires_grad for x in given] if torch.is_grad_enabled() else ()
    key = (has_shift, has_weight, *grads, *layouts)
    known = _KNOWN.get(key)
    if known is None:
        _check_layouts(*given, has_shift, has_weight)
        if len(_KNOWN) == _MOST_KNOWN:
            _KNOWN.clear()
        known = _KNOWN[key] = _kind_and_shape(*given, has_shift, has_weight)
    check_scale(_OP, "scale", scale)
    outputs = {name: x for name, x in (("out", out), ("lse", lse), ("mass", mass)) if x is not None}
    check_apart(_OP, outputs, {"q": q, "k_pool": k_pool, "v_pool": v_pool})
    run = BACKENDS.choose(backend, q.device, *known)
    with on_current_device(q.device):
        run(q, k_pool, v_pool, *tables, out, lse, mass, scale=scale, has_shift=has_shift, has_weight=has_weight)


# What `_check_layouts` has let pass, by all that it and `_kind_and_shape` look at: in steady state an op would look at
# twelve tensors anew in every call, which on a CPU is a tenth of a small window's attention.
_KNOWN: dict[tuple, tuple[tuple, Shape]] = {}
_MOST_KNOWN = 4096


def _check_layouts(
    q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor,
    tiles: torch.Tensor, tail_rows: torch.Tensor, ranges: torch.Tensor, num_segments: torch.Tensor,
    turns: torch.Tensor, weights: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor | None, mass: torch.Tensor | None, has_shift: bool, has_weight: bool,
) -> None:  # fmt: skip
    """What every call needs, also one of torch.ops.worldkv. What is in the tables is for the reference to say."""
    check_query_and_keys(_OP, q, k_pool)
    q_len, heads, head_dim = q.shape
    rows, kv_heads, _ = k_pool.shape
    if v_pool.dim() == 3 and v_pool.shape[2] != head_dim:
        raise bad_value(_OP, "v_pool", f"[{rows}, {kv_heads}, {head_dim}], since K and V share one head_dim", v_pool)
    check_tensor(_OP, "v_pool", v_pool, (rows, kv_heads, head_dim), like=q)
    check_tables(_OP, q, (tiles, tail_rows, ranges, num_segments, turns, weights), has_shift, has_weight)
    check_tensor(_OP, "out", out, (q_len, heads, head_dim), like=q)
    if lse is not None:
        check_tensor(_OP, "lse", lse, (heads, q_len), like=q, dtypes=(torch.float32,), inner=2)
    if mass is not None:
        check_tensor(_OP, "mass", mass, (heads, "segments"), like=q, dtypes=(torch.float32,), inner=0)
        if mass.shape[1] < 1:
            raise bad_value(_OP, "mass", f"[{heads}, segments >= 1]", mass)


def check_window(op: str, window: Window, q: torch.Tensor, k_pool: torch.Tensor) -> None:
    """What has to be known of a window before an op is called, which gets its tables alone."""
    if window.device != q.device:
        raise bad_value(op, "window", f"on {q.device}", window.device)
    if window.last_row >= k_pool.shape[0]:
        raise bad_value(op, "window", f"within the pool's {k_pool.shape[0]} rows", f"last row {window.last_row}")
    if window.rope is not None and window.rope.head_dim != q.shape[2]:
        raise bad_value(op, "window.rope", f"for head_dim {q.shape[2]}", window.rope)


def check_query_and_keys(op: str, q: torch.Tensor, k_pool: torch.Tensor) -> None:
    check_tensor(op, "q", q, ("q_len", "heads", "head_dim"))
    check_heads(op, "q", q, "[q_len, heads, head_dim]")
    q_len, heads, head_dim = q.shape
    if q_len < 1:
        raise bad_value(op, "q", "[q_len >= 1, heads, head_dim]", q)
    check_tensor(op, "k_pool", k_pool, ("rows", "kv_heads", head_dim), like=q)
    rows, kv_heads, _ = k_pool.shape
    if not 1 <= kv_heads <= heads or heads % kv_heads:
        wanted = f"[{rows}, kv_heads, {head_dim}] with kv_heads a divisor of q's {heads} heads"
        raise bad_value(op, "k_pool", wanted, k_pool)


def check_tables(
    op: str, q: torch.Tensor, tables: tuple[torch.Tensor, ...], has_shift: bool, has_weight: bool
) -> None:  # fmt: skip
    """Check shapes and dtypes of a window's tables."""
    tiles, tail_rows, ranges, num_segments, turns, weights = tables
    head_dim = q.shape[2]
    integers = (torch.int32,)
    check_tensor(op, "ranges", ranges, ("capacity + 1", 4), like=q, dtypes=integers, inner=2)
    capacity = ranges.shape[0] - 1
    check_tensor(op, "tiles", tiles, (capacity, 2), like=q, dtypes=integers, inner=2)
    check_tensor(op, "tail_rows", tail_rows, (TILE_ROWS * capacity, 2), like=q, dtypes=integers, inner=2)
    check_tensor(op, "num_segments", num_segments, (1,), like=q, dtypes=integers)
    if has_shift:
        check_tensor(op, "turns", turns, (capacity, "pairs", 2), like=q, dtypes=(torch.float32,), inner=3)
        if not 1 <= turns.shape[1] <= head_dim // 2:
            raise bad_value(op, "turns", f"[{capacity}, 1 to {head_dim // 2} pairs, 2]", turns)
    if has_weight:
        check_tensor(op, "weights", weights, (capacity,), like=q, dtypes=(torch.float32,))


def _kind_and_shape(
    q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor,
    tiles: torch.Tensor, tail_rows: torch.Tensor, ranges: torch.Tensor, num_segments: torch.Tensor,
    turns: torch.Tensor, weights: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor | None, mass: torch.Tensor | None, has_shift: bool, has_weight: bool,
) -> tuple[tuple, Shape]:  # fmt: skip
    """What a backend is chosen by."""
    q_len, heads, head_dim = q.shape
    group_size = heads // k_pool.shape[1]
    turned_pairs = turns.shape[1] if has_shift else 0
    layout = (
        _rows_in_order(k_pool, v_pool),
        cuda.attention_aligned(q, k_pool, v_pool, out, tiles, tail_rows, ranges, turns),
    )
    has_mass, keys = mass is not None, TILE_ROWS * len(tiles)
    kind = (q.dtype, head_dim, turned_pairs, lse is not None, has_mass, has_weight, group_size > 1, *layout)
    return kind, Shape(heads, q_len, keys, head_dim, turned_pairs, has_mass, has_weight, group_size)


def _rows_in_order(*pools: torch.Tensor) -> bool:
    """Whether a row's heads follow each other, on multiples of 16 bytes: what sm_90's copy engine takes."""
    return all(
        (x.shape[1] == 1 or x.stride(1) == x.shape[2]) and x.data_ptr() % 16 == x.stride(0) * x.element_size() % 16 == 0
        for x in pools
    )


def triton_unsupported(kind: tuple) -> str | None:
    if kind[0] == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        return "triton's interpreter multiplies bf16 matrices as integers"
    return None


def _load_triton() -> Callable[..., None]:
    from ..kernels.segment_attention import segment_attention as launch

    return launch


def _small_case(device: torch.device, kind: tuple) -> Callable[[Callable[..., None]], dict[str, torch.Tensor]]:
    """200 queries, 2 heads, where grouped 4 over 2, three segments, with more tiles than a kernel holds at a time, and
    tails; unused rows are NaN. In two windows, of which the larger capacity lets a kernel cut the keys into parts."""
    dtype, head_dim, turned_pairs, with_lse, with_mass, has_weight, grouped, rows_in_order, aligned = kind
    has_shift, heads = turned_pairs > 0, 4 if grouped else 2
    generator = torch.Generator().manual_seed(0)
    fp32 = dict(generator=generator, dtype=torch.float32, device="cpu")
    q, k, v = (torch.randn(n, of, head_dim, **fp32).to(device, dtype) for n, of in ((200, heads), (1600, 2), (1600, 2)))
    if not rows_in_order:
        k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v))
    if not aligned:
        q = torch.cat([q.new_zeros(1), q.flatten()])[1:].view(q.shape)
    segments = [Segment(576, 1000, 7 * has_shift), Segment(0, 1, -3 * has_shift), Segment(100, 400)]
    if has_weight:
        segments = [s._replace(log_weight=w) for s, w in zip(segments, (0.7, 5.0, -1.5), strict=True)]
    used = torch.zeros(1600, dtype=torch.bool, device=device)
    for segment in segments:
        used[segment.first_row : segment.first_row + segment.num_rows] = True
    k[~used], v[~used] = float("nan"), float("nan")
    rope = Rope3D(head_dim, pairs=(turned_pairs, head_dim // 2 - turned_pairs, 0)) if has_shift else None
    made = dict(device=device, rope=rope, weighted=has_weight)
    windows = [Window(segments, capacity=capacity, **made) for capacity in (13, 64)]

    def call(run: Callable[..., None]) -> dict[str, torch.Tensor]:
        results = {}
        for name, window in zip(("", " of a cut window"), windows, strict=True):
            out = torch.full_like(q, float("nan"))
            lse = torch.full((heads, 200), float("nan"), dtype=torch.float32, device=device) if with_lse else None
            mass = torch.full((heads, 3), float("nan"), dtype=torch.float32, device=device) if with_mass else None
            flags = dict(has_shift=has_shift, has_weight=has_weight)
            run(q, k, v, *window.tables, out, lse, mass, scale=head_dim**-0.5, **flags)
            made = {f"out{name}": out, f"lse{name}": lse, f"mass{name}": mass}
            results.update((output, x) for output, x in made.items() if x is not None)
        return results

    return call


# No pair, those of a Rope3D, and all of them where fewer may take another kernel.
TURNED_PAIRS = ((64, 0), (64, 12), (128, 0), (128, 22), (128, 64))

BACKENDS = OpBackends(
    op=_OP,
    backends={
        "cuda": Backend(lambda: cuda.segment_attention, cuda.attention_unavailable, cuda.attention_unsupported),
        "triton": Backend(_load_triton, triton_unavailable, triton_unsupported),
        "sdpa": Backend(lambda: sdpa.segment_attention, sdpa.unavailable, sdpa.unsupported, sdpa.unsupported_on),
        "reference": Backend(lambda: exact(reference)),
    },
    on_cpu=("sdpa", "reference"),
    small_case=_small_case,
    tolerance=lambda kind: dtype_tolerance(kind[0]),
    kinds=(
        *(
            (dtype, head_dim, turned_pairs, with_extras, with_extras, has_weight, False, True, True)
            for has_weight in (False, True)
            for dtype in (torch.bfloat16, torch.float16)
            for head_dim, turned_pairs in TURNED_PAIRS
            for with_extras in (False, True)
        ),
        *(
            (dtype, head_dim, turned_pairs, with_all, with_all, with_all, True, True, True)
            for dtype in (torch.bfloat16, torch.float16)
            for head_dim, turned_pairs in ((64, 0), (128, 22))
            for with_all in (False, True)
        ),
    ),
    proven_as=lambda kind: f"{_OP}, grouped" if kind[6] else f"{_OP}, weighted" if kind[5] else _OP,
    typical_shape=Shape(40, 4680, 32_768, 128, 0, False, False, 1),
)

register(
    "segment_attention(Tensor q, Tensor k_pool, Tensor v_pool, Tensor tiles, Tensor tail_rows, Tensor ranges, "
    "Tensor num_segments, Tensor turns, Tensor weights, Tensor(a!) out, Tensor(b!)? lse, Tensor(c!)? mass, "
    "float scale, bool has_shift, bool has_weight, str backend) -> ()",
    _run,
)
