"""What `worldkv tune` has measured on this machine, by card: the file, what is read of it and written to it."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import proven

SPREAD = ("us_20", "us", "us_80")  # percentiles of a call's microseconds, of which `us` is the median


@dataclass(frozen=True)
class Measurement:
    """The backends of `op` beside each other on one shape, on one card.

    `shape` is the op's, such as segment_attention.Shape, by field; its `keys` fill the window's capacity, of which
    `tokens` were attended to. `us` holds SPREAD of every backend that ran. `torch` and `triton` are versions, None of
    what is not installed, and `date` is ISO 8601.
    """

    op: str
    shape: Mapping[str, int]
    tokens: int
    dtype: str
    us: Mapping[str, Mapping[str, float]]
    torch: str
    triton: str | None
    driver: str | None
    date: str


def fastest(us: Mapping[str, Mapping[str, float]]) -> tuple[str, ...]:
    """The backends that no other is faster than. One is faster where the spreads do not overlap."""
    return tuple(name for name, of in us.items() if not any(other["us_80"] < of["us_20"] for other in us.values()))


def user_file() -> Path:
    """Where `worldkv tune` writes, beside what `worldkv doctor --prove` does."""
    return proven.user_list().with_name("faster.json")


def versions() -> dict[str, str | None]:
    """What a measurement holds for: these of torch and triton, None where there is no triton."""
    try:
        triton = importlib.import_module("triton").__version__
    except ImportError:
        triton = None
    return {"torch": torch.__version__, "triton": triton}


def unusable(measurement: Measurement) -> str | None:
    """Why a measurement says nothing of this installation; None where it does. Kernels, and PyTorch's own attention,
    become other ones with a release."""
    for name, here in versions().items():
        there = getattr(measurement, name)
        if _release(there) != _release(here):
            return f"measured with {name} {there or 'not installed'}, here is {here or 'none'}"
    return None


def _release(version: str | None) -> list[str]:
    return (version or "").split(".")[:2]


def read() -> dict[str, list[Measurement]]:
    """The measurements by card, none where there is no file. Raises ValueError naming a file that is damaged."""
    path = user_file()
    try:
        cards = json.loads(path.read_text())["cards"]
        return {card: [_measurement(given) for given in kept] for card, kept in cards.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        wanted = "what worldkv tune writes, and makes anew where there is no file"
        raise ValueError(f"faster: {path} must hold {wanted}, got {error!r}") from error


_TYPES: dict[str, Any] = {
    "op": str, "shape": dict, "tokens": int, "dtype": str, "us": dict, "torch": str, "triton": str | None,
    "driver": str | None, "date": str,
}  # fmt: skip


def _measurement(given: Any) -> Measurement:
    """Raises TypeError, KeyError or ValueError where `given` is none."""
    made = Measurement(**given)
    for name, wanted in _TYPES.items():
        if not isinstance(getattr(made, name), wanted):
            raise TypeError(f"{name}={getattr(made, name)!r:.60}")
    if not all(isinstance(number, int) for number in made.shape.values()):
        raise TypeError(f"shape={made.shape!r:.60}")
    if "keys" not in made.shape:
        raise KeyError("keys")
    for name, of in made.us.items():
        low, median, high = (of[percentile] for percentile in SPREAD)
        if not 0 < low <= median <= high:  # no NaN either
            raise ValueError(f"us of {name}: {of!r:.60}")
    return made


def record(card: str, measurements: Sequence[Measurement]) -> Path:
    """Keep measurements of a card, in place of its own of the same shapes; all others stay."""
    cards = read()
    anew = [(m.op, m.shape) for m in measurements]
    cards[card] = [m for m in cards.get(card, []) if (m.op, m.shape) not in anew] + list(measurements)
    return _write(cards)


def forget(card: str) -> int:
    """Drop all that is kept of a card, and say how many measurements that were."""
    cards = read()
    dropped = cards.pop(card, [])
    if dropped:
        _write(cards)
    return len(dropped)


def _write(cards: Mapping[str, Sequence[Measurement]]) -> Path:
    """In one step: who reads meanwhile finds the old file or the new one, and an interrupted run leaves the old one."""
    path = user_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {card: [asdict(measurement) for measurement in of] for card, of in cards.items()}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps({"cards": kept}, indent=2) + "\n")
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path
