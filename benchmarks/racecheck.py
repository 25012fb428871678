"""Whether compute-sanitizer's racecheck follows the way in which segment attention gives shared memory back.

    python benchmarks/racecheck.py [--jsonl FILE]

Of the kernels of conformance/ that hand a slot from a writer to readers and back, those that are right by the memory
model of PTX and one with a race: how many hazards racecheck reports of each. Exit status 0 when it finds the race, and
where there is no GPU of this kind or no compute-sanitizer; 1 when it does not, so that its silence says nothing; 2 when
the kernels could not be compiled or the tool could not be run.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import conformance
import torch
from common import append_json_line
from machine import environment

from worldkv_kernels.cli.report import writable

RACE = "handoff_too_early"
KERNELS = {
    "handoff_by_lanes": "every lane arrives for itself",
    "handoff_by_lane": "one lane arrives for its warp, after __syncwarp()",
    "ring": "as handoff_by_lane, with tiles from the copy engine",
    RACE: "a race: given back before it is read",
}
SECONDS = 30.0  # a kernel


def hazards(library: Path, kernel: str) -> int:
    """As racecheck counts them. Raises RuntimeError with what it says where there is no count."""
    run = Path(__file__).with_name("conformance_run.py")
    with tempfile.TemporaryDirectory() as folder:
        command = ["compute-sanitizer", "--tool", "racecheck", sys.executable, str(run), str(library), folder, kernel]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"racecheck of {kernel} ran past {SECONDS:.0f} s") from None
    found = re.search(r"RACECHECK SUMMARY: (\d+) hazard", done.stdout)
    if found is None or kernel not in done.stdout.splitlines():  # conformance_run's word that the kernel has ended
        raise RuntimeError(f"racecheck of {kernel} gave no count: {(done.stdout + done.stderr).strip()[-2000:]}")
    return int(found[1])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jsonl", metavar="FILE", help="append one JSON line per kernel")
    args = parser.parse_args(argv)
    missing = None if shutil.which("compute-sanitizer") else "compute-sanitizer is not on the PATH"
    if reason := conformance.why_not() or missing:
        print(f"racecheck: skipped: {reason}")
        return 0
    counts = {}
    try:
        writable("--jsonl", args.jsonl)
        with tempfile.TemporaryDirectory() as folder:
            library = conformance.compile_for_gpu(Path(folder))
            record = environment(torch.device("cuda", 0))
            for kernel, says in KERNELS.items():
                counts[kernel] = hazards(library, kernel)
                print(f"{counts[kernel]:5} hazards  {kernel}: {says}", flush=True)
                figure = {"bench": "racecheck", "case": kernel, "hazards": counts[kernel], "environment": record}
                append_json_line(args.jsonl, figure)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"racecheck: {error}", file=sys.stderr)
        return 2
    if not counts[RACE]:
        print("racecheck finds no race here: that it reports none elsewhere says nothing")
        return 1
    if counts["handoff_by_lanes"]:
        print("racecheck does not follow barriers in shared memory: it reports hazards of every slot that they guard")
    elif counts["handoff_by_lane"]:
        print("racecheck does not take one lane's arrival for its warp's, as segment attention does")
    else:
        print("racecheck follows both ways: what it reports of segment attention is to be looked into")
    return 0


if __name__ == "__main__":
    sys.exit(main())
