"""quantize_chunk and dequantize_chunk against the format in float64, bit for bit, on every backend this machine has."""

import importlib
import math
import re

import numpy as np
import pytest
import torch
from conftest import DEVICE, backends
from hypothesis import given, settings
from hypothesis import strategies as st
from launches import Counted
from plain_quantize import GRIDS, plain_quantize

from worldkv_kernels import dequantize_chunk, quantize_chunk
from worldkv_kernels.ops.quantize_chunk import BACKENDS, BITS, DEQUANTIZE, packed_bytes

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # of numpy, in the interpreter
ops = importlib.import_module("worldkv_kernels.ops.quantize_chunk")

BACKEND_NAMES = backends(BACKENDS)
DTYPES = list(GRIDS)
WORD = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
by_backend = pytest.mark.parametrize("backend", BACKEND_NAMES)
by_bits = pytest.mark.parametrize("bits", BITS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def random_chunk(*shape, dtype=torch.bfloat16, seed=0):
    """K and V [..., tokens, heads, head_dim] of tokens and channels that differ in size, with a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, *shape, generator=generator)
    x *= torch.randn(2, *shape[:-1], 1, generator=generator).exp()
    x *= torch.randn(shape[-1], generator=generator).exp()
    x[..., 5] *= 20
    return x.to(DEVICE, dtype)


def assert_same_bits(got, want, dtype):
    """`want` in float64; a NaN of any kind is a NaN."""
    want = torch.from_numpy(np.array(want)).to(dtype)
    got = got.cpu()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0).view(WORD[dtype]), want.nan_to_num(0).view(WORD[dtype]))


def assert_packed_and_restored(k, v, packed, restored, bits, group_tokens=64):
    """K and V [layers, ...] of each layer are what the format says, in bytes and in numbers."""
    for which, (x, got) in enumerate(zip((k, v), restored, strict=True)):
        for layer in range(len(x)):
            want_bytes, _, want = plain_quantize(x[layer], bits, group_tokens)
            assert torch.equal(packed[layer, which].cpu(), want_bytes)
            assert_same_bits(got[layer], want, x.dtype)


def round_trip(k, v, bits, backend):
    packed = quantize_chunk(k, v, bits=bits, backend=backend)
    sizes = dict(zip(("tokens", "heads", "head_dim"), k.shape[-3:], strict=True))
    return packed, dequantize_chunk(packed, bits=bits, **sizes, dtype=k.dtype, backend=backend)


def direct_round_trip(k, v, bits, backend):
    """Of the implementation itself, without the op's checks."""
    packed = torch.full((len(k), 2, packed_bytes(*k.shape[1:], bits, k.dtype)), 171, dtype=torch.uint8, device=DEVICE)
    restored = torch.empty_like(k), torch.empty_like(v)
    BACKENDS.run(backend)(k, v, packed, bits=bits, group_tokens=64)
    DEQUANTIZE.run(backend)(packed, *restored, bits=bits, group_tokens=64)
    return packed, restored


# --- the format ---


@by_backend
@by_bits
@by_dtype
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "layers"),
    [(1, 1, 64, 1), (31, 2, 64, 1), (63, 3, 64, 2), (64, 1, 128, 3), (65, 3, 128, 1), (130, 1, 64, 1), (2, 40, 64, 1)],
)
def test_the_bytes_and_the_numbers_are_those_of_the_format(backend, bits, dtype, tokens, heads, head_dim, layers):
    k, v = random_chunk(layers, tokens, heads, head_dim, dtype=dtype)
    packed, restored = round_trip(k, v, bits, backend)
    assert packed.dtype == torch.uint8 and packed.shape == (layers, 2, packed_bytes(*k.shape[1:], bits, dtype))
    assert_packed_and_restored(k, v, packed, restored, bits)


@pytest.mark.slow
@by_backend
@by_bits
@by_dtype
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [1, 3, 40])
def test_every_size(backend, bits, dtype, heads, head_dim):
    for tokens in (1, 31, 63, 64, 65, 130):
        k, v = random_chunk(2, tokens, heads, head_dim, dtype=dtype, seed=tokens)
        assert_packed_and_restored(k, v, *round_trip(k, v, bits, backend), bits)


@by_backend
@by_dtype
@pytest.mark.parametrize("group_tokens", [32, 128])
def test_groups_of_another_size(monkeypatch, backend, dtype, group_tokens):
    monkeypatch.setattr(ops, "GROUP_TOKENS", group_tokens)
    k, v = random_chunk(1, 71, 1, 64, dtype=dtype)
    assert_packed_and_restored(k, v, *round_trip(k, v, 4, backend), 4, group_tokens)


@by_backend
@by_bits
def test_one_layer_without_a_dimension_of_layers(backend, bits):
    k, v = random_chunk(2, 70, 1, 64)
    packed, restored = round_trip(k, v, bits, backend)
    alone, restored_alone = round_trip(k[1], v[1], bits, backend)
    assert torch.equal(alone, packed[1])
    assert all(torch.equal(a, b[1]) for a, b in zip(restored_alone, restored, strict=True))


def test_how_many_bytes():
    # 3 tokens of 1 x 64: codes, and 3 scales of 2 or 4 bytes up to 16; or codes, and a scale and a minimum a channel.
    assert packed_bytes(3, 1, 64, 8, torch.bfloat16) == 192 + 16
    assert packed_bytes(5, 1, 64, 8, torch.float32) == 320 + 32
    assert packed_bytes(3, 1, 64, 4, torch.float16) == 96 + 2 * 128
    assert packed_bytes(65, 2, 128, 4, torch.float32) == 65 * 128 + 2 * 2 * 256 * 4
    chunk = 2340 * 40 * 128 * 2
    assert packed_bytes(2340, 40, 128, 8, torch.bfloat16) / chunk == pytest.approx(0.5 + 1 / 128)
    assert packed_bytes(2340, 40, 128, 4, torch.bfloat16) / chunk == pytest.approx(0.25 + 2 * 37 / 2340)


# --- numbers at the ends of their range ---


def special_chunk(dtype):
    """[1, 70, 2, 64] of each kind: constants, zeros of both signs, subnormals, the largest, one outlier."""
    grid = GRIDS[dtype]
    smallest, largest = 2.0 ** (grid.least - grid.digits + 1), grid.largest
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 70, 2, 64, generator=generator, dtype=torch.float64)
    signs = torch.where(torch.rand(70, generator=generator) < 0.5, -1.0, 1.0).double()
    x[0, 3] = 0.0
    x[0, 4] = -0.0
    x[0, :, :, 7] = 0.0 * signs[:, None]
    x[0, :, :, 8] = -0.0
    x[0, :, :, 9] = 3.25
    x[0, 10:14] = smallest * torch.randint(-9, 10, (4, 2, 64), generator=generator)
    x[0, 14] = smallest
    x[0, :, 1, 20:30] = smallest * torch.randint(-300, 300, (70, 10), generator=generator)
    x[0, 20:24] = largest
    x[0, 24] = -largest
    x[0, 24:, 0, 40] = largest * torch.rand(46, generator=generator)
    x[0, 40, 1, 50] = 30000.0
    x[0, 20:25, 0] = largest / 2  # together with others of either sign
    x[0, 20:25, 1] = torch.where(x[0, 20:25, 1] < 0, 0.0, x[0, 20:25, 1])
    x = torch.from_numpy(np.clip(GRIDS[dtype].nearest(x.numpy()), -largest, largest)).to(dtype)
    return x.to(DEVICE), x.flip(1).to(DEVICE)


def assert_near(x, restored, scale):
    """Within half a step, and the rounding of the result; twice the smallest fp32 steps where s itself is rounded."""
    grid = GRIDS[x.dtype]
    got, x = (y.double().cpu().numpy() for y in (restored, x))
    assert np.isfinite(got).all()
    limit = scale / 2 * (1 + 2.0**-16) + (2.0**-grid.digits + 2.0**-24) * np.abs(got) + 2.0**-141
    assert (np.abs(got - x) <= limit).all()


@by_backend
@by_bits
@by_dtype
def test_numbers_at_the_ends_of_their_range(backend, bits, dtype):
    k, v = special_chunk(dtype)
    packed, restored = round_trip(k, v, bits, backend)
    assert_packed_and_restored(k, v, packed, restored, bits)
    for x, got in zip((k, v), restored, strict=True):
        assert_near(x[0], got[0], plain_quantize(x[0], bits)[1])


@by_backend
@by_bits
@by_dtype
def test_zeros_and_channels_of_one_number_come_back_as_they_are(backend, bits, dtype):
    """Zeros of either sign as +0, so that it does not matter which of them a minimum finds."""
    k, v = random_chunk(1, 70, 2, 64, dtype=dtype)
    k[0, 5], k[0, 6] = 0.0, -0.0
    k[0, ::2, :, 9], k[0, 1::2, :, 9] = 0.0, -0.0
    v[0, :, :, 3] = torch.linspace(-3, 3, 2, device=DEVICE).to(dtype)
    v[0, :, :, 5] = GRIDS[dtype].largest
    _, (got_k, got_v) = round_trip(k, v, bits, backend)
    if bits == 8:
        assert not got_k[0, 5:7].view(WORD[dtype]).any()
        return
    assert not got_k[0, :, :, 9].view(WORD[dtype]).any()
    assert torch.equal(got_v[..., 3], v[..., 3]) and torch.equal(got_v[..., 5], v[..., 5])


@by_backend
@by_bits
@by_dtype
def test_the_largest_number_comes_back_finite(backend, bits, dtype):
    """A scale rounded up would have the largest code restored as infinity."""
    largest = GRIDS[dtype].largest
    k = torch.zeros(1, 64, 1, 64, dtype=dtype, device=DEVICE)
    k[0, ::2] = largest
    v = -k if bits == 8 else k.clone()
    v[0, 1::2] = largest / 3
    _, restored = round_trip(k, v, bits, backend)
    for x, got in zip((k, v), restored, strict=True):
        assert got.isfinite().all()
        assert_near(x[0], got[0], plain_quantize(x[0], bits)[1])


@by_backend
@by_bits
@by_dtype
def test_no_number_is_off_by_more_than_half_a_step(backend, bits, dtype):
    k, v = random_chunk(1, 130, 2, 64, dtype=dtype, seed=3)
    _, restored = round_trip(k, v, bits, backend)
    for x, got in zip((k, v), restored, strict=True):
        assert_near(x[0], got[0], plain_quantize(x[0], bits)[1])


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_random_bits_are_packed_as_the_format_says(data):
    """Numbers of any exponent, whole or a few of them in a range; Triton's too, where there is Triton."""
    dtype, bits = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(BITS))
    backend = data.draw(st.sampled_from(BACKEND_NAMES))
    tokens = data.draw(st.sampled_from([1, 2, 5, 66]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    grid = GRIDS[dtype]
    low = data.draw(st.integers(grid.least - grid.digits, grid.most - 1))
    high = data.draw(st.integers(low, grid.most - 1))
    shape = (2, 1, tokens, 1, 64)
    exponent = torch.randint(low, high + 1, shape, generator=generator).double()
    x = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * 2 * torch.exp2(exponent)
    k, v = torch.from_numpy(GRIDS[dtype].nearest(x.numpy())).to(dtype).to(DEVICE)
    packed, restored = direct_round_trip(k, v, bits, backend)
    assert_packed_and_restored(k, v, packed, restored, bits)


# --- what is not finite ---


@by_backend
@by_bits
@by_dtype
def test_what_is_not_finite_comes_back_as_nan_and_nothing_else_does(backend, bits, dtype):
    k, v = random_chunk(2, 70, 2, 64, dtype=dtype)
    k[1, 66, 1, 9] = math.nan
    v[0, 2, 0, 63] = math.inf
    v[1, 2, 0, 63] = -math.inf
    packed, restored = direct_round_trip(k, v, bits, backend)
    assert_packed_and_restored(k, v, packed, restored, bits)
    lost = [torch.zeros_like(k, dtype=torch.bool) for _ in range(2)]
    if bits == 8:
        lost[0][1, 66, 1] = lost[1][:, 2, 0] = True
    else:
        lost[0][1, 64:, 1, 9] = lost[1][:, :64, 0, 63] = True
    assert all(torch.equal(got.isnan(), want) for got, want in zip(restored, lost, strict=True))


@by_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_channels_too_far_apart_come_back_as_nan(backend, dtype):
    k, v = random_chunk(1, 70, 1, 64, dtype=dtype)
    k[0, 3, 0, 5], k[0, 9, 0, 5] = 3e38, -3e38
    packed, restored = direct_round_trip(k, v, 4, backend)
    assert_packed_and_restored(k, v, packed, restored, 4)
    assert restored[0][0, :64, 0, 5].isnan().all() and restored[0].isnan().sum() == 64


@pytest.mark.skipif(DEVICE.type != "cpu", reason="looking would synchronise a GPU")
@by_backend
@by_bits
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_on_a_cpu_what_is_not_finite_is_refused_by_name(backend, bits, name, bad):
    chunk = dict(zip("kv", random_chunk(3, 5, 1, 64), strict=True))
    chunk[name][2, 4, 0, 63] = bad
    out = torch.full((3, 2, packed_bytes(5, 1, 64, bits, torch.bfloat16)), 7, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"^quantize_chunk: {name} must be finite, got .* in layer 2$"):
        quantize_chunk(**chunk, bits=bits, out=out, backend=backend)
    assert (out == 7).all()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="looking would synchronise a GPU")
def test_on_a_cpu_channels_too_far_apart_are_refused_by_name():
    k, v = random_chunk(2, 130, 1, 64)
    k[0, 3], k[1, 70] = 3e38, -3e38
    v[0, 3], v[0, 64] = 3e38, -3e38
    quantize_chunk(k, v, bits=4)  # in no group of 64 tokens
    v[0, 3], v[0, 63, 0, 7] = 3e38, -3e38
    quantize_chunk(k, v, bits=8)
    with pytest.raises(ValueError, match=r"^quantize_chunk: v must be of channels with less than 3\.403e\+38 between"):
        quantize_chunk(k, v, bits=4)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a device that is not looked at")
def test_elsewhere_it_is_refused_in_debug_mode_alone(monkeypatch):
    k, v = random_chunk(5, 1, 64)
    v[2, 0, 3] = math.nan
    quantize_chunk(k, v, bits=8)
    monkeypatch.setenv("WORLDKV_DEBUG", "1")
    with pytest.raises(ValueError, match="v must be finite"):
        quantize_chunk(k, v, bits=8)


# --- a second time ---


@by_backend
@by_bits
@by_dtype
def test_what_was_restored_moves_by_less_than_a_step_when_packed_again(backend, bits, dtype):
    """127 s is rounded, and the scale that comes of it may be another. In 8 bits, where it is not, nothing moves."""
    k, v = random_chunk(1, 130, 2, 64, dtype=dtype, seed=5)
    _, (k, v) = round_trip(k, v, bits, backend)
    packed, once = round_trip(k, v, bits, backend)
    for x, got in zip((k, v), once, strict=True):
        assert_near(x[0], got[0], plain_quantize(x[0], bits)[1])
    if bits == 8:
        again, twice = round_trip(*once, bits, backend)
        scales = [p[:, :, 130 * 128 :][:, :, : 260 * dtype.itemsize].contiguous().view(dtype) for p in (packed, again)]
        same = (scales[0] == scales[1]).view(1, 2, 130, 2)
        assert same.any()
        for which in range(2):
            kept = same[:, which]
            assert torch.equal(once[which][kept], twice[which][kept])


# --- where tensors lie ---


def in_pools(x, step=1, gap=0):
    """K and V as every `step`-th row of a pool whose other rows are NaN, with `gap` numbers between layers."""
    _, layers, tokens, heads, head_dim = x.shape
    rows, row = 5 + step * tokens, heads * head_dim
    pool = torch.full((2, layers, rows * row + gap), math.nan, dtype=x.dtype, device=DEVICE)
    pool = pool[..., : rows * row].unflatten(2, (rows, heads, head_dim))
    chunk = pool[:, :, 3 : 3 + step * tokens : step]
    return pool, chunk.copy_(x)


@by_backend
@by_bits
@pytest.mark.parametrize(
    ("dtype", "step", "gap"), [(torch.bfloat16, 1, 0), (torch.float32, 2, 3), (torch.float16, 3, 8)]
)
def test_slices_of_pools_in_and_out_and_nothing_beside_them(backend, bits, dtype, step, gap):
    chunk = random_chunk(2, 66, 2, 64, dtype=dtype)
    _, (k, v) = in_pools(chunk, step, gap)
    want, want_restored = round_trip(*chunk, bits, backend)
    size = want.shape[-1]
    space = torch.full((2, 5, size + 48), 171, dtype=torch.uint8, device=DEVICE)
    out = space[:, 1:5:2, 16 : 16 + size]
    assert quantize_chunk(k, v, bits=bits, out=out, backend=backend) is out
    assert torch.equal(out, want)
    outside = torch.ones_like(space, dtype=torch.bool)
    outside[:, 1:5:2, 16 : 16 + size] = False
    assert (space[outside] == 171).all()

    pool, (out_k, out_v) = in_pools(torch.full_like(chunk, math.nan), step, gap)
    restored = dequantize_chunk(out, bits=bits, out_k=out_k, out_v=out_v, backend=backend)
    assert restored[0] is out_k and restored[1] is out_v
    assert torch.equal(out_k, want_restored[0]) and torch.equal(out_v, want_restored[1])
    assert pool.isnan().sum() == pool.numel() - chunk.numel()


@by_backend
@by_bits
def test_layers_beside_each_other_and_one_seen_as_many(backend, bits):
    k, v = random_chunk(3, 66, 1, 64)
    want, want_restored = round_trip(k, v, bits, backend)
    beside = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v)]
    packed = torch.empty(want.shape[1], 3, want.shape[2], dtype=torch.uint8, device=DEVICE).transpose(0, 1)
    quantize_chunk(*beside, bits=bits, out=packed, backend=backend)
    assert torch.equal(packed, want)
    outs = [torch.full_like(x, math.nan) for x in beside]  # of the same strides
    dequantize_chunk(packed, bits=bits, out_k=outs[0], out_v=outs[1], backend=backend)
    assert all(map(torch.equal, outs, want_restored))
    expanded = quantize_chunk(k[1].expand(3, -1, -1, -1), v[1].expand(3, -1, -1, -1), bits=bits, backend=backend)
    assert torch.equal(expanded, want[1].expand(3, -1, -1))
    given = dict(tokens=66, heads=1, head_dim=64, dtype=k.dtype, backend=backend)
    restored, _ = dequantize_chunk(want[1].expand(3, -1, -1), bits=bits, **given)
    assert torch.equal(restored, want_restored[0][1].expand(3, -1, -1, -1))


@by_backend
@by_bits
def test_one_output_is_enough_for_the_sizes(backend, bits):
    k, v = random_chunk(9, 2, 64, dtype=torch.float16)
    packed, want = round_trip(k, v, bits, backend)
    for name in ("out_k", "out_v"):
        out = torch.empty_like(k)
        got = dequantize_chunk(packed, bits=bits, **{name: out}, tokens=9, dtype=torch.float16, backend=backend)
        assert got[name == "out_v"] is out
        assert all(map(torch.equal, got, want))


@pytest.mark.skipif("triton" not in BACKEND_NAMES, reason="triton is not installed")
@by_bits
def test_one_launch_for_all_layers(monkeypatch, bits):
    kernels = importlib.import_module("worldkv_kernels.kernels.quantize_chunk")
    launches = []
    for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
        monkeypatch.setattr(kernels, name, Counted(getattr(kernels, name), launches))
    round_trip(*random_chunk(3, 5, 1, 64), bits, "triton")
    assert [grid[1:] for grid in launches] == [(3, 2), (3, 2)]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@by_bits
def test_all_layers_of_a_model_are_those_of_the_reference(bits):
    k, v = torch.randn(2, 30, 1320, 12, 128, device=DEVICE).bfloat16()
    packed, restored = round_trip(k, v, bits, "triton")
    want, want_restored = round_trip(k, v, bits, "reference")
    assert torch.equal(packed, want) and all(map(torch.equal, restored, want_restored))
    for _ in range(20):
        assert torch.equal(quantize_chunk(k, v, bits=bits, backend="triton"), packed)


# --- errors, and what torch makes of the ops ---


def zeros(*shape, dtype=torch.bfloat16):
    return torch.zeros(*shape, dtype=dtype, device=DEVICE)


def room(*shape):
    return zeros(*shape, dtype=torch.uint8)


SIZE = packed_bytes(5, 2, 64, 8, torch.bfloat16)
ITSELF = "must not overlap itself"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k": 3}, TypeError, "k must be a tensor [tokens, heads, head_dim], got 3"),
        ({"k": zeros(2, 64)}, ValueError, "k must be [tokens, heads, head_dim] or [layers, tokens, heads, head_dim]"),
        ({"k": zeros(3, 5, 2, 96)}, ValueError, "k must be [layers, tokens, heads, head_dim], heads not first, with 1"),
        ({"k": zeros(3, 5, 129, 64)}, ValueError, "k must be [layers, tokens, heads, head_dim], heads not first, with"),
        ({"k": zeros(3, 0, 2, 64)}, ValueError, "k must be [layers, tokens, heads, head_dim] of 1 to 65535 layers and"),
        ({"k": zeros(0, 5, 2, 64)}, ValueError, "k must be [layers, tokens, heads, head_dim] of 1 to 65535 layers and"),
        ({"k": zeros(1, 5, 2, 64).expand(65536, -1, -1, -1)}, ValueError,
         "k must be [layers, tokens, heads, head_dim] of 1 to 65535 layers and"),
        ({"k": zeros(3, 5, 64, 2).mT}, ValueError, "k must be contiguous in its last 2 dimension(s)"),
        ({"k": zeros(3, 5, 2, 64, dtype=torch.float64)}, TypeError, "k must be torch.bfloat16 or torch.float16 or"),
        ({"v": None}, TypeError, "v must be a tensor [3, 5, 2, 64], got None"),
        ({"v": zeros(3, 6, 2, 64)}, ValueError, "v must be [3, 5, 2, 64], got [3, 6, 2, 64]"),
        ({"v": zeros(5, 2, 64)}, ValueError, "v must be [3, 5, 2, 64], got [5, 2, 64]"),
        ({"v": zeros(3, 5, 2, 64).half()}, TypeError, "v must be torch.bfloat16, got"),
        ({"v": zeros(3, 5, 64, 2).mT}, ValueError, "v must be contiguous in its last 2 dimension(s)"),
        ({"v": zeros(3, 5, 2, 64).to("meta")}, ValueError, f"v must be on {DEVICE}, got"),
        ({"k": zeros(3, 5, 2, 64).requires_grad_()}, ValueError, "k must be without requires_grad"),
        ({"v": zeros(3, 5, 2, 64).requires_grad_()}, ValueError, "v must be without requires_grad"),
        ({"bits": 2}, ValueError, "bits must be 8 or 4, got 2"),
        ({"bits": 8.0}, TypeError, "bits must be an integer, got 8.0"),
        ({"bits": True}, TypeError, "bits must be an integer, got True"),
        ({"out": 7}, TypeError, f"out must be a tensor [3, 2, {SIZE}], got 7"),
        ({"out": room(3, 2, SIZE + 16)}, ValueError, f"out must be [3, 2, {SIZE}], got"),
        ({"out": room(2, SIZE)}, ValueError, f"out must be [3, 2, {SIZE}], got"),
        ({"out": zeros(3, 2, SIZE, dtype=torch.int8)}, TypeError, "out must be torch.uint8, got"),
        ({"out": room(3, 2, 2 * SIZE)[..., ::2]}, ValueError, "out must be contiguous in its last 1 dimension"),
        ({"out": room(3, 2, SIZE + 8)[..., :-8]}, ValueError,
         "out must be with K and V of every layer on multiples of 16 bytes, got"),
        ({"out": room(3, 2, SIZE + 16)[..., 8:-8]}, ValueError,
         "out must be with K and V of every layer on multiples of 16 bytes, got"),
        ({"out": room(3, 1, SIZE).expand(-1, 2, -1)}, ValueError, f"out {ITSELF}"),
        ({"out": room(1, 2, SIZE).expand(3, -1, -1)}, ValueError, f"out {ITSELF}"),
        ({"backend": "cuda"}, ValueError, "backend must be None or one of 'triton', 'reference', got 'cuda'"),
        ({"backend": 4}, TypeError, "backend must be None or a name, got 4"),
    ],
)  # fmt: skip
def test_quantize_refuses(changes, error, message):
    arguments = {"k": zeros(3, 5, 2, 64), "v": zeros(3, 5, 2, 64), "bits": 8, **changes}
    with pytest.raises(error, match=f"^quantize_chunk: {re.escape(message)}"):
        quantize_chunk(**arguments)


OUT = {"out_k": zeros(3, 5, 2, 64)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"packed": [1]}, TypeError, "packed must be a tensor [2, bytes] or [layers, 2, bytes], got [1]"),
        ({"packed": room(SIZE)}, ValueError, "packed must be [2, bytes] or [layers, 2, bytes], got"),
        ({"packed": room(3, 2, SIZE + 16)}, ValueError, f"packed must be [3, 2, {SIZE}], got"),
        ({"packed": room(3, 1, SIZE)}, ValueError, f"packed must be [3, 2, {SIZE}], got"),
        ({"packed": zeros(3, 2, SIZE)}, TypeError, "packed must be torch.uint8, got"),
        ({"packed": room(3, 2, 2 * SIZE)[..., ::2]}, ValueError, "packed must be contiguous in its last 1"),
        ({"packed": room(3, 2, SIZE + 8)[..., :-8]}, ValueError, "packed must be with K and V of every layer on"),
        ({"packed": room(3, 2, SIZE).to("meta"), **OUT}, ValueError, "out_k must be on meta, got"),
        ({"bits": 3}, ValueError, "bits must be 8 or 4, got 3"),
        ({"bits": 4}, ValueError, "packed must be [3, 2, "),
        ({"tokens": None}, TypeError, "tokens must be given, without out_k and out_v, got None"),
        ({"heads": None}, TypeError, "heads must be given, without out_k and out_v, got None"),
        ({"head_dim": None}, TypeError, "head_dim must be given, without out_k and out_v, got None"),
        ({"dtype": None}, TypeError, "dtype must be given, without out_k and out_v, got None"),
        ({"tokens": 0}, ValueError, "tokens must be at least 1, got 0"),
        ({"tokens": 5.0}, TypeError, "tokens must be an integer, got 5.0"),
        ({"heads": 129}, ValueError, "heads must be from 1 to 128, got 129"),
        ({"head_dim": 96}, ValueError, "head_dim must be 64 or 128, got 96"),
        ({"dtype": torch.float64}, TypeError, "dtype must be torch.bfloat16 or torch.float16 or torch.float32, got"),
        ({"dtype": "bfloat16"}, TypeError, "dtype must be torch.bfloat16 or torch.float16 or torch.float32, got"),
        ({"out_k": 1}, TypeError, "out_k must be a tensor [3, "),
        ({"out_k": zeros(5, 2, 64)}, ValueError, "out_k must be [3, "),
        ({**OUT, "tokens": 4}, ValueError, "tokens must be 5, as in out_k, or None, got 4"),
        ({**OUT, "dtype": torch.float16}, ValueError, "dtype must be torch.bfloat16, as in out_k, or None, got"),
        ({**OUT, "out_v": zeros(3, 5, 1, 64)}, ValueError, "out_v must be [3, 5, 2, 64] of torch.bfloat16, as out_k,"),
        ({"tokens": 2**62}, ValueError, "packed must be [3, 2, "),
        ({**OUT, "out_v": zeros(3, 5, 64, 2).mT}, ValueError, "out_v must be contiguous in its last 2 dimension(s)"),
        ({**OUT, "out_v": OUT["out_k"]}, ValueError, "out_k must not overlap out_v, got"),
        ({"out_v": zeros(3, 1, 2, 64).expand(-1, 5, -1, -1)}, ValueError, f"out_v {ITSELF}"),
        ({"backend": "sdpa"}, ValueError, "backend must be None or one of 'triton', 'reference', got 'sdpa'"),
        ({"backend": 4}, TypeError, "backend must be None or a name, got 4"),
    ],
)  # fmt: skip
def test_dequantize_refuses(changes, error, message):
    sizes = dict(tokens=5, heads=2, head_dim=64, dtype=torch.bfloat16)
    arguments = {"packed": room(3, 2, SIZE), "bits": 8, **sizes, **changes}
    with pytest.raises(error, match=f"^dequantize_chunk: {re.escape(message)}"):
        dequantize_chunk(**arguments)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((0, 2, 64, 8, torch.bfloat16), ValueError, "tokens must be at least 1, got 0"),
        ((5, 0, 64, 8, torch.bfloat16), ValueError, "heads must be from 1 to 128, got 0"),
        ((5, 2, 32, 8, torch.bfloat16), ValueError, "head_dim must be 64 or 128, got 32"),
        ((5, 2, 64, 16, torch.bfloat16), ValueError, "bits must be 8 or 4, got 16"),
        ((5, 2, 64, 8, torch.int8), TypeError, "dtype must be torch.bfloat16 or"),
    ],
)
def test_sizes_that_nothing_is_packed_of(sizes, error, message):
    with pytest.raises(error, match=f"^packed_bytes: {re.escape(message)}"):
        packed_bytes(*sizes)


def test_overlaps_are_refused_and_neighbours_are_not():
    size = packed_bytes(5, 2, 64, 8, torch.bfloat16)
    memory = zeros(3, 4 * 640)  # of each layer: K, V, and room behind them
    k, v = (memory[:, first : first + 640].view(3, 5, 2, 64) for first in (0, 640))
    k.copy_(torch.randn(k.shape))
    v.copy_(torch.randn(v.shape))
    as_bytes = memory.view(torch.uint8)
    behind = as_bytes[:, 2560 : 2560 + 2 * size].unflatten(1, (2, size))
    want, want_restored = round_trip(k.clone(), v.clone(), 8, "reference")
    assert torch.equal(quantize_chunk(k, v, bits=8, out=behind), want)
    for first, name in ((1280 - size + 16, "k"), (2560 - 16, "v")):
        over = as_bytes[:, first : first + 2 * size].unflatten(1, (2, size))
        with pytest.raises(ValueError, match=rf"^quantize_chunk: out must not overlap {name}, got"):
            quantize_chunk(*((k, v.clone()) if name == "k" else (k.clone(), v)), bits=8, out=over)
    dequantize_chunk(behind, bits=8, out_k=k, out_v=v)
    assert torch.equal(k, want_restored[0]) and torch.equal(v, want_restored[1])
    ahead = memory[:, 1280 - 8 : 1920 - 8].view(3, 5, 2, 64)
    with pytest.raises(ValueError, match=r"^dequantize_chunk: out_v must not overlap packed, got"):
        dequantize_chunk(behind, bits=8, out_k=k, out_v=ahead)


@by_bits
def test_opcheck_and_compile(bits):
    k, v = random_chunk(2, 66, 1, 64, dtype=torch.float32)
    want, want_restored = round_trip(k, v, bits, "reference")
    torch.library.opcheck(torch.ops.worldkv.quantize_chunk.default, (k, v, want.clone(), bits, True, "auto"))
    outs = (torch.zeros_like(k), torch.zeros_like(v))
    torch.library.opcheck(torch.ops.worldkv.dequantize_chunk.default, (want, *outs, None, bits, "auto"))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(k, v):
        packed = quantize_chunk(k * 1, v, bits=bits)
        return packed, dequantize_chunk(packed, bits=bits, tokens=66, heads=1, head_dim=64, dtype=k.dtype)

    packed, restored = compiled(k, v)
    assert torch.equal(packed, want) and all(map(torch.equal, restored, want_restored))
