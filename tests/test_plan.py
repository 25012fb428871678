"""The plan of a window, frame by frame, of configs and numbers alone."""

from __future__ import annotations

import pytest

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
