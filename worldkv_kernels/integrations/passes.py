"""The passes of a model's own forward as CUDA graphs."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..replays import Replays, same_bits
from ..replays import capture_on as _capture_on
from .chunks import Chunks
from .watch import UPLOADS_DIFFER, Watch, same_uploads, source_line

_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)
_KINDS = 8  # of passes over a branch at a time; a pipeline has two or three
_HOST_NUMBERS = 64  # at most, in a tensor of the host, which is a part of the kind
COMPILED = "the model is compiled by torch.compile, which graphs are not made of"
# Arguments for the self-attention whose place the memory has taken.
_FREE = ("current_start", "cache_start", "kv_cache", "max_attention_size")


class Passes:
    """What an enabled model calls in place of its own forward.

    A pass is of a kind: the structure of its arguments with all that is no tensor, the tensors' shapes, the branch that
    it is of, and the autocast and inference mode that it runs in; but for the arguments named in `_FREE`. When one is
    captured, compared and replayed: see Replays. Then

    - the arguments' tensors are copied to fixed addresses, those that are others than at the copy before, or written
      since (as torch counts it: not by way of `.data`);
    - what is returned is a copy, which no later replay overwrites;
    - tensors that a pass makes on the host and copies to the device, such as a table of frequencies, are copied before
      the capture. They must be the same from chunk to chunk: a graph reads nothing on the host.

    A pass that reads the device on the host, or writes into its arguments, is none to capture. That is no reason to
    give up where it only comes in chunk 0, as the pass does that fills the text's cache; nor where one that puts
    tensors into dicts comes again when there are graphs, as after a change of the prompt: it is made of its kernels.

    The graphs are of one memory, and of the model's tensors where they lie: where one has moved, all begins anew. What
    else of the model changes after a capture, such as a hook or a number, they do not see.

    Args:
        signature: of `forward`'s arguments.
        insists: as in Replays.
    """

    def __init__(
        self, name: str, model: nn.Module, chunks: Chunks, signature: inspect.Signature, *, insists: bool
    ) -> None:
        self.replayed = 0
        self._model, self._chunks = model, chunks
        self._device = device = chunks.made().device
        self._names = list(signature.parameters)
        self._replays = Replays(name, insists=insists, capture_on=lambda: _capture_on(device))
        self._addresses: list[int] = []
        self.forget()

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], chunk: int) -> Any:
        """forward(*args, **kwargs), or a replay of it; inside a pass of the chunks over `chunk`."""

        def kernels() -> Any:
            return forward(*args, **kwargs)

        if self._replays.on:
            self._follow()
        if not self._replays.on:
            self.forget()
            return kernels()
        tensors: list[torch.Tensor] = []
        given = self._given(args, kwargs)
        try:
            kind = (self._kind(given, tensors), self._chunks.branch, *_modes(self._device))
        except TypeError as error:
            self.give_up(str(error))
            return kernels()
        if kind in self._never:
            if chunk and not (self._inputs and kind in self._fills):
                self.give_up(f"a pass could not be captured: {self._never[kind]}")
            return kernels()
        if kind not in self._uploads and len(self._uploads) == _KINDS * self._chunks.config.branches:
            if not self._inputs:
                self.give_up("the arguments have other shapes or values in each chunk")
                return kernels()
            self.forget()
        self._now = tensors
        try:
            return self._replays.made(
                kind,
                (self._chunks.begun, chunk),
                kernels if kind in self._inputs else lambda: self._watched(kernels, kind, given, tensors, chunk),
                lambda made: self._captured(forward, kind, args, kwargs),
                _same,
            )
        finally:
            self._now = []

    def give_up(self, reason: str) -> None:
        """Go on without graphs; RuntimeError where the user insists."""
        self.forget()
        self._replays.give_up(reason)

    def forget(self) -> None:
        """Begin anew, with no graph; what the graphs held is free."""
        self._replays.forget()
        self._inputs: dict[Hashable, _Inputs] = {}  # of the kinds that are captured
        self._uploads: dict[Hashable, list[torch.Tensor]] = {}  # of each kind, in its last pass
        self._never: dict[Hashable, str] = {}  # kinds that no graph can stand for, and why
        self._fills: set[Hashable] = set()  # of these, kinds that put tensors into dicts or lists
        self._now: list[torch.Tensor] = []

    # --- parts of the above ---

    def _follow(self) -> None:
        """Begin anew if a tensor of the model's is elsewhere than it was."""
        addresses = _addresses(self._model)
        if self._addresses and self._addresses == addresses:
            return
        self.forget()
        if any(_is_compiled(module) for module in self._model.modules()):
            self.give_up(COMPILED)
        self._addresses = addresses

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name, but for the free ones."""
        named = dict(zip(self._names, args, strict=False)) | kwargs
        return {name: value for name, value in named.items() if name not in _FREE}

    def _kind(self, value: Any, tensors: list[torch.Tensor]) -> Hashable:
        """What a graph takes for granted of arguments, whose tensors are appended to a list. TypeError on others."""
        if isinstance(value, torch.Tensor):
            if value.device == self._device:
                tensors.append(value)
                return torch.Tensor, value.dtype, value.shape
            if value.numel() <= _HOST_NUMBERS:
                return torch.Tensor, value.dtype, value.shape, str(value.tolist())
            raise TypeError(f"an argument lies on {value.device}, of shape {list(value.shape)}")
        if type(value) is dict:
            return dict, tuple((name, self._kind(item, tensors)) for name, item in value.items())
        if type(value) in (list, tuple):
            return type(value), tuple(self._kind(item, tensors) for item in value)
        if isinstance(value, _PLAIN):
            return type(value), value
        raise TypeError(f"an argument is a {type(value).__name__}, which could hold tensors")

    def _watched(
        self, kernels: Callable[[], Any], kind: Hashable, given: Any, tensors: list[torch.Tensor], chunk: int
    ) -> Any:
        """The pass itself, watched for what a graph cannot do."""
        before = _leaves(given)
        with Watch(self._device, tensors) as watch:
            made = kernels()
        after, reason = _leaves(given), watch.reason
        fills = len(after) != len(before) or any(a is not b for a, b in zip(after, before, strict=True))
        if fills:
            reason = reason or "a pass changes lists or dicts among its arguments"
            self._fills.add(kind)
        if not same_uploads(watch.uploads, self._uploads.get(kind, watch.uploads)):
            reason = reason or UPLOADS_DIFFER
        self._uploads[kind] = watch.uploads
        if reason and chunk and not (fills and self._inputs):
            self.give_up(f"a pass could not be captured: {reason}")
        elif reason:
            self._never[kind] = reason
        return made

    def _captured(
        self, forward: Callable[..., Any], kind: Hashable, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[[], Any]:
        """A function that replays the pass over the arguments of now. RuntimeError where it cannot be captured."""
        memory, inputs = self._chunks.made(), _Inputs(self._now)
        fixed = iter(inputs.fixed)

        def at_home(value: Any) -> Any:
            return next(fixed) if isinstance(value, torch.Tensor) and value.device == self._device else value

        mapped = {name: _mapped(value, at_home) for name, value in self._given(args, kwargs).items()}
        own_args = [mapped.get(name, value) for name, value in zip(self._names, args, strict=False)]
        own_kwargs = {name: mapped.get(name, value) for name, value in kwargs.items()}
        inputs.uploads = [upload.to(self._device) for upload in self._uploads[kind]]
        watch = Watch(self._device, inputs.fixed, known=(self._uploads[kind], inputs.uploads))
        made: list[Any] = []
        before = _leaves(mapped)
        inputs.take(self._now)
        memory.wait()

        def one_pass() -> None:
            with _uncached_autocast(self._device), watch:
                made.append(forward(*own_args, **own_kwargs))

        try:
            replay = self._replays.capture(one_pass)
        except RuntimeError as error:
            raise RuntimeError(f"{str(error).splitlines()[0]}{source_line(error)}") from error
        if watch.reason or any(a is not b for a, b in zip(_leaves(mapped), before, strict=True)):
            raise RuntimeError(watch.reason or "a pass changes lists or dicts among its arguments")
        self._inputs[kind] = inputs
        branches = self._chunks.of_pass

        def replayed() -> Any:
            memory.wait()  # a graph cannot wait for copies outside of it
            inputs.take(self._now)
            replay()
            self._chunks.replayed(branches)
            self.replayed += 1
            return _mapped(made[0], lambda value: value.clone() if isinstance(value, torch.Tensor) else value)

        return replayed


class _Inputs:
    """What a graph reads that is neither the model's nor the memory's: it lives as long as the graph.

    `fixed` are the tensors among the arguments, `uploads` what the pass makes on the host.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.fixed = [torch.empty_like(tensor) for tensor in tensors]
        self.uploads: list[torch.Tensor] = []
        self._from: list[tuple[weakref.ref[torch.Tensor], int] | None] = [None] * len(tensors)

    def take(self, tensors: list[torch.Tensor]) -> None:
        for index, (tensor, fixed, last) in enumerate(zip(tensors, self.fixed, self._from, strict=True)):
            counts = not tensor.is_inference()  # the times that it was written
            if last is not None and counts and last[0]() is tensor and last[1] == tensor._version:
                continue
            fixed.copy_(tensor)
            self._from[index] = (weakref.ref(tensor), tensor._version) if counts else None


def why_not(called: nn.Module, model: nn.Module) -> str | None:
    """Why a model's passes cannot be graphs on any device; None where they may be. `called` may be a wrapper of it."""
    sharded = any(hasattr(parameter, "device_mesh") for parameter in model.parameters())
    if called is not model or sharded or any(hasattr(module, "_fsdp_wrapped_module") for module in model.modules()):
        return "the model is wrapped or sharded"
    return None


def why_not_on(device: torch.device) -> str | None:
    """Why there are no graphs on a device; None where there may be."""
    return None if device.type == "cuda" else f"the model is on {device}"


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(getattr(module, "_orig_mod", None), nn.Module) or module._compiled_call_impl is not None


def _addresses(model: nn.Module) -> list[int]:
    """Of the model's tensors: parameters, buffers and plain attributes of the modules that it has now."""
    return [
        value.data_ptr()
        for module in model.modules()
        for kept in (module._parameters, module._buffers, module.__dict__)
        for value in kept.values()
        if isinstance(value, torch.Tensor)
    ]


def _modes(device: torch.device) -> tuple[Hashable, ...]:
    """What else an operation on a device depends on."""
    autocast = torch.is_autocast_enabled(device.type)
    return (
        torch.get_autocast_dtype(device.type) if autocast else None,
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(),
    )


def _uncached_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The autocast that is, without its cache of weights: what lies there is freed at its end, and graphs stay."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.get_autocast_dtype(device.type), cache_enabled=False)


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    if type(value) is dict:
        return {name: _mapped(item, function) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, function) for item in value)
    return function(value)


def _leaves(value: Any) -> list[Any]:
    leaves: list[Any] = []
    _mapped(value, leaves.append)
    return leaves


def _same(a: Any, b: Any) -> bool:
    def same(x: Any, y: Any) -> bool:
        if isinstance(x, torch.Tensor):
            return isinstance(y, torch.Tensor) and x.dtype == y.dtype and same_bits(x, y)
        return bool(x == y)

    leaves, others = _leaves(a), _leaves(b)
    return len(leaves) == len(others) and all(map(same, leaves, others))
