"""The passes of a rollout as CUDA graphs: each is captured once, and replayed for every chunk after that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch

from ..memory.world_memory import WorldMemory
from ..replays import Replays, same_bits
from ..replays import capture_on as _capture_on


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
        self._model, self._memory = model, memory
        self._replays = Replays("rollout", insists=bool(graph), capture_on=lambda: _capture_on(model.device))
        self._replays.on = graph is not False and reason is None
        self._key: Hashable = None
        self._seen: Counter[int] = Counter()  # passes at each step since the key changed: one a chunk
        self._latents = self._flow = None

    def forget(self) -> None:
        """Begin anew, with no graph: what the model has prepared for the rollout lies elsewhere."""
        self._key = None
        self._replays.forget()

    def denoise(self, latents: torch.Tensor, step: int, of_chunk: Any) -> torch.Tensor:
        """The flow, valid until the next call."""

        def kernels() -> torch.Tensor:
            return self._model.denoise(latents, step, of_chunk, self._memory)

        key = self._model.pass_key(of_chunk) if self._replays.on else None
        if key != self._key:
            self._key, self._seen = key, Counter()
            self._replays.forget()
        if key is None:
            return kernels()
        self._seen[step] += 1
        self._new_latents = latents
        return self._replays.made(
            step,
            (self._seen[step],) * 2,
            kernels,
            lambda flow: self._captured(latents, flow, step, of_chunk),
            same_bits,
        )

    def _captured(
        self, latents: torch.Tensor, flow: torch.Tensor, step: int, of_chunk: Any
    ) -> Callable[[], torch.Tensor]:
        if self._flow is None:
            self._latents, self._flow = torch.empty_like(latents), torch.empty_like(flow)
        self._latents.copy_(latents)
        self._memory.wait()

        def one_pass() -> None:
            self._flow.copy_(self._model.denoise(self._latents, step, of_chunk, self._memory))

        replay = self._replays.capture(one_pass)

        def replayed() -> torch.Tensor:
            self._memory.wait()  # a graph cannot wait for copies outside of it
            self._latents.copy_(self._new_latents)
            replay()
            self._memory.replayed()
            return self._flow

        return replayed


def _why_not(model: Any, memory: WorldMemory) -> str | None:
    """Why passes cannot be graphs; None where they may be."""
    if model.device.type != "cuda":
        return f"the model is on {model.device}"
    if not hasattr(model, "pass_key"):
        return f"{type(model).__name__} has no pass_key"
    if not hasattr(memory, "replayed"):
        return f"the memory is a {type(memory).__name__}"
    return None
