"""Launchers of the CUDA extension's kernels; the extension is optional, and built where nvcc was found."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

_EXTENSION = f"{__package__.rpartition('.')[0]}._cuda"  # of this copy of the package, whatever its name
_NOTE = Path(__file__).parents[1] / "_cuda_missing.txt"  # what setup.py says of an extension that it did not build
_MAX_APPEND_COLUMNS = 8192  # of a row that a block of csrc/append holds in its registers
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
        return "it needs a GPU"
    reason = missing()
    if reason:
        return reason
    built = architectures()
    major, minor = torch.cuda.get_device_capability(device)
    # Machine code serves its own architecture, and without a letter also later minor revisions of it.
    exact = any(arch.rstrip("a") == f"{major}{minor}" for arch in built)
    older = any(arch.isdigit() and int(arch) // 10 == major and int(arch) % 10 <= minor for arch in built)
    return None if exact or older else f"the extension is built for {', '.join(built)}, not {major}{minor}"


def append_unsupported(kind: tuple) -> str | None:
    """Why csrc/append does not take a kind of norm_rope_append, (dtype, heads, head_dim, ..., aligned); None when it
    does."""
    dtype, heads, head_dim, *_, aligned = kind
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {dtype}"
    if heads * head_dim > _MAX_APPEND_COLUMNS:
        return f"it takes rows of up to {_MAX_APPEND_COLUMNS} numbers, not {heads} heads of {head_dim}"
    return _rows_unsupported(aligned)


def compress_unsupported(kind: tuple) -> str | None:
    """Why csrc/compress does not take a kind of compress_chunk, (dtype, ..., aligned); None when it does."""
    return _rows_unsupported(kind[-1])


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
    start_frame: int | torch.Tensor,
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
        device_first_row=_address(first_row) if on_device else 0,
        device_start_frame=_address(start_frame) if on_device else 0,
        first_row=0 if on_device else first_row, start_frame=0 if on_device else start_frame,
        stride_q_token=q.stride(0), stride_k_token=k.stride(0), stride_v_token=v.stride(0),
        stride_q_out_token=q_out.stride(0), stride_k_pool_row=k_pool.stride(0), stride_v_pool_row=v_pool.stride(0),
        tokens=q.shape[0], heads=k_pool.shape[1], head_dim=k_pool.shape[2],
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
    *,
    frames: int,
    keep: int,
    pooled: bool,
    anchor: int,
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
