"""A small causal world model with the layers of LingBot-World and random weights.

It makes no pictures. It has the structure that decides what a memory costs and what it changes (block
order, QK-norm, 3D RoPE, camera injection, cached cross-attention), at a size that a CPU can roll out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..memory.config import MemoryConfig
from ..memory.world_memory import WorldMemory
from . import wan
from .rollout import SIGMAS, Controls


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """Sizes of a TinyWorldModel; `grid` is (height, width) in tokens of one latent frame.

    Raises ValueError when a size is below 1 or head_dim is not 64 or 128.
    """

    num_layers: int = 4
    num_heads: int = 2
    head_dim: int = 64
    ffn_dim: int = 384
    grid: tuple[int, int] = (5, 9)
    chunk_frames: int = 3
    latent_channels: int = 16
    text_tokens: int = 16
    text_dim: int = 64
    frequency_dim: int = 64
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for field in ("ffn_dim", "latent_channels", "text_tokens", "text_dim", "frequency_dim"):
            if getattr(self, field) < 1:
                raise ValueError(f"TinyConfig: {field} must be at least 1, got {getattr(self, field)}")
        self.memory()  # checks the rest

    @property
    def dim(self) -> int:
        return self.num_heads * self.head_dim

    def memory(self, **options: Any) -> MemoryConfig:
        """The MemoryConfig of this model, with `options` for the rest of its fields."""
        return MemoryConfig(
            num_layers=self.num_layers, num_heads=self.num_heads, head_dim=self.head_dim, grid=self.grid,
            chunk_frames=self.chunk_frames, eps=self.eps, **options,
        )  # fmt: skip


class _OfRollout(NamedTuple):
    """What holds for a whole rollout."""

    world_to_first: np.ndarray  # [4, 4]
    modulation: torch.Tensor  # [steps, num_layers, 6, dim], fp32
    head_modulation: torch.Tensor  # [steps, 2, dim], fp32
    text: list[tuple[torch.Tensor, torch.Tensor]]  # K and V per layer, [1, heads, text_tokens, head_dim]


class _OfChunk(NamedTuple):
    """What holds for all passes of a chunk."""

    rollout: _OfRollout
    camera: list[tuple[torch.Tensor, torch.Tensor]]  # 1 + scale and shift per layer, [tokens, dim], fp32


class TinyWorldModel(nn.Module):
    """A causal denoiser of camera-controlled video with random weights; a models.rollout.WorldModel.

    Parameter names are those of LingBot-World-Fast where it has the layer. Linear layers are in `dtype`, the
    dtype of the memory; the residual stream, norms, modulation, time embedding and head are fp32. The weights
    depend on `seed` and the config alone (they are drawn on the CPU in fp32, then cast), as does the
    stand-in for an encoded prompt. Self-attention keys are initialised as the queries are, so that tokens
    alike in content and camera attend to each other, as in a trained model.

    Camera poses are taken relative to the rollout's first frame, so that the origin and orientation of the
    world do not matter; the image is taken to be twice as large as the principal point.
    """

    sigmas = SIGMAS

    def __init__(
        self,
        config: TinyConfig | None = None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        config = config or TinyConfig()
        self.config = config
        dim = config.dim
        self.chunk_frames = config.chunk_frames
        self.latent_shape = (config.latent_channels, wan.PATCH[1] * config.grid[0], wan.PATCH[2] * config.grid[1])
        self.device = torch.empty(0, dtype=torch.uint8, device=device).device

        with torch.device("meta"):
            self.patch_embedding = nn.Conv3d(config.latent_channels, dim, wan.PATCH, wan.PATCH)
            self.patch_embedding_wancamctrl = nn.Linear(6, dim)
            self.c2ws_hidden_states_layer1 = nn.Linear(dim, dim)
            self.c2ws_hidden_states_layer2 = nn.Linear(dim, dim)
            self.text_embedding = wan.text_embedding(config.text_dim, dim)
            self.time_embedding = wan.time_embedding(config.frequency_dim, dim)
            self.time_projection = wan.time_projection(dim)
            self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
            self.head = _Head(config)
            self.register_buffer("prompt", torch.empty(config.text_tokens, config.text_dim), persistent=False)
        self.float().to_empty(device="cpu")
        self._draw_weights(torch.Generator().manual_seed(seed))
        for name, parameter in self.named_parameters():
            wide = any(part in name for part in wan.FP32_PARAMETERS)
            parameter.data = parameter.data.to(self.device, torch.float32 if wide else dtype)
        self.prompt = self.prompt.to(self.device, dtype)
        self.dtype = dtype

    def prepare_rollout(self, conditions: None, first_pose: np.ndarray, noise_levels: Sequence[float]) -> _OfRollout:
        """Modulation for each noise level, and the keys and values of the prompt for each layer's cross-attention.

        Raises ValueError when conditions are given: its prompt is drawn with the weights.
        """
        if conditions is not None:
            raise ValueError(f"TinyWorldModel: conditions must be None, got {conditions!r}")
        time = 1000 * torch.tensor(noise_levels, dtype=torch.float64, device=self.device)
        time = self.time_embedding(wan.sinusoids(time, self.config.frequency_dim))  # [steps, dim]
        of_blocks = self.time_projection(time).unflatten(1, (1, 6, -1))
        text = self.text_embedding(self.prompt)
        return _OfRollout(
            np.linalg.inv(first_pose),
            of_blocks + torch.cat([block.modulation for block in self.blocks]),
            time[:, None] + self.head.modulation,
            [block.cross_attn.keys_values(text) for block in self.blocks],
        )

    def prepare_chunk(self, of_rollout: _OfRollout, start_frame: int, controls: Controls) -> _OfChunk:
        """Scale and shift that each layer's camera injection applies to the chunk's tokens.

        Raises ValueError when the controls have no intrinsics.
        """
        if controls.intrinsics is None:
            raise ValueError("TinyWorldModel: intrinsics must be [n, 4] or [4], got None")
        rays = pluecker_map(of_rollout.world_to_first @ controls.poses, controls.intrinsics, self.config.grid)
        rays = torch.from_numpy(rays).flatten(0, 2).to(self.device, self.dtype)
        embedded = self.patch_embedding_wancamctrl(rays)
        hidden = self.c2ws_hidden_states_layer2(F.silu(self.c2ws_hidden_states_layer1(embedded)))
        camera = embedded + hidden  # [tokens, dim]
        return _OfChunk(of_rollout, [block.camera_scale_shift(camera) for block in self.blocks])

    def denoise(self, latents: torch.Tensor, step: int, of_chunk: _OfChunk, memory: WorldMemory) -> torch.Tensor:
        """Flow of latents [chunk_frames, channels, height, width] at noise_levels[step]; both fp32."""
        of_rollout = of_chunk.rollout
        x = self._tokens(latents).float()
        conditions = zip(of_rollout.modulation[step], of_chunk.camera, of_rollout.text, strict=True)
        for layer, (block, condition) in enumerate(zip(self.blocks, conditions, strict=True)):
            x = block(x, *condition, memory, layer)
        return wan.unpatchify(self.head(x, of_rollout.head_modulation[step]), self.config.grid)

    def _tokens(self, latents: torch.Tensor) -> torch.Tensor:
        """[frames, channels, height, width] -> [tokens, dim]: frames, rows, columns in that order."""
        embedded = self.patch_embedding(latents.to(self.dtype).transpose(0, 1))  # [dim, frames, height, width]
        return embedded.flatten(1).T

    def _draw_weights(self, generator: torch.Generator) -> None:
        for name, parameter in [*self.named_parameters(), ("prompt", self.prompt)]:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu")
            if name.endswith("bias"):
                drawn *= 0.05
            elif parameter.dim() == 1:  # of a norm
                drawn = 1 + 0.1 * drawn
            elif name != "prompt":
                fan_in = parameter.shape[-1] if name.endswith("modulation") else parameter[0].numel()
                # A scale of unit variance in every layer would let the residual stream grow.
                drawn *= (0.3 if "cam_scale" in name else 1.0) / math.sqrt(fan_in)
            parameter.data.copy_(drawn)
        for block in self.blocks:
            block.self_attn.k.load_state_dict(block.self_attn.q.state_dict())


class _Block(nn.Module):
    """Self-attention, camera injection, cross-attention and feed-forward, in that order."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        dim = config.dim
        self._eps = config.eps
        self.self_attn = wan.SelfAttention(dim, config.num_heads, config.eps)
        self.norm3 = nn.LayerNorm(dim, config.eps)
        self.cross_attn = wan.CrossAttention(dim, config.num_heads, config.eps)
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, dim))
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))
        self.cam_injector_layer1, self.cam_injector_layer2 = (nn.Linear(dim, dim) for _ in range(2))
        self.cam_scale_layer, self.cam_shift_layer = (nn.Linear(dim, dim) for _ in range(2))

    def camera_scale_shift(self, camera: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """1 + scale and shift, [tokens, dim] fp32 each, of the camera embedding [tokens, dim]."""
        hidden = self.cam_injector_layer2(F.silu(self.cam_injector_layer1(camera))) + camera
        return 1 + self.cam_scale_layer(hidden).float(), self.cam_shift_layer(hidden).float()

    def forward(
        self,
        x: torch.Tensor,
        modulation: torch.Tensor,
        camera: tuple[torch.Tensor, torch.Tensor],
        text: tuple[torch.Tensor, torch.Tensor],
        memory: WorldMemory,
        layer: int,
    ) -> torch.Tensor:
        """x [tokens, dim] fp32, modulation [6, dim] fp32 -> [tokens, dim] fp32."""
        dtype = self.ffn[0].weight.dtype
        e = modulation
        y = self.self_attn(self._modulated(x, e[0], e[1]).to(dtype), memory, layer)
        x = x + y * e[2]
        scale, shift = camera
        x = scale * x + shift
        x = x + self.cross_attn(self.norm3(x).to(dtype), *text)
        y = self.ffn(self._modulated(x, e[3], e[4]).to(dtype))
        return x + y * e[5]

    def _modulated(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self._eps) * (1 + scale) + shift


class _Head(nn.Module):
    """From tokens to patches of flow, all in fp32."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self._eps = config.eps
        self.head = nn.Linear(config.dim, math.prod(wan.PATCH) * config.latent_channels)
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))

    def forward(self, x: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        shift, scale = modulation
        return self.head(F.layer_norm(x, x.shape[-1:], eps=self._eps) * (1 + scale) + shift)


def pluecker_map(poses: np.ndarray, intrinsics: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The rays through the tokens' centres in Pluecker coordinates, fp32 [frames, height, width, 6].

    Args: poses [frames, 4, 4] camera-to-world; intrinsics [frames, 4], fx, fy, cx, cy in pixels of an image of
    2 cy x 2 cx; grid (height, width). The first three numbers are the moment o x d, the last three the unit
    direction d. The camera's position o is shortened to log(1 + |o|) along its own direction, which keeps
    the numbers small in any unit of length.
    """
    height, width = grid
    fx, fy, cx, cy = (intrinsics[:, i, None, None] for i in range(4))
    u = (np.arange(width)[None, None] + 0.5) / width * 2 * cx
    v = (np.arange(height)[None, :, None] + 0.5) / height * 2 * cy
    local = np.stack(np.broadcast_arrays((u - cx) / fx, (v - cy) / fy, 1.0), axis=-1)  # [frames, height, width, 3]
    directions = np.einsum("fij,fhwj->fhwi", poses[:, :3, :3], local)
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    positions = poses[:, None, None, :3, 3]
    lengths = np.linalg.norm(positions, axis=-1, keepdims=True)
    positions = positions * (np.log1p(lengths) / np.maximum(lengths, 1e-12))
    moments = np.cross(positions, directions)
    return np.concatenate([moments, directions], axis=-1).astype(np.float32)
