"""segment_attention against float64 brute force, on every backend that this machine has."""

import math
import os

import numpy as np
import pytest
import torch
from conftest import DEVICE, backends, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from worldkv_kernels import Rope3D, Segment, Window, segment_attention
from worldkv_kernels.ops.segment_attention import BACKENDS


def serves(backend, dtype, has_weight=False):
    """Whether a backend takes a kind of problem here, where CUDA runs on a CPU too."""
    kind, of_backend = (dtype, 64, 0, False, False, has_weight, False, True, True), BACKENDS.backends[backend]
    return of_backend.unsupported(kind) is None and of_backend.unsupported_on(DEVICE, kind) is None


BACKEND_NAMES = backends(BACKENDS)
FP32_BACKENDS = [name for name in BACKEND_NAMES if serves(name, torch.float32)]  # others take 16 bits alone
MASS_BACKENDS = [name for name in BACKEND_NAMES if name != "sdpa"]  # which has no mass
FUZZ = int(os.environ.get("WORLDKV_FUZZ") or (60 if DEVICE.type == "cuda" else 12))  # random windows a backend
ROPES = {head_dim: Rope3D(head_dim) for head_dim in (64, 128)}


def dtype_of(backend):
    """What a backend is held against float64 in: fp32, or fp16 where it takes no fp32."""
    return torch.float32 if backend in FP32_BACKENDS else torch.float16


def extras(backend):
    """All that can be asked of a backend on top."""
    return dict(return_lse=True, return_mass=True) if backend != "sdpa" else dict(return_lse=True)


def limits(dtype, segments, limit=2e-6):
    """Relative errors of out, and of lse and mass: fp16 rounds weights and out, and the query where that turns."""
    of_16_bits = 2e-6 if dtype == torch.float32 else 1e-3
    shifted = any(s.time_shift for s in segments)
    return max(limit, of_16_bits), max(limit, of_16_bits if shifted else limit)


def make_pool(rows, heads, head_dim, segments, dtype, seed=0):
    """q maker, K and V with NaN in every row that no segment names."""
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, rows, heads, head_dim, generator=generator).to(dtype)
    used = torch.zeros(rows, dtype=torch.bool)
    for segment in segments:
        used[segment.first_row : segment.first_row + segment.num_rows] = True
    k[~used], v[~used] = math.nan, math.nan
    return k.to(DEVICE), v.to(DEVICE), generator


def rotated(k, shift, head_dim):
    """K turned forward in time by `shift` frames, as complex numbers in float64."""
    c = head_dim // 2
    pairs = c - 2 * (c // 3)
    angles = shift * 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    turn = torch.cat([torch.polar(torch.ones_like(angles), angles), torch.ones(c - pairs, dtype=torch.complex128)])
    return torch.view_as_real(torch.view_as_complex(k.double().reshape(*k.shape[:-1], c, 2)) * turn).flatten(-2)


def brute_force(q, k, v, segments, scale=None):
    """out, lse, mass in float64: keys rewritten, concatenated, plain softmax. Log weights are added to differences of
    scores, since float64 has not the digits for their sum with a score of 1e30."""
    q, k, v = q.double().cpu(), k.cpu(), v.double().cpu()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scale = q.shape[2] ** -0.5 if scale is None else scale
    keys = torch.cat([rotated(k[s.first_row : s.first_row + s.num_rows], s.time_shift, q.shape[2]) for s in segments])
    values = torch.cat([v[s.first_row : s.first_row + s.num_rows] for s in segments])
    scores = torch.einsum("qhd,khd->hqk", q, keys)
    highest = scores.amax(-1, keepdim=True)
    lengths = torch.tensor([s.num_rows for s in segments])
    weights = torch.tensor([s.log_weight for s in segments], dtype=torch.float64).repeat_interleave(lengths)
    differences = (scores - highest) * scale + weights
    p = differences.softmax(-1)
    out = torch.einsum("hqk,khd->qhd", p, values)
    parts = p.split(lengths.tolist(), dim=-1)
    lse = highest.squeeze(-1) * scale + differences.logsumexp(-1)
    return out, lse, torch.stack([part.sum(-1).mean(-1) for part in parts], dim=1)


def make_window(segments, head_dim):
    """With a rope only where a segment is shifted: with one, attention takes the path that turns queries. With weights
    only where a segment has one."""
    shifted, weighted = any(s.time_shift for s in segments), any(s.log_weight for s in segments)
    return Window(segments, device=DEVICE, rope=ROPES[head_dim] if shifted else None, weighted=weighted)


def check(backend, q_len, heads, head_dim, segments, limit=2e-6, seed=0, scale=None, kv_heads=None, **flags):
    dtype = dtype_of(backend)
    rows = max(s.first_row + s.num_rows for s in segments) + 70
    k, v, generator = make_pool(rows, kv_heads or heads, head_dim, segments, dtype, seed)
    q = torch.randn(q_len, heads, head_dim, generator=generator).to(DEVICE, dtype)
    window = make_window(segments, head_dim)
    got = segment_attention(q, k, v, window, backend=backend, scale=scale, **flags)
    got = got if isinstance(got, tuple) else (got,)
    out, lse, mass = brute_force(q, k, v, segments, scale)
    wanted = [out] + [lse] * flags.get("return_lse", False) + [mass] * flags.get("return_mass", False)
    of_out, of_sums = limits(dtype, segments, limit)
    for have, want in zip(got, wanted, strict=True):
        assert relative_error(have, want) <= (of_out if want is out else of_sums)
    return got


def segments_strategy(max_segments, max_rows, max_first):
    segment = st.tuples(st.integers(0, max_first), st.integers(1, max_rows), st.integers(-200, 200))
    return st.lists(segment, min_size=1, max_size=max_segments).map(lambda many: [Segment(*one) for one in many])


# The turned query is rounded to the input's dtype, in fp32 by 6e-8 of each number; scores stay within 2e-6.
@pytest.mark.parametrize("backend", BACKEND_NAMES)
@settings(max_examples=FUZZ, deadline=None, derandomize=True)
@given(segments=segments_strategy(8, 300, 500), seed=st.integers(0, 1000), shifted=st.booleans())
def test_random_windows_match_float64(backend, segments, seed, shifted):
    segments = segments if shifted else [s._replace(time_shift=0) for s in segments]
    check(backend, 1 + seed % 40, 2, 64, segments, seed=seed, kv_heads=1 + seed // 40 % 2, **extras(backend))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(segments=segments_strategy(30, 5000, 9000), seed=st.integers(0, 1000))
def test_long_random_windows_match_float64_on_the_default_backend(segments, seed):
    check(None, 1 + seed % 50, 1, 128, segments, seed=seed, return_lse=True, return_mass=True)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_thirty_segments_with_shifts(backend):
    segments = [Segment((i * 37) % 400, 1 + (i * 53) % 150, (i * 29) % 401 - 200) for i in range(30)]
    check(backend, 5, 1, 64, segments, **extras(backend))


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_rows", [1, 127, 128, 129, 256])
@pytest.mark.parametrize("q_len", [1, 129])
def test_tile_edges(backend, head_dim, num_rows, q_len):
    check(backend, q_len, 1, head_dim, [Segment(3, num_rows), Segment(0, 1)])


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [0, -33])
def test_half_precision_within_twice_the_error_of_sdpa(backend, dtype, shift):
    """SDPA in the same dtype, on the gathered window with its keys rewritten and rounded."""
    reason = BACKENDS.backends[backend].unsupported((dtype, 64, 12, False, False, False, False, True, True))
    if reason:
        pytest.skip(f"{reason}; fp16 stands in for them there")
    segments = [Segment(128, 300, shift), Segment(10, 77)]
    k, v, generator = make_pool(500, 2, 64, segments, dtype)
    q = torch.randn(70, 2, 64, generator=generator).to(DEVICE, dtype)
    got = segment_attention(q, k, v, make_window(segments, 64), backend=backend)
    want = brute_force(q, k, v, segments)[0]
    pieces = [slice(s.first_row, s.first_row + s.num_rows) for s in segments]
    keys = torch.cat([rotated(k[p].cpu(), s.time_shift, 64).to(dtype) for p, s in zip(pieces, segments, strict=True)])
    values = torch.cat([v[p] for p in pieces])
    heads_first = [x.to(DEVICE).transpose(0, 1).unsqueeze(0) for x in (q, keys, values)]
    sdpa = torch.nn.functional.scaled_dot_product_attention(*heads_first)[0].transpose(0, 1)
    assert relative_error(got, want) <= 2 * relative_error(sdpa, want)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("shift", [0, 11])
def test_same_bits_wherever_the_segments_lie_and_every_time(backend, shift):
    lengths = (200, 128, 5)
    generator = torch.Generator().manual_seed(1)
    contents = [torch.randn(2, n, 2, 64, generator=generator) for n in lengths]
    q = torch.randn(33, 2, 64, generator=generator).to(DEVICE, dtype_of(backend))
    results = []
    for starts in ((0, 200, 328), (640, 0, 401), (640, 0, 401)):
        pool = torch.full((2, 900, 2, 64), math.nan)
        for first, content in zip(starts, contents, strict=True):
            pool[:, first : first + content.shape[1]] = content
        k, v = pool.to(DEVICE, q.dtype)
        window = make_window([Segment(s, n, shift) for s, n in zip(starts, lengths, strict=True)], 64)
        repeats = 20 if DEVICE.type == "cuda" else 2
        for _ in range(repeats):
            outputs = segment_attention(q, k, v, window, backend=backend, **extras(backend))
            results.append(torch.cat([x.flatten() for x in outputs]))
    assert all(torch.equal(results[0], result) for result in results)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_turning_the_query_equals_rewriting_the_keys(backend):
    """The same window once with time shifts, once over a pool whose keys were rewritten in float64."""
    segments = [Segment(0, 150, -17), Segment(150, 140, 90), Segment(300, 20)]
    k, v, generator = make_pool(330, 2, 128, segments, dtype_of(backend))
    q = torch.randn(40, 2, 128, generator=generator).to(DEVICE, k.dtype)
    moved = k.clone()
    for s in segments:
        piece = slice(s.first_row, s.first_row + s.num_rows)
        moved[piece] = rotated(k[piece].cpu(), s.time_shift, 128).to(DEVICE, k.dtype)
    got = segment_attention(q, k, v, Window(segments, device=DEVICE, rope=ROPES[128]), backend=backend)
    plain = Window([s._replace(time_shift=0) for s in segments], device=DEVICE)
    want = segment_attention(q, moved, v, plain, backend=backend)
    assert relative_error(got, want) <= (1e-6 if k.dtype == torch.float32 else 2e-3)  # queries or keys are rounded


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_a_table_of_more_pairs_is_one_whose_further_pairs_do_not_turn(backend):
    """Of 32 pairs the window's table names the 12 that turn; one that names them all says the same."""
    segments = [Segment(0, 130, -17), Segment(150, 40, 9), Segment(300, 20)]
    k, v, generator = make_pool(330, 2, 64, segments, torch.float16)
    q = torch.randn(40, 2, 64, generator=generator).to(DEVICE, torch.float16)
    *tables, turns, weights = make_window(segments, 64).tables
    of_all = torch.tensor([1.0, 0.0], device=DEVICE).repeat(len(turns), 32, 1)
    of_all[:, : turns.shape[1]] = turns
    got = torch.empty(3, *q.shape, dtype=q.dtype, device=DEVICE)
    for out, table in zip(got, (turns, of_all, of_all[:, :13].contiguous()), strict=True):
        torch.ops.worldkv.segment_attention(
            q, k, v, *tables, table, weights, out, None, None, 0.125, True, False, backend
        )
    assert turns.shape[1] == 12 and relative_error(got[0], brute_force(q, k, v, segments)[0]) <= 1e-3
    assert relative_error(got[1], got[0]) <= 1e-3 and relative_error(got[2], got[0]) <= 1e-3


@pytest.mark.parametrize("backend", MASS_BACKENDS)
def test_mass_is_a_share_and_lse_is_natural(backend):
    """With all keys zero every token weighs the same: mass is the share of tokens, lse is log(tokens)."""
    k = torch.zeros(400, 2, 64, device=DEVICE, dtype=dtype_of(backend))
    window = Window([Segment(0, 300), Segment(310, 60)], device=DEVICE)
    q = torch.randn(7, 2, 64, device=DEVICE).to(k.dtype)
    out, lse, mass = segment_attention(q, k, k + 1, window, return_lse=True, return_mass=True, backend=backend)
    torch.testing.assert_close(mass, torch.tensor([[300 / 360, 60 / 360]] * 2, device=DEVICE))
    torch.testing.assert_close(lse, torch.full((2, 7), math.log(360), device=DEVICE))
    torch.testing.assert_close(out, torch.ones_like(out))


def exact_scores(num_rows, dtype=torch.float32, seed=0):
    """q, k and v whose scores fp32 holds exactly: of the first query 64 * 100003 with half of the keys, and 64 or 128
    less with the others. In fp16 64 * 30000 * 2**15, and the others far below."""
    generator = torch.Generator().manual_seed(seed)
    below = torch.randint(0, 3, (num_rows, 1, 1), generator=generator)
    below[::2] = 0
    signs = torch.randint(0, 2, (9, 1, 64), generator=generator) * 2 - 1
    if dtype == torch.float16:
        q, k = 3e4 * signs, 2.0**15 * signs[0] * (1 - 2 * (below > 0).float())
    else:
        q, k = signs.float(), (100003.0 - below) * signs[0]
    return q.to(DEVICE, dtype), k.to(DEVICE, dtype), torch.randn(num_rows, 1, 64, generator=generator).to(DEVICE, dtype)


# From where the weights differ little to where they are 0 or 1; about 2**28 the kernel takes the other scale.
SIZES = (1e3, 1e5, 1e7, 1.7e8, 1.9e8, 1e9, 3e14, 1e30)


@pytest.mark.parametrize("backend", FP32_BACKENDS)
@pytest.mark.parametrize("size", SIZES)
def test_scores_of_any_size(backend, size):
    segments = [Segment(0, 200), Segment(260, 40), Segment(210, 1)]
    q, k, v = exact_scores(300)
    scale = size / (64 * 100003)
    got = segment_attention(q, k, v, make_window(segments, 64), scale=scale, backend=backend, **extras(backend))
    for have, want in zip(got, brute_force(q, k, v, segments, scale)[: len(got)], strict=True):
        assert relative_error(have, want) <= 2e-6
    if backend in MASS_BACKENDS:
        assert (got[2].sum(1) - 1).abs().max() <= 1e-6


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("scale", [None, 1e-9, 1e25])
def test_the_largest_numbers_of_half_precision(backend, scale):
    if backend == "sdpa" and DEVICE.type == "cuda" and scale != 1e-9:
        pytest.skip("PyTorch's kernel scales scores before it subtracts the largest: at 1e10 nothing of them is left")
    segments = [Segment(0, 200), Segment(260, 40), Segment(210, 1)]
    q, k, v = exact_scores(300, torch.float16)
    got = segment_attention(q, k, v, make_window(segments, 64), scale=scale, backend=backend, **extras(backend))
    wanted = brute_force(q, k, v, segments, scale)
    of_sums = 5e-6 if backend == "sdpa" else 2e-6  # of 16 bits PyTorch takes a shorter exponential
    for have, want, limit in zip(got, wanted, (1e-3, of_sums, of_sums), strict=False):
        assert relative_error(have, want) <= limit


@pytest.mark.parametrize("backend", MASS_BACKENDS)
def test_a_large_value_behind_no_weight_stays_there(backend):
    wide = dict(device=DEVICE, dtype=torch.bfloat16 if backend == "cuda" else torch.float32)  # fp16 holds no 1e33
    q, k = torch.ones(3, 1, 64, **wide), torch.zeros(140, 1, 64, **wide)
    k[70:] = -100 / 64
    v = torch.ones(140, 1, 64, **wide)
    v[70:] = 1e33
    out, mass = segment_attention(
        q, k, v, Window([Segment(0, 70), Segment(70, 70)], device=DEVICE), scale=1.0, return_mass=True, backend=backend
    )
    torch.testing.assert_close(out, torch.ones_like(out))
    torch.testing.assert_close(mass, torch.tensor([[1.0, 0.0]], device=DEVICE))


@pytest.mark.parametrize("backend", FP32_BACKENDS)
@pytest.mark.parametrize("scale", [1e-25, 1e-9, 1e9, 1e25])
def test_scales_at_the_ends_of_their_range(backend, scale):
    segments = [Segment(0, 130), Segment(140, 3)]
    q, k, v = exact_scores(150)
    got = segment_attention(q, k, v, make_window(segments, 64), scale=scale, backend=backend, **extras(backend))
    for have, want in zip(got, brute_force(q, k, v, segments, scale)[: len(got)], strict=True):
        assert relative_error(have, want) <= 2e-6


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_large_scores_do_not_overflow(backend):
    check(backend, 9, 1, 64, [Segment(0, 200), Segment(260, 40)], scale=300.0, limit=2e-4, **extras(backend))


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_strided_inputs_and_sentinels_around_out(backend):
    segments = [Segment(0, 130)]
    k, v, generator = make_pool(200, 6, 64, segments, dtype_of(backend))
    k, v = k[:, ::2], v[:, 3:]  # head strides that are not head_dim
    q = torch.randn(2, 20, 3, 64, generator=generator).to(DEVICE, k.dtype).transpose(0, 1)[:, 1]
    room = torch.full((22, 3, 64), 7.0, device=DEVICE, dtype=k.dtype)
    out = segment_attention(q, k, v, Window(segments, device=DEVICE), out=room[1:21], backend=backend)
    assert out.data_ptr() == room[1:].data_ptr()
    assert relative_error(out, brute_force(q, k, v, segments)[0]) <= limits(k.dtype, segments)[0]
    assert (room[0] == 7).all() and (room[21] == 7).all()


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_update_in_place_is_what_the_next_call_reads(backend):
    segments = [Segment(0, 64), Segment(256, 200, 5)]
    k, v, generator = make_pool(500, 1, 64, segments, dtype_of(backend))
    q = torch.randn(8, 1, 64, generator=generator).to(DEVICE, k.dtype)
    window = Window([Segment(0, 1)], device=DEVICE, rope=ROPES[64], capacity=4)
    addresses = [t.data_ptr() for t in window.tables]
    for chosen in (segments, segments[::-1], segments[:1]):
        window.update(chosen)
        got = segment_attention(q, k, v, window, backend=backend)
        assert relative_error(got, brute_force(q, k, v, chosen)[0]) <= limits(k.dtype, chosen)[0]
    assert addresses == [t.data_ptr() for t in window.tables]


@pytest.mark.parametrize("backend", MASS_BACKENDS)
@pytest.mark.parametrize("captured", [1, 5])
def test_mass_of_a_replay_with_other_segments_stays_inside(backend, captured):
    """What a captured graph does when the window changed: mass sized for `captured` segments, three in the tables."""
    segments = [Segment(0, 150), Segment(200, 100), Segment(130, 9)]
    k, v, generator = make_pool(400, 2, 64, segments, dtype_of(backend))
    q = torch.randn(9, 2, 64, generator=generator).to(DEVICE, k.dtype)
    window = make_window(segments, 64)
    out = torch.empty_like(q)
    room = torch.full((4, captured), 7.0, device=DEVICE)
    tables = window.tables
    torch.ops.worldkv.segment_attention(q, k, v, *tables, out, None, room[1:3], 0.125, False, False, backend)
    given = torch.full_like(room, 7.0)
    of_given = segment_attention(q, k, v, window, return_mass=True, out_mass=given[1:3], backend=backend)
    assert of_given[1].data_ptr() == given[1:3].data_ptr() and torch.equal(given, room)
    want, _, want_mass = brute_force(q, k, v, segments)
    of_out, of_mass = limits(k.dtype, segments)
    assert relative_error(out, want) <= of_out
    shared = min(captured, 3)
    assert relative_error(room[1:3, :shared], want_mass[:, :shared]) <= of_mass
    assert (room[1:3, shared:] == 0).all() and (room[0] == 7).all() and (room[3] == 7).all()


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("kv_heads", [2, 3])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_head_of_the_pools_serves_several_of_the_queries(backend, kv_heads, shifted):
    """Pools whose heads are not dense in a row, beside a head of NaN that serves none."""
    segments = [Segment(0, 150, 4 * shifted), Segment(200, 100), Segment(130, 9, -3 * shifted)]
    k, v, generator = make_pool(400, kv_heads + 1, 64, segments, dtype_of(backend))
    k[:, 0], v[:, 0] = math.nan, math.nan
    k, v = k[:, 1:], v[:, 1:]
    q = torch.randn(9, 6, 64, generator=generator).to(DEVICE, k.dtype)
    got = segment_attention(q, k, v, make_window(segments, 64), backend=backend, **extras(backend))
    of_out, of_sums = limits(k.dtype, segments)
    for have, want, limit in zip(got, brute_force(q, k, v, segments), (of_out, of_sums, of_sums), strict=False):
        assert relative_error(have, want) <= limit


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: 400,000 rows and a graph replay")
def test_long_window_and_graph_replay_on_a_gpu():
    segments = [Segment(0, 400_000)]
    k, v, generator = make_pool(400_100, 2, 128, segments, torch.bfloat16)
    q = torch.randn(200, 2, 128, generator=generator).to(DEVICE, torch.bfloat16)
    for rope in (None, ROPES[128]):
        window = Window(segments, device=DEVICE, rope=rope)
        out, mass = segment_attention(q, k, v, window, return_mass=True)
        assert relative_error(out, brute_force(q, k, v, segments)[0]) <= 2e-2
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, mass = segment_attention(q, k, v, window, return_mass=True)
        window.update([Segment(1000, 300, 5 if rope else 0), Segment(77, 3), Segment(0, 1)])
        graph.replay()
        want, _, want_mass = brute_force(q, k, v, window.segments)
        assert relative_error(out, want) <= 2e-2
        assert mass.shape[1] == 1 and relative_error(mass, want_mass[:, :1]) <= 2e-2


GOOD = {"q": (8, 2, 64), "k_pool": (256, 2, 64), "v_pool": (256, 2, 64)}
BAD_TENSORS = [
    ("q", torch.zeros(2, 64), ValueError, "q_len, heads, head_dim"),
    ("q", torch.zeros(0, 2, 64), ValueError, "q_len >= 1"),
    ("q", torch.zeros(8, 2, 80), ValueError, "head_dim 64 or 128"),
    ("q", torch.zeros(8, 2, 64, dtype=torch.float64), TypeError, "bfloat16 or torch.float16 or torch.float32"),
    ("q", torch.zeros(8, 64, 2).transpose(1, 2), ValueError, "contiguous in its last 1"),
    ("q", None, TypeError, "a tensor"),
    ("k_pool", torch.zeros(256, 3, 64), ValueError, "[256, kv_heads, 64] with kv_heads a divisor of q's 2 heads"),
    ("k_pool", torch.zeros(256, 0, 64), ValueError, "[256, kv_heads, 64] with kv_heads a divisor of q's 2 heads"),
    ("k_pool", torch.zeros(256, 4, 64), ValueError, "[256, kv_heads, 64] with kv_heads a divisor of q's 2 heads"),
    ("k_pool", torch.zeros(256, 2, 128), ValueError, "[rows, kv_heads, 64]"),
    ("k_pool", torch.zeros(256, 2, 64, dtype=torch.bfloat16), TypeError, "torch.float32"),
    ("k_pool", torch.zeros(256, 2, 64, device="meta"), ValueError, "on "),
    ("v_pool", torch.zeros(255, 2, 64), ValueError, "[256, 2, 64]"),
    ("v_pool", torch.zeros(256, 1, 64), ValueError, "[256, 2, 64]"),
    ("out", torch.zeros(8, 2, 65), ValueError, "[8, 2, 64]"),
    ("q", np.zeros((800, 2, 64), np.float32), TypeError, "head_dim], got a numpy array [800, 2, 64] float32"),
    ("q", [[0.0] * 64] * 99, TypeError, "0.0, ..."),
]


@pytest.mark.parametrize(("argument", "value", "error", "wanted"), BAD_TENSORS)
def test_bad_tensors_are_named(argument, value, error, wanted):
    given = {name: torch.zeros(shape, device=DEVICE) for name, shape in GOOD.items()}
    given[argument] = value.to(DEVICE) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value
    with pytest.raises(error) as caught:
        segment_attention(**given, window=Window([Segment(0, 9)], device=DEVICE))
    message = str(caught.value)
    assert message.startswith(f"segment_attention: {argument} must be") and wanted in message and ", got " in message


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"q": torch.zeros(8, 3, 64, device=DEVICE)},
            ValueError,
            "k_pool must be [256, kv_heads, 64] with kv_heads a divisor of q's 3 heads, got [256, 2, 64]",
        ),
        ({"window": [Segment(0, 9)]}, TypeError, "window must be a worldkv_kernels.Window, got"),
        ({"window": Window([Segment(250, 7)], device=DEVICE)}, ValueError, "pool's 256 rows, got 'last row 256'"),
        *[
            ({"scale": scale}, ValueError, f"scale must be from 1e-25 to 1e+25, got {scale}")
            for scale in (0.0, -1.0, math.inf, math.nan, 1e-46, 9e-26, 1.1e25, 1e37)
        ],
        ({"scale": "x"}, TypeError, "scale must be a number, got 'x'"),
        ({"scale": True}, TypeError, "scale must be a number, got True"),
        ({"return_lse": "no"}, TypeError, "return_lse must be True or False, got 'no'"),
        ({"return_mass": 1}, TypeError, "return_mass must be True or False, got 1"),
        ({"out_mass": torch.empty(2, 1)}, ValueError, "out_mass must be None without return_mass, got [2, 1]"),
        (
            {"out_mass": torch.empty(1, 4, device=DEVICE), "return_mass": True},
            ValueError,
            "out_mass must be [2, segments], got [1, 4]",
        ),
        ({"out_mass": [0.0], "return_mass": True}, TypeError, "out_mass must be a tensor [2, segments], got"),
        ({"backend": 1}, TypeError, "backend must be None or a name, got 1"),
        ({"backend": "tpu"}, ValueError, "must be None or one of 'cuda', 'triton', 'sdpa', 'reference', got 'tpu'"),
        (
            {"window": Window([Segment(0, 9, 1)], device=DEVICE, rope=Rope3D(128))},
            ValueError,
            "window.rope must be for head_dim 64",
        ),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    given = {name: torch.zeros(shape, device=DEVICE) for name, shape in GOOD.items()}
    given["window"] = Window([Segment(0, 9)], device=DEVICE)
    with pytest.raises(error, match="segment_attention: ") as caught:
        segment_attention(**{**given, **change})
    assert message in str(caught.value)


def test_inputs_that_want_a_gradient_are_refused_and_taken_without_one():
    q = torch.zeros(8, 2, 64, device=DEVICE, requires_grad=True)
    pool, window = torch.zeros(256, 2, 64, device=DEVICE), Window([Segment(0, 9)], device=DEVICE)
    with pytest.raises(ValueError, match="segment_attention: q must be without requires_grad, since nothing flows"):
        segment_attention(q, pool, pool, window)
    with torch.no_grad():
        assert segment_attention(q, pool, pool, window).shape == q.shape
    with pytest.raises(ValueError, match="q must be without requires_grad"):  # what was taken without one, too
        segment_attention(q, pool, pool, window)


def rows_of(pool, first=0, step=1):
    return pool[first : first + 8 * step : step]


@pytest.mark.parametrize(
    ("out", "other"),
    [
        (lambda q, k, v: rows_of(k, 248), "k_pool"),
        (lambda q, k, v: rows_of(v), "v_pool"),
        (lambda q, k, v: rows_of(v, 3, 5), "v_pool"),
        (lambda q, k, v: q, "q"),
        (lambda q, k, v: q.view(2, 8, 64).transpose(0, 1), "q"),
    ],
    ids=["last rows", "rows", "every fifth row", "q", "q by heads"],
)
def test_an_out_over_an_input_is_refused(out, other):
    q, k, v = (torch.ones(shape, device=DEVICE) for shape in GOOD.values())
    window = Window([Segment(0, 9)], device=DEVICE)
    with pytest.raises(ValueError, match=f"segment_attention: out must not overlap {other}, got .*bytes.* and "):
        segment_attention(q, k, v, window, out=out(q, k, v))
    assert all((x == 1).all() for x in (q, k, v))


@pytest.mark.parametrize("which", ["rows", "heads", "rows run into each other", "mass"])
def test_an_out_over_itself_is_refused(which):
    q, k, v = (torch.ones(shape, device=DEVICE) for shape in GOOD.values())
    q_len, heads, head_dim = q.shape
    room = torch.zeros(q_len, heads, head_dim, device=DEVICE)
    given = {
        "rows": {"out": room[:1].expand(q_len, -1, -1)},
        "heads": {"out": room[:, :1].expand(-1, heads, -1)},
        "rows run into each other": {"out": room.as_strided(q.shape, (heads * head_dim - 1, head_dim, 1))},
        "mass": {"out_mass": torch.zeros(1, 1, device=DEVICE).expand(heads, -1), "return_mass": True},
    }[which]
    window = Window([Segment(0, 9)], device=DEVICE)
    name = "mass" if which == "mass" else "out"
    with pytest.raises(ValueError, match=rf"segment_attention: {name} must not overlap itself, got \[.*with stride"):
        segment_attention(q, k, v, window, **given)
    assert not room.any()


def test_an_out_beside_the_inputs_in_one_storage():
    """Rows after a pool's, rows between a pool's, and the other half of q's."""
    both = torch.randn(300, 2, 2, 64, device=DEVICE)
    queries = torch.randn(2, 8, 2, 64, device=DEVICE)
    window, k, v = Window([Segment(0, 9)], device=DEVICE), both[:256, 0], both[:256, 1]
    want = segment_attention(queries[0], k, v, window)
    pool = torch.randn(600, 2, 64, device=DEVICE)
    pool[: 2 * 256 : 2] = k
    for keys, out in ((k, both[256:264, 1]), (k, queries[1]), (pool[: 2 * 256 : 2], pool[1:17:2])):
        assert torch.equal(segment_attention(queries[0], keys, v, window, out=out), want)


def test_an_empty_window_cannot_be_made():
    with pytest.raises(ValueError, match="Window: segments must hold at least one segment, got none"):
        Window([], device=DEVICE)


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_opcheck_and_compile(kv_heads):
    segments = [Segment(0, 40, 3), Segment(128, 50)]
    k, v, generator = make_pool(256, kv_heads, 64, segments, torch.float32)
    q = torch.randn(8, 2, 64, generator=generator).to(DEVICE)
    window = Window(segments, device=DEVICE, rope=ROPES[64])
    out, lse, mass = segment_attention(q, k, v, window, return_lse=True, return_mass=True)
    tables = window.tables
    # NaN rows would make opcheck's comparison of inputs fail.
    k, v = k.nan_to_num(), v.nan_to_num()
    args = (q, k, v, *tables, out.clone(), lse.clone(), mass.clone(), 0.125, True, False, "auto")
    torch.library.opcheck(torch.ops.worldkv.segment_attention.default, args)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q, k, v):
        return segment_attention(q * 1, k, v, window, return_lse=True, return_mass=True)

    for have, want in zip(compiled(q, k, v), (out, lse, mass), strict=True):
        assert torch.equal(have, want)


def test_keys_of_one_score_weigh_the_same_however_large_it_is():
    """Keys that are one another's permutations under a constant query: their sums in fp32 end some ulp apart, and an
    ulp of these is worth many times a weight."""
    generator = torch.Generator().manual_seed(0)
    base = 1e4 * torch.randn(64, generator=generator).abs()
    k = torch.stack([base[torch.randperm(64, generator=generator)] for _ in range(435)]).half()[:, None].repeat(1, 2, 1)
    q, v = torch.full((5, 2, 64), 3e4).half(), torch.randn(435, 2, 64, generator=generator).half()
    window = Window([Segment(0, 430), Segment(430, 5)], device="cpu")
    out, mass = segment_attention(q, k, v, window, return_mass=True, backend="reference")
    assert torch.allclose(mass[:, 1], torch.tensor(5 / 435), rtol=1e-5)
    assert torch.allclose(out, v.float().mean(dim=0).half().expand_as(out), atol=2e-3)
