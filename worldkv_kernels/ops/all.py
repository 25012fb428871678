"""The implementations of all ops, for what concerns every one of them."""

from __future__ import annotations

import torch

from .compress_chunk import BACKENDS as COMPRESS_CHUNK
from .norm_rope_append import BACKENDS as NORM_ROPE_APPEND
from .segment_attention import BACKENDS as SEGMENT_ATTENTION

OPS = (SEGMENT_ATTENTION, NORM_ROPE_APPEND, COMPRESS_CHUNK)
EVERY_BACKEND = [name for name in SEGMENT_ATTENTION.backends if all(name in op.backends for op in OPS)]


def check_every_backend(argument: str, backend: str | None, device: torch.device) -> None:
    """Raise ValueError naming the argument where an op has no such backend, or not on `device`; None is any."""
    for op in OPS if backend is not None else ():
        if backend not in EVERY_BACKEND:
            raise ValueError(f"{argument} must be one of {', '.join(EVERY_BACKEND)}, got {backend!r}")
        reason = op.backends[backend].unavailable(device)
        if reason:
            raise ValueError(f"{argument} must be one that runs on {device}, got {backend!r}: {reason}")
