"""The memory in LingBot-World-Fast's own code (version 1 and 2, and WorldKV's copy of it): two lines.

    from worldkv_kernels.integrations import lingbot
    lingbot.enable(pipe.model, poses=lingbot.latent_poses(poses, frame_num), bank_chunks=64)

and the pipeline's own `generate(..., frame_num=frame_num)` runs as it is, with the memory in place of its KV cache;
`poses` are those of the clip's poses.npy.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import nn

from ..checks import as_integer
from ..memory.config import MemoryConfig
from ..poses import as_poses, interpolated
from ..tracing import untraced
from ..trajectory import latent_frames
from . import causal, checked, patched
from .causal import CausalMemory

_OP = "lingbot"
_MODEL = "LingBot-World-Fast's WanModelFast (a pipeline's .model)"
_STRIDE = 4  # video frames to a latent frame
_SEQUENCE_PARALLEL = "sp_attn_forward_causal"  # what the published code puts in the attention's place


def memory_config(model: nn.Module, *, grid: tuple[int, int], **options: Any) -> MemoryConfig:
    """The MemoryConfig of a model of the published class; `options` are the rest of its fields.

    grid is (height, width) in tokens of one latent frame: the video's height and width over 16. `generate` takes the
    size from the image's aspect within its max_area, (29, 52) at 480 * 832 for images of 720 x 1280 and others for
    others: `enable` without a config sees it for itself.

    Without options, sink and recent frames are those that the model was made with: of version 2's launch, a window of
    18 with a sink of 6, a sink of 6 and 9 past frames beside the 3 being made. MemoryConfig's own where the model has
    no window (local_attn_size -1). What is retrieved is turned in time, and the sink with it; the published code
    leaves the sink at its own time, as rebase_sink=False does.

    Raises TypeError when the model is not of that class, and what MemoryConfig raises.
    """
    return causal.config_of(_OP, _attentions_of(model), grid, options)


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
    config: MemoryConfig | None = None,
    *,
    poses: object = None,
    intrinsics: object = None,
    grid: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    graph: bool | None = False,
    **fields: Any,
) -> LingBotMemory:
    """Put a memory in the place of a model's KV cache. The mode is the config's: "worldkv", "full", "sliding", ...

    The model's forward and that of each `blocks[i].self_attn` are replaced on this instance alone, until `disable`.
    Self-attention then takes the model's q, k, v, o and qk-norm, and rope, cache and attention from the memory. A new
    chunk is recognised by the forward's `current_start`; a forward at 0 with a past starts the rollout anew, with
    the memory reset. See integrations.chunks for what else may come, and what is an error or a warning.

    The memory is made in the first forward, on the device of its latents and of their size: the weights may still be on
    the CPU here, as `generate(..., offload_model=True)` leaves them. When a later rollout starts on another device, in
    another dtype or at another size, it is made anew. It then takes what `bank_chunks` says, or half of the memory that
    is free: give bank_chunks where the rest of the pipeline needs the device's room. What does not fit is a ValueError
    of that forward.

    The pipeline's `kv_cache` is not used. A forward replaces the k and v in it by tensors of length 0, so their memory
    is free from the first forward on. `pipe.local_attn_size = 0` makes the published pipelines allocate them with
    length 0 in the first place (WorldKV's copy: `generate(..., sliding_window=1)`, of one frame). The cache's index
    entries stay as they are. Code that reads chunks out of it (WorldKV's `use_retrieval`) finds nothing there. A
    `retrieval_kv` is not attended to, and a `max_attention_size` below the cache's length cuts no window, with a
    warning: the memory retrieves, by its config. The text's cache is as ever.

    Args:
        model: a WanModelFast, in eval mode. It may be wrapped by torch.compile, or in one process by FSDP.
        config: of the model's sizes, see memory_config. None for memory_config(model, grid=..., **fields) with the grid
            of the rollout's latents.
        poses: camera-to-world [n, 4, 4] of the latent frames, OpenCV coordinates, in any unit of length: those that
            the pipeline computes its camera embedding from. Or a callable that gives the [chunk_frames, 4, 4] of a
            chunk number. None where the mode needs none. A clip's poses.npy has one a video frame: give
            latent_poses(poses, frame_num).
        intrinsics: fx, fy, cx, cy in pixels, [4], [n, 4] or a callable; None where retrieval needs none.
        grid: (height, width) in tokens, where another size is to be an error; None to take any. As the fields, it is
            the config's where one is given.
        dtype: of the keys and values; None for autocast's where the first forward runs under it, else that of the q
            projection's weight.
        backend: of the ops, see segment_attention.
        graph: True makes passes of the model CUDA graphs, for which the host launches one thing a pass: the first chunk
            is made of kernels, the second captured, the third compared with its replays bit for bit, later ones are
            replays. RuntimeError, which drops the chunk, where a pass cannot be captured or a replay differs, with the
            reason; ValueError where the model is not on a GPU, or wrapped or sharded. None: so where that can be; where
            not, one warning, and passes go on as without. False: no graphs. They hold the memory of a pass's
            intermediate results, and copies of its arguments. See integrations.passes for what a pass may do, and
            `.replayed_passes`. By its code the published pass can be one, as `generate` of version 1 (a43bec7) and 2
            (2648877) calls WanModelFast; a GPU has run its restatement in the tests alone. It reads nothing on the host
            but what lies there; what it makes there (`sinusoidal_embedding_1d`'s arange, the lengths in
            `flash_attention`) is the same in each pass. An earlier or other pipeline that does not pass
            `cross_attn_first_call` has passes that cannot: WanCrossAttention then reads
            `crossattn_cache["is_init"].item()`.
        fields: of the config that is made, such as mode, bank_chunks, keep_ratio; see memory_config.

    Returns a handle: `.memory` and `.stats()` (RuntimeError before the first forward), `.restart(poses)`, `.finish()`,
    `.replayed_passes`, `.session(poses)` for another rollout with a memory of its own, `.save(file)` and `.load(file)`
    for another day, `.disable()`; a context manager that disables at its end. Raises before anything is changed:
    TypeError when the model is not of the published class, the config no MemoryConfig or fields are given beside one;
    ValueError when the config does not agree with the model, a grid is in pixels, or the poses are missing or wrong;
    RuntimeError when the model is enabled already, something else has replaced its attention, or it runs in sequence
    parallel on more than one device.
    """
    return causal.put(
        LingBotMemory, f"{_OP}.enable", model, config, memory_config, _attentions_of(model), poses=poses,
        intrinsics=intrinsics, alone=(_SEQUENCE_PARALLEL,), grid=grid, dtype=dtype, backend=backend, graph=graph,
        fields=fields,
    )  # fmt: skip


def disable(model: nn.Module) -> None:
    """Give the model its own attention back. Raises RuntimeError when it is not enabled.

    In the middle of a rollout its own code then has no past to go on from, and makes NaN: start a new one, which is as
    it would have been, also of a pipeline that keeps its caches.
    """
    patched.disable(f"{_OP}.disable", model)


class LingBotMemory(CausalMemory):
    """A model with a memory: what `enable` returns."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._told: set[str] = set()

    @untraced
    def _check_forward(self, given: dict[str, Any]) -> None:
        super()._check_forward(given)
        if given.get("retrieval_kv") is not None:
            self._tell(
                "retrieval_kv is not attended to: the memory retrieves in its place. Call generate with "
                "use_retrieval=False to save its bank."
            )
        caches = given.get("kv_cache")
        cached = caches[0]["k"].shape[1] if caches else 0  # tokens; 0 once it is released
        if cached and given.get("max_attention_size", cached) < cached:
            self._tell(
                f"max_attention_size is not used, got {given['max_attention_size']} tokens: the memory's window is "
                f"the config's, sink_frames, retrieved_chunks and recent_frames."
            )
        if cached and self._attentions[0].local_attn_size == -1:  # a cache of the whole clip
            self._chunks.check_used(cached // self._chunks.config.frame_tokens)

    def _tell(self, text: str) -> None:
        """Warn, once."""
        if text not in self._told:
            self._told.add(text)
            warnings.warn(f"{_OP}: {text}", stacklevel=2)


def _attentions_of(model: nn.Module) -> list[nn.Module]:
    return checked.attentions_of(_OP, checked.unwrapped(model), _MODEL)
