"""The parts that Wan's denoisers share, against the plain sums that they stand for."""

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from torch import nn

from worldkv_kernels.models import wan


def test_patchify_takes_channels_then_rows_then_columns():
    latents = torch.randn(2, 3, 4, 6)
    tokens = wan.patchify(latents)
    assert tokens.shape == (2 * 2 * 3, 3 * 2 * 2)
    for token, numbers in enumerate(tokens):
        frame, row, column = token // 6, token % 6 // 3, token % 3
        want = [
            latents[frame, channel, 2 * row + i, 2 * column + j]
            for channel in range(3)
            for i in range(2)
            for j in range(2)
        ]
        assert numbers.tolist() == torch.stack(want).tolist()


def test_unpatchify_takes_rows_then_columns_then_channels():
    tokens = torch.arange(2.0 * 2 * 3 * 20).view(12, 20)
    latents = wan.unpatchify(tokens, (2, 3))
    assert latents.shape == (2, 5, 4, 6)
    for frame in range(2):
        for channel in range(5):
            for y in range(4):
                for x in range(6):
                    token = frame * 6 + y // 2 * 3 + x // 2
                    want = tokens[token, (y % 2 * 2 + x % 2) * 5 + channel]
                    assert latents[frame, channel, y, x] == want


def test_embedding_patches_is_the_convolution():
    convolution = nn.Conv3d(5, 8, wan.PATCH, wan.PATCH)
    latents = torch.randn(3, 5, 4, 6)
    want = convolution(latents.transpose(0, 1)).flatten(1).T
    got = wan.embed_patches(convolution, torch.cat([wan.patchify(latents[:, :2]), wan.patchify(latents[:, 2:])], dim=1))
    assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_rounds_before_the_weight(dtype):
    torch.manual_seed(0)
    norm = wan.RMSNorm(256, 1e-6).to(dtype)
    x = torch.randn(64, 256).to(dtype)
    norm.weight.data.uniform_(0.5, 1.5)
    want = (x.float() * (x.float().square().mean(1, keepdim=True) + 1e-6).rsqrt()).to(dtype) * norm.weight
    assert torch.equal(norm(x), want)
    once = (x.float() * (x.float().square().mean(1, keepdim=True) + 1e-6).rsqrt() * norm.weight.float()).to(dtype)
    assert not torch.equal(norm(x), once)  # so the test above tells the two apart


def test_a_block_against_its_equations():
    torch.manual_seed(0)
    block = wan.TextBlock(128, 96, 2, 1e-6).requires_grad_(False)
    wan.draw_parameters(block, 3, {})
    x, projected, context = torch.randn(5, 128), torch.randn(6, 128), torch.randn(7, 128)
    e = block.modulation[0] + projected
    got = block.modulated_by(projected)
    assert torch.equal(got, torch.stack([e[0], 1 + e[1], e[2], e[3], 1 + e[4], e[5]]))

    def norm(x):
        return (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    class Echo:
        """A memory in which a token attends to itself alone."""

        def attend(self, layer, q, k, v, q_weight, k_weight):
            assert layer == 4
            assert q_weight is block.self_attn.norm_q.weight and k_weight is block.self_attn.norm_k.weight
            self.q, self.k = q, k
            return v.view(5, 2, 64)

    memory = Echo()
    y = norm(x) * (1 + e[1]) + e[0]
    want = x + block.self_attn.o(block.self_attn.v(y)) * e[2]
    assert relative_error(block.attend(x, got, memory, 4), want) < 1e-5
    assert relative_error(memory.q, block.self_attn.q(y)) < 1e-5
    assert relative_error(memory.k, block.self_attn.k(y)) < 1e-5

    attention = block.cross_attn
    q = attention.norm_q(attention.q(norm(x) * block.norm3.weight + block.norm3.bias))
    k, v = attention.norm_k(attention.k(context)), attention.v(context)
    heads = [
        torch.softmax(q[:, part] @ k[:, part].T / 8, dim=1) @ v[:, part] for part in (slice(0, 64), slice(64, 128))
    ]
    want = x + attention.o(torch.cat(heads, dim=1))
    assert relative_error(block.cross_attend(x, *attention.keys_values(context)), want) < 1e-5

    hidden = F.gelu(block.ffn[0](norm(x) * (1 + e[4]) + e[3]), approximate="tanh")
    assert relative_error(block.feed_forward(x, got), x + block.ffn[2](hidden) * e[5]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cameras_part_of_a_block_against_its_equations(dtype):
    """Scale and shift are in the model's dtype; the stream is not, and 1 + scale would round in it."""
    torch.manual_seed(0)
    block = wan.CameraBlock(128, 96, 2, 1e-6).requires_grad_(False).to(dtype)
    wan.draw_parameters(block, 3, {"cam_scale_layer": 1e-3})
    camera, x, out = torch.randn(5, 128).to(dtype), torch.randn(5, 128), torch.empty(2, 5, 128).to(dtype)
    w = {name: weight.double() for name, weight in block.state_dict().items()}

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    hidden = linear("cam_injector_layer2", F.silu(linear("cam_injector_layer1", camera.double()))) + camera.double()
    block.camera_scale_shift(camera, out=out)
    for got, name in zip(out, ("cam_scale_layer", "cam_shift_layer"), strict=True):
        assert relative_error(got.double(), linear(name, hidden)) < (1e-5 if dtype == torch.float32 else 1e-2)
    want = (1 + out[0].double()) * x.double() + out[1].double()
    assert relative_error(wan.moved(x, *out).double(), want) < 1e-6


def test_the_head_against_its_equation():
    torch.manual_seed(0)
    head = wan.Head(64, 3, 1e-6).requires_grad_(False)
    wan.draw_parameters(head, 0, {})
    x, time = torch.randn(5, 64), torch.randn(64)
    shift, scale = head.modulation[0] + time
    normed = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    assert relative_error(head(x, head.modulated_by(time)), head.head(normed * (1 + scale) + shift)) < 1e-5


def test_sinusoids():
    got = wan.sinusoids(torch.tensor([0, 979.0]), 8)
    angles = torch.tensor([979.0, 97.9, 9.79, 0.979], dtype=torch.float64)
    want = torch.stack([torch.tensor([1.0] * 4 + [0.0] * 4).double(), torch.cat([angles.cos(), angles.sin()])])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=0)


def test_parameters_are_allocated_in_their_dtypes_and_drawn_where_they_lie():
    with torch.device("meta"):
        block = wan.TextBlock(128, 96, 2, 1e-6)
    wan.allocate(block, device="cpu", dtype=torch.bfloat16)
    wide = {name for name, parameter in block.named_parameters() if parameter.dtype == torch.float32}
    assert wide == {"modulation", "norm3.weight", "norm3.bias"}
    assert not any(parameter.requires_grad for parameter in block.parameters())
    before = {name: parameter.data_ptr() for name, parameter in block.named_parameters()}
    wan.draw_parameters(block, 1, {"ffn.2": 0.25})
    assert before == {name: parameter.data_ptr() for name, parameter in block.named_parameters()}
    state = block.state_dict()
    assert 0.95 < state["ffn.0.weight"].float().std() * 128**0.5 < 1.05
    assert 0.95 < state["ffn.2.weight"].float().std() * 96**0.5 / 0.25 < 1.05
    for name in ("weight", "bias"):
        assert torch.equal(state[f"self_attn.q.{name}"], state[f"self_attn.k.{name}"])
        assert not torch.equal(state[f"cross_attn.q.{name}"], state[f"cross_attn.k.{name}"])
    first = {name: tensor.clone() for name, tensor in state.items()}
    wan.draw_parameters(block, 2, {"ffn.2": 0.25})
    assert not any(torch.equal(first[name], tensor) for name, tensor in block.state_dict().items())
    wan.draw_parameters(block, 1, {"ffn.2": 0.25})
    assert all(torch.equal(first[name], tensor) for name, tensor in block.state_dict().items())
