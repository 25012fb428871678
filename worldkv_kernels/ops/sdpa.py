"""segment_attention by gathering the window's K and V, and PyTorch's own attention over them.

Keys are turned in the gathered copy, not the query for each segment: PyTorch then runs once, not once a shift with a
merge after it, and turning a copy costs a few per cent of that. A turned key is rounded once to its dtype, as the
turned query is in the other backends.

On a CPU log weights are an additive mask. On a GPU a kernel gathers, and PyTorch's flash attention takes the number of
rows from the device, so that a captured graph serves later windows; it takes no mask then, and so no log weights. That
is flash-attn 3 or 4 where torch.nn.attention.activate_flash_attention_impl has put it there: in the same operator.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from ..reference.segment_attention import check_num_segments, check_rows
from ..reference.segment_attention import segment_attention as reference
from ..window import TILE_ROWS
from .backends import exact, triton_unavailable

# PyTorch multiplies by the scale before it takes differences, which costs a weight 6e-8 of the score's size. Past these
# scores, where that is more than fp32's products lose in any case, or a hundredth of a 16-bit weight's rounding, the
# reference serves.
_LARGE = {torch.float32: 64.0, torch.bfloat16: 512.0, torch.float16: 512.0}
_BY_HEADS = 2048  # rows from which on attention gains more by heads that are dense than gathering them so costs
_WITHIN = np.arange(TILE_ROWS, dtype=np.int32)


def unavailable(device: torch.device) -> str | None:
    """Why PyTorch's attention cannot serve on `device`; None when it can."""
    if device.type == "cpu":
        has = hasattr(torch, "_scaled_dot_product_flash_attention_for_cpu")
        return None if has else f"torch {torch.__version__} has no flash attention for CPUs"
    reason = triton_unavailable(device)  # which gathers
    if reason is None and not _takes_lengths():
        return f"torch {torch.__version__} has no attention with lengths on the device"
    return reason


def unsupported(kind: tuple) -> str | None:
    """Why it cannot serve a kind of segment_attention anywhere; None when it can."""
    if kind[4]:
        return "PyTorch's attention gives no softmax weight on each segment; the other backends do"
    return None


def unsupported_on(device: torch.device, kind: tuple) -> str | None:
    """Why it cannot serve a kind of segment_attention on `device`; None when it can."""
    if device.type == "cpu":
        return None
    if kind[0] == torch.float32:
        return "PyTorch's attention with lengths on the device takes bfloat16 and float16, not torch.float32"
    if kind[5]:
        return "PyTorch's attention with lengths on the device takes no log weights"
    return None


def segment_attention(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    tiles: torch.Tensor,
    tail_rows: torch.Tensor,
    ranges: torch.Tensor,
    num_segments: torch.Tensor,
    turns: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    mass: torch.Tensor | None,
    *,
    scale: float,
    has_shift: bool,
    has_weight: bool,
) -> None:
    """What the op's other implementations take; `mass` is None."""
    tables = (tiles, tail_rows, ranges, num_segments, turns, weights)
    run = _on_cpu if q.device.type == "cpu" else _on_gpu
    run(q, k_pool, v_pool, tables, out, lse, scale=scale, has_shift=has_shift, has_weight=has_weight)


def _on_cpu(
    q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, tables: tuple[torch.Tensor, ...],
    out: torch.Tensor, lse: torch.Tensor | None, *, scale: float, has_shift: bool, has_weight: bool,
) -> None:  # fmt: skip
    """PyTorch's log-sum-exp, which it always computes, is as large as a query's largest score, or up to
    log(rows) larger: it says where scores are too large for PyTorch's order of operations, or have overflowed."""
    tiles, tail_rows, ranges, num_segments, turns, weights = tables
    num = check_num_segments(num_segments, ranges)
    _, num_full, _, num_tail = ranges.numpy()[0].tolist()
    index, segments, first, last, adjoin = _rows(
        tiles.numpy()[:num_full].tobytes(), tail_rows.numpy()[:num_tail].tobytes()
    )
    check_rows(first, last, k_pool.shape[0])
    if adjoin and num == 1 and not has_shift:
        k, v = (pool[first : last + 1].transpose(0, 1) for pool in (k_pool, v_pool))
    else:
        k, v = _gathered(k_pool, index), _gathered(v_pool, index)
    mask = None
    if has_shift:
        _turn(k, turns.index_select(0, segments))
    if has_weight:
        mask = (weights.index_select(0, segments) * math.log(2)).expand(1, 1, len(q), len(index))
    # Heads that share one of K are a batch, over which K is repeated by a stride of 0.
    of_kv = (len(k), q.shape[1] // len(k))
    batch = (q.unflatten(1, of_kv).permute(2, 1, 0, 3), k.expand(of_kv[1], *k.shape), v.expand(of_kv[1], *v.shape))
    found, log_sum = torch._scaled_dot_product_flash_attention_for_cpu(*batch, attn_mask=mask, scale=scale)
    if not float(torch.linalg.vector_norm(log_sum, math.inf)) <= _LARGE[q.dtype]:  # NaN is not, either
        options = dict(scale=scale, has_shift=has_shift, has_weight=has_weight)
        exact(reference)(q, k_pool, v_pool, *tables, out, lse, None, **options)
        return
    out.unflatten(1, of_kv).copy_(found.permute(2, 1, 0, 3))
    if lse is not None:
        lse.unflatten(0, of_kv).copy_(log_sum.transpose(0, 1))


class _Rows(NamedTuple):
    """The rows of a window, int32."""

    index: torch.Tensor
    segments: torch.Tensor  # of each row
    first: int
    last: int
    adjoin: bool  # one after the other


@lru_cache(maxsize=64)  # every layer of every pass over a chunk asks for one window's, or each layer for its own
def _rows(tiles: bytes, tail_rows: bytes) -> _Rows:
    """Of tables [n, 2], rows and segments: full tiles first, which takes fewer steps than segment by segment, and gives
    one order wherever the segments lie."""
    full, tail = (np.frombuffer(table, dtype=np.int32).reshape(-1, 2) for table in (tiles, tail_rows))
    rows = np.concatenate([(full[:, :1] + _WITHIN).ravel(), tail[:, 0]])
    segments = np.concatenate([full[:, 1].repeat(TILE_ROWS), tail[:, 1]])
    adjoin = bool((rows[1:] - rows[:-1] == 1).all())
    return _Rows(torch.from_numpy(rows), torch.from_numpy(segments), int(rows.min()), int(rows.max()), adjoin)


def _gathered(pool: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[heads, rows, head_dim], a copy."""
    if rows.shape[0] < _BY_HEADS:
        return pool.index_select(0, rows).transpose(0, 1)
    heads, head_dim = pool.shape[1:]
    gathered = torch.empty((heads, len(rows), head_dim), dtype=pool.dtype, device=pool.device)
    for head in range(heads):
        torch.index_select(pool[:, head], 0, rows, out=gathered[head])
    return gathered


def _turn(k: torch.Tensor, turns: torch.Tensor) -> None:
    """Turn keys [heads, rows, head_dim] in place, by the cosines and sines [rows, pairs, 2] of their rows."""
    turning = k[..., : 2 * turns.shape[1]]
    pairs = torch.view_as_complex(turning.float().unflatten(-1, (-1, 2)))
    pairs *= torch.view_as_complex(turns)
    if k.dtype != torch.float32:  # fp32 was turned where it lies
        turning.copy_(torch.view_as_real(pairs).flatten(-2))


# --- on a GPU ---


# PyTorch's cuDNN attention takes lengths too, but under torch 2.11 on an H100 it invalidates a capture, and outside of
# one it builds its plan anew in every call.
def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, of_q: torch.Tensor, of_k: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [q_len, heads, head_dim] and lse [heads, q_len] over as many rows of k and v [rows, kv_heads, head_dim] as
    the last number of `of_k`."""
    found = torch.ops.aten._flash_attention_forward(q, k, v, of_q, of_k, len(q), len(k), 0.0, False, False, scale=scale)
    return found[0], found[1]


_faults: dict[tuple[torch.device, torch.dtype, int, bool, str | None], str | None] = {}


def _implementation() -> str | None:
    """What torch.nn.attention.activate_flash_attention_impl has put in place of PyTorch's own, "FA3" or "FA4"."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return current() if current is not None else None


def _takes_lengths() -> bool:
    packet = getattr(torch.ops.aten, "_flash_attention_forward", None)
    names = {argument.name for argument in packet.default._schema.arguments} if packet is not None else set()
    return {"cum_seq_q", "cum_seq_k"} <= names


def _check(device: torch.device, dtype: torch.dtype, head_dim: int, grouped: bool) -> None:
    """Raise RuntimeError where flash attention does not run here or does not keep to the lengths: a torch may be built
    without it. Tried once an implementation; that reads results, which no capture allows."""
    key = (device, dtype, head_dim, grouped, _implementation())
    if key not in _faults:
        if torch.cuda.is_current_stream_capturing():
            inputs = f"{dtype}, head_dim {head_dim}{' and grouped heads' * grouped}"
            wanted = f"called once outside a capture, with {inputs}, before it is captured"
            raise RuntimeError(f"segment_attention: sdpa must be {wanted}: it tries PyTorch's attention then")
        _faults[key] = _fault(device, dtype, head_dim, grouped)
    if _faults[key]:
        by = " ".join(filter(None, (torch.__version__, key[-1])))
        raise RuntimeError(f"segment_attention: torch {by} cannot serve sdpa here: {_faults[key]}")


def _fault(device: torch.device, dtype: torch.dtype, head_dim: int, grouped: bool) -> str | None:
    """What is wrong with flash attention over the first 130 of 512 rows, NaN from row 384 on; None if nothing."""
    generator, group_size = torch.Generator().manual_seed(0), 3 if grouped else 1
    q, k, v = (
        torch.randn(n, heads, head_dim, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
        for n, heads in ((70, 2 * group_size), (512, 2), (512, 2))
    )
    k[130:384], v[130:384] = 0.0, 0.0
    k[384:], v[384:] = math.nan, math.nan
    keys, values = (x[:130].float().repeat_interleave(group_size, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * head_dim**-0.5
    want = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    of_q, of_k = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (70, 130))
    try:
        out, lse = _flash(*(x.to(device) for x in (q, k, v)), of_q, of_k, head_dim**-0.5)
        out, lse = out.float().cpu(), lse.cpu()
    except Exception as error:  # what it lacks
        return f"it failed on a small case: {type(error).__name__}: {error}"
    for name, got, right in (("out", out, want), ("lse", lse, scores.logsumexp(-1))):
        if got.shape != right.shape or not (got - right).norm() <= 2e-2 * right.norm():
            return f"its {name} is wrong"
    return None


def _on_gpu(
    q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, tables: tuple[torch.Tensor, ...],
    out: torch.Tensor, lse: torch.Tensor | None, *, scale: float, has_shift: bool, has_weight: bool,
) -> None:  # fmt: skip
    """Into scratch of the window's capacity. Large scores are PyTorch's to deal with: looking would synchronise."""
    from ..kernels.gather_window import gather_window

    tiles, tail_rows, ranges, _, turns, _ = tables
    _check(q.device, q.dtype, q.shape[2], q.shape[1] > k_pool.shape[1])
    k, v = torch.empty((2, TILE_ROWS * len(tiles), *k_pool.shape[1:]), dtype=q.dtype, device=q.device)
    lengths = torch.empty((2, 2), dtype=torch.int32, device=q.device)
    gather_window(k_pool, v_pool, tiles, tail_rows, ranges, turns, k, v, lengths, q_len=len(q), has_shift=has_shift)
    if q.data_ptr() % 16 or any(stride * q.element_size() % 16 for stride in q.stride()[:2]):
        q = q.clone(memory_format=torch.contiguous_format)  # it loads 16 bytes at a time
    found, log_sum = _flash(q, k, v, *lengths, scale)
    out.copy_(found)
    if lse is not None:
        lse.copy_(log_sum)
