"""The rollout, with a model of known answers: which passes it makes, with what, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from worldkv_kernels import WorldMemory
from worldkv_kernels.models.rollout import Actions, Controls, Rollout, noise, rollout
from worldkv_kernels.models.small_world import SmallWorldConfig
from worldkv_kernels.trajectory import latent_poses, load

SIGMAS = (1.0, 0.979, 0.947, 0.825)
POSES, INTRINSICS = latent_poses(load("right*40,forward*32,left*40"))  # 29 latent frames, 9 chunks


def make_memory(model, mode="full", **options):
    options = {"bank_chunks": 20, **options}
    return WorldMemory(model.config.memory(mode=mode, **options), device=model.device, dtype=model.dtype)


class Known:
    """Its flow always leads to `target`; writes down what it is given, and fails where told to."""

    def __init__(self, fail_at=None):
        self.device = torch.device("cpu")
        self.chunk_frames, self.latent_shape = 3, (2, 2, 4)
        self.target = torch.randn(3, 2, 2, 4, generator=torch.Generator().manual_seed(9))
        self.config = SmallWorldConfig(num_layers=1, num_heads=1, grid=(1, 2))
        self.dtype, self.fail_at, self.seen = torch.float32, fail_at, []

    sigmas = SIGMAS

    def prepare_rollout(self, conditions, first_pose, noise_levels):
        assert not torch.is_grad_enabled()
        self.conditions, self.levels, self.first_pose = conditions, noise_levels, first_pose
        return "rollout"

    def prepare_chunk(self, of_rollout, start_frame, controls):
        assert of_rollout == "rollout" and not torch.is_grad_enabled()
        self.start_frame, self.controls = start_frame, controls
        return "chunk"

    def denoise(self, latents, step, of_chunk, memory):
        assert of_chunk == "chunk" and not torch.is_grad_enabled()
        if len(self.seen) == self.fail_at:
            raise KeyboardInterrupt
        self.seen.append((step, latents))
        memory.attend(0, *torch.zeros(3, 6, 64))
        return (latents - self.target) / (self.levels[step] or 1.0)


def test_the_passes_of_a_chunk():
    model = Known()
    chunks = list(rollout(model, make_memory(model), POSES[:7], INTRINSICS[:7], seed=11))
    assert [chunk.plan.chunk for chunk in chunks] == [0, 1]  # one frame is left over
    assert model.levels == (*SIGMAS, 0.0)
    assert [step for step, _ in model.seen] == [0, 1, 2, 3, 4] * 2
    assert np.array_equal(model.first_pose, POSES[0])
    assert model.start_frame == 3 and model.conditions is None and model.controls.actions is None
    assert all(np.array_equal(a, b[3:6]) for a, b in zip(model.controls[:2], (POSES, INTRINSICS), strict=True))
    for chunk in range(2):
        for step, sigma in enumerate((1.0, 0.979, 0.947, 0.825, 0.0)):
            want = (1 - sigma) * model.target
            if sigma:
                want = want + sigma * noise(11, chunk, step, (3, 2, 2, 4))
            torch.testing.assert_close(model.seen[5 * chunk + step][1], want, atol=1e-5, rtol=0)
        torch.testing.assert_close(chunks[chunk].latents, model.target, atol=1e-5, rtol=0)
        assert chunks[chunk].seconds > 0


def test_other_sigmas():
    model = Known()
    list(rollout(model, make_memory(model), POSES[:3], INTRINSICS[0], sigmas=[1, 0.5]))
    assert model.levels == (1, 0.5, 0.0) and [step for step, _ in model.seen] == [0, 1, 2]


def test_the_models_own_sigmas_are_the_default():
    model = Known()
    model.sigmas = (1.0, 0.7)
    list(rollout(model, make_memory(model), POSES[:3], INTRINSICS[0]))
    assert model.levels == (1.0, 0.7, 0.0)


def test_actions_grow_with_the_video_and_conditions_are_handed_on():
    model = Known()
    actions = Actions(np.arange(44.0).reshape(22, 2), np.arange(66.0).reshape(22, 3))
    lengths = []
    for _ in rollout(model, make_memory(model), POSES[:6], actions=actions, conditions="a prompt"):
        lengths.append(len(model.controls.actions.mouse))
        assert np.array_equal(model.controls.actions.mouse, actions.mouse[: lengths[-1]])
        assert np.array_equal(model.controls.actions.keyboard, actions.keyboard[: lengths[-1]])
        assert model.controls.intrinsics is None
    assert lengths == [9, 21]  # one row for frame 0, four for each frame after it
    assert model.conditions == "a prompt"
    with pytest.raises(ValueError, match="rollout: actions must have a row for 33 video frames, got 22 of mouse"):
        rollout(model, make_memory(model), POSES[:9], actions=actions)


def test_a_stream_asks_for_controls_when_they_are_due():
    model, asked = Known(), []

    def controls():
        for first in (0, 3):
            asked.append(first)
            yield Controls(POSES[first : first + 3], INTRINSICS[first : first + 3])

    chunks = Rollout(model, make_memory(model), controls(), seed=5)
    assert not asked
    streamed = [next(chunks)]
    assert asked == [0]
    streamed.append(next(chunks))
    whole = rollout(Known(), make_memory(model), POSES[:6], INTRINSICS[:6], seed=5)
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(streamed, whole, strict=True))


def test_one_chunk_is_prepared_ahead_and_no_more(monkeypatch):
    """As on a GPU, where what is queued is not yet made; reading `seconds` waits for the chunk's own end."""
    happened = []

    class Took:
        made = 0

        def __init__(self, device):
            self.chunk, Took.made = Took.made, Took.made + 1

        def end(self):
            happened.append(f"queued {self.chunk}")

        def wait(self):
            happened.append(f"waited for {self.chunk}")

        def seconds(self):
            self.wait()
            return 1.5

    monkeypatch.setattr("worldkv_kernels.models.rollout._Took", Took)
    model = Known()

    def controls():
        for chunk in range(4):
            happened.append(f"asked for {chunk}")
            yield Controls(POSES[3 * chunk : 3 * chunk + 3], INTRINSICS[:3])

    for chunk in Rollout(model, make_memory(model), controls()):
        happened.append(f"yielded {chunk.plan.chunk}")
        if chunk.plan.chunk == 3:
            assert chunk.seconds == 1.5
    assert happened == [
        "asked for 0", "queued 0", "yielded 0",
        "asked for 1", "queued 1", "yielded 1", "waited for 0",
        "asked for 2", "queued 2", "yielded 2", "waited for 1",
        "asked for 3", "queued 3", "yielded 3", "waited for 3", "waited for 2",
    ]  # fmt: skip


def test_a_chunk_is_yielded_before_the_next_is_begun():
    model = Known()
    memory = make_memory(model)
    for made, chunk in enumerate(rollout(model, memory, POSES[:9], INTRINSICS[:9]), start=1):
        assert memory.stats()["chunks"] == made == chunk.plan.chunk + 1
        assert torch.is_grad_enabled()  # the caller's setting is left alone between chunks
    memory.reset()
    rollout_of_three = rollout(model, memory, POSES[:9], INTRINSICS[:9])
    next(rollout_of_three)
    assert memory.stats()["chunks"] == 1
    memory.begin_chunk(POSES[3:6])


@pytest.mark.parametrize("fail_at, done", [(0, 0), (5, 1), (7, 1), (9, 1)])
def test_an_exception_drops_the_chunk_it_falls_in(fail_at, done):
    model = Known(fail_at)
    memory = make_memory(model, "worldkv")
    made = []
    with pytest.raises(KeyboardInterrupt):
        made.extend(chunk.plan.chunk for chunk in rollout(model, memory, POSES, INTRINSICS))
    assert memory.stats()["chunks"] == done
    assert memory.begin_chunk(POSES[:3]).chunk == done


def test_a_chunk_begun_by_the_caller_is_not_dropped():
    model = Known()
    memory = make_memory(model)
    memory.begin_chunk()
    with pytest.raises(RuntimeError, match="begin_chunk: chunk 0 must be ended"):
        next(rollout(model, memory, POSES, INTRINSICS))
    memory.attend(0, *torch.zeros(3, 6, 64))  # still begun
    memory.end_chunk()


def test_retrieval_by_fov_gets_the_intrinsics():
    model = Known()
    memory = make_memory(model, "worldkv", retrieval="fov", retrieved_chunks=1)
    plans = [chunk.plan for chunk in rollout(model, memory, POSES, INTRINSICS)]
    assert plans[-1].retrieved


@pytest.mark.parametrize(
    "change, message",
    [
        ({"poses": POSES[:, :3]}, r"rollout: poses must be \[frames, 4, 4\], got \[29, 3, 4\]"),
        ({"poses": POSES[:2], "intrinsics": INTRINSICS[:2]}, "at least chunk_frames=3 latent frames, got 2"),
        ({"intrinsics": INTRINSICS[:5]}, r"rollout: intrinsics must be \[29, 4\] or \[4\], got \[5, 4\]"),
        ({"seed": -1}, "rollout: seed must be at least 0, got -1"),
        ({"sigmas": ()}, r"rollout: sigmas must start at 1, fall, and stay above 0, got \[\]"),
        ({"sigmas": (0.9, 0.5)}, r"sigmas must start at 1, .* got \[0.9, 0.5\]"),
        ({"sigmas": (1, 0.5, 0.7)}, r"sigmas must start at 1, .* got \[1, 0.5, 0.7\]"),
        ({"sigmas": (1, 0.5, 0.0)}, r"sigmas must start at 1, .* got \[1, 0.5, 0.0\]"),
    ],
)
def test_bad_arguments_are_told_at_the_call(change, message):
    model = Known()
    arguments = {"poses": POSES, "intrinsics": INTRINSICS, **change}
    with pytest.raises(ValueError, match=message):
        rollout(model, make_memory(model), arguments.pop("poses"), arguments.pop("intrinsics"), **arguments)


def test_a_memory_that_does_not_fit_is_told_at_the_call():
    model = Known()
    other = Known()
    other.config = SmallWorldConfig(num_layers=1, num_heads=1, grid=(1, 2), chunk_frames=1)
    two = WorldMemory(replace(make_memory(model).config, branches=2), dtype=torch.float32)
    with pytest.raises(ValueError, match="rollout: memory must be of one branch, since a model here makes one video"):
        rollout(model, two, POSES, INTRINSICS)
    with pytest.raises(ValueError, match="rollout: memory must have the model's chunk_frames=3, got 1"):
        rollout(model, make_memory(other), POSES, INTRINSICS)
    memory = make_memory(model)
    list(rollout(model, memory, POSES[:6], INTRINSICS[:6]))
    with pytest.raises(ValueError, match="rollout: memory must be new or reset, got one of 2 chunks"):
        rollout(model, memory, POSES, INTRINSICS)


def test_noise_is_a_function_of_seed_chunk_and_step():
    drawn = noise(1, 2, 3, (40, 50))
    torch.manual_seed(0)  # whatever else draws
    assert torch.equal(drawn, noise(1, 2, 3, (40, 50)))
    for other in ((0, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2), (2, 1, 3)):
        assert (drawn * noise(*other, (40, 50))).mean().abs() < 0.1
    assert drawn.mean().abs() < 0.1 and abs(drawn.std() - 1) < 0.1
