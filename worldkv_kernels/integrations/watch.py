"""What a pass does that a CUDA graph cannot, or would do otherwise."""

from __future__ import annotations

import sys
import traceback
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

UPLOADS_DIFFER = "a pass copies other numbers from the host than in the pass before"
_ATEN = torch.ops.aten
_READS = (_ATEN._local_scalar_dense.default, _ATEN.nonzero.default, _ATEN.equal.default)
_TORCH, _OURS = str(Path(torch.__file__).parent), str(Path(__file__).parents[1])


class Watch(TorchDispatchMode):
    """Around a pass: `reason` says what a graph of it could not do, `uploads` is what it copies from host to device.

    Operations that read the device on the host, or write into `arguments`, are reasons; not this package's own, which
    under WORLDKV_DEBUG=1 looks at values, but in no capture. With `known`, the uploads of the pass before and their
    copies on the device, a capture takes those in their place; RuntimeError where they differ.
    """

    def __init__(
        self,
        device: torch.device,
        arguments: list[torch.Tensor],
        known: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.reason: str | None = None
        self.uploads: list[torch.Tensor] = []
        self._device, self._known = device, known
        self._arguments = {_storage(argument) for argument in arguments} - {0}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # in which torch has not taken it apart yet
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        source = _uploaded(func, args, kwargs, self._device)
        if source is not None and not _is_ours(sys._getframe(1)):
            args = self._upload(args, source)
        if self.reason is None:
            does = "reads the device on the host" if _reads(func, args, kwargs, self._device) else None
            if any(_storage(one) in self._arguments for one in _written(func, args, kwargs)):
                does = does or "writes into an argument"
            if does is not None and not _is_ours(sys._getframe(1)):
                self.reason = f"{func} {does}{_line_of(sys._getframe(1))}"
        return func(*args, **kwargs)

    def _upload(self, args: tuple, source: torch.Tensor) -> tuple:
        """The arguments of a copy to the device, of the host's tensor or of what is there already."""
        if self._known is None:
            self.uploads.append(source.detach().clone())
            return args
        index = len(self.uploads)
        self.uploads.append(source)
        known, there = self._known
        if index >= len(known) or not same_uploads([source], [known[index]]):
            raise RuntimeError(UPLOADS_DIFFER)
        return tuple(there[index] if argument is source else argument for argument in args)


def same_uploads(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    with _disable_current_modes():  # a capture is no place for comparisons, of the host's tensors either
        return len(some) == len(others) and all(
            a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(some, others, strict=True)
        )


def source_line(error: BaseException) -> str:
    """Where in the model's code an error comes from, as a part of a message."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return _said(next((frame for frame in reversed(frames) if _is_the_models(frame)), None))


def _uploaded(func: Any, args: tuple, kwargs: dict[str, Any], device: torch.device) -> torch.Tensor | None:
    """The tensor of the host that a copy brings to the device; None of another operation."""
    if device.type == "cpu":
        return None
    if func is _ATEN.copy_.default:
        return args[1] if args[0].device.type == device.type and args[1].device.type == "cpu" else None
    if func is _ATEN._to_copy.default and args[0].device.type == "cpu":
        to = kwargs.get("device")
        return args[0] if to is not None and torch.device(to).type == device.type else None
    return None


def _reads(func: Any, args: tuple, kwargs: dict[str, Any], device: torch.device) -> bool:
    if func in _READS:
        return any(isinstance(one, torch.Tensor) and one.device.type == device.type for one in args)
    if device.type == "cpu":
        return False
    if func is _ATEN.copy_.default:
        return args[0].device.type == "cpu" and args[1].device.type == device.type
    to = kwargs.get("device") if func is _ATEN._to_copy.default else None
    return to is not None and torch.device(to).type == "cpu" and args[0].device.type == device.type


@cache
def _written_by(func: Any) -> tuple[tuple[int, str], ...]:
    arguments = enumerate(func._schema.arguments)
    return tuple((i, one.name) for i, one in arguments if one.alias_info is not None and one.alias_info.is_write)


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operation writes."""
    found: list[torch.Tensor] = []
    for index, name in _written_by(func):
        one = args[index] if index < len(args) else kwargs.get(name)
        found += [x for x in (one if isinstance(one, list | tuple) else [one]) if isinstance(x, torch.Tensor)]
    return found


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_the_models(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    return not name.startswith((_TORCH, _OURS, "<"))


def _is_ours(frame: FrameType | None) -> bool:
    """Whether an operation is called by this package, if by way of torch."""
    while frame is not None and frame.f_code.co_filename.startswith((_TORCH, __file__, "<")):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(_OURS)


def _line_of(frame: FrameType | None) -> str:
    while frame is not None and not _is_the_models(frame):
        frame = frame.f_back
    return _said(frame)


def _said(frame: FrameType | None) -> str:
    if frame is None:
        return ""
    return f" ({Path(frame.f_code.co_filename).name}, line {frame.f_lineno}, in {frame.f_code.co_name})"
