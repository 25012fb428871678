"""The safetensors format: 8 bytes of length (little endian), so much JSON, then the tensors' bytes without a gap."""

from __future__ import annotations

import json
import math
import os
import reprlib
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000  # bytes, of the format's own definition
_MOST_DIMENSIONS = 64  # of a torch tensor
_SHOWN, _SHOWN_LETTERS = 5, 200  # names in an error, and letters of each


class StoredTensor(NamedTuple):
    """Where a tensor lies."""

    file: Path
    dtype: str  # the format's name, such as BF16
    shape: tuple[int, ...]
    begin: int  # first byte in the file
    end: int


class Header(NamedTuple):
    """What a file says of itself."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_header(op: str, file: Path) -> Header:
    """Of a file that is there. Raises ValueError naming `op` where it is not as the format says, or cut short."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise ValueError(f"{op}: {file} must start with a safetensors header, got a file of {size} bytes")
        text = opened.read(length)
    header = parsed(op, f"the header of {file}", text, unique)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{op}: the header of {file} must have metadata of strings, got {reprlib.repr(metadata)}")
    layout = {name: _entry(op, file, name, entry, 8 + length) for name, entry in header.items()}
    expected = 8 + length
    for name, stored in sorted(layout.items(), key=lambda item: (item[1].begin, item[1].end)):
        wanted = math.prod(stored.shape) * DTYPES[stored.dtype].itemsize if stored.dtype in DTYPES else None
        if stored.begin != expected or stored.end < stored.begin or wanted not in (None, stored.end - stored.begin):
            raise ValueError(
                f"{op}: {file} must have {shown(name)} {shown(stored.dtype)} {list(stored.shape)} from byte "
                f"{expected} on, got bytes {stored.begin} to {stored.end}"
            )
        expected = stored.end
    if size != expected:
        raise ValueError(f"{op}: {file} must have the {expected} bytes that its header says, got {size}")
    return Header(layout, metadata)


def header_bytes(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """What a file of tensors of these dtypes and shapes begins with; they follow in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class Unfinished:
    """A file to write, which takes the place of an older one at `path` when the `with` block ends well, and not
    before: whoever is killed inside leaves the old one, and beside it what was written, which the next one overwrites.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._unfinished = path, path.with_name(f"{path.name}.unfinished")

    def __enter__(self) -> BinaryIO:
        self._file = open(self._unfinished, "wb")
        return self._file

    def __exit__(self, kind: object, *error: object) -> None:
        done = False
        try:
            with self._file:  # closing it writes what is buffered, which fails once more on a full disk
                if kind is None:
                    self._file.flush()
                    os.fsync(self._file.fileno())
            if kind is None:
                self._unfinished.replace(self._path)
                done = True
        except OSError:
            if kind is None:
                raise
        finally:
            if not done:
                self._unfinished.unlink(missing_ok=True)
        if done:
            _sync_folder(self._path.parent)


def _sync_folder(folder: Path) -> None:
    """Let the names in it outlive a loss of power, where the system can."""
    try:
        opened = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(opened)
    except OSError:
        pass
    finally:
        os.close(opened)


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, where they lie."""
    return memoryview(tensor.detach().flatten().view(torch.uint8).numpy())


def parsed(op: str, what: str, text: bytes, made_of: Callable[[list], Any] | None = None) -> dict[str, Any]:
    """A JSON object. Raises ValueError naming `op` and `what` where it is none. `made_of` makes objects of pairs."""
    try:
        found = json.loads(text, object_pairs_hook=made_of)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{op}: {what} must be JSON, got {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{op}: {what} must be a JSON object, got {type(found).__name__}")
    return found


def unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """A dictionary of pairs. Raises ValueError where a key comes twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r:.80} twice")
    return found


def shown(name: str) -> str:
    """A name from a file, for an error."""
    return name if len(name) <= _SHOWN_LETTERS else f"{name[:_SHOWN_LETTERS]}..."


def abbreviated(names: Iterable[str]) -> str:
    """The first few names, for an error."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(shown, names[:_SHOWN])) + more


def _entry(op: str, file: Path, name: str, entry: Any, start: int) -> StoredTensor:
    """Of a header whose data begin at byte `start`."""
    dtype, shape, offsets = (
        entry.get(field) if isinstance(entry, dict) else None for field in ("dtype", "shape", "data_offsets")
    )
    if not (isinstance(dtype, str) and _are_counts(shape) and _are_counts(offsets) and len(offsets) == 2):
        raise ValueError(
            f"{op}: the header of {file} must give {shown(name)} a dtype, a shape and two data_offsets, "
            f"got {reprlib.repr(entry)}"
        )
    return StoredTensor(file, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _are_counts(found: Any) -> bool:
    few = isinstance(found, list) and len(found) <= _MOST_DIMENSIONS
    return few and all(type(n) is int and 0 <= n < 2**63 for n in found)
