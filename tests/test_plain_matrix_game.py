"""Matrix-Game-2.0 restated plainly: what it does, and that models.matrix_game_2 agrees with it."""

import numpy as np
import pytest
import torch
from conftest import relative_error
from plain_matrix_game_actions import roll_in
from plain_matrix_game_pipeline import CausalInferenceStreamingPipeline
from small_matrix_game import (
    CHUNK_TOKENS,
    GRID,
    VISUAL_TOKENS,
    actions_of,
    conditions,
    first_noise,
    latents,
    pipeline,
    plain_model,
    published_config,
)

from worldkv_kernels.actions import Actions
from worldkv_kernels.memory.world_memory import WorldMemory
from worldkv_kernels.models.matrix_game_2 import MatrixGame2, MatrixGameConditions
from worldkv_kernels.models.matrix_game_config import MatrixGameConfig
from worldkv_kernels.models.rollout import rollout

WINDOWS = {"universal": 6, "gta_drive": 4, "templerun": 6}  # frames, as published


def ours(model, variant, mode, given, chunks):
    """Latents [frames, 16, height, width] of MatrixGame2 with a plain model's weights."""
    published = published_config(variant, WINDOWS[variant])
    config = MatrixGameConfig.from_published(published, grid=GRID, image_tokens=VISUAL_TOKENS)
    reference = MatrixGame2(config, dtype=torch.float32)
    reference.load_state_dict(model.state_dict())
    memory = WorldMemory(config.memory(mode=mode, bank_chunks=chunks), dtype=torch.float32)
    mouse = given["mouse_cond"][0].numpy() if "mouse_cond" in given else None
    actions = Actions(mouse, given["keyboard_cond"][0].numpy())
    image = MatrixGameConditions(given["visual_context"][0], given["cond_concat"][0])
    poses = np.tile(np.eye(4), (3 * chunks, 1, 1))
    made = rollout(reference, memory, poses, actions=actions, conditions=image)
    return torch.cat([chunk.latents for chunk in made])


@pytest.mark.parametrize("variant", ["universal", "gta_drive", "templerun"])
@pytest.mark.parametrize("mode", ["full", "sliding"])
def test_the_reference_model_agrees_over_chunks_with_the_window_full(variant, mode):
    chunks = 5
    model = plain_model(variant, WINDOWS[variant])
    given = conditions(*actions_of(variant, chunks))
    frames = 3 * chunks if mode == "full" else WINDOWS[variant]
    want = latents(pipeline(model, kv_cache_frames=frames), given, chunks, mode=variant)
    got = ours(model, variant, mode, given, chunks)
    errors = [relative_error(*pair) for pair in zip(got.split(3), want.split(3), strict=True)]
    assert max(errors) < 1e-5


def test_the_sliding_window_is_the_published_one():
    model = plain_model()
    given = conditions(*actions_of("universal", 4))
    published = latents(pipeline(model), given, 4)
    assert torch.equal(published, latents(pipeline(model, kv_cache_frames=6), given, 4))
    assert relative_error(latents(pipeline(model, kv_cache_frames=12), given, 4)[6:], published[6:]) > 1e-2


@pytest.mark.parametrize("name", ["mouse_cond", "keyboard_cond", "visual_context", "cond_concat"])
def test_every_condition_bears_on_the_latents(name):
    model = plain_model()
    given = conditions(*actions_of("universal", 2))
    changed = {**given, name: given[name].flip(-1)}
    first, second = (latents(pipeline(model), dictionary, 2) for dictionary in (given, changed))
    assert min(relative_error(*pair) for pair in zip(first.split(3), second.split(3), strict=True)) > 1e-2


def test_a_frame_sees_the_twelve_rows_before_its_last():
    module = plain_model().blocks[0].action_model
    seen = module.windows(torch.arange(21.0)[None, :, None], 3, 3)  # six latent frames
    assert seen.tolist() == [[list(range(first, first + 12)) for first in (0, 4, 8)]]
    seen = module.windows(torch.arange(9.0)[None, :, None] + 5, 0, 3)
    assert seen[0, 1].tolist() == [5.0] * 9 + [6.0, 7.0, 8.0]
    assert seen[0, 0].tolist() == [5.0] * 12


def test_a_cache_rolls_by_what_does_not_fit_and_overwrites_what_it_has():
    cache = {name: torch.zeros(1, 4, 1, 1) for name in ("k", "v")}
    cache |= {name: torch.tensor([0]) for name in ("global_end_index", "local_end_index")}
    for start, number, held in ((0, 1, [1, 1, 1, 0]), (3, 2, [1, 2, 2, 2]), (3, 3, [1, 3, 3, 3]), (6, 4, [3, 4, 4, 4])):
        new = torch.full((1, 3, 1, 1), float(number))
        end = roll_in(cache, new, -new, start + 3)
        assert cache["k"].flatten().tolist() == held
        assert torch.equal(cache["v"], -cache["k"])
        assert (end, cache["global_end_index"].item()) == (min(4, start + 3), start + 3)


def test_blocks_are_made_in_three_passes_and_a_clean_one():
    model = plain_model()
    passes = []
    original = model.forward

    def forward(*args, **kwargs):
        passes.append((kwargs["current_start"], kwargs["t"].unique().item(), kwargs["mouse_cond"].shape[1]))
        return original(*args, **kwargs)

    model.forward = forward
    latents(pipeline(model), conditions(*actions_of("universal", 2)), 2)
    levels = [1000 * 5 * s / (1 + 4 * s) for s in (1, 0.666, 0.333)]
    wanted = [(chunk * CHUNK_TOKENS, level, 9 + 12 * chunk) for chunk in (0, 1) for level in (*levels, 0)]
    assert [start for start, _, _ in passes] == [start for start, _, _ in wanted]
    assert [level for _, level, _ in passes] == pytest.approx([level for _, level, _ in wanted], rel=1e-6)
    assert [rows for _, _, rows in passes] == [rows for _, _, rows in wanted]


def test_the_streaming_pipeline_makes_what_its_actions_written_out_make():
    model = plain_model()
    mouse, keyboard = actions_of("universal", 3)
    pressed = [{"mouse": torch.randn(2), "keyboard": torch.tensor([1.0, 0, 0, 1])} for _ in range(3)]
    asked = iter(pressed)
    streaming = pipeline(model, CausalInferenceStreamingPipeline, get_current_action=lambda mode: next(asked))
    got = latents(streaming, conditions(mouse, keyboard), 3)
    for chunk, row in enumerate(pressed):
        rows = slice(max(0, 12 * chunk - 3), 12 * chunk + 9)
        mouse[:, rows], keyboard[:, rows] = row["mouse"], row["keyboard"]
    assert torch.equal(got, latents(pipeline(model), conditions(mouse, keyboard), 3))


def test_given_latents_are_the_past_of_what_is_made_after_them():
    model = plain_model()
    given = conditions(*actions_of("universal", 4))
    made = latents(pipeline(model), given, 4)
    initial = made[:6].transpose(0, 1)[None]
    with torch.no_grad():
        again = pipeline(model).inference(first_noise(4)[:, :, 6:], given, initial_latent=initial)
    assert relative_error(again[0].transpose(0, 1), made) < 1e-6
