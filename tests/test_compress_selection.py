"""The parts of csrc/compress on their own, on the host: keys, selection in a group, ties, order of the work."""

import ctypes
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp


@pytest.fixture(scope="module")
def host(small_kernels):
    return small_kernels


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def ordered_keys(host, values):
    values = np.ascontiguousarray(values, np.float32)
    keys = np.empty(len(values), np.uint32)
    host.ordered_keys(pointer(values), pointer(keys), len(values))
    return keys


def selected(host, keys, wanted, first_candidate=0, anchor=0, frame_tokens=0):
    """Tokens of the `wanted` lowest keys, as a block of the kernel lists them."""
    tokens = np.full(wanted + 1, -1, np.int32)
    host.select_tokens(pointer(keys), len(keys), wanted, first_candidate, anchor, frame_tokens, pointer(tokens))
    assert tokens[wanted] == -1
    return tokens[:wanted].tolist()


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
    hnp.arrays(np.uint32, st.integers(1, 600)),
    hnp.arrays(np.uint32, st.integers(1, 600), elements=st.sampled_from([0, 1, 255, 256, 2**31, 2**32 - 1])),
    hnp.arrays(np.uint32, st.integers(1, 600), elements=st.integers(0xBF000000, 0xBF000400)),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(KEYS, st.floats(0, 1), st.integers(0, 2**32))
def test_a_block_selects_what_a_stable_sort_keeps(host, keys, share, seed):
    host.cuda_on_host_seed(ctypes.c_uint64(seed))
    wanted = max(1, round(share * len(keys)))
    assert selected(host, keys, wanted) == sorted(np.argsort(keys, kind="stable")[:wanted].tolist())


def test_every_count_of_equal_keys_and_every_cut(host):
    """Where ballots, warps and stretches begin and end."""
    for count in (1, 31, 32, 33, 255, 256, 257, 511, 513):
        keys = np.full(count, 0xBF123456, np.uint32)
        for wanted in {1, count // 2 or 1, max(1, count - 1), count}:
            assert selected(host, keys, wanted) == list(range(wanted))


def test_tokens_are_those_of_the_candidates(host):
    """A group from candidate 5 on, around an anchor of 8 tokens that are none."""
    keys = np.arange(20, 0, -1).astype(np.uint32)
    assert selected(host, keys, 20, first_candidate=5, anchor=1, frame_tokens=8) == [5, 6, 7, *range(16, 33)]


def test_the_walk_stops_as_soon_as_it_knows(host):
    """Equal keys need no step, and cosines of a chunk no more than three."""
    equal = np.full(3120, 0xBF123456, np.uint32)
    assert host.steps(pointer(equal), 3120, 780) == 0
    cosines = ordered_keys(host, np.random.default_rng(0).normal(0.6, 0.1, 3120))
    assert 1 <= host.steps(pointer(cosines), 3120, 780) <= 3


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
