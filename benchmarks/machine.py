"""What a figure was measured on: the code, the machine, and the clocks of its card."""

from __future__ import annotations

import hashlib
import importlib
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, cwd=ROOT)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def in_checkout() -> bool:
    """Whether this file lies in the repository, and not in an installed package, where ROOT is the package."""
    return (ROOT / "worldkv_kernels").is_dir()


def source_hash() -> str:
    """Twelve hex digits over the files that a figure depends on; names the code where there is no git."""
    digest = hashlib.sha256()
    folders = ("benchmarks", "csrc", "kernels", "worldkv_kernels") if in_checkout() else (".",)
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".py", ".cu", ".cuh", ".h", ".hpp", ".cpp"} and path.is_file():
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def clocks(device: torch.device) -> dict[str, Any] | None:
    """SM and memory clock in MHz, power in W and temperature, as nvidia-smi reads them; None without it."""
    if device.type != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = ["-i", f"GPU-{uuid}"] if uuid else []
    query = "clocks.sm,clocks.mem,power.draw,temperature.gpu,driver_version"
    line = _output("nvidia-smi", *which, f"--query-gpu={query}", "--format=csv,noheader,nounits")
    if not line:
        return None
    *numbers, driver = (value.strip() for value in line.splitlines()[0].split(","))
    read: dict[str, Any] = {"driver": driver}
    for name, number in zip(("sm_mhz", "memory_mhz", "power_w", "temperature_c"), numbers, strict=True):
        try:
            read[name] = float(number)
        except ValueError:  # "[N/A]" where the card does not tell
            read[name] = None
    return read


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to place a figure. `commit` and `dirty` come from git, or from WORLDKV_COMMIT where this is
    no checkout of the repository (dirty is then null); `source` is `source_hash`."""
    try:
        triton_version = importlib.import_module("triton").__version__
    except ImportError:
        triton_version = None
    # An installed package may lie inside a repository of someone else's.
    commit = _output("git", "rev-parse", "HEAD") if in_checkout() else None
    changed = _output("git", "status", "--porcelain", "--untracked-files=no") if commit else None
    on_gpu = device.type == "cuda"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or os.environ.get("WORLDKV_COMMIT"),
        "dirty": None if changed is None else bool(changed),
        "source": source_hash(),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"cpu ({platform.machine()})",
        "driver": (clocks(device) or {}).get("driver"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    print(source_hash())
