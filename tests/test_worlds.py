"""Worlds, pictures and the codec: rays one at a time, numbers that were measured, and every error."""

import math

import numpy as np
import pytest
import torch

from benchmarks.train_small_world import Clips
from worldkv_kernels.journeys import psnr
from worldkv_kernels.models.small_world import SmallWorld, SmallWorldConfig
from worldkv_kernels.poses import look_rotation
from worldkv_kernels.worlds import (
    FIELD_OF_VIEW,
    FRAME,
    INTRINSICS,
    SCALES,
    TEXTURE,
    decode,
    draw_worlds,
    encode,
    looking,
    photograph_world,
    pictures,
)

HEIGHT, WIDTH = TEXTURE


def generator(seed):
    return torch.Generator().manual_seed(seed)


def drawn_pictures(worlds=16, frames=4):
    """Of random worlds, in random directions."""
    angles = torch.rand(2, worlds, frames, generator=generator(1)) - 0.5
    return pictures(draw_worlds(worlds, generator(0)), looking(2 * math.pi * angles[0], angles[1]))


# --- drawn worlds ---


def test_drawn_worlds_are_a_function_of_the_generators_state():
    of_seed = generator(3)
    first = draw_worlds(2, of_seed)
    torch.manual_seed(99)  # the process's generator has no part in it
    assert torch.equal(draw_worlds(2, generator(3)), first)
    state = of_seed.get_state()
    second = draw_worlds(2, of_seed)
    assert not torch.equal(second, first)
    of_seed.set_state(state)
    assert torch.equal(draw_worlds(2, of_seed), second)
    assert not torch.equal(first[0], first[1])


def test_drawn_worlds_are_colours_that_vary():
    worlds = draw_worlds(8, generator(0))
    assert worlds.shape == (8, 3, *TEXTURE) and worlds.dtype == torch.float32
    assert worlds.min() >= 0 and worlds.max() <= 1
    assert worlds.std(dim=(2, 3)).min() > 0.05  # no colour of any of them is even


def test_drawn_worlds_close_behind_the_camera():
    """From the last column to the first is a step like others."""
    worlds = draw_worlds(64, generator(0))
    steps = (worlds - worlds.roll(1, dims=-1)).abs().mean(dim=(0, 1, 2))  # step 0 is the one behind the camera
    assert steps[0] < 1.5 * steps[1:].mean()  # 1.3 was measured: the finer octave's columns are no whole pixels


# --- photographs ---


def test_a_photograph_and_its_mirror_image_close_around_the_horizon():
    image = np.random.default_rng(0).random((HEIGHT, WIDTH // 2, 3))
    world = photograph_world(image)
    assert world.dtype == torch.float32
    want = torch.from_numpy(image).float().permute(2, 0, 1)
    torch.testing.assert_close(world[..., : WIDTH // 2], want)
    torch.testing.assert_close(world[..., WIDTH // 2 :], want.flip(-1))


@pytest.mark.parametrize("size", [(300, 451), (64, 64), (97, 1000)])
def test_a_photograph_of_any_size(size):
    ramp = np.broadcast_to(np.linspace(0, 1, size[1])[None, :, None], (*size, 3))
    world = photograph_world(ramp)
    assert world.shape == (3, *TEXTURE) and world.min() >= 0 and world.max() <= 1
    torch.testing.assert_close(world, world.flip(-1))  # so its first and last column are alike
    want = torch.cat([torch.linspace(0, 1, WIDTH // 2), torch.linspace(1, 0, WIDTH // 2)])
    assert (world - want).abs().max() < 0.02
    torch.testing.assert_close(photograph_world(np.full((*size, 3), 0.3)), torch.full((3, *TEXTURE), 0.3))


@pytest.mark.parametrize("shape", [(80, 80), (80, 80, 4), (3, 80, 80), (1, 80, 80, 3)])
def test_what_is_no_photograph_is_refused(shape):
    got = ", ".join(map(str, shape))
    message = rf"photograph_world: image must be \[height, width, 3\], got \[{got}\]"
    with pytest.raises(ValueError, match=message):
        photograph_world(np.zeros(shape))


# --- cameras ---


def test_looking_is_yaw_to_the_right_and_pitch_up():
    yaws, pitches = torch.tensor([0.0, 0.7, -2.0, 3.0]).double(), torch.tensor([0.0, -0.4, 1.2, 0.1]).double()
    position = torch.randn(4, 3, generator=generator(0)).double()
    poses = looking(yaws, pitches, position)
    for pose, yaw, pitch, at in zip(poses, yaws.tolist(), pitches.tolist(), position, strict=True):
        want = np.eye(4)
        want[:3, :3], want[:3, 3] = look_rotation(yaw, pitch), at
        np.testing.assert_allclose(pose.numpy(), want, atol=1e-15)
    (right,) = looking(*torch.tensor([[90.0], [0.0]]).deg2rad())
    (up,) = looking(*torch.tensor([[0.0], [30.0]]).deg2rad())
    np.testing.assert_allclose(right[:3, 2], (1, 0, 0), atol=1e-6)  # what was on the right is ahead
    np.testing.assert_allclose(up[:3, 2], (0, -0.5, math.cos(math.pi / 6)), atol=1e-6)  # y points down


def test_looking_takes_any_shape_and_stands_in_the_middle():
    yaw, pitch = torch.rand(2, 2, 5, generator=generator(0))
    poses = looking(yaw, pitch)
    assert poses.shape == (2, 5, 4, 4) and torch.equal(poses[..., :3, 3], torch.zeros(2, 5, 3))
    assert torch.equal(poses[1, 3], looking(yaw[1, 3], pitch[1, 3]))


# --- pictures ---


def colour(x, y, z):
    """Of a smooth world, in the direction of a unit vector: three numbers that no mirror or turn leaves alone."""
    return (0.5 + 0.2 * x + 0.15 * x * z, 0.5 + 0.25 * y - 0.1 * z, 0.5 + 0.2 * z + 0.1 * x * y)


def smooth_world():
    world = np.zeros((3, HEIGHT, WIDTH))
    for row in range(HEIGHT):
        latitude = math.pi * ((row + 0.5) / HEIGHT - 0.5)  # downwards
        for column in range(WIDTH):
            longitude = 2 * math.pi * ((column + 0.5) / WIDTH - 0.5)
            level = math.cos(latitude)
            world[:, row, column] = colour(level * math.sin(longitude), math.sin(latitude), level * math.cos(longitude))
    return torch.from_numpy(world).float()


def plain_picture(pose):
    """A ray at a time: out of the camera, to where it meets the sphere."""
    height, width = FRAME
    fx, fy, cx, cy = INTRINSICS
    seen = np.zeros((3, height, width))
    position = pose[:3, 3]
    for row in range(height):
        for column in range(width):
            ray = pose[:3, :3] @ np.array([(column + 0.5 - cx) / fx, (row + 0.5 - cy) / fy, 1.0])
            a, b, c = ray @ ray, 2 * position @ ray, position @ position - 1
            t = (-b + math.sqrt(b * b - 4 * a * c)) / (2 * a)
            seen[:, row, column] = colour(*(position + t * ray))
    return seen


@pytest.mark.parametrize(
    "yaw, pitch, position",
    [
        (0, 0, (0, 0, 0)),
        (40, 25, (0, 0, 0)),
        (180, -10, (0, 0, 0)),  # across the seam
        (-75, 5, (0.3, -0.1, 0.25)),
        (150, -28, (-0.2, 0.3, -0.4)),
        (10, 85, (0, 0, 0.1)),  # a pole in view
    ],
)
def test_pictures_are_what_rays_meet(yaw, pitch, position):
    pose = looking(*torch.tensor([yaw, pitch]).double().deg2rad(), torch.tensor(position).double())
    got = pictures(smooth_world()[None], pose[None, None].float())
    assert got.shape == (1, 1, 3, *FRAME)
    # A texture's pixel is 1.9 degrees, so a line between two of them is off by 1e-4; by half a pixel beside a pole.
    np.testing.assert_allclose(got[0, 0], plain_picture(pose.numpy()), atol=1e-3 if pitch < 80 else 5e-3)


def test_every_camera_sees_its_own_world():
    worlds, poses = draw_worlds(2, generator(0)), looking(*torch.rand(2, 2, 3, generator=generator(1)))
    poses[..., :3, 3] = 0.3 * torch.rand(2, 3, 3, generator=generator(2))
    together = pictures(worlds, poses)
    for number in range(2):
        for frame in range(3):
            alone = pictures(worlds[number, None], poses[number, frame, None, None])
            torch.testing.assert_close(together[number, frame, None, None], alone)


def dot(row, column):
    """A black world with one bright pixel."""
    world = torch.zeros(3, *TEXTURE)
    world[:, row, column] = 1
    return world


def brightest(world, yaw=0.0, pitch=0.0):
    """Where a picture is brightest, in pixels right of and below its middle."""
    (picture,) = pictures(world[None], looking(*torch.tensor([[[yaw]], [[pitch]]]).deg2rad()))[0]
    row, column = divmod(int(picture[0].argmax()), FRAME[1])
    assert picture.max() > 0.5
    return column + 0.5 - FRAME[1] / 2, row + 0.5 - FRAME[0] / 2


def test_the_identity_looks_at_the_middle_of_the_texture():
    assert np.abs(brightest(dot(HEIGHT // 2, WIDTH // 2))).max() <= 1
    right, down = brightest(dot(HEIGHT // 2, WIDTH // 2 + 10))
    assert right > 5 and abs(down) <= 1
    right, down = brightest(dot(HEIGHT // 2 + 10, WIDTH // 2))
    assert abs(right) <= 1 and down > 5
    # To the right by as much as the dot is to the right, and it is in the middle; so above.
    assert np.abs(brightest(dot(HEIGHT // 2, WIDTH * 3 // 4), yaw=90)).max() <= 1
    assert np.abs(brightest(dot(HEIGHT // 2 - 16, WIDTH // 2), pitch=30)).max() <= 1
    assert np.abs(brightest(dot(HEIGHT // 2, 0), yaw=180)).max() <= 1


def test_a_picture_is_as_wide_as_its_field_of_view():
    fx, fy, cx, cy = INTRINSICS
    assert fx == fy and (2 * cx, 2 * cy) == (FRAME[1], FRAME[0])
    assert math.degrees(2 * math.atan(cx / fx)) == pytest.approx(FIELD_OF_VIEW)
    # What is at the left edge comes to the right edge when the camera turns left by the field of view.
    world = draw_worlds(1, generator(0))
    here, there = pictures(world, looking(torch.tensor([[0.0, -FIELD_OF_VIEW]]).deg2rad(), torch.zeros(1, 2)))[0]
    left = math.degrees(math.atan((cx - 0.5) / fx))
    assert left < FIELD_OF_VIEW / 2 < left + 1
    assert (here[:, :, 0] - there[:, :, -1]).abs().mean() < 0.5 * (here[:, :, 0] - there[:, :, 0]).abs().mean()


# --- the codec ---


def test_latents_that_clip_nothing_come_back():
    latents = 0.1 * torch.randn(5, 16, 12, 16, generator=generator(0))
    frames = decode(latents)
    assert frames.shape == (5, 3, *FRAME) and frames.min() > 0 and frames.max() < 1
    torch.testing.assert_close(encode(frames), latents, atol=2e-6, rtol=0)
    torch.testing.assert_close(encode(frames[0]), latents[0], atol=2e-6, rtol=0)


def test_what_is_clipped_is_in_0_to_1():
    frames = decode(3 * torch.randn(2, 16, 12, 16, generator=generator(0)))
    assert frames.min() == 0 and frames.max() == 1


def test_a_grey_picture_has_latents_of_zero():
    torch.testing.assert_close(encode(torch.full((3, *FRAME), 0.5)), torch.zeros(16, 12, 16), atol=1e-6, rtol=0)


def test_the_codec_leaves_pictures_of_drawn_worlds_above_40_db():
    frames = drawn_pictures().flatten(0, 1)
    of_frames = psnr(decode(encode(frames)), frames)
    assert of_frames.mean() > 42 and of_frames.min() > 36  # 43.6 and 38.3 were measured


def test_scales_are_the_latents_standard_deviations():
    """Within 5 %, as pictures of training have them, the smallest ones lifted to 8 % of the largest."""
    model = SmallWorld(SmallWorldConfig(num_layers=1), device="cpu", dtype=torch.float32)
    clips = Clips(model, 0.0, seed=0)
    latents = torch.cat([clips.draw(10)[0][:, :, 0] for _ in range(20)]).flatten(0, 1)
    scales = torch.tensor(SCALES)
    measured = latents.std(dim=(0, 2, 3)) * scales
    measured = measured.clamp_min(0.08 * measured.max())
    assert (measured / scales - 1).abs().max() < 0.05
    assert min(SCALES) == pytest.approx(0.08 * max(SCALES), rel=0.01)
