"""How the Triton kernel deals out its work and reads its tiles: cut items and their merge, the copy engine's path."""

import math

import pytest
import torch
from conftest import DEVICE, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from test_segment_attention import SIZES, brute_force, exact_scores, make_pool, make_window

from worldkv_kernels import Segment, Window, segment_attention
from worldkv_kernels.ops.segment_attention import BACKENDS

pytest.importorskip("triton", reason="triton is not installed")
from worldkv_kernels.kernels import segment_attention as kernel
from worldkv_kernels.kernels.segment_attention import AttentionConfig, Deal, deal

runs = pytest.mark.skipif(
    BACKENDS.backends["triton"].unavailable(DEVICE) is not None, reason="Triton cannot run on this machine"
)
SEGMENTS = [Segment(128, 300, 7), Segment(0, 1, -3), Segment(460, 128), Segment(600, 200, 19)]  # 4 full tiles, 117 rows


@pytest.fixture
def poisoned_scratch():
    """What torch.empty gives is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def make_inputs(q_len, heads, segments, dtype=torch.float32, head_dim=64, group_size=1):
    rows = max(sum(s[:2]) for s in segments) + 9
    k, v, generator = make_pool(rows, heads // group_size, head_dim, segments, dtype)
    return torch.randn(q_len, heads, head_dim, generator=generator).to(DEVICE, dtype), k, v


# --- the deal ---


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(1, 5000), st.integers(1, 200), st.integers(1, 5000))
def test_a_deal_gives_every_item_out_once_and_cuts_none_of_a_full_round(num_items, processors, capacity):
    num_whole, num_cut, parts = deal(num_items, processors, capacity)
    assert num_whole + num_cut == num_items
    assert (num_cut == 0) == (parts == 1)
    assert num_cut == 0 or (num_whole % processors == 0 and num_cut < processors and parts * 8 <= capacity)


def rounds(num_items, processors, capacity):
    """Time in items on processors that each take one program at a time, without the costs of cutting."""
    num_whole, num_cut, parts = deal(num_items, processors, capacity)
    return math.ceil(num_whole / processors) + math.ceil(num_cut * parts / processors) / parts


def test_what_a_deal_saves_on_132_processors():
    """Items of 128 queries: 12 and 40 heads of 2640, 3120 and 4680 queries, in windows of 13,200 keys and more."""
    assert deal(12 * 21, 132, 112) == Deal(252, 0, 1)  # 95 % filled as it is
    assert rounds(12 * 25, 132, 112) <= 2.3 and deal(12 * 25, 132, 112).num_cut == 36  # in place of 3
    assert rounds(12 * 37, 132, 112) <= 3.4 and deal(12 * 37, 132, 112).num_cut == 48  # in place of 4
    assert rounds(40 * 37, 132, 263) <= 11.25 and deal(40 * 37, 132, 263).num_cut == 28  # in place of 12
    assert deal(1, 132, 4000) == Deal(0, 1, 64)  # one query over a long window: all of the chip
    assert deal(1, 132, 15) == Deal(1, 0, 1)  # over a short one: one launch
    assert deal(264, 132, 4000) == Deal(264, 0, 1)


# --- pieces and their merge ---


@runs
@pytest.mark.parametrize(("num_whole", "parts"), [(0, 2), (1, 7), (3, 3)])
@pytest.mark.parametrize("shifted", [False, True])
def test_cut_items_match_float64(monkeypatch, poisoned_scratch, num_whole, parts, shifted):
    """4 items, 2 of each head, the last of 8 queries; with 7 parts some have no full tile and some no row at all."""
    segments = SEGMENTS if shifted else [s._replace(time_shift=0) for s in SEGMENTS]
    q, k, v = make_inputs(40, 2, segments)
    monkeypatch.setattr(kernel, "deal", lambda *_: Deal(num_whole, 4 - num_whole, parts))
    monkeypatch.setattr(kernel, "attention_config", lambda *_: AttentionConfig(32, 64, 4, 1))
    window = make_window(segments, 64)
    got = segment_attention(q, k, v, window, return_lse=True, return_mass=True, backend="triton")
    for have, want in zip(got, brute_force(q, k, v, segments), strict=True):
        assert relative_error(have, want) <= 2e-6
    plain = segment_attention(q, k, v, window, backend="triton")
    assert relative_error(plain, got[0]) <= 1e-6
    if parts == 2:
        again = segment_attention(q, k, v, window, return_lse=True, return_mass=True, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@runs
def test_more_parts_than_tiles_and_a_window_of_one_row(monkeypatch, poisoned_scratch):
    segments = [Segment(5, 1)]
    q, k, v = make_inputs(33, 1, segments)
    monkeypatch.setattr(kernel, "deal", lambda *_: Deal(1, 1, 5))
    out, lse, mass = segment_attention(
        q, k, v, make_window(segments, 64), return_lse=True, return_mass=True, backend="triton"
    )
    assert torch.equal(out, v[5].expand_as(out)) and torch.equal(mass, torch.ones_like(mass))
    assert relative_error(lse, brute_force(q, k, v, segments)[1]) <= 2e-6


@runs
def test_pieces_of_very_different_weight(monkeypatch, poisoned_scratch):
    """Scores up to some thousands: each query's weight lies in one part, which need not be the last."""
    segments = [Segment(0, 300)]
    q, k, v = make_inputs(33, 1, segments)
    monkeypatch.setattr(kernel, "deal", lambda *_: Deal(0, 2, 2))
    window = make_window(segments, 64)
    out, lse = segment_attention(q, k, v, window, scale=100.0, return_lse=True, backend="triton")
    want_out, want_lse, _ = brute_force(q, k, v, segments, scale=100.0)
    assert relative_error(out, want_out) <= 2e-4 and relative_error(lse, want_lse) <= 2e-6


@runs
@pytest.mark.parametrize("size", SIZES)
def test_pieces_of_scores_of_any_size(monkeypatch, poisoned_scratch, size):
    """Three parts, of which one meets no key, merge to what float64 says: no digit goes with the scores' size."""
    segments = [Segment(0, 200), Segment(260, 40), Segment(210, 1)]
    q, k, v = exact_scores(300)
    monkeypatch.setattr(kernel, "deal", lambda *_: Deal(0, 1, 3))
    scale = size / (64 * 100003)
    got = segment_attention(
        q, k, v, make_window(segments, 64), scale=scale, return_lse=True, return_mass=True, backend="triton"
    )
    for have, want in zip(got, brute_force(q, k, v, segments, scale), strict=True):
        assert relative_error(have, want) <= 2e-6


@runs
@pytest.mark.parametrize("captured", [1, 6])
def test_mass_of_cut_items_stays_inside_when_the_window_has_other_segments(monkeypatch, poisoned_scratch, captured):
    segments = [s._replace(time_shift=0) for s in SEGMENTS]
    q, k, v = make_inputs(40, 2, segments)
    monkeypatch.setattr(kernel, "deal", lambda *_: Deal(2, 2, 3))
    out, room = torch.empty_like(q), torch.full((4, captured), 7.0, device=DEVICE)
    window = make_window(segments, 64)
    torch.ops.worldkv.segment_attention(q, k, v, *window.tables, out, None, room[1:3], 0.125, False, False, "triton")
    want, _, want_mass = brute_force(q, k, v, segments)
    shared = min(captured, len(segments))
    assert relative_error(out, want) <= 2e-6 and relative_error(room[1:3, :shared], want_mass[:, :shared]) <= 2e-6
    assert (room[1:3, shared:] == 0).all() and (room[0] == 7).all() and (room[3] == 7).all()


@runs
def test_the_launcher_cuts_what_the_deal_says(monkeypatch):
    """A long window and few queries: the kernels are launched for one whole item of none and 4 pieces of each."""
    q, k, v = make_inputs(8, 3, [Segment(0, 300)])
    grids = {}

    class Spy:
        def __init__(self, name):
            self.name, self.launch = name, getattr(kernel, name)

        def __getitem__(self, grid):
            grids[self.name] = grid
            return self.launch[grid]

    for name in ("segment_attention_kernel", "merge_pieces_kernel"):
        monkeypatch.setattr(kernel, name, Spy(name))
    for capacity in (32, 15):
        window = Window([Segment(0, 300)], device=DEVICE, capacity=capacity)
        grids.clear()
        out = segment_attention(q, k, v, window, backend="triton")
        dealt = deal(3, kernel.device_processors(DEVICE), capacity)
        assert grids["segment_attention_kernel"] == (dealt.num_whole + dealt.num_cut * dealt.parts,)
        assert grids.get("merge_pieces_kernel") == ((3, 2) if capacity == 32 else None)
        assert relative_error(out, brute_force(q, k, v, [Segment(0, 300)])[0]) <= 2e-6


# --- tiles by the copy engine ---


@runs
@pytest.mark.skipif(DEVICE.type == "cuda" and kernel.device_capability(DEVICE)[0] < 9, reason="needs sm_90 or newer")
@pytest.mark.parametrize("shifted", [False, True])
def test_descriptors_and_pointers_give_the_same(monkeypatch, shifted):
    """To the bit in the interpreter; a GPU's compiler may order a sum of one otherwise than of the other."""
    segments = SEGMENTS if shifted else [s._replace(time_shift=0) for s in SEGMENTS]
    q, k, v = make_inputs(40, 4, segments, torch.float16, head_dim=128, group_size=2)
    window, results = make_window(segments, 128), []
    for descriptors in (False, True):
        config = AttentionConfig(64, 64, 4, 2, descriptors)
        monkeypatch.setattr(kernel, "attention_config", lambda *_, config=config: config)
        results.append(segment_attention(q, k, v, window, return_lse=True, return_mass=True, backend="triton"))
    for by_pointers, by_descriptors in zip(*results, strict=True):
        assert relative_error(by_descriptors, by_pointers) <= (1e-3 if DEVICE.type == "cuda" else 0)
    assert relative_error(results[0][0], brute_force(q, k, v, segments)[0]) <= 2e-3


def test_which_pools_the_copy_engine_takes():
    pool = torch.zeros(300, 4, 64, dtype=torch.bfloat16)
    tiles = kernel._tiles_of(pool, 128)
    assert (tiles.shape, tiles.strides, tiles.block_shape) == ([300, 256], [256, 1], [128, 64])
    assert kernel._tiles_of(pool[:, 1:3], 128).shape == [300, 128]  # a slice of heads is dense in a row
    assert kernel._tiles_of(pool[::2], 128).strides == [512, 1]
    assert kernel._tiles_of(pool[:, ::2], 128) is None
    assert kernel._tiles_of(pool[:, ::4], 128).shape == [300, 64]  # one head
    assert kernel._tiles_of(pool.flatten()[4:-252].view(299, 4, 64), 128) is None  # starts on 8 bytes
    odd = torch.zeros(300 * 260, dtype=torch.bfloat16).as_strided((300, 4, 64), (260, 64, 1))
    assert kernel._tiles_of(odd, 128) is None  # rows start on 8 bytes


@runs
def test_a_pool_that_the_copy_engine_does_not_take_is_read_by_pointers():
    segments = [Segment(3, 300)]
    q, k, v = make_inputs(20, 6, segments, torch.float16)
    out = segment_attention(q[:, ::2], k[:, ::2], v[:, 1::2], make_window(segments, 64), backend="triton")
    assert relative_error(out, brute_force(q[:, ::2], k[:, ::2], v[:, 1::2], segments)[0]) <= 2e-3
