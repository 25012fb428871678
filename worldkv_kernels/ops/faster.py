"""For which shapes a CUDA kernel has been measured to be the fastest backend: the half of `auto` that is about speed.

That a kernel is right is for proven.py to say, and does not make it the faster one. Of an op with shapes, `auto` puts
"cuda" before "triton" only where a figure in benchmarks/results shows it. Asked for by name it runs in any case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any


@dataclass(frozen=True)
class Faster:
    """On `architecture`, such as "sm_90", the CUDA kernel of `op` is the fastest for shapes whose numbers, each by
    itself, lie in `ranges`: from and to, for every field of the op's shape.

    `figures` are the lines that show it, such as "benchmarks/results/h200.jsonl:17"; no range goes beyond them.
    """

    op: str
    architecture: str
    ranges: Mapping[str, tuple[int, int]]
    figures: tuple[str, ...]

    def holds(self, shape: Any) -> bool:
        return all(lowest <= getattr(shape, name) <= highest for name, (lowest, highest) in self.ranges.items())


FASTER: tuple[Faster, ...] = ()  # none has been measured yet


@lru_cache(maxsize=1024)  # an op asks in every call
def faster_on(op: str, shape: Any) -> frozenset[str]:
    """The architectures on which the CUDA kernel of `op` is the fastest for `shape`, a named tuple of integers."""
    return frozenset(entry.architecture for entry in FASTER if entry.op == op and entry.holds(shape))
