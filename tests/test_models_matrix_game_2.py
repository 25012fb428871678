"""Matrix-Game-2.0: names, checkpoints, hoisting, and what a chunk's latents depend on."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import relative_error
from test_checkpoint import write
from torch.utils._python_dispatch import TorchDispatchMode

from worldkv_kernels import WorldMemory
from worldkv_kernels.models import checkpoint
from worldkv_kernels.models.action_module import ActionConfig
from worldkv_kernels.models.matrix_game_2 import MatrixGame2, MatrixGameConditions
from worldkv_kernels.models.matrix_game_config import MatrixGameConfig
from worldkv_kernels.models.rollout import Actions, Controls, noise, rollout

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = dict(
    num_layers=3, num_heads=2, head_dim=64, ffn_dim=96, grid=(2, 3), image_tokens=5, image_dim=24, frequency_dim=16,
    action_layers=(0, 2),
)  # fmt: skip
ACTION_SIZES = dict(num_heads=2, head_dim=16, embedding_dim=8)


def small(variant="universal", **overrides):
    published = getattr(MatrixGameConfig, variant)()
    return replace(published, actions=replace(published.actions, **ACTION_SIZES), **{**SIZES, **overrides})


CONFIG = small()
VARIANTS = ("universal", "gta_drive", "templerun")


def make_model(config=CONFIG, seed=0, *, device="cpu", dtype=torch.float32, **options):
    return MatrixGame2.random(config, seed, device=device, dtype=dtype, **options)


def make_memory(model, mode="sliding", **options):
    options = {"bank_chunks": 20, **options}
    return WorldMemory(model.config.memory(mode=mode, **options), device=model.device, dtype=model.dtype)


def make_actions(config, latent_frames, seed=0):
    random = np.random.default_rng(seed)
    rows, sizes = 4 * latent_frames - 3, config.actions
    mouse = random.normal(size=(rows, sizes.mouse_dim)) if sizes.mouse_dim else None
    return Actions(mouse, random.integers(0, 2, size=(rows, sizes.keyboard_dim)))


def make_poses(latent_frames):
    poses = np.tile(np.eye(4), (latent_frames, 1, 1))
    poses[:, 2, 3] = np.arange(latent_frames)
    return poses


def latents_of(model=None, actions=None, *, chunks=5, mode="sliding", conditions=None, seed=0, **options):
    model = model or make_model()
    frames = 3 * chunks
    actions = actions or make_actions(model.config, frames)
    memory = make_memory(model, mode, **options)
    made = rollout(model, memory, make_poses(frames), actions=actions, conditions=conditions, seed=seed)
    return [chunk.latents for chunk in made]


def changed(latents, others):
    """Chunks that differ."""
    return [n for n, (a, b) in enumerate(zip(latents, others, strict=True)) if not torch.equal(a, b)]


# --- the published variants ---


def published_shapes(keyboard_dim, mouse):
    """The state dict of the published checkpoints, in numbers."""
    dim, ffn = 1536, 8960
    linears = {"time_embedding.0": (dim, 256), "time_embedding.2": (dim, dim), "time_projection.1": (6 * dim, dim)}
    linears |= {"img_emb.proj.1": (1280, 1280), "img_emb.proj.3": (dim, 1280), "head.head": (64, dim)}
    shapes = {"head.modulation": (1, 2, dim), "patch_embedding.weight": (dim, 36, 1, 2, 2)}
    shapes["patch_embedding.bias"] = (dim,)
    for norm, size in (("img_emb.proj.0", 1280), ("img_emb.proj.4", dim)):
        shapes |= {f"{norm}.weight": (size,), f"{norm}.bias": (size,)}
    for block in (f"blocks.{layer}" for layer in range(30)):
        linears |= {f"{block}.{attention}_attn.{p}": (dim, dim) for attention in ("self", "cross") for p in "qkvo"}
        linears |= {f"{block}.ffn.0": (ffn, dim), f"{block}.ffn.2": (dim, ffn)}
        shapes |= {f"{block}.{attention}_attn.norm_{p}.weight": (dim,) for attention in ("self", "cross") for p in "qk"}
        shapes |= {f"{block}.norm3.weight": (dim,), f"{block}.norm3.bias": (dim,)}
        shapes[f"{block}.modulation"] = (1, 6, dim)
    for acts in (f"blocks.{layer}.action_model" for layer in range(15)):
        linears |= {f"{acts}.keyboard_embed.0": (128, keyboard_dim), f"{acts}.keyboard_embed.2": (128, 128)}
        shapes |= {f"{acts}.key_attn_{p}_norm.weight": (64,) for p in "qk"}
        shapes |= {f"{acts}.mouse_attn_q.weight": (1024, dim), f"{acts}.keyboard_attn_kv.weight": (2048, 1536)}
        shapes[f"{acts}.proj_keyboard.weight"] = (dim, 1024)
        if mouse:
            linears |= {f"{acts}.mouse_mlp.0": (1024, 1560), f"{acts}.mouse_mlp.2": (1024, 1024)}
            shapes |= {f"{acts}.mouse_mlp.3.{kind}": (1024,) for kind in ("weight", "bias")}
            shapes |= {f"{acts}.img_attn_{p}_norm.weight": (64,) for p in "qk"}
            shapes |= {f"{acts}.t_qkv.weight": (3072, 1024), f"{acts}.proj_mouse.weight": (dim, 1024)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


PUBLISHED = {"universal": (4, True, 1114), "gta_drive": (2, True, 1114), "templerun": (7, False, 964)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_state_dicts(variant):
    keyboard_dim, mouse, tensors = PUBLISHED[variant]
    model = MatrixGame2(getattr(MatrixGameConfig, variant)(), device="meta")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == published_shapes(keyboard_dim, mouse) and len(shapes) == tensors
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}


def test_published_sizes():
    universal, gta, templerun = (getattr(MatrixGameConfig, variant)() for variant in VARIANTS)
    warped = [5 * s / (1 + 4 * s) for s in (1, 0.666, 0.333)]
    np.testing.assert_allclose(universal.sigmas, warped, rtol=1e-12)
    assert gta.sigmas == universal.sigmas
    np.testing.assert_allclose(templerun.sigmas, (1, 0.9375, 2.5 / 3, 0.625), rtol=1e-12)
    assert [config.actions.local_frames for config in (universal, gta, templerun)] == [6, 4, 6]
    assert universal.dim == 1536 and MatrixGame2(universal, device="meta").latent_shape == (16, 44, 80)
    memory = universal.memory()
    assert (memory.sink_frames, memory.recent_frames, memory.mode, memory.frame_tokens) == (0, 3, "worldkv", 880)
    assert [config.recent_frames for config in (universal, gta, templerun)] == [3, 1, 3]
    assert MatrixGameConfig.universal(chunk_frames=1).recent_frames == 5


def published_json(variant, **changes):
    """As the published folders have it, in the small sizes."""
    config = small(variant)
    actions = config.actions
    fields = {
        "_class_name": "CausalWanModel", "dim": config.dim, "eps": 1e-6, "ffn_dim": 96, "freq_dim": 16, "in_dim": 36,
        "local_attn_size": actions.local_frames, "model_type": "i2v", "num_heads": 2, "num_layers": 3, "out_dim": 16,
        "sink_size": 0, "text_len": 512,
        "action_config": {
            "blocks": [0, 2], "enable_keyboard": True, "enable_mouse": actions.mouse_dim > 0, "heads_num": 2,
            "hidden_size": 8, "img_hidden_size": config.dim, "keyboard_dim_in": actions.keyboard_dim,
            "keyboard_hidden_dim": 32, "mouse_dim_in": 2, "patch_size": [1, 2, 2], "qk_norm": True,
            "qkv_bias": False, "rope_dim_list": [8, 28, 28], "rope_theta": 256, "vae_time_compression_ratio": 4,
            "windows_size": 3,
        },
    }  # fmt: skip
    fields = {**fields, **{name: value for name, value in changes.items() if name in fields}}
    of_actions = {name: value for name, value in changes.items() if name in fields["action_config"]}
    fields["action_config"] = {**fields["action_config"], **of_actions}
    return {name: value for name, value in fields.items() if value is not None}


GIVEN = {name: SIZES[name] for name in ("grid", "image_tokens", "image_dim")}  # sizes that config.json lacks


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_of_a_published_folder(variant):
    fields = published_json(variant)
    assert MatrixGameConfig.from_published(fields, **GIVEN) == small(variant)
    assert MatrixGameConfig.from_published(published_json(variant, local_attn_size=None), **GIVEN) == small(variant)
    wider = MatrixGameConfig.from_published(published_json(variant, local_attn_size=11), **GIVEN)
    assert wider.recent_frames == 8 and wider.actions.local_frames == 11


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_layers": 3}, "config.json must have num_heads, dim, ffn_dim, got num_layers"),
        (published_json("universal", sink_size=3), "config.json must have sink_size 0, got 3"),
        (published_json("universal", qkv_bias=True), "config.json must have qkv_bias False, got True"),
        (published_json("universal", local_attn_size=-1), "local_attn_size an integer from 1 to 1048576, got -1"),
        (published_json("universal", eps=math.inf), "eps a number from 0 to 1048576, got inf"),
        (published_json("universal", num_heads=0), "num_heads an integer from 1 to 1048576, got 0"),
        (published_json("universal", heads_num="2"), "heads_num an integer from 1 to 1048576, got '2'"),
        (published_json("universal", rope_dim_list=[]), r"rope_dim_list a list of integers, got \[\]"),
        ({**published_json("universal"), "action_config": [1]}, r"action_config an object, got \[1\]"),
    ],
)
def test_config_of_another_model(fields, message):
    with pytest.raises(ValueError, match=message):
        MatrixGameConfig.from_published(fields)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stale", [False, True])
def test_a_written_checkpoint_reproduces_the_latents(tmp_path, variant, stale):
    model = make_model(small(variant), seed=5)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    write(tmp_path / "distilled.safetensors", tensors)
    # Two of the published folders have the config.json of an earlier model, with other actions and without a window.
    changes = dict(local_attn_size=None, blocks=[0, 1, 2], keyboard_dim_in=6, enable_mouse=True) if stale else {}
    (tmp_path / "config.json").write_text(json.dumps(published_json(variant, **changes)))
    loaded = MatrixGame2.from_pretrained(tmp_path, device="cpu", dtype=torch.float32, **GIVEN)
    assert loaded.config == model.config
    loaded.seed = model.seed
    assert not changed(latents_of(loaded, chunks=2), latents_of(model, chunks=2))
    from_file = MatrixGame2.from_pretrained(
        tmp_path / "distilled.safetensors", device="cpu", dtype=torch.float32, config=small(variant)
    )
    assert all(torch.equal(a, b) for a, b in zip(from_file.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_names_load_without_a_missing_or_unexpected_key(variant):
    """By name and shape alone: nothing is copied to the meta device."""
    keyboard_dim, mouse, _ = PUBLISHED[variant]
    stored = {
        name: checkpoint.StoredTensor("none", "F32", shape, 0, 0)
        for name, shape in published_shapes(keyboard_dim, mouse).items()
    }
    model = MatrixGame2(getattr(MatrixGameConfig, variant)(), device="meta")
    del stored["img_emb.proj.4.bias"]
    stored["img_emb.proj.5.bias"] = checkpoint.StoredTensor("none", "F32", (1536,), 0, 0)
    want = "MatrixGame2: .* 1 missing: img_emb.proj.4.bias; 1 unexpected: img_emb.proj.5.bias$"
    with pytest.raises(ValueError, match=want):
        checkpoint.load_parameters("MatrixGame2", model, stored)


def test_loading_needs_a_config(tmp_path):
    write(tmp_path / "model.safetensors", make_model().state_dict())
    with pytest.raises(ValueError, match=r"MatrixGame2: .* must hold config.json where no config is given, got none"):
        MatrixGame2.from_pretrained(tmp_path, device="cpu", dtype=torch.float32)


# --- hoisting ---


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", ["worldkv", "full"])
def test_hoisting_changes_no_bit(variant, mode):
    config = small(variant)
    hoisted, plain = (latents_of(make_model(config, hoist=hoist), mode=mode) for hoist in (True, False))
    assert not changed(hoisted, plain)


def test_what_holds_for_a_chunk_is_computed_once():
    model, calls = make_model(), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls.get(name, 0) + 1))
    latents_of(model, chunks=4)
    for name, count in calls.items():
        if "time_" in name:
            assert count == 4, name  # noise levels
        elif "img_emb" in name or name.endswith(("cross_attn.k", "cross_attn.v")):
            assert count == 1, name
        elif "keyboard_embed" in name or "keyboard_attn_kv" in name:
            assert count == 4, name  # chunks
        else:
            assert count == 4 * 4, name
    # mouse_mlp.0, proj_mouse and proj_keyboard are called by their weights.
    assert len(calls) == 1 + 2 + 1 + 2 + 3 * (4 + 4 + 2) + 2 * 6


class Calls(TorchDispatchMode):
    """Names of the ATen operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_pass_reads_nothing_back_and_its_inputs_stay_in_place():
    model = make_model()
    actions = make_actions(CONFIG, 15)
    memory = SimpleNamespace(attend=lambda layer, q, k, v, *weights: v.unflatten(1, (2, 64)))
    of_rollout = model.prepare_rollout(None, np.eye(4), (1.0, 0.0))
    addresses = []
    for start_frame in (0, 3, 6, 9):
        of_chunk = model.prepare_chunk(of_rollout, start_frame, Controls(make_poses(3), None, actions))
        with Calls() as calls:
            model.denoise(torch.zeros(3, *model.latent_shape), 0, of_chunk, memory)
        reads = {"_local_scalar_dense", "nonzero", "item", "lift_fresh", "lift_fresh_copy", "equal", "is_nonzero"}
        assert "addmm" in calls.names and not calls.names & reads
        buffers = of_rollout.buffers
        tensors = [*of_chunk.frames[:2], *buffers[:6], *(tensor for layer in buffers.features for tensor in layer)]
        tensors += [tensor for cache in of_rollout.caches for tensor in cache]
        addresses.append([tensor.data_ptr() for tensor in tensors])
    assert addresses[1:] == addresses[:-1] and of_chunk.frames.attended == 6


# --- what the latents depend on ---


def denoised(model, memory, of_rollout, chunk, actions, *, seed=0, passes=None):
    """The passes of a chunk, or the first few, written out; returns what it came to."""
    controls = Controls(make_poses(3 * chunk + 3)[-3:], None, actions)
    of_chunk = model.prepare_chunk(of_rollout, 3 * chunk, controls)
    x = clean = noise(seed, chunk, 0, (3, *model.latent_shape))
    for step, sigma in enumerate((*model.sigmas, 0.0)[:passes]):
        if sigma == 0:
            model.denoise(clean, step, of_chunk, memory)
            break
        if step:
            x = (1 - sigma) * clean + sigma * noise(seed, chunk, step, x.shape)
        clean = x - sigma * model.denoise(x, step, of_chunk, memory)
    return clean


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_dropped_chunk_leaves_no_trace(variant):
    model = make_model(small(variant))
    actions, other = (make_actions(model.config, 15, seed=seed) for seed in (0, 1))
    want, memory = latents_of(model, actions), make_memory(model)
    of_rollout = model.prepare_rollout(None, np.eye(4), (*model.sigmas, 0.0))
    for chunk in range(5):
        for passes in (1, None):  # dropped early, and after its last pass
            memory.begin_chunk()
            denoised(model, memory, of_rollout, chunk, other, seed=7, passes=passes)
            memory.abort_chunk()
        memory.begin_chunk()
        assert torch.equal(denoised(model, memory, of_rollout, chunk, actions), want[chunk]), chunk
        memory.end_chunk()


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_clean_passes_alone_bring_a_rollout_to_where_it_is(variant):
    """All that is carried from chunk to chunk is a function of the clean latents of the chunks before."""
    model = make_model(small(variant))
    actions = make_actions(model.config, 15)
    want = latents_of(model, actions)
    for resumed in (1, 2, 4):
        memory = make_memory(model)
        of_rollout = model.prepare_rollout(None, np.eye(4), (*model.sigmas, 0.0))
        for chunk in range(resumed):
            memory.begin_chunk()
            controls = Controls(make_poses(3), None, actions)
            of_chunk = model.prepare_chunk(of_rollout, 3 * chunk, controls)
            model.denoise(want[chunk], len(model.sigmas), of_chunk, memory)
            memory.end_chunk()
        memory.begin_chunk()
        assert torch.equal(denoised(model, memory, of_rollout, resumed, actions), want[resumed]), resumed


def test_two_rollouts_of_one_model_do_not_mix():
    model = make_model()
    actions, poses = [make_actions(CONFIG, 12, seed=seed) for seed in (0, 1)], make_poses(12)
    alone = [latents_of(model, of_one, chunks=4) for of_one in actions]
    both = [rollout(model, make_memory(model), poses, actions=of_one) for of_one in actions]
    mixed = [(a.latents, b.latents) for a, b in zip(*both, strict=True)]
    for which in range(2):
        assert not changed([pair[which] for pair in mixed], alone[which])


@pytest.mark.parametrize("which", ["mouse", "keyboard"])
def test_an_action_changes_nothing_before_the_frame_that_sees_it(which):
    """Row 4f - 1 is first seen by latent frame f, row 4f by frame f + 1; so row 44, the last one, by nothing."""
    model = make_model()
    actions = make_actions(CONFIG, 12)
    want = latents_of(model, actions, chunks=4)
    for row, first in ((0, 0), (8, 1), (19, 1), (20, 2), (31, 2), (32, 3), (43, 3), (44, 4)):
        other = actions._replace(**{which: getattr(actions, which) + 3 * (np.arange(45) == row)[:, None]})
        assert changed(latents_of(model, other, chunks=4), want) == list(range(first, 4)), row


@torch.no_grad()
@pytest.mark.parametrize(
    "variant, chunk, local, rows",
    [
        ("universal", 0, (0, 1, 2), (0, 1, 2)),
        ("universal", 1, (0, 1, 2, 3, 4, 5), (3, 4, 5)),
        ("universal", 4, (9, 10, 11, 12, 13, 14), (0, 1, 2)),
        ("gta_drive", 1, (2, 3, 4, 5), (3, 0, 1)),
        ("gta_drive", 2, (5, 6, 7, 8), (2, 3, 0)),
        ("templerun", 2, (3, 4, 5, 6, 7, 8), (0, 1, 2)),
    ],
)
def test_what_the_actions_of_a_chunk_are(variant, chunk, local, rows):
    """`local`: the latent frames attended to; `rows`: where the chunk's go in the ring of its mouse cache."""
    model = make_model(small(variant))
    actions = make_actions(model.config, 15)
    of_rollout = model.prepare_rollout(None, np.eye(4), (1.0, 0.0))
    of_chunk = model.prepare_chunk(of_rollout, 3 * chunk, Controls(make_poses(3), None, actions))
    buffers, frames = of_rollout.buffers, of_chunk.frames
    assert frames.attended == len(local) and tuple(frames.rows.tolist()) == rows

    def seen(of_one, frame):
        return torch.tensor(np.array([of_one[max(row, 0)] for row in range(4 * frame - 12, 4 * frame)])).float()

    for place, frame in enumerate(local):
        angles = torch.tensor([frame * 256.0 ** (-j / 4) for j in range(4)])
        for part, turns in ((angles.cos(), buffers.local_turns.real), (angles.sin(), buffers.local_turns.imag)):
            torch.testing.assert_close(turns[place], part, atol=1e-5, rtol=0)
        assert torch.equal(buffers.keyboard[place], seen(actions.keyboard, frame))
    assert torch.equal(frames.turns, buffers.local_turns[len(local) - 3 : len(local)])
    assert (buffers.mouse is None) == (variant == "templerun")
    for place, frame in enumerate(local[-3:] if buffers.mouse is not None else ()):
        assert torch.equal(buffers.mouse[place], seen(actions.mouse, frame))


@torch.no_grad()
def test_how_long_actions_are_heard():
    """Row 20: by frames 6, 7 and 8 through the mouse, and for as long as those are attended to through the keys."""
    model = make_model()
    actions = make_actions(CONFIG, 18)
    other = Actions(*(rows + (np.arange(69) == 20)[:, None] for rows in actions))
    heard = {"mouse": [], "keyboard": []}
    for chunk in range(6):
        features = []
        for of_one in (actions, other):
            of_rollout = model.prepare_rollout(None, np.eye(4), (1.0, 0.0))
            model.prepare_chunk(of_rollout, 3 * chunk, Controls(make_poses(3), None, of_one))
            features.append(of_rollout.buffers.features[1].until(min(3 * chunk + 3, 6)))
        a, b = features
        if not torch.equal(a.mouse, b.mouse):
            heard["mouse"].append(chunk)
        if not torch.equal(a.keys, b.keys) and not torch.equal(a.values, b.values):
            heard["keyboard"].append(chunk)
    assert heard == {"mouse": [2], "keyboard": [2, 3]}


def test_mouse_keys_image_and_window_matter():
    model = make_model()
    actions = make_actions(CONFIG, 15)
    made = latents_of(model, actions)
    for which in ("mouse", "keyboard"):
        other = latents_of(model, actions._replace(**{which: -getattr(actions, which)}))
        assert relative_error(other[-1], made[-1]) > 1e-3, which
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(5, 24, generator=generator)
    latents = torch.randn(20, 4, 4, 6, generator=generator)
    for conditions in (MatrixGameConditions(image_tokens=tokens), MatrixGameConditions(image_latents=latents)):
        assert relative_error(latents_of(model, actions, conditions=conditions)[-1], made[-1]) > 1e-3
    assert relative_error(latents_of(model, actions, mode="full")[-1], made[-1]) > 1e-4
    narrow = replace(CONFIG, actions=replace(CONFIG.actions, local_frames=3))
    narrow = MatrixGame2(narrow, dtype=model.dtype)
    narrow.load_state_dict(model.state_dict())
    assert changed(latents_of(narrow, actions), made) == [1, 2, 3, 4]


def test_frames_past_the_last_image_latents_are_like_it():
    model = make_model()
    given = torch.randn(20, 4, 4, 6, generator=torch.Generator().manual_seed(3))
    longer = torch.cat([given, given[:, -1:].expand(-1, 11, -1, -1)], dim=1)
    short, long = (latents_of(model, conditions=MatrixGameConditions(None, latents)) for latents in (given, longer))
    assert not changed(short, long)
    longer[:, 5] += 1
    assert changed(short, latents_of(model, conditions=MatrixGameConditions(None, longer))) == [1, 2, 3, 4]


@torch.no_grad()
def test_the_stand_in_for_conditions():
    of_rollout = make_model(seed=2).prepare_rollout(None, np.eye(4), (1.0, 0.0))
    mask = of_rollout.image_latents[:, :4]
    assert mask[0].eq(1).all() and mask[1].eq(0).all() and of_rollout.image_latents.shape == (2, 20, 4, 6)
    other = make_model(seed=3).prepare_rollout(None, np.eye(4), (1.0, 0.0))
    assert not torch.equal(other.image_tokens, of_rollout.image_tokens)
    assert not torch.equal(other.image_latents, of_rollout.image_latents)


# --- numbers ---


def test_weights_depend_on_the_seed_alone():
    first, same, other = (make_model(seed=seed).state_dict() for seed in (1, 1, 2))
    torch.manual_seed(5)
    for name, weight in first.items():
        if not name.endswith(("q_norm.weight", "k_norm.weight")):
            assert torch.equal(weight, same[name]) and not torch.equal(weight, other[name]), name


@torch.no_grad()
def test_all_is_in_the_models_dtype(device):
    model = make_model(device=device, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    streams = []
    for block in model.blocks:
        block.ffn[2].register_forward_hook(lambda module, inputs, output: streams.append(output.dtype))
        block.self_attn.q.register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0].dtype))
    of_rollout = model.prepare_rollout(None, np.eye(4), (1.0, 0.0))
    of_chunk = model.prepare_chunk(of_rollout, 0, Controls(make_poses(3), None, make_actions(CONFIG, 3)))
    memory = make_memory(model)
    memory.begin_chunk()
    flow = model.denoise(torch.zeros(3, *model.latent_shape, device=device), 0, of_chunk, memory)
    assert flow.dtype == torch.float32 and set(streams) == {torch.bfloat16} and len(streams) == 6
    assert of_rollout.levels[0].modulation.dtype == torch.bfloat16


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 0.02), (torch.float16, 0.004)])
def test_half_precision_is_near(device, variant, dtype, limit):
    model = make_model(small(variant))
    half = MatrixGame2(model.config, device=device, dtype=dtype)
    half.load_state_dict(model.state_dict())
    actions = make_actions(model.config, 12)
    conditions = MatrixGameConditions(*(torch.randn(5, 24), torch.randn(20, 3, 4, 6)))
    near, want = (latents_of(m, actions, chunks=4, conditions=conditions) for m in (half, model))
    for a, b in zip(near, want, strict=True):
        assert relative_error(a, b) < limit


def test_thirty_layers_stay_bounded():
    model = make_model(small(num_layers=30, action_layers=tuple(range(15))))
    streams = []
    model.head.register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0].std()))
    latents = latents_of(model, chunks=2)
    assert all(torch.isfinite(of_one).all() for of_one in latents)
    assert 0.3 < latents[-1].std() < 3 and min(streams) > 0.5 and max(streams) < 2.5


# --- errors ---


@pytest.mark.parametrize(
    "variant, actions, message",
    [
        ("universal", None, "MatrixGame2: actions must be given, got None"),
        ("universal", (None, (9, 4)), r"must have mouse \[at least 9, 2\], got None"),
        ("universal", ((9, 3), (9, 4)), r"must have mouse \[at least 9, 2\], got \[9, 3\]"),
        ("universal", ((9, 2), (9, 7)), r"must have keyboard \[at least 9, 4\], got \[9, 7\]"),
        ("gta_drive", ((9, 2), (8, 2)), r"must have keyboard \[at least 9, 2\], got \[8, 2\]"),
        ("gta_drive", ((9, 2), None), r"must have keyboard \[at least 9, 2\], got None"),
        ("templerun", ((9, 2), (9, 7)), r"actions must have no mouse \(None\), got \[9, 2\]"),
        ("templerun", (None, (9,)), r"must have keyboard \[at least 9, 7\], got \[9\]"),
    ],
)
def test_wrong_actions(variant, actions, message):
    model = make_model(small(variant))
    of_rollout = model.prepare_rollout(None, np.eye(4), (1.0, 0.0))
    if actions is not None:
        actions = Actions(*(shape if shape is None else np.zeros(shape) for shape in actions))
    with pytest.raises(ValueError, match=message):
        model.prepare_chunk(of_rollout, 0, Controls(make_poses(3), None, actions))


@pytest.mark.parametrize(
    "conditions, error, message",
    [
        ("an image", TypeError, "MatrixGame2: conditions must be MatrixGameConditions or None, got 'an image'"),
        (MatrixGameConditions(torch.zeros(5, 23)), ValueError, r"image_tokens must be \[5, 24\], got \[5, 23\]"),
        (
            MatrixGameConditions(None, torch.zeros(20, 0, 4, 6)), ValueError,
            r"image_latents must be \[20, at least 1, 4, 6\], got \[20, 0, 4, 6\]",
        ),
        (
            MatrixGameConditions(None, torch.zeros(20, 3, 4, 5)), ValueError,
            r"image_latents must be \[20, at least 1, 4, 6\], got \[20, 3, 4, 5\]",
        ),
    ],
)  # fmt: skip
def test_wrong_conditions(conditions, error, message):
    with pytest.raises(error, match=message):
        make_model().prepare_rollout(conditions, np.eye(4), (1.0, 0.0))


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"ffn_dim": 0}, "MatrixGameConfig: ffn_dim must be at least 1, got 0"),
        ({"image_tokens": 0}, "MatrixGameConfig: image_tokens must be at least 1, got 0"),
        ({"frequency_dim": 15}, "MatrixGameConfig: frequency_dim must be even, got 15"),
        ({"action_layers": (0, 3, 7)}, "MatrixGameConfig: action_layers must be of blocks 0 to 2, got 3, 7"),
        ({"actions": ActionConfig(local_frames=2)}, "local_frames of at least chunk_frames=3, got 2"),
        ({"head_dim": 32}, "head_dim must be 64 or 128, got 32"),
    ],
)
def test_bad_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **sizes)
