"""LingBot-World-Fast, the 14B causal denoiser of WorldKV, and version 2 of it at 14B and 1.3B, on a WorldMemory."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..memory.world_memory import WorldMemory
from ..poses import as_poses
from . import wan
from .checkpoint import StoredTensor
from .denoiser import Denoiser
from .lingbot_camera import fold_pixels, ray_map, relative_steps
from .lingbot_config import CONTROL_CHANNELS, LingBotConfig
from .rollout import Controls

_OP = "LingBotWorldFast"
_PIXELS = 16  # to a token, each way
_KEYS = 4  # W, A, S, D


class LingBotConditions(NamedTuple):
    """What a rollout is made from, besides its controls."""

    # Of an encoded prompt, [1 to text_tokens, text_dim]; filled up with zero rows, which are attended to as well. None
    # for a stand-in: normal numbers, drawn from the model's seed.
    text: torch.Tensor | None = None
    # Mask and encoded image, [condition_channels, frames, height, width], at least a chunk's frames: what the
    # published pipeline calls y. Frames past its last one are taken to be like that. None for a stand-in: for frame 0
    # a mask of ones and normal numbers drawn from the seed, for all others a mask of zeros and one other such draw.
    image: torch.Tensor | None = None
    # What the controls' translations are divided by: `lingbot_camera.longest_step` of the poses where all are known.
    translation_scale: float = 1.0


class _Level(NamedTuple):
    """What a noise level sets."""

    modulation: torch.Tensor  # [num_layers, 6, dim], fp32
    head: torch.Tensor  # [2, dim], fp32


_KeysValues = list[tuple[torch.Tensor, torch.Tensor]]  # per layer, [1, heads, text_tokens, head_dim]


class _OfRollout(NamedTuple):
    """What holds for a whole rollout (with hoisting, all that follows from it), and buffers for a chunk."""

    time: torch.Tensor  # of the noise levels, [steps, 1, frequency_dim]
    text: torch.Tensor  # [text_tokens, text_dim]
    image: torch.Tensor  # [frames, condition_channels, height, width]
    translation_scale: float
    last_poses: dict[int, np.ndarray | None]  # first frame of a chunk -> pose of the frame before it
    levels: list[_Level] | None
    keys_values: _KeysValues | None
    camera: torch.Tensor | None  # [num_layers, 2, tokens, dim]
    patches: torch.Tensor  # of a chunk's image conditions, [tokens, condition_channels * 4]


class _OfChunk(NamedTuple):
    """What holds for all passes of a chunk."""

    rollout: _OfRollout
    rays: torch.Tensor  # [tokens, control channels * 256]


class LingBotWorldFast(Denoiser):
    """The denoiser, a models.rollout.WorldModel, with the names of the published state dict.

    Linear layers are in `dtype`, the dtype of the memory; the residual stream, the norms around it, modulation, time
    embedding and head in fp32. What does not change within a chunk is computed once: the camera's scale and shift of
    every layer when the chunk is prepared (in `dtype`: 3.8 GB at 14B in bf16), keys and values of the text and the
    modulation of every noise level when the rollout is. `hoist = False` computes all of it in every pass instead,
    with the same result to the bit. A rollout's buffers are written in place, and a pass neither synchronises nor
    copies from the host, so it can be captured in a CUDA graph; a rollout has one chunk in the making at a time.

    A published config.json knows nothing of `sigmas` and window: for version 2 give `from_pretrained` the config
    LingBotConfig.v2_14b() or v2_1_3b(). Whether the camera or keys control is told by the checkpoint's shapes.
    """

    Config = LingBotConfig
    Conditions = LingBotConditions

    def _blocks(self) -> Iterable[_Block]:
        config = self.config
        return (_Block(config.dim, config.ffn_dim, config.num_heads, config.eps) for _ in range(config.num_layers))

    def _add_modules(self) -> None:
        config, dim = self.config, self.config.dim
        self.patch_embedding_wancamctrl = nn.Linear(CONTROL_CHANNELS[config.control] * _PIXELS**2, dim)
        self.c2ws_hidden_states_layer1, self.c2ws_hidden_states_layer2 = (nn.Linear(dim, dim) for _ in range(2))
        self.text_embedding = wan.text_embedding(config.text_dim, dim)

    def _gains(self) -> dict[str, float]:
        return dict.fromkeys(("cam_scale_layer", "cam_shift_layer"), self.config.num_layers**-0.5)

    @classmethod
    def _published_config(
        cls, fields: dict[str, Any], layout: Mapping[str, StoredTensor], overrides: dict[str, Any]
    ) -> LingBotConfig:
        control = layout.get("patch_embedding_wancamctrl.weight")
        acts = control is not None and control.shape[-1:] == (CONTROL_CHANNELS["action"] * _PIXELS**2,)
        return LingBotConfig.from_published(fields, **{"control": "action" if acts else "camera", **overrides})

    # --- models.rollout.WorldModel ---

    def prepare_rollout(
        self, conditions: LingBotConditions | None, first_pose: np.ndarray, noise_levels: Sequence[float]
    ) -> _OfRollout:
        """Modulation of each noise level, the text's keys and values for each layer, and the chunks' buffers.

        Raises TypeError when conditions are not LingBotConditions, ValueError when their shapes are not the model's.
        """
        conditions = self._checked(conditions)
        time = 1000 * torch.tensor(noise_levels, dtype=torch.float64, device=self.device)
        time = wan.sinusoids(time, self.config.frequency_dim)[:, None]
        text = self._text(conditions.text)
        image = self._image_conditions(conditions.image)
        levels = keys_values = camera = None
        if self.hoist:
            levels = [self._level(of_level) for of_level in time]
            keys_values = self._keys_values(text)
            camera = self._camera_buffer()
        tokens = self.chunk_frames * math.prod(self.config.grid)
        patches = image.new_empty(tokens, self.config.condition_channels * math.prod(wan.PATCH))
        return _OfRollout(
            time, text, image, conditions.translation_scale, {0: None}, levels, keys_values, camera, patches
        )

    def prepare_chunk(self, of_rollout: _OfRollout, start_frame: int, controls: Controls) -> _OfChunk:
        """The rays of the chunk's frames and the scale and shift that each layer's camera injection makes of them.

        Raises ValueError when the controls lack intrinsics or, for control by action, keyboard rows [n, 4], and when
        the chunk before was not prepared: the camera's steps start there.
        """
        frames, config = self.chunk_frames, self.config
        if controls.intrinsics is None:
            raise ValueError(f"{_OP}: intrinsics must be [n, 4] or [4], got None")
        if start_frame not in of_rollout.last_poses:
            raise ValueError(f"{_OP}: start_frame must follow a prepared chunk, got {start_frame}")
        steps = relative_steps(controls.poses, of_rollout.last_poses[start_frame])
        steps[:, :3, 3] /= of_rollout.translation_scale
        for old in [first for first in of_rollout.last_poses if first < start_frame]:
            del of_rollout.last_poses[old]
        of_rollout.last_poses[start_frame + frames] = controls.poses[-1]
        size = (_PIXELS * config.grid[0], _PIXELS * config.grid[1])
        rays = ray_map(
            steps, controls.intrinsics, size, intrinsics_size=config.intrinsics_size,
            keys=self._held_keys(start_frame, controls), device=self.device,
        )  # fmt: skip
        rays = fold_pixels(rays).to(self.dtype)
        last = len(of_rollout.image) - 1
        image = torch.stack([of_rollout.image[min(start_frame + frame, last)] for frame in range(frames)])
        of_rollout.patches.copy_(wan.patchify(image))
        if self.hoist:
            self._camera(rays, of_rollout.camera)
        return _OfChunk(of_rollout, rays)

    def denoise(self, latents: torch.Tensor, step: int, of_chunk: _OfChunk, memory: WorldMemory) -> torch.Tensor:
        """Flow of latents [chunk_frames, channels, height, width] at noise_levels[step]; both fp32."""
        of_rollout = of_chunk.rollout
        level = of_rollout.levels[step] if self.hoist else self._level(of_rollout.time[step])
        keys_values = of_rollout.keys_values if self.hoist else self._keys_values(of_rollout.text)
        camera = of_rollout.camera if self.hoist else self._camera(of_chunk.rays, self._camera_buffer())
        patches = torch.cat([wan.patchify(latents).to(self.dtype), of_rollout.patches], dim=1)
        x = wan.embed_patches(self.patch_embedding, patches)
        for layer, block in enumerate(self.blocks):
            x = block.attend_and_move(x, level.modulation[layer], memory, layer, *camera[layer])
            x = block.cross_attend(x, *keys_values[layer])
            x = block.feed_forward(x, level.modulation[layer])
        return wan.unpatchify(self.head(x, level.head), self.config.grid)

    def carried(self, of_rollout: _OfRollout) -> dict[int, np.ndarray | None]:
        """The poses that the next chunk's steps may start at."""
        return dict(of_rollout.last_poses)

    def carry_on(self, of_rollout: _OfRollout, carried: dict[int, np.ndarray | None]) -> None:
        of_rollout.last_poses.clear()
        for frame, pose in carried.items():
            of_rollout.last_poses[frame] = None if pose is None else as_poses(_OP, pose[None])[0]

    def pass_key(self, of_chunk: _OfChunk) -> Hashable:
        """All chunks are alike, with hoisting; without it a pass makes some of its conditions itself, on the host."""
        return () if self.hoist else None

    # --- parts of the above ---

    def _level(self, time: torch.Tensor) -> _Level:
        """Of time [1, frequency_dim]."""
        embedded = self.time_embedding(time)
        projected = self.time_projection(embedded).view(6, -1)
        return _Level(
            torch.stack([block.modulated_by(projected) for block in self.blocks]), self.head.modulated_by(embedded[0])
        )

    def _keys_values(self, text: torch.Tensor) -> _KeysValues:
        context = self.text_embedding(text)
        return [block.cross_attn.keys_values(context) for block in self.blocks]

    def _camera(self, rays: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Scale and shift of every layer, written to `out` [num_layers, 2, tokens, dim]."""
        embedded = self.patch_embedding_wancamctrl(rays)
        camera = embedded + self.c2ws_hidden_states_layer2(F.silu(self.c2ws_hidden_states_layer1(embedded)))
        for block, of_block in zip(self.blocks, out, strict=True):
            block.camera_scale_shift(camera, out=of_block)
        return out

    def _held_keys(self, start_frame: int, controls: Controls) -> np.ndarray | None:
        """Of the chunk's latent frames, [chunk_frames, 4]; None for control by camera."""
        if self.config.control == "camera":
            return None
        rows = 4 * np.arange(start_frame, start_frame + self.chunk_frames)
        keyboard = controls.actions.keyboard if controls.actions is not None else None
        shape = None if keyboard is None else keyboard.shape
        if shape is None or len(shape) != 2 or shape[1] != _KEYS or shape[0] <= rows[-1]:
            got = None if shape is None else list(shape)
            raise ValueError(f"{_OP}: actions must have keyboard [at least {rows[-1] + 1}, {_KEYS}], got {got}")
        return keyboard[rows]

    def _checked(self, conditions: LingBotConditions | None) -> LingBotConditions:
        if conditions is None:
            return LingBotConditions()
        if not isinstance(conditions, LingBotConditions):
            raise TypeError(f"{_OP}: conditions must be LingBotConditions or None, got {conditions!r:.60}")
        config, (text, image, scale) = self.config, conditions
        most, wide = config.text_tokens, config.text_dim
        if text is not None and (text.dim() != 2 or not 1 <= len(text) <= most or text.shape[1] != wide):
            raise ValueError(f"{_OP}: text must be [1 to {most}, {wide}], got {list(text.shape)}")
        if image is not None:
            channels, frames, (_, *size) = config.condition_channels, config.chunk_frames, self.latent_shape
            right = image.dim() == 4 and image.shape[0] == channels and image.shape[1] >= frames
            if not right or list(image.shape[2:]) != size:
                wanted = f"[{channels}, at least {frames}, {size[0]}, {size[1]}]"
                raise ValueError(f"{_OP}: image must be {wanted}, got {list(image.shape)}")
        if not 0 < scale < math.inf:
            raise ValueError(f"{_OP}: translation_scale must be positive and finite, got {scale}")
        return conditions

    def _text(self, text: torch.Tensor | None) -> torch.Tensor:
        """Rows of the given text and zeros, or the stand-in: [text_tokens, text_dim]."""
        tokens, config = self.config.text_tokens, self.config
        if text is None:
            text = wan.normal((tokens, config.text_dim), self.seed)
        text = text.to(self.device, self.dtype)
        return F.pad(text, (0, 0, 0, tokens - len(text)))


class _Block(wan.CameraBlock, wan.TextBlock):
    """A block that the camera steers between its two attentions."""
