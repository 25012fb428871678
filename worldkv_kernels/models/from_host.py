"""Host tensors to a device without waiting for it."""

from __future__ import annotations

import torch


def on_device(x: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A copy of a CPU tensor on `device`, by way of page-locked memory on a GPU: the host does not wait for the device,
    as it does to copy from other memory. torch keeps that memory until the copy is made, and gives it out again."""
    device = torch.device(device)
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
