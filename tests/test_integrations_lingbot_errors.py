"""What the memory in LingBot-World-Fast's own code refuses, and that a refusal changes nothing."""

import copy
import types

import numpy as np
import plain_lingbot_pipeline as pipeline
import pytest
import torch
from conftest import relative_error
from small_lingbot import (
    GRID,
    HEIGHT,
    POSES,
    WIDTH,
    WORLDKV,
    caches,
    enable,
    forward,
    generate,
    make_model,
)
from torch import nn

from worldkv_kernels import Rope3D
from worldkv_kernels.integrations import lingbot


@pytest.mark.parametrize(
    ("chunk", "options", "error", "message"),
    [
        (5, {}, RuntimeError, r"current_start must be 54 \(the next chunk\), 36 \(the current one again\) or 0"),
        (1, {}, RuntimeError, r"got 18: the memory cannot skip chunks or go back"),
        (3, {"start": 55}, ValueError, "current_start must be a multiple of the chunk's 18 tokens"),
        (2, {"both": "other"}, RuntimeError, "classifier-free guidance by two forwards give it branches=2"),
        (3, {"both": "other"}, RuntimeError, "classifier-free guidance by two forwards give it branches=2"),
        (2, {"video": [torch.zeros(16, 3, HEIGHT, WIDTH)] * 2}, ValueError, "x must hold one video.* got 2"),
        (2, {"video": [torch.zeros(16, 3, 6, 4)]}, ValueError, r"x must be of \(3, 2, 3\) frames.*got \(3, 3, 2\)"),
        (2, {"video": [torch.zeros(16, 3, 8, 6)]}, ValueError, r"got \(3, 4, 3\)"),
        (2, {"video": [torch.zeros(16, 1, HEIGHT, WIDTH)]}, ValueError, r"got \(1, 2, 3\)"),
    ],
)
def test_forwards_that_the_memory_cannot_serve(chunk, options, error, message):
    model, both = make_model(), caches()
    handle = enable(model, **WORLDKV)
    for past in range(3):
        forward(model, past, both=both)
    before = handle.memory.stats()
    options = {"both": both, **options}
    if options["both"] == "other":
        options["both"] = caches()
    with pytest.raises(error, match=f"lingbot: .*{message}"):
        forward(model, chunk, **options)
    assert handle.memory.stats() == before
    forward(model, 2, 0.0, both=both)
    assert handle.stats()["chunks"] == 3


def test_guidance_by_two_forwards_is_refused_at_its_second_step():
    model, conditional, unconditional = make_model(), caches(), caches()
    enable(model)
    forward(model, 0, both=conditional)
    forward(model, 0, both=unconditional)
    with pytest.raises(RuntimeError, match="classifier-free guidance"):
        forward(model, 0, 900.0, both=conditional)


def test_a_copy_of_an_enabled_model_is_refused():
    """It would run the original's weights."""
    model = make_model()
    handle = enable(model)
    with pytest.raises(RuntimeError, match="lingbot: the model must give up its memory before it is copied"):
        copy.deepcopy(model)
    handle.disable()
    assert "forward" not in copy.deepcopy(model).__dict__


def test_training_mode_and_gradients_are_refused():
    model, both = make_model(), caches()
    handle = enable(model)
    model.train()
    with pytest.raises(RuntimeError, match="lingbot: the model must be in eval mode"):
        forward(model, 0, both=both)
    model.eval()
    model.blocks[0].self_attn.q.weight.requires_grad_(True)
    no_grad, torch.no_grad = torch.no_grad, torch.enable_grad
    try:
        with pytest.raises(RuntimeError, match=r"lingbot: forward must run under torch.no_grad\(\)"):
            forward(model, 0, both=both)
    finally:
        torch.no_grad = no_grad
    forward(model, 0, both=both)
    assert handle.stats()["chunks"] == 0


def test_a_memory_of_another_dtype_is_refused():
    model = make_model()
    enable(model, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"lingbot: the memory's dtype must be that of q, torch.float32, got"):
        forward(model, 0)


def test_poses_that_are_missing_wrong_or_too_few():
    model = make_model()
    for poses, message in (
        (None, "poses must be given"),
        (POSES[:, :3], r"poses must be \[frames, 4, 4\], got"),
        (2 * POSES, "poses must be rigid"),
        (np.full_like(POSES, np.nan), "poses must be finite"),
    ):
        with pytest.raises(ValueError, match=f"lingbot: .*{message}"):
            enable(model, poses, **WORLDKV)
    handle = enable(model, POSES[:8], **WORLDKV)
    with pytest.raises(ValueError, match="lingbot: poses must be of 9 latent frames up to chunk 2, got 8"):
        generate(model)
    assert handle.stats()["chunks"] == 2


def test_enabling_twice_is_refused():
    model = make_model()
    handle = enable(model)
    with pytest.raises(RuntimeError, match=r"lingbot.enable: model must have no memory yet"):
        enable(model)
    generate(model, 6)
    assert handle.stats()["chunks"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 3}, "num_layers must be the model's 2, got 3"),
        ({"num_heads": 4}, "num_heads must be the model's 2, got 4"),
        ({"head_dim": 128}, "head_dim must be the model's 64, got 128"),
        ({"eps": 1e-5}, "eps must be the model's 1e-06, got 1e-05"),
        ({"rope": None}, "rope must be the model's, .* got None"),
        ({"rope": Rope3D(64, theta=256)}, "rope must be the model's"),
        ({"rope": Rope3D(64, pairs=(10, 11, 11))}, "rope must be the model's"),
    ],
)
def test_a_config_of_another_model_is_refused(options, message):
    model = make_model()
    with pytest.raises(ValueError, match=rf"lingbot.enable: config's {message}"):
        enable(model, **options)
    assert "forward" not in model.__dict__ and "forward" not in model.blocks[0].self_attn.__dict__


@pytest.mark.parametrize("rows", [4, 512, 3000])
def test_a_model_may_number_any_positions(rows):
    """Its own table goes unused: a short one ends no rollout, and only has to be the beginning of the same angles."""
    model, other = make_model(), make_model()
    angles = torch.from_numpy(Rope3D(64).table(range(rows))).double()
    other.freqs = torch.view_as_complex(angles)
    enable(model)
    enable(other)
    assert torch.equal(generate(other, 9), generate(model, 9))
    off = make_model()
    off.freqs = torch.view_as_complex(angles.flip(0))
    with pytest.raises(ValueError, match=rf"config's rope must be the model's, \[{rows}, 32\] angles, got Rope3D"):
        enable(off)


@pytest.mark.parametrize("config", [{"num_layers": 2}, "worldkv"])
def test_what_is_no_config_is_refused(config):
    model = make_model()
    message = f"lingbot.enable: config must be a MemoryConfig, such as lingbot.memory_config makes .* got {config!r}"
    with pytest.raises(TypeError, match=message):
        lingbot.enable(model, config, poses=POSES)
    assert "forward" not in model.__dict__


def test_restart_after_disable_is_refused():
    model = make_model()
    handle = enable(model)
    assert repr(handle) == "LingBotMemory(enabled, no memory before the first forward)"
    generate(model, 6)
    assert repr(handle).startswith("LingBotMemory(enabled, WorldMemory(full, 1 chunks, 0 banked, ")
    handle.disable()
    with pytest.raises(
        RuntimeError, match="lingbot: restart must be called while the model has its memory, got a call aft"
    ):
        handle.restart(POSES)
    assert handle.stats()["chunks"] == 2 and repr(handle).startswith("LingBotMemory(disabled, WorldMemory(full, 2 ")


def test_models_of_other_classes_are_refused():
    other = make_model()
    other.blocks[1].self_attn = nn.Identity()
    for model, got in ((nn.Linear(2, 2), "Linear"), (pipeline.WanI2VFast(None), "WanI2VFast"), (other, "of Identity")):
        with pytest.raises(TypeError, match=f"lingbot: model must be LingBot-World-Fast's WanModelFast.* got .*{got}"):
            lingbot.memory_config(model, grid=GRID)


def test_another_patch_of_the_attention_is_refused():
    model = make_model()
    model.blocks[1].self_attn.forward = print
    with pytest.raises(RuntimeError, match=r"blocks\[1\].self_attn.forward must be the model's own, got print"):
        enable(model)


def sp_attn_forward_causal(self, *args, **kwargs):
    return type(self).forward(self, *args, **kwargs)


def sp_dit_forward_causal(self, *args, **kwargs):
    return type(self).forward(self, *args, **kwargs)


def put_in_sequence_parallel(model):
    for block in model.blocks:
        block.self_attn.forward = types.MethodType(sp_attn_forward_causal, block.self_attn)
    model.forward = types.MethodType(sp_dit_forward_causal, model)


def test_sequence_parallel_on_one_device_is_patched_and_restored():
    model = make_model()
    wanted = generate(model, 9)
    put_in_sequence_parallel(model)
    patched = [model.forward, *(block.self_attn.forward for block in model.blocks)]
    with enable(model) as handle:
        assert relative_error(generate(model, 9), wanted) < 1e-5
        assert handle.stats()["chunks"] == 3
    assert patched == [model.forward, *(block.self_attn.forward for block in model.blocks)]


def test_sequence_parallel_on_more_devices_is_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model = make_model()
    with enable(model):  # a process with a model of its own
        pass
    put_in_sequence_parallel(model)
    with pytest.raises(RuntimeError, match="sequence parallel is supported on 1 device, got 2"):
        enable(model)
