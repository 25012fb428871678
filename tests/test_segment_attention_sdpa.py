"""segment_attention by PyTorch's own attention over the gathered window: what is particular to it."""

import inspect
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import DEVICE, relative_error
from test_segment_attention import ROPES, brute_force, exact_scores, make_pool, make_window, rotated

from worldkv_kernels import Segment, Window, segment_attention
from worldkv_kernels.ops import sdpa
from worldkv_kernels.ops.segment_attention import BACKENDS

CPU = torch.device("cpu")
SEGMENTS = [Segment(700, 300, 5, 0.5), Segment(3, 1), Segment(130, 256, -40, -2.0), Segment(400, 90, 0, 1.0)]
KIND = (torch.float32, 64, 0, False, False, False, False, True, True)


@pytest.fixture
def no_reference(monkeypatch):
    """The reference, called from sdpa, is an error."""

    def refuse(*_, **__):
        raise AssertionError("the reference was called")

    monkeypatch.setattr(sdpa, "reference", refuse)


def problem(dtype=torch.float32, head_dim=64, rows=1100, heads=3, group_size=1, q_len=37, segments=SEGMENTS, **window):
    k, v, generator = make_pool(rows, heads // group_size, head_dim, segments, dtype)
    q = torch.randn(q_len, heads, head_dim, generator=generator).to(DEVICE, dtype)
    return q, k, v, Window(segments, device=DEVICE, rope=ROPES[head_dim], weighted=True, **window)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU takes no weights")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("by_heads", "group_size"), [(0, 1), (10**6, 1), (10**6, 2)])
def test_shifts_weights_and_lse_in_every_dtype(no_reference, monkeypatch, dtype, head_dim, by_heads, group_size):
    monkeypatch.setattr(sdpa, "_BY_HEADS", by_heads)  # of the two ways of gathering, the one
    q, k, v, window = problem(dtype, head_dim, heads=3 * group_size, group_size=group_size)
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
    monkeypatch.delattr(torch, "_scaled_dot_product_flash_attention_for_cpu")
    assert "has no flash attention for CPUs" in sdpa.unavailable(CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if DEVICE.type == "cpu" else [torch.bfloat16])
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


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU takes no fp32")
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
@pytest.mark.parametrize("size", [50.0, 100.0, 1e7, 1e30])
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
    assert bool(calls) == (size > 64)
    wanted = segment_attention(q, k, v, window, backend="reference", **given)
    for have, want in zip(got, wanted, strict=True):
        assert relative_error(have, want) <= (0.0 if calls else 1e-5)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="of a CPU")
@pytest.mark.parametrize("scale", [0.25, 1.0])
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


# --- gathering on the device, and PyTorch's kernels that take lengths from there ---

gather = pytest.importorskip("worldkv_kernels.kernels.gather_window", reason="triton is not installed")


def gathered(k, v, window, has_shift, q_len=7):
    rows = 128 * window.capacity
    made = torch.full((2, rows, *k.shape[1:]), math.nan, dtype=k.dtype, device=DEVICE)
    lengths = torch.full((2, 2), -1, dtype=torch.int32, device=DEVICE)
    tiles, tail_rows, ranges, _, turns, _ = window.tables
    gather.gather_window(
        k, v, tiles, tail_rows, ranges, turns, *made, lengths, q_len=q_len, has_shift=has_shift
    )  # fmt: skip
    return *made, lengths


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float16, 128), (torch.float32, 64)])
def test_the_window_is_gathered_turned_and_followed_by_zeros(dtype, head_dim):
    segments = [Segment(260, 130, 7), Segment(3, 5, -2), Segment(400, 128)]
    k, v, _ = make_pool(600, 4, head_dim, segments, dtype)
    k, v = k[:, ::2], v[:, 1:3]
    order = [(260, 128, 7), (400, 128, 0), (388, 2, 7), (3, 5, -2)]
    window = Window(segments, device=DEVICE, rope=ROPES[head_dim], capacity=6)
    for has_shift in (True, False):
        got_k, got_v, lengths = gathered(k, v, window, has_shift)
        keys = [rotated(k[a : a + n].cpu(), d * has_shift, head_dim) for a, n, d in order]
        limit = 1e-6 if dtype == torch.float32 else 1e-3
        assert relative_error(got_k[:263], torch.cat(keys)) <= limit * has_shift
        assert torch.equal(got_v[:263], torch.cat([v[a : a + n] for a, n, _ in order]))
        assert all((x[263:512] == 0).all() and x[512:].isnan().all() for x in (got_k, got_v))
        assert lengths.tolist() == [[0, 7], [0, 263]]
    window.update([Segment(260, 128)])
    got_k, got_v, lengths = gathered(k, v, window, False)
    assert lengths.tolist() == [[0, 7], [0, 128]] and torch.equal(got_k[:128], k[260:388])
    assert (got_v[128:256] == 0).all() and got_v[256:].isnan().all()


def test_a_full_scratch_has_no_room_for_zeros():
    segments = [Segment(10, 128), Segment(200, 100)]
    k, v, _ = make_pool(300, 1, 64, segments, torch.float16)
    room = torch.full((2, 400, 1, 64), 7.0, dtype=torch.float16, device=DEVICE)
    tiles, tail_rows, ranges, _, turns, _ = Window(segments, device=DEVICE).tables
    lengths = torch.empty((2, 2), dtype=torch.int32, device=DEVICE)
    gather.gather_window(k, v, tiles, tail_rows, ranges, turns, *room[:, 72:328], lengths, q_len=1, has_shift=False)
    assert (room[:, :72] == 7).all() and (room[:, 328:] == 7).all() and (room[:, 300:328] == 0).all()


@pytest.mark.parametrize(
    ("change", "error", "wanted"),
    [
        ({"k_pool": torch.zeros(300, 1, 80)}, ValueError, "head_dim 64 or 128"),
        ({"v_pool": torch.zeros(300, 2, 64)}, ValueError, "head_dim 64 or 128"),
        ({"v_pool": torch.zeros(300, 1, 64).half()}, TypeError, "of one dtype"),
        ({"k_pool": torch.zeros(300, 1, 128)[..., ::2]}, ValueError, "dense in head_dim"),
        ({"ranges": torch.zeros(1, 4, dtype=torch.int32)}, ValueError, "[capacity + 1, 4]"),
        ({"k": torch.zeros(100, 1, 64)}, ValueError, "[128, 1, 64], contiguous"),
        ({"turns": torch.zeros(1, 1, 3), "has_shift": True}, ValueError, "1 to 32 pairs"),
    ],
)
def test_what_it_does_not_take_is_named(change, error, wanted):
    tiles, tail_rows, ranges, _, turns, _ = Window([Segment(0, 9)], device="cpu").tables
    given = dict(k_pool=torch.zeros(300, 1, 64), v_pool=torch.zeros(300, 1, 64), tiles=tiles, tail_rows=tail_rows)
    given |= dict(ranges=ranges, turns=turns, k=torch.zeros(128, 1, 64), v=torch.zeros(128, 1, 64), q_len=1)
    given |= dict(lengths=torch.zeros((2, 2), dtype=torch.int32), has_shift=False)
    with pytest.raises(error, match="gather_window: ") as caught:
        gather.gather_window(**{**given, **change})
    assert wanted in str(caught.value)


def plain(q, k, v, of_q, of_k, scale, *, ignores=False):
    """What PyTorch's flash attention computes, in plain PyTorch."""
    n = len(k) if ignores else int(of_k[1])
    assert all(x.data_ptr() % 16 == 0 for x in (q, k, v))
    assert of_q.tolist() == [0, len(q)] and of_k[0] == 0
    keys, values = (x[:n].float().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * scale
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(q.dtype), scores.logsumexp(-1)


@pytest.fixture
def stand_in(monkeypatch):
    """The way of a GPU on this machine: the gather runs in Triton's interpreter, and `plain` is PyTorch's attention."""
    monkeypatch.setattr(sdpa, "_flash", plain)
    monkeypatch.setattr(sdpa, "_faults", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a stand-in for a GPU")
@pytest.mark.parametrize("heads", [2, 4])
def test_the_way_of_a_gpu_with_plain_attention(stand_in, heads):
    segments = [Segment(260, 130, 7), Segment(3, 5, -2)]
    k, v, generator = make_pool(500, 2, 64, segments, torch.float16)
    q = torch.randn(9, heads, 64, generator=generator).half()
    window = Window(segments, device="cpu", rope=ROPES[64], capacity=5)
    for chosen in (segments, segments[1:]):
        window.update(chosen)
        want, want_lse, _ = brute_force(q, k, v, chosen)
        for query in (q, torch.cat([q.new_zeros(1), q.flatten()])[1:].view(q.shape)):
            out, lse = torch.empty_like(q), torch.empty(heads, 9)
            sdpa._on_gpu(query, k, v, window.tables, out, lse, scale=0.125, has_shift=True, has_weight=False)
            assert relative_error(out, want) <= 1e-3 and relative_error(lse, want_lse) <= 1e-3
    assert [grouped for _, _, _, grouped, _ in sdpa._faults] == [heads == 4]  # what was tried


def ignores_the_lengths(*args):
    return plain(*args, ignores=True)


def serves_every_other_head(q, k, *args):
    """As if a head of K served those of q that are the pools' number of heads apart."""
    q = q.unflatten(1, (-1, k.shape[1])).transpose(1, 2).flatten(1, 2)
    return plain(q, k, *args)


def is_not_built(*args):
    raise RuntimeError("not compiled with it")


def lacks_the_lse(*args):
    out, lse = plain(*args)
    return out, lse * 1.4427


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a stand-in for a GPU")
@pytest.mark.parametrize(
    "wrong, reason",
    [
        (ignores_the_lengths, "its out is wrong"),
        (is_not_built, "RuntimeError: not compiled"),
        (lacks_the_lse, "its lse"),
        (serves_every_other_head, "its out is wrong"),
    ],
)
def test_attention_that_is_wrong_or_missing_is_not_taken(stand_in, monkeypatch, wrong, reason):
    sdpa._check(CPU, torch.float16, 64, False)
    monkeypatch.setattr(sdpa, "_flash", wrong)
    sdpa._check(CPU, torch.float16, 64, False)  # tried once
    for head_dim, grouped in ((64, True), (128, False)):
        if grouped or wrong is not serves_every_other_head:
            with pytest.raises(RuntimeError, match=f"cannot serve sdpa here: .*{reason}"):
                sdpa._check(CPU, torch.float16, head_dim, grouped)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a stand-in for a GPU")
def test_in_a_capture_nothing_is_tried(stand_in, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        RuntimeError, match=r"sdpa must be called once outside a capture, with .*float16, head_dim 64 and grouped heads"
    ):
        sdpa._check(CPU, torch.float16, 64, True)
    sdpa._faults[CPU, torch.float16, 64, True, None] = None
    sdpa._check(CPU, torch.float16, 64, True)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a stand-in for a GPU")
def test_another_flash_attention_is_tried_anew(stand_in, monkeypatch):
    attention = torch.nn.attention
    if not hasattr(attention, "register_flash_attention_impl"):
        pytest.skip(f"torch {torch.__version__} takes no other flash attention")
    sdpa._check(CPU, torch.float16, 64, False)
    monkeypatch.setattr(sdpa, "_flash", ignores_the_lengths)
    attention.register_flash_attention_impl("wrong", register_fn=lambda: SimpleNamespace(remove=lambda: None))
    attention.activate_flash_attention_impl("wrong")
    try:
        with pytest.raises(RuntimeError, match=r"torch \S+ wrong cannot serve sdpa here: its out is wrong"):
            sdpa._check(CPU, torch.float16, 64, False)
    finally:
        attention.restore_flash_attention_impl()
    sdpa._check(CPU, torch.float16, 64, False)


@pytest.mark.parametrize("name", ["fa3", "fa4"])
def test_flash_attn_3_and_4_take_the_place_of_what_is_called(name):
    """PyTorch's own glue for them, by its signature: no GPU or flash-attn is needed to see that the call fits."""
    glue = pytest.importorskip(f"torch.nn.attention._{name}")
    forward = getattr(glue, f"_{name}_flash_attention_forward_impl" + "_default" * (name == "fa3"))
    tensors = [torch.empty(1, device="meta")] * 5
    inspect.signature(forward).bind(*tensors, 9, 256, 0.0, False, False, scale=0.125)  # as in sdpa._flash


def test_what_torch_has_for_a_gpu(monkeypatch):
    device = torch.device("cuda:0")
    monkeypatch.setattr(sdpa, "triton_unavailable", lambda device: None)
    assert sdpa.unavailable(device) is None
    monkeypatch.setattr(sdpa, "_takes_lengths", lambda: False)
    assert "has no attention with lengths on the device" in sdpa.unavailable(device)
    assert "not torch.float32" in sdpa.unsupported_on(device, (torch.float32, *KIND[1:]))
    assert "no log weights" in sdpa.unsupported_on(device, (torch.float16, *KIND[1:5], True, *KIND[6:]))
    assert sdpa.unsupported_on(device, (torch.float16, *KIND[1:])) is None


def test_the_call_fits_the_schema_of_torch():
    """On the meta device: names, number and kinds of arguments, and the shapes that come back."""
    q, k = (torch.empty(n, heads, 64, dtype=torch.float16, device="meta") for n, heads in ((9, 4), (256, 2)))
    lengths = torch.empty(2, 2, dtype=torch.int32, device="meta")
    out, lse = sdpa._flash(q, k, k, *lengths, 0.125)
    assert out.shape == q.shape and lse.shape == (4, 9)


# --- on a GPU ---

on_gpu = pytest.mark.skipif(DEVICE.type != "cuda" or sdpa.unavailable(DEVICE) is not None, reason="needs a GPU")


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("heads", [5, 10])
def test_against_float64_on_a_gpu(dtype, head_dim, shifted, heads):
    segments = [Segment(700, 300, 5), Segment(3, 1), Segment(130, 256, -40), Segment(400, 90)]
    segments = [s if shifted else s._replace(time_shift=0) for s in segments]
    for q_len in (1, 129, 880):
        k, v, generator = make_pool(1100, 5, head_dim, segments, dtype)
        q = torch.randn(q_len, heads, head_dim, generator=generator).to(DEVICE, dtype)
        window = Window(segments, device=DEVICE, rope=ROPES[head_dim] if shifted else None, capacity=9)
        first = segment_attention(q, k, v, window, return_lse=True, backend="sdpa")
        want, want_lse, _ = brute_force(q, k, v, segments)
        of_out, of_lse = (1e-3, 1e-3) if dtype == torch.float16 else (6e-3, 3e-3)
        assert relative_error(first[0], want) <= of_out and relative_error(first[1], want_lse) <= of_lse
        for _ in range(19):
            again = segment_attention(q, k, v, window, return_lse=True, backend="sdpa")
            assert all(map(torch.equal, first, again))


@on_gpu
def test_a_replay_sees_the_window_as_it_is_then():
    segments = [Segment(700, 300, 5), Segment(3, 1), Segment(130, 256, -40)]
    k, v, generator = make_pool(1100, 3, 128, segments, torch.bfloat16)
    q = torch.randn(200, 3, 128, generator=generator).to(DEVICE, torch.bfloat16)
    window = Window(segments, device=DEVICE, rope=ROPES[128], capacity=8)
    segment_attention(q, k, v, window, return_lse=True, backend="sdpa")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = segment_attention(q, k, v, window, return_lse=True, backend="sdpa")
    for chosen in (segments[1:2], segments[::-1], segments[:1], [segments[0]] * 2, segments):
        window.update(chosen)
        graph.replay()
        want, want_lse, _ = brute_force(q, k, v, chosen)
        assert relative_error(out, want) <= 6e-3 and relative_error(lse, want_lse) <= 3e-3
