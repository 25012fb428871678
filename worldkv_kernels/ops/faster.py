"""For which shapes a backend has been measured to be the fastest: the half of `auto` that is about speed.

That a kernel is right is for proven.py to say, and does not make it the faster one. Of an op with shapes, `auto` puts
"cuda", or "sdpa", before "triton" only where a measurement shows it: one that `worldkv tune` has made on this machine
(tuned.py), or a figure in benchmarks/results. Asked for by name it runs in any case.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby
from typing import Any

import torch

from . import proven, tuned
from .tuned import Measurement

UNMEASURED = ("triton", "cuda", "sdpa", "reference")  # the order of what no measurement tells apart


@dataclass(frozen=True, eq=False)  # compared as the object that it is, in the keys of what was chosen
class Faster:
    """On `on`, `backends` of `op` are the fastest for shapes whose numbers, each by itself, lie in `ranges`: from and
    to, for every field of the op's shape. Several `backends` are those that were not told apart.

    An entry of the repository is for an architecture, such as "sm_90". `figures` are the lines that show it, such as
    "benchmarks/results/h200.jsonl:17", and ranges are those of their shapes: in between the backend is taken to be
    faster as well, and for fp16 as for bf16. Keys fill a window's capacity, in whole tiles a segment: the most may be
    5 % above what was attended to.

    An entry of this machine has a `date`, is for a card by its name, and goes before those of the repository, of the
    backends that were `measured`.
    """

    op: str
    on: str
    ranges: Mapping[str, tuple[int, int]]
    figures: tuple[str, ...] = ()
    backends: tuple[str, ...] = ("cuda",)
    measured: tuple[str, ...] = ()
    date: str | None = None

    def holds(self, shape: Any) -> bool:
        """Of another version of the package, an entry may have other fields: then it does not."""
        return self.ranges.keys() == set(shape._fields) and all(
            lowest <= getattr(shape, name) <= highest for name, (lowest, highest) in self.ranges.items()
        )


def _lines(path: str, *lines: int) -> tuple[str, ...]:
    return tuple(f"benchmarks/results/{path}:{line}" for line in lines)


_H100, _H200 = "nvidia-h100-80gb-hbm3-20261126-174836.jsonl", "nvidia-h200-20261127-061700.jsonl"

FASTER: tuple[Faster, ...] = (
    Faster(
        "segment_attention",
        "sm_90",
        {
            "heads": (12, 40), "q_len": (880, 4680), "keys": (2640, 147_000), "head_dim": (128, 128),
            "turned_pairs": (0, 22), "has_mass": (0, 1), "has_weight": (0, 0), "group_size": (1, 1),
        },
        _lines(
            _H100,
            28, 29, 30, 42, 43, 44, 56, 57, 58, 70, 71, 72, 84, 85, 86, 98, 99, 100,
            112, 113, 114, 126, 127, 128, 140, 141, 142, 154, 155, 156, 168, 169, 170,
        ),
    ),
    Faster(
        "segment_attention",
        "sm_90",
        {
            "heads": (24, 80), "q_len": (3600, 4680), "keys": (14_400, 29_400), "head_dim": (64, 64),
            "turned_pairs": (0, 12), "has_mass": (0, 1), "has_weight": (0, 0), "group_size": (1, 1),
        },
        _lines(_H100, 182, 183, 184, 196, 197, 198),
    ),
    Faster(
        "segment_attention",
        "sm_90",
        {
            "heads": (12, 40), "q_len": (2640, 4680), "keys": (13_200, 147_000), "head_dim": (128, 128),
            "turned_pairs": (0, 0), "has_mass": (0, 0), "has_weight": (1, 1), "group_size": (1, 1),
        },
        _lines(_H200, 2, 8, 14, 20, 26, 32, 38, 44),
    ),
)  # fmt: skip


def entries_of(card: str, measurements: Iterable[Measurement]) -> list[Faster]:
    """What measurements of a card say. They differ in all but the keys, or lie next to each other by these: between
    two of the same outcome it is taken to be that, and between others, and beyond them, nothing is known."""

    def others(m: Measurement) -> tuple[str, list[tuple[str, int]]]:
        return m.op, sorted((name, number) for name, number in m.shape.items() if name != "keys")

    def outcome(m: Measurement) -> tuple[set[str], set[str]]:
        return set(tuned.fastest(m.us)), set(m.us)

    entries = []
    for (op, fields), of_shape in groupby(sorted(measurements, key=others), key=others):
        for _, alike in groupby(sorted(of_shape, key=lambda m: m.shape["keys"]), key=outcome):
            first, *rest = alike
            last = (rest or [first])[-1]
            ranges = {name: (number, number) for name, number in fields}
            ranges["keys"] = (first.tokens, last.shape["keys"])
            date = min(m.date for m in (first, *rest))[:10]
            entries.append(Faster(op, card, ranges, (), tuned.fastest(first.us), tuple(first.us), date))
    return entries


@cache  # the file is read once: a process keeps to what it has found
def _of_this_machine() -> tuple[Faster, ...]:
    try:
        cards = tuned.read()
    except OSError as error:  # a home of somebody else's
        warnings.warn(f"worldkv: what tune has kept on this machine is not used: {error}", stacklevel=2)
        return ()
    return tuple(
        entry
        for card, kept in cards.items()
        for entry in entries_of(card, [m for m in kept if tuned.unusable(m) is None])
    )


def forget() -> None:
    """Have what is kept of this machine read anew."""
    _of_this_machine.cache_clear()
    faster_on.cache_clear()


@lru_cache(maxsize=1024)  # an op asks in every call
def faster_on(op: str, shape: Any) -> tuple[Faster, ...]:
    """What is known of `op` for `shape`, a named tuple of integers, on any card. Raises ValueError where the file of
    this machine is damaged."""
    return tuple(entry for entry in (*_of_this_machine(), *FASTER) if entry.op == op and entry.holds(shape))


def _on(device: torch.device, known: Sequence[Faster]) -> tuple[Faster | None, set[str]]:
    """Of what is known of a shape: this machine's own of that card, and which backends are the fastest by the
    repository's figures."""
    own = [entry for entry in known if entry.date and entry.on == torch.cuda.get_device_name(device)]
    listed = [entry for entry in known if not entry.date and entry.on == proven.architecture(device)]
    return (own[0] if own else None), {name for entry in listed for name in entry.backends}


def in_order(names: Iterable[str], device: torch.device, known: Sequence[Faster]) -> list[str]:
    """The fastest first: this machine's own measurement, then the repository's figures, which also have the word on
    what this machine has not measured, then UNMEASURED."""
    own, listed = _on(device, known)
    fastest, measured = (own.backends, own.measured) if own else ((), ())

    def rank(name: str) -> tuple[bool, bool, bool, int]:
        listed_alone = name in listed and name not in measured
        return not listed_alone, name not in fastest, name not in listed, UNMEASURED.index(name)

    return sorted(names, key=rank)


def evidence(name: str, device: torch.device, known: Sequence[Faster]) -> str:
    """On whose word `name` has its place, where it serves."""
    own, listed = _on(device, known)
    told_apart = own is not None and set(own.backends) != set(own.measured)
    if told_apart and name in own.backends:
        return f"tune, {own.date}"
    by = "benchmarks/results" if name in listed else "fixed order"
    return by if own is None or told_apart else f"{by}; none faster in tune, {own.date}"


def slower(device: torch.device, known: Sequence[Faster]) -> str:
    """Why the CUDA kernel is not the first."""
    own, _ = _on(device, known)
    if own is not None and "cuda" in own.measured and "cuda" not in own.backends:
        return f"measured slower than {' and '.join(own.backends)} on this machine"
    return f"not measured faster than triton on {proven.architecture(device)}"
