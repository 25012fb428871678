"""Pictures of rollouts: frames per second as the rollout grows, and where the time of a chunk goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plots_common import headline, save, wrapped
from traces import ORDER

COLORS = {
    "worldkv": "#1f77b4", "worldkv_host": "#17becf", "worldkv_8_bits": "#7f7f7f", "worldkv_host_4_bits": "#e377c2",
    "official": "#9467bd", "full": "#2ca02c", "sliding": "#8c564b",
    "sliding_as_long": "#ff7f0e", "sink_recent": "#bcbd22", "published": "#d62728",
}  # fmt: skip
KIND_COLORS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#d62728", "#8c564b", "#d9d9d9"]  # idle last

Figure = dict[str, Any]


def draw_rollouts(figures: Sequence[Figure], folder: str | Path) -> list[Path]:
    """Write rollout.png and rollout.svg, a row of two panels for each case; returns their paths, none without figures.

    Left, video frames per second of each chunk, and what worldkv's would be at the measured ceiling; a line ends where
    a mode had no room left. Right, one late chunk of
    each mode by kind of work, a bar's end at its wall-clock time unless kinds overlap; modes that were not traced are
    left out.
    """
    from matplotlib.figure import Figure as Canvas

    timed = [f for f in figures if f["status"] == "timed"]
    cases = list(dict.fromkeys(f["case"] for f in timed))
    if not cases:
        return []
    Path(folder).mkdir(parents=True, exist_ok=True)
    canvas = Canvas(layout="constrained", figsize=(13, 0.6 + 4.2 * len(cases)))
    for (speed, parts), case in zip(canvas.subplots(len(cases), 2, squeeze=False), cases, strict=True):
        of_case = [f for f in timed if f["case"] == case]
        _speed(speed, case, of_case)
        _parts(parts, [f for f in of_case if f["breakdown"]])
    headline(canvas, f"rollouts on {timed[0]['environment']['device']}, random weights", timed)
    return save(canvas, Path(folder) / "rollout")


def _speed(axes: Any, case: str, figures: Sequence[Figure]) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    for f in figures:
        if f["variant"] == "worldkv":
            ceiling = f["frames_per_second"] / f["share"]
            axes.axhline(ceiling, color="black", linestyle=":", linewidth=1.4, label="worldkv at the measured ceiling")
        axes.plot(
            [chunk["chunk"] for chunk in f["per_chunk"]],
            [chunk["frames_per_second"] for chunk in f["per_chunk"]],
            color=COLORS.get(f["variant"]),
            linestyle="--" if f["is_rival"] else "-",
            linewidth=2.2 if f["variant"] == "worldkv" else 1.3,
            label=f["variant"] + (" (rival)" if f["is_rival"] else ""),
        )
    axes.set_title(wrapped(case, 72), fontsize=9)
    axes.set_xlabel("chunk")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.set_ylabel("video frames per second")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _parts(axes: Any, figures: Sequence[Figure]) -> None:
    from matplotlib.ticker import StrMethodFormatter

    figures = figures[::-1]  # the first at the top
    ends = [0.0] * len(figures)
    for place, kind in enumerate([*ORDER, "idle"]):
        parts = [f["breakdown"] for f in figures]
        widths = [1e3 * (part["idle"] if kind == "idle" else part["kinds"][kind]) for part in parts]
        axes.barh([f["variant"] for f in figures], widths, left=ends, color=KIND_COLORS[place], label=kind)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    axes.set_title("one late chunk, traced", fontsize=9)
    axes.set_ylim(len(figures) - 0.4 - max(4, len(figures)), len(figures) - 0.4)  # two bars are no thicker than four
    axes.set_xlabel("milliseconds")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.14))
