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

    A pass is made of its kernels at first, which compiles and checks them. When a chunk comes whose passes launch the
    same (WorldModel.pass_key), the pass is captured, and its first replay compared with the pass itself: only where the
    bits are equal are later passes replays. Latents and flow then lie at fixed addresses, as does what model and memory
    prepare for a chunk.

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
        self._latents = self._flow = None
        self._pool = torch.cuda.graph_pool_handle() if self._on and model.device.type == "cuda" else None

    def denoise(self, latents: torch.Tensor, step: int, of_chunk: Any) -> torch.Tensor:
        """The flow, valid until the next call."""
        if self._on:
            key = self._model.pass_key(of_chunk)
            if key != self._key:
                self._key, self._warm, self._replays = key, set(), {}
            if step in self._replays:
                return self._replayed(latents, step)
            if step in self._warm and key is not None:
                return self._first_replay(latents, step, of_chunk)
            self._warm.add(step)
        return self._model.denoise(latents, step, of_chunk, self._memory)

    def _replayed(self, latents: torch.Tensor, step: int) -> torch.Tensor:
        self._memory.wait()  # a graph cannot wait for copies outside of it
        self._latents.copy_(latents)
        self._replays[step]()
        self._memory.replayed()
        return self._flow

    def _first_replay(self, latents: torch.Tensor, step: int, of_chunk: Any) -> torch.Tensor:
        flow = self._model.denoise(latents, step, of_chunk, self._memory)
        if self._flow is None:
            self._latents, self._flow = latents.clone(), torch.empty_like(flow)
        self._memory.wait()

        def one_pass() -> None:
            self._flow.copy_(self._model.denoise(self._latents, step, of_chunk, self._memory))

        try:
            self._replays[step] = _captured(one_pass, self._pool)
        except RuntimeError as error:
            self._give_up(f"a pass could not be captured: {type(error).__name__}: {str(error).splitlines()[0]}", error)
            return flow
        self._flow.zero_()
        if not torch.equal(self._replayed(latents, step), flow):
            self._give_up("the replay of a pass differs from the pass")
        return flow

    def _give_up(self, reason: str, cause: BaseException | None = None) -> None:
        self._on, self._replays = False, {}
        if self._insists:
            raise RuntimeError(f"rollout: graph=True must have passes that can be replayed, but {reason}") from cause
        warnings.warn(f"worldkv rollout: passes are not made of CUDA graphs: {reason}", stacklevel=6)


def _why_not(model: Any, memory: WorldMemory) -> str | None:
    """Why passes cannot be graphs; None where they may be."""
    if model.device.type != "cuda":
        return f"the model is on {model.device}"
    if not hasattr(model, "pass_key"):
        return f"{type(model).__name__} has no pass_key"
    if not hasattr(memory, "replayed"):
        return f"the memory is a {type(memory).__name__}"
    return None


def _captured(function: Callable[[], None], pool: Any) -> Replay:
    """What `function` launches, as a CUDA graph. Other threads may use the GPU meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        function()
    return graph.replay
