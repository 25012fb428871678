"""A rollout of which the first chunks are given: it goes on as if it had made them, and makes none of them."""

import re

import numpy as np
import pytest
import torch

from worldkv_kernels import WorldMemory
from worldkv_kernels.models.rollout import Controls, Rollout, noise, rollout
from worldkv_kernels.models.small_world import SmallWorld, SmallWorldConfig
from worldkv_kernels.worlds import looking

CONFIG = SmallWorldConfig(num_layers=2, num_heads=1, grid=(2, 3), ffn_dim=96, latent_channels=4)
CHUNKS = 7
POSES = looking(0.1 * torch.arange(3 * CHUNKS), 0.2 * torch.sin(torch.arange(3 * CHUNKS))).double().numpy()
INTRINSICS = np.array([40.0, 40.0, 24.0, 16.0])
SIGMAS = (1.0, 0.7, 0.3)
MODES = ["worldkv", "full", "sliding", "sink_recent"]


class Watched(SmallWorld):
    """Notes the chunk, the noise level, the latents and the flow of each pass."""

    passes: list

    def prepare_chunk(self, of_rollout, start_frame, controls):
        self.passes.append((start_frame // 3, []))
        return super().prepare_chunk(of_rollout, start_frame, controls)

    def denoise(self, latents, step, of_chunk, memory):
        flow = super().denoise(latents, step, of_chunk, memory)
        self.passes[-1][1].append((of_chunk.rollout.noise_levels[step], latents.clone(), flow))
        return flow


@pytest.fixture
def model():
    made = Watched.random(CONFIG, 0, device="cpu", dtype=torch.float32)
    made.passes = []
    return made


def memory_of(mode="worldkv"):
    """Small enough that chunks are pruned, banked and retrieved before the rollout ends."""
    config = CONFIG.memory(mode=mode, recent_frames=3, retrieved_chunks=2, bank_chunks=20)
    return WorldMemory(config, device="cpu", dtype=torch.float32)


def made_by(model, mode="worldkv", **options):
    return list(rollout(model, memory_of(mode), POSES, INTRINSICS, **{"seed": 3, "sigmas": SIGMAS, **options}))


def latents_of(chunks):
    return torch.cat([chunk.latents for chunk in chunks])


def given_like(model, frames, seed=1):
    return torch.randn(frames, *model.latent_shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("given", [1, 4, CHUNKS - 1])
def test_given_the_first_chunks_of_another_it_goes_on_to_the_same_bits(model, mode, given):
    whole = made_by(model, mode)
    rest = made_by(model, mode, given=latents_of(whole[:given]))
    assert torch.equal(latents_of(rest), latents_of(whole))
    assert [chunk.plan for chunk in rest] == [chunk.plan for chunk in whole]
    assert any(chunk.plan.retrieved for chunk in whole) is (mode == "worldkv")


def test_what_is_given_is_what_it_goes_on_from(model):
    one, other = (made_by(model, given=given_like(model, 6, seed)) for seed in (1, 2))
    for chunk, another in zip(one, other, strict=True):
        assert not torch.equal(chunk.latents, another.latents)
    assert torch.equal(latents_of(one[:2]), given_like(model, 6, 1))
    alone = made_by(model)
    assert not torch.equal(alone[2].latents, one[2].latents)


def test_given_chunks_are_passed_once_at_sigma_0(model):
    given = given_like(model, 9)
    chunks = made_by(model, given=given)
    assert [number for number, _ in model.passes] == list(range(CHUNKS))
    for number, passes in model.passes:
        levels = [sigma for sigma, _, _ in passes]
        assert levels == ([0.0] if number < 3 else [*SIGMAS, 0.0])
        assert torch.equal(passes[-1][1], chunks[number].latents)
        if number < 3:
            assert torch.equal(passes[0][1], given[3 * number : 3 * number + 3])


def test_made_chunks_start_as_noise_of_their_number_and_are_noised_again(model):
    """Whatever is given before them."""
    made_by(model, given=given_like(model, 9))
    for number, passes in model.passes[3:]:
        clean = torch.zeros(3, *model.latent_shape)
        for step, (sigma, latents, flow) in enumerate(passes):
            fresh = noise(3, number, step, latents.shape) if sigma else 0.0
            torch.testing.assert_close(latents, (1 - sigma) * clean + sigma * fresh)
            clean = latents - sigma * flow


def test_all_of_it_is_given(model):
    given = given_like(model, 3 * CHUNKS)
    chunks = made_by(model, given=given)
    assert len(chunks) == CHUNKS and torch.equal(latents_of(chunks), given)
    assert all(len(passes) == 1 for _, passes in model.passes)


def test_no_frames_given_are_none(model):
    assert torch.equal(latents_of(made_by(model, given=given_like(model, 0))), latents_of(made_by(model)))


def test_frames_that_fill_no_chunk_are_not_made_whatever_is_given(model):
    given = given_like(model, 6)
    short = list(rollout(model, memory_of(), POSES[:8], INTRINSICS, given=given, sigmas=SIGMAS))
    assert len(short) == 2 and torch.equal(latents_of(short), given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_given_latents_of_another_dtype_are_taken_as_fp32(model, dtype):
    given = given_like(model, 6).to(dtype)
    before = given.clone()
    chunks = made_by(model, given=given)
    assert all(chunk.latents.dtype == torch.float32 for chunk in chunks)
    assert torch.equal(latents_of(chunks), latents_of(made_by(model, given=given.float())))
    assert torch.equal(given, before)


def test_given_to_a_stream(model):
    """Controls are asked for one by one, those of given chunks, too."""
    asked = []

    def controls():
        for first in range(0, 3 * CHUNKS, 3):
            asked.append(first // 3)
            yield Controls(POSES[first : first + 3], np.tile(INTRINSICS, (3, 1)))

    given = given_like(model, 6)
    chunks = []
    for chunk in Rollout(model, memory_of(), controls(), given=given, seed=3, sigmas=SIGMAS):
        chunks.append(chunk)
        assert asked == list(range(len(chunks)))
    assert torch.equal(latents_of(chunks), latents_of(made_by(model, given=given)))
    assert all(chunk.seconds > 0 for chunk in chunks)


@pytest.mark.parametrize(
    "shape, got",
    [
        ((4, 4, 4, 6), "[4, 4, 4, 6]"),  # no whole chunks
        ((3, 5, 4, 6), "[3, 5, 4, 6]"),
        ((3, 4, 6, 4), "[3, 4, 6, 4]"),
        ((1, 3, 4, 4, 6), "[1, 3, 4, 4, 6]"),
        ((3, 4, 4), "[3, 4, 4]"),
    ],
)
@pytest.mark.parametrize("by_stream", [False, True])
def test_given_latents_must_be_whole_chunks_of_the_models_shape(model, shape, got, by_stream):
    wanted = re.escape(f"rollout: given must be [n, 4, 4, 6], n a multiple of 3, got {got}")
    with pytest.raises(ValueError, match=wanted):  # at the call, before anything is made
        if by_stream:
            Rollout(model, memory_of(), iter([]), given=torch.zeros(shape))
        else:
            rollout(model, memory_of(), POSES, INTRINSICS, given=torch.zeros(shape))


@pytest.mark.parametrize("frames, most", [(21, 21), (20, 18), (3, 3)])
def test_no_more_can_be_given_than_is_made(model, frames, most):
    message = f"rollout: given must be of at most the {most} latent frames of the rollout, got {most + 3}"
    with pytest.raises(ValueError, match=message):
        rollout(model, memory_of(), POSES[:frames], INTRINSICS, given=given_like(model, most + 3))


def test_a_fault_in_a_given_chunk_drops_that_chunk(model, monkeypatch):
    memory = memory_of()
    chunks = rollout(model, memory, POSES, INTRINSICS, given=given_like(model, 9), sigmas=SIGMAS)
    next(chunks)
    denoise = Watched.denoise
    monkeypatch.setattr(Watched, "denoise", lambda *args: (denoise(*args), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        next(chunks)
    assert memory.stats()["chunks"] == 1
    memory.begin_chunk(POSES[3:6])  # it can go on
    memory.abort_chunk()
