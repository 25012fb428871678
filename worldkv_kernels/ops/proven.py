"""Which CUDA kernels have been proven on which architecture: the repository's list and the user's own."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import torch

REPOSITORY_LIST = Path(__file__).with_name("proven.json")


def user_list() -> Path:
    """Where `worldkv doctor --prove` writes; XDG_CACHE_HOME moves it."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "worldkv" / "proven.json"


def architecture(device: torch.device) -> str:
    """Such as "sm_90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def _lists() -> tuple[dict[str, list[str]], ...]:
    lists = []
    for path in (REPOSITORY_LIST, user_list()):
        try:
            lists.append(json.loads(path.read_text())["cuda"])
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"proven: {path} must hold {{'cuda': {{op: [architectures]}}}}, got {error!r}") from error
    return tuple(lists)


def is_proven(op: str, device: torch.device) -> bool:
    """Whether the CUDA kernel of `op` may serve `auto` on this device's architecture."""
    return any(architecture(device) in entries.get(op, ()) for entries in _lists())


def record(op: str, device: torch.device) -> Path:
    """Add `op` on this device's architecture to the user's list."""
    path = user_list()
    proven = json.loads(path.read_text())["cuda"] if path.exists() else {}
    proven[op] = sorted({*proven.get(op, ()), architecture(device)})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cuda": proven}, indent=2) + "\n")
    _lists.cache_clear()
    return path
