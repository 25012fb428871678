"""Two lines put the memory into Matrix-Game-2.0's own code: what its pipelines then make, and what they refuse."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import relative_error
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

from worldkv_kernels.actions import ActionIntegrator, Actions, parse_actions
from worldkv_kernels.integrations import matrix_game
from worldkv_kernels.memory.retrieval import ActionRetrieval
from worldkv_kernels.memory.world_memory import WorldMemory
from worldkv_kernels.models.matrix_game_2 import MatrixGame2, MatrixGameConditions
from worldkv_kernels.models.matrix_game_config import MatrixGameConfig
from worldkv_kernels.models.rollout import rollout

LEFT_AND_BACK = parse_actions("J*60,L*44")  # 90 degrees to the left, and back: 27 latent frames, 9 chunks
GLANCE = parse_actions("J*28,L*28")  # 42 degrees: 15 latent frames
CHUNKS = 5
STILL = np.tile(np.eye(4), (6, 1, 1))


def config_of(model, mode="worldkv", **options):
    return matrix_game.memory_config(
        model, grid=GRID, mode=mode, **{"bank_chunks": 12, "retrieved_chunks": 1, **options}
    )


def given_of(actions, seed=2):
    """A conditional_dict of Actions."""
    columns = [None if rows is None else torch.as_tensor(rows)[None] for rows in actions]
    return conditions(*columns, seed=seed)


def retrieved_by(handle):
    """A list that will hold what each chunk retrieves."""
    plans, begin = [], handle.memory.begin_chunk

    def begin_chunk(*args, **kwargs):
        plan = begin(*args, **kwargs)
        plans.append(plan.retrieved)
        return plan

    handle.memory.begin_chunk = begin_chunk
    return plans


def run(handle_of, model, given, chunks=CHUNKS, mode="universal"):
    """Latents and what was retrieved for them, with the memory that handle_of enables."""
    with handle_of(model) as handle:
        plans = retrieved_by(handle)
        made = latents(pipeline(model), given, chunks, mode=mode)
        assert handle.stats()["chunks"] == chunks
    return made, plans


# --- what the pipelines make ---


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


@pytest.mark.parametrize("variant", ["universal", "templerun"])
def test_in_sliding_mode_it_is_the_published_window(variant):
    given = conditions(*actions_of(variant, 5))
    model = plain_model(variant)
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
        handle.restart(actions=GLANCE)
        restarted = latents(pipeline(model), given_of(GLANCE), chunks)
    assert np.allclose(ended, ActionIntegrator().poses(walk.until(12 * chunks - 3))[-1])
    assert torch.equal(again, first)
    assert torch.equal(restarted, first)


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
        assert handle.memory.dtype == torch.bfloat16
        retrieved = retrieved_by(handle)
        pipe = pipeline(model)
        pipe.draw = lambda *args: torch.randn_like(args[2])
        made = pipe.inference(first_noise(CHUNKS).to(torch.bfloat16), given)
    assert made.isfinite().all()
    assert retrieved == plans  # though 0.1 is 0.10009765625 there


def test_the_published_caches_are_given_back_and_those_of_the_actions_are_used():
    model = plain_model()
    pipe = pipeline(model)
    with matrix_game.enable(model, config_of(model)):
        latents(pipe, given_of(GLANCE), 2)
    assert all(cache[name].numel() == 0 for cache in pipe.kv_cache1 for name in ("k", "v"))
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


@pytest.mark.parametrize("variant, window, recent", [("universal", 6, 3), ("gta_drive", 4, 3), ("templerun", 9, 6)])
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
    with matrix_game.enable(model, poses=np.tile(np.eye(4), (3, 1, 1))) as handle:
        assert handle.memory.config.retrieval == "pose"


# --- what is refused, and what is left behind ---


def passes(pipe, given, chunk=0, latent=None):
    """One chunk's passes, at the pipeline's own caches."""
    latent = first_noise(chunk + 1)[:, :, 3 * chunk :] if latent is None else latent
    with torch.no_grad():
        return pipe._block(latent, pipe._condition(given, 3 * chunk, "universal"), 3 * chunk)


@pytest.fixture
def started():
    """A pipeline of an enabled model, its conditions and its handle, before the first chunk."""
    model = plain_model()
    pipe = pipeline(model)
    pipe._initialize(1, torch.float32)
    with matrix_game.enable(model, config_of(model)) as handle:
        yield pipe, given_of(GLANCE), handle


def test_an_exception_inside_a_forward_drops_its_chunk_which_may_be_made_again(started):
    pipe, given, handle = started
    want, _ = run(lambda model: matrix_game.enable(model, config_of(model)), plain_model(), given)
    made = [passes(pipe, given, chunk) for chunk in range(3)]
    ffn, calls = pipe.generator.model.blocks[1].ffn, []

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:  # the second denoising pass
            raise KeyboardInterrupt

    hook = ffn.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        passes(pipe, given, 3)
    hook.remove()
    assert handle.stats()["chunks"] == 3
    made += [passes(pipe, given, chunk) for chunk in (3, 4)]
    assert torch.equal(torch.cat(made, dim=2)[0].transpose(0, 1), want)


@pytest.mark.parametrize("chunk, message", [(3, "must be 36 .the next chunk.*, got 54"), (1, "got a second|got 18")])
def test_chunks_out_of_turn_are_refused_and_change_nothing(started, chunk, message):
    pipe, given, handle = started
    for number in range(2):
        passes(pipe, given, number)
    handle.finish()
    before = handle.stats()
    with pytest.raises(RuntimeError, match=message):
        passes(pipe, given, chunk)
    assert handle.stats() == before
    passes(pipe, given, 2)


def test_forwards_that_a_memory_cannot_serve_are_refused(started):
    pipe, given, handle = started
    model = pipe.generator.model
    passes(pipe, given)
    before = handle.stats()
    two = {name: torch.cat([tensor, tensor]) for name, tensor in given.items()}
    with pytest.raises(ValueError, match=r"matrix_game: x must hold one video, .* got 2"):
        passes(pipe, two, 1, torch.randn(2, 16, 3, 4, 6))
    larger = {**given, "cond_concat": torch.zeros(1, 20, 6, 8, 6)}
    with pytest.raises(ValueError, match=r"x must be of \(3, 2, 3\) frames, rows and columns .* got \(3, 4, 3\)"):
        passes(pipe, larger, 1, torch.randn(1, 16, 3, 8, 6))
    with pytest.raises(RuntimeError, match="forward must have the pipeline's kv_cache, got none"), torch.no_grad():
        model(torch.randn(1, 16, 3, 4, 6), t=torch.zeros(1, 3), visual_context=None, cond_concat=None)
    model.train()
    with pytest.raises(RuntimeError, match="the model must be in eval mode"):
        passes(pipe, given, 1)
    model.eval().requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"must run under torch.no_grad"):
        pipe._block(torch.randn(1, 16, 3, 4, 6), pipe._condition(given, 3, "universal"), 3)
    model.requires_grad_(False)
    assert handle.stats() == before
    passes(pipe, given, 1)
    assert handle.stats()["chunks"] == 2


def test_a_model_cast_after_it_was_enabled_is_refused(started):
    pipe, given, _ = started
    pipe.generator.model.to(torch.bfloat16)
    given = {name: tensor.to(torch.bfloat16) for name, tensor in given.items()}
    with pytest.raises(TypeError, match=r"the memory's dtype must be that of q, torch.bfloat16, got torch.float32"):
        passes(pipe, given)


@pytest.mark.parametrize("name", ["mouse_cond", "keyboard_cond"])
@pytest.mark.parametrize("rows", [None, 9, 33])
def test_actions_missing_from_the_forward_or_of_other_rows_are_refused(started, name, rows):
    pipe, given, handle = started
    passes(pipe, given)
    handle.finish()
    condition = pipe._condition(given, 3, "universal")
    condition[name] = None if rows is None else given[name][:, :rows]
    got = "None" if rows is None else rf"\[1, {rows}, \d\]"
    with pytest.raises(
        ValueError, match=rf"forward's {name} must be \[1, 21, c\], the actions up to chunk 1, got {got}"
    ):
        pipe._pass(first_noise(1), condition, torch.ones(1, 3), 3)
    assert handle.stats()["chunks"] == 1
    passes(pipe, given, 1)


def test_actions_and_poses_that_end_too_early_are_refused():
    model, given = plain_model(), given_of(GLANCE)
    poses = ActionIntegrator().poses(GLANCE.until(21))
    ways = [
        (dict(actions=GLANCE.until(21)), config_of(model), "actions must be of 33 video frames up to chunk 2"),
        (
            dict(poses=poses),
            config_of(model, retrieval="pose"),
            "poses must be of 9 latent frames up to chunk 2, got 6",
        ),
    ]
    for along, config, message in ways:
        with matrix_game.enable(model, config, **along) as handle:
            with pytest.raises(ValueError, match=message):
                latents(pipeline(model), given, 3)
            assert handle.stats()["chunks"] == 2


def test_what_enable_refuses_and_then_leaves_alone():
    model = plain_model()
    config, by_pose = config_of(model), config_of(model, retrieval="pose")
    templerun = ActionRetrieval(ActionIntegrator(layout="templerun"))
    refused = [
        (ValueError, "poses must be given", by_pose, {}),
        (ValueError, "actions must be None for retrieval 'pose'", by_pose, dict(poses=STILL, actions=GLANCE)),
        (ValueError, "poses must be None for retrieval", config, dict(poses=STILL)),
        (ValueError, "poses must be rigid", by_pose, dict(poses=2 * STILL)),
        (ValueError, r"keyboard must be \[rows, 4\]", config, dict(actions=Actions(STILL[0], STILL[0, :, :2]))),
        (ValueError, "num_layers must be the model's 2, got 3", replace(config, num_layers=3), {}),
        (ValueError, "eps must be the model's 1e-06, got 0.001", replace(config, eps=1e-3), {}),
        (ValueError, "rope must be the model's", replace(config, rope=None), {}),
        (ValueError, "actions that the model takes, 4 keys and a mouse, got layout 'templerun'",
         config_of(model, retrieval=templerun), {}),
    ]  # fmt: skip
    for kind, message, of_memory, along in refused:
        with pytest.raises(kind, match=message):
            matrix_game.enable(model, of_memory, **along)
    assert "forward" not in model.__dict__
    assert all("forward" not in block.self_attn.__dict__ for block in model.blocks)
    with pytest.raises(RuntimeError, match=r"matrix_game.disable: model must be enabled, got one that is not"):
        matrix_game.disable(model)


def test_models_of_another_kind_are_refused():
    with pytest.raises(TypeError, match=r"model must be Matrix-Game-2.0's CausalWanModel .* got Linear"):
        matrix_game.enable(torch.nn.Linear(2, 2))
    model = plain_model()
    model.blocks[1].self_attn = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="whose self_attn is a CausalWanSelfAttention, got a self_attn of Linear"):
        matrix_game.enable(model)
    model = plain_model()
    model.blocks[0].action_model.keyboard_embed[0] = torch.nn.Linear(6, 16)
    with pytest.raises(ValueError, match=r"as many keys as a layout .* got 6 keys and a mouse; give a retrieval"):
        matrix_game.memory_config(model)
    model.blocks[0].self_attn.forward = lambda *args: None
    with pytest.raises(RuntimeError, match=r"blocks\[0\].self_attn.forward must be the model's own, got <lambda>"):
        matrix_game.enable(model, config_of(model, retrieval="pose"), poses=STILL)


def test_enabled_once_and_disabled_once():
    model = plain_model()
    handle = matrix_game.enable(model, config_of(model))
    with pytest.raises(RuntimeError, match="model must not be enabled, got one that is: disable it first"):
        matrix_game.enable(model, config_of(model))
    matrix_game.disable(model)
    handle.disable()
    with pytest.raises(RuntimeError, match="model must be enabled"):
        matrix_game.disable(model)
    matrix_game.enable(model, config_of(model)).disable()


def test_disabled_in_the_middle_its_own_code_fails_instead_of_going_on_from_nothing():
    model, given = plain_model(), given_of(GLANCE)
    want = latents(pipeline(model), given, 3)
    pipe = pipeline(model)
    pipe._initialize(1, torch.float32)
    handle = matrix_game.enable(model, config_of(model))
    for chunk in range(2):
        passes(pipe, given, chunk)
    handle.disable()
    for chunk in (1, 2):
        with pytest.raises(RuntimeError):
            passes(pipe, given, chunk)
    assert torch.equal(latents(pipeline(model), given, 3), want)


def test_enabled_in_the_middle_it_asks_for_a_new_rollout():
    model, given = plain_model(), given_of(GLANCE)
    pipe = pipeline(model)
    pipe._initialize(1, torch.float32)
    passes(pipe, given)
    with matrix_game.enable(model, config_of(model)):
        with pytest.raises(RuntimeError, match=f"current_start must be 0 .* got {CHUNK_TOKENS}"):
            passes(pipe, given, 1)
        assert latents(pipeline(model), given, 2).isfinite().all()
