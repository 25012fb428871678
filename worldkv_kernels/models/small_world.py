"""SmallWorld: a world model of 1.2 million parameters, trained on a CPU, with the layers of LingBot-World.

It shows what a memory is worth with attention that was learned, on any machine: docs/small_world.md is its model card,
benchmarks/train_small_world.py its training, and worlds.py has the worlds that it saw.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..memory.config import MemoryConfig
from ..memory.world_memory import WorldMemory
from . import wan
from .checkpoint import StoredTensor, check_fields
from .denoiser import Denoiser, Model
from .from_host import on_device
from .rollout import Controls

WEIGHTS = Path(__file__).parent / "weights" / "small_world"
_RAY = 6  # numbers of a ray in Pluecker coordinates
_SIZES = ("num_layers", "num_heads", "head_dim", "ffn_dim", "chunk_frames", "latent_channels", "frequency_dim")


@dataclass(frozen=True, kw_only=True)
class SmallWorldConfig:
    """Sizes of a SmallWorld; the defaults are those of the weights in the package.

    `grid` is (height, width) in tokens of one latent frame. `ray_octaves`: a token's ray goes in as its 6 numbers and
    as their sines and cosines at so many frequencies. `sigmas`: the noise levels of the denoising passes.

    Raises ValueError when a size is below 1, `frequency_dim` is odd, head_dim is not 64 or 128, or the sigmas do not
    start at 1, fall, and stay above 0.
    """

    num_layers: int = 4
    num_heads: int = 2
    head_dim: int = 64
    ffn_dim: int = 512
    grid: tuple[int, int] = (6, 8)
    chunk_frames: int = 3
    latent_channels: int = 16
    frequency_dim: int = 64
    ray_octaves: int = 4
    eps: float = 1e-6
    sigmas: tuple[float, ...] = (1.0, 0.75)
    condition_channels = 0  # nothing but noise and the camera goes in

    def __post_init__(self) -> None:
        for field in ("ffn_dim", "latent_channels", "frequency_dim"):
            if getattr(self, field) < 1:
                raise ValueError(f"SmallWorldConfig: {field} must be at least 1, got {getattr(self, field)}")
        if self.ray_octaves < 0:
            raise ValueError(f"SmallWorldConfig: ray_octaves must be at least 0, got {self.ray_octaves}")
        if self.frequency_dim % 2:
            raise ValueError(f"SmallWorldConfig: frequency_dim must be even, got {self.frequency_dim}")
        falls = all(before >= after > 0 for before, after in pairwise(self.sigmas))
        if not self.sigmas or self.sigmas[0] != 1 or not falls:
            got = reprlib.repr(list(self.sigmas))
            raise ValueError(f"SmallWorldConfig: sigmas must start at 1, fall, and stay above 0, got {got}")
        self.memory()  # checks the rest

    @classmethod
    def from_published(cls, found: dict[str, Any], **overrides: Any) -> SmallWorldConfig:
        """The config that a config.json describes, which is `dataclasses.asdict` of one; what else is in it is ignored.

        Raises ValueError when a size in it is none that a model has.
        """
        check_fields(cls.__name__, found, _SIZES)
        check_fields(cls.__name__, found, ["ray_octaves"], least=0)
        check_fields(cls.__name__, found, ["eps"], least=0, kinds=(int, float))
        known = {field.name: found[field.name] for field in fields(cls) if field.name in found}
        for name in ("grid", "sigmas"):
            if name in known:
                if not isinstance(known[name], list) or not all(type(n) in (int, float) for n in known[name]):
                    got = reprlib.repr(known[name])
                    raise ValueError(f"{cls.__name__}: config.json must have {name} a list of numbers, got {got}")
                known[name] = tuple(known[name])
        return cls(**{**known, **overrides})

    @property
    def dim(self) -> int:
        return self.num_heads * self.head_dim

    def memory(self, **options: Any) -> MemoryConfig:
        """The MemoryConfig of this model, with `options` for the rest of its fields."""
        of_model = dict(
            num_layers=self.num_layers, num_heads=self.num_heads, head_dim=self.head_dim, grid=self.grid,
            chunk_frames=self.chunk_frames, eps=self.eps,
        )  # fmt: skip
        return MemoryConfig(**{**of_model, **options})


class _Level(NamedTuple):
    """What a noise level sets."""

    sigma: float
    modulation: torch.Tensor  # [num_layers, 6, dim], fp32
    head: torch.Tensor  # [2, dim], fp32


class _OfRollout(NamedTuple):
    """What holds for a whole rollout."""

    world_to_first: np.ndarray  # [4, 4]
    noise_levels: tuple[float, ...]
    levels: list[_Level] | None  # with hoisting
    camera: torch.Tensor | None  # of the chunk in the making, [num_layers, 2, tokens, dim], with hoisting


class _OfChunk(NamedTuple):
    """What holds for all passes of a chunk."""

    rollout: _OfRollout
    rays: torch.Tensor  # [tokens, ray channels]


class SmallWorld(Denoiser):
    """A causal denoiser of camera-controlled video; a models.rollout.WorldModel.

    Its blocks are LingBot-World-Fast's without the text: self-attention over the memory's window, camera injection,
    feed-forward, with that model's parameter names. Its head predicts the clean latents x0 (flow = (x - x0) / sigma).
    Linear layers are in `dtype`, the dtype of the memory; the residual stream, norms, modulation, time embedding and
    head are fp32. Camera poses are taken relative to the rollout's first frame; a pixel is given to a token's ray for
    an image twice as large as the principal point.

    `from_pretrained()` loads the trained weights that come with the package.
    """

    Config = SmallWorldConfig

    @classmethod
    def from_pretrained(cls: type[Model], folder: str | Path = WEIGHTS, **options: Any) -> Model:
        """The model with the package's own weights, or with those of a folder; else as Denoiser.from_pretrained."""
        return super().from_pretrained(folder, **options)  # type: ignore[misc]

    def _blocks(self) -> Iterable[wan.CameraBlock]:
        config = self.config
        sizes = (config.dim, config.ffn_dim, config.num_heads, config.eps)
        return (wan.CameraBlock(*sizes) for _ in range(config.num_layers))

    def _add_modules(self) -> None:
        dim = self.config.dim
        self.patch_embedding_wancamctrl = nn.Linear(_RAY * (1 + 2 * self.config.ray_octaves), dim)
        self.c2ws_hidden_states_layer1, self.c2ws_hidden_states_layer2 = (nn.Linear(dim, dim) for _ in range(2))

    def _gains(self) -> dict[str, float]:
        return dict.fromkeys(("cam_scale_layer", "cam_shift_layer"), self.config.num_layers**-0.5)

    @classmethod
    def _published_config(
        cls, fields: dict[str, Any], layout: Mapping[str, StoredTensor], overrides: dict[str, Any]
    ) -> SmallWorldConfig:
        return SmallWorldConfig.from_published(fields, **overrides)

    # --- models.rollout.WorldModel ---

    def prepare_rollout(self, conditions: None, first_pose: np.ndarray, noise_levels: Sequence[float]) -> _OfRollout:
        """Modulation for each noise level. Raises ValueError when conditions are given: it knows none."""
        if conditions is not None:
            raise ValueError(f"SmallWorld: conditions must be None, got {conditions!r:.60}")
        levels = camera = None
        if self.hoist:
            levels = [self._level(sigma) for sigma in noise_levels]
            camera = self._camera_buffer()
        return _OfRollout(np.linalg.inv(first_pose), tuple(noise_levels), levels, camera)

    def prepare_chunk(self, of_rollout: _OfRollout, start_frame: int, controls: Controls) -> _OfChunk:
        """Scale and shift that each layer's camera injection applies to the chunk's tokens.

        Raises ValueError when the controls have no intrinsics.
        """
        if controls.intrinsics is None:
            raise ValueError("SmallWorld: intrinsics must be [n, 4] or [4], got None")
        rays = pluecker_map(of_rollout.world_to_first @ controls.poses, controls.intrinsics, self.config.grid)
        features = ray_features(torch.from_numpy(rays).flatten(0, 2), self.config.ray_octaves)
        features = on_device(features.to(self.dtype), self.device)
        if self.hoist:
            self._camera(features, of_rollout.camera)
        return _OfChunk(of_rollout, features)

    def denoise(self, latents: torch.Tensor, step: int, of_chunk: _OfChunk, memory: WorldMemory) -> torch.Tensor:
        """Flow of latents [chunk_frames, channels, height, width] at noise_levels[step]; both fp32.

        At sigma 0, where there is no noise to tell it from, it is the difference to the clean latents.
        """
        of_rollout = of_chunk.rollout
        level = of_rollout.levels[step] if self.hoist else self._level(of_rollout.noise_levels[step])
        camera = of_rollout.camera if self.hoist else self._camera(of_chunk.rays, self._camera_buffer())
        x = wan.embed_patches(self.patch_embedding, wan.patchify(latents))
        for layer, block in enumerate(self.blocks):
            x = block.attend_and_move(x, level.modulation[layer], memory, layer, *camera[layer])
            x = block.feed_forward(x, level.modulation[layer])
        clean = wan.unpatchify(self.head(x, level.head), self.config.grid)
        return (latents - clean) / (level.sigma or 1.0)

    def pass_key(self, of_chunk: _OfChunk) -> Hashable:
        """All chunks are alike, with hoisting; without it a pass makes some of its conditions itself, on the host."""
        return () if self.hoist else None

    # --- parts of the above ---

    def _level(self, sigma: float) -> _Level:
        time = torch.tensor([1000 * sigma], dtype=torch.float64, device=self.device)
        embedded = self.time_embedding(wan.sinusoids(time, self.config.frequency_dim))
        projected = self.time_projection(embedded).view(6, -1)
        modulation = torch.stack([block.modulated_by(projected) for block in self.blocks])
        return _Level(sigma, modulation, self.head.modulated_by(embedded[0]))

    def _camera(self, features: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Scale and shift of every layer, written to `out` [num_layers, 2, tokens, dim]."""
        camera = self.embed_rays(features)
        for block, of_block in zip(self.blocks, out, strict=True):
            block.camera_scale_shift(camera, out=of_block)
        return out

    def embed_rays(self, features: torch.Tensor) -> torch.Tensor:
        """What the blocks' camera injection goes by, [..., dim], of ray_features."""
        embedded = self.patch_embedding_wancamctrl(features)
        return embedded + self.c2ws_hidden_states_layer2(F.silu(self.c2ws_hidden_states_layer1(embedded)))


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


def ray_features(rays: torch.Tensor, octaves: int) -> torch.Tensor:
    """Rays [..., 6], then the sines and cosines of (pi / 2) 2^i times them for each octave i, [..., 6 (1 + 2 octaves)].

    Numbers from -1 to 1 stay apart: the slowest sine rises all the way.
    """
    angles = [math.pi / 2 * 2**octave * rays for octave in range(octaves)]
    return torch.cat([rays, *(wave for angle in angles for wave in (angle.sin(), angle.cos()))], dim=-1)
