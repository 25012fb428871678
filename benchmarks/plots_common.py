"""What all pictures share: titles that fit, what their times are worth, and their files."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_TITLE_CHARACTERS = 12  # of a headline, to an inch


def wrapped(text: str, width: int) -> str:
    """In lines of at most `width` characters, thousands separated."""
    return textwrap.fill(re.sub(r"(?<![\d.])\d{4,}", lambda number: f"{int(number[0]):,}", text), width)


def headline(canvas: Any, text: str, figures: Sequence[dict[str, Any]]) -> None:
    """The canvas's title; and along its foot, in red, where the times of the figures say nothing."""
    canvas.suptitle(wrapped(text, int(_TITLE_CHARACTERS * canvas.get_size_inches()[0])), fontsize=11)
    on_cpu = " on a CPU" * any(f["environment"]["device"].startswith("cpu") for f in figures)
    if any(f.get("small") for f in figures):
        canvas.supxlabel(f"toy sizes{on_cpu}: times mean nothing", color="#c00000", fontsize=11)
    elif on_cpu:
        canvas.supxlabel("on a CPU: times say nothing of a GPU", color="#c00000", fontsize=11)


def save(canvas: Any, path: Path) -> list[Path]:
    """Write the canvas as .png and as .svg, whose words can be searched; returns the paths."""
    from matplotlib import rc_context

    written = [path.with_suffix(f".{kind}") for kind in ("png", "svg")]
    with rc_context({"svg.fonttype": "none"}):
        for file in written:
            canvas.savefig(file, dpi=130)
    return written
