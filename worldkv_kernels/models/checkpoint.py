"""Published checkpoints: safetensors files, read through a memory map, one tensor at a time."""

from __future__ import annotations

import json
import math
import os
import reprlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LARGEST_HEADER = 100_000_000  # bytes, of the format's own definition
_LARGEST_SIZE = 2**20  # in a config.json: far beyond any model's, and small enough to multiply
_MOST_DIMENSIONS = 64  # of a torch tensor
_SHOWN, _SHOWN_LETTERS = 5, 200  # names in an error, and letters of each


class StoredTensor(NamedTuple):
    """Where a tensor lies."""

    file: Path
    dtype: str  # the format's name, such as BF16
    shape: tuple[int, ...]
    begin: int  # first byte in the file
    end: int


def read_layout(path: str | Path) -> dict[str, StoredTensor]:
    """Which tensors a checkpoint holds, by name, from the headers of its files alone.

    Args:
        path: a .safetensors file, or a folder: with an index (*.safetensors.index.json) the files that it names,
            else all its .safetensors files, taken together.

    A prefix "model." that all names have is taken off. Raises ValueError, whatever the files hold, when there is no
    such file, the index or a header is not valid, a file is shorter or longer than its header says, the index names a
    tensor that its file lacks, or two files hold a tensor of the same name. OSError where the system cannot read.
    """
    path = Path(path)
    placed: dict[str, str] = {}
    if os.path.isdir(path):  # which has an answer for any name
        files, placed = _files_of(path)
    elif os.path.isfile(path):
        files = [path]
    else:
        raise ValueError(f"checkpoint: must be an existing folder or .safetensors file, got {path}")
    layout: dict[str, StoredTensor] = {}
    for file in files:
        for name, stored in _read_header(file).items():
            if name in layout:
                raise ValueError(
                    f"checkpoint: {_shown(name)} must be in one file, got it in {layout[name].file.name} and "
                    f"{file.name} of {file.parent}"
                )
            layout[name] = stored
    for name, file_name in placed.items():
        if name not in layout or layout[name].file.name != file_name:
            raise ValueError(
                f"checkpoint: {path / file_name} must hold {_shown(name)} as the index says, got a file without"
            )
    if layout and all(name.startswith("model.") for name in layout):
        layout = {name.removeprefix("model."): stored for name, stored in layout.items()}
    return layout


def check_parameters(
    op: str, module: nn.Module, layout: Mapping[str, StoredTensor], *, ignore: Sequence[str] = ()
) -> None:
    """Raise ValueError where a checkpoint does not fit a module, which may be on the meta device.

    Lists the missing, the unexpected and the misshapen tensors and those of a dtype that is not F64, F32, F16 or BF16.
    Arguments as of `load_parameters`.
    """
    targets = module.state_dict()
    layout = {name: stored for name, stored in layout.items() if name not in ignore}
    both = [name for name in targets if name in layout]
    faults = {
        "missing": [name for name in targets if name not in layout],
        "unexpected": [name for name in layout if name not in targets],
        "misshapen": [
            f"{name} {list(layout[name].shape)} for {list(targets[name].shape)}"
            for name in both
            if layout[name].shape != tuple(targets[name].shape)
        ],
        "of another dtype": [f"{name} {layout[name].dtype}" for name in both if layout[name].dtype not in _DTYPES],
    }
    if any(faults.values()):
        told = "; ".join(f"{len(names)} {fault}: {abbreviated(names)}" for fault, names in faults.items() if names)
        raise ValueError(f"{op}: checkpoint must hold the {len(targets)} tensors of its config, got {told}")


def load_parameters(
    op: str, module: nn.Module, layout: Mapping[str, StoredTensor], *, ignore: Sequence[str] = ()
) -> None:
    """Copy a checkpoint's tensors into a module's parameters, each into the dtype and to the device of its own.

    One file is mapped at a time and one tensor copied at a time, so that host memory holds no more than one
    tensor beside the file cache, which the system takes back when it needs to. The files must stay as they are until
    all is copied.

    Args:
        op: names the caller in errors.
        layout: as `read_layout` gives it, with the names of the module's state dict.
        ignore: names of stored tensors that the module has no use for.

    Raises ValueError, before anything is copied, as `check_parameters`, and where a file is gone or cut short since
    its header was read.
    """
    check_parameters(op, module, layout, ignore=ignore)
    ends: dict[Path, int] = {}
    for stored in layout.values():
        ends[stored.file] = max(stored.end, ends.get(stored.file, 0))
    for file, end in ends.items():
        size = file.stat().st_size if os.path.isfile(file) else 0
        if size < end:
            raise ValueError(f"{op}: {file} must have the {end} bytes that its header says, got {size} by now")
    targets = module.state_dict()
    for file, end in sorted(ends.items()):
        mapped = torch.from_file(str(file), shared=False, size=end, dtype=torch.uint8)
        for name, stored in layout.items():
            if stored.file == file and name in targets:
                with torch.no_grad():
                    targets[name].copy_(_tensor(mapped, stored))


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of one .safetensors file by name, on the CPU, copied.

    Raises as read_layout, and ValueError on a dtype other than F64, F32, F16 and BF16.
    """
    layout = read_layout(path)
    strange = [f"{name} {stored.dtype}" for name, stored in layout.items() if stored.dtype not in _DTYPES]
    if strange:
        raise ValueError(f"checkpoint: {path} must hold {', '.join(_DTYPES)}, got {abbreviated(strange)}")
    size = max((stored.end for stored in layout.values()), default=0)
    if not size:
        return {name: torch.empty(s.shape, dtype=_DTYPES[s.dtype], device="cpu") for name, s in layout.items()}
    mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    return {name: _tensor(mapped, stored).clone() for name, stored in layout.items()}


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """One .safetensors file of these tensors, in their order; it takes an older one's place when it is complete."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header, at = {}, 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]
        }  # fmt: skip
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.unfinished")
    with open(unfinished, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    unfinished.replace(path)


def read_config(path: str | Path) -> dict[str, Any]:
    """The fields of the config.json in a folder or beside a file; none where there is none, as in some releases.

    Raises ValueError when it is not a JSON object.
    """
    path = Path(path)
    path = (path if os.path.isdir(path) else path.parent) / "config.json"
    return _read_json(path) if os.path.isfile(path) else {}


def check_fields(
    op: str, fields: Mapping[str, Any], names: Iterable[str], *, least: int = 1, kinds: tuple[type, ...] = (int,)
) -> None:
    """Raise ValueError where one of the named fields of a config.json is there, and is no size that a model has."""
    for name in names:
        value = fields.get(name, least)
        if type(value) not in kinds or not least <= value <= _LARGEST_SIZE:
            wanted = f"{'a number' if float in kinds else 'an integer'} from {least} to {_LARGEST_SIZE}"
            raise ValueError(f"{op}: config.json must have {name} {wanted}, got {reprlib.repr(value)}")


def _tensor(mapped: torch.Tensor, stored: StoredTensor) -> torch.Tensor:
    """A view of the file's bytes, or a copy where they do not start on a multiple of the element size."""
    dtype = _DTYPES[stored.dtype]
    of_tensor = mapped[stored.begin : stored.end]
    if stored.begin % dtype.itemsize:
        of_tensor = of_tensor.clone()
    return of_tensor.view(dtype).view(stored.shape)


def _files_of(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The .safetensors files of a folder, and by tensor the name of the file that an index gives."""
    indices = sorted(filter(os.path.isfile, folder.glob("*.safetensors.index.json")))
    if len(indices) > 1:
        raise ValueError(f"checkpoint: {folder} must hold one index, got {', '.join(i.name for i in indices)}")
    if indices:
        placed = _read_json(indices[0]).get("weight_map")
        named = isinstance(placed, dict) and all(isinstance(f, str) and Path(f).name == f for f in placed.values())
        if not named or not placed:
            raise ValueError(f"checkpoint: {indices[0]} must have a weight_map from tensors to files beside it")
        files = [folder / name for name in sorted(set(placed.values()))]
        absent = [file.name for file in files if not os.path.isfile(file)]
        if absent:
            raise ValueError(f"checkpoint: {folder} must hold what its index names, got no {abbreviated(absent)}")
        return files, placed
    files = sorted(filter(os.path.isfile, folder.glob("*.safetensors")))
    if not files:
        inside = sorted({file.parent.name for file in folder.glob("*/*.safetensors")})
        hint = f"; its folders {', '.join(inside)} have some" if inside else ""
        raise ValueError(f"checkpoint: {folder} must hold .safetensors files, got none{hint}")
    return files, {}


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """Of a file that is: 8 bytes of length (little endian), so much JSON, then the tensors' bytes without a gap."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise ValueError(f"checkpoint: {file} must start with a safetensors header, got a file of {size} bytes")
        text = opened.read(length)
    header = _parsed(f"the header of {file}", text)
    header.pop("__metadata__", None)
    layout = {name: _entry(file, name, entry, 8 + length) for name, entry in header.items()}
    expected = 8 + length
    for name, stored in sorted(layout.items(), key=lambda item: (item[1].begin, item[1].end)):
        wanted = math.prod(stored.shape) * _DTYPES[stored.dtype].itemsize if stored.dtype in _DTYPES else None
        if stored.begin != expected or stored.end < stored.begin or wanted not in (None, stored.end - stored.begin):
            raise ValueError(
                f"checkpoint: {file} must have {_shown(name)} {_shown(stored.dtype)} {list(stored.shape)} from byte "
                f"{expected} on, got bytes {stored.begin} to {stored.end}"
            )
        expected = stored.end
    if size != expected:
        raise ValueError(f"checkpoint: {file} must have the {expected} bytes that its header says, got {size}")
    return layout


def _entry(file: Path, name: str, entry: Any, start: int) -> StoredTensor:
    """Of a header whose data begin at byte `start`."""
    dtype, shape, offsets = (
        entry.get(field) if isinstance(entry, dict) else None for field in ("dtype", "shape", "data_offsets")
    )
    if not (isinstance(dtype, str) and _are_counts(shape) and _are_counts(offsets) and len(offsets) == 2):
        raise ValueError(
            f"checkpoint: the header of {file} must give {_shown(name)} a dtype, a shape and two data_offsets, "
            f"got {reprlib.repr(entry)}"
        )
    return StoredTensor(file, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _are_counts(found: Any) -> bool:
    few = isinstance(found, list) and len(found) <= _MOST_DIMENSIONS
    return few and all(type(n) is int and 0 <= n < 2**63 for n in found)


def _read_json(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > _LARGEST_HEADER:
        raise ValueError(f"checkpoint: {path} must be JSON of at most {_LARGEST_HEADER} bytes, got {size}")
    return _parsed(str(path), path.read_bytes())


def _parsed(what: str, text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint: {what} must be JSON, got {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"checkpoint: {what} must be a JSON object, got {type(found).__name__}")
    return found


def _shown(name: str) -> str:
    return name if len(name) <= _SHOWN_LETTERS else f"{name[:_SHOWN_LETTERS]}..."


def abbreviated(names: Sequence[str]) -> str:
    """The first few names, for an error."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(_shown, names[:_SHOWN])) + more
