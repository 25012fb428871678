"""Our LingBot-World-Fast against the plain restatement of the published one, with the same weights and noise."""

import dataclasses
import functools

import numpy as np
import plain_lingbot as plain
import plain_lingbot_pipeline as pipeline
import pytest
import torch
from conftest import relative_error

from worldkv_kernels import Actions, WorldMemory
from worldkv_kernels.models.lingbot_camera import longest_step
from worldkv_kernels.models.lingbot_config import LingBotConfig
from worldkv_kernels.models.lingbot_world_fast import LingBotConditions, LingBotWorldFast
from worldkv_kernels.models.rollout import noise, rollout
from worldkv_kernels.trajectory import latent_poses, load

GRID = (2, 3)
HEIGHT, WIDTH = 4, 6  # in latents
FRAMES = 15  # 5 chunks of 3
CONFIG = LingBotConfig(
    num_layers=2, num_heads=2, head_dim=64, ffn_dim=160, grid=GRID, text_tokens=7, text_dim=24, frequency_dim=16
)
POSES, INTRINSICS = latent_poses(load("right*20,forward*16,left*20"))
TEXT, IMAGE = (
    torch.randn(5, 24, generator=torch.Generator().manual_seed(1)),
    torch.randn(20, FRAMES, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2)),
)


def published(control_type="cam", seed=0):
    model = plain.WanModelFast(
        control_type, text_len=7, dim=128, ffn_dim=160, freq_dim=16, text_dim=24, num_heads=2, num_layers=2
    ).eval()
    pipeline.draw_weights(model, seed)
    return model


@functools.cache
def camera(keys=None):
    keys = None if keys is None else torch.tensor(keys)
    return pipeline.camera_embedding(torch.from_numpy(POSES[:FRAMES]), INTRINSICS[0], 8 * HEIGHT, 8 * WIDTH, keys)


def published_latents(model, sigmas=CONFIG.sigmas, *, keys=None, chunk_size=3, **options):
    """[frames, channels, height, width]"""
    video = pipeline.WanI2VFast(model).generate(
        TEXT,
        IMAGE,
        camera(keys),
        lambda chunk, step, shape: noise(0, chunk, step, (shape[1], shape[0], *shape[2:])).transpose(0, 1),
        sampler=[(sigma, 1000 * sigma) for sigma in sigmas],
        chunk_size=chunk_size,
        **options,
    )
    return video.transpose(0, 1)


def our_latents(model, mode, config=CONFIG, *, actions=None, **options):
    ours = LingBotWorldFast(config, dtype=torch.float32)
    ours.load_state_dict(model.state_dict(), strict=True)
    memory = WorldMemory(config.memory(mode=mode, bank_chunks=20, **options), dtype=torch.float32)
    conditions = LingBotConditions(TEXT, IMAGE, longest_step(POSES[:FRAMES]))
    chunks = rollout(ours, memory, POSES[:FRAMES], INTRINSICS[:FRAMES], actions=actions, conditions=conditions)
    return torch.cat([chunk.latents for chunk in chunks])


# Mode and frames of the memory, and the rolling cache that is the same: window with the current chunk, and sink.
WINDOWS = [
    ("full", {}, {}),
    ("sliding", {"recent_frames": 3}, {"window": 6}),
    ("sliding", {"recent_frames": 6}, {"window": 9}),
    ("sink_recent", {"sink_frames": 3, "recent_frames": 3}, {"window": 9, "sink_size": 3}),
    ("sink_recent", {"sink_frames": 6, "recent_frames": 3}, {"window": 12, "sink_size": 6}),
]


@pytest.mark.parametrize(("mode", "ours", "theirs"), WINDOWS)
def test_our_model_agrees_with_the_published_one(mode, ours, theirs):
    model = published()
    wanted, got = published_latents(model, **theirs), our_latents(model, mode, **ours)
    assert got.shape == wanted.shape == (FRAMES, 16, HEIGHT, WIDTH)
    for chunk in range(5):
        frames = slice(3 * chunk, 3 * chunk + 3)
        assert relative_error(got[frames], wanted[frames]) < 1e-5


def test_the_windows_of_these_tests_are_told_apart():
    model = published()
    rollouts = [published_latents(model, **theirs)[-3:] for _, _, theirs in WINDOWS]
    for index, one in enumerate(rollouts):
        assert all(relative_error(one, other) > 1e-2 for other in rollouts[:index])


def test_control_by_keys_agrees_with_the_published_one():
    model = published("act")
    keyboard = np.random.default_rng(0).integers(0, 2, (4 * FRAMES - 3, 4))
    wanted = published_latents(model, keys=tuple(map(tuple, keyboard[::4].tolist())))
    config = dataclasses.replace(CONFIG, control="action")
    assert relative_error(our_latents(model, "full", config, actions=Actions(None, keyboard)), wanted) < 1e-5
    other = our_latents(model, "full", config, actions=Actions(None, 1 - keyboard))
    assert relative_error(other, wanted) > 1e-2


@pytest.mark.parametrize("chunk_frames", [1, 5])
def test_chunks_of_other_lengths_agree_with_the_published_one(chunk_frames):
    model = published()
    config = dataclasses.replace(CONFIG, chunk_frames=chunk_frames, sink_frames=0, recent_frames=5)
    wanted = published_latents(model, chunk_size=chunk_frames, window=5 + chunk_frames)
    assert relative_error(our_latents(model, "sliding", config), wanted) < 1e-5


def test_noise_levels_of_version_2_agree_with_the_published_one():
    model, sigmas = published(), LingBotConfig.v2_14b().sigmas
    wanted = published_latents(model, sigmas)
    got = our_latents(model, "full", dataclasses.replace(CONFIG, sigmas=sigmas))
    assert relative_error(got, wanted) < 1e-5


def test_our_noise_levels_are_near_the_published_schedule():
    for config, schedule in (
        (LingBotConfig.fast(), pipeline.schedule()),
        (LingBotConfig.v2_14b(), pipeline.schedule((0, 250, 500, 750), 10.0)),
    ):
        for sigma, (published_sigma, timestep) in zip(config.sigmas, schedule, strict=True):
            assert abs(sigma - published_sigma) < 1e-3 and 0 <= 1000 * sigma - timestep < 2
