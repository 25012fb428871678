"""participation against float64 brute force and against what segment_attention says of the same window."""

import math

import pytest
import torch
from conftest import DEVICE, backends, relative_error
from hypothesis import given, settings
from test_segment_attention import ROPES, exact_scores, make_pool, make_window, rotated, segments_strategy

from worldkv_kernels import Rope3D, Segment, Window, participation, segment_attention
from worldkv_kernels.ops.participation import BACKENDS

BACKEND_NAMES = backends(BACKENDS)
# Two segments share a block of tail rows, and one names rows of another again.
SEGMENTS = [Segment(10, 150), Segment(200, 1), Segment(230, 128), Segment(20, 30)]
SHIFTED = [s._replace(time_shift=t) for s, t in zip(SEGMENTS, (7, -3, 0, 40), strict=True)]
WEIGHTED = [s._replace(log_weight=w) for s, w in zip(SEGMENTS, (-8, 3.5, 0, 8), strict=True)]
BOTH = [s._replace(log_weight=w.log_weight) for s, w in zip(SHIFTED, WEIGHTED, strict=True)]
KINDS = {"plain": SEGMENTS, "shifted": SHIFTED, "weighted": WEIGHTED, "both": BOTH}


def weights(q, k, segments, scale=None):
    """[heads, q_len, tokens] in float64: shares of the softmax over all segments, of keys that are rewritten."""
    q, k = q.double().cpu(), k.cpu().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    keys = torch.cat([rotated(k[s.first_row : s.first_row + s.num_rows], s.time_shift, q.shape[2]) for s in segments])
    scores = torch.einsum("qhd,khd->hqk", q, keys) * (q.shape[2] ** -0.5 if scale is None else scale)
    of_rows = torch.cat([torch.full((s.num_rows,), s.log_weight, dtype=torch.float64) for s in segments])
    return (scores - scores.amax(-1, keepdim=True) + of_rows).softmax(-1)


def problem(segments, q_len=37, heads=2, kv_heads=2, head_dim=64, dtype=torch.float32, seed=0):
    """q, K with NaN in every row that no segment names, the window, and its lse."""
    rows = max(s.first_row + s.num_rows for s in segments) + 70
    k, v, generator = make_pool(rows, kv_heads, head_dim, segments, dtype, seed)
    q = torch.randn(q_len, heads, head_dim, generator=generator).to(DEVICE, dtype)
    window = make_window(segments, head_dim)
    return q, k, window, segment_attention(q, k, v, window, return_lse=True, backend="reference")[1]


def check(backend, segments, limit=5e-6, **sizes):
    q, k, window, lse = problem(segments, **sizes)
    got = participation(q, k, window, lse, backend=backend)
    assert got.shape == (q.shape[1], window.num_tokens) and got.dtype == torch.float32
    assert relative_error(got, weights(q, k, segments).mean(1)) <= limit
    return got


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@settings(max_examples=60 if DEVICE.type == "cuda" else 6, deadline=None, derandomize=True)
@given(segments=segments_strategy(6, 200, 500))
def test_random_windows_match_float64(backend, segments):
    seed = sum(s.first_row + s.num_rows for s in segments) % 80
    segments = segments if seed % 2 else [s._replace(time_shift=0) for s in segments]
    check(backend, segments, q_len=1 + seed % 70, kv_heads=1 + seed // 40, seed=seed)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(segments=segments_strategy(30, 3000, 9000))
def test_long_random_windows_match_float64_on_the_default_backend(segments):
    check(None, segments, heads=1, kv_heads=1, head_dim=128)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_shifts_weights_and_grouped_heads(backend, kind):
    check(backend, KINDS[kind], heads=2, kv_heads=1, head_dim=128 if kind == "both" else 64)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("q_len", [1, 32, 65])
@pytest.mark.parametrize("num_rows", [1, 127, 128, 129])
def test_tile_edges(backend, num_rows, q_len):
    check(backend, [Segment(3, num_rows), Segment(0, 1)], q_len=q_len, heads=1, kv_heads=1)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_half_precision_shares_are_those_that_attention_took(backend, kind, dtype):
    """Queries that turn are rounded as in attention; so rows sum to 1, and segments to their mass, up to fp32."""
    reason = BACKENDS.backends[backend].unsupported((dtype, 64, 0, False, False, True))
    if reason:
        pytest.skip(f"{reason}; fp16 stands in for them there")
    segments = KINDS[kind]
    got = check(backend, segments, q_len=70, dtype=dtype, limit=1e-2 if dtype == torch.bfloat16 else 1e-3)
    q, k, window, _ = problem(segments, q_len=70, dtype=dtype)
    mass = segment_attention(q, k, k, window, return_mass=True, backend="reference")[1]
    of_segments = [part.sum(1) for part in got.split([s.num_rows for s in segments], dim=1)]
    torch.testing.assert_close(torch.stack(of_segments, dim=1), mass, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(got.sum(1), torch.ones_like(got[:, 0]), rtol=5e-6, atol=0)


@pytest.mark.parametrize("backend", [name for name in BACKEND_NAMES if name != "reference"])
def test_queries_that_turn_are_rounded_once_to_their_dtype(backend):
    """Which moves each weight by 1e-4 or so, of one query not averaged out, and in a kernel as in the reference."""
    q, k, window, lse = problem(SHIFTED, q_len=1, dtype=torch.float16)
    got, want = (participation(q, k, window, lse, backend=name) for name in (backend, "reference"))
    assert relative_error(got, want) <= 2e-5
    assert relative_error(want, weights(q, k, SHIFTED).mean(1)) > 5e-5


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("kind", ["plain", "both"])
def test_some_of_the_segments_have_their_shares_of_the_whole(backend, kind):
    segments = KINDS[kind]
    q, k, window, lse = problem(segments)
    whole = participation(q, k, window, lse, backend=backend).split([s.num_rows for s in segments], dim=1)
    some = Window([segments[3], segments[0]], device=DEVICE, rope=window.rope, weighted=window.has_weight)
    got = participation(q, k, some, lse, backend=backend)
    torch.testing.assert_close(got, torch.cat([whole[3], whole[0]], dim=1), rtol=1e-5, atol=1e-9)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # by Triton, of rows that are no keys
@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("size", [1e2, 1e3, 1e5])
def test_large_scores_cost_the_digits_that_lse_has_not(backend, size):
    segments = [Segment(0, 200), Segment(260, 40), Segment(210, 1)]
    q, k, _ = exact_scores(300)
    window, scale = make_window(segments, 64), size / (64 * 100003)
    lse = segment_attention(q, k, k, window, scale=scale, return_lse=True, backend="reference")[1]
    assert lse.max() > size * 0.9
    got = participation(q, k, window, lse, scale=scale, backend=backend)
    error = relative_error(got, weights(q, k, segments, scale).mean(1))
    assert error <= 1e-6 + 3e-7 * size


def test_equal_keys_have_equal_shares_however_large_the_scores():
    """Keys that are one another's permutations under a constant query: their sums in fp32 end some ulp apart."""
    generator = torch.Generator().manual_seed(0)
    base = 30 * torch.randn(64, generator=generator).abs()
    k = torch.stack([base[torch.randperm(64, generator=generator)] for _ in range(300)]).half()[:, None]
    q, window = torch.full((5, 1, 64), 300.0).half(), Window([Segment(0, 300)], device="cpu")
    lse = segment_attention(q, k, k, window, return_lse=True, backend="reference")[1]
    got = participation(q, k, window, lse, backend="reference")
    assert lse.min() > 3e4 and (got == got[:, :1]).all()


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize(("kind", "room"), [("both", 1), ("plain", 300), ("both", 309), ("plain", 700)])
def test_out_has_the_size_it_has(backend, kind, room):
    """What a captured graph does when the window changed: 309 tokens in the tables, room for others in out."""
    q, k, window, lse = problem(KINDS[kind])
    around = torch.full((4, room + 3), 7.0, device=DEVICE)
    out = around[1:3, 1:-2]
    flags = (64**-0.5, window.has_shift, window.has_weight, backend)
    torch.ops.worldkv.participation(q, k, *window.tables, lse, out, *flags)
    want, shared = weights(q, k, KINDS[kind]).mean(1), min(room, 309)
    assert relative_error(out[:, :shared], want[:, :shared]) <= 5e-6
    assert (out[:, shared:] == 0).all()
    out.fill_(7)
    assert (around == 7).all()


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_strided_inputs_and_an_update_in_place(backend):
    """Heads that are not dense in a row, in a window of room for more; out is the caller's."""
    k, _, generator = make_pool(400, 6, 64, [Segment(0, 400)], torch.float32)
    q = torch.randn(2, 20, 3, 64, generator=generator).to(DEVICE).transpose(0, 1)[:, 1]
    window = Window([Segment(0, 1)], device=DEVICE, rope=ROPES[64], weighted=True, capacity=9)
    out = torch.full((3, 400), math.nan, device=DEVICE)
    for segments in (BOTH[:2], BOTH[::-1][1:]):
        window.update(segments)
        lse = segment_attention(q, k[:, ::2], k[:, ::2], window, return_lse=True, backend="reference")[1]
        assert participation(q, k[:, ::2], window, lse, out=out, backend=backend) is out
        want = weights(q, k[:, ::2], segments).mean(1)
        assert relative_error(out[:, : want.shape[1]], want) <= 5e-6 and (out[:, want.shape[1] :] == 0).all()


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_the_same_bits_every_time(backend):
    q, k, window, lse = problem(BOTH, heads=1, kv_heads=1)
    runs = [participation(q, k, window, lse, backend=backend) for _ in range(20 if DEVICE.type == "cuda" else 2)]
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: 400,000 rows and a graph replay")
@pytest.mark.parametrize("rope", [None, ROPES[128]])
def test_long_window_and_graph_replay_on_a_gpu(rope):
    k, v, generator = make_pool(400_100, 2, 128, [Segment(0, 400_000)], torch.bfloat16)
    q = torch.randn(200, 2, 128, generator=generator).to(DEVICE, torch.bfloat16)
    window = Window([Segment(0, 400_000)], device=DEVICE, rope=rope)

    def shares():
        lse = segment_attention(q, k, v, window, return_lse=True, backend="triton")[1]
        return participation(q, k, window, lse, backend="triton")

    assert relative_error(shares(), weights(q, k, window.segments).mean(1)) <= 1e-2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = shares()
    window.update([Segment(1000, 300, 5 if rope else 0), Segment(77, 3), Segment(0, 1)])
    graph.replay()
    assert relative_error(out[:, :304], weights(q, k, window.segments).mean(1)) <= 1e-2
    assert (out[:, 304:] == 0).all()


def given_of(**changes):
    given = dict(q=torch.zeros(8, 2, 64), k_pool=torch.zeros(256, 2, 64), lse=torch.zeros(2, 8))
    given = {name: x.to(DEVICE) for name, x in given.items()}
    return {**given, "window": Window([Segment(0, 9)], device=DEVICE), **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(2, 64)}, ValueError, "q must be [q_len, heads, head_dim], got [2, 64]"),
        ({"q": torch.zeros(0, 2, 64), "lse": torch.zeros(2, 0)}, ValueError, "q must be [q_len >= 1, heads, head_dim]"),
        ({"q": torch.zeros(8, 2, 64).double()}, TypeError, "q must be torch.bfloat16 or torch.float16 or torch.float3"),
        ({"q": torch.zeros(8, 2, 64, requires_grad=True)}, ValueError, "q must be without requires_grad"),
        ({"k_pool": torch.zeros(256, 4, 64)}, ValueError, "k_pool must be [256, kv_heads, 64] with kv_heads a divisor"),
        ({"k_pool": torch.zeros(256, 2, 64).half()}, TypeError, "k_pool must be torch.float32, got"),
        ({"lse": None}, TypeError, "lse must be a tensor [2, 8], got None"),
        ({"lse": torch.zeros(8, 2)}, ValueError, "lse must be [2, 8], got [8, 2]"),
        ({"lse": torch.zeros(8, 2).T}, ValueError, "lse must be contiguous in its last 2"),
        ({"lse": torch.zeros(2, 8).half()}, TypeError, "lse must be torch.float32, got"),
        ({"window": [Segment(0, 9)]}, TypeError, "window must be a worldkv_kernels.Window, got [Segment(first_row"),
        ({"window": Window([Segment(250, 7)], device=DEVICE)}, ValueError, "window must be within the pool's 256 rows"),
        (
            {"window": Window([Segment(0, 9)], device=DEVICE, rope=Rope3D(128))},
            ValueError,
            "window.rope must be for head_dim 64",
        ),
        ({"scale": 0.0}, ValueError, "scale must be from 1e-25 to 1e+25, got 0.0"),
        ({"scale": "x"}, TypeError, "scale must be a number, got 'x'"),
        ({"out": torch.zeros(2, 8)}, ValueError, "out must be [2, tokens] of the window's 9 tokens at least, got [2,"),
        ({"out": torch.zeros(3, 9)}, ValueError, "out must be [2, tokens], got [3, 9]"),
        ({"out": torch.zeros(9, 2).T}, ValueError, "out must be contiguous in its last 1"),
        ({"out": torch.zeros(2, 9).half()}, TypeError, "out must be torch.float32, got"),
        ({"backend": 1}, TypeError, "backend must be None or a name, got 1"),
        ({"backend": "cuda"}, ValueError, "backend must be None or one of 'triton', 'reference', got 'cuda'"),
    ],
)
def test_what_is_refused_is_named(changes, error, message):
    changes = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in changes.items()}
    participation(**given_of())
    with pytest.raises(error) as caught:
        participation(**given_of(**changes))
    assert str(caught.value).startswith(f"participation: {message}")


@pytest.mark.parametrize("name", ["q", "k_pool", "lse"])
def test_an_out_over_an_input_is_refused(name):
    given = given_of()
    out = given[name].flatten()[:16].view(2, 8) if name == "lse" else given[name].flatten()[:18].view(2, 9)
    given["window"] = Window([Segment(0, 8)], device=DEVICE)
    with pytest.raises(ValueError, match=f"participation: out must not overlap {name}, got"):
        participation(**given, out=out)


def test_an_out_over_itself_is_refused():
    given = given_of()
    heads, tokens = given["q"].shape[1], given["window"].num_tokens
    room = torch.zeros(1, tokens, dtype=torch.float32, device=DEVICE)
    with pytest.raises(ValueError, match=rf"participation: out must not overlap itself, got \[{heads}, {tokens}\]"):
        participation(**given, out=room.expand(heads, -1))


def test_opcheck_and_compile():
    q, k, window, lse = problem(BOTH, q_len=8)
    k = k.nan_to_num()  # else opcheck's comparison of inputs fails
    want = participation(q, k, window, lse)
    flags = (0.125, True, True, "auto")
    torch.library.opcheck(
        torch.ops.worldkv.participation.default, (q, k, *window.tables, lse, torch.zeros_like(want), *flags)
    )

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q, k, lse):
        return participation(q * 1, k, window, lse)

    assert torch.equal(compiled(q, k, lse), want)


@pytest.mark.parametrize("kind", BACKENDS.kinds[::7])
def test_the_first_use_sees_a_fault(kind):
    """Which `auto` then passes over: of every kind a share that is off by a hundredth is told."""

    def off(*given, **options):
        BACKENDS.run("reference")(*given, **options)
        given[-1].mul_(1.01)

    BACKENDS.loaded["off"] = off
    try:
        assert BACKENDS.disagreement("reference", torch.device("cpu"), kind) is None
        assert "its out differs" in BACKENDS.disagreement("off", torch.device("cpu"), kind)
    finally:
        del BACKENDS.loaded["off"]
