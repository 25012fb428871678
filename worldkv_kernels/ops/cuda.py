"""Launchers of the CUDA extension's kernels; the extension is optional, and built where nvcc was found."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path

import torch

from .backends import Cannot

_EXTENSION = f"{__package__.rpartition('.')[0]}._cuda"  # of this copy of the package, whatever its name
_NOTE = Path(__file__).parents[1] / "_cuda_missing.txt"  # what setup.py says of an extension that it did not build
_MAX_APPEND_COLUMNS = 8192  # of a row that a block of csrc/append holds in its registers
_MAX_STRIDE = 2**39  # numbers of 16 bits: the copy engine takes strides below 2**40 bytes
_PARTLY_TURNED_PAIRS = 24  # three steps of 16 columns; the temporal pairs of 128 are 22
_BLOCK_Q = 128  # queries of an item: 64 of each of two warp groups
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def architectures() -> list[str]:
    """What the extension was compiled for, such as ["80", "90a"]; empty without the extension."""
    return [] if missing() else importlib.import_module(_EXTENSION).architectures.split(",")


def missing() -> str | None:
    """Why the extension cannot be imported; None when it can."""
    try:
        importlib.import_module(_EXTENSION)
    except ModuleNotFoundError:
        why = f": {_NOTE.read_text().strip()}" if _NOTE.exists() else ""
        return f"the extension is not built{why} (WORLDKV_CUDA=1 pip install --no-cache-dir insists on it)"
    except ImportError as error:  # it is there, and does not fit this Python or this system
        return f"the extension cannot be loaded: {error}"
    return None


def unavailable(device: torch.device) -> str | None:
    """Why the extension's kernels cannot run on `device`; None when they can."""
    if device.type != "cuda":
        return Cannot("it needs a GPU")
    reason = missing()
    if reason:
        return reason
    built = architectures()
    major, minor = torch.cuda.get_device_capability(device)
    # Machine code serves its own architecture, and without a letter also later minor revisions of it.
    exact = any(arch.rstrip("a") == f"{major}{minor}" for arch in built)
    older = any(arch.isdigit() and int(arch) // 10 == major and int(arch) % 10 <= minor for arch in built)
    return None if exact or older else f"the extension is built for {', '.join(built)}, not {major}{minor}"


def attention_unavailable(device: torch.device) -> str | None:
    """Why csrc/attention cannot run on `device`; None when it can. It is of instructions that Hopper alone has."""
    reason = unavailable(device)
    if reason:
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return Cannot(f"it is for compute capability 9.0, not {major}.{minor}")
    if "90a" not in architectures():
        return f"the extension is built for {', '.join(architectures())}, not 90a"
    try:
        _shared_with_triton()
    except ImportError as error:
        return f"it deals out its work as the Triton kernel does, and triton cannot be imported ({error})"
    return None


def append_unsupported(kind: tuple) -> str | None:
    """Why csrc/append does not take a kind of norm_rope_append, (dtype, heads, kv_heads, head_dim, ..., aligned);
    None when it does."""
    dtype, heads, _, head_dim, *_, aligned = kind
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {dtype}"
    if heads * head_dim > _MAX_APPEND_COLUMNS:
        return f"it takes rows of up to {_MAX_APPEND_COLUMNS} numbers, not {heads} heads of {head_dim}"
    return _rows_unsupported(aligned)


def attention_unsupported(kind: tuple) -> str | None:
    """Why csrc/attention does not take a kind of segment_attention, (dtype, head_dim, turned_pairs, ..., has_weight,
    grouped, rows_in_order, aligned); None when it does."""
    dtype, head_dim, turned_pairs, *_, has_weight, _, _, aligned = kind
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {dtype}"
    if has_weight and head_dim == 128 and turned_pairs > _PARTLY_TURNED_PAIRS:
        return f"it takes weights of segments where up to {_PARTLY_TURNED_PAIRS} pairs turn, not {turned_pairs}"
    return None if aligned else "it takes q and pools that start on multiples of 16 bytes, head by head, and out on 4"


def attention_aligned(
    q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, out: torch.Tensor, *tables: torch.Tensor
) -> bool:
    """Whether tokens, rows and heads start where csrc/attention takes them, in 16 bits a number: on multiples of 16
    bytes where the copy engine reads, less than 2**40 apart, and on multiples of 4 where pairs of numbers are written.
    The window's tables start on multiples of 16 bytes.
    """
    if any(table.data_ptr() % 16 for table in tables):
        return False
    for x, numbers in ((q, 8), (k_pool, 8), (v_pool, 8), (out, 2)):
        tokens, heads, _ = x.shape
        stride_token, stride_head, _ = x.stride()
        if (
            x.data_ptr() % (2 * numbers)
            or (tokens > 1 and (stride_token % numbers or not 0 < stride_token < _MAX_STRIDE))
            or (heads > 1 and (stride_head % numbers or not 0 < stride_head < _MAX_STRIDE))
        ):
            return False
    return True


def attention_tile_rows(head_dim: int, turned_pairs: int, has_weight: bool = False) -> int:
    """How many keys csrc/attention multiplies at once: 176, which an H100 has shown to be as fast as 128 or faster.

    A thread has 240 registers. With head_dim 128 it holds 64 of the output and 88 scores of 176 keys; a turned query
    takes 4 more for each 16 of its columns. 12 for 48 columns, 24 pairs, fit beside them; 32 for all of them do not,
    and there it is 128. So it is at head_dim 64 where any column turns: 176 fit, and have not been timed. Weights of
    segments take 5 more, and with them it is 128 where any column turns; neither has been timed.
    """
    if has_weight:
        return 128 if turned_pairs else 176
    turned_in_part = head_dim == 128 and turned_pairs <= _PARTLY_TURNED_PAIRS
    return 176 if turned_pairs == 0 or turned_in_part else 128


def compress_unsupported(kind: tuple) -> str | None:
    """Why csrc/compress does not take a kind of compress_chunk, (dtype, ..., rule, merge, aligned), None if it does."""
    *_, rule, merge, aligned = kind
    if rule != "similarity" or merge:
        return "it prunes by rule='similarity', and merges nothing"
    return _rows_unsupported(aligned)


def _rows_unsupported(aligned: bool) -> str | None:
    return None if aligned else "it takes rows that start on multiples of 16 bytes"


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def norm_rope_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    q_out: torch.Tensor,
    table: torch.Tensor | None,
    first_row: int | torch.Tensor,
    *,
    grid: tuple[int, int, int],
    pairs: tuple[int, int, int],
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    round_before_rope: bool,
) -> None:
    """Launch csrc/append on the current stream. Takes what `append_unsupported` lets through."""
    on_device = isinstance(first_row, torch.Tensor)
    importlib.import_module(_EXTENSION).norm_rope_append(
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), q_out=q_out.data_ptr(),
        k_pool=k_pool.data_ptr(), v_pool=v_pool.data_ptr(),
        q_weight=_address(q_weight), k_weight=_address(k_weight), table=_address(table),
        device_first_row=_address(first_row) if on_device else 0, first_row=0 if on_device else first_row,
        device_start_frame=0, start_frame=0,  # the kernel's own count of frames: the table begins at the chunk's first
        stride_q_token=q.stride(0), stride_k_token=k.stride(0), stride_v_token=v.stride(0),
        stride_q_out_token=q_out.stride(0), stride_k_pool_row=k_pool.stride(0), stride_v_pool_row=v_pool.stride(0),
        tokens=q.shape[0], heads=q_out.shape[1], kv_heads=k_pool.shape[1], head_dim=k_pool.shape[2],
        grid_height=grid[1], grid_width=grid[2], pairs_time=pairs[0], pairs_height=pairs[1],
        eps=eps, round_before_rope=round_before_rope,
        q_weight_is_float=q_weight is not None and q_weight.dtype == torch.float32,
        k_weight_is_float=k_weight is not None and k_weight.dtype == torch.float32,
        dtype=_DTYPES[q.dtype], stream=torch.cuda.current_stream(q.device).cuda_stream,
    )  # fmt: skip


def compress_chunk(
    k: torch.Tensor,
    v: torch.Tensor,
    out_k: torch.Tensor,
    out_v: torch.Tensor,
    index: torch.Tensor,
    count: None,
    *,
    frames: int,
    keep: int,
    pooled: bool,
    anchor: int,
    **_of_merging: object,
) -> None:
    """Launch csrc/compress on the current stream: two kernels for all layers, or one where all is kept.

    k, v [layers, frames * frame_tokens, heads, head_dim], index [layers, kept]. `keep` tokens per pruned frame. Takes
    what `compress_unsupported` lets through.
    """
    layers, tokens, heads, head_dim = k.shape
    frame_tokens = tokens // frames
    words = 0
    if keep < frame_tokens and frames > 1:  # the mean key, a number a candidate, a counter a group, and one more
        words = layers * (heads * head_dim + tokens - frame_tokens + (1 if pooled else frames - 1)) + 1
    workspace = torch.empty(words, dtype=torch.int32, device=k.device)
    importlib.import_module(_EXTENSION).compress_chunk(
        k=k.data_ptr(), v=v.data_ptr(), out_k=out_k.data_ptr(), out_v=out_v.data_ptr(), index=index.data_ptr(),
        workspace=workspace.data_ptr(), workspace_bytes=4 * words,
        stride_k_layer=k.stride(0), stride_v_layer=v.stride(0),
        stride_out_k_layer=out_k.stride(0), stride_out_v_layer=out_v.stride(0),
        stride_k_row=k.stride(1), stride_v_row=v.stride(1),
        stride_out_k_row=out_k.stride(1), stride_out_v_row=out_v.stride(1),
        layers=layers, frames=frames, frame_tokens=frame_tokens, heads=heads, head_dim=head_dim,
        keep=keep, anchor=anchor, pooled=pooled,
        dtype=_DTYPES[k.dtype], stream=torch.cuda.current_stream(k.device).cuda_stream,
    )  # fmt: skip


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
    tile_rows: int | None = None,
    processors: int | None = None,
) -> None:
    """Launch csrc/attention on the current stream. Takes what `attention_unsupported` lets through.

    `tile_rows` is 128 or 176, `attention_tile_rows` by default and always where segments have weights; `processors` is
    how many thread blocks share the work, by default one a processor of the GPU.
    """
    deal, device_processors = _shared_with_triton()
    (q_len, heads, head_dim), (rows, kv_heads, _) = q.shape, k_pool.shape
    num_blocks = -(-q_len // _BLOCK_Q)
    turned_pairs = turns.shape[1] if has_shift else 0
    if tile_rows is None:
        tile_rows = attention_tile_rows(head_dim, turned_pairs, has_weight)
    if processors is None:
        processors = device_processors(q.device)
    num_whole, num_cut, parts = deal(num_blocks * heads, processors, len(tiles))
    num_parts = num_cut * parts
    pieces = num_parts + (num_whole if mass is not None else 0)
    scratch = dict(dtype=torch.float32, device=q.device)
    piece_out = torch.empty((num_parts, _BLOCK_Q, head_dim), **scratch)
    piece_sums = torch.empty((pieces, _BLOCK_Q, 2), **scratch)
    segment_sums = block_mass = None
    max_segments = 0
    if mass is not None:
        max_segments = mass.shape[1]
        # Zeros, since a piece writes what it has met alone.
        segment_sums = torch.zeros((pieces, 2, max_segments, _BLOCK_Q, 2), **scratch)
        block_mass = torch.empty((heads, max_segments, num_blocks), **scratch)
    scale_log2 = scale * 1.4426950408889634
    strides = {}
    for name, x in {"q_token": q, "k_row": k_pool, "v_row": v_pool, "out_token": out}.items():
        strides[f"stride_{name}"], strides[f"stride_{name.partition('_')[0]}_head"] = _outer_strides(x)
    importlib.import_module(_EXTENSION).segment_attention(
        q=q.data_ptr(), k=k_pool.data_ptr(), v=v_pool.data_ptr(), out=out.data_ptr(), lse=_address(lse),
        block_mass=_address(block_mass), tiles=tiles.data_ptr(), ranges=ranges.data_ptr(),
        tail_rows=tail_rows.data_ptr(), num_segments=num_segments.data_ptr(), turns=turns.data_ptr(),
        piece_out=piece_out.data_ptr(), piece_sums=piece_sums.data_ptr(), segment_sums=_address(segment_sums),
        rows=rows, **strides, q_len=q_len, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        turned_pairs=turned_pairs, max_segments=max_segments, num_whole=num_whole, num_cut=num_cut, parts=parts,
        processors=processors, tile_rows=tile_rows,
        scale_log2=scale_log2, scale_power=2.0 ** math.ceil(math.log2(scale_log2)),
        weights=weights.data_ptr() if has_weight else 0,
        dtype=_DTYPES[q.dtype], stream=torch.cuda.current_stream(q.device).cuda_stream,
    )  # fmt: skip
    if mass is not None:
        torch.sum(block_mass, dim=2, out=mass)


def _shared_with_triton() -> tuple[Callable[..., tuple[int, int, int]], Callable[[torch.device], int]]:
    """How the work is dealt out, which both kernels do alike. It lies with the one whose file stands alone."""
    from ..kernels.segment_attention import deal, device_processors

    return deal, device_processors


def _outer_strides(x: torch.Tensor) -> tuple[int, int]:
    """Of the first two dimensions of three. Torch gives any to a dimension of size 1; here those of a dense tensor."""
    _, heads, head_dim = x.shape
    return x.stride(0) if len(x) > 1 else heads * head_dim, x.stride(1) if heads > 1 else head_dim
