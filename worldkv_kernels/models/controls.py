"""Controls: what steers a rollout, chunk by chunk, cut out of a trajectory or as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..actions import ActionIntegrator, Actions, video_frames
from ..memory.world_memory import WorldMemory
from ..poses import as_intrinsics, as_poses

if TYPE_CHECKING:
    from .rollout import WorldModel


class Controls(NamedTuple):
    """What steers one chunk."""

    poses: np.ndarray | None  # camera-to-world [chunk_frames, 4, 4] of its latent frames, OpenCV coordinates
    intrinsics: np.ndarray | None = None  # fx, fy, cx, cy in pixels, [chunk_frames, 4]
    actions: Actions | None = None  # of the whole video up to the chunk's last frame
    conditions: Any = None  # from this chunk on, of the model's own kind, such as another prompt; None: as before


def along(
    op: str, model: WorldModel, memory: WorldMemory, poses: object, intrinsics: object, actions: Actions | None
) -> tuple[Callable[[int], Iterator[Controls]], int]:
    """The controls from a chunk on along a trajectory, which is checked, and how many latent frames that has."""
    frames = model.chunk_frames
    if poses is not None:
        poses = as_poses(op, poses)
        latent_frames = len(poses)
    elif memory.integrator is None or actions is None:
        raise ValueError(f"{op}: poses must be [n, 4, 4], or None with actions that the memory goes by, got None")
    else:
        latent_frames = (len(actions.keyboard) + 3) // 4
    if intrinsics is not None:
        intrinsics = as_intrinsics(op, intrinsics, latent_frames)
    if latent_frames < frames:
        source = "actions" if poses is None else "poses"
        raise ValueError(f"{op}: {source} must be of at least chunk_frames={frames} latent frames, got {latent_frames}")
    for name, rows in (actions._asdict() if actions is not None else {}).items():
        least = video_frames(latent_frames // frames * frames)
        if rows is not None and len(rows) < least:
            raise ValueError(f"{op}: actions must have a row for {least} video frames, got {len(rows)} of {name}")

    def controls(first_chunk: int) -> Iterator[Controls]:
        for first in range(first_chunk * frames, latent_frames - frames + 1, frames):
            rows = slice(first, first + frames)
            done = actions.until(video_frames(rows.stop)) if actions is not None else None
            yield Controls(*(array if array is None else array[rows] for array in (poses, intrinsics)), done)

    return controls, latent_frames


def steered(
    controls: Controls, start_frame: int, frames: int, integrator: ActionIntegrator | None
) -> tuple[Controls, dict[str, Any]]:
    """The controls with poses, and what begin_chunk is given of them."""
    rows = controls.actions.of_frames(start_frame, frames) if controls.actions is not None else None
    of_memory = {"actions": rows}
    if integrator is None:
        of_memory = {"poses": controls.poses, "intrinsics": controls.intrinsics}
    integrated = integrator.advance(*rows) if integrator is not None and rows is not None else None
    if controls.poses is None:
        if integrated is None:
            raise ValueError("rollout: controls must have poses, or actions that the memory goes by, got neither")
        controls = controls._replace(poses=integrated)
    return controls, of_memory
