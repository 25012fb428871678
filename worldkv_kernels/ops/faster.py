"""For which shapes a backend has been measured to be the fastest: the half of `auto` that is about speed.

That a kernel is right is for proven.py to say, and does not make it the faster one. Of an op with shapes, `auto` puts
"cuda", or "sdpa", before "triton" only where a figure in benchmarks/results shows it. Asked for by name it runs in any
case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any


@dataclass(frozen=True)
class Faster:
    """On `architecture`, such as "sm_90", `backend` of `op` is the fastest for shapes whose numbers, each by
    itself, lie in `ranges`: from and to, for every field of the op's shape.

    `figures` are the lines that show it, such as "benchmarks/results/h200.jsonl:17", and ranges are those of their
    shapes: in between the backend is taken to be faster as well, and for fp16 as for bf16. Keys fill a window's
    capacity, in whole tiles a segment: the most may be 5 % above what was attended to.
    """

    op: str
    architecture: str
    ranges: Mapping[str, tuple[int, int]]
    figures: tuple[str, ...]
    backend: str = "cuda"

    def holds(self, shape: Any) -> bool:
        return all(lowest <= getattr(shape, name) <= highest for name, (lowest, highest) in self.ranges.items())


def _lines(path: str, *lines: int) -> tuple[str, ...]:
    return tuple(f"benchmarks/results/{path}:{line}" for line in lines)


_H100 = "nvidia-h100-80gb-hbm3-20261126-174836.jsonl"

FASTER: tuple[Faster, ...] = (
    Faster(
        "segment_attention",
        "sm_90",
        {
            "heads": (12, 40), "q_len": (880, 4680), "keys": (2640, 147_000), "head_dim": (128, 128),
            "turned_pairs": (0, 22), "has_mass": (0, 1), "has_weight": (0, 0),
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
            "turned_pairs": (0, 12), "has_mass": (0, 1), "has_weight": (0, 0),
        },
        _lines(_H100, 182, 183, 184, 196, 197, 198),
    ),
)  # fmt: skip


@lru_cache(maxsize=1024)  # an op asks in every call
def faster_on(op: str, shape: Any) -> frozenset[tuple[str, str]]:
    """The architectures, each with the backend of `op` that is the fastest there for `shape`, a named tuple of
    integers."""
    return frozenset((entry.architecture, entry.backend) for entry in FASTER if entry.op == op and entry.holds(shape))
