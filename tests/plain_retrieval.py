"""Retrieval by brute force: all distances anew in every call, from the chunks' descriptions alone."""

from __future__ import annotations

import math

import numpy as np

from worldkv_kernels.memory.retrieval import (
    ActionRetrieval,
    ContentRetrieval,
    FovRetrieval,
    NearestPolicy,
    PoseRetrieval,
)

TIE = 1e-6


def pose_distances(a: np.ndarray, b: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Between poses a [n, 4, 4] and b [m, 4, 4], on the scale that `now` [4, 4] against b sets."""

    def squares(x, y):
        return np.square(x[:, None, :3, 3] - y[None, :, :3, 3]).sum(axis=2)

    def angles(x, y):
        chord = np.linalg.norm(x[:, None, :3, :3] - y[None, :, :3, :3], axis=(2, 3)) / (2 * math.sqrt(2))
        return 2 * np.arcsin(np.clip(chord, 0.0, 1.0))

    def share(distances, largest, noise):
        return distances / largest if largest > noise else np.zeros_like(distances)

    extent = max(np.abs(poses[:, :3, 3]).max() for poses in (a, b, now[None]))
    dt = share(squares(a, b), squares(now[None], b).max(), max(1e-5 * extent, 1e-6) ** 2)
    return 0.5 * dt + 0.5 * share(angles(a, b), angles(now[None], b).max(), 1e-4)


class Plain:
    """What NearestPolicy says in words, of PoseRetrieval, ActionRetrieval or FovRetrieval."""

    def __init__(self, policy: NearestPolicy) -> None:
        self.policy, self.by_fov = policy, isinstance(policy, FovRetrieval)
        assert isinstance(policy, PoseRetrieval | ActionRetrieval | FovRetrieval)

    def distances(self, views, others, current) -> np.ndarray:
        if not self.by_fov:
            return pose_distances(np.stack(views), np.stack(others), current)
        overlap = np.array([[self.seen(b[2], a) + self.seen(a[2], b) for b in others] for a in views])
        poses = [np.stack([view[0] for view in some]) for some in (views, others)]
        return np.where(overlap > 0, 1.0 - overlap / 2, 1.0 + pose_distances(*poses, current[0]))

    def seen(self, points: np.ndarray, view) -> float:
        pose, (fx, fy, cx, cy, height, width), _ = view
        near, far = self.policy.depth_range
        local = (points - pose[:3, 3]) @ pose[:3, :3]
        z = local[:, 2]
        ahead = (z >= near * (1 - 1e-6)) & (z <= far * (1 + 1e-6))
        depth = np.where(ahead, z, 1.0)
        u, v = local[:, 0] / depth * fx + cx, local[:, 1] / depth * fy + cy
        return (ahead & (u >= 0) & (u <= width) & (v >= 0) & (v <= height)).mean()

    def select(self, current, candidates: dict, budget: int) -> list[int]:
        chunks, views, picked = list(candidates), list(candidates.values()), []
        if not views:
            return []
        to_current, to_picked = self.distances([current], views, current)[0], np.full(len(views), np.inf)
        while len(picked) < min(budget, len(views)):
            score = to_current - (self.policy.diversity * to_picked if picked and self.policy.diversity else 0.0)
            score[picked] = np.inf
            picked.append(int(np.flatnonzero(score <= score.min() + TIE)[0]))
            to_picked = np.minimum(to_picked, self.distances([views[picked[-1]]], views, current)[0])
        return [chunks[place] for place in picked]

    def drop(self, candidates: dict) -> int:
        chunks = list(candidates)
        poses = np.stack([view[0] if self.by_fov else view for view in candidates.values()])
        if len(chunks) == 1:
            return chunks[0]
        pairs = np.triu_indices(len(chunks), k=1)
        scores = pose_distances(poses, poses, poses[-1])[pairs]
        return chunks[pairs[1][np.flatnonzero(scores <= scores.min() + TIE)[0]]]


class PlainContents:
    """What ContentRetrieval says in words, in float64."""

    def __init__(self, policy: ContentRetrieval) -> None:
        self.policy = policy

    def select(self, current, candidates: dict, budget: int) -> list[int]:
        chunks, picked = list(candidates), []
        newest = chunks[-self.policy.skip_newest :] if 0 < self.policy.skip_newest < len(chunks) else []
        for some in ([chunk for chunk in chunks if chunk not in newest], newest):
            budget_of = min(budget - len(picked), len(some))
            while budget_of > 0:
                score = {chunk: self.score(current, chunk, candidates, newest, picked) for chunk in some}
                score = {chunk: of for chunk, of in score.items() if chunk not in picked}
                picked.append(min(chunk for chunk, of in score.items() if of <= min(score.values()) + TIE))
                budget_of -= 1
        return picked

    def score(self, current, chunk: int, candidates: dict, newest: list[int], picked: list[int]) -> float:
        def away(one) -> float:
            return min(np.square(current.astype(float) - vector).sum() for vector in one.astype(float))

        scale = max(away(content) for other, content in candidates.items() if other not in newest) or 1.0
        bonus = 0.0
        if picked and self.policy.diversity:
            bonus = min(min(apart(candidates[one], candidates[chunk]) / scale, 1.0) for one in picked)
        return min(away(candidates[chunk]) / scale, 1.0) - self.policy.diversity * bonus

    def drop(self, candidates: dict) -> int:
        chunks, contents = list(candidates), list(candidates.values())
        if len(chunks) == 1:
            return chunks[0]
        scale = max(apart(contents[-1], content) for content in contents) or 1.0
        pairs = np.triu_indices(len(chunks), k=1)
        scores = np.array([apart(contents[i], contents[j]) / scale for i, j in zip(*pairs, strict=True)])
        return chunks[pairs[1][np.flatnonzero(scores <= scores.min() + TIE)[0]]]


def apart(one: np.ndarray, other: np.ndarray) -> float:
    squares = np.square(one.astype(float)[:, None] - other.astype(float)[None]).sum(axis=2)
    return 0.5 * (squares.min(axis=0).mean() + squares.min(axis=1).mean())
