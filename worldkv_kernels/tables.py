"""Tables on a device, at fixed addresses, which the host rewrites."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class Tables:
    """Named tensors of zeros on a device, and for each one in host memory that it is rewritten from.

    For a GPU the latter are page-locked, so that a copy need not wait for the device, nor the host for the copy: `host`
    waits for it, where they are about to be written again.
    """

    @torch.inference_mode(False)  # what is made in inference mode could not be rewritten outside of it
    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._device = device
        self.on_device = {name: torch.zeros(shape, dtype=of, device=device) for name, (shape, of) in shapes.items()}
        self.on_host = {
            name: torch.zeros(shape, dtype=of, pin_memory=on_gpu, device="cpu") for name, (shape, of) in shapes.items()
        }
        self._copied = torch.cuda.Event() if on_gpu else None

    def host(self) -> dict[str, np.ndarray]:
        """The host's, to be written, once the last copy out of them is done; in practice it is, long since."""
        if self._copied is not None:
            self._copied.synchronize()
        return {name: table.numpy() for name, table in self.on_host.items()}

    def copy(self, rows: Mapping[str, int]) -> None:
        """Queue on the current stream the copies to the device of so many first rows of each."""
        for name, count in rows.items():
            if count:
                self.on_device[name][:count].copy_(self.on_host[name][:count], non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))
