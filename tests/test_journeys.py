"""Journeys: ways and views seen again by hand and by brute force, and travel against a loop written out."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from worldkv_kernels import WorldMemory
from worldkv_kernels.journeys import LEAST_GAP, STEP, Journey, psnr, ssim, travel, truth, turn_and_return
from worldkv_kernels.models.rollout import rollout
from worldkv_kernels.models.small_world import SmallWorld, SmallWorldConfig
from worldkv_kernels.poses import as_poses
from worldkv_kernels.worlds import INTRINSICS, decode, draw_worlds, encode, looking, pictures

MODEL = SmallWorld.random(SmallWorldConfig(num_layers=1), 0, device="cpu", dtype=torch.float32)


def journey_of(yaw, given=0, *, pitch=0.0, position=None):
    """Of yaws and pitches in degrees."""
    yaw = torch.as_tensor(np.asarray(yaw, dtype=float)).deg2rad()
    pitch = torch.as_tensor(np.broadcast_to(pitch, yaw.shape).astype(float)).deg2rad()
    position = None if position is None else torch.as_tensor(np.asarray(position, dtype=float))
    return Journey(looking(yaw, pitch, position).numpy(), given)


def yaws_and_pitches(journey):
    """In degrees, the yaws without jumps."""
    forward = journey.poses[:, :3, 2]
    return np.degrees(np.unwrap(np.arctan2(forward[:, 0], forward[:, 2]))), np.degrees(np.arcsin(-forward[:, 1]))


# --- the way out and back ---


@pytest.mark.parametrize("chunks, number", [(2, 0), (10, 0), (30, 3), (48, 11)])
def test_turn_and_return_by_hand(chunks, number):
    journey = turn_and_return(chunks, number)
    assert journey.poses.shape == (3 * chunks, 4, 4) and journey.given == 3 * chunks // 2
    as_poses("test", journey.poses)
    assert not journey.poses[:, :3, 3].any()  # on the spot
    yaw, pitch = yaws_and_pitches(journey)
    out, back = slice(0, journey.given), slice(journey.given, None)
    np.testing.assert_allclose(np.diff(yaw[out]), STEP, atol=1e-9)
    np.testing.assert_allclose(np.diff(yaw[back]), -STEP, atol=1e-9)
    assert math.radians(yaw[0]) == pytest.approx(math.remainder(number, 2 * math.pi))  # each world's own direction
    np.testing.assert_allclose(pitch[out], [8 * math.sin(i / 5 + 1.7 * number) for i in range(journey.given)])
    # Coming back: 45 % of a step short of the view of before, and 2.5 degrees above it.
    np.testing.assert_allclose(yaw[back], yaw[out][::-1] - 0.45 * 7, atol=1e-9)
    np.testing.assert_allclose(pitch[back], pitch[out][::-1] + 2.5, atol=1e-9)


def test_the_way_back_is_between_the_views_of_the_way_out():
    yaw, _ = yaws_and_pitches(turn_and_return(30, 5))
    out, back = yaw[:45], yaw[45:]
    nearest = np.abs(back[:, None] - out).min(axis=1)
    np.testing.assert_allclose(nearest[:-1], 0.45 * STEP, atol=1e-9)


def test_steps_and_chunks_are_parameters():
    journey = turn_and_return(4, step=2.0, chunk_frames=5)
    yaw, _ = yaws_and_pitches(journey)
    assert (len(yaw), journey.given) == (20, 10)
    np.testing.assert_allclose(yaw, np.r_[np.arange(0, 20, 2), np.arange(18, -2, -2) - 0.9], atol=1e-9)


@pytest.mark.parametrize("chunks", [-2, 0, 1, 3, 31])
def test_half_of_the_chunks_must_be_there_to_come_back(chunks):
    with pytest.raises(ValueError, match=f"turn_and_return: chunks must be even and at least 2, got {chunks}"):
        turn_and_return(chunks)


# --- views seen again ---


def plain_seen_again(journey, least_gap):
    """Frame by frame backwards: out of this visit first, then to where the view was seen before."""

    def near(a, b):
        turn = a[:3, :3].T @ b[:3, :3]
        angle = math.degrees(math.acos(max(-1.0, min(1.0, (np.trace(turn) - 1) / 2))))
        return angle <= 12 and math.dist(a[:3, 3], b[:3, 3]) <= 0.15

    gaps = {}
    for frame in range(journey.given, len(journey.poses)):
        before = frame - 1
        while before >= 0 and near(journey.poses[before], journey.poses[frame]):
            before -= 1
        while before >= 0 and not near(journey.poses[before], journey.poses[frame]):
            before -= 1
        if before >= 0 and frame - before >= least_gap:
            gaps[frame] = frame - before
    return gaps


@pytest.mark.parametrize("seed", range(8))
def test_seen_again_on_random_walks(seed):
    rng = np.random.default_rng(seed)
    frames = 120
    yaw, pitch = rng.normal(0, 14, frames).cumsum(), rng.normal(0, 4, frames).cumsum() % 60 - 30
    position = rng.normal(0, 0.04, (frames, 3)).cumsum(axis=0) * (seed % 2)
    journey = journey_of(yaw, 3 * seed, pitch=pitch, position=position)
    for least_gap in (1, 5, LEAST_GAP):
        want = plain_seen_again(journey, least_gap)
        assert journey.seen_again(least_gap) == want
    assert journey.seen_again() == want
    assert len(plain_seen_again(journey, 5)) > 3  # there is something to be found


def test_a_still_camera_sees_nothing_again():
    assert journey_of(np.zeros(90)).seen_again() == {}
    assert journey_of(np.zeros(90), 45).seen_again(1) == {}


def test_out_and_back_by_hand():
    """Steps of 10 degrees: a neighbour's view is near, the next one's is not."""
    out = 10 * np.arange(15)
    journey = journey_of(np.r_[out, out[::-1]], given=15)
    # Frame 15 + i shows what 14 - i did, and was last seen one frame later on the way out, at 15 - i: 2 i frames ago.
    assert journey.seen_again(2) == {15 + i: 2 * i for i in range(2, 15)}
    assert journey.seen_again() == {15 + i: 2 * i for i in range(9, 15)}
    given_more = Journey(journey.poses, 27)
    assert given_more.seen_again() == {27: 24, 28: 26, 29: 28}


def test_a_full_turn_by_hand():
    journey = journey_of(15 * np.arange(60))  # no neighbour is near
    assert journey.seen_again() == {frame: 24 for frame in range(24, 60)}
    assert journey.seen_again(24) == journey.seen_again() and journey.seen_again(25) == {}


def test_views_of_the_current_visit_do_not_count():
    """A camera that stays for long where it has not been before, and then where it has been."""
    yaw = np.r_[np.zeros(3), np.full(30, 90.0), np.zeros(30)]
    gaps = journey_of(yaw).seen_again()
    assert gaps == {frame: frame - 2 for frame in range(33, 63)}


def test_near_is_within_12_degrees_and_a_distance_of_15_hundredths():
    away = np.full(20, 90.0)
    for turned, seen in ((11.9, True), (12.1, False), (-11.9, True)):
        assert bool(journey_of(np.r_[0.0, away, turned]).seen_again()) is seen
        assert bool(journey_of(np.zeros(22), pitch=np.r_[0.0, -away / 2, turned]).seen_again()) is seen
    for moved, seen in ((0.149, True), (0.151, False)):
        position = np.zeros((22, 3))
        position[-1] = moved * np.array([2, 1, 2]) / 3
        assert bool(journey_of(np.r_[0.0, away, 0.0], position=position).seen_again()) is seen


@pytest.mark.parametrize("number", [0, 3, 7])
def test_what_is_seen_again_on_the_way_back(number):
    """Frame 45 + i lies between 44 - i and its neighbours; the last of those that were near is 45 - i."""
    assert turn_and_return(30, number).seen_again() == {45 + i: 2 * i for i in range(9, 45)}


# --- travel ---


def memory_of(**options):
    return WorldMemory(MODEL.config.memory(bank_chunks=20, **options), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def world():
    return draw_worlds(1, torch.Generator().manual_seed(0))[0]


def test_truth_is_what_the_camera_sees(world):
    journey = journey_of(10 * np.arange(6), 3, position=0.05 * np.arange(18).reshape(6, 3) / 3)
    seen = truth(world, journey)
    assert seen.shape == (6, 3, 48, 64)
    for frame in range(6):
        pose = torch.from_numpy(journey.poses[frame]).float()[None, None]
        torch.testing.assert_close(seen[frame], pictures(world[None], pose)[0, 0])


@pytest.mark.parametrize("mode", ["worldkv", "sliding"])
def test_travel_is_a_rollout_that_is_given_the_way_out(world, mode):
    journey, sigmas = turn_and_return(8, 2), (1.0, 0.6)
    called = []
    trip = travel(MODEL, memory_of(mode=mode), world, journey, seed=5, sigmas=sigmas, on_chunk=lambda: called.append(1))
    given = encode(truth(world, journey))[:12]
    memory = memory_of(mode=mode)
    chunks = list(rollout(MODEL, memory, journey.poses, INTRINSICS, given=given, seed=5, sigmas=sigmas))
    assert len(called) == len(chunks) == 8
    assert torch.equal(trip.frames, decode(torch.cat([chunk.latents for chunk in chunks])))
    assert trip.plans == [chunk.plan for chunk in chunks]
    assert [plan.start_frame for plan in trip.plans] == list(range(0, 24, 3))
    assert trip.stats == memory.stats()
    other = travel(MODEL, memory_of(mode=mode), world, journey, seed=6, sigmas=sigmas)
    assert not torch.equal(other.frames[12:], trip.frames[12:])


def test_given_frames_come_back_as_the_codec_leaves_them(world):
    journey = turn_and_return(4)
    trip = travel(MODEL, memory_of(), world, journey)
    assert trip.frames.shape == (12, 3, 48, 64) and not trip.frames.requires_grad
    torch.testing.assert_close(trip.frames[:6], decode(encode(truth(world, journey)[:6])))
    assert psnr(trip.frames[:6], truth(world, journey)[:6]).min() > 35
    assert psnr(trip.frames[6:], truth(world, journey)[6:]).max() < 25  # these a random model made


def test_seconds_are_those_of_the_chunks_that_were_made(world, monkeypatch):
    def timed(*args, **options):
        for chunk in rollout(*args, **options):
            yield replace(chunk, took=SimpleNamespace(seconds=lambda at=chunk.plan.chunk: 2.0**at))

    monkeypatch.setattr("worldkv_kernels.journeys.rollout", timed)
    assert travel(MODEL, memory_of(), world, turn_and_return(6)).made_seconds == [2**3, 2**4, 2**5]


def test_a_journey_of_which_nothing_or_all_is_given(world):
    poses = turn_and_return(2).poses
    alone = travel(MODEL, memory_of(), world, Journey(poses, 0))
    (first, second) = rollout(MODEL, memory_of(), poses, INTRINSICS)
    assert torch.equal(alone.frames, decode(torch.cat([first.latents, second.latents])))
    shown = travel(MODEL, memory_of(), world, Journey(poses, 6))
    assert shown.made_seconds == [] and torch.equal(shown.frames, decode(encode(truth(world, Journey(poses, 6)))))


# --- measures ---


def test_psnr_by_hand():
    grey = torch.full((4, 3, 8, 8), 0.5)
    other = grey.clone()
    other[1] += 0.1
    other[2, 0, 0, 0] -= 0.5  # one of 192 numbers
    other[3] = 1.0
    want = [100, 20, -10 * math.log10(0.25 / 192), -10 * math.log10(0.25)]
    torch.testing.assert_close(psnr(other, grey), torch.tensor(want))
    assert torch.equal(psnr(grey, other), psnr(other, grey))


def test_ssim_is_of_each_frame():
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    rng = torch.Generator().manual_seed(0)
    true = torch.rand(4, 3, 16, 16, generator=rng)
    true[3] = 0.45 + 0.1 * true[3]
    drawn = true.clone()
    drawn[[1, 3]] = 0.5 * drawn[[1, 3]] + 0.25  # of half the contrast
    drawn[2] = torch.rand(3, 16, 16, generator=rng)
    got = ssim(drawn, true)
    assert got.shape == (4,) and got[0] == pytest.approx(1)
    # At the means' own level what is left is 2 sigma_x sigma_y / (sigma_x^2 + sigma_y^2) = 0.8.
    assert got[1] == pytest.approx(0.8, abs=0.01) and abs(got[2]) < 0.1
    # Where there is little contrast, c = (0.03 of the range 1)^2 counts: (0.1^2 / 12 + c) / (1.25 * 0.1^2 / 12 + c).
    assert got[3] == pytest.approx(0.893, abs=0.01)
