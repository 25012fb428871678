"""The plan of a window, frame by frame, of configs and numbers alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worldkv_kernels import MemoryConfig
from worldkv_kernels.memory.plan import Piece, capacity, leaving, pieces, place, ring_chunks
from worldkv_kernels.window import tiles_of

CHUNKS = 12


def config(**fields) -> MemoryConfig:
    """Of 5 tokens a frame; half of a pruned frame's is 3."""
    return MemoryConfig(
        **{"num_layers": 1, "num_heads": 1, "grid": (1, 5), "keep_ratio": 0.5, "bank_chunks": 9, **fields}
    )


def frames_of(found: list[Piece], frames: int) -> dict[str, list[int]]:
    """The frames of the clip that each role has, in window order."""
    of_role: dict[str, list[int]] = {}
    for piece in found:
        first, count = piece.chunk * frames + piece.first_token // 5, piece.num_tokens // 5
        of_role.setdefault(piece.role, []).extend(range(first, first + count))
    return of_role


def test_a_window_of_four_frames_has_one_past_frame():
    """What Matrix-Game's gta variant was made with: chunks of 3, and the last frame of the chunk before."""
    gta = config(mode="sliding", sink_frames=0, recent_frames=1)
    assert pieces(gta, 0, {}, 0) == [Piece("current", 0, 0, 15)]
    for chunk in range(1, CHUNKS):
        of_two = [Piece("recent", chunk - 1, 10, 5), Piece("current", chunk, 0, 15)]
        assert pieces(gta, chunk, {}, chunk - 1) == of_two
        assert list(leaving(gta, chunk + 1, chunk - 1)) == [chunk - 1]
    assert (gta.recent_chunks, ring_chunks(gta, CHUNKS)) == (1, 2)


def test_a_sink_of_six_frames_in_chunks_of_four():
    """LingBot's version 2 in chunks of 4: a window of 18 frames, of which 6 are the sink and 8 recent."""
    version_2 = config(chunk_frames=4, sink_frames=6, recent_frames=8)
    assert (version_2.sink_chunks, version_2.recent_chunks) == (2, 2)
    found = [frames_of(pieces(version_2, chunk, {}, max(2, chunk - 2)), 4) for chunk in range(6)]
    assert found[0] == {"current": [0, 1, 2, 3]}
    assert found[1] == {"sink": [0, 1, 2, 3], "current": [4, 5, 6, 7]}
    assert found[2] == {"sink": [0, 1, 2, 3, 4, 5], "recent": [6, 7], "current": [8, 9, 10, 11]}
    assert found[3] == {"sink": [0, 1, 2, 3, 4, 5], "recent": [6, 7, 8, 9, 10, 11], "current": [12, 13, 14, 15]}
    # Chunk 1 is the sink's for good: its last two frames are attended no more, and chunk 2 is the first to be banked.
    assert found[4]["recent"] == [8, 9, 10, 11, 12, 13, 14, 15]
    gone = [list(leaving(version_2, chunk + 1, max(2, chunk - 2))) for chunk in range(6)]
    assert gone == [[], [], [], [], [2], [3]]
    assert [place(version_2, chunk, 5, 3) for chunk in range(5)] == ["sink", "sink", "left", "recent", "recent"]


@pytest.mark.parametrize("mode", ["worldkv", "sliding", "sink_recent", "full"])
@pytest.mark.parametrize("chunk_frames", [1, 3, 4])
@pytest.mark.parametrize("sink_frames", [0, 2, 4, 5])
@pytest.mark.parametrize("recent_frames", [0, 1, 3, 6, 7])
def test_the_window_is_the_frames_and_each_chunk_in_one_place(mode, chunk_frames, sink_frames, recent_frames):
    of = config(mode=mode, chunk_frames=chunk_frames, sink_frames=sink_frames, recent_frames=recent_frames)
    left, first_whole = [], of.sink_chunks
    for chunk in range(CHUNKS):
        start = chunk * chunk_frames
        found = pieces(of, chunk, dict.fromkeys(left[:6], of.banked_tokens), first_whole)
        frames = frames_of([piece for piece in found if piece.role != "retrieved"], chunk_frames)
        has_sink, all_past = mode in ("worldkv", "sink_recent"), mode == "full"
        sink = [frame for frame in range(start) if has_sink and frame < sink_frames]
        recent = [frame for frame in range(start) if all_past or frame >= start - recent_frames]
        assert frames.get("sink", []) == sink
        assert frames.get("recent", []) == [frame for frame in recent if frame not in sink]
        assert frames["current"] == list(range(start, start + chunk_frames))

        assert sum(tiles_of(piece.num_tokens) for piece in found) <= capacity(of, CHUNKS)
        assert [past for past in range(chunk) if place(of, past, chunk, first_whole) == "left"] == left
        attended = {piece.chunk for piece in found if piece.role != "retrieved"}
        assert not attended.intersection(left)
        gone = leaving(of, chunk + 1, first_whole)
        assert len(gone) <= 1
        left, first_whole = [*left, *gone], first_whole + len(gone)
    assert len(left) <= CHUNKS - (0 if all_past else of.sink_chunks)


def test_rebased_the_frames_follow_one_another():
    """Retrieved and sink frames move up to the recent ones, of which the first is inside a chunk."""
    of = config(chunk_frames=4, sink_frames=6, recent_frames=5, rebase_time=True, retrieved_chunks=2)
    found = pieces(of, 9, {3: of.banked_tokens, 5: of.banked_tokens}, 7)
    starts = [(piece.role, piece.chunk * 4 + piece.first_token // 5 + piece.time_shift) for piece in found]
    assert starts == [
        ("sink", 17), ("sink", 21), ("retrieved", 23), ("retrieved", 27), ("recent", 31), ("recent", 32),
        ("current", 36),
    ]  # fmt: skip


@st.composite
def rebased_windows(draw):
    """A config that rebases, a chunk number however large, what may be retrieved then, and which chunks are whole."""
    frames, retrieved = draw(st.integers(1, 5)), draw(st.integers(0, 8))
    of = config(
        mode=draw(st.sampled_from(["worldkv", "worldkv", "sink_recent"])), chunk_frames=frames, rebase_time=True,
        sink_frames=draw(st.integers(0, 3 * frames)), recent_frames=draw(st.integers(0, 4 * frames)),
        retrieved_chunks=retrieved, unattended_chunks=draw(st.integers(0, 2)),
    )  # fmt: skip
    chunk = draw(st.integers(0, 60) | st.integers(0, 10**7))
    gone = leaving(of, chunk, of.sink_chunks)
    first_whole = max(gone.stop, of.sink_chunks)
    if draw(st.booleans()):  # the recent frames were fewer
        first_whole = min(chunk, first_whole + draw(st.integers(0, 3)))
    if not of.has_bank or first_whole <= of.sink_chunks:
        return of, chunk, {}, first_whole
    left = st.integers(of.sink_chunks, first_whole - 1)
    left |= st.integers(of.sink_chunks, min(first_whole - 1, of.sink_chunks + 9))
    chosen = draw(st.lists(left, unique=True, max_size=retrieved))
    return of, chunk, {past: draw(st.integers(1, of.banked_tokens)) for past in chosen}, first_whole


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(rebased_windows())
def test_rebased_no_query_sees_farther_than_its_window_is_long(drawn):
    """At any chunk up to ten million, and so for ever: the window's frames stand in a row up to the current ones."""
    of, chunk, retrieved, first_whole = drawn
    frames, found, stands = of.chunk_frames, pieces(of, chunk, retrieved, first_whole), []
    for piece in found:
        count = frames if piece.role == "retrieved" else piece.num_tokens // 5  # as many as it had before pruning
        first = piece.chunk * frames + piece.first_token // 5 + piece.time_shift
        stands += range(first, first + count)
        assert piece.role != "current" or piece.time_shift == 0
        assert abs(piece.time_shift) < 2**31
    end = (chunk + 1) * frames
    assert stands == list(range(end - len(stands), end))
    longest = of.sink_frames + of.retrieved_chunks * frames + of.recent_frames + of.gap_chunks * frames + frames
    assert len(stands) <= longest


def test_without_it_what_was_made_first_goes_as_far_as_the_rollout():
    """What is in the window then stands at its own frame."""
    of, chunk = config(rebase_time=False, sink_frames=3, recent_frames=6, retrieved_chunks=2), 10**7
    assert [(piece.chunk, piece.time_shift) for piece in pieces(of, chunk, {1: 9, 5: 9}, chunk - 2)] == [
        (0, 0), (1, 0), (5, 0), (chunk - 2, 0), (chunk - 1, 0), (chunk, 0)
    ]  # fmt: skip
