"""Each file of kernels/ serves alone: copied, without worldkv_kernels, and called with what its docstring says."""

import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worldkv_kernels import Rope3D, Segment, Window

pytest.importorskip("triton", reason="triton is not installed")
from worldkv_kernels.kernels import compress_chunk, norm_rope_append, participation, quantize_chunk, segment_attention

# --- a copy of one file, in a process that has no worldkv_kernels ---

PRELUDE = """
import sys
sys.modules["worldkv_kernels"] = None
import torch
torch.manual_seed(0)
torch.set_num_threads(1)
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_default_device(device)

def close(got, want):
    return got.shape == want.shape and (got.double() - want).norm() <= 1e-5 * want.norm()

def turned(x, angles):  # complex pairs (2i, 2i + 1)
    x = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(x * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
"""

SEGMENT_ATTENTION = """
from segment_attention import segment_attention, window_tables

segments = [(128, 300, 7, -0.5), (0, 1, -3, 3.0), (460, 128, 0)]
lengths = [num for _, num, *_ in segments]
rows = torch.cat([torch.arange(first, first + num) for first, num, *_ in segments])
shifts = torch.cat([torch.full((num,), shift) for _, num, shift, *_ in segments])
of_segment = torch.arange(3).repeat_interleave(torch.tensor(lengths))
q = torch.randn(40, 4, 64)  # two heads share one of K and V
k_pool, v_pool = torch.full((2, 600, 2, 64), float("nan"))
k_pool[rows], v_pool[rows] = torch.randn(2, len(rows), 2, 64)
frequencies = torch.zeros(32)
frequencies[:12] = 10000.0 ** (-torch.arange(12) / 12)

# 32 tiles: keys cut into parts
for of_time, has_weight, capacity in (
    (None, False, None), (frequencies, False, 32), (frequencies, True, None), (None, True, 32), (frequencies, True, 32)
):
    used = [(first, num, shift * (of_time is not None), *weight) for first, num, shift, *weight in segments]
    tables = window_tables(used, of_time, capacity=capacity, device=device)
    out, lse, mass = torch.empty(40, 4, 64), torch.empty(4, 40), torch.empty(4, 3)
    segment_attention(
        q, k_pool, v_pool, *tables, out, lse, mass, scale=0.125, has_shift=of_time is not None,
        has_weight=has_weight,
    )
    angles = shifts[:, None, None] * frequencies.double() * (of_time is not None)
    keys, values = (x.double().repeat_interleave(2, dim=1) for x in (turned(k_pool[rows], angles), v_pool[rows]))
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * 0.125
    scores += has_weight * torch.tensor([-0.5, 3.0, 0.0]).double()[of_segment]
    p = scores.softmax(-1)
    assert close(out, torch.einsum("hqk,khd->qhd", p, values))
    assert close(lse, scores.logsumexp(-1))
    assert close(mass, torch.stack([p[..., of_segment == i].sum(-1).mean(-1) for i in range(3)], -1))
"""

PARTICIPATION = """
from participation import participation

segments = [(0, 130, 7, -0.5), (200, 3, -3, 3.0)]  # a full tile and two tails
rows = torch.tensor([*range(130), *range(200, 203)])
tail_rows = torch.zeros(3 * 128, 2, dtype=torch.int32)
tail_rows[:5] = torch.tensor([[128, 0], [129, 0], [200, 1], [201, 1], [202, 1]])
ranges = torch.tensor([[0, 1, 0, 5], [0, 1, 0, 2], [1, 1, 2, 5], [0, 0, 0, 0]], dtype=torch.int32)
tables = [torch.tensor([[0, 0], [-1, -1], [-1, -1]], dtype=torch.int32), tail_rows, ranges, torch.tensor([2]).int()]
q = torch.randn(40, 4, 64)  # two heads share one of K
k_pool = torch.full((300, 2, 64), float("nan"))
k_pool[rows] = torch.randn(len(rows), 2, 64)
frequencies = torch.zeros(32)
frequencies[:12] = 10000.0 ** (-torch.arange(12) / 12)
of_segment = torch.tensor([0] * 130 + [1] * 3)
angles = torch.tensor([7.0, -3.0])[:, None] * frequencies.double()
turns = torch.stack([angles.cos(), angles.sin()], dim=-1)[:, :12].float()
turns, weights = torch.cat([turns, turns[:1]]), torch.tensor([-0.5, 3.0, 0.0]) / torch.log(torch.tensor(2.0))

for has_shift in (False, True):
    for has_weight in (False, True):
        keys = turned(k_pool[rows], angles[of_segment][:, None] * has_shift).repeat_interleave(2, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * 0.125
        scores += has_weight * torch.tensor([-0.5, 3.0]).double()[of_segment]
        lse, out = scores.logsumexp(-1).float(), torch.full((4, 140), 3.0)
        participation(q, k_pool, *tables, turns, weights, lse, out, scale=0.125, has_shift=has_shift,
                      has_weight=has_weight)
        assert close(out[:, :133], scores.softmax(-1).mean(1)) and (out[:, 133:] == 0).all()
"""

NORM_ROPE_APPEND = """
from norm_rope_append import norm_rope_append

grid, pairs, start_frame, first_row = (2, 3, 5), (12, 10, 10), 4000, 7
frames, height, width = grid
q, k, v = torch.randn(30, 512).split((256, 128, 128), dim=1)  # slices of one projection; four heads and two
q_weight, k_weight = torch.randn(256), torch.randn(128)
rates = torch.cat([10000.0 ** (-torch.arange(n).double() / n) for n in pairs])
of_chunk = torch.tensor([start_frame, 0, 0]).repeat_interleave(torch.tensor(pairs))
angles = (torch.arange(5)[:, None] + of_chunk) * rates  # begins at the chunk's first frame
table = torch.stack([angles.cos(), angles.sin()], dim=-1).float()
token = torch.arange(30)
axes = token // (height * width) + start_frame, token // width % height, token % width
positions = torch.cat([axis[:, None].expand(30, n) for axis, n in zip(axes, pairs)], dim=1)

def normed(x, weight):
    return x.double() * (x.double().square().mean(1, keepdim=True) + 1e-6).rsqrt() * weight.double()

for whole in (True, False):  # with norm and rotation, without
    for row in (torch.tensor([first_row]), first_row):
        k_pool, v_pool = torch.full((2, 50, 2, 64), 3.0)
        q_out = torch.empty(30, 4, 64)
        norm_rope_append(
            q, k, v, k_pool, v_pool, q_out, table if whole else None, row, grid=grid, pairs=pairs,
            q_weight=q_weight if whole else None, k_weight=k_weight if whole else None, eps=1e-6,
            round_before_rope=True,
        )
        for got, x, weight in ((q_out, q, q_weight), (k_pool[7:37], k, k_weight)):
            want = x.double().view(30, -1, 64)
            if whole:
                want = turned(normed(x, weight).view(30, -1, 64), (positions * rates)[:, None])
            assert close(got, want)
        assert torch.equal(v_pool[7:37], v.reshape(30, 2, 64))
        for pool in (k_pool, v_pool):
            assert (pool[:7] == 3).all() and (pool[37:] == 3).all()
"""

COMPRESS_CHUNK = """
from compress_chunk import compress_chunk

frames, frame_tokens, keep = 3, 20, 6
pool_k, pool_v = torch.randn(2, 2, 100, 2, 64)
k, v = pool_k[:, 8:68], pool_v[:, 9:69]  # two layers
how = dict(frames=frames, keep=keep, merge_above=0.0, scale=0.125)
for pooled in (True, False):
    for anchor in range(frames):
        kept = frame_tokens + (frames - 1) * keep
        out_k, out_v = torch.full((2, 2, kept + 1, 2, 64), 3.0)
        index = torch.empty((2, kept), dtype=torch.int32)
        compress_chunk(
            k, v, out_k[:, :-1], out_v[:, :-1], index, None, pooled=pooled, anchor=anchor, rule="similarity", **how
        )
        for layer in range(2):
            keys = k[layer].double().reshape(frames, frame_tokens, 128)
            likeness = torch.cosine_similarity(keys, keys[anchor].mean(0), dim=-1)
            likeness[anchor] = float("inf")
            if pooled:
                chosen = likeness.flatten().argsort()[: (frames - 1) * keep].tolist()
            else:
                others = [f for f in range(frames) if f != anchor]
                chosen = [f * frame_tokens + i for f in others for i in likeness[f].argsort()[:keep].tolist()]
            want = [*range(anchor * frame_tokens, (anchor + 1) * frame_tokens), *sorted(chosen)]
            assert index[layer].tolist() == want
            assert torch.equal(out_k[layer, :-1], k[layer][want]) and torch.equal(out_v[layer, :-1], v[layer][want])
        assert (out_k[:, -1] == 3).all() and (out_v[:, -1] == 3).all()

# By the nearest, and merged: two frames, of which the second is the anchor, so that a token's nearest one is kept.
k, v = k[:, :40], v[:, :40]
out_k, out_v = torch.empty(2, 2, 26, 2, 64)
index, count = torch.empty((2, 2, 26), dtype=torch.int32)
compress_chunk(k, v, out_k, out_v, index, count, pooled=True, anchor=1, rule="nearest", **{**how, "frames": 2})
for layer in range(2):
    keys = k[layer].double().flatten(1)
    cosine = torch.cosine_similarity(keys[:20, None], keys[None, 20:], dim=-1)
    likeness, nearest = cosine.max(1)
    ranked = likeness.argsort()
    want = [*range(20, 40), *ranked[:6].sort().values.tolist()]
    assert index[layer].tolist() == want
    for row, token in enumerate(want):
        joined = [t for t in ranked[6:].sort().values.tolist() if nearest[t] == token - 20]
        assert count[layer, row] == 1 + len(joined)
        members = [token, *(t for t in joined if likeness[t] >= 0)]
        assert close(out_v[layer, row], v[layer, members].double().mean(0))
        mean, square = k[layer, members].double().mean(0), k[layer, members].double().square().sum(-1).mean(0)
        stretch = 1 + (torch.log(count[layer, row]) / (0.1 * square)).clamp(max=1)  # .8 of the scale
        assert close(out_k[layer, row], mean * (square.sqrt() / mean.norm(dim=-1) * stretch)[:, None])
"""

QUANTIZE_CHUNK = """
from quantize_chunk import dequantize_chunk, quantize_chunk

pool_k, pool_v = torch.randn(2, 2, 100, 2, 64)
k, v = pool_k[:, 8:78], pool_v[:, 9:79]  # two layers of 70 tokens: groups of 32, 32 and 6
numbers = 70 * 2 * 64
for bits, size in ((8, numbers + 70 * 2 * 4), (4, numbers // 2 + 2 * 3 * 2 * 64 * 4)):
    packed = torch.full((2, 2, size), 255, dtype=torch.uint8)
    quantize_chunk(k, v, packed, bits=bits, group_tokens=32)
    for layer in range(2):
        for which, x in enumerate((k[layer], v[layer])):
            row = packed[layer, which]
            if bits == 8:
                scales = row[numbers:].view(torch.float32).view(70, 2, 1)
                assert torch.equal(scales, x.abs().amax(-1, keepdim=True) / torch.full((), 127.0))
                codes = row[:numbers].view(torch.int8).view(x.shape)
                assert torch.equal(codes, (x / scales).round().to(torch.int8))
            else:
                scales, low = row[numbers // 2 :].view(torch.float32).view(2, 3, 2, 64)
                for group, of_group in enumerate(x.split(32)):
                    assert torch.equal(low[group], of_group.amin(0))
                    step = (of_group.amax(0) - low[group]) / torch.full((), 15.0)
                    assert torch.equal(scales[group], step)
                group = torch.arange(70) // 32
                codes = ((x - low[group]) / scales[group]).round().to(torch.uint8).flatten()
                assert torch.equal(row[: numbers // 2], codes[0::2] | codes[1::2] << 4)
    outs = torch.full((2, 2, 72, 2, 64), 3.0)
    dequantize_chunk(packed, *outs[:, :, 1:-1], bits=bits, group_tokens=32)
    if bits == 8:
        limit = torch.stack([k, v]).abs().amax(-1, keepdim=True) / 127
    else:
        limit = (torch.stack([k, v]).amax() - torch.stack([k, v]).amin()) / 15
    assert ((outs[:, :, 1:-1] - torch.stack([k, v])).abs() <= 0.5001 * limit).all()
    assert (outs[:, :, 0] == 3).all() and (outs[:, :, -1] == 3).all()
    by_table = torch.full_like(outs, 3.0)
    chosen = torch.tensor([(1, 70), (0, 0)], dtype=torch.int32)
    dequantize_chunk(packed, *by_table[:, :, 1:-1], bits=bits, group_tokens=32, chosen=chosen)
    assert torch.equal(by_table[:, 0], outs[:, 1]) and (by_table[:, 1] == 3).all()
"""


@pytest.mark.parametrize(
    ("module", "use"),
    [
        (segment_attention, SEGMENT_ATTENTION), (norm_rope_append, NORM_ROPE_APPEND), (compress_chunk, COMPRESS_CHUNK),
        (quantize_chunk, QUANTIZE_CHUNK), (participation, PARTICIPATION),
    ],
    ids=["segment_attention", "norm_rope_append", "compress_chunk", "quantize_chunk", "participation"],
)  # fmt: skip
def test_one_file_alone(tmp_path, module, use):
    shutil.copy(Path(module.__file__), tmp_path)
    (tmp_path / "use.py").write_text(PRELUDE + use)
    # In this process's environment: conftest asks for Triton's interpreter where there is no GPU.
    done = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


KERNELS = Path(segment_attention.__file__).parent


@pytest.mark.parametrize("name", sorted(path.name for path in KERNELS.glob("*.py") if path.name != "__init__.py"))
def test_a_file_says_its_licence(name):
    assert (KERNELS / name).read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n")


NAN, INF = float("nan"), float("inf")

# --- the window's tables, which are built twice: in place by Window, and here for who has this file alone ---

segment_lists = st.lists(
    st.tuples(st.integers(0, 20000), st.integers(1, 700), st.integers(-60, 60))
    | st.tuples(st.integers(0, 20000), st.integers(1, 700), st.integers(-60, 60), st.floats(-8, 8)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(segment_lists, st.integers(0, 3), st.booleans())
def test_tables_are_those_of_a_window(segments, spare, shifted):
    rope = Rope3D(64) if shifted else None
    frequencies = torch.zeros(32, dtype=torch.float64)
    frequencies[:12] = 10000.0 ** (-torch.arange(12, dtype=torch.float64) / 12)
    if not shifted:
        segments = [(first_row, num_rows, 0, *weight) for first_row, num_rows, _, *weight in segments]
    capacity = sum(-(-num_rows // 128) for _, num_rows, *_ in segments) + spare
    window = Window([Segment(*s) for s in segments], device="cpu", rope=rope, weighted=True, capacity=capacity)
    *tables, turns, weights = segment_attention.window_tables(
        segments, frequencies if shifted else None, capacity=capacity if spare else None, device="cpu"
    )
    *want, want_turns, want_weights = window.tables
    for table, of_window in zip(tables, want, strict=True):
        assert table.dtype == of_window.dtype and torch.equal(table, of_window)
    assert turns.dtype == want_turns.dtype and turns.shape == want_turns.shape
    assert (turns - want_turns).abs().max() <= 1e-7
    assert weights.dtype == want_weights.dtype and torch.equal(weights, want_weights)


@pytest.mark.parametrize(
    ("frequencies", "pairs"), [([0.0] * 32, 1), ([0.5], 1), ([0.5, 0.0, 0.25, 0.0], 3), ([0.5] * 32, 32)]
)
def test_the_table_of_turns_ends_with_the_last_pair_that_turns(frequencies, pairs):
    frequencies = torch.tensor(frequencies)
    *_, turns, _ = segment_attention.window_tables([(0, 5, 3), (9, 1, -2)], frequencies, device="cpu")
    angles = torch.tensor([[3.0], [-2.0]]) * frequencies[:pairs]
    torch.testing.assert_close(turns, torch.stack([angles.cos(), angles.sin()], dim=-1))


def test_segments_may_leave_out_what_has_a_default():
    numpy_segment = np.array([100, 130])
    for short in ([(0, 60), (100, 130)], ((0, 60, 0), numpy_segment)):
        tables = segment_attention.window_tables(short, device="cpu")
        whole = segment_attention.window_tables([(0, 60, 0, 0.0), (100, 130, 0, 0.0)], device="cpu")
        assert all(map(torch.equal, tables, whole))


WANTED_SEGMENT = (
    "must be (first_row, num_rows, time_shift=0, log_weight=0.0) of integers below 2**31 and a number from -8 to 8"
)
WANTED_ROWS = "must have first_row >= 0, num_rows >= 1 and end below row 2**31"
WANTED_FREQUENCIES = "frequencies must be None or a tensor [head_dim / 2]"


@pytest.mark.parametrize(
    ("segments", "error", "wanted"),
    [
        ([], ValueError, "segments must hold at least one, got none"),
        (5, TypeError, "segments must be a list of (first_row, num_rows, time_shift=0, log_weight=0.0), got 5"),
        *[
            ([(0, 5), given], TypeError, f"segments[1] {WANTED_SEGMENT}, got {given}")
            for given in (
                5, (5,), (0, 5, 0, 0.0, 0), (0.0, 5), (0, 5.0), (0, 5, 0.5), (0, 5, NAN), (0, True), (0, 5, 0, True),
                (0, 5, 0, None),
            )
        ],
        ([(0, 5, 0), (-1, 5, 0)], ValueError, f"segments[1] {WANTED_ROWS}, got (-1, 5, 0)"),
        ([(3, 0, 0)], ValueError, f"segments[0] {WANTED_ROWS}, got (3, 0, 0)"),
        ([(2**31 - 5, 5)], ValueError, f"segments[0] {WANTED_ROWS}, got (2147483643, 5)"),
        ([(0, 5, 2)], ValueError, "segments[0] must have time_shift 0 without frequencies, got (0, 5, 2)"),
        (
            [(0, 5, -(2**31))],
            ValueError,
            "segments[0] must have a time_shift of less than 2**31 frames either way, got (0, 5, -2147483648)",
        ),
        ([(0, 5, 0, 8.5)], ValueError, "segments[0] must have a log weight from -8 to 8, got (0, 5, 0, 8.5)"),
        ([(0, 5), (0, 5, 0, NAN)], ValueError, "segments[1] must have a log weight from -8 to 8, got (0, 5, 0, nan)"),
        ([(0, 5, 0, -INF)], ValueError, "segments[0] must have a log weight from -8 to 8, got (0, 5, 0, -inf)"),
        ([(0, 300, 0)], ValueError, "segments must fit capacity=2 tiles of 128 rows, got 3"),
    ],
)  # fmt: skip
def test_segments_that_make_no_tables(segments, error, wanted):
    with pytest.raises(error) as caught:
        segment_attention.window_tables(segments, capacity=2, device="cpu")
    assert str(caught.value) == f"window_tables: {wanted}"


@pytest.mark.parametrize(
    ("given", "error", "wanted"),
    [
        ({"frequencies": [0.5]}, TypeError, f"{WANTED_FREQUENCIES}, got [0.5]"),
        ({"frequencies": torch.zeros(1, 32)}, ValueError, f"{WANTED_FREQUENCIES} of real numbers, got [1, 32]"),
        ({"frequencies": torch.zeros(2) * 1j}, ValueError, f"{WANTED_FREQUENCIES} of real numbers, got [2] torch.comp"),
        ({"frequencies": torch.tensor([0.5, NAN])}, ValueError, f"{WANTED_FREQUENCIES}, finite, got [0.5, nan]"),
        ({"capacity": 2.5}, TypeError, "capacity must be an int or None, got 2.5"),
        ({"capacity": True}, TypeError, "capacity must be an int or None, got True"),
    ],
)
def test_what_else_makes_no_tables(given, error, wanted):
    with pytest.raises(error) as caught:
        segment_attention.window_tables([(0, 5)], **given, device="cpu")
    assert str(caught.value).startswith(f"window_tables: {wanted}")


# --- what would be read or written past a tensor's end ---


class Refuses:
    """Stands for the kernels of a module: no launch may be reached."""

    def __getitem__(self, grid):
        raise AssertionError("launched")


def check_refusal(monkeypatch, module, arguments, changes, error, wanted, op=None):
    for name in list(vars(module)):
        if name.endswith("_kernel"):
            monkeypatch.setattr(module, name, Refuses())
    op = op or module.__name__.rpartition(".")[2]
    launch = getattr(module, op)
    with pytest.raises(AssertionError, match="launched"):  # the arguments are right without the changes
        launch(**arguments)
    with pytest.raises(error) as caught:
        launch(**{**arguments, **changes})
    assert str(caught.value).startswith(f"{op}: {wanted}")


def test_a_scale_may_be_numpys(monkeypatch):
    launched = []

    class Launch:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append(arguments)

    monkeypatch.setattr(segment_attention, "segment_attention_kernel", Launch())
    monkeypatch.setattr(participation, "participation_kernel", Launch())
    segment_attention.segment_attention(**{**attention_arguments(), "mass": None, "scale": np.float32(0.125)})
    participation.participation(**{**participation_arguments(), "scale": np.float32(0.125)})
    scaled = [[x for x in arguments if isinstance(x, float | np.floating)] for arguments in launched]
    assert scaled == [[0.125 * 1.4426950408889634, 0.25], [0.125 * 1.4426950408889634]]
    assert {type(x) for of_kernel in scaled for x in of_kernel} == {float}  # Triton takes no number of numpy


def not_tensors(*names):
    return [({name: x}, TypeError, f"{name} must be a tensor, got {x}") for name in names for x in (None, 0.5)]


NOT_NUMBERS = ("0.1", None, True, torch.tensor(0.1))
UNSUPPORTED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.float64)
TABLE_NAMES = ("tiles", "tail_rows", "ranges", "num_segments")
TABLES = "tiles, tail_rows, ranges and num_segments must be torch.int32 [3, 2], [384, 2], [4, 4] and [1]"


def attention_arguments():
    k_pool, v_pool = torch.zeros(2, 300, 2, 64)
    tables = (torch.zeros(shape, dtype=torch.int32) for shape in ((3, 2), (384, 2), (4, 4), (1,)))
    return dict(
        q=torch.zeros(5, 2, 64), k_pool=k_pool, v_pool=v_pool, **dict(zip(TABLE_NAMES, tables, strict=True)),
        turns=torch.zeros(3, 32, 2), weights=torch.zeros(3), out=torch.zeros(5, 2, 64),
        lse=torch.zeros(2, 5), mass=torch.zeros(2, 1), scale=0.125, has_shift=True, has_weight=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "wanted"),
    [
        *not_tensors(*TABLE_NAMES, "q", "k_pool", "v_pool", "turns", "weights", "out"),
        *[({"scale": x}, TypeError, "scale must be a number, got ") for x in NOT_NUMBERS],
        ({"q": torch.zeros(5, 128)}, ValueError, "q must be [q_len, heads, head_dim]"),
        ({"q": torch.zeros(5, 2, 32)}, ValueError, "q must be [q_len, heads, head_dim] with head_dim 64 or 128"),
        (
            {"q": torch.zeros(1, 5, 2, 64)},
            ValueError,
            "q must be [q_len, heads, head_dim] with head_dim 64 or 128, without a batch dimension, got [1, 5, 2, 64]",
        ),
        ({"q": torch.zeros(0, 2, 64)}, ValueError, "q must be [q_len, heads, head_dim], heads not first"),
        ({"q": torch.zeros(5, 0, 64)}, ValueError, "q must be [q_len, heads, head_dim], heads not first"),
        ({"q": torch.zeros(2, 600, 64)}, ValueError, "q must be [q_len, heads, head_dim], heads not first"),
        ({"v_pool": torch.zeros(300, 2, 128)}, ValueError, "v_pool must be of head_dim 64, which K and V share, got"),
        *[
            (
                {x: torch.zeros(n, 2, 64).to(dtype) for x, n in dict(q=5, out=5, k_pool=300, v_pool=300).items()},
                TypeError,
                "q must be torch.bfloat16 or torch.float16 or torch.float32, got [5, 2, 64] torch.",
            )
            for dtype in UNSUPPORTED
        ],
        *[
            ({"scale": scale}, ValueError, f"scale must be from 1e-25 to 1e25, got {scale}")
            for scale in (-1.0, 0.0, 1e-46, 1e37, float("inf"), float("nan"))
        ],
        ({"q": torch.zeros(5, 2, 128)[..., ::2]}, ValueError, "q, k_pool, v_pool and out must be dense in head_dim"),
        (
            {"k_pool": torch.zeros(300, 1, 64)},
            ValueError,
            "k_pool and v_pool must be [300, 1 to 2 heads, 64], got k_pool [300, 1, 64] torch.float32, stride (64, 64, "
            "1); v_pool [300,",
        ),
        (
            {x: torch.zeros(300, 3, 64) for x in ("k_pool", "v_pool")},
            ValueError,
            "k_pool and v_pool must be [300, 1 to",
        ),
        (
            {x: torch.zeros(300, 0, 64) for x in ("k_pool", "v_pool")},
            ValueError,
            "k_pool and v_pool must be [300, 1 to",
        ),
        (
            {
                **{x: torch.zeros(5, 4, 64) for x in ("q", "out")},
                **{x: torch.zeros(300, 3, 64) for x in ("k_pool", "v_pool")},
            },
            ValueError,
            "k_pool and v_pool must be of heads that divide q's 4, got k_pool [300, 3, 64]",
        ),
        ({"k_pool": torch.zeros(300, 2, 32)}, ValueError, "k_pool and v_pool must be [300, 1 to 2 heads, 64]"),
        ({"k_pool": torch.zeros(300, 128)}, ValueError, "k_pool and v_pool must be [300, 1 to 2 heads, 64]"),
        ({"v_pool": torch.zeros(299, 2, 64)}, ValueError, "k_pool and v_pool must be [300, 1 to 2 heads, 64]"),
        (
            {"v_pool": torch.zeros(300, 2, 64, 2)[..., 0]},
            ValueError,
            "q, k_pool, v_pool and out must be dense in head_dim",
        ),
        (
            {"v_pool": torch.zeros(300, 2, 64).half()},
            TypeError,
            "q, k_pool, v_pool and out must be of one dtype, got q torch.float32; k_pool torch.float32; v_pool "
            "torch.float16; out torch.float32",
        ),
        ({"out": torch.zeros(4, 2, 64)}, ValueError, "out must be [5, 2, 64], got [4, 2, 64]"),
        ({"lse": torch.zeros(5, 2)}, ValueError, "lse must be torch.float32 [2, 5], contiguous"),
        ({"lse": torch.zeros(5, 2).T}, ValueError, "lse must be torch.float32 [2, 5], contiguous"),
        ({"lse": torch.zeros(2, 5).half()}, ValueError, "lse must be torch.float32 [2, 5], contiguous"),
        ({"mass": torch.zeros(3, 1)}, ValueError, "mass must be torch.float32 [2, max_segments]"),
        ({"mass": torch.zeros(())}, ValueError, "mass must be torch.float32 [2, max_segments], got []"),
        ({"k_pool": torch.zeros(())}, ValueError, "k_pool and v_pool must be [rows, 1 to 2 heads, 64], got k_pool []"),
        ({"tiles": torch.zeros(()).int()}, ValueError, "tiles, tail_rows, ranges and num_segments must be torch.int32"),
        ({"tiles": torch.zeros(3, 2).long()}, ValueError, TABLES),
        (
            {"tiles": torch.zeros(4, 2).int()},
            ValueError,
            "tiles, tail_rows, ranges and num_segments must be torch.int32 [4, 2], [512, 2]",
        ),  # of another capacity
        ({"tiles": torch.zeros(2, 3).int().T}, ValueError, TABLES),
        ({"tail_rows": torch.zeros(383, 2).int()}, ValueError, TABLES),
        ({"ranges": torch.zeros(3, 4).int()}, ValueError, TABLES),
        ({"num_segments": torch.ones(1).long()}, ValueError, TABLES),
        *[
            ({"turns": turns}, ValueError, "turns must be torch.float32 [3, 1 to 32 pairs, 2], contiguous, got")
            for turns in (
                torch.zeros(1, 1, 2),
                torch.zeros(3, 2),
                torch.zeros(3, 0, 2),
                torch.zeros(3, 33, 2),
                torch.zeros(3, 12, 2).double(),
                torch.zeros(3, 24, 2)[:, ::2],
            )
        ],
        *[
            ({"weights": weights}, ValueError, "weights must be torch.float32 [3], contiguous, got")
            for weights in (torch.zeros(1), torch.zeros(3, 1), torch.zeros(3).double(), torch.zeros(6)[::2])
        ],
    ],
)
def test_attention_refuses(monkeypatch, changes, error, wanted):
    check_refusal(monkeypatch, segment_attention, attention_arguments(), changes, error, wanted)


def test_attention_refuses_what_the_interpreter_gets_wrong(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    bf16 = {x: t.bfloat16() for x, t in attention_arguments().items() if x in ("q", "k_pool", "v_pool", "out")}
    wanted = "q must be float16 or float32 in Triton's interpreter, which multiplies bf16 as integers"
    check_refusal(monkeypatch, segment_attention, attention_arguments(), bf16, TypeError, wanted)


def participation_arguments():
    shared = {x: t for x, t in attention_arguments().items() if x not in ("v_pool", "out", "mass")}
    return {**shared, "out": torch.zeros(2, 9)}


@pytest.mark.parametrize(
    ("changes", "error", "wanted"),
    [
        *not_tensors(*TABLE_NAMES, "q", "k_pool", "turns", "weights", "lse", "out"),
        *[({"scale": x}, TypeError, "scale must be a number, got ") for x in NOT_NUMBERS],
        ({"q": torch.zeros(5, 128)}, ValueError, "q must be [q_len, heads, head_dim] with head_dim 64 or 128, without"),
        ({"q": torch.zeros(5, 2, 32)}, ValueError, "q must be [q_len, heads, head_dim] with head_dim 64 or 128"),
        ({"q": torch.zeros(0, 2, 64)}, ValueError, "q must be [q_len, heads, head_dim], heads not first"),
        ({"q": torch.zeros(2, 600, 64)}, ValueError, "q must be [q_len, heads, head_dim], heads not first"),
        *[
            ({"k_pool": torch.zeros(shape)}, ValueError, "k_pool must be [rows, kv_heads, 64] with kv_heads a divisor")
            for shape in ((), (300, 64), (300, 0, 64), (300, 3, 64), (300, 2, 128))
        ],
        (
            {"q": torch.zeros(5, 4, 64), "k_pool": torch.zeros(300, 3, 64)},
            ValueError,
            "k_pool must be [rows, kv_heads, 64] with kv_heads a divisor of q's 4 heads, got [300, 3, 64]",
        ),
        *[
            ({x: torch.zeros(5, 2, 64).to(dtype) for x in ("q", "k_pool")}, TypeError, "q must be torch.bfloat16 or")
            for dtype in UNSUPPORTED
        ],
        (
            {"k_pool": torch.zeros(300, 2, 64).half()},
            TypeError,
            "q and k_pool must be of one dtype, got q torch.float32; k_pool torch.float16",
        ),
        ({"q": torch.zeros(5, 2, 128)[..., ::2]}, ValueError, "q and k_pool must be dense in head_dim"),
        ({"k_pool": torch.zeros(300, 64, 2).mT}, ValueError, "q and k_pool must be dense in head_dim"),
        ({"scale": 1e37}, ValueError, "scale must be from 1e-25 to 1e25, got 1e+37"),
        ({"tiles": torch.zeros(3, 2).long()}, ValueError, TABLES),
        ({"tiles": torch.zeros(2, 3).int().T}, ValueError, TABLES),
        ({"tail_rows": torch.zeros(383, 2).int()}, ValueError, TABLES),
        ({"ranges": torch.zeros(3, 4).int()}, ValueError, TABLES),
        ({"turns": torch.zeros(3, 33, 2)}, ValueError, "turns must be torch.float32 [3, 1 to 32 pairs, 2], contiguous"),
        ({"turns": torch.zeros(3, 24, 2)[:, ::2]}, ValueError, "turns must be torch.float32 [3, 1 to 32 pairs, 2]"),
        ({"weights": torch.zeros(6)[::2]}, ValueError, "weights must be torch.float32 [3], contiguous"),
        ({"lse": torch.zeros(5, 2).T}, ValueError, "lse must be torch.float32 [2, 5], contiguous"),
        ({"lse": torch.zeros(2, 5).double()}, ValueError, "lse must be torch.float32 [2, 5], contiguous"),
        *[
            ({"out": out}, ValueError, "out must be torch.float32 [2, tokens], dense in its tokens, at least one, got")
            for out in (torch.zeros(3, 9), torch.zeros(2, 0), torch.zeros(9, 2).T, torch.zeros(2, 9).half())
        ],
    ],
)
def test_participation_refuses(monkeypatch, changes, error, wanted):
    check_refusal(monkeypatch, participation, participation_arguments(), changes, error, wanted)


def test_participation_refuses_what_the_interpreter_gets_wrong(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    bf16 = {x: t.bfloat16() for x, t in participation_arguments().items() if x in ("q", "k_pool")}
    wanted = "q must be float16 or float32 in Triton's interpreter, which multiplies bf16 as integers"
    check_refusal(monkeypatch, participation, participation_arguments(), bf16, TypeError, wanted)


def test_queries_are_turned_alike_in_both_files():
    """So that shares are those that attention took; each file has the function, since it serves alone."""
    one, other = (inspect.getsource(module._turned_query.fn) for module in (participation, segment_attention))
    assert one == other


def append_arguments():
    q, k, v = torch.zeros(3, 12, 128)
    k_pool, v_pool = torch.zeros(2, 20, 2, 64)
    return dict(
        q=q, k=k, v=v, k_pool=k_pool, v_pool=v_pool, q_out=torch.zeros(12, 2, 64), table=torch.zeros(8, 32, 2),
        first_row=8, grid=(2, 2, 3), pairs=(12, 10, 10), q_weight=torch.zeros(128),
        k_weight=torch.zeros(128), eps=1e-6, round_before_rope=True,
    )  # fmt: skip


AT = torch.zeros(1, dtype=torch.int64)
Q_SIZES = "q must be [12, heads * 64], up to 128 heads, a multiple of the pools' 2"


@pytest.mark.parametrize(
    ("changes", "error", "wanted"),
    [
        *not_tensors("q", "k", "v", "k_pool", "v_pool", "q_out"),
        *[({"eps": x}, TypeError, "eps must be a number, got ") for x in NOT_NUMBERS],
        *[
            ({"grid": grid}, TypeError, f"grid must be (frames, height, width) of ints, got {grid}")
            for grid in (12, (3, 4), (2, 2, 3.0), (12, True, 1))
        ],
        ({"q": torch.zeros(12, 2, 64)}, ValueError, Q_SIZES + ", got [12, 2, 64]"),
        *[
            (
                {"q": torch.zeros(tokens, 128), "grid": grid},
                ValueError,
                f"grid must be (frames, height, width) of q's {tokens} tokens in all, got {grid}",
            )
            for tokens, grid in ((11, (2, 2, 3)), (12, (2, 2, 2)), (12, (2, 3, 5)))
        ],
        *[
            ({"q": torch.zeros(12, columns)}, ValueError, f"{Q_SIZES}, got [12, {columns}]")
            for columns in (0, 64, 160, 192, 130 * 64)
        ],
        ({"k": torch.zeros(12, 64)}, ValueError, "k and v must be [12, 128], got k [12, 64]"),
        ({"k": torch.zeros(12, 2, 64)}, ValueError, "k and v must be [12, 128]"),
        ({"v": torch.zeros(12, 256)[:, ::2]}, ValueError, "q, k and v must be dense in their last dimension"),
        (
            {"v": torch.zeros(12, 128).half()},
            TypeError,
            "q, k, v, q_out, k_pool and v_pool must be of one dtype, got q torch.float32; k torch.float32; v "
            "torch.float16; q_out",
        ),
        ({"k_pool": torch.zeros(20, 128)}, ValueError, "k_pool must be [rows, kv_heads, head_dim]"),
        ({"k_pool": torch.zeros(20, 2, 96)}, ValueError, "k_pool must be [rows, kv_heads, head_dim], heads not first"),
        ({"k_pool": torch.zeros(2, 129, 64)}, ValueError, "k_pool must be [rows, kv_heads, head_dim], heads not first"),
        *[
            (
                {
                    **{x: torch.zeros(12, 128).to(dtype) for x in ("q", "k", "v")},
                    **{x: torch.zeros(20, 2, 64).to(dtype) for x in ("k_pool", "v_pool")},
                    "q_out": torch.zeros(12, 2, 64).to(dtype),
                },
                TypeError,
                "q must be torch.bfloat16 or torch.float16 or torch.float32, got [12, 128] torch.",
            )
            for dtype in UNSUPPORTED
        ],
        *[({"eps": eps}, ValueError, f"eps must be finite and not negative, got {eps}") for eps in (-1e-6, NAN, INF)],
        ({"q_weight": torch.zeros(128).double()}, TypeError, "q_weight must be torch.float32 or"),
        ({"pairs": (40, -4, -4)}, ValueError, "pairs must be three counts that add up to 32, got (40, -4, -4)"),
        ({"v_pool": torch.zeros(19, 2, 64)}, ValueError, "v_pool must be [20, 2, 64], got [19, 2, 64]"),
        (
            {"v_pool": torch.zeros(20, 3, 64)[:, ::2]},
            ValueError,
            "q_out, k_pool and v_pool must be dense in their last two dimensions",
        ),
        (
            {"k_pool": torch.zeros(20, 64, 2).mT},
            ValueError,
            "q_out, k_pool and v_pool must be dense in their last two dimensions",
        ),
        ({"q_out": torch.zeros(11, 2, 64)}, ValueError, "q_out must be [12, 2, 64], got [11, 2, 64]"),
        ({"grid": (2, -2, -3)}, ValueError, "grid must be within the table's 8 positions, got (2, -2, -3)"),
        ({"first_row": 9}, ValueError, "first_row must be from 0 to 8, got 9"),
        ({"first_row": -1}, ValueError, "first_row must be from 0 to 8, got -1"),
        ({"first_row": AT.int()}, TypeError, "first_row must be an int or torch.int64 [1], got [1] torch.int32"),
        ({"first_row": AT[:0]}, TypeError, "first_row must be an int or torch.int64 [1], got [0]"),
        ({"first_row": None}, TypeError, "first_row must be an int or torch.int64 [1], got None"),
        (
            {"table": torch.zeros(8, 64, 2)},
            ValueError,
            "table must be torch.float32 [8, 32, 2], contiguous, got [8, 64, 2]",
        ),
        ({"table": torch.zeros(8, 32, 2).double()}, ValueError, "table must be torch.float32 [8, 32, 2], contiguous"),
        ({"table": torch.zeros(())}, ValueError, "table must be torch.float32 [positions, 32, 2], contiguous, got []"),
        ({"table": torch.zeros(8, 2, 32).mT}, ValueError, "table must be torch.float32 [8, 32, 2], contiguous"),
        ({"table": torch.zeros(2, 32, 2)}, ValueError, "grid must be within the table's 2 positions"),
        ({"grid": (12, 1, 1)}, ValueError, "grid must be within the table's 8 positions, got (12, 1, 1)"),
        ({"pairs": (12, 10, 9)}, ValueError, "pairs must be three counts that add up to 32, got (12, 10, 9)"),
        ({"q_weight": torch.zeros(64)}, ValueError, "q_weight must be None or [128], contiguous"),
        ({"k_weight": torch.zeros(256)[::2]}, ValueError, "k_weight must be None or [128], contiguous"),
    ],
)
def test_append_refuses(monkeypatch, changes, error, wanted):
    check_refusal(monkeypatch, norm_rope_append, append_arguments(), changes, error, wanted)


def compress_arguments():
    k, v = torch.zeros(2, 3, 12, 2, 64)
    out_k, out_v = torch.zeros(2, 3, 8, 2, 64)
    index, count = torch.zeros(2, 3, 8, dtype=torch.int32)
    return dict(
        k=k, v=v, out_k=out_k, out_v=out_v, index=index, count=count, frames=3, keep=2, pooled=True, anchor=0,
        rule="nearest", merge_above=0.9, scale=0.125,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "wanted"),
    [
        *not_tensors("k", "v", "out_k", "out_v", "index"),
        *[({"scale": x}, TypeError, "scale must be a number, got ") for x in NOT_NUMBERS],
        *[({"merge_above": x}, TypeError, "merge_above must be a number, got ") for x in NOT_NUMBERS],
        *[
            ({name: x}, TypeError, f"{name} must be an int, got {x}")
            for name in ("frames", "keep", "anchor")
            for x in (1.5, 1.0, True, None)
        ],
        ({"k": torch.zeros(12, 2, 64)}, ValueError, "k must be [layers, tokens, heads, head_dim], heads not first"),
        ({"k": torch.zeros(1, 2, 600, 64)}, ValueError, "k must be [layers, tokens, heads, head_dim], heads not first"),
        ({"k": torch.zeros(3, 12, 2, 96)}, ValueError, "k must be [layers, tokens, heads, head_dim], heads not first"),
        ({"k": torch.zeros(0, 12, 2, 64)}, ValueError, "k must be of 1 to 65535 layers, got [0, 12, 2, 64]"),
        (
            {"k": torch.zeros(1, 12, 2, 64).expand(65536, -1, -1, -1)},
            ValueError,
            "k must be of 1 to 65535 layers, got [65536, 12, 2, 64]",
        ),
        ({"k": torch.zeros(3, 0, 2, 64)}, ValueError, "frames must be a divisor of the 0 tokens, got 3"),
        *[
            (
                {x: torch.zeros(3, n, 2, 64).to(dtype) for x, n in (("k", 12), ("v", 12), ("out_k", 8), ("out_v", 8))},
                TypeError,
                "k must be torch.bfloat16 or torch.float16 or torch.float32, got [3, 12, 2, 64] torch.",
            )
            for dtype in UNSUPPORTED
        ],
        ({"v": torch.zeros(3, 6, 2, 64)}, ValueError, "v must be [3, 12, 2, 64], got [3, 6, 2, 64]"),
        (
            {"v": torch.zeros(3, 12, 2, 64).half()},
            TypeError,
            "k, v, out_k and out_v must be of one dtype, got k torch.float32; v torch.float16; out_k torch.float32",
        ),
        (
            {"k": torch.zeros(3, 12, 4, 64)[:, :, ::2]},
            ValueError,
            "k, v, out_k and out_v must be dense in their last two dimensions",
        ),
        (
            {"v": torch.zeros(3, 12, 64, 2).mT},
            ValueError,
            "k, v, out_k and out_v must be dense in their last two dimensions",
        ),
        ({"frames": 5}, ValueError, "frames must be a divisor of the 12 tokens, got 5"),
        ({"frames": 0}, ValueError, "frames must be a divisor of the 12 tokens, got 0"),
        ({"anchor": 3}, ValueError, "anchor must be from 0 to 2, got 3"),
        ({"anchor": -1}, ValueError, "anchor must be from 0 to 2, got -1"),
        ({"keep": 0}, ValueError, "keep must be at least 1, got 0"),
        ({"out_k": torch.zeros(3, 7, 2, 64)}, ValueError, "out_k and out_v must be [3, 8, 2, 64], got out_k [3, 7, 2,"),
        (
            {"keep": 9},
            ValueError,
            "out_k and out_v must be [3, 12, 2, 64], got out_k [3, 8, 2, 64]",
        ),  # a frame of 4 is kept whole
        ({"out_v": torch.zeros(2, 8, 2, 64)}, ValueError, "out_k and out_v must be [3, 8, 2, 64]"),
        (
            {"out_v": torch.zeros(3, 8, 3, 64)[:, :, ::2]},
            ValueError,
            "k, v, out_k and out_v must be dense in their last two dimensions",
        ),
        ({"index": torch.zeros(3, 8).long()}, TypeError, "index must be torch.int32"),
        ({"index": torch.zeros(3, 7).int()}, ValueError, "index must be [3, 8], got [3, 7]"),
        ({"index": torch.zeros(3, 16).int()[:, ::2]}, ValueError, "index must be dense in its last dimension"),
        ({"count": torch.zeros(3, 8).long()}, TypeError, "count must be torch.int32"),
        ({"count": torch.zeros(3, 7).int()}, ValueError, "count must be [3, 8], got [3, 7]"),
        ({"count": torch.zeros(3, 16).int()[:, ::2]}, ValueError, "count must be dense in its last dimension"),
        ({"rule": "nearer"}, ValueError, "rule must be 'similarity' or 'nearest', got 'nearer'"),
        *[
            ({"merge_above": limit}, ValueError, f"merge_above must be finite, got {limit}")
            for limit in (INF, -INF, NAN)
        ],
        *[
            ({"scale": scale}, ValueError, f"scale must be from 1e-25 to 1e25, got {scale}")
            for scale in (-1.0, 0.0, 1e-46, INF, NAN)
        ],
    ],
)
def test_compress_refuses(monkeypatch, changes, error, wanted):
    check_refusal(monkeypatch, compress_chunk, compress_arguments(), changes, error, wanted)


@pytest.mark.parametrize("changes", [{}, {"count": None}, {"rule": "similarity"}], ids=["both", "rule", "merge"])
def test_compress_refuses_what_the_interpreter_gets_wrong(monkeypatch, changes):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    bf16 = {x: t.bfloat16() for x, t in compress_arguments().items() if x in ("k", "v", "out_k", "out_v")}
    wanted = "k must be float16 or float32 in Triton's interpreter, which multiplies bf16 as integers"
    check_refusal(monkeypatch, compress_chunk, {**compress_arguments(), **changes}, bf16, TypeError, wanted)


def quantize_arguments():
    k, v = torch.zeros(2, 3, 12, 2, 64)
    return dict(k=k, v=v, packed=torch.zeros(3, 2, 12 * 128 + 12 * 8, dtype=torch.uint8), bits=8, group_tokens=64)


@pytest.mark.parametrize(
    ("changes", "error", "wanted"),
    [
        *not_tensors("k", "v", "packed"),
        *[
            ({name: x}, TypeError, f"{name} must be an int, got {x}")
            for name in ("bits", "group_tokens")
            for x in (8.0, 64.0, True, None)
        ],
        ({"k": torch.zeros(12, 2, 64)}, ValueError, "k must be [layers, tokens, heads, head_dim], heads not first"),
        ({"k": torch.zeros(3, 12, 2, 96)}, ValueError, "k must be [layers, tokens, heads, head_dim], heads not first"),
        ({"k": torch.zeros(3, 12, 129, 64)}, ValueError, "k must be [layers, tokens, heads, head_dim], heads not firs"),
        ({"k": torch.zeros(0, 12, 2, 64)}, ValueError, "k must be of 1 to 65535 layers, at least one token and at"),
        ({"k": torch.zeros(3, 0, 2, 64)}, ValueError, "k must be of 1 to 65535 layers, at least one token and at"),
        ({"k": torch.zeros(1, 1, 2, 64, device="meta").expand(1, 2**30, -1, -1)}, ValueError,
         "k must be of 1 to 65535 layers, at least one token and at most 2**30 tokens times heads"),
        ({"v": torch.zeros(3, 13, 2, 64)}, ValueError, "v must be [3, 12, 2, 64], got [3, 13, 2, 64]"),
        ({"v": torch.zeros(3, 12, 2, 64).half()}, TypeError,
         "k and v must be of one dtype, got k torch.float32; v torch.float16"),
        *[
            ({x: torch.zeros(3, 12, 2, 64).to(dtype) for x in ("k", "v")}, TypeError, "k must be torch.bfloat16 or")
            for dtype in UNSUPPORTED
        ],
        ({"k": torch.zeros(3, 12, 64, 2).mT}, ValueError, "k and v must be dense in their last two dimensions"),
        ({"v": torch.zeros(3, 12, 4, 64)[:, :, ::2]}, ValueError, "k and v must be dense in their last two dimensions"),
        ({"bits": 2}, ValueError, "bits must be 8 or 4, got 2"),
        ({"bits": 4}, ValueError, "packed must be [3, 2, 1792], dense in its last dimension"),
        ({"group_tokens": 48}, ValueError, "group_tokens must be 16, 32, 64 or 128, got 48"),
        ({"group_tokens": 256}, ValueError, "group_tokens must be 16, 32, 64 or 128, got 256"),
        ({"packed": torch.zeros(3, 2, 1632).char()}, TypeError, "packed must be torch.uint8"),
        ({"packed": torch.zeros(3, 2, 1648).byte()}, ValueError, "packed must be [3, 2, 1632], dense in its last dim"),
        ({"packed": torch.zeros(3, 2, 3264).byte()[..., ::2]}, ValueError, "packed must be [3, 2, 1632], dense in its"),
        ({"packed": torch.zeros(3, 2, 1640).byte()[..., :-8]}, ValueError, "packed must be with K and V of every"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("op", ["quantize_chunk", "dequantize_chunk"])
def test_quantize_refuses(monkeypatch, op, changes, error, wanted):
    check_refusal(monkeypatch, quantize_chunk, quantize_arguments(), changes, error, wanted, op=op)


@pytest.mark.parametrize(
    ("changes", "error", "wanted"),
    [
        ({"chosen": torch.zeros(3, 2).long()}, TypeError, "chosen must be torch.int32"),
        ({"chosen": torch.zeros(2, 2).int()}, ValueError, "chosen must be [3, 2], contiguous"),
        ({"chosen": torch.zeros(2, 3).int().mT}, ValueError, "chosen must be [3, 2], contiguous"),
        ({"packed": torch.zeros(2, 1632).byte()}, ValueError, "packed must be [places, 2, 1632], dense in its last"),
        ({"packed": torch.zeros(0, 2, 1632).byte()}, ValueError, "packed must be [1, 2, 1632], dense in its last dim"),
        ({"packed": torch.zeros(70, 2, 1616).byte()}, ValueError, "packed must be [70, 2, 1632], dense in its last"),
    ],
)
def test_dequantize_by_a_table_refuses(monkeypatch, changes, error, wanted):
    by_table = {"packed": torch.zeros(70, 2, 1632).byte(), "chosen": torch.zeros(3, 2).int()}
    arguments = quantize_arguments() | by_table
    check_refusal(monkeypatch, quantize_chunk, arguments, changes, error, wanted, op="dequantize_chunk")
