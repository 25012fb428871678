"""Softmax weights of segments in segment_attention against float64 brute force, on every backend of this machine."""

import math

import pytest
import torch
from conftest import DEVICE, backends, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from test_segment_attention import (
    FP32_BACKENDS,
    FUZZ,
    ROPES,
    SIZES,
    brute_force,
    check,
    dtype_of,
    exact_scores,
    extras,
    limits,
    make_pool,
    make_window,
    serves,
)

from worldkv_kernels import Segment, Window, segment_attention
from worldkv_kernels.ops.segment_attention import BACKENDS
from worldkv_kernels.window import MAX_LOG_WEIGHT

BACKEND_NAMES = [name for name in backends(BACKENDS) if serves(name, torch.float16, has_weight=True)]
MASS_BACKENDS = [name for name in BACKEND_NAMES if name != "sdpa"]  # which has no mass
# Tail rows of all of them lie in one block of a kernel, or two; full tiles lie between and before.
SEGMENTS = [
    Segment(0, 7, log_weight=-2.5), Segment(10, 140, log_weight=math.log(2)), Segment(160, 1, log_weight=8.0),
    Segment(170, 128), Segment(300, 256, log_weight=-8.0), Segment(560, 20, log_weight=-1.0),
    Segment(590, 9, log_weight=3.0),
]  # fmt: skip
SHIFTS = (0, 5, -3, 0, 9, -40, 1)
EXTRAS = dict(return_lse=True, return_mass=True)

weights = st.one_of(st.just(0.0), st.floats(-8, 8), st.sampled_from([-8.0, 8.0, math.log(2)]))
segment_lists = st.lists(
    st.builds(Segment, st.integers(0, 500), st.integers(1, 300), st.integers(-200, 200), weights),
    min_size=1,
    max_size=8,
)


def shifted_too(segments, shifted):
    return [s._replace(time_shift=shift) for s, shift in zip(segments, SHIFTS, strict=True)] if shifted else segments


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@settings(max_examples=FUZZ, deadline=None, derandomize=True)
@given(segments=segment_lists, seed=st.integers(0, 1000), shifted=st.booleans())
def test_random_windows_match_float64(backend, segments, seed, shifted):
    segments = segments if shifted else [s._replace(time_shift=0) for s in segments]
    kv_heads = 1 + seed // 40 % 2
    *_, last = check(backend, 1 + seed % 40, 2, 64, segments, seed=seed, kv_heads=kv_heads, **extras(backend))
    if backend in MASS_BACKENDS:
        assert (last.sum(1) - 1).abs().max() <= 1e-5


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("shifted", [False, True])
def test_tails_of_several_segments_in_a_block(backend, head_dim, shifted):
    check(backend, 33, 2, head_dim, shifted_too(SEGMENTS, shifted), **extras(backend))


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_log_2_is_the_segment_named_twice(backend):
    once = [Segment(0, 150), Segment(200, 300, log_weight=math.log(2)), Segment(510, 20, log_weight=math.log(2))]
    twice = [s._replace(log_weight=0.0) for s in (once[0], once[1], once[1], once[2], once[2])]
    k, v, generator = make_pool(600, 2, 64, once, dtype_of(backend))
    q = torch.randn(20, 2, 64, generator=generator).to(DEVICE, k.dtype)
    out, lse, *mass = segment_attention(q, k, v, make_window(once, 64), backend=backend, **extras(backend))
    want, want_lse, *want_mass = segment_attention(q, k, v, make_window(twice, 64), backend=backend, **extras(backend))
    assert relative_error(out, want) <= (1e-6 if k.dtype == torch.float32 else 1e-3)
    assert relative_error(lse, want_lse) <= 1e-6
    if backend not in MASS_BACKENDS:
        return
    (mass,), (want_mass,) = mass, want_mass
    summed = torch.stack([want_mass[:, 0], want_mass[:, 1:3].sum(1), want_mass[:, 3:].sum(1)], dim=1)
    assert relative_error(mass, summed) <= 1e-6


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("num_rows", [40, 256])
@pytest.mark.parametrize("order", [1, -1])
def test_what_lies_far_below_the_best_score_keeps_its_digits_in_fp16(backend, num_rows, order):
    """The best scores come with a weight of exp(-8), and others, 16 below, with exp(8): all weigh about the same."""
    segments = [Segment(0, num_rows, log_weight=-8.0), Segment(300, num_rows, log_weight=8.0)][::order]
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 600, 1, 64, generator=generator)
    q = torch.randn(9, 1, 64, generator=generator)
    q[..., 0], k[:300, :, 0], k[300:, :, 0] = 8.0, 16.0, 0.0
    q, k, v = (x.to(DEVICE, torch.float16) for x in (q, k, v))
    got = segment_attention(q, k, v, make_window(segments, 64), backend=backend, **extras(backend))
    wanted = brute_force(q, k, v, segments)
    assert 0.2 <= wanted[2].min() <= 0.5
    for have, want, limit in zip(got, wanted, (1e-3, 2e-6, 2e-6), strict=False):
        assert relative_error(have, want) <= limit


@pytest.mark.parametrize("backend", FP32_BACKENDS)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_weights_act_among_equal_scores_of_any_size(backend, size, shifted):
    """Half of the keys have the largest score: at 1e30, where a weight is far below its last digit, too."""
    q, k, v = exact_scores(600)
    scale = size / (64 * 100003)
    window = Window(SEGMENTS, device=DEVICE, rope=ROPES[64] if shifted else None, weighted=True)
    got = segment_attention(q, k, v, window, scale=scale, backend=backend, **extras(backend))
    for have, want in zip(got, brute_force(q, k, v, SEGMENTS, scale)[: len(got)], strict=True):
        assert relative_error(have, want) <= 2e-6
    if backend in MASS_BACKENDS:
        assert (got[2].sum(1) - 1).abs().max() <= 1e-6


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("scale", [None, 1e-9, 1e25])
def test_the_largest_numbers_of_half_precision(backend, scale):
    q, k, v = exact_scores(600, torch.float16)
    got = segment_attention(q, k, v, make_window(SEGMENTS, 64), scale=scale, backend=backend, **extras(backend))
    for have, want, limit in zip(got, brute_force(q, k, v, SEGMENTS, scale), (1e-3, 2e-6, 2e-6), strict=False):
        assert relative_error(have, want) <= limit


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("key", [96.0, 127.0])
@pytest.mark.parametrize("below", [-16, 16, 48])
@pytest.mark.parametrize("first", [8.0, -8.0])
def test_where_a_kernel_changes_its_scale_lse_is_right(backend, key, below, first):
    """Products with log2(e) about 2**28, beyond which a kernel takes a power of two for the scale, here 1.5 or 1.98
    times it; a weight moves the maximum across."""
    segments = [Segment(0, 128, log_weight=first), Segment(130, 256, log_weight=-first), Segment(400, 3)]
    q, k = torch.zeros(3, 1, 64), torch.zeros(410, 1, 64)
    q[..., 0], k[..., 0] = 128.0, key
    scale = (2.0**28 - below) / (128 * key) * math.log(2)
    q, k = (x.to(DEVICE, torch.float16) for x in (q, k))
    got = segment_attention(q, k, k, make_window(segments, 64), scale=scale, backend=backend, **extras(backend))
    for have, want in zip(got[1:], brute_force(q, k, k, segments, scale)[1 : len(got)], strict=True):
        assert relative_error(have, want) <= 2e-6


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("equal", [True, False])
def test_roundings_of_the_maximum_do_not_add_up(monkeypatch, backend, sign, equal):
    """Products with log2(e) of 1.5 * 2**27, 16 apart: of weights of 0, 9 and 4.5 to base 2 in turn 9 becomes 16, and
    4.5 nothing. Sums of all would end in zeros or infinities, were not each rounding made up for by the next."""
    if backend not in ("reference", "sdpa"):  # one walk over all of the window
        kernel = pytest.importorskip("worldkv_kernels.kernels.segment_attention", reason="triton is not installed")
        monkeypatch.setattr(kernel, "deal", lambda *_: kernel.Deal(1, 0, 1))
    logs = [sign * x * math.log(2) for x in (0.0, -9.0, -4.5)] * 17
    segments = [Segment(i * 128, 128, log_weight=log) for i, log in enumerate(logs)]
    if not equal:
        segments[0] = segments[0]._replace(log_weight=8.0 * sign)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.full((2, 1, 64), 32.0), torch.zeros(51 * 128, 1, 64)
    k[..., 0] = 32.0
    k[128:, :, 0] -= 0.0 if equal else 1.0
    v = torch.randn(k.shape, generator=generator)
    scale = 1.5 * 2.0**27 / 2**10 * math.log(2)
    q, k, v = (x.to(DEVICE, torch.float16) for x in (q, k, v))
    got = segment_attention(q, k, v, make_window(segments, 64), scale=scale, backend=backend, **extras(backend))
    for have, want, limit in zip(got, brute_force(q, k, v, segments, scale), (1e-3, 4e-6, 4e-6), strict=False):
        assert relative_error(have, want) <= limit


@pytest.mark.parametrize("shifted", [False, True])
def test_weights_of_zero_are_no_weights_to_the_bit_in_the_reference(shifted):
    segments = [s._replace(log_weight=0.0) for s in shifted_too(SEGMENTS, shifted)]
    k, v, generator = make_pool(600, 2, 64, segments, torch.float32)
    q = torch.randn(20, 2, 64, generator=generator).to(DEVICE)
    rope = ROPES[64] if shifted else None
    without, with_zeros = (
        segment_attention(
            q, k, v, Window(segments, device=DEVICE, rope=rope, weighted=weighted), backend="reference", **EXTRAS
        )
        for weighted in (False, True)
    )
    assert all(map(torch.equal, without, with_zeros))


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("shifted", [False, True])
def test_update_in_place_is_what_the_next_call_reads(backend, shifted):
    """Every weight from -8 to 8 in turn, and none, at the same addresses: what a captured graph would read."""
    k, v, generator = make_pool(600, 1, 64, SEGMENTS, dtype_of(backend))
    q = torch.randn(8, 1, 64, generator=generator).to(DEVICE, k.dtype)
    window = Window([Segment(0, 1)], device=DEVICE, rope=ROPES[64] if shifted else None, weighted=True, capacity=10)
    addresses = [t.data_ptr() for t in window.tables]
    given = shifted_too(SEGMENTS, shifted)
    rotated = [s._replace(log_weight=given[i - 1].log_weight) for i, s in enumerate(given)]
    for chosen in (given, rotated, given[::-1], [s._replace(log_weight=0.0) for s in given], given[:1]):
        window.update(chosen)
        got = segment_attention(q, k, v, window, backend=backend, **extras(backend))
        of_out, of_sums = limits(k.dtype, given)
        for have, want, limit in zip(got, brute_force(q, k, v, chosen), (of_out, of_sums, of_sums), strict=False):
            assert relative_error(have, want) <= limit
    assert addresses == [t.data_ptr() for t in window.tables]


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("shift", [0, 11])
def test_same_bits_wherever_the_segments_lie_and_every_time(backend, shift):
    lengths, logs = (200, 128, 5, 30), (0.7, -8.0, 8.0, -0.1)
    generator = torch.Generator().manual_seed(1)
    contents = [torch.randn(2, n, 2, 64, generator=generator) for n in lengths]
    q = torch.randn(33, 2, 64, generator=generator).to(DEVICE, dtype_of(backend))
    results = []
    for starts in ((0, 200, 328, 333), (640, 0, 401, 200)):
        pool = torch.full((2, 900, 2, 64), math.nan)
        for first, content in zip(starts, contents, strict=True):
            pool[:, first : first + content.shape[1]] = content
        k, v = pool.to(DEVICE, q.dtype)
        window = make_window([Segment(s, n, shift, w) for s, n, w in zip(starts, lengths, logs, strict=True)], 64)
        for _ in range(2 if backend == "triton" and DEVICE.type == "cpu" else 10):  # the interpreter has one order
            outputs = segment_attention(q, k, v, window, backend=backend, **extras(backend))
            results.append(torch.cat([x.flatten() for x in outputs]))
    assert len(results) >= 4 and all(torch.equal(results[0], result) for result in results)


@pytest.mark.parametrize("backend", [name for name in MASS_BACKENDS if name != "reference"])
@pytest.mark.parametrize("captured", [2, 9])
def test_mass_of_a_replay_with_other_segments_stays_inside(backend, captured):
    """What a captured graph does when the window changed: mass sized for `captured` segments, seven in the tables."""
    k, v, generator = make_pool(600, 2, 64, SEGMENTS, dtype_of(backend))
    q = torch.randn(9, 2, 64, generator=generator).to(DEVICE, k.dtype)
    out, room = torch.empty_like(q), torch.full((4, captured), 7.0, device=DEVICE)
    tables = make_window(SEGMENTS, 64).tables
    torch.ops.worldkv.segment_attention(q, k, v, *tables, out, None, room[1:3], 0.125, False, True, backend)
    want, _, want_mass = brute_force(q, k, v, SEGMENTS)
    of_out, of_mass = limits(k.dtype, SEGMENTS)
    shared = min(captured, len(SEGMENTS))
    assert relative_error(out, want) <= of_out
    assert relative_error(room[1:3, :shared], want_mass[:, :shared]) <= of_mass
    assert (room[1:3, shared:] == 0).all() and (room[0] == 7).all() and (room[3] == 7).all()


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("num_whole", "parts"), [(0, 2), (1, 7), (3, 3)])
def test_cut_items_match_float64_in_triton(monkeypatch, num_whole, parts, shifted):
    """4 items, 2 of each head; with 7 parts some have no full tile and some no row at all."""
    kernel = pytest.importorskip("worldkv_kernels.kernels.segment_attention", reason="triton is not installed")
    if "triton" not in BACKEND_NAMES:
        pytest.skip("Triton cannot run on this machine")
    segments = shifted_too(SEGMENTS, shifted)
    k, v, generator = make_pool(600, 2, 64, segments, torch.float32)
    q = torch.randn(40, 2, 64, generator=generator).to(DEVICE)
    monkeypatch.setattr(kernel, "deal", lambda *_: kernel.Deal(num_whole, 4 - num_whole, parts))
    monkeypatch.setattr(kernel, "attention_config", lambda *_: kernel.AttentionConfig(32, 64, 4, 1))
    got = segment_attention(q, k, v, make_window(segments, 64), backend="triton", **EXTRAS)
    for have, want in zip(got, brute_force(q, k, v, segments), strict=True):
        assert relative_error(have, want) <= 2e-6


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: a graph replay")
@pytest.mark.parametrize("backend", [name for name in BACKEND_NAMES if name != "reference"])
def test_a_replay_sees_new_weights_on_a_gpu(backend):
    k, v, generator = make_pool(600, 2, 128, SEGMENTS, torch.float16)
    q = torch.randn(200, 2, 128, generator=generator).to(DEVICE, torch.float16)
    window = Window(SEGMENTS, device=DEVICE, weighted=True)
    segment_attention(q, k, v, window, backend=backend, **extras(backend))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = segment_attention(q, k, v, window, backend=backend, **extras(backend))
    window.update([s._replace(log_weight=-s.log_weight) for s in SEGMENTS])
    graph.replay()
    for have, want in zip(got, brute_force(q, k, v, window.segments)[: len(got)], strict=True):
        assert relative_error(have, want) <= 2e-3


def test_opcheck_and_compile():
    segments = [Segment(0, 40, 3, -1.0), Segment(128, 50, 0, 2.0)]
    k, v, generator = make_pool(256, 2, 64, segments, torch.float32)
    k, v = k.nan_to_num(), v.nan_to_num()
    q = torch.randn(8, 2, 64, generator=generator).to(DEVICE)
    window = make_window(segments, 64)
    out, lse, mass = segment_attention(q, k, v, window, **EXTRAS)
    args = (q, k, v, *window.tables, out.clone(), lse.clone(), mass.clone(), 0.125, True, True, "auto")
    torch.library.opcheck(torch.ops.worldkv.segment_attention.default, args)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q, k, v):
        return segment_attention(q * 1, k, v, window, **EXTRAS)

    for have, want in zip(compiled(q, k, v), (out, lse, mass), strict=True):
        assert torch.equal(have, want)


def test_the_bound_of_the_window_and_of_the_kernel_are_one():
    kernel = pytest.importorskip("worldkv_kernels.kernels.segment_attention", reason="triton is not installed")
    assert kernel.MAX_LOG_WEIGHT == MAX_LOG_WEIGHT == 8
