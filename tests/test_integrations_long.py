"""Two thousand chunks through the published models' own loops, far past what their tables number; slow."""

import numpy as np
import pytest
import small_lingbot
import small_matrix_game
import torch
from plain_lingbot_pipeline import camera_embedding

from worldkv_kernels import WorldMemory
from worldkv_kernels.actions import Actions, video_frames
from worldkv_kernels.integrations import matrix_game

CHUNKS = 2000  # 6000 frames; the models' tables have 1024
SIZES = dict(retrieved_chunks=2, bank_chunks=32, recent_frames=3, sink_frames=3)

pytestmark = pytest.mark.slow


class Retrieved:
    """What each chunk of a handle's memory retrieved, by wrapping begin_chunk of the class."""

    def __init__(self, monkeypatch, kind):
        self.plans, begin = [], kind.begin_chunk

        def noted(memory, *args, **options):
            self.plans.append(begin(memory, *args, **options))
            return self.plans[-1]

        monkeypatch.setattr(kind, "begin_chunk", noted)


def check(plans, stats, farthest):
    assert [plan.chunk for plan in plans] == list(range(CHUNKS))
    assert stats["chunks"] == CHUNKS and stats["chunks_banked"] == 32 and stats["chunks_retrieved"] > 2 * CHUNKS - 20
    back = [plan.chunk - min(plan.retrieved) for plan in plans if plan.retrieved]
    assert max(back) >= farthest  # not the newest alone
    for plan in plans[-50:]:  # and still next to the chunk that is made
        frames = [3 * chunk + segment.time_shift for role, chunk, segment in plan.segments if role != "current"]
        assert all(0 <= plan.start_frame - frame <= 3 * 5 for frame in frames)


def test_lingbots_loop(monkeypatch):
    period = 8  # chunks, after which the camera is where it was
    frames = 3 * period
    there = small_lingbot.POSES
    poses = np.concatenate([there, there[::-1]])[:frames]
    twice = camera_embedding(
        torch.from_numpy(np.concatenate([poses, poses])), small_lingbot.INTRINSICS[0],
        8 * small_lingbot.HEIGHT, 8 * small_lingbot.WIDTH,
    )  # fmt: skip
    again = twice[:, :, frames:].repeat(1, 1, CHUNKS // period - 1, 1, 1)
    camera = torch.cat([twice[:, :, :frames], again], dim=2)
    image = small_lingbot.IMAGE[:, :1].expand(-1, 3 * CHUNKS, -1, -1)
    model = small_lingbot.make_model()
    with small_lingbot.enable(model, np.tile(poses, (CHUNKS // period, 1, 1)), mode="worldkv", **SIZES) as handle:
        seen = Retrieved(monkeypatch, WorldMemory)
        arguments = small_lingbot.TEXT, image, camera, small_lingbot.pipeline_noise, [(1.0, 1000.0)]
        latents = small_lingbot.pipeline.WanI2VFast(model).generate(*arguments)
        assert latents.isfinite().all() and latents.shape[1] == 3 * CHUNKS
        check(seen.plans, handle.stats(), period)


def test_matrix_games_loop(monkeypatch):
    rows = video_frames(3 * CHUNKS)
    mouse, keyboard = np.zeros((rows, 2)), np.zeros((rows, 4))
    mouse[:, 1] = 0.1 * np.sign(np.sin(2 * np.pi * np.arange(rows) / 96))  # looks right, then left, for 48 rows each
    given = small_matrix_game.given_of(Actions(mouse.astype(np.float32), keyboard.astype(np.float32)))
    model = small_matrix_game.plain_model()
    with matrix_game.enable(model, grid=(2, 3), **SIZES) as handle:
        seen = Retrieved(monkeypatch, WorldMemory)
        latents = small_matrix_game.latents(small_matrix_game.pipeline(model), given, CHUNKS)
        assert latents.isfinite().all() and len(latents) == 3 * CHUNKS
        check(seen.plans, handle.stats(), 100)
