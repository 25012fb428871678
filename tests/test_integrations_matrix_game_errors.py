"""What Matrix-Game-2.0's own code with a memory refuses, and how it goes on after that."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_matrix_game import (
    CHUNK_TOKENS,
    GRID,
    first_noise,
    given_of,
    latents,
    pipeline,
    plain_model,
)

from worldkv_kernels.actions import ActionIntegrator, Actions, parse_actions
from worldkv_kernels.integrations import matrix_game
from worldkv_kernels.memory.retrieval import ActionRetrieval
from worldkv_kernels.rope import Rope3D

GLANCE = parse_actions("J*28,L*28")  # 15 latent frames
CHUNKS = 5
STILL = np.tile(np.eye(4), (6, 1, 1))


def config_of(model, **options):
    return matrix_game.memory_config(model, grid=GRID, **{"bank_chunks": 12, "retrieved_chunks": 1, **options})


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
    other = plain_model()
    with matrix_game.enable(other, config_of(other)):
        want = latents(pipeline(other), given, CHUNKS)
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
    handle.finish()  # nothing: no chunk is in the making
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


def test_a_model_cast_between_rollouts_is_followed_and_in_the_middle_of_one_refused(started):
    pipe, given, handle = started
    passes(pipe, given)
    assert handle.memory.dtype == torch.float32
    pipe.generator.model.to(torch.bfloat16)
    given = {name: tensor.to(torch.bfloat16) for name, tensor in given.items()}
    with pytest.raises(
        RuntimeError, match=r"must stay on cpu in torch.float32 for all of a rollout, .* got cpu and torch"
    ):
        passes(pipe, given, 1)
    passes(pipe, given)
    assert handle.memory.dtype == torch.bfloat16 and handle.stats()["chunks"] == 1


def test_a_memory_of_another_dtype_is_refused():
    model = plain_model()
    pipe = pipeline(model)
    pipe._initialize(1, torch.float32)
    with (
        matrix_game.enable(model, config_of(model), dtype=torch.bfloat16),
        pytest.raises(TypeError, match=r"the memory's dtype must be that of q, torch.float32, got torch.bfloat16"),
    ):
        passes(pipe, given_of(GLANCE))


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
        (ValueError, "rope must be the model's", replace(config, rope=None, rebase_time=False), {}),
        (ValueError, "rope must be the model's", replace(config, rope=Rope3D(64, theta=256.0)), {}),
        (ValueError, "actions that the model takes, 4 keys and a mouse, got layout 'templerun'",
         config_of(model, retrieval=templerun), {}),
    ]  # fmt: skip
    for kind, message, of_memory, along in refused:
        with pytest.raises(kind, match=message):
            matrix_game.enable(model, of_memory, **along)
    assert "forward" not in model.__dict__
    assert all("forward" not in block.self_attn.__dict__ for block in model.blocks)
    with pytest.raises(RuntimeError, match=r"matrix_game.disable: model must have a memory, got one that has none"):
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
    with pytest.raises(RuntimeError, match="model must have no memory yet, got one that has: disable that first"):
        matrix_game.enable(model, config_of(model))
    matrix_game.disable(model)
    handle.disable()
    with pytest.raises(RuntimeError, match="model must have a memory"):
        matrix_game.disable(model)
    with pytest.raises(RuntimeError, match="matrix_game: restart must be called while the model has its memory"):
        handle.restart()
    matrix_game.enable(model, config_of(model)).disable()


def test_disabled_in_the_middle_its_own_code_shows_that_it_goes_on_from_nothing():
    model, given = plain_model(), given_of(GLANCE)
    want = latents(pipeline(model), given, 3)
    pipe = pipeline(model)
    pipe._initialize(1, torch.float32)
    handle = matrix_game.enable(model, config_of(model))
    for chunk in range(2):
        passes(pipe, given, chunk)
    handle.disable()
    for chunk in (1, 2):
        assert passes(pipe, given, chunk).isnan().all()
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
