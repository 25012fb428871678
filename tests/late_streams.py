"""A stand-in for memory.streams.CopyEngine whose streams run late and out of order, as far as their events allow."""

from __future__ import annotations

import math
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from worldkv_kernels.memory.streams import COMPUTE, LOAD


class Broken(Exception):
    """Stands for whatever breaks a call off."""


class Event:
    """`done` belongs to the latest record; a wait looks at the one that was latest when it was queued."""

    done: list[bool] | None = None


class LateStreams:
    """Queues what is put on a stream, and runs it at random moments, in order within a stream.

    A copy runs in two steps: first the target is filled with NaN, or bytes that stand for it, later it gets what its
    source then holds.
    `queues_compute`: what `call` is given is queued as well, else it runs at once, after making a wait before it true.
    `current` names the stream that is current. `skips` lists waits to leave out, (calling function, attribute of the
    events) as `name_events` named them. `broken_loads`: the share of calls of `copy` on LOAD that raise Broken.
    """

    def __init__(self, seed: int, *, queues_compute: bool) -> None:
        self.random = random.Random(seed)
        self.laziness = self.random.choice([0.2, 0.6, 0.95, 1.0])
        self.queues_compute = queues_compute
        self.current = COMPUTE
        self.in_capture = False
        self.broken_loads = 0.0
        self.skips: set[tuple[str, str]] = set()
        self.skipped = self.copies = 0
        self._names: dict[int, str] = {}
        self._queues: dict[str, deque[tuple[list[bool], Callable[[], None]]]] = {}

    def name_events(self, owner: object) -> None:
        """Name the events that an object's attributes hold, alone or in lists, after the attributes."""

        def name(value: Any, attribute: str) -> None:
            if isinstance(value, Event):
                self._names[id(value)] = attribute
            elif isinstance(value, list):
                for item in value:
                    name(item, attribute)

        for attribute, value in vars(owner).items():
            name(value, attribute)

    # --- as CopyEngine ---

    def event(self) -> Event:
        return Event()

    def record(self, event: Event, stream: str) -> None:
        done = event.done = [False]
        self._put(stream, lambda: done.__setitem__(0, True))

    def wait(self, event: Event, stream: str) -> None:
        if (sys._getframe(1).f_code.co_name, self._names.get(id(event))) in self.skips:
            self.skipped += 1
        elif event.done is not None:
            self._put(stream, lambda: None, event.done)

    def copy(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], stream: str) -> None:
        if stream == LOAD and self.random.random() < self.broken_loads:
            raise Broken
        for target, source in pairs:
            self.copies += 1
            poison = math.nan if target.is_floating_point() else 255  # as scales and minima, NaN
            self._put(stream, lambda target=target, poison=poison: target.fill_(poison))
            self._put(stream, lambda target=target, source=source: target.copy_(source))

    def capturing(self) -> bool:
        return self.in_capture

    # --- what a test does ---

    @contextmanager
    def second_stream(self) -> Iterator[None]:
        """Another stream is current, after what the first has queued; the first then goes on after it."""
        self._hand_over("second")
        yield
        self._hand_over(COMPUTE)

    def _hand_over(self, stream: str) -> None:
        event = self.event()
        self.record(event, COMPUTE)
        self.current = stream
        self.wait(event, COMPUTE)

    def call(self, work: Callable[[], None]) -> None:
        """Put work on the current stream."""
        self._put(COMPUTE, work)

    def drain(self) -> None:
        self._run_some()
        while self._run_one():
            self._run_some()
        assert not any(self._queues.values()), "the streams wait for each other"

    def _put(self, stream: str, work: Callable[[], None], after: list[bool] | None = None) -> None:
        name = self.current if stream == COMPUTE else stream
        if stream == COMPUTE and not self.queues_compute:
            while after is not None and not after[0]:
                assert self._run_one(), "compute waits for what is never done"
            work()
        else:
            self._queues.setdefault(name, deque()).append(([True] if after is None else after, work))
        if self.random.random() > self.laziness:
            self._run_some()

    def _run_one(self, names: list[str] | None = None) -> bool:
        ready = [name for name in names or self._queues if self._queues[name] and self._queues[name][0][0][0]]
        if ready:
            self._queues[self.random.choice(ready)].popleft()[1]()
        return bool(ready)

    def _run_some(self) -> None:
        """A few steps of one stream, which the others may be far behind of."""
        names = [self.random.choice(list(self._queues))] if self._queues else []
        for _ in range(self.random.choice([1, 5, 100])):
            if not names or not self._run_one(names):
                break
