"""The plan of a window: which frames of which chunks a query attends to, worked out of a config and numbers alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..window import Segment, tiles_of
from .config import MemoryConfig


class ChunkPlan(NamedTuple):
    """What the chunk to be made will see."""

    chunk: int
    start_frame: int
    retrieved: tuple[int, ...]  # chunk numbers, in window order
    # Role, chunk number, rows: in window order. A chunk in which the sink ends can be there twice, as "recent" too.
    # With bank_bits below 16 the rows of retrieved ones are layer 0's.
    segments: tuple[tuple[str, int, Segment], ...]
    num_tokens: int  # what each query attends to, the current chunk included


class Piece(NamedTuple):
    """Tokens of one chunk that are attended as one piece."""

    role: str
    chunk: int
    first_token: int  # within the chunk
    num_tokens: int
    time_shift: int = 0  # in latent frames


def pieces(config: MemoryConfig, chunk: int, retrieved: Mapping[int, int], first_whole: int) -> list[Piece]:
    """Sink, retrieved, recent, current; with the time shifts that close the gaps between their frames.

    `retrieved`: chunks in window order, and the tokens that each was pruned to. `first_whole`: see `leaving`.
    """
    frames, start = config.chunk_frames, chunk * config.chunk_frames
    sink = min(config.sink_frames if config.sink_chunks else 0, start)
    attended = start if config.mode == "full" else config.recent_frames
    # The published code leaves its gap as soon as something is retrieved; with no room for that, always.
    if not retrieved and config.retrieved_chunks:
        attended += config.gap_chunks * frames
    recent = max(sink, start - attended)
    if first_whole > config.sink_chunks:  # with more recent frames than before, they are not there yet
        recent = max(recent, first_whole * frames)
    before = recent - len(retrieved) * frames  # where the first retrieved frame comes to stand, next to the recent ones
    found = _cut(config, "sink", 0, sink, before - sink if config.rebase_time and config.rebase_sink else 0)
    for place, (past, tokens) in enumerate(retrieved.items()):
        shift = before + (place - past) * frames if config.rebase_time else 0
        found.append(Piece("retrieved", past, 0, tokens, shift))
    found += _cut(config, "recent", recent, start)
    found.append(Piece("current", chunk, 0, config.chunk_tokens))
    return found


def _cut(config: MemoryConfig, role: str, first: int, end: int, shift: int = 0) -> list[Piece]:
    """The frames from `first` up to `end`, chunk by chunk."""
    found = []
    while first < end:
        chunk, skipped = divmod(first, config.chunk_frames)
        stop = min(end, (chunk + 1) * config.chunk_frames)
        found.append(Piece(role, chunk, skipped * config.frame_tokens, (stop - first) * config.frame_tokens, shift))
        first = stop
    return found


def place(config: MemoryConfig, chunk: int, next_chunk: int, first_whole: int) -> str:
    """Where a past chunk is before `next_chunk`: "sink", "recent", "unattended", or "left" for the bank or for good."""
    if chunk < config.sink_chunks:
        return "sink"
    if chunk < first_whole:
        return "left"
    attended = config.mode == "full" or next_chunk - chunk <= config.recent_chunks
    return "recent" if attended else "unattended"


def leaving(config: MemoryConfig, next_chunk: int, first_whole: int) -> range:
    """The chunks, oldest first, that have to leave before `next_chunk` is made.

    `first_whole`: the oldest chunk, but for the sink's, that has not left; config.sink_chunks where none has. What has
    left does not come back, so that it says which chunks are whole also when the recent frames become more.
    """
    if config.mode == "full":
        return range(0)
    return range(first_whole, next_chunk - config.recent_chunks - config.gap_chunks)


def ring_chunks(config: MemoryConfig, places: int) -> int:
    """How many chunks are whole at once besides the sink's, the current one included; in mode "full" the `places`."""
    return places if config.mode == "full" else config.recent_chunks + config.gap_chunks + 1


def most_segments(config: MemoryConfig, places: int) -> int:
    """Of the largest window."""
    return config.sink_chunks + ring_chunks(config, places) + config.retrieved_chunks


def capacity(config: MemoryConfig, places: int) -> int:
    """Tiles of 128 rows that the largest window can take."""
    whole = config.sink_chunks + ring_chunks(config, places)
    return whole * tiles_of(config.chunk_tokens) + config.retrieved_chunks * tiles_of(config.banked_tokens)
