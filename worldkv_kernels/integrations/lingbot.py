"""The memory in LingBot-World-Fast's own code (version 1 and 2, and WorldKV's copy of it): two lines.

    from worldkv_kernels.integrations import lingbot
    lingbot.enable(pipe.model, lingbot.memory_config(pipe.model, grid=(30, 52)), poses=poses)

and the pipeline's own `generate` runs as it is, with the memory in place of its KV cache.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np
import torch
from torch import nn

from ..checks import as_integer
from ..memory.config import MemoryConfig
from ..memory.world_memory import WorldMemory
from ..poses import as_poses, interpolated
from ..tracing import untraced
from ..trajectory import latent_frames
from . import patched
from .chunks import Chunks
from .patched import PatchedModel

_OP = "lingbot"
_MODEL = "LingBot-World-Fast's WanModelFast (a pipeline's .model)"
_STRIDE = 4  # video frames to a latent frame
_SEQUENCE_PARALLEL = "sp_attn_forward_causal"  # what the published code puts in the attention's place


def memory_config(model: nn.Module, *, grid: tuple[int, int], **options: Any) -> MemoryConfig:
    """The MemoryConfig of a model of the published class; `options` are the rest of its fields.

    grid is (height, width) in tokens of one latent frame: the video's height and width over 16. Raises TypeError when
    the model is not of that class, and what MemoryConfig raises.
    """
    attentions = patched.attentions_of(_OP, patched.unwrapped(model), _MODEL)
    return MemoryConfig(**{**patched.sizes_of(attentions), **options}, grid=grid)


def latent_poses(poses: object, frame_num: int, *, chunk_frames: int = 3) -> np.ndarray:
    """The poses [f, 4, 4] of the latent frames of a clip, as the published pipelines compute them: `enable`'s `poses`.

    Versions 1 and 2 and WorldKV's copy cut the clip's n poses to the last one that ends a latent frame, 4 m + 1 of
    them, not to whole chunks; then they spread the latent frames of whole chunks evenly over them, the last one at
    the last pose. Rotations are interpolated by slerp, translations linearly.

    Args:
        poses: camera-to-world [n, 4, 4], one a video frame: a clip's poses.npy.
        frame_num: video frames to be made, as given to `generate`; those of the clip where it has fewer.
        chunk_frames: latent frames of a chunk, `generate`'s chunk_size.

    Raises ValueError where that is less than a chunk, or a pose is not rigid; TypeError on what is no integer.
    """
    poses = as_poses(f"{_OP}.latent_poses", poses)
    for name, count in (("frame_num", frame_num), ("chunk_frames", chunk_frames)):
        if as_integer(f"{_OP}.latent_poses", name, count) < 1:
            raise ValueError(f"{_OP}.latent_poses: {name} must be at least 1, got {count}")
    frames = latent_frames(min(len(poses), frame_num), _STRIDE, chunk_frames)
    if not len(frames):
        least = _STRIDE * (chunk_frames - 1) + 1
        raise ValueError(
            f"{_OP}.latent_poses: poses and frame_num must be at least {least} video frames, a chunk of {chunk_frames} "
            f"latent ones, got {len(poses)} and {frame_num}"
        )
    return interpolated(poses, frames)


def enable(
    model: nn.Module,
    config: MemoryConfig,
    *,
    poses: object = None,
    intrinsics: object = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> LingBotMemory:
    """Put a memory in the place of a model's KV cache. The mode is the config's: "worldkv", "full", "sliding", ...

    The model's forward and that of each `blocks[i].self_attn` are replaced on this instance alone, until `disable`.
    Self-attention then takes the model's q, k, v, o and qk-norm, and rope, cache and attention from the memory. A new
    chunk is recognised by the forward's `current_start`; a forward at 0 with a past starts the rollout anew, with
    the memory reset. See integrations.chunks for what else may come, and what is an error.

    The pipeline's `kv_cache` is not used. A forward replaces the k and v in it by tensors of length 0, so their memory
    is free from the first forward on. `pipe.local_attn_size = 0` makes the published pipelines allocate them with
    length 0 in the first place (WorldKV's copy: `generate(..., sliding_window=1)`, of one frame). The cache's index
    entries stay as they are. Code that reads chunks out of it (WorldKV's `use_retrieval`) finds nothing there, and a
    `retrieval_kv` is not attended to, with a warning: the memory retrieves. The text's cache is as ever.

    The memory is allocated here: give the config `bank_chunks` where the rest of the pipeline needs the device's room.

    Args:
        model: a WanModelFast, in eval mode, on the device where it will run. One wrapped by torch.compile is unwrapped.
        config: of the model's sizes, see memory_config.
        poses: camera-to-world [n, 4, 4] of the latent frames, OpenCV coordinates, in any unit of length: those that
            the pipeline computes its camera embedding from. Or a callable that gives the [chunk_frames, 4, 4] of a
            chunk number. None where the mode needs none. A clip's poses.npy has one a video frame: give
            latent_poses(poses, frame_num).
        intrinsics: fx, fy, cx, cy in pixels, [4], [n, 4] or a callable; None where retrieval needs none.
        dtype: of the keys and values; None for that of the q projection's weight. Under autocast, autocast's.
        backend: of the ops, see segment_attention.

    Returns a handle: `.memory`, `.stats()`, `.restart(poses)`, `.finish()`, `.disable()`; a context manager that
    disables at its end. Raises before anything is changed: TypeError when the model is not of the published class or
    the config no MemoryConfig, ValueError when it does not agree with the config or the poses are missing or wrong,
    RuntimeError when it is enabled already, something else has replaced its attention, or it runs in sequence parallel
    on more than one device.
    """
    model = patched.unwrapped(model)
    attentions = patched.attentions_of(_OP, model, _MODEL)
    patched.check_free(_OP, model, attentions, allowed=(_SEQUENCE_PARALLEL,))
    _check_alone(attentions)
    patched.check_sizes(_OP, model, attentions, config)
    weight = attentions[0].q.weight
    memory = WorldMemory(config, device=weight.device, dtype=dtype or weight.dtype, backend=backend)
    return LingBotMemory(model, Chunks(_OP, memory, poses, intrinsics))


def disable(model: nn.Module) -> None:
    """Give the model its own attention back. Raises RuntimeError when it is not enabled.

    In the middle of a rollout its own code then has no past to go on from, and fails: start a new one.
    """
    patched.disable(_OP, model)


class LingBotMemory(PatchedModel):
    """A model with a memory: what `enable` returns."""

    def __init__(self, model: nn.Module, chunks: Chunks) -> None:
        super().__init__(_OP, model, inspect.signature(model.forward), chunks)
        self._told_of_retrieval = False

    def restart(self, poses: object = None, intrinsics: object = None) -> None:
        """Forget the rollout; the next one goes along these poses, as enable's. RuntimeError once disabled."""
        self._check_enabled("restart")
        self._chunks.restart(poses, intrinsics)

    @untraced
    def _check_forward(self, given: dict[str, Any]) -> None:
        super()._check_forward(given)
        if given.get("retrieval_kv") is not None and not self._told_of_retrieval:
            self._told_of_retrieval = True
            warnings.warn(
                f"{_OP}: retrieval_kv is not attended to: the memory retrieves in its place. Call generate with "
                f"use_retrieval=False to save its bank.",
                stacklevel=3,
            )


def _check_alone(attentions: list[nn.Module]) -> None:
    replaced = any("forward" in attention.__dict__ for attention in attentions)
    if replaced and torch.distributed.is_available() and torch.distributed.is_initialized():
        size = torch.distributed.get_world_size()
        if size > 1:
            raise RuntimeError(
                f"{_OP}.enable: sequence parallel is supported on 1 device, got {size}: each would need the memory "
                f"of its own heads. Load the model with use_sp=False, one process a session"
            )
