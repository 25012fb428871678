"""Other conditions from a chunk on: the memory keeps the past, in the models' own pipelines and in a rollout."""

import numpy as np
import plain_lingbot_pipeline as lingbot_pipeline
import pytest
import small_lingbot as lingbot_model
import small_matrix_game as matrix_model
import torch
from conftest import relative_error
from plain_matrix_game_pipeline import CausalInferencePipeline
from recorded_pass import recorded
from small_lingbot import CHUNKS, GRID, IMAGE, INTRINSICS, POSES, TEXT, WORLDKV

from worldkv_kernels import WorldMemory
from worldkv_kernels.actions import parse_actions
from worldkv_kernels.integrations import lingbot, matrix_game
from worldkv_kernels.models import graphs
from worldkv_kernels.models.lingbot_camera import longest_step
from worldkv_kernels.models.lingbot_config import LingBotConfig
from worldkv_kernels.models.lingbot_world_fast import LingBotConditions, LingBotWorldFast
from worldkv_kernels.models.matrix_game_2 import MatrixGame2, MatrixGameConditions
from worldkv_kernels.models.matrix_game_config import MatrixGameConfig
from worldkv_kernels.models.rollout import Controls, Rollout
from worldkv_kernels.models.small_world import SmallWorld, SmallWorldConfig

CHANGED_AT = 3  # chunk
OTHER_TEXT = torch.randn(4, 24, generator=torch.Generator().manual_seed(7))
GLANCE = parse_actions("J*28,L*28")  # 15 latent frames, 5 chunks


class OtherPrompt(lingbot_pipeline.WanI2VFast):
    def prompt(self, context, chunk, crossattn_cache):
        if chunk == CHANGED_AT:
            for cache in crossattn_cache:
                cache["is_init"] = torch.tensor(0)
        return context if chunk < CHANGED_AT else OTHER_TEXT


def reference_lingbot(model, **options):
    """Our model of the same weights, with the controls of a rollout whose prompt changes."""
    sizes = dict(num_layers=2, num_heads=2, head_dim=64, ffn_dim=160, text_tokens=7, text_dim=24, frequency_dim=16)
    ours = LingBotWorldFast(LingBotConfig(grid=GRID, **sizes), dtype=torch.float32, **options)
    ours.load_state_dict(model.state_dict())
    first = LingBotConditions(TEXT, IMAGE, longest_step(POSES))
    return ours, first, first._replace(text=OTHER_TEXT)


def lingbot_controls(other, first_chunk=0, end=CHUNKS):
    for chunk in range(first_chunk, end):
        rows = slice(3 * chunk, 3 * chunk + 3)
        yield Controls(POSES[rows], INTRINSICS[rows], conditions=other if chunk == CHANGED_AT else None)


def latents_of(chunks):
    return torch.cat([chunk.latents for chunk in chunks])


def test_lingbots_own_pipeline_with_another_prompt_keeps_the_past():
    model = lingbot_model.make_model()
    unchanged, wanted = lingbot_model.generate(model), lingbot_model.generate(model, pipe=OtherPrompt(model))
    made = 3 * CHANGED_AT
    assert torch.equal(wanted[:made], unchanged[:made]) and relative_error(wanted[made:], unchanged[made:]) > 1e-2
    with lingbot_model.enable(model) as handle:  # all of the past, as in the model's own cache
        got = lingbot_model.generate(model, pipe=OtherPrompt(model))
        assert handle.stats()["chunks"] == CHUNKS
    assert relative_error(got, wanted) < 1e-5


def test_lingbots_own_pipeline_and_the_reference_model_change_alike():
    model = lingbot_model.make_model()
    config = lingbot.memory_config(model, grid=GRID, **WORLDKV)
    ours, first, other = reference_lingbot(model)
    memory = WorldMemory(config, dtype=torch.float32)
    wanted = latents_of(Rollout(ours, memory, lingbot_controls(other), conditions=first))
    with lingbot.enable(model, config, poses=POSES) as handle:
        got = lingbot_model.generate(model, pipe=OtherPrompt(model))
        assert handle.stats() == memory.stats() and handle.stats()["chunks_retrieved"] > 4
    assert relative_error(got, wanted) < 1e-5


class OtherImage(CausalInferencePipeline):
    """From a chunk on, what the image encoder says is of another image."""

    def _condition(self, conditional_dict, start_frame, mode):
        if start_frame >= 3 * CHANGED_AT:
            conditional_dict = {**conditional_dict, "visual_context": -conditional_dict["visual_context"]}
        if start_frame == 3 * CHANGED_AT:
            for cache in self.crossattn_cache:
                cache["is_init"] = False
        return super()._condition(conditional_dict, start_frame, mode)


def test_matrix_games_own_pipeline_with_another_image_keeps_the_past():
    given = matrix_model.given_of(GLANCE)
    model = matrix_model.plain_model()
    long_cache = matrix_model.pipeline(matrix_model.plain_model(), OtherImage, kv_cache_frames=15)
    wanted = matrix_model.latents(long_cache, given, 5)
    options = dict(grid=GRID, bank_chunks=12, retrieved_chunks=1)
    with matrix_game.enable(model, matrix_game.memory_config(model, mode="full", **options)) as handle:
        got = matrix_model.latents(matrix_model.pipeline(model, OtherImage), given, 5)
        assert handle.stats()["chunks"] == 5
        handle.restart()
        unchanged = matrix_model.latents(matrix_model.pipeline(model), given, 5)
    assert relative_error(got, wanted) < 1e-5 and relative_error(got[9:], unchanged[9:]) > 1e-2

    config = matrix_game.memory_config(model, **options)
    sizes = MatrixGameConfig.from_published(
        matrix_model.published_config("universal"), grid=GRID, image_tokens=matrix_model.VISUAL_TOKENS
    )
    ours = MatrixGame2(sizes, dtype=torch.float32)
    ours.load_state_dict(model.state_dict())
    first = MatrixGameConditions(given["visual_context"][0], given["cond_concat"][0])
    other = first._replace(image_tokens=-first.image_tokens)

    def controls():
        for chunk in range(5):
            conditions = other if chunk == CHANGED_AT else None
            yield Controls(None, actions=GLANCE.until(12 * chunk + 9), conditions=conditions)

    wanted = latents_of(Rollout(ours, WorldMemory(config, dtype=torch.float32), controls(), conditions=first))
    with matrix_game.enable(model, config) as handle:
        got = matrix_model.latents(matrix_model.pipeline(model, OtherImage), given, 5)
        assert handle.stats()["chunks_retrieved"]
    assert relative_error(got, wanted) < 2e-5


@pytest.mark.parametrize("hoist", [True, False])
def test_conditions_of_the_first_chunk_are_the_rollouts(hoist):
    ours, first, other = reference_lingbot(lingbot_model.make_model(), hoist=hoist)
    made = []
    for conditions, of_first in ((first, None), (None, first), (other, first)):
        memory = WorldMemory(ours.config.memory(**WORLDKV), dtype=torch.float32)
        controls = list(lingbot_controls(other, end=4))
        controls[0] = controls[0]._replace(conditions=of_first)
        made.append(latents_of(Rollout(ours, memory, controls, conditions=conditions)))
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_the_same_conditions_once_more_change_nothing():
    """What the model carries from chunk to chunk, where the last one ended, is still there."""
    ours, first, _ = reference_lingbot(lingbot_model.make_model())
    made = []
    for again in (None, first):
        memory = WorldMemory(ours.config.memory(**WORLDKV), dtype=torch.float32)
        made.append(latents_of(Rollout(ours, memory, lingbot_controls(again), conditions=first)))
    assert torch.equal(*made)


def test_graphs_of_other_conditions_begin_anew(monkeypatch):
    monkeypatch.setattr(graphs, "_why_not", lambda model, memory: None)
    captured = []
    monkeypatch.setattr(graphs, "_capture_on", lambda device: lambda f: captured.append(f) or recorded(f))
    ours, first, other = reference_lingbot(lingbot_model.make_model())
    made = []
    for graph in (False, True):
        memory = WorldMemory(ours.config.memory(**WORLDKV), dtype=torch.float32)
        made.append(latents_of(Rollout(ours, memory, lingbot_controls(other), conditions=first, graph=graph)))
    assert torch.equal(*made)
    assert len(captured) == 2 * (len(ours.sigmas) + 1)  # in chunks 1 and 4


def test_a_rollout_is_saved_with_the_conditions_that_hold(tmp_path):
    ours, first, other = reference_lingbot(lingbot_model.make_model())
    memory = WorldMemory(ours.config.memory(**WORLDKV), dtype=torch.float32)
    whole = latents_of(Rollout(ours, memory, lingbot_controls(other), conditions=first))
    memory.reset()
    rolled = Rollout(ours, memory, lingbot_controls(other), conditions=first)
    for _ in range(CHANGED_AT + 2):
        next(rolled)
    rolled.save(tmp_path / "rollout")
    again = Rollout.load(tmp_path / "rollout", ours, lingbot_controls(None, CHANGED_AT + 2))
    assert torch.equal(latents_of(again), whole[3 * CHANGED_AT + 6 :])


def test_conditions_that_are_not_the_models_leave_the_memory_as_before():
    ours, first, _ = reference_lingbot(lingbot_model.make_model())
    memory = WorldMemory(ours.config.memory(**WORLDKV), dtype=torch.float32)
    rolled = Rollout(ours, memory, lingbot_controls("a prompt"), conditions=first)
    with pytest.raises(TypeError, match="conditions must be LingBotConditions or None, got 'a prompt'"):
        list(rolled)
    assert memory.stats()["chunks"] == CHANGED_AT
    assert rolled._conditions is first

    world = SmallWorld.random(
        SmallWorldConfig(num_layers=1, num_heads=1, grid=(1, 2)), device="cpu", dtype=torch.float32
    )
    poses = np.tile(np.eye(4), (3, 1, 1))
    controls = [Controls(poses, np.ones((3, 4))), Controls(poses, np.ones((3, 4)), conditions="a prompt")]
    memory = WorldMemory(world.config.memory(bank_chunks=9), dtype=torch.float32)
    with pytest.raises(ValueError, match="SmallWorld: conditions must be None, got 'a prompt'"):
        list(Rollout(world, memory, controls))
