"""The memory in a causal video model of the Self-Forcing family, whoever's it is: one call.

    from worldkv_kernels.integrations import attach
    memory = attach(pipeline.generator.model)

and the pipeline's own `inference` runs as it is, with the memory in place of its KV cache, until `detach`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from ..checks import as_integer
from ..memory.config import MemoryConfig
from ..tracing import untraced
from . import checked, patched
from .chunks import Chunks
from .patched import PatchedModel

_OP = "attach"
_PARTS = ("q", "k", "v", "o", "norm_q", "norm_k")
_SIZES = ("num_heads", "head_dim", "eps")
_CALLED_WITH = ("x", "t", "kv_cache", "current_start")
# What self-attention takes in the published code that the memory stands in for; of these it needs x alone.
_TAKEN = (
    "self", "x", "seq_lens", "grid_sizes", "freqs", "block_mask", "kv_cache", "current_start", "current_end",
    "cache_start", "sink_recache_after_switch",
)  # fmt: skip
_GIVES_PAIRS = "_apply_cache_updates"  # of models whose self-attention returns what is to be written, too

Handle = TypeVar("Handle", bound="CausalMemory")


def memory_config(model: nn.Module, *, grid: tuple[int, int], **options: Any) -> MemoryConfig:
    """The MemoryConfig of a model as `attach` takes; `options` are the rest of its fields.

    grid is (height, width) in tokens of one latent frame: the video's height and width over 16; `attach` without a
    config sees it for itself. Without options, a chunk has the frames of the model's blocks (num_frame_per_block, which
    the pipelines set when they are made), and sink and recent frames are those that the model was made with: of a
    window of 12 with a sink of 3, a sink of 3 and 6 past frames beside the 3 being made. MemoryConfig's own where it
    says nothing of them, or has no window (local_attn_size -1).

    Raises TypeError when the model is not such a one or its window no number, and what MemoryConfig raises.
    """
    model = checked.unwrapped(model)
    attentions = attentions_of(_OP, model)
    if hasattr(model, "num_frame_per_block"):
        options = {"chunk_frames": model.num_frame_per_block, **options}
    return config_of(_OP, attentions, grid, options)


def config_of(op: str, attentions: list[nn.Module], grid: tuple[int, int], options: dict[str, Any]) -> MemoryConfig:
    """The config of these sizes, and of the window that they were made with where the options name none."""
    window = as_integer(op, "the model's local_attn_size", getattr(attentions[0], "local_attn_size", -1))
    if window > 0:
        sink = getattr(attentions[0], "sink_size", 0)
        chunk = options.get("chunk_frames", MemoryConfig.chunk_frames)
        options = {"sink_frames": sink, "recent_frames": max(0, window - sink - chunk), **options}
    return MemoryConfig(**{**checked.sizes_of(attentions), **options}, grid=grid)


def attach(
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
) -> CausalMemory:
    """Put a memory in the place of a model's KV cache. The mode is the config's: "worldkv", "full", "sliding", ...

    For models that make video block by block and were derived from Wan as Self-Forcing's was: text-to-video and
    image-to-video, of any size, CausVid's and LongLive's first version too. They are known by their parts, not by their
    classes' names: `blocks[i].self_attn` with q, k, v, o, norm_q and norm_k, called with a `kv_cache` and a
    `current_start`. Of the chunks that have left the window those come back that look like the last frame made,
    retrieval "content", which needs nothing but the model; by camera where `poses` are given. By content the host waits
    once a chunk, for the keys of the first layer in the last pass.

    The model's forward and that of each self_attn are replaced on this instance alone, until `detach`. Self-attention
    then takes the model's q, k, v, o and qk-norm, and rope, cache and attention from the memory. A new chunk is
    recognised by the forward's `current_start`; a forward at 0 with a past starts the rollout anew, with the memory
    reset. So passes over initial latents are the first chunks, and the next clip of the same pipeline begins with an
    empty memory. See integrations.chunks for what else may come, and what is an error or a warning.

    The memory is made in the first forward, on the device of its latents and of their size, and anew when a later
    rollout starts on another device, in another dtype or at another size. It then takes what `bank_chunks` says, or
    half of the memory that is free. What does not fit is a ValueError of that forward.

    The pipeline's `kv_cache` is not used. A forward replaces the k and v in it by tensors of length 0, so their memory
    is free until `detach`, which gives them back at their length to a pipeline that keeps them; their index entries
    stay as they are. The text's cache is as ever. The window is the config's, whatever `max_attention_size` is.

    Another prompt on the way needs the text's keys and values to be made anew, `crossattn_cache[i]["is_init"] = False`,
    and no more: the memory keeps the past as it was made.

    With `branches=2` the memory serves guidance by two forwards, each with a cache of its own, or a batch of two videos
    along one path; see integrations.chunks for the order of passes.

    What is not supported, and is an error that says so:

    - more caches, or more videos in a batch, than the config's branches, which are one where nothing is said;
    - passes over older chunks than the newest, as LongLive's `_recache_after_switch` makes at a change of prompt (let
      the pipeline do what is said above in its place) and Krea's server before each block, with a `block_mask`;
    - a first chunk of one frame (independent_first_frame), or any other chunk of its own size;
    - a rollout that does not begin at token 0, training;
    - self-attention that something else has replaced: sequence parallel, quantised attention. The function that it
      calls for softmax may be any: the memory's is called in its place;
    - self-attention that is called with more than the published code's arguments, which the memory would not heed, such
      as LongLive 2.0's scales and offsets of positions; LingBot-World's has an integration of its own.

    Args:
        model: the denoiser, a pipeline's `.generator.model`, in eval mode. It may be wrapped by torch.compile, by peft,
            or in one process by FSDP.
        config: of the model's sizes, see causal.memory_config. None for memory_config(model, grid=..., **fields) with
            the grid of the rollout's latents, and where no poses are given retrieval "content".
        poses: camera-to-world [n, 4, 4] of the latent frames, OpenCV coordinates, or a callable that gives the
            [chunk_frames, 4, 4] of a chunk number; None where retrieval needs none.
        intrinsics: fx, fy, cx, cy in pixels, [4], [n, 4] or a callable; None where retrieval needs none.
        grid: (height, width) in tokens, where another size is to be an error; None to take any. As the fields, it is
            the config's where one is given.
        dtype: of the keys and values; None for autocast's where the first forward runs under it, else that of the q
            projection's weight.
        backend: of the ops, see segment_attention.
        graph: whether passes of the model become CUDA graphs, as integrations.lingbot.enable says. By their code those
            of Self-Forcing and of LongLive can; no GPU has run them, or the tests of their restatements.
        fields: of the config that is made, such as mode, bank_chunks, keep_ratio; see causal.memory_config.

    Returns a handle: `.memory` and `.stats()` (RuntimeError before the first forward), `.restart(poses)`, `.finish()`,
    `.replayed_passes`, `.session(poses)` for another rollout with a memory of its own, `.save(file)` and `.load(file)`
    for another day, `.disable()`, which is detach; a context manager that detaches at its end. Raises before anything
    is changed: TypeError when the model is not such a one, the config no MemoryConfig or fields are given beside one;
    ValueError when the config does not agree with the model, a grid is in pixels, or the poses are missing or wrong;
    RuntimeError when the model has a memory already or something else has replaced its attention.
    """
    if config is None:
        fields = {"retrieval": "content" if poses is None else "pose", **fields}
    return put(
        CausalMemory, _OP, model, config, memory_config, attentions_of(_OP, checked.unwrapped(model)), poses=poses,
        intrinsics=intrinsics, grid=grid, dtype=dtype, backend=backend, graph=graph, fields=fields,
    )  # fmt: skip


def detach(model: nn.Module) -> None:
    """Give the model its own attention back, and pipelines their caches. Raises RuntimeError when it has no memory.

    In the middle of a rollout its own code then has no past to go on from, and makes NaN: start a new one, which is as
    it would have been, also of a pipeline that keeps its caches.
    """
    patched.disable("detach", model)


def put(
    kind: type[Handle],
    call: str,
    model: nn.Module,
    config: MemoryConfig | None,
    make: Callable[..., MemoryConfig],
    attentions: list[nn.Module],
    *,
    poses: object,
    intrinsics: object,
    alone: tuple[str, ...] = (),
    grid: tuple[int, int] | None,
    dtype: torch.dtype | None,
    backend: str | None,
    graph: bool | None,
    fields: dict[str, Any],
) -> Handle:
    """What `attach` does, under the name of `call`; see checked.config_for."""
    wrapper, op = checked.called(model), call.partition(".")[0]
    keep_grid = config is not None or grid is not None
    config = checked.config_for(
        call, wrapper, attentions, config, make, grid=grid, fields=fields, dtype=dtype, backend=backend, graph=graph,
        alone=alone,
    )  # fmt: skip
    chunks = Chunks(op, config, poses, intrinsics)
    return kind(
        op, wrapper, attentions, chunks, keep_grid=keep_grid, dtype=dtype, backend=backend, graph=graph,
        signature=_signature_of(checked.unwrapped(model)),
    )  # fmt: skip


class CausalMemory(PatchedModel):
    """A model with a memory: what `attach` returns."""

    def restart(self, poses: object = None, intrinsics: object = None) -> None:
        """Forget the rollout; the next one goes along these poses, as attach's. RuntimeError once detached."""
        self._session.restart(poses, intrinsics)

    @property
    def _gives_pairs(self) -> bool:
        return hasattr(self._model, _GIVES_PAIRS)

    @untraced
    def _check_forward(self, given: dict[str, Any]) -> None:
        if not given.get("kv_cache"):
            raise RuntimeError(f"{self._op}: forward must have the pipeline's kv_cache, got none, as in training")
        if getattr(self._model, "block_mask", None) is not None and not self._gives_pairs:  # which heed none
            raise RuntimeError(
                f"{self._op}: the model's block_mask must be None, got one: where its code heeds that beside a "
                f"kv_cache, the pass makes the cache of past chunks anew, and would be taken for one over a new chunk"
            )
        frames, config = given["x"][0].shape[1] // self._patch_size[0], self._chunks.config
        start = int(given.get("current_start") or 0)
        if frames > config.chunk_frames and self._chunks.memory is not None:
            end, made = start + frames * config.frame_tokens, self._chunks.of_rollout * config.chunk_tokens
            if end <= made:
                raise RuntimeError(
                    f"{self._op}: a pass must be over one chunk, {config.chunk_frames} frames, got {frames} frames of "
                    f"the past from token {start}: the memory keeps it as it was made. At a change of prompt have the "
                    f"pipeline make the text's keys and values anew (crossattn_cache[i]['is_init'] = False), and not "
                    f"those of the video"
                )
        super()._check_forward(given)

    def _attention_of(self, attention: nn.Module, attend: Callable[..., torch.Tensor]) -> Callable[..., Any]:
        forward = super()._attention_of(attention, attend)
        if not self._gives_pairs:
            return forward

        def with_nothing_to_write(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
            return forward(*args, **kwargs), None

        return with_nothing_to_write


def attentions_of(op: str, model: nn.Module) -> list[nn.Module]:
    """The self-attention of each block. Raises TypeError when the model is not of the Self-Forcing family."""
    blocks = [checked.unwrapped(block) for block in getattr(model, "blocks", ())]
    attentions = [checked.unwrapped(getattr(block, "self_attn", None)) for block in blocks]
    found = "no blocks" if not attentions else _other_in(model)
    for layer, attention in enumerate(attentions):
        name = f"blocks[{layer}].self_attn"
        found = found or _other_in_attention(attention, name)
        if not found and checked.sizes_of([attention]) != checked.sizes_of(attentions[:1]):
            found = f"{name} of other sizes than the first"
    if found:
        raise TypeError(
            f"{op}: model must be a causal Wan model, called with a kv_cache and a current_start, whose blocks have a "
            f"self_attn with {', '.join(_PARTS)}, got {type(model).__name__} with {found}"
        )
    return attentions


def _signature_of(model: nn.Module) -> inspect.Signature:
    """Of the code behind the model's own forward, where that takes anything and hands it on."""
    of_class = type(model)
    takes = inspect.signature(getattr(of_class, "_forward_inference", of_class.forward))
    return takes.replace(parameters=[*takes.parameters.values()][1:])  # but self


def _other_in(model: nn.Module) -> str | None:
    """What makes it another kind of model, or None."""
    lacks = [name for name in ("patch_size", "freqs") if not hasattr(model, name)]
    if lacks:
        return f"no {lacks[0]}"
    takes = _signature_of(model).parameters
    lacks = [name for name in _CALLED_WITH if name not in takes]
    return f"a forward that takes no {lacks[0]}" if lacks else None


def _other_in_attention(attention: Any, name: str) -> str | None:
    """What makes it another kind of self-attention, or None."""
    lacks = [part for part in _PARTS if not isinstance(getattr(attention, part, None), nn.Module)]
    lacks += [size for size in _SIZES if not hasattr(attention, size)]
    if lacks:
        return f"no {lacks[0]} in {name}, a {type(attention).__name__}"
    of_its_own = [part for part, _ in attention.named_children() if part not in _PARTS]
    of_its_own += [part for part, _ in attention.named_parameters(recurse=False)]
    if of_its_own:
        return f"{name}.{of_its_own[0]}, which the memory would leave out"
    takes = inspect.signature(type(attention).forward).parameters
    lacks = [taken for taken in ("kv_cache", "current_start") if taken not in takes]
    more = [taken for taken in takes if taken not in _TAKEN]
    if lacks or more:
        return f"{name}.forward that takes {f'no {lacks[0]}' if lacks else more[0]}"
    for part in ("norm_q", "norm_k"):
        norm, numbers = getattr(attention, part), attention.num_heads * attention.head_dim
        weight = getattr(norm, "weight", None)
        over_all_heads = weight is not None and weight.numel() == numbers and getattr(norm, "bias", None) is None
        centred, eps = isinstance(norm, nn.LayerNorm), getattr(norm, "eps", attention.eps)
        if isinstance(norm, nn.Identity):
            continue
        if not over_all_heads or centred:
            return f"{name}.{part} that is no RMS norm over all {numbers} numbers of the heads"
        if eps != attention.eps:
            return f"{name}.{part} of eps={eps}, not the attention's {attention.eps}"
    return None
