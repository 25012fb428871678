"""What the subcommands share: text tables, progress, JSON, devices and the machine's description."""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..checks import byte_size
from . import brief

_SILENCE, _LONGEST_SILENCE = 2.0, 300.0  # seconds from one line of progress to the next, at first and at most
_MOST_INTEGER = 2**31 - 1  # of an argument without a bound of its own
_MOST_SEED = 2**64 - 1  # that torch takes


size = byte_size


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns of text, the first `left` ones flush left and the others right."""
    cells = [list(columns), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = []
    for row in cells:
        padded = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(padded).rstrip())
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


class _Narration:
    """One command's progress on stderr: a line that is rewritten on a terminal, lines ever farther apart elsewhere."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._last, self._gap = time.monotonic(), _SILENCE

    def tell(self, text: str, *, finished: bool = False) -> None:
        """`finished` ends a line on a terminal, and is always told elsewhere."""
        if self.quiet:
            return
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="\n" if finished else "", file=sys.stderr, flush=True)
        elif finished:
            print(text, file=sys.stderr, flush=True)
        elif time.monotonic() - self._last > self._gap:
            print(text, file=sys.stderr, flush=True)
            self._last, self._gap = time.monotonic(), min(2 * self._gap, _LONGEST_SILENCE)


_narration = _Narration()


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """The argument `--quiet`, of every command that shows progress."""
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr; results and errors remain")


def begin(*, quiet: bool) -> None:
    """A command begins: what Progress, waiting and note say from here on, if anything."""
    global _narration
    _narration = _Narration(quiet)


def note(text: str, *, end: str = "\n") -> None:
    """A line on stderr, or the start of one, unless the command is quiet."""
    if not _narration.quiet:
        print(text, end=end, file=sys.stderr, flush=True)


class Progress:
    """Steps counted on stderr; where that is no terminal, after 2 s, 4 s more, 8 s more and so on, and the last one."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, total, 0

    def step(self, detail: str = "") -> None:
        """Count one more step done."""
        self._done += 1
        text = f"{self._label}: {self._done}/{self._total} {detail}".rstrip()
        _narration.tell(text, finished=self._done == self._total)


@contextmanager
def waiting(label: str) -> Iterator[None]:
    """While inside, the seconds so far on stderr, for work that cannot be counted; quick work says nothing."""
    left = threading.Event()

    def tell() -> None:
        started = time.monotonic()
        while not left.wait(_SILENCE):
            _narration.tell(f"{label}: {time.monotonic() - started:.0f} s")
        if time.monotonic() - started > _SILENCE and sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    if _narration.quiet:
        yield
        return
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        left.set()
        teller.join()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """While inside, torch has so many threads on the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


def integer(least: int, most: int = _MOST_INTEGER) -> Callable[[str], int]:
    """An argument's converter to an integer from `least` to `most`."""

    def convert(text: str) -> int:
        value = int(text[:40]) if re.fullmatch(r"[+-]?[0-9]+", text) else least - 1  # 40 digits are too many already
        if value < least:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text!r:.60}")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {text!r:.60}")
        return value

    return convert


seed = integer(0, _MOST_SEED)


def number(text: str) -> float:
    """An argument's converter to a number, which may be nan or infinite."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r:.60}") from None


def parse_device(name: str | None) -> torch.device:
    """The named device, or the first GPU, or the CPU. Raises ValueError when it is not there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    reason = ""
    try:
        device = torch.device(name)
        if device.type == "cpu" and not device.index:
            return torch.device("cpu")
        if device.type == "cuda":
            torch.empty(0, dtype=torch.uint8, device=device)
            return device
    except (RuntimeError, AssertionError) as error:
        reason = f": {brief(error)}" if name.startswith("cuda") else ""
    raise ValueError(f"--device must be cpu or a CUDA device of this machine, got {name!r:.60}{reason}")


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
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{argument} must be a file that can be written, got {path!r}: {reason}") from error


def different_files(**paths: str | None) -> None:
    """Raises ValueError where two arguments name the same file; None and "-" name none."""
    named: dict[Path, str] = {}
    for argument, path in paths.items():
        if path in (None, "-"):
            continue
        other = named.setdefault(Path(path).resolve(), argument)
        if other != argument:
            first, second = (name.replace("_", "-") for name in (argument, other))
            raise ValueError(f"--{first} must be another file than --{second}, got {path!r} for both")


@contextmanager
def naming(argument: str, *where: str) -> Iterator[None]:
    """What is refused or cannot be read inside is said of the argument, not of the functions `where` it was met."""
    try:
        yield
    except ValueError as error:
        told = str(error)
        for function in where:
            told = told.removeprefix(f"{function}: ")
        raise ValueError(f"{argument}: {told}") from error
    except OSError as error:
        raise ValueError(f"{argument}: {error.filename} must be readable: {error.strerror}") from error
    except MemoryError as error:
        raise ValueError(f"{argument}: must fit the memory: {error}") from error


def write_json(path: str | None, result: dict[str, Any]) -> None:
    """Write `result` as one document to a file, or to stdout for "-"; nothing for None.

    A number that is not finite becomes null, which JSON has no other word for.
    """
    if path is None:
        return
    document = json.dumps(_finite(result), indent=2, allow_nan=False) + "\n"
    if path == "-":
        sys.stdout.write(document)
    else:
        Path(path).write_text(document)
        note(f"wrote {path}")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
