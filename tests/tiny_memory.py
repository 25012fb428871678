"""Sizes of a very small SmallWorld, memories for it, and chunks of random numbers at poses near and far."""

from __future__ import annotations

import numpy as np
import torch

from worldkv_kernels import WorldMemory
from worldkv_kernels.models.rollout import rollout
from worldkv_kernels.models.small_world import SmallWorld, SmallWorldConfig
from worldkv_kernels.trajectory import latent_poses, load

MODEL = SmallWorldConfig(num_layers=2, num_heads=1, ffn_dim=64, grid=(2, 3))
AWAY_AND_BACK = latent_poses(load("right*300,left*300,forward*300,left*299"))  # 100 chunks


def latents(memory: WorldMemory, poses: np.ndarray = AWAY_AND_BACK[0]) -> torch.Tensor:
    model = SmallWorld.random(MODEL, device="cpu", dtype=torch.float32)
    made = list(rollout(model, memory, poses, AWAY_AND_BACK[1][: len(poses)], sigmas=(1.0,)))
    return torch.stack([chunk.latents for chunk in made])


def tiny(**fields) -> WorldMemory:
    return WorldMemory(MODEL.memory(**{"retrieved_chunks": 3, "bank_chunks": 40, **fields}), dtype=torch.float32)


def walk(memory: WorldMemory, chunk: int, poses: np.ndarray, **options) -> tuple[int, ...]:
    """A chunk of random numbers; what was retrieved."""
    plan = memory.begin_chunk(poses, **options)
    passes(memory, chunk)
    memory.end_chunk()
    return plan.retrieved


def passes(memory: WorldMemory, chunk: int) -> None:
    generator = torch.Generator().manual_seed(chunk)
    for layer in range(MODEL.num_layers):
        memory.attend(layer, *torch.randn(3, memory.config.chunk_tokens, MODEL.dim, generator=generator))


def jumps(seed: int, chunks: int) -> list[np.ndarray]:
    """Poses of chunks all over the place, near to earlier ones or not."""
    poses = np.tile(np.eye(4), (chunks, 3, 1, 1))
    poses[:, :, :3, 3] = np.random.default_rng(seed).normal(size=(chunks, 1, 3))
    return list(poses)
