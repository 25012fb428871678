"""The facts of conformance.py, run in a process of their own, which a kernel that hangs may take with it.

    python benchmarks/conformance_run.py LIBRARY FOLDER FACT...

The words of each go to FOLDER/FACT; then a line on stdout tells that it is done, or, behind a tab, what went wrong.
That ends the process: a device that has failed once is of no more use to it. Without torch, so that it starts at once.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

_MOST_WORDS = 1 << 16
_MESSAGE_BYTES = 4096


def load(path: str | Path) -> ctypes.CDLL:
    """The library of conformance/, built for a GPU or for the host."""
    library = ctypes.CDLL(str(path))
    library.conformance_fact.restype = ctypes.c_char_p
    return library


def names(library: ctypes.CDLL) -> Iterator[str]:
    """Of its facts, in the order in which one rests on others."""
    number = 0
    while (name := library.conformance_fact(number)) is not None:
        yield name.decode()
        number += 1


def run(library: ctypes.CDLL, fact: str) -> bytes:
    """The words that the kernels of a fact write. Raises RuntimeError where they could not be run to the end."""
    words = (ctypes.c_uint32 * _MOST_WORDS)()
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    count = library.conformance_run(fact.encode(), words, _MOST_WORDS, message, _MESSAGE_BYTES)
    if count < 0:
        raise RuntimeError(message.value.decode(errors="replace"))
    if count > _MOST_WORDS:
        raise RuntimeError(f"{fact} writes {count} words, more than the {_MOST_WORDS} that there is room for")
    return bytes(memoryview(words).cast("B")[: 4 * count])


def main() -> int:
    path, folder, *facts = sys.argv[1:]
    library = load(path)
    for fact in facts:
        try:
            words = run(library, fact)
        except RuntimeError as error:
            print(f"{fact}\t{' '.join(str(error).split())}", flush=True)
            return 1
        Path(folder, fact).write_bytes(words)
        print(fact, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
