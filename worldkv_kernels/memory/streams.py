"""Streams and events: what runs beside the compute stream, copies between host and device and the pruning of chunks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

COMPUTE = "compute"  # whichever stream is current at the call
LOAD = "load"  # host to device
SAVE = "save"  # device to host


class CopyEngine:
    """Two streams of copies, LOAD and SAVE, each in order, and events between them and COMPUTE.

    Nothing here waits on the host. An event stands for what was queued on its stream when it was last recorded, and
    for nothing if it never was; to wait for it is to wait for that, whatever is recorded in it later. On a device
    without streams (a CPU) each copy is made at its call, and events do nothing.

    `device_tensors` are those that copies go to and come from; they are not reused by torch's allocator
    before the copies are done.
    """

    def __init__(self, device: torch.device, *device_tensors: torch.Tensor) -> None:
        self._device = device
        self._streams: dict[str, torch.cuda.Stream] = {}
        if device.type == "cuda":
            self._streams = {name: torch.cuda.Stream(device) for name in (LOAD, SAVE)}
            for tensor in device_tensors:
                for stream in self._streams.values():
                    tensor.record_stream(stream)

    def event(self) -> torch.cuda.Event | None:
        """A new event; it costs nothing until it is recorded."""
        return torch.cuda.Event() if self._streams else None

    def record(self, event: torch.cuda.Event | None, stream: str) -> None:
        """Let `event` stand for what is queued on `stream` so far."""
        if event is not None:
            event.record(self._stream(stream))

    def wait(self, event: torch.cuda.Event | None, stream: str) -> None:
        """Let what is queued on `stream` from now on come after `event`."""
        if event is not None:
            event.wait(self._stream(stream))

    def copy(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], stream: str) -> None:
        """Queue the copies (target, source) on LOAD or SAVE."""
        if self._streams:
            with torch.cuda.stream(self._streams[stream]):
                for target, source in pairs:
                    target.copy_(source, non_blocking=True)
        else:
            for target, source in pairs:
                target.copy_(source)

    def capturing(self) -> bool:
        """Whether the current stream is being captured in a CUDA graph."""
        return bool(self._streams) and torch.cuda.is_current_stream_capturing()

    def _stream(self, name: str) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device) if name == COMPUTE else self._streams[name]


class SideStream:
    """A stream beside the current one, for work that nothing needs at once. On a device without streams it is none.

    `device_tensors`, which that work reads and writes, are not reused by torch's allocator before it is done.
    """

    def __init__(self, device: torch.device, *device_tensors: torch.Tensor) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        for tensor in device_tensors if self._stream is not None else ():
            tensor.record_stream(self._stream)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """The side stream is current inside: its work comes after what the current stream has queued so far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Let what the current stream queues from now on come after the side stream's work.

        Raises RuntimeError where it is being captured: a graph cannot wait for work outside of it.
        """
        if self._stream is not None:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "wait: pruning must be waited for (WorldMemory.wait) before a graph is captured, got a call inside "
                    "a capture"
                )
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
