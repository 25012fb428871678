"""A small LingBot-World-Fast, plain, with what a rollout of it needs; for the tests of its integration."""

import types

import plain_lingbot as plain
import plain_lingbot_pipeline as pipeline
import torch

from worldkv_kernels import WorldMemory
from worldkv_kernels.integrations import lingbot
from worldkv_kernels.models.lingbot_camera import longest_step
from worldkv_kernels.models.lingbot_config import LingBotConfig
from worldkv_kernels.models.lingbot_world_fast import LingBotConditions, LingBotWorldFast
from worldkv_kernels.models.rollout import noise, rollout
from worldkv_kernels.trajectory import latent_poses, load

GRID, HEIGHT, WIDTH, FRAMES, CHUNKS = (2, 3), 4, 6, 24, 8
TOKENS = 18  # of a chunk
POSES, INTRINSICS = (rows[:FRAMES] for rows in latent_poses(load("right*30,forward*36,left*30")))
CAMERA = pipeline.camera_embedding(torch.from_numpy(POSES), INTRINSICS[0], 8 * HEIGHT, 8 * WIDTH)
TEXT = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
IMAGE = torch.randn(20, FRAMES, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2))
SIGMAS = LingBotConfig().sigmas
WORLDKV = dict(mode="worldkv", sink_frames=3, recent_frames=3, retrieved_chunks=2, bank_chunks=9)


def make_model(dtype=torch.float32, **options):
    sizes = dict(text_len=7, dim=128, ffn_dim=160, freq_dim=16, text_dim=24, num_heads=2, num_layers=2)
    model = plain.WanModelFast(**{**sizes, **options}).eval().requires_grad_(False)
    pipeline.draw_weights(model)
    return model.to(dtype)


def pipeline_noise(chunk, step, shape):
    return noise(0, chunk, step, (shape[1], shape[0], *shape[2:])).transpose(0, 1)


def generate(model, frames=FRAMES, *, pipe=None, **options):
    """Latents [frames, channels, height, width] of the pipeline's own code."""
    sampler = [(sigma, 1000 * sigma) for sigma in SIGMAS]
    device = model.blocks[0].self_attn.v.weight.device
    given = (x.to(device) for x in (TEXT, IMAGE[:, :frames], CAMERA[:, :, :frames]))

    def drawn(*place):
        return pipeline_noise(*place).to(device)

    arguments = *given, drawn, sampler
    return (pipe or pipeline.WanI2VFast(model)).generate(*arguments, **options).transpose(0, 1)


def enable(model, poses=POSES, **options):
    return lingbot.enable(model, **{"poses": poses, "mode": "full", "bank_chunks": 9, **options})


class KeepsItsCaches(pipeline.WanI2VFast):
    """A pipeline that makes its caches once, and begins a rollout by setting their indices to 0, as Self-Forcing's."""

    kept = None

    def caches(self, *sizes):
        if self.kept is None:
            self.kept = super().caches(*sizes)
        for cache in self.kept[0]:
            cache["global_end_index"], cache["local_end_index"] = torch.tensor([0]), torch.tensor([0])
        for cache in self.kept[1]:
            cache["is_init"] = torch.tensor(0)
        return self.kept


def reference_rollout(model, config):
    """Latents and memory of our own model with the same weights."""
    sizes = dict(num_layers=2, num_heads=2, head_dim=64, ffn_dim=160, text_tokens=7, text_dim=24, frequency_dim=16)
    ours = LingBotWorldFast(LingBotConfig(grid=GRID, **sizes), dtype=torch.float32)
    ours.load_state_dict(model.state_dict())
    memory = WorldMemory(config, dtype=torch.float32)
    conditions = LingBotConditions(TEXT, IMAGE, longest_step(POSES))
    chunks = list(rollout(ours, memory, POSES, INTRINSICS, conditions=conditions))
    return torch.cat([chunk.latents for chunk in chunks]), memory


def caches(length=FRAMES * TOKENS // 3):
    model = types.SimpleNamespace(config=types.SimpleNamespace(dim=128, num_heads=2, num_layers=2))
    return pipeline.WanI2VFast(model).caches(length, torch.float32)


def forward(model, chunk, timestep=1000.0, *, both=None, video=None, start=None, **options):
    """One forward of the model, as the pipeline calls it."""
    kv_cache, crossattn_cache = both or caches()
    frames = slice(3 * chunk, 3 * chunk + 3)
    x = [torch.zeros(16, 3, HEIGHT, WIDTH)] if video is None else video
    arguments = dict(
        context=[TEXT] * len(x),
        seq_len=4 * TOKENS,
        y=[torch.zeros(20, *latents.shape[1:]) for latents in x],
        dit_cond_dict={"c2ws_plucker_emb": (CAMERA[:, :, frames],)},
        kv_cache=kv_cache,
        crossattn_cache=crossattn_cache,
        current_start=chunk * TOKENS if start is None else start,
        **options,
    )
    with torch.no_grad():
        return model(x=x, t=torch.tensor([timestep]), **arguments)[0]
