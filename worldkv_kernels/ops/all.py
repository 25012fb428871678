"""The implementations of all ops, for what concerns every one of them."""

from __future__ import annotations

import torch

from .compress_chunk import BACKENDS as COMPRESS_CHUNK
from .norm_rope_append import BACKENDS as NORM_ROPE_APPEND
from .participation import BACKENDS as PARTICIPATION
from .quantize_chunk import BACKENDS as QUANTIZE_CHUNK
from .quantize_chunk import DEQUANTIZE as DEQUANTIZE_CHUNK
from .segment_attention import BACKENDS as SEGMENT_ATTENTION

_OF_PASSES = (SEGMENT_ATTENTION, NORM_ROPE_APPEND, COMPRESS_CHUNK)
OPS = (*_OF_PASSES, PARTICIPATION, QUANTIZE_CHUNK, DEQUANTIZE_CHUNK)
# What a name may ask of a whole memory: packing has no CUDA kernel, and takes its own choice then (`backend_of`).
EVERY_BACKEND = [name for name in SEGMENT_ATTENTION.backends if all(name in op.backends for op in _OF_PASSES)]


def backend_of(op: str, backend: str | None) -> str | None:
    """`backend` where the op has one of that name, else None: what to ask of an op when all are asked for `backend`."""
    return next(backend if backend in found.backends else None for found in OPS if found.op == op)


def check_every_backend(argument: str, backend: str | None, device: torch.device) -> None:
    """Raise ValueError naming the argument where an op has no such backend, or not on `device`; None is any."""
    for op in _OF_PASSES if backend is not None else ():
        if backend not in EVERY_BACKEND:
            raise ValueError(f"{argument} must be one of {', '.join(EVERY_BACKEND)}, got {backend!r}")
        reason = op.backends[backend].unavailable(device)
        if reason:
            raise ValueError(f"{argument} must be one that runs on {device}, got {backend!r}: {reason}")
