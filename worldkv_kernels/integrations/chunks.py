"""Chunks: the passes of a model's own pipeline, turned into the chunks of a WorldMemory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..actions import as_actions, video_frames
from ..memory.config import MemoryConfig
from ..memory.retrieval import ActionRetrieval, goes_by_content, make_policy
from ..memory.world_memory import WorldMemory
from ..poses import as_intrinsics, as_poses, convention_hint
from ..tracing import untraced
from .named import attend_of, names_for


class Chunks:
    """Calls begin_chunk, attend and end_chunk of a memory for a pipeline that knows nothing of it.

    The pipeline makes passes over one chunk after the other, each pass at the chunk's first token. Around a pass goes
    `with chunks.model_pass(current_start, ...)`, inside it every layer's self-attention calls `chunks.attend`. Then

    - a pass at the first token of the chunk that follows ends the chunk before and begins that one;
    - a pass at the same first token is one more over the same chunk, and overwrites its rows;
    - a pass at token 0 when there is a past, if only the clean pass of chunk 0, is a new rollout: the memory is reset;
    - so is a pass over chunk 0 with another stream: what came before was a warm-up, or broken off;
    - where the memory has branches, each has its own passes: the stream that comes first in chunk 0 is branch 0, the
      next one branch 1, and a further one is that other stream. They may come in any order, but are all over a chunk
      before any is over the next; a new rollout begins when a branch comes to chunk 0 again after its own clean pass;
    - or one pass is over all branches: its q, k and v are then [branches, tokens, columns];
    - anything else (a chunk skipped, a jump back, tokens that start no chunk) is an error;
    - an exception inside a pass drops its chunk: the memory is as before that chunk, which may be made again.

    The last pass over a chunk is what the memory keeps of it, as it is in the caches of these pipelines. It must have
    attended every layer. A chunk is ended by the next one's start, or by `finish` and, if its last pass was at
    timestep 0, of each branch, by `stats`: until then a further pass could come.

    A UserWarning says, once each, that a rollout is over and asked for so few of the poses listed that they may be of
    video frames, and that another one goes along the same list where `restart` gave none. Rollouts that an exception
    ended are not meant, nor those of one chunk.

    Args:
        name: of the integration, for its errors.
        memory: of the model's sizes; it belongs to this object from now on, and is reset. Or its MemoryConfig, of any
            grid, where the memory is to be made later: `take` then brings it before the first pass.
        poses: camera-to-world [n, 4, 4] of all latent frames, OpenCV coordinates. None where the mode needs none.
        intrinsics: fx, fy, cx, cy in pixels, [4] or [n, 4]; None where retrieval needs none.
        actions: an Actions of all video frames, in place of poses where the memory retrieves by action.

    Arrays and tensors are copied. Each of the three may also be a callable that gives what begin_chunk takes for a
    chunk number. It is called when that chunk begins, and again if the chunk is dropped and made anew.

    Raises ValueError or TypeError when what the memory needs is missing, or what is given is misshapen, not finite
    or not rigid.
    """

    def __init__(
        self,
        name: str,
        memory: WorldMemory | MemoryConfig,
        poses: object = None,
        intrinsics: object = None,
        *,
        actions: object = None,
    ) -> None:
        of_config = isinstance(memory, MemoryConfig)
        self.config: MemoryConfig = memory if of_config else memory.config
        self.memory: WorldMemory | None = None if of_config else memory
        self.begun = 0  # chunks, of all rollouts
        self.inside = False  # a pass
        self._name = name
        self._names = names_for(self, self.config.num_layers)
        self._controls = _Controls(name, self.config, poses, intrinsics, actions)
        self._forget()

    def take(self, memory: WorldMemory | None) -> None:
        """Go on with this memory in place of the one before, with a new rollout; None gives up the one before."""
        self._check_over()
        self.memory = memory
        if memory is not None:
            self.config = memory.config
        self._forget()

    def go_on(self, memory: WorldMemory) -> None:
        """Take a memory as it is: the next pass is at the first token of the chunk after its last one, or at token 0,
        which is a new rollout."""
        self.check_used()
        self.memory, self.config = memory, replace(self.config, grid=memory.config.grid)
        self._forget(reset=False)

    def restart(self, poses: object = None, intrinsics: object = None, *, actions: object = None) -> None:
        """Forget the rollout; the one that comes goes along these poses or actions.

        Raises as the constructor does, and then changes nothing. Without it, a rollout that starts again at token 0
        goes along the same poses.
        """
        controls = _Controls(self._name, self.config, poses, intrinsics, actions)
        self.check_used()
        self._controls = controls
        self._forget()

    @contextmanager
    def model_pass(self, current_start: int, *, timestep: object = None, stream: object = None) -> Iterator[None]:
        """Around one pass of the model over one chunk.

        Args:
            current_start: the chunk's first token, counted from the start of the rollout.
            timestep: of the pass, a number or a tensor; 0 in the clean pass. Kept, and read in the passes of chunk 0
                alone, so that it costs no synchronisation later. None when it is not known.
            stream: any object that stays the same over a rollout's passes and differs between two streams that
                alternate over the same chunk, such as the pipeline's cache. Two forwards a step, as in
                classifier-free guidance, have two, which takes a memory of two branches: with fewer it is refused when
                the first of them comes back. None when it is not known. Held until chunk 1 begins. After `go_on` they
                are told by the order in which they come to that chunk.

        Raises RuntimeError, with the memory as before, on a chunk out of turn, a stream too many, or a pass inside a
        pass; ValueError when the chunk's poses are missing, too few or wrong, or `current_start` starts no chunk; and
        what begin_chunk and end_chunk raise.
        """
        if self.inside:
            raise RuntimeError(f"{self._name}: one pass must be over before another starts, got a pass inside a pass")
        self._enter(current_start, stream)
        self._attended[self.branch].clear()
        self._of_pass = (self.branch,)
        self.inside = True
        try:
            yield
        except BaseException:
            self.memory.abort_chunk()
            self._chunk = None
            self._broken_off = True
            raise
        finally:
            self.inside = False
        timestep = timestep.detach().clone() if isinstance(timestep, torch.Tensor) else timestep
        for branch in self._of_pass:
            self._timesteps[branch] = timestep

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_weight: torch.Tensor | None = None,
        k_weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """WorldMemory.attend, inside a pass. Raises RuntimeError outside one, else what WorldMemory.attend raises and
        TypeError or ValueError when q is not of the memory's dtype and device.

        For torch.compile it is one op, at which no graph ends, and which holds no memory: it finds this object by a
        number. What it raises then comes when the compiled pass runs.
        """
        return self.of_layer(layer)(q, k, v, q_weight, k_weight)

    def of_layer(self, layer: int) -> Callable[..., torch.Tensor]:
        """`attend` of one layer. One that is made before anything is traced is no reason to compile each layer anew."""
        return attend_of(self, self._names, layer, self.config.num_heads)

    def replayed(self, branches: Sequence[int]) -> None:
        """Say that all layers' self-attention of this pass was a CUDA graph's, as WorldMemory.replayed does, of these
        branches."""
        self._cover(branches)
        for branch in branches:
            self.memory.replayed(branch)
            self._attended[branch].update(range(self.memory.config.num_layers))

    @property
    def of_pass(self) -> Sequence[int]:
        """The branches of this pass, known once it has attended."""
        return self._of_pass

    @property
    def current(self) -> int | None:
        """The chunk that is begun and not ended."""
        return self._chunk

    @property
    def of_rollout(self) -> int:
        """The chunks of this rollout so far, with the current one."""
        return self._done + (self._chunk is not None)

    def finish(self) -> None:
        """End the current chunk, when no pass over a next one will. Does nothing when there is none.

        Raises RuntimeError inside a pass, and when the chunk's last pass left out a layer; it is then not ended.
        """
        if self.inside:
            raise RuntimeError(f"{self._name}: finish must be called between passes, got a call inside one")
        self.check_used()
        self._end_chunk()

    def check_used(self, latent_frames: int | None = None) -> None:
        """Warn, once, if the rollout asked for so few of the listed poses that they may be of video frames.

        For one that is over: restart and finish call it, and so does the start of another one. With `latent_frames`,
        for one that is known beforehand to have so many.
        """
        if latent_frames is None:
            latent_frames = 0 if self._broken_off else self.of_rollout * self.config.chunk_frames
        if latent_frames >= 2 * self.config.chunk_frames:
            self._controls.check_used(latent_frames)

    def stats(self) -> dict[str, int]:
        """WorldMemory.stats. Ends the current chunk first if its clean pass is done, which reads the timestep back."""
        self.settle()
        return self.made().stats()

    def settle(self) -> None:
        """End the current chunk if its clean pass is done, which reads the timestep back."""
        if self._chunk is not None and not self.inside and all(map(_is_zero, self._timesteps)):
            self._end_chunk()

    def made(self) -> WorldMemory:
        """The memory. Raises RuntimeError where it is still to be taken."""
        if self.memory is None:
            raise RuntimeError(f"{self._name}: the memory is made in the first forward, got none yet")
        return self.memory

    # --- parts of the above ---

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_names"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._names = names_for(self, self.config.num_layers)

    @untraced  # what happens once a chunk, or rests on Python state, is not for tracing
    def _attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        memory = self.memory
        if not self.inside:
            raise RuntimeError(f"{self._name}: self-attention must run inside the model's forward, got a call outside")
        if q.dtype != memory.dtype:
            raise TypeError(f"{self._name}: the memory's dtype must be that of q, {q.dtype}, got {memory.dtype}")
        if q.device != memory.device:
            raise ValueError(f"{self._name}: the model must be on the memory's device {memory.device}, got {q.device}")
        at_once = memory.config.branches > 1 and q.dim() == 3
        attended = memory.attend(layer, q, k, v, q_weight, k_weight, branch=None if at_once else self.branch)
        if at_once:
            self._cover(range(memory.config.branches))
        for branch in self._of_pass if at_once else (self.branch,):
            self._attended[branch].add(layer)
        return attended

    def _cover(self, branches: Sequence[int]) -> None:
        """This pass is over these branches; over all of them, its stream is that of each."""
        for branch in set(branches).difference(self._of_pass):
            self._attended[branch].clear()
        self._of_pass = branches
        if len(branches) > 1:
            self._streams = [self._streams[self.branch]] * len(branches)

    @property
    def _done(self) -> int:
        """Chunks of history."""
        return self.memory.stats()["chunks"] if self.memory is not None else 0

    def _check_over(self) -> None:
        """What is to be said of the rollout so far when a new one goes along the same controls."""
        self.check_used()
        if self._done and not self._broken_off:
            self._controls.check_again()

    def _end_chunk(self) -> None:
        if self._chunk is None:
            return
        config = self.memory.config
        for branch, attended in enumerate(self._attended):
            if config.branches > 1 and not attended:
                raise RuntimeError(
                    f"{self._name}: chunk {self._chunk} must have passes over each of the {config.branches} branches, "
                    f"with a cache each or in a batch, before it ends, got none over branch {branch}"
                )
            missing = sorted(set(range(config.num_layers)) - attended)
            if missing:
                whose = f" of branch {branch}" if config.branches > 1 else ""
                raise RuntimeError(
                    f"{self._name}: the last pass over chunk {self._chunk}{whose} must attend every layer, "
                    f"got none for {missing}"
                )
        self.memory.end_chunk()
        self._chunk = None

    def _forget(self, *, reset: bool = True) -> None:
        if self.memory is not None and reset:
            self.memory.reset()
        self._chunk: int | None = None  # begun and not ended
        self.branch = 0  # of the last pass; the first one where that was over all
        self._of_pass: Sequence[int] = (0,)  # the branches that the last pass was over
        self._streams: list[int | None] = []  # the ids of those of the branches that have come
        self._begin_passes()
        self._of_first: list[object] = []  # the streams of chunk 0, held so that another one has another id
        self._broken_off = False  # by an exception inside the last pass

    @untraced
    def _enter(self, current_start: int, stream: object) -> None:
        config = self.config
        chunk, rest = divmod(int(current_start), config.chunk_tokens)
        if rest or chunk < 0:
            raise ValueError(
                f"{self._name}: current_start must be a multiple of the chunk's {config.chunk_tokens} tokens "
                f"({config.chunk_frames} frames of {config.frame_tokens}), got {current_start}"
            )
        done = self._done
        following = done if self._chunk is None else done + 1
        again, identity = chunk == self._chunk, _identity(stream)
        known, full = identity in self._streams, len(self._streams) == config.branches
        if chunk == 0 and (self._is_done(identity) if again else done):
            self._begin_first(stream)
            return
        if not again and chunk != following:
            turn = f"{following * config.chunk_tokens} (the next chunk)"
            if self._chunk is not None:
                turn += f", {self._chunk * config.chunk_tokens} (the current one again)"
            raise RuntimeError(
                f"{self._name}: current_start must be {turn} or 0 (a new rollout), got {int(current_start)}: "
                f"the memory cannot skip chunks or go back"
            )
        if following and full and not known:
            if chunk or any(stream is one for one in self._of_first):
                raise RuntimeError(f"{self._name}: {_too_many(config.branches, chunk)}")
            given_up = self._of_first
            self._begin_first(stream)
            self._of_first += given_up
            return
        if again:
            self._join(stream)
            if not known:
                self._of_first.append(stream)
            return
        controls = self._controls.of(chunk)  # first: if they fail, nothing has changed
        self._end_chunk()
        self._begin(chunk, controls, stream)

    def _begin_first(self, stream: object) -> None:
        controls = self._controls.of(0)
        self._check_over()
        self._forget()
        self._begin(0, controls, stream)

    def _begin(self, chunk: int, controls: dict[str, Any], stream: object) -> None:
        self.memory.begin_chunk(**controls)
        self.begun += 1
        self._chunk, self._broken_off = chunk, False
        self._of_first = [] if chunk else [*self._of_first, stream]
        self._begin_passes()
        if not chunk:
            self._streams = []
        self._join(stream)

    def _begin_passes(self) -> None:
        """Of each branch, over a chunk."""
        self._attended: list[set[int]] = [set() for _ in range(self.config.branches)]  # layers, in the last pass
        self._timesteps: list[object] = [None] * self.config.branches  # of the last pass

    def _join(self, stream: object) -> None:
        """Find the branch of a stream; an unknown one is the next."""
        identity = _identity(stream)
        if identity not in self._streams:
            self._streams.append(identity)
        self.branch = self._streams.index(identity)

    def _is_done(self, identity: int | None) -> bool:
        """Whether a stream that comes to chunk 0 again has no passes left to make over it."""
        if identity in self._streams:
            return _is_zero(self._timesteps[self._streams.index(identity)])
        return all(map(_is_zero, self._timesteps))


class _Controls:
    """What a rollout goes along: the arguments of begin_chunk, listed for all chunks or given by callables."""

    def __init__(self, name: str, config: MemoryConfig, poses: object, intrinsics: object, actions: object) -> None:
        self._name, self._frames = name, config.chunk_frames
        policy = make_policy(config.retrieval)
        by_action, by_content = isinstance(policy, ActionRetrieval), goes_by_content(policy)
        if config.has_bank and not by_content:
            needed = {"actions": actions} if by_action else {"poses": poses}
            if policy.needs_intrinsics:
                needed["intrinsics"] = intrinsics
            for kind, given in needed.items():
                if given is None:
                    raise ValueError(f"{name}: {kind} must be given, or a callable, for this retrieval, got None")
        taken_by = (("poses", poses, not (by_action or by_content)), ("actions", actions, by_action))
        for kind, given, taken in taken_by:
            if given is not None and not taken:
                raise ValueError(
                    f"{name}: {kind} must be None for retrieval {config.retrieval!r}, got {type(given).__name__}"
                )
        if poses is not None and not callable(poses):
            poses = as_poses(name, poses)
        if intrinsics is not None and not callable(intrinsics):
            per_chunk = poses is None or callable(poses)
            intrinsics = as_intrinsics(name, intrinsics, self._frames if per_chunk else len(poses))
        if actions is not None and not callable(actions):
            actions = as_actions(name, actions, policy.integrator.layout_name)
        self._poses, self._intrinsics, self._actions = poses, intrinsics, actions
        self._retrieves = config.has_bank
        self._said: set[str] = set()
        hint = convention_hint(poses) if self._retrieves and poses is not None and not callable(poses) else None
        if hint is not None:
            self._say("hint", hint)

    def of(self, chunk: int) -> dict[str, Any]:
        """The arguments of begin_chunk. Raises ValueError where the list ends before the chunk, or as a callable."""
        first, end = chunk * self._frames, (chunk + 1) * self._frames
        given = {}
        for kind, source in (("poses", self._poses), ("intrinsics", self._intrinsics), ("actions", self._actions)):
            if callable(source):
                given[kind] = source(chunk)
                if given[kind] is None:
                    raise ValueError(f"{self._name}: {kind}({chunk}) must be those of chunk {chunk}, got None")
            elif kind == "actions" and source is not None:
                self._check_length(kind, len(source.keyboard), video_frames(end), "video", chunk)
                given[kind] = source.of_frames(first, self._frames)
            elif kind == "poses" and source is not None:
                self._check_length(kind, len(source), end, "latent", chunk)
                given[kind] = source[first:end]
            elif source is not None:  # intrinsics, of all frames where the poses are
                listed = self._poses is not None and not callable(self._poses)
                given[kind] = source[first:end] if listed else source
        return given

    def check_used(self, frames: int) -> None:
        """Warn where a rollout of so many latent frames leaves as many of the poses as if they were of video frames."""
        listed = self._retrieves and self._poses is not None and not callable(self._poses)
        if listed and len(self._poses) >= video_frames(frames) > frames:
            self._say(
                "used",
                f"poses may be of video frames, {len(self._poses)} for a rollout of {frames} latent ones: of a clip's "
                f"poses, integrations.lingbot.latent_poses makes those of the latent frames",
            )

    def check_again(self) -> None:
        """Warn that one more rollout goes along the same list."""
        listed = {"poses": self._poses, "actions": self._actions}
        names = [name for name, given in listed.items() if given is not None and not callable(given)]
        if names and self._retrieves:
            self._say(
                "again",
                f"a new rollout goes along the {names[0]} of the one before; give restart its own, "
                f"or the same ones once more where that is meant",
            )

    def _say(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warnings.warn(f"{self._name}: {text}", stacklevel=2)

    def _check_length(self, kind: str, got: int, wanted: int, frames: str, chunk: int) -> None:
        if got < wanted:
            raise ValueError(f"{self._name}: {kind} must be of {wanted} {frames} frames up to chunk {chunk}, got {got}")


def _is_zero(timestep: object) -> bool:
    if isinstance(timestep, torch.Tensor):
        return not timestep.any().item()
    return timestep is not None and timestep == 0


def _too_many(branches: int, chunk: int) -> str:
    if branches == 1:
        return (
            f"all passes of a rollout must have one cache, got a second one at chunk {chunk}: one memory serves one "
            f"stream; for the two of classifier-free guidance by two forwards give it branches=2"
        )
    return (
        f"all passes of a rollout must have {branches} caches, one for each of the config's branches, got another one "
        f"at chunk {chunk}"
    )


def _identity(stream: object) -> int | None:
    return None if stream is None else id(stream)
