"""Argument checks shared by the ops. Every message names the op, the argument, what was wanted and what came."""

from __future__ import annotations

import numbers
import operator
import os
from typing import NamedTuple

import numpy as np
import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (64, 128)
MAX_HEADS = 128
MIN_SCALE, MAX_SCALE = 1e-25, 1e25  # of scores: products with any fp16 scores are normal numbers of fp32


def debug() -> bool:
    """Whether checks that read the device's data may run: WORLDKV_DEBUG=1."""
    return os.environ.get("WORLDKV_DEBUG") == "1"


def readable(tensor: torch.Tensor) -> bool:
    """Whether a check may read this tensor: on a CPU yes, on a GPU, which synchronises, where `debug` says so.

    Not while torch.compile traces, nor while a CUDA graph is captured.
    """
    if torch.compiler.is_compiling():
        return False
    if tensor.device.type == "cpu":
        return True
    return debug() and not (tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def describe(value: object) -> str:
    """What came, in few words: shape and dtype of a tensor or an array, otherwise the value itself, cut if long."""
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {value.dtype} on {value.device} with stride {tuple(value.stride())}"
    if isinstance(value, np.ndarray):
        return f"a numpy array {list(value.shape)} {value.dtype}"
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return f"{type(value).__name__} too long to print"
    return text if len(text) <= 200 else f"{text[:197]}..."


def byte_size(count: float) -> str:
    """Bytes in the unit that fits, as 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def bad_value(op: str, argument: str, wanted: str, got: object) -> ValueError:
    return ValueError(f"{op}: {argument} must be {wanted}, got {describe(got)}")


def bad_type(op: str, argument: str, wanted: str, got: object) -> TypeError:
    return TypeError(f"{op}: {argument} must be {wanted}, got {describe(got)}")


def is_integer(value: object) -> bool:
    """Whether it is an integer of Python or numpy; True and False are none, nor is a tensor."""
    if type(value) is int:
        return True
    return hasattr(value, "__index__") and not isinstance(value, (bool, np.bool_, torch.Tensor, np.ndarray))


def is_number(value: object) -> bool:
    """Whether it is a real number of Python or numpy; True and False are none, nor is a tensor."""
    if type(value) is float or type(value) is int:
        return True
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_integer(op: str, argument: str, value: object) -> None:
    if not is_integer(value):
        raise bad_type(op, argument, "an integer", value)


def check_int64(op: str, argument: str, value: object) -> None:
    """Check an integer that goes to a registered op, whose schema holds 64 bits."""
    check_integer(op, argument, value)
    if not -(2**63) <= value < 2**63:
        raise bad_value(op, argument, "an integer of 64 bits", value)


def as_integer(op: str, argument: str, value: object) -> int:
    check_integer(op, argument, value)
    return operator.index(value)


def check_number(op: str, argument: str, value: object) -> None:
    as_number(op, argument, value)


def as_number(op: str, argument: str, value: object) -> float:
    """As a float, which may be infinite or NaN; ValueError on one like 10**400, which no float holds."""
    if not is_number(value):
        raise bad_type(op, argument, "a number", value)
    try:
        return float(value)
    except OverflowError as error:
        raise bad_value(op, argument, "a number that a float can hold", value) from error


def check_scale(op: str, argument: str, value: object) -> None:
    """Check a softmax's scale, which multiplies scores in fp32."""
    check_number(op, argument, value)
    if not MIN_SCALE <= value <= MAX_SCALE:
        raise bad_value(op, argument, f"from {MIN_SCALE:.0e} to {MAX_SCALE:.0e}", value)


def check_bool(op: str, argument: str, value: object) -> None:
    if not isinstance(value, bool):
        raise bad_type(op, argument, "True or False", value)


def check_backend(op: str, backend: object) -> None:
    """Check the type alone: which names there are, and whether they run here, says the op's table."""
    if backend is not None and not isinstance(backend, str):
        raise bad_type(op, "backend", "None or a name", backend)


def as_device(op: str, device: object, *, only: tuple[str, ...] | None = ("cpu", "cuda")) -> torch.device:
    """The device of tensors made on `device`: "cuda" becomes "cuda:0". Raises ValueError where torch can make none, or
    it is none of the `only` types; None is any whose tensors hold numbers."""
    wanted = f"'cpu' or a {'CUDA ' * (only is not None)}device that torch can use here"
    try:
        found = torch.empty(0, dtype=torch.uint8, device=device).device
    except TypeError as error:
        raise bad_type(op, "device", wanted, device) from error
    except (RuntimeError, AssertionError) as error:  # what torch without CUDA raises, and CUDA without a GPU
        raise ValueError(f"{op}: device must be {wanted}, got {device!r}: {str(error).splitlines()[0]}") from error
    if found.type == "meta" or (only is not None and found.type not in only):
        raise bad_value(op, "device", wanted, device)
    return found


def check_tensor(
    op: str,
    argument: str,
    tensor: object,
    shape: tuple[int | str, ...],
    *,
    like: torch.Tensor | None = None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    inner: int = 1,
) -> None:
    """Check rank and sizes (a word stands for any size), dtype, device, and that the last `inner` dims are dense.

    With `like`, dtype and device must be those of that tensor, unless `dtypes` names others. A tensor that would want a
    gradient is refused: the ops are for inference, and it would silently get none.
    """
    if not isinstance(tensor, torch.Tensor):
        raise bad_type(op, argument, f"a tensor [{', '.join(map(str, shape))}]", tensor)
    fits = tensor.dim() == len(shape)
    for have, want in zip(tensor.shape, shape):  # noqa: B905
        fits = fits and (have == want or isinstance(want, str))
    if not fits:
        raise bad_value(op, argument, f"[{', '.join(map(str, shape))}]", tensor)
    if like is not None and dtypes is DTYPES:
        dtypes = (like.dtype,)
    if tensor.dtype not in dtypes:
        raise bad_type(op, argument, " or ".join(map(str, dict.fromkeys(dtypes))), tensor)
    if tensor.requires_grad and torch.is_grad_enabled():
        wanted = "without requires_grad, since nothing flows back; use torch.no_grad()"
        raise ValueError(f"{op}: {argument} must be {wanted}, got requires_grad=True")
    if like is not None and tensor.device != like.device:
        raise bad_value(op, argument, f"on {like.device}", tensor)
    if inner == len(shape) and tensor.is_contiguous():
        return
    dense = 1
    for dim in range(len(shape) - 1, len(shape) - 1 - inner, -1):
        if tensor.shape[dim] != 1 and tensor.stride(dim) != dense:
            raise bad_value(op, argument, f"contiguous in its last {inner} dimension(s)", tensor)
        dense *= tensor.shape[dim]


def check_layout(
    op: str, argument: str, tensor: object, shape: tuple[int | str, ...], *, like: torch.Tensor | None = None
) -> None:
    """Check that it is a tensor of that rank, and on the device of `like`: what has to be known before an op is called.

    The op itself checks the rest, by `check_tensor`, since torch.ops.worldkv is called from elsewhere, too. It does not
    get to it where torch finds a tensor on the device "meta", and takes the op's fake.
    """
    if not isinstance(tensor, torch.Tensor):
        raise bad_type(op, argument, f"a tensor [{', '.join(map(str, shape))}]", tensor)
    if tensor.dim() != len(shape):
        batched = tensor.dim() == len(shape) + 1 and isinstance(shape[0], str)
        limit = " without a batch dimension: one session a call" if batched else ""
        raise bad_value(op, argument, f"[{', '.join(map(str, shape))}]{limit}", tensor)
    if like is not None and tensor.device != like.device:
        raise bad_value(op, argument, f"on {like.device}", tensor)


def check_heads(op: str, argument: str, tensor: torch.Tensor, layout: str) -> None:
    """Check the last two sizes of a tensor [..., heads, head_dim]."""
    heads, head_dim = tensor.shape[-2:]
    if not (1 <= heads <= MAX_HEADS and head_dim in HEAD_DIMS):
        sizes = f"with 1 to {MAX_HEADS} heads and head_dim {' or '.join(map(str, HEAD_DIMS))}"
        raise bad_value(op, argument, f"{layout}, heads not first, {sizes}", tensor)


class Pieces(NamedTuple):
    """The bytes of a tensor, piece by piece along one dimension: where pieces start, and how far each reaches."""

    starts: range
    reach: int

    @classmethod
    def of(cls, tensor: torch.Tensor, dim: int = 0) -> Pieces:
        """Along `dim`. A piece counts as all from its first byte to its last."""
        first, size, count, strides = tensor.data_ptr(), tensor.element_size(), tensor.shape[dim], tensor.stride()
        others = sum((n - 1) * stride for n, stride in zip(tensor.shape, strides, strict=True))
        reach = (1 + others - (count - 1) * strides[dim]) * size
        step = strides[dim] * size
        starts = range(first, first + count * step, step) if count > 1 and step else range(first, first + 1)
        return cls(starts, reach)

    def meets(self, other: Pieces) -> bool:
        """Whether a piece of one and a piece of the other have a byte in common."""
        starts, others = self.starts, other.starts
        if starts[0] >= others[-1] + other.reach or others[0] >= starts[-1] + self.reach:
            return False
        if starts.step == others.step:
            # How two pieces lie to each other follows from how many pieces they are apart: one stands for all.
            others = range(others.start - (len(starts) - 1) * others.step, others.stop, others.step)
            starts = starts[:1]
        for start in starts:
            first_to_end_later = max(0, (start - other.reach - others.start) // others.step + 1)
            if first_to_end_later < len(others) and others[first_to_end_later] < start + self.reach:
                return True
        return False

    def __str__(self) -> str:
        if len(self.starts) == 1:
            return f"bytes {(self.starts[0], self.starts[0] + self.reach)}"
        return f"{len(self.starts)} x {self.reach} bytes, {self.starts.step} apart, from {self.starts[0]}"


def check_apart(op: str, outputs: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]) -> None:
    """Raise ValueError where an output shares bytes with another output, an input or itself; no tensor may be empty.

    Tensors of different storages are apart, which costs least and is the rule. In one storage addresses and strides
    decide: a row counts as all from its first byte to its last, or a head where the heads are the farther apart. Of an
    output by itself each stride has to step over all that the smaller ones span. Does nothing while torch.compile
    traces, when there are no addresses.
    """
    if torch.compiler.is_compiling():
        return
    for name, tensor in outputs.items():
        if not tensor.is_contiguous():
            _check_nested(op, name, tensor)
    written = {tensor.untyped_storage()._cdata for tensor in outputs.values()}
    if len(written) == len(outputs) and not any(x.untyped_storage()._cdata in written for x in inputs.values()):
        return
    tensors = [*outputs.items(), *inputs.items()]
    for i, (name, tensor) in enumerate(tensors[: len(outputs)]):
        for other_name, other in tensors[i + 1 :]:
            if tensor.untyped_storage()._cdata == other.untyped_storage()._cdata and not _clearly_apart(tensor, other):
                here, there = Pieces.of(tensor, _outermost(tensor)), Pieces.of(other, _outermost(other))
                if here.meets(there):
                    raise ValueError(f"{op}: {name} must not overlap {other_name}, got {here} and {there}")


def _check_nested(op: str, argument: str, tensor: torch.Tensor) -> None:
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reach:
            raise ValueError(f"{op}: {argument} must not overlap itself, got {describe(tensor)}")
        reach += (size - 1) * stride


def _clearly_apart(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether one dense tensor ends before another starts, such as K and V in one piece. `Pieces` cost more."""
    if not (tensor.is_contiguous() and other.is_contiguous()):
        return False
    first, second = tensor.data_ptr(), other.data_ptr()
    return first + tensor.nbytes <= second or second + other.nbytes <= first


def _outermost(tensor: torch.Tensor) -> int:
    """The dimension whose pieces lie farthest from each other."""
    return max(range(tensor.dim()), key=lambda dim: tensor.stride(dim) * (tensor.shape[dim] > 1))
