"""What the subcommands share: text tables, progress, JSON, devices and the machine's description."""

from __future__ import annotations

import json
import platform
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import __version__

_SILENCE = 2.0  # seconds at most


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns of text, the first `left` ones flush left and the others right."""
    cells = [list(columns), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = []
    for row in cells:
        padded = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(padded).rstrip())
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def size(count: float) -> str:
    """Bytes in the unit that fits, as 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


class Progress:
    """One line on stderr that is rewritten on a terminal, and printed every two seconds elsewhere."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, total, 0
        self._last = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def step(self, detail: str = "") -> None:
        """Count one more step done."""
        self._done += 1
        now = time.monotonic()
        last = self._done == self._total
        text = f"{self._label}: {self._done}/{self._total} {detail}"
        if self._terminal:
            print(f"\r\x1b[K{text}", end="\n" if last else "", file=sys.stderr, flush=True)
        elif now - self._last > _SILENCE or last:
            print(text, file=sys.stderr, flush=True)
            self._last = now


@contextmanager
def waiting(label: str) -> Iterator[None]:
    """While inside, a line on stderr of the seconds so far, for work that cannot be counted; quick work says none."""
    left = threading.Event()
    terminal = sys.stderr.isatty()

    def tell() -> None:
        started = time.monotonic()
        while not left.wait(_SILENCE):
            text = f"{label}: {time.monotonic() - started:.0f} s"
            print(f"\r\x1b[K{text}" if terminal else text, end="" if terminal else "\n", file=sys.stderr, flush=True)
        if terminal and time.monotonic() - started > _SILENCE:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        left.set()
        teller.join()


def machine(device: torch.device) -> dict[str, Any]:
    """What a reader needs to place a figure: versions, and the device's name."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "worldkv_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
    }


def parse_device(name: str | None) -> torch.device:
    """The named device, or the first GPU, or the CPU. Raises ValueError when it is not there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, dtype=torch.uint8, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device must be a device of this machine, got {name!r}: {error}") from error
    return device


def writable(argument: str, path: str | None, suffixes: Sequence[str] = ()) -> None:
    """Raises ValueError naming the argument when `path` cannot be written; leaves nothing behind.

    None is nothing to write; "-" is stdout, unless there must be one of `suffixes`.
    """
    if path is None or (path == "-" and not suffixes):
        return
    if suffixes and Path(path).suffix.lower() not in suffixes:
        raise ValueError(f"{argument} must end in {' or '.join(suffixes)}, got {path!r}")
    try:
        file = Path(path).resolve()
        is_there = file.exists()
        if is_there and not (file.is_file() or file.is_dir()):
            return  # a pipe or a device: opened when there is something to say
        open(file, "a").close()
        if not is_there:
            file.unlink()
    except OSError as error:
        raise ValueError(f"{argument} must be a file that can be written, got {path!r}: {error.strerror}") from error


def write_json(path: str | None, result: dict[str, Any]) -> None:
    """Write `result` to a file, or to stdout for "-"; nothing for None."""
    if path == "-":
        print(json.dumps(result, indent=2))
    elif path is not None:
        Path(path).write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {path}", file=sys.stderr)
