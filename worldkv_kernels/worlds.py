"""Worlds to look at: coloured spheres around a camera, and the fixed codec between their pictures and latents.

A world is a picture on a sphere of radius 1, in equirectangular projection: drawn, or a photograph. A pinhole camera
looks at it from inside. A frame's latents are the lowest 16 of the 48 coefficients of a 4 x 4 discrete cosine transform
of luma and chroma: what a video autoencoder is to a large model, at no cost.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

FRAME = (48, 64)  # pixels of a picture, height and width
FIELD_OF_VIEW = 75.0  # degrees, across
TEXTURE = (96, 192)  # pixels of a world: 180 degrees down, 360 around
_FOCAL = FRAME[1] / 2 / math.tan(math.radians(FIELD_OF_VIEW / 2))
INTRINSICS = np.array([_FOCAL, _FOCAL, FRAME[1] / 2, FRAME[0] / 2])  # fx, fy, cx, cy in pixels

_STRIDE = 4  # pixels to a latent, each way
_SHAPES = 28  # in a drawn world
_EDGE = math.radians(1.3)  # over which a shape fades
# What each latent channel is divided by: the standard deviation of the coefficient over pictures of drawn worlds, the
# smallest ones lifted to 8 % of the largest. Luma's ten, then three of each chroma.
SCALES = (
    0.947, 0.112, 0.076, 0.076, 0.114, 0.076, 0.076, 0.076, 0.076, 0.076,
    0.913, 0.109, 0.109,
    0.914, 0.105, 0.110,
)  # fmt: skip


# --- worlds ---


def draw_worlds(count: int, generator: torch.Generator) -> torch.Tensor:
    """Random worlds [count, 3, 96, 192] in 0..1: two octaves of smooth colour, under soft ellipses and rectangles.

    They are on the generator's device, and a function of its state.
    """
    height, width = TEXTURE
    options = dict(generator=generator, dtype=torch.float32, device=generator.device)
    colour = torch.zeros(count, 3, height, width, dtype=torch.float32, device=generator.device)
    for rows, amplitude in ((4, 1.0), (9, 0.7)):
        columns = 2 * rows
        coarse = torch.randn(count, 3, rows, columns, **options)
        coarse = torch.cat([coarse[..., -2:], coarse, coarse[..., :2]], dim=-1)  # it closes behind the camera
        size = (height, round(width * (columns + 4) / columns))
        fine = F.interpolate(coarse, size=size, mode="bicubic", align_corners=False)
        left = (size[1] - width) // 2
        colour += amplitude * fine[..., left : left + width]
    worlds = torch.sigmoid(1.1 * colour)

    latitudes = -math.pi * _centred(height, generator.device)[:, None]
    longitudes = 2 * math.pi * _centred(width, generator.device)[None]

    def uniform(least: float, most: float) -> torch.Tensor:
        return least + (most - least) * torch.rand(count, 1, 1, **options)

    for _ in range(_SHAPES):
        longitude, latitude = math.pi * uniform(-1, 1), torch.asin(uniform(-0.95, 0.95))
        across = torch.deg2rad(uniform(5, 20))
        down = across * uniform(0.4, 1.6)
        x = ((longitudes - longitude + math.pi) % (2 * math.pi) - math.pi) * torch.cos(latitudes) / across
        y = (latitudes - latitude) / down
        is_ellipse = uniform(0, 1) < 0.5
        distance = torch.where(is_ellipse, torch.hypot(x, y), torch.maximum(x.abs(), y.abs()))
        covered = torch.sigmoid((1 - distance) * across / _EDGE)[:, None]
        worlds = torch.lerp(worlds, torch.rand(count, 3, 1, 1, **options), covered)
    return worlds


def photograph_world(image: np.ndarray) -> torch.Tensor:
    """A photograph [height, width, 3] in 0..1 and its mirror image, laid around the horizon: a world [3, 96, 192].

    Raises ValueError when the image is not [height, width, 3].
    """
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"photograph_world: image must be [height, width, 3], got {list(image.shape)}")
    pixels = torch.from_numpy(np.ascontiguousarray(image)).float().permute(2, 0, 1)
    closed = torch.cat([pixels, pixels.flip(-1)], dim=-1)
    return F.interpolate(closed[None], size=TEXTURE, mode="bilinear", antialias=True)[0].clamp(0, 1)


def looking(yaw: torch.Tensor, pitch: torch.Tensor, position: torch.Tensor | None = None) -> torch.Tensor:
    """Camera-to-world poses [..., 4, 4] of cameras turned by yaw (to the right), then pitch (up), in radians [...].

    OpenCV coordinates; position [..., 3], by default the middle of the world.
    """
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
    cos_y, sin_y, cos_p, sin_p = yaw.cos(), yaw.sin(), pitch.cos(), pitch.sin()
    rows = [
        [cos_y, sin_y * sin_p, sin_y * cos_p],
        [zero, cos_p, -sin_p],
        [-sin_y, cos_y * sin_p, cos_y * cos_p],
    ]
    x, y, z = (zero, zero, zero) if position is None else position.unbind(-1)
    rows = [[*row, at] for row, at in zip(rows, (x, y, z), strict=True)]
    return torch.stack([torch.stack(row, dim=-1) for row in [*rows, [zero, zero, zero, one]]], dim=-2)


def pictures(worlds: torch.Tensor, poses: torch.Tensor) -> torch.Tensor:
    """What cameras see, by bilinear sampling: [n, frames, 3, 48, 64] in 0..1.

    Args: worlds [n, 3, height, width]; poses [n, frames, 4, 4] camera-to-world in OpenCV coordinates (x right, y down,
    z forward), fp32, at positions inside the sphere. The identity looks at the middle of the texture.
    """
    height, width = FRAME
    u, v = (size / _FOCAL * _centred(size, worlds.device) for size in (width, height))
    local = torch.stack(torch.broadcast_tensors(u[None], v[:, None], u.new_ones(())), dim=-1)
    local = local / local.norm(dim=-1, keepdim=True)
    direction = torch.einsum("nfij,hwj->nfhwi", poses[..., :3, :3], local)
    position = poses[:, :, None, None, :3, 3]
    # Where position + t direction is on the sphere: t^2 + 2 t (position . direction) + |position|^2 = 1.
    along = (position * direction).sum(-1, keepdim=True)
    t = (along.square() + 1 - position.square().sum(-1, keepdim=True)).sqrt() - along
    x, y, z = (position + t * direction).unbind(-1)
    longitude, latitude = torch.atan2(x, z), torch.asin(y.clamp(-1, 1))
    margin = 4  # columns of the other side, so that sampling never meets an edge
    closed = torch.cat([worlds[..., -margin:], worlds, worlds[..., :margin]], dim=-1)
    across = longitude / math.pi * (worlds.shape[-1] / closed.shape[-1])
    grid = torch.stack([across, latitude / (math.pi / 2)], dim=-1)
    sampled = F.grid_sample(closed, grid.flatten(1, 2), padding_mode="border", align_corners=False)
    return sampled.unflatten(2, (-1, height)).transpose(1, 2)


def _centred(count: int, device: torch.device) -> torch.Tensor:
    """The middles of `count` pixels side by side, from -1/2 to 1/2."""
    return (torch.arange(count, dtype=torch.float32, device=device) + 0.5) / count - 0.5


# --- the codec ---


def encode(frames: torch.Tensor) -> torch.Tensor:
    """Pictures [..., 3, height, width] in 0..1 -> latents [..., 16, height / 4, width / 4] of unit variance or less."""
    basis, scales = (of.to(frames.device) for of in (_BASIS, _SCALE))
    blocks = F.pixel_unshuffle(frames - 0.5, _STRIDE)  # [..., 48, h, w]: colours, then rows and columns of a block
    return torch.einsum("kc,...chw->...khw", basis / scales[:, None], blocks)


def decode(latents: torch.Tensor) -> torch.Tensor:
    """The picture of latents, clipped to 0..1: the inverse of `encode`, but for the coefficients that it leaves out."""
    basis, scales = (of.to(latents.device) for of in (_BASIS, _SCALE))
    blocks = torch.einsum("kc,...khw->...chw", basis * scales[:, None], latents)
    return (F.pixel_shuffle(blocks, _STRIDE) + 0.5).clamp(0, 1)


def _basis() -> torch.Tensor:
    """Orthonormal rows [16, 48]: luma up to diagonal 3 of the coefficients, chromas up to diagonal 1."""
    k = torch.arange(_STRIDE, dtype=torch.float64, device="cpu")
    cosines = torch.cos(math.pi * (k[None] + 0.5) * k[:, None] / _STRIDE) * math.sqrt(2 / _STRIDE)
    cosines[0] /= math.sqrt(2)
    # Y, Cb and Cr of JPEG, made orthogonal.
    weights = [[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]]
    colours = torch.tensor(weights, dtype=torch.float64, device="cpu")
    colours = torch.linalg.qr(colours.T)[0].T
    rows = [
        torch.einsum("c,y,x->cyx", colour, cosines[i], cosines[j]).flatten()
        for colour, diagonal in zip(colours, (3, 1, 1), strict=True)
        for i in range(_STRIDE)
        for j in range(_STRIDE)
        if i + j <= diagonal
    ]
    return torch.stack(rows).float()


_BASIS, _SCALE = _basis(), torch.tensor(SCALES, dtype=torch.float32, device="cpu")
