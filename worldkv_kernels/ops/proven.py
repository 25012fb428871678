"""Which CUDA kernels have been proven on which architecture: the repository's list and the user's own."""

from __future__ import annotations

import json
import os
import reprlib
from functools import cache
from pathlib import Path

import torch

REPOSITORY_LIST = Path(__file__).with_name("proven.json")
_WANTED = "{'cuda': {op: [architectures]}}"


def user_list() -> Path:
    """Where `worldkv doctor --prove` writes; XDG_CACHE_HOME moves it."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "worldkv" / "proven.json"


def architecture(device: torch.device) -> str:
    """Such as "sm_90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _read(path: Path) -> dict[str, list[str]]:
    """The architectures by op, none where there is no file. Raises ValueError naming a file that is no such list."""
    try:
        listed = json.loads(path.read_text())["cuda"]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"proven: {path} must hold {_WANTED}, got {error!r}") from error
    lists = listed.values() if isinstance(listed, dict) else [None]
    if not all(isinstance(archs, list) and all(isinstance(arch, str) for arch in archs) for archs in lists):
        raise ValueError(f"proven: {path} must hold {_WANTED}, got {reprlib.repr(listed)}")
    return listed


@cache
def _lists() -> tuple[dict[str, list[str]], ...]:
    return tuple(_read(path) for path in (REPOSITORY_LIST, user_list()))


def is_proven(op: str, device: torch.device) -> bool:
    """Whether the CUDA kernel of `op`, or of what OpBackends.proof names, may serve `auto` on this device's
    architecture."""
    return any(architecture(device) in entries.get(op, ()) for entries in _lists())


def record(op: str, device: torch.device) -> Path:
    """Add `op` on this device's architecture to the user's list."""
    path = user_list()
    proven = _read(path)
    proven[op] = sorted({*proven.get(op, ()), architecture(device)})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cuda": proven}, indent=2) + "\n")
    _lists.cache_clear()
    return path
