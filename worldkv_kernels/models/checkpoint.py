"""Published checkpoints: safetensors files, read through a memory map, one tensor at a time."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..tensor_file import (
    DTYPES,
    LARGEST_HEADER,
    StoredTensor,
    Unfinished,
    abbreviated,
    header_bytes,
    parsed,
    raw,
    read_header,
    shown,
)

_DTYPES = {name: dtype for name, dtype in DTYPES.items() if dtype.is_floating_point}
_LARGEST_SIZE = 2**20  # in a config.json: far beyond any model's, and small enough to multiply


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
        for name, stored in read_header("checkpoint", file).tensors.items():
            if name in layout:
                raise ValueError(
                    f"checkpoint: {shown(name)} must be in one file, got it in {layout[name].file.name} and "
                    f"{file.name} of {file.parent}"
                )
            layout[name] = stored
    for name, file_name in placed.items():
        if name not in layout or layout[name].file.name != file_name:
            raise ValueError(
                f"checkpoint: {path / file_name} must hold {shown(name)} as the index says, got a file without"
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
    with Unfinished(Path(path)) as file:
        file.write(header_bytes({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, {}))
        for tensor in tensors.values():
            file.write(raw(tensor.detach().cpu().contiguous()))


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


def _read_json(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > LARGEST_HEADER:
        raise ValueError(f"checkpoint: {path} must be JSON of at most {LARGEST_HEADER} bytes, got {size}")
    return parsed("checkpoint", str(path), path.read_bytes())
