"""Argument checks shared by the ops. Every message names the op, the argument, what was wanted and what came."""

from __future__ import annotations

import os

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (64, 128)


def debug() -> bool:
    """Whether checks that read the device's data may run: WORLDKV_DEBUG=1."""
    return os.environ.get("WORLDKV_DEBUG") == "1"


def describe(value: object) -> str:
    """What came, in few words: shape, dtype, device and stride of a tensor, otherwise the value itself."""
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {value.dtype} on {value.device} with stride {tuple(value.stride())}"
    return repr(value)


def bad_value(op: str, argument: str, wanted: str, got: object) -> ValueError:
    return ValueError(f"{op}: {argument} must be {wanted}, got {describe(got)}")


def bad_type(op: str, argument: str, wanted: str, got: object) -> TypeError:
    return TypeError(f"{op}: {argument} must be {wanted}, got {describe(got)}")


def check_tensor(
    op: str,
    argument: str,
    tensor: object,
    shape: tuple[int | str, ...],
    *,
    like: torch.Tensor | None = None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    inner: int = 1,
) -> None:
    """Check rank and sizes (a word stands for any size), dtype, device, and that the last `inner` dims are dense.

    With `like`, dtype and device must be those of that tensor, unless `dtypes` names others. A tensor that would want a
    gradient is refused: the ops are for inference, and it would silently get none.
    """
    if not isinstance(tensor, torch.Tensor):
        raise bad_type(op, argument, f"a tensor [{', '.join(map(str, shape))}]", tensor)
    fits = tensor.dim() == len(shape)
    fits = fits and all(isinstance(want, str) or have == want for have, want in zip(tensor.shape, shape))  # noqa: B905
    if not fits:
        raise bad_value(op, argument, f"[{', '.join(map(str, shape))}]", tensor)
    if like is not None and dtypes is DTYPES:
        dtypes = (like.dtype,)
    if tensor.dtype not in dtypes:
        raise bad_type(op, argument, " or ".join(str(d) for d in dtypes), tensor)
    if tensor.requires_grad and torch.is_grad_enabled():
        wanted = "without requires_grad, since nothing flows back; use torch.no_grad()"
        raise ValueError(f"{op}: {argument} must be {wanted}, got requires_grad=True")
    if like is not None and tensor.device != like.device:
        raise bad_value(op, argument, f"on {like.device}", tensor)
    dense = 1
    for dim in range(len(shape) - 1, len(shape) - 1 - inner, -1):
        if tensor.shape[dim] != 1 and tensor.stride(dim) != dense:
            raise bad_value(op, argument, f"contiguous in its last {inner} dimension(s)", tensor)
        dense *= tensor.shape[dim]
