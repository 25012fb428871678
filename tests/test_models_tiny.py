"""The tiny world model and the rollout, against a plain restatement that knows neither pool nor hoisting."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

from worldkv_kernels import WorldMemory
from worldkv_kernels.models.rollout import SIGMAS, Actions, Controls, noise, rollout, stream
from worldkv_kernels.models.tiny import TinyConfig, TinyWorldModel, pluecker_map
from worldkv_kernels.trajectory import latent_poses, load

CONFIG = TinyConfig(num_layers=2, grid=(2, 3), ffn_dim=96, text_tokens=5, text_dim=24, frequency_dim=16)
POSES, INTRINSICS = latent_poses(load("right*40,forward*32,left*40"))  # 29 latent frames, 9 chunks


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(config=CONFIG, **options):
    return TinyWorldModel(config, **options)


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


def plain_rollout(model, window, poses=POSES, intrinsics=INTRINSICS, seed=0):
    """Latents of each chunk; `window(chunk)` names the past chunks it attends to, whole."""
    w, config = model.state_dict(), model.config
    (height, width), heads, layers = config.grid, config.num_heads, config.num_layers
    cache = [{} for _ in range(layers)]  # layer -> chunk -> k, v

    def split(x):
        return x.unflatten(1, (heads, -1))

    def flow_of(x, sigma, chunk):
        rows = slice(3 * chunk, 3 * chunk + 3)
        half = config.frequency_dim // 2
        angles = [1000 * sigma * 10000.0 ** (-i / half) for i in range(half)]
        time = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)], dtype=torch.float32)
        time = linear(w, "time_embedding.2", F.silu(linear(w, "time_embedding.0", time)))
        of_time = linear(w, "time_projection.1", F.silu(time)).view(6, -1)
        text = linear(w, "text_embedding.2", F.gelu(linear(w, "text_embedding.0", model.prompt), approximate="tanh"))
        camera = plain_rays(np.linalg.inv(poses[0]) @ poses[rows], intrinsics[rows], config.grid)
        camera = linear(w, "patch_embedding_wancamctrl", camera)
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
            y = norm(x) * w[f"{b}.norm3.weight"] + w[f"{b}.norm3.bias"]
            q = split(rms(linear(w, f"{b}.cross_attn.q", y), w[f"{b}.cross_attn.norm_q.weight"]))
            k = split(rms(linear(w, f"{b}.cross_attn.k", text), w[f"{b}.cross_attn.norm_k.weight"]))
            y = attention(q, k, split(linear(w, f"{b}.cross_attn.v", text)))
            x = x + linear(w, f"{b}.cross_attn.o", y)
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
        for step, sigma in enumerate((1.0, 0.979, 0.947, 0.825)):
            clean = x - sigma * flow_of(x, sigma, chunk)
            if step < 3:
                following = (0.979, 0.947, 0.825)[step]
                x = (1 - following) * clean + following * draws[step + 1]
        flow_of(clean, 0.0, chunk)
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


def test_noise_is_a_function_of_seed_chunk_and_step():
    drawn = noise(1, 2, 3, (40, 50))
    torch.manual_seed(0)  # whatever else draws
    assert torch.equal(drawn, noise(1, 2, 3, (40, 50)))
    for other in ((0, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2), (2, 1, 3)):
        assert (drawn * noise(*other, (40, 50))).mean().abs() < 0.1
    assert drawn.mean().abs() < 0.1 and abs(drawn.std() - 1) < 0.1


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
        if "text_embedding" in name or "time_" in name or name.endswith(("cross_attn.k", "cross_attn.v")):
            assert count == 1, name
        elif "cam" in name or "c2ws" in name:
            assert count == 4, name  # one for each chunk
        else:
            assert count == 4 * 5, name
    assert len(calls) == 1 + 2 + 2 + 2 + 1 + 1 + 2 * (4 + 4 + 2 + 4)


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


# --- the model ---


def test_parameter_names():
    names = set(make_model().state_dict())
    of_block = ["modulation", "norm3.weight", "norm3.bias"]
    for attention_name in ("self_attn", "cross_attn"):
        of_block += [f"{attention_name}.{p}.{kind}" for p in "qkvo" for kind in ("weight", "bias")]
        of_block += [f"{attention_name}.norm_{p}.weight" for p in "qk"]
    linears = ["ffn.0", "ffn.2", "cam_injector_layer1", "cam_injector_layer2", "cam_scale_layer", "cam_shift_layer"]
    of_block += [f"{layer}.{kind}" for layer in linears for kind in ("weight", "bias")]
    top = ["patch_embedding", "patch_embedding_wancamctrl", "c2ws_hidden_states_layer1", "c2ws_hidden_states_layer2"]
    top += ["text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2", "time_projection.1"]
    want = {f"{layer}.{kind}" for layer in [*top, "head.head"] for kind in ("weight", "bias")} | {"head.modulation"}
    want |= {f"blocks.{i}.{name}" for i in range(CONFIG.num_layers) for name in of_block}
    assert names == want


def test_weights_depend_on_the_seed_alone():
    first, same, other = (make_model(seed=seed).state_dict() for seed in (1, 1, 2))
    torch.manual_seed(5)
    half = make_model(seed=1, dtype=torch.bfloat16).state_dict()
    for name, weight in first.items():
        assert torch.equal(weight, same[name]) and not torch.equal(weight, other[name]), name
        assert torch.equal(weight.to(half[name].dtype), half[name]), name  # cast once, from fp32


@torch.no_grad()
def test_what_stays_fp32():
    model = make_model(dtype=torch.bfloat16)
    kept = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert {name for name in kept if not name.startswith(("time_", "head."))} == {
        f"blocks.{i}.{name}" for i in range(2) for name in ("modulation", "norm3.weight", "norm3.bias")
    }
    of_rollout = model.prepare_rollout(None, POSES[0], (1.0, 0.0))
    of_chunk = model.prepare_chunk(of_rollout, 0, Controls(POSES[:3], INTRINSICS[:3]))
    memory = make_memory(model)
    memory.begin_chunk()
    assert of_rollout.modulation.dtype == of_chunk.camera[0][0].dtype == torch.float32
    assert model.denoise(torch.zeros(3, *model.latent_shape), 0, of_chunk, memory).dtype == torch.float32


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_half_precision_is_near(device, dtype, limit):
    near = latents_of("worldkv", model=make_model(device=device, dtype=dtype))
    for a, b in zip(near, latents_of("worldkv"), strict=True):
        assert relative_error(a, b) < limit


def test_default_sizes():
    config = TinyConfig()
    assert (config.dim, config.num_heads, config.head_dim, config.num_layers, config.chunk_frames) == (128, 2, 64, 4, 3)
    assert make_model(config).latent_shape == (16, 2 * config.grid[0], 2 * config.grid[1])
    memory = config.memory(mode="sliding")
    assert (memory.num_layers, memory.grid, memory.mode) == (4, config.grid, "sliding")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ffn_dim": 0}, "TinyConfig: ffn_dim must be at least 1, got 0"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"head_dim": 32}, "head_dim must be 64 or 128, got 32"),
    ],
)
def test_bad_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        TinyConfig(**options)


# --- the rollout, with a model of known answers ---


class Known:
    """Its flow always leads to `target`; writes down what it is given, and fails where told to."""

    def __init__(self, fail_at=None):
        self.device = torch.device("cpu")
        self.chunk_frames, self.latent_shape = 3, (2, 2, 4)
        self.target = torch.randn(3, 2, 2, 4, generator=torch.Generator().manual_seed(9))
        self.config = TinyConfig(num_layers=1, num_heads=1, grid=(1, 2))
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
    assert model.levels == (1.0, 0.979, 0.947, 0.825, 0.0) == (*SIGMAS, 0.0)
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

    chunks = stream(model, make_memory(model), controls(), seed=5)
    assert not asked
    streamed = [next(chunks)]
    assert asked == [0]
    streamed.append(next(chunks))
    whole = rollout(Known(), make_memory(model), POSES[:6], INTRINSICS[:6], seed=5)
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(streamed, whole, strict=True))


def test_a_chunk_is_yielded_before_the_next_is_begun():
    model = Known()
    memory = make_memory(model)
    for made, chunk in enumerate(rollout(model, memory, POSES[:9], INTRINSICS[:9]), start=1):
        assert memory.stats()["chunks"] == made == chunk.plan.chunk + 1
        assert torch.is_grad_enabled()  # the caller's setting is left alone between chunks
    memory.reset()
    rollout_of_three = rollout(model, memory, POSES[:9], INTRINSICS[:9])
    next(rollout_of_three)
    rollout_of_three.close()
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
    other = make_model(TinyConfig(num_layers=1, num_heads=1, grid=(1, 2), chunk_frames=1))
    with pytest.raises(ValueError, match="rollout: memory must have the model's chunk_frames=3, got 1"):
        rollout(model, make_memory(other), POSES, INTRINSICS)
    memory = make_memory(model)
    list(rollout(model, memory, POSES[:6], INTRINSICS[:6]))
    with pytest.raises(ValueError, match="rollout: memory must be new or reset, got one of 2 chunks"):
        rollout(model, memory, POSES, INTRINSICS)
