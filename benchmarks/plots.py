"""Pictures of the figures: latency, and share of the measured ceiling, against context length.

python benchmarks/plots.py RESULTS.jsonl DIR [--case REGEX] [--only A,B]
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common import measured_in, picked
from plots_common import headline, save, wrapped
from plots_rollout import draw_rollouts
from plots_world import draw_bits

COLORS = [
    "#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22",
    "#000000", "#393b79", "#843c39", "#637939", "#7b4173", "#ad8a00",
]  # fmt: skip
MARKERS = "osD^vP*X<"  # nine to sixteen colors: no two lines are alike
COLUMNS = 3  # panels in a row
CEILING = "at the measured ceiling"
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

    A panel with a line per variant for each shape that comes in more than one context length, and one with bars for
    each other case. Lines leave out what a variant adds to its base, such as lse. Both show the ceiling: of latency,
    the least time that the work can take. A bench of which nothing was timed has no picture.
    Rollouts have a picture of their own, see plots_rollout, and so have the small world's studies, see plots_world.
    """
    from matplotlib.figure import Figure as Canvas

    Path(folder).mkdir(parents=True, exist_ok=True)
    of_world = [f for f in figures if f["bench"] == "world"]
    figures = [f for f in figures if f["bench"] != "world"]
    timed = [f for f in figures if f.get("status") == "timed" and f["bench"] != "rollout"]
    written = draw_rollouts([f for f in figures if f["bench"] == "rollout"], folder) + draw_bits(of_world, folder)
    for bench in dict.fromkeys(f["bench"] for f in timed):
        of_bench = [f for f in timed if f["bench"] == bench]
        lined, barred = _panels(of_bench)
        for quantity, label in QUANTITIES.items():
            canvas = Canvas(layout="constrained")
            rows = 0 if lined else max(len(panel) for panel in barred.values())
            width, height, margin = (4.6, 3.9, 2.2) if lined else (5.0, 1.3 + 0.33 * rows, 0)
            panels = _grid(canvas, len(lined) + len(barred), width, height, margin)
            if lined:
                _lines(canvas, panels[: len(lined)], lined, quantity, label)
            _bars(panels[len(lined) :], barred, quantity, label)
            device = of_bench[0]["environment"]["device"]
            spread = ", with 20th and 80th percentile" if quantity == "latency" else ""
            headline(canvas, f"{bench} on {device}: {label}{spread}", of_bench)
            written += save(canvas, Path(folder) / f"{bench}_{quantity}")
    return written


def _panels(figures: Sequence[Figure]) -> tuple[dict[str, list[Figure]], dict[str, list[Figure]]]:
    """Figures that differ in nothing but the context length together, by shape in the order of their names, so that
    like shapes lie side by side; and those of the other cases, by case."""
    shapes: dict[str, list[Figure]] = {}
    for f in figures:
        shapes.setdefault(", ".join(_words(f["shape"])), []).append(f)
    lined = {
        name: [f for f in panel if f["base"] is None]
        for name, panel in sorted(shapes.items())
        if len({f["shape"]["tokens"] for f in panel}) > 1 and len({f["case"] for f in panel}) > 1
    }
    alone = [f for name, panel in shapes.items() if name not in lined for f in panel]
    return lined, {case: [f for f in alone if f["case"] == case] for case in dict.fromkeys(f["case"] for f in alone)}


def _words(shape: dict[str, Any]) -> Iterator[str]:
    """What a shape is, but for its context length."""
    for key, value in shape.items():
        if key == "dtype":
            yield value
        elif key != "tokens":
            yield f"{key} {value}" if key == "head_dim" else f"{value} {key}"


def _value(figure: Figure, quantity: str) -> float:
    return figure["us"] if quantity == "latency" else 100 * figure["share"]


def _ceiling(figure: Figure, quantity: str) -> float:
    """What the value would be at the ceiling that binds."""
    return figure["us"] * figure["share"] if quantity == "latency" else 100.0


def _spread(figure: Figure, quantity: str) -> tuple[float, float]:
    """How far the 20th percentile lies below the median, and the 80th above it."""
    if quantity != "latency":
        return 0.0, 0.0
    return max(0.0, figure["us"] - figure["us_20"]), max(0.0, figure["us_80"] - figure["us"])


def _grid(canvas: Any, count: int, width: float, height: float, margin: float) -> list[Any]:
    """`count` panels of that size in inches, COLUMNS in a row, and room at the right."""
    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    canvas.set_size_inches(columns * width + margin, rows * height + 0.6)
    panels = list(canvas.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[count:]:
        unused.set_visible(False)
    return panels[:count]


def _lines(canvas: Any, grid: Sequence[Any], panels: dict[str, list[Figure]], quantity: str, label: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    everything = [f for panel in panels.values() for f in panel]
    names = list(dict.fromkeys(f["variant"] for f in everything))
    rivals = {f["variant"] for f in everything if f["is_rival"]}
    shown = {}
    for axes, (title, panel) in zip(grid, panels.items(), strict=True):
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
        ceilings = sorted({f["shape"]["tokens"]: _ceiling(f, quantity) for f in panel}.items())
        (shown[CEILING],) = axes.plot(*zip(*ceilings, strict=True), color="black", linestyle=":", linewidth=1.4)
        axes.set_title(wrapped(title, 40), fontsize=9)
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
    shown = {**{name: shown[name] for name in names if name in shown}, CEILING: shown[CEILING]}
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


def _bars(grid: Sequence[Any], panels: dict[str, list[Figure]], quantity: str, label: str) -> None:
    from matplotlib.ticker import StrMethodFormatter

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
        ceilings = [_ceiling(f, quantity) for f in panel]
        axes.scatter(ceilings, names, marker="|", s=220, color="black", linewidths=1.4, zorder=3)
        axes.margins(x=0.25)
        axes.set_xlim(left=0)
        axes.set_title(wrapped(title, 48), fontsize=9)
        axes.set_xlabel(f"{label}  ( | {CEILING})" if quantity == "latency" else f"{label}  ( | )", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", help="a file that --json or --jsonl wrote")
    parser.add_argument("folder", help="where the pictures go")
    parser.add_argument("--case", metavar="REGEX", default="", help="of the cases those whose name it is found in")
    parser.add_argument(
        "--only", metavar="A,B", help="of the variants those so named, or by the first words of several"
    )
    args = parser.parse_args(argv)
    try:
        check()
        figures = [f for f in measured_in(args.results) if re.search(args.case, f["case"])]
        variants = {f["variant"]: f.get("is_rival", False) for f in figures}  # a study has no rivals
        only = None if args.only is None else args.only.split(",")
        for word in only or ():
            if not picked(variants, [word]):
                raise ValueError(f"--only must be of ours, {', '.join(variants)}; got {word!r}")
        shown = picked(variants, only)
        written = draw([f for f in figures if f["variant"] in shown], args.folder)
        if not written:
            raise ValueError(f"{args.results} must hold, and --case and --only leave, what has a picture; got nothing")
        print(*written, sep="\n")
    except (re.error, ImportError, OSError, ValueError, KeyError) as error:
        print(f"plots: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
