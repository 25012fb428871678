"""The rollout: a video made chunk by chunk, each chunk denoised against the memory of those before."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from .. import saved
from ..actions import Actions, IntegratorState, as_state, video_frames
from ..memory import saving
from ..memory.retrieval import RetrievalPolicy
from ..memory.world_memory import ChunkPlan, WorldMemory
from ..poses import as_poses
from ..ranges import phase
from .controls import Controls, along, steered
from .from_host import on_device
from .graphs import Passes


class _Took:
    """The time that passes on a device, from when this is made to `end`."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._on_gpu = device, device.type == "cuda"
        self._start, self._end = self._now(), None

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def end(self) -> None:
        self._end = self._now()

    def wait(self) -> None:
        """Let the host wait for the end."""
        if self._on_gpu:
            with phase("wait"):
                self._end.synchronize()

    def seconds(self) -> float:
        self.wait()
        return self._start.elapsed_time(self._end) / 1e3 if self._on_gpu else self._end - self._start


class _End(NamedTuple):
    """What a rollout stands at the end of a chunk, besides the memory and what the model carries."""

    conditions: Any
    integrated: IntegratorState | None
    poses: np.ndarray | None  # of that chunk


_KIND = "rollout"
_FIELDS = "fields of the model's conditions"  # which no dictionary of a user's has for a key


class WorldModel(Protocol):
    """What a model offers to `rollout`. What `prepare_*` return is the model's own; rollout only hands it on."""

    chunk_frames: int
    latent_shape: tuple[int, int, int]  # channels, height, width of a latent frame
    device: torch.device
    sigmas: tuple[float, ...]  # noise levels of the denoising passes that it was made for

    def prepare_rollout(self, conditions: Any, first_pose: np.ndarray, noise_levels: Sequence[float]) -> Any:
        """Compute what holds for the whole rollout, from the model's own kind of conditions (a prompt, an image; None
        for a stand-in), the first frame's pose [4, 4] and the passes' sigmas, the clean pass's 0 included."""

    def prepare_chunk(self, of_rollout: Any, start_frame: int, controls: Controls) -> Any:
        """Compute what holds for all passes of the chunk whose first latent frame is `start_frame`."""

    def denoise(self, latents: torch.Tensor, step: int, of_chunk: Any, memory: WorldMemory) -> torch.Tensor:
        """The flow of fp32 latents [chunk_frames, channels, height, width] at noise_levels[step], fp32, same shape.

        Calls memory.attend once for every layer. State that the model carries from chunk to chunk is a function of the
        last pass over each chunk, so that a chunk may be dropped and begun again.
        """

    def carried(self, of_rollout: Any) -> Any:
        """What of it the chunks so far have made, plain values, arrays and tensors: to be saved. A model may be without
        `carried` and `carry_on` where that is nothing."""

    def carry_on(self, of_rollout: Any, carried: Any) -> None:
        """Put that into what prepare_rollout has made of the same conditions; ValueError where it does not fit."""

    def pass_key(self, of_chunk: Any) -> Hashable:
        """Equal for chunks of a rollout whose passes launch the same kernels on the same addresses, so that a captured
        pass of one may be replayed for another; None where a pass cannot be captured. A model may be without it."""


@dataclass(frozen=True)
class RolloutChunk:
    """A chunk that has been made; on a GPU, one whose kernels are all queued on the current stream."""

    plan: ChunkPlan
    latents: torch.Tensor  # clean, fp32 [chunk_frames, channels, height, width], on the model's device
    took: _Took = field(repr=False)

    @property
    def seconds(self) -> float:
        """From begin_chunk, or the end of what was queued before it, to the end of end_chunk. On a GPU reading it waits
        for that; pruning, which runs beside, counts in the chunk after."""
        return self.took.seconds()


def rollout(
    model: WorldModel,
    memory: WorldMemory,
    poses: object = None,
    intrinsics: object = None,
    *,
    actions: Actions | None = None,
    conditions: Any = None,
    given: torch.Tensor | None = None,
    seed: int = 0,
    sigmas: Sequence[float] | None = None,
    graph: bool | None = None,
) -> Rollout:
    """Make the chunks of a trajectory one after the other, and yield each as soon as it is in the memory.

    Args:
        poses: camera-to-world [n, 4, 4] of the latent frames, OpenCV coordinates. n // chunk_frames chunks are
            made; the frames left over are not. None for a memory that retrieves by action: the poses that its
            integrator makes of the actions.
        intrinsics: fx, fy, cx, cy in pixels, [n, 4] or [4]; None where neither model nor retrieval needs them.
        actions: of at least the 4 n - 3 video frames; None where neither model nor retrieval needs them.

    Everything else as of Rollout. Raises ValueError also when the poses or intrinsics are misshapen or not rigid,
    there are too few for one chunk, too few actions, more given frames than chunks are made, or neither poses nor
    actions to integrate.
    """
    controls, latent_frames = along("rollout", model, memory, poses, intrinsics, actions)
    most = latent_frames // model.chunk_frames * model.chunk_frames
    if given is not None and len(given) > most:
        raise ValueError(f"rollout: given must be of at most the {most} latent frames of the rollout, got {len(given)}")
    return Rollout(
        model, memory, controls(0), conditions=conditions, given=given, seed=seed, sigmas=sigmas, graph=graph
    )


class Rollout(Iterator[RolloutChunk]):
    """An iterator that makes a chunk for each of `controls`, asked for when the chunk before is made (on a GPU, when it
    is queued).

    A chunk starts as noise; each pass at sigma gives x0 = x - sigma * flow, and fresh noise takes x0 to the
    next sigma, x = (1 - sigma) * x0 + sigma * noise. The last x0 is the chunk, and one more pass at sigma 0
    leaves its keys and values in the memory.

    Args:
        model: of the memory's chunk_frames, on its device.
        memory: at its start (new, or reset). Between chunks it is the caller's to look at.
        controls: all with poses, or all without where the memory retrieves by action: its integrator's are then the
            model's. Such a memory is given a chunk's rows of the actions, any other the poses and intrinsics.
        conditions: of the model's own kind; None for its stand-in. They hold until a chunk's controls bring others.
            The memory keeps the past as it was made; what the model prepares for a rollout is then made anew, beside
            the old for a moment, and so are graphs.
        given: clean latents [n, channels, height, width] that the video begins with, of whole chunks: these are not
            denoised, only passed once at sigma 0, and yielded like the others. What follows goes on from them. Those
            past the last of `controls` are not reached.
        seed: not negative. The noise of a pass depends on seed, chunk and step alone, and comes from the CPU,
            so that rollouts of any mode, device and dtype start from the same numbers.
        sigmas: of the denoising passes, from 1 down, each above 0; None for the model's own.
        graph: None: on a GPU passes become CUDA graphs, captured in the second chunk of those that launch the same, and
            replayed from the third on, if a first replay there gives the same bits; these two chunks take longer. True
            insists on it, False has none. The rows of a host bank are then waited for before a pass, not by layer.

    An exception inside a chunk drops that chunk from the memory (abort_chunk) and passes on; the rollout can then be
    saved, and gone on with where it is loaded, and asked for another chunk raises RuntimeError. On a GPU a chunk is
    yielded when it is queued: the next one is prepared while it is made, unless the caller waits for it, or retrieval
    is by content and passes are graphs; and no other before it is made. Raises ValueError at the call when the memory
    is not at its start, the given latents are no whole chunks of the model's shape, seed or sigmas are out of range, or
    there can be no graphs but graph is True; at a chunk what begin_chunk and the model's prepare_rollout raise, and
    RuntimeError where graph is True and a pass cannot be captured.

    `memory` and `seed` are what was given.
    """

    def __init__(
        self,
        model: WorldModel,
        memory: WorldMemory,
        controls: Iterable[Controls],
        *,
        conditions: Any = None,
        given: torch.Tensor | None = None,
        seed: int = 0,
        sigmas: Sequence[float] | None = None,
        graph: bool | None = None,
    ) -> None:
        frames = model.chunk_frames
        if frames != memory.config.chunk_frames:
            got = memory.config.chunk_frames
            raise ValueError(f"rollout: memory must have the model's chunk_frames={frames}, got {got}")
        if memory.config.branches != 1:
            got = memory.config.branches
            raise ValueError(f"rollout: memory must be of one branch, since a model here makes one video, got {got}")
        if memory.stats()["chunks"]:
            raise ValueError(f"rollout: memory must be new or reset, got one of {memory.stats()['chunks']} chunks")
        if seed < 0:
            raise ValueError(f"rollout: seed must be at least 0, got {seed}")
        sigmas = model.sigmas if sigmas is None else tuple(sigmas)
        if not sigmas or sigmas[0] != 1 or min(sigmas) <= 0 or list(sigmas) != sorted(sigmas, reverse=True):
            raise ValueError(f"rollout: sigmas must start at 1, fall, and stay above 0, got {list(sigmas)}")
        if given is not None and (tuple(given.shape[1:]) != tuple(model.latent_shape) or len(given) % frames):
            wanted = ", ".join(map(str, model.latent_shape))
            raise ValueError(f"rollout: given must be [n, {wanted}], n a multiple of {frames}, got {list(given.shape)}")
        self.model, self.memory, self.seed, self.sigmas = model, memory, seed, sigmas
        self._conditions, self._first_pose, self._of_rollout = conditions, None, None
        self._failed = False
        # Of no frames, split makes one chunk without any.
        chunks = [] if given is None else [chunk.float() for chunk in given.split(frames) if len(chunk)]
        self._given = dict(enumerate(chunks))
        self._integrator = memory.integrator.fresh() if memory.integrator is not None else None
        self._ends = {0: self._end(None)}  # by the chunks made: of those so far, and of one that is being ended
        self._passes = Passes(model, memory, graph)
        self._chunks = self._made(controls)

    def __next__(self) -> RolloutChunk:
        if self._failed:
            raise RuntimeError("rollout: a chunk has failed, and no other can follow it here: save and resume to go on")
        try:
            return next(self._chunks)
        except StopIteration:
            raise
        except BaseException:
            self._failed = True
            raise

    def save(self, path: str | Path) -> None:
        """Write the memory, and all else that the chunks to come are made from, to a file that `load` reads.

        One file as WorldMemory.save writes it, with the conditions, what is left of the given latents, the seed, the
        sigmas, and what the model carries from chunk to chunk. Neither weights nor controls are in it. Raises as
        WorldMemory.save, TypeError also on conditions that are neither the model's own nor plain values and tensors.
        """
        number, state = self.memory.stats()["chunks"], None
        conditions, integrated, poses = self._ends[number]
        if isinstance(conditions, getattr(self.model, "Conditions", ())):
            conditions = {_FIELDS: conditions._asdict()}
        if number:
            state = {"first_pose": self._first_pose, "last_poses": poses, "carried": self._carried()}
        tree = {
            "memory": saving.file_tree("save", self.memory),
            "seed": self.seed,
            "sigmas": tuple(map(float, self.sigmas)),
            "conditions": conditions,
            "given": {chunk: latents for chunk, latents in self._given.items() if chunk >= number},
            "integrator": integrated and tuple(integrated),
            "state": state,
        }
        saved.write("Rollout.save", path, _KIND, tree)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: WorldModel,
        controls: Iterable[Controls] | Callable[[Rollout], Iterable[Controls]],
        *,
        backend: str | None = None,
        retrieval: RetrievalPolicy | None = None,
        graph: bool | None = None,
        **changes: Any,
    ) -> Rollout:
        """The rollout that `save` wrote, which goes on bit for bit as it would have, on a device of the same kind.

        Args:
            model: of the same weights, on the device that the memory is to be on.
            controls: of the chunks after those made, or a function of the loaded rollout that gives them: of its
                memory's stats()["chunks"], say. `resume` cuts them out of a trajectory.
            backend, retrieval, changes: as of WorldMemory.load. graph: as above.

        Raises what WorldMemory.load does, ValueError also where the file is of a model of other sizes.
        """
        with saved.Saved("Rollout.load", path, _KIND) as file:
            tree = file.tree
            with file.explained():
                of_memory = tree["memory"]
                options = {name: tree[name] for name in ("seed", "sigmas")}
                conditions = tree["conditions"]
                if isinstance(conditions, dict) and _FIELDS in conditions:
                    if not hasattr(model, "Conditions"):
                        got = type(model).__name__
                        raise ValueError(f"model must be one that takes the conditions of the saved one, got {got}")
                    conditions = model.Conditions(**conditions[_FIELDS])
            memory = saving.new_of(
                WorldMemory, file, of_memory, device=model.device, backend=backend, retrieval=retrieval, changes=changes
            )
            with file.explained():
                made = cls(model, memory, (), conditions=conditions, graph=graph, **options)
                _check_sizes(model, memory)
                saving.restore(memory, of_memory)
                made._restore(tree)
        made._chunks = made._made(controls(made) if callable(controls) else controls)
        return made

    def _restore(self, tree: dict[str, Any]) -> None:
        first, state = self.memory.stats()["chunks"], tree["state"]
        for chunk, latents in tree["given"].items():
            if chunk < first or tuple(latents.shape) != (self.model.chunk_frames, *self.model.latent_shape):
                raise ValueError(f"given must be of chunks after those made, got {chunk} of {list(latents.shape)}")
        self._given = tree["given"]
        if self._integrator is not None:
            frames = first * self.model.chunk_frames
            stands = not first or tree["integrator"][:1] == (0,)  # where the chunks were made without actions
            rows = 0 if stands else video_frames(frames)
            self._integrator.restore(as_state("Rollout.load", tree["integrator"], rows))
        if (state is None) != (first == 0):
            raise ValueError(f"state must be there if and only if chunks were made, got {first} chunks")
        if state is not None:
            first_pose = as_poses("Rollout.load", state["first_pose"][None])[0]
            self._prepare(self._conditions, first_pose, state["carried"])
        last_poses = None if state is None else as_poses("Rollout.load", state["last_poses"], self.model.chunk_frames)
        self._ends = {first: self._end(last_poses)}

    def _end(self, poses: np.ndarray | None) -> _End:
        """Where the rollout is once a chunk of these poses is made."""
        return _End(self._conditions, self._integrator and self._integrator.state, poses)

    def _prepare(self, conditions: Any, first_pose: np.ndarray, carried: Any = None) -> None:
        """For the chunks to come; what raises leaves all as before."""
        with torch.inference_mode(False), torch.no_grad():
            of_rollout = self.model.prepare_rollout(conditions, first_pose, (*self.sigmas, 0.0))
            if carried is not None:
                self.model.carry_on(of_rollout, carried)
        self._passes.forget()  # graphs read what was prepared before
        self._conditions, self._first_pose, self._of_rollout = conditions, first_pose, of_rollout

    def _carried(self) -> Any:
        """What the model has carried up to now; None where that is nothing."""
        return getattr(self.model, "carried", lambda of_rollout: None)(self._of_rollout)

    def _made(self, controls: Iterable[Controls]) -> Iterator[RolloutChunk]:
        model, memory, before = self.model, self.memory, None
        for number, of_one in enumerate(controls, memory.stats()["chunks"]):
            of_one, of_memory = steered(of_one, number * model.chunk_frames, model.chunk_frames, self._integrator)
            if self._of_rollout is None:
                self._prepare(self._conditions if of_one.conditions is None else of_one.conditions, of_one.poses[0])
            elif of_one.conditions is not None:
                self._prepare(of_one.conditions, self._first_pose, self._carried())
            took = _Took(model.device)
            plan = memory.begin_chunk(**of_memory)
            try:
                given = self._given.get(number)
                latents = _denoised(model, self._passes, plan, self._of_rollout, of_one, given, self.seed, self.sigmas)
                self._ends = {number: self._ends[number], number + 1: self._end(of_one.poses)}
                memory.end_chunk()
                took.end()
            except BaseException:
                memory.abort_chunk()
                raise
            self._given.pop(number, None)
            yield RolloutChunk(plan, latents, took)
            if before is not None:
                before.wait()
            before = took


def resume(
    path: str | Path,
    model: WorldModel,
    poses: object = None,
    intrinsics: object = None,
    *,
    actions: Actions | None = None,
    backend: str | None = None,
    retrieval: RetrievalPolicy | None = None,
    graph: bool | None = None,
    **changes: Any,
) -> Rollout:
    """Go on with a rollout that was saved (Rollout.save), along the trajectory of which the beginning has been made.

    Args:
        poses, intrinsics, actions: as of `rollout`, from frame 0 on, as they were; they may go on for longer.

    Everything else as of Rollout.load. Raises also what `rollout` does of them, and ValueError where the first pose or
    those of the last chunk made are others, or no chunk is left to make.
    """

    def rest(made: Rollout) -> Iterable[Controls]:
        first = made.memory.stats()["chunks"]
        controls, latent_frames = along("resume", model, made.memory, poses, intrinsics, actions)
        if latent_frames // model.chunk_frames <= first:
            most = latent_frames // model.chunk_frames
            raise ValueError(f"resume: trajectory must be of more than the {first} chunks made, got one of {most}")
        if first and poses is not None:
            before, begins = next(controls(first - 1)).poses, next(controls(0)).poses
            if not (np.array_equal(begins[0], made._first_pose) and np.array_equal(before, made._ends[first].poses)):
                raise ValueError(f"resume: poses must lead through the {first} chunks made, got others")
        return controls(first)

    return Rollout.load(path, model, rest, backend=backend, retrieval=retrieval, graph=graph, **changes)


def _check_sizes(model: WorldModel, memory: WorldMemory) -> None:
    """Of a model that says what memory it needs."""
    config = getattr(model, "config", None)
    if hasattr(config, "memory"):
        for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim", "grid", "chunk_frames"):
            wanted, got = getattr(config.memory(), name), getattr(memory.config, name)
            if wanted != got:
                raise ValueError(f"memory must be of the model's {name}={wanted}, got {got}")


def noise(seed: int, chunk: int, step: int, shape: Sequence[int]) -> torch.Tensor:
    """Standard normal fp32 numbers on the CPU, a function of the arguments alone."""
    (state,) = np.random.SeedSequence((seed, chunk, step)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")


@torch.inference_mode(False)  # what is made in it and kept could not be written outside of it
@torch.no_grad()
def _denoised(
    model: WorldModel,
    passes: Passes,
    plan: ChunkPlan,
    of_rollout: Any,
    controls: Controls,
    given: torch.Tensor | None,
    seed: int,
    sigmas: tuple[float, ...],
) -> torch.Tensor:
    """The passes of one chunk, the clean one included; of a given chunk that one alone."""
    with phase("prepare_chunk"):
        of_chunk = model.prepare_chunk(of_rollout, plan.start_frame, controls)
    if given is not None:
        clean = on_device(given, model.device)
    else:
        shape = (model.chunk_frames, *model.latent_shape)
        x = on_device(noise(seed, plan.chunk, 0, shape), model.device)
        for step, sigma in enumerate(sigmas):
            with phase(f"pass_{step}"):
                clean = x - sigma * passes.denoise(x, step, of_chunk)
            if step + 1 < len(sigmas):
                next_sigma = sigmas[step + 1]
                fresh = on_device(noise(seed, plan.chunk, step + 1, shape), model.device)
                x = (1 - next_sigma) * clean + next_sigma * fresh
    with phase("clean_pass"):
        passes.denoise(clean, len(sigmas), of_chunk)
    return clean
