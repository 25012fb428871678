"""The picture of the small world's studies of a bank in fewer bits: what pruning and bits save, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plots_common import save

COLORS = {16: "#1f77b4", 8: "#2ca02c", 4: "#d62728"}
AXES = {
    "banked_share": "bytes of a banked chunk, share of a whole one in 16 bits",
    "tokens_attended": "tokens attended",
}

Figure = dict[str, Any]


def draw_bits(figures: Sequence[Figure], folder: str | Path) -> list[Path]:
    """Write bits.png and bits.svg and return their paths, none without such figures.

    PSNR of views seen again, left by bytes, right by tokens: a curve for each number of bits through the keep_ratios,
    solid where what is pruned goes into what stays, dashed where it is dropped.
    """
    from matplotlib.figure import Figure as Canvas

    figures = [f for f in figures if f.get("banked_share") is not None and "bank_bits" in f["options"]]
    # Studies may share a memory: the first counts.
    figures = list({_key(f): f for f in reversed(figures) if not f["outliers"]}.values())
    if not figures:
        return []
    Path(folder).mkdir(parents=True, exist_ok=True)
    canvas = Canvas(layout="constrained", figsize=(11, 4.6))
    by_bytes, by_tokens = canvas.subplots(1, 2, sharey=True)
    for axes, key in ((by_bytes, "banked_share"), (by_tokens, "tokens_attended")):
        _curves(axes, figures, key)
        axes.set_xlabel(AXES[key])
        axes.grid(alpha=0.3)
        axes.margins(x=0.3 if key == "banked_share" else 0.05, y=0.1)
    by_bytes.set_xscale("log", base=2)
    ticks = [0.125, 0.25, 0.5, 1]
    by_bytes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    by_bytes.set_ylabel("PSNR of views seen again, dB")
    by_bytes.legend(fontsize=8, frameon=False, loc="lower right")
    canvas.suptitle(
        f"a bank in 16, 8 and 4 bits, by keep_ratio: the small world, mean of {figures[0]['worlds']} worlds"
    )
    return save(canvas, Path(folder) / "bits")


def _curves(axes: Any, figures: Sequence[Figure], key: str) -> None:
    for bits, color in COLORS.items():
        of_bits = [f for f in figures if f["options"]["bank_bits"] == bits]
        for merged in (True, False):
            # A chunk that is kept whole has nothing to merge or to drop: both curves begin there.
            points = [f for f in of_bits if _ratio(f) == 1 or _key(f)[2] == merged]
            points = sorted(points, key=_ratio, reverse=True)
            axes.plot(
                [f[key] for f in points],
                [f["psnr_db"] for f in points],
                color=color,
                marker="o",
                linestyle="-" if merged else "--",
                markerfacecolor=color if merged else "white",
                markersize=9 if bits == 16 else 5,  # 8 bits may lie upon them
                linewidth=1.8 if merged else 1.2,
                zorder=3 if merged else 2,
                label=f"{bits} bits, {'merged' if merged else 'dropped'}",
            )
            if key == "banked_share" and merged and bits == 4:
                for f in points:
                    axes.annotate(
                        f"keep_ratio {_ratio(f):g}", (f[key], f["psnr_db"]), textcoords="offset points",
                        xytext=(-7, 4), ha="right", fontsize=8,
                    )  # fmt: skip


def _key(figure: Figure) -> tuple[int, float, bool]:
    options = figure["options"]
    return options["bank_bits"], _ratio(figure), options.get("merge_pruned", True)


def _ratio(figure: Figure) -> float:
    return figure["options"]["keep_ratio"]
