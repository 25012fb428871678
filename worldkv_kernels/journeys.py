"""Journeys: a camera goes out through a world and comes back, and a model draws again what it has seen.

The pictures of the way out are given to the model, those of the way back it makes. They can be right only where the
memory still holds what was seen, so their fidelity is the memory's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .memory.world_memory import ChunkPlan, WorldMemory
from .models.rollout import WorldModel, rollout
from .worlds import INTRINSICS, decode, encode, looking, pictures

STEP = 7.0  # degrees from frame to frame
# Frames since a view was last seen, for it to count as seen again: longer ago than the sliding window reaches.
LEAST_GAP = 18
_FARTHEST = 0.4  # of a camera, from the middle of a world of radius 1
_NEAR_DEGREES, _NEAR_DISTANCE = 12.0, 0.15  # of two cameras that have about the same view

# What is compared, and how it differs from MemoryConfig's defaults. A sliding window of four chunks is what the small
# model was trained with; the baselines with a window, and the last row, attend to as many tokens.
MODES: Mapping[str, Mapping[str, Any]] = {
    "full KV": {"mode": "full"},
    "sliding window": {"mode": "sliding", "recent_frames": 12},
    "sink + recent": {"mode": "sink_recent", "recent_frames": 9},
    "WorldKV": {},
    "WorldKV, unpruned": {"keep_ratio": 1.0, "retrieved_chunks": 2, "recent_frames": 3},
}


class Journey(NamedTuple):
    """A camera's way, of which the first part is given."""

    poses: np.ndarray  # camera-to-world [frames, 4, 4], whole chunks of frames
    given: int  # frames whose pictures the model is given, whole chunks

    def seen_again(self, least_gap: int = LEAST_GAP) -> dict[int, int]:
        """Frames that are made and whose view was seen before, with how many frames ago; at least `least_gap`.

        A view was seen when a camera was within 12 degrees and .15 of where this one is. The frames just before, for as
        long as they see about the same, are one visit with it and do not count.
        """
        gaps = {}
        for frame in range(self.given, len(self.poses)):
            near = np.flatnonzero(self._near(frame))
            this_visit = frame
            while len(near) and near[-1] == this_visit - 1:
                this_visit, near = near[-1], near[:-1]
            if len(near) and frame - near[-1] >= least_gap:
                gaps[frame] = int(frame - near[-1])
        return gaps

    def _near(self, frame: int) -> np.ndarray:
        """Whether each frame before sees about the same, [frame]."""
        before, now = self.poses[:frame], self.poses[frame]
        cosine = (np.einsum("fij,ij->f", before[:, :3, :3], now[:3, :3]) - 1) / 2
        away = np.linalg.norm(before[:, :3, 3] - now[:3, 3], axis=1)
        return (cosine >= math.cos(math.radians(_NEAR_DEGREES))) & (away <= _NEAR_DISTANCE)


def turn_and_return(chunks: int, number: int = 0, *, step: float = STEP, chunk_frames: int = 3) -> Journey:
    """A camera that turns on the spot for half of the chunks, nodding by 8 degrees, and turns back.

    Coming back it looks between the views of the way out, 45 % of a step aside and 2.5 degrees higher, so that nothing
    lines up with the patches of before. `number` gives each world a way of its own. Raises ValueError when the
    chunks are not an even number of at least 2.
    """
    if chunks < 2 or chunks % 2:
        raise ValueError(f"turn_and_return: chunks must be even and at least 2, got {chunks}")
    out = np.arange(chunks // 2 * chunk_frames)
    yaw, pitch = step * out, 8 * np.sin(out / 5 + 1.7 * number)
    yaw = np.concatenate([yaw, yaw[::-1] - 0.45 * step]) + np.degrees(number)
    pitch = np.concatenate([pitch, pitch[::-1] + 2.5])
    return Journey(looking(*(torch.from_numpy(np.deg2rad(angle)) for angle in (yaw, pitch))).numpy(), len(out))


def along(poses: np.ndarray, *, chunk_frames: int = 3) -> Journey:
    """A way of one's own: camera-to-world poses [n, 4, 4], in any coordinates and any unit, of which the half is given.

    It starts in the middle of the world, and its steps are shortened so that it goes no farther than .4 from there.
    Frames that fill no chunk are left out. Raises ValueError when no view is seen again in the half that is made.
    """
    poses = np.linalg.inv(poses[0]) @ poses[: len(poses) // chunk_frames * chunk_frames]
    farthest = np.linalg.norm(poses[:, :3, 3], axis=1).max(initial=0.0)
    poses[:, :3, 3] *= min(1.0, _FARTHEST / max(farthest, 1e-12))
    journey = Journey(poses, len(poses) // 2 // chunk_frames * chunk_frames)
    if not journey.given or not journey.seen_again():
        raise ValueError(
            f"along: poses must come back, in the second half, to views last seen {LEAST_GAP} frames ago or more "
            f"(from a camera within {_NEAR_DEGREES:g} degrees), got {len(poses)} frames that do not"
        )
    return journey


class Trip(NamedTuple):
    """What a model drew on a journey."""

    frames: torch.Tensor  # [frames, 3, height, width] in 0..1, on the CPU; those given as the codec leaves them
    plans: list[ChunkPlan]
    made_seconds: list[float]  # of each chunk that was made
    stats: dict[str, Any]  # of the memory at the end


@torch.no_grad()
def travel(
    model: WorldModel,
    memory: WorldMemory,
    world: torch.Tensor,
    journey: Journey,
    *,
    seed: int = 0,
    sigmas: tuple[float, ...] | None = None,
    on_chunk: Callable[[], None] = lambda: None,
) -> Trip:
    """Go on a journey through a world [3, height, width] on the CPU, with a memory that is new or reset.

    `seed` and `sigmas` as of models.rollout.rollout; `on_chunk` is called after each chunk.
    """
    given = encode(truth(world, journey)[: journey.given]) if journey.given else None
    latents, plans, seconds = [], [], []
    for chunk in rollout(model, memory, journey.poses, INTRINSICS, given=given, seed=seed, sigmas=sigmas):
        latents.append(chunk.latents.cpu())
        plans.append(chunk.plan)
        if chunk.plan.start_frame >= journey.given:
            seconds.append(chunk.seconds)
        on_chunk()
    return Trip(decode(torch.cat(latents)), plans, seconds, memory.stats())


class Fidelity(NamedTuple):
    """How true some of a trip's frames are, and what that took."""

    psnr: list[float]  # of each frame, dB
    ssim: float  # the mean
    tokens: float  # attended, the mean


def fidelity(trip: Trip, wanted: torch.Tensor, frames: Sequence[int]) -> Fidelity:
    """Of `frames` of a trip beside those wanted, both [all frames, 3, height, width]: `truth`, or an earlier visit."""
    got, want = trip.frames[list(frames)], wanted[list(frames)]
    chunk_frames = len(trip.frames) // len(trip.plans)
    tokens = [trip.plans[frame // chunk_frames].num_tokens for frame in frames]
    return Fidelity(psnr(got, want).tolist(), float(ssim(got, want).mean()), float(np.mean(tokens)))


def truth(world: torch.Tensor, journey: Journey) -> torch.Tensor:
    """What the camera sees of a world on the CPU on a journey, [frames, 3, 48, 64] in 0..1."""
    return pictures(world[None], torch.from_numpy(journey.poses[None]).float())[0]


def psnr(pictures: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Of pictures [frames, 3, height, width] in 0..1, dB [frames]; 100 at most."""
    return -10 * (pictures - truth).square().mean(dim=(1, 2, 3)).clamp_min(1e-10).log10()


def ssim(pictures: torch.Tensor, truth: torch.Tensor) -> np.ndarray:
    """Structural similarity of pictures [frames, 3, height, width] in 0..1, [frames]; by scikit-image."""
    from skimage.metrics import structural_similarity

    pairs = zip(pictures.numpy(), truth.numpy(), strict=True)
    return np.array([structural_similarity(a, b, channel_axis=0, data_range=1.0) for a, b in pairs])
