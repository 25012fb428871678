"""What LingBot-World is told of the camera: a ray through every pixel, folded into the features of its tokens.

As the published code has it (Robbyant/lingbot-world, wan/utils/cam_utils.py and wan/image2video_fast.py, versions 1 and
2; pixel (u, v) is column u, row v):

- A latent frame's pose is taken relative to that of the latent frame before it; the first one's is the identity. So
  the model sees steps, not where the camera is.
- The steps' translations are divided by the longest of the whole clip. A rollout that is streamed cannot know
  it: it is a parameter here (`longest_step` computes it where the clip is known).
- A pixel's channels are the camera's position, then the unit direction of the ray through the pixel's centre
  (u + 0.5, v + 0.5), both in the coordinates of the frame before. The code calls this a Pluecker map, but there is no
  cross product in it.
- Intrinsics are those of a 480 x 832 image and are scaled, each axis on its own, to the size at hand. The published
  code takes the first frame's for the whole clip; here each frame has its own.
- 8 x 8 pixels go to the channels of a latent pixel, and 2 x 2 of those to a token, channels slowest each time.
- The action variant leaves the position out and adds the keys W, A, S and D, the same for all pixels of a frame:
  7 channels. Latent frame f takes the keys of video frame 4 f.
"""

from __future__ import annotations

import numpy as np
import torch

from .from_host import on_device
from .wan import PATCH

_STRIDE = 8  # pixels to a latent, each way


def relative_steps(poses: np.ndarray, before: np.ndarray | None) -> np.ndarray:
    """Each pose [frames, 4, 4] in the coordinates of the one before; `before` the first one, None for its own."""
    previous = np.concatenate([poses[:1] if before is None else before[None], poses[:-1]])
    return np.linalg.inv(previous) @ poses


def longest_step(poses: np.ndarray) -> float:
    """The farthest that a camera moves between two latent frames of a clip [frames, 4, 4], 1 where it stands still."""
    moves = np.diff(np.asarray(poses, dtype=np.float64)[:, :3, 3], axis=0)
    return float(np.linalg.norm(moves, axis=1).max(initial=0.0)) or 1.0


def ray_map(
    steps: np.ndarray,
    intrinsics: np.ndarray,
    size: tuple[int, int],
    *,
    intrinsics_size: tuple[int, int],
    keys: np.ndarray | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Position and direction of the ray through each pixel, or direction and keys, fp32.

    Args:
        steps: camera-to-world in the coordinates of the frame before, [frames, 4, 4], translations already scaled.
        intrinsics: fx, fy, cx, cy [frames, 4] in pixels of an image of `intrinsics_size` (height, width).
        size: (height, width) of the map in pixels.
        keys: held down or not, [frames, 4] in the order W, A, S, D; None for a camera's map.

    Returns [frames, height, width, 6], or 7 with keys. Computed on `device`; only the arguments are copied there.
    """
    height, width = size
    scale = np.array([width / intrinsics_size[1], height / intrinsics_size[0]] * 2)
    numbers = np.concatenate([steps[:, :3].reshape(-1, 12), intrinsics * scale], axis=1).astype(np.float32)
    numbers = on_device(torch.from_numpy(numbers), device)[:, None, None]  # [frames, 1, 1, 16]
    fx, fy, cx, cy = numbers[..., 12:].unbind(-1)
    u = (torch.arange(width, dtype=torch.float32, device=device) + 0.5 - cx) / fx  # [frames, 1, width]
    v = (torch.arange(height, dtype=torch.float32, device=device)[:, None] + 0.5 - cy) / fy  # [frames, height, 1]
    local = torch.stack(torch.broadcast_tensors(u, v, torch.ones_like(u)), dim=-1)
    local = local / local.norm(dim=-1, keepdim=True)
    pose = numbers[..., :12].unflatten(-1, (3, 4))  # [frames, 1, 1, 3, 4]
    direction = (pose[..., :3] * local[..., None, :]).sum(-1)
    if keys is None:
        return torch.cat([pose[..., 3].expand_as(direction), direction], dim=-1)
    held = on_device(torch.from_numpy(keys.astype(np.float32)), device)[:, None, None]
    return torch.cat([direction, held.expand(*direction.shape[:-1], -1)], dim=-1)


def fold_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """[frames, height, width, channels] -> [tokens, channels * 8 * 8 * 2 * 2], in that order."""
    frames, height, width, channels = pixels.shape
    rows, columns = PATCH[1] * _STRIDE, PATCH[2] * _STRIDE
    parts = (frames, height // rows, PATCH[1], _STRIDE, width // columns, PATCH[2], _STRIDE, channels)
    # Within a token's row of pixels the 2 of the patch are the slower, the 8 of the stride the faster.
    return pixels.reshape(parts).permute(0, 1, 4, 7, 3, 6, 2, 5).flatten(3).flatten(0, 2)
