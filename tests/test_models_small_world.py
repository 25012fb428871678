"""SmallWorld rolled out, against a plain restatement that knows neither pool nor hoisting; its config and weights."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from safetensors_files import write

from worldkv_kernels import WorldMemory, worlds
from worldkv_kernels.models.rollout import Controls, noise, rollout
from worldkv_kernels.models.small_world import WEIGHTS, SmallWorld, SmallWorldConfig, pluecker_map, ray_features
from worldkv_kernels.trajectory import latent_poses, load

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = SmallWorldConfig(
    sigmas=(1.0, 0.9, 0.75, 0.5), num_layers=2, grid=(2, 3), ffn_dim=96, frequency_dim=16, ray_octaves=3
)
POSES, INTRINSICS = latent_poses(load("right*40,forward*32,left*40"))  # 29 latent frames, 9 chunks


def make_model(config=CONFIG, seed=0, **options):
    return SmallWorld.random(config, seed, **{"device": "cpu", "dtype": torch.float32, **options})


def make_memory(model, mode="full", **options):
    options = {"bank_chunks": 20, **options}
    return WorldMemory(model.config.memory(mode=mode, **options), device=model.device, dtype=model.dtype)


def latents_of(mode="full", *, model=None, poses=POSES, seed=0, **options):
    model = model or make_model()
    memory, intrinsics = make_memory(model, mode, **options), INTRINSICS[: len(poses)]
    return [chunk.latents for chunk in rollout(model, memory, poses, intrinsics, seed=seed)]


# --- the restatement: one token list, concatenated keys, everything computed anew in every pass ---


def turned(x, first_frame, grid):
    """3D RoPE of x [tokens, heads, 64] by complex numbers: 12, 10 and 10 pairs for frame, row and column."""
    height, width = grid
    positions = [(first_frame + i // (height * width), i // width % height, i % width) for i in range(len(x))]
    angles = [
        [p * 10000.0 ** (-i / pairs) for p, pairs in zip(position, (12, 10, 10), strict=True) for i in range(pairs)]
        for position in positions
    ]
    angles = torch.tensor(angles, dtype=torch.float64)[:, None]
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2).float()


def linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"].flatten(1), w[f"{name}.bias"])


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def attention(q, k, v):
    """[tokens, heads, head_dim] each -> [tokens, heads * head_dim]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1)


def plain_rays(poses, intrinsics, grid):
    """Moment and direction of the ray through each token's centre, one token at a time."""
    height, width = grid
    rays = []
    for pose, (fx, fy, cx, cy) in zip(poses, intrinsics, strict=True):
        for row in range(height):
            for column in range(width):
                u, v = 2 * cx * (column + 0.5) / width, 2 * cy * (row + 0.5) / height
                ray = pose[:3, :3] @ np.array([(u - cx) / fx, (v - cy) / fy, 1.0])
                ray /= math.sqrt(ray @ ray)
                far = math.sqrt(pose[:3, 3] @ pose[:3, 3])
                eye = pose[:3, 3] * (math.log(1 + far) / far if far else 1.0)
                rays.append([*np.cross(eye, ray), *ray])
    return torch.tensor(np.array(rays), dtype=torch.float32)


def plain_features(rays, octaves):
    """Each ray's six numbers, then for each octave the sines of all six and the cosines of all six."""
    features = []
    for ray in rays.double().tolist():
        features.append(list(ray))
        for octave in range(octaves):
            for wave in (math.sin, math.cos):
                features[-1] += [wave(math.pi * 2 ** (octave - 1) * number) for number in ray]
    return torch.tensor(features, dtype=torch.float32)


def plain_rollout(model, window, poses=POSES, intrinsics=INTRINSICS, seed=0):
    """Latents of each chunk; `window(chunk)` names the past chunks it attends to, whole."""
    w, config = model.state_dict(), model.config
    (height, width), heads, layers = config.grid, config.num_heads, config.num_layers
    cache = [{} for _ in range(layers)]  # layer -> chunk -> k, v

    def split(x):
        return x.unflatten(1, (heads, -1))

    def clean_of(x, sigma, chunk):
        rows = slice(3 * chunk, 3 * chunk + 3)
        half = config.frequency_dim // 2
        angles = [1000 * sigma * 10000.0 ** (-i / half) for i in range(half)]
        time = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)], dtype=torch.float32)
        time = linear(w, "time_embedding.2", F.silu(linear(w, "time_embedding.0", time)))
        of_time = linear(w, "time_projection.1", F.silu(time)).view(6, -1)
        camera = plain_rays(np.linalg.inv(poses[0]) @ poses[rows], intrinsics[rows], config.grid)
        camera = linear(w, "patch_embedding_wancamctrl", plain_features(camera, config.ray_octaves))
        hidden = F.silu(linear(w, "c2ws_hidden_states_layer1", camera))
        camera = camera + linear(w, "c2ws_hidden_states_layer2", hidden)

        # A token's numbers: channels, then the rows and columns of its 2 x 2 patch, as Conv3d's weight has them.
        x = x.view(3, 16, height, 2, width, 2).permute(0, 2, 4, 1, 3, 5).reshape(3 * height * width, 64)
        x = linear(w, "patch_embedding", x)
        for i in range(layers):
            b = f"blocks.{i}"
            e = w[f"{b}.modulation"][0] + of_time
            y = norm(x) * (1 + e[1]) + e[0]
            q = split(rms(linear(w, f"{b}.self_attn.q", y), w[f"{b}.self_attn.norm_q.weight"]))
            k = split(rms(linear(w, f"{b}.self_attn.k", y), w[f"{b}.self_attn.norm_k.weight"]))
            v = split(linear(w, f"{b}.self_attn.v", y))
            cache[i][chunk] = (turned(k, 3 * chunk, config.grid), v)
            seen = [cache[i][past] for past in [*window(chunk), chunk]]
            keys, values = (torch.cat(parts) for parts in zip(*seen, strict=True))
            y = attention(turned(q, 3 * chunk, config.grid), keys, values)
            x = x + linear(w, f"{b}.self_attn.o", y) * e[2]
            h = camera + linear(w, f"{b}.cam_injector_layer2", F.silu(linear(w, f"{b}.cam_injector_layer1", camera)))
            x = (1 + linear(w, f"{b}.cam_scale_layer", h)) * x + linear(w, f"{b}.cam_shift_layer", h)
            y = norm(x) * (1 + e[4]) + e[3]
            y = linear(w, f"{b}.ffn.2", F.gelu(linear(w, f"{b}.ffn.0", y), approximate="tanh"))
            x = x + y * e[5]
        shift, scale = w["head.modulation"][0] + time
        x = linear(w, "head.head", norm(x) * (1 + scale) + shift)
        x = x.view(3, height, width, 2, 2, 16).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(3, 16, 2 * height, 2 * width)

    made = []
    for chunk in range(len(poses) // 3):
        draws = [noise(seed, chunk, step, (3, 16, 2 * height, 2 * width)) for step in range(4)]
        x = draws[0]
        for step, sigma in enumerate((1.0, 0.9, 0.75, 0.5)):
            clean = clean_of(x, sigma, chunk)
            if step < 3:
                following = (0.9, 0.75, 0.5)[step]
                x = (1 - following) * clean + following * draws[step + 1]
        clean_of(clean, 0.0, chunk)
        made.append(clean)
    return made


@pytest.mark.parametrize(
    "mode, window",
    [
        ("full", lambda chunk: range(chunk)),
        ("sliding", lambda chunk: range(max(0, chunk - 2), chunk)),
        ("sink_recent", lambda chunk: sorted({0, *range(max(0, chunk - 2), chunk)} - {chunk})),
    ],
)
def test_rollout_agrees_with_the_restatement(mode, window):
    model = make_model()
    got = latents_of(mode, model=model, poses=POSES[:18])
    want = plain_rollout(model, window, poses=POSES[:18])
    assert len(got) == len(want) == 6
    for chunk in range(6):
        assert relative_error(got[chunk], want[chunk]) < 1e-5, chunk


def test_each_mode_sees_something_else_and_starts_from_the_same_noise():
    of_modes = {mode: latents_of(mode, keep_ratio=0.25) for mode in ("full", "sliding", "sink_recent", "worldkv")}
    full = of_modes.pop("full")
    for latents in of_modes.values():
        assert all(torch.equal(a, b) for a, b in zip(latents[:3], full[:3], strict=True))  # all fits in any window
        assert relative_error(latents[-1], full[-1]) > 1e-4  # and so the tests above can tell windows apart


def test_worldkv_that_prunes_nothing_and_retrieves_all_is_full():
    full = latents_of("full")
    unpruned = latents_of("worldkv", keep_ratio=1.0, retrieved_chunks=9)
    for a, b in zip(unpruned, full, strict=True):
        assert relative_error(a, b) < 1e-5


def test_a_bank_on_the_host_changes_no_bit():
    options = dict(keep_ratio=0.25, retrieved_chunks=2)
    device, host = (latents_of("worldkv", bank=bank, **options) for bank in ("device", "host"))
    assert all(torch.equal(a, b) for a, b in zip(device, host, strict=True))


def test_same_seed_same_bits():
    first = latents_of("worldkv", seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first, latents_of("worldkv", seed=3), strict=True))
    assert relative_error(latents_of("worldkv", seed=4)[0], first[0]) > 0.1


def test_origin_and_axes_of_the_world_do_not_matter():
    world = load("left*50,up*20,forward*30").poses[-1]
    for a, b in zip(latents_of(poses=POSES[:9]), latents_of(poses=world @ POSES[:9]), strict=True):
        assert relative_error(a, b) < 1e-5


def test_what_holds_for_a_chunk_is_computed_once():
    model, calls = make_model(), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls.get(name, 0) + 1))
    list(rollout(model, make_memory(model), POSES[:12], INTRINSICS[:12]))
    for name, count in calls.items():
        if "time_" in name:
            assert count == 5, name  # one for each noise level
        elif "cam" in name or "c2ws" in name:
            assert count == 4, name  # one for each chunk
        else:
            assert count == 4 * 5, name
    assert len(calls) == 1 + 2 + 2 + 1 + 1 + 2 * (4 + 2 + 2)  # a scale and a shift are added where they are stored


def test_pluecker_map():
    poses = load("right*90,forward*10").poses[[0, 90, 100]]
    rays = pluecker_map(poses, np.tile((500.0, 400.0, 416.0, 240.0), (3, 1)), (3, 5))
    assert rays.shape == (3, 3, 5, 6) and rays.dtype == np.float32
    moments, directions = rays[..., :3], rays[..., 3:]
    np.testing.assert_allclose(np.linalg.norm(directions, axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose((moments * directions).sum(axis=-1), 0, atol=1e-6)
    np.testing.assert_allclose(directions[:, 1, 2], [(0, 0, 1), (1, 0, 0), (1, 0, 0)], atol=1e-6)  # straight ahead
    np.testing.assert_allclose(directions[0, 0, 4] / directions[0, 0, 4, 2], (332.8 / 500, -160 / 400, 1), atol=1e-6)
    assert not moments[:2].any()  # no way from the origin
    np.testing.assert_allclose(moments[2, 0, 2], np.log(2) * np.cross((1, 0, 0), directions[2, 0, 2]), atol=1e-6)


@pytest.mark.parametrize("octaves", [0, 1, 4])
def test_ray_features(octaves):
    rays = plain_rays(POSES[:3], INTRINSICS[:3], (2, 3))
    got = ray_features(rays, octaves)
    assert got.shape == (18, 6 * (1 + 2 * octaves)) and torch.equal(got[:, :6], rays)
    torch.testing.assert_close(got, plain_features(rays, octaves), atol=1e-5, rtol=0)


# --- the model ---


def test_parameter_names():
    names = set(make_model().state_dict())
    of_block = ["modulation", *(f"self_attn.norm_{p}.weight" for p in "qk")]
    of_block += [f"self_attn.{p}.{kind}" for p in "qkvo" for kind in ("weight", "bias")]
    linears = ["ffn.0", "ffn.2", "cam_injector_layer1", "cam_injector_layer2", "cam_scale_layer", "cam_shift_layer"]
    of_block += [f"{layer}.{kind}" for layer in linears for kind in ("weight", "bias")]
    top = ["patch_embedding", "patch_embedding_wancamctrl", "c2ws_hidden_states_layer1", "c2ws_hidden_states_layer2"]
    top += ["time_embedding.0", "time_embedding.2", "time_projection.1"]
    want = {f"{layer}.{kind}" for layer in [*top, "head.head"] for kind in ("weight", "bias")} | {"head.modulation"}
    want |= {f"blocks.{i}.{name}" for i in range(CONFIG.num_layers) for name in of_block}
    assert names == want


def test_weights_depend_on_the_seed_alone():
    first = make_model(seed=1).state_dict()
    torch.manual_seed(5)
    same, other = (make_model(seed=seed).state_dict() for seed in (1, 2))
    for name, weight in first.items():
        assert torch.equal(weight, same[name]) and not torch.equal(weight, other[name]), name


@torch.no_grad()
def test_what_stays_fp32():
    model = make_model(dtype=torch.bfloat16)
    kept = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert {name for name in kept if not name.startswith(("time_", "head."))} == {
        "blocks.0.modulation", "blocks.1.modulation"
    }  # fmt: skip
    of_rollout = model.prepare_rollout(None, POSES[0], (1.0, 0.0))
    of_chunk = model.prepare_chunk(of_rollout, 0, Controls(POSES[:3], INTRINSICS[:3]))
    memory = make_memory(model)
    memory.begin_chunk()
    level = of_rollout.levels[0]
    assert level.modulation.dtype == level.head.dtype == torch.float32 and of_rollout.camera.dtype == torch.bfloat16
    assert model.denoise(torch.zeros(3, *model.latent_shape), 0, of_chunk, memory).dtype == torch.float32


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_half_precision_is_near(device, dtype, limit):
    wide, near = make_model(), make_model(device=device, dtype=dtype)
    near.load_state_dict(wide.state_dict())
    for a, b in zip(latents_of("worldkv", model=near), latents_of("worldkv", model=wide), strict=True):
        assert relative_error(a, b) < limit


@pytest.mark.parametrize("mode", ["full", "worldkv"])
def test_hoisting_changes_no_bit(mode):
    hoisted = latents_of(mode, model=make_model())
    every_pass = latents_of(mode, model=make_model(hoist=False))
    assert all(torch.equal(a, b) for a, b in zip(every_pass, hoisted, strict=True))


def test_the_flow_leads_from_the_clean_latents():
    """At every noise level it is (x - x0) / sigma, of an x0 that the head gives; at sigma 0 it is x - x0."""
    model, levels = make_model(), (1.0, 0.5, 0.125, 0.0)
    with torch.no_grad():
        of_chunk = model.prepare_chunk(
            model.prepare_rollout(None, POSES[0], levels), 0, Controls(POSES[:3], INTRINSICS[:3])
        )
        x, given = torch.randn(3, *model.latent_shape), []
        model.head.register_forward_hook(lambda module, args, out: given.append(out))
        memory = make_memory(model)
        memory.begin_chunk()
        for step, sigma in enumerate(levels):
            flow = model.denoise(x, step, of_chunk, memory)
            patches = given[step].view(3, 2, 3, 2, 2, 16).permute(0, 5, 1, 3, 2, 4).reshape(3, 16, 4, 6)
            assert relative_error(x - (sigma or 1) * flow, patches) < 1e-6


def test_what_it_is_not_given_is_told():
    model = make_model()
    with pytest.raises(ValueError, match="SmallWorld: conditions must be None, got 'a prompt'"):
        model.prepare_rollout("a prompt", POSES[0], (1.0, 0.0))
    of_rollout = model.prepare_rollout(None, POSES[0], (1.0, 0.0))
    with pytest.raises(ValueError, match=r"SmallWorld: intrinsics must be \[n, 4\] or \[4\], got None"):
        model.prepare_chunk(of_rollout, 0, Controls(POSES[:3]))


def test_default_sizes():
    config = SmallWorldConfig()
    assert (config.dim, config.num_heads, config.head_dim, config.num_layers, config.chunk_frames) == (128, 2, 64, 4, 3)
    assert make_model(config).latent_shape == (16, 2 * config.grid[0], 2 * config.grid[1])
    memory = config.memory(mode="sliding")
    assert (memory.num_layers, memory.grid, memory.mode) == (4, config.grid, "sliding")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ffn_dim": 0}, "SmallWorldConfig: ffn_dim must be at least 1, got 0"),
        ({"ray_octaves": -1}, "SmallWorldConfig: ray_octaves must be at least 0, got -1"),
        ({"frequency_dim": 15}, "SmallWorldConfig: frequency_dim must be even, got 15"),
        ({"sigmas": ()}, r"SmallWorldConfig: sigmas must start at 1, fall, and stay above 0, got \[\]"),
        ({"sigmas": (0.9, 0.5)}, r"sigmas must start at 1, .* got \[0.9, 0.5\]"),
        ({"sigmas": (1, 0.5, 0.7)}, r"sigmas must start at 1, .* got \[1, 0.5, 0.7\]"),
        ({"sigmas": (1, math.nan, 0.5)}, r"sigmas must start at 1, .* got \[1, nan, 0.5\]"),
        ({"sigmas": (1, 0.0)}, r"sigmas must start at 1, .* got \[1, 0.0\]"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"head_dim": 32}, "head_dim must be 64 or 128, got 32"),
    ],
)
def test_bad_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        SmallWorldConfig(**options)


# --- checkpoints ---


def write_checkpoint(folder, model, **fields):
    write(folder / "model.safetensors", model.state_dict())
    (folder / "config.json").write_text(json.dumps({**asdict(model.config), **fields}))


def load_from(*folder, **options):
    return SmallWorld.from_pretrained(*folder, **{"device": "cpu", "dtype": torch.float32, **options})


def from_noise(model, shown, yaw):
    """The x0 that the model makes of noise alone, after the chunks `shown` went by; yaw [frames] in radians."""
    poses, intrinsics = worlds.looking(yaw, 0 * yaw).double().numpy(), np.tile(worlds.INTRINSICS, (3, 1))
    memory, chunks = make_memory(model), [*shown, noise(0, 0, 0, (3, *model.latent_shape))]
    with torch.no_grad():
        of_rollout = model.prepare_rollout(None, poses[0], (1.0, 0.0))
        for chunk, latents in enumerate(chunks):
            rows = slice(3 * chunk, 3 * chunk + 3)
            memory.begin_chunk(poses[rows])
            of_chunk = model.prepare_chunk(of_rollout, 3 * chunk, Controls(poses[rows], intrinsics))
            flow = model.denoise(latents, 0 if chunk == len(shown) else 1, of_chunk, memory)
            memory.end_chunk()
    return latents - flow


def test_the_packages_own_weights():
    """Trained: where the camera looks again, they make what was seen there, of either world."""
    model = load_from()
    assert model.config == SmallWorldConfig() == load_from(WEIGHTS).config
    assert load_from(dtype=torch.bfloat16).blocks[0].ffn[0].weight.dtype == torch.bfloat16
    yaw = torch.deg2rad(torch.tensor([*range(0, 96, 8), 60, 52, 44.0]))  # to the right, then back a way
    drawn = worlds.draw_worlds(2, torch.Generator().manual_seed(0))
    poses = worlds.looking(yaw, 0 * yaw).expand(2, -1, -1, -1)
    one, other = worlds.encode(worlds.pictures(drawn, poses)).unflatten(1, (5, 3))
    for seen, unseen in ((one, other), (other, one)):
        made = from_noise(model, seen[:4], yaw)
        assert relative_error(made, seen[4]) < 0.5
        assert relative_error(made, unseen[4]) > 0.9


@pytest.mark.parametrize("named", ["folder", "file"])
def test_weights_of_a_folder_roll_out_to_the_same_bits(tmp_path, named):
    model = make_model(replace(CONFIG, sigmas=(1.0, 0.6)), seed=3)
    write_checkpoint(tmp_path, model, of_another_version=True)
    loaded = load_from(tmp_path if named == "folder" else tmp_path / "model.safetensors")
    assert loaded.config == model.config and loaded.sigmas == (1.0, 0.6)
    for a, b in zip(latents_of(model=loaded), latents_of(model=model), strict=True):
        assert torch.equal(a, b)
    wider = load_from(tmp_path, grid=(3, 5))
    assert wider.config == replace(model.config, grid=(3, 5)) and wider.latent_shape == (16, 6, 10)
    assert load_from(tmp_path, config=CONFIG, hoist=False).sigmas == CONFIG.sigmas


def test_checkpoints_that_do_not_fit_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint: .* must hold .safetensors files, got none"):
        load_from(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint: must be an existing folder .*, got .*none"):
        load_from(tmp_path / "none")
    model = make_model()
    write(tmp_path / "model.safetensors", model.state_dict())
    with pytest.raises(ValueError, match=r"SmallWorld: .* must hold config.json where no config is given, got none"):
        load_from(tmp_path)
    write_checkpoint(tmp_path, model)
    with pytest.raises(ValueError, match=r"SmallWorld: .* 23 missing: blocks.2.modulation, .* and 18 more"):
        load_from(tmp_path, num_layers=3)
    with pytest.raises(ValueError, match=r"got 23 unexpected: blocks.1.modulation, .* and 18 more"):
        load_from(tmp_path, num_layers=1)
    with pytest.raises(ValueError, match=r"1 misshapen: patch_embedding_wancamctrl.weight \[128, 42\] for \[128, 54\]"):
        load_from(tmp_path, ray_octaves=4)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_layers": "4"}, "SmallWorldConfig: config.json must have num_layers an integer from 1 to .*, got '4'"),
        ({"ray_octaves": -1}, "SmallWorldConfig: config.json must have ray_octaves an integer from 0 to .*, got -1"),
        ({"eps": None}, "SmallWorldConfig: config.json must have eps a number from 0 to .*, got None"),
        ({"grid": 6}, "SmallWorldConfig: config.json must have grid a list of numbers, got 6"),
        ({"grid": [6, 0]}, r"grid must be \(height, width\) of at least 1 token each"),
        ({"sigmas": ["1"]}, r"SmallWorldConfig: config.json must have sigmas a list of numbers, got \['1'\]"),
        ({"sigmas": [0.5]}, r"SmallWorldConfig: sigmas must start at 1, fall, and stay above 0, got \[0.5\]"),
    ],
)
def test_a_config_json_that_no_model_has(tmp_path, fields, message):
    write_checkpoint(tmp_path, make_model(), **fields)
    with pytest.raises(ValueError, match=message):
        load_from(tmp_path)
