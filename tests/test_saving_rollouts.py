"""Rollouts that are saved and resumed go on bit for bit, with what their models carry from chunk to chunk."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import DEVICE
from test_pass_graphs import SIZES

from worldkv_kernels import WorldMemory
from worldkv_kernels.actions import Actions, video_frames
from worldkv_kernels.memory.retrieval import ActionRetrieval, FovRetrieval
from worldkv_kernels.models.lingbot_config import LingBotConfig
from worldkv_kernels.models.lingbot_world_fast import LingBotConditions, LingBotWorldFast
from worldkv_kernels.models.matrix_game_2 import MatrixGame2, MatrixGameConditions
from worldkv_kernels.models.matrix_game_config import MatrixGameConfig
from worldkv_kernels.models.rollout import Controls, Rollout, resume, rollout
from worldkv_kernels.models.small_world import SmallWorld, SmallWorldConfig
from worldkv_kernels.trajectory import latent_poses, load

CHUNKS = 12
POSES, INTRINSICS = (rows[: 3 * CHUNKS] for rows in latent_poses(load("right*72,left*72")))
random = np.random.default_rng(3)
ROWS = video_frames(3 * CHUNKS)
ACTIONS = Actions(random.normal(size=(ROWS, 2)) * 0.1, random.integers(0, 2, size=(ROWS, 4)).astype(float))
SIGMAS = (1.0, 0.8)


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


LINGBOT = LingBotConfig(**SIZES, ffn_dim=160, text_tokens=7, text_dim=24)
MATRIX_GAME = MatrixGameConfig(**SIZES, ffn_dim=160, image_tokens=5, image_dim=32, action_layers=(0,))
MODELS = {
    "small_world": (SmallWorld, SmallWorldConfig(**SIZES), None),
    "lingbot": (LingBotWorldFast, LINGBOT, LingBotConditions(normal(5, 24), normal(20, 4, 4, 6), 2.5)),
    "matrix_game": (MatrixGame2, MATRIX_GAME, MatrixGameConditions(normal(5, 32), normal(20, 2, 4, 6))),
}
FOV = FovRetrieval(depth_range=(0.5, 9.0), samples=16)


def made(name, dtype=torch.float32):
    kind, config, conditions = MODELS[name]
    return kind.random(config, device=DEVICE, dtype=dtype), conditions


def memory_of(model, **fields):
    fields = {"retrieved_chunks": 2, "bank_chunks": 4, "recent_frames": 3, **fields}
    return WorldMemory(model.config.memory(**fields), device=DEVICE, dtype=model.dtype)


def along(name, **fields):
    """How a trajectory is given: by its poses, or by actions where the memory goes by these."""
    by_action = isinstance(fields.get("retrieval"), ActionRetrieval)
    return ((), dict(actions=ACTIONS)) if by_action else ((POSES, INTRINSICS), dict(actions=ACTIONS))


@pytest.mark.parametrize("chunk", [0, 1, 2, 5, 9])
@pytest.mark.parametrize(
    "name, fields",
    [
        ("small_world", dict(retrieval=FOV, bank="host")),
        ("small_world", dict(mode="full", bank_chunks=20)),
        ("lingbot", dict()),
        ("lingbot", dict(mode="sliding")),
        ("matrix_game", dict(retrieval=ActionRetrieval())),
        ("matrix_game", dict(mode="sink_recent", retrieval=ActionRetrieval())),
        ("matrix_game", dict()),
    ],
)
def test_what_is_resumed_goes_on_bitwise(name, fields, chunk, tmp_path):
    model, conditions = made(name)
    places, options = along(name, **fields)
    given = normal(9, *model.latent_shape) if chunk < 3 else None  # the first three chunks
    whole = rollout(
        model, memory_of(model, **fields), *places, **options, conditions=conditions, given=given, seed=7, sigmas=SIGMAS
    )
    for _ in itertools.islice(whole, chunk):
        pass
    whole.save(tmp_path / "walk.worldkv")
    again, _ = made(name)
    resumed = resume(tmp_path / "walk.worldkv", again, *places, **options)
    want, got = list(whole), list(resumed)
    assert [c.plan.retrieved for c in got] == [c.plan.retrieved for c in want] and len(got) == CHUNKS - chunk
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(got, want, strict=True))
    assert resumed.seed == 7 and resumed.sigmas == SIGMAS
    on_device = resume(tmp_path / "walk.worldkv", again, *places, **options, bank="device")
    assert torch.equal(next(on_device).latents, want[0].latents)


def test_a_stream_is_resumed_from_the_controls_that_come(tmp_path):
    model, _ = made("matrix_game")

    def controls(first, end):
        for chunk in range(first, end):
            yield Controls(None, None, ACTIONS.until(video_frames(3 * chunk + 3)))

    def stream(end):
        return Rollout(model, memory_of(model, retrieval=ActionRetrieval()), controls(0, end), sigmas=SIGMAS)

    want = [chunk.latents for chunk in stream(8)]
    first = stream(5)
    got = [chunk.latents for chunk in first]
    first.save(tmp_path / "walk.worldkv")
    second = Rollout.load(tmp_path / "walk.worldkv", model, controls(5, 6))
    got += [chunk.latents for chunk in second]
    second.save(tmp_path / "walk.worldkv")
    third = Rollout.load(tmp_path / "walk.worldkv", model, lambda made: controls(made.memory.stats()["chunks"], 8))
    got += [chunk.latents for chunk in third]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_rollout_that_failed_is_saved_as_it_was_before_the_chunk(tmp_path):
    model, conditions = made("lingbot")
    want = list(rollout(model, memory_of(model), POSES[:15], INTRINSICS[:15], conditions=conditions, sigmas=SIGMAS))

    def breaks_off():
        for first in range(0, 9, 3):
            yield Controls(POSES[first : first + 3], INTRINSICS[first : first + 3])
        yield Controls(POSES[9:12], None)  # which this model needs

    failing = Rollout(model, memory_of(model), breaks_off(), conditions=conditions, sigmas=SIGMAS)
    with pytest.raises(ValueError, match="intrinsics"):
        list(failing)
    failing.save(tmp_path / "walk.worldkv")
    got = list(resume(tmp_path / "walk.worldkv", model, POSES[:15], INTRINSICS[:15]))
    assert [torch.equal(a.latents, b.latents) for a, b in zip(got, want[3:], strict=True)] == [True, True]


@pytest.mark.parametrize("mode", ["worldkv", "sliding"])
def test_poses_beside_a_memory_that_goes_by_actions(mode, tmp_path):
    """The model goes along the poses given, the memory along the actions; in a baseline there may be none."""
    model, _ = made("small_world")
    fields = dict(retrieval=ActionRetrieval(), mode=mode)
    options = dict(actions=ACTIONS) if mode == "worldkv" else {}
    walk = rollout(model, memory_of(model, **fields), POSES, INTRINSICS, **options, sigmas=SIGMAS)
    for _ in range(4):
        next(walk)
    walk.save(tmp_path / "walk.worldkv")
    got = resume(tmp_path / "walk.worldkv", model, POSES, INTRINSICS, **options)
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(got, walk, strict=True))


@pytest.mark.parametrize("where", ["prepare", "ended"])
def test_of_a_chunk_that_failed_nothing_is_saved(where, tmp_path, monkeypatch):
    """Neither its other conditions, nor, where an interrupt falls behind end_chunk, only half of what it was."""
    model, conditions = made("matrix_game")
    other = MatrixGameConditions(conditions.image_tokens + 1, conditions.image_latents)

    def controls(first, changes=False):
        for chunk in range(first, 5):
            done = ACTIONS.until(video_frames(3 * chunk + 3))
            yield Controls(None, None, done, other if changes and chunk == 2 else None)

    def stream(**options):
        memory = memory_of(model, retrieval=ActionRetrieval())
        return Rollout(model, memory, controls(0, **options), conditions=conditions, sigmas=SIGMAS)

    want = [chunk.latents for chunk in stream()]
    failing = stream(changes=where == "prepare")
    for _ in range(2):
        next(failing)
    with monkeypatch.context() as patch:
        broken = "_denoised" if where == "prepare" else "_Took.end"
        patch.setattr(f"worldkv_kernels.models.rollout.{broken}", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(failing)
    with pytest.raises(RuntimeError, match="rollout: a chunk has failed, and no other can follow it here"):
        next(failing)
    failing.save(tmp_path / "walk.worldkv")
    number = failing.memory.stats()["chunks"]
    assert number == (2 if where == "prepare" else 3)
    got = Rollout.load(tmp_path / "walk.worldkv", model, controls(number))
    assert all(torch.equal(a.latents, b) for a, b in zip(got, want[number:], strict=True))


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("fails_at", [0, 1])
def test_given_latents_of_a_chunk_that_failed_are_kept(fails_at, tmp_path, monkeypatch):
    model, _ = made("small_world")
    given = normal(6, *model.latent_shape)
    want = list(rollout(model, memory_of(model), POSES[:9], INTRINSICS[:9], given=given, sigmas=SIGMAS))
    prepare = model.prepare_chunk

    def fails(of_rollout, start_frame, controls):
        if start_frame == 3 * fails_at:
            raise MemoryError("no room")
        return prepare(of_rollout, start_frame, controls)

    failing = rollout(model, memory_of(model), POSES[:9], INTRINSICS[:9], given=given, sigmas=SIGMAS)
    monkeypatch.setattr(model, "prepare_chunk", fails)
    with pytest.raises(MemoryError):
        list(failing)
    failing.save(tmp_path / "walk.worldkv")
    monkeypatch.undo()
    got = list(resume(tmp_path / "walk.worldkv", model, POSES[:9], INTRINSICS[:9]))
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(got, want[fails_at:], strict=True))


def test_what_cannot_go_on_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "walk.worldkv"
    model, conditions = made("lingbot")
    walk = rollout(model, memory_of(model), POSES, INTRINSICS, conditions=conditions, sigmas=SIGMAS)
    next(walk)
    walk.save(file)
    with pytest.raises(ValueError, match=r"resume: poses must lead through the 1 chunks made, got others"):
        resume(file, model, POSES[1:], INTRINSICS[1:])
    with pytest.raises(ValueError, match=r"resume: trajectory must be of more than the 1 chunks made, got one of 1"):
        resume(file, model, POSES[:3], INTRINSICS[:3])
    small, _ = made("small_world")
    with pytest.raises(ValueError, match=r"walk.worldkv: model must be one that takes .* got SmallWorld"):
        resume(file, small, POSES, INTRINSICS)
    wide = LingBotWorldFast.random(replace(LINGBOT, num_heads=3), device=DEVICE, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"walk.worldkv: memory must be of the model's num_heads=3, got 2"):
        resume(file, wide, POSES, INTRINSICS)
    with monkeypatch.context() as patch:
        grouped = replace(LINGBOT.memory(), num_kv_heads=1)
        patch.setattr(type(LINGBOT), "memory", lambda config: grouped)
        with pytest.raises(ValueError, match=r"walk.worldkv: memory must be of the model's num_kv_heads=1, got 2"):
            resume(file, model, POSES, INTRINSICS)
    with pytest.raises(ValueError, match=r"must be of format 'worldkv memory', got 'worldkv rollout'"):
        WorldMemory.load(file)
    strange = rollout(Strange(), memory_of(small), POSES, INTRINSICS, conditions=object())
    with pytest.raises(TypeError, match=r"Rollout.save: conditions must be of plain values"):
        strange.save(file)


class Strange:
    chunk_frames, latent_shape, device, sigmas = 3, (16, 4, 6), DEVICE, (1.0,)
