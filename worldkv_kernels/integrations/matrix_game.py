"""The memory in Matrix-Game-2.0's own code: two lines.

    from worldkv_kernels.integrations import matrix_game
    matrix_game.enable(pipeline.generator.model)

and the pipeline's own `inference`, the streaming one too, runs as it is, with the memory in place of its KV cache.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ..actions import LAYOUTS, ActionIntegrator, Actions, video_frames
from ..memory.config import MemoryConfig
from ..memory.retrieval import ActionRetrieval, make_policy
from ..tracing import untraced
from . import checked, patched
from .chunks import Chunks
from .patched import PatchedModel

_OP = "matrix_game"
_MODEL = "Matrix-Game-2.0's CausalWanModel (a pipeline's .generator.model)"
_CHUNK_FRAMES = 3  # of all published configurations


def memory_config(model: nn.Module, *, grid: tuple[int, int] = (22, 40), **options: Any) -> MemoryConfig:
    """The MemoryConfig of a model of the published class; `options` are the rest of its fields.

    grid is (height, width) in tokens of one latent frame: the published 352 x 640 pixels over 16; `enable` without a
    config takes that of the rollout's latents. Without options there is no sink, the recent frames are the past ones of
    the model's own window (3 of its 6; of gta_drive's 4 the last frame of the chunk before), and retrieval is by
    action, in the layout of the model's keys and by the scales guessed for it. That window is what the model was
    trained with: to it all that is retrieved is far, unless rebase_time, the default, brings it nearer.

    Raises TypeError when the model is not of that class, ValueError when its keys are of no layout and no retrieval is
    given, and what MemoryConfig raises.
    """
    model = checked.unwrapped(model)
    attentions = checked.attentions_of(_OP, model, _MODEL)
    fields = {**checked.sizes_of(attentions), "chunk_frames": _CHUNK_FRAMES, "sink_frames": 0, **options}
    if "recent_frames" not in options and model.local_attn_size > 0:
        fields["recent_frames"] = max(0, model.local_attn_size - fields["chunk_frames"])
    if "retrieval" not in options:
        fields["retrieval"] = ActionRetrieval(ActionIntegrator(layout=_layout_of(model)))
    return MemoryConfig(**fields, grid=grid)


def enable(
    model: nn.Module,
    config: MemoryConfig | None = None,
    *,
    actions: object = None,
    poses: object = None,
    intrinsics: object = None,
    grid: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    graph: bool | None = False,
    **fields: Any,
) -> MatrixGameMemory:
    """Put a memory in the place of a model's KV cache. The mode is the config's: "worldkv", "full", "sliding", ...

    The model's forward and that of each `blocks[i].self_attn` are replaced on this instance alone, until `disable`.
    Self-attention then takes the model's q, k, v, o and qk-norm, and rope, cache and attention from the memory. A new
    chunk is recognised by the forward's `current_start`; a forward at 0 with a past starts the rollout anew, with
    the memory reset. See integrations.chunks for what else may come, and what is an error or a warning.

    The memory is made in the first forward, on the device of its latents and of their size, and anew when a later
    rollout starts on another device, in another dtype or at another size. It then takes what `bank_chunks` says, or
    half of the memory that is free. What does not fit is a ValueError of that forward.

    The window that the model was made with is fixed in its attentions (`max_attention_size`) and in the length of the
    pipeline's `kv_cache`; both are ignored: the config's window holds. A forward replaces the k and v of `kv_cache` by
    tensors of length 0. The caches of mouse, keyboard and image stay the model's own, the actions' windows with them.

    Where retrieval is by action and `actions` is None, a chunk's rows are read from the forward that begins it, out of
    `mouse_cond` and `keyboard_cond`, which the pipelines pass up to the chunk's end: so what a player does during a
    rollout counts. That copies them to the host, which synchronises once a chunk.

    Args:
        model: a CausalWanModel, in eval mode. It may be wrapped by torch.compile, or in one process by FSDP.
        config: of the model's sizes; None for memory_config(model, grid=..., **fields) with the grid of the rollout's
            latents, retrieving by pose where poses are given and no retrieval.
        actions: an Actions of all video frames, mouse [n, 2] and keyboard [n, keys], or a callable that gives the rows
            of a chunk number; None to read them from the forwards.
        poses: camera-to-world [n, 4, 4] of the latent frames, OpenCV coordinates, or a callable that gives the
            [chunk_frames, 4, 4] of a chunk number; where retrieval is by pose or field of view.
        intrinsics: fx, fy, cx, cy in pixels, [4], [n, 4] or a callable; None where retrieval needs none.
        grid: (height, width) in tokens, where another size is to be an error; None to take any. As the fields, it is
            the config's where one is given.
        dtype: of the keys and values; None for autocast's where the first forward runs under it, else that of the q
            projection's weight.
        backend: of the ops, see segment_attention.
        graph: whether passes of the model become CUDA graphs, as integrations.lingbot.enable says. The published passes
            cannot be: ActionModule.forward reads the place in its caches on the host
            (`kv_cache_mouse["global_end_index"].item()`), writes into those caches, and turns by `start_frame`, a
            number of the host that differs in each chunk; and the pipelines pass actions that grow with each chunk. A
            model whose blocks have no action module can, given no actions.
        fields: of the config that is made, such as mode, bank_chunks, keep_ratio; see memory_config.

    Returns a handle: `.memory` and `.stats()` (RuntimeError before the first forward), `.restart(...)`, `.finish()`,
    `.replayed_passes`, `.session(...)` for another rollout with a memory of its own, `.save(file)` and `.load(file)`
    for another day, `.disable()`; a context manager that disables at its end. Raises before anything is changed:
    TypeError when the model is not of the published class, the config no MemoryConfig or fields are given beside one;
    ValueError when the config does not agree with the model, a grid is in pixels, or what retrieval needs is missing or
    wrong; RuntimeError when the model is enabled already or something else has replaced its attention.
    """
    wrapper, model = checked.called(model), checked.unwrapped(model)
    attentions = checked.attentions_of(_OP, model, _MODEL)
    keep_grid = config is not None or grid is not None
    if config is None and poses is not None:
        fields = {"retrieval": "pose", **fields}
    config = checked.config_for(
        f"{_OP}.enable", wrapper, attentions, config, memory_config, grid=grid, fields=fields, dtype=dtype,
        backend=backend, graph=graph,
    )  # fmt: skip
    _check_layout(model, config)
    pressed = _Pressed(config)
    if actions is None and pressed.needed:
        actions = pressed.of
    chunks = Chunks(_OP, config, poses, intrinsics, actions=actions)
    # The published forward takes anything, and hands it on to this one.
    signature = inspect.signature(getattr(model, "_forward_inference", model.forward))
    return MatrixGameMemory(
        _OP, wrapper, attentions, chunks, keep_grid=keep_grid, dtype=dtype, backend=backend, graph=graph,
        signature=signature, pressed=pressed,
    )  # fmt: skip


def disable(model: nn.Module) -> None:
    """Give the model its own attention back. Raises RuntimeError when it is not enabled.

    In the middle of a rollout its own code then has no past to go on from, and makes NaN: start a new one, which is as
    it would have been, also of a pipeline that keeps its caches.
    """
    patched.disable(f"{_OP}.disable", model)


class MatrixGameMemory(PatchedModel):
    """A model with a memory: what `enable` returns."""

    def __init__(self, *arguments: Any, pressed: _Pressed, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._pressed = pressed

    def restart(self, *, actions: object = None, poses: object = None, intrinsics: object = None) -> None:
        """Forget the rollout; the next one goes along these, which are as enable's. RuntimeError once disabled."""
        self._session.restart(poses, intrinsics, actions=actions)

    def actions_or_pressed(self, actions: object) -> object:
        return self._pressed.of if actions is None and self._pressed.needed else actions

    @untraced
    def _check_forward(self, given: dict[str, Any]) -> None:
        if not given.get("kv_cache"):
            raise RuntimeError(f"{_OP}: forward must have the pipeline's kv_cache, got none, as in training")
        super()._check_forward(given)
        self._pressed.conditions = given.get("mouse_cond"), given.get("keyboard_cond")


class _Pressed:
    """The actions of a chunk, out of the forward that begins it."""

    def __init__(self, config: MemoryConfig) -> None:
        policy = make_policy(config.retrieval)
        self._frames = config.chunk_frames
        self._videos = "videos" if config.branches > 1 else 1
        self.needed = isinstance(policy, ActionRetrieval) and config.has_bank
        self.conditions: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)  # [videos, rows so far, c]
        if self.needed:
            self._has_mouse = policy.integrator.layout.mouse

    def of(self, chunk: int) -> Actions:
        """The rows of a chunk. Raises ValueError when the forward had none, or others than up to the chunk's end, or
        its videos differ in them."""
        first, rows = chunk * self._frames, video_frames((chunk + 1) * self._frames)
        mouse, keyboard = self.conditions
        needed = {"mouse_cond": mouse, "keyboard_cond": keyboard} if self._has_mouse else {"keyboard_cond": keyboard}
        for name, given in needed.items():
            if given is None or given.dim() != 3 or given.shape[1] != rows or not len(given):
                wanted = f"[{self._videos}, {rows}, c], the actions up to chunk {chunk}"
                got = None if given is None else list(given.shape)
                raise ValueError(
                    f"{_OP}: forward's {name} must be {wanted}, got {got}; "
                    f"give enable the actions or poses where the forward has none"
                )
            if len(given) > 1 and not (given == given[:1]).all():
                raise ValueError(
                    f"{_OP}: forward's {name} must be the same for each video of a batch, which has one memory and "
                    f"goes one way, got others up to chunk {chunk}; give enable the actions or poses to go by"
                )
        return Actions(mouse[0] if self._has_mouse else None, keyboard[0]).of_frames(first, self._frames)


def _action_module(model: nn.Module) -> nn.Module | None:
    modules = (getattr(block, "action_model", None) for block in model.blocks)
    return next((module for module in modules if module is not None), None)


def _layout_of(model: nn.Module) -> str:
    """The layout whose actions the model takes."""
    found = _taken(model)
    for name, layout in LAYOUTS.items():
        if found == (layout.mouse, len(layout.keyboard)):
            return name
    known = ", ".join(f"{name}: {len(layout.keyboard)}" for name, layout in LAYOUTS.items())
    got = "no action module" if found is None else f"{found[1]} keys {'and a' if found[0] else 'without a'} mouse"
    raise ValueError(
        f"{_OP}.memory_config: model must take as many keys as a layout of actions has ({known}), got {got}; "
        f"give a retrieval"
    )


def _taken(model: nn.Module) -> tuple[bool, int] | None:
    """Whether the model takes a mouse, and how many keys."""
    module = _action_module(model)
    if module is None or not module.enable_keyboard:
        return None
    return bool(module.enable_mouse), module.keyboard_embed[0].in_features


def _check_layout(model: nn.Module, config: MemoryConfig) -> None:
    policy, found = make_policy(config.retrieval), _taken(model)
    if not isinstance(policy, ActionRetrieval) or found is None:
        return
    layout = policy.integrator.layout
    if found != (layout.mouse, len(layout.keyboard)):
        raise ValueError(
            f"{_OP}.enable: config's retrieval must be by actions that the model takes, {found[1]} keys "
            f"{'and a' if found[0] else 'without a'} mouse, got layout {policy.integrator.layout_name!r}"
        )
