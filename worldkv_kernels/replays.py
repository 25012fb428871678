"""Passes as CUDA graphs: when one is captured, when it is compared with what it stands for, and when it is replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], Replay]


@dataclass
class _Kind:
    """How far passes of one kind have come: in which chunk they were first made, captured and compared, by its number
    and its place in a rollout."""

    first: tuple[int, int]
    captured: tuple[int, int] | None = None
    compared: tuple[int, int] | None = None
    replayed: Callable[[], Any] | None = None


class Replays:
    """Passes of several kinds, which are equal but for what lies in tensors at fixed addresses.

    A pass is made of its kernels in the first chunk of its kind, which compiles and checks them; in a later chunk it is
    captured; in one after that its replays are compared with the passes themselves, whose conditions are then others
    than those it was captured with. Only where the bits are equal are the passes of later chunks replays.

    Args:
        name: of the caller, for messages.
        insists: RuntimeError where a pass cannot be captured, or its replay differs; else one warning, and passes go on
            without graphs.
        capture_on: makes what captures, such as capture_on(device).
    """

    def __init__(self, name: str, *, insists: bool, capture_on: Callable[[], Capture]) -> None:
        self.on = True
        self._name, self._insists, self._capture_on = name, insists, capture_on
        self.forget()

    def forget(self) -> None:
        """Begin anew, with no graph. Later ones have other memory to share: what no graph holds any more is gone."""
        self._kinds: dict[Hashable, _Kind] = {}
        self._capture: Capture | None = None

    def capture(self, function: Callable[[], None]) -> Replay:
        if self._capture is None:
            self._capture = self._capture_on()
        return self._capture(function)

    def made(
        self,
        kind: Hashable,
        chunk: tuple[int, int],
        kernels: Callable[[], Any],
        capture: Callable[[Any], Callable[[], Any]],
        same: Callable[[Any, Any], bool],
    ) -> Any:
        """What a pass makes: `kernels()`, or a replay of it.

        `capture`, given what `kernels` has made, gives a function that replays and gives what they would; it raises
        RuntimeError where it cannot.
        A chunk is its number, never the same for two, and its place in the rollout, which may come again: passes are
        compared at another place than the one that they were captured at.
        """
        of_kind = self._kinds.setdefault(kind, _Kind(first=chunk))
        if of_kind.compared is not None and of_kind.compared != chunk:
            return of_kind.replayed()
        made = kernels()
        if not self.on:  # the caller gave up meanwhile
            return made
        if of_kind.captured is None and of_kind.first != chunk:
            try:
                of_kind.replayed, of_kind.captured = capture(made), chunk
            except RuntimeError as error:
                reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                self.give_up(f"a pass could not be captured: {reason}", error)
        elif of_kind.captured is not None and of_kind.captured[1] != chunk[1]:
            if not same(of_kind.replayed(), made):
                self.give_up("the replay of a pass differs from the pass")
                return kernels()  # over what the replay has written
            of_kind.compared = chunk
        return made

    def give_up(self, reason: str, cause: BaseException | None = None) -> None:
        """Go on without graphs. Raises RuntimeError where the caller insists."""
        self.on = False
        self.forget()
        if self._insists:
            raise RuntimeError(
                f"{self._name}: graph=True must have passes that can be replayed, but {reason}"
            ) from cause
        warnings.warn(f"worldkv {self._name}: passes are not made of CUDA graphs: {reason}", stacklevel=7)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Of two tensors of one dtype, NaN and the sign of zero included."""
    return a.shape == b.shape and torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (a, b)))


def capture_on(device: torch.device) -> Capture:
    """What makes a CUDA graph on `device` of what a function launches.

    The graphs share their memory, since they run one after the other, and are captured on a stream of their own; other
    threads may use the GPU meanwhile.
    """
    with torch.cuda.device(device):
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def capture(function: Callable[[], None]) -> Replay:
        graph, before, failed = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device), []

        def noted() -> None:
            try:
                function()
            except Exception as error:
                failed.append(error)  # the capture's own end hides it
                raise

        try:
            with (
                torch.cuda.device(device),
                torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                noted()
        except Exception as error:
            raise (failed[0] if failed else error) from None
        finally:
            torch.cuda.set_stream(before)  # which a capture that fails does not
        return graph.replay

    return capture
