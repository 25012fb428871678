"""segment_attention by PyTorch's own attention over the gathered window: what is particular to it."""

import math
import warnings

import pytest
import torch
from conftest import DEVICE, relative_error
from test_segment_attention import ROPES, brute_force, exact_scores, make_pool, make_window

from worldkv_kernels import Segment, Window, segment_attention
from worldkv_kernels.ops import sdpa
from worldkv_kernels.ops.segment_attention import BACKENDS

CPU = torch.device("cpu")
SEGMENTS = [Segment(700, 300, 5, 0.5), Segment(3, 1), Segment(130, 256, -40, -2.0), Segment(400, 90, 0, 1.0)]
KIND = (torch.float32, 64, 0, False, False, False, True, True)


@pytest.fixture
def no_reference(monkeypatch):
    """The reference, called from sdpa, is an error."""

    def refuse(*_, **__):
        raise AssertionError("the reference was called")

    monkeypatch.setattr(sdpa, "reference", refuse)


def problem(dtype=torch.float32, head_dim=64, rows=1100, heads=3, q_len=37, segments=SEGMENTS, **window):
    k, v, generator = make_pool(rows, heads, head_dim, segments, dtype)
    q = torch.randn(q_len, heads, head_dim, generator=generator).to(DEVICE, dtype)
    return q, k, v, Window(segments, device=DEVICE, rope=ROPES[head_dim], weighted=True, **window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("by_heads", [0, 10**6])
def test_shifts_weights_and_lse_in_every_dtype(no_reference, monkeypatch, dtype, head_dim, by_heads):
    monkeypatch.setattr(sdpa, "_BY_HEADS", by_heads)  # of the two ways of gathering, the one
    q, k, v, window = problem(dtype, head_dim)
    out, lse = segment_attention(q, k, v, window, return_lse=True, backend="sdpa")
    want, want_lse, _ = brute_force(q, k, v, SEGMENTS)
    of_out, of_lse = {torch.float32: (2e-6, 2e-6), torch.float16: (1e-3, 1e-3)}.get(dtype, (6e-3, 3e-3))
    assert relative_error(out, want) <= of_out and relative_error(lse, want_lse) <= of_lse


@pytest.mark.skipif(DEVICE.type != "cpu", reason="of a CPU")
def test_auto_on_a_cpu_takes_it_but_for_mass(no_reference, monkeypatch):
    BACKENDS.forget()
    monkeypatch.setenv("WORLDKV_SELF_CHECK", "0")
    with_mass = (*KIND[:4], True, *KIND[5:])
    assert BACKENDS.name("auto", CPU, KIND) == "sdpa" and BACKENDS.name("auto", CPU, with_mass) == "reference"
    q, k, v, window = problem()
    out = segment_attention(q, k, v, window)
    assert torch.equal(out, segment_attention(q, k, v, window, backend="sdpa"))
    with pytest.raises(ValueError, match="got 'sdpa': PyTorch's attention gives no softmax weight on each segment"):
        segment_attention(q, k, v, window, return_mass=True, backend="sdpa")
    BACKENDS.forget()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="of a CPU")
def test_it_is_held_against_the_reference_on_first_use(monkeypatch):
    BACKENDS.forget()
    monkeypatch.setitem(BACKENDS.loaded, "sdpa", lambda *x, **_: x[9].zero_())
    q, k, v, window = problem()
    with pytest.warns(UserWarning, match="segment_attention: the sdpa kernel is not used on cpu: its out differs"):
        out = segment_attention(q, k, v, window)
    assert torch.equal(out, segment_attention(q, k, v, window, backend="reference"))
    BACKENDS.forget()
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        segment_attention(q, k, v, window)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="of a CPU")
def test_torch_without_it_is_a_reason(monkeypatch):
    assert sdpa.unavailable(CPU) is None

    class Without:
        pass

    monkeypatch.setattr(torch.ops, "aten", Without())
    assert "has no flash attention for CPUs" in sdpa.unavailable(CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first_row", [0, 1, 333])
def test_one_segment_is_read_where_it_lies_with_the_same_bits(no_reference, monkeypatch, dtype, first_row):
    contents = torch.randn(2, 300, 3, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    q, results = contents[0, :40].clone(), []
    for first, pieces in ((first_row, [300]), (7, [100, 200])):
        pool = torch.full((2, 700, 3, 64), math.nan, dtype=dtype, device=DEVICE)
        pool[:, first : first + 300] = contents
        ends = torch.tensor(pieces).cumsum(0).tolist()
        window = Window([Segment(first + end - n, n) for n, end in zip(pieces, ends, strict=True)], device=DEVICE)
        results.append(segment_attention(q, *pool, window, return_lse=True, backend="sdpa"))
        if len(pieces) == 1 and DEVICE.type == "cpu":
            monkeypatch.setattr(sdpa, "_gathered", _gathers_not)
            segment_attention(q, *pool, window, backend="sdpa")
            monkeypatch.undo()
    want, want_lse, _ = brute_force(q, *contents, [Segment(0, 300)])
    assert relative_error(results[0][0], want) <= (2e-6 if dtype == torch.float32 else 6e-3)
    # The same rows as two segments: another order, full tiles first, and so other roundings.
    assert relative_error(results[1][1], want_lse) <= 1e-5


def _gathers_not(*_):
    raise AssertionError("it was gathered")


def test_a_pool_of_any_strides(no_reference):
    segments = [Segment(0, 130), Segment(200, 70)]
    k, v, generator = make_pool(300, 6, 64, segments, torch.float32)
    q = torch.randn(3, 20, 64, generator=generator).to(DEVICE).transpose(0, 1)
    room = torch.full((2, 22, 3, 64), 7.0, device=DEVICE)
    window = make_window(segments, 64)
    for pools in ((k[:, ::2], v[:, 3:]), tuple(x[:, :3].transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v))):
        out = segment_attention(q, *pools, window, out=room[0, 1:21], backend="sdpa")
        assert relative_error(out, brute_force(q, *pools, segments)[0]) <= 2e-6
        assert (room[0, 0] == 7).all() and (room[0, 21] == 7).all()
    before = k.clone()
    turned = Window([Segment(0, 130, 9)], device=DEVICE, rope=ROPES[64])
    segment_attention(q, k[:, :3], v[:, :3], turned, backend="sdpa")
    assert torch.equal(k.nan_to_num(), before.nan_to_num())  # a copy was turned


@pytest.mark.skipif(DEVICE.type != "cpu", reason="of a CPU")
@pytest.mark.parametrize("size", [400.0, 600.0, 1e7, 1e30])
@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores_are_left_to_the_reference(monkeypatch, size, sign):
    """With their own sign: all scores near the size, or near minus the size."""
    calls = []
    right = sdpa.reference
    monkeypatch.setattr(sdpa, "reference", lambda *x, **y: calls.append(1) or right(*x, **y))
    q, k, v = exact_scores(300)
    q = q[:1] * sign
    window = make_window([Segment(0, 200), Segment(260, 40)], 64)
    given = dict(scale=size / (64 * 100003), return_lse=True)
    got = segment_attention(q, k, v, window, backend="sdpa", **given)
    assert bool(calls) == (size > 512)
    wanted = segment_attention(q, k, v, window, backend="reference", **given)
    for have, want in zip(got, wanted, strict=True):
        assert relative_error(have, want) <= (0.0 if calls else 1e-4)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="of a CPU")
@pytest.mark.parametrize("scale", [2.0, 10.0])
def test_below_that_it_is_as_exact_as_the_reference(no_reference, scale):
    q, k, v, window = problem()
    q *= 0.125
    k *= 8
    out = segment_attention(q, k, v, window, scale=scale, backend="sdpa")
    of_reference = segment_attention(q, k, v, window, scale=scale, backend="reference")
    want = brute_force(q, k, v, SEGMENTS, scale)[0]
    assert relative_error(out, want) <= 2 * relative_error(of_reference, want)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="of a CPU")
def test_tables_that_name_no_row_of_the_pool_are_an_error():
    q, k, v, window = problem()
    out = torch.empty_like(q)
    window.tables[1][0, 0] = 1100
    with pytest.raises(ValueError, match="tiles and tail_rows must name rows of the pool, from 0 to 1099, got 3 to 11"):
        torch.ops.worldkv.segment_attention(q, k, v, *window.tables, out, None, None, 0.1, True, True, "sdpa")
    window.tables[3].zero_()
    with pytest.raises(ValueError, match="num_segments must hold 1 to"):
        torch.ops.worldkv.segment_attention(q, k, v, *window.tables, out, None, None, 0.1, True, True, "sdpa")
