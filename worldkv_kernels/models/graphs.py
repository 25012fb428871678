"""The passes of a rollout as CUDA graphs: each is captured once, and replayed for every chunk after that."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch

from ..memory.world_memory import WorldMemory

Replay = Callable[[], None]


class Passes:
    """What `rollout` calls in place of model.denoise.

    A pass is made of its kernels in the first chunk of a kind (of an equal WorldModel.pass_key), which compiles and
    checks them; in the second it is captured; in the third its first replay is compared with the pass itself, whose
    conditions are then others than those it was captured with. Only where the bits are equal are later passes replays.
    Latents and flow lie at fixed addresses, as does what model and memory prepare for a chunk.

    Args:
        graph: True insists: RuntimeError where a pass cannot be captured, or its replay differs. None: where that is
            so, one warning, and passes go on without graphs. False: no graphs. Without a GPU, None is False.

    Raises ValueError for graph=True where there can be none.
    """

    def __init__(self, model: Any, memory: WorldMemory, graph: bool | None) -> None:
        reason = _why_not(model, memory)
        if graph and reason:
            raise ValueError(f"rollout: graph must be None or False where {reason}, got True")
        self._model, self._memory, self._insists = model, memory, bool(graph)
        self._on = graph is not False and reason is None
        self._key: Hashable = None
        self._warm: set[int] = set()  # steps made of kernels since the key changed
        self._replays: dict[int, Replay] = {}
        self._trusted: set[int] = set()  # steps whose replay has given the bits of the pass
        self._latents = self._flow = None
        self._capture = _capture_on(model.device) if self._on else None

    def denoise(self, latents: torch.Tensor, step: int, of_chunk: Any) -> torch.Tensor:
        """The flow, valid until the next call."""
        if not self._on:
            return self._model.denoise(latents, step, of_chunk, self._memory)
        key = self._model.pass_key(of_chunk)
        if key != self._key:
            self._key, self._warm, self._replays, self._trusted = key, set(), {}, set()
        if step in self._trusted:
            return self._replayed(latents, step)
        flow = self._model.denoise(latents, step, of_chunk, self._memory)
        if step in self._replays:
            if _same_bits(self._replayed(latents, step), flow):
                self._trusted.add(step)
            else:
                self._give_up("the replay of a pass differs from the pass")
                return self._model.denoise(latents, step, of_chunk, self._memory)  # over what the replay has written
        elif step in self._warm and key is not None:
            self._capture_pass(latents, flow, step, of_chunk)
        self._warm.add(step)
        return flow

    def _replayed(self, latents: torch.Tensor, step: int) -> torch.Tensor:
        self._memory.wait()  # a graph cannot wait for copies outside of it
        self._latents.copy_(latents)
        self._replays[step]()
        self._memory.replayed()
        return self._flow

    def _capture_pass(self, latents: torch.Tensor, flow: torch.Tensor, step: int, of_chunk: Any) -> None:
        if self._flow is None:
            self._latents, self._flow = torch.empty_like(latents), torch.empty_like(flow)
        self._latents.copy_(latents)
        self._memory.wait()

        def one_pass() -> None:
            self._flow.copy_(self._model.denoise(self._latents, step, of_chunk, self._memory))

        try:
            self._replays[step] = self._capture(one_pass)
        except RuntimeError as error:
            self._give_up(f"a pass could not be captured: {type(error).__name__}: {str(error).splitlines()[0]}", error)

    def _give_up(self, reason: str, cause: BaseException | None = None) -> None:
        self._on, self._replays = False, {}
        if self._insists:
            raise RuntimeError(f"rollout: graph=True must have passes that can be replayed, but {reason}") from cause
        warnings.warn(f"worldkv rollout: passes are not made of CUDA graphs: {reason}", stacklevel=7)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Of two fp32 tensors, NaN and the sign of zero included."""
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def _why_not(model: Any, memory: WorldMemory) -> str | None:
    """Why passes cannot be graphs; None where they may be."""
    if model.device.type != "cuda":
        return f"the model is on {model.device}"
    if not hasattr(model, "pass_key"):
        return f"{type(model).__name__} has no pass_key"
    if not hasattr(memory, "replayed"):
        return f"the memory is a {type(memory).__name__}"
    return None


def _capture_on(device: torch.device) -> Callable[[Callable[[], None]], Replay]:
    """What makes a CUDA graph on `device` of what a function launches.

    The graphs share their memory, since they run one after the other, and are captured on a stream of their own; other
    threads may use the GPU meanwhile.
    """
    with torch.cuda.device(device):
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def capture(function: Callable[[], None]) -> Replay:
        graph, before, failed = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device), []

        def noted() -> None:
            try:
                function()
            except Exception as error:
                failed.append(error)  # the capture's own end hides it
                raise

        try:
            with (
                torch.cuda.device(device),
                torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                noted()
        except Exception as error:
            raise (failed[0] if failed else error) from None
        finally:
            torch.cuda.set_stream(before)  # which a capture that fails does not
        return graph.replay

    return capture
