"""Retrieval by action: the memory integrates what the player does, and finds again what was seen from there."""

import numpy as np
import pytest
import torch
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from test_actions import random_actions

from worldkv_kernels import ActionIntegrator, ActionRetrieval, Actions, ActionScales, PoseRetrieval, WorldMemory
from worldkv_kernels.actions import parse_actions, video_frames
from worldkv_kernels.memory.config import MemoryConfig
from worldkv_kernels.models.rollout import Controls, Rollout, rollout
from worldkv_kernels.models.small_world import SmallWorld, SmallWorldConfig

fuzz = settings(max_examples=25, deadline=None, derandomize=True, database=None)
INTRINSICS = np.array((500.0, 500.0, 416.0, 240.0))
# 60 rows of 1.5 degrees; frame f of the way back stands where frame 32 - f stood, so chunk c where chunk 10 - c was.
LEFT_AND_BACK = parse_actions("J*60,Q*8,L*60")


def make(retrieval="action", **options) -> WorldMemory:
    options = {
        "sink_frames": 0, "recent_frames": 3, "retrieved_chunks": 1, "bank_chunks": 20, "num_layers": 1, **options
    }  # fmt: skip
    config = MemoryConfig(num_heads=1, head_dim=64, grid=(1, 2), retrieval=retrieval, **options)
    return WorldMemory(config, dtype=torch.float32)


def rows_of(actions: Actions, chunk: int, frames: int = 3) -> Actions:
    return actions.of_frames(chunk * frames, frames)


def end(memory: WorldMemory) -> None:
    config = memory.config
    for layer in range(config.num_layers):
        memory.attend(layer, *torch.ones(3, config.chunk_tokens, config.num_heads * config.head_dim))
    memory.end_chunk()


def made(memory: WorldMemory, actions: Actions, chunks: int) -> list[tuple[int, ...]]:
    """What each chunk retrieved."""
    retrieved = []
    for chunk in range(chunks):
        retrieved.append(memory.begin_chunk(actions=rows_of(actions, chunk)).retrieved)
        end(memory)
    return retrieved


# --- what is retrieved ---


def test_turned_left_and_back_right_retrieves_the_chunks_of_the_first_pass():
    memory = make()
    first = ActionIntegrator().poses(LEFT_AND_BACK.until(1))[0]
    assert made(memory, LEFT_AND_BACK, 11)[6:] == [(4,), (3,), (2,), (1,), (0,)]
    assert np.abs(memory.integrator.pose - first).max() <= 1e-6
    turned = memory.integrator.poses(LEFT_AND_BACK)[16]
    assert turned[:3, 2] == pytest.approx((-1, 0, 0.0), abs=0.03)  # 61 rows of 1.5 degrees to the left


def test_walked_away_and_back_retrieves_the_chunks_of_the_first_pass():
    memory = make()
    assert made(memory, parse_actions("W+J*60,Q*8,S+L*60"), 11)[6:] == [(4,), (3,), (2,), (1,), (0,)]


@fuzz
@given(st.integers(0, 2**31), st.sampled_from(["universal", "gta_drive", "templerun"]), st.sampled_from([0.0, 0.6]))
def test_the_plans_are_those_of_pose_retrieval_on_the_integrated_poses(seed, layout, diversity):
    """Whatever is tried and dropped in between."""
    rng = np.random.default_rng(seed)
    actions = random_actions(seed, layout, video_frames(36))
    integrator = ActionIntegrator(ActionScales(yaw=70, walk=3, turn=20, run=1), layout)
    options = {"sink_frames": 3, "retrieved_chunks": 3, "bank_chunks": 5}
    by_action = make(ActionRetrieval(integrator, diversity=diversity), **options)
    by_pose = make(PoseRetrieval(diversity=diversity), **options)
    for chunk, poses in enumerate(integrator.poses(actions).reshape(12, 3, 4, 4)):
        if rng.random() < 0.5:
            by_action.begin_chunk(actions=rows_of(random_actions(seed + 1, layout, 200), min(chunk, 1)))
            by_action.abort_chunk()
        assert by_action.begin_chunk(actions=rows_of(actions, chunk)) == by_pose.begin_chunk(poses)
        end(by_action), end(by_pose)
        assert (by_action.integrator.pose == poses[-1]).all()
    assert by_action.stats() == by_pose.stats()
    assert integrator.state.rows == 0  # the memory's is its own


def test_another_number_of_frames_a_chunk_and_tensors():
    memory = make(chunk_frames=4, sink_frames=0, recent_frames=4)
    actions = Actions(*(torch.from_numpy(array) for array in LEFT_AND_BACK))
    for chunk in range(8):
        memory.begin_chunk(actions=rows_of(actions, chunk, 4))
        end(memory)
    assert memory.integrator.state.rows == video_frames(32)
    assert (memory.integrator.pose == ActionIntegrator().poses(LEFT_AND_BACK)[31]).all()


# --- what is taken back ---


class FailsOnce(ActionRetrieval):
    fails = False

    def select(self, current, candidates, budget):
        if self.fails:
            self.fails = False
            raise ArithmeticError("planted")
        return super().select(current, candidates, budget)


def test_a_chunk_that_is_not_made_leaves_no_trace():
    policy = FailsOnce()
    memory, undisturbed = make(policy), make()
    other = parse_actions("W+I+L*200")
    for chunk in range(11):
        before = memory.integrator.state
        memory.begin_chunk(actions=rows_of(other, chunk))
        with pytest.raises(RuntimeError, match=f"chunk {chunk} must be ended"):
            memory.begin_chunk(actions=rows_of(other, chunk))
        memory.abort_chunk()
        assert memory.integrator.state == before
        policy.fails = True
        with pytest.raises(ArithmeticError):
            memory.begin_chunk(actions=rows_of(other, chunk))
        with pytest.raises(ValueError, match="keyboard must be finite"):
            mouse, keyboard = rows_of(other, chunk)
            memory.begin_chunk(actions=(mouse, np.full_like(keyboard, np.inf)))
        assert memory.integrator.state == before
        rows = rows_of(LEFT_AND_BACK, chunk)
        assert memory.begin_chunk(actions=rows) == undisturbed.begin_chunk(actions=rows)
        with pytest.raises(RuntimeError, match="end_chunk: chunk"):
            memory.end_chunk()  # nothing attended: still begun
        end(memory), end(undisturbed)
        assert memory.integrator.state == undisturbed.integrator.state != before


def test_reset_starts_the_world_again():
    memory = make()
    want = made(memory, LEFT_AND_BACK, 11)
    memory.begin_chunk(actions=rows_of(LEFT_AND_BACK, 1))
    memory.reset()
    assert memory.integrator.state == ActionIntegrator().state
    assert made(memory, LEFT_AND_BACK, 11) == want


def test_memories_of_one_config_do_not_share_their_way():
    policy = ActionRetrieval(ActionIntegrator(ActionScales(yaw=30)))
    one, other = make(policy), make(policy)
    made(one, LEFT_AND_BACK, 4)
    assert other.integrator.state.rows == policy.integrator.state.rows == 0
    assert one.integrator.scales == other.integrator.scales == ActionScales(yaw=30)


# --- what is refused ---


@pytest.mark.parametrize(
    "chunk, rows, wanted",
    [(0, 12, 9), (0, 8, 9), (1, 9, 12), (1, 13, 12)],
)
def test_another_number_of_rows(chunk, rows, wanted):
    memory = make()
    made(memory, LEFT_AND_BACK, chunk)
    message = rf"begin_chunk: keyboard must be \[{wanted}, 4\] for layout 'universal', got \[{rows}, 4\]"
    with pytest.raises(ValueError, match=message):
        memory.begin_chunk(actions=LEFT_AND_BACK.until(rows))


def test_what_retrieval_does_not_take():
    by_action, by_pose, poses = make(), make("pose"), np.tile(np.eye(4), (3, 1, 1))
    with pytest.raises(ValueError, match="begin_chunk: poses must be None for retrieval by ActionRetrieval, got nd"):
        by_action.begin_chunk(poses, actions=LEFT_AND_BACK.until(9))
    with pytest.raises(ValueError, match="begin_chunk: actions must be of 9 rows in mode 'worldkv', got None"):
        by_action.begin_chunk()
    with pytest.raises(TypeError, match="begin_chunk: actions must be an Actions of mouse and keyboard, got ndarray"):
        by_action.begin_chunk(actions=poses)
    with pytest.raises(ValueError, match="begin_chunk: actions must be None for retrieval by PoseRetrieval, got Acti"):
        by_pose.begin_chunk(poses, actions=LEFT_AND_BACK.until(9))
    with pytest.raises(ValueError, match=r"begin_chunk: keyboard must be \[9, 2\] for layout 'gta_drive'"):
        make(ActionRetrieval(ActionIntegrator(layout="gta_drive"))).begin_chunk(actions=LEFT_AND_BACK.until(9))
    assert by_action.begin_chunk(actions=LEFT_AND_BACK.until(9)).chunk == by_pose.begin_chunk(poses).chunk == 0


@pytest.mark.parametrize("mode", ["full", "sliding", "sink_recent"])
def test_the_baselines_need_no_actions_and_check_those_given(mode):
    memory = make(mode=mode)
    memory.begin_chunk()
    end(memory)
    with pytest.raises(ValueError, match=r"keyboard must be \[12, 4\]"):
        memory.begin_chunk(actions=LEFT_AND_BACK.until(9))
    with pytest.raises(ValueError, match="poses must be None"):
        memory.begin_chunk(np.tile(np.eye(4), (3, 1, 1)))
    memory.begin_chunk(actions=rows_of(LEFT_AND_BACK, 1))
    end(memory)
    assert memory.stats()["chunks"] == 2


# --- in a rollout ---

CONFIG = SmallWorldConfig(num_layers=1, num_heads=1, grid=(1, 2), ffn_dim=16, frequency_dim=8)


def make_model(of=SmallWorld) -> SmallWorld:
    return of.random(CONFIG, device="cpu", dtype=torch.float32)


def make_memory(retrieval="action", mode="worldkv") -> WorldMemory:
    config = CONFIG.memory(
        mode=mode, sink_frames=0, recent_frames=3, retrieved_chunks=1, bank_chunks=20, retrieval=retrieval
    )
    return WorldMemory(config, dtype=torch.float32)


def test_a_rollout_by_actions_is_one_along_their_poses():
    model, poses = make_model(), ActionIntegrator().poses(LEFT_AND_BACK)
    want = list(rollout(model, make_memory("pose"), poses, INTRINSICS))
    assert [chunk.plan.retrieved for chunk in want[6:]] == [(4,), (3,), (2,), (1,), (0,)]
    by_actions = list(rollout(model, make_memory(), None, INTRINSICS, actions=LEFT_AND_BACK))
    both = list(rollout(model, make_memory(), poses, INTRINSICS, actions=LEFT_AND_BACK))
    streamed = Rollout(model, make_memory(), (
        Controls(None, np.tile(INTRINSICS, (3, 1)), LEFT_AND_BACK.until(video_frames(3 * chunk + 3)))
        for chunk in range(11)
    ))  # fmt: skip
    for got in (by_actions, both, list(streamed)):
        assert [chunk.plan for chunk in got] == [chunk.plan for chunk in want]
        assert all(torch.equal(a.latents, b.latents) for a, b in zip(got, want, strict=True))


def test_the_models_poses_may_be_others_than_those_retrieved_by():
    model, still = make_model(), np.tile(np.eye(4), (33, 1, 1))
    chunks = list(rollout(model, make_memory(), still, INTRINSICS, actions=LEFT_AND_BACK))
    assert [chunk.plan.retrieved for chunk in chunks[6:]] == [(4,), (3,), (2,), (1,), (0,)]
    moved = list(rollout(model, make_memory(), None, INTRINSICS, actions=LEFT_AND_BACK))
    assert relative_error(chunks[5].latents, moved[5].latents) > 1e-3


@pytest.mark.parametrize("mode", ["full", "sliding", "sink_recent"])
def test_the_baselines_of_a_rollout_by_actions(mode):
    model, poses = make_model(), ActionIntegrator().poses(LEFT_AND_BACK)
    got = list(rollout(model, make_memory("action", mode), None, INTRINSICS, actions=LEFT_AND_BACK))
    want = list(rollout(model, make_memory("pose", mode), poses, INTRINSICS))
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(got, want, strict=True))


class FailsAt(SmallWorld):
    def denoise(self, latents, step, of_chunk, memory):
        if memory.stats()["chunks"] == 2 and step == 1:
            raise ArithmeticError("planted")
        return super().denoise(latents, step, of_chunk, memory)


def test_an_exception_inside_a_chunk_takes_its_actions_back():
    memory = make_memory()
    with pytest.raises(ArithmeticError):
        list(rollout(make_model(FailsAt), memory, None, INTRINSICS, actions=LEFT_AND_BACK))
    assert memory.stats()["chunks"] == 2 and memory.integrator.state.rows == video_frames(6)


@pytest.mark.parametrize(
    "memory, arguments, message",
    [
        (make_memory("pose"), {"actions": LEFT_AND_BACK}, r"poses must be \[n, 4, 4\], or None with actions"),
        (make_memory(), {}, r"poses must be \[n, 4, 4\], or None with actions .* got None"),
        (make_memory(), {"actions": LEFT_AND_BACK.until(8)}, "actions must be of at least chunk_frames=3 .* got 2"),
        (make_memory(), {"actions": Actions(LEFT_AND_BACK.mouse[:9], LEFT_AND_BACK.keyboard)},
         "actions must have a row for 129 video frames, got 9 of mouse"),
    ],
)  # fmt: skip
def test_bad_arguments_are_told_at_the_call(memory, arguments, message):
    with pytest.raises(ValueError, match=f"rollout: {message}"):
        rollout(make_model(), memory, intrinsics=INTRINSICS, **arguments)


def test_a_stream_without_poses_or_actions():
    with pytest.raises(ValueError, match="rollout: controls must have poses, or actions that the memory goes by"):
        next(Rollout(make_model(), make_memory(), [Controls(None, INTRINSICS)]))
    with pytest.raises(ValueError, match="begin_chunk: actions must be of 9 rows in mode 'worldkv', got None"):
        poses = np.tile(np.eye(4), (3, 1, 1))
        next(Rollout(make_model(), make_memory(), [Controls(poses, np.tile(INTRINSICS, (3, 1)))]))
