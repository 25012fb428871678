"""Named ranges for profilers: the ops, and the phases of a rollout. Off unless asked for, and then nearly free.

WORLDKV_RANGES=1, or `enable()`, turns them on. Each is a record_function of torch.profiler and, on a machine with a
GPU, an NVTX range, which Nsight Systems shows. Their names begin with "worldkv.".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch

_OFF = nullcontext()
_on = os.environ.get("WORLDKV_RANGES") == "1"

Function = TypeVar("Function", bound=Callable[..., Any])


def enable(on: bool = True) -> bool:
    """Turn ranges on or off in this process; returns whether they were on."""
    global _on
    before, _on = _on, on
    return before


def phase(name: str) -> AbstractContextManager:
    """A range called "worldkv.<name>" around a `with` block."""
    return _range(f"worldkv.{name}") if _on else _OFF


def ranged(name: str) -> Callable[[Function], Function]:
    """Decorates a function whose calls are ranges called "worldkv.<name>"."""

    def decorate(function: Function) -> Function:
        @wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            if not _on:
                return function(*args, **options)
            with phase(name):
                return function(*args, **options)

        return call

    return decorate


@contextmanager
def _range(name: str) -> Iterator[None]:
    on_gpu = torch.cuda.is_available()
    with torch.profiler.record_function(name):
        if on_gpu:
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if on_gpu:
                torch.cuda.nvtx.range_pop()
