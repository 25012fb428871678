"""Passes in fewer kernels and in FP8: what they compute beside the passes as they are."""

import shutil

import numpy as np
import pytest
import torch
from conftest import DEVICE, relative_error

from worldkv_kernels import WorldMemory
from worldkv_kernels.actions import Actions
from worldkv_kernels.models import wan
from worldkv_kernels.models.fp8 import Fp8Linear, Rounded, quantized, to_fp8
from worldkv_kernels.models.lingbot_config import LingBotConfig
from worldkv_kernels.models.lingbot_world_fast import LingBotWorldFast
from worldkv_kernels.models.matrix_game_2 import MatrixGame2
from worldkv_kernels.models.matrix_game_config import MatrixGameConfig
from worldkv_kernels.models.rollout import rollout
from worldkv_kernels.trajectory import latent_poses, load

POSES, INTRINSICS = (rows[:9] for rows in latent_poses(load("right*20,left*20")))
SIZES = dict(num_layers=2, num_heads=2, head_dim=64, grid=(2, 3), ffn_dim=160, text_tokens=7, text_dim=24)


def make(dtype=torch.bfloat16):
    return LingBotWorldFast.random(LingBotConfig(**SIZES), device=DEVICE, dtype=dtype)


def latents_of(model):
    memory = WorldMemory(model.config.memory(retrieved_chunks=1, bank_chunks=3), device=DEVICE, dtype=model.dtype)
    return torch.cat([chunk.latents.cpu() for chunk in rollout(model, memory, POSES, INTRINSICS, graph=False)])


def test_rows_are_rounded_to_a_scale_of_their_own():
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-6], [1.0], [1e4], [0], [1]])
    x[4] = torch.tensor([7.0, -3.5] * 32)
    rounded, scale = quantized(x.to(DEVICE))
    assert rounded.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == (5, 1)
    back = rounded.double().cpu() * scale.double().cpu()
    assert torch.equal(scale[3].cpu(), torch.ones(1)) and not back[3].any()
    near = back[:3] - x[:3].double()
    largest = x[:3].abs().amax(1, keepdim=True)
    # Three bits after the first: half a step is a sixteenth; below 2^-6 of the format, steps are all alike.
    assert (near.abs() <= torch.maximum(x[:3].abs() / 16, largest / 448 * 2**-10) * 1.001).all()
    assert (back[4] - x[4].double()).abs().max() < 1e-6  # powers of two apart: nothing is rounded
    tiny = torch.tensor([[1e-45, 0.0], [1e-38, -1e-38], [3e-30, 1e-31]], device=DEVICE)
    rounded, scale = quantized(tiny)
    assert rounded.float().isfinite().all() and scale[:2].tolist() == [[1.0], [1.0]] and scale[2] < 1e-32


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_the_product_of_what_was_rounded(bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 64, bias=bias).to(DEVICE, torch.bfloat16).requires_grad_(False)
    near = Fp8Linear(linear, quantized)
    x = torch.randn(37, 96).to(DEVICE, torch.bfloat16)
    rounded, scale = quantized(x)
    want = (rounded.double() * scale) @ (near.weight.double() * near.scale.T.double()).T
    want = want + linear.bias.double() if bias else want
    got = near(x)
    assert got.dtype == torch.bfloat16 and relative_error(got, want) < 5e-3
    assert 1e-3 < relative_error(got, linear(x)) < 6e-2
    assert near.weight.numel() * near.weight.element_size() == linear.weight.numel()


def test_a_rollout_in_fp8_is_near_the_rollout():
    model = make()
    want = latents_of(model)
    linear = [x for x in model.blocks.state_dict().values() if x.dim() == 2]
    model.to_fp8()
    left = [name for name, module in model.blocks.named_modules() if type(module) is torch.nn.Linear]
    assert left == []
    held = sum(x.numel() for name, x in model.blocks.state_dict().items() if x.dtype == torch.float8_e4m3fn)
    assert held == sum(x.numel() for x in linear)
    got = latents_of(model)
    assert 1e-3 < relative_error(got, want) < 0.1
    with pytest.raises(ValueError, match="to_fp8: linear layers must be bfloat16 to be made FP8, got none that is"):
        model.to_fp8()
    with pytest.raises(ValueError, match=r"LingBotWorldFast.to_fp8: dtype must be torch.bfloat16, got torch.float32"):
        make(torch.float32).to_fp8()


def test_what_several_layers_take_is_rounded_once_and_where_it_is_made(monkeypatch):
    """Of self-attention's q, k and v, to the bits of what each of them would round."""
    model = make()
    model.to_fp8()
    rounded = []
    for block in model.blocks:
        for layer in block.after_elementwise():
            layer.register_forward_pre_hook(lambda layer, given: rounded.append(given[0]))
            monkeypatch.setattr(layer, "_quantize", None)
    want = latents_of(model)
    assert rounded and all(isinstance(x, Rounded) for x in rounded)
    of_attention = [x.values.data_ptr() for x in rounded[:3]]
    assert len(set(of_attention)) == 1
    if DEVICE.type == "cpu":  # compiled, the norm in between is not rounded to bf16
        monkeypatch.undo()
        for block in model.blocks:
            block.in_fp8 = False
        assert torch.equal(latents_of(model), want)


def test_layers_whose_sides_the_product_does_not_take_stay():
    layers = torch.nn.Sequential(torch.nn.Linear(24, 64), torch.nn.Linear(64, 32)).bfloat16()
    assert to_fp8("here", layers, quantized) == 1
    assert isinstance(layers[1], Fp8Linear) and type(layers[0]) is torch.nn.Linear


def test_action_modules_stay_as_they_are():
    config = MatrixGameConfig(
        num_layers=2,
        num_heads=2,
        head_dim=64,
        grid=(2, 3),
        ffn_dim=160,
        image_tokens=5,
        image_dim=32,
        action_layers=(0,),
    )
    model = MatrixGame2.random(config, device=DEVICE, dtype=torch.bfloat16)
    actions = Actions(np.full((33, 2), 0.1), np.zeros((33, 4)))

    def latents():
        memory = WorldMemory(model.config.memory(mode="sliding"), device=DEVICE, dtype=model.dtype)
        made = rollout(model, memory, POSES, INTRINSICS, actions=actions, graph=False)
        return torch.cat([chunk.latents.cpu() for chunk in made])

    want = latents()
    model.to_fp8()
    kinds = {name: type(m) for name, m in model.blocks[0].named_modules() if isinstance(m, torch.nn.Linear | Fp8Linear)}
    assert {name for name, kind in kinds.items() if kind is torch.nn.Linear} == {
        name for name in kinds if name.startswith("action_model.")
    }  # fmt: skip
    assert Fp8Linear in kinds.values() and 1e-3 < relative_error(latents(), want) < 0.1


@pytest.mark.skipif(not shutil.which("g++") and DEVICE.type == "cpu", reason="torch.compile needs a compiler on a CPU")
@pytest.mark.slow
def test_compiled_passes_are_within_the_rounding_of_eager_ones():
    exact = make(torch.float32)
    near = make()
    near.load_state_dict(exact.state_dict())
    wanted = latents_of(exact)
    eager = relative_error(latents_of(near), wanted)
    near.compile_elementwise()
    assert all(block.elementwise is wan.elementwise(True, False) for block in near.blocks)
    assert relative_error(latents_of(near), wanted) < 1.2 * eager
    exact.compile_elementwise()
    assert relative_error(latents_of(exact), wanted) < 1e-5
    near.to_fp8()
    assert all(block.elementwise is wan.elementwise(True, True) for block in near.blocks)
    assert relative_error(latents_of(near), wanted) < 0.1
    for width in range(16, 16 * 12, 16):  # more shapes than torch's own limit
        wan.elementwise(True, False).gelu(torch.randn(3, width, device=DEVICE))
