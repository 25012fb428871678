"""Recall without weights: a photograph, a panning camera, and a memory that is asked what it saw.

A key can say where in the world a patch lies, and a value what it looks like; attention over the memory
is then recall. Here a key is made of unit random Fourier features of the patch's direction (Rahimi and
Recht, 2007), whose inner product falls with the angle between two directions, and a value is the patch's
pixels. No weights and no positions are involved, so what comes back depends on one thing: whether the
window holds the tokens that were made when the camera looked there before.

A chunk is attended as a world model would: first with empty keys and grey values in its own rows, which recalls
the view from the window alone, then with what becomes history. Of a view that is new to the camera that is the
truth; of one that it has seen before it is what was recalled, since a world model has nothing else to go on: what
a window has lost stays lost. A chunk that is all new is not recalled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from .memory.config import MemoryConfig
from .memory.world_memory import WorldMemory

GRID = (12, 20)  # patches of a view, rows and columns
PATCH = 8  # pixels of a patch's side
DEGREES_PER_PATCH = 4.0  # a view spans 80 degrees and 48 in height
HEADS, HEAD_DIM = 3, 64  # a patch's 8 * 8 * 3 numbers are the heads' values together
CHUNK_FRAMES = 3
# A patch beside the right one weighs exp(-6) of it, so full recall is good but not perfect.
BANDWIDTH = 5.0  # radians per radian: standard deviation of the random frequencies
SOFTMAX_SCALE = 100.0


@dataclass(frozen=True)
class RecallMode:
    """A memory to ask: its name in the table, and what differs in its configuration."""

    name: str
    options: dict[str, object]


MODES = (
    RecallMode("full KV", {"mode": "full"}),
    RecallMode("sliding window", {"mode": "sliding"}),
    RecallMode("WorldKV, keep_ratio 1 (all)", {"mode": "worldkv", "keep_ratio": 1.0}),
    RecallMode("WorldKV, keep_ratio 0.5 (two thirds)", {"mode": "worldkv", "keep_ratio": 0.5}),
    RecallMode("WorldKV, keep_ratio 0.25 (half)", {"mode": "worldkv", "keep_ratio": 0.25}),
)


@dataclass
class RecallResult:
    """What one memory recalled. Per-view lists cover the revisited views alone, in order of time."""

    mode: RecallMode
    psnr: list[float] = field(default_factory=list)  # dB, pixels from 0 to 1; 100 at most
    tokens_attended: list[int] = field(default_factory=list)  # by each query, the view's own chunk included
    retrieved: list[list[int]] = field(default_factory=list)  # per chunk of the rollout
    kept_bytes: int = 0
    seconds: float = 0.0
    last_view: np.ndarray | None = None  # [height, width, 3], the recalled last frame


class Scene:
    """A photograph on a cylinder, mirrored once so that it closes, and a camera that turns inside."""

    def __init__(self, image: np.ndarray, device: torch.device, seed: int = 0) -> None:
        if image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 64:
            raise ValueError(f"Scene: image must be [height >= 64, width >= 64, 3], got {list(image.shape)}")
        self.panorama = torch.from_numpy(np.concatenate([image, image[:, ::-1]], axis=1)).to(device, torch.float32)
        generator = torch.Generator().manual_seed(seed)
        frequencies = torch.randn(3, HEADS * HEAD_DIM // 2, generator=generator, dtype=torch.float32, device="cpu")
        self._frequencies = (BANDWIDTH * frequencies).to(device)

    def view(self, yaw: float) -> torch.Tensor:
        """The picture at a yaw in degrees, [rows * PATCH, columns * PATCH, 3] in 0..1, by bilinear sampling."""
        height, width, _ = self.panorama.shape
        rows, columns = GRID[0] * PATCH, GRID[1] * PATCH
        device = self.panorama.device
        degrees = DEGREES_PER_PATCH / PATCH
        across = _centres(columns, device) * degrees + yaw
        per_degree = min(width / 360, height / (GRID[0] * DEGREES_PER_PATCH))
        down = height / 2 + _centres(rows, device) * degrees * per_degree - 0.5
        x, y = across.remainder(360) / 360 * width - 0.5, down.clamp(0, height - 1)
        x0, y0 = x.floor(), y.floor()
        fx, fy = (x - x0)[None, :, None], (y - y0)[:, None, None]
        x0, y0 = x0.long() % width, y0.long()
        x1, y1 = (x0 + 1) % width, (y0 + 1).clamp_max(height - 1)
        upper = self.panorama[y0][:, x0] * (1 - fx) + self.panorama[y0][:, x1] * fx
        lower = self.panorama[y1][:, x0] * (1 - fx) + self.panorama[y1][:, x1] * fx
        return upper * (1 - fy) + lower * fy

    def keys(self, yaw: float) -> torch.Tensor:
        """Unit features of every patch's direction, [rows * columns, HEADS * HEAD_DIM]."""
        device = self.panorama.device
        elevation = torch.deg2rad(_centres(GRID[0], device) * DEGREES_PER_PATCH)
        azimuth = torch.deg2rad(_centres(GRID[1], device) * DEGREES_PER_PATCH + yaw)
        elevation, azimuth = torch.meshgrid(elevation, azimuth, indexing="ij")
        directions = torch.stack(
            [azimuth.sin() * elevation.cos(), elevation.sin(), azimuth.cos() * elevation.cos()], dim=-1
        ).reshape(-1, 3)
        phases = (directions @ self._frequencies).view(-1, HEADS, HEAD_DIM // 2)
        features = torch.cat([phases.cos(), phases.sin()], dim=2) * (2 / HEAD_DIM) ** 0.5
        return features.reshape(-1, HEADS * HEAD_DIM)


def _centres(count: int, device: torch.device) -> torch.Tensor:
    """Of `count` things of width 1 side by side, around 0: fp32 [count]."""
    return torch.arange(count, dtype=torch.float32, device=device) + 0.5 - count / 2


def to_values(view: torch.Tensor) -> torch.Tensor:
    """A picture as values, [patches, HEADS * HEAD_DIM]: its pixels less 0.5."""
    return view.view(GRID[0], PATCH, GRID[1], PATCH, 3).permute(0, 2, 1, 3, 4).reshape(GRID[0] * GRID[1], -1) - 0.5


def to_view(values: torch.Tensor) -> torch.Tensor:
    """The picture that values show, clipped to 0..1: the inverse of `to_values`."""
    patches = values.reshape(GRID[0], GRID[1], PATCH, PATCH, 3) + 0.5
    return patches.permute(0, 2, 1, 3, 4).reshape(GRID[0] * PATCH, GRID[1] * PATCH, 3).clamp(0, 1)


def pan_and_return(frames: int, degrees_per_frame: float, start: float = 80.0) -> np.ndarray:
    """Yaw of each frame in degrees: out for half of the frames, then back over the same views.

    The photograph lies between 0 and 180 degrees, so the default start looks at the middle of it.
    """
    out = np.arange((frames + 1) // 2)
    return start + np.concatenate([out, out[::-1][frames % 2 :]]) * degrees_per_frame


def revisited(yaws: np.ndarray, least_gap: int = 30) -> np.ndarray:
    """Frames whose view was seen before, last at least `least_gap` frames ago; 1 for all that was seen before."""
    seen: dict[float, int] = {}
    frames = []
    for frame, yaw in enumerate(np.round(yaws, 6)):
        if yaw in seen and frame - seen[yaw] >= least_gap:
            frames.append(frame)
        seen[yaw] = frame
    return np.array(frames, dtype=int)


def yaw_poses(yaws: np.ndarray) -> np.ndarray:
    """Camera-to-world of a camera that turns in place, OpenCV coordinates, [n, 4, 4]."""
    poses = np.tile(np.eye(4), (len(yaws), 1, 1))
    angle = np.deg2rad(yaws)
    poses[:, 0, 0], poses[:, 0, 2] = np.cos(angle), np.sin(angle)
    poses[:, 2, 0], poses[:, 2, 2] = -np.sin(angle), np.cos(angle)
    return poses


def recall(
    scene: Scene,
    mode: RecallMode,
    yaws: np.ndarray,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
    on_chunk: Callable[[int], None] = lambda chunk: None,
) -> RecallResult:
    """Pan over `yaws` (degrees, one a frame, a multiple of 3 frames) and recall every view from memory.

    `on_chunk` is called after each chunk. Raises ValueError when the frames do not fill whole chunks, or
    none of them sees a view again after 30 frames.
    """
    if len(yaws) == 0 or len(yaws) % CHUNK_FRAMES:
        raise ValueError(f"recall: yaws must be a multiple of {CHUNK_FRAMES} frames, got {len(yaws)}")
    again, seen = set(revisited(yaws).tolist()), set(revisited(yaws, 1).tolist())
    if not again:
        raise ValueError(f"recall: yaws must come back to a view after 30 frames or more, got {len(yaws)} frames")
    device = scene.panorama.device
    chunks = len(yaws) // CHUNK_FRAMES
    defaults = {"retrieved_chunks": 6, "sink_frames": 0, "recent_frames": 3, "bank_chunks": max(chunks, 6)}
    config = MemoryConfig(
        num_layers=1, num_heads=HEADS, head_dim=HEAD_DIM, grid=GRID, chunk_frames=CHUNK_FRAMES,
        rope=None, scale=SOFTMAX_SCALE, **{**defaults, **mode.options},
    )  # fmt: skip
    memory = WorldMemory(config, device=device, dtype=dtype, backend=backend)
    poses = yaw_poses(yaws)
    result = RecallResult(mode)
    started = time.perf_counter()
    for chunk in range(chunks):
        frames = range(chunk * CHUNK_FRAMES, (chunk + 1) * CHUNK_FRAMES)
        truth = [scene.view(yaws[frame]) for frame in frames]
        keys = torch.cat([scene.keys(yaws[frame]) for frame in frames]).to(dtype)
        plan = memory.begin_chunk(None if config.takes_contents else poses[frames.start : frames.stop])
        pictures = truth
        if not seen.isdisjoint(frames):
            nothing = torch.zeros_like(keys)
            recalled = memory.attend(0, keys, nothing, nothing).flatten(1).float()
            pictures = [to_view(values) for values in recalled.chunk(CHUNK_FRAMES)]
        past = [of if frame in seen else view for frame, of, view in zip(frames, pictures, truth, strict=True)]
        memory.attend(0, keys, keys, torch.cat([to_values(view) for view in past]).to(dtype))
        memory.end_chunk()
        result.retrieved.append(list(plan.retrieved))
        for frame, picture, view in zip(frames, pictures, truth, strict=True):
            if frame in again:
                error = (picture - view).square().mean().clamp_min(1e-10)
                result.psnr.append(float(-10 * torch.log10(error)))
                result.tokens_attended.append(plan.num_tokens)
                result.last_view = picture.cpu().numpy()
        on_chunk(chunk)
    result.seconds = time.perf_counter() - started
    result.kept_bytes = memory.stats()["kept_bytes"]
    return result
