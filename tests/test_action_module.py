"""Matrix-Game-2's action modules, chunk by chunk with caches, against all frames at once without any."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

from worldkv_kernels.models.action_module import (
    ActionCache,
    ActionConfig,
    ActionFrames,
    ActionModule,
    action_windows,
    frame_turns,
)

DIM, LOCATIONS = 20, 5
SMALL = dict(num_heads=2, head_dim=16, embedding_dim=6)


def make_module(dtype=torch.float32, **sizes):
    torch.manual_seed(3)
    module = ActionModule(DIM, ActionConfig(**{**SMALL, **sizes}))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.4 if parameter.dim() > 1 else 1)
    return module.to(dtype).requires_grad_(False)


def make_actions(config, latent_frames, seed=0):
    random = np.random.default_rng(seed)
    rows = 4 * latent_frames - 3
    mouse = random.normal(size=(rows, config.mouse_dim)) if config.mouse_dim else None
    return mouse, random.normal(size=(rows, config.keyboard_dim))


def make_tokens(frames, seed=0):
    return torch.randn(frames, LOCATIONS, DIM, generator=torch.Generator().manual_seed(seed))


class Chunks:
    """Runs a module chunk by chunk, as a model does. Unwritten rows of the cache are NaN."""

    def __init__(self, module, actions, chunk_frames=3):
        self.module, self.actions, self.chunk_frames = module, actions, chunk_frames
        config = module.config
        shape = (config.local_frames, LOCATIONS, config.num_heads, config.head_dim)
        dtype = module.proj_keyboard.weight.dtype
        self.cache = ActionCache(*(torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)))

    def run(self, chunk, x):
        """x [chunk_frames, locations, dim] -> the same."""
        config, first = self.module.config, chunk * self.chunk_frames
        end = first + self.chunk_frames
        attended = min(end, config.local_frames)
        mouse, keyboard = self.actions

        def windows(of, *frames):
            return torch.from_numpy(action_windows(of, *frames, config.seen_frames)).to(x.dtype)

        turns = frame_turns(config, end - attended, attended)
        of_mouse = windows(mouse, first, self.chunk_frames) if mouse is not None else None
        features = self.module.features(of_mouse, windows(keyboard, end - attended, attended), turns)
        rows = torch.arange(first, end) % config.local_frames
        frames = ActionFrames(turns[-self.chunk_frames :], rows, attended)
        return self.module(x.flatten(0, 1), features, frames, self.cache).view_as(x)


# --- the restatement: lists of frames, one location and one head at a time, float64 ---


def unit(x):
    return x / (x.square().mean() + 1e-6).sqrt()


def turned(x, frame, config):
    """The first rope_dim numbers of x [head_dim] as pairs, pair j turned by frame * theta^(-2j / rope_dim)."""
    out = x.clone()
    for j in range(config.rope_dim // 2):
        angle = torch.tensor(frame * config.rope_theta ** (-2 * j / config.rope_dim), dtype=torch.float64)
        a, b = x[2 * j], x[2 * j + 1]
        out[2 * j], out[2 * j + 1] = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
    return out


def seen(actions, frame, config):
    """Rows 4 (frame - seen_frames) .. 4 frame - 1 as one vector."""
    rows = [max(row, 0) for row in range(4 * (frame - config.seen_frames), 4 * frame)]
    return torch.cat([torch.from_numpy(actions[row]) for row in rows])


def attend(queries, keys, values, frame, chunk_frames, config):
    """One head of frame's query over the last local_frames frames up to the end of its chunk."""
    end = (frame // chunk_frames + 1) * chunk_frames
    window = range(max(0, end - config.local_frames), end)
    query = turned(unit(queries[frame]), frame, config)
    scores = torch.stack([query @ turned(unit(keys[i]), i, config) for i in window]) / config.head_dim**0.5
    return sum(weight * values[i] for weight, i in zip(scores.softmax(0), window, strict=True))


def restated(module, actions, x, chunk_frames):
    """x [frames, locations, dim] of all frames -> the same."""
    config, w = module.config, {name: weight.double() for name, weight in module.state_dict().items()}
    mouse, keyboard = actions
    frames = range(len(x))
    heads = [slice(i * config.head_dim, (i + 1) * config.head_dim) for i in range(config.num_heads)]
    out = x.double().clone()
    for place in range(LOCATIONS):
        if mouse is not None:
            qkv = []
            for f in frames:
                h = torch.cat([out[f, place], seen(mouse, f, config)])
                h = F.gelu(w["mouse_mlp.0.weight"] @ h + w["mouse_mlp.0.bias"], approximate="tanh")
                h = w["mouse_mlp.2.weight"] @ h + w["mouse_mlp.2.bias"]
                h = (h - h.mean()) / (h.var(unbiased=False) + 1e-5).sqrt()
                h = h * w["mouse_mlp.3.weight"] + w["mouse_mlp.3.bias"]
                qkv.append((w["t_qkv.weight"] @ h).chunk(3))
            q, k, v = zip(*qkv, strict=True)
            for f in frames:
                of_heads = [
                    attend([t[s] for t in q], [t[s] for t in k], [t[s] for t in v], f, chunk_frames, config)
                    for s in heads
                ]
                out[f, place] += w["proj_mouse.weight"] @ torch.cat(of_heads)
        kv = []
        for f in frames:
            embedded = []
            for row in seen(keyboard, f, config).split(config.keyboard_dim):
                h = F.silu(w["keyboard_embed.0.weight"] @ row + w["keyboard_embed.0.bias"])
                embedded.append(w["keyboard_embed.2.weight"] @ h + w["keyboard_embed.2.bias"])
            kv.append((w["keyboard_attn_kv.weight"] @ torch.cat(embedded)).chunk(2))
        k, v = zip(*kv, strict=True)
        q = [w["mouse_attn_q.weight"] @ out[f, place] for f in frames]
        for f in frames:
            of_heads = [
                attend([t[s] for t in q], [t[s] for t in k], [t[s] for t in v], f, chunk_frames, config) for s in heads
            ]
            out[f, place] += w["proj_keyboard.weight"] @ torch.cat(of_heads)
    return out


# --- tests ---


@pytest.mark.parametrize(
    "chunk_frames, sizes",
    [
        (3, {}),
        (3, {"local_frames": 4, "keyboard_dim": 2}),
        (3, {"mouse_dim": 0, "keyboard_dim": 7}),
        (3, {"local_frames": 3}),
        (2, {"local_frames": 7, "seen_frames": 2, "rope_theta": 10.0}),
        (1, {"local_frames": 3, "seen_frames": 1, "rope_dim": 16}),
        (4, {"local_frames": 6, "mouse_dim": 3}),
    ],
)
def test_chunks_with_caches_are_all_frames_at_once(chunk_frames, sizes):
    module = make_module(**sizes)
    frames = 12
    actions, x = make_actions(module.config, frames), make_tokens(frames)
    want = restated(module, actions, x, chunk_frames)
    chunks = Chunks(module, actions, chunk_frames)
    got = torch.cat([chunks.run(chunk, of_chunk) for chunk, of_chunk in enumerate(x.split(chunk_frames))])
    for frame in range(frames):
        assert relative_error(got[frame] - x[frame], want[frame] - x[frame]) < 2e-6, frame


def test_the_last_pass_over_a_chunk_counts():
    module = make_module(local_frames=4)
    actions, x, other = make_actions(module.config, 12), make_tokens(12), make_tokens(12, seed=1)
    once, twice = Chunks(module, actions), Chunks(module, actions)
    for chunk in range(4):
        rows = slice(3 * chunk, 3 * chunk + 3)
        first_pass = twice.run(chunk, other[rows])
        assert not torch.equal(first_pass, once.run(chunk, x[rows]))
        assert torch.equal(twice.run(chunk, x[rows]), once.run(chunk, x[rows]))


def test_what_frames_see():
    actions = np.arange(37.0)[:, None] * [1, -1]
    windows = action_windows(actions, 0, 10, 3)
    assert windows.shape == (10, 12, 2)
    assert windows[0, :, 0].tolist() == [0] * 12
    assert windows[1, :, 0].tolist() == [0] * 8 + [0, 1, 2, 3]
    assert windows[2, :, 0].tolist() == [0] * 4 + list(range(8))
    assert windows[3, :, 0].tolist() == list(range(12))
    assert windows[9, :, 1].tolist() == [-row for row in range(24, 36)]  # row 36, its newest, is for frame 10
    np.testing.assert_array_equal(action_windows(actions, 4, 3, 3), windows[4:7])
    assert action_windows(actions, 5, 1, 1)[0, :, 0].tolist() == [16, 17, 18, 19]


def test_turns_are_exact_far_from_the_start():
    turns = frame_turns(ActionConfig(), 7000, 2)
    assert turns.shape == (2, 4) and turns.dtype == torch.complex64
    for row, frame in enumerate((7000, 7001)):
        want = [np.exp(1j * frame * 256.0 ** (-j / 4)) for j in range(4)]
        np.testing.assert_allclose(turns[row].numpy(), want, atol=1e-6)


def test_norm_weights_are_not_applied():
    module = make_module()
    actions, x = make_actions(module.config, 3), make_tokens(3)
    before = Chunks(module, actions).run(0, x)
    for name in ("img_attn_q_norm", "img_attn_k_norm", "key_attn_q_norm", "key_attn_k_norm"):
        getattr(module, name).weight.normal_()
    assert torch.equal(Chunks(module, actions).run(0, x), before)


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_half_precision_is_near(dtype, limit):
    module, half = make_module(), make_module(dtype)
    actions, x = make_actions(module.config, 12), make_tokens(12)
    chunks, near = Chunks(module, actions), Chunks(half, actions)
    for chunk, of_chunk in enumerate(x.split(3)):
        want = chunks.run(chunk, of_chunk)
        got = near.run(chunk, of_chunk.to(dtype))
        assert got.dtype == dtype
        assert relative_error(got.float(), want) < limit


def test_names_and_shapes():
    with torch.device("meta"):
        state = ActionModule(1536, ActionConfig()).state_dict()
        without_mouse = ActionModule(1536, ActionConfig(mouse_dim=0, keyboard_dim=7)).state_dict()
    shapes = {name: tuple(weight.shape) for name, weight in state.items()}
    of_mouse = {
        "mouse_mlp.0.weight": (1024, 1560), "mouse_mlp.0.bias": (1024,), "mouse_mlp.2.weight": (1024, 1024),
        "mouse_mlp.2.bias": (1024,), "mouse_mlp.3.weight": (1024,), "mouse_mlp.3.bias": (1024,),
        "t_qkv.weight": (3072, 1024), "img_attn_q_norm.weight": (64,), "img_attn_k_norm.weight": (64,),
        "proj_mouse.weight": (1536, 1024),
    }  # fmt: skip
    of_keyboard = {
        "keyboard_embed.0.weight": (128, 4), "keyboard_embed.0.bias": (128,), "keyboard_embed.2.weight": (128, 128),
        "keyboard_embed.2.bias": (128,), "key_attn_q_norm.weight": (64,), "key_attn_k_norm.weight": (64,),
        "mouse_attn_q.weight": (1024, 1536), "keyboard_attn_kv.weight": (2048, 1536),
        "proj_keyboard.weight": (1536, 1024),
    }  # fmt: skip
    assert shapes == {**of_mouse, **of_keyboard}
    of_seven = {**of_keyboard, "keyboard_embed.0.weight": (128, 7)}
    assert {name: tuple(weight.shape) for name, weight in without_mouse.items()} == of_seven


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"keyboard_dim": 0}, "ActionConfig: keyboard_dim must be at least 1, got 0"),
        ({"local_frames": -1}, "ActionConfig: local_frames must be at least 1, got -1"),
        ({"mouse_dim": -1}, "ActionConfig: mouse_dim must be at least 0, got -1"),
        ({"rope_dim": 7}, "ActionConfig: rope_dim must be even, 2 to 64, got 7"),
        ({"rope_dim": 66}, "ActionConfig: rope_dim must be even, 2 to 64, got 66"),
    ],
)
def test_bad_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        ActionConfig(**sizes)
