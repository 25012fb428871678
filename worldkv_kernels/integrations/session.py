"""Sessions: rollouts of their own on one enabled model, in turn."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..memory.world_memory import WorldMemory
from .chunks import Chunks
from .passes import Passes

if TYPE_CHECKING:
    from .patched import PatchedModel


class Session:
    """A rollout with a memory of its own on an enabled model: what a handle's `session` returns.

    Inside `with session:` the model's forwards are passes of this rollout, after it of the one before again; rollouts
    may take turns after any pass. The memory is made in the session's first forward, and its graphs are its own. What
    else a rollout is, such as the pipeline's caches, is the caller's to keep apart.

    A session that nothing holds any more frees its memory and its graphs at once.
    """

    def __init__(self, op: str, handle: PatchedModel, chunks: Chunks) -> None:
        self.chunks = chunks
        self.passes: Passes | None = None  # where there are graphs
        self._op, self._handle = op, weakref.ref(handle)
        self._before: list[Session] = []

    @property
    def memory(self) -> WorldMemory:
        """The memory. Raises RuntimeError before the session's first forward, which makes it."""
        return self.chunks.made()

    @property
    def replayed_passes(self) -> int:
        """Passes that were replays of a CUDA graph, over the present memory; see enable's `graph`."""
        return self.passes.replayed if self.passes is not None else 0

    def stats(self) -> dict[str, int]:
        """WorldMemory.stats; a chunk whose clean pass (timestep 0) is done counts, which synchronises. Raises
        RuntimeError before the first forward."""
        return self.chunks.stats()

    def finish(self) -> None:
        """Make the current chunk history, where no clean pass and no next chunk will tell that it is done."""
        self.chunks.finish()

    def save(self, path: str | Path) -> None:
        """WorldMemory.save, for `load` on another day; a chunk whose clean pass (timestep 0) is done counts.

        What the pipeline itself holds from chunk to chunk is not in it, such as its generator of noise, and of
        Matrix-Game-2.0 the caches of actions. Raises RuntimeError also inside a pass and while a chunk is not done.
        """
        self.chunks.settle()
        self.memory.save(path)

    def load(self, path: str | Path, *, device: torch.device | str | None = None) -> None:
        """Go on from what `save` wrote, in place of the rollout so far: the next pass is over the chunk after its last
        one, along the poses or actions given, which count from the start of the rollout that was saved.

        `device`: the model's, in its forwards; None for where its weights are. Bank and slots are as enable was told.
        Raises RuntimeError inside a pass and once disabled, ValueError as WorldMemory.load does, and where enable has
        other sizes or choices than the saved memory; the rollout so far is then as before.
        """
        self._enabled("load").load_into(self, path, device)

    def restart(self, poses: object = None, intrinsics: object = None, *, actions: object = None) -> None:
        """Forget the rollout; the next one goes along these, which are as enable's. RuntimeError once disabled."""
        actions = self._enabled("restart").actions_or_pressed(actions)
        self.chunks.restart(poses, intrinsics, actions=actions)

    def forget_passes(self) -> None:
        """Give up the graphs, and free what they hold."""
        if self.passes is not None:
            self.passes.forget()
        self.passes = None

    def __enter__(self) -> Session:
        """Raises RuntimeError inside a pass, and once the model is disabled."""
        handle = self._enabled("session")
        self._before.append(handle.put(self))
        return self

    def __exit__(self, *error: object) -> None:
        handle = self._handle()
        if handle is not None and not handle.has_in_place(self):
            raise RuntimeError(f"{self._op}: sessions must be left in the opposite order to that they were entered in")
        before = self._before.pop()
        if handle is not None:
            handle.put(before)

    def __del__(self) -> None:
        self.forget_passes()  # they and their graphs hold each other

    def __repr__(self) -> str:
        return f"Session({self.chunks.memory or 'no memory before the first forward'})"

    def _enabled(self, call: str) -> PatchedModel:
        handle = self._handle()
        if handle is None or not handle.enabled:
            raise RuntimeError(
                f"{self._op}: {call} must be called while the model has its memory, got a call after disable"
            )
        return handle
