"""What bench_world.py asks of the small world model: journeys, and on each the memories that are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from worldkv_kernels.journeys import Journey, turn_and_return
from worldkv_kernels.memory.retrieval import ContentRetrieval, FovRetrieval, PoseRetrieval
from worldkv_kernels.reference import compress_chunk
from worldkv_kernels.worlds import looking

TURN = partial(turn_and_return, 30)  # chunks; the journey of a world's number


@dataclass(frozen=True)
class Memory:
    """A memory to compare: what differs from MemoryConfig's defaults, and what is no field of it."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    prune: str = ""  # a control of the rule "similarity": the tokens that stay are "random" or the "most alike"
    sigmas: tuple[float, ...] | None = None  # noise levels of the denoising passes; None for the model's
    numbers: str = "fp32"  # that model and memory are in, "bf16", or "fp8": bf16 with linear layers in FP8
    packing: str = ""  # a control of a bank in 4 bits, see world_packing
    outliers: bool = False  # whether keys have channels that are much larger than others, see world_packing


@dataclass(frozen=True)
class Study:
    """A question, the journeys that it is asked on, and the memories that are compared with the first."""

    name: str
    asks: str
    memories: Sequence[Memory]
    journey: Callable[[int], Journey] = TURN
    worlds: int = 32
    first_world: int = 0  # others than those on which something was chosen
    photographs: bool = False  # the four of scikit-image in place of drawn worlds
    against: str = "the world"  # or "the first visit": pictures of the same poses that the model made before


class RandomRetrieval:
    """A control: chunks drawn at random."""

    needs_intrinsics = False
    stateless = False

    def __init__(self, seed: int = 0) -> None:
        self._generator = np.random.default_rng(seed)

    def describe(self, poses: np.ndarray, intrinsics: np.ndarray | None) -> None:
        return None

    def select(self, current: None, candidates: Sequence[tuple[int, None]], budget: int) -> list[int]:
        return [candidates[i][0] for i in self._generator.permutation(len(candidates))[:budget]]

    def drop(self, candidates: Sequence[tuple[int, None]]) -> int:
        return candidates[0][0]


class DropsOlder(PoseRetrieval):
    """A control: a full bank gives up the other one of the two chunks that are most alike."""

    def drop(self, candidates: Sequence[tuple[int, Any]]) -> int:
        return self.most_alike(candidates)[0]


class ByMass(PoseRetrieval):
    """A control: attention received decides which chunks come back, or which one a full bank gives up, of all or of
    the two that are most alike."""

    by_mass = True

    def __init__(self, *, selects: bool = False, drops: str = "") -> None:
        super().__init__()
        self._selects, self._drops = selects, drops

    def select(
        self, current: Any, candidates: Sequence[tuple[int, Any]], budget: int, *, received: Mapping[int, float]
    ) -> list[int]:
        if not self._selects:
            return super().select(current, candidates, budget)
        return sorted((chunk for chunk, _ in candidates), key=lambda chunk: -received.get(chunk, 0.0))[:budget]

    def drop(self, candidates: Sequence[tuple[int, Any]], *, received: Mapping[int, float]) -> int:
        if not self._drops:
            return super().drop(candidates)
        chunks = self.most_alike(candidates) if self._drops == "of two" else [chunk for chunk, _ in candidates]
        return min(chunks, key=lambda chunk: received.get(chunk, math.inf))  # what is new is not known yet


@contextmanager
def pruning(rule: str, *, seed: int = 0) -> Iterator[None]:
    """While inside, the reference of rule "similarity" keeps other tokens than the published ones, on a CPU."""
    if not rule:
        yield
        return
    published = compress_chunk.similarities
    generator = torch.Generator().manual_seed(seed)

    def at_random(k: torch.Tensor, frames: int, anchor: int) -> torch.Tensor:
        shape = (frames - 1, k.shape[0] // frames)
        return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")

    def most_alike(k: torch.Tensor, frames: int, anchor: int) -> torch.Tensor:
        return -published(k, frames, anchor)

    compress_chunk.similarities = {"random": at_random, "most alike": most_alike}[rule]
    try:
        yield
    finally:
        compress_chunk.similarities = published


def sweeps_and_diagonal(number: int) -> Journey:
    """Three level sweeps at pitches of -20, 0 and 20 degrees, then one that crosses them all, up and down."""
    row = 7.0 * np.arange(30) - 101.5
    yaw = np.concatenate([row, row[::-1], row])
    pitch = np.repeat([-20.0, 0.0, 20.0], 30)
    back = np.arange(45)
    yaw = np.concatenate([yaw, row[-1] - 4.6 * back])
    pitch = np.concatenate([pitch, 20 * np.cos(2 * np.pi * back / 30 + number)])
    return _degrees(yaw + np.degrees(number), pitch, given=90)


def turns_round_and_round(number: int) -> Journey:
    """Two and a half turns on the spot, the first given: every view comes back, from the same side."""
    frame = np.arange(126)
    return _degrees(7.2 * frame + np.degrees(number), 8 * np.sin(frame / 5 + 1.7 * number), given=51)


def twice_round(number: int) -> Journey:
    """Two turns on the spot the same way, the first given, the second between its views and 2.5 degrees higher."""
    frame = np.arange(36)
    yaw, pitch = 10.0 * frame, 8 * np.sin(4 * np.pi * frame / 36 + 1.7 * number)
    return _degrees(np.r_[yaw, yaw + 364.5] + np.degrees(number), np.r_[pitch, pitch + 2.5], given=36)


def cuts(number: int) -> Journey:
    """A turn, and then each of its chunks once more, beside its views, in an order drawn at random."""
    frame = np.arange(36)
    order = np.random.default_rng(number).permutation(12)
    again = (3 * order[:, None] + np.arange(3)).ravel()
    yaw, pitch = 7.0 * frame, 8 * np.sin(frame / 5 + 1.7 * number)
    return _degrees(np.r_[yaw, yaw[again] - 3.15] + np.degrees(number), np.r_[pitch, pitch[again] + 2.5], given=36)


def walk_and_return(number: int) -> Journey:
    """Out from the middle to .4 of the way to the wall, turning by 5 degrees a frame, and back beside that."""
    out = np.arange(45)
    yaw, pitch = 5.0 * out, 8 * np.sin(out / 5 + 1.7 * number)
    away, heading = 0.4 * np.sin(out / 44 * np.pi / 2), np.deg2rad(40 * number + 3 * out)
    position = np.stack([away * np.sin(heading), 0 * away, away * np.cos(heading)], axis=1)
    position = np.concatenate([position, position[::-1] + 0.02])
    return _degrees(np.r_[yaw, yaw[::-1] - 2.2], np.r_[pitch, pitch[::-1] + 2.5], given=45, position=position)


def nothing_given(number: int) -> Journey:
    """A turn and return over the very same views, of which the first chunk alone is given."""
    out = np.arange(45)
    yaw, pitch = 7.0 * out, 8 * np.sin(out / 5 + 1.7 * number)
    return _degrees(np.r_[yaw, yaw[::-1]] + np.degrees(number), np.r_[pitch, pitch[::-1]], given=3)


def _degrees(yaw: np.ndarray, pitch: np.ndarray, *, given: int, position: np.ndarray | None = None) -> Journey:
    angles = (torch.from_numpy(np.deg2rad(angle)) for angle in (yaw, pitch))
    return Journey(looking(*angles, None if position is None else torch.from_numpy(position)).numpy(), given)


# Two chunks whole, sink and recent one each: as many tokens as the window that the model was trained with.
TWO = {"sink_frames": 3, "recent_frames": 3, "retrieved_chunks": 2, "keep_ratio": 1.0, "rebase_time": True}
FULL = Memory("full KV", {"mode": "full"})
SLIDING = Memory("sliding window", {"mode": "sliding", "recent_frames": 12})
SINK = Memory("sink + recent", {"mode": "sink_recent", "recent_frames": 9})
MODES = [
    Memory("defaults, rebased", {"rebase_time": True}), Memory("defaults, not rebased", {"rebase_time": False}),
    FULL, SLIDING, SINK,
    Memory("2 whole chunks, rebased", TWO),
    Memory("2 whole chunks, not rebased", {**TWO, "rebase_time": False}),
    Memory("2 random chunks, rebased", {**TWO, "retrieval": RandomRetrieval()}),
]  # fmt: skip
RETRIEVALS = [
    Memory("pose", TWO),
    Memory("pose, diversity .5", {**TWO, "retrieval": PoseRetrieval(diversity=0.5)}),
    Memory("fov", {**TWO, "retrieval": "fov"}),
    Memory("fov, diversity .5", {**TWO, "retrieval": FovRetrieval(diversity=0.5)}),
    Memory("pose, nearest last", {**TWO, "order": "nearest_last"}),
    Memory("pose, nearest first", {**TWO, "order": "nearest_first"}),
    Memory("random", {**TWO, "retrieval": RandomRetrieval()}),
]
CONTENTS = [
    Memory("pose", TWO),
    Memory("content", {**TWO, "retrieval": "content"}),
    Memory("content, 3 chunks", {**TWO, "retrieval": "content", "retrieved_chunks": 3}),
    Memory("content, 4 chunks", {**TWO, "retrieval": "content", "retrieved_chunks": 4}),
    Memory("content, 3 chunks, diversity .5",
           {**TWO, "retrieval": ContentRetrieval(diversity=0.5), "retrieved_chunks": 3}),
    Memory("content, 3 chunks, none skipped",
           {**TWO, "retrieval": ContentRetrieval(skip_newest=0), "retrieved_chunks": 3}),
    Memory("random", {**TWO, "retrieval": RandomRetrieval()}),
    SINK,
]  # fmt: skip
MASS = [
    Memory(name, {"bank_chunks": 12, "mass_layers": (1, 2), "retrieval": policy})
    for name, policy in {
        "by pose": ByMass(), "of two alike the less attended given up": ByMass(drops="of two"),
        "the least attended given up": ByMass(drops="all"), "the most attended retrieved": ByMass(selects=True),
    }.items()
]  # fmt: skip
WHICH_OF_TWO = [
    Memory(f"{which} given up, bank_chunks={places}", {"bank_chunks": places, **of})
    for places in (12, 6) for which, of in (("younger", {}), ("older", {"retrieval": DropsOlder()}))
]  # fmt: skip
REBASE = [Memory("rebased", TWO), Memory("not rebased", {**TWO, "rebase_time": False})]


def _changed(name: str, values: Sequence[Any], base: Mapping[str, Any]) -> list[Memory]:
    return [Memory(f"{name}={value}", {**base, name: value}) for value in values]


PUBLISHED = {"prune_rule": "similarity", "merge_pruned": False}
UNMERGED = {"merge_pruned": False}
LOG_2 = {"retrieved_log_weight": math.log(2)}


def _rules(ratio: float, base: Mapping[str, Any] = TWO) -> list[Memory]:
    """Ways to prune to one ratio, compared with the published one."""
    ways = {"published": PUBLISHED, "nearest": UNMERGED, "nearest, merged": {}}
    return [Memory(name, {**base, "keep_ratio": ratio, **way}) for name, way in ways.items()]


def _controls(ratio: float) -> list[Memory]:
    published = {**TWO, "keep_ratio": ratio, **PUBLISHED}
    return [
        Memory("random", published, prune="random"), Memory("most alike", published, prune="most alike"),
        Memory("published, merged", {**published, "merge_pruned": True}),
        Memory("nearest, merged, frame by frame", {**TWO, "keep_ratio": ratio, "pooled": False}),
    ]  # fmt: skip


def _weights(base: Mapping[str, Any]) -> list[Memory]:
    return [Memory("as they are", base), Memory("twice", {**base, **LOG_2})]


FOUR = {**TWO, "retrieved_chunks": 4}


def _bits(**changes: Any) -> list[Memory]:
    """In bf16, as large models have it, so that scales take their share of the bytes."""
    base = {**TWO, **changes}
    return [Memory(f"{bits} bits", {**base, "bank_bits": bits}, numbers="bf16") for bits in (16, 8, 4)]


def _packings(*, outliers: bool) -> list[Memory]:
    """The same, and in 4 bits other ways to pack."""
    whole, eight, four = _bits()
    by_token = [replace(four, name=f"4 bits, {of} by token", packing=f"{of} by token") for of in ("keys", "values")]
    memories = [whole, eight, four, *by_token, replace(four, name="2 bits", packing="2 bits")]
    return [replace(memory, outliers=outliers) for memory in memories]


def _groups(ratio: float) -> list[Memory]:
    four = _bits(keep_ratio=ratio)[2]
    return [four, replace(four, name="4 bits, groups of 32", packing="groups of 32")]


DEFAULTS = [
    {"keep_ratio": 1.0}, {"keep_ratio": 0.5}, PUBLISHED, UNMERGED, {"retrieved_chunks": 4}, {"retrieved_chunks": 2},
    {"keep_ratio": 1.0, "retrieved_chunks": 3}, {"recent_frames": 3}, {"recent_frames": 0}, {"recent_frames": 9},
    {"sink_frames": 0}, {"rebase_time": False}, {"rebase_sink": False}, {"order": "nearest_last"},
]  # fmt: skip
STUDIES = [
    Study("modes", "What is each kind of memory worth?", MODES),
    Study("photographs", "The same, in a photograph?", MODES, worlds=4, photographs=True),
    Study("passes", "Do denoising steps matter?",
          [Memory("sigma 1, .75", sigmas=(1.0, 0.75)), Memory("sigma 1, .9, .75, .5", sigmas=(1.0, 0.9, 0.75, 0.5)),
           Memory("sigma 1", sigmas=(1.0,))]),
    Study("retrieved", "How many chunks?", _changed("retrieved_chunks", range(1, 7), TWO)),
    Study("pruned, retrieved", "How many pruned ones?",
          _changed("retrieved_chunks", (1, 2, 3, 4, 6, 8), {**TWO, "keep_ratio": 0.25})),
    Study("retrieval, turn and return", "Chosen how, in which order?", RETRIEVALS),
    Study("retrieval, crossing", "The same, on a way that crosses itself at other pitches?", RETRIEVALS,
          sweeps_and_diagonal),
    Study("retrieval, round and round", "The same, where every view has near-copies?", RETRIEVALS,
          turns_round_and_round),
    Study("content, turn and return", "What is retrieval worth that knows of no camera?", CONTENTS),
    Study("content, twice round", "The same, where the camera goes on the same way?", CONTENTS, twice_round),
    Study("content, cuts", "And where nothing seen says where it looks next?", CONTENTS, cuts),
    Study("mass, turn and return", "Does attention received say what to keep, or what to bring back?", MASS),
    Study("mass, crossing", "The same, on a way that crosses itself at other pitches?", MASS, sweeps_and_diagonal),
    Study("rebase, 72 frames", "What is rebasing worth?", [*REBASE, FULL], partial(turn_and_return, 24)),
    Study("rebase, 144 frames", "And after longer?", [*REBASE, FULL], partial(turn_and_return, 48)),
    Study("rebase, 504 frames", "And after very long?", REBASE, partial(turn_and_return, 168), worlds=16),
    Study("keep_ratio", "What does pruning cost?", _changed("keep_ratio", (1.0, 0.5, 0.333, 0.25, 0.1), TWO)),
    Study("pruned to .5", "Which tokens, and what of the rest?", [*_rules(0.5), *_controls(0.5)]),
    Study("pruned to .25", "The same, of half a chunk?", [*_rules(0.25), *_controls(0.25)]),
    Study("pruned to .333", "The same, between?", _rules(0.333)),
    Study("pruned to .5, four chunks", "The same, with four chunks?", _rules(0.5, FOUR)),
    Study("pruned to .25, four chunks", "The same?", _rules(0.25, FOUR)),
    Study("pruned to .5, other worlds", "In worlds on which nothing was chosen?", _rules(0.5)[::2], first_world=32),
    Study("pruned to .25, other worlds", "The same?", _rules(0.25)[::2], first_world=32),
    Study("pruned to .25, photographs", "In a photograph?", _rules(0.25), worlds=4, photographs=True),
    Study("pruned to .25, walk", "Where the camera walks?", _rules(0.25), walk_and_return),
    Study("pruned to .25, nothing given", "Where the model makes the way out, too?", _rules(0.25), nothing_given,
          against="the first visit"),
    Study("weight, whole", "Should retrieved tokens count twice?", _weights(TWO)),
    Study("weight, pruned", "Merged ones, too?", _weights({**TWO, "keep_ratio": 0.25})),
    Study("weight, defaults", "And six of them?", _weights({})),
    Study("weight, photographs", "In a photograph?", _weights({}), worlds=4, photographs=True),
    Study("weight, walk", "Where the camera walks?", _weights({}), walk_and_return),
    Study("weight, nothing given", "Where the model makes the way out, too?", _weights({}), nothing_given,
          against="the first visit"),
    Study("defaults", "What would change the defaults?",
          [Memory("defaults"),
           *[Memory(", ".join(f"{name}={value}" for name, value in changes.items()), changes)
             for changes in DEFAULTS]]),
    Study("numbers", "What do fewer bits of the model cost?",
          [Memory(numbers, numbers=numbers) for numbers in ("fp32", "bf16", "fp8")]),
    Study("bits", "What does a bank in fewer bits cost, packed in which way?", _packings(outliers=False)),
    Study("bits, outliers", "The same, where some channels of keys are much larger?", _packings(outliers=True)),
    Study("bits, pruned to .5", "The same, pruned?", _bits(keep_ratio=0.5)),
    Study("bits, pruned to .5, dropped", "And without merging?", _bits(keep_ratio=0.5, **UNMERGED)),
    Study("bits, pruned to .25", "The same, of half a chunk?", _bits(keep_ratio=0.25)),
    Study("bits, pruned to .25, dropped", "And without merging?", _bits(keep_ratio=0.25, **UNMERGED)),
    Study("bits, groups", "Should fewer tokens share a scale in 4 bits?", _groups(1.0)),
    Study("bits, groups, pruned to .25", "And where merged keys differ in length?", _groups(0.25)),
    Study("bank", "How large a bank?", _changed("bank_chunks", (30, 20, 12, 6), {})),
    Study("bank, crossing", "The same, on a way that crosses itself at other pitches?",
          _changed("bank_chunks", (45, 20, 12, 6), {}), sweeps_and_diagonal),
    Study("bank, which of two", "Should a full bank give up the older of two that are alike?", WHICH_OF_TWO),
    Study("bank, which of two, crossing", "The same, on a way that crosses itself?", WHICH_OF_TWO, sweeps_and_diagonal),
    Study("sink", "How long a sink?", _changed("sink_frames", (3, 0, 6, 9), TWO)),
    Study("recent", "How many recent frames?", _changed("recent_frames", (3, 0, 6, 9), TWO)),
    Study("walk", "Where the camera walks, which no training clip did?",
          [m for m in MODES if "random" not in m.name], walk_and_return),
    Study("nothing given", "Where the model makes the way out, too: does it draw again what it drew?",
          [m for m in MODES if "random" not in m.name], nothing_given, against="the first visit"),
]  # fmt: skip
