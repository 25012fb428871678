"""Where a rollout came back to a view, and what was retrieved there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..memory.retrieval import PoseRetrieval
from ..poses import mean_pose, rotation_angles

_SHOWN_REVISITS = 5


class Revisit(NamedTuple):
    """A chunk, and of those retrieved for it the one made from the nearest camera pose."""

    chunk: int
    retrieved: tuple[int, ...]
    banked: int  # chunks that could be retrieved
    nearest: int
    sees_again: bool  # nearest is nearer than the chunk before: the camera has come back
    degrees: float  # between the mean orientations of chunk and nearest
    distance: float  # between their mean positions, in the trajectory's unit


def find_revisits(records: Sequence[dict[str, Any]], poses: np.ndarray, chunk_frames: int) -> list[Revisit]:
    """For each record that retrieved anything, the retrieved chunk of the nearest pose.

    Records are {"chunk", "retrieved", "banked"}; `poses` [n, 4, 4] are those of the latent frames. Sorted by how far
    back that chunk lies, farthest first.
    """
    means = [mean_pose(poses[i : i + chunk_frames]) for i in range(0, len(poses) - chunk_frames + 1, chunk_frames)]
    policy = PoseRetrieval()
    revisits = []
    for record in records:
        if not record["retrieved"]:
            continue
        chunk = record["chunk"]
        candidates = [(past, means[past]) for past in sorted(record["retrieved"])]
        (nearest,) = policy.select(means[chunk], candidates, 1)
        before = [*candidates, (chunk - 1, means[chunk - 1])]
        sees_again = nearest != chunk - 1 and policy.select(means[chunk], before, 1) == [nearest]
        angle = rotation_angles(means[chunk][None, :3, :3], means[nearest][None, :3, :3]).item()
        distance = np.linalg.norm(means[chunk][:3, 3] - means[nearest][:3, 3]).item()
        retrieved = tuple(record["retrieved"])
        revisits.append(
            Revisit(chunk, retrieved, record["banked"], nearest, sees_again, float(np.degrees(angle)), distance)
        )
    return sorted(revisits, key=lambda revisit: (revisit.nearest - revisit.chunk, revisit.chunk))


def retrieval_at_work(revisits: Sequence[Revisit]) -> str:
    """In words: how many chunks the camera came back in, and those that got back the oldest views."""
    again = sum(revisit.sees_again for revisit in revisits)
    seen = f"{again} of {len(revisits)} chunks see again what had left the window"
    lines = [f"retrieval at work: {seen}; first those that look back farthest"]
    for revisit in revisits[:_SHOWN_REVISITS]:
        retrieved = ", ".join(map(str, revisit.retrieved))
        lines.append(
            f"  chunk {revisit.chunk} got back {len(revisit.retrieved)} of {revisit.banked} banked, {retrieved}; the "
            f"nearest, chunk {revisit.nearest} from {revisit.chunk - revisit.nearest} chunks before, is "
            f"{revisit.degrees:.1f} degrees and {round(revisit.distance, 6):.3g} units away"
        )
    return "\n".join(lines)
