"""Saved state: a tree of plain values and tensors in one safetensors file, every byte of it checked when it is read.

The tree is None, bool, int, float, str, lists, tuples and dictionaries of these (not what is derived from them, which
would come back as another type), numpy arrays and numbers, tensors and `Rows`.
Plain values, and what the tensors are called, are JSON in the file's metadata; nothing in a file is run or imported.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import __version__
from .tensor_file import (
    LARGEST_HEADER,
    NAMES,
    StoredTensor,
    Unfinished,
    abbreviated,
    header_bytes,
    raw,
    read_header,
    unique,
)

VERSION = 1
_PIECE = 2**25  # bytes that are read, or copied from a device, at once
# What code meets that takes a tree apart which `write` did not write.
_MALFORMED = (TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RuntimeError)
_PLAIN = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Rows:
    """One tensor [*lead, *of a piece] whose pieces lie apart, equal in shape, each contiguous; on any device."""

    pieces: Sequence[torch.Tensor]
    lead: tuple[int, ...]

    @classmethod
    def of_layers(cls, num_layers: int, k_and_v: Callable[[int], Iterable[torch.Tensor]]) -> Rows:
        """[num_layers, 2, *of a piece], of K and V of each layer."""
        return cls([piece for layer in range(num_layers) for piece in k_and_v(layer)], (num_layers, 2))

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.lead, *self.pieces[0].shape

    def copy_(self, other: Rows) -> None:
        """Of the same shape and dtype, from any device."""
        for piece, of_other in zip(self.pieces, other.pieces, strict=True):
            piece.copy_(of_other)


class StoredRows:
    """Rows in a file, to be read to where they belong."""

    def __init__(self, saved: Saved, name: str) -> None:
        self._saved, self._name = saved, name

    def into(self, rows: Rows) -> None:
        """Read them. Raises ValueError where the file's are of another shape or dtype, or not what was saved."""
        self._saved.read(self._name, rows)


def write(op: str, path: str | Path, kind: str, tree: dict[str, Any]) -> None:
    """Write a tree to `path`, in place of an older file once it is complete.

    Streamed: tensors on the CPU are written from where they lie, others by way of one buffer of at most 32 MiB. Raises
    TypeError naming `op` and the place where the tree holds anything else, ValueError where `path` is a folder, OSError
    where the system cannot write; an older file is then still there.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{op}: path must be a file's, got the folder {path}")
    tensors: dict[str, Rows] = {}
    state = _packed(op, tree, "", tensors)
    layout = {name: (rows.dtype, rows.shape) for name, rows in tensors.items()}
    sums = dict.fromkeys(tensors, "0" * hashlib.sha256().digest_size * 2)
    with Unfinished(path) as file:
        start = header_bytes(layout, _metadata(op, kind, state, sums))
        if len(start) > LARGEST_HEADER:
            raise ValueError(
                f"{op}: state must take at most {LARGEST_HEADER} bytes beside its tensors, got {len(start)}"
            )
        file.write(start)
        for name, rows in tensors.items():
            digest = _digest(rows)
            for piece in rows.pieces:
                for part in _host_parts(piece):
                    digest.update(raw(part))
                    file.write(raw(part))
            sums[name] = digest.hexdigest()
        file.seek(0)
        file.write(header_bytes(layout, _metadata(op, kind, state, sums)))  # as long as before


class Saved:
    """A file that `write` wrote, of the same `kind`: `tree` is what was given, with StoredRows in place of Rows.

    Arrays and tensors are read here, on the CPU. Raises ValueError naming `op` and the file where it is no such file,
    of a later version, damaged or cut short.
    """

    def __init__(self, op: str, path: str | Path, kind: str) -> None:
        self._op, self.path = op, Path(path)
        if not self.path.is_file():
            raise ValueError(f"{op}: path must be a file that save wrote, got {path}")
        self._layout, metadata = read_header(op, self.path)
        if metadata.get("format") != f"worldkv {kind}":
            raise self.wrong(f"of format 'worldkv {kind}'", repr(metadata.get("format"))[:80])
        if metadata.get("version") != str(VERSION):
            raise self.wrong(f"of version {VERSION}", repr(metadata.get("version"))[:80])
        state = metadata.get("state", "")
        with self.explained():
            if hashlib.sha256(state.encode()).hexdigest() != metadata.get("sha256"):
                raise self.wrong("undamaged", "a state of another checksum")
        self._file = open(self.path, "rb")  # noqa: SIM115, closed by __exit__
        try:
            with self.explained():
                found = json.loads(state, object_pairs_hook=unique)
                self._sums = found["sha256"]
                names = sorted(set(self._sums) ^ set(self._layout))
                if names:
                    raise self.wrong("of the tensors that its state names", abbreviated(names))
                self.tree: dict[str, Any] = self._unpacked(found["tree"])
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Saved:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    @contextmanager
    def explained(self, malformed: tuple[type[Exception], ...] = _MALFORMED) -> Iterator[None]:
        """Around what takes the tree apart: whatever it meets becomes a ValueError that names the file."""
        try:
            yield
        except ValueError as error:
            told = str(error)
            if str(self.path) in told:
                raise
            raise ValueError(f"{self._op}: {self.path}: {told.removeprefix(f'{self._op}: ')}") from error
        except malformed as error:
            raise self.wrong("what save wrote", f"{type(error).__name__}: {error}") from error

    def wrong(self, wanted: str, got: object) -> ValueError:
        return ValueError(f"{self._op}: {self.path} must be {wanted}, got {got}")

    def read(self, name: str, rows: Rows) -> None:
        """A tensor's bytes to where `rows` lie, checked when they are there."""
        stored = self._stored(name)
        if (stored.dtype, stored.shape) != (NAMES[rows.dtype], rows.shape):
            got = f"{stored.dtype} {list(stored.shape)}"
            raise self.wrong(f"with {name} {NAMES[rows.dtype]} {list(rows.shape)}", got)
        digest = _digest(rows)
        self._file.seek(stored.begin)
        for piece in rows.pieces:
            for target in _parts(piece):
                part = target if target.device.type == "cpu" else torch.empty_like(target, device="cpu")
                self._fill(raw(part))
                digest.update(raw(part))
                if part is not target:
                    target.copy_(part)
        if digest.hexdigest() != self._sums[name]:
            raise self.wrong("undamaged", f"{name} of another checksum")

    def _fill(self, where: memoryview) -> None:
        done = self._file.readinto(where)
        if done != len(where):
            raise self.wrong("as long as it was when it was opened", "a file cut short")

    def _stored(self, name: Any) -> StoredTensor:
        if name not in self._layout:
            raise KeyError(f"no tensor {name!r:.80}")
        return self._layout[name]

    def _tensor(self, name: str) -> torch.Tensor:
        stored = self._stored(name)
        dtype = {name: dtype for dtype, name in NAMES.items()}.get(stored.dtype)
        if dtype is None:
            raise self.wrong(f"of tensors of {', '.join(NAMES.values())}", f"{name} {stored.dtype}")
        made = torch.empty(stored.shape, dtype=dtype, device="cpu")
        self.read(name, Rows([made], ()))
        return made

    def _unpacked(self, packed: Any) -> Any:
        if isinstance(packed, list):
            return [self._unpacked(item) for item in packed]
        if not isinstance(packed, dict):
            return packed
        ((kind, inside),) = packed.items()
        if kind == "tuple":
            return tuple(self._unpacked(item) for item in inside)
        if kind == "dict":
            return unique([(key, self._unpacked(value)) for key, value in inside])
        if kind == "rows":
            self._stored(inside)
            return StoredRows(self, inside)
        tensor = {"array": self._tensor, "scalar": self._tensor, "tensor": self._tensor}[kind](inside)
        return tensor if kind == "tensor" else tensor.numpy() if kind == "array" else tensor.numpy()[()]


def _metadata(op: str, kind: str, state: Any, sums: dict[str, str]) -> dict[str, str]:
    text = json.dumps({"tree": state, "sha256": sums}, separators=(",", ":"))
    return {
        "format": f"worldkv {kind}", "version": str(VERSION),
        "written_by": f"{op}, worldkv_kernels {__version__}, torch {torch.__version__}, {platform.platform()}",
        "sha256": hashlib.sha256(text.encode()).hexdigest(), "state": text,
    }  # fmt: skip


def _packed(op: str, value: Any, where: str, tensors: dict[str, Rows]) -> Any:
    """As JSON; tensors are named by where they stand in the tree."""

    def inside(item: Any, key: Any) -> Any:
        return _packed(op, item, f"{where}.{key}" if where else str(key), tensors)

    if type(value) in _PLAIN:
        return value
    if type(value) is list:
        return [inside(item, i) for i, item in enumerate(value)]
    if type(value) is tuple:
        return {"tuple": [inside(item, i) for i, item in enumerate(value)]}
    if type(value) is dict and all(type(key) in _PLAIN for key in value):
        return {"dict": [[key, inside(item, key)] for key, item in value.items()]}
    kinds = {np.ndarray: "array", np.generic: "scalar", torch.Tensor: "tensor", Rows: "rows"}
    kind = next((kind for made, kind in kinds.items() if isinstance(value, made)), None)
    if kind is not None:
        name = where or "value"
        while name in tensors:  # keys 1 and "1" are told alike
            name += "'"
        rows = value if isinstance(value, Rows) else _as_rows(value)
        if rows is not None and rows.dtype in NAMES:
            tensors[name] = rows
            return {kind: name}
    wanted = "plain values, arrays and tensors to be saved"
    raise TypeError(f"{op}: {where or 'state'} must be of {wanted}, got {type(value).__name__}")


def _digest(rows: Rows) -> Any:
    """A SHA-256 of dtype and shape, to be updated with the bytes: a file's header alone says what these are."""
    return hashlib.sha256(f"{NAMES[rows.dtype]} {list(rows.shape)}".encode())


def _as_rows(value: np.ndarray | np.generic | torch.Tensor) -> Rows | None:
    """As one piece; None of an array that torch has no dtype for."""
    if isinstance(value, np.ndarray | np.generic):
        try:
            value = torch.from_numpy(np.array(value, order="C"))
        except (TypeError, ValueError):
            return None
    return Rows([value.detach().contiguous()], ())


def _parts(piece: torch.Tensor) -> Iterator[torch.Tensor]:
    """A contiguous tensor's numbers, so many at a time."""
    flat = piece.detach().view(-1)
    yield from flat.split(max(1, _PIECE // piece.element_size())) if len(flat) else ()


def _host_parts(piece: torch.Tensor) -> Iterator[torch.Tensor]:
    for part in _parts(piece):
        yield part.cpu()  # itself, where it is there
