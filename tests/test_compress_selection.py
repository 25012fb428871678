"""The parts of csrc/compress that need no GPU, compiled for the host: keys, radix walk, ties, order of the work."""

import ctypes
import shutil
import subprocess
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

COMPILER = shutil.which("c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is on the PATH")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    library = tmp_path_factory.mktemp("selection") / "selection.so"
    source = Path(__file__).with_name("selection_on_host.cpp")
    command = [COMPILER, "-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def ordered_keys(host, values):
    values = np.ascontiguousarray(values, np.float32)
    keys = np.empty(len(values), np.uint32)
    host.ordered_keys(pointer(values), pointer(keys), len(values))
    return keys


def kept(host, keys, wanted):
    """Places of the `wanted` lowest keys, and the steps that the walk took."""
    places = np.full(wanted + 1, -1, np.int32)
    steps = host.kept(pointer(keys), len(keys), wanted, pointer(places))
    assert places[wanted] == -1
    return places[:wanted], steps


@settings(max_examples=200, deadline=None, derandomize=True)
@given(hnp.arrays(np.uint32, st.integers(1, 50)))
def test_keys_have_the_order_of_the_floats(host, bits):
    """Any bit patterns: denormals, both zeros, infinities, NaN of either sign as +inf."""
    special = np.array([0.0, -0.0, 1e-45, -1e-45, np.inf, -np.inf, np.nan, -np.nan, 1.0, -1.0], np.float32)
    values = np.concatenate([bits.view(np.float32), special])
    keys = ordered_keys(host, values)
    values = np.where(np.isnan(values), np.float32(np.inf), values)
    assert np.array_equal(keys[:, None] < keys, values[:, None] < values)
    assert np.array_equal(keys[:, None] == keys, values[:, None] == values)


KEYS = st.one_of(
    hnp.arrays(np.uint32, st.integers(1, 200)),
    hnp.arrays(np.uint32, st.integers(1, 200), elements=st.sampled_from([0, 1, 255, 256, 2**31, 2**32 - 1])),
    hnp.arrays(np.uint32, st.integers(1, 200), elements=st.integers(0xBF000000, 0xBF000400)),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(KEYS, st.floats(0, 1))
def test_the_walk_keeps_what_a_stable_sort_keeps(host, keys, share):
    wanted = max(1, round(share * len(keys)))
    places, steps = kept(host, keys, wanted)
    assert places.tolist() == sorted(np.argsort(keys, kind="stable")[:wanted].tolist())
    assert 0 <= steps <= 4


def test_the_walk_stops_as_soon_as_it_knows(host):
    """Equal keys need no step, and cosines of a chunk no more than three."""
    assert kept(host, np.full(3120, 0xBF123456, np.uint32), 780)[1] == 0
    cosines = np.random.default_rng(0).normal(0.6, 0.1, 3120).astype(np.float32)
    places, steps = kept(host, ordered_keys(host, cosines), 780)
    assert places.tolist() == sorted(np.argsort(cosines, kind="stable")[:780].tolist())
    assert 1 <= steps <= 3


SCORE, COPY_ANCHOR, COPY_KEPT = range(3)


@pytest.mark.parametrize("layers", [1, 2, 40])
@pytest.mark.parametrize("blocks", [(195, 195, 195), (1, 1, 1), (3, 2, 7), (0, 0, 9)])
def test_all_work_is_done_once_and_nobody_waits_for_a_later_ticket(host, layers, blocks):
    tickets = layers * sum(blocks)
    items = np.empty((tickets, 3), np.int32)
    host.work_items(tickets, layers, *blocks, pointer(items))
    ticket_of = {tuple(item): ticket for ticket, item in enumerate(items.tolist())}
    want = {(w, layer, b) for w, layer in product(range(3), range(layers)) for b in range(blocks[w])}
    assert ticket_of.keys() == want
    for layer in range(layers):
        scored = max((ticket_of[SCORE, layer, b] for b in range(blocks[SCORE])), default=-1)
        for work in (COPY_ANCHOR, COPY_KEPT):
            assert all(ticket_of[work, layer, b] > scored for b in range(blocks[work]))
        if blocks[SCORE] and layer + 1 < layers:  # what the next layer needs does not queue behind the copies
            assert ticket_of[SCORE, layer + 1, 0] < ticket_of[COPY_ANCHOR, layer, 0]


@pytest.mark.parametrize("frames, frame_tokens", [(1, 5), (3, 4), (4, 1)])
def test_tokens_of_candidates_and_of_a_whole_chunk(host, frames, frame_tokens):
    for anchor in range(frames):
        frame = list(range(anchor * frame_tokens, (anchor + 1) * frame_tokens))
        others = [t for t in range(frames * frame_tokens) if t not in frame]
        got = [host.token_of_candidate(c, anchor, frame_tokens) for c in range(len(others))]
        assert got == others
        rows = range(frames * frame_tokens)
        assert [host.token_of_row_of_a_whole_chunk(r, anchor, frame_tokens) for r in rows] == frame + others
