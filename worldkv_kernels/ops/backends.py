"""Which implementation of an op runs: the rule, the first-use check, and what `worldkv doctor` reports.

On a CPU `auto` is PyTorch's own attention where an op has that (`OpBackends.on_cpu`), then the reference.
On a GPU it is a CUDA kernel where one is built and proven for the architecture, then Triton, then
PyTorch's own, then the reference. An op may have the order by what has been measured, on this machine or in
the repository: which is right and which is fast are two questions. The first automatic use of a kernel in a
process, per device and kind of problem, compares it with the reference on a small case; on disagreement the
next backend serves, with one warning and a mark in the report.
WORLDKV_SELF_CHECK=0 switches this off.

WORLDKV_BACKEND=<name> stands for that name in calls with backend=None or "auto" of every op that has such a
backend; others keep `auto`. As when it is asked for by name, it is an error where it cannot run.

WORLDKV_STRICT=1 makes an error, with its reason, of each fallback of `auto`: a backend before the serving
one that is missing (not installed, not built, not loadable, or not in this torch), that no run has proven on
this architecture, or that disagreed on first use or failed. No fallback is what no installation changes
(`Cannot`): a backend that is not for such a device, as CUDA is not for a CPU, or not for such a problem, as
CUDA is not for fp32; nor is the order of what is measured faster.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from ..ranges import ranged
from . import faster, proven

Run = Callable[..., None]
Kind = tuple  # what selects a compiled variant: the dtype first, then sizes and flags


NAMES = ("cuda", "triton", "sdpa", "reference")  # of all ops


class Cannot(str):
    """A reason that no installation changes: the device, or the kind of problem, is not what a backend is for."""


def forced() -> str | None:
    """The backend of WORLDKV_BACKEND, None where it says none. Raises ValueError on a name that no op has."""
    name = os.environ.get("WORLDKV_BACKEND") or None
    if name is not None and name != "auto" and name not in NAMES:
        raise ValueError(f"WORLDKV_BACKEND must be auto or one of {', '.join(map(repr, NAMES))}, got {name!r}")
    return None if name == "auto" else name


def strict() -> bool:
    """Whether a fallback of `auto` is an error: WORLDKV_STRICT=1."""
    return os.environ.get("WORLDKV_STRICT") == "1"


def triton_unavailable(device: torch.device) -> str | None:
    """Why Triton cannot run on `device`; None when it can."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "triton on a CPU needs TRITON_INTERPRET=1 before the first import"
    if device.type != "cuda" or torch.version.hip:
        return Cannot(f"triton {triton.__version__} is supported here on NVIDIA GPUs only")
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else Cannot(f"compute capability {capability} is below 8.0")


@dataclass(frozen=True)
class Backend:
    """One implementation: how to load it, why it cannot run on a device, why not on a kind of problem anywhere, and why
    not on a kind of problem on a device."""

    load: Callable[[], Run]
    unavailable: Callable[[torch.device], str | None] = lambda device: None
    unsupported: Callable[[Kind], str | None] = lambda kind: None
    unsupported_on: Callable[[torch.device, Kind], str | None] = lambda device, kind: None

    def why_not(self, device: torch.device, kind: Kind | None) -> str | None:
        """The reason that it cannot run, or None."""
        reason = self.unavailable(device)
        if reason or kind is None:
            return reason
        reason = self.unsupported(kind) or self.unsupported_on(device, kind)
        return Cannot(reason) if reason else None


@dataclass
class OpBackends:
    """The implementations of one op, best first, and what is known of them in this process.

    `small_case(device, kind)` returns a call: given an implementation, it runs it on fresh small inputs of
    that kind, the same on every device, and returns its outputs by name. `tolerance(kind)` is for outputs of
    the kind's dtype, see `differs`. `kinds` are typical ones, for `worldkv doctor`. `proven_as(kind)` is the name of a
    kind's CUDA kernel in the lists of what is proven, the op's own where None: kernels younger than the op's proof have
    another. On a CPU `auto` takes those of `on_cpu` alone. Where there is a `typical_shape`, a
    named tuple of integers, the order on a GPU is faster.py's.
    """

    op: str
    backends: dict[str, Backend]
    small_case: Callable[[torch.device, Kind], Callable[[Run], dict[str, torch.Tensor]]]
    tolerance: Callable[[Kind], float]
    kinds: tuple[Kind, ...]
    on_cpu: tuple[str, ...] = ("reference",)
    typical_shape: Any = None
    proven_as: Callable[[Kind], str] | None = None
    loaded: dict[str, Run] = field(default_factory=dict)
    checked: dict[tuple[str, str, Kind], str | None] = field(default_factory=dict)
    chosen: dict[tuple[str, torch.device, Kind, tuple[faster.Faster, ...] | None, bool], Run] = field(
        default_factory=dict
    )

    def run(self, name: str) -> Run:
        """The implementation called `name`, loaded on first use."""
        if name not in self.loaded:
            self.loaded[name] = self.backends[name].load()
        return self.loaded[name]

    def choose(self, requested: str, device: torch.device, kind: Kind, shape: Any = None) -> Run:
        """The implementation to run: `requested`, or with "auto" the first in `order` that is available and agrees."""
        if requested == "auto":
            requested = self._forced()
        known = self._known(device, shape) if requested == "auto" else None  # of a shape, all that matters
        key = (requested, device, kind, known, strict())
        run = self.chosen.get(key)
        if run is None:
            run = self.run(self.name(requested, device, kind, shape))
            if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
                self.chosen[key] = run
        return run

    def name(self, requested: str, device: torch.device, kind: Kind, shape: Any = None) -> str:
        """What `choose` runs, by name."""
        if requested == "auto":
            requested = self._forced()
        if requested == "auto":
            return self._first(device, kind, shape)
        if requested not in self.backends:
            names = ", ".join(repr(name) for name in self.backends)
            raise ValueError(f"{self.op}: backend must be None or one of {names}, got {requested!r}")
        reason = self.backends[requested].why_not(device, kind)
        if reason:
            raise ValueError(f"{self.op}: backend must be able to run this on {device}, got {requested!r}: {reason}")
        return requested

    def _forced(self) -> str:
        name = forced()
        return name if name in self.backends else "auto"

    def _first(self, device: torch.device, kind: Kind, shape: Any) -> str:
        for name in self.order(device, shape):
            reason = self.passed_over(name, device, kind)
            if reason is None:
                break
            if strict() and not isinstance(reason, Cannot):
                passes = f"WORLDKV_STRICT=1, and auto passes over {name} on {device}"
                raise RuntimeError(f"{self.op}: {passes}: {reason}")
        return name

    def order(self, device: torch.device, shape: Any = None) -> list[str]:
        """All backends, the fastest first; the reference is the last."""
        known = self._known(device, shape)
        return list(self.backends) if known is None else faster.in_order(self.backends, device, known)

    def slower(self, device: torch.device, shape: Any = None) -> str | None:
        """Why the CUDA kernel comes after Triton for a shape, the typical one by default; None where it does not."""
        known, order = self._known(device, shape), self.order(device, shape)
        if known is None or order.index("cuda") < order.index("triton"):
            return None
        return faster.slower(device, known)

    def evidence(self, name: str, device: torch.device, shape: Any = None) -> str:
        """On whose word `name` serves a shape, the typical one by default, where it does."""
        if self._forced() != "auto":
            return "WORLDKV_BACKEND"
        known = self._known(device, shape)
        return "fixed order" if known is None else faster.evidence(name, device, known)

    def _known(self, device: torch.device, shape: Any) -> tuple[faster.Faster, ...] | None:
        """What faster.py has for a shape; None where the order is always the same."""
        if self.typical_shape is None or device.type != "cuda":
            return None
        return faster.faster_on(self.op, self.typical_shape if shape is None else shape)

    def forget(self) -> None:
        """Drop what this process has learned, so that the next call chooses and checks anew."""
        self.checked.clear()
        self.chosen.clear()

    def proof(self, kind: Kind | None) -> str:
        """What has to be in a list of what is proven before `auto` takes the CUDA kernel of a kind."""
        return self.op if kind is None or self.proven_as is None else self.proven_as(kind)

    def passed_over(self, name: str, device: torch.device, kind: Kind = None) -> str | None:
        """Why `auto` does not take `name` on `device`; None when it may. With a `kind`, checks it on first use."""
        reason = self.backends[name].why_not(device, kind)
        if device.type == "cpu" and name not in self.on_cpu:
            takes = " or ".join(self.on_cpu).replace("reference", "the reference")
            return Cannot(reason or f"auto takes {takes} on a CPU")
        if reason or name == "reference":
            return reason
        if name == "cuda" and not proven.is_proven(self.proof(kind), device):
            return f"no run has proven it on {proven.architecture(device)} (worldkv doctor --prove)"
        if kind is None or os.environ.get("WORLDKV_SELF_CHECK") == "0":
            return None
        key = (name, str(device), kind)
        if key not in self.checked:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return None  # a graph being captured can run no check; the next call outside one does
            self.checked[key] = self.disagreement(name, device, kind)
            if self.checked[key]:
                warnings.warn(
                    f"worldkv {self.op}: the {name} kernel is not used on {device}: {self.checked[key]}", stacklevel=4
                )
        return self.checked[key]

    def disagreement(self, name: str, device: torch.device, kind: Kind) -> str | None:
        """Compare an implementation with the reference on a small case; the reason when they disagree.

        The reference runs on the CPU: there no setting of the caller's, such as TF32, makes it less exact.
        """
        cpu = torch.device("cpu")
        try:
            want = self.small_case(cpu, kind)(self.run("reference"))
            with on_current_device(device):
                got = self.small_case(device, kind)(self.run(name))
            reasons = [differs(output, got[output].cpu(), x, self.tolerance(kind)) for output, x in want.items()]
        except Exception as error:  # a compiler or launch that fails must not take the program down
            return f"it failed on a small case: {type(error).__name__}: {error}"
        return next(filter(None, reasons), None)


def differs(output: str, got: torch.Tensor, want: torch.Tensor, tolerance: float) -> str | None:
    """How an output differs from the reference's by more than it may; None when it does not.

    Integers, and what the tolerance is 0 for, must be equal, with NaN where the reference has it. Else the relative
    error in the 2-norm is limited by `tolerance`, or a tenth of it, 1e-5 at least, where 16-bit inputs give an fp32
    output: that is rounded less.
    """
    if not tolerance or not want.is_floating_point():
        wrong = ((got != want) & ~((got != got) & (want != want))).sum().item()
        return f"its {output} differs from the reference's in {wrong} of {want.numel()} places" if wrong else None
    if want.dtype == torch.float32:
        tolerance = max(1e-5, tolerance / 10)
    got, want = got.float(), want.float()
    error = ((got - want).norm() / want.norm().clamp_min(1e-30)).item()
    if error <= tolerance:
        return None
    return f"its {output} differs from the reference's by {error:.2e}, more than {tolerance:.0e}"


def exact(reference: Run) -> Run:
    """The reference outside the caller's autocast, which would have its products in 16 bits."""

    def run(*tensors: torch.Tensor | None, **options: object) -> None:
        kind = tensors[0].device.type
        off = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
        with off:  # a device may have none
            reference(*tensors, **options)

    return run


def on_current_device(device: torch.device) -> AbstractContextManager:
    """Makes `device` current while a kernel is launched: Triton launches on the current GPU, whatever the tensors'."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def dtype_tolerance(dtype: torch.dtype) -> float:
    """Relative error in the 2-norm that two right implementations may differ by."""
    return {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]


def _library() -> torch.library.Library:
    """The namespace of torch.ops that this copy of the package has to itself.

    A process may hold several copies, such as one that was imported anew and what its old objects still call, or one
    vendored under another name; their schemas may differ. The first has `worldkv`, and the others `worldkv_2` and so
    on. Nobody takes a namespace over: compiled graphs, and whoever kept an op, go on calling the copy that they know.
    """
    copy, namespace = 1, "worldkv"
    while True:
        try:
            return torch.library.Library(namespace, "DEF")
        except RuntimeError as error:
            if "Only a single TORCH_LIBRARY" not in str(error):
                raise
        copy += 1
        namespace = f"worldkv_{copy}"


LIBRARY = globals().get("LIBRARY") or _library()  # kept by a reload in place: the ops go with the object
NAMESPACE = getattr(torch.ops, LIBRARY.ns)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = globals().get("IMPLEMENTATIONS") or {}


def register(
    schema: str,
    implementation: Callable[..., Any],
    *,
    fake: Callable[..., Any] = lambda *args: None,
    tags: tuple[torch.Tag, ...] = (),
) -> None:
    """Define NAMESPACE.<op>, or where its module is reloaded in place, let the op run the new code.

    The fake that does nothing is that of the ops that only write into tensors they are given.
    """
    name = schema.split("(", 1)[0]
    defined = name in IMPLEMENTATIONS
    IMPLEMENTATIONS[name] = ranged(name)(implementation)
    if defined:
        return
    LIBRARY.define(schema, tags=tags)
    # Of every device that torch has: where no kernel of ours runs, the reference does.
    LIBRARY.impl(name, lambda *args: IMPLEMENTATIONS[name](*args), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{LIBRARY.ns}::{name}", fake, lib=LIBRARY)
