"""Views: where the camera is in a chunk, as given, as integrated from actions, or as its motion leads on; or what it
looks like, where retrieval is by content."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..actions import IntegratorState, as_actions
from ..poses import as_intrinsics, as_poses, mean_pose
from .config import MemoryConfig
from .contents import as_content
from .retrieval import ActionRetrieval, RetrievalPolicy, goes_by_content


class View(NamedTuple):
    """A chunk's camera, checked; where retrieval is by content a description alone, of the one begun what is asked for,
    a vector, and of one of history its content."""

    poses: np.ndarray | None = None  # [chunk_frames, 4, 4]
    intrinsics: np.ndarray | None = None  # [chunk_frames, 4], where the policy needs them
    description: Any = None  # the policy's, where there is a bank
    after_actions: IntegratorState | None = None  # where the integrator is at the chunk's end
    asked: bool = False  # whether the caller said what is asked for


class Views:
    """Checks what a caller says of a chunk's camera, and has the retrieval policy describe it.

    `integrator` turns actions into poses; None where retrieval is not by action.
    """

    def __init__(self, config: MemoryConfig, policy: RetrievalPolicy) -> None:
        self._config, self._policy = config, policy
        self.integrator = policy.integrator.fresh() if isinstance(policy, ActionRetrieval) else None
        self.by_content = goes_by_content(policy)

    def of(
        self,
        op: str,
        chunk: int,
        poses: object,
        intrinsics: object,
        actions: object,
        query: object = None,
        *,
        start: IntegratorState | None = None,
        content: np.ndarray | None = None,
    ) -> View:
        """The view of `chunk`, whose actions start at `start`, None for where the integrator is; it stays there.
        `content` is that of the chunk before, None where there is none.

        Raises ValueError or TypeError naming `op` as WorldMemory.begin_chunk says.
        """
        after = None
        if self.integrator is not None:
            poses, after = self._integrated(op, chunk, poses, actions, start or self.integrator.state)
        elif actions is not None:
            policy, got = type(self._policy).__name__, type(actions).__name__
            raise ValueError(f"{op}: actions must be None for retrieval by {policy}, got {got}")
        frames, has_bank = self._config.chunk_frames, self._config.has_bank
        if query is not None and not self.by_content:
            policy, got = type(self._policy).__name__, type(query).__name__
            raise ValueError(f"{op}: query must be None for retrieval by {policy}, got {got}")
        if self.by_content:
            if poses is not None:
                as_poses(op, poses, frames)
            if not has_bank:
                return View()
            if query is not None:
                return View(description=as_content(op, "query", query, ("dim",), content), asked=True)
            return View(description=None if content is None else content[-1])
        if poses is None:
            if has_bank:
                raise ValueError(f"{op}: poses must be [{frames}, 4, 4] in mode 'worldkv', got None")
            return View(after_actions=after)
        checked = as_poses(op, poses, frames)
        if not has_bank:
            return View(checked, after_actions=after)
        cameras = None
        if self._policy.needs_intrinsics:
            if intrinsics is None:
                raise ValueError(f"{op}: intrinsics must be [{frames}, 4] for this retrieval policy, got None")
            cameras = as_intrinsics(op, intrinsics, frames)
        return View(checked, cameras, self._policy.describe(checked, cameras), after)

    def following(self, before: View, now: View) -> Any:
        """The description of the view after `now`, if the camera goes on as it went from `before` to `now`."""
        return self._policy.describe(continued(before.poses, now.poses), now.intrinsics)

    def _integrated(
        self, op: str, chunk: int, poses: object, actions: object, start: IntegratorState
    ) -> tuple[np.ndarray | None, IntegratorState]:
        """The poses that the actions lead to, and where they end."""
        if poses is not None:
            got = type(poses).__name__
            raise ValueError(f"{op}: poses must be None for retrieval by ActionRetrieval, got {got}")
        rows = 4 * self._config.chunk_frames - (0 if chunk else 3)
        if actions is None:
            if self._config.has_bank:
                raise ValueError(f"{op}: actions must be of {rows} rows in mode 'worldkv', got None")
            return None, start
        checked = as_actions(op, actions, self.integrator.layout_name, rows)
        if not self._config.has_bank:
            return None, start
        stands = self.integrator.state
        self.integrator.restore(start)
        try:
            return self.integrator.advance(*checked), self.integrator.state
        finally:
            self.integrator.restore(stands)


def continued(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Poses [frames, 4, 4] of the chunk after `now`, at the velocity from `before` to `now`.

    The velocity is constant in SE(3), in the camera's own frame: what takes the frames of `before` to those of `now`,
    on the mean, is applied to each of `now` once more. Lines, turns, circles and helices go on exactly.
    """
    back = before[:, :3, :3].transpose(0, 2, 1)
    steps = np.tile(np.eye(4), (len(now), 1, 1))
    steps[:, :3, :3] = back @ now[:, :3, :3]
    steps[:, :3, 3:] = back @ (now[:, :3, 3:] - before[:, :3, 3:])
    return now @ mean_pose(steps)
