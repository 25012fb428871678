"""worldkv bench compare: two result files side by side."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .report import table, write_json

Figure = dict[str, Any]

UNTIMED = ("ceilings", "conformance", "racecheck")  # what device.sh puts beside the figures


def compare(args: argparse.Namespace) -> int:
    """Print what both files have timed, and the lines that have no partner; and all of it as JSON, if asked for."""
    out = sys.stderr if args.json == "-" else sys.stdout
    a, b = _read("A", args.a), _read("B", args.b)
    devices = sorted({f["environment"]["device"] for f in (*a.values(), *b.values())})
    if len(devices) > 1 and not args.any:
        raise ValueError(f"the figures come from different devices: {', '.join(devices)}; --any compares them")
    columns = ["bench", "case", "variant", "us A", "us B", "B/A", "beyond 20/80"]
    rows, alone, untimed = [], [], 0
    result: dict[str, Any] = {"command": "bench compare", "devices": devices, "timed_in_both": [], "timed_in_one": []}
    for key in dict.fromkeys([*a, *b]):
        first, second = a.get(key), b.get(key)
        in_a, in_b = (f is not None and f["status"] == "timed" for f in (first, second))
        if in_a and in_b:
            ratio = second["us"] / first["us"]
            mark = _mark(first, second)
            rows.append([*key, f"{first['us']:.1f}", f"{second['us']:.1f}", f"{ratio:.2f}", mark])
            times = {"us_a": first["us"], "us_b": second["us"], "b_over_a": ratio, "beyond_20_80": mark or None}
            result["timed_in_both"].append({**_named(key), **times})
        elif in_a or in_b:
            file, why = "A" if in_a else "B", _why(second if in_a else first)
            alone.append(f"timed in {file} only: {', '.join(key)}: {why}")
            result["timed_in_one"].append({**_named(key), "in": file.lower(), "why": why})
        else:
            untimed += 1
    for name, path, figures in (("A", args.a, a), ("B", args.b, b)):
        commits = sorted({str(f["environment"].get("commit"))[:12] for f in figures.values()})
        print(f"{name}: {path}, commit {', '.join(commits)}", file=out)
        result[name.lower()] = {"path": path, "commits": commits}
    print(f"{', '.join(devices)}\n", file=out)
    print(table(columns, rows, left=3) if rows else "no figure was timed in both files", file=out)
    print("\n".join(["", *alone, f"timed in neither: {untimed}"] if alone or untimed else []), file=out)
    write_json(args.json, {**result, "timed_in_neither": untimed})
    return 0


def _named(key: tuple[str, str, str]) -> dict[str, str]:
    return dict(zip(("bench", "case", "variant"), key, strict=True))


def _mark(a: Figure, b: Figure) -> str:
    """What B is where the ranges from 20th to 80th percentile do not meet."""
    if b["us_20"] > a["us_80"]:
        return "slower"
    return "faster" if b["us_80"] < a["us_20"] else ""


def _why(figure: Figure | None) -> str:
    return "no such line in the other" if figure is None else f"{figure['status']} in the other: {figure['reason']}"


def _read(argument: str, path: str) -> dict[tuple[str, str, str], Figure]:
    """Figures by bench, case and variant; of equal ones the last. Raises ValueError that names the one at fault."""
    figures = {}
    try:
        found = read_figures(path)
    except OSError as error:
        wanted = f"{argument} must be a file that can be read"
        raise ValueError(f"compare: {wanted}, got {path!r}: {error.strerror}") from error
    for where, figure in found:
        try:
            if figure["bench"] in UNTIMED:
                continue
            key = (figure["bench"], figure["case"], figure["variant"])
            times = [figure[name] for name in ("us_20", "us", "us_80")]
            figure["reason"], figure["environment"]["device"]
            if figure["status"] == "timed" and not all(isinstance(t, float | int) and t > 0 for t in times):
                raise ValueError("times")
            figures[key] = figure
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}, {where}: not a figure that --json or --jsonl wrote") from None
    if not figures:
        raise ValueError(f"{path} holds no figures")
    return figures


def read_figures(path: str | Path) -> list[tuple[str, Any]]:
    """What a file of --jsonl or --json holds, each with where it stands there: "line 3", or "figure 3" of a document.

    Raises ValueError that names the first line that is no JSON.
    """
    text = Path(path).read_text()
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None
    if isinstance(document, dict) and isinstance(document.get("figures"), list):
        return [(f"figure {number}", figure) for number, figure in enumerate(document["figures"], 1)]
    figures = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            figures += [(f"line {number}", json.loads(line))] if line.strip() else []
        except (ValueError, RecursionError):
            raise ValueError(f"{path}, line {number}: not a figure that --json or --jsonl wrote") from None
    return figures
