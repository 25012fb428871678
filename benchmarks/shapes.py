"""A shape from the command line, such as heads=24,q=3600,window=3600x1+1800x6,dtype=float16, and what fits a device.

A converter makes a value of the text behind a key; on any other text it raises ValueError that says what is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from worldkv_kernels.checks import MAX_HEADS
from worldkv_kernels.cli.report import size
from worldkv_kernels.memory.pool import free_bytes

Convert = Callable[[str], Any]

_MOST = 2**31 - 1  # of any count, as rows of a pool are numbered
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def up_to(most: int) -> Convert:
    def convert(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) <= 10 and 1 <= int(text) <= most):
            raise ValueError(f"an integer from 1 to {most}")
        return int(text)

    return convert


whole = up_to(_MOST)
HEADS = up_to(MAX_HEADS)


def one_of(choices: Mapping[str, Any]) -> Convert:
    def convert(text: str) -> Any:
        if text not in choices:
            raise ValueError(" or ".join(choices))
        return choices[text]

    return convert


def grid(text: str) -> tuple[int, int, int]:
    """frames x height x width."""
    try:
        frames, height, width = (whole(part) for part in text.split("x"))
    except ValueError:
        raise ValueError("frames x height x width, such as 3x30x52") from None
    return frames, height, width


def runs(text: str) -> tuple[tuple[int, int], ...]:
    """Rows of a segment and how many such segments, in window order."""
    try:
        return tuple((whole(rows), whole(number)) for rows, number in (run.split("x") for run in text.split("+")))
    except ValueError:
        raise ValueError("rows x number of segments, such as 3600x1+1800x6") from None


def ratio(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ValueError("above 0 and at most 1")
    return value


HEAD_DIM = one_of({"64": 64, "128": 128})
DTYPE = one_of(DTYPES)


def read_shape(text: str, keys: Mapping[str, Convert], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `keys`, those left out from `defaults`. Raises ValueError that names the key, what was wanted and
    what came."""
    given: dict[str, str] = {}
    for pair in text.split(","):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if key not in keys or not equals:
            raise ValueError(f"--shape must be KEY=VALUE,... with the keys {', '.join(keys)}, got {pair!r:.60}")
        if key in given:
            raise ValueError(f"--shape: {key} must be given once, got {given[key]!r:.60} and {value!r:.60}")
        given[key] = value
    values = dict(defaults)
    for key, convert in keys.items():
        if key in given:
            try:
                values[key] = convert(given[key])
            except ValueError as error:
                raise ValueError(f"--shape: {key} must be {error}, got {given[key]!r:.60}") from None
        elif key not in defaults:
            raise ValueError(f"--shape: {key} must be given, got {text!r:.200}")
    return values


def check_room(what: str, needed: int, device: torch.device) -> None:
    """Raise ValueError where so many bytes do not fit the device's free memory."""
    free = free_bytes(device)
    if needed > free:
        raise ValueError(f"{what} must fit the {size(free)} that are free on {device}, got {size(needed)}")
