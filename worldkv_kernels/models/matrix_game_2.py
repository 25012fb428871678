"""Matrix-Game-2.0, the 1.3B causal denoiser of videos that a player steers by mouse and keys, on a WorldMemory."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..memory.world_memory import WorldMemory
from . import wan
from .action_module import ROWS, ActionCache, ActionFeatures, ActionFrames, ActionModule, action_windows, frame_turns
from .checkpoint import StoredTensor
from .denoiser import Denoiser
from .from_host import on_device
from .matrix_game_config import MatrixGameConfig
from .rollout import Controls

_OP = "MatrixGame2"
_KEYBOARD_EMBEDDING = re.compile(r"blocks\.([0-9]{1,6})\.action_model\.keyboard_embed\.0\.weight")


class MatrixGameConditions(NamedTuple):
    """What a rollout is made from, besides its controls."""

    # Of the first frame, encoded by CLIP: [image_tokens, image_dim]. None for a stand-in: normal numbers, drawn from
    # the model's seed.
    image_tokens: torch.Tensor | None = None
    # Mask and encoded image, [condition_channels, frames, height, width]: the published cond_concat. Frames past its
    # last one are taken to be like that. None for a stand-in: for frame 0 a mask of ones and normal numbers drawn from
    # the seed, for all others a mask of zeros and one other such draw.
    image_latents: torch.Tensor | None = None


class _Level(NamedTuple):
    """What a noise level sets."""

    modulation: torch.Tensor  # [num_layers, 6, dim]
    head: torch.Tensor  # [2, dim]


_KeysValues = list[tuple[torch.Tensor, torch.Tensor]]  # per layer, [1, heads, image_tokens, head_dim]


class _ChunkBuffers(NamedTuple):
    """What holds for a chunk, at addresses that hold for the rollout."""

    patches: torch.Tensor  # of the image conditions, [tokens, condition_channels * 4]
    mouse: torch.Tensor | None  # windows of the chunk's frames, [chunk_frames, rows, mouse_dim]
    keyboard: torch.Tensor  # windows of the frames attended to, oldest first, [local_frames, rows, keyboard_dim]
    turns: torch.Tensor  # of the chunk's frames
    local_turns: torch.Tensor  # of the frames attended to, oldest first
    rows: torch.Tensor  # of the chunk's frames in an ActionCache, int64 [chunk_frames]
    features: list[ActionFeatures]  # per action layer; empty without hoisting


class _OfRollout(NamedTuple):
    """What holds for a whole rollout (with hoisting, all that follows from it), its action caches and buffers."""

    time: torch.Tensor  # of the noise levels, [steps, 1, frequency_dim]
    image_tokens: torch.Tensor  # [image_tokens, image_dim]
    image_latents: torch.Tensor  # [frames, condition_channels, height, width]
    levels: list[_Level] | None
    keys_values: _KeysValues | None
    caches: list[ActionCache | None]  # per action layer
    buffers: _ChunkBuffers


class _OfChunk(NamedTuple):
    """What holds for all passes of a chunk."""

    rollout: _OfRollout
    frames: ActionFrames


class MatrixGame2(Denoiser):
    """The denoiser, a models.rollout.WorldModel, with the names of the published state dict.

    All of it is in `dtype`, the dtype of the memory: as published in bfloat16, the residual stream, modulation, time
    embedding and head included; norms, rotations and softmax are computed in fp32 and rounded once. All frames of a
    chunk are at one noise level, so the published modulation per frame is the same for all of them.

    What does not change within a chunk is computed once: the actions' features of every layer when the chunk is
    prepared, keys and values of the image and the modulation of every noise level when the rollout is. `hoist = False`
    computes all of it in every pass instead, with the same result to the bit. A rollout's buffers, among them its
    action caches, are written in place, and a pass neither synchronises nor copies from the host, so it can be captured
    in a CUDA graph once actions.local_frames frames are made; a rollout has one chunk in the making at a time.

    `from_pretrained` takes a folder such as base_distilled_model; without a config, the keyboard's columns, whether
    there is a mouse, and which blocks act are told by the checkpoint's tensors.
    """

    Config = MatrixGameConfig
    Conditions = MatrixGameConditions
    fp32_parameters = ()
    kept_by_fp8 = ("action_model",)  # which reads parts of its weights, and is small

    def _blocks(self) -> Iterable[wan.TextBlock]:
        return (_block(self.config, layer) for layer in range(self.config.num_layers))

    def _add_modules(self) -> None:
        self.img_emb = _ImageEmbedding(self.config.image_dim, self.config.dim)

    def _gains(self) -> dict[str, float]:
        return dict.fromkeys(("proj_mouse", "proj_keyboard"), (2 * len(self.config.action_layers) or 1) ** -0.5)

    @classmethod
    def _published_config(
        cls, fields: dict[str, Any], layout: Mapping[str, StoredTensor], overrides: dict[str, Any]
    ) -> MatrixGameConfig:
        return MatrixGameConfig.from_published(_with_actions_of(layout, fields), **overrides)

    # --- models.rollout.WorldModel ---

    def prepare_rollout(
        self, conditions: MatrixGameConditions | None, first_pose: np.ndarray, noise_levels: Sequence[float]
    ) -> _OfRollout:
        """Modulation of each noise level, the image's keys and values for each layer, empty caches and buffers.

        Raises TypeError when conditions are not MatrixGameConditions, ValueError when their shapes are not the model's.
        """
        conditions = self._checked(conditions)
        time = 1000 * torch.tensor(noise_levels, dtype=torch.float64, device=self.device)
        time = wan.sinusoids(time, self.config.frequency_dim)[:, None].to(self.dtype)
        image_tokens = self._image_tokens(conditions.image_tokens)
        image_latents = self._image_conditions(conditions.image_latents)
        levels = keys_values = None
        if self.hoist:
            levels = [self._level(of_level) for of_level in time]
            keys_values = self._keys_values(image_tokens)
        caches = [self._cache() for _ in self.config.action_layers]
        return _OfRollout(time, image_tokens, image_latents, levels, keys_values, caches, self._chunk_buffers())

    def prepare_chunk(self, of_rollout: _OfRollout, start_frame: int, controls: Controls) -> _OfChunk:
        """What the chunk's frames see of the actions, and the features that each action layer makes of it.

        Raises ValueError when the controls' actions are missing, too few, or not of the model's columns.
        """
        frames, actions, buffers = self.chunk_frames, self.config.actions, of_rollout.buffers
        end = start_frame + frames
        mouse, keyboard = self._checked_actions(controls, end)
        attended = min(end, actions.local_frames)
        local = (end - attended, attended)
        if mouse is not None:
            self._copy(torch.from_numpy(action_windows(mouse, start_frame, frames, actions.seen_frames)), buffers.mouse)
        windows = action_windows(keyboard, *local, actions.seen_frames)
        self._copy(torch.from_numpy(windows), buffers.keyboard[:attended])
        self._copy(frame_turns(actions, *local), buffers.local_turns[:attended])
        buffers.turns.copy_(buffers.local_turns[attended - frames : attended])
        rows = torch.arange(start_frame, end, dtype=torch.int64, device="cpu")
        self._copy(rows % actions.local_frames, buffers.rows)
        last = len(of_rollout.image_latents) - 1
        image = torch.stack([of_rollout.image_latents[min(frame, last)] for frame in range(start_frame, end)])
        buffers.patches.copy_(wan.patchify(image))
        if self.hoist:
            for held, made in zip(buffers.features, self._features(buffers, attended), strict=True):
                if made.mouse is not None:
                    held.mouse.copy_(made.mouse)
                held.keys[:attended].copy_(made.keys)
                held.values[:attended].copy_(made.values)
        return _OfChunk(of_rollout, ActionFrames(buffers.turns, buffers.rows, attended))

    def denoise(self, latents: torch.Tensor, step: int, of_chunk: _OfChunk, memory: WorldMemory) -> torch.Tensor:
        """Flow of latents [chunk_frames, channels, height, width] at noise_levels[step]; both fp32."""
        of_rollout, frames = of_chunk
        buffers = of_rollout.buffers
        level = of_rollout.levels[step] if self.hoist else self._level(of_rollout.time[step])
        keys_values = of_rollout.keys_values if self.hoist else self._keys_values(of_rollout.image_tokens)
        features = buffers.features if self.hoist else self._features(buffers, frames.attended)
        patches = torch.cat([wan.patchify(latents).to(self.dtype), buffers.patches], dim=1)
        x = wan.embed_patches(self.patch_embedding, patches).to(self.dtype)
        of_actions = iter(zip(features, of_rollout.caches, strict=True))
        for layer, block in enumerate(self.blocks):
            x = block.attend(x, level.modulation[layer], memory, layer)
            x = block.cross_attend(x, *keys_values[layer])
            if block.action_model is not None:
                of_layer, cache = next(of_actions)
                x = block.action_model(x, of_layer.until(frames.attended), frames, cache)
            x = block.feed_forward(x, level.modulation[layer])
        return wan.unpatchify(self.head(x, level.head), self.config.grid).float()

    def carried(self, of_rollout: _OfRollout) -> list[tuple[torch.Tensor, ...] | None]:
        """The action layers' caches."""
        return [cache if cache is None else tuple(cache) for cache in of_rollout.caches]

    def carry_on(self, of_rollout: _OfRollout, carried: list[tuple[torch.Tensor, ...] | None]) -> None:
        for cache, held in zip(of_rollout.caches, carried, strict=True):
            for mine, given in zip(cache or (), held or (), strict=True):
                if given.shape != mine.shape or given.dtype != mine.dtype:
                    wanted = f"{mine.dtype} {list(mine.shape)}"
                    raise ValueError(f"{_OP}: action caches must be {wanted}, got {given.dtype} {list(given.shape)}")
                mine.copy_(given)

    def pass_key(self, of_chunk: _OfChunk) -> Hashable:
        """At the start of a rollout more frames are attended to from chunk to chunk."""
        return of_chunk.frames.attended if self.hoist else None

    # --- parts of the above ---

    def _copy(self, made: torch.Tensor, buffer: torch.Tensor) -> None:
        buffer.copy_(on_device(made, self.device))

    def _level(self, time: torch.Tensor) -> _Level:
        """Of time [1, frequency_dim]."""
        embedded = self.time_embedding(time)
        projected = self.time_projection(embedded).view(6, -1)
        modulation = torch.stack([block.modulated_by(projected) for block in self.blocks])
        return _Level(modulation.to(self.dtype), self.head.modulated_by(embedded[0]).to(self.dtype))

    def _keys_values(self, image_tokens: torch.Tensor) -> _KeysValues:
        context = self.img_emb(image_tokens)
        return [block.cross_attn.keys_values(context) for block in self.blocks]

    def _features(self, buffers: _ChunkBuffers, attended: int) -> list[ActionFeatures]:
        """Of each action layer."""
        keyboard, turns = buffers.keyboard[:attended], buffers.local_turns[:attended]
        modules = (block.action_model for block in self.blocks if block.action_model is not None)
        return [module.features(buffers.mouse, keyboard, turns) for module in modules]

    def _cache(self) -> ActionCache | None:
        config = self.config.actions
        if not config.mouse_dim:
            return None
        shape = (config.local_frames, math.prod(self.config.grid), config.num_heads, config.head_dim)
        return ActionCache(*(torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2)))

    def _chunk_buffers(self) -> _ChunkBuffers:
        def empty(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=self.device)

        frames, actions = self.chunk_frames, self.config.actions
        local, seen_rows, pairs = actions.local_frames, ROWS * actions.seen_frames, actions.rope_dim // 2
        of_heads = (local, actions.num_heads, actions.head_dim)
        hears_mouse = actions.mouse_dim > 0

        def features() -> ActionFeatures:
            mouse = empty(frames, 1, actions.hidden_dim) if hears_mouse else None
            return ActionFeatures(mouse, empty(*of_heads), empty(*of_heads))

        return _ChunkBuffers(
            patches=empty(frames * math.prod(self.config.grid), self.config.condition_channels * math.prod(wan.PATCH)),
            mouse=empty(frames, seen_rows, actions.mouse_dim) if hears_mouse else None,
            keyboard=empty(local, seen_rows, actions.keyboard_dim),
            turns=empty(frames, pairs, dtype=torch.complex64),
            local_turns=empty(local, pairs, dtype=torch.complex64),
            rows=empty(frames, dtype=torch.int64),
            features=[features() for _ in self.config.action_layers] if self.hoist else [],
        )

    def _checked_actions(self, controls: Controls, end_frame: int) -> tuple[np.ndarray | None, np.ndarray]:
        """Mouse and keyboard of the video up to latent frame `end_frame`, exclusive."""
        config = self.config.actions
        if controls.actions is None:
            raise ValueError(f"{_OP}: actions must be given, got None")
        least = ROWS * end_frame - ROWS + 1
        for name, columns in (("mouse", config.mouse_dim), ("keyboard", config.keyboard_dim)):
            rows = getattr(controls.actions, name)
            shape = None if rows is None else list(rows.shape)
            if not columns and rows is not None:
                raise ValueError(f"{_OP}: actions must have no {name} (None), got {shape}")
            if columns and (rows is None or rows.ndim != 2 or rows.shape[1] != columns or rows.shape[0] < least):
                raise ValueError(f"{_OP}: actions must have {name} [at least {least}, {columns}], got {shape}")
        return controls.actions.mouse, controls.actions.keyboard

    def _checked(self, conditions: MatrixGameConditions | None) -> MatrixGameConditions:
        if conditions is None:
            return MatrixGameConditions()
        if not isinstance(conditions, MatrixGameConditions):
            raise TypeError(f"{_OP}: conditions must be MatrixGameConditions or None, got {conditions!r:.60}")
        config, (tokens, latents) = self.config, conditions
        wanted = [config.image_tokens, config.image_dim]
        if tokens is not None and list(tokens.shape) != wanted:
            raise ValueError(f"{_OP}: image_tokens must be {wanted}, got {list(tokens.shape)}")
        if latents is not None:
            channels, (_, *size) = config.condition_channels, self.latent_shape
            right = latents.dim() == 4 and latents.shape[0] == channels and latents.shape[1] >= 1
            if not right or list(latents.shape[2:]) != size:
                wanted = f"[{channels}, at least 1, {size[0]}, {size[1]}]"
                raise ValueError(f"{_OP}: image_latents must be {wanted}, got {list(latents.shape)}")
        return conditions

    def _image_tokens(self, tokens: torch.Tensor | None) -> torch.Tensor:
        """The given ones, or the stand-in: [image_tokens, image_dim]."""
        if tokens is None:
            shape = (self.config.image_tokens, self.config.image_dim)
            tokens = wan.normal(shape, self.seed)
        return tokens.to(self.device, self.dtype)


def _with_actions_of(layout: Mapping[str, StoredTensor], fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config.json with the actions that a checkpoint's tensors are for."""
    named = ((_KEYBOARD_EMBEDDING.fullmatch(name), stored.shape) for name, stored in layout.items())
    embeddings = {int(found[1]): shape for found, shape in named if found and len(shape) == 2}
    given = fields.get("action_config") or {}
    if not embeddings or not isinstance(given, dict):
        return fields  # then loading tells what is missing, or from_published what is wrong
    of_tensors = {
        "blocks": sorted(embeddings),
        "keyboard_dim_in": next(iter(embeddings.values()))[-1],
        "enable_mouse": any(".action_model.mouse_mlp." in name for name in layout),
    }
    return {**fields, "action_config": {**given, **of_tensors}}


def _block(config: MatrixGameConfig, layer: int) -> wan.TextBlock:
    """A Wan block, in which an action module may stand after the cross-attention."""
    block = wan.TextBlock(config.dim, config.ffn_dim, config.num_heads, config.eps)
    acts = layer in config.action_layers
    block.action_model = ActionModule(config.dim, config.actions) if acts else None
    return block


class _ImageEmbedding(nn.Module):
    """From CLIP's tokens to a context for cross-attention."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim), nn.Linear(image_dim, image_dim), nn.GELU(), nn.Linear(image_dim, dim),
            nn.LayerNorm(dim),
        )  # fmt: skip

    def forward(self, image_tokens: torch.Tensor) -> torch.Tensor:
        """[image_tokens, image_dim] -> [image_tokens, dim]."""
        return self.proj(image_tokens)
