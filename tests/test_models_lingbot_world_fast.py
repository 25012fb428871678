"""LingBot-World-Fast: its published names, checkpoints and camera map, and that hoisting changes no bit."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import relative_error
from safetensors_files import write, write_sharded
from torch.utils._python_dispatch import TorchDispatchMode

from worldkv_kernels import WorldMemory
from worldkv_kernels.models.lingbot_camera import fold_pixels, longest_step, ray_map, relative_steps
from worldkv_kernels.models.lingbot_config import LingBotConfig, flow_sigmas
from worldkv_kernels.models.lingbot_world_fast import LingBotConditions, LingBotWorldFast
from worldkv_kernels.models.rollout import Actions, Controls, rollout
from worldkv_kernels.trajectory import latent_poses, load

CONFIG = LingBotConfig(
    num_layers=2, num_heads=2, head_dim=64, ffn_dim=192, grid=(2, 3), text_tokens=6, text_dim=24, frequency_dim=16
)
POSES, INTRINSICS = latent_poses(load("right*20,forward*16,left*20"))  # 15 latent frames, 5 chunks
KEYS = Actions(None, np.random.default_rng(0).integers(0, 2, (57, 4)))
# What the published config.json of CONFIG would say, in Wan's names; the rest is not in it.
PUBLISHED = {
    "_class_name": "WanModelFast", "_diffusers_version": "0.35.0", "model_type": "i2v", "dim": 128, "ffn_dim": 192,
    "freq_dim": 16, "in_dim": 36, "out_dim": 16, "num_heads": 2, "num_layers": 2, "text_len": 6, "eps": 1e-6,
    "local_attn_size": -1, "sink_size": 0,
}  # fmt: skip
NOT_PUBLISHED = dict(grid=(2, 3), text_dim=24)


def make_model(config=CONFIG, seed=0, dtype=torch.float32, **options):
    return LingBotWorldFast.random(config, seed, device="cpu", dtype=dtype, **options)


def latents_of(model, mode="full", *, poses=POSES, chunks=3, **options):
    memory = WorldMemory(model.config.memory(mode=mode, bank_chunks=20), device=model.device, dtype=model.dtype)
    frames = chunks * model.chunk_frames
    return [chunk.latents for chunk in rollout(model, memory, poses[:frames], INTRINSICS[:frames], **options)]


def same(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def all_near(first, second, tolerance=1e-5):
    return all(relative_error(a, b) < tolerance for a, b in zip(first, second, strict=True))


# --- the config ---


def test_sigmas():
    assert flow_sigmas((0, 500, 1000), shift=1) == (1, 0.5, 0)
    assert flow_sigmas((0, 1, 2), shift=3, num_train_timesteps=4) == (1, 2.25 / 2.5, 1.5 / 2)
    assert LingBotConfig.fast().sigmas == pytest.approx([1, 8.21 / 8.389, 6.42 / 6.778, 3.21 / 3.889])
    assert tuple(round(sigma, 3) for sigma in LingBotConfig.fast().sigmas) == (1.0, 0.979, 0.947, 0.825)
    launched = pytest.approx([1, 30 / 31, 10 / 11, 10 / 13])  # the published levels 999, 967, 908, 768
    assert LingBotConfig.v2_14b().sigmas == LingBotConfig.v2_1_3b().sigmas == launched
    assert make_model(replace(CONFIG, sigmas=(1.0, 0.5))).sigmas == (1.0, 0.5)


@pytest.mark.parametrize("steps, shift", [((0, 179, 358, 679), 10), ((0, 250, 500, 750), 5)])
def test_sigmas_are_those_of_the_published_schedule_as_near_as_is_said(steps, shift):
    level = np.linspace(0.999, 0, 1001)[:-1]
    sigmas = shift * level / (1 + (shift - 1) * level)
    times = (1000 * sigmas).astype(int)
    for step, sigma in zip(steps, flow_sigmas(steps, shift), strict=True):
        assert abs(sigmas[np.flatnonzero(times == times[step])[0]] - sigma) < 0.001
        assert 0 <= 1000 * sigma - times[step] <= 1


def test_windows():
    fast, second = LingBotConfig.fast().memory(), LingBotConfig.v2_14b().memory()
    assert (fast.sink_frames, fast.recent_frames) == (3, 6)
    assert second.sink_frames == 6
    for memory in (second, LingBotConfig.v2_14b(chunk_frames=4).memory()):  # some ports run chunks of 4
        assert (memory.sink_frames, memory.recent_frames + memory.chunk_frames) == (6, 12)
    memory = LingBotConfig.v2_1_3b(eps=1e-5).memory(mode="sliding", sink_frames=0)
    assert (memory.num_layers, memory.num_heads, memory.head_dim, memory.grid) == (30, 12, 128, (30, 52))
    assert (memory.mode, memory.sink_frames, memory.recent_frames, memory.eps) == ("sliding", 0, 9, 1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"ffn_dim": 0}, "LingBotConfig: ffn_dim must be at least 1, got 0"),
        ({"frequency_dim": 15}, "LingBotConfig: frequency_dim must be even, got 15"),
        ({"control": "keys"}, "LingBotConfig: control must be 'camera' or 'action', got 'keys'"),
        ({"intrinsics_size": (0, 3)}, r"LingBotConfig: intrinsics_size must be \(height, width\), got \(0, 3\)"),
        ({"head_dim": 96}, "head_dim must be 64 or 128, got 96"),
    ],
)
def test_a_config_out_of_range_is_told(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_published_configs():
    assert LingBotConfig.from_published(PUBLISHED, **NOT_PUBLISHED) == CONFIG
    diffusers = {
        "_class_name": "CausalLingBotWorldTransformer3DModel", "num_attention_heads": 40, "attention_head_dim": 128,
        "num_layers": 40, "ffn_dim": 13824, "in_channels": 36, "out_channels": 16, "text_dim": 4096, "freq_dim": 256,
        "patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads", "cross_attn_norm": True, "eps": 1e-6,
        "num_frames_per_block": 3, "sliding_window_num_frames": 18, "sink_size": 9, "local_attn_size": -1,
    }  # fmt: skip
    assert LingBotConfig.from_published(diffusers) == LingBotConfig.fast()
    other = LingBotConfig.from_published({**diffusers, "in_channels": 20, "attention_head_dim": 64})
    assert (other.condition_channels, other.head_dim) == (4, 64)
    with pytest.raises(ValueError, match=r"config.json must have num_heads, ffn_dim, got num_layers, eps"):
        LingBotConfig.from_published({"num_layers": 2, "eps": 1e-6})
    with pytest.raises(ValueError, match=r"config.json must have patch_size \[1, 2, 2\], got \[1, 1, 1\]"):
        LingBotConfig.from_published({**PUBLISHED, "patch_size": [1, 1, 1]})
    for value in (2**21, 0, 2.0, True, None, [2]):
        with pytest.raises(ValueError, match=r"config.json must have num_heads an integer from 1 to 1048576, got"):
            LingBotConfig.from_published({**PUBLISHED, "num_heads": value})
    with pytest.raises(ValueError, match=r"config.json must have eps a number from 0 to 1048576, got inf"):
        LingBotConfig.from_published({**PUBLISHED, "eps": math.inf})


# --- names, shapes, dtypes ---


def published_shapes(dim, ffn, layers, control_channels):
    """The state dict as FACTS lists it, for 36 input channels, text of 4096 and 256 frequencies."""
    shapes = {}

    def linear(name, wide, narrow):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (wide, narrow), (wide,)

    linear("patch_embedding_wancamctrl", dim, control_channels * 64 * 4)
    linear("c2ws_hidden_states_layer1", dim, dim)
    linear("c2ws_hidden_states_layer2", dim, dim)
    linear("text_embedding.0", dim, 4096)
    linear("text_embedding.2", dim, dim)
    linear("time_embedding.0", dim, 256)
    linear("time_embedding.2", dim, dim)
    linear("time_projection.1", 6 * dim, dim)
    linear("head.head", 64, dim)
    shapes["head.modulation"] = (1, 2, dim)
    shapes["patch_embedding.weight"], shapes["patch_embedding.bias"] = (dim, 36, 1, 2, 2), (dim,)
    for i in range(layers):
        for attention in ("self_attn", "cross_attn"):
            for layer in "qkvo":
                linear(f"blocks.{i}.{attention}.{layer}", dim, dim)
            for layer in ("norm_q", "norm_k"):
                shapes[f"blocks.{i}.{attention}.{layer}.weight"] = (dim,)
        shapes[f"blocks.{i}.norm3.weight"] = shapes[f"blocks.{i}.norm3.bias"] = (dim,)
        linear(f"blocks.{i}.ffn.0", ffn, dim)
        linear(f"blocks.{i}.ffn.2", dim, ffn)
        shapes[f"blocks.{i}.modulation"] = (1, 6, dim)
        for layer in ("cam_injector_layer1", "cam_injector_layer2", "cam_scale_layer", "cam_shift_layer"):
            linear(f"blocks.{i}.{layer}", dim, dim)
    return shapes


@pytest.mark.parametrize("control, channels", [("camera", 6), ("action", 7)])
@pytest.mark.parametrize(
    "preset, sizes, parameters",
    [
        (LingBotConfig.fast, (5120, 13824, 40), 18.54e9),
        (LingBotConfig.v2_14b, (5120, 13824, 40), 18.54e9),
        (LingBotConfig.v2_1_3b, (1536, 8960, 30), 1.71e9),
    ],
)
def test_published_state_dicts(preset, sizes, parameters, control, channels):
    model = LingBotWorldFast(preset(control=control), device="meta")
    state = model.state_dict()
    want = published_shapes(*sizes, channels)
    assert len(want) == 35 * sizes[2] + 21
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == want
    assert all(tensor.is_meta for tensor in state.values())  # and so takes no memory
    assert sum(tensor.numel() for tensor in state.values()) == pytest.approx(parameters, rel=0.01)


def test_dtypes():
    model = LingBotWorldFast(replace(CONFIG, num_layers=1), device="meta", dtype=torch.bfloat16)
    wide = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    layers = ("time_embedding.0", "time_embedding.2", "time_projection.1", "head.head", "blocks.0.norm3")
    want = {f"{layer}.{name}" for layer in layers for name in ("weight", "bias")}
    assert wide == want | {"head.modulation", "blocks.0.modulation"}
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32, torch.bfloat16}


# --- what the camera is told as ---


def some_poses(count, seed=0):
    rng = np.random.default_rng(seed)
    poses = np.tile(np.eye(4), (count, 1, 1))
    for pose in poses:
        rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        pose[:3, :3] = rotation * np.sign(np.linalg.det(rotation))
        pose[:3, 3] = rng.normal(size=3)
    return poses


def test_steps_lead_from_each_pose_to_the_next():
    poses = some_poses(5)
    steps = relative_steps(poses[:3], None)
    np.testing.assert_allclose(steps[0], np.eye(4), atol=1e-12)
    steps = np.concatenate([steps, relative_steps(poses[3:], poses[2])])
    walked = poses[0]
    for pose, step in zip(poses, steps, strict=True):
        walked = walked @ step
        np.testing.assert_allclose(walked, pose, atol=1e-12)
    longest = max(np.linalg.norm(poses[i + 1, :3, 3] - poses[i, :3, 3]) for i in range(4))
    assert longest_step(poses) == pytest.approx(longest)
    assert max(np.linalg.norm(steps[:, :3, 3], axis=1)) == pytest.approx(longest)
    assert longest_step(poses[:1]) == longest_step(np.repeat(poses[:1], 3, axis=0)) == 1


@pytest.mark.parametrize("control", ["camera", "action"])
def test_rays_pixel_by_pixel(control):
    steps, keys = some_poses(2), np.array([[1, 0, 0, 1], [0, 1, 0, 0]]) if control == "action" else None
    intrinsics = np.array([[500.0, 510.0, 400.0, 250.0], [600.0, 610.0, 410.0, 260.0]])
    got = ray_map(steps, intrinsics, (32, 48), intrinsics_size=(480, 832), keys=keys)
    assert got.shape == (2, 32, 48, 6 if keys is None else 7)
    for frame in range(2):
        fx, cx = intrinsics[frame, [0, 2]] * 48 / 832
        fy, cy = intrinsics[frame, [1, 3]] * 32 / 480
        for row in range(32):
            for column in range(48):
                ray = np.array([(column + 0.5 - cx) / fx, (row + 0.5 - cy) / fy, 1])
                ray = steps[frame, :3, :3] @ (ray / np.linalg.norm(ray))
                want = [*steps[frame, :3, 3], *ray] if keys is None else [*ray, *keys[frame]]
                np.testing.assert_allclose(got[frame, row, column].numpy(), want, atol=2e-6)


def test_folding_pixel_by_pixel():
    pixels = torch.randn(2, 32, 48, 3)
    tokens = fold_pixels(pixels)
    assert tokens.shape == (2 * 2 * 3, 3 * 256)
    for token in range(12):
        frame, row, column = token // 6, token % 6 // 3, token % 3
        want = [
            pixels[frame, 16 * row + 8 * latent_row + y, 16 * column + 8 * latent_column + x, channel]
            for channel in range(3)
            for y in range(8)
            for x in range(8)
            for latent_row in range(2)
            for latent_column in range(2)
        ]
        assert torch.equal(tokens[token], torch.stack(want))


def test_only_the_cameras_steps_matter():
    model = make_model()
    latents = latents_of(model)
    moved = some_poses(1)[0] @ POSES
    assert all_near(latents_of(model, poses=moved), latents)
    longer = POSES.copy()
    longer[:, :3, 3] *= 4
    scaled = latents_of(model, poses=longer, conditions=LingBotConditions(translation_scale=4.0))
    assert all_near(scaled, latents)
    forward, faster = latent_poses(load("forward*36"))[0], latent_poses(load("forward*36", move=0.2))[0]
    assert not all_near(latents_of(model, poses=faster), latents_of(model, poses=forward), 1e-3)
    standing = latents_of(model, poses=np.repeat(POSES[:1], 9, axis=0))
    assert not any(all_near([a], [b], 1e-3) for a, b in zip(standing, latents, strict=True))


def test_a_chunk_that_is_prepared_again_starts_from_the_chunk_before():
    model = make_model()
    of_rollout = model.prepare_rollout(None, POSES[0], (1.0, 0.0))

    def rays(start, poses):
        return model.prepare_chunk(of_rollout, start, Controls(poses, INTRINSICS[:3])).rays

    rays(0, POSES[:3])
    second = rays(3, POSES[3:6])
    assert not torch.equal(rays(3, POSES[6:9]), second)
    assert torch.equal(rays(3, POSES[3:6]), second)
    fresh = make_model()
    whole = relative_steps(POSES[:6], None)[3:]
    want = ray_map(whole, INTRINSICS[:3], (32, 48), intrinsics_size=(480, 832))
    torch.testing.assert_close(second, fold_pixels(want))
    with pytest.raises(ValueError, match="LingBotWorldFast: start_frame must follow a prepared chunk, got 9"):
        rays(9, POSES[9:12])
    with pytest.raises(ValueError, match="LingBotWorldFast: start_frame must follow a prepared chunk, got 3"):
        fresh.prepare_chunk(fresh.prepare_rollout(None, POSES[0], (1.0, 0.0)), 3, Controls(POSES[3:6], INTRINSICS[:3]))


def test_control_by_keys():
    model = make_model(replace(CONFIG, control="action"))
    latents = latents_of(model, actions=KEYS)
    # Latent frame 4 takes row 16 and no row before or after it.
    keyboard = KEYS.keyboard.copy()
    keyboard[np.arange(57) % 4 != 0] ^= 1
    assert same(latents_of(model, actions=Actions(None, keyboard)), latents)
    keyboard[16] ^= 1
    changed = latents_of(model, actions=Actions(None, keyboard))
    assert torch.equal(changed[0], latents[0])
    assert not all_near([changed[1]], [latents[1]], 1e-3)
    # Of the camera only its turning matters.
    moved = POSES.copy()
    moved[:, :3, 3] = np.random.default_rng(1).normal(size=(len(moved), 3))
    assert same(latents_of(model, poses=moved, actions=KEYS), latents)


@pytest.mark.parametrize(
    "keyboard, got",
    [(None, "None"), (np.zeros((8, 4)), r"\[8, 4\]"), (np.zeros((9, 3)), r"\[9, 3\]"), (np.zeros(9), r"\[9\]")],
)
def test_control_by_keys_without_them(keyboard, got):
    model = make_model(replace(CONFIG, control="action"))
    of_rollout = model.prepare_rollout(None, POSES[0], (1.0, 0.0))
    controls = Controls(POSES[:3], INTRINSICS[:3], Actions(None, keyboard))
    with pytest.raises(ValueError, match=rf"actions must have keyboard \[at least 9, 4\], got {got}"):
        model.prepare_chunk(of_rollout, 0, controls)


def test_control_without_intrinsics():
    model = make_model()
    with pytest.raises(ValueError, match=r"LingBotWorldFast: intrinsics must be \[n, 4\] or \[4\], got None"):
        model.prepare_chunk(model.prepare_rollout(None, POSES[0], (1.0, 0.0)), 0, Controls(POSES[:3]))


# --- conditions ---


def test_text_is_filled_up_with_rows_that_are_attended_to():
    model = make_model()
    text = torch.randn(4, 24)
    short = latents_of(model, chunks=1, conditions=LingBotConditions(text=text))
    filled = torch.cat([text, torch.zeros(2, 24)])
    assert same(latents_of(model, chunks=1, conditions=LingBotConditions(text=filled)), short)
    other = make_model(replace(CONFIG, text_tokens=4))
    other.load_state_dict(model.state_dict())
    assert not all_near(latents_of(other, chunks=1, conditions=LingBotConditions(text=text)), short, 1e-3)


def test_image_conditions_go_frame_by_frame_and_the_last_one_stays():
    model = make_model()
    image = torch.randn(20, 5, 4, 6)
    latents = latents_of(model, conditions=LingBotConditions(image=image))
    repeated = torch.cat([image, image[:, -1:].expand(-1, 4, -1, -1)], dim=1)
    assert same(latents_of(model, conditions=LingBotConditions(image=repeated)), latents)
    changed = repeated.clone()
    changed[:, 4] += 1
    changed = latents_of(model, conditions=LingBotConditions(image=changed))
    assert torch.equal(changed[0], latents[0])
    assert not all_near([changed[1]], [latents[1]], 1e-3)


def test_image_conditions_are_channels_after_the_noise():
    model = make_model()
    image, latents = torch.randn(20, 3, 4, 6), torch.randn(3, 16, 4, 6)
    seen = []
    model.blocks[0].attend_and_move = lambda x, *rest: seen.append(x) or torch.zeros_like(x)
    of_rollout = model.prepare_rollout(LingBotConditions(image=image), POSES[0], (1.0, 0.0))
    of_chunk = model.prepare_chunk(of_rollout, 0, Controls(POSES[:3], INTRINSICS[:3]))
    memory = WorldMemory(model.config.memory(mode="sliding"), dtype=torch.float32)
    memory.begin_chunk()
    model.denoise(latents, 0, of_chunk, memory)
    want = model.patch_embedding(torch.cat([latents.transpose(0, 1), image])).flatten(1).T
    assert relative_error(seen[0], want) < 1e-6


def test_stand_ins_depend_on_the_seed_alone():
    first, second = make_model(seed=3), make_model(seed=4)
    second.load_state_dict(first.state_dict())
    assert not all_near(latents_of(second, chunks=1), latents_of(first, chunks=1), 1e-3)
    second.seed = 3
    assert same(latents_of(second, chunks=1), latents_of(first, chunks=1))
    of_rollout = first.prepare_rollout(None, POSES[0], (1.0, 0.0))
    second.seed = 4
    other = second.prepare_rollout(None, POSES[0], (1.0, 0.0))
    assert relative_error(other.text, of_rollout.text) > 1
    assert relative_error(other.image[:, 4:], of_rollout.image[:, 4:]) > 1
    assert of_rollout.text.std() > 0.5
    assert (of_rollout.image[0, :4] == 1).all() and (of_rollout.image[1, :4] == 0).all()
    assert (of_rollout.image[:, 4:].std(dim=(1, 2, 3)) > 0.5).all()


@pytest.mark.parametrize(
    "conditions, error, message",
    [
        ("a prompt", TypeError, "conditions must be LingBotConditions or None, got 'a prompt'"),
        (LingBotConditions(text=torch.zeros(7, 24)), ValueError, r"text must be \[1 to 6, 24\], got \[7, 24\]"),
        (LingBotConditions(text=torch.zeros(6, 25)), ValueError, r"text must be \[1 to 6, 24\], got \[6, 25\]"),
        (
            LingBotConditions(image=torch.zeros(20, 2, 4, 6)),
            ValueError,
            r"image must be \[20, at least 3, 4, 6\], got \[20, 2, 4, 6\]",
        ),
        (LingBotConditions(image=torch.zeros(16, 3, 4, 6)), ValueError, r"image must be .* got \[16, 3, 4, 6\]"),
        (LingBotConditions(image=torch.zeros(20, 3, 6, 4)), ValueError, r"image must be .* got \[20, 3, 6, 4\]"),
        (
            LingBotConditions(translation_scale=0.0),
            ValueError,
            "translation_scale must be positive and finite, got 0.0",
        ),
    ],
)
def test_conditions_that_do_not_fit_are_told(conditions, error, message):
    with pytest.raises(error, match=f"LingBotWorldFast: {message}"):
        make_model().prepare_rollout(conditions, POSES[0], (1.0, 0.0))


# --- hoisting, precision, modes ---


@pytest.mark.parametrize("control", ["camera", "action"])
@pytest.mark.parametrize("mode", ["full", "worldkv"])
def test_hoisting_changes_no_bit(mode, control):
    config = replace(CONFIG, control=control)
    conditions = LingBotConditions(text=torch.randn(5, 24), image=torch.randn(20, 15, 4, 6))
    options = dict(mode=mode, chunks=5, conditions=conditions, actions=KEYS)
    hoisted = latents_of(make_model(config), **options)
    assert same(latents_of(make_model(config, hoist=False), **options), hoisted)
    assert not all_near(hoisted[1:], hoisted[:-1], 1e-3)


class Counted(TorchDispatchMode):
    """Counts the operations by name."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.counts[op._schema.name] = self.counts.get(op._schema.name, 0) + 1
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("hoist", [True, False])
def test_a_pass_computes_what_changes_in_it_and_asks_nothing_of_the_host(hoist):
    model = make_model(hoist=hoist)
    of_rollout = model.prepare_rollout(None, POSES[0], (1.0, 0.0))
    of_chunk = model.prepare_chunk(of_rollout, 0, Controls(POSES[:3], INTRINSICS[:3]))
    latents, attended = torch.randn(3, 16, 4, 6), []

    class Echo:
        def attend(self, layer, q, k, v, q_weight, k_weight):
            attended.append(layer)
            return v.view(18, 2, 64)

    with torch.no_grad(), Counted() as counted:
        model.denoise(latents, 0, of_chunk, Echo())
    assert attended == [0, 1]
    products = sum(counted.counts.get(f"aten::{op}", 0) for op in ("addmm", "mm", "bmm", "linear"))
    of_layers, once = 8 * model.config.num_layers, 2  # q, k, v, o, q, o and the feed-forward's two; patches and head
    if not hoist:  # k and v of the text, four of the camera; two of the text, three each of camera and time
        of_layers, once = of_layers + 6 * model.config.num_layers, once + 2 + 3 + 3
    assert products == of_layers + once
    asked = {"aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh", "aten::arange", "aten::scalar_tensor"}
    assert not asked & counted.counts.keys()


def test_what_a_pass_reads_stays_at_its_address():
    model = make_model()
    of_rollout = model.prepare_rollout(None, POSES[0], model.sigmas)
    addresses = []
    for start in (0, 3):
        poses = POSES[start : start + 3]
        of_rollout = model.prepare_chunk(of_rollout, start, Controls(poses, INTRINSICS[:3])).rollout
        addresses.append([of_rollout.camera.data_ptr(), of_rollout.patches.data_ptr()])
    assert addresses[0] == addresses[1]


def test_bfloat16_is_near_float32():
    model = make_model()
    half = LingBotWorldFast(CONFIG, device="cpu", dtype=torch.bfloat16)
    half.load_state_dict(model.state_dict())
    for got, want in zip(latents_of(half), latents_of(model), strict=True):
        assert got.dtype == torch.float32
        assert 1e-4 < relative_error(got, want) < 0.006  # measured: 0.0031 to 0.0035


@pytest.mark.parametrize("mode", ["full", "sliding", "sink_recent", "worldkv"])
def test_forty_layers_stay_bounded(mode):
    config = replace(CONFIG, num_layers=40, grid=(1, 2))
    model = make_model(config)
    streams = []
    model.head.register_forward_pre_hook(lambda _, arguments: streams.append(arguments[0]))
    latents = latents_of(model, mode, chunks=5, sigmas=(1.0,))
    assert len(streams) == 10
    assert all(0.3 < latent.std() < 3 for latent in latents)
    assert all(stream.isfinite().all() and 0.3 < stream.std() < 5 for stream in streams)


def test_modes_see_different_windows():
    model = make_model()
    full = latents_of(model, chunks=5)
    for mode in ("sliding", "sink_recent", "worldkv"):
        latents = latents_of(model, mode, chunks=5)
        assert same(latents[:3], full[:3])
        assert not all_near(latents[4:], full[4:], 1e-4)


# --- checkpoints ---


@pytest.mark.parametrize("layout", ["file", "folder", "sharded", "sharded, no config"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_published_checkpoint_rolls_out_to_the_same_bits(tmp_path, layout, prefix):
    model = make_model()
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    if layout.startswith("sharded"):
        write_sharded(tmp_path, state, 3)
    else:
        write(tmp_path / "diffusion_pytorch_model.safetensors", state)
    options = dict(device="cpu", dtype=torch.float32)
    if layout == "sharded, no config":
        options["config"] = CONFIG
    else:
        (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
        options.update(NOT_PUBLISHED)
    path = tmp_path / "diffusion_pytorch_model.safetensors" if layout == "file" else tmp_path
    loaded = LingBotWorldFast.from_pretrained(path, **options)
    assert loaded.config == CONFIG
    assert same(latents_of(loaded), latents_of(model))


def test_a_checkpoint_is_loaded_into_the_models_dtypes(tmp_path):
    state = make_model().state_dict()
    write(tmp_path / "x.safetensors", state)
    loaded = LingBotWorldFast.from_pretrained(tmp_path, config=CONFIG, device="cpu", dtype=torch.bfloat16, hoist=False)
    empty = LingBotWorldFast(CONFIG, device="meta", dtype=torch.bfloat16).state_dict()
    assert not loaded.hoist
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == empty[name].dtype
        assert torch.equal(tensor, state[name].to(tensor.dtype))


def test_the_control_is_told_by_the_checkpoint(tmp_path):
    model = make_model(replace(CONFIG, control="action"))
    write(tmp_path / "x.safetensors", model.state_dict())
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    loaded = LingBotWorldFast.from_pretrained(tmp_path, device="cpu", dtype=torch.float32, **NOT_PUBLISHED)
    assert loaded.config.control == "action"
    assert same(latents_of(loaded, actions=KEYS), latents_of(model, actions=KEYS))


def test_checkpoints_of_another_model_are_told(tmp_path):
    state = make_model().state_dict()
    write(tmp_path / "x.safetensors", state)
    options = dict(device="cpu", dtype=torch.float32)
    with pytest.raises(
        ValueError, match=r"LingBotWorldFast: .* must hold config.json where no config is given, got none"
    ):
        LingBotWorldFast.from_pretrained(tmp_path, **options)
    with pytest.raises(
        ValueError, match=r"LingBotWorldFast: .* the 126 tensors .* 35 missing: blocks.2.modulation, .* 30 m"
    ):
        LingBotWorldFast.from_pretrained(tmp_path, config=CONFIG, num_layers=3, **options)
    with pytest.raises(
        ValueError, match=r"35 unexpected: blocks.1.modulation, blocks.1.self_attn.q.weight, .* and 30 more"
    ):
        LingBotWorldFast.from_pretrained(tmp_path, config=CONFIG, num_layers=1, **options)
    with pytest.raises(
        ValueError, match=r"got 6 misshapen: blocks.0.ffn.0.weight \[192, 128\] for \[96, 128\], .* 1 more"
    ):
        LingBotWorldFast.from_pretrained(tmp_path, config=CONFIG, ffn_dim=96, **options)
    with pytest.raises(ValueError, match=r"checkpoint must hold the tensors of 1000000 layers, got \d+"):
        LingBotWorldFast.from_pretrained(tmp_path, config=CONFIG, num_layers=1_000_000, **options)
    with pytest.raises(ValueError, match=r"got 6 misshapen"):  # told before so much memory is asked for
        LingBotWorldFast.from_pretrained(tmp_path, config=CONFIG, ffn_dim=2**40, **options)
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"x.safetensors must have the \d+ bytes that its header says, got \d+"):
        LingBotWorldFast.from_pretrained(tmp_path, config=CONFIG, **options)


def test_time_and_levels():
    """The time embedding sees 1000 sigma, and each level its own modulation."""
    model = make_model()
    of_rollout = model.prepare_rollout(None, POSES[0], (1.0, 0.5, 0.0))
    for sigma, level in zip((1.0, 0.5, 0.0), of_rollout.levels, strict=True):
        angles = [1000 * sigma * 10000 ** (-i / 8) for i in range(8)]
        time = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)])
        embedded = model.time_embedding(time)
        projected = model.time_projection(embedded).view(6, -1)
        for layer, block in enumerate(model.blocks):
            torch.testing.assert_close(level.modulation[layer], block.modulated_by(projected), atol=1e-5, rtol=0)
        torch.testing.assert_close(level.head, model.head.modulated_by(embedded), atol=1e-5, rtol=0)
