"""Other ways of bringing banked chunks from host memory onto the device, for the prefetch bench.

Each takes `host` [chunks, num_layers, 2, ...], of rows [tokens, heads, head_dim] or of packed bytes, in memory that is
not pinned, a function that gives the same in pinned memory, and a device. It makes ready what it needs beforehand and
returns run(i) -> for each chunk its K and its V, each something that gives [...] layer by layer. It raises where it
cannot run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from timing import Run

try:
    from pinned_kernel import read_pinned
except ImportError:  # without Triton
    read_pinned = None

Rows = Sequence[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]]
Pin = Callable[[], torch.Tensor]


def need_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise RuntimeError("pinned host memory is copied from on a GPU only")


def layer_by_layer(device: torch.device, host: torch.Tensor, *, wait: bool) -> Rows:
    """A copy of its own, into new memory, for K and for V of every layer and chunk."""

    def copied(chunk: torch.Tensor, which: int) -> list[torch.Tensor]:
        return [layer[which].to(device, non_blocking=not wait, copy=True) for layer in chunk]

    return [(copied(chunk, 0), copied(chunk, 1)) for chunk in host]


def pageable(host: torch.Tensor, pin: Pin, device: torch.device) -> Run:
    """From pageable memory, each copy waited for, as the published code does."""
    return lambda i: layer_by_layer(device, host, wait=True)


def pinned(host: torch.Tensor, pin: Pin, device: torch.device) -> Run:
    """From pinned memory, nothing waited for."""
    need_gpu(device)
    source = pin()
    return lambda i: layer_by_layer(device, source, wait=False)


def one_copy(host: torch.Tensor, pin: Pin, device: torch.device) -> Run:
    """Everything in one copy from pinned memory, as it lies there: what the link gives when nothing is in its way."""
    need_gpu(device)
    source, target = pin(), torch.empty_like(host, device=device)

    def run(i: int) -> Rows:
        target.copy_(source, non_blocking=True)
        return [(chunk[:, 0], chunk[:, 1]) for chunk in target]

    return run


def kernel(host: torch.Tensor, pin: Pin, device: torch.device) -> Run:
    """One Triton kernel that reads pinned memory over the link."""
    need_gpu(device)
    if read_pinned is None:
        raise RuntimeError("triton is not installed")
    source, target = pin(), torch.empty_like(host, device=device)

    def run(i: int) -> Rows:
        read_pinned(source, target)
        return [(chunk[:, 0], chunk[:, 1]) for chunk in target]

    return run


RIVALS = {
    "pageable per layer": pageable,
    "pinned per layer": pinned,
    "pinned one copy": one_copy,
    "pinned read by Triton": kernel,
}
