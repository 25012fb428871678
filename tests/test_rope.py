"""Rope3D against its complex definition, and RopeTable, which is a chunk's share of it at a fixed address."""

import copy
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from worldkv_kernels import Rope3D, RopeTable

FAR = 2**31 - 1  # the last position
CPU = torch.device("cpu")


def phases(positions: np.ndarray, pairs: tuple[int, int, int], theta: float) -> np.ndarray:
    """exp(i * position * theta ** (-j / n)) for pair j of an axis of n, axes side by side, complex128."""
    rates = [theta ** (-j / n) for n in pairs for j in range(n)]
    return np.exp(1j * np.outer(positions, rates))


@st.composite
def ropes(draw):
    half = draw(st.integers(3, 64))
    time = draw(st.integers(0, half))
    height = draw(st.integers(0, half - time))
    pairs = (time, height, half - time - height)
    return Rope3D(2 * half, draw(st.floats(1.5, 1e6)), pairs)


positions = st.lists(st.integers(0, 1100) | st.integers(0, FAR), max_size=30)
grids = st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7))
starts = st.integers(0, 2000) | st.integers(0, FAR - 3)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(ropes(), positions)
def test_table(rope, given):
    table = rope.table(given)
    assert table.shape == (len(given), rope.head_dim // 2, 2)
    assert table.dtype == np.float32
    want = phases(np.array(given, dtype=np.float64), rope.pairs, rope.theta)
    # Half a unit of float32 at 1 is 2^-25; numpy's and Python's powers may differ by a unit of float64 a position.
    limit = 2**-25 + 1e-12 + 2**-52 * np.array(given, dtype=np.float64)[:, None]
    assert (np.abs(table[..., 0] - want.real) <= limit).all()
    assert (np.abs(table[..., 1] - want.imag) <= limit).all()


def exact_turn(position: int, frequency: float) -> tuple[float, float]:
    """Cosine and sine of the product itself, not of its rounding to float64: whole turns are taken off as fractions."""
    pi = Fraction(31415926535897932384626433832795028841971693993751, 10**49)
    angle = Fraction(frequency) * position
    angle -= 2 * pi * (angle // (2 * pi))
    return math.cos(angle), math.sin(angle)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("position, limit", [(1023, 1e-12), (10**7, 2**-28), (FAR, 2**-22)])
def test_a_table_is_right_wherever_a_rollout_may_get(head_dim, position, limit):
    """To half a unit of fp32 at 1, and what the rounding of an angle of so many radians to float64 makes."""
    rope = Rope3D(head_dim)
    got = rope.table([position])[0]
    want = np.array([exact_turn(position, frequency) for frequency in rope._frequencies.tolist()])
    assert np.abs(got - want).max() <= 2**-25 + limit


def test_below_1024_a_table_has_the_bits_of_the_published_models():
    """Whose angles are products in float64, and whose complex128 numbers were rounded to fp32 here."""
    for rope in (Rope3D(128), Rope3D(64), Rope3D(128, 500.0, (64, 0, 0))):
        rates = np.concatenate([rope.theta ** (-np.arange(n) / max(n, 1)) for n in rope.pairs])
        angles = np.arange(1024)[:, None] * rates
        want = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
        assert rope.table(range(1024)).tobytes() == want.tobytes()
        (time, *_), grid = rope.pairs, (3, 7, 5)
        table = RopeTable(rope, grid, device=CPU)
        for start in (0, 1, 500, 1021):
            table.move(start)
            assert table.table[:3, :time].numpy().tobytes() == want[start : start + 3, :time].tobytes()
            assert table.table[:, time:].numpy().tobytes() == want[:7, time:].tobytes()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(ropes(), st.integers(-2000, 2000), st.integers(-2000, 2000))
def test_turn(rope, a, b):
    """A shift turns the time pairs alone, by the table's angles, and shifts add up."""
    turn = {d: rope.turn(d)[:, 0] + 1j * rope.turn(d)[:, 1] for d in (a, b, a + b)}
    time = rope.pairs[0]
    assert np.abs(turn[a][:time] - phases(np.array([a]), (time, 0, 0), rope.theta)[0]).max(initial=0) <= 1e-12
    assert (turn[a][time:] == 1).all()
    assert np.abs(turn[a] * turn[b] - turn[a + b]).max() <= 1e-11
    assert (rope.turn(0) == [1.0, 0.0]).all()
    if a >= 0:
        assert np.abs(rope.turn(a)[:time] - rope.table([a])[0, :time]).max(initial=0) <= 2**-25 + 1e-12


@pytest.mark.parametrize(("head_dim", "pairs"), [(128, (22, 21, 21)), (64, (12, 10, 10)), (6, (1, 1, 1))])
def test_default_pairs(head_dim, pairs):
    rope = Rope3D(head_dim)
    assert (rope.pairs, rope.theta) == (pairs, 10000.0)


def test_each_axis_starts_its_own_frequencies():
    table = Rope3D(128).table(range(9))
    for first in (0, 22, 43):  # pair 0 of time, height and width turns by one radian a position
        assert table[1, first].tolist() == pytest.approx([np.cos(1), np.sin(1)], abs=1e-7)
    assert np.array_equal(table[:, 22:43], table[:, 43:])
    assert not np.array_equal(table[:, 1], table[:, 23])  # 22 pairs of time step finer than 21


# --- of a chunk ---


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(ropes(), grids, st.lists(starts, min_size=1, max_size=5))
def test_a_chunk_has_frames_from_its_first_and_rows_and_columns_from_0(rope, grid, starts):
    table = RopeTable(rope, grid, device=DEVICE)
    address = table.table.data_ptr()
    for start in starts:
        table.move(start)
        assert table.start_frame == start and table.table.data_ptr() == address
        got, (time, height, _) = table.table.cpu().numpy(), rope.pairs
        assert got.shape == (max(grid), rope.head_dim // 2, 2)
        assert np.array_equal(got[: grid[0], :time], rope.table(range(start, start + grid[0]))[:, :time])
        assert np.array_equal(got[: grid[1], time : time + height], rope.table(range(grid[1]))[:, time : time + height])
        assert np.array_equal(got[: grid[2], time + height :], rope.table(range(grid[2]))[:, time + height :])
        new = RopeTable(rope, grid, device=DEVICE, start_frame=start)
        kept = rope.chunk_table_on(DEVICE, grid, start)
        for other in (new.table, kept, torch.from_numpy(rope.chunk_table(grid, start)).to(DEVICE)):
            assert torch.equal(other[: grid[0]], table.table[: grid[0]])
            assert torch.equal(other[:, time:], table.table[:, time:])


def test_a_rope_keeps_the_tables_of_the_last_few_chunks():
    rope, grid = Rope3D(64), (3, 2, 4)
    first = rope.chunk_table_on(CPU, grid, 0)
    assert rope.chunk_table_on(CPU, grid, 0) is first
    kept = [rope.chunk_table_on(CPU, grid, 3 * chunk) for chunk in range(1, 8)]
    assert rope.chunk_table_on(CPU, grid, 0) is first and len(rope._tables) == 8
    rope.chunk_table_on(CPU, grid, 24)
    assert len(rope._tables) == 8 and rope.chunk_table_on(CPU, grid, 21) is kept[-1]
    assert rope.chunk_table_on(CPU, grid, 0) is not first
    for chunk in range(1000):
        rope.chunk_table_on(CPU, (3, 4, 2), chunk)
    assert len(rope._tables) == 8


def test_what_a_graph_reads_is_kept_for_good(monkeypatch):
    """On a stand-in for a device whose stream may be captured."""
    gpu = torch.device("cuda:0")
    capturing = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "a stream")
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)
    used = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: used.append((tensor.data_ptr(), stream)))
    rope, grid = Rope3D(64), (3, 2, 4)
    read = rope.chunk_table_on(gpu, grid, 0)
    assert used == [(read.data_ptr(), "a stream")]  # not given to others before that stream is done with it
    capturing.append(True)
    assert rope.chunk_table_on(gpu, grid, 0) is read and len(used) == 1
    with pytest.raises(RuntimeError, match="rope must be a RopeTable inside the capture of a graph, or have been used"):
        rope.chunk_table_on(gpu, grid, 3)
    capturing.clear()
    for chunk in range(1, 100):
        rope.chunk_table_on(gpu, grid, 3 * chunk)
    assert rope.chunk_table_on(gpu, grid, 0) is read and len(rope._tables) == 9


def test_the_hosts_rows_are_not_written_before_the_last_copy_is_done(monkeypatch):
    """On a stand-in for a GPU's event."""
    table, told = RopeTable(Rope3D(64), (3, 2, 4), device="cpu"), []

    class Event:
        def synchronize(self):
            told.append(("waits", table._tables.on_host["rows"].clone()))

        def record(self, stream):
            told.append(("copied", table._tables.on_host["rows"].clone()))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    table._tables._copied = Event()
    before = table.table.clone()
    table.move(9)
    assert [what for what, _ in told] == ["waits", "copied"]
    assert torch.equal(told[0][1], before) and torch.equal(told[1][1], table.table)
    assert not torch.equal(before, table.table)


@pytest.mark.parametrize("made_in", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("moved_in", [torch.no_grad, torch.inference_mode])
def test_a_table_made_in_inference_mode_moves_outside_of_it(made_in, moved_in):
    with made_in():
        table = RopeTable(Rope3D(64), (3, 2, 4), device=DEVICE)
    with moved_in():
        table.move(7)
    assert torch.equal(table.table, RopeTable(Rope3D(64), (3, 2, 4), device=DEVICE, start_frame=7).table)


@pytest.mark.parametrize("remade", [lambda x: pickle.loads(pickle.dumps(x)), copy.copy, copy.deepcopy])
def test_ropes_are_equal_by_value_and_a_copy_makes_its_own_tables(remade):
    rope = Rope3D(64, theta=500, pairs=[20, np.int64(6), 6])
    table = rope.chunk_table_on(CPU, (1, 2, 3), 4)
    again = remade(rope)
    assert again == rope == Rope3D(64, 500.0, (20, 6, 6)) and hash(again) == hash(rope)
    assert again.chunk_table_on(CPU, (1, 2, 3), 4) is not table
    assert torch.equal(again.chunk_table_on(CPU, (1, 2, 3), 4), table)
    assert rope.chunk_table_on(CPU, (1, 2, 3), 4) is table
    others = [Rope3D(64, 500.0, (6, 20, 6)), Rope3D(64, 501.0, (20, 6, 6)), Rope3D(128, 500.0)]
    assert all(rope != other for other in [*others, "wan", None])


@pytest.mark.parametrize("remade", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy])
def test_a_copy_of_a_table_moves_by_itself(remade):
    table = RopeTable(Rope3D(64), (3, 2, 4), device="cpu", start_frame=5)
    again, before = remade(table), table.table.clone()
    again.move(8)
    assert torch.equal(table.table, before) and (table.start_frame, again.start_frame) == (5, 8)
    table.move(8)
    assert torch.equal(table.table, again.table)


def test_repr_tells_it_apart():
    rope = Rope3D(64, 500.0, (20, 6, 6))
    assert repr(rope) == "Rope3D(64, theta=500.0, pairs=(20, 6, 6))"
    table = RopeTable(rope, (3, 2, 4), device="cpu", start_frame=5)
    assert repr(table) == f"RopeTable({rope}, (3, 2, 4), device='cpu', start_frame=5)"


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (dict(head_dim=63), "head_dim must be even and at least 6, at most 1024, got 63"),
        (dict(head_dim=4), "head_dim must be even and at least 6, at most 1024, got 4"),
        (dict(theta=1.0), "theta must be finite and above 1, got 1.0"),
        (dict(theta=float("nan")), "theta must be finite and above 1, got nan"),
        (dict(theta=float("inf")), "theta must be finite and above 1, got inf"),
        (dict(head_dim=10**9), "head_dim must be even and at least 6, at most 1024, got 1000000000"),
        (dict(theta=10**400), f"theta must be a number that a float can hold, got 1{'0' * 196}..."),
        (dict(theta=10**5000), "theta must be a number that a float can hold, got int too long to print"),
        (dict(pairs=(22, 21, 20)), "pairs must be three counts that add up to 64, got (22, 21, 20)"),
        (dict(pairs=(65, 0, -1)), "pairs must be three counts that add up to 64, got (65, 0, -1)"),
        (dict(pairs=(32, 32)), "pairs must be three counts that add up to 64, got (32, 32)"),
    ],
)
def test_errors(arguments, wanted):
    with pytest.raises(ValueError, match="Rope3D") as caught:
        Rope3D(**arguments)
    assert str(caught.value) == f"Rope3D: {wanted}"


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (dict(head_dim=64.0), "head_dim must be an integer, got 64.0"),
        (dict(pairs=(22.5, 20.5, 21)), "pairs[0] must be an integer, got 22.5"),
        (dict(pairs=(22, 21, "21")), "pairs[2] must be an integer, got '21'"),
        (dict(pairs=64), "pairs must be three counts that add up to 64, got 64"),
        (dict(theta="10000"), "theta must be a number, got '10000'"),
        (dict(theta=None), "theta must be a number, got None"),
    ],
)
def test_type_errors(arguments, wanted):
    with pytest.raises(TypeError, match="Rope3D") as caught:
        Rope3D(**arguments)
    assert str(caught.value) == f"Rope3D: {wanted}"


@pytest.mark.parametrize(
    ("positions", "error", "got"),
    [
        ([3, -1], ValueError, "[3, -1]"),
        ([2**31], ValueError, "[2147483648]"),
        ([10**30], TypeError, "[1000000000000000000000000000000]"),
        ([1.5], TypeError, "[1.5]"),
        ([True], TypeError, "[True]"),
        (5, TypeError, "5"),
        ("5", TypeError, "'5'"),
    ],
)
def test_positions_that_are_none(positions, error, got):
    with pytest.raises(error) as caught:
        Rope3D(64).table(positions)
    assert str(caught.value) == f"Rope3D.table: positions must be integers from 0 to 2147483647, got {got}"


@pytest.mark.parametrize(
    ("arguments", "error", "wanted"),
    [
        (dict(rope="wan"), TypeError, "rope must be a Rope3D, got 'wan'"),
        (dict(grid=5), TypeError, "grid must be (frames, height, width) of integers, got 5"),
        (dict(grid=(3, 2)), TypeError, "grid must be (frames, height, width) of integers, got (3, 2)"),
        (dict(grid=(3, 2, 4.0)), TypeError, "grid must be (frames, height, width) of integers, got (3, 2, 4.0)"),
        (dict(grid=(0, 2, 4)), ValueError,
         "grid must be (frames, height, width) of integers from 1 to 2147483647, got (0, 2, 4)"),
        (dict(grid=(3, 2, 2**31)), ValueError,
         "grid must be (frames, height, width) of integers from 1 to 2147483647, got (3, 2, 2147483648)"),
        (dict(start_frame=-1), ValueError, "start_frame must be from 0 to 2147483645, got -1"),
        (dict(start_frame=2**31 - 2), ValueError, "start_frame must be from 0 to 2147483645, got 2147483646"),
        (dict(start_frame=None), TypeError, "start_frame must be an integer, got None"),
        (dict(start_frame=1.0), TypeError, "start_frame must be an integer, got 1.0"),
        (dict(device="meta"), ValueError, "device must be 'cpu' or a device that torch can use here, got 'meta'"),
        (dict(device=5.0), TypeError, "device must be 'cpu' or a device that torch can use here, got 5.0"),
    ],
)  # fmt: skip
def test_errors_of_a_table(arguments, error, wanted):
    with pytest.raises(error) as caught:
        RopeTable(**{"rope": Rope3D(64), "grid": (3, 2, 4), "device": "cpu", **arguments})
    assert str(caught.value) == f"RopeTable: {wanted}"


@pytest.mark.parametrize("start, error", [(-1, ValueError), (2**31 - 2, ValueError), ("0", TypeError)])
def test_a_table_that_cannot_move_stays_as_it_is(start, error):
    table = RopeTable(Rope3D(64), (3, 2, 4), device=DEVICE, start_frame=5)
    before = table.table.clone()
    with pytest.raises(error, match=r"^RopeTable\.move: start_frame must be "):
        table.move(start)
    assert torch.equal(table.table, before) and table.start_frame == 5
    table.move(2**31 - 3)  # the last chunk there may be
    assert not torch.equal(table.table, before)
