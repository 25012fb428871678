"""Rope3D against its complex definition."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worldkv_kernels import Rope3D


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
    return Rope3D(2 * half, draw(st.floats(1.5, 1e6)), draw(st.integers(1, 1100)), pairs)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(ropes())
def test_table(rope):
    table = rope.table("cpu")
    assert table.shape == (rope.max_position, rope.head_dim // 2, 2)
    assert table.dtype == torch.float32
    want = phases(np.arange(rope.max_position), rope.pairs, rope.theta)
    got = table.double().numpy()
    # Half a unit of float32 at 1 is 2^-25; float64's own error, 1000 radians * 2^-53, is far below.
    assert np.abs(got[..., 0] - want.real).max() <= 2**-25 + 1e-12
    assert np.abs(got[..., 1] - want.imag).max() <= 2**-25 + 1e-12


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
    if 0 <= a < rope.max_position:
        assert np.abs(rope.turn(a)[:time] - rope.table("cpu")[a, :time].numpy()).max(initial=0) <= 2**-25 + 1e-12


@pytest.mark.parametrize(("head_dim", "pairs"), [(128, (22, 21, 21)), (64, (12, 10, 10)), (6, (1, 1, 1))])
def test_default_pairs(head_dim, pairs):
    rope = Rope3D(head_dim)
    assert (rope.pairs, rope.theta, rope.max_position) == (pairs, 10000.0, 1024)


def test_each_axis_starts_its_own_frequencies():
    table = Rope3D(128).table("cpu")
    for first in (0, 22, 43):  # pair 0 of time, height and width turns by one radian a position
        assert table[1, first].tolist() == pytest.approx([np.cos(1), np.sin(1)], abs=1e-7)
    assert torch.equal(table[:, 22:43], table[:, 43:])
    assert not torch.equal(table[:, 1], table[:, 23])  # 22 pairs of time step finer than 21


def test_table_is_made_once_per_device():
    rope = Rope3D(64, max_position=4)
    assert rope.table("cpu") is rope.table(torch.device("cpu"))


@pytest.mark.parametrize("remade", [lambda x: pickle.loads(pickle.dumps(x)), copy.copy, copy.deepcopy])
def test_ropes_are_equal_by_value_and_a_copy_makes_its_own_table(remade):
    rope = Rope3D(64, theta=500, max_position=16, pairs=[20, np.int64(6), 6])
    table = rope.table("cpu")
    again = remade(rope)
    assert again == rope == Rope3D(64, 500.0, 16, (20, 6, 6)) and hash(again) == hash(rope)
    assert again.table("cpu") is not table and torch.equal(again.table("cpu"), table)
    assert rope.table("cpu") is table
    others = [Rope3D(64, 500.0, 16, (6, 20, 6)), Rope3D(64, 501.0, 16, (20, 6, 6)), Rope3D(64, 500.0, 17, (20, 6, 6))]
    assert all(rope != other for other in [*others, "wan", None])


def test_repr_tells_it_apart():
    rope = Rope3D(64, 500.0, 16, (20, 6, 6))
    assert repr(rope) == "Rope3D(64, theta=500.0, max_position=16, pairs=(20, 6, 6))"


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (dict(head_dim=63), "head_dim must be even and at least 6, at most 1024, got 63"),
        (dict(head_dim=4), "head_dim must be even and at least 6, at most 1024, got 4"),
        (dict(theta=1.0), "theta must be finite and above 1, got 1.0"),
        (dict(theta=float("nan")), "theta must be finite and above 1, got nan"),
        (dict(theta=float("inf")), "theta must be finite and above 1, got inf"),
        (dict(max_position=0), "max_position must be at least 1, at most 2**31 - 1, got 0"),
        (dict(max_position=2**31), "max_position must be at least 1, at most 2**31 - 1, got 2147483648"),
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
        (dict(max_position=1.5), "max_position must be an integer, got 1.5"),
        (dict(max_position=True), "max_position must be an integer, got True"),
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
