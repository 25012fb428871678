"""Pictures of the figures: latency, and share of the measured ceiling, against context length.

python benchmarks/plots.py RESULTS.jsonl DIR
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import read_json_lines
from plots_rollout import draw_rollouts

COLORS = [
    "#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22",
    "#000000", "#393b79", "#843c39", "#637939", "#7b4173", "#ad8a00",
]  # fmt: skip
MARKERS = "osD^vP*X<"  # nine to sixteen colors: no two lines are alike
COLUMNS = 3  # panels in a row
QUANTITIES = {"latency": "latency, us", "share": "share of the measured ceiling, %"}

Figure = dict[str, Any]


def check() -> None:
    """Raise ImportError that names the extra, where matplotlib is absent."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'worldkv-kernels[bench]'") from None


def draw(figures: Sequence[Figure], folder: str | Path) -> list[Path]:
    """Write <bench>_latency and <bench>_share as .png and .svg, and return their paths.

    A panel per shape with a line per variant where cases differ in context length alone, else a panel per case with
    bars. Lines leave out what a variant adds to its base, such as lse. A bench of which nothing was timed has no
    picture.
    Rollouts have a picture of their own, see plots_rollout.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    Path(folder).mkdir(parents=True, exist_ok=True)
    timed = [f for f in figures if f["status"] == "timed" and f["bench"] != "rollout"]
    written = draw_rollouts([f for f in figures if f["bench"] == "rollout"], folder)
    for bench in dict.fromkeys(f["bench"] for f in timed):
        of_bench = [f for f in timed if f["bench"] == bench]
        for quantity, label in QUANTITIES.items():
            canvas = Canvas(layout="constrained")
            panels = _by_shape([f for f in of_bench if f["base"] is None])
            with_lines = any(len({f["shape"].get("tokens") for f in panel}) > 1 for panel in panels.values())
            (_lines if with_lines else _bars)(canvas, panels if with_lines else _by_case(of_bench), quantity, label)
            device = of_bench[0]["environment"]["device"]
            spread = ", with 20th and 80th percentile" if quantity == "latency" else ""
            canvas.suptitle(f"{bench} on {device}: {label}{spread}", fontsize=11)
            for kind in ("png", "svg"):
                written.append(Path(folder) / f"{bench}_{quantity}.{kind}")
                with rc_context({"svg.fonttype": "none"}):  # words stay words, which can be searched
                    canvas.savefig(written[-1], dpi=130)
    return written


def _by_shape(figures: Sequence[Figure]) -> dict[str, list[Figure]]:
    """Figures that differ in nothing but the context length together; panels in the order of their names, so that like
    shapes lie side by side."""
    panels: dict[str, list[Figure]] = {}
    for f in figures:
        name = ", ".join(f"{value} {key}" for key, value in f["shape"].items() if key != "tokens")
        panels.setdefault(name or f["case"], []).append(f)
    return dict(sorted(panels.items()))


def _by_case(figures: Sequence[Figure]) -> dict[str, list[Figure]]:
    return {case: [f for f in figures if f["case"] == case] for case in dict.fromkeys(f["case"] for f in figures)}


def _value(figure: Figure, quantity: str) -> float:
    return figure["us"] if quantity == "latency" else 100 * figure["share"]


def _spread(figure: Figure, quantity: str) -> tuple[float, float]:
    """How far the 20th percentile lies below the median, and the 80th above it."""
    if quantity != "latency":
        return 0.0, 0.0
    return max(0.0, figure["us"] - figure["us_20"]), max(0.0, figure["us_80"] - figure["us"])


def _grid(canvas: Any, count: int, width: float, height: float, margin: float) -> list[Any]:
    """`count` panels of that size in inches, COLUMNS in a row, and room at the right."""
    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    canvas.set_size_inches(columns * width + margin, rows * height + 0.5)
    panels = list(canvas.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[count:]:
        unused.set_visible(False)
    return panels[:count]


def _lines(canvas: Any, panels: dict[str, list[Figure]], quantity: str, label: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    everything = [f for panel in panels.values() for f in panel]
    names = list(dict.fromkeys(f["variant"] for f in everything))
    rivals = {f["variant"] for f in everything if f["is_rival"]}
    shown = {}
    for axes, (title, panel) in zip(_grid(canvas, len(panels), 4.2, 3.6, 2.4), panels.items(), strict=True):
        for place, name in enumerate(names):
            points = sorted((f for f in panel if f["variant"] == name), key=lambda f: f["shape"]["tokens"])
            if not points:
                continue
            errors = list(zip(*(_spread(f, quantity) for f in points), strict=True))
            shown[name] = axes.errorbar(
                [f["shape"]["tokens"] for f in points],
                [_value(f, quantity) for f in points],
                yerr=errors if quantity == "latency" else None,
                color=COLORS[place % len(COLORS)],
                marker=MARKERS[place % len(MARKERS)],
                linestyle="--" if name in rivals else "-",
                linewidth=1.2 if name in rivals else 2.2,
                markersize=5,
                capsize=2,
                elinewidth=0.9,
            )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("context length, tokens")
        axes.set_xscale("log")
        ticks = sorted({f["shape"]["tokens"] for f in panel})
        axes.set_xticks(_apart(ticks))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        if quantity == "latency":  # what grows in proportion is a straight line
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.grid(alpha=0.3)
        axes.set_ylabel(label)
    labels = [name + (" (rival)" if name in rivals else "") for name in shown]
    canvas.legend(list(shown.values()), labels, loc="outside right upper", fontsize=8, frameon=False)


def _apart(ticks: Sequence[int]) -> list[int]:
    """Of ascending ticks those whose labels do not touch on a logarithmic axis: a fifth of it between two."""
    gap = (math.log(ticks[-1]) - math.log(ticks[0])) / 5
    kept = [ticks[0]]
    for tick in ticks[1:]:
        if math.log(tick) - math.log(kept[-1]) > gap:
            kept.append(tick)
    return kept


def _bars(canvas: Any, panels: dict[str, list[Figure]], quantity: str, label: str) -> None:
    height = 1.2 + 0.35 * max(len(panel) for panel in panels.values())
    grid = _grid(canvas, len(panels), 4.8, height, 0)
    for axes, (title, panel) in zip(grid, panels.items(), strict=True):
        panel = panel[::-1]  # the first at the top
        values = [_value(f, quantity) for f in panel]
        errors = list(zip(*(_spread(f, quantity) for f in panel), strict=True))
        names = [f["variant"] + (" (rival)" if f["is_rival"] else "") for f in panel]
        bars = axes.barh(
            names, values, xerr=errors if quantity == "latency" else None, capsize=2, ecolor="#444444",
            color=["#b0b0b0" if f["is_rival"] else COLORS[0] for f in panel],
        )  # fmt: skip
        numbers = [f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in values]
        axes.bar_label(bars, numbers, padding=4, fontsize=8)
        axes.margins(x=0.25)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(label)
        axes.tick_params(labelsize=8)
        axes.locator_params(axis="x", nbins=5)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", help="a file that --json wrote")
    parser.add_argument("folder", help="where the pictures go")
    args = parser.parse_args(argv)
    try:
        check()
        figures = [line for line in read_json_lines(args.results) if line["bench"] != "ceilings"]
        for path in draw(figures, args.folder):
            print(path)
    except (ImportError, OSError, ValueError, KeyError) as error:
        print(f"plots: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
