"""The window's tables cover the segments' rows, exactly, in place."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worldkv_kernels import Rope3D, Segment, Window

ROPE = Rope3D(64)

lengths = st.one_of(st.integers(1, 5000), st.sampled_from([1, 127, 128, 129, 256, 4680]))
segment_lists = st.lists(
    st.builds(Segment, st.integers(0, 20000), lengths, st.integers(-60, 60), st.floats(-8, 8)), min_size=1, max_size=30
)
fuzz = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def addresses(window: Window) -> list[int]:
    return [table.data_ptr() for table in window.tables]


def copies(window: Window) -> list[torch.Tensor]:
    return [table.clone() for table in window.tables]


def check_tables(window: Window, segments: list[Segment]) -> None:
    """Every row of every segment once: as many as fill tiles in full tiles, the others as tail rows."""
    tiles, tail_rows, ranges, num_segments, turns, weights = window.tables
    assert num_segments.tolist() == [len(segments)] and window.num_segments == len(segments)
    assert window.num_tokens == sum(segment.num_rows for segment in segments)
    assert window.segments == tuple(segments)
    assert window.last_row == max(segment.first_row + segment.num_rows for segment in segments) - 1
    assert window.has_shift == (window.rope is not None)
    assert weights.shape == (window.capacity if window.has_weight else 1,)
    if window.has_weight:
        want = np.array([segment.log_weight for segment in segments]) / math.log(2)
        assert np.abs(weights[: len(segments)].numpy() - want).max() <= 5e-7
    (tiles, tile_segments), (tail_rows, tail_segments) = tiles.T.tolist(), tail_rows.T.tolist()
    ranges = ranges.tolist()
    num_full = sum(segment.num_rows // 128 for segment in segments)
    num_tail = sum(segment.num_rows % 128 for segment in segments)
    assert ranges[0] == [0, num_full, 0, num_tail]
    next_full, next_tail = 0, 0
    of_segments = zip(segments, ranges[1 : len(segments) + 1], strict=True)
    for i, (segment, (full_lo, full_hi, tail_lo, tail_hi)) in enumerate(of_segments):
        assert (full_lo, tail_lo) == (next_full, next_tail)  # one after the other, none shared, none left out
        assert tail_hi - tail_lo < 128
        next_full, next_tail = full_hi, tail_hi
        rows = [first + i for first in tiles[full_lo:full_hi] for i in range(128)] + tail_rows[tail_lo:tail_hi]
        assert rows == list(range(segment.first_row, segment.first_row + segment.num_rows))
        assert {*tile_segments[full_lo:full_hi], *tail_segments[tail_lo:tail_hi]} == {i}
    assert (next_full, next_tail) == (num_full, num_tail)
    if window.rope is not None:
        time = window.rope.pairs[0]
        assert turns.shape == (window.capacity, time, 2)  # the pairs that turn with time, and no other
        for segment, turn in zip(segments, turns.double().numpy(), strict=False):
            rates = 10000.0 ** (-np.arange(time) / time)
            want = np.exp(1j * segment.time_shift * rates)
            assert np.abs(turn[:, 0] + 1j * turn[:, 1] - want).max() <= 1e-7


@fuzz
@given(segment_lists)
def test_tables_cover_exactly_the_rows(segments):
    window = Window(segments, device="cpu", rope=ROPE, weighted=True)
    check_tables(window, segments)
    needed = sum((segment.num_rows + 127) // 128 for segment in segments)
    assert window.capacity == needed  # what the first segments need, by default


@fuzz
@given(segment_lists, segment_lists, st.integers(0, 3))
def test_update_in_place(first, second, spare):
    needed = max(sum((segment.num_rows + 127) // 128 for segment in segments) for segments in (first, second))
    window = Window(first, device="cpu", rope=ROPE, weighted=True, capacity=needed + spare)
    before = addresses(window)
    window.update(second)
    check_tables(window, second)
    window.update(first)
    check_tables(window, first)
    assert addresses(window) == before


@fuzz
@given(segment_lists, segment_lists)
def test_a_capacity_error_leaves_the_old_window(first, second):
    window = Window(first, device="cpu", rope=ROPE, weighted=True)
    needed = sum((segment.num_rows + 127) // 128 for segment in second)
    if needed <= window.capacity:
        return
    before, tables = addresses(window), copies(window)
    with pytest.raises(ValueError, match=f"Window: segments must fit capacity={window.capacity} tiles .* got {needed}"):
        window.update(second)
    assert addresses(window) == before
    assert all(torch.equal(a, b) for a, b in zip(tables, copies(window), strict=True))
    check_tables(window, first)


@fuzz
@given(st.integers(-60, 60), st.integers(0, 2**31))
def test_turning_the_query_is_turning_the_key_back(shift, seed):
    """q . R(d) k = (R(-d) q) . k with the table's turn, on explicit complex pairs."""
    window = Window([Segment(0, 1, shift)], device="cpu", rope=ROPE)
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, 32)) + 1j * rng.normal(size=(2, 32))
    turn = window.tables[4][0].double().numpy()
    turn = np.concatenate([turn[:, 0] + 1j * turn[:, 1], np.ones(20)])
    rates = np.concatenate([10000.0 ** (-np.arange(12) / 12), np.zeros(20)])
    turned_key = k * np.exp(1j * shift * rates)  # the key of a token `shift` frames later

    def dot(a, b):
        return (a * b.conj()).real.sum()

    assert dot(q * turn.conj(), k) == pytest.approx(dot(q, turned_key), abs=1e-4)


def test_overlapping_segments_count_twice():
    window = Window([(0, 200), (100, 200), (0, 200)], device="cpu")
    assert window.num_tokens == 600
    check_tables(window, [Segment(0, 200), Segment(100, 200), Segment(0, 200)])


def test_without_a_rope_there_are_no_turns():
    window = Window([(5, 3)], device="cpu")
    assert (window.rope, window.has_shift) == (None, False)
    window.update([(7, 2, 0)])
    assert window.segments == (Segment(7, 2),)


def test_a_rope_without_pairs_for_time_turns_nothing():
    window = Window([(0, 1, 9), (0, 1, -4)], device="cpu", rope=Rope3D(64, pairs=(0, 16, 16)))
    assert torch.equal(window.tables[4], torch.tensor([[[1.0, 0.0]]] * 2))


def test_numbers_of_other_libraries():
    segments = [(np.int64(3), torch.tensor(4), np.int32(-2), np.float32(0.5)), np.array([1, 2]), (0, 1, 0, 2)]
    window = Window(segments, device="cpu", rope=ROPE, weighted=True)
    assert window.segments == (Segment(3, 4, -2, 0.5), Segment(1, 2), Segment(0, 1, 0, 2.0))
    assert all([type(number) for number in segment] == [int, int, int, float] for segment in window.segments)


def test_weights_at_their_bounds():
    window = Window([Segment(0, 1, log_weight=8), (0, 1, 0, -8.0)], device="cpu", weighted=True, capacity=3)
    assert torch.equal(window.tables[-1], torch.tensor([8 / math.log(2), -8 / math.log(2), 0.0]))


def test_a_window_that_is_not_weighted_takes_weights_of_zero():
    window = Window([(0, 1, 0, 0.0), (0, 1, 0, -0.0), (0, 1, 0, 0)], device="cpu")
    assert not window.has_weight and window.segments == (Segment(0, 1),) * 3


def test_a_generator_of_segments():
    assert Window((Segment(i, 1) for i in range(3)), device="cpu").num_segments == 3


def test_rows_up_to_int32():
    last = 2**31 - 1
    window = Window([(last - 1000, 1000)], device="cpu")
    check_tables(window, [Segment(last - 1000, 1000)])


FIELDS = "(first_row, num_rows, time_shift=0, log_weight=0.0)"
BAD = [
    ([], ValueError, "segments must hold at least one segment, got none"),
    ([(0, 0)], ValueError, "segments[0] must have first_row >= 0, num_rows >= 1"),
    ([(0, 1), (-1, 5)], ValueError, "segments[1] must have first_row >= 0"),
    ([(0, -3)], ValueError, "segments[0] must have"),
    ([(2**31 - 10, 11)], ValueError, "end below row 2**31"),
    ([(0, 1, 3)], ValueError, "segments[0] has time_shift=3, which needs rope=, got None"),
    ([(0, 1, 2**31)], ValueError, "segments[0] must have a time_shift of less than 2**31 frames either way, got Seg"),
    ([(10**400, 1)], ValueError, "end below row 2**31, got Segment(first_row=1000"),
    ([(10**5000, 1)], ValueError, "end below row 2**31, got Segment too long to print"),
    (
        [(0, True)],
        TypeError,
        f"segments[0] must be {FIELDS} of integers below 2**31 and a number from -8 to 8, got (0, True)",
    ),
    (
        [(0, 1), (0.0, 1)],
        TypeError,
        f"segments[1] must be {FIELDS} of integers below 2**31 and a number from -8 to 8, got (0.0,",
    ),
    ([(0, None)], TypeError, "segments[0] must be"),
    ([(0, 1, 0, 0.5)], ValueError, "segments[0] has log_weight=0.5, which needs weighted=True, got False"),
    ([(0, 1, 0, 8.1)], ValueError, "segments[0] must have a log_weight from -8 to 8, got Segment(first_row=0, "),
    ([(0, 1, 0, -9)], ValueError, "segments[0] must have a log_weight from -8 to 8, got Segment(first_row=0, "),
    ([(0, 1, 0, math.nan)], ValueError, "segments[0] must have a log_weight from -8 to 8"),
    ([(0, 1, 0, -math.inf)], ValueError, "segments[0] must have a log_weight from -8 to 8"),
    ([(0, 1, 0, 10**400)], ValueError, "segments[0] must have a log_weight from -8 to 8"),
    (
        [(0, 1, 0, True)],
        TypeError,
        f"segments[0] must be {FIELDS} of integers below 2**31 and a number from -8 to 8, got (0, 1, 0, True)",
    ),
    ([(0, 1, 0, "1")], TypeError, "segments[0] must be"),
    ([(0, 1, 0, None)], TypeError, "segments[0] must be"),
    ([(0, 1, 0, torch.tensor(0.0))], TypeError, "segments[0] must be"),
    ([("0", 1)], TypeError, "segments[0] must be"),
    ([(0, 1, 1.5)], TypeError, "segments[0] must be"),
    ([(0, 1, math.nan)], TypeError, f"segments[0] must be {FIELDS} of integers below 2**31 and a number from -8 to 8"),
    ([(0, 1, 1e30)], TypeError, f"segments[0] must be {FIELDS} of integers below 2**31 and a number from -8 to 8"),
    ([(0,)], TypeError, "segments[0] must be"),
    ([(0, 1, 2, 3, 4)], TypeError, "segments[0] must be"),
    ([5], TypeError, "segments[0] must be"),
]


@pytest.mark.parametrize(("segments", "error_type", "wanted"), BAD)
def test_segment_errors(segments, error_type, wanted):
    with pytest.raises(error_type, match=r"^Window: ") as caught:
        Window(segments, device="cpu")
    assert wanted in str(caught.value)
    window = Window([(3, 300)], device="cpu")
    before = copies(window)
    with pytest.raises(error_type, match=r"^Window: "):
        window.update(segments)
    assert all(torch.equal(a, b) for a, b in zip(before, copies(window), strict=True))
    check_tables(window, [Segment(3, 300)])


def test_capacity_errors():
    for capacity in (0, -1, 2):
        with pytest.raises(ValueError, match=f"Window: segments must fit capacity={capacity} tiles of 128 rows, got 3"):
            Window([(0, 300)], device="cpu", capacity=capacity)
    with pytest.raises(ValueError, match=r"Window: segments must fit capacity=int too long to print tiles"):
        Window([(0, 300)], device="cpu", capacity=-(10**5000))
    with pytest.raises(TypeError, match=r"Window: capacity must be an integer or None, got 3\.0"):
        Window([(0, 300)], device="cpu", capacity=3.0)
    for segments, capacity, got in (([(0, 300)], 10**12, 10**12), ([(0, 2**31 - 256)] * 2, None, 2**25 - 4)):
        with pytest.raises(ValueError, match=f"Window: capacity must be at most 16777216 tiles of 128 rows, got {got}"):
            Window(segments, device="cpu", capacity=capacity)


@pytest.mark.parametrize(
    ("changes", "error_type", "wanted"),
    [
        (
            dict(segments=5),
            TypeError,
            f"segments must be a list of {FIELDS}, got 5",
        ),
        (
            dict(segments=None),
            TypeError,
            f"segments must be a list of {FIELDS}, got None",
        ),
        (dict(rope="wan"), TypeError, "rope must be a Rope3D or None, got 'wan'"),
        (dict(weighted=1), TypeError, "weighted must be True or False, got 1"),
        (dict(weighted=None), TypeError, "weighted must be True or False, got None"),
        (dict(rope=5), TypeError, "rope must be a Rope3D or None, got 5"),
        (dict(device="foo"), ValueError, "device must be 'cpu' or a device that torch can use here, got 'foo': "),
        (dict(device="cuda:99"), ValueError, "device must be 'cpu' or a device that torch can use here, got"),
        (dict(device="meta"), ValueError, "device must be 'cpu' or a device that torch can use here, got 'meta'"),
        (dict(device=1.5), TypeError, "device must be 'cpu' or a device that torch can use here, got 1.5"),
    ],
)
def test_argument_errors(changes, error_type, wanted):
    with pytest.raises(error_type, match=r"^Window: ") as caught:
        Window(**{"segments": [(0, 300)], "device": "cpu", **changes})
    assert wanted in str(caught.value)


def test_repr():
    assert repr(Window([(0, 300)], device="cpu", capacity=5)) == "Window(1 segments, 300 tokens, capacity=5 tiles)"
