"""Two lines put the memory into Matrix-Game-2.0's own code: what its pipelines then make."""

import numpy as np
import pytest
import torch
from conftest import relative_error
from plain_matrix_game_pipeline import CausalInferenceStreamingPipeline
from small_matrix_game import (
    GRID,
    VISUAL_TOKENS,
    actions_of,
    conditions,
    first_noise,
    given_of,
    latents,
    pipeline,
    plain_model,
    published_config,
)

from worldkv_kernels.actions import ActionIntegrator, Actions, parse_actions
from worldkv_kernels.integrations import matrix_game
from worldkv_kernels.memory.world_memory import WorldMemory
from worldkv_kernels.models.matrix_game_2 import MatrixGame2, MatrixGameConditions
from worldkv_kernels.models.matrix_game_config import MatrixGameConfig
from worldkv_kernels.models.rollout import rollout

LEFT_AND_BACK = parse_actions("J*60,L*44")  # 90 degrees to the left, and back: 27 latent frames, 9 chunks
GLANCE = parse_actions("J*28,L*28")  # 42 degrees: 15 latent frames
CHUNKS = 5


def config_of(model, mode="worldkv", **options):
    return matrix_game.memory_config(
        model, grid=GRID, mode=mode, **{"bank_chunks": 12, "retrieved_chunks": 1, **options}
    )


def retrieved_by(handle):
    """A list that will hold what each chunk retrieves, with whatever memory the forwards make."""
    plans, chunks = [], handle._chunks
    begin = chunks._begin

    def noted(chunk, controls, stream):
        begin(chunk, controls, stream)
        plans.append(handle.memory._plan.retrieved)

    chunks._begin = noted
    return plans


def run(handle_of, model, given, chunks=CHUNKS, mode="universal"):
    """Latents and what was retrieved for them, with the memory that handle_of enables."""
    with handle_of(model) as handle:
        plans = retrieved_by(handle)
        made = latents(pipeline(model), given, chunks, mode=mode)
        assert handle.stats()["chunks"] == chunks
    return made, plans


@pytest.mark.parametrize("variant, window", [("universal", 6), ("gta_drive", 4), ("templerun", 6)])
def test_in_full_mode_it_is_the_model_with_a_cache_as_long_as_the_clip(variant, window):
    given = conditions(*actions_of(variant, 5))
    long_cache = latents(pipeline(plain_model(variant, window), kv_cache_frames=15), given, 5, mode=variant)
    model = plain_model(variant, window)
    published = latents(pipeline(model), given, 5, mode=variant)
    made, _ = run(lambda model: matrix_game.enable(model, config_of(model, "full")), model, given, 5, mode=variant)
    assert relative_error(made, long_cache) < 1e-5
    assert relative_error(made[6:], published[6:]) > 1e-2
    assert torch.equal(latents(pipeline(model), given, 5, mode=variant), published)


@pytest.mark.parametrize("variant, window", [("universal", 6), ("gta_drive", 4), ("templerun", 6), ("templerun", 8)])
def test_in_sliding_mode_it_is_the_published_window(variant, window):
    given = conditions(*actions_of(variant, 5))
    model = plain_model(variant, window)
    published = latents(pipeline(model), given, 5, mode=variant)
    made, _ = run(lambda model: matrix_game.enable(model, config_of(model, "sliding")), model, given, 5, mode=variant)
    assert relative_error(made, published) < 1e-5
    assert torch.equal(latents(pipeline(model), given, 5, mode=variant), published)


@pytest.mark.parametrize("variant, text", [("universal", None), ("templerun", "Z*12,Q*24,C*12,Z*12,Q*24,C*12")])
def test_in_worldkv_mode_it_is_the_reference_model(variant, text):
    actions = GLANCE if text is None else parse_actions(text, variant)
    chunks = (len(actions.keyboard) + 3) // 12
    given, model = given_of(actions), plain_model(variant)
    config = config_of(model, retrieved_chunks=2)
    made, plans = run(lambda model: matrix_game.enable(model, config), model, given, chunks, mode=variant)

    sizes = MatrixGameConfig.from_published(published_config(variant), grid=GRID, image_tokens=VISUAL_TOKENS)
    reference = MatrixGame2(sizes, dtype=torch.float32)
    reference.load_state_dict(model.state_dict())
    image = MatrixGameConditions(given["visual_context"][0], given["cond_concat"][0])
    memory = WorldMemory(config, dtype=torch.float32)
    wanted = list(rollout(reference, memory, actions=actions, conditions=image))[:chunks]
    assert plans == [chunk.plan.retrieved for chunk in wanted]
    assert any(plans)
    assert relative_error(made, torch.cat([chunk.latents for chunk in wanted])) < 2e-5


def test_turned_left_and_back_retrieves_the_chunks_of_the_first_pass():
    model = plain_model()
    with matrix_game.enable(model, config_of(model)) as handle:
        plans = retrieved_by(handle)
        latents(pipeline(model), given_of(LEFT_AND_BACK), 9)
        handle.finish()
        pose = handle.memory.integrator.pose
    # Frame f has looked 4 f + 1 steps of 1.5 degrees to the left, up to frame 15, and then as many back; row 0 counts.
    looked = [4 * f + 1 if f <= 15 else 121 - 4 * f for f in range(27)]
    of_chunks = np.array(looked).reshape(9, 3).mean(axis=1)
    for chunk, retrieved in enumerate(plans):
        past = of_chunks[: max(0, chunk - 1)]
        assert list(retrieved) == ([] if len(past) == 0 else [np.abs(past - of_chunks[chunk]).argmin()])
    assert plans[6:] == [(3,), (2,), (1,)]
    assert np.degrees(np.arctan2(pose[0, 2], pose[0, 0])) == pytest.approx(-1.5 * looked[-1], abs=1e-6)


def test_what_is_pressed_in_the_streaming_pipeline_counts():
    walk, still = [1.0, 0.0, 0.0, 0.0], [0.0] * 4
    looks = [(-0.1, walk), (-0.1, walk), (-0.1, still), (0.1, still), (0.1, still)]
    pressed = [{"mouse": torch.tensor([0, yaw]), "keyboard": torch.tensor(keys)} for yaw, keys in looks]
    asked = iter(pressed)
    model = plain_model()
    with matrix_game.enable(model, config_of(model)) as handle:
        streamed = retrieved_by(handle)
        pipe = pipeline(model, CausalInferenceStreamingPipeline, get_current_action=lambda mode: next(asked))
        made = latents(pipe, conditions(*actions_of("universal", CHUNKS)), CHUNKS)
    rows = [9] + [12] * (CHUNKS - 1)
    written = Actions(*(np.repeat([one[kind].numpy() for one in pressed], rows, axis=0) for kind in pressed[0]))
    want, plans = run(lambda model: matrix_game.enable(model, config_of(model)), model, given_of(written))
    assert streamed == plans
    assert any(plans)
    assert torch.equal(made, want)


def test_actions_and_poses_may_be_given_at_once_or_chunk_by_chunk():
    model, given = plain_model(), given_of(GLANCE)
    poses = ActionIntegrator().poses(GLANCE)
    by_pose = config_of(model, retrieval="pose")
    ways = [
        lambda model: matrix_game.enable(model, config_of(model)),
        lambda model: matrix_game.enable(model, config_of(model), actions=GLANCE),
        lambda model: matrix_game.enable(model, config_of(model), actions=lambda c: GLANCE.of_frames(3 * c, 3)),
        lambda model: matrix_game.enable(model, by_pose, poses=poses),
        lambda model: matrix_game.enable(model, by_pose, poses=lambda chunk: poses[3 * chunk : 3 * chunk + 3]),
    ]
    (want, plans), *others = (run(way, model, given) for way in ways)
    assert any(plans)
    for made, retrieved in others:
        assert retrieved == plans
        assert torch.equal(made, want)


def test_given_actions_come_before_those_of_the_forward():
    model = plain_model()
    still = given_of(parse_actions("Q*56"))
    _, plans = run(lambda model: matrix_game.enable(model, config_of(model), actions=GLANCE), model, still)
    _, of_forward = run(lambda model: matrix_game.enable(model, config_of(model)), model, still)
    assert (plans, of_forward) == ([(), (), (0,), (1,), (0,)], [(), (), (0,), (0,), (0,)])


@pytest.mark.parametrize("chunks", [1, 4])
def test_a_new_rollout_starts_anew_with_its_own_actions(chunks):
    model = plain_model()
    walk = parse_actions("W*56")
    with matrix_game.enable(model, config_of(model)) as handle:
        first = latents(pipeline(model), given_of(GLANCE), chunks)
        latents(pipeline(model), given_of(walk), chunks)
        handle.finish()
        ended = handle.memory.integrator.pose
        again = latents(pipeline(model), given_of(GLANCE), chunks)
    assert np.allclose(ended, ActionIntegrator().poses(walk.until(12 * chunks - 3))[-1])
    assert torch.equal(again, first)


def test_restarted_it_goes_along_what_it_is_given():
    model = plain_model()
    walk = given_of(parse_actions("W*56"))
    with matrix_game.enable(model, config_of(model)) as handle:
        plans = retrieved_by(handle)
        handle.restart(actions=GLANCE)
        latents(pipeline(model), walk, CHUNKS)
        handle.restart()
        latents(pipeline(model), walk, CHUNKS)
    assert plans == [(), (), (0,), (1,), (0,), (), (), (0,), (1,), (2,)]


def test_video_extension_takes_the_given_latents_as_chunks():
    model, given = plain_model(), given_of(GLANCE)
    with matrix_game.enable(model, config_of(model)) as handle:
        whole = latents(pipeline(model), given, CHUNKS)
        with torch.no_grad():
            initial = whole[:9].transpose(0, 1)[None]
            made = pipeline(model).inference(first_noise(CHUNKS)[:, :, 9:], given, initial_latent=initial)
        assert handle.stats()["chunks"] == CHUNKS
    assert relative_error(made[0].transpose(0, 1), whole) < 1e-5


def test_it_is_the_same_under_inference_mode_and_in_bfloat16():
    model, given = plain_model(), given_of(GLANCE)
    want, plans = run(lambda model: matrix_game.enable(model, config_of(model)), model, given)
    with torch.inference_mode():
        made, _ = run(lambda model: matrix_game.enable(model, config_of(model)), model, given)
    assert torch.equal(made, want)
    model = model.to(torch.bfloat16)
    given = {name: tensor.to(torch.bfloat16) for name, tensor in given.items()}
    with matrix_game.enable(model, config_of(model)) as handle, torch.no_grad():
        retrieved = retrieved_by(handle)
        pipe = pipeline(model)
        pipe.draw = lambda *args: torch.randn_like(args[2])
        made = pipe.inference(first_noise(CHUNKS).to(torch.bfloat16), given)
        assert handle.memory.dtype == torch.bfloat16
    assert made.isfinite().all()
    assert retrieved == plans  # though 0.1 is 0.10009765625 there


def test_the_published_caches_are_given_back_and_those_of_the_actions_are_used():
    model = plain_model()
    pipe = pipeline(model)
    with matrix_game.enable(model, config_of(model)):
        latents(pipe, given_of(GLANCE), 2)
        assert all(cache[name].numel() == 0 for cache in pipe.kv_cache1 for name in ("k", "v"))
    assert all(cache[name].shape == (1, 36, 2, 64) for cache in pipe.kv_cache1 for name in ("k", "v"))
    assert all(cache["k"].abs().sum() > 0 for cache in (pipe.kv_cache_mouse[0], pipe.kv_cache_keyboard[0]))


def test_the_two_lines_at_the_published_size_of_a_frame():
    model = plain_model(frame_tokens=880, layers=1)
    pipeline_ = pipeline(model, frame_tokens=880)

    from worldkv_kernels.integrations import matrix_game

    handle = matrix_game.enable(pipeline_.generator.model)

    given = given_of(GLANCE.until(9))
    given["cond_concat"] = torch.zeros(1, 20, 3, 44, 80)
    with torch.no_grad():
        pipeline_.inference(torch.randn(1, 16, 3, 44, 80), given)
    assert handle.stats()["chunks"] == 1
    assert handle.memory.config.grid == (22, 40)


@pytest.mark.parametrize("variant, window, recent", [("universal", 6, 3), ("gta_drive", 4, 1), ("templerun", 9, 6)])
def test_the_config_follows_the_model(variant, window, recent):
    model = plain_model(variant, window)
    config = matrix_game.memory_config(model)
    assert (config.num_layers, config.num_heads, config.head_dim, config.grid) == (2, 2, 64, (22, 40))
    assert (config.chunk_frames, config.sink_frames, config.recent_frames, config.eps) == (3, 0, recent, 1e-6)
    assert config.retrieval.integrator.layout_name == variant
    changed = matrix_game.memory_config(model, sink_frames=3, recent_frames=12, retrieval="pose", keep_ratio=1.0)
    assert (changed.sink_frames, changed.recent_frames, changed.retrieval, changed.keep_ratio) == (3, 12, "pose", 1.0)


def test_poses_without_a_config_mean_retrieval_by_pose():
    model = plain_model()
    with matrix_game.enable(model, poses=np.tile(np.eye(4), (3, 1, 1)), bank_chunks=12) as handle:
        latents(pipeline(model), given_of(GLANCE), 1)
        assert handle.memory.config.retrieval == "pose"
